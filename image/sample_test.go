package image

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// object is one record of the sample's fifth section. Its references are those
// of its place: the namespaces take 1 and 2, the first object is 3.
type sampleRecord struct {
	t Type
	v any
}

const (
	refStdin Ref = iota + 3
	refPipe
	refReader
	refWriter
	refExe
	refEpoll
	refEvent
	refSocket
	refGone
	refLog
	refPty
	refTTY
	refFilesInit
	refFilesChild
	refFS
	refSighand
	refShmem
	refMMInit
	refMMChild
	refSighandChild
	refTmpfs
	refTmpDir
	refTmpFile
	refSegment
	refSemSet
	refMessages
	refMqueue
	refMqd
	refRoot
	refRootDir
	refRootFile
	refGiven
	refUnix
	refPeer
	refConnection
	refQueue
)

const areaHeap = 0x7f0000001000

func sampleHeader() Header {
	return Header{
		Magic: HeaderMagic, Revision: Revision, ByteOrder: "little",
		ID:    [16]byte{0xde, 0xad, 0xbe, 0xef, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
		Time:  1767323045123456789,
		Uname: Uname{"Linux", "6.18.5", "#1 SMP", "x86_64"},
		Tool:  "ocickpt 0.1.0", Options: Options{LeaveRunning: true},
	}
}

func sampleArch() Arch {
	return Arch{
		Machine: "x86_64", PageSize: PageSize, Features: []string{"fpu", "xsave"},
		XFeatures: 7, XSize: 832, VDSO: map[string]uint64{"__vdso_time": 0x900}, VDSOLength: 6 * PageSize,
	}
}

func sampleContainer() Container {
	return Container{
		ID: "web", Runtime: "/run/runc", Bundle: "/srv/web", Spec: []byte(`{"ociVersion":"1.2.0"}`), Config: []byte(`{}`),
		Namespaces: []Namespace{
			{Ref: 1, Type: "mnt", Inode: 4026532001},
			{Ref: 2, Type: "net", Inode: 4026531840, Path: "/run/netns/web", Host: true},
		},
		UIDMap:  []IDMap{{0, 100000, 65536}},
		Cgroups: map[string]string{"": "/system.slice/web"},
		Mounts:  []Mount{{ID: 21, Parent: 20, Root: "/", Point: "/", Options: "rw", FSType: "overlay", Source: "overlay", Super: "rw"}},
		Stdio:   []string{"/dev/null", "pipe:[77]", "pipe:[78]"}, Hostname: "web-1", Paused: true,
		Links:     []Link{{Name: "eth0", Type: "veth", Up: true, Addresses: []string{"10.0.0.2/24"}}},
		Monotonic: 5e9, Boottime: 6e9,
		Subs:     []SubCgroup{{Path: "init.scope", UID: 33, Mode: 0o755, Files: []CgroupFile{{Name: "cgroup.freeze", Set: true, Value: "0", Mode: 0o644}}}, {Path: "init.scope/x\xff", Mode: 0o755}},
		Warnings: []string{"fd 9 of process 7: a file lock was left out"},
	}
}

func sampleTree() Tree {
	return Tree{Processes: []Process{
		{Pid: 1, Pgid: 1, Sid: 1, Pids: []int32{4001, 1}, Threads: []int32{1, 2, 3}, Comm: []byte("nginx")},
		{Pid: 7, Ppid: 1, Pgid: 1, Sid: 1, Pids: []int32{4007, 7}, Threads: []int32{7}, Comm: []byte("wor\x1b[31mker")},
		{Pid: 9, Ppid: 7, Pgid: 9, Sid: 1, Pids: []int32{4009, 9}, Zombie: true, Status: 3 << 8, Comm: []byte("sh")},
		{Pid: 8, Ppid: 1, Pgid: 1, Sid: 1, Pids: []int32{4008, 8}, Threads: []int32{8}, Comm: []byte("vforked")},
	}}
}

func sampleThread(tid int32, comm string) Thread {
	return Thread{
		Tid: tid, Comm: []byte(comm), Regs: bytes.Repeat([]byte{byte(tid)}, regsAMD64), XState: make([]byte, 64),
		Rseq:    &Rseq{0x7f0000001100, 32, 0x53053053},
		Creds:   Credentials{UID: [4]uint32{33, 33, 33, 33}, Groups: []uint32{33, 4}},
		Cgroups: map[string]string{"": "init.scope"},
		Seccomp: []Filter{{Program: make([]byte, 16)}}, SeccompMode: 2,
		Pending: [][]byte{bytes.Repeat([]byte{1}, siginfoSize)},
		Restart: &Restart{Nr: 230, Left: -1},
	}
}

func sampleTask(pid int32, mm, files Ref, threads ...Thread) Task {
	return Task{
		Pid: pid, MM: mm, Files: files, FS: refFS, Sighand: refSighand, ExitSignal: 17,
		Rlimits: []Rlimit{{^uint64(0), ^uint64(0)}}, ITimers: []ITimer{{Which: 2, Interval: 1000, Value: 5}},
		Timers: []PosixTimer{{ID: 4, Signal: 14, Left: 100}}, Dumpable: 1, Threads: threads,
	}
}

// sampleObjects returns the fifth section. A file's name that is not UTF-8 and
// one that would write to a terminal are among them.
func sampleObjects() []sampleRecord {
	worker := sampleTask(7, refMMChild, refFilesChild, sampleThread(7, "worker"))
	worker.Stopped, worker.Sighand = 19, refSighandChild
	address := binary.BigEndian.AppendUint16([]byte{afInet, 0}, 8080)
	return []sampleRecord{
		{TypeFile, File{Kind: KindStdio, Stdio: 0}},
		{TypePipe, Pipe{Capacity: 65536, Length: 5}},
		{TypeFile, File{Kind: KindPipe, Pipe: refPipe}},
		{TypeFile, File{Kind: KindPipe, Flags: 0o4001, Pipe: refPipe}},
		{TypeFile, File{Kind: KindRegular, Path: "/usr/sbin/nginx", Size: 100, Mode: 0o100755, Mtime: 5}},
		{TypeFile, File{Kind: KindEpoll, Flags: 2, Epoll: &Epoll{Entries: []EpollEntry{{FD: 3, File: refReader, Events: 1, Data: 99}}}}},
		{TypeFile, File{Kind: KindEventfd, Flags: 2, Eventfd: &Eventfd{Count: 3}}},
		{TypeFile, File{Kind: KindSocket, Flags: 2, Socket: &Socket{Family: afInet, Type: 1, Listening: true, Backlog: 128, Address: append(address, 10, 0, 0, 2)}}},
		{TypeRemoved, Removed{Path: "/var/log/\xff\x1b]0;evil\x07", Mode: 0o100640, Size: 8192, Opener: 7}},
		{TypeFile, File{Kind: KindRegular, Flags: 0o2001, Path: "/var/log/\xff\x1b]0;evil\x07", Pos: 70, Size: 8192, Removed: refGone}},
		{TypePty, Pty{Index: 1, Termios: make([]byte, 44), Session: 7, Mode: 0o620}},
		{TypeFile, File{Kind: KindTTY, Flags: 2, Path: "/dev/pts/1", Pipe: refPty}},
		{TypeFiles, Files{Descriptors: []Descriptor{{0, refStdin, false}, {3, refReader, true}, {4, refEpoll, true}, {6, refSocket, false}}}},
		{TypeFiles, Files{Descriptors: []Descriptor{{2, refTTY, false}, {3, refReader, false}, {5, refWriter, false}, {8, refEvent, false}, {9, refLog, false}}, Locks: []Lock{{FD: 9, Kind: LockFlock, Write: true, End: 1<<63 - 1}}}},
		{TypeFS, FS{Cwd: "/srv", Root: "/", Umask: 0o22}},
		{TypeSighand, Sighand{[]SigAction{{Signal: 15, Handler: 0x400100, Flags: 0x14000000, Restorer: 0x400200, Mask: 1}}}},
		{TypeShmem, Shmem{Size: 5000, Name: "cache", Memfd: true}},
		{TypeMM, MM{Exe: refExe, Auxv: make([]byte, 16), Layout: [11]uint64{0x400000}, Areas: []Area{
			{Start: 0x400000, End: 0x402000, Kind: AreaFile, Prot: 5, File: refExe, Name: "/usr/sbin/nginx"},
			{Start: areaHeap, End: areaHeap + 0x4000, Kind: AreaAnon, Prot: 3, Name: "[heap]", Flags: []string{"dd"}},
			{Start: areaHeap + 0x4000, End: areaHeap + 0x6000, Kind: AreaShmem, Prot: 3, Shared: true, File: refShmem},
			{Start: areaHeap + 0x8000, End: areaHeap + 0x9000, Kind: AreaAIO, Prot: 3, Shared: true, AIO: &AIO{Requests: 8, Head: 126, Tail: 1, Events: make([]byte, 2*AIOEvent)}},
		}}},
		{TypeMM, MM{Exe: refExe, Donor: refMMInit, Areas: []Area{{Start: areaHeap, End: areaHeap + 0x5000, Kind: AreaAnon, Prot: 3}}}},
		{TypeSighand, Sighand{}},
		{TypeInode, Inode{Point: "/dev/shm", Mode: 0o41777}},
		{TypeInode, Inode{Names: []Name{{refTmpfs, "dir"}}, Mode: 0o40755, UID: 33, Mtime: -5}},
		{TypeInode, Inode{Names: []Name{{refTmpfs, "a"}, {refTmpDir, "b\xff"}}, Mode: 0o100644, Size: 9000, Xattrs: []Xattr{{"user.note", []byte{0, 1}}}}},
		{TypeShmem, Shmem{Size: 5000, SysV: &SysVSegment{Perm: IPCPerm{ID: 32768, Key: 0x1234, UID: 33, Mode: 0o600}, Removed: true}}},
		{TypeSemSet, SemSet{Perm: IPCPerm{ID: 5}, Values: []uint16{1, 32767}, Undo: []SemUndo{{List: 1, Number: 1, Adjust: -5}}}},
		{TypeMessages, Messages{Perm: IPCPerm{ID: 5}, MaxBytes: 16384, Messages: []Message{{Type: 1}, {Type: 1 << 40}}}},
		{TypeMqueue, Mqueue{Name: "work\xff", UID: 33, Mode: 0o640, MaxCount: 10, MaxSize: 8192, Messages: []MqueueText{{Priority: 9}, {}}, Notify: &MqueueNotify{Pid: 1, Signal: 10, Value: 1 << 40}}},
		{TypeFile, File{Kind: KindMqueue, Flags: 2, Pipe: refMqueue}},
		{TypeInode, Inode{Point: "/", Mode: 0o40755, Merged: true, Gone: []string{"gone\xff"}}},
		{TypeInode, Inode{Names: []Name{{refRoot, "etc"}}, Mode: 0o40755, Merged: true, Gone: []string{"a", "b"}}},
		{TypeInode, Inode{Names: []Name{{refRootDir, "c"}, {refRoot, "d"}}, Mode: 0o100644}},
		{TypeFile, File{Kind: KindExternal, Flags: 1, Key: "pipe[77]", Path: "pipe:[77]", Mode: 0o010600, Opener: 1}},
		{TypeFile, File{Kind: KindSocket, Flags: 2, Socket: &Socket{Family: afUnix, Type: 2, Unix: &UnixState{Creds: &PeerCreds{Pid: 7, UID: 33, Groups: []uint32{4}}}}}},
		{TypeFile, File{Kind: KindSocket, Flags: 2, Socket: &Socket{Family: afUnix, Type: 2, Unix: &UnixState{Shutdown: 1}}}},
		{TypeConnection, Connection{From: refUnix, To: refPeer, Mutual: true}},
		{TypeQueue, Queue{Socket: refPeer, Messages: []Unread{{From: refUnix, Creds: &PeerCreds{Pid: 7}, Files: []Ref{refLog, refUnix}}, {}}}},
		{TypeNetwork, Network{
			Namespace: 2, Links: []NetLink{{Index: 1, Name: "lo", Kind: LinkLoopback, Flags: 1}, {Index: 2, Name: "eth0", Outside: true}, {Index: 3, Name: "t0", Kind: "tun", Tun: &Tun{Flags: 2}}},
			Addresses: [][]byte{{2, 8, 0, 0, 1, 0, 0, 0}}, Filters: []Netfilter{{Message: []byte{2, 0, 0, 0}}}, Sysctls: []Sysctl{{"ipv4/ip_forward", "1"}},
		}},
		{TypeTask, sampleTask(1, refMMInit, refFilesInit, sampleThread(1, "nginx"), sampleThread(2, "aio"), sampleThread(3, "nginx"))},
		{TypeTask, &worker},
		{TypeTask, sampleTask(8, refMMInit, refFilesInit, sampleThread(8, "vforked"))},
	}
}

// page returns n pages that are filled with b.
func page(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n*PageSize) }

