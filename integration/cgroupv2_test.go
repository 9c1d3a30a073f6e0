package integration

import (
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// envCgroupV2 tells a test binary that it runs in a mount namespace in which
// cgroup2 is all there is.
const envCgroupV2 = "OCICKPT_TEST_CGROUP_V2"

func inCgroupV2() bool {
	var s unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

// onCgroupV2 runs body on a pure cgroup v2. Where the host has v1 controllers
// the test binary runs itself again, for this one test, in a private mount
// namespace in which cgroup2 covers /sys/fs/cgroup.
func onCgroupV2(t *testing.T, body func(t *testing.T)) {
	t.Helper()
	if inCgroupV2() {
		body(t)
		return
	}
	if os.Getenv(envCgroupV2) != "" {
		t.Fatal("/sys/fs/cgroup is still not a cgroup2 file system")
	}
	const script = `mount --make-rprivate / && umount -l /sys/fs/cgroup &&
		mount -t cgroup2 none /sys/fs/cgroup && exec "$@"`
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "sh", "-ec", script, "sh",
		self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), envCgroupV2+"=1", envFixtures+"="+fixtures)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("on cgroup v2: %v\n%s", err, out)
	}
}
