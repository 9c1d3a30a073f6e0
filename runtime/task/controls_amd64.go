package task

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// Options of arch_prctl(2) (arch/x86/include/uapi/asm/prctl.h).
const (
	archGetCPUID      = 0x1011
	archSetCPUID      = 0x1012
	archGetXCompPerm  = 0x1022
	archReqXCompPerm  = 0x1023
	dynamicXFeatures  = 1 << 18 // XTILEDATA: components that have to be asked for
	highestXComponent = 62
)

// askCPUID adds the call that tells whether cpuid faults in the thread.
func askCPUID(b *tracee.Batch) func() bool {
	i := b.Try(unix.SYS_ARCH_PRCTL, tracee.W(archGetCPUID))
	return func() bool { return b.Calls[i].Ret == 0 }
}

func restoreCPUID(b *tracee.Batch) {
	b.Add(unix.SYS_ARCH_PRCTL, tracee.W(archSetCPUID), tracee.W(0))
}

// askXFeatures adds the call that tells which components of the extended state
// the process has asked for (Documentation/arch/x86/xstate.rst).
func askXFeatures(b *tracee.Batch) func() uint64 {
	at := b.Reserve(8)
	b.Try(unix.SYS_ARCH_PRCTL, tracee.W(archGetXCompPerm), at)
	return func() uint64 { return binary.LittleEndian.Uint64(b.At(at, 8)) & dynamicXFeatures }
}

// restoreXFeatures adds the calls that ask for them. They come before there are
// alternate stacks, which would have to be large enough for them.
func restoreXFeatures(b *tracee.Batch, features uint64) {
	for i := range highestXComponent {
		if features&(1<<i) != 0 {
			b.Add(unix.SYS_ARCH_PRCTL, tracee.W(archReqXCompPerm), tracee.W(i))
		}
	}
}
