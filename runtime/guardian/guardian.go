// Package guardian keeps the way back for a container while it is being worked
// on: a small process that undoes what the coordinator has begun, if the
// coordinator dies before its word that all is well.
//
// The coordinator writes down how to undo an act before it acts (Promise), and
// strikes the entry when the act is undone or is meant to last (Strike). The
// entries travel through a socket. What is in its queue survives the sender's
// SIGKILL, and the kernel reports the end of the other side however it came
// about, so that at every moment either the coordinator lives or the guardian
// knows all that has to be put back.
//
// The guardian is this same program, executed anew in a session of its own. A
// fork without exec would keep the coordinator's memory and, worse, copies of
// its descriptors: a reader of the image would never see its end.
package guardian

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// argv0 is what ps shows of a guardian.
const argv0 = "ocickpt-guardian"

// Verb is the first argument that makes the program a guardian: its main package
// calls Main if os.Args[1] is this.
const Verb = "guardian"

// Descriptors that the guardian inherits, in the order of exec.Cmd.ExtraFiles.
const (
	journalFD     = 3 // its end of the socket
	coordinatorFD = 4 // a pidfd of the coordinator
)

const (
	// maxFrame bounds one journal entry, in bytes. It is far below the
	// default of a socket's send buffer, net.core.wmem_default.
	maxFrame = 64 << 10
	// patience bounds how long the coordinator waits for its guardian: to
	// start, to take an entry when its queue is full, to exit.
	patience = 5 * time.Second
)

// Entry names one promise of a Guardian.
type Entry uint64

// environment is the guardian's. One thread is enough for it; without the second
// setting the Go runtime keeps the quota files of its cgroup open to follow them.
var environment = []string{"GOMAXPROCS=1", "GODEBUG=containermaxprocs=0"}

// frame is one message of the journal. The socket is of type SOCK_SEQPACKET,
// which keeps messages apart and delivers each whole or not at all: a coordinator
// killed while it sends leaves no half entry.
type frame struct {
	Entry  Entry `json:",omitempty"`
	Undo   *Undo `json:",omitempty"` // a promise; a strike of Entry without it
	Done   bool  `json:",omitempty"`
	Ready  bool  `json:",omitempty"` // Undo is a promise for after a seal
	Seal   bool  `json:",omitempty"` // from now on what is ready stands instead
	Answer bool  `json:",omitempty"` // from the guardian: it is ready
}

// standing is a promise that is neither struck nor undone.
type standing struct {
	entry Entry
	undo  Undo
	ready bool // stands after the next seal only
}

// Guardian is the coordinator's hold on its guardian process. Its methods may be
// called from several goroutines.
type Guardian struct {
	mu       sync.Mutex
	cmd      *exec.Cmd
	journal  int // the only descriptor of the coordinator's end; -1 once dismissed
	last     Entry
	standing []standing
}

// Start starts a guardian and returns when it is ready: from then on signals for
// the coordinator's process group or terminal do not reach it. The caller must
// not be in a cgroup that is going to be frozen, for the guardian is born there.
//
// The guardian keeps the given files open for as long as it lives: a lock on
// them lasts until everything is put back, not only until the coordinator dies.
func Start(keep ...*os.File) (*Guardian, error) {
	if os.Args[0] == argv0 {
		// A program without the call of Main would start itself for ever.
		return nil, errors.New("guardian: this is one already; its program must call guardian.Main first of all")
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("guardian: socketpair: %w", err)
	}
	g := &Guardian{journal: ours}
	g.cmd, err = spawn(theirs, keep)
	if err != nil {
		unix.Close(ours)
		return nil, fmt.Errorf("guardian: starting it: %w", err)
	}
	if f, err := receive(ours); err != nil || !f.Answer {
		unix.Close(ours)
		_ = g.cmd.Process.Kill()
		return nil, fmt.Errorf("guardian: it did not become ready: %w", errors.Join(err, g.cmd.Wait()))
	}
	return g, nil
}

// socketPair makes the journal's socket. Both ends are close-on-exec: should a
// child inherit the coordinator's end, the guardian would not see it close.
func socketPair() (ours int, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, err
	}
	limit := unix.NsecToTimeval(patience.Nanoseconds())
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		err = errors.Join(err, unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, option, &limit))
	}
	if err != nil {
		unix.Close(pair[0])
		unix.Close(pair[1])
		return -1, nil, err
	}
	return pair[0], os.NewFile(uintptr(pair[1]), "guardian's end"), nil
}

// spawn executes this program as a guardian and closes the guardian's end of the
// socket in this process.
func spawn(theirs *os.File, keep []*os.File) (*exec.Cmd, error) {
	defer theirs.Close()
	// Besides the end of the socket, the guardian watches the process: a
	// child forked without exec could hold a copy of our end.
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	pidfd := os.NewFile(uintptr(self), "coordinator")
	defer pidfd.Close()
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe", // right even if the file was replaced meanwhile
		Args:       []string{argv0, Verb, strconv.Itoa(len(keep))},
		Env:        environment,
		Dir:        "/", // keeps no mount busy
		ExtraFiles: append([]*os.File{theirs, pidfd}, keep...),
		// Out of reach of ^C, of the terminal's hang-up and of a kill
		// of the coordinator's process group.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	return cmd, cmd.Start()
}

// Pid returns the guardian's pid.
func (g *Guardian) Pid() int { return g.cmd.Process.Pid }

// Promise puts an undo into the journal. The caller acts only after it has
// returned without an error; the undo must be right both before and after that
// act. An error means that the undo is malformed or the guardian is gone.
func (g *Guardian) Promise(u Undo) (Entry, error) { return g.promise(u, false) }

