package guardian

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

// removeCgroups empties and removes cgroups with those below them. All are
// checked before the first process is killed.
func removeCgroups(paths [][]byte) error {
	var dirs []string
	for _, path := range paths {
		dir := string(path)
		err := mayRemove(dir)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		dirs = append(dirs, dir)
	}
	if err := empty(dirs); err != nil {
		return err
	}
	var failed []error
	for _, dir := range dirs {
		failed = append(failed, removeEmpty(dir))
	}
	return errors.Join(failed...)
}

// mayRemove refuses directories where a mistake would cost the host its life.
func mayRemove(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return err
	}
	if fs.Type != unix.CGROUP_SUPER_MAGIC && fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is not a cgroup", dir)
	}
	own, errOwn := mountID(dir)
	above, errAbove := mountID(filepath.Dir(dir))
	if err := errors.Join(errOwn, errAbove); err != nil {
		return err
	}
	if own != above {
		return fmt.Errorf("%s is the root of a hierarchy", dir)
	}
	pids, err := members(dir)
	if err != nil {
		return err
	}
	if slices.Contains(pids, os.Getpid()) {
		return fmt.Errorf("%s holds the process that should remove it", dir)
	}
	return nil
}

// empty kills until nobody is left in any of the cgroups and below them. All are
// treated in each round: the tasks of a v1 cpu cgroup may be frozen, and so
// immortal, in the freezer cgroup that is named only after it.
func empty(dirs []string) error {
	return retry(deathPatience, func() (bool, error) {
		var alive []int
		var failed []error
		for _, dir := range dirs {
			pids, err := members(dir)
			if err == nil && len(pids) > 0 {
				alive = append(alive, pids...)
				err = killMembers(dir, pids)
			}
			if err != nil && !gone(err) {
				failed = append(failed, err)
			}
		}
		if len(alive) > 0 {
			failed = append(failed, fmt.Errorf("pids %v do not die", alive))
		}
		return len(alive) > 0, errors.Join(failed...)
	})
}

// killMembers sends SIGKILL to all processes of a cgroup, and thaws it: a task
// that is frozen by a v1 freezer dies only then, before it runs any code of its
// own. On v2 frozen tasks die as they are.
func killMembers(dir string, pids []int) error {
	err := write(filepath.Join(dir, "cgroup.kill"), []byte("1"))
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		err = killListed(dir, pids) // v1, threaded, or before Linux 5.14
	}
	subs, listing := subtree(dir)
	for _, sub := range subs {
		thaw := write(filepath.Join(sub, "freezer.state"), []byte("THAWED"))
		if thaw != nil && !gone(thaw) {
			err = errors.Join(err, thaw)
		}
	}
	return errors.Join(err, listing)
}

// killListed kills processes one by one. Each is held by a pidfd before the
// cgroup is listed again: one that is still listed then is not a stranger who was
// given the pid of one that has left.
func killListed(dir string, pids []int) error {
	held := make(map[int]int)
	for _, pid := range pids {
		if pidfd, err := unix.PidfdOpen(pid, 0); err == nil {
			held[pid] = pidfd
			defer unix.Close(pidfd)
		}
	}
	still, err := members(dir)
	if err != nil {
		return err
	}
	for _, pid := range still {
		pidfd, ok := held[pid]
		if !ok {
			continue // a newcomer; it is found in the next round
		}
		kill := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		if kill != nil && !errors.Is(kill, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("pid %d: %w", pid, kill))
		}
	}
	return err
}

// removeEmpty removes the cgroups from below. A cgroup stays busy for a moment
// after its last task's death.
func removeEmpty(dir string) error {
	dirs, err := subtree(dir)
	if gone(err) {
		return nil
	}
	for _, sub := range slices.Backward(dirs) {
		rmdir := retry(deathPatience, func() (bool, error) {
			err := unix.Rmdir(sub)
			return errors.Is(err, unix.EBUSY), err
		})
		if rmdir != nil && !gone(rmdir) {
			err = errors.Join(err, fmt.Errorf("rmdir %s: %w", sub, rmdir))
		}
	}
	return err
}

// members lists the pids of all processes in a cgroup and below it.
func members(dir string) ([]int, error) {
	dirs, err := subtree(dir)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, sub := range dirs {
		procs, err := os.ReadFile(filepath.Join(sub, "cgroup.procs"))
		if errors.Is(err, unix.EOPNOTSUPP) {
			// Threaded: it lists threads, and a pidfd would need
			// their leaders, whom a cgroup above lists.
			continue
		}
		if err != nil && !gone(err) {
			return nil, err
		}
		for _, field := range strings.Fields(string(procs)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s/cgroup.procs: %w", sub, err)
			}
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// subtree returns a directory and all below it, parents first.
func subtree(dir string) ([]string, error) {
	dirs := []string{dir}
	for i := 0; i < len(dirs); i++ {
		entries, err := os.ReadDir(dirs[i])
		if err != nil && (i == 0 || !gone(err)) {
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
