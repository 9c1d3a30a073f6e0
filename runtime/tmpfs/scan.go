// Package tmpfs holds the container's own file systems in memory: what the
// bundle mounts empty, or nearly so, and the container fills. Out: every inode
// is an object of its own, its bytes follow among the contents. In: the init
// stub makes every entry with the rights of the bundle's own process.
package tmpfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
)

// IDs translate what the host shows into the container's own numbers.
type IDs interface {
	User(host uint32) uint32
	Group(host uint32) uint32
}

// HostIDs leave ids as the host has them.
type HostIDs struct{}

// User is a uid.
func (HostIDs) User(host uint32) uint32 { return host }

// Group is a gid.
func (HostIDs) Group(host uint32) uint32 { return host }

// Tree is what one file system in memory holds.
type Tree struct {
	Point string
	Used  int64 // bytes in memory
	root  *os.File
	ids   IDs
	// covered are the paths below the root that other mounts stand on: what
	// lies under them was there before the container's first process, and is
	// there again.
	covered map[string]bool
	dirs    []*inode // the root first, parents before children
	others  []*inode
	dev     uint64
	buf     []byte
	numbers map[ID]*inode // others
	part    Selection
	held    *os.File // contents of files that are held, nil if none are
}

// ID tells one inode from all others, and with the time of its last change from
// what it was before.
type ID struct {
	Dev, Ino uint64
	Ctime    int64 // nanoseconds
}

// same is the ID without what changes.
func (id ID) same() ID { return ID{Dev: id.Dev, Ino: id.Ino} }

// Selection says which part of a file system is scanned.
type Selection interface {
	// Directory is asked about each directory, before what stands in it.
	Directory(path string, id ID) (Part, error)
	// Entry reports whether an entry that is no directory belongs to the part.
	Entry(path string, id ID) bool
}

// Part is what is scanned of a directory.
type Part struct {
	All   bool // every name in it
	Names []string
	// Merged: what else stands in it, or will, is none of the scan's business.
	Merged bool
	// Gone are names that something has taken away from it, Expected some that
	// have been taken away if they are not there.
	Gone, Expected []string
	// Passage: the directory itself belongs to the part only if something in it
	// does.
	Passage bool
}

// inode is one file with all its names.
type inode struct {
	object.Object
	record  *image.Inode
	id      ID
	links   uint32
	path    string // first name, relative to the root
	paths   []string
	dirs    []*inode // of the names
	passage bool
	isHeld  bool
	heldAt  int64 // where its bytes begin among those held
}

