package runtime

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Tables that tasks share: the one side finds them with kcmp(2), the other says
// who restores what several use.

// Types of kcmp(2).
const (
	kcmpVM      = 1
	kcmpFiles   = 2
	kcmpFS      = 3
	kcmpSighand = 4
	kcmpIO      = 5
	kcmpSysVSem = 6
)

// kcmp compares two tasks' tables: 0 if they share one, else some order.
func kcmp(a, b int, kind uintptr) (int, error) {
	if a == b {
		return 0, nil
	}
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kind, 0, 0, 0)
	if errno != 0 {
		return 0, goneIs(a, fmt.Errorf("kcmp: %w", errno))
	}
	return [...]int{0, -1, 1, 1}[r&3], nil
}

// owners gives, for each task, the first in the list that has the same table.
func owners(tids []int, kind uintptr) (map[int]int, error) {
	var failed error
	order := func(a, b int) int {
		c, err := kcmp(a, b, kind)
		failed = errors.Join(failed, err)
		return c
	}
	out := make(map[int]int, len(tids))
	for _, same := range object.Same(tids, order) {
		for _, tid := range same {
			out[tid] = same[0]
		}
	}
	return out, failed
}

// sharing says, by host tid, who stands for those who have the same table.
// Address spaces and signal actions are a process's; a thread that stands in
// none of the others has the table of its process.
type sharing struct {
	space, hand  map[int]int
	table, place map[int]int
	undo         map[int]int // 0 stands for no semaphore undo list
}

// findSharing compares the tables of all tasks. Where tasks come and go
// meanwhile, it finds nothing.
func (n *census) findSharing(running bool) error {
	err := n.sharing.find(n.procs)
	if running && errors.Is(err, tracee.ErrGone) {
		n.sharing, err = sharing{}, nil
	}
	return err
}

func (s *sharing) find(procs []*process) (err error) {
	var pids []int
	for _, p := range procs {
		pids = append(pids, p.pid)
	}
	if s.space, err = owners(pids, kcmpVM); err != nil {
		return err
	}
	// Who shares signal actions shares the address space (clone(2)).
	users := map[int]int{}
	for _, owner := range s.space {
		users[owner]++
	}
	if s.hand, err = owners(slices.DeleteFunc(slices.Clone(pids), func(pid int) bool { return users[s.space[pid]] == 1 }), kcmpSighand); err != nil {
		return err
	}
	if s.table, err = s.threadwise(pids, procs, kcmpFiles, owners); err != nil {
		return err
	}
	if s.place, err = s.threadwise(pids, procs, kcmpFS, owners); err != nil {
		return err
	}
	s.undo, err = s.threadwise(pids, procs, kcmpSysVSem, undoOwners)
	return err
}

// threadwise compares tables that a thread may have of its own.
func (s *sharing) threadwise(pids []int, procs []*process, kind uintptr, owners func([]int, uintptr) (map[int]int, error)) (map[int]int, error) {
	tids := slices.Clone(pids)
	for _, p := range procs {
		for _, tid := range p.tids[1:] {
			order, err := kcmp(p.pid, tid, kind)
			if err != nil {
				return nil, err
			}
			if order != 0 {
				tids = append(tids, tid)
			}
		}
	}
	return owners(tids, kind)
}

// warnOfIO says which threads have one I/O context (CLONE_IO of clone(2)), which a
// restored container's do not. Only where one has a priority does that show.
func (n *census) warnOfIO(warn func(format string, args ...any)) error {
	var with []int
	names := map[int]string{}
	for _, p := range n.procs {
		for i, tid := range p.tids {
			t := &p.state.Task.Threads[i]
			none, err := t.IOPrio == 0, error(nil)
			if !none { // whoever has none is like us
				var order int
				order, err = kcmp(unix.Gettid(), tid, kcmpIO)
				none = order == 0
			}
			if err != nil {
				return err
			}
			if !none {
				with = append(with, tid)
				names[tid] = fmt.Sprintf("thread %d of %s", t.Tid, p.name())
			}
		}
	}
	groups, err := owners(with, kcmpIO)
	for _, tid := range with {
		if owner := groups[tid]; owner != tid && err == nil {
			warn("%s and %s share an I/O context (CLONE_IO): after a restore each has its own, with the same priority", names[owner], names[tid])
		}
	}
	return err
}

