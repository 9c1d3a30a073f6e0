package runtime

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// console is who gets the master of the container's terminal: whoever listens on
// the engine's socket, or, in the foreground, ourselves.
type console struct {
	socket *os.File // libcontainer sends it here, nil without a terminal
	ours   *os.File // the other end in the foreground
	master *os.File
}

// openConsole makes what the bundle's process.terminal asks for.
func openConsole(spec *specs.Spec, path string, detach bool) (c console, err error) {
	switch terminal := spec.Process.Terminal; {
	case terminal && path != "":
		return c, c.dial(path)
	case terminal && detach:
		return c, fail.Refuse("terminal", "the bundle has one, and with --detach nobody would hold its master", "name a socket that takes it with --console-socket")
	case path != "":
		return c, fail.Refuse("terminal", "--console-socket is given, and the bundle has none", "set process.terminal in config.json, or leave the socket out")
	case !terminal:
		return c, nil
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return c, fmt.Errorf("socketpair: %w", err)
	}
	c.ours, c.socket = os.NewFile(uintptr(pair[0]), "console"), os.NewFile(uintptr(pair[1]), "console")
	return c, nil
}

func (c *console) dial(path string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return fmt.Errorf("--console-socket: %w", err)
	}
	defer conn.Close()
	c.socket, err = conn.(*net.UnixConn).File()
	return err
}

// receive takes the master when the container's init has sent it, with the name
// of its slave as the message (SCM_RIGHTS, unix(7)).
func (c *console) receive() error {
	if c.ours == nil {
		return nil
	}
	name, control := make([]byte, unix.PathMax), make([]byte, unix.CmsgSpace(4))
	n, controls, _, _, err := unix.Recvmsg(int(c.ours.Fd()), name, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return fmt.Errorf("receive the terminal's master: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("the container's init sent %d descriptors instead of its terminal's master: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return fmt.Errorf("receive the terminal's master: %w", err)
	}
	c.master = os.NewFile(uintptr(fds[0]), string(name[:n]))
	return nil
}

// Close closes the sockets; the master is the caller's.
func (c *console) Close() error {
	var errs error
	for _, f := range []*os.File{c.socket, c.ours} {
		if f != nil {
			errs = errors.Join(errs, f.Close())
		}
	}
	return errs
}

// Terminal is the master of the container's terminal, or nil if it has none or
// the engine holds it.
func (r *Restored) Terminal() *os.File { return r.made.console.master }
