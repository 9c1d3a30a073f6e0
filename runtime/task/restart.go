package task

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// A call that was interrupted with ERESTART_RESTARTBLOCK is continued from a
// block that the kernel keeps in the task: a new task has none. It gets one by
// issuing the call again, with the time that was left, and being interrupted in
// it. Four calls end that way: nanosleep, clock_nanosleep with a relative time,
// poll, and futex waits with a time-out.

// futexCommand masks the command out of a futex operation.
const (
	futexCommand = 0x7f
	futexWait    = 0

	futexWaitBitset = 9
)

// restartOf records the call a thread was interrupted in and the time it had
// left. Three ways tell, in this order: the call itself, the restart block, and
// where nobody may read that, the arguments: the call then starts again with its
// full time, which is late but never early.
func (s *Source) restartOf(t *tracee.Thread, r *tracee.Regs) (*image.Restart, error) {
	if !r.NeedsRestartBlock() {
		return nil, nil
	}
	nr, _, _ := r.Syscall()
	c := timed(nr, r.Narrow())
	told := toldByCall(c.nr, r.Args())
	if !told {
		if block, ok := s.Block(t.Tid); ok {
			if rec := s.restartFrom(&block, c.nr, r.Args()); rec != nil {
				switch {
				case c.nr != unix.SYS_RESTART_SYSCALL:
					rec.Nr = c.own
				case r.Narrow():
					rec.Nr = narrowBehind(t, rec.Nr, &block, r.Args())
				}
				return rec, nil
			}
		}
	}
	if c.nr == unix.SYS_RESTART_SYSCALL {
		c = restartedCall(t, r)
		told = toldByCall(c.nr, r.Args())
	}
	left, err := timeLeft(t, c, r.Args())
	if err != nil {
		return nil, err
	}
	if !told {
		s.Warn("how long thread %d still had to wait in %s is not known; it waits its full time again", s.InnerTid(t.Tid), restarting[c.nr])
	}
	return &image.Restart{Nr: c.own, Left: left}, nil
}

var restarting = map[uint64]string{
	unix.SYS_NANOSLEEP: "nanosleep", unix.SYS_CLOCK_NANOSLEEP: "clock_nanosleep", unix.SYS_POLL: "poll", unix.SYS_FUTEX: "futex",
	unix.SYS_RESTART_SYSCALL: "restart_syscall",
}

// toldByCall reports that a call and its arguments say how much time is left: by
// the remainder that the kernel writes when a sleep is interrupted, by an
// absolute time, or by none.
func toldByCall(nr uint64, args [6]uint64) bool {
	switch nr {
	case unix.SYS_NANOSLEEP:
		return args[1] != 0
	case unix.SYS_CLOCK_NANOSLEEP:
		return args[3] != 0
	case unix.SYS_POLL:
		return int32(args[2]) < 0
	case unix.SYS_FUTEX:
		return args[1]&futexCommand == futexWaitBitset
	}
	return false
}

// AsksForBlock reports a thread of a running process that sleeps in a call of
// which, were it stopped now, only the restart block would tell the time left.
func AsksForBlock(tid int) bool {
	b, err := readProc(tid, "syscall")
	if err != nil {
		return false
	}
	var nr, sp, ip uint64
	var args [6]uint64
	n, _ := fmt.Sscanf(string(b), "%d 0x%x 0x%x 0x%x 0x%x 0x%x 0x%x 0x%x 0x%x", &nr, &args[0], &args[1], &args[2], &args[3], &args[4], &args[5], &sp, &ip)
	nr = timed(nr, sp|ip <= math.MaxUint32).nr // which only may be 32-bit code, but this need not be exact
	if n < 9 || restarting[nr] == "" || toldByCall(nr, args) {
		return false
	}
	return nr != unix.SYS_FUTEX || args[1]&futexCommand == futexWait && args[3] != 0
}

