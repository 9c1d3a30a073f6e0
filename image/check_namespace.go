package image

import (
	"errors"
	"fmt"
	"slices"
)

// Bounds on namespaces that tasks have made.
const (
	maxNested   = 1 << 14
	maxExtents  = 340 // UID_GID_MAP_MAX_EXTENTS
	maxHostname = 64  // __NEW_UTS_LEN
)

// checkNested checks the namespaces that tasks have made, and who is in which.
func (b *builder) checkNested(t *Tree) error {
	if len(t.Namespaces) > maxNested {
		return fmt.Errorf("%d namespaces are more than %d", len(t.Namespaces), maxNested)
	}
	n := nesting{types: map[Ref]string{}, depth: map[Ref]int{}, parent: map[Ref]Ref{}, used: map[nestedID]bool{}, living: map[Ref]bool{}, all: map[int]*Mount{}}
	for i := range b.Container.Mounts {
		n.all[b.Container.Mounts[i].ID] = &b.Container.Mounts[i]
	}
	for i := range b.Container.Namespaces {
		n.types[b.Container.Namespaces[i].Ref] = b.Container.Namespaces[i].Type
	}
	last := b.last
	for i := range t.Namespaces {
		ns := &t.Namespaces[i]
		if ns.Ref <= last {
			return fmt.Errorf("reference %d of a nested %s namespace does not ascend", ns.Ref, quote(ns.Type))
		}
		if err := n.add(ns); err != nil {
			return fmt.Errorf("nested namespace %d: %w", ns.Ref, err)
		}
		last = ns.Ref
	}
	for i := range t.Processes {
		if err := n.process(&t.Processes[i]); err != nil {
			return fmt.Errorf("process %d: %w", t.Processes[i].Pid, err)
		}
	}
	for id := range n.used {
		if !n.used[nestedID{id.space, 1}] {
			return fmt.Errorf("pid namespace %d has processes and no init", id.space)
		}
	}
	return nil
}

// nesting is what has been seen of the namespaces of a tree.
type nesting struct {
	types  map[Ref]string
	depth  map[Ref]int // of pid namespaces, below the container's
	parent map[Ref]Ref // of pid namespaces
	used   map[nestedID]bool
	living map[Ref]bool // not known to be dead
	all    map[int]*Mount
}

type nestedID struct {
	space Ref
	id    int32
}

// add takes a namespace into account whose owner and parent stand before it.
func (n *nesting) add(ns *NestedNamespace) error {
	switch {
	case !slices.Contains(namespaceTypes, ns.Type):
		return fmt.Errorf("%s is no type of namespace", quote(ns.Type))
	case n.types[ns.Owner] != "user":
		return fmt.Errorf("its owner %d is no user namespace before it", ns.Owner)
	case ns.Type == "pid" && n.types[ns.Parent] != "pid":
		return fmt.Errorf("its parent %d is no pid namespace before it", ns.Parent)
	case ns.Type != "pid" && (ns.Parent != 0 || ns.Dead):
		return errors.New("only a pid namespace has a parent and dies with its init")
	case (ns.User != nil) != (ns.Type == "user"), (ns.UTS != nil) != (ns.Type == "uts"), (ns.Time != nil) != (ns.Type == "time"):
		return errors.New("what is in it is not what its type has")
	case (ns.Mounts != nil) != (ns.Type == "mnt"), ns.IPC != nil && ns.Type != "ipc":
		return errors.New("what is in it is not what its type has")
	case ns.UTS != nil && (len(ns.UTS.Hostname) > maxHostname || len(ns.UTS.Domainname) > maxHostname):
		return fmt.Errorf("a name in it is longer than %d bytes", maxHostname)
	case ns.Time != nil && (ns.Time.Monotonic < 0 || ns.Time.Boottime < 0):
		return errors.New("a clock in it is negative")
	}
	n.types[ns.Ref], n.living[ns.Ref] = ns.Type, !ns.Dead
	if ns.Type == "pid" {
		n.parent[ns.Ref], n.depth[ns.Ref] = ns.Parent, n.depth[ns.Parent]+1
		if n.depth[ns.Ref] >= maxPIDs {
			return fmt.Errorf("it is %d deep", n.depth[ns.Ref])
		}
	}
	if err := n.mounts(ns); err != nil {
		return err
	}
	return first(checkLimits(ns.IPC), checkUserNamespace(ns.User))
}

