// Package halt brings every thread of a container to rest in a ptrace stop, and
// lets them all go again in one act. The checkpoint uses it, and the guardian,
// to let go what a checkpoint that died has left frozen.
//
// The cgroup is frozen first, so that no fork escapes while threads are seized.
// Freezing and stopping have one effect that programs can see: some system
// calls end with EINTR when they are interrupted, by whomever (signal(7)).
// Every thread found in one is made to enter it again, before anything else.
package halt

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	// tries and pause bound the waiting for tasks that nobody can stop: a
	// parent in vfork(2), until its child has called execve(2).
	tries = 50
	pause = 2 * time.Millisecond
	// limit is how long a thread may take to its ptrace stop, vforkLimit while
	// there may be a vfork parent among them, which never gets there.
	// patience is how many tries a vfork parent gets to come out of it.
	patience   = 3
	limit      = time.Second
	vforkLimit = 10 * time.Millisecond
)

// Halt holds the threads of a container.
type Halt struct {
	Paused bool                   // the engine has frozen the container, and it stays so
	Held   map[int]*tracee.Thread // by host tid
	Live   map[int]*tracee.Live   // by host pid
	// Stopped are the processes, by host pid, that job control has stopped, with
	// the signal that did. They stay so: when it detaches, the kernel puts a
	// thread of such a process back into its stop (__ptrace_unlink in
	// kernel/ptrace.c), without a word to anybody.
	Stopped map[int]unix.Signal
	// Waiting are threads that wait in vfork(2), whom nobody can stop, by host
	// tid with their pid. As long as all others rest they stay where they are.
	Waiting map[int]int
	// TakesWaiting says whether the caller can do with such threads.
	TakesWaiting func() bool

	cgroup   *cgroupfreeze.Cgroup
	limbo    map[int]*tracee.Thread // that have not stopped, from an earlier try
	touched  bool                   // the cgroup has been asked to freeze
	stops    bool                   // frozen tasks come to a ptrace stop without a thaw
	mayVfork bool
	culprit  *tracee.Thread
}

// New prepares to stop the container with the given cgroups (cgroup_paths of
// libcontainer's state). Nothing is done to it yet.
//
// On a host with both versions the container is in a cgroup of either. The
// unified one is better, wherever the engine has not paused the container with
// the other: frozen by it, tasks reach a ptrace stop as they are, and stay
// frozen if we die before they are in order again.
func New(paths map[string]string, paused bool) (*Halt, error) {
	h := &Halt{Paused: paused, Held: map[int]*tracee.Thread{}, Live: map[int]*tracee.Live{}, limbo: map[int]*tracee.Thread{},
		Stopped: map[int]unix.Signal{}, TakesWaiting: func() bool { return true }}
	var err error
	if unified := paths[""]; unified != "" && (paths["freezer"] == "" || !paused) {
		h.cgroup, err = cgroupfreeze.Open(map[string]string{"": unified})
		if err == nil {
			h.stops = true
			return h, nil
		}
	}
	h.cgroup, err = cgroupfreeze.Open(paths)
	return h, err
}

// Stop stops every thread. If it fails, some may be stopped: Release lets
// them go.
func (h *Halt) Stop(ctx context.Context) error {
	// A cancelled freeze would thaw again what it has frozen, and show the
	// program an EINTR: it takes a millisecond to finish it instead.
	ctx = context.WithoutCancel(ctx)
	for try := 1; ; try++ {
		err := h.try(ctx)
		if err == nil && (len(h.Waiting) == 0 || try >= patience) {
			return nil
		}
		if err != nil && (!errors.Is(err, tracee.ErrNoStop) || try == tries) {
			return h.explain(err)
		}
		if err := h.Release(ctx); err != nil {
			return err
		}
		time.Sleep(pause * time.Duration(try))
	}
}

