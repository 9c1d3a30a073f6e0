package tmpfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Stub is what the room needs of the task that makes the entries.
type Stub interface {
	// AsBundle runs the calls that fill adds with the rights of the bundle's
	// own process, so that an image grants nothing.
	AsBundle(fill func(b *tracee.Batch)) (*tracee.Batch, error)
	// AsItself runs them with all that a stub may do.
	AsItself(fill func(b *tracee.Batch)) (*tracee.Batch, error)
}

// Maker gives the file systems of a new container what those of the image held.
type Maker struct {
	stub    Stub
	head    *image.Head
	roots   map[image.Ref]*fresh // by the root's reference
	entries map[image.Ref]*entry
	order   []image.Ref
	pending []piece
	bytes   int
}

// fresh is a file system as the engine has made it.
type fresh struct {
	fd     int // of the root, in the stub
	tree   *Tree
	byPath map[string]*inode
	aside  Aside // of the root file system, which outlives the container
}

// Aside takes what is in the way in a file system that others see too, so that it
// can be put back. It plans at first: nothing is done before all is planned.
type Aside interface {
	// Move returns the path, from the root, that what is at a path is renamed to.
	Move(path string) string
	// Make tells of a path where something is made.
	Make(path string)
	// Change tells of one whose attributes are changed, or of a directory that is
	// removed.
	Change(path string) error
	// Begin ends the planning.
	Begin() error
}

// entry is an inode of the image and what becomes of it.
type entry struct {
	*image.Inode
	root  image.Ref
	fs    *fresh
	paths []string
	have  *inode // what the engine has made there already; nil: it is made anew
}

type piece struct {
	ref    image.Ref
	offset uint64
	data   []byte
}

// NewMaker sorts the inodes of an image, those of the file systems whose roots are
// the maker's; refs ascend. Ids, if not nil, translate the container's into those
// that the stub has to use.
func NewMaker(head *image.Head, stub Stub, refs []image.Ref, ids IDs, mine func(root *image.Inode) bool) *Maker {
	m := &Maker{stub: stub, head: head, roots: map[image.Ref]*fresh{}, entries: map[image.Ref]*entry{}}
	for _, ref := range refs {
		n := head.Inode(ref)
		if n == nil || n.Point != "" && !mine(n) || n.Point == "" && m.entries[n.Names[0].Dir] == nil {
			continue
		}
		if ids != nil {
			n = translate(n, ids)
		}
		m.order = append(m.order, ref)
		m.entries[ref] = m.entry(ref, n)
	}
	return m
}

// translate is an inode with other ids.
func translate(n *image.Inode, ids IDs) *image.Inode {
	out := *n
	out.UID, out.GID = ids.User(n.UID), ids.Group(n.GID)
	out.Xattrs = slices.Clone(n.Xattrs)
	for i := range out.Xattrs {
		x := &out.Xattrs[i]
		x.Value = inside(ids, x.Name, slices.Clone(x.Value))
	}
	return &out
}

// entry finds where an inode goes.
func (m *Maker) entry(ref image.Ref, n *image.Inode) *entry {
	if n.Point != "" {
		return &entry{Inode: n, root: ref, paths: []string{"."}}
	}
	e := &entry{Inode: n, root: m.entries[n.Names[0].Dir].root}
	for _, name := range n.Names {
		e.paths = append(e.paths, below(m.entries[name.Dir].paths[0], name.Name))
	}
	return e
}

// Selection is what must be seen of the file system that a root of the image goes
// into.
func (m *Maker) Selection(root image.Ref) Selection {
	w := wanted{dirs: map[string]*image.Inode{}, names: map[string][]string{}}
	for _, ref := range m.order {
		e := m.entries[ref]
		if e.root != root {
			continue
		}
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			w.dirs[e.paths[0]] = e.Inode
		}
		for i, name := range e.Names {
			dir := path.Dir(e.paths[i])
			w.names[dir] = append(w.names[dir], name.Name)
		}
	}
	return w
}

// wanted is a Selection by what an image has.
type wanted struct {
	dirs  map[string]*image.Inode
	names map[string][]string
}

// Directory: of what the image merges only what it changes, of all others all.
func (w wanted) Directory(path string, _ ID) (Part, error) {
	if n := w.dirs[path]; n != nil && n.Merged {
		return Part{Names: slices.Concat(w.names[path], n.Gone), Merged: true}, nil
	}
	return Part{All: true}, nil
}

// Entry reports true: all that is named is wanted.
func (w wanted) Entry(string, ID) bool { return true }

