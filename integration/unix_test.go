package integration

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
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
