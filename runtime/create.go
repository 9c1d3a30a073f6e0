package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	_ "github.com/opencontainers/cgroups/devices" // or device rules are refused
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/cgroupfreeze"
	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/file"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// made is a container that libcontainer has created for us, its init a stub.
type made struct {
	grants  *grants
	lib     *libcontainer.Container
	process *libcontainer.Process
	state   *libcontainer.State
	config  configs.Config // as it is to be, with all that the stub does without
	stub    *tracee.Stub
	initPid int   // inside the container
	guests  []int // host pids of processes that do not descend from it
	sock    int   // the coordinator's end of the stub's socket
	filters [][]byte
	// identity is who the bundle's own process would be.
	identity file.Identity
	// offsets are those of its clocks from the host's.
	offsets  map[int32]int64
	mayLogIn error // why its tasks may not have login uids of their own
	console  console
}

// createContainer lets libcontainer make the container that the operator's
// bundle describes: namespaces, mounts, cgroups, devices, hooks. In it runs a
// stub instead of the bundle's program.
func createContainer(r *restore) (m *made, err error) {
	spec, err := loadBundle(r.Bundle)
	if err != nil {
		return nil, err
	}
	g, err := grantsOf(spec)
	if err == nil {
		err = g.checkImage(r.head)
	}
	if err != nil {
		return nil, err
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: r.ID, UseSystemdCgroup: r.SystemdCgroup, NoPivotRoot: r.NoPivot, NoNewKeyring: r.NoNewKeyring,
		Spec: spec, RootlessEUID: os.Geteuid() != 0, RootlessCgroups: os.Geteuid() != 0,
	})
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", r.Bundle, err)
	}
	continueClocks(config, &r.head.Container)
	m = &made{config: *config, initPid: int(r.head.Tree.Processes[0].Pid), sock: -1, grants: g, identity: g.identity(), mayLogIn: g.mayLogIn()}
	if m.console, err = openConsole(spec, r.ConsoleSocket, r.Detach); err != nil {
		return nil, err
	}
	defer m.console.Close()
	if err := m.clearLeftovers(r); err != nil {
		return nil, err
	}
	// A directory that is still empty can be taken away whosever it is, one
	// that holds something only once it is known to be ours.
	dir := filepath.Join(r.Root, r.ID)
	empty, err := r.guard.Promise(guardian.Remove(dir))
	if err != nil {
		return nil, err
	}
	stub := stubConfig(config)
	if err := r.holdPackets(stub); err != nil {
		return nil, err
	}
	if m.lib, err = libcontainer.Create(r.Root, r.ID, stub); err != nil {
		if errors.Is(err, libcontainer.ErrExist) {
			_ = r.guard.Strike(empty)
			err = &fail.Error{Cause: fmt.Errorf("a container with id %q exists already", r.ID), Remedy: "choose another id, or delete that one"}
		}
		return nil, err
	}
	if _, err := r.guard.Promise(guardian.RemoveTree(dir)); err != nil {
		return nil, errors.Join(err, m.destroy())
	}
	if err := m.start(r); err != nil {
		_ = unix.Close(m.sock)
		return nil, errors.Join(err, m.destroy())
	}
	return m, nil
}

// loadBundle reads config.json and changes into the bundle: libcontainer takes
// the working directory as the bundle.
func loadBundle(bundle string) (*specs.Spec, error) {
	raw, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, &fail.Error{Cause: fmt.Errorf("bundle: %w", err), Remedy: "name it with --bundle"}
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(raw, spec); err != nil {
		return nil, fmt.Errorf("%s/config.json: %w", bundle, err)
	}
	if err := checkBundle(spec); err != nil {
		return nil, fail.On("bundle "+bundle, err)
	}
	return spec, os.Chdir(bundle)
}

