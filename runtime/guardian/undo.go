package guardian

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/aside"
	"github.com/ocickpt/ocickpt/runtime/halt"
	"github.com/ocickpt/ocickpt/runtime/sock"
)

// kind says what an Undo does.
type kind string

const (
	kindWrite         kind = "write"
	kindRelease       kind = "release"
	kindRemove        kind = "remove"
	kindRemoveTree    kind = "remove tree"
	kindRemoveCgroups kind = "remove cgroups"
	kindKill          kind = "kill"
	kindUnmount       kind = "unmount"
	kindOption        kind = "socket option"
	kindPosition      kind = "seek"
	kindPutBack       kind = "put back"
	kindUnrepair      kind = "end the repair of sockets of"
	kindLift          kind = "lift"
)

// Undo is one way back, made by one of the constructors of this package. All of
// them can be done before the act they undo, after it, and twice; what is gone
// already is no error. Paths are absolute, as the guardian sees them: in the
// mount namespace in which Start was called.
type Undo struct {
	Kind kind
	// Paths are bytes because file names need not be UTF-8, which a string
	// in JSON must be.
	Paths [][]byte `json:",omitempty"`
	Value []byte   `json:",omitempty"`
	PID   int      `json:",omitempty"`
	// Start is the start time of PID, in clock ticks since boot.
	Start uint64 `json:",omitempty"`
	// MountID is the mount that lay at the path before, see Unmount.
	MountID uint64 `json:",omitempty"`
	// Controllers names the hierarchies of Paths, see Release.
	Controllers []string `json:",omitempty"`
	Paused      bool     `json:",omitempty"`
	// Sockets are descriptors of PID, see Unrepair.
	Sockets []Repaired `json:",omitempty"`
	// Name and Number are an option of a socket and its value, see Option.
	Name   int `json:",omitempty"`
	Number int `json:",omitempty"`
	// Offset is a position in a file, see Position.
	Offset int64 `json:",omitempty"`
	fd     int   // of the socket or file, which travels beside the entry
}

// Repaired is a descriptor of a socket that may be in repair mode; negative, less
// one, where it has SO_REUSEADDR, which repair takes away.
type Repaired int32

// NewRepaired makes one.
func NewRepaired(fd int, reusable bool) Repaired {
	if reusable {
		return Repaired(-fd - 1)
	}
	return Repaired(fd)
}

func (r Repaired) split() (fd int, reusable bool) {
	if r < 0 {
		return int(-r - 1), true
	}
	return int(r), false
}

// MaxRepaired is how many sockets one promise takes.
const MaxRepaired = 8000

// Unrepair undoes by ending the repair mode (TCP_REPAIR) of sockets that are open in a
// process or thread, if that still lives, without a word to their peers.
func Unrepair(pid int, sockets []Repaired) (Undo, error) {
	start, err := startTime(pid)
	return Undo{Kind: kindUnrepair, PID: pid, Start: start, Sockets: sockets}, err
}

// unrepair carries out Unrepair.
func (u Undo) unrepair() error {
	if now, err := startTime(u.PID); err != nil || now != u.Start {
		return err
	}
	var errs error
	for _, s := range u.Sockets {
		fd, reusable := s.split()
		errs = errors.Join(errs, sock.Unrepair(u.PID, fd, reusable))
	}
	return errs
}

// Lift undoes by taking away a table of nftables that holds the packets of
// connections off (sock.Hold), in the network namespace at a path.
func Lift(netns, table string) Undo {
	return Undo{Kind: kindLift, Paths: [][]byte{[]byte(netns)}, Value: []byte(table)}
}

// Write undoes by writing a value to an existing file, with one write(2): a
// freezer's state, a cpu quota.
func Write(path, value string) Undo {
	return Undo{Kind: kindWrite, Paths: [][]byte{[]byte(path)}, Value: []byte(value)}
}

// Release undoes by letting a container go that was being stopped, with no trace
// of it in the container's system calls (halt.Recover). The paths are those of
// its cgroups by controller; one that its engine had paused stays frozen.
func Release(cgroups map[string]string, paused bool) Undo {
	u := Undo{Kind: kindRelease, Paused: paused}
	for controller, path := range cgroups {
		u.Controllers = append(u.Controllers, controller)
		u.Paths = append(u.Paths, []byte(path))
	}
	return u
}

// release carries out Release. Threads are traced by an OS thread.
func (u Undo) release() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cgroups := map[string]string{}
	for i, controller := range u.Controllers {
		cgroups[controller] = string(u.Paths[i])
	}
	return halt.Recover(cgroups, u.Paused)
}

// Remove undoes by removing a file, such as a half-written image, or a
// directory that is empty.
func Remove(path string) Undo {
	return Undo{Kind: kindRemove, Paths: [][]byte{[]byte(path)}}
}

