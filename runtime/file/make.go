package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Maker opens every file of an image in one stub, the container's init, before
// any other task is cloned: they all inherit the lot and only move what is
// theirs to its number. Nothing is sent around, and a file is opened where the
// container's cgroup, root, namespaces and device rules apply.
//
// The opened files stand at numbers above every number that a task uses (the
// table); below, the maker's own descriptors are free for use.
type Maker struct {
	Realtime int64 // CLOCK_REALTIME of the checkpoint, nanoseconds
	Warn     func(msg string, args ...any)
	// Clocks are the container's, and how far they have gone since the checkpoint.
	Clocks func() *task.Clocks
	// Keeper is the pid here of who is in a namespace that tasks have made, 0 where
	// it is whoever the image says.
	Keeper func(ns image.Ref) int
	IDs    task.IDMaps // of the container that is restored
	// Validation is one of Validations.
	Validation string
	// Remade reports whether a device is a file system in memory that the restore
	// has filled.
	Remade func(dev uint64) bool
	// Given are the files for what the image leaves out, by key (CheckGiven).
	Given map[string]int

	head     *image.Head
	bundle   Identity
	self     Identity // the stub
	stub     *tracee.Stub
	sock     int // the coordinator's end of the stub's socket
	base     int // of the table
	chunk    int // how many files are opened before they are moved there
	fds      map[image.Ref]int
	stdio    [3]int
	socket   int
	kept     []int // what KeepProc has opened
	pipes    map[image.Ref]*madePipe
	segments map[image.Ref]int
	ptys     map[image.Ref]*madePty
	initPid  int32
	readonly map[image.Ref]int // of segments, where they are mapped so
	taken    map[image.Ref]bool
	late     map[image.Ref]*os.File
	anchors  map[image.Ref]int // files without a name
	unnamed  map[image.Ref]int // of them, the descriptions that made those of O_TMPFILE
	filling  image.Ref         // the one that is being filled, through file
	file     *os.File
	owned    map[image.Ref]bool
	covered  map[mount.Place]int  // what is kept open below mounts
	stays    bool                 // the stub never becomes anybody
	queues   map[image.Ref]int    // POSIX message queues
	texts    map[image.Ref][]byte // of their messages
	notified map[image.Ref]bool   // those whose task is to be told again

	connections map[image.Ref]*sock.Remade
	connected   []image.Ref // in the order of the stream
	// lowerLoopback takes it down again, if it is up for their sake.
	lowerLoopback func() error
	given         map[string]int // what has the stub of Given
	unix          *unixMaker
}

type madePipe struct {
	fd      [2]int
	taken   [2]bool
	content []byte // as far as it has come
}

// Numbers under which the stub starts with what it is given.
const (
	StubExeFD = 3
	ServiceFD = 4
	SocketFD  = 5
)

// NewMaker prepares to make the files of an image in stub; sock is the
// coordinator's end of the stub's socket. Bundle is who the bundle's own process
// would be: nothing is opened that neither it nor the task that holds the file
// may open.
func NewMaker(head *image.Head, stub *tracee.Stub, sock int, bundle Identity) *Maker {
	m := &Maker{
		Realtime: head.Header.Time, head: head, stub: stub, sock: sock, bundle: bundle,
		fds: map[image.Ref]int{}, pipes: map[image.Ref]*madePipe{}, ptys: map[image.Ref]*madePty{}, segments: map[image.Ref]int{}, readonly: map[image.Ref]int{},
		taken: map[image.Ref]bool{}, late: map[image.Ref]*os.File{}, anchors: map[image.Ref]int{}, owned: map[image.Ref]bool{}, unnamed: map[image.Ref]int{},
		queues: map[image.Ref]int{}, texts: map[image.Ref][]byte{}, notified: map[image.Ref]bool{}, given: map[string]int{},
	}
	m.initPid = head.Tree.Processes[0].Pid
	m.base = SocketFD + 1
	for _, ref := range Refs(head) {
		switch o := head.Objects[ref].(type) {
		case *image.Files:
			for _, d := range o.Descriptors {
				m.base = max(m.base, int(d.FD)+1)
			}
		case *image.File:
			if o.Epoll != nil {
				for _, e := range o.Epoll.Entries {
					m.base = max(m.base, int(e.FD)+1)
				}
			}
		}
	}
	return m
}

// Refs lists the objects of an image in the order of the stream.
func Refs(head *image.Head) []image.Ref {
	refs := make([]image.Ref, 0, len(head.Objects))
	for ref := range head.Objects {
		refs = append(refs, ref)
	}
	slices.Sort(refs)
	return refs
}

// spareNumbers is how many descriptors a restore takes besides the table.
const spareNumbers = 16

