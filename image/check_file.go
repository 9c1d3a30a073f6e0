package image

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// part is one of the parts a File may carry for its kind.
type part int

const (
	partNone part = iota
	partPipe
	partShmem
	partPty
	partEpoll
	partEventfd
	partTimerfd
	partSignalfd
	partInotify
	partFanotify
	partSocket
	partMqueue
	partTun
)

// kinds gives each kind of open file the part it must carry.
var kinds = map[string]part{
	KindRegular:   partNone,
	KindDirectory: partNone,
	KindDevice:    partNone,
	KindPipe:      partPipe,
	KindFifo:      partPipe,
	KindEpoll:     partEpoll,
	KindEventfd:   partEventfd,
	KindTimerfd:   partTimerfd,
	KindSignalfd:  partSignalfd,
	KindInotify:   partInotify,
	KindFanotify:  partFanotify,
	KindPidfd:     partNone,
	KindNamespace: partNone,
	KindSocket:    partSocket,
	KindProc:      partNone,
	KindStdio:     partNone,
	KindShmem:     partShmem,
	KindPath:      partNone,
	KindPtmx:      partPty,
	KindTTY:       partPty,
	KindMqueue:    partMqueue,
	KindExternal:  partNone,
	KindTun:       partTun,
}

// maxKey bounds the name of an open file that is left out.
const maxKey = 256

func (b *builder) checkFile(f *File) error {
	want, ok := kinds[f.Kind]
	switch {
	case !ok:
		return fmt.Errorf("open file of kind %s is not known to this program", quote(f.Kind))
	case f.onlyPart(want) != nil:
		return f.onlyPart(want)
	case (f.Kind == KindExternal) != (f.Key != "") || len(f.Key) > maxKey || b.keys[f.Key]:
		return fmt.Errorf("an open file of kind %s with the key %s, or with one that stands twice", f.Kind, quote(f.Key))
	case f.Size < 0 || f.Pos < 0:
		return errors.New("its size or position is negative")
	case f.Stdio < 0 || f.Stdio > 2:
		return fmt.Errorf("standard stream %d does not exist", f.Stdio)
	case f.Inside != 0 && !b.isMountNamespace(f.Inside):
		return fmt.Errorf("reference %d names no mount namespace of a task", f.Inside)
	case f.Kind == KindProc && f.Pid < 0:
		return fmt.Errorf("pid %d is negative", f.Pid)
	}
	if o := f.Owner; o != nil && (o.Type < 0 || o.Type > 2 || o.ID < 0 || o.Signal < 0 || o.Signal > 64) {
		return fmt.Errorf("owner %d of type %d with signal %d", o.ID, o.Type, o.Signal)
	}
	if err := first(b.checkRemoved(f), b.checkAbout(f), f.checkReading()); err != nil {
		return err
	}
	switch want {
	case partPipe:
		return need[Pipe](b, f.Pipe, "pipe")
	case partPty:
		return b.checkTTY(f)
	case partMqueue:
		return need[Mqueue](b, f.Pipe, "message queue")
	case partShmem:
		return need[Shmem](b, f.Pipe, "shared memory")
	case partEpoll:
		return b.checkEpoll(f.Epoll)
	case partInotify:
		return b.checkInotify(f.Inotify)
	case partFanotify:
		return b.checkFanotify(f.Fanotify)
	case partSocket:
		return checkSocket(f.Socket)
	}
	return nil
}

// checkAbout checks what a descriptor is about: a task of the tree or one that is
// gone, a namespace of a task.
func (b *builder) checkAbout(f *File) error {
	g := f.Gone
	switch {
	case f.Thread < 0 || f.Thread != 0 && (f.Pid <= 0 || f.Kind != KindPidfd && f.Kind != KindProc):
		return fmt.Errorf("an open file of kind %s about thread %d of task %d", quote(f.Kind), f.Thread, f.Pid)
	case g != nil && (g.Number == 0 || g.Pid < 0 || f.Pid != 0):
		return errors.New("a task that is gone without a number, or one that is there too")
	case f.Kind == KindPidfd && (f.Pid < 0 || f.Pid == 0 && g == nil):
		return errors.New("a pidfd without a task")
	case f.Kind == KindProc && g != nil:
		before, rest, _ := strings.Cut(strings.TrimPrefix(f.Path, "/proc/"), "/")
		if g.Pid == 0 || before != strconv.Itoa(int(g.Pid)) || strings.Contains(rest, "/") || rest == ".." || !strings.HasPrefix(f.Path, "/proc/") {
			return fmt.Errorf("%s is no file of task %d", quote(f.Path), g.Pid)
		}
	case f.Kind == KindNamespace:
		link := f.NamespaceLink()
		if b.NamespaceOf(f) != 0 {
			break
		}
		if f.Pid <= 0 || f.Path != fmt.Sprintf("/proc/%d/ns/%s", f.Pid, link) || !slices.Contains(namespaceTypes, strings.TrimSuffix(link, "_for_children")) {
			return fmt.Errorf("%s is no namespace of task %d", quote(f.Path), f.Pid)
		}
	case g != nil && f.Kind != KindPidfd:
		return fmt.Errorf("an open file of kind %s is about a task that is gone", quote(f.Kind))
	}
	return nil
}

