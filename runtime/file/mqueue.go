package file

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// queue is a POSIX message queue: a file of a file system that each ipc namespace
// has one of.
type queue struct {
	object.Object
	record *image.Mqueue
	file   *os.File // in this process
	text   []byte
}

func (q *queue) object() string { return "message queue /" + q.record.Name }

// queues are those of one container.
type queues struct {
	list []*queue
	byID map[fileID]*queue
	dirs map[uint64]func() image.Ref // namespaces by the file system's device
}

// AddQueues reads the message queues of an ipc namespace, of which dir is the
// file system's root, and changes nothing in them. ns tells its reference.
func (s *Set) AddQueues(dir *os.File, ns func() image.Ref) error {
	var root unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &root); err != nil {
		return fmt.Errorf("message queues: %w", err)
	}
	if s.queues.dirs == nil {
		s.queues = queues{byID: map[fileID]*queue{}, dirs: map[uint64]func() image.Ref{}}
	}
	s.queues.dirs[root.Dev] = ns
	if s.IDs.User(root.Uid) != 0 || root.Mode != unix.S_IFDIR|0o1777 {
		s.Warnings = append(s.Warnings, "the owner or mode of the directory of message queues (/dev/mqueue) was changed, and is as it comes after a restore")
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("message queues: %w", err)
	}
	for _, name := range slices.Backward(names) { // the last one made is listed first
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = s.addQueue(os.NewFile(uintptr(fd), name), name)
		}
		if err != nil {
			return fail.On("message queue /"+name, err)
		}
	}
	return nil
}

// addQueue reads a queue through a descriptor of this process.
func (s *Set) addQueue(f *os.File, name string) error {
	q := &queue{record: &image.Mqueue{Name: name}, file: f}
	s.queues.list = append(s.queues.list, q)
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	attr, err := queueAttributes(f)
	if err != nil {
		return err
	}
	*q.record = image.Mqueue{
		Name: name, Removed: st.Nlink == 0, Mode: st.Mode & 0o7777, UID: s.IDs.User(st.Uid), GID: s.IDs.Group(st.Gid),
		MaxCount: uint32(attr[1]), MaxSize: uint32(attr[2]), Atime: st.Atim.Nano(), Mtime: st.Mtim.Nano(),
	}
	ns := s.queues.dirs[st.Dev]
	q.Object = object.Object{Type: image.TypeMqueue, Record: q.record, Complete: func() { q.record.NS = ns() }}
	s.queues.byID[fileID{st.Dev, st.Ino}] = q
	return nil
}

// queueAttributes are struct mq_attr: flags, most messages, longest message and
// how many there are (mq_getattr(3)).
func queueAttributes(f *os.File) (attr [8]int64, err error) {
	if _, _, errno := unix.Syscall(unix.SYS_MQ_GETSETATTR, f.Fd(), 0, uintptr(unsafe.Pointer(&attr))); errno != 0 {
		return attr, fmt.Errorf("mq_getattr: %w", errno)
	}
	return attr, nil
}

// Close releases what the set holds open.
func (s *Set) Close() {
	s.release()
	for _, q := range s.queues.list {
		_ = q.file.Close()
	}
	s.closeFlying()
}

// HasQueues reports whether there are message queues.
func (s *Set) HasQueues() bool { return len(s.queues.list) > 0 }

// Holder tells of a process by its host pid: its pid in the container and its
// threads' tables, none if it is not of the container.
type Holder func(host int) (inner int, tables []*Table)

// ReadQueues reads what is in the queues. Without ask, that is without BPF, only
// what is empty and tells nobody can be saved: the one call that shows a message
// takes it out. messages is false for a look at a container that runs.
func (s *Set) ReadQueues(ask *bpf.Queues, holder Holder, messages bool) error {
	for _, q := range s.queues.list {
		err := q.idle()
		if ask != nil {
			err = s.readQueue(q, ask, holder, messages)
		}
		if err != nil {
			return fail.On(q.object(), err)
		}
	}
	return nil
}

