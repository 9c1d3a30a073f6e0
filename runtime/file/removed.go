package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/object"
	"github.com/ocickpt/ocickpt/runtime/tmpfs"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// removed is a file or directory that is held under a name that it has lost.
// Everybody who holds it, by descriptor, mapping or as a directory to stand in,
// shares it.
type removed struct {
	object.Object
	record *image.Removed
	link   string // in /proc, through which it can be opened
	stat   unix.Stat_t
	in     *namespace.View // where it had its name
}

type fileID struct{ dev, ino uint64 }

// where is what leads to a file: a path; with it a mount, where others have
// covered the path; or the file itself where its name is gone.
type where struct {
	path string
	mnt  int32
	gone *removed
}

// locate finds what a task holds under text, as a link in /proc shows it.
func (s *Set) locate(v *namespace.View, text string, st *unix.Stat_t, link string) (where, error) {
	err := resolves(v.Root, text, st)
	path, deleted := strings.CutSuffix(text, deletedSuffix)
	if err == nil || !deleted {
		if s.Covered == nil && v.Ref == nil {
			return where{path: text}, err
		}
		mnt, e := mountOf(unix.AT_FDCWD, link)
		if e == nil && s.covered(v, text, mnt, st) {
			return where{path: text, mnt: int32(mnt)}, nil
		}
		return where{path: text}, err
	}
	v = s.namedIn(v, filepath.Dir(path), st)
	key := fileID{st.Dev, st.Ino}
	if r := s.removed[key]; r != nil {
		return where{path: path, gone: r}, nil
	}
	if err := s.uncovered(v, path, st); err != nil {
		return where{}, err
	}
	r, err := s.remove(path, st, link)
	if err != nil {
		return where{}, err
	}
	if r.in = v; v.Ref != nil {
		s.placed = append(s.placed, func() { r.record.Inside = *v.Ref })
	}
	s.removed[key] = r
	s.gone = append(s.gone, r)
	return where{path: path, gone: r}, nil
}

// namedIn is the mount namespace to make what has lost its name in a directory in:
// the container's, if it is there the same directory, else the one that it is
// mounted in, or where that has something else there by now, another that shows it.
func (s *Set) namedIn(v *namespace.View, dir string, st *unix.Stat_t) *namespace.View {
	if v.Ref == nil || s.sameDirectory(v, dir, st) {
		return s.own()
	}
	for _, one := range append([]*namespace.View{v}, s.Views()...) {
		if now, err := lstat(one.Root, dir); err == nil && now.Dev == st.Dev {
			return one
		}
	}
	return v
}

// uncovered refuses a file that has lost its name, in a directory over which the
// container has mounted something since.
func (s *Set) uncovered(v *namespace.View, path string, st *unix.Stat_t) error {
	if s.Covered == nil && v.Ref == nil {
		return nil
	}
	now, err := lstat(v.Root, filepath.Dir(path))
	if err == nil && now.Dev != st.Dev && !overlaid(v.Root, filepath.Dir(path)) {
		return fail.Refuse("", "it was deleted and the container has mounted something over where it was; that is not supported", "close it before the checkpoint")
	}
	return nil
}

// sameDirectory reports a directory of a mount namespace that a task has made
// which is also the container's: what has lost its name there is made in that.
func (s *Set) sameDirectory(v *namespace.View, dir string, st *unix.Stat_t) bool {
	ours, err := s.lstat(dir)
	theirs, e := lstat(v.Root, dir)
	if err != nil || e != nil { // gone too
		return errors.Is(err, unix.ENOENT) && errors.Is(e, unix.ENOENT) && !s.onlyIn(v, st)
	}
	return ours.Dev == theirs.Dev && ours.Ino == theirs.Ino
}

// onlyIn reports a file on a file system that the container's own mounts do not
// show.
func (s *Set) onlyIn(v *namespace.View, st *unix.Stat_t) bool { return !v.Shares(st.Dev) }

// remove describes a file that has lost the name path.
func (s *Set) remove(path string, st *unix.Stat_t, link string) (*removed, error) {
	r := &removed{link: link, stat: *st, record: &image.Removed{
		Path: path, Mode: st.Mode, Mtime: st.Mtim.Nano(), Atime: st.Atim.Nano(),
	}}
	r.record.UID, r.record.GID = s.IDs.Owner(st)
	r.Object = object.Object{Type: image.TypeRemoved, Record: r.record}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		r.record.Size = st.Size
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := readlinkOpen(link, target)
		if err != nil {
			return nil, err
		}
		r.record.Target = string(target[:n])
	case unix.S_IFDIR, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return nil, fail.Refuse("", "the device node was deleted while open", "close it before the checkpoint")
	}
	var err error
	r.record.Xattrs, err = tmpfs.Xattrs(link, s.IDs)
	return r, err
}

