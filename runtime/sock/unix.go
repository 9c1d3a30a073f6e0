package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// local is unix(7) sockets. What belongs to more than one of them, who is whose
// peer and what is on the way, is the business of those who know all.
var local = family{
	types: [][2]int32{{unix.SOCK_STREAM, 0}, {unix.SOCK_DGRAM, 0}, {unix.SOCK_SEQPACKET, 0}},
	read: func(in *Inside, fd int, inode uint64, s *image.Socket) error {
		d, err := in.Diagnose(inode)
		if err != nil {
			return err
		}
		s.Unix = &image.UnixState{Shutdown: d.Shutdown}
		if s.Listening {
			s.Backlog = int32(d.Backlog)
		}
		if s.Unix.Creds, err = in.peerCreds(fd); err != nil {
			return err
		}
		if s.Unix.Reset, err = hasError(fd); err != nil {
			return err
		}
		return readPath(in, fd, s)
	},
	prepare: func(b *tracee.Batch, _ int, s *image.Socket) {
		if s.Path != "" { // the file of the socket that is gone stands in the way
			b.Try(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(0))
		}
	},
	settle: func(b *tracee.Batch, _ int, s *image.Socket) {
		if s.Path != "" {
			OwnUnix(b, s)
		}
	},
}

// OwnUnix adds the calls that give the file of a unix socket its owner and mode.
// Bound by its owner it is the owner's; a program that has given it away could do
// so, and so can whoever binds it now.
func OwnUnix(b *tracee.Batch, s *image.Socket) {
	b.Try(unix.SYS_FCHOWNAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(s.UID), tracee.W(s.GID), tracee.W(unix.AT_SYMLINK_NOFOLLOW))
	b.Add(unix.SYS_FCHMODAT, tracee.W(unix.AT_FDCWD), b.String(s.Path), tracee.W(s.Mode&0o777))
}

// hasError reports an error that waits to be told, which only poll(2) shows
// without taking it. A unix socket knows but one, ECONNRESET.
func hasError(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return false, fmt.Errorf("poll: %w", err)
	}
	return fds[0].Revents&unix.POLLERR != 0, nil
}

// siocUnixFile opens the file that a unix socket is bound to, by O_PATH
// (SIOCUNIXFILE of include/uapi/linux/un.h, Linux 4.14).
const siocUnixFile = 0x89e0

const deletedSuffix = " (deleted)"

// readPath records the file of a socket that has a name in the file system, under
// the path that it has now: the one that the socket was bound to may be relative,
// or have been renamed. A socket whose file has no name left keeps its address,
// by which nobody reaches it.
func readPath(in *Inside, fd int, s *image.Socket) error {
	if len(s.Address) <= 2 || s.Address[2] == 0 { // unnamed, abstract
		return nil
	}
	bound := unix.ByteSliceToString(s.Address[2:])
	n, err := unix.IoctlRetInt(fd, siocUnixFile)
	if err != nil {
		return fmt.Errorf("SIOCUNIXFILE: %w", err)
	}
	node := os.NewFile(uintptr(n), bound)
	defer node.Close()
	var st unix.Stat_t
	if err := unix.Fstat(n, &st); err != nil {
		return fmt.Errorf("the socket's file: %w", err)
	}
	now, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", n))
	if err != nil || strings.HasSuffix(now, deletedSuffix) {
		return err
	}
	for _, path := range []string{bound, now} {
		at, err := in.Lstat(path)
		if filepath.IsAbs(path) && err == nil && at.Dev == st.Dev && at.Ino == st.Ino {
			s.Path, s.Mode = path, st.Mode
			s.UID, s.GID = in.IDs.User(st.Uid), in.IDs.Group(st.Gid)
			return nil
		}
	}
	if filepath.IsAbs(bound) && in.Elsewhere != nil && in.Elsewhere(n, bound) {
		s.Path, s.Mode = bound, st.Mode
		s.UID, s.GID = in.IDs.User(st.Uid), in.IDs.Group(st.Gid)
		return nil
	}
	return fail.Refuse("unix:"+bound, "its file lies where the container cannot reach it, at "+now, "close it before the checkpoint")
}

// UnixName is the name in the address of a unix socket as people write it, "" for
// none.
func UnixName(address []byte) string {
	switch {
	case len(address) <= 2:
		return ""
	case address[2] == 0:
		return "@" + string(address[3:])
	}
	return unix.ByteSliceToString(address[2:])
}

// peerCreds reads SO_PEERCRED and SO_PEERGROUPS; nil where there are none.
func (in *Inside) peerCreds(fd int) (*image.PeerCreds, error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	if c.Uid == math.MaxUint32 {
		return nil, nil
	}
	out := in.creds(c)
	groups := make([]byte, 4*32)
	n := uint32(len(groups))
	for {
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&n)), 0)
		if errno == 0 {
			break
		}
		if errno != unix.ERANGE {
			return nil, fmt.Errorf("SO_PEERGROUPS: %w", errno)
		}
		groups = make([]byte, n)
	}
	for g := groups[:n]; len(g) >= 4; g = g[4:] {
		out.Groups = append(out.Groups, in.IDs.Group(binary.LittleEndian.Uint32(g)))
	}
	return out, nil
}

