package tracee

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fault"
)

// Fault points of Run, each in front of the step it is named after, so that the
// point of a step stands for "the step before is done".
const (
	PointSlot    = "tracee.live.slot"    // write the thread's slot of the cave
	PointPark    = "tracee.live.park"    // registers: instruction pointer to the cure
	PointBlock   = "tracee.live.block"   // mask: all blocked but the report signal
	PointEnter   = "tracee.live.enter"   // registers: to the mmap
	PointMap     = "tracee.live.map"     // let it run: mmap
	PointFill    = "tracee.live.fill"    // write the entries
	PointArm     = "tracee.live.arm"     // registers: how many entries
	PointBatch   = "tracee.live.batch"   // let it run: the entries
	PointUnmap   = "tracee.live.unmap"   // let it run: munmap
	PointRest    = "tracee.live.rest"    // let it stop where the kernel restarts calls
	PointUnblock = "tracee.live.unblock" // mask: its own
	PointRestore = "tracee.live.restore" // registers: its own
	PointClear   = "tracee.live.clear"   // empty the slot
	PointDone    = "tracee.live.done"    // nothing is left to do
)

// Live runs batches in the threads of a running process, which must survive our
// death at any moment of it.
//
// The thread runs a small program in a cave of its own process (cave_amd64.s)
// and meets us by sending itself a signal that stops it while it is traced and
// means nothing when it is not. Without a tracer it comes through the program
// to its end, which frees the memory of the batch and restores the thread's
// signal mask and registers. It follows that a batch
//   - must be idempotent: what is left of it still runs when we die, and another
//     ocickpt then begins anew;
//   - must not hold nanosleep, poll or a futex wait with a timeout: they would
//     overwrite the restart block of a call of the thread's own that our stop
//     interrupted, and nobody can write that back;
//   - must not block, nor touch the program's own handlers, mask or memory.
//
// A seccomp filter is suspended while we trace (LiveOptions), not afterwards:
// calls for which it would punish a thread that has lost its tracer are made one
// step at a time (quiet.go).
//
// All threads of the process are stopped by the caller, and none was Busy,
// before the first Run and until the last. A Live is for one OS thread, the
// tracer's, and for one stop of the process: it does not survive its execve.
type Live struct {
	pid  int
	cave *cave
	// halted is set once the process is known to be in a group stop, which a
	// SIGCONT would end.
	halted bool
}

// RefusedError says why a thread cannot run a batch, before anything was done.
type RefusedError struct {
	Tid    int
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("task %d cannot make system calls for us: %s", e.Tid, e.Reason)
}

// StopError reports a stop that a batch cannot have, as a fault in the batch's
// memory would be. The thread has its registers and mask back.
type StopError struct {
	Tid  int
	Stop Stop
}

func (e *StopError) Error() string {
	return fmt.Sprintf("task %d: unexpected %v while it ran a batch", e.Tid, e.Stop)
}

// NoRoomError says that a thread cannot have the memory for a batch: a limit of
// its own or the kernel's is reached. The thread has been left as it was.
type NoRoomError struct {
	Tid   int
	Size  uint64
	Errno unix.Errno
}

func (e *NoRoomError) Error() string {
	return fmt.Sprintf("task %d: mmap of %d bytes for a batch: %v", e.Tid, e.Size, e.Errno)
}

func (e *NoRoomError) Unwrap() error { return e.Errno }

// ErrBusy is wrapped when Run is asked of a thread that is Busy.
var ErrBusy = errors.New("the task is still restoring itself from an ocickpt that died")

// NewLive finds room for our code in process pid and changes nothing yet. It
// returns a *NoCaveError if there is none.
func NewLive(pid int) (*Live, error) {
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	c, err := findCave(pid, mem)
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return &Live{pid: pid, cave: c}, nil
}

// Close releases what NewLive opened.
func (l *Live) Close() error { return l.cave.mem.Close() }

// Busy reports whether a stopped thread is still in a cure begun for an ocickpt
// that died. Settle ends that; so does detaching and trying again.
func (l *Live) Busy(t *Thread) (bool, error) {
	r, err := t.Regs()
	return err == nil && l.cave.contains(r.Rip), err
}

