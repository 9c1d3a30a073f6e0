package mm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestHole(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		var spaces []*image.MM
		for range 1 + random.IntN(3) {
			m, at := &image.MM{}, uint64(0x10000)
			for range random.IntN(40) {
				at += random.Uint64N(1<<(12+random.IntN(34))) &^ (PageSize - 1)
				end := at + PageSize + random.Uint64N(1<<(12+random.IntN(30)))&^(PageSize-1)
				m.Areas = append(m.Areas, image.Area{Start: at, End: end})
				at = end
			}
			spaces = append(spaces, m)
		}
		hole, err := Hole(false, spaces...)
		must(t, err)
		if hole%PageSize != 0 || hole < lowest || hole+tracee.ServiceSize > taskSize {
			t.Fatalf("hole at %#x", hole)
		}
		for _, m := range spaces {
			for _, a := range m.Areas {
				if a.Start < hole+tracee.ServiceSize+margin && hole < a.End+margin {
					t.Fatalf("hole at %#x is in the way of %#x-%#x", hole, a.Start, a.End)
				}
			}
		}
	}
	if hole, err := Hole(false, &image.MM{Areas: []image.Area{{Start: lowest, End: taskSize}}}); err == nil {
		t.Errorf("a hole in a full address space: %#x", hole)
	}
	if hole, err := Hole(false); err != nil || hole != lowest+margin {
		t.Errorf("a hole in an empty one: %#x, %v", hole, err)
	}
}

// opens gives every file the number of its reference.
type opens struct{}

func (opens) FD(file image.Ref) (int, error) {
	if file == 0 {
		return 0, errors.New("no file")
	}
	return int(file), nil
}

func (opens) SysV(image.Ref) *image.Shmem { return nil }

func (opens) SegmentFD(shmem image.Ref, _ bool) (int, bool) { return int(shmem), shmem != 0 }

func TestMapArea(t *testing.T) {
	const none, fixed = ^uint64(0), unix.MAP_FIXED_NOREPLACE
	for name, c := range map[string]struct {
		a               image.Area
		prot, flags, fd uint64
	}{
		"heap":               {image.Area{Kind: image.AreaAnon, Prot: 3, Flags: []string{"ac"}}, 3, fixed | unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, none},
		"read-only data":     {image.Area{Kind: image.AreaFile, File: 5, Prot: 1, Flags: []string{"ac"}}, 3, fixed | unix.MAP_PRIVATE, 5},
		"text":               {image.Area{Kind: image.AreaFile, File: 5, Prot: 5}, 5, fixed | unix.MAP_PRIVATE, 5},
		"guard":              {image.Area{Kind: image.AreaAnon}, 0, fixed | unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, none},
		"stack":              {image.Area{Kind: image.AreaAnon, Prot: 3, Flags: []string{"gd", "ac"}}, 3, fixed | unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_GROWSDOWN, none},
		"not accounted":      {image.Area{Kind: image.AreaAnon, Prot: 3, Flags: []string{"nr", "dd"}}, 3, fixed | unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE, none},
		"shared memory":      {image.Area{Kind: image.AreaShmem, File: 6, Prot: 1, Shared: true, Flags: []string{"ac"}}, 1, fixed | unix.MAP_SHARED, 6},
		"droppable":          {image.Area{Kind: image.AreaAnon, Prot: 3, Flags: []string{"dp", "nr"}}, 3, fixed | unix.MAP_DROPPABLE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE, none},
		"of a DAX file":      {image.Area{Kind: image.AreaFile, File: 5, Prot: 3, Shared: true, Flags: []string{"sf"}}, 3, fixed | unix.MAP_SHARED_VALIDATE | unix.MAP_SYNC, 5},
		"huge pages":         {image.Area{Kind: image.AreaAnon, Prot: 1, HugePage: 2 << 20}, 3, fixed | unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_HUGETLB | 21<<26, none},
		"private view of it": {image.Area{Kind: image.AreaShmem, File: 6, Prot: 1, Flags: []string{"ac"}}, 3, fixed | unix.MAP_PRIVATE, 6},
	} {
		c.a.Start, c.a.End, c.a.Offset = 0x10000, 0x14000, 0x2000
		var b tracee.Batch
		must(t, mapArea(&b, &c.a, opens{}))
		want := [6]tracee.Word{tracee.W(0x10000), tracee.W(0x4000), tracee.W(c.prot), tracee.W(c.flags), tracee.W(c.fd), tracee.W(0x2000)}
		if len(b.Calls) != 1 || b.Calls[0].Nr != unix.SYS_MMAP || b.Calls[0].Args != want || b.Calls[0].Tolerate {
			t.Errorf("%s: %+v, want %+v", name, b.Calls, want)
		}
	}
	for name, a := range map[string]image.Area{
		"no file": {Kind: image.AreaFile}, "no memory": {Kind: image.AreaShmem}, "unknown": {Kind: "hologram"},
	} {
		if err := mapArea(&tracee.Batch{}, &a, opens{}); err == nil {
			t.Errorf("%s: mapped", name)
		}
	}
}

