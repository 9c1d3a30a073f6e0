package tracee

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestStop(t *testing.T) {
	for _, c := range []struct {
		stop                 Stop
		syscall, interrupted bool
		text                 string
	}{
		{Stop{Exited: true}, false, false, "exit"},
		{Stop{Signal: unix.SIGTRAP | 0x80}, true, false, "syscall stop"},
		{Stop{Signal: unix.SIGTRAP, Event: eventStop}, false, true, "event 128 (trace/breakpoint trap)"},
		{Stop{Signal: unix.SIGTRAP, Event: unix.PTRACE_EVENT_EXEC}, false, false, "event 4 (trace/breakpoint trap)"},
		{Stop{Signal: unix.SIGUSR1}, false, false, "stop by user defined signal 1"},
	} {
		if c.stop.Syscall() != c.syscall || c.stop.Interrupted() != c.interrupted || c.stop.String() != c.text {
			t.Errorf("%+v is %q", c.stop, c.stop)
		}
	}
}

func TestSeizeErrors(t *testing.T) {
	lock(t)
	c := exec.Command("true")
	must(t, c.Run())
	if _, err := Seize(c.Process.Pid, c.Process.Pid, LiveOptions); !errors.Is(err, ErrGone) {
		t.Errorf("seize of a task that is gone: %v", err)
	}
	var b [8]byte
	if err := ReadMemory(c.Process.Pid, 0x1000, b[:]); !errors.Is(err, ErrGone) {
		t.Errorf("its memory: %v", err)
	}
	if err := WriteMemory(os.Getpid(), 8, b[:]); !errors.Is(err, unix.EFAULT) {
		t.Errorf("unmapped memory: %v", err)
	}
}

// Registers, masks and pending signals read back as they were written.
func TestStateOfThread(t *testing.T) {
	s := newStub(t)
	r, err := s.Regs()
	must(t, err)
	r.R13, r.R14 = 0x1122334455667788, 42
	must(t, s.SetRegs(r))
	got, err := s.Regs()
	must(t, err)
	if got != r {
		t.Errorf("registers %+v, want %+v", got, r)
	}
	if again, err := DecodeRegs(r.Encode()); err != nil || again != r || len(r.Encode()) != RegsSize {
		t.Errorf("encoded and decoded: %+v, %v", again, err)
	}
	x, err := s.XState()
	must(t, err)
	x[160] ^= 0x5a                            // xmm0
	binary.LittleEndian.PutUint64(x[512:], 3) // XSTATE_BV: x87 and SSE are in use
	must(t, s.SetXState(x))
	if y, err := s.XState(); err != nil || !bytes.Equal(x[:416], y[:416]) {
		t.Errorf("extended state differs, %v", err)
	}
	const mask = 1<<(unix.SIGUSR1-1) | 1<<(unix.SIGUSR2-1)
	must(t, s.SetSigMask(^uint64(0)))
	if m, err := s.SigMask(); err != nil || m != ^uint64(1<<(unix.SIGKILL-1)|1<<(unix.SIGSTOP-1)) {
		t.Errorf("mask %#x, %v", m, err)
	}
	must(t, s.SetSigMask(mask))
	if m, err := s.SigMask(); err != nil || m != mask {
		t.Errorf("mask %#x, %v", m, err)
	}
}

func TestPendingSignals(t *testing.T) {
	s := newStub(t)
	const many = 70 // more than are read at a time
	for range many {
		if _, _, errno := unix.Syscall6(unix.SYS_RT_SIGQUEUEINFO, uintptr(s.Pid), 40, address(queued(40)), 0, 0, 0); errno != 0 {
			t.Fatal(errno)
		}
	}
	must(t, unix.Tgkill(s.Pid, s.Tid, unix.SIGUSR1))
	shared, err := s.PendingSignals(true, 0)
	must(t, err)
	own, err := s.PendingSignals(false, 0)
	must(t, err)
	if len(shared) != many || len(own) != 1 || own[0][0] != byte(unix.SIGUSR1) {
		t.Fatalf("%d and %d signals", len(shared), len(own))
	}
	for _, info := range shared {
		if !bytes.Equal(info[:12], queued(40)[:12]) || len(info) != SigInfoSize {
			t.Errorf("siginfo %x", info)
		}
	}
}

func TestWaitInterrupt(t *testing.T) {
	lock(t)
	c := exec.Command("sleep", "1000")
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	pid := c.Process.Pid
	th, err := Seize(pid, pid, LiveOptions)
	must(t, err)
	if err := th.WaitInterrupt(20 * time.Millisecond); !errors.Is(err, ErrNoStop) {
		t.Errorf("nobody has asked for a stop: %v", err)
	}
	must(t, unix.Kill(pid, unix.SIGWINCH)) // arrives first, and is delivered
	must(t, th.Interrupt())
	must(t, th.WaitInterrupt(5*time.Second))
	must(t, th.Detach(0))
	th, err = Seize(pid, pid, LiveOptions)
	must(t, err)
	must(t, unix.Kill(pid, unix.SIGKILL))
	if err := th.WaitInterrupt(5 * time.Second); !errors.Is(err, ErrGone) {
		t.Errorf("a killed task: %v", err)
	}
}

// TestRegsOnGrowingStack reads registers at every depth of a new goroutine's
// stack: at some of them the stack has to grow, and to move, within the call.
func TestRegsOnGrowingStack(t *testing.T) {
	c := exec.Command("sleep", "1000")
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	pid := c.Process.Pid
	for depth := range 200 {
		failed := make(chan error)
		go func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			failed <- readDeep(pid, depth)
		}()
		if err := <-failed; err != nil {
			t.Fatalf("at depth %d: %v", depth, err)
		}
	}
}

// readDeep seizes a task in a frame that has room and reads its registers in
// one that lies deeper.
func readDeep(pid, depth int) error {
	th, err := Seize(pid, pid, LiveOptions)
	if err == nil {
		err = th.Interrupt()
	}
	if err == nil {
		err = th.WaitInterrupt(5 * time.Second)
	}
	if err != nil {
		return err
	}
	err = atDepth(depth, func() error {
		r, err := th.Regs()
		if err == nil && r.Rip == 0 {
			err = errors.New("no registers were read")
		}
		return err
	})
	return errors.Join(err, th.Detach(0))
}

//go:noinline
func atDepth(n int, f func() error) error {
	var frame [5]uint64
	if n == 0 {
		return f()
	}
	frame[n%5]++
	err := atDepth(n-1, f)
	frame[(n+1)%5]++
	return err
}

// queued is the siginfo of sigqueue(3).
func queued(sig byte) []byte {
	info := make([]byte, SigInfoSize)
	info[0] = sig
	binary.LittleEndian.PutUint32(info[8:], 0xffffffff) // SI_QUEUE
	return info
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }
