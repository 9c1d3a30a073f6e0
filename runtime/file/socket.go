package file

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// socket leaves everything but the descriptor to the room of sockets.
var socket = kind{
	name: image.KindSocket,
	is:   func(_ *Set, one *seen) bool { return one.format() == unix.S_IFSOCK },
	read: func(s *Set, d *Description) error {
		f, err := d.seen.own()
		if err != nil {
			return err
		}
		defer f.Close()
		in := &sock.Inside{NetNS: fmt.Sprintf("/proc/%d/ns/net", d.seen.proc.Pid), Lstat: s.lstat}
		d.Record.Kind = image.KindSocket
		d.Record.Socket, err = sock.Read(in, f, d.seen.stat.Ino)
		return err
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) { return sock.Open(b, f.Socket) },
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
		sock.Finish(b, fd, f.Socket)
		setFlags(b, fd, f.Flags)
	},
}
