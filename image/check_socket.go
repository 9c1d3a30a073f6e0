package image

import (
	"errors"
	"fmt"
	"slices"
)

const (
	maxSockaddr = 128      // sizeof(struct sockaddr_storage)
	maxOption   = 64 << 10 // bytes
	maxRights   = 253      // SCM_MAX_FD
	maxQueued   = 1 << 30  // bytes in a queue
	maxShutdown = 3        // SHUTDOWN_MASK of include/net/sock.h

	typeStream   = 1 // SOCK_STREAM
	typeDatagram = 2 // SOCK_DGRAM
)

// socketsSeen is what records of sockets before the present one have claimed.
type socketsSeen struct {
	peer  map[Ref]bool // has a peer
	queue map[Ref]bool // has a queue
}

func checkSocket(s *Socket) error {
	if len(s.Address) > maxSockaddr {
		return fmt.Errorf("socket address of %d bytes", len(s.Address))
	}
	if s.TCP != nil {
		if err := checkTCP(s); err != nil {
			return err
		}
	}
	if err := checkPackets(s); err != nil {
		return err
	}
	for _, o := range s.Options {
		if len(o.Value) > maxOption {
			return fmt.Errorf("socket option %d/%d of %d bytes", o.Level, o.Name, len(o.Value))
		}
	}
	u := s.Unix
	switch {
	case u == nil:
		return nil
	case s.Family != afUnix:
		return fmt.Errorf("a socket of family %d with the state of a unix socket", s.Family)
	case u.Shutdown > maxShutdown:
		return fmt.Errorf("a socket that is shut down by %d", u.Shutdown)
	case u.Reconnect && (len(u.Peer) <= 2 || u.Peer[2] != '/' || s.Listening):
		return errors.New("a socket that is to be connected again, but to no path")
	case len(u.Peer) > maxSockaddr:
		return fmt.Errorf("socket address of %d bytes", len(u.Peer))
	}
	return u.Creds.check()
}

func (c *PeerCreds) check() error {
	if c != nil && (c.Pid < 0 || len(c.Groups) > maxGroups) {
		return fmt.Errorf("credentials of process %d with %d groups", c.Pid, len(c.Groups))
	}
	return nil
}

// unixSocket is the unix socket ref, nil if it is something else.
func (b *builder) unixSocket(ref Ref) *Socket {
	f := b.File(ref)
	if f == nil || f.Socket == nil || f.Socket.Family != afUnix {
		return nil
	}
	return f.Socket
}

// ends lists the sockets of which a connection says what their peer is.
func (b *builder) ends(c *Connection) (ends []Ref) {
	if c.From != 0 {
		ends = append(ends, c.From)
	}
	if to := b.unixSocket(c.To); to != nil && !to.Listening && (c.Mutual && c.To != c.From || c.From == 0) {
		ends = append(ends, c.To)
	}
	return ends
}

func (b *builder) checkConnection(c *Connection) error {
	from, to := b.unixSocket(c.From), b.unixSocket(c.To)
	switch {
	case c.From != 0 && from == nil || c.To != 0 && to == nil || from == nil && to == nil:
		return fmt.Errorf("a connection from #%d to #%d, which are not unix sockets before it", c.From, c.To)
	case from != nil && from.Listening || from != nil && to != nil && to.Type != from.Type:
		return fmt.Errorf("#%d cannot be connected to #%d", c.From, c.To)
	case c.Mutual && (from == nil || to == nil || to.Listening || c.From == c.To):
		return fmt.Errorf("#%d cannot be connected to #%d from both sides", c.From, c.To)
	case from != nil && to != nil && !c.Mutual && !to.Listening && from.Type != typeDatagram:
		return fmt.Errorf("#%d is connected to #%d, which is not connected to it", c.From, c.To)
	}
	for _, end := range b.ends(c) {
		if b.sockets.peer[end] {
			return fmt.Errorf("socket #%d has two peers", end)
		}
	}
	return nil
}

