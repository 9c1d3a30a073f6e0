package task

import (
	"encoding/binary"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// 32-bit code has system calls of its own, by numbers of its own
// (arch/x86/entry/syscalls/syscall_32.tbl). What the kernel keeps of most of them is
// the same as of 64-bit ones, which a thread can be asked for, and given, by these.
// The exceptions stand here: calls that wait, actions of signals, robust futexes.
const (
	narrowRestart         = 0
	narrowNanosleep       = 162
	narrowPoll            = 168
	narrowSigaction       = 174
	narrowFutex           = 240
	narrowClockNanosleep  = 267
	narrowSetRobustList   = 311
	narrowGetRobustList   = 312
	narrowClockNanosleep6 = 407 // with times of 64 bits, as the next
	narrowFutex6          = 422
)

// timedCall is a call that is continued from a restart block.
type timedCall struct {
	own  uint64 // its number
	nr   uint64 // that of the same call of 64-bit code
	half int    // bytes of each of the two numbers that make a time
}

var narrowTimed = []timedCall{
	// In the order in which restartedCall is to try them.
	{narrowFutex6, unix.SYS_FUTEX, 8}, {narrowFutex, unix.SYS_FUTEX, 4},
	{narrowClockNanosleep6, unix.SYS_CLOCK_NANOSLEEP, 8}, {narrowClockNanosleep, unix.SYS_CLOCK_NANOSLEEP, 4},
	{narrowNanosleep, unix.SYS_NANOSLEEP, 4}, {narrowPoll, unix.SYS_POLL, 4},
	{narrowRestart, unix.SYS_RESTART_SYSCALL, 4},
}

// timed finds out which call a number is.
func timed(number uint64, narrow bool) timedCall {
	if !narrow {
		return timedCall{number, number, 8}
	}
	i := slices.IndexFunc(narrowTimed, func(c timedCall) bool { return c.own == number })
	if i < 0 {
		return timedCall{own: number, nr: ^uint64(0), half: 4}
	}
	return narrowTimed[i]
}

// narrowBehind is the number of the call of 32-bit code that is like call nr of
// 64-bit code, where restart_syscall(2) has taken its place.
func narrowBehind(t *tracee.Thread, nr uint64, b *bpf.RestartBlock, args [6]uint64) uint64 {
	switch nr {
	case unix.SYS_NANOSLEEP:
		return narrowNanosleep
	case unix.SYS_CLOCK_NANOSLEEP:
		if b.Nanosleep.Compat {
			return narrowClockNanosleep
		}
		return narrowClockNanosleep6
	case unix.SYS_POLL:
		return narrowPoll
	}
	if args[1]&futexCommand == futexWaitBitset && !fits(t, timed(narrowFutex6, true), args) {
		return narrowFutex
	}
	return narrowFutex6
}

// narrowReentered is reentered for 32-bit code.
var narrowReentered = func() map[uint64]bool {
	all := map[uint64]bool{}
	for _, nr := range []uint64{
		3, 4, 145, 146, // read, write, readv, writev
		82, 142, 308, 413, 309, 414, // select, _newselect, pselect6, pselect6_time64, ppoll, ppoll_time64
		102, 362, 364, // socketcall, connect, accept4
		369, 370, 345, 371, 372, 337, 417, // sendto, sendmsg, sendmmsg, recvfrom, recvmsg, recvmmsg, recvmmsg_time64
		117, 400, 401, 420, // ipc, msgsnd, msgrcv, semtimedop_time64
		177, 421, // rt_sigtimedwait, rt_sigtimedwait_time64
		247, 385, 416, // io_getevents, io_pgetevents, io_pgetevents_time64
		256, 319, 441, // epoll_wait, epoll_pwait, epoll_pwait2
	} {
		all[nr] = true
	}
	return all
}()

// narrowABI in the flags of an action tells the kernel to give its handler the frame
// of 32-bit code (SA_IA32_ABI in arch/x86/include/asm/signal.h). It sets that where
// such code sets the action, and shows it to nobody.
const narrowABI = 0x02000000

const sigIgnored = 1

// markNarrow notes the actions of a process of 32-bit code.
func markNarrow(h *image.Sighand) {
	for i := range h.Actions {
		if h.Actions[i].Handler > sigIgnored {
			h.Actions[i].Flags |= narrowABI
		}
	}
}

// encodeNarrowAction makes a struct compat_sigaction.
func encodeNarrowAction(a image.SigAction) []byte {
	var b []byte
	for _, v := range []uint64{a.Handler, a.Flags &^ narrowABI, a.Restorer} {
		b = binary.LittleEndian.AppendUint32(b, uint32(v))
	}
	return binary.LittleEndian.AppendUint64(b, a.Mask)
}

// Narrow reports a task that is, or in part acts as, 32-bit code.
func Narrow(t *image.Task, h *image.Sighand) bool {
	narrow := h != nil && slices.ContainsFunc(h.Actions, func(a image.SigAction) bool { return a.Flags&narrowABI != 0 })
	for i := range t.Threads {
		r, err := tracee.DecodeRegs(t.Threads[i].Regs)
		narrow = narrow || t.Threads[i].NarrowRobust != 0 || err == nil && r.Narrow()
	}
	return narrow
}

// RunsNarrow adds the call that fails, by a fault of the stub, where the kernel does
// not run 32-bit code.
func RunsNarrow(b *tracee.Batch) {
	const getpid = 20
	b.AddNarrow(getpid)
}

// narrowRobustList asks where a thread's list of robust futexes of 32-bit code
// starts, which the kernel tells that only.
func narrowRobustList(tid int) (uint64, error) {
	low, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_32BIT)
	if err != nil {
		return 0, fmt.Errorf("get_robust_list of 32-bit code: mmap: %w", err)
	}
	defer func() { _ = unix.Munmap(low) }()
	head := uint32(uintptr(unsafe.Pointer(&low[0])))
	if ret := narrowCall(narrowGetRobustList, uint32(tid), head, head+4); ret < 0 {
		return 0, fmt.Errorf("get_robust_list of 32-bit code: %w", unix.Errno(-ret))
	}
	return uint64(binary.LittleEndian.Uint32(low)), nil
}

// narrowCall makes a system call of 32-bit code. Pointers are below 4 GiB.
func narrowCall(nr, a, b, c uint32) int32
