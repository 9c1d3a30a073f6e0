package cgroupfreeze

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestProcessesAndSubCgroups(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		subs, err := c.SubCgroups()
		check(t, err)
		if len(subs) != 0 {
			t.Fatalf("sub-cgroups %v of a new cgroup", subs)
		}
		a := makeChild(t, c.dir, "a")
		makeChild(t, c.dir, "b")
		deep := makeChild(t, a, "deep")
		subs, err = c.SubCgroups()
		check(t, err)
		slices.Sort(subs)
		if want := []string{"a", "a/deep", "b"}; !slices.Equal(subs, want) {
			t.Fatalf("sub-cgroups %v, want %v", subs, want)
		}
		var want []int
		for _, dir := range []string{c.dir, a, deep, deep} {
			want = append(want, start(t, dir, "sleep", "1000").Process.Pid)
		}
		slices.Sort(want)
		pids, err := c.Processes()
		check(t, err)
		if !slices.Equal(pids, want) {
			t.Fatalf("processes %v, want %v", pids, want)
		}
	})
}

// A threaded sub-cgroup refuses to list processes; those of its threads are
// found all the same, and only once.
func TestProcessesOfThreadedCgroup(t *testing.T) {
	c := openCgroup(t, "", makeCgroup(t, hierarchies[""]))
	threaded := makeChild(t, c.dir, "threaded")
	check(t, writeValue(filepath.Join(threaded, "cgroup.type"), "threaded"))
	cmd := start(t, threaded, "sleep", "1000")
	for _, c := range []*Cgroup{c, openCgroup(t, "", threaded)} {
		pids, err := c.Processes()
		check(t, err)
		if !slices.Equal(pids, []int{cmd.Process.Pid}) {
			t.Fatalf("%s: processes %v, want %d", c.dir, pids, cmd.Process.Pid)
		}
	}
}

func TestProcessOfOtherPIDNamespace(t *testing.T) {
	c := openCgroup(t, "", fake(t, map[string]string{"cgroup.freeze": "0", "cgroup.procs": "0\n"}))
	if _, err := c.Processes(); err == nil || !strings.Contains(err.Error(), "pid namespace") {
		t.Fatalf("error is %v", err)
	}
}

func TestQuotaV1(t *testing.T) {
	cpu := makeCgroup(t, "/sys/fs/cgroup/cpu")
	freezer := makeCgroup(t, hierarchies["freezer"])
	c, err := Open(map[string]string{"freezer": freezer, "cpu": cpu})
	check(t, err)
	limits, err := c.Quota()
	check(t, err)
	if len(limits) != 0 {
		t.Fatalf("quotas %v of a new cgroup", limits)
	}
	sub := makeChild(t, cpu, "sub")
	makeChild(t, cpu, "unlimited")
	own, below := filepath.Join(cpu, "cpu.cfs_quota_us"), filepath.Join(sub, "cpu.cfs_quota_us")
	check(t, writeValue(own, "5000"))
	check(t, writeValue(below, "3000"))
	limits, err = c.Quota()
	check(t, err)
	want := []Limit{{own, "5000", "-1"}, {below, "3000", "-1"}}
	if !slices.Equal(limits, want) {
		t.Fatalf("quotas %v, want %v", limits, want)
	}
	for _, forward := range []bool{true, false} { // any order will do
		liftAndPutBack(t, limits, forward)
	}
	check(t, writeValue(own, "-1"))
}

func liftAndPutBack(t *testing.T, limits []Limit, forward bool) {
	t.Helper()
	order := slices.Clone(limits)
	if !forward {
		slices.Reverse(order)
	}
	for _, value := range []func(Limit) string{
		func(l Limit) string { return l.Lifted },
		func(l Limit) string { return l.Value },
	} {
		for _, l := range order {
			check(t, writeValue(l.Path, value(l)))
		}
		for _, l := range order {
			if got, _ := readValue(l.Path); got != value(l) {
				t.Fatalf("%s holds %s, want %s", l.Path, got, value(l))
			}
		}
	}
}

// Without its quota a container freezes at once; with 5 % of a cpu it takes 88 to 150 ms.
func TestLiftedQuotaFreezesQuickly(t *testing.T) {
	cpu := makeCgroup(t, "/sys/fs/cgroup/cpu")
	freezer := makeCgroup(t, hierarchies["freezer"])
	check(t, writeValue(filepath.Join(cpu, "cpu.cfs_quota_us"), "5000"))
	cmd, count := startCounter(t, freezer)
	check(t, writeValue(filepath.Join(cpu, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid)))
	runs(t, count)
	c, err := Open(map[string]string{"freezer": freezer, "cpu": cpu})
	check(t, err)
	limits, err := c.Quota()
	check(t, err)
	for _, l := range limits {
		check(t, writeValue(l.Path, l.Lifted))
	}
	time.Sleep(20 * time.Millisecond) // what it was throttled for ends
	begin := time.Now()
	check(t, c.Freeze(context.Background()))
	if took := time.Since(begin); took > 60*time.Millisecond {
		t.Errorf("froze in %v without a quota", took)
	}
	check(t, c.Thaw(context.Background()))
	for _, l := range limits {
		check(t, writeValue(l.Path, l.Value))
	}
}

// The v2 cpu controller may not be there to test with; its file is.
func TestQuotaV2(t *testing.T) {
	dir := fake(t, map[string]string{"cgroup.freeze": "0", "cpu.max": "50000 100000\n"})
	for name, value := range map[string]string{"free": "max 100000\n", "half": "20000 40000\n"} {
		check(t, os.Mkdir(filepath.Join(dir, name), 0o700))
		check(t, os.WriteFile(filepath.Join(dir, name, "cpu.max"), []byte(value), 0o600))
	}
	check(t, os.Mkdir(filepath.Join(dir, "no-controller"), 0o700))
	limits, err := openCgroup(t, "", dir).Quota()
	check(t, err)
	want := []Limit{
		{filepath.Join(dir, "cpu.max"), "50000 100000", "max 100000"},
		{filepath.Join(dir, "half", "cpu.max"), "20000 40000", "max 40000"},
	}
	if !slices.Equal(limits, want) {
		t.Fatalf("quotas %v, want %v", limits, want)
	}
}

func TestQuotaWithoutController(t *testing.T) {
	onBoth(t, func(t *testing.T, c *Cgroup) {
		limits, err := c.Quota()
		if err != nil || len(limits) != 0 {
			t.Fatalf("quotas %v, error %v", limits, err)
		}
	})
	gone, err := Open(map[string]string{"": makeCgroup(t, hierarchies[""]), "cpu": "/sys/fs/cgroup/cpu/does-not-exist"})
	check(t, err)
	if limits, err := gone.Quota(); len(limits) != 0 || errors.Is(err, os.ErrNotExist) {
		t.Fatalf("quotas %v, error %v", limits, err)
	}
}

func TestWritesOfTheJournal(t *testing.T) {
	for key, want := range map[string][3]string{
		"freezer": {"freezer.state", "FROZEN", "THAWED"},
		"":        {"cgroup.freeze", "1", "0"},
	} {
		dir := makeCgroup(t, hierarchies[key])
		c := openCgroup(t, key, dir)
		path, freeze := c.FreezeWrite()
		thawPath, thaw := c.ThawWrite()
		got := [3]string{filepath.Base(path), freeze, thaw}
		if got != want || path != thawPath || filepath.Dir(path) != dir {
			t.Errorf("%q: %v in %s, want %v", key, got, path, want)
		}
	}
}
