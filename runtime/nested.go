package runtime

import (
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// nestingOf is what forest must know of the namespaces that tasks have made.
func nestingOf(t *image.Tree, reserved []int) forest.Nesting {
	n := forest.Nesting{Reserved: reserved, Places: map[int]forest.Place{}, Gone: map[int]forest.Place{}}
	parents, nested := map[image.Ref]image.Ref{}, map[image.Ref]bool{}
	inside := func(ref image.Ref) int { // 0 for the container's own
		if nested[ref] {
			return int(ref)
		}
		return 0
	}
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		nested[ns.Ref], parents[ns.Ref] = true, ns.Parent
		n.Namespaces = append(n.Namespaces, forest.Namespace{ID: int(ns.Ref), Type: ns.Type, Owner: inside(ns.Owner), Parent: inside(ns.Parent)})
	}
	for i := range t.Processes {
		p := &t.Processes[i]
		if len(p.Namespaces)+len(p.Children)+len(p.Apart) > 0 {
			n.Places[int(p.Pid)] = placeOf(p)
		}
	}
	for i := range t.Processes {
		p := &t.Processes[i]
		if p.Inner == nil {
			continue
		}
		noteGone(&n, t, p, p.Pgid, p.Inner.Pgid, parents)
		noteGone(&n, t, p, p.Sid, p.Inner.Sid, parents)
	}
	return n
}

func placeOf(p *image.Process) (out forest.Place) {
	out.In, out.Children = ints(p.Namespaces), ints(p.Children)
	if p.Inner != nil {
		out.IDs = ints(p.Inner.Threads[0])
	}
	for i, tid := range p.Threads {
		ids := []int{int(tid)}
		if p.Inner != nil {
			ids = append(ids, ints(p.Inner.Threads[i])...)
		}
		if i > 0 {
			out.Threads = append(out.Threads, ids)
		}
		if a := p.ThreadApart(tid); a != nil {
			out.Apart = append(out.Apart, forest.Apart{Thread: i, In: ints(a.Namespaces), Children: ints(a.Children)})
		}
	}
	return out
}

// noteGone notes where the leader of a session or group was, as its member's
// numbers of it tell. It does no harm for a leader that is there.
func noteGone(n *forest.Nesting, t *image.Tree, p *image.Process, leader int32, inner []int32, parents map[image.Ref]image.Ref) {
	depth := 0
	for depth < len(inner) && inner[depth] != 0 {
		depth++
	}
	space := image.Ref(0)
	for _, ref := range p.Namespaces {
		if _, ok := parents[ref]; ok && typeOf(t, ref) == "pid" {
			space = ref
		}
	}
	if depth == 0 || space == 0 {
		return
	}
	for range len(inner) - depth {
		space = parents[space]
	}
	n.Gone[int(leader)] = forest.Place{In: []int{int(space)}, IDs: ints(inner[:depth])}
}

func typeOf(t *image.Tree, ref image.Ref) string {
	for i := range t.Namespaces {
		if t.Namespaces[i].Ref == ref {
			return t.Namespaces[i].Type
		}
	}
	return ""
}

func ints[T ~int32 | ~uint32](list []T) []int {
	out := make([]int, len(list))
	for i, v := range list {
		out[i] = int(v)
	}
	return out
}

// plan is the whole history that grows a tree: processes, and who makes and
// enters which namespace.
func plan(t *image.Tree, all []forest.Process, reserved []int) (*forest.Plan, error) {
	p, err := forest.Grow(all, reserved)
	if err != nil || len(t.Namespaces) == 0 {
		return p, err
	}
	return forest.Nest(p, all, nestingOf(t, reserved))
}

// oneIdentity refuses a process in a user namespace of its own whose threads, or
// whose file system ids, are somebody else than its leader: ids are set before a
// stub enters that namespace, and there is one stub then.
func oneIdentity(p *process, threads []image.Thread) error {
	if p.place.User == nil {
		return nil
	}
	leader := &threads[0].Creds
	for i := range threads {
		c := &threads[i].Creds
		if c.UID != leader.UID || c.GID != leader.GID || c.UID[1] != c.UID[3] || c.GID[1] != c.GID[3] {
			return fail.Refuse(fmt.Sprintf("thread %d", threads[i].Tid), "it has ids of its own in a user namespace that a task has made; that is not supported yet", "")
		}
	}
	return nil
}