// idle refuses a queue that holds something. Its status (mq_overview(7)) is read
// only where nothing else tells, as that counts as an access.
func (q *queue) idle() error {
	attr, err := queueAttributes(q.file)
	if err != nil {
		return err
	}
	const remedy = "give ocickpt CAP_BPF and CAP_PERFMON, or remove the queue before the checkpoint (mq_unlink)"
	if n := attr[3]; n > 0 {
		return fail.Refuse("", fmt.Sprintf("it holds %d messages, and only BPF, which cannot be used here, reads them without taking them out", n), remedy)
	}
	b := make([]byte, 256)
	n, err := q.file.ReadAt(b, 0)
	if n == 0 {
		return fmt.Errorf("its status: %w", err)
	}
	var size, method, signal, pid int
	if _, err := fmt.Sscanf(string(b[:n]), "QSIZE:%d NOTIFY:%d SIGNO:%d NOTIFY_PID:%d", &size, &method, &signal, &pid); err != nil {
		return fmt.Errorf("its status: %w", err)
	}
	if pid != 0 {
		return fail.Refuse("", fmt.Sprintf("process (host %d) waits to be told of a message (mq_notify), and only BPF, which cannot be used here, knows all of how", pid), remedy)
	}
	return nil
}

const (
	sigevNone   = 1 // SIGEV_NONE of sigevent(3type)
	sigevThread = 2 // SIGEV_THREAD
)

func (s *Set) readQueue(q *queue, ask *bpf.Queues, holder Holder, messages bool) error {
	found, err := ask.Read(int(q.file.Fd()), messages)
	if err != nil {
		return err
	}
	q.record.Creator = s.IDs.User(found.Creator)
	for _, m := range found.Messages {
		q.record.Messages = append(q.record.Messages, image.MqueueText{Priority: m.Priority, Size: uint32(len(m.Text))})
		q.text = append(q.text, m.Text...)
	}
	if found.Owner == 0 {
		return nil
	}
	inner, tables := holder(found.Owner)
	switch {
	case inner == 0:
		return fail.Refuse("", fmt.Sprintf("process (host %d), which is not of the container, waits to be told of a message (mq_notify)", found.Owner), "end it")
	case found.Method == sigevThread:
		return fail.Refuse("", fmt.Sprintf("task %d waits to be told of a message by a thread (SIGEV_THREAD), which the kernel does by a socket of its own", inner), "use SIGEV_SIGNAL, or end the wait (mq_notify with NULL)")
	case !slices.ContainsFunc(tables, func(t *Table) bool { return t.holds(q) }):
		return fail.Refuse("", fmt.Sprintf("task %d waits to be told of a message (mq_notify) and holds no descriptor of the queue", inner), "end the wait before the checkpoint")
	}
	q.record.Notify = &image.MqueueNotify{Pid: int32(inner), Method: found.Method, Signal: found.Signal, Value: found.Value}
	return nil
}

func (t *Table) holds(q *queue) bool {
	return t != nil && slices.ContainsFunc(t.entries, func(e entry) bool { return e.desc != nil && e.desc.queue == q })
}

// saveQueues writes the texts of the messages.
func (s *Set) saveQueues(w *image.Writer) error {
	for _, q := range s.queues.list {
		for at := 0; at < len(q.text); at += image.MaxRaw {
			if err := w.Bytes(q.Ref, uint64(at), q.text[at:min(at+image.MaxRaw, len(q.text))]); err != nil {
				return err
			}
		}
	}
	return nil
}

// mqueueMagic is the type of the file system of message queues (statfs(2)).
const mqueueMagic = 0x19800202

// mqueue is a descriptor of a message queue: one of mq_open(3), whose path is in
// no mount of anybody's, or one that was opened as a file.
var mqueue = kind{
	name: image.KindMqueue,
	is: func(_ *Set, one *seen) bool {
		var fs unix.Statfs_t
		return one.format() == unix.S_IFREG && unix.Statfs(one.path(), &fs) == nil && fs.Type == mqueueMagic
	},
	read: func(s *Set, d *Description) error {
		id := fileID{d.seen.stat.Dev, d.seen.stat.Ino}
		if s.queues.byID[id] == nil {
			if s.queues.dirs[d.seen.stat.Dev] == nil {
				return fail.Refuse("", "the message queue is of an ipc namespace that no task of the container is in", "close it before the checkpoint")
			}
			f, err := d.seen.own()
			if err != nil {
				return err
			}
			if err := s.addQueue(f, queueName(d.seen.link)); err != nil {
				return err
			}
		}
		d.queue = s.queues.byID[id]
		d.Record.Kind = image.KindMqueue
		d.Complete = func() { d.Record.Pipe = d.queue.Ref }
		if d.queue.record.Removed || s.external(d.seen) {
			return nil
		}
		d.Record.Path = d.seen.link
		return s.inPlace(d)
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		fd, ok := m.queues[f.Pipe]
		switch {
		case !ok:
			return 0, fmt.Errorf("a descriptor of a message queue without its queue, object %d", f.Pipe)
		case f.Path != "":
			return openPath(b, f.Path, f.Flags), nil
		}
		return m.reopen(b, fd, f.Flags), nil
	},
	finish: seek,
}

