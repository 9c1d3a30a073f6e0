package image

import (
	"errors"
	"fmt"
	"sort"
)

const (
	maxAuxv     = 8 << 10 // AT_VECTOR_SIZE is a few hundred bytes
	maxHugePage = 1 << 34 // the largest of any architecture

	// Flags of mlockall(2).
	lockFuture  = 2
	lockOnFault = 4
)

func (b *builder) checkMM(m *MM) error {
	if len(m.Auxv) > maxAuxv {
		return fmt.Errorf("an auxiliary vector of %d bytes", len(m.Auxv))
	}
	if err := need[File](b, m.Exe, "open file"); err != nil {
		return fmt.Errorf("its executable: %w", err)
	}
	if m.Donor != 0 {
		if err := need[MM](b, m.Donor, "address space"); err != nil {
			return fmt.Errorf("its donor: %w", err)
		}
	}
	switch m.LockFuture {
	case 0, lockFuture, lockFuture | lockOnFault:
	default:
		return fmt.Errorf("flags %#x of mlockall are not known to this program", m.LockFuture)
	}
	var end uint64
	for i := range m.Areas {
		a := &m.Areas[i]
		if err := b.checkArea(a, end); err != nil {
			return fmt.Errorf("area %#x-%#x: %w", a.Start, a.End, err)
		}
		end = a.End
	}
	return nil
}

// checkArea checks one mapping; prev is where the one before it ends.
func (b *builder) checkArea(a *Area, prev uint64) error {
	switch {
	case a.Start%PageSize != 0 || a.End%PageSize != 0 || a.Offset%PageSize != 0:
		return errors.New("it is not aligned to pages")
	case a.Start >= a.End:
		return errors.New("it is empty")
	case a.Start < prev:
		return fmt.Errorf("it begins before the end of the one before it, %#x", prev)
	case a.End > userEnd:
		return errors.New("it is not in user space")
	case a.Offset+a.Size() < a.Offset:
		return fmt.Errorf("offset %#x is too large", a.Offset)
	}
	if err := first(checkPolicy(a.Policy), b.checkHugePages(a), checkAIO(a)); err != nil {
		return err
	}
	switch a.Kind {
	case AreaFile:
		return need[File](b, a.File, "open file")
	case AreaShmem:
		return need[Shmem](b, a.File, "shared memory")
	case AreaAnon, AreaVDSO, AreaVDSO32, AreaAIO:
		if a.File != 0 {
			return fmt.Errorf("an area of kind %s with an object behind it", a.Kind)
		}
		return nil
	}
	return fmt.Errorf("kind %s is not known to this program", quote(a.Kind))
}

// maxAIO bounds a ring (aio_setup_ring in fs/aio.c).
const maxAIO = 0x10000000 + PageSize

// checkAIO checks that a ring, and nothing else, has events, as many as it says.
func checkAIO(a *Area) error {
	if (a.Kind == AreaAIO) != (a.AIO != nil) {
		return errors.New("a ring for events without any, or events without a ring")
	}
	if a.AIO == nil {
		return nil
	}
	if !a.Shared || a.Offset != 0 || a.Size() > maxAIO {
		return fmt.Errorf("a ring for events of %d bytes that is not shared or not whole", a.Size())
	}
	places := AIOPlaces(a.Size())
	head, tail := uint64(a.AIO.Head), uint64(a.AIO.Tail)
	if head >= places || tail >= places || uint64(len(a.AIO.Events)) != (tail+places-head)%places*AIOEvent {
		return fmt.Errorf("%d bytes of events from place %d to %d of %d", len(a.AIO.Events), head, tail, places)
	}
	return nil
}

// checkHugePages checks that an area has huge pages where what lies behind it
// does, and consists of whole ones.
func (b *builder) checkHugePages(a *Area) error {
	if s := object[Shmem](&b.Head, a.File); a.Kind == AreaShmem && s != nil && s.HugePage != a.HugePage {
		return fmt.Errorf("pages of %d bytes over memory with pages of %d", a.HugePage, s.HugePage)
	}
	switch size := a.HugePage; {
	case size == 0:
		return nil
	case a.Kind != AreaShmem && (a.Kind != AreaAnon || a.Shared):
		return fmt.Errorf("huge pages in an area of kind %s", quote(a.Kind))
	case !hugePage(size) || (a.Start|a.End|a.Offset)%size != 0:
		return fmt.Errorf("it does not consist of huge pages of %d bytes", size)
	}
	return nil
}

func hugePage(size uint64) bool {
	return size > PageSize && size <= maxHugePage && size&(size-1) == 0
}

