package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// envKeep, when set, leaves the directory of a failed test to be looked at.
const envKeep = "OCICKPT_TEST_KEEP"

// leakCheck asserts, when the test and all its other clean-ups are over, that
// nothing of the container is left: no process, mount, cgroup, state directory
// or temporary file. Other users of the machine may come and go meanwhile, so
// it looks for what bears the container's name or lies in its directory, and,
// the test process being the subreaper, at its own children.
func leakCheck(c *container) {
	before := children()
	c.t.Cleanup(func() {
		for _, find := range []func(c *container) []string{
			leakedMounts, leakedCgroups, leakedState, leakedTemporaries,
		} {
			var left []string
			if waitFor(func() bool { left = find(c); return len(left) == 0 }) {
				continue
			}
			c.t.Errorf("left behind: %s", strings.Join(left, "\n\t"))
		}
		reapLeftovers(c, before)
		if os.Getenv(envKeep) == "" || !c.t.Failed() {
			os.RemoveAll(c.dir)
		}
	})
}

func leakedMounts(c *container) (left []string) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	c.must(err)
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, c.dir) || strings.Contains(line, c.id) ||
			strings.Contains(line, "ocickpt-guardian") {
			left = append(left, "mount "+line)
		}
	}
	return left
}

// leakedCgroups walks every hierarchy, v1 and v2.
func leakedCgroups(c *container) (left []string) {
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // a cgroup that went away meanwhile
		}
		if d.IsDir() && strings.Contains(d.Name(), c.id) {
			left = append(left, "cgroup "+path)
		}
		return nil
	})
	return left
}

func leakedState(c *container) []string       { return entries("state", c.root) }
func leakedTemporaries(c *container) []string { return entries("temporary file", c.tmp) }

func entries(what, dir string) (left []string) {
	list, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return []string{err.Error()}
	}
	for _, e := range list {
		left = append(left, fmt.Sprintf("%s %s", what, filepath.Join(dir, e.Name())))
	}
	return left
}

// children returns the living children of the test process.
func children() map[string]bool {
	found := map[string]bool{}
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, task := range tasks {
		data, _ := os.ReadFile(task)
		for _, pid := range strings.Fields(string(data)) {
			found[pid] = true
		}
	}
	return found
}

// reapLeftovers reaps what has ended, such as guardians whose coordinator is
// gone, and reports and kills what still runs. No command runs at this moment,
// so waiting for any child takes nothing from anybody.
func reapLeftovers(c *container, before map[string]bool) {
	var running []string
	waitFor(func() bool {
		running = nil
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG|unix.WALL, nil)
			if pid <= 0 && err != unix.EINTR {
				break
			}
		}
		for pid := range children() {
			if !before[pid] {
				running = append(running, pid)
			}
		}
		return len(running) == 0
	})
	for _, pid := range running {
		args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
		c.t.Errorf("left behind: process %s: %q", pid, args)
		var number int
		fmt.Sscan(pid, &number)
		unix.Kill(number, unix.SIGKILL)
		unix.Wait4(number, nil, unix.WALL, nil)
	}
}
