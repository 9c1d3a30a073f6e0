package task

import (
	"encoding/binary"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

// ofTimerInfo is the siginfo of a timer's signal.
func ofTimerInfo(id, signal int32) []byte {
	info := make([]byte, tracee.SigInfoSize)
	code := int32(siTimer)
	binary.LittleEndian.PutUint32(info, uint32(signal))
	binary.LittleEndian.PutUint32(info[8:], uint32(code))
	binary.LittleEndian.PutUint32(info[16:], uint32(id))
	return info
}

func TestSettleTimers(t *testing.T) {
	const asked, read, since = 1000, 1050, 100 // 50 passed between the timers and the signals
	const wall = unix.CLOCK_REALTIME
	thread := func(inner int32) int32 { return ^inner<<cpuClockBits | perThreadClock | 2 }
	for _, c := range []struct {
		name    string
		timer   image.PosixTimer
		pending bool
		known   *bpf.Timer
		want    image.PosixTimer
		warns   int
	}{
		{"idle", image.PosixTimer{Clock: 1}, false, nil, image.PosixTimer{Clock: 1}, 0},
		{"running", image.PosixTimer{Clock: 1, Left: 70}, false, nil, image.PosixTimer{Clock: 1, Left: 170}, 0},
		{"expired", image.PosixTimer{Clock: 1}, true, nil, image.PosixTimer{Clock: 1}, 0},
		{"expired since", image.PosixTimer{Clock: 1, Left: 20}, true, nil, image.PosixTimer{Clock: 1}, 0},
		{"periodic, expired", image.PosixTimer{Clock: 1, Left: 70, Interval: 90}, true, &bpf.Timer{Overrun: 4},
			image.PosixTimer{Clock: 1, Left: 170, Interval: 90, Overrun: 4}, 0},
		{"periodic, expired since", image.PosixTimer{Clock: 1, Left: 20, Interval: 90}, true, &bpf.Timer{Overrun: -1},
			image.PosixTimer{Clock: 1, Left: 210, Interval: 90}, 0},
		{"twice since", image.PosixTimer{Clock: 1, Left: 20, Interval: 20}, true, &bpf.Timer{Overrun: -1},
			image.PosixTimer{Clock: 1, Left: 160, Interval: 20, Overrun: 1}, 0},
		{"by wall clock", image.PosixTimer{Clock: wall, Left: 70}, false, &bpf.Timer{Base: wall, Expires: 5555},
			image.PosixTimer{Clock: wall, Left: 170, Deadline: 5555}, 0},
		{"by wall clock, expired since", image.PosixTimer{Clock: wall, Left: 20, Interval: 60}, true, &bpf.Timer{Base: wall, Expires: 5555, Overrun: -1},
			image.PosixTimer{Clock: wall, Left: 180, Interval: 60, Deadline: 5615}, 0},
		{"relative", image.PosixTimer{Clock: wall, Left: 70}, false, &bpf.Timer{Base: 1, Expires: 5555}, image.PosixTimer{Clock: wall, Left: 170}, 0},
		{"nobody knows", image.PosixTimer{Clock: wall, Left: 70}, false, nil, image.PosixTimer{Clock: wall, Left: 170}, 1},
		{"cpu clock", image.PosixTimer{Clock: -6, Left: 70}, false, nil, image.PosixTimer{Clock: -6, Left: 70}, 0},
		{"another thread's", image.PosixTimer{Clock: -2, Left: 70}, false, &bpf.Timer{Tid: 1008}, image.PosixTimer{Clock: thread(8), Left: 70}, 0},
		{"a thread's that nobody knows", image.PosixTimer{Clock: -2}, false, nil, image.PosixTimer{Clock: -2}, 1},
		{"by tid", image.PosixTimer{Clock: thread(8)}, false, nil, image.PosixTimer{Clock: thread(8)}, 0},
		{"another process's", image.PosixTimer{Clock: ^20<<3 | 2}, false, nil, image.PosixTimer{Clock: ^20<<3 | 2}, 0},
	} {
		src, warned := settleSource(c.known)
		c.timer.ID, c.timer.Signal, c.want.ID, c.want.Signal = 3, 40, 3, 40
		task := &image.Task{Timers: []image.PosixTimer{c.timer}, Pending: [][]byte{ofTimerInfo(4, 40), ofTimerInfo(3, 41)}}
		if c.pending {
			task.Pending = append(task.Pending, ofTimerInfo(3, 40))
		}
		src.Now = asked - since
		check(t, src.settleTimers(task, asked, read))
		if task.Timers[0] != c.want || *warned != c.warns {
			t.Errorf("%s: %+v with %d warnings, want %+v with %d", c.name, task.Timers[0], *warned, c.want, c.warns)
		}
	}
	for _, clock := range []int32{thread(9), ^21<<3 | 2} {
		src, _ := settleSource(nil)
		if err := src.settleTimers(&image.Task{Timers: []image.PosixTimer{{Clock: clock}}}, 0, 0); err == nil {
			t.Errorf("a timer on clock %d of nobody was taken", clock)
		}
	}
}

// settleSource is process 7 with threads 7 and 8 beside process 20.
func settleSource(known *bpf.Timer) (*Source, *int) {
	warned := new(int)
	return &Source{
		Inner: 7, Status: []*Status{{NSpid: []int{1007, 7}}, {NSpid: []int{1008, 8}}},
		InnerTid: func(host int) int { return host - 1000 },
		Exists:   func(inner int) bool { return inner == 7 || inner == 20 },
		Warn:     func(string, ...any) { *warned++ },
		Timers: func() (map[int32]bpf.Timer, bool) {
			if known == nil {
				return nil, false
			}
			return map[int32]bpf.Timer{3: *known}, true
		},
	}, warned
}

func TestSettleITimers(t *testing.T) {
	alarm := make([]byte, tracee.SigInfoSize)
	binary.LittleEndian.PutUint32(alarm, uint32(unix.SIGALRM))
	alarm[8] = 0x80
	for _, c := range []struct {
		pending [][]byte
		timer   image.ITimer
		want    string
	}{
		{nil, image.ITimer{Value: 50}, "[{0 0 51}]"},
		{nil, image.ITimer{Which: 1, Value: 50}, "[{1 0 50}]"},
		{[][]byte{alarm}, image.ITimer{Value: 50}, "[{0 0 51}]"},
		{[][]byte{alarm}, image.ITimer{Value: 2}, "[]"},
		{[][]byte{alarm}, image.ITimer{Value: 2, Interval: 9}, "[{0 9 0}]"},
		{[][]byte{alarm}, image.ITimer{Interval: 9}, "[{0 9 0}]"},
	} {
		task := &image.Task{Pending: c.pending, ITimers: []image.ITimer{c.timer}}
		settleITimers(task, 1000, 3000)
		if got := fmt.Sprint(task.ITimers); got != c.want {
			t.Errorf("%+v became %s, want %s", c.timer, got, c.want)
		}
	}
}

// A signal that came when the queue was full is pending without a siginfo.
func TestCompletePending(t *testing.T) {
	got := complete([][]byte{ofTimerInfo(1, 40)}, 1<<39|1<<9)
	if len(got) != 2 || got[1][0] != 10 || len(got[1]) != tracee.SigInfoSize {
		t.Errorf("pending: %v", got)
	}
}

// Timers get their ids whether or not the kernel takes them.
func TestTimerIDs(t *testing.T) {
	was := takesTimerIDs
	defer func() { takesTimerIDs = was }()
	for _, exact := range []bool{true, false} {
		takesTimerIDs = func() bool { return exact }
		s := traceetest.Stub(t, traceetest.ServiceAt)
		task := &image.Task{}
		for _, id := range []int32{4000, 2, 7} {
			task.Timers = append(task.Timers, image.PosixTimer{ID: id, Clock: unix.CLOCK_MONOTONIC, Notify: sigevNone, Left: int64(id+1) * second})
		}
		check(t, RestoreTimers(s, task, &Clocks{}))
		got, err := posixTimers(s.Pid, func(int) int { return 0 })
		check(t, err)
		var b tracee.Batch
		done := askTimers(&b, got)
		_, err = s.Run(&b)
		check(t, err)
		done()
		if len(got) != 3 {
			t.Errorf("the kernel takes ids: %v: %d timers", exact, len(got))
		}
		for _, g := range got {
			if want := int64(g.ID+1) * second; g.Left > want || g.Left < want-second {
				t.Errorf("timer %d has %d left, want %d", g.ID, g.Left, want)
			}
		}
	}
}
