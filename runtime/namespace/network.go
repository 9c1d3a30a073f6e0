package namespace

import (
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// netns is a network namespace; what is in it has a room of its own.
var netns = kind{
	name: "net", flag: unix.CLONE_NEWNET,
	fill: func(m *Maker, s *stub, n *image.NestedNamespace) error {
		return m.Networks.Fill(n.Ref, m.networkPlace(s, false))
	},
}

// FillNetwork fills the container's own network namespace, by the stub of its
// init.
func (m *Maker) FillNetwork(ns image.Ref, init *tracee.Stub, pid int) error {
	return m.Networks.Fill(ns, m.networkPlace(m.at(init, pid), true))
}

// networkPlace is where a stub stands that fills a network namespace.
func (m *Maker) networkPlace(s *stub, own bool) *network.Place {
	return &network.Place{
		Stub: s.Stub, Pid: s.pid, Own: own,
		Limited: func(f func() error) error { return m.limited(s, f) },
		Open:    func(other *network.Place) (int, error) { return m.open(s, other.Pid, "net") },
	}
}

// Networks lists the network namespaces of the set.
func (s *Set) Networks() (out []*network.Space) {
	for _, n := range s.list {
		if n.Record.Type == "net" {
			out = append(out, &network.Space{
				Path: n.path, Inode: n.Record.Inode, Name: " of a namespace that " + n.name + " is in",
				Ref: func() image.Ref { return n.Record.Ref },
			})
		}
	}
	return out
}