// Fits refuses a container whose files a restore could not hold: it takes one
// number for each of them above all numbers in use.
func (s *Set) Fits() error {
	top := SocketFD
	for _, t := range s.tables {
		if n := len(t.entries); n > 0 {
			top = max(top, t.entries[n-1].seen.fd)
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("descriptor limit: %w", err)
	}
	need := uint64(top + 1 + len(s.descs) + len(s.maps) + len(s.order)*2 + spareNumbers)
	if n := len(s.connections); n > 0 {
		need = 2*need + 2*uint64(n)
	}
	if need > limit.Max {
		return fail.Refuse(fmt.Sprintf("fd %d", top), fmt.Sprintf("restoring would take %d descriptors and the hard limit here is %d", need, limit.Max), "raise it (ulimit -Hn)")
	}
	return nil
}

// FD is the number under which every stub holds the file ref.
func (m *Maker) FD(ref image.Ref) (int, error) {
	fd, ok := m.fds[ref]
	if !ok {
		return 0, fmt.Errorf("object %d is not an open file", ref)
	}
	return fd, nil
}

// Start makes the stub ready to open files.
func (m *Maker) Start() (err error) {
	if m.self, err = stubIdentity(m.stub); err != nil {
		return err
	}
	return m.clearLow()
}

// Make opens everything.
func (m *Maker) Make() error {
	if err := m.takeGiven(); err != nil {
		return err
	}
	if err := m.reserve(); err != nil {
		return err
	}
	if err := m.makeRemoved(); err != nil {
		return err
	}
	if err := m.buffers(); err != nil {
		return err
	}
	if err := m.makePtys(); err != nil {
		return err
	}
	if err := m.makeQueues(0, nil); err != nil {
		return err
	}
	if err := m.prepareUnix(); err != nil {
		return err
	}
	if err := sock.Renumber(m.netns(), m.sockets(func(s *image.Socket) bool { return len(s.Devices) > 0 })); err != nil {
		return err
	}
	var files []image.Ref
	for _, ref := range Refs(m.head) {
		if f, ok := m.head.Objects[ref].(*image.File); ok && !m.isLate(f) && m.unix.late[ref] == 0 {
			files = append(files, ref)
		}
	}
	for chunk := range slices.Chunk(files, m.chunk) {
		if err := m.openChunk(chunk); err != nil {
			return err
		}
	}
	if err := m.connect(); err != nil {
		return err
	}
	if err := m.refillSockets(); err != nil {
		return err
	}
	return m.setTerminals()
}

// clearLow raises the stub's own limit and moves what it started with up.
func (m *Maker) clearLow() error {
	var limit unix.Rlimit
	if err := unix.Prlimit(m.stub.Pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return fmt.Errorf("descriptor limit: %w", err)
	}
	limit.Cur = limit.Max
	if err := unix.Prlimit(m.stub.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		return fmt.Errorf("descriptor limit: %w", err)
	}
	need := uint64(m.base + m.opens() + spareNumbers)
	if links := m.links(); len(links) > 0 {
		need = uint64(m.lateNumbers() + 2*len(links))
	}
	m.chunk = int(min(1024, max(uint64(m.base), limit.Max-min(need, limit.Max))))
	if need > limit.Max {
		return &fail.Error{Cause: fmt.Errorf("restoring takes %d descriptors and the hard limit is %d", need, limit.Max), Remedy: "raise it (ulimit -Hn)"}
	}
	low := []int{0, 1, 2, SocketFD}
	up, err := m.moveUp(low)
	if err != nil {
		return err
	}
	copy(m.stdio[:], up)
	m.socket = up[3]
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE, tracee.W(StubExeFD))
	b.Add(unix.SYS_CLOSE, tracee.W(ServiceFD))
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_NAME), b.String("ocickpt"))
	_, err = m.stub.Run(&b)
	return err
}

// KeepProc opens, for every stub to come, the container's /proc and the kernel's
// file to choose pids by, and returns their numbers. Where the container has its
// /proc/sys it is read-only; who may write is decided at the write.
func (m *Maker) KeepProc() (proc, lastPid int, err error) {
	var b tracee.Batch
	b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String("/proc"), tracee.W(unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC))
	if _, err := m.stub.Run(&b); err != nil {
		return 0, 0, err
	}
	last, err := os.OpenFile("/proc/sys/kernel/ns_last_pid", os.O_WRONLY, 0)
	if err != nil {
		return 0, 0, err
	}
	defer last.Close()
	fd, err := m.Send(m.stub, last)
	if err != nil {
		return 0, 0, err
	}
	up, err := m.moveUp([]int{int(b.Calls[0].Ret), fd})
	if err != nil {
		return 0, 0, err
	}
	m.kept = up
	return up[0], up[1], nil
}

// opens is how many numbers the image's objects take in the table.
func (m *Maker) opens() (n int) {
	for _, o := range m.head.Objects {
		switch o := o.(type) {
		case *image.File, *image.Shmem, *image.Mqueue:
			n++
		case *image.Pipe, *image.Pty:
			n += 2
		case *image.Inode:
			if o.Point != "" {
				n++
			}
		}
	}
	for _, o := range m.head.Objects {
		if rec, ok := o.(*image.Removed); ok && rec.Inside != 0 {
			n += 2
		}
	}
	return n + len(m.Given) + len(m.Covered())
}

// OpenRoot opens a directory of the container that other rooms work in, in the
// table and in this process.
func (m *Maker) OpenRoot(path string) (int, *os.File, error) {
	var b tracee.Batch
	how := binary.LittleEndian.AppendUint64(nil, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC) // struct open_how
	how = binary.LittleEndian.AppendUint64(how, 0)
	how = binary.LittleEndian.AppendUint64(how, unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_MAGICLINKS)
	b.Add(unix.SYS_OPENAT2, tracee.W(unix.AT_FDCWD), b.String(path), b.Put(how), tracee.W(len(how)))
	if _, err := m.stub.Run(&b); err != nil {
		return 0, nil, err
	}
	up, err := m.moveUp([]int{int(b.Calls[0].Ret)})
	if err != nil {
		return 0, nil, err
	}
	f, err := m.stub.Take(up[0])
	return up[0], f, err
}

