package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// forge writes records with good checksums that the Writer would refuse.
type forge struct {
	bytes.Buffer
	*Writer
}

func newForge() *forge {
	f := &forge{}
	f.Writer = NewWriter(&f.Buffer)
	return f
}

// raw writes a record with any payload.
func (f *forge) raw(t Type, ref Ref, payload []byte) {
	f.begin(t, ref, uint64(len(payload)))
	f.put(payload)
	_ = f.end()
}

// any writes a record with the encoding of any value.
func (f *forge) any(t testing.TB, ty Type, ref Ref, v any) {
	t.Helper()
	p, err := encode(v)
	check(t, err)
	f.raw(ty, ref, p)
}

// head writes the sample's first n records, n at most 4.
func (f *forge) head(t testing.TB, n int) {
	t.Helper()
	for _, r := range []sampleRecord{
		{TypeHeader, sampleHeader()}, {TypeArch, sampleArch()}, {TypeContainer, sampleContainer()}, {TypeTree, sampleTree()},
	}[:n] {
		f.any(t, r.t, 0, r.v)
	}
}

// objects writes the sample's fifth section.
func (f *forge) objects(t testing.TB) {
	t.Helper()
	ref := Ref(3)
	for _, r := range sampleObjects() {
		if types[r.t].object {
			f.any(t, r.t, ref, r.v)
			ref++
		} else {
			f.any(t, r.t, 0, r.v)
		}
	}
}

func (f *forge) image() []byte {
	_ = f.flush()
	return f.Buffer.Bytes()
}

// refused checks that Verify and Inspect refuse an image with one line that
// says what is expected, without much memory.
func refused(t *testing.T, image []byte, want string) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Verify(bytes.NewReader(image))
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20+20*uint64(len(image)) {
		t.Errorf("refusing it allocated %d bytes", used)
	}
	if err == nil {
		t.Fatalf("it was accepted; want %q", want)
	}
	if !strings.Contains(err.Error(), want) || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("message %q, want %q in it", err, want)
	}
	if _, err := Inspect(bytes.NewReader(image)); err == nil {
		t.Error("Inspect accepts it")
	}
}

func TestEveryFlipDetected(t *testing.T) {
	image := smallImage(t)
	for i := range image {
		for _, bit := range []byte{1, 0x80, 0xff} {
			damaged := bytes.Clone(image)
			damaged[i] ^= bit
			if _, err := Verify(bytes.NewReader(damaged)); err == nil {
				t.Errorf("byte %d changed by %#x is not detected", i, bit)
			}
		}
	}
}

func TestEveryTruncationDetected(t *testing.T) {
	image := smallImage(t)
	for n := range image {
		_, err := Verify(bytes.NewReader(image[:n]))
		want := ErrTruncated
		if n < preHeaderSize {
			want = ErrNotImage
		}
		if !errors.Is(err, want) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestTrailingGarbage(t *testing.T) {
	refused(t, append(sampleImage(t), 0), "goes on after its trailer")
}

func TestNotImage(t *testing.T) {
	for _, s := range []string{"", "short", "\x7fELF\x02\x01\x01 and some more bytes", string(make([]byte, 100))} {
		if _, err := Verify(strings.NewReader(s)); !errors.Is(err, ErrNotImage) {
			t.Errorf("%q: %v", s, err)
		}
	}
	f := newForge()
	h := sampleHeader()
	h.Magic = TrailerMagic
	f.any(t, TypeHeader, 0, h)
	if _, err := Verify(bytes.NewReader(f.image())); err != ErrNotImage {
		t.Errorf("wrong magic: %v", err)
	}
}

// TestNewerRevision uses a header whose other fields this revision cannot
// decode.
func TestNewerRevision(t *testing.T) {
	f := newForge()
	f.any(t, TypeHeader, 0, map[int]any{1: HeaderMagic, 2: Revision + 1, 3: []int{1, 2}, 8: "all"})
	_, err := Verify(bytes.NewReader(f.image()))
	var newer *RevisionError
	if !errors.As(err, &newer) || newer.Image != 2 || newer.Supported != 1 {
		t.Fatalf("%v", err)
	}
	if !strings.Contains(err.Error(), "revision 2") || !strings.Contains(err.Error(), "revision 1") {
		t.Errorf("message %q", err)
	}
}

func TestUnknownKeysTolerated(t *testing.T) {
	f := newForge()
	f.head(t, 3)
	f.any(t, TypeTree, 0, map[int]any{
		1:  []any{map[int]any{1: 1, 2: 0, 3: 1, 4: 1, 5: []int{1}, 7: true, 9: []byte("init"), 99: map[string]any{"new": []int{1}}}},
		98: "a field of a later writer",
	})
	f.any(t, TypeTrailer, 0, f.tally.trailer())
	if _, err := Verify(bytes.NewReader(f.image())); err != nil {
		t.Error(err)
	}
}

func TestOrder(t *testing.T) {
	pipe := Pipe{Capacity: 4096}
	for name, c := range map[string]struct {
		write func(f *forge)
		want  string
	}{
		"arch first":      {func(f *forge) { f.any(t, TypeArch, 0, sampleArch()) }, "not an ocickpt image"},
		"no arch":         {func(f *forge) { f.head(t, 1); f.any(t, TypeContainer, 0, sampleContainer()) }, "container record at offset 128: it is out of order"},
		"header twice":    {func(f *forge) { f.head(t, 1); f.head(t, 1) }, "out of order"},
		"tree twice":      {func(f *forge) { f.head(t, 4); f.any(t, TypeTree, 0, sampleTree()) }, "only once"},
		"object early":    {func(f *forge) { f.head(t, 3); f.any(t, TypePipe, 3, pipe) }, "out of order"},
		"object late":     {func(f *forge) { f.contents(t); f.any(t, TypePipe, 90, pipe) }, "objects stand before contents"},
		"contents early":  {func(f *forge) { f.head(t, 4); f.any(t, TypePages, 1, 0) }, "no task record for process 1"},
		"trailer early":   {func(f *forge) { f.head(t, 2); f.any(t, TypeTrailer, 0, Trailer{}) }, "out of order"},
		"ref zero":        {func(f *forge) { f.head(t, 4); f.any(t, TypePipe, 0, pipe) }, "does not ascend"},
		"ref reused":      {func(f *forge) { f.head(t, 4); f.any(t, TypePipe, 2, pipe) }, "does not ascend"},
		"ref descends":    {func(f *forge) { f.head(t, 4); f.any(t, TypePipe, 9, pipe); f.any(t, TypePipe, 8, pipe) }, "does not ascend"},
		"ref on a task":   {func(f *forge) { f.head(t, 4); f.any(t, TypeTask, 3, Task{}) }, "must not carry a reference"},
		"unknown type":    {func(f *forge) { f.head(t, 4); f.any(t, 777, 3, pipe) }, "type-777 record at offset 752: this record type is not known"},
		"incomplete pipe": {func(f *forge) { f.contents(t); f.any(t, TypeTrailer, 0, f.tally.trailer()) }, "pipe #4 holds 5 bytes, the image has 0"},
		"wrong digest": {func(f *forge) {
			f.head(t, 3)
			f.any(t, TypeTree, 0, Tree{Processes: []Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}})
			tr := f.tally.trailer()
			tr.Digest[0]++
			f.any(t, TypeTrailer, 0, tr)
		}, "digest is not what the trailer says"},
		"late for nobody": {func(f *forge) {
			f.full(t)
			tr := f.tally.trailer()
			tr.Late = []Late{{Pid: 99, Pending: [][]byte{make([]byte, siginfoSize)}}}
			f.any(t, TypeTrailer, 0, tr)
		}, "process 99, which is not there"},
		"late for no thread": {func(f *forge) {
			f.full(t)
			tr := f.tally.trailer()
			tr.Late = []Late{{Pid: 1, Tid: 99}}
			f.any(t, TypeTrailer, 0, tr)
		}, "thread 99 of process 1, which is not there"},
		"late and many": {func(f *forge) {
			f.full(t)
			tr := f.tally.trailer()
			tr.Late = []Late{{Pid: 1, Pending: slices.Repeat([][]byte{make([]byte, siginfoSize)}, maxLate+1)}}
			f.any(t, TypeTrailer, 0, tr)
		}, "more than 128 signals came late"},
		"late and short": {func(f *forge) {
			f.full(t)
			tr := f.tally.trailer()
			tr.Late = []Late{{Pid: 1, Pending: [][]byte{{1}}}}
			f.any(t, TypeTrailer, 0, tr)
		}, "siginfo_t of 1 bytes"},
		"no trailer": {func(f *forge) { f.contents(t) }, "without a trailer"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForge()
			c.write(f)
			refused(t, f.image(), c.want)
		})
	}
}