func TestProtect(t *testing.T) {
	m := &image.MM{LockFuture: unix.MCL_FUTURE, Areas: []image.Area{
		{Start: 0x1000, End: 0x2000, Kind: image.AreaAnon, Prot: 1, Name: "[anon:a name]", Flags: []string{accounted, "dd", locked, lockedLate, sealed}},
		{Start: 0x2000, End: 0x3000, Kind: image.AreaVDSO},
		{Start: 0x3000, End: 0x4000, Kind: image.AreaShmem, Prot: 3, Shared: true, Flags: []string{locked}},
	}}
	f := NewFiller()
	f.guards[7] = []extent{{0x1000, 0x2000}}
	var b tracee.Batch
	must(t, f.Protect(nil, &b, 7, m))
	var got []uintptr
	for _, c := range b.Calls {
		got = append(got, c.Nr)
	}
	want := []uintptr{unix.SYS_MADVISE, unix.SYS_MPROTECT, unix.SYS_MADVISE, unix.SYS_PRCTL, unix.SYS_MLOCK2, unix.SYS_MSEAL, unix.SYS_MLOCK2, unix.SYS_MLOCKALL}
	if !slices.Equal(got, want) || b.Calls[0].Args[2] != tracee.W(unix.MADV_GUARD_INSTALL) || b.Calls[4].Args[2] != tracee.W(unix.MLOCK_ONFAULT) || b.Calls[6].Args[2] != tracee.W(0) {
		t.Errorf("calls %v, want %v: %+v", got, want, b.Calls)
	}
	if n := Locked(m); n != 0x2000 {
		t.Errorf("%#x bytes are locked", n)
	}
}

func TestMemfdFlags(t *testing.T) {
	for _, c := range []struct {
		rec  image.Shmem
		want uint64
	}{
		{image.Shmem{Mode: 0o777}, unix.MFD_ALLOW_SEALING | unix.MFD_EXEC},
		{image.Shmem{Mode: 0o666, Seals: unix.F_SEAL_EXEC}, unix.MFD_ALLOW_SEALING | unix.MFD_NOEXEC_SEAL},
		{image.Shmem{Mode: 0o777, HugePage: 2 << 20}, unix.MFD_ALLOW_SEALING | unix.MFD_EXEC | unix.MFD_HUGETLB | unix.MFD_HUGE_2MB},
		{image.Shmem{Mode: 0o777, HugePage: 1 << 30}, unix.MFD_ALLOW_SEALING | unix.MFD_EXEC | unix.MFD_HUGETLB | unix.MFD_HUGE_1GB},
	} {
		if got := memfdFlags(&c.rec); got != c.want {
			t.Errorf("%+v: flags %#x, want %#x", c.rec, got, c.want)
		}
	}
}

func TestCheckKeys(t *testing.T) {
	const offset = 2688
	xstate := make([]byte, offset+8)
	with := func(bits uint64, pkru uint32) []byte {
		binary.LittleEndian.PutUint64(xstate[xstateBV:], bits)
		binary.LittleEndian.PutUint32(xstate[offset:], pkru)
		return xstate
	}
	all := uint64(1 << pkruComponent)
	if err := errors.Join(checkKeys(with(all, pkruInitial), offset), checkKeys(with(0, 0), offset), checkKeys(with(all, 0), 0), checkKeys(nil, offset), CheckKeys(nil)); err != nil {
		t.Error(err)
	}
	if err := checkKeys(with(all, pkruInitial&^0xc), offset); err == nil {
		t.Error("a key that was allocated is not noticed")
	}
}

// rebuilt is the address space of a running program, and a stub in which it has
// been laid out again and filled, but not yet protected.
type rebuilt struct {
	pid    int
	files  *program
	space  *Space
	stub   *tracee.Stub
	hole   uint64
	ref    image.Ref
	filler *Filler
}

func rebuild(t *testing.T) *rebuilt {
	t.Helper()
	c := exec.Command("sleep", "1000")
	start(t, c)
	r := &rebuilt{pid: c.Process.Pid, files: &program{opened: map[image.Ref]int{}}}
	var err error
	r.space, err = Scan(r.pid, 0, ReadMappings(r.pid), r.files, NewShared())
	must(t, err)
	must(t, r.space.Details(statField(t, r.pid), heapEnd(r.space.Record)))
	for i, o := range r.files.objects {
		o.Ref = image.Ref(i + 1)
	}
	r.space.complete()
	r.hole, err = Hole(false, r.space.Record)
	must(t, err)
	r.stub = traceetest.Stub(t, r.hole)
	r.files.open(t, r.stub)
	must(t, Rebuild(r.stub, r.space.Record, r.files))
	st := newStream(t, withoutFiles(r.space.Record.Areas), &image.Shmem{})
	r.ref = st.mm
	save := NewSaver(st.w)
	must(t, r.space.Save(save.For(r.ref)))
	must(t, save.Close())
	r.filler = NewFiller()
	r.filler.Space(r.ref, r.stub.Pid)
	st.fill(t, r.filler)
	return r
}

