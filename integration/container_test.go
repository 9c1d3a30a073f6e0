package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// patience bounds every wait for something that takes milliseconds on an idle
// machine.
const patience = 20 * time.Second

// container is a bundle of its own with a state root of its own, and the
// commands that act on it.
type container struct {
	t      testing.TB
	id     string
	dir    string // holds everything of this container
	bundle string
	root   string  // state root of runc and ocickpt
	tmp    string  // TMPDIR of ocickpt; must be empty in the end
	report string  // name of the report below /out, if the program writes one
	images int     // images made so far
	screen *screen // where its terminal is shown, if it has one
	// threadsVary: the program starts and ends threads as it goes.
	threadsVary bool
	flags       []string // of every checkpoint
	// gone is closed when the init process that runs now has been reaped;
	// status is its wait status then.
	gone   chan struct{}
	status unix.WaitStatus
}

type option func(c *container, spec *specs.Spec)

func withArgs(args ...string) option {
	return func(_ *container, spec *specs.Spec) { spec.Process.Args = args }
}

// withReport names the file below /out in which the program reports.
func withReport(name string) option {
	return func(c *container, _ *specs.Spec) { c.report = name }
}

// withCapabilities adds capabilities to runc's three default ones.
func withCapabilities(names ...string) option {
	return func(_ *container, spec *specs.Spec) {
		caps := spec.Process.Capabilities
		caps.Bounding = append(caps.Bounding, names...)
		caps.Effective = append(caps.Effective, names...)
		caps.Permitted = append(caps.Permitted, names...)
	}
}

// withNewPrivileges allows programs to gain privileges, which runc spec denies.
func withNewPrivileges() option {
	return func(_ *container, spec *specs.Spec) { spec.Process.NoNewPrivileges = false }
}

// withRealtime lets programs have real-time priorities where the kernel hands
// out time for them by cgroup (CONFIG_RT_GROUP_SCHED).
func withRealtime() option {
	return func(_ *container, spec *specs.Spec) {
		if _, err := os.Stat("/sys/fs/cgroup/cpu/cpu.rt_runtime_us"); err != nil || inCgroupV2() {
			return
		}
		runtime := int64(200_000)
		spec.Linux.Resources.CPU = &specs.LinuxCPU{RealtimeRuntime: &runtime}
	}
}

// withMounting lets programs mount.
func withMounting() option {
	return withCapabilities("CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_FOWNER")
}

// withTmpfs mounts a file system in memory.
func withTmpfs(point string) option {
	return func(c *container, spec *specs.Spec) {
		c.must(os.MkdirAll(filepath.Join(c.rootfs(), point), 0o755))
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: point, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=755"}})
	}
}

// withConnections keeps connections of TCP.
func withConnections() option {
	return func(c *container, _ *specs.Spec) { c.flags = []string{"--tcp-established"} }
}

func withVaryingThreads() option {
	return func(c *container, _ *specs.Spec) { c.threadsVary = true }
}

// withHostPrograms makes the root an overlay of the host's, so that programs
// installed there (redis-server, python3) run in the container.
func withHostPrograms() option {
	return func(c *container, spec *specs.Spec) {
		for _, dir := range []string{"upper", "work"} {
			c.must(os.MkdirAll(filepath.Join(c.dir, dir), 0o755))
		}
		data := fmt.Sprintf("lowerdir=/,upperdir=%[1]s/upper,workdir=%[1]s/work", c.dir)
		c.must(unix.Mount("overlay", c.rootfs(), "overlay", 0, data))
		c.t.Cleanup(func() { c.must(unix.Unmount(c.rootfs(), 0)) })
	}
}

// withUserNamespace makes the container's root an ordinary user of the host.
func withUserNamespace() option {
	return func(c *container, spec *specs.Spec) {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 1 << 31}}
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		spec.Linux.UIDMappings, spec.Linux.GIDMappings = ids, ids
		c.must(os.Chmod(c.dir, 0o711))
	}
}

var containerCount atomic.Int64