// Covered lists the places that files are opened and tasks stand at although
// mounts cover their paths.
func (m *Maker) Covered() (all []mount.Place) {
	add := func(mnt int32, path string) {
		if p := (mount.Place{Mount: int(mnt), Path: path}); mnt != 0 && !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	for _, ref := range Refs(m.head) {
		switch o := m.head.Objects[ref].(type) {
		case *image.File:
			add(o.Mnt, o.Path)
		case *image.FS:
			add(o.CwdMnt, o.Cwd)
			add(o.RootMnt, o.Root)
		}
	}
	return all
}

// Cover tells where in the table these places are held open.
func (m *Maker) Cover(held map[mount.Place]int) { m.covered = held }

// Raise moves a descriptor of the stub into the table and returns its new number.
func (m *Maker) Raise(fd int) (int, error) { return m.RaiseIn(m.stub, fd) }

// RaiseIn does so for a descriptor of another stub.
func (m *Maker) RaiseIn(s *tracee.Stub, fd int) (int, error) {
	up, err := m.moveUpIn(s, []int{fd})
	if err != nil {
		return 0, err
	}
	return up[0], nil
}

// Hand returns a descriptor as it is: all others have it too.
func (m *Maker) Hand(fd int) (int, error) { return fd, nil }

// reserve takes numbers in the table, and so in every stub to come, for what can
// be opened only when tasks are in mount namespaces of their own: places that
// mounts in there cover, and files that are mapped from there.
func (m *Maker) reserve() error {
	var places []mount.Place
	for _, p := range m.Covered() {
		if _, held := m.covered[p]; !held {
			places = append(places, p)
		}
	}
	mapped := m.mappedInside()
	var removed []image.Ref
	for _, ref := range Refs(m.head) {
		if rec := m.head.Removed(ref); rec != nil && rec.Inside != 0 {
			removed = append(removed, ref)
		}
	}
	n := len(places) + len(mapped) + 2*len(removed)
	if n == 0 {
		return nil
	}
	var b tracee.Batch
	for range n {
		b.Add(unix.SYS_FCNTL, tracee.W(m.stdio[0]), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(m.base))
	}
	if _, err := m.stub.Run(&b); err != nil {
		return fmt.Errorf("reserve descriptors: %w", err)
	}
	if m.covered == nil {
		m.covered = map[mount.Place]int{}
	}
	for i, p := range places {
		m.covered[p] = int(b.Calls[i].Ret)
	}
	for i, ref := range mapped {
		m.fds[ref] = int(b.Calls[len(places)+i].Ret)
	}
	for i, ref := range removed {
		at := b.Calls[len(places)+len(mapped)+2*i:]
		if m.anchors[ref] = int(at[0].Ret); m.head.Removed(ref).Unnamed {
			m.unnamed[ref] = int(at[1].Ret)
		}
	}
	return nil
}

// MakeRemovedInside makes, by a stub in a mount namespace of a task's, the files
// that have lost their names there, and gives them to all stubs. Ids, if not nil,
// are those of the user namespace that it is in.
func (m *Maker) MakeRemovedInside(by *tracee.Stub, ns image.Ref, ids *task.IDMaps, stubs map[int]*tracee.Stub) error {
	var refs []image.Ref
	for _, ref := range Refs(m.head) {
		if rec := m.head.Removed(ref); rec != nil && rec.Inside == ns {
			refs = append(refs, ref)
			if ids != nil {
				rec.UID, rec.GID = ids.User(rec.UID), ids.Group(rec.GID)
			}
		}
	}
	if len(refs) == 0 {
		return nil
	}
	there := *m
	there.stub, there.stays, there.anchors, there.unnamed = by, ids != nil, map[image.Ref]int{}, map[image.Ref]int{}
	if err := there.makeAllRemoved(refs); err != nil {
		return err
	}
	for _, ref := range refs {
		for at, number := range map[int]int{there.anchors[ref]: m.anchors[ref], there.unnamed[ref]: m.unnamed[ref]} {
			if number == 0 {
				continue
			}
			if err := m.installAll(by, at, number, stubs); err != nil {
				return fail.On("deleted file "+m.head.Removed(ref).Path, err)
			}
		}
	}
	return nil
}

// installAll puts a descriptor of one stub under a number that was reserved for it
// into all.
func (m *Maker) installAll(by *tracee.Stub, fd, number int, stubs map[int]*tracee.Stub) error {
	f, err := by.Take(fd)
	if err != nil {
		return err
	}
	for _, s := range stubs {
		if err == nil {
			err = m.install(s, f, number)
		}
	}
	return errors.Join(err, f.Close())
}

// mappedInside lists the mapped files that are opened in mount namespaces of tasks.
func (m *Maker) mappedInside() (refs []image.Ref) {
	for _, ref := range Refs(m.head) {
		if space, ok := m.head.Objects[ref].(*image.MM); ok {
			for _, f := range m.insideOf(space) {
				if !slices.Contains(refs, f) {
					refs = append(refs, f)
				}
			}
		}
	}
	return refs
}

// insideOf lists those of one address space.
func (m *Maker) insideOf(space *image.MM) (refs []image.Ref) {
	add := func(ref image.Ref) {
		if f := m.head.File(ref); f != nil && m.inside(f) && !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	add(space.Exe)
	for i := range space.Areas {
		add(space.Areas[i].File)
	}
	return refs
}

// MapsInside reports an address space that can be made only when tasks are in the
// mount namespaces that they have made.
func (m *Maker) MapsInside(space *image.MM) bool { return len(m.insideOf(space)) > 0 }

// install puts a file under a number that was reserved for it into a stub.
func (m *Maker) install(s *tracee.Stub, f *os.File, number int) error {
	fd, err := m.Send(s, f)
	if err != nil {
		return err
	}
	var b tracee.Batch
	b.Add(unix.SYS_DUP3, tracee.W(fd), tracee.W(number), tracee.W(unix.O_CLOEXEC))
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	_, err = s.Run(&b)
	return err
}

// CoverInside gives the stubs in a mount namespace of tasks the places that mounts
// cover there; they are held by one of them.
func (m *Maker) CoverInside(by *tracee.Stub, ns image.Ref, held map[mount.Place]int, stubs map[int]*tracee.Stub) error {
	for p, fd := range held {
		f, err := by.Take(fd)
		if err != nil {
			return err
		}
		for i := range m.head.Tree.Processes {
			one := &m.head.Tree.Processes[i]
			if s := stubs[int(one.Pid)]; err == nil && s != nil && !one.Zombie && m.mounts(one) == ns {
				err = m.install(s, f, m.covered[p])
			}
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return fail.On(p.Path, err)
		}
	}
	return nil
}

// moveUp moves descriptors into the table and returns their new numbers.
func (m *Maker) moveUp(low []int) ([]int, error) { return m.moveUpIn(m.stub, low) }

func (m *Maker) moveUpIn(s *tracee.Stub, low []int) ([]int, error) {
	var b tracee.Batch
	for _, fd := range low {
		b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(m.base))
	}
	for _, fd := range low {
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
	}
	if _, err := s.Run(&b); err != nil {
		return nil, err
	}
	up := make([]int, len(low))
	for i := range low {
		up[i] = int(b.Calls[i].Ret)
	}
	return up, nil
}

// buffers makes what lies behind files: pipes, fifos held open at both ends,
// shared memory.
func (m *Maker) buffers() error {
	var pipes []image.Ref
	for _, ref := range Refs(m.head) {
		var err error
		var object string
		switch o := m.head.Objects[ref].(type) {
		case *image.Pipe:
			if o.Path == "" && o.Removed == 0 {
				pipes = append(pipes, ref)
				continue
			}
			object = "pipe " + o.Path
			err = m.makeFifo(ref, o)
		case *image.Shmem:
			object = "shared memory " + o.Name + o.Path
			if o.SysV == nil {
				err = m.makeShmem(ref, o)
			}
		}
		if err != nil {
			return fail.On(object, err)
		}
	}
	for chunk := range slices.Chunk(pipes, max(m.chunk/2, 1)) {
		if err := m.makePipes(chunk); err != nil {
			return err
		}
	}
	return m.openReadonly()
}

// makeFifo opens a fifo, at both its ends.
func (m *Maker) makeFifo(ref image.Ref, p *image.Pipe) error {
	var b tracee.Batch
	if p.Removed != 0 {
		m.reopen(&b, m.anchors[p.Removed], unix.O_RDWR|unix.O_NONBLOCK)
	} else {
		openPath(&b, p.Path, unix.O_RDWR|unix.O_NONBLOCK)
	}
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	return m.adoptPipes([]image.Ref{ref}, []int{int(b.Calls[0].Ret)})
}

// makePipes makes pipes that have no path.
func (m *Maker) makePipes(refs []image.Ref) error {
	var b tracee.Batch
	var ends []tracee.Word
	for range refs {
		at := b.Reserve(8)
		b.Add(unix.SYS_PIPE2, at, tracee.W(unix.O_CLOEXEC|unix.O_NONBLOCK))
		ends = append(ends, at)
	}
	if _, err := m.stub.Run(&b); err != nil {
		return fmt.Errorf("pipes: %w", err)
	}
	var low []int
	for _, at := range ends {
		raw := b.At(at, 8)
		low = append(low, int(binary.LittleEndian.Uint32(raw)), int(binary.LittleEndian.Uint32(raw[4:])))
	}
	return m.adoptPipes(refs, low)
}

// adoptPipes moves the ends of pipes, one or two of each, into the table and gives
// the pipes their sizes.
func (m *Maker) adoptPipes(refs []image.Ref, low []int) error {
	up, err := m.moveUp(low)
	if err != nil {
		return err
	}
	each := len(up) / len(refs)
	var b tracee.Batch
	for i, ref := range refs {
		ends := up[i*each : (i+1)*each]
		m.pipes[ref] = &madePipe{fd: [2]int{ends[0], ends[each-1]}}
		if size := m.head.Pipe(ref).Capacity; size != 0 {
			b.Try(unix.SYS_FCNTL, tracee.W(ends[0]), tracee.W(unix.F_SETPIPE_SZ), tracee.W(size))
		}
	}
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	for i, ref := range slices.DeleteFunc(slices.Clone(refs), func(ref image.Ref) bool { return m.head.Pipe(ref).Capacity == 0 }) {
		if b.Err(i) == nil {
			continue
		}
		if err := m.resize(m.pipes[ref].fd[0], m.head.Pipe(ref)); err != nil {
			return err
		}
	}
	return nil
}

// resize gives a pipe its size. Where pipes as large as that are not allowed here
// it becomes as large as may be, if that holds what is in it.
func (m *Maker) resize(fd int, p *image.Pipe) error {
	for _, size := range []int{int(p.Capacity), mostPipe()} {
		var b tracee.Batch
		i := b.Try(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_SETPIPE_SZ), tracee.W(size))
		if _, err := m.stub.Run(&b); err != nil {
			return err
		}
		switch err := b.Err(i); {
		case err == nil && size < int(p.Capacity):
			m.Warn("a pipe becomes smaller, as its size is not allowed here (fs.pipe-max-size)", "bytes", p.Capacity, "instead", size)
			return nil
		case err == nil:
			return nil
		case !errors.Is(err, unix.EPERM) || size < int(p.Length) || size != int(p.Capacity):
			return &fail.Error{Cause: fmt.Errorf("%d bytes for a pipe, with %d in it: %w", p.Capacity, p.Length, err), Remedy: "raise fs.pipe-max-size"}
		}
	}
	return nil
}

