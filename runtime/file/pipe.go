package file

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// pipe is the buffer behind the ends of a pipe or fifo.
type pipe struct {
	object.Object
	record *image.Pipe
	ends   []*Description
}

// end is one descriptor of a pipe or fifo: it joins the buffer it belongs to.
func (s *Set) end(d *Description, path string, gone *removed) error {
	key := fileID{d.seen.stat.Dev, d.seen.stat.Ino}
	p := s.pipes[key]
	if p == nil {
		p = &pipe{record: &image.Pipe{Path: path}}
		p.Object = object.Object{Type: image.TypePipe, Record: p.record}
		if gone != nil {
			p.Complete = func() { p.record.Removed = gone.Ref }
		}
		s.pipes[key] = p
		s.order = append(s.order, p)
	}
	p.ends = append(p.ends, d)
	d.pipe = p
	d.Complete = func() {
		d.Record.Pipe = p.Ref
		if gone != nil {
			d.Record.Removed = gone.Ref
		}
	}
	f, err := d.seen.hold()
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := unix.FcntlInt(f.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		return fmt.Errorf("F_GETPIPE_SZ: %w", err)
	}
	length, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
	if err != nil {
		return fmt.Errorf("FIONREAD: %w", err)
	}
	p.record.Capacity, p.record.Length = uint32(size), uint32(length)
	p.record.Packet = p.record.Packet || d.seen.flags&unix.O_DIRECT != 0
	return nil
}

func reads(flags uint32) bool  { return flags&unix.O_ACCMODE != unix.O_WRONLY }
func writes(flags uint32) bool { return flags&unix.O_ACCMODE != unix.O_RDONLY }

// checkPipes refuses pipes that cannot be made again, those whose other end is
// held by somebody outside the container, and looks for packets in the others.
func (s *Set) checkPipes() error {
	pipes := s.order
	s.order = nil
	for _, p := range pipes {
		one := p.ends[0].seen
		err := p.outside()
		if refused := (*fail.Refused)(nil); errors.As(err, &refused) && s.fromGuest(one) {
			for _, d := range p.ends {
				s.toNull(d)
			}
			continue
		}
		s.order = append(s.order, p)
		if err == nil && p.record.Length > 0 && !s.Running {
			err = p.findPackets()
		}
		if err != nil {
			return fail.In(one.proc.Name, fail.On(one.object(), err))
		}
	}
	return nil
}

// outside asks poll(2), which knows whether the other side of a pipe has
// anybody left: if it has, and nobody inside, then it is somebody outside.
func (p *pipe) outside() error {
	var reader, writer *Description
	for _, d := range p.ends {
		if reads(d.seen.flags) {
			reader = d
		}
		if writes(d.seen.flags) {
			writer = d
		}
	}
	if reader != nil && writer != nil || p.record.Path != "" {
		return nil
	}
	f, err := p.ends[0].seen.hold()
	if err != nil {
		return err
	}
	defer f.Close()
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN | unix.POLLOUT}}
	if _, err := unix.Poll(fds, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	if fds[0].Revents&(unix.POLLHUP|unix.POLLERR) == 0 {
		return fail.Refuse("", "the other end of this pipe is held outside the container", "close it before the checkpoint, or leave it out (--external)")
	}
	return nil
}

// Contents saves what lies in the pipes and in files without a name. tee(2) copies a pipe's buffers into
// another pipe and leaves them where they are.
func (s *Set) Contents(w *image.Writer, progress func(int) error) error {
	if err := s.saveRemoved(w, progress); err != nil {
		return err
	}
	if err := s.saveQueues(w); err != nil {
		return err
	}
	if err := s.saveConnections(w, progress); err != nil {
		return err
	}
	if err := s.saveUnread(w, progress); err != nil {
		return err
	}
	for _, p := range s.terminals {
		if len(p.content) > 0 {
			if err := w.Bytes(p.Ref, 0, p.content); err != nil {
				return err
			}
		}
	}
	for _, p := range s.order {
		if p.record.Length == 0 {
			continue
		}
		data, err := p.content()
		if err == nil {
			err = w.Bytes(p.Ref, 0, data)
		}
		if err != nil {
			return fail.In(p.ends[0].seen.proc.Name, fail.On(p.ends[0].seen.object(), err))
		}
	}
	return nil
}

