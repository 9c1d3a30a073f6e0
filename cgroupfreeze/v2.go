package cgroupfreeze

import (
	"fmt"
	"path/filepath"
	"strings"
)

// v2 is a cgroup of the unified hierarchy. Every cgroup but the root can be
// frozen; no controller is needed for it.
type v2 struct{ dir string }

func (f v2) control() (path, freeze, thaw string) {
	return filepath.Join(f.dir, "cgroup.freeze"), "1", "0"
}

func (f v2) asked() (bool, error) {
	path, _, _ := f.control()
	return readFlag(path)
}

// frozen reads the "frozen" line of cgroup.events. Reading again and again is
// quicker than poll(POLLPRI), whose notification the kernel limits to one in
// 10 ms a file.
func (f v2) frozen() (bool, error) {
	path := filepath.Join(f.dir, "cgroup.events")
	events, err := readValue(path)
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(events) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "frozen "); ok {
			return value == "1", nil
		}
	}
	return false, fmt.Errorf("%s: no line \"frozen\" (needs Linux 5.2)", path)
}

func (f v2) thawed() (bool, error) {
	frozen, err := f.frozen()
	return !frozen, err
}

// nudge has nothing to do: the request is a job control trap that stays pending
// in each task, and tasks that fork or move in are given it.
func (f v2) nudge() error { return nil }

// ancestor looks upwards. If nothing is found there and the cgroup is frozen
// without having been asked, the one that was is above what is mounted here.
func (f v2) ancestor() (string, error) {
	up, err := nearestAsked(f.dir, "cgroup.freeze")
	if err != nil || up != "" {
		return up, err
	}
	// The order matters: while somebody thaws, the setting is cleared
	// before the event is.
	frozen, err := f.frozen()
	if err != nil || !frozen {
		return "", err
	}
	asked, err := f.asked()
	if err != nil || asked {
		return "", err
	}
	return "a cgroup outside this mount", nil
}

// mayLag: frozen tasks sleep interruptibly (S) in do_freezer_trap(), and the
// trap wakes every other interruptible sleeper.
func (f v2) mayLag(state byte) bool { return strings.IndexByte("RD", state) >= 0 }
