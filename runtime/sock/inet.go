package sock

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
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

// prepareIP: the address may belong to a device that comes up later, or be still
// tentative: free binding takes it all the same.
func prepareIP(b *tracee.Batch, fd int, s *image.Socket) { freebind(b, fd, s, 1) }

func settleIP(b *tracee.Batch, fd int, s *image.Socket) {
	own := func(o image.SocketOpt) bool {
		return o.Level == unix.SOL_IP && o.Name == unix.IP_FREEBIND || o.Level == unix.SOL_IPV6 && o.Name == unix.IPV6_FREEBIND
	}
	if !slices.ContainsFunc(s.Options, own) {
		freebind(b, fd, s, 0)
	}
}

// freebind is the same option at both levels; raw sockets of IPv6 have one of them.
func freebind(b *tracee.Batch, fd int, s *image.Socket, on uint32) {
	value := make([]byte, 4)
	put32(value, on)
	if s.Family == unix.AF_INET6 {
		setOption(b, fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, value)
	} else {
		setOption(b, fd, unix.SOL_IP, unix.IP_FREEBIND, value)
	}
}
