// Package fail holds the one shape of error that ocickpt shows to people: it
// names the task, the object, the cause and the remedy, all in one line,
// because engines keep only the first line of what a runtime says.
package fail

import (
	"errors"
	"fmt"
	"strings"
)

// Error is a refusal or a failure with its whole story.
type Error struct {
	Phase  string // of the journey; the journey fills it in
	Task   string // "task 7 (host 4711, redis-server)"
	Object string // "fd 7, unix:/run/x.sock"
	Cause  error
	Remedy string // what to do about it
}

func (e *Error) Error() string {
	var b strings.Builder
	for _, part := range []string{e.Phase, e.Task, e.Object} {
		if part != "" {
			b.WriteString(part + ": ")
		}
	}
	fmt.Fprint(&b, e.Cause)
	if e.Remedy != "" {
		b.WriteString("; " + e.Remedy)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Cause }

// Refused is the cause of an Error about something that ocickpt does not
// checkpoint or restore. Nothing has been changed when it is returned.
type Refused struct{ Why string }

func (r *Refused) Error() string { return r.Why }

// Refuse makes a refusal of an object.
func Refuse(object, why, remedy string) *Error {
	return &Error{Object: object, Cause: &Refused{Why: why}, Remedy: remedy}
}

// On names the object that err is about, unless err already names one.
func On(object string, err error) error {
	return fill(err, func(e *Error) {
		if e.Object == "" {
			e.Object = object
		}
	})
}

// In names the task that err is about, unless err already names one.
func In(task string, err error) error {
	return fill(err, func(e *Error) {
		if e.Task == "" {
			e.Task = task
		}
	})
}

// During names the phase in which err happened, unless err already names one.
func During(phase string, err error) error {
	return fill(err, func(e *Error) {
		if e.Phase == "" {
			e.Phase = phase
		}
	})
}

func fill(err error, set func(*Error)) error {
	if err == nil {
		return nil
	}
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Cause: err}
	}
	named := *e
	set(&named)
	return &named
}
