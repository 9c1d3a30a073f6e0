package mm

import (
	"bytes"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// fork makes a stub fork another.
func fork(t *testing.T, s *tracee.Stub) *tracee.Stub {
	t.Helper()
	var b tracee.Batch
	b.Add(unix.SYS_FORK)
	cloned, err := s.Run(&b)
	must(t, err)
	child, err := s.NewChild(cloned[0], cloned[0])
	must(t, err)
	t.Cleanup(func() { _ = unix.Kill(child.Pid, unix.SIGKILL); _, _ = unix.Wait4(child.Pid, nil, unix.WALL, nil) })
	return child
}

// borrowAll is a record in which all private memory is the donor's but for the
// first page of the stack.
func borrowAll(m *image.MM, ref image.Ref) (c *image.Content, own uint64) {
	c = &image.Content{Type: image.TypePages, Ref: ref}
	for i := range m.Areas {
		a := &m.Areas[i]
		if a.Shared || a.Kind == image.AreaVDSO {
			continue
		}
		r := image.Run{Addr: a.Start, Count: uint32(a.Size() / PageSize), Borrowed: true}
		if a.Name == "[stack]" {
			own = a.Start
			c.Runs = append(c.Runs, image.Run{Addr: own, Count: 1})
			r.Addr, r.Count = own+PageSize, r.Count-1
			c.Raw = bytes.Repeat([]byte{7}, PageSize)
		}
		c.Runs = append(c.Runs, r)
	}
	return c, own
}

// TestInherit forks a stub with a program's memory and makes another of the
// same program of it: once by keeping what it has, once by copying.
func TestInherit(t *testing.T) {
	r := rebuild(t)
	files, space, s, f := r.files, r.space, r.stub, r.filler

	const inherits, copies = 1001, 1002
	heir, copier := fork(t, s), fork(t, s)
	must(t, f.Lend(r.ref))
	if err := f.Fill(&image.Content{Type: image.TypePages, Ref: r.ref}); err == nil {
		t.Error("pages are taken after they were lent")
	}
	l, err := Inherit(heir, space.Record, space.Record, files)
	must(t, err)
	f.Borrow(inherits, r.ref, heir, l)
	f.Space(inherits, heir.Pid)
	must(t, Rebuild(copier, space.Record, files))
	f.Borrow(copies, r.ref, copier, &Loan{})
	f.Space(copies, copier.Pid)
	lends := func(pid int) bool {
		donor, err := Scan(s.Pid, 0, ReadMappings(s.Pid), files, NewShared())
		must(t, err)
		borrower, err := Scan(pid, 0, ReadMappings(pid), files, NewShared())
		must(t, err)
		must(t, borrower.Borrow(donor))
		return borrower.Donor() == donor
	}
	for ref, stub := range map[image.Ref]*tracee.Stub{inherits: heir, copies: copier} {
		f.Copied = 0
		content, own := borrowAll(space.Record, ref)
		must(t, f.Fill(content))
		must(t, f.Complete(ref))
		// Now: reading makes pages a process's own.
		if got, want := lends(stub.Pid), ref == inherits; got != want {
			t.Errorf("%d: shares pages: %v, want %v", ref, got, want)
		}
		page := make([]byte, PageSize)
		must(t, tracee.ReadMemory(stub.Pid, own, page))
		if !bytes.Equal(page, content.Raw) {
			t.Errorf("%d: its own page holds %x...", ref, page[:8])
		}
		must(t, tracee.ReadMemory(s.Pid, own, page))
		must(t, tracee.WriteMemory(stub.Pid, own, page))
		r.protect(t, stub, ref)
		sameMemory(t, r.pid, stub.Pid, r.hole)
		if copied := f.Copied > 0; copied != (ref == copies) {
			t.Errorf("%d: %d bytes were copied", ref, f.Copied)
		}
	}
	if lends(r.pid) {
		t.Error("shares pages with a process that it was not forked from")
	}
}

func TestKeepable(t *testing.T) {
	const base = 0x100000
	area := func(change func(*image.Area)) image.Area {
		a := image.Area{Start: base, End: base + 0x4000, Kind: image.AreaFile, File: 3, Offset: 0x1000, Prot: 3, Flags: []string{accounted}}
		change(&a)
		return a
	}
	donor := &image.MM{Exe: 1, Areas: []image.Area{area(func(*image.Area) {})}}
	for name, c := range map[string]struct {
		change func(*image.Area)
		end    uint64
	}{
		"the same":            {func(*image.Area) {}, base + 0x4000},
		"read-only by now":    {func(a *image.Area) { a.Prot = 1 }, base + 0x4000},
		"its end":             {func(a *image.Area) { a.Start += 0x1000; a.Offset += 0x1000 }, base + 0x4000},
		"its beginning":       {func(a *image.Area) { a.End -= 0x1000 }, base + 0x3000},
		"grown":               {func(a *image.Area) { a.End += 0x1000 }, base + 0x4000},
		"grown down":          {func(a *image.Area) { a.Start -= 0x1000; a.Offset -= 0x1000 }, 0},
		"elsewhere in a file": {func(a *image.Area) { a.Offset += 0x1000 }, 0},
		"of another file":     {func(a *image.Area) { a.File = 4 }, 0},
		"shared":              {func(a *image.Area) { a.Shared = true }, 0},
		"executable":          {func(a *image.Area) { a.Prot = 7 }, 0},
		"not accounted for":   {func(a *image.Area) { a.Flags = []string{"nr"} }, 0},
		"bound to a node":     {func(a *image.Area) { a.Policy = &image.MemPolicy{Mode: 2} }, 0},
		"of huge pages":       {func(a *image.Area) { a.HugePage = 2 << 20 }, 0},
		"droppable":           {func(a *image.Area) { a.Flags = append(a.Flags, droppable) }, 0},
	} {
		if got := keepable(&image.MM{Exe: 1, Areas: []image.Area{area(c.change)}}, donor)[0]; got != c.end {
			t.Errorf("%s: kept up to %#x, want %#x", name, got, c.end)
		}
	}
	if len(keepable(&image.MM{Exe: 2, Areas: donor.Areas}, donor)) != 0 {
		t.Error("memory of another program is kept")
	}
}

func TestLoanDrops(t *testing.T) {
	l := Loan{kept: []extent{{0x1000, 0x5000}, {0x8000, 0xa000}}}
	var b tracee.Batch
	l.drop(&b, 0x2000)
	l.at = 0x3000 // borrowed up to there
	l.drop(&b, 0x9000)
	l.drop(&b, 0x9000)
	l.drop(&b, ^uint64(0))
	var got []extent
	for _, c := range b.Calls {
		for at := uint64(0x1000); at < 0x10000; at += PageSize {
			if c.Args[0] == tracee.W(at) {
				for size := uint64(PageSize); size < 0x10000; size += PageSize {
					if c.Args[1] == tracee.W(size) {
						got = append(got, extent{at, at + size})
					}
				}
			}
		}
	}
	if want := []extent{{0x1000, 0x2000}, {0x3000, 0x5000}, {0x8000, 0x9000}, {0x9000, 0xa000}}; !slices.Equal(got, want) {
		t.Errorf("dropped %x, want %x", got, want)
	}
}
