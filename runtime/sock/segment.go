package sock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

// Flags of a TCP header.
const (
	flagFIN = 1
	flagRST = 4
	flagACK = 16
)

// Segment is a segment without data that a connection is to take for its peer's.
type Segment struct {
	From, To netip.AddrPort
	Seq, Ack uint32
	Window   uint16
	Flags    byte
}

// segment is one from the peer of the connection, as its socket stands now.
func (r *Remade) segment() (*Segment, error) {
	to, err := boundAddress(r.fd())
	if err != nil {
		return nil, err
	}
	peer := r.Record.TCP.Peer
	if r.Record.TCP.State == tcpClose {
		peer = r.nobody()
	}
	return &Segment{From: addressOf(peer), To: addressOf(to)}, nil
}

// addressOf reads a struct sockaddr of IPv4 or IPv6.
func addressOf(raw []byte) netip.AddrPort {
	if len(raw) < 2 {
		return netip.AddrPort{}
	}
	switch family := binary.NativeEndian.Uint16(raw); {
	case family == unix.AF_INET && len(raw) >= unix.SizeofSockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), binary.BigEndian.Uint16(raw[2:]))
	case family == unix.AF_INET6 && len(raw) >= unix.SizeofSockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(raw[8:24])), binary.BigEndian.Uint16(raw[2:]))
	}
	return netip.AddrPort{}
}

// rawAddress is the struct sockaddr of an address.
func rawAddress(a netip.AddrPort) []byte {
	size, family, at := unix.SizeofSockaddrInet4, uint16(unix.AF_INET), 4
	if a.Addr().Is6() {
		size, family, at = unix.SizeofSockaddrInet6, unix.AF_INET6, 8
	}
	raw := make([]byte, size)
	binary.NativeEndian.PutUint16(raw, family)
	binary.BigEndian.PutUint16(raw[2:], a.Port())
	copy(raw[at:], a.Addr().AsSlice())
	return raw
}

// Readdress is a struct sockaddr of IPv4 or IPv6 with another address, if the map has
// one for it. An address of IPv4 may stand in one of IPv6.
func Readdress(raw []byte, to map[netip.Addr]netip.Addr) []byte {
	at := addressOf(raw)
	now, ok := to[at.Addr().Unmap()]
	if !ok {
		return raw
	}
	out := slices.Clone(raw)
	switch {
	case at.Addr().Is4():
		copy(out[4:8], now.AsSlice())
	case now.Is4():
		mapped := now.As16()
		copy(out[8:24], mapped[:])
	default:
		copy(out[8:24], now.AsSlice())
	}
	return out
}

func describeRaw(raw []byte) string {
	a := addressOf(raw)
	if !a.IsValid() {
		return "nobody any more"
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String()
}

// Inject sends a segment to a socket of this machine, in the network namespace of
// the calling thread, as if it came from the peer: through a raw socket, which
// takes any sender, and loopback, which is where a packet to a local address goes.
// The mark lets it pass the table that holds the peer's own ones (Hold).
func Inject(seg *Segment) error {
	from, to := seg.From.Addr().Unmap(), seg.To.Addr().Unmap()
	domain, protocol := unix.AF_INET, unix.IPPROTO_RAW
	var dest unix.Sockaddr = &unix.SockaddrInet4{Addr: four(to)}
	if to.Is6() {
		domain, dest = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.As16()}
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_MARK, HoldMark); err != nil {
		return err
	}
	if err := unix.Sendto(fd, seg.packet(from, to), 0, dest); err != nil {
		return fmt.Errorf("a segment from %s to %s: %w", seg.From, seg.To, err)
	}
	return nil
}

func four(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

// packet is the segment with an IP header before it (RFC 791, 8200, 9293).
func (s *Segment) packet(from, to netip.Addr) []byte {
	const headerLength = 20
	be := binary.BigEndian
	tcp := make([]byte, headerLength)
	be.PutUint16(tcp, s.From.Port())
	be.PutUint16(tcp[2:], s.To.Port())
	be.PutUint32(tcp[4:], s.Seq)
	be.PutUint32(tcp[8:], s.Ack)
	tcp[12], tcp[13] = headerLength/4<<4, s.Flags
	be.PutUint16(tcp[14:], s.Window)
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, headerLength}, tcp)
	be.PutUint16(tcp[16:], checksum(pseudo))
	var ip []byte
	if from.Is4() {
		ip = []byte{0x45, 0, 0, 2 * headerLength, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0} // its checksum is the kernel's to fill in
	} else {
		ip = []byte{0x60, 0, 0, 0, 0, headerLength, unix.IPPROTO_TCP, 64}
	}
	return slices.Concat(ip, from.AsSlice(), to.AsSlice(), tcp)
}

// checksum is that of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for pair := range slices.Chunk(b, 2) {
		sum += uint32(pair[0]) << 8
		if len(pair) > 1 {
			sum += uint32(pair[1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// NeedsLoopback reports whether a connection can be made again only through
// loopback: by a segment, or to nobody.
func NeedsLoopback(s *image.Socket) bool {
	return s.TCP.State == tcpFinWait2 || s.TCP.State == tcpClose || finReceived(s.TCP.State)
}

// RaiseLoopback brings loopback up in a network namespace where it is down, and
// returns how to take it down again.
func RaiseLoopback(netns string) (lower func() error, err error) {
	lower = func() error { return nil }
	err = nsutil.Inside(netns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		if lo.Attrs().RawFlags&unix.IFF_UP != 0 {
			return nil
		}
		before, err := netlink.AddrList(lo, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		lower = func() error { return nsutil.Inside(netns, func() error { return lowerLoopback(lo, before) }) }
		return netlink.LinkSetUp(lo)
	})
	return lower, err
}

// lowerLoopback also takes away the addresses that came by themselves; those of
// IPv6 go with the link.
func lowerLoopback(lo netlink.Link, before []netlink.Addr) error {
	now, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	for i := range now {
		if !slices.ContainsFunc(before, func(a netlink.Addr) bool { return a.Equal(now[i]) }) {
			err = errors.Join(err, netlink.AddrDel(lo, &now[i]))
		}
	}
	return errors.Join(err, netlink.LinkSetDown(lo))
}
