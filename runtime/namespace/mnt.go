package namespace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// mnt is a set of mounts of its own (mount_namespaces(7)). One comes about as a
// copy of another, so what is recorded are the changes to a copy of the
// container's. Changes that cannot be made again are refused.
var mnt = kind{
	name: "mnt", flag: unix.CLONE_NEWNS,
	read: func(s *Set, n *Namespace) error {
		d := &mountDiff{set: s, ns: n}
		if err := d.load(); err != nil {
			return err
		}
		if err := d.match(); err != nil {
			return err
		}
		if err := d.compareAll(); err != nil {
			return err
		}
		for _, m := range d.added {
			if err := d.addition(m); err != nil {
				return fail.On("mount "+m.Mountpoint, err)
			}
		}
		n.Record.Changes = d.changes
		var err error
		n.view, err = d.view()
		return err
	},
	fill: func(m *Maker, s *stub, n *image.NestedNamespace) error {
		if showsProc(n) {
			return nil // Mounts does it
		}
		for i := range n.Changes {
			if err := m.change(s, &n.Changes[i]); err != nil {
				return err
			}
		}
		return nil
	},
}

func showsProc(n *image.NestedNamespace) bool {
	return slices.ContainsFunc(n.Changes, func(c image.MountChange) bool { return c.Op == image.MountProc })
}

// mountDiff compares the mounts of a namespace to the container's.
type mountDiff struct {
	set        *Set
	ns         *Namespace
	root       string // a way to the namespace's root
	base, mine []*mountinfo.Info
	copies     map[*mountinfo.Info]*mountinfo.Info // of mounts of base
	added      []*mountinfo.Info
	changes    []image.MountChange
}

func (d *mountDiff) load() (err error) {
	pid := 0
	for _, p := range d.ns.pids {
		if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", p)); err == nil && root == "/" {
			pid = p
			break
		}
	}
	if pid == 0 {
		return fail.Refuse("", "no task in it has its root for its own, so nothing tells all its mounts", "")
	}
	d.root = fmt.Sprintf("/proc/%d/root", pid)
	if d.base, err = mount.Read(d.set.Init); err != nil {
		return err
	}
	d.mine, err = mount.Read(pid)
	return err
}

// match finds the copy of each of the container's mounts.
func (d *mountDiff) match() error {
	d.copies = map[*mountinfo.Info]*mountinfo.Info{}
	left := slices.Clone(d.mine)
	for _, b := range d.base {
		i := slices.IndexFunc(left, func(m *mountinfo.Info) bool {
			return m.Major == b.Major && m.Minor == b.Minor && m.Root == b.Root && m.Mountpoint == b.Mountpoint && m.FSType == b.FSType
		})
		if i < 0 {
			return fail.Refuse("mount "+b.Mountpoint, "the container has it and this namespace does not; that is not supported yet", "")
		}
		d.copies[b] = left[i]
		left = slices.Delete(left, i, i+1)
	}
	d.added = left
	return nil
}

// The ways in which mounts hand on events (mount_namespaces(7), shared subtrees).
const (
	private    = unix.MS_PRIVATE
	shared     = unix.MS_SHARED
	slave      = unix.MS_SLAVE
	unbindable = unix.MS_UNBINDABLE
)

func propagation(m *mountinfo.Info) uint64 {
	is := func(tag string) bool { return strings.Contains(m.Optional, tag) }
	switch {
	case is("shared:") && is("master:"):
		return shared | slave
	case is("shared:"):
		return shared
	case is("master:"):
		return slave
	case is("unbindable"):
		return unbindable
	}
	return private
}

// copied is what the copy of a mount is at first: one for another user namespace
// is not a peer of the original, but gets its events (copy_mnt_ns in
// fs/namespace.c).
func (d *mountDiff) copied(b *mountinfo.Info) uint64 {
	p := propagation(b)
	if p&shared != 0 && d.ns.owner != nil {
		return slave
	}
	return p
}

