package task

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A thread that waits in vfork(2) for its child to execute another program or to
// exit can neither be stopped nor make calls for us. The kernel tells of it what
// /proc does not by BPF; the rest its child tells, which shares its memory and
// has inherited what a thread can set for itself.

// WaitsInVfork reports a thread that waits so.
func WaitsInVfork(tid int) bool {
	wchan, err := readProc(tid, "wchan")
	if err != nil || string(wchan) != "kernel_clone" && string(wchan) != "wait_for_vfork_done" {
		return false
	}
	s, err := ReadStatus(tid)
	return err == nil && s.State != 'R'
}

// Waiting is such a thread, and what was read of its child.
type Waiting struct {
	bpf.VforkParent
	Child *image.Task
}

// asker is the first thread that makes calls for us, or -1.
func (s *Source) asker() int {
	for i, t := range s.Threads {
		if t != nil {
			return i
		}
	}
	return -1
}

// waiting reads a thread that waits in vfork.
func (s *Source) waiting(i int, w *Waiting, rec *image.Thread) (err error) {
	status, child := s.Status[i], &w.Child.Threads[0]
	tid := s.Tids[i]
	if status.SigPnd != 0 {
		return fail.Refuse(fmt.Sprintf("thread %d", rec.Tid), "it waits in vfork(2) and signals are pending for it, which nobody can read", "try again when its child has called execve(2)")
	}
	if rec.Comm, err = Comm(tid); err != nil {
		return err
	}
	regs, err := tracee.KernelRegs(w.Regs, w.FSBase, w.GSBase, w.Selectors)
	if err != nil {
		return err
	}
	regs.SetResult(uint64(w.Child.Pid))
	rec.Regs = regs.Encode()
	if rec.XState, err = standardXState(child.XState, w.FPU, w.XFeatures, w.PKRU); err != nil {
		return err
	}
	rec.SigMask = status.SigBlk
	rec.Creds = Credentials(status, s.Maps)
	rec.Creds.Securebits = w.Securebits
	rec.SeccompMode = status.Seccomp
	rec.Seccomp = child.Seccomp[:min(status.Filters, len(child.Seccomp))]
	if err := status.Foreign(); err != nil {
		return err
	}
	if w.Rseq != 0 {
		rec.Rseq = &image.Rseq{Addr: w.Rseq, Size: w.RseqSize, Sig: w.RseqSig}
	}
	if err := s.robustLists(tid, rec); err != nil {
		return err
	}
	if slack, err := procNumber(tid, "timerslack_ns", 10); err == nil {
		rec.TimerSlack = uint64(slack)
	}
	rec.Controls, rec.Policy = child.Controls, child.Policy
	rec.Controls.Dispatch, rec.Controls.TimerSlack = nil, w.Slack
	rec.TidAddress, rec.PDeathSig = w.TidAddress, w.DeathSig
	rec.AltStack = image.AltStack{SP: w.StackSP, Flags: int32(w.StackFlags), Size: w.StackSize}
	rec.Vfork = w.Child.Pid
	return scheduling(tid, rec, &s.Usual)
}

// processOf reads a process of which no thread makes calls.
func (s *Source) processOf(w *Waiting, st *State) error {
	if s.Status[0].ShdPnd != 0 || w.Timers || len(st.Task.Timers) > 0 {
		return fail.Refuse("", "it waits in vfork(2), and has timers or pending signals that nobody can read", "try again when its child has called execve(2)")
	}
	st.Sighand = &image.Sighand{}
	for sig := 1; sig <= signals; sig++ {
		if a := decodeAction(int32(sig), w.Actions[sigactionSize*(sig-1):]); settable(sig) && a != (image.SigAction{Signal: int32(sig)}) {
			st.Sighand.Actions = append(st.Sighand.Actions, a)
		}
	}
	t, c := st.Task, w.Child
	t.Subreaper, t.Dumpable = w.Subreaper, c.Dumpable
	t.THPDisable, t.MDWE, t.MemoryMerge, t.XFeatures, t.LDT = c.THPDisable, c.MDWE, c.MemoryMerge, c.XFeatures, c.LDT
	return nil
}

// lateWaiting refuses signals that have come for a thread that waits in vfork, or
// for a process of such threads.
func (st *State) lateWaiting(threads []*tracee.Thread, all bool) error {
	for i, th := range threads {
		if th != nil {
			continue
		}
		s, err := ReadStatus(st.tids[i])
		if err != nil {
			return err
		}
		if s.SigPnd != 0 || all && s.ShdPnd != 0 {
			return fail.Refuse(fmt.Sprintf("thread %d", st.Task.Threads[i].Tid), "it waits in vfork(2), and a signal has come that nobody can read", "try again")
		}
	}
	return nil
}

// CloneVforked makes a stub clone the child that its thread is to wait for, as
// its last act: the thread stays in the stop behind it, and goes on to wait when
// it is let go. It returns the child's host pid.
func CloneVforked(s *tracee.Stub, exitSignal int32, share uint64) (int, error) {
	args := make([]byte, cloneArgsSize)
	binary.LittleEndian.PutUint64(args, unix.CLONE_VM|unix.CLONE_VFORK|share)
	binary.LittleEndian.PutUint64(args[32:], uint64(exitSignal))
	at := s.Scratch() - cloneArgsSize
	if err := s.Write(at, args); err != nil {
		return 0, err
	}
	child, err := s.Vfork(unix.SYS_CLONE3, at, cloneArgsSize)
	if err != nil {
		err = fmt.Errorf("vfork: %w", err)
	} else if child == 0 {
		err = errors.New("vfork made no child")
	}
	return child, err
}
