package forest

import (
	"fmt"
	"slices"
	"syscall"
)

// kernel simulates one pid namespace: the rules by which parents, sessions and groups change. Its calls
// return the errno of the real ones; TestKernelAgrees compares the two.
type kernel struct {
	procs map[int]*proc
	all   []*proc // the same
	init  *proc
	inUse map[int]int // references to a number as pid, group or session
	// autoReap: all ignore SIGCHLD, so that nobody becomes a zombie.
	autoReap bool
}

type proc struct {
	pid       int
	pgid, sid int
	parent    *proc // nil: outside the namespace
	children  []*proc
	leader    bool // session leader
	zombie    bool
	subreaper bool
	tables    [tables]*int // which are the same where the pointers are
}

// fresh gives new tables for those named.
func (p *proc) fresh(which Tables) {
	for t := range tables {
		if which.Has(t) {
			p.tables[t] = new(int)
		}
	}
}

const allTables = 1<<tables - 1

// newKernel starts a namespace with the process that becomes the root.
func newKernel(pid int, leader bool) *kernel {
	k := &kernel{procs: make(map[int]*proc), inUse: make(map[int]int)}
	p := &proc{pid: pid}
	p.fresh(allTables)
	if leader {
		p.sid, p.pgid, p.leader = pid, pid, true
	}
	k.add(p)
	k.init = p
	return k
}

func (k *kernel) add(p *proc) {
	k.procs[p.pid] = p
	k.all = append(k.all, p)
	k.hold(p.pid, p.pgid, p.sid)
}

func (k *kernel) remove(p *proc) {
	delete(k.procs, p.pid)
	k.all = slices.DeleteFunc(k.all, func(e *proc) bool { return e == p })
	k.drop(p.pid, p.pgid, p.sid)
}

func (k *kernel) hold(ids ...int) {
	for _, id := range ids {
		k.inUse[id]++
	}
}

func (k *kernel) drop(ids ...int) {
	for _, id := range ids {
		if k.inUse[id]--; k.inUse[id] == 0 {
			delete(k.inUse, id)
		}
	}
}

// alive returns the process that is to make a call, or nil.
func (k *kernel) alive(pid int) *proc {
	if p := k.procs[pid]; p != nil && !p.zombie {
		return p
	}
	return nil
}

// fork is clone3(2) with set_tid. Siblings are made with CLONE_PARENT, which an init may not use.
func (k *kernel) fork(pid, child int, share Tables, sibling bool) error {
	p := k.alive(pid)
	switch {
	case p == nil:
		return syscall.ESRCH
	case sibling && p == k.init:
		return syscall.EINVAL
	case share.Has(Sighand) && !share.Has(MM):
		return syscall.EINVAL
	case k.inUse[child] > 0:
		return syscall.EEXIST
	}
	c := &proc{pid: child, pgid: p.pgid, sid: p.sid, parent: p, tables: p.tables}
	c.fresh(allTables &^ share)
	if sibling {
		c.parent = p.parent
	}
	c.parent.children = append(c.parent.children, c)
	k.add(c)
	return nil
}

// enter is setns(2) and a fork by somebody outside.
func (k *kernel) enter(pid int) error {
	if k.inUse[pid] > 0 {
		return syscall.EEXIST
	}
	p := &proc{pid: pid}
	p.fresh(allTables)
	k.add(p)
	return nil
}

func (k *kernel) setsid(pid int) error {
	p := k.alive(pid)
	switch {
	case p == nil:
		return syscall.ESRCH
	case p.leader, k.groupSession(pid) >= 0:
		return syscall.EPERM
	}
	k.drop(p.pgid, p.sid)
	p.pgid, p.sid, p.leader = pid, pid, true
	k.hold(pid, pid)
	return nil
}

// groupSession is the session of a group, or -1 if the group has no members.
func (k *kernel) groupSession(pgid int) int {
	for _, p := range k.all {
		if p.pgid == pgid && pgid != 0 {
			return p.sid
		}
	}
	return -1
}

// setpgid is setpgid(2) called by pid for target, itself or a child that has not called exec.
func (k *kernel) setpgid(pid, target, pgid int) error {
	p, t := k.alive(pid), k.procs[target]
	if pgid == 0 {
		pgid = target
	}
	switch {
	case p == nil || t == nil, t.parent != p && t != p:
		return syscall.ESRCH
	case t.sid != p.sid, t.leader:
		return syscall.EPERM
	case pgid != target && k.groupSession(pgid) != p.sid:
		return syscall.EPERM
	}
	k.drop(t.pgid)
	t.pgid = pgid
	k.hold(pgid)
	return nil
}

func (k *kernel) setSubreaper(pid int, on bool) error {
	p := k.alive(pid)
	if p == nil {
		return syscall.ESRCH
	}
	p.subreaper = on
	return nil
}

