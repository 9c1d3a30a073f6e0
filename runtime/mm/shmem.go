package mm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Segment is shared anonymous memory: a tmpfs file without a name, made by
// mmap(2) with MAP_SHARED|MAP_ANONYMOUS or by memfd_create(2).
type Segment struct {
	object.Object
	Record *image.Shmem
	mapped bool   // shared, by somebody
	path   string // of a link in /proc through which it can be opened
}

// segment finds the memory behind a mapping or descriptor.
func (s *Shared) segment(id inode, link, name string) (*Segment, error) {
	if seg := s.segments[id]; seg != nil {
		return seg, nil
	}
	seg := &Segment{Record: &image.Shmem{}, path: link}
	seg.Object = object.Object{Type: image.TypeShmem, Record: seg.Record}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return nil, fmt.Errorf("shared memory %s: %w", name, err)
	}
	seg.Record.Size, seg.Record.Mode = uint64(st.Size), st.Mode&0o7777
	if memfd, ok := strings.CutPrefix(name, "/memfd:"); ok {
		seg.Record.Memfd = true
		seg.Record.Name = strings.TrimSuffix(memfd, deletedSuffix)
	}
	s.segments[id] = seg
	s.order = append(s.order, seg)
	return seg, nil
}

// Memfd returns the segment of a memfd that is open as link.
func (s *Shared) Memfd(st *unix.Stat_t, link, name string) (*Segment, error) {
	id := inode{fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev)), st.Ino}
	return s.segment(id, link, name)
}

// Seal reads a memfd's seals.
func (s *Segment) seals(f *os.File) {
	if n, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err == nil && s.Record.Memfd {
		s.Record.Seals = uint32(n)
	}
}

// Details reads what may still change before the stop: size and seals.
func (s *Segment) Details() error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer f.Close()
	s.seals(f)
	if s.mapped && s.Record.Seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0 {
		return fail.Refuse("", "a memfd sealed against writing that is mapped is not supported yet", "unmap it before the checkpoint")
	}
	st, err := f.Stat()
	if err == nil {
		s.Record.Size = uint64(st.Size())
	}
	return err
}

// Save writes the segment's pages, holes left out.
func (s *Segment) Save(out *Saver) error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer f.Close()
	size := int64(s.Record.Size)
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			return fmt.Errorf("shared memory: %w", err)
		}
		end, err := unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("shared memory: %w", err)
		}
		start &^= PageSize - 1
		err = out.add(extent{uint64(start), uint64(end+PageSize-1) &^ (PageSize - 1)}, false, func(addr uint64, b []byte) error {
			n, err := f.ReadAt(b, int64(addr))
			if errors.Is(err, io.EOF) {
				clear(b[n:])
				err = nil
			}
			return err
		})
		if err != nil {
			return err
		}
		at = end
	}
	return out.flush()
}

// CreateShmem adds the calls that make shared memory in a stub.
func CreateShmem(b *tracee.Batch, rec *image.Shmem, addr uint64) int {
	if !rec.Memfd {
		b.Add(unix.SYS_MMAP, tracee.W(addr), tracee.W((rec.Size+PageSize-1)&^uint64(PageSize-1)), tracee.W(unix.PROT_READ|unix.PROT_WRITE),
			tracee.W(unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED_NOREPLACE), tracee.W(^uint64(0)), tracee.W(0))
		return -1
	}
	return b.Add(unix.SYS_MEMFD_CREATE, b.String(rec.Name), tracee.W(unix.MFD_ALLOW_SEALING))
}
