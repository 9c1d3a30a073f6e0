package task

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

// restartTwice stops a thread in its call and again in the restart of it, when
// the kernel shows restart_syscall(2) instead of the number. By its restart block
// the time left is exact; without, it may be the full time, and a warning says
// so unless the call itself tells.
func restartTwice(t *testing.T, pid int, nr uint64, left time.Duration, question *bpf.Question) {
	t.Helper()
	asleepIn(t, pid, nr)
	if AsksForBlock(pid) == toldByCall(nr, callArgs(t, pid)) {
		t.Errorf("asks for the restart block: %v", AsksForBlock(pid))
	}
	started := monotonicNow()
	for _, in := range []uint64{nr, unix.SYS_RESTART_SYSCALL} {
		th := stop(t, pid, pid)
		r, err := th.Regs()
		check(t, err)
		if got, _, ok := r.Syscall(); !ok || got != in {
			t.Fatalf("stopped in system call %d, want %d", got, in)
		}
		blocks, err := question.RestartBlocks()
		check(t, err)
		for _, known := range []bool{true, false} {
			warned := false
			src := &Source{
				Pid: pid, Now: monotonicNow(), InnerTid: func(host int) int { return host },
				Block: func(tid int) (bpf.RestartBlock, bool) { b, ok := blocks[tid]; return b, ok && known },
				Warn:  func(string, ...any) { warned = true },
			}
			rec, err := src.restartOf(th, &r)
			check(t, err)
			if rec == nil || rec.Nr != nr {
				t.Errorf("in system call %d: restart of %+v, want of %d", in, rec, nr)
				continue
			}
			if warned == (known || toldByCall(nr, r.Args())) {
				t.Errorf("in system call %d, block known %v: warned %v", in, known, warned)
			}
			most, least := left+2*time.Millisecond, left-time.Duration(src.Now-started)-time.Second
			if got := time.Duration(rec.Left); left >= 0 && (got > most || got < least) || left < 0 && got >= 0 {
				t.Errorf("in system call %d, block known %v: %v left, want between %v and %v", in, known, got, least, most)
			}
		}
		check(t, th.Detach(0))
		asleepIn(t, pid, unix.SYS_RESTART_SYSCALL)
		// The number shows already in the stop that it was detached from.
		asks := AsksForBlock(pid)
		for deadline := time.Now().Add(time.Second); !asks && time.Now().Before(deadline); asks = AsksForBlock(pid) {
			time.Sleep(time.Millisecond)
		}
		if !asks {
			t.Error("restart_syscall does not ask for the restart block")
		}
	}
}

// callArgs are the arguments of the call that a thread sleeps in.
func callArgs(t *testing.T, pid int) (a [6]uint64) {
	t.Helper()
	b, err := readProc(pid, "syscall")
	check(t, err)
	var nr uint64
	_, err = fmt.Sscanf(string(b), "%d 0x%x 0x%x 0x%x 0x%x", &nr, &a[0], &a[1], &a[2], &a[3])
	check(t, err)
	return a
}

func TestRestartedCall(t *testing.T) {
	question, err := bpf.RestartBlocks()
	check(t, err)
	defer question.Close()
	for name, s := range sleeps {
		t.Run(name, func(t *testing.T) { restartTwice(t, startChild(t, name), uint64(s.nr), s.left, question) })
	}
	t.Run("libc", func(t *testing.T) { // the number stands in front of its syscall instruction
		lock(t)
		c := exec.Command("sleep", "1000")
		check(t, c.Start())
		t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
		restartTwice(t, c.Process.Pid, unix.SYS_CLOCK_NANOSLEEP, 1000*time.Second, question)
	})
}

func TestNoRestart(t *testing.T) {
	pid := startChild(t, "own")
	asleepIn(t, pid, unix.SYS_PAUSE)
	th := stop(t, pid, pid)
	r, err := th.Regs()
	check(t, err)
	if rec, err := (&Source{}).restartOf(th, &r); rec != nil || err != nil {
		t.Errorf("pause(2) has no restart block, got %+v, %v", rec, err)
	}
	var refused *fail.Refused
	if _, err := timeLeft(th, timed(unix.SYS_PAUSE, false), r.Args()); !errors.As(err, &refused) {
		t.Errorf("an unknown call gives %v, want a refusal", err)
	}
	if _, err := readTimespec(th, 8, 8); !errors.As(err, &refused) {
		t.Errorf("an unmapped time gives %v, want a refusal", err)
	}
}

