package mount

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Stub is what the room needs of the task that makes the mounts.
type Stub interface {
	// AsBundle runs the calls that fill adds with the rights of the bundle's
	// own process, so that an image grants nothing.
	AsBundle(fill func(b *tracee.Batch)) (*tracee.Batch, error)
	// Raise moves a descriptor out of the way of those of the tasks.
	Raise(fd int) (int, error)
	// Hand gives a descriptor to the stub that makes the other mounts, and returns
	// its number there.
	Hand(fd int) (int, error)
}

// Maker changes the mounts that the engine has made for a new container into
// those of the image. Every mount is held by a descriptor of its root, in the
// stub; directories that others are mounted on are found from there, within the
// one mount. So nothing depends on what covers what in between.
type Maker struct {
	stub Stub
	head *image.Head
	have []*mountinfo.Info // as the engine has made them
	ids  task.IDMaps       // of the image
	// was and is are the configurations of the checkpoint and of now: what the
	// operator has changed stays as it is now.
	was configs.Config
	is  *configs.Config
	pid int // of the stub

	mounts []image.Mount // that are to be
	// nested is the namespace where it is one that a task has made; foreign where
	// another user namespace than the container's owns it.
	nested  *image.NestedNamespace
	foreign bool
	// Other makes file systems that show which namespaces their maker is in, nil
	// for the stub itself.
	Other func(r *image.Mount) Stub
	// sources are descriptors, in every stub, of new file systems that mounts
	// elsewhere show too, by ids of the image; lent those that are to be.
	sources map[int]int
	lent    map[int]bool
	copies  map[int]int    // ids of copies by those of the container's mounts
	old     int            // the root that another is to take the place of
	early   []*image.Mount // file systems for such namespaces

	order  []*image.Mount           // the container's own, each behind what it stands on
	match  map[int]*mountinfo.Info  // what the engine has made of the bundle's, by ids of the image
	ours   map[*mountinfo.Info]bool // of these
	roots  map[int]int              // descriptors by ids of the image
	fills  map[int]int              // of file systems in memory to fill, which may become read-only
	points map[int]int              // of places to mount on, by ids of what is to be mounted there
	held   map[Place]int
	seals  map[int]int // of file systems that become read-only in the end
}

// NewMaker prepares to change the mounts of the container whose init is a stub
// with a pid on the host; the configuration is that of its bundle.
func NewMaker(stub Stub, pid int, head *image.Head, have []*mountinfo.Info, is *configs.Config) (*Maker, error) {
	m := &Maker{
		stub: stub, head: head, have: have, ids: task.IDMaps{UID: head.Container.UIDMap, GID: head.Container.GIDMap}, is: is, pid: pid,
		match: map[int]*mountinfo.Info{}, ours: map[*mountinfo.Info]bool{}, roots: map[int]int{}, fills: map[int]int{}, seals: map[int]int{},
		mounts: head.Container.Mounts, sources: map[int]int{}, lent: map[int]bool{},
	}
	var err error
	if m.order, err = head.Container.OwnMounts(); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(head.Container.Config, &m.was); err != nil {
		return nil, fmt.Errorf("the image's configuration: %w", err)
	}
	m.pair()
	m.lend()
	return m, nil
}

// pair finds the engine's mounts that are those of the image: those at one point
// in their order.
func (m *Maker) pair() {
	bind := map[string]bool{"/": true}
	for _, c := range m.is.Mounts {
		bind[filepath.Clean(c.Destination)] = c.IsBind()
	}
	for i := range m.head.Container.Mounts {
		r := &m.head.Container.Mounts[i]
		if r.Own != "" {
			continue
		}
		for _, h := range m.have {
			if h.Mountpoint == r.Point && !m.ours[h] {
				if h.FSType == r.FSType || bind[r.Point] { // the host's, which may be another
					m.match[r.ID], m.ours[h] = h, true
				}
				break
			}
		}
	}
}

