package runtime

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A thread has the descriptor table, file system context and semaphore undo
// list of the thread that clones it, or copies of its own (clone(2)); it can
// leave them later (unshare(2)), as file servers do to change the directory of
// one thread only.

// threadTables are the flags that share the tables a thread can have of its own.
var threadTables = [...]uint64{unix.CLONE_FILES, unix.CLONE_FS, unix.CLONE_SYSVSEM}

// A threadTable is one of them by its place there and its number, 0 for none.
type threadTable struct {
	kind   int
	number uint32
}

func tablesOf(t *image.Task, i int) (tables [len(threadTables)]threadTable) {
	th := &t.Threads[i]
	for kind, number := range []uint32{uint32(t.Files), uint32(t.FS), th.SemUndo} {
		tables[kind] = threadTable{kind, number}
	}
	if th.Files != 0 {
		tables[0].number = uint32(th.Files)
	}
	if th.FS != 0 {
		tables[1].number = uint32(th.FS)
	}
	return tables
}

// A threadStep has one thread clone another.
type threadStep struct {
	cloner, thread int    // by their places in the task
	share          uint64 // flags of the tables that the thread has from its cloner
	fresh          uint64 // flags of those that it is the first to have
}

// threadPlan finds who clones whom. A table that a thread is the first to have
// begins as a copy; all others must come from one thread that has them. So
// those are cloned first who are the first to have the fewest.
type threadPlan struct {
	task    *image.Task
	steps   []threadStep
	exists  map[threadTable]bool
	cloners []int // one for each combination of tables
}

func planThreads(t *image.Task) ([]threadStep, error) {
	p := threadPlan{task: t, exists: map[threadTable]bool{}}
	p.made(0)
	left := make([]int, len(t.Threads)-1)
	for i := range left {
		left[i] = i + 1
	}
	for most := 0; len(left) > 0; most++ {
		if most > len(threadTables) {
			return nil, fail.Refuse(fmt.Sprintf("thread %d", t.Threads[left[0]].Tid), "it shares tables with several threads none of which has them all; that is not supported", "")
		}
		n := len(left)
		left = slices.DeleteFunc(left, func(i int) bool { return p.add(i, most) })
		if len(left) < n {
			most = -1
		}
	}
	return p.steps, nil
}

func (p *threadPlan) made(i int) {
	if tables := tablesOf(p.task, i); !slices.ContainsFunc(p.cloners, func(c int) bool { return tablesOf(p.task, c) == tables }) {
		p.cloners = append(p.cloners, i)
		for _, table := range tables {
			p.exists[table] = true
		}
	}
}

// add plans thread i, if there is a cloner from whom it is the first to have at
// most so many tables.
func (p *threadPlan) add(i, most int) bool {
	for _, cloner := range p.cloners {
		step, ok := p.step(cloner, i, most)
		if ok {
			p.steps = append(p.steps, step)
			p.made(i)
			return true
		}
	}
	return false
}

func (p *threadPlan) step(cloner, i, most int) (threadStep, bool) {
	step := threadStep{cloner: cloner, thread: i}
	has := tablesOf(p.task, cloner)
	for kind, table := range tablesOf(p.task, i) {
		switch {
		case table.number == 0:
		case has[kind] == table:
			step.share |= threadTables[kind]
		case p.exists[table]:
			return step, false
		default:
			step.fresh |= threadTables[kind]
			most--
		}
	}
	return step, most >= 0
}

// cloneThreads makes the threads of a task, gives those that have tables of
// their own what is in them, and completes the task's own tables. b is to be run
// by the leader before.
func (r *restore) cloneThreads(t *image.Task, leader *tracee.Stub, b *tracee.Batch) ([]*tracee.Stub, error) {
	steps, err := planThreads(t)
	if err != nil {
		return nil, err
	}
	own := r.maker.AboutThreads(r.head.Files(t.Files)) || len(r.parts[int(t.Pid)]) > 0 || slices.ContainsFunc(steps, func(s threadStep) bool { return s.fresh&(unix.CLONE_FILES|unix.CLONE_FS) != 0 })
	if !own && !vforks(t) {
		r.completeTables(b, t)
	}
	threads := make([]*tracee.Stub, len(t.Threads))
	threads[0] = leader
	for first := true; first || len(steps) > 0; first = false {
		n := 0
		for n < len(steps) && steps[n].cloner == steps[0].cloner && (!first || steps[n].cloner == 0) {
			n++
		}
		cloner := leader
		if n > 0 {
			cloner = threads[steps[0].cloner]
		}
		if err := r.cloneBatch(t, cloner, b, threads, steps[:n]); err != nil {
			return nil, err
		}
		if err := r.openTables(t, threads, steps[:n]); err != nil {
			return nil, err
		}
		for _, step := range steps[:n] {
			if err := r.enterMounts(t, threads, step); err != nil {
				return nil, err
			}
		}
		b, steps = &tracee.Batch{}, steps[n:]
	}
	if err := r.partThreads(t, threads); err != nil {
		return nil, err
	}
	if err := r.openThreads(t, threads); err != nil {
		return nil, err
	}
	if own {
		err = r.completeAll(t, threads)
	}
	return threads, err
}