// compareAll records how copies differ from the container's mounts.
func (d *mountDiff) compareAll() error {
	differs, allPrivate := false, true
	for _, b := range d.base {
		m := d.copies[b]
		differs = differs || propagation(m) != d.copied(b)
		allPrivate = allPrivate && propagation(m) == private
	}
	if differs && allPrivate {
		d.change(image.MountChange{Op: image.MountPropagation, Point: "/", Flags: private | unix.MS_REC})
	}
	for _, b := range d.base {
		m := d.copies[b]
		if now, was := propagation(m), d.copied(b); now != was && !allPrivate {
			if now != private && now != slave || now == slave && was&shared == 0 {
				return fail.Refuse("mount "+m.Mountpoint, "it hands on events ("+m.Optional+") in a way that cannot be made again", "")
			}
			if err := d.alone(m); err != nil {
				return err
			}
			d.change(image.MountChange{Op: image.MountPropagation, Point: m.Mountpoint, Flags: now})
		}
		if m.Options != b.Options {
			if err := d.alone(m); err != nil {
				return err
			}
			flags, err := mountFlags(m.Options)
			if err != nil {
				return fail.On("mount "+m.Mountpoint, err)
			}
			d.change(image.MountChange{Op: image.MountRemount, Point: m.Mountpoint, Flags: flags})
		}
	}
	return nil
}

// alone refuses a mount that another covers: its point names that one.
func (d *mountDiff) alone(m *mountinfo.Info) error {
	for _, o := range d.mine {
		if o != m && o.Mountpoint == m.Mountpoint {
			return fail.Refuse("mount "+m.Mountpoint, "several mounts stand on one point; that is not supported yet", "")
		}
	}
	return nil
}

func (d *mountDiff) change(c image.MountChange) { d.changes = append(d.changes, c) }

// addition records a mount that the container does not have.
func (d *mountDiff) addition(m *mountinfo.Info) error {
	flags, err := mountFlags(m.Options)
	if err != nil {
		return err
	}
	top := true
	for _, o := range d.mine {
		top = o == m || top && o.Mountpoint != m.Mountpoint // the kernel lists them as they were made
	}
	switch p := propagation(m); {
	case !top:
		return fail.Refuse("", "another mount covers it; that is not supported yet", "")
	case strings.Contains(m.Mountpoint, "//deleted"):
		return fail.Refuse("", "what it stands on is gone", "")
	case p != private && !(p == slave && d.source(m) != nil):
		return fail.Refuse("", "it hands on events ("+m.Optional+"), which is not supported yet for a mount that a task has made", "")
	case m.FSType == "proc" && m.Root == "/":
		err = d.procMount(m, flags)
	case d.source(m) != nil:
		err = d.bindMount(m, flags)
	case m.FSType == "tmpfs" && m.Root == "/":
		err = d.tmpfsMount(m, flags)
	default:
		err = fail.Refuse("", "a mount of type "+m.FSType+" that a task has made is not supported yet", "unmount it before the checkpoint")
	}
	return err
}

// procMount records a /proc. Whose it is, its own process 1 tells.
func (d *mountDiff) procMount(m *mountinfo.Info, flags uint64) error {
	link, err := os.Readlink(d.root + m.Mountpoint + "/1/ns/pid")
	if err != nil {
		return fail.Refuse("", "which pid namespace it shows cannot be told: "+err.Error(), "")
	}
	c := image.MountChange{Op: image.MountProc, Point: m.Mountpoint, Flags: flags, Data: superOptions(m)}
	space := (*Namespace)(nil)
	if inode, err := nsutil.Parse(link); err != nil {
		return err
	} else if inode != d.set.Own["pid"] {
		if space = d.set.byInode[inode]; space == nil {
			return fail.Refuse("", "the pid namespace that it shows is not the container's", "")
		}
	}
	if !slices.Contains(d.ns.mounters, mounter{space, d.ns.owner}) {
		return fail.Refuse("", "no task is left that could mount it: one of the pid namespace that it shows, in the user namespace that owns this one", "")
	}
	d.ns.procs = append(d.ns.procs, space)
	d.change(c)
	return nil
}