// Roots lists the roots of the image's file systems.
func (m *Maker) Roots() map[image.Ref]*image.Inode {
	out := map[image.Ref]*image.Inode{}
	for _, ref := range m.order {
		if e := m.entries[ref]; e.Point != "" {
			out[ref] = e.Inode
		}
	}
	return out
}

// Root tells the file system that a root of the image goes into: its number in
// the stub, what stands in it already, and where that goes if not nowhere.
func (m *Maker) Root(ref image.Ref, fd int, tree *Tree, aside Aside) {
	f := &fresh{fd: fd, tree: tree, byPath: map[string]*inode{}, aside: aside}
	for _, n := range slices.Concat(tree.dirs[1:], tree.others) {
		for _, p := range n.paths {
			f.byPath[p] = n
		}
	}
	m.roots[ref] = f
}

// Make creates every entry with its size, owner, mode and times. Contents come
// later.
func (m *Maker) Make() error {
	for _, ref := range m.order {
		if err := m.locate(ref); err != nil {
			return err
		}
	}
	for _, root := range slices.Sorted(maps.Keys(m.roots)) {
		if err := m.fill(m.roots[root]); err != nil {
			return fail.On(m.roots[root].tree.Name(), err)
		}
	}
	return nil
}

// locate finds whether an inode is there already.
func (m *Maker) locate(ref image.Ref) error {
	e := m.entries[ref]
	if e.fs = m.roots[e.root]; e.fs == nil {
		return nil // left out
	}
	if e.Point != "" {
		e.have = e.fs.tree.dirs[0]
		return nil
	}
	for _, path := range e.paths {
		if e.fs.tree.covered[path] {
			return fail.Refuse(e.fs.tree.Name(), path+" has a mount on it now", "restore with the bundle of the checkpoint")
		}
	}
	n := e.fs.byPath[e.paths[0]]
	if n == nil || n.record.Mode&unix.S_IFMT != e.Mode&unix.S_IFMT || n.record.Rdev != e.Rdev || n.record.Target != e.Target {
		return nil
	}
	if e.fs.aside == nil || e.Mode&unix.S_IFMT == unix.S_IFDIR || e.isThere(n) {
		e.have = n
	}
	return nil
}

// isThere reports that an inode stands in the root file system as it is to be,
// but for times: the engine has made it there as it did before, and the bundle's
// own process need not be able to. Of files with content that cannot be said.
func (e *entry) isThere(n *inode) bool {
	sameXattr := func(a, b image.Xattr) bool { return a.Name == b.Name && string(a.Value) == string(b.Value) }
	return e.Size == 0 && n.record.Size == 0 && e.Mode == n.record.Mode && e.UID == n.record.UID && e.GID == n.record.GID &&
		n.links == uint32(len(e.paths)) && slices.Equal(slices.Sorted(slices.Values(e.paths)), slices.Sorted(slices.Values(n.paths))) &&
		slices.EqualFunc(e.Xattrs, n.record.Xattrs, sameXattr)
}

// fill makes one file system hold what it is to.
func (m *Maker) fill(f *fresh) error {
	var own []*entry
	for _, ref := range m.order {
		if e := m.entries[ref]; e.fs == f {
			own = append(own, e)
		}
	}
	files, dirs := f.inTheWay(own)
	goes, err := f.plan(own, files, dirs)
	if err != nil {
		return err
	}
	j := &job{m: m, fs: f}
	j.add("", func(b *tracee.Batch) { b.Add(unix.SYS_UMASK, tracee.W(0)) })
	j.remove(files, dirs, goes)
	for _, e := range own {
		j.create(e)
	}
	// Children first, so that a directory that is closed to the maker, or
	// bequeaths an access control list, does not yet.
	for _, e := range slices.Backward(own) {
		j.attributes(e)
	}
	return j.flush()
}

// job gathers calls that are made in a file system's root, by relative paths.
// Every directory on the way was made by us, or found by Scan to be one: no path
// leads out.
type job struct {
	m     *Maker
	fs    *fresh
	steps []step
	size  int
	err   error
}

type step struct {
	path string
	fill func(b *tracee.Batch)
}

const jobSize = 512 // steps of a few calls and names each

func (j *job) add(path string, fill func(b *tracee.Batch)) {
	j.steps = append(j.steps, step{path, fill})
	if len(j.steps) >= jobSize || j.size > chunk {
		j.err = errors.Join(j.err, j.flush())
	}
}

