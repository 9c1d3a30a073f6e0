package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
)

// Bounds on what one task or thread carries.
const (
	siginfoSize = 128     // sizeof(siginfo_t)
	maxPending  = 1 << 16 // queued signals; RLIMIT_SIGPENDING bounds them per user
	maxTimers   = 1 << 16
	maxTimerID  = 1 << 22 // each costs two calls on kernels that do not take an id
	maxGroups   = 1 << 16 // NGROUPS_MAX
	maxLimits   = 64      // RLIM_NLIMITS is 16
	maxXState   = 64 << 10
	maxRegs     = 4 << 10
	maxAffinity = 8 << 10
	maxFilter   = 4096 * 8 // BPF_MAXINSNS instructions of sock_filter
	maxFilters  = 4096

	userDescSize = 16   // sizeof(struct user_desc)
	maxLDT       = 8192 // LDT_ENTRIES
	firstTLS     = 12   // GDT_ENTRY_TLS_MIN
	maxTLS       = 3    // GDT_ENTRY_TLS_ENTRIES
	maxNodes     = 128  // bytes of a mask of memory nodes
	maxUtil      = 1024 // SCHED_CAPACITY_SCALE

	regsAMD64 = 27 * 8 // sizeof(struct user_regs_struct)
	sigevNone = 1      // SIGEV_NONE

	membarriers = 1<<2 | 1<<4 | 1<<6 | 1<<8 // MEMBARRIER_CMD_REGISTER_*
)

// stopSignals are SIGSTOP, SIGTSTP, SIGTTIN and SIGTTOU.
var stopSignals = []int32{19, 20, 21, 22}

func (b *builder) checkTask(t *Task) error {
	if err := b.checkTaskParts(t); err != nil {
		return fmt.Errorf("process %d: %w", t.Pid, err)
	}
	for i := range t.Threads {
		if t.Threads[i].Exited && (i > 0 || len(t.Threads) == 1 || len(t.Threads[i].Regs) != 0) {
			return fmt.Errorf("process %d: thread %d has ended, but is no leader of others, or has registers", t.Pid, t.Threads[i].Tid)
		}
		if err := b.checkThread(&t.Threads[i]); err != nil {
			return fmt.Errorf("process %d: thread %d: %w", t.Pid, t.Threads[i].Tid, err)
		}
	}
	return nil
}

func (b *builder) checkTaskParts(t *Task) error {
	p := b.processes[t.Pid]
	switch {
	case p == nil:
		return errors.New("the tree has no such process")
	case p.Zombie:
		return errors.New("the tree says it is a zombie, which has no task")
	case b.tasks[t.Pid] != nil:
		return errors.New("it already has a task")
	case !sameThreads(t, p):
		return errors.New("its threads are not those of the tree")
	case len(t.Rlimits) > maxLimits:
		return fmt.Errorf("it has %d resource limits", len(t.Rlimits))
	case t.Membarrier&^membarriers != 0:
		return fmt.Errorf("memory barriers %#x", t.Membarrier)
	case len(t.ITimers) > 3 || len(t.Timers) > maxTimers:
		return errors.New("it has too many timers")
	case t.Untold != 0 && (t.Untold != CldStopped || t.Stopped == 0) && (t.Untold != CldContinued || t.Stopped != 0):
		return fmt.Errorf("wait has yet to tell %d of it, but it is stopped by signal %d", t.Untold, t.Stopped)
	case t.Stopped != 0 && !slices.Contains(stopSignals, t.Stopped):
		return fmt.Errorf("signal %d stops nothing", t.Stopped)
	case !validSignal(t.ExitSignal):
		return errors.New("its exit signal is not a signal")
	case t.THPDisable > 3 || t.MDWE > 3 || t.Dumpable > 2:
		return errors.New("its memory controls are not valid")
	}
	if t.Threads[0].Files != 0 || t.Threads[0].FS != 0 {
		return errors.New("its leader has other tables than the process")
	}
	if mm, known := b.spaceOf[t.Sighand]; known && mm != t.MM {
		return errors.New("it shares signal actions with a process of another address space")
	}
	return first(
		checkSegments(t.LDT, 0, maxLDT),
		checkPending(t.Pending), checkTimers(t),
		need[MM](b, t.MM, "address space"), need[Files](b, t.Files, "descriptor table"),
		need[FS](b, t.FS, "file system context"), need[Sighand](b, t.Sighand, "signal actions"))
}

