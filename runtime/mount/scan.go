package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// Env is what the room must know of the container.
type Env struct {
	Init   int      // pid of its init, on the host
	Root   *os.File // of its file system
	Config *configs.Config
	May    bool              // its bundle gives CAP_SYS_ADMIN, without which nobody mounts
	PidNS  uint64            // inode of its pid namespace
	Groups map[string]string // its cgroups by controller
	Maps   task.IDMaps
}

// Set is every mount of a container, or of a mount namespace that a task of it has
// made.
type Set struct {
	Env
	Mounts []image.Mount
	// Unmounted are points at which the bundle has mounted something that the
	// container has taken away.
	Unmounted []string

	infos []*mountinfo.Info // as Mounts
	own   bool              // some are the container's
	host  []*mountinfo.Info
	views map[int]*os.File

	// Of a mount namespace that a task has made: the container's set and those of
	// the namespaces before, and which pid namespaces its new /procs show, by the
	// ids of their mounts.
	nested *Nested
	outer  []*Set
	Spaces map[int]uint64
}

// Scan reads a container's mounts and tells whose they are. It refuses those that
// could not be made again.
func Scan(env Env) (*Set, error) {
	s := &Set{Env: env, views: map[int]*os.File{}}
	var err error
	if s.infos, err = Read(env.Init); err != nil {
		return nil, err
	}
	s.Mounts = Records(s.infos)
	left, err := s.classify()
	if err != nil {
		return nil, err
	}
	if env.May {
		s.findUnmounted(left)
	}
	if slices.Contains(s.Unmounted, "/proc") {
		return nil, fail.Refuse("mount /proc", "the container has unmounted it, and is restored through it", "mount it again before the checkpoint")
	}
	if !s.own {
		return s, nil
	}
	if err := s.recipes(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	for i := range s.Mounts {
		if m := &s.Mounts[i]; m.Own != "" {
			if err := s.check(m); err != nil {
				return nil, errors.Join(fail.On("mount "+m.Point, err), s.Close())
			}
		}
	}
	return s, nil
}

// Own reports whether the container has made mounts itself.
func (s *Set) Own() bool { return s.own }

// Close releases what the set holds open.
func (s *Set) Close() error {
	var errs error
	for _, f := range s.views {
		errs = errors.Join(errs, f.Close())
	}
	clear(s.views)
	if s.nested != nil {
		errs = errors.Join(errs, s.Root.Close())
	}
	return errs
}

// byID is the mount with an id, nil for one that the container does not have.
func (s *Set) byID(id int) *image.Mount {
	for i := range s.Mounts {
		if s.Mounts[i].ID == id {
			return &s.Mounts[i]
		}
	}
	return nil
}

// want is a mount that the bundle makes: of any type, or a new file system.
type want struct{ kind, source string }

// expect lists what a bundle mounts by its points.
func expect(config *configs.Config) map[string][]want {
	out := map[string][]want{"/": {{}}, "/dev/console": {{}}}
	for _, m := range config.Mounts {
		w := want{m.Device, m.Source}
		if m.IsBind() || !fresh[m.Device] || m.Device == "cgroup" {
			w = want{}
		}
		out[filepath.Clean(m.Destination)] = append(out[filepath.Clean(m.Destination)], w)
	}
	for _, p := range slices.Concat(config.MaskPaths, config.ReadonlyPaths) {
		out[filepath.Clean(p)] = append(out[filepath.Clean(p)], want{})
	}
	for _, d := range config.Devices {
		out[d.Path] = append(out[d.Path], want{}) // a bind mount inside a user namespace
	}
	return out
}

// classify marks the mounts that are not the bundle's, and returns what is left
// of those that the bundle makes.
func (s *Set) classify() (map[string][]want, error) {
	left := expect(s.Config)
	s.followLinks(left)
	bundles := map[int]bool{}
	for i := range s.Mounts {
		m := &s.Mounts[i]
		wants := left[m.Point]
		switch above := bundles[m.Parent] || m.Point == "/"; {
		case !s.May && wants != nil, above && s.below(i):
			bundles[m.ID] = true
			continue
		case above && len(wants) > 0 && (wants[0].kind == "" || wants[0].kind == m.FSType && wants[0].source == m.Source):
			left[m.Point] = wants[1:]
			bundles[m.ID] = true
			continue
		case !s.May:
			return nil, fail.Refuse("mount "+m.Point, "it is not the bundle's, and without CAP_SYS_ADMIN in the bundle, which this "+m.FSType+" would take, it cannot be mounted again", "unmount it before the checkpoint")
		}
		s.own, m.Own = true, image.MountNew
	}
	return left, nil
}

// followLinks adds where bind mounts of the bundle stand that it asks for at paths
// through symbolic links of the root, such as /var/run.
func (s *Set) followLinks(wants map[string][]want) {
	for _, m := range s.Config.Mounts {
		point := filepath.Clean(m.Destination)
		if !m.IsBind() || s.Root == nil || slices.ContainsFunc(s.Mounts, func(r image.Mount) bool { return r.Point == point }) {
			continue
		}
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
		fd, err := unix.Openat2(int(s.Root.Fd()), point, &how)
		if err != nil {
			continue
		}
		to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		_ = unix.Close(fd)
		if err == nil && to != point {
			delete(wants, point)
			wants[to] = append(wants[to], want{})
		}
	}
}

// below reports a mount under one of the bundle's own that comes with it:
// libcontainer mounts every cgroup v1 controller below one "cgroup" entry, and a
// recursive bind mount brings along what the host has there.
func (s *Set) below(i int) bool {
	point := s.Mounts[i].Point
	for _, m := range s.Config.Mounts {
		if !strings.HasPrefix(point, filepath.Clean(m.Destination)+"/") {
			continue
		}
		if m.Device == "cgroup" || m.IsBind() && m.Flags&unix.MS_REC != 0 && (!s.May || s.hosts(s.infos[i])) {
			return true
		}
	}
	return false
}

// hosts reports a mount of something that the host has mounted too.
func (s *Set) hosts(m *mountinfo.Info) bool {
	if s.host == nil {
		s.host, _ = Read(os.Getpid())
	}
	return slices.ContainsFunc(s.host, func(h *mountinfo.Info) bool { return h.Major == m.Major && h.Minor == m.Minor && h.Root == m.Root })
}

// findUnmounted tells what the container has unmounted. Paths that are not there
// libcontainer does not mask.
func (s *Set) findUnmounted(left map[string][]want) {
	always := map[string]bool{}
	for _, m := range s.Config.Mounts {
		always[filepath.Clean(m.Destination)] = m.Device != "cgroup"
	}
	delete(left, "/dev/console") // there may be none
	for _, d := range s.Config.Devices {
		delete(left, d.Path) // mounted only inside a user namespace
	}
	for _, point := range slices.Sorted(maps.Keys(left)) {
		if len(left[point]) == 0 {
			continue
		}
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS}
		fd, err := unix.Openat2(int(s.Root.Fd()), point, &how)
		if err != nil && (!always[point] || errors.Is(err, unix.ELOOP)) {
			continue // not there, or mounted where links of the root led
		}
		_ = unix.Close(fd)
		s.Unmounted = append(s.Unmounted, point)
	}
}