// flush runs what was gathered as the bundle's own process.
func (j *job) flush() error {
	if j.err != nil || len(j.steps) == 0 {
		return j.err
	}
	if err := fault.Point("tmpfs.job"); err != nil {
		return err
	}
	var ends []int
	_, err := j.m.stub.AsBundle(func(b *tracee.Batch) {
		b.Add(unix.SYS_FCHDIR, tracee.W(j.fs.fd))
		for _, s := range j.steps {
			s.fill(b)
			ends = append(ends, len(b.Calls))
		}
		b.Add(unix.SYS_CHDIR, b.String("/"))
	})
	var failed *tracee.CallError
	if errors.As(err, &failed) {
		for i, end := range ends {
			if failed.Index < end {
				return &fail.Error{Cause: fmt.Errorf("%s cannot be made again: %w", j.steps[i].path, failed), Remedy: "restore with a bundle that allows it"}
			}
		}
	}
	j.steps, j.size = j.steps[:0], 0
	return err
}

// inTheWay lists what is there and the image does not have: files, and
// directories behind what is in them.
func (f *fresh) inTheWay(own []*entry) (files, dirs []string) {
	kept := map[string]bool{}
	for _, e := range own {
		for _, p := range e.paths {
			kept[p] = e.have != nil && (f.byPath[p] == e.have || p == ".")
		}
	}
	gone := func(n *inode) []string {
		return slices.DeleteFunc(slices.Clone(n.paths), func(p string) bool { return kept[p] })
	}
	for _, n := range f.tree.others {
		files = append(files, gone(n)...)
	}
	for _, n := range slices.Backward(f.tree.dirs[1:]) {
		dirs = append(dirs, gone(n)...)
	}
	return files, dirs
}

// plan tells aside what will be done, and returns where files go that are in the
// way, by their paths.
func (f *fresh) plan(own []*entry, files, dirs []string) (map[string]string, error) {
	if f.aside == nil {
		return nil, nil
	}
	goes := map[string]string{}
	for _, p := range files {
		goes[p] = f.aside.Move(p)
	}
	change := slices.Clone(dirs)
	for _, e := range own {
		if e.have != nil {
			change = append(change, e.paths[0])
		}
	}
	for _, p := range change {
		if err := f.aside.Change(p); err != nil {
			return nil, err
		}
	}
	for _, e := range own {
		for _, p := range e.paths {
			if e.have == nil {
				f.aside.Make(p)
			}
		}
	}
	return goes, f.aside.Begin()
}

// remove takes away what is in the way.
func (j *job) remove(files, dirs []string, goes map[string]string) {
	for _, p := range files {
		j.add(p, func(b *tracee.Batch) {
			if to := goes[p]; to != "" {
				b.Add(unix.SYS_RENAME, b.String(p), b.String(to))
			} else {
				b.Add(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(p), tracee.W(0))
			}
		})
	}
	for _, p := range dirs {
		j.add(p, func(b *tracee.Batch) {
			b.Add(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(p), tracee.W(unix.AT_REMOVEDIR))
		})
	}
}

// create makes an inode, and its further names.
func (j *job) create(e *entry) {
	format := e.Mode & unix.S_IFMT
	path := e.paths[0]
	if e.have == nil {
		j.add(path, func(b *tracee.Batch) {
			at := b.String(path)
			switch format {
			case unix.S_IFDIR:
				b.Add(unix.SYS_MKDIR, at, tracee.W(0o700))
			case unix.S_IFLNK:
				b.Add(unix.SYS_SYMLINK, b.String(e.Target), at)
			default:
				b.Add(unix.SYS_MKNOD, at, tracee.W(format|0o600), tracee.W(uint32(e.Rdev)))
			}
		})
	}
	if format == unix.S_IFREG && (e.Size != 0 || e.have != nil && e.have.record.Size != 0) {
		j.add(path, func(b *tracee.Batch) {
			b.Add(unix.SYS_TRUNCATE, b.String(path), tracee.W(0)) // what the engine put there
			b.Add(unix.SYS_TRUNCATE, b.String(path), tracee.W(e.Size))
		})
	}
	for _, more := range e.paths[1:] {
		if e.have == nil || j.fs.byPath[more] != e.have {
			j.add(more, func(b *tracee.Batch) { b.Add(unix.SYS_LINK, b.String(path), b.String(more)) })
		}
	}
}

