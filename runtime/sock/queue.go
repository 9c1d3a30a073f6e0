package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
)

// Unread is a message, or a stretch of a stream, that waits in a unix socket.
type Unread struct {
	Data  []byte
	Name  []byte // struct sockaddr of the sender
	Creds *image.PeerCreds
	Files []*os.File // received anew: the same open files
	OOB   bool
}

// Promise sees to it that an option of a socket gets a value again, even if this
// process dies, until kept is called.
type Promise func(f *os.File, name, value int) (kept func() error, err error)

// ReadQueue reads what lies in a unix socket and takes nothing out (MSG_PEEK). To
// see more than the first message it sets SO_PEEK_OFF, which is then what it was.
// All who use the socket are stopped. Credentials are seen where the socket asks for
// them (SO_PASSCRED): to ask in its place would be seen by the program, for the
// moment in which it runs already if this process is killed.
func (in *Inside) ReadQueue(f *os.File, promise Promise) ([]Unread, error) {
	q := queueReader{in: in, fd: int(f.Fd())}
	if some, err := q.anything(); err != nil || !some {
		return nil, err
	}
	read := q.messages
	if q.kind == unix.SOCK_STREAM {
		read = q.stream
	}
	var out []Unread
	err := q.with(f, unix.SO_PEEK_OFF, 0, promise, func() (err error) {
		out, err = read()
		return err
	})
	if err != nil {
		closeFiles(out)
		return nil, err
	}
	return out, nil
}

// with does something while an option has a value, and gives it its own again.
func (q *queueReader) with(f *os.File, name, value int, promise Promise, do func() error) error {
	was, err := number(q.fd, unix.SOL_SOCKET, name)
	if err != nil {
		return err
	}
	kept, err := promise(f, name, was)
	if err != nil {
		return err
	}
	err = unix.SetsockoptInt(q.fd, unix.SOL_SOCKET, name, value)
	if err == nil {
		err = fault.Point("sock.peek")
	}
	if err == nil {
		err = do()
	}
	return errors.Join(err, unix.SetsockoptInt(q.fd, unix.SOL_SOCKET, name, was), kept())
}

type queueReader struct {
	in      *Inside
	fd      int
	kind    int
	waiting int // bytes
	eof     bool
}

// anything finds out whether something is unread, without a receive: that would
// take an error that waits to be told.
func (q *queueReader) anything() (bool, error) {
	var err error
	if q.kind, err = number(q.fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		return false, err
	}
	fds := []unix.PollFd{{Fd: int32(q.fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return false, fmt.Errorf("poll: %w", err)
	}
	seen := fds[0].Revents
	if q.waiting, err = unix.IoctlGetInt(q.fd, unix.TIOCINQ); errors.Is(err, unix.EINVAL) { // it listens
		return false, nil
	}
	q.eof = seen&unix.POLLRDHUP != 0
	switch {
	case err != nil:
		return false, fmt.Errorf("SIOCINQ: %w", err)
	case seen&unix.POLLIN == 0, q.kind == unix.SOCK_STREAM && q.waiting == 0:
		return false, nil
	case q.kind != unix.SOCK_STREAM && seen&unix.POLLERR != 0:
		if q.waiting == 0 {
			return false, nil
		}
		return false, fail.Refuse("", "messages wait to be read behind an error that waits to be told, and reading would take it", "let the program read them")
	}
	return true, nil
}

// peek receives from an offset without taking anything out.
func (q *queueReader) peek(offset int, buf []byte, flags int) (n int, u Unread, cut bool, err error) {
	if err := unix.SetsockoptInt(q.fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, offset); err != nil {
		return 0, u, false, fmt.Errorf("SO_PEEK_OFF: %w", err)
	}
	control := make([]byte, 4096) // 253 descriptors and more
	n, controls, got, from, err := unix.Recvmsg(q.fd, buf, control, flags|unix.MSG_PEEK|unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, u, false, err
	}
	u.Name = rawUnix(from)
	err = q.ancillary(control[:controls], &u)
	if err == nil && got&unix.MSG_CTRUNC != 0 {
		err = errors.New("its ancillary data were cut off")
	}
	return n, u, got&unix.MSG_TRUNC != 0, err
}

// ancillary reads what came along with a message.
func (q *queueReader) ancillary(control []byte, u *Unread) error {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return fmt.Errorf("ancillary data: %w", err)
	}
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_SOCKET {
			continue
		}
		switch m.Header.Type {
		case unix.SCM_RIGHTS:
			fds, err := unix.ParseUnixRights(m)
			if err != nil {
				return err
			}
			for _, fd := range fds {
				u.Files = append(u.Files, os.NewFile(uintptr(fd), "descriptor in flight"))
			}
		case scmPidfd: // SO_PASSPIDFD is set
			if len(m.Data) >= 4 {
				if fd := int32(binary.LittleEndian.Uint32(m.Data)); fd >= 0 {
					_ = unix.Close(int(fd))
				}
			}
		case unix.SCM_CREDENTIALS:
			c, err := unix.ParseUnixCredentials(m)
			if err != nil {
				return err
			}
			if c.Pid != 0 || c.Uid != overflow {
				u.Creds = q.in.creds(c)
			}
		}
	}
	return nil
}

const (
	scmPidfd = 4     // SCM_PIDFD, Linux 6.5
	overflow = 65534 // the uid of a message that carries no credentials
)

