package network

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// device is a network device as the kernel tells it.
type device struct {
	index, flags uint32
	name, kind   string
	list         []attr
	info         []attr // of IFLA_LINKINFO
}

func (d *device) attr(kind uint16) *attr { return find(d.list, kind) }

// data are the attributes that devices of its kind have.
func (d *device) data() []attr {
	a := find(d.info, unix.IFLA_INFO_DATA)
	if a == nil {
		return nil
	}
	list, _ := attrs(a.data)
	return list
}

const skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS

// devices lists those of the calling thread's network namespace.
func devices() ([]*device, error) {
	// No counters: they are most of the work.
	all, err := dump(unix.NETLINK_ROUTE, unix.RTM_GETLINK, put(make([]byte, unix.SizeofIfInfomsg), number(unix.IFLA_EXT_MASK, skipStats)))
	if err != nil {
		return nil, fmt.Errorf("network devices: %w", err)
	}
	var out []*device
	for _, m := range all {
		d, err := parseDevice(m)
		if err != nil {
			return nil, fmt.Errorf("network devices: %w", err)
		}
		out = append(out, d)
	}
	return out, nil
}

func parseDevice(m []byte) (*device, error) {
	if len(m) < unix.SizeofIfInfomsg {
		return nil, errTruncated
	}
	d := &device{index: ne.Uint32(m[4:]), flags: ne.Uint32(m[8:])}
	var err error
	if d.list, err = attrs(m[unix.SizeofIfInfomsg:]); err != nil {
		return nil, err
	}
	if a := d.attr(unix.IFLA_IFNAME); a != nil {
		d.name = unix.ByteSliceToString(a.data)
	}
	if a := d.attr(unix.IFLA_LINKINFO); a != nil {
		if d.info, err = attrs(a.data); err != nil {
			return nil, err
		}
		if k := find(d.info, unix.IFLA_INFO_KIND); k != nil {
			d.kind = unix.ByteSliceToString(k.data)
		}
	}
	if d.flags&unix.IFF_LOOPBACK != 0 {
		d.kind = image.LinkLoopback
	}
	return d, nil
}

// linkFlags are those that can be set.
const linkFlags = unix.IFF_UP | unix.IFF_DEBUG | unix.IFF_NOTRAILERS | unix.IFF_NOARP | unix.IFF_PROMISC | unix.IFF_ALLMULTI |
	unix.IFF_MULTICAST | unix.IFF_PORTSEL | unix.IFF_AUTOMEDIA | unix.IFF_DYNAMIC

// Attributes of IFLA_INFO_DATA that cannot be set, or do something when they
// are: state, counters, what the device finds out (include/uapi/linux/if_link.h).
var readOnly = map[string][]uint16{
	"bridge": {
		unix.IFLA_BR_ROOT_ID, unix.IFLA_BR_BRIDGE_ID, unix.IFLA_BR_ROOT_PORT, unix.IFLA_BR_ROOT_PATH_COST, unix.IFLA_BR_TOPOLOGY_CHANGE,
		unix.IFLA_BR_TOPOLOGY_CHANGE_DETECTED, unix.IFLA_BR_HELLO_TIMER, unix.IFLA_BR_TCN_TIMER, unix.IFLA_BR_TOPOLOGY_CHANGE_TIMER,
		unix.IFLA_BR_GC_TIMER, unix.IFLA_BR_GROUP_ADDR, unix.IFLA_BR_FDB_FLUSH, brMcastQuerierState, brFDBLearned,
	},
	"macvlan": {macvlanCount, macvlanQueueUsed},
	"macvtap": {macvlanCount, macvlanQueueUsed},
	"dummy":   nil, "ifb": nil, "ipvlan": nil, "ipvtap": nil, "veth": nil, "vlan": nil, "vrf": nil,
}

const (
	brBoolOpt           = 46 // IFLA_BR_MULTI_BOOLOPT
	brMcastQuerierState = 47 // IFLA_BR_MCAST_QUERIER_STATE
	brFDBLearned        = 48 // IFLA_BR_FDB_N_LEARNED
	macvlanCount        = 6  // IFLA_MACVLAN_MACADDR_COUNT
	macvlanQueueUsed    = 8  // IFLA_MACVLAN_BC_QUEUE_LEN_USED
)

