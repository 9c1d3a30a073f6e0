#include "textflag.h"

// The program that a thread runs for us lies in a slot of the cave, data first:
// slotHeader in cave_amd64.go, whose offsets these are.
#define slotTgid  0x08
#define slotTid   0x0c
#define slotMask  0x18
#define slotFlags 0x20
#define slotRax   0x28
#define slotRbx   0x30
#define slotRcx   0x38
#define slotRdx   0x40
#define slotRsi   0x48
#define slotRdi   0x50
#define slotRbp   0x58
#define slotR8    0x60
#define slotR9    0x68
#define slotR10   0x70
#define slotR11   0x78
#define slotR12   0x80
#define slotR13   0x88
#define slotR14   0x90
#define slotR15   0x98
#define slotGo    0xa0

// What is waited for in slotGo, and as long as what.
#define gateMap   0x67617401
#define gateRun   0x67617402
#define gateUnmap 0x67617403
#define gateRest  0x67617404
#define SPINS     0x02000000
#define QUIET     $-1

// REPORT is where the tracer meets the thread: tgkill(tgid, tid, R15). A traced
// thread stops even for a signal that it ignores; an untraced one does not
// notice, and goes on to restore itself.
#define REPORT \
	MOVL $234, AX; \
	MOVL slotTgid(R14), DI; \
	MOVL slotTid(R14), SI; \
	MOVL R15, DX; \
	SYSCALL

// cave<> is position independent and is copied, never called: nothing but jumps
// and addresses relative to its own start. It uses no stack, since the thread's
// may have no room (goroutines) and red zones hold live data. What it needs
// beyond the slot is in registers, so that it need not write to the slot, which
// it could not:
//	R12 entries left to run    RBP the next entry     RBX the pages, R13 their length
//	R14 the slot               R15 the signal of REPORT, or 0
// It is one straight line. Wherever the thread is when its tracer dies, running
// on brings it through what is left of the batch to the munmap and the cure.
//
// A thread whose seccomp filter would punish it for one of these calls, were the
// tracer not there to suspend it, is quiet: R15 is -1, its mask is its own, and it
// makes no call but when the tracer has just said so, by a word in the slot or a
// flag in the entry for which it waits in a loop. Left alone there it goes on to
// its registers after about a second, without any call.
//
// The tracer finds its places behind the SYSCALLs by counting them (cavePlaces).
TEXT cave<>(SB),NOSPLIT|NOFRAME,$0-0
	QUAD $0; QUAD $0; QUAD $0; QUAD $0; QUAD $0
	QUAD $0; QUAD $0; QUAD $0; QUAD $0; QUAD $0
	QUAD $0; QUAD $0; QUAD $0; QUAD $0; QUAD $0
	QUAD $0; QUAD $0; QUAD $0; QUAD $0; QUAD $0
	QUAD $0

	// Wait for DX, the gate, in slotGo.
gate:
	MOVL $SPINS, CX
spin:
	CMPQ cave<>+slotGo(SB), DX
	JEQ  go
	PAUSE
	DECL CX
	JNE  spin
	JMP  registers
quietmapped:
	MOVL $gateRun, DX
	JMP  gate
quietran:
	MOVL $gateUnmap, DX
	JMP  gate
quietunmapped:
	MOVL $gateRest, DX
	JMP  gate
go:
	CMPL DX, $gateRun
	JEQ  next
	CMPL DX, $gateUnmap
	JEQ  unmap
	MOVL $3, DX // PROT_READ|PROT_WRITE, behind gateMap

	// mmap(2), its arguments put into the registers by the tracer. R12 is 0 as
	// yet: a thread that loses its tracer from here on has no entry to run.
	SYSCALL
	MOVQ AX, BX
	CMPQ R15, QUIET
	JEQ  quietmapped
	REPORT

next:
	TESTQ R12, R12
	JEQ   done
	TESTB $2, 0x40(BP) // guarded
	JEQ   call
	MOVL  $SPINS, CX
wait:
	TESTB $4, 0x40(BP) // open
	JNE   call
	PAUSE
	DECL  CX
	JNE   wait
	JMP   done
call:
	MOVQ  0x00(BP), AX
	MOVQ  0x08(BP), DI
	MOVQ  0x10(BP), SI
	MOVQ  0x18(BP), DX
	MOVQ  0x20(BP), R10
	MOVQ  0x28(BP), R8
	MOVQ  0x30(BP), R9
	SYSCALL
	MOVQ  AX, 0x38(BP)
	ADDQ  $0x48, BP
	DECQ  R12
	TESTB $1, -8(BP) // Tolerate
	JNE   next
	CMPQ  AX, $-4095
	JCS   next       // below -4095 unsigned: no error

done:
	CMPQ R15, QUIET
	JEQ  quietran
	REPORT

	// munmap(RBX, R13). If the mmap failed, RBX is no address and this fails too.
unmap:
	MOVL $11, AX
	MOVQ BX, DI
	MOVQ R13, SI
	SYSCALL
	CMPQ R15, QUIET
	JEQ  quietunmapped
	REPORT

	// The cure. The mask first, all else being blocked until then; a handler
	// that comes in behind it returns to here, as it would to anywhere else.
	// rt_sigreturn(2) would do both at once, but it forgets the restart block of
	// an interrupted nanosleep(2) and needs a frame with the whole xsave area.
	MOVL $14, AX        // rt_sigprocmask
	MOVL $2, DI         // SIG_SETMASK
	LEAQ cave<>+slotMask(SB), SI
	XORL DX, DX
	MOVL $8, R10
	SYSCALL

registers:
	// Not by way of R14: handlers of 32-bit code return without R8 to R15.
	LEAQ cave<>(SB), BP

	// Flags without a stack: AL is OF, so that adding 0x7f overflows or not; AH
	// is the other status flags. No instruction up to here touches DF, AC or ID.
	MOVL slotFlags(BP), AX
	ADDB $0x7f, AX
	SAHF

	MOVQ slotRax(BP), AX
	MOVQ slotRbx(BP), BX
	MOVQ slotRcx(BP), CX
	MOVQ slotRdx(BP), DX
	MOVQ slotRsi(BP), SI
	MOVQ slotRdi(BP), DI
	MOVQ slotR8(BP), R8
	MOVQ slotR9(BP), R9
	MOVQ slotR10(BP), R10
	MOVQ slotR11(BP), R11
	MOVQ slotR12(BP), R12
	MOVQ slotR13(BP), R13
	MOVQ slotR14(BP), R14
	MOVQ slotR15(BP), R15
	MOVQ slotRbp(BP), BP

	// jmp *0(%rip): the address stands right behind the jump, 8-aligned because
	// the thread may run with AC set. In the slot of 32-bit code it is ljmp, to
	// an address of 32 bits with its code segment behind.
	PCALIGN $8
	BYTE $0x90; BYTE $0x90
	BYTE $0xff; BYTE $0x25; LONG $0

// func caveText() uintptr
TEXT ·caveText(SB),NOSPLIT,$0-8
	LEAQ cave<>(SB), AX
	MOVQ AX, ret+0(FP)
	RET
