package image

import (
	"errors"
	"fmt"
	"path"
	"reflect"
	"slices"
	"strings"
)

// Bounds on single fields, each from the kernel's own limit where it has one.
const (
	maxString = 64 << 10 // any name; overlay mount options are the longest
	maxSpec   = 16 << 20 // a JSON configuration
	maxComm   = 15       // TASK_COMM_LEN without its NUL
	maxPIDs   = 33       // MAX_PID_NS_LEVEL and the initial namespace
	maxSignal = 64       // _NSIG
	userEnd   = 1 << 56  // end of user addresses with five-level page tables
)

var namespaceTypes = []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"}

// checkStrings checks every Go string below v: the kernel's names end at NUL,
// so one inside a name would name something else than was checked.
func checkStrings(v any) error { return walkStrings(reflect.ValueOf(v)) }

func walkStrings(v reflect.Value) error {
	switch v.Kind() {
	case reflect.String:
		return checkString(v.String())
	case reflect.Pointer:
		if !v.IsNil() {
			return walkStrings(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if err := walkStrings(v.Field(i)); err != nil {
				return err
			}
		}
	case reflect.Slice:
		return walkSlice(v)
	case reflect.Map:
		for _, k := range v.MapKeys() {
			if err := first(walkStrings(k), walkStrings(v.MapIndex(k))); err != nil {
				return err
			}
		}
	}
	return nil
}

func walkSlice(v reflect.Value) error {
	switch v.Type().Elem().Kind() {
	case reflect.String, reflect.Struct, reflect.Pointer:
	default:
		return nil // numbers and blobs
	}
	for i := range v.Len() {
		if err := walkStrings(v.Index(i)); err != nil {
			return err
		}
	}
	return nil
}

func checkString(s string) error {
	if len(s) > maxString {
		return fmt.Errorf("a name of %d bytes is longer than %d", len(s), maxString)
	}
	if strings.ContainsRune(s, 0) {
		return fmt.Errorf("the name %s has a NUL in it", quote(s))
	}
	return nil
}

func checkHeader(h *Header) error {
	switch {
	case h.Magic != HeaderMagic:
		return ErrNotImage
	case h.Revision > Revision:
		return &RevisionError{Image: h.Revision, Supported: Revision}
	case h.Revision == 0:
		return errors.New("format revision 0 does not exist")
	case h.ByteOrder != "little":
		return fmt.Errorf("byte order %s is not supported, only \"little\" is", quote(h.ByteOrder))
	}
	return nil
}

func checkArch(a *Arch) error {
	if a.PageSize != PageSize {
		return fmt.Errorf("page size %d is not supported, only %d is", a.PageSize, PageSize)
	}
	seen := map[uint32]bool{}
	for _, c := range a.XLayout {
		if c.Number >= maxXComponent || seen[c.Number] || c.Offset > maxXState || c.Size > maxXState-c.Offset {
			return fmt.Errorf("component %d of the extended state is not valid or stands twice", c.Number)
		}
		seen[c.Number] = true
	}
	return nil
}

// maxXComponent is the bit of XCR0 that stands for no component.
const maxXComponent = 63

func checkContainer(c *Container) error {
	if len(c.Spec) > maxSpec || len(c.Config) > maxSpec {
		return fmt.Errorf("a configuration is longer than %d bytes", maxSpec)
	}
	if len(c.Stdio) > 3 {
		return fmt.Errorf("it gives %d standard streams, there are 3", len(c.Stdio))
	}
	var last Ref
	for _, ns := range c.Namespaces {
		if ns.Ref <= last {
			return fmt.Errorf("reference %d of a %s namespace does not ascend", ns.Ref, quote(ns.Type))
		}
		if !slices.Contains(namespaceTypes, ns.Type) {
			return fmt.Errorf("%s is no type of namespace", quote(ns.Type))
		}
		last = ns.Ref
	}
	if n := c.UTS; n != nil && (len(n.Hostname) > maxHostname || len(n.Domainname) > maxHostname) {
		return fmt.Errorf("its names are longer than %d bytes", maxHostname)
	}
	_, err := c.OwnMounts()
	return first(err, checkSubs(c.Subs), checkLimits(c.IPC))
}

// maxSubs bounds the cgroups below a container's own.
const maxSubs = 10000

// checkSubs checks that cgroups are below the container's own, each after the one
// it is in, and that no file stands twice or leads elsewhere.
func checkSubs(subs []SubCgroup) error {
	if len(subs) > maxSubs {
		return fmt.Errorf("%d cgroups", len(subs))
	}
	seen := map[[2]string]bool{}
	for _, s := range subs {
		if seen[[2]string{s.Hierarchy, s.Path}] {
			return fmt.Errorf("cgroup %s stands twice", quote(s.Path))
		}
		if above := path.Dir(s.Path); s.Path != "" && (path.IsAbs(s.Path) || path.Clean(s.Path) != s.Path || s.Path == ".." || strings.HasPrefix(s.Path, "../") || above != "." && !seen[[2]string{s.Hierarchy, above}]) {
			return fmt.Errorf("cgroup %s does not lie below the container's, or before the one it is in", quote(s.Path))
		}
		seen[[2]string{s.Hierarchy, s.Path}] = true
		files := map[string]bool{}
		for _, f := range s.Files {
			if f.Name == "" || f.Name == "." || f.Name == ".." || strings.Contains(f.Name, "/") || files[f.Name] {
				return fmt.Errorf("file %s of cgroup %s is not valid or stands twice", quote(f.Name), quote(s.Path))
			}
			files[f.Name] = true
			if f.Mode&^0o777 != 0 || s.Mode&^0o7777 != 0 {
				return fmt.Errorf("cgroup %s or its file %s has no valid mode", quote(s.Path), quote(f.Name))
			}
		}
	}
	return nil
}

// checkPlaces checks that a thread is in cgroups of the image.
func (b *builder) checkPlaces(t *Thread) error {
	for hierarchy, at := range t.Cgroups {
		if at == "" || !b.subs[[2]string{hierarchy, at}] {
			return fmt.Errorf("its cgroup %s:%s is not there", quote(hierarchy), quote(at))
		}
	}
	return nil
}

// checkTree checks that ids are positive and used once, and that parents stand
// before their children, which also rules out a process below itself.
func checkTree(t *Tree) error {
	if len(t.Processes) == 0 {
		return errors.New("it has no process")
	}
	pids, ids := map[int32]bool{}, map[int32]bool{}
	for i := range t.Processes {
		p := &t.Processes[i]
		if err := checkProcess(p); err != nil {
			return fmt.Errorf("process %d: %w", p.Pid, err)
		}
		if i > 0 && p.Ppid == 0 && p.Zombie {
			return fmt.Errorf("process %d: it has ended and its parent is not in the tree", p.Pid)
		}
		if p.Ppid != 0 && !pids[p.Ppid] {
			return fmt.Errorf("process %d: its parent %d does not stand before it", p.Pid, p.Ppid)
		}
		pids[p.Pid] = true
		for _, id := range p.ids() {
			if ids[id] {
				return fmt.Errorf("process %d: id %d is used twice", p.Pid, id)
			}
			ids[id] = true
		}
	}
	return nil
}

// ids returns the ids a process takes in its namespace: those of its threads,
// or its pid alone once they are gone.
func (p *Process) ids() []int32 {
	if p.Zombie {
		return []int32{p.Pid}
	}
	return p.Threads
}

func checkProcess(p *Process) error {
	positive := func(id int32) bool { return id > 0 }
	switch {
	case p.Pid <= 0:
		return errors.New("a pid must be positive")
	case p.Ppid < 0 || p.Pgid < 0 || p.Sid < 0:
		return errors.New("its parent, group or session is negative")
	case len(p.Pids) > maxPIDs || !all(p.Pids, positive):
		return errors.New("its pids in the namespaces are not valid")
	case !slices.Contains(p.Pids, p.Pid):
		return errors.New("its pid is not among its pids in the namespaces")
	case p.Zombie && len(p.Threads) != 0:
		return errors.New("a zombie has no threads")
	case !p.Zombie && (len(p.Threads) == 0 || p.Threads[0] != p.Pid):
		return errors.New("its threads must begin with its leader")
	case !all(p.Threads, positive):
		return errors.New("a tid must be positive")
	}
	return checkComm(p.Comm)
}

func checkComm(comm []byte) error {
	if len(comm) > maxComm || slices.Contains(comm, 0) {
		return fmt.Errorf("comm %s is not valid", quote(string(comm)))
	}
	return nil
}

// all reports whether ok holds for every element.
func all[T any](s []T, ok func(T) bool) bool {
	return !slices.ContainsFunc(s, func(v T) bool { return !ok(v) })
}

// first returns the first error, so that a message stays one line.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// need checks that ref names an object of type T, called what in a message.
func need[T any](b *builder, ref Ref, what string) error {
	if object[T](&b.Head, ref) == nil {
		return fmt.Errorf("reference %d names no %s before it", ref, what)
	}
	return nil
}
