package mm

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Opened gives the numbers under which a stub holds what it is to map.
type Opened interface {
	FD(file image.Ref) (int, error)
	// SegmentFD is for shared memory; what is not open for writing cannot be
	// made writable by mprotect(2) where it is mapped.
	SegmentFD(shmem image.Ref, write bool) (int, bool)
	// SysV is the record of shared memory that is a System V segment, or nil.
	SysV(shmem image.Ref) *image.Shmem
}

const (
	// taskSize is the end of user addresses with four levels of page tables.
	taskSize = 0x7ffffffff000
	// narrowSize is the end of what 32-bit code can reach.
	narrowSize = 1 << 32
	// lowest is where the search for room begins: above vm.mmap_min_addr.
	lowest = 0x100000
	// margin keeps the service area clear of its neighbours, as a stack that
	// grows down wants a gap below it (stack_guard_gap, 256 pages).
	margin = 2 << 20

	archMapVDSO32 = 0x2002 // ARCH_MAP_VDSO_32
	archMapVDSO64 = 0x2003 // ARCH_MAP_VDSO_64
)

// Hole finds room for the service area that no area of any of the images needs,
// below 4 GiB where it must be low: calls of 32-bit code lead nowhere else.
func Hole(low bool, spaces ...*image.MM) (uint64, error) {
	const need = tracee.ServiceSize + 2*margin
	limit := uint64(taskSize)
	if low {
		limit = narrowSize
	}
	var used []extent
	for _, m := range spaces {
		for i := range m.Areas {
			used = append(used, extent{m.Areas[i].Start, m.Areas[i].End})
		}
	}
	slices.SortFunc(used, func(a, b extent) int { return cmp.Compare(a.start, b.start) })
	last := uint64(lowest)
	for _, e := range used {
		if e.start > last && e.start-last >= need {
			break
		}
		last = max(last, e.end)
	}
	if last+need > limit {
		return 0, fmt.Errorf("no room of %d bytes below %#x that is free in every address space of the image", need, limit)
	}
	return last + margin, nil
}

// Rebuild gives a stub the areas of an image, without their contents:
// everything the stub has but the service area goes (the vdso too, for the
// kernel maps a new one only then), and the areas are mapped.
func Rebuild(s *tracee.Stub, m *image.MM, files Opened) error {
	hole := s.Service()
	var b tracee.Batch
	b.Add(unix.SYS_MUNMAP, tracee.W(0), tracee.W(hole))
	b.Add(unix.SYS_MUNMAP, tracee.W(hole+tracee.ServiceSize), tracee.W(taskSize-hole-tracee.ServiceSize))
	if _, err := s.Run(&b); err != nil {
		return fmt.Errorf("clear the address space: %w", err)
	}
	return mapAll(s, m, m.Areas, files)
}

// mapAll maps areas, the last of m to be mapped.
func mapAll(s *tracee.Stub, m *image.MM, areas []image.Area, files Opened) error {
	for from := 0; from < len(areas); from += mapChunk {
		if err := mapAreas(s, areas, from, min(from+mapChunk, len(areas)), files); err != nil {
			return err
		}
	}
	return checkVDSO(s, m)
}

// mapChunk is how many areas are mapped by one batch.
const mapChunk = 8192

func mapAreas(s *tracee.Stub, all []image.Area, from, to int, files Opened) error {
	var b tracee.Batch
	areas := all[from:to]
	for i := range areas {
		if rec := files.SysV(areas[i].File); rec != nil {
			attach(&b, all, from+i, rec)
		} else if err := mapArea(&b, &areas[i], files); err != nil {
			return fail.On(describe(&areas[i]), err)
		}
	}
	_, err := s.Run(&b)
	if failed, ok := err.(*tracee.CallError); ok {
		for i := range areas {
			if areas[i].Start == failed.Args[0] || areas[i].VDSO() && failed.Nr == unix.SYS_ARCH_PRCTL {
				err := fmt.Errorf("cannot be mapped again: %w", failed)
				if areas[i].HugePage != 0 && failed.Errno == unix.ENOMEM {
					err = noHugePages(areas[i].HugePage, failed)
				}
				return fail.On(describe(&areas[i]), err)
			}
		}
	}
	return err
}

