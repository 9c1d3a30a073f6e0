package namespace

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

// kind is one type of namespace, both directions.
type kind struct {
	name string
	flag uint64 // CLONE_NEW*
	// read fills in the record; it refuses what cannot be made again.
	read func(s *Set, n *Namespace) error
	// fill puts what is in the record into the namespace that a stub has just
	// made and is in.
	fill func(m *Maker, s *stub, n *image.NestedNamespace) error
}

var kinds = []*kind{&cgroup, &ipc, &mnt, &netns, &pids, &clocks, &user, &uts}

func kindOf(name string) *kind {
	i := slices.IndexFunc(kinds, func(k *kind) bool { return k.name == name })
	if i < 0 {
		return nil
	}
	return kinds[i]
}

// Flag is the CLONE_NEW* of a type of namespace.
func Flag(name string) uint64 { return kindOf(name).flag }

// pids: there is nothing in a pid namespace but its processes.
var pids = kind{name: "pid", flag: unix.CLONE_NEWPID}