// Attributes of a bridge's port that cannot be set, or do something.
var portReadOnly = []uint16{
	unix.IFLA_BRPORT_STATE, unix.IFLA_BRPORT_FLUSH, unix.IFLA_BRPORT_ROOT_ID, unix.IFLA_BRPORT_BRIDGE_ID, unix.IFLA_BRPORT_DESIGNATED_PORT,
	unix.IFLA_BRPORT_DESIGNATED_COST, unix.IFLA_BRPORT_ID, unix.IFLA_BRPORT_NO, unix.IFLA_BRPORT_TOPOLOGY_CHANGE_ACK, unix.IFLA_BRPORT_CONFIG_PENDING,
	unix.IFLA_BRPORT_MESSAGE_AGE_TIMER, unix.IFLA_BRPORT_FORWARD_DELAY_TIMER, unix.IFLA_BRPORT_HOLD_TIMER,
	brportRingOpen, brportInOpen, brportHosts, brportGroups,
}

const (
	brportRingOpen = 35 // IFLA_BRPORT_MRP_RING_OPEN
	brportInOpen   = 36 // IFLA_BRPORT_MRP_IN_OPEN
	brportHosts    = 38 // IFLA_BRPORT_MCAST_EHT_HOSTS_CNT
	brportGroups   = 41 // IFLA_BRPORT_MCAST_N_GROUPS
)

func without(list []attr, kinds []uint16) []attr {
	return slices.DeleteFunc(slices.Clone(list), func(a attr) bool { return slices.Contains(kinds, a.number()) })
}

// commonLink are the attributes that any device can be made with.
var commonLink = []uint16{
	unix.IFLA_ADDRESS, unix.IFLA_MTU, unix.IFLA_TXQLEN, unix.IFLA_GROUP, unix.IFLA_GSO_MAX_SEGS, unix.IFLA_GSO_MAX_SIZE, unix.IFLA_GRO_MAX_SIZE,
	iflaGSOIPv4, iflaGROIPv4,
}

const (
	iflaGSOIPv4 = 63 // IFLA_GSO_IPV4_MAX_SIZE
	iflaGROIPv4 = 64 // IFLA_GRO_IPV4_MAX_SIZE
)

// describe makes a device's record. numbers are those under which the kernel
// knows other network namespaces here; of a veth whose other end lies in one of
// them that is returned too.
func (s *Scan) describe(sp *Space, d *device, numbers map[int32]*Space) (l *image.NetLink, far *Space, err error) {
	l = &image.NetLink{Index: int32(d.index), Name: d.name, Kind: d.kind, Flags: d.flags & linkFlags, Running: d.flags&unix.IFF_RUNNING != 0}
	elsewhere := d.attr(unix.IFLA_LINK_NETNSID)
	switch {
	case d.kind == image.LinkLoopback, s.usual.devices[d.name] == d.kind && d.kind != "":
		l.Change = put(nil, pick(d.list, unix.IFLA_MTU, unix.IFLA_TXQLEN)...)
		return l, nil, nil
	case d.kind == "":
		l.Outside = true
		return l, nil, nil
	case d.kind == "tun":
		s.describeTun(sp, d, l)
		return l, nil, nil
	case elsewhere != nil:
		if far = numbers[int32(elsewhere.u32())]; far == nil {
			l.Outside = true
			return l, nil, nil
		}
	}
	if err := d.supported(far != nil); err != nil {
		return nil, nil, fail.On("network device "+d.name, err)
	}
	if a := d.attr(unix.IFLA_LINK); a != nil && d.kind == "veth" {
		l.Peer = int32(a.u32())
	}
	l.Create, l.Change = d.create(), d.change()
	return l, far, nil
}

