package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests must run as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func self() *Process { return &Process{Pid: os.Getpid(), Inner: 1, Name: "test"} }

// owned makes an *os.File of the result of a system call.
func owned(t *testing.T, fd int, err error) *os.File {
	t.Helper()
	must(t, err)
	f := os.NewFile(uintptr(fd), "test")
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func openFile(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	return owned(t, fd, err)
}

func pipes(t *testing.T, flags int) (r, w *os.File) {
	t.Helper()
	var p [2]int
	err := unix.Pipe2(p[:], flags|unix.O_CLOEXEC)
	return owned(t, p[0], err), owned(t, p[1], err)
}

func dup(t *testing.T, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD, 0)
	return owned(t, fd, err)
}

func looked(t *testing.T, p *Process, fd int) *seen {
	t.Helper()
	one, err := look(p, fd)
	must(t, err)
	return one
}

// world is a set whose container has the test's own root and mounts.
func world(t *testing.T) *Set {
	t.Helper()
	root, err := os.Open("/")
	must(t, err)
	t.Cleanup(func() { _ = root.Close() })
	s := NewSet(Env{Root: root, Init: self(), Shared: mm.NewShared()})
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		m := image.Mount{Point: f[4], FSType: f[slices.Index(f, "-")+1]}
		_, err := fmt.Sscan(f[0], &m.ID)
		must(t, err)
		s.Mounts = append(s.Mounts, m)
	}
	return s
}

// described reads the state of some descriptors of the test itself.
func described(t *testing.T, s *Set, files ...*os.File) []*Description {
	t.Helper()
	table := &Table{proc: self(), record: &image.Files{}}
	for _, f := range files {
		one := looked(t, self(), int(f.Fd()))
		s.all = append(s.all, one)
		table.entries = append(table.entries, entry{seen: one})
	}
	s.tables = append(s.tables, table)
	must(t, s.Describe())
	out := make([]*Description, len(files))
	for i, e := range table.entries {
		out[i] = e.desc
	}
	return out
}

func refusal(t *testing.T, err error, why string) {
	t.Helper()
	var r *fail.Refused
	if !errors.As(err, &r) || !strings.Contains(err.Error(), why) {
		t.Errorf("%v, want a refusal that says %q", err, why)
	}
}

func TestGroup(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(path, []byte("0123456789"), 0o600))
	a, b, c := openFile(t, path, unix.O_RDWR), openFile(t, path, unix.O_RDWR), openFile(t, path, unix.O_RDONLY)
	r, w := pipes(t, 0)
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	e := owned(t, event, err)
	other, err := unix.Eventfd(0, unix.EFD_CLOEXEC) // all anonymous inodes are one
	e2 := owned(t, other, err)
	child := exec.Command("sleep", "1000")
	child.ExtraFiles = []*os.File{a, w, e2} // 3, 4, 5
	must(t, child.Start())
	t.Cleanup(func() { _ = child.Process.Kill(); _ = child.Wait() })
	a2 := dup(t, a)
	_, err = a2.Seek(4, 0)
	must(t, err)
	theirs := &Process{Pid: child.Process.Pid, Inner: 2}
	want := map[string]int{} // by name: which description
	var all []*seen
	for _, x := range []struct {
		p    *Process
		fd   int
		desc int
	}{
		{self(), int(a.Fd()), 1}, {self(), int(a2.Fd()), 1}, {theirs, 3, 1}, {self(), int(b.Fd()), 2}, {self(), int(c.Fd()), 3},
		{self(), int(r.Fd()), 4}, {self(), int(w.Fd()), 5}, {theirs, 4, 5}, {self(), int(e.Fd()), 6}, {self(), int(e2.Fd()), 7}, {theirs, 5, 7},
	} {
		one := looked(t, x.p, x.fd)
		all = append(all, one)
		want[one.path()] = x.desc
	}
	groups, err := group(all)
	must(t, err)
	if len(groups) != 7 {
		t.Errorf("%d descriptions, want 7", len(groups))
	}
	for _, g := range groups {
		for _, one := range g {
			if want[one.path()] != want[g[0].path()] {
				t.Errorf("%s and %s are not one description", one.path(), g[0].path())
			}
		}
	}
	if one := looked(t, self(), int(a.Fd())); one.pos != 4 || one.flags&unix.O_ACCMODE != unix.O_RDWR || one.flags&unix.O_CLOEXEC == 0 || one.link != path {
		t.Errorf("%+v", one)
	}
}

