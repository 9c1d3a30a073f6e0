package file

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Locks are read from fdinfo, where each descriptor shows those of its open
// file description (flock, open file description locks, leases) and those that
// its table holds through it (fcntl; __show_fd_locks in fs/locks.c). Either way
// the task whose table it is can take them again. Who waits for a lock is in a
// system call that is made again, and waits again.

// lockKinds are the names of fdinfo.
var lockKinds = map[string]string{"POSIX": image.LockPosix, "OFDLCK": image.LockOFD, "FLOCK": image.LockFlock, "LEASE": image.LockLease}

// lockLines are the lines of an fdinfo that tell of locks, without their number:
// "FLOCK  ADVISORY  WRITE 123 08:01:4711 0 EOF".
func (s *seen) lockLines() (lines []string) {
	for line := range bytes.Lines(s.info) {
		if rest, ok := bytes.CutPrefix(line, []byte("lock:")); ok {
			_, lock, _ := strings.Cut(string(rest), ":")
			lines = append(lines, strings.Join(strings.Fields(lock), " "))
		}
	}
	return lines
}

func parseLock(line string) (l image.Lock, err error) {
	f := strings.Fields(line)
	if len(f) != 7 || lockKinds[f[0]] == "" {
		return l, fail.Refuse("", "a lock of this kind is not supported: "+line, "release it before the checkpoint")
	}
	l.Kind = lockKinds[f[0]]
	if l.Kind == image.LockLease && f[1] != "ACTIVE" {
		return l, fail.Refuse("", "its lease is being broken by somebody who opens the file", "try again")
	}
	l.Write = f[2] == "WRITE"
	if l.Start, err = strconv.ParseInt(f[5], 10, 64); err != nil {
		return l, fmt.Errorf("lock %q: %w", line, err)
	}
	if l.End = math.MaxInt64; f[6] != "EOF" {
		l.End, err = strconv.ParseInt(f[6], 10, 64)
	}
	return l, err
}

// readLocks finds the locks of all descriptors, each once, in the table of who
// is to take it: that of the task that the kernel names, if it still has the
// file.
func (s *Set) readLocks() error {
	type once struct {
		desc  *Description
		table *Table
		line  string
	}
	done := map[once]bool{}
	for _, t := range s.tables {
		for _, e := range t.entries {
			for _, line := range e.seen.lockLines() {
				l, err := parseLock(line)
				key := once{e.desc, nil, line}
				if l.Kind == image.LockPosix {
					key.table = t
				}
				if err == nil && (done[key] || !s.holds(t, e.desc, l.Kind, line)) {
					continue
				}
				if err != nil {
					return fail.In(e.seen.proc.Name, fail.On(e.seen.object(), err))
				}
				done[key] = true
				l.FD = int32(e.seen.fd)
				t.record.Locks = append(t.record.Locks, l)
			}
		}
	}
	return nil
}

// holds reports whether a table is the one to take a lock for: any for its own
// locks, else that of the task that took it, or where it has gone the first.
func (s *Set) holds(t *Table, d *Description, kind, line string) bool {
	if kind == image.LockPosix {
		return true
	}
	pid := strings.Fields(line)[3]
	for _, other := range s.tables {
		if strconv.Itoa(other.proc.Pid) != pid || other == t {
			continue
		}
		for _, e := range other.entries {
			if e.desc == d {
				return false
			}
		}
	}
	return true
}

// CheckLocks refuses locks of the container's tasks that no descriptor shows:
// those of a file that is only mapped any more.
func (s *Set) CheckLocks() error {
	b, err := os.ReadFile("/proc/locks")
	if err != nil {
		return err
	}
	shown, owners := map[string]bool{}, map[string]*Process{}
	for _, t := range s.tables {
		owners[strconv.Itoa(t.proc.Pid)] = t.proc
		for _, e := range t.entries {
			for _, line := range e.seen.lockLines() {
				shown[line] = true
			}
		}
	}
	for line := range strings.Lines(string(b)) {
		_, lock, _ := strings.Cut(line, ":")
		f := strings.Fields(lock)
		lock = strings.Join(f, " ")
		if len(f) != 7 || f[0] == "->" || shown[lock] || owners[f[3]] == nil {
			continue
		}
		return fail.In(owners[f[3]].Name, fail.Refuse("lock "+lock, "no descriptor leads to its file, which is only mapped", "release it before the checkpoint"))
	}
	return nil
}