func sameThreads(t *Task, p *Process) bool {
	return slices.EqualFunc(t.Threads, p.Threads, func(th Thread, tid int32) bool { return th.Tid == tid })
}

// validSignal accepts zero, which stands for none.
func validSignal(sig int32) bool { return sig >= 0 && sig <= maxSignal }

func checkPending(queue [][]byte) error {
	if len(queue) > maxPending {
		return fmt.Errorf("%d signals are queued", len(queue))
	}
	for _, info := range queue {
		if len(info) != siginfoSize {
			return fmt.Errorf("a siginfo_t of %d bytes, not %d", len(info), siginfoSize)
		}
	}
	return nil
}

// maxLate bounds the signals in a trailer.
const maxLate = 128

// addLate checks late signals and queues them behind their task's others.
func (b *builder) addLate(all []Late) error {
	n := 0
	for _, l := range all {
		n += len(l.Pending)
		queue := b.queueOf(l.Pid, l.Tid)
		if queue == nil {
			return fmt.Errorf("signals for thread %d of process %d, which is not there", l.Tid, l.Pid)
		}
		if err := checkPending(l.Pending); err != nil {
			return err
		}
		if n > maxLate {
			return fmt.Errorf("more than %d signals came late", maxLate)
		}
		*queue = append(*queue, l.Pending...)
	}
	return nil
}

// queueOf finds the queue of a process, or of one of its threads.
func (b *builder) queueOf(pid, tid int32) *[][]byte {
	t := b.tasks[pid]
	switch {
	case t == nil:
		return nil
	case tid == 0:
		return &t.Pending
	}
	for i := range t.Threads {
		if t.Threads[i].Tid == tid {
			return &t.Threads[i].Pending
		}
	}
	return nil
}

// checkTimers checks that each timer is one the kernel could have had; timer
// ids are unique in a process because timer_create(2) handed them out.
func checkTimers(t *Task) error {
	for _, it := range t.ITimers {
		if it.Which < 0 || it.Which > 2 || !validMicros(it.Interval) || !validMicros(it.Value) {
			return fmt.Errorf("interval timer %d is not valid", it.Which)
		}
	}
	ids := map[int32]bool{}
	for _, pt := range t.Timers {
		// With SIGEV_NONE the kernel keeps any number as the signal.
		signal := pt.Notify == sigevNone || validSignal(pt.Signal)
		times := pt.Interval >= 0 && pt.Left >= 0 && pt.Deadline >= 0 && pt.Overrun >= 0 &&
			(pt.Overrun == 0 || pt.Interval <= math.MaxInt64/(pt.Overrun+1))
		if pt.ID < 0 || pt.ID > maxTimerID || ids[pt.ID] || !times || !signal {
			return fmt.Errorf("posix timer %d is not valid", pt.ID)
		}
		ids[pt.ID] = true
	}
	return nil
}

// validMicros accepts what is a time in nanoseconds, too.
func validMicros(v int64) bool { return v >= 0 && v <= math.MaxInt64/1000 }

