package sock

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// maxDatagrams bounds the bytes of datagrams that are kept of one socket.
const maxDatagrams = 16 << 20

func isUDP(s *image.Socket) bool {
	return slices.Contains(udp.types, [2]int32{s.Type, s.Protocol}) && (s.Family == unix.AF_INET || s.Family == unix.AF_INET6)
}

// Queues reports whether a socket receives single packets.
func Queues(s *image.Socket) bool {
	return isUDP(s) || s.Family == unix.AF_PACKET || s.Family == unix.AF_NETLINK || familyOf(s) == &ping || familyOf(s) == &raw
}

// ReadQueue records the datagrams that wait at a socket. It is called when nobody
// else reads from it. Of other sockets than UDP's only the first message can be
// looked at: theirs are dropped, as any network may.
func ReadQueue(fd int, s *image.Socket, warn func(format string, args ...any)) error {
	data, failed, err := waiting(fd)
	if err != nil {
		return err
	}
	if s.Family == unix.AF_NETLINK && (data || failed) {
		return readLost(fd, s, warn)
	}
	if failed {
		warn("errors that wait at a socket are left out (%s)", Name(s))
	}
	if !data {
		return nil
	}
	if !isUDP(s) {
		warn("packets that wait at a socket are left out (%s)", Name(s))
		return nil
	}
	unsent, err := unix.IoctlGetInt(fd, unix.TIOCOUTQ)
	if err == nil && unsent > 0 {
		err = fail.Refuse("", "it holds a datagram back (MSG_MORE), or one is still being sent", "try again")
	}
	if err != nil {
		return err
	}
	return peekAll(fd, s)
}

// Name is how messages name a socket that has no connection.
func Name(s *image.Socket) string {
	kind := map[*family]string{&udp: "udp", &ping: "icmp", &raw: "raw", &packet: "packet"}[familyOf(s)]
	if len(s.Address) >= 16 && s.Family != unix.AF_PACKET {
		return kind + " " + addressOf(s.Address).String()
	}
	return kind
}

// peekAll looks at every datagram: behind SO_PEEK_OFF a look goes on where the
// last one ended (socket(7)).
func peekAll(fd int, s *image.Socket) error {
	before, err := number(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0); err != nil {
		return fmt.Errorf("SO_PEEK_OFF: %w", err)
	}
	err = peekEach(fd, s)
	return errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, before))
}

func peekEach(fd int, s *image.Socket) error {
	buf, control := make([]byte, 1<<16), make([]byte, 1024)
	total := 0
	for {
		n, oobn, from, err := glance(fd, buf, control)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look at a datagram: %w", err)
		}
		d := image.Datagram{From: from}
		segment, err := readControl(control[:oobn], &d)
		if err != nil {
			return err
		}
		if total += n; total > maxDatagrams {
			return fail.Refuse("", fmt.Sprintf("more than %d bytes of datagrams wait to be read", maxDatagrams), "let the program read them")
		}
		if segment <= 0 || segment >= n {
			segment = max(n, 1)
		}
		for at := 0; at == 0 || at < n; at += segment { // of several that were made one (UDP_GRO)
			one := d
			one.Data = slices.Clone(buf[at:min(at+segment, n)])
			s.Datagrams = append(s.Datagrams, one)
		}
	}
}

// glance is recvmsg(2) with the sender's raw address.
func glance(fd int, buf, control []byte) (n, oobn int, from []byte, err error) {
	n, oobn, _, sa, err := unix.Recvmsg(fd, buf, control, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != nil {
		return 0, 0, nil, err
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		from = rawAddress(netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)))
	case *unix.SockaddrInet6:
		from = rawAddress6(a)
	}
	return n, oobn, from, nil
}

// rawAddress6 is a struct sockaddr_in6, with its scope.
func rawAddress6(a *unix.SockaddrInet6) []byte {
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, uint16(a.Port))
	b = append(append(b, 0, 0, 0, 0), a.Addr[:]...)
	return binary.NativeEndian.AppendUint32(b, a.ZoneId)
}

