package forest

import (
	"container/heap"
	"slices"
)

// Everything about a lineage follows from the order in which the session leaders are born. Two rules
// order most of them: parents are older than their children, and a leader is older than the members of
// its session. Between the rest the pids decide: they are handed out in ascending order, so without a
// wrap-around the order of pids is the order of birth, and the plan repeats the container's own
// history. Where pids have wrapped around, that guess may turn out contradictory; then findOrigins
// searches for another order.

// An edge says that the session older is older than the session younger.
type edge struct{ older, younger *session }

// A conflict says why an order of birth does not work, and which edges might help.
type conflict struct {
	pid    int
	reason string
	cures  []edge
}

// findOrigins decides for each session leader in which session it is born, and which processes must
// be among its ancestors.
func (f *family) findOrigins() error {
	s := search{family: f, budget: max(minimalBudget, searchBudget/len(f.nodes))}
	s.successors, s.degree = f.births()
	var first *conflict
	for depth := 0; depth == 0 || s.cut && s.budget > 0; depth++ {
		s.cut = false
		c := s.try(nil, depth)
		if c == nil {
			return nil
		}
		if first == nil {
			first = c
		}
	}
	return &Unreachable{first.pid, first.reason}
}

// The search looks at this many processes in all, but tries at least minimalBudget orders. Hierarchies
// whose pids have not wrapped around need one.
const (
	searchBudget  = 1 << 20
	minimalBudget = 64
)

// search looks for an order of birth by iterative deepening: with one guess corrected, with two, and so
// on, where only corrections are tried that cure the first conflict.
type search struct {
	*family
	successors [][]*node
	degree     []int // predecessors of each node
	budget     int
	cut        bool // there are corrections beyond the present depth
}

// try decides origins with extra edges and up to depth more; it returns nil on success, else the
// first conflict met.
func (s *search) try(extra []edge, depth int) *conflict {
	s.budget--
	if !s.orderByBirth(extra) {
		return &conflict{pid: s.root.Pid, reason: "no order of birth fits parents and sessions"}
	}
	c := s.settleOrigins()
	if c == nil {
		c = s.drawLineage()
	}
	if c == nil {
		c = s.share()
	}
	if c == nil {
		return nil
	}
	for _, cure := range s.corrections(c) {
		if depth == 0 {
			s.cut = true
			break
		}
		if s.budget <= 0 {
			break
		}
		if s.try(append(slices.Clone(extra), cure), depth-1) == nil {
			return nil
		}
	}
	return c
}

// corrections are the cures of a conflict that contradict the order of birth which led to it.
func (s *search) corrections(c *conflict) []edge {
	return slices.DeleteFunc(c.cures, func(cure edge) bool {
		return cure.older.age <= cure.younger.age || cure.younger == s.sessions[0] || cure.younger.leader.outside
	})
}

// births gives the pairs of nodes one of which is certainly born before the other, as successor lists.
func (f *family) births() (successors [][]*node, degree []int) {
	successors = make([][]*node, len(f.nodes))
	degree = make([]int, len(f.nodes))
	before := func(older, younger *node) {
		successors[older.index] = append(successors[older.index], younger)
		degree[younger.index]++
	}
	for _, n := range f.nodes {
		if n.parent != nil {
			before(n.parent, n)
		}
		if n.leads() {
			continue
		}
		before(n.session.leader, n)
		// A process of another session above n is above the leader of n's session, too: below the
		// leader there are only processes born in the session. Leaders in between might be such.
		a := n.parent
		for a != f.root && a.leads() && a.session != n.session {
			a = a.parent
		}
		if a.session != n.session && n.session != f.sessions[0] {
			before(a, n.session.leader)
		}
	}
	return successors, degree
}

// orderByBirth sorts the sessions by the birth of their leaders and numbers them. It returns false where
// the edges form a loop.
func (s *search) orderByBirth(extra []edge) bool {
	degree := slices.Clone(s.degree)
	more := make(map[*node][]*node)
	for _, e := range extra {
		more[e.older.leader] = append(more[e.older.leader], e.younger.leader)
		degree[e.younger.leader.index]++
	}
	ready := &birthQueue{s.root}
	if degree[s.root.index] != 0 {
		return false
	}
	for _, n := range s.nodes {
		if degree[n.index] == 0 && n != s.root {
			*ready = append(*ready, n)
		}
	}
	heap.Init(ready)
	age, born := 1, 0
	s.sessions[0].age = 0
	for ready.Len() > 0 {
		n := heap.Pop(ready).(*node)
		born++
		if n.leads() && n != s.root {
			n.session.age = age
			age++
		}
		for _, list := range [2][]*node{s.successors[n.index], more[n]} {
			for _, m := range list {
				if degree[m.index]--; degree[m.index] == 0 {
					heap.Push(ready, m)
				}
			}
		}
	}
	slices.SortFunc(s.sessions, func(a, b *session) int { return a.age - b.age })
	return born == len(s.nodes)
}

// birthQueue yields the members of sessions at once, since only leaders compete, and those by pid. What comes
// from outside needs nobody to be there before it, so it may as well come first.
type birthQueue []*node

func (q birthQueue) Len() int { return len(q) }
func (q birthQueue) Less(i, j int) bool {
	if a, b := q[i].leads(), q[j].leads(); a != b {
		return b
	}
	if a, b := q[i].outside, q[j].outside; a != b {
		return a
	}
	return q[i].Pid < q[j].Pid
}
func (q birthQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *birthQueue) Push(x any)   { *q = append(*q, x.(*node)) }
func (q *birthQueue) Pop() any {
	n := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return n
}
