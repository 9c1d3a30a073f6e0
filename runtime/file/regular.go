package file

import (
	"encoding/binary"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// creationFlags act once, at the open(2) that made the file; opening it again
// must neither create nor truncate it.
const creationFlags = unix.O_CREAT | unix.O_EXCL | unix.O_TRUNC | unix.O_NOCTTY | unix.O_NOFOLLOW

// openFlags are the flags of open(2) that a description goes on having. O_ASYNC
// has to be set by fcntl(2); O_DIRECTORY and O_TMPFILE make the open another one.
const openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_NONBLOCK | unix.O_SYNC | unix.O_DIRECT | kernelLargefile | unix.O_NOATIME | unix.O_PATH

// kernelLargefile is O_LARGEFILE as fdinfo shows it; to user space of 64 bits it
// is 0.
const kernelLargefile = 0o100000

// openPath adds the open of a recorded path. RESOLVE_NO_SYMLINKS: the kernel
// gave us the path without links, and a link in its place now leads to another
// file. O_NOFOLLOW is for those who used it, and shows in F_GETFL.
func openPath(b *tracee.Batch, path string, flags uint32) int {
	flags = flags&(openFlags|unix.O_DIRECTORY|unix.O_NOFOLLOW) | unix.O_CLOEXEC
	if flags&unix.O_PATH != 0 { // openat2(2) wants no others
		flags &= unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	} else {
		flags |= unix.O_NOCTTY
	}
	var how []byte
	for _, v := range []uint64{uint64(flags), 0, unix.RESOLVE_NO_SYMLINKS} {
		how = binary.LittleEndian.AppendUint64(how, v)
	}
	return b.Add(unix.SYS_OPENAT2, tracee.W(unix.AT_FDCWD), b.String(path), b.Put(how), tracee.W(len(how)))
}

func seek(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
	if f.Pos != 0 {
		b.Add(unix.SYS_LSEEK, tracee.W(fd), tracee.W(f.Pos), tracee.W(unix.SEEK_SET))
	}
}

// name finds the path of a description, or the file that has none.
func (s *Set) name(d *Description) error {
	v := s.place(d)
	at, err := s.locate(v, d.seen.link, &d.seen.stat, d.seen.path())
	d.Record.Path, d.Record.Mnt = at.path, at.mnt
	if at.gone == nil {
		s.inside(d, v)
	}
	d.take(at.gone)
	return err
}

func openNamed(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
	switch {
	case f.Removed != 0:
		return m.openRemoved(b, f), nil
	case f.Kind == image.KindDirectory:
		return m.openPath(b, f, f.Flags|unix.O_DIRECTORY), nil
	}
	return m.openPath(b, f, f.Flags&^unix.O_DIRECTORY), nil
}

// openPath adds the open of a file by its path, or where another mount has
// covered that, by the descriptor that it is kept with.
func (m *Maker) openPath(b *tracee.Batch, f *image.File, flags uint32) int {
	if f.Mnt == 0 {
		return openPath(b, f.Path, flags)
	}
	fd := m.covered[mount.Place{Mount: int(f.Mnt), Path: f.Path}]
	if f.Mode&unix.S_IFMT == unix.S_IFLNK {
		return b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0))
	}
	return m.reopen(b, fd, flags&(openFlags|unix.O_DIRECTORY)|unix.O_NOCTTY)
}

// regular is a file with a name on some file system.
var regular = kind{
	name: image.KindRegular,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFREG },
	read: func(s *Set, d *Description) error {
		if s.external(d.seen) {
			return fail.Refuse("", "the file lies outside the container, or on a mount that it has unmounted", "close it before the checkpoint, or leave it out (--external)")
		}
		st := &d.seen.stat
		d.Record.Kind = image.KindRegular
		d.Record.Size, d.Record.Mtime, d.Record.Mode = st.Size, st.Mtim.Nano(), st.Mode
		return s.name(d)
	},
	open:   openNamed,
	finish: seek,
}

// pathKind is a descriptor opened with O_PATH: a place, not a file.
var pathKind = kind{
	name: image.KindPath,
	is:   func(_ *Set, one *seen) bool { return one.flags&unix.O_PATH != 0 },
	read: func(s *Set, d *Description) error {
		if s.external(d.seen) {
			return fail.Refuse("", "the path lies outside the container, or on a mount that it has unmounted", "close it before the checkpoint")
		}
		d.Record.Kind, d.Record.Mode = image.KindPath, d.seen.stat.Mode
		return s.name(d)
	},
	open: openNamed,
}

// statelessDevices are those whose open descriptors hold nothing.
var statelessDevices = []uint64{
	unix.Mkdev(1, 3), unix.Mkdev(1, 5), unix.Mkdev(1, 7), // null, zero, full
	unix.Mkdev(1, 8), unix.Mkdev(1, 9), // random, urandom
}

func unsupportedDevice(rdev uint64) string {
	if slices.Contains(statelessDevices, rdev) {
		return ""
	}
	if major := unix.Major(rdev); major == 5 || major >= 136 && major <= 143 || major == 4 {
		return "terminals are not supported yet"
	}
	return "the state of this device is known only to its driver"
}

// device is a device node without state of its own.
var device = kind{
	name: image.KindDevice,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFCHR || one.format() == unix.S_IFBLK },
	read: func(s *Set, d *Description) error {
		st := &d.seen.stat
		if why := unsupportedDevice(st.Rdev); why != "" || d.seen.format() == unix.S_IFBLK {
			return fail.Refuse("", why, "close it before the checkpoint")
		}
		d.Record.Kind, d.Record.Path = image.KindDevice, d.seen.link
		d.Record.Mode, d.Record.Rdev = st.Mode, st.Rdev
		if s.external(d.seen) { // the host's /dev/null is the container's
			return nil
		}
		return s.inPlace(d)
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		if why := unsupportedDevice(f.Rdev); why != "" {
			return 0, fail.Refuse(f.Path, why, "")
		}
		return m.openPath(b, f, f.Flags), nil
	},
}

// proc is a file of a file system that the kernel makes up as it is read.
var proc = kind{
	name: image.KindProc,
	is: func(s *Set, one *seen) bool {
		switch s.fsType(one) {
		case "proc", "sysfs", "cgroup", "cgroup2":
			return one.format() == unix.S_IFREG || one.format() == unix.S_IFDIR
		}
		return false
	},
	read: func(s *Set, d *Description) error {
		d.Record.Kind, d.Record.Path, d.Record.Mode = image.KindProc, strings.TrimSuffix(d.seen.link, deletedSuffix), d.seen.stat.Mode
		if s.fsType(d.seen) == "proc" {
			d.Record.Pid = pidInPath(d.Record.Path, s.view(d.seen).Mounts, d.seen.mnt)
			if ended, err := s.outlived(d); err != nil || ended {
				return err
			}
			if err := s.ofThread(d, threadInPath(d.Record.Path, d.Record.Pid)); err != nil {
				return err
			}
		}
		if err := s.inPlace(d); err != nil || d.Record.Mnt == 0 || d.Record.Pid == 0 {
			return err
		}
		return fail.Refuse("", "it belongs to a task and the container has mounted something over it; that is not supported", "close it before the checkpoint")
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return m.openPath(b, f, f.Flags), nil
	},
	finish: seek,
}
