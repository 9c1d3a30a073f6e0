package file

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// inotify is a list of watches and a queue of events (inotify(7)).
//
// A watch is on a file, not on a path, and nothing tells the path that it was
// made with: one that leads to the file now is looked for (places.go). Events
// that wait to be read can be put back by nobody. A queue that has some is
// restored with the one that says that some were lost, IN_Q_OVERFLOW, upon which a
// program has to look for itself what has become of its files.
var inotify = kind{
	name: image.KindInotify,
	is:   func(_ *Set, one *seen) bool { return one.link == "anon_inode:inotify" },
	read: func(_ *Set, d *Description) error {
		d.Record.Kind, d.Record.Inotify = image.KindInotify, &image.Inotify{}
		for line := range bytes.Lines(d.seen.info) {
			rest, ok := strings.CutPrefix(string(line), "inotify ")
			if !ok {
				continue
			}
			var w image.Watch
			at, err := placeIn(rest)
			if err != nil {
				return err
			}
			if _, err := fmt.Sscanf(rest, "wd:%x ino:%x sdev:%x mask:%x", &w.WD, new(uint64), new(uint64), &w.Mask); err != nil {
				return fmt.Errorf("fdinfo: %q: %w", rest, err)
			}
			d.Record.Inotify.Watches = append(d.Record.Inotify.Watches, w)
			d.watched = append(d.watched, watched{place: at, what: fmt.Sprintf("its watch %d", w.WD)})
		}
		for i := range d.watched {
			w := &d.Record.Inotify.Watches[i]
			d.watched[i].path, d.watched[i].object = &w.Path, &w.Object
		}
		for _, w := range d.Record.Inotify.Watches {
			// The last number given is told only by watches that are still there.
			d.Record.Inotify.Next = max(d.Record.Inotify.Next, w.WD+1)
		}
		f, err := d.seen.own()
		if err != nil {
			return err
		}
		defer f.Close()
		waiting, err := unix.IoctlGetInt(int(f.Fd()), unix.TIOCINQ)
		d.Record.Inotify.Overflow = waiting > 0
		return err
	},
	open: func(_ *Maker, b *tracee.Batch, _ *image.File) (int, error) {
		return b.Add(unix.SYS_INOTIFY_INIT1, tracee.W(unix.IN_CLOEXEC)), nil
	},
	finish: func(_ *Maker, b *tracee.Batch, fd int, f *image.File) { setFlags(b, fd, f.Flags) },
}

// atOnce is how many files are open for a moment while they are given watches.
const atOnce = spareNumbers / 2

// inotifySetNextWD is INOTIFY_IOC_SETNEXTWD (include/uapi/linux/inotify.h): which
// number the next watch gets.
const inotifySetNextWD = 0x40044900

// Watch gives inotify and fanotify what they watch and lets them know of lost
// events. It comes when nothing is done to files any more, so that no event tells
// of the restore.
func (m *Maker) Watch() error {
	for _, ref := range Refs(m.head) {
		f := m.head.File(ref)
		var err error
		switch {
		case f == nil:
		case f.Inotify != nil:
			err = m.watch(ref, f)
		case f.Fanotify != nil:
			err = m.mark(ref, f)
		}
		if err != nil {
			return fail.On(f.Kind, err)
		}
	}
	return nil
}

// watch gives inotify its watches.
func (m *Maker) watch(ref image.Ref, f *image.File) error {
	if f.Inotify.Overflow {
		if err := m.overflow(m.fds[ref]); err != nil {
			return err
		}
	}
	for some := range slices.Chunk(f.Inotify.Watches, atOnce) {
		err := m.addWatches(m.identityOf(f.Opener), m.fds[ref], some)
		if denied(err) {
			err = m.addWatches(m.bundle, m.fds[ref], some)
		}
		if err != nil {
			return err
		}
	}
	if f.Inotify.Next == 0 {
		return nil
	}
	var b tracee.Batch
	b.Add(unix.SYS_IOCTL, tracee.W(m.fds[ref]), tracee.W(inotifySetNextWD), tracee.W(f.Inotify.Next))
	_, err := m.stub.Run(&b)
	return err
}

// addWatches adds some watches as somebody who may read the files. Adding one
// once more changes nothing.
func (m *Maker) addWatches(who Identity, fd int, some []image.Watch) error {
	return m.onFiles(who, len(some),
		func(i int) (string, image.Ref) { return some[i].Path, some[i].Object },
		func(b *tracee.Batch, i int, path string) int {
			b.Add(unix.SYS_IOCTL, tracee.W(fd), tracee.W(inotifySetNextWD), tracee.W(some[i].WD))
			return b.Try(unix.SYS_INOTIFY_ADD_WATCH, tracee.W(fd), b.String(path), tracee.W(some[i].Mask))
		},
		func(i int, got int64) error {
			if got != int64(some[i].WD) {
				return fmt.Errorf("the watch on %s has the number %d instead of %d: two of them are on one file by now", some[i].Path, got, some[i].WD)
			}
			return nil
		})
}

func watchError(path string, err error) error {
	e := &fail.Error{Cause: fmt.Errorf("%s cannot be watched again: %w", path, err)}
	if errors.Is(err, unix.ENOSPC) {
		e.Remedy = "raise fs.inotify.max_user_watches or fs.fanotify.max_user_marks"
	}
	return e
}

