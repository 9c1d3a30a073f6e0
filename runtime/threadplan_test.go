package runtime

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ocickpt/ocickpt/image"
)

// threadLife is a random life of a process's threads: who has which tables.
func threadLife(r *rand.Rand, size int) [][len(threadTables)]int {
	next := len(threadTables)
	all := [][len(threadTables)]int{{1, 2, 3}}
	leave := func(i int) {
		for kind := range all[i] {
			if r.IntN(2) == 0 {
				next++
				all[i][kind] = next
			}
		}
	}
	for len(all) < size {
		all = append(all, all[r.IntN(len(all))])
		if r.IntN(3) == 0 {
			leave(len(all) - 1)
		}
		if r.IntN(4) == 0 {
			leave(r.IntN(len(all)))
		}
	}
	return all
}

// TestThreadPlans: a plan gives the threads the tables that they have come to have, or there is none.
func TestThreadPlans(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	const lives = 20000
	refused := 0
	for n := range uint64(lives) {
		r := rand.New(rand.NewPCG(seed+n, 0))
		life := threadLife(r, 1+int(n%12))
		rest := life[1:]
		r.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
		task := &image.Task{Threads: make([]image.Thread, len(life)), Files: image.Ref(life[0][0]), FS: image.Ref(life[0][1])}
		for i, tables := range life {
			th := &task.Threads[i]
			th.Tid, th.SemUndo = int32(i+1), uint32(tables[2])
			if tables[0] != life[0][0] {
				th.Files = image.Ref(tables[0])
			}
			if tables[1] != life[0][1] {
				th.FS = image.Ref(tables[1])
			}
		}
		steps, err := planThreads(task)
		if err != nil {
			refused++
			continue
		}
		checkThreadPlan(t, life, steps)
		if t.Failed() {
			t.Fatalf("seed %d: tables %v, plan %+v", seed+n, life, steps)
		}
	}
	// Where three tables are shared crosswise, and who once had them all has left one.
	if refused > lives/30 {
		t.Errorf("%d of %d refused, from seed %d", refused, lives, seed)
	}
}

// checkThreadPlan plays the steps.
func checkThreadPlan(t *testing.T, life [][len(threadTables)]int, steps []threadStep) {
	made := map[int][len(threadTables)]int{0: life[0]}
	known := map[int]bool{life[0][0]: true, life[0][1]: true, life[0][2]: true}
	for _, s := range steps {
		has, ok := made[s.cloner]
		if _, twice := made[s.thread]; !ok || twice {
			t.Errorf("thread %d cannot clone thread %d", s.cloner, s.thread)
		}
		for kind, flag := range threadTables {
			want := life[s.thread][kind]
			switch {
			case s.share&flag != 0 && s.fresh&flag == 0:
				if has[kind] != want {
					t.Errorf("thread %d gets table %d, not %d", s.thread, has[kind], want)
				}
			case s.fresh&flag != 0 && s.share&flag == 0:
				if known[want] {
					t.Errorf("thread %d gets a copy of table %d", s.thread, want)
				}
			default:
				t.Errorf("thread %d: table %d comes from nowhere", s.thread, want)
			}
			known[want] = true
		}
		made[s.thread] = life[s.thread]
	}
	if len(made) != len(life) {
		t.Errorf("%d threads are made of %d", len(made), len(life))
	}
}
