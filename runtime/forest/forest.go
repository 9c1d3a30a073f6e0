// Package forest plans how the process hierarchy of a frozen container is grown again from one stub
// process. It makes no system call: it turns a list of processes into a list of calls, each of which
// the restorer then makes remotely in the process named.
//
// The kernel offers no call that sets a parent, a session or somebody else's process group. They come
// about only through history (fork(2), setsid(2), setpgid(2), prctl(2) PR_SET_CHILD_SUBREAPER, exit),
// so a history has to be found that ends in the hierarchy wanted. It need not be the original one.
//
// The plan rests on one fact. A process gets a new parent only when its parent dies, and the new one
// is always an ancestor of the dead one: the nearest child subreaper, else the init of the pid
// namespace. So every parent a process ever has is one of its ancestors by fork, and so is the leader
// of its session. Planning therefore is finding a tree of forks, the lineage, in which
//
//   - the parent of each process is one of its ancestors, and
//   - each process is forked while its forker is in the session the child needs.
//
// Such a lineage can always be played: grow each branch whole, and put a ghost, a temporary process,
// between a forker and a child that is to end elsewhere. The ghost leaves when the branch below the
// child is complete; the final parent, still above it and for that moment the only subreaper, inherits
// the child. order.go and origin.go find the lineage, lineage.go draws it, share.go makes it one by
// which shared tables are handed on, grow.go and group.go play it.
package forest

import (
	"fmt"
	"slices"
)

// Process is one thread group of the container. All ids are those of the container's pid namespace.
type Process struct {
	Pid, Ppid int
	// Pgid and Sid are the ids of the process group and the session, as in fields 5 and 6 of
	// proc_pid_stat(5). Their leader may be gone. 0 stands for a leader outside the pid namespace.
	Pgid, Sid int
	// Zombie says that the process has ended and waits to be reaped.
	Zombie bool
	// Subreaper says that the process has PR_SET_CHILD_SUBREAPER set.
	Subreaper bool
	// Shared says which tables it shares with other processes.
	Shared Shared
}

// Op names the call of a Step.
type Op uint8

// The operations of a plan.
const (
	// Fork makes Pid fork Child: clone3(2) with set_tid and exit_signal SIGCHLD.
	Fork Op = iota + 1
	// Setsid makes Pid call setsid(2).
	Setsid
	// Setpgid makes Pid call setpgid(0, Pgid).
	Setpgid
	// Subreaper makes Pid call prctl(PR_SET_CHILD_SUBREAPER, On).
	Subreaper
	// Exit makes Pid, always a ghost, leave.
	Exit
	// Leave makes Pid call unshare(2).
	Leave
	// Enter brings Child in from outside the pid namespace, as setns(2) and a fork do: it has no parent in it.
	// Pid is 0.
	Enter
)

// Step is one remote call, made in process Pid.
type Step struct {
	Op    Op
	Pid   int
	Child int  // Fork and Enter: the pid the child must get
	Pgid  int  // Setpgid: the group to enter; the caller's own pid founds it
	On    bool // Subreaper: the flag's new value
	// Tables are what the child shares with Pid (Fork), or what Pid exchanges for a copy of its own (Leave).
	Tables Tables
	// Nested is what Nest adds: nil where only namespaces of the container's own matter.
	Nested *Nested
}

// String shows the step as a call.
func (s Step) String() string {
	switch s.Op {
	case Fork:
		if s.Tables != 0 {
			return fmt.Sprintf("%d: fork %d sharing %v", s.Pid, s.Child, s.Tables)
		}
		return fmt.Sprintf("%d: fork %d", s.Pid, s.Child)
	case Setsid:
		return fmt.Sprintf("%d: setsid", s.Pid)
	case Setpgid:
		return fmt.Sprintf("%d: setpgid %d", s.Pid, s.Pgid)
	case Subreaper:
		return fmt.Sprintf("%d: subreaper %t", s.Pid, s.On)
	case Exit:
		return fmt.Sprintf("%d: exit", s.Pid)
	case Leave:
		return fmt.Sprintf("%d: leave %v", s.Pid, s.Tables)
	case Enter:
		return fmt.Sprintf("enter %d", s.Child)
	case Part:
		return fmt.Sprintf("%d: thread %d: %s", s.Pid, s.Child, s.Nested.text(s.Op))
	case EnterUser, Unshare, Join, Thread:
		return fmt.Sprintf("%d: %s", s.Pid, s.Nested.text(s.Op))
	}
	return fmt.Sprintf("%d: unknown operation %d", s.Pid, s.Op)
}

