package image

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Bounds on what is in a network namespace.
const (
	maxNetLinks   = 1 << 14
	maxNetMessage = 64 << 10 // a netlink attribute's length has 16 bits
	maxNetValue   = 4096     // a sysctl's
	maxLinkName   = 15       // IFNAMSIZ without its NUL
)

// checkNetwork checks what is in a network namespace, as far as no kernel is
// needed for it: that decides on the messages.
func (b *builder) checkNetwork(n *Network) error {
	if !b.isNetNS(n.Namespace) || b.networks[n.Namespace] != nil {
		return fmt.Errorf("reference %d names no network namespace, or one that the image has already", n.Namespace)
	}
	if len(n.Links) > maxNetLinks {
		return fmt.Errorf("%d network devices", len(n.Links))
	}
	indexes, names := map[int32]bool{}, map[string]bool{}
	for i := range n.Links {
		l := &n.Links[i]
		if l.Index <= 0 || indexes[l.Index] || names[l.Name] {
			return fmt.Errorf("network device %s: its number %d is not positive, or stands twice, or its name does", quote(l.Name), l.Index)
		}
		if err := b.checkLink(l); err != nil {
			return fmt.Errorf("network device %s: %w", quote(l.Name), err)
		}
		indexes[l.Index], names[l.Name] = true, true
	}
	for _, list := range [][][]byte{n.Nexthops, n.Addresses, n.Routes, n.Rules, n.Neighbours} {
		for _, m := range list {
			if len(m) > maxNetMessage {
				return fmt.Errorf("a message of %d bytes", len(m))
			}
		}
	}
	for _, f := range n.Filters {
		if len(f.Message) > maxNetMessage+4 { // and struct nfgenmsg
			return fmt.Errorf("a message of %d bytes", len(f.Message))
		}
	}
	for _, s := range n.Sysctls {
		if s.Name == "" || path.IsAbs(s.Name) || path.Clean(s.Name) != s.Name || strings.HasPrefix(s.Name, "..") || len(s.Value) > maxNetValue {
			return fmt.Errorf("sysctl %s of %d bytes", quote(s.Name), len(s.Value))
		}
	}
	return nil
}

func (b *builder) isNetNS(ref Ref) bool {
	if n := b.Namespace(ref); n != nil {
		return n.Type == "net"
	}
	n := b.Nested(ref)
	return n != nil && n.Type == "net"
}

func (b *builder) checkLink(l *NetLink) error {
	switch {
	case l.Name == "" || len(l.Name) > maxLinkName || l.Name == "." || l.Name == ".." || strings.ContainsAny(l.Name, "/: \t\n"):
		return errors.New("no device can have that name")
	case len(l.Create) > maxNetMessage || len(l.Change) > maxNetMessage:
		return errors.New("a message is too long")
	case (l.Tun != nil) != (l.Kind == "tun" && !l.Outside):
		return errors.New("what it has of a tun device does not fit its kind")
	case l.PeerNS != 0 && !b.isNetNS(l.PeerNS):
		return fmt.Errorf("reference %d names no network namespace", l.PeerNS)
	case l.Peer < 0 || l.Peer == l.Index && l.PeerNS == 0:
		return errors.New("its other end is itself")
	}
	return nil
}

// checkPackets checks what sockets have that send packets.
func checkPackets(s *Socket) error {
	const maxSockaddr, maxGroups, maxSources = 128, 1 << 16, 1 << 12
	if len(s.Peer) > maxSockaddr || s.Peer != nil && s.TCP != nil {
		return fmt.Errorf("socket with a peer's address of %d bytes", len(s.Peer))
	}
	if len(s.Groups) > maxGroups || len(s.Devices) > maxNetLinks {
		return fmt.Errorf("socket with %d memberships of %d devices", len(s.Groups), len(s.Devices))
	}
	if s.Lost && s.Family != afNetlink {
		return fmt.Errorf("a socket of family %d that has lost messages", s.Family)
	}
	for _, g := range s.Groups {
		if len(g.Address) > maxSockaddr || len(g.Sources) > maxSources || !all(g.Sources, func(a []byte) bool { return len(a) <= maxSockaddr }) {
			return fmt.Errorf("membership of %d sources", len(g.Sources))
		}
	}
	for _, d := range s.Datagrams {
		if len(d.From) > maxSockaddr || len(d.To) != 0 && len(d.To) != 4 && len(d.To) != 16 || len(d.Data) > maxNetMessage {
			return fmt.Errorf("datagram of %d bytes", len(d.Data))
		}
	}
	return nil
}
