package task

import (
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

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
	if !ok || result != -int64(unix.EINTR) {
		return false
	}
	if r.Narrow() {
		return narrowReentered[nr]
	}
	return reentered[nr]
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
