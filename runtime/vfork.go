package runtime

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Threads that wait in vfork(2) for their child. Saved, they are read out of the
// kernel (task/vfork.go). Restored, the wait is real again: the thread clones its
// child as the very last thing that it does, and is let go within that call.
//
// By then it has its own credentials, and may be nobody who can choose a pid. A
// hand, a further thread of its process that keeps all rights, does for it what
// must come around that call: it sets the number of the next pid before, and
// behind it closes the files that the child had to inherit, and goes.

// readWaiting reads the threads that wait in vfork.
func (k *checkpoint) readWaiting() (err error) {
	if len(k.halt.Waiting) == 0 {
		return nil
	}
	var tids []int
	for tid := range k.halt.Waiting {
		tids = append(tids, tid)
	}
	if k.waiting, err = bpf.VforkParents(tids); err != nil {
		return err
	}
	for _, p := range k.census.procs {
		for _, tid := range p.tids {
			if _, ok := k.halt.Waiting[tid]; !ok {
				continue
			}
			if err := k.checkVforked(p, tid, k.waiting[tid].Child); err != nil {
				return fail.In(p.name(), fail.On(fmt.Sprintf("thread (host %d)", tid), err))
			}
		}
	}
	return nil
}

// checkVforked refuses the child of a thread that waits in vfork if it is more
// than one on its way to execve.
func (k *checkpoint) checkVforked(parent *process, tid, child int) error {
	n := k.census
	const remedy = "try again when it has called execve(2)"
	i := slices.IndexFunc(n.procs, func(p *process) bool { return p.tgid == child })
	if i < 0 || n.procs[i].status[0].PPid != parent.pid {
		return fail.Refuse("", "the child that it waits for in vfork(2) is not its own or not in the container", remedy)
	}
	c := n.procs[i]
	if k.c.pidDepth != len(parent.status[0].NSpid) || len(c.status[0].NSpid) != k.c.pidDepth {
		return fail.Refuse("", "it waits in vfork(2) in a pid namespace of its own", remedy)
	}
	if !parent.place.Of(tid).Same(c.place) {
		return fail.Refuse("", fmt.Sprintf("its child %s, for which it waits in vfork(2), is in other namespaces", c.name()), remedy)
	}
	if _, own := n.sharing.table[tid]; own && tid != parent.pid {
		return fail.Refuse("", "it waits in vfork(2) with a descriptor table of its own", remedy)
	}
	for _, p := range n.procs {
		s := p.status[0]
		if p != c && (s.PPid == c.pid || k.c.level(s.NSpgid) == c.inner || k.c.level(s.NSsid) == c.inner) {
			return fail.Refuse("", fmt.Sprintf("its child %s, for which it waits in vfork(2), has a child or a process group of its own", c.name()), remedy)
		}
		for _, of := range []map[int]int{n.sharing.table, n.sharing.place, n.sharing.hand} {
			if p != c && p != parent && representative(of, p.pid) == representative(of, c.pid) {
				return fail.Refuse("", fmt.Sprintf("its child %s, for which it waits in vfork(2), shares tables with others", c.name()), remedy)
			}
		}
	}
	return nil
}

// waitingThread is what is known of a thread that waits in vfork. Children are
// collected before their parents.
func (k *checkpoint) waitingThread(tid int) (*task.Waiting, error) {
	w, ok := k.waiting[tid]
	if !ok {
		return nil, fmt.Errorf("thread %d appeared while everything was stopped", tid)
	}
	i := slices.IndexFunc(k.census.procs, func(p *process) bool { return p.tgid == w.Child })
	return &task.Waiting{VforkParent: w, Child: k.census.procs[i].state.Task}, nil
}

// vforked gives, for each process that a thread waits for in vfork, its parent.
func vforked(tasks []*image.Task) map[int32]*image.Task {
	out := map[int32]*image.Task{}
	for _, t := range tasks {
		for i := range t.Threads {
			if child := t.Threads[i].Vfork; child != 0 {
				out[child] = t
			}
		}
	}
	return out
}

// vforks says that a thread of the task waits in vfork.
func vforks(t *image.Task) bool {
	return slices.ContainsFunc(t.Threads, func(th image.Thread) bool { return th.Vfork != 0 })
}

// hand is a thread that does for those that wait in vfork what they cannot.
type hand struct {
	*tracee.Stub
	lastPid int // descriptor of ns_last_pid
}

