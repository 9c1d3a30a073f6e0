package forest

import "slices"

// inOrder are the types of namespace in the order in which a process takes them in each of its user
// namespaces. The one of mounts is last: with it the paths to all others may go.
var inOrder = []string{"uts", "ipc", "net", "cgroup", "time", "mnt"}

// settle puts every process into the namespaces that it is not in by birth. A namespace is made by the
// first process that can, which is one whose user namespaces include its owner; a process that cannot
// waits until all it needs exist.
func (x *nest) settle() error {
	if err := x.wish(); err != nil {
		return err
	}
	pending := slices.DeleteFunc(slices.Clone(x.order), func(pid int) bool {
		_, placed := x.Places[pid]
		return x.zombies[pid] || !placed && x.alive[pid].kids == x.alive[pid].space
	})
	for len(pending) > 0 {
		i := slices.IndexFunc(pending, x.ready)
		if i < 0 {
			more, err := x.keep()
			if err == nil && !more {
				err = &Unreachable{pending[0], "no process is left that could make its namespaces"}
			}
			if err != nil {
				return err
			}
			continue
		}
		if err := x.place(pending[i]); err != nil {
			return err
		}
		pending = slices.Delete(pending, i, i+1)
	}
	return x.fulfil()
}

// ready says that every namespace a process needs exists or can be made by it.
func (x *nest) ready(pid int) bool {
	p := x.Places[pid]
	for _, id := range slices.Concat(p.In, p.Children) {
		ns := x.byID[id]
		if ns.Type == "user" || ns.Type == "pid" || x.born[id] != 0 {
			continue
		}
		if !x.within(x.userOf(pid), ns.Owner) || x.leftTo(pid, id) {
			return false
		}
	}
	return true
}

// leftTo says that a time namespace must be made by another process: one that is not in it and has its
// children there, for nobody can be brought to that but by having made it.
func (x *nest) leftTo(pid, id int) bool {
	if x.byID[id].Type != "time" || !slices.Contains(x.Places[pid].In, id) {
		return false
	}
	for other, p := range x.Places {
		if other != pid && x.wanted[other] && slices.Contains(p.Children, id) && !slices.Contains(p.In, id) {
			return true
		}
	}
	return false
}

// place brings one process down its user namespaces.
func (x *nest) place(pid int) error {
	p := x.state(pid)
	var chain []int
	for u := x.userOf(pid); u != p.user; u = x.byID[u].Owner {
		if u == 0 {
			return &Unreachable{pid, "it would have to leave a user namespace"}
		}
		chain = append(chain, u)
	}
	slices.Reverse(chain)
	if x.find(x.Places[pid].Children, "pid") == 0 && p.kids != p.space {
		if err := x.aim(pid, p, p.space, pid); err != nil {
			return err
		}
	}
	if err := x.take(pid, p, chain); err != nil {
		return err
	}
	for i, u := range chain {
		if err := x.descend(pid, p, u); err != nil {
			return err
		}
		if err := x.take(pid, p, chain[i+1:]); err != nil {
			return err
		}
	}
	for _, id := range x.Places[pid].In {
		if ns := x.byID[id]; ns.Type != "user" && ns.Type != "pid" && !p.in[id] {
			return &Unreachable{pid, "it could not have entered its " + ns.Type + " namespace"}
		}
	}
	if id := x.find(x.Places[pid].Children, "pid"); id != 0 && p.kids != id {
		return &Unreachable{pid, "its children's pid namespace cannot be entered by it"}
	}
	return nil
}

// take makes or joins the namespaces whose time has come in the user namespace that a process is in:
// those that it owns, and those of owners below it that the process will never be in.
func (x *nest) take(pid int, p *nested, below []int) error {
	for _, kind := range inOrder {
		id := x.find(x.Places[pid].In, kind)
		if id == 0 || p.in[id] || !x.due(x.byID[id].Owner, p.user, below) {
			continue
		}
		x.obtain(pid, p, id)
	}
	if id := x.find(x.Places[pid].Children, "time"); id != 0 && x.byID[id].Owner == p.user && x.time[pid] != id {
		if x.born[id] != 0 {
			return &Unreachable{pid, "another process has its children in the same time namespace"}
		}
		x.unshare(pid, id)
		x.time[pid], x.born[id] = id, pid
	}
	return x.takeChildren(pid, p, below)
}

// due says that what owner owns is to be taken in the user namespace user and no later.
func (x *nest) due(owner, user int, below []int) bool {
	return x.within(owner, user) && !slices.ContainsFunc(below, func(u int) bool { return x.within(owner, u) })
}

func (x *nest) unshare(pid, id int) {
	x.add(Step{Op: Unshare, Pid: pid, Nested: &Nested{NS: id}})
}

// obtain makes or joins one namespace. One for clocks is made for children, and then joined.
func (x *nest) obtain(pid int, p *nested, id int) {
	kind := x.byID[id].Type
	p.in[id] = true
	via, as := x.born[id], kind
	if via == 0 {
		x.unshare(pid, id)
		x.born[id], via = pid, pid
		if kind != "time" {
			return
		}
		x.time[pid] = id
	}
	if kind == "time" && x.time[via] == id {
		as = "time_for_children"
	}
	x.add(Step{Op: Join, Pid: pid, Nested: &Nested{NS: id, Via: via, As: as}})
	if kind == "time" {
		x.time[pid] = id
	}
}

// takeChildren aims a process's children at their pid namespace: one that has its init, one that is
// still to get it, or one that has lost it.
func (x *nest) takeChildren(pid int, p *nested, below []int) error {
	id := x.find(x.Places[pid].Children, "pid")
	if id == 0 || p.kids == id || !x.due(x.byID[id].Owner, p.user, below) {
		return nil
	}
	if x.init[id] != 0 {
		return x.aim(pid, p, id, pid)
	}
	if x.byID[id].Owner != p.user || x.byID[id].Parent != p.space {
		return &Unreachable{pid, "its children's pid namespace could not have been made by it"}
	}
	x.unshare(pid, id)
	p.kids = id
	return nil
}
