package mm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
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
	vec, vecLen       uint64
	maxPages          uint64
	categoryInverted  uint64
	categoryMask      uint64
	categoryAnyofMask uint64
	returnMask        uint64
}

// pageRegion is struct page_region.
type pageRegion struct{ start, end, categories uint64 }

// own calls yield for each run of the process's own pages in [start, end).
func (p *pagemap) own(start, end uint64, yield func(extent) error) error {
	if p.scan {
		err := p.ownByScan(start, end, yield)
		if !errors.Is(err, errNoScan) {
			return err
		}
		p.scan = false
	}
	return p.ownByEntries(start, end, yield)
}

// errNoScan says that this kernel has no PAGEMAP_SCAN.
var errNoScan = errors.New("no PAGEMAP_SCAN")

func (p *pagemap) ownByScan(start, end uint64, yield func(extent) error) error {
	regions := make([]pageRegion, 512)
	known := uint64(pageIsGuard | pageIsPresent)
	for start < end {
		arg := scanArg{
			start: start, end: end,
			vec: uint64(uintptr(unsafe.Pointer(&regions[0]))), vecLen: uint64(len(regions)),
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
			if r.categories&pageIsGuard != 0 {
				return fail.Refuse(fmt.Sprintf("memory at %x", r.start), "guard pages (MADV_GUARD_INSTALL) are not supported", "")
			}
			if err := yield(extent{r.start, r.end}); err != nil {
				return err
			}
		}
		start = arg.walkEnd
	}
	return nil
}

// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
	entryFile    = 1 << 61
)

// ownByEntries reads the page map entry by entry. It does not tell the
// kernel's page of zeros; the pages' contents do.
func (p *pagemap) ownByEntries(start, end uint64, yield func(extent) error) error {
	buf := make([]byte, 64<<10)
	run := extent{start, start}
	for at := start; at < end; {
		want := min(uint64(len(buf)), (end-at)/PageSize*8)
		n, err := p.file.ReadAt(buf[:want], int64(at/PageSize*8))
		if n < 8 {
			return fmt.Errorf("page map at %#x: %w", at, err)
		}
		for i := 0; i+8 <= n; i += 8 {
			e := binary.LittleEndian.Uint64(buf[i:])
			if e&(entryPresent|entrySwapped) != 0 && e&entryFile == 0 {
				run.end = at + PageSize
			} else {
				if run.end > run.start {
					if err := yield(run); err != nil {
						return err
					}
				}
				run = extent{at + PageSize, at + PageSize}
			}
			at += PageSize
		}
	}
	if run.end > run.start {
		return yield(run)
	}
	return nil
}