// supported refuses devices that cannot be made again.
func (d *device) supported(far bool) error {
	const remedy = "remove it before the checkpoint"
	if _, known := readOnly[d.kind]; !known {
		return fail.Refuse("", "devices of type "+d.kind+" are not supported", remedy)
	}
	if far && d.kind != "veth" {
		return fail.Refuse("", "it lies on a device of another network namespace; that is not supported yet", remedy)
	}
	if a := find(d.data(), unix.IFLA_BR_VLAN_FILTERING); d.kind == "bridge" && a != nil && a.data[0] != 0 {
		return fail.Refuse("", "it keeps VLANs apart (vlan_filtering), which is not supported yet", remedy)
	}
	if a := d.attr(unix.IFLA_XDP); a != nil {
		if x, _ := attrs(a.data); find(x, unix.IFLA_XDP_PROG_ID) != nil {
			return fail.Refuse("", "an XDP program is attached to it, and programs of BPF are not in the image", "detach it before the checkpoint")
		}
	}
	return nil
}

// create are the attributes that make a device again.
func (d *device) create() []byte {
	list := append(pick(d.list, commonLink...), pick(d.list, unix.IFLA_NUM_TX_QUEUES, unix.IFLA_NUM_RX_QUEUES)...)
	info := []attr{text(unix.IFLA_INFO_KIND, d.kind)}
	if d.kind != "veth" {
		list = append(list, pick(d.list, unix.IFLA_LINK)...)
		if data := onlyOn(without(d.data(), readOnly[d.kind]), d.kind); len(data) > 0 {
			info = append(info, nested(unix.IFLA_INFO_DATA, data...))
		}
	}
	return put(nil, append(list, nested(unix.IFLA_LINKINFO, info...))...)
}

// onlyOn makes a bridge's switches those that are on: the kernel tells all that
// it knows, but takes only those that it is built for.
func onlyOn(data []attr, kind string) []attr {
	if kind != "bridge" {
		return data
	}
	out := data[:0:0]
	for _, a := range data {
		switch {
		case a.number() == unix.IFLA_BR_VLAN_FILTERING && a.data[0] == 0, a.number() == brBoolOpt && a.u32() == 0:
			continue
		case a.number() == brBoolOpt && len(a.data) == 8: // struct br_boolopt_multi: values, a mask
			a.data = slices.Concat(a.data[:4], a.data[:4])
		}
		out = append(out, a)
	}
	return out
}

// change are the attributes that a device gets once all are there.
func (d *device) change() []byte {
	list := pick(d.list, unix.IFLA_MASTER, unix.IFLA_IFALIAS, unix.IFLA_PROP_LIST)
	slave, data := find(d.info, unix.IFLA_INFO_SLAVE_KIND), find(d.info, unix.IFLA_INFO_SLAVE_DATA)
	if slave != nil && data != nil && unix.ByteSliceToString(slave.data) == "bridge" {
		port, _ := attrs(data.data)
		list = append(list, nested(unix.IFLA_LINKINFO, *slave, nested(unix.IFLA_INFO_SLAVE_DATA, without(port, portReadOnly)...)))
	}
	if mode := d.addrGenMode(); mode != 0 {
		list = append(list, addrGenMode(mode))
	}
	return put(nil, list...)
}

// addrGenMode is how it makes IPv6 addresses of its own.
func (d *device) addrGenMode() uint8 {
	if spec := d.attr(unix.IFLA_AF_SPEC); spec != nil {
		families, _ := attrs(spec.data)
		if a := find(families, unix.AF_INET6); a != nil {
			six, _ := attrs(a.data)
			if m := find(six, unix.IFLA_INET6_ADDR_GEN_MODE); m != nil && len(m.data) > 0 {
				return m.data[0]
			}
		}
	}
	return 0
}

func addrGenMode(mode uint8) attr {
	return nested(unix.IFLA_AF_SPEC, nested(unix.AF_INET6, attr{unix.IFLA_INET6_ADDR_GEN_MODE, []byte{mode}}))
}

