// Package traceetest starts stubs for the tests of the rooms that fill them.
package traceetest

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// ServiceAt is a place for the service area that nothing else takes.
const ServiceAt = 0x200000000

// Stub starts a stub, pid 1 of a pid namespace of its own, with its service
// area mapped at an address. It locks the test to its thread, and ends the stub
// with the test.
func Stub(t testing.TB, at uint64) *tracee.Stub {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	service, err := tracee.NewService()
	must(err)
	t.Cleanup(func() { must(service.Close()) })
	exe, err := tracee.StubExecutable()
	must(err)
	defer exe.Close()
	const exeFD, serviceFD = 3, 4
	c := exec.Command("sh", "-c", "read go; exec /proc/self/fd/3")
	c.ExtraFiles = []*os.File{exe, service.File()}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	in, err := c.StdinPipe()
	must(err)
	must(c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	th, err := tracee.Seize(c.Process.Pid, c.Process.Pid, tracee.LiveOptions|unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACEEXEC)
	must(err)
	_, err = in.Write([]byte{'\n'})
	must(err)
	must(th.WaitExec())
	must(th.SetOptions(tracee.StubOptions))
	s, err := tracee.NewStub(th, service)
	must(err)
	must(s.AttachService(serviceFD, at))
	var b tracee.Batch
	b.Add(unix.SYS_CLOSE, tracee.W(exeFD))
	_, err = s.Run(&b)
	must(err)
	return s
}
