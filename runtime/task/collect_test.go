package task

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"slices"
	"testing"
	"testing/quick"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/bpf"
	"github.com/ocickpt/ocickpt/runtime/tracee"
	"github.com/ocickpt/ocickpt/runtime/tracee/traceetest"
)

func TestPair(t *testing.T) {
	for _, unit := range []int64{1e6, second} {
		round := func(v int64) bool { return pair(unpair(v, unit), unit) == v }
		if err := quick.Check(round, nil); err != nil {
			t.Error(err)
		}
		for _, v := range []int64{0, 1, unit - 1, unit, unit + 1, math.MaxInt64} {
			if !round(v) {
				t.Errorf("%d is not itself again", v)
			}
		}
	}
	want := append(binary.LittleEndian.AppendUint64(nil, 3), binary.LittleEndian.AppendUint64(nil, 500_000)...)
	if got := unpair(3_500_000, 1e6); !bytes.Equal(got, want) {
		t.Errorf("3.5 s are %x, want %x", got, want)
	}
}

func TestParseTimer(t *testing.T) {
	parse := func(lines ...[2]string) (tm image.PosixTimer, err error) {
		for _, l := range lines {
			if err := parseTimer(&tm, l[0], l[1], func(host int) int { return host - 1000 }); err != nil {
				return tm, err
			}
		}
		return tm, nil
	}
	for _, c := range []struct {
		notify string
		want   image.PosixTimer
	}{
		{"signal/pid.2634", image.PosixTimer{Signal: 60, Value: 0x7ffd0a2b4c30, Clock: 1}},
		{"none/pid.2634", image.PosixTimer{Signal: 60, Value: 0x7ffd0a2b4c30, Clock: 1, Notify: sigevNone}},
		{"thread/pid.2634", image.PosixTimer{Signal: 60, Value: 0x7ffd0a2b4c30, Clock: 1, Notify: 2}},
		{"signal/tid.2634", image.PosixTimer{Signal: 60, Value: 0x7ffd0a2b4c30, Clock: 1, Notify: sigevThreadID, Tid: 1634}},
	} {
		got, err := parse([2]string{"signal", "60/00007ffd0a2b4c30"}, [2]string{"notify", c.notify}, [2]string{"ClockID", "1"})
		if err != nil || got != c.want {
			t.Errorf("%s is %+v, %v; want %+v", c.notify, got, err, c.want)
		}
	}
	if _, err := parse([2]string{"notify", "signal/tid.1000"}); err == nil {
		t.Error("a timer that notifies a thread that is gone was taken")
	}
}

func TestActions(t *testing.T) {
	round := func(a image.SigAction) bool { return decodeAction(a.Signal, encodeAction(a)) == a }
	if err := quick.Check(round, nil); err != nil {
		t.Error(err)
	}
	h := &image.Sighand{Actions: []image.SigAction{{Signal: int32(unix.SIGTRAP), Handler: 0x1000}, {Signal: 9, Handler: 1}, {Signal: 64, Handler: 2}}}
	var b tracee.Batch
	restoreActions(&b, h)
	for sig, want := range map[unix.Signal]bool{unix.SIGKILL: false, unix.SIGSTOP: false, unix.SIGTRAP: false, unix.SIGCHLD: true, 64: true, unix.SIGUSR1: false} {
		if got := place(&b, unix.SYS_RT_SIGACTION, tracee.W(sig)) >= 0; got != want {
			t.Errorf("action of %v set: %v, want %v", sig, got, want)
		}
	}
	if trapAction(h) != h.Actions[0] || trapAction(&image.Sighand{}) != (image.SigAction{}) {
		t.Error("the action of SIGTRAP is not the process's own")
	}
}

// collectChild stops a child and reads everything it owns.
func collectChild(t *testing.T) *State {
	t.Helper()
	return collect(t, stopChild(t, "own"))
}

// stopChild stops a child.
func stopChild(t *testing.T, what string) *Source {
	t.Helper()
	pid := startChild(t, what)
	asleepIn(t, pid, unix.SYS_PAUSE)
	src := &Source{
		Pid: pid, Inner: 1, InnerTid: func(host int) int { return host - pid + 1 },
		Level: Innermost,
		Block: func(int) (bpf.RestartBlock, bool) { return bpf.RestartBlock{}, false },
		Warn:  func(string, ...any) {}, Now: monotonicNow(),
		Timers: func() (map[int32]bpf.Timer, bool) { return nil, false },
	}
	tids, err := Threads(pid)
	check(t, err)
	for _, tid := range tids {
		src.Threads = append(src.Threads, stop(t, pid, tid))
		status, err := ReadStatus(tid)
		check(t, err)
		src.Status = append(src.Status, status)
	}
	src.Stat, err = ReadStat(pid)
	check(t, err)
	src.Live, err = tracee.NewLive(pid)
	check(t, err)
	t.Cleanup(func() { _ = src.Live.Close() })
	return src
}

