package tracee

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A test that kills the tracer runs this binary again as the tracer, with the
// target's pid and the number of visits in this variable.
const tracerEnv = "OCICKPT_TEST_TRACER"

func TestMain(m *testing.M) {
	if spec := os.Getenv(tracerEnv); spec != "" {
		var pid, visits int
		if _, err := fmt.Sscan(spec, &pid, &visits, &together); err != nil {
			panic(err)
		}
		runtime.LockOSThread()
		for range visits {
			if err := visitPatiently(pid); err != nil {
				fmt.Fprintln(os.Stderr, "tracer:", err)
				os.Exit(1)
			}
		}
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	var err error
	if buildDir, err = os.MkdirTemp("", "tracee"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(code)
}

// ---- targets ----

// target is a program under test, and the counters that it keeps.
type target struct {
	t   *testing.T
	pid int
	mem []byte
}

// Fields of struct state in testdata/target.c.
const (
	rounds = iota
	errorCount
	errorCode
	eintr
	signals
	value
	tid
	late
)

func (g *target) get(thread, field int) uint64 {
	return binary.LittleEndian.Uint64(g.mem[thread*64+field*8:])
}

func (g *target) command(c uint64) { binary.LittleEndian.PutUint64(g.mem[63*64+value*8:], c) }

var buildDir string

// build makes a program of testdata, once.
func build(t *testing.T, name string, command ...string) string {
	t.Helper()
	path := filepath.Join(buildDir, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if out, err := exec.Command(command[0], append(command[1:], "-o", path)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", command, err, out)
	}
	return path
}

func cTarget(t *testing.T) string {
	args := []string{"gcc", "-O1", "-pthread", "testdata/target.c", "testdata/spin.S"}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(cpu, []byte("avx512bw")) {
		args = append(args, "-DWIDE")
	}
	return build(t, "ctarget", args...)
}

// narrowTarget is the same program as 32-bit code.
func narrowTarget(t *testing.T) string {
	return build(t, "ctarget32", "gcc", "-m32", "-O1", "-pthread", "testdata/target.c", "testdata/spin32.S")
}

func goTarget(t *testing.T) string {
	t.Helper()
	path := filepath.Join(buildDir, "gotarget")
	if out, err := exec.Command("go", "build", "-o", path, "./testdata/gotarget").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// start runs a program with the name of its counter file in place of "FILE".
func start(t *testing.T, argv ...string) *target {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "state")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	for i := range argv {
		if argv[i] == "FILE" {
			argv[i] = f.Name()
		}
	}
	c := exec.Command("nice", append([]string{"-n", "10"}, argv...)...) // they spin; we have the way
	c.Env = append(os.Environ(), "GLIBC_TUNABLES=glibc.pthread.rseq=0")
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	// Nobody waits for it before the end: a wait by another thread of a tracer,
	// even for an exit only, takes its stops away (kernel/exit.c, wait_task_stopped).
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
		_ = unix.Munmap(mem)
	})
	return &target{t: t, pid: c.Process.Pid, mem: mem}
}

func (g *target) waitReady() *target {
	g.t.Helper()
	g.eventually("ready", func() bool { return g.get(62, rounds) == 1 })
	return g
}

func (g *target) eventually(what string, ok func() bool) {
	g.t.Helper()
	for deadline := time.Now().Add(3 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		g.alive()
		if time.Now().After(deadline) {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.pid))
			call, _ := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", g.pid))
			g.t.Fatalf("target is not %s:\n%s%s", what, status, call)
		}
	}
}

func (g *target) alive() {
	g.t.Helper()
	if g.ended() {
		g.t.Fatal("the target ended")
	}
}

func (g *target) ended() bool {
	dead, err := (&Thread{Tid: g.pid, Pid: g.pid}).dead()
	return dead || err != nil
}

