package fault

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary passes two points and exits when this variable is set.
const passEnv = "OCICKPT_TEST_PASS"

func TestMain(m *testing.M) {
	if os.Getenv(passEnv) == "" {
		os.Exit(m.Run())
	}
	signal.Ignore(unix.SIGTERM)
	for range 2 {
		if Point("a") != nil {
			os.Exit(3)
		}
	}
	os.Exit(4)
}

func TestParse(t *testing.T) {
	if parse("") != nil {
		t.Error("nothing is armed")
	}
	for s, want := range map[string]struct {
		name, action string
		left         int64
	}{
		"stop:kill":   {"stop", "kill", 1},
		"stop#7:term": {"stop", "term", 7},
		"any#2:fail":  {"any", "fail", 2},
		"list":        {"list", "", 1},
		"a#x:fail":    {"a", "fail", 1},
	} {
		if p := parse(s); p.name != want.name || p.action != want.action || p.left.Load() != want.left {
			t.Errorf("%s is %s, %s, %d", s, p.name, p.action, p.left.Load())
		}
	}
}

func TestPass(t *testing.T) {
	for _, c := range []struct {
		plan   string
		points string
		fails  int // which passing, counted from 1; 0 none
	}{
		{"a:fail", "ba", 2}, {"a#2:fail", "aba", 3}, {"a#2:fail", "abb", 0}, {"any#3:fail", "abcd", 3}, {"a:fail", "bbb", 0},
	} {
		p, failed := parse(c.plan), 0
		for i, name := range c.points {
			if err := p.pass(string(name)); err != nil {
				if !errors.Is(err, ErrInjected) || failed != 0 {
					t.Errorf("%s: %v", c.plan, err)
				}
				failed = i + 1
			}
		}
		if failed != c.fails {
			t.Errorf("%s over %s fails at %d, want %d", c.plan, c.points, failed, c.fails)
		}
	}
	if err := Point("a"); armed != nil || err != nil {
		t.Errorf("disarmed: %v", err)
	}
}

func TestActions(t *testing.T) {
	for plan, want := range map[string]func(syscall.WaitStatus) bool{
		"a:kill":   func(s syscall.WaitStatus) bool { return s.Signal() == syscall.SIGKILL },
		"a:fail":   func(s syscall.WaitStatus) bool { return s.ExitStatus() == 3 },
		"a#3:kill": func(s syscall.WaitStatus) bool { return s.ExitStatus() == 4 },
		"a:term":   func(s syscall.WaitStatus) bool { return s.ExitStatus() == 4 },
		"list":     func(s syscall.WaitStatus) bool { return s.ExitStatus() == 4 },
	} {
		c := exec.Command("/proc/self/exe")
		c.Env = append(os.Environ(), passEnv+"=1", "OCICKPT_FAULT="+plan)
		_ = c.Run()
		if s := c.ProcessState.Sys().(syscall.WaitStatus); !want(s) {
			t.Errorf("%s ends with %v", plan, c.ProcessState)
		}
	}
}