func (h *Halt) try(ctx context.Context) error {
	if err := fault.Point("halt.freeze"); err != nil {
		return err
	}
	h.touched = true
	if err := h.cgroup.Freeze(ctx); err != nil {
		return err
	}
	for frozen := true; ; frozen = h.stops {
		fresh, skipped, err := h.seize(frozen)
		if err == nil && !h.stops {
			err = h.cgroup.Thaw(ctx)
		}
		if err != nil {
			return err
		}
		if err := h.await(fresh); err != nil {
			return err
		}
		if h.stops && len(fresh) > 0 || skipped {
			continue // until a look finds nobody new, while nothing can fork
		}
		if h.stops {
			err = h.cgroup.Thaw(ctx)
		}
		if err != nil || h.stops || len(fresh) == 0 {
			return errors.Join(err, h.settle())
		}
	}
}

// seize seizes and interrupts every thread of the cgroup that is not yet held.
// Threads that job control has stopped and that cgroup v1 has frozen are
// skipped: PTRACE_SEIZE waits until a stopped thread has noticed, which these
// cannot before the thaw. It does not set them going.
func (h *Halt) seize(frozen bool) (fresh []*tracee.Thread, skipped bool, err error) {
	pids, err := h.cgroup.Processes()
	if err != nil {
		return nil, false, err
	}
	h.Waiting = map[int]int{}
	for _, pid := range pids {
		tids, err := task.Threads(pid)
		if errors.Is(err, tracee.ErrGone) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		for _, tid := range tids {
			if h.Held[tid] != nil {
				continue
			}
			// One in limbo was seized on its way there. It stays traced until
			// we end, and would rest until then if its child set it free.
			if task.WaitsInVfork(tid) && h.TakesWaiting() {
				h.Waiting[tid] = pid
				continue
			}
			if t := h.limbo[tid]; t != nil { // still ours, and its stop still asked for
				delete(h.limbo, tid)
				h.Held[tid] = t
				fresh = append(fresh, t)
				continue
			}
			if frozen && !h.stops && task.JobStopped(tid) {
				skipped = true
				continue
			}
			t, err := tracee.Seize(pid, tid, tracee.LiveOptions)
			if errors.Is(err, tracee.ErrGone) || err != nil && task.Ended(tid) {
				continue
			}
			if err != nil {
				return nil, false, fail.In(fmt.Sprintf("task (host %d)", tid), err)
			}
			h.Held[tid] = t
			fresh = append(fresh, t)
			if err := t.Interrupt(); err != nil && !errors.Is(err, tracee.ErrGone) {
				return nil, false, err
			}
		}
	}
	return fresh, skipped, nil
}

