package integration

import (
	"strconv"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestManyDescriptors restores a table of as many descriptors as can be: restore
// takes a number for every open file above them, and all are below the hard limit.
func TestManyDescriptors(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := min(int(limit.Max)*9/20, 100_000)
	limits := func(_ *container, spec *specs.Spec) {
		spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: limit.Max, Soft: 1024}}
	}
	c := newContainer(t, withReport("manyfds"), limits, withArgs("/bin/manyfds", strconv.Itoa(n))).run()
	c.progress(70)
	cycle(c, 1)
	c.progress(70)
}
