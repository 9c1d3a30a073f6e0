package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime"
)

// The test binary is the program itself when this variable is set.
const mainEnv = "OCICKPT_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main() // ends the process
	}
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ocickpt runs the program and returns what it prints and its exit status.
func ocickpt(t *testing.T, stdin []byte, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	c := exec.Command("/proc/self/exe", args...)
	c.Env = append(os.Environ(), mainEnv+"=1", "GORACE=atexit_sleep_ms=0")
	c.Dir = t.TempDir()
	c.Stdin = bytes.NewReader(stdin)
	var out, diagnostics bytes.Buffer
	c.Stdout, c.Stderr = &out, &diagnostics
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), diagnostics.String(), c.ProcessState.ExitCode()
}

func sample(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := image.NewWriter(&b)
	must(t, w.Record(image.TypeHeader, 0, image.Header{Magic: image.HeaderMagic, Revision: image.Revision, ByteOrder: "little"}))
	must(t, w.Record(image.TypeArch, 0, image.Arch{PageSize: image.PageSize}))
	must(t, w.Record(image.TypeContainer, 0, image.Container{ID: "web"}))
	must(t, w.Record(image.TypeTree, 0, image.Tree{Processes: []image.Process{{Pid: 1, Pids: []int32{1}, Zombie: true}}}))
	must(t, w.Close())
	return b.Bytes()
}

// An error is one line on standard error, names what was wrong, and gives 1.
func TestErrorsAreOneLine(t *testing.T) {
	for _, c := range []struct {
		args string
		says string
	}{
		{"checkpoint", "checkpoint takes one argument, a container's id; got 0"},
		{"checkpoint a b", "got 2"},
		{"checkpoint --image x --image-path y a", "exclude each other"},
		{"restore --image x --image-path y a", "exclude each other"},
		{"--root /nonexistent checkpoint nobody", `container "nobody" does not exist`},
		{"restore nobody", "checkpoint.img"},
		{"checkpoint --frobnicate a", "frobnicate"},
		{"--log-format xml checkpoint a", `log format "xml"`},
		{"--log /nonexistent/log checkpoint a", "/nonexistent/log"},
		{"verify", "verify needs one argument"},
		{"verify /nonexistent", "/nonexistent"},
		{"inspect -", "standard input"},
		{"verify -", "standard input"},
	} {
		stdout, stderr, status := ocickpt(t, nil, strings.Fields(c.args)...)
		line, more, _ := strings.Cut(stderr, "\n")
		if status != 1 || more != "" || !strings.HasPrefix(line, "ocickpt: ") || !strings.Contains(line, c.says) || stdout != "" {
			t.Errorf("%s: exit %d, %q, %q; want %q", c.args, status, stdout, stderr, c.says)
		}
	}
}

func TestVerifyAndInspect(t *testing.T) {
	good := sample(t)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, runtime.ImageFile), good, 0o600))
	for _, name := range []string{"-", dir, filepath.Join(dir, runtime.ImageFile)} {
		if stdout, stderr, status := ocickpt(t, good, "verify", name); status != 0 || !strings.Contains(stdout, "good") {
			t.Errorf("verify %s: exit %d, %q, %q", name, status, stdout, stderr)
		}
		if stdout, _, status := ocickpt(t, good, "inspect", name); status != 0 || !strings.Contains(stdout, "web") {
			t.Errorf("inspect %s: exit %d, %q", name, status, stdout)
		}
	}
	stdout, _, _ := ocickpt(t, good, "inspect", "--json", "-")
	var v map[string]any
	if err := json.Unmarshal([]byte(stdout), &v); err != nil || len(v) == 0 {
		t.Errorf("%q: %v", stdout, err)
	}
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	for name, b := range map[string][]byte{"damaged": bad, "cut off": good[:len(good)-9], "empty": nil} {
		if stdout, stderr, status := ocickpt(t, b, "verify", "-"); status != 1 || stdout != "" || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit %d, %q, %q", name, status, stdout, stderr)
		}
	}
}

