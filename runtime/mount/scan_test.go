package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var bundle = &configs.Config{
	MaskPaths: []string{"/proc/acpi"},
	Mounts: []*configs.Mount{
		{Destination: "/proc", Device: "proc", Source: "proc"}, {Destination: "/dev", Device: "tmpfs", Source: "tmpfs"},
		{Destination: "/sys", Device: "sysfs", Source: "sysfs"}, {Destination: "/sys/fs/cgroup", Device: "cgroup", Source: "cgroup"},
		{Destination: "/data", Device: "bind", Flags: unix.MS_BIND | unix.MS_REC},
	},
}

// parse makes a set of lines of mountinfo.
func parse(t *testing.T, may bool, lines ...string) *Set {
	t.Helper()
	base := []string{
		"1 0 8:1 /r / rw - ext4 d rw", "2 1 0:2 / /proc rw - proc proc rw", "3 1 0:3 / /dev rw - tmpfs tmpfs rw",
		"4 1 0:4 / /sys rw - sysfs sysfs rw", "5 4 0:5 / /sys/fs/cgroup rw - tmpfs tmpfs rw", "6 5 0:6 /c /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
		"7 2 0:7 / /proc/acpi ro - tmpfs tmpfs ro", "8 1 8:2 /v /data rw - xfs e rw",
	}
	list, err := mountinfo.GetMountsFromReader(strings.NewReader(strings.Join(append(base, lines...), "\n")), nil)
	must(t, err)
	return &Set{Env: Env{Config: bundle, May: may, Groups: map[string]string{"cpu": "/c"}}, infos: list, Mounts: Records(list)}
}

// TestRecipes tells the bundle's mounts from the container's own, and where these
// come from.
func TestRecipes(t *testing.T) {
	s := parse(t, true,
		"10 1 0:10 / /t rw - tmpfs own rw", "11 1 0:10 /a /b ro - tmpfs own rw", "12 10 8:1 /r/etc /t rw - ext4 d rw",
		"13 1 0:4 / /y rw - sysfs none rw", "14 1 0:4 / /z rw - sysfs sysfs rw", "15 1 0:6 /c /k rw - cgroup again rw,cpu",
		"16 2 0:16 / /proc rw - proc proc rw", "17 8 8:2 /v/w /data/x rw - xfs e rw", "18 13 0:18 / /y/x rw - proc p rw",
		"19 1 0:4 / /yy rw - sysfs none rw",
	)
	left, err := s.classify()
	must(t, err)
	must(t, s.recipes())
	want := map[int]string{10: "new 0", 11: "bind 10", 12: "bind 1", 13: "new 0", 14: "bind 4", 15: "new 0", 16: "new 0", 17: "bind 8", 18: "new 0", 19: "bind 13"}
	for _, m := range s.Mounts {
		if got := fmt.Sprint(m.Own, " ", m.From); m.Own != "" && got != want[m.ID] || m.Own == "" && want[m.ID] != "" {
			t.Errorf("mount %d is %q, want %q", m.ID, got, want[m.ID])
		}
	}
	if len(left["/dev"]) != 0 || len(left["/proc/acpi"]) != 0 {
		t.Errorf("left: %v", left)
	}
	s = parse(t, true, "10 1 0:10 /a /b rw - tmpfs own rw")
	_, err = s.classify()
	must(t, err)
	refused(t, s.recipes(), "not mounted in the container any more")
}

func refused(t *testing.T, err error, says string) {
	t.Helper()
	var r *fail.Refused
	if !errors.As(err, &r) || !strings.Contains(err.Error(), says) {
		t.Errorf("%v does not say %q", err, says)
	}
}

// TestWithoutRights refuses what a container without CAP_SYS_ADMIN cannot have
// mounted, and looks no closer at what the bundle mounts.
func TestWithoutRights(t *testing.T) {
	s := parse(t, false, "10 1 0:10 / /dev rw - tmpfs other rw", "11 8 0:11 / /data/x rw - ext4 y rw", "12 5 0:12 / /sys/fs/cgroup/new rw - cgroup c rw")
	_, err := s.classify()
	must(t, err)
	for _, line := range []string{"10 1 0:10 / /mnt rw - tmpfs x rw", "10 2 0:2 /sys /proc/sys ro - proc proc rw", "10 1 8:2 / /datas rw - xfs e rw"} {
		_, err := parse(t, false, line).classify()
		refused(t, err, "it is not the bundle's")
	}
}