// readlinkOpen reads the symbolic link that a descriptor was opened on, which
// takes the descriptor (readlinkat(2), with an empty path).
func readlinkOpen(link string, target []byte) (int, error) {
	fd, err := unix.Open(link, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.Readlinkat(fd, "", target)
}

// overlaid reports a directory of an overlay, which counts links of the layers
// below too and so does not tell whether a name is left.
func overlaid(root *os.File, dir string) bool {
	var fs unix.Statfs_t
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(root.Fd()), dir, &how)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// findNames looks for names that files have elsewhere: such a file must stay the
// same for all, and its bytes need not travel.
func (s *Set) findNames() {
	for _, r := range s.gone {
		dir := r.record.Path
		if !r.record.Unnamed {
			dir = filepath.Dir(dir)
		}
		if r.stat.Nlink == 0 || r.stat.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if r.record.Link = s.otherName(r.in, dir, &r.stat); r.record.Link != "" {
			r.record.Size, r.record.Xattrs = 0, nil
		} else if !overlaid(r.in.Root, dir) {
			s.Warnings = append(s.Warnings, fmt.Sprintf("%s has lost this name, and its other %d were not found: it is restored as a file of its own", r.record.Path, r.stat.Nlink))
		}
	}
}

// siblings is how many names of a directory are looked at for another name of a
// file.
const siblings = 4096

// otherName finds another name of a file that has lost one: that of another
// descriptor, or one in the directory where it had the lost one, as a program
// leaves it that writes a new file first and then links it to its place (C
// libraries do so with a semaphore). In memory all names are known.
func (s *Set) otherName(v *namespace.View, dir string, st *unix.Stat_t) string {
	if s.Named != nil {
		if now := s.Named(st.Dev, st.Ino); now != "" {
			return now
		}
	}
	same := func(path string) bool {
		now, err := lstat(v.Root, path)
		return err == nil && now.Dev == st.Dev && now.Ino == st.Ino
	}
	for _, one := range s.all {
		if one.stat.Dev == st.Dev && one.stat.Ino == st.Ino && strings.HasPrefix(one.link, "/") && same(one.link) {
			return one.link
		}
	}
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(v.Root.Fd()), dir, &how)
	if err != nil {
		return ""
	}
	names := os.NewFile(uintptr(fd), dir)
	defer names.Close()
	entries, _ := names.ReadDir(siblings)
	for _, e := range entries {
		if path := filepath.Join(dir, e.Name()); e.Type().IsRegular() && same(path) {
			return path
		}
	}
	return ""
}

// take makes a description one of a file without a name.
func (d *Description) take(r *removed) {
	if r == nil {
		return
	}
	if r.record.Opener == 0 {
		r.record.Opener = d.Record.Opener
	}
	if d.seen.flags&unix.O_TMPFILE == unix.O_TMPFILE && !r.record.Unnamed {
		r.record.Unnamed = true
		r.record.Path = filepath.Dir(r.record.Path)
	}
	d.Complete = func() { d.Record.Removed = r.Ref }
}

// Weight is how many bytes of files have to be saved.
func (s *Set) Weight() (n int64) {
	for _, r := range s.gone {
		if r.record.Size != 0 {
			n += r.stat.Blocks * 512
		}
	}
	return n
}

// contentChunk is how much of a file goes into one record.
const contentChunk = 1 << 20

// saveRemoved writes the bytes of the files that have no name, without holes.
func (s *Set) saveRemoved(w *image.Writer, progress func(int) error) error {
	buf := make([]byte, contentChunk)
	for _, r := range s.gone {
		if r.record.Size == 0 {
			continue
		}
		if err := r.save(w, buf, progress); err != nil {
			return fail.On("deleted file "+r.record.Path, err)
		}
	}
	return nil
}

