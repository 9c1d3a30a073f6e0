// Package cgroup holds the cgroups that a container has made below its own
// (cgroups(7)): the tree, what is set on each, and who is in which. The container's
// own cgroups are libcontainer's business.
package cgroup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Hierarchy is one tree of cgroups: that of a v1 controller, or of several that
// are mounted together, or that of v2.
type Hierarchy struct {
	Name string // as /proc/PID/cgroup has it; "" is v2
	Dir  string // of the container's own cgroup
	Path string // of it, as /proc/PID/cgroup has it
}

// Hierarchies finds the trees of the directories that libcontainer names, by
// controller.
func Hierarchies(dirs map[string]string) (all []Hierarchy, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	own, err := Of("/proc/self")
	if err != nil {
		return nil, err
	}
	for name := range own {
		for _, controller := range strings.Split(name, ",") {
			dir := dirs[controller]
			if dir == "" {
				continue
			}
			if dir, err = filepath.EvalSymlinks(dir); err != nil {
				return nil, err
			}
			if path, ok := pathOf(mounts, dir); ok {
				all = append(all, Hierarchy{name, dir, path})
				break
			}
		}
	}
	slices.SortFunc(all, func(a, b Hierarchy) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// pathOf is the path of a cgroup from the root that this process sees.
func pathOf(mounts []*mountinfo.Info, dir string) (string, bool) {
	best := -1
	for i, m := range mounts {
		if (dir == m.Mountpoint || strings.HasPrefix(dir, m.Mountpoint+"/")) && (best < 0 || len(m.Mountpoint) >= len(mounts[best].Mountpoint)) {
			best = i
		}
	}
	if best < 0 {
		return "", false
	}
	return filepath.Join(mounts[best].Root, strings.TrimPrefix(dir, mounts[best].Mountpoint)), true
}

// Of reads where a task is in each hierarchy. proc is its directory in /proc.
func Of(proc string) (map[string]string, error) {
	b, err := tracee.ReadFile(proc + "/cgroup")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 {
			out[f[1]] = f[2]
		}
	}
	return out, nil
}

// Below is the path of a cgroup from another above it: "" for that one itself.
func Below(above, path string) (string, bool) {
	if path == above {
		return "", true
	}
	return strings.CutPrefix(path, strings.TrimSuffix(above, "/")+"/")
}

// IDs translate what the host shows into the container's own numbers.
type IDs interface {
	User(host uint32) uint32
	Group(host uint32) uint32
}

// Scan reads every cgroup below the container's own, parents first, and of that,
// where it has any, which controllers it hands on.
func Scan(hierarchies []Hierarchy, ids IDs) (all []image.SubCgroup, err error) {
	for _, h := range hierarchies {
		has, err := hasSubs(h.Dir)
		if err == nil && has {
			err = scanTree(h, "", ids, &all)
		}
		if err != nil {
			return nil, fail.On("cgroup "+h.Name+":"+h.Path, err)
		}
	}
	return all, nil
}

// hasSubs tells by the links of a directory, which cgroups count as others do.
func hasSubs(dir string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return false, fmt.Errorf("look at %s: %w", dir, err)
	}
	return st.Nlink > 2, nil
}

func scanTree(h Hierarchy, path string, ids IDs, all *[]image.SubCgroup) error {
	dir := filepath.Join(h.Dir, path)
	entries, err := os.ReadDir(dir)
	if vanished(err) && path != "" {
		return nil
	}
	if err != nil {
		return err
	}
	sub, err := scanOne(h, path, dir, entries, ids)
	if vanished(err) && path != "" {
		return nil
	}
	if err != nil {
		return fail.On(path, err)
	}
	if path != "" || len(sub.Files) > 0 {
		*all = append(*all, *sub)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := scanTree(h, filepath.Join(path, e.Name()), ids, all); err != nil {
				return err
			}
		}
	}
	return nil
}

// vanished forgives a cgroup of a running container that was removed.
func vanished(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// scanOne reads one cgroup.
func scanOne(h Hierarchy, path, dir string, entries []fs.DirEntry, ids IDs) (*image.SubCgroup, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	sub := &image.SubCgroup{Hierarchy: h.Name, Path: path, UID: ids.User(st.Uid), GID: ids.Group(st.Gid), Mode: st.Mode & 0o7777}
	for _, e := range entries {
		if e.IsDir() || path == "" && e.Name() != subtreeControl {
			continue
		}
		f, err := scanFile(dir, e.Name(), ids)
		if err != nil {
			return nil, fail.On(e.Name(), err)
		}
		if f.Set || f.UID != 0 || f.GID != 0 {
			sub.Files = append(sub.Files, *f)
		}
	}
	return sub, nil
}

func scanFile(dir, name string, ids IDs) (*image.CgroupFile, error) {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
		return nil, err
	}
	f := &image.CgroupFile{Name: name, UID: ids.User(st.Uid), GID: ids.Group(st.Gid), Mode: st.Mode & 0o777}
	if !attribute(name) || st.Mode&0o200 == 0 && name != devicesList && name != selfFreezing {
		return f, nil
	}
	b, err := readFile(filepath.Join(dir, name))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES) {
		return f, nil // of a controller that has nothing to say there
	}
	f.Value, f.Set = b, err == nil
	return f, err
}

// readFile reads an attribute without the final newline.
func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	const most = 64 << 10
	b, err := io.ReadAll(io.LimitReader(f, most))
	return strings.TrimRight(string(b), "\n"), err
}

// Frozen reports whether a cgroup was frozen, by its own setting.
func Frozen(s *image.SubCgroup) bool {
	return slices.ContainsFunc(s.Files, func(f image.CgroupFile) bool {
		return (f.Name == selfFreezing || f.Name == freezeV2) && f.Value == "1"
	})
}

// Files that are not read and written just so.
const (
	subtreeControl = "cgroup.subtree_control"
	cgroupType     = "cgroup.type"
	devicesList    = "devices.list" // read-only: devices.allow and devices.deny write it
	selfFreezing   = "freezer.self_freezing"
	freezeV2       = "cgroup.freeze"
	oomControl     = "memory.oom_control"
	usagePercpu    = "cpuacct.usage"
)

// attribute reports whether a file holds a setting: not an act, a counter that
// writing clears, or another view of a setting.
func attribute(name string) bool {
	switch name {
	case "cgroup.procs", "cgroup.threads", "tasks", "cgroup.kill", "cgroup.event_control", "release_agent", usagePercpu,
		"memory.force_empty", "memory.reclaim", "memory.peak", "memory.swap.peak", "memory.pressure_level", "memory.move_charge_at_immigrate",
		"blkio.reset_stats", "devices.allow", "devices.deny", "freezer.state", "cpu.weight.nice", "cgroup.sane_behavior":
		return false
	}
	for _, end := range []string{"failcnt", "max_usage_in_bytes", "peak"} {
		if strings.HasSuffix(name, end) {
			return false
		}
	}
	// Written, these are triggers (PSI); cgroup.pressure is a setting.
	return !strings.HasSuffix(name, ".pressure") || name == "cgroup.pressure"
}
