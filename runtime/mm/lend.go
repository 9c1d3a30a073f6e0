package mm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Pages that fork(2) leaves shared until somebody writes to them are saved once
// and shared again, for which there is only one way: the process is forked, at
// restore too, when the pages are in the one that forks. That one is its donor,
// and its pages come first. The borrower keeps of them what it shared, drops the
// rest, and gets its own.

// frames reads what backs the pages of a process (pagemap, with CAP_SYS_ADMIN).
type frames struct {
	file *os.File
	buf  []byte
}

func openFrames(pid int) (*frames, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, gone(pid, err)
	}
	return &frames{file: f, buf: make([]byte, 8*framesAtOnce)}, nil
}

// framesAtOnce is how many pages are compared in one go.
const framesAtOnce = 4096

// read returns the entries of n pages from start on, until the next read.
func (f *frames) read(start uint64, n int) ([]byte, error) {
	b := f.buf[:8*n]
	if _, err := f.file.ReadAt(b, int64(start/PageSize*8)); err != nil {
		return nil, fmt.Errorf("page map at %#x: %w", start, err)
	}
	return b, nil
}

const (
	entryExclusive = 1 << 56 // nobody else maps it
	entryFrame     = 1<<55 - 1

	entryIdentity = entryPresent | entrySwapped | entryFile | entryFrame
)

func entry(b []byte, i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }

// same reports that two entries are of one page of anonymous memory: in the same
// frame, or swapped out to the same place.
func same(a, b uint64) bool {
	return (a^b)&entryIdentity == 0 && a&(entryPresent|entrySwapped) != 0 && a&entryFile == 0 && a&entryFrame != 0
}

// holding is how a process has a page.
type holding uint8

const (
	alone    holding = iota
	jointly          // with others, but not with the donor
	borrowed         // with the donor
)

// Borrow makes donor the address space of which s borrows pages, if there is one
// that both share. Only what runs the same program can: execve(2) begins anew.
func (s *Space) Borrow(donor *Space) error {
	if !s.SameProgram(donor) {
		return nil
	}
	s.donor = donor
	err := s.own(func(_ *source, f found) error {
		if f.guard {
			return nil
		}
		return s.holdings(f.extent, func(_ extent, how holding) error {
			if how == borrowed {
				return errFound
			}
			return nil
		})
	})
	s.closeFrames()
	s.cousins = 0
	if errors.Is(err, errFound) {
		return nil
	}
	s.donor = nil
	return err
}

// Maps reports whether a file for which f is true is mapped, or executed.
func (s *Space) Maps(f func(*object.Object) bool) bool {
	return s.exe != nil && f(s.exe) || slices.ContainsFunc(s.files, func(o *object.Object) bool { return o != nil && f(o) })
}

// errFound ends a search.
var errFound = errors.New("found")

// holdings yields the parts of e in turn by how the process has them, as far as it
// has them. Without a relative all is its own.
//
// All tasks are stopped, and yet pages move: the kernel compacts memory. A frame
// that holds a page of the donor's before and after it is looked up for s held it
// in between too, so that it is the same page.
func (s *Space) holdings(e extent, yield func(e extent, how holding) error) error {
	if s.donor == nil && !s.related && !s.merges {
		return yield(e, alone)
	}
	if err := s.openFrames(); err != nil {
		return err
	}
	var before []byte
	for start := e.start; start < e.end; {
		n := int(min((e.end-start)/PageSize, framesAtOnce))
		if s.donor != nil {
			first, err := s.donor.frames.read(start, n)
			if err != nil {
				return err
			}
			before = append(before[:0], first...)
		}
		mine, err := s.frames.read(start, n)
		if err != nil {
			return err
		}
		var after []byte
		if s.donor != nil {
			if after, err = s.donor.frames.read(start, n); err != nil {
				return err
			}
		}
		how := func(i int) holding {
			v := entry(mine, i)
			switch {
			case s.donor != nil && same(entry(before, i), v) && same(v, entry(after, i)):
				return borrowed
			case v&entryPresent != 0 && v&(entryFile|entryExclusive) == 0:
				return jointly
			}
			return alone
		}
		for i := 0; i < n; {
			j, is := i+1, how(i)
			for j < n && how(j) == is {
				j++
			}
			if is == jointly && s.related {
				s.cousins += uint64(j-i) * PageSize
			}
			if err := yield(extent{start + uint64(i)*PageSize, start + uint64(j)*PageSize}, is); err != nil {
				return err
			}
			i = j
		}
		start += uint64(n) * PageSize
	}
	return nil
}

