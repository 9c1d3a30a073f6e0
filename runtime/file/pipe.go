package file

import (
	"errors"
	"fmt"
	"io"
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
func (s *Set) end(d *Description, path string) error {
	p := s.pipes[d.seen.stat.Ino]
	if p == nil {
		p = &pipe{record: &image.Pipe{Path: path}}
		p.Object = object.Object{Type: image.TypePipe, Record: p.record}
		s.pipes[d.seen.stat.Ino] = p
		s.order = append(s.order, p)
	}
	p.ends = append(p.ends, d)
	d.pipe = p
	d.Complete = func() { d.Record.Pipe = p.Ref }
	f, err := d.seen.own()
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

// checkPipes refuses pipes that cannot be made again: those whose other end is
// held by somebody outside the container, and packets.
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
		if p.record.Packet && p.record.Length > 0 {
			err = fail.Refuse("", "a pipe with packets in it (O_DIRECT) is not supported yet", "let the reader drain it")
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
	f, err := p.ends[0].seen.own()
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
		data, err := p.peek()
		if err == nil {
			err = w.Bytes(p.Ref, 0, data)
		}
		if err != nil {
			return fail.In(p.ends[0].seen.proc.Name, fail.On(p.ends[0].seen.object(), err))
		}
	}
	return nil
}

func (p *pipe) peek() ([]byte, error) {
	source, err := p.openReader()
	if err != nil {
		return nil, err
	}
	defer source.Close()
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, fmt.Errorf("pipe2: %w", err)
	}
	out, in := os.NewFile(uintptr(ends[0]), "scratch pipe"), os.NewFile(uintptr(ends[1]), "scratch pipe")
	defer out.Close()
	if _, err := unix.FcntlInt(in.Fd(), unix.F_SETPIPE_SZ, int(p.record.Capacity)); err != nil {
		return nil, errors.Join(fmt.Errorf("scratch pipe of %d bytes: %w", p.record.Capacity, err), in.Close())
	}
	n, err := unix.Tee(int(source.Fd()), int(in.Fd()), int(p.record.Length), unix.SPLICE_F_NONBLOCK)
	err = errors.Join(err, in.Close())
	if err != nil || n != int64(p.record.Length) {
		return nil, fmt.Errorf("tee gave %d of %d bytes: %w", n, p.record.Length, err)
	}
	return io.ReadAll(out)
}

// openReader opens the reading side; where nobody inside holds one, through
// the link of a writer.
func (p *pipe) openReader() (*os.File, error) {
	for _, d := range p.ends {
		if reads(d.seen.flags) {
			return d.seen.own()
		}
	}
	return os.OpenFile(p.ends[0].seen.path(), os.O_RDONLY|unix.O_NONBLOCK, 0)
}

// pipeKind is one end of a pipe(2).
var pipeKind = kind{
	name: image.KindPipe,
	is: func(_ *Set, one *seen) bool {
		return one.format() == unix.S_IFIFO && strings.HasPrefix(one.link, "pipe:")
	},
	read: func(s *Set, d *Description) error {
		d.Record.Kind = image.KindPipe
		return s.end(d, "")
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
		d.Record.Kind, d.Record.Path = image.KindFifo, d.seen.link
		if s.external(d.seen) {
			return fail.Refuse("", "the fifo lies outside the container", "close it before the checkpoint, or leave it out (--external)")
		}
		if err := s.resolves(d.seen.link, &d.seen.stat); err != nil {
			return err
		}
		return s.end(d, d.seen.link)
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		if _, ok := m.pipes[f.Pipe]; !ok {
			return 0, fmt.Errorf("fifo %s without its buffer", f.Path)
		}
		// Both ends are held open by the maker, so that this does not wait.
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
