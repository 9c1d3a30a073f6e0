package mm

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/ocickpt/ocickpt/runtime/cpu"
	"github.com/ocickpt/ocickpt/runtime/fail"
)

const (
	pkruComponent = 9   // of an xsave area
	xstateBV      = 512 // where in it the bits of those present begin
	// pkruInitial is what Linux gives a new task: key 0 is free, all others are
	// shut (init_pkru_value in arch/x86/mm/pkeys.c).
	pkruInitial = 0x55555554
)

// CheckKeys refuses a thread whose rights over protection keys (pkeys(7)) are
// other than a new one's: then some are allocated, and which ones cannot be
// asked without taking those that are left. xstate is its xsave area.
func CheckKeys(xstate []byte) error { return checkKeys(xstate, pkruOffset()) }

func checkKeys(xstate []byte, offset uint32) error {
	if offset == 0 || len(xstate) < int(offset)+4 || binary.LittleEndian.Uint64(xstate[xstateBV:])&(1<<pkruComponent) == 0 {
		return nil
	}
	if pkru := binary.LittleEndian.Uint32(xstate[offset:]); pkru != pkruInitial {
		return fail.Refuse("protection keys", fmt.Sprintf("some are allocated (PKRU is %#x); which ones cannot be asked", pkru), "free them before the checkpoint (pkey_free)")
	}
	return nil
}

// pkruOffset is where this processor keeps PKRU in an xsave area, 0 if the
// kernel does not use protection keys here (Intel SDM, CPUID leaves 7 and 0DH). It
// is found out once: in a virtual machine each CPUID goes to the hypervisor.
var pkruOffset = sync.OnceValue(func() uint32 {
	const ospke = 1 << 4
	if last, _, _, _ := cpu.CPUID(0, 0); last < 0xd {
		return 0
	}
	if _, _, features, _ := cpu.CPUID(7, 0); features&ospke == 0 {
		return 0
	}
	_, offset, _, _ := cpu.CPUID(0xd, pkruComponent)
	return offset
})