// bulk writes a bulk record whose checksum is right.
func (f *forge) bulk(t Type, ref Ref, header any, raw []byte) error {
	return f.Writer.bulk(t, ref, header, raw, Checksum(raw))
}

// contents writes the sample's head and its first bulk record.
func (f *forge) contents(t testing.TB) {
	t.Helper()
	f.head(t, 4)
	f.objects(t)
	c := sampleContents()[0]
	f.tally.pages += 2
	check(t, f.bulk(TypePages, c.Ref, Pages{c.Runs}, c.Raw))
}

// full writes everything but the trailer.
func (f *forge) full(t testing.TB) {
	t.Helper()
	f.contents(t)
	check(t, f.bulk(TypeBytes, refPipe, Bytes{}, []byte("hello")))
}

// TestBadObjects damages one record of the sample's head at a time.
// connectionRecord is an established connection with something wrong.
func connectionRecord(damage func(s *Socket)) File {
	address := make([]byte, 16)
	s := &Socket{Family: afInet, Type: 1, Protocol: 6, Address: address, TCP: &TCP{State: 1, Peer: address, Send: Stream{Bytes: 1}}}
	damage(s)
	return File{Kind: KindSocket, Socket: s}
}

func TestBadObjects(t *testing.T) {
	for _, c := range []struct {
		want   string
		damage func(r *sampleRecord) bool
	}{
		{"owner 1 of type 3 with signal 0", on(func(f *File) bool { f.Owner = &Owner{Type: 3, ID: 1}; return true })},
		{"owner -1 of type 0 with signal 0", on(func(f *File) bool { f.Owner = &Owner{ID: -1}; return true })},
		{"owner 1 of type 0 with signal 65", on(func(f *File) bool { f.Owner = &Owner{ID: 1, Signal: 65}; return true })},
		{"names no file without a name", on(func(f *File) bool { f.Removed = refStdin; return f.Kind == KindRegular })},
		{"with a file of mode", on(func(f *File) bool { f.Kind = KindDirectory; return f.Removed != 0 })},
		{"read like a directory", on(func(f *File) bool { f.Reading = &Reading{}; return f.Kind == KindRegular })},
		{`"a/b" is no name in a directory`, on(func(f *File) bool {
			was := f.Kind
			f.Kind, f.Reading = KindDirectory, &Reading{Rest: []string{"a/b"}}
			return was == KindRegular && f.Removed == 0
		})},
		{"mode 01100640", on(func(i *Removed) bool { i.Mode = 0o1100640; return true })},
		{"is not known", on(func(i *Removed) bool { i.Mode = 0o060600; return true })},
		{"not absolute", on(func(i *Removed) bool { i.Path = "/var/../etc/passwd"; return true })},
		{"not absolute", on(func(i *Removed) bool { i.Path = "log"; return true })},
		{"not absolute", on(func(i *Removed) bool { i.Link = "log"; return true })},
		{"no name to lose", on(func(i *Removed) bool { i.Path = "/"; return true })},
		{"that has none", on(func(i *Removed) bool { i.Size = -1; return true })},
		{"that has none", on(func(i *Removed) bool { i.Mode = 0o040755; return true })},
		{"only a regular", on(func(i *Removed) bool { i.Mode, i.Size, i.Unnamed = 0o040755, 0, true; return true })},
		{"without a target", on(func(i *Removed) bool { i.Mode, i.Size = 0o120777, 0; return true })},
		{"names no directory", on(func(f *FS) bool { f.CwdRemoved = refGone; return true })},
		{"names no pipe", on(func(f *File) bool { f.Pipe = refStdin; return f.Kind == KindPipe })},
		{"names no pipe", on(func(f *File) bool { f.Pipe = refMMInit; return f.Kind == KindPipe })},
		{`kind "drum" is not known`, on(func(f *File) bool { f.Kind = "drum"; return true })},
		{"without the part", on(func(f *File) bool { f.Eventfd = nil; return f.Kind == KindEventfd })},
		{"part of another kind", on(func(f *File) bool { f.Epoll = &Epoll{}; return f.Kind == KindEventfd })},
		{"names no open file", on(func(f *File) bool {
			if f.Epoll == nil {
				return false
			}
			f.Epoll = &Epoll{Entries: []EpollEntry{{FD: 3, File: refPipe}}}
			return true
		})},
		{"a socket that can have none", instead(connectionRecord(func(s *Socket) { s.Family = afUnix }))},
		{"a socket that can have none", instead(connectionRecord(func(s *Socket) { s.Protocol = 17 }))},
		{"a socket that can have none", instead(connectionRecord(func(s *Socket) { s.Listening = true }))},
		{"in state 10", instead(connectionRecord(func(s *Socket) { s.TCP.State = 10 }))},
		{"addresses of 16 and 3 bytes", instead(connectionRecord(func(s *Socket) { s.TCP.Peer = s.TCP.Peer[:3] }))},
		{"addresses of 0 and 16 bytes", instead(connectionRecord(func(s *Socket) { s.Address = nil }))},
		{"2 of them unsent", instead(connectionRecord(func(s *Socket) { s.TCP.Unsent = 2 }))},
		{"queues of 4294967295", instead(connectionRecord(func(s *Socket) { s.TCP.Receive.Bytes = 1<<32 - 1 }))},
		{"window scales 15", instead(connectionRecord(func(s *Socket) { s.TCP.SendScale = 15 }))},
		{"about thread 3 of task 0", instead(File{Kind: KindPidfd, Thread: 3, Gone: &Gone{Number: 1}})},
		{"about thread -3 of task 1", instead(File{Kind: KindPidfd, Thread: -3, Pid: 1})},
		{"about thread 3 of task 1", instead(File{Kind: KindTTY, Thread: 3, Pid: 1})},
		{"a pidfd without a task", instead(File{Kind: KindPidfd})},
		{"without a number", instead(File{Kind: KindPidfd, Gone: &Gone{}})},
		{"one that is there too", instead(File{Kind: KindPidfd, Pid: 1, Gone: &Gone{Number: 1}})},
		{"about a task that is gone", instead(File{Kind: KindDevice, Gone: &Gone{Number: 1}})},
		{"is no file of task 7", instead(File{Kind: KindProc, Path: "/proc/8/status", Gone: &Gone{Number: 1, Pid: 7}})},
		{"is no file of task 7", instead(File{Kind: KindProc, Path: "/proc/7/../sys", Gone: &Gone{Number: 1, Pid: 7}})},
		{"is no file of task 7", instead(File{Kind: KindProc, Path: "/proc/7/..", Gone: &Gone{Number: 1, Pid: 7}})},
		{"is no file of task 0", instead(File{Kind: KindProc, Path: "/proc/sys", Gone: &Gone{Number: 1}})},
		{"is no namespace of task 7", instead(File{Kind: KindNamespace, Pid: 7, Path: "/proc/7/ns/../mem"})},
		{"is no namespace of task 7", instead(File{Kind: KindNamespace, Pid: 7, Path: "/proc/7/ns/all"})},
		{"is no namespace of task 0", instead(File{Kind: KindNamespace, Path: "/proc/0/ns/net"})},
		{"parameters of 3 bytes", on(func(f *File) bool {
			if f.Epoll == nil {
				return false
			}
			f.Epoll = &Epoll{BusyPoll: make([]byte, 3)}
			return true
		})},
		{"has runs of 4", on(func(p *Pipe) bool { p.Runs = []PipeRun{{Length: 4, Packet: true}}; return true })},
		{"a packet of 4097 bytes", on(func(p *Pipe) bool { p.Runs = []PipeRun{{Length: 4097, Packet: true}}; return true })},
		{"a packet of 0 bytes", on(func(p *Pipe) bool { p.Runs = []PipeRun{{}, {Length: 5}}; return true })},
		{"names no fifo", on(func(p *Pipe) bool { p.Removed = refPipe; return true })},
		{"a group with the flags 0x4", instead(File{Kind: KindFanotify, Fanotify: &Fanotify{Flags: 4}})},
		{"mark 0 has the flags 0x2", marking(Mark{Flags: 2, Mask: 2, Path: "/etc"})},
		{"is about 0x10000", marking(Mark{Mask: 0x10000, Path: "/etc"})},
		{"is about 0x0, but for 0x0", marking(Mark{Path: "/etc"})},
		{"mark 0 has no path and no file", marking(Mark{Mask: 2})},
		{"mark 0: reference", marking(Mark{Mask: 2, Object: refPipe})},
		{"watch 0 is not positive", watching(Watch{Mask: 2, Path: "/etc"})},
		{"watch 1 is not positive or stands twice", watching(Watch{WD: 1, Mask: 2, Path: "/etc"}, Watch{WD: 1, Mask: 2, Path: "/srv"})},
		{"has the mask 0x2000002", watching(Watch{WD: 1, Mask: 0x2000002, Path: "/etc"})},
		{"no path and no file", watching(Watch{WD: 1, Mask: 2, Path: "etc"})},
		{"no path and no file", watching(Watch{WD: 1, Mask: 2, Path: "/etc", Object: refGone})},
		{"names no file before it", watching(Watch{WD: 1, Mask: 2, Object: refPipe})},
		{"position is negative", on(func(f *File) bool { f.Pos = -1; return true })},
		{`name "a\x00b" has a NUL`, on(func(f *File) bool { f.Path = "a\x00b"; return true })},
		{"longer than 65536", on(func(f *File) bool { f.Path = strings.Repeat("x", 70000); return true })},
		{"fd 3 is negative or stands twice", on(func(f *Files) bool { f.Descriptors[0].FD = 3; return true })},
		{"a lock from -1 to 5 on fd 3", on(func(f *Files) bool { f.Locks = []Lock{{FD: 3, Kind: LockOFD, Start: -1, End: 5}}; return true })},
		{"a lock from 6 to 5 on fd 3", on(func(f *Files) bool { f.Locks = []Lock{{FD: 3, Kind: LockOFD, Start: 6, End: 5}}; return true })},
		{"a lock from 0 to 5 on fd 77", on(func(f *Files) bool { f.Locks = []Lock{{FD: 77, Kind: LockPosix, End: 5}}; return true })},
		{"a lock of kind", on(func(f *Files) bool { f.Locks = []Lock{{FD: 3, Kind: "mandatory"}}; return true })},
		{"fd -1 is negative", on(func(f *Files) bool { f.Descriptors[0].FD = -1; return true })},
		{"fd 0: reference 4 names no open file", on(func(f *Files) bool { f.Descriptors[0].File = refPipe; return true })},
		{"umask", on(func(f *FS) bool { f.Umask = 0o1000; return true })},
		{"a pipe of 4 bytes holds 5", on(func(p *Pipe) bool { p.Capacity = 4; return true })},
		{"action for signal 65", on(func(s *Sighand) bool { s.Actions[0].Signal = 65; return true })},
		{"shared memory of", on(func(s *Shmem) bool { s.Size = 1 << 63; return true })},
		{"do not consist of huge pages", on(func(s *Shmem) bool { s.HugePage = 2 << 20; return true })},
		{"do not consist of huge pages", on(func(s *Shmem) bool { s.Size, s.HugePage = 3<<20, 3<<20; return true })},
		{"with a path", on(func(s *Shmem) bool { s.Path = "/dev/shm/x"; return true })},
		{"flags 0x1 of mlockall", on(func(m *MM) bool { m.LockFuture = 1; return true })},
		{"huge pages in an area of kind", on(func(m *MM) bool { m.Areas[0].HugePage = 2 << 20; return true })},
		{"does not consist of huge pages", on(func(m *MM) bool {
			m.Areas[0].Kind, m.Areas[0].File, m.Areas[0].HugePage = AreaAnon, 0, 1<<30
			return true
		})},
		{"over memory with pages of 0", on(func(m *MM) bool {
			m.Areas[0] = Area{Start: 0x400000, End: 0x600000, Kind: AreaShmem, File: refShmem, HugePage: 2 << 20}
			return true
		})},
		{"names no terminal", on(func(f *File) bool { f.Pipe = refPipe; return f.Kind == KindTTY })},
		{"without the part", on(func(f *File) bool { f.Pipe = 0; return f.Kind == KindTTY })},
		{"with a part of another kind", on(func(f *File) bool { f.Pid = 7; return f.Kind == KindTTY })},
		{"/dev/pts/4096: its number", on(func(p *Pty) bool { p.Index = 4096; return true })},
		{"settings of 43 bytes", on(func(p *Pty) bool { p.Termios = p.Termios[1:]; return true })},
		{"settings of 44 bytes", on(func(p *Pty) bool { p.HungUp = true; return true })},
		{"20000, 0 and 0 bytes wait", on(func(p *Pty) bool { p.Output = 20000; return true })},
		{"0 bytes of marks for 9", on(func(p *Pty) bool { p.Input = 9; return true })},
		{"has no side", on(func(p *Pty) bool { p.Console, p.Behind = true, 1; return true })},
		{"hung up and in use", on(func(p *Pty) bool { p.HungUp, p.Termios = true, nil; return true })},
		{"names no network namespace", on(func(n *Network) bool { n.Namespace = 1; return true })},
		{"its number 0 is not positive", on(func(n *Network) bool { n.Links[0].Index = 0; return true })},
		{"number 1 is not positive, or stands twice", on(func(n *Network) bool { n.Links[1].Index = 1; return true })},
		{"no device can have that name", on(func(n *Network) bool { n.Links[1].Name = "a/b"; return true })},
		{"does not fit its kind", on(func(n *Network) bool { n.Links[2].Tun = nil; return true })},
		{"its other end is itself", on(func(n *Network) bool { n.Links[1].Peer = 2; return true })},
		{"reference 1 names no network", on(func(n *Network) bool { n.Links[1].PeerNS = 1; return true })},
		{"a message is too long", on(func(n *Network) bool { n.Links[2].Create = make([]byte, 70000); return true })},
		{"a message of 70000 bytes", on(func(n *Network) bool { n.Routes = [][]byte{make([]byte, 70000)}; return true })},
		{"a message of 70000 bytes", on(func(n *Network) bool { n.Filters[0].Message = make([]byte, 70000); return true })},
		{"sysctl \"../kernel/core_pattern\"", on(func(n *Network) bool { n.Sysctls[0].Name = "../kernel/core_pattern"; return true })},
		{"sysctl \"/etc/passwd\"", on(func(n *Network) bool { n.Sysctls[0].Name = "/etc/passwd"; return true })},
		{"session -1", on(func(p *Pty) bool { p.Session = -1; return true })},
		{"mode 01777", on(func(p *Pty) bool { p.Mode = 0o1777; return true })},
		{"events without a ring", on(func(m *MM) bool { m.Areas[0].AIO = &AIO{}; return true })},
		{"any, or events", on(func(m *MM) bool { m.Areas[0].Kind, m.Areas[0].File = AreaAIO, 0; return true })},
		{"not shared or not whole", onRing(func(a *Area) { a.Offset = PageSize })},
		{"64 bytes of events from place 127 to 1 of 127", onRing(func(a *Area) { a.AIO.Head = 127 })},
		{"64 bytes of events from place 126 to 2 of 127", onRing(func(a *Area) { a.AIO.Tail = 2 })},
		{"of 536870912 bytes", onRing(func(a *Area) { a.End = a.Start + 1<<29 })},
		{"its donor", on(func(m *MM) bool { m.Donor = refShmem; return true })},
		{"its executable", on(func(m *MM) bool { m.Exe = refShmem; return true })},
		{"not aligned", on(func(m *MM) bool { m.Areas[0].Start++; return true })},
		{"it is empty", on(func(m *MM) bool { m.Areas[0].End = m.Areas[0].Start; return true })},
		{"begins before the end", on(func(m *MM) bool { m.Areas[0].End = areaHeap + 0x1000; return true })},
		{"not in user space", on(func(m *MM) bool { m.Areas[len(m.Areas)-1].End = 1 << 57; return true })},
		{"offset", on(func(m *MM) bool { m.Areas[0].Offset = ^uint64(0xfff); return true })},
		{"names no shared memory", on(func(m *MM) bool { m.Areas[0].Kind = AreaShmem; return true })},
		{"with an object behind it", on(func(m *MM) bool { m.Areas[0].Kind, m.Areas[0].File = AreaAnon, refExe; return true })},
		{`kind "gpu"`, on(func(m *MM) bool { m.Areas[0].Kind = "gpu"; return true })},
		{"no such process", on(func(k *Task) bool { k.Pid = 99; return true })},
		{"which has no task", on(func(k *Task) bool { k.Pid = 9; return true })},
		{"already has a task", on(func(k *Task) bool { k.Pid = 1; return k.MM == refMMChild })},
		{"threads are not those of the tree", on(func(k *Task) bool { k.Threads[0].Tid = 5; return true })},
		{"names no address space", on(func(k *Task) bool { k.MM = refPipe; return true })},
		{"names no descriptor table", on(func(k *Task) bool { k.Files = 1; return true })},
		{"names no file system context", on(func(k *Task) bool { k.FS = 0; return true })},
		{"names no signal actions", on(func(k *Task) bool { k.Sighand = 77; return true })},
		{"of another address space", on(func(k *Task) bool { k.Sighand = refSighand; return k.MM == refMMChild })},
		{"its own descriptor table or file system context", on(func(k *Task) bool { k.Threads[len(k.Threads)-1].FS = refPipe; return len(k.Threads) > 1 })},
		{"its leader has other tables", on(func(k *Task) bool { k.Threads[0].Files = refFilesInit; return true })},
		{"cannot have vforked", on(func(k *Task) bool { k.Threads[0].Vfork = 7; return k.Pid == 1 })},
		{"cannot have vforked", on(func(k *Task) bool { k.Threads[0].Vfork = 99; return k.Pid == 1 })},
		{"siginfo_t of 3 bytes", on(func(k *Task) bool { k.Pending = [][]byte{{1, 2, 3}}; return true })},
		{"posix timer 4", on(func(k *Task) bool { k.Timers = append(k.Timers, k.Timers[0]); return true })},
		{"posix timer 4", on(func(k *Task) bool { k.Timers[0].Deadline = -1; return true })},
		{"posix timer 4", on(func(k *Task) bool { k.Timers[0].Interval, k.Timers[0].Overrun = 1<<40, 1<<30; return true })},
		{"posix timer 1073741824", on(func(k *Task) bool { k.Timers[0].ID = 1 << 30; return true })},
		{"memory barriers 0x1", on(func(k *Task) bool { k.Membarrier = 1; return true })},
		{"has ended, but is no leader", on(func(k *Task) bool { k.Threads[0].Exited = true; return true })},
		{"has ended, but is no leader", on(func(k *Task) bool { k.Threads[0].Exited, k.Threads[0].Regs = true, nil; return len(k.Threads) == 1 })},
		{"signal 10 stops nothing", on(func(k *Task) bool { k.Stopped = 10; return true })},
		{"has yet to tell 5", on(func(k *Task) bool { k.Untold = CldStopped; return k.Stopped == 0 })},
		{"has yet to tell 6", on(func(k *Task) bool { k.Untold = CldContinued; return k.Stopped != 0 })},
		{"has yet to tell 1", on(func(k *Task) bool { k.Untold = 1; return true })},
		{"interval timer 3", on(func(k *Task) bool { k.ITimers[0].Which = 3; return true })},
		{"general registers of 8 bytes", on(func(k *Task) bool { k.Threads[0].Regs = make([]byte, 8); return true })},
		{"extended state of", on(func(k *Task) bool { k.Threads[0].XState = make([]byte, maxXState+1); return true })},
		{"seccomp filters", on(func(k *Task) bool { k.Threads[0].Seccomp[0].Program = make([]byte, 9); return true })},
		{"supplementary groups", on(func(k *Task) bool { k.Threads[0].Creds.Groups = make([]uint32, maxGroups+1); return true })},
		{"memory controls", on(func(k *Task) bool { k.MDWE = 4; return true })},
		{"memory controls", on(func(k *Task) bool { k.THPDisable = 4; return true })},
		{`its cgroup "":"no" is not there`, on(func(k *Task) bool { k.Threads[0].Cgroups[""] = "no"; return true })},
		{"a segment of 15 bytes", on(func(k *Task) bool { k.LDT = [][]byte{make([]byte, 15)}; return true })},
		{"stands twice", on(func(k *Task) bool { k.LDT = [][]byte{make([]byte, 16), make([]byte, 16)}; return true })},
		{"out of its table", on(func(k *Task) bool { k.Threads[0].Controls.TLS = [][]byte{make([]byte, 16)}; return true })},
		{"machine-check policy 3", on(func(k *Task) bool { k.Threads[0].Controls.MCEKill = 3; return true })},
		{"dispatch of mode 3", on(func(k *Task) bool { k.Threads[0].Controls.Dispatch = &Dispatch{Mode: 3}; return true })},
		{"a mask of 129 bytes", on(func(k *Task) bool { k.Threads[0].Policy = &MemPolicy{Nodes: make([]byte, 129)}; return true })},
		{"a mask of 130 bytes", on(func(m *MM) bool { m.Areas[0].Policy = &MemPolicy{Nodes: make([]byte, 130)}; return true })},
		{"utilization clamps", on(func(k *Task) bool { k.Threads[0].Sched.UtilMax = 1025; return true })},
		{"seccomp mode 1 with 1 filters", on(func(k *Task) bool { k.Threads[0].SeccompMode = 1; return true })},
		{"a segment with id -1", on(func(s *Shmem) bool { s.SysV = &SysVSegment{Perm: IPCPerm{ID: -1}}; return s.Name == "" })},
		{"a segment of mode 01000", on(func(s *Shmem) bool { s.SysV = &SysVSegment{Perm: IPCPerm{Mode: 0o1000}}; return s.Name == "" })},
		{"that is empty, a memfd", on(func(s *Shmem) bool { s.SysV = &SysVSegment{}; return s.Memfd })},
		{"that is empty, a memfd", on(func(s *Shmem) bool { s.Size = 0; return s.SysV != nil })},
		{"a set of 0 semaphores", on(func(s *SemSet) bool { s.Values = nil; return true })},
		{"a set of 32001 semaphores", on(func(s *SemSet) bool { s.Values = make([]uint16, 32001); return true })},
		{"semaphore 0 has the value 32768", on(func(s *SemSet) bool { s.Values = []uint16{32768}; return true })},
		{"adjustment of semaphore 2 by undo list 1", on(func(s *SemSet) bool { s.Undo = []SemUndo{{1, 2, 1}}; return true })},
		{"adjustment of semaphore 1 by undo list 1", on(func(s *SemSet) bool { s.Undo = []SemUndo{{1, 1, 1}, {1, 1, 2}}; return true })},
		{"adjustment of semaphore 0 by undo list 0", on(func(s *SemSet) bool { s.Undo = []SemUndo{{}}; return true })},
		{"a message of a type that is not positive", on(func(q *Messages) bool { q.Messages = []Message{{Type: 0}}; return true })},
		{"too long", on(func(q *Messages) bool { q.Messages = []Message{{Type: 1, Size: 65 << 20}}; return true })},
		{"which are not unix sockets before it", on(func(c *Connection) bool { c.To = refSocket; return true })},
		{"which are not unix sockets before it", on(func(c *Connection) bool { c.From, c.To = 0, 0; return true })},
		{"cannot be connected to #36 from both sides", on(func(c *Connection) bool { c.From = refPeer; return true })},
		{"names no unix socket before it", on(func(q *Queue) bool { q.Socket = refSocket; return true })},
		{"message 0: reference 10 names no unix socket", on(func(q *Queue) bool { q.Messages[0].From = refSocket; return true })},
		{"a queue of 1073741825 bytes", on(func(q *Queue) bool { q.Messages[0].Size = 1<<30 + 1; return true })},
		{"message 0: it carries 254 descriptors", on(func(q *Queue) bool { q.Messages[0].Files = make([]Ref, 254); return true })},
		{"message 0: reference 4 names no open file", on(func(q *Queue) bool { q.Messages[0].Files = []Ref{refPipe}; return true })},
		{"message 0: socket address of 129 bytes", on(func(q *Queue) bool { q.Messages[0].Name = make([]byte, 129); return true })},
		{"message 1: it cannot be out of band", on(func(q *Queue) bool { q.Messages[1].OOB = true; return true })},
		{"credentials of process -1", on(func(q *Queue) bool { q.Messages[0].Creds.Pid = -1; return true })},
		{"cannot have such a queue", on(func(q *Queue) bool { q.Sent = true; return true })},
		{"a socket that is shut down by 4", on(func(f *File) bool {
			if f.Socket == nil || f.Socket.Unix == nil {
				return false
			}
			f.Socket.Unix.Shutdown = 4
			return true
		})},
		{"to no path", on(func(f *File) bool {
			if f.Socket == nil || f.Socket.Unix == nil {
				return false
			}
			f.Socket.Unix.Reconnect = true
			return true
		})},
		{`cannot be called ".."`, on(func(q *Mqueue) bool { q.Name = ".."; return true })},
		{`cannot be called "a/b"`, on(func(q *Mqueue) bool { q.Name = "a/b"; return true })},
		{`cannot be called ""`, on(func(q *Mqueue) bool { q.Name = ""; return true })},
		{"a message queue of mode 0100640", on(func(q *Mqueue) bool { q.Mode |= 0o100000; return true })},
		{"for 0 messages of 8192 bytes", on(func(q *Mqueue) bool { q.MaxCount = 0; return true })},
		{"for 65537 messages", on(func(q *Mqueue) bool { q.MaxCount = 65537; return true })},
		{"of 16777217 bytes", on(func(q *Mqueue) bool { q.MaxSize = 16<<20 + 1; return true })},
		{"a queue for 1 messages holds 2", on(func(q *Mqueue) bool { q.MaxCount = 1; return true })},
		{"a message of priority 10 and", on(func(q *Mqueue) bool { q.Messages[1].Priority = 10; return true })},
		{"priority 32768", on(func(q *Mqueue) bool { q.Messages[0].Priority = 32768; return true })},
		{"and 8193 bytes", on(func(q *Mqueue) bool { q.Messages[0].Size = 8193; return true })},
		{"by method 2", on(func(q *Mqueue) bool { q.Notify.Method = 2; return true })},
		{"tells process 9, which is not there", on(func(q *Mqueue) bool { q.Notify.Pid = 9; return true })},
		{"names no ipc namespace", on(func(q *Mqueue) bool { q.NS = refPipe; return true })},
		{"kind external with the key \"\"", on(func(f *File) bool { f.Key = ""; return f.Kind == KindExternal })},
		{"kind eventfd with the key \"x\"", on(func(f *File) bool { f.Key = "x"; return f.Kind == KindEventfd })},
		{"or with one that stands twice", on(func(f *File) bool {
			if f.Kind == KindMqueue {
				*f = File{Kind: KindExternal, Key: "pipe[77]"}
			}
			return f.Key != ""
		})},
		{"an inode of mode 0100", on(func(n *Inode) bool { n.Mode = 0o100; return true })},
		{"an inode of mode 040755 and 5 bytes", on(func(n *Inode) bool { n.Size = 5; n.Mode = 0o40755; return n.Point == "" })},
		{"and 9223372036854775808 bytes", on(func(n *Inode) bool { n.Size = 1 << 63; return len(n.Names) == 2 })},
		{"number without a device", on(func(n *Inode) bool { n.Rdev = 5; return true })},
		{"a target without link", on(func(n *Inode) bool { n.Target = "/"; return true })},
		{"either names or a mount point", on(func(n *Inode) bool { n.Point = ""; return true })},
		{`the mount point "etc"`, on(func(n *Inode) bool { n.Point = "etc"; return true })},
		{"with 2 names", on(func(n *Inode) bool { n.Mode, n.Size = 0o40755, 0; return len(n.Names) == 2 })},
		{"names no directory before it", on(func(n *Inode) bool { n.Names = []Name{{refTmpFile, "x"}}; return n.Point == "" })},
		{"names no directory before it", on(func(n *Inode) bool { n.Names = []Name{{refPipe, "x"}}; return n.Point == "" })},
		{`".." is no name`, on(func(n *Inode) bool { n.Names = []Name{{refTmpfs, ".."}}; return n.Point == "" })},
		{`"a/b" is no name`, on(func(n *Inode) bool { n.Names = []Name{{refTmpfs, "a/b"}}; return n.Point == "" })},
		{`"dir" stands twice`, on(func(n *Inode) bool {
			if len(n.Names) == 2 {
				n.Names = []Name{{refTmpfs, "dir"}, n.Names[1]}
			}
			return len(n.Names) == 2
		})},
		{`"b\xff" stands twice`, on(func(n *Inode) bool {
			if len(n.Names) == 2 {
				n.Names = []Name{n.Names[1], n.Names[1]}
			}
			return len(n.Names) == 2
		})},
		{"is no name in a directory", on(func(n *Inode) bool { n.Names = []Name{{refTmpfs, strings.Repeat("x", 256)}}; return n.Point == "" })},
		{"a whole root file system", on(func(n *Inode) bool { n.Merged = false; return n.Point == "/" })},
		{`a second file system at "/dev/shm"`, on(func(n *Inode) bool {
			mine := n.Point == "/"
			n.Point, n.Merged, n.Gone = "/dev/shm", false, nil
			return mine
		})},
		{"only directories of the root", on(func(n *Inode) bool { n.Merged = true; return n.Point == "/dev/shm" })},
		{"only directories of the root", on(func(n *Inode) bool { n.Merged = true; return n.Mode == 0o100644 })},
		{"gone from what is not merged", on(func(n *Inode) bool { n.Gone = []string{"x"}; return !n.Merged })},
		{`".." is no name`, on(func(n *Inode) bool { n.Gone = []string{".."}; return n.Merged })},
		{`"a" is no name in a directory, or is gone from it twice`, on(func(n *Inode) bool { n.Gone = append(n.Gone, "a"); return n.Merged && len(n.Names) == 1 })},
		{`"gone\xff" stands twice`, on(func(n *Inode) bool {
			mine := len(n.Names) == 2 && n.Names[0].Name == "c"
			if mine {
				n.Names[1].Name = "gone\xff"
			}
			return mine
		})},
		{`attribute "user.note" is not valid`, on(func(n *Inode) bool { n.Xattrs = append(n.Xattrs, n.Xattrs...); return n.Xattrs != nil })},
		{"comm", on(func(k *Task) bool { k.Threads[0].Comm = []byte("sixteen bytes ok"); return true })},
	} {
		t.Run(c.want, func(t *testing.T) {
			f := newForge()
			f.head(t, 4)
			ref := Ref(3)
			damaged := false
			for _, r := range sampleObjects() {
				if !damaged {
					damaged = c.damage(&r)
				}
				if types[r.t].object {
					f.any(t, r.t, ref, r.v)
					ref++
				} else {
					f.any(t, r.t, 0, r.v)
				}
			}
			f.any(t, TypeTrailer, 0, f.tally.trailer())
			refused(t, f.image(), c.want)
		})
	}
}

