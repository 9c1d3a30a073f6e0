package bpf

import (
	"os"
	"os/exec"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const timerEnv = "OCICKPT_TEST_TIMERS"

func TestMain(m *testing.M) {
	if os.Getenv(timerEnv) != "" {
		haveTimers()
	}
	if os.Getenv(aioEnv) != "" {
		haveAIO()
	}
	if os.Getenv(undoEnv) != "" {
		haveUndos()
	}
	os.Exit(m.Run())
}

// deadline is far from now by any clock.
const deadline = 4_000_000_000

// haveTimers makes a process with timers 0, relative, and 1, absolute, by wall
// clock, and 2 on its cpu clock, and says that they are there by its output.
func haveTimers() {
	for id, clock := range []int32{unix.CLOCK_REALTIME, unix.CLOCK_REALTIME, unix.CLOCK_PROCESS_CPUTIME_ID} {
		var event [64]byte
		event[12] = 1 // sigev_notify: SIGEV_NONE
		var got int32
		spec := [4]int64{0, 0, 1000, 0}
		flags := 0
		if id == 1 {
			spec[2], flags = deadline, 1 // TIMER_ABSTIME
		}
		_, _, _ = unix.Syscall(unix.SYS_TIMER_CREATE, uintptr(clock), uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&got)))
		_, _, _ = unix.Syscall6(unix.SYS_TIMER_SETTIME, uintptr(got), uintptr(flags), uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	}
	_, _ = os.Stdout.Write([]byte("x"))
	time.Sleep(time.Hour)
}

func TestTimers(t *testing.T) {
	lock(t)
	q, err := Timers()
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	pid, _ := helper(t, timerEnv, 0)
	all, err := q.Timers()
	if err != nil {
		t.Fatal(err)
	}
	got := all[pid]
	if len(all) != 1 || len(got) != 3 {
		t.Fatalf("timers %+v, want three of %d", all, pid)
	}
	if g := got[0]; g.Base != unix.CLOCK_MONOTONIC || g.Expires < int64(monotonic()) || g.Expires > int64(monotonic()+1000*time.Second) {
		t.Errorf("relative timer: %+v", g)
	}
	if g := got[1]; g.Base != unix.CLOCK_REALTIME || g.Expires != deadline*1e9 {
		t.Errorf("absolute timer: %+v", g)
	}
	if g := got[2]; g.Tid != pid {
		t.Errorf("timer on the cpu clock of %d: %+v", pid, g)
	}
}

// helper runs the test program as what the variable says, and stops it once it
// has said something.
func helper(t *testing.T, env string, namespaces uintptr) (pid int, said []byte) {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), env+"=1")
	c.SysProcAttr = &unix.SysProcAttr{Cloneflags: namespaces}
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	said = make([]byte, 16)
	n, err := out.Read(said)
	if err != nil {
		t.Fatal(err)
	}
	traced(t, c.Process.Pid)
	return c.Process.Pid, said[:n]
}

// traced stops a thread.
func traced(t *testing.T, pid int) {
	t.Helper()
	th, err := tracee.Seize(pid, pid, tracee.LiveOptions)
	if err == nil {
		err = th.Interrupt()
	}
	if err == nil {
		err = th.WaitInterrupt(time.Second)
	}
	if err != nil {
		t.Fatal(err)
	}
}
