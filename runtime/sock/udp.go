package sock

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Options that package unix does not have, of include/uapi/linux/in.h, in6.h,
// udp.h and udplite.h.
const (
	ipMulticastAll   = 49
	ipRecvErr4884    = 26
	ipRecvFragSize   = 25
	ipv6MulticastAll = 29
	ipv6RecvErr4884  = 31
	ipv6FlowInfoSend = 33
	ipv6RecvFragSize = 77
	ipv6FlowInfo     = 11
	ipv6RecvOrigDst  = 74
	ipv6UnicastIF    = 76
	udpCork          = 1
	udpLiteSendCover = 10
	udpLiteRecvCover = 11
	solUDPLite       = unix.IPPROTO_UDPLITE
	ipv6AddrPrefs    = 72
)

// packetOptions are those of sockets that send single packets over IPv4 and IPv6.
var packetOptions = slices.Concat(ipOptions, []option{
	{unix.SOL_IP, unix.IP_RECVOPTS, 4},
	{unix.SOL_IP, unix.IP_RETOPTS, 4},
	{unix.SOL_IP, unix.IP_PASSSEC, 4},
	{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 4},
	{unix.SOL_IP, unix.IP_CHECKSUM, 4},
	{unix.SOL_IP, ipRecvFragSize, 4},
	{unix.SOL_IP, ipRecvErr4884, 4},
	{unix.SOL_IP, unix.IP_UNICAST_IF, 4},
	{unix.SOL_IP, unix.IP_OPTIONS, 40},
	{unix.SOL_IP, unix.IP_MULTICAST_TTL, 4},
	{unix.SOL_IP, unix.IP_MULTICAST_LOOP, 4},
	{unix.SOL_IP, ipMulticastAll, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVPATHMTU, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVHOPOPTS, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVRTHDR, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVDSTOPTS, 4},
	{unix.SOL_IPV6, ipv6RecvFragSize, 4},
	{unix.SOL_IPV6, ipv6RecvErr4884, 4},
	{unix.SOL_IPV6, ipv6RecvOrigDst, 4},
	{unix.SOL_IPV6, ipv6FlowInfo, 4},
	{unix.SOL_IPV6, ipv6FlowInfoSend, 4},
	{unix.SOL_IPV6, ipv6UnicastIF, 4},
	{unix.SOL_IPV6, ipv6AddrPrefs, 4},
	{unix.SOL_IPV6, unix.IPV6_DONTFRAG, 4},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, 4},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_HOPS, 4},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_LOOP, 4},
	{unix.SOL_IPV6, ipv6MulticastAll, 4},
	{unix.SOL_IPV6, unix.IPV6_HOPOPTS, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_RTHDRDSTOPTS, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_RTHDR, maxExtension},
	{unix.SOL_IPV6, unix.IPV6_DSTOPTS, maxExtension},
})

// udp is UDP and UDP-Lite over IPv4 and IPv6 (udp(7), udplite(7)).
var udp = family{
	types: [][2]int32{{unix.SOCK_DGRAM, unix.IPPROTO_UDP}, {unix.SOCK_DGRAM, unix.IPPROTO_UDPLITE}},
	options: slices.Concat(packetOptions, []option{
		{unix.SOL_UDP, unix.UDP_ENCAP, 4},
		{unix.SOL_UDP, unix.UDP_NO_CHECK6_TX, 4},
		{unix.SOL_UDP, unix.UDP_NO_CHECK6_RX, 4},
		{unix.SOL_UDP, unix.UDP_SEGMENT, 4},
		{unix.SOL_UDP, unix.UDP_GRO, 4},
		{solUDPLite, udpLiteSendCover, 4},
		{solUDPLite, udpLiteRecvCover, 4},
	}),
	fresh: true,
	read: func(in *Inside, fd int, _ uint64, s *image.Socket) error {
		cork, err := get(fd, unix.SOL_UDP, udpCork, make([]byte, 4))
		if err != nil {
			return err
		}
		if len(cork) > 0 && cork[0] != 0 {
			return fail.Refuse("", "it holds a datagram back (UDP_CORK), which the kernel does not tell", "let the program send it")
		}
		return readPacketSocket(in, fd, s)
	},
	prepare: prepareIP,
	settle:  settlePackets,
}

// readPacketSocket reads what UDP, ping and raw sockets have in common.
func readPacketSocket(in *Inside, fd int, s *image.Socket) error {
	peer, err := peerAddress(fd)
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		return err
	}
	s.Peer = peer
	return readGroups(in, fd, s)
}

// settlePackets connects a bound socket and makes it a member of its groups.
func settlePackets(b *tracee.Batch, fd int, s *image.Socket) {
	settleIP(b, fd, s)
	if s.Peer != nil {
		b.Add(unix.SYS_CONNECT, tracee.W(fd), b.Put(s.Peer), tracee.W(len(s.Peer)))
	}
	joinGroups(b, fd, s)
}

// waiting reports whether there is something to be read, or an error to be told.
func waiting(fd int) (data, failed bool, err error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return false, false, fmt.Errorf("poll: %w", err)
	}
	return fds[0].Revents&unix.POLLIN != 0, fds[0].Revents&unix.POLLERR != 0, nil
}
