package runtime

import (
	"errors"
	"path/filepath"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/aside"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/fault"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/rootfs"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// What restore does with the changes of a root file system that an image has.
const (
	RootfsDiffApply = "apply"
	RootfsDiffSkip  = "skip"
)

// RootfsDiffs are the values of RestoreOptions.RootfsDiff.
var RootfsDiffs = []string{RootfsDiffApply, RootfsDiffSkip}

// openRootDiff finds out how the changes of the root file system are told.
func (c *container) openRootDiff(manifest string) (err error) {
	m := mountAt(c.record.Mounts, image.RootPoint)
	if m == nil {
		return fail.Refuse("root file system", "the container shows no mount of it", "")
	}
	c.rootDiff, err = rootfs.Open(m, manifest)
	return err
}

// scanRoot reads what the container has changed in its root file system, nil if
// that is not asked for.
func (c *container) scanRoot() (*tmpfs.Tree, error) {
	if c.rootDiff == nil {
		return nil, nil
	}
	m := mountAt(c.record.Mounts, image.RootPoint)
	covered, own := coveredIn(c.record.Mounts, m)
	root, err := c.openBelow(m, own)
	if err != nil {
		return nil, err
	}
	part, err := c.rootDiff.Select(root)
	var t *tmpfs.Tree
	if err == nil {
		t, err = tmpfs.Scan(root, image.RootPoint, covered, c.maps, part)
	}
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	for _, path := range t.Partial() {
		c.warn("/%s has other names in the root file system that lead to something else after the restore", path)
	}
	return t, nil
}

// rootDiff is the root file system that a restore changes.
type rootDiff struct {
	*aside.Area
	guard    *guardian.Guardian
	entry    guardian.Entry
	uid, gid int // of the bundle's own process, on the host
}

// Begin promises to put everything back, before anything is done.
func (d *rootDiff) Begin() (err error) {
	if d.entry, err = d.guard.Promise(guardian.PutBack(d.Area)); err != nil {
		return err
	}
	if err := d.Area.Begin(d.uid, d.gid); err != nil {
		return err
	}
	return fault.Point("restore.aside")
}

// keep makes the changes last.
func (d *rootDiff) keep() error {
	if d == nil {
		return nil
	}
	return errors.Join(d.Keep(), d.guard.Strike(d.entry))
}

// prepareRoot looks at what the image changes in the root file system.
func (r *restore) prepareRoot(roots map[image.Ref]*image.Inode, mounts []image.Mount, ids task.IDMaps) error {
	for ref, inode := range roots {
		point := inode.Point
		if point != image.RootPoint || inode.Mnt != 0 || r.RootfsDiff == RootfsDiffSkip {
			continue
		}
		fd, root, err := r.maker.OpenRoot(point)
		if err != nil {
			return err
		}
		covered, _ := coveredIn(mounts, mountAt(mounts, point))
		t, err := tmpfs.Scan(root, point, covered, ids, r.memory.Selection(ref))
		if err != nil {
			return errors.Join(err, root.Close())
		}
		path := r.made.config.Rootfs
		if !filepath.IsAbs(path) {
			path = filepath.Join(r.Bundle, path)
		}
		d := &rootDiff{guard: r.guard}
		if d.uid, err = r.made.config.HostUID(int(r.made.identity.UID)); err == nil {
			d.gid, err = r.made.config.HostGID(int(r.made.identity.GID))
		}
		if err == nil {
			d.Area, err = aside.Plan(path, root)
		}
		if err != nil {
			return errors.Join(err, t.Close())
		}
		r.root = d
		r.memory.Root(ref, fd, t, d)
	}
	return nil
}
