package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// ownTmpfs reports a file system in memory that is the container's alone:
// mounted anew for it, because its bundle says so, or by itself. One that the
// bundle binds from the host is the host's.
func ownTmpfs(config *configs.Config, m *image.Mount) bool {
	own := m.Own == image.MountNew
	if m.Own != "" {
		return own && m.FSType == "tmpfs"
	}
	for _, b := range config.Mounts {
		if filepath.Clean(b.Destination) == m.Point {
			own = b.Device == "tmpfs" && !b.IsBind() // the last one covers the others
		}
	}
	return own && m.FSType == "tmpfs" && m.Root == "/"
}

// coveredIn lists the paths in a mount that others of the bundle's stand on,
// relative to it, and whether some of the container's own do.
func coveredIn(mounts []image.Mount, m *image.Mount) (paths []string, own bool) {
	for i := range mounts {
		below, ok := image.Below(mounts[i].Point, m.Point)
		switch {
		case mounts[i].Parent != m.ID || !ok:
		case mounts[i].Own != "":
			own = true
		default:
			paths = append(paths, below)
		}
	}
	return paths, own
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
		covered, own := coveredIn(c.record.Mounts, m)
		f, err := c.openBelow(m, own)
		if err != nil {
			return trees, err
		}
		t, err := tmpfs.Scan(f, m.Point, covered, c.maps, nil)
		if err != nil {
			_ = f.Close()
			return trees, err
		}
		if m.Own != "" {
			t.Mount(int32(m.ID))
		}
		trees = append(trees, t)
	}
	return trees, nil
}

// scanNestedTmpfs reads those that only mount namespaces of tasks show.
func (n *census) scanNestedTmpfs(c *container) error {
	for _, v := range n.nested.Views() {
		for i := range v.Mounts {
			m := &v.Mounts[i]
			if m.Own != image.MountNew || m.FSType != "tmpfs" {
				continue
			}
			t, err := scanView(v.Set, m, c.maps)
			if err != nil {
				return err
			}
			n.memory = append(n.memory, t)
		}
	}
	return nil
}

// scanView reads the file system in memory that is mounted somewhere by the
// container.
func scanView(set *mount.Set, m *image.Mount, ids tmpfs.IDs) (*tmpfs.Tree, error) {
	view, err := set.View(m.ID)
	if err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(view.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), m.Point)
	t, err := tmpfs.Scan(f, m.Point, nil, ids, nil)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	t.Mount(int32(m.ID))
	return t, nil
}

// openBelow opens the root of a mount: as it would be without what the container
// has mounted on it, where it has.
func (c *container) openBelow(m *image.Mount, covered bool) (*os.File, error) {
	if covered || m.Own != "" {
		view, err := c.mounts.View(m.ID)
		if err != nil {
			return nil, err
		}
		fd, err := unix.FcntlInt(view.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		return os.NewFile(uintptr(fd), m.Point), err
	}
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(c.root.Fd()), m.Point, &how)
	if err != nil {
		return nil, fail.On("mount "+m.Point, fmt.Errorf("look into it: %w", err))
	}
	f := os.NewFile(uintptr(fd), m.Point)
	if m.FSType == "tmpfs" {
		err = sameMount(f, m)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// makeTmpfs fills the new container's file systems in memory with what those
// of the image held, all but the bytes of files.
func (r *restore) makeTmpfs() error {
	r.memory = tmpfs.NewMaker(r.head, r.maker, file.Refs(r.head), nil, func(root *image.Inode) bool { return !r.foreign(int(root.Mnt)) })
	r.memories = append(r.memories, r.memory)
	r.maker.Remade = func(dev uint64) bool {
		return slices.ContainsFunc(r.memories, func(m *tmpfs.Maker) bool { return m.Remade(dev) })
	}
	roots := r.memory.Roots()
	if len(roots) == 0 {
		return nil
	}
	have, err := mount.Read(r.made.stub.Pid)
	if err != nil {
		return err
	}
	mounts := mount.Records(have)
	ids, err := readIDMaps(r.made.stub.Pid)
	if err != nil {
		return err
	}
	for ref, inode := range roots {
		if inode.Point == image.RootPoint && inode.Mnt == 0 {
			continue
		}
		fd, root, covered, err := r.openFresh(mounts, inode)
		var tree *tmpfs.Tree
		if err == nil {
			tree, err = tmpfs.Scan(root, inode.Point, covered, ids, nil)
		}
		if err != nil {
			return fail.On("tmpfs "+inode.Point, err)
		}
		r.memory.Root(ref, fd, tree, nil)
	}
	if err := r.prepareRoot(roots, mounts, ids); err != nil {
		return fail.On("root file system", err)
	}
	return r.memory.Make()
}

// openFresh opens the new file system for one of the image: one that the bundle
// mounts, or one that is the container's own and mounted nowhere yet.
func (r *restore) openFresh(mounts []image.Mount, inode *image.Inode) (fd int, root *os.File, covered []string, err error) {
	if inode.Mnt != 0 {
		fd := r.mounts.Fills()[int(inode.Mnt)]
		root, err = r.made.stub.Take(fd)
		return fd, root, nil, err
	}
	m := mountAt(mounts, inode.Point)
	if m == nil || !ownTmpfs(&r.made.config, m) {
		return 0, nil, nil, fail.Refuse("tmpfs "+inode.Point, "the bundle mounts none there", "restore with the bundle of the checkpoint")
	}
	fd, root, err = r.maker.OpenRoot(inode.Point)
	if err == nil {
		err = sameMount(root, m)
	}
	covered, _ = coveredIn(mounts, m)
	return fd, root, covered, err
}

// mountAt is the uppermost mount of the bundle's at a point.
func mountAt(mounts []image.Mount, point string) (found *image.Mount) {
	for i := range mounts {
		if mounts[i].Point == point && mounts[i].Own == "" {
			found = &mounts[i]
		}
	}
	return found
}