// Scan reads a file system, or part of it, from its root directory, which the
// tree keeps. It changes nothing, access times neither.
func Scan(root *os.File, point string, covered []string, ids IDs, part Selection) (*Tree, error) {
	t := &Tree{Point: point, root: root, ids: ids, covered: map[string]bool{}, numbers: map[ID]*inode{}, part: part}
	for _, p := range covered {
		t.covered[p] = true
	}
	var st unix.Statx_t
	if err := unix.Statx(int(root.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return nil, err
	}
	t.dev = unix.Mkdev(st.Dev_major, st.Dev_minor)
	top, err := t.read(&st, int(root.Fd()), "", ".")
	if err != nil {
		return nil, err
	}
	top.record.Point = point
	t.dirs = append(t.dirs, top)
	for i := 0; i < len(t.dirs); i++ {
		if err := t.list(t.dirs[i]); err != nil {
			return nil, fail.On(t.Name(), err)
		}
	}
	t.prune()
	return t, nil
}

// prune leaves out directories that lead to nothing.
func (t *Tree) prune() {
	needed := map[*inode]bool{t.dirs[0]: true}
	for _, n := range t.others {
		for _, d := range n.dirs {
			needed[d] = true
		}
	}
	for _, d := range slices.Backward(t.dirs[1:]) {
		if needed[d] = needed[d] || !d.passage || len(d.record.Gone) > 0; needed[d] {
			needed[d.dirs[0]] = true
		}
	}
	t.dirs = slices.DeleteFunc(t.dirs, func(d *inode) bool { return !needed[d] })
}

// Name is what messages call the file system.
func (t *Tree) Name() string { return nameOf(t.Point) }

func nameOf(point string) string {
	if point == "/" {
		return "root file system"
	}
	return "tmpfs " + point
}

// Each calls f for every name in the tree, "." being the root.
func (t *Tree) Each(f func(path string, id ID, isDir bool)) {
	f(".", t.dirs[0].id, true)
	for _, n := range t.dirs[1:] {
		f(n.path, n.id, true)
	}
	for _, n := range t.others {
		for _, p := range n.paths {
			f(p, n.id, false)
		}
	}
}

// Partial lists files that have names outside the tree.
func (t *Tree) Partial() (paths []string) {
	for _, n := range t.others {
		if int(n.links) > len(n.paths) {
			paths = append(paths, n.path)
		}
	}
	return paths
}

// Mount notes that the container has made the mount with an id itself.
func (t *Tree) Mount(id int32) { t.dirs[0].record.Mnt = id }

// Close releases the root, and what is held.
func (t *Tree) Close() error {
	if t.held != nil {
		_ = t.held.Close()
	}
	return t.root.Close()
}

// IsRoot reports the container's root file system, which is not made anew.
func (t *Tree) IsRoot() bool { return t.Point == image.RootPoint && t.dirs[0].record.Mnt == 0 }

// within opens a path of the tree; nothing on the way may lead out of it.
func (t *Tree) within(path string, flags uint64) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NOATIME | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(int(t.root.Fd()), path, &how)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// list reads the entries of a directory, oldest first: tmpfs lists them in the
// order in which they were made, the last one first, and so it will again.
func (t *Tree) list(dir *inode) error {
	f, err := t.within(dir.path, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) { // of a container that runs
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := t.names(dir, f)
	if err != nil {
		return err
	}
	for _, name := range slices.Backward(names) {
		path := below(dir.path, name)
		if t.covered[path] {
			continue
		}
		err := t.entry(dir, int(f.Fd()), name, path)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fail.On(t.Name(), fmt.Errorf("%s: %w", path, err))
		}
	}
	return nil
}

func below(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

// names lists the names in a directory that are looked at, and notes what is gone.
func (t *Tree) names(dir *inode, f *os.File) ([]string, error) {
	if t.part == nil {
		return f.Readdirnames(-1)
	}
	part, err := t.part.Directory(dir.path, dir.id)
	if err != nil {
		return nil, err
	}
	if part.All {
		if part.Names, err = f.Readdirnames(-1); err != nil {
			return nil, err
		}
	}
	there := map[string]bool{}
	for _, name := range part.Names {
		there[name] = true
	}
	for _, name := range part.Expected {
		if !there[name] {
			part.Gone = append(part.Gone, name)
		}
	}
	part.Gone = slices.DeleteFunc(part.Gone, func(name string) bool { return t.covered[below(dir.path, name)] })
	slices.Sort(part.Gone)
	dir.record.Merged, dir.record.Gone, dir.passage = part.Merged, part.Gone, part.Passage
	return part.Names, nil
}

func (t *Tree) entry(dir *inode, fd int, name, path string) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		return err
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	id := identify(&st)
	if t.part != nil && !isDir && !t.part.Entry(path, id) {
		return nil
	}
	n := t.numbers[id.same()]
	if n == nil {
		if len(path) >= unix.PathMax {
			return fail.Refuse(t.Name(), "it holds directories nested deeper than a path can name", "remove them")
		}
		var err error
		if n, err = t.read(&st, fd, name, path); err != nil {
			return err
		}
		if isDir {
			t.dirs = append(t.dirs, n)
		} else {
			t.others = append(t.others, n)
			t.numbers[id.same()] = n
		}
	}
	n.record.Names = append(n.record.Names, image.Name{Name: name})
	n.paths = append(n.paths, path)
	n.dirs = append(n.dirs, dir)
	return nil
}

func identify(st *unix.Statx_t) ID {
	return ID{unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino, st.Ctime.Sec*1e9 + int64(st.Ctime.Nsec)}
}

// lost are inode flags (statx(2)) that a copy would not have.
const lost = unix.STATX_ATTR_APPEND | unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_NODUMP

// read makes the record of the inode called name in the directory fd.
func (t *Tree) read(st *unix.Statx_t, fd int, name, path string) (*inode, error) {
	if st.Attributes&lost != 0 {
		return nil, fail.Refuse(t.Name(), path+" has inode flags (chattr), which are not supported", "take them away (chattr -iad)")
	}
	rec := &image.Inode{
		Mode: uint32(st.Mode), UID: t.ids.User(st.Uid), GID: t.ids.Group(st.Gid),
		Atime: st.Atime.Sec*1e9 + int64(st.Atime.Nsec), Mtime: st.Mtime.Sec*1e9 + int64(st.Mtime.Nsec),
	}
	n := &inode{record: rec, id: identify(st), links: st.Nlink, path: path}
	n.Object = object.Object{Type: image.TypeInode, Record: rec, Complete: n.complete}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		rec.Size = st.Size
		t.Used += int64(st.Blocks) * 512
	case unix.S_IFCHR, unix.S_IFBLK:
		rec.Rdev = unix.Mkdev(st.Rdev_major, st.Rdev_minor)
	case unix.S_IFLNK:
		b := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(fd, name, b)
		if err != nil {
			return nil, err
		}
		rec.Target = string(b[:size])
	}
	var err error
	rec.Xattrs, err = t.xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
	return n, err
}

func (n *inode) complete() {
	for i, dir := range n.dirs {
		n.record.Names[i].Dir = dir.Ref
	}
}