// undisturbed asserts that the threads given counted no error and go on.
func (g *target) undisturbed(threads ...int) {
	g.t.Helper()
	before := map[int]uint64{}
	for _, i := range threads {
		before[i] = g.get(i, rounds)
	}
	for _, i := range threads {
		g.eventually(fmt.Sprintf("going on in thread %d", i), func() bool { return g.get(i, rounds) > before[i] })
		if n := g.get(i, errorCount); n != 0 {
			g.t.Errorf("thread %d: %d errors, the first of code %d", i, n, g.get(i, errorCode))
		}
		if n := g.get(i, eintr); n != 0 {
			g.t.Errorf("thread %d: %d calls failed with EINTR", i, n)
		}
	}
}

// allThreads are those of mode "all" that count rounds. 10 pauses for ever.
var allThreads = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13}

func startAll(t *testing.T) *target {
	return start(t, cTarget(t), "FILE", "all").waitReady()
}

func (g *target) maps() string {
	g.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", g.pid))
	if err != nil {
		g.t.Fatal(err)
	}
	return string(b)
}

// ---- the tracer's side ----

// stopped seizes and stops every thread of a process.
func stopAll(pid int) ([]*Thread, error) {
	var threads []*Thread
	known := map[string]bool{}
	for again := true; again; {
		again = false
		dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return threads, err
		}
		for _, e := range dir {
			if known[e.Name()] {
				continue
			}
			id, err := strconv.Atoi(e.Name())
			if err != nil {
				return threads, err
			}
			th, err := seizePatiently(pid, id)
			if errors.Is(err, ErrGone) {
				continue
			}
			if err != nil {
				return threads, err
			}
			known[e.Name()], again = true, true
			threads = append(threads, th)
			if err := th.Interrupt(); err != nil {
				return threads, err
			}
		}
		for _, th := range threads {
			if err := th.WaitInterrupt(time.Second); err != nil {
				return threads, err
			}
		}
	}
	return threads, nil
}

// seizePatiently waits until the kernel has let a dead tracer's thread go.
func seizePatiently(pid, tid int) (th *Thread, err error) {
	for range 1000 {
		if th, err = Seize(pid, tid, LiveOptions); !errors.Is(err, unix.EPERM) {
			return th, err
		}
		time.Sleep(50 * time.Microsecond)
	}
	return th, err
}

// withStopped runs f with all threads of a process stopped and none busy.
func withStopped(pid int, f func(*Live, []*Thread) error) (err error) {
	threads, err := stopAll(pid)
	defer func() {
		for _, th := range threads {
			if e := th.Detach(0); e != nil && err == nil && !errors.Is(e, ErrGone) {
				err = e
			}
		}
	}()
	if err != nil {
		return err
	}
	l, err := NewLive(pid)
	if err != nil {
		return err
	}
	defer l.Close()
	for _, th := range threads {
		if err := l.Settle(th, time.Second); err != nil {
			return err
		}
	}
	return f(l, threads)
}

// sampleBatch asks for what a checkpoint asks for: handlers, alternate stack ...
func sampleBatch() *Batch {
	b := new(Batch)
	b.Add(unix.SYS_GETPPID)
	for sig := range 64 {
		b.Add(unix.SYS_RT_SIGACTION, W(sig+1), W(0), b.Reserve(32), W(8))
	}
	b.Add(unix.SYS_SIGALTSTACK, W(0), b.Reserve(24))
	b.Add(unix.SYS_BRK)
	return b
}

// together makes visits be those of RunAll.
var together bool

func visitOnce(pid int) error {
	b := sampleBatch()
	return withStopped(pid, func(l *Live, threads []*Thread) error {
		if together {
			return visitTogether(l, threads)
		}
		for _, th := range threads {
			if err := l.Run(th, b); err != nil {
				return err
			}
		}
		return nil
	})
}

func visitTogether(l *Live, threads []*Thread) error {
	var jobs []*Job
	ran := 0
	for _, th := range threads {
		jobs = append(jobs, &Job{Live: l, Thread: th, Batch: sampleBatch(), Ran: func() { ran++ }})
	}
	RunAll(jobs)
	for _, j := range jobs {
		if j.Err != nil {
			return j.Err
		}
		if parent := j.Batch.Calls[0].Ret; parent <= 0 || j.Batch.Calls[len(j.Batch.Calls)-1].Ret <= 0 {
			return fmt.Errorf("thread %d has not run its batch", j.Thread.Tid)
		}
	}
	if ran != len(jobs) {
		return fmt.Errorf("%d of %d jobs have run", ran, len(jobs))
	}
	return nil
}

