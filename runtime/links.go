package runtime

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
)

// readLinks records the network devices of a network namespace that is the
// container's own. Only the loopback's state is put back so far: any other
// device is made by the engine or its hooks, at restore as at create.
func (c *container) readLinks() error {
	for i := range c.record.Namespaces {
		if n := &c.record.Namespaces[i]; n.Type == "net" && (n.Host || n.Path != "") {
			return nil
		}
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
			if l.Type != "loopback" && (l.Up || len(l.Addresses) > 0) {
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
