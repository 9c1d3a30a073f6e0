// Package file holds open files and descriptor tables. Each kind of file is one
// source file with both directions: how it is told and saved, and how a stub
// inside the container makes it again. kinds lists them.
package file

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/mm"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Process is what the room needs to know of a process.
type Process struct {
	Pid   int // host; the tid of a thread with a table of its own
	Inner int
	Name  string // for messages
	pidfd int    // once it is needed, and until Set.Close
}

// seen is one descriptor as /proc shows it.
type seen struct {
	proc  *Process
	fd    int
	link  string // target of /proc/PID/fd/N
	stat  unix.Stat_t
	flags uint32 // open(2) flags with O_CLOEXEC
	pos   int64
	mnt   int
	info  []byte // the whole of /proc/PID/fdinfo/N
}

func (s *seen) path() string { return fmt.Sprintf("/proc/%d/fd/%d", s.proc.Pid, s.fd) }

// object is how messages name a descriptor.
func (s *seen) object() string { return fmt.Sprintf("fd %d, %s", s.fd, s.link) }

// deletedSuffix is how the kernel marks the path of a file with no name left.
const deletedSuffix = " (deleted)"

// look reads one descriptor.
func look(p *Process, fd int) (*seen, error) {
	l, err := newLooker(p)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.look(fd)
}

// looker reads the descriptors of a process. It works in the directories of /proc
// about them: a path from /proc on takes longer to walk than what it leads to.
type looker struct {
	proc     *Process
	fd, info *os.File
	buf      []byte
	socket   *unix.Stat_t // of one that was met
}

func newLooker(p *Process) (l *looker, err error) {
	l = &looker{proc: p, buf: make([]byte, 64<<10)}
	if l.fd, err = os.Open(fmt.Sprintf("/proc/%d/fd", p.Pid)); err != nil {
		return nil, err
	}
	if l.info, err = os.Open(fmt.Sprintf("/proc/%d/fdinfo", p.Pid)); err != nil {
		return nil, errors.Join(err, l.fd.Close())
	}
	return l, nil
}

func (l *looker) Close() {
	_ = l.fd.Close()
	_ = l.info.Close()
}

// share is how many descriptors are worth a thread of their own.
const share = 256

// all reads the descriptors of these names, by several threads if they are many.
func (l *looker) all(names []string) (all []*seen, err error) {
	threads := min(1+len(names)/share, goruntime.GOMAXPROCS(0))
	parts := make([][]*seen, threads)
	errs := make([]error, threads)
	var wait sync.WaitGroup
	for i := range threads {
		wait.Go(func() {
			own := looker{proc: l.proc, fd: l.fd, info: l.info, buf: make([]byte, len(l.buf))}
			for _, name := range names[len(names)*i/threads : len(names)*(i+1)/threads] {
				fd, err := strconv.Atoi(name)
				if err != nil {
					continue
				}
				one, err := own.look(fd)
				if err != nil {
					errs[i] = err
					return
				}
				parts[i] = append(parts[i], one)
			}
		})
	}
	wait.Wait()
	return slices.Concat(parts...), errors.Join(errs...)
}

func (l *looker) look(fd int) (*seen, error) {
	s := &seen{proc: l.proc, fd: fd}
	name := strconv.Itoa(fd)
	n, err := unix.Readlinkat(int(l.fd.Fd()), name, l.buf)
	if err != nil {
		return nil, &fs.PathError{Op: "readlink", Path: s.path(), Err: err}
	}
	s.link = string(l.buf[:n])
	if err := l.stat(s, name); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: s.path(), Err: err}
	}
	if s.info, err = tracee.ReadPieceAt(int(l.info.Fd()), name, l.buf); err != nil {
		return nil, err
	}
	s.pos = int64(s.number("pos", 10))
	s.flags = uint32(s.number("flags", 8))
	s.mnt = int(s.number("mnt_id", 10))
	return s, nil
}

// stat reads what stat(2) tells of a descriptor. Of a socket that is the number in its
// link, "socket:[4711]", and else what it tells of any other one.
func (l *looker) stat(s *seen, name string) error {
	number, ok := strings.CutPrefix(s.link, "socket:[")
	if ok && l.socket != nil {
		ino, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
		if err != nil {
			return err
		}
		s.stat = unix.Stat_t{Dev: l.socket.Dev, Mode: unix.S_IFSOCK, Nlink: 1, Ino: ino}
		return nil
	}
	if err := unix.Fstatat(int(l.fd.Fd()), name, &s.stat, 0); err != nil {
		return err
	}
	if ok {
		l.socket = &s.stat
	}
	return nil
}

