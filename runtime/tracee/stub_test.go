package tracee

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const serviceAt = 0x200000000

// newStub starts a stub, pid 1 of a pid namespace of its own. It has the
// service at fd 4 and a pipe that nobody writes to at fd 0.
func newStub(t *testing.T) *Stub {
	t.Helper()
	lock(t)
	service, err := NewService()
	must(t, err)
	t.Cleanup(func() { must(t, service.Close()) })
	exe, err := StubExecutable()
	must(t, err)
	defer exe.Close()
	c := exec.Command("sh", "-c", "read go; exec /proc/self/fd/3")
	c.ExtraFiles = []*os.File{exe, service.File()}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	in, err := c.StdinPipe()
	must(t, err)
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	th, err := Seize(c.Process.Pid, c.Process.Pid, LiveOptions|unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACEEXEC)
	must(t, err)
	_, err = in.Write([]byte{'\n'})
	must(t, err)
	must(t, th.WaitExec())
	must(t, th.SetOptions(StubOptions))
	s, err := NewStub(th, service)
	must(t, err)
	must(t, s.AttachService(4, serviceAt))
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestStubELF(t *testing.T) {
	f, err := elf.NewFile(strings.NewReader(string(stubELF(""))))
	must(t, err)
	if len(f.Progs) != 2 || f.Progs[0].Flags != elf.PF_R|elf.PF_X || f.Progs[1].Type != elf.PT_GNU_STACK || f.Progs[1].Flags&elf.PF_X != 0 {
		t.Errorf("segments %+v", f.Progs)
	}
	code := stubELF("")[f.Entry-f.Progs[0].Vaddr:]
	if code[0] != 0xcc || f.Entry < stubCode+uint64(len(serviceCode())) {
		t.Errorf("entry %#x: %x", f.Entry, code[:4])
	}
	if at := f.Progs[0].Vaddr; string(stubELF("")[stubCode-at:][:len(serviceCode())]) != string(serviceCode()) {
		t.Error("the service code is not where a stub runs it")
	}
}

func TestStubRun(t *testing.T) {
	s := newStub(t)
	if s.Service() != serviceAt {
		t.Errorf("service at %#x", s.Service())
	}
	var b Batch
	name := b.Reserve(16)
	b.Add(unix.SYS_PRCTL, W(unix.PR_SET_NAME), b.String("stub's name"))
	pid := b.Add(unix.SYS_GETPID)
	failing := b.Try(unix.SYS_CLOSE, W(99))
	b.Add(unix.SYS_PRCTL, W(unix.PR_GET_NAME), name)
	for range 3 { // the same batch, again and again
		cloned, err := s.Run(&b)
		if err != nil || len(cloned) != 0 {
			t.Fatalf("%v, %v", cloned, err)
		}
		if b.Calls[pid].Ret != 1 || !errors.Is(b.Err(failing), unix.EBADF) || !strings.HasPrefix(string(b.At(name, 16)), "stub's name\x00") {
			t.Errorf("%+v, %q", b.Calls, b.At(name, 16))
		}
	}
	if cloned, err := s.Run(&Batch{}); cloned != nil || err != nil {
		t.Errorf("nothing to run: %v, %v", cloned, err)
	}
}

// TestStubRunParts has a batch that the service area does not hold.
func TestStubRunParts(t *testing.T) {
	s := newStub(t)
	var b Batch
	name := b.String("far behind")
	const n = 3 * ServiceSize / entrySize
	for range n {
		b.Add(unix.SYS_GETPID)
	}
	b.Add(unix.SYS_PRCTL, W(unix.PR_SET_NAME), name)
	bad := b.Add(unix.SYS_READ, W(99), name, W(8))
	b.Add(unix.SYS_GETPID)
	_, err := s.Run(&b)
	var failed *CallError
	if !errors.As(err, &failed) || failed.Index != bad || failed.Errno != unix.EBADF {
		t.Errorf("the call %d fails: %v", bad, err)
	}
	if b.Calls[0].Ret != 1 || b.Calls[n-1].Ret != 1 || b.Calls[n].Ret != 0 {
		t.Errorf("calls return %d, %d, %d", b.Calls[0].Ret, b.Calls[n-1].Ret, b.Calls[n].Ret)
	}
}

func TestStubRunFails(t *testing.T) {
	s := newStub(t)
	var b Batch
	b.Add(unix.SYS_GETPID)
	place := b.Reserve(8)
	b.Add(unix.SYS_READ, W(99), place, W(8))
	b.Add(unix.SYS_PRCTL, W(unix.PR_SET_NAME), b.String("never"))
	_, err := s.Run(&b)
	var failed *CallError
	if !errors.As(err, &failed) || failed.Index != 1 || failed.Nr != unix.SYS_READ || failed.Errno != unix.EBADF || failed.Tid != s.Tid || failed.Args[0] != 99 || failed.Args[2] != 8 {
		t.Fatalf("%v", err)
	}
	if failed.Args[1] < serviceAt || failed.Args[1] >= serviceAt+ServiceSize || b.Calls[2].Ret != 0 {
		t.Errorf("%v; the call behind it gave %d", err, b.Calls[2].Ret)
	}
	if name := fieldOf(t, s.Pid, "Name"); name == "never" {
		t.Error("the batch went on behind the failure")
	}
	b.Reset()
	b.Reserve(ServiceSize)
	b.Add(unix.SYS_GETPID)
	if _, err := s.Run(&b); err == nil {
		t.Error("a batch larger than the service area ran")
	}
	b.Reset() // and the stub is as good as before
	b.Add(unix.SYS_GETPID)
	if _, err := s.Run(&b); err != nil || b.Calls[0].Ret != 1 {
		t.Errorf("%v", err)
	}
}

// cloneInto adds the clone3(2) of a child with a chosen pid.
func cloneInto(b *Batch, pid uint32, flags, exitSignal uint64) {
	args := binary.LittleEndian.AppendUint64(nil, flags)
	args = append(args, make([]byte, 24)...)
	args = binary.LittleEndian.AppendUint64(args, exitSignal)
	args = append(args, make([]byte, 24)...)
	setTid := b.Put(binary.LittleEndian.AppendUint32(nil, pid))
	b.Add(unix.SYS_CLONE3, b.PutPointer(args, setTid, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), W(88))
}

// children clones processes with given pids and ends them with the test.
func children(t *testing.T, s *Stub, pids ...uint32) (out []*Stub) {
	t.Helper()
	var b Batch
	for _, pid := range pids {
		cloneInto(&b, pid, 0, uint64(unix.SIGCHLD))
	}
	cloned, err := s.Run(&b)
	must(t, err)
	if len(cloned) != len(pids) {
		t.Fatalf("%d clones, want %d", len(cloned), len(pids))
	}
	for i, host := range cloned {
		c, err := s.NewChild(host, host)
		must(t, err)
		t.Cleanup(func() { // an init ends only when its namespace's tasks are reaped
			_ = unix.Kill(host, unix.SIGKILL)
			_, _ = unix.Wait4(host, nil, unix.WALL, nil)
		})
		if want := fmt.Sprint(pids[i]); !strings.HasSuffix(fieldOf(t, host, "NSpid"), want) {
			t.Errorf("task %d has pids %s, want %s", host, fieldOf(t, host, "NSpid"), want)
		}
		out = append(out, c)
	}
	return out
}

func TestStubChildren(t *testing.T) {
	s := newStub(t)
	for i, c := range children(t, s, 500, 7, 42) {
		var b Batch
		b.Add(unix.SYS_GETPID)
		b.Add(unix.SYS_GETPPID)
		_, err := c.Run(&b)
		must(t, err)
		if want := []int64{500, 7, 42}[i]; b.Calls[0].Ret != want || b.Calls[1].Ret != 1 {
			t.Errorf("child %d says pid %d, parent %d", want, b.Calls[0].Ret, b.Calls[1].Ret)
		}
	}
	var taken Batch
	cloneInto(&taken, 7, 0, uint64(unix.SIGCHLD))
	if _, err := s.Run(&taken); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a taken pid gives %v", err)
	}
}

