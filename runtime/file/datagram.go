package file

import (
	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/sock"
)

// ReadDatagrams records the datagrams that wait at sockets. Nobody reads from them
// any more.
func (s *Set) ReadDatagrams(warn func(format string, args ...any)) error {
	for _, d := range s.descs {
		if d.Record.Socket == nil || !sock.Queues(d.Record.Socket) {
			continue
		}
		h := d.held()
		f, err := d.seen.own()
		if err == nil {
			err = sock.ReadQueue(int(f.Fd()), d.Record.Socket, warn)
			_ = f.Close()
		}
		if err != nil {
			return h.Named(err)
		}
	}
	return nil
}

// sockets lists those of the image that are like.
func (m *Maker) sockets(like func(*image.Socket) bool) (out []*image.Socket) {
	for _, ref := range Refs(m.head) {
		if f := m.head.File(ref); f != nil && f.Socket != nil && like(f.Socket) {
			out = append(out, f.Socket)
		}
	}
	return out
}

// refillSockets puts datagrams back into sockets that wait for them.
func (m *Maker) refillSockets() error {
	list := m.sockets(func(s *image.Socket) bool { return len(s.Datagrams) > 0 })
	if len(list) == 0 {
		return nil
	}
	return sock.Refill(m.netns(), list, m.Warn)
}
