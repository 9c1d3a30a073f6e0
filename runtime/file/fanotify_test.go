package file

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

func newFanotify(t *testing.T, flags uint) *os.File {
	t.Helper()
	n, err := unix.FanotifyInit(flags|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY)
	return owned(t, n, err)
}

// Marks are on files, mounts and file systems, and may ignore.
func TestFanotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(path, nil, 0o600))
	group := newFanotify(t, unix.FAN_CLASS_NOTIF)
	mark := func(flags uint, mask uint64, path string) {
		must(t, unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD|flags, mask, unix.AT_FDCWD, path))
	}
	mark(0, unix.FAN_OPEN, path)
	mark(unix.FAN_MARK_IGNORED_MASK|unix.FAN_MARK_IGNORED_SURV_MODIFY, unix.FAN_MODIFY, path)
	mark(unix.FAN_MARK_MOUNT, unix.FAN_CLOSE_WRITE, "/dev/shm")
	mark(unix.FAN_MARK_FILESYSTEM, unix.FAN_MODIFY|unix.FAN_ONDIR, "/dev/shm")
	rec := described(t, world(t), group)[0].Record.Fanotify
	for _, want := range []image.Mark{
		{Mask: unix.FAN_OPEN, Ignored: unix.FAN_MODIFY, Flags: unix.FAN_MARK_IGNORED_SURV_MODIFY, Path: path},
		{Mask: unix.FAN_CLOSE_WRITE, Flags: unix.FAN_MARK_MOUNT, Path: "/dev/shm"},
		{Mask: unix.FAN_MODIFY | unix.FAN_ONDIR, Flags: unix.FAN_MARK_FILESYSTEM, Path: "/dev/shm"},
	} {
		if !slices.Contains(rec.Marks, want) {
			t.Errorf("%+v is not among %+v", want, rec.Marks)
		}
	}
	if rec.Flags != unix.FAN_CLOEXEC|unix.FAN_NONBLOCK || len(rec.Marks) != 3 {
		t.Errorf("%+v", rec)
	}
}

func TestFanotifyRefused(t *testing.T) {
	describe := func(group *os.File) error {
		s := world(t)
		s.all = append(s.all, looked(t, self(), int(group.Fd())))
		return s.Describe()
	}
	refusal(t, describe(newFanotify(t, unix.FAN_CLASS_CONTENT)), "decides on accesses")
	group := newFanotify(t, unix.FAN_CLASS_NOTIF)
	path := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, unix.FanotifyMark(int(group.Fd()), unix.FAN_MARK_ADD, unix.FAN_MODIFY, unix.AT_FDCWD, path))
	must(t, describe(group))
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	refusal(t, describe(group), "wait to be read")
}
