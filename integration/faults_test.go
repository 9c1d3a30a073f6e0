package integration

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// outside is what a test sees of a container's tasks from the host, for
// comparing before and after a checkpoint that failed: everything in it would
// show something left behind.
func (c *container) outside() string {
	c.t.Helper()
	var b strings.Builder
	dir := fmt.Sprintf("/proc/%d", c.state().Pid)
	maps, err := os.ReadFile(filepath.Join(dir, "maps"))
	c.must(err)
	fmt.Fprintf(&b, "%s\n", maps)
	descriptors, err := os.ReadDir(filepath.Join(dir, "fd"))
	c.must(err)
	for _, d := range descriptors {
		target, _ := os.Readlink(filepath.Join(dir, "fd", d.Name()))
		if !strings.HasPrefix(target, "/proc/") { // what the program itself is looking at
			fmt.Fprintf(&b, "fd %s %s\n", d.Name(), target)
		}
	}
	tasks, err := os.ReadDir(filepath.Join(dir, "task"))
	c.must(err)
	for _, task := range tasks {
		children, err := os.ReadFile(filepath.Join(dir, "task", task.Name(), "children"))
		c.must(err)
		fmt.Fprintf(&b, "task %s children %s\n", task.Name(), children)
	}
	return b.String()
}

// undisturbed starts the program that looks for traces in itself.
func undisturbed(t *testing.T) *container {
	t.Helper()
	c := newContainer(t, withReport("undisturbed"), withArgs("/bin/undisturbed")).run()
	c.progress(10)
	return c
}

// mustBeUndisturbed asserts that the container runs as if nothing had happened.
// The guardian may still be putting it back when its coordinator is dead.
func (c *container) mustBeUndisturbed(before string) {
	c.t.Helper()
	if !waitFor(func() bool { return c.state().Status == specs.StateRunning }) {
		c.t.Fatalf("the container is %s", c.state().Status)
	}
	c.progress(5)
	var now string
	// A temporary descriptor of the program's own may be seen by chance.
	if !waitFor(func() bool { now = c.outside(); return now == before }) {
		c.t.Fatalf("from outside the program was\n%s\nand is\n%s", before, now)
	}
}

// faultPoints walks one good checkpoint or restore and returns the name of each
// fault point it passes, in order, with repetitions.
func faultPoints(c *container, args ...string) (points []string) {
	c.t.Helper()
	c.t.Setenv(envFault, "list")
	r := c.ocickpt(args...)
	c.t.Setenv(envFault, "")
	if r.code != 0 {
		c.t.Fatalf("%v: exit status %d\n%s", args, r.code, r.stderr)
	}
	for line := range strings.Lines(r.stderr) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "fault point "); ok {
			points = append(points, name)
		}
	}
	if len(points) == 0 {
		c.t.Fatal("no fault point was passed")
	}
	return points
}

// envFault arms a fault point of ocickpt; see package fault.
const envFault = "OCICKPT_FAULT"

var faultActions = []string{"fail", "term", "kill"}

// TestCheckpointFaults makes a checkpoint fail in three ways at the first and at
// a later passing of every fault point.
func TestCheckpointFaults(t *testing.T) {
	c := undisturbed(t)
	before := c.outside()
	image := filepath.Join(c.dir, "faulty")
	args := []string{"checkpoint", "--leave-running", "--image-path", image, c.id}
	points := faultPoints(c, args...)
	c.mustBeUndisturbed(before)
	for _, point := range distinct(points) {
		for _, action := range faultActions {
			for _, nth := range passings(points, point) {
				name := fmt.Sprintf("%s#%d:%s", point, nth, action)
				c.step(t, name, func(t *testing.T) {
					t.Setenv(envFault, name)
					r := c.ocickpt(args...)
					t.Logf("exit status %d, %s", r.code, r.stderr)
					t.Setenv(envFault, "")
					c.mustBeUndisturbed(before)
				})
				if t.Failed() {
					return // what follows would be judged by a disturbed program
				}
			}
		}
	}
}

// TestSandboxedFaults kills ocickpt wherever it is about to do something to a
// thread that its seccomp filter would punish for nearly every call.
func TestSandboxedFaults(t *testing.T) {
	c := newContainer(t, withReport("sandboxed"), withArgs("/bin/sandboxed")).run()
	c.progress(10)
	args := []string{"checkpoint", "--leave-running", "--image-path", filepath.Join(c.dir, "faulty"), c.id}
	points := faultPoints(c, args...)
	before := c.stableTree()
	for _, point := range distinct(points) {
		if !strings.HasPrefix(point, "tracee.") {
			continue
		}
		// The first thread has no filter; of the others one may come back from a
		// batch by system calls, one may not, and one has strict mode.
		n := len(slices.DeleteFunc(slices.Clone(points), func(p string) bool { return p != point }))
		for _, nth := range []int{2, 3, 5, 20} {
			if nth > n {
				break
			}
			name := fmt.Sprintf("%s#%d:kill", point, nth)
			c.step(t, name, func(t *testing.T) {
				t.Setenv(envFault, name)
				r := c.ocickpt(args...)
				t.Logf("exit status %d, %s", r.code, r.stderr)
				t.Setenv(envFault, "")
				c.progress(5)
				c.sameTree(before)
			})
			if t.Failed() {
				return
			}
		}
	}
}

