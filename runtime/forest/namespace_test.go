package forest

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// The other tests are as good as the simulated kernel. TestKernelAgrees plays histories, failing calls
// included, in the simulation and with real processes in a pid namespace, and compares errnos and
// states; then it plays the plans with real processes. A user namespace makes root unnecessary.

const inNamespace = "FOREST_TEST_IN_NAMESPACE"

func TestKernelAgrees(t *testing.T) {
	if os.Getenv(inNamespace) != "" {
		playInNamespace(t)
		return
	}
	runtime.LockOSThread() // Pdeathsig is about the thread that forks
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestKernelAgrees$", "-test.v")
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Setsid:      true,
		Pdeathsig:   syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in the namespace: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// namespacePid is the lowest pid of histories; those below are tids of this Go program, the init.
const namespacePid = 200

func playInNamespace(t *testing.T) {
	runtime.LockOSThread() // raw forks copy the calling thread; its signal mask must be the one set here
	n, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	reserved := make([]int, namespacePid)
	for i := range reserved {
		reserved[i] = i
	}
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(200) {
		h := &history{rand: rand.New(rand.NewPCG(seed+i, 0)), wrapped: i%2 == 0, kernel: newKernel(1, true), nextPid: namespacePid}
		h.live(1 + int(i/12))
		n.start(sigDefault)
		n.playHistory(t, h.log)
		n.compare(t, h.list())
		n.clear()

		state := h.state()
		plan, err := Grow(state, reserved)
		if err != nil {
			t.Fatal(err)
		}
		n.start(sigIgnore)
		for _, s := range plan.Steps {
			if err := n.step(s); err != nil {
				t.Fatalf("%v of %v: %v", s, plan.Steps, err)
			}
		}
		for i := range state {
			state[i].Zombie = false
		}
		n.compare(t, state)
		n.clear()
		if t.Failed() {
			t.Fatalf("seed %d: history %v", seed+i, h.log)
		}
	}
}

// namespace is a pid namespace whose init we are. Its other processes are forked without exec, and take
// commands from one pipe each.
type namespace struct {
	slots map[int]int // by pid
	free  int
	pids  []int
}

// Globals, because a forked child must not touch the Go runtime: it has one thread and no scheduler.
var (
	commandPipes [128][2]int32
	answerPipe   [2]int32
	command      [5]int64 // operation and arguments, see obey
	answer       [2]int64 // result, errno
	cloneArgs    [11]uint64
	cloneTid     int32
)

const (
	opFork = iota
	opSetsid
	opSetpgid
	opSubreaper
	opExit
	opReap
	opGetppid

	cloneParent       = syscall.CLONE_PARENT
	sysClone3         = 435
	sysPidfdOpen      = 434
	prSetSubreaper    = 36
	sigDefault        = 0
	sigIgnore         = 1
	sigSetmask        = 2
	signalSetBytes    = 8
	commandBytes      = unsafe.Sizeof(command)
	answerBytes       = unsafe.Sizeof(answer)
	namespaceInitSlot = -1
)

func newNamespace() (*namespace, error) {
	all := ^uint64(0)
	if _, _, e := syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, sigSetmask, uintptr(unsafe.Pointer(&all)), 0, signalSetBytes, 0, 0); e != 0 {
		return nil, e
	}
	for i := range commandPipes {
		if err := pipe(&commandPipes[i]); err != nil {
			return nil, err
		}
	}
	return &namespace{}, pipe(&answerPipe)
}

func pipe(p *[2]int32) error {
	if _, _, e := syscall.RawSyscall(syscall.SYS_PIPE2, uintptr(unsafe.Pointer(p)), syscall.O_CLOEXEC, 0); e != 0 {
		return e
	}
	return nil
}

// start begins a life of the namespace in which SIGCHLD is handled as given, by all.
func (n *namespace) start(handler uintptr) {
	action := [4]uintptr{handler}
	syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGCHLD), uintptr(unsafe.Pointer(&action)), 0, signalSetBytes, 0, 0)
	n.slots, n.free, n.pids = map[int]int{1: namespaceInitSlot}, 0, []int{1}
}

