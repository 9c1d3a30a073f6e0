package file

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// eventfdLink is what /proc/PID/fd shows of an eventfd.
const eventfdLink = "anon_inode:[eventfd]"

// eventfd is a counter (eventfd(2)).
var eventfd = kind{
	name: image.KindEventfd,
	is:   func(_ *Set, one *seen) bool { return one.link == eventfdLink },
	read: func(_ *Set, d *Description) error {
		d.Record.Kind = image.KindEventfd
		d.Record.Eventfd = &image.Eventfd{
			Count:     d.seen.number("eventfd-count", 16),
			Semaphore: d.seen.number("eventfd-semaphore", 10) != 0,
		}
		return nil
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		var flags uint32
		if f.Eventfd.Semaphore {
			flags = unix.EFD_SEMAPHORE
		}
		return b.Add(unix.SYS_EVENTFD2, tracee.W(0), tracee.W(flags)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) {
		if f.Eventfd.Count > 0 { // eventfd2 takes only 32 bits of it
			b.Add(unix.SYS_WRITE, tracee.W(fd), b.Put(binary.LittleEndian.AppendUint64(nil, f.Eventfd.Count)), tracee.W(8))
		}
		setFlags(b, fd, f.Flags)
	},
}

// signalfd is a queue of signals (signalfd(2)); it holds none of its own.
var signalfd = kind{
	name: image.KindSignalfd,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[signalfd]" },
	read: func(_ *Set, d *Description) error {
		d.Record.Kind = image.KindSignalfd
		d.Record.Signalfd = &image.Signalfd{Mask: d.seen.number("sigmask", 16)}
		return nil
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		mask := b.Put(binary.LittleEndian.AppendUint64(nil, f.Signalfd.Mask))
		return b.Add(unix.SYS_SIGNALFD4, tracee.W(-1), mask, tracee.W(8), tracee.W(0)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) },
}

const (
	tfdTimerAbstime  = 1
	tfdCancelOnSet   = 2
	tfdIocSetTicks   = 0x40085400 // _IOW('T', 0, __u64)
	nanosecondsInOne = 1e9
)

// timerfd is a timer that is read (timerfd_create(2)). By the container's clocks,
// which go on where they were, it goes off when it would have; an absolute time of
// the wall clock stays that time.
var timerfd = kind{
	name: image.KindTimerfd,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[timerfd]" },
	read: func(_ *Set, d *Description) error {
		again, err := d.lookForward()
		if err != nil {
			return err
		}
		d.timed = [2]int64{clockNow(unix.CLOCK_MONOTONIC), clockNow(unix.CLOCK_REALTIME)}
		d.Record.Kind = image.KindTimerfd
		d.Record.Timerfd = &image.Timerfd{
			Clock: int32(again.number("clockid", 10)), Ticks: again.number("ticks", 10),
			Flags: uint32(again.number("settime flags", 8)),
			Left:  again.pair("it_value"), Interval: again.pair("it_interval"),
		}
		if again.standsStill() {
			d.Record.Timerfd.Left = 1 // it goes off faster than one can look
		}
		return nil
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return b.Add(unix.SYS_TIMERFD_CREATE, tracee.W(f.Timerfd.Clock), tracee.W(0)), nil
	},
	finish: func(m *Maker, b *tracee.Batch, fd int, f *image.File) {
		value, flags, ticks := m.rearm(f.Timerfd)
		if value != 0 {
			var spec []byte
			for _, v := range []int64{f.Timerfd.Interval, value} {
				spec = binary.LittleEndian.AppendUint64(spec, uint64(v/nanosecondsInOne))
				spec = binary.LittleEndian.AppendUint64(spec, uint64(v%nanosecondsInOne))
			}
			b.Add(unix.SYS_TIMERFD_SETTIME, tracee.W(fd), tracee.W(flags), b.Put(spec), tracee.W(0))
		}
		if ticks != 0 {
			b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(tfdIocSetTicks), b.Put(binary.LittleEndian.AppendUint64(nil, ticks)))
		}
		setFlags(b, fd, f.Flags)
	},
}

func clockNow(id int32) int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(id, &ts) // these clocks are always there
	return ts.Nano()
}

// byWallClock reports a timer that is set to a time of the wall clock.
func byWallClock(t *image.Timerfd) bool {
	return (t.Clock == unix.CLOCK_REALTIME || t.Clock == unix.CLOCK_REALTIME_ALARM) && t.Flags&tfdTimerAbstime != 0
}

// SettleTimers relates what was left of timers to the moment of the image, which
// the clocks outside tell.
func (s *Set) SettleTimers(monotonic, realtime int64) {
	for _, d := range s.descs {
		t := d.Record.Timerfd
		if t == nil || t.Left == 0 {
			continue
		}
		passed := d.timed[0] - monotonic
		if byWallClock(t) {
			passed = d.timed[1] - realtime
		}
		missed := uint64(0)
		t.Left, missed = goneOff(t.Left+passed, t.Interval)
		t.Ticks += missed
	}
}