// visitPatiently tries again while an earlier tracer's slots cannot be reused.
func visitPatiently(pid int) error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		err := visitOnce(pid)
		var none *NoSlotError
		if !errors.As(err, &none) || time.Now().After(deadline) {
			return err
		}
	}
}

// lock keeps the test on the OS thread that traces.
func lock(t *testing.T) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// ---- tests ----

func TestCaveLayout(t *testing.T) {
	if n := binary.Size(slotHeader{}); n != slotHeaderSize {
		t.Errorf("header of %#x bytes", n)
	}
	if n := bytes.Count(caveCode[slotHeaderSize:], []byte{0x0f, 0x05}); n != 7 {
		t.Errorf("%d syscall instructions, want 7", n)
	}
	if len(caveCode)%8 != 0 {
		t.Errorf("the address behind the last jump is at %#x, unaligned", len(caveCode))
	}
	t.Logf("slot: %#x bytes; places %+v", slotSize, places)
}

func TestRun(t *testing.T) {
	lock(t)
	for _, program := range []string{cTarget(t), narrowTarget(t)} {
		g := start(t, program, "FILE", "all").waitReady()
		before := g.maps()
		for i := range 100 {
			together = i%2 == 1
			if err := visitOnce(g.pid); err != nil {
				t.Fatal(err)
			}
		}
		together = false
		g.undisturbed(allThreads...)
		if n := g.get(10, errorCount); n != 0 {
			t.Error("pause returned")
		}
		if after := g.maps(); after != before {
			t.Errorf("maps: %s", difference(before, after))
		}
	}
}