// recipes tells how each mount of the container's own is made: a new file system,
// or a part of one that is mounted elsewhere.
func (s *Set) recipes() error {
	for i := range s.Mounts {
		if m := &s.Mounts[i]; m.Own != "" && s.source(s.infos[i], func(o *image.Mount) bool { return o.Own == "" }) == nil {
			whole := m.Root == "/" || (m.FSType == "cgroup" || m.FSType == "cgroup2") && slices.Contains(slices.Collect(maps.Values(s.Groups)), m.Root)
			if !whole || s.source(s.infos[i], func(o *image.Mount) bool { return o.ID != m.ID && o.Root == m.Root && o.From == -1 }) != nil {
				continue
			}
			m.From = -1 // made anew, for now
		}
	}
	for i := range s.Mounts {
		m := &s.Mounts[i]
		if m.Own == "" || m.From == -1 {
			continue
		}
		from := s.source(s.infos[i], func(o *image.Mount) bool { return o.Own == "" || o.From == -1 })
		if from == nil {
			return fail.Refuse("mount "+m.Point, "what this "+m.FSType+" was bound from, "+m.Root+", is not mounted in the container any more, or never was", "unmount it before the checkpoint")
		}
		m.Own, m.From = image.MountBind, from.ID
	}
	for i := range s.Mounts {
		if m := &s.Mounts[i]; m.From == -1 {
			m.From = 0
		}
	}
	return nil
}

// source is a mount of the set, among those that may be one, of the same file
// system as another that has its root in it.
func (s *Set) source(m *mountinfo.Info, may func(*image.Mount) bool) (found *image.Mount) {
	for j, o := range s.infos {
		if o.Major != m.Major || o.Minor != m.Minor || !within(m.Root, o.Root) || !may(&s.Mounts[j]) {
			continue
		}
		if perNamespace(m.FSType) && o.Source != m.Source {
			continue
		}
		if found == nil || len(o.Root) > len(found.Root) {
			found = &s.Mounts[j]
		}
	}
	return found
}