// lowerFirst orders devices so that each stands behind the one it lies on.
func lowerFirst(links []image.NetLink) ([]image.NetLink, error) {
	var out []image.NetLink
	done := map[int32]bool{}
	for len(links) > 0 {
		rest := links[:0:0]
		for _, l := range links {
			list, _ := attrs(l.Create)
			if a := find(list, unix.IFLA_LINK); a != nil && a.u32() != 0 && !done[int32(a.u32())] {
				rest = append(rest, l)
				continue
			}
			done[l.Index] = true
			out = append(out, l)
		}
		if len(rest) == len(links) {
			return nil, fail.Refuse("network device "+links[0].Name, "the device that it lies on cannot be found", "")
		}
		links = rest
	}
	return out, nil
}

// link makes the message of a device: number 0 lets the kernel choose.
func link(index int32, flags, change uint32, list ...attr) []byte {
	m := make([]byte, unix.SizeofIfInfomsg)
	ne.PutUint32(m[4:], uint32(index))
	ne.PutUint32(m[8:], flags)
	ne.PutUint32(m[12:], change)
	return put(m, list...)
}

// createLinks makes the devices that are not there, all of them down.
func (n *made) createLinks() error {
	for i := range n.rec.Links {
		l := &n.rec.Links[i]
		if n.index[l.Index] != 0 || l.Outside || l.Create == nil && l.Tun == nil {
			continue
		}
		var err error
		switch {
		case l.Tun != nil:
			err = n.createTun(l)
		case l.Kind == "veth":
			err = n.createPair(l)
		default:
			err = n.createLink(l)
		}
		if err == nil {
			err = n.look()
		}
		if err != nil {
			return fail.On("network device "+l.Name, err)
		}
	}
	return nil
}

// attributes are those of the image with the numbers that devices have here. Of
// what is not among known nothing is passed on.
func (n *made) attributes(b []byte, known ...uint16) ([]attr, error) {
	list, err := attrs(bytes.Clone(b))
	if err != nil {
		return nil, err
	}
	list = pick(list, known...)
	for _, a := range pick(list, unix.IFLA_LINK, unix.IFLA_MASTER) {
		to := n.index[int32(a.u32())]
		if len(a.data) != 4 || to == 0 && a.u32() != 0 {
			return nil, fmt.Errorf("device number %d, which it needs, is not there", a.u32())
		}
		ne.PutUint32(a.data, uint32(to))
	}
	return list, nil
}

// createKnown are the attributes that can stand in Create.
var createKnown = append(slices.Clone(commonLink), unix.IFLA_NUM_TX_QUEUES, unix.IFLA_NUM_RX_QUEUES, unix.IFLA_LINK, unix.IFLA_LINKINFO)

func (n *made) createLink(l *image.NetLink) error {
	list, err := n.attributes(l.Create, createKnown...)
	if err != nil {
		return err
	}
	return n.newLink(func(index int32) []byte {
		return link(index, 0, 0, append(list, text(unix.IFLA_IFNAME, l.Name))...)
	}, l.Index)
}

// newLink sends a request for a device, once more without its number if that is
// taken by now.
func (n *made) newLink(message func(index int32) []byte, index int32) error {
	const flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	err := n.route.one(request{unix.RTM_NEWLINK, flags, message(index)})
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
		err = n.route.one(request{unix.RTM_NEWLINK, flags, message(0)})
	}
	return n.allowed(err)
}

