package file

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// epoll is an interest list (epoll_create(2)). An entry is known by the number
// it was registered under and the file behind it at that time, which may have
// been closed, or moved to another number, since.
var epoll = kind{
	name: image.KindEpoll,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[eventpoll]" },
	read: func(_ *Set, d *Description) error {
		d.Record.Kind, d.Record.Epoll = image.KindEpoll, &image.Epoll{}
		return d.readBusyPoll() // the entries when every file is known: interest
	},
	open: func(_ *Maker, b *tracee.Batch, _ *image.File) (int, error) {
		return b.Add(unix.SYS_EPOLL_CREATE1, tracee.W(unix.EPOLL_CLOEXEC)), nil
	},
}

// How an epoll polls network devices (ioctl_eventpoll(2), Linux 6.9).
const (
	epollGetParams = 0x80088a02 // EPIOCGPARAMS
	epollSetParams = 0x40088a01 // EPIOCSPARAMS
)

func (d *Description) readBusyPoll() error {
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	var params [8]byte // struct epoll_params
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), epollGetParams, uintptr(unsafe.Pointer(&params)))
	if errno == 0 && params != [8]byte{} {
		d.Record.Epoll.BusyPoll = params[:]
	}
	return nil // a kernel without them has none set
}

// epollPrivate are the bits of an entry that stay when one-shot has fired:
// EPOLLET, EPOLLONESHOT, EPOLLWAKEUP, EPOLLEXCLUSIVE (EP_PRIVATE_BITS in
// fs/eventpoll.c).
const epollPrivate = 0xf0000000

// fired reports an entry that is one-shot and has been told: it waits for nothing
// before it is armed again. There is no call that makes such a one, for the kernel
// adds errors and hang-ups to what it is asked for; it has to fire.
func fired(e *image.EpollEntry) bool {
	return e.Events&unix.EPOLLONESHOT != 0 && e.Events&^uint32(epollPrivate) == 0
}

// register gives an epoll its entries, in a stub in which numbers below the table
// are free: a file is there under its registered number for as long as it
// takes. number is the one that the stub has for a file. Entries that have fired
// come first: one look makes them fire, and must not take the events of others.
func (m *Maker) register(by *tracee.Stub, ref image.Ref, number map[image.Ref]int) error {
	f, fd := m.head.File(ref), m.fds[ref]
	var spent, waiting []image.EpollEntry
	for _, e := range f.Epoll.Entries {
		if fired(&e) {
			spent = append(spent, e)
		} else {
			waiting = append(waiting, e)
		}
	}
	const some = 4096 // in one batch
	for few := range slices.Chunk(spent, some) {
		var b tracee.Batch
		for i := range few {
			m.prime(&b, &few[i], unix.SYS_WRITE)
			epollCtl(&b, fd, unix.EPOLL_CTL_ADD, &few[i], few[i].Events|unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLPRI, number)
		}
		b.Add(unix.SYS_EPOLL_WAIT, tracee.W(fd), b.Reserve(len(few)*12), tracee.W(len(few)), tracee.W(0)) // struct epoll_event
		for i := range few {
			m.prime(&b, &few[i], unix.SYS_READ)
		}
		if _, err := by.Run(&b); err != nil {
			return err
		}
	}
	for few := range slices.Chunk(waiting, some) {
		var b tracee.Batch
		m.become(&b, m.opener(f)) // EPOLLWAKEUP asks for a capability
		for i := range few {
			epollCtl(&b, fd, unix.EPOLL_CTL_ADD, &few[i], few[i].Events, number)
		}
		m.become(&b, m.self)
		if _, err := by.Run(&b); err != nil {
			return err
		}
	}
	if len(spent) > 0 {
		if err := m.disarm(by, fd, spent, number); err != nil {
			return err
		}
	}
	return m.setBusyPoll(by, f, fd)
}

// setBusyPoll takes CAP_NET_ADMIN for large budgets, of the task or the bundle.
func (m *Maker) setBusyPoll(by *tracee.Stub, f *image.File, fd int) (err error) {
	if f.Epoll.BusyPoll == nil {
		return nil
	}
	for _, who := range []Identity{m.opener(f), m.bundle} {
		var b tracee.Batch
		m.become(&b, who)
		i := b.Try(unix.SYS_IOCTL, tracee.W(fd), tracee.W(epollSetParams), b.Put(f.Epoll.BusyPoll))
		m.become(&b, m.self)
		if _, err := by.Run(&b); err != nil {
			return err
		}
		if err = b.Err(i); err == nil {
			return nil
		}
	}
	return fmt.Errorf("its parameters for polling network devices (EPIOCSPARAMS): %w", err)
}