// queueName is what a queue was called that has lost its name.
func queueName(link string) string {
	return filepath.Base(strings.TrimSuffix(link, deletedSuffix))
}

// asCreator adds the calls that make a queue as its creator, whose resource limit
// it counts against, with CAP_SYS_RESOURCE where the bundle gives that: it is asked
// for beyond the limits in /proc/sys/fs/mqueue (mq_overview(7)).
func (m *Maker) asCreator(b *tracee.Batch, uid, gid uint32, make func()) {
	// Whose limit it counts against is the real user (ucounts of the kernel). The
	// saved one stays, and with it the way back and the permitted capabilities.
	keep := tracee.W(^uint32(0))
	b.Add(unix.SYS_SETFSGID, tracee.W(gid)) // one that the user namespace of the queues has
	b.Add(unix.SYS_SETRESUID, tracee.W(uid), tracee.W(uid), keep)
	task.Capset(b, m.self.Capabilities, m.bundle.Capabilities&(1<<unix.CAP_SYS_RESOURCE), 0)
	make()
	b.Add(unix.SYS_SETRESUID, tracee.W(0), tracee.W(0), keep)
	b.Add(unix.SYS_SETFSGID, tracee.W(m.self.GID))
	task.Capset(b, m.self.Capabilities, m.self.Capabilities, 0)
}

// HasQueues reports whether the image has message queues in the ipc namespace ns, 0
// for the container's own.
func (m *Maker) HasQueues(ns image.Ref) bool { return len(m.queuesIn(ns)) > 0 }

func (m *Maker) queuesIn(ns image.Ref) []image.Ref {
	return slices.DeleteFunc(Refs(m.head), func(ref image.Ref) bool { q := m.head.Mqueue(ref); return q == nil || q.NS != ns })
}

// MakeQueues makes the message queues of an ipc namespace that a task has made, on
// a visit there, and opens the descriptors of them: all other stubs have been
// forked by then.
func (m *Maker) MakeQueues(ns image.Ref, visit *namespace.Visit) error {
	if err := m.makeQueues(ns, visit); err != nil {
		return err
	}
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		if f == nil || f.Inside != 0 || !m.lateQueue(f) || m.head.Mqueue(f.Pipe).NS != ns {
			continue
		}
		if err := m.obtainQueue(ref, f); err != nil {
			return fail.On("message queue /"+m.head.Mqueue(f.Pipe).Name, err)
		}
	}
	return nil
}

// lateQueue reports a descriptor of a message queue that is in an ipc namespace of
// a task's making.
func (m *Maker) lateQueue(f *image.File) bool {
	q := m.head.Mqueue(f.Pipe)
	return f.Kind == image.KindMqueue && q != nil && q.NS != 0
}

func (m *Maker) obtainQueue(ref image.Ref, f *image.File) error {
	fd := make([]int, 1)
	if err := m.open(m.opener(f), []image.Ref{ref}, fd); err != nil {
		return err
	}
	var err error
	if m.late[ref], err = m.stub.Take(fd[0]); err != nil {
		return err
	}
	var b tracee.Batch
	mqueue.finish(m, &b, fd[0], f)
	b.Add(unix.SYS_CLOSE, tracee.W(fd[0]))
	_, err = m.stub.Run(&b)
	return err
}

// makeQueues makes the message queues of an ipc namespace, empty. Those that have
// lost their name come first, so that it is free.
func (m *Maker) makeQueues(ns image.Ref, visit *namespace.Visit) error {
	refs := m.queuesIn(ns)
	slices.SortStableFunc(refs, func(a, b image.Ref) int {
		return cmp.Compare(order(m.head.Mqueue(a).Removed), order(m.head.Mqueue(b).Removed))
	})
	for _, ref := range refs {
		rec := m.head.Mqueue(ref)
		if err := m.makeQueue(ref, rec, visit); err != nil {
			return fail.On("message queue /"+rec.Name, err)
		}
	}
	return nil
}

func order(first bool) int {
	if first {
		return 0
	}
	return 1
}