// check refuses a mount of the container's own that cannot be made again.
func (s *Set) check(m *image.Mount) error {
	parent := s.byID(m.Parent)
	if _, err := attributesOf(m.Options); err != nil {
		return err
	}
	switch {
	case slices.Contains(strings.Split(m.Options, ","), idmapped):
		return fail.Refuse("", "it is idmapped, and nothing tells how", "unmount it before the checkpoint")
	case s.nested == nil && m.Point == "/proc" && (m.FSType != "proc" || m.Root != "/"):
		return fail.Refuse("", "it hides the container's /proc, through which it is restored", "unmount it before the checkpoint")
	case strings.HasSuffix(m.Root, "//deleted"):
		return fail.Refuse("", "what was mounted there is deleted", "unmount it before the checkpoint")
	case parent == nil && (s.nested == nil || m.Point != "/"):
		return fail.Refuse("", "it stands on nothing that can be reached there", "")
	case parent != nil && s.handsOut(parent):
		return fail.Refuse("", "what it stands on is shared with mounts outside of the container, and it would appear there once more", "unmount it before the checkpoint, or do not share "+parent.Point+" with the host")
	}
	err := s.checkGroups(m)
	if err == nil && s.nested != nil {
		err = s.checkNested(parent)
	}
	if err != nil || m.Own == image.MountBind {
		return err
	}
	if !fresh[m.FSType] && !ofKernel[m.FSType] {
		return fail.Refuse("", "a file system of type "+m.FSType+" that the container has mounted itself is not supported", "unmount it before the checkpoint")
	}
	options, err := optionsOf(m, s.Maps)
	if err != nil {
		return err
	}
	switch m.FSType {
	case "proc":
		return s.checkProc(m)
	case "devpts":
		return s.checkDevpts(m)
	case "overlay":
		return checkOverlay(options)
	case "hugetlbfs":
		return s.checkEmpty(m)
	}
	return nil
}

// handsOut reports a mount that is in a peer group of the host's.
func (s *Set) handsOut(m *image.Mount) bool {
	peers := sharingOf(m.Optional).peers
	if peers == 0 {
		return false
	}
	if s.host == nil {
		s.host, _ = Read(os.Getpid())
	}
	return slices.ContainsFunc(s.host, func(h *mountinfo.Info) bool { return sharingOf(h.Optional).peers == peers })
}

// checkGroups refuses a mount that gets events from outside if its source does
// not either, and peer groups none of whose mounts shows all that the others do:
// the kernel puts a mount into the group of one that it lies in
// (MOVE_MOUNT_SET_GROUP of move_mount(2)).
func (s *Set) checkGroups(m *image.Mount) error {
	is, all := sharingOf(m.Optional), s.all()
	if is.master != 0 && leader(all, is.master) == nil {
		i := slices.IndexFunc(all, func(o image.Mount) bool { return o.ID == m.From })
		if i < 0 || sharingOf(all[i].Optional).master == 0 {
			return fail.Refuse("", "it gets mount events from outside of the container", "make it private before the checkpoint")
		}
	}
	for _, group := range []int{is.peers, is.master} {
		if l := leader(all, group); l != nil && !within(m.Root, l.Root) {
			return fail.Refuse("", "no mount of its peer group shows all that the others do", "make it private before the checkpoint")
		}
	}
	return nil
}

// leader is the mount of a peer group with the shortest root.
func leader(mounts []image.Mount, group int) (found *image.Mount) {
	for i := range mounts {
		m := &mounts[i]
		if group != 0 && sharingOf(m.Optional).peers == group && (found == nil || len(m.Root) < len(found.Root)) {
			found = m
		}
	}
	return found
}

// checkProc refuses a /proc of another pid namespace than the container's: its
// own process 1 tells.
func (s *Set) checkProc(m *image.Mount) error {
	f, err := s.View(m.ID)
	if err != nil {
		return err
	}
	link := make([]byte, 64)
	n, err := unix.Readlinkat(int(f.Fd()), "1/ns/pid", link)
	if err != nil {
		return fail.Refuse("", "which pid namespace it shows cannot be told: "+err.Error(), "unmount it before the checkpoint")
	}
	inode, err := nsutil.Parse(string(link[:n]))
	if err == nil && s.nested != nil {
		s.Spaces[m.ID] = inode
		return s.nested.Shows(inode)
	}
	if err != nil || inode != s.PidNS {
		return fail.Refuse("", "it does not show the container's pid namespace", "unmount it before the checkpoint")
	}
	return nil
}

