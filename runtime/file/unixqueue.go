package file

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// unread is what lies in the queue of a unix socket.
type unread struct {
	object.Object
	record   *image.Queue
	inode    uint64
	messages []sock.Unread
	flying   [][]*seen // descriptors of each message
}

// readUnread reads what lies in unix sockets. Descriptors in flight are open files
// like all others, and those that are sockets may have more in their queues.
func (s *Set) readUnread() error {
	if s.Promise == nil { // they run
		return nil
	}
	done := map[uint64]bool{}
	for i := 0; i < len(s.all); i++ {
		one := s.all[i]
		if one.field("scm_fds") == "" || done[one.stat.Ino] { // which only unix sockets have
			continue
		}
		done[one.stat.Ino] = true
		if err := s.readUnix(one); err != nil {
			return fail.In(one.proc.Name, fail.On(one.object(), err))
		}
	}
	return nil
}

func (s *Set) readUnix(one *seen) error {
	f, err := one.own()
	if err != nil {
		return err
	}
	defer f.Close()
	q := &unread{inode: one.stat.Ino, record: &image.Queue{}}
	if q.messages, err = s.insideOf(one.proc.Pid).ReadQueue(f, s.Promise); err != nil || len(q.messages) == 0 {
		return err
	}
	q.Object = object.Object{Type: image.TypeQueue, Record: q.record}
	for i := range q.messages {
		m := &q.messages[i]
		var flying []*seen
		for _, f := range m.Files {
			s.flying = append(s.flying, f)
			// It is seen here, but belongs to who has the socket.
			who := &Process{Pid: os.Getpid(), Inner: one.proc.Inner, Name: one.proc.Name}
			there, err := look(who, int(f.Fd()))
			if err != nil {
				return err
			}
			s.all, flying = append(s.all, there), append(flying, there)
		}
		q.flying = append(q.flying, flying)
		q.record.Messages = append(q.record.Messages, image.Unread{Size: uint32(len(m.Data)), Name: m.Name, Creds: m.Creds, OOB: m.OOB})
	}
	s.unreads = append(s.unreads, q)
	return nil
}

// closeFlying closes the descriptors in flight that have been received anew.
func (s *Set) closeFlying() {
	for _, f := range s.flying {
		_ = f.Close()
	}
	s.flying = nil
}

// linkUnread finds the descriptions that are in flight, and who has sent datagrams.
func (s *Set) linkUnread(byFile map[*seen]*Description) error {
	var kept []*unread
	defer func() { s.unreads = kept }()
	for _, q := range s.unreads {
		socket := s.unixOf[q.inode]
		if socket == nil {
			return fmt.Errorf("socket %d is no unix socket any more", q.inode)
		}
		if socket.lost {
			s.Warnings = append(s.Warnings, fmt.Sprintf("%s: fd %d: what its peer outside the container has sent and nobody has read is dropped", socket.seen.proc.Name, socket.seen.fd))
			continue
		}
		kept = append(kept, q)
		var senders []*unixSocket
		for i := range q.messages {
			from := s.senderOf(socket, q.messages[i].Name)
			if from == nil && socket.is(unix.SOCK_DGRAM) && len(q.messages[i].Name) == 0 && socket.diag.Peer != 0 && len(socket.Record.Socket.Address) <= 2 {
				from = s.unixOf[socket.diag.Peer]
			}
			senders = append(senders, from)
		}
		q.Complete = func() {
			q.record.Socket = socket.Ref
			for i := range q.messages {
				m := &q.record.Messages[i]
				m.From = refOf(senders[i])
				for _, one := range q.flying[i] {
					m.Files = append(m.Files, byFile[one].Ref)
				}
			}
		}
	}
	return nil
}

// senderOf is the datagram socket of the container that has a name.
func (s *Set) senderOf(to *unixSocket, name []byte) *unixSocket {
	if !to.is(unix.SOCK_DGRAM) || len(name) <= 2 {
		return nil
	}
	for _, u := range s.unixes {
		if u.is(unix.SOCK_DGRAM) && slices.Equal(u.Record.Socket.Address, name) {
			return u
		}
	}
	return nil
}

