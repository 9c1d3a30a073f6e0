package forest

import (
	"fmt"
	"slices"
	"strings"
)

// Tables that processes share come about by clone(2) alone: a child takes the table of its forker or a
// copy. A process can leave a table (unshare(2)) but none can join one. So those who hold a table
// at some time hang together in the lineage, and the table is handed on along the lines between them.
// Two means bring that about.
//
//   - A lineage leaves open below which process a child is forked, as long as its parent is above. All
//     who share a table are hung below one of them; ghosts in between hand it on and leave.
//   - Where that cannot be, a process between two of them holds their table first, forks those who need
//     it, and leaves it for its own. Nobody can leave an address space but by execve(2), nor signal
//     actions, which a stub does not do.

// Table is a kind of table that processes can share.
type Table uint8

// The kinds of table, with the flags of clone(2) that share them.
const (
	MM      Table = iota // CLONE_VM
	Sighand              // CLONE_SIGHAND, only with CLONE_VM
	Files                // CLONE_FILES
	FS                   // CLONE_FS
	SemUndo              // CLONE_SYSVSEM
	tables
)

var tableNames = [tables]string{"address space", "table of signal actions", "descriptor table", "file system context", "semaphore undo list"}

// left says that a process can leave such a table.
func (t Table) left() bool { return t != MM && t != Sighand }

func (t Table) String() string { return tableNames[t] }

// Tables is a set of kinds of table.
type Tables uint8

// Has says that t is in the set.
func (s Tables) Has(t Table) bool { return s&(1<<t) != 0 }

// Add puts t into the set.
func (s *Tables) Add(t Table) { *s |= 1 << t }

func (s Tables) String() string {
	var names []string
	for t := range tables {
		if s.Has(t) {
			names = append(names, t.String())
		}
	}
	return strings.Join(names, ", ")
}

// Shared says which tables a process shares: those who have the same number other than 0 share it.
type Shared [tables]int

// A class is all who share one table.
type class struct {
	table   Table
	id      int
	members []*node // ascending by pid
}

// linkClasses finds who shares what, and drops what nobody shares.
func (f *family) linkClasses() error {
	type key struct {
		table Table
		id    int
	}
	byKey := make(map[key]*class)
	for _, n := range f.nodes {
		for t, id := range n.Shared {
			k := key{Table(t), id}
			if id == 0 {
				continue
			}
			if byKey[k] == nil {
				byKey[k] = &class{table: k.table, id: id}
				f.classes = append(f.classes, byKey[k])
			}
			byKey[k].members = append(byKey[k].members, n)
		}
	}
	f.classes = slices.DeleteFunc(f.classes, func(c *class) bool {
		if len(c.members) > 1 {
			return false
		}
		c.members[0].Shared[c.table] = 0
		return true
	})
	slices.SortStableFunc(f.classes, func(a, b *class) int { return int(a.table) - int(b.table) })
	for _, c := range f.classes {
		for _, n := range c.members {
			if c.table == Sighand && (n.Shared[MM] == 0 || n.Shared[MM] != c.members[0].Shared[MM]) {
				return &Unreachable{n.Pid, "it shares signal actions with a process of another address space"}
			}
		}
	}
	return nil
}

// share makes the lineage one that hands on every table.
func (f *family) share() *conflict {
	for _, c := range f.classes {
		c.hangTogether()
	}
	for _, c := range f.classes {
		if conflict := c.carry(); conflict != nil {
			return conflict
		}
	}
	for _, n := range f.nodes {
		if conflict := n.checkOwn(); conflict != nil {
			return conflict
		}
		if conflict := n.divide(); conflict != nil {
			return conflict
		}
	}
	return nil
}

// has says that n shares the class's table in the end.
func (c *class) has(n *node) bool { return n.Shared[c.table] == c.id }

// top is the highest node above n that members lead up to without a gap; with passing set, the dead may
// be in between, who can hold any table.
func (c *class) top(n *node, passing bool) *node {
	for n.forker != nil && !n.outside && (c.has(n.forker) || passing && n.forker.dead() && n.forker.carried[c.table] == 0) {
		n = n.forker
	}
	return n
}

// dead says that n will be gone, or a zombie that has no tables.
func (n *node) dead() bool { return n.ghost || n.Zombie }

