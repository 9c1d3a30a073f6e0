package tracee

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Known is what a visit needs of /proc/PID/task/TID/status, for callers that have
// read it since the thread's process was stopped.
type Known struct {
	Tgid, Tid uint32 // as the thread knows itself
	Caught    uint64 // signals with a handler
	Seccomp   uint32 // its mode
}

// ids are a thread's own view of its ids, in its innermost pid namespace.
type ids struct{ tgid, tid uint32 }

// status is what Run needs of /proc/PID/task/TID/status.
type status struct {
	ids
	caught  uint64 // signals with a handler
	pending uint64 // of the thread and of its group
	seccomp string // its mode: 0, 1 strict, 2 filter
}

func readStatus(pid, tid int) (st status, err error) {
	st.seccomp = "0" // a kernel without
	text, err := ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", pid, tid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return st, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return st, err
	}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "NStgid":
			st.tgid, err = innermost(value)
		case "NSpid":
			st.tid, err = innermost(value)
		case "SigPnd", "ShdPnd":
			var set uint64
			set, err = strconv.ParseUint(value, 16, 64)
			st.pending |= set
		case "SigCgt":
			st.caught, err = strconv.ParseUint(value, 16, 64)
		case "Seccomp":
			st.seccomp = value
		}
		if err != nil {
			return st, fmt.Errorf("status of task %d: %s: %w", tid, key, err)
		}
	}
	return st, nil
}

// innermost is the last of the ids that a task has in nested pid namespaces.
func innermost(list string) (uint32, error) {
	id, err := strconv.ParseUint(list[strings.LastIndexByte(list, '\t')+1:], 10, 32)
	return uint32(id), err
}

// threadByNamespaceID finds the thread of process pid that calls itself tid, or
// returns nil if there is none any more.
func threadByNamespaceID(pid int, tid uint32) (*Thread, error) {
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, err
	}
	for _, e := range dir {
		host, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, err
		}
		st, err := readStatus(pid, host)
		if errors.Is(err, ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if st.tid == tid {
			return &Thread{Tid: host, Pid: pid}, nil
		}
	}
	return nil, nil
}

func sigbit(s unix.Signal) uint64 {
	if s == 0 {
		return 0
	}
	return 1 << (s - 1)
}

// allBut is the mask of all signals but s. (The kernel leaves SIGKILL and
// SIGSTOP out of any mask.)
func allBut(s unix.Signal) uint64 { return ^sigbit(s) }

const stopSignals = 1<<(unix.SIGSTOP-1) | 1<<(unix.SIGTSTP-1) | 1<<(unix.SIGTTIN-1) | 1<<(unix.SIGTTOU-1)

// reportSignal chooses the signal by which a thread with the given mask reports
// to us: one whose default action is to be ignored and that has no handler, so
// that it means nothing to an untraced thread. Nor may the thread block it: what
// is blocked is kept, for sigwait(2) or a signalfd, even if it is ignored, and
// would get lost while we have it unblocked.
//
// SIGCONT is the last choice, for Go, which catches the others: sending it has
// effects of its own. It ends a group stop and throws away pending stop signals,
// so it is out of the question where there is one. What remains is a SIGSTOP
// sent within the microsecond between a thread's last look at its signals and
// its report. 0 if none will do: each call is then waited for on its own.
func reportSignal(st status, mask uint64, halted bool) unix.Signal {
	for _, s := range []unix.Signal{unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD, unix.SIGCONT} {
		if (st.caught|mask)&sigbit(s) != 0 {
			continue
		}
		if s == unix.SIGCONT && (halted || st.pending&stopSignals != 0) {
			continue
		}
		return s
	}
	return 0
}

// Dispatch is how a thread has its system calls raise SIGSYS (prctl(2)
// PR_SET_SYSCALL_USER_DISPATCH, as emulators use it): struct ptrace_sud_config.
type Dispatch struct{ Mode, Selector, Offset, Length uint64 }

// Dispatch reads it; Linux before 6.4 cannot say.
func (t *Thread) Dispatch() (d Dispatch, err error) {
	_, err = ptrace(ptraceGetSyscallUserDispatch, t.Tid, unsafe.Sizeof(d), uintptr(unsafe.Pointer(&d)))
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return d, err
}

// SetDispatch writes it.
func (t *Thread) SetDispatch(d Dispatch) error {
	_, err := ptrace(ptraceSetSyscallUserDispatch, t.Tid, unsafe.Sizeof(d), uintptr(unsafe.Pointer(&d)))
	return err
}

// checkDispatch refuses a thread whose system calls raise SIGSYS at present.
func (t *Thread) checkDispatch() error {
	d, err := t.Dispatch()
	if err != nil || d.Mode == 0 {
		return err
	}
	const allow = 0 // SYSCALL_DISPATCH_FILTER_ALLOW
	selector := [1]byte{allow + 1}
	if d.Selector != 0 {
		if err := t.Read(d.Selector, selector[:]); err != nil {
			return err
		}
	}
	if selector[0] != allow {
		return &RefusedError{t.Tid, "it dispatches system calls to itself (PR_SET_SYSCALL_USER_DISPATCH) and runs what it emulates; try again in a moment"}
	}
	return nil
}

// await waits at most limit for the thread's next stop; it returns ErrNoStop or
// ErrGone, wrapped, if there is none. It polls: a stop comes within microseconds
// as a rule, and a wait that sleeps would never return for the leader of a
// process that was killed, since the kernel reports a leader only after all its
// other threads were reaped, and those are ours to reap.
func (t *Thread) await(limit time.Duration) (Stop, error) {
	const spins = 200
	nap := unix.Timespec{Nsec: 20_000}
	start := time.Now()
	for i := 1; ; i++ {
		s, stopped, err := t.wait(unix.WNOHANG)
		if stopped && s.Exited {
			err = fmt.Errorf("task %d: %w", t.Tid, ErrGone)
		}
		if err != nil || stopped {
			return s, err
		}
		if i < spins {
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			continue
		}
		dead, err := t.dead()
		switch {
		case err != nil:
			return s, err
		case dead:
			return s, fmt.Errorf("task %d: %w", t.Tid, ErrGone)
		case time.Since(start) > limit:
			return s, fmt.Errorf("task %d: %w within %v", t.Tid, ErrNoStop, limit)
		}
		_ = unix.Nanosleep(&nap, nil)
		nap.Nsec = min(2*nap.Nsec, 1_000_000)
	}
}

// dead reports a thread that has ended, reaped or not.
func (t *Thread) dead() (bool, error) {
	stat, err := ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", t.Pid, t.Tid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	_, state, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')'):]), " ")
	return strings.ContainsAny(state[:1], "ZX"), nil
}
