package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	itimerspecSize = 32 // interval, value: seconds, nanoseconds
	sigeventSize   = 64

	// prTimerCreateRestoreIDs (Linux 6.15) makes timer_create(2) take the id
	// from where it would have put it.
	prTimerCreateRestoreIDs = 77

	sigevNone     = 1
	sigevThreadID = 4
	timerAbstime  = 1

	siTimer = -2 // SI_TIMER in si_code
)

// A cpu clock is named by a negative number: the id of a process or thread,
// inverted, above three bits of kind; id 0 is the caller
// (include/linux/posix-timers.h).
const (
	cpuClockBits   = 3
	perThreadClock = 4
)

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
			if t.Tid == 0 {
				return fail.Refuse("", "the thread that it notifies has ended", "delete the timer before the checkpoint")
			}
		}
	case "ClockID":
		clock, _ := strconv.Atoi(value)
		t.Clock = int32(clock)
	}
	return nil
}

// HasTimers reports a process with timers of timer_create(2).
func HasTimers(pid int) bool {
	b, err := readProc(pid, "timers")
	return err == nil && len(b) > 0
}

// askTimers adds the calls that read the time left on each timer. They also
// make the kernel move a periodic timer whose signal is pending on to its next
// expiry and count those it has missed.
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

// settleTimers completes the timers with what only the kernel knows, and brings
// them in line with the pending signals, which were read later: timers go on
// while a process is stopped. asked is when the time left was, read when the
// signals were.
func (s *Source) settleTimers(t *image.Task, asked, read int64) error {
	if len(t.Timers) == 0 {
		return nil
	}
	known, ok := s.Timers()
	signals := queuedTimers(t)
	for i := range t.Timers {
		pt := &t.Timers[i]
		k, told := known[pt.ID]
		told = told && ok
		var err error
		if pt.Clock < 0 {
			err = s.settleCPUTimer(pt, &k, told)
		} else {
			s.settleTimer(pt, &k, told, signals[pt.ID], read-asked)
			if pt.Left != 0 {
				pt.Left += asked - s.Now
			}
		}
		if err != nil {
			return fail.On(fmt.Sprintf("timer %d", pt.ID), err)
		}
		if pt.Interval == 0 && signals[pt.ID] {
			pt.Left = 0
		}
	}
	return nil
}

// settleTimer finds a wall-clock time that the timer is set to, and how many
// expiries its pending signal stands for.
func (s *Source) settleTimer(pt *image.PosixTimer, k *bpf.Timer, told, pending bool, passed int64) {
	expired := int64(0)
	if pending && pt.Interval > 0 {
		for ; pt.Left <= passed; pt.Left += pt.Interval { // it has come since it was asked
			k.Expires += pt.Interval
			expired++
		}
		if told {
			pt.Overrun = max(expired+k.Overrun, 0)
		}
	}
	if pt.Clock != unix.CLOCK_REALTIME && pt.Clock != unix.CLOCK_TAI || pt.Left == 0 {
		return
	}
	switch {
	case !told:
		s.Warn("whether timer %d of process %d is set to a point in time or to a time from now on is not known; it keeps the time that was left", pt.ID, s.Inner)
	case k.Base == pt.Clock:
		pt.Deadline = k.Expires
	}
}

// settleCPUTimer finds whose cpu clock a timer is on, which must be somebody who
// is still there.
func (s *Source) settleCPUTimer(pt *image.PosixTimer, k *bpf.Timer, told bool) error {
	inner, thread := int(^(pt.Clock >> cpuClockBits)), pt.Clock&perThreadClock != 0
	tids := make([]int, len(s.Status))
	for i, st := range s.Status {
		tids[i] = Innermost(st.NSpid)
	}
	switch {
	case inner == 0 && !thread:
		return nil
	case inner == 0 && told:
		inner = s.InnerTid(k.Tid)
	case inner == 0:
		if len(tids) > 1 {
			s.Warn("whose cpu clock timer %d of process %d is on is not known; it is taken for the main thread's", pt.ID, s.Inner)
		}
		return nil
	}
	if thread && !slices.Contains(tids, inner) || !thread && !s.Exists(inner) {
		return fail.Refuse("", "it runs on the cpu clock of one that has ended", "delete the timer before the checkpoint")
	}
	pt.Clock = ^int32(inner)<<cpuClockBits | pt.Clock&(1<<cpuClockBits-1)
	return nil
}

// queuedTimers lists the timers whose signal is pending.
func queuedTimers(t *image.Task) map[int32]bool {
	found := map[int32]bool{}
	note := func(queue [][]byte) {
		for _, info := range queue {
			if id, ok := ofTimer(info, t.Timers); ok {
				found[id] = true
			}
		}
	}
	note(t.Pending)
	for i := range t.Threads {
		note(t.Threads[i].Pending)
	}
	return found
}

// ofTimer reports whether a siginfo_t is the signal of one of the timers.
func ofTimer(info []byte, timers []image.PosixTimer) (int32, bool) {
	le := binary.LittleEndian
	id, code := int32(le.Uint32(info[16:])), int32(le.Uint32(info[8:]))
	found := code == siTimer && slices.ContainsFunc(timers, func(t image.PosixTimer) bool {
		return t.ID == id && t.Signal == int32(le.Uint32(info)) && t.Notify != sigevNone
	})
	return id, found
}

// Clocks are the container's while it is restored. They go on from the checkpoint
// as soon as it is created: by them, Passed is gone of every time that was left.
type Clocks struct {
	Now    func(id int32) int64
	Passed int64
}

// left is what remains of a time, though not nothing.
func (c *Clocks) left(ns int64) int64 { return max(ns-c.Passed, 1) }