func (s *Space) openFrames() error {
	for _, o := range []*Space{s, s.donor} {
		if o != nil && o.frames == nil {
			var err error
			if o.frames, err = openFrames(o.Pid); err != nil {
				return err
			}
		}
	}
	return nil
}

// closeFrames lets go of what compare has opened.
func (s *Space) closeFrames() {
	for _, o := range []*Space{s, s.donor} {
		if o != nil && o.frames != nil {
			_ = o.frames.file.Close()
			o.frames = nil
		}
	}
}

// Related says that there are others that s may have been forked with.
func (s *Space) Related() { s.related = true }

// SameProgram reports that two processes run the same executable.
func (s *Space) SameProgram(other *Space) bool { return s.exe == other.exe }

// Donor is the address space that s borrows of, or nil.
func (s *Space) Donor() *Space { return s.donor }

// Cousins is how many bytes Save has found that s shares with others than its
// donor. They are saved and restored for s alone.
func (s *Space) Cousins() uint64 { return s.cousins }

// Inherit gives a stub the areas of an image as Rebuild does, but keeps of what
// it has what can be the same: it was cloned from one with donor's areas, filled.
//
// Memory that came by fork is never joined with new memory beside it (list_is_singular
// in is_mergeable_anon_vma, mm/vma.c), as mremap(2) would need it to be. So an area
// is kept from its start on or not at all, and what it has more at its end is
// had by growing it.
func Inherit(s *tracee.Stub, m, donor *image.MM, files Opened) (*Loan, error) {
	keep, l := keepable(m, donor), &Loan{}
	var b tracee.Batch
	flush := func(least int) error {
		if len(b.Calls) < least {
			return nil
		}
		_, err := s.Run(&b)
		b.Reset()
		if err != nil {
			return fmt.Errorf("clear what is not inherited: %w", err)
		}
		return nil
	}
	at := uint64(0)
	unmap := func(to uint64) {
		if at < to {
			b.Add(unix.SYS_MUNMAP, tracee.W(at), tracee.W(to-at))
		}
	}
	stays := []extent{{s.Service(), s.Service() + tracee.ServiceSize}}
	for i, end := range keep {
		l.kept = append(l.kept, extent{m.Areas[i].Start, end})
	}
	stays = append(stays, l.kept...)
	sortExtents(l.kept)
	sortExtents(stays)
	for _, e := range stays {
		unmap(e.start)
		at = e.end
		if err := flush(manyCalls); err != nil {
			return nil, err
		}
	}
	unmap(taskSize)
	var others []image.Area
	for i := range m.Areas {
		a := &m.Areas[i]
		end, ok := keep[i]
		if !ok {
			others = append(others, *a)
		} else if end < a.End {
			b.Add(unix.SYS_MREMAP, tracee.W(a.Start), tracee.W(end-a.Start), tracee.W(a.Size()), tracee.W(0))
		}
		if err := flush(manyCalls); err != nil {
			return nil, err
		}
	}
	if err := flush(1); err != nil {
		return nil, err
	}
	if len(l.kept) == 0 {
		return l, Rebuild(s, m, files)
	}
	return l, mapAll(s, m, others, files)
}

