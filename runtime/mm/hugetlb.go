package mm

import (
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Memory of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst) is saved
// as any other, page by ordinary page. At restore a huge page is there whole or
// not at all, neither write(2) nor UFFDIO_COPY of less makes one, and the
// hugetlb cgroup charges whoever runs when it comes to be, whosever memory it
// is: so it is always the stub that makes them.

// hugeMemory is what the kernel calls anonymous memory of huge pages.
const hugeMemory = "/anon_hugepage" + deletedSuffix

// hugeShift is where mmap(2) and memfd_create(2) take the binary logarithm of
// the size of huge pages.
const hugeShift = 26

// HugeSegment is SHM_HUGETLB of shmget(2), with the size of the pages; 0 where they
// are ordinary ones.
func HugeSegment(size uint64) uint64 {
	const shmHugetlb = 0o4000
	return hugeFlags(size, shmHugetlb)
}

// hugeFlags are the flags that ask for huge pages of a size; one is the call's own.
func hugeFlags(size uint64, one uint64) uint64 {
	if size == 0 {
		return 0
	}
	return one | uint64(bits.TrailingZeros64(size))<<hugeShift
}

// hugePages makes the huge pages of one area or segment as they are needed.
type hugePages struct {
	size uint64
	stub *tracee.Stub
	made map[uint64]bool
	// call adds the call that makes the one at addr, an address or an offset.
	call func(b *tracee.Batch, addr uint64)
}

// need makes the huge pages from addr on for n bytes.
func (h *hugePages) need(addr, n uint64) error {
	var b tracee.Batch
	for at := addr &^ (h.size - 1); at < addr+n; at += h.size {
		if !h.made[at] {
			h.made[at] = true
			h.call(&b, at)
		}
	}
	if _, err := h.stub.Run(&b); err != nil {
		return noHugePages(h.size, err)
	}
	return nil
}

func noHugePages(size uint64, err error) error {
	return &fail.Error{
		Cause:  fmt.Errorf("huge pages of %d KiB: %w", size>>10, err),
		Remedy: "set more of them aside (vm.nr_hugepages), and allow them to the container (linux.resources.hugepageLimits)",
	}
}

// newHugePages is for private memory: areas of a stub.
func newHugePages(s *tracee.Stub, size uint64) *hugePages {
	return &hugePages{size: size, stub: s, made: map[uint64]bool{}, call: func(b *tracee.Batch, addr uint64) {
		b.Add(unix.SYS_MADVISE, tracee.W(addr), tracee.W(size), tracee.W(unix.MADV_POPULATE_WRITE))
	}}
}

// hugeSegment writes to shared memory of huge pages through a mapping.
type hugeSegment struct {
	pages hugePages
	mem   []byte
}

// SegmentWriter is what writes the pages of shared memory: file itself, which
// the stub has open as fd, or what takes its place for huge pages. The caller
// hands it to a Filler, which closes it.
func SegmentWriter(rec *image.Shmem, s *tracee.Stub, fd int, file *os.File) (Writer, error) {
	if rec.HugePage == 0 {
		return file, nil
	}
	defer file.Close()
	h := &hugeSegment{pages: hugePages{size: rec.HugePage, stub: s, made: map[uint64]bool{}, call: func(b *tracee.Batch, off uint64) {
		b.Add(unix.SYS_FALLOCATE, tracee.W(fd), tracee.W(0), tracee.W(off), tracee.W(rec.HugePage))
	}}}
	if rec.Span() == 0 {
		return h, nil
	}
	var err error
	h.mem, err = unix.Mmap(int(file.Fd()), 0, int(rec.Span()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of huge pages: %w", rec.Size, err)
	}
	return h, nil
}

func (h *hugeSegment) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > int64(len(h.mem)) {
		return 0, errors.New("beyond the end of shared memory")
	}
	if err := h.pages.need(uint64(off), uint64(len(b))); err != nil {
		return 0, err
	}
	return copy(h.mem[off:], b), nil
}

func (h *hugeSegment) Close() error {
	if h.mem == nil {
		return nil
	}
	return unix.Munmap(h.mem)
}
