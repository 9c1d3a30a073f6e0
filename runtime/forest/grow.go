package forest

import "slices"

// grow plays the lineage.
func (f *family) grow() *Plan {
	g := &grower{family: f, plan: &Plan{}, nextPid: firstTemporaryPid}
	f.root.group = f.root.Pid
	if f.root.Sid == 0 {
		f.root.group = 0
	}
	g.raise(f.root)
	g.finishSubreapers()
	return g.plan
}

// firstTemporaryPid is where the search for free pids starts. pid 1 is an init, ours or not.
const firstTemporaryPid = 2

// grower writes the plan and follows the state it leads to.
type grower struct {
	*family
	plan    *Plan
	nextPid int
	reaper  *node // the only subreaper at this point, if any
}

func (g *grower) step(s Step) { g.plan.Steps = append(g.plan.Steps, s) }

func (g *grower) fork(parent, child *node) {
	child.group = parent.group
	if child.outside {
		g.step(Step{Op: Enter, Child: child.Pid})
		return
	}
	g.step(Step{Op: Fork, Pid: parent.Pid, Child: child.Pid, Tables: parent.handsOn(child)})
	if child.ghost {
		g.plan.Ghosts = append(g.plan.Ghosts, child.Pid)
	}
}

// temporary returns a ghost with a pid that no process, thread, group or session has.
func (g *grower) temporary() *node {
	for g.used[g.nextPid] {
		g.nextPid++
	}
	g.used[g.nextPid] = true
	return newGhost(g.nextPid)
}

func newGhost(pid int) *node { return &node{Process: Process{Pid: pid}, ghost: true} }

// raise completes n, which has just been forked, and all below it.
func (g *grower) raise(n *node) {
	g.bearRounds(n, n.rounds[0], nil)
	switch {
	case n.Sid == n.Pid && n != g.root:
		g.step(Step{Op: Setsid, Pid: n.Pid})
		n.group = n.Pid
	case n.Sid != n.Pid && !n.keepsOutside:
		g.settle(n)
	}
	g.bearRounds(n, n.rounds[1], heirOf(n))
	if n.keepsOutside {
		g.settle(n)
	}
	if n.leads() {
		g.leaveGroups(n.session)
	}
}

// heirOf is the process that takes over the children a ghost forks itself: the final parent of the first.
// Children with another final parent get a further ghost in between. nil for other processes, which keep
// theirs, and for a ghost without children of the container.
func heirOf(n *node) *node {
	if !n.ghost {
		return nil
	}
	for _, child := range n.late {
		if !child.ghost {
			return child.parent
		}
	}
	return nil
}

// bearRounds lets forker fork children, and leave tables in between.
func (g *grower) bearRounds(forker *node, rounds []round, heir *node) {
	for _, r := range rounds {
		if r.leave != 0 {
			g.step(Step{Op: Leave, Pid: forker.Pid, Tables: r.leave})
		}
		g.bear(forker, r.children, heir)
	}
}

// bear lets forker fork the children, and completes each of them. heir is the one who takes over the
// children of a ghost.
func (g *grower) bear(forker *node, children []*node, heir *node) {
	var detours []*detour
	for _, child := range children {
		if child.ghost || child.parent == forker || child.parent == heir {
			g.fork(forker, child)
			g.raise(child)
			if child.ghost {
				g.exit(child, heirOf(child))
			}
			continue
		}
		detours = addToDetour(detours, g.detour(child), child)
	}
	for _, d := range detours {
		g.bearByGhost(forker, d)
	}
}

// A detour is a ghost between a forker and children that are to end with the same other parent. If the
// children are of a process group whose leader is gone, the ghost can be that leader.
type detour struct {
	parent   *node
	group    *group
	children []*node
}

func (g *grower) detour(child *node) detour {
	d := detour{parent: child.parent}
	own := child.Sid == child.Pid || g.groups[child.Pid] != nil
	if group := g.groups[child.Pgid]; !own && group.needsGhost() && !child.keepsOutside {
		d.group = group
	}
	return d
}

func addToDetour(detours []*detour, d detour, child *node) []*detour {
	i := slices.IndexFunc(detours, func(e *detour) bool { return e.parent == d.parent && e.group == d.group })
	if i < 0 {
		i = len(detours)
		detours = append(detours, &d)
	}
	detours[i].children = append(detours[i].children, child)
	return detours
}

func (g *grower) bearByGhost(forker *node, d *detour) {
	var ghost *node
	founds := d.group != nil && d.group.needsGhost()
	if founds {
		ghost = newGhost(d.group.id)
	} else {
		ghost = g.temporary()
	}
	ghost.carried = forker.handedOn(d.children)
	g.fork(forker, ghost)
	if founds {
		g.found(ghost, d.group)
	}
	for _, child := range d.children {
		g.fork(ghost, child)
		g.raise(child)
	}
	g.exit(ghost, d.parent)
}

// exit lets a ghost leave. heir must get its children; nil says that it has none.
func (g *grower) exit(ghost, heir *node) {
	if heir != nil {
		g.setReaper(heir)
	}
	g.step(Step{Op: Exit, Pid: ghost.Pid})
}

// setReaper makes n the process that orphans below it go to. With one subreaper at a time there is none
// nearer. The init of the pid namespace gets them without being a subreaper, if there is none.
func (g *grower) setReaper(n *node) {
	if n.Pid == 1 {
		n = nil
	}
	if g.reaper == n {
		return
	}
	if g.reaper != nil {
		g.step(Step{Op: Subreaper, Pid: g.reaper.Pid, On: false})
	}
	if n != nil {
		g.step(Step{Op: Subreaper, Pid: n.Pid, On: true})
	}
	g.reaper = n
}

// finishSubreapers gives every process the flag it had.
func (g *grower) finishSubreapers() {
	if g.reaper != nil && !g.reaper.Subreaper {
		g.step(Step{Op: Subreaper, Pid: g.reaper.Pid, On: false})
	}
	for _, n := range g.nodes {
		if n.Subreaper && n != g.reaper {
			g.step(Step{Op: Subreaper, Pid: n.Pid, On: true})
		}
	}
}
