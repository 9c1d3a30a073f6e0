package task

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	seccompStrict        = 1
	seccompFilter        = 2
	seccompSetModeFilter = 1
)

// seccompFilters reads a thread's filters, oldest first.
func seccompFilters(t *tracee.Thread, mode uint32) ([]image.Filter, error) {
	if mode == seccompStrict {
		return nil, fail.Refuse("seccomp strict mode", "only filters can be put back so far", "")
	}
	if mode != seccompFilter {
		return nil, nil
	}
	var out []image.Filter
	for i := 0; ; i++ {
		program, flags, ok, err := t.SeccompFilter(i)
		if err != nil || !ok {
			return out, err
		}
		out = append(out, image.Filter{Program: program, Flags: flags})
	}
}

// restoreSeccomp adds the calls that install the filters again. They do not
// bind the stub: seccomp is suspended while it is traced. It must come before
// the credentials, as it takes CAP_SYS_ADMIN or no_new_privs, and the task need
// not have had either any more. Those that the bundle has installed anew are
// left out where the image's oldest are the same: a chain must not grow with
// every generation.
func restoreSeccomp(b *tracee.Batch, filters []image.Filter, installed [][]byte) {
	for i, f := range filters {
		if i < len(installed) && bytes.Equal(f.Program, installed[i]) {
			continue
		}
		program := b.Put(f.Program)
		head := b.PutPointer(binary.LittleEndian.AppendUint64(nil, uint64(len(f.Program)/8)), program)
		b.Add(unix.SYS_SECCOMP, tracee.W(seccompSetModeFilter), tracee.W(f.Flags), head)
	}
}
