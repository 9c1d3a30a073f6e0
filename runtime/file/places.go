package file

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// What watches a file (inotify, fanotify) shows it in fdinfo by the number of
// its inode, the device of its file system and a file handle
// (name_to_handle_at(2)); never by a path. A place is such an inode.
type place struct {
	dev, ino uint64 // as fdinfo shows them, which need not be those of stat(2)
	handle   string // type and bytes
}

// watched is a file that something watches: where it is, and where the record
// has what leads to it.
type watched struct {
	place
	what   string // for messages
	index  int    // of the record among others that have no place
	path   *string
	object *image.Ref
}

// findWatched finds what inotify and fanotify watch: by a path, or the open file
// that has none.
func (s *Set) findWatched() error {
	wanted := map[place]bool{}
	for _, d := range s.descs {
		for _, w := range d.watched {
			wanted[w.place] = true
		}
	}
	found, kept, err := s.findPlaces(wanted)
	if err != nil {
		return err
	}
	for _, d := range s.descs {
		for _, w := range d.watched {
			if *w.path = found[w.place]; *w.path != "" {
				continue
			}
			k := kept[w.place]
			if k == nil {
				return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), fail.Refuse("",
					fmt.Sprintf("%s is on inode %d of device %d:%d, which has no path in the container and is open in no task of it", w.what, w.ino, w.dev>>20, w.dev&0xfffff),
					"remove it (inotify_rm_watch, fanotify_mark), or close the descriptor, before the checkpoint")))
			}
			d.targets = append(d.targets, k.files...)
			complete := d.Complete
			d.Complete = func() {
				if complete != nil {
					complete()
				}
				*w.object = k.ref()
			}
		}
	}
	return nil
}

// handleFID asks for a handle by which an inode can be told but need not be
// found: every file system has one, overlayfs too (AT_HANDLE_FID of
// name_to_handle_at(2), Linux 6.5).
const handleFID = 0x200

// placeIn reads a place from a line of fdinfo (show_mark_fhandle in
// fs/notify/fdinfo.c).
func placeIn(line string) (p place, err error) {
	var kind uint32
	var bytes string
	for field := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(field, ":")
		var n int
		switch key {
		case "ino":
			n, err = fmt.Sscanf(value, "%x", &p.ino)
		case "sdev":
			n, err = fmt.Sscanf(value, "%x", &p.dev)
		case "fhandle-type":
			n, err = fmt.Sscanf(value, "%x", &kind)
		case "f_handle":
			n, bytes = 1, value
		default:
			continue
		}
		if n != 1 {
			return p, fmt.Errorf("fdinfo: %q: %w", line, err)
		}
	}
	raw, err := hex.DecodeString(bytes)
	if err != nil || len(raw) == 0 {
		return p, fmt.Errorf("fdinfo without a file handle: %q", line)
	}
	p.handle = handleOf(kind, raw)
	return p, nil
}

func handleOf(kind uint32, raw []byte) string {
	return string(binary.LittleEndian.AppendUint32(nil, kind)) + string(raw)
}

// is reports whether the file at a path from dir is the one that the place is.
func (p place) is(dir int, name string, flags int) bool {
	h, _, err := unix.NameToHandleAt(dir, name, flags|handleFID)
	return err == nil && handleOf(uint32(h.Type()), h.Bytes()) == p.handle
}

// Places remembers where places were found, over the looks that a checkpoint
// takes: finding one can take a walk through a file system, which is for the
// time that the container runs.
type Places struct{ paths map[place]string }

// NewPlaces returns an empty memory.
func NewPlaces() *Places { return &Places{paths: map[place]string{}} }

// search looks for places of one container.
type search struct {
	set    *Set
	mounts []mountedAt
	found  map[place]string
	gone   map[place]bool // that have no name left
}

type mountedAt struct {
	image.Mount
	dev uint64
}

// findPlaces finds places in the container: a path that leads to it, or an
// object of the image that has none. Those that cannot be found are in neither
// answer.
func (s *Set) findPlaces(wanted map[place]bool) (map[place]string, map[place]*keeper, error) {
	at, kept := &search{set: s, found: map[place]string{}, gone: map[place]bool{}}, map[place]*keeper{}
	if len(wanted) == 0 {
		return nil, nil, nil
	}
	if err := at.readDevices(); err != nil {
		return nil, nil, err
	}
	keep := func(missing map[place]bool) error {
		for p := range missing {
			if k := s.keeper(p); k != nil {
				kept[p] = k
			}
		}
		return nil
	}
	for _, way := range []func(map[place]bool) error{at.remember, at.decode, keep, at.walk} {
		missing := map[place]bool{}
		for p := range wanted {
			if at.found[p] == "" && kept[p] == nil {
				missing[p] = true
			}
		}
		if len(missing) == 0 {
			break
		}
		if err := way(missing); err != nil {
			return nil, nil, err
		}
	}
	for p, path := range at.found {
		s.Places.paths[p] = path
	}
	return at.found, kept, nil
}

// keeper is what holds a file that has no path: an object of the image.
type keeper struct {
	ref   func() image.Ref
	files []*Description // that must be written before
}

// keeper finds who holds a place.
func (s *Set) keeper(p place) *keeper {
	for _, r := range s.gone {
		if p.is(unix.AT_FDCWD, r.link, unix.AT_SYMLINK_FOLLOW) {
			return &keeper{ref: func() image.Ref { return r.Ref }}
		}
	}
	for _, d := range s.descs {
		if d.Record.Pid == 0 && d.Record.Kind != image.KindStdio && p.is(unix.AT_FDCWD, d.seen.path(), unix.AT_SYMLINK_FOLLOW) {
			return &keeper{ref: func() image.Ref { return d.Ref }, files: []*Description{d}}
		}
	}
	return nil
}