// checkDevpts refuses terminals of a file system of their own.
func (s *Set) checkDevpts(m *image.Mount) error {
	names, err := s.list(m)
	if i := slices.IndexFunc(names, func(name string) bool { return name != "ptmx" }); i >= 0 {
		return fail.Refuse("", "there is the terminal "+names[i]+" in it; terminals outside of the bundle's /dev/pts are not supported", "close it before the checkpoint")
	}
	return err
}

// checkEmpty refuses a file system whose files nobody can save.
func (s *Set) checkEmpty(m *image.Mount) error {
	names, err := s.list(m)
	if len(names) > 0 {
		return fail.Refuse("", "there is "+names[0]+" in it; files of a "+m.FSType+" are not supported", "remove it before the checkpoint")
	}
	return err
}

func (s *Set) list(m *image.Mount) ([]string, error) {
	f, err := s.View(m.ID)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Openat(int(f.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), m.Point)
	defer dir.Close()
	return dir.Readdirnames(-1)
}

// checkOverlay refuses layers whose paths say nothing by themselves.
func checkOverlay(options []option) error {
	for _, o := range options {
		switch o.key {
		case "lowerdir", "upperdir", "workdir", "lowerdir+", "datadir+":
			for path := range strings.SplitSeq(o.value, ":") {
				if path != "" && !strings.HasPrefix(path, "/") {
					return fail.Refuse("", "its layer "+path+" is not an absolute path", "mount it with absolute paths")
				}
			}
		}
	}
	return nil
}

// Covered reports whether the file of st is the one at path, as the container's
// init would see it if nothing were mounted on the mount with an id.
func (s *Set) Covered(id int, path string, st *unix.Stat_t) bool {
	m := s.byID(id)
	if m == nil {
		return false
	}
	rel, ok := image.Below(path, m.Point)
	if !ok {
		return false
	}
	f, err := s.View(id)
	if err != nil {
		return false
	}
	now, err := statIn(f, rel)
	return err == nil && now.Dev == st.Dev && now.Ino == st.Ino
}

func statIn(f *os.File, rel string) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if rel == "." {
		return &st, unix.Fstat(int(f.Fd()), &st)
	}
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(int(f.Fd()), rel, &how)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return &st, unix.Fstat(fd, &st)
}

// View opens the root of a mount, seen as if nothing were mounted on it: a clone
// of it that is mounted nowhere.
func (s *Set) View(id int) (*os.File, error) {
	if f := s.views[id]; f != nil {
		return f, nil
	}
	m := s.byID(id)
	if m == nil {
		return nil, fmt.Errorf("there is no mount %d", id)
	}
	f, err := s.open(m)
	if errors.Is(err, fs.ErrNotExist) && s.byID(id) == nil {
		return nil, err
	}
	if err != nil {
		return nil, fail.On("mount "+m.Point, fmt.Errorf("look into it: %w", err))
	}
	s.views[id] = f
	return f, nil
}

// open clones a mount, on a thread that has entered the container's mount
// namespace and ends there.
func (s *Set) open(m *image.Mount) (f *os.File, err error) {
	err = nsutil.Inside("", func() error {
		from, err := enter(s.Init)
		if err != nil {
			return err
		}
		defer from.Close()
		fd, err := visible("", m.Point, m.ID)
		if errors.Is(err, errCovered) || err == nil && sharingOf(m.Optional).unbindable {
			_ = unix.Close(fd)
			fd, err = s.uncover(from, m)
		}
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		clone, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.AT_EMPTY_PATH|unix.O_CLOEXEC)
		if err != nil {
			return fmt.Errorf("open_tree: %w", err)
		}
		f = os.NewFile(uintptr(clone), m.Point)
		return nil
	})
	return f, err
}

// enter makes the calling thread one of a process's mount namespace, and returns
// its own directory of /proc, through which it still sees where it came from.
func enter(pid int) (*os.File, error) {
	from, err := os.Open("/proc/thread-self")
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(nsutil.Path(pid, "mnt"))
	if err == nil {
		defer ns.Close()
		err = unix.Unshare(unix.CLONE_FS) // setns(2) changes root and cwd
	}
	if err == nil {
		err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
	}
	if err != nil {
		return nil, errors.Join(err, from.Close())
	}
	return from, nil
}

