// Package aside lets a restore change a directory tree that outlives it, so that
// all of it can be put back. What is in the way is not removed but moved into a
// directory of the same file system, and what is to be done is written down
// before the first act. Putting back looks at what is there, not at how far the
// acts have come: it can be done before them, between them, after them and twice.
package aside

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
)

// prefix begins the name of the directory that takes what is in the way. It
// stands in the root of the tree.
const prefix = ".ocickpt-aside-"

// journals is where the plans are, which say what to do with the rights of root:
// nobody else can get at them.
const journals = "/run/ocickpt"

// Area is the place for what is in the way in one tree.
type Area struct {
	Root    string // path of the tree
	Dir     string // of the directory aside, from there
	Journal string
	root    *os.File
	steps   []step
	moved   int
	here    map[string]bool // paths of which something has been planned
}

// step is how one path is put back. Paths are bytes: names need not be UTF-8.
type step struct {
	Path  []byte
	Moved int         `json:",omitempty"` // it was moved to this number
	Was   *attributes `json:",omitempty"` // it was a directory, or stays what it is, with these
}

// Plan prepares to change the tree at root, which must be the directory inside
// that others have as their root. It refuses where somebody else does.
func Plan(root string, inside *os.File) (*Area, error) {
	dir, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	a := &Area{Root: root, root: dir, here: map[string]bool{}}
	if err := a.check(inside); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	id := strconv.FormatUint(uint64(os.Getpid()), 36) + strconv.FormatInt(now(), 36)
	a.Dir, a.Journal = prefix+id, filepath.Join(journals, "aside-"+id)
	return a, nil
}

func (a *Area) check(inside *os.File) error {
	var ours, theirs unix.Stat_t
	if err := errors.Join(unix.Fstat(int(a.root.Fd()), &ours), unix.Fstat(int(inside.Fd()), &theirs)); err != nil {
		return err
	}
	if ours.Dev != theirs.Dev || ours.Ino != theirs.Ino {
		return fail.Refuse("", "the container's root is not the directory that the bundle names", "")
	}
	names, err := a.root.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if strings.HasPrefix(name, prefix) {
			return fail.Refuse("", fmt.Sprintf("/%s is in it: another restore is changing it, or was killed together with its guardian and has left in there what stood in its way", name),
				"wait, or restore into a fresh root")
		}
	}
	return nil
}

// Move plans to move what has this path aside, and returns the path it gets.
func (a *Area) Move(name string) string {
	a.moved++
	a.steps, a.here[name] = append(a.steps, step{Path: []byte(name), Moved: a.moved}), true
	return path.Join(a.Dir, strconv.Itoa(a.moved))
}

// Make plans to make something where nothing is, or what is there is moved aside.
func (a *Area) Make(name string) {
	if !a.here[name] {
		a.steps = append(a.steps, step{Path: []byte(name)})
	}
}

// Change plans to change what has this path, or to remove it if it is a directory,
// and notes what it is like.
func (a *Area) Change(name string) error {
	fd, err := a.open(name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	was, err := readAttributes(fd)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	a.steps, a.here[name] = append(a.steps, step{Path: []byte(name), Was: was}), true
	return nil
}

// Begin writes the plan down and makes the directory aside, for somebody. The
// caller has promised PutBack before.
func (a *Area) Begin(uid, gid int) error {
	if err := os.MkdirAll(journals, 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(a.steps)
	if err != nil {
		return err
	}
	// Not there before it is whole: one that is not there means that all is well.
	if err := os.WriteFile(a.Journal+".new", text, 0o600); err != nil {
		return errors.Join(err, os.Remove(a.Journal+".new"))
	}
	if err := os.Rename(a.Journal+".new", a.Journal); err != nil {
		return err
	}
	if err := unix.Mkdirat(int(a.root.Fd()), a.Dir, 0o700); err != nil {
		return fmt.Errorf("make /%s: %w", a.Dir, err)
	}
	return unix.Fchownat(int(a.root.Fd()), a.Dir, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
}

// Keep makes the changes last: from the moment that the journal is gone nothing
// is put back, and what was moved aside is for nobody any more.
func (a *Area) Keep() error {
	if err := os.Remove(a.Journal); err != nil {
		return err
	}
	return PutBack(a.Root, a.Dir, a.Journal)
}

// Close releases the root.
func (a *Area) Close() error { return a.root.Close() }

// open opens a path of the tree; nothing on the way may lead out of it.
func (a *Area) open(name string) (int, error) { return openBeneath(a.root, name, unix.O_PATH) }

func openBeneath(root *os.File, name string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(int(root.Fd()), name, &how)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", name, err)
	}
	return fd, nil
}

// PutBack makes a tree what it was before, as the journal says, and removes the
// directory aside. Without a journal there is nothing to put back.
func PutBack(root, dir, journal string) error {
	tree, err := os.Open(root)
	if err != nil {
		return err
	}
	defer tree.Close()
	text, err := os.ReadFile(journal)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var steps []step
	if err == nil {
		if err := json.Unmarshal(text, &steps); err != nil {
			return fmt.Errorf("%s: %w", journal, err)
		}
	}
	var errs []error
	for _, s := range slices.Backward(steps) {
		if err := s.undo(tree, dir); err != nil {
			errs = append(errs, fmt.Errorf("/%s: %w", s.Path, err))
		}
	}
	// Times of directories change until the last thing is back in them.
	for _, s := range slices.Backward(steps) {
		if s.Was != nil {
			errs = append(errs, s.attributes(tree))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s cannot be put back (what stood there is in %s, and %s tells what was where): %w", root, dir, journal, err)
	}
	if err := removeAll(tree, dir); err != nil {
		return err
	}
	if err := os.Remove(journal); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// undo puts one path back.
func (s *step) undo(tree *os.File, dir string) error {
	name := string(s.Path)
	parent, err := openBeneath(tree, path.Dir(name), unix.O_PATH|unix.O_DIRECTORY)
	notMade := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
	if notMade && s.Moved == 0 && s.Was == nil {
		return nil // nor was its directory
	}
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	base := path.Base(name)
	switch {
	case s.Moved != 0:
		old := path.Join(dir, strconv.Itoa(s.Moved))
		var st unix.Stat_t
		if err := unix.Fstatat(int(tree.Fd()), old, &st, unix.AT_SYMLINK_NOFOLLOW); errors.Is(err, unix.ENOENT) {
			return nil // it is still there, or there again
		}
		if err := removeAt(parent, base); err != nil {
			return err
		}
		return unix.Renameat(int(tree.Fd()), old, parent, base)
	case s.Was == nil:
		return removeAt(parent, base)
	case s.Was.Mode&unix.S_IFMT != unix.S_IFDIR || name == ".":
		return nil
	}
	var st unix.Stat_t
	err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return nil
	}
	if err := removeAt(parent, base); err != nil {
		return err
	}
	return unix.Mkdirat(parent, base, 0o700)
}

// attributes gives what was changed its owner, mode and times again.
func (s *step) attributes(tree *os.File) error {
	fd, err := openBeneath(tree, string(s.Path), unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return s.Was.restore(fd)
}

// removeAll removes an entry of the tree's root with all that is in it.
func removeAll(tree *os.File, name string) error { return removeAt(int(tree.Fd()), name) }

// removeAt removes an entry of a directory with all that is in it.
func removeAt(dir int, name string) error {
	return os.RemoveAll(fmt.Sprintf("/proc/self/fd/%d/%s", dir, name))
}