func (r *removed) save(w *image.Writer, buf []byte, progress func(int) error) error {
	f, err := os.Open(r.link)
	if err != nil {
		return err
	}
	defer f.Close()
	for at := int64(0); at < r.record.Size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("SEEK_DATA: %w", err)
		}
		end, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("SEEK_HOLE: %w", err)
		}
		for at = data; at < min(end, r.record.Size); {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), end-at, r.record.Size-at)], at)
			if n == 0 && errors.Is(err, io.EOF) {
				return nil // somebody outside has cut it off
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if err = progress(n); err == nil {
				err = w.Bytes(r.Ref, uint64(at), buf[:n])
			}
			if err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// A file without a name is made under the name that it had, and loses it at
// once: so it reads in /proc as before ("... (deleted)"), and the name is there
// for microseconds. Where another file has the name by now, that one is not
// touched, not for a moment: others may be using it. Ours then gets a name
// beside it, and that is what /proc shows. O_TMPFILE would need no name, but
// shows none either, and can be linked to one (open(2)): it is for those who
// used it.
//
// Directories have to stay until what is in them has been made; those that the
// path leads through and that are gone too are made for as long.

// makeRemoved makes the files without a name. They stand in the table as O_PATH
// descriptors, which keep nobody from executing a file (ETXTBSY), and are opened
// anew from there for each that held them.
func (m *Maker) makeRemoved() error {
	var refs []image.Ref
	for _, ref := range Refs(m.head) {
		if rec := m.head.Removed(ref); rec != nil && rec.Inside == 0 {
			refs = append(refs, ref)
		}
	}
	return m.makeAllRemoved(refs)
}

func (m *Maker) makeAllRemoved(refs []image.Ref) error {
	slices.SortStableFunc(refs, func(a, b image.Ref) int {
		return strings.Compare(m.head.Removed(a).Path, m.head.Removed(b).Path)
	})
	var scaffold []string // directories that must go again
	for _, ref := range refs {
		rec := m.head.Removed(ref)
		err := m.makeOneRemoved(ref, rec, &scaffold)
		if err != nil {
			return fail.On("deleted file "+rec.Path, fmt.Errorf("cannot be made again: %w", err))
		}
	}
	var b tracee.Batch
	for _, dir := range slices.Backward(scaffold) {
		b.Add(unix.SYS_UNLINKAT, tracee.W(unix.AT_FDCWD), b.String(dir), tracee.W(unix.AT_REMOVEDIR))
	}
	if _, err := m.stub.Run(&b); err != nil {
		return fmt.Errorf("remove directories again: %w", err)
	}
	return nil
}

// otherNames is how many names are tried that are all taken.
const otherNames = 8

func (m *Maker) makeOneRemoved(ref image.Ref, rec *image.Removed, scaffold *[]string) error {
	var err error
	for _, who := range []Identity{m.identityOf(rec.Opener), m.bundle} {
		name := rec.Path
		for range otherNames {
			if err = m.tryRemoved(ref, rec, who, name, scaffold); !errors.Is(err, unix.EEXIST) {
				break
			}
			name += "~"
		}
		if !denied(err) {
			break
		}
	}
	if err == nil || rec.Mode&unix.S_IFMT != unix.S_IFREG || !denied(err) && !errors.Is(err, unix.EROFS) {
		return err
	}
	// The task may not, or nobody may: memory will do.
	m.Warn("a deleted file cannot be made again where it was and becomes a memfd", "path", rec.Path, "error", err)
	var b tracee.Batch
	i := b.Add(unix.SYS_MEMFD_CREATE, b.String(filepath.Base(rec.Path)[:min(len(filepath.Base(rec.Path)), 249)]), tracee.W(unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING))
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	return m.adoptRemoved(ref, rec, int(b.Calls[i].Ret))
}

// tryRemoved makes a file without a name as who, under a name that it loses.
func (m *Maker) tryRemoved(ref image.Ref, rec *image.Removed, who Identity, name string, scaffold *[]string) error {
	at := filepath.Dir(name)
	if rec.Unnamed {
		at = rec.Path
	}
	dir, err := m.openScaffold(at, who, scaffold)
	if err != nil {
		return err
	}
	var b tracee.Batch
	m.become(&b, who)
	i := m.create(&b, rec, dir, name)
	m.become(&b, m.self)
	_, err = m.stub.Run(&b)
	if err != nil {
		err = errors.Join(err, m.restoreSelf())
	}
	var done tracee.Batch
	done.Add(unix.SYS_CLOSE, tracee.W(dir))
	if _, e := m.stub.Run(&done); err != nil || e != nil {
		return errors.Join(err, e)
	}
	if rec.Mode&unix.S_IFMT == unix.S_IFDIR {
		*scaffold = append(*scaffold, name)
	}
	return m.adoptRemoved(ref, rec, int(b.Calls[i].Ret))
}

// openScaffold opens a directory by its path without links, making what is
// missing of it.
func (m *Maker) openScaffold(path string, who Identity, scaffold *[]string) (int, error) {
	var b tracee.Batch
	m.become(&b, who)
	i := openPath(&b, path, unix.O_PATH|unix.O_DIRECTORY)
	b.Calls[i].Tolerate = true
	m.become(&b, m.self)
	if _, err := m.stub.Run(&b); err != nil {
		return 0, err
	}
	if err := b.Err(i); !errors.Is(err, unix.ENOENT) || path == "/" {
		return int(b.Calls[i].Ret), err
	}
	above, err := m.openScaffold(filepath.Dir(path), who, scaffold)
	if err != nil {
		return 0, err
	}
	var mk tracee.Batch
	m.become(&mk, who)
	made := mk.Try(unix.SYS_MKDIRAT, tracee.W(above), mk.String(filepath.Base(path)), tracee.W(0o700))
	m.become(&mk, m.self)
	mk.Add(unix.SYS_CLOSE, tracee.W(above))
	if _, err := m.stub.Run(&mk); err != nil {
		return 0, err
	}
	if err := mk.Err(made); err != nil {
		return 0, err
	}
	*scaffold = append(*scaffold, path)
	return m.openScaffold(path, who, scaffold)
}

// create adds the calls that make a file in the directory dir and take its name
// away, and returns the one whose result is a descriptor of it.
func (m *Maker) create(b *tracee.Batch, rec *image.Removed, dir int, path string) (i int) {
	at, name := tracee.W(dir), b.String(filepath.Base(path))
	const once = unix.O_CREAT | unix.O_EXCL | unix.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC
	const place = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	switch format := rec.Mode & unix.S_IFMT; {
	case rec.Link != "":
		b.Add(unix.SYS_LINKAT, tracee.W(unix.AT_FDCWD), b.String(rec.Link), at, name, tracee.W(0))
		i = b.Add(unix.SYS_OPENAT, at, name, tracee.W(place))
	case rec.Unnamed:
		return b.Add(unix.SYS_OPENAT, at, b.String("."), tracee.W(unix.O_TMPFILE|unix.O_CLOEXEC|m.flagsUnnamed(rec)), tracee.W(0o600))
	case format == unix.S_IFREG:
		i = b.Add(unix.SYS_OPENAT, at, name, tracee.W(once), tracee.W(0o600))
	case format == unix.S_IFDIR:
		b.Add(unix.SYS_MKDIRAT, at, name, tracee.W(0o700))
		return b.Add(unix.SYS_OPENAT, at, name, tracee.W(place|unix.O_DIRECTORY))
	case format == unix.S_IFLNK:
		b.Add(unix.SYS_SYMLINKAT, b.String(rec.Target), at, name)
		i = b.Add(unix.SYS_OPENAT, at, name, tracee.W(place))
	default:
		b.Add(unix.SYS_MKNODAT, at, name, tracee.W(rec.Mode&unix.S_IFMT|0o600), tracee.W(0))
		i = b.Add(unix.SYS_OPENAT, at, name, tracee.W(place))
	}
	b.Add(unix.SYS_UNLINKAT, at, name, tracee.W(0))
	return i
}

// adoptRemoved gives a new file its attributes and its place in the table. It may
// belong to anybody, for nobody else can reach it; but what would raise the
// rights of who executes it takes what would raise them anyway.
func (m *Maker) adoptRemoved(ref image.Ref, rec *image.Removed, fd int) error {
	mode := rec.Mode & 0o7777
	if m.bundle.Capabilities&(1<<unix.CAP_SETUID) == 0 || m.bundle.Capabilities&(1<<unix.CAP_SETGID) == 0 {
		mode &^= unix.S_ISUID | unix.S_ISGID
	}
	var b tracee.Batch
	dir, path := m.throughProc(fd)
	self := b.String(path)
	anchor := -1
	if rec.Link == "" {
		if rec.Mode&unix.S_IFMT == unix.S_IFREG {
			b.Add(unix.SYS_FTRUNCATE, tracee.W(fd), tracee.W(rec.Size))
		}
		b.Add(unix.SYS_FCHOWNAT, tracee.W(fd), b.String(""), tracee.W(rec.UID), tracee.W(rec.GID), tracee.W(unix.AT_EMPTY_PATH))
		if rec.Mode&unix.S_IFMT != unix.S_IFLNK {
			b.Add(unix.SYS_FCHMODAT, dir, self, tracee.W(mode))
		}
		if rec.Mode&unix.S_IFMT == unix.S_IFREG {
			anchor = b.Add(unix.SYS_OPENAT, dir, self, tracee.W(unix.O_PATH|unix.O_CLOEXEC))
			if !rec.Unnamed {
				b.Add(unix.SYS_CLOSE, tracee.W(fd))
			}
		}
	}
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	low := []int{fd}
	if anchor >= 0 {
		low[0] = int(b.Calls[anchor].Ret)
		if rec.Unnamed {
			low = append(low, fd)
		}
	}
	up, err := m.moveUp(low)
	if err != nil {
		return err
	}
	m.anchors[ref] = up[0]
	if len(up) > 1 {
		m.unnamed[ref] = up[1]
	}
	return nil
}

// flagsUnnamed is how the description was opened that made a file with
// O_TMPFILE. Only that open can give it the flag, by which it is known.
func (m *Maker) flagsUnnamed(rec *image.Removed) uint32 {
	for _, o := range m.head.Objects {
		if f, ok := o.(*image.File); ok && f.Flags&unix.O_TMPFILE == unix.O_TMPFILE && m.head.Removed(f.Removed) == rec && writes(f.Flags) {
			return f.Flags & openFlags
		}
	}
	return unix.O_RDWR
}

// openRemoved adds the open of a file without a name. What O_PATH has of a
// symbolic link cannot be opened through /proc, which would lead on.
func (m *Maker) openRemoved(b *tracee.Batch, f *image.File) int {
	fd := m.anchors[f.Removed]
	if made, ok := m.unnamed[f.Removed]; ok && f.Flags&unix.O_TMPFILE == unix.O_TMPFILE {
		return b.Add(unix.SYS_FCNTL, tracee.W(made), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0))
	}
	if m.head.Removed(f.Removed).Mode&unix.S_IFMT == unix.S_IFLNK {
		return b.Add(unix.SYS_FCNTL, tracee.W(fd), tracee.W(unix.F_DUPFD_CLOEXEC), tracee.W(0))
	}
	flags := f.Flags & openFlags
	if f.Kind == image.KindDirectory {
		flags |= unix.O_DIRECTORY
	}
	return m.reopen(b, fd, flags)
}