// superOptions are a mount's options of its file system.
func superOptions(m *mountinfo.Info) string {
	var keep []string
	for o := range strings.SplitSeq(m.VFSOptions, ",") {
		if o != "rw" && o != "ro" && o != "" {
			keep = append(keep, o)
		}
	}
	return strings.Join(keep, ",")
}

// source is the container's mount that a bind mount may have been made from.
func (d *mountDiff) source(m *mountinfo.Info) *mountinfo.Info {
	for _, b := range d.base {
		if b.Major == m.Major && b.Minor == m.Minor && (b.Root == "/" || m.Root == b.Root || strings.HasPrefix(m.Root, b.Root+"/")) {
			return b
		}
	}
	return nil
}

func (d *mountDiff) bindMount(m *mountinfo.Info, flags uint64) error {
	b := d.source(m)
	rel, err := filepath.Rel(b.Root, m.Root)
	if err != nil {
		return err
	}
	from := filepath.Join(b.Mountpoint, rel)
	var want, got unix.Stat_t
	if err := unix.Stat(d.root+m.Mountpoint, &want); err != nil {
		return err
	}
	// What stands there now must be what was bound: later mounts may cover it.
	if err := unix.Stat(d.root+from, &got); err != nil || got.Ino != want.Ino || got.Dev != want.Dev {
		return fail.Refuse("", "what it was bound from, "+from+", cannot be reached by that path any more", "")
	}
	d.change(image.MountChange{Op: image.MountBind, Point: m.Mountpoint, From: from})
	if was, err := mountFlags(d.copies[b].Options); err != nil || was != flags {
		d.change(image.MountChange{Op: image.MountRemount, Point: m.Mountpoint, Flags: flags})
	}
	if now, was := propagation(m), propagation(d.copies[b]); now != was {
		d.change(image.MountChange{Op: image.MountPropagation, Point: m.Mountpoint, Flags: now})
	}
	return nil
}

// tmpfsMount records an empty tmpfs; what is in one is not in the image.
func (d *mountDiff) tmpfsMount(m *mountinfo.Info, flags uint64) error {
	entries, err := os.ReadDir(d.root + m.Mountpoint)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fail.Refuse("", "it holds "+filepath.Join(m.Mountpoint, entries[0].Name())+", and files in memory are not supported yet", "remove it")
	}
	var st unix.Stat_t
	if err := unix.Stat(d.root+m.Mountpoint, &st); err != nil {
		return err
	}
	// Its root's owner and mode stand for what the options say of them, in the
	// numbers of whoever mounts it.
	data := []string{fmt.Sprintf("mode=%o", st.Mode&0o7777)}
	for o := range strings.SplitSeq(superOptions(m), ",") {
		if key, _, _ := strings.Cut(o, "="); o != "" && key != "mode" && key != "uid" && key != "gid" {
			data = append(data, o)
		}
	}
	uid, ok := d.number(st.Uid, func(u *image.UserNamespace) []image.IDMap { return u.UIDMap }, d.set.Maps.UID)
	gid, ok2 := d.number(st.Gid, func(u *image.UserNamespace) []image.IDMap { return u.GIDMap }, d.set.Maps.GID)
	if !ok || !ok2 {
		return fail.Refuse("", "its owner has no number in the user namespace that owns this one", "")
	}
	data = append(data, fmt.Sprintf("uid=%d,gid=%d", uid, gid))
	d.change(image.MountChange{Op: image.MountTmpfs, Point: m.Mountpoint, Flags: flags, Data: strings.Join(data, ",")})
	return nil
}

