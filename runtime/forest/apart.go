package forest

import (
	"fmt"
	"slices"
)

// Threads that are elsewhere than their process (setns(2) and unshare(2) are a thread's own, but for
// namespaces of users). They are cloned where their process is, and each goes from there to its
// namespaces when all have been cloned: who has its children begin in another pid namespace can clone no
// thread. A namespace that no process is in is made by a ghost, a keeper, which stays until the threads
// have a way into it.

// A wish is a namespace that a thread is to enter.
type wish struct {
	pid, thread int
	kind        string
	id          int // 0 for the container's own
	children    bool
}

// wish finds what threads have to enter.
func (x *nest) wish() error {
	for _, pid := range x.order {
		p := x.Places[pid]
		for _, kind := range inOrder {
			if kind != "time" { // that is the process's
				if err := x.wishFor(pid, p, kind); err != nil {
					return err
				}
			}
		}
		for _, a := range p.Apart {
			for _, kind := range []string{"pid", "time"} {
				if id := x.find(a.Children, kind); id != 0 {
					x.wishes = append(x.wishes, wish{pid, a.Thread, kind, id, true})
				}
			}
		}
	}
	return nil
}

// wishFor does so for one type. Where threads could not come back to the container's own, their process
// being in a user namespace of its own, they stay there, and the others leave it together.
func (x *nest) wishFor(pid int, p Place, kind string) error {
	common, user := x.find(p.In, kind), x.userOf(pid)
	var moved []wish
	stay := false
	for _, a := range p.Apart {
		if id := x.find(a.In, kind); id != common {
			moved = append(moved, wish{pid, a.Thread, kind, id, false})
			stay = stay || id == 0 && user != 0
			if id != 0 && !x.within(x.byID[id].Owner, user) {
				return &Unreachable{pid, fmt.Sprintf("its thread could not enter the %s namespace that it is in, which belongs to a user namespace above", kind)}
			}
		}
	}
	if !stay {
		x.wishes = append(x.wishes, moved...)
		return nil
	}
	if kind == "mnt" {
		return &Unreachable{pid, "its thread could not come back to the container's mount namespace"}
	}
	p.In = slices.DeleteFunc(slices.Clone(p.In), func(id int) bool { return id == common })
	x.Places[pid] = p
	for i := range 1 + len(p.Threads) {
		id := common
		if at := slices.IndexFunc(p.Apart, func(a Apart) bool { return a.Thread == i }); at >= 0 {
			id = x.find(p.Apart[at].In, kind)
		}
		if id != 0 {
			x.wishes = append(x.wishes, wish{pid, i, kind, id, false})
		}
	}
	return nil
}

// keep makes what one thread is to enter and no process has made, and reports whether there was any.
func (x *nest) keep() (bool, error) {
	var in []int
	var first wish
	for _, w := range x.wishes {
		if w.children || w.id == 0 || x.born[w.id] != 0 || len(in) > 0 && (w.pid != first.pid || w.thread != first.thread) {
			continue
		}
		if len(in) == 0 {
			first = w
		}
		in = append(in, w.id)
	}
	if len(in) == 0 {
		return false, nil
	}
	if user := x.userOf(first.pid); user != 0 {
		in = append(in, user)
	}
	ghost := x.free(0)[0]
	x.Places[ghost] = Place{In: in}
	if err := x.fork(Step{Op: Fork, Pid: x.order[0], Child: ghost}); err != nil {
		return false, err
	}
	x.keepers = append(x.keepers, ghost)
	return true, x.place(ghost)
}

// fulfil ends the plan with what threads enter.
func (x *nest) fulfil() error {
	for more := true; more; {
		var err error
		if more, err = x.keep(); err != nil {
			return err
		}
	}
	for _, w := range x.wishes {
		n := &Nested{NS: w.id, As: w.kind}
		p := x.alive[w.pid]
		switch {
		case w.id == 0:
			n.Via = x.order[0]
		case !w.children:
			n.Via = x.born[w.id]
		case w.kind == "pid" && x.init[w.id] != 0:
			n.Via = x.init[w.id]
			if !x.within(x.owner(w.id), p.user) || !x.within(w.id, p.space) {
				return &Unreachable{w.pid, "the pid namespace for the children of its thread could not be entered by it"}
			}
		case x.byID[w.id].Owner != p.user, w.kind == "pid" && x.byID[w.id].Parent != p.space:
			return &Unreachable{w.pid, "the " + w.kind + " namespace for the children of its thread could not have been made by it"}
		case w.kind == "time" && x.born[w.id] != 0: // EUSERS to a process of several threads
			return &Unreachable{w.pid, "the time namespace for the children of its thread has others in it, and setns(2) lets no thread enter"}
		default:
			x.born[w.id] = w.pid
		}
		x.add(Step{Op: Part, Pid: w.pid, Child: w.thread, Nested: n})
	}
	return nil
}
