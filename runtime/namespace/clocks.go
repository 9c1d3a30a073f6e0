package namespace

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// clocks is an offset for CLOCK_MONOTONIC and one for CLOCK_BOOTTIME
// (time_namespaces(7)).
var clocks = kind{
	name: "time", flag: unix.CLONE_NEWTIME,
	read: func(_ *Set, n *Namespace) error {
		if n.teller == 0 {
			return fail.Refuse("", "no task has its children in it, so nothing tells its clocks", "")
		}
		mono, boot, _, err := Clocks(n.teller)
		n.Record.Time = &image.TimeNamespace{Monotonic: mono, Boottime: boot}
		return err
	},
	fill: func(m *Maker, s *stub, n *image.NestedNamespace) error {
		// They can be set until a process is in.
		var text string
		for clock, offset := range m.offsets(n) {
			sec := offset / 1e9
			if offset%1e9 < 0 {
				sec-- // the nanoseconds of an offset are never negative
			}
			text += fmt.Sprintf("%d %d %d\n", clock, sec, offset-sec*1e9)
		}
		return writeAt(s.Stub, m.Proc, fmt.Sprintf("%d/timens_offsets", s.pid), text) // of a thread, where it is one
	},
}

// offsets are those of a time namespace from the host's clocks, from where all
// offsets count: it is as far from the container's as it was.
func (m *Maker) offsets(n *image.NestedNamespace) map[int32]int64 {
	c := &m.Head.Container
	return map[int32]int64{
		unix.CLOCK_MONOTONIC: m.Offsets[unix.CLOCK_MONOTONIC] + n.Time.Monotonic - c.Monotonic,
		unix.CLOCK_BOOTTIME:  m.Offsets[unix.CLOCK_BOOTTIME] + n.Time.Boottime - c.Boottime,
	}
}

// ClocksOf are the offsets that apply to a task's clocks.
func (m *Maker) ClocksOf(pid int32) map[int32]int64 {
	if p := m.Head.Process(pid); p != nil {
		for _, ref := range p.Namespaces {
			if n := m.Head.Nested(ref); n.Type == "time" {
				return m.offsets(n)
			}
		}
	}
	return m.Offsets
}

// Clocks reads CLOCK_MONOTONIC and CLOCK_BOOTTIME of the time namespace that a
// process's children begin in: that is the one its timens_offsets are of. now is
// this process's own CLOCK_MONOTONIC of that moment.
func Clocks(pid int) (mono, boot, now int64, err error) {
	if mono, boot, err = nsutil.TimeOffsets(pid); err != nil {
		return 0, 0, 0, err
	}
	for clock, to := range map[int32]*int64{unix.CLOCK_MONOTONIC: &mono, unix.CLOCK_BOOTTIME: &boot} {
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			return 0, 0, 0, err
		}
		*to += ts.Nano()
		if clock == unix.CLOCK_MONOTONIC {
			now = ts.Nano()
		}
	}
	return mono, boot, now, nil
}

// ClockTeller is a process that tells the container's own clocks.
func (s *Set) ClockTeller() (int, error) {
	if s.clock == 0 {
		return 0, fail.Refuse("time namespace", "no task of the container has its children in the container's own, so nothing tells its clocks", "")
	}
	return s.clock, nil
}
