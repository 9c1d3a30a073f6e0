package mm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A context of asynchronous I/O (io_setup(2)) belongs to an address space. Its id
// is the address of a ring that the kernel shares with the program: a header and
// the events of requests that are complete. The rest is the kernel's, which BPF
// reads: above all whether requests are under way, which nobody can make again.

// aioRing is the name of such a ring in /proc/PID/maps.
const aioRing = "/[aio]"

// ring is the head of struct aio_ring (fs/aio.c).
type ring struct {
	ID, Places, Head, Tail             uint32
	Magic, Compat, Incompat, HeaderLen uint32
}

const ringMagic = 0xa10a10a1

// HasRings reports contexts of asynchronous I/O, or what is left of them.
func (s *Space) HasRings() bool { return len(s.rings) > 0 }

// AskRings returns what asks which rings belong to a context of the process: by
// io_getevents(2) for none. A child has its parent's rings, but no contexts.
func (s *Space) AskRings(b *tracee.Batch) func() {
	var calls []int
	for _, i := range s.rings {
		calls = append(calls, b.Try(unix.SYS_IO_GETEVENTS, tracee.W(s.Record.Areas[i].Start)))
	}
	return func() {
		for n, i := range s.rings {
			s.Record.Areas[i].AIO = &image.AIO{}
			if b.Err(calls[n]) == nil {
				s.Record.Areas[i].AIO.Requests = 1 // or whatever the kernel says, in Rings
			}
		}
	}
}

// ringPatience is how long requests that end by themselves, as all input and
// output with a disk, may take to do so while the container is stopped.
const ringPatience = time.Second

// Rings reads what AskRings has found. contexts tells what the kernel knows of
// the process's contexts by now.
func (s *Space) Rings(contexts func() (map[uint64]bpf.AIOContext, error)) error {
	for _, i := range s.rings {
		a := &s.Record.Areas[i]
		if err := s.ring(a, contexts); err != nil {
			return fail.On(fmt.Sprintf("asynchronous I/O (io_setup) at %#x", a.Start), err)
		}
	}
	return nil
}

func (s *Space) ring(a *image.Area, contexts func() (map[uint64]bpf.AIOContext, error)) error {
	if a.AIO.Requests != 0 {
		known, err := idle(a.Start, contexts)
		if err != nil {
			return err
		}
		a.AIO.Requests = known.Requests
	}
	b := make([]byte, a.Size())
	if err := tracee.ReadMemory(s.Pid, a.Start, b); err != nil {
		return err
	}
	var r ring
	_, _ = binary.Decode(b, binary.LittleEndian, &r)
	places := image.AIOPlaces(a.Size())
	if a.Offset != 0 || r.Magic != ringMagic || uint64(r.Places) != places {
		return fail.Refuse("", "a part of its ring is unmapped, protected or overwritten", "io_destroy the context before the checkpoint")
	}
	a.AIO.Head, a.AIO.Tail = r.Head%r.Places, r.Tail%r.Places // as the kernel takes them
	for at := a.AIO.Head; at != a.AIO.Tail; at = (at + 1) % r.Places {
		a.AIO.Events = append(a.AIO.Events, b[image.AIOHeader+image.AIOEvent*at:][:image.AIOEvent]...)
	}
	return nil
}

// idle waits until no request of a context is under way. Those that are wait for
// nobody in the container as a rule, but for a disk.
func idle(id uint64, contexts func() (map[uint64]bpf.AIOContext, error)) (bpf.AIOContext, error) {
	for deadline, nap := time.Now().Add(ringPatience), 100*time.Microsecond; ; nap = min(2*nap, 10*time.Millisecond) {
		all, err := contexts()
		if err != nil {
			return bpf.AIOContext{}, RefuseRings(err)
		}
		c, ok := all[id]
		switch {
		case !ok:
			return c, fail.Refuse("", "its process has more contexts than can be read", "io_destroy some before the checkpoint")
		case c.Busy == 0:
			return c, nil
		case c.Waits:
			return c, fail.Refuse("", fmt.Sprintf("%d requests are under way and wait for an event (IOCB_CMD_POLL): nobody can make them again", c.Busy), "io_cancel them before the checkpoint")
		case time.Now().After(deadline):
			return c, fail.Refuse("", fmt.Sprintf("%d requests are still under way after %v", c.Busy, ringPatience), "try again")
		}
		time.Sleep(nap)
	}
}

