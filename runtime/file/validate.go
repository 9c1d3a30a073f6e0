package file

import (
	"fmt"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// How far files that an image names must be those of the checkpoint.
const (
	// ValidateStrict: mapped ones have their size and time of change, open ones
	// reach to where they are read or written.
	ValidateStrict = "strict"
	ValidateSize   = "size" // likewise but for the time
	ValidateNone   = "none"
)

// Validations are the values there are.
var Validations = []string{ValidateStrict, ValidateSize, ValidateNone}

// validate compares files that have just been opened by their paths with what
// they were at the checkpoint. One of another kind is never right.
func (m *Maker) validate(refs []image.Ref) error {
	var b tracee.Batch
	var stats []tracee.Word
	refs = slices.DeleteFunc(slices.Clone(refs), func(ref image.Ref) bool {
		f := m.head.File(ref)
		return f.Kind != image.KindRegular || f.Removed != 0
	})
	for _, ref := range refs {
		st := b.Reserve(int(unsafe.Sizeof(unix.Stat_t{})))
		b.Add(unix.SYS_FSTAT, tracee.W(m.fds[ref]), st)
		stats = append(stats, st)
	}
	if _, err := m.stub.Run(&b); err != nil {
		return err
	}
	for i, ref := range refs {
		f := m.head.File(ref)
		st := (*unix.Stat_t)(unsafe.Pointer(&b.At(stats[i], int(unsafe.Sizeof(unix.Stat_t{})))[0]))
		if why := m.differs(f, st); why != "" {
			return fail.On(f.Path, &fail.Error{Cause: fmt.Errorf("the file is not that of the checkpoint: %s", why), Remedy: "put it back, or restore with another --file-validation if it will do"})
		}
		if f.Flags&unix.O_APPEND != 0 && st.Size > f.Size && m.Validation != ValidateNone {
			m.Warn("a file that is appended to has grown since the checkpoint", "path", f.Path, "by", st.Size-f.Size)
		}
	}
	return nil
}

// differs says in what way a file is another one, or "".
func (m *Maker) differs(f *image.File, st *unix.Stat_t) string {
	mapped := f.Opener == 0
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Sprintf("its mode is %#o", st.Mode)
	case m.Validation == ValidateNone:
	case mapped && st.Size != f.Size:
		return fmt.Sprintf("it is mapped and has %d bytes instead of %d", st.Size, f.Size)
	case mapped && m.Validation == ValidateStrict && st.Mtim.Nano() != f.Mtime:
		return fmt.Sprintf("it is mapped and was changed at %s instead of %s", stamp(st.Mtim.Nano()), stamp(f.Mtime))
	case st.Size < min(f.Pos, f.Size):
		return fmt.Sprintf("it has %d bytes and is open at %d", st.Size, f.Pos)
	}
	return ""
}

func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339Nano) }