// xattrs reads the extended attributes of an entry.
func (t *Tree) xattrs(entry string) ([]image.Xattr, error) {
	if t.buf == nil {
		t.buf = make([]byte, xattrMost)
	}
	return readXattrs(unix.Llistxattr, unix.Lgetxattr, entry, t.ids, t.buf)
}

// Xattrs reads the extended attributes of what a link in /proc leads to.
func Xattrs(link string, ids IDs) ([]image.Xattr, error) {
	return readXattrs(unix.Listxattr, unix.Getxattr, link, ids, make([]byte, xattrMost))
}

const xattrMost = 64 << 10 // XATTR_LIST_MAX, and XATTR_SIZE_MAX

// readXattrs reads extended attributes but for the labels of security modules,
// which the host's policy gives anew.
func readXattrs(list func(string, []byte) (int, error), get func(string, string, []byte) (int, error), path string, ids IDs, buf []byte) (out []image.Xattr, err error) {
	n, err := list(path, buf)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "security.") && name != capability {
			continue
		}
		n, err := get(path, name, buf)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		out = append(out, image.Xattr{Name: name, Value: inside(ids, name, slices.Clone(buf[:n]))})
	}
	return out, nil
}

const (
	capability = "security.capability"
	access     = "system.posix_acl_access"
	inherited  = "system.posix_acl_default"
)

// inside translates the ids in an attribute. Access control lists
// (linux/posix_acl_xattr.h) hold some in the entries for named users and groups.
// File capabilities made in a user namespace show the host that namespace's
// root (struct vfs_ns_cap_data); those inside write the form without it.
func inside(ids IDs, name string, value []byte) []byte {
	const (
		aclHeader, aclEntry, aclUser, aclGroup = 4, 8, 2, 8

		capRevision2, capRevision3, capRevisionMask = 0x02000000, 0x03000000, 0xff000000
		sizeRevision2                               = 20
	)
	le := binary.LittleEndian
	switch {
	case name == access || name == inherited:
		for at := aclHeader; at+aclEntry <= len(value); at += aclEntry {
			id := value[at+4:]
			switch le.Uint16(value[at:]) {
			case aclUser:
				le.PutUint32(id, ids.User(le.Uint32(id)))
			case aclGroup:
				le.PutUint32(id, ids.Group(le.Uint32(id)))
			}
		}
	case name == capability && len(value) > sizeRevision2 && le.Uint32(value)&capRevisionMask == capRevision3 && ids.User(le.Uint32(value[sizeRevision2:])) == 0:
		le.PutUint32(value, le.Uint32(value)&^capRevisionMask|capRevision2)
		value = value[:sizeRevision2]
	}
	return value
}

// Dev is the file system's device number.
func (t *Tree) Dev() uint64 { return t.dev }

// Named is the path, from the container's root, of a file of the tree, or "".
func (t *Tree) Named(dev, ino uint64) string {
	if n := t.numbers[ID{Dev: dev, Ino: ino}]; n != nil {
		return strings.TrimSuffix(t.Point, "/") + "/" + n.path
	}
	return ""
}

// Objects lists the inodes, directories before what stands in them.
func (t *Tree) Objects() (out []*object.Object) {
	for _, n := range slices.Concat(t.dirs, t.others) {
		out = append(out, &n.Object)
	}
	return out
}

// chunk is how many bytes are read and written at a time.
const chunk = 1 << 20

// Save writes the bytes of every file that is not held, holes left out.
func (t *Tree) Save(w *image.Writer, progress func() error) error {
	return t.save(w, false, progress)
}

func (t *Tree) save(w *image.Writer, held bool, progress func() error) error {
	var buf []byte
	for _, n := range t.others {
		if n.record.Size == 0 || n.isHeld != held {
			continue
		}
		if buf == nil {
			buf = make([]byte, chunk)
		}
		if err := t.saveFile(w, n, buf, progress); err != nil {
			return fail.On(t.Name(), fmt.Errorf("%s: %w", n.path, err))
		}
	}
	return nil
}

func (t *Tree) saveFile(w *image.Writer, n *inode, buf []byte, progress func() error) error {
	f, base := t.held, n.heldAt
	if !n.isHeld {
		var err error
		if f, err = t.within(n.path, unix.O_RDONLY); err != nil {
			return err
		}
		defer f.Close()
	}
	last := base + int64(n.record.Size)
	for at := base; at < last; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end = min(end, last)
		for at = start; at < end; {
			b := buf[:min(int64(len(buf)), end-at)]
			if _, err := f.ReadAt(b, at); err != nil {
				return err
			}
			if err := errors.Join(w.Bytes(n.Ref, uint64(at-base), b), progress()); err != nil {
				return err
			}
			at += int64(len(b))
		}
	}
	return nil
}