// on makes a damage to the first record that holds a T and that change accepts.
func TestHostileXLayout(t *testing.T) {
	for _, layout := range [][]XComponent{
		{{Number: 63}}, {{Number: 2}, {Number: 2}}, {{Number: 2, Offset: maxXState + 1}}, {{Number: 2, Offset: 576, Size: maxXState}}, {{Number: 2, Size: ^uint32(0)}},
	} {
		f := newForge()
		f.head(t, 1)
		a := sampleArch()
		a.XLayout = layout
		f.any(t, TypeArch, 0, a)
		refused(t, f.image(), "extended state")
	}
}

// onRing changes the area that is a ring of asynchronous I/O.
func onRing(change func(a *Area)) func(r *sampleRecord) bool {
	return on(func(m *MM) bool {
		a := &m.Areas[len(m.Areas)-1]
		if a.AIO != nil {
			ring := *a.AIO
			a.AIO = &ring
			change(a)
		}
		return a.AIO != nil
	})
}

func on[T any](change func(v *T) bool) func(r *sampleRecord) bool {
	return func(r *sampleRecord) bool {
		if p, ok := r.v.(*T); ok {
			return change(p)
		}
		v, ok := r.v.(T)
		if !ok {
			return false
		}
		if !change(&v) {
			return false
		}
		r.v = v
		return true
	}
}