// sampleContents are the bulk records of the sample, in order.
func sampleContents() []Content {
	return []Content{
		{Type: TypePages, Ref: refMMInit, Runs: []Run{{Addr: areaHeap, Count: 1}, {Addr: areaHeap + 0x1000, Count: 1, Zero: true}, {Addr: areaHeap + 0x2000, Count: 1}, {Addr: areaHeap + 0x3000, Count: 1, Guard: true}}, Raw: page('a', 2)},
		{Type: TypePages, Ref: refMMInit, Runs: []Run{{Addr: 0x401000, Count: 1, Zero: true}}},
		{Type: TypePages, Ref: refMMChild, Runs: []Run{{Addr: areaHeap, Count: 4}, {Addr: areaHeap + 0x4000, Count: 1, Borrowed: true}}, Raw: page('b', 4)},
		{Type: TypePages, Ref: refShmem, Runs: []Run{{Addr: 0x1000, Count: 1}}, Raw: page('c', 1)},
		{Type: TypeBytes, Ref: refPipe, Raw: []byte("hello")},
		{Type: TypeBytes, Ref: refGone, Offset: 4000, Raw: page('d', 1)},
		{Type: TypeBytes, Ref: refTmpFile, Offset: 8990, Raw: []byte("the end.\n")},
	}
}

