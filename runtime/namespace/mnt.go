package namespace

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// mnt is a set of mounts of its own (mount_namespaces(7)). It is made as a copy of
// the container's; package mount knows what is different in it, and the runtime
// makes that when all tasks are where they belong, for a /proc shows the pid
// namespace of the task that mounts it.
var mnt = kind{
	name: "mnt", flag: unix.CLONE_NEWNS,
	read: func(s *Set, n *Namespace) error {
		set, err := s.Mounts.Nested(mount.Nested{
			Pid: n.pids[0], Foreign: n.owner != nil,
			Shows: func(inode uint64) error { return s.shows(n, inode) },
		}, s.mounted)
		if err != nil {
			return err
		}
		s.mounted = append(s.mounted, set)
		n.Record.Mounts, n.spaces = set.Mounts, set.Spaces
		n.view = &View{Set: set, Ref: &n.Record.Ref}
		return n.checkLocked(s)
	},
}

// shows refuses a /proc of a pid namespace that no task is left to mount it from.
func (s *Set) shows(n *Namespace, inode uint64) error {
	space := (*Namespace)(nil)
	if inode != s.Own["pid"] {
		if space = s.byInode[inode]; space == nil {
			return fail.Refuse("", "the pid namespace that it shows is not the container's", "unmount it before the checkpoint")
		}
	}
	if !slices.Contains(n.mounters, mounter{space, n.owner}) {
		return fail.Refuse("", "no task is left that could mount it: one of the pid namespace that it shows, in the user namespace that owns this one", "")
	}
	return nil
}

// checkLocked refuses mounts that a namespace has got from one of an outer user
// namespace: the kernel has locked them, and they could be unmounted after they
// have been made anew.
func (n *Namespace) checkLocked(s *Set) error {
	for _, o := range s.list {
		if o == n || o.view == nil || o.owner == nil || !n.within(o.owner) {
			continue
		}
		if m := n.view.Set.Inherited(o.view.Set); m != nil {
			return fail.Refuse("mount "+m.Point, "it comes from the mount namespace of an outer user namespace, and is locked (MNT_LOCKED, mount_namespaces(7)); that is not supported yet", "")
		}
	}
	return nil
}

// within reports a namespace whose owner lies in another user namespace.
func (n *Namespace) within(outer *Namespace) bool {
	for u := n.owner; u != nil; u = u.owner {
		if u == outer && u != n.owner {
			return true
		}
	}
	return false
}

// View is how a mount namespace is looked into from outside.
type View struct {
	*mount.Set
	Ref *image.Ref // known once the tree is written; nil for the container's own
}

// View is that of the mount namespace that a process is in, nil for the
// container's own.
func (p *Place) View() *View {
	for _, n := range p.in {
		if n.Record.Type == "mnt" {
			return n.view
		}
	}
	return nil
}

// Views are those of all mount namespaces.
func (s *Set) Views() (all []*View) {
	for _, n := range s.list {
		if n.view != nil {
			all = append(all, n.view)
		}
	}
	return all
}

// Close ends all views.
func (s *Set) Close() {
	for _, m := range s.mounted {
		_ = m.Close()
	}
}

// Mounter is a stub that makes mounts in its namespace, with no more rights than a
// task there has.
type Mounter struct {
	*tracee.Stub
	m  *Maker
	at *stub
	// Up moves a descriptor of the stub out of the way of those of its task, Over
	// gives it to the stub that makes the other mounts.
	Up, Over func(s *tracee.Stub, fd int) (int, error)
}

// AsBundle runs calls with the rights of the container, or of the user namespace
// that the stub is in.
func (x *Mounter) AsBundle(fill func(b *tracee.Batch)) (b *tracee.Batch, err error) {
	b = &tracee.Batch{}
	fill(b)
	return b, x.m.limited(x.at, func() error {
		_, err := x.Run(b)
		return err
	})
}

// AsItself is the same: there is no more in a user namespace.
func (x *Mounter) AsItself(fill func(b *tracee.Batch)) (*tracee.Batch, error) {
	return x.AsBundle(fill)
}

// Raise moves a descriptor out of the way.
func (x *Mounter) Raise(fd int) (int, error) { return x.Up(x.Stub, fd) }

// Hand gives a descriptor to the stub that makes the other mounts.
func (x *Mounter) Hand(fd int) (int, error) { return x.Over(x.Stub, fd) }

// Mounter finds a stub in a mount namespace and the user namespace that owns it,
// in a pid namespace (0 for the container's) if it matters; nil for none.
func (m *Maker) Mounter(stubs map[int]*tracee.Stub, n *image.NestedNamespace, matters bool, space image.Ref) *Mounter {
	owner := n.Owner
	if m.Head.Nested(owner) == nil {
		owner = 0
	}
	for i := range m.Head.Tree.Processes {
		p := &m.Head.Tree.Processes[i]
		s := stubs[int(p.Pid)]
		if s == nil || !slices.Contains(p.Namespaces, n.Ref) || m.User(int(p.Pid)) != owner {
			continue
		}
		in := image.Ref(0)
		for _, ref := range p.Namespaces {
			if m.Head.Nested(ref).Type == "pid" {
				in = ref
			}
		}
		if !matters || in == space {
			return &Mounter{Stub: s, m: m, at: m.at(s, int(p.Pid))}
		}
	}
	for pid, s := range stubs { // a keeper, where only threads are to be
		if m.kept[n.Ref] == pid && m.User(pid) == owner && space == 0 {
			return &Mounter{Stub: s, m: m, at: m.at(s, pid)}
		}
	}
	return nil
}