// RemoveTree undoes by removing a directory with all it holds, such as a
// container's state directory. It refuses the root directory and those right
// below it, and a tree with a mount in it: the files there are not ours.
func RemoveTree(path string) Undo {
	return Undo{Kind: kindRemoveTree, Paths: [][]byte{[]byte(path)}}
}

// RemoveCgroups undoes by killing all processes in these cgroups and below them,
// and removing the cgroups. It refuses what is not on a cgroup file system, the
// root of a hierarchy, and a cgroup that holds the caller.
func RemoveCgroups(paths []string) Undo {
	u := Undo{Kind: kindRemoveCgroups}
	for _, path := range paths {
		u.Paths = append(u.Paths, []byte(path))
	}
	return u
}

// Kill undoes by SIGKILL, if the pid still belongs to the process with this start
// time (field 22 of proc_pid_stat(5), in clock ticks since boot), and waits for
// its death.
func Kill(pid int, starttime uint64) Undo {
	return Undo{Kind: kindKill, PID: pid, Start: starttime}
}

// Unmount undoes by detaching what is mounted at a path. What lies there at the
// time of this call is remembered, and stays: if the coordinator dies before it
// has mounted, or the undo is done twice, nothing of others is unmounted.
func Unmount(path string) Undo {
	id, _ := mountID(path)
	return Undo{Kind: kindUnmount, Paths: [][]byte{[]byte(path)}, MountID: id}
}

// PutBack undoes by making a directory tree what it was before a restore began to
// change it (aside.PutBack).
func PutBack(a *aside.Area) Undo {
	return Undo{Kind: kindPutBack, Paths: [][]byte{[]byte(a.Root), []byte(a.Journal)}, Value: []byte(a.Dir)}
}

// Option undoes by giving an option of a socket, of level SOL_SOCKET, a value. The
// guardian holds the socket until the entry is struck.
func Option(f *os.File, name, value int) (Undo, error) {
	fd, err := hold(f)
	return Undo{Kind: kindOption, Name: name, Number: value, fd: fd}, err
}

// Position undoes by setting the position of an open file. The guardian holds the
// file until the entry is struck.
func Position(f *os.File, offset int64) (Undo, error) {
	fd, err := hold(f)
	return Undo{Kind: kindPosition, Offset: offset, fd: fd}, err
}

func hold(f *os.File) (int, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("hold %s: %w", f.Name(), err)
	}
	return fd, nil
}

// holds reports whether an entry comes with a descriptor.
func (u Undo) holds() bool { return u.Kind == kindOption || u.Kind == kindPosition }

// forget lets go of what an entry holds.
func (u Undo) forget() {
	if u.holds() {
		_ = unix.Close(u.fd)
	}
}

// String names the act, for error messages.
func (u Undo) String() string {
	switch u.Kind {
	case kindWrite:
		return fmt.Sprintf("write %q to %s", u.Value, u.path())
	case kindKill, kindUnrepair:
		return fmt.Sprintf("%s pid %d", u.Kind, u.PID)
	case kindOption:
		return fmt.Sprintf("set socket option %d to %d", u.Name, u.Number)
	case kindPosition:
		return fmt.Sprintf("seek to %d", u.Offset)
	}
	return fmt.Sprintf("%s %s", u.Kind, bytes.Join(u.Paths, []byte(", ")))
}

// path returns the path of those undos that have only one.
func (u Undo) path() string { return string(u.Paths[0]) }

// check refuses an undo that cannot be carried out, or must not be.
func (u Undo) check() error {
	if u.holds() {
		return nil
	}
	if u.Kind == kindKill {
		if u.PID <= 1 {
			return fmt.Errorf("%v: not a process that can be killed", u)
		}
		return nil
	}
	if u.Kind == kindUnrepair {
		if u.PID <= 1 || len(u.Sockets) > MaxRepaired {
			return fmt.Errorf("%v: %d sockets of pid %d", u, len(u.Sockets), u.PID)
		}
		return nil
	}
	if len(u.Paths) == 0 {
		return fmt.Errorf("%s: no path", u.Kind)
	}
	for _, path := range u.Paths {
		if p := string(path); !filepath.IsAbs(p) || filepath.Clean(p) != p {
			return fmt.Errorf("%v: %q is not an absolute path without \"..\"", u, p)
		}
	}
	if u.Kind == kindPutBack && (len(u.Paths) != 2 || len(u.Value) == 0) {
		return fmt.Errorf("%v: no journal", u)
	}
	if u.Kind == kindRelease && len(u.Controllers) != len(u.Paths) {
		return fmt.Errorf("%v: %d paths for %d controllers", u, len(u.Paths), len(u.Controllers))
	}
	if u.Kind == kindRemoveTree && filepath.Dir(filepath.Dir(u.path())) == filepath.Dir(u.path()) {
		return fmt.Errorf("%v: refused, so close to the root directory", u)
	}
	return nil
}

