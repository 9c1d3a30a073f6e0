// Package task holds what one task owns apart from its memory and its files:
// credentials, signals, timers, limits, scheduling, cpu state. Each resource
// is one file with both directions. A dump function reads kernel state into a
// record, from outside where /proc and system calls allow it, else by adding
// calls to the one batch that the task runs itself; a restore function adds
// the calls to a batch that make it again.
package task

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Status is what /proc/PID/task/TID/status says of one thread (proc(5)), ids as
// the reader's namespaces number them unless said otherwise.
type Status struct {
	State     byte
	Umask     uint32
	Tgid      int
	PPid      int
	TracerPid int
	UID, GID  [4]uint32
	Groups    []uint32
	NSpid     []int // tid in each pid namespace, outermost first
	NStgid    []int
	NSpgid    []int
	NSsid     []int

	SigPnd, ShdPnd, SigBlk, SigIgn, SigCgt uint64

	CapInh, CapPrm, CapEff, CapBnd, CapAmb uint64

	NoNewPrivs bool
	Seccomp    uint32
	Filters    int    // of seccomp
	Features   string // x86_Thread_features: shadow stacks
	UntagMask  uint64 // of addresses; all ones without tags
	VMSize     uint64 // bytes that RLIMIT_AS counts
	VMData     uint64 // and RLIMIT_DATA
}

// ReadStatus reads a thread's status. A thread that is gone gives an error
// that wraps tracee.ErrGone.
func ReadStatus(tid int) (*Status, error) {
	b, err := readProc(tid, "status")
	if err != nil {
		return nil, err
	}
	s := &Status{}
	for line := range bytes.Lines(b) {
		key, value, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), ":")
		if ok {
			s.set(key, strings.TrimSpace(value))
		}
	}
	return s, nil
}

func (s *Status) set(key, value string) {
	hex := func() uint64 { v, _ := strconv.ParseUint(value, 16, 64); return v }
	num := func() int { v, _ := strconv.Atoi(value); return v }
	switch key {
	case "State":
		s.State = value[0]
	case "Umask":
		v, _ := strconv.ParseUint(value, 8, 32)
		s.Umask = uint32(v)
	case "Tgid":
		s.Tgid = num()
	case "PPid":
		s.PPid = num()
	case "TracerPid":
		s.TracerPid = num()
	case "Uid":
		copy(s.UID[:], ids(value))
	case "Gid":
		copy(s.GID[:], ids(value))
	case "Groups":
		s.Groups = ids(value)
	case "NSpid":
		s.NSpid = pids(value)
	case "NStgid":
		s.NStgid = pids(value)
	case "NSpgid":
		s.NSpgid = pids(value)
	case "NSsid":
		s.NSsid = pids(value)
	case "SigPnd":
		s.SigPnd = hex()
	case "ShdPnd":
		s.ShdPnd = hex()
	case "SigBlk":
		s.SigBlk = hex()
	case "SigIgn":
		s.SigIgn = hex()
	case "SigCgt":
		s.SigCgt = hex()
	case "CapInh":
		s.CapInh = hex()
	case "CapPrm":
		s.CapPrm = hex()
	case "CapEff":
		s.CapEff = hex()
	case "CapBnd":
		s.CapBnd = hex()
	case "CapAmb":
		s.CapAmb = hex()
	case "NoNewPrivs":
		s.NoNewPrivs = value == "1"
	case "Seccomp_filters":
		s.Filters = num()
	case "Seccomp":
		s.Seccomp = uint32(num())
	case "x86_Thread_features":
		s.Features = value
	case "VmSize", "VmData":
		size, _, _ := strings.Cut(value, " ")
		kib, _ := strconv.ParseUint(size, 10, 54)
		if key == "VmSize" {
			s.VMSize = kib << 10
		} else {
			s.VMData = kib << 10
		}
	case "untag_mask":
		s.UntagMask, _ = strconv.ParseUint(value, 0, 64)
	}
}

// sameRights reports that two threads have the same ids and capabilities.
func (s *Status) sameRights(other *Status) bool {
	return s.UID == other.UID && s.GID == other.GID && slices.Equal(s.Groups, other.Groups) &&
		s.CapInh == other.CapInh && s.CapPrm == other.CapPrm && s.CapEff == other.CapEff && s.CapBnd == other.CapBnd && s.CapAmb == other.CapAmb
}

func ids(s string) (out []uint32) {
	for f := range strings.FieldsSeq(s) {
		v, _ := strconv.ParseUint(f, 10, 32)
		out = append(out, uint32(v))
	}
	return out
}

func pids(s string) (out []int) {
	for f := range strings.FieldsSeq(s) {
		v, _ := strconv.Atoi(f)
		out = append(out, v)
	}
	return out
}

// Innermost is the last, innermost id of a list by namespace, 0 for none.
func Innermost(ids []int) int {
	if len(ids) == 0 {
		return 0
	}
	return ids[len(ids)-1]
}

// JobStopped reports a thread that job control has stopped (SIGSTOP). Frozen by
// cgroup v1 as well it shows as sleeping; where it sleeps tells.
func JobStopped(tid int) bool {
	s, err := ReadStatus(tid)
	if err != nil || s.State == 'T' {
		return err == nil
	}
	wchan, err := readProc(tid, "wchan")
	return err == nil && string(wchan) == "do_signal_stop"
}

// Ended reports a task that has exited, or is gone.
func Ended(tid int) bool {
	s, err := ReadStatus(tid)
	return err != nil || s.State == 'Z' || s.State == 'X'
}

// Stat is /proc/PID/stat split into its fields; Field counts from 1 as
// proc_pid_stat(5) does.
type Stat struct{ fields []string }

// ReadStat reads a process's stat.
func ReadStat(pid int) (*Stat, error) {
	b, err := readProc(pid, "stat")
	if err != nil {
		return nil, err
	}
	// The second field, the name, may hold blanks and parentheses of its own.
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return nil, fmt.Errorf("/proc/%d/stat: no name in it", pid)
	}
	return &Stat{fields: append([]string{"", "", ""}, strings.Fields(string(b[end+1:]))...)}, nil
}

// Field returns field n as a number.
func (s *Stat) Field(n int) uint64 {
	if n >= len(s.fields) {
		return 0
	}
	if v, err := strconv.ParseInt(s.fields[n], 10, 64); err == nil {
		return uint64(v)
	}
	v, _ := strconv.ParseUint(s.fields[n], 10, 64)
	return v
}

// Set takes field n from another stat.
func (s *Stat) Set(n int, from *Stat) {
	if n < len(s.fields) && n < len(from.fields) {
		s.fields[n] = from.fields[n]
	}
}

// Comm is a thread's name, which may hold any byte but NUL.
func Comm(tid int) ([]byte, error) {
	b, err := readProc(tid, "comm")
	return bytes.TrimSuffix(b, []byte{'\n'}), err
}

// Threads lists the thread ids of a process, the leader first.
func Threads(pid int) ([]int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, gone(pid, err)
	}
	tids := []int{pid}
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != pid {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

func readProc(pid int, name string) ([]byte, error) {
	b, err := tracee.ReadFile("/proc/" + strconv.Itoa(pid) + "/" + name)
	return b, gone(pid, err)
}

func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("task %d: %w", pid, tracee.ErrGone)
	}
	return err
}

// Name is how messages name a process: both ids and what it is called.
func Name(inner, host int, comm []byte) string {
	return fmt.Sprintf("task %d (host %d, %s)", inner, host, strings.Trim(strconv.QuoteToGraphic(string(comm)), `"`))
}