// openThreads puts what is about threads of a task into its tables.
func (r *restore) openThreads(t *image.Task, threads []*tracee.Stub) error {
	host := func(tid int32) int {
		i := slices.IndexFunc(t.Threads, func(th image.Thread) bool { return th.Tid == tid })
		if i < 0 {
			return 0
		}
		return threads[i].Tid
	}
	for i, s := range threads {
		table := t.Threads[i].Files
		if i == 0 {
			table = t.Files
		}
		if files := r.head.Files(table); r.maker.AboutThreads(files) {
			if err := r.maker.OpenThreads(s, files, host); err != nil {
				return err
			}
		}
	}
	return nil
}

// cloneBatch clones the threads of steps, which have the same cloner. Where ids
// have to be chosen by others, they go one by one.
func (r *restore) cloneBatch(t *image.Task, cloner *tracee.Stub, b *tracee.Batch, threads []*tracee.Stub, steps []threadStep) error {
	if len(steps) > 0 && len(r.hinted[int(t.Pid)]) > 0 {
		if _, err := cloner.Run(b); err != nil {
			return err
		}
		for _, s := range steps {
			ids, err := r.hintThread(t, s.thread)
			if err != nil {
				return err
			}
			var one tracee.Batch
			task.SlackForChild(&one, &t.Threads[s.thread].Controls)
			task.CloneThread(&one, ids, s.share)
			if err := cloned(cloner, &one, threads, []threadStep{s}); err != nil {
				return err
			}
			if err := r.checkThread(t, s.thread, threads[s.thread].Tid); err != nil {
				return err
			}
		}
		return nil
	}
	for _, s := range steps {
		task.SlackForChild(b, &t.Threads[s.thread].Controls)
		task.CloneThread(b, r.threadIDs(t, s.thread), s.share)
	}
	return cloned(cloner, b, threads, steps)
}

// cloned runs a batch that clones the threads of steps and takes hold of them.
func cloned(cloner *tracee.Stub, b *tracee.Batch, threads []*tracee.Stub, steps []threadStep) error {
	tids, err := cloner.Run(b)
	if err != nil {
		return err
	}
	if len(tids) != len(steps) {
		return fmt.Errorf("%d threads came to be instead of %d", len(tids), len(steps))
	}
	for i, s := range steps {
		if threads[s.thread], err = cloner.NewChild(cloner.Pid, tids[i]); err != nil {
			return err
		}
	}
	return nil
}

// openTables fills the descriptor tables that threads are the first to have. The
// numbers under which stubs have the files stay open in them.
func (r *restore) openTables(t *image.Task, threads []*tracee.Stub, steps []threadStep) error {
	for _, s := range steps {
		if s.fresh&unix.CLONE_FILES == 0 {
			continue
		}
		if err := r.maker.OwnTable(threads[s.thread], r.head.Files(t.Threads[s.thread].Files)); err != nil {
			return fail.On(fmt.Sprintf("thread %d", t.Threads[s.thread].Tid), err)
		}
	}
	return nil
}

// completeTables adds the calls after which the tables of a task are as they are
// to be, if it is the last to use them.
func (r *restore) completeTables(b *tracee.Batch, t *image.Task) {
	if r.users.done(t.FS) { // through what stands in the table
		r.maker.RestoreFS(b, r.head.FS(t.FS))
	}
	if r.users.done(t.Files) {
		r.maker.CloseTable(b, r.head.Files(t.Files))
	}
}

// completeAll does so for a task with threads that have tables of their own.
func (r *restore) completeAll(t *image.Task, threads []*tracee.Stub) error {
	for i, s := range slices.Backward(threads) { // the leader closes the table of most
		var b tracee.Batch
		th := &t.Threads[i]
		if th.FS != 0 && r.users.first(th.FS, "finish") {
			r.maker.RestoreFS(&b, r.head.FS(th.FS))
		}
		if th.Files != 0 && r.users.first(th.Files, "finish") {
			r.maker.CloseTable(&b, r.head.Files(th.Files))
		}
		if i == 0 && !vforks(t) {
			r.completeTables(&b, t)
		}
		if _, err := s.Run(&b); err != nil {
			return fail.On(fmt.Sprintf("thread %d", th.Tid), file.ExplainLock(err))
		}
	}
	return nil
}