func sortExtents(all []extent) {
	slices.SortFunc(all, func(a, b extent) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
}

// keepable finds the areas that the donor's can become, with where those end.
func keepable(m, donor *image.MM) map[int]uint64 {
	keep := map[int]uint64{}
	if m.Exe != donor.Exe {
		return keep // it cannot be changed while anything of the old one is mapped
	}
	for i := range m.Areas {
		a := &m.Areas[i]
		if d := donor.Area(a.Start); d != nil && becomes(d, a) {
			keep[i] = min(a.End, d.End)
		}
	}
	return keep
}

// becomes reports that d was mapped the way a would be.
func becomes(d, a *image.Area) bool {
	private := func(x *image.Area) bool {
		return !x.Shared && !x.VDSO() && x.HugePage == 0 && !has(x, droppable)
	}
	alike := func(flag string) bool { return has(d, flag) == has(a, flag) }
	return private(d) && private(a) && d.Kind == a.Kind && d.File == a.File && (d.Kind == image.AreaAnon || d.Offset-d.Start == a.Offset-a.Start) &&
		firstProt(d) == firstProt(a) && alike(accounted) && alike("nr") && alike("gd") && reflect.DeepEqual(d.Policy, a.Policy)
}

// Loan is what a stub has of its donor's pages while its own come in, which
// ascend; nothing if it could not be cloned from the donor.
type Loan struct {
	kept  []extent
	stub  *tracee.Stub
	donor int    // pid
	at    uint64 // what is below is as it is to be
}

// Borrow says what stub, whose address space is ref, has on loan from donor's.
func (f *Filler) Borrow(ref, donor image.Ref, stub *tracee.Stub, l *Loan) {
	l.stub, l.donor = stub, f.pids[donor]
	f.loans[ref] = l
}

// Lend says that others have been given the pages of an address space: no more
// may come. What it has borrowed itself is settled.
func (f *Filler) Lend(ref image.Ref) error {
	f.lent[ref] = true
	return f.Complete(ref)
}

// settle drops what the stub has and is not to have, up to the last of the runs.
func (l *Loan) settle(runs []image.Run) error {
	var b tracee.Batch
	for _, r := range runs {
		end := r.Addr + uint64(r.Count)*PageSize
		if r.Borrowed {
			l.drop(&b, r.Addr)
		} else {
			l.drop(&b, end)
		}
		l.at = end
	}
	_, err := l.stub.Run(&b)
	return err
}

// drop adds the calls that discard everything up to an address.
func (l *Loan) drop(b *tracee.Batch, to uint64) {
	for _, e := range l.inherited(extent{l.at, to}) {
		b.Add(unix.SYS_MADVISE, tracee.W(e.start), tracee.W(e.end-e.start), tracee.W(unix.MADV_DONTNEED))
	}
	l.at = max(l.at, to)
}

// inherited returns the parts of e that were kept.
func (l *Loan) inherited(e extent) (parts []extent) {
	i, _ := slices.BinarySearchFunc(l.kept, e.start, func(k extent, at uint64) int {
		if k.end <= at {
			return -1
		}
		return 1
	})
	for ; i < len(l.kept) && l.kept[i].start < e.end; i++ {
		if part := (extent{max(e.start, l.kept[i].start), min(e.end, l.kept[i].end)}); part.start < part.end {
			parts = append(parts, part)
		}
	}
	return parts
}

// Complete says that no more pages of an address space will come.
func (f *Filler) Complete(ref image.Ref) error {
	l := f.loans[ref]
	if l == nil {
		return nil
	}
	delete(f.loans, ref)
	var b tracee.Batch
	for l.drop(&b, math.MaxUint64); len(b.Calls) > 0; {
		part := tracee.Batch{Calls: b.Calls[:min(len(b.Calls), manyCalls)]}
		if _, err := l.stub.Run(&part); err != nil {
			return fmt.Errorf("drop what is not shared: %w", err)
		}
		b.Calls = b.Calls[len(part.Calls):]
	}
	return nil
}

// borrow copies the pages of a borrowed run that could not be inherited.
func (f *Filler) borrow(ref image.Ref, e extent) error {
	l := f.loans[ref]
	if l == nil {
		return fmt.Errorf("borrowed pages at %#x of an address space without a donor", e.start)
	}
	at := e.start
	for _, part := range append(l.inherited(e), extent{e.end, e.end}) {
		if err := f.copyFrom(l.donor, ref, extent{at, part.start}); err != nil {
			return err
		}
		at = part.end
	}
	return nil
}

func (f *Filler) copyFrom(pid int, ref image.Ref, e extent) error {
	if e.start >= e.end {
		return nil
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return err
	}
	defer mem.Close()
	buf := make([]byte, min(e.end-e.start, recordSize))
	for at := e.start; at < e.end; {
		b := buf[:min(uint64(len(buf)), e.end-at)]
		if _, err := mem.ReadAt(b, int64(at)); err != nil {
			return fmt.Errorf("borrowed pages at %#x: %w", at, err)
		}
		if err := f.write(ref, at, b); err != nil {
			return err
		}
		f.Copied += uint64(len(b))
		at += uint64(len(b))
	}
	return nil
}
