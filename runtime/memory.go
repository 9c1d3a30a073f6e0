package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// ownTmpfs reports a file system in memory that is the container's alone:
// mounted anew for it, because its bundle says so. One that the bundle binds
// from the host is the host's.
func ownTmpfs(config *configs.Config, m *image.Mount) bool {
	own := false
	for _, b := range config.Mounts {
		if filepath.Clean(b.Destination) == m.Point {
			own = b.Device == "tmpfs" && !b.IsBind() // the last one covers the others
		}
	}
	return own && m.FSType == "tmpfs" && m.Root == "/"
}

// coveredIn lists the paths in a mount that others stand on, relative to it.
func coveredIn(mounts []image.Mount, m *image.Mount) (paths []string) {
	for i := range mounts {
		if below, ok := strings.CutPrefix(mounts[i].Point, strings.TrimSuffix(m.Point, "/")+"/"); ok && mounts[i].Parent == m.ID {
			paths = append(paths, below)
		}
	}
	return paths
}

// sameMount checks that a directory is the root of a mount, and of nothing that
// covers it.
func sameMount(f *os.File, m *image.Mount) error {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return err
	}
	if int(st.Mnt_id) != m.ID || !tmpfs.Magic(f) {
		return fail.Refuse("tmpfs "+m.Point, "another mount covers it", "unmount that before the checkpoint")
	}
	return nil
}

// scanTmpfs reads all file systems in memory that are the container's own.
func (c *container) scanTmpfs() (trees []*tmpfs.Tree, err error) {
	config := c.lib.Config()
	for i := range c.record.Mounts {
		m := &c.record.Mounts[i]
		if !ownTmpfs(&config, m) {
			continue
		}
		how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
		fd, err := unix.Openat2(int(c.root.Fd()), m.Point, &how)
		if err != nil {
			return trees, fail.On("tmpfs "+m.Point, fmt.Errorf("look into it: %w", err))
		}
		f := os.NewFile(uintptr(fd), m.Point)
		if err := sameMount(f, m); err != nil {
			_ = f.Close()
			return trees, err
		}
		t, err := tmpfs.Scan(f, m.Point, coveredIn(c.record.Mounts, m), c.maps, nil)
		if err != nil {
			_ = f.Close()
			return trees, err
		}
		trees = append(trees, t)
	}
	return trees, nil
}

// makeTmpfs fills the new container's file systems in memory with what those
// of the image held, all but the bytes of files.
func (r *restore) makeTmpfs() error {
	r.memory = tmpfs.NewMaker(r.head, r.maker, file.Refs(r.head))
	points := r.memory.Points()
	if len(points) == 0 {
		return nil
	}
	mounts, err := readMountinfo(r.made.stub.Pid)
	if err != nil {
		return err
	}
	ids, err := readIDMaps(r.made.stub.Pid)
	if err != nil {
		return err
	}
	for ref, point := range points {
		if point == image.RootPoint {
			continue
		}
		m := mountAt(mounts, point)
		if m == nil || !ownTmpfs(&r.made.config, m) {
			return fail.Refuse("tmpfs "+point, "the bundle mounts none there", "restore with the bundle of the checkpoint")
		}
		fd, root, err := r.maker.OpenRoot(point)
		if err == nil {
			err = sameMount(root, m)
		}
		var tree *tmpfs.Tree
		if err == nil {
			tree, err = tmpfs.Scan(root, point, coveredIn(mounts, m), ids, nil)
		}
		if err != nil {
			return fail.On("tmpfs "+point, err)
		}
		r.memory.Root(ref, fd, tree, nil)
	}
	if err := r.prepareRoot(points, mounts, ids); err != nil {
		return fail.On("root file system", err)
	}
	return r.memory.Make()
}

// mountAt is the uppermost mount at a point.
func mountAt(mounts []image.Mount, point string) (found *image.Mount) {
	for i := range mounts {
		if mounts[i].Point == point {
			found = &mounts[i]
		}
	}
	return found
}
