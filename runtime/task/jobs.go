package task

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A stop by job control is a state of the process; that its parent has been
// told of it, or that it was continued, is another one, which the parent alone
// can ask for: wait(2) tells of each only once.

const (
	siginfoSize = 128
	siPid       = 16 // in siginfo_t, as waitid(2) fills it
	siCode      = 8

	waitJobs = unix.WSTOPPED | unix.WCONTINUED | unix.WNOHANG | unix.WNOWAIT | unix.WALL
)

// askJobs adds the call that tells whether wait(2) has anything to tell of the
// process's children besides their ends, and takes nothing away.
func askJobs(b *tracee.Batch) func() bool {
	info := b.Reserve(siginfoSize)
	i := b.Try(unix.SYS_WAITID, tracee.W(unix.P_ALL), tracee.W(0), info, tracee.W(waitJobs), tracee.W(0))
	return func() bool {
		return b.Err(i) == nil && binary.LittleEndian.Uint32(b.At(info, siginfoSize)[siPid:]) != 0
	}
}

// untold is what wait(2) has yet to tell of each child: CLD_STOPPED or CLD_CONTINUED.
func (s *Source) untold() (map[int32]int32, error) {
	var b tracee.Batch
	infos := make([]tracee.Word, len(s.Children))
	for i, pid := range s.Children {
		infos[i] = b.Reserve(siginfoSize)
		b.Try(unix.SYS_WAITID, tracee.W(unix.P_PID), tracee.W(pid), infos[i], tracee.W(waitJobs), tracee.W(0))
	}
	if err := s.Live.Run(s.Threads[s.asker()], &b); err != nil {
		return nil, err
	}
	all := map[int32]int32{}
	for i, pid := range s.Children {
		info := b.At(infos[i], siginfoSize)
		if b.Err(i) == nil && binary.LittleEndian.Uint32(info[siPid:]) != 0 {
			all[pid] = int32(binary.LittleEndian.Uint32(info[siCode:]))
		}
	}
	return all, nil
}

// continued reports a process that somebody has sent a SIGCONT since we stopped
// it: that has ended its group stop, and what remains is the signal.
func (s *Source) continued() bool {
	pending := s.Status[0].ShdPnd
	for _, st := range s.Status {
		pending |= st.SigPnd
	}
	return pending&(1<<(unix.SIGCONT-1)) != 0
}

// RestoreJob stops a stub, single-threaded yet, as its process was, and makes
// wait(2) tell what it had to tell of it: parent is the stub that it would tell
// it to, and which knows it by pid, nil if that is outside the container. Exact
// is false if it had to be another signal.
func RestoreJob(s, parent *tracee.Stub, pid int32, t *image.Task) (exact bool, err error) {
	if t.Stopped == 0 && t.Untold == 0 {
		return true, nil
	}
	sig := unix.SIGSTOP
	if t.Stopped != 0 {
		sig = unix.Signal(t.Stopped)
	}
	if exact, err = s.Stop(sig); err != nil {
		return exact, err
	}
	switch {
	case t.Untold == image.CldContinued:
		if err := s.Continue(); err != nil {
			return exact, err
		}
		var b tracee.Batch
		dropSignal(&b, unix.SIGCONT)
		_, err = s.Run(&b)
	case t.Untold == 0 && parent != nil:
		var b tracee.Batch
		b.Add(unix.SYS_WAITID, tracee.W(unix.P_PID), tracee.W(pid), tracee.W(0), tracee.W(unix.WSTOPPED|unix.WALL), tracee.W(0))
		_, err = parent.Run(&b)
	}
	return exact, err
}

// AwaitJobStops waits, for a moment, until threads of stopped processes that
// have been detached are back in their stops. They get there without running.
func AwaitJobStops(tids []int) {
	const patience = 100 * time.Millisecond
	for begin := time.Now(); len(tids) > 0 && time.Since(begin) < patience; {
		tids = slices.DeleteFunc(tids, func(tid int) bool {
			s, err := ReadStatus(tid)
			return err != nil || s.State != 'R'
		})
		if len(tids) > 0 {
			time.Sleep(20 * time.Microsecond)
		}
	}
}

// dropSignal adds the calls that take a pending signal away.
func dropSignal(b *tracee.Batch, sig unix.Signal) {
	for _, handler := range []uint64{sigIgn, sigDfl} {
		b.Add(unix.SYS_RT_SIGACTION, tracee.W(sig), b.Put(encodeAction(image.SigAction{Handler: handler})), tracee.W(0), tracee.W(sigsetSize))
	}
}

// stopPending reports a SIGSTOP among queued signals. It cannot be blocked, so
// that a stub cannot send it to itself.
func stopPending(queue [][]byte) bool {
	for _, info := range queue {
		if binary.LittleEndian.Uint32(info) == uint32(unix.SIGSTOP) {
			return true
		}
	}
	return false
}

// SendStops sends a process, stopped by us, the SIGSTOPs that were pending. They
// are taken when it runs. To one that is stopped already they mean nothing: the
// SIGCONT that it waits for takes them away.
func SendStops(threads []*tracee.Stub, t *image.Task) error {
	if t.Stopped != 0 {
		return nil
	}
	if stopPending(t.Pending) {
		if err := unix.Kill(threads[0].Pid, unix.SIGSTOP); err != nil {
			return fmt.Errorf("pending SIGSTOP: %w", err)
		}
	}
	living := t.Threads[len(t.Threads)-len(threads):]
	for i := range living {
		if stopPending(living[i].Pending) {
			if err := unix.Tgkill(threads[i].Pid, threads[i].Tid, unix.SIGSTOP); err != nil {
				return fmt.Errorf("pending SIGSTOP: %w", err)
			}
		}
	}
	return nil
}