// checkRemoved checks that a file that has lost its name is of the kind that
// was opened.
func (b *builder) checkRemoved(f *File) error {
	if f.Removed == 0 {
		return nil
	}
	inode := b.Removed(f.Removed)
	if inode == nil {
		return fmt.Errorf("reference %d names no file without a name", f.Removed)
	}
	format := inode.Mode & formatMask
	switch {
	case f.Kind == KindRegular && format == formatFile, f.Kind == KindDirectory && format == formatDir, f.Kind == KindFifo && format == formatFifo, f.Kind == KindPath:
		return nil
	}
	return fmt.Errorf("an open file of kind %s with a file of mode %#o", f.Kind, inode.Mode)
}

// checkReading checks what is still to come of a directory. It is compared with
// names that are there, and names nothing by itself.
func (f *File) checkReading() error {
	if f.Reading == nil {
		return nil
	}
	if f.Kind != KindDirectory {
		return fmt.Errorf("an open file of kind %s that has been read like a directory", f.Kind)
	}
	for _, name := range f.Reading.Rest {
		if name == "" || strings.Contains(name, "/") || len(name) > maxName {
			return fmt.Errorf("%s is no name in a directory", quote(name))
		}
	}
	return nil
}

func (b *builder) isMountNamespace(ref Ref) bool {
	n := b.Nested(ref)
	return n != nil && n.Type == "mnt"
}

// onlyPart checks that a file carries the part its kind needs and no other.
func (f *File) onlyPart(want part) error {
	carried := map[part]bool{
		partPipe:     f.Pipe != 0,
		partTun:      f.Tun != nil,
		partEpoll:    f.Epoll != nil,
		partEventfd:  f.Eventfd != nil,
		partTimerfd:  f.Timerfd != nil,
		partSignalfd: f.Signalfd != nil,
		partInotify:  f.Inotify != nil,
		partFanotify: f.Fanotify != nil,
		partSocket:   f.Socket != nil,
	}
	if want == partShmem || want == partPty || want == partMqueue {
		want = partPipe // the same field
	}
	if f.Kind == KindTTY && f.Pid != 0 { // /dev/tty
		want = partNone
	}
	if want != partNone && !carried[want] {
		return fmt.Errorf("an open file of kind %s without the part that describes it", f.Kind)
	}
	for p, is := range carried {
		if is && p != want {
			return fmt.Errorf("an open file of kind %s with a part of another kind", f.Kind)
		}
	}
	return nil
}

// checkEpoll checks the targets of an interest list. They stand before it, so
// epolls that watch epolls cannot form a loop; the kernel forbids one too.
func (b *builder) checkEpoll(e *Epoll) error {
	const params = 8 // sizeof(struct epoll_params)
	if len(e.BusyPoll) != 0 && len(e.BusyPoll) != params {
		return fmt.Errorf("parameters of %d bytes", len(e.BusyPoll))
	}
	for _, entry := range e.Entries {
		if err := need[File](b, entry.File, "open file"); err != nil {
			return fmt.Errorf("epoll entry for fd %d: %w", entry.FD, err)
		}
	}
	return nil
}

// watchMask are the bits of a watch: IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT.
const watchMask = 0xfff | 1<<26 | 1<<31

func (b *builder) checkInotify(n *Inotify) error {
	if n.Next < 0 {
		return fmt.Errorf("the next watch would be %d", n.Next)
	}
	seen := make(map[int32]bool, len(n.Watches))
	for _, w := range n.Watches {
		switch {
		case w.WD <= 0 || seen[w.WD]:
			return fmt.Errorf("watch %d is not positive or stands twice", w.WD)
		case w.Mask&^uint32(watchMask) != 0 || w.Mask == 0:
			return fmt.Errorf("watch %d has the mask %#x", w.WD, w.Mask)
		case (w.Object == 0) != strings.HasPrefix(w.Path, "/"):
			return fmt.Errorf("watch %d has no path and no file, or both", w.WD)
		case w.Object != 0 && b.Removed(w.Object) == nil && b.File(w.Object) == nil:
			return fmt.Errorf("watch %d: reference %d names no file before it", w.WD, w.Object)
		}
		seen[w.WD] = true
	}
	return nil
}

