package guardian

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestRefused(t *testing.T) {
	for name, u := range map[string]Undo{
		"relative file":      Write("file", "x"),
		"relative tree":      RemoveTree("state"),
		"root":               RemoveTree("/"),
		"below root":         RemoveTree("/run"),
		"not clean":          RemoveTree("/tmp/x/../../etc/y"),
		"no cgroup":          RemoveCgroups(nil),
		"one cgroup of two":  RemoveCgroups([]string{"/sys/fs/cgroup/freezer/x", "x"}),
		"init":               Kill(1, 0),
		"every process":      Kill(-1, 0),
		"empty":              {},
		"kind from the blue": {Kind: "format", Paths: [][]byte{[]byte("/dev/null")}},
	} {
		if err := u.Do(); err == nil {
			t.Errorf("%s: done", name)
		}
	}
	g, err := Start()
	check(t, err)
	if _, err := g.Promise(RemoveTree("/")); err == nil {
		t.Error("the promise to remove / is taken")
	}
	if _, err := g.Promise(Write("/tmp/x", strings.Repeat("x", maxFrame))); err == nil {
		t.Error("an entry that is too long is taken")
	}
	check(t, g.Dismiss())
}

// What is gone is no error: every undo may come too late, or twice.
func TestNothingLeftToUndo(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone")
	for _, u := range []Undo{
		Write(gone, "x"), Remove(gone), RemoveTree(gone), Unmount(gone),
		RemoveCgroups([]string{"/sys/fs/cgroup/freezer/gone", "/sys/fs/cgroup/unified/gone"}),
		Kill(1<<22-1, 1),
	} {
		if err := u.Do(); err != nil {
			t.Errorf("%v: %v", u, err)
		}
	}
	exists(t, gone, false)
}

func TestNamesNeedNotBeUTF8(t *testing.T) {
	file := put(t, filepath.Join(t.TempDir(), "caf\xe9"), "x")
	want := Remove(file)
	data, err := json.Marshal(want)
	check(t, err)
	var got Undo
	check(t, json.Unmarshal(data, &got))
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	check(t, got.Do())
	exists(t, file, false)
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	outside := put(t, filepath.Join(dir, "outside"), "x")
	state := filepath.Join(dir, "state")
	check(t, os.MkdirAll(filepath.Join(state, "a b"), 0o700))
	check(t, os.Symlink(dir, filepath.Join(state, "link")))
	link := filepath.Join(dir, "link")
	check(t, os.Symlink(dir, link))

	check(t, unix.Mount("none", filepath.Join(state, "a b"), "tmpfs", 0, "size=64k"))
	inside := put(t, filepath.Join(state, "a b", "file"), "x")
	for _, path := range []string{state, filepath.Join(link, "state")} {
		if err := RemoveTree(path).Do(); !errors.Is(err, unix.EBUSY) {
			t.Errorf("removing a tree with a mount in it: %v", err)
		}
	}
	exists(t, inside, true)
	check(t, unix.Unmount(filepath.Join(state, "a b"), 0))

	check(t, RemoveTree(state).Do())
	exists(t, state, false)
	check(t, RemoveTree(link).Do())
	exists(t, link, false)
	exists(t, outside, true)
}

func TestUnmountSparesWhatWasThere(t *testing.T) {
	dir := t.TempDir()
	check(t, unix.Mount("lower", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	lower := put(t, filepath.Join(dir, "lower"), "x")
	u := Unmount(dir)
	check(t, u.Do()) // nothing mounted since the promise
	exists(t, lower, true)
	check(t, unix.Mount("upper", dir, "tmpfs", 0, "size=64k"))
	exists(t, lower, false)
	for range 2 {
		check(t, u.Do())
		exists(t, lower, true)
	}
}

func TestKillOnlyTheSameProcess(t *testing.T) {
	cmd := startSleep(t)
	start, err := startTime(cmd.Process.Pid)
	check(t, err)
	check(t, Kill(cmd.Process.Pid, start+1).Do())
	check(t, unix.Kill(cmd.Process.Pid, 0))
	if state := processState(t, cmd.Process.Pid); state == "Z" {
		t.Fatal("killed in spite of another start time")
	}
	check(t, Kill(cmd.Process.Pid, start).Do())
	if state := processState(t, cmd.Process.Pid); state != "Z" {
		t.Errorf("state %s after the kill", state)
	}
}

func processState(t *testing.T, pid int) string {
	t.Helper()
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	check(t, err)
	return strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))[0]
}

func TestRemoveCgroupsRefuses(t *testing.T) {
	own := makeCgroup(t, "freezer")
	sub := filepath.Join(own, "sub")
	check(t, os.Mkdir(sub, 0o755))
	spared := startSleep(t, own)
	self := []byte(strconv.Itoa(os.Getpid()))
	check(t, writeOnce(filepath.Join(sub, "cgroup.procs"), self))
	defer func() { check(t, writeOnce("/sys/fs/cgroup/freezer/cgroup.procs", self)) }()
	for name, path := range map[string]string{
		"v1 root": "/sys/fs/cgroup/freezer", "v2 root": "/sys/fs/cgroup/unified", "no cgroup": t.TempDir(), "with us in it": own,
	} {
		if err := RemoveCgroups([]string{path}).Do(); err == nil {
			t.Errorf("%s: removed", name)
		}
	}
	if state := processState(t, spared.Process.Pid); state == "Z" {
		t.Error("killed before all was checked")
	}
}

// Removal kills what forks all the time, in every hierarchy.
func TestRemoveCgroupsWithForkers(t *testing.T) {
	for _, hierarchy := range []string{"freezer", "unified"} {
		dir := makeCgroup(t, hierarchy)
		check(t, os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755))
		for _, sub := range []string{"", "a", "a/b"} {
			procs := filepath.Join(dir, sub, "cgroup.procs")
			cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$0"; while :; do /bin/true & /bin/true; done`, procs)
			check(t, cmd.Start())
			t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
			eventually(t, "it is in its cgroup", func() bool {
				pids, err := members(filepath.Join(dir, sub))
				return err == nil && len(pids) > 0
			})
		}
		check(t, RemoveCgroups([]string{dir}).Do())
		exists(t, dir, false)
	}
}

// The kernel refuses a memory limit below what is in use with EBUSY, until the
// user of the memory has gone.
func TestWriteRetriesWhileBusy(t *testing.T) {
	dir := makeCgroup(t, "memory")
	limit := filepath.Join(dir, "memory.limit_in_bytes")
	// tail keeps a line in memory until it sees the end of it.
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$0"; (head -c 20000000 /dev/zero; sleep 1000) | tail`,
		filepath.Join(dir, "cgroup.procs"))
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	eventually(t, "memory is in use", func() bool {
		usage, err := os.ReadFile(filepath.Join(dir, "memory.usage_in_bytes"))
		n, _ := strconv.Atoi(strings.TrimSpace(string(usage)))
		return err == nil && n > 16<<20
	})
	if err := writeOnce(limit, []byte("4194304")); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("the write does not fail with EBUSY but %v", err)
	}
	ended := make(chan error)
	go func() {
		time.Sleep(200 * time.Millisecond)
		ended <- empty([]string{dir})
	}()
	check(t, Write(limit, "4194304").Do())
	check(t, <-ended)
	holds(t, limit, "4194304\n")
}