// protect gives the stub's areas their own protection.
func (r *rebuilt) protect(t *testing.T, s *tracee.Stub, ref image.Ref) {
	t.Helper()
	var b tracee.Batch
	must(t, Layout(&b, r.space.Record, r.files))
	must(t, r.filler.Protect(s, &b, ref, r.space.Record))
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
}

// TestScanAndRebuild makes the address space of a running program again in a
// stub and compares all of it.
func TestScanAndRebuild(t *testing.T) {
	r := rebuild(t)
	r.protect(t, r.stub, r.ref)
	sameMemory(t, r.pid, r.stub.Pid, r.hole)
}

// program is the files that a program has mapped.
type program struct {
	objects []*object.Object
	paths   []string
	opened  map[image.Ref]int
}

func (p *program) Mapped(_ int, path, _ string, _ bool) (*object.Object, error) {
	if i := slices.Index(p.paths, path); i >= 0 {
		return p.objects[i], nil
	}
	p.paths, p.objects = append(p.paths, path), append(p.objects, &object.Object{})
	return p.objects[len(p.objects)-1], nil
}

func (p *program) open(t *testing.T, s *tracee.Stub) {
	var b tracee.Batch
	for _, path := range p.paths {
		b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String(path), tracee.W(unix.O_RDONLY))
	}
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	for i, o := range p.objects {
		p.opened[o.Ref] = int(b.Calls[i].Ret)
	}
}

func (p *program) FD(file image.Ref) (int, error) {
	fd, ok := p.opened[file]
	if !ok {
		return 0, fmt.Errorf("object %d is not open", file)
	}
	return fd, nil
}

func (p *program) Removed(string, string) bool { return false }

func (p *program) SysV(image.Ref) *image.Shmem           { return nil }
func (p *program) SegmentFD(image.Ref, bool) (int, bool) { return 0, false }

// withoutFiles makes areas that a stream without their files can hold.
func withoutFiles(areas []image.Area) []image.Area {
	areas = slices.Clone(areas)
	for i := range areas {
		areas[i].Kind, areas[i].File = image.AreaAnon, 0
	}
	return areas
}

func heapEnd(m *image.MM) uint64 {
	for _, a := range m.Areas {
		if a.Name == "[heap]" {
			return a.End
		}
	}
	return 0
}

func statField(t *testing.T, pid int) func(n int) uint64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	f := strings.Fields(string(raw))
	return func(n int) uint64 { v, _ := strconv.ParseUint(f[n-1], 10, 64); return v }
}

// sameMemory compares mappings and, where they can be read, their contents. The
// service area, at hole, is the stub's own.
func sameMemory(t *testing.T, want, got int, hole uint64) {
	t.Helper()
	a, err := readMappings(want)
	must(t, err)
	b, err := readMappings(got)
	must(t, err)
	b = slices.DeleteFunc(b, func(m mapping) bool { return m.start >= hole && m.end <= hole+tracee.ServiceSize })
	if len(a) != len(b) {
		t.Fatalf("%d mappings instead of %d:\n%+v\n%+v", len(b), len(a), b, a)
	}
	for i := range a {
		ours, theirs := fmt.Sprintf("%+v", a[i]), fmt.Sprintf("%+v", b[i])
		if ours != theirs {
			t.Errorf("mapping is\n%s, want\n%s", theirs, ours)
		}
		x, y := make([]byte, a[i].end-a[i].start), make([]byte, a[i].end-a[i].start)
		if strings.HasPrefix(a[i].name, "[v") || tracee.ReadMemory(want, a[i].start, x) != nil {
			continue
		}
		must(t, tracee.ReadMemory(got, a[i].start, y))
		if !bytes.Equal(x, y) {
			t.Errorf("contents of %s differ", ours)
		}
	}
	for _, name := range []string{"cmdline", "environ", "auxv"} {
		x, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", want, name))
		must(t, err)
		y, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", got, name))
		must(t, err)
		if !bytes.Equal(x, y) {
			t.Errorf("%s is %q, want %q", name, y, x)
		}
	}
}

// start runs a command until the test ends; the test keeps its thread.
func start(t *testing.T, c *exec.Cmd) {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	ready, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait(); _ = ready.Close() })
	for range 5000 { // until it sleeps
		time.Sleep(time.Millisecond)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", c.Process.Pid))
		must(t, err)
		if strings.HasPrefix(string(b), strconv.Itoa(unix.SYS_CLOCK_NANOSLEEP)+" ") || strings.HasPrefix(string(b), "0 ") {
			return
		}
	}
	t.Fatalf("%v does not sleep", c.Args)
}
