package integration

import (
	"strings"
	"testing"
	"time"
)

// TestTimeLeft checkpoints programs in the middle of calls that last seconds, so
// often that a call that begins anew each time ends much too late, which the
// program notices. Where the kernel's memory cannot be read, none may end early
// all the same, and the checkpoint says what it does not know.
func TestTimeLeft(t *testing.T) {
	for _, c := range []struct {
		name, noBPF string
		args        []string
	}{
		{"exact", "", nil},
		{"without BPF", "1", []string{"late"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("OCICKPT_NO_BPF", c.noBPF)
			p := program{name: "sleepers", options: []option{
				withArgs(append(append([]string{"/bin/sleepers"}, c.args...), sleeps...)...), withVaryingThreads(),
			}}
			k := p.start(t)
			cycle(k, 1)
			r := k.checkpoint("--leave-running")
			warned := strings.Contains(r.stderr, "waits its full time again")
			if warned != (c.noBPF != "") {
				t.Errorf("warned of a time that is not known: %v\n%s", warned, r.stderr)
			}
			cycle(k, 1)
			k.progress(80) // until the longest calls have ended
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