// passings chooses the first, a middle and the last passing of a point.
func passings(points []string, point string) []int {
	n := 0
	for _, p := range points {
		if p == point {
			n++
		}
	}
	return slices.Compact([]int{1, (n + 1) / 2, n})
}

func distinct(points []string) []string {
	points = slices.Clone(points)
	slices.Sort(points)
	return slices.Compact(points)
}

// TestKilledCheckpoint kills ocickpt at random moments.
func TestKilledCheckpoint(t *testing.T) {
	c := undisturbed(t)
	before := c.outside()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for i := range 60 {
		sig := []unix.Signal{unix.SIGKILL, unix.SIGKILL, unix.SIGTERM}[i%3]
		cmd := exec.Command(c.binary(), "--root", c.root, "checkpoint", "--leave-running",
			"--image-path", filepath.Join(c.dir, "killed"), c.id)
		cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp)
		c.must(cmd.Start())
		time.Sleep(time.Duration(random.IntN(60000)) * time.Microsecond)
		cmd.Process.Signal(sig)
		cmd.Wait()
		c.mustBeUndisturbed(before)
	}
}

// TestRestoreFaults makes a restore fail at every fault point. No process may
// survive, and the next restore of the id must work.
func TestRestoreFaults(t *testing.T) {
	c := treeContainer(t)
	c.checkpoint()
	c.mustBeGone()
	points := faultPoints(c, "restore", "--detach", "--bundle", c.bundle, "--image-path", c.image(), c.id)
	c.adopt()
	c.progress(10)
	for _, point := range distinct(points) {
		for _, action := range faultActions {
			c.checkpoint()
			c.mustBeGone()
			c.step(t, point+":"+action, func(t *testing.T) {
				t.Setenv(envFault, point+":"+action)
				r := c.tryRestore()
				t.Logf("exit status %d, %s", r.code, r.stderr)
			})
			c.afterBrokenRestore()
			if t.Failed() {
				return
			}
		}
	}
}

// TestKilledRestore kills ocickpt at random moments of a restore.
func TestKilledRestore(t *testing.T) {
	c := treeContainer(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 20 {
		c.checkpoint()
		c.mustBeGone()
		cmd := c.foreground("restore", "--detach", "--bundle", c.bundle, "--image-path", c.image(), c.id)
		time.Sleep(time.Duration(random.IntN(80000)) * time.Microsecond)
		cmd.Process.Kill()
		cmd.Wait()
		c.afterBrokenRestore()
	}
}

// afterBrokenRestore asserts that a restore that was cut short left either the
// whole container, running, or no process of it. In the latter case state
// directory, mounts and cgroups may last until the next restore of the id, which
// must clear them away and work.
func (c *container) afterBrokenRestore() {
	c.t.Helper()
	if c.complete() {
		c.adopt()
	} else {
		if !waitFor(func() bool { return len(survivors(c)) == 0 }) {
			c.t.Fatalf("processes survive the failed restore: %v", survivors(c))
		}
		// Its guardian takes the state away; who comes before that is told that
		// the container exists.
		waitFor(func() bool {
			_, err := os.Stat(filepath.Join(c.root, c.id))
			return errors.Is(err, os.ErrNotExist)
		})
		c.restore()
	}
	c.progress(5)
}

// complete tells whether the restore was over before it was cut short: then the
// container goes on, else runc knows none or a stopped one before long.
func (c *container) complete() bool {
	c.t.Helper()
	rounds, alive := c.rounds(), false
	waitFor(func() bool {
		alive = c.rounds() > rounds+2
		r := c.tryRunc("state", c.id)
		return alive || r.code != 0 || strings.Contains(r.stdout, string(specs.StateStopped))
	})
	return alive
}

// survivors lists the pids in whatever cgroups the container still has.
func survivors(c *container) (pids []string) {
	for _, leak := range leakedCgroups(c) {
		dir := strings.TrimPrefix(leak, "cgroup ")
		data, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		pids = append(pids, strings.Fields(string(data))...)
	}
	return pids
}
