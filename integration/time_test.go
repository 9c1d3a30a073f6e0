package integration

import (
	"strings"
	"testing"
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