func TestBadTree(t *testing.T) {
	for want, damage := range map[string]func(p []Process){
		"a pid must be positive":           func(p []Process) { p[0].Pid = 0 },
		"parent 8 does not stand before":   func(p []Process) { p[1].Ppid = 8 },
		"parent 7 does not stand before":   func(p []Process) { p[1].Ppid = 7 },
		"its parent is not in the tree":    func(p []Process) { p[2].Ppid = 0 },
		"id 2 is used twice":               func(p []Process) { p[0].Threads[2] = 2 },
		"id 3 is used twice":               func(p []Process) { p[3].Pid, p[3].Pids, p[3].Threads = 3, []int32{3}, []int32{3} },
		"not among its pids":               func(p []Process) { p[0].Pids = []int32{4001} },
		"pids in the namespaces are not":   func(p []Process) { p[0].Pids = []int32{-4, 1} },
		"a zombie has no threads":          func(p []Process) { p[2].Threads = []int32{9} },
		"threads must begin with":          func(p []Process) { p[0].Threads = []int32{2, 1} },
		"a tid must be positive":           func(p []Process) { p[0].Threads[1] = -2 },
		"group or session is negative":     func(p []Process) { p[0].Sid = -1 },
		`comm "nul\x00" is not valid`:      func(p []Process) { p[0].Comm = []byte("nul\x00") },
		"threads must begin with its lead": func(p []Process) { p[0].Threads = nil },
	} {
		t.Run(want, func(t *testing.T) {
			tree := sampleTree()
			damage(tree.Processes)
			f := newForge()
			f.head(t, 3)
			f.any(t, TypeTree, 0, tree)
			refused(t, f.image(), want)
		})
	}
	f := newForge()
	f.head(t, 3)
	f.any(t, TypeTree, 0, Tree{})
	refused(t, f.image(), "it has no process")
}

