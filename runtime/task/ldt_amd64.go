package task

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ocickpt/ocickpt/runtime/tracee"
)

// The local descriptor table of a process, which modify_ldt(2) fills.
const (
	ldtRead  = 0
	ldtWrite = 0x11 // with the meaning that struct user_desc documents

	ldtEntries     = 8192 // LDT_ENTRIES
	descriptorSize = 8    // as the processor has it
)

// askLDT adds the call that tells whether the process has a table: reading the
// first entry of one that has none returns 0.
func askLDT(b *tracee.Batch) func() bool {
	i := b.Try(unix.SYS_MODIFY_LDT, tracee.W(ldtRead), b.Reserve(descriptorSize), tracee.W(descriptorSize))
	return func() bool { return b.Calls[i].Ret > 0 }
}

// readLDT reads the table of the process of a stopped thread, as struct
// user_desc of each entry that is in use.
func readLDT(live *tracee.Live, t *tracee.Thread) (table [][]byte, err error) {
	var b tracee.Batch
	const size = ldtEntries * descriptorSize
	at := b.Reserve(size)
	read := b.Add(unix.SYS_MODIFY_LDT, tracee.W(ldtRead), at, tracee.W(size))
	if err := live.Run(t, &b); err != nil {
		return nil, err
	}
	raw := b.At(at, int(b.Calls[read].Ret))
	for i := 0; i+descriptorSize <= len(raw); i += descriptorSize {
		if d := binary.LittleEndian.Uint64(raw[i:]); d != 0 {
			table = append(table, userDesc(uint32(i/descriptorSize), d))
		}
	}
	return table, nil
}

// userDesc translates a segment descriptor (AMD64 manual, volume 2, 4.8) to
// struct user_desc (arch/x86/include/uapi/asm/ldt.h).
func userDesc(entry uint32, d uint64) []byte {
	bit := func(n int) uint32 { return uint32(d>>n) & 1 }
	limit := uint32(d&0xffff | d>>48&0xf<<16)
	base := uint32(d>>16&0xffffff | d>>56<<24)
	flags := bit(54) | // seg_32bit
		(bit(43)<<1|bit(42))<<1 | // contents
		(1-bit(41))<<3 | // read_exec_only
		bit(55)<<4 | // limit_in_pages
		(1-bit(47))<<5 | // seg_not_present
		bit(52)<<6 | // useable
		bit(53)<<7 // lm
	var b []byte
	for _, v := range []uint32{entry, base, limit, flags} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

// RestoreLDT makes a stub fill the table of its process again.
func RestoreLDT(s *tracee.Stub, table [][]byte) error {
	var b tracee.Batch
	for _, d := range table {
		b.Add(unix.SYS_MODIFY_LDT, tracee.W(ldtWrite), b.Put(d), tracee.W(len(d)))
	}
	if _, err := s.Run(&b); err != nil {
		return err
	}
	// The kernel returns its error as 32 bits without sign, which do not look
	// like one (modify_ldt in arch/x86/kernel/ldt.c).
	for i := range b.Calls {
		if ret := int32(b.Calls[i].Ret); ret != 0 {
			return fmt.Errorf("modify_ldt: %w", unix.Errno(-ret))
		}
	}
	return nil
}