// hangTogether hangs all members below one of them, if the lineage allows it: at best where all tables
// that they share with their present forkers are at hand too.
func (c *class) hangTogether() {
	heads := slices.Clone(c.members)
	slices.SortStableFunc(heads, func(a, b *node) int { return a.level() - b.level() })
	for _, passing := range []bool{false, true} {
		var tops []*node
		for _, n := range c.members {
			if top := c.top(n, passing); !slices.Contains(tops, top) {
				tops = append(tops, top)
			}
		}
		if len(tops) == 1 {
			return
		}
		for _, strict := range []bool{true, false} {
			for _, head := range heads {
				if hangBelow(head, c.top(head, passing), tops, strict) {
					return
				}
			}
		}
	}
}

// hangBelow hangs all tops but head's own below it, if they fit.
func hangBelow(head, own *node, tops []*node, strict bool) bool {
	if slices.ContainsFunc(tops, func(n *node) bool { return n != own && !n.fits(head, strict) }) {
		return false
	}
	for _, n := range tops {
		if n != own {
			n.hangBelow(head)
		}
	}
	return true
}

// fits says that head can fork n instead of its forker.
func (n *node) fits(head *node, strict bool) bool {
	if n.outside || head.descends(n) || n.listBelow(head) == nil {
		return false
	}
	for t, id := range n.Shared {
		if id != 0 && (strict || !Table(t).left()) && n.forker.holds(Table(t), id) && !head.holds(Table(t), id) {
			return false
		}
	}
	return true
}

// level is how many forks n is away from the root.
func (n *node) level() (level int) {
	for ; n.forker != nil; n = n.forker {
		level++
	}
	return level
}

// descends says that n is a, or below it.
func (n *node) descends(a *node) bool {
	for ; n != nil; n = n.forker {
		if n == a {
			return true
		}
	}
	return false
}

// listBelow gives the list of children of head that n could be in: one where all that is above n is
// above it still, and where it is born in the session it needs. nil if there is none.
func (n *node) listBelow(head *node) *[]*node {
	switch region := n.region(); {
	case n.forker == nil || !head.descends(n.forker):
		return nil
	case n.leads() && len(n.early) == 0:
		return &head.late
	case head.leads() && head.session == region, !head.leads() && head.region() == region:
		return &head.late
	case head.region() == region && !head.outside && head.bornAtHome(false):
		return &head.early
	}
	return nil
}

// bornAtHome says that n is, or with move set makes it, forked in the session where it is to be born, which
// a leader without early children need not be.
func (n *node) bornAtHome(move bool) bool {
	f := n.forker
	switch {
	case f.leads() && f.session == n.region():
		return true
	case f.region() != n.region() || f.outside:
		return false
	case !f.leads():
		return true
	}
	if move && !insert(&f.early, n) {
		remove(&f.late, n)
	}
	return f.bornAtHome(move)
}

// hangBelow makes head the forker of n.
func (n *node) hangBelow(head *node) {
	list := n.listBelow(head)
	remove(&n.forker.early, n)
	remove(&n.forker.late, n)
	n.forker = head
	if list == &head.early {
		head.bornAtHome(true)
	}
	insert(list, n)
	if n.Pgid == 0 || n.keepsOutside {
		for a := head; a != nil && !a.keepsOutside; a = a.forker {
			a.keepsOutside = true
		}
	}
}

// insert puts n into a list of children, remove takes it out.
func insert(list *[]*node, n *node) (was bool) {
	i, was := slices.BinarySearchFunc(*list, n, compareSiblings)
	if !was {
		*list = slices.Insert(*list, i, n)
	}
	return was
}

func remove(list *[]*node, n *node) {
	if i, was := slices.BinarySearchFunc(*list, n, compareSiblings); was {
		*list = slices.Delete(*list, i, i+1)
	}
}