// readControl notes what the program asks for with each datagram, and returns the
// size of the segments it consists of.
func readControl(control []byte, d *image.Datagram) (segment int, err error) {
	list, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, err
	}
	for _, m := range list {
		switch [2]int{int(m.Header.Level), int(m.Header.Type)} {
		case [2]int{unix.SOL_IP, unix.IP_PKTINFO}: // struct in_pktinfo: device, local address, address in the header
			if len(m.Data) >= 12 {
				d.Device, d.To = int32(binary.NativeEndian.Uint32(m.Data)), slices.Clone(m.Data[8:12])
			}
		case [2]int{unix.SOL_IPV6, unix.IPV6_PKTINFO}:
			if len(m.Data) >= 20 {
				d.Device, d.To = int32(binary.NativeEndian.Uint32(m.Data[16:])), slices.Clone(m.Data[:16])
			}
		case [2]int{unix.SOL_IP, unix.IP_RECVORIGDSTADDR}:
			if len(m.Data) >= 8 {
				d.To = slices.Clone(m.Data[4:8])
			}
		case [2]int{unix.SOL_IPV6, ipv6RecvOrigDst}:
			if len(m.Data) >= 24 {
				d.To = slices.Clone(m.Data[8:24])
			}
		case [2]int{unix.SOL_IP, unix.IP_TTL}, [2]int{unix.SOL_IPV6, unix.IPV6_HOPLIMIT}:
			d.TTL = m.Data[0]
		case [2]int{unix.SOL_IP, unix.IP_TOS}, [2]int{unix.SOL_IPV6, unix.IPV6_TCLASS}:
			d.Service = m.Data[0]
		case [2]int{unix.SOL_UDP, unix.UDP_GRO}:
			segment = int(binary.NativeEndian.Uint16(m.Data))
		}
	}
	return segment, nil
}

// Refill puts datagrams back into sockets that are bound, from where they came:
// each is a packet that never leaves the namespace, sent with its own source to an
// address of the namespace. The kernel does not check the source of what comes
// back by the loopback with its route (ip_rcv_finish in net/ipv4/ip_input.c).
func Refill(netns string, sockets []Waiting, warn func(msg string, args ...any)) error {
	return nsutil.Inside(netns, func() error {
		r := &refiller{fds: map[int]int{}}
		defer r.close()
		for i := range sockets {
			w, s := &sockets[i], sockets[i].Record
			for i := range s.Datagrams {
				err := r.send(s, &s.Datagrams[i])
				if err == nil {
					err = w.arrived()
				}
				if err != nil {
					warn("datagrams that waited are lost", "socket", Name(s), "from", addressOf(s.Datagrams[i].From), "count", len(s.Datagrams)-i, "error", err)
					break
				}
			}
		}
		return nil
	})
}

// Waiting is a socket whose datagrams are put back.
type Waiting struct {
	File   *os.File
	Record *image.Socket
	queued uint32 // bytes of memory that its queue takes
}

// arrived makes sure that a datagram more is in the queue. Packet filters drop
// without a word; over the loopback all others are there when they have been sent,
// or as soon as the kernel has a moment.
func (w *Waiting) arrived() error {
	const patience = 20 * time.Millisecond
	for begin := time.Now(); ; time.Sleep(100 * time.Microsecond) {
		info, err := get(int(w.File.Fd()), unix.SOL_SOCKET, unix.SO_MEMINFO, make([]byte, 4)) // SK_MEMINFO_RMEM_ALLOC
		if err != nil || len(info) < 4 {
			return err
		}
		if now := binary.NativeEndian.Uint32(info); now > w.queued {
			w.queued = now
			return nil
		}
		if time.Since(begin) > patience {
			return errors.New("it does not arrive: does a packet filter (nftables) drop it?")
		}
	}
}

// refiller has raw sockets, by family.
type refiller struct{ fds map[int]int }

func (r *refiller) close() {
	for _, fd := range r.fds {
		_ = unix.Close(fd)
	}
}

func (r *refiller) socket(family int) (int, error) {
	if fd, ok := r.fds[family]; ok {
		return fd, nil
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, err
	}
	r.fds[family] = fd
	return fd, errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, HoldMark)) // passes what is held off
}

