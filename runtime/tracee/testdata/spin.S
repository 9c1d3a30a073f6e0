/* Register files that know what they hold. Built twice: WIDE for AVX-512. */
#ifdef WIDE
#define VEC 64
#define VLOAD(n) vmovdqu64 64*n(%rsi), %zmm##n
#define VSAVE(n) vmovdqu64 %zmm##n, 64*n(%rdi)
#else
#define VEC 32
#define VLOAD(n) vmovdqu 32*n(%rsi), %ymm##n
#define VSAVE(n) vmovdqu %ymm##n, 32*n(%rdi)
#endif
#define ALL(X) X(0); X(1); X(2); X(3); X(4); X(5); X(6); X(7); X(8); X(9); X(10); X(11); X(12); X(13); X(14); X(15)
#ifdef WIDE
#define HIGH(X) X(16); X(17); X(18); X(19); X(20); X(21); X(22); X(23); X(24); X(25); X(26); X(27); X(28); X(29); X(30); X(31)
#else
#define HIGH(X)
#endif

/*
 * struct frame: gpr[16] in, gpr[16] out, mask registers in[2] out[2], rsp,
 * loops, flagErrors, redErrors, extraFlags
 * long spin(struct frame *rdi, const void *vecIn rsi, void *vecOut rdx)
 * gpr order: rax rbx rcx rdx rsi rdi rbp r8..r15; slot 15 unused.
 */
#define OUT 128
#define MASKS 256
#define RSP 288
#define LOOPS 296
#define FLAGERR 304
#define REDERR 312
#define EXTRA 320
	.text
	.globl spin
spin:
	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
	push %rdx
	push %rdi
	mov %rdi, %fs:current@tpoff
	mov %rsp, RSP(%rdi)
	ALL(VLOAD); HIGH(VLOAD)
#ifdef WIDE
	kmovq MASKS(%rdi), %k1
	kmovq MASKS+8(%rdi), %k7
#endif
	sub $1024, %rsp
	/* red zone: 16 words below rsp */
	mov $16, %ecx
1:	mov %rcx, %rax
	neg %rax
	lea (%rsp,%rax,8), %rax
	imul $0x1010101, %rcx, %rdx
	mov %rdx, (%rax)
	dec %ecx
	jnz 1b

	mov 0(%rdi), %rax; mov 8(%rdi), %rbx; mov 16(%rdi), %rcx; mov 24(%rdi), %rdx
	mov 32(%rdi), %rsi; mov 48(%rdi), %rbp; mov 56(%rdi), %r8
	mov 64(%rdi), %r9; mov 72(%rdi), %r10; mov 80(%rdi), %r11; mov 88(%rdi), %r12
	mov 96(%rdi), %r13; mov 104(%rdi), %r14; mov 112(%rdi), %r15
	/* rdi keeps the frame: it is a register under test all the same */

	/* extra flags (AC, ID), far below the red zone */
	lea -512(%rsp), %rsp
	pushfq
	mov EXTRA(%rdi), %rax
	or %rax, (%rsp)
	popfq
	lea 512(%rsp), %rsp
	mov 0(%rdi), %rax

2:	/* OF SF AF PF, no CF, no ZF */
	movl $0x7fffffff, %eax
	addl $1, %eax
	mov 0(%rdi), %rax
	.rept 16
	nop
	.endr
	jno 9f
	jns 9f
	jnp 9f
	jc 9f
	jz 9f
	/* ZF PF CF DF, no OF, no SF */
	cmp %eax, %eax
	stc
	std
	.rept 16
	nop
	.endr
	jo 9f
	jnc 9f
	jnz 9f
	js 9f
	lea -512(%rsp), %rsp
	pushfq
	pop %rax
	lea 512(%rsp), %rsp
	cld
	and EXTRA(%rdi), %rax
	cmp EXTRA(%rdi), %rax
	jne 9f
	mov 0(%rdi), %rax
	decq LOOPS(%rdi)
	jnz 2b
	jmp 3f
9:	incq FLAGERR(%rdi)
	cld
	mov 0(%rdi), %rax
3:	mov %rax, OUT(%rdi); mov %rbx, OUT+8(%rdi); mov %rcx, OUT+16(%rdi); mov %rdx, OUT+24(%rdi)
	mov %rsi, OUT+32(%rdi); mov %rbp, OUT+48(%rdi); mov %r8, OUT+56(%rdi)
	mov %r9, OUT+64(%rdi); mov %r10, OUT+72(%rdi); mov %r11, OUT+80(%rdi); mov %r12, OUT+88(%rdi)
	mov %r13, OUT+96(%rdi); mov %r14, OUT+104(%rdi); mov %r15, OUT+112(%rdi)
	cmp %rdi, %fs:current@tpoff
	je 4f
	mov %fs:current@tpoff, %rdi
	incq FLAGERR(%rdi)
4:	lea -512(%rsp), %rsp
	pushfq
	andq $~0x240000, (%rsp)
	popfq
	lea 512(%rsp), %rsp
	/* red zone */
	mov $16, %ecx
5:	mov %rcx, %rax
	neg %rax
	imul $0x1010101, %rcx, %rdx
	cmp %rdx, (%rsp,%rax,8)
	je 6f
	incq REDERR(%rdi)
6:	dec %ecx
	jnz 5b
	add $1024, %rsp
	cmp %rsp, RSP(%rdi)
	je 7f
	incq REDERR(%rdi)
7:	mov RSP(%rdi), %rsp
#ifdef WIDE
	kmovq %k1, %rax
	mov %rax, MASKS+16(%rdi)
	kmovq %k7, %rax
	mov %rax, MASKS+24(%rdi)
#endif
	pop %rax
	pop %rdi
	ALL(VSAVE); HIGH(VSAVE)
	vzeroupper
	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
	ret

	.globl vectorBytes
	.section .rodata
vectorBytes:
#ifdef WIDE
	.long 64*32
#else
	.long 32*16
#endif
	.section .tbss,"awT",@nobits
	.align 8
current: .quad 0
	.section .note.GNU-stack,"",@progbits