func TestChecks(t *testing.T) {
	for line, says := range map[string]string{
		"10 1 0:10 / /t rw - fuse.x f rw":                                        "type fuse.x",
		"10 1 0:10 / /t rw,idmapped - tmpfs f rw":                                "it is idmapped",
		"10 99 0:10 / /t rw - tmpfs f rw":                                        "stands on nothing",
		"10 1 0:10 / /t rw master:7 - tmpfs f rw":                                "events from outside",
		"10 1 0:10 / /t rw - overlay o rw,lowerdir=/a:b":                         "not an absolute path",
		"10 1 0:10 / /t rw - overlay o rw,lowerdir=/" + strings.Repeat("x", 260): "longer than the 255 bytes",
		`10 1 0:10 / /t rw - overlay o rw,lowerdir=/a\134:b`:                     "has a character",
	} {
		s := parse(t, true, line)
		s.host = []*mountinfo.Info{}
		if _, err := s.classify(); err != nil {
			t.Error(err)
		}
		must(t, s.recipes())
		refused(t, s.check(&s.Mounts[len(s.Mounts)-1]), says)
	}
}

// TestView looks at mounts below others, in a namespace of its own.
func TestView(t *testing.T) {
	dir := t.TempDir()
	goruntime.LockOSThread() // which ends with the test
	must(t, unix.Unshare(unix.CLONE_NEWNS))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("one", dir, "tmpfs", 0, ""))
	defer func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil {
		}
	}()
	for _, d := range []string{"a", "b"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	must(t, os.WriteFile(filepath.Join(dir, "a/file"), nil, 0o600))
	must(t, unix.Mount("two", dir+"/a", "tmpfs", 0, ""))
	must(t, os.WriteFile(filepath.Join(dir, "a/second"), nil, 0o600))
	must(t, unix.Mount("three", dir+"/a", "tmpfs", 0, ""))
	must(t, unix.Mount("", dir+"/a", "", unix.MS_UNBINDABLE, ""))
	must(t, unix.Mount("four", dir, "tmpfs", 0, ""))
	list, err := Read(unix.Gettid())
	must(t, err)
	s := &Set{Env: Env{Init: unix.Gettid()}, infos: list, Mounts: Records(list), views: map[int]*os.File{}}
	for source, want := range map[string][]string{"one": {"a", "b"}, "two": {"second"}, "three": nil, "four": nil} {
		i := slices.IndexFunc(s.Mounts, func(m image.Mount) bool { return m.Source == source && strings.HasPrefix(m.Point, dir) })
		names, err := s.list(&s.Mounts[i])
		must(t, err)
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Errorf("%s holds %q, want %q", source, names, want)
		}
		if source == "one" {
			var st unix.Stat_t
			f, _ := s.View(s.Mounts[i].ID)
			must(t, unix.Fstatat(int(f.Fd()), "a/file", &st, 0))
			if !s.Covered(s.Mounts[i].ID, dir+"/a/file", &st) || s.Covered(s.Mounts[i].ID, dir+"/b", &st) {
				t.Error("a covered file is not told")
			}
		}
	}
	must(t, s.Close())
	now, err := Read(unix.Gettid())
	must(t, err)
	if len(now) != len(list) {
		t.Errorf("there were %d mounts, there are %d", len(list), len(now))
	}
}

func TestSharing(t *testing.T) {
	for text, want := range map[string]sharing{"": {}, "shared:5 master:6": {peers: 5, master: 6}, "unbindable": {unbindable: true}, "master:3 propagate_from:4": {master: 3}} {
		if got := sharingOf(text); got != want {
			t.Errorf("%q is %+v", text, got)
		}
	}
	if attr, err := attributesOf("ro,nosuid,relatime"); err != nil || attr != unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID {
		t.Errorf("%#x, %v", attr, err)
	}
	if attr, err := attributesOf("rw"); err != nil || attr != unix.MOUNT_ATTR_STRICTATIME {
		t.Errorf("%#x, %v", attr, err)
	}
}
