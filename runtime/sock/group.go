package sock

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// membership is a multicast group on a device, which somebody has joined.
type membership struct {
	device  int32
	address netip.Addr
}

// memberships lists the groups that any socket of the network namespace may have
// joined (net/ipv4/igmp.c, net/ipv6/mcast.c).
func (in *Inside) memberships() ([]membership, error) {
	if in.joined != nil {
		return in.joined, nil
	}
	in.joined = []membership{}
	err := nsutil.Inside(in.NetNS, func() error {
		for name, parse := range map[string]func(string) []membership{"igmp": parseIGMP, "igmp6": parseIGMP6} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			in.joined = append(in.joined, parse(string(b))...)
		}
		return nil
	})
	return in.joined, err
}

// parseIGMP reads lines of a device, "2 eth0 : 1 V3", and of its groups, whose
// addresses are numbers of the machine's: "010000E0 1 0:00000000 0".
func parseIGMP(text string) (out []membership) {
	device := 0
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) > 1 && !strings.HasPrefix(line, "\t") {
			device, _ = strconv.Atoi(f[0])
			continue
		}
		if len(f) == 0 {
			continue
		}
		if n, err := strconv.ParseUint(f[0], 16, 32); err == nil {
			a := netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, uint32(n))))
			if a != netip.AddrFrom4([4]byte{224, 0, 0, 1}) { // all hosts, which the kernel is in
				out = append(out, membership{int32(device), a})
			}
		}
	}
	return out
}

// parseIGMP6 reads "2 eth0 ff0200000000000000000000000000fb 1 0000000C 0".
func parseIGMP6(text string) (out []membership) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		device, err := strconv.Atoi(f[0])
		raw, e := hex.DecodeString(f[2])
		if err == nil && e == nil && len(raw) == 16 {
			out = append(out, membership{int32(device), netip.AddrFrom16([16]byte(raw))})
		}
	}
	return out
}

// Of struct group_filter of include/uapi/linux/in.h: where its fields are.
const (
	filterGroup   = 8
	filterMode    = filterGroup + storage
	filterCount   = filterMode + 4
	filterSources = filterCount + 4
	storage       = 128 // sizeof(struct sockaddr_storage)
	maxSources    = 256
)

// readGroups records which groups a socket is in, and whom it listens to there.
// The kernel lists nobody's memberships, but answers a question about each.
func readGroups(in *Inside, fd int, s *image.Socket) error {
	all, err := in.memberships()
	if err != nil {
		return err
	}
	for _, g := range all {
		level := unix.SOL_IP
		if g.address.Is6() {
			level = unix.SOL_IPV6
		}
		if level == unix.SOL_IPV6 && s.Family != unix.AF_INET6 {
			continue
		}
		buf := groupFilter(image.SocketGroup{Device: g.device, Address: rawAddress(netip.AddrPortFrom(g.address, 0))}, maxSources)
		binary.NativeEndian.PutUint32(buf[filterCount:], maxSources)
		n := uint32(len(buf))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), unix.MCAST_MSFILTER, uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
		if errno == unix.EADDRNOTAVAIL || errno == unix.ENODEV || errno == unix.EINVAL || errno == unix.ENOPROTOOPT {
			continue // it is not in that one
		}
		if errno != 0 {
			return fmt.Errorf("sources of a multicast group: %w", errno)
		}
		sources := int(binary.NativeEndian.Uint32(buf[filterCount:]))
		if sources > maxSources {
			return fail.Refuse("", fmt.Sprintf("it has %d sources in multicast group %s; more than %d are not supported", sources, g.address, maxSources), "")
		}
		one := image.SocketGroup{
			Device: g.device, Address: rawAddress(netip.AddrPortFrom(g.address, 0)),
			Only: binary.NativeEndian.Uint32(buf[filterMode:]) == unix.MCAST_INCLUDE,
		}
		for i := range sources {
			one.Sources = append(one.Sources, slices.Clone(buf[filterSources+i*storage:][:len(one.Address)]))
		}
		s.Groups = append(s.Groups, one)
	}
	return nil
}

// groupFilter is a struct group_filter with room for sources.
func groupFilter(g image.SocketGroup, room int) []byte {
	b := make([]byte, filterSources+room*storage)
	binary.NativeEndian.PutUint32(b, uint32(g.Device))
	copy(b[filterGroup:filterMode], g.Address)
	mode := uint32(unix.MCAST_EXCLUDE)
	if g.Only {
		mode = unix.MCAST_INCLUDE
	}
	binary.NativeEndian.PutUint32(b[filterMode:], mode)
	binary.NativeEndian.PutUint32(b[filterCount:], uint32(len(g.Sources)))
	for i, source := range g.Sources {
		copy(b[filterSources+i*storage:][:storage], source)
	}
	return b
}

