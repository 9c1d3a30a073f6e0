package forest

import "fmt"

// settleOrigins finds, for sessions ordered by age, the session each leader is born in (its origin) and
// the processes that must be its ancestors. Both are the least that is needed: the origin the oldest
// session that will do, the ancestors no more than follow. What is least is enough whenever the order
// is one in which the hierarchy can come about, because both only grow in ways that hold in every
// lineage of that order.
func (f *family) settleOrigins() *conflict {
	for _, s := range f.sessions {
		s.origin, s.pinned, s.above, s.from, s.raiser = f.sessions[0], false, nil, nil, nil
	}
	f.sessions[0].origin = nil
	if c := f.pinOrigins(); c != nil {
		return c
	}
	if c := f.seedAbove(); c != nil {
		return c
	}
	for changed := true; changed; {
		changed = false
		for i := len(f.sessions) - 1; i > 0; i-- {
			more, c := f.sessions[i].lift()
			if c != nil {
				return c
			}
			changed = changed || more
		}
	}
	return nil
}

// pinOrigins looks at children in another session than their parent, where the parent leads one. If the
// child's session is the older one, the parent was born in it and forked the child before its setsid.
// That can be true of one session only.
func (f *family) pinOrigins() *conflict {
	for _, n := range f.nodes {
		if n.leads() || n.parent == f.root || !n.parent.leads() {
			continue
		}
		s, parent := n.session, n.parent.session
		if s == parent || s.age > parent.age {
			continue
		}
		if n.parent.outside {
			return &conflict{n.Pid, fmt.Sprintf("its parent %d was brought in from outside, and its session %d is older", n.Ppid, s.id), nil}
		}
		if parent.pinned && parent.origin != s {
			return &conflict{n.Pid, fmt.Sprintf("its parent %d leads a session and has children from both the sessions %d and %d",
				n.Ppid, parent.origin.id, s.id), []edge{{parent, s}, {parent, parent.origin}}}
		}
		parent.origin, parent.pinned = s, true
	}
	return nil
}

// seedAbove records the ancestors that follow at once: a leader's own parent, and the parent of each
// member that is not itself born in the session.
func (f *family) seedAbove() *conflict {
	for _, n := range f.nodes {
		if n.ghost || n == f.root || n.parent == f.root {
			continue
		}
		if n.leads() {
			n.session.addAbove(n.parent, nil)
			continue
		}
		if n.parent == n.session.leader || (n.parent.region() == n.session && (!n.parent.leads() || n.parent.session.pinned)) {
			continue
		}
		if n.session == f.sessions[0] {
			return &conflict{n.Pid, fmt.Sprintf("it is in the session of the root, but its parent %d has never been", n.Ppid), nil}
		}
		n.session.addAbove(n.parent, nil)
	}
	return nil
}

// addAbove makes n an ancestor of the leader of s, and says whether that is new.
func (s *session) addAbove(n *node, from *session) bool {
	if _, known := s.from[n]; known {
		return false
	}
	if s.from == nil {
		s.from = make(map[*node]*session)
	}
	s.from[n] = from
	s.above = append(s.above, n)
	return true
}

// lift moves the origin of s to the youngest session an ancestor was born in. The ancestors born in older
// ones must then be above the leader of the origin. It says whether anything changed.
func (s *session) lift() (changed bool, c *conflict) {
	for _, a := range s.above {
		r := a.cradle()
		if a.leads() && a.session.age >= s.age {
			return false, s.clash(a, edge{a.session, s})
		}
		if r.age >= s.age {
			return false, s.clash(a, edge{r, s})
		}
		if r.age <= s.origin.age {
			continue
		}
		if s.pinned {
			return false, s.clash(a, edge{r, s.origin})
		}
		s.origin, s.raiser, changed = r, nil, true
	}
	for _, a := range s.above {
		more, c := s.pass(a)
		if c != nil {
			return false, c
		}
		changed = changed || more
	}
	return changed, nil
}

// cradle is the oldest session in which n can have descendants. What was brought in from outside has none before
// its setsid.
func (n *node) cradle() *session {
	if n.outside {
		return n.session
	}
	return n.region()
}

// pass makes sure that the ancestor a of the leader of s is born in the origin of s, leads it, or is above.
func (s *session) pass(a *node) (changed bool, c *conflict) {
	origin := s.origin
	if a == origin.leader || a.region() == origin {
		return false, nil
	}
	if !a.leads() || a.session.age < origin.age {
		if origin.leader.outside {
			return false, &conflict{s.leader.Pid, fmt.Sprintf("the leader of session %d would have to descend from pid %d, "+
				"and from %d, which was brought in from outside", s.id, a.Pid, origin.id), nil}
		}
		return origin.addAbove(a, s), nil
	}
	// a leads a session younger than the origin, so it must be born below the origin's leader.
	if a.session.pinned {
		return false, s.clash(a, edge{a.session, origin})
	}
	a.session.origin, a.session.raiser = origin, s
	return true, nil
}

// clash reports that a cannot be an ancestor of the leader of s in this order of birth. Its cures are the
// one given, and to turn round one of the comparisons of age that led here.
func (s *session) clash(a *node, cure edge) *conflict {
	e := explanation{cures: []edge{cure}, seen: make(map[reason]bool)}
	e.origin(s)
	e.region(a)
	e.above(s, a)
	return &conflict{s.leader.Pid, fmt.Sprintf("the leader of session %d would have to descend from pid %d of session %d, which came later",
		s.id, a.Pid, a.Sid), e.cures}
}

// An explanation collects the comparisons that a conflict rests on, the other way round.
type explanation struct {
	cures []edge
	seen  map[reason]bool
}

// A reason is a conclusion: the origin of a session, or that a node must be above its leader.
type reason struct {
	session *session
	above   *node // nil for the origin
}

// origin explains in which session the leader of s is born.
func (e *explanation) origin(s *session) {
	if e.seen[reason{s, nil}] {
		return
	}
	e.seen[reason{s, nil}] = true
	switch {
	case s.pinned:
		e.cures = append(e.cures, edge{s, s.origin})
	case s.raiser != nil:
		e.cures = append(e.cures, edge{s, s.origin})
		e.origin(s.raiser)
		e.above(s.raiser, s.leader)
	default:
		for _, a := range s.above {
			if a.cradle() == s.origin {
				e.region(a)
				e.above(s, a)
			}
		}
	}
}

// region explains in which session a is born.
func (e *explanation) region(a *node) {
	if a.leads() {
		e.origin(a.session)
	}
}

// above explains why a must be above the leader of s.
func (e *explanation) above(s *session, a *node) {
	if _, known := s.from[a]; !known || e.seen[reason{s, a}] {
		return
	}
	e.seen[reason{s, a}] = true
	from := s.from[a]
	switch {
	case from != nil:
		// It is above because its own region is older than s.
		e.cures = append(e.cures, edge{s, a.region()})
		e.origin(from)
		e.region(a)
		e.above(from, a)
	case a.leads() && a != s.leader.parent:
		// A child of a in s was forked after a's setsid, since s is younger.
		e.cures = append(e.cures, edge{s, a.session})
	}
}
