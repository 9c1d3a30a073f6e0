package runtime

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/guardian"
)

// verbProbes makes the test binary print the names of the features that do not
// work for it, with the errors.
const verbProbes = "test-probes"

// The test binary is what ocickpt is: a container's init, and a guardian.
func init() {
	// The main thread is the one that /proc/self shows. Locked to the main
	// goroutine it is not among those that libcontainer enters a container's
	// mount namespace with and then leaves to end, which the main thread cannot.
	goruntime.LockOSThread()
	if len(os.Args) < 2 {
		return
	}
	switch os.Args[1] {
	case "init":
		libcontainer.Init()
	case guardian.Verb:
		guardian.Main()
	case verbProbes:
		failed := map[string]string{}
		for _, r := range Probes() {
			if r.Err != nil {
				failed[r.Name] = r.Err.Error()
			}
		}
		if err := json.NewEncoder(os.Stdout).Encode(failed); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("root is needed (sudo make test)")
	}
}

// traces is what probes and proofs must not change: the process's descriptors,
// children, mounts and working directory, the cgroups that bear its pid, and
// what lies in its TMPDIR.
func traces(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink("/proc/self/fd/" + fd.Name())
		// The Go runtime opens an epoll when it likes, and closes the pidfd of
		// a process that nobody waited for when it collects garbage.
		if err == nil && !strings.HasPrefix(target, "/proc/") && !strings.HasPrefix(target, "anon_inode:") {
			fmt.Fprintln(&b, "fd", fd.Name(), target)
		}
	}
	tasks, _ := filepath.Glob("/proc/self/task/*/children")
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		b.Write(children)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	b.Write(mounts)
	dir, _ := os.Getwd()
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), "*"))
	fmt.Fprintln(&b, dir, left, cgroupsOfTest())
	return b.String()
}

// cgroupsOfTest finds the cgroups named after this process.
func cgroupsOfTest() (found []string) {
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "ocickpt-") && strings.Contains(d.Name(), fmt.Sprint("-", os.Getpid())) {
			found = append(found, path)
		}
		return nil // a cgroup that went away meanwhile is no error
	})
	return found
}

// leavesNoTrace runs f and compares.
func leavesNoTrace(t *testing.T, f func()) {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	before := traces(t)
	f()
	if after := traces(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestProbes(t *testing.T) {
	needRoot(t)
	Probes() // what the Go runtime opens once is open from here on
	leavesNoTrace(t, func() {
		names := map[string]bool{}
		for _, r := range Probes() {
			var major, minor int
			if n, _ := fmt.Sscanf(r.Since, "%d.%d", &major, &minor); n != 2 {
				t.Errorf("%s: since %q is no version", r.Name, r.Since)
			}
			if r.Without == "" || names[r.Name] {
				t.Errorf("%s: named twice, or without a consequence (%q)", r.Name, r.Without)
			}
			names[r.Name] = true
			if r.Required && r.Err != nil {
				t.Errorf("%s: %v", r.Name, r.Err)
			}
		}
	})
}

// TestProbesUnprivileged looks whether the probes tell the truth: as nobody,
// what takes privileges fails and what does not works.
func TestProbesUnprivileged(t *testing.T) {
	needRoot(t)
	cmd := exec.Command("/proc/self/exe", verbProbes)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	failed := map[string]string{}
	if err := json.Unmarshal(out, &failed); err != nil {
		t.Fatal(err)
	}
	for name, reason := range map[string]string{
		"clone3 set_tid": unix.EPERM.Error(), "time namespace": unix.EPERM.Error(), "PTRACE_O_SUSPEND_SECCOMP": unix.EPERM.Error(),
		"PTRACE_SECCOMP_GET_FILTER, _METADATA": unix.EACCES.Error(), "/proc/PID/map_files": unix.EPERM.Error(),
	} {
		if !strings.Contains(failed[name], reason) {
			t.Errorf("%s: %q, want %q", name, failed[name], reason)
		}
	}
	for _, name := range []string{
		"PTRACE_SEIZE, PTRACE_SETSIGMASK", "process_vm_readv, process_vm_writev", "kcmp", "kcmp KCMP_EPOLL_TFD",
		"pidfd_getfd", "openat2 RESOLVE_IN_ROOT", "unix_diag", "/proc/PID/pagemap", "ARCH_MAP_VDSO_64", "PR_SET_MM_MAP",
	} {
		if reason, ok := failed[name]; ok {
			t.Errorf("%s: %s", name, reason)
		}
	}
}

func TestCapabilityProbes(t *testing.T) {
	results, err := CapabilityProbes()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		bit, ok := capabilities[r.Name]
		if !ok || r.Without == "" {
			t.Errorf("%q is no capability, or without a consequence (%q)", r.Name, r.Without)
		}
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&head, &data[0]); err != nil {
			t.Fatal(err)
		}
		if has := data[bit/32].Effective&(1<<(bit%32)) != 0; has != (r.Err == nil) {
			t.Errorf("%s: capget says %v, the probe says %v", r.Name, has, r.Err)
		}
	}
}

// TestHeartELF reads the hand-made program the way others read programs.
func TestHeartELF(t *testing.T) {
	f, err := elf.NewFile(bytes.NewReader(heartELF()))
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != elf.ET_EXEC || f.Machine != elf.EM_X86_64 || len(f.Progs) != 3 {
		t.Fatalf("%v", f.FileHeader)
	}
	text := f.Progs[0]
	code := make([]byte, len(heartCode()))
	if _, err := text.ReadAt(code, int64(f.Entry-text.Vaddr)); err != nil || !bytes.Equal(code, heartCode()) {
		t.Errorf("at the entry %#x: % x, %v", f.Entry, code, err)
	}
	if data := f.Progs[1]; data.Vaddr != heartData || data.Flags != elf.PF_R|elf.PF_W {
		t.Errorf("data: %+v", data.ProgHeader)
	}
}

func TestProve(t *testing.T) {
	needRoot(t)
	log := slog.New(slog.DiscardHandler)
	prove := func() {
		p, err := Prove(context.Background(), log)
		if err != nil {
			t.Fatal(err)
		}
		if p.Checkpoint.Bytes == 0 || p.Checkpoint.Tasks != 1 || p.Checkpoint.ID == "" || p.Restore.Wall == 0 {
			t.Errorf("report: %+v", p)
		}
	}
	prove()
	leavesNoTrace(t, prove)
}

// TestProveCancelled ends the proof at moments all along its way.
func TestProveCancelled(t *testing.T) {
	needRoot(t)
	log := slog.New(slog.DiscardHandler)
	_, _ = Prove(context.Background(), log)
	var outcomes []error
	for delay := time.Duration(0); delay < 120*time.Millisecond; delay += 6 * time.Millisecond {
		leavesNoTrace(t, func() {
			ctx, cancel := context.WithTimeout(context.Background(), delay)
			defer cancel()
			_, err := Prove(ctx, log)
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("cancelled after %v: %v", delay, err)
			}
			outcomes = append(outcomes, err)
		})
	}
	if !slices.ContainsFunc(outcomes, func(err error) bool { return err != nil }) {
		t.Error("no proof was cancelled")
	}
}

// TestProveNoexec names the file system that does not let programs run.
func TestProveNoexec(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("TMPDIR", dir)
	_, err := Prove(context.Background(), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "TMPDIR") {
		t.Errorf("the error is %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}
