package cgroupfreeze

import (
	"fmt"
	"path/filepath"
	"strings"
)

// v1 is a cgroup in the hierarchy of the version 1 freezer controller.
type v1 struct{ dir string }

// The values of freezer.state. FREEZING can only be read.
const (
	stateThawed   = "THAWED"
	stateFreezing = "FREEZING"
	stateFrozen   = "FROZEN"
)

func (f v1) control() (path, freeze, thaw string) {
	return filepath.Join(f.dir, "freezer.state"), stateFrozen, stateThawed
}

func (f v1) asked() (bool, error) {
	return readFlag(filepath.Join(f.dir, "freezer.self_freezing"))
}

func (f v1) frozen() (bool, error) {
	state, err := f.state()
	return state == stateFrozen, err
}

func (f v1) thawed() (bool, error) {
	state, err := f.state()
	return state == stateThawed, err
}

// state reads freezer.state. The read is what makes progress visible: only
// freezer_read() looks whether all tasks are frozen by now and turns FREEZING
// into FROZEN.
func (f v1) state() (string, error) {
	path, _, _ := f.control()
	state, err := readValue(path)
	if err != nil {
		return "", err
	}
	switch state {
	case stateThawed, stateFreezing, stateFrozen:
		return state, nil
	}
	return "", fmt.Errorf("%s: unknown state %q", path, state)
}

// nudge writes FROZEN once more. The first write signals the tasks of that
// moment, each once. A task that was just then moved in, or that took the
// signal in a place where it could not freeze, waits for another one, and
// FREEZING would stand for ever.
func (f v1) nudge() error {
	path, freeze, _ := f.control()
	return writeValue(path, freeze)
}

// ancestor asks freezer.parent_freezing first: it knows of cgroups above the
// part of the hierarchy that is mounted here.
func (f v1) ancestor() (string, error) {
	inherited, err := readFlag(filepath.Join(f.dir, "freezer.parent_freezing"))
	if err != nil || !inherited {
		return "", err
	}
	up, err := nearestAsked(f.dir, "freezer.self_freezing")
	if up == "" {
		up = "a cgroup outside this mount"
	}
	return up, err
}

// mayLag: a frozen task shows as D on every kernel, just like one that cannot
// freeze because it sleeps uninterruptibly. R and S are not frozen.
func (f v1) mayLag(state byte) bool { return strings.IndexByte("RSD", state) >= 0 }
