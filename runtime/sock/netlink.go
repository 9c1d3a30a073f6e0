package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
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

// netlink is netlink(7). Messages that wait could not be put back as the
// kernel's: only it sends with port 0.
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
		if data, failed, err := waiting(fd); err != nil || data || failed {
			return errors.Join(err, fail.Refuse("", "messages wait at a netlink socket; nobody but the kernel can send them again", "let the program read them"))
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
