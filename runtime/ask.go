package runtime

import (
	"context"
	"slices"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// together is how many processes, or threads, are asked before the answers are
// taken: enough for as many as run at once, and few enough for our memory.
const together = 64

// collectTasks reads what each process owns.
func (k *checkpoint) collectTasks(ctx context.Context, children map[int][]*process) error {
	var asked []*asking
	var jobs []*tracee.Job
	answer := func() error {
		tracee.RunAll(jobs)
		for _, a := range asked {
			if err := k.answer(a); err != nil {
				return fail.In(a.p.name(), err)
			}
		}
		asked, jobs = asked[:0], jobs[:0]
		return nil
	}
	for _, p := range slices.Backward(k.census.procs) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if slices.ContainsFunc(p.tids, func(tid int) bool { return k.halt.Held[tid] == nil }) {
			if err := answer(); err != nil { // for what it waits for in vfork
				return err
			}
		}
		a, err := k.ask(p, children[p.tgid])
		if err != nil {
			return fail.In(p.name(), err)
		}
		asked, jobs = append(asked, a), append(jobs, a.Jobs...)
		if len(jobs) < together {
			continue
		}
		if err := answer(); err != nil {
			return err
		}
	}
	return answer()
}

// asking is a process that is being asked.
type asking struct {
	*task.Asked
	p     *process
	asker *tracee.Thread // where it is asked about its address space
}

// ask asks a process.
func (k *checkpoint) ask(p *process, children []*process) (*asking, error) {
	var waiting []*task.Waiting
	var asker *tracee.Thread
	for _, tid := range p.tids {
		t, w := k.halt.Held[tid], (*task.Waiting)(nil)
		if t == nil {
			var err error
			if w, err = k.waitingThread(tid); err != nil {
				return nil, err
			}
		} else if asker == nil {
			asker = t
		}
		p.threads, waiting = append(p.threads, t), append(waiting, w)
	}
	n := k.census
	asks := asker != nil && !n.found.asked[p.space] // about the address space
	var also []func(b *tracee.Batch) func()
	if asks {
		n.found.asked[p.space] = true
		also = append(p.space.AskPolicies(), p.space.AskRings)
	}
	k.report.Tasks++
	k.report.Threads += len(p.tids)
	p.live = k.halt.Live[p.tgid]
	src := &task.Source{
		Stopped: k.halt.Stopped[p.tgid], Narrow: p.space.Narrow(),
		Pid: p.pid, Inner: p.inner, Stat: p.stat, Tids: p.tids, Threads: p.threads, Status: p.status, Waiting: waiting, Live: p.live,
		Maps: k.c.maps, Now: k.c.now, Block: k.learned.block, Kept: k.learned.kept, Warn: k.c.warn,
		Usual: k.c.usual, MayFlush: slices.Contains(k.c.bounding, "CAP_SYS_RESOURCE"), Also: also,
		InnerTid: func(host int) int {
			s, err := task.ReadStatus(host)
			if err != nil {
				return 0
			}
			return task.Innermost(s.NSpid) // as the task itself numbers it
		},
		Level:  k.c.level,
		Timers: func() (map[int32]bpf.Timer, bool) { return k.learned.timersOf(p.tgid) },
		Exists: func(inner int) bool {
			level := len(p.leader.NSpid) - 1 // the task's own pid namespace
			return slices.ContainsFunc(k.census.procs, func(other *process) bool {
				ids := other.leader.NSpid
				return len(ids) > level && ids[level] == inner
			}) || slices.ContainsFunc(k.census.zombies, func(z zombie) bool { return len(z.Pids) > level && int(z.Pids[level]) == inner })
		},
	}
	for _, child := range children {
		src.Children = append(src.Children, child.knownTo(p))
	}
	if !asks {
		asker = nil
	}
	a, err := src.Ask()
	return &asking{a, p, asker}, err
}

// answer takes what a process has answered.
func (k *checkpoint) answer(a *asking) error {
	n, p, asker := k.census, a.p, a.asker
	err := a.Answer()
	if err != nil {
		return err
	}
	p.state = a.State
	for i := range p.state.Task.Threads {
		if err := mm.CheckKeys(p.state.Task.Threads[i].XState); err != nil {
			return err
		}
	}
	if err := oneIdentity(p, p.state.Task.Threads); err != nil {
		return err
	}
	p.hand, _ = once(n.found.hands, representative(n.sharing.hand, p.pid), func() (*object.Object, error) {
		return &object.Object{Type: image.TypeSighand, Record: p.state.Sighand}, nil
	})
	if asker == nil {
		return nil
	}
	if p.state.LockFuture {
		if err := p.space.LockFuture(func(b *tracee.Batch) error { return p.live.Run(asker, b) }); err != nil {
			return err
		}
	}
	if err := p.space.Policies(p.live, asker); err != nil {
		return err
	}
	err = p.space.Rings(func() (map[uint64]bpf.AIOContext, error) { return k.learned.contextsOf(p.tgid) })
	if err != nil {
		return err
	}
	return p.space.Details(p.stat.Field, p.state.Brk)
}
