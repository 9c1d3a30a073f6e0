package bpf

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRestartBlocks(t *testing.T) {
	lock(t)
	q, err := RestartBlocks()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	const length = 1000 * time.Second
	started := monotonic()
	pid := asleep(t, unix.SYS_CLOCK_NANOSLEEP, "sleep", "1000")
	if blocks, err := q.RestartBlocks(); err != nil || len(blocks) != 0 {
		t.Errorf("nobody is traced: %v, %v", blocks, err)
	}
	traced(t, pid)
	stopped := monotonic()
	blocks, err := q.RestartBlocks()
	if err != nil {
		t.Fatal(err)
	}
	b, ok := blocks[pid]
	if !ok || len(blocks) != 1 {
		t.Fatalf("blocks of %v, want one of %d", blocks, pid)
	}
	if b.Fn != "hrtimer_nanosleep_restart" || b.Nanosleep.Clock != unix.CLOCK_MONOTONIC {
		t.Errorf("restart block %+v", b)
	}
	if e := time.Duration(b.Nanosleep.Expires); e < started+length || e > stopped+length+time.Millisecond {
		t.Errorf("the sleep ends at %v, want between %v and %v", e, started+length, stopped+length)
	}
}

// lock keeps a test on one thread: a tracer is a thread (ptrace(2)).
func lock(t *testing.T) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

func monotonic() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// asleep starts a program and waits until it sleeps in a system call.
func asleep(t *testing.T, call int, args ...string) int {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", c.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(b), fmt.Sprintf("%d ", call)) {
			return c.Process.Pid
		}
	}
	t.Fatalf("%v never slept in system call %d", args, call)
	return 0
}

func BenchmarkLoad(b *testing.B) {
	for b.Loop() {
		q, err := RestartBlocks()
		if err != nil {
			b.Fatal(err)
		}
		_ = q.Close()
	}
}

func BenchmarkAsk(b *testing.B) {
	q, err := RestartBlocks()
	if err != nil {
		b.Fatal(err)
	}
	defer q.Close()
	for b.Loop() {
		if _, err := q.RestartBlocks(); err != nil {
			b.Fatal(err)
		}
	}
}
