package integration

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// envSeed repeats one random forest.
const envSeed = "OCICKPT_TEST_SEED"

// TestRandomForests grows random process forests (see forest.c for the steps),
// checkpoints and restores each twice, and asserts that /proc shows the same
// pids, parents, groups and sessions, zombies included.
func TestRandomForests(t *testing.T) {
	first, forests := uint64(time.Now().UnixNano()), 12
	if given := os.Getenv(envSeed); given != "" {
		n, err := strconv.ParseUint(given, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		first, forests = n, 1
	}
	for i := range uint64(forests) {
		script := randomForest(first + i)
		t.Run(fmt.Sprintf("seed=%d", first+i), func(t *testing.T) {
			t.Logf("forest %s", script)
			c := newContainer(t, withReport("forest"), withArgs("/bin/forest", script)).run()
			c.progress(10)
			before := c.tree()
			if want := 1 + strings.Count(script, "(") - strings.Count(script, "x"); len(before) != want {
				t.Fatalf("the forest has %d processes, not %d", len(before), want)
			}
			for range 2 {
				c.checkpoint()
				c.mustBeGone()
				c.restore()
				c.sameTree(before)
				if now := c.tree(); len(now) != len(before) {
					t.Fatalf("the forest had %d processes and has %d", len(before), len(now))
				}
				c.progress(20)
			}
			c.mustBe(specs.StateRunning)
		})
	}
}

// randomForest writes a script of at most 40 processes, 6 deep.
func randomForest(seed uint64) string {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0)), left: 40}
	g.children(5, 0)
	return g.String()
}

type generator struct {
	*rand.Rand
	strings.Builder
	left int // processes that may still be made
}

func (g *generator) children(most, depth int) {
	for range g.IntN(most + 1) {
		if g.left == 0 || depth == 6 {
			return
		}
		g.left--
		g.process(depth + 1)
	}
}

// process has its session or group of its own before or after its children,
// which decides what these inherit. Some take in the orphans below them. A session leader cannot change its group
// and a group leader cannot start a session; zombies of both kinds leave
// groups and sessions without their leaders.
func (g *generator) process(depth int) {
	own := []string{"", "", "s", "g", "p"}[g.IntN(5)]
	early := g.IntN(2) == 0
	g.WriteByte('(')
	if g.IntN(5) == 0 {
		g.WriteByte('r')
	}
	if early {
		g.WriteString(own)
	}
	g.children(3, depth)
	if !early {
		g.WriteString(own)
	}
	g.WriteString([]string{"", "", "", "", "x", "z"}[g.IntN(6)])
	g.WriteByte(')')
}

// TestForestSteps runs the forest program alone: what it grows is what its
// script says. Pids are counted from the first of its own: runc's init, which
// becomes the first process, has used some for its threads.
func TestForestSteps(t *testing.T) {
	c := newContainer(t, withReport("forest"), withArgs("/bin/forest", "((g)(sz)x)((p)s())(r(()x))")).run()
	c.progress(10)
	want := map[int][4]int{ // parent, group, session, zombie
		1:  {0, 1, 1, 0},
		3:  {1, 3, 1, 0}, // adopted by the first process
		4:  {1, 4, 4, 1},
		5:  {1, 5, 5, 0},
		6:  {5, 1, 1, 0}, // forked before its parent's setsid
		7:  {5, 5, 5, 0},
		8:  {1, 1, 1, 0},
		10: {8, 1, 1, 0}, // adopted by its grandparent
	}
	got := map[int][4]int{}
	tree := c.tree()
	pids := slices.Sorted(maps.Keys(tree))
	counted := func(pid int) int {
		if pid > 1 {
			pid -= pids[1] - 3
		}
		return pid
	}
	for pid, p := range tree {
		zombie := 0
		if p.Zombie {
			zombie = 1
		}
		got[counted(pid)] = [4]int{counted(p.Parent), counted(p.Group), counted(p.Session), zombie}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the forest is %v, not %v", got, want)
	}
}
