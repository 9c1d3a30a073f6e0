// Package namespace holds the namespaces that the tasks of a container have
// made themselves. Each type is one source file with both directions: what is
// in such a namespace and how it is told, and how the task that makes it again
// puts it there. kinds lists them. Who makes which, and in what order, is
// planned by package forest.
package namespace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Env is what the room must know of the container.
type Env struct {
	Own    map[string]uint64 // the container's namespaces, by type
	Host   map[string]uint64 // those of this process
	Init   int               // pid of its init, on the host
	Depth  int               // levels of pid namespaces down to the container's
	Maps   task.IDMaps
	Mounts *mount.Set
}

// Set is every namespace that tasks have made.
type Set struct {
	Env
	byInode map[uint64]*Namespace
	list    []*Namespace // owners and parents first, once described
	clock   int          // a pid whose timens_offsets are the container's
	mounted []*mount.Set // of mount namespaces
}

// Namespace is one of them.
type Namespace struct {
	Record image.NestedNamespace
	path   string // that leads to it
	pid    int    // the process that the path leads through
	teller int    // of a time namespace: a pid whose timens_offsets are its own
	name   string // of a task in it, for messages
	kin    nsutil.Kin
	owner  *Namespace // nil: the container's user namespace
	parent *Namespace // nil: the container's pid namespace
	member bool       // some task is in it
	pids   []int      // of a mount namespace: the tasks in it
	view   *View      // of a mount namespace
	// mounters are, of a mount namespace, where its tasks are otherwise; spaces the
	// pid namespaces that its new /procs show, by mount.
	mounters []mounter
	spaces   map[int]uint64
}

// mounter is the pid and the user namespace of a task, nil for the container's.
type mounter struct{ space, user *Namespace }

// Place says which namespaces a process is in that are not the container's.
type Place struct {
	in       []*Namespace
	children []*Namespace
	ipc      uint64         // inode
	Space    *Namespace     // the pid namespace, nil for the container's
	User     *Namespace     // the user namespace, nil for the container's
	apart    map[int]*Place // of threads, by their pids on the host
}

// NewSet returns an empty set for a container.
func NewSet(env Env) *Set { return &Set{Env: env, byInode: map[uint64]*Namespace{}} }

// object is how messages name a namespace.
func (n *Namespace) object() string { return n.Record.Type + " namespace" }

// Add notes the namespaces of a process.
func (s *Set) Add(pid int, name string) (*Place, error) { return s.add(pid, name, false) }

// add notes the namespaces of a process, or of a thread that is elsewhere than it.
// Where only such threads are, all is done by a process in no other pid namespace.
func (s *Set) add(pid int, name string, thread bool) (*Place, error) {
	p := &Place{}
	all, err := nsutil.Of(pid)
	if err != nil {
		return nil, gone(pid, err)
	}
	p.ipc = all["ipc"]
	for _, kind := range nsutil.Types {
		if inode := all[kind]; inode != s.Own[kind] {
			if inode == s.Host[kind] {
				return nil, fail.Refuse(kind+" namespace", "it is the host's", "")
			}
			n := s.meet(inode, kind, nsutil.Path(pid, kind), pid, name)
			n.member = true
			p.add(n)
		}
	}
	for _, n := range p.in {
		if n.Record.Type == "mnt" {
			n.pids = append(n.pids, pid)
			if !thread || p.Space == nil {
				n.mounters = append(n.mounters, mounter{p.Space, p.User})
			}
		}
	}
	forPids, forTime, err := nsutil.ForChildren(pid)
	if err != nil {
		return nil, gone(pid, err)
	}
	if forPids != all["pid"] {
		p.children = append(p.children, s.meet(forPids, "pid", nsutil.Path(pid, "pid_for_children"), pid, name))
	}
	if forTime != all["time"] {
		if forTime == s.Own["time"] {
			return nil, fail.Refuse("time namespace", "its children begin in the container's own; that is not supported yet", "")
		}
		n := s.meet(forTime, "time", nsutil.Path(pid, "time_for_children"), pid, name)
		n.teller = pid
		p.children = append(p.children, n)
	} else if forTime == s.Own["time"] {
		s.clock = pid
	} else {
		s.byInode[forTime].teller = pid
	}
	return p, nil
}

