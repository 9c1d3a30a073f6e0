package task

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Source is a stopped process to be read.
type Source struct {
	Pid     int // host
	Inner   int
	Stat    *Stat
	Tids    []int
	Threads []*tracee.Thread // leader first; nil for one that waits in vfork(2)
	Status  []*Status        // of each thread
	Waiting []*Waiting       // by thread, nil for the others
	Live    *tracee.Live
	Maps    IDMaps
	Usual   Usual
	// Also are questions of other rooms: the first goes with the leader's batch.
	Also []func(b *tracee.Batch) func()
	// MayFlush tells that threads of the container may have been I/O flushers,
	// which takes CAP_SYS_RESOURCE.
	MayFlush bool
	Stopped  unix.Signal // that job control has stopped it by
	Narrow   bool        // it has executed a 32-bit program
	// Children are the pids of the process's children, as it knows them.
	Children []int32
	// InnerTid translates a host tid of the container.
	InnerTid func(host int) int
	// Level picks the container's from the ids in each pid namespace.
	Level func(ids []int) int
	// Now is CLOCK_MONOTONIC, outside, at the moment of the record of the
	// container's clocks.
	Now int64
	// Block reads a thread's restart block out of the kernel, where it can.
	Block func(tid int) (bpf.RestartBlock, bool)
	// Timers reads what the kernel knows of the process's timers, where it can.
	Timers func() (map[int32]bpf.Timer, bool)
	// Kept is what the kernel keeps of a thread, where it can be read and there are
	// so many that it is worth it; nil for none.
	Kept func(tid int) (bpf.Thread, bool)
	// Exists tells of a pid inside whether the container has a process with it.
	Exists func(inner int) bool
	// Warn notes what could not be found out, or is not saved.
	Warn func(format string, args ...any)
}

// State is what Collect found.
type State struct {
	Task    *image.Task
	Sighand *image.Sighand
	Brk     uint64 // the end of the heap, which only the process knows
	// LockFuture says that mlockall(2) locks what the process maps from now on.
	LockFuture bool

	// Untold is what wait(2) has yet to tell of its children: CLD_STOPPED or
	// CLD_CONTINUED by pid.
	Untold map[int32]int32

	tids    []int
	hasLDT  func() bool
	hasJobs func() bool
	queued  []int // signals that waited for each thread, and for the process
	asked   int64 // CLOCK_MONOTONIC when the process had told what time its timers had left
}

// StatExitSignal is a field of /proc/PID/stat.
const StatExitSignal = 38

// Asked is a process of which everything has been read that can be read from
// outside, and the batches, one for each of its threads, that tell the rest.
type Asked struct {
	*Source
	State *State
	Jobs  []*tracee.Job // of those that wait in vfork(2), none

	answers []func() error // by thread
	samples map[bpf.Alike]*sample
}

// sample is a thread whose answers are those of others too.
type sample struct {
	rec    *image.Thread
	status *Status
	found  []string // what of it is not saved
}

// Ask reads what a process and its threads own, as far as that can be done from
// outside. Answer takes what the
// batches have found out.
func (s *Source) Ask() (*Asked, error) {
	st := &State{tids: s.Tids, Task: &image.Task{
		Pid:        int32(s.Inner),
		ExitSignal: int32(s.Stat.Field(StatExitSignal)),
	}}
	a := &Asked{Source: s, State: st, answers: make([]func() error, len(s.Threads)), samples: map[bpf.Alike]*sample{}}
	if err := s.outside(st.Task); err != nil {
		return nil, err
	}
	st.Task.Threads = make([]image.Thread, len(s.Threads))
	for i := range s.Threads {
		rec := &st.Task.Threads[i]
		rec.Tid = int32(s.Level(s.Status[i].NSpid))
		var err error
		if s.Threads[i] == nil {
			err = s.waiting(i, s.Waiting[i], rec)
		} else {
			err = a.thread(i)
		}
		if err != nil {
			return nil, err
		}
	}
	return a, nil
}

// Answer completes the state of the process once all Jobs have been run.
func (a *Asked) Answer() error {
	s, st := a.Source, a.State
	for _, answer := range a.answers {
		if answer == nil {
			continue
		}
		if err := answer(); err != nil {
			return err
		}
	}
	if s.asker() < 0 {
		return s.processOf(s.Waiting[0], st)
	}
	if err := s.askAlso(); err != nil {
		return err
	}
	if err := s.readPending(st); err != nil {
		return err
	}
	if err := s.trapsInVfork(st.Task); err != nil {
		return err
	}
	read := monotonicNow()
	settleITimers(st.Task, st.asked-s.Now, read-st.asked)
	return s.settleTimers(st.Task, st.asked, read)
}

func monotonicNow() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail
	return ts.Nano()
}

// askAlso asks the rest of other rooms' questions, if there are so many.
func (s *Source) askAlso() error {
	for i := 1; i < len(s.Also); i++ {
		var b tracee.Batch
		done := s.Also[i](&b)
		if err := s.Live.Run(s.Threads[s.asker()], &b); err != nil {
			return err
		}
		done()
	}
	return nil
}

