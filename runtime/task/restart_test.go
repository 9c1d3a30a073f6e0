package task

import (
	"errors"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// restartTwice stops a thread in its call and again in the restart of it, when
// the kernel shows restart_syscall(2) instead of the number.
func restartTwice(t *testing.T, pid int, nr uint64, left time.Duration) {
	t.Helper()
	asleepIn(t, pid, nr)
	for _, in := range []uint64{nr, unix.SYS_RESTART_SYSCALL} {
		th := stop(t, pid, pid)
		r, err := th.Regs()
		check(t, err)
		if got, _, ok := r.Syscall(); !ok || got != in {
			t.Fatalf("stopped in system call %d, want %d", got, in)
		}
		rec, err := restartOf(th, &r)
		check(t, err)
		if rec == nil || rec.Nr != nr {
			t.Errorf("in system call %d: restart of %+v, want of %d", in, rec, nr)
		} else if got := time.Duration(rec.Left); left >= 0 && (got > left+time.Microsecond || got < left-time.Minute) || left < 0 && got >= 0 {
			t.Errorf("in system call %d: %v left, want nearly %v", in, got, left)
		}
		check(t, th.Detach(0))
		asleepIn(t, pid, unix.SYS_RESTART_SYSCALL)
	}
}

func TestRestartedCall(t *testing.T) {
	for name, s := range sleeps {
		t.Run(name, func(t *testing.T) { restartTwice(t, startChild(t, name), uint64(s.nr), s.left) })
	}
	t.Run("libc", func(t *testing.T) { // the number stands in front of its syscall instruction
		lock(t)
		c := exec.Command("sleep", "1000")
		check(t, c.Start())
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		restartTwice(t, c.Process.Pid, unix.SYS_CLOCK_NANOSLEEP, 1000*time.Second)
	})
}

func TestNoRestart(t *testing.T) {
	pid := startChild(t, "own")
	asleepIn(t, pid, unix.SYS_PAUSE)
	th := stop(t, pid, pid)
	r, err := th.Regs()
	check(t, err)
	if rec, err := restartOf(th, &r); rec != nil || err != nil {
		t.Errorf("pause(2) has no restart block, got %+v, %v", rec, err)
	}
	var refused *fail.Refused
	if _, err := timeLeft(th, unix.SYS_PAUSE, r.Args()); !errors.As(err, &refused) {
		t.Errorf("an unknown call gives %v, want a refusal", err)
	}
	if _, err := readTimespec(th, 8); !errors.As(err, &refused) {
		t.Errorf("an unmapped time gives %v, want a refusal", err)
	}
}

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

// A restored thread gets its restart block back, or the result of a call that
// need not wait any more.
func TestRestoreRestart(t *testing.T) {
	s := newStub(t)
	idle, ready := s.Service()+tracee.ServiceSize/2, s.Service()+tracee.ServiceSize/2+8
	pollfd := func(fd byte) []byte { return []byte{fd, 0, 0, 0, byte(unix.POLLIN), 0, 0, 0} }
	check(t, s.Write(idle, pollfd(0)))  // the shell's standard input, whose writer lives
	check(t, s.Write(ready, pollfd(1))) // its standard output, /dev/null
	for _, c := range []struct {
		rec    image.Restart
		args   [6]uint64
		result int64
	}{
		{image.Restart{Nr: unix.SYS_NANOSLEEP, Left: 1e12}, [6]uint64{8}, -516},
		{image.Restart{Nr: unix.SYS_CLOCK_NANOSLEEP, Left: 1e12}, [6]uint64{unix.CLOCK_MONOTONIC, 0, 8}, -516},
		{image.Restart{Nr: unix.SYS_POLL, Left: 1e12}, [6]uint64{idle, 1, 5}, -516},
		{image.Restart{Nr: unix.SYS_POLL, Left: -1}, [6]uint64{idle, 1, uint64(0xffffffff)}, -516},
		{image.Restart{Nr: unix.SYS_POLL, Left: 1e12}, [6]uint64{ready, 1, 5}, 1},
		{image.Restart{Nr: unix.SYS_FUTEX, Left: 1e12}, [6]uint64{idle, 0, 99, 8}, -int64(unix.EAGAIN)},
	} {
		var r tracee.Regs // every call from the thread that traces: no t.Run
		r.Rdi, r.Rsi, r.Rdx, r.R10 = c.args[0], c.args[1], c.args[2], c.args[3]
		r.Orig_rax, r.Rax, r.Rip = unix.SYS_RESTART_SYSCALL, ^uint64(515), 0x1234
		got, err := RestoreRestart(s, &c.rec, r)
		check(t, err)
		nr := ^uint64(0) // it has ended
		if c.result == -516 {
			nr = c.rec.Nr
		}
		if int64(got.Rax) != c.result || got.Orig_rax != nr || got.Rip != r.Rip || got.Args() != c.args {
			t.Errorf("%+v: registers %+v", c.rec, got)
		}
	}
	if got, err := RestoreRestart(s, nil, tracee.Regs{}); err != nil || got != (tracee.Regs{}) {
		t.Errorf("nothing to restart: %+v, %v", got, err)
	}
	if _, err := RestoreRestart(s, &image.Restart{Nr: unix.SYS_READ}, tracee.Regs{}); err == nil {
		t.Error("read(2) was given a restart block")
	}
}
