// Package fault names the points at which tests make ocickpt fail: the places
// where a failure would hurt a container most. A point costs one nil check
// when no fault is asked for.
//
// OCICKPT_FAULT=NAME[#N]:ACTION arms one fault: the Nth time (default the
// first) that point NAME is passed, ACTION happens: "kill" (SIGKILL to
// ourselves), "term" (SIGTERM, then go on), "fail" (the point returns an error
// that wraps ErrInjected) or "stop" (SIGSTOP, so that a test can look around).
// NAME may be "any": every point counts. OCICKPT_FAULT=list prints each point
// that is passed to standard error, so that a test can walk them all.
package fault

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInjected is what a point armed with "fail" returns, wrapped.
var ErrInjected = errors.New("injected fault")

type plan struct {
	name, action string
	left         atomic.Int64
}

var armed = parse(os.Getenv("OCICKPT_FAULT"))

func parse(s string) *plan {
	if s == "" {
		return nil
	}
	name, action, _ := strings.Cut(s, ":")
	p := &plan{action: action}
	name, count, _ := strings.Cut(name, "#")
	n, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		n = 1
	}
	p.name = name
	p.left.Store(n)
	return p
}

// Point marks a place that tests can make fail. It returns nil unless a fault
// of action "fail" is armed for name and due now.
func Point(name string) error {
	if armed == nil {
		return nil
	}
	return armed.pass(name)
}

func (p *plan) pass(name string) error {
	if p.name == "list" {
		fmt.Fprintln(os.Stderr, "fault point", name)
		return nil
	}
	if p.name != name && p.name != "any" || p.left.Add(-1) != 0 {
		return nil
	}
	switch p.action {
	case "kill":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // the signal is on its way; nothing more may happen
	case "term":
		_ = unix.Kill(os.Getpid(), unix.SIGTERM)
		time.Sleep(20 * time.Millisecond) // let the handler see it first
	case "stop":
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
	default:
		return fmt.Errorf("%w at %s", ErrInjected, name)
	}
	return nil
}
