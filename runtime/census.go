package runtime

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/network"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// census is what can be read of a container's processes from outside. It is
// taken twice: once while they run, to refuse early what cannot be saved, and
// once while they are stopped, for the image.
type census struct {
	procs   []*process // live ones, parents before children
	zombies []zombie
	nested  *namespace.Set
	files   *file.Set
	shared  *mm.Shared
	sharing sharing
	found   found
	memory  []*tmpfs.Tree
	root    *tmpfs.Tree // among them: what has changed in the root file system, or nil
	ipc     []*ipcSpace
	cgroups []image.SubCgroup // that the container has made
	// networks are the network namespaces whose contents are saved.
	networks []*network.Space
	open     []*os.File
	lends    map[*mm.Space]bool
}

// process is one live process of the container.
type process struct {
	tgid    int // host
	pid     int // host, of its first living thread, by which it is looked at; the leader as a rule
	inner   int // in the container's pid namespace
	place   *namespace.Place
	comm    []byte
	tids    []int // host, of the living threads, leader first
	status  []*task.Status
	leader  *task.Status  // of the leader, even if it has ended
	dead    *image.Thread // a leader that has ended while others run
	stat    *task.Stat
	threads []*tracee.Thread
	live    *tracee.Live
	cgroups []map[string]string // that its threads are in, below the container's, by hierarchy
	guest   bool                // brought in from outside, not a descendant of the init
	maps    *mm.Mappings        // until they have been scanned

	space  *mm.Space
	tables []*file.Table    // by thread, nil for one with its process's
	places []*object.Object // in the file system, likewise
	state  *task.State
	hand   *object.Object
}

// Close releases what the census holds open.
func (n *census) Close() {
	if n.files != nil {
		n.files.Close()
	}
	for _, t := range n.memory {
		_ = t.Close()
	}
	for _, f := range n.open {
		_ = f.Close()
	}
	if n.nested != nil {
		n.nested.Close()
	}
}

// named finds a file of the container's memory file systems.
func (n *census) named(dev, ino uint64) string {
	for _, t := range n.memory {
		if path := t.Named(dev, ino); path != "" {
			return path
		}
	}
	return ""
}

// innerPid is the pid in the container of a live process of it, by its host pid.
func (n *census) innerPid(host int32) int32 {
	for _, p := range n.procs {
		if p.tgid == int(host) {
			return int32(p.inner)
		}
	}
	return 0
}

// remade reports whether a device is one of them.
func (n *census) remade(dev uint64) bool {
	return slices.ContainsFunc(n.memory, func(t *tmpfs.Tree) bool { return t.Dev() == dev && !t.IsRoot() })
}

func (p *process) name() string { return task.Name(p.inner, p.tgid, p.comm) }

// zombie is a process that has ended and waits to be reaped.
type zombie struct {
	image.Process
	place *namespace.Place
}

