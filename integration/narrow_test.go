package integration

import (
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// narrowPrograms are built as 32-bit ones too: name and source.
var narrowPrograms = map[string]string{
	"narrow":     "narrow/narrow.c",
	"sleepers32": "programs/sleepers.c",
	"signals32":  "programs/signals.c",
	"locks32":    "programs/locks.c",
	"shared32":   "programs/shared.c",
}

// TestNarrow takes 32-bit programs, beside 64-bit ones, through two restores and a
// checkpoint that leaves them running.
func TestNarrow(t *testing.T) {
	// Those left out have no times of 32 bits, as this program has them.
	kinds := slices.DeleteFunc(slices.Clone(sleeps), func(kind string) bool { return kind == "epoll-pwait2" || kind == "futex-waitv" })
	script := "narrow & shared32 & exec sleepers32 " + strings.Join(kinds, " ")
	c := newContainer(t, withReport("sleepers"), withArgs("sh", "-c", script), withVaryingThreads()).run()
	progress := func(rounds int) {
		for _, c.report = range []string{"narrow", "shared", "sleepers"} {
			c.progress(rounds)
		}
	}
	progress(20)
	for range 2 {
		before := c.stableTree()
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.mustBe(specs.StateRunning)
		c.sameTree(before)
		progress(20)
	}
	before := c.stableTree()
	c.checkpoint("--leave-running")
	c.sameTree(before)
	progress(20)
}