// prime puts a byte into the pipe that an entry is about, and takes it out again:
// alone of all that can hang up, an empty one has nothing to tell.
func (m *Maker) prime(b *tracee.Batch, e *image.EpollEntry, call uintptr) {
	f := m.head.File(e.File)
	p := m.pipes[f.Pipe]
	if p == nil || !reads(f.Flags) {
		return
	}
	end := p.fd[0]
	if call == unix.SYS_WRITE {
		end = p.fd[1]
	}
	b.Add(call, tracee.W(end), b.Reserve(1), tracee.W(1))
}

func epollCtl(b *tracee.Batch, fd, op int, e *image.EpollEntry, events uint32, number map[image.Ref]int) {
	event := binary.LittleEndian.AppendUint32(nil, events)
	event = binary.LittleEndian.AppendUint64(event, e.Data)
	b.Add(unix.SYS_DUP3, tracee.W(number[e.File]), tracee.W(e.FD), tracee.W(unix.O_CLOEXEC))
	b.Add(unix.SYS_EPOLL_CTL, tracee.W(fd), tracee.W(op), tracee.W(e.FD), b.Put(event))
	b.Add(unix.SYS_CLOSE, tracee.W(e.FD))
}

// disarm looks for entries that should have fired and have not. They go on
// waiting for errors and hang-ups only.
func (m *Maker) disarm(by *tracee.Stub, fd int, spent []image.EpollEntry, number map[image.Ref]int) error {
	info, err := tracee.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", by.Pid, fd))
	if err != nil {
		return err
	}
	type name struct {
		fd   int32
		data uint64
	}
	armed := map[name]bool{}
	for _, e := range interestIn(info) {
		armed[name{e.FD, e.Data}] = !fired(&e.EpollEntry)
	}
	var b tracee.Batch
	for i := range spent {
		e := &spent[i]
		if !armed[name{e.FD, e.Data}] {
			continue
		}
		epollCtl(&b, fd, unix.EPOLL_CTL_MOD, e, e.Events, number)
		if f := m.head.File(e.File); f.Kind == image.KindPidfd || f.Kind == image.KindSocket && !f.Socket.Listening {
			m.Warn("a one-shot epoll entry that has fired tells of a hang-up once more", "fd", e.FD, "kind", f.Kind)
		}
	}
	_, err = by.Run(&b)
	return err
}

// epolls lists the epolls of an image that watch files which come late, or the
// others.
func (m *Maker) epolls(watchLate bool) (refs []image.Ref) {
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		if f != nil && f.Epoll != nil && watchLate == slices.ContainsFunc(f.Epoll.Entries, func(e image.EpollEntry) bool { return m.isLate(m.head.File(e.File)) }) {
			refs = append(refs, ref)
		}
	}
	return refs
}

// registerAll fills the epolls that watch nothing but what the init stub has.
func (m *Maker) registerAll() error {
	for _, ref := range m.epolls(false) {
		if err := m.register(m.stub, ref, m.fds); err != nil {
			return fail.On("epoll", err)
		}
	}
	return nil
}

// RegisterLate fills the epolls that watch what has come late, when every table
// has it. A child of the init stub does that, which has a table for it.
func (m *Maker) RegisterLate() error {
	refs := m.epolls(true)
	if len(refs) == 0 {
		return nil
	}
	by, _, err := m.ghost(0)
	if err != nil {
		return err
	}
	err = m.registerIn(by, refs)
	return errors.Join(err, by.Exit(0))
}

func (m *Maker) registerIn(by *tracee.Stub, refs []image.Ref) error {
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE_RANGE, tracee.W(0), tracee.W(m.base-1), tracee.W(0))
	if _, err := by.Run(&b); err != nil {
		return err
	}
	number := maps.Clone(m.fds)
	for _, ref := range refs {
		for _, e := range m.head.File(ref).Epoll.Entries {
			if _, ok := number[e.File]; ok {
				continue
			}
			f := m.late[e.File]
			if f == nil {
				return fail.On("epoll", fmt.Errorf("fd %d, which it watches, is open in no process", e.FD))
			}
			var err error
			if number[e.File], err = m.Keep(by, f); err != nil {
				return err
			}
		}
		if err := m.register(by, ref, number); err != nil {
			return fail.On("epoll", err)
		}
	}
	return nil
}

