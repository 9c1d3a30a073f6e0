package task

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/image"
	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

const (
	seccompFilter        = 2
	seccompSetModeFilter = 1
)

// SeccompStrict is the mode of a thread that may only read, write and end.
const SeccompStrict = 1

// seccompFilters reads a thread's filters, oldest first. Of their flags the
// kernel tells one, LOG. The others are no state of the filter: TSYNC has put it
// on every thread, each of which is asked; what a filter without SPEC_ALLOW has
// done is among the thread's controls; a listener is refused.
func seccompFilters(t *tracee.Thread, mode uint32) ([]image.Filter, error) {
	if mode != seccompFilter {
		return nil, nil
	}
	filters, err := t.Filters()
	if err != nil {
		return nil, err
	}
	var out []image.Filter
	for i, f := range filters {
		if notifies(f.Program) {
			return nil, fail.Refuse(fmt.Sprintf("seccomp filter %d", i), "it hands system calls to a listener (SECCOMP_RET_USER_NOTIF), who cannot be given to it again", "run the container without the listener")
		}
		out = append(out, image.Filter{Program: f.Program, Flags: f.Flags})
	}
	return out, nil
}

// notifies reports a filter with an instruction that returns USER_NOTIF. One
// that nobody listens to any more looks the same.
func notifies(program []byte) bool {
	const (
		ret       = 0x06       // BPF_RET | BPF_K
		userNotif = 0x7fc00000 // SECCOMP_RET_USER_NOTIF
		action    = 0xffff0000 // SECCOMP_RET_ACTION_FULL
	)
	for insn := range slices.Chunk(program, 8) {
		if binary.LittleEndian.Uint16(insn) == ret && binary.LittleEndian.Uint32(insn[4:])&action == userNotif {
			return true
		}
	}
	return false
}

// restoreSeccomp adds the calls that install the filters again. They do not
// bind the stub: seccomp is suspended while it is traced. It must come before
// the credentials, as it takes CAP_SYS_ADMIN or no_new_privs, and the task need
// not have had either any more. Those that the bundle has installed anew are
// left out where the image's oldest are the same: a chain must not grow with
// every generation.
func restoreSeccomp(b *tracee.Batch, t *image.Thread, installed [][]byte) {
	if t.SeccompMode == SeccompStrict {
		b.Add(unix.SYS_PRCTL, tracee.W(unix.PR_SET_SECCOMP), tracee.W(SeccompStrict))
	}
	for i, f := range t.Seccomp {
		if i < len(installed) && bytes.Equal(f.Program, installed[i]) {
			continue
		}
		program := b.Put(f.Program)
		head := b.PutPointer(binary.LittleEndian.AppendUint64(nil, uint64(len(f.Program)/8)), program)
		b.Add(unix.SYS_SECCOMP, tracee.W(seccompSetModeFilter), tracee.W(f.Flags), head)
	}
}