// mounts checks those of a mount namespace: whose file systems they show, and
// whose pids.
func (n *nesting) mounts(ns *NestedNamespace) error {
	for i := range ns.Mounts {
		m := &ns.Mounts[i]
		if m.Space != 0 && (m.Own != MountNew || m.FSType != "proc" || n.types[m.Space] != "pid" || !n.nested(m.Space)) {
			return fmt.Errorf("a %s mount of pid namespace %d", quote(m.FSType), m.Space)
		}
		if n.all[m.ID] != nil {
			return fmt.Errorf("mount %d stands twice", m.ID)
		}
	}
	if ns.Type != "mnt" {
		return nil
	}
	_, err := ns.OwnMounts(n.all)
	for i := range ns.Mounts {
		n.all[ns.Mounts[i].ID] = &ns.Mounts[i]
	}
	return err
}

func checkUserNamespace(u *UserNamespace) error {
	if u == nil {
		return nil
	}
	for _, m := range [][]IDMap{u.UIDMap, u.GIDMap} {
		if len(m) > maxExtents {
			return fmt.Errorf("a map of %d ranges", len(m))
		}
		for _, r := range m {
			if r.Size == 0 || r.Container+r.Size < r.Container || r.Host+r.Size < r.Host {
				return fmt.Errorf("a map of %d ids from %d to %d", r.Size, r.Container, r.Host)
			}
		}
	}
	return nil
}

// process checks the namespaces that a process is in, and its ids there.
func (n *nesting) process(p *Process) error {
	in, err := n.place(p.Namespaces, p.Children)
	if err == nil {
		err = n.apart(p, in)
	}
	if err != nil {
		return err
	}
	space := in["pid"]
	if (space != 0) != (p.Inner != nil) {
		return errors.New("its ids in nested pid namespaces do not fit these")
	}
	if space == 0 {
		return nil
	}
	if !n.living[space] && !p.Zombie {
		return fmt.Errorf("its pid namespace %d is dead", space)
	}
	return n.ids(p, space)
}

// place checks where a process or thread is, and returns that by type.
func (n *nesting) place(in, children []Ref) (map[string]Ref, error) {
	at := map[string]Ref{}
	for _, ref := range in {
		kind := n.types[ref]
		if !n.nested(ref) || at[kind] != 0 {
			return nil, fmt.Errorf("reference %d names no nested namespace, or one of a type that it is in already", ref)
		}
		at[kind] = ref
	}
	seen := map[string]bool{}
	for _, ref := range children {
		kind := n.types[ref]
		if !n.nested(ref) || kind != "pid" && kind != "time" || seen[kind] {
			return nil, fmt.Errorf("reference %d names no namespace that children can begin in", ref)
		}
		seen[kind] = true
	}
	return at, nil
}

// apart checks threads that are elsewhere than their process, which is in one pid,
// user and time namespace.
func (n *nesting) apart(p *Process, in map[string]Ref) error {
	seen := map[int32]bool{}
	for i := range p.Apart {
		a := &p.Apart[i]
		at, err := n.place(a.Namespaces, a.Children)
		switch {
		case err != nil:
			return fmt.Errorf("thread %d: %w", a.Tid, err)
		case !slices.Contains(p.Threads, a.Tid) || seen[a.Tid]:
			return fmt.Errorf("it has no thread %d, or two of them", a.Tid)
		case at["pid"] != in["pid"] || at["user"] != in["user"] || at["time"] != in["time"]:
			return fmt.Errorf("thread %d is in another pid, user or time namespace", a.Tid)
		}
		seen[a.Tid] = true
	}
	return nil
}

func (n *nesting) nested(ref Ref) bool { _, ok := n.living[ref]; return ok }

// ids checks the ids of a process in nested pid namespaces: as many as there
// are namespaces, and each used once.
func (n *nesting) ids(p *Process, space Ref) error {
	depth := n.depth[space]
	if len(p.Inner.Threads) != len(p.ids()) || len(p.Inner.Pgid) != depth || len(p.Inner.Sid) != depth {
		return errors.New("its ids in nested pid namespaces are too few or too many")
	}
	for _, id := range slices.Concat(p.Inner.Pgid, p.Inner.Sid) {
		if id < 0 {
			return errors.New("its group or session is negative in a nested pid namespace")
		}
	}
	for _, ids := range p.Inner.Threads {
		at := space
		if len(ids) != depth {
			return errors.New("its ids in nested pid namespaces are too few or too many")
		}
		for _, id := range slices.Backward(ids) {
			one := nestedID{at, id}
			if id <= 0 || n.used[one] {
				return fmt.Errorf("its id %d in pid namespace %d is not positive or used twice", id, at)
			}
			n.used[one] = true
			at = n.parent[at]
		}
	}
	return nil
}
