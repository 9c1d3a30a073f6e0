package runtime

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/cgroup"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/mount"
	"github.com/ocickpt/ocickpt/runtime/namespace"
	"github.com/ocickpt/ocickpt/runtime/rootfs"
	"github.com/ocickpt/ocickpt/runtime/sock"
	"github.com/ocickpt/ocickpt/runtime/task"
)

// container is the running container that a checkpoint is taken of.
type container struct {
	lib    *libcontainer.Container
	cgroup *cgroupfreeze.Cgroup
	// cgroupPaths are the cgroups' directories by controller.
	cgroupPaths map[string]string
	hierarchies []cgroup.Hierarchy
	spec        *specs.Spec
	record      image.Container
	root        *os.File // of its file system
	mounts      *mount.Set
	initPid     int
	pidDepth    int // levels of pid namespaces down to the container's
	inodes      map[string]uint64
	host        map[string]uint64 // the namespaces of this process, by type
	maps        task.IDMaps
	now         int64 // CLOCK_MONOTONIC outside, of the moment of record.Monotonic
	usual       task.Usual
	given       map[string]string // sysctls, by path, that it was started with
	ipcLimits   map[string]string // of a new ipc namespace, once they are known
	bounding    []string          // capabilities that its bundle gives
	// emptyNetwork: what is in its network namespace is left to its engine.
	emptyNetwork bool
	sysctls      map[uint64]map[string]string // of network namespaces, by inode
	// promise has the guardian undo what reading queues of sockets changes.
	promise sock.Promise
	// promisePosition has it undo what reading on in directories changes.
	promisePosition func(f *os.File, offset int64) (kept func() error, err error)
	// refuseGuests: processes brought in from outside are not to be kept.
	refuseGuests bool
	places       *file.Places  // where watched files were found
	rootDiff     rootfs.Source // nil: not asked for
	sockets      sock.Choices
	external     []file.Key // of open files that are left out
}