// takeCensus reads every process in pids. Processes that are gone by the time
// they are looked at are left out where they may be (running is true).
func (c *container) takeCensus(pids []int, running bool) (*census, error) {
	n := &census{shared: mm.NewShared(), found: newFound()}
	err := c.count(n, pids, running)
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

func (c *container) count(n *census, pids []int, running bool) (err error) {
	if n.memory, err = c.scanTmpfs(); err != nil {
		return err
	}
	if n.root, err = c.scanRoot(); err != nil {
		return err
	}
	if n.root != nil {
		n.memory = append(n.memory, n.root)
	}
	if err := n.scanCgroups(c); err != nil {
		return err
	}
	n.files = file.NewSet(file.Env{
		Running: running,
		Root:    c.root, Mounts: c.record.Mounts, Stdio: c.record.Stdio, Shared: n.shared, IDs: c.maps,
		Init: &file.Process{Pid: c.initPid, Inner: 1}, Console: file.ConsoleRoot(c.record.Mounts), Named: n.named, Remade: n.remade, Places: c.places, NetNS: c.inodes["net"], External: c.external, Sockets: c.sockets,
		Inner: n.innerPid, Promise: c.promiseFor(running), Position: c.promisePosition,
	})
	n.nested = namespace.NewSet(namespace.Env{
		Own: c.inodes, Host: c.host, Init: c.initPid, Depth: c.pidDepth, Maps: c.maps, Mounts: c.mounts,
	})
	n.files.Views, n.files.Place, n.files.Apart = n.nested.Views, n.viewOf, n.nested.Apart
	n.files.Task = func(host int) (int32, int32, error) { return n.inner(c, host) }
	if c.mounts.Own() {
		n.files.Covered = c.mounts.Covered
	}
	enough := make(chan struct{})
	defer close(enough)
	visits := c.visitAll(pids, enough)
	for i, pid := range pids {
		v := <-visits[i]
		p, err := v.process, v.err
		if err == nil && p != nil {
			err = n.admit(c, p)
		}
		if err == nil && p != nil && pid != c.initPid && !slices.Contains(pids, p.status[0].PPid) {
			err = c.admitGuest(p)
		}
		if running && errors.Is(err, tracee.ErrGone) {
			continue
		}
		if err != nil {
			return fail.In(nameOf(p, pid), err)
		}
		if p != nil {
			n.procs = append(n.procs, p)
		}
	}
	if err := n.nested.Describe(); err != nil && !(running && errors.Is(err, tracee.ErrGone)) {
		return err
	}
	if err := n.scanNestedTmpfs(c); err != nil {
		return goneIs(c.initPid, err)
	}
	if err := n.scanIPC(c); err != nil {
		return err
	}
	if err := n.findSharing(running); err != nil {
		return err
	}
	if err := n.scanAll(running); err != nil {
		return err
	}
	if err := n.files.Describe(); err != nil && !(running && errors.Is(err, tracee.ErrGone)) {
		return err
	}
	if err := n.readNetworks(c); err != nil && !(running && errors.Is(err, tracee.ErrGone)) {
		return err
	}
	if err := n.findTerminals(); err != nil || running {
		return err
	}
	return n.openUnattached()
}

// inner is what the container calls a task of the host and its process, 0 for one
// that is not of it. One that has ended and waits to be reaped is of the container
// if its parent is.
func (n *census) inner(c *container, host int) (tid, pid int32, err error) {
	s, err := task.ReadStatus(host)
	if err != nil {
		return 0, 0, err
	}
	tid = int32(c.level(s.NSpid))
	for _, p := range n.procs {
		switch {
		case p.tgid == s.Tgid:
			return tid, int32(p.inner), nil
		case p.tgid == s.PPid && s.State == 'Z':
			return tid, tid, nil
		}
	}
	return 0, 0, nil
}

// findTerminals tells the terminals whose they are.
func (n *census) findTerminals() error {
	const statPgrp, statTTY, statForeground = 5, 7, 8
	groups := map[uint64]int{} // inner ids of process groups, by the host's
	for _, p := range n.procs {
		groups[p.stat.Field(statPgrp)] = task.Innermost(p.status[0].NSpgid)
	}
	for _, p := range n.procs {
		device := p.stat.Field(statTTY)
		if device == 0 {
			continue
		}
		if err := n.files.Control(device, task.Innermost(p.status[0].NSsid), groups[p.stat.Field(statForeground)]); err != nil {
			return fail.In(p.name(), err)
		}
	}
	for _, p := range n.procs {
		if p.stat.Field(statTTY) == 0 {
			n.files.Uncontrolled(p.inner, task.Innermost(p.status[0].NSsid))
		}
	}
	return nil
}

// scanAll reads what the processes hold.
func (n *census) scanAll(running bool) error {
	var there []*process
	for _, p := range n.procs {
		err := n.scan(p)
		if running && errors.Is(err, tracee.ErrGone) {
			continue
		}
		if err != nil {
			return fail.In(p.name(), err)
		}
		there = append(there, p)
	}
	n.procs = there
	return nil
}

func nameOf(p *process, pid int) string {
	if p == nil {
		return fmt.Sprintf("task (host %d)", pid)
	}
	return p.name()
}

// visited is what visit has found.
type visited struct {
	process *process
	err     error
}

// visitAll visits processes in turn, several at a time: most of it is the kernel's
// work. Each is put out by a channel of its own, and few are read before it is
// taken, or none any more once there has been enough.
func (c *container) visitAll(pids []int, enough <-chan struct{}) []chan visited {
	out := make([]chan visited, len(pids))
	for i := range out {
		out[i] = make(chan visited)
	}
	var next atomic.Int64
	for range min(len(pids), 2*goruntime.GOMAXPROCS(0)) {
		go func() {
			for i := next.Add(1) - 1; int(i) < len(pids); i = next.Add(1) - 1 {
				p, err := c.visit(pids[i])
				if err == nil && p != nil {
					p.maps = mm.ReadMappings(p.pid)
				}
				select {
				case out[i] <- visited{p, err}:
				case <-enough:
					return
				}
			}
		}()
	}
	return out
}

// visit reads who a process is; nil for a zombie.
func (c *container) visit(pid int) (*process, error) {
	p := &process{tgid: pid}
	tids, err := task.Threads(pid)
	if err != nil {
		return nil, err
	}
	for _, tid := range tids {
		s, err := task.ReadStatus(tid)
		if err != nil {
			return nil, err
		}
		if tid == pid {
			p.leader = s
		}
		if tid != pid || s.State != 'Z' {
			p.tids, p.status = append(p.tids, tid), append(p.status, s)
		}
	}
	if len(p.tids) == 0 {
		return nil, nil
	}
	p.pid, p.inner = p.tids[0], c.level(p.leader.NSpid)
	if p.comm, err = task.Comm(pid); err != nil {
		return nil, err
	}
	if p.stat, err = task.ReadStat(p.pid); err == nil && p.pid != p.tgid {
		err = p.readDead(c.maps)
	}
	return p, err
}

const ssDisable = 2 // SS_DISABLE: no alternate signal stack

// readDead reads what is left of a leader that has ended while others run.
func (p *process) readDead(maps task.IDMaps) error {
	stat, err := task.ReadStat(p.tgid)
	if err != nil {
		return err
	}
	p.dead = &image.Thread{
		Tid: int32(p.inner), Comm: p.comm, Creds: task.Credentials(p.leader, maps),
		AltStack: image.AltStack{Flags: ssDisable}, Exited: true, ExitCode: uint32(stat.Field(statExitCode)),
	}
	p.stat.Set(task.StatExitSignal, stat) // a process's, but shown with its leader only
	return nil
}

// level is the number of the container's pid namespace among those that
// /proc/PID/status lists of one, 0 if it is not in that namespace.
func (c *container) level(ids []int) int {
	if len(ids) < c.pidDepth {
		return 0
	}
	return ids[c.pidDepth-1]
}

// admit refuses processes that cannot be saved for what they are.
func (n *census) admit(c *container, p *process) (err error) {
	if err := admitThreads(p); err != nil {
		return err
	}
	if p.inner == 0 {
		return fail.Refuse("pid namespace", "it is in none of the container", "")
	}
	if p.place, err = n.nested.Add(p.pid, p.name()); err != nil {
		return err
	}
	if err := n.nested.AddThreads(p.place, p.tids, p.name()); err != nil {
		return err
	}
	return n.place(c, p)
}

func goneIs(pid int, err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("task %d: %w", pid, tracee.ErrGone)
	}
	return err
}

