package mm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Segment is shared memory: a file of a tmpfs or hugetlbfs without a name, made
// by mmap(2) with MAP_SHARED|MAP_ANONYMOUS, by memfd_create(2), or removed.
type Segment struct {
	object.Object
	Record *image.Shmem
	path   string // of a link in /proc through which it can be opened

	NS              uint64 // of a System V segment: inode of its ipc namespace
	attached, found uint64 // likewise: areas, and those that were seen
}

// anonymousShared tells the names of shared memory that mmap made. The last is
// of memory that was given a name (PR_SET_VMA_ANON_NAME of prctl(2)).
func anonymousShared(name string) bool {
	return name == "/dev/zero"+deletedSuffix || name == hugeMemory || strings.HasPrefix(name, namedShared)
}

func isMemfd(name string) bool {
	return strings.HasPrefix(name, "/memfd:") && strings.HasSuffix(name, deletedSuffix)
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
	switch {
	case isMemfd(name):
		seg.Record.Memfd = true
		seg.Record.Name = strings.TrimSuffix(strings.TrimPrefix(name, "/memfd:"), deletedSuffix)
	case !anonymousShared(name):
		seg.Record.Path = strings.TrimSuffix(name, deletedSuffix)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(link, &fs); err != nil {
		return nil, fmt.Errorf("shared memory %s: %w", name, err)
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		seg.Record.HugePage = uint64(fs.Bsize)
	}
	s.segments[id] = seg
	s.order = append(s.order, seg)
	return seg, nil
}

// Open returns the segment of a memfd or removed file that is open as link.
func (s *Shared) Open(st *unix.Stat_t, link, name string) (*Segment, error) {
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
	st, err := f.Stat()
	if err == nil && s.Record.SysV == nil { // whose file consists of whole pages
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
	return out.finish(s.plan(f, out))
}

func (s *Segment) plan(f *os.File, out *Saver) error {
	size := int64(s.Record.Span())
	if s.Record.SysV == nil {
		size = int64(s.Record.Size)
	}
	for at := int64(0); at < size; {
		start, end, err := s.data(f, at)
		if errors.Is(err, unix.ENXIO) {
			break
		}
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
	return nil
}

// data finds the next stretch with content from at on. A hugetlbfs does not
// tell holes; they read as zeros, of which nothing is saved.
func (s *Segment) data(f *os.File, at int64) (start, end int64, err error) {
	if s.Record.HugePage != 0 {
		return at, int64(s.Record.Span()), nil
	}
	if start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA); err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	return start, end, err
}

// memfdFlags are those that a memfd was made with, or might as well have been.
// That it may be executed is said outright, for vm.memfd_noexec makes the other
// the default; kernels before 6.3 know neither, and no seal that tells of it.
func memfdFlags(rec *image.Shmem) uint64 {
	flags := unix.MFD_ALLOW_SEALING | hugeFlags(rec.HugePage, unix.MFD_HUGETLB)
	switch {
	case rec.Mode&0o111 != 0 && unix.Access(memfdNoexec, unix.F_OK) == nil:
		flags |= unix.MFD_EXEC
	case rec.Mode&0o111 == 0 && rec.Seals&unix.F_SEAL_EXEC != 0:
		flags |= unix.MFD_NOEXEC_SEAL
	}
	return flags
}

// memfdNoexec exists since kernels know the flags (memfd_create(2)), in pid
// namespaces' own /proc too.
const memfdNoexec = "/proc/sys/vm/memfd_noexec"

// ReadonlySegments lists the shared memory that an address space maps without
// the right to make it writable.
func ReadonlySegments(m *image.MM) (refs []image.Ref) {
	for i := range m.Areas {
		if a := &m.Areas[i]; a.Kind == image.AreaShmem && a.Shared && !has(a, writable) {
			refs = append(refs, a.File)
		}
	}
	return refs
}

// CreateShmem adds the call that makes shared memory in a stub, as a descriptor
// whose call it returns, or, for memory of mmap's, at addr; then it returns -1.
func CreateShmem(b *tracee.Batch, rec *image.Shmem, addr uint64) int {
	switch {
	case rec.Path != "":
		return b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String(rec.Path), tracee.W(unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC), tracee.W(0o600))
	case rec.Memfd:
		return b.Add(unix.SYS_MEMFD_CREATE, b.String(rec.Name), tracee.W(memfdFlags(rec)))
	}
	flags := unix.MAP_SHARED | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE | unix.MAP_FIXED_NOREPLACE | hugeFlags(rec.HugePage, unix.MAP_HUGETLB)
	b.Add(unix.SYS_MMAP, tracee.W(addr), tracee.W((rec.Size+PageSize-1)&^uint64(PageSize-1)), tracee.W(unix.PROT_READ|unix.PROT_WRITE),
		tracee.W(flags), tracee.W(^uint64(0)), tracee.W(0))
	return -1
}
