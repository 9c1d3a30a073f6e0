package image

import (
	"errors"
	"fmt"
	"strconv"
)

// ErrNotImage reports a stream that does not begin with a header record.
var ErrNotImage = errors.New("not an ocickpt image")

// ErrTruncated reports a stream that ends before its trailer.
var ErrTruncated = errors.New("the image is cut short")

// ErrClosed reports the use of a Writer after its last record.
var ErrClosed = errors.New("the image is already closed")

// FormatError reports a record that breaks a rule of the format, whether it
// was read or was about to be written.
type FormatError struct {
	Offset uint64 // of the record's first byte in the stream
	Type   Type
	Reason string
	Err    error // ErrTruncated or the cause of the reason; may be nil
}

// Error says which record it is, where it stands and what is wrong, in one line.
func (e *FormatError) Error() string {
	return fmt.Sprintf("%s record at offset %d: %s", e.Type, e.Offset, e.Reason)
}

// Unwrap returns the cause.
func (e *FormatError) Unwrap() error { return e.Err }

// RevisionError reports an image of a newer format revision than this
// package reads.
type RevisionError struct {
	Image     uint32
	Supported uint32
}

// Error names both revisions.
func (e *RevisionError) Error() string {
	return fmt.Sprintf("the image has format revision %d, this program reads up to revision %d: use a newer ocickpt", e.Image, e.Supported)
}

// FailedError reports a stream that ends in an error record: the checkpoint
// that wrote it failed.
type FailedError struct {
	Record Error
}

// Error gives the recorded failure in one line. The words come from the
// image, so control characters in them are escaped.
func (e *FailedError) Error() string {
	s := "the checkpoint that wrote this image failed"
	if e.Record.Phase != "" {
		s += " in phase " + printable(e.Record.Phase)
	}
	for _, part := range []string{e.Record.Task, e.Record.Object, e.Record.Cause} {
		if part != "" {
			s += ": " + printable(part)
		}
	}
	if e.Record.Remedy != "" {
		s += " (" + printable(e.Record.Remedy) + ")"
	}
	return s
}

// printable returns s as it is when every rune of it can be shown, and quoted
// and escaped otherwise: names in an image are chosen by the container, and
// must not reach a terminal as escape sequences.
func printable(s string) string {
	for _, r := range s {
		if r == '\uFFFD' || !strconv.IsPrint(r) {
			return strconv.Quote(s)
		}
	}
	return s
}

// quote quotes a name for an error message and keeps it short.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	return strconv.Quote(s)
}