// goneOff makes of what was left of a timer, nothing perhaps or less, what is left
// until it goes off next, and how often a periodic one has gone off already.
func goneOff(left, interval int64) (int64, uint64) {
	if left > 0 || interval == 0 {
		return max(left, 1), 0
	}
	return interval - -left%interval, uint64(1 + -left/interval)
}

// rearm tells how to set a timer again: the value and the flags of
// timerfd_settime(2), and the expirations to be read.
func (m *Maker) rearm(t *image.Timerfd) (value int64, flags uint32, ticks uint64) {
	if t.Left == 0 {
		return 0, 0, t.Ticks
	}
	if byWallClock(t) {
		return m.Realtime + t.Left, t.Flags & (tfdTimerAbstime | tfdCancelOnSet), t.Ticks
	}
	c := m.Clocks()
	left, missed := goneOff(t.Left-c.Passed, t.Interval)
	ticks = t.Ticks + missed
	if t.Flags&tfdTimerAbstime == 0 {
		return left, 0, ticks
	}
	clock := t.Clock
	if clock == unix.CLOCK_BOOTTIME_ALARM {
		clock = unix.CLOCK_BOOTTIME
	}
	return c.Now(clock) + left, tfdTimerAbstime, ticks
}

// standsStill reports a periodic timer that has expired and not been read: until it
// is, the kernel has not armed it again, and shows no time left.
func (s *seen) standsStill() bool {
	return s.pair("it_interval") != 0 && s.pair("it_value") == 0 && s.number("ticks", 10) != 0
}

// lookForward looks at a timer that does not stand still: timerfd_gettime(2) brings
// it up to date without any other effect. It goes on while its task is stopped.
func (d *Description) lookForward() (*seen, error) {
	const tries = 16
	for i := 0; ; i++ {
		now, err := look(d.seen.proc, d.seen.fd)
		if err != nil || !now.standsStill() || i == tries {
			return now, err
		}
		if err := d.forward(); err != nil {
			return nil, err
		}
	}
}

func (d *Description) forward() error {
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	var spec unix.ItimerSpec
	if err := unix.TimerfdGettime(int(f.Fd()), &spec); err != nil {
		return fmt.Errorf("timerfd_gettime: %w", err)
	}
	return nil
}

// shmem is a memfd that is open (memfd_create(2)), or a file that was removed
// from a tmpfs (shm_unlink(3)): the same to the kernel but for its name.
var shmem = kind{
	name: image.KindShmem,
	is: func(s *Set, one *seen) bool {
		path, deleted := strings.CutSuffix(one.link, deletedSuffix)
		return deleted && (strings.HasPrefix(path, "/memfd:") || s.Removed(path, one.path()))
	},
	read: func(s *Set, d *Description) (err error) {
		d.Record.Kind = image.KindShmem
		if d.segment, err = s.Shared.Open(&d.seen.stat, d.seen.path(), d.seen.link); err != nil {
			return err
		}
		d.Complete = func() { d.Record.Pipe = d.segment.Ref }
		return nil
	},
	open: func(m *Maker, b *tracee.Batch, f *image.File) (int, error) {
		fd, ok := m.segments[f.Pipe]
		if !ok {
			return 0, fmt.Errorf("memfd without its memory, object %d", f.Pipe)
		}
		if !m.taken[f.Pipe] && f.Flags&unix.O_ACCMODE == unix.O_RDWR { // the description that memfd_create made
			m.taken[f.Pipe] = true
			return b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0)), nil
		}
		return m.reopen(b, fd, f.Flags), nil
	},
	finish: func(m *Maker, b *tracee.Batch, fd int, f *image.File) {
		seek(m, b, fd, f)
		setFlags(b, fd, f.Flags)
	},
}

// reopen adds the open of another description of an inode that has no path,
// through /proc of the container.
func (m *Maker) reopen(b *tracee.Batch, fd int, flags uint32) int {
	dir, path := m.throughProc(fd)
	return b.Add(unix.SYS_OPENAT, dir, b.String(path), tracee.W(flags&^creationFlags|unix.O_CLOEXEC))
}

// throughProc is a path to an open file, and the directory that it starts from:
// the stub may be where there is no /proc.
func (m *Maker) throughProc(fd int) (dir tracee.Word, path string) {
	if len(m.kept) > 0 {
		return tracee.W(m.kept[0]), "self/fd/" + strconv.Itoa(fd)
	}
	return tracee.W(unix.AT_FDCWD), "/proc/self/fd/" + strconv.Itoa(fd)
}