func TestStdioNumber(t *testing.T) {
	r, w := pipes(t, 0)
	own, own2 := pipes(t, 0)
	link := func(f *os.File) string { return looked(t, self(), int(f.Fd())).link }
	init := exec.Command("sleep", "1000")
	init.Stdin, init.Stdout = r, w // and standard error is /dev/null
	must(t, init.Start())
	t.Cleanup(func() { _ = init.Process.Kill(); _ = init.Wait() })
	s := world(t)
	s.Init = &Process{Pid: init.Process.Pid, Inner: 1}
	s.Stdio = []string{link(r), link(w), "/dev/null"}
	reopened := func(f *os.File, flags int) *os.File {
		return openFile(t, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags)
	}
	for name, c := range map[string]struct {
		f    *seen
		want int
	}{
		"init's input":             {looked(t, s.Init, 0), 0},
		"init's output":            {looked(t, s.Init, 1), 1},
		"init's error":             {looked(t, s.Init, 2), 2},
		"another's copy of output": {looked(t, self(), int(dup(t, w).Fd())), 1},
		"output, opened again":     {looked(t, self(), int(reopened(w, unix.O_WRONLY).Fd())), 1},
		"input, opened again":      {looked(t, self(), int(reopened(r, unix.O_RDONLY|unix.O_NONBLOCK).Fd())), 0},
		"a pipe of the container":  {looked(t, self(), int(own.Fd())), -1},
		"its other end":            {looked(t, self(), int(own2.Fd())), -1},
		"the container's own null": {looked(t, self(), int(openFile(t, "/dev/null", unix.O_WRONLY).Fd())), -1},
	} {
		if got := s.stdioNumber(c.f); got != c.want {
			t.Errorf("%s is %d, want %d", name, got, c.want)
		}
	}
}

func TestResolves(t *testing.T) {
	dir := t.TempDir()
	s := world(t)
	stat := func(path string) *unix.Stat_t {
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		return &st
	}
	path, other := filepath.Join(dir, "f"), filepath.Join(dir, "g")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.WriteFile(other, nil, 0o600))
	st := stat(path)
	must(t, s.resolves(path, st))
	refusal(t, s.resolves(path+deletedSuffix, st), "was deleted")
	refusal(t, s.resolves(filepath.Join(dir, "none"), st), "cannot be reached")
	must(t, os.Rename(other, path))
	refusal(t, s.resolves(path, st), "another file has taken its name")
	must(t, os.Remove(path))
	must(t, os.Symlink("h", path)) // a link in its place is not the file
	must(t, os.WriteFile(filepath.Join(dir, "h"), nil, 0o600))
	refusal(t, s.resolves(path, stat(filepath.Join(dir, "h"))), "another file has taken its name")
}

// A path never leads out of the container's root, whatever the container puts
// in its way.
func TestInRoot(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "etc"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("container's"), 0o600))
	must(t, os.Symlink("/etc", filepath.Join(dir, "absolute")))
	must(t, os.Symlink("../../../../etc", filepath.Join(dir, "relative")))
	root, err := os.Open(dir)
	must(t, err)
	defer root.Close()
	s := NewSet(Env{Root: root})
	var want unix.Stat_t
	must(t, unix.Stat(filepath.Join(dir, "etc/passwd"), &want))
	for _, path := range []string{"/etc/passwd", "/../../etc/passwd", "/absolute/passwd", "/relative/passwd"} {
		if got, err := s.lstat(path); err != nil || got.Ino != want.Ino || got.Dev != want.Dev {
			t.Errorf("%s leads to inode %d, %v; want %d", path, got.Ino, err, want.Ino)
		}
	}
}

func TestPidInPath(t *testing.T) {
	mounts := []image.Mount{{ID: 5, Point: "/proc"}, {ID: 6, Point: "/"}, {ID: 7, Point: "/a/proc/"}}
	for _, c := range []struct {
		path string
		mnt  int
		want int32
	}{
		{"/proc/7/status", 5, 7}, {"/proc/12", 5, 12}, {"/proc/meminfo", 5, 0}, {"/proc/self/status", 5, 0}, {"/proc/7a/x", 5, 0},
		{"/7/status", 6, 7}, {"/a/proc/3/fd", 7, 3}, {"/proc/7/status", 7, 0}, {"/proc/7/status", 99, 0}, {"/proc", 5, 0}, {"/procs/7", 5, 0}, {"/proc/99999999999", 5, 0},
	} {
		if got := pidInPath(c.path, mounts, c.mnt); got != c.want {
			t.Errorf("%s on mount %d is of %d, want %d", c.path, c.mnt, got, c.want)
		}
	}
}