// rawUnix is the struct sockaddr of a sender.
func rawUnix(a unix.Sockaddr) []byte {
	s, ok := a.(*unix.SockaddrUnix)
	if !ok || s.Name == "" {
		return nil
	}
	if s.Name[0] == '@' {
		return append([]byte{unix.AF_UNIX, 0, 0}, s.Name[1:]...)
	}
	return append(append([]byte{unix.AF_UNIX, 0}, s.Name...), 0)
}

// firstGuess is the size of most messages at most; for larger ones it is tried
// again.
const firstGuess = 256 << 10

// messages reads datagrams, of SOCK_SEQPACKET too. A message of no bytes is marked
// by the kernel once it was seen, so that the next look sees the one behind.
func (q *queueReader) messages() (out []Unread, err error) {
	buf := make([]byte, firstGuess)
	for offset := 0; ; {
		n, u, cut, err := q.peek(offset, buf, unix.MSG_TRUNC)
		if errors.Is(err, unix.EAGAIN) {
			return out, nil
		}
		if err != nil {
			return append(out, u), err
		}
		if cut {
			closeFiles([]Unread{u})
			buf = make([]byte, n)
			continue
		}
		if n == 0 && q.eof && u.Creds == nil && len(u.Files) == 0 && offset >= q.waiting {
			return out, nil // the end
		}
		u.Data = slices.Clone(buf[:n])
		out, offset = append(out, u), offset+n
	}
}

// stream reads a stream in stretches of the same credentials. The kernel ends a
// look at a change of these, behind bytes with descriptors, and before an
// out-of-band byte (unix_stream_read_generic in net/unix/af_unix.c). Which of the
// bytes in one look was sent with the descriptors no look tells: they come with the
// first, which no reader who keeps what it gets for later minds.
func (q *queueReader) stream() (out []Unread, err error) {
	urgent := q.urgent()
	if urgent != nil && q.atMark() { // all other looks pass over it there
		out = append(out, *urgent)
		urgent, q.waiting = nil, q.waiting-1
	}
	buf := make([]byte, q.waiting)
	for offset := 0; offset < q.waiting; {
		n, u, _, err := q.peek(offset, buf[offset:], 0)
		if err != nil || n == 0 {
			return append(out, u), errors.Join(err, fmt.Errorf("%d of %d bytes are to be seen", offset, q.waiting))
		}
		if last := len(out) - 1; last >= 0 && len(out[last].Files) == 0 && !out[last].OOB && sameSender(out[last].Creds, u.Creds) {
			// There was no other reason to end the look before.
			n, u.OOB = 1, true
			urgent = nil
		}
		u.Data, u.Name = buf[offset:offset+n], nil
		out, offset = append(out, u), offset+n
	}
	if urgent != nil {
		err = fail.Refuse("", "where an out-of-band byte lies among what waits to be read cannot be told", "let the program read it")
	}
	return out, err
}

func sameSender(a, b *image.PeerCreds) bool {
	return a == nil && b == nil || a != nil && b != nil && a.Pid == b.Pid && a.UID == b.UID && a.GID == b.GID
}

// urgent looks at an out-of-band byte that is not in the line, nil for none.
func (q *queueReader) urgent() *Unread {
	var one [1]byte
	n, _, err := unix.Recvfrom(q.fd, one[:], unix.MSG_OOB|unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != nil || n != 1 {
		return nil
	}
	return &Unread{Data: one[:], OOB: true}
}

// atMark reports that an out-of-band byte is the first in the queue
// (sockatmark(3)).
func (q *queueReader) atMark() bool {
	at, err := unix.IoctlGetInt(q.fd, unix.SIOCATMARK)
	return err == nil && at != 0
}

func closeFiles(unread []Unread) {
	for _, u := range unread {
		for _, f := range u.Files {
			_ = f.Close()
		}
	}
}

// Send puts a message into the queue that f sends to: of to, if that is set, or
// of its peer. Creds are as this process numbers them.
func Send(f, to *os.File, data []byte, creds *unix.Ucred, files []*os.File, oob bool) error {
	var control []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, one := range files {
			fds[i] = int(one.Fd())
		}
		control = unix.UnixRights(fds...)
	}
	if creds != nil {
		control = append(control, unix.UnixCredentials(creds)...)
	}
	flags := unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL
	if oob {
		flags |= unix.MSG_OOB
	}
	var at unix.Sockaddr
	if to != nil {
		name, done, err := reach(to)
		if err != nil {
			return err
		}
		defer done()
		at = name
	}
	fd := int(f.Fd())
	n, err := unix.SendmsgN(fd, data, control, at, flags)
	if errors.Is(err, unix.EAGAIN) { // its buffer is smaller than when this was sent
		if err = enlarge(fd, func() error { n, err = unix.SendmsgN(fd, data, control, at, flags); return err }); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	if err == nil && n != len(data) {
		err = fmt.Errorf("%d of %d bytes fit", n, len(data))
	}
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// roomy is a buffer for as much as an image may have in a queue, twice.
const roomy = 1 << 30

// enlarge does something with a larger send buffer.
func enlarge(fd int, do func() error) error {
	size, err := number(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return err
	}
	locked, err := number(fd, unix.SOL_SOCKET, soBufLock)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, roomy)
	}
	if err != nil {
		return err
	}
	return errors.Join(do(), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size/2), unix.SetsockoptInt(fd, unix.SOL_SOCKET, soBufLock, locked))
}
