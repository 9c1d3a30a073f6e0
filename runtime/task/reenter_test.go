package task

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

func TestHideEINTR(t *testing.T) {
	const usr1 = 1 << (unix.SIGUSR1 - 1)
	regs := func(nr uint64, result int64) (r tracee.Regs) {
		r.Orig_rax, r.Rax, r.Rip, r.Rdi = nr, uint64(result), 0x1002, 5
		return r
	}
	for _, c := range []struct {
		name   string
		nr     uint64
		result int64
		status Status
		hides  bool
	}{
		{"epoll_wait", unix.SYS_EPOLL_WAIT, -int64(unix.EINTR), Status{}, true},
		{"its result was another", unix.SYS_EPOLL_WAIT, 0, Status{}, false},
		{"the kernel restarts it", unix.SYS_READ, -512, Status{}, false},
		{"a call that is not interrupted by us", unix.SYS_PAUSE, -int64(unix.EINTR), Status{}, false},
		{"outside a call", ^uint64(0), -int64(unix.EINTR), Status{}, false},
		{"a handler will run", unix.SYS_ACCEPT4, -int64(unix.EINTR), Status{SigPnd: usr1, SigCgt: usr1}, false},
		{"the process's handler will run", unix.SYS_ACCEPT4, -int64(unix.EINTR), Status{ShdPnd: usr1, SigCgt: usr1}, false},
		{"the signal is blocked", unix.SYS_ACCEPT4, -int64(unix.EINTR), Status{SigPnd: usr1, SigCgt: usr1, SigBlk: usr1}, true},
		{"the signal has no handler", unix.SYS_ACCEPT4, -int64(unix.EINTR), Status{SigPnd: usr1}, true},
	} {
		r := regs(c.nr, c.result)
		before := r
		if got := HideEINTR(&r, &c.status); got != c.hides {
			t.Errorf("%s: hidden %v, want %v", c.name, got, c.hides)
		}
		if !c.hides && r != before {
			t.Errorf("%s: registers changed", c.name)
		}
		if c.hides && (r.Rax != c.nr || r.Rip != 0x1000 || r.Orig_rax != ^uint64(0) || r.Rdi != 5) {
			t.Errorf("%s: the call is not entered again: %+v", c.name, r)
		}
	}
}
