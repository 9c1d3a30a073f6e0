package sock

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

const (
	solRaw       = 255
	icmpFilter   = 1  // ICMP_FILTER, and ICMPV6_FILTER likewise
	ipv6Checksum = 7  // IPV6_CHECKSUM
	ipv6HdrIncl  = 36 // IPV6_HDRINCL
)

// ping is ICMP by programs without rights (icmp(7)).
var ping = family{
	types:   [][2]int32{{unix.SOCK_DGRAM, unix.IPPROTO_ICMP}, {unix.SOCK_DGRAM, unix.IPPROTO_ICMPV6}},
	options: packetOptions,
	fresh:   true,
	read:    func(in *Inside, fd int, _ uint64, s *image.Socket) error { return readPacketSocket(in, fd, s) },
	prepare: prepareIP,
	settle:  settlePackets,
}

// raw is raw(7), of any protocol.
var raw = family{
	// Its protocol stands for a port, and IPV6_V6ONLY is not for who has one.
	options: slices.Concat(slices.DeleteFunc(slices.Clone(packetOptions), func(o option) bool { return o.level == unix.SOL_IPV6 && o.name == unix.IPV6_V6ONLY }), []option{
		{unix.SOL_IP, unix.IP_HDRINCL, 4},
		{unix.SOL_IP, unix.IP_NODEFRAG, 4},
		{unix.SOL_IPV6, unix.IPV6_FREEBIND, 4},
		{unix.SOL_IPV6, ipv6HdrIncl, 4},
		{unix.SOL_IPV6, ipv6Checksum, 4},
		{solRaw, icmpFilter, 4},
		{unix.SOL_ICMPV6, icmpFilter, 32},
	}),
	fresh:   true,
	read:    func(in *Inside, fd int, _ uint64, s *image.Socket) error { return readPacketSocket(in, fd, s) },
	prepare: prepareIP,
	settle:  settlePackets,
}
