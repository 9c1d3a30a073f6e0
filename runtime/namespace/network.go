package namespace

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// network is a network namespace. One with nothing but its loopback can be made
// again; any other thing in it is refused by its name.
var network = kind{
	name: "net", flag: unix.CLONE_NEWNET,
	read: func(_ *Set, n *Namespace) error {
		return nsutil.Inside(n.path, func() error {
			for _, check := range []func(*Namespace) error{checkContents, readLoopback, checkFilters} {
				if err := check(n); err != nil {
					return err
				}
			}
			return nil
		})
	},
	fill: func(_ *Maker, s *stub, n *image.NestedNamespace) error {
		for _, l := range n.Links {
			if l.Up {
				return raise(s.Stub, l.Name)
			}
		}
		return nil
	},
}

// fresh is what any new network namespace has here: the fall-back devices of
// tunnel modules, the routing rules.
var fresh = sync.OnceValues(func() (have map[string]bool, err error) {
	err = nsutil.Inside("", func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		have, err = contents()
		return err
	})
	return have, err
})

// contents lists what is in the network namespace of the calling thread, but
// for its loopback and what comes with that.
func contents() (map[string]bool, error) {
	have := map[string]bool{}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("network devices: %w", err)
	}
	for _, l := range links {
		if a := l.Attrs(); a.RawFlags&unix.IFF_LOOPBACK == 0 {
			state := "down"
			if a.RawFlags&unix.IFF_UP != 0 {
				state = "up"
			}
			have["network device "+a.Name+" of type "+l.Type()+", "+state] = true
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("addresses: %w", err)
		}
		for _, addr := range addrs {
			if text := addr.IPNet.String(); l.Attrs().RawFlags&unix.IFF_LOOPBACK == 0 || text != "127.0.0.1/8" && text != "::1/128" {
				have["address "+text+" of "+l.Attrs().Name] = true
			}
		}
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	for _, r := range routes {
		if r.Table == unix.RT_TABLE_MAIN && (r.Dst == nil || r.Dst.String() != "::1/128") {
			have["route "+r.String()] = true
		}
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("routing rules: %w", err)
	}
	for _, r := range rules {
		have[fmt.Sprintf("routing rule %d, %s", r.Priority, r)] = true
	}
	return have, nil
}

// checkContents refuses what a new network namespace would not have.
func checkContents(*Namespace) error {
	usual, err := fresh()
	if err != nil {
		return err
	}
	have, err := contents()
	if err != nil {
		return err
	}
	for _, what := range slices.Sorted(maps.Keys(have)) {
		if !usual[what] {
			return fail.Refuse(what, "only a loopback is supported in a network namespace that a task has made", "remove it before the checkpoint")
		}
	}
	return nil
}

// readLoopback records the loopback, which is up with its addresses or down.
func readLoopback(n *Namespace) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fail.Refuse("network device lo", "it is missing: "+err.Error(), "")
	}
	one := image.Link{Name: "lo", Type: "loopback", Up: lo.Attrs().RawFlags&unix.IFF_UP != 0}
	addrs, err := netlink.AddrList(lo, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addrs {
		one.Addresses = append(one.Addresses, a.IPNet.String())
	}
	if one.Up != (len(addrs) > 0) {
		return fail.Refuse("network device lo", "it has been up or down with other addresses than its own; that is not supported yet", "")
	}
	n.Record.Links = []image.Link{one}
	return nil
}

// checkFilters refuses packet filters, of nftables and of iptables before it.
func checkFilters(*Namespace) error {
	const getTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETTABLE
	req := nl.NewNetlinkRequest(getTable, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{})
	tables, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err == nil && len(tables) > 0 {
		return fail.Refuse("nftables", "packet filters are not supported in a network namespace that a task has made", "flush the rule set before the checkpoint")
	}
	for _, name := range []string{"ip_tables_names", "ip6_tables_names", "arp_tables_names"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + name)
		if err == nil && len(b) > 0 {
			return fail.Refuse("iptables", "packet filters are not supported in a network namespace that a task has made", "unload the tables before the checkpoint")
		}
	}
	return nil
}

// raise sets IFF_UP (netdevice(7)) from inside.
func raise(s *tracee.Stub, name string) error {
	var open tracee.Batch
	open.Add(unix.SYS_SOCKET, tracee.W(unix.AF_INET), tracee.W(unix.SOCK_DGRAM|unix.SOCK_CLOEXEC), tracee.W(0))
	if _, err := s.Run(&open); err != nil {
		return err
	}
	fd := open.Calls[0].Ret
	var b tracee.Batch
	const size = 40 // sizeof(struct ifreq)
	req := make([]byte, size)
	copy(req[:unix.IFNAMSIZ-1], name)
	req[unix.IFNAMSIZ] = unix.IFF_UP
	b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(unix.SIOCSIFFLAGS), b.Put(req))
	b.Add(unix.SYS_CLOSE, tracee.W(fd))
	_, err := s.Run(&b)
	return err
}
