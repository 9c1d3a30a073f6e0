package task

import (
	"encoding/binary"
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
	Threads []*tracee.Thread // leader first
	Status  []*Status        // of each thread
	Live    *tracee.Live
	Maps    IDMaps
	// InnerTid translates a host tid of the container.
	InnerTid func(host int) int
	// Now is CLOCK_MONOTONIC, outside, at the moment of the record of the
	// container's clocks.
	Now int64
	// Block reads a thread's restart block out of the kernel, where it can.
	Block func(tid int) (bpf.RestartBlock, bool)
	// Warn notes what could not be found out.
	Warn func(format string, args ...any)
}

// State is what Collect found.
type State struct {
	Task    *image.Task
	Sighand *image.Sighand
	Brk     uint64 // the end of the heap, which only the process knows

	odd error
}

const statExitSignal = 38 // field of /proc/PID/stat

// Collect reads everything a process and its threads own: what can be read
// from outside, and one batch in each thread for the rest.
func (s *Source) Collect() (*State, error) {
	st := &State{Task: &image.Task{
		Pid:        int32(s.Inner),
		ExitSignal: int32(s.Stat.Field(statExitSignal)),
	}}
	if err := s.outside(st.Task); err != nil {
		return nil, err
	}
	st.Task.Threads = make([]image.Thread, len(s.Threads))
	for i := range s.Threads {
		if err := s.thread(i, st); err != nil {
			return nil, err
		}
	}
	return st, nil
}

// outside reads what /proc and system calls tell of the process.
func (s *Source) outside(t *image.Task) (err error) {
	if t.Rlimits, err = resourceLimits(s.Pid); err != nil {
		return err
	}
	if t.Timers, err = posixTimers(s.Pid, s.InnerTid); err != nil {
		return err
	}
	if t.Pending, err = s.Threads[0].PendingSignals(true); err != nil {
		return err
	}
	if t.OOMScoreAdj, err = OOMScoreAdj(s.Pid); err != nil {
		return err
	}
	if p, err := procNumber(s.Pid, "personality", 16); err == nil {
		t.Personality = uint32(p)
	}
	return nil
}

func procNumber(pid int, name string, base int) (int64, error) {
	b, err := readProc(pid, name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), base, 64)
}

// thread reads one thread; the leader's batch asks for the process as well.
func (s *Source) thread(i int, st *State) error {
	t, rec := s.Threads[i], &st.Task.Threads[i]
	rec.Tid = int32(Innermost(s.Status[i].NSpid))
	if err := s.registers(i, rec); err != nil {
		return err
	}
	if err := s.threadOutside(i, rec); err != nil {
		return err
	}
	var b tracee.Batch
	done := []func(){askThread(&b, rec)}
	if i == 0 {
		done = append(done, askProcess(&b, st))
	}
	if err := s.Live.Run(t, &b); err != nil {
		return fail.On(fmt.Sprintf("thread %d", rec.Tid), err)
	}
	for _, f := range done {
		f()
	}
	return st.odd
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
	rec.Creds = credentials(status, s.Maps)
	rec.SeccompMode = status.Seccomp
	if rec.Seccomp, err = seccompFilters(t, status.Seccomp); err != nil {
		return err
	}
	if rec.Pending, err = t.PendingSignals(false); err != nil {
		return err
	}
	if err = queueable(status.SigPnd | status.ShdPnd); err != nil {
		return err
	}
	rseq, err := t.Rseq()
	if err != nil {
		return fmt.Errorf("restartable sequence: %w", err)
	}
	if rseq.Addr != 0 {
		rec.Rseq = &image.Rseq{Addr: rseq.Addr, Size: rseq.Size, Sig: rseq.Signature}
	}
	if rec.RobustHead, rec.RobustLen, err = robustList(t.Tid); err != nil {
		return err
	}
	if slack, err := procNumber(t.Tid, "timerslack_ns", 10); err == nil {
		rec.TimerSlack = uint64(slack)
	}
	return scheduling(t.Tid, rec)
}

// askThread adds what only the thread itself can tell.
func askThread(b *tracee.Batch, rec *image.Thread) func() {
	tid := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_TID_ADDRESS), tid)
	death := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_PDEATHSIG), death)
	secure := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_SECUREBITS))
	stack := askAltStack(b)
	return func() {
		rec.TidAddress = binary.LittleEndian.Uint64(b.At(tid, 8))
		rec.PDeathSig = int32(binary.LittleEndian.Uint32(b.At(death, 4)))
		rec.Creds.Securebits = uint32(b.Calls[secure].Ret)
		rec.AltStack = stack()
	}
}

// askProcess adds what only the process itself can tell.
func askProcess(b *tracee.Batch, st *State) func() {
	actions, intervals := askActions(b), askITimers(b)
	timers := askTimers(b, st.Task.Timers)
	reaper := b.Reserve(8)
	b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_CHILD_SUBREAPER), reaper)
	dumpable := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_DUMPABLE))
	thp := b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_GET_THP_DISABLE))
	brk := b.Add(unix.SYS_BRK, tracee.W(0))
	odd := askOdd(b)
	return func() {
		st.odd = odd()
		st.Sighand, st.Task.ITimers = actions(), intervals()
		timers()
		st.Task.Subreaper = binary.LittleEndian.Uint32(b.At(reaper, 4)) != 0
		st.Task.Dumpable = uint32(b.Calls[dumpable].Ret)
		st.Task.THPDisable = b.Calls[thp].Ret != 0
		st.Brk = uint64(b.Calls[brk].Ret)
	}
}