func TestUnsupportedDevice(t *testing.T) {
	for dev, why := range map[[2]uint32]string{
		{1, 3}: "", {1, 5}: "", {1, 7}: "", {1, 8}: "", {1, 9}: "", {1, 1}: "driver", {10, 200}: "driver",
		{5, 0}: "terminals", {5, 2}: "terminals", {136, 3}: "terminals", {143, 0}: "terminals", {4, 1}: "terminals", {135, 0}: "driver", {144, 0}: "driver",
	} {
		if got := unsupportedDevice(unix.Mkdev(dev[0], dev[1])); (got == "") != (why == "") || !strings.Contains(got, why) {
			t.Errorf("device %v: %q, want %q", dev, got, why)
		}
	}
}

func TestAnonymous(t *testing.T) {
	s := world(t)
	n, err := unix.Eventfd(0x1234, unix.EFD_SEMAPHORE)
	event := owned(t, n, err)
	_, err = unix.Write(n, binary.LittleEndian.AppendUint64(nil, 1<<40))
	must(t, err)
	n, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK)
	timer := owned(t, n, err)
	must(t, unix.TimerfdSettime(n, 0, &unix.ItimerSpec{Interval: unix.Timespec{Sec: 1000, Nsec: 3}, Value: unix.Timespec{Sec: 2000}}, nil))
	n, err = unix.TimerfdCreate(unix.CLOCK_REALTIME, 0)
	wall := owned(t, n, err)
	must(t, unix.TimerfdSettime(n, unix.TFD_TIMER_ABSTIME, &unix.ItimerSpec{Value: unix.Timespec{Sec: time.Now().Unix() + 500}}, nil))
	n, err = unix.Signalfd(-1, &unix.Sigset_t{Val: [16]uint64{1<<(unix.SIGHUP-1) | 1<<(unix.SIGUSR1-1)}}, 0)
	signal := owned(t, n, err)
	d := described(t, s, event, timer, wall, signal)
	if e := d[0].Record; e.Kind != image.KindEventfd || *e.Eventfd != (image.Eventfd{Count: 0x1234 + 1<<40, Semaphore: true}) {
		t.Errorf("%+v", e.Eventfd)
	}
	if f := d[1].Record; f.Kind != image.KindTimerfd || f.Flags&unix.O_NONBLOCK == 0 || f.Timerfd.Clock != unix.CLOCK_MONOTONIC || f.Timerfd.Ticks != 0 ||
		f.Timerfd.Interval != 1000*1e9+3 || f.Timerfd.Left < 1900*1e9 || f.Timerfd.Flags != 0 {
		t.Errorf("%+v", f.Timerfd)
	}
	if f := d[2].Record.Timerfd; f.Clock != unix.CLOCK_REALTIME || f.Flags != unix.TFD_TIMER_ABSTIME || f.Left > 500*1e9 || f.Left < 400*1e9 || f.Interval != 0 || f.Ticks != 0 {
		t.Errorf("%+v", f)
	}
	if f := d[3].Record; f.Kind != image.KindSignalfd || f.Signalfd.Mask != 1<<(unix.SIGHUP-1)|1<<(unix.SIGUSR1-1) {
		t.Errorf("%+v", f.Signalfd)
	}
}

// A periodic timer that has expired stands still in the kernel until it is read
// or asked for (fs/timerfd.c); it is armed all the same.
func TestExpiredTimerfd(t *testing.T) {
	n, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0)
	timer := owned(t, n, err)
	must(t, unix.TimerfdSettime(n, 0, &unix.ItimerSpec{Interval: unix.Timespec{Sec: 1000}, Value: unix.Timespec{Nsec: 1}}, nil))
	time.Sleep(time.Millisecond)
	f := described(t, world(t), timer)[0].Record.Timerfd
	if f.Ticks != 1 || f.Interval != 1000*1e9 || f.Left < 900*1e9 || f.Left > 1000*1e9 {
		t.Errorf("%+v: want one tick, and nearly 1000 s left", f)
	}
}

