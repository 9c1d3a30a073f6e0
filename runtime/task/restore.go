package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// dumpableByKernel is SUID_DUMP_ROOT. Only the kernel sets it, where the sysctl
// fs.suid_dumpable says so, when credentials change; prctl(2) refuses it.
const dumpableByKernel = 2

// KeepsDumpable reports whether this host lets a process be as dumpable as t. If
// not, it is not dumpable at all.
func KeepsDumpable(t *image.Task) bool {
	if t.Dumpable != dumpableByKernel {
		return true
	}
	b, err := os.ReadFile("/proc/sys/fs/suid_dumpable")
	return err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(dumpableByKernel)
}

// explained are calls of a restore that fail for what the host or the kernel
// is, with what they set.
var explained = map[uintptr]string{
	unix.SYS_SCHED_SETATTR: "scheduling policy", unix.SYS_IOPRIO_SET: "I/O priority", unix.SYS_SET_MEMPOLICY: "memory policy",
	unix.SYS_MBIND: "memory policy", unix.SYS_ARCH_PRCTL: "processor feature", unix.SYS_SECCOMP: "seccomp filter",
	unix.SYS_SETRLIMIT: "resource limit", unix.SYS_TIMER_CREATE: "timer", unix.SYS_RSEQ: "restartable sequence",
}

// explainedControls are the same by the option of prctl(2).
var explainedControls = map[uint64]string{
	unix.PR_SET_IO_FLUSHER: "I/O flusher (PR_SET_IO_FLUSHER)", unix.PR_SET_SPECULATION_CTRL: "speculation control (PR_SET_SPECULATION_CTRL)",
	unix.PR_MCE_KILL: "machine-check policy (PR_MCE_KILL)", unix.PR_SET_TSC: "time-stamp counter (PR_SET_TSC)",
	prSetMDWE: "memory-deny-write-execute (PR_SET_MDWE)", prSetMemoryMerge: "memory merging (PR_SET_MEMORY_MERGE)",
	unix.PR_SET_THP_DISABLE: "huge pages (PR_SET_THP_DISABLE)", unix.PR_SET_SECUREBITS: "securebits", unix.PR_SET_SECCOMP: "seccomp strict mode",
}

// Explain names what a batch of a restore could not set.
func Explain(err error) error {
	var call *tracee.CallError
	if !errors.As(err, &call) {
		return err
	}
	what := explained[call.Nr]
	if call.Nr == unix.SYS_PRCTL {
		what = explainedControls[call.Args[0]]
	}
	if what == "" {
		return err
	}
	return fail.On(what, fmt.Errorf("this kernel or processor does not take it: %w", err))
}

// RestoreProcess adds the calls that give a stub what its process owns, but
// for what must wait: limits, timers and pending signals.
func RestoreProcess(b *tracee.Batch, t *image.Task, h *image.Sighand) {
	restoreActions(b, h)
	if t.Subreaper {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_CHILD_SUBREAPER), tracee.W(1))
	}
	restoreProcessControls(b, t)
	restoreMembarrier(b, t.Membarrier)
	if t.Dumpable == dumpableByKernel { // a change of credentials, while the stub may make any
		const other = 1
		b.Try(unix.SYS_SETFSUID, tracee.W(other))
		b.Try(unix.SYS_SETFSUID, tracee.W(0))
	}
}

// Held is what a stub holds already: its capabilities, whether its ids are the
// task's (they must be set before it enters a user namespace, where not all of
// them need have a number), the seccomp filters, and all its credentials, if it
// has some thread's.
type Held struct {
	Capabilities uint64
	IDs          bool
	Filters      [][]byte
	Credentials  *image.Credentials
}

// RestoreThread adds the calls that give a stub what its thread owns. Memory
// must be in place, for registering a restartable sequence writes to it.
func RestoreThread(b *tracee.Batch, t *image.Thread, held Held) {
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_NAME), b.String(string(t.Comm)))
	b.Try(unix.SYS_SET_TID_ADDRESS, tracee.W(t.TidAddress)) // returns the tid
	if t.RobustHead != 0 {
		b.Add(unix.SYS_SET_ROBUST_LIST, tracee.W(t.RobustHead), tracee.W(t.RobustLen))
	}
	if t.NarrowRobust != 0 {
		const size = 12 // of struct compat_robust_list_head
		b.AddNarrow(narrowSetRobustList, tracee.W(t.NarrowRobust), tracee.W(size))
	}
	if r := t.Rseq; r != nil {
		b.Add(unix.SYS_RSEQ, tracee.W(r.Addr), tracee.W(r.Size), tracee.W(0), tracee.W(r.Sig))
	}
	restoreAltStack(b, t.AltStack)
	restoreControls(b, &t.Controls)
	restorePolicy(b, t.Policy)
	restoreScheduling(b, t)
	if t.TimerSlack != 0 {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_TIMERSLACK), tracee.W(t.TimerSlack))
	}
	restoreSeccomp(b, t, held.Filters)
	if held.Credentials == nil || !reflect.DeepEqual(held.Credentials, &t.Creds) {
		restoreCredentials(b, &t.Creds, held)
	}
	if t.PDeathSig != 0 { // a change of credentials clears it
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_PDEATHSIG), tracee.W(t.PDeathSig))
	}
}

