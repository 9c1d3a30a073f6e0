package cgroupfreeze

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// isFrozen asserts what Frozen says.
func isFrozen(t *testing.T, c *Cgroup, want bool) {
	t.Helper()
	frozen, err := c.Frozen()
	check(t, err)
	if frozen != want {
		t.Fatalf("Frozen() = %v, want %v", frozen, want)
	}
}

// stands asserts that a counter makes no progress, runs that it does.
func stands(t *testing.T, count func() int) {
	t.Helper()
	before := count()
	time.Sleep(30 * time.Millisecond)
	if now := count(); now != before {
		t.Fatalf("counted from %d to %d while frozen", before, now)
	}
}

func runs(t *testing.T, count func() int) {
	t.Helper()
	before := count()
	eventually(t, "the counter counts", func() bool { return count() > before })
}

func TestFreezeStopsAndThawContinues(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		_, count := startCounter(t, c.dir)
		start(t, c.dir, "sleep", "1000")
		runs(t, count)
		isFrozen(t, c, false)
		for range 5 {
			check(t, c.Freeze(context.Background()))
			isFrozen(t, c, true)
			stands(t, count)
			check(t, c.Thaw(context.Background()))
			isFrozen(t, c, false)
			runs(t, count)
		}
	})
}

func TestFreezeOfFrozenCgroup(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		_, count := startCounter(t, c.dir)
		check(t, writeValue(c.FreezeWrite())) // as `runc pause` does
		check(t, c.Freeze(context.Background()))
		stands(t, count)
		check(t, writeValue(c.ThawWrite()))
		isFrozen(t, c, false)
		runs(t, count)
		check(t, c.Thaw(context.Background())) // thawing twice is no error
	})
}

func TestFreezeOfEmptyCgroup(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		check(t, c.Freeze(context.Background()))
		isFrozen(t, c, true)
		check(t, c.Thaw(context.Background()))
		isFrozen(t, c, false)
	})
}

func TestFreezeWhileTasksFork(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		start(t, c.dir, "/bin/sh", "-c", "while :; do /bin/true; done")
		for range 20 {
			check(t, c.Freeze(context.Background()))
			before, err := c.Processes()
			check(t, err)
			time.Sleep(3 * time.Millisecond)
			after, err := c.Processes()
			check(t, err)
			if len(before) == 0 || len(before) != len(after) || before[len(before)-1] != after[len(after)-1] {
				t.Fatalf("processes changed while frozen: %v, then %v", before, after)
			}
			check(t, c.Thaw(context.Background()))
			time.Sleep(time.Millisecond)
		}
	})
}

func TestFreezeReachesSubCgroups(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		deep := makeChild(t, makeChild(t, c.dir, "a"), "deep")
		_, count := startCounter(t, deep)
		runs(t, count)
		check(t, c.Freeze(context.Background()))
		stands(t, count)
		check(t, c.Thaw(context.Background()))
		runs(t, count)
	})
}

func startVforkParent(t *testing.T, dir string) *exec.Cmd {
	return startHelper(t, dir, "helper-vfork", unix.SYS_CLONE, 'D')
}

func TestFreezeWithVforkParent(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		startVforkParent(t, c.dir)
		pids, err := c.Processes()
		check(t, err)
		if len(pids) != 2 {
			t.Fatalf("processes %v, want the parent and its child", pids)
		}
		check(t, c.Freeze(context.Background()))
		check(t, c.Thaw(context.Background()))
	})
}

func TestTimeoutNamesTaskAndPutsBack(t *testing.T) {
	for name, start := range map[string]func(*testing.T, string) *exec.Cmd{"spinning": startSpinner, "asleep": startSleeper} {
		t.Run(name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, c *Cgroup) {
				startVforkParent(t, c.dir) // shows as D, but is not to blame
				timesOutNaming(t, c, start(t, c.dir).Process.Pid)
			})
		})
	}
}