func (b *builder) checkQueue(q *Queue) error {
	s := b.unixSocket(q.Socket)
	switch {
	case s == nil:
		return fmt.Errorf("reference %d names no unix socket before it", q.Socket)
	case b.sockets.queue[q.Socket]:
		return fmt.Errorf("socket #%d has two queues", q.Socket)
	case s.Listening || q.Sent && s.Type == typeDatagram:
		return fmt.Errorf("socket #%d cannot have such a queue", q.Socket)
	}
	var total uint64
	for i := range q.Messages {
		m := &q.Messages[i]
		total += uint64(m.Size)
		if err := b.checkUnread(m, s); err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
	}
	if total > maxQueued {
		return fmt.Errorf("a queue of %d bytes", total)
	}
	return nil
}

func (b *builder) checkUnread(m *Unread, s *Socket) error {
	switch {
	case len(m.Name) > maxSockaddr:
		return fmt.Errorf("socket address of %d bytes", len(m.Name))
	case m.From != 0 && b.unixSocket(m.From) == nil:
		return fmt.Errorf("reference %d names no unix socket before it", m.From)
	case len(m.Files) > maxRights:
		return fmt.Errorf("it carries %d descriptors", len(m.Files))
	case m.OOB && (s.Type != typeStream || m.Size != 1):
		return errors.New("it cannot be out of band")
	case m.Size == 0 && s.Type == typeStream:
		return errors.New("a stretch of a stream without bytes")
	}
	for _, ref := range m.Files {
		if err := need[File](b, ref, "open file"); err != nil {
			return err
		}
	}
	return m.Creds.check()
}

func (b *builder) keepSocket(v any) {
	switch v := v.(type) {
	case *Connection:
		for _, end := range b.ends(v) {
			b.sockets.peer[end] = true
		}
	case *Queue:
		b.sockets.queue[v.Socket] = true
	}
}

// Bytes is how many bytes the messages have together.
func (q *Queue) Bytes() (n uint64) {
	for i := range q.Messages {
		n += uint64(q.Messages[i].Size)
	}
	return n
}

// checkTCP checks what the reader of a connection depends on; the rest is for the
// kernel to refuse.
func checkTCP(s *Socket) error {
	const (
		stream, tcp = 1, 6
		closed      = 7       // TCP_CLOSE
		maxQueue    = 1 << 30 // the kernel's own limit on a window
	)
	sizes := map[int32]int{afInet: 16, afInet6: 28} // of struct sockaddr_in and _in6
	t, size := s.TCP, sizes[s.Family]
	switch {
	case size == 0 || s.Type != stream || s.Protocol != tcp || s.Listening:
		return errors.New("a connection of a socket that can have none")
	case !slices.Contains([]uint8{1, 2, 4, 5, closed, 8, 9, 11}, t.State):
		return fmt.Errorf("a connection in state %d", t.State)
	case t.State != closed && (len(t.Peer) != size || len(s.Address) != size):
		return fmt.Errorf("a connection with addresses of %d and %d bytes", len(s.Address), len(t.Peer))
	case t.Receive.Bytes > maxQueue || t.Send.Bytes > maxQueue || t.Unsent > t.Send.Bytes:
		return fmt.Errorf("queues of %d and %d bytes, %d of them unsent", t.Receive.Bytes, t.Send.Bytes, t.Unsent)
	case t.SendScale > 14 || t.ReceiveScale > 14:
		return fmt.Errorf("window scales %d and %d", t.SendScale, t.ReceiveScale)
	}
	return nil
}

// Connection names the ends of a connection for messages.
func (s *Socket) Connection() string {
	if s.TCP.Peer == nil {
		return "that has ended, of " + socketAddress(s.Family, s.Address, "")
	}
	return socketAddress(s.Family, s.Address, "") + " to " + socketAddress(s.Family, s.TCP.Peer, "")
}

// queued is how many bytes of a connection are in the contents.
func (s *Socket) queued() uint64 {
	if s == nil || s.TCP == nil {
		return 0
	}
	return uint64(s.TCP.Receive.Bytes) + uint64(s.TCP.Send.Bytes)
}
