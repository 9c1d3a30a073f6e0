package task

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A call that was interrupted with ERESTART_RESTARTBLOCK is continued from a
// block that the kernel keeps in the task: a new task has none. It gets one by
// issuing the call again, with the time that was left, and being interrupted in
// it. Four calls end that way: nanosleep, clock_nanosleep with a relative time,
// poll, and futex waits with a time-out.

// futexCommand masks the command out of a futex operation.
const (
	futexCommand = 0x7f
	futexWait    = 0
)

// restartOf records the call a thread was interrupted in. Where the kernel has
// told the program how much time was left (the second timespec of a sleep), or
// the time is absolute, it is exact; otherwise it is the call's full time.
// kernelCall is what the thread was seen doing in the kernel before the stop,
// which tells calls apart that are being restarted already.
func restartOf(t *tracee.Thread, r *tracee.Regs, kernelCall string) (*image.Restart, error) {
	if !r.NeedsRestartBlock() {
		return nil, nil
	}
	nr, _, _ := r.Syscall()
	args := r.Args()
	if nr == unix.SYS_RESTART_SYSCALL {
		nr = restartedCall(kernelCall, args)
	}
	left, err := timeLeft(t, nr, args)
	if err != nil {
		return nil, err
	}
	return &image.Restart{Nr: nr, Left: left}, nil
}

// restartedCall guesses the call behind restart_syscall(2) by the kernel
// function the thread slept in. A clock id is never a valid pointer.
func restartedCall(kernelCall string, args [6]uint64) uint64 {
	switch kernelCall {
	case "hrtimer_nanosleep", "do_nanosleep", "common_nsleep", "hrtimer_nanosleep_restart":
		if args[0] < 16 {
			return unix.SYS_CLOCK_NANOSLEEP
		}
		return unix.SYS_NANOSLEEP
	case "do_poll", "do_sys_poll", "poll_schedule_timeout", "do_restart_poll", "do_sys_poll.constprop.0", "poll_schedule_timeout.constprop.0":
		return unix.SYS_POLL
	case "futex_wait", "futex_wait_queue", "__futex_wait", "futex_wait_queue_me", "futex_do_wait", "futex_wait_restart":
		return unix.SYS_FUTEX
	}
	return unix.SYS_RESTART_SYSCALL
}

func timeLeft(t *tracee.Thread, nr uint64, args [6]uint64) (int64, error) {
	switch nr {
	case unix.SYS_NANOSLEEP:
		return sleepLeft(t, args[0], args[1])
	case unix.SYS_CLOCK_NANOSLEEP:
		return sleepLeft(t, args[2], args[3])
	case unix.SYS_POLL:
		if ms := int32(args[2]); ms >= 0 {
			return int64(ms) * int64(time.Millisecond), nil
		}
		return -1, nil
	case unix.SYS_FUTEX:
		return readTimespec(t, args[3])
	}
	return 0, fail.Refuse(fmt.Sprintf("interrupted system call %d", nr),
		"the call it continues cannot be told any more", "try again in a moment")
}

// sleepLeft prefers the remainder, which the kernel writes when a sleep is
// interrupted, to the request.
func sleepLeft(t *tracee.Thread, request, remainder uint64) (int64, error) {
	if remainder != 0 {
		return readTimespec(t, remainder)
	}
	return readTimespec(t, request)
}

func readTimespec(t *tracee.Thread, addr uint64) (int64, error) {
	var b [16]byte
	if err := t.Read(addr, b[:]); err != nil {
		return 0, fail.Refuse("interrupted system call", "its time-out cannot be read: "+err.Error(), "try again in a moment")
	}
	return pair(b[:], second), nil
}

// RestoreRestart makes the kernel build the thread's restart block, and gives
// back the registers it is to be released with: those of the image, unless the
// call has meanwhile ended of its own accord, because what it waited for has
// happened. Memory must be in place, and no timed call may follow.
func RestoreRestart(s *tracee.Stub, rec *image.Restart, r tracee.Regs) (tracee.Regs, error) {
	if rec == nil {
		return r, nil
	}
	args, scratch := r.Args(), s.Scratch()
	timespec := unpair(max(rec.Left, 0), second)
	switch rec.Nr {
	case unix.SYS_NANOSLEEP:
		args[0] = scratch
	case unix.SYS_CLOCK_NANOSLEEP:
		args[2] = scratch
	case unix.SYS_POLL:
		if rec.Left >= 0 {
			args[2] = uint64((rec.Left + int64(time.Millisecond) - 1) / int64(time.Millisecond))
		}
	case unix.SYS_FUTEX:
		if args[1]&futexCommand == futexWait {
			args[3] = scratch // FUTEX_WAIT_BITSET's time is absolute and stays
		}
	default:
		return r, fmt.Errorf("restart block of system call %d: not one that has any", rec.Nr)
	}
	if err := s.Write(scratch, timespec); err != nil {
		return r, err
	}
	interrupted, err := s.Interrupted(uintptr(rec.Nr), args)
	if err != nil {
		return r, fmt.Errorf("rebuild the restart block of system call %d: %w", rec.Nr, err)
	}
	return r.Resumed(rec.Nr, interrupted), nil
}

// reentered lists the calls that the kernel ends with EINTR whenever they are
// interrupted, by us as by anybody (signal(7)): without a handler to run, a
// program must not see it.
var reentered = map[uint64]bool{
	unix.SYS_EPOLL_WAIT: true, unix.SYS_EPOLL_PWAIT: true, unix.SYS_EPOLL_PWAIT2: true,
	unix.SYS_RT_SIGTIMEDWAIT: true, unix.SYS_SEMOP: true, unix.SYS_SEMTIMEDOP: true,
	unix.SYS_IO_GETEVENTS: true, unix.SYS_IO_PGETEVENTS: true,
	unix.SYS_RECVFROM: true, unix.SYS_RECVMSG: true, unix.SYS_RECVMMSG: true, unix.SYS_ACCEPT: true, unix.SYS_ACCEPT4: true,
	unix.SYS_SENDTO: true, unix.SYS_SENDMSG: true, unix.SYS_SENDMMSG: true, unix.SYS_CONNECT: true,
	unix.SYS_READ: true, unix.SYS_READV: true, unix.SYS_WRITE: true, unix.SYS_WRITEV: true, // of sockets with a time-out, inotify
	unix.SYS_MSGRCV: true, unix.SYS_MSGSND: true,
}

// HideEINTR makes a thread that our interrupt threw out of a call enter it
// again. A signal with a handler that is waiting to be delivered would have
// interrupted the call without us: then the EINTR is the program's own.
func HideEINTR(r *tracee.Regs, s *Status) bool {
	nr, result, ok := r.Syscall()
	if !ok || result != -int64(unix.EINTR) || !reentered[nr] {
		return false
	}
	if (s.SigPnd|s.ShdPnd)&s.SigCgt&^s.SigBlk != 0 {
		return false
	}
	r.Reenter()
	return true
}
