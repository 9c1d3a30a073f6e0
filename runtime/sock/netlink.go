package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// netlinkProtocols are those whose sockets hold nothing but groups and messages.
var netlinkProtocols = []int32{
	unix.NETLINK_ROUTE, unix.NETLINK_USERSOCK, unix.NETLINK_SOCK_DIAG, unix.NETLINK_XFRM, unix.NETLINK_NETFILTER,
	unix.NETLINK_KOBJECT_UEVENT, unix.NETLINK_GENERIC,
}

const (
	netlinkNoENOBUFS = 5 // NETLINK_NO_ENOBUFS
	sockaddrNL       = 12
	nlPid            = 4 // nl_pid in struct sockaddr_nl
	nlGroups         = 8
)

// netlinkSockets are netlink(7). Messages that wait cannot be put back as the
// kernel's, since only it sends with port 0: see Overrun.
var netlinkSockets = family{
	options: []option{
		{unix.SOL_NETLINK, unix.NETLINK_PKTINFO, 4},
		{unix.SOL_NETLINK, unix.NETLINK_BROADCAST_ERROR, 4},
		{unix.SOL_NETLINK, netlinkNoENOBUFS, 4},
		{unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 4},
		{unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 4},
		{unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 4},
		{unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 4},
	},
	fresh: true,
	read: func(_ *Inside, fd int, _ uint64, s *image.Socket) error {
		if !slices.Contains(netlinkProtocols, s.Protocol) {
			return fail.Refuse("", fmt.Sprintf("netlink sockets of protocol %d are not supported", s.Protocol), "close it before the checkpoint")
		}
		peer, err := peerAddress(fd)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(peer[min(nlPid, len(peer)):], func(b byte) bool { return b != 0 }) {
			s.Peer = peer
		}
		return readNetlinkGroups(fd, s)
	},
	settle: func(b *tracee.Batch, fd int, s *image.Socket) {
		for _, g := range s.Groups {
			setOption(b, fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, binary.NativeEndian.AppendUint32(nil, g.Type))
		}
		if s.Peer != nil {
			b.Add(unix.SYS_CONNECT, tracee.W(fd), b.Put(s.Peer), tracee.W(len(s.Peer)))
		}
	},
}

// readNetlinkGroups records the groups that a socket is in.
func readNetlinkGroups(fd int, s *image.Socket) error {
	bits := make([]byte, 4096)
	n := uint32(len(bits))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_NETLINK, unix.NETLINK_LIST_MEMBERSHIPS, uintptr(unsafe.Pointer(&bits[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return fmt.Errorf("NETLINK_LIST_MEMBERSHIPS: %w", errno)
	}
	for i, b := range bits[:min(int(n), len(bits))] {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				s.Groups = append(s.Groups, image.SocketGroup{Type: uint32(8*i + bit + 1)})
			}
		}
	}
	if len(s.Address) >= sockaddrNL {
		clear(s.Address[nlGroups:sockaddrNL])
	}
	return nil
}

// readLost notes that messages, or an error, wait at a netlink socket. Those of the
// kernel are lost, which any program must reckon with: it is told by ENOBUFS.
func readLost(fd int, s *image.Socket, warn func(format string, args ...any)) error {
	if s.Protocol == unix.NETLINK_USERSOCK {
		return fail.Refuse("", "messages of other programs wait at a netlink socket (NETLINK_USERSOCK), which are not supported", "let the program read them")
	}
	silent, err := number(fd, unix.SOL_NETLINK, netlinkNoENOBUFS)
	if err != nil {
		return err
	}
	s.Lost = silent == 0
	if s.Lost {
		warn("messages that wait at a netlink socket are left out; its program is told so by ENOBUFS (port %d)", netlinkPort(s))
	} else {
		warn("messages that wait at a netlink socket are left out; its program does not want to be told (port %d)", netlinkPort(s))
	}
	return nil
}

func netlinkPort(s *image.Socket) uint32 {
	if len(s.Address) < sockaddrNL {
		return 0
	}
	return binary.NativeEndian.Uint32(s.Address[nlPid:])
}

// overlong is more than the kernel makes one piece of memory of (KMALLOC_MAX_SIZE,
// 4 MiB), yet no more than it takes for a message.
const overlong = 5 << 20

// Overrun has a netlink socket tell ENOBUFS, once, and nothing else. A request that
// the kernel refuses comes back within the refusal. If that is too long for a
// message, the sender is told that an answer was lost (netlink_ack in
// net/netlink/af_netlink.c): of all errors of a socket this is the only one that
// comes without anything in its queue.
func Overrun(f *os.File) error {
	fd := int(f.Fd())
	brief, err := number(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK) // refusals without the request
	if err == nil && brief != 0 {
		err = setInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 0)
	}
	if err != nil {
		return err
	}
	request := make([]byte, overlong) // struct nlmsghdr, and zeros
	ne := binary.NativeEndian
	ne.PutUint32(request, overlong)
	ne.PutUint16(request[4:], impossible(fd))
	ne.PutUint16(request[6:], unix.NLM_F_REQUEST)
	err = enlarge(fd, func() error {
		return unix.Sendto(fd, request, unix.MSG_DONTWAIT, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	})
	if brief != 0 {
		err = errors.Join(err, setInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, brief))
	}
	if err != nil {
		return err
	}
	if _, failed, err := waiting(fd); err != nil || !failed {
		return errors.Join(err, errors.New("the kernel tells no error"))
	}
	return nil
}

// impossible is a type of message that nobody knows. That of netfilter names a
// subsystem, for one that nobody knows the kernel would look for a module.
func impossible(fd int) uint16 {
	const nftables = 10 // NFNL_SUBSYS_NFTABLES
	if protocol, err := number(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err == nil && protocol == unix.NETLINK_NETFILTER {
		return nftables<<8 | 0xff
	}
	return 0xfff0
}