// Settle lets a stopped thread run on, under trace, until it is not Busy and
// stopped again. The cure takes some ten microseconds and waits for no other
// thread. A thread that also sits in a group stop gets out of the cave like
// this too, which left to itself it would not before a SIGCONT.
func (l *Live) Settle(t *Thread, limit time.Duration) error {
	// A cure takes microseconds, once the thread gets a processor.
	const shortest, longest = 20 * time.Microsecond, 5 * time.Millisecond
	deadline := time.Now().Add(limit)
	for brief := shortest; ; brief = min(2*brief, longest) {
		busy, err := l.Busy(t)
		switch {
		case err != nil:
			return err
		case !busy:
			return t.passOn(limit)
		case time.Now().After(deadline):
			return fmt.Errorf("task %d: %w", t.Tid, ErrBusy)
		}
		r, err := t.Regs()
		if err == nil && r.hasten() {
			err = t.SetRegs(r)
		}
		if err == nil {
			err = t.runBriefly(brief, limit)
		}
		if err != nil {
			return err
		}
	}
}

// passOn brings a thread that a signal has stopped on its way to a handler into
// the stop that Interrupt asks for: let go from where it is, it would lose the
// signal.
func (t *Thread) passOn(limit time.Duration) error {
	s, stopped, err := t.wait(unix.WNOHANG)
	if err != nil || !stopped || s.Interrupted() {
		return err
	}
	return t.WaitInterrupt(limit)
}

// runBriefly lets the thread run for about the time of a cure. It may stop by
// itself, for a group stop or a signal; to interrupt it then would only make it
// stop again before its next instruction, for ever.
func (t *Thread) runBriefly(brief, limit time.Duration) error {
	s, _, err := t.wait(unix.WNOHANG)
	if err != nil {
		return err
	}
	var sig unix.Signal
	if s.Event == 0 && !s.Syscall() {
		sig = s.Signal
	}
	if err := t.Cont(sig); err != nil {
		return err
	}
	time.Sleep(brief)
	if _, stopped, err := t.wait(unix.WNOHANG); err != nil || stopped {
		return err
	}
	if err := t.Interrupt(); err != nil {
		return err
	}
	return t.WaitInterrupt(limit)
}

// Run makes the stopped thread t run batch b and leaves it as it was: registers,
// mask, memory and restart block. (A thread that was inside a restartable
// sequence finds it aborted, as after any interruption.) It rests in a stop from
// which both PTRACE_CONT and PTRACE_DETACH restart an interrupted call.
//
// A failing call that is not tolerated ends the batch with a *CallError; calls
// behind it have Ret 0. Whatever the error, the thread has been left as it was,
// unless it wraps ErrGone.
func (l *Live) Run(t *Thread, b *Batch) error { return l.run(t, nil, b) }

func (l *Live) run(t *Thread, known *Known, b *Batch) error {
	if len(b.Calls) == 0 {
		return nil
	}
	v, err := l.prepare(t, known)
	if err != nil {
		return err
	}
	err = v.enter(b)
	if err == nil {
		err = v.run(b)
	}
	if left := v.leave(); err == nil {
		err = left
	}
	return err
}

// visit is one Run: what is to be put back, and how far it has come.
type visit struct {
	*Thread
	live *Live
	own  Regs   // the thread's registers, as Run leaves them
	mask uint64 // and its mask
	id   ids
	slot uint64

	report   unix.Signal // by which it meets us; 0 if each of its calls stops it instead
	passing  unix.Signal // the report signal, also after report became 0
	size     uint64      // of the batch's memory
	page     uint64      // where it is; 0 while there is none
	now      Regs        // the thread's registers at its latest stop in the slot
	entered  bool        // the instruction pointer is in the slot
	stepping bool        // it stopped at a system call, not on its way out of the kernel

	punished func(nr uintptr, args [6]uint64) bool // by its filter; nil without
	quiet    bool                                  // it makes no call by itself
	guards   *Batch                                // whose guarded entries are to be opened
	guarded  []int                                 // the guarded entries
	fed      int                                   // how many of them are open
}

