package task

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	itimers       = 3  // ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
	itimervalSize = 32 // interval, value: seconds, microseconds
	second        = 1e9
	micro         = 1000
)

// askITimers adds the calls that read the interval timers.
func askITimers(b *tracee.Batch) func() []image.ITimer {
	at := b.Reserve(itimers * itimervalSize)
	for which := range itimers {
		b.Add(unix.SYS_GETITIMER, tracee.W(which), at.Plus(which*itimervalSize))
	}
	return func() (out []image.ITimer) {
		for which := range itimers {
			raw := b.At(at.Plus(which*itimervalSize), itimervalSize)
			t := image.ITimer{Which: int32(which), Interval: pair(raw, 1e6), Value: pair(raw[16:], 1e6)}
			if t.Value != 0 || t.Interval != 0 {
				out = append(out, t)
			}
		}
		return out
	}
}

// settleITimers counts the time that was left from since before it was asked for,
// in line with the container's clocks, and sees to a timer that has expired in
// the time passed between that and the reading of the pending signals.
func settleITimers(t *image.Task, since, passed int64) {
	for i := range t.ITimers {
		it := &t.ITimers[i]
		switch {
		case it.Which != 0 || it.Value == 0: // ITIMER_REAL, the one that goes on by itself
		case it.Value*micro <= passed && slices.ContainsFunc(t.Pending, ofAlarm):
			it.Value = 0
		default:
			it.Value += since / micro
		}
	}
	t.ITimers = slices.DeleteFunc(t.ITimers, func(it image.ITimer) bool { return it.Value == 0 && it.Interval == 0 })
}

// ofAlarm reports the siginfo_t of a SIGALRM from the kernel.
func ofAlarm(info []byte) bool {
	const siKernel = 0x80
	le := binary.LittleEndian
	return unix.Signal(le.Uint32(info)) == unix.SIGALRM && le.Uint32(info[8:]) == siKernel
}

// restoreITimers adds the calls that arm them with the time that was left. A
// periodic one with none left has expired, and goes on when its signal, which
// is pending, is delivered (kernel/signal.c, dequeue_signal). It is made to
// expire once more: a signal that is pending already is not queued again.
func restoreITimers(b *tracee.Batch, timers []image.ITimer, c *Clocks) {
	for _, t := range timers {
		value := max(t.Value, 1)
		if t.Which == 0 { // ITIMER_REAL; the others begin anew with the cpu time
			value = (c.left(t.Value*micro) + micro - 1) / micro
		}
		raw := append(unpair(t.Interval, 1e6), unpair(value, 1e6)...)
		b.Add(unix.SYS_SETITIMER, tracee.W(t.Which), b.Put(raw), tracee.W(0))
	}
}

// pair reads seconds and a fraction into one number of fractions.
func pair(b []byte, unit int64) int64 {
	return int64(binary.LittleEndian.Uint64(b))*unit + int64(binary.LittleEndian.Uint64(b[8:]))
}

func unpair(v, unit int64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(v/unit))
	return binary.LittleEndian.AppendUint64(b, uint64(v%unit))
}
