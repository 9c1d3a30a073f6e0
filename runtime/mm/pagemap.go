package mm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// extent is a range of pages in memory, byte addresses.
type extent struct{ start, end uint64 }

// pagemap finds the pages of a process that are its own: present or swapped
// out, not a file's, not the kernel's page of zeros.
type pagemap struct {
	file *os.File
	scan bool // PAGEMAP_SCAN works here
}

// noPagemapScan forces the way of kernels before 6.7, for tests.
var noPagemapScan = os.Getenv("OCICKPT_NO_PAGEMAP_SCAN") != ""

func openPagemap(pid int) (*pagemap, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, gone(pid, err)
	}
	return &pagemap{file: f, scan: !noPagemapScan}, nil
}

func (p *pagemap) Close() error { return p.file.Close() }

// Categories of PAGEMAP_SCAN (include/uapi/linux/fs.h).
const (
	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPfnZero = 1 << 5
	pageIsGuard   = 1 << 8

	pagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)
)

// scanArg is struct pm_scan_arg.
type scanArg struct {
	size, flags       uint64
	start, end        uint64
	walkEnd           uint64
	vec               unsafe.Pointer // and no number: goroutines' stacks move
	vecLen            uint64
	maxPages          uint64
	categoryInverted  uint64
	categoryMask      uint64
	categoryAnyofMask uint64
	returnMask        uint64
}

// pageRegion is struct page_region.
type pageRegion struct{ start, end, categories uint64 }

// found is a run of pages in one of the ranges that were asked for.
type found struct {
	extent
	in    int  // index of the range
	guard bool // not to be touched (MADV_GUARD_INSTALL of madvise(2))
}

// own calls yield for each run of the process's own pages in ranges, which
// ascend, and for the guards among them.
func (p *pagemap) own(ranges []extent, yield func(found) error) error {
	if p.scan {
		err := p.ownByScan(ranges, yield)
		if !errors.Is(err, errNoScan) {
			return err
		}
		p.scan = false
	}
	for i, r := range ranges {
		if err := p.ownByEntries(r, func(f found) error { f.in = i; return yield(f) }); err != nil {
			return err
		}
	}
	return nil
}

// errNoScan says that this kernel has no PAGEMAP_SCAN.
var errNoScan = errors.New("no PAGEMAP_SCAN")

// ownByScan walks all ranges, and the gaps between them, in one go: what costs
// is the call, of which an address space of many small areas needs few.
func (p *pagemap) ownByScan(ranges []extent, yield func(found) error) error {
	if len(ranges) == 0 {
		return nil
	}
	// No more than the kernel gathers before it copies out: given room for more,
	// 6.18 returns a walkEnd that lies before regions it has reported.
	regions := make([]pageRegion, 512)
	known := uint64(pageIsGuard | pageIsPresent)
	in := 0
	for start, end := ranges[0].start, ranges[len(ranges)-1].end; start < end; {
		arg := scanArg{
			start: start, end: end,
			vec: unsafe.Pointer(&regions[0]), vecLen: uint64(len(regions)),
			categoryInverted:  pageIsFile | pageIsPfnZero,
			categoryMask:      pageIsFile | pageIsPfnZero,
			categoryAnyofMask: pageIsPresent | pageIsSwapped,
			returnMask:        known,
		}
		arg.size = uint64(unsafe.Sizeof(arg))
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, p.file.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno == unix.EINVAL && known&pageIsGuard != 0 {
			known &^= pageIsGuard // before 6.15
			continue
		}
		if errno == unix.ENOTTY || errno == unix.EINVAL {
			return errNoScan
		}
		if errno != 0 {
			return fmt.Errorf("PAGEMAP_SCAN: %w", errno)
		}
		for _, r := range regions[:n] {
			var err error
			if in, err = within(ranges, in, r, yield); err != nil {
				return err
			}
		}
		start = arg.walkEnd
	}
	return nil
}

// within yields the parts of a region that lie in ranges, the first of which
// that can hold any has index in. It returns that index for the next region.
func within(ranges []extent, in int, r pageRegion, yield func(found) error) (int, error) {
	for ; in < len(ranges) && ranges[in].start < r.end; in++ {
		part := extent{max(r.start, ranges[in].start), min(r.end, ranges[in].end)}
		if part.start < part.end {
			if err := yield(found{part, in, r.categories&pageIsGuard != 0}); err != nil {
				return in, err
			}
		}
		if ranges[in].end > r.end {
			break
		}
	}
	return in, nil
}

// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
	entryFile    = 1 << 61
	entryGuard   = 1 << 58 // since 6.15
)

// ownByEntries reads the page map entry by entry. It does not tell the
// kernel's page of zeros; the pages' contents do.
func (p *pagemap) ownByEntries(in extent, yield func(found) error) error {
	buf := make([]byte, 64<<10)
	run := found{extent: extent{in.start, in.start}}
	end := func() error {
		if run.end > run.start {
			return yield(run)
		}
		return nil
	}
	for at := in.start; at < in.end; {
		want := min(uint64(len(buf)), (in.end-at)/PageSize*8)
		n, err := p.file.ReadAt(buf[:want], int64(at/PageSize*8))
		if n < 8 {
			return fmt.Errorf("page map at %#x: %w", at, err)
		}
		for i := 0; i+8 <= n; i += 8 {
			e := binary.LittleEndian.Uint64(buf[i:])
			own, guard := e&(entryPresent|entrySwapped) != 0 && e&entryFile == 0, e&entryGuard != 0
			if !own || guard != run.guard {
				if err := end(); err != nil {
					return err
				}
				run = found{extent: extent{at, at}, guard: guard}
			}
			at += PageSize
			if own {
				run.end = at
			} else {
				run.start, run.end = at, at
			}
		}
	}
	return end()
}