// AddZombie notes the pid and user namespace of a process that has ended: all
// that is left to it.
func (s *Set) AddZombie(pid int, name string) (*Place, error) {
	p := &Place{}
	for _, kind := range []string{"pid", "user"} {
		inode, err := nsutil.One(pid, kind)
		if err != nil {
			return nil, gone(pid, err)
		}
		if inode != s.Own[kind] {
			n := s.meet(inode, kind, nsutil.Path(pid, kind), pid, name)
			n.member = true
			p.add(n)
		}
	}
	return p, nil
}

func (p *Place) add(n *Namespace) {
	p.in = append(p.in, n)
	switch n.Record.Type {
	case "pid":
		p.Space = n
	case "user":
		p.User = n
	}
}

// AddThreads notes the threads of a process, whose place is p, that are elsewhere
// than it. A thread that is gone by now, as it may be while they run, is nowhere.
func (s *Set) AddThreads(p *Place, tids []int, name string) error {
	if len(tids) < 2 {
		return nil
	}
	ours := links(tids[0])
	p.apart = map[int]*Place{}
	for _, tid := range tids[1:] {
		if links(tid) == ours {
			continue
		}
		at, err := s.add(tid, name, true)
		if errors.Is(err, tracee.ErrGone) {
			continue
		}
		if err != nil {
			return fail.On(fmt.Sprintf("thread (host %d)", tid), err)
		}
		p.apart[tid] = at
	}
	if len(p.children) > 0 { // what threads are cloned by may not have any
		p.apart[tids[0]] = &Place{in: p.in, children: p.children, Space: p.Space, User: p.User}
		p.children = nil
	}
	return nil
}

// Same says that two are in the same namespaces.
func (p *Place) Same(other *Place) bool { return slices.Equal(p.in, other.in) }

// Apart is a thread that is in a namespace which no process is in, by their pids
// and its inode; 0 if there is none.
func (s *Set) Apart(inode uint64) int {
	if n := s.byInode[inode]; n != nil && n.Record.Type != "pid" && n.Record.Type != "time" {
		return n.pid
	}
	return 0
}

// links are those to the namespaces of a thread that need not be its process's.
func links(tid int) (out [len(threads)]string) {
	for i, kind := range threads {
		out[i], _ = os.Readlink(nsutil.Path(tid, kind)) // one for pids may be unborn
	}
	return out
}

var threads = [...]string{"cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "uts"}

// Of is where a thread of a process is.
func (p *Place) Of(tid int) *Place {
	if at := p.apart[tid]; at != nil {
		return at
	}
	return p
}

func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("task %d: %w", pid, tracee.ErrGone)
	}
	return err
}

// meet returns the namespace with an inode, a new one if it was not met before.
// One that is not born yet is known to nobody but to whose children it is for.
func (s *Set) meet(inode uint64, kind, path string, pid int, name string) *Namespace {
	if n := s.byInode[inode]; n != nil && inode != nsutil.Unborn {
		return n
	}
	n := &Namespace{Record: image.NestedNamespace{Type: kind, Inode: inode}, path: path, pid: pid, name: name}
	if inode == nsutil.Unborn {
		n.Record.Inode = 0
	} else {
		s.byInode[inode] = n
	}
	s.list = append(s.list, n)
	return n
}

// Describe finds how the namespaces hang together and reads what is in them.
// What cannot be made again is refused.
func (s *Set) Describe() error {
	for _, n := range s.list {
		if err := s.relate(n); err != nil {
			return fail.In(n.name, fail.On(n.object(), gone(n.pid, err)))
		}
	}
	s.sort()
	for _, n := range s.list {
		if k := kindOf(n.Record.Type); k.read != nil {
			if err := k.read(s, n); err != nil {
				return fail.In(n.name, fail.On(n.object(), gone(n.pid, err)))
			}
		}
	}
	return nil
}