// newContainer makes a bundle with busybox and the test programs in /bin and a
// writable /out, and checks when the test ends that nothing is left of it.
func newContainer(t testing.TB, options ...option) *container {
	t.Helper()
	dir, err := os.MkdirTemp("", "ock-")
	if err != nil {
		t.Fatal(err)
	}
	c := &container{
		t: t, dir: dir, bundle: filepath.Join(dir, "bundle"),
		id:   fmt.Sprintf("ock-%d-%d", os.Getpid(), containerCount.Add(1)),
		root: filepath.Join(dir, "state"), tmp: filepath.Join(dir, "tmp"),
	}
	leakCheck(c)
	for _, d := range []string{c.rootfs(), c.root, c.tmp} {
		c.must(os.MkdirAll(d, 0o755))
	}
	spec := c.defaultSpec()
	for _, o := range options {
		o(c, spec)
	}
	c.makeRootfs()
	c.writeSpec(spec)
	t.Cleanup(c.destroy)
	return c
}

func (c *container) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *container) rootfs() string { return filepath.Join(c.bundle, "rootfs") }

// out is the host's path of a file that the program has below /out.
func (c *container) out(name string) string { return filepath.Join(c.rootfs(), "out", name) }

// defaultSpec is what runc spec writes, without a terminal and with a writable
// root. On a pure cgroup v2 without controllers runc works as long as no
// resources are asked for.
func (c *container) defaultSpec() *specs.Spec {
	cmd := exec.Command("runc", "spec")
	cmd.Dir = c.bundle
	c.must(runCmd(cmd))
	data, err := os.ReadFile(filepath.Join(c.bundle, "config.json"))
	c.must(err)
	spec := &specs.Spec{}
	c.must(json.Unmarshal(data, spec))
	spec.Process.Terminal = false
	spec.Root.Readonly = false
	spec.Hostname = c.id
	if inCgroupV2() {
		spec.Linux.Resources = nil
	}
	return spec
}

func (c *container) writeSpec(spec *specs.Spec) {
	data, err := json.MarshalIndent(spec, "", "\t")
	c.must(err)
	c.must(os.WriteFile(filepath.Join(c.bundle, "config.json"), data, 0o644))
}

// makeRootfs fills the root; programs are hard links to the fixtures.
func (c *container) makeRootfs() {
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp", "etc", "out"} {
		c.must(os.MkdirAll(filepath.Join(c.rootfs(), dir), 0o755))
	}
	c.must(os.Chmod(filepath.Join(c.rootfs(), "out"), 0o777))
	if _, err := os.Lstat(filepath.Join(c.rootfs(), "usr")); err == nil {
		// The host's root: the test programs go where nothing is.
		c.must(run("cp", "-a", filepath.Join(fixtures, "bin"), c.out("bin")))
		return
	}
	c.must(run("cp", "-al", filepath.Join(fixtures, "bin")+"/.", filepath.Join(c.rootfs(), "bin")))
}

// result is what became of a command.
type result struct {
	stdout, stderr string
	code           int
	took           time.Duration
}

// outputs are the descriptors a command gets as its own; nil fields are
// captured into the result through files, never pipes, because a container
// that inherited a pipe would keep its reader waiting.
type outputs struct {
	stdin, stdout, stderr *os.File
}

func (c *container) command(std outputs, name string, args ...string) result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	// A Go program that hangs tells by SIGQUIT where.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGQUIT) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp)
	captured := c.capture(&std)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = file(std.stdin), std.stdout, std.stderr
	start := time.Now()
	err := cmd.Run()
	r := captured()
	if ctx.Err() != nil {
		c.t.Fatalf("%s %s did not end within a minute\n%s", name, strings.Join(args, " "), r.stderr)
	}
	r.took = time.Since(start)
	r.code = cmd.ProcessState.ExitCode()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatalf("%s: %v", name, err)
	}
	return r
}

// file keeps a nil *os.File from becoming an interface that is not nil.
func file(f *os.File) interface{ Read([]byte) (int, error) } {
	if f == nil {
		return nil
	}
	return f
}

// capture replaces nil outputs by files and returns a function that reads them.
func (c *container) capture(std *outputs) func() result {
	var files [2]*os.File
	for i, f := range []**os.File{&std.stdout, &std.stderr} {
		if *f != nil {
			continue
		}
		var err error
		files[i], err = os.CreateTemp(c.dir, "output-")
		c.must(err)
		*f = files[i]
	}
	return func() (r result) {
		for i, to := range []*string{&r.stdout, &r.stderr} {
			if files[i] == nil {
				continue
			}
			data, err := os.ReadFile(files[i].Name())
			c.must(err)
			*to = string(data)
			os.Remove(files[i].Name())
			files[i].Close()
		}
		return r
	}
}

