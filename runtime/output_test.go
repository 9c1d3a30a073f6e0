package runtime

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/guardian"
)

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

// An image has its name when it is whole, and leaves nothing behind when it is not.
func TestOutput(t *testing.T) {
	guard, err := guardian.Start()
	must(t, err)
	defer func() { must(t, guard.Dismiss()) }()
	dir := t.TempDir()
	whole, half := filepath.Join(dir, "whole", ImageFile), filepath.Join(dir, "half", ImageFile)
	must(t, os.Mkdir(filepath.Dir(whole), 0o700))
	must(t, os.WriteFile(whole, []byte("before"), 0o600))
	for _, path := range []string{whole, half} {
		out, err := openOutput(path, nil, guard)
		must(t, err)
		_, err = out.Write([]byte("content"))
		must(t, err)
		must(t, out.room(0))
		if path == whole {
			if b, err := os.ReadFile(whole); err != nil || string(b) != "before" {
				t.Errorf("before the commit it is %q, %v", b, err)
			}
			must(t, out.commit(guard))
			must(t, out.sync())
		}
		must(t, out.Close())
	}
	must(t, guard.Rollback())
	st, err := os.Stat(whole)
	must(t, err)
	if b, err := os.ReadFile(whole); err != nil || string(b) != "content" || st.Mode() != 0o600 || names(t, filepath.Dir(whole)) != ImageFile {
		t.Errorf("after the commit: %q, %v, %v, in %s", b, err, st.Mode(), names(t, filepath.Dir(whole)))
	}
	if exists(half) || exists(filepath.Dir(half)) {
		t.Errorf("an image that was not committed leaves %s", names(t, dir))
	}
}

func TestOutputStreams(t *testing.T) {
	var b bytes.Buffer
	out, err := openOutput("", &b, nil)
	must(t, err)
	_, err = out.Write([]byte("x"))
	must(t, err)
	for _, step := range []func() error{func() error { return out.room(1 << 60) }, func() error { return out.commit(nil) }, out.sync, out.Close} {
		must(t, step())
	}
	if b.String() != "x" {
		t.Errorf("%q", b.String())
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	r, err := os.OpenFile(fifo, os.O_RDWR, 0)
	must(t, err)
	defer r.Close()
	out, err = openOutput(fifo, nil, nil) // written as it is
	must(t, err)
	_, err = out.Write([]byte("y"))
	must(t, err)
	must(t, out.commit(nil))
	must(t, out.Close())
	got := make([]byte, 10)
	if n, err := r.Read(got); err != nil || string(got[:n]) != "y" || !exists(fifo) {
		t.Errorf("%q, %v", got[:n], err)
	}
}

// An image that cannot fit is refused before anything is stopped.
func TestOutputRoom(t *testing.T) {
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "tmpfs", 0, "size=32m"))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	f, err := os.Create(filepath.Join(dir, "image"))
	must(t, err)
	defer f.Close()
	out := &output{Writer: f, file: f, path: f.Name()}
	must(t, out.room(8<<20))
	err = out.room(20 << 20)
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "36 MiB") || !strings.Contains(err.Error(), f.Name()) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%v", err)
	}
}

func TestPidFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pid")
	must(t, os.WriteFile(path, []byte("1 was longer"), 0o600))
	must(t, writePidFile(path, 4711))
	if b, err := os.ReadFile(path); err != nil || string(b) != "4711" || names(t, dir) != "pid" {
		t.Errorf("%q, %v, %s", b, err, names(t, dir))
	}
	if err := writePidFile(filepath.Join(dir, "none", "pid"), 1); err == nil {
		t.Error("a pid file without a directory")
	}
}
