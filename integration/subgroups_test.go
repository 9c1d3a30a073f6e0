package integration

import (
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// withCgroups lets the container make cgroups below its own.
func withCgroups() option {
	return func(_ *container, spec *specs.Spec) {
		for i := range spec.Mounts {
			if m := &spec.Mounts[i]; m.Type == "cgroup" {
				m.Options = append(slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" }), "rw")
			}
		}
	}
}

// subgroups takes cgroups that a container has made through two generations.
func subgroups(t *testing.T, arg string) {
	c := newContainer(t, withReport("subgroups"), withArgs("/bin/subgroups", arg), withCgroups(),
		withCapabilities("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SYS_ADMIN")).run()
	c.progress(5)
	cycle(c, 2)
	c.checkpoint("--leave-running")
	c.progress(5)
}

func TestSubgroups(t *testing.T) {
	subgroups(t, "v1")
}

func TestSubgroupsV2(t *testing.T) {
	onCgroupV2(t, func(t *testing.T) { subgroups(t, "v2") })
}

// TestSubgroupsRefused holds cgroups that cannot be saved, or not be made again.
func TestSubgroupsRefused(t *testing.T) {
	c := newContainer(t, withReport("subgroups"), withArgs("/bin/subgroups", "frozen"), withCgroups()).run()
	c.progress(3)
	c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, "survey", "cgroup freezer:held", "frozen it itself")
	c.progress(3)
	c.exec("sh", "-c", "echo THAWED >/sys/fs/cgroup/freezer/held/freezer.state")
	c.checkpoint()
	c.mustBeGone()
	c.refusesBundles(t, map[string][3]string{
		"no room for cgroups": {`"rw"`, `"ro"`, "cgroup freezer:held"},
	})
	c.restore()
	c.progress(3)
}