// joinGroups adds the calls that make a socket a member again.
func joinGroups(b *tracee.Batch, fd int, s *image.Socket) {
	for _, g := range s.Groups {
		level := unix.SOL_IP
		if familyOfAddress(g.Address) == unix.AF_INET6 {
			level = unix.SOL_IPV6
		}
		filter := groupFilter(g, len(g.Sources))
		setOption(b, fd, level, unix.MCAST_JOIN_GROUP, filter[:filterMode]) // begins as struct group_req
		if g.Only || len(g.Sources) > 0 {
			setOption(b, fd, level, unix.MCAST_MSFILTER, filter)
		}
	}
}

func familyOfAddress(a []byte) int {
	if len(a) < 2 {
		return 0
	}
	return int(binary.NativeEndian.Uint16(a))
}

// Numbers of devices in a socket's record.
const scopeAt = 24 // sin6_scope_id in struct sockaddr_in6

// deviceOptions hold a number of a device, some in network byte order.
var deviceOptions = map[option]binary.ByteOrder{
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, 4}: binary.NativeEndian,
	{unix.SOL_IP, unix.IP_UNICAST_IF, 4}:       binary.BigEndian,
	{unix.SOL_IPV6, unix.IPV6_UNICAST_IF, 4}:   binary.BigEndian,
}

// eachDevice calls f for every number of a device in a record, and puts in what
// it returns.
func eachDevice(s *image.Socket, f func(index int32) (int32, error)) error {
	change := func(b []byte, order binary.ByteOrder) error {
		index, err := f(int32(order.Uint32(b)))
		order.PutUint32(b, uint32(index))
		return err
	}
	var errs error
	addresses := [][]byte{s.Address, s.Peer}
	for i := range s.Datagrams {
		addresses = append(addresses, s.Datagrams[i].From)
	}
	for _, a := range addresses {
		switch familyOfAddress(a) {
		case unix.AF_INET6:
			if len(a) >= scopeAt+4 {
				errs = errors.Join(errs, change(a[scopeAt:], binary.NativeEndian))
			}
		case unix.AF_PACKET:
			if len(a) >= 8 {
				errs = errors.Join(errs, change(a[4:], binary.NativeEndian)) // sll_ifindex
			}
		}
	}
	for i := range s.Groups {
		index, err := f(s.Groups[i].Device)
		s.Groups[i].Device = index
		errs = errors.Join(errs, err)
	}
	for i := range s.Datagrams {
		index, err := f(s.Datagrams[i].Device)
		s.Datagrams[i].Device = index
		errs = errors.Join(errs, err)
	}
	for _, o := range s.Options {
		if order := deviceOptions[option{int(o.Level), int(o.Name), len(o.Value)}]; order != nil {
			errs = errors.Join(errs, change(o.Value, order))
		}
	}
	return errs
}

// nameDevices records the names of the devices whose numbers stand in a record: at
// the restore they may have others.
func (in *Inside) nameDevices(s *image.Socket) error {
	return eachDevice(s, func(index int32) (int32, error) {
		if index == 0 || slices.ContainsFunc(s.Devices, func(d image.SocketDevice) bool { return d.Index == index }) {
			return index, nil
		}
		names, err := deviceNames(in.NetNS)
		if err != nil {
			return index, err
		}
		for name, i := range names {
			if i == index {
				s.Devices = append(s.Devices, image.SocketDevice{Index: index, Name: name})
			}
		}
		return index, nil // one that is gone has no name
	})
}

func deviceNames(netns string) (map[string]int32, error) {
	names := map[string]int32{}
	err := nsutil.Inside(netns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names[l.Attrs().Name] = int32(l.Attrs().Index)
		}
		return err
	})
	return names, err
}

// Renumber gives the sockets of an image the numbers that devices have in the
// network namespace that they are made in.
func Renumber(netns string, sockets []*image.Socket) error {
	var names map[string]int32
	for _, s := range sockets {
		if len(s.Devices) == 0 {
			continue
		}
		if names == nil {
			var err error
			if names, err = deviceNames(netns); err != nil {
				return err
			}
		}
		err := eachDevice(s, func(index int32) (int32, error) {
			i := slices.IndexFunc(s.Devices, func(d image.SocketDevice) bool { return d.Index == index })
			if i < 0 {
				return index, nil
			}
			to, ok := names[s.Devices[i].Name]
			if !ok {
				return index, fail.Refuse("network device "+s.Devices[i].Name, "a socket needs it and it is not there", "have the engine or a hook make it")
			}
			return to, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