// checkBundle refuses bundles that cannot be restored into.
func checkBundle(spec *specs.Spec) error {
	if spec.Process == nil || spec.Linux == nil || spec.Root == nil {
		return fail.Refuse("", "its config.json has no process, root or linux section", "")
	}
	hasProc := false
	for _, m := range spec.Mounts {
		hasProc = hasProc || m.Type == "proc" && filepath.Clean(m.Destination) == "/proc"
	}
	if !hasProc {
		return fail.Refuse("", "it mounts no /proc; restoring without one is not supported yet", "add a mount of type proc")
	}
	_, err := grantsOf(spec)
	return err
}

// continueClocks gives the container a time namespace in which CLOCK_MONOTONIC
// and CLOCK_BOOTTIME go on from where they were (time_namespaces(7)).
func continueClocks(config *configs.Config, c *image.Container) {
	if !configs.IsNamespaceSupported(configs.NEWTIME) || config.Namespaces.PathOf(configs.NEWTIME) != "" {
		return
	}
	if !config.Namespaces.Contains(configs.NEWTIME) {
		config.Namespaces.Add(configs.NEWTIME, "")
	}
	config.TimeOffsets = map[string]specs.LinuxTimeOffset{
		"monotonic": offset(unix.CLOCK_MONOTONIC, c.Monotonic),
		"boottime":  offset(unix.CLOCK_BOOTTIME, c.Boottime),
	}
}

// offset is what must be added to a clock of the host to make it show then.
func offset(clock int32, then int64) specs.LinuxTimeOffset {
	var ts unix.Timespec
	_ = unix.ClockGettime(clock, &ts)
	d := then - ts.Nano()
	sec := d / 1e9
	if d%1e9 < 0 {
		sec-- // the nanoseconds of an offset are never negative
	}
	return specs.LinuxTimeOffset{Secs: sec, Nanosecs: uint32(d - sec*1e9)}
}

// stubConfig is the configuration without what would confine the stub, which
// has to make the tasks and then confines them itself, and without what must
// not happen before they run.
func stubConfig(config *configs.Config) *configs.Config {
	c := *config
	c.Capabilities, c.NoNewPrivileges, c.Rlimits = nil, false, nil
	c.AppArmorProfile, c.ProcessLabel, c.Scheduler, c.IOPriority = "", "", nil, nil
	c.Hooks = configs.Hooks{}
	for name, hooks := range config.Hooks {
		if name != configs.Poststart {
			c.Hooks[name] = hooks
		}
	}
	group := *config.Cgroups
	limits := *group.Resources
	limits.CpuQuota, limits.CpuPeriod, limits.PidsLimit = 0, 0, nil
	group.Resources = &limits
	c.Cgroups = &group
	return &c
}

// clearLeftovers removes what a restore of this id left that was killed
// together with its guardian: a state directory without a state file.
func (m *made) clearLeftovers(r *restore) error {
	dir := filepath.Join(r.Root, r.ID)
	if _, err := os.Stat(dir); err != nil {
		return nil
	}
	if _, err := os.Stat(filepath.Join(dir, "state.json")); !errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if st, err := os.Stat(dir); err != nil || time.Since(st.ModTime()) < leftoverAge {
		return nil
	}
	return os.RemoveAll(dir)
}

// leftoverAge keeps a container that somebody else is just creating safe.
const leftoverAge = 10 * time.Second

// start runs the stub and takes hold of it.
func (m *made) start(r *restore) error {
	exe, err := tracee.StubExecutable()
	if err != nil {
		return err
	}
	defer exe.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	m.sock = pair[0]
	theirs := os.NewFile(uintptr(pair[1]), "stub's socket")
	defer theirs.Close()
	no := false
	m.process = &libcontainer.Process{
		Args: []string{fmt.Sprintf("/proc/self/fd/%d", file.StubExeFD)}, Env: []string{}, Cwd: "/", Init: true,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		ExtraFiles:      []*os.File{exe, r.service.File(), theirs},
		NoNewPrivileges: &no, LogLevel: "4",
	}
	if m.console.socket != nil {
		m.process.Stdin, m.process.Stdout, m.process.Stderr, m.process.ConsoleSocket = nil, nil, nil, m.console.socket
	}
	if err := m.promiseCgroups(r); err != nil {
		return err
	}
	if err := quietly(func() error { return m.lib.Start(m.process) }); err != nil {
		return err
	}
	if err := m.console.receive(); err != nil {
		return err
	}
	if m.state, err = m.lib.State(); err != nil {
		return err
	}
	if err := r.holdLate(m.state.InitProcessPid); err != nil {
		return err
	}
	return m.takeHold(r)
}

