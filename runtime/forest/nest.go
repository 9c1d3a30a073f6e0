package forest

import (
	"fmt"
	"slices"
)

// Nested namespaces. Grow plans with the ids of the container's pid namespace and knows no other; nest
// takes its plan and adds who makes and enters which namespace, and when.
//
// Two rules of the kernel shape the plan. A pid namespace comes about with its first process, its init,
// and is owned by the user namespace that it is made from. And ids can be chosen (clone3 set_tid) only in
// pid namespaces whose owner gives the cloning process CAP_CHECKPOINT_RESTORE: once a process has entered
// a user namespace of the container's making, it can choose ids only below it. So
//
//   - while the forest grows, processes enter user namespaces only to make a pid namespace that must be
//     owned by one. Where the process that makes it has never been in that user namespace itself, both
//     are made in one clone3;
//   - where an id cannot be chosen, another process, which can, makes the kernel choose it by itself:
//     it writes the number before to /proc/sys/kernel/ns_last_pid of that namespace (proc(5));
//   - everything else follows when all processes exist: each goes down its user namespaces one by one,
//     and in each makes or joins what that one owns.

// Operations of a plan with nested namespaces, besides those of Grow.
const (
	// EnterUser makes Pid enter a user namespace by setns(2).
	EnterUser Op = iota + Enter + 1
	// Unshare makes Pid make a namespace and enter it; one for pids or time, for its children. A user
	// namespace is made by a ghost, and its maps are written by Via, which stays behind for that.
	Unshare
	// Join makes Pid enter a namespace by setns(2); one for pids, for its children.
	Join
	// Thread makes Pid clone its thread number Child, which it cannot do by set_tid alone. It is to be
	// made when all is in place, and before anybody's last system call.
	Thread
	// Part makes the thread Child of Pid (the leader is 0) enter a namespace, once all threads have been
	// cloned: by Join, or where there is no Via by Unshare.
	Part
)

// Namespace is one that processes of the container have made.
type Namespace struct {
	ID     int // above zero; zero is the container's own of each type
	Type   string
	Owner  int // the user namespace that owns it, of a user namespace its parent
	Parent int // of a pid namespace
}

// Place says where a process is that is not only in namespaces of the container's own.
type Place struct {
	In       []int // namespaces
	Children []int // those its children begin in, where those are not its own
	// IDs are the process's in nested pid namespaces, outermost first.
	IDs []int
	// Threads are the ids of its threads but the leader, the container's first.
	Threads [][]int
	// Apart are the threads that are elsewhere than their process.
	Apart []Apart
}

// Apart says where a thread is, as Place does for its process.
type Apart struct {
	Thread       int // its place in the process, the leader's being 0
	In, Children []int
}

// Nesting is the part of a hierarchy that Nest plans for.
type Nesting struct {
	Namespaces []Namespace // owners and parents first
	Places     map[int]Place
	// Gone are the leaders of sessions and groups that are gone, by their id: where they were.
	Gone map[int]Place
	// Reserved are ids of the container's pid namespace that no ghost may have.
	Reserved []int
}

// Nested is what a step says of nested namespaces.
type Nested struct {
	NS  int    // EnterUser, Unshare, Join
	Via int    // Join, EnterUser: a process that is in it
	Up  int    // EnterUser: how many user namespaces Via is below it
	As  string // Join: the name of its link below /proc/Via/ns
	// User and Space are the namespaces that a Fork makes for the child, zero for none.
	User, Space int
	// IDs are those of a Fork that can be chosen, innermost first as set_tid wants them. Hints make the
	// kernel choose the others.
	IDs   []int
	Hints []Hint
	// Group is the process group of a Setpgid as the caller's pid namespace numbers it.
	Group int
}

