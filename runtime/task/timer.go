package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	itimers        = 3  // ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
	itimervalSize  = 32 // interval, value: seconds, microseconds
	itimerspecSize = 32 // interval, value: seconds, nanoseconds
	second         = 1e9

	// prTimerCreateRestoreIDs (Linux 6.15) makes timer_create(2) take the id
	// from where it would have put it.
	prTimerCreateRestoreIDs = 77

	sigevNone     = 1
	sigevThreadID = 4
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

// restoreITimers adds the calls that arm them with the time that was left. A
// periodic one with none left has expired, and goes on when its signal, which
// is pending, is delivered (kernel/signal.c, dequeue_signal). It is made to
// expire once more: a signal that is pending already is not queued again.
func restoreITimers(b *tracee.Batch, timers []image.ITimer) {
	for _, t := range timers {
		raw := append(unpair(t.Interval, 1e6), unpair(max(t.Value, 1), 1e6)...)
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

// posixTimers reads which timers a process has from /proc/PID/timers; the time
// left only the process itself can tell.
func posixTimers(pid int, inner func(host int) int) ([]image.PosixTimer, error) {
	b, err := readProc(pid, "timers")
	if err != nil {
		return nil, err
	}
	var out []image.PosixTimer
	for line := range bytes.Lines(b) {
		key, value, _ := strings.Cut(strings.TrimSpace(string(line)), ": ")
		if key == "ID" {
			id, _ := strconv.Atoi(value)
			out = append(out, image.PosixTimer{ID: int32(id)})
			continue
		}
		if len(out) == 0 {
			continue
		}
		if err := parseTimer(&out[len(out)-1], key, value, inner); err != nil {
			return nil, fail.On(fmt.Sprintf("timer %d", out[len(out)-1].ID), err)
		}
	}
	return out, nil
}

func parseTimer(t *image.PosixTimer, key, value string, inner func(host int) int) error {
	switch key {
	case "signal": // 60/00007ffd0a2b4c30
		sig, val, _ := strings.Cut(value, "/")
		n, _ := strconv.Atoi(sig)
		t.Signal = int32(n)
		t.Value, _ = strconv.ParseUint(val, 16, 64)
	case "notify": // signal/pid.2634, thread/tid.2635, none/pid.0
		how, who, _ := strings.Cut(value, "/")
		t.Notify = map[string]int32{"signal": 0, "none": sigevNone, "thread": 2}[how]
		if tid, ok := strings.CutPrefix(who, "tid."); ok {
			n, _ := strconv.Atoi(tid)
			t.Notify |= sigevThreadID
			t.Tid = int32(inner(n))
		}
	case "ClockID":
		clock, _ := strconv.Atoi(value)
		if clock < 0 {
			return fail.Refuse("", "it runs on another process's cpu clock", "delete the timer before the checkpoint")
		}
		t.Clock = int32(clock)
	}
	return nil
}

// askTimers adds the calls that read the time left on each timer.
func askTimers(b *tracee.Batch, timers []image.PosixTimer) func() {
	at := b.Reserve(itimerspecSize * len(timers))
	for i, t := range timers {
		b.Add(unix.SYS_TIMER_GETTIME, tracee.W(t.ID), at.Plus(itimerspecSize*i))
	}
	return func() {
		for i := range timers {
			raw := b.At(at.Plus(itimerspecSize*i), itimerspecSize)
			timers[i].Interval, timers[i].Left = pair(raw, second), pair(raw[16:], second)
		}
	}
}

// restoreTimers adds the calls that create and arm the timers again with their
// own ids. Threads that are to be notified must exist.
func restoreTimers(b *tracee.Batch, timers []image.PosixTimer) {
	if len(timers) == 0 {
		return
	}
	b.Add(unix.SYS_PRCTL, tracee.W(prTimerCreateRestoreIDs), tracee.W(1))
	for _, t := range timers {
		event := make([]byte, 64) // struct sigevent
		le := binary.LittleEndian
		le.PutUint64(event, t.Value)
		le.PutUint32(event[8:], uint32(t.Signal))
		le.PutUint32(event[12:], uint32(t.Notify))
		le.PutUint32(event[16:], uint32(t.Tid))
		id := b.Put(le.AppendUint32(nil, uint32(t.ID)))
		b.Add(unix.SYS_TIMER_CREATE, tracee.W(t.Clock), b.Put(event), id)
		if t.Left != 0 {
			spec := append(unpair(t.Interval, second), unpair(t.Left, second)...)
			b.Add(unix.SYS_TIMER_SETTIME, tracee.W(t.ID), tracee.W(0), b.Put(spec), tracee.W(0))
		}
	}
	b.Add(unix.SYS_PRCTL, tracee.W(prTimerCreateRestoreIDs), tracee.W(0))
}