func TestRunResults(t *testing.T) {
	lock(t)
	g := startAll(t)
	err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
		for _, th := range threads {
			if err := checkResults(t, g, l, th); err != nil {
				return fmt.Errorf("thread %d: %w", th.Tid, err)
			}
		}
		s, err := l.cave.read(l.cave.slots[0])
		if !s.empty {
			t.Error("the slot was not emptied")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	g.undisturbed(allThreads...)
}

func checkResults(t *testing.T, g *target, l *Live, th *Thread) error {
	before, mask, x, err := everything(th)
	if err != nil {
		return err
	}
	b := new(Batch)
	pid := b.Add(unix.SYS_GETPID)
	tid := b.Add(unix.SYS_GETTID)
	bad := b.Try(unix.SYS_CLOSE, W(-1))
	big := b.Reserve(70_000)
	cwd := b.Add(unix.SYS_GETCWD, big.Plus(60_000), W(10_000))
	if err := l.Run(th, b); err != nil {
		return err
	}
	if b.Calls[pid].Ret != int64(g.pid) || b.Calls[tid].Ret != int64(th.Tid) || b.Err(bad) != unix.EBADF {
		t.Errorf("results %+v", b.Calls)
	}
	here, err := os.Getwd()
	if err != nil {
		return err
	}
	if got := string(b.At(big.Plus(60_000), int(b.Calls[cwd].Ret))); got != here+"\x00" {
		t.Errorf("getcwd %q", got)
	}

	b.Reset()
	b.Add(unix.SYS_GETPID)
	failing := b.Add(unix.SYS_CLOSE, W(-1))
	behind := b.Add(unix.SYS_GETPID)
	var callErr *CallError
	if err := l.Run(th, b); !errors.As(err, &callErr) {
		return fmt.Errorf("no CallError: %v", err)
	}
	if callErr.Index != failing || callErr.Errno != unix.EBADF || callErr.Nr != unix.SYS_CLOSE || b.Calls[behind].Ret != 0 {
		t.Errorf("%+v; behind it: %+v", callErr, b.Calls[behind])
	}

	after, maskAfter, xAfter, err := everything(th)
	if before != after || mask != maskAfter || !bytes.Equal(x, xAfter) {
		t.Errorf("thread %d: registers, mask or extended state differ:\n%+v\n%+v", th.Tid, before, after)
	}
	return err
}

func everything(th *Thread) (r Regs, mask uint64, x []byte, err error) {
	r, e1 := th.Regs()
	mask, e2 := th.SigMask()
	x, e3 := th.XState()
	return r, mask, x, errors.Join(e1, e2, e3)
}

// tracer starts this binary as a tracer.
func tracer(t *testing.T, pid, visits int, plan string) *exec.Cmd {
	t.Helper()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %v", tracerEnv, pid, visits, together), "OCICKPT_FAULT="+plan, "GOMAXPROCS=1", "GOGC=off")
	c.Stderr = new(bytes.Buffer)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// killed asserts that the tracer was killed, rather than failed.
func killed(t *testing.T, c *exec.Cmd) {
	t.Helper()
	_ = c.Wait()
	if ws := c.ProcessState.Sys().(interface{ Signaled() bool }); !ws.Signaled() {
		t.Fatalf("tracer: %v: %s", c.ProcessState, c.Stderr)
	}
}

var livePoints = []string{PointSlot, PointPark, PointBlock, PointEnter, PointMap, PointFill, PointArm,
	PointBatch, PointUnmap, PointUnblock, PointRestore, PointClear, PointDone}

// Killed at every point, in each of the threads in turn, the tracer leaves a
// target that notices nothing, and that the next tracer can visit.
func TestKilledAtEveryPoint(t *testing.T) {
	t.Run("one by one", testKilledAtEveryPoint)
	together = true
	defer func() { together = false }()
	t.Run("together", testKilledAtEveryPoint)
}

func testKilledAtEveryPoint(t *testing.T) {
	lock(t)
	for name, g := range map[string]*target{
		"C":      startAll(t),
		"32-bit": start(t, narrowTarget(t), "FILE", "all").waitReady(),
		"Go":     start(t, goTarget(t), "FILE").waitReady(),
	} {
		before := g.maps()
		for _, point := range livePoints {
			for n := 1; n <= 5; n += 2 {
				killed(t, tracer(t, g.pid, 2, fmt.Sprintf("%s#%d:kill", point, n)))
				g.alive()
			}
		}
		if err := visitPatiently(g.pid); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if name != "Go" {
			g.undisturbed(allThreads...)
			sameMaps(t, before, g)
		} else {
			g.undisturbed(0)
		}
	}
}

// sameMaps waits until every thread has had the time for its cure.
func sameMaps(t *testing.T, before string, g *target) {
	t.Helper()
	after := g.maps()
	for range 100 {
		if after == before {
			return
		}
		time.Sleep(10 * time.Millisecond)
		after = g.maps()
	}
	t.Errorf("maps: %s", difference(before, after))
}

// difference shows the lines that only one of two texts has.
func difference(before, after string) string {
	var out strings.Builder
	for _, side := range []struct{ sign, text, other string }{{"-", before, after}, {"+", after, before}} {
		for line := range strings.Lines(side.text) {
			if !strings.Contains(side.other, line) {
				fmt.Fprintf(&out, "\n%s%s", side.sign, strings.TrimSpace(line))
			}
		}
	}
	return out.String()
}

// Killed at any moment, not only at points that we thought of.
func TestKilledAtRandom(t *testing.T) {
	lock(t)
	busybox := start(t, "/bin/busybox", "sh", "-c", "i=0; while :; do i=$((i+1)); [ $i = $((i*1)) ] || exit 9; done")
	time.Sleep(50 * time.Millisecond)
	targets := []*target{startAll(t), start(t, goTarget(t), "FILE").waitReady(), busybox, start(t, narrowTarget(t), "FILE", "all").waitReady()}
	before, narrow := targets[0].maps(), targets[3].maps()
	inside, kills, used := 0, 600, map[int]string{}
	if testing.Short() {
		kills = 60
	}
	for i := range kills {
		g := targets[i%len(targets)]
		together = i/len(targets)%2 == 1
		c := tracer(t, g.pid, 1<<30, "")
		time.Sleep(time.Duration(2_000+rand.IntN(20_000)) * time.Microsecond)
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		killed(t, c)
		if left := slots(t, g.pid); left != used[g.pid] {
			used[g.pid] = left
			inside++
		}
		for _, g := range targets {
			g.alive()
		}
	}
	together = false
	t.Logf("%d of %d kills were within a Run", inside, kills)
	if inside < kills/100 {
		t.Error("the kills miss what they are meant for")
	}
	for _, g := range targets {
		if err := visitPatiently(g.pid); err != nil {
			t.Fatal(err)
		}
	}
	targets[0].undisturbed(allThreads...)
	targets[1].undisturbed(0)
	targets[3].undisturbed(allThreads...)
	sameMaps(t, before, targets[0])
	sameMaps(t, narrow, targets[3])
	busy := cpuTime(t, busybox.pid)
	busybox.eventually("going on", func() bool { return cpuTime(t, busybox.pid) != busy })
}

// slots is what tracers that died within a Run have left in a process.
func slots(t *testing.T, pid int) string {
	t.Helper()
	l, err := NewLive(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var all []byte
	for _, at := range l.cave.slots {
		b := make([]byte, slotSize)
		if _, err := l.cave.mem.ReadAt(b, int64(at)); err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return string(all)
}

// cpuTime is the processor time a process has had in user space, in ticks.
func cpuTime(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')'):]))[12]
}

