package integration

import (
	"os"
	"strings"
	"testing"

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
	{name: "joined", script: "({PHINC}j())"},
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
			before := c.tree()
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
				c.progress(10)
			}
			c.checkpoint("--leave-running")
			c.mustBe(specs.StateRunning)
			c.progress(10)
		})
	}
}