// text shows what a step does with a namespace.
func (n *Nested) text(op Op) string {
	switch {
	case op == Thread:
		return fmt.Sprintf("thread %v", n.IDs)
	case op == Unshare, op == Part && n.Via == 0:
		return fmt.Sprintf("unshare %d", n.NS)
	case op == EnterUser:
		return fmt.Sprintf("setns user %d of %d", n.NS, n.Via)
	}
	return fmt.Sprintf("setns %s %d of %d", n.As, n.NS, n.Via)
}

// Hint makes a pid namespace give a number next.
type Hint struct {
	Writer int // a process of that namespace that may
	Next   int
}

// Nest adds to a plan what it takes to put each process into its namespaces. The root is the first in
// the list. Keepers are the ghosts that are left at the end.
func Nest(p *Plan, processes []Process, n Nesting) (*Plan, error) {
	n.Reserved = append(slices.Clone(n.Reserved), p.Ghosts...)
	x := newNest(processes, n)
	for _, s := range p.Steps {
		if err := x.step(s); err != nil {
			return nil, err
		}
	}
	for _, q := range processes {
		if x.parent[q.Pid] != q.Ppid && q.Ppid != 0 {
			return nil, &Unreachable{q.Pid, fmt.Sprintf("it would be a child of %d, for orphans do not leave their pid namespace", x.parent[q.Pid])}
		}
	}
	if err := x.settle(); err != nil {
		return nil, err
	}
	if err := x.alone(processes); err != nil {
		return nil, err
	}
	return &Plan{Steps: x.steps, Ghosts: p.Ghosts, Keepers: x.keepers}, x.threads()
}

// alone refuses what setns(2) does not let those do who share tables: to enter a user or mount namespace
// with a file system context of others', or a time namespace with an address space of others'.
func (x *nest) alone(processes []Process) error {
	users := map[[2]int]int{}
	shared := map[int]Shared{}
	for _, p := range processes {
		shared[p.Pid] = p.Shared
		for _, t := range []Table{FS, MM} {
			users[[2]int{int(t), p.Shared[t]}]++
		}
	}
	for _, s := range x.steps {
		if s.Op != EnterUser && s.Op != Unshare && s.Op != Join || !x.wanted[s.Pid] {
			continue
		}
		table := FS
		ns := x.byID[s.Nested.NS]
		switch {
		case ns == nil || s.Op == Unshare && ns.Type == "user": // that is the ghost's
			continue
		case ns.Type == "time":
			table = MM
		case ns.Type != "user" && ns.Type != "mnt":
			continue
		}
		if id := shared[s.Pid][table]; id != 0 && users[[2]int{int(table), id}] > 1 {
			return &Unreachable{s.Pid, "it shares a table with others which keeps it from entering its " + ns.Type + " namespace"}
		}
	}
	return nil
}

// threads adds the threads of processes that cannot choose all ids of these.
func (x *nest) threads() error {
	for _, pid := range x.order {
		p := x.alive[pid]
		for i, ids := range x.Places[pid].Threads {
			if p.user == 0 {
				break
			}
			s := Step{Op: Thread, Pid: pid, Child: 1 + i, Nested: &Nested{}}
			if err := x.number(s, p, &nested{space: p.space, ids: ids}, s.Nested); err != nil {
				return err
			}
			x.add(s)
		}
	}
	return nil
}

// nest follows what the steps lead to.
type nest struct {
	Nesting
	steps   []Step
	byID    map[int]*Namespace
	wanted  map[int]bool // processes of the container; all others are ghosts
	zombies map[int]bool
	alive   map[int]*nested
	order   []int // processes in order of their fork
	parent  map[int]int
	reapers map[int]bool
	init    map[int]int // of pid namespaces that have one
	born    map[int]int // other namespaces that exist, but for user namespaces: who is in it
	used    map[int]map[int]bool
	time    map[int]int // the time namespaces that children of processes begin in
	wishes  []wish
	keepers []int
}

// nested is the state of one process.
type nested struct {
	user, space, kids int
	ids               []int // in pid namespaces, the container's first
	in                map[int]bool
}