// saveUnread writes the bytes of the messages.
func (s *Set) saveUnread(w *image.Writer, progress func(int) error) error {
	for _, q := range s.unreads {
		var data []byte
		for i := range q.messages {
			data = append(data, q.messages[i].Data...)
		}
		for at := 0; at < len(data); at += contentChunk {
			part := data[at:min(at+contentChunk, len(data))]
			if err := progress(len(part)); err != nil {
				return err
			}
			if err := w.Bytes(q.Ref, uint64(at), part); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill puts back what was unread in a socket, each message as whoever had sent it.
func (u *unixMaker) fill(ref image.Ref, q *image.Queue) error {
	to, err := u.stub.Take(u.fds[q.Socket])
	if err != nil {
		return err
	}
	defer to.Close()
	data := u.content[ref]
	for i := range q.Messages {
		m := &q.Messages[i]
		if uint64(m.Size) > uint64(len(data)) {
			return errors.New("bytes are missing")
		}
		if err := u.send(q, to, m, data[:m.Size]); err != nil {
			return fmt.Errorf("message %d of %d: %w", i+1, len(q.Messages), err)
		}
		data = data[m.Size:]
	}
	return nil
}

func (u *unixMaker) send(q *image.Queue, to *os.File, m *image.Unread, data []byte) error {
	from, direct, err := u.sender(q, m)
	if err != nil {
		return err
	}
	defer from.Close()
	if direct {
		to = nil
	}
	creds, err := u.credsHere(m.Creds)
	if err != nil {
		return err
	}
	var files []*os.File
	defer func() { closeAll(files) }()
	for _, ref := range m.Files {
		fd, err := u.FD(ref)
		if err != nil {
			return err
		}
		f, err := u.stub.Take(fd)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	// The kernel cuts a stream into pieces itself, the descriptors with the first.
	return sock.Send(from, to, data, creds, files, m.OOB)
}

// sender is the socket that a message is sent from, and whether it is connected to
// the one it is for.
func (u *unixMaker) sender(q *image.Queue, m *image.Unread) (f *os.File, direct bool, err error) {
	if peer := u.peers[q.Socket]; peer != 0 {
		f, err = u.stub.Take(peer)
		return f, true, err
	}
	if m.From != 0 {
		f, err = u.stub.Take(u.fds[m.From])
		return f, false, err
	}
	if u.socketOf(q.Socket).Type != unix.SOCK_DGRAM {
		return nil, false, errors.New("nobody is connected to it")
	}
	var b tracee.Batch
	i := b.Add(unix.SYS_SOCKET, tracee.W(unix.AF_UNIX), tracee.W(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), tracee.W(0))
	if _, err := u.stub.Run(&b); err != nil {
		return nil, false, err
	}
	up, err := u.moveUp([]int{int(b.Calls[i].Ret)})
	if err == nil && named(m.Name) {
		_, err = u.bindScratch(up[0], m.Name)
	}
	if err != nil {
		return nil, false, err
	}
	if f, err = u.stub.Take(up[0]); err != nil {
		return nil, false, err
	}
	var done tracee.Batch
	done.Add(unix.SYS_CLOSE, tracee.W(up[0]))
	_, err = u.stub.Run(&done)
	return f, false, err
}

// credsHere are credentials as this process numbers them.
func (u *unixMaker) credsHere(c *image.PeerCreds) (*unix.Ucred, error) {
	if c == nil {
		return nil, nil
	}
	s, err := u.actor(c)
	if err != nil {
		return nil, err
	}
	return &unix.Ucred{Pid: int32(s.Pid), Uid: toHost(u.IDs.UID, c.UID), Gid: toHost(u.IDs.GID, c.GID)}, nil
}

// toHost translates an id of the container.
func toHost(maps []image.IDMap, id uint32) uint32 {
	for _, m := range maps {
		if id >= m.Container && id-m.Container < m.Size {
			return m.Host + id - m.Container
		}
	}
	return id
}
