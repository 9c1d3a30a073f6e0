package file

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// directory is an open directory. Its position is a number that the file system
// gives: on disks of the same entry for ever, in a tmpfs of the order in which
// entries were made (simple_offset_add in fs/libfs.c), in a merged directory of an
// overlay of a list that the open directory keeps for itself. So the names still
// to come are saved, and in the directory that restore finds, or has made, the
// position is looked for that they stand behind.
var directory = kind{
	name: image.KindDirectory,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFDIR },
	read: func(s *Set, d *Description) error {
		if s.external(d.seen) {
			return fail.Refuse("", "the directory lies outside the container, or on a mount that it has unmounted", "close it before the checkpoint")
		}
		d.Record.Kind, d.Record.Mode = image.KindDirectory, d.seen.stat.Mode
		if err := s.readOn(d); err != nil {
			return err
		}
		return s.name(d)
	},
	open: openNamed,
	finish: func(m *Maker, b *tracee.Batch, fd int, f *image.File) {
		if f.Reading == nil {
			seek(m, b, fd, f)
		}
	},
}

// maxRest bounds the names that are saved of one directory.
const maxRest = 1 << 18

// readOn reads the names that are still to come. Where there are too many, the
// position alone is saved, which will do in the same directory on a disk.
func (s *Set) readOn(d *Description) error {
	if s.Running || d.seen.pos == 0 {
		return nil
	}
	var rest []dirent
	err := s.reader(d, func(f *os.File) (err error) {
		rest, _, err = list(f, maxRest+1)
		return err
	})
	switch {
	case errors.Is(err, unix.ENOENT): // it is removed, and lists nothing
		return nil
	case err != nil:
		return fmt.Errorf("read the names still to come: %w", err)
	case len(rest) > maxRest && s.Remade != nil && s.Remade(d.seen.stat.Dev):
		return fail.Refuse("", fmt.Sprintf("it is a directory in memory that was read half-way, with more than %d names to come", maxRest), "read it to its end, or rewind it, before the checkpoint")
	case len(rest) > maxRest:
		return nil
	}
	d.Record.Reading = &image.Reading{Rest: make([]string, len(rest))}
	for i := range rest {
		d.Record.Reading.Rest[i] = rest[i].name
	}
	return nil
}

// reader has do read a directory from where its task is. That moves nothing but
// in an overlay: there positions are of a list that the open directory has for
// itself (struct ovl_dir_file), and reading from it moves the task's own. It is
// moved back, by the guardian if we die.
func (s *Set) reader(d *Description, do func(f *os.File) error) error {
	if s.fsType(d.seen) != "overlay" || s.Position == nil {
		f, err := os.OpenFile(d.seen.path(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME, 0)
		if err != nil {
			return gone(d.seen.proc.Pid, err)
		}
		defer f.Close()
		if _, err := unix.Seek(int(f.Fd()), d.seen.pos, unix.SEEK_SET); err != nil {
			return err
		}
		return do(f)
	}
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	kept, err := s.Position(f, d.seen.pos)
	if err != nil {
		return err
	}
	if err = do(f); err == nil {
		err = fault.Point("directory.read")
	}
	_, back := unix.Seek(int(f.Fd()), d.seen.pos, unix.SEEK_SET)
	return errors.Join(err, back, kept())
}

// dirent is an entry of a directory and the position at which it is read next.
type dirent struct {
	name string
	at   int64
}

// list reads entries from where a directory stands, most of them at the most, and
// tells the position behind them.
func list(f *os.File, most int) (all []dirent, end int64, err error) {
	fd := int(f.Fd())
	if end, err = unix.Seek(fd, 0, unix.SEEK_CUR); err != nil {
		return nil, 0, err
	}
	buf := make([]byte, 64<<10)
	for len(all) < most {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			return all, end, err
		}
		for b := buf[:n]; len(b) > 0; { // struct linux_dirent64: ino, off, reclen, type, name
			length := binary.LittleEndian.Uint16(b[16:])
			name, _, _ := bytes.Cut(b[19:length], []byte{0})
			all = append(all, dirent{string(name), end})
			end = int64(binary.LittleEndian.Uint64(b[8:]))
			b = b[length:]
		}
	}
	return all, end, nil
}

// cursor is a directory that was read half-way, at restore.
type cursor struct {
	record *image.File
	file   *os.File
	rest   map[string]bool
}