// field is the value behind "key:" in the descriptor's fdinfo.
func (s *seen) field(key string) string {
	for line := range bytes.Lines(s.info) {
		if rest, ok := bytes.CutPrefix(line, []byte(key+":")); ok {
			return strings.TrimSpace(string(rest))
		}
	}
	return ""
}

func (s *seen) number(key string, base int) uint64 {
	v, _ := strconv.ParseUint(s.field(key), base, 64)
	return v
}

// pair reads a field of the form "(seconds, nanoseconds)" in nanoseconds.
func (s *seen) pair(key string) int64 {
	var sec, nsec int64
	if _, err := fmt.Sscanf(s.field(key), "(%d, %d)", &sec, &nsec); err != nil {
		return 0
	}
	return sec*1e9 + nsec
}

// own opens the same file description in this process.
func (s *seen) own() (*os.File, error) { return tracee.TakeFD(s.proc.Pid, s.fd) }

// held is a descriptor of our own of somebody's open file, for a few calls. Of an
// os.File package os finds out whether it can be waited for; where there are
// hundred thousand files that takes longer than all else.
type held int

// Fd is its number.
func (h held) Fd() uintptr { return uintptr(h) }

// Close closes it.
func (h held) Close() error { return unix.Close(int(h)) }

// hold is own for a few calls.
func (s *seen) hold() (held, error) {
	if s.proc.pidfd == 0 {
		fd, err := tracee.Pidfd(s.proc.Pid)
		if err != nil {
			return -1, err
		}
		s.proc.pidfd = fd
	}
	n, err := unix.PidfdGetfd(s.proc.pidfd, s.fd, 0)
	if err != nil {
		return -1, fmt.Errorf("pidfd_getfd of fd %d in task %d: %w", s.fd, s.proc.Pid, err)
	}
	return held(n), nil
}

// release closes what holding the files has opened.
func (s *Set) release() {
	for _, t := range s.tables {
		if t.proc.pidfd != 0 {
			_ = unix.Close(t.proc.pidfd)
			t.proc.pidfd = 0
		}
	}
}

// Description is one open file description and who holds it.
type Description struct {
	object.Object
	Record  *image.File
	seen    *seen // one of its descriptors
	pipe    *pipe
	queue   *queue
	segment *mm.Segment
	targets []*Description // that it refers to; of an epoll by entry
	watched []watched
	timed   [2]int64 // CLOCK_MONOTONIC and CLOCK_REALTIME when a timer was read
	null    bool     // a guest's stream that becomes /dev/null

	connection *sock.Connection
}

// Table is one descriptor table.
type Table struct {
	object.Object
	proc    *Process
	record  *image.Files
	entries []entry
}

type entry struct {
	seen *seen
	desc *Description
}

// entry finds a descriptor by its number, nil if there is none.
func (t *Table) entry(fd int) *entry {
	i, ok := slices.BinarySearchFunc(t.entries, fd, func(e entry, fd int) int { return cmp.Compare(e.seen.fd, fd) })
	if !ok {
		return nil
	}
	return &t.entries[i]
}

// Set is every open file of a container.
type Set struct {
	Env
	Warnings []string // what is not restored as it was

	guests  []*Table
	streams map[identity]bool // of the guests
	all     []*seen
	descs   []*Description
	tables  []*Table
	mapped  map[mappedKey]*object.Object
	removed map[fileID]*removed
	gone    []*removed       // in the order they were met
	maps    []*object.Object // mapped files in the order they were met
	ptys    map[int]*pty
	tuns    map[uint64]map[string]bool
	// terminals are ptys in the order they were met.
	terminals []*pty
	pipes     map[fileID]*pipe
	order     []*pipe
	queues    queues
	// endedTasks numbers tasks that are gone and of which something is held.
	endedTasks map[string]uint32

	sockets     *sock.Inside
	unixes      []*unixSocket
	unixOf      map[uint64]*unixSocket // by inode
	connections []*object.Object
	unreads     []*unread
	flying      []*os.File // descriptors in flight
	mappedIn    map[*object.Object]bool
	socketIn    *namespace.View // of the socket that is read
	placed      []func()        // complete records with the mount namespaces of their paths
}