// peek copies the buffers of the pipe into another one, which it returns the
// reading end of (tee(2)).
func (p *pipe) peek() (held, error) {
	source, err := p.openReader()
	if err != nil {
		return -1, err
	}
	defer source.Close()
	out, in, err := scratchPipe(p.record.Capacity)
	if err != nil {
		return -1, err
	}
	n, err := unix.Tee(int(source.Fd()), int(in.Fd()), int(p.record.Length), unix.SPLICE_F_NONBLOCK)
	if err = errors.Join(err, in.Close()); err == nil && n != int64(p.record.Length) {
		err = fmt.Errorf("tee gave %d of %d bytes", n, p.record.Length)
	}
	if err != nil {
		return -1, errors.Join(err, out.Close())
	}
	return out, nil
}

// scratchPipe makes a pipe of our own. Where pipes as large as that are not
// allowed any more it is as large as may be, which is enough unless the other is
// full.
func scratchPipe(capacity uint32) (out, in held, err error) {
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return -1, -1, fmt.Errorf("pipe2: %w", err)
	}
	out, in = held(ends[0]), held(ends[1])
	_, err = unix.FcntlInt(in.Fd(), unix.F_SETPIPE_SZ, int(capacity))
	if errors.Is(err, unix.EPERM) {
		_, err = unix.FcntlInt(in.Fd(), unix.F_SETPIPE_SZ, mostPipe())
	}
	if err != nil {
		return -1, -1, errors.Join(fmt.Errorf("scratch pipe of %d bytes: %w", capacity, err), out.Close(), in.Close())
	}
	return out, in, nil
}

// mostPipe is how large pipes may be for those without CAP_SYS_RESOURCE (pipe(7)).
func mostPipe() int {
	size := 64 << 10 // as they come
	if b, err := os.ReadFile("/proc/sys/fs/pipe-max-size"); err == nil {
		_, _ = fmt.Sscan(string(b), &size)
	}
	return size
}

// content is what lies in the pipe, packets and all.
func (p *pipe) content() ([]byte, error) {
	out, err := p.peek()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	data := make([]byte, 0, p.record.Length)
	for len(data) < cap(data) { // a read ends with a packet
		n, err := unix.Read(int(out.Fd()), data[len(data):cap(data)])
		if err != nil || n == 0 {
			return nil, fmt.Errorf("read the copy of a pipe: %d of %d bytes, %w", len(data), cap(data), err)
		}
		data = data[:len(data)+n]
	}
	return data, nil
}

// findPackets finds which of the bytes in the pipe are packets, as written with
// O_DIRECT (pipe(2)): each is a buffer of its own that a read takes alone.
func (p *pipe) findPackets() error {
	copied, err := p.peek()
	if err != nil {
		return err
	}
	defer copied.Close()
	var runs []image.PipeRun
	packets := false
	for left := int(p.record.Length); left > 0; {
		n, packet, err := firstBuffer(copied)
		if err != nil {
			return err
		}
		left, packets = left-n, packets || packet
		if last := len(runs) - 1; !packet && last >= 0 && !runs[last].Packet {
			runs[last].Length += uint32(n)
		} else {
			runs = append(runs, image.PipeRun{Length: uint32(n), Packet: packet})
		}
	}
	if packets {
		p.record.Runs = runs
	}
	return nil
}

// firstBuffer takes the first buffer out of a pipe and tells how long it is and
// whether it is a packet. The buffer twice in another pipe is read as one piece
// unless it is one.
func firstBuffer(from held) (n int, packet bool, err error) {
	const one, two = unix.PathMax, 2 * unix.PathMax // pages
	single, in, err := scratchPipe(one)
	if err != nil {
		return 0, false, err
	}
	defer single.Close()
	defer in.Close()
	double, in2, err := scratchPipe(two)
	if err != nil {
		return 0, false, err
	}
	defer double.Close()
	defer in2.Close()
	const most = 1 << 30
	length, err := unix.Tee(int(from.Fd()), int(in.Fd()), most, unix.SPLICE_F_NONBLOCK)
	for range 2 {
		if err == nil {
			_, err = unix.Tee(int(from.Fd()), int(in2.Fd()), int(length), unix.SPLICE_F_NONBLOCK)
		}
	}
	if err != nil {
		return 0, false, fmt.Errorf("tee: %w", err)
	}
	buf := make([]byte, 2*length)
	got, err := unix.Read(int(double.Fd()), buf)
	if err != nil {
		return 0, false, fmt.Errorf("read the copy of a pipe: %w", err)
	}
	_, err = unix.Read(int(from.Fd()), buf[:length])
	return int(length), got == int(length), err
}

