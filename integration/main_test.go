// Package integration runs whole journeys of the ocickpt command against the
// real runc: programs that hold kernel state and check it are run in
// containers, checkpointed, restored and looked at from outside and inside.
//
// The tests need root, runc, busybox-static, gcc and Go; hack/setup installs
// what Debian has of these.
package integration

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// envFixtures carries the built programs to a test binary that runs
	// itself again in another mount namespace.
	envFixtures = "OCICKPT_TEST_FIXTURES"
	// envBinary names an ocickpt to test in place of one built here.
	envBinary = "OCICKPT_TEST_BINARY"
)

// fixtures is the directory with what is built once for all tests: bin/ with
// busybox, its applets and the test programs, and the ocickpt command.
var fixtures string

func TestMain(m *testing.M) {
	flag.Parse()
	if err := prepare(); err != nil {
		fmt.Fprintf(os.Stderr, "integration tests cannot run: %v\n", err)
		os.Exit(1)
	}
	code := runTests(m)
	if os.Getenv(envFixtures) == "" {
		os.RemoveAll(fixtures)
	}
	os.Exit(code)
}

// prepare checks the host and builds the fixtures. Containers and guardians
// left behind by their starters become children of the nearest subreaper: the
// test process makes itself that, to see and reap every one of them.
func prepare() error {
	if os.Geteuid() != 0 {
		return errors.New("root is needed (sudo make test)")
	}
	for _, tool := range []string{"runc", "gcc", "go", "unshare", "nsenter", "ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w; hack/setup installs it", err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a subreaper: %w", err)
	}
	fixtures = os.Getenv(envFixtures)
	if fixtures != "" {
		return nil
	}
	return build()
}

func build() (err error) {
	if fixtures, err = os.MkdirTemp("", "ocickpt-integration-"); err != nil {
		return err
	}
	bin := filepath.Join(fixtures, "bin")
	for _, step := range []func(bin string) error{
		makeBusybox, buildPrograms, buildGopause, buildCommand,
	} {
		if err := step(bin); err != nil {
			os.RemoveAll(fixtures)
			return err
		}
	}
	return nil
}

func makeBusybox(bin string) error {
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if err := run("cp", "/bin/busybox", bin); err != nil {
		return err
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
			return err
		}
	}
	return nil
}

// buildPrograms compiles testdata/programs/*.c, statically, so that they run
// in a root file system with nothing else in it.
func buildPrograms(bin string) error {
	sources, err := filepath.Glob("testdata/programs/*.c")
	if err != nil || len(sources) == 0 {
		return fmt.Errorf("no test programs found: %w", err)
	}
	for _, source := range sources {
		name := strings.TrimSuffix(filepath.Base(source), ".c")
		if err := run("gcc", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror",
			"-o", filepath.Join(bin, name), source); err != nil {
			return err
		}
	}
	for name, source := range narrowPrograms {
		if err := run("gcc", "-m32", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror",
			"-o", filepath.Join(bin, name), "testdata/"+source); err != nil {
			return err
		}
	}
	return run("cp", "testdata/programs/tree.sh", "testdata/programs/threads.py", bin)
}

func buildGopause(bin string) error {
	cmd := exec.Command("go", "build", "-o", filepath.Join(bin, "gopause"), "./testdata/gopause")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	return runCmd(cmd)
}

func buildCommand(string) error {
	target := filepath.Join(fixtures, "ocickpt")
	if given := os.Getenv(envBinary); given != "" {
		return run("cp", given, target)
	}
	return run("go", "build", "-tags", "runc_nocriu", "-trimpath", "-o", target, "../cmd/ocickpt")
}

func run(name string, args ...string) error { return runCmd(exec.Command(name, args...)) }

func runCmd(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}
