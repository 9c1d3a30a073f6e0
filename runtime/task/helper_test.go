package task

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// The test binary is, by this variable, one of the children that tests look at.
const childEnv = "OCICKPT_TEST_CHILD"

func init() {
	if os.Getenv(childEnv) != "" {
		runtime.LockOSThread() // the child's leader makes the child's calls
	}
}

func TestMain(m *testing.M) {
	if what := os.Getenv(childEnv); what != "" {
		beChild(what)
		os.Exit(1) // no child comes back
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Numbers and words of the children, as addresses that do not move.
var (
	longTime  = unix.Timespec{Sec: 1000, Nsec: 5}
	remainder = unix.Timespec{}
	futexWord = uint32(7)
	pollFD    = unix.PollFd{Fd: 0, Events: unix.POLLPRI}
)

func address[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }

// sleeps are calls that end with ERESTART_RESTARTBLOCK, made through the one
// syscall instruction of the Go runtime.
var sleeps = map[string]struct {
	nr   uintptr
	args [4]uintptr
	left time.Duration
}{
	"nanosleep":                 {unix.SYS_NANOSLEEP, [4]uintptr{address(&longTime)}, 1000 * time.Second},
	"nanosleep with remainder":  {unix.SYS_NANOSLEEP, [4]uintptr{address(&longTime), address(&remainder)}, 1000 * time.Second},
	"clock_nanosleep":           {unix.SYS_CLOCK_NANOSLEEP, [4]uintptr{unix.CLOCK_MONOTONIC, 0, address(&longTime), address(&remainder)}, 1000 * time.Second},
	"clock_nanosleep, realtime": {unix.SYS_CLOCK_NANOSLEEP, [4]uintptr{unix.CLOCK_REALTIME, 0, address(&longTime), address(&remainder)}, 1000 * time.Second},
	"poll":                      {unix.SYS_POLL, [4]uintptr{address(&pollFD), 1, 500_000}, 500 * time.Second},
	"poll for ever":             {unix.SYS_POLL, [4]uintptr{address(&pollFD), 1, uintptr(0xffffffff)}, -1},
	"poll of nothing":           {unix.SYS_POLL, [4]uintptr{0, 0, 500_000}, 500 * time.Second},
	"futex":                     {unix.SYS_FUTEX, [4]uintptr{address(&futexWord), 128, 7, address(&longTime)}, 1000 * time.Second},
	"futex, shared":             {unix.SYS_FUTEX, [4]uintptr{address(&futexWord), 0, 7, address(&longTime)}, 1000 * time.Second},
}

func beChild(what string) {
	if s, ok := sleeps[what]; ok {
		_, _, errno := unix.Syscall6(s.nr, s.args[0], s.args[1], s.args[2], s.args[3], 0, 0)
		fmt.Fprintln(os.Stderr, "child:", what, "ended:", errno)
		return
	}
	begin := own
	if what == "diverse" {
		begin = diverse
	}
	if err := begin(); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return
	}
	fmt.Println("ready")
	_, _, _ = unix.Syscall(unix.SYS_PAUSE, 0, 0, 0)
}

// oddName is what a hostile program may call itself.
const oddName = "a) R 1\n(b Z"

// own gives the child one of everything that a process and a thread may own.
func own() error {
	prctl := func(option int, arg uintptr) error { return unix.Prctl(option, arg, 0, 0, 0) }
	name, _ := unix.BytePtrFromString(oddName)
	for _, err := range []error{
		prctl(unix.PR_SET_CHILD_SUBREAPER, 1), prctl(unix.PR_SET_THP_DISABLE, 1), prctl(unix.PR_SET_TIMERSLACK, 77_000),
		prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGWINCH)), prctl(unix.PR_SET_DUMPABLE, 0), prctl(unix.PR_SET_NAME, address(name)),
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1000, Max: 4000}),
		unix.Setpriority(unix.PRIO_PROCESS, 0, 3),
		os.WriteFile("/proc/self/oom_score_adj", []byte("321"), 0),
	} {
		if err != nil {
			return err
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, 2<<13|5); errno != 0 {
		return errno
	}
	profile := unix.Itimerval{Interval: unix.Timeval{Sec: 300}, Value: unix.Timeval{Sec: 2000, Usec: 17}}
	if _, err := unix.Setitimer(unix.ITIMER_PROF, profile); err != nil {
		return err
	}
	return makeTimers()
}

