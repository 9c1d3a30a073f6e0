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

// eventfd is a counter (eventfd(2)).
var eventfd = kind{
	name: image.KindEventfd,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[eventfd]" },
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

// timerfd is a timer that is read (timerfd_create(2)). The time left is what
// counts: clocks that go on inside the container do so by themselves, and an
// absolute time of the wall clock is made absolute again.
var timerfd = kind{
	name: image.KindTimerfd,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:[timerfd]" },
	read: func(_ *Set, d *Description) error {
		d.Record.Kind = image.KindTimerfd
		d.Record.Timerfd = &image.Timerfd{
			Clock: int32(d.seen.number("clockid", 10)), Ticks: d.seen.number("ticks", 10),
			Flags: uint32(d.seen.number("settime flags", 8)),
			Left:  d.seen.pair("it_value"), Interval: d.seen.pair("it_interval"),
		}
		return d.forward()
	},
	open: func(_ *Maker, b *tracee.Batch, f *image.File) (int, error) {
		return b.Add(unix.SYS_TIMERFD_CREATE, tracee.W(f.Timerfd.Clock), tracee.W(0)), nil
	},
	finish: func(m *Maker, b *tracee.Batch, fd int, f *image.File) {
		t := f.Timerfd
		if t.Left != 0 {
			value, flags := t.Left, uint32(0)
			if wall := t.Clock == unix.CLOCK_REALTIME || t.Clock == unix.CLOCK_REALTIME_ALARM; wall && t.Flags&tfdTimerAbstime != 0 {
				value, flags = m.Realtime+t.Left, t.Flags&(tfdTimerAbstime|tfdCancelOnSet)
			}
			var spec []byte
			for _, v := range []int64{t.Interval, value} {
				spec = binary.LittleEndian.AppendUint64(spec, uint64(v/nanosecondsInOne))
				spec = binary.LittleEndian.AppendUint64(spec, uint64(v%nanosecondsInOne))
			}
			b.Add(unix.SYS_TIMERFD_SETTIME, tracee.W(fd), tracee.W(flags), b.Put(spec), tracee.W(0))
		}
		if t.Ticks != 0 {
			b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(tfdIocSetTicks), b.Put(binary.LittleEndian.AppendUint64(nil, t.Ticks)))
		}
		setFlags(b, fd, f.Flags)
	},
}

// forward brings a periodic timer up to date that has expired and not been read:
// until it is, the kernel has not armed it again, and shows no time left.
// timerfd_gettime(2) does that without any other effect.
func (d *Description) forward() error {
	t := d.Record.Timerfd
	if t.Interval == 0 || t.Left != 0 || t.Ticks == 0 {
		return nil
	}
	f, err := d.seen.own()
	if err != nil {
		return err
	}
	defer f.Close()
	var spec unix.ItimerSpec
	if err := unix.TimerfdGettime(int(f.Fd()), &spec); err != nil {
		return fmt.Errorf("timerfd_gettime: %w", err)
	}
	again, err := look(d.seen.proc, d.seen.fd)
	if err != nil {
		return err
	}
	t.Left, t.Ticks = max(spec.Value.Nano(), 1), again.number("ticks", 10)
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
	return b.Add(unix.SYS_OPENAT, tracee.W(unix.AT_FDCWD), b.String("/proc/self/fd/"+strconv.Itoa(fd)), tracee.W(flags&^creationFlags|unix.O_CLOEXEC))
}