// outside reads what /proc and system calls tell of the process.
func (s *Source) outside(t *image.Task) (err error) {
	if t.Rlimits, err = Limits(s.Pid); err != nil {
		return err
	}
	if t.Timers, err = posixTimers(s.Pid, s.InnerTid); err != nil {
		return err
	}
	if t.OOMScoreAdj, err = OOMScoreAdj(s.Pid); err != nil {
		return err
	}
	if t.CoredumpFilter, err = coredumpFilter(s.Pid); err != nil {
		return err
	}
	if !s.continued() {
		t.Stopped = int32(s.Stopped)
	}
	t.LoginUID, err = LoginUID(s.Pid)
	return err
}

func procNumber(pid int, name string, base int) (int64, error) {
	b, err := readProc(pid, name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), base, 64)
}

// thread reads one thread; the leader's batch asks for the process as well.
func (a *Asked) thread(i int) error {
	s, st := a.Source, a.State
	t, rec := s.Threads[i], &st.Task.Threads[i]
	if err := s.registers(i, rec); err != nil {
		return err
	}
	if err := s.threadOutside(i, rec); err != nil {
		return err
	}
	status := s.Status[i]
	unsaved, err := outsideUnsaved(t, status)
	if err != nil {
		return err
	}
	kept, known := s.kept(t.Tid, rec)
	if like := a.samples[kept.Alike]; known && like != nil && status.sameRights(like.status) {
		a.answers[i] = func() error {
			like.answerFor(rec, &kept)
			return s.unsaved(t, rec, append(unsaved, like.found...))
		}
		return nil
	}
	self := &sample{rec: rec, status: status}
	if known {
		a.samples[kept.Alike] = self
	}
	b := &tracee.Batch{}
	done := []func(){askThread(b, rec)}
	more := askUnsaved(b)
	job := &tracee.Job{Live: s.Live, Thread: t, Batch: b, Known: &tracee.Known{
		Tgid: uint32(Innermost(status.NStgid)), Tid: uint32(Innermost(status.NSpid)), Caught: status.SigCgt, Seccomp: status.Seccomp,
	}}
	if i == s.asker() {
		done = append(done, askProcess(b, st))
		if len(s.Also) > 0 {
			done = append(done, s.Also[0](b))
		}
		job.Ran = func() { st.asked = monotonicNow() }
	}
	a.Jobs = append(a.Jobs, job)
	a.answers[i] = func() error {
		if job.Err != nil {
			return fail.On(fmt.Sprintf("thread %d", rec.Tid), noRoom(job.Err))
		}
		for _, f := range done {
			f()
		}
		self.found = more()
		if err := s.unsaved(t, rec, append(unsaved, self.found...)); err != nil {
			return err
		}
		if i == s.asker() {
			return s.processAnswer(t, st)
		}
		return nil
	}
	return nil
}

// unsaved warns of what is not saved of a thread, and completes what it may not
// tell itself.
func (s *Source) unsaved(t *tracee.Thread, rec *image.Thread, found []string) (err error) {
	for _, what := range found {
		s.Warn("%s (thread %d)", what, rec.Tid)
	}
	if s.MayFlush && !rec.Controls.IOFlusher {
		rec.Controls.IOFlusher, err = unseenFlusher(t.Tid)
	}
	return err
}

// kept is what the kernel keeps of a thread, unless the thread has to be asked all
// the same: it has a memory policy of its own, or cannot make calls for us, which
// is for its batch to say.
func (s *Source) kept(tid int, rec *image.Thread) (k bpf.Thread, ok bool) {
	if s.Kept == nil || s.Narrow || rec.Controls.Dispatch != nil {
		return k, false
	}
	regs, err := tracee.DecodeRegs(rec.Regs)
	if err != nil || !regs.In64BitMode() {
		return k, false
	}
	k, ok = s.Kept(tid)
	return k, ok && !k.HasPolicy
}

// answerFor completes the record of a thread that is like the sample.
func (like *sample) answerFor(rec *image.Thread, kept *bpf.Thread) {
	outside := rec.Controls
	rec.Controls = like.rec.Controls
	rec.Controls.Dispatch, rec.Controls.TLS, rec.Controls.TimerSlack = outside.Dispatch, outside.TLS, 0
	if rec.TimerSlack != 0 {
		rec.Controls.TimerSlack = kept.DefaultSlack
	}
	rec.Creds.Securebits = like.rec.Creds.Securebits
	rec.TidAddress, rec.PDeathSig = kept.TidAddress, kept.DeathSig
	rec.AltStack = image.AltStack{SP: kept.StackSP, Flags: int32(kept.StackFlags), Size: kept.StackSize}
	if kept.StackSize == 0 {
		rec.AltStack.Flags |= ssDisable
	}
}

