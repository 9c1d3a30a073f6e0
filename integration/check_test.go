package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostReport is what check --json prints.
type hostReport struct {
	Kernel       string
	Machine      string
	Features     []ability
	Capabilities []ability
	Proof        struct {
		Works      bool
		Error      string
		Checkpoint float64 `json:"checkpoint_ms"`
		Stopped    float64 `json:"stopped_ms"`
		Restore    float64 `json:"restore_ms"`
	}
	Works bool
}

type ability struct {
	Name, Since, Error, Errno, Without string
	Required, Works                    bool
}

func (r *hostReport) find(t *testing.T, name string) ability {
	t.Helper()
	for _, list := range [][]ability{r.Features, r.Capabilities} {
		for _, a := range list {
			if a.Name == name {
				return a
			}
		}
	}
	t.Fatalf("check says nothing about %s", name)
	return ability{}
}

// checkHost runs check --json by way of a command that goes before it.
func checkHost(c *container, by ...string) (report hostReport, r result) {
	c.t.Helper()
	args := append(by, c.binary(), "check", "--json")
	r = c.command(outputs{}, args[0], args[1:]...)
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		c.t.Fatalf("%v\n%s%s", err, r.stdout, r.stderr)
	}
	return report, r
}

func TestCheckReport(t *testing.T) {
	report, r := checkHost(newContainer(t))
	if r.code != 0 || !report.Works || !report.Proof.Works {
		t.Fatalf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if release := unix.ByteSliceToString(u.Release[:]); report.Kernel != release {
		t.Errorf("kernel %q instead of %q", report.Kernel, release)
	}
	for _, list := range [][]ability{report.Features, report.Capabilities} {
		for _, a := range list {
			if a.Without == "" || a.Works == (a.Error != "") || a.Required && !a.Works {
				t.Errorf("%+v", a)
			}
		}
	}
	p := report.Proof
	if p.Checkpoint <= 0 || p.Stopped <= 0 || p.Stopped > p.Checkpoint || p.Restore <= 0 {
		t.Errorf("proof: %+v", p)
	}
}

// TestCheckText looks at the tables: every line of one has its columns at the
// same places.
func TestCheckText(t *testing.T) {
	c := newContainer(t)
	report, _ := checkHost(c)
	r := c.ocickpt("check")
	if r.code != 0 {
		t.Fatalf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	column := -1
	rows := 0
	for line := range strings.Lines(r.stdout) {
		switch at := strings.Index(line, "STATE"); {
		case at >= 0:
			column = at
		case strings.TrimSpace(line) == "":
			column = -1
		case column > 0:
			rows++
			if len(line) < column || line[column-1] != ' ' || line[column] == ' ' {
				t.Errorf("not aligned: %s", line)
			}
		}
	}
	if want := len(report.Features) + len(report.Capabilities); rows != want {
		t.Errorf("%d rows instead of %d\n%s", rows, want, r.stdout)
	}
	if !strings.Contains(r.stdout, "\nproof: a container was checkpointed in ") {
		t.Errorf("no proof\n%s", r.stdout)
	}
}

// TestCheckMissing takes a capability away.
func TestCheckMissing(t *testing.T) {
	report, r := checkHost(newContainer(t), "setpriv", "--bounding-set", "-sys_time")
	if r.code != 1 || report.Works || report.Proof.Works {
		t.Errorf("exit status %d, works %v, proof %v", r.code, report.Works, report.Proof.Works)
	}
	if !strings.Contains(r.stderr, "missing: CAP_SYS_TIME") || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("the error is %q", r.stderr)
	}
	if a := report.find(t, "CAP_SYS_TIME"); a.Works || !a.Required {
		t.Errorf("%+v", a)
	}
	if a := report.find(t, "time namespace"); a.Works || a.Errno != "EPERM" {
		t.Errorf("%+v", a)
	}
	if a := report.find(t, "clone3 set_tid"); !a.Works {
		t.Errorf("%+v", a)
	}
}

func TestCheckOnCgroupV2(t *testing.T) {
	onCgroupV2(t, func(t *testing.T) {
		report, r := checkHost(newContainer(t))
		if r.code != 0 || !report.Proof.Works {
			t.Fatalf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		if a := report.find(t, "cgroup v2 freezer"); !a.Works || a.Since != "5.2" {
			t.Errorf("%+v", a)
		}
	})
}

// TestCheckFaults makes check fail, and kills it, at every point it passes.
// Nothing may be left; newContainer's own clean-up looks for files and mounts.
func TestCheckFaults(t *testing.T) {
	c := newContainer(t)
	points := faultPoints(c, "check")
	for _, point := range distinct(points) {
		for _, action := range faultActions {
			for _, nth := range passings(points, point) {
				name := fmt.Sprintf("%s#%d:%s", point, nth, action)
				c.step(t, name, func(t *testing.T) {
					t.Setenv(envFault, name)
					cmd := c.foreground("check")
					err := cmd.Wait()
					if action != "term" && err == nil {
						t.Error("it did not fail")
					}
					nothingLeftOfCheck(c, cmd.Process.Pid)
				})
			}
		}
	}
}

// nothingLeftOfCheck waits until the guardian of a check with this pid is done.
func nothingLeftOfCheck(c *container, pid int) {
	c.t.Helper()
	name := fmt.Sprintf("ocickpt-check-%d", pid)
	var left []string
	if waitFor(func() bool {
		left = append(leakedTemporaries(c), cgroupsNamed(name)...)
		return len(left) == 0
	}) {
		return
	}
	c.t.Errorf("left behind: %s", strings.Join(left, "\n\t"))
}

func cgroupsNamed(name string) (found []string) {
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == name {
			found = append(found, path)
		}
		return nil // a cgroup that went away meanwhile is no error
	})
	return found
}

// TestCheckArguments refuses what check does not take.
func TestCheckArguments(t *testing.T) {
	c := newContainer(t)
	if r := c.ocickpt("check", "now"); r.code != 1 || r.stdout != "" || strings.Count(r.stderr, "\n") != 1 {
		t.Errorf("exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if left, err := os.ReadDir(c.tmp); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