var errCovered = errors.New("another mount covers it")

// visible opens the root of a mount at its point, below a base.
func visible(base, point string, id int) (int, error) {
	fd, top, err := topmost(filepath.Join(base, point))
	if err == nil && top != id || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = errCovered
	}
	if err != nil && fd >= 0 {
		_ = unix.Close(fd)
	}
	return fd, err
}

// topmost opens what is at a path, and tells the id of its mount.
func topmost(path string) (fd, id int, err error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
	if fd, err = unix.Openat2(unix.AT_FDCWD, path, &how); err != nil {
		return -1, 0, err
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st)
	return fd, int(st.Mnt_id), err
}

// uncover opens a mount that others cover, or that cannot be cloned for being
// unbindable, among copies of which nothing is, and from which those that cover it
// are taken away.
func (s *Set) uncover(from *os.File, m *image.Mount) (int, error) {
	base, err := s.copyMounts(from, m)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Openat(int(from.Fd()), "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	list, err := readMounts(fd)
	if err != nil {
		return -1, err
	}
	chain := s.chain(base, m, list)
	if chain == nil {
		return -1, errCovered
	}
	for range list {
		fd, err := visible(base, m.Point, chain[len(chain)-1])
		if !errors.Is(err, errCovered) {
			return fd, err
		}
		if err := takeCover(base, m.Point, chain); err != nil {
			return -1, fmt.Errorf("%w, and that cannot be taken away in a copy: %w", errCovered, err)
		}
	}
	return -1, errCovered
}

func readMounts(fd int) ([]*mountinfo.Info, error) {
	f := os.NewFile(uintptr(fd), "mountinfo")
	defer f.Close()
	return mountinfo.GetMountsFromReader(f, nil)
}

// aside is where copies of a container's mounts are put in a namespace that goes
// with the thread.
const aside = "/proc"

// copyMounts gives the calling thread, which is in the container's mount namespace,
// one of its own with copies of all mounts below the base that it returns. Those
// of a user namespace would be locked together (mount_namespaces(7)), and are
// carried over as a tree; that lacks unbindable ones.
func (s *Set) copyMounts(from *os.File, m *image.Mount) (base string, err error) {
	carry := (s.Maps.UID != nil || s.nested != nil && s.nested.Foreign) && !sharingOf(m.Optional).unbindable
	tree := -1
	if carry {
		if tree, err = unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE|unix.O_CLOEXEC); err != nil {
			return "", err
		}
		defer unix.Close(tree)
		own, err := unix.Openat(int(from.Fd()), fmt.Sprintf("../../../%d/ns/mnt", os.Getpid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(own)
		if err := unix.Setns(own, unix.CLONE_NEWNS); err != nil {
			return "", err
		}
		base = aside
	}
	if err = unix.Unshare(unix.CLONE_NEWNS); err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil && carry {
		err = unix.MoveMount(tree, "", unix.AT_FDCWD, base, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	return base, err
}

// chain finds, among copies below a base, those of a mount and of all that it
// stands on, the root first. On one directory of a mount stands one other.
func (s *Set) chain(base string, m *image.Mount, list []*mountinfo.Info) (ids []int) {
	var way []*mountinfo.Info
	for id := m.ID; len(way) <= len(s.infos); {
		i := slices.IndexFunc(s.infos, func(o *mountinfo.Info) bool { return o.ID == id })
		if i < 0 {
			break
		}
		way, id = append(way, s.infos[i]), s.infos[i].Parent
	}
	for _, w := range slices.Backward(way) {
		i := slices.IndexFunc(list, func(o *mountinfo.Info) bool {
			same := o.Mountpoint == filepath.Join("/", base, w.Mountpoint) && o.Major == w.Major && o.Minor == w.Minor && o.Root == w.Root
			return same && (len(ids) == 0 || o.Parent == ids[len(ids)-1])
		})
		if i < 0 {
			return nil
		}
		ids = append(ids, list[i].ID)
	}
	return ids
}

// takeCover unmounts the first mount on the way from a base to a point that is
// not one of a chain.
func takeCover(base, point string, chain []int) error {
	at := filepath.Join("/", base)
	for _, name := range append([]string{""}, strings.Split(strings.Trim(point, "/"), "/")...) {
		at = filepath.Join(at, name)
		fd, id, err := topmost(at)
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
		if !slices.Contains(chain, id) {
			return unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	}
	// All of the way is the chain's, but a later part of it than the mount's.
	return unix.EINVAL
}
