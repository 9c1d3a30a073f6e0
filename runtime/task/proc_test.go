package task

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

func TestStatusAndStat(t *testing.T) {
	pid := startChild(t, "own")
	asleepIn(t, pid, unix.SYS_PAUSE)
	comm, err := Comm(pid)
	check(t, err)
	if string(comm) != oddName {
		t.Errorf("comm is %q, want %q", comm, oddName)
	}
	s, err := ReadStatus(pid)
	check(t, err)
	groups, err := unix.Getgroups()
	check(t, err)
	// Zero where the session's leader is outside this pid namespace, as in CI.
	sid, err := unix.Getsid(0)
	check(t, err)
	switch {
	case s.State != 'S' || s.Tgid != pid || s.PPid != os.Getpid() || s.TracerPid != 0:
		t.Errorf("status is %+v", s)
	case Innermost(s.NSpid) != pid || Innermost(s.NSpgid) != unix.Getpgrp() || Innermost(s.NSsid) != sid:
		t.Errorf("ids in namespaces: %+v", s)
	case s.UID != [4]uint32{} || s.GID != [4]uint32{} || len(s.Groups) != len(groups):
		t.Errorf("credentials: %+v", s)
	}
	stat, err := ReadStat(pid)
	check(t, err)
	const ppid, nice, exitSignal, beyond = 4, 19, StatExitSignal, 500
	for field, want := range map[int]uint64{ppid: uint64(os.Getpid()), nice: 3, exitSignal: uint64(unix.SIGCHLD), beyond: 0} {
		if got := stat.Field(field); got != want {
			t.Errorf("field %d of stat is %d, want %d", field, got, want)
		}
	}
	tids, err := Threads(pid)
	check(t, err)
	if tids[0] != pid || len(slices.Compact(slices.Sorted(slices.Values(tids)))) != len(tids) {
		t.Errorf("threads are %v, the leader is %d", tids, pid)
	}
}

func TestStatusFields(t *testing.T) {
	s := &Status{}
	for line := range strings.Lines(`Name:	Uid:	9	9
Umask:	0027
State:	T (stopped)
NSpid:	4007	12	1
Uid:	1	2	3	4294967294
Groups:	4 24 
SigCgt:	ffffffffffffffff
CapEff:	000001fffffffff1
NoNewPrivs:	1
Seccomp:	2
`) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		s.set(key, strings.TrimSpace(value))
	}
	if s.Umask != 0o27 || s.State != 'T' || Innermost(s.NSpid) != 1 || s.UID != [4]uint32{1, 2, 3, 4294967294} ||
		!slices.Equal(s.Groups, []uint32{4, 24}) || s.SigCgt != ^uint64(0) || s.CapEff != 0x1fffffffff1 || !s.NoNewPrivs || s.Seccomp != 2 {
		t.Errorf("%+v", s)
	}
	if Innermost(nil) != 0 {
		t.Error("no ids have an innermost one")
	}
}

func TestGone(t *testing.T) {
	c := exec.Command("true")
	check(t, c.Run())
	pid := c.Process.Pid
	for name, read := range map[string]func() error{
		"status":  func() error { _, err := ReadStatus(pid); return err },
		"stat":    func() error { _, err := ReadStat(pid); return err },
		"comm":    func() error { _, err := Comm(pid); return err },
		"threads": func() error { _, err := Threads(pid); return err },
		"limits":  func() error { _, err := Limits(pid); return err },
		"timers":  func() error { _, err := posixTimers(pid, nil); return err },
	} {
		if err := read(); !errors.Is(err, tracee.ErrGone) {
			t.Errorf("%s of a task that is gone: %v", name, err)
		}
	}
}

func TestName(t *testing.T) {
	for comm, want := range map[string]string{
		"redis":        "task 7 (host 4711, redis)",
		oddName:        `task 7 (host 4711, a) R 1\n(b Z)`,
		"\x1b[31m\xff": `task 7 (host 4711, \x1b[31m\xff)`,
		"":             "task 7 (host 4711, )",
	} {
		if got := Name(7, 4711, []byte(comm)); got != want {
			t.Errorf("%q is named %q, want %q", comm, got, want)
		}
	}
}

func TestResourceLimits(t *testing.T) {
	got, err := Limits(os.Getpid())
	check(t, err)
	for i := range rlimits {
		var want unix.Rlimit
		check(t, unix.Prlimit(0, i, nil, &want))
		if got[i].Cur != want.Cur || got[i].Max != want.Max {
			t.Errorf("%s is %d/%d, want %d/%d", limitNames[i], got[i].Cur, got[i].Max, want.Cur, want.Max)
		}
	}
}

func TestCapabilities(t *testing.T) {
	s, err := ReadStatus(os.Getpid())
	check(t, err)
	got, err := Capabilities(os.Getpid())
	if err != nil || got != s.CapEff || got == 0 {
		t.Errorf("capabilities %#x, %v; want %#x", got, err, s.CapEff)
	}
}

func TestOOMScore(t *testing.T) {
	pid := startChild(t, "own")
	for _, adj := range []int32{321, 400} {
		check(t, RestoreOOMScore(pid, adj))
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		check(t, err)
		if got := strings.TrimSpace(string(b)); got != fmt.Sprint(adj) {
			t.Errorf("oom_score_adj is %s, want %d", got, adj)
		}
	}
}
