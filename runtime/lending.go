package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/forest"
	"github.com/ocickpt/ocickpt/runtime/mm"
)

// Memory that processes share since fork(2) is shared again by forking again
// (mm/lend.go): who is forked from whom is what package forest plans, so the
// donor of a process is the one that the plan forks it from. Contents are written
// in the order of the plan: at restore, a process that lends is filled before it
// forks, and whatever comes before its pages is for processes that are there. One
// that has mapped what only a mount namespace of a task shows does not lend: that
// namespace is made when all have been forked.

// findDonors sorts the processes in the order of the plan and finds out of which
// others they borrow pages.
func (n *census) findDonors(steps []forest.Step) error {
	byInner := map[int]*process{}
	for _, p := range n.procs {
		byInner[p.inner] = p
	}
	forker, order := map[int]*process{}, map[int]int{}
	for i, step := range steps {
		if step.Op == forest.Fork || step.Op == forest.Enter {
			order[step.Child] = i + 1
		}
		if step.Op != forest.Fork {
			continue
		}
		if forker[step.Child] = byInner[step.Pid]; forker[step.Child] == nil { // a ghost
			forker[step.Child] = forker[step.Pid]
		}
	}
	slices.SortStableFunc(n.procs, func(a, b *process) int { return order[a.inner] - order[b.inner] })
	seen, lends := map[*mm.Space]bool{}, map[*mm.Space]bool{}
	for _, p := range n.procs {
		from := forker[p.inner]
		// Before it forks, one that lends is made, and then its ipc namespace is not.
		if from != nil && from.place.NestedIPC() && from.space.Attaches() {
			from = nil
		}
		if from != nil && !seen[p.space] && from.space != p.space && !from.space.Maps(n.files.MappedInside) {
			if err := p.space.Borrow(from.space); err != nil {
				return fail.In(p.name(), err)
			}
		}
		seen[p.space] = true
		if d := p.space.Donor(); d != nil {
			lends[d] = true
		}
	}
	for _, p := range n.procs {
		if slices.ContainsFunc(n.procs, func(o *process) bool { return o.space != p.space && o.space.SameProgram(p.space) }) {
			p.space.Related()
		}
	}
	n.lends = lends
	return nil
}

// worthAWarning is from how many bytes on multiplied memory is told of: a few
// pages are written to by a parent between any two forks.
const worthAWarning = 1 << 20

// multiplied is how many bytes of memory that was shared will be there once for
// each process that does not lend any itself.
func (n *census) multiplied() (bytes uint64) {
	seen := map[*mm.Space]bool{}
	for _, p := range n.procs {
		if !seen[p.space] && !n.lends[p.space] {
			bytes += p.space.Cousins()
		}
		seen[p.space] = true
	}
	return bytes
}

// contents reads section 6 of the stream, ahead of who puts it in.
type contents struct {
	stream chan content
	next   *content
	cancel context.CancelFunc
}

type content struct {
	*image.Content
	err error
}

// readAhead is how many records the reader may be ahead of the writer.
const readAhead = 2

