package integration

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestVforkWithoutBPF: where nobody can read a vfork parent, it is waited for and
// then named, and the container goes on as it was.
func TestVforkWithoutBPF(t *testing.T) {
	c := newContainer(t, withReport("vfork"), withArgs("/bin/vfork"), withCapabilities("CAP_SETUID", "CAP_SETGID")).run()
	c.progress(30)
	t.Setenv("OCICKPT_NO_BPF", "1")
	c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "vfork(2)", "try again")
	absent(t, c.image())
	c.mustBe(specs.StateRunning)
	c.progress(30)
	program{connect: "vfork.go"}.checkConnect(c)
}

// TestSpawner checkpoints a program that does nothing but posix_spawn(3), in
// whatever state of it the checkpoint finds it.
func TestSpawner(t *testing.T) {
	c := newContainer(t, withReport("spawner"), withArgs("/bin/vfork", "spawn")).run()
	for range 8 {
		c.progress(10)
		c.checkpoint("--leave-running")
		c.mustBe(specs.StateRunning)
	}
	for range 4 {
		c.progress(10)
		c.checkpoint()
		c.mustBeGone()
		c.restore()
	}
	c.progress(10)
}

// TestVforkPaused does it to a container that its engine has paused.
func TestVforkPaused(t *testing.T) {
	c := newContainer(t, withReport("vfork"), withArgs("/bin/vfork"), withCapabilities("CAP_SETUID", "CAP_SETGID")).run()
	c.progress(10)
	c.runc("pause", c.id)
	c.checkpoint("--leave-running")
	c.mustBe("paused")
	c.runc("resume", c.id)
	c.progress(10)
	program{connect: "vfork.go"}.checkConnect(c)
	c.runc("pause", c.id)
	c.checkpoint()
	c.mustBeGone()
	c.restore()
	if c.state().Status == "paused" {
		c.runc("resume", c.id)
	}
	c.progress(10)
	program{connect: "vfork.go"}.checkConnect(c)
}