// Plan is a history that ends in the hierarchy asked for.
//
// The steps are to be made strictly in order. Until the last one:
//
//   - every process ignores SIGCHLD, which children inherit, so that ghosts are reaped by the kernel
//     (NOTES of wait(2)). An Exit is done when its pid is gone; the number itself may be free a moment
//     later, which is why no plan uses a ghost's pid twice;
//   - no process is stopped by job control, or the exit of a ghost might orphan a stopped process group
//     and send it SIGHUP (kernel/exit.c, kill_orphaned_pgrp). A ptrace stop does not count as one.
//
// Zombies are grown like all the others and are still alive at the end of the plan: they must exit when
// everything else is in place, after their parents have stopped to ignore SIGCHLD. At the end of the
// plan exactly the processes with Subreaper set in the input are subreapers.
type Plan struct {
	Steps []Step
	// Ghosts are the temporary pids in order of their fork. All of them have left at the end.
	Ghosts []int
	// Keepers are ghosts that are there at the end still (Nest): each is in a namespace that only threads are
	// to be in, and may leave when these have a way to it.
	Keepers []int
}

// Unreachable says that no history this package knows ends in the hierarchy given.
type Unreachable struct {
	Pid    int // the process that cannot be made
	Reason string
}

func (e *Unreachable) Error() string {
	return fmt.Sprintf("process hierarchy cannot be grown: pid %d: %s", e.Pid, e.Reason)
}

// FurtherRoots names the processes that have no parent in the list besides a root that is not the init of
// the pid namespace: their orphans would go to a process that is not in the list.
type FurtherRoots struct {
	Root int
	Pids []int // ascending
}

func (e *FurtherRoots) Error() string {
	return fmt.Sprintf("process hierarchy has roots besides pid %d, which is no init: %v", e.Root, e.Pids)
}

// Grow plans how a stub process that has the root's pid grows into processes, which may come in any
// order. The root is the one whose parent is not in the list. Beside an init there may be further ones, brought
// in from outside (runc exec), each the leader of a session. To the plan they are children of the root,
// since that is where their orphans go, but ones that enter instead of being forked.
//
// The stub must already be what libcontainer makes of an init: leader of its own session and group where
// the root is one, else (the root's Sid is 0) in a session and group from outside. Where the root is not
// pid 1, it is made a subreaper for as long as it has orphans to take in.
//
// reserved holds further ids that are in use or will be: those of threads above all. No ghost gets one.
// A leader that is gone is played by a ghost with its pid.
//
// Errors are *FurtherRoots and *Unreachable.
func Grow(processes []Process, reserved []int) (*Plan, error) {
	f, err := newFamily(processes, reserved)
	if err != nil {
		return nil, err
	}
	if err := f.findOrigins(); err != nil {
		return nil, err
	}
	return f.grow(), nil
}

// A node is a process of the lineage: one of the container, or a ghost.
type node struct {
	Process
	index   int
	ghost   bool
	outside bool  // a further root
	parent  *node // the final parent; nil for the root and for ghosts, the root for further roots
	kids    []*node
	session *session
	group   int // the process group at this point of the plan

	// The lineage, see lineage.go.
	depth int
	early []*node // forked before the node's own setsid
	late  []*node // forked after it, or by a node that never calls setsid
	// keepsOutside: a descendant needs to inherit group 0, which cannot be entered again once left.
	keepsOutside bool

	// Which tables it hands on, see share.go.
	forker  *node
	carried Shared     // held at first, without being its own in the end
	rounds  [2][]round // of early and late
}

// A session with the nodes that were, or will be, born in it.
type session struct {
	id int
	// leader made the session by setsid; a ghost where the leader is gone. For the root's session it is
	// the root, even where that session came from outside.
	leader  *node
	members []*node // without the leader, ascending by pid
	leavers []*node // see group.go

	// What findOrigins decides: see order.go and origin.go.
	age    int      // place in the order of birth, 0 is the root's session
	origin *session // the session its leader was born in; nil for the root's
	pinned bool     // origin follows from a child its leader forked before setsid
	above  []*node  // nodes that must be ancestors of the leader
	// from names, for each of above, the session it was passed on from; nil if it was seeded here.
	from map[*node]*session
	// raiser is the session that needed the leader to be born in origin; nil if its own ancestors did.
	raiser *session
}

// family is the hierarchy to grow.
type family struct {
	root     *node
	nodes    []*node // the container's processes ascending by pid, then ghosts of session leaders
	byPid    map[int]*node
	sessions []*session // the root's first, the others ascending by id
	groups   map[int]*group
	classes  []*class
	used     map[int]bool // ids no temporary pid may have
}