// prepare finds out all that has to be known and changes nothing.
func (l *Live) prepare(t *Thread, known *Known) (*visit, error) {
	v := &visit{Thread: t, live: l}
	regs, err := t.Regs()
	if err != nil {
		return nil, err
	}
	if l.cave.contains(regs.Rip) {
		return nil, fmt.Errorf("task %d: %w", t.Tid, ErrBusy)
	}
	if why := regs.foreign(); why != "" {
		return nil, &RefusedError{t.Tid, why}
	}
	if v.own, err = t.ResumeRegs(regs); err != nil {
		return nil, err
	}
	if v.mask, err = t.SigMask(); err != nil {
		return nil, err
	}
	st, err := l.status(t, v.mask, known)
	if err != nil {
		return nil, err
	}
	if st.seccomp != "0" && t.filtered {
		return nil, &RefusedError{t.Tid, "its seccomp filter cannot be suspended: that needs CAP_SYS_ADMIN and a tracer without a filter of its own"}
	}
	if err := t.checkDispatch(); err != nil {
		return nil, err
	}
	if err := l.noteGroupStop(t); err != nil {
		return nil, err
	}
	v.id = st.ids
	v.report = reportSignal(st, v.mask, l.halted)
	v.passing = v.report
	if err := v.learnFilter(st.seccomp); err != nil {
		return nil, err
	}
	v.slot, err = l.cave.take(st.ids)
	return v, err
}

// status is what has to be known of the thread. Others may have sent it signals since
// it was read, which matters where a SIGCONT is to be sent.
func (l *Live) status(t *Thread, mask uint64, known *Known) (status, error) {
	if known != nil {
		st := status{ids: ids{known.Tgid, known.Tid}, caught: known.Caught, seccomp: strconv.Itoa(int(known.Seccomp))}
		if reportSignal(st, mask, false) != unix.SIGCONT {
			return st, nil
		}
	}
	return readStatus(t.Pid, t.Tid)
}

// noteGroupStop remembers a group stop, which the thread's present stop tells.
func (l *Live) noteGroupStop(t *Thread) error {
	s, stopped, err := t.wait(unix.WNOHANG)
	if stopped && s.Event == eventStop && s.Signal != unix.SIGTRAP {
		l.halted = true
	}
	return err
}

// step does one thing to the thread behind its fault point.
func step(point string, do func() error) error {
	if err := fault.Point(point); err != nil {
		return err
	}
	return do()
}

// enter brings the thread into the cave and gives it memory for the batch.
//
// The order is what lets it survive. Parked first, the thread has its own
// registers but for the instruction pointer, which is at the cure; blocking
// signals before that would leave them blocked if we died in between. Only then
// does it get registers that are not its own: a handler that runs on top of the
// parked thread, because we died there, finds the true ones.
func (v *visit) enter(b *Batch) error {
	if v.quiet {
		v.size = batchSize(b)
		return v.enterQuietly(v.own.userView())
	}
	if err := v.park(b); err != nil {
		return err
	}
	return step(PointMap, v.mapMemory)
}

// park is what enter does before the thread runs.
func (v *visit) park(b *Batch) error {
	view := v.own.userView()
	parked := view
	parked.Rip, parked.Cs = v.slot+places.unmapped, userCS64
	v.size = batchSize(b)
	steps := []struct {
		point string
		do    func() error
	}{
		{PointSlot, func() error { return v.live.cave.write(v.slot, slotImage(&view, v.mask, v.id)) }},
		{PointPark, func() error { v.entered = true; return v.SetRegs(parked) }},
		{PointBlock, func() error { return v.SetSigMask(allBut(v.report)) }},
		{PointEnter, func() error { return v.SetRegs(enterRegs(view, v.slot, v.size, v.report)) }},
	}
	for _, s := range steps {
		if err := step(s.point, s.do); err != nil {
			return err
		}
	}
	return nil
}

func (v *visit) mapMemory() error {
	if err := v.advance(places.mapped); err != nil {
		return err
	}
	return v.mapped()
}

// mapped takes note of what mmap has returned.
func (v *visit) mapped() error {
	if errno := -int64(v.now.Rbx); errno > 0 && errno < 4096 {
		return &NoRoomError{v.Tid, v.size, unix.Errno(errno)}
	}
	v.page = v.now.Rbx
	return nil
}