// A fault injected at every point makes Run fail and leaves the thread as it was.
func TestFailAtEveryPoint(t *testing.T) {
	g := startAll(t)
	before := g.maps()
	for i, point := range append(livePoints, livePoints...) {
		together = i >= len(livePoints)
		c := tracer(t, g.pid, 1, point+"#3:fail")
		if err := c.Wait(); err == nil || !strings.Contains(fmt.Sprint(c.Stderr), "injected fault") {
			t.Errorf("%s: %v: %s", point, err, c.Stderr)
		}
	}
	together = false
	g.undisturbed(allThreads...)
	sameMaps(t, before, g)
}

// The signal by which threads report, and what happens where there is none.
func TestReportSignals(t *testing.T) {
	lock(t)
	for mode, want := range map[string]unix.Signal{"cont": unix.SIGCONT, "caught": 0} {
		g := start(t, cTarget(t), "FILE", mode).waitReady()
		err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
			v, err := l.prepare(threads[1], nil)
			if err == nil && v.report != want {
				t.Errorf("mode %s reports by %v", mode, v.report)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		before := g.maps()
		for range 5 {
			if err := visitOnce(g.pid); err != nil {
				t.Fatal(mode, err)
			}
		}
		for _, point := range append(livePoints, PointRest) {
			if want != 0 && point == PointRest {
				continue
			}
			killed(t, tracer(t, g.pid, 2, point+"#2:kill"))
		}
		if err := visitPatiently(g.pid); err != nil {
			t.Fatal(mode, err)
		}
		g.undisturbed(0, 4)
		sameMaps(t, before, g)
		if n := g.get(0, signals); n != 0 {
			t.Errorf("mode %s: the target caught %d of our signals", mode, n)
		}
	}
}

// Without room for its siginfo the report still arrives.
func TestNoRoomForSignals(t *testing.T) {
	lock(t)
	g := start(t, cTarget(t), "FILE", "cont").waitReady()
	if err := unix.Prlimit(g.pid, unix.RLIMIT_SIGPENDING, &unix.Rlimit{}, nil); err != nil {
		t.Fatal(err)
	}
	if err := visitOnce(g.pid); err != nil {
		t.Fatal(err)
	}
	g.undisturbed(0, 4)
}

// fieldOf reads a field of /proc/PID/status.
func fieldOf(t *testing.T, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(regexp.MustCompile(`(?m)^` + name + `:\s*(.*)$`).FindSubmatch(b)[1])
}

func (g *target) isStopped() bool { return strings.HasPrefix(fieldOf(g.t, g.pid, "State"), "T") }

// A SIGSTOP in mid-batch stops the process once we have left it, and one sent
// before stays in force while we visit; SIGCONT then ends either.
func TestGroupStop(t *testing.T) {
	lock(t)
	for _, mode := range []string{"all", "cont", "caught"} {
		g := start(t, cTarget(t), "FILE", mode).waitReady()
		before := g.maps()
		for i := range 8 {
			err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
				for j, th := range threads {
					if j == i%len(threads) {
						b := sampleBatch()
						b.Calls = append(b.Calls, b.Calls...)
						// The process stops itself: as mid-batch as can be.
						b.Calls[40].Nr, b.Calls[40].Args = unix.SYS_KILL, [6]Word{W(g.pid), W(int(unix.SIGSTOP))}
						if err := l.Run(th, b); err != nil {
							return err
						}
						continue
					}
					if err := l.Run(th, sampleBatch()); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(mode, err)
			}
			g.eventually("stopped", g.isStopped)
			if err := visitOnce(g.pid); err != nil {
				t.Fatal(mode, err)
			}
			g.eventually("stopped again", g.isStopped)
			time.Sleep(2 * time.Millisecond)
			if !g.isStopped() {
				t.Fatalf("mode %s: a visit ended the group stop", mode)
			}
			if err := unix.Kill(g.pid, unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			g.eventually("continued", func() bool { return !g.isStopped() })
		}
		if mode == "caught" { // where SIGCONT has a handler, it does interrupt
			g.undisturbed(0)
		} else {
			g.undisturbed(0, 4)
		}
		sameMaps(t, before, g)
	}
}

// Job control at random moments: whatever it hits, visits go on and so does the
// target in the end. (A report by SIGCONT and a stop signal can cancel each other.)
func TestJobControl(t *testing.T) {
	lock(t)
	for _, mode := range []string{"all", "cont"} {
		g := start(t, cTarget(t), "FILE", mode).waitReady()
		before := g.maps()
		stop, ended := make(chan bool), make(chan bool)
		go func() {
			defer close(ended)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(rand.IntN(300)) * time.Microsecond):
				}
				_ = unix.Kill(g.pid, []unix.Signal{unix.SIGSTOP, unix.SIGCONT, unix.SIGTSTP, unix.SIGCONT}[i%4])
			}
		}()
		for range 150 {
			if err := visitOnce(g.pid); err != nil {
				t.Error(mode, err)
			}
		}
		close(stop)
		<-ended
		if err := unix.Kill(g.pid, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		g.undisturbed(0, 4)
		sameMaps(t, before, g)
	}
}