// Prepare is Promise for what is to stand after the next Seal; until then it is not
// undone.
func (g *Guardian) Prepare(u Undo) (Entry, error) { return g.promise(u, true) }

// Seal puts what is prepared in the place of all that stands, at one stroke: behind
// it the way back is another one. It is for the point where going back begins to do
// more harm than going on.
func (g *Guardian) Seal() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.send(frame{Seal: true}); err != nil {
		return fmt.Errorf("guardian: seal: %w", err)
	}
	g.standing = sealed(g.standing)
	return nil
}

// sealed are those that stand after a seal.
func sealed(all []standing) (rest []standing) {
	for _, s := range all {
		if s.ready {
			rest = append(rest, standing{entry: s.entry, undo: s.undo})
		}
	}
	return rest
}

func (g *Guardian) promise(u Undo, ready bool) (Entry, error) {
	if err := u.check(); err != nil {
		return 0, fmt.Errorf("guardian: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	entry := g.last + 1
	if err := g.send(frame{Entry: entry, Undo: &u, Ready: ready}); err != nil {
		u.forget()
		return 0, fmt.Errorf("guardian: promise to %v: %w", u, err)
	}
	g.last = entry
	g.standing = append(g.standing, standing{entry, u, ready})
	return entry, nil
}

// Strike takes an entry out of the journal: its act has been undone by the
// caller, or is there to stay. Even if the guardian cannot be told, Rollback
// will not undo it any more.
func (g *Guardian) Strike(e Entry) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.strike(e)
}

func (g *Guardian) strike(e Entry) error {
	kept, found := without(g.standing, e)
	if !found {
		return fmt.Errorf("guardian: entry %d does not stand", e)
	}
	g.standing = kept
	if err := g.send(frame{Entry: e}); err != nil {
		return fmt.Errorf("guardian: striking entry %d: %w", e, err)
	}
	return nil
}

// Rollback undoes all standing entries, the last first, and strikes each. It goes
// on after failures and returns them joined. The guardian stays and can be given
// new promises.
func (g *Guardian) Rollback() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var failed []error
	for len(g.standing) > 0 {
		last := g.standing[len(g.standing)-1]
		// Struck only afterwards: if we die in the middle, the guardian
		// does it once more, and every undo bears that.
		if !last.ready {
			failed = append(failed, last.undo.Do())
		}
		failed = append(failed, g.strike(last.entry))
	}
	return errors.Join(failed...)
}

// Dismiss tells the guardian that all is well, whatever still stands is to stay,
// and returns when the guardian has exited and is reaped. It waits for this one
// child only. A guardian that does not go within five seconds is killed. The
// Guardian must not be used afterwards; dismissing it again does nothing.
func (g *Guardian) Dismiss() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.journal < 0 {
		return nil
	}
	for _, s := range g.standing {
		s.undo.forget()
	}
	g.standing = nil
	err := g.send(frame{Done: true})
	unix.Close(g.journal)
	g.journal = -1
	if err != nil {
		// It will take the silence for our death. Its entries are stale.
		_ = g.cmd.Process.Kill()
	}
	late := time.AfterFunc(patience, func() { _ = g.cmd.Process.Kill() })
	defer late.Stop()
	exit := g.cmd.Wait()
	if errors.Is(exit, unix.ECHILD) {
		exit = nil // somebody's wait for any child has reaped it
	}
	if err := errors.Join(err, exit); err != nil {
		return fmt.Errorf("guardian: dismissing it: %w", err)
	}
	return nil
}

// send writes one frame with one system call.
func (g *Guardian) send(f frame) error {
	if g.journal < 0 {
		return errors.New("it has been dismissed")
	}
	err := send(g.journal, f)
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("it has died: %w", err)
	}
	if errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("it has taken no entry for %v: %w", patience, err)
	}
	return err
}

func send(fd int, f frame) error {
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	var rights []byte
	if f.Undo != nil && f.Undo.holds() {
		rights = unix.UnixRights(f.Undo.fd)
	}
	if len(data) > maxFrame {
		return fmt.Errorf("the entry has %d bytes, more than %d", len(data), maxFrame)
	}
	return retryEINTR(func() error {
		// MSG_NOSIGNAL: a guardian's death must not be our SIGPIPE.
		_, err := unix.SendmsgN(fd, data, rights, nil, unix.MSG_NOSIGNAL)
		return err
	})
}

// receive reads one frame. At the end of the stream it returns errEnd.
func receive(fd int) (f frame, err error) {
	buf, rights := make([]byte, maxFrame), make([]byte, unix.CmsgSpace(4))
	var n, came int
	err = retryEINTR(func() error {
		n, came, _, _, err = unix.Recvmsg(fd, buf, rights, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return f, err
	}
	if n == 0 {
		return f, errEnd
	}
	if err := json.Unmarshal(buf[:n], &f); err != nil || came == 0 || f.Undo == nil {
		return f, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:came])
	if err != nil || len(messages) != 1 {
		return f, errors.Join(err, errors.New("an entry with strange ancillary data"))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err == nil && len(fds) == 1 {
		f.Undo.fd = fds[0]
	}
	return f, err
}

// errEnd says that no process holds the other end of the socket any more.
var errEnd = errors.New("end of the journal")

// without returns the entries but for one.
func without(all []standing, e Entry) (rest []standing, found bool) {
	i := slices.IndexFunc(all, func(s standing) bool { return s.entry == e })
	if i < 0 {
		return all, false
	}
	all[i].undo.forget()
	return slices.Delete(all, i, i+1), true
}

func retryEINTR(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