// TestSameIPC gives two objects of a kind one id, or one key.
func TestSameIPC(t *testing.T) {
	for want, second := range map[string]IPCPerm{"two message queues with id 4": {ID: 4}, "two message queues with key 0x9": {ID: 5, Key: 9}, "reference 1 names no ipc namespace": {ID: 6, NS: 1}} {
		f := newForge()
		f.head(t, 4)
		f.any(t, TypeSemSet, 3, SemSet{Perm: IPCPerm{ID: 4, Key: 9}, Values: []uint16{0}})
		f.any(t, TypeMessages, 4, Messages{Perm: IPCPerm{ID: 4, Key: 9}})
		f.any(t, TypeMessages, 5, Messages{Perm: second})
		refused(t, f.image(), want)
	}
}

// TestSameQueue gives two message queues of a namespace one name.
func TestSameQueue(t *testing.T) {
	for _, second := range []bool{false, true} {
		f := newForge()
		f.head(t, 4)
		f.any(t, TypeMqueue, 3, Mqueue{Name: "q", MaxCount: 1, MaxSize: 1, Removed: true})
		f.any(t, TypeMqueue, 4, Mqueue{Name: "q", MaxCount: 1, MaxSize: 1})
		want := "cut short"
		if !second {
			f.any(t, TypeMqueue, 5, Mqueue{Name: "q", MaxCount: 1, MaxSize: 1})
			want = `two message queues are called "q"`
		}
		refused(t, f.image(), want)
	}
}