// Env is what the room must know of the container.
type Env struct {
	// Running: the tasks are not stopped. What lies in pipes comes and goes, and
	// is not looked at.
	Running bool
	Root    *os.File // of the container's file system, to resolve paths in
	Mounts  []image.Mount
	Stdio   []string // link targets that init was started with
	Init    *Process
	Shared  *mm.Shared
	// Console is the container's terminal as ConsoleRoot tells it.
	Console string
	// Named finds a file of the container's own memory file systems by device
	// and inode, "" if there is none.
	Named func(dev, ino uint64) string
	IDs   task.IDMaps
	NetNS uint64 // inode of the container's network namespace
	// Sockets says what is to become of connections.
	Sockets sock.Choices
	// Places remembers where watched files were found.
	Places *Places
	// Promise is for reading queues, nil where the container runs.
	Promise sock.Promise
	// Position sees to it that a file gets a position again, even if this process
	// dies, until kept is called.
	Position func(f *os.File, offset int64) (kept func() error, err error)
	// Inner is the pid in the container of a process of it, 0 for another one.
	Inner func(host int32) int32
	// Remade reports whether a device is one of these file systems, which restore
	// makes anew.
	Remade func(dev uint64) bool
	// Task tells what the container calls a task of the host and its process, 0 for
	// one that is not of it.
	Task func(host int) (tid, pid int32, err error)
	// Apart is a thread in a namespace which its process is not in, by its inode.
	Apart func(inode uint64) (host int)
	// Views are the mount namespaces that tasks have made, once these are known.
	Views func() []*namespace.View
	// External are the open files that are to be left out.
	External []Key
	// Covered tells, where the container has mounted something itself, whether
	// the file of st is the one at a path if nothing were mounted on the mount
	// with an id.
	Covered func(mnt int, path string, st *unix.Stat_t) bool
	// Place is the one that a process is in, nil for the container's own.
	Place func(pid int) *namespace.View
}

type mappedKey struct {
	dev, ino uint64
	path     string
	write    bool
}

// NewSet returns an empty set for a container.
func NewSet(env Env) *Set {
	if env.Places == nil {
		env.Places = NewPlaces()
	}
	return &Set{Env: env, mapped: map[mappedKey]*object.Object{}, mappedIn: map[*object.Object]bool{}, pipes: map[fileID]*pipe{}, removed: map[fileID]*removed{}, ptys: map[int]*pty{}, unixOf: map[uint64]*unixSocket{}}
}

// AddTable reads the descriptor table of a process.
func (s *Set) AddTable(p *Process) (*Table, error) {
	l, err := newLooker(p)
	if err != nil {
		return nil, gone(p.Pid, err)
	}
	defer l.Close()
	names, err := l.fd.Readdirnames(-1)
	if err != nil {
		return nil, gone(p.Pid, err)
	}
	t := &Table{proc: p, record: &image.Files{}}
	t.Object = object.Object{Type: image.TypeFiles, Record: t.record, Complete: t.complete}
	all, err := l.all(names)
	if err != nil {
		return nil, gone(p.Pid, err)
	}
	s.all = append(s.all, all...)
	for _, one := range all {
		t.entries = append(t.entries, entry{seen: one})
	}
	slices.SortFunc(t.entries, func(a, b entry) int { return cmp.Compare(a.seen.fd, b.seen.fd) })
	s.tables = append(s.tables, t)
	return t, nil
}

// gone makes ErrGone of what the kernel says of a task, or of a descriptor, that is
// there no more.
func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
		return fmt.Errorf("task %d: %w", pid, tracee.ErrGone)
	}
	return err
}

// Describe finds which descriptors share an open file description, tells the
// kind of each, and reads its state. It refuses what cannot be saved.
func (s *Set) Describe() error {
	if err := s.readUnread(); err != nil {
		return err
	}
	byFile := map[*seen]*Description{}
	groups, err := group(s.all)
	if err != nil {
		return err
	}
	for _, g := range groups {
		d := &Description{seen: g[0], Record: &image.File{}}
		d.Object = object.Object{Type: image.TypeFile, Record: d.Record}
		s.descs = append(s.descs, d)
		for _, one := range g {
			byFile[one] = d
		}
	}
	for _, t := range s.tables {
		for i := range t.entries {
			t.entries[i].desc = byFile[t.entries[i].seen]
		}
	}
	if err := s.findExternal(groups); err != nil {
		return err
	}
	for _, d := range s.descs {
		if err := s.describe(d); err != nil {
			return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), err))
		}
	}
	if err := s.connectUnix(); err != nil {
		return err
	}
	if err := s.linkUnread(byFile); err != nil {
		return err
	}
	if err := s.readTerminals(); err != nil {
		return err
	}
	if err := s.readLocks(); err != nil {
		return err
	}
	s.findNames()
	if err := s.findWatched(); err != nil {
		return err
	}
	if err := s.checkPipes(); err != nil {
		return err
	}
	for _, d := range s.descs {
		if d.Record.Kind == image.KindEpoll {
			if err := s.interest(d); err != nil {
				return fail.In(d.seen.proc.Name, fail.On(d.seen.object(), err))
			}
		}
	}
	return nil
}