func newNest(processes []Process, n Nesting) *nest {
	x := &nest{
		Nesting: n, byID: map[int]*Namespace{}, wanted: map[int]bool{}, zombies: map[int]bool{}, alive: map[int]*nested{}, parent: map[int]int{},
		reapers: map[int]bool{}, init: map[int]int{}, born: map[int]int{}, used: map[int]map[int]bool{}, time: map[int]int{},
	}
	for i := range n.Namespaces {
		x.byID[n.Namespaces[i].ID] = &n.Namespaces[i]
	}
	x.used[0] = map[int]bool{}
	for _, p := range processes {
		x.wanted[p.Pid], x.zombies[p.Pid] = true, p.Zombie
		x.used[0][p.Pid], x.used[0][p.Pgid], x.used[0][p.Sid] = true, true, true
	}
	for _, id := range n.Reserved {
		x.used[0][id] = true
	}
	x.state(processes[0].Pid) // the init, before any that Enter brings
	for _, places := range []map[int]Place{n.Places, n.Gone} {
		for _, p := range places {
			x.use(x.spaceOf(p), p.IDs)
			for _, ids := range p.Threads {
				x.use(x.spaceOf(p), ids[1:])
			}
		}
	}
	return x
}

// use notes ids that are taken in a nested pid namespace and those it lies in.
func (x *nest) use(space int, ids []int) {
	for i := len(ids) - 1; i >= 0 && space != 0; i-- {
		if x.used[space] == nil {
			x.used[space] = map[int]bool{}
		}
		x.used[space][ids[i]] = true
		space = x.byID[space].Parent
	}
}

// find returns the namespace of a type in a list, 0 for none.
func (x *nest) find(list []int, kind string) int {
	for _, id := range list {
		if ns := x.byID[id]; ns != nil && ns.Type == kind {
			return id
		}
	}
	return 0
}

func (x *nest) spaceOf(p Place) int { return x.find(p.In, "pid") }
func (x *nest) userOf(pid int) int  { return x.find(x.Places[pid].In, "user") }

// within says that a namespace is, or lies in, another: outer is 0 for the container's.
func (x *nest) within(inner, outer int) bool {
	for inner != outer && inner != 0 {
		if ns := x.byID[inner]; ns.Type == "user" {
			inner = ns.Owner
		} else {
			inner = ns.Parent
		}
	}
	return inner == outer
}

func (x *nest) owner(space int) int {
	if space == 0 {
		return 0
	}
	return x.byID[space].Owner
}

func (x *nest) add(s Step) { x.steps = append(x.steps, s) }

func (x *nest) state(pid int) *nested {
	if x.alive[pid] == nil { // the root, or one brought in
		x.alive[pid] = &nested{ids: []int{pid}, in: map[int]bool{}}
		x.order = append(x.order, pid)
	}
	return x.alive[pid]
}

// step adds one step of Grow's plan.
func (x *nest) step(s Step) error {
	switch s.Op {
	case Fork:
		return x.fork(s)
	case Enter:
		if x.spaceOf(x.Places[s.Child]) != 0 {
			return &Unreachable{s.Child, "it was brought from outside into a pid namespace that a task has made"}
		}
		x.state(s.Child)
	case Exit:
		x.exit(s.Pid)
	case Subreaper:
		x.reapers[s.Pid] = s.On
	case Setpgid:
		group, err := x.group(s.Pid, s.Pgid)
		if err != nil {
			return err
		}
		if group != s.Pgid || x.state(s.Pid).space != 0 {
			s.Nested = &Nested{Group: group}
		}
	}
	x.add(s)
	return nil
}

// group is a process group as a process can name it.
func (x *nest) group(pid, pgid int) (int, error) {
	me, leader := x.state(pid), x.alive[pgid]
	depth := len(me.ids) - 1
	if depth == 0 {
		return pgid, nil
	}
	if leader == nil {
		gone := x.Gone[pgid]
		leader = &nested{space: x.spaceOf(gone), ids: append([]int{pgid}, gone.IDs...)}
	}
	if !x.within(leader.space, me.space) || depth >= len(leader.ids) {
		return 0, &Unreachable{pid, fmt.Sprintf("its process group %d cannot be named in its pid namespace", pgid)}
	}
	return leader.ids[depth], nil
}