// timesOutNaming freezes a cgroup in vain: the error must name the culprit alone,
// and everybody else must run again.
func timesOutNaming(t *testing.T, c *Cgroup, culprit int) {
	t.Helper()
	_, count := startCounter(t, c.dir)
	start(t, c.dir, "sleep", "1000")
	ctx, cancel := context.WithTimeout(context.Background(), 400*time.Millisecond)
	defer cancel()
	begin := time.Now()
	err := c.Freeze(ctx)
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	var timeout *TimeoutError
	if !errors.As(err, &timeout) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error is %v", err)
	}
	t.Log(err)
	if len(timeout.Tasks) != 1 || timeout.Tasks[0].PID != culprit {
		t.Fatalf("names %v, want only pid %d", timeout.Tasks, culprit)
	}
	if !strings.Contains(err.Error(), "pid "+strconv.Itoa(culprit)) {
		t.Errorf("message does not name the task: %v", err)
	}
	isFrozen(t, c, false)
	runs(t, count)
}

func TestTimeoutLeavesPausedCgroupPaused(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		_, count := startCounter(t, c.dir)
		startSleeper(t, c.dir)
		check(t, writeValue(c.FreezeWrite()))
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		var timeout *TimeoutError
		if err := c.Freeze(ctx); !errors.As(err, &timeout) {
			t.Fatalf("error is %v", err)
		}
		isFrozen(t, c, true)
		stands(t, count)
	})
}

func TestCancelPutsBack(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		_, count := startCounter(t, c.dir)
		startSleeper(t, c.dir)
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(50*time.Millisecond, cancel)
		if err := c.Freeze(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("error is %v", err)
		}
		isFrozen(t, c, false)
		runs(t, count)
	})
}

func TestFrozenAncestor(t *testing.T) {
	onBoth(t, func(t *testing.T, parent *Cgroup) {
		key := map[bool]string{true: "", false: "freezer"}[parent.freezer == v2{parent.dir}]
		c := openCgroup(t, key, makeChild(t, parent.dir, "container"))
		start(t, c.dir, "sleep", "1000")
		check(t, parent.Freeze(context.Background()))
		isFrozen(t, c, true)
		for _, act := range []func(context.Context) error{c.Freeze, c.Thaw} {
			var above *AncestorFrozenError
			if err := act(context.Background()); !errors.As(err, &above) || above.Ancestor != parent.dir {
				t.Fatalf("error is %v, want one naming %s", err, parent.dir)
			}
		}
		check(t, parent.Thaw(context.Background()))
		isFrozen(t, c, false)
	})
}

func TestFreezeRefusesOwnCgroup(t *testing.T) {
	dir := fake(t, map[string]string{
		"cgroup.freeze": "0", "cgroup.events": "frozen 0\n", "cgroup.procs": strconv.Itoa(os.Getpid()) + "\n",
	})
	c := openCgroup(t, "", dir)
	if err := c.Freeze(context.Background()); !errors.Is(err, ErrInside) {
		t.Fatalf("error is %v", err)
	}
	isFrozen(t, c, false)
}

// scripted is a v1 freezer in a plain directory whose tasks freeze only after
// some nudges in one attempt.
type scripted struct {
	v1
	needs  int // nudges of one attempt until the tasks freeze
	nudged int
}

func (s *scripted) nudge() error { s.nudged++; return s.v1.nudge() }

func (s *scripted) frozen() (bool, error) { return s.nudged >= s.needs, nil }

func fakeV1(t *testing.T) *Cgroup {
	return openCgroup(t, "freezer", fake(t, map[string]string{
		"freezer.state": "THAWED", "freezer.self_freezing": "0", "freezer.parent_freezing": "0", "cgroup.procs": "",
	}))
}

func TestFreezeAsksAgain(t *testing.T) {
	c := fakeV1(t)
	s := &scripted{v1: v1{c.dir}, needs: 3}
	c.freezer = s
	check(t, c.Freeze(context.Background()))
	if s.nudged != s.needs {
		t.Fatalf("nudged %d times, want %d", s.nudged, s.needs)
	}
}