func (s *Set) describe(d *Description) error {
	d.Record.Flags = d.seen.flags &^ unix.O_CLOEXEC
	d.Record.Pos = d.seen.pos
	d.Record.Opener = int32(d.seen.proc.Inner)
	if err := s.readOwner(d); err != nil {
		return gone(d.seen.proc.Pid, err)
	}
	if d.Record.Key != "" {
		s.readExternal(d)
		return nil
	}
	for _, k := range kinds {
		if k.is(s, d.seen) {
			if k.name == image.KindRegular && s.external(d.seen) && s.fromGuest(d.seen) {
				s.toNull(d)
				return nil
			}
			return k.read(s, d)
		}
	}
	return unknown(d.seen)
}

// likeness is what two descriptors of one open file have in common, and most that
// are of different ones have not.
type likeness struct {
	dev, ino uint64
	mnt      int
	flags    uint32
	pos      int64
	id       string // of an eventfd: all of them have one inode
}

func (s *seen) likeness() likeness {
	l := likeness{s.stat.Dev, s.stat.Ino, s.mnt, s.flags &^ unix.O_CLOEXEC, s.pos, ""}
	if s.link == eventfdLink {
		l.id = s.field("eventfd-id")
	}
	return l
}

// group sorts descriptors into open file descriptions, in the order in which they
// were met. For those that are alike kcmp(2) gives an order.
func group(all []*seen) (groups [][]*seen, failed error) {
	alike := map[likeness][]*seen{}
	var met []likeness
	for _, one := range all {
		l := one.likeness()
		if alike[l] == nil {
			met = append(met, l)
		}
		alike[l] = append(alike[l], one)
	}
	order := func(a, b *seen) int {
		c, err := kcmp(a.proc.Pid, b.proc.Pid, kcmpFile, uintptr(a.fd), uintptr(b.fd))
		failed = errors.Join(failed, err)
		return c
	}
	for _, l := range met {
		if same := alike[l]; len(same) > 1 {
			groups = append(groups, object.Same(same, order)...)
		} else {
			groups = append(groups, same)
		}
	}
	return groups, failed
}

// Types of kcmp(2).
const (
	kcmpFile     = 0
	kcmpEpollTFD = 7
)

// kcmp compares two kernel objects: 0 if they are the same, else their order.
//
//go:uintptrescapes
func kcmp(pid1, pid2 int, kind, a, b uintptr) (int, error) {
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), kind, a, b, 0)
	if errno != 0 {
		return 0, gone(pid1, fmt.Errorf("kcmp: %w", errno))
	}
	return [...]int{0, -1, 1, 1}[r&3], nil
}

// complete fills in a table's record once its files have references.
func (t *Table) complete() {
	t.record.Descriptors = make([]image.Descriptor, len(t.entries))
	for i, e := range t.entries {
		t.record.Descriptors[i] = image.Descriptor{FD: int32(e.seen.fd), File: e.desc.Ref, CloExec: e.seen.flags&unix.O_CLOEXEC != 0}
	}
}

// Objects lists every record of the room in the order in which they can be
// written: buffers, mapped files, files, epolls behind what they watch, tables.
func (s *Set) Objects() []*object.Object {
	for _, place := range s.placed {
		place()
	}
	var out []*object.Object
	for _, r := range s.gone {
		out = append(out, &r.Object)
	}
	for _, p := range s.order {
		out = append(out, &p.Object)
	}
	for _, p := range s.terminals {
		out = append(out, &p.Object)
	}
	for _, q := range s.queues.list {
		out = append(out, &q.Object)
	}
	out = append(out, s.maps...)
	done := map[*Description]bool{}
	var visit func(d *Description)
	visit = func(d *Description) {
		if done[d] {
			return
		}
		done[d] = true
		for _, t := range d.targets {
			visit(t)
		}
		out = append(out, &d.Object)
	}
	for _, d := range s.descs {
		visit(d)
	}
	out = append(out, s.connections...)
	for _, q := range s.unreads {
		out = append(out, &q.Object)
	}
	for _, t := range s.tables {
		out = append(out, &t.Object)
	}
	return out
}