func newFamily(processes []Process, reserved []int) (*family, error) {
	f := &family{
		byPid:  make(map[int]*node, len(processes)),
		groups: make(map[int]*group),
		used:   make(map[int]bool, len(processes)+len(reserved)),
	}
	sorted := slices.Clone(processes)
	slices.SortFunc(sorted, func(a, b Process) int { return a.Pid - b.Pid })
	for _, p := range sorted {
		if err := f.addProcess(p); err != nil {
			return nil, err
		}
	}
	if err := f.linkParents(); err != nil {
		return nil, err
	}
	if err := f.checkIDs(reserved); err != nil {
		return nil, err
	}
	if err := f.linkClasses(); err != nil {
		return nil, err
	}
	f.linkSessions()
	f.linkGroups()
	f.reserve(reserved)
	return f, nil
}

func (f *family) addProcess(p Process) error {
	switch {
	case p.Pid <= 0:
		return &Unreachable{p.Pid, "not a pid of the container's pid namespace"}
	case f.byPid[p.Pid] != nil:
		return &Unreachable{p.Pid, "listed twice"}
	}
	n := &node{Process: p, index: len(f.nodes)}
	f.nodes = append(f.nodes, n)
	f.byPid[p.Pid] = n
	return nil
}

// linkParents finds the root and makes sure that all others descend from it.
func (f *family) linkParents() error {
	var roots []*node
	for _, n := range f.nodes {
		n.parent = f.byPid[n.Ppid]
		if n.parent == nil {
			roots = append(roots, n)
			continue
		}
		n.parent.kids = append(n.parent.kids, n)
		if n.parent.Zombie {
			return &Unreachable{n.Pid, fmt.Sprintf("its parent %d has ended and can have no children", n.Ppid)}
		}
	}
	if len(roots) == 0 {
		if len(f.nodes) == 0 {
			return &Unreachable{0, "no processes"}
		}
		return &Unreachable{f.nodes[0].Pid, "its ancestors form a loop"}
	}
	f.root = roots[0]
	if err := f.linkFurtherRoots(roots[1:]); err != nil {
		return err
	}
	return f.checkLoops()
}

func (f *family) linkFurtherRoots(roots []*node) error {
	e := &FurtherRoots{Root: f.root.Pid}
	for _, n := range roots {
		e.Pids = append(e.Pids, n.Pid)
		switch {
		case n.Zombie:
			return &Unreachable{n.Pid, "it has ended, and its parent is outside the container"}
		case n.Sid != n.Pid:
			return &Unreachable{n.Pid, fmt.Sprintf("it was brought in from outside, but into session %d instead of its own", n.Sid)}
		}
		n.parent, n.outside = f.root, true
		f.root.kids = append(f.root.kids, n)
	}
	if len(roots) > 0 && f.root.Pid != 1 {
		return e
	}
	return nil
}

func (f *family) checkLoops() error {
	reached := make([]bool, len(f.nodes))
	for todo := []*node{f.root}; len(todo) > 0; {
		n := todo[len(todo)-1]
		todo = append(todo[:len(todo)-1], n.kids...)
		reached[n.index] = true
	}
	if i := slices.Index(reached, false); i >= 0 {
		return &Unreachable{f.nodes[i].Pid, "its ancestors form a loop"}
	}
	return nil
}

// linkSessions makes the sessions, with a ghost for each leader that is gone.
func (f *family) linkSessions() {
	first := &session{id: f.root.Sid, leader: f.root}
	byID := map[int]*session{first.id: first}
	f.sessions = []*session{first}
	for _, n := range f.nodes {
		s := byID[n.Sid]
		if s == nil {
			s = &session{id: n.Sid, leader: f.byPid[n.Sid]}
			byID[s.id] = s
			f.sessions = append(f.sessions, s)
		}
		n.session = s
		if n.Sid != n.Pid && n != f.root {
			s.members = append(s.members, n)
		}
	}
	slices.SortFunc(f.sessions[1:], func(a, b *session) int { return a.id - b.id })
	for _, s := range f.sessions {
		if s.leader == nil {
			s.leader = &node{Process: Process{Pid: s.id, Pgid: s.id, Sid: s.id}, index: len(f.nodes), ghost: true, session: s}
			f.nodes = append(f.nodes, s.leader)
		}
	}
}

func (f *family) reserve(reserved []int) {
	for _, id := range reserved {
		f.used[id] = true
	}
	for _, n := range f.nodes {
		f.used[n.Pid], f.used[n.Pgid], f.used[n.Sid] = true, true, true
	}
}

// leads says that n is the leader of its session, or the root.
func (n *node) leads() bool { return n.session.leader == n }

// region is the session n is born in: a leader is born in another one than its own.
func (n *node) region() *session {
	if n.leads() {
		return n.session.origin
	}
	return n.session
}