// ocickpt runs the command under test.
func (c *container) ocickpt(args ...string) result {
	c.t.Helper()
	return c.command(outputs{}, c.binary(), append([]string{"--root", c.root}, args...)...)
}

func (c *container) binary() string { return filepath.Join(fixtures, "ocickpt") }

// tryRunc runs stock runc on this container's state root.
func (c *container) tryRunc(args ...string) result {
	c.t.Helper()
	return c.command(outputs{}, "runc", append([]string{"--root", c.root}, args...)...)
}

func (c *container) runc(args ...string) string {
	c.t.Helper()
	r := c.tryRunc(args...)
	if r.code != 0 {
		c.t.Fatalf("runc %s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// stdio opens the host's files that are the init's standard streams: the same
// for run and for each restore.
func (c *container) stdio() outputs {
	open := func(name string, flags int) *os.File {
		f, err := os.OpenFile(name, flags, 0o644)
		c.must(err)
		return f
	}
	const appending = os.O_WRONLY | os.O_CREATE | os.O_APPEND
	return outputs{
		stdin:  open("/dev/null", os.O_RDONLY),
		stdout: open(filepath.Join(c.dir, "stdout"), appending),
		stderr: open(filepath.Join(c.dir, "stderr"), appending),
	}
}

func (o outputs) close() {
	for _, f := range []*os.File{o.stdin, o.stdout, o.stderr} {
		f.Close()
	}
}

// run starts the container detached.
func (c *container) run() *container {
	c.t.Helper()
	std := c.stdio()
	defer std.close()
	args := append([]string{"--root", c.root, "run", "-d", "--bundle", c.bundle}, c.consoleSocket()...)
	r := c.command(std, "runc", append(args, c.id)...)
	if r.code != 0 {
		c.t.Fatalf("runc run: exit status %d\n%s", r.code, c.stderr())
	}
	c.adopt()
	return c
}

// consoleSocket names the socket that takes the container's terminal.
func (c *container) consoleSocket() []string {
	if c.screen == nil {
		return nil
	}
	return []string{"--console-socket", c.screen.path}
}

func (c *container) stderr() string {
	data, _ := os.ReadFile(filepath.Join(c.dir, "stderr"))
	return string(data)
}

// adopt reaps the init as soon as it ends. It is the test's child, as it would
// be the child of an engine's shim; unreaped, runc delete would wait for it.
func (c *container) adopt() {
	c.t.Helper()
	gone := make(chan struct{})
	c.gone = gone
	pid := c.state().Pid
	go func() {
		status := reap(pid)
		c.status = status
		close(gone)
	}()
}

// reap waits until a child has ended.
func reap(pid int) (status unix.WaitStatus) {
	for {
		if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != unix.EINTR {
			return status
		}
	}
}

// step runs a subtest about the container; what fails in it is the subtest's.
func (c *container) step(t *testing.T, name string, body func(t *testing.T)) {
	t.Run(name, func(step *testing.T) {
		c.t = step
		defer func() { c.t = t }()
		body(step)
	})
}

func (c *container) destroy() {
	if c.tryRunc("state", c.id).code == 0 {
		c.runc("delete", "--force", c.id)
	}
	if c.t.Failed() {
		c.t.Logf("stderr of the container:\n%s", c.stderr())
	}
}

func (c *container) state() specs.State {
	c.t.Helper()
	var s specs.State
	c.must(json.Unmarshal([]byte(c.runc("state", c.id)), &s))
	return s
}

// exec runs a command in the container through runc exec.
func (c *container) exec(args ...string) string {
	c.t.Helper()
	return c.runc(append([]string{"exec", c.id}, args...)...)
}

// inNetwork runs a program of the host in the container's network namespace.
func (c *container) inNetwork(args ...string) string {
	c.t.Helper()
	target := strconv.Itoa(c.state().Pid)
	r := c.command(outputs{}, "nsenter", append([]string{"-t", target, "-n"}, args...)...)
	if r.code != 0 {
		c.t.Fatalf("%s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// raiseLoopback brings lo up, which runc leaves down in a new namespace.
func (c *container) raiseLoopback() *container {
	c.t.Helper()
	c.inNetwork("ip", "link", "set", "lo", "up")
	return c
}

// newImage names the directory of the next image; image is that of the last.
func (c *container) newImage() string { c.images++; return c.image() }
func (c *container) image() string    { return filepath.Join(c.dir, fmt.Sprintf("image-%d", c.images)) }

// checkpoint takes a checkpoint into a new directory and fails the test when
// that does not work.
func (c *container) checkpoint(flags ...string) result {
	c.t.Helper()
	args := slices.Concat([]string{"checkpoint", "--image-path", c.newImage()}, c.flags, flags)
	r := c.ocickpt(append(args, c.id)...)
	if r.code != 0 {
		c.t.Fatalf("checkpoint: exit status %d\n%s", r.code, r.stderr)
	}
	return r
}

// tryRestore restores detached from the last image.
func (c *container) tryRestore(flags ...string) result {
	c.t.Helper()
	std := c.stdio()
	defer std.close()
	before := len(c.stderr())
	args := append([]string{"--root", c.root, "restore", "--detach", "--bundle", c.bundle,
		"--image-path", c.image()}, append(c.consoleSocket(), flags...)...)
	r := c.command(std, c.binary(), append(args, c.id)...)
	r.stderr = c.stderr()[before:]
	return r
}

func (c *container) restore(flags ...string) result {
	c.t.Helper()
	r := c.tryRestore(flags...)
	if r.code != 0 {
		c.t.Fatalf("restore: exit status %d\n%s", r.code, r.stderr)
	}
	c.adopt()
	return r
}

// foreground starts ocickpt and leaves it running; its standard streams are the
// container's.
func (c *container) foreground(args ...string) *exec.Cmd {
	c.t.Helper()
	std := c.stdio()
	defer std.close()
	cmd := exec.Command(c.binary(), append([]string{"--root", c.root}, args...)...)
	cmd.Dir = c.dir
	cmd.Env = append(os.Environ(), "TMPDIR="+c.tmp)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = std.stdin, std.stdout, std.stderr
	c.must(cmd.Start())
	return cmd
}

// mustBeGone asserts what a checkpoint leaves: no container, no process.
func (c *container) mustBeGone() {
	c.t.Helper()
	if r := c.tryRunc("state", c.id); r.code == 0 {
		c.t.Fatalf("runc still knows the container after the checkpoint:\n%s", r.stdout)
	}
	select {
	case <-c.gone:
	case <-time.After(patience):
		c.t.Fatal("the container's init still runs after the checkpoint")
	}
}

func (c *container) mustBe(status specs.ContainerState) {
	c.t.Helper()
	if got := c.state().Status; got != status {
		if c.report != "" {
			c.rounds() // may tell why
		}
		c.t.Fatalf("the container is %s, not %s", got, status)
	}
}

// rounds reads the program's report and returns the number of its last round.
// Numbers that are not consecutive from 1 and lines that begin with FAIL end
// the test.
func (c *container) rounds() int {
	c.t.Helper()
	data, err := os.ReadFile(c.out(c.report))
	if err != nil && !os.IsNotExist(err) {
		c.t.Fatal(err)
	}
	whole := data[:bytes.LastIndexByte(data, '\n')+1]
	last := 0
	for line := range strings.Lines(string(whole)) {
		number, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.Atoi(number)
		if err != nil || n != last+1 {
			c.t.Fatalf("%s after round %d: %s", c.report, last, line)
		}
		last = n
	}
	return last
}

// progress waits until the program has reported n more good rounds.
func (c *container) progress(n int) {
	c.t.Helper()
	want := c.rounds() + n
	if !waitFor(func() bool { return c.rounds() >= want }) {
		c.t.Fatalf("%s stands still at round %d, wanted %d (%s)", c.report, c.rounds(), want, c.state().Status)
	}
}

// waitFor polls until the condition holds and reports whether it did.
func waitFor(condition func() bool) bool {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if condition() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return condition()
}

// cycle checkpoints and restores n times, and looks after each whether the
// processes are the same as before and the program goes on.
func cycle(c *container, n int) {
	c.t.Helper()
	for range n {
		before := c.stableTree()
		c.checkpoint()
		c.mustBeGone()
		c.restore()
		c.mustBe(specs.StateRunning)
		c.sameTree(before)
		c.progress(20)
	}
}