// shmemAt is where the maker maps shared memory for a moment: far from the
// stub, its stack and the service area.
const shmemAt = 0x200000000000

func (m *Maker) makeShmem(ref image.Ref, rec *image.Shmem) error {
	var b tracee.Batch
	if rec.Path != "" {
		m.become(&b, m.bundle)
	}
	i := mm.CreateShmem(&b, rec, shmemAt)
	if rec.Path != "" {
		b.Add(unix.SYS_UNLINK, b.String(rec.Path))
		m.become(&b, m.self)
	}
	if _, err := m.stub.Run(&b); err != nil {
		if e := m.restoreSelf(); e != nil {
			return errors.Join(err, e)
		}
		if rec.Path != "" && errors.Is(err, unix.EEXIST) { // the name was taken again: it only shows in /proc
			other := *rec
			other.Path += "~"
			return m.makeShmem(ref, &other)
		}
		return err
	}
	if i < 0 {
		return m.adoptMapping(ref, rec)
	}
	up, err := m.moveUp([]int{int(b.Calls[i].Ret)})
	if err != nil {
		return err
	}
	m.segments[ref] = up[0]
	if rec.Path != "" {
		if err := m.onTmpfs(up[0]); err != nil {
			return err
		}
	}
	var size tracee.Batch
	size.Add(unix.SYS_FTRUNCATE, tracee.W(up[0]), tracee.W(rec.Size))
	size.Add(unix.SYS_FCHMOD, tracee.W(up[0]), tracee.W(rec.Mode))
	_, err = m.stub.Run(&size)
	return err
}

