package integration

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/console"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// screen holds the master of a container's terminal, as an engine would, and
// what the container has written to it.
type screen struct {
	path   string // of the socket at which masters arrive
	mu     sync.Mutex
	master *os.File
	text   bytes.Buffer
}

// withTerminal gives the container a terminal of its own.
func withTerminal() option {
	return func(c *container, spec *specs.Spec) {
		spec.Process.Terminal = true
		c.screen = &screen{path: filepath.Join(c.dir, "console.sock")}
		l, err := net.Listen("unix", c.screen.path)
		c.must(err)
		c.t.Cleanup(func() { l.Close() })
		go c.screen.accept(l)
	}
}

func (s *screen) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		control := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, unix.PathMax), control)
		conn.Close()
		messages, _ := unix.ParseSocketControlMessage(control[:n])
		if err != nil || len(messages) != 1 {
			continue
		}
		if fds, err := unix.ParseUnixRights(&messages[0]); err == nil {
			go s.show(os.NewFile(uintptr(fds[0]), "master"))
		}
	}
}

// show reads from a master until nobody has its slave open any more.
func (s *screen) show(master *os.File) {
	s.mu.Lock()
	s.master = master
	s.mu.Unlock()
	buf := make([]byte, 4096)
	for {
		n, err := master.Read(buf)
		if err != nil {
			master.Close()
			return
		}
		s.mu.Lock()
		s.text.Write(buf[:n])
		s.mu.Unlock()
	}
}

func (s *screen) shows(text string) bool {
	return waitFor(func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return strings.Contains(s.text.String(), text)
	})
}

// types writes to the terminal as a user would.
func (c *container) types(line string) {
	c.t.Helper()
	c.screen.mu.Lock()
	defer c.screen.mu.Unlock()
	_, err := c.screen.master.WriteString(line)
	c.must(err)
}

func (c *container) mustShow(text string) {
	c.t.Helper()
	if !c.screen.shows(text) {
		c.t.Fatalf("the terminal does not show %q but\n%s", text, c.screen.text.String())
	}
}

// TestTerminal takes a container with a terminal through journeys: its settings,
// session and foreground stay, and the engine gets the new master.
func TestTerminal(t *testing.T) {
	p := program{name: "terminal", options: []option{withTerminal(), withArgs("/bin/terminal", "own")}}
	c := p.start(t)
	cycle(c, 2)
	p.leaveRunning(c)
}

// echoes is a program that reads lines from its terminal and answers.
const echoes = `n=0; while read line; do n=$((n+1)); echo "$n:$line"; done`

// TestTypedLine types to a container before and after.
func TestTypedLine(t *testing.T) {
	c := newContainer(t, withTerminal(), withArgs("sh", "-c", echoes)).run()
	c.types("one\n")
	c.mustShow("1:one")
	c.checkpoint()
	c.mustBeGone()
	c.restore()
	c.types("two\n")
	c.mustShow("2:two")
}

// TestTerminalInForeground restores without --detach, on a terminal of ours: what
// is typed there reaches the container, and ^D ends it.
func TestTerminalInForeground(t *testing.T) {
	c := newContainer(t, withTerminal(), withArgs("sh", "-c", echoes+"; exit 7")).run()
	c.types("one\n")
	c.mustShow("1:one")
	c.checkpoint()
	c.mustBeGone()
	ours, path, err := console.NewPty()
	c.must(err)
	slave, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	c.must(err)
	cmd := exec.Command(c.binary(), "--root", c.root, "restore", "--bundle", c.bundle, "--image-path", c.image(), c.id)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp)
	c.must(cmd.Start())
	go c.screen.show(os.NewFile(ours.Fd(), "our terminal"))
	if !waitFor(func() bool { return c.tryRunc("state", c.id).code == 0 && c.state().Status == specs.StateRunning }) {
		t.Fatal("the container does not run")
	}
	waitFor(func() bool { // until our terminal is raw, or it would echo by itself
		termios, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		return err == nil && termios.Lflag&unix.ICANON == 0
	})
	c.types("two\r")
	c.mustShow("2:two")
	c.types("\x04")
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Errorf("restore ended with %v, init's status is 7", cmd.ProcessState)
	}
	if termios, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || termios.Lflag&unix.ICANON == 0 {
		t.Errorf("our terminal is left raw: %+v, %v", termios, err)
	}
	slave.Close()
}

// TestUnreadWithoutBPF: what cannot be looked at is refused by name, and the
// container goes on.
func TestUnreadWithoutBPF(t *testing.T) {
	p := program{name: "terminal", options: []option{withArgs("/bin/terminal")}}
	c := p.start(t)
	t.Setenv("OCICKPT_NO_BPF", "1")
	r := c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id)
	if r.code != 1 || !strings.Contains(r.stderr, "bytes wait to be read from it") {
		t.Errorf("exit status %d, %s", r.code, r.stderr)
	}
	c.progress(20)
}

// TestTerminalRefusals: who would hold the master must be clear.
func TestTerminalRefusals(t *testing.T) {
	c := newContainer(t, withTerminal(), withArgs("sh", "-c", echoes)).run()
	c.types("one\n")
	c.mustShow("1:one")
	c.checkpoint()
	c.mustBeGone()
	r := c.ocickpt("restore", "--detach", "--bundle", c.bundle, "--image-path", c.image(), c.id)
	if r.code != 1 || !strings.Contains(r.stderr, "--console-socket") {
		t.Errorf("without a socket: exit status %d, %s", r.code, r.stderr)
	}
	c.restore()
	c.types("two\n")
	c.mustShow("2:two")
}
