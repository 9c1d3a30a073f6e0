package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ocickpt/ocickpt/image"
)

func TestAttribute(t *testing.T) {
	for _, name := range []string{"memory.max", "cpuset.cpus", "cgroup.subtree_control", "cgroup.pressure", "devices.list", "freezer.self_freezing", "pids.max", "cgroup.type"} {
		if !attribute(name) {
			t.Errorf("%s is a setting", name)
		}
	}
	for _, name := range []string{"cgroup.procs", "tasks", "cgroup.kill", "release_agent", "memory.failcnt", "memory.memsw.max_usage_in_bytes", "cpu.pressure", "memory.reclaim", "devices.allow"} {
		if attribute(name) {
			t.Errorf("%s is no setting", name)
		}
	}
}

func TestWrites(t *testing.T) {
	for _, one := range []struct {
		name, value, now string
		want             []assignment
	}{
		{"pids.max", "7", "max", []assignment{{"pids.max", "7"}}},
		{"io.max", "8:0 rbps=1\n8:16 rbps=2", "", []assignment{{"io.max", "8:0 rbps=1"}, {"io.max", "8:16 rbps=2"}}},
		{subtreeControl, "cpu pids", "", []assignment{{subtreeControl, "+cpu"}, {subtreeControl, "+pids"}}},
		{cgroupType, "threaded", "domain", []assignment{{cgroupType, "threaded"}}},
		{cgroupType, "domain threaded", "domain", nil},
		{devicesList, "c 1:3 rwm", "a *:* rwm", []assignment{{"devices.deny", "a"}, {"devices.allow", "c 1:3 rwm"}}},
		{oomControl, "oom_kill_disable 1\nunder_oom 0", "oom_kill_disable 0\nunder_oom 0", []assignment{{oomControl, "1"}}},
		{oomControl, "oom_kill_disable 0\nunder_oom 1", "oom_kill_disable 0\nunder_oom 0", nil},
		{selfFreezing, "1", "0", []assignment{{"freezer.state", "FROZEN"}}},
	} {
		if got := writes(one.name, one.value, one.now); !slices.Equal(got, one.want) {
			t.Errorf("%s: %q is set by %v, not %v", one.name, one.value, got, one.want)
		}
	}
}

func TestBelow(t *testing.T) {
	for path, want := range map[string]string{"/a": "", "/a/b/c": "b/c", "/ab": "-", "/": "-"} {
		below, ok := Below("/a", path)
		if !ok {
			below = "-"
		}
		if below != want {
			t.Errorf("%s is %q below /a, not %q", path, below, want)
		}
	}
	if below, ok := Below("/", "/x"); below != "x" || !ok {
		t.Errorf("/x is %q below the root", below)
	}
}

// ids are numbers of a container without a user namespace.
type ids struct{}

func (ids) User(host uint32) uint32  { return host }
func (ids) Group(host uint32) uint32 { return host }

// TestRoundTrip takes settings from one directory to another, which is enough of a
// cgroup where nothing happens.
func TestRoundTrip(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	put := func(dir, name, value string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put(from, "pids.max", "5") // the bundle's
	put(from, "sub/pids.max", "7")
	put(from, "sub/cgroup.procs", "1")
	put(to, "sub/pids.max", "9")
	put(to, "sub/cgroup.procs", "")
	subs, err := Scan([]Hierarchy{{Name: "pids", Dir: from, Path: "/c"}}, ids{})
	if err != nil {
		t.Fatal(err)
	}
	if len(subs) != 1 || subs[0].Path != "sub" || len(subs[0].Files) != 1 {
		t.Fatalf("found %+v", subs)
	}
	m, err := NewMaker(&image.Container{Subs: subs}, []Hierarchy{{Name: "pids", Dir: to, Path: "/d"}})
	if err != nil {
		t.Fatal(err)
	}
	same := func(id int) (int, error) { return id, nil }
	m.HostUID, m.HostGID = same, same
	if err := m.Finish(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"sub/pids.max": "7", "sub/cgroup.procs": ""} {
		if got, err := readFile(filepath.Join(to, name)); err != nil || got != want {
			t.Errorf("%s holds %q, %v", name, got, err)
		}
	}
	subs[0].Files[0].Name = "cgroup.procs"
	if _, err := NewMaker(&image.Container{Subs: subs}, []Hierarchy{{Name: "pids"}}); err == nil {
		t.Error("an image moves processes into a cgroup")
	}
	subs[0].Hierarchy = "none"
	if _, err := NewMaker(&image.Container{Subs: subs}, nil); err == nil {
		t.Error("a hierarchy that is not there is no matter")
	}
}