// diverseAlike is how many of the diverse threads differ only in what the kernel
// tells of each.
const diverseAlike = 8

// diverse starts threads of which some have something of their own.
func diverse() error {
	const interleave = 3 // MPOL_INTERLEAVE
	node := uint64(1)
	calls := [][4]uintptr{
		{unix.SYS_PERSONALITY, 0x0040000}, // ADDR_NO_RANDOMIZE
		{unix.SYS_PRCTL, unix.PR_SET_TSC, tscSigsegv},
		{unix.SYS_PRCTL, unix.PR_MCE_KILL, mceKillSet, mceEarly},
		{unix.SYS_PRCTL, unix.PR_SET_SPECULATION_CTRL, 0, unix.PR_SPEC_DISABLE}, // not on every processor
		{unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, 1 << 6},                        // SECBIT_NO_CAP_AMBIENT_RAISE
		{unix.SYS_SET_MEMPOLICY, interleave, uintptr(unsafe.Pointer(&node)), 64},
		{unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1},
	}
	for i := range diverseAlike {
		calls = append(calls, [4]uintptr{unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, uintptr(60_000 + i)}, [4]uintptr{unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(1 + i)})
	}
	ready := make(chan bool)
	for _, c := range calls {
		go func() {
			runtime.LockOSThread()
			ready <- true
			_, _, _ = unix.RawSyscall(c[0], c[1], c[2], c[3])
			for {
				_, _, _ = unix.Syscall(unix.SYS_PAUSE, 0, 0, 0)
			}
		}()
		<-ready
	}
	time.Sleep(50 * time.Millisecond)
	runtime.KeepAlive(&node)
	return nil
}

// makeTimers leaves timers 1, disarmed, and 2, armed; 0 is deleted.
func makeTimers() error {
	for i := range 3 {
		var event [64]byte
		binary.LittleEndian.PutUint64(event[:], 0xfeed0000+uint64(i))
		binary.LittleEndian.PutUint32(event[8:], uint32(40+i))
		if i == 1 {
			binary.LittleEndian.PutUint32(event[12:], sigevThreadID)
			binary.LittleEndian.PutUint32(event[16:], uint32(unix.Gettid()))
		}
		var id int32
		if _, _, errno := unix.Syscall(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&event)), address(&id)); errno != 0 {
			return errno
		}
	}
	spec := [2]unix.Timespec{{Sec: 60, Nsec: 1}, {Sec: 3000, Nsec: 2}}
	if _, _, errno := unix.Syscall6(unix.SYS_TIMER_SETTIME, 2, 0, address(&spec), 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_TIMER_DELETE, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// startChild starts the test binary as a child; the test goes on in the thread
// that may trace it.
func startChild(t *testing.T, what string) (pid int) {
	t.Helper()
	lock(t)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), childEnv+"="+what)
	c.Stderr = os.Stderr
	_, err := c.StdinPipe() // nothing ever comes
	check(t, err)
	out, err := c.StdoutPipe()
	check(t, err)
	check(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	if _, sleeps := sleeps[what]; sleeps {
		return c.Process.Pid
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the child says %q: %v", line, err)
	}
	return c.Process.Pid
}

func lock(t *testing.T) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// asleepIn waits until a process's leader sleeps in a system call.
func asleepIn(t *testing.T, pid int, nr uint64) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		check(t, err)
		f := strings.Fields(string(b))
		noTimeout := nr == unix.SYS_FUTEX && len(f) > 4 && f[4] == "0x0" // the Go runtime's own
		if f[0] == strconv.FormatUint(nr, 10) && !noTimeout {
			return
		}
	}
	t.Fatalf("task %d never slept in system call %d", pid, nr)
}

// stop seizes and stops one thread.
func stop(t *testing.T, pid, tid int) *tracee.Thread {
	t.Helper()
	th, err := tracee.Seize(pid, tid, tracee.LiveOptions)
	check(t, err)
	if tid != pid { // the kernel reports a leader only when its tracer has reaped the others
		t.Cleanup(func() {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(tid, nil, unix.WALL, nil)
		})
	}
	check(t, th.Interrupt())
	check(t, th.WaitInterrupt(5*time.Second))
	return th
}
