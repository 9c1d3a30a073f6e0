package task

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	signals       = 64 // _NSIG
	sigactionSize = 32 // the kernel's: handler, flags, restorer, mask
	sigsetSize    = 8
	sigDfl        = 0
	sigIgn        = 1
)

// settable reports whether a signal has an action that a process may set.
func settable(sig int) bool {
	return sig != int(unix.SIGKILL) && sig != int(unix.SIGSTOP)
}

// askActions adds the calls that read every signal action, and returns what
// makes a record of their results.
func askActions(b *tracee.Batch) func() *image.Sighand {
	table := b.Reserve(sigactionSize * (signals + 1))
	for sig := 1; sig <= signals; sig++ {
		if settable(sig) {
			b.Add(unix.SYS_RT_SIGACTION, tracee.W(sig), tracee.W(0), table.Plus(sigactionSize*sig), tracee.W(sigsetSize))
		}
	}
	return func() *image.Sighand {
		h := &image.Sighand{}
		raw := b.At(table, sigactionSize*(signals+1))
		for sig := 1; sig <= signals; sig++ {
			a := decodeAction(int32(sig), raw[sigactionSize*sig:])
			if a != (image.SigAction{Signal: int32(sig)}) {
				h.Actions = append(h.Actions, a)
			}
		}
		return h
	}
}

func decodeAction(sig int32, b []byte) image.SigAction {
	le := binary.LittleEndian
	return image.SigAction{
		Signal: sig, Handler: le.Uint64(b), Flags: le.Uint64(b[8:]),
		Restorer: le.Uint64(b[16:]), Mask: le.Uint64(b[24:]),
	}
}

func encodeAction(a image.SigAction) []byte {
	var b []byte
	for _, v := range []uint64{a.Handler, a.Flags, a.Restorer, a.Mask} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// trapAction is the action for SIGTRAP, which a stub needs for itself until
// its very last calls.
func trapAction(h *image.Sighand) image.SigAction {
	for _, a := range h.Actions {
		if a.Signal == int32(unix.SIGTRAP) {
			return a
		}
	}
	return image.SigAction{}
}

// setAction adds the call that sets a signal's action. That of 32-bit code is
// needed for the handler to get such code's frame.
func setAction(b *tracee.Batch, a image.SigAction) {
	if a.Flags&narrowABI != 0 {
		b.AddNarrow(narrowSigaction, tracee.W(a.Signal), b.Put(encodeNarrowAction(a)), tracee.W(0), tracee.W(sigsetSize))
		return
	}
	b.Add(unix.SYS_RT_SIGACTION, tracee.W(a.Signal), b.Put(encodeAction(a)), tracee.W(0), tracee.W(sigsetSize))
}

// restoreActions adds the calls that set every signal action but SIGTRAP's.
// Stubs grow with SIGCHLD ignored (so that ghosts need no reaping), and a
// zombie made since has left a SIGCHLD pending that the real process has long
// seen: ignoring a signal drops it from the queues, then the real action comes.
func restoreActions(b *tracee.Batch, h *image.Sighand) {
	b.Add(unix.SYS_RT_SIGACTION, tracee.W(unix.SIGCHLD), b.Put(encodeAction(image.SigAction{Handler: sigIgn})), tracee.W(0), tracee.W(sigsetSize))
	actions := map[int32]image.SigAction{int32(unix.SIGCHLD): {Signal: int32(unix.SIGCHLD)}}
	for _, a := range h.Actions {
		actions[a.Signal] = a
	}
	for sig := 1; sig <= signals; sig++ {
		a, ok := actions[int32(sig)]
		if ok && settable(sig) && sig != int(unix.SIGTRAP) {
			setAction(b, a)
		}
	}
}

// ResetSignals adds the calls that give a stub every signal's default action
// and no pending signal. It was another program just before: what that ignored
// (or we do) is inherited through execve(2), and so are signals sent to it, such
// as the SIGURG with which Go programs interrupt themselves. Ignoring a signal
// drops it from the queues.
func ResetSignals(b *tracee.Batch) {
	for _, handler := range []uint64{sigIgn, sigDfl} {
		action := b.Put(encodeAction(image.SigAction{Handler: handler}))
		for sig := 1; sig <= signals; sig++ {
			if settable(sig) && sig != int(unix.SIGTRAP) {
				b.Add(unix.SYS_RT_SIGACTION, tracee.W(sig), action, tracee.W(0), tracee.W(sigsetSize))
			}
		}
	}
}

// ChildSignals adds the call that makes a stub ignore SIGCHLD, so that its
// children vanish when they exit, or keep them as zombies.
func ChildSignals(b *tracee.Batch, ignore bool) {
	a := image.SigAction{Handler: sigDfl}
	if ignore {
		a.Handler = sigIgn
	}
	b.Add(unix.SYS_RT_SIGACTION, tracee.W(unix.SIGCHLD), b.Put(encodeAction(a)), tracee.W(0), tracee.W(sigsetSize))
}

const (
	altStackSize = 24 // stack_t
	ssOnStack    = 1
	ssDisable    = 2
)

// askAltStack adds the call that reads the thread's alternate signal stack.
func askAltStack(b *tracee.Batch) func() image.AltStack {
	at := b.Reserve(altStackSize)
	b.Add(unix.SYS_SIGALTSTACK, tracee.W(0), at)
	return func() image.AltStack {
		raw, le := b.At(at, altStackSize), binary.LittleEndian
		return image.AltStack{SP: le.Uint64(raw), Flags: int32(le.Uint32(raw[8:])), Size: le.Uint64(raw[16:])}
	}
}

// restoreAltStack adds the call that sets it. SS_ONSTACK is not state: the
// kernel finds out from the stack pointer.
func restoreAltStack(b *tracee.Batch, s image.AltStack) {
	raw := make([]byte, altStackSize)
	le := binary.LittleEndian
	le.PutUint64(raw, s.SP)
	le.PutUint32(raw[8:], uint32(s.Flags&^ssOnStack))
	le.PutUint64(raw[16:], s.Size)
	b.Add(unix.SYS_SIGALTSTACK, b.Put(raw), tracee.W(0))
}

// restorePending adds the calls that queue signals again, in order. A task may
// send itself any siginfo (rt_sigqueueinfo(2)). The signal of a timer is left to
// expired, SIGSTOP to SendStops, SIGTRAP to QueueTraps.
func restorePending(b *tracee.Batch, t *image.Task, tid int32, queue [][]byte, expired func(timer int32)) {
	for _, info := range queue {
		if id, ok := ofTimer(info, t.Timers); ok {
			expired(id)
			continue
		}
		sig := binary.LittleEndian.Uint32(info)
		if sig == uint32(unix.SIGSTOP) || sig == uint32(unix.SIGTRAP) {
			continue
		}
		if tid == 0 {
			b.Add(unix.SYS_RT_SIGQUEUEINFO, tracee.W(t.Pid), tracee.W(sig), b.Put(info))
		} else {
			b.Add(unix.SYS_RT_TGSIGQUEUEINFO, tracee.W(t.Pid), tracee.W(tid), tracee.W(sig), b.Put(info))
		}
	}
}

// QueueTraps queues the SIGTRAPs that wait for thread i, and after the last thread's
// those that wait for its process. A stub needs the signal for itself as long as it
// runs batches, and its action, which drops what is queued if it is to be ignored:
// so this comes after RestoreTrap, by calls that are stepped over.
func QueueTraps(s *tracee.Stub, t *image.Task, i int, last bool) error {
	thread, process := traps(t.Threads[i].Pending), [][]byte(nil)
	if last {
		process = traps(t.Pending)
	}
	if len(thread)+len(process) == 0 {
		return nil
	}
	if err := s.SetSigMask(math.MaxUint64); err != nil {
		return err
	}
	at := s.Scratch() - tracee.SigInfoSize
	queue := func(infos [][]byte, nr uintptr, to ...uint64) error {
		for _, info := range infos {
			if err := s.Write(at, info); err != nil {
				return err
			}
			if _, err := s.Step(nr, append(to, uint64(unix.SIGTRAP), at)...); err != nil {
				return fmt.Errorf("pending SIGTRAP: %w", err)
			}
		}
		return nil
	}
	pid := uint64(t.Pid)
	if err := queue(thread, unix.SYS_RT_TGSIGQUEUEINFO, pid, uint64(t.Threads[i].Tid)); err != nil {
		return err
	}
	return queue(process, unix.SYS_RT_SIGQUEUEINFO, pid)
}

// trapsInVfork refuses them where a thread waits in vfork(2): it calls that again at
// the very last, as a stub, when they would be queued.
func (s *Source) trapsInVfork(t *image.Task) error {
	pending := len(traps(t.Pending))
	for i := range t.Threads {
		pending += len(traps(t.Threads[i].Pending))
	}
	if pending > 0 && slices.ContainsFunc(s.Waiting, func(w *Waiting) bool { return w != nil }) {
		return fail.Refuse("pending SIGTRAP", "a thread of its process waits in vfork(2)", "try again when that has returned")
	}
	return nil
}

// traps picks the SIGTRAPs out of a queue.
func traps(queue [][]byte) (out [][]byte) {
	for _, info := range queue {
		if binary.LittleEndian.Uint32(info) == uint32(unix.SIGTRAP) {
			out = append(out, info)
		}
	}
	return out
}

// readPending reads the signals that wait for a process and for each of its
// threads, in order. One that came when the queue was full (RLIMIT_SIGPENDING)
// has no siginfo: it is pending all the same, and gets what the kernel would
// deliver then, SI_USER from nobody (kernel/signal.c, collect_signal).
func (s *Source) readPending(st *State) error {
	t := st.Task
	st.queued = make([]int, len(s.Threads)+1)
	for i, th := range s.Threads {
		if th == nil {
			continue // it has none, or is refused
		}
		queue, err := th.PendingSignals(false, 0)
		if err != nil {
			return err
		}
		st.queued[i] = len(queue)
		t.Threads[i].Pending = complete(queue, s.Status[i].SigPnd)
	}
	queue, err := s.Threads[s.asker()].PendingSignals(true, 0)
	st.queued[len(s.Threads)] = len(queue)
	t.Pending = complete(queue, s.Status[0].ShdPnd)
	return err
}

// LateSignals reads what somebody has sent to a stopped process since its state
// was collected. Signals of its own timers are not among it: the timers have the
// time that was left then.
func (st *State) LateSignals(threads []*tracee.Thread) (all []image.Late, err error) {
	asker := slices.IndexFunc(threads, func(t *tracee.Thread) bool { return t != nil })
	if err := st.lateWaiting(threads, asker < 0); err != nil {
		return nil, err
	}
	for i, seen := range st.queued {
		l := image.Late{Pid: st.Task.Pid}
		var th *tracee.Thread
		shared := i == len(threads)
		if !shared {
			th, l.Tid = threads[i], st.Task.Threads[i].Tid
		} else if asker >= 0 {
			th = threads[asker]
		}
		if th == nil {
			continue
		}
		queue, err := th.PendingSignals(shared, seen)
		if err != nil {
			return nil, err
		}
		for _, info := range queue {
			if _, timer := ofTimer(info, st.Task.Timers); timer || ofAlarm(info) {
				continue
			}
			l.Pending = append(l.Pending, info)
		}
		if len(l.Pending) > 0 {
			all = append(all, l)
		}
	}
	return all, nil
}

func complete(queue [][]byte, pending uint64) [][]byte {
	for _, info := range queue {
		pending &^= 1 << (binary.LittleEndian.Uint32(info) - 1)
	}
	for sig := range uint32(signals) {
		if pending&(1<<sig) != 0 {
			queue = append(queue, binary.LittleEndian.AppendUint32(make([]byte, 0, tracee.SigInfoSize), sig+1)[:tracee.SigInfoSize])
		}
	}
	return queue
}