// attributes gives an inode its owner, mode, extended attributes and times, as
// far as it does not have them.
func (j *job) attributes(e *entry) {
	had := &image.Inode{}
	if e.have != nil {
		had = e.have.record
	}
	var set, last []image.Xattr
	for _, x := range e.Xattrs {
		same := func(y image.Xattr) bool { return y.Name == x.Name && string(y.Value) == string(x.Value) }
		if slices.ContainsFunc(had.Xattrs, same) {
			continue
		}
		j.size += len(x.Value)
		if x.Name == capability { // a change of the owner takes it away
			last = append(last, x)
		} else {
			set = append(set, x)
		}
	}
	owned := e.have != nil && had.UID == e.UID && had.GID == e.GID
	if owned {
		set, last = append(set, last...), nil
	}
	j.add(e.paths[0], func(b *tracee.Batch) {
		at := b.String(e.paths[0])
		for _, x := range had.Xattrs {
			if !slices.ContainsFunc(e.Xattrs, func(y image.Xattr) bool { return x.Name == y.Name }) {
				b.Add(unix.SYS_LREMOVEXATTR, at, b.String(x.Name))
			}
		}
		setXattrs(b, at, set)
		setTimes(b, unix.AT_FDCWD, e, true)
		chmod := func(b *tracee.Batch) { b.Add(unix.SYS_CHMOD, at, tracee.W(e.Mode&0o7777)) }
		link := e.Mode&unix.S_IFMT == unix.S_IFLNK
		if had.Mode != e.Mode && !link {
			chmod(b) // while it is ours
		}
		if owned {
			return
		}
		b.Add(unix.SYS_LCHOWN, at, tracee.W(e.UID), tracee.W(e.GID))
		if e.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 && !link {
			chmod(b) // chown(2) has taken these bits away
		}
		setXattrs(b, at, last)
	})
}

func setXattrs(b *tracee.Batch, at tracee.Word, all []image.Xattr) {
	for _, x := range all {
		b.Add(unix.SYS_LSETXATTR, at, b.String(x.Name), b.Put(x.Value), tracee.W(len(x.Value)), tracee.W(0))
	}
}

// setTimes adds the call that sets an inode's times.
func setTimes(b *tracee.Batch, dir int, e *entry, tolerate bool) {
	const second = 1e9
	var times []byte
	for _, t := range []int64{e.Atime, e.Mtime} {
		sec, nsec := t/second, t%second
		if nsec < 0 {
			sec, nsec = sec-1, nsec+second
		}
		times = binary.LittleEndian.AppendUint64(times, uint64(sec))
		times = binary.LittleEndian.AppendUint64(times, uint64(nsec))
	}
	i := b.Add(unix.SYS_UTIMENSAT, tracee.W(dir), b.String(e.paths[0]), b.Put(times), tracee.W(unix.AT_SYMLINK_NOFOLLOW))
	b.Calls[i].Tolerate = tolerate
}

// Remade reports whether a device is one of the file systems in memory.
func (m *Maker) Remade(dev uint64) bool {
	for _, f := range m.roots {
		if f.aside == nil && f.tree.Dev() == dev {
			return true
		}
	}
	return false
}

// Has reports whether ref is an inode of the room.
func (m *Maker) Has(ref image.Ref) bool { return m.entries[ref] != nil }

// gather bounds what is held back to be written in one go.
const (
	gatherPieces = 256
	gatherBytes  = 4 << 20
)

// Fill puts bytes into a file. They are written by the stub: the memory that
// they take is the container's. Data is not kept.
func (m *Maker) Fill(ref image.Ref, offset uint64, data []byte) error {
	if m.entries[ref].fs == nil {
		return nil
	}
	if m.bytes+len(data) > gatherBytes || len(m.pending) >= gatherPieces {
		if err := m.Flush(); err != nil {
			return err
		}
	}
	m.pending = append(m.pending, piece{ref, offset, slices.Clone(data)})
	m.bytes += len(data)
	return nil
}

// Flush writes what Fill has gathered: files that the engine has made with the
// rights of the bundle, those that we have made whatever their mode is.
func (m *Maker) Flush() error {
	var made, found []piece
	for _, p := range m.pending {
		if m.entries[p.ref].have == nil {
			made = append(made, p)
		} else {
			found = append(found, p)
		}
	}
	m.pending, m.bytes = m.pending[:0], 0
	err := m.write(made, m.stub.AsItself)
	if err == nil {
		err = m.write(found, m.stub.AsBundle)
	}
	return err
}

func (m *Maker) write(pieces []piece, as func(func(*tracee.Batch)) (*tracee.Batch, error)) error {
	if len(pieces) == 0 {
		return nil
	}
	first := 0
	b, err := as(func(b *tracee.Batch) {
		first = len(b.Calls)
		for _, p := range pieces {
			e := m.entries[p.ref]
			b.Add(unix.SYS_OPENAT, tracee.W(e.fs.fd), b.String(e.paths[0]), tracee.W(unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC))
		}
	})
	if err != nil {
		return m.explain(err, pieces, first, 1)
	}
	opened := b.Calls[first:]
	b, err = as(func(b *tracee.Batch) {
		first = len(b.Calls)
		for i, p := range pieces {
			b.Add(unix.SYS_PWRITE64, tracee.W(opened[i].Ret), b.Put(p.data), tracee.W(len(p.data)), tracee.W(p.offset))
			b.Add(unix.SYS_CLOSE, tracee.W(opened[i].Ret))
		}
	})
	if err != nil {
		return m.explain(err, pieces, first, 2)
	}
	for i, p := range pieces {
		if n := b.Calls[first+2*i].Ret; n != int64(len(p.data)) {
			return m.blame(p.ref, fmt.Errorf("%d of %d bytes were written: %w", n, len(p.data), unix.ENOSPC))
		}
	}
	return nil
}

