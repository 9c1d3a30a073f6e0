package nsutil

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The main thread cannot end; as in the program, the main goroutine keeps it, so
// that Inside never gets it.
func init() { runtime.LockOSThread() }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inNew starts a command in new namespaces, which it keeps until the test ends.
func inNew(t *testing.T, flags uintptr, argv ...string) (pid int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test must run as root")
	}
	c := exec.Command(argv[0], argv[1:]...)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c.Process.Pid
}

func TestParse(t *testing.T) {
	if got, err := Parse("mnt:[4026531841]"); got != 4026531841 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	for _, bad := range []string{"", "mnt:", "mnt:[x]", "mnt:[]", "[1]"} {
		if got, err := Parse(bad); err == nil {
			t.Errorf("%q is %d", bad, got)
		}
	}
}

func TestOf(t *testing.T) {
	pid := inNew(t, unix.CLONE_NEWNET|unix.CLONE_NEWUTS, "sleep", "1000")
	own, err := Of(os.Getpid())
	must(t, err)
	theirs, err := Of(pid)
	must(t, err)
	for _, kind := range Types {
		if differs, want := own[kind] != theirs[kind], kind == "net" || kind == "uts"; differs != want || own[kind] == 0 {
			t.Errorf("%s: %d and %d", kind, own[kind], theirs[kind])
		}
	}
	if _, err := Of(1 << 22); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nobody: %v", err)
	}
}

// Inside changes the namespace for its function and for nothing else.
func TestInside(t *testing.T) {
	pid := inNew(t, unix.CLONE_NEWNET, "sleep", "1000")
	before, err := Of(os.Getpid())
	must(t, err)
	var inside []net.Interface
	var link string
	must(t, Inside(Path(pid, "net"), func() (err error) {
		if link, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		inside, err = net.Interfaces()
		return err
	}))
	theirs, err := Of(pid)
	must(t, err)
	if inode, err := Parse(link); err != nil || inode != theirs["net"] || len(inside) == 0 || inside[0].Flags&net.FlagUp != 0 {
		t.Errorf("inside %s there is %v, %v", link, inside, err)
	}
	for range 20 {
		link, err := os.Readlink("/proc/thread-self/ns/net")
		must(t, err)
		if inode, _ := Parse(link); inode != before["net"] {
			t.Fatalf("a thread stayed in %s", link)
		}
	}
	stop := errors.New("stop")
	if err := Inside(Path(pid, "net"), func() error { return stop }); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
	ran := false
	if err := Inside("/dev/null", func() error { ran = true; return nil }); err == nil || ran {
		t.Errorf("inside no namespace: %v, ran %v", err, ran)
	}
}

func TestOwner(t *testing.T) {
	own, err := Of(os.Getpid())
	must(t, err)
	if got, err := Owner(Path(os.Getpid(), "net")); err != nil || got != own["user"] {
		t.Errorf("%d, %v; want %d", got, err, own["user"])
	}
	pid := inNew(t, unix.CLONE_NEWUSER|unix.CLONE_NEWUTS, "sleep", "1000")
	theirs, err := Of(pid)
	must(t, err)
	if got, err := Owner(Path(pid, "uts")); err != nil || got != theirs["user"] || got == own["user"] {
		t.Errorf("%d, %v; want %d", got, err, theirs["user"])
	}
}

func TestTimeOffsets(t *testing.T) {
	if mono, boot, err := TimeOffsets(os.Getpid()); err != nil || mono != 0 || boot != 0 {
		t.Errorf("our own: %d, %d, %v", mono, boot, err)
	}
	c := exec.Command("unshare", "--time", "--fork", "--kill-child", "--monotonic", "-3", "--boottime", "70", "sh", "-c", "echo; exec sleep 1000")
	out, err := c.StdoutPipe()
	must(t, err)
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	if mono, boot, err := TimeOffsets(c.Process.Pid); err != nil || mono != -3e9 || boot != 70e9 {
		t.Errorf("%d, %d, %v", mono, boot, err)
	}
	if !strings.HasPrefix(Path(7, "time"), "/proc/7/") {
		t.Error(Path(7, "time"))
	}
}