// onTmpfs makes sure that a file of the image, removed as soon as it was made,
// takes memory of the container and no room on a disk.
func (m *Maker) onTmpfs(fd int) error {
	f, err := m.stub.Take(fd)
	if err != nil {
		return err
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("fstatfs: %w", err)
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return fail.Refuse("", "its directory is not on a tmpfs as it was at the checkpoint", "mount one there (mounts of the bundle)")
	}
	return nil
}

// openReadonly opens segments once more where areas map them without the right
// to make them writable: it comes from how the file is open, and only without
// it can a memfd be sealed while it is mapped (F_ADD_SEALS of fcntl(2)).
func (m *Maker) openReadonly() error {
	for _, ref := range Refs(m.head) {
		space, ok := m.head.Objects[ref].(*image.MM)
		if !ok {
			continue
		}
		for _, segment := range mm.ReadonlySegments(space) {
			if _, done := m.readonly[segment]; done || m.SysV(segment) != nil {
				continue
			}
			var b tracee.Batch
			i := m.reopen(&b, m.segments[segment], unix.O_RDONLY)
			if _, err := m.stub.Run(&b); err != nil {
				return err
			}
			up, err := m.moveUp([]int{int(b.Calls[i].Ret)})
			if err != nil {
				return err
			}
			m.readonly[segment] = up[0]
		}
	}
	return nil
}

// adoptMapping turns memory that has no descriptor, because mmap made it, into
// one of the table: opened through the map_files of the stub that has just
// mapped it, and sent back to it. So it is the same kind of memory as before
// and reads as such in /proc/PID/maps.
func (m *Maker) adoptMapping(ref image.Ref, rec *image.Shmem) error {
	end := shmemAt + (rec.Size+mm.PageSize-1)&^uint64(mm.PageSize-1)
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/map_files/%x-%x", m.stub.Pid, uint64(shmemAt), end), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := m.Send(m.stub, f)
	if err != nil {
		return err
	}
	up, err := m.moveUp([]int{fd})
	if err != nil {
		return err
	}
	m.segments[ref] = up[0]
	var b tracee.Batch
	b.Add(unix.SYS_MUNMAP, tracee.W(uint64(shmemAt)), tracee.W(end-shmemAt))
	_, err = m.stub.Run(&b)
	return err
}

// Send hands one of the coordinator's files to a stub and returns its number
// there.
func (m *Maker) Send(to *tracee.Stub, f *os.File) (int, error) {
	return m.send(to, int(f.Fd()), f.Name())
}

func (m *Maker) send(to *tracee.Stub, ours int, name string) (int, error) {
	fds, err := m.sendAll(to, ours)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return fds[0], nil
}

// maxRights is how many descriptors a message may carry (SCM_MAX_FD).
const maxRights = 253

// SendAll hands files to a stub (SCM_RIGHTS, unix(7)).
func (m *Maker) SendAll(to *tracee.Stub, files []*os.File) (there []int, err error) {
	for some := range slices.Chunk(files, maxRights) {
		fds := make([]int, len(some))
		for i, f := range some {
			fds[i] = int(f.Fd())
		}
		if fds, err = m.sendAll(to, fds...); err != nil {
			return nil, err
		}
		there = append(there, fds...)
	}
	return there, nil
}

func (m *Maker) sendAll(to *tracee.Stub, fds ...int) ([]int, error) {
	if err := unix.Sendmsg(m.sock, []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
		return nil, fmt.Errorf("send: %w", err)
	}
	socket := m.socket
	if socket == 0 {
		socket = SocketFD
	}
	var b tracee.Batch
	space := unix.CmsgSpace(4 * len(fds))
	control := b.Reserve(space)
	iov := b.PutPointer(nil, b.Reserve(1), binary.LittleEndian.AppendUint64(nil, 1)...)
	msg := b.Reserve(56) // struct msghdr
	b.Fix(msg.Plus(16), iov)
	binary.LittleEndian.PutUint64(b.At(msg.Plus(24), 8), 1)
	b.Fix(msg.Plus(32), control)
	binary.LittleEndian.PutUint64(b.At(msg.Plus(40), 8), uint64(space))
	b.Add(unix.SYS_RECVMSG, tracee.W(socket), msg, tracee.W(unix.MSG_CMSG_CLOEXEC))
	if _, err := to.Run(&b); err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	for i := range fds {
		fds[i] = int(binary.LittleEndian.Uint32(b.At(control.Plus(unix.CmsgLen(4*i)), 4)))
	}
	return fds, nil
}

// openChunk opens some files, moves them into the table and gives them their
// state.
func (m *Maker) openChunk(refs []image.Ref) error {
	low := make([]int, len(refs))
	for start, end := range m.sameOpener(refs) {
		who := m.opener(m.head.File(refs[start]))
		if err := m.open(who, refs[start:end], low[start:end]); err != nil {
			return err
		}
	}
	up, err := m.moveUp(low)
	if err != nil {
		return err
	}
	for i, ref := range refs {
		m.fds[ref] = up[i]
	}
	if err := m.validate(refs); err != nil {
		return err
	}
	for start, end := range m.sameOpener(refs) {
		if err := m.finish(m.opener(m.head.File(refs[start])), refs[start:end], m.finishKind); err != nil {
			return err
		}
	}
	return nil
}

// open opens files as somebody, or as the bundle's own process what that
// somebody may not: a daemon opens its log before it gives up its rights.
func (m *Maker) open(who Identity, refs []image.Ref, low []int) error {
	var b tracee.Batch
	m.become(&b, who)
	calls := make([]int, len(refs))
	for i, ref := range refs {
		f := m.head.File(ref)
		k := kindOf(f.Kind)
		if k == nil {
			return fail.Refuse(f.Path, "a file of kind "+f.Kind+" is not known to this version", "restore with a newer ocickpt")
		}
		var err error
		if calls[i], err = k.open(m, &b, f); err != nil {
			return fail.On(f.Kind+" "+f.Path, err)
		}
		b.Calls[calls[i]].Tolerate = true
	}
	m.become(&b, m.self)
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	for i, ref := range refs {
		low[i] = int(b.Calls[calls[i]].Ret)
		err := b.Err(calls[i])
		if denied(err) && !who.equal(m.bundle) {
			err = m.open(m.bundle, refs[i:i+1], low[i:i+1])
		}
		if err != nil {
			f := m.head.File(ref)
			return fail.On(f.Kind+" "+f.Path, fmt.Errorf("cannot be opened again in the container: %w", err))
		}
	}
	return nil
}

