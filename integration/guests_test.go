package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// guest brings a program into the container by runc exec, its standard streams
// pipes of the test's, and returns its pid on the host.
func (c *container) guest(flags []string, args ...string) int {
	c.t.Helper()
	pipe := func() (r, w *os.File) {
		r, w, err := os.Pipe()
		c.must(err)
		c.t.Cleanup(func() { r.Close(); w.Close() })
		return r, w
	}
	in, _ := pipe()
	discard, out := pipe()
	go func() {
		for b := make([]byte, 4096); ; {
			if _, err := discard.Read(b); err != nil {
				return
			}
		}
	}()
	pidFile := filepath.Join(c.dir, "exec.pid")
	flags = append([]string{"--root", c.root, "exec", "-d", "--pid-file", pidFile}, flags...)
	r := c.command(outputs{stdin: in, stdout: out}, "runc", append(append(flags, c.id), args...)...)
	if r.code != 0 {
		c.t.Fatalf("runc exec: exit status %d\n%s", r.code, r.stderr)
	}
	text, err := os.ReadFile(pidFile)
	c.must(err)
	pid, err := strconv.Atoi(string(text))
	c.must(err)
	go reap(pid) // its parent was runc exec, so it is the test's child
	return pid
}

// guests lists the host's pids of those in the container's pid namespace whose
// parent is the test process, but for the init.
func (c *container) guests() (pids []int) {
	c.t.Helper()
	init := c.state().Pid
	inside, err := os.Readlink("/proc/" + strconv.Itoa(init) + "/ns/pid")
	c.must(err)
	for name := range children() {
		pid, _ := strconv.Atoi(name)
		if ns, err := os.Readlink("/proc/" + name + "/ns/pid"); err == nil && ns == inside && pid != init {
			pids = append(pids, pid)
		}
	}
	return pids
}

// adoptGuest finds the one guest of a restored container, sees that it is where
// the init is, and reaps it when it ends.
func (c *container) adoptGuest() int {
	c.t.Helper()
	pids := c.guests()
	if len(pids) != 1 {
		c.t.Fatalf("the container has the guests %v, not one", pids)
	}
	at := func(pid int) (all string) {
		for _, kind := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
			ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns", kind))
			c.must(err)
			all += ns + "\n"
		}
		groups, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
		c.must(err)
		s, err := readStatus(pid)
		c.must(err)
		return all + string(groups) + "traced by " + s["TracerPid"] + ", seccomp " + s["Seccomp_filters"]
	}
	if guest, init := at(pids[0]), at(c.state().Pid); guest != init {
		c.t.Errorf("the guest is in\n%s\nand the init in\n%s", guest, init)
	}
	go reap(pids[0])
	return pids[0]
}

// TestExecSessions checkpoints and restores a process of runc exec, with what
// descends from it, twice.
func TestExecSessions(t *testing.T) {
	c := treeContainer(t)
	c.guest(nil, "/bin/guest")
	tree := c.report
	c.report = "guest"
	c.progress(5)
	c.step(t, "fail", func(t *testing.T) {
		c.ocickpt("checkpoint", "--exec-sessions=fail", "--image-path", c.newImage(), c.id).
			mustRefuse(t, "guest", "runc exec", "--exec-sessions=keep")
		c.ocickpt("checkpoint", "--exec-sessions=drop", "--image-path", c.newImage(), c.id).mustRefuse(t, "drop")
		absent(t, c.image())
		c.progress(5)
	})
	c.checkpoint("--leave-running")
	c.progress(5)
	for range 2 {
		before := c.tree()
		r := c.checkpoint()
		for _, warning := range []string{"brought in by exec", "/dev/null"} {
			if c.images == 4 && !strings.Contains(r.stderr, warning) {
				t.Errorf("no warning about %q:\n%s", warning, r.stderr)
			}
		}
		c.mustBeGone()
		c.restore()
		c.adoptGuest()
		for pid, p := range c.tree() {
			if before[pid] != p && p.Name == "guest" {
				t.Errorf("task %d is %+v and was %+v", pid, p, before[pid])
			}
		}
		c.progress(5)
		c.report = tree
		c.progress(5)
		c.report = "guest"
	}
	c.step(t, "foreground", func(t *testing.T) {
		c.checkpoint()
		c.mustBeGone()
		cmd := c.foreground("restore", "--bundle", c.bundle, "--image-path", c.image(), c.id)
		c.progress(5)
		c.runc("kill", c.id, "KILL")
		cmd.Wait()
	})
}

// TestExecSessionOfMoreRights restores a guest that was given a capability that
// the bundle does not have: an image grants nothing.
func TestExecSessionOfMoreRights(t *testing.T) {
	c := treeContainer(t)
	c.guest([]string{"--cap", "CAP_SYS_ADMIN"}, "/bin/guest")
	c.report = "guest"
	c.progress(5)
	r := c.checkpoint()
	if !strings.Contains(r.stderr, "CAP_SYS_ADMIN") {
		t.Errorf("no warning about the capability:\n%s", r.stderr)
	}
	c.mustBeGone()
	c.tryRestoreFile(filepath.Join(c.image(), "checkpoint.img"), c.bundle).mustRefuse(t, "CAP_SYS_ADMIN", "task ")
	spec := &specs.Spec{}
	data, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	c.must(err)
	c.must(json.Unmarshal(data, spec))
	withCapabilities("CAP_SYS_ADMIN")(c, spec)
	c.writeSpec(spec)
	c.restore()
	c.mustBe(specs.StateRunning)
	c.adoptGuest()
	c.progress(5)
}