// RestoreLast adds the calls that come when every thread of the process stands
// and its timers do: what runs by itself, and what a change of credentials
// resets.
func RestoreLast(b *tracee.Batch, t *image.Task, c *Clocks) {
	switch {
	case t.Dumpable != dumpableByKernel:
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_DUMPABLE), tracee.W(t.Dumpable))
	case !KeepsDumpable(t):
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_DUMPABLE), tracee.W(0))
	}
	restoreMDWE(b, t)
	expire := func(id int32) {
		i := slices.IndexFunc(t.Timers, func(pt image.PosixTimer) bool { return pt.ID == id })
		expireTimer(b, &t.Timers[i], c)
	}
	restorePending(b, t, 0, t.Pending, expire)
	for i := range t.Threads { // the timers' only: they exist from now on
		for _, info := range t.Threads[i].Pending {
			if id, ok := ofTimer(info, t.Timers); ok {
				expire(id)
			}
		}
	}
	restoreITimers(b, t.ITimers, c)
	restoreLimits(b, t.Rlimits)
}

// RestoreThreadLast adds the calls that come last in thread i.
func RestoreThreadLast(b *tracee.Batch, t *image.Task, i int) {
	restorePending(b, t, t.Threads[i].Tid, t.Threads[i].Pending, func(int32) {})
}

// RestoreTrap gives a stub's process its own action for SIGTRAP, after which no
// batch can run: for the last process with these signal actions.
func RestoreTrap(s *tracee.Stub, h *image.Sighand) error {
	action, step, nr := trapAction(h), s.Step, uintptr(unix.SYS_RT_SIGACTION)
	raw := encodeAction(action)
	if action.Flags&narrowABI != 0 {
		raw, step, nr = encodeNarrowAction(action), s.StepNarrow, narrowSigaction
	}
	if err := s.Write(s.Scratch(), raw); err != nil {
		return err
	}
	if _, err := step(nr, uint64(unix.SIGTRAP), s.Scratch(), 0, sigsetSize); err != nil {
		return fmt.Errorf("action of SIGTRAP: %w", err)
	}
	return nil
}

// UnmapService takes the service area away, the last call of the last process in
// an address space.
func UnmapService(s *tracee.Stub) error {
	if _, err := s.Step(unix.SYS_MUNMAP, s.Service(), tracee.ServiceSize); err != nil {
		return fmt.Errorf("unmap the service area: %w", err)
	}
	return nil
}

// RestoreRegisters gives a stub's thread its cpu state and signal mask, with
// which it is to be released.
func RestoreRegisters(s *tracee.Stub, t *image.Thread, r tracee.Regs) error {
	// The segments that the registers select, and the dispatch of system calls
	// once no more are made for the stub.
	if err := restoreTraced(s, &t.Controls); err != nil {
		return err
	}
	if err := s.SetRegs(r); err != nil {
		return err
	}
	if err := s.SetXState(t.XState); err != nil {
		return fmt.Errorf("extended cpu state of %d bytes: %w", len(t.XState), err)
	}
	return s.SetSigMask(t.SigMask)
}

// RestoreOOMScore sets oom_score_adj. Lowering it takes CAP_SYS_RESOURCE.
func RestoreOOMScore(pid int, adj int32) error {
	if now, err := OOMScoreAdj(pid); err == nil && now == adj {
		return nil
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(int(adj))), 0)
}

// OOMScoreAdj reads a process's oom_score_adj (proc_pid_oom_score_adj(5)).
func OOMScoreAdj(pid int) (int32, error) {
	n, err := procNumber(pid, "oom_score_adj", 10)
	return int32(n), err
}

// robustList asks where a thread's list of robust futexes starts
// (get_robust_list(2)).
func robustList(tid int) (head, size uint64, err error) {
	_, _, e := unix.Syscall(unix.SYS_GET_ROBUST_LIST, uintptr(tid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&size)))
	if e != 0 {
		return 0, 0, fmt.Errorf("get_robust_list: %w", e)
	}
	return head, size, nil
}

// robustLists reads both lists that a thread may have.
func (s *Source) robustLists(tid int, rec *image.Thread) (err error) {
	if rec.RobustHead, rec.RobustLen, err = robustList(tid); err == nil && s.Narrow {
		rec.NarrowRobust, err = narrowRobustList(tid)
	}
	return err
}

// CloneThread adds the clone3(2) of a further thread with given ids, those of
// its innermost pid namespace first; where there are fewer than namespaces, the
// kernel chooses the rest. share are the flags of those of its tables that it
// can have of its own.
func CloneThread(b *tracee.Batch, tids []int32, share uint64) {
	clone(b, unix.CLONE_VM|unix.CLONE_SIGHAND|unix.CLONE_THREAD|share, 0, tids)
}

// CloneProcess adds the clone3(2) of a child with given pids, as in CloneThread.
// flags are those of the tables that it has in common with its forker, and of
// new namespaces.
func CloneProcess(b *tracee.Batch, pids []int32, exitSignal int32, flags uint64) {
	clone(b, flags, uint64(exitSignal), pids)
}

// CloneSibling adds the clone3(2) of a process with the parent of its forker,
// who decides on its exit signal too.
func CloneSibling(b *tracee.Batch, pid int32) {
	clone(b, unix.CLONE_PARENT, 0, []int32{pid})
}

const cloneArgsSize = 88 // struct clone_args, version 2

func clone(b *tracee.Batch, flags, exitSignal uint64, tids []int32) {
	var raw []byte
	for _, tid := range tids {
		raw = binary.LittleEndian.AppendUint32(raw, uint32(tid))
	}
	args := make([]byte, 64)
	binary.LittleEndian.PutUint64(args, flags)
	binary.LittleEndian.PutUint64(args[32:], exitSignal)
	if len(tids) == 0 {
		b.Add(unix.SYS_CLONE3, b.Put(append(args, make([]byte, cloneArgsSize-len(args))...)), tracee.W(cloneArgsSize))
		return
	}
	tail := make([]byte, 16)
	tail[0] = byte(len(tids)) // set_tid_size
	at := b.PutPointer(args, b.Put(raw), tail...)
	b.Add(unix.SYS_CLONE3, at, tracee.W(cloneArgsSize))
}