// clear ends every other process.
func (n *namespace) clear() {
	syscall.Kill(-1, syscall.SIGKILL)
	for {
		if _, err := syscall.Wait4(-1, nil, syscall.WALL, nil); err == syscall.ECHILD {
			return
		}
	}
}

// do makes process pid execute an operation.
func (n *namespace) do(pid int, op, a, b, c int64) (int64, error) {
	slot, known := n.slots[pid]
	if !known {
		return 0, syscall.ESRCH
	}
	command = [5]int64{op, a, b, c}
	if slot == namespaceInitSlot {
		if child := obey(); child >= 0 {
			serve(child)
		}
	} else {
		syscall.RawSyscall(syscall.SYS_WRITE, uintptr(commandPipes[slot][1]), uintptr(unsafe.Pointer(&command)), commandBytes)
		if op == opExit {
			return 0, nil
		}
		syscall.RawSyscall(syscall.SYS_READ, uintptr(answerPipe[0]), uintptr(unsafe.Pointer(&answer)), answerBytes)
	}
	if answer[1] != 0 {
		return 0, syscall.Errno(answer[1])
	}
	return answer[0], nil
}

// serve is the life of a forked child: it obeys commands.
//
//go:nosplit
//go:norace
func serve(slot int64) {
	for {
		got, _, _ := syscall.RawSyscall(syscall.SYS_READ, uintptr(commandPipes[slot][0]), uintptr(unsafe.Pointer(&command)), commandBytes)
		if got != commandBytes {
			syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 1, 0, 0)
		}
		if child := obey(); child >= 0 {
			slot = child
			continue
		}
		syscall.RawSyscall(syscall.SYS_WRITE, uintptr(answerPipe[1]), uintptr(unsafe.Pointer(&answer)), answerBytes)
	}
}

// obey executes the command. In a new child it returns the slot to serve, else -1.
//
//go:nosplit
//go:norace
func obey() int64 {
	var r uintptr
	var e syscall.Errno
	switch command[0] {
	case opFork: // pid, slot, flags
		cloneTid = int32(command[1])
		cloneArgs[0] = uint64(command[3])
		cloneArgs[4] = uint64(syscall.SIGCHLD)
		if command[3] != 0 {
			cloneArgs[4] = 0 // CLONE_PARENT hands the caller's exit signal on
		}
		cloneArgs[8], cloneArgs[9] = uint64(uintptr(unsafe.Pointer(&cloneTid))), 1
		r, _, e = syscall.RawSyscall(sysClone3, uintptr(unsafe.Pointer(&cloneArgs)), unsafe.Sizeof(cloneArgs), 0)
		if e == 0 && r == 0 {
			return command[2]
		}
	case opSetsid:
		r, _, e = syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0)
	case opSetpgid:
		r, _, e = syscall.RawSyscall(syscall.SYS_SETPGID, uintptr(command[1]), uintptr(command[2]), 0)
	case opSubreaper:
		r, _, e = syscall.RawSyscall6(syscall.SYS_PRCTL, prSetSubreaper, uintptr(command[1]), 0, 0, 0, 0)
	case opExit:
		syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
	case opReap:
		r, _, e = syscall.RawSyscall6(syscall.SYS_WAIT4, uintptr(command[1]), 0, syscall.WNOHANG, 0, 0, 0)
	case opGetppid:
		r, _, e = syscall.RawSyscall(syscall.SYS_GETPPID, 0, 0, 0)
	}
	answer[0], answer[1] = int64(r), int64(e)
	return -1
}

func (n *namespace) fork(pid, child int, flags int64) error {
	slot := n.free
	_, err := n.do(pid, opFork, int64(child), int64(slot), flags)
	// The kernel frees the number of a process that reaps itself a moment after wait4 and kill have
	// ceased to find it. No history forks a pid in use.
	for deadline := time.Now().Add(5 * time.Second); err == syscall.EEXIST && time.Now().Before(deadline); {
		time.Sleep(100 * time.Microsecond)
		_, err = n.do(pid, opFork, int64(child), int64(slot), flags)
	}
	if err == nil {
		n.free++
		n.slots[child] = slot
		n.pids = append(n.pids, child)
	}
	return err
}