// exit follows the children of a ghost: they go to the nearest child subreaper of the ghost's own pid
// namespace, else to that one's init (find_new_reaper in kernel/exit.c).
func (x *nest) exit(pid int) {
	ghost := x.state(pid)
	heir := x.init[ghost.space]
	if ghost.space == 0 {
		heir = x.order[0]
	}
	for p := x.parent[pid]; p != 0 && x.alive[p] != nil && x.alive[p].space == ghost.space; p = x.parent[p] {
		if x.reapers[p] {
			heir = p
			break
		}
	}
	for child, parent := range x.parent {
		if parent == pid {
			x.parent[child] = heir
		}
	}
	delete(x.alive, pid)
	delete(x.parent, pid)
	x.order = slices.DeleteFunc(x.order, func(p int) bool { return p == pid })
}

// holder finds a process in a user namespace, or as few as possible below it; 0 if there is none.
func (x *nest) holder(ns int) (via, up int) {
	for _, pid := range x.order {
		above := 0
		for u := x.alive[pid].user; u != 0; u = x.byID[u].Owner {
			if u == ns && (via == 0 || above < up) {
				via, up = pid, above
			}
			above++
		}
		if via != 0 && up == 0 {
			break
		}
	}
	return via, up
}

// fork puts the child into its pid namespace.
func (x *nest) fork(s Step) error {
	f := x.state(s.Pid)
	c := &nested{in: map[int]bool{}}
	if err := x.child(s, f, c); err != nil {
		return err
	}
	in := &Nested{}
	if c.space != 0 && x.init[c.space] == 0 {
		if err := x.makeSpace(s, f, c, in); err != nil {
			return err
		}
	} else if f.kids != c.space {
		if err := x.aim(s.Pid, f, c.space, s.Child); err != nil {
			return err
		}
	}
	c.user, c.kids = f.user, c.space
	if in.User != 0 {
		c.user = in.User
	}
	if err := x.number(s, f, c, in); err != nil {
		return err
	}
	x.alive[s.Child], x.parent[s.Child] = c, s.Pid
	x.order = append(x.order, s.Child)
	if len(c.ids) > 1 || f.user != 0 || in.User != 0 {
		s.Nested = in
	}
	x.add(s)
	return nil
}

// child decides in which pid namespace a child is to be, and its ids there.
func (x *nest) child(s Step, f, c *nested) error {
	p, known := x.Places[s.Child]
	if !known && !x.wanted[s.Child] {
		p, known = x.Gone[s.Child]
	}
	c.ids = []int{s.Child}
	if known || x.wanted[s.Child] {
		c.space = x.spaceOf(p)
		c.ids = append(c.ids, p.IDs...)
	} else {
		c.space = f.space // a ghost of no name
		if c.space != 0 {
			c.ids = append(c.ids, x.free(c.space)...)
		}
	}
	if !x.within(c.space, f.space) {
		return &Unreachable{s.Child, "its pid namespace does not lie in that of who would have to fork it"}
	}
	return nil
}

// free returns an unused id of a pid namespace and of all above it but the container's, outermost
// first; of the container's alone where that is asked for.
func (x *nest) free(space int) (ids []int) {
	for at := space; ; at = x.byID[at].Parent {
		if at == 0 && space != 0 {
			break
		}
		if x.used[at] == nil {
			x.used[at] = map[int]bool{}
		}
		id := firstTemporaryPid
		for x.used[at][id] {
			id++
		}
		x.used[at][id] = true
		ids = append(ids, id)
		if at == 0 {
			break
		}
	}
	slices.Reverse(ids)
	return ids
}