func describe(a *image.Area) string {
	return fmt.Sprintf("memory at %x-%x %s", a.Start, a.End, a.Name)
}

// mapArea adds the calls that map one area. Private ones that have ever been
// writable ("ac": their pages are accounted for) are so until their contents
// are in; Protect gives them their own protection. The others must not be: the
// kernel would account for them, and join them with neighbours.
func mapArea(b *tracee.Batch, a *image.Area, files Opened) error {
	flags, fd := uint64(unix.MAP_FIXED_NOREPLACE), ^uint64(0)
	switch {
	case a.Shared:
		flags |= unix.MAP_SHARED
	case has(a, droppable):
		flags |= unix.MAP_DROPPABLE // instead of MAP_PRIVATE
	default:
		flags |= unix.MAP_PRIVATE
	}
	switch a.Kind {
	case image.AreaVDSO:
		b.Try(unix.SYS_ARCH_PRCTL, tracee.W(archMapVDSO64), tracee.W(a.Start)) // it returns the vdso's size
		return nil
	case image.AreaVDSO32:
		b.Try(unix.SYS_ARCH_PRCTL, tracee.W(archMapVDSO32), tracee.W(a.Start))
		return nil
	case image.AreaAnon:
		flags |= unix.MAP_ANONYMOUS | hugeFlags(a.HugePage, unix.MAP_HUGETLB)
	case image.AreaFile:
		n, err := files.FD(a.File)
		if err != nil {
			return err
		}
		fd = uint64(n)
	case image.AreaShmem:
		n, ok := files.SegmentFD(a.File, !a.Shared || has(a, writable))
		if !ok {
			return fmt.Errorf("shared memory object %d is missing", a.File)
		}
		fd = uint64(n)
	case image.AreaAIO:
		keepRoom(b, a)
		return nil
	default:
		return fail.Refuse("", "an area of kind "+a.Kind+" is not known to this version", "restore with a newer ocickpt")
	}
	for _, f := range a.Flags {
		flags |= mapFlag[f]
	}
	b.Add(unix.SYS_MMAP, tracee.W(a.Start), tracee.W(a.End-a.Start), tracee.W(firstProt(a)), tracee.W(flags), tracee.W(fd), tracee.W(a.Offset))
	bind(b, a) // before there are pages
	return nil
}

// opened reports an area that is mapped with more rights than its own at first.
// Huge pages are never accounted for that way.
func opened(a *image.Area) bool {
	const both = unix.PROT_READ | unix.PROT_WRITE
	return !a.Shared && a.Prot&both != both && (has(a, accounted) || a.HugePage != 0)
}

// firstProt is the protection that an area is mapped with.
func firstProt(a *image.Area) uint32 {
	if opened(a) {
		return a.Prot | unix.PROT_WRITE | unix.PROT_READ
	}
	return a.Prot
}

// has reports a VmFlag.
func has(a *image.Area, flag string) bool { return slices.Contains(a.Flags, flag) }

// mapFlag gives VmFlags of smaps back that mmap(2) has set.
var mapFlag = map[string]uint64{
	"gd": unix.MAP_GROWSDOWN, "nr": unix.MAP_NORESERVE,
	"sf": unix.MAP_SHARED_VALIDATE | unix.MAP_SYNC, // of shared files only: the first includes MAP_SHARED
}