// explain names the file that a failed call was for.
func (m *Maker) explain(err error, pieces []piece, first, calls int) error {
	var failed *tracee.CallError
	if errors.As(err, &failed) && failed.Index >= first {
		if i := (failed.Index - first) / calls; i < len(pieces) {
			return m.blame(pieces[i].ref, err)
		}
	}
	return err
}

func (m *Maker) blame(ref image.Ref, err error) error {
	e := m.entries[ref]
	return fail.On(e.fs.tree.Name(), fmt.Errorf("%s cannot be filled: %w", e.paths[0], err))
}

// Finish sets all times once more: by making and filling they became now. Those
// of what the engine has made may be beyond the bundle's rights, and stay then.
func (m *Maker) Finish() error {
	if err := m.Flush(); err != nil {
		return err
	}
	for _, f := range m.roots {
		if err := m.privileges(f); err != nil {
			return fail.On(f.tree.Name(), err)
		}
	}
	for chunk := range slices.Chunk(m.order, jobSize) {
		_, err := m.stub.AsBundle(func(b *tracee.Batch) { m.times(b, chunk, true) })
		if err == nil {
			_, err = m.stub.AsItself(func(b *tracee.Batch) { m.times(b, chunk, false) })
		}
		if err != nil {
			return fmt.Errorf("times of files in memory: %w", err)
		}
	}
	return nil
}

// privileges gives files once more what a write(2) into them takes away, of
// whoever lacks CAP_FSETID on the host: the bits for set-user-id and
// set-group-id, and capabilities (file_remove_privs in fs/inode.c).
func (m *Maker) privileges(f *fresh) error {
	var privileged []*entry
	for _, ref := range m.order {
		e := m.entries[ref]
		special := e.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 || slices.ContainsFunc(e.Xattrs, isCapability)
		if e.fs == f && special && e.Mode&unix.S_IFMT == unix.S_IFREG && e.Size > 0 {
			privileged = append(privileged, e)
		}
	}
	if len(privileged) == 0 {
		return nil
	}
	// lsetxattr(2) knows no directory but the one that the stub is in.
	b, err := m.stub.AsItself(func(b *tracee.Batch) {
		b.Add(unix.SYS_OPEN, b.String("."), tracee.W(unix.O_PATH|unix.O_CLOEXEC))
	})
	if err != nil {
		return err
	}
	back := b.Calls[0].Ret
	change := func(as func(func(*tracee.Batch)) (*tracee.Batch, error), found bool) error {
		_, err := as(func(b *tracee.Batch) {
			b.Add(unix.SYS_FCHDIR, tracee.W(f.fd))
			for _, e := range privileged {
				if (e.have != nil) == found {
					at := b.String(e.paths[0])
					b.Add(unix.SYS_CHMOD, at, tracee.W(e.Mode&0o7777))
					setXattrs(b, at, slices.DeleteFunc(slices.Clone(e.Xattrs), func(x image.Xattr) bool { return !isCapability(x) }))
				}
			}
			b.Add(unix.SYS_FCHDIR, tracee.W(back))
		})
		return err
	}
	if err := change(m.stub.AsItself, false); err != nil {
		return err
	}
	if err := change(m.stub.AsBundle, true); err != nil {
		return err
	}
	_, err = m.stub.AsItself(func(b *tracee.Batch) { b.Add(unix.SYS_CLOSE, tracee.W(back)) })
	return err
}

func isCapability(x image.Xattr) bool { return x.Name == capability }

func (m *Maker) times(b *tracee.Batch, refs []image.Ref, found bool) {
	for _, ref := range refs {
		if e := m.entries[ref]; e.fs != nil && (e.have != nil) == found {
			setTimes(b, e.fs.fd, e, found)
		}
	}
}

// Close releases the roots.
func (m *Maker) Close() {
	for _, f := range m.roots {
		_ = f.tree.Close()
	}
}

// Magic is what statfs(2) says of a tmpfs.
func Magic(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Type == unix.TMPFS_MAGIC
}