// carry makes those between the members hold the table.
func (c *class) carry() *conflict {
	top := c.members[0]
	for _, n := range c.members {
		for !n.descends(top) {
			top = top.forker
		}
	}
	for _, n := range c.members {
		for n != top {
			if n.outside {
				return &conflict{pid: n.Pid, reason: fmt.Sprintf("it was brought in from outside, but processes above and below it share one %v", c.table)}
			}
			n = n.forker
			switch {
			case c.has(n) || n.carried[c.table] == c.id:
				continue
			case n.carried[c.table] != 0:
				return &conflict{pid: n.Pid, reason: fmt.Sprintf("processes above and below it share one %v, and others another", c.table)}
			case !n.dead() && !c.table.left():
				return &conflict{pid: n.Pid, reason: fmt.Sprintf("processes around it, as pid %d, share an %v that it has no part in", c.members[0].Pid, c.table)}
			}
			n.carried[c.table] = c.id
		}
	}
	return nil
}

// checkOwn makes sure that who leaves a table for another is the first to hold that one.
func (n *node) checkOwn() *conflict {
	for t, id := range n.Shared {
		if id != 0 && n.carried[t] != 0 && n.forker != nil && n.forker.holds(Table(t), id) {
			return &conflict{pid: n.Pid, reason: fmt.Sprintf("others below it share another %v than it shares with its forker", Table(t))}
		}
	}
	return nil
}

// holds says that n holds a table at some time.
func (n *node) holds(t Table, id int) bool { return n.Shared[t] == id || n.carried[t] == id }

// born is the number of the table that n is born with, 0 for one of its own.
func (n *node) born(t Table) int {
	if n.carried[t] != 0 {
		return n.carried[t]
	}
	return n.Shared[t]
}

// handsOn gives the tables that child is to share with n, its forker.
func (n *node) handsOn(child *node) (s Tables) {
	for t := range tables {
		if id := child.born(t); id != 0 && n.holds(t, id) {
			s.Add(t)
		}
	}
	return s
}

// handedOn is what a ghost between n and some of its children must hold.
func (n *node) handedOn(children []*node) (held Shared) {
	for _, child := range children {
		for t := range tables {
			if n.handsOn(child).Has(t) {
				held[t] = child.born(t)
			}
		}
	}
	return held
}

// A round is children who are born while their forker holds the same tables.
type round struct {
	leave    Tables // before it
	children []*node
}

// divide divides the children of n, before and after its setsid, into rounds.
func (n *node) divide() *conflict {
	var carried Tables
	for t, id := range n.carried {
		if id != 0 && !n.dead() {
			carried.Add(Table(t))
		}
	}
	d := division{node: n, carried: carried, early: n.early, late: n.late}
	n.rounds[0] = d.rounds(&d.early)
	n.rounds[1] = d.rounds(&d.late)
	if d.stuck != nil {
		return &conflict{pid: d.stuck.Pid, reason: fmt.Sprintf("its forker %d would have to leave a table that a later child shares", n.Pid)}
	}
	if d.carried != 0 {
		n.rounds[1] = append(n.rounds[1], round{leave: d.carried})
	}
	return nil
}

type division struct {
	*node
	carried     Tables // what it has not left yet
	early, late []*node
	stuck       *node
}

// before and after are the tables that a child needs its forker not to have left, or to have left.
func (d *division) before(child *node) (s Tables) {
	for t := range tables {
		if d.carried.Has(t) && child.born(t) == d.node.carried[t] {
			s.Add(t)
		}
	}
	return s
}

func (d *division) after(child *node) (s Tables) {
	for t := range tables {
		if id := child.born(t); d.carried.Has(t) && id != 0 && id == d.Shared[t] {
			s.Add(t)
		}
	}
	return s
}

// rounds takes the children of a list, as many at a time as it can.
func (d *division) rounds(list *[]*node) (rounds []round) {
	var leave Tables
	for len(*list) > 0 {
		next := round{leave: leave}
		var waiting []*node
		for _, child := range *list {
			if d.after(child) == 0 {
				next.children = append(next.children, child)
			} else {
				waiting = append(waiting, child)
			}
		}
		rounds, *list = append(rounds, next), waiting
		leave = 0
		for _, child := range waiting {
			leave |= d.after(child)
		}
		for _, child := range append(slices.Clone(d.early), d.late...) {
			leave &^= d.before(child)
		}
		if leave == 0 && len(waiting) > 0 {
			d.stuck = waiting[0]
			return rounds
		}
		d.carried &^= leave
	}
	return rounds
}