// await waits for the stops and repairs at once what they have interrupted. A
// thread that has died meanwhile is let go.
func (h *Halt) await(threads []*tracee.Thread) error {
	wait := limit
	if h.mayVfork {
		wait = vforkLimit
	}
	for _, t := range threads {
		err := t.WaitInterrupt(wait)
		if sig := t.GroupStop(); err == nil && sig != 0 {
			h.Stopped[t.Pid] = sig
		}
		if err == nil {
			err = h.repair(t)
		}
		if errors.Is(err, tracee.ErrGone) {
			delete(h.Held, t.Tid)
			_ = t.Reap()
			continue
		}
		if errors.Is(err, tracee.ErrNoStop) {
			h.mayVfork, h.culprit = true, t
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// repair makes a thread enter the call again that our interrupt has ended. The
// EINTR of one in a group stop is none of our doing.
func (h *Halt) repair(t *tracee.Thread) error {
	r, err := t.Regs()
	if err != nil || !task.EndedByInterrupt(&r) || h.Stopped[t.Pid] != 0 {
		return err
	}
	s, err := task.ReadStatus(t.Tid)
	if err != nil {
		return err
	}
	if !task.HideEINTR(&r, s) {
		return nil
	}
	return t.SetRegs(r)
}

// settle lets threads finish that are still restoring themselves from an
// ocickpt that was killed.
func (h *Halt) settle() error {
	byPid := map[int][]*tracee.Thread{}
	for _, t := range h.Held {
		byPid[t.Pid] = append(byPid[t.Pid], t)
	}
	for pid, threads := range byPid {
		tid := pid
		if h.Held[pid] == nil { // its leader has ended, and with it has no memory
			tid = threads[0].Tid
		}
		live, err := tracee.NewLive(tid)
		if err != nil {
			return fail.In(fmt.Sprintf("task (host %d)", pid), err)
		}
		h.Live[pid] = live
		for _, t := range threads {
			err := live.Settle(t, limit)
			if err == nil {
				err = h.repair(t) // it ran, and may be in such a call by now
			}
			if err != nil {
				return fail.In(fmt.Sprintf("task (host %d)", pid), err)
			}
		}
	}
	return nil
}

func (h *Halt) explain(err error) error {
	if err == nil || h.culprit == nil || !errors.Is(err, tracee.ErrNoStop) {
		return err
	}
	comm, _ := task.Comm(h.culprit.Tid)
	inner := 0
	if status, err := task.ReadStatus(h.culprit.Tid); err == nil {
		inner = task.Innermost(status.NSpid)
	}
	return fail.In(task.Name(inner, h.culprit.Tid, comm), &fail.Error{
		Cause:  errors.New("it cannot be stopped: it waits in vfork(2) for a child that has not called execve(2)"),
		Remedy: "try again when that child has",
	})
}

// Pids lists the processes that are held, sorted.
func (h *Halt) Pids() []int {
	var pids []int
	for _, t := range h.Held {
		pids = append(pids, t.Pid)
	}
	for _, pid := range h.Waiting {
		pids = append(pids, pid)
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// Traced lists all threads that have to be waited for when they end.
func (h *Halt) Traced() []int {
	return slices.AppendSeq(slices.Collect(maps.Keys(h.Held)), maps.Keys(h.limbo))
}

// Freeze keeps the stopped tasks where they are even if we die, until Thaw or
// Release.
func (h *Halt) Freeze(ctx context.Context) error { return h.cgroup.Freeze(context.WithoutCancel(ctx)) }

// Thaw leaves them in their ptrace stops.
func (h *Halt) Thaw(ctx context.Context) error { return h.cgroup.Thaw(context.WithoutCancel(ctx)) }

// Release lets everything run on as it was, in one act: detached while the
// cgroup is frozen, the tasks all start with the thaw. A container that its
// engine had paused stays frozen.
func (h *Halt) Release(ctx context.Context) error {
	if !h.touched {
		return nil // a freeze and a thaw would not pass unnoticed
	}
	held, stopped := h.Held, h.Stopped
	h.Forget()
	// Those that are stopped go back into their stop at once: with the thaw,
	// others might be first to run and to look at them.
	var errs error
	var back []int
	for tid, t := range held {
		if stopped[t.Pid] != 0 {
			errs = errors.Join(errs, h.detach(t))
			back = append(back, tid)
			delete(held, tid)
		}
	}
	task.AwaitJobStops(back)
	errs = errors.Join(errs, h.cgroup.Freeze(context.WithoutCancel(ctx)))
	for _, t := range held {
		errs = errors.Join(errs, h.detach(t))
	}
	if !h.Paused {
		errs = errors.Join(errs, h.cgroup.Thaw(context.WithoutCancel(ctx)))
	}
	return errs
}

func (h *Halt) detach(t *tracee.Thread) error {
	err := t.Detach(0)
	if !errors.Is(err, tracee.ErrGone) {
		return err
	}
	if !task.Ended(t.Tid) {
		h.limbo[t.Tid] = t // not stopped, so it cannot be let go; it is when we end
	}
	return nil
}

// Forget drops the threads without a word to them: they are gone.
func (h *Halt) Forget() {
	for _, l := range h.Live {
		_ = l.Close()
	}
	h.Held, h.Live, h.Stopped = map[int]*tracee.Thread{}, map[int]*tracee.Live{}, map[int]unix.Signal{}
}

// Recover lets a container go that a coordinator has left frozen when it died.
// A plain thaw would do but for the calls that end with EINTR.
func Recover(paths map[string]string, paused bool) error {
	h, err := New(paths, paused)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), cgroupfreeze.DefaultTimeout)
	defer cancel()
	err = h.Stop(ctx)
	return errors.Join(err, h.Release(ctx))
}
