package forest

import (
	"cmp"
	"fmt"
	"slices"
)

// drawLineage gives each node its forker, by filling the lists early and late of the forkers. It does so
// region by region: the region of a session is all that is born in it, and hangs below its leader.
func (f *family) drawLineage() *conflict {
	regions := make([][]*node, len(f.sessions)) // by age
	for _, n := range f.nodes {
		n.early, n.late, n.depth, n.keepsOutside, n.forker, n.carried = nil, nil, 0, false, nil, Shared{}
		if n != f.root {
			age := n.region().age
			regions[age] = append(regions[age], n)
		}
	}
	for i, s := range f.sessions {
		r := region{session: s, nodes: regions[i], forker: make(map[*node]*node, len(regions[i]))}
		if c := r.draw(); c != nil {
			return c
		}
		if c := r.link(); c != nil {
			return c
		}
	}
	return nil
}

// A region is what is born in one session.
type region struct {
	*session
	nodes  []*node
	forker map[*node]*node
}

// ancestors gives the nodes of the region that n must descend from.
func (r *region) ancestors(n *node) []*node {
	if !n.leads() {
		if n.parent.region() == r.session {
			return []*node{n.parent}
		}
		return nil
	}
	var list []*node
	for _, a := range n.session.above {
		if a.region() == r.session {
			list = append(list, a)
		}
	}
	return list
}

// draw chooses the forkers. As a rule a node has one ancestor in the region, or several that are already
// in line, and the last of them forks it. Where they are not, all nodes involved are put in one line;
// that costs ghosts, but the states that need it are rare.
func (r *region) draw() *conflict {
	if c := r.sort(); c != nil {
		return c
	}
	inLine := make(map[*node]bool)
	for _, n := range r.nodes {
		if !r.hang(n) {
			r.putInLine(n, inLine)
		}
	}
	if len(inLine) == 0 {
		return nil
	}
	last := r.leader
	for _, n := range r.nodes {
		if inLine[n] {
			r.forker[n], n.depth = last, last.depth+1
			last = n
		} else {
			r.hang(n)
		}
	}
	return nil
}

// hang lets n be forked by the deepest of its ancestors, and says whether that makes it descend from all.
func (r *region) hang(n *node) bool {
	ancestors := r.ancestors(n)
	deepest := r.leader
	for _, a := range ancestors {
		if deepest == r.leader || a.depth > deepest.depth {
			deepest = a
		}
	}
	r.forker[n], n.depth = deepest, deepest.depth+1
	for _, a := range ancestors {
		b := deepest
		for b.depth > a.depth {
			b = r.forker[b]
		}
		if a != b {
			return false
		}
	}
	return true
}

// putInLine marks all that n must descend from.
func (r *region) putInLine(n *node, inLine map[*node]bool) {
	for todo := r.ancestors(n); len(todo) > 0; {
		a := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !inLine[a] {
			inLine[a] = true
			todo = append(todo, r.ancestors(a)...)
		}
	}
}

// sort puts ancestors before descendants, group leaders before other siblings, so that the others find
// their group, and smaller pids first for the rest.
func (r *region) sort() *conflict {
	slices.SortFunc(r.nodes, func(a, b *node) int {
		return cmp.Or(cmp.Compare(siblingRank(a), siblingRank(b)), cmp.Compare(a.Pid, b.Pid))
	})
	const visiting, done = 1, 2
	state := make(map[*node]int, len(r.nodes))
	sorted := make([]*node, 0, len(r.nodes))
	var visit func(n *node) bool
	visit = func(n *node) bool {
		if state[n] != 0 {
			return state[n] == done
		}
		state[n] = visiting
		for _, a := range r.ancestors(n) {
			if !visit(a) {
				return false
			}
		}
		state[n] = done
		sorted = append(sorted, n)
		return true
	}
	for _, n := range r.nodes {
		if !visit(n) {
			return &conflict{pid: n.Pid, reason: "it would have to descend from itself"}
		}
	}
	r.nodes = sorted
	return nil
}

func siblingRank(n *node) int {
	if n.Pgid == n.Pid && !n.leads() {
		return 0
	}
	return 1
}

// link turns forkers into lists of children. Descendants go first, so that the list early of a node is
// complete when the node itself is linked.
func (r *region) link() *conflict {
	for _, n := range slices.Backward(r.nodes) {
		forker := r.forker[n]
		n.forker = forker
		if n.outside && forker != r.leader {
			return &conflict{pid: n.Pid, reason: fmt.Sprintf("it was brought in from outside, but would have to descend from %d", forker.Pid)}
		}
		if r.id == 0 && (n.Pgid == 0 || n.keepsOutside) {
			forker.keepsOutside = true
		}
		// A leader needs to be born in this session only to have children born in it. Without such
		// it is as well forked by a parent that has called setsid before.
		before := forker != r.leader && forker.leads()
		if before && !(n.leads() && len(n.early) == 0) {
			if forker.outside {
				return &conflict{pid: n.Pid, reason: fmt.Sprintf("it would have to be forked by %d before that was brought in from outside", forker.Pid)}
			}
			forker.early = append(forker.early, n)
		} else {
			forker.late = append(forker.late, n)
		}
	}
	for _, n := range append(r.nodes, r.leader) {
		slices.SortStableFunc(n.early, compareSiblings)
		slices.SortStableFunc(n.late, compareSiblings)
	}
	return nil
}

func compareSiblings(a, b *node) int {
	return cmp.Or(cmp.Compare(siblingRank(a), siblingRank(b)), cmp.Compare(a.Pid, b.Pid))
}
