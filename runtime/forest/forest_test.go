package forest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Shorthand for tables: pid, ppid, pgid, sid.
func p(pid, ppid, pgid, sid int) Process { return Process{Pid: pid, Ppid: ppid, Pgid: pgid, Sid: sid} }

func subreaper(p Process) Process { p.Subreaper = true; return p }
func zombie(p Process) Process    { p.Zombie = true; return p }
func sharing(p Process, t Table, id int) Process {
	p.Shared[t] = id
	return p
}

func TestPlans(t *testing.T) {
	for _, test := range []struct {
		name      string
		processes []Process
		plan      string
		ghosts    []int
	}{
		{name: "init alone", processes: []Process{p(1, 0, 1, 1)}},
		{name: "init of an outer session", processes: []Process{p(1, 0, 0, 0), p(2, 1, 0, 0), p(3, 2, 3, 0)},
			plan: "1: fork 2; 2: fork 3; 3: setpgid 3"},
		{name: "init left the outer group after a fork", processes: []Process{p(1, 0, 1, 0), p(2, 1, 0, 0), p(3, 1, 1, 0)},
			plan: "1: fork 2; 1: fork 3; 1: setpgid 1; 3: setpgid 1"},
		{name: "master and workers", processes: []Process{p(1, 0, 1, 1), p(7, 1, 1, 1), p(8, 1, 1, 1), p(9, 7, 1, 1)},
			plan: "1: fork 7; 7: fork 9; 1: fork 8"},
		{name: "daemon that leads its session", processes: []Process{p(1, 0, 1, 1), p(20, 1, 20, 20), p(21, 20, 20, 20), p(22, 20, 20, 20)},
			plan: "1: fork 20; 20: setsid; 20: fork 21; 20: fork 22"},
		{name: "daemon of two forks", processes: []Process{p(1, 0, 1, 1), p(12, 1, 11, 11)},
			plan: "1: fork 11; 11: setsid; 11: fork 12; 11: exit", ghosts: []int{11}},
		{name: "nginx: daemon of two forks with workers", processes: []Process{p(1, 0, 1, 1), p(12, 1, 11, 11), p(13, 12, 11, 11), p(14, 12, 11, 11)},
			plan: "1: fork 11; 11: setsid; 11: fork 12; 12: fork 13; 12: fork 14; 11: exit", ghosts: []int{11}},
		{name: "child forked before setsid", processes: []Process{p(1, 0, 1, 1), p(5, 1, 5, 5), p(6, 5, 1, 1), p(7, 5, 5, 5)},
			plan: "1: fork 5; 5: fork 6; 5: setsid; 5: fork 7"},
		{name: "shell with a pipeline", processes: []Process{p(1, 0, 1, 1), p(9, 1, 9, 9), p(10, 9, 10, 9), p(11, 9, 10, 9)},
			plan: "1: fork 9; 9: setsid; 9: fork 10; 10: setpgid 10; 9: fork 11; 11: setpgid 10"},
		{name: "pipeline whose leader has gone", processes: []Process{p(1, 0, 1, 1), p(9, 1, 9, 9), p(11, 9, 10, 9), p(12, 9, 10, 9)},
			plan: "1: fork 9; 9: setsid; 9: fork 11; 11: fork 10; 10: setpgid 10; 11: setpgid 10; 10: exit; " +
				"9: fork 12; 12: setpgid 10", ghosts: []int{10}},
		{name: "pipeline whose leader is a zombie", processes: []Process{p(1, 0, 1, 1), zombie(p(10, 1, 10, 1)), p(11, 1, 10, 1)},
			plan: "1: fork 10; 10: setpgid 10; 1: fork 11; 11: setpgid 10"},
		{name: "job of a shell re-parented to init", processes: []Process{p(1, 0, 1, 1), p(9, 1, 9, 9), p(11, 1, 10, 9)},
			plan: "1: fork 9; 9: setsid; 9: fork 10; 10: setpgid 10; 10: fork 11; 10: exit", ghosts: []int{10}},
		{name: "background process of a live session", processes: []Process{p(1, 0, 1, 1), p(9, 1, 9, 9), p(11, 1, 9, 9)},
			plan: "1: fork 9; 9: setsid; 9: fork 2; 2: fork 11; 2: exit", ghosts: []int{2}},
		{name: "group leader forked after the member", processes: []Process{p(1, 0, 1, 1), p(4, 1, 6, 1), p(5, 1, 1, 1), p(6, 5, 6, 1)},
			plan: "1: fork 4; 1: fork 5; 5: fork 6; 6: setpgid 6; 4: setpgid 6"},
		{name: "group leader that changed its group", processes: []Process{p(1, 0, 1, 1), p(4, 1, 1, 1), p(5, 4, 4, 1)},
			plan: "1: fork 4; 4: setpgid 4; 4: fork 5; 4: setpgid 1"},
		{name: "leaders that swapped their groups", processes: []Process{p(1, 0, 1, 1), p(4, 1, 5, 1), p(5, 1, 4, 1)},
			plan: "1: fork 4; 4: setpgid 4; 1: fork 5; 5: setpgid 5; 4: fork 2; 4: setpgid 5; 5: setpgid 4; 2: exit", ghosts: []int{2}},
		{name: "subreaper with orphans", processes: []Process{p(1, 0, 1, 1), subreaper(p(5, 1, 5, 5)), p(7, 5, 6, 6), p(9, 5, 8, 8)},
			plan: "1: fork 5; 5: setsid; 5: fork 6; 6: setsid; 6: fork 7; 5: subreaper true; 6: exit; " +
				"5: fork 8; 8: setsid; 8: fork 9; 8: exit", ghosts: []int{6, 8}},
		{name: "was a subreaper when its orphan came", processes: []Process{p(1, 0, 1, 1), p(5, 1, 5, 5), p(7, 5, 6, 6)},
			plan: "1: fork 5; 5: setsid; 5: fork 6; 6: setsid; 6: fork 7; 5: subreaper true; 6: exit; 5: subreaper false", ghosts: []int{6}},
		{name: "session without leader under two parents", processes: []Process{p(1, 0, 1, 1), p(5, 1, 1, 1), p(7, 5, 6, 6), p(8, 1, 6, 6)},
			plan:   "1: fork 5; 5: fork 6; 6: setsid; 6: fork 7; 6: fork 2; 2: fork 8; 2: exit; 5: subreaper true; 6: exit; 5: subreaper false",
			ghosts: []int{6, 2}},
		{name: "orphan in the session of a process beside its subreaper", processes: []Process{p(1, 0, 1, 1), subreaper(p(5, 1, 1, 1)), p(9, 1, 9, 9), p(11, 5, 9, 9)},
			plan:   "1: fork 5; 5: fork 2; 2: fork 9; 9: setsid; 9: fork 4; 4: fork 11; 5: subreaper true; 4: exit; 5: subreaper false; 2: exit; 5: subreaper true",
			ghosts: []int{2, 4}},
		{name: "re-parented leader of one group in another without leader", processes: []Process{p(1, 0, 1, 1), p(9, 1, 9, 9), p(11, 1, 10, 9), p(12, 11, 11, 9)},
			plan: "1: fork 9; 9: setsid; 9: fork 2; 2: fork 11; 11: setpgid 11; 11: fork 12; 2: exit; " +
				"11: fork 10; 10: setpgid 10; 11: setpgid 10; 10: exit", ghosts: []int{2, 10}},
		{name: "outer group below processes put in line", processes: []Process{p(1, 0, 0, 0), p(2, 1, 0, 0), p(4, 1, 50, 0), p(9, 4, 0, 0), p(7, 2, 6, 6), p(8, 4, 6, 6)},
			plan: "1: fork 2; 2: fork 10; 10: fork 4; 4: fork 6; 6: setsid; 6: fork 7; 6: fork 11; 11: fork 8; " +
				"4: subreaper true; 11: exit; 4: subreaper false; 2: subreaper true; 6: exit; " +
				"4: fork 9; 4: fork 50; 50: setpgid 50; 4: setpgid 50; 50: exit; 2: subreaper false; 10: exit", ghosts: []int{10, 6, 11, 50}},
		{name: "brought in, with a child and an orphan", processes: []Process{p(1, 0, 1, 1), p(5, 0, 5, 5), p(6, 5, 5, 5), p(8, 1, 7, 5)},
			plan: "enter 5; 5: setsid; 5: fork 6; 5: fork 7; 7: setpgid 7; 7: fork 8; 7: exit", ghosts: []int{7}},
		{name: "orphan of one that was brought in and is gone", processes: []Process{p(1, 0, 1, 1), p(8, 1, 7, 7)},
			plan: "1: fork 7; 7: setsid; 7: fork 8; 7: exit", ghosts: []int{7}},
		{name: "session below one with a larger number that was brought in", processes: []Process{p(1, 0, 1, 1), p(9, 0, 9, 9), p(4, 9, 7, 7), p(8, 1, 7, 7), p(6, 1, 6, 9)},
			plan: "enter 9; 9: setsid; 9: fork 7; 7: setsid; 7: fork 4; 7: fork 2; 2: fork 8; 2: exit; 9: subreaper true; 7: exit; " +
				"9: fork 10; 10: fork 6; 6: setpgid 6; 9: subreaper false; 10: exit", ghosts: []int{7, 2, 10}},
		{name: "root that is not pid 1", processes: []Process{p(70, 3, 70, 70), p(72, 70, 71, 71)},
			plan:   "70: fork 71; 71: setsid; 71: fork 72; 70: subreaper true; 71: exit; 70: subreaper false",
			ghosts: []int{71}},
		{name: "child in the address space of its parent", processes: []Process{sharing(p(1, 0, 1, 1), MM, 1), sharing(p(4, 1, 1, 1), MM, 1), p(6, 4, 1, 1)},
			plan: "1: fork 4 sharing address space; 4: fork 6"},
		{name: "siblings share what their parent does not", processes: []Process{p(1, 0, 1, 1), sharing(p(4, 1, 1, 1), MM, 4), sharing(p(6, 1, 1, 1), MM, 4)},
			plan:   "1: fork 4; 4: fork 2 sharing address space; 2: fork 6 sharing address space; 2: exit",
			ghosts: []int{2}},
		{name: "cousins share what their parents do not", processes: []Process{p(1, 0, 1, 1), p(4, 1, 1, 1), p(6, 1, 1, 1),
			sharing(p(7, 4, 1, 1), FS, 7), sharing(p(8, 6, 1, 1), FS, 7)},
			plan: "1: fork 4 sharing file system context; 4: fork 7 sharing file system context; 4: leave file system context; " +
				"1: fork 6 sharing file system context; 6: fork 8 sharing file system context; 6: leave file system context; 1: leave file system context"},
		{name: "table left between two children", processes: []Process{sharing(p(1, 0, 1, 1), Files, 1), sharing(p(4, 1, 1, 1), Files, 4),
			sharing(p(5, 4, 1, 1), Files, 1), sharing(p(6, 4, 1, 1), Files, 4)},
			plan: "1: fork 4 sharing descriptor table; 4: fork 5 sharing descriptor table; 4: leave descriptor table; 4: fork 6 sharing descriptor table"},
	} {
		t.Run(test.name, func(t *testing.T) {
			plan, err := Grow(test.processes, threads)
			if err != nil {
				t.Fatal(err)
			}
			var steps []string
			for _, s := range plan.Steps {
				steps = append(steps, s.String())
			}
			if got := strings.Join(steps, "; "); got != test.plan {
				t.Errorf("plan is\n%s, want\n%s", got, test.plan)
			}
			if !slices.Equal(plan.Ghosts, test.ghosts) {
				t.Errorf("ghosts %v, want %v", plan.Ghosts, test.ghosts)
			}
			if err := play(plan, test.processes); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	for _, test := range []struct {
		name      string
		processes []Process
		pid       int
	}{
		{"nothing", nil, 0},
		{"pid 0", []Process{p(0, 5, 0, 0)}, 0},
		{"pid twice", []Process{p(1, 0, 1, 1), p(4, 1, 1, 1), p(4, 1, 1, 1)}, 4},
		{"loop beside the root", []Process{p(1, 0, 1, 1), p(4, 5, 1, 1), p(5, 4, 1, 1)}, 4},
		{"loop without root", []Process{p(4, 5, 1, 1), p(5, 4, 1, 1)}, 4},
		{"child of a zombie", []Process{p(1, 0, 1, 1), zombie(p(4, 1, 1, 1)), p(5, 4, 1, 1)}, 5},
		{"root in a session of its own namespace", []Process{p(7, 0, 7, 5)}, 7},
		{"outer session below a leader", []Process{p(1, 0, 1, 1), p(4, 1, 0, 0)}, 4},
		{"outer group in an inner session", []Process{p(1, 0, 0, 0), p(4, 1, 4, 4), p(5, 4, 0, 4)}, 5},
		{"session of a process that leads none", []Process{p(1, 0, 1, 1), p(4, 1, 1, 1), p(5, 1, 4, 4)}, 5},
		{"session with the number of a thread", []Process{p(1, 0, 1, 1), p(4, 1, 3, 3)}, 4},
		{"group with the number of a thread", []Process{p(1, 0, 1, 1), p(4, 1, 3, 1)}, 4},
		{"leader of a session in another group", []Process{p(1, 0, 1, 1), p(4, 1, 1, 4)}, 4},
		{"group in two sessions", []Process{p(1, 0, 1, 1), p(4, 1, 4, 4), p(6, 4, 9, 4), p(7, 1, 9, 1)}, 7},
		{"group of a process in another session", []Process{p(1, 0, 1, 1), p(4, 1, 4, 4), p(6, 4, 4, 4), p(7, 1, 6, 1)}, 7},
		{"group with the number of another session", []Process{p(1, 0, 1, 1), p(4, 1, 8, 8), p(5, 1, 8, 1)}, 5},
		{"back in the outer group", []Process{p(1, 0, 0, 0), p(4, 1, 0, 0), p(5, 4, 4, 0)}, 4},
		{"session of the root below another one", []Process{p(1, 0, 1, 1), p(4, 1, 4, 4), p(5, 4, 4, 4), p(6, 5, 1, 1)}, 6},
		{"born in two sessions", []Process{p(1, 0, 1, 1), p(4, 1, 4, 4), p(5, 4, 5, 5), p(6, 5, 1, 1), p(7, 5, 4, 4)}, 7},
		{"init below another root", []Process{p(7, 0, 7, 7), p(1, 7, 7, 7)}, 1},
		{"session of an init outside the tree", []Process{p(7, 0, 7, 7), p(8, 7, 1, 1)}, 8},
		{"group of an init outside the tree", []Process{p(7, 0, 7, 7), p(8, 7, 1, 7)}, 8},
		{"brought in into the session of the root", []Process{p(1, 0, 1, 1), p(4, 0, 1, 1)}, 4},
		{"brought in into a session from outside", []Process{p(1, 0, 1, 1), p(4, 0, 0, 0)}, 4},
		{"brought in and ended", []Process{p(1, 0, 1, 1), zombie(p(4, 0, 4, 4))}, 4},
		{"in the session of the root below one brought in", []Process{p(1, 0, 1, 1), p(4, 0, 4, 4), p(5, 4, 1, 1)}, 5},
		{"in the session of the root below a leader brought in", []Process{p(1, 0, 1, 1), p(4, 0, 4, 4), p(5, 4, 5, 5), p(6, 5, 1, 1)}, 5},
		{"below two that were brought in", []Process{p(1, 0, 1, 1), p(4, 0, 4, 4), p(5, 0, 5, 5), p(7, 4, 6, 6), p(8, 5, 6, 6)}, 6},
		{"negative session", []Process{p(1, 0, 1, 1), p(4, 1, 4, -4)}, 4},
		{"address space of cousins", []Process{p(1, 0, 1, 1), p(4, 1, 1, 1), p(6, 1, 1, 1), sharing(p(7, 4, 1, 1), MM, 7), sharing(p(8, 6, 1, 1), MM, 7)}, 4},
		{"signal actions of another address space", []Process{sharing(p(1, 0, 1, 1), Sighand, 1), sharing(p(4, 1, 1, 1), Sighand, 1)}, 1},
		{"negative group", []Process{p(1, 0, 1, 1), p(4, 1, -4, 1)}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			plan, err := Grow(test.processes, threads)
			var unreachable *Unreachable
			if !errors.As(err, &unreachable) {
				t.Fatalf("plan %v, error %v; want *Unreachable", plan, err)
			}
			if unreachable.Pid != test.pid || unreachable.Reason == "" {
				t.Errorf("%v; want it to be about pid %d", err, test.pid)
			}
		})
	}
}

func TestFurtherRoots(t *testing.T) {
	_, err := Grow([]Process{p(9, 0, 9, 9), p(2, 0, 2, 2), p(10, 9, 9, 9), p(4, 0, 4, 4)}, nil)
	var roots *FurtherRoots
	if !errors.As(err, &roots) {
		t.Fatalf("error %v, want *FurtherRoots", err)
	}
	if roots.Root != 2 || !slices.Equal(roots.Pids, []int{4, 9}) {
		t.Errorf("root %d and %v, want 2 and [4 9]", roots.Root, roots.Pids)
	}
}

// TestLarge: trees of 10,000 processes of several shapes are planned in well under a second.
func TestLarge(t *testing.T) {
	const n = 10000
	shapes := map[string]func(pid int) Process{
		"flat":        func(pid int) Process { return p(pid, 1, 1, 1) },
		"chain":       func(pid int) Process { return p(pid, pid-1, 1, 1) },
		"leaders":     func(pid int) Process { return p(pid, pid-1, pid, pid) },
		"groups":      func(pid int) Process { return p(pid, 1, pid-pid%10, 1) },
		"daemons":     func(pid int) Process { return p(pid, 1, pid+n, pid+n) },
		"sharing":     func(pid int) Process { return sharing(p(pid, 1, 1, 1), Files, 2) },
		"dead groups": func(pid int) Process { return p(pid, pid/2, pid+n, 1) },
	}
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			list := []Process{p(1, 0, 1, 1)}
			for pid := 2; pid <= n; pid++ {
				list = append(list, shape(pid))
			}
			if name == "groups" {
				for i := 1; i < 9; i++ {
					list[i].Pgid = 1
				}
			}
			start := time.Now()
			plan, err := Grow(list, nil)
			if err != nil {
				t.Fatal(err)
			}
			took := time.Since(start)
			t.Logf("%d steps, %d ghosts in %v", len(plan.Steps), len(plan.Ghosts), took)
			if took > 2*time.Second {
				t.Errorf("planning took %v", took)
			}
		})
	}
}

