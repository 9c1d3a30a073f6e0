package task

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/fail"
	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Properties of a process that are rare, and are not put back so far: they are
// asked for all the same, because a process must not lose one silently.
const (
	prGetMDWE        = 66
	prGetMemoryMerge = 68
	mceKillDefault   = 2 // PR_MCE_KILL_DEFAULT
	tscEnable        = 1 // PR_TSC_ENABLE
)

// askOdd adds the calls that ask for them, and returns what judges the answers.
func askOdd(b *tracee.Batch) func() error {
	mdwe := b.Try(unix.SYS_PRCTL, tracee.W(prGetMDWE))
	merge := b.Try(unix.SYS_PRCTL, tracee.W(prGetMemoryMerge))
	mce := b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_MCE_KILL_GET))
	tsc := b.Reserve(8)
	asked := b.Try(unix.SYS_PRCTL, tracee.W(unix.PR_GET_TSC), tsc)
	ldt := b.Try(unix.SYS_MODIFY_LDT, tracee.W(0), b.Reserve(16), tracee.W(16))
	return func() error {
		set := func(i int) bool { return b.Calls[i].Ret > 0 }
		for _, odd := range []struct {
			has  bool
			what string
		}{
			{set(mdwe), "memory-deny-write-execute (PR_SET_MDWE)"},
			{set(merge), "memory merging (PR_SET_MEMORY_MERGE)"},
			{set(mce) && b.Calls[mce].Ret != mceKillDefault, "a machine-check policy (PR_MCE_KILL)"},
			{b.Err(asked) == nil && binary.LittleEndian.Uint32(b.At(tsc, 4)) != tscEnable, "a forbidden time-stamp counter (PR_SET_TSC)"},
			{set(ldt), "a local descriptor table (modify_ldt)"},
		} {
			if odd.has {
				return fail.Refuse(odd.what, "it is not supported yet", "")
			}
		}
		return nil
	}
}

// queueable refuses pending signals that cannot be queued again: those that
// would stop the stub while it does it, and the one it needs itself.
func queueable(pending uint64) error {
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGTRAP} {
		if pending&(1<<(sig-1)) != 0 {
			return fail.Refuse("pending "+unix.SignalName(sig), "it is not supported yet", "try again when it is delivered")
		}
	}
	return nil
}