// collect reads everything that a stopped child owns.
func collect(t *testing.T, src *Source) *State {
	t.Helper()
	asked, err := src.Ask()
	check(t, err)
	tracee.RunAll(asked.Jobs)
	check(t, asked.Answer())
	st := asked.State
	if len(st.Task.Threads) != len(src.Threads) {
		t.Fatalf("%d threads, want %d", len(st.Task.Threads), len(src.Threads))
	}
	return st
}

// TestKept holds what the kernel keeps of threads, and what like ones have told,
// against what each tells itself.
func TestKept(t *testing.T) {
	src := stopChild(t, "diverse")
	told := collect(t, src)
	q, err := bpf.Threads()
	check(t, err)
	defer q.Close()
	all, err := q.Threads()
	check(t, err)
	src.Kept = func(tid int) (bpf.Thread, bool) { k, ok := all[tid]; return k, ok }
	asked, err := src.Ask()
	check(t, err)
	if n := len(src.Threads); len(asked.Jobs) > n-diverseAlike+2 || len(all) != n {
		t.Errorf("%d of %d threads are asked, %d are known", len(asked.Jobs), n, len(all))
	}
	tracee.RunAll(asked.Jobs)
	check(t, asked.Answer())
	if d := cmp.Diff(told.Task.Threads, asked.State.Task.Threads); d != "" {
		t.Errorf("threads (-told +kept)\n%s", d)
	}
	var seen [4]bool
	for i := range told.Task.Threads {
		th := &told.Task.Threads[i]
		for i, is := range []bool{th.Controls.NoTSC, th.Controls.MCEKill != 0, th.Policy != nil, th.Creds.Securebits != 0} {
			seen[i] = seen[i] || is
		}
	}
	if seen != [4]bool{true, true, true, true} {
		t.Errorf("not as diverse as they should be: %v", seen)
	}
}

func TestCollect(t *testing.T) {
	st := collectChild(t)
	task, leader := st.Task, &st.Task.Threads[0]
	if !task.Subreaper || task.THPDisable != 1 || task.Dumpable != 0 || task.OOMScoreAdj != 321 || task.ExitSignal != int32(unix.SIGCHLD) {
		t.Errorf("process: %+v", task)
	}
	if task.Rlimits[unix.RLIMIT_CORE] != (image.Rlimit{Cur: 1000, Max: 4000}) {
		t.Errorf("limit of core files: %+v", task.Rlimits[unix.RLIMIT_CORE])
	}
	near := cmp.Comparer(func(a, b int64) bool { return a == b || b > 0 && a > 0 && max(a, b)-min(a, b) < 20*second })
	timers := []image.PosixTimer{
		{ID: 1, Clock: unix.CLOCK_MONOTONIC, Signal: 41, Value: 0xfeed0001, Notify: sigevThreadID, Tid: 1},
		{ID: 2, Clock: unix.CLOCK_MONOTONIC, Signal: 42, Value: 0xfeed0002, Interval: 60*second + 1, Left: 3000*second + 2},
	}
	slices.SortFunc(task.Timers, func(a, b image.PosixTimer) int { return int(a.ID - b.ID) })
	if d := cmp.Diff(timers, task.Timers, near); d != "" {
		t.Errorf("timers (-want +got)\n%s", d)
	}
	if d := cmp.Diff([]image.ITimer{{Which: unix.ITIMER_PROF, Interval: 300e6, Value: 2000e6 + 17}}, task.ITimers, near); d != "" {
		t.Errorf("interval timers (-want +got)\n%s", d)
	}
	if string(leader.Comm) != oddName || leader.TimerSlack != 77_000 || leader.PDeathSig != int32(unix.SIGWINCH) || leader.IOPrio != 2<<13|5 || leader.Sched.Nice != 3 {
		t.Errorf("leader: %+v", leader)
	}
	if st.Brk == 0 || len(leader.XState) < 512 || len(leader.Regs) != tracee.RegsSize || leader.TidAddress == 0 && leader.RobustLen == 0 && leader.AltStack.SP == 0 {
		t.Errorf("cpu state of %d and %d bytes, brk %#x", len(leader.Regs), len(leader.XState), st.Brk)
	}
	if !slices.ContainsFunc(st.Sighand.Actions, func(a image.SigAction) bool { return a.Signal == int32(unix.SIGURG) && a.Handler > 1 }) {
		t.Errorf("Go's handler of SIGURG is missing: %+v", st.Sighand.Actions)
	}
}

