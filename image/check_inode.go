package image

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Bounds on an inode, each the kernel's (linux/limits.h, uapi/linux/stat.h).
const (
	maxName   = 255
	maxPath   = 4096 // with its NUL
	maxLinks  = 65535
	maxXattrs = 64 << 10 // of all attributes of a file together

	formatMask  = 0o170000
	formatDir   = 0o040000
	formatChar  = 0o020000
	formatBlock = 0o060000
	formatFile  = 0o100000
	formatFifo  = 0o010000
	formatLink  = 0o120000
	formatSock  = 0o140000
)

// fileSystem is where one is mounted, and which mount it is where that is the
// container's own.
type fileSystem struct {
	point string
	mnt   int32
}

// place is where an inode stands: below which root, and how long its path is.
type place struct {
	root   Ref
	length int
}

// checkInode checks that an inode can be made by calls that never leave the
// directory they work in: names are single names, and stand in directories of
// the image.
func (b *builder) checkInode(n *Inode) error {
	format := n.Mode & formatMask
	switch {
	case n.Mode > 0o177777 || !slices.Contains([]uint32{formatDir, formatChar, formatBlock, formatFile, formatFifo, formatLink, formatSock}, format):
		return fmt.Errorf("an inode of mode %#o", n.Mode)
	case n.Size > math.MaxInt64 || n.Size != 0 && format != formatFile:
		return fmt.Errorf("an inode of mode %#o and %d bytes", n.Mode, n.Size)
	case n.Rdev != 0 && format != formatChar && format != formatBlock:
		return errors.New("a device number without a device")
	case (format == formatLink) != (n.Target != "") || len(n.Target) >= maxPath:
		return errors.New("a symbolic link without target, or a target without link")
	case (n.Point == "") != (len(n.Names) != 0):
		return errors.New("an inode has either names or a mount point")
	case n.Point != "" && (format != formatDir || n.Point[0] != '/' || len(n.Point) >= maxPath):
		return fmt.Errorf("the mount point %s", quote(n.Point))
	case n.Mnt != 0 && (n.Point == "" || !b.ownTmpfs(n.Mnt)):
		return fmt.Errorf("mount %d is no file system in memory that the container has made", n.Mnt)
	case len(n.Names) > maxLinks || format == formatDir && len(n.Names) > 1:
		return fmt.Errorf("an inode of mode %#o with %d names", n.Mode, len(n.Names))
	}
	return first(b.checkNames(n.Names), checkXattrs(n.Xattrs), b.checkMerged(n))
}

// RootPoint is the Point of the root file system. All of it is never in an image.
const RootPoint = "/"

// checkMerged checks what stays of a directory, and what does not.
func (b *builder) checkMerged(n *Inode) error {
	inMerged := n.Point == RootPoint && n.Mnt == 0
	if len(n.Names) == 1 {
		dir := object[Inode](&b.Head, n.Names[0].Dir)
		inMerged = dir != nil && dir.Merged
	}
	switch {
	case n.Point == RootPoint && n.Mnt == 0 && !n.Merged:
		return errors.New("a whole root file system")
	case n.Point != "" && b.points[fileSystem{n.Point, n.Mnt}]:
		return fmt.Errorf("a second file system at %s", quote(n.Point))
	case n.Merged && (n.Mode&formatMask != formatDir || !inMerged):
		return errors.New("only directories of the root file system are merged with what stands there")
	case len(n.Gone) > 0 && !n.Merged:
		return errors.New("names are gone from what is not merged")
	}
	seen := map[string]bool{}
	for _, name := range n.Gone {
		if !validName(name) || seen[name] {
			return fmt.Errorf("%s is no name in a directory, or is gone from it twice", quote(name))
		}
		seen[name] = true
	}
	return nil
}

// validName reports whether a name is one in a directory, and never leads out.
func validName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.Contains(name, "/") && len(name) <= maxName
}

func (b *builder) ownTmpfs(id int32) bool {
	m := b.Mount(int(id))
	return m != nil && m.Own == MountNew && m.FSType == "tmpfs"
}

func (b *builder) checkNames(names []Name) error {
	seen := map[Name]bool{}
	for _, name := range names {
		dir := object[Inode](&b.Head, name.Dir)
		switch {
		case dir == nil || dir.Mode&formatMask != formatDir:
			return fmt.Errorf("reference %d names no directory before it", name.Dir)
		case !validName(name.Name):
			return fmt.Errorf("%s is no name in a directory", quote(name.Name))
		case b.names[name] || seen[name]:
			return fmt.Errorf("the name %s stands twice in directory #%d", quote(name.Name), name.Dir)
		case b.places[name.Dir].root != b.places[names[0].Dir].root:
			return errors.New("an inode has names in two file systems")
		case b.places[name.Dir].length+1+len(name.Name) >= maxPath:
			return fmt.Errorf("the path of %s is longer than %d bytes", quote(name.Name), maxPath)
		}
		seen[name] = true
	}
	return nil
}

func checkXattrs(all []Xattr) error {
	sum, seen := 0, map[string]bool{}
	for _, x := range all {
		sum += len(x.Name) + len(x.Value)
		if x.Name == "" || len(x.Name) > maxName || seen[x.Name] || sum > 2*maxXattrs {
			return fmt.Errorf("the extended attribute %s is not valid", quote(x.Name))
		}
		seen[x.Name] = true
	}
	return nil
}

// keepInode takes a checked inode into the head.
func (b *builder) keepInode(ref Ref, n *Inode) {
	b.Objects[ref] = n
	p := place{root: ref}
	if len(n.Names) > 0 {
		above := b.places[n.Names[0].Dir]
		p = place{above.root, above.length + 1 + len(n.Names[0].Name)}
	}
	if n.Mode&formatMask == formatDir {
		b.places[ref] = p
	}
	for _, name := range n.Names {
		b.names[name] = true
	}
	for _, name := range n.Gone {
		b.names[Name{ref, name}] = true
	}
	if n.Point != "" {
		b.points[fileSystem{n.Point, n.Mnt}] = true
	}
}