// fillRemoved writes bytes of a file without a name. One stays open for as long
// as its bytes come; none must be when the executables are set (ETXTBSY).
func (m *Maker) fillRemoved(ref image.Ref, offset uint64, data []byte) error {
	if m.filling != ref {
		if err := m.endFilling(); err != nil {
			return err
		}
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", m.stub.Pid, m.anchors[ref]), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		m.filling, m.file = ref, f
	}
	_, err := m.file.WriteAt(data, int64(offset))
	return err
}

func (m *Maker) endFilling() error {
	f := m.file
	m.filling, m.file = 0, nil
	if f == nil {
		return nil
	}
	return f.Close()
}

// stamp gives the files without a name their times, once they are filled.
func (m *Maker) stamp(b *tracee.Batch) {
	for _, ref := range Refs(m.head) {
		rec := m.head.Removed(ref)
		if rec == nil || rec.Link != "" {
			continue
		}
		var times []byte
		for _, ns := range []int64{rec.Atime, rec.Mtime} {
			t := unix.NsecToTimespec(ns)
			times = binary.LittleEndian.AppendUint64(times, uint64(t.Sec))
			times = binary.LittleEndian.AppendUint64(times, uint64(t.Nsec))
		}
		b.Add(unix.SYS_UTIMENSAT, tracee.W(m.anchors[ref]), b.String(""), b.Put(times), tracee.W(unix.AT_EMPTY_PATH))
	}
}

// restoreXattrs gives the files without a name their extended attributes, once they
// are filled: a write takes capabilities away. What would raise rights, or takes
// them, the bundle's own process must be able to give.
func (m *Maker) restoreXattrs() error {
	for _, ref := range Refs(m.head) {
		rec := m.head.Removed(ref)
		if rec == nil || rec.Link != "" {
			continue
		}
		for _, x := range rec.Xattrs {
			as := m.AsItself
			if !strings.HasPrefix(x.Name, "user.") && !strings.HasPrefix(x.Name, "system.") {
				as = m.AsBundle
			}
			var i int
			b, err := as(func(b *tracee.Batch) {
				i = b.Try(unix.SYS_SETXATTR, b.String(fmt.Sprintf("/proc/self/fd/%d", m.anchors[ref])), b.String(x.Name), b.Put(x.Value), tracee.W(len(x.Value)), tracee.W(0))
			})
			if err != nil {
				return err
			}
			if err := b.Err(i); err != nil {
				m.Warn("an extended attribute of a deleted file is left out", "path", rec.Path, "name", x.Name, "error", err)
			}
		}
	}
	return nil
}