// TestRestoreOwn makes again what a child owns and reads it in the same way.
func TestRestoreOwn(t *testing.T) {
	want := collectChild(t)
	leader := &want.Task.Threads[0]
	s := traceetest.Stub(t, traceetest.ServiceAt)
	full, err := Capabilities(s.Pid)
	check(t, err)
	leader.Rseq, leader.Tid, want.Task.Pid = nil, 1, 1    // its memory is not there
	want.Task.Threads[0].Controls.Personality = 0x0040000 // ADDR_NO_RANDOMIZE
	for i, v := range []uint32{40, 41, 40} {
		want.Task.Pending = append(want.Task.Pending, queued(unix.Signal(v), uint64(i)))
		leader.Pending = append(leader.Pending, queued(unix.Signal(v), uint64(100+i)))
	}
	var b tracee.Batch
	RestoreProcess(&b, want.Task, want.Sighand)
	RestoreThread(&b, leader, Held{Capabilities: full})
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	check(t, RestoreTimers(s, want.Task, &Clocks{}))
	RestoreLast(&b, want.Task, &Clocks{Now: func(int32) int64 { return monotonicNow() }})
	RestoreThreadLast(&b, want.Task, 0)
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	check(t, RestoreOOMScore(s.Pid, want.Task.OOMScoreAdj))
	compareOwn(t, s, want)
}

// compareOwn reads a stub with the functions of the checkpoint.
func compareOwn(t *testing.T, s *tracee.Stub, want *State) {
	t.Helper()
	src := &Source{Pid: s.Pid, Inner: 1, Threads: []*tracee.Thread{s.Thread}, InnerTid: func(int) int { return 1 }, Level: Innermost}
	status, err := ReadStatus(s.Pid)
	check(t, err)
	stat, err := ReadStat(s.Pid)
	check(t, err)
	src.Status, src.Stat = []*Status{status}, stat
	got := &State{Task: &image.Task{Pid: 1, ExitSignal: want.Task.ExitSignal, Threads: make([]image.Thread, 1)}}
	leader := &got.Task.Threads[0]
	check(t, src.outside(got.Task))
	check(t, src.threadOutside(0, leader))
	var b tracee.Batch
	done := []func(){askThread(&b, leader), askProcess(&b, got)}
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	for _, f := range done {
		f()
	}
	check(t, src.readPending(got))
	want.Task.Threads = want.Task.Threads[:1]
	want.Sighand.Actions = slices.DeleteFunc(want.Sighand.Actions, func(a image.SigAction) bool { return a.Signal == int32(unix.SIGTRAP) })
	near := cmp.Comparer(func(a, b int64) bool { return max(a, b)-min(a, b) < 20*second })
	opts := cmp.Options{
		cmpopts.EquateEmpty(), near, cmpopts.SortSlices(func(a, b image.PosixTimer) bool { return a.ID < b.ID }),
		cmpopts.IgnoreFields(image.Thread{}, "Tid", "Regs", "XState", "SigMask"), cmpopts.IgnoreFields(image.Task{}, "Stopped"),
	}
	if d := cmp.Diff(want.Task, got.Task, opts); d != "" {
		t.Errorf("task (-want +got)\n%s", d)
	}
	if d := cmp.Diff(want.Sighand, got.Sighand, opts); d != "" {
		t.Errorf("signal actions (-want +got)\n%s", d)
	}
}

// queued is the siginfo of sigqueue(3) with a value.
func queued(sig unix.Signal, value uint64) []byte {
	info := make([]byte, tracee.SigInfoSize)
	le := binary.LittleEndian
	le.PutUint32(info, uint32(sig))
	le.PutUint32(info[8:], uint32(0xffffffff)) // SI_QUEUE
	le.PutUint32(info[16:], uint32(os.Getpid()))
	le.PutUint64(info[24:], value)
	return info
}

// An installed chain must not grow, and the first filter that differs begins
// the image's own.
func TestSeccompChain(t *testing.T) {
	allow := []byte{6, 0, 0, 0, 0, 0, 0xff, 0x7f} // BPF_RET | BPF_K, SECCOMP_RET_ALLOW
	other := append([]byte{0x20, 0, 0, 0, 0, 0, 0, 0}, allow...)
	chain := []image.Filter{{Program: allow}, {Program: other, Flags: 2}}
	for _, c := range []struct {
		installed [][]byte
		calls     int
	}{{nil, 2}, {[][]byte{allow}, 1}, {[][]byte{allow, other}, 0}, {[][]byte{other}, 2}, {[][]byte{allow, other, other}, 0}} {
		var b tracee.Batch
		restoreSeccomp(&b, &image.Thread{SeccompMode: seccompFilter, Seccomp: chain}, c.installed)
		if len(b.Calls) != c.calls {
			t.Errorf("%d filters installed: %d more, want %d", len(c.installed), len(b.Calls), c.calls)
		}
	}
	s := traceetest.Stub(t, traceetest.ServiceAt)
	var b tracee.Batch
	restoreSeccomp(&b, &image.Thread{SeccompMode: seccompFilter, Seccomp: chain}, nil)
	if _, err := s.Run(&b); err != nil {
		t.Fatal(err)
	}
	got, err := seccompFilters(s.Thread, seccompFilter)
	check(t, err)
	if d := cmp.Diff(chain, got); d != "" {
		t.Errorf("filters (-want +got)\n%s", d)
	}
	if got, err := seccompFilters(s.Thread, 0); got != nil || err != nil {
		t.Errorf("without seccomp: %v, %v", got, err)
	}
}
