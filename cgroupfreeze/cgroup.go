// Package cgroupfreeze freezes and thaws the cgroup of a container, version 1
// and version 2, each in bounded time, and lists what lives in it.
//
// It works on plain directory paths as libcontainer's state.json gives them and
// knows nothing of containers, images or ptrace.
//
// The files are described in Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst
// and Documentation/admin-guide/cgroup-v2.rst ("cgroup.freeze"), the behaviour in
// kernel/cgroup/legacy_freezer.c and kernel/cgroup/freezer.c.
package cgroupfreeze

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoFreezer says that the paths name no cgroup that can be frozen.
var ErrNoFreezer = errors.New("no freezable cgroup")

// Cgroup is one container's cgroup, seen through the hierarchy that freezes it.
// It holds no descriptor: there is nothing to close.
type Cgroup struct {
	dir     string // the cgroup's directory in the hierarchy that freezes
	freezer freezer
	cpuDir  string // the cgroup's directory in the hierarchy of the cpu controller, or ""
	quota   quotaFile
}

// freezer is the part of freezing in which the two versions differ.
type freezer interface {
	// control returns the control file and the values that freeze and thaw.
	control() (path, freeze, thaw string)
	// asked tells whether this very cgroup was asked to freeze.
	asked() (bool, error)
	// frozen tells whether every task in the cgroup is frozen.
	frozen() (bool, error)
	// thawed tells whether no task is frozen or about to be, on whoever's behalf.
	thawed() (bool, error)
	// nudge repeats the request to those tasks that have not yet followed it.
	nudge() error
	// ancestor returns the nearest cgroup above that was asked to freeze, or "".
	ancestor() (string, error)
	// mayLag tells whether a task that /proc shows in this state (the letter of
	// proc_pid_stat(5)) can be one that has not frozen.
	mayLag(state byte) bool
}

// Open finds the freezer of a container. The paths are those of libcontainer's
// state.json (cgroup_paths): on v1 a controller's name and its absolute
// directory, on v2 the empty name and the unified directory. A hybrid host has
// both; there the v1 freezer, where it is given, is the one engines pause with.
//
// It fails with ErrNoFreezer if the paths name no freezer, or only the root of a
// hierarchy, which cannot be frozen.
func Open(paths map[string]string) (*Cgroup, error) {
	c := &Cgroup{dir: paths["freezer"], cpuDir: paths["cpu"], quota: quotaV1}
	if c.dir != "" {
		c.freezer = v1{c.dir}
	} else {
		c.dir, c.freezer = paths[""], v2{paths[""]}
		if c.cpuDir == "" {
			c.cpuDir, c.quota = c.dir, quotaV2
		}
	}
	if c.dir == "" {
		return nil, fmt.Errorf("%w: no freezer and no unified path among the container's cgroups", ErrNoFreezer)
	}
	if !filepath.IsAbs(c.dir) {
		return nil, fmt.Errorf("%w: %q is not an absolute path", ErrNoFreezer, c.dir)
	}
	control, _, _ := c.freezer.control()
	if _, err := os.Stat(control); err != nil {
		return nil, fmt.Errorf("%w: %w (the root of a hierarchy cannot be frozen; cgroup v2 can freeze since Linux 5.2)",
			ErrNoFreezer, err)
	}
	return c, nil
}

// FreezeWrite returns the one write that asks the cgroup to freeze.
func (c *Cgroup) FreezeWrite() (path, value string) {
	path, value, _ = c.freezer.control()
	return path, value
}

// ThawWrite returns the one write that thaws the cgroup.
func (c *Cgroup) ThawWrite() (path, value string) {
	path, _, value = c.freezer.control()
	return path, value
}

// SubCgroups returns the cgroups below this one in the hierarchy that freezes,
// as paths relative to it, parents before their children.
func (c *Cgroup) SubCgroups() ([]string, error) {
	dirs, err := subtree(c.dir)
	if err != nil {
		return nil, err
	}
	var subs []string
	for _, dir := range dirs[1:] {
		subs = append(subs, strings.TrimPrefix(dir, filepath.Clean(c.dir)+"/"))
	}
	return subs, nil
}

// Processes returns the pids of all processes in the cgroup and in the cgroups
// below it, ascending, as numbers of the caller's pid namespace. The kernel does
// not list zombies. The list is exact only while the cgroup is frozen.
func (c *Cgroup) Processes() ([]int, error) {
	dirs, err := subtree(c.dir)
	if err != nil {
		return nil, err
	}
	var pids []int
	for i, dir := range dirs {
		more, err := processes(dir)
		if vanished(err) && i > 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		pids = append(pids, more...)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// processes lists one cgroup's processes, without those of the cgroups below.
func processes(dir string) ([]int, error) {
	pids, err := readPIDs(filepath.Join(dir, "cgroup.procs"))
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return pids, err
	}
	// A threaded cgroup has no processes of its own, only threads, each
	// of which may stand elsewhere than its leader.
	tids, err := readPIDs(filepath.Join(dir, "cgroup.threads"))
	if err != nil {
		return nil, err
	}
	for _, tid := range tids {
		if tgid, ok := threadGroup(tid); ok {
			pids = append(pids, tgid)
		}
	}
	return pids, nil
}

// readPIDs parses cgroup.procs, tasks or cgroup.threads.
func readPIDs(path string) ([]int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if pid == 0 {
			// The kernel writes 0 for a task that the reader's
			// pid namespace has no number for.
			return nil, fmt.Errorf("%s: a task has no pid in this pid namespace; run in the host's", path)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// threadGroup returns the process that a thread belongs to. It reports false if
// the thread has ended.
func threadGroup(tid int) (int, bool) {
	tgid, err := strconv.Atoi(statusField(strconv.Itoa(tid), "Tgid"))
	return tgid, err == nil
}

// subtree returns dir and all directories below it, parents first.
func subtree(dir string) ([]string, error) {
	dirs := []string{filepath.Clean(dir)}
	for i := 0; i < len(dirs); i++ {
		entries, err := os.ReadDir(dirs[i])
		if vanished(err) && i > 0 {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, entry := range entries {
			if entry.IsDir() {
				dirs = append(dirs, filepath.Join(dirs[i], entry.Name()))
			}
		}
	}
	return dirs, nil
}

// vanished tells whether an error only says that a cgroup was removed while it
// was looked at: ENOENT when opening its files, ENODEV when reading an open one.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)
}

// readValue returns a file's content without the final newline.
func readValue(path string) (string, error) {
	data, err := os.ReadFile(path)
	return strings.TrimSpace(string(data)), err
}

// readFlag reads a file that holds 0 or 1.
func readFlag(path string) (bool, error) {
	value, err := readValue(path)
	return value == "1", err
}

// writeValue writes a control file with one write(2). It never creates one.
func writeValue(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// nearestAsked looks in the cgroups above dir for one whose flag file reads 1.
// The search ends where the file is missing: at the root of the hierarchy.
func nearestAsked(dir, flag string) (string, error) {
	for up := filepath.Dir(dir); up != filepath.Dir(up); up = filepath.Dir(up) {
		asked, err := readFlag(filepath.Join(up, flag))
		if errors.Is(err, unix.ENOENT) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if asked {
			return up, nil
		}
	}
	return "", nil
}
