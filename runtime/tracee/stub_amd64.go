package tracee

import (
	"encoding/binary"
	"unsafe"
)

// Offsets into the service code of stub_amd64.s.
const (
	serviceCall   = 0
	serviceNarrow = 8
	serviceBatch  = 16
)

// entrySize is the size of one entry of a batch as serviceBatch walks it.
const entrySize = 72

// The flags of an entry, and where they and the result are in it.
const (
	entryTolerate = 1
	entryGuarded  = 2 // wait for the next flag
	entryOpen     = 4
	entryNarrow   = 8 // a call of 32-bit code; stubs only

	entryRet   = 56
	entryFlags = 64
)

func serviceText() (start, end uintptr)

func serviceCode() []byte {
	start, end := serviceText()
	// The text of this program is mapped for as long as it runs. Going through
	// a pointer to the address keeps vet's eye on real pointer arithmetic.
	return unsafe.Slice(*(**byte)(unsafe.Pointer(&start)), end-start)
}

// encode lays the batch's calls out as serviceBatch expects them. data is the
// address of the batch's memory in the task.
func (b *Batch) encode(dst []byte, data uint64) {
	for i := range b.Calls {
		c, e := &b.Calls[i], dst[i*entrySize:]
		binary.LittleEndian.PutUint64(e, uint64(c.Nr))
		for j, a := range c.Args {
			binary.LittleEndian.PutUint64(e[8+8*j:], a.resolve(data))
		}
		binary.LittleEndian.PutUint64(e[56:], 0)
		var flags uint64
		if c.Tolerate {
			flags = entryTolerate
		}
		if c.Narrow {
			flags |= entryNarrow
		}
		binary.LittleEndian.PutUint64(e[64:], flags)
	}
}

func (b *Batch) decode(src []byte) {
	for i := range b.Calls {
		b.Calls[i].Ret = int64(binary.LittleEndian.Uint64(src[i*entrySize+56:]))
	}
}

// forCall returns the registers with which a stub issues one call.
func (r Regs) forCall(ip uint64, nr uintptr, a [6]uint64) Regs {
	r.Rip, r.Rax, r.Orig_rax = ip, uint64(nr), noSyscall
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = a[0], a[1], a[2], a[3], a[4], a[5]
	return r
}

// forNarrowCall returns the registers with which it issues a call of 32-bit code,
// for which it need not be such itself (int $0x80).
func (r Regs) forNarrowCall(ip uint64, nr uintptr, a [6]uint64) Regs {
	r.Rip, r.Rax, r.Orig_rax = ip, uint64(nr), noSyscall
	r.Rbx, r.Rcx, r.Rdx, r.Rsi, r.Rdi, r.Rbp = a[0], a[1], a[2], a[3], a[4], a[5]
	return r
}

// forBatch returns the registers with which a stub runs a batch.
func (r Regs) forBatch(ip, entries uint64, n int) Regs {
	r.Rip, r.Orig_rax, r.R13, r.R12 = ip, noSyscall, entries, uint64(n)
	return r
}

// left is how many calls of a batch were not made.
func (r *Regs) left() int { return int(r.R12) }

// result is the result of the call that has just returned.
func (r *Regs) result() int64 { return int64(r.Rax) }

// stubELF is a static executable of one page whose entry is the given code and
// then an INT3: all that is needed to be something's init until the real one is
// put in its place.
func stubELF(begin string) []byte {
	const (
		base   = 0x10000
		text   = 0x100
		header = 64
	)
	code := serviceCode()
	entry := text + (len(code)+15)&^15
	b := make([]byte, 4096)
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 2)  // ET_EXEC
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)  // EV_CURRENT
	le.PutUint64(b[24:], uint64(base+entry))
	le.PutUint64(b[32:], header) // program headers follow
	le.PutUint16(b[52:], header)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 2)
	load := b[header:]
	le.PutUint32(load[0:], 1) // PT_LOAD
	le.PutUint32(load[4:], 5) // r-x
	le.PutUint64(load[16:], base)
	le.PutUint64(load[24:], base)
	le.PutUint64(load[32:], uint64(len(b)))
	le.PutUint64(load[40:], uint64(len(b)))
	le.PutUint64(load[48:], uint64(len(b)))
	stack := b[header+56:]
	le.PutUint32(stack[0:], 0x6474e551) // PT_GNU_STACK
	le.PutUint32(stack[4:], 6)          // rw-
	copy(b[text:], code)
	copy(b[entry:], begin+"\xcc\xeb\xfd") // int3; jmp back to it
	return b
}

// awaitByte reads one byte from descriptor 5. At its end, when the coordinator
// is gone that has the other side, it leaves.
const awaitByte = "\x31\xc0" + // xor eax, eax: read
	"\xbf\x05\x00\x00\x00" + // mov edi, 5
	"\x48\x8d\x74\x24\xf8" + // lea rsi, [rsp-8]
	"\xba\x01\x00\x00\x00" + // mov edx, 1
	"\x0f\x05" + // syscall
	"\xff\xc8" + // dec eax
	"\x74\x09" + // je to the end
	"\xb8\xe7\x00\x00\x00" + // mov eax, exit_group
	"\x31\xff" + // xor edi, edi
	"\x0f\x05" // syscall

// stubCode is where the service code stands in a running stubELF.
const stubCode = 0x10000 + 0x100
