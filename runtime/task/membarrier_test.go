package task

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

// What a stub has registered for is found whether or not the kernel tells.
func TestMembarrier(t *testing.T) {
	was := tellsBarriers
	defer func() { tellsBarriers = was }()
	const registered = barrierRegisterGlobal | 1<<4 | 1<<6 // private and its SYNC_CORE
	for _, tells := range []bool{true, false} {
		tellsBarriers = func() bool { return tells }
		s := traceetest.Stub(t, traceetest.ServiceAt)
		for _, want := range []uint32{0, registered} {
			var b tracee.Batch
			restoreMembarrier(&b, want)
			ask := askMembarrier(&b)
			if _, err := s.Run(&b); err != nil {
				t.Fatal(err)
			}
			if !tells {
				want |= barrierRegisterGlobal
			}
			if got := ask(); got != want {
				t.Errorf("the kernel tells: %v: registered for %#x, want %#x", tells, got, want)
			}
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, 1<<3, 0, 0); errno != unix.EPERM {
		t.Errorf("an expedited barrier without registration: %v, want EPERM", errno)
	}
}