// Layout adds the call that tells the kernel where code, heap, stack and
// arguments lie, and what /proc/PID/exe, auxv, cmdline and environ are to show
// (prctl(2) PR_SET_MM_MAP). It comes late: from then on nobody can write to the
// executable (ETXTBSY), so that one without a name must be filled before. Until
// then it is the stub's, which nobody has mapped; while somebody has, it does not
// change, even to the same file (replace_mm_exe_file in kernel/fork.c).
func Layout(b *tracee.Batch, m *image.MM, files Opened) error {
	exe, err := files.FD(m.Exe)
	if err != nil {
		return fmt.Errorf("executable: %w", err)
	}
	auxv := b.Put(m.Auxv)
	var head []byte
	for _, v := range m.Layout {
		head = binary.LittleEndian.AppendUint64(head, v)
	}
	tail := binary.LittleEndian.AppendUint32(nil, uint32(len(m.Auxv)))
	tail = binary.LittleEndian.AppendUint32(tail, uint32(exe))
	at := b.PutPointer(head, auxv, tail...)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_MM), tracee.W(unix.PR_SET_MM_MAP), at, tracee.W(len(head)+8+len(tail)))
	return nil
}

// checkVDSO makes sure that the kernel put the vdso where the program's libc
// will call it: the address is only a hint.
func checkVDSO(s *tracee.Stub, m *image.MM) error {
	i := slices.IndexFunc(m.Areas, func(a image.Area) bool { return a.VDSO() })
	if i < 0 {
		return nil
	}
	maps, err := readMaps(s.Pid, "maps")
	if err != nil {
		return err
	}
	have := image.Area{}
	for j := range maps {
		if maps[j].name == "[vdso]" {
			have.End = maps[j].end
		}
		if maps[j].name == "[vvar]" {
			have.Start = maps[j].start
		}
	}
	if want := &m.Areas[i]; have.Start != want.Start || have.End != want.End {
		return fail.Refuse(describe(want), fmt.Sprintf("this kernel's vdso takes %x-%x", have.Start, have.End), "restore on the kernel version of the checkpoint")
	}
	return nil
}

// Filler puts page contents into address spaces and shared memory as they come
// in from the stream.
type Filler struct {
	pids    map[image.Ref]int
	feeders map[image.Ref]*feeder
	huge    map[image.Ref]*hugeSpace
	guards  map[image.Ref][]extent
	shared  map[image.Ref]Writer
	loans   map[image.Ref]*Loan
	lent    map[image.Ref]bool

	// Copied counts the bytes of borrowed pages that could not be shared again.
	Copied uint64
}

// hugeSpace is an address space with areas of huge pages.
type hugeSpace struct {
	space *image.MM
	pages map[uint64]*hugePages // by size
}

// Writer is where the pages of shared memory go.
type Writer interface {
	WriteAt(b []byte, off int64) (int, error)
}

// NewFiller returns a Filler for no object yet.
func NewFiller() *Filler {
	return &Filler{
		pids: map[image.Ref]int{}, feeders: map[image.Ref]*feeder{}, huge: map[image.Ref]*hugeSpace{},
		guards: map[image.Ref][]extent{}, shared: map[image.Ref]Writer{}, loans: map[image.Ref]*Loan{}, lent: map[image.Ref]bool{},
	}
}

// Space makes pages of address space ref go to process pid.
func (f *Filler) Space(ref image.Ref, pid int) { f.pids[ref] = pid }

// Stub makes pages of address space ref, which m describes, go to a stub, the
// fastest way that there is.
func (f *Filler) Stub(ref image.Ref, m *image.MM, s *tracee.Stub) error {
	f.Space(ref, s.Pid)
	for i := range m.Areas {
		if size := m.Areas[i].HugePage; size != 0 {
			if f.huge[ref] == nil {
				f.huge[ref] = &hugeSpace{m, map[uint64]*hugePages{}}
			}
			f.huge[ref].pages[size] = newHugePages(s, size)
		}
	}
	feed, err := newFeeder(s, m)
	if feed != nil {
		f.feeders[ref] = feed
	}
	return err
}

