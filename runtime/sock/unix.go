package sock

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// local is unix(7) sockets that listen or have no peer.
var local = family{
	types: [][2]int32{{unix.SOCK_STREAM, 0}, {unix.SOCK_DGRAM, 0}, {unix.SOCK_SEQPACKET, 0}},
	read: func(in *Inside, fd int, inode uint64, s *image.Socket) error {
		if err := unconnected(fd); err != nil {
			return err
		}
		if err := emptyQueue(fd); err != nil && !s.Listening {
			return err
		}
		if s.Listening {
			waiting, backlog, err := queue(in.NetNS, inode)
			if err != nil {
				return err
			}
			s.Backlog = int32(backlog)
			if waiting != 0 {
				return fail.Refuse("", fmt.Sprintf("%d connections wait to be accepted", waiting), "let the program accept them, or stop the clients")
			}
		}
		return readPath(in, s)
	},
	prepare: func(b *tracee.Batch, _ int, s *image.Socket) {
		if s.Path != "" { // the file of the socket that is gone stands in the way
			b.Try(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(0))
		}
	},
	settle: func(b *tracee.Batch, _ int, s *image.Socket) {
		if s.Path != "" {
			// Bound by its owner it is the owner's; a program that has given
			// it away could do so, and so can whoever binds it now.
			b.Try(unix.SYS_FCHOWNAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(s.UID), tracee.W(s.GID), tracee.W(unix.AT_SYMLINK_NOFOLLOW))
			b.Add(unix.SYS_FCHMODAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(s.Mode&0o777))
		}
	},
}

// readPath records the file of a socket that has a name in the file system.
func readPath(in *Inside, s *image.Socket) error {
	if len(s.Address) <= 2 || s.Address[2] == 0 { // unnamed, abstract
		return nil
	}
	path := unix.ByteSliceToString(s.Address[2:])
	if path[0] != '/' {
		return fail.Refuse("unix:"+path, "it is bound by a relative path, which cannot be told any more", "bind it by an absolute path")
	}
	st, err := in.Lstat(path)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fail.Refuse("unix:"+path, "the file of the socket was removed or replaced", "close it before the checkpoint")
	}
	s.Path, s.Mode, s.UID, s.GID = path, st.Mode, st.Uid, st.Gid
	return nil
}

// Of net/unix/diag.c, by include/uapi/linux/unix_diag.h and sock_diag.h.
const (
	sockDiagByFamily = 20
	unixDiagShowRQL  = 0x10
	unixDiagRQLen    = 4
)

// queue asks how many connections wait at a listening unix socket and what its
// backlog is. Only sock_diag(7) tells, inside the socket's network namespace.
func queue(netns string, inode uint64) (waiting, backlog uint32, err error) {
	err = nsutil.Inside(netns, func() error {
		var err error
		waiting, backlog, err = diagnose(inode)
		return err
	})
	return waiting, backlog, err
}

func diagnose(inode uint64) (waiting, backlog uint32, err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, 0, fmt.Errorf("sock_diag: %w", err)
	}
	defer unix.Close(fd)
	le := binary.LittleEndian
	req := make([]byte, unix.NLMSG_HDRLEN+24)
	le.PutUint32(req, uint32(len(req)))
	le.PutUint16(req[4:], sockDiagByFamily)
	le.PutUint16(req[6:], unix.NLM_F_REQUEST)
	body := req[unix.NLMSG_HDRLEN:]
	body[0] = unix.AF_UNIX
	le.PutUint32(body[4:], 0xffffffff) // any state
	le.PutUint32(body[8:], uint32(inode))
	le.PutUint32(body[12:], unixDiagShowRQL)
	le.PutUint32(body[16:], 0xffffffff) // no cookie
	le.PutUint32(body[20:], 0xffffffff)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, 0, fmt.Errorf("sock_diag: %w", err)
	}
	buf := make([]byte, 8192)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("sock_diag: %w", err)
	}
	return parseQueue(buf[:n])
}

func parseQueue(b []byte) (waiting, backlog uint32, err error) {
	const message = unix.NLMSG_HDRLEN + 16 // struct unix_diag_msg
	le := binary.LittleEndian
	if len(b) < message || le.Uint16(b[4:]) != sockDiagByFamily {
		return 0, 0, errors.New("sock_diag does not know the socket")
	}
	for a := b[message:]; len(a) >= 4; {
		size := int(le.Uint16(a))
		if size < 4 || size > len(a) {
			break
		}
		if le.Uint16(a[2:]) == unixDiagRQLen && size >= 12 {
			return le.Uint32(a[4:]), le.Uint32(a[8:]), nil
		}
		a = a[min((size+3)&^3, len(a)):]
	}
	return 0, 0, errors.New("sock_diag gives no queue")
}