// interest reads an epoll's entries and finds their files.
func (s *Set) interest(d *Description) error {
	rec := d.Record.Epoll
	repeats := map[int32]uint32{}
	for _, one := range interestIn(d.seen.info) {
		e := one.EpollEntry
		target, err := s.target(d.seen, &one, repeats[e.FD])
		if err != nil {
			return err
		}
		if target.Record.Thread != 0 {
			return fail.Refuse("", fmt.Sprintf("it watches fd %d, which is about thread %d of task %d; that is not supported", e.FD, target.Record.Thread, target.Record.Pid), "take it out of the epoll before the checkpoint")
		}
		if err := unwatched(target); err != nil {
			return err
		}
		repeats[e.FD]++
		rec.Entries = append(rec.Entries, e)
		d.targets = append(d.targets, target)
	}
	d.Complete = func() {
		for i, t := range d.targets {
			rec.Entries[i].File = t.Ref
		}
	}
	return nil
}

// watchedFile is an entry as fdinfo shows it, with the number of the inode behind it
// and the kernel's own of its file system.
type watchedFile struct {
	image.EpollEntry
	ino, dev uint64
}

// interestIn reads the entries of an epoll from its fdinfo (ep_show_fdinfo in
// fs/eventpoll.c): "tfd: 5 events: 19 data: 5 pos:0 ino:61af sdev:8".
func interestIn(info []byte) (all []watchedFile) {
	for line := range bytes.Lines(info) {
		if !bytes.HasPrefix(line, []byte("tfd:")) {
			continue
		}
		var w watchedFile
		words := strings.Fields(strings.ReplaceAll(string(line), ":", " "))
		for i := 0; i+1 < len(words); i += 2 {
			base := 16
			if words[i] == "tfd" {
				base = 10
			}
			v, _ := strconv.ParseUint(words[i+1], base, 64)
			switch words[i] {
			case "tfd":
				w.FD = int32(v)
			case "events":
				w.Events = uint32(v)
			case "data":
				w.Data = v
			case "ino":
				w.ino = v
			case "sdev":
				w.dev = v
			}
		}
		all = append(all, w)
	}
	return all
}

// is reports that a descriptor is the file of an entry for sure: a socket has an inode
// of its own, and nobody can open it once more.
func (w *watchedFile) is(one *seen) bool {
	const minorBits = 20 // MKDEV in include/linux/kdev_t.h
	dev := uint64(unix.Major(one.stat.Dev))<<minorBits | uint64(unix.Minor(one.stat.Dev))
	return one.format() == unix.S_IFSOCK && w.ino == one.stat.Ino && w.dev == dev
}

// epollSlot is struct kcmp_epoll_slot: the nth entry of number tfd.
type epollSlot struct{ efd, tfd, toff uint32 }

// target finds the file behind an entry: most often the one that still has the
// number, else one of all the container's. The kernel is asked where it must be: it
// goes through all entries of an epoll to find the one.
func (s *Set) target(ep *seen, w *watchedFile, nth uint32) (*Description, error) {
	tfd := w.FD
	slot := epollSlot{uint32(ep.fd), uint32(tfd), nth}
	is := func(one *seen) bool {
		if w.is(one) {
			return true
		}
		c, err := kcmp(one.proc.Pid, ep.proc.Pid, kcmpEpollTFD, uintptr(one.fd), uintptr(unsafe.Pointer(&slot)))
		return err == nil && c == 0
	}
	for _, t := range s.tables {
		if t.proc.Pid != ep.proc.Pid {
			continue
		}
		if e := t.entry(int(tfd)); e != nil && is(e.seen) {
			return e.desc, nil
		}
	}
	for _, d := range s.descs {
		if is(d.seen) {
			return d, nil
		}
	}
	return nil, fail.Refuse("", fmt.Sprintf("it watches fd %d, a file that no task of the container holds any more", tfd), "")
}