// creds translates credentials into the container's numbers.
func (in *Inside) creds(c *unix.Ucred) *image.PeerCreds {
	out := &image.PeerCreds{UID: in.IDs.User(c.Uid), GID: in.IDs.Group(c.Gid)}
	if c.Pid != 0 {
		out.Pid = in.Pid(c.Pid)
	}
	return out
}

// reach is an address by which a unix socket that has a name is reached from here,
// wherever its file is by now, until done is called.
func reach(to *os.File) (at *unix.SockaddrUnix, done func(), err error) {
	name, err := boundAddress(int(to.Fd()))
	switch {
	case err != nil:
		return nil, nil, err
	case len(name) <= 2:
		return nil, nil, errors.New("the other socket has no name")
	case name[2] == 0:
		return &unix.SockaddrUnix{Name: "@" + string(name[3:])}, func() {}, nil
	}
	n, err := unix.IoctlRetInt(int(to.Fd()), siocUnixFile)
	if err != nil {
		return nil, nil, fmt.Errorf("SIOCUNIXFILE: %w", err)
	}
	return &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d", n)}, func() { _ = unix.Close(n) }, nil
}

// Connect connects a unix socket to another that has a name. Both may be in other
// namespaces than this process.
func Connect(f, to *os.File) error {
	at, done, err := reach(to)
	if err != nil {
		return err
	}
	defer done()
	if err := unix.Connect(int(f.Fd()), at); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	return nil
}

// What becomes of a unix socket whose peer is outside the container.
const (
	Reconnect  = "reconnect"  // it is connected again by its peer's path
	Disconnect = "disconnect" // its peer's end is closed
)

// Outsides are the values of Choices.Outside besides none, for which such sockets
// are refused.
var Outsides = []string{Reconnect, Disconnect}

// Diagnosis is what sock_diag(7) tells of a unix socket.
type Diagnosis struct {
	// HasPeer: it is or was connected. Peer is the inode of the other end, 0
	// if that is closed or waits to be accepted.
	HasPeer  bool
	Peer     uint64
	Shutdown uint8
	// Pending are the inodes of the sockets whose connections a listening one
	// has yet to accept, in order; 0 for one that is closed.
	Pending []uint64
	Backlog uint32

	unread uint32            // bytes
	sent   map[uint64]uint32 // bytes that wait in connections not accepted, by the client
}

// Sent is how many bytes a client has sent over a connection that nobody has
// accepted; by 0, those who are closed.
func (in *Inside) Sent(client uint64) uint32 {
	if d := in.unix[0]; d != nil {
		return d.sent[client]
	}
	return 0
}

// Of include/uapi/linux/unix_diag.h.
const (
	diagShowPeer    = 0x04
	diagShowPending = 0x08
	diagShowQueue   = 0x10
)

// Diagnose tells of a unix socket by its inode. All are asked for at once, inside
// their network namespace.
func (in *Inside) Diagnose(inode uint64) (*Diagnosis, error) {
	if in.unix == nil {
		in.unix = map[uint64]*Diagnosis{}
		err := nsutil.Inside(in.NetNS, func() error {
			req := make(rawRequest, 24) // struct unix_diag_req
			req[0] = unix.AF_UNIX
			put32(req[4:], math.MaxUint32) // any state
			put32(req[12:], diagShowPeer|diagShowPending|diagShowQueue)
			dump := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			dump.AddData(req)
			all, err := dump.Execute(unix.NETLINK_SOCK_DIAG, 0)
			for _, m := range all {
				noteDiagnosis(in.unix, m)
			}
			return err
		})
		if err != nil {
			in.unix = nil
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
	}
	d := in.unix[inode]
	if d == nil {
		return nil, fmt.Errorf("sock_diag does not know socket %d: %w", inode, tracee.ErrGone)
	}
	return d, nil
}

// noteDiagnosis reads struct unix_diag_msg and the attributes behind it.
func noteDiagnosis(all map[uint64]*Diagnosis, m []byte) {
	const head = 16
	if len(m) < head {
		return
	}
	le := binary.LittleEndian
	attributes, err := nl.ParseRouteAttr(m[head:])
	if err != nil {
		return
	}
	d := &Diagnosis{}
	for _, a := range attributes {
		v := a.Value
		switch {
		case a.Attr.Type == netlink.UNIX_DIAG_PEER && len(v) >= 4:
			d.HasPeer, d.Peer = true, uint64(le.Uint32(v))
		case a.Attr.Type == netlink.UNIX_DIAG_ICONS:
			for ; len(v) >= 4; v = v[4:] {
				d.Pending = append(d.Pending, uint64(le.Uint32(v)))
			}
		case a.Attr.Type == netlink.UNIX_DIAG_RQLEN && len(v) >= 8:
			d.unread, d.Backlog = le.Uint32(v), le.Uint32(v[4:])
		case a.Attr.Type == netlink.UNIX_DIAG_SHUTDOWN && len(v) >= 1:
			d.Shutdown = v[0]
		}
	}
	inode := uint64(le.Uint32(m[4:]))
	if inode == 0 && d.HasPeer { // waits to be accepted
		if all[0] == nil {
			all[0] = &Diagnosis{sent: map[uint64]uint32{}}
		}
		all[0].sent[d.Peer] += d.unread
		return
	}
	all[inode] = d
}