// A thread that makes its reports without stopping has restored itself, which
// is noticed.
func TestEscaped(t *testing.T) {
	lock(t)
	g := startAll(t)
	err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
		v, err := l.prepare(threads[1], nil)
		if err != nil {
			return err
		}
		v.id.tid = 1 // the report goes to somebody else
		err = v.enter(sampleBatch())
		return errors.Join(err, v.leave())
	})
	var stop *StopError
	if !errors.As(err, &stop) {
		t.Error(err)
	}
	g.undisturbed(allThreads...)
}

// A tracer that dies over a target that a SIGSTOP stopped in mid-batch leaves
// threads in the cave that only SIGCONT would bring on; Settle does not wait.
func TestSettleInGroupStop(t *testing.T) {
	lock(t)
	g := start(t, cTarget(t), "FILE", "all").waitReady()
	before := g.maps()
	for _, point := range []string{PointBlock, PointEnter, PointMap, PointFill, PointArm, PointBatch, PointUnmap, PointUnblock, PointRestore} {
		c := tracer(t, g.pid, 1, point+"#3:stop")
		g.eventually("visited", func() bool { return strings.HasPrefix(fieldOf(t, c.Process.Pid, "State"), "T") })
		if err := unix.Kill(g.pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		killed(t, c)
		if err := visitPatiently(g.pid); err != nil {
			t.Fatalf("%s: %v", point, err)
		}
		g.eventually("stopped", g.isStopped)
		if err := unix.Kill(g.pid, unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		g.eventually("continued", func() bool { return !g.isStopped() })
	}
	g.undisturbed(allThreads...)
	sameMaps(t, before, g)
}

// Killed in mid-batch, the target is reported as gone, whichever thread ran.
func TestKilledTarget(t *testing.T) {
	lock(t)
	for i := range 4 {
		g := startAll(t)
		err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
			b := sampleBatch()
			b.Add(unix.SYS_KILL, W(g.pid), W(int(unix.SIGKILL)))
			for range 10 {
				b.Add(unix.SYS_GETPPID)
			}
			err := l.Run(threads[i], b) // 0 is the leader
			for _, th := range threads[1:] {
				reap(th)
			}
			return err
		})
		if !errors.Is(err, ErrGone) {
			t.Errorf("thread %d: %v", i, err)
		}
	}
}