// newHand clones a hand for a task. It chooses the pids of vforked children by
// ns_last_pid. The container's own /proc/sys may be read-only; which namespace
// is meant depends on who writes (pid_ns_ctl_handler in kernel/pid_namespace.c),
// not on where the file is from.
func (r *restore) newHand(leader *tracee.Stub) (*hand, error) {
	var b tracee.Batch
	task.CloneThread(&b, []int32{r.unusedID()}, unix.CLONE_FILES|unix.CLONE_FS)
	cloned, err := leader.Run(&b)
	if err != nil {
		return nil, err
	}
	h := &hand{}
	if h.Stub, err = leader.NewChild(leader.Pid, cloned[0]); err != nil {
		return nil, err
	}
	f, err := os.OpenFile("/proc/sys/kernel/ns_last_pid", os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h.lastPid, err = r.maker.Keep(h.Stub, f)
	return h, err
}

// nextPid chooses the pid of the next process.
func (h *hand) nextPid(pid int32) error {
	var b tracee.Batch
	text := fmt.Sprint(pid - 1)
	b.Add(unix.SYS_WRITE, tracee.W(h.lastPid), b.String(text), tracee.W(len(text)))
	_, err := h.Run(&b)
	return err
}

// unusedID is a number that no task, group or session of the image has.
func (r *restore) unusedID() int32 {
	used := map[int32]bool{}
	for i := range r.head.Tree.Processes {
		p := &r.head.Tree.Processes[i]
		for _, id := range append([]int32{p.Pid, p.Pgid, p.Sid}, p.Threads...) {
			used[id] = true
		}
	}
	id := int32(2)
	for used[id] {
		id++
	}
	return id
}

// vfork makes the threads of a task that wait in vfork do so, and restores their
// children.
func (r *restore) vfork(t *image.Task, threads []*tracee.Stub, h *hand) error {
	var children []*image.Task
	for i := range t.Threads {
		child := r.head.Task(t.Threads[i].Vfork)
		if child == nil {
			continue
		}
		if err := r.vforkOne(t, i, threads[i], child, h); err != nil {
			return fail.On(fmt.Sprintf("thread %d", t.Threads[i].Tid), err)
		}
		children = append(children, child)
	}
	if err := r.dismissHand(t, h); err != nil {
		return err
	}
	for _, c := range children {
		if err := r.finishVforked(t, c); err != nil {
			return fail.In(fmt.Sprintf("task %d", c.Pid), err)
		}
	}
	return nil
}

func (r *restore) vforkOne(t *image.Task, i int, s *tracee.Stub, child *image.Task, h *hand) error {
	if err := h.nextPid(child.Pid); err != nil {
		return err
	}
	var shared forest.Tables
	for table, same := range map[forest.Table]bool{
		forest.Files: child.Files == t.Files, forest.FS: child.FS == t.FS, forest.Sighand: child.Sighand == t.Sighand,
		forest.SemUndo: child.Threads[0].SemUndo != 0 && child.Threads[0].SemUndo == t.Threads[i].SemUndo,
	} {
		if same {
			shared.Add(table)
		}
	}
	host, err := task.CloneVforked(s, child.ExitSignal, cloneFlags(shared))
	if err != nil {
		return err
	}
	c, err := s.NewChild(host, host)
	if err != nil {
		return err
	}
	status, err := task.ReadStatus(host)
	if err != nil {
		return err
	}
	if got := task.Innermost(status.NSpid); got != int(child.Pid) {
		return fmt.Errorf("its vforked child got pid %d instead of %d (is something else in the container's pid namespace?)", got, child.Pid)
	}
	r.stubs[int(child.Pid)] = c
	regs, err := tracee.DecodeRegs(t.Threads[i].Regs)
	if err != nil {
		return err
	}
	return task.RestoreRegisters(s, &t.Threads[i], regs)
}

// dismissHand does the last things for a process and lets its hand go.
func (r *restore) dismissHand(t *image.Task, h *hand) error {
	var b tracee.Batch
	r.completeTables(&b, t)
	if _, err := h.Run(&b); err != nil {
		return err
	}
	if r.users.done(t.Sighand) {
		if err := task.RestoreTrap(h.Stub, r.head.Sighand(t.Sighand)); err != nil {
			return err
		}
	}
	r.users.done(t.MM) // its children are in it, and unmap the service area
	return h.Leave()
}

// finishVforked restores a child for which its parent now waits.
func (r *restore) finishVforked(parent, t *image.Task) error {
	s := r.stubs[int(t.Pid)]
	var b tracee.Batch
	p, up := r.process(t.Pid), r.process(parent.Pid)
	switch {
	case p.Sid == p.Pid:
		b.Add(unix.SYS_SETSID)
	case p.Pgid != up.Pgid:
		b.Add(unix.SYS_SETPGID, tracee.W(0), tracee.W(p.Pgid))
	}
	if _, err := s.Run(&b); err != nil {
		return err
	}
	if r.users.first(t.Files, "rebuild") {
		if err := r.maker.OwnTable(s, r.head.Files(t.Files)); err != nil {
			return err
		}
	}
	// Its parent, in vfork(2), can be told nothing yet.
	if _, err := task.RestoreJob(s, nil, 0, t); err != nil {
		return err
	}
	return r.finishTask(t, s)
}

// heldByVforked is what a process holds that has come to be by vfork: its
// parent's rights and filters.
func heldByVforked(parent, t *image.Task) task.Held {
	i := slices.IndexFunc(parent.Threads, func(th image.Thread) bool { return th.Vfork == t.Pid })
	from := &parent.Threads[i]
	held := task.Held{Capabilities: from.Creds.Permitted, Credentials: &from.Creds}
	for _, f := range from.Seccomp {
		held.Filters = append(held.Filters, f.Program)
	}
	return held
}

func (r *restore) process(pid int32) *image.Process {
	i := slices.IndexFunc(r.head.Tree.Processes, func(p image.Process) bool { return p.Pid == pid })
	return &r.head.Tree.Processes[i]
}