// Bits of fanotify (include/uapi/linux/fanotify.h): how groups are made without
// those that decide on accesses, what marks are on and how they ignore, what they
// are about without permissions.
const (
	fanInit      = 0x3 | 0x70 | 0xff80
	fanMarkFlags = 0x10 | 0x100 | 0x40 | 0x200 | 0x400
	fanEvents    = 0x1fff | 0x8000 | 0x1000000 | 0x2000000 | 0x8000000 | 0x10000000 | 0x40000000
)

func (b *builder) checkFanotify(n *Fanotify) error {
	if n.Flags&^uint32(fanInit) != 0 {
		return fmt.Errorf("a group with the flags %#x", n.Flags)
	}
	for i, m := range n.Marks {
		switch {
		case m.Flags&^uint32(fanMarkFlags) != 0 || (m.Mask|m.Ignored)&^uint64(fanEvents) != 0 || m.Mask|m.Ignored == 0:
			return fmt.Errorf("mark %d has the flags %#x and is about %#x, but for %#x", i, m.Flags, m.Mask, m.Ignored)
		case (m.Object == 0) != strings.HasPrefix(m.Path, "/"):
			return fmt.Errorf("mark %d has no path and no file, or both", i)
		case m.Object != 0 && b.Removed(m.Object) == nil && b.File(m.Object) == nil:
			return fmt.Errorf("mark %d: reference %d names no file before it", i, m.Object)
		}
	}
	return nil
}

func (b *builder) checkFiles(f *Files) error {
	seen := make(map[int32]bool, len(f.Descriptors))
	for _, d := range f.Descriptors {
		if d.FD < 0 || seen[d.FD] {
			return fmt.Errorf("fd %d is negative or stands twice", d.FD)
		}
		seen[d.FD] = true
		if err := need[File](b, d.File, "open file"); err != nil {
			return fmt.Errorf("fd %d: %w", d.FD, err)
		}
	}
	for _, l := range f.Locks {
		if !slices.Contains([]string{LockPosix, LockOFD, LockFlock, LockLease}, l.Kind) {
			return fmt.Errorf("a lock of kind %s is not known to this program", quote(l.Kind))
		}
		if l.Start < 0 || l.End < l.Start || !seen[l.FD] {
			return fmt.Errorf("a lock from %d to %d on fd %d", l.Start, l.End, l.FD)
		}
	}
	return nil
}

func (b *builder) checkFS(f *FS) error {
	if f.Umask > 0o777 {
		return fmt.Errorf("umask %#o", f.Umask)
	}
	for _, ref := range []Ref{f.CwdRemoved, f.RootRemoved} {
		if inode := b.Removed(ref); ref != 0 && (inode == nil || inode.Mode&formatMask != formatDir) {
			return fmt.Errorf("reference %d names no directory", ref)
		}
	}
	return nil
}

func (b *builder) checkRemovedFile(i *Removed) error {
	format := i.Mode & formatMask
	switch {
	case i.Inside != 0 && !b.isMountNamespace(i.Inside):
		return fmt.Errorf("reference %d names no mount namespace of a task", i.Inside)
	case i.Mode&^uint32(formatMask|0o7777) != 0:
		return fmt.Errorf("mode %#o", i.Mode)
	case !slices.Contains([]uint32{formatDir, formatFile, formatLink, formatFifo, formatSock}, format):
		return fmt.Errorf("a file without a name whose mode is %#o is not known to this program", i.Mode)
	case !strings.HasPrefix(i.Path, "/") || path.Clean(i.Path) != i.Path || i.Link != "" && !strings.HasPrefix(i.Link, "/"):
		return fmt.Errorf("path %s is not absolute, or not the shortest", quote(i.Path))
	case i.Path == "/" && !i.Unnamed:
		return errors.New("the root directory has no name to lose")
	case i.Size < 0 || i.Size != 0 && (format != formatFile || i.Link != ""):
		return fmt.Errorf("size %d of a file that has none", i.Size)
	case (i.Unnamed || i.Link != "") && format != formatFile:
		return errors.New("only a regular file can have no or another name")
	case (i.Target != "") != (format == formatLink):
		return errors.New("a symbolic link without a target, or a target of another file")
	}
	return checkXattrs(i.Xattrs)
}

// checkTTY checks one side of a terminal, or /dev/tty of the process Pid.
func (b *builder) checkTTY(f *File) error {
	switch {
	case f.Pid < 0:
		return fmt.Errorf("pid %d is negative", f.Pid)
	case f.Kind == KindTTY && f.Pid != 0:
		return nil
	}
	return need[Pty](b, f.Pipe, "terminal")
}

