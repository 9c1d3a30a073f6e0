package integration

import (
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestOdd holds state of tasks and threads that no checkpoint takes. Each is
// refused by name, most before the container is stopped, and it goes on.
func TestOdd(t *testing.T) {
	for _, odd := range []struct {
		name  string
		args  []string
		words []string
	}{
		{"traced", []string{"/bin/odd", "tracer"}, []string{"survey:", "traced by task 1 ", "odd"}},
		{"traced thread", []string{"/bin/odd", "thread-tracer"}, []string{"survey:", "thread ", "traced by task 1 "}},
		{"traced by its parent", []string{"/bin/odd", "traceme"}, []string{"survey:", "traced by task 1 "}},
		{"seccomp listener", []string{"/bin/odd", "listened"}, []string{"task 1 ", "seccomp filter 0", "listener"}},
		{"no room left", []string{"/bin/odd", "full"}, []string{"survey:", "task 1 ", "RLIMIT_AS", "prlimit"}},
		{"Landlock", []string{"/bin/odd", "landlocked"}, []string{"survey:", "task 1 ", "thread 1", "Landlock"}},
		{"Landlock in a child", []string{"sh", "-c", "odd landlocked & sleep 0.2; exec sleep 1000"}, []string{"survey:", "Landlock", "odd"}},
	} {
		t.Run(odd.name, func(t *testing.T) {
			c := newContainer(t, withReport("odd"), withArgs(odd.args...), withNewPrivileges()).run()
			c.progress(5)
			c.ocickpt("checkpoint", "--image-path", c.newImage(), c.id).mustRefuse(t, odd.words...)
			c.mustBe(specs.StateRunning)
			c.progress(5)
		})
	}
}

// TestWarned holds state that belongs to the machine: the checkpoint says that
// the image lacks it.
func TestWarned(t *testing.T) {
	for _, odd := range []struct {
		name  string
		words []string
	}{
		{"keeper", []string{"process keyring", "session keyring", "1 keys"}},
		{"watched", []string{"debug registers"}},
		{"iosharer", []string{"share an I/O context", "thread 1 of task 1"}},
		{"cored", []string{"dumped core", "odd"}},
	} {
		t.Run(odd.name, func(t *testing.T) {
			c := newContainer(t, withReport("odd"), withArgs("/bin/odd", odd.name)).run()
			c.progress(5)
			said := c.checkpoint().stderr
			for _, word := range odd.words {
				if !strings.Contains(said, word) {
					t.Errorf("the checkpoint does not mention %q: %s", word, said)
				}
			}
			c.mustBeGone()
			c.restore()
			c.progress(5)
			// A session keyring is joined by name, and an old one may be there yet.
			if again := c.checkpoint("--leave-running").stderr; strings.Contains(again, odd.words[0]) {
				t.Errorf("the restored container still has what the image lacks: %s", again)
			}
		})
	}
}

// TestDumpableByRoot restores what only the kernel can set, where the host says
// so, for as short as it takes.
func TestDumpableByRoot(t *testing.T) {
	const sysctl = "/proc/sys/fs/suid_dumpable"
	was, err := os.ReadFile(sysctl)
	if err != nil {
		t.Fatal(err)
	}
	set := func(value string) {
		if err := os.WriteFile(sysctl, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	defer set(string(was))
	set("2")
	c := newContainer(t, withReport("odd"), withArgs("/bin/odd", "rooted"), withCapabilities("CAP_SETUID")).run()
	c.progress(3)
	set(string(was))
	for range 2 {
		c.checkpoint()
		c.mustBeGone()
		set("2")
		c.restore()
		set(string(was))
		c.progress(3)
	}
}
