package file

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Connections lists the connections of TCP among the open files. What they hold is
// read by sock.ReadConnections, when nothing moves any more.
func (s *Set) Connections() (all []*sock.Connection) {
	for _, d := range s.descs {
		if d.Record.Socket == nil || d.Record.Socket.TCP == nil {
			continue
		}
		if d.connection == nil {
			d.connection = &sock.Connection{Held: d.held()}
		}
		all = append(all, d.connection)
	}
	return all
}

// held says where a socket is found.
func (d *Description) held() sock.Held {
	return sock.Held{
		Pid: d.seen.proc.Pid, FD: d.seen.fd, Record: d.Record.Socket,
		Named: func(err error) error { return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), err)) },
	}
}

// Listeners lists the sockets of TCP that listen.
func (s *Set) Listeners() (all []sock.Held) {
	for _, d := range s.descs {
		if r := d.Record.Socket; r != nil && r.Listening && r.Family != unix.AF_UNIX {
			all = append(all, d.held())
		}
	}
	return all
}

// Inside is what is known of the network namespace, nil if nobody has asked for it.
func (s *Set) Inside() *sock.Inside { return s.sockets }

// saveConnections writes what their queues hold.
func (s *Set) saveConnections(w *image.Writer, progress func(int) error) error {
	for _, d := range s.descs {
		if d.connection == nil {
			continue
		}
		content := d.connection.Content
		for at := 0; at < len(content); at += contentChunk {
			part := content[at:min(at+contentChunk, len(content))]
			if err := w.Bytes(d.Ref, uint64(at), part); err != nil {
				return d.connection.Named(err)
			}
			if err := progress(len(part)); err != nil {
				return err
			}
		}
	}
	return nil
}

// connect makes the connections of the image, when all other sockets are there: a
// listener must have its port first. They are in repair mode until Revive.
func (m *Maker) connect() error {
	for _, ref := range Refs(m.head) {
		if f := m.head.File(ref); f != nil && f.Socket != nil && f.Socket.TCP != nil {
			m.connected = append(m.connected, ref)
		}
	}
	if len(m.connected) == 0 {
		return nil
	}
	limits, err := sock.LargestBuffers(m.netns())
	if err != nil {
		return err
	}
	m.connections = map[image.Ref]*sock.Remade{}
	if slices.ContainsFunc(m.connected, func(ref image.Ref) bool { return sock.NeedsLoopback(m.head.File(ref).Socket) }) {
		if m.lowerLoopback, err = sock.RaiseLoopback(m.netns()); err != nil {
			return err
		}
	}
	for _, ref := range m.connected {
		f, err := m.stub.Take(m.fds[ref])
		if err != nil {
			return err
		}
		m.connections[ref] = &sock.Remade{File: f, Record: m.head.File(ref).Socket}
		if err := m.connections[ref].Begin(limits); err != nil {
			return m.named(ref, err)
		}
	}
	err = m.asOpeners(func(b *tracee.Batch, fd int, f *image.File) { sock.Bind(b, fd, f.Socket) })
	if err != nil {
		return err
	}
	return m.eachConnection((*sock.Remade).Connect)
}

func (m *Maker) netns() string { return nsutil.Path(m.stub.Pid, "net") }

func (m *Maker) named(ref image.Ref, err error) error {
	return fail.On("connection "+m.head.File(ref).Socket.Connection(), err)
}

func (m *Maker) eachConnection(act func(*sock.Remade) error) error {
	for _, ref := range m.connected {
		if err := act(m.connections[ref]); err != nil {
			return m.named(ref, err)
		}
	}
	return nil
}

// asOpeners gives the connections some of their state, each with the rights of its
// opener.
func (m *Maker) asOpeners(add func(b *tracee.Batch, fd int, f *image.File)) error {
	for refs := range slices.Chunk(m.connected, 1024) {
		for start, end := range m.sameOpener(refs) {
			if err := m.finish(m.opener(m.head.File(refs[start])), refs[start:end], add); err != nil {
				return err
			}
		}
	}
	return nil
}

// settleConnections brings them to the state they were in, when their queues are
// filled.
func (m *Maker) settleConnections() error {
	if len(m.connected) == 0 {
		return nil
	}
	err := nsutil.Inside(m.netns(), func() error {
		return m.eachConnection(func(r *sock.Remade) error { return r.Shut(sock.Inject) })
	})
	if err == nil && m.lowerLoopback != nil {
		err = m.lowerLoopback()
	}
	if err != nil {
		return err
	}
	return m.asOpeners(func(b *tracee.Batch, fd int, f *image.File) {
		sock.Settle(b, fd, f.Socket)
		setFlags(b, fd, f.Flags)
	})
}

// Revive lets the connections live.
func (m *Maker) Revive() error { return m.eachConnection((*sock.Remade).Release) }

// HasConnections reports whether there are any, also such as have ended.
func (m *Maker) HasConnections() bool { return len(m.connected) > 0 }