// finish gives opened files their state by the calls that add adds, as somebody, or
// where that one may not as the bundle's own process; see open.
func (m *Maker) finish(who Identity, refs []image.Ref, add func(b *tracee.Batch, fd int, f *image.File)) error {
	for len(refs) > 0 {
		i, err := m.finishAs(who, refs, add)
		if err == nil {
			return nil
		}
		if !denied(err) || who.equal(m.bundle) || i < 0 {
			return err
		}
		if _, err := m.finishAs(m.bundle, refs[i:i+1], add); err != nil {
			return err
		}
		refs = refs[i+1:]
	}
	return nil
}

// finishAs also tells at which file it failed.
func (m *Maker) finishAs(who Identity, refs []image.Ref, add func(b *tracee.Batch, fd int, f *image.File)) (int, error) {
	var b tracee.Batch
	m.become(&b, who)
	calls := make([]int, len(refs))
	for i, ref := range refs {
		add(&b, m.fds[ref], m.head.File(ref))
		calls[i] = len(b.Calls) - 1
	}
	m.become(&b, m.self)
	_, err := m.stub.Run(&b)
	if err == nil {
		return 0, nil
	}
	i, err := m.explain(err, calls, refs)
	if e := m.restoreSelf(); e != nil {
		return -1, errors.Join(err, e)
	}
	return i, err
}

func (m *Maker) finishKind(b *tracee.Batch, fd int, f *image.File) {
	if k := kindOf(f.Kind); k.finish != nil {
		k.finish(m, b, fd, f)
	}
}

func denied(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
}

// explain names the file that a failed call of a batch was for: the first
// whose last call is not before it.
func (m *Maker) explain(err error, calls []int, refs []image.Ref) (int, error) {
	failed, ok := err.(*tracee.CallError)
	if !ok {
		return -1, err
	}
	for i, last := range calls {
		if failed.Index <= last {
			f := m.head.File(refs[i])
			return i, fail.On(f.Kind+" "+f.Path, fmt.Errorf("cannot be opened again in the container: %w", failed))
		}
	}
	return -1, err
}

// Share gives another stub, which did not inherit them, all that the maker has
// opened, under the same numbers (pidfd_getfd(2)). It is an exec of the init
// stub's executable, and what it was given itself goes.
func (m *Maker) Share(to *tracee.Stub) error {
	var limit unix.Rlimit
	if err := unix.Prlimit(m.stub.Pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return fmt.Errorf("descriptor limit: %w", err)
	}
	if err := unix.Prlimit(to.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		return fmt.Errorf("descriptor limit: %w", err)
	}
	const init = 1
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE_RANGE, tracee.W(0), tracee.W(uint32(math.MaxUint32)), tracee.W(0))
	b.Add(unix.SYS_PIDFD_OPEN, tracee.W(init), tracee.W(0)) // becomes 0, and each file 1 at first
	for _, fd := range m.numbers() {
		b.Add(unix.SYS_PIDFD_GETFD, tracee.W(0), tracee.W(fd), tracee.W(0))
		b.Add(unix.SYS_DUP3, tracee.W(1), tracee.W(fd), tracee.W(unix.O_CLOEXEC))
		b.Add(unix.SYS_CLOSE, tracee.W(1))
	}
	b.Add(unix.SYS_CLOSE, tracee.W(0))
	for len(b.Calls) > 0 {
		part := tracee.Batch{Calls: b.Calls[:min(len(b.Calls), 8192)]}
		if _, err := to.Run(&part); err != nil {
			return fmt.Errorf("descriptors of the init: %w", err)
		}
		b.Calls = b.Calls[len(part.Calls):]
	}
	return nil
}

