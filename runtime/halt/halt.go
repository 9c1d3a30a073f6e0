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
	"slices"
	"time"

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
	limit      = time.Second
	vforkLimit = 10 * time.Millisecond
)

// Halt holds the threads of a container.
type Halt struct {
	Paused bool                   // the engine has frozen the container, and it stays so
	Held   map[int]*tracee.Thread // by host tid
	Live   map[int]*tracee.Live   // by host pid

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
	h := &Halt{Paused: paused, Held: map[int]*tracee.Thread{}, Live: map[int]*tracee.Live{}, limbo: map[int]*tracee.Thread{}}
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
		if !errors.Is(err, tracee.ErrNoStop) || try == tries {
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
	for {
		fresh, err := h.seize()
		if err == nil && !h.stops {
			err = h.cgroup.Thaw(ctx)
		}
		if err != nil {
			return err
		}
		if err := h.await(fresh); err != nil {
			return err
		}
		if h.stops && len(fresh) > 0 {
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
func (h *Halt) seize() (fresh []*tracee.Thread, err error) {
	pids, err := h.cgroup.Processes()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		tids, err := task.Threads(pid)
		if errors.Is(err, tracee.ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, tid := range tids {
			if h.Held[tid] != nil {
				continue
			}
			if t := h.limbo[tid]; t != nil { // still ours, and its stop still asked for
				delete(h.limbo, tid)
				h.Held[tid] = t
				fresh = append(fresh, t)
				continue
			}
			// Seizing waits for a stopped task to notice, which one that is
			// frozen by cgroup v1 cannot.
			if !h.stops && task.JobStopped(tid) {
				return nil, stopped(tid)
			}
			t, err := tracee.Seize(pid, tid, tracee.LiveOptions)
			if errors.Is(err, tracee.ErrGone) || err != nil && task.Ended(tid) {
				continue
			}
			if err != nil {
				return nil, fail.In(fmt.Sprintf("task (host %d)", tid), err)
			}
			h.Held[tid] = t
			fresh = append(fresh, t)
			if err := t.Interrupt(); err != nil && !errors.Is(err, tracee.ErrGone) {
				return nil, err
			}
		}
	}
	return fresh, nil
}

func stopped(tid int) error {
	return fail.In(fmt.Sprintf("task (host %d)", tid),
		fail.Refuse("", "it is stopped by a signal; stopped tasks are not supported yet", "continue it (kill -CONT) before the checkpoint"))
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
		if err == nil {
			err = repair(t)
		}
		if err == nil && t.GroupStopped() {
			err = stopped(t.Tid)
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

// repair makes a thread enter the call again that our interrupt has ended.
func repair(t *tracee.Thread) error {
	r, err := t.Regs()
	if err != nil || !task.EndedByInterrupt(&r) {
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
		live, err := tracee.NewLive(pid)
		if err != nil {
			return fail.In(fmt.Sprintf("task (host %d)", pid), err)
		}
		h.Live[pid] = live
		for _, t := range threads {
			err := live.Settle(t, limit)
			if err == nil {
				err = repair(t) // it ran, and may be in such a call by now
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
	slices.Sort(pids)
	return slices.Compact(pids)
}

// Release lets everything run on as it was, in one act: detached while the
// cgroup is frozen, the tasks all start with the thaw. A container that its
// engine had paused stays frozen.
func (h *Halt) Release(ctx context.Context) error {
	if !h.touched {
		return nil // a freeze and a thaw would not pass unnoticed
	}
	errs := h.cgroup.Freeze(context.WithoutCancel(ctx))
	held := h.Held
	h.Forget()
	for tid, t := range held {
		switch err := t.Detach(0); {
		case errors.Is(err, tracee.ErrGone) && !task.Ended(tid):
			h.limbo[tid] = t // not stopped, so it cannot be let go; it is when we end
		case err != nil && !errors.Is(err, tracee.ErrGone):
			errs = errors.Join(errs, err)
		}
	}
	if !h.Paused {
		errs = errors.Join(errs, h.cgroup.Thaw(context.WithoutCancel(ctx)))
	}
	return errs
}

// Forget drops the threads without a word to them: they are gone.
func (h *Halt) Forget() {
	for _, l := range h.Live {
		_ = l.Close()
	}
	h.Held, h.Live = map[int]*tracee.Thread{}, map[int]*tracee.Live{}
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
