package mount

import (
	"os"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Nested is a mount namespace that a task of the container has made. One comes
// about as a copy of the container's, so what is recorded is which mounts are such
// copies and how all others were made.
type Nested struct {
	Pid int // of a process in it, on the host
	// Foreign: another user namespace than the container's owns it. Copies are
	// locked in there (mount_namespaces(7)).
	Foreign bool
	// Shows refuses a pid namespace, by its inode, of which no task could mount a
	// /proc in here again.
	Shows func(inode uint64) error
}

// Nested reads the mounts of a mount namespace that a task has made; before are
// the sets of those that are made before it.
func (s *Set) Nested(n Nested, before []*Set) (*Set, error) {
	t := &Set{Env: s.Env, views: map[int]*os.File{}, nested: &n, outer: append([]*Set{s}, before...), Spaces: map[int]uint64{}}
	t.Init = n.Pid
	err := nsutil.Inside("", func() error {
		from, err := enter(n.Pid)
		if err != nil {
			return err
		}
		defer from.Close()
		fd, err := unix.Openat(int(from.Fd()), "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.infos, err = readMounts(fd)
		if err == nil {
			t.Root, err = os.Open("/")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Mounts = Records(t.infos)
	t.findCopies(s)
	err = t.tell(s)
	if err != nil {
		_ = t.Root.Close()
		return nil, err
	}
	return t, nil
}

// tell says how each mount that is no copy is made, and refuses what cannot be.
func (s *Set) tell(base *Set) error {
	if err := s.nestedRecipes(base); err != nil {
		return err
	}
	if err := s.checkMissing(base); err != nil {
		return err
	}
	for i := range s.Mounts {
		m := &s.Mounts[i]
		err := error(nil)
		if m.Own == image.MountCopy {
			err = s.checkCopy(base, m)
		} else {
			err = s.check(m)
		}
		if err != nil {
			return fail.On("mount "+m.Point, err)
		}
	}
	return nil
}

// findCopies marks the mounts that are copies of the container's and still where
// these are.
func (s *Set) findCopies(base *Set) {
	of := map[int]int{} // ids of copies by those of the container
	taken := map[int]bool{}
	for again := true; again; {
		again = false
		for i, b := range base.infos {
			if of[b.ID] != 0 {
				continue
			}
			j := slices.IndexFunc(s.infos, func(m *mountinfo.Info) bool {
				stands := of[b.Parent] == m.Parent || base.byID(b.Parent) == nil && s.byID(m.Parent) == nil
				return !taken[m.ID] && stands && sameMount(m, b) && m.Mountpoint == b.Mountpoint
			})
			if j < 0 {
				continue
			}
			again, of[b.ID], taken[s.infos[j].ID] = true, s.infos[j].ID, true
			s.Mounts[j].Own, s.Mounts[j].From = image.MountCopy, base.Mounts[i].ID
		}
	}
}

// sameMount reports two mounts of the same part of a file system.
func sameMount(a, b *mountinfo.Info) bool {
	return a.Major == b.Major && a.Minor == b.Minor && a.Root == b.Root && a.FSType == b.FSType
}

// pivoted reports a namespace whose root is not the container's.
func (s *Set) pivoted() bool {
	return slices.ContainsFunc(s.Mounts, func(m image.Mount) bool { return m.Own != image.MountCopy && s.byID(m.Parent) == nil })
}

// nestedRecipes tells how each mount that is no copy is made: as a part of what
// the container has mounted, or a namespace before, or a new file system, or a part
// of that.
func (s *Set) nestedRecipes(base *Set) error {
	for i := range s.Mounts {
		m := &s.Mounts[i]
		if m.Own != "" {
			continue
		}
		if from := base.source(s.infos[i], func(o *image.Mount) bool {
			return o.Own == image.MountNew && o.FSType == "tmpfs" || base.visible(o) && (!s.nested.Foreign || base.bare(o, m.Root))
		}); from != nil {
			m.Own, m.From = image.MountBind, from.ID
			continue
		}
		for _, o := range s.outer[1:] {
			if from := o.source(s.infos[i], func(o *image.Mount) bool { return o.Own == image.MountNew }); from != nil {
				m.Own, m.From = image.MountBind, from.ID
			}
		}
	}
	for i := range s.Mounts {
		if s.Mounts[i].Own == "" {
			if err := s.newOrPart(i); err != nil {
				return fail.On("mount "+s.Mounts[i].Point, err)
			}
		}
	}
	return nil
}

// newOrPart makes a mount a new file system if none of the others that show it
// shows more of it, else a part of that.
func (s *Set) newOrPart(i int) error {
	most := i
	for j, o := range s.infos {
		if o.Major == s.infos[i].Major && o.Minor == s.infos[i].Minor && s.Mounts[j].Own != image.MountCopy && within(s.infos[most].Root, o.Root) &&
			(len(o.Root) < len(s.infos[most].Root) || j < most) && (!perNamespace(o.FSType) || o.Source == s.infos[i].Source) {
			most = j
		}
	}
	m := &s.Mounts[i]
	if most != i {
		m.Own, m.From = image.MountBind, s.Mounts[most].ID
		return nil
	}
	for _, o := range s.infos {
		if o.Major == s.infos[i].Major && o.Minor == s.infos[i].Minor && !within(o.Root, m.Root) && !perNamespace(o.FSType) {
			return fail.Refuse("", "nothing that is mounted shows all of the "+m.FSType+" that it is a part of, as "+o.Mountpoint+" is", "unmount one of them before the checkpoint")
		}
	}
	if m.Root != "/" && m.FSType != "tmpfs" && m.FSType != "cgroup" && m.FSType != "cgroup2" {
		return fail.Refuse("", "what this "+m.FSType+" was bound from, "+m.Root+", is not mounted in the container any more, or never was", "unmount it before the checkpoint")
	}
	m.Own = image.MountNew
	return nil
}

// visible reports a mount that its path leads to: nothing stands on it, or on the
// way there.
func (s *Set) visible(m *image.Mount) bool {
	way := map[int]bool{}
	for at := m; at != nil && !way[at.ID]; at = s.byID(at.Parent) {
		way[at.ID] = true
	}
	return !slices.ContainsFunc(s.Mounts, func(c image.Mount) bool {
		return !way[c.ID] && way[c.Parent] && within(m.Point, c.Point)
	})
}

// bare reports a part of a mount on which nothing else stands: where mounts are
// locked, the kernel clones no other part alone (has_locked_children in
// fs/namespace.c).
func (s *Set) bare(m *image.Mount, root string) bool {
	rel, _ := image.Below(root, m.Root)
	at := strings.TrimSuffix(m.Point, "/")
	if rel != "." {
		at += "/" + rel
	}
	return !slices.ContainsFunc(s.Mounts, func(c image.Mount) bool { return c.Parent == m.ID && within(c.Point, at) })
}

// checkMissing refuses a namespace that lacks mounts of the container's which
// cannot be taken away in a copy.
func (s *Set) checkMissing(base *Set) error {
	if s.pivoted() {
		return nil
	}
	has := map[int]*image.Mount{}
	for i := range s.Mounts {
		if m := &s.Mounts[i]; m.Own == image.MountCopy {
			has[m.From] = m
		}
	}
	for i := range base.Mounts {
		b := &base.Mounts[i]
		on := has[b.Parent]
		switch {
		case has[b.ID] != nil || on == nil:
		case s.nested.Foreign:
			return fail.Refuse("mount "+b.Point, "the container has it and this namespace does not, and in a user namespace nobody can unmount a copy (MNT_LOCKED, mount_namespaces(7))", "unmount it in the container before the checkpoint")
		case s.natural(base, on).peers != 0 && s.natural(base, on) == sharingOf(on.Optional):
			return fail.Refuse("mount "+b.Point, "the container has it and this namespace does not, and what it stands on shares events with the container", "make "+on.Point+" private before the checkpoint")
		}
	}
	return nil
}

// natural is how the copy of a mount of the container's hands on events at first:
// as that does, but in another user namespace it is no peer of it and only gets
// its events (copy_mnt_ns in fs/namespace.c).
func (s *Set) natural(base *Set, m *image.Mount) sharing {
	return naturalOf(base.byID(m.From), s.nested.Foreign)
}

func naturalOf(b *image.Mount, foreign bool) sharing {
	is := sharingOf(b.Optional)
	if foreign && is.peers != 0 {
		return sharing{master: is.peers}
	}
	return is
}

// checkCopy refuses a copy whose options or events cannot be made again.
func (s *Set) checkCopy(base *Set, m *image.Mount) error {
	b := base.byID(m.From)
	same := s.natural(base, m) == sharingOf(m.Optional)
	if m.Options == b.Options && same {
		return nil
	}
	if _, err := attributesOf(m.Options); err != nil {
		return err
	}
	if !base.visible(b) {
		return fail.Refuse("", "its options or how it hands on events were changed, and another mount of the container's covers it", "unmount that before the checkpoint")
	}
	return s.checkGroups(m)
}

// checkNested refuses a mount that is no copy for what it stands on.
func (s *Set) checkNested(parent *image.Mount) error {
	base := s.outer[0]
	if parent == nil || parent.Own != image.MountCopy { // it is the root, or stands on what is as new
		return nil
	}
	if !base.visible(base.byID(parent.From)) {
		return fail.Refuse("", "what it stands on is covered by another mount of the container's", "unmount that before the checkpoint")
	}
	if n := s.natural(base, parent); n.peers != 0 && n == sharingOf(parent.Optional) {
		return fail.Refuse("", "what it stands on shares events with the container, which does not have it", "make "+parent.Point+" private before the checkpoint")
	}
	return nil
}

// Inherited is a mount that is no copy of the container's and that another
// namespace, of an outer user namespace, has at the same point; nil for none.
func (s *Set) Inherited(outer *Set) *image.Mount {
	for i := range s.Mounts {
		for j := range outer.Mounts {
			m, o := &s.Mounts[i], &outer.Mounts[j]
			if m.Own != image.MountCopy && o.Own != image.MountCopy && m.Point == o.Point && sameMount(s.infos[i], outer.infos[j]) {
				return m
			}
		}
	}
	return nil
}

// Shares reports whether the container's own mounts show a file system.
func (s *Set) Shares(dev uint64) bool {
	return slices.ContainsFunc(s.outer[0].infos, func(m *mountinfo.Info) bool { return unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == dev })
}

// all are the mounts of the namespace, the container's and those of namespaces
// before it.
func (s *Set) all() (out []image.Mount) {
	out = slices.Clone(s.Mounts)
	for _, o := range s.outer {
		out = append(out, o.Mounts...)
	}
	return out
}

// NewNested prepares to make the mounts of a namespace that a stub has just made,
// or is in, as a copy of the container's. Sources are descriptors, in the stub, of
// file systems that others have made.
func NewNested(stub Stub, pid int, head *image.Head, n *image.NestedNamespace, foreign bool, sources map[int]int) (*Maker, error) {
	have, err := Read(pid)
	if err != nil {
		return nil, err
	}
	m := &Maker{
		stub: stub, head: head, have: have, pid: pid, mounts: n.Mounts, nested: n, foreign: foreign, sources: sources,
		ids:   task.IDMaps{UID: head.Container.UIDMap, GID: head.Container.GIDMap},
		match: map[int]*mountinfo.Info{}, roots: map[int]int{}, fills: map[int]int{}, seals: map[int]int{}, lent: map[int]bool{}, copies: map[int]int{},
	}
	outer := map[int]*image.Mount{}
	for i := range head.Container.Mounts {
		outer[head.Container.Mounts[i].ID] = &head.Container.Mounts[i]
	}
	for i := range head.Tree.Namespaces {
		o := &head.Tree.Namespaces[i]
		if o.Ref == n.Ref {
			break
		}
		for j := range o.Mounts {
			outer[o.Mounts[j].ID] = &o.Mounts[j]
		}
	}
	if m.order, err = n.OwnMounts(outer); err != nil {
		return nil, err
	}
	m.lend()
	m.pairCopies()
	return m, nil
}

// pairCopies finds, of the mounts that the namespace has begun with, those that
// the container had: those at one point in their order.
func (m *Maker) pairCopies() {
	for i := range m.mounts {
		if r := &m.mounts[i]; r.Own == image.MountCopy {
			m.copies[r.From] = r.ID
		}
	}
	taken := map[*mountinfo.Info]bool{}
	for i := range m.head.Container.Mounts {
		b := &m.head.Container.Mounts[i]
		j := slices.IndexFunc(m.have, func(h *mountinfo.Info) bool {
			return !taken[h] && h.Mountpoint == b.Point && (h.FSType == b.FSType || b.Own == "" && b.Point == image.RootPoint)
		})
		if j < 0 {
			continue
		}
		taken[m.have[j]] = true
		if id, ok := m.copies[b.ID]; ok {
			m.match[id] = m.have[j]
		} else {
			m.match[b.ID] = m.have[j]
		}
	}
}

// lend notes which file systems other namespaces show too, and where this is the
// container's maker, those in memory that it makes for them: what they hold is made
// with the rights of the bundle's own process.
func (m *Maker) lend() {
	for i := range m.head.Tree.Namespaces {
		n := &m.head.Tree.Namespaces[i]
		foreign := m.head.Nested(n.Owner) != nil
		for j := range n.Mounts {
			r := &n.Mounts[j]
			if r.Own == image.MountBind {
				m.lent[r.From] = true
			}
			if m.nested == nil && !foreign && r.Own == image.MountNew && r.FSType == "tmpfs" {
				m.early = append(m.early, r)
			}
		}
	}
}

// Sources are descriptors of the new file systems that others show too.
func (m *Maker) Sources() map[int]int { return m.sources }

// natural is how a mount of a task's namespace hands on events when it is new.
func (m *Maker) natural(r *image.Mount) sharing {
	if from := m.head.Mount(r.From); m.nested != nil && from != nil && m.sources[r.From] == 0 && r.Own != image.MountNew && !m.mine(from) {
		return naturalOf(from, m.foreign)
	}
	return sharing{}
}

func (m *Maker) mine(r *image.Mount) bool {
	return slices.ContainsFunc(m.mounts, func(o image.Mount) bool { return o.ID == r.ID })
}

// changedCopies are those whose options or events are not those of the container's.
func (m *Maker) changedCopies() (out []*image.Mount) {
	for i := range m.mounts {
		if r := &m.mounts[i]; r.Own == image.MountCopy && m.match[r.ID] != nil && (r.Options != m.head.Mount(r.From).Options || sharingOf(r.Optional) != m.natural(r)) {
			out = append(out, r)
		}
	}
	return out
}

// NeededNested reports whether the mounts are not yet what they are to be, or some
// of these places are covered by them.
func (m *Maker) NeededNested(places []Place) bool {
	missing := slices.ContainsFunc(m.head.Container.Mounts, func(b image.Mount) bool {
		_, has := m.copies[b.ID]
		return !has && m.match[b.ID] != nil
	})
	return missing || len(m.order) > 0 || len(m.changedCopies()) > 0 || slices.ContainsFunc(places, func(p Place) bool {
		return slices.ContainsFunc(m.mounts, func(r image.Mount) bool { return r.ID == p.Mount })
	})
}

// Lent are descriptors, in the stub, of file systems that it has made and that
// namespaces to come show too.
func (m *Maker) Lent() map[int]int {
	out := map[int]int{}
	for _, r := range m.order {
		if fd, ok := m.sources[r.ID]; ok && m.lent[r.ID] {
			out[r.ID] = fd
		}
	}
	return out
}

// PrepareNested opens the copies and makes new file systems.
func (m *Maker) PrepareNested() error {
	if err := m.openRoots(); err != nil {
		return err
	}
	return m.createAll()
}

// Begin makes what is bound from copies, as long as they are all there, and then
// takes those apart or away that are to be different.
func (m *Maker) Begin() error {
	for _, r := range m.order {
		_, elsewhere := m.sources[r.From]
		if from := m.head.Mount(r.From); r.Own != image.MountBind || elsewhere || m.mine(from) {
			continue
		}
		if err := m.bind(r); err != nil {
			return fail.On("mount "+r.Point, err)
		}
	}
	if root := m.nested.Pivoted(); root != nil {
		return m.beginPivot(root)
	}
	for _, r := range m.changedCopies() {
		if _, err := m.root(r.ID); err != nil {
			return fail.On("mount "+r.Point, err)
		}
		if _, err := m.run(r, func(b *tracee.Batch) { m.apart(b, r) }); err != nil {
			return err
		}
	}
	return m.unmountMissing()
}

// beginPivot opens the root that there is, on which the new one is mounted at
// first. No umount(2) of anything below must reach the container.
func (m *Maker) beginPivot(root *image.Mount) error {
	fd, err := m.one(root, func(b *tracee.Batch) { openat(b, unix.AT_FDCWD, "/", 0, false) })
	if err != nil {
		return err
	}
	m.old = fd
	_, err = m.run(root, func(b *tracee.Batch) { setattrBelow(b, fd, unix.AT_RECURSIVE, 0, 0, unix.MS_PRIVATE) })
	return err
}

// pivot makes the new root the root (pivot_root(2)) and takes the old one away.
func (m *Maker) pivot() error {
	if m.nested == nil || m.nested.Pivoted() == nil {
		return nil
	}
	root := m.nested.Pivoted()
	_, err := m.run(root, func(b *tracee.Batch) {
		b.Add(unix.SYS_FCHDIR, tracee.W(m.roots[root.ID]))
		b.Add(unix.SYS_PIVOT_ROOT, b.String("."), b.String("."))
		b.Add(unix.SYS_FCHDIR, tracee.W(m.old))
		b.Add(unix.SYS_UMOUNT2, b.String("."), tracee.W(unix.MNT_DETACH))
		b.Add(unix.SYS_CHDIR, b.String("/"))
		b.Add(unix.SYS_CLOSE, tracee.W(m.old))
	})
	return err
}

// unmountMissing takes away the copies that the namespace does not have.
func (m *Maker) unmountMissing() error {
	gone := map[int]bool{}
	var points []string
	for i := range m.head.Container.Mounts {
		b := &m.head.Container.Mounts[i]
		if _, has := m.copies[b.ID]; has || m.match[b.ID] == nil {
			continue
		}
		gone[m.match[b.ID].ID] = true
		points = append(points, b.Point)
	}
	if len(points) == 0 {
		return nil
	}
	for _, h := range slices.Backward(m.have) {
		if !gone[h.ID] || gone[h.Parent] {
			continue // it goes with its parent
		}
		if _, err := m.run(&image.Mount{Point: h.Mountpoint}, func(b *tracee.Batch) {
			b.Add(unix.SYS_UMOUNT2, b.String(h.Mountpoint), tracee.W(unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
		}); err != nil {
			return err
		}
	}
	return nil
}

// partOfNew makes the directories that lead to the part of a new file system that
// is shown, and clones that.
func (m *Maker) partOfNew(r *image.Mount, whole int) (int, error) {
	rel := strings.TrimPrefix(r.Root, "/")
	if _, err := m.run(r, func(b *tracee.Batch) {
		for i, c := range rel + "/" {
			if c == '/' {
				b.Add(unix.SYS_MKDIRAT, tracee.W(whole), b.String(rel[:i]), tracee.W(0o755))
			}
		}
	}); err != nil {
		return 0, err
	}
	at, err := m.one(r, func(b *tracee.Batch) { openat(b, whole, rel, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV, false) })
	if err != nil {
		return 0, err
	}
	part, err := m.clone(r, at, "")
	if err != nil {
		return 0, err
	}
	_, err = m.run(r, func(b *tracee.Batch) {
		b.Add(unix.SYS_CLOSE, tracee.W(at))
		b.Add(unix.SYS_CLOSE, tracee.W(whole))
	})
	return part, err
}