// turnDirectories puts directories that were read half-way where the names stand
// that are still to come. All that restore makes in them is there by now.
func (m *Maker) turnDirectories() error {
	same := map[fileID][]*cursor{}
	defer func() {
		for _, c := range slices.Concat(slices.Collect(maps.Values(same))...) {
			_ = c.file.Close()
		}
	}()
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		if f == nil || f.Reading == nil {
			continue
		}
		c, id, err := m.cursor(ref, f)
		if err != nil {
			return fail.On(f.Kind+" "+f.Path, err)
		}
		same[id] = append(same[id], c)
	}
	for id, readers := range same {
		if err := m.turn(id, readers); err != nil {
			f := readers[0].record
			return fail.On(f.Kind+" "+f.Path, fmt.Errorf("find how far it was read: %w", err))
		}
	}
	return nil
}

func (m *Maker) cursor(ref image.Ref, f *image.File) (c *cursor, id fileID, err error) {
	c = &cursor{record: f, rest: map[string]bool{}}
	for _, name := range f.Reading.Rest {
		c.rest[name] = true
	}
	if late := m.late[ref]; late != nil {
		var fd int
		fd, err = unix.FcntlInt(late.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		c.file = os.NewFile(uintptr(fd), late.Name())
	} else {
		c.file, err = m.stub.Take(m.fds[ref])
	}
	if err != nil {
		return nil, id, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(c.file.Fd()), &st); err != nil {
		return nil, id, errors.Join(err, c.file.Close())
	}
	return c, fileID{st.Dev, st.Ino}, nil
}

// turn gives all readers of one directory their positions.
func (m *Maker) turn(id fileID, readers []*cursor) error {
	// What is still to come for one is so for all who have read less.
	slices.SortFunc(readers, func(a, b *cursor) int { return cmp.Compare(len(a.rest), len(b.rest)) })
	for _, c := range readers {
		all, _, err := c.list()
		if err != nil {
			return err
		}
		_, again := c.position(all)
		if len(again) == 0 || m.Remade == nil || !m.Remade(id.dev) {
			continue
		}
		if err := m.renew(c, again); err != nil {
			return err
		}
	}
	for _, c := range readers {
		all, _, err := c.list()
		if err != nil {
			return err
		}
		first, again := c.position(all)
		if len(again) > 0 {
			m.Warn("a directory that was read half-way lists its names in another order now; some will be read again", "path", c.record.Path, "names", len(again))
		}
		if first < len(all) {
			_, err = unix.Seek(int(c.file.Fd()), all[first].at, unix.SEEK_SET)
		} else {
			// Not by seeking: ext4 takes the beginning for where it is, if the first
			// read of an open directory is at its end (last_pos in ext4_dx_readdir,
			// fs/ext4/dir.c), and lists nothing after a rewind.
			_, _, err = list(c.file, 1<<62)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// list reads the whole directory, through a description of our own.
func (c *cursor) list() ([]dirent, int64, error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", c.file.Fd()), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	return list(f, 1<<62)
}

// position finds the first entry that is still to come, and what stands behind it
// and has been read already.
func (c *cursor) position(all []dirent) (first int, again []string) {
	first = slices.IndexFunc(all, func(e dirent) bool { return c.rest[e.name] })
	if first < 0 {
		return len(all), nil
	}
	for _, e := range all[first:] {
		if !c.rest[e.name] && e.name != "." && e.name != ".." {
			again = append(again, e.name)
		}
	}
	return first, again
}

// renew makes entries of a tmpfs the newest, and so the first that are listed, by
// giving them another name and theirs again. A mount point keeps its place.
func (m *Maker) renew(c *cursor, names []string) error {
	fd, err := m.Send(m.stub, c.file)
	if err != nil {
		return err
	}
	aside := fmt.Sprintf(".ocickpt-%x", m.head.Header.ID)
	slices.Reverse(names) // the last that is made is listed first
	for chunk := range slices.Chunk(names, 512) {
		var b tracee.Batch
		aside := b.String(aside)
		for _, name := range chunk {
			at := b.String(name)
			b.Try(unix.SYS_RENAMEAT2, tracee.W(fd), at, tracee.W(fd), aside, tracee.W(unix.RENAME_NOREPLACE))
			b.Try(unix.SYS_RENAMEAT2, tracee.W(fd), aside, tracee.W(fd), at, tracee.W(unix.RENAME_NOREPLACE))
		}
		if _, err := m.stub.Run(&b); err != nil {
			return err
		}
		for i, name := range chunk {
			if err := b.Err(2*i + 1); b.Err(2*i) == nil && err != nil {
				return fmt.Errorf("%s cannot be named again: %w", name, err)
			}
		}
	}
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	_, err = m.stub.Run(&b)
	return err
}