func (r *refiller) send(s *image.Socket, d *image.Datagram) error {
	from, local := addressOf(d.From), addressOf(s.Address)
	to, err := destination(s, d, from.Addr().Unmap(), local.Addr().Unmap())
	if err != nil {
		return err
	}
	source := from.Addr().Unmap()
	p := datagram(s.Protocol, netip.AddrPortFrom(source, from.Port()), netip.AddrPortFrom(to, local.Port()), d)
	device := d.Device
	for _, o := range s.Options {
		if o.Level == unix.SOL_SOCKET && o.Name == unix.SO_BINDTODEVICE {
			link, err := netlink.LinkByName(unix.ByteSliceToString(o.Value))
			if err != nil {
				return err
			}
			device = int32(link.Attrs().Index)
		}
	}
	if to.Is4() {
		fd, err := r.socket(unix.AF_INET)
		if err != nil {
			return err
		}
		// The device that a route was asked for is the one it is seen to come in by
		// (rt_iif in net/ipv4/route.c).
		_, err = unix.SendmsgN(fd, p, unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: device}), &unix.SockaddrInet4{Addr: to.As4()}, 0)
		return err
	}
	fd, err := r.socket(unix.AF_INET6)
	if err != nil {
		return err
	}
	zone := uint32(0)
	if to.IsLinkLocalUnicast() || to.IsMulticast() {
		zone = uint32(device)
	}
	_, err = unix.SendmsgN(fd, p, nil, &unix.SockaddrInet6{Addr: to.As16(), ZoneId: zone}, 0)
	return err
}

// destination chooses an address of the namespace that the socket gets datagrams
// for: the one that this was sent to, where the program can see it.
func destination(s *image.Socket, d *image.Datagram, from, local netip.Addr) (netip.Addr, error) {
	to := local
	if a, ok := netip.AddrFromSlice(d.To); ok {
		to = a.Unmap()
	}
	if to.IsUnspecified() || !to.IsValid() || to.Is4() != from.Is4() {
		switch {
		case from.Is4():
			to = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		case from.IsLinkLocalUnicast():
			zone := int(binary.NativeEndian.Uint32(d.From[scopeAt:]))
			link, err := netlink.LinkByIndex(zone)
			if err != nil {
				return to, err
			}
			list, err := netlink.AddrList(link, netlink.FAMILY_V6)
			if err != nil || len(list) == 0 {
				return to, errors.Join(err, errors.New("the device has no address"))
			}
			to, _ = netip.AddrFromSlice(list[0].IP)
		default:
			to = netip.IPv6Loopback()
		}
	}
	if to.IsMulticast() {
		return to, nil // with a time to live of 0 it goes nowhere else
	}
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil {
		return to, err
	}
	if len(routes) == 0 || routes[0].Type != unix.RTN_LOCAL {
		return to, fmt.Errorf("%s is no address of the container any more", to)
	}
	return to, nil
}

const (
	ip4Header, ip6Header, udpHeader = 20, 40, 8
	usualTTL                        = 64
)

// datagram is the packet of a datagram.
func datagram(protocol int32, from, to netip.AddrPort, d *image.Datagram) []byte {
	length := udpHeader + len(d.Data)
	ttl := d.TTL
	if ttl == 0 {
		ttl = usualTTL
	}
	if to.Addr().IsMulticast() {
		ttl = 0
	}
	be := binary.BigEndian
	var p []byte
	if to.Addr().Is4() {
		p = make([]byte, ip4Header, ip4Header+length)
		p[0], p[1], p[8], p[9] = 0x45, d.Service, ttl, byte(protocol)
		be.PutUint16(p[2:], uint16(ip4Header+length))
		copy(p[12:], from.Addr().AsSlice())
		copy(p[16:], to.Addr().AsSlice())
	} else {
		p = make([]byte, ip6Header, ip6Header+length)
		be.PutUint32(p, 6<<28|uint32(d.Service)<<20)
		be.PutUint16(p[4:], uint16(length))
		p[6], p[7] = byte(protocol), ttl
		copy(p[8:], from.Addr().AsSlice())
		copy(p[24:], to.Addr().AsSlice())
	}
	at := len(p)
	p = be.AppendUint16(p, from.Port())
	p = be.AppendUint16(p, to.Port())
	p = be.AppendUint16(p, uint16(length)) // of UDP-Lite: how much the checksum covers
	p = append(p, 0, 0)
	p = append(p, d.Data...)
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, byte(protocol), byte(length >> 8), byte(length)}, p[at:])
	be.PutUint16(p[at+6:], cmp.Or(checksum(pseudo), 0xffff)) // 0 would be none
	return p
}
