package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// checkMounts refuses mounts and memory file systems whose state would be lost:
// restore mounts what the bundle says, and nothing else.
func checkMounts(c *container, config *configs.Config) error {
	expected := map[string]bool{"/": true}
	for _, m := range config.Mounts {
		expected[filepath.Clean(m.Destination)] = true
	}
	for _, p := range slices.Concat(config.MaskPaths, config.ReadonlyPaths) {
		expected[filepath.Clean(p)] = true
	}
	for _, d := range config.Devices {
		expected[d.Path] = true // a bind mount inside a user namespace
	}
	for i := range c.record.Mounts {
		m := &c.record.Mounts[i]
		if !expected[m.Point] && !below(m.Point, config, "cgroup") && m.Point != "/dev/console" {
			return fail.Refuse("mount "+m.Point, "the container mounted this "+m.FSType+" itself; such mounts are not supported yet", "unmount it before the checkpoint")
		}
		if m.FSType == "mqueue" {
			if err := c.checkEmpty(m.Point, "mqueue"); err != nil {
				return err
			}
		}
	}
	return nil
}

// below reports a mount under one of the bundle's own mounts of a device type:
// libcontainer mounts every cgroup v1 controller below one "cgroup" entry.
func below(point string, config *configs.Config, device string) bool {
	for _, m := range config.Mounts {
		if m.Device == device && strings.HasPrefix(point, filepath.Clean(m.Destination)+"/") || m.IsBind() && m.Flags&unix.MS_REC != 0 && strings.HasPrefix(point, filepath.Clean(m.Destination)+"/") {
			return true
		}
	}
	return false
}

// checkEmpty refuses a file system in memory that holds anything the engine has
// not put there.
func (c *container) checkEmpty(point, kind string) error {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(c.root.Fd()), point, &how)
	if err != nil {
		return fail.On(kind+" "+point, fmt.Errorf("look into it: %w", err))
	}
	dir := os.NewFile(uintptr(fd), point)
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return fail.On(kind+" "+point, err)
	}
	for _, e := range entries {
		return fail.Refuse(kind+" "+point, "it holds "+filepath.Join(point, e.Name())+", which is not supported yet", "remove it before the checkpoint")
	}
	return nil
}
