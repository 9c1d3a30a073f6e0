package integration

import (
	"fmt"
	"strings"
	"testing"
)

// TestHostName changes the names of a container from inside, and from outside, and
// a limit of its ipc namespace.
func TestHostName(t *testing.T) {
	c := treeContainer(t, withCapabilities("CAP_SYS_ADMIN"))
	c.exec("sh", "-c", "hostname renamed; echo -n example.org >/proc/sys/kernel/domainname || true")
	want := c.exec("sh", "-c", "hostname; cat /proc/sys/kernel/domainname")
	if !strings.HasPrefix(want, "renamed\n") {
		t.Fatalf("the names are %q", want)
	}
	cycle(c, 2)
	if got := c.exec("sh", "-c", "hostname; cat /proc/sys/kernel/domainname"); got != want {
		t.Fatalf("the names are %q, not %q", got, want)
	}
	c.must(run("nsenter", "-t", fmt.Sprint(c.state().Pid), "-i", "sh", "-c", "echo 5000000 >/proc/sys/kernel/shmmax"))
	c.checkpoint()
	c.mustBeGone()
	c.refusesBundles(t, map[string][3]string{
		"capability":    {`"CAP_SYS_ADMIN"`, `"CAP_SYS_NICE"`, "CAP_SYS_ADMIN"},
		"namespace":     {`"type": "uts"`, `"type": "cgroup"`, "UTS namespace"},
		"ipc namespace": {`"type": "ipc"`, `"type": "cgroup"`, "no ipc namespace of its own"},
	})
	c.restore()
	cycle(c, 1)
	if got := c.exec("cat", "/proc/sys/kernel/shmmax"); got != "5000000\n" {
		t.Errorf("kernel.shmmax is %q", got)
	}

	c = treeContainer(t)
	pid := c.state().Pid
	c.must(run("nsenter", "-t", fmt.Sprint(pid), "-u", "hostname", "outside"))
	if said := c.checkpoint().stderr; !strings.Contains(said, "changed from outside") {
		t.Errorf("no warning: %s", said)
	}
	c.mustBeGone()
	c.restore()
	if got := c.exec("hostname"); got != c.id+"\n" {
		t.Errorf("the name is %q, not the bundle's", got)
	}
}