// unchanged reports a point about which the operator's bundle says what it said
// at the checkpoint, sources aside.
func (m *Maker) unchanged(point string) bool {
	at := func(c *configs.Config) (out []string) {
		for _, e := range c.Mounts {
			if filepath.Clean(e.Destination) == point {
				one := *e
				one.Source, one.IDMapping = "", nil
				text, _ := json.Marshal(one) // nothing that was read from JSON fails
				out = append(out, string(text))
			}
		}
		return out
	}
	return point == "/" && m.was.Readonlyfs == m.is.Readonlyfs && m.was.RootPropagation == m.is.RootPropagation ||
		point != "/" && slices.Equal(at(&m.was), at(m.is))
}

// Stays lists the mounts that are not as the container had them, because the
// operator's bundle says something else about them now.
func (m *Maker) Stays() (points []string) {
	for i := range m.head.Container.Mounts {
		r := &m.head.Container.Mounts[i]
		if h := m.match[r.ID]; h != nil && !m.unchanged(r.Point) && m.differs(r, h) {
			points = append(points, r.Point)
		}
	}
	for _, h := range m.have {
		if !m.ours[h] && slices.Contains(m.head.Container.Unmounted, h.Mountpoint) && !m.unchanged(h.Mountpoint) {
			points = append(points, h.Mountpoint)
		}
	}
	return points
}

// changed are the mounts of the bundle's that the container has changed.
func (m *Maker) changed() (out []*image.Mount) {
	if m.nested != nil {
		return m.changedCopies()
	}
	for i := range m.head.Container.Mounts {
		r := &m.head.Container.Mounts[i]
		if h := m.match[r.ID]; h != nil && m.unchanged(r.Point) && m.differs(r, h) {
			out = append(out, r)
		}
	}
	return out
}

// differs reports a mount of the bundle's that is not as the engine makes it now.
func (m *Maker) differs(r *image.Mount, h *mountinfo.Info) bool {
	return r.Options != h.Options || !sharingOf(r.Optional).like(sharingOf(h.Optional)) || len(m.superChanges(r, h)) > 0 ||
		readOnly(r.Super) != readOnly(h.VFSOptions) && changeable[r.FSType] != nil
}

// Needed reports whether the mounts are not yet what they are to be.
func (m *Maker) Needed() bool {
	return len(m.order) > 0 || len(m.early) > 0 || len(m.head.Container.Unmounted) > 0 || len(m.changed()) > 0
}

// Fills are descriptors, in the stub, of the new file systems in memory, by ids of
// their mounts in the image.
func (m *Maker) Fills() map[int]int { return m.fills }

// run runs calls for a mount with the rights of the bundle's own process.
func (m *Maker) run(r *image.Mount, fill func(b *tracee.Batch)) (*tracee.Batch, error) {
	b, err := m.stub.AsBundle(fill)
	if err != nil {
		return b, fail.On("mount "+r.Point, &fail.Error{
			Cause: fmt.Errorf("the container may not make it again: %w", err), Remedy: "restore with the bundle of the checkpoint",
		})
	}
	return b, nil
}

// one runs one call and returns what it returned.
func (m *Maker) one(r *image.Mount, add func(b *tracee.Batch)) (int, error) {
	at := 0
	b, err := m.run(r, func(b *tracee.Batch) {
		at = len(b.Calls)
		add(b)
	})
	if err != nil {
		return 0, err
	}
	return int(b.Calls[at].Ret), nil
}

// Prepare takes away what the container has unmounted, opens up what is to be
// changed, and makes new file systems, which are not mounted yet.
func (m *Maker) Prepare() error {
	if err := m.openRoots(); err != nil {
		return err
	}
	if err := m.unmount(); err != nil {
		return err
	}
	for _, r := range m.changed() {
		if err := m.loosen(r); err != nil {
			return err
		}
	}
	if err := m.createAll(); err != nil {
		return err
	}
	for _, r := range m.early {
		if err := m.create(r); err != nil {
			return err
		}
		if err := m.shut(r.ID); err != nil {
			return err
		}
	}
	return nil
}

