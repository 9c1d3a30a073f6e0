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

// ipOptions are those of sockets over IPv4 and IPv6, whatever the protocol
// (ip(7), ipv6(7)). Sockets of IPv6 have both levels; the kernel keeps
// IPV6_FREEBIND and IPV6_TRANSPARENT where it keeps those of IPv4.
var ipOptions = []option{
	{unix.SOL_IPV6, unix.IPV6_V6ONLY, 4},
	{unix.SOL_IP, unix.IP_TOS, 4},
	{unix.SOL_IP, unix.IP_TTL, 4},
	{unix.SOL_IP, unix.IP_MINTTL, 4},
	{unix.SOL_IP, unix.IP_MTU_DISCOVER, 4},
	{unix.SOL_IP, unix.IP_TRANSPARENT, 4},
	{unix.SOL_IP, unix.IP_FREEBIND, 4},
	{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 4},
	{unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, 4},
	{unix.SOL_IP, unix.IP_PKTINFO, 4},
	{unix.SOL_IP, unix.IP_RECVERR, 4},
	{unix.SOL_IP, unix.IP_RECVTTL, 4},
	{unix.SOL_IP, unix.IP_RECVTOS, 4},
	{unix.SOL_IPV6, unix.IPV6_TCLASS, 4},
	{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, 4},
	{unix.SOL_IPV6, unix.IPV6_MINHOPCOUNT, 4},
	{unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, 4},
	{unix.SOL_IPV6, unix.IPV6_AUTOFLOWLABEL, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVERR, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 4},
	{unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 4},
}

// udp is UDP over IPv4 and IPv6, as far as there is no peer.
var udp = family{
	types:   [][2]int32{{unix.SOCK_DGRAM, unix.IPPROTO_UDP}},
	options: ipOptions,
	fresh:   true,
	read: func(_ *Inside, fd int, _ uint64, _ *image.Socket) error {
		if err := unconnected(fd); err != nil {
			return err
		}
		return emptyQueue(fd)
	},
	prepare: prepareIP,
	settle:  settleIP,
}

// prepareIP: the address may belong to a device that comes up later, or be still
// tentative: free binding takes it all the same.
func prepareIP(b *tracee.Batch, fd int, _ *image.Socket) { freebind(b, fd, 1) }

func settleIP(b *tracee.Batch, fd int, s *image.Socket) {
	own := func(o image.SocketOpt) bool { return o.Level == unix.SOL_IP && o.Name == unix.IP_FREEBIND }
	if !slices.ContainsFunc(s.Options, own) {
		freebind(b, fd, 0)
	}
}

func freebind(b *tracee.Batch, fd int, on uint32) {
	value := make([]byte, 4)
	put32(value, on)
	setOption(b, fd, unix.SOL_IP, unix.IP_FREEBIND, value)
}

func emptyQueue(fd int) error {
	// SIOCINQ would not tell a datagram of no bytes from none.
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll: %w", err)
	}
	if fds[0].Revents&(unix.POLLIN|unix.POLLERR) != 0 {
		return fail.Refuse("", "datagrams wait to be read; they are not supported yet", "let the program read them")
	}
	return nil
}