// findZombies looks for children that have exited and wait to be reaped.
func (n *census) findZombies(c *container) error {
	known := map[int]bool{}
	for _, p := range n.procs {
		known[p.tgid] = true
	}
	for _, p := range n.procs {
		for _, tid := range p.tids {
			b, err := tracee.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.pid, tid))
			if err != nil {
				return goneIs(p.pid, err)
			}
			for f := range strings.FieldsSeq(string(b)) {
				pid, err := strconv.Atoi(f)
				if err == nil && !known[pid] {
					known[pid] = true
					err = n.addZombie(c, pid, p)
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

const (
	statPgrp     = 5
	statSession  = 6
	statExitCode = 52
)

func (n *census) addZombie(c *container, pid int, parent *process) error {
	s, err := task.ReadStatus(pid)
	if err != nil {
		return err
	}
	comm, err := task.Comm(pid)
	if err != nil {
		return err
	}
	if s.State != 'Z' {
		return fail.In(task.Name(c.level(s.NSpid), pid, comm),
			fail.Refuse("", "it is a child of the container's "+parent.name()+" but not in the container's cgroup", "move it to the container's cgroup"))
	}
	stat, err := task.ReadStat(pid)
	if err != nil {
		return err
	}
	z := zombie{Process: image.Process{
		Pid: int32(c.level(s.NSpid)), Ppid: int32(parent.inner),
		Pgid: int32(c.level(s.NSpgid)), Sid: int32(c.level(s.NSsid)),
		Pids: narrow(s.NSpid), Zombie: true, Status: uint32(stat.Field(statExitCode)), Comm: comm,
		Inner: c.innerIDs(s),
	}}
	if unix.WaitStatus(z.Status).CoreDump() {
		c.warn("%s: that it has dumped core is not told by wait(2) after a restore", task.Name(int(z.Pid), pid, comm))
	}
	if z.place, err = n.nested.AddZombie(pid, task.Name(int(z.Pid), pid, comm)); err != nil {
		return err
	}
	n.zombies = append(n.zombies, z)
	return nil
}

// innerIDs are the ids of a process, with its threads' statuses, in pid
// namespaces below the container's; nil where there are none.
func (c *container) innerIDs(status ...*task.Status) *image.InnerIDs {
	if len(status[0].NSpid) <= c.pidDepth {
		return nil
	}
	in := &image.InnerIDs{Pgid: narrow(status[0].NSpgid[c.pidDepth:]), Sid: narrow(status[0].NSsid[c.pidDepth:])}
	for _, s := range status {
		in.Threads = append(in.Threads, narrow(s.NSpid[c.pidDepth:]))
	}
	return in
}

// family lists the processes by their parents' host pids.
func (n *census) family() map[int][]*process {
	children := map[int][]*process{}
	for _, p := range n.procs {
		children[p.status[0].PPid] = append(children[p.status[0].PPid], p)
	}
	return children
}

// knownTo is the pid by which another process knows p: that of its own pid
// namespace.
func (p *process) knownTo(other *process) int32 {
	return int32(p.leader.NSpid[len(other.leader.NSpid)-1])
}

// passJobs notes with each child what its parent has yet to be told of it.
func (n *census) passJobs(children map[int][]*process) {
	for _, parent := range n.procs {
		for _, p := range children[parent.tgid] {
			switch code := parent.state.Untold[p.knownTo(parent)]; {
			case code == image.CldStopped && p.state.Task.Stopped != 0, code == image.CldContinued && p.state.Task.Stopped == 0:
				p.state.Task.Untold = code
			}
		}
	}
}

func narrow(ids []int) []int32 {
	out := make([]int32, len(ids))
	for i, id := range ids {
		out[i] = int32(id)
	}
	return out
}

// tree is the task hierarchy for the image, parents before children.
func (n *census) tree(c *container) (image.Tree, error) {
	inner := map[int]int{}
	for _, p := range n.procs {
		inner[p.tgid] = p.inner
	}
	var all []image.Process
	for _, p := range n.procs {
		s, threads := p.leader, p.status
		if p.dead != nil {
			threads = append([]*task.Status{s}, threads...)
		}
		one := image.Process{
			Pid: int32(p.inner), Ppid: int32(inner[s.PPid]), Comm: p.comm, Pids: narrow(s.NSpid),
			Pgid: int32(c.level(s.NSpgid)), Sid: int32(c.level(s.NSsid)), Inner: c.innerIDs(threads...),
		}
		for _, st := range threads {
			one.Threads = append(one.Threads, int32(c.level(st.NSpid)))
		}
		all = append(all, one)
	}
	for i := range n.zombies {
		all = append(all, n.zombies[i].Process)
	}
	return sortTree(all)
}

// nest gives namespaces their references and puts these into the tree.
func (n *census) nest(t *image.Tree, own []image.Namespace, newRef func() image.Ref) {
	var user, pid image.Ref
	for i := range own {
		switch own[i].Type {
		case "user":
			user = own[i].Ref
		case "pid":
			pid = own[i].Ref
		}
	}
	t.Namespaces = n.nested.Records(newRef, user, pid)
	places, tids := map[int32]*namespace.Place{}, map[int32][]int{}
	for _, p := range n.procs {
		places[int32(p.inner)], tids[int32(p.inner)] = p.place, p.tids
	}
	for i := range n.zombies {
		places[n.zombies[i].Pid] = n.zombies[i].place
	}
	for i := range t.Processes {
		p := &t.Processes[i]
		places[p.Pid].Fill(p, tids[p.Pid])
	}
}

// sortTree puts parents before children.
func sortTree(all []image.Process) (image.Tree, error) {
	children := map[int32][]image.Process{}
	for _, p := range all {
		children[p.Ppid] = append(children[p.Ppid], p)
	}
	var t image.Tree
	queue := children[0]
	for len(queue) > 0 {
		p := queue[0]
		queue = append(queue[1:], children[p.Pid]...)
		t.Processes = append(t.Processes, p)
	}
	if len(t.Processes) != len(all) {
		return t, fmt.Errorf("the task hierarchy has %d processes of which %d hang together", len(all), len(t.Processes))
	}
	return t, nil
}

// viewOf is the mount namespace that a task is in, nil for the container's own.
func (n *census) viewOf(tid int) *namespace.View {
	if len(n.nested.Views()) == 0 {
		return nil
	}
	for _, p := range n.procs {
		if slices.Contains(p.tids, tid) {
			return p.place.Of(tid).View()
		}
	}
	return nil
}

// tablesOf tells of a process by its host pid (file.Holder).
func (n *census) tablesOf(host int) (inner int, tables []*file.Table) {
	for _, p := range n.procs {
		if p.tgid == host {
			return p.inner, p.tables
		}
	}
	return 0, nil
}