// makeSpace lets a fork make the pid namespace whose init the child is.
func (x *nest) makeSpace(s Step, f, c *nested, in *Nested) error {
	ns := x.byID[c.space]
	ghost := !x.wanted[s.Pid]
	switch {
	case c.ids[len(c.ids)-1] != 1:
		return &Unreachable{s.Child, "it is not the init of its pid namespace, and would have to be the first in it"}
	case ns.Parent != f.space:
		return &Unreachable{s.Child, "its pid namespace was not made from that of its parent"}
	case !x.within(x.userOf(s.Child), ns.Owner) && x.wanted[s.Child]:
		return &Unreachable{s.Child, "it is not in the user namespace that owns its pid namespace"}
	}
	if f.kids != f.space {
		if err := x.aim(s.Pid, f, f.space, s.Child); err != nil {
			return err
		}
	}
	holder, _ := x.holder(ns.Owner)
	unborn := ns.Owner != 0 && holder == 0
	switch {
	case f.user == ns.Owner:
	case unborn && x.byID[ns.Owner].Owner == f.user && (ghost || !x.within(x.userOf(s.Pid), ns.Owner)):
		in.User = ns.Owner
	case x.within(ns.Owner, f.user) && (ghost || x.within(x.userOf(s.Pid), ns.Owner)):
		if err := x.descend(s.Pid, f, ns.Owner); err != nil {
			return err
		}
	default:
		return &Unreachable{s.Child, "its parent could not have made its pid namespace for the user namespace that owns it"}
	}
	in.Space = c.space
	x.init[c.space] = s.Child
	return nil
}

// descend lets a process enter user namespaces down to one.
func (x *nest) descend(pid int, f *nested, to int) error {
	if f.user == to {
		return nil
	}
	if err := x.descend(pid, f, x.byID[to].Owner); err != nil {
		return err
	}
	via, up := x.holder(to)
	ghost := 0
	if via == 0 {
		ghost = x.free(0)[0]
		if err := x.fork(Step{Op: Fork, Pid: pid, Child: ghost}); err != nil {
			return err
		}
		x.alive[ghost].user, via = to, ghost
		x.add(Step{Op: Unshare, Pid: ghost, Nested: &Nested{NS: to, Via: pid}})
	}
	x.add(Step{Op: EnterUser, Pid: pid, Nested: &Nested{NS: to, Via: via, Up: up}})
	f.user = to
	if ghost != 0 {
		x.exit(ghost)
		x.add(Step{Op: Exit, Pid: ghost})
	}
	return nil
}

// aim makes the children of a process begin in a pid namespace that has its init.
func (x *nest) aim(pid int, f *nested, space, child int) error {
	if !x.within(x.owner(space), f.user) || !x.within(space, f.space) {
		return &Unreachable{child, "its parent cannot enter its pid namespace"}
	}
	via := pid
	if space != f.space {
		via = x.init[space]
	}
	x.add(Step{Op: Join, Pid: pid, Nested: &Nested{NS: space, Via: via, As: "pid"}})
	f.kids = space
	return nil
}

// number says how the child gets its ids: those of the innermost namespaces, as far as the forker may
// choose them, by set_tid, the others by hints.
func (x *nest) number(s Step, f, c *nested, in *Nested) error {
	space, chosen := c.space, true
	for i := len(c.ids) - 1; i >= 0; i-- {
		chosen = chosen && (x.within(x.owner(space), f.user) || in.User != 0 && space == c.space)
		if chosen {
			in.IDs = append(in.IDs, c.ids[i])
		} else {
			w := x.writer(space)
			if w == 0 {
				return &Unreachable{s.Child, "no process can choose its pid"}
			}
			in.Hints = append(in.Hints, Hint{w, c.ids[i]})
		}
		if space != 0 {
			space = x.byID[space].Parent
		}
	}
	return nil
}

// Writer of a hint: a process of the namespace that may choose ids in it.
func (x *nest) writer(space int) int {
	for _, pid := range x.order {
		if p := x.alive[pid]; p.space == space && x.within(x.owner(space), p.user) {
			return pid
		}
	}
	return 0
}