func TestV1NudgeWritesFrozen(t *testing.T) {
	c := fakeV1(t)
	state, _, _ := c.freezer.control()
	check(t, os.WriteFile(state, []byte("FREEZING"), 0o600))
	check(t, c.freezer.nudge())
	if got, _ := readValue(state); got != "FROZEN" {
		t.Fatalf("state is %q", got)
	}
}

// An attempt that takes long is broken off by a thaw and begun anew.
func TestFreezeGivesTasksABreather(t *testing.T) {
	c := fakeV1(t)
	state, _, _ := c.freezer.control()
	var writes int
	c.freezer = &breathing{v1: v1{c.dir}, state: state, writes: &writes}
	begin := time.Now()
	check(t, c.Freeze(context.Background()))
	if took := time.Since(begin); writes != 2 || took < firstRound || took > 4*firstRound {
		t.Fatalf("frozen after %d attempts in %v", writes, took)
	}
}

// breathing freezes only in the second attempt: every call of control is one of
// the writes that freeze and thaw in turn.
type breathing struct {
	v1
	state  string
	writes *int
}

func (b *breathing) nudge() error { return nil }

func (b *breathing) frozen() (bool, error) { return *b.writes >= 2, nil }

func (b *breathing) control() (path, freeze, thaw string) {
	if state, _ := readValue(b.state); state == stateThawed {
		*b.writes++
	}
	return b.v1.control()
}

func TestThawTimeout(t *testing.T) {
	dir := fake(t, map[string]string{"cgroup.freeze": "1", "cgroup.events": "frozen 1\n", "cgroup.procs": ""})
	c := openCgroup(t, "", dir)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	var above *AncestorFrozenError
	if err := c.Thaw(ctx); !errors.As(err, &above) {
		t.Fatalf("error is %v", err)
	}
	if got, _ := readValue(filepath.Join(dir, "cgroup.freeze")); got != "0" {
		t.Fatalf("own setting is %q", got)
	}
	e := &TimeoutError{Path: "/c", Thawing: true, After: time.Second, Err: context.DeadlineExceeded}
	if want := "cgroup /c did not thaw within 1s"; !strings.HasPrefix(e.Error(), want) {
		t.Fatalf("message %q", e)
	}
}

func TestOpenErrors(t *testing.T) {
	for name, paths := range map[string]map[string]string{
		"nothing":  {},
		"no dir":   {"freezer": "/sys/fs/cgroup/freezer/does-not-exist"},
		"v1 root":  {"freezer": "/sys/fs/cgroup/freezer"},
		"v2 root":  {"": "/sys/fs/cgroup/unified"},
		"relative": {"": "container"},
	} {
		if _, err := Open(paths); !errors.Is(err, ErrNoFreezer) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestVanishedCgroup(t *testing.T) {
	onBoth(t, func(t *testing.T, parent *Cgroup) {
		c := openAny(makeChild(t, parent.dir, "gone"))
		check(t, os.Remove(c.dir))
		for _, act := range []func(context.Context) error{c.Freeze, c.Thaw} {
			if err := act(context.Background()); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("error is %v", err)
			}
		}
	})
}

func BenchmarkFreezeThaw32Tasks(b *testing.B) {
	for name, root := range map[string]string{"v1": "/sys/fs/cgroup/freezer", "v2": "/sys/fs/cgroup/unified"} {
		b.Run(name, func(b *testing.B) {
			dir, err := os.MkdirTemp(root, "cgroupfreeze-bench-")
			if err != nil {
				b.Fatal(err)
			}
			defer os.Remove(dir)
			c := openAny(dir)
			for range 32 {
				cmd := exec.Command("sleep", "1000")
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
				if err := writeValue(dir+"/cgroup.procs", strconv.Itoa(cmd.Process.Pid)); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if err := errors.Join(c.Freeze(context.Background()), c.Thaw(context.Background())); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