// relate finds the owner and the parent of a namespace among the others.
func (s *Set) relate(n *Namespace) (err error) {
	if n.Record.Inode == 0 {
		return s.relateUnborn(n)
	}
	if n.kin, err = nsutil.Relatives(n.path, n.Record.Type); err != nil {
		return err
	}
	if n.kin.Owner != s.Own["user"] {
		if n.owner = s.byInode[n.kin.Owner]; n.owner == nil {
			return fail.Refuse("", "no task of the container is left in the user namespace that owns it; that is not supported yet", "")
		}
	}
	if n.Record.Type == "pid" && n.kin.Parent != s.Own["pid"] {
		if n.parent = s.byInode[n.kin.Parent]; n.parent == nil {
			return fail.Refuse("", "it does not lie in the container's pid namespace", "")
		}
	}
	n.Record.Dead = n.Record.Type == "pid" && !n.member
	return nil
}

// relateUnborn takes an unborn pid namespace for one of the user namespace that
// the task is in: nothing tells another.
func (s *Set) relateUnborn(n *Namespace) error {
	all, err := nsutil.Of(n.pid)
	if err != nil {
		return err
	}
	if all["user"] != s.Own["user"] {
		n.owner = s.byInode[all["user"]]
	}
	if all["pid"] != s.Own["pid"] {
		n.parent = s.byInode[all["pid"]]
	}
	return nil
}

// sort puts owners and parents first.
func (s *Set) sort() {
	done := map[*Namespace]bool{}
	var sorted []*Namespace
	var visit func(n *Namespace)
	visit = func(n *Namespace) {
		if n == nil || done[n] {
			return
		}
		done[n] = true
		visit(n.owner)
		visit(n.parent)
		sorted = append(sorted, n)
	}
	for _, turn := range []int{0, 1, 2} {
		for _, n := range s.list {
			if n.turn() == turn {
				visit(n)
			}
		}
	}
	s.list = sorted
}

// turn puts mounts, which show pid namespaces, behind these, and those of user
// namespaces of tasks last: what others have mounted too is made by these.
func (n *Namespace) turn() int {
	switch {
	case n.Record.Type != "mnt":
		return 0
	case n.owner == nil:
		return 1
	}
	return 2
}

// Records gives every namespace its reference and returns their records. own
// are the references of the container's own user and pid namespace.
func (s *Set) Records(newRef func() image.Ref, user, pid image.Ref) []image.NestedNamespace {
	var out []image.NestedNamespace
	for _, n := range s.list {
		n.Record.Ref, n.Record.Owner = newRef(), user
		if n.owner != nil {
			n.Record.Owner = n.owner.Record.Ref
		}
		if n.Record.Type == "pid" {
			n.Record.Parent = pid
			if n.parent != nil {
				n.Record.Parent = n.parent.Record.Ref
			}
		}
	}
	for _, n := range s.list {
		for i := range n.Record.Mounts {
			m := &n.Record.Mounts[i]
			if space := s.byInode[n.spaces[m.ID]]; space != nil {
				m.Space = space.Record.Ref
			}
		}
		out = append(out, n.Record)
	}
	return out
}

// Fill puts the references into the record of a process whose threads have these
// pids on the host.
func (p *Place) Fill(r *image.Process, tids []int) {
	refs := func(list []*Namespace) (out []image.Ref) {
		for _, n := range list {
			out = append(out, n.Record.Ref)
		}
		slices.Sort(out)
		return out
	}
	r.Namespaces, r.Children = refs(p.in), refs(p.children)
	r.Apart = nil
	for i, tid := range tids {
		if at := p.apart[tid]; at != nil {
			r.Apart = append(r.Apart, image.ApartThread{Tid: r.Threads[len(r.Threads)-len(tids)+i], Namespaces: refs(at.in), Children: refs(at.children)})
		}
	}
}

// Nested reports whether a process is in a namespace of its own making, or
// makes its children in one.
func (p *Place) Nested() bool { return len(p.in)+len(p.children) > 0 }

// IPC is the inode of the ipc namespace that a process is in.
func (p *Place) IPC() uint64 { return p.ipc }

// NestedIPC reports whether that is one that a task has made.
func (p *Place) NestedIPC() bool {
	return slices.ContainsFunc(p.in, func(n *Namespace) bool { return n.Record.Type == "ipc" })
}

// UserRecord is the user namespace that a process is in, nil for the container's.
func (p *Place) UserRecord() *image.NestedNamespace {
	if p.User == nil {
		return nil
	}
	return &p.User.Record
}