// undoOwners leaves out the tasks without a semaphore undo list, as most
// single-threaded ones are, which kcmp(2) takes for sharing one. The tracer's
// thread has none either, once it has left its own.
func undoOwners(tids []int, kind uintptr) (map[int]int, error) {
	if err := unix.Unshare(unix.CLONE_SYSVSEM); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	lists := map[int]int{}
	var having []int
	for _, tid := range tids {
		order, err := kcmp(unix.Gettid(), tid, kind)
		if err != nil {
			return nil, err
		}
		if lists[tid] = 0; order != 0 {
			having = append(having, tid)
		}
	}
	shared, err := owners(having, kind)
	maps.Copy(lists, shared)
	return lists, err
}

// representative looks up who stands for a task, by default the task itself.
func representative(of map[int]int, tid int) int {
	if o, ok := of[tid]; ok {
		return o
	}
	return tid
}

// found keeps what has been read of each table, by its representative.
type found struct {
	spaces map[int]*mm.Space
	tables map[int]*file.Table
	places map[int]*object.Object
	hands  map[int]*object.Object
	undo   map[int]uint32 // the lists' numbers in the image
	asked  map[*mm.Space]bool
}

func newFound() found {
	return found{map[int]*mm.Space{}, map[int]*file.Table{}, map[int]*object.Object{}, map[int]*object.Object{}, map[int]uint32{}, map[*mm.Space]bool{}}
}

// once reads what a task has, or takes what was read of another that shares it.
func once[T any](read map[int]T, owner int, do func() (T, error)) (T, error) {
	if v, ok := read[owner]; ok {
		return v, nil
	}
	v, err := do()
	if err == nil {
		read[owner] = v
	}
	return v, err
}