// Close ends what holds the address spaces: until then, pages that were not
// filled are not the stubs' to touch.
func (f *Filler) Close() error {
	var errs error
	for ref := range f.loans {
		errs = errors.Join(errs, f.Complete(ref))
	}
	for _, feed := range f.feeders {
		errs = errors.Join(errs, feed.file.Close())
	}
	clear(f.feeders)
	for _, w := range f.shared {
		if c, ok := w.(io.Closer); ok {
			errs = errors.Join(errs, c.Close())
		}
	}
	clear(f.shared)
	return errs
}

// Segment makes pages of shared memory ref go to w.
func (f *Filler) Segment(ref image.Ref, w Writer) { f.shared[ref] = w }

// Fill writes one record of pages.
func (f *Filler) Fill(c *image.Content) error {
	raw := c.Raw
	if f.lent[c.Ref] {
		return fmt.Errorf("pages of address space #%d come after others were given them", c.Ref)
	}
	if l := f.loans[c.Ref]; l != nil {
		if err := l.settle(c.Runs); err != nil {
			return fmt.Errorf("drop what is not shared: %w", err)
		}
	}
	for _, r := range c.Runs {
		size := int(r.Count) * PageSize
		if r.Borrowed {
			if err := f.borrow(c.Ref, extent{r.Addr, r.Addr + uint64(size)}); err != nil {
				return err
			}
			continue
		}
		if r.Guard {
			f.guards[c.Ref] = append(f.guards[c.Ref], extent{r.Addr, r.Addr + uint64(size)})
			continue
		}
		if r.Zero {
			if err := f.zero(c.Ref, r.Addr, size); err != nil {
				return err
			}
			continue
		}
		if err := f.write(c.Ref, r.Addr, raw[:size]); err != nil {
			return err
		}
		raw = raw[size:]
	}
	return nil
}

func (f *Filler) zero(ref image.Ref, addr uint64, size int) error {
	for size > 0 {
		n := min(size, len(zeros))
		if err := f.write(ref, addr, zeros[:n]); err != nil {
			return err
		}
		addr, size = addr+uint64(n), size-n
	}
	return nil
}

var zeros [64 << 10]byte

func (f *Filler) write(ref image.Ref, addr uint64, b []byte) error {
	if w := f.shared[ref]; w != nil {
		_, err := w.WriteAt(b, int64(addr))
		return err
	}
	pid, ok := f.pids[ref]
	if !ok {
		return fmt.Errorf("pages for object %d, which has no memory", ref)
	}
	for len(b) > 0 {
		n, err := f.some(ref, pid, addr, b)
		if err != nil {
			return err
		}
		addr, b = addr+uint64(n), b[n:]
	}
	return nil
}

// some writes a part of b and returns how much.
func (f *Filler) some(ref image.Ref, pid int, addr uint64, b []byte) (int, error) {
	if feed := f.feeders[ref]; feed != nil {
		if n, err := feed.feed(addr, b); n > 0 || err != nil {
			return n, err
		}
		b = b[:PageSize] // the next page may be another case
	}
	if err := f.huge[ref].need(addr, uint64(len(b))); err != nil {
		return 0, err
	}
	err := tracee.WriteMemory(pid, addr, b)
	if errors.Is(err, unix.EFAULT) {
		err = force(pid, addr, b)
	}
	return len(b), err
}

// need makes the huge pages that are to be written to.
func (h *hugeSpace) need(addr, n uint64) error {
	for end := addr + n; h != nil && addr < end; {
		a := h.space.Area(addr)
		if a == nil {
			return nil
		}
		if a.HugePage != 0 {
			if err := h.pages[a.HugePage].need(addr, min(end, a.End)-addr); err != nil {
				return err
			}
		}
		addr = a.End
	}
	return nil
}

// force writes where the task itself may not: pages that a debugger has changed
// in memory that was never writable. It is slow, and rare.
func force(pid int, addr uint64, b []byte) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(b, int64(addr))
	return err
}
