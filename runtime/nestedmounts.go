package runtime

import (
	"errors"
	"os"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// foreign reports the mount of a namespace that another user namespace than the
// container's owns: what it shows that is new is made in there.
func (r *restore) foreign(mnt int) bool {
	for i := range r.head.Tree.Namespaces {
		n := &r.head.Tree.Namespaces[i]
		for j := range n.Mounts {
			if n.Mounts[j].ID == mnt {
				return r.head.Nested(n.Owner) != nil
			}
		}
	}
	return false
}

// makeNestedMounts makes the mounts of namespaces that tasks have made, when all
// tasks are there.
func (r *restore) makeNestedMounts() error {
	asked := false
	for i := range r.head.Tree.Namespaces {
		n := &r.head.Tree.Namespaces[i]
		if n.Type != "mnt" {
			continue
		}
		if err := r.makeMountsOf(n, &asked); err != nil {
			return fail.On("mnt namespace", err)
		}
	}
	return nil
}

// makeMountsOf makes those of one namespace. Asked says that the bundle's filters
// have been asked whether they let anybody mount.
func (r *restore) makeMountsOf(n *image.NestedNamespace, asked *bool) error {
	me := r.mounter(n, false, 0)
	if me == nil {
		return errors.New("no task in it could make its mounts")
	}
	sources, err := r.sourcesFor(me.Stub, n)
	if err != nil {
		return err
	}
	foreign := r.head.Nested(n.Owner) != nil
	m, err := mount.NewNested(me, me.Pid, r.head, n, foreign, sources)
	if err != nil {
		return err
	}
	places := r.maker.Covered()
	if !m.NeededNested(places) {
		return r.removedInside(n, me)
	}
	if !*asked {
		if err := r.mayMount(); err != nil {
			return err
		}
		*asked = true
	}
	m.Other = func(one *image.Mount) mount.Stub {
		if one.FSType != "proc" {
			return nil
		}
		if by := r.mounter(n, true, one.Space); by != nil && by.Pid != me.Pid {
			by.Over = func(s *tracee.Stub, fd int) (int, error) { return r.hand(s, fd, me.Stub) }
			return by
		}
		return nil
	}
	if err := m.PrepareNested(); err != nil {
		return err
	}
	if err := r.fillNested(n, me, m); err != nil {
		return err
	}
	if err := m.Begin(); err != nil {
		return err
	}
	held, err := m.Attach(places)
	if err != nil {
		return err
	}
	r.mounted = append(r.mounted, m)
	if err := r.takeLent(me.Stub, m); err != nil {
		return err
	}
	if err := r.maker.CoverInside(me.Stub, n.Ref, held, r.stubs); err != nil {
		return err
	}
	return r.removedInside(n, me)
}

// removedInside makes files that have lost their names in a mount namespace.
func (r *restore) removedInside(n *image.NestedNamespace, me *namespace.Mounter) error {
	var ids *task.IDMaps
	if owner := r.head.Nested(n.Owner); owner != nil {
		ids = &task.IDMaps{UID: owner.User.UIDMap, GID: owner.User.GIDMap}
	}
	return r.maker.MakeRemovedInside(me.Stub, n.Ref, ids, r.stubs)
}

// mounter is a stub that can mount in a namespace, see namespace.Maker.Mounter.
func (r *restore) mounter(n *image.NestedNamespace, matters bool, space image.Ref) *namespace.Mounter {
	m := r.nested.Mounter(r.stubs, n, matters, space)
	if m != nil {
		m.Up = r.maker.RaiseIn
	}
	return m
}

// hand copies a descriptor from one stub to another.
func (r *restore) hand(from *tracee.Stub, fd int, to *tracee.Stub) (int, error) {
	f, err := from.Take(fd)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return r.maker.Send(to, f)
}

// sourcesFor are the file systems that a namespace shows and others have made, by
// their numbers in a stub.
func (r *restore) sourcesFor(s *tracee.Stub, n *image.NestedNamespace) (map[int]int, error) {
	out := map[int]int{}
	if r.mounts != nil {
		for id, fd := range r.mounts.Sources() {
			out[id] = fd
		}
	}
	for i := range n.Mounts {
		from := n.Mounts[i].From
		if f := r.lent[from]; f != nil && out[from] == 0 {
			fd, err := r.maker.Keep(s, f)
			if err != nil {
				return nil, err
			}
			out[from] = fd
		}
	}
	return out, nil
}

// takeLent keeps the file systems that a namespace has made and others show too.
func (r *restore) takeLent(s *tracee.Stub, m *mount.Maker) error {
	for id, fd := range m.Lent() {
		f, err := s.Take(fd)
		if err != nil {
			return err
		}
		if r.lent == nil {
			r.lent = map[int]*os.File{}
		}
		r.lent[id] = f
	}
	return nil
}

// fillNested gives the file systems in memory that another user namespace owns
// what they held, all but the bytes of files.
func (r *restore) fillNested(n *image.NestedNamespace, me *namespace.Mounter, m *mount.Maker) error {
	owner := r.head.Nested(n.Owner)
	if owner == nil {
		return nil
	}
	inner := task.IDMaps{UID: owner.User.UIDMap, GID: owner.User.GIDMap}
	memory := tmpfs.NewMaker(r.head, me, file.Refs(r.head), inner, func(root *image.Inode) bool { return m.Fills()[int(root.Mnt)] != 0 })
	r.memories = append(r.memories, memory)
	outer, err := readIDMaps(r.made.stub.Pid)
	if err != nil {
		return err
	}
	for ref, root := range memory.Roots() {
		fd := m.Fills()[int(root.Mnt)]
		dir, err := me.Take(fd)
		if err != nil {
			return err
		}
		tree, err := tmpfs.Scan(dir, root.Point, nil, twice{outer, inner}, nil)
		if err != nil {
			return errors.Join(fail.On("tmpfs "+root.Point, err), dir.Close())
		}
		memory.Root(ref, fd, tree, nil)
	}
	return memory.Make()
}

// twice translates ids of the host through the container's user namespace into
// another one's.
type twice [2]task.IDMaps

// User is a uid.
func (t twice) User(host uint32) uint32 { return t[1].User(t[0].User(host)) }

// Group is a gid.
func (t twice) Group(host uint32) uint32 { return t[1].Group(t[0].Group(host)) }
