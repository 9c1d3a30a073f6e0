#include "textflag.h"

// The service code of a stub, position independent: it is copied out of this
// program into memory that the stub maps. Both parts end in INT3, which stops
// the traced stub; a stub never outlives its tracer, so nobody else meets it.
//
// serviceCall (+0) issues the one system call that is in the registers.
// serviceBatch (+16) walks R12 entries from BX. An entry is 72 bytes: the
// number, six arguments, the result, and 1 if a failure does not end the batch.
TEXT serviceCode<>(SB),NOSPLIT|NOFRAME,$0-0
	SYSCALL
	INT	$3
	BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90
	BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90; BYTE $0x90
next:
	TESTQ	R12, R12
	JEQ	done
	MOVQ	0(BX), AX
	MOVQ	8(BX), DI
	MOVQ	16(BX), SI
	MOVQ	24(BX), DX
	MOVQ	32(BX), R10
	MOVQ	40(BX), R8
	MOVQ	48(BX), R9
	SYSCALL
	MOVQ	AX, 56(BX)
	DECQ	R12
	ADDQ	$72, BX
	CMPQ	AX, $-4095
	JCS	next
	TESTQ	$1, -8(BX)
	JNE	next
done:
	INT	$3
	BYTE	$0x90

TEXT serviceEnd<>(SB),NOSPLIT|NOFRAME,$0-0
	RET

// func serviceText() (start, end uintptr)
TEXT ·serviceText(SB),NOSPLIT,$0-16
	LEAQ	serviceCode<>(SB), AX
	MOVQ	AX, start+0(FP)
	LEAQ	serviceEnd<>(SB), AX
	MOVQ	AX, end+8(FP)
	RET
