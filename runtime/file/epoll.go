package file

import (
	"bytes"
	"encoding/binary"
	"fmt"
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
		d.Record.Kind = image.KindEpoll
		return nil // the entries when every file is known: interest
	},
	open: func(_ *Maker, b *tracee.Batch, _ *image.File) (int, error) {
		return b.Add(unix.SYS_EPOLL_CREATE1, tracee.W(unix.EPOLL_CLOEXEC)), nil
	},
	finish: func(m *Maker, b *tracee.Batch, fd int, f *image.File) {
		for _, e := range f.Epoll.Entries {
			event := binary.LittleEndian.AppendUint32(nil, e.Events)
			event = binary.LittleEndian.AppendUint64(event, e.Data)
			// Numbers below the table are free in the maker: the file is there
			// under its registered number for as long as it takes.
			b.Add(unix.SYS_DUP3, tracee.W(m.fds[e.File]), tracee.W(e.FD), tracee.W(unix.O_CLOEXEC))
			b.Add(unix.SYS_EPOLL_CTL, tracee.W(fd), tracee.W(unix.EPOLL_CTL_ADD), tracee.W(e.FD), b.Put(event))
			b.Add(unix.SYS_CLOSE, tracee.W(e.FD))
		}
	},
}

// interest reads an epoll's entries and finds their files.
func (s *Set) interest(d *Description) error {
	rec := &image.Epoll{}
	d.Record.Epoll = rec
	repeats := map[int32]uint32{}
	for line := range bytes.Lines(d.seen.info) {
		var e image.EpollEntry
		var events, data uint64
		if n, _ := fmt.Sscanf(string(line), "tfd: %d events: %x data: %x", &e.FD, &events, &data); n != 3 {
			continue
		}
		e.Events, e.Data = uint32(events), data
		target, err := s.target(d.seen, e.FD, repeats[e.FD])
		if err != nil {
			return err
		}
		if target.Record.Pid != 0 {
			return fail.Refuse("", fmt.Sprintf("it watches fd %d, a file of one task in /proc; that is not supported yet", e.FD), "take it out of the epoll before the checkpoint")
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

// epollSlot is struct kcmp_epoll_slot: the nth entry of number tfd.
type epollSlot struct{ efd, tfd, toff uint32 }

// target finds the file behind an entry: most often the one that still has the
// number, else one of all the container's.
func (s *Set) target(ep *seen, tfd int32, nth uint32) (*Description, error) {
	slot := epollSlot{uint32(ep.fd), uint32(tfd), nth}
	is := func(one *seen) bool {
		c, err := kcmp(one.proc.Pid, ep.proc.Pid, kcmpEpollTFD, uintptr(one.fd), uintptr(unsafe.Pointer(&slot)))
		return err == nil && c == 0
	}
	for _, t := range s.tables {
		if t.proc.Pid != ep.proc.Pid {
			continue
		}
		for _, e := range t.entries {
			if e.seen.fd == int(tfd) && is(e.seen) {
				return e.desc, nil
			}
		}
	}
	for _, d := range s.descs {
		if is(d.seen) {
			return d, nil
		}
	}
	return nil, fail.Refuse("", fmt.Sprintf("it watches fd %d, a file that no task of the container holds any more", tfd), "")
}