// run brings the batch into the thread's memory, lets it run and reads it back.
func (v *visit) run(b *Batch) error {
	mem, err := v.load(b)
	if err != nil {
		return err
	}
	v.guards = b
	err = step(PointBatch, func() error {
		if v.quiet {
			return v.pass(gateRun, gateUnmap, b)
		}
		return v.advance(places.ran)
	})
	v.guards = nil
	if err != nil {
		return err
	}
	return v.unload(b, mem)
}

// load brings the batch into the thread's memory, of which it returns a copy.
func (v *visit) load(b *Batch) ([]byte, error) {
	dataAt := dataOffset(b)
	data := v.page + dataAt
	mem := make([]byte, int(dataAt)+len(b.Data))
	b.encode(mem, data)
	b.fill(mem[dataAt:], data)
	v.guard(b, mem, data)
	if err := step(PointFill, func() error { return v.Write(v.page, mem) }); err != nil {
		return nil, err
	}
	return mem, step(PointArm, func() error { return v.arm(len(b.Calls)) })
}

// unload reads what became of the batch.
func (v *visit) unload(b *Batch, mem []byte) error {
	if err := v.Read(v.page, mem); err != nil {
		return err
	}
	dataAt := dataOffset(b)
	v.settleResults(b, mem)
	b.decode(mem)
	copy(b.Data, mem[dataAt:])
	return b.failure(v.Tid, len(b.Calls)-v.now.left(), v.page+dataAt)
}

// arm sets how many entries are to be run.
func (v *visit) arm(calls int) error {
	v.now.R12, v.now.Rbp = uint64(calls), v.page
	return v.SetRegs(v.now)
}

// leave undoes what enter did, as far as it came, whatever fails on the way, and
// returns the first error.
//
// The mask comes back while the thread is still in the cave: from there the cure
// leads out if we die now, with the same mask.
func (v *visit) leave() (first error) {
	undo := func(point string, do func() error) {
		err := errors.Join(fault.Point(point), do())
		if first == nil {
			first = err
		}
	}
	if v.page != 0 {
		undo(PointUnmap, v.unmap)
	}
	if v.stepping {
		undo(PointRest, v.rest)
	}
	if v.entered {
		undo(PointUnblock, func() error { return v.SetSigMask(v.mask) })
		undo(PointRestore, func() error { return v.SetRegs(v.own) })
	}
	undo(PointClear, func() error { return v.live.cave.clear(v.slot, v.id.tgid) })
	undo(PointDone, func() error { return nil })
	return first
}

// unmap frees the batch's memory. If the batch did not run to its end, it has to
// be brought there first, without the entries that are left.
func (v *visit) unmap() error {
	if v.quiet {
		return v.unmapQuietly()
	}
	if v.now.Rip != v.slot+places.ran {
		if err := v.arm(0); err != nil {
			return err
		}
		if err := v.advance(places.ran); err != nil {
			return err
		}
	}
	return v.advance(places.unmapped)
}

// advance lets the thread run on to a place behind a report. It has arrived when
// it stops there, whatever for: nobody gets there but by making the call. The
// siginfo of a report would be no better proof, as the kernel drops it when the
// user's signal queue is full (RLIMIT_SIGPENDING). And a report by SIGCONT stops
// the thread twice, first for a notice to tracers that somebody continued it; its
// signal may even get lost, if a stop signal is sent before it is taken.
func (v *visit) advance(place uint64) error {
	for sig := unix.Signal(0); ; {
		s, err := v.resume(sig)
		if err != nil {
			return err
		}
		if v.now, err = v.Regs(); err != nil {
			return err
		}
		here := v.now.Rip == v.slot+place
		if v.now.Rip-v.slot > places.unmapped { // outside too
			return v.escaped(s)
		}
		sig = 0
		switch {
		case s.Syscall():
			if here && v.now.result() != -int64(unix.ENOSYS) { // which is what rax holds at the entry
				return nil
			}
		case here && (s.Event != 0 || s.Signal == v.report):
			return nil
		case s.Event != 0: // a group stop, or the end of one: it changes nothing
		case s.Signal == unix.SIGSTOP:
			if err := v.heedStop(); err != nil {
				return err
			}
			sig = s.Signal
		case s.Signal == v.passing:
			sig = s.Signal // another's, or met before: its action is to be ignored
		default:
			return &StopError{v.Tid, s}
		}
	}
}