// scan reads what a process and its threads hold: memory areas, descriptors,
// their place.
func (n *census) scan(p *process) (err error) {
	s := &n.sharing
	p.space, err = once(n.found.spaces, representative(s.space, p.pid), func() (*mm.Space, error) { return mm.Scan(p.pid, p.place.IPC(), p.maps, n.files, n.shared) })
	p.maps = nil
	if err != nil {
		return err
	}
	defer func() {
		if err == nil && p.guest {
			n.files.Guest(p.tables[0])
		}
	}()
	p.tables, p.places = make([]*file.Table, len(p.tids)), make([]*object.Object, len(p.tids))
	for i, tid := range p.tids {
		if _, own := s.table[tid]; own || i == 0 {
			p.tables[i], err = once(n.found.tables, representative(s.table, tid), func() (*file.Table, error) {
				return n.files.AddTable(&file.Process{Pid: tid, Inner: p.inner, Name: p.name()})
			})
			if err != nil {
				return err
			}
		}
		if _, own := s.place[tid]; own || i == 0 {
			p.places[i], err = once(n.found.places, representative(s.place, tid), func() (*object.Object, error) {
				return n.files.FS(tid, p.status[i].Umask)
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// checkSharing refuses what cannot be shared again: the tables of a thread that
// has parted from its process and shares them with another process.
func (n *census) checkSharing() error {
	for what, of := range map[string]map[int]int{"descriptor table": n.sharing.table, "file system context": n.sharing.place, "semaphore undo list": n.sharing.undo} {
		user := map[int]*process{}
		var parted []*process
		for _, p := range n.procs {
			for i, tid := range p.tids {
				owner, own := of[tid]
				if !own || owner == 0 {
					continue
				}
				if other := user[owner]; other != nil && other != p && (i > 0 || slices.Contains(parted, other)) {
					return fail.In(p.name(), fail.Refuse(what, "a thread that does not share it with its own process shares it with "+other.name()+"; that is not supported", ""))
				}
				if user[owner] = p; i > 0 {
					parted = append(parted, p)
				}
			}
		}
	}
	return nil
}

// checkThreads refuses a process whose threads could not be made again with the
// tables that they have. References are given out only as the tables are
// written; until then any numbers do that tell tables apart.
func (n *census) checkThreads(p *process) error {
	t := *p.state.Task
	t.Threads = slices.Clone(t.Threads)
	numbers := map[any]image.Ref{(*file.Table)(nil): 0, (*object.Object)(nil): 0}
	number := func(table any) image.Ref {
		if _, ok := numbers[table]; !ok {
			numbers[table] = image.Ref(len(numbers))
		}
		return numbers[table]
	}
	for i, tid := range p.tids {
		th := &t.Threads[i]
		th.Files, th.FS, th.SemUndo = number(p.tables[i]), number(p.places[i]), n.undoList(p, tid)
	}
	first := &t.Threads[0] // has the process's own
	t.Files, t.FS, first.Files, first.FS = first.Files, first.FS, 0, 0
	_, err := planThreads(&t)
	return err
}

// noteTables completes the records of a process and its threads with the tables
// that they have.
func (n *census) noteTables(p *process) {
	t := p.state.Task
	t.MM, t.Files, t.FS, t.Sighand = p.space.Ref, p.tables[0].Ref, p.places[0].Ref, p.hand.Ref
	for i := range t.Threads {
		th := &t.Threads[i]
		if p.tables[i] != nil && i > 0 {
			th.Files = p.tables[i].Ref
		}
		if p.places[i] != nil && i > 0 {
			th.FS = p.places[i].Ref
		}
		th.SemUndo = n.undoList(p, p.tids[i])
	}
	p.notePlaces()
	if p.dead != nil {
		p.dead.Cgroups = t.Threads[0].Cgroups
		p.dead.SemUndo = t.Threads[0].SemUndo // it has none of its own any more
		t.Threads = append([]image.Thread{*p.dead}, t.Threads...)
	}
}

// undoList is the number of a thread's semaphore undo list, 0 for none.
func (n *census) undoList(p *process, tid int) (number uint32) {
	list, own := n.sharing.undo[tid]
	if !own {
		list = n.sharing.undo[p.pid]
	}
	if list != 0 {
		number, _ = once(n.found.undo, list, func() (uint32, error) { return uint32(len(n.found.undo)) + 1, nil })
	}
	return number
}

// hierarchy is what forest needs to know of a container's processes.
func hierarchy(tree *image.Tree, complete func(*forest.Process)) (all []forest.Process, reserved []int) {
	for i := range tree.Processes {
		p := &tree.Processes[i]
		one := forest.Process{Pid: int(p.Pid), Ppid: int(p.Ppid), Pgid: int(p.Pgid), Sid: int(p.Sid), Zombie: p.Zombie}
		if !p.Zombie {
			complete(&one)
		}
		all = append(all, one)
		for _, tid := range p.Threads {
			reserved = append(reserved, int(tid))
		}
	}
	return all, reserved
}

// planGrowth plans how the processes will be grown again, and refuses those that
// cannot be.
func (n *census) planGrowth(tree *image.Tree) (*forest.Plan, error) {
	byInner := map[int]*process{}
	for _, p := range n.procs {
		byInner[p.inner] = p
	}
	s := &n.sharing
	all, reserved := hierarchy(tree, func(f *forest.Process) {
		p := byInner[f.Pid].pid
		f.Shared = forest.Shared{forest.MM: s.space[p], forest.Sighand: s.hand[p], forest.Files: s.table[p], forest.FS: s.place[p], forest.SemUndo: s.undo[p]}
	})
	p, err := plan(tree, all, reserved)
	var unreachable *forest.Unreachable
	if errors.As(err, &unreachable) && byInner[unreachable.Pid] != nil {
		return nil, fail.In(byInner[unreachable.Pid].name(), fail.Refuse("", "it could not be made again: "+unreachable.Reason, ""))
	}
	return p, err
}

// cloneFlags are the flags of clone(2) and unshare(2) for tables.
func cloneFlags(tables forest.Tables) (flags uint64) {
	for t, flag := range map[forest.Table]uint64{
		forest.MM: unix.CLONE_VM, forest.Sighand: unix.CLONE_SIGHAND, forest.Files: unix.CLONE_FILES,
		forest.FS: unix.CLONE_FS, forest.SemUndo: unix.CLONE_SYSVSEM,
	} {
		if tables.Has(t) {
			flags |= flag
		}
	}
	return flags
}

// users counts the tasks that have yet to use each table of an image. The first
// to use one restores it, the last does what nobody can work after.
type users struct {
	left  map[image.Ref]int
	begun map[firstUse]bool
}

type firstUse struct {
	table image.Ref
	by    string // the phase
}

func countUsers(tasks []*image.Task) users {
	u := users{map[image.Ref]int{}, map[firstUse]bool{}}
	for _, t := range tasks {
		for _, ref := range []image.Ref{t.MM, t.Files, t.FS, t.Sighand} {
			u.left[ref]++
		}
	}
	return u
}

// first reports the first use of a table in a phase.
func (u *users) first(ref image.Ref, by string) bool {
	use := firstUse{ref, by}
	was := u.begun[use]
	u.begun[use] = true
	return !was
}

// done reports that nobody else will use a table.
func (u *users) done(ref image.Ref) bool {
	u.left[ref]--
	return u.left[ref] == 0
}
