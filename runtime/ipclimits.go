package runtime

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/nsutil"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

// Limits of ipc namespaces, both directions. Those of the container's own are the
// bundle's to set (linux.sysctl); what the container has changed goes with it.

// readIPCLimits notes the limits of the calling thread's ipc namespace, that made
// is the record of, nil for the container's own, that are not those it was started
// with.
func (c *container) readIPCLimits(made *image.NestedNamespace) error {
	if made == nil && !c.maySetSysctls() {
		return nil
	}
	if c.ipcLimits == nil {
		err := nsutil.Inside("", func() error {
			err := unix.Unshare(unix.CLONE_NEWIPC)
			if err == nil {
				c.ipcLimits, err = readLimits()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	live, err := readLimits()
	if err != nil {
		return err
	}
	want := maps.Clone(c.ipcLimits)
	to := &c.record.IPC
	if made == nil {
		maps.Copy(want, c.given)
	} else {
		to = &made.IPC
	}
	*to = nil
	for _, name := range image.IPCSysctls {
		if value, ok := live[name]; ok && value != want[name] {
			*to = append(*to, image.Sysctl{Name: name, Value: value})
		}
	}
	return nil
}

// readLimits reads the limits of the calling thread's ipc namespace; blanks are
// single. One that the kernel does not have is left out.
func readLimits() (map[string]string, error) {
	out := map[string]string{}
	for _, name := range image.IPCSysctls {
		b, err := os.ReadFile("/proc/sys/" + name)
		if err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		if err == nil {
			out[name] = strings.Join(strings.Fields(string(b)), " ")
		}
	}
	return out, nil
}

// sysctlsOf are sysctls of a bundle by their paths below /proc/sys.
func sysctlsOf(bundle map[string]string) map[string]string {
	out := map[string]string{}
	for name, value := range bundle {
		if !strings.Contains(name, "/") {
			name = strings.ReplaceAll(name, ".", "/")
		}
		out[name] = strings.Join(strings.Fields(value), " ")
	}
	return out
}

// checkLimits refuses limits of the container's ipc namespace that no task of it
// could have set: that takes a /proc/sys to write to and root's uid, or the right to
// mount one.
func (g *grants) checkLimits(limits []image.Sysctl) error {
	if g.has(unix.CAP_SYS_ADMIN) || g.sysctls && g.mayBe(0) {
		return nil
	}
	for _, l := range limits {
		if g.given[l.Name] != l.Value {
			name := strings.ReplaceAll(l.Name, "/", ".")
			return fail.Refuse(name, fmt.Sprintf("the container has set it to %s itself, which takes CAP_SYS_ADMIN or a writable /proc/sys, and the bundle gives neither", l.Value), "set it in the bundle (linux.sysctl)")
		}
	}
	return nil
}

// raiseIPCLimits raises limits of the ipc namespace at path as far as the image
// says, so that what was made under them can be made again. It may hold more than
// its limits allow by now: none is lowered before all is there.
func (r *restore) raiseIPCLimits(path string, made *image.NestedNamespace, limits []image.Sysctl) error {
	var raised []image.Sysctl
	var now map[string]string
	err := nsutil.Inside(path, func() (err error) {
		now, err = readLimits()
		return err
	})
	if err != nil {
		return err
	}
	for _, l := range limits {
		if l.Name != "kernel/shm_rmid_forced" { // it ends segments that nobody has yet
			raised = append(raised, image.Sysctl{Name: l.Name, Value: higher(now[l.Name], l.Value)})
		}
	}
	return r.setIPCLimits(path, made, raised)
}

// higher takes the greater of each two numbers.
func higher(a, b string) string {
	have, want := strings.Fields(a), strings.Fields(b)
	for i := range min(len(have), len(want)) {
		x, _ := strconv.ParseUint(have[i], 10, 64)
		y, _ := strconv.ParseUint(want[i], 10, 64)
		want[i] = strconv.FormatUint(max(x, y), 10)
	}
	return strings.Join(want, " ")
}

// settleIPCLimits gives all ipc namespaces the limits of the image.
func (r *restore) settleIPCLimits() error {
	if err := r.setIPCLimits(nsutil.Path(r.made.stub.Pid, "ipc"), nil, r.head.Container.IPC); err != nil {
		return err
	}
	for ref, there := range r.spaces {
		n := r.head.Nested(ref)
		if err := r.setIPCLimits(fmt.Sprintf("/proc/self/fd/%d", there.Fd()), n, n.IPC); err != nil {
			return fail.On(fmt.Sprintf("ipc namespace #%d", ref), err)
		}
	}
	return nil
}

// setIPCLimits sets limits of the ipc namespace at path, as the root of the user
// namespace that owns it: the kernel asks for that uid (ipc_permissions in
// ipc/ipc_sysctl.c).
func (r *restore) setIPCLimits(path string, made *image.NestedNamespace, limits []image.Sysctl) error {
	if len(limits) == 0 {
		return nil
	}
	root, err := r.rootOf(made)
	if err != nil {
		return err
	}
	return nsutil.Inside(path, func() error {
		// The system call itself changes the one thread, which ends here.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(root), ^uintptr(0)); errno != 0 {
			return fmt.Errorf("setresuid %d: %w", root, errno)
		}
		now, err := readLimits()
		if err != nil {
			return err
		}
		for _, l := range limits {
			if now[l.Name] == l.Value {
				continue
			}
			if err := os.WriteFile("/proc/sys/"+l.Name, []byte(l.Value), 0); err != nil {
				return fail.On(strings.ReplaceAll(l.Name, "/", "."), fmt.Errorf("set it to %s: %w", l.Value, err))
			}
		}
		return nil
	})
}

// rootOf is the uid on the host that is root where an ipc namespace belongs; the
// host's own where nobody is.
func (r *restore) rootOf(made *image.NestedNamespace) (int, error) {
	uid := uint32(0)
	if made != nil && r.head.Nested(made.Owner) != nil {
		m := r.head.Nested(made.Owner).User.UIDMap
		i := slices.IndexFunc(m, func(one image.IDMap) bool { return one.Container == 0 })
		if i < 0 {
			return 0, nil
		}
		uid = m[i].Host
	}
	return r.made.config.HostUID(int(uid))
}
