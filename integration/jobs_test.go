package integration

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// jobsContainer runs the program whose children are in all states of job control.
func jobsContainer(t *testing.T, args ...string) (program, *container) {
	t.Helper()
	p := program{name: "jobs", connect: "jobs.connect"}
	c := newContainer(t, withReport("jobs"), withArgs(append([]string{"/bin/jobs"}, args...)...)).run()
	c.progress(5)
	return p, c
}

// TestPausedJobs checkpoints stopped tasks that their engine has frozen as well:
// nobody can seize such a one before the thaw.
func TestPausedJobs(t *testing.T) {
	body := func(t *testing.T) {
		p, c := jobsContainer(t)
		c.runc("pause", c.id)
		c.checkpoint("--leave-running")
		c.mustBe("paused")
		c.runc("resume", c.id)
		c.progress(5)
		p.checkConnect(c)
		c.runc("pause", c.id)
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.progress(5)
		p.checkConnect(c)
	}
	t.Run("v1", body)
	onCgroupV2(t, body)
}

// TestJobsFaults lets checkpoints fail, or ocickpt die, while tasks are stopped.
func TestJobsFaults(t *testing.T) {
	p, c := jobsContainer(t, "lax")
	image := filepath.Join(c.dir, "faulty")
	for _, point := range []string{"halt.freeze", "tracee.live.map", "tracee.live.batch", "checkpoint.chunk", "release"} {
		for _, action := range []string{"fail", "kill"} {
			c.step(t, point+":"+action, func(t *testing.T) {
				t.Setenv(envFault, point+":"+action)
				r := c.ocickpt("checkpoint", "--leave-running", "--image-path", image, c.id)
				t.Setenv(envFault, "")
				if r.code == 0 {
					t.Error("the fault did not show")
				}
				if !waitFor(func() bool { return c.state().Status == specs.StateRunning }) {
					t.Fatalf("the container is %s", c.state().Status)
				}
				c.progress(3)
			})
		}
	}
	p.checkConnect(c)
}

// TestLeaveFrozen restores a container that does not run before its engine lets
// it, and checkpoints it as it stands.
func TestLeaveFrozen(t *testing.T) {
	body := func(t *testing.T) {
		p, c := jobsContainer(t)
		frozen := func() {
			c.t.Helper()
			c.checkpoint()
			c.mustBeGone()
			c.restore("--leave-frozen")
			still := c.rounds()
			c.mustBe("paused")
			time.Sleep(100 * time.Millisecond)
			if now := c.rounds(); now != still {
				t.Fatalf("the frozen container went on from %d to %d", still, now)
			}
		}
		frozen()
		c.checkpoint("--leave-running")
		c.mustBe("paused")
		frozen()
		c.runc("resume", c.id)
		c.progress(5)
		p.checkConnect(c)
	}
	t.Run("v1", body)
	onCgroupV2(t, body)
}

// TestStoppedInit stops the init itself, which only somebody outside can do: once
// before the checkpoint, and once while it is frozen, so that the signal is
// still pending.
func TestStoppedInit(t *testing.T) {
	isStopped := func(c *container) bool {
		s, err := readStatus(c.state().Pid)
		return err == nil && strings.HasPrefix(s["State"], "T")
	}
	stillStopped := func(c *container) {
		c.t.Helper()
		if !waitFor(func() bool { return isStopped(c) }) {
			c.t.Fatal("the restored init is not stopped")
		}
		still := c.rounds()
		time.Sleep(150 * time.Millisecond)
		if now := c.rounds(); now != still {
			c.t.Fatalf("the stopped init went on from %d to %d", still, now)
		}
		c.must(unix.Kill(c.state().Pid, unix.SIGCONT))
		c.progress(5)
	}
	t.Run("stopped", func(t *testing.T) {
		c := treeContainer(t)
		c.must(unix.Kill(c.state().Pid, unix.SIGSTOP))
		for range 2 {
			c.checkpoint("--leave-running")
			c.checkpoint()
			c.mustBeGone()
			c.restore()
		}
		stillStopped(c)
	})
	onCgroupV2(t, func(t *testing.T) {
		c := treeContainer(t)
		c.runc("pause", c.id)
		c.must(unix.Kill(c.state().Pid, unix.SIGSTOP))
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		stillStopped(c)
	})
}