// promiseCgroups tells the guardian which cgroups are about to be made.
func (m *made) promiseCgroups(r *restore) error {
	state, err := m.lib.State()
	if err != nil {
		return err
	}
	var paths []string
	for _, p := range state.CgroupPaths {
		paths = append(paths, p)
	}
	_, err = r.guard.Promise(guardian.RemoveCgroups(paths))
	return err
}

// takeHold seizes the init before it executes the stub, and lets it.
func (m *made) takeHold(r *restore) error {
	pid, err := m.process.Pid()
	if err != nil {
		return err
	}
	// Forks are traced only from the stub on: runc's init is a program with
	// threads of its own.
	t, err := tracee.Seize(pid, pid, tracee.LiveOptions|unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACEEXEC)
	if err != nil {
		return err
	}
	// Opening the fifo lets the init go on, but what it goes on to do may stop
	// it first, for a signal say: we must be waiting for that.
	opened := make(chan error, 1)
	go func() { opened <- m.lib.Exec() }()
	if err := t.WaitExec(); err != nil {
		return err
	}
	if err := <-opened; err != nil {
		return err
	}
	if err := t.SetOptions(tracee.StubOptions); err != nil {
		return err
	}
	if m.stub, err = tracee.NewStub(t, r.service); err != nil {
		return err
	}
	return m.readFilters()
}

// readFilters notes the seccomp filters that the bundle has put on the stub,
// compiled anew: every task inherits them.
func (m *made) readFilters() error {
	for i := 0; ; i++ {
		program, _, ok, err := m.stub.SeccompFilter(i)
		if err != nil || !ok {
			return err
		}
		m.filters = append(m.filters, program)
	}
}

// poststart runs the hooks that libcontainer would have run too early.
func (m *made) poststart() error {
	if m.config.Hooks == nil || len(m.config.Hooks[configs.Poststart]) == 0 {
		return nil
	}
	s, err := m.lib.OCIState()
	if err != nil {
		return err
	}
	return m.config.Hooks.Run(configs.Poststart, s)
}

// destroy removes the container: its tasks, cgroups, mounts and state.
func (m *made) destroy() error {
	if m.lib == nil {
		return nil
	}
	if m.process != nil {
		if pid, err := m.process.Pid(); err == nil && pid > 0 {
			m.kill(pid)
		}
	}
	err := m.lib.Destroy()
	m.lib = nil
	return err
}

// kill ends every task of the container. They may be frozen, some of them
// detached already: each is killed before the thaw, so that none runs.
func (m *made) kill(init int) {
	pids, _ := m.lib.Processes()
	pids = append(pids, init)
	var tids []int
	for _, pid := range pids {
		more, _ := task.Threads(pid)
		tids = append(tids, more...)
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	if m.state != nil {
		if c, err := cgroupfreeze.Open(m.state.CgroupPaths); err == nil {
			_ = c.Thaw(context.Background())
		}
	}
	reapAll(tids)
}

// Pid is the container's init on the host.
func (r *Restored) Pid() int { return r.made.stub.Pid }

// Wait waits until the container's init ends, and removes the container.
func (r *Restored) Wait() (*os.ProcessState, error) {
	r.reapGuests()
	state, err := r.made.process.Wait()
	if state != nil {
		err = nil // a status is no error of ours
	}
	return state, errors.Join(err, r.made.lib.Destroy())
}

// Signal sends a signal to the container's init.
func (r *Restored) Signal(s os.Signal) error { return r.made.process.Signal(s) }
