package integration

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTimeLeft checkpoints programs in the middle of calls that last seconds, with
// and without success, so often that a call that begins anew each time ends much too late, which the
// program notices. Where the kernel's memory cannot be read, none may end early
// all the same, and the checkpoint says what it does not know.
func TestTimeLeft(t *testing.T) {
	// Semaphores are refused where nobody can tell their undo values.
	others := slices.DeleteFunc(slices.Clone(sleeps), func(s string) bool { return s == "semtimedop" })
	for _, c := range []struct {
		name, noBPF string
		args        []string
	}{
		{"exact", "", sleeps},
		{"without BPF", "1", append([]string{"late"}, others...)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("OCICKPT_NO_BPF", c.noBPF)
			p := program{name: "sleepers", options: []option{
				withArgs(append([]string{"/bin/sleepers"}, c.args...)...), withVaryingThreads(),
			}}
			k := newContainer(t, append([]option{withReport(p.name)}, p.options...)...).run()
			again := func() {
				k.progress(15)
				k.checkpoint()
				k.mustBeGone()
				k.restore()
			}
			again()
			t.Setenv(envFault, "commit:fail")
			if r := k.ocickpt("checkpoint", "--image-path", k.newImage(), k.id); r.code == 0 {
				t.Error("the checkpoint did not fail")
			}
			t.Setenv(envFault, "")
			r := k.checkpoint("--leave-running")
			warned := strings.Contains(r.stderr, "waits its full time again")
			if warned != (c.noBPF != "") {
				t.Errorf("warned of a time that is not known: %v\n%s", warned, r.stderr)
			}
			again()
			k.progress(70) // until the longest calls have ended
		})
	}
}

// TestTimers takes timers of every clock and kind through two restores and a
// checkpoint that leaves them running; the wall clock goes on in between. Where
// the kernel's memory cannot be read, or timers get their ids from the kernel,
// all the same but for what is said to be lost.
func TestTimers(t *testing.T) {
	for _, c := range []struct {
		name, off string
		args      []string
		warned    bool
	}{
		{"exact", "", nil, false},
		{"without BPF", "OCICKPT_NO_BPF", []string{"late"}, true},
		{"without timer ids", "OCICKPT_NO_TIMER_IDS", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.off != "" {
				t.Setenv(c.off, "1")
			}
			k := newContainer(t, withReport("timers"), withArgs(append([]string{"/bin/timers"}, c.args...)...)).run()
			k.progress(20)
			for range 2 {
				r := k.checkpoint()
				if warned := strings.Contains(r.stderr, "is not known; it keeps the time that was left"); warned != c.warned {
					t.Errorf("warned of a time that is not known: %v\n%s", warned, r.stderr)
				}
				k.mustBeGone()
				time.Sleep(700 * time.Millisecond)
				k.restore()
				k.progress(30)
			}
			k.checkpoint("--leave-running")
			k.progress(60)
		})
	}
}

// TestSignalsWhileStopped sends signals to a container that is stopped for its
// checkpoint, after its state was collected: each is delivered once, whether the
// container goes on or is restored.
func TestSignalsWhileStopped(t *testing.T) {
	const queued = unix.Signal(64 - 7)
	c := newContainer(t, withReport("signals"), withArgs("/bin/signals", "counts")).run()
	c.progress(5)
	want := [2]int{}
	for _, flags := range [][]string{{"--leave-running"}, nil, nil} {
		t.Setenv(envFault, "write the contents:stop")
		cmd := c.foreground(append(append([]string{"checkpoint", "--image-path", c.newImage()}, flags...), c.id)...)
		t.Setenv(envFault, "")
		if !waitFor(func() bool { return processState(cmd.Process.Pid) == 'T' }) {
			t.Fatal("the checkpoint does not come to its contents")
		}
		pid := c.state().Pid
		for _, sig := range []unix.Signal{unix.SIGUSR2, queued, unix.SIGUSR2, queued} { // a plain one is not queued twice
			c.must(unix.Kill(pid, sig))
		}
		want[0]++
		want[1] += 2
		c.must(cmd.Process.Signal(unix.SIGCONT))
		if err := cmd.Wait(); err != nil {
			t.Fatalf("checkpoint: %v\n%s", err, c.stderr())
		}
		if flags == nil {
			c.mustBeGone()
			c.restore()
		}
		c.progress(10)
		data, err := os.ReadFile(c.out("counts"))
		c.must(err)
		var got [2]int
		if _, err := fmt.Sscan(string(data), &got[0], &got[1]); err != nil || got != want {
			t.Errorf("after a checkpoint with %v: %v signals came (%v), want %v", flags, got, err, want)
		}
	}
}

func processState(pid int) byte {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := bytes.Cut(data, []byte(") "))
	if !ok {
		return 0
	}
	return rest[0]
}
