package runtime

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

func TestOwnTmpfs(t *testing.T) {
	config := &configs.Config{Mounts: []*configs.Mount{
		{Destination: "/dev", Device: "tmpfs"}, {Destination: "/run", Device: "tmpfs"}, {Destination: "/run/lock", Device: "tmpfs"},
		{Destination: "/mnt", Device: "bind", Flags: unix.MS_BIND},
	}}
	mount := func(point string) image.Mount { return image.Mount{Root: "/", Point: point, FSType: "tmpfs"} }
	own := func(m image.Mount) bool { return ownTmpfs(config, &m) }
	if !own(mount("/run")) || own(mount("/mnt")) || own(mount("/")) || own(mount("/proc/acpi")) || own(image.Mount{Root: "/sub", Point: "/run", FSType: "tmpfs"}) ||
		!own(image.Mount{Point: "/x", FSType: "tmpfs", Own: image.MountNew}) || own(image.Mount{Point: "/run", FSType: "tmpfs", Own: image.MountBind}) {
		t.Error("which file systems in memory are the container's own is not told")
	}
	mounts := []image.Mount{{ID: 5, Point: "/run"}, {ID: 6, Parent: 5, Point: "/run/lock/a"}, {ID: 7, Parent: 6, Point: "/run/lock/a/b"}, {ID: 8, Parent: 5, Point: "/runs"}}
	if got, more := coveredIn(mounts, &mounts[0]); !slices.Equal(got, []string{"lock/a"}) || more {
		t.Errorf("covered: %q, %t", got, more)
	}
	mounts[1].Own = image.MountBind
	if got, more := coveredIn(mounts, &mounts[0]); len(got) != 0 || !more {
		t.Errorf("covered: %q, %t", got, more)
	}
}

func TestLabel(t *testing.T) {
	config := &configs.Config{Labels: []string{"bundles=/no", "bundle=/srv/a=b", "bundle=/late"}}
	if got := label(config, "bundle"); got != "/srv/a=b" || label(config, "x") != "" {
		t.Errorf("%q", got)
	}
}

func TestOffset(t *testing.T) {
	for _, clock := range []int32{unix.CLOCK_MONOTONIC, unix.CLOCK_BOOTTIME} {
		for _, ahead := range []int64{0, 1, -1, 999_999_999, -999_999_999, 5e9, -5e9, -5_500_000_000, 1e15} {
			var now unix.Timespec
			must(t, unix.ClockGettime(clock, &now))
			o := offset(clock, now.Nano()+ahead)
			off := ahead - (o.Secs*1e9 + int64(o.Nanosecs)) // what has gone by since
			if o.Nanosecs >= 1e9 || off < 0 || off > 1e9 {
				t.Errorf("clock %d, %d ahead: %+v", clock, ahead, o)
			}
		}
	}
}

func TestRequiredFeatures(t *testing.T) {
	have := []string{"sse2", "avx", "fpu"}
	for _, c := range []struct {
		need string
		want string
	}{
		{"", ""}, {"sse2 avx", ""}, {"avx512f sse2 amx_tile", "avx512f amx_tile"}, {"hypervisor constant_tsc vmx arch_perfmon", ""}, {"rdrand ibrs", "rdrand"},
	} {
		if got := strings.Join(requiredFeatures(have, strings.Fields(c.need)), " "); got != c.want {
			t.Errorf("%q needs %q, want %q", c.need, got, c.want)
		}
	}
	for flag, want := range map[string]bool{"avx2": true, "xsavec": true, "fsgsbase": true, "pku": true, "bmi1": true, "nx": false, "syscall": false, "ibpb": false, "tsc_adjust": false, "xsaveerptr": false, "erms": false, "shstk": false, "": false} {
		if userVisible(flag) != want {
			t.Errorf("%q is visible to programs: %v, want %v", flag, !want, want)
		}
	}
	if flags := machine().Features; len(flags) < 20 || len(requiredFeatures(flags, flags)) != 0 {
		t.Errorf("this processor has %v", flags)
	}
}

func TestCheckMachine(t *testing.T) {
	here := machine()
	var u unix.Utsname
	must(t, unix.Uname(&u))
	here.Machine = unix.ByteSliceToString(u.Machine[:])
	var said strings.Builder
	r := &restore{RestoreOptions: RestoreOptions{Log: slog.New(slog.NewTextHandler(&said, nil))}}
	must(t, r.checkMachine(&image.Head{Arch: here}))
	if said.Len() > 0 || here.Model == "" {
		t.Errorf("this machine %q is another than itself: %s", here.Model, said.String())
	}
	for why, change := range map[string]func(a *image.Arch){
		"type alpha": func(a *image.Arch) { a.Machine = "alpha" }, "8192": func(a *image.Arch) { a.PageSize = 8192 },
		"avx9000": func(a *image.Arch) { a.Features = append([]string{"avx9000"}, a.Features...) },
	} {
		other := here
		change(&other)
		if err := r.checkMachine(&image.Head{Arch: other}); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
	}
}

