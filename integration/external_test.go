package integration

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// host is what a container is given from outside: a pipe that is read to its end,
// a socket that answers, and a file.
type host struct {
	files []*os.File // as descriptors 3, 4 and 5
	lines chan string
}

func newHost(c *container) *host {
	c.t.Helper()
	h := &host{lines: make(chan string, 1000)}
	r, w, err := os.Pipe()
	c.must(err)
	go func() {
		for in := bufio.NewScanner(r); in.Scan(); {
			select {
			case h.lines <- in.Text():
			default: // nobody looks
			}
		}
		r.Close()
	}()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	c.must(err)
	go func() {
		b := make([]byte, 8)
		for {
			n, err := unix.Read(pair[0], b)
			if err == unix.EINTR {
				continue
			}
			if n <= 0 {
				unix.Close(pair[0])
				return
			}
			_, _ = unix.Write(pair[0], b[:n])
		}
	}()
	log, err := os.OpenFile(filepath.Join(c.dir, "host.log"), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	c.must(err)
	h.files = []*os.File{w, os.NewFile(uintptr(pair[1]), "socket"), log}
	return h
}

// give runs a command that has the host's files as descriptors from 3 on, and
// leaves what it keeps of them to it.
func (h *host) give(c *container, name string, args ...string) {
	c.t.Helper()
	std := c.stdio()
	defer std.close()
	cmd := exec.Command(name, append([]string{"--root", c.root}, args...)...)
	cmd.Dir, cmd.ExtraFiles = c.dir, h.files
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.stdin, std.stdout, std.stderr
	if err := cmd.Run(); err != nil {
		c.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, c.stderr())
	}
	for _, f := range h.files {
		f.Close()
	}
	c.adopt()
}

// TestExternal leaves out what the container was given from outside, and gives
// others to it, twice: by inode, and by number.
func TestExternal(t *testing.T) {
	c := newContainer(t, withReport("external"), withArgs("/bin/external"))
	h := newHost(c)
	h.give(c, "runc", "run", "-d", "--preserve-fds", "3", "--bundle", c.bundle, c.id)
	c.progress(5)
	c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", "close it before")
	refuse := func(word string, keys ...string) {
		t.Helper()
		args := []string{"checkpoint", "--image-path", c.newImage()}
		for _, key := range keys {
			args = append(args, "--external", key)
		}
		c.ocickpt(append(args, c.id)...).mustRefuse(t, word)
	}
	refuse("no key of an open file", "pipe:5")
	refuse("pipe[1]: no open file", "fd[1:3]", "pipe[1]")
	refuse("the same open file as fd[1:4]", "fd[1:4]", "fd[1:10]")
	refuse("fd 3", "fd[1:4]", "fd[1:5]")
	keys := h.keys(c)
	for range 2 {
		args := []string{}
		for _, key := range keys {
			args = append(args, "--external", key)
		}
		if said := c.checkpoint(args...).stderr; strings.Count(said, "is left out") != 3 {
			t.Errorf("not every file that is left out is mentioned: %s", said)
		}
		c.mustBeGone()
		if r := c.ocickpt("inspect", filepath.Join(c.image(), "checkpoint.img")); !strings.Contains(r.stdout, "\n  "+keys[0]+"  ") {
			t.Errorf("inspect does not list %s:\n%s", keys[0], r.stdout)
		}
		c.refuseGiven(keys)
		h = newHost(c)
		h.give(c, c.binary(), append([]string{"restore", "--detach", "--bundle", c.bundle, "--image-path", c.image(),
			"--fd", keys[0] + "=3", "--fd", keys[1] + "=4", "--fd", keys[2] + "=5"}, c.id)...)
		c.mustBe(specs.StateRunning)
		c.progress(10)
		if line := <-h.lines; line == "" {
			t.Error("nothing comes out of the new pipe")
		}
		keys = []string{"fd[1:3]", "fd[1:4]", "fd[1:5]"}
	}
	log, err := os.ReadFile(filepath.Join(c.dir, "host.log"))
	c.must(err)
	for i, line := range strings.Split(strings.TrimSpace(string(log)), "\n") {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d of the host's file is %q", i+1, line)
		}
	}
}

// keys are those of the host's files by inode.
func (h *host) keys(c *container) (keys []string) {
	for fd, form := range map[int]string{3: "pipe[%[2]d]", 4: "socket[%[2]d]", 5: "file[%d:%d]"} {
		var st unix.Stat_t
		c.must(unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", c.state().Pid, fd), &st))
		for len(keys) < 3 {
			keys = append(keys, "")
		}
		keys[fd-3] = fmt.Sprintf(form, st.Dev, st.Ino)
	}
	return keys
}

// refuseGiven tries to restore with too few files, too many, and wrong ones.
func (c *container) refuseGiven(keys []string) {
	c.t.Helper()
	null, zero := "0", "1" // of command, which are /dev/null and a file
	for _, wrong := range []struct {
		words []string
		given []string
	}{
		{[]string{"external ", "nothing is given for it", "--fd"}, nil},
		{[]string{"the image has no such key"}, []string{keys[0] + "=6", keys[1] + "=7", keys[2] + "=8", "pipe[1]=6"}},
		{[]string{"file of another type"}, []string{keys[0] + "=" + null, keys[1] + "=" + null, keys[2] + "=" + null}},
		{[]string{"not open for what"}, []string{keys[0] + "=6", keys[1] + "=7", keys[2] + "=" + zero}},
		{[]string{"bad file descriptor"}, []string{keys[0] + "=900", keys[1] + "=900", keys[2] + "=900"}},
		{[]string{"it is KEY=N"}, []string{keys[0]}},
		{[]string{"there is one"}, []string{keys[0] + "=1", keys[0] + "=2"}},
	} {
		args := []string{"--root", c.root, "restore", "--detach", "--bundle", c.bundle, "--image-path", c.image()}
		for _, g := range wrong.given {
			args = append(args, "--fd", g)
		}
		h := newHost(c)
		cmd := exec.Command(c.binary(), append(args, c.id)...)
		cmd.Dir, cmd.ExtraFiles = c.dir, append([]*os.File{nil, nil, nil}, h.files...)
		out, err := os.OpenFile(filepath.Join(c.dir, "reads"), os.O_RDONLY|os.O_CREATE, 0o600)
		c.must(err)
		cmd.Stdout = out
		said := &strings.Builder{}
		cmd.Stderr = said
		_ = cmd.Run()
		result{stderr: said.String(), code: cmd.ProcessState.ExitCode()}.mustRefuse(c.t, wrong.words...)
		for _, f := range append(h.files, out) {
			f.Close()
		}
	}
}
