#include "textflag.h"

// The service code of a stub, position independent: it is copied out of this
// program into memory that the stub maps. Both parts end in INT3, which stops
// the traced stub; a stub never outlives its tracer, so nobody else meets it.
//
// serviceCall (+0) issues the one system call that is in the registers, and
// serviceNarrow (+8) one of 32-bit code. serviceBatch (+16) walks R12 entries from
// R13. An entry is 72 bytes: the number, six arguments, the result, and flags: 1 if
// a failure does not end the batch, 8 for a call of 32-bit code, which has five
// arguments at most.
TEXT serviceCode<>(SB),NOSPLIT|NOFRAME,$0-0
	SYSCALL
	INT	$3
	BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90
	INT	$0x80
	INT	$3
	BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90
next:
	TESTQ	R12, R12
	JEQ	done
	MOVQ	0(R13), AX
	TESTB	$8, 64(R13)
	JNE	narrow
	MOVQ	8(R13), DI
	MOVQ	16(R13), SI
	MOVQ	24(R13), DX
	MOVQ	32(R13), R10
	MOVQ	40(R13), R8
	MOVQ	48(R13), R9
	SYSCALL
made:
	MOVQ	AX, 56(R13)
	DECQ	R12
	ADDQ	$72, R13
	CMPQ	AX, $-4095
	JCS	next
	TESTQ	$1, -8(R13)
	JNE	next
done:
	INT	$3
	BYTE	$0x90
narrow:
	MOVL	8(R13), BX
	MOVL	16(R13), CX
	MOVL	24(R13), DX
	MOVL	32(R13), SI
	MOVL	40(R13), DI
	INT	$0x80
	JMP	made

TEXT serviceEnd<>(SB),NOSPLIT|NOFRAME,$0-0
	RET

// func serviceText() (start, end uintptr)
TEXT ·serviceText(SB),NOSPLIT,$0-16
	LEAQ	serviceCode<>(SB), AX
	MOVQ	AX, start+0(FP)
	LEAQ	serviceEnd<>(SB), AX
	MOVQ	AX, end+8(FP)
	RET