// RefuseRings is the refusal of contexts of which the kernel tells nothing.
func RefuseRings(err error) error {
	return fail.Refuse("asynchronous I/O (io_setup)", fmt.Sprintf("whether requests are under way cannot be told: %v", err), "io_destroy the context before the checkpoint")
}

// keepRoom keeps the place of a ring until RestoreRings, when none who is cloned
// can get it by that.
func keepRoom(b *tracee.Batch, a *image.Area) {
	b.Add(unix.SYS_MMAP, tracee.W(a.Start), tracee.W(a.Size()), tracee.W(unix.PROT_NONE),
		tracee.W(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED_NOREPLACE), tracee.W(^uint64(0)), tracee.W(0))
}

// RestoreRings makes the contexts of an address space again.
func RestoreRings(s *tracee.Stub, m *image.MM) error {
	for i := range m.Areas {
		a := &m.Areas[i]
		if a.Kind != image.AreaAIO {
			continue
		}
		if err := restoreRing(s, a); err != nil {
			return fail.On(fmt.Sprintf("asynchronous I/O (io_setup) at %#x", a.Start), err)
		}
	}
	return nil
}

func restoreRing(s *tracee.Stub, a *image.Area) error {
	if err := remakeRing(s, a); err != nil || a.Prot == ringProt {
		return err
	}
	var b tracee.Batch
	b.Add(unix.SYS_MPROTECT, tracee.W(a.Start), tracee.W(a.Size()), tracee.W(a.Prot))
	_, err := s.Run(&b)
	return err
}

// ringProt is how the kernel maps a ring.
const ringProt = unix.PROT_READ | unix.PROT_WRITE