// TestBadMessages gives the texts of a message queue wrongly, or not at all.
func TestBadMessages(t *testing.T) {
	for _, posix := range []bool{false, true} {
		badMessages(t, posix)
	}
}

func badMessages(t *testing.T, posix bool) {
	t.Helper()
	for want, write := range map[string]func(f *forge) error{
		"bytes of message queue #3 at 1":          func(f *forge) error { return f.bulk(TypeBytes, 3, Bytes{1}, []byte("x")) },
		"6 bytes at 0 are outside object #3":      func(f *forge) error { return f.bulk(TypeBytes, 3, Bytes{}, []byte("onetwo")) },
		"holds 5 bytes, the image has 3 of them":  func(f *forge) error { return f.bulk(TypeBytes, 3, Bytes{}, []byte("one")) },
		"holds 5 bytes, the image has 0 of them2": nil,
	} {
		f := newForge()
		f.head(t, 3)
		f.any(t, TypeTree, 0, Tree{Processes: []Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}})
		if posix {
			f.any(t, TypeMqueue, 3, Mqueue{Name: "q", MaxCount: 5, MaxSize: 5, Messages: []MqueueText{{Size: 3}, {}, {Size: 2}}})
		} else {
			f.any(t, TypeMessages, 3, Messages{Messages: []Message{{Type: 1, Size: 3}, {Type: 1}, {Type: 1, Size: 2}}})
		}
		if write != nil {
			check(t, write(f))
		}
		f.any(t, TypeTrailer, 0, f.tally.trailer())
		refused(t, f.image(), strings.TrimSuffix(want, "2"))
	}
}

