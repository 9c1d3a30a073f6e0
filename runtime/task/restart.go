package task

import (
	"encoding/binary"
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

	futexWaitBitset = 9
)

// restartOf records the call a thread was interrupted in. Where the kernel has
// told the program how much time was left (the second timespec of a sleep), or
// the time is absolute, it is exact; otherwise it is the call's full time.
func restartOf(t *tracee.Thread, r *tracee.Regs) (*image.Restart, error) {
	if !r.NeedsRestartBlock() {
		return nil, nil
	}
	nr, _, _ := r.Syscall()
	if nr == unix.SYS_RESTART_SYSCALL {
		nr = restartedCall(t, r)
	}
	left, err := timeLeft(t, nr, r.Args())
	if err != nil {
		return nil, err
	}
	return &image.Restart{Nr: nr, Left: left}, nil
}

// restartedCall tells the call behind restart_syscall(2). A call that has been
// restarted before has lost its number, but not its arguments, and the
// instructions in front of it still load the number, as far as it is a constant
// there; libraries with one syscall instruction for all calls leave only the
// arguments.
func restartedCall(t *tracee.Thread, r *tracee.Regs) uint64 {
	args := r.Args()
	var fitting []uint64
	for _, nr := range []uint64{unix.SYS_FUTEX, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_NANOSLEEP, unix.SYS_POLL} {
		if fits(t, nr, args) {
			fitting = append(fitting, nr)
		}
	}
	if nr, ok := t.LoadedNumber(r, fitting); ok {
		return nr
	}
	if len(fitting) > 0 {
		return fitting[0] // the most demanding one comes first
	}
	return unix.SYS_RESTART_SYSCALL
}

// fits reports whether arguments can be those of a call that has gone to sleep.
func fits(t *tracee.Thread, nr uint64, a [6]uint64) bool {
	const (
		maxClock   = 16        // clock ids are small, and never valid addresses
		lowestPage = 1 << 12   // nothing is mapped below
		futexFlags = 128 | 256 // FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
	)
	timespec := func(addr uint64) bool {
		ns, err := readTimespec(t, addr)
		return err == nil && ns >= 0
	}
	switch nr {
	case unix.SYS_CLOCK_NANOSLEEP:
		return a[0] < maxClock && a[1] == 0 && timespec(a[2])
	case unix.SYS_NANOSLEEP:
		return (a[1] == 0 || a[1] >= lowestPage) && timespec(a[0])
	case unix.SYS_POLL:
		return a[1] < 1<<20 && (a[1] == 0) == (a[0] < lowestPage)
	case unix.SYS_FUTEX:
		op := a[1] &^ futexFlags
		if a[0]%4 != 0 || op != futexWait && op != futexWaitBitset || !timespec(a[3]) {
			return false
		}
		// With no flag the operation could also be nanosleep's null pointer,
		// but then the word is hardly the value that the futex had.
		var word [4]byte
		return a[1] != futexWait || t.Read(a[0], word[:]) == nil && binary.LittleEndian.Uint32(word[:]) == uint32(a[2])
	}
	return false
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
	if nsec := int64(binary.LittleEndian.Uint64(b[8:])); nsec < 0 || nsec >= second {
		return 0, fail.Refuse("interrupted system call", "its time-out is not a valid time", "")
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
	unix.SYS_PPOLL: true, unix.SYS_SELECT: true, unix.SYS_PSELECT6: true, // that cannot write back the time left
	unix.SYS_IO_GETEVENTS: true, unix.SYS_IO_PGETEVENTS: true,
	unix.SYS_RECVFROM: true, unix.SYS_RECVMSG: true, unix.SYS_RECVMMSG: true, unix.SYS_ACCEPT: true, unix.SYS_ACCEPT4: true,
	unix.SYS_SENDTO: true, unix.SYS_SENDMSG: true, unix.SYS_SENDMMSG: true, unix.SYS_CONNECT: true,
	unix.SYS_READ: true, unix.SYS_READV: true, unix.SYS_WRITE: true, unix.SYS_WRITEV: true, // of sockets with a time-out, inotify
	unix.SYS_MSGRCV: true, unix.SYS_MSGSND: true,
}

// EndedByInterrupt reports a thread that was stopped on its way out of a call
// that an interrupt has ended with EINTR.
func EndedByInterrupt(r *tracee.Regs) bool {
	nr, result, ok := r.Syscall()
	return ok && result == -int64(unix.EINTR) && reentered[nr]
}

// HideEINTR makes a thread that our interrupt threw out of a call enter it
// again. A signal with a handler that is waiting to be delivered would have
// interrupted the call without us: then the EINTR is the program's own.
func HideEINTR(r *tracee.Regs, s *Status) bool {
	if !EndedByInterrupt(r) || (s.SigPnd|s.ShdPnd)&s.SigCgt&^s.SigBlk != 0 {
		return false
	}
	r.Reenter()
	return true
}
