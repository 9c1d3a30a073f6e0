package guardian

import (
	"bufio"
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

	"golang.org/x/sys/unix"
)

// The test binary is, by its first argument, the guardian or a coordinator that
// the tests kill.
func TestMain(m *testing.M) {
	// The race detector otherwise holds up each guardian's exit by a second.
	environment = append(environment, "GORACE=atexit_sleep_ms=0")
	if len(os.Args) > 1 && os.Args[1] == Verb {
		Main()
	}
	if len(os.Args) > 3 && os.Args[1] == "coordinator" {
		coordinate(os.Args[2], os.Args[3])
		os.Exit(0)
	}
	// Guardians whose coordinator dies become children of this process, so
	// that the tests can wait for them and see their exit status.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// coordinate plays one of the scenarios: a list of steps, between which it stops
// until the test lets it go on or kills it.
func coordinate(scenario, dir string) {
	g, err := Start()
	helperCheck(err)
	c := &coordinator{g: g, dir: dir, in: bufio.NewReader(os.Stdin)}
	c.say("guardian %d", g.Pid())
	map[string]func(*coordinator){
		"journal": playJournal, "rollback": playRollback, "system": playSystem, "leak": playLeak, "storm": playStorm,
		"seal": playSeal,
	}[scenario](c)
}

type coordinator struct {
	g    *Guardian
	dir  string
	in   *bufio.Reader
	step int
}

func (c *coordinator) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// did ends a step.
func (c *coordinator) did() {
	c.step++
	c.say("step %d", c.step)
	_, err := c.in.ReadString('\n')
	helperCheck(err)
}

func (c *coordinator) promise(u Undo) Entry {
	e, err := c.g.Promise(u)
	helperCheck(err)
	return e
}

func (c *coordinator) file(name string) string { return filepath.Join(c.dir, name) }

func (c *coordinator) put(name, content string) {
	helperCheck(os.WriteFile(c.file(name), []byte(content), 0o600))
}

func helperCheck(err error) {
	if err != nil {
		fmt.Println("coordinator:", err)
		os.Exit(1)
	}
}

// victim is a coordinator process as the test sees it.
type victim struct {
	t        *testing.T
	cmd      *exec.Cmd
	in       io.WriteCloser
	out      *bufio.Scanner
	guardian int
	told     map[string]int // numbers it has told, by name
}

// startVictim starts a coordinator in its own process group. It inherits some
// descriptors without close-on-exec, as a shell's redirections would be.
func startVictim(t *testing.T, scenario, dir string, inherited ...*os.File) *victim {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "coordinator", scenario, dir)
	cmd.ExtraFiles = inherited
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	v := &victim{t: t, cmd: cmd, in: in, out: bufio.NewScanner(out), told: make(map[string]int)}
	v.until("guardian")
	v.guardian = v.told["guardian"]
	return v
}

// until reads what the coordinator says up to a line that begins with a word.
func (v *victim) until(word string) {
	v.t.Helper()
	for v.out.Scan() {
		name, value, _ := strings.Cut(v.out.Text(), " ")
		number, err := strconv.Atoi(value)
		if err != nil {
			v.t.Fatalf("it says %q", v.out.Text())
		}
		v.told[name] = number
		if name == word {
			return
		}
	}
	v.t.Fatalf("it ended before it said %q", word)
}

// goTo lets the coordinator go on until a step is done.
func (v *victim) goTo(step int) {
	v.t.Helper()
	for v.until("step"); v.told["step"] < step; v.until("step") {
		_, err := io.WriteString(v.in, "\n")
		check(v.t, err)
	}
}

// kill kills the coordinator with its whole process group, then waits until the
// guardian has exited and returns its exit status.
func (v *victim) kill() int {
	v.t.Helper()
	check(v.t, unix.Kill(-v.cmd.Process.Pid, unix.SIGKILL))
	_ = v.cmd.Wait()
	return reap(v.t, v.guardian)
}

// reap waits for one orphan to exit.
func reap(t *testing.T, pid int) int {
	t.Helper()
	var status unix.WaitStatus
	eventually(t, fmt.Sprintf("pid %d exits", pid), func() bool {
		got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil)
		if err != nil && err != unix.EINTR {
			t.Fatalf("wait4 for pid %d: %v", pid, err)
		}
		return got == pid
	})
	if status.Signaled() {
		return -int(status.Signal())
	}
	return status.ExitStatus()
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen within 15 s: %s", what)
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func holds(t *testing.T, path, want string) {
	t.Helper()
	got, err := os.ReadFile(path)
	check(t, err)
	if string(got) != want {
		t.Errorf("%s holds %q, want %q", filepath.Base(path), got, want)
	}
}

func exists(t *testing.T, path string, want bool) {
	t.Helper()
	if _, err := os.Lstat(path); (err == nil) != want {
		t.Errorf("%s: exists is %v, want %v", path, err == nil, want)
	}
}

func put(t *testing.T, path, content string) string {
	t.Helper()
	check(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// makeCgroup makes a cgroup for the test; whatever is left of it is removed.
func makeCgroup(t *testing.T, hierarchy string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("making cgroups needs root")
	}
	dir, err := os.MkdirTemp(filepath.Join("/sys/fs/cgroup", hierarchy), "guardian-test-")
	check(t, err)
	t.Cleanup(func() { check(t, RemoveCgroups([]string{dir}).Do()) })
	return dir
}

// startSleep starts a process that lasts; it is killed and reaped at the end.
func startSleep(t *testing.T, cgroups ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for _, dir := range cgroups {
		check(t, writeOnce(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid))))
	}
	return cmd
}

func countDescriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(fds)
}