// Engines read the keys that runc writes.
func TestLog(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	for range 2 { // appended to
		_, stderr, _ := ocickpt(t, nil, "--log", log, "--log-format", "json", "--root", "/nonexistent", "checkpoint", "nobody")
		if !strings.HasPrefix(stderr, "ocickpt: ") {
			t.Errorf("%q", stderr)
		}
	}
	b, err := os.ReadFile(log)
	must(t, err)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for _, line := range lines {
		var entry struct{ Level, Msg, Time string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level != "error" || !strings.Contains(entry.Msg, "nobody") || entry.Time == "" {
			t.Errorf("%q: %v", line, err)
		}
	}
	if st, err := os.Stat(log); err != nil || len(lines) != 2 || st.Mode() != 0o600 {
		t.Errorf("%d lines, %v, %v", len(lines), st.Mode(), err)
	}
}

func TestReport(t *testing.T) {
	for err, want := range map[error]int{
		nil: 0, exitStatus(7): 7, fmt.Errorf("wrapped: %w", exitStatus(130)): 130,
	} {
		if got := report(err); got != want {
			t.Errorf("%v exits with %d, want %d", err, got, want)
		}
	}
}

// parsed calls f with the flags of a command as the arguments set them.
func parsed(t *testing.T, command *cli.Command, args []string, f func(c *cli.Context) error) error {
	t.Helper()
	app := &cli.App{Commands: []*cli.Command{{Name: command.Name, Flags: command.Flags, Action: f}}, ExitErrHandler: func(*cli.Context, error) {}}
	return app.Run(append([]string{"ocickpt", command.Name}, args...))
}

func TestImageOut(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for args, want := range map[string]string{
		"":                         filepath.Join(dir, "checkpoint", runtime.ImageFile),
		"--image-path a/b":         filepath.Join(dir, "a/b", runtime.ImageFile),
		"--image-path /x":          "/x/" + runtime.ImageFile,
		"--image file":             filepath.Join(dir, "file"),
		"--image /dev/null":        "/dev/null",
		"--image -":                "",
		"--image a --image-path b": "error",
		"--image - --image-path b": "error",
	} {
		got := ""
		err := parsed(t, checkpointCommand, strings.Fields(args), func(c *cli.Context) (err error) {
			var path string
			path, stream, err := imageOut(c)
			if (stream != nil) != (err == nil && path == "") {
				t.Errorf("%q: path %q and stream %v", args, path, stream)
			}
			got = path
			return err
		})
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q is %q, want %q", args, got, want)
		}
	}
}

func TestImageIn(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	must(t, os.Mkdir("checkpoint", 0o700))
	must(t, os.WriteFile(filepath.Join("checkpoint", runtime.ImageFile), []byte("x"), 0o600))
	must(t, os.WriteFile("file", []byte("y"), 0o600))
	for args, want := range map[string]string{
		"": filepath.Join("checkpoint", runtime.ImageFile), "--image file": "file", "--image -": os.Stdin.Name(),
		"--image-path none": "error", "--image file --image-path checkpoint": "error",
	} {
		got := "error"
		_ = parsed(t, restoreCommand, strings.Fields(args), func(c *cli.Context) error {
			in, err := imageIn(c)
			if err == nil {
				got = in.(*os.File).Name()
			}
			return err
		})
		if got != want {
			t.Errorf("%q is %q, want %q", args, got, want)
		}
	}
}

func TestDumpLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "work")
	for _, failure := range []error{nil, errors.New("fd 3: no")} {
		must(t, dumpLog(dir, failure))
		b, err := os.ReadFile(filepath.Join(dir, "dump.log"))
		if want := map[bool]string{true: "checkpoint done\n", false: "fd 3: no\n"}[failure == nil]; err != nil || string(b) != want {
			t.Errorf("%q, %v", b, err)
		}
	}
}