// onFiles makes, as somebody, a call on each of some files that are watched: at
// tells where one is, add adds the call on a path that leads to it for the moment,
// and check looks at what it returned.
func (m *Maker) onFiles(who Identity, n int, at func(i int) (string, image.Ref), add func(b *tracee.Batch, i int, path string) int, check func(i int, got int64) error) error {
	opened, err := m.openWatched(who, n, at)
	defer m.closeAll(opened)
	if err != nil {
		return err
	}
	var b tracee.Batch
	m.become(&b, who)
	calls := make([]int, n)
	for i := range n {
		fd, ok := opened[i], true
		if _, object := at(i); object != 0 {
			fd, ok = m.number(object)
		}
		if !ok {
			return errors.New("a file that it watches is not open")
		}
		calls[i] = add(&b, i, fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	m.become(&b, m.self)
	if _, err := m.stub.Run(&b); err != nil {
		return errors.Join(err, m.restoreSelf())
	}
	for i, call := range calls {
		path, _ := at(i)
		if err := b.Err(call); err != nil {
			return watchError(path, err)
		}
		if err := check(i, b.Calls[call].Ret); err != nil {
			return err
		}
	}
	return nil
}

// openWatched opens files as somebody, those that have paths.
func (m *Maker) openWatched(who Identity, n int, at func(i int) (string, image.Ref)) ([]int, error) {
	opened, calls := make([]int, n), make([]int, n)
	var b tracee.Batch
	m.become(&b, who)
	for i := range n {
		opened[i], calls[i] = -1, -1
		if path, object := at(i); object == 0 {
			calls[i] = openPath(&b, path, unix.O_PATH|unix.O_NOFOLLOW)
			b.Calls[calls[i]].Tolerate = true
		}
	}
	m.become(&b, m.self)
	if _, err := m.stub.Run(&b); err != nil {
		return nil, errors.Join(err, m.restoreSelf())
	}
	var first error
	for i, call := range calls {
		if call < 0 {
			continue
		}
		if err := b.Err(call); err != nil {
			path, _ := at(i)
			first = errors.Join(first, watchError(path, err))
			continue
		}
		opened[i] = int(b.Calls[call].Ret)
	}
	return opened, first
}

func (m *Maker) closeAll(fds []int) {
	var b tracee.Batch
	for _, fd := range fds {
		if fd >= 0 {
			b.Try(unix.SYS_CLOSE, tracee.W(fd))
		}
	}
	_, _ = m.stub.Run(&b) // a stub that is gone is told of by whoever needs it next
}

// number is the one under which the maker holds an object.
func (m *Maker) number(ref image.Ref) (int, bool) {
	for _, numbers := range []map[image.Ref]int{m.fds, m.anchors, m.segments} {
		if fd, ok := numbers[ref]; ok {
			return fd, true
		}
	}
	return 0, false
}

// overflow makes the kernel put the event into a queue that says that some were
// lost: it does so when the queue is full (fsnotify_insert_event in
// fs/notify/notification.c). Events of a file of our own fill it, and are read
// from it again; that one stays, being the last.
func (m *Maker) overflow(fd int) error {
	queue, err := m.stub.Take(fd)
	if err != nil {
		return err
	}
	defer queue.Close()
	n, err := unix.MemfdCreate("ocickpt-watched", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	defer unix.Close(n)
	path := fmt.Sprintf("/proc/self/fd/%d", n)
	watched, err := os.OpenFile(path, os.O_WRONLY, 0) // nobody is told of what memfd_create has opened
	if err != nil {
		return err
	}
	defer watched.Close()
	wd, err := unix.InotifyAddWatch(int(queue.Fd()), path, unix.IN_MODIFY|unix.IN_ATTRIB)
	if err != nil {
		return fmt.Errorf("inotify_add_watch: %w", err)
	}
	waiting, err := flood(queue, watched)
	if err != nil {
		return err
	}
	// Who removes a watch is told so, if there is room.
	if _, err := unix.InotifyRmWatch(int(queue.Fd()), uint32(wd)); err != nil {
		return fmt.Errorf("inotify_rm_watch: %w", err)
	}
	buf := make([]byte, 64<<10)
	for waiting -= unix.SizeofInotifyEvent; waiting > 0; {
		n, err := unix.Read(int(queue.Fd()), buf[:min(waiting, len(buf))])
		if err != nil {
			return fmt.Errorf("read inotify: %w", err)
		}
		waiting -= n
	}
	return nil
}

// flood makes events of a file until a queue takes no more, and returns how many
// bytes wait in it.
func flood(queue, watched *os.File) (waiting int, err error) {
	const some = 256 // between two looks
	for {
		for range some { // two of the same kind one after the other would become one
			if _, err := unix.Pwrite(int(watched.Fd()), []byte{0}, 0); err != nil {
				return 0, fmt.Errorf("write: %w", err)
			}
			if err := unix.Fchmod(int(watched.Fd()), 0o600); err != nil {
				return 0, fmt.Errorf("fchmod: %w", err)
			}
		}
		now, err := unix.IoctlGetInt(int(queue.Fd()), unix.TIOCINQ)
		if err != nil || now == waiting {
			return now, err
		}
		waiting = now
	}
}