// restartFrom makes the record from a restart block. The function in it tells
// the call, also where restart_syscall(2) has taken the place of its number.
func (s *Source) restartFrom(b *bpf.RestartBlock, nr uint64, args [6]uint64) *image.Restart {
	rec := &image.Restart{Nr: nr}
	switch b.Fn {
	case "hrtimer_nanosleep_restart":
		rec.Nr, rec.Left = sleepCall(b, nr, args), b.Nanosleep.Expires-s.clock(b.Nanosleep.Clock)
	case "posix_cpu_nsleep_restart":
		now, ok := s.cpuClock(b.Nanosleep.Clock)
		if !ok {
			return nil
		}
		rec.Nr, rec.Left = unix.SYS_CLOCK_NANOSLEEP, b.Nanosleep.Expires-now
	case "alarm_timer_nsleep_restart":
		clocks := map[int32]int32{0: unix.CLOCK_REALTIME, 1: unix.CLOCK_BOOTTIME} // enum alarmtimer_type
		rec.Nr, rec.Left = unix.SYS_CLOCK_NANOSLEEP, b.Nanosleep.Expires-s.clock(clocks[b.Nanosleep.Clock])
	case "do_restart_poll":
		rec.Nr, rec.Left = unix.SYS_POLL, -1
		if b.Poll.Timed {
			rec.Left = max(b.Poll.Expires-s.Now, 0)
		}
		return rec
	case "futex_wait_restart":
		rec.Nr = unix.SYS_FUTEX
		if args[1]&futexCommand == futexWait { // the other one has its absolute time among the arguments
			rec.Left = b.Futex.Expires - s.Now
		}
	default:
		return nil
	}
	rec.Left = max(rec.Left, 0)
	return rec
}

// sleepCall tells the two sleeps apart, which share a restart block, by the
// place of the remainder among the arguments, or a clock where nanosleep has an
// address.
func sleepCall(b *bpf.RestartBlock, nr uint64, args [6]uint64) uint64 {
	const lowestPage = 1 << 12 // nothing is mapped below
	switch {
	case nr != unix.SYS_RESTART_SYSCALL:
		return nr
	case args[0] < lowestPage && args[1] == 0 && (b.Nanosleep.Remainder == 0 || args[3] == b.Nanosleep.Remainder):
		return unix.SYS_CLOCK_NANOSLEEP
	}
	return unix.SYS_NANOSLEEP
}

// clock tells what a clock showed at Now, when the container's clocks were
// recorded: the times left go together with these.
func (s *Source) clock(id int32) int64 {
	if id == unix.CLOCK_MONOTONIC {
		return s.Now
	}
	var ts unix.Timespec
	_ = unix.ClockGettime(id, &ts) // the thread sleeps by it, so it is one
	return ts.Nano() - (monotonicNow() - s.Now)
}

// cpuClock reads the cpu clock of the whole process, by whatever name one of its
// threads sleeps by it: the pid of a process, inverted, above three bits of kind
// (include/linux/posix-timers.h). The kernel lets nobody else read the clock of
// a single thread.
func (s *Source) cpuClock(id int32) (int64, bool) {
	const perThread = 4
	pid := ^(id >> 3)
	if id&perThread != 0 || pid != 0 && int(pid) != s.Inner {
		return 0, false
	}
	var ts unix.Timespec
	err := unix.ClockGettime(^int32(s.Pid)<<3|id&3, &ts)
	return ts.Nano(), err == nil
}

// restartedCall tells the call behind restart_syscall(2). A call that has been
// restarted before has lost its number, but not its arguments, and the
// instructions in front of it still load the number, as far as it is a constant
// there; libraries with one syscall instruction for all calls leave only the
// arguments.
func restartedCall(t *tracee.Thread, r *tracee.Regs) timedCall {
	args := r.Args()
	var fitting []uint64
	all := []uint64{unix.SYS_FUTEX, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_NANOSLEEP, unix.SYS_POLL}
	if r.Narrow() {
		all = all[:0]
		for _, c := range narrowTimed {
			all = append(all, c.own)
		}
	}
	for _, nr := range all {
		if fits(t, timed(nr, r.Narrow()), args) {
			fitting = append(fitting, nr)
		}
	}
	if nr, ok := t.LoadedNumber(r, fitting); ok {
		return timed(nr, r.Narrow())
	}
	if len(fitting) > 0 {
		return timed(fitting[0], r.Narrow()) // the most demanding one comes first
	}
	nr, _, _ := r.Syscall()
	return timed(nr, r.Narrow())
}

// fits reports whether arguments can be those of a call that has gone to sleep.
func fits(t *tracee.Thread, c timedCall, a [6]uint64) bool {
	const (
		maxClock   = 16        // clock ids are small, and never valid addresses
		lowestPage = 1 << 12   // nothing is mapped below
		futexFlags = 128 | 256 // FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
	)
	timespec := func(addr uint64) bool {
		ns, err := readTimespec(t, addr, c.half)
		return err == nil && ns >= 0
	}
	switch c.nr {
	case unix.SYS_CLOCK_NANOSLEEP:
		return a[0] < maxClock && a[1] == 0 && timespec(a[2])
	case unix.SYS_NANOSLEEP:
		return (a[1] == 0 || a[1] >= lowestPage) && timespec(a[0])
	case unix.SYS_POLL:
		return a[1] < 1<<20 && (a[1] == 0) == (a[0] < lowestPage)
	case unix.SYS_FUTEX:
		op := a[1] &^ futexFlags
		if a[0]%4 != 0 || op != futexWait && op != futexWaitBitset || !timespec(a[3]) {
			return false
		}
		// With no flag the operation could also be nanosleep's null pointer,
		// but then the word is hardly the value that the futex had.
		var word [4]byte
		return a[1] != futexWait || t.Read(a[0], word[:]) == nil && binary.LittleEndian.Uint32(word[:]) == uint32(a[2])
	}
	return false
}