// escaped is for a thread that made its reports without stopping: it is in the
// cure or behind it. If it has stopped there for a signal of its own, it gets
// it, but not before its registers: no handler is to return to a slot that we
// are about to empty.
func (v *visit) escaped(s Stop) error {
	var errs []error
	if v.live.cave.contains(v.now.Rip) {
		errs = append(errs, v.SetSigMask(v.mask), v.SetRegs(v.own))
	}
	v.entered, v.stepping, v.page = false, false, 0
	if s.Event == 0 && !s.Syscall() {
		errs = append(errs, v.Interrupt(), v.Cont(s.Signal), v.WaitInterrupt(time.Second))
	}
	return errors.Join(append(errs, &StopError{v.Tid, s})...)
}

// heedStop prepares for the delivery of a SIGSTOP, which cannot be blocked. It
// is delivered at once, to be kept by the kernel and not by us: the process is
// in a group stop from then on, whoever dies. A tracer may let one of its
// threads run all the same, so the batch goes on. But a report by SIGCONT would
// end the group stop.
func (v *visit) heedStop() error {
	v.live.halted = true
	if v.report != unix.SIGCONT {
		return nil
	}
	v.report = 0
	v.now.R15 = 0
	return v.SetRegs(v.now)
}

// resume lets the thread run until its next stop. Without a report signal the
// entry and exit of every call stop it. Nor does it run for ever without a stop:
// we look at it once in a while.
func (v *visit) resume(sig unix.Signal) (Stop, error) {
	const patience = time.Second
	cont := v.Cont
	if v.report == 0 {
		cont = v.ContSyscall
	}
	if err := cont(sig); err != nil {
		return Stop{}, err
	}
	if v.guards != nil {
		if err := v.feed(v.guards); err != nil {
			_, stopping := v.interrupted(patience)
			return Stop{}, errors.Join(err, stopping)
		}
	}
	s, err := v.await(patience)
	if errors.Is(err, ErrNoStop) {
		s, err = v.interrupted(patience)
	}
	v.stepping = s.Syscall()
	return s, err
}

// interrupted stops the thread wherever it is.
func (v *visit) interrupted(limit time.Duration) (Stop, error) {
	if err := v.Interrupt(); err != nil {
		return Stop{}, err
	}
	return v.await(limit)
}

// rest moves the thread from a stop at a call's exit to one in the kernel's
// signal path. A stop at the exit is too late for the kernel to look at the
// result in rax and to restart the call that it says was interrupted; a thread
// stopped by a report signal is in the right place already.
func (v *visit) rest() error {
	if err := v.Interrupt(); err != nil {
		return err
	}
	for sig := unix.Signal(0); ; {
		if err := v.Cont(sig); err != nil {
			return err
		}
		s, err := v.await(time.Second)
		if err != nil || s.Interrupted() {
			return err
		}
		sig = s.Signal
	}
}

// failure is the error of the call that ended a batch of which made calls were
// made, or nil.
func (b *Batch) failure(tid, made int, data uint64) error {
	if made == 0 || b.Calls[made-1].Tolerate || b.Err(made-1) == nil {
		return nil
	}
	c := &b.Calls[made-1]
	e := &CallError{Tid: tid, Index: made - 1, Nr: c.Nr, Errno: unix.Errno(-c.Ret)}
	for i, a := range c.Args {
		e.Args[i] = a.resolve(data)
	}
	return e
}

// dataOffset is where the batch's data begins, behind its entries.
func dataOffset(b *Batch) uint64 { return uint64(len(b.Calls)*entrySize+15) &^ 15 }

// batchSize is the size of the batch's memory, in whole pages.
func batchSize(b *Batch) uint64 {
	const page = 4096
	return (dataOffset(b) + uint64(len(b.Data)) + page - 1) &^ (page - 1)
}
