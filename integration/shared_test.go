package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRandomSharing has processes share tables at random, children of each other
// and orphans of some that are gone, and checkpoints and restores each twice.
func TestRandomSharing(t *testing.T) {
	first, graphs := uint64(time.Now().UnixNano()), 4
	if given := os.Getenv(envSeed); given != "" {
		n, err := strconv.ParseUint(given, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		first, graphs = n, 1
	}
	for i := range uint64(graphs) {
		t.Run(fmt.Sprintf("seed=%d", first+i), func(t *testing.T) {
			args := append([]string{"/bin/shared"}, randomSharing(first+i)...)
			t.Logf("%v", args)
			c := newContainer(t, withReport("shared"), withArgs(args...)).run()
			c.progress(10)
			before := c.stableTree()
			for range 2 {
				c.checkpoint()
				c.mustBeGone()
				c.restore()
				c.sameTree(before)
				c.progress(10)
			}
		})
	}
}

// randomSharing writes rows for the program (see shared.c). Semaphore undo lists
// are left out: a list that only one has left is not made again, and kcmp(2)
// takes having none for sharing one.
func randomSharing(seed uint64) (rows []string) {
	r := rand.New(rand.NewPCG(seed, 0))
	share := []int{unix.CLONE_VM, unix.CLONE_VM | unix.CLONE_SIGHAND, unix.CLONE_FILES, unix.CLONE_FS}
	some := func() (flags int) {
		for range r.IntN(4) {
			flags |= share[r.IntN(len(share))]
		}
		return flags
	}
	for i := range 4 + r.IntN(14) {
		flags, gone, drop := some(), 0, 0
		forker := r.IntN(i + 1)
		if forker != 0 && r.IntN(6) == 0 {
			flags |= unix.CLONE_PARENT
		}
		if flags&unix.CLONE_PARENT == 0 && r.IntN(4) == 0 {
			gone = 1
		}
		if r.IntN(4) == 0 {
			drop = some() &^ (unix.CLONE_VM | unix.CLONE_SIGHAND)
		}
		rows = append(rows, fmt.Sprintf("%d:%#x:%#x:%d", forker, flags, drop, gone))
	}
	return rows
}