// number translates an id of the host into the user namespace of the mounts.
func (d *mountDiff) number(id uint32, of func(*image.UserNamespace) []image.IDMap, outer []image.IDMap) (uint32, bool) {
	id, ok := inward(outer, id, 1)
	if ok && d.ns.owner != nil {
		m := of(d.ns.owner.Record.User)
		if len(m) == 0 {
			return 0, false
		}
		id, ok = inward(m, id, 1)
	}
	return id, ok
}

// mountOptions are the options of a mount by their flags of mount(2).
var mountOptions = map[string]uint64{
	"rw": 0, "ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "nosymfollow": unix.MS_NOSYMFOLLOW,
}

func mountFlags(options string) (flags uint64, err error) {
	for o := range strings.SplitSeq(options, ",") {
		f, ok := mountOptions[o]
		if !ok {
			return 0, fail.Refuse("", "its option "+o+" is not supported", "")
		}
		flags |= f
	}
	if flags&(unix.MS_NOATIME|unix.MS_RELATIME) == 0 {
		flags |= unix.MS_STRICTATIME
	}
	return flags, nil
}

// change makes a stub change its mounts, as the bundle lets it.
func (m *Maker) change(s *stub, c *image.MountChange) error {
	err := m.asBundle(s, func(b *tracee.Batch) {
		word := func(s string) tracee.Word {
			if s == "" {
				return tracee.W(0)
			}
			return b.String(s)
		}
		from, kind, flags := c.From, "", c.Flags
		switch c.Op {
		case image.MountRemount:
			flags |= unix.MS_REMOUNT | unix.MS_BIND
		case image.MountBind:
			flags |= unix.MS_BIND
		case image.MountTmpfs, image.MountProc:
			from, kind = c.Op, c.Op
		}
		b.Add(unix.SYS_MOUNT, word(from), b.String(c.Point), word(kind), tracee.W(flags), word(c.Data))
	})
	if err != nil {
		return fail.On(c.Op+" mount "+c.Point, fmt.Errorf("the container may not make it: %w", err))
	}
	return nil
}

// View is how a mount namespace is looked into from outside.
type View struct {
	Root   *os.File // its root directory
	Mounts []image.Mount
	Ref    *image.Ref // known once the tree is written
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
	for _, v := range s.Views() {
		_ = v.Root.Close()
	}
}

func (d *mountDiff) view() (*View, error) {
	root, err := os.Open(d.root)
	if err != nil {
		return nil, err
	}
	return &View{Root: root, Ref: &d.ns.Record.Ref, Mounts: mount.Records(d.mine)}, nil
}

// Mounts makes the mounts that must wait until the tasks are in their
// namespaces: a /proc shows the pid namespace of the task that mounts it.
func (m *Maker) Mounts(stubs map[int]*tracee.Stub) error {
	for i := range m.Head.Tree.Namespaces {
		n := &m.Head.Tree.Namespaces[i]
		if !showsProc(n) {
			continue
		}
		for j := range n.Changes {
			c := &n.Changes[j]
			me := m.mounter(stubs, n, c)
			if me == nil {
				return fail.On(c.Op+" mount "+c.Point, errors.New("there is no task that could mount it"))
			}
			if err := m.change(me, c); err != nil {
				return err
			}
		}
	}
	return nil
}

// mounter finds a stub in a mount namespace, in the user namespace that owns it,
// and for a proc in the pid namespace that is to be shown.
func (m *Maker) mounter(stubs map[int]*tracee.Stub, n *image.NestedNamespace, c *image.MountChange) *stub {
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
		if in == c.Space || c.Op != image.MountProc {
			return m.at(s, int(p.Pid))
		}
	}
	for pid, s := range stubs { // a keeper, where only threads are to be
		if m.kept[n.Ref] == pid && m.User(pid) == owner && c.Space == 0 {
			return m.at(s, pid)
		}
	}
	return nil
}
