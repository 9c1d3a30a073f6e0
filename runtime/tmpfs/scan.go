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
	numbers map[uint64]*inode // others by inode number
}

// inode is one file with all its names.
type inode struct {
	object.Object
	record *image.Inode
	path   string // first name, relative to the root
	paths  []string
	dirs   []*inode // of the names
	blocks int64
}

// Scan reads a file system from its root directory, which the tree keeps. It
// changes nothing, access times neither.
func Scan(root *os.File, point string, covered []string, ids IDs) (*Tree, error) {
	t := &Tree{Point: point, root: root, ids: ids, covered: map[string]bool{}, numbers: map[uint64]*inode{}}
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
			return nil, fail.On("tmpfs "+point, err)
		}
	}
	return t, nil
}

// Close releases the root.
func (t *Tree) Close() error { return t.root.Close() }

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
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range slices.Backward(names) {
		path := name
		if dir.path != "." {
			path = dir.path + "/" + name
		}
		if t.covered[path] {
			continue
		}
		err := t.entry(dir, int(f.Fd()), name, path)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fail.On("tmpfs "+t.Point, fmt.Errorf("%s: %w", path, err))
		}
	}
	return nil
}

func (t *Tree) entry(dir *inode, fd int, name, path string) error {
	var st unix.Statx_t
	if err := unix.Statx(fd, name, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st); err != nil {
		return err
	}
	n := t.numbers[st.Ino]
	if n == nil {
		if len(path) >= unix.PathMax {
			return fail.Refuse("tmpfs "+t.Point, "it holds directories nested deeper than a path can name", "remove them")
		}
		var err error
		if n, err = t.read(&st, fd, name, path); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			t.dirs = append(t.dirs, n)
		} else {
			t.others = append(t.others, n)
			t.numbers[st.Ino] = n
		}
	}
	n.record.Names = append(n.record.Names, image.Name{Name: name})
	n.paths = append(n.paths, path)
	n.dirs = append(n.dirs, dir)
	return nil
}

// lost are inode flags (statx(2)) that a copy would not have.
const lost = unix.STATX_ATTR_APPEND | unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_NODUMP

// read makes the record of the inode called name in the directory fd.
func (t *Tree) read(st *unix.Statx_t, fd int, name, path string) (*inode, error) {
	if st.Attributes&lost != 0 {
		return nil, fail.Refuse("tmpfs "+t.Point, path+" has inode flags (chattr), which are not supported", "take them away (chattr -iad)")
	}
	rec := &image.Inode{
		Mode: uint32(st.Mode), UID: t.ids.User(st.Uid), GID: t.ids.Group(st.Gid),
		Atime: st.Atime.Sec*1e9 + int64(st.Atime.Nsec), Mtime: st.Mtime.Sec*1e9 + int64(st.Mtime.Nsec),
	}
	n := &inode{record: rec, path: path}
	n.Object = object.Object{Type: image.TypeInode, Record: rec, Complete: n.complete}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		rec.Size, n.blocks = st.Size, int64(st.Blocks)*512
		t.Used += n.blocks
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

// xattrs reads extended attributes but for the labels of security modules,
// which the host's policy gives anew.
func (t *Tree) xattrs(link string) (out []image.Xattr, err error) {
	if t.buf == nil {
		t.buf = make([]byte, 64<<10) // XATTR_LIST_MAX, and XATTR_SIZE_MAX
	}
	n, err := unix.Llistxattr(link, t.buf)
	if err != nil || n == 0 {
		return nil, err
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(t.buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "security.") && name != capability {
			continue
		}
		n, err := unix.Lgetxattr(link, name, t.buf)
		if err != nil {
			return nil, fmt.Errorf("extended attribute %s: %w", name, err)
		}
		x := image.Xattr{Name: name, Value: t.inside(name, slices.Clone(t.buf[:n]))}
		out = append(out, x)
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
func (t *Tree) inside(name string, value []byte) []byte {
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
				le.PutUint32(id, t.ids.User(le.Uint32(id)))
			case aclGroup:
				le.PutUint32(id, t.ids.Group(le.Uint32(id)))
			}
		}
	case name == capability && len(value) > sizeRevision2 && le.Uint32(value)&capRevisionMask == capRevision3 && t.ids.User(le.Uint32(value[sizeRevision2:])) == 0:
		le.PutUint32(value, le.Uint32(value)&^capRevisionMask|capRevision2)
		value = value[:sizeRevision2]
	}
	return value
}

// Dev is the file system's device number.
func (t *Tree) Dev() uint64 { return t.dev }

// Named is the path, from the container's root, of a file of the tree, or "".
func (t *Tree) Named(dev, ino uint64) string {
	if n := t.numbers[ino]; n != nil && dev == t.dev {
		return t.Point + "/" + n.path
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

// Save writes the bytes of every file, holes left out.
func (t *Tree) Save(w *image.Writer, progress func() error) error {
	var buf []byte
	for _, n := range t.others {
		if n.blocks == 0 {
			continue
		}
		if buf == nil {
			buf = make([]byte, chunk)
		}
		if err := t.saveFile(w, n, buf, progress); err != nil {
			return fail.On("tmpfs "+t.Point, fmt.Errorf("%s: %w", n.path, err))
		}
	}
	return nil
}

func (t *Tree) saveFile(w *image.Writer, n *inode, buf []byte, progress func() error) error {
	f, err := t.within(n.path, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	size := int64(n.record.Size)
	for at := int64(0); at < size; {
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
		for at = start; at < end; {
			b := buf[:min(int64(len(buf)), end-at)]
			if _, err := f.ReadAt(b, at); err != nil {
				return err
			}
			if err := errors.Join(w.Bytes(n.Ref, uint64(at), b), progress()); err != nil {
				return err
			}
			at += int64(len(b))
		}
	}
	return nil
}
