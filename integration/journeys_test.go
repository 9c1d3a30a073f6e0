package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ocickpt/ocickpt/image"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestJourney takes every program through all a checkpoint and restore can do:
// three generations, then a checkpoint that leaves it running.
func TestJourney(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) { p.journey(t) })
	}
}

// TestJourneyCgroupV2 is the same on a pure cgroup v2, for programs that cover
// the freezer: a tree, many threads, many sleeping system calls and
// parents in vfork.
func TestJourneyCgroupV2(t *testing.T) {
	onCgroupV2(t, func(t *testing.T) {
		for _, p := range programs {
			if slices.Contains([]string{"tree", "threads", "sleepers", "vfork", "connections"}, p.name) {
				t.Run(p.name, func(t *testing.T) { p.journey(t) })
			}
		}
	})
}

// TestJourneyMapped is the same in a user namespace.
func TestJourneyMapped(t *testing.T) {
	for _, p := range mapped {
		t.Run(p.name, func(t *testing.T) { p.journey(t) })
	}
}

func (p program) journey(t *testing.T) {
	c := p.start(t)
	for range 3 {
		cycle(c, 1)
		if p.loopback {
			c.raiseLoopback()
		}
		p.checkConnect(c)
	}
	p.leaveRunning(c)
}

// leaveRunning checkpoints a program that runs on and must not have noticed.
func (p program) leaveRunning(c *container) {
	c.t.Helper()
	before := c.stableTree()
	c.checkpoint("--leave-running")
	c.mustBe(specs.StateRunning)
	c.sameTree(before)
	c.progress(30)
	p.checkConnect(c)
}

// TestCousins checkpoints processes that share memory which they have of a
// parent that is gone: it says so, and each keeps what it holds.
func TestCousins(t *testing.T) {
	c := newContainer(t, withReport("prefork"), withArgs("/bin/prefork", "cousins")).run()
	c.progress(10)
	r := c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id)
	if r.code != 0 || !strings.Contains(r.stderr, "shared by fork with other processes") {
		t.Fatalf("exit status %d, no warning: %s", r.code, r.stderr)
	}
	c.mustBeGone()
	c.restore()
	c.progress(30)
	cycle(c, 1)
}

// TestManyAreas restores an address space of nearly as many areas as one may
// have (vm.max_map_count).
func TestManyAreas(t *testing.T) {
	c := newContainer(t, withReport("manyareas"), withArgs("/bin/manyareas")).run()
	c.progress(3)
	cycle(c, 2)
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", c.state().Pid))
	c.must(err)
	if n := bytes.Count(maps, []byte("\n")); n < 50000 {
		t.Errorf("%d areas are left of 50000", n)
	}
}