func TestBadBeginning(t *testing.T) {
	f := newForge()
	h := sampleHeader()
	h.ByteOrder = "big"
	f.any(t, TypeHeader, 0, h)
	refused(t, f.image(), `byte order "big"`)

	f = newForge()
	f.head(t, 1)
	a := sampleArch()
	a.PageSize = 65536
	f.any(t, TypeArch, 0, a)
	refused(t, f.image(), "page size 65536")

	for want, damage := range map[string]func(c *Container){
		"no type of namespace":               func(c *Container) { c.Namespaces[0].Type = "dream" },
		"does not ascend":                    func(c *Container) { c.Namespaces[1].Ref = 1 },
		"4 standard streams":                 func(c *Container) { c.Stdio = make([]string, 4) },
		"configuration is longe":             func(c *Container) { c.Spec = make([]byte, maxSpec+1) },
		"does not lie below the container's": func(c *Container) { c.Subs[0].Path = "../x" },
		"stands twice":                       func(c *Container) { c.Subs[1] = c.Subs[0] },
		"before the one it is in":            func(c *Container) { c.Subs = c.Subs[1:] },
		`file "a/b" of cgroup "init.scope"`:  func(c *Container) { c.Subs[0].Files[0].Name = "a/b" },
		"has no valid mode":                  func(c *Container) { c.Subs[0].Mode = 0o40755 },
		"names are longer than 64 bytes":     func(c *Container) { c.UTS = &UTSNamespace{Hostname: strings.Repeat("x", 65)} },
		`"kernel/core_pattern" is no limit`:  func(c *Container) { c.IPC = []Sysctl{{"kernel/core_pattern", "1"}} },
		`or set twice, or to "|evil"`:        func(c *Container) { c.IPC = []Sysctl{{"kernel/shmmax", "|evil"}} },
		"10001 cgroups":                      func(c *Container) { c.Subs = make([]SubCgroup, 10001) },
		"has a NUL":                          func(c *Container) { c.Cgroups = map[string]string{"": "\x00"} },
	} {
		f := newForge()
		f.head(t, 2)
		c := sampleContainer()
		damage(&c)
		f.any(t, TypeContainer, 0, c)
		refused(t, f.image(), want)
	}
}

