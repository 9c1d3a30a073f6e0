// Package tracee is the hands on stopped threads: seizing and stopping them,
// reading and writing their registers and memory, and making them run system
// calls. It knows no container and no image.
//
// Every ptrace request must come from the OS thread that seized the target
// (ptrace(2): "a tracer is a thread"), so whoever uses this package holds
// runtime.LockOSThread for as long as it holds a Thread.
package tracee

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests and options that golang.org/x/sys/unix does not name, from
// include/uapi/linux/ptrace.h.
const (
	ptraceSeize              = 0x4206
	ptraceInterrupt          = 0x4207
	ptracePeekSigInfo        = 0x4209
	ptraceGetSigMask         = 0x420a
	ptraceSetSigMask         = 0x420b
	ptraceSeccompGetFilter   = 0x420c
	ptraceSeccompGetMetadata = 0x420d
	ptraceGetRseqConfig      = 0x420f

	ptraceSetSyscallUserDispatch = 0x4210
	ptraceGetSyscallUserDispatch = 0x4211

	optSuspendSeccomp = 1 << 21 // PTRACE_O_SUSPEND_SECCOMP

	eventStop = 128 // PTRACE_EVENT_STOP

	ntX86XState = 0x202

	sigsetSize = 8 // bytes of the kernel's sigset_t
)

// Options for Seize. LiveOptions leave no trace if the tracer dies; with
// StubOptions the tracee dies with its tracer, and its children are traced.
// TRACESYSGOOD keeps a syscall stop from turning into a deadly SIGTRAP when
// the tracer dies in it; SUSPEND_SECCOMP lets our calls pass the task's filter.
const (
	LiveOptions = unix.PTRACE_O_TRACESYSGOOD | optSuspendSeccomp
	StubOptions = LiveOptions | unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACEEXEC |
		unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE
	// FilteredOptions are those of a stub whose calls its filter is to judge.
	FilteredOptions = StubOptions &^ optSuspendSeccomp
)

// ErrGone is wrapped by errors about a thread that has exited or was killed.
var ErrGone = errors.New("the task is gone")

// ErrNoStop is wrapped when a thread does not stop within the time allowed; a
// parent waiting in vfork(2) is the usual reason: the kernel lets nobody stop it.
var ErrNoStop = errors.New("the task does not stop")

// Thread is one seized thread.
type Thread struct {
	Tid int // as the tracer's pid namespace numbers it
	Pid int // of its thread group

	filtered bool     // its seccomp filter applies to our calls too
	filters  []Filter // see Filters
}

// ptrace makes one request. What addr and data point to must not lie on a
// goroutine's stack: it moves when ptrace needs more of it, and the kernel would
// fill in, or read registers from, what has been left behind.
//
//go:uintptrescapes
func ptrace(request, tid int, addr, data uintptr) (uintptr, error) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
		switch errno {
		case 0:
			return r, nil
		case unix.EINTR:
			continue
		case unix.ESRCH:
			return 0, fmt.Errorf("ptrace request %#x for task %d: %w", request, tid, ErrGone)
		}
		return 0, fmt.Errorf("ptrace request %#x for task %d: %w", request, tid, errno)
	}
}

