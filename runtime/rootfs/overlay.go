package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// overlay tells changes by an overlay's upper directory
// (Documentation/filesystems/overlayfs.rst). Only which names stand there, and
// what is marked as gone, is read from it; what they are, with all their content,
// is read from the merged tree, where the kernel has put layers, redirects and
// files of which only the metadata was copied up together.
type overlay struct {
	upper *os.File
	attrs string          // how its extended attributes begin
	whole map[string]bool // directories that are not merged with one below
}

func openOverlay(mount *image.Mount) (Source, error) {
	name := option(mount.Super, "upperdir")
	if name == "" {
		return nil, fail.Refuse("root file system", "its overlay has no upper directory", "leave out --rootfs-diff: nothing can have changed in it")
	}
	const remedy = "use a manifest of its root as it was (ocickpt manifest, --rootfs-manifest)"
	if !path.IsAbs(name) {
		return nil, fail.Refuse("root file system", "the upper directory of its overlay, "+name+", is a relative path: from where is not known", remedy)
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, &fail.Error{Object: "root file system", Cause: fmt.Errorf("the upper directory of its overlay cannot be opened from here: %w", err), Remedy: remedy}
	}
	o := &overlay{upper: f, attrs: "trusted.overlay."}
	if slices.Contains(strings.Split(mount.Super, ","), "userxattr") {
		o.attrs = "user.overlay."
	}
	return o, nil
}

func (o *overlay) Close() error { return o.upper.Close() }

// Select makes sure that the directory is the one that the overlay writes to: of
// a directory, an overlay shows the upper one's times.
func (o *overlay) Select(root *os.File) (tmpfs.Selection, error) {
	const tries = 3 // something may change between the two looks
	for range tries {
		var merged, upper unix.Stat_t
		if err := errors.Join(unix.Fstat(int(root.Fd()), &merged), unix.Fstat(int(o.upper.Fd()), &upper)); err != nil {
			return nil, err
		}
		if merged.Ctim == upper.Ctim && merged.Mtim == upper.Mtim && merged.Mode == upper.Mode {
			o.whole = map[string]bool{}
			return o, nil
		}
	}
	return nil, fail.Refuse("root file system", o.upper.Name()+" is not the upper directory of its overlay here", "use a manifest of its root as it was (ocickpt manifest, --rootfs-manifest)")
}

// Directory: what stands in the upper directory has changed.
func (o *overlay) Directory(name string, _ tmpfs.ID) (tmpfs.Part, error) {
	all := tmpfs.Part{All: true}
	if o.whole[path.Dir(name)] && name != "." {
		o.whole[name] = true
		return all, nil
	}
	dir, err := o.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return all, err
	}
	defer dir.Close()
	opaque, err := o.mark(dir, "opaque")
	if err != nil {
		return all, err
	}
	redirect, err := o.mark(dir, "redirect")
	if err != nil {
		return all, err
	}
	if opaque == "y" || redirect != "" {
		o.whole[name] = true
		return all, nil
	}
	return o.list(dir, opaque == "x")
}

// list reads a directory that is merged with those below it.
func (o *overlay) list(dir *os.File, marked bool) (part tmpfs.Part, err error) {
	part.Merged = true
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return part, err
	}
	for _, e := range entries {
		gone, err := o.whiteout(dir, e, marked)
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			return part, fmt.Errorf("%s in the upper directory: %w", e.Name(), err)
		case gone:
			part.Gone = append(part.Gone, e.Name())
		default:
			part.Names = append(part.Names, e.Name())
		}
	}
	return part, nil
}

// whiteout reports a mark that a name is gone: a device node of number 0, or in
// some directories an empty file with an attribute.
func (o *overlay) whiteout(dir *os.File, e os.DirEntry, marked bool) (bool, error) {
	var st unix.Stat_t
	switch t := e.Type(); {
	case t&os.ModeCharDevice != 0:
		err := unix.Fstatat(int(dir.Fd()), e.Name(), &st, unix.AT_SYMLINK_NOFOLLOW)
		return err == nil && st.Rdev == 0, err
	case marked && t.IsRegular():
		_, err := unix.Lgetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), e.Name()), o.attrs+"whiteout", nil)
		if errors.Is(err, unix.ENODATA) {
			return false, nil
		}
		return err == nil, err
	}
	return false, nil
}

// mark reads one of overlay's extended attributes of a directory, "" if it has
// none.
func (o *overlay) mark(dir *os.File, name string) (string, error) {
	value := make([]byte, unix.PathMax)
	n, err := unix.Fgetxattr(int(dir.Fd()), o.attrs+name, value)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("attribute %s%s: %w", o.attrs, name, err)
	}
	return string(value[:n]), nil
}

func (o *overlay) open(name string, flags uint64) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NOATIME,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(int(o.upper.Fd()), name, &how)
	if err != nil {
		return nil, fmt.Errorf("open %s in the upper directory: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Entry reports true: what is in the upper directory has changed.
func (o *overlay) Entry(string, tmpfs.ID) bool { return true }