func TestBadContents(t *testing.T) {
	for want, write := range map[string]func(f *forge) error{
		"names no address space":          func(f *forge) error { return f.bulk(TypePages, refPipe, Pages{[]Run{{Addr: 0, Count: 1}}}, page(1, 1)) },
		"names no pipe, terminal or file": func(f *forge) error { return f.bulk(TypeBytes, refMMInit, Bytes{}, page(1, 1)) },
		"reference 99":                    func(f *forge) error { return f.bulk(TypeBytes, 99, Bytes{}, page(1, 1)) },
		"outside the areas": func(f *forge) error {
			return f.bulk(TypePages, refMMChild, Pages{[]Run{{Addr: areaHeap + 0x3000, Count: 3, Zero: true}}}, nil)
		},
		"outside shared memory": func(f *forge) error {
			return f.bulk(TypePages, refShmem, Pages{[]Run{{Addr: 0x1000, Count: 2, Zero: true}}}, nil)
		},
		"guard pages at 0x0 outside": func(f *forge) error {
			return f.bulk(TypePages, refShmem, Pages{[]Run{{Count: 1, Guard: true}}}, nil)
		},
		"outside an address space, or of zeros": func(f *forge) error {
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap, Count: 1, Guard: true, Zero: true}}}, nil)
		},
		"borrowed pages at 0x7f0000002000 that no donor has": func(f *forge) error {
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap + 0x1000, Count: 1, Borrowed: true}}}, nil)
		},
		"behind those of another that borrows": func(f *forge) error {
			if err := f.bulk(TypePages, refMMChild, Pages{[]Run{{Addr: areaHeap, Count: 1, Borrowed: true}}}, nil); err != nil {
				return err
			}
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap, Count: 1, Zero: true}}}, nil)
		},
		"run of 2 pages at 0x7f0000001000 is not aligned, empty or out of order": func(f *forge) error {
			if err := f.bulk(TypePages, refMMChild, Pages{[]Run{{Addr: areaHeap + 0x1000, Count: 1, Borrowed: true}}}, nil); err != nil {
				return err
			}
			return f.bulk(TypePages, refMMChild, Pages{[]Run{{Addr: areaHeap, Count: 2, Borrowed: true}}}, nil)
		},
		"is not aligned": func(f *forge) error {
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap + 1, Count: 1, Zero: true}}}, nil)
		},
		"empty or out of order": func(f *forge) error {
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap, Count: 2, Zero: true}, {Addr: areaHeap, Count: 1, Zero: true}}}, nil)
		},
		"run of 1 pages at 0xfffffffffffff000": func(f *forge) error {
			return f.bulk(TypePages, refShmem, Pages{[]Run{{Addr: ^uint64(0xfff), Count: 1, Zero: true}}}, nil)
		},
		"runs need 4096 raw bytes, it has 8192": func(f *forge) error {
			return f.bulk(TypePages, refMMInit, Pages{[]Run{{Addr: areaHeap, Count: 1}}}, page(1, 2))
		},
		"0 runs":              func(f *forge) error { return f.bulk(TypePages, refMMInit, Pages{}, nil) },
		"4097 runs":           func(f *forge) error { return f.bulk(TypePages, refMMInit, Pages{make([]Run, 4097)}, nil) },
		"do not follow those": func(f *forge) error { return f.bulk(TypeBytes, refPipe, Bytes{1}, []byte("ello")) },
		"outside object #4":   func(f *forge) error { return f.bulk(TypeBytes, refPipe, Bytes{}, []byte("hello, world")) },
		"outside object #11":  func(f *forge) error { return f.bulk(TypeBytes, refGone, Bytes{^uint64(0)}, []byte("x")) },
		"it has no bytes":     func(f *forge) error { return f.bulk(TypeBytes, refGone, Bytes{}, nil) },
		"stand twice": func(f *forge) error {
			return errors.Join(f.bulk(TypeBytes, refGone, Bytes{}, []byte("xy")), f.bulk(TypeBytes, refGone, Bytes{1}, []byte("z")))
		},
		"has no header":            func(f *forge) error { f.raw(TypeBytes, refGone, []byte{1, 2}); return nil },
		"its header of 4294967295": func(f *forge) error { f.raw(TypeBytes, refGone, []byte{255, 255, 255, 255}); return nil },
		"its header of 9 bytes":    func(f *forge) error { f.raw(TypeBytes, refGone, []byte{9, 0, 0, 0, 1}); return nil },
		"too few or too many":      func(f *forge) error { f.raw(TypeBytes, refGone, []byte{1, 0, 0, 0, 0xa0, 7}); return nil },
		"bad CBOR":                 func(f *forge) error { f.raw(TypeBytes, refGone, []byte{1, 0, 0, 0, 0xff}); return nil },
	} {
		t.Run(want, func(t *testing.T) {
			f := newForge()
			f.contents(t)
			check(t, write(f))
			refused(t, f.image(), want)
		})
	}
}

// TestFillMustBeZero changes a byte between a bulk header and its raw bytes
// and mends the checksum.
func TestFillMustBeZero(t *testing.T) {
	f := newForge()
	f.contents(t)
	start := f.offset
	head := must(encode(Bytes{}))
	gap := fill(start, len(head))
	payload := append([]byte{byte(len(head)), 0, 0, 0}, head...)
	payload = append(payload, make([]byte, gap)...)
	payload[len(payload)-1] = 1
	f.raw(TypeBytes, refGone, append(payload, "raw"...))
	refused(t, f.image(), "bytes between its parts are not zero")
}

func TestBombs(t *testing.T) {
	huge := func(ty Type, length uint64) func(f *forge) {
		return func(f *forge) {
			f.head(t, 4)
			p := preHeader{ty, 3, length}.encode()
			f.put(p[:])
		}
	}
	for name, c := range map[string]struct {
		write func(f *forge)
		want  string
	}{
		"length of everything": {huge(TypeMM, ^uint64(0)), "is longer than"},
		"length of a gigabyte": {huge(TypeMM, 1<<30), "is longer than"},
		"length not there":     {huge(TypeMM, MaxRecord), "cut short"},
		"pages not there":      {func(f *forge) { f.contents(t); p := preHeader{TypePages, refMMInit, 4 << 20}.encode(); f.put(p[:]) }, "cut short"},
		"pages too long":       {func(f *forge) { f.contents(t); p := preHeader{TypePages, refMMInit, 5 << 20}.encode(); f.put(p[:]) }, "is longer than"},
		"long header":          {func(f *forge) { p := preHeader{TypeHeader, 0, 1 << 20}.encode(); f.put(p[:]) }, "not an ocickpt image"},
		"deep arrays":          {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, bytes.Repeat([]byte{0x81}, 1<<20)) }, "bad CBOR"},
		"array of everything": {func(f *forge) {
			f.head(t, 3)
			f.raw(TypeTree, 0, []byte{0xa1, 1, 0x9b, 255, 255, 255, 255, 255, 255, 255, 255})
		}, "bad CBOR"},
		"long array":           {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, array(1<<20+1, 7)) }, "bad CBOR"},
		"string of everything": {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0x5b, 255, 255, 255, 255, 255, 255, 255, 255}) }, "bad CBOR"},
		"indefinite length":    {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0xbf, 0xff}) }, "bad CBOR"},
		"duplicate key":        {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0xa2, 1, 0x80, 1, 0x80}) }, "bad CBOR"},
		"duplicate unknown":    {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0xa2, 9, 0x80, 9, 0x80}) }, "bad CBOR"},
		"tag":                  {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0xc1, 0xa0}) }, "bad CBOR"},
		"two items":            {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, []byte{0xa0, 0xa0}) }, "bad CBOR"},
		"text not UTF-8":       {func(f *forge) { f.head(t, 2); f.raw(TypeContainer, 0, []byte{0xa1, 1, 0x61, 0xff}) }, "bad CBOR"},
		"empty payload":        {func(f *forge) { f.head(t, 3); f.raw(TypeTree, 0, nil) }, "bad CBOR"},
		"structures of one byte": {func(f *forge) {
			f.head(t, 4)
			f.raw(TypeTask, 0, append([]byte{0xa1, 17}, array(1<<20, 0xa0)...))
		}, "would take more than"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newForge()
			c.write(f)
			refused(t, f.image(), c.want)
		})
	}
}

// array encodes an array of n items of one byte.
func array(n uint32, item byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0x9a}, n), bytes.Repeat([]byte{item}, int(n))...)
}

// watching is a file with watches.
func watching(all ...Watch) func(r *sampleRecord) bool {
	return instead(File{Kind: KindInotify, Inotify: &Inotify{Watches: all}})
}

// instead puts another open file in the place of one without references.
func instead(other File) func(r *sampleRecord) bool {
	return on(func(f *File) bool {
		if f.Kind != KindEventfd {
			return false
		}
		*f = other
		return true
	})
}

func marking(m Mark) func(r *sampleRecord) bool {
	return instead(File{Kind: KindFanotify, Fanotify: &Fanotify{Marks: []Mark{m}}})
}
