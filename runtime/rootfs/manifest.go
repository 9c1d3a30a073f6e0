package rootfs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

// manifest tells changes of a plain directory: of every file in it before the
// container's first start it has the inode number and the time of its last change,
// which no program can set. Text, one file a line:
//
//	INODE CTIME TYPE "PATH"
//
// CTIME in nanoseconds, TYPE d or f, PATH from the directory, quoted as in Go.
type manifest struct {
	name  string
	files map[string]known
	below map[string][]string // names by directory
}

type known struct {
	ino   uint64
	ctime int64
	dir   bool
}

const manifestHead = "ocickpt manifest 1"

// WriteManifest describes a directory tree as it is now, without what is mounted in
// it.
func WriteManifest(w io.Writer, dir string) error {
	root, err := os.Open(dir)
	if err != nil {
		return err
	}
	tree, err := tmpfs.Scan(root, "/", nil, tmpfs.HostIDs{}, nil)
	if err != nil {
		_ = root.Close()
		return err
	}
	defer tree.Close()
	out := bufio.NewWriter(w)
	fmt.Fprintln(out, manifestHead)
	tree.Each(func(name string, id tmpfs.ID, isDir bool) {
		kind := "f"
		if isDir {
			kind = "d"
		}
		fmt.Fprintf(out, "%d %d %s %s\n", id.Ino, id.Ctime, kind, strconv.Quote(name))
	})
	return out.Flush()
}

func readManifest(name string) (Source, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	defer f.Close()
	m := &manifest{name: name, files: map[string]known{}, below: map[string][]string{}}
	lines := bufio.NewScanner(f)
	if !lines.Scan() || lines.Text() != manifestHead {
		return nil, fail.Refuse(name, "it is no manifest", "make one with ocickpt manifest")
	}
	for n := 2; lines.Scan(); n++ {
		if err := m.line(lines.Text()); err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", name, n, err)
		}
	}
	return m, lines.Err()
}

func (m *manifest) line(text string) error {
	f := strings.SplitN(text, " ", 4)
	if len(f) != 4 {
		return fmt.Errorf("%d words instead of 4", len(f))
	}
	ino, err := strconv.ParseUint(f[0], 10, 64)
	if err != nil {
		return err
	}
	ctime, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		return err
	}
	name, err := strconv.Unquote(f[3])
	if err != nil {
		return fmt.Errorf("the path %s: %w", f[3], err)
	}
	m.files[name] = known{ino, ctime, f[2] == "d"}
	if name != "." {
		m.below[path.Dir(name)] = append(m.below[path.Dir(name)], path.Base(name))
	}
	return nil
}

func (m *manifest) Close() error { return nil }

// Select refuses a directory that is not the manifest's.
func (m *manifest) Select(root *os.File) (tmpfs.Selection, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return nil, err
	}
	if m.files["."].ino != st.Ino {
		return nil, fail.Refuse("root file system", "the manifest "+m.name+" was made of another directory", "make one of the directory itself, not of a copy, before the container starts")
	}
	return &comparison{m, map[string]bool{}}, nil
}

// comparison is a scan of the directory that a manifest is about.
type comparison struct {
	*manifest
	whole map[string]bool // directories of which all is new
}

// Directory: one that the manifest has is merged with what stands there; of a new
// one all is new.
func (c *comparison) Directory(name string, id tmpfs.ID) (tmpfs.Part, error) {
	k, ok := c.files[name]
	if !ok || !k.dir || k.ino != id.Ino || c.whole[path.Dir(name)] {
		c.whole[name] = true
		return tmpfs.Part{All: true}, nil
	}
	return tmpfs.Part{All: true, Merged: true, Expected: c.below[name], Passage: k.ctime == id.Ctime}, nil
}

// Entry reports a file that is new, or has changed.
func (c *comparison) Entry(name string, id tmpfs.ID) bool {
	k, ok := c.files[name]
	return !ok || k.dir || k.ino != id.Ino || k.ctime != id.Ctime || c.whole[path.Dir(name)]
}