// view is the mount namespace that a descriptor's mount is in: the container's,
// one that tasks have made, or nil.
func (s *Set) view(one *seen) *namespace.View {
	has := func(mounts []image.Mount) bool {
		return slices.ContainsFunc(mounts, func(m image.Mount) bool { return m.ID == one.mnt })
	}
	if has(s.Mounts) {
		return s.own()
	}
	if s.Views != nil {
		for _, v := range s.Views() {
			if has(v.Mounts) {
				return v
			}
		}
	}
	return nil
}

func (s *Set) own() *namespace.View {
	return &namespace.View{Set: &mount.Set{Env: mount.Env{Root: s.Root}, Mounts: s.Mounts}}
}

// external reports a file of a mount that the container does not have.
func (s *Set) external(one *seen) bool { return s.view(one) == nil }

// fsType is the type of file system that a descriptor's mount has.
func (s *Set) fsType(one *seen) string {
	if v := s.view(one); v != nil {
		for i := range v.Mounts {
			if v.Mounts[i].ID == one.mnt {
				return v.Mounts[i].FSType
			}
		}
	}
	return ""
}

// inPlace checks that the path of a description still names its file, and notes
// the mount, or the mount namespace, in which it does.
func (s *Set) inPlace(d *Description) error {
	v := s.place(d)
	s.inside(d, v)
	err := resolves(v.Root, d.seen.link, &d.seen.stat)
	if s.covered(v, d.seen.link, d.seen.mnt, &d.seen.stat) {
		d.Record.Mnt, err = int32(d.seen.mnt), nil
	}
	return err
}

// covered reports a file that its path does not lead to because the container has
// mounted something over it. The same file may be there, in another mount.
func (s *Set) covered(v *namespace.View, path string, mnt int, st *unix.Stat_t) bool {
	look := s.Covered
	if v.Ref != nil {
		look = v.Covered
	}
	if look == nil {
		return false
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(v.Root.Fd()), path, &how)
	if err == nil {
		defer unix.Close(fd)
		if now, err := mountOf(fd, ""); err == nil && now == mnt {
			return false
		}
	}
	return look(mnt, path, st)
}

// mountOf is the id of the mount that a path from a directory leads to.
func mountOf(dir int, path string) (int, error) {
	flags := 0
	if path == "" {
		flags = unix.AT_EMPTY_PATH
	}
	var st unix.Statx_t
	err := unix.Statx(dir, path, flags, unix.STATX_MNT_ID, &st)
	return int(st.Mnt_id), err
}

// place is the mount namespace in which a description has its path.
func (s *Set) place(d *Description) *namespace.View {
	if v := s.view(d.seen); v != nil {
		return v
	}
	return s.own()
}

// inside notes that a path is one of a mount namespace, which has a reference
// only when records are written.
func (s *Set) inside(d *Description, v *namespace.View) {
	if v.Ref != nil {
		s.placed = append(s.placed, func() { d.Record.Inside = *v.Ref })
	}
}

// resolves checks that path inside the container still names the file of st:
// it has not been unlinked, renamed or covered by a mount since it was opened.
func (s *Set) resolves(path string, st *unix.Stat_t) error { return resolves(s.Root, path, st) }

func resolves(root *os.File, path string, st *unix.Stat_t) error {
	now, err := lstat(root, path)
	switch {
	case err == nil && now.Dev == st.Dev && now.Ino == st.Ino:
		return nil
	case strings.HasSuffix(path, deletedSuffix):
		return fail.Refuse("", "a file of this kind that was deleted while open is not supported", "close it before the checkpoint")
	case err != nil:
		return fail.Refuse("", "its path cannot be reached in the container: "+err.Error(), "close it before the checkpoint")
	}
	return fail.Refuse("", "another file has taken its name since it was opened", "close it before the checkpoint")
}

// lstat looks at a path as the container's root sees it, whatever symbolic
// links lie on the way.
func (s *Set) lstat(path string) (*unix.Stat_t, error) { return lstat(s.Root, path) }

func lstat(root *os.File, path string) (*unix.Stat_t, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(root.Fd()), path, &how)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	return &st, unix.Fstat(fd, &st)
}