// reap collects a traced thread. Until then the kernel does not report the
// leader's end to anybody.
func reap(th *Thread) {
	for range 1000 {
		if dead, _ := th.dead(); dead {
			_ = th.Reap()
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// Our calls pass a filter that would kill, and it is in force again afterwards.
func TestSeccomp(t *testing.T) {
	lock(t)
	g := start(t, cTarget(t), "FILE", "seccomp").waitReady()
	for range 20 {
		if err := visitOnce(g.pid); err != nil {
			t.Fatal(err)
		}
	}
	g.undisturbed(0)
	g.command(1)
	time.Sleep(50 * time.Millisecond)
	if !g.ended() {
		t.Fatal("the filter is not in force any more")
	}
}

// Stopped inside a restartable sequence a thread goes on at its abort handler:
// no increment of the sequence's counter gets lost.
func TestRseqAbort(t *testing.T) {
	lock(t)
	g := start(t, cTarget(t), "FILE", "rseq").waitReady()
	inside := 0
	for range 300 {
		err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
			b := sampleBatch()
			for _, th := range threads {
				r, err := th.Regs()
				if err != nil {
					return err
				}
				want, err := th.ResumeRegs(r)
				if err != nil {
					return err
				}
				if want != r {
					inside++
				}
				if err := l.Run(th, b); err != nil {
					return err
				}
				if got, err := th.Regs(); err != nil || got != want {
					return fmt.Errorf("registers %+v, want %+v (%v)", got, want, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	g.command(1)
	g.eventually("finished", func() bool { return g.get(0, rounds) == 1 })
	sum := g.get(1, rounds) + g.get(2, rounds)
	t.Logf("%d stops inside, %d sequences, %d aborts", inside, sum, g.get(1, eintr)+g.get(2, eintr))
	if got := g.get(0, value); got != sum || g.get(1, errorCount) != 0 {
		t.Errorf("counter %d after %d sequences (error %d)", got, sum, g.get(1, errorCode))
	}
	if inside == 0 {
		t.Error("no thread was stopped inside its sequence")
	}
}

// Without a vdso the cave is behind the text of a file.
func TestNoVdso(t *testing.T) {
	lock(t)
	for _, program := range []string{cTarget(t), narrowTarget(t)} {
		testNoVdso(t, start(t, program, "FILE", "novdso").waitReady())
	}
}

func testNoVdso(t *testing.T, g *target) {
	l, err := NewLive(g.pid)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	before := g.maps()
	for range 20 {
		if err := visitOnce(g.pid); err != nil {
			t.Fatal(err)
		}
	}
	for _, point := range livePoints {
		killed(t, tracer(t, g.pid, 2, point+"#1:kill"))
	}
	if err := visitPatiently(g.pid); err != nil {
		t.Fatal(err)
	}
	g.undisturbed(0)
	sameMaps(t, before, g)
}

// Threads whose system calls would not be what we think are refused untouched.
func TestRefused(t *testing.T) {
	lock(t)
	dispatching := start(t, cTarget(t), "FILE", "dispatch").waitReady()
	if err := visitOnce(dispatching.pid); err != nil {
		t.Errorf("selector at ALLOW: %v", err)
	}
	dispatching.command(1)
	time.Sleep(10 * time.Millisecond)
	filtered := start(t, cTarget(t), "FILE", "seccomp").waitReady()
	for name, g := range map[string]*target{"dispatching": dispatching, "filtered": filtered} {
		err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
			threads[0].filtered = true // as if suspending seccomp had been denied
			before, err := threads[0].Regs()
			if err != nil {
				return err
			}
			err = l.Run(threads[0], sampleBatch())
			if after, e := threads[0].Regs(); e != nil || after != before {
				t.Errorf("%s: registers changed (%v)", name, e)
			}
			return err
		})
		var refused *RefusedError
		if !errors.As(err, &refused) {
			t.Errorf("%s: %v", name, err)
		}
		g.alive()
	}
}

// A slot that is in use is taken only when nobody can return to it.
func TestSlotReuse(t *testing.T) {
	lock(t)
	g := startAll(t)
	err := withStopped(g.pid, func(l *Live, threads []*Thread) error {
		th := threads[3]
		r, err := th.Regs()
		if err != nil {
			return err
		}
		id := ids{uint32(g.pid), uint32(th.Tid)}
		fill := func(id ids) error {
			var errs []error
			for _, at := range l.cave.slots {
				errs = append(errs, l.cave.write(at, slotImage(&r, 0, id)))
			}
			return errors.Join(errs...)
		}
		expect := func(what string, want bool) {
			t.Helper()
			_, err := l.cave.take(id)
			var none *NoSlotError
			if err == nil != want || err != nil && !errors.As(err, &none) {
				t.Errorf("%s: taken: %v, error %v", what, err == nil, err)
			}
		}
		if n := len(l.cave.slots); n < 2 {
			t.Errorf("%d slots", n)
		}
		if err := fill(id); err != nil {
			return err
		}
		if l, err = NewLive(g.pid); err != nil { // finds more than behind the vdso
			return err
		}
		defer l.Close()
		if n := len(l.cave.slots); n < 4 {
			t.Errorf("%d slots where those behind the vdso are not empty", n)
		}
		if err := fill(id); err != nil {
			return err
		}
		expect("nothing on the stack", true)

		var words [32]byte
		if err := th.Read(r.Rsp+64, words[:]); err != nil {
			return err
		}
		for _, at := range l.cave.slots {
			var frame []byte
			for _, word := range []uint64{r.Rsp, at + places.unmapped, 0x246, userCS64} {
				frame = binary.LittleEndian.AppendUint64(frame, word)
			}
			if err := th.Write(r.Rsp+64, frame); err != nil {
				return err
			}
			if _, err := l.cave.take(id); err != nil {
				t.Errorf("one of the slots is pointed to: %v", err)
			}
			if err := l.cave.abandoned(at, id.tgid); err == nil {
				t.Error("a slot that is pointed to counts as abandoned")
			}
		}
		if err := th.Write(r.Rsp+64, words[:]); err != nil {
			return err
		}
		if err := fill(ids{id.tgid, 1}); err != nil {
			return err
		}
		expect("the thread is gone", true)
		if err := fill(ids{id.tgid + 1, 1}); err != nil {
			return err
		}
		expect("another process's", false)
		return fill(id)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := visitOnce(g.pid); err != nil {
		t.Fatal(err)
	}
	g.undisturbed(allThreads...)
}

// ---- benchmarks ----

func benchmarkRun(b *testing.B, calls int) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := exec.Command("/bin/busybox", "sleep", "1000")
	if err := c.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Process.Kill(); _ = c.Wait() }()
	time.Sleep(20 * time.Millisecond)
	batch := new(Batch)
	for range calls {
		batch.Add(unix.SYS_GETPPID)
	}
	err := withStopped(c.Process.Pid, func(l *Live, threads []*Thread) error {
		for b.Loop() {
			if err := l.Run(threads[0], batch); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

func BenchmarkRun1(b *testing.B)    { benchmarkRun(b, 1) }
func BenchmarkRun64(b *testing.B)   { benchmarkRun(b, 64) }
func BenchmarkRun1000(b *testing.B) { benchmarkRun(b, 1000) }
