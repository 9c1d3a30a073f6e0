package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	// stopTries and stopPause bound the waiting for tasks that nobody can stop:
	// a parent in vfork(2), until its child has called execve(2).
	stopTries = 50
	stopPause = 2 * time.Millisecond
	// stopLimit is how long a thawed thread may take to its ptrace stop.
	stopLimit = time.Second
	// vforkLimit is how long it may take while there may be a vfork parent
	// among them, which never gets there.
	vforkLimit = 50 * time.Millisecond
)

// stop brings every thread of the container to rest in a ptrace stop. The
// cgroup is frozen first, so that no fork escapes while the threads are
// seized; a frozen v1 task reaches its stop only when thawed, and before it
// runs any code of its own.
func (k *checkpoint) stop(ctx context.Context) error {
	if err := k.liftQuota(); err != nil {
		return err
	}
	path, value := k.c.cgroup.ThawWrite()
	if k.c.record.Paused {
		path, value = k.c.cgroup.FreezeWrite()
	}
	var err error
	if k.thaw, err = k.guard.Promise(guardian.Write(path, value)); err != nil {
		return err
	}
	k.stopped = time.Now()
	for try := 1; ; try++ {
		err := k.tryStop(ctx)
		if !errors.Is(err, tracee.ErrNoStop) || try == stopTries || ctx.Err() != nil {
			return k.explainStop(err)
		}
		if err := k.letGo(ctx); err != nil {
			return err
		}
		time.Sleep(stopPause * time.Duration(try))
	}
}

// liftQuota takes the cpu quota off for as long as the container is stopped:
// tasks out of quota neither freeze nor make our calls in time.
func (k *checkpoint) liftQuota() error {
	limits, err := k.c.cgroup.Quota()
	if err != nil {
		return err
	}
	for _, l := range limits {
		entry, err := k.guard.Promise(guardian.Write(l.Path, l.Value))
		if err != nil {
			return err
		}
		k.quota = append(k.quota, lifted{entry, l})
		if err := os.WriteFile(l.Path, []byte(l.Lifted), 0); err != nil {
			return fmt.Errorf("lift the cpu quota: %w", err)
		}
	}
	return nil
}

func (k *checkpoint) restoreQuota() error {
	var errs error
	for _, q := range k.quota {
		err := os.WriteFile(q.limit.Path, []byte(q.limit.Value), 0)
		if err == nil {
			err = k.guard.Strike(q.entry)
		}
		errs = errors.Join(errs, err)
	}
	k.quota = nil
	return errs
}

func (k *checkpoint) tryStop(ctx context.Context) error {
	if err := fault.Point("checkpoint.freeze"); err != nil {
		return err
	}
	if err := k.c.cgroup.Freeze(ctx); err != nil {
		return err
	}
	for {
		fresh, err := k.seizeNew()
		if err != nil {
			return err
		}
		if len(fresh) == 0 {
			break
		}
		if err := k.c.cgroup.Thaw(ctx); err != nil {
			return err
		}
		if err := k.await(fresh); err != nil {
			return err
		}
	}
	return k.settle()
}

// seizeNew seizes and interrupts every thread of the cgroup that is not yet
// ours. A second round finds those that were brought in (runc exec) meanwhile.
func (k *checkpoint) seizeNew() (fresh []*tracee.Thread, err error) {
	pids, err := k.c.cgroup.Processes()
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
			if k.held[tid] != nil {
				continue
			}
			t, err := tracee.Seize(pid, tid, tracee.LiveOptions)
			if errors.Is(err, tracee.ErrGone) || err != nil && isZombie(tid) {
				continue
			}
			if err != nil {
				return nil, fail.In(fmt.Sprintf("task (host %d)", tid), err)
			}
			k.held[tid] = t
			fresh = append(fresh, t)
			if err := t.Interrupt(); err != nil {
				return nil, err
			}
		}
	}
	return fresh, nil
}

func isZombie(tid int) bool {
	s, err := task.ReadStatus(tid)
	return err != nil || s.State == 'Z' || s.State == 'X'
}

// await waits for the stops. A thread that has died meanwhile is let go.
func (k *checkpoint) await(threads []*tracee.Thread) error {
	limit := stopLimit
	if k.mayVfork {
		limit = vforkLimit
	}
	for _, t := range threads {
		err := t.WaitInterrupt(limit)
		if errors.Is(err, tracee.ErrGone) {
			delete(k.held, t.Tid)
			_ = t.Reap()
			continue
		}
		if errors.Is(err, tracee.ErrNoStop) {
			k.mayVfork = true
			k.culprit = t
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// settle lets threads finish that are still restoring themselves from an
// ocickpt that was killed.
func (k *checkpoint) settle() error {
	byPid := map[int][]*tracee.Thread{}
	for _, t := range k.held {
		byPid[t.Pid] = append(byPid[t.Pid], t)
	}
	for pid, threads := range byPid {
		live, err := tracee.NewLive(pid)
		if err != nil {
			return fail.In(fmt.Sprintf("task (host %d)", pid), err)
		}
		k.live[pid] = live
		for _, t := range threads {
			if err := live.Settle(t, stopLimit); err != nil {
				return fail.In(fmt.Sprintf("task (host %d)", pid), err)
			}
		}
	}
	return nil
}

func (k *checkpoint) explainStop(err error) error {
	if err == nil || k.culprit == nil || !errors.Is(err, tracee.ErrNoStop) {
		return err
	}
	comm, _ := task.Comm(k.culprit.Tid)
	status, statusErr := task.ReadStatus(k.culprit.Tid)
	inner := 0
	if statusErr == nil {
		inner = task.Innermost(status.NSpid)
	}
	return fail.In(task.Name(inner, k.culprit.Tid, comm), &fail.Error{
		Cause:  errors.New("it cannot be stopped: it waits in vfork(2) for a child that has not called execve(2)"),
		Remedy: "try again when that child has",
	})
}

// letGo lets everything run on as it was, in one act: detached while the
// cgroup is frozen, the tasks all start with the thaw. A container that its
// engine had paused stays frozen.
func (k *checkpoint) letGo(ctx context.Context) error {
	errs := k.c.cgroup.Freeze(ctx)
	for _, t := range k.held {
		if err := t.Detach(0); err != nil && !errors.Is(err, tracee.ErrGone) {
			errs = errors.Join(errs, err)
		}
	}
	k.held = map[int]*tracee.Thread{}
	k.closeLive()
	if !k.c.record.Paused {
		errs = errors.Join(errs, k.c.cgroup.Thaw(ctx))
	}
	return errs
}

func (k *checkpoint) closeLive() {
	for _, l := range k.live {
		_ = l.Close()
	}
	k.live = map[int]*tracee.Live{}
}