// RestoreTimers makes and arms the timers of a process again with their own ids,
// all but those whose signal is pending: their turn comes with the signals.
// Threads and processes that they refer to must exist.
func RestoreTimers(s *tracee.Stub, t *image.Task, c *Clocks) error {
	timers := slices.SortedFunc(slices.Values(t.Timers), func(a, b image.PosixTimer) int { return int(a.ID) - int(b.ID) })
	if len(timers) == 0 {
		return nil
	}
	expired := queuedTimers(t)
	var b tracee.Batch
	run := func(most int) error {
		if len(b.Calls) < most {
			return nil
		}
		_, err := s.Run(&b)
		b.Reset()
		return err
	}
	const chunk = 3000 // calls; each takes some 200 bytes of the service area
	exact := takesTimerIDs()
	if exact {
		b.Add(unix.SYS_PRCTL, tracee.W(prTimerCreateRestoreIDs), tracee.W(1))
	}
	next := int32(0)
	for i := range timers {
		for ; !exact && next < timers[i].ID; next++ {
			passTimerID(&b, next)
			if err := run(chunk); err != nil {
				return err
			}
		}
		next = timers[i].ID + 1
		createTimer(&b, &timers[i])
		if !expired[timers[i].ID] {
			armTimer(&b, &timers[i], c)
		}
		if err := run(chunk); err != nil {
			return err
		}
	}
	if exact {
		b.Add(unix.SYS_PRCTL, tracee.W(prTimerCreateRestoreIDs), tracee.W(0))
	}
	return run(1)
}

// takesTimerIDs reports whether timer_create(2) can be told the id.
// OCICKPT_NO_TIMER_IDS makes the kernel look like one where it cannot.
var takesTimerIDs = sync.OnceValue(func() bool {
	if os.Getenv("OCICKPT_NO_TIMER_IDS") != "" {
		return false
	}
	on := unix.Prctl(prTimerCreateRestoreIDs, 1, 0, 0, 0)
	return on == nil && unix.Prctl(prTimerCreateRestoreIDs, 0, 0, 0, 0) == nil
})

// passTimerID uses an id up. Before Linux 6.15 a process gets them in order,
// from 0 on (kernel/time/posix-timers.c): an id that is not wanted is taken and
// given back. If ever it were another one, deleting it would fail.
func passTimerID(b *tracee.Batch, id int32) {
	event := make([]byte, sigeventSize)
	binary.LittleEndian.PutUint32(event[12:], sigevNone)
	b.Add(unix.SYS_TIMER_CREATE, tracee.W(unix.CLOCK_MONOTONIC), b.Put(event), b.Reserve(4))
	b.Add(unix.SYS_TIMER_DELETE, tracee.W(id))
}

func createTimer(b *tracee.Batch, t *image.PosixTimer) {
	event := make([]byte, sigeventSize)
	le := binary.LittleEndian
	le.PutUint64(event, t.Value)
	le.PutUint32(event[8:], uint32(t.Signal))
	le.PutUint32(event[12:], uint32(t.Notify))
	le.PutUint32(event[16:], uint32(t.Tid))
	id := b.Put(le.AppendUint32(nil, uint32(t.ID)))
	b.Add(unix.SYS_TIMER_CREATE, tracee.W(t.Clock), b.Put(event), id)
	// Where the id is the kernel's choice, this fails if it is another.
	b.Add(unix.SYS_TIMER_GETTIME, tracee.W(t.ID), b.Reserve(itimerspecSize))
}

// armTimer starts a timer with the time that was left, or to the wall-clock time
// that it was set to.
func armTimer(b *tracee.Batch, t *image.PosixTimer, c *Clocks) {
	switch {
	case t.Deadline != 0:
		setTimer(b, t, timerAbstime, t.Deadline)
	case t.Left != 0 && cpuTime(t.Clock):
		setTimer(b, t, 0, t.Left)
	case t.Left != 0:
		setTimer(b, t, 0, c.left(t.Left))
	}
}

// expireTimer makes a timer expire at once whose signal was pending, so that it
// is pending again, as the timer's own: it is gone if the program deletes the
// timer, and goes for all expiries until it is delivered. A periodic timer
// starts in the past, as many intervals before its next expiry as were missed.
func expireTimer(b *tracee.Batch, t *image.PosixTimer, c *Clocks) {
	missed := t.Interval * (t.Overrun + 1)
	switch {
	case t.Interval == 0 || cpuTime(t.Clock): // a cpu clock begins anew
		setTimer(b, t, timerAbstime, 1)
	case t.Deadline != 0:
		setTimer(b, t, timerAbstime, max(t.Deadline-missed, 1))
	case t.Clock == unix.CLOCK_REALTIME || t.Clock == unix.CLOCK_TAI: // whose absolute times are another matter
		setTimer(b, t, 0, 1)
	default:
		setTimer(b, t, timerAbstime, max(c.Now(t.Clock)+t.Left-c.Passed-missed, 1))
	}
	// The expiry is an interrupt away; what is queued behind it has to wait.
	b.Add(unix.SYS_CLOCK_NANOSLEEP, tracee.W(unix.CLOCK_MONOTONIC), tracee.W(0), b.Put(unpair(100_000, second)), tracee.W(0))
}

func setTimer(b *tracee.Batch, t *image.PosixTimer, flags int, value int64) {
	spec := append(unpair(t.Interval, second), unpair(value, second)...)
	b.Add(unix.SYS_TIMER_SETTIME, tracee.W(t.ID), tracee.W(flags), b.Put(spec), tracee.W(0))
}