// TestImageFiles looks at what a checkpoint writes: one private file, an id of
// its own for each, and both readers content with it.
func TestImageFiles(t *testing.T) {
	c := treeContainer(t)
	ids := map[string]bool{}
	for range 2 {
		c.checkpoint("--leave-running")
		name := filepath.Join(c.image(), "checkpoint.img")
		info, err := os.Stat(name)
		c.must(err)
		if info.Mode() != 0o600 {
			t.Errorf("the image's mode is %v, not -rw-------", info.Mode())
		}
		ids[imageID(c, name)] = true
		if r := c.ocickpt("verify", name); r.code != 0 {
			t.Errorf("verify: exit status %d\n%s", r.code, r.stderr)
		}
		if r := c.ocickpt("inspect", name); r.code != 0 || !strings.Contains(r.stdout, c.id) {
			t.Errorf("inspect does not name the container: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
		}
	}
	if len(ids) != 2 {
		t.Errorf("two checkpoints have the ids %v", ids)
	}
}

func imageID(c *container, name string) string {
	c.t.Helper()
	r := c.ocickpt("inspect", "--json", name)
	if r.code != 0 {
		c.t.Fatalf("inspect --json: exit status %d\n%s", r.code, r.stderr)
	}
	var summary image.Summary
	if err := json.Unmarshal([]byte(r.stdout), &summary); err != nil {
		c.t.Fatalf("inspect --json: %v\n%s", err, r.stdout)
	}
	if summary.ID == "" {
		c.t.Fatalf("inspect --json shows no image id:\n%s", r.stdout)
	}
	return summary.ID
}

func treeContainer(t *testing.T, options ...option) *container {
	t.Helper()
	c := newContainer(t, append([]option{withReport("tree"), withArgs("/bin/tree.sh")}, options...)...).run()
	c.progress(20)
	return c
}

// TestRuncOwnsRestored runs every verb of stock runc on a restored container.
func TestRuncOwnsRestored(t *testing.T) {
	c := treeContainer(t)
	c.checkpoint()
	c.mustBeGone()
	pidFile := filepath.Join(c.dir, "pid")
	c.restore("--pid-file", pidFile)

	pid, err := os.ReadFile(pidFile)
	c.must(err)
	if want := strconv.Itoa(c.state().Pid); strings.TrimSpace(string(pid)) != want {
		t.Errorf("the pid file says %q, runc state %s", pid, want)
	}
	if list := c.runc("list", "--quiet"); strings.TrimSpace(list) != c.id {
		t.Errorf("runc list shows %q", list)
	}
	if got := c.exec("sh", "-c", "hostname; readlink /proc/self/ns/time"); !strings.HasPrefix(got, c.id) {
		t.Errorf("runc exec sees %q", got)
	}
	if ps := c.runc("ps", c.id); !strings.Contains(ps, "tree.sh") {
		t.Errorf("runc ps shows\n%s", ps)
	}
	c.runc("pause", c.id)
	c.mustBe("paused")
	still := c.rounds()
	time.Sleep(300 * time.Millisecond)
	if now := c.rounds(); now != still {
		t.Errorf("the paused container went on from %d to %d", still, now)
	}
	c.runc("resume", c.id)
	c.progress(10)
	c.runc("kill", c.id, "KILL")
	<-c.gone
	c.mustBe(specs.StateStopped)
	c.runc("delete", c.id)
	if c.tryRunc("state", c.id).code == 0 {
		t.Error("runc delete left the container")
	}
}

// TestClocksGoOn asserts that boot time, as the container's processes see it,
// does not count the time between checkpoint and restore. (runc exec would show
// another clock where the runc is too old to join a time namespace: before 1.2.)
func TestClocksGoOn(t *testing.T) {
	const script = `n=0; while read -r up idle </proc/uptime; do
		n=$((n+1)); echo "$n $up" >>/out/clock; sleep 0.05; done`
	c := newContainer(t, withReport("clock"), withArgs("sh", "-c", script)).run()
	c.progress(10)
	c.checkpoint()
	c.mustBeGone()
	time.Sleep(3 * time.Second)
	c.restore()
	c.progress(10)
	data, err := os.ReadFile(c.out("clock"))
	c.must(err)
	var last float64
	for i, line := range strings.Split(strings.TrimSpace(string(data)), "\n") {
		_, text, _ := strings.Cut(line, " ")
		up, err := strconv.ParseFloat(text, 64)
		c.must(err)
		if gap := up - last; i > 0 && (gap < 0 || gap > 2.5) {
			t.Errorf("round %d: boot time went on by %.2f s over a checkpoint of more than 3 s", i+1, gap)
		}
		last = up
	}
}

// TestPausedStaysPaused checkpoints a container its engine has paused.
func TestPausedStaysPaused(t *testing.T) {
	c := treeContainer(t)
	c.runc("pause", c.id)
	still := c.rounds()
	c.checkpoint("--leave-running")
	c.mustBe("paused")
	time.Sleep(200 * time.Millisecond)
	if now := c.rounds(); now != still {
		t.Errorf("the paused container went on from %d to %d", still, now)
	}
	c.runc("resume", c.id)
	c.progress(20)
	c.runc("pause", c.id)
	c.checkpoint()
	c.mustBeGone()
	c.restore()
	if c.state().Status == "paused" {
		c.runc("resume", c.id)
	}
	c.progress(20)
}

// TestNewIDAndBundle restores under another id from another bundle.
func TestNewIDAndBundle(t *testing.T) {
	c := treeContainer(t)
	before := c.stableTree()
	c.checkpoint()
	c.mustBeGone()
	bundle := c.bundle + "-2"
	c.must(os.Rename(c.bundle, bundle))
	c.bundle = bundle
	c.id += "b"
	c.restore()
	c.sameTree(before)
	c.progress(20)
	cycle(c, 1)
}

// TestThroughPipe restores while the checkpoint is being written, from its
// standard output.
func TestThroughPipe(t *testing.T) {
	c := newContainer(t, withReport("memory"), withArgs("/bin/memory")).run()
	c.progress(30)
	before := c.stableTree()
	reader, writer, err := os.Pipe()
	c.must(err)
	target := c.id + "-copy"
	done := make(chan result)
	go func() {
		defer writer.Close()
		done <- c.command(outputs{stdout: writer}, c.binary(), "--root", c.root, "checkpoint", "--image", "-", c.id)
	}()
	std := c.stdio()
	defer std.close()
	std.stdin = reader
	r := c.command(std, c.binary(), "--root", c.root, "restore", "--image", "-", "--bundle", c.bundle, "--detach", target)
	if dump := <-done; dump.code != 0 || r.code != 0 {
		t.Fatalf("checkpoint: exit status %d\n%srestore: exit status %d\n%s", dump.code, dump.stderr, r.code, c.stderr())
	}
	c.mustBeGone()
	c.id = target
	c.adopt()
	c.sameTree(before)
	c.progress(30)
}

// TestForeground restores without --detach: the command stays, forwards a
// signal and ends with the init's status.
func TestForeground(t *testing.T) {
	const script = `trap 'exit 42' TERM; n=0
		while :; do n=$((n+1)); echo $n >>/out/foreground; sleep 0.05; done`
	c := newContainer(t, withReport("foreground"), withArgs("sh", "-c", script)).run()
	c.progress(10)
	c.checkpoint()
	c.mustBeGone()
	cmd := c.foreground("restore", "--bundle", c.bundle, "--image-path", c.image(), c.id)
	c.progress(20)
	c.must(cmd.Process.Signal(unix.SIGTERM))
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 42 {
		t.Errorf("restore ended with %v, init's status is 42", cmd.ProcessState)
	}
}

// TestStdio restores a container whose standard output is a pipe: what it
// writes afterwards must come out of the restoring command's.
func TestStdio(t *testing.T) {
	const script = `n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done`
	c := newContainer(t, withArgs("sh", "-c", script)).run()
	stdout := func() string {
		data, err := os.ReadFile(filepath.Join(c.dir, "stdout"))
		c.must(err)
		return string(data)
	}
	lines := func() int { return strings.Count(stdout(), "\n") }
	if !waitFor(func() bool { return lines() > 10 }) {
		t.Fatal("the container writes nothing")
	}
	c.checkpoint()
	c.mustBeGone()
	c.restore()
	stopped := lines()
	if !waitFor(func() bool { return lines() > stopped+10 }) {
		t.Fatal("the restored container writes nothing to the restorer's standard output")
	}
	for i, line := range strings.Fields(stdout()) {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of the output is %q", i+1, line)
		}
	}
}

// TestCheck has ocickpt prove this host by a container of its own.
func TestCheck(t *testing.T) {
	c := newContainer(t)
	if r := c.ocickpt("check"); r.code != 0 {
		t.Errorf("check: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
