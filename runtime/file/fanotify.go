package file

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// fanotify is a group of marks on files, mounts and file systems (fanotify(7)). It
// takes CAP_SYS_ADMIN for most, of the bundle at a restore too.
var fanotify = kind{
	name: image.KindFanotify,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[fanotify]" },
	read: func(s *Set, d *Description) error {
		rec := &image.Fanotify{}
		d.Record.Kind, d.Record.Fanotify = image.KindFanotify, rec
		for line := range bytes.Lines(d.seen.info) {
			rest, ok := strings.CutPrefix(string(line), "fanotify ")
			if !ok {
				continue
			}
			if n, _ := fmt.Sscanf(rest, "flags:%x event-flags:%x", &rec.Flags, &rec.EventFlags); n == 2 {
				continue
			}
			if err := s.readMark(d, rest); err != nil {
				return err
			}
		}
		for i := range d.watched {
			at := &rec.Marks[d.watched[i].index]
			d.watched[i].path, d.watched[i].object = &at.Path, &at.Object
		}
		if rec.Flags&(unix.FAN_CLASS_CONTENT|unix.FAN_CLASS_PRE_CONTENT) != 0 {
			return fail.Refuse("", "it decides on accesses to files (FAN_CLASS_CONTENT): whoever waits for it would wait as long as the container is stopped, and for ever once it is gone", "close it before the checkpoint")
		}
		return d.nothingWaits()
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return b.Add(unix.SYS_FANOTIFY_INIT, tracee.W(f.Fanotify.Flags|unix.FAN_CLOEXEC), tracee.W(f.Fanotify.EventFlags)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) },
}

// nothingWaits refuses events that nobody has read: they hold files open, and only
// the kernel makes them.
func (d *Description) nothingWaits() error {
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	waiting, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
	if err == nil && waiting > 0 {
		err = fail.Refuse("", fmt.Sprintf("%d bytes of events wait to be read from it, and nobody can put them back", waiting), "try again")
	}
	return err
}

// readMark reads one mark from fdinfo (fanotify_fdinfo in fs/notify/fdinfo.c).
func (s *Set) readMark(d *Description, line string) error {
	var m image.Mark
	var mnt int
	var dev uint64
	fields := "mflags:%x mask:%x ignored_mask:%x"
	into := []any{&m.Flags, &m.Mask, &m.Ignored}
	on := slices.IndexFunc([]string{"ino:", "mnt_id:", "sdev:"}, func(key string) bool { return strings.HasPrefix(line, key) })
	var err error
	switch on {
	case 0:
		_, err = fmt.Sscanf(line, "ino:%x sdev:%x "+fields, append([]any{new(uint64), new(uint64)}, into...)...)
		if err != nil {
			break
		}
		var at place
		at, err = placeIn(line)
		d.watched = append(d.watched, watched{place: at, what: "a mark of it", index: len(d.Record.Fanotify.Marks)})
	case 1:
		if _, err = fmt.Sscanf(line, "mnt_id:%x "+fields, append([]any{&mnt}, into...)...); err != nil {
			break
		}
		m.Flags |= unix.FAN_MARK_MOUNT
		i := slices.IndexFunc(s.Mounts, func(one image.Mount) bool { return one.ID == mnt })
		if i < 0 {
			return fail.Refuse("", "it has a mark on a mount that is not one of the container's", "remove it (fanotify_mark) before the checkpoint")
		}
		m.Path = s.Mounts[i].Point
	case 2:
		if _, err = fmt.Sscanf(line, "sdev:%x "+fields, append([]any{&dev}, into...)...); err != nil {
			break
		}
		m.Flags |= unix.FAN_MARK_FILESYSTEM
		if m.Path, err = s.mountedFrom(dev); err == nil && m.Path == "" {
			return fail.Refuse("", "it has a mark on a file system that is not mounted in the container", "remove it (fanotify_mark) before the checkpoint")
		}
	default:
		return fail.Refuse("", "it has a mark of a kind that is not known: "+strings.TrimSpace(line), "remove it (fanotify_mark) before the checkpoint")
	}
	if err != nil {
		return fmt.Errorf("fdinfo: %q: %w", line, err)
	}
	d.Record.Fanotify.Marks = append(d.Record.Fanotify.Marks, m)
	return nil
}

// mountedFrom is where a file system is mounted in the container.
func (s *Set) mountedFrom(dev uint64) (string, error) {
	at := &search{set: s}
	if err := at.readDevices(); err != nil {
		return "", err
	}
	for _, m := range at.mounts {
		if m.dev == dev {
			return m.Point, nil
		}
	}
	return "", nil
}

// mark gives fanotify its marks.
func (m *Maker) mark(ref image.Ref, f *image.File) error {
	for some := range slices.Chunk(f.Fanotify.Marks, atOnce) {
		err := m.addMarks(m.identityOf(f.Opener), m.fds[ref], some)
		if denied(err) {
			err = m.addMarks(m.bundle, m.fds[ref], some)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addMarks adds some marks. What a mark ignores is a call of its own.
func (m *Maker) addMarks(who Identity, fd int, some []image.Mark) error {
	const on = unix.FAN_MARK_MOUNT | unix.FAN_MARK_FILESYSTEM | unix.FAN_MARK_EVICTABLE
	at := func(i int) (string, image.Ref) { return some[i].Path, some[i].Object }
	checked := func(int, int64) error { return nil }
	add := func(b *tracee.Batch, path string, flags uint32, mask uint64) int {
		cwd := unix.AT_FDCWD
		return b.Try(unix.SYS_FANOTIFY_MARK, tracee.W(fd), tracee.W(flags|unix.FAN_MARK_ADD), tracee.W(mask), tracee.W(cwd), b.String(path))
	}
	return m.onFiles(who, len(some), at, func(b *tracee.Batch, i int, path string) int {
		one := &some[i]
		call := -1
		if one.Mask != 0 {
			call = add(b, path, one.Flags&on, one.Mask)
		}
		if one.Ignored != 0 {
			how := one.Flags &^ uint32(unix.FAN_MARK_EVICTABLE)
			if how&unix.FAN_MARK_IGNORE == 0 {
				how |= unix.FAN_MARK_IGNORED_MASK
			}
			if call >= 0 {
				b.Calls[call].Tolerate = false
			}
			call = add(b, path, how, one.Ignored)
		}
		return call
	}, checked)
}