// createAll makes the new file systems but for overlays, whose layers must be
// there.
func (m *Maker) createAll() error {
	for _, r := range m.order {
		if r.Own == image.MountNew && r.FSType != "overlay" && m.sources[r.ID] == 0 {
			if err := m.create(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// openRoots opens the roots of the mounts that are there. One that another covers
// is missed only where it is needed.
func (m *Maker) openRoots() error {
	var list []*image.Mount
	for _, id := range slices.Sorted(maps.Keys(m.match)) {
		list = append(list, m.byID(id))
	}
	first := 0
	b, err := m.stub.AsBundle(func(b *tracee.Batch) {
		first = len(b.Calls)
		for _, r := range list {
			openat(b, unix.AT_FDCWD, r.Point, unix.RESOLVE_NO_SYMLINKS, true)
		}
	})
	if err != nil {
		return err
	}
	var ids []int
	for i, r := range list {
		if b.Err(first+i) == nil {
			m.roots[r.ID] = int(b.Calls[first+i].Ret)
			ids = append(ids, r.ID)
		}
	}
	now, err := m.mountIDs(ids)
	for i, id := range ids {
		if err == nil && now[i] != m.match[id].ID {
			err = m.shut(id)
		}
	}
	return err
}

// openat adds the open of a place to mount on or from. Nothing on the way may be a
// link; resolve says what else.
func openat(b *tracee.Batch, dir int, path string, resolve uint64, tolerate bool) int {
	var how []byte // struct open_how
	for _, v := range []uint64{unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, 0, resolve | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS} {
		how = binary.LittleEndian.AppendUint64(how, v)
	}
	i := b.Add(unix.SYS_OPENAT2, tracee.W(dir), b.String(path), b.Put(how), tracee.W(len(how)))
	b.Calls[i].Tolerate = tolerate
	return i
}

// mountIDs are the kernel's ids of mounts whose roots are open.
func (m *Maker) mountIDs(ids []int) ([]int, error) {
	const size = int(unsafe.Sizeof(unix.Statx_t{}))
	var at []tracee.Word
	b, err := m.stub.AsBundle(func(b *tracee.Batch) {
		for _, id := range ids {
			st := b.Reserve(size)
			at = append(at, st)
			b.Add(unix.SYS_STATX, tracee.W(m.roots[id]), b.String(""), tracee.W(unix.AT_EMPTY_PATH), tracee.W(unix.STATX_MNT_ID), st)
		}
	})
	out := make([]int, len(ids))
	for i := range ids {
		if err == nil {
			out[i] = int((*unix.Statx_t)(unsafe.Pointer(&b.At(at[i], size)[0])).Mnt_id)
		}
	}
	return out, err
}

func (m *Maker) shut(id int) error {
	fd := m.roots[id]
	delete(m.roots, id)
	_, err := m.stub.AsBundle(func(b *tracee.Batch) { b.Add(unix.SYS_CLOSE, tracee.W(fd)) })
	return err
}

// root is the descriptor of a mount's root.
func (m *Maker) root(id int) (int, error) {
	if copy, ok := m.copies[id]; ok {
		id = copy
	}
	fd, ok := m.roots[id]
	if !ok {
		return 0, fail.Refuse("", "the bundle does not make the mount that it needs, or covers it", "restore with the bundle of the checkpoint")
	}
	return fd, nil
}

// unmount takes away what the container has taken away of the bundle's mounts.
func (m *Maker) unmount() error {
	for _, h := range slices.Backward(m.have) {
		if m.ours[h] || !slices.Contains(m.head.Container.Unmounted, h.Mountpoint) || !m.unchanged(h.Mountpoint) {
			continue
		}
		r := &image.Mount{Point: h.Mountpoint}
		if _, err := m.run(r, func(b *tracee.Batch) {
			b.Add(unix.SYS_UMOUNT2, b.String(h.Mountpoint), tracee.W(unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW))
		}); err != nil {
			return err
		}
	}
	return nil
}

// setattr adds a mount_setattr(2).
func setattr(b *tracee.Batch, fd int, set, clear, propagation uint64) {
	setattrBelow(b, fd, 0, set, clear, propagation)
}

// setattrBelow adds one of a mount or, with AT_RECURSIVE, of all below it too.
func setattrBelow(b *tracee.Batch, fd int, flags, set, clear, propagation uint64) {
	var attr []byte // struct mount_attr
	for _, v := range []uint64{set, clear, propagation, 0} {
		attr = binary.LittleEndian.AppendUint64(attr, v)
	}
	b.Add(unix.SYS_MOUNT_SETATTR, tracee.W(fd), b.String(""), tracee.W(flags|unix.AT_EMPTY_PATH), b.Put(attr), tracee.W(len(attr)))
}

// loosen takes from a mount what the container has taken from it, so that files
// can be opened there; what it has added comes in the end.
func (m *Maker) loosen(r *image.Mount) error {
	fd, err := m.root(r.ID)
	if err != nil {
		return fail.On("mount "+r.Point, err)
	}
	is, err := attributesOf(r.Options)
	if err != nil {
		return fail.On("mount "+r.Point, err)
	}
	h := m.match[r.ID]
	if readOnly(h.VFSOptions) && !readOnly(r.Super) && changeable[r.FSType] != nil {
		if err := m.reconfigure(r, fd, []option{{"rw", ""}}); err != nil {
			return err
		}
	}
	if changes := m.superChanges(r, h); len(changes) > 0 {
		if err := m.reconfigure(r, fd, changes); err != nil {
			return err
		}
	}
	_, err = m.run(r, func(b *tracee.Batch) {
		setattr(b, fd, 0, allAttributes&^unix.MOUNT_ATTR__ATIME&^is, 0)
		if sharingOf(h.Optional).peers != 0 && sharingOf(r.Optional).peers == 0 {
			setattr(b, fd, 0, 0, unix.MS_PRIVATE)
		}
	})
	return err
}

// changeable are the options of file systems that a container may have changed
// with MS_REMOUNT.
var changeable = map[string][]string{
	"tmpfs": {"size", "nr_inodes"}, "proc": {"hidepid", "gid"}, "devpts": {"mode", "gid", "ptmxmode", "max"}, "sysfs": {}, "mqueue": {},
}

// superChanges are the options of a file system of the bundle's that the
// container has changed.
func (m *Maker) superChanges(r *image.Mount, h *mountinfo.Info) (out []option) {
	keys := changeable[r.FSType]
	if len(keys) == 0 || r.Super == h.VFSOptions {
		return nil
	}
	options, err := optionsOf(r, m.ids)
	had := strings.Split(h.VFSOptions, ",")
	for _, o := range options {
		if err == nil && slices.Contains(keys, o.key) && !slices.Contains(had, o.key+"="+o.value) {
			out = append(out, o)
		}
	}
	return out
}

// configure adds the calls that give a file system its options.
func configure(b *tracee.Batch, fd int, options []option) {
	for _, o := range options {
		if o.value == "" {
			b.Add(unix.SYS_FSCONFIG, tracee.W(fd), tracee.W(unix.FSCONFIG_SET_FLAG), b.String(o.key), tracee.W(0), tracee.W(0))
		} else {
			b.Add(unix.SYS_FSCONFIG, tracee.W(fd), tracee.W(unix.FSCONFIG_SET_STRING), b.String(o.key), b.String(o.value), tracee.W(0))
		}
	}
}

// reconfigure changes options of the file system behind a descriptor.
func (m *Maker) reconfigure(r *image.Mount, fd int, options []option) error {
	at, err := m.one(r, func(b *tracee.Batch) {
		b.Add(unix.SYS_FSPICK, tracee.W(fd), b.String(""), tracee.W(unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC))
	})
	if err != nil {
		return err
	}
	_, err = m.run(r, func(b *tracee.Batch) {
		configure(b, at, options)
		b.Add(unix.SYS_FSCONFIG, tracee.W(at), tracee.W(unix.FSCONFIG_CMD_RECONFIGURE), tracee.W(0), tracee.W(0), tracee.W(0))
		b.Add(unix.SYS_CLOSE, tracee.W(at))
	})
	return err
}

// create makes a file system and a mount of it, at no place yet. One in memory is
// filled through a clone, which stays writable.
func (m *Maker) create(r *image.Mount) error {
	var other Stub
	if m.Other != nil {
		other = m.Other(r)
	}
	if other == nil {
		fd, err := m.newMount(r)
		if err != nil {
			return err
		}
		return m.created(r, fd)
	}
	there := *m
	there.stub = other
	fd, err := there.newMount(r)
	if err == nil {
		fd, err = other.Hand(fd)
	}
	if err != nil {
		return err
	}
	return m.created(r, fd)
}

// newMount makes a file system and a mount of it in the stub.
func (m *Maker) newMount(r *image.Mount) (int, error) {
	attr, err := attributesOf(r.Options)
	if err == nil && !fresh[r.FSType] && !ofKernel[r.FSType] {
		err = fail.Refuse("", "a file system of type "+r.FSType+" is not made for an image", "")
	}
	var options []option
	if err == nil {
		options, err = optionsOf(r, m.ids)
	}
	if err != nil {
		return 0, fail.On("mount "+r.Point, err)
	}
	if m.foreign {
		options = slices.DeleteFunc(options, func(o option) bool { return r.FSType == "tmpfs" && (o.key == "uid" || o.key == "gid") })
	}
	options = append([]option{{"source", r.Source}}, options...)
	if r.FSType != "tmpfs" && !ofKernel[r.FSType] && readOnly(r.Super) {
		options = append(options, option{"ro", ""})
	}
	fs, err := m.one(r, func(b *tracee.Batch) {
		b.Add(unix.SYS_FSOPEN, b.String(r.FSType), tracee.W(unix.FSOPEN_CLOEXEC))
	})
	if err != nil {
		return 0, err
	}
	at := 0
	b, err := m.run(r, func(b *tracee.Batch) {
		if r.FSType == "tmpfs" {
			attr &^= unix.MOUNT_ATTR_RDONLY
			if !m.foreign { // where the options do not say otherwise
				configure(b, fs, []option{{"uid", "0"}, {"gid", "0"}})
			}
		}
		configure(b, fs, options)
		b.Add(unix.SYS_FSCONFIG, tracee.W(fs), tracee.W(unix.FSCONFIG_CMD_CREATE), tracee.W(0), tracee.W(0), tracee.W(0))
		at = b.Add(unix.SYS_FSMOUNT, tracee.W(fs), tracee.W(unix.FSMOUNT_CLOEXEC), tracee.W(attr))
		b.Add(unix.SYS_CLOSE, tracee.W(fs))
	})
	if err != nil {
		return 0, err
	}
	return int(b.Calls[at].Ret), nil
}

// created keeps what is needed of a new file system besides its mount.
func (m *Maker) created(r *image.Mount, whole int) (err error) {
	m.roots[r.ID] = whole
	if r.FSType == "tmpfs" && r.Root != "/" {
		if m.roots[r.ID], err = m.partOfNew(r, m.roots[r.ID]); err != nil {
			return err
		}
	}
	if r.FSType != "tmpfs" && !m.lent[r.ID] {
		return nil
	}
	up, err := m.keep(r)
	if err != nil {
		return err
	}
	if m.sources[r.ID] = up; r.FSType != "tmpfs" {
		return nil
	}
	if m.fills[r.ID] = up; readOnly(r.Super) {
		m.seals[r.ID] = up
	}
	return nil
}

// keep clones a mount into the table.
func (m *Maker) keep(r *image.Mount) (int, error) {
	clone, err := m.clone(r, m.roots[r.ID], "")
	if err != nil {
		return 0, err
	}
	return m.stub.Raise(clone)
}

// clone makes a mount of a part of what another shows, without what is mounted
// in there, at no place yet.
func (m *Maker) clone(r *image.Mount, fd int, rel string) (int, error) {
	flags := unix.OPEN_TREE_CLONE | unix.O_CLOEXEC
	if rel == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	return m.one(r, func(b *tracee.Batch) {
		b.Add(unix.SYS_OPEN_TREE, tracee.W(fd), b.String(rel), tracee.W(flags))
	})
}

// part clones a part of a mount. What is mounted on the way there is not in the
// way: the path is walked in a clone of the whole.
func (m *Maker) part(r, from *image.Mount, fd int) (int, error) {
	rel, ok := image.Below(r.Root, from.Root)
	if !ok {
		return 0, fail.On("mount "+r.Point, errors.New("it is no part of what it was bound from"))
	}
	if m.foreign && rel != "." { // mounts below keep the whole from being cloned
		at, err := m.one(r, func(b *tracee.Batch) { openat(b, fd, rel, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV, false) })
		if err != nil {
			return 0, err
		}
		part, err := m.clone(r, at, "")
		if err != nil {
			return 0, err
		}
		_, err = m.run(r, func(b *tracee.Batch) { b.Add(unix.SYS_CLOSE, tracee.W(at)) })
		return part, err
	}
	whole, err := m.clone(r, fd, "")
	if err != nil || rel == "." {
		return whole, err
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

// Place is a path on a mount, which need not lead there from the root.
type Place struct {
	Mount int // id of the image
	Path  string
}

// Attach puts every mount where it belongs, and gives it its options. Places that
// get covered are opened before; their descriptors are returned.
func (m *Maker) Attach(places []Place) (map[Place]int, error) {
	m.held, m.points = map[Place]int{}, map[int]int{}
	places = slices.DeleteFunc(slices.Clone(places), func(p Place) bool {
		return !slices.ContainsFunc(m.mounts, func(r image.Mount) bool { return r.ID == p.Mount })
	})
	for id := range m.roots {
		if err := m.hold(id, places); err != nil {
			return nil, err
		}
	}
	for _, r := range m.order {
		_, there := m.roots[r.ID]
		err := m.attach(r)
		if err == nil && !there {
			err = m.hold(r.ID, places)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, p := range places {
		if _, ok := m.held[p]; !ok {
			return nil, fail.On(p.Path, errors.New("the mount that it is on is not there"))
		}
	}
	if err := m.pivot(); err != nil {
		return nil, err
	}
	if err := m.settle(); err != nil {
		return nil, err
	}
	return m.held, m.release()
}

// hold opens what is needed of a mount as long as nothing stands on it: the points
// of others, and the places that these cover.
func (m *Maker) hold(id int, places []Place) error {
	r := m.byID(id)
	open := func(path string) (int, error) {
		rel, ok := image.Below(path, r.Point)
		if !ok {
			return 0, fail.On(path, errors.New("it does not lie in its mount"))
		}
		return m.one(&image.Mount{Point: path}, func(b *tracee.Batch) { openIn(b, m.roots[id], rel) })
	}
	var err error
	for _, c := range m.order {
		if err == nil && c.Parent == id {
			m.points[c.ID], err = open(c.Point)
		}
	}
	for _, p := range places {
		if err == nil && p.Mount == id {
			m.held[p], err = open(p.Path)
		}
	}
	return err
}

// openIn adds the open of a place on a mount, by the descriptor of its root.
func openIn(b *tracee.Batch, fd int, rel string) int {
	if rel == "." { // also of a file that is a mount
		return b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0))
	}
	return openat(b, fd, rel, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV, false)
}

func (m *Maker) byID(id int) *image.Mount { return m.head.Mount(id) }

// attach mounts one mount on its parent.
func (m *Maker) attach(r *image.Mount) error {
	parent := m.byID(r.Parent)
	point, there := m.points[r.ID]
	if m.nested != nil && r == m.nested.Pivoted() {
		point, there = m.old, true
	}
	if !there {
		_, err := m.root(r.Parent)
		return fail.On("mount "+r.Point, err)
	}
	var err error
	if h := m.match[r.Parent]; m.nested == nil && h != nil && sharingOf(h.Optional).peers != 0 && sharingOf(parent.Optional).peers != 0 {
		return fail.On("mount "+r.Point, fail.Refuse("", "what it stands on is shared with mounts outside of the container", "restore with the bundle of the checkpoint"))
	}
	switch {
	case r.Own == image.MountNew && r.FSType == "overlay": // its layers are there by now
		err = m.create(r)
	case m.roots[r.ID] == 0:
		err = fail.On("mount "+r.Point, m.bind(r))
	}
	if err != nil {
		return err
	}
	_, err = m.run(r, func(b *tracee.Batch) {
		m.apart(b, r)
		b.Add(unix.SYS_MOVE_MOUNT, tracee.W(m.roots[r.ID]), b.String(""), tracee.W(point), b.String(""),
			tracee.W(unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
		if m.nested == nil || point != m.old {
			b.Add(unix.SYS_CLOSE, tracee.W(point))
		}
	})
	return err
}

// bind makes a mount of a part of another, at no place yet.
func (m *Maker) bind(r *image.Mount) error {
	from := r.From
	if r.Own == image.MountNew { // made for several
		from = r.ID
	}
	source, ok := m.sources[from]
	if !ok {
		var err error
		if source, err = m.root(from); err != nil {
			return err
		}
	}
	var err error
	m.roots[r.ID], err = m.part(r, m.byID(from), source)
	return err
}

// apart adds the change of how a mount hands on events before it is attached: as
// long as mounts are, none of them shares any.
func (m *Maker) apart(b *tracee.Batch, r *image.Mount) {
	is := sharingOf(r.Optional)
	switch was := m.natural(r); {
	case is == was && m.nested != nil:
	case is.master != 0 && is.master == was.peers:
		setattr(b, m.roots[r.ID], 0, 0, unix.MS_SLAVE)
	case is.peers == 0 && is.master == 0 || m.nested != nil:
		setattr(b, m.roots[r.ID], 0, 0, unix.MS_PRIVATE)
	}
}

// settle gives mounts their options, and then lets them share events: as long as
// mounts were attached, they did not, or they would have appeared twice.
func (m *Maker) settle() error {
	for _, r := range slices.Concat(m.order, m.changed()) {
		attr, err := attributesOf(r.Options)
		if err != nil {
			return fail.On("mount "+r.Point, err)
		}
		if _, err := m.run(r, func(b *tracee.Batch) { setattr(b, m.roots[r.ID], attr, allAttributes, 0) }); err != nil {
			return err
		}
	}
	for _, r := range m.changed() {
		if m.nested != nil || changeable[r.FSType] == nil || !readOnly(r.Super) || readOnly(m.match[r.ID].VFSOptions) {
			continue
		}
		clone, err := m.clone(r, m.roots[r.ID], "")
		if err != nil {
			return err
		}
		up, err := m.stub.Raise(clone)
		if err != nil {
			return err
		}
		m.seals[r.ID] = up
	}
	return m.share()
}

// release closes the roots and puts what is held out of the way.
func (m *Maker) release() error {
	for p, fd := range m.held {
		up, err := m.stub.Raise(fd)
		if err != nil {
			return err
		}
		m.held[p] = up
	}
	_, err := m.stub.AsBundle(func(b *tracee.Batch) {
		for _, fd := range m.roots {
			b.Add(unix.SYS_CLOSE, tracee.W(fd))
		}
	})
	clear(m.roots)
	return err
}

// Finish makes file systems read-only that are, once they are filled.
func (m *Maker) Finish() error {
	for id, fd := range m.seals {
		if err := m.reconfigure(m.byID(id), fd, []option{{"ro", ""}}); err != nil {
			return err
		}
	}
	return nil
}