// maxPty bounds the numbers of terminals: to have one, all below it are made.
const maxPty = 4096 // kernel.pty.max, as it comes

// maxUnread bounds what waits at a side: 4 KiB in the line discipline, 8 and some
// before it (pty_common_install in drivers/tty/pty.c).
const maxUnread = 16 << 10

// unread is how many bytes of a terminal are in the contents.
func (p *Pty) unread() uint64 { return uint64(p.Output) + uint64(p.Input) + uint64(p.Behind) }

func checkPty(p *Pty) error {
	const termios2 = 44 // sizeof(struct termios2)
	switch {
	case p.Index < 0 || p.Index >= maxPty:
		return fmt.Errorf("terminal /dev/pts/%d: its number is not below %d", p.Index, maxPty)
	case p.HungUp != (len(p.Termios) == 0), !p.HungUp && len(p.Termios) != termios2:
		return fmt.Errorf("terminal /dev/pts/%d: settings of %d bytes", p.Index, len(p.Termios))
	case p.Session < 0 || p.Foreground < 0:
		return fmt.Errorf("terminal /dev/pts/%d: session %d or process group %d is negative", p.Index, p.Session, p.Foreground)
	case p.Mode&^0o777 != 0:
		return fmt.Errorf("terminal /dev/pts/%d: mode %#o", p.Index, p.Mode)
	case p.Output > maxUnread || p.Input > maxUnread || p.Behind > maxUnread:
		return fmt.Errorf("terminal /dev/pts/%d: %d, %d and %d bytes wait in it", p.Index, p.Output, p.Input, p.Behind)
	case len(p.Ends) != int(p.Input+7)/8:
		return fmt.Errorf("terminal /dev/pts/%d: %d bytes of marks for %d of input", p.Index, len(p.Ends), p.Input)
	case p.HungUp && p.unread() != 0, p.Console && p.Output+p.Behind != 0:
		return fmt.Errorf("terminal /dev/pts/%d has no side at which anything could wait", p.Index)
	case p.HungUp && (p.Session != 0 || p.Console):
		return fmt.Errorf("terminal /dev/pts/%d is hung up and in use", p.Index)
	}
	return nil
}

func (b *builder) checkPipe(p *Pipe) error {
	if p.Length > p.Capacity {
		return fmt.Errorf("a pipe of %d bytes holds %d", p.Capacity, p.Length)
	}
	if inode := b.Removed(p.Removed); p.Removed != 0 && (inode == nil || inode.Mode&formatMask != formatFifo || p.Path == "") {
		return fmt.Errorf("reference %d names no fifo", p.Removed)
	}
	sum := uint64(0)
	for _, r := range p.Runs {
		if r.Length == 0 || r.Packet && r.Length > PageSize {
			return fmt.Errorf("a packet of %d bytes in a pipe", r.Length)
		}
		sum += uint64(r.Length)
	}
	if len(p.Runs) > 0 && sum != uint64(p.Length) {
		return fmt.Errorf("a pipe with %d bytes has runs of %d", p.Length, sum)
	}
	return nil
}

// contents tells how many raw bytes an object has, and what to call one whose
// bytes are a queue, without holes. Objects of other kinds have none.
func contents(object any) (queue string, size uint64, ok bool) {
	switch o := object.(type) {
	case *Pipe:
		return "pipe", uint64(o.Length), true
	case *Messages:
		return "message queue", o.Bytes(), true
	case *Mqueue:
		return "message queue", o.Bytes(), true
	case *Queue:
		return "queue", o.Bytes(), true
	case *Pty:
		return "terminal", o.unread(), true
	case *File:
		return "connection", o.Socket.queued(), true
	case *Removed:
		return "", uint64(o.Size), true
	case *Inode:
		return "", o.Size, true
	}
	return "", 0, false
}

// bytes checks a TypeBytes record of n raw bytes that begin at offset of the
// object, and takes note of them. An object's bytes ascend; those of a queue,
// which has no holes, follow one another.
func (b *builder) bytes(ref Ref, offset, n uint64) error {
	queue, size, ok := contents(b.Objects[ref])
	if !ok {
		return fmt.Errorf("reference %d names no pipe, terminal or file without a name", ref)
	}
	next := b.progress[ref]
	if queue != "" && offset != next {
		return fmt.Errorf("bytes of %s #%d at %d do not follow those before, which end at %d", queue, ref, offset, next)
	}
	switch {
	case n == 0:
		return errors.New("it has no bytes")
	case offset < next:
		return fmt.Errorf("bytes at %d of object #%d stand twice", offset, ref)
	case offset > size || n > size-offset:
		return fmt.Errorf("%d bytes at %d are outside object #%d of %d bytes", n, offset, ref, size)
	}
	b.progress[ref] = offset + n
	return nil
}