// makeQueue makes one. In the ipc namespace of a user namespace that a task has
// made it counts against the creator's limit in the container's.
func (m *Maker) makeQueue(ref image.Ref, rec *image.Mqueue, visit *namespace.Visit) error {
	var b tracee.Batch
	var attr []byte
	for _, v := range [8]int64{1: int64(rec.MaxCount), 2: int64(rec.MaxSize)} {
		attr = binary.NativeEndian.AppendUint64(attr, uint64(v))
	}
	name, made := b.String(rec.Name), 0
	visit.Calls(&b, func() {
		m.asCreator(&b, rec.Creator, rec.GID, func() {
			made = b.Try(unix.SYS_MQ_OPEN, name, tracee.W(unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NONBLOCK|unix.O_CLOEXEC), tracee.W(0o600), b.Put(attr))
		})
	})
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	if err := explainQueue(b.Err(made), rec); err != nil {
		return err
	}
	up, err := m.moveUp([]int{int(b.Calls[made].Ret)})
	if err != nil {
		return err
	}
	m.queues[ref] = up[0]
	var state tracee.Batch
	state.Add(unix.SYS_FCHOWN, tracee.W(up[0]), tracee.W(rec.UID), tracee.W(rec.GID))
	state.Add(unix.SYS_FCHMOD, tracee.W(up[0]), tracee.W(rec.Mode))
	if rec.Removed {
		visit.Calls(&state, func() { state.Add(unix.SYS_MQ_UNLINK, state.String(rec.Name)) })
	}
	_, err = m.stub.Run(&state)
	return err
}

// explainQueue says which limit keeps a queue from being made.
func explainQueue(err error, rec *image.Mqueue) error {
	remedy := ""
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EINVAL):
		remedy = "raise fs.mqueue.msg_max and fs.mqueue.msgsize_max in the bundle (linux.sysctl), or give CAP_SYS_RESOURCE"
	case errors.Is(err, unix.ENOSPC):
		remedy = "raise fs.mqueue.queues_max in the bundle (linux.sysctl), or give CAP_SYS_RESOURCE"
	case errors.Is(err, unix.EMFILE):
		remedy = "raise RLIMIT_MSGQUEUE in the bundle (process.rlimits) or here (ulimit -Hq)"
	case errors.Is(err, unix.EEXIST):
		remedy = "restore with a bundle that gives the container an ipc namespace of its own"
	}
	return &fail.Error{Cause: fmt.Errorf("a queue for %d messages of %d bytes cannot be made again: %w", rec.MaxCount, rec.MaxSize, err), Remedy: remedy}
}

// refillQueues puts the messages back, and the times then.
func (m *Maker) refillQueues() error {
	for ref, fd := range m.queues {
		rec := m.head.Mqueue(ref)
		if err := m.refillQueue(rec, fd, m.texts[ref]); err != nil {
			return fail.On("message queue /"+rec.Name, err)
		}
	}
	return nil
}

// sendChunk bounds the bytes of one batch.
const sendChunk = 1 << 20

func (m *Maker) refillQueue(rec *image.Mqueue, fd int, text []byte) error {
	for left := rec.Messages; len(left) > 0; {
		var b tracee.Batch
		for len(left) > 0 && len(b.Data) <= sendChunk {
			b.Add(unix.SYS_MQ_TIMEDSEND, tracee.W(fd), b.Put(text[:left[0].Size]), tracee.W(left[0].Size), tracee.W(left[0].Priority))
			left, text = left[1:], text[left[0].Size:]
		}
		if _, err := m.stub.Run(&b); err != nil {
			return err
		}
	}
	var b tracee.Batch
	var times []byte
	for _, t := range []int64{rec.Atime, rec.Mtime} {
		ts := unix.NsecToTimespec(t)
		times = binary.NativeEndian.AppendUint64(times, uint64(ts.Sec))
		times = binary.NativeEndian.AppendUint64(times, uint64(ts.Nsec))
	}
	b.Add(unix.SYS_UTIMENSAT, tracee.W(fd), tracee.W(0), b.Put(times))
	_, err := m.stub.Run(&b)
	return err
}

// Notify adds the calls by which a task registers for the messages that it is to
// be told of, through a table of its own. They come when the task closes nothing
// any more, for closing any descriptor of a queue ends the registration.
func (m *Maker) Notify(b *tracee.Batch, files *image.Files, pid int32) {
	if files == nil || len(m.queues) == 0 {
		return
	}
	for _, d := range files.Descriptors {
		f := m.head.File(d.File)
		rec := m.head.Mqueue(f.Pipe)
		if rec == nil || rec.Notify == nil || rec.Notify.Pid != pid || m.notified[f.Pipe] {
			continue
		}
		m.notified[f.Pipe] = true
		event := binary.NativeEndian.AppendUint64(nil, rec.Notify.Value) // struct sigevent
		event = binary.NativeEndian.AppendUint32(event, uint32(rec.Notify.Signal))
		event = binary.NativeEndian.AppendUint32(event, uint32(rec.Notify.Method))
		const sigeventSize = 64
		b.Add(unix.SYS_MQ_NOTIFY, tracee.W(d.FD), b.Put(append(event, make([]byte, sigeventSize-len(event))...)))
	}
}