// Seize attaches to a thread without stopping it (ptrace(2) PTRACE_SEIZE).
// Suspending seccomp needs CAP_SYS_ADMIN and a tracer without a filter of its
// own; without it the thread is seized all the same.
func Seize(pid, tid int, options uintptr) (*Thread, error) {
	t := &Thread{Tid: tid, Pid: pid}
	_, err := ptrace(ptraceSeize, tid, 0, options)
	if errors.Is(err, unix.EPERM) && options&optSuspendSeccomp != 0 {
		t.filtered = true
		_, err = ptrace(ptraceSeize, tid, 0, options&^optSuspendSeccomp)
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// SetOptions replaces the options that the thread was seized with.
func (t *Thread) SetOptions(options uintptr) error {
	if t.filtered {
		options &^= optSuspendSeccomp
	}
	_, err := ptrace(unix.PTRACE_SETOPTIONS, t.Tid, 0, options)
	return err
}

// Interrupt asks the thread to stop; WaitInterrupt waits until it has.
func (t *Thread) Interrupt() error {
	_, err := ptrace(ptraceInterrupt, t.Tid, 0, 0)
	return err
}

// Detach lets the thread go on by itself, delivering sig if it is not 0.
func (t *Thread) Detach(sig unix.Signal) error {
	_, err := ptrace(unix.PTRACE_DETACH, t.Tid, 0, uintptr(sig))
	return err
}

// Cont resumes the thread under trace, delivering sig if it is not 0.
func (t *Thread) Cont(sig unix.Signal) error {
	_, err := ptrace(unix.PTRACE_CONT, t.Tid, 0, uintptr(sig))
	return err
}

// ContSyscall resumes the thread until it next enters or leaves a system call.
func (t *Thread) ContSyscall(sig unix.Signal) error {
	_, err := ptrace(unix.PTRACE_SYSCALL, t.Tid, 0, uintptr(sig))
	return err
}

// Stop says why a thread stopped.
type Stop struct {
	Signal unix.Signal
	Event  int  // PTRACE_EVENT_*, 0 for a plain signal or syscall stop
	Exited bool // it is gone; Signal holds nothing
}

// Syscall reports a stop at the entry or exit of a system call.
func (s Stop) Syscall() bool { return s.Event == 0 && s.Signal == unix.SIGTRAP|0x80 }

// Interrupted reports the stop that Interrupt asked for, or a group stop.
func (s Stop) Interrupted() bool { return s.Event == eventStop }

func (s Stop) String() string {
	switch {
	case s.Exited:
		return "exit"
	case s.Syscall():
		return "syscall stop"
	case s.Event != 0:
		return fmt.Sprintf("event %d (%v)", s.Event, s.Signal)
	}
	return fmt.Sprintf("stop by %v", s.Signal)
}

// siginfoChild is siginfo_t as waitid(2) fills it.
type siginfoChild struct {
	Signo, Errno, Code, _ int32
	Pid                   int32
	UID                   uint32
	Status                int32
	_                     [100]byte
}

const (
	cldTrapped = 4
	cldStopped = 5
)

// wait looks at the thread's stop without consuming it. That matters when we
// die: a signal stop whose status was consumed loses its signal with the
// tracer, one that was only looked at delivers it (kernel/ptrace.c: exit_code
// stays). It returns false if WNOHANG was asked for and it still runs.
func (t *Thread) wait(flags uintptr) (Stop, bool, error) {
	var si siginfoChild
	flags |= unix.WSTOPPED | unix.WEXITED | unix.WNOWAIT | unix.WALL
	for {
		_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_PID, uintptr(t.Tid), uintptr(unsafe.Pointer(&si)), flags, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno == unix.ECHILD {
			return Stop{Exited: true}, true, nil
		}
		if errno != 0 {
			return Stop{}, false, fmt.Errorf("wait for task %d: %w", t.Tid, errno)
		}
		break
	}
	switch {
	case si.Pid == 0:
		return Stop{}, false, nil
	case si.Code != cldTrapped && si.Code != cldStopped:
		return Stop{Exited: true}, true, nil
	}
	return Stop{Signal: unix.Signal(si.Status & 0xff), Event: int(si.Status) >> 8}, true, nil
}

// Wait waits until the thread stops or exits.
func (t *Thread) Wait() (Stop, error) {
	s, _, err := t.wait(0)
	return s, err
}

// Reap collects a thread that Wait reported as exited, so that its real parent
// is told of it.
func (t *Thread) Reap() error {
	for {
		_, err := unix.Wait4(t.Tid, nil, unix.WALL|unix.WNOHANG, nil)
		if err != unix.EINTR {
			return err
		}
	}
}

// WaitInterrupt waits at most limit for the stop that Interrupt asked for.
// Signals that arrive first are delivered, as they would have been without us.
// Any stop takes back the one that was asked for (ptrace_stop in
// kernel/signal.c clears JOBCTL_TRAP_STOP), so it is asked for again.
func (t *Thread) WaitInterrupt(limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for nap := 10 * time.Microsecond; ; nap = min(2*nap, time.Millisecond) {
		s, stopped, err := t.wait(unix.WNOHANG)
		switch {
		case err != nil:
			return err
		case stopped && s.Exited:
			return fmt.Errorf("task %d: %w", t.Tid, ErrGone)
		case stopped && s.Interrupted():
			return nil
		case stopped && s.Event == 0 && !s.Syscall():
			err = t.contInterrupted(s.Signal)
		case stopped:
			err = t.contInterrupted(0)
		case time.Now().After(deadline):
			return fmt.Errorf("task %d: %w within %v", t.Tid, ErrNoStop, limit)
		default:
			time.Sleep(nap)
		}
		if err != nil {
			return err
		}
	}
}

// GroupStop is the signal by which job control has stopped the thread, if its
// present stop is of that kind (ptrace(2), "Group-stop") and not only the one
// that Interrupt asked for, else 0.
func (t *Thread) GroupStop() unix.Signal {
	s, stopped, err := t.wait(unix.WNOHANG)
	if err == nil && stopped && s.Event == eventStop && s.Signal != unix.SIGTRAP {
		return s.Signal
	}
	return 0
}

func (t *Thread) contInterrupted(sig unix.Signal) error {
	if err := t.Cont(sig); err != nil {
		return err
	}
	return t.Interrupt()
}

// EventMessage is the number that goes with an event: a new task's id.
func (t *Thread) EventMessage() (int, error) {
	var msg uint64
	_, err := ptrace(unix.PTRACE_GETEVENTMSG, t.Tid, 0, uintptr(unsafe.Pointer(&msg)))
	return int(msg), err
}

// SigMask is the set of signals the thread blocks.
func (t *Thread) SigMask() (mask uint64, err error) {
	_, err = ptrace(ptraceGetSigMask, t.Tid, sigsetSize, uintptr(unsafe.Pointer(&mask)))
	return mask, err
}

// SetSigMask replaces the set of signals the thread blocks. The kernel keeps
// SIGKILL and SIGSTOP out of it.
func (t *Thread) SetSigMask(mask uint64) error {
	_, err := ptrace(ptraceSetSigMask, t.Tid, sigsetSize, uintptr(unsafe.Pointer(&mask)))
	return err
}

// RegSet reads a register set (PTRACE_GETREGSET) of type nt into b and returns
// the part that was filled.
func (t *Thread) RegSet(nt uintptr, b []byte) ([]byte, error) {
	iov := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	if _, err := ptrace(unix.PTRACE_GETREGSET, t.Tid, nt, uintptr(unsafe.Pointer(&iov))); err != nil {
		return nil, err
	}
	return b[:iov.Len], nil
}

// SetRegSet writes a register set of type nt.
func (t *Thread) SetRegSet(nt uintptr, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	iov := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	_, err := ptrace(unix.PTRACE_SETREGSET, t.Tid, nt, uintptr(unsafe.Pointer(&iov)))
	return err
}

// SigInfoSize is the size of a siginfo_t.
const SigInfoSize = 128

// PendingSignals reads the queued signals with their siginfo, in order, but for
// the first skip: the queue of the thread group if shared, else the thread's own.
func (t *Thread) PendingSignals(shared bool, skip int) ([][]byte, error) {
	const batch = 32
	args := struct {
		off   uint64
		flags uint32
		nr    int32
	}{off: uint64(skip), nr: batch}
	if shared {
		args.flags = 1 // PTRACE_PEEKSIGINFO_SHARED
	}
	var out [][]byte
	for {
		buf := make([]byte, batch*SigInfoSize)
		n, err := ptrace(ptracePeekSigInfo, t.Tid, uintptr(unsafe.Pointer(&args)), uintptr(unsafe.Pointer(&buf[0])))
		if err != nil {
			return nil, err
		}
		for i := range int(n) {
			out = append(out, buf[i*SigInfoSize:(i+1)*SigInfoSize])
		}
		if n < batch {
			return out, nil
		}
		args.off += uint64(n)
	}
}

// RseqConfig is struct ptrace_rseq_configuration.
type RseqConfig struct {
	Addr      uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

// Rseq reads where the thread's restartable-sequence area lies; Addr is 0 if
// none is registered. Linux 5.13 and later.
func (t *Thread) Rseq() (c RseqConfig, err error) {
	_, err = ptrace(ptraceGetRseqConfig, t.Tid, unsafe.Sizeof(c), uintptr(unsafe.Pointer(&c)))
	return c, err
}

// SeccompFilter reads the thread's i-th filter, oldest first, as an array of
// struct sock_filter, and its SECCOMP_FILTER_FLAG_* flags. ok is false past
// the last one.
func (t *Thread) SeccompFilter(i int) (program []byte, flags uint64, ok bool, err error) {
	n, err := ptrace(ptraceSeccompGetFilter, t.Tid, uintptr(i), 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) && i == 0 {
		return nil, 0, false, nil
	}
	if err != nil || n == 0 {
		return nil, 0, false, err
	}
	program = make([]byte, n*8)
	if _, err = ptrace(ptraceSeccompGetFilter, t.Tid, uintptr(i), uintptr(unsafe.Pointer(&program[0]))); err != nil {
		return nil, 0, false, err
	}
	meta := [2]uint64{uint64(i)}
	if _, err = ptrace(ptraceSeccompGetMetadata, t.Tid, unsafe.Sizeof(meta), uintptr(unsafe.Pointer(&meta))); err != nil {
		return nil, 0, false, err
	}
	return program, meta[1], true, nil
}

// Read fills b from the thread's memory at addr (process_vm_readv(2)).
func (t *Thread) Read(addr uint64, b []byte) error {
	return ReadMemory(t.Tid, addr, b)
}

// Write puts b into the thread's memory at addr, which must be writable.
func (t *Thread) Write(addr uint64, b []byte) error {
	return WriteMemory(t.Tid, addr, b)
}

// ReadMemory reads from a task's memory; no trace is needed for it.
func ReadMemory(pid int, addr uint64, b []byte) error {
	return transfer(unix.SYS_PROCESS_VM_READV, pid, addr, b)
}

// WriteMemory writes into a task's writable memory.
func WriteMemory(pid int, addr uint64, b []byte) error {
	return transfer(unix.SYS_PROCESS_VM_WRITEV, pid, addr, b)
}

func transfer(nr uintptr, pid int, addr uint64, b []byte) error {
	for len(b) > 0 {
		local := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
		remote := unix.RemoteIovec{Base: uintptr(addr), Len: len(b)}
		n, _, errno := unix.Syscall6(nr, uintptr(pid), uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno == unix.ESRCH {
			return fmt.Errorf("memory of task %d: %w", pid, ErrGone)
		}
		if errno != 0 {
			return fmt.Errorf("memory of task %d at %#x, %d bytes: %w", pid, addr, len(b), errno)
		}
		b, addr = b[n:], addr+uint64(n)
	}
	return nil
}
