package runtime

import (
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