// Mapped returns the object of a file that is mapped (mm.Files).
func (s *Set) Mapped(pid int, path, link string, write bool) (*object.Object, error) {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return nil, gone(pid, err)
	}
	key := mappedKey{st.Dev, st.Ino, path, write}
	if o := s.mapped[key]; o != nil {
		return o, nil
	}
	in := s.mountedIn(link)
	if in != nil && s.resolves(path, &st) == nil {
		in = nil // the container has it too
	}
	v := in
	if v == nil {
		v = s.own()
	}
	at, err := s.locate(v, path, &st, link)
	if err != nil {
		return nil, err
	}
	name, gone := at.path, at.gone
	rec := &image.File{Kind: image.KindRegular, Flags: unix.O_RDONLY, Path: name, Size: st.Size, Mtime: st.Mtim.Nano(), Mode: st.Mode, Mnt: at.mnt}
	if write {
		rec.Flags = unix.O_RDWR
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR {
		rec.Kind, rec.Rdev = image.KindDevice, st.Rdev
		if why := unsupportedDevice(st.Rdev); why != "" {
			return nil, fail.Refuse("", why, "unmap it before the checkpoint")
		}
	}
	o := &object.Object{Type: image.TypeFile, Record: rec}
	if gone != nil {
		o.Complete = func() { rec.Removed = gone.Ref }
	}
	s.mapped[key] = o
	s.maps = append(s.maps, o)
	if in != nil && (gone == nil || gone.in.Ref != nil) {
		s.mappedIn[o] = true
	}
	if in != nil && gone == nil {
		s.placed = append(s.placed, func() { rec.Inside = *in.Ref })
	}
	return o, nil
}

// MappedInside reports a mapped file that is reached only in a mount namespace
// that a task has made.
func (s *Set) MappedInside(o *object.Object) bool { return s.mappedIn[o] }

// mountedIn is the mount namespace of tasks that what a link of /proc leads to is
// mounted in, nil for none.
func (s *Set) mountedIn(link string) *namespace.View {
	if s.Views == nil || len(s.Views()) == 0 {
		return nil
	}
	mnt, err := mountOf(unix.AT_FDCWD, link)
	if err != nil {
		return nil
	}
	if v := s.view(&seen{mnt: mnt}); v != nil && v.Ref != nil {
		return v
	}
	return nil
}

// viewOf is the mount namespace that a process is in.
func (s *Set) viewOf(pid int) *namespace.View {
	if s.Place != nil {
		if v := s.Place(pid); v != nil {
			return v
		}
	}
	return s.own()
}

// Removed reports whether link leads to a file that was removed from a tmpfs of
// the container, where it was called path (mm.Files).
func (s *Set) Removed(path, link string) bool {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if unix.Stat(link, &st) != nil || unix.Statfs(link, &fs) != nil {
		return false
	}
	if fs.Type != unix.TMPFS_MAGIC || st.Nlink != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	dir, err := s.lstat(filepath.Dir(path))
	return err == nil && dir.Dev == st.Dev
}

// FS reads where a process stands in the file system.
func (s *Set) FS(pid int, umask uint32) (*object.Object, error) {
	rec := &image.FS{Umask: umask}
	cwd, err := s.stands(pid, "cwd")
	if err != nil {
		return nil, err
	}
	root, err := s.stands(pid, "root")
	if err != nil {
		return nil, err
	}
	rec.Cwd, rec.CwdMnt, rec.Root, rec.RootMnt = cwd.path, cwd.mnt, root.path, root.mnt
	return &object.Object{Type: image.TypeFS, Record: rec, Complete: func() {
		if cwd.gone != nil {
			rec.CwdRemoved = cwd.gone.Ref
		}
		if root.gone != nil {
			rec.RootRemoved = root.gone.Ref
		}
	}}, nil
}

// stands reads one of the directories that a process stands in.
func (s *Set) stands(pid int, name string) (at where, err error) {
	link := fmt.Sprintf("/proc/%d/%s", pid, name)
	text, err := os.Readlink(link)
	if err != nil {
		return at, gone(pid, err)
	}
	if !filepath.IsAbs(text) {
		return at, fail.Refuse(name+" "+text, "the directory cannot be reached from the container's root", "change to another directory before the checkpoint")
	}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return at, gone(pid, err)
	}
	at, err = s.locate(s.viewOf(pid), text, &st, link)
	return at, fail.On(name+" "+text, err)
}