// numbers lists every descriptor of the maker's table.
func (m *Maker) numbers() []int {
	all := slices.Concat([]int{m.socket}, m.stdio[:], m.kept, slices.Collect(maps.Values(m.given)))
	for _, fd := range m.fds {
		all = append(all, fd)
	}
	for _, p := range m.pipes {
		all = append(all, p.fd[:]...)
	}
	for _, segments := range []map[image.Ref]int{m.segments, m.readonly, m.anchors, m.unnamed, m.queues} {
		for _, fd := range segments {
			all = append(all, fd)
		}
	}
	for _, fd := range m.covered {
		all = append(all, fd)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Seal ends the filling: shared memory gets its size to the byte, which filling
// it by the page has rounded up, memfds their seals (fcntl(2)), and files without
// a name their times.
func (m *Maker) Seal() error {
	if err := m.endFilling(); err != nil {
		return err
	}
	if err := m.restoreXattrs(); err != nil {
		return err
	}
	var b tracee.Batch
	m.stamp(&b)
	for _, ref := range Refs(m.head) {
		rec, ok := m.head.Objects[ref].(*image.Shmem)
		if ok && rec.SysV != nil {
			continue
		}
		if ok && rec.Size%mm.PageSize != 0 {
			b.Add(unix.SYS_FTRUNCATE, tracee.W(m.segments[ref]), tracee.W(rec.Size))
		}
		if ok && rec.Memfd && rec.Seals != 0 {
			b.Add(unix.SYS_FCNTL, tracee.W(m.segments[ref]), tracee.W(unix.F_ADD_SEALS), tracee.W(rec.Seals))
		}
	}
	if _, err := m.stub.Run(&b); err != nil {
		return fmt.Errorf("size, seals and times of files in memory and without a name: %w", err)
	}
	if err := m.refillQueues(); err != nil {
		return err
	}
	if err := m.settleConnections(); err != nil {
		return err
	}
	if err := m.turnDirectories(); err != nil {
		return err
	}
	return m.refillTerminals()
}

// Fill puts bytes back into a pipe, of which the maker still holds both ends, a
// terminal, or a file without a name.
func (m *Maker) Fill(ref image.Ref, offset uint64, data []byte) error {
	if _, ok := m.head.Objects[ref].(*image.Queue); ok {
		m.unix.content[ref] = append(m.unix.content[ref], data...)
		return nil
	}
	if p := m.ptys[ref]; p != nil {
		p.content = append(p.content, data...)
		return nil
	}
	if _, ok := m.queues[ref]; ok {
		m.texts[ref] = append(m.texts[ref], data...)
		return nil
	}
	if _, ok := m.anchors[ref]; ok {
		return m.fillRemoved(ref, offset, data)
	}
	if c := m.connections[ref]; c != nil {
		return m.named(ref, c.Fill(data))
	}
	if m.pipes[ref] == nil {
		return fmt.Errorf("contents for object %d, which is no pipe", ref)
	}
	return m.fillPipe(ref, data)
}

// Segment opens shared memory in the coordinator, to fill it.
func (m *Maker) Segment(ref image.Ref, rec *image.Shmem) (mm.Writer, error) {
	f, err := m.stub.Take(m.segments[ref])
	if err != nil {
		return nil, err
	}
	return mm.SegmentWriter(rec, m.stub, m.segments[ref], f)
}

// SegmentFD is the number under which every stub holds shared memory ref.
func (m *Maker) SegmentFD(ref image.Ref, write bool) (int, bool) {
	if fd, ok := m.readonly[ref]; ok && !write {
		return fd, true
	}
	fd, ok := m.segments[ref]
	return fd, ok
}

// SysV is the record of shared memory that is a System V segment (mm.Opened).
func (m *Maker) SysV(ref image.Ref) *image.Shmem {
	if rec := m.head.Shmem(ref); rec != nil && rec.SysV != nil {
		return rec
	}
	return nil
}

// Table gives a stub the descriptors of its process and closes all others.
func (m *Maker) Table(s *tracee.Stub, files *image.Files) error {
	for chunk := range slices.Chunk(files.Descriptors, 8192) {
		var b tracee.Batch
		for _, d := range chunk {
			if f := m.head.File(d.File); f.Thread != 0 || aboutDescriptor(f) {
				continue // OpenThreads, OpenAbout
			}
			var flags uint32
			if d.CloExec {
				flags = unix.O_CLOEXEC
			}
			if fd, ok := m.fds[d.File]; ok {
				b.Add(unix.SYS_DUP3, tracee.W(fd), tracee.W(d.FD), tracee.W(flags))
				continue
			}
			if err := m.openLate(s, d); err != nil {
				return err
			}
		}
		if _, err := s.Run(&b); err != nil {
			return fmt.Errorf("descriptor table: %w", err)
		}
	}
	return nil
}

// OwnTable is Table for a thread that has begun with a copy of another's.
func (m *Maker) OwnTable(s *tracee.Stub, files *image.Files) error {
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE_RANGE, tracee.W(0), tracee.W(m.base-1), tracee.W(0))
	if _, err := s.Run(&b); err != nil {
		return err
	}
	if err := m.Table(s, files); err != nil || m.AboutThreads(files) {
		return err
	}
	return m.OpenAbout(s, files)
}

// CloseTable closes what a stub has above the numbers of its process, and takes
// the table's locks. The init stub's goes last, for it holds the pipes until they
// are filled.
func (m *Maker) CloseTable(b *tracee.Batch, files *image.Files) {
	b.Add(unix.SYS_CLOSE_RANGE, tracee.W(m.base), tracee.W(uint32(math.MaxUint32)), tracee.W(0))
	m.lock(b, files)
}

// Keep hands one of the coordinator's files to a stub under a number of the
// table, so that it goes with the others.
func (m *Maker) Keep(to *tracee.Stub, f *os.File) (int, error) {
	low, err := m.Send(to, f)
	if err != nil {
		return 0, err
	}
	return m.RaiseIn(to, low)
}

// openLate opens a file that exists only since its process does again, in the
// first task that holds it; others are given the same description.
func (m *Maker) openLate(s *tracee.Stub, d image.Descriptor) error {
	f := m.head.File(d.File)
	var fd int
	if shared := m.late[d.File]; shared != nil {
		var err error
		if fd, err = m.Send(s, shared); err != nil {
			return err
		}
	} else {
		var err error
		if fd, err = m.openLateFirst(s, f, d.File); err != nil {
			return fail.On(f.Kind+" "+f.Path, err)
		}
	}
	return m.place(s, fd, d)
}

func (m *Maker) openLateFirst(s *tracee.Stub, f *image.File, ref image.Ref) (int, error) {
	var b tracee.Batch
	i, err := kindOf(f.Kind).open(m, &b, f)
	if err != nil {
		return 0, err
	}
	if _, err := s.Run(&b); err != nil {
		return 0, err
	}
	fd := int(b.Calls[i].Ret)
	if m.late[ref], err = s.Take(fd); err != nil {
		return 0, err
	}
	var finish tracee.Batch
	if k := kindOf(f.Kind); k.finish != nil {
		k.finish(m, &finish, fd, f)
	}
	_, err = s.Run(&finish)
	return fd, err
}

// isLate reports a file that can be opened only when there are more processes than
// the init.
func (m *Maker) isLate(f *image.File) bool {
	return f.Pid != 0 || m.inside(f) || f.Gone != nil || m.lateQueue(f)
}

// inside reports a file that can be opened only when tasks are in the mount
// namespaces that they have made. Of a socket it is only its name.
func (m *Maker) inside(f *image.File) bool {
	gone := m.head.Removed(f.Removed)
	return f.Inside != 0 && f.Kind != image.KindSocket || gone != nil && gone.Inside != 0
}

// Obtain opens what can be opened only when all processes are there, and what is
// about tasks that are gone. host is the pid here of a task.
func (m *Maker) Obtain(host func(pid int32) int) error {
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		if f == nil || f.Gone != nil || f.Thread != 0 || kindOf(f.Kind) == nil || kindOf(f.Kind).obtain == nil {
			continue
		}
		pid := host(f.Pid)
		if pid == 0 {
			return fail.On(f.Kind, fmt.Errorf("task %d, which it is about, is not there yet", f.Pid))
		}
		var err error
		if m.late[ref], err = kindOf(f.Kind).obtain(m, pid, f); err != nil {
			return fail.On(fmt.Sprintf("%s of task %d", f.Kind, f.Pid), err)
		}
	}
	return m.makeGone()
}

