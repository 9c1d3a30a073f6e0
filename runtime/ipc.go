package runtime

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/sysv"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// ipcSpace is an ipc namespace that is saved: the container's own, or one that a
// task has made.
type ipcSpace struct {
	path  string
	inode uint64
	task  string                 // in one that a task has made, for messages
	made  *image.NestedNamespace // nil for the container's own
	*sysv.Set
}

// ref is the reference by which objects name it, known once the tree is written.
func (s *ipcSpace) ref() image.Ref {
	if s.made == nil {
		return 0
	}
	return s.made.Ref
}

// scanIPC reads the System V objects and POSIX message queues of the container
// and of those ipc namespaces that tasks have made.
func (n *census) scanIPC(c *container) error {
	if c.owns("ipc") {
		n.ipc = append(n.ipc, &ipcSpace{path: nsutil.Path(c.initPid, "ipc"), inode: c.inodes["ipc"]})
	}
	for _, made := range n.nested.IPCs() {
		n.ipc = append(n.ipc, &ipcSpace{path: made.Path, inode: made.Inode, task: made.Task, made: made.Record})
	}
	for _, space := range n.ipc {
		if err := n.scanIPCSpace(c, space); err != nil {
			err = goneIs(c.initPid, err)
			if space.made != nil {
				err = fail.In(space.task, fail.On("ipc namespace", err))
			}
			return err
		}
	}
	return nil
}

func (n *census) scanIPCSpace(c *container, space *ipcSpace) error {
	var dir *os.File
	err := nsutil.Inside(space.path, func() (err error) {
		if err = c.readIPCLimits(space.made); err != nil {
			return err
		}
		if space.Set, err = sysv.Scan(c.maps, space.ref); err == nil {
			dir, err = namespace.OpenQueues()
		}
		return err
	})
	if err != nil {
		return err
	}
	defer dir.Close()
	for i, rec := range space.Segments {
		n.shared.SysV(space.inode, rec, space.Attached[i], space.ref)
	}
	return n.files.AddQueues(dir, space.ref)
}

// openUnattached opens the segments that no task has attached, of which the
// memory cannot be had through one.
func (n *census) openUnattached() error {
	if len(n.ipc) > 1 {
		if err := n.shared.CheckAttached(); err != nil {
			return err
		}
	}
	for _, seg := range n.shared.Segments() {
		if !seg.Unattached() {
			continue
		}
		id := seg.Record.SysV.Perm.ID
		space := n.ipc[slices.IndexFunc(n.ipc, func(s *ipcSpace) bool { return s.inode == seg.NS })]
		err := nsutil.Inside(space.path, func() error {
			f, huge, err := sysv.OpenUnattached(id)
			if err == nil {
				seg.Record.HugePage = huge
				n.open = append(n.open, f)
				seg.Through(f)
			}
			return err
		})
		if err != nil {
			return fail.On(fmt.Sprintf("System V shm %d", id), err)
		}
	}
	return nil
}

// semaphores are the sets of semaphores of an ipc namespace.
func (n *census) semaphores(inode uint64) []*image.SemSet {
	for _, space := range n.ipc {
		if space.inode == inode {
			return space.Sets
		}
	}
	return nil
}

// hasSemaphores reports whether there are any.
func (n *census) hasSemaphores() bool {
	return slices.ContainsFunc(n.ipc, func(s *ipcSpace) bool { return len(s.Sets) > 0 })
}

// noteUndo completes the records of semaphores with what tasks have to take back.
func (n *census) noteUndo(l *learned) error {
	if !n.hasSemaphores() {
		return nil
	}
	var adjustments map[int]map[int32]map[int]int16
	asked, seen := false, map[uint32]bool{}
	for _, p := range n.procs {
		for _, tid := range p.tids {
			sets := n.semaphores(p.place.Of(tid).IPC()) // who leaves a namespace leaves its undo list
			list := n.undoList(p, tid)
			if list == 0 || seen[list] || len(sets) == 0 {
				continue
			}
			seen[list] = true
			if !asked {
				adjustments, asked = ask(l, &l.undos, (*bpf.Question).SemUndos), true
			}
			if adjustments == nil {
				return fail.In(p.name(), fail.Refuse("System V sem", "what it has to take back (SEM_UNDO) only BPF can tell, which cannot be used here", "give ocickpt CAP_BPF and CAP_PERFMON, or remove the semaphores (ipcrm)"))
			}
			for _, set := range sets {
				if err := noteAdjustments(set, list, adjustments[tid][set.Perm.ID]); err != nil {
					return fail.In(p.name(), err)
				}
			}
		}
	}
	return nil
}

func noteAdjustments(set *image.SemSet, list uint32, all map[int]int16) error {
	if len(set.Values) > bpf.MaxSemUndo {
		return fail.Refuse(fmt.Sprintf("System V sem %d", set.Perm.ID), fmt.Sprintf("it has %d semaphores; of sets with more than %d it cannot be told what tasks have to take back (SEM_UNDO)", len(set.Values), bpf.MaxSemUndo), "use smaller sets")
	}
	for number, by := range all {
		if number < len(set.Values) {
			set.Undo = append(set.Undo, image.SemUndo{List: list, Number: uint16(number), Adjust: by})
		}
	}
	slices.SortFunc(set.Undo, func(a, b image.SemUndo) int {
		return cmp.Or(cmp.Compare(a.List, b.List), cmp.Compare(a.Number, b.Number))
	})
	return nil
}

