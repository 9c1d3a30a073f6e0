package runtime

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Threads in other namespaces than their process, as those of Go programs that
// lock a goroutine to its thread and call setns(2) or unshare(2). They enter these
// when all threads have been cloned, through descriptors that the stub of their
// process has opened while the forest grew: whoever was in there may be gone by
// then, or no longer to be looked at.

// part is what a thread is to enter, and where its process has that open.
type part struct {
	forest.Step
	way int
}

// openPart opens the namespace that a step is about.
func (r *restore) openPart(s *tracee.Stub, step forest.Step) error {
	p := part{step, -1}
	if step.Nested.Via != 0 {
		for _, other := range r.parts[step.Pid] {
			if n := other.Nested; n.NS == step.Nested.NS && n.As == step.Nested.As && n.Via != 0 {
				p.way = other.way
			}
		}
	}
	if step.Nested.Via != 0 && p.way < 0 {
		low, err := r.nested.Way(s, step)
		if err != nil {
			return err
		}
		if p.way, err = r.maker.RaiseIn(s, low); err != nil {
			return err
		}
	}
	r.parts[step.Pid] = append(r.parts[step.Pid], p)
	return nil
}

// enterMounts makes a thread that has just been cloned enter its mount namespace:
// the next one may share its place in the file system, and then none of them can
// (EINVAL of setns(2)). It is where its cloner was before.
func (r *restore) enterMounts(t *image.Task, threads []*tracee.Stub, step threadStep) error {
	if step.fresh&unix.CLONE_FS == 0 {
		return nil
	}
	return r.enterParts(t, threads, func(p part) bool { return p.Child == step.thread && p.Nested.As == "mnt" })
}

// partThreads makes threads enter all other namespaces. Those for children of
// theirs come last, for the others may be needed to make them.
func (r *restore) partThreads(t *image.Task, threads []*tracee.Stub) error {
	return r.enterParts(t, threads, func(p part) bool { return p.Nested.As != "mnt" })
}

func (r *restore) enterParts(t *image.Task, threads []*tracee.Stub, which func(part) bool) error {
	for _, p := range r.parts[int(t.Pid)] {
		if !which(p) {
			continue
		}
		tid := t.Threads[p.Child].Tid
		if err := r.nested.Part(threads[p.Child], p.Step, tid, p.way); err != nil {
			return fail.On(fmt.Sprintf("thread %d", tid), err)
		}
	}
	return nil
}

// endKeepers ends the ghosts that have kept namespaces for threads.
func (r *restore) endKeepers() error {
	for _, pid := range r.keepers {
		s := r.stubs[pid]
		delete(r.stubs, pid)
		if err := s.Exit(0); err != nil {
			return err
		}
	}
	return nil
}
