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

func TestParseMount(t *testing.T) {
	for line, want := range map[string]image.Mount{
		"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue": {ID: 36, Parent: 35, Root: "/mnt1", Point: "/mnt2", Options: "rw,noatime", Optional: "master:1", FSType: "ext3", Source: "/dev/root", Super: "rw,errors=continue"},
		`1 0 0:1 / /a\040b\011c\012d\134e ro - tmpfs none rw`:                            {ID: 1, Root: "/", Point: "/a b\tc\nd\\e", Options: "ro", FSType: "tmpfs", Source: "none", Super: "rw"},
		`1 0 0:1 / /a\134040b ro shared:5 master:6 - tmpfs a\040b rw`:                    {ID: 1, Root: "/", Point: `/a\040b`, Options: "ro", Optional: "shared:5 master:6", FSType: "tmpfs", Source: "a b", Super: "rw"},
	} {
		if got, err := parseMount(line); err != nil || got != want {
			t.Errorf("%q is\n%+v, %v; want\n%+v", line, got, err, want)
		}
	}
	for _, bad := range []string{"", " - ", "36 35 98:0 / / rw ext3 x rw", "36 35 98:0 / - ext3 x rw", "x 35 98:0 / / rw - ext3 x rw", "36 y 98:0 / / rw - ext3 x rw", "36 35 98:0 / / rw - ext3"} {
		if m, err := parseMount(bad); err == nil {
			t.Errorf("%q is %+v", bad, m)
		}
	}
}

func TestParseOwnMounts(t *testing.T) {
	dir := t.TempDir() + "/a b\tc\nd\\040e"
	must(t, os.Mkdir(dir, 0o700))
	must(t, unix.Mount("a source", dir, "tmpfs", 0, "size=64k"))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	b, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	found := false
	for line := range strings.Lines(string(b)) {
		m, err := parseMount(strings.TrimSuffix(line, "\n"))
		must(t, err)
		found = found || m.Point == dir && m.Root == "/" && m.FSType == "tmpfs" && m.Source == "a source" && strings.Contains(m.Super, "size=64k")
	}
	if !found {
		t.Errorf("no mount on %q in\n%s", dir, b)
	}
}

func FuzzParseMount(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw")
	f.Add(`1 0 0:1 / /a\04\1340 ro - t \012`)
	f.Fuzz(func(t *testing.T, line string) {
		m, err := parseMount(line)
		if err == nil && (m.FSType == "" || m.Point == "" || m.Options == "") {
			t.Errorf("%+v", m)
		}
	})
}

func TestUnescape(t *testing.T) {
	for s, want := range map[string]string{"": "", "a": "a", `\040`: " ", `\134`: `\`, `\134040`: `\040`, `\040\011\012`: " \t\n", `\`: `\`, `\04`: `\04`} {
		if got := unescape(s); got != want {
			t.Errorf("%q is %q, want %q", s, got, want)
		}
	}
}

func TestCheckMounts(t *testing.T) {
	root := t.TempDir()
	dir, err := os.Open(root)
	must(t, err)
	defer dir.Close()
	must(t, os.MkdirAll(root+"/dev", 0o700))
	must(t, os.MkdirAll(root+"/run/lock", 0o700))
	config := &configs.Config{
		MaskPaths: []string{"/proc/acpi"},
		Mounts: []*configs.Mount{
			{Destination: "/dev", Device: "tmpfs"}, {Destination: "/run", Device: "tmpfs"}, {Destination: "/run/lock", Device: "tmpfs"},
			{Destination: "/sys/fs/cgroup", Device: "cgroup"}, {Destination: "/proc", Device: "proc"},
		},
	}
	mount := func(point, kind string) image.Mount { return image.Mount{Root: "/", Point: point, FSType: kind} }
	try := func(more ...image.Mount) error {
		c := &container{root: dir}
		c.record.Mounts = append([]image.Mount{mount("/", "ext4"), mount("/proc", "proc"), mount("/dev", "tmpfs"), mount("/run", "tmpfs"), mount("/run/lock", "tmpfs")}, more...)
		return checkMounts(c, config)
	}
	must(t, try(mount("/proc/acpi", "tmpfs"), mount("/sys/fs/cgroup/memory", "cgroup"), mount("/dev/console", "devpts")))
	var refused *fail.Refused
	for _, m := range []image.Mount{mount("/mnt", "tmpfs"), mount("/proc/sys", "proc"), mount("/runs", "ext4")} {
		if err := try(m); !errors.As(err, &refused) || !strings.Contains(err.Error(), "mount "+m.Point) {
			t.Errorf("%s: %v", m.Point, err)
		}
	}
	own := func(m image.Mount) bool { return ownTmpfs(config, &m) }
	config.Mounts = append(config.Mounts, &configs.Mount{Destination: "/mnt", Device: "bind", Flags: unix.MS_BIND})
	if !own(mount("/run", "tmpfs")) || own(mount("/mnt", "tmpfs")) || own(mount("/", "tmpfs")) || own(mount("/proc/acpi", "tmpfs")) || own(image.Mount{Root: "/sub", Point: "/run", FSType: "tmpfs"}) {
		t.Error("which file systems in memory are the container's own is not told")
	}
	mounts := []image.Mount{{ID: 5, Point: "/run"}, {ID: 6, Parent: 5, Point: "/run/lock/a"}, {ID: 7, Parent: 6, Point: "/run/lock/a/b"}, {ID: 8, Parent: 5, Point: "/runs"}}
	if got := coveredIn(mounts, &mounts[0]); !slices.Equal(got, []string{"lock/a"}) {
		t.Errorf("covered: %q", got)
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