// writeHead writes sections 1 to 5 of the sample.
func writeHead(t testing.TB, w *Writer) {
	t.Helper()
	for range sampleContainer().Namespaces {
		w.NewRef()
	}
	for _, r := range []sampleRecord{{TypeHeader, sampleHeader()}, {TypeArch, sampleArch()}, {TypeContainer, sampleContainer()}, {TypeTree, sampleTree()}} {
		check(t, w.Record(r.t, 0, r.v))
	}
	for _, r := range sampleObjects() {
		var ref Ref
		if types[r.t].object {
			ref = w.NewRef()
		}
		check(t, w.Record(r.t, ref, r.v))
	}
}

func writeContent(w *Writer, c Content) error {
	if c.Type == TypePages {
		return w.Pages(c.Ref, c.Runs, c.Raw, Checksum(c.Raw))
	}
	return w.Bytes(c.Ref, c.Offset, c.Raw)
}

// sampleImage returns a complete image of four processes.
func sampleImage(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	writeHead(t, w)
	for _, c := range sampleContents() {
		check(t, writeContent(w, c))
	}
	check(t, w.Close())
	return b.Bytes()
}

// smallImage returns an image that is short enough to damage it everywhere.
func smallImage(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	check(t, w.Record(TypeHeader, 0, sampleHeader()))
	check(t, w.Record(TypeArch, 0, sampleArch()))
	check(t, w.Record(TypeContainer, 0, Container{ID: "small"}))
	check(t, w.Record(TypeTree, 0, Tree{Processes: []Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}}))
	check(t, w.Record(TypePipe, w.NewRef(), Pipe{Capacity: 4096, Length: 3}))
	check(t, w.Bytes(1, 0, []byte("abc")))
	check(t, w.Close())
	return b.Bytes()
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// compare ignores the Head's index and a Content's pool.
func compare(t testing.TB, want, got any) {
	t.Helper()
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Head{}, Content{}), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}