// openReader opens the reading side; where nobody inside holds one, through
// the link of a writer.
func (p *pipe) openReader() (held, error) {
	for _, d := range p.ends {
		if reads(d.seen.flags) {
			return d.seen.hold()
		}
	}
	fd, err := unix.Open(p.ends[0].seen.path(), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	return held(fd), err
}

// pipeKind is one end of a pipe(2).
var pipeKind = kind{
	name: image.KindPipe,
	is: func(_ *Set, one *seen) bool {
		return one.format() == unix.S_IFIFO && strings.HasPrefix(one.link, "pipe:")
	},
	read: func(s *Set, d *Description) error {
		d.Record.Kind = image.KindPipe
		return s.end(d, "", nil)
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return m.openEnd(b, f)
	},
	finish: finishEnd,
}

// fifo is one opened end of a named pipe.
var fifo = kind{
	name: image.KindFifo,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFIFO },
	read: func(s *Set, d *Description) error {
		d.Record.Kind = image.KindFifo
		if s.external(d.seen) {
			return fail.Refuse("", "the fifo lies outside the container, or on a mount that it has unmounted", "close it before the checkpoint, or leave it out (--external)")
		}
		at, err := s.locate(s.own(), d.seen.link, &d.seen.stat, d.seen.path())
		if err == nil && at.mnt != 0 {
			err = fail.Refuse("", "the container has mounted something over the fifo; that is not supported", "close it before the checkpoint")
		}
		if err != nil {
			return err
		}
		d.Record.Path = at.path
		d.take(at.gone)
		return s.end(d, at.path, at.gone)
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		if _, ok := m.pipes[f.Pipe]; !ok {
			return 0, fmt.Errorf("fifo %s without its buffer", f.Path)
		}
		// Both ends are held open by the maker, so that this does not wait.
		if f.Removed != 0 {
			return m.reopen(b, m.anchors[f.Removed], f.Flags|unix.O_NONBLOCK), nil
		}
		return openPath(b, f.Path, f.Flags|unix.O_NONBLOCK), nil
	},
	finish: finishEnd,
}

func finishEnd(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) }

// openEnd adds the calls for a description of a pipe. pipe2 makes one of each
// direction; more of them were opened through /proc.
func (m *Maker) openEnd(b *tracee.Batch, f *image.File) (int, error) {
	ends, ok := m.pipes[f.Pipe]
	if !ok {
		return 0, errors.New("pipe end without its buffer")
	}
	side := 0
	if writes(f.Flags) {
		side = 1
	}
	if f.Flags&unix.O_ACCMODE != unix.O_RDWR && !ends.taken[side] {
		ends.taken[side] = true
		return b.Add(unix.SYS_FCNTL, tracee.W(ends.fd[side]), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0)), nil
	}
	return m.reopen(b, ends.fd[side], f.Flags|unix.O_NONBLOCK), nil
}

// fillPipe puts bytes back into a pipe, packets as packets.
func (m *Maker) fillPipe(ref image.Ref, data []byte) error {
	p := m.pipes[ref]
	p.content = append(p.content, data...)
	rec := m.head.Pipe(ref)
	if len(p.content) < int(rec.Length) {
		return nil
	}
	f, err := m.stub.Take(p.fd[1])
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("F_GETFL: %w", err)
	}
	runs := rec.Runs
	if len(runs) == 0 {
		runs = []image.PipeRun{{Length: rec.Length}}
	}
	for _, run := range runs {
		if err := fillRun(f, flags&^unix.O_DIRECT|unix.O_NONBLOCK, run, p.content[:run.Length]); err != nil {
			return fmt.Errorf("fill a pipe: %w", err)
		}
		p.content = p.content[run.Length:]
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETFL, flags)
	return err
}

func fillRun(f *os.File, flags int, run image.PipeRun, data []byte) error {
	if run.Packet {
		flags |= unix.O_DIRECT
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, flags); err != nil {
		return err
	}
	for len(data) > 0 {
		n, err := unix.Write(int(f.Fd()), data)
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
