package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"
)

// process is what /proc tells of a process of a container, numbers as seen in
// the container's own pid namespace.
type process struct {
	Parent, Group, Session int
	Name, Args             string
	Zombie                 bool
	Threads                int
}

// status is one /proc/PID/status, by key.
type status map[string]string

func readStatus(pid int) (status, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	s := status{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		s[key] = strings.TrimSpace(value)
	}
	return s, nil
}

func (s status) number(key string) int {
	n, _ := strconv.Atoi(s[key])
	return n
}

// at is the number in the pid namespace of a level, the host's being 1, of a key that lists one for each (NSpid, NSpgid, NSsid).
func (s status) at(level int, key string) int {
	levels := strings.Fields(s[key])
	if len(levels) < level {
		return 0
	}
	n, _ := strconv.Atoi(levels[level-1])
	return n
}

// tree returns the container's init and all its descendants by inner pid. A
// process that ends while it is looked at is left out.
func (c *container) tree() map[int]process {
	c.t.Helper()
	all := map[int]status{}
	children := map[int][]int{}
	entries, err := os.ReadDir("/proc")
	c.must(err)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := readStatus(pid); err == nil {
			all[pid] = s
			children[s.number("PPid")] = append(children[s.number("PPid")], pid)
		}
	}
	found := map[int]process{}
	init := c.state().Pid
	level := len(strings.Fields(all[init]["NSpid"]))
	var visit func(pid, parent int)
	visit = func(pid, parent int) {
		s, ok := all[pid]
		if !ok {
			return
		}
		p := describe(pid, parent, level, s)
		if c.threadsVary {
			p.Threads = 0
		}
		found[s.at(level, "NSpid")] = p
		for _, child := range children[pid] {
			visit(child, s.at(level, "NSpid"))
		}
	}
	visit(init, 0)
	return found
}

func describe(pid, parent, level int, s status) process {
	args, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	return process{
		Parent: parent, Group: s.at(level, "NSpgid"), Session: s.at(level, "NSsid"),
		Name: s["Name"], Args: strings.ReplaceAll(string(args), "\x00", " "),
		Zombie: strings.HasPrefix(s["State"], "Z"), Threads: s.number("Threads"),
	}
}

// stableTree is the part of the tree that does not come and go: what is the
// same in two looks, apart by more than the second that the programs' own
// short-lived children last.
func (c *container) stableTree() map[int]process {
	c.t.Helper()
	first := c.tree()
	time.Sleep(1200 * time.Millisecond)
	second := c.tree()
	for pid, p := range first {
		if second[pid] != p {
			delete(first, pid)
		}
	}
	if len(first) == 0 {
		if c.report != "" {
			c.rounds() // may tell why
		}
		c.t.Fatal("no process of the container is there for more than a second")
	}
	return first
}

// sameTree asserts that every process of want is there and unchanged.
func (c *container) sameTree(want map[int]process) {
	c.t.Helper()
	now, got := c.tree(), map[int]process{}
	for pid := range want {
		if p, ok := now[pid]; ok {
			got[pid] = p
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		if c.report != "" {
			c.rounds() // may tell why
		}
		c.t.Fatalf("the process tree changed (-before +after):\n%s", diff)
	}
}