// nestedStep carries out a step that has to do with namespaces of tasks.
func (r *restore) nestedStep(ctx context.Context, step forest.Step) error {
	s := r.stubs[step.Pid]
	if s == nil {
		return fmt.Errorf("step %q of a process that is not there", step)
	}
	stub := func(pid int) *tracee.Stub { return r.stubs[pid] }
	switch step.Op {
	case forest.Fork:
		if err := r.beforeFork(ctx, step.Pid); err != nil {
			return err
		}
		host, err := r.nested.Fork(s, step, cloneFlags(step.Tables), r.exitSignal(step.Child), stub)
		if err != nil {
			return err
		}
		child, err := s.NewChild(host, host)
		if err != nil {
			return err
		}
		r.stubs[step.Child] = child
		r.lending.forked(step.Pid, step.Child)
		if err := r.checkNumbers(step, host); err != nil {
			return err
		}
		return r.nested.Born(s, child, step)
	case forest.Setpgid:
		var b tracee.Batch
		b.Add(unix.SYS_SETPGID, tracee.W(0), tracee.W(step.Nested.Group))
		_, err := s.Run(&b)
		return err
	case forest.EnterUser:
		return r.nested.Enter(s, step)
	case forest.Unshare:
		return r.nested.Unshare(s, step, r.stubs[step.Nested.Via])
	case forest.Join:
		return r.nested.Join(s, step)
	case forest.Thread:
		r.hinted[step.Pid] = append(r.hinted[step.Pid], step)
		return nil
	case forest.Part:
		return r.openPart(s, step)
	}
	return fmt.Errorf("step %q is not known", step)
}

// checkNumbers makes sure that the kernel chose the ids that it was to choose:
// somebody else may have forked meanwhile (runc exec).
func (r *restore) checkNumbers(step forest.Step, host int) error {
	if len(step.Nested.Hints) == 0 {
		return nil
	}
	status, err := task.ReadStatus(host)
	if err != nil {
		return err
	}
	at := len(status.NSpid) - len(step.Nested.IDs)
	for _, h := range step.Nested.Hints {
		if at--; at < 0 || status.NSpid[at] != h.Next {
			return &fail.Error{
				Cause:  fmt.Errorf("task %d got the pids %v: something else in the container's pid namespace was made meanwhile", step.Child, status.NSpid),
				Remedy: "try again",
			}
		}
	}
	return nil
}

// prepareNesting gives the stubs what it takes to make nested namespaces.
func (r *restore) prepareNesting() error {
	if len(r.head.Tree.Namespaces) == 0 {
		return nil
	}
	var err error
	r.nested.Proc, r.nested.LastPid, err = r.maker.KeepProc()
	return err
}

// asItself is a task's record with the ids that the task itself has: those of
// its own pid namespace.
func (r *restore) asItself(t *image.Task) *image.Task {
	p := r.head.Process(t.Pid)
	own := *t
	if r.nested.User(int(t.Pid)) != 0 && own.Dumpable > 1 {
		own.Dumpable = 0 // the closest to what only the kernel sets
	}
	if p == nil || p.Inner == nil {
		return &own
	}
	own.Threads = append([]image.Thread{}, t.Threads...)
	for i, ids := range p.Inner.Threads {
		own.Threads[i].Tid = ids[len(ids)-1]
	}
	own.Pid = own.Threads[0].Tid
	return &own
}

// threadIDs are the ids of thread i of a task in each pid namespace, its
// innermost first.
func (r *restore) threadIDs(t *image.Task, i int) []int32 {
	tids := []int32{t.Threads[i].Tid}
	if p := r.head.Process(t.Pid); p.Inner != nil {
		for _, id := range p.Inner.Threads[i] {
			tids = append([]int32{id}, tids...)
		}
	}
	return tids
}

// hintThread prepares the clone of thread i of a task that cannot choose all its
// ids, and returns those that it can.
func (r *restore) hintThread(t *image.Task, i int) (ids []int32, err error) {
	for _, step := range r.hinted[int(t.Pid)] {
		if step.Child == i {
			return r.nested.Hint(step, func(pid int) *tracee.Stub { return r.stubs[pid] })
		}
	}
	return r.threadIDs(t, i), nil
}

// checkThread is checkNumbers for a thread.
func (r *restore) checkThread(t *image.Task, i, host int) error {
	for _, step := range r.hinted[int(t.Pid)] {
		if step.Child == i {
			return r.checkNumbers(step, host)
		}
	}
	return nil
}

// finishWritersLast orders tasks so that the ones which choose ids for others'
// threads come behind these: a finished task can make no more calls. Who chooses
// was forked first.
func (r *restore) finishWritersLast() {
	if len(r.hinted) == 0 {
		return
	}
	slices.SortStableFunc(r.head.Tasks, func(a, b *image.Task) int { return r.forked[int(b.Pid)] - r.forked[int(a.Pid)] })
}

// restoreNames gives the container the names that it had given itself. Its bundle
// and state go on saying what it was started with.
func (r *restore) restoreNames() error {
	n := r.head.Container.UTS
	if n == nil {
		return nil
	}
	what := fmt.Sprintf("host name %s (domain %s)", n.Hostname, n.Domainname)
	if !r.made.owns(configs.NEWUTS) {
		return fail.Refuse(what, "the container has given itself that, and the bundle gives it no uts namespace of its own", "restore with the bundle of the checkpoint")
	}
	if !r.made.grants.has(unix.CAP_SYS_ADMIN) {
		return fail.Refuse(what, "the container has given itself that, which takes CAP_SYS_ADMIN, and the bundle does not give it", "add it to the bundle's bounding set if names may be changed")
	}
	_, err := r.maker.AsBundle(func(b *tracee.Batch) { namespace.SetUTS(b, n) })
	return fail.On(what, err)
}
