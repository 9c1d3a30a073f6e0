// Package network holds what is in network namespaces: devices with their
// addresses, routes, rules, neighbours, packet filters and sysctls. Both
// directions of each stand side by side. What is told by netlink is made again
// by the same messages, less what the kernel only tells.
package network

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// Scan says what is known of a container whose network namespaces are read.
type Scan struct {
	Spaces []*Space
	Warn   func(format string, args ...any)
	IDs    task.IDMaps
	// Tuns are the names of tun devices that tasks hold open, by the inode of
	// their network namespace.
	Tuns map[uint64]map[string]bool

	// Sysctls are those that were read before, by the inode of their namespace;
	// Read takes them for what they are, and adds those it has read itself.
	Sysctls map[uint64]map[string]string

	// Passing is the beginning of names of nftables' tables that do not belong to
	// the container.
	Passing string

	usual *usual
}

// Space is one network namespace of the container.
type Space struct {
	object.Object
	Record *image.Network
	Path   string // leads to it
	Inode  uint64
	Name   string           // for messages, "" for the container's own
	Ref    func() image.Ref // of the namespace, once there are any

	far map[int]*Space // of veths, by place in Record.Links: where their other end is
}

// usual is what any new network namespace has here: the fall-back devices of
// tunnel modules, routing rules, sysctls.
type usual struct {
	devices map[string]string // kinds by name
	sysctls map[string]string
}

var fresh = sync.OnceValues(func() (u *usual, err error) {
	u = &usual{devices: map[string]string{}}
	err = nsutil.Inside("", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		all, err := devices()
		if err != nil {
			return err
		}
		for _, d := range all {
			u.devices[d.name] = d.kind
		}
		u.sysctls, err = readSysctls()
		return err
	})
	return u, err
})

// Read fills in the records of all spaces.
func (s *Scan) Read() (err error) {
	if s.usual, err = fresh(); err != nil {
		return err
	}
	for _, sp := range s.Spaces {
		sp.Record, sp.far = &image.Network{}, map[int]*Space{}
		sp.Object = object.Object{Type: image.TypeNetwork, Record: sp.Record, Complete: sp.complete}
		if err := nsutil.Inside(sp.Path, func() error { return s.read(sp) }); err != nil {
			return fail.On("network namespace"+sp.Name, err)
		}
	}
	return nil
}

func (sp *Space) complete() {
	sp.Record.Namespace = sp.Ref()
	for i, other := range sp.far {
		sp.Record.Links[i].PeerNS = other.Ref()
	}
}

// read is called on a thread in the namespace.
func (s *Scan) read(sp *Space) error {
	if err := s.readLinks(sp); err != nil {
		return err
	}
	for _, check := range []func() error{checkIPTables, checkTransform, func() error { return sp.checkQueueing() }} {
		if err := check(); err != nil {
			return err
		}
	}
	ours := map[int32]bool{}
	for _, l := range sp.Record.Links {
		ours[l.Index] = !l.Outside
	}
	inside := func(index int32) (int32, bool) { return index, ours[index] }
	for _, one := range tablesOf(sp.Record) {
		var err error
		if *one.list, err = one.table.read(inside); err != nil {
			return err
		}
	}
	var err error
	if sp.Record.Filters, err = readFilters(s.Passing); err != nil {
		return err
	}
	sp.Record.Sysctls, err = s.changedSysctls(sp)
	return err
}

// listOf is one of a record's lists with the table it belongs to.
type listOf struct {
	table *table
	list  *[][]byte
}

// tablesOf lists a record's tables in the order in which they are made.
func tablesOf(n *image.Network) []listOf {
	return []listOf{{&addresses, &n.Addresses}, {&nexthops, &n.Nexthops}, {&rules, &n.Rules}, {&routes, &n.Routes}, {&neighbours, &n.Neighbours}}
}

func (s *Scan) readLinks(sp *Space) error {
	all, err := devices()
	if err != nil {
		return err
	}
	numbers := map[int32]*Space{} // other namespaces by the number that they have in this one
	if slices.ContainsFunc(all, func(d *device) bool { return d.attr(unix.IFLA_LINK_NETNSID) != nil }) {
		if numbers, err = s.numbers(sp); err != nil {
			return err
		}
	}
	for _, d := range all {
		l, far, err := s.describe(sp, d, numbers)
		if err != nil {
			return err
		}
		if far != nil {
			sp.far[len(sp.Record.Links)] = far
		}
		sp.Record.Links = append(sp.Record.Links, *l)
		if l.Outside && (l.Flags&unix.IFF_UP != 0 || sp.Name != "") {
			s.Warn("network device %s%s is not saved: the engine or its hooks must make it again", l.Name, sp.Name)
		}
	}
	if len(sp.far) > 0 { // their places must stay
		return nil
	}
	sp.Record.Links, err = lowerFirst(sp.Record.Links)
	return err
}

// numbers asks which numbers other namespaces have in the calling thread's
// (RTM_GETNSID of rtnetlink(7)).
func (s *Scan) numbers(sp *Space) (map[int32]*Space, error) {
	out := map[int32]*Space{}
	for _, other := range s.Spaces {
		if other == sp {
			continue
		}
		f, err := os.Open(other.Path)
		if err != nil {
			return nil, err
		}
		id, err := netlink.GetNetNsIdByFd(int(f.Fd()))
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("number of a network namespace: %w", err)
		}
		if id >= 0 {
			out[int32(id)] = other
		}
	}
	return out, nil
}

// checkIPTables refuses packet filters of before nftables.
func checkIPTables() error {
	for _, name := range []string{"ip_tables_names", "ip6_tables_names", "arp_tables_names"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + name)
		if err == nil && len(b) > 0 {
			return fail.Refuse("iptables", "packet filters of before nftables ("+name+") are not supported", "unload its tables before the checkpoint, or use iptables-nft")
		}
	}
	return nil
}

// checkTransform refuses IPsec.
func checkTransform() error {
	for what, kind := range map[string]uint16{"state": xfrmGetSA, "policy": xfrmGetPolicy} {
		list, err := dump(unix.NETLINK_XFRM, kind, nil)
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("IPsec: %w", err)
		}
		if len(list) > 0 {
			return fail.Refuse("IPsec", "it has a "+what+" (ip xfrm), which is not supported", "flush it before the checkpoint")
		}
	}
	return nil
}

const (
	xfrmGetSA     = 0x12 // XFRM_MSG_GETSA of include/uapi/linux/xfrm.h
	xfrmGetPolicy = 0x15
)

// checkQueueing refuses queueing disciplines that somebody has chosen: those
// that come with a device have no handle.
func (sp *Space) checkQueueing() error {
	const tcmsg = 20 // sizeof(struct tcmsg)
	list, err := dump(unix.NETLINK_ROUTE, unix.RTM_GETQDISC, make([]byte, tcmsg))
	if err != nil {
		return fmt.Errorf("queueing disciplines: %w", err)
	}
	for _, m := range list {
		if len(m) < tcmsg {
			return errTruncated
		}
		i := slices.IndexFunc(sp.Record.Links, func(l image.NetLink) bool { return l.Index == int32(ne.Uint32(m[4:])) })
		if i >= 0 && !sp.Record.Links[i].Outside && ne.Uint32(m[8:]) != 0 {
			return fail.Refuse("network device "+sp.Record.Links[i].Name, "it has a queueing discipline of its own (tc qdisc), which is not supported", "delete it before the checkpoint")
		}
	}
	return nil
}
