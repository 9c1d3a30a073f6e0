package cgroupfreeze

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary runs itself as the processes that shell commands cannot play.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "helper-spin":
			stuck(writePage)
		case "helper-asleep":
			stuck(copyPage)
		case "helper-vfork":
			waitForVfork()
		}
	}
	os.Exit(m.Run())
}

// uffdioAPI and uffdioRegister mirror linux/userfaultfd.h.
type uffdioAPI struct{ api, features, ioctls uint64 }
type uffdioRegister struct{ start, len, mode, ioctls uint64 }

// stuck lets a system call meet a page that nobody fills. Only a fatal signal
// ends its wait: such a task cannot freeze.
func stuck(use func(page []byte) error) {
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	helperCheck(err)
	uffd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	helperErrno(errno)
	api := uffdioAPI{api: 0xaa}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, uffd, 0xc018aa3f, uintptr(unsafe.Pointer(&api)))
	helperErrno(errno)
	reg := uffdioRegister{start: uint64(uintptr(unsafe.Pointer(&page[0]))), len: uint64(len(page)), mode: 1}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, uffd, 0xc020aa00, uintptr(unsafe.Pointer(&reg)))
	helperErrno(errno)
	awaitMove()
	helperCheck(use(page))
}

// writePage faults in kernel mode, where a signal that is not fatal makes the
// fault repeat at once: the task shows as R while it is asked to freeze.
func writePage(page []byte) error {
	var pipe [2]int
	helperCheck(unix.Pipe(pipe[:]))
	_, err := unix.Write(pipe[1], page)
	return err
}

// copyPage faults on behalf of get_user_pages, which waits killably: D.
func copyPage(page []byte) error {
	local := []unix.Iovec{{Base: &make([]byte, 1)[0], Len: 1}}
	remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&page[0])), Len: 1}}
	_, err := unix.ProcessVMReadv(os.Getpid(), local, remote, 0)
	return err
}

// awaitMove returns when the test has moved this process to its cgroup.
func awaitMove() {
	_, err := io.ReadAll(os.Stdin)
	helperCheck(err)
}

// waitForVfork blocks in clone(CLONE_VFORK) for a child that never execs.
//
//go:norace
func waitForVfork() {
	awaitMove()
	pid, _, _ := syscall.RawSyscall(unix.SYS_CLONE, unix.CLONE_VFORK|uintptr(unix.SIGCHLD), 0, 0)
	for pid == 0 {
		syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
		syscall.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
	}
	os.Exit(0)
}

func helperCheck(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func helperErrno(errno syscall.Errno) {
	if errno != 0 {
		helperCheck(errno)
	}
}

// hierarchies are the freezers of a hybrid host, by the key of cgroup_paths.
var hierarchies = map[string]string{
	"freezer": "/sys/fs/cgroup/freezer",
	"":        "/sys/fs/cgroup/unified",
}

// onBoth runs a test on a v1 and on a v2 cgroup of its own.
func onBoth(t *testing.T, test func(t *testing.T, c *Cgroup)) {
	for key, root := range hierarchies {
		name := map[bool]string{true: "v2", false: "v1"}[key == ""]
		t.Run(name, func(t *testing.T) { test(t, openCgroup(t, key, makeCgroup(t, root))) })
	}
}

func openCgroup(t *testing.T, key, dir string) *Cgroup {
	t.Helper()
	c, err := Open(map[string]string{key: dir})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// makeCgroup makes a cgroup below parent and removes it at the end of the test,
// with those the test made in it.
func makeCgroup(t *testing.T, parent string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("making cgroups needs root")
	}
	dir, err := os.MkdirTemp(parent, "cgroupfreeze-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, dir) })
	return dir
}

func makeChild(t *testing.T, dir, name string) string {
	t.Helper()
	child := filepath.Join(dir, name)
	if err := os.Mkdir(child, 0o755); err != nil {
		t.Fatal(err)
	}
	return child
}

// removeCgroup removes a tree of cgroups, children first. A cgroup stays busy
// for a moment after its last task's death.
func removeCgroup(t *testing.T, dir string) {
	dirs, err := subtree(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		eventually(t, "rmdir "+dirs[i], func() bool { return unix.Rmdir(dirs[i]) == nil })
	}
}

// start runs a program inside a cgroup and ends it with the test.
func start(t *testing.T, dir string, argv ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	launch(t, dir, cmd)
	return cmd
}

// startHelper runs one of the modes of TestMain and waits until one of its
// threads is in the given system call and state.
func startHelper(t *testing.T, dir, mode string, call int, state byte) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", mode)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	move, err := cmd.StdinPipe()
	check(t, err)
	launch(t, dir, cmd)
	check(t, move.Close())
	eventually(t, mode+" is where it should be", func() bool {
		tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", cmd.Process.Pid))
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			now, ok := readTask(cmd.Process.Pid, tid)
			if ok && now.Syscall == strconv.Itoa(call) && now.State == state {
				return true
			}
		}
		return false
	})
	return cmd
}

func startSpinner(t *testing.T, dir string) *exec.Cmd {
	return startHelper(t, dir, "helper-spin", unix.SYS_WRITE, 'S')
}

func startSleeper(t *testing.T, dir string) *exec.Cmd {
	return startHelper(t, dir, "helper-asleep", unix.SYS_PROCESS_VM_READV, 'D')
}

func launch(t *testing.T, dir string, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = writeValue(openAny(dir).ThawWrite()) // a frozen v1 task does not die
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if err := writeValue(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
}

// openAny opens a directory of either version.
func openAny(dir string) *Cgroup {
	if c, err := Open(map[string]string{"freezer": dir}); err == nil {
		return c
	}
	return &Cgroup{dir: dir, freezer: v2{dir}}
}

// startCounter runs a shell that counts in a file as fast as it can, and returns
// a function that reads how far it is.
func startCounter(t *testing.T, dir string) (cmd *exec.Cmd, count func() int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "count")
	cmd = start(t, dir, "/bin/sh", "-c", `i=0; while :; do i=$((i+1)); echo $i >>"$0"; done`, file)
	return cmd, func() int {
		data, _ := os.ReadFile(file)
		return strings.Count(string(data), "\n")
	}
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen within 5 s: %s", what)
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fake makes a directory with the given files, for states that a real cgroup
// cannot be held in.
func fake(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	return dir
}
