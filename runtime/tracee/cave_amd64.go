package tracee

import (
	"bytes"
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// caveText is the address of the cave's program in our own text.
func caveText() uintptr

// slotHeader is the data of a slot, in front of its code (cave_amd64.s). Magic,
// Tgid, Tid and SP keep their places in every version of ocickpt: they are how
// one version recognizes what another left behind.
type slotHeader struct {
	Magic     uint64
	Tgid, Tid uint32 // of the thread, in its own pid namespace
	SP        uint64
	Mask      uint64
	Flags     uint64 // OF in bit 0, the low byte of eflags in bits 8-15: what SAHF takes
	GPR       [15]uint64
	Go        uint64 // the gate that is open to a quiet thread
}

const (
	slotMagic      = 0x31656b6f74706b63
	slotHeaderSize = int(unsafe.Sizeof(slotHeader{}))

	slotGo = 0xa0

	// The gates of a quiet thread (cave_amd64.s), which it shows in rdx.
	gateMap   = 0x67617401
	gateRun   = 0x67617402
	gateUnmap = 0x67617403
	gateRest  = 0x67617404
	spins     = 0x02000000

	quiet = ^uint64(0) // in r15

	flagTF = 1 << 8
	flagOF = 11 // bit number

	// The segments of user space (arch/x86/include/asm/segment.h).
	userCS32 = 0x23
	userDS   = 0x2b
	userCS64 = 0x33
)

// caveCode is the program with its empty header, up to the address that follows
// its last jump.
var caveCode = func() []byte {
	const most = 1 << 10
	start := caveText()
	text := unsafe.Slice(*(**byte)(unsafe.Pointer(&start)), most)
	lastJump := []byte{0xff, 0x25, 0, 0, 0, 0}
	return bytes.Clone(text[:bytes.Index(text, lastJump)+len(lastJump)])
}()

// slotSize is the room a slot takes, 16-aligned.
var slotSize = uint64(len(caveCode)+8+15) &^ 15

// cavePlaces are the offsets in a slot at which tracer and thread meet.
type cavePlaces struct {
	enter    uint64  // at the mmap
	mapped   uint64  // behind the first report
	ran      uint64  // behind the second
	unmapped uint64  // behind the third, which is where the cure begins
	gate     uint64  // where a quiet thread waits
	last     uint64  // where registers are restored without a call
	loops    [2]span // where a thread waits for us
}

// span is a stretch of code.
type span struct{ start, end uint64 }

// places are found by counting the syscall instructions, so that they cannot
// drift from the code: mmap, report, an entry's call, report, munmap, report,
// rt_sigprocmask.
var places = func() cavePlaces {
	var behind []uint64
	for i := slotHeaderSize; i+1 < len(caveCode); i++ {
		if caveCode[i] == 0x0f && caveCode[i+1] == 0x05 {
			behind = append(behind, uint64(i+syscallInsnSize))
		}
	}
	// mov $spins, %ecx; test; je; pause; dec %ecx; jne
	wait := binary.LittleEndian.AppendUint32([]byte{0xb9}, spins)
	var loops [2]span
	for i, at := 0, 0; i < len(loops); i++ {
		at += bytes.Index(caveCode[at:], wait) + len(wait)
		loops[i] = span{uint64(at), uint64(at + bytes.Index(caveCode[at:], []byte{0xf3, 0x90}) + 4)}
	}
	return cavePlaces{
		enter: behind[0] - syscallInsnSize, mapped: behind[1], ran: behind[3], unmapped: behind[5],
		gate: loops[0].start - uint64(len(wait)), last: behind[6], loops: loops,
	}
}()

// slotImage is the slot of a thread that must come out with registers r, as
// user space sees them, and mask.
func slotImage(r *Regs, mask uint64, id ids) []byte {
	h := slotHeader{
		Magic: slotMagic, Tgid: id.tgid, Tid: id.tid, SP: r.Rsp, Mask: mask,
		Flags: r.Eflags>>flagOF&1 | r.Eflags&0xff<<8,
		GPR: [15]uint64{r.Rax, r.Rbx, r.Rcx, r.Rdx, r.Rsi, r.Rdi, r.Rbp,
			r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15},
	}
	b := make([]byte, slotSize)
	copy(b, caveCode)
	_, _ = binary.Encode(b, binary.LittleEndian, &h)
	binary.LittleEndian.PutUint64(b[len(caveCode):], r.Rip)
	if r.Narrow() {
		const jump, farJump = 0x25, 0x2d
		b[bytes.LastIndexByte(caveCode, jump)] = farJump
		binary.LittleEndian.PutUint32(b[len(caveCode)+4:], uint32(r.Cs))
	}
	return b
}

// mapFlags are those of the mmap by which a slot is entered. The kernel lets a task
// that has executed a 32-bit program, whose cave is low, map nothing above 4 GiB
// (TASK_SIZE), where it would look for room in 64-bit mode.
func mapFlags(slot uint64) uint64 {
	if slot < 1<<32 {
		return unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_32BIT
	}
	return unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
}

// enterRegs makes registers r enter the slot at its mmap, of size bytes. What
// the cave does not use stays as it is: rsp above all, and of the flags DF, AC
// and ID, which the cave leaves alone. TF would raise a SIGTRAP behind every
// instruction and has to go; only a thread that single-steps itself has it set.
// A thread that runs 32-bit code is in 64-bit mode as long as it is in the slot.
func enterRegs(r Regs, slot, size uint64, report unix.Signal) Regs {
	r.Orig_rax = noSyscall
	r.Eflags &^= flagTF
	r.Rip = slot + places.enter
	r.Rax = unix.SYS_MMAP
	r.Rdi, r.Rsi, r.Rdx = 0, size, unix.PROT_READ|unix.PROT_WRITE
	r.R10, r.R8, r.R9 = mapFlags(slot), ^uint64(0), 0
	r.Cs = userCS64
	r.R12, r.R13, r.R14, r.R15 = 0, size, slot, uint64(report)
	return r
}

// quietRegs makes them enter it at its gate instead.
func quietRegs(r Regs, slot, size uint64) Regs {
	r = enterRegs(r, slot, size, 0)
	r.Rip, r.Rdx, r.R15 = slot+places.gate, gateMap, quiet
	return r
}

// hasten makes a thread that waits for an ocickpt that is dead wait no longer.
func (r *Regs) hasten() bool {
	for _, l := range places.loops {
		if at := r.Rip - r.R14; at >= l.start && at <= l.end {
			r.Rcx = 1
			return true
		}
	}
	return false
}

// atGate reports a thread that waits at a gate.
func (r *Regs) atGate(gate uint64) bool { return r.R15 == quiet && r.Rdx == gate }
