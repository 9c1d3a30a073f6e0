package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// engineDevices are the names that libcontainer puts into a container's /dev
// (OCI runtime specification, "Default Devices", and its symbolic links).
var engineDevices = []string{
	"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
	"stderr", "stdin", "stdout", "tty", "urandom", "zero",
}

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
	devices := slices.Clone(engineDevices)
	for _, d := range config.Devices {
		devices = append(devices, strings.TrimPrefix(d.Path, "/dev/"))
		expected[d.Path] = true // a bind mount inside a user namespace
	}
	for i := range c.record.Mounts {
		m := &c.record.Mounts[i]
		if !expected[m.Point] && !below(m.Point, config, "cgroup") && m.Point != "/dev/console" {
			return fail.Refuse("mount "+m.Point, "the container mounted this "+m.FSType+" itself; such mounts are not supported yet", "unmount it before the checkpoint")
		}
		if m.FSType == "mqueue" {
			if err := c.checkEmpty(m.Point, "mqueue", nil); err != nil {
				return err
			}
		}
		if m.FSType != "tmpfs" || m.Root != "/" || slices.Contains(config.MaskPaths, m.Point) {
			continue
		}
		known := devices
		if m.Point != "/dev" {
			known = c.mountPointsIn(m.Point)
		}
		if err := c.checkEmpty(m.Point, "tmpfs", known); err != nil {
			return err
		}
	}
	return nil
}

// mounted reports whether path is, or leads to, a mount point.
func (c *container) mounted(path string) bool {
	return slices.ContainsFunc(c.record.Mounts, func(m image.Mount) bool {
		return m.Point == path || strings.HasPrefix(m.Point, path+"/")
	})
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

// mountPointsIn lists the names in a directory that other mounts stand on, and
// cgroup v1's links to joined controllers.
func (c *container) mountPointsIn(dir string) (names []string) {
	for i := range c.record.Mounts {
		if p := c.record.Mounts[i].Point; p != dir && strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/") {
			first, _, _ := strings.Cut(strings.TrimPrefix(p, strings.TrimSuffix(dir, "/")+"/"), "/")
			names = append(names, first)
		}
	}
	return names
}

// checkEmpty refuses a file system in memory that holds anything the engine has
// not put there.
func (c *container) checkEmpty(point, kind string, known []string) error {
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
		if e.Type()&os.ModeSymlink != 0 && strings.HasPrefix(point, "/sys/fs/cgroup") {
			continue
		}
		// The engine makes links, devices and mount points, and nothing else.
		plain := e.Type()&(os.ModeSymlink|os.ModeDevice) == 0 && !c.mounted(filepath.Join(point, e.Name()))
		if !slices.Contains(known, e.Name()) || plain {
			return fail.Refuse(kind+" "+point, "it holds "+filepath.Join(point, e.Name())+", and files in memory are not supported yet", "remove it, or put it on the container's root")
		}
	}
	return nil
}