// Do carries out the undo. It is the one implementation for the guardian and for
// the coordinator's own Rollback.
func (u Undo) Do() error {
	err := u.check()
	if err != nil {
		return err
	}
	switch u.Kind {
	case kindWrite:
		err = write(u.path(), u.Value)
	case kindRelease:
		err = u.release()
	case kindUnrepair:
		err = u.unrepair()
	case kindLift:
		err = (&sock.Hold{Table: string(u.Value), NetNS: u.path()}).Lift()
	case kindRemove:
		err = os.Remove(u.path())
	case kindRemoveTree:
		err = removeTree(u.path())
	case kindRemoveCgroups:
		err = removeCgroups(u.Paths)
	case kindKill:
		err = kill(u.PID, u.Start)
	case kindUnmount:
		err = unmount(u.path(), u.MountID)
	case kindOption:
		err = unix.SetsockoptInt(u.fd, unix.SOL_SOCKET, u.Name, u.Number)
	case kindPosition:
		_, err = unix.Seek(u.fd, u.Offset, unix.SEEK_SET)
	case kindPutBack:
		err = aside.PutBack(u.path(), string(u.Value), string(u.Paths[1]))
	default:
		err = errors.New("unknown kind of undo")
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("%v: %w", u, err)
	}
	return nil
}

// gone tells whether an error says that what was to be undone does not exist any
// more. A container that ended takes its cgroups (ENODEV for a file that is
// open) and processes with it.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}

// writePatience bounds the retries of a write that is refused for the moment.
const writePatience = time.Second

// write replaces a file's content with one write(2). Control files refuse with
// EBUSY or EAGAIN what they take a moment later.
func write(path string, value []byte) error {
	return retry(writePatience, func() (bool, error) {
		err := writeOnce(path, value)
		transient := errors.Is(err, unix.EINTR) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EAGAIN)
		return transient, err
	})
}

func writeOnce(path string, value []byte) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	n, err := unix.Write(fd, value)
	if err == nil && n != len(value) {
		err = fmt.Errorf("took only %d of %d bytes", n, len(value))
	}
	return errors.Join(err, unix.Close(fd))
}

// removeTree removes a directory unless a mount would be emptied with it.
func removeTree(path string) error {
	// mountinfo has no symbolic links in its paths; the last component is
	// removed, not followed.
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return err
	}
	path = filepath.Join(parent, filepath.Base(path))
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if point == path || strings.HasPrefix(point, path+"/") {
			return fmt.Errorf("%s is mounted in it: %w", point, unix.EBUSY)
		}
	}
	return os.RemoveAll(path)
}

// unescape undoes the octal escapes of mount points in proc_pid_mountinfo(5).
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// unmount detaches the topmost mount at a path if it is not the one that lay
// there before. MNT_DETACH because users of the mount may be dying still.
func unmount(path string, before uint64) error {
	id, err := mountID(path)
	if err != nil {
		return err
	}
	if id == before {
		return nil
	}
	err = unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) {
		return nil // no mount point: nothing was mounted, or it is gone
	}
	return err
}

// mountID returns the id of the mount a path leads to, the number in
// /proc/self/mountinfo. The kernel may use a number again, but not while its
// mount lies under the one in question.
func mountID(path string) (uint64, error) {
	var stat unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	if err := unix.Statx(unix.AT_FDCWD, path, flags, unix.STATX_MNT_ID, &stat); err != nil {
		return 0, err
	}
	if stat.Mask&unix.STATX_MNT_ID == 0 {
		return 0, errors.New("statx gives no mount id (needs Linux 5.8)")
	}
	return stat.Mnt_id, nil
}

// deathPatience bounds how long a killed process may take to die, and a cgroup to
// become empty. Much memory to free takes its time.
const deathPatience = 10 * time.Second

// kill kills one process. The pidfd is opened first and the start time compared
// after: if the pid is given to another process in between, the pidfd stays with
// the dead one and the signal reaches nobody.
func kill(pid int, starttime uint64) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if now, err := startTime(pid); err != nil || now != starttime {
		return err
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	if !awaitExit(pidfd, deathPatience) {
		return fmt.Errorf("still alive %v after SIGKILL: %w", deathPatience, unix.ETIMEDOUT)
	}
	return nil
}

// startTime reads field 22 of /proc/PID/stat. The fields are counted behind the
// last parenthesis, as a task's name can contain anything.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const index = 22 - 3 // the first field behind the name is number 3
	if len(fields) <= index {
		return 0, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[index], 10, 64)
}

// retry calls act until it does not ask for another try or the time is over, and
// returns its last error.
func retry(limit time.Duration, act func() (again bool, err error)) error {
	deadline := time.Now().Add(limit)
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		again, err := act()
		if !again || time.Now().After(deadline) {
			return err
		}
		time.Sleep(wait)
	}
}