// createPair makes both ends of a veth(4). Of one whose ends lie in different
// namespaces the last of them to be made makes both.
func (n *made) createPair(l *image.NetLink) error {
	other := n
	if l.PeerNS != 0 {
		if other = n.maker.made[l.PeerNS]; other == nil {
			return nil // it will
		}
	}
	if other.index[l.Peer] != 0 {
		return errors.New("its other end is there already")
	}
	p := other.linkOf(l.Peer)
	if p == nil || p.Kind != "veth" {
		return errors.New("its other end is not in the image")
	}
	list, err := n.attributes(l.Create, commonLink...)
	if err != nil {
		return err
	}
	peer, err := other.attributes(p.Create, commonLink...)
	if err != nil {
		return err
	}
	by, err := n.between(other)
	if err != nil {
		return err
	}
	list = append(list, text(unix.IFLA_IFNAME, l.Name))
	peer = append(peer, text(unix.IFLA_IFNAME, p.Name))
	if by.here != 0 {
		list = append(list, number(unix.IFLA_NET_NS_FD, uint32(by.here)))
	}
	if by.there != 0 {
		peer = append(peer, number(unix.IFLA_NET_NS_FD, uint32(by.there)))
	}
	message := func(index, peerIndex int32) []byte {
		const vethInfoPeer = 1 // VETH_INFO_PEER of include/uapi/linux/veth.h
		data := attr{vethInfoPeer | unix.NLA_F_NESTED, link(peerIndex, 0, 0, peer...)}
		info := nested(unix.IFLA_LINKINFO, text(unix.IFLA_INFO_KIND, "veth"), nested(unix.IFLA_INFO_DATA, data))
		return link(index, 0, 0, append(slices.Clip(list), info)...)
	}
	const flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
	err = by.n.limited(func() error {
		err := by.n.route.one(request{unix.RTM_NEWLINK, flags, message(l.Index, p.Index)})
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
			err = by.n.route.one(request{unix.RTM_NEWLINK, flags, message(0, 0)})
		}
		return err
	})
	if err := errors.Join(n.allowed(err), by.close()); err != nil || other == n {
		return err
	}
	n.joined = append(n.joined, other)
	return other.look()
}

func (n *made) linkOf(index int32) *image.NetLink {
	for i := range n.rec.Links {
		if n.rec.Links[i].Index == index {
			return &n.rec.Links[i]
		}
	}
	return nil
}

// changeLinks gives devices what may need others: their bridge, and how they
// are its port; names, flags.
func (n *made) changeLinks() error {
	for i := range n.rec.Links {
		l := &n.rec.Links[i]
		if !n.ours(l) || n.changed[l.Index] {
			continue
		}
		n.changed[l.Index] = true
		if err := n.changeLink(l); err != nil {
			return fail.On("network device "+l.Name, n.allowed(err))
		}
	}
	return nil
}

func (n *made) changeLink(l *image.NetLink) error {
	at := n.index[l.Index]
	list, err := n.attributes(l.Change, append([]uint16{unix.IFLA_MASTER, unix.IFLA_IFALIAS, unix.IFLA_PROP_LIST, unix.IFLA_LINKINFO, unix.IFLA_AF_SPEC}, commonLink...)...)
	if err != nil {
		return err
	}
	var ops []request
	if set := without(list, []uint16{unix.IFLA_PROP_LIST, unix.IFLA_LINKINFO}); len(set) > 0 {
		set = slices.DeleteFunc(set, func(a attr) bool { return n.has(at, a) })
		if len(set) > 0 {
			ops = append(ops, request{kind: unix.RTM_NEWLINK, body: link(at, 0, 0, set...)})
		}
	}
	if port := pick(list, unix.IFLA_LINKINFO); len(port) > 0 {
		ops = append(ops, request{kind: unix.RTM_NEWLINK, body: link(at, 0, 0, port...)})
	}
	if names := pick(list, unix.IFLA_PROP_LIST); len(names) > 0 {
		ops = append(ops, request{unix.RTM_NEWLINKPROP, unix.NLM_F_CREATE | unix.NLM_F_EXCL, link(at, 0, 0, names...)})
	}
	if l.Flags != n.flags[at] {
		ops = append(ops, request{kind: unix.RTM_NEWLINK, body: link(at, l.Flags&^unix.IFF_UP, (l.Flags^n.flags[at])&linkFlags)})
	}
	if len(ops) == 0 {
		return nil
	}
	errs, err := n.route.send(ops)
	return errors.Join(append(errs, err)...)
}

// raiseLinks brings up what was up.
func (n *made) raiseLinks() error {
	for i := range n.rec.Links {
		l := &n.rec.Links[i]
		if !n.ours(l) || l.Flags&unix.IFF_UP == 0 || n.flags[n.index[l.Index]]&unix.IFF_UP != 0 {
			continue
		}
		err := n.route.one(request{kind: unix.RTM_NEWLINK, body: link(n.index[l.Index], unix.IFF_UP, unix.IFF_UP)})
		if err != nil {
			return fail.On("network device "+l.Name, n.allowed(err))
		}
	}
	return n.look()
}