// exit ends a process other than the init, and gives its children to the nearest subreaper above or the init.
func (k *kernel) exit(pid int) error {
	p := k.alive(pid)
	if p == nil || p == k.init {
		return syscall.ESRCH
	}
	heir := p.parent
	for heir != nil && heir != k.init && !heir.subreaper {
		heir = heir.parent
	}
	if heir == nil { // p was brought in from outside, or is below such a one
		heir = k.init
	}
	for _, c := range p.children {
		c.parent = heir
	}
	heir.children = append(heir.children, p.children...)
	p.children = nil
	p.zombie = true
	switch {
	case p.parent == nil:
		k.remove(p)
	case k.autoReap:
		return k.reap(p.parent.pid, pid)
	}
	return nil
}

// leave is unshare(2), and for address space, signal actions and descriptors together execve(2).
func (k *kernel) leave(pid int, which Tables) error {
	p := k.alive(pid)
	if p == nil {
		return syscall.ESRCH
	}
	p.fresh(which)
	return nil
}

// reap is waitpid(2).
func (k *kernel) reap(pid, child int) error {
	p, c := k.alive(pid), k.procs[child]
	if p == nil || c == nil || c.parent != p || !c.zombie {
		return syscall.ECHILD
	}
	p.children = slices.DeleteFunc(p.children, func(e *proc) bool { return e == c })
	k.remove(c)
	return nil
}

// run makes one step of a plan.
func (k *kernel) run(s Step) error {
	switch s.Op {
	case Fork:
		return k.fork(s.Pid, s.Child, s.Tables, false)
	case Setsid:
		return k.setsid(s.Pid)
	case Setpgid:
		return k.setpgid(s.Pid, s.Pid, s.Pgid)
	case Subreaper:
		return k.setSubreaper(s.Pid, s.On)
	case Exit:
		return k.exit(s.Pid)
	case Leave:
		if s.Tables.Has(MM) || s.Tables.Has(Sighand) {
			return syscall.EINVAL
		}
		return k.leave(s.Pid, s.Tables)
	case Enter:
		return k.enter(s.Child)
	}
	return fmt.Errorf("operation %d", s.Op)
}

// list returns the processes ascending by pid.
func (k *kernel) list() []Process {
	list := make([]Process, 0, len(k.all))
	shared := k.shared()
	for _, p := range k.all {
		ppid := 0
		if p.parent != nil {
			ppid = p.parent.pid
		}
		list = append(list, Process{p.pid, ppid, p.pgid, p.sid, p.zombie, p.subreaper && !p.zombie, shared[p]})
	}
	slices.SortFunc(list, func(a, b Process) int { return a.Pid - b.Pid })
	return list
}

// shared numbers the tables that living processes share by the lowest pid among them.
func (k *kernel) shared() map[*proc]Shared {
	out := make(map[*proc]Shared)
	for t := range tables {
		holders := make(map[*int][]*proc)
		for _, p := range k.all {
			if !p.zombie {
				holders[p.tables[t]] = append(holders[p.tables[t]], p)
			}
		}
		for _, list := range holders {
			lowest := slices.MinFunc(list, func(a, b *proc) int { return a.pid - b.pid }).pid
			for _, p := range list {
				if s := out[p]; len(list) > 1 {
					s[t] = lowest
					out[p] = s
				}
			}
		}
	}
	return out
}

// play runs a plan for want from its stub and reports how the result differs, or what failed.
func play(plan *Plan, want []Process) error {
	want = slices.Clone(want)
	slices.SortFunc(want, func(a, b Process) int { return a.Pid - b.Pid })
	pids := make(map[int]bool)
	var zombies []int
	for i := range want {
		pids[want[i].Pid] = true
		if want[i].Zombie {
			zombies = append(zombies, want[i].Pid)
		}
		want[i].Zombie = false // zombies are still alive at the end of a plan
	}
	var k *kernel
	for i, p := range want {
		if !pids[p.Ppid] {
			want[i].Ppid = 0
			if k == nil {
				k = newKernel(p.Pid, p.Sid == p.Pid)
			}
		}
	}
	k.autoReap = true
	root := k.init
	if root.pid != 1 {
		k.addNamespaceInit()
	}
	for i, s := range plan.Steps {
		if err := k.run(s); err != nil {
			return fmt.Errorf("step %d, %v: %w", i, s, err)
		}
	}
	if root.pid != 1 {
		k.removeNamespaceInit()
	}
	for _, pid := range zombies {
		k.procs[pid].fresh(allTables) // it gives up what it shares when it exits
	}
	if got := k.list(); !slices.Equal(got, want) {
		return fmt.Errorf("plan ends in\n%v, want\n%v", got, want)
	}
	return nil
}

// addNamespaceInit puts an init above a root that is not pid 1, where orphans go that nobody takes.
func (k *kernel) addNamespaceInit() {
	outer := &proc{pid: 1, children: []*proc{k.init}}
	k.init.parent = outer
	k.add(outer)
	k.init = outer
}

// removeNamespaceInit takes it away again; its children become roots.
func (k *kernel) removeNamespaceInit() {
	for _, c := range k.init.children {
		c.parent = nil
	}
	k.remove(k.init)
}
