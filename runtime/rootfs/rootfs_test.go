package rootfs

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
)

func TestOption(t *testing.T) {
	super := `rw,lowerdir=/a:/b,upperdir=/with\054comma\040and\134,workdir=/w`
	if got := option(super, "upperdir"); got != `/with,comma and\` {
		t.Errorf("upperdir is %q", got)
	}
	if got := option(super, "upper"); got != "" {
		t.Errorf("upper is %q", got)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestManifest changes a directory in every way after its manifest was made.
func TestManifest(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	for _, name := range []string{"kept", "dir/kept", "dir/changed", "dir/gone", "old/sub/x", "quiet/deep/x", "odd \n\"\xff"} {
		write(t, filepath.Join(root, name), name)
	}
	var text bytes.Buffer
	if err := WriteManifest(&text, root); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, "manifest")
	write(t, manifest, text.String())
	write(t, filepath.Join(root, "dir/changed"), "CHANGED")
	write(t, filepath.Join(root, "new/x"), "x")
	for _, step := range []error{
		os.Remove(filepath.Join(root, "dir/gone")), os.Remove(filepath.Join(root, "odd \n\"\xff")),
		os.Rename(filepath.Join(root, "old"), filepath.Join(dir, "aside")), os.Mkdir(filepath.Join(root, "old"), 0o755),
		os.Rename(filepath.Join(dir, "aside/sub"), filepath.Join(root, "old/sub")),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	var got []string
	gone := map[string][]string{}
	for _, n := range scan(t, root, manifest) {
		got = append(got, n.path)
		gone[n.path] = n.rec.Gone
	}
	slices.Sort(got)
	if want := []string{".", "dir", "dir/changed", "new", "new/x", "old", "old/sub", "old/sub/x"}; !slices.Equal(got, want) {
		t.Errorf("changed are %q, not %q", got, want)
	}
	if !slices.Equal(gone["."], []string{"odd \n\"\xff"}) || !slices.Equal(gone["dir"], []string{"gone"}) {
		t.Errorf("gone are %q", gone)
	}
	copied := filepath.Join(dir, "copy")
	write(t, filepath.Join(copied, "x"), "x")
	f, err := os.Open(copied)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := open(t, manifest).Select(f); err == nil {
		t.Error("the manifest is taken for that of another directory")
	}
}

func open(t *testing.T, manifest string) Source {
	t.Helper()
	s, err := Open(&image.Mount{FSType: "ext4"}, manifest)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type scanned struct {
	path string
	rec  *image.Inode
}

func scan(t *testing.T, root, manifest string) (all []scanned) {
	t.Helper()
	f, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	part, err := open(t, manifest).Select(f)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := tmpfs.Scan(f, "/", nil, tmpfs.HostIDs{}, part)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var names []string
	tree.Each(func(path string, _ tmpfs.ID, _ bool) { names = append(names, path) })
	for i, o := range tree.Objects() {
		all = append(all, scanned{names[i], o.Record.(*image.Inode)})
	}
	return all
}

func TestNoManifest(t *testing.T) {
	if _, err := Open(&image.Mount{FSType: "ext4"}, ""); err == nil {
		t.Error("a plain directory is taken without a manifest")
	}
	name := filepath.Join(t.TempDir(), "manifest")
	for _, text := range []string{"", "hello\n", manifestHead + "\n1 2 f\n", manifestHead + "\nx 2 f \"a\"\n", manifestHead + "\n1 2 f a\n"} {
		write(t, name, text)
		if _, err := Open(&image.Mount{}, name); err == nil {
			t.Errorf("%q is taken for a manifest", text)
		}
	}
}