func (b *builder) checkThread(t *Thread) error {
	switch {
	case !t.Exited && len(t.Regs) == 0 || len(t.Regs) > maxRegs || len(t.Regs)%8 != 0:
		return fmt.Errorf("general registers of %d bytes", len(t.Regs))
	case b.Arch.Machine == "x86_64" && len(t.Regs) != regsAMD64 && !t.Exited:
		return fmt.Errorf("general registers of %d bytes, x86_64 has %d", len(t.Regs), regsAMD64)
	case len(t.XState) > maxXState:
		return fmt.Errorf("an extended state of %d bytes", len(t.XState))
	case len(t.Affinity) > maxAffinity:
		return fmt.Errorf("an affinity mask of %d bytes", len(t.Affinity))
	case len(t.Creds.Groups) > maxGroups:
		return fmt.Errorf("%d supplementary groups", len(t.Creds.Groups))
	case len(t.Seccomp) > maxFilters || !all(t.Seccomp, validFilter):
		return errors.New("its seccomp filters are not valid")
	case !validSignal(t.PDeathSig):
		return fmt.Errorf("parent death signal %d", t.PDeathSig)
	case t.SeccompMode > 2 || (t.SeccompMode == 2) != (len(t.Seccomp) > 0):
		return fmt.Errorf("seccomp mode %d with %d filters", t.SeccompMode, len(t.Seccomp))
	case t.Sched.UtilMin > maxUtil || t.Sched.UtilMax > maxUtil:
		return errors.New("its utilization clamps are not valid")
	}
	if t.Files != 0 && object[Files](&b.Head, t.Files) == nil || t.FS != 0 && object[FS](&b.Head, t.FS) == nil {
		return errors.New("its own descriptor table or file system context stands nowhere before it")
	}
	return first(b.checkPlaces(t), checkComm(t.Comm), checkPending(t.Pending), checkControls(&t.Controls), checkPolicy(t.Policy))
}

func checkControls(c *Controls) error {
	switch {
	case c.MCEKill > 2:
		return fmt.Errorf("machine-check policy %d", c.MCEKill)
	case c.Dispatch != nil && (c.Dispatch.Mode < 1 || c.Dispatch.Mode > 2):
		return fmt.Errorf("system call dispatch of mode %d", c.Dispatch.Mode)
	}
	return checkSegments(c.TLS, firstTLS, maxTLS)
}

// checkSegments checks the size of each struct user_desc and that each is about
// an entry of its own. What it describes the kernel checks.
func checkSegments(table [][]byte, first uint32, most int) error {
	seen := map[uint32]bool{}
	for _, d := range table {
		if len(d) != userDescSize {
			return fmt.Errorf("a segment of %d bytes, not %d", len(d), userDescSize)
		}
		entry := binary.LittleEndian.Uint32(d)
		if entry < first || entry-first >= uint32(most) || seen[entry] {
			return fmt.Errorf("segment %d is out of its table or stands twice", entry)
		}
		seen[entry] = true
	}
	return nil
}

func checkPolicy(p *MemPolicy) error {
	if p != nil && len(p.Nodes) > maxNodes {
		return fmt.Errorf("a memory policy with a mask of %d bytes", len(p.Nodes))
	}
	return nil
}

// checkVforks checks that who waits in vfork(2) waits for a child of its process
// and in its address space, that has none itself, nor a group that others are in.
func (b *builder) checkVforks() error {
	waited := map[int32]bool{}
	for _, t := range b.Tasks {
		for i := range t.Threads {
			pid := t.Threads[i].Vfork
			if pid == 0 {
				continue
			}
			child, p := b.tasks[pid], b.processes[pid]
			if child == nil || waited[pid] || p.Ppid != t.Pid || child.MM != t.MM {
				return fmt.Errorf("process %d: thread %d waits for process %d, which it cannot have vforked", t.Pid, t.Threads[i].Tid, pid)
			}
			waited[pid] = true
		}
	}
	for i := range b.Tree.Processes {
		p := &b.Tree.Processes[i]
		if waited[p.Ppid] || p.Pid != p.Pgid && waited[p.Pgid] || p.Pid != p.Sid && waited[p.Sid] {
			return fmt.Errorf("process %d: its parent, group or session is a process that another waits for in vfork", p.Pid)
		}
	}
	return nil
}

func validFilter(f Filter) bool {
	return len(f.Program) > 0 && len(f.Program) <= maxFilter && len(f.Program)%8 == 0
}

func checkSighand(s *Sighand) error {
	seen := map[int32]bool{}
	for _, a := range s.Actions {
		if a.Signal == 0 || !validSignal(a.Signal) || seen[a.Signal] {
			return fmt.Errorf("action for signal %d is not valid or stands twice", a.Signal)
		}
		seen[a.Signal] = true
	}
	return nil
}