func timeLeft(t *tracee.Thread, c timedCall, args [6]uint64) (int64, error) {
	switch c.nr {
	case unix.SYS_NANOSLEEP:
		return sleepLeft(t, args[0], args[1], c.half)
	case unix.SYS_CLOCK_NANOSLEEP:
		return sleepLeft(t, args[2], args[3], c.half)
	case unix.SYS_POLL:
		if ms := int32(args[2]); ms >= 0 {
			return int64(ms) * int64(time.Millisecond), nil
		}
		return -1, nil
	case unix.SYS_FUTEX:
		return readTimespec(t, args[3], c.half)
	}
	return 0, fail.Refuse(fmt.Sprintf("interrupted system call %d", c.own),
		"the call it continues cannot be told any more", "try again in a moment")
}

// sleepLeft prefers the remainder, which the kernel writes when a sleep is
// interrupted, to the request.
func sleepLeft(t *tracee.Thread, request, remainder uint64, half int) (int64, error) {
	if remainder != 0 {
		return readTimespec(t, remainder, half)
	}
	return readTimespec(t, request, half)
}

// readTimespec reads a time of two numbers of half so many bytes.
func readTimespec(t *tracee.Thread, addr uint64, half int) (int64, error) {
	var b [16]byte
	if err := t.Read(addr, b[:2*half]); err != nil {
		return 0, fail.Refuse("interrupted system call", "its time-out cannot be read: "+err.Error(), "try again in a moment")
	}
	if half == 4 {
		sec, nsec := int32(binary.LittleEndian.Uint32(b[:])), int32(binary.LittleEndian.Uint32(b[4:]))
		binary.LittleEndian.PutUint64(b[:], uint64(sec))
		binary.LittleEndian.PutUint64(b[8:], uint64(nsec))
	}
	if nsec := int64(binary.LittleEndian.Uint64(b[8:])); nsec < 0 || nsec >= second {
		return 0, fail.Refuse("interrupted system call", "its time-out is not a valid time", "")
	}
	return pair(b[:], second), nil
}

// cpuTime reports a clock that counts the time on a processor.
func cpuTime(id int32) bool {
	return id < 0 || id == unix.CLOCK_PROCESS_CPUTIME_ID || id == unix.CLOCK_THREAD_CPUTIME_ID
}

// RestoreRestart makes the kernel build the thread's restart block, and gives
// back the registers it is to be released with: those of the image, unless the
// call has meanwhile ended of its own accord, because what it waited for has
// happened. Memory must be in place, and no timed call may follow.
func RestoreRestart(s *tracee.Stub, rec *image.Restart, r tracee.Regs, c *Clocks) (tracee.Regs, error) {
	if rec == nil {
		return r, nil
	}
	args, scratch := r.Args(), s.Scratch()
	left, call := rec.Left, timed(rec.Nr, r.Narrow())
	if left >= 0 && !(call.nr == unix.SYS_CLOCK_NANOSLEEP && cpuTime(int32(args[0]))) {
		left = max(left-c.Passed, 0)
	}
	timespec := unpair(max(left, 0), second)
	if call.half == 4 {
		timespec = slices.Concat(timespec[:4], timespec[8:12])
	}
	switch call.nr {
	case unix.SYS_NANOSLEEP:
		args[0] = scratch
	case unix.SYS_CLOCK_NANOSLEEP:
		args[2] = scratch
	case unix.SYS_POLL:
		if left >= 0 {
			args[2] = uint64((left + int64(time.Millisecond) - 1) / int64(time.Millisecond))
		}
	case unix.SYS_FUTEX:
		if args[1]&futexCommand == futexWait {
			args[3] = scratch // FUTEX_WAIT_BITSET's time is absolute and stays
		}
	default:
		return r, fmt.Errorf("restart block of system call %d: not one that has any", rec.Nr)
	}
	if err := s.Write(scratch, timespec); err != nil {
		return r, err
	}
	interrupted, err := s.Interrupted(r.Narrow(), uintptr(rec.Nr), args)
	if err != nil {
		return r, fmt.Errorf("rebuild the restart block of system call %d: %w", rec.Nr, err)
	}
	return r.Resumed(rec.Nr, interrupted), nil
}