// exit ends a process and waits until it is a zombie, or gone where SIGCHLD is ignored.
func (n *namespace) exit(pid int, gone bool) error {
	fd, _, e := syscall.RawSyscall(sysPidfdOpen, uintptr(pid), 0, 0)
	if e != 0 {
		return e
	}
	defer syscall.Close(int(fd))
	if _, err := n.do(pid, opExit, 0, 0, 0); err != nil {
		return err
	}
	poll := struct {
		fd              int32
		events, revents int16
	}{int32(fd), 1, 0}
	syscall.Syscall(syscall.SYS_POLL, uintptr(unsafe.Pointer(&poll)), 1, ^uintptr(0))
	for gone && syscall.Kill(pid, 0) == nil {
		time.Sleep(10 * time.Microsecond)
	}
	return nil
}

// step makes a step of a plan.
func (n *namespace) step(s Step) (err error) {
	switch s.Op {
	case Fork:
		return n.fork(s.Pid, s.Child, 0)
	case Setsid:
		_, err = n.do(s.Pid, opSetsid, 0, 0, 0)
	case Setpgid:
		_, err = n.do(s.Pid, opSetpgid, 0, int64(s.Pgid), 0)
	case Subreaper:
		on := int64(0)
		if s.On {
			on = 1
		}
		_, err = n.do(s.Pid, opSubreaper, on, 0, 0)
	case Exit:
		err = n.exit(s.Pid, true)
		n.pids = slices.DeleteFunc(n.pids, func(pid int) bool { return pid == s.Pid })
	}
	return err
}

// playHistory makes the calls of a history and compares their errnos with those of the simulation.
func (n *namespace) playHistory(t *testing.T, log []call) {
	for _, c := range log {
		var err error
		switch c.what {
		case "fork":
			err = n.fork(c.pid, c.arg, 0)
		case "fork sibling":
			err = n.fork(c.pid, c.arg, cloneParent)
		case "setsid":
			_, err = n.do(c.pid, opSetsid, 0, 0, 0)
		case "setpgid":
			_, err = n.do(c.pid, opSetpgid, int64(c.arg), int64(c.grp), 0)
		case "subreaper":
			_, err = n.do(c.pid, opSubreaper, int64(c.arg), 0, 0)
		case "exit":
			err = n.exit(c.pid, false)
		case "reap":
			var pid int64
			if pid, err = n.do(c.pid, opReap, int64(c.arg), 0, 0); pid == 0 && err == nil {
				err = syscall.ECHILD // it is a child, but alive
			}
			if err == nil {
				n.pids = slices.DeleteFunc(n.pids, func(pid int) bool { return pid == c.arg })
			}
		}
		if !errors.Is(err, c.err) && (err != nil || c.err != nil) {
			t.Fatalf("%v: the kernel says %v; all calls: %v", c, err, log)
		}
	}
}

// compare compares the processes of the namespace with those of the simulation. The parent of a zombie
// cannot be asked for without /proc.
func (n *namespace) compare(t *testing.T, want []Process) {
	if len(n.pids) != len(want) {
		t.Errorf("pids %v, want %v", n.pids, want)
	}
	for _, p := range want {
		pgid, err := syscall.Getpgid(p.Pid)
		if err != nil {
			t.Errorf("pid %d: getpgid: %v", p.Pid, err)
		}
		sid, _, e := syscall.RawSyscall(syscall.SYS_GETSID, uintptr(p.Pid), 0, 0)
		if e != 0 {
			t.Errorf("pid %d: getsid: %v", p.Pid, e)
		}
		ppid := int64(p.Ppid)
		if !p.Zombie {
			if ppid, err = n.do(p.Pid, opGetppid, 0, 0, 0); err != nil {
				t.Errorf("pid %d: getppid: %v", p.Pid, err)
			}
		}
		if int(ppid) != p.Ppid || pgid != p.Pgid || int(sid) != p.Sid {
			t.Errorf("pid %d has parent %d, group %d, session %d, want %+v", p.Pid, ppid, pgid, sid, p)
		}
	}
}