func TestStubThread(t *testing.T) {
	s := newStub(t)
	var b Batch
	cloneInto(&b, 77, unix.CLONE_VM|unix.CLONE_FS|unix.CLONE_FILES|unix.CLONE_SIGHAND|unix.CLONE_THREAD|unix.CLONE_SYSVSEM, 0)
	cloned, err := s.Run(&b)
	must(t, err)
	tid := cloned[0]
	t.Cleanup(func() { _ = unix.Kill(s.Pid, unix.SIGKILL); _, _ = unix.Wait4(tid, nil, unix.WALL, nil) })
	c, err := s.NewChild(s.Pid, tid)
	must(t, err)
	var ask Batch
	ask.Add(unix.SYS_GETTID)
	ask.Add(unix.SYS_GETPID)
	_, err = c.Run(&ask)
	must(t, err)
	if ask.Calls[0].Ret != 77 || ask.Calls[1].Ret != 1 {
		t.Errorf("tid %d of pid %d", ask.Calls[0].Ret, ask.Calls[1].Ret)
	}
}

func TestStubStep(t *testing.T) {
	s := newStub(t)
	if got, err := s.Step(unix.SYS_GETPID); got != 1 || err != nil {
		t.Errorf("getpid %d, %v", got, err)
	}
	if _, err := s.Step(unix.SYS_CLOSE, 99); !errors.Is(err, unix.EBADF) {
		t.Errorf("close of no file: %v", err)
	}
	var b Batch // from a stop at a call's exit
	b.Add(unix.SYS_GETPID)
	if _, err := s.Run(&b); err != nil || b.Calls[0].Ret != 1 {
		t.Errorf("%+v, %v", b.Calls, err)
	}
}