func TestEpoll(t *testing.T) {
	s := world(t)
	r, w := pipes(t, 0)
	closed := dup(t, r) // registered, then closed: the entry stays
	n, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	ep := owned(t, n, err)
	const data = 0x1122334455667788
	add := func(f *os.File, events uint32) {
		ev := unix.EpollEvent{Events: events}
		*(*uint64)(unsafe.Pointer(&ev.Fd)) = data
		must(t, unix.EpollCtl(n, unix.EPOLL_CTL_ADD, int(f.Fd()), &ev))
	}
	add(r, unix.EPOLLIN)
	add(w, unix.EPOLLOUT|unix.EPOLLET|unix.EPOLLONESHOT)
	add(closed, unix.EPOLLIN|unix.EPOLLRDHUP)
	gone := int32(closed.Fd())
	must(t, closed.Close())
	d := described(t, s, ep, r, w)
	rec := d[0].Record.Epoll
	if len(rec.Entries) != 3 {
		t.Fatalf("%+v", rec)
	}
	for i, e := range rec.Entries {
		target, events := d[1], uint32(unix.EPOLLIN)
		switch e.FD {
		case int32(w.Fd()):
			target, events = d[2], unix.EPOLLOUT|unix.EPOLLET|unix.EPOLLONESHOT
		case gone:
			events |= unix.EPOLLRDHUP
		}
		if d[0].targets[i] != target || e.Data != data || e.Events&^(unix.EPOLLERR|unix.EPOLLHUP) != events {
			t.Errorf("entry %+v watches %s", e, d[0].targets[i].seen.link)
		}
	}
	place := map[any]int{}
	for i, o := range s.Objects() {
		place[o] = i + 1
	}
	if ep := place[&d[0].Object]; ep < place[&d[1].Object] || ep < place[&d[2].Object] || ep > place[&s.tables[0].Object] || place[&s.order[0].Object] != 1 {
		t.Errorf("objects stand at %v", place)
	}
}

func TestPipePeek(t *testing.T) {
	s := world(t)
	r, w := pipes(t, 0)
	_, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<16)
	must(t, err)
	var want []byte
	for i := range 40 { // buffers of many sizes
		part := []byte(strings.Repeat(string(rune('a'+i%26)), 1+i*29))
		_, err := w.Write(part)
		must(t, err)
		want = append(want, part...)
	}
	d := described(t, s, r, w)
	p := d[0].pipe
	if p != d[1].pipe || int(p.record.Length) != len(want) || p.record.Capacity != 1<<16 || d[0].Record.Kind != image.KindPipe {
		t.Fatalf("%+v, %d bytes written", p.record, len(want))
	}
	for range 2 {
		if got, err := p.content(); err != nil || string(got) != string(want) {
			t.Errorf("peeked at %d bytes, %v; want %d", len(got), err, len(want))
		}
	}
	p.ends = p.ends[1:] // only the writer is known: read through its link
	if got, err := p.content(); err != nil || string(got) != string(want) {
		t.Errorf("through the writer: %d bytes, %v", len(got), err)
	}
	left := make([]byte, 2*len(want))
	if n, err := r.Read(left); err != nil || string(left[:n]) != string(want) {
		t.Errorf("%d bytes left, %v; want %d", n, err, len(want))
	}
}

func TestPipeRefused(t *testing.T) {
	describe := func(files ...*os.File) error {
		s := world(t)
		for _, f := range files {
			s.all = append(s.all, looked(t, self(), int(f.Fd())))
		}
		return s.Describe()
	}
	r, w := pipes(t, 0)
	refusal(t, describe(r), "held outside the container")
	refusal(t, describe(w), "held outside the container")
	must(t, describe(r, w))
	must(t, w.Close())
	must(t, describe(r)) // nobody will ever write to it
}

