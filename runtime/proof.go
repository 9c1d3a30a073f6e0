package runtime

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/guardian"
	"github.com/ocickpt/ocickpt/runtime/task"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Proof says how the checkpoint and the restore of a container went that was
// made for the purpose.
type Proof struct {
	Checkpoint, Restore Report
}

// proof is a container with a heartbeat as its only program, and everything that
// belongs to it in one directory.
type proof struct {
	log     *slog.Logger
	dir, id string
	cwd     string // to go back to: a bundle is the working directory
	guard   *guardian.Guardian
	running *made  // nil when there is no task of it
	beat    uint64 // the last one seen
	result  Proof
}

// Prove runs a container of its own, checkpoints it, restores it, and looks
// whether its program goes on where it was. Nothing is left of it, whatever
// fails, and whoever kills this process: it has a guardian. The working
// directory is another one meanwhile.
func Prove(ctx context.Context, log *slog.Logger) (*Proof, error) {
	p := &proof{log: log, id: fmt.Sprintf("ocickpt-check-%d", os.Getpid())}
	var whole Report
	err := travel(ctx, []phase{
		{"prepare a container", p.prepare},
		{"start it", p.start},
		{"checkpoint it", p.checkpoint},
		{"restore it", p.restore},
	}, &whole)
	if e := p.clean(); e != nil {
		err = errors.Join(err, fail.During("remove the container", e))
	}
	if err != nil {
		return nil, err
	}
	return &p.result, nil
}

func (p *proof) bundle() string { return filepath.Join(p.dir, "bundle") }
func (p *proof) root() string   { return filepath.Join(p.dir, "state") }
func (p *proof) image() string  { return filepath.Join(p.dir, ImageFile) }

// prepare makes the bundle.
func (p *proof) prepare(context.Context) (err error) {
	if p.guard, err = guardian.Start(); err != nil {
		return err
	}
	if p.cwd, err = os.Getwd(); err != nil {
		return err
	}
	if p.dir, err = p.makeDir(); err != nil {
		return err
	}
	rootfs := filepath.Join(p.bundle(), "rootfs")
	for _, dir := range []string{"proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(rootfs, "heartbeat"), heartELF(), 0o755); err != nil {
		return err
	}
	config, err := json.Marshal(p.spec())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(p.bundle(), "config.json"), config, 0o644); err != nil {
		return err
	}
	return os.Mkdir(p.root(), 0o700)
}

// makeDir makes the directory for everything.
func (p *proof) makeDir() (string, error) {
	dir, err := os.MkdirTemp("", p.id+"-")
	if err != nil {
		return "", err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	if _, err := p.guard.Promise(guardian.RemoveTree(dir)); err != nil {
		return "", errors.Join(err, os.Remove(dir))
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	if fs.Flags&unix.ST_NOEXEC != 0 {
		return "", fail.Refuse(os.TempDir(), "programs on this file system cannot be executed (noexec)", "set TMPDIR to another directory")
	}
	return dir, nil
}

// spec is what `runc spec` writes, for a program that needs nothing: no
// capabilities, no limits that this process might not be allowed to set.
func (p *proof) spec() *specs.Spec {
	spec := specconv.Example()
	spec.Hostname = p.id
	spec.Process.Terminal = false
	spec.Process.Args = []string{"/heartbeat"}
	spec.Process.Capabilities = &specs.LinuxCapabilities{}
	spec.Process.Rlimits = nil
	spec.Linux.Resources = nil
	return spec
}

// start runs the container as runc would.
func (p *proof) start(ctx context.Context) error {
	spec, err := loadBundle(p.bundle())
	if err != nil {
		return err
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: p.id, Spec: spec})
	if err != nil {
		return err
	}
	lib, err := libcontainer.Create(p.root(), p.id, config)
	if err != nil {
		return err
	}
	if err := p.promiseCgroups(lib); err != nil {
		return errors.Join(err, lib.Destroy())
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return errors.Join(err, lib.Destroy())
	}
	defer null.Close()
	p.running = &made{lib: lib, process: &libcontainer.Process{
		Args: spec.Process.Args, Env: spec.Process.Env, Cwd: spec.Process.Cwd, Init: true,
		Stdin: null, Stdout: null, Stderr: null, LogLevel: "4",
	}}
	if err := lib.Run(p.running.process); err != nil {
		return err
	}
	return p.awaitBeats(ctx, 3)
}

func (p *proof) promiseCgroups(lib *libcontainer.Container) error {
	state, err := lib.State()
	if err != nil {
		return err
	}
	_, err = p.guard.Promise(guardian.RemoveCgroups(slices.Collect(maps.Values(state.CgroupPaths))))
	return err
}

// checkpoint saves the container, which ends it.
func (p *proof) checkpoint(ctx context.Context) error {
	report, err := Checkpoint(ctx, CheckpointOptions{Root: p.root(), ID: p.id, Path: p.image(), Log: p.log})
	if err != nil {
		return err
	}
	p.running, p.result.Checkpoint = nil, *report
	return nil
}

// restore makes it anew and sees that it lives: as the init of its pid
// namespace, and counting on from where it was.
func (p *proof) restore(ctx context.Context) error {
	in, err := os.Open(p.image())
	if err != nil {
		return err
	}
	defer in.Close()
	r, err := Restore(ctx, RestoreOptions{Root: p.root(), ID: p.id, Bundle: p.bundle(), Image: in, Log: p.log})
	if r != nil {
		p.running = r.made
	}
	if err != nil {
		return err
	}
	p.result.Restore = r.Report
	status, err := task.ReadStatus(r.Pid())
	if err != nil {
		return err
	}
	if pid := task.Innermost(status.NSpid); pid != 1 {
		return fmt.Errorf("the restored init has pid %d in its namespace instead of 1", pid)
	}
	return p.awaitBeats(ctx, 3)
}

// heartPatience bounds the wait for a few heartbeats of 10 ms.
const heartPatience = 5 * time.Second

// awaitBeats waits for n more beats. A number below the last one seen means
// that the program has begun anew.
func (p *proof) awaitBeats(ctx context.Context, n uint64) error {
	pid, err := p.running.process.Pid()
	if err != nil {
		return err
	}
	want, deadline := p.beat+n, time.Now().Add(heartPatience)
	for {
		now, err := readBeat(pid)
		switch {
		case err != nil:
			return fmt.Errorf("the container's program: %w", err)
		case now < p.beat:
			return fmt.Errorf("the container's program counted to %d and is at %d now", p.beat, now)
		case now >= want:
			p.beat = now
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("the container's program stands still at %d", now)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// readBeat reads the number of the last beat. A program that is just being
// executed has no memory there yet.
func readBeat(pid int) (uint64, error) {
	var b [8]byte
	err := tracee.ReadMemory(pid, heartBeat, b[:])
	if errors.Is(err, unix.EFAULT) && !task.Ended(pid) {
		return 0, nil
	}
	return binary.LittleEndian.Uint64(b[:]), err
}

// clean removes what there is of the container.
func (p *proof) clean() error {
	var errs []error
	if p.running != nil {
		errs = append(errs, p.running.destroy())
	}
	if p.cwd != "" {
		errs = append(errs, os.Chdir(p.cwd))
	}
	if p.guard != nil {
		errs = append(errs, p.guard.Rollback(), p.guard.Dismiss())
	}
	return errors.Join(errs...)
}