// Size returns the area's length in bytes.
func (a *Area) Size() uint64 { return a.End - a.Start }

// Area returns the mapping that addr lies in, or nil where nothing is mapped.
func (m *MM) Area(addr uint64) *Area {
	i := sort.Search(len(m.Areas), func(i int) bool { return m.Areas[i].End > addr })
	if i == len(m.Areas) || addr < m.Areas[i].Start {
		return nil
	}
	return &m.Areas[i]
}

// covers reports whether everything from start to end is mapped. Neighbouring
// areas may share a run of pages.
func (m *MM) covers(start, end uint64) bool {
	for start < end {
		a := m.Area(start)
		if a == nil {
			return false
		}
		start = a.End
	}
	return true
}

// Span is how much memory it takes: whole pages.
func (s *Shmem) Span() uint64 {
	page := uint64(max(PageSize, s.HugePage))
	return (s.Size + page - 1) &^ (page - 1)
}

func (b *builder) checkShmem(s *Shmem) error {
	if s.Size > 1<<62 { // loff_t, with room to round up
		return fmt.Errorf("shared memory of %d bytes", s.Size)
	}
	if s.HugePage != 0 && (!hugePage(s.HugePage) || s.SysV == nil && s.Size%s.HugePage != 0) {
		return fmt.Errorf("%d bytes do not consist of huge pages of %d", s.Size, s.HugePage)
	}
	if s.Path != "" && (s.Memfd || s.HugePage != 0) {
		return errors.New("a memfd or huge pages with a path")
	}
	if s.SysV == nil {
		return nil
	}
	if s.Memfd || s.Path != "" || s.Size == 0 {
		return errors.New("a System V segment that is empty, a memfd or a file")
	}
	return b.checkPerm(ipcShm, &s.SysV.Perm)
}

// end returns the address after the run; ok is false where it is not a
// sensible run: empty, not aligned, or beyond every address and offset.
func (r Run) end() (end uint64, ok bool) {
	end = r.Addr + uint64(r.Count)*PageSize
	return end, r.Count > 0 && r.Addr%PageSize == 0 && r.Addr <= 1<<62
}

// pages checks the runs of a TypePages record that has raw bytes behind it.
func (b *builder) pages(ref Ref, runs []Run, raw uint64) error {
	if len(runs) == 0 || len(runs) > MaxRuns {
		return fmt.Errorf("%d runs, there may be 1 to %d", len(runs), MaxRuns)
	}
	var prev, stored uint64
	mm, donor := b.borrower(ref)
	if mm != nil && b.lent[ref] {
		return fmt.Errorf("pages of address space #%d stand behind those of another that borrows of them", ref)
	}
	if donor != nil {
		prev = b.progress[ref]
	}
	for _, r := range runs {
		end, ok := r.end()
		if !ok || r.Addr < prev {
			return fmt.Errorf("run of %d pages at %#x is not aligned, empty or out of order", r.Count, r.Addr)
		}
		if err := b.inside(ref, r.Addr, end); err != nil {
			return err
		}
		switch {
		case r.Guard && (r.Zero || mm == nil):
			return fmt.Errorf("run of %d guard pages at %#x outside an address space, or of zeros", r.Count, r.Addr)
		case r.Borrowed && (r.Zero || r.Guard || donor == nil || !donor.covers(r.Addr, end)):
			return fmt.Errorf("run of %d borrowed pages at %#x that no donor has", r.Count, r.Addr)
		}
		if r.Stored() {
			stored += end - r.Addr
		}
		prev = end
	}
	if stored != raw {
		return fmt.Errorf("its runs need %d raw bytes, it has %d", stored, raw)
	}
	if donor != nil {
		b.progress[ref], b.lent[mm.Donor] = prev, true
	}
	return nil
}

// borrower returns the address space ref and its donor, nil where it has none.
func (b *builder) borrower(ref Ref) (mm, donor *MM) {
	if mm = object[MM](&b.Head, ref); mm != nil {
		donor = object[MM](&b.Head, mm.Donor)
	}
	return mm, donor
}

// inside checks that pages from start to end belong to the object ref.
func (b *builder) inside(ref Ref, start, end uint64) error {
	switch o := b.Objects[ref].(type) {
	case *MM:
		if !o.covers(start, end) {
			return fmt.Errorf("pages %#x-%#x are outside the areas of address space #%d", start, end, ref)
		}
	case *Shmem:
		if end > o.Span() {
			return fmt.Errorf("pages %#x-%#x are outside shared memory #%d of %d bytes", start, end, ref, o.Size)
		}
	default:
		return fmt.Errorf("reference %d names no address space or shared memory", ref)
	}
	return nil
}
