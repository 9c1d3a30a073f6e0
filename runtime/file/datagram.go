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

// refillSockets puts datagrams back into sockets that wait for them, and has those
// of netlink tell of what they have lost.
func (m *Maker) refillSockets() error {
	var list []sock.Waiting
	defer func() {
		for _, w := range list {
			_ = w.File.Close()
		}
	}()
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		if f == nil || f.Socket == nil || len(f.Socket.Datagrams) == 0 && !f.Socket.Lost {
			continue
		}
		own, err := m.stub.Take(m.fds[ref])
		if err != nil {
			return err
		}
		if !f.Socket.Lost {
			list = append(list, sock.Waiting{File: own, Record: f.Socket})
			continue
		}
		err = sock.Overrun(own)
		_ = own.Close()
		if err != nil {
			m.Warn("a netlink socket cannot be made to tell that messages were lost (ENOBUFS)", "error", err)
		}
	}
	if len(list) == 0 {
		return nil
	}
	return sock.Refill(m.netns(), list, m.Warn)
}
