package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// nested are scripts for the nested program, see nested.c for the steps.
var nested = []struct {
	name, script string
	options      []option
}{
	{name: "uts", script: "(h()(h))()"},
	{name: "pid", script: "(p(()()))()"},
	{name: "pid deep", script: "(p((p((h)(p(s()))))()))(p)"},
	{name: "pid cloned", script: "({Pg()(())}s(){PH(z)})"},
	{name: "pid orphans", script: "({P((()x)s(()x))(g(()x))()})"},
	{name: "ipc cgroup net", script: "(i()(c))(nl(n))({INC})"},
	{name: "user", script: "(u())(e())({U}{UHNl})", options: nobody},
	{name: "user deep", script: "(u(uh(u)h))({U{U}})", options: nobody},
	{name: "user pid", script: "(up(()()))()", options: nobody},
	{name: "user pid cloned", script: "({UP(()())(s())p(())}{UP})", options: nobody},
	{name: "user pid deep", script: "(up((up(())(s))h))(u(p())(p(())))", options: nobody},
	{name: "user of root", script: "(uph(())){UPNl()}", options: []option{withCapabilities("CAP_SETFCAP")}},
	{name: "time", script: "(t(()))(h(t()))"},
	{name: "user time", script: "(ut(h(t())))", options: nobody},
	{name: "mnt", script: "(m(d))(mf)(mb(mf))", options: []option{withCapabilities("CAP_DAC_OVERRIDE")}},
	{name: "mnt pid", script: "({PMr(d)})(pm(r()))", options: nil},
	{name: "user mnt pid", script: "(upm(r(())))({UPMrfb()})", options: append([]option{unmasked}, nobody...)},
	{name: "mnt memory", script: "(my)(myy)(my(m)y)(mq)(mqy)", options: []option{withCapabilities("CAP_DAC_OVERRIDE")}},
	{name: "mnt stacks", script: "(mya)(myv)", options: []option{withCapabilities("CAP_DAC_OVERRIDE")}},
	{name: "user mnt memory", script: "(umy)(upmy(m))({UMq})", options: append([]option{unmasked}, nobody...)},
	{name: "threads", script: "(up(k(kk)))(uk(k)){UP(k)kk}", options: nobody},
	{name: "apart", script: "[h][nlo][i][c][nchl]()([n(n)(())][])"},
	{name: "apart leader", script: "([]h[n]nol[][h])[][m](m[])([]m[d])(m[f])", options: []option{withCapabilities("CAP_DAC_OVERRIDE")}},
	{name: "apart children", script: "([p(()(h))][p][p(x)][])([]p(()))[t][]"},
	{name: "apart user", script: "(u[h][n])(u[]h[nl])(u[][p(())]n[])", options: nobody},
	{name: "joined", script: "({PHINC}j())"},
}

// unmasked leaves /proc as it is: the kernel lets nobody mount another in a user
// namespace who does not see all of one.
func unmasked(_ *container, spec *specs.Spec) {
	spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = nil, nil
}

// nobody is a user with no rights at all, who may make user namespaces.
var nobody = []option{func(_ *container, spec *specs.Spec) {
	spec.Process.User = specs.User{UID: 1000, GID: 1000}
	spec.Process.Capabilities = &specs.LinuxCapabilities{}
}}

// TestNested checkpoints and restores namespaces that tasks have made; the
// program sees to it that nothing in them changes.
func TestNested(t *testing.T) {
	for _, n := range nested {
		t.Run(n.name, func(t *testing.T) {
			c := newContainer(t, append([]option{withReport("nested"), withArgs("/bin/nested", "nested", n.script),
				withCapabilities("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_TIME", "CAP_SYS_CHROOT")}, n.options...)...).run()
			c.progress(5)
			before, ids := c.tree(), c.innerIDs()
			if want := 1 + strings.Count(n.script, "(") + strings.Count(n.script, "{") - strings.Count(n.script, "x"); len(before) != want {
				t.Fatalf("there are %d processes, not %d", len(before), want)
			}
			t.Cleanup(func() {
				if t.Failed() {
					report, _ := os.ReadFile(c.out("nested"))
					t.Logf("%s", report[max(0, len(report)-500):])
				}
			})
			for range 2 {
				c.checkpoint()
				c.mustBeGone()
				c.restore()
				c.sameTree(before)
				if diff := cmp.Diff(ids, c.innerIDs()); diff != "" {
					t.Fatalf("ids changed (-before +after):\n%s", diff)
				}
				c.progress(10)
			}
			c.checkpoint("--leave-running")
			c.mustBe(specs.StateRunning)
			c.progress(10)
		})
	}
}

// innerIDs are the ids of every thread of the container in each of its pid
// namespaces, as the container's /proc shows them.
func (c *container) innerIDs() (ids []string) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/proc/[0-9]*/task/*/status", c.state().Pid))
	c.must(err)
	for _, name := range files {
		data, err := os.ReadFile(name)
		c.must(err)
		_, rest, _ := strings.Cut(string(data), "NSpid:")
		line, _, _ := strings.Cut(rest, "\n")
		ids = append(ids, strings.TrimSpace(line))
	}
	slices.Sort(ids)
	return ids
}

// TestNestedRefused restores into bundles that do not let a task make what the
// image says that tasks have made.
func TestNestedRefused(t *testing.T) {
	for name, r := range map[string]struct {
		script  string
		options []option
		less    func(spec *specs.Spec)
		says    string
	}{
		"capability": {"(h)", []option{withCapabilities("CAP_SYS_ADMIN", "CAP_SYS_PTRACE")}, func(spec *specs.Spec) {
			spec.Process.Capabilities.Bounding = []string{"CAP_SYS_PTRACE"}
		}, "CAP_SYS_ADMIN"},
		"ids": {"{U}", nobody, func(spec *specs.Spec) { spec.Process.User.UID = 2000 }, "uid 1000"},
		"clocks": {"(t)", []option{withCapabilities("CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_TIME")}, func(spec *specs.Spec) {
			spec.Process.Capabilities.Bounding = []string{"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}
		}, "CAP_SYS_TIME"},
	} {
		t.Run(name, func(t *testing.T) {
			var spec specs.Spec
			keep := func(_ *container, s *specs.Spec) { spec = *s }
			c := newContainer(t, append(append([]option{withReport("nested"), withArgs("/bin/nested", "nested", r.script)}, r.options...), keep)...).run()
			c.progress(5)
			c.checkpoint()
			c.mustBeGone()
			less := spec
			process, capabilities, linux := *spec.Process, *spec.Process.Capabilities, *spec.Linux
			less.Process, less.Process.Capabilities, less.Linux = &process, &capabilities, &linux
			r.less(&less)
			c.writeSpec(&less)
			c.tryRestoreFile(filepath.Join(c.image(), "checkpoint.img"), c.bundle).mustRefuse(t, r.says)
			c.writeSpec(&spec)
			c.restore()
			c.progress(5)
		})
	}
}
