package integration

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestUnixOutside checkpoints a container that is connected to a service of the
// host: refused by default, connected again, or closed.
func TestUnixOutside(t *testing.T) {
	var at string
	c := newContainer(t, withReport("unixes"), withArgs("/bin/unixes", "outside"), func(c *container, spec *specs.Spec) {
		dir := filepath.Join(c.dir, "service")
		at = filepath.Join(dir, "s")
		c.must(os.Mkdir(dir, 0o755))
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"bind"}})
		spec.Process.Env = append(spec.Process.Env, "OUTSIDE="+at)
	})
	l, err := net.Listen("unix", at)
	c.must(err)
	defer l.Close()
	heard := make(chan struct{})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			one := make([]byte, 1)
			if _, err := io.ReadFull(conn, one); err == nil {
				heard <- struct{}{}
			}
			go func() { _, _ = io.Copy(io.Discard, conn) }()
		}
	}()
	c.run()
	<-heard
	c.progress(5)
	c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", at, "--ext-unix-sk")
	c.progress(5)
	c.checkpoint("--ext-unix-sk")
	c.mustBeGone()
	c.restore()
	<-heard
	c.progress(5)
	c.checkpoint("--ext-unix-sk=disconnect")
	c.mustBeGone()
	c.restore()
	c.progress(5)
	if _, err := os.Stat(c.out("unixes.closed")); err != nil {
		t.Error("the connection is not closed")
	}
}

// TestUnixFaults fails and kills ocickpt while it looks into queues: nothing is
// gone, and the option that it changes for that is soon what it was.
func TestUnixFaults(t *testing.T) {
	c := newContainer(t, withReport("unixes"), withArgs("/bin/unixes", "rights")).run()
	c.progress(5)
	before := c.stableTree()
	for _, where := range []string{"sock.peek:fail", "sock.peek#1:kill", "sock.peek#2:kill", "sock.peek#3:fail", "checkpoint.chunk:fail", "commit:kill"} {
		c.step(t, where, func(t *testing.T) {
			t.Setenv(envFault, where)
			r := c.ocickpt("checkpoint", "--leave-running", "--image-path", filepath.Join(c.dir, "faulty"), c.id)
			t.Setenv(envFault, "")
			if r.code == 0 || strings.HasSuffix(where, "fail") && !strings.Contains(r.stderr, "injected") {
				t.Errorf("exit status %d, %s", r.code, r.stderr)
			}
			if !waitFor(func() bool { return c.peekedSockets() == 0 }) {
				t.Error("a socket has another SO_PEEK_OFF")
			}
			c.progress(5)
			c.sameTree(before)
		})
	}
	cycle(c, 1)
}

// peekedSockets counts the init's unix sockets with an SO_PEEK_OFF.
func (c *container) peekedSockets() (n int) {
	c.t.Helper()
	pidfd, err := unix.PidfdOpen(c.state().Pid, 0)
	c.must(err)
	defer unix.Close(pidfd)
	for fd := range 32 {
		got, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		if off, err := unix.GetsockoptInt(got, unix.SOL_SOCKET, unix.SO_PEEK_OFF); err == nil && off != -1 {
			n++
		}
		unix.Close(got)
	}
	return n
}