// Packets are told from what was written as a stream, whatever flags the ends have
// by now.
func TestPackets(t *testing.T) {
	r, w := pipes(t, 0)
	direct := func(flags int) {
		_, err := unix.FcntlInt(w.Fd(), unix.F_SETFL, flags)
		must(t, err)
	}
	page := strings.Repeat("p", 4096)
	var want []image.PipeRun
	for _, part := range []struct {
		text   string
		packet bool
	}{{page, false}, {"one", true}, {"x", true}, {"stream", false}} {
		direct(0)
		if part.packet {
			direct(unix.O_DIRECT)
		}
		_, err := w.WriteString(part.text)
		must(t, err)
		want = append(want, image.PipeRun{Length: uint32(len(part.text)), Packet: part.packet})
	}
	p := described(t, world(t), r, w)[0].pipe
	if !slices.Equal(p.record.Runs, want) {
		t.Errorf("%+v, want %+v", p.record.Runs, want)
	}
	if got, err := p.content(); err != nil || string(got) != page+"onexstream" {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestRegular(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	must(t, os.WriteFile(path, []byte("0123456789"), 0o640))
	s := world(t)
	f := openFile(t, path, unix.O_RDWR|unix.O_APPEND)
	_, err := f.Seek(3, 0)
	must(t, err)
	place, d := openFile(t, path, unix.O_PATH), openFile(t, dir, unix.O_DIRECTORY)
	status := openFile(t, "/proc/self/status", unix.O_RDONLY)
	out := described(t, s, f, place, d, openFile(t, "/dev/zero", unix.O_RDONLY), status)
	rec := out[0].Record
	if rec.Kind != image.KindRegular || rec.Pos != 3 || rec.Size != 10 || rec.Path != path || rec.Mode&0o777 != 0o640 || rec.Flags&unix.O_APPEND == 0 || rec.Flags&unix.O_CLOEXEC != 0 {
		t.Errorf("%+v", rec)
	}
	for i, kind := range []string{image.KindRegular, image.KindPath, image.KindDirectory, image.KindDevice, image.KindProc} {
		if out[i].Record.Kind != kind {
			t.Errorf("%s is a %s, want %s", out[i].seen.link, out[i].Record.Kind, kind)
		}
	}
	if out[4].Record.Pid != int32(os.Getpid()) {
		t.Errorf("%s belongs to %d", out[4].seen.link, out[4].Record.Pid)
	}
	must(t, os.Remove(path))
	again := world(t)
	again.all = []*seen{looked(t, self(), int(f.Fd()))}
	must(t, again.Describe())
	if gone := again.gone; len(gone) != 1 || gone[0].record.Path != path || gone[0].record.Size != 10 || gone[0].record.Mode != 0o100640 {
		t.Errorf("%d removed files, %+v", len(gone), gone)
	}
	// As F_NOTIFY does, but for a process, where that does it for a thread.
	_, err = unix.FcntlInt(d.Fd(), unix.F_SETOWN, os.Getpid())
	must(t, err)
	watching := world(t)
	one := looked(t, self(), int(d.Fd()))
	watching.all, watching.tables = []*seen{one}, []*Table{{proc: self()}}
	refusal(t, watching.Describe(), "F_NOTIFY")
	_, err = unix.FcntlInt(d.Fd(), unix.F_SETOWN, 0)
	must(t, err)
	outside := world(t)
	outside.Mounts = nil
	outside.all = []*seen{looked(t, self(), int(d.Fd()))}
	refusal(t, outside.Describe(), "outside the container")
}

// sleeps waits until sleep(1) does so. Before, it opens and closes its libraries, and a
// descriptor that closes while its table is read is told as a task that is gone.
func sleeps(t *testing.T, pid int) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		call, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		must(t, err)
		if strings.HasPrefix(string(call), fmt.Sprintf("%d ", unix.SYS_CLOCK_NANOSLEEP)) {
			return
		}
	}
	t.Fatalf("task %d never slept", pid)
}

func TestTableOfChild(t *testing.T) {
	c := exec.Command("sleep", "1000")
	must(t, c.Start())
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	sleeps(t, c.Process.Pid)
	s := world(t)
	table, err := s.AddTable(&Process{Pid: c.Process.Pid, Inner: 2})
	must(t, err)
	if len(table.entries) < 3 || table.entries[0].seen.link != "/dev/null" || !slices.IsSortedFunc(table.entries, func(a, b entry) int { return a.seen.fd - b.seen.fd }) {
		t.Errorf("%+v", table.entries)
	}
	fs, err := s.FS(c.Process.Pid, 0o22)
	must(t, err)
	here, err := os.Getwd()
	must(t, err)
	if rec := fs.Record.(*image.FS); *rec != (image.FS{Cwd: here, Root: "/", Umask: 0o22}) {
		t.Errorf("%+v", rec)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	if _, err := s.AddTable(&Process{Pid: c.Process.Pid}); !errors.Is(err, tracee.ErrGone) {
		t.Errorf("a process that is gone: %v", err)
	}
	if _, err := s.FS(c.Process.Pid, 0); !errors.Is(err, tracee.ErrGone) {
		t.Errorf("a process that is gone: %v", err)
	}
}

// A periodic timer keeps its phase, and count, over a time in which nobody looks.
func TestGoneOff(t *testing.T) {
	for _, c := range []struct {
		left, interval, want int64
		missed               uint64
	}{{5, 0, 5, 0}, {0, 0, 1, 0}, {-7, 0, 1, 0}, {5, 10, 5, 0}, {0, 10, 10, 1}, {-3, 10, 7, 1}, {-10, 10, 10, 2}, {-23, 10, 7, 3}} {
		if left, missed := goneOff(c.left, c.interval); left != c.want || missed != c.missed {
			t.Errorf("%d of every %d: %d left, %d missed; want %d, %d", c.left, c.interval, left, missed, c.want, c.missed)
		}
	}
}
