package runtime

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/sock"
)

// ownsNetwork reports whether the container has a network namespace that was
// made for it: one that its engine gives a path of is joined and left alone.
func (c *container) ownsNetwork() bool {
	return slices.ContainsFunc(c.record.Namespaces, func(n image.Namespace) bool { return n.Type == "net" && !n.Host && n.Path == "" })
}

// managesNetwork reports whether the container's tasks can have made what is in
// it. Where they cannot, the engine and its hooks have, at restore as at create.
func (c *container) managesNetwork() bool { return slices.Contains(c.bounding, "CAP_NET_ADMIN") }

// readNetworks reads what is in the network namespaces of the container and of
// its tasks.
func (n *census) readNetworks(c *container) error {
	n.networks = n.nested.Networks()
	if c.ownsNetwork() && c.managesNetwork() && !c.emptyNetwork {
		own := &network.Space{Path: nsutil.Path(c.initPid, "net"), Inode: c.inodes["net"], Ref: func() image.Ref { return c.namespace("net") }}
		n.networks = append([]*network.Space{own}, n.networks...)
	}
	if len(n.networks) == 0 {
		return nil
	}
	if c.sysctls == nil || c.maySetSysctls() {
		c.sysctls = map[uint64]map[string]string{}
	}
	s := network.Scan{Spaces: n.networks, Warn: c.warn, IDs: c.maps, Tuns: n.files.Tuns(), Sysctls: c.sysctls, Passing: sock.HoldPrefix}
	return s.Read()
}

// maySetSysctls reports whether the container's tasks can write below /proc/sys:
// as a rule it is mounted read-only, and what was read before the stop is true.
func (c *container) maySetSysctls() bool {
	return slices.Contains(c.bounding, "CAP_SYS_ADMIN") || !slices.ContainsFunc(c.record.Mounts, func(m image.Mount) bool {
		return m.Point == "/proc/sys" && slices.Contains(strings.Split(m.Options, ","), "ro")
	})
}

// namespace is the reference of the container's namespace of a type.
func (c *container) namespace(kind string) image.Ref {
	i := slices.IndexFunc(c.record.Namespaces, func(n image.Namespace) bool { return n.Type == kind })
	return c.record.Namespaces[i].Ref
}

// makeNetwork makes what is in the container's network namespace, before any
// socket is: the loopback comes up, then devices, filters, addresses, routes.
func (r *restore) makeNetwork() error {
	if r.EmptyNetwork {
		return nil
	}
	if err := restoreLinks(r.made.stub.Pid, r.head.Container.Links); err != nil {
		return err
	}
	for i := range r.head.Container.Namespaces {
		if n := &r.head.Container.Namespaces[i]; n.Type == "net" && r.made.ownsNetwork() {
			return fail.On("network namespace", r.nested.FillNetwork(n.Ref, r.made.stub, r.made.initPid))
		}
	}
	return nil
}

// ownsNetwork reports whether the bundle gives the container a network namespace
// of its own.
func (m *made) ownsNetwork() bool {
	return m.config.Namespaces.IsPrivate(configs.NEWNET)
}

// readLinks records the network devices of a network namespace that is the
// container's own, for those who look at the image.
func (c *container) readLinks() error {
	if !c.ownsNetwork() || c.emptyNetwork {
		return nil
	}
	return nsutil.Inside(nsutil.Path(c.initPid, "net"), func() error {
		ifs, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, i := range ifs {
			l := image.Link{Name: i.Name, Type: "device", Up: i.Flags&net.FlagUp != 0}
			if i.Flags&net.FlagLoopback != 0 {
				l.Type = "loopback"
			}
			addrs, err := i.Addrs()
			if err != nil {
				return err
			}
			for _, a := range addrs {
				l.Addresses = append(l.Addresses, a.String())
			}
			if !c.managesNetwork() && l.Type != "loopback" && (l.Up || len(l.Addresses) > 0) {
				c.warn("network device %s is not saved: the engine or its hooks must make it again", l.Name)
			}
			if l.Type == "loopback" || l.Up {
				c.record.Links = append(c.record.Links, l)
			}
		}
		return nil
	})
}

// restoreLinks brings the loopback up if it was. A new network namespace has
// it down, and listeners on its addresses need it.
func restoreLinks(pid int, links []image.Link) error {
	for _, l := range links {
		if l.Type != "loopback" || !l.Up {
			continue
		}
		return nsutil.Inside(nsutil.Path(pid, "net"), func() error { return linkUp(l.Name) })
	}
	return nil
}

// linkUp sets IFF_UP (netdevice(7)).
func linkUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network device %s: %w", name, err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("network device %q: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("network device %s: %w", name, err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("network device %s up: %w", name, err)
	}
	return nil
}