// readDevices reads which file systems the container's mounts are of.
func (at *search) readDevices() error {
	b, err := tracee.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", at.set.Init.Pid))
	if err != nil {
		return gone(at.set.Init.Pid, err)
	}
	devices := map[int]uint64{}
	for line := range bytes.Lines(b) {
		var id, parent int
		var major, minor uint64
		if n, _ := fmt.Sscanf(string(line), "%d %d %d:%d", &id, &parent, &major, &minor); n == 4 {
			devices[id] = major<<20 | minor // as the kernel has them (include/linux/kdev_t.h)
		}
	}
	for _, m := range at.set.Mounts {
		at.mounts = append(at.mounts, mountedAt{m, devices[m.ID]})
	}
	return nil
}

// of yields the mounts of a place's file system.
func (at *search) of(p place, f func(m *mountedAt) error) error {
	for i := range at.mounts {
		if at.mounts[i].dev == p.dev && at.found[p] == "" {
			if err := f(&at.mounts[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// leads reports whether a path of the container leads to a place.
func (at *search) leads(path string, p place) bool {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(at.set.Root.Fd()), path, &how)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	mnt, err := mountOf(fd, "")
	if err != nil {
		return false
	}
	same := false
	for i := range at.mounts {
		same = same || at.mounts[i].ID == mnt && at.mounts[i].dev == p.dev
	}
	return same && p.is(fd, "", unix.AT_EMPTY_PATH)
}

// remember takes what was found before and is still there, and what the room of
// memory file systems has listed anyway.
func (at *search) remember(wanted map[place]bool) error {
	for p := range wanted {
		before := at.set.Places.paths[p]
		if before == "" && at.set.Named != nil {
			before = path.Clean(at.set.Named(unix.Mkdev(uint32(p.dev>>20), uint32(p.dev&0xfffff)), p.ino))
		}
		if before != "" && at.leads(before, p) {
			at.found[p] = before
		}
	}
	return nil
}

// decode has the kernel find what handles name (open_by_handle_at(2)), which
// most file systems can, but overlayfs cannot as a rule.
func (at *search) decode(wanted map[place]bool) error {
	for p := range wanted {
		handle := unix.NewFileHandle(int32(binary.LittleEndian.Uint32([]byte(p.handle))), []byte(p.handle[4:]))
		err := at.of(p, func(m *mountedAt) error {
			dir, err := at.open(m)
			if err != nil || dir == nil {
				return err
			}
			defer dir.Close()
			fd, err := unix.OpenByHandleAt(int(dir.Fd()), handle, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
			if err != nil {
				return nil // it cannot
			}
			defer unix.Close(fd)
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil {
				return err
			}
			at.gone[p] = st.Nlink == 0
			name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if err == nil && at.leads(name, p) {
				at.found[p] = name
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// open opens the root directory of a mount; nil where the mount is of a single
// file, or covered by another.
func (at *search) open(m *mountedAt) (*os.File, error) {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(at.set.Root.Fd()), m.Point, &how)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
		return nil, nil
	}
	if err != nil {
		return nil, fail.On("mount "+m.Point, err)
	}
	dir := os.NewFile(uintptr(fd), m.Point)
	if mnt, err := mountOf(fd, ""); err != nil || mnt != m.ID {
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}

// mostEntries bounds a walk: two million names take some seconds.
const mostEntries = 2_000_000

// walk looks for what nothing else finds, through every directory of its file
// systems.
func (at *search) walk(wanted map[place]bool) error {
	for i := range at.mounts {
		m := &at.mounts[i]
		here := map[uint64][]place{}
		for p := range wanted {
			if p.dev == m.dev && at.found[p] == "" && !at.gone[p] {
				if at.leads(m.Point, p) { // a mount of a single file
					at.found[p] = m.Point
					continue
				}
				here[p.ino] = append(here[p.ino], p)
			}
		}
		if len(here) == 0 || m.FSType == "proc" { // its directories are never the same twice
			continue
		}
		if err := at.walkMount(m, here); err != nil {
			return fail.On("mount "+m.Point, err)
		}
	}
	return nil
}

func (at *search) walkMount(m *mountedAt, here map[uint64][]place) error {
	root, err := at.open(m)
	if err != nil || root == nil {
		return err
	}
	defer root.Close()
	entries := 0
	for dirs := []string{"."}; len(dirs) > 0 && entries < mostEntries && len(here) > 0; {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		how := unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOATIME | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		}
		fd, err := unix.Openat2(int(root.Fd()), dir, &how)
		if err != nil {
			continue // another mount, or gone
		}
		err = eachEntry(fd, func(ino uint64, kind byte, name string) {
			entries++
			if kind == unix.DT_DIR {
				dirs = append(dirs, path.Join(dir, name))
			}
			for _, p := range here[ino] {
				if p.is(fd, name, 0) {
					at.found[p] = path.Join(m.Point, dir, name)
					delete(here, ino)
				}
			}
		})
		if errors.Is(err, unix.ENOENT) {
			err = nil // it was removed
		}
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
	}
	return nil
}

// eachEntry lists a directory with the numbers of its inodes.
func eachEntry(fd int, f func(ino uint64, kind byte, name string)) error {
	const inoAt, lengthAt, kindAt, nameAt = 0, 16, 18, 19 // struct linux_dirent64
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			return err
		}
		for rest := buf[:n]; len(rest) > 0; {
			one := rest[:binary.LittleEndian.Uint16(rest[lengthAt:])]
			rest = rest[len(one):]
			name := unix.ByteSliceToString(one[nameAt:])
			if name != "." && name != ".." {
				f(binary.LittleEndian.Uint64(one[inoAt:]), one[kindAt], name)
			}
		}
	}
}
