package fail

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
)

func TestErrorLine(t *testing.T) {
	for want, err := range map[string]error{
		"stop: task 7: fd 3: gone; try again": &Error{"stop", "task 7", "fd 3", errors.New("gone"), "try again"},
		"fd 3: not supported":                 Refuse("fd 3", "not supported", ""),
		"gone":                                &Error{Cause: errors.New("gone")},
		"collect: task 7: fd 3: no":           During("collect", In("task 7", On("fd 3", errors.New("no")))),
	} {
		if got := err.Error(); got != want || strings.Contains(got, "\n") {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// Whoever is nearest to the failure names it; those above add only what is missing.
func TestNearestNames(t *testing.T) {
	inner := &Error{Object: "fd 3", Cause: &Refused{"why"}, Remedy: "r"}
	err := During("outer", During("phase", In("outer task", In("task 7", On("outer fd", fmt.Errorf("wrapped: %w", inner))))))
	var e *Error
	if !errors.As(err, &e) || *e != (Error{"phase", "task 7", "fd 3", inner.Cause, "r"}) {
		t.Errorf("%+v", e)
	}
	if inner.Phase != "" || inner.Task != "" {
		t.Errorf("the inner error was changed: %+v", inner)
	}
}

func TestUnwrap(t *testing.T) {
	err := During("a", In("b", fmt.Errorf("open: %w", fs.ErrNotExist)))
	var refused *Refused
	if !errors.Is(err, fs.ErrNotExist) || errors.As(err, &refused) {
		t.Errorf("%v", err)
	}
	if !errors.As(During("a", Refuse("x", "y", "z")), &refused) || refused.Why != "y" {
		t.Errorf("%+v", refused)
	}
}

func TestNil(t *testing.T) {
	for _, err := range []error{On("a", nil), In("a", nil), During("a", nil)} {
		if err != nil {
			t.Errorf("%v", err)
		}
	}
}
