package file

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// inContainersNetwork refuses a socket of another network namespace than the
// container's (SIOCGSKNS, socket(7)): it would be made again in that one.
func (s *Set) inContainersNetwork(fd int) error {
	if s.NetNS == 0 {
		return nil
	}
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return fmt.Errorf("its network namespace: %w", err)
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if err := unix.Fstat(ns, &st); err != nil {
		return fmt.Errorf("its network namespace: %w", err)
	}
	if st.Ino != s.NetNS {
		return fail.Refuse("", "it belongs to another network namespace than the container's; such sockets are not supported yet", "close it before the checkpoint, or leave it out (--external)")
	}
	return nil
}

// socket leaves everything but the descriptor to the room of sockets.
var socket = kind{
	name: image.KindSocket,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFSOCK },
	read: func(s *Set, d *Description) error {
		f, err := d.seen.hold()
		if err != nil {
			return err
		}
		defer f.Close()
		in, fd := s.insideOf(d.seen.proc.Pid), int(f.Fd())
		if !in.Like(d.seen.stat.Ino) {
			if err := s.inContainersNetwork(fd); err != nil {
				return err
			}
		}
		d.Record.Kind, s.socketIn = image.KindSocket, nil
		if d.Record.Socket, err = sock.Read(in, fd, d.seen.stat.Ino); err != nil {
			return err
		}
		if s.socketIn != nil {
			s.inside(d, s.socketIn)
		}
		return s.note(d, in)
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) { return sock.Open(b, f.Socket) },
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
		if f.Socket.TCP != nil {
			return // see connect
		}
		sock.Finish(b, fd, f.Socket)
		setFlags(b, fd, f.Flags)
	},
}