// lock adds the calls that take a table's locks. Closing any descriptor of a
// file ends the table's own locks on it (fcntl(2)), so that nothing may be
// closed afterwards.
func (m *Maker) lock(b *tracee.Batch, files *image.Files) {
	for i := range files.Locks {
		l := &files.Locks[i]
		fd, kind := tracee.W(l.FD), int16(unix.F_RDLCK)
		operation := unix.LOCK_SH | unix.LOCK_NB
		if l.Write {
			kind, operation = unix.F_WRLCK, unix.LOCK_EX|unix.LOCK_NB
		}
		switch l.Kind {
		case image.LockFlock:
			b.Add(unix.SYS_FLOCK, fd, tracee.W(operation))
		case image.LockLease:
			m.become(b, m.leaseholder(files, l.FD))
			b.Add(unix.SYS_FCNTL, fd, tracee.W(unix.F_SETLEASE), tracee.W(int(kind)))
			m.become(b, m.self)
		default:
			command := unix.F_SETLK
			if l.Kind == image.LockOFD {
				command = unix.F_OFD_SETLK
			}
			length := int64(0) // to the end of the file, wherever that is
			if l.End != math.MaxInt64 {
				length = l.End - l.Start + 1
			}
			flock := binary.LittleEndian.AppendUint16(nil, uint16(kind)) // struct flock
			flock = append(flock, make([]byte, 6)...)
			flock = binary.LittleEndian.AppendUint64(flock, uint64(l.Start))
			flock = binary.LittleEndian.AppendUint64(flock, uint64(length))
			b.Add(unix.SYS_FCNTL, fd, tracee.W(command), b.Put(append(flock, make([]byte, 8)...)))
		}
	}
}

// leaseholder is who takes a lease: it takes the file's owner, or CAP_LEASE.
func (m *Maker) leaseholder(files *image.Files, fd int32) Identity {
	for _, d := range files.Descriptors {
		if d.FD == fd {
			return m.identityOf(m.head.File(d.File).Opener)
		}
	}
	return m.bundle
}

// ExplainLock says of the error of a batch that it was a lock, and who has it.
func ExplainLock(err error) error {
	var failed *tracee.CallError
	if !errors.As(err, &failed) {
		return err
	}
	switch {
	case failed.Nr == unix.SYS_FLOCK:
	case failed.Nr == unix.SYS_FCNTL && (failed.Args[1] == unix.F_SETLK || failed.Args[1] == unix.F_OFD_SETLK || failed.Args[1] == unix.F_SETLEASE):
	default:
		return err
	}
	link := fmt.Sprintf("/proc/%d/fd/%d", failed.Tid, failed.Args[0])
	path, _ := os.Readlink(link)
	object := fmt.Sprintf("fd %d, %s", failed.Args[0], path)
	if failed.Errno != unix.EAGAIN && failed.Errno != unix.EACCES {
		return fail.On(object, fmt.Errorf("its lock cannot be taken again: %w", failed))
	}
	return fail.On(object, &fail.Error{
		Cause: fmt.Errorf("its lock is held by %s: %w", cmp.Or(lockHolder(link), "somebody outside the container"), failed.Errno), Remedy: "end that first",
	})
}

// lockHolder names the task that has a lock on a file, if the kernel tells.
func lockHolder(link string) string {
	var st unix.Stat_t
	b, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Stat(link, &st) != nil {
		return ""
	}
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 8 && f[5] == file {
			comm, _ := os.ReadFile("/proc/" + f[4] + "/comm")
			return fmt.Sprintf("process %s (%s)", f[4], strings.TrimSpace(string(comm)))
		}
	}
	return ""
}