func readContents(in *image.Reader) *contents {
	ctx, cancel := context.WithCancel(context.Background())
	c := &contents{stream: make(chan content, readAhead), cancel: cancel}
	go func() {
		defer close(c.stream)
		for {
			one, err := in.Next()
			select {
			case c.stream <- content{one, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return c
}

// peek returns the next record, which take takes away.
func (c *contents) peek(ctx context.Context) (*image.Content, error) {
	if c.next == nil {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case one := <-c.stream:
			c.next = &one
		}
	}
	return c.next.Content, c.next.err
}

func (c *contents) take() { c.next = nil }

// lending is what a restore knows of donors and borrowers.
type lending struct {
	lends  map[image.Ref]bool  // address spaces that others borrow of
	users  map[image.Ref][]int // pids, by address space
	filled map[image.Ref]bool  // those that lend and have been filled, as a whole or not
	holds  map[int]image.Ref   // by pid, ghosts too: the whole one that a stub has by fork
}

func newLending(head *image.Head) *lending {
	l := &lending{lends: map[image.Ref]bool{}, users: map[image.Ref][]int{}, filled: map[image.Ref]bool{}, holds: map[int]image.Ref{}}
	for _, t := range head.Tasks {
		l.users[t.MM] = append(l.users[t.MM], int(t.Pid))
		if d := head.MM(t.MM).Donor; d != 0 {
			l.lends[d] = true
		}
	}
	return l
}

// forked notes what a process hands on to one that it has forked.
func (l *lending) forked(parent, child int) {
	if ref, ok := l.holds[parent]; ok {
		l.holds[child] = ref
	}
}

// beforeFork brings in the pages of a process that others borrow of.
func (r *restore) beforeFork(ctx context.Context, pid int) error {
	t := r.head.Task(int32(pid))
	if t == nil || !r.lending.lends[t.MM] {
		return nil
	}
	if whole, done := r.lending.filled[t.MM]; done {
		if whole {
			r.lending.holds[pid] = t.MM
		}
		return nil
	}
	if r.maker.MapsInside(r.head.MM(t.MM)) { // no checkpoint asks for it
		r.lending.filled[t.MM] = false
		return nil
	}
	whole, err := r.fillUntil(ctx, t.MM)
	if err != nil {
		return err
	}
	r.lending.filled[t.MM] = whole
	if whole {
		r.lending.holds[pid] = t.MM
		return r.filler.Lend(t.MM)
	}
	return nil
}

// fillUntil puts in contents up to the last of address space ref. It stops, and
// returns false, before what is for a process that is not there yet: the plan is
// another one than at the checkpoint.
func (r *restore) fillUntil(ctx context.Context, ref image.Ref) (whole bool, err error) {
	if err := r.rebuildSpace(ref); err != nil {
		return false, err
	}
	for begun := false; ; {
		c, err := r.contents.peek(ctx)
		if errors.Is(err, io.EOF) || err == nil && begun && c.Ref != ref {
			return begun, nil
		}
		if err != nil {
			return false, err
		}
		if r.head.MM(c.Ref) != nil {
			if r.userOf(c.Ref) == 0 || r.maker.MapsInside(r.head.MM(c.Ref)) {
				return false, nil
			}
			if err := r.rebuildSpace(c.Ref); err != nil {
				return false, err
			}
		}
		begun = begun || c.Ref == ref
		if err := r.put(c); err != nil {
			return false, err
		}
		r.contents.take()
		c.Release()
	}
}

// userOf is the pid of a stub that is to have an address space, 0 if none is
// there yet.
func (r *restore) userOf(ref image.Ref) int {
	for _, pid := range r.lending.users[ref] {
		if r.stubs[pid] != nil {
			return pid
		}
	}
	return 0
}

// rebuildSpace gives the processes of an address space its areas, without their
// contents but for what is there already.
func (r *restore) rebuildSpace(ref image.Ref) error {
	if !r.users.first(ref, "rebuild") {
		return nil
	}
	pid := r.userOf(ref)
	s, m := r.stubs[pid], r.head.MM(ref)
	if s == nil {
		return fmt.Errorf("address space #%d has no process", ref)
	}
	held := r.lending.holds[pid]
	delete(r.lending.holds, pid)
	loan, err := &mm.Loan{}, error(nil)
	if m.Donor != 0 && held == m.Donor {
		loan, err = mm.Inherit(s, m, r.head.MM(m.Donor), r.maker)
	} else {
		err = mm.Rebuild(s, m, r.maker)
	}
	if err != nil {
		return err
	}
	if m.Donor != 0 {
		r.filler.Borrow(ref, m.Donor, s, loan)
	}
	return r.filler.Stub(ref, m, s)
}
