package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// Maker makes the cgroups of an image again, below those of a new container.
type Maker struct {
	// HostUID and HostGID translate the container's numbers into the host's.
	HostUID, HostGID func(id int) (int, error)
	Warn             func(msg string, args ...any)

	hierarchies map[string]Hierarchy
	subs        []image.SubCgroup
}

// NewMaker finds the hierarchies of the image's cgroups among those of the new
// container.
func NewMaker(c *image.Container, hierarchies []Hierarchy) (*Maker, error) {
	m := &Maker{hierarchies: map[string]Hierarchy{}, subs: c.Subs}
	for _, h := range hierarchies {
		m.hierarchies[h.Name] = h
	}
	for i := range m.subs {
		s := &m.subs[i]
		if _, ok := m.hierarchies[s.Hierarchy]; !ok {
			return nil, fail.Refuse(object(s), "this host has no such hierarchy of cgroups for the container", "restore on a host with the same version of cgroups and controllers")
		}
		for _, f := range s.Files {
			if f.Set && !attribute(f.Name) {
				return nil, fail.Refuse(object(s), f.Name+" is no setting", "")
			}
		}
	}
	return m, nil
}

func object(s *image.SubCgroup) string { return "cgroup " + s.Hierarchy + ":" + s.Path }

// Needed reports whether there are any.
func (m *Maker) Needed() bool { return len(m.subs) > 0 }

func (m *Maker) dir(hierarchy, path string) string {
	return filepath.Join(m.hierarchies[hierarchy].Dir, path)
}

// first reports the settings that must be there before tasks can be.
func first(name string) bool {
	return name == cgroupType || name == "cpuset.cpus" || name == "cpuset.mems"
}

// Make makes the cgroups, empty, with what tasks need to be moved there.
func (m *Maker) Make() error {
	for i := range m.subs {
		s := &m.subs[i]
		if s.Path == "" {
			continue
		}
		if err := unix.Mkdir(m.dir(s.Hierarchy, s.Path), 0o755); err != nil {
			return fail.On(object(s), fmt.Errorf("make it: %w", err))
		}
		if err := m.set(s, first); err != nil {
			return err
		}
	}
	return nil
}

// HandOn enables controllers for the cgroups below (cgroup v2), once nobody is in
// between any more: "no internal processes" of cgroups(7).
func (m *Maker) HandOn() error {
	for i := range m.subs {
		if err := m.set(&m.subs[i], func(name string) bool { return name == subtreeControl }); err != nil {
			return err
		}
	}
	return nil
}

// Finish gives the cgroups all other settings and their owners. Those that are
// frozen come last: nothing can be moved or killed there at ease.
func (m *Maker) Finish() error {
	late := func(name string) bool { return name == selfFreezing || name == freezeV2 }
	for i := range m.subs {
		s := &m.subs[i]
		if err := m.set(s, func(name string) bool { return !first(name) && name != subtreeControl && !late(name) }); err != nil {
			return err
		}
		if err := m.own(s); err != nil {
			return fail.On(object(s), err)
		}
	}
	for i := range m.subs {
		if err := m.set(&m.subs[i], late); err != nil {
			return err
		}
	}
	return nil
}

// set writes those settings that a new cgroup does not have by itself.
func (m *Maker) set(s *image.SubCgroup, which func(name string) bool) error {
	for _, f := range s.Files {
		if !f.Set || !which(f.Name) {
			continue
		}
		path := filepath.Join(m.dir(s.Hierarchy, s.Path), f.Name)
		now, err := readFile(path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
			m.Warn("a setting of a cgroup is not known here and left out", "cgroup", s.Path, "setting", f.Name, "value", f.Value)
			continue
		}
		if err != nil {
			return fail.On(object(s), fmt.Errorf("%s, which is %q in the image: %w", f.Name, f.Value, err))
		}
		if now == f.Value {
			continue
		}
		for _, w := range writes(f.Name, f.Value, now) {
			if err := write(filepath.Join(filepath.Dir(path), w.name), w.value); err != nil {
				return fail.On(object(s), fmt.Errorf("set %s to %q: %w", w.name, w.value, err))
			}
		}
	}
	return nil
}

// assignment is one write(2).
type assignment struct{ name, value string }

// writes are what makes a file read as value that now reads as another.
func writes(name, value, now string) (out []assignment) {
	switch name {
	case subtreeControl:
		for _, c := range strings.Fields(value) {
			out = append(out, assignment{name, "+" + c})
		}
		return out
	case devicesList:
		out = append(out, assignment{"devices.deny", "a"})
		for line := range strings.Lines(value) {
			out = append(out, assignment{"devices.allow", strings.TrimSpace(line)})
		}
		return out
	case oomControl: // "oom_kill_disable 1" and what cannot be set
		_, rest, _ := strings.Cut(value, "oom_kill_disable ")
		on, _, _ := strings.Cut(rest, "\n")
		if strings.Contains(now, "oom_kill_disable "+on+"\n") {
			return nil
		}
		return []assignment{{name, on}}
	case selfFreezing:
		if value == "1" {
			return []assignment{{"freezer.state", "FROZEN"}}
		}
		return nil
	case cgroupType:
		if value == "threaded" {
			return []assignment{{name, value}}
		}
		return nil // it follows from others
	}
	if !strings.Contains(value, "\n") {
		return []assignment{{name, value}}
	}
	for line := range strings.Lines(value) { // one device or resource each
		out = append(out, assignment{name, strings.TrimSpace(line)})
	}
	return out
}

func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value + "\n")
	return errors.Join(err, f.Close())
}

// own gives a cgroup and its files to whom they belonged (delegation).
func (m *Maker) own(s *image.SubCgroup) error {
	dir := m.dir(s.Hierarchy, s.Path)
	if s.Path != "" {
		if err := m.give(dir, s.UID, s.GID, s.Mode); err != nil {
			return err
		}
	}
	for _, f := range s.Files {
		if !m.has(dir, f.Name) {
			continue
		}
		if err := m.give(filepath.Join(dir, f.Name), f.UID, f.GID, f.Mode); err != nil {
			return err
		}
	}
	return nil
}

// has reports whether a cgroup has a file here.
func (m *Maker) has(dir, name string) bool {
	var st unix.Stat_t
	return unix.Lstat(filepath.Join(dir, name), &st) == nil
}

func (m *Maker) give(path string, uid, gid, mode uint32) error {
	u, err := m.HostUID(int(uid))
	if err != nil {
		return err
	}
	g, err := m.HostGID(int(gid))
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if st.Uid != uint32(u) || st.Gid != uint32(g) {
		if err := unix.Lchown(path, u, g); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if st.Mode&0o7777 == mode {
		return nil
	}
	return unix.Chmod(path, mode)
}

// Enter moves a process to its cgroups, or a thread of one that is elsewhere than
// its leader.
func (m *Maker) Enter(id int, places map[string]string, thread bool) error {
	for hierarchy, path := range places {
		file := "cgroup.procs"
		if thread {
			file = "tasks"
			if hierarchy == "" {
				file = "cgroup.threads"
			}
		}
		if _, ok := m.hierarchies[hierarchy]; !ok {
			return fmt.Errorf("no hierarchy %q for its cgroup %s", hierarchy, path)
		}
		if err := write(filepath.Join(m.dir(hierarchy, path), file), strconv.Itoa(id)); err != nil {
			return fail.On("cgroup "+hierarchy+":"+path, fmt.Errorf("move %d there: %w", id, err))
		}
	}
	return nil
}