// makeIPC makes the System V objects of the container's own ipc namespace, which
// must be the new container's alone.
func (r *restore) makeIPC() error {
	refs := file.Refs(r.head)
	r.ipc = map[image.Ref]*sysv.Maker{0: sysv.NewMaker(r.head, 0, refs)}
	for i := range r.head.Tree.Namespaces {
		if n := &r.head.Tree.Namespaces[i]; n.Type == "ipc" {
			r.ipc[n.Ref] = sysv.NewMaker(r.head, n.Ref, refs)
		}
	}
	limits := r.head.Container.IPC
	if !r.ipc[0].Needed() && len(limits) == 0 {
		return nil
	}
	if !r.made.owns(configs.NEWIPC) {
		return fail.Refuse("System V ipc", "the bundle gives the container no ipc namespace of its own", "restore with the bundle of the checkpoint")
	}
	ns := nsutil.Path(r.made.stub.Pid, "ipc")
	if err := r.raiseIPCLimits(ns, nil, limits); err != nil {
		return err
	}
	return r.makeObjects(r.ipc[0], ns, r.maker)
}

// makeObjects makes the System V objects of the ipc namespace at path by a stub.
func (r *restore) makeObjects(m *sysv.Maker, path string, stub sysv.Stub) error {
	err := nsutil.Inside(path, func() (err error) {
		m.MaxBytes, err = sysv.LongestQueue()
		return err
	})
	if err != nil {
		return err
	}
	if r.made.grants.has(unix.CAP_SYS_RESOURCE) {
		m.MaxBytes = math.MaxUint64
	}
	m.Choose = func(kind string, id int32) error {
		return nsutil.Inside(path, func() error { return sysv.ChooseHere(kind, id) })
	}
	m.Stub = stub
	return m.Make()
}

// visitor is the init stub on visits to an ipc namespace that a task has made.
type visitor struct {
	*file.Maker
	visit *namespace.Visit
}

// AsItself runs calls there with all rights of a stub.
func (v visitor) AsItself(fill func(b *tracee.Batch)) (*tracee.Batch, error) {
	return v.Maker.AsItself(func(b *tracee.Batch) { v.visit.Calls(b, func() { fill(b) }) })
}

// makeNestedIPC makes what is in the ipc namespaces that tasks have made, when
// these exist. The init stub does it, for which ids are what the image calls them,
// and which is there until all contents are in.
func (r *restore) makeNestedIPC() error {
	for i := range r.head.Tree.Namespaces {
		n := &r.head.Tree.Namespaces[i]
		if n.Type != "ipc" || !r.ipc[n.Ref].Needed() && !r.maker.HasQueues(n.Ref) && len(n.IPC) == 0 {
			continue
		}
		if err := r.fillIPC(n); err != nil {
			return fail.On(fmt.Sprintf("ipc namespace #%d", n.Ref), err)
		}
	}
	return nil
}

func (r *restore) fillIPC(n *image.NestedNamespace) error {
	there, err := r.openNested(n)
	if err != nil {
		return err
	}
	r.spaces[n.Ref] = there // for its limits at the end
	path := fmt.Sprintf("/proc/self/fd/%d", there.Fd())
	if err := r.raiseIPCLimits(path, n, n.IPC); err != nil {
		return err
	}
	visit := &namespace.Visit{}
	if visit.There, err = r.maker.Keep(r.made.stub, there); err != nil {
		return err
	}
	back, err := os.Open(nsutil.Path(r.made.stub.Pid, "ipc"))
	if err != nil {
		return err
	}
	defer back.Close()
	if visit.Back, err = r.maker.Keep(r.made.stub, back); err != nil {
		return err
	}
	if err := r.makeObjects(r.ipc[n.Ref], path, visitor{r.maker, visit}); err != nil {
		return err
	}
	if err := r.fillSegments(n.Ref); err != nil {
		return err
	}
	return r.maker.MakeQueues(n.Ref, visit)
}

// openNested opens a namespace that a task has made, by who has made it again.
func (r *restore) openNested(n *image.NestedNamespace) (*os.File, error) {
	pid := r.hostPid(int32(r.nested.Keeper(n.Ref)))
	if pid == 0 {
		return nil, errors.New("nobody is in it")
	}
	return os.Open(nsutil.Path(pid, n.Type))
}

// finishIPC puts messages into the queues, and then gives segments and limits what
// only they can have who hold everything.
func (r *restore) finishIPC() error {
	for _, ref := range slices.Sorted(keys(r.ipc)) {
		if err := r.ipc[ref].Send(); err != nil {
			return err
		}
		if err := r.ipc[ref].Finish(); err != nil {
			return err
		}
	}
	return r.settleIPCLimits()
}

// allowQueues lets the stub make as large POSIX message queues as a task of the
// container may.
func (r *restore) allowQueues() error {
	if !slices.ContainsFunc(file.Refs(r.head), func(ref image.Ref) bool { return r.head.Mqueue(ref) != nil }) {
		return nil
	}
	if r.maker.HasQueues(0) && !r.made.owns(configs.NEWIPC) {
		return fail.Refuse("POSIX message queues", "the bundle gives the container no ipc namespace of its own", "restore with the bundle of the checkpoint")
	}
	hard, err := r.made.grants.hardLimit(unix.RLIMIT_MSGQUEUE)
	if err != nil {
		return err
	}
	if err := unix.Prlimit(r.made.stub.Pid, unix.RLIMIT_MSGQUEUE, &unix.Rlimit{Cur: hard, Max: hard}, nil); err != nil {
		return fmt.Errorf("limit of message queues: %w", err)
	}
	return nil
}

// owns reports a namespace that is the new container's alone.
func (m *made) owns(kind configs.NamespaceType) bool {
	return m.config.Namespaces.Contains(kind) && m.config.Namespaces.PathOf(kind) == ""
}