func TestStubInterrupted(t *testing.T) {
	s := newStub(t)
	must(t, s.Write(s.Scratch(), binary.LittleEndian.AppendUint64(nil, 1000))) // seconds
	for range 20 {                                                             // there is no race to lose
		got, err := s.Interrupted(false, unix.SYS_NANOSLEEP, [6]uint64{s.Scratch()})
		if got != -eRestartBlock || err != nil {
			t.Fatalf("nanosleep gives %d, %v", got, err)
		}
	}
	if got, err := s.Interrupted(false, unix.SYS_PAUSE, [6]uint64{}); got != -eRestartNoHand || err != nil {
		t.Errorf("pause gives %d, %v", got, err)
	}
	if got, err := s.Interrupted(false, unix.SYS_GETPID, [6]uint64{}); got != 1 || err != nil {
		t.Errorf("getpid gives %d, %v", got, err)
	}
	var b Batch
	b.Add(unix.SYS_GETPID)
	if _, err := s.Run(&b); err != nil || b.Calls[0].Ret != 1 {
		t.Errorf("%+v, %v", b.Calls, err)
	}
}

func TestStubExit(t *testing.T) {
	s := newStub(t)
	statuses := []unix.WaitStatus{0, 3 << 8, 255 << 8, unix.WaitStatus(unix.SIGKILL), unix.WaitStatus(unix.SIGTERM), unix.WaitStatus(unix.SIGSEGV)}
	for i, want := range statuses {
		pid := uint64(100 + i)
		must(t, children(t, s, uint32(pid))[0].Exit(want))
		var b Batch // what its parent is told
		at := b.Reserve(4)
		b.Add(unix.SYS_WAIT4, W(pid), at)
		if _, err := s.Run(&b); err != nil {
			t.Fatalf("wait for %d: %v", pid, err)
		}
		if got := unix.WaitStatus(binary.LittleEndian.Uint32(b.At(at, 4))); got != want {
			t.Errorf("exit status is %#x, want %#x", got, want)
		}
	}
}

func TestStubKilled(t *testing.T) {
	s := newStub(t)
	must(t, unix.Kill(s.Pid, unix.SIGKILL))
	var b Batch
	b.Add(unix.SYS_GETPID)
	if _, err := s.Run(&b); !errors.Is(err, ErrGone) {
		t.Errorf("a killed stub gives %v", err)
	}
}

// A stopped stub works on, and what it is stopped by is told once.
func TestStubStopped(t *testing.T) {
	s := newStub(t)
	const stopped = 0x7f
	for i, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGTTOU} {
		child := children(t, s, uint32(100+i))[0]
		var leave Batch
		leave.Add(unix.SYS_SETSID) // into a group whose parents are in another session: it is orphaned
		_, err := child.Run(&leave)
		must(t, err)
		exact, err := child.Stop(sig)
		if err != nil || exact != (sig == unix.SIGSTOP) {
			t.Fatalf("stop by %v: %v, %v", sig, exact, err)
		}
		var own Batch
		own.Add(unix.SYS_GETPID)
		if _, err := child.Run(&own); err != nil || own.Calls[0].Ret != int64(100+i) {
			t.Fatalf("the stopped stub gives %d, %v", own.Calls[0].Ret, err)
		}
		var b Batch
		at := b.Reserve(8)
		for j := range 2 {
			b.Add(unix.SYS_WAIT4, W(100+i), at.Plus(4*j), W(unix.WUNTRACED|unix.WNOHANG))
		}
		if _, err := s.Run(&b); err != nil {
			t.Fatal(err)
		}
		if first, second := binary.LittleEndian.Uint32(b.At(at, 4)), b.Calls[1].Ret; first != stopped|uint32(unix.SIGSTOP)<<8 || second != 0 {
			t.Errorf("wait tells %#x, and then %d", first, second)
		}
		if err := child.Continue(); err != nil {
			t.Fatal(err)
		}
		if _, err := child.Run(&own); err != nil {
			t.Fatal(err)
		}
	}
}
