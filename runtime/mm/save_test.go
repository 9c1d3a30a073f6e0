package mm

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mapped maps pages that touch no other mapping and are small ones.
func mapped(t testing.TB, pages, prot, flags int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, (pages+2)*PageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Munmap(b)) })
	in := b[PageSize : (pages+1)*PageSize]
	_, err = unix.MmapPtr(-1, 0, unsafe.Pointer(&in[0]), uintptr(len(in)), prot, flags|unix.MAP_FIXED)
	must(t, err)
	must(t, unix.Madvise(in, unix.MADV_NOHUGEPAGE))
	return in
}

func addressOf(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

func page(b []byte, i int) []byte { return b[i*PageSize:][:PageSize] }

// scatter makes a random pattern of pages: untouched, read, written, of zeros,
// discarded, swapped out as far as there is swap, cold.
func scatter(t testing.TB, b []byte, random *rand.Rand) {
	t.Helper()
	for i := 0; i < len(b)/PageSize; {
		kind := random.IntN(7)
		for n := 1 + random.IntN(9); n > 0 && i < len(b)/PageSize; n-- {
			p := page(b, i)
			i++
			switch kind {
			case 1: // the kernel's page of zeros
				if p[random.IntN(PageSize)] != 0 {
					t.Fatal("fresh memory is not zero")
				}
			case 2, 5:
				p[random.IntN(PageSize)] = byte(1 + random.IntN(255))
			case 3:
				p[0], p[0] = 1, 0
			case 4:
				p[0] = 1
				must(t, unix.Madvise(p, unix.MADV_DONTNEED))
			case 6:
				p[PageSize-1] = 9
				must(t, unix.Madvise(p, unix.MADV_PAGEOUT))
			}
		}
	}
}

// TestBothPageMaps holds the two ways of finding a process's own pages against
// each other and against the memory.
func TestBothPageMaps(t *testing.T) {
	pm, err := openPagemap(os.Getpid())
	must(t, err)
	defer pm.Close()
	for seed := range uint64(30) {
		random := rand.New(rand.NewPCG(seed, 1))
		b := mapped(t, 2000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		scatter(t, b, random)
		start, end, guards := addressOf(b), addressOf(b)+uint64(len(b)), 0
		for _, at := range []int{40, 41, 300, 999} {
			must(t, unix.Madvise(page(b, at), unix.MADV_GUARD_INSTALL))
		}
		owns := func(scan bool) []bool {
			own, last := make([]bool, len(b)/PageSize), start
			pm.scan = scan
			// Three ranges, with a gap between the last two.
			ranges := []extent{{start, start + 100*PageSize}, {start + 100*PageSize, start + 990*PageSize}, {start + 995*PageSize, end}}
			must(t, pm.own(ranges, func(e found) error {
				if r := ranges[e.in]; e.start < r.start || e.end > r.end {
					t.Fatalf("seed %d: extent %x-%x is not in range %d", seed, e.start, e.end, e.in)
				}
				if e.guard {
					guards += int(e.end-e.start) / PageSize
					return nil
				}
				if e.start < last || e.start >= e.end || e.end > end {
					t.Fatalf("seed %d: extent %x-%x after %x", seed, e.start, e.end, last)
				}
				last = e.end
				for at := e.start; at < e.end; at += PageSize {
					own[(at-start)/PageSize] = true
				}
				return nil
			}))
			return own
		}
		scan, entries := owns(true), owns(false)
		if guards != 2*4 {
			t.Errorf("seed %d: %d guard pages in two walks", seed, guards)
		}
		for i := range scan {
			if i >= 990 && i < 995 || slices.Contains([]int{40, 41, 300, 999}, i) {
				continue
			}
			zero := bytes.Equal(page(b, i), zeroPage[:])
			if scan[i] && !entries[i] || !zero && !(scan[i] && entries[i]) {
				t.Fatalf("seed %d, page %d (zero %v): own by scan %v, by entries %v", seed, i, zero, scan[i], entries[i])
			}
		}
	}
}

func TestOwnPages(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(8*PageSize))
	b, err := unix.Mmap(int(f.Fd()), 0, 8*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	must(t, err)
	defer func() { must(t, unix.Munmap(b)) }()
	_ = bytes.Count(b, []byte{1}) // a file's pages are not the process's own
	page(b, 3)[0], page(b, 4)[0] = 1, 0
	for _, scan := range []bool{true, false} {
		pm, err := openPagemap(os.Getpid())
		must(t, err)
		pm.scan = scan
		var got []extent
		must(t, pm.own([]extent{{addressOf(b), addressOf(b) + uint64(len(b))}}, func(e found) error { got = append(got, e.extent); return nil }))
		if want := (extent{addressOf(page(b, 3)), addressOf(page(b, 4)) + PageSize}); !slices.Equal(got, []extent{want}) {
			t.Errorf("scan %v: %x, want %x", scan, got, want)
		}
		stop := errors.New("stop")
		if err := pm.own([]extent{{addressOf(b), addressOf(b) + uint64(len(b))}}, func(found) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("scan %v: %v", scan, err)
		}
		must(t, pm.Close())
	}
}

// stream is an image with one address space and one segment of shared memory,
// whose process is a zombie: the least that page contents can belong to.
type stream struct {
	bytes.Buffer
	w         *image.Writer
	mm, shmem image.Ref
}

func newStream(t testing.TB, areas []image.Area, shmem *image.Shmem) *stream {
	t.Helper()
	s := &stream{}
	s.w = image.NewWriter(&s.Buffer)
	exe := s.w.NewRef()
	s.mm, s.shmem = s.w.NewRef(), s.w.NewRef()
	for _, r := range []struct {
		t   image.Type
		ref image.Ref
		v   any
	}{
		{image.TypeHeader, 0, image.Header{Magic: image.HeaderMagic, Revision: image.Revision, ByteOrder: "little"}},
		{image.TypeArch, 0, image.Arch{PageSize: PageSize}},
		{image.TypeContainer, 0, image.Container{}},
		{image.TypeTree, 0, image.Tree{Processes: []image.Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}}},
		{image.TypeFile, exe, image.File{Kind: image.KindRegular}},
		{image.TypeMM, s.mm, image.MM{Exe: exe, Areas: areas}},
		{image.TypeShmem, s.shmem, shmem},
	} {
		must(t, s.w.Record(r.t, r.ref, r.v))
	}
	return s
}

// fill reads the stream back into memory and returns the runs it held.
func (s *stream) fill(t testing.TB, f *Filler) (runs []image.Run) {
	t.Helper()
	must(t, s.w.Close())
	r := image.NewReader(&s.Buffer)
	for {
		c, err := r.Next()
		if errors.Is(err, io.EOF) {
			return runs
		}
		must(t, err)
		runs = append(runs, c.Runs...)
		must(t, f.Fill(c))
		c.Release()
	}
}

// TestSaveAndFill takes random memory through a stream and back.
func TestSaveAndFill(t *testing.T) {
	const pages = 6000 // several records, with more runs than one may have
	for seed := range uint64(6) {
		random := rand.New(rand.NewPCG(seed, 2))
		b := mapped(t, pages, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if seed == 0 { // as scattered as can be
			for i := 0; i < pages; i += 2 {
				page(b, i)[7] = byte(i/2) | 1
			}
		} else {
			scatter(t, b, random)
		}
		a := image.Area{Start: addressOf(b), End: addressOf(b) + uint64(len(b)), Kind: image.AreaAnon, Prot: 3}
		st := newStream(t, []image.Area{a}, &image.Shmem{})
		written := 0
		save := NewSaver(st.w)
		save.Progress = func(n int) error { written += n; return nil }
		space := &Space{Pid: os.Getpid(), Record: &image.MM{Areas: []image.Area{a}}, pages: []source{{readable: seed%2 == 0, file: seed >= 3}}}
		must(t, space.Save(save.For(st.mm)))
		must(t, save.Close())
		want := bytes.Clone(b)
		for i := range b {
			b[i] = 0
		}
		if seed < 3 {
			must(t, unix.Madvise(b, unix.MADV_DONTNEED))
		}
		f := NewFiller()
		f.Space(st.mm, os.Getpid())
		saved := 0
		for _, r := range st.fill(t, f) {
			if !r.Zero {
				saved += int(r.Count) * PageSize
			}
		}
		if !bytes.Equal(b, want) || saved > written {
			t.Errorf("seed %d: memory differs, or %d bytes of %d that were read", seed, saved, written)
		}
		nonzero := 0
		for i := range pages {
			if !bytes.Equal(page(want, i), zeroPage[:]) {
				nonzero += PageSize
			}
		}
		if saved != nonzero {
			t.Errorf("seed %d: %d bytes saved of %d that are not zero", seed, saved, nonzero)
		}
	}
}

func TestSaveAborts(t *testing.T) {
	b := mapped(t, 600, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for i := range b {
		b[i] = 1
	}
	a := image.Area{Start: addressOf(b), End: addressOf(b) + uint64(len(b)), Kind: image.AreaAnon, Prot: 3}
	st := newStream(t, []image.Area{a}, &image.Shmem{})
	save, stop := NewSaver(st.w), errors.New("stop")
	save.Progress = func(int) error { return stop }
	space := &Space{Pid: os.Getpid(), Record: &image.MM{Areas: []image.Area{a}}, pages: []source{{readable: true}}}
	if err := space.Save(save.For(st.mm)); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
	must(t, save.Close())
}

// A writer's error comes out once, at a flush or at the end.
func TestSaveWriterFails(t *testing.T) {
	b := mapped(t, 2000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for i := range b {
		b[i] = 1
	}
	a := image.Area{Start: addressOf(b), End: addressOf(b) + uint64(len(b)), Kind: image.AreaAnon, Prot: 3}
	for _, pages := range []uint64{1, 2000} {
		a.End = a.Start + pages*PageSize
		w := image.NewWriter(&bytes.Buffer{}) // without a head it takes no pages
		save := NewSaver(w)
		space := &Space{Pid: os.Getpid(), Record: &image.MM{Areas: []image.Area{a}}, pages: []source{{readable: true}}}
		first := space.Save(save.For(1))
		last := save.Close()
		if (first == nil) == (last == nil) {
			t.Errorf("%d pages: %v while saving, %v at the end", pages, first, last)
		}
	}
}

// TestFillForeign writes where the task may not, and nowhere else.
func TestFillForeign(t *testing.T) {
	b := mapped(t, 2, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	f := NewFiller()
	f.Space(5, os.Getpid())
	must(t, f.Fill(&image.Content{Ref: 5, Runs: []image.Run{{Addr: addressOf(b), Count: 1}}, Raw: bytes.Repeat([]byte{7}, PageSize)}))
	if b[0] != 7 || b[PageSize-1] != 7 || b[PageSize] != 0 {
		t.Errorf("%d %d %d", b[0], b[PageSize-1], b[PageSize])
	}
	if err := f.Fill(&image.Content{Ref: 6, Runs: []image.Run{{Addr: addressOf(b), Count: 1, Zero: true}}}); err == nil {
		t.Error("pages of an object without memory were taken")
	}
}

func TestSegment(t *testing.T) {
	fd, err := unix.MemfdCreate("cache", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
	must(t, err)
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	const size = 300*PageSize + 5
	must(t, f.Truncate(size))
	for _, at := range []int64{0, 17*PageSize + 9, 18 * PageSize, 299 * PageSize, size - 1} {
		_, err := f.WriteAt([]byte{byte(at) | 1}, at)
		must(t, err)
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK)
	must(t, err)
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	shared, link := NewShared(), "/proc/self/fd/"+itoa(fd)
	seg, err := shared.Open(&st, link, "/memfd:cache (deleted)")
	must(t, err)
	if again, err := shared.Open(&st, link, "/memfd:cache (deleted)"); again != seg || err != nil || len(shared.Segments()) != 1 {
		t.Errorf("found again as another: %v", err)
	}
	must(t, seg.Details())
	if want := (image.Shmem{Size: size, Name: "cache", Memfd: true, Seals: unix.F_SEAL_SHRINK, Mode: st.Mode & 0o7777}); *seg.Record != want {
		t.Errorf("%+v, want %+v", *seg.Record, want)
	}
	out := newStream(t, nil, seg.Record)
	save := NewSaver(out.w)
	must(t, seg.Save(save.For(out.shmem)))
	must(t, save.Close())
	copied, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer copied.Close()
	fill := NewFiller()
	fill.Segment(out.shmem, copied)
	runs := out.fill(t, fill)
	must(t, copied.Truncate(size))
	want, err := os.ReadFile(link)
	must(t, err)
	got, err := os.ReadFile(copied.Name())
	must(t, err)
	if !bytes.Equal(got, want) || len(runs) != 3 {
		t.Errorf("contents differ, or not three runs: %+v", runs)
	}
}

func TestResident(t *testing.T) {
	debug.FreeOSMemory() // not in between
	before, err := Resident(os.Getpid())
	must(t, err)
	b := mapped(t, 5000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	for i := range 5000 {
		page(b, i)[0] = 1
	}
	after, err := Resident(os.Getpid())
	must(t, err)
	if grown := after - before; grown < 4000*PageSize || grown > 20000*PageSize {
		t.Errorf("5000 pages more are %d bytes", grown)
	}
	if _, err := Resident(1 << 22); !errors.Is(err, tracee.ErrGone) {
		t.Errorf("of nobody: %v", err)
	}
}