func BenchmarkGrow(b *testing.B) {
	for _, size := range []int{100, 1000, 10000} {
		h := newHistory(1)
		h.wrapped = false
		h.live(size)
		state := h.state()
		b.Run(fmt.Sprint(len(state)), func(b *testing.B) {
			for b.Loop() {
				if _, err := Grow(state, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzPlan: no list makes Grow panic or run on, and a plan leads to the list it was made for. Each
// process is five bytes; small numbers make them meet.
func FuzzPlan(f *testing.F) {
	f.Add([]byte{1, 0, 1, 1, 0, 12, 1, 11, 11, 0})
	f.Add([]byte{1, 0, 0, 0, 0, 4, 1, 5, 0, 2, 5, 1, 4, 0, 1})
	for seed := range uint64(20) {
		h := newHistory(seed)
		h.live(20)
		var data []byte
		for _, p := range h.state() {
			data = append(data, byte(p.Pid), byte(p.Ppid), byte(p.Pgid), byte(p.Sid), 0)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var list []Process
		for b := range slices.Chunk(data, 5) {
			if len(b) == 5 && len(list) < 200 {
				list = append(list, Process{int(b[0]), int(b[1]), int(b[2]), int(b[3]), b[4]&1 != 0, b[4]&2 != 0, Shared{}})
			}
		}
		plan, err := Grow(list, nil)
		if err != nil {
			return
		}
		if err := play(plan, list); err != nil {
			t.Errorf("%v\nlist: %+v\nplan: %v", err, list, plan.Steps)
		}
	})
}