// OpenInside opens what is to be opened in mount namespaces that tasks have made,
// each by a stub in it, and keeps it for those who hold it. Files of processes in
// the container's /proc are opened here too: there may be another /proc where
// they are held.
func (m *Maker) OpenInside(stubs map[int]*tracee.Stub) error {
	if !slices.ContainsFunc(m.head.Tree.Namespaces, func(n image.NestedNamespace) bool { return n.Type == "mnt" }) {
		return nil
	}
	for _, ref := range Refs(m.head) {
		f, ok := m.head.Objects[ref].(*image.File)
		if !ok || !m.inside(f) && (f.Kind != image.KindProc || f.Pid == 0 || f.Thread != 0) {
			continue
		}
		if err := m.openInside(stubs, ref, f); err != nil {
			return fail.On(f.Kind+" "+f.Path, err)
		}
	}
	return m.mapInside(stubs)
}

// mapInside gives stubs what their tasks have mapped from such namespaces.
func (m *Maker) mapInside(stubs map[int]*tracee.Stub) error {
	for _, t := range m.head.Tasks {
		s := stubs[int(t.Pid)]
		if s == nil {
			continue
		}
		for _, ref := range m.insideOf(m.head.MM(t.MM)) {
			if err := m.install(s, m.late[ref], m.fds[ref]); err != nil {
				return fail.On("mapped file "+m.head.File(ref).Path, err)
			}
		}
	}
	return nil
}

func (m *Maker) openInside(stubs map[int]*tracee.Stub, ref image.Ref, f *image.File) error {
	by, nested := m.insider(stubs, f)
	if by == nil {
		return errors.New("no task is in the mount namespace that it is in")
	}
	fd := make([]int, 1)
	there := *m
	there.stub, there.fds = by, map[image.Ref]int{}
	if nested { // who it is there it has become already
		var b tracee.Batch
		i, err := kindOf(f.Kind).open(m, &b, f)
		if err == nil {
			_, err = by.Run(&b)
		}
		if err != nil {
			return err
		}
		fd[0] = int(b.Calls[i].Ret)
	} else if err := there.open(m.opener(f), []image.Ref{ref}, fd); err != nil {
		return err
	}
	there.fds[ref] = fd[0]
	if err := there.validate([]image.Ref{ref}); err != nil {
		return err
	}
	var err error
	if m.late[ref], err = by.Take(fd[0]); err != nil {
		return err
	}
	var b tracee.Batch
	if k := kindOf(f.Kind); k.finish != nil {
		k.finish(m, &b, fd[0], f)
	}
	b.Add(unix.SYS_CLOSE, tracee.W(fd[0]))
	_, err = by.Run(&b)
	return err
}

// insider is a stub in the mount namespace of a file, the file's opener if that
// is, and whether it is in a user namespace of a task's making.
func (m *Maker) insider(stubs map[int]*tracee.Stub, f *image.File) (by *tracee.Stub, nested bool) {
	for i := range m.head.Tree.Processes {
		p := &m.head.Tree.Processes[i]
		s := stubs[int(p.Pid)]
		if s == nil || p.Zombie || m.mounts(p) != f.Inside {
			continue
		}
		if by == nil || p.Pid == f.Opener {
			by, nested = s, m.head.UserOf(p.Pid) != nil
		}
	}
	return by, nested
}

// mounts is the mount namespace of a process, 0 for the container's.
func (m *Maker) mounts(p *image.Process) image.Ref {
	for _, ref := range p.Namespaces {
		if n := m.head.Nested(ref); n != nil && n.Type == "mnt" {
			return ref
		}
	}
	return 0
}

// place moves a descriptor to its number.
func (m *Maker) place(s *tracee.Stub, fd int, d image.Descriptor) error {
	var flags uint32
	if d.CloExec {
		flags = unix.O_CLOEXEC
	}
	var b tracee.Batch
	if fd != int(d.FD) {
		b.Add(unix.SYS_DUP3, tracee.W(fd), tracee.W(d.FD), tracee.W(flags))
		b.Add(unix.SYS_CLOSE, tracee.W(fd))
	} else if !d.CloExec {
		b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_SETFD), tracee.W(0))
	}
	_, err := s.Run(&b)
	return err
}

// Close releases what the coordinator holds.
func (m *Maker) Close() {
	for _, f := range m.late {
		_ = f.Close()
	}
	for _, c := range m.connections {
		_ = c.File.Close()
	}
	_ = m.endFilling()
}

// RestoreFS adds the calls that put a stub where its process stood. The root
// comes last: it is a path from the container's root too.
func (m *Maker) RestoreFS(b *tracee.Batch, fs *image.FS) {
	step := func(removed image.Ref, mnt int32, path string) {
		switch {
		case removed != 0:
			b.Add(unix.SYS_FCHDIR, tracee.W(m.anchors[removed]))
		case mnt != 0:
			b.Add(unix.SYS_FCHDIR, tracee.W(m.covered[mount.Place{Mount: int(mnt), Path: path}]))
		default:
			b.Add(unix.SYS_CHDIR, b.String(path))
		}
	}
	held := fs.RootRemoved != 0 || fs.RootMnt != 0
	if held {
		step(fs.RootRemoved, fs.RootMnt, fs.Root)
		b.Add(unix.SYS_CHROOT, b.String("."))
	}
	step(fs.CwdRemoved, fs.CwdMnt, fs.Cwd)
	if !held && fs.Root != "/" {
		b.Add(unix.SYS_CHROOT, b.String(fs.Root))
	}
	b.Add(unix.SYS_UMASK, tracee.W(fs.Umask))
}