// processAnswer asks what the process's first answers call for.
func (s *Source) processAnswer(t *tracee.Thread, st *State) (err error) {
	if s.Narrow {
		markNarrow(st.Sighand)
	}
	if st.hasLDT() {
		if st.Task.LDT, err = readLDT(s.Live, t); err != nil {
			return err
		}
	}
	if st.hasJobs() {
		st.Untold, err = s.untold()
	}
	return err
}

// noRoom says what to do for a thread that has no memory left for its batch.
func noRoom(err error) error {
	var none *tracee.NoRoomError
	if !errors.As(err, &none) {
		return err
	}
	return &fail.Error{
		Cause:  fmt.Errorf("no room for the %d bytes that its system calls take (RLIMIT_AS, RLIMIT_DATA, RLIMIT_MEMLOCK with mlockall, or vm.max_map_count): %w", none.Size, err),
		Remedy: "raise the limit for the time of the checkpoint (prlimit --pid)",
	}
}

// registers reads the cpu state.
func (s *Source) registers(i int, rec *image.Thread) error {
	t := s.Threads[i]
	r, err := t.Regs()
	if err != nil {
		return err
	}
	if rec.Restart, err = s.restartOf(t, &r); err != nil {
		return err
	}
	if r, err = t.ResumeRegs(r); err != nil {
		return err
	}
	rec.Regs = r.Encode()
	if rec.XState, err = t.XState(); err != nil {
		return err
	}
	rec.SigMask, err = t.SigMask()
	return err
}

func (s *Source) threadOutside(i int, rec *image.Thread) (err error) {
	t, status := s.Threads[i], s.Status[i]
	if rec.Comm, err = Comm(t.Tid); err != nil {
		return err
	}
	rec.Creds = Credentials(status, s.Maps)
	rec.SeccompMode = status.Seccomp
	if rec.Seccomp, err = seccompFilters(t, status.Seccomp); err != nil {
		return err
	}
	if err = status.Foreign(); err != nil {
		return err
	}
	rseq, err := t.Rseq()
	if err != nil {
		return fmt.Errorf("restartable sequence: %w", err)
	}
	if rseq.Addr != 0 {
		rec.Rseq = &image.Rseq{Addr: rseq.Addr, Size: rseq.Size, Sig: rseq.Signature}
	}
	if err := s.robustLists(t.Tid, rec); err != nil {
		return err
	}
	if slack, err := procNumber(t.Tid, "timerslack_ns", 10); err == nil {
		rec.TimerSlack = uint64(slack)
	}
	if err := outsideControls(t, &rec.Controls); err != nil {
		return err
	}
	return scheduling(t.Tid, rec, &s.Usual)
}

// askThread adds what only the thread itself can tell.
func askThread(b *tracee.Batch, rec *image.Thread) func() {
	tid := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_TID_ADDRESS), tid)
	death := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_PDEATHSIG), death)
	secure := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_SECUREBITS))
	stack := askAltStack(b)
	controls, policy := askControls(b, rec.TimerSlack), AskPolicy(b, 0)
	return func() {
		outside := rec.Controls
		rec.Controls = controls()
		rec.Controls.Dispatch, rec.Controls.TLS = outside.Dispatch, outside.TLS
		rec.Policy = policy()
		rec.TidAddress = binary.LittleEndian.Uint64(b.At(tid, 8))
		rec.PDeathSig = int32(binary.LittleEndian.Uint32(b.At(death, 4)))
		rec.Creds.Securebits = uint32(b.Calls[secure].Ret)
		rec.AltStack = stack()
	}
}

// askLockFuture adds the call that tells whether new memory is locked, which no
// file of /proc shows: the batch's own is such, and msync(2) is EBUSY if it is.
func askLockFuture(b *tracee.Batch) int {
	const page = 4096
	return b.Try(unix.SYS_MSYNC, b.Reserve(1).Page(), tracee.W(page), tracee.W(unix.MS_INVALIDATE))
}

// askProcess adds what only the process itself can tell.
func askProcess(b *tracee.Batch, st *State) func() {
	actions, intervals := askActions(b), askITimers(b)
	timers := askTimers(b, st.Task.Timers)
	reaper := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_CHILD_SUBREAPER), reaper)
	dumpable := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_DUMPABLE))
	brk := b.Add(unix.SYS_BRK, tracee.W(0))
	controls := askProcessControls(b, st.Task)
	st.hasLDT, st.hasJobs = askLDT(b), askJobs(b)
	future, barriers := askLockFuture(b), askMembarrier(b)
	return func() {
		st.Task.Membarrier = barriers()
		controls()
		st.LockFuture = b.Err(future) == unix.EBUSY
		st.Sighand, st.Task.ITimers = actions(), intervals()
		timers()
		st.Task.Subreaper = binary.LittleEndian.Uint32(b.At(reaper, 4)) != 0
		st.Task.Dumpable = uint32(b.Calls[dumpable].Ret)
		st.Brk = uint64(b.Calls[brk].Ret)
	}
}