// load reads what the engine and the kernel know of a container, and refuses
// what can be refused by that alone.
func load(root, id string) (*container, error) {
	lib, err := libcontainer.Load(root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		return nil, unknown(root, id)
	}
	if err != nil {
		return nil, err
	}
	status, err := lib.Status()
	if err != nil {
		return nil, err
	}
	if status != libcontainer.Running && status != libcontainer.Paused {
		return nil, &fail.Error{Cause: fmt.Errorf("container %q is %s", id, status), Remedy: "only running and paused containers can be checkpointed"}
	}
	c := &container{lib: lib, places: file.NewPlaces()}
	if err := c.describe(root); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func unknown(root, id string) error {
	return &fail.Error{Cause: fmt.Errorf("container %q does not exist", id), Remedy: "`runc --root " + root + " list` shows those that do"}
}

// lockPatience and lockPause bound the waiting for another journey's end.
const (
	lockPatience = time.Second
	lockPause    = 5 * time.Millisecond
)

// lockState keeps two journeys of one container apart: each would take what the
// other does to it for the engine's doing.
func lockState(root, id string) (*os.File, error) {
	f, err := os.Open(filepath.Join(root, id))
	if errors.Is(err, os.ErrNotExist) || id == "" || filepath.Base(id) != id {
		return nil, unknown(root, id)
	}
	if err != nil {
		return nil, err
	}
	// The guardian of one that died holds on to the lock while it puts the
	// container back, which takes milliseconds.
	for begin := time.Now(); ; time.Sleep(lockPause) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Since(begin) > lockPatience {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = &fail.Error{Cause: fmt.Errorf("another checkpoint of container %q is running", id), Remedy: "wait for it"}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (c *container) Close() error {
	var errs error
	if c.root != nil {
		errs = c.root.Close()
	}
	if c.rootDiff != nil {
		errs = errors.Join(errs, c.rootDiff.Close())
	}
	if c.mounts != nil {
		errs = errors.Join(errs, c.mounts.Close())
	}
	return errs
}

// describe fills in the image's record of the container.
func (c *container) describe(root string) error {
	state, err := c.lib.State()
	if err != nil {
		return err
	}
	c.initPid = state.InitProcessPid
	config := c.lib.Config()
	c.given = sysctlsOf(config.Sysctl)
	c.record = image.Container{
		ID: c.lib.ID(), Runtime: root, Bundle: label(&config, "bundle"), Stdio: state.ExternalDescriptors,
		Hostname: config.Hostname, Domainname: config.Domainname,
	}
	for _, step := range []func(*libcontainer.State, *configs.Config) error{
		c.openRoot, c.readSpec, c.readCgroups, c.readNamespaces, c.readMounts, c.readNames,
	} {
		if err := step(state, &config); err != nil {
			return err
		}
	}
	return nil
}

func (c *container) openRoot(*libcontainer.State, *configs.Config) (err error) {
	c.root, err = os.Open(fmt.Sprintf("/proc/%d/root", c.initPid))
	return goneIs(c.initPid, err)
}

// label reads one of the labels that runc keeps in the configuration.
func label(config *configs.Config, key string) string {
	for _, l := range config.Labels {
		if v, ok := strings.CutPrefix(l, key+"="); ok {
			return v
		}
	}
	return ""
}

func (c *container) readSpec(_ *libcontainer.State, config *configs.Config) (err error) {
	if c.record.Spec, err = os.ReadFile(filepath.Join(c.record.Bundle, "config.json")); err != nil {
		return fmt.Errorf("the container's bundle: %w", err)
	}
	c.spec = &specs.Spec{}
	if err := json.Unmarshal(c.record.Spec, c.spec); err != nil {
		return fmt.Errorf("%s/config.json: %w", c.record.Bundle, err)
	}
	// What restore would refuse for the bundle's sake is refused now.
	if err := checkBundle(c.spec); err != nil {
		return fail.On("bundle "+c.record.Bundle, err)
	}
	if caps := c.spec.Process.Capabilities; caps != nil {
		c.bounding = caps.Bounding
	}
	c.record.Annotations = c.spec.Annotations
	c.record.Config, err = json.Marshal(config)
	return err
}

func (c *container) readCgroups(state *libcontainer.State, _ *configs.Config) (err error) {
	c.cgroupPaths = state.CgroupPaths
	if c.cgroup, err = cgroupfreeze.Open(state.CgroupPaths); err != nil {
		return err
	}
	if err = c.findCgroups(); err != nil {
		return err
	}
	cpus := filepath.Join(state.CgroupPaths["cpuset"], "cpuset.effective_cpus")
	if unified := state.CgroupPaths[""]; unified != "" && state.CgroupPaths["cpuset"] == "" {
		cpus = filepath.Join(unified, "cpuset.cpus.effective")
	}
	if c.usual, err = task.NewUsual(cpus); err != nil {
		return err
	}
	if c.record.Paused, err = c.cgroup.Frozen(); err != nil {
		return err
	}
	c.record.SubCgroups, err = c.cgroup.SubCgroups()
	return err
}

func (c *container) readNamespaces(_ *libcontainer.State, config *configs.Config) (err error) {
	if c.inodes, err = nsutil.Of(c.initPid); err != nil {
		return goneIs(c.initPid, err)
	}
	host, err := nsutil.Of(os.Getpid())
	if err != nil {
		return err
	}
	c.host = host
	for _, kind := range nsutil.Types {
		inode, ok := c.inodes[kind]
		if !ok {
			continue
		}
		ns := image.Namespace{Type: kind, Inode: inode, Host: inode == host[kind]}
		for _, n := range config.Namespaces {
			if configs.NsName(n.Type) == kind {
				ns.Path = n.Path
			}
		}
		ns.Owner, _ = nsutil.Owner(nsutil.Path(c.initPid, kind))
		c.record.Namespaces = append(c.record.Namespaces, ns)
	}
	if c.inodes["pid"] == host["pid"] {
		return fail.Refuse("pid namespace", "the container has none of its own, so its pids cannot be given again", "give it one (linux.namespaces pid)")
	}
	if owner, err := nsutil.Owner(nsutil.Path(c.initPid, "pid")); err != nil || owner != c.inodes["user"] {
		return errors.Join(goneIs(c.initPid, err), fail.Refuse("user namespace", "the container's init has left the one that it was started in; that is not supported yet", ""))
	}
	if c.inodes["user"] != host["user"] {
		if c.maps, err = readIDMaps(c.initPid); err != nil {
			return err
		}
		c.record.UIDMap, c.record.GIDMap = c.maps.UID, c.maps.GID
	}
	status, err := task.ReadStatus(c.initPid)
	if err != nil {
		return err
	}
	c.pidDepth = len(status.NSpid)
	return nil
}

func readIDMaps(pid int) (m task.IDMaps, err error) {
	read := func(name string) (out []image.IDMap, err error) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			return nil, goneIs(pid, err)
		}
		for line := range strings.Lines(string(b)) {
			var r image.IDMap
			if _, err := fmt.Sscan(line, &r.Container, &r.Host, &r.Size); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			out = append(out, r)
		}
		return out, nil
	}
	if m.UID, err = read("uid_map"); err != nil {
		return m, err
	}
	m.GID, err = read("gid_map")
	return m, err
}

// readMounts reads the init's mounts and refuses those that cannot be made again.
func (c *container) readMounts(_ *libcontainer.State, config *configs.Config) error {
	if c.mounts != nil {
		_ = c.mounts.Close()
	}
	var err error
	c.mounts, err = mount.Scan(mount.Env{
		Init: c.initPid, Root: c.root, Config: config, May: slices.Contains(c.bounding, "CAP_SYS_ADMIN"),
		PidNS: c.inodes["pid"], Groups: c.record.Cgroups, Maps: c.maps,
	})
	if err != nil {
		return goneIs(c.initPid, err)
	}
	c.record.Mounts, c.record.Unmounted = c.mounts.Mounts, c.mounts.Unmounted
	return nil
}

// readNames notes the names that the container has given itself, and its label.
func (c *container) readNames(_ *libcontainer.State, config *configs.Config) error {
	if err := c.readUTS(config); err != nil {
		return err
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", c.initPid)); err == nil {
		c.record.LSM = strings.TrimRight(string(b), "\n\x00")
	}
	return nil
}

// readUTS notes a host or domain name other than the container was started with.
func (c *container) readUTS(config *configs.Config) error {
	c.record.UTS = nil
	if !c.owns("uts") {
		return nil
	}
	live, err := namespace.ReadUTS(nsutil.Path(c.initPid, "uts"))
	if err != nil {
		return goneIs(c.initPid, err)
	}
	given, err := givenNames(config)
	switch {
	case err != nil || *live == *given:
		return err
	case !slices.Contains(c.bounding, "CAP_SYS_ADMIN"):
		c.warn("the host name %q or domain name %q was changed from outside, for the bundle lets no task do so: the bundle's are restored", live.Hostname, live.Domainname)
		return nil
	}
	c.record.UTS = live
	return nil
}

// givenNames are the names that a container starts with: the bundle's, or else the
// host's.
func givenNames(config *configs.Config) (*image.UTSNamespace, error) {
	given, err := namespace.ReadUTS("")
	if err != nil {
		return nil, err
	}
	given.Hostname = cmp.Or(config.Sysctl["kernel.hostname"], config.Hostname, given.Hostname)
	given.Domainname = cmp.Or(config.Sysctl["kernel.domainname"], config.Domainname, given.Domainname)
	return given, nil
}

// owns reports a namespace that is the container's alone.
func (c *container) owns(kind string) bool {
	return !slices.ContainsFunc(c.record.Namespaces, func(n image.Namespace) bool {
		return n.Type == kind && (n.Host || n.Path != "")
	})
}

// lookAgain repeats, at the stop, the checks that what runs can invalidate.
func (c *container) lookAgain() error {
	config := c.lib.Config()
	for _, check := range []func(*libcontainer.State, *configs.Config) error{c.readMounts, c.readNames} {
		if err := check(nil, &config); err != nil {
			return err
		}
	}
	return nil
}

// readClocks notes the container's clocks, which a task of it tells. It is
// called at the stop.
func (c *container) readClocks(teller int) (err error) {
	c.record.Monotonic, c.record.Boottime, c.now, err = namespace.Clocks(teller)
	return goneIs(teller, err)
}

// leaveOut notes the open files that are not to be in the image.
func (c *container) leaveOut(keys []string) error {
	for _, text := range keys {
		key, err := file.ParseKey(text)
		if err != nil {
			return err
		}
		c.external = append(c.external, key)
	}
	return nil
}

// promiseFor is for reading queues, which needs everybody to be stopped.
func (c *container) promiseFor(running bool) sock.Promise {
	if running {
		return nil
	}
	return c.promise
}

func (c *container) warn(format string, args ...any) {
	if w := fmt.Sprintf(format, args...); !slices.Contains(c.record.Warnings, w) {
		c.record.Warnings = append(c.record.Warnings, w)
	}
}
