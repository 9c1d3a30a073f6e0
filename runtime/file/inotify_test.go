package file

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
)

func watchFile(t *testing.T, queue *os.File, path string, mask uint32) int32 {
	t.Helper()
	wd, err := unix.InotifyAddWatch(int(queue.Fd()), path, mask)
	must(t, err)
	return int32(wd)
}

func newInotify(t *testing.T) *os.File {
	t.Helper()
	n, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	return owned(t, n, err)
}

// Watches are told by the files that they are on, wherever these are now.
func TestInotify(t *testing.T) {
	dir := t.TempDir()
	old, now, lost := filepath.Join(dir, "old"), filepath.Join(dir, "now"), filepath.Join(dir, "lost")
	must(t, os.WriteFile(old, nil, 0o600))
	queue := newInotify(t)
	removed := openFile(t, lost, unix.O_RDWR|unix.O_CREAT)
	want := []image.Watch{
		{WD: watchFile(t, queue, old, unix.IN_MODIFY|unix.IN_ONESHOT), Mask: unix.IN_MODIFY | unix.IN_ONESHOT, Path: now},
		{WD: watchFile(t, queue, dir, unix.IN_CREATE|unix.IN_ONLYDIR), Mask: unix.IN_CREATE, Path: dir},
		{WD: watchFile(t, queue, lost, unix.IN_ATTRIB), Mask: unix.IN_ATTRIB},
		{WD: watchFile(t, queue, "/sys/kernel", unix.IN_OPEN), Mask: unix.IN_OPEN, Path: "/sys/kernel"}, // found by a walk
	}
	must(t, os.Rename(old, now))
	must(t, os.Remove(lost))
	d := described(t, world(t), queue, removed)
	got := map[int32]image.Watch{}
	for _, w := range d[0].Record.Inotify.Watches {
		got[w.WD] = w
	}
	for _, w := range want {
		if got[w.WD] != w {
			t.Errorf("%+v, want %+v", got[w.WD], w)
		}
	}
	// The removal has been told of (IN_ATTRIB), and nobody has read it.
	if n := d[0].Record.Inotify; !n.Overflow || len(n.Watches) != len(want) || n.Next != want[3].WD+1 {
		t.Errorf("%+v", n)
	}
	if d[0].Complete(); len(d[0].targets) != 0 || d[1].Record.Removed != 0 {
		t.Errorf("the watch on a removed file refers to %v", d[0].targets)
	}
}

// A watch whose file only somebody outside of the container has open leads
// nowhere.
func TestWatchNowhere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	held := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
	defer held.Close()
	queue := newInotify(t)
	watchFile(t, queue, path, unix.IN_MODIFY)
	must(t, os.Remove(path))
	s := world(t)
	one := looked(t, self(), int(queue.Fd()))
	s.all = append(s.all, one)
	s.tables = append(s.tables, &Table{proc: self(), record: &image.Files{}, entries: []entry{{seen: one}}})
	refusal(t, s.Describe(), "watch 1 is on inode")
}

func TestPlaceIn(t *testing.T) {
	for _, bad := range []string{"", "wd:1 ino:x sdev:1 f_handle:00", "ino:1 sdev:1", "ino:1 sdev:1 fhandle-type:1 f_handle:0", "ino:1 fhandle-type:1 f_handle:zz"} {
		if p, err := placeIn(bad); err == nil {
			t.Errorf("%q is %+v", bad, p)
		}
	}
	p, err := placeIn("wd:1 ino:9ad259 sdev:fe00001 mask:fff ignored_mask:0 fhandle-bytes:4 fhandle-type:81 f_handle:01020304\n")
	if want := (place{0xfe00001, 0x9ad259, "\x81\x00\x00\x00\x01\x02\x03\x04"}); err != nil || p != want {
		t.Errorf("%+v, %v; want %+v", p, err, want)
	}
}

// A full queue keeps one event to say so.
func TestFlood(t *testing.T) {
	queue := newInotify(t)
	path := filepath.Join(t.TempDir(), "f")
	watched := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
	watchFile(t, queue, path, unix.IN_MODIFY|unix.IN_ATTRIB)
	waiting, err := flood(queue, watched)
	must(t, err)
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	must(t, err)
	var most int
	_, err = fmt.Sscan(string(limit), &most)
	must(t, err)
	if want := (most + 1) * unix.SizeofInotifyEvent; waiting != want {
		t.Errorf("%d bytes wait, want %d", waiting, want)
	}
}
