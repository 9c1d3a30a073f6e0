package forest

// Process groups are settled where processes are forked: a child inherits the group of its forker, and
// calls setpgid if it needs another. Three things can stand in the way.
//
//   - The group's leader is gone. A ghost with its pid founds the group and leaves as soon as the first
//     member is in, since a group lives as long as any member.
//   - The leader is forked later than the member. The member waits for it.
//   - The leader founded the group and went to another one. It is a leaver: it founds its group at once
//     but leaves it only at the end of its session, when the group has another member.
//
// The group of a session leader exists from its setsid until the session is complete, since the leader,
// ghost or not, stays that long and cannot change its group. Group 0, from outside, has no name
// by which it could be entered, so processes leave it only when all below that stay in it are forked.

// A group is a process group; founded says that it exists.
type group struct {
	id      int
	leader  *node // nil where it is gone
	founded bool
	members int // processes in the group which will remain there
	waiting []*node
}

func (f *family) linkGroups() {
	for _, n := range f.nodes {
		if n.ghost || f.groups[n.Pgid] != nil {
			continue
		}
		// The group of a session, and the one from outside, comes with the session.
		f.groups[n.Pgid] = &group{id: n.Pgid, leader: f.byPid[n.Pgid], founded: n.Pgid == n.Sid}
	}
}

// needsGhost says that only a ghost can found the group, and that none has.
func (p *group) needsGhost() bool { return !p.founded && p.leader == nil }

// settle brings n into its process group, or lets it wait.
func (g *grower) settle(n *node) {
	own := g.groups[n.Pid]
	if own != nil && !own.founded {
		g.found(n, own)
	}
	switch {
	case own == nil:
		g.enter(n, g.groups[n.Pgid])
	case n.Pgid == n.Pid:
		own.members++
	default:
		n.session.leavers = append(n.session.leavers, n)
	}
}

// found makes n the founder of its group and admits those who wait for that.
func (g *grower) found(n *node, p *group) {
	g.setpgid(n, p)
	p.founded = true
	for _, member := range p.waiting {
		g.enter(member, p)
	}
	p.waiting = nil
}

func (g *grower) setpgid(n *node, p *group) {
	if n.group != p.id {
		g.step(Step{Op: Setpgid, Pid: n.Pid, Pgid: p.id})
		n.group = p.id
	}
}

// foundByGhost lets forker fork a ghost which founds group p and is still there on return.
func (g *grower) foundByGhost(forker *node, p *group) *node {
	ghost := newGhost(p.id)
	g.fork(forker, ghost)
	g.found(ghost, p)
	return ghost
}

// enter brings n into group p for good.
func (g *grower) enter(n *node, p *group) {
	switch {
	case p.needsGhost():
		ghost := g.foundByGhost(n, p)
		defer g.exit(ghost, nil)
	case !p.founded:
		p.waiting = append(p.waiting, n)
		return
	}
	g.setpgid(n, p)
	p.members++
}

// leaveGroups lets the leavers of a complete session go, each when its group has a member that remains.
// Where leavers wait for each other in a ring, a ghost holds one of the groups meanwhile.
func (g *grower) leaveGroups(s *session) {
	var ready, holders []*node
	pending := make(map[*node]bool, len(s.leavers))
	for _, n := range s.leavers {
		if g.groups[n.Pid].members > 0 {
			ready = append(ready, n)
		} else {
			pending[n] = true
		}
	}
	for _, n := range append(s.leavers, nil) {
		for len(ready) > 0 {
			next := ready[0]
			ready = ready[1:]
			target := g.groups[next.Pgid]
			g.enter(next, target)
			if pending[target.leader] {
				delete(pending, target.leader)
				ready = append(ready, target.leader)
			}
		}
		if pending[n] {
			holder := g.temporary()
			g.fork(n, holder)
			holders = append(holders, holder)
			delete(pending, n)
			ready = append(ready, n)
		}
	}
	for _, holder := range holders {
		g.exit(holder, nil)
	}
}