func remakeRing(s *tracee.Stub, a *image.Area) (err error) {
	places := uint32(image.AIOPlaces(a.Size()))
	if a.AIO.Requests == 0 {
		var b tracee.Batch
		b.Add(unix.SYS_MMAP, tracee.W(a.Start), tracee.W(a.Size()), tracee.W(ringProt),
			tracee.W(unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED), tracee.W(^uint64(0)), tracee.W(0))
		_, err = s.Run(&b)
	} else {
		err = turn(s, a, places)
	}
	if err != nil {
		return err
	}
	var now ring
	head := make([]byte, image.AIOHeader)
	if err := s.Read(a.Start, head); err != nil {
		return err
	}
	_, _ = binary.Decode(head, binary.LittleEndian, &now)
	if a.AIO.Requests == 0 {
		now = ring{ID: ^uint32(0), Places: places, Head: a.AIO.Head, Tail: a.AIO.Tail, Magic: ringMagic, Compat: 1, HeaderLen: image.AIOHeader}
		_, _ = binary.Encode(head, binary.LittleEndian, &now)
		if err := s.Write(a.Start, head); err != nil {
			return err
		}
	}
	if now.Head != a.AIO.Head || now.Tail != a.AIO.Tail {
		return fmt.Errorf("its ring stands at %d and %d instead of %d and %d", now.Head, now.Tail, a.AIO.Head, a.AIO.Tail)
	}
	events := a.AIO.Events
	for at := a.AIO.Head; len(events) > 0; at = 0 {
		n := min(len(events), int(places-at)*image.AIOEvent)
		if err := s.Write(a.Start+image.AIOHeader+uint64(at)*image.AIOEvent, events[:n]); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

// setup makes a context whose ring has so many places, and returns its id. For few
// requests the kernel takes as many as it thinks good for the processors that the
// machine has (ioctx_alloc in fs/aio.c), so that on another more have to be asked for.
func setup(s *tracee.Stub, requests, places uint32) (uint64, error) {
	for _, n := range []uint32{requests, (places - 2) / 2} {
		var b tracee.Batch
		id := b.Reserve(8)
		b.Add(unix.SYS_IO_SETUP, tracee.W(n), id)
		if _, err := s.Run(&b); errors.Is(err, unix.EAGAIN) {
			return 0, fail.Refuse("", "the host's limit of requests is reached", "raise fs.aio-max-nr")
		} else if err != nil {
			return 0, err
		}
		at := binary.LittleEndian.Uint64(b.At(id, 8))
		var head [image.AIOHeader]byte
		if err := s.Read(at, head[:]); err != nil {
			return 0, err
		}
		if binary.LittleEndian.Uint32(head[4:]) == places {
			return at, nil
		}
		b.Reset()
		b.Add(unix.SYS_IO_DESTROY, tracee.W(at))
		if _, err := s.Run(&b); err != nil {
			return 0, err
		}
	}
	return 0, fail.Refuse("", fmt.Sprintf("no context here has a ring of %d places: it depends on the number of processors", places), "restore on a machine with as many processors")
}

// turn makes a context and brings its ring to where it stood, and to its place. Where the next event
// goes to is the kernel's to say, so as many requests as it takes are made, each
// of which reads nothing. The last are left in the ring, for the events that
// nobody has read to replace.
func turn(s *tracee.Stub, a *image.Area, places uint32) error {
	id, err := setup(s, a.AIO.Requests, places)
	if err != nil {
		return err
	}
	const (
		atOnce   = 512
		maskSize = 1 << 10
	)
	var b tracee.Batch
	empty, mask := b.String(""), b.Reserve(maskSize)
	b.Add(unix.SYS_MEMFD_CREATE, empty, tracee.W(unix.MFD_CLOEXEC))
	b.Add(unix.SYS_SCHED_GETAFFINITY, tracee.W(0), tracee.W(maskSize), mask)
	if _, err := s.Run(&b); err != nil {
		return err
	}
	fd, cpus := b.Calls[0].Ret, b.At(mask, maskSize)
	iocb := make([]byte, 64) // IOCB_CMD_PREAD, which is 0, of no bytes
	binary.LittleEndian.PutUint32(iocb[20:], uint32(fd))
	b = tracee.Batch{}
	own, one, request := b.Put(cpus), b.Put(firstOf(cpus)), b.Put(iocb)
	list, events := b.Reserve(8*atOnce), b.Reserve(image.AIOEvent*atOnce)
	for i := range atOnce {
		b.Fix(list.Plus(8*i), request)
	}
	// Each processor puts some free places aside for itself.
	b.Add(unix.SYS_SCHED_SETAFFINITY, tracee.W(0), tracee.W(maskSize), one)
	expected := map[int]uint32{}
	submit := func(n uint32, read bool) {
		for n > 0 {
			some := min(n, atOnce, places/4)
			expected[b.Add(unix.SYS_IO_SUBMIT, tracee.W(id), tracee.W(some), list)] = some
			if read {
				expected[b.Add(unix.SYS_IO_GETEVENTS, tracee.W(id), tracee.W(some), tracee.W(some), events)] = some
			}
			n -= some
		}
	}
	submit(a.AIO.Head, true)
	submit(uint32(len(a.AIO.Events)/image.AIOEvent), false)
	b.Add(unix.SYS_SCHED_SETAFFINITY, tracee.W(0), tracee.W(maskSize), own)
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	b.Add(unix.SYS_MREMAP, tracee.W(id), tracee.W(a.Size()), tracee.W(a.Size()), tracee.W(unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED), tracee.W(a.Start))
	if _, err := s.Run(&b); err != nil {
		return err
	}
	for i, n := range expected {
		if b.Calls[i].Ret != int64(n) {
			return fmt.Errorf("%d of %d requests could be made", b.Calls[i].Ret, n)
		}
	}
	return nil
}

// firstOf is the mask of the first processor of a mask.
func firstOf(cpus []byte) []byte {
	one := make([]byte, len(cpus))
	for i, b := range cpus {
		if b != 0 {
			one[i] = 1 << bits.TrailingZeros8(b)
			break
		}
	}
	return one
}