// A thread's registers move to where this processor has them, or are refused by
// name.
func TestExtendedState(t *testing.T) {
	here := machine()
	here.Machine = "x86_64"
	var said strings.Builder
	r := &restore{RestoreOptions: RestoreOptions{Log: slog.New(slog.NewTextHandler(&said, nil))}}
	then := here
	then.XSize, then.Model = 4000, "another"
	then.XFeatures = 7
	then.XLayout = []image.XComponent{{Number: 2, Offset: 3000, Size: 256}}
	state := make([]byte, then.XSize)
	state[512] = 7
	copy(state[3000:], "the upper halves of ymm0")
	state[100] = 42
	head := func(x []byte) *image.Head {
		return &image.Head{Arch: then, Tasks: []*image.Task{{Pid: 5, Threads: []image.Thread{{Tid: 6, XState: x}}}}}
	}
	h := head(state)
	must(t, r.checkMachine(h))
	moved := h.Tasks[0].Threads[0].XState
	if len(moved) != int(here.XSize) || moved[100] != 42 || moved[512] != 7 || !strings.HasPrefix(string(moved[here.XLayout[0].Offset:]), "the upper halves of ymm0") {
		t.Errorf("an extended state of %d bytes, %d", len(moved), moved[512])
	}
	if !strings.Contains(said.String(), "another") || !strings.Contains(said.String(), "AVX-512") {
		t.Errorf("differences were not mentioned: %s", said.String())
	}
	state[512+2] = 1 << (18 - 16)
	if err := r.checkMachine(head(state)); err == nil || !strings.Contains(err.Error(), "task 5: thread 6: ") || !strings.Contains(err.Error(), "AMX tiles") {
		t.Errorf("AMX here: %v", err)
	}
	state[512+2] = 0
	then.XLayout = []image.XComponent{{Number: 2, Offset: 3000, Size: 128}}
	if err := r.checkMachine(head(state)); err == nil || !strings.Contains(err.Error(), "size") {
		t.Errorf("half an AVX: %v", err)
	}
}

func TestSortTree(t *testing.T) {
	p := func(pid, ppid int32) image.Process { return image.Process{Pid: pid, Ppid: ppid} }
	tree, err := sortTree([]image.Process{p(9, 7), p(7, 1), p(12, 9), p(1, 0), p(3, 1), p(2, 12)})
	must(t, err)
	seen := map[int32]bool{0: true}
	for _, one := range tree.Processes {
		if !seen[one.Ppid] {
			t.Errorf("%d stands before its parent %d", one.Pid, one.Ppid)
		}
		seen[one.Pid] = true
	}
	if len(tree.Processes) != 6 {
		t.Errorf("%d processes", len(tree.Processes))
	}
	for name, bad := range map[string][]image.Process{
		"a parent that is missing": {p(1, 0), p(3, 2)}, "a loop": {p(1, 0), p(3, 4), p(4, 3)}, "one that is its own parent": {p(1, 0), p(2, 2)},
	} {
		if tree, err := sortTree(bad); err == nil {
			t.Errorf("%s: %+v", name, tree)
		}
	}
}

func TestJoin(t *testing.T) {
	first, more := fail.Refuse("fd 3", "no", "close it"), errors.New("the freezer is gone")
	if join(first, nil) != error(first) {
		t.Error("nothing more went wrong")
	}
	err := join(first, more)
	var refused *fail.Refused
	if line := err.Error(); !errors.As(err, &refused) || strings.Contains(line, "\n") || !strings.Contains(line, "fd 3: no; close it") || !strings.Contains(line, "the freezer is gone") {
		t.Errorf("%q", line)
	}
}

func TestErrorRecord(t *testing.T) {
	whole := &fail.Error{Phase: "collect", Task: "task 7", Object: "fd 3", Cause: io.EOF, Remedy: "r"}
	for _, c := range []struct {
		err  error
		want image.Error
	}{
		{whole, image.Error{Phase: "collect", Task: "task 7", Object: "fd 3", Cause: "EOF", Remedy: "r"}},
		{fmt.Errorf("more: %w", whole), image.Error{Phase: "collect", Task: "task 7", Object: "fd 3", Cause: "EOF", Remedy: "r"}},
		{io.EOF, image.Error{Phase: "checkpoint", Cause: "EOF"}},
	} {
		if got := errorRecord(c.err); got != c.want {
			t.Errorf("%+v, want %+v", got, c.want)
		}
	}
}

func TestCgroupsOf(t *testing.T) {
	mine, err := cgroupsOf(os.Getpid())
	if err != nil || len(mine) == 0 {
		t.Fatalf("%v, %v", mine, err)
	}
	for controller, path := range mine {
		if !strings.HasPrefix(path, "/") {
			t.Errorf("%q is at %q", controller, path)
		}
	}
	if _, err := cgroupsOf(1 << 22); !errors.Is(err, tracee.ErrGone) {
		t.Errorf("of nobody: %v", err)
	}
}

func TestReadIDMaps(t *testing.T) {
	m, err := readIDMaps(os.Getpid())
	must(t, err)
	if len(m.UID) == 0 || len(m.GID) == 0 || m.UID[0].Size == 0 {
		t.Errorf("%+v", m)
	}
}