// A restart block names the call and the clock even where the number is lost.
func TestRestartFrom(t *testing.T) {
	const now, lost = 1e12, unix.SYS_RESTART_SYSCALL
	src := &Source{Pid: os.Getpid(), Inner: 7, Now: now}
	cpu := func() int64 {
		var ts unix.Timespec
		check(t, unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts))
		return ts.Nano()
	}()
	sleep := func(fn string, clock int32, rest uint64, expires int64) (b bpf.RestartBlock) {
		b.Fn, b.Nanosleep.Clock, b.Nanosleep.Remainder, b.Nanosleep.Expires = fn, clock, rest, expires
		return b
	}
	poll := bpf.RestartBlock{Fn: "do_restart_poll"}
	poll.Poll.Timed, poll.Poll.Expires = true, now-1
	futex := bpf.RestartBlock{Fn: "futex_wait_restart"}
	futex.Futex.Expires = now + 5
	for _, c := range []struct {
		name  string
		block bpf.RestartBlock
		args  [6]uint64
		nr    uint64
		left  int64
		slack int64
	}{
		{"nanosleep", sleep("hrtimer_nanosleep_restart", unix.CLOCK_MONOTONIC, 0x5000, now+9), [6]uint64{0x4000, 0x5000}, unix.SYS_NANOSLEEP, 9, 0},
		{"clock_nanosleep", sleep("hrtimer_nanosleep_restart", unix.CLOCK_MONOTONIC, 0, now+9), [6]uint64{0, 0, 0x4000}, unix.SYS_CLOCK_NANOSLEEP, 9, 0},
		{"with remainder", sleep("hrtimer_nanosleep_restart", unix.CLOCK_MONOTONIC, 0x5000, now+9), [6]uint64{1, 0, 0x4000, 0x5000}, unix.SYS_CLOCK_NANOSLEEP, 9, 0},
		{"over", sleep("hrtimer_nanosleep_restart", unix.CLOCK_MONOTONIC, 0, now-9), [6]uint64{0, 0, 0x4000}, unix.SYS_CLOCK_NANOSLEEP, 0, 0},
		{"cpu clock", sleep("posix_cpu_nsleep_restart", -6, 0, cpu+1e9), [6]uint64{2, 0, 0x4000}, unix.SYS_CLOCK_NANOSLEEP, 1e9, 5e8},
		{"its own cpu clock by pid", sleep("posix_cpu_nsleep_restart", ^7<<3|2, 0, cpu+1e9), [6]uint64{2, 0, 0x4000}, unix.SYS_CLOCK_NANOSLEEP, 1e9, 5e8},
		{"poll", poll, [6]uint64{0x4000, 1, 5}, unix.SYS_POLL, 0, 0},
		{"poll for ever", bpf.RestartBlock{Fn: "do_restart_poll"}, [6]uint64{0x4000, 1, 5}, unix.SYS_POLL, -1, 0},
		{"futex", futex, [6]uint64{0x4000, 128}, unix.SYS_FUTEX, 5, 0},
		{"absolute futex", futex, [6]uint64{0x4000, 128 | futexWaitBitset}, unix.SYS_FUTEX, 0, 0},
	} {
		got := src.restartFrom(&c.block, lost, c.args)
		if got == nil || got.Nr != c.nr || got.Left > c.left || got.Left < c.left-c.slack {
			t.Errorf("%s: %+v, want %d with %d left", c.name, got, c.nr, c.left)
		}
	}
	for _, b := range []bpf.RestartBlock{
		{Fn: "do_no_restart_syscall"}, {Fn: "of_another_kernel"},
		sleep("posix_cpu_nsleep_restart", ^8<<3|2, 0, 1), sleep("posix_cpu_nsleep_restart", ^7<<3|6, 0, 1),
	} {
		if got := src.restartFrom(&b, lost, [6]uint64{}); got != nil {
			t.Errorf("%+v became %+v", b, got)
		}
	}
}

// A restored thread gets its restart block back, or the result of a call that
// need not wait any more.
func TestRestoreRestart(t *testing.T) {
	s := traceetest.Stub(t, traceetest.ServiceAt)
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
		got, err := RestoreRestart(s, &c.rec, r, &Clocks{Passed: 1e9})
		check(t, err)
		nr := ^uint64(0) // it has ended
		if c.result == -516 {
			nr = c.rec.Nr
		}
		if int64(got.Rax) != c.result || got.Orig_rax != nr || got.Rip != r.Rip || got.Args() != c.args {
			t.Errorf("%+v: registers %+v", c.rec, got)
		}
	}
	if got, err := RestoreRestart(s, nil, tracee.Regs{}, nil); err != nil || got != (tracee.Regs{}) {
		t.Errorf("nothing to restart: %+v, %v", got, err)
	}
	if _, err := RestoreRestart(s, &image.Restart{Nr: unix.SYS_READ}, tracee.Regs{}, &Clocks{}); err == nil {
		t.Error("read(2) was given a restart block")
	}
}
