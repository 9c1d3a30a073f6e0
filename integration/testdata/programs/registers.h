/*
 * registers.h - hold_registers_*(in, out, turns): load every register of the
 * user's from in, spin for turns with all of them live, store them to out.
 * Whoever changes one register of a spinning thread is seen by memcmp.
 *
 * Layout of in and out (HELD_SIZE bytes): 32 slots of 64 bytes for the vector
 * registers, 8 mask registers k0-k7, 12 general registers, 8 x87 registers.
 * rsp, rsi (out) and rdi (in) and the turn counter in rdx are held too, in the
 * sense that the function would not come back without them.
 */
#ifndef REGISTERS_H
#define REGISTERS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HELD_MASKS 2048
#define HELD_GENERAL (HELD_MASKS + 64)
#define HELD_X87 (HELD_GENERAL + 12 * 8)
#define HELD_SIZE 2304

typedef void hold_registers_fn(const void *in, void *out, uint64_t turns);
hold_registers_fn hold_registers_sse, hold_registers_avx, hold_registers_avx512;

asm(".macro load_general\n"
    "  mov 2112+0(%rdi), %rax\n   mov 2112+8(%rdi), %rbx\n"
    "  mov 2112+16(%rdi), %rcx\n  mov 2112+24(%rdi), %rbp\n"
    "  mov 2112+32(%rdi), %r8\n   mov 2112+40(%rdi), %r9\n"
    "  mov 2112+48(%rdi), %r10\n  mov 2112+56(%rdi), %r11\n"
    "  mov 2112+64(%rdi), %r12\n  mov 2112+72(%rdi), %r13\n"
    "  mov 2112+80(%rdi), %r14\n  mov 2112+88(%rdi), %r15\n"
    ".endm\n"
    ".macro store_general\n"
    "  mov %rax, 2112+0(%rsi)\n   mov %rbx, 2112+8(%rsi)\n"
    "  mov %rcx, 2112+16(%rsi)\n  mov %rbp, 2112+24(%rsi)\n"
    "  mov %r8, 2112+32(%rsi)\n   mov %r9, 2112+40(%rsi)\n"
    "  mov %r10, 2112+48(%rsi)\n  mov %r11, 2112+56(%rsi)\n"
    "  mov %r12, 2112+64(%rsi)\n  mov %r13, 2112+72(%rsi)\n"
    "  mov %r14, 2112+80(%rsi)\n  mov %r15, 2112+88(%rsi)\n"
    ".endm\n"
    /* The x87 stack is loaded with doubles and popped in the other order. */
    ".macro load_x87\n"
    "  .irp i, 0,1,2,3,4,5,6,7\n  fldl 2208+8*\\i(%rdi)\n  .endr\n"
    ".endm\n"
    ".macro store_x87\n"
    "  .irp i, 7,6,5,4,3,2,1,0\n  fstpl 2208+8*\\i(%rsi)\n  .endr\n"
    ".endm\n"
    ".macro sixteen op reg\n"
    "  .irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "  \\op 64*\\i(%rdi), %\\reg\\i\n  .endr\n"
    ".endm\n"
    ".macro sixteen_out op reg\n"
    "  .irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "  \\op %\\reg\\i, 64*\\i(%rsi)\n  .endr\n"
    ".endm\n"
    ".macro high op\n"
    "  .irp i, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    "  \\op 64*\\i(%rdi), %zmm\\i\n  .endr\n"
    "  .irp i, 0,1,2,3,4,5,6,7\n  kmovw 2048+8*\\i(%rdi), %k\\i\n  .endr\n"
    ".endm\n"
    ".macro high_out op\n"
    "  .irp i, 16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
    "  \\op %zmm\\i, 64*\\i(%rsi)\n  .endr\n"
    "  .irp i, 0,1,2,3,4,5,6,7\n  kmovw %k\\i, 2048+8*\\i(%rsi)\n  .endr\n"
    ".endm\n"
    ".macro save\n"
    "  push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
    ".endm\n"
    ".macro unsave\n"
    "  pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n"
    ".endm\n"
    ".text\n"
    ".macro function name\n"
    ".globl \\name\n.type \\name, @function\n\\name:\n"
    "  save\n  load_x87\n"
    ".endm\n"
    /* The loop itself uses no register but rdx. */
    ".macro spin\n"
    "  load_general\n1: pause\n  dec %rdx\n  jnz 1b\n  store_general\n"
    ".endm\n"
    ".macro finish\n"
    "  store_x87\n  unsave\n  ret\n"
    ".endm\n"

    "function hold_registers_sse\n"
    "  sixteen movups xmm\n  spin\n  sixteen_out movups xmm\n  finish\n"
    "function hold_registers_avx\n"
    "  sixteen vmovups ymm\n  spin\n  sixteen_out vmovups ymm\n"
    "  vzeroupper\n  finish\n"
    "function hold_registers_avx512\n"
    "  sixteen vmovups zmm\n  high vmovups\n  spin\n"
    "  sixteen_out vmovups zmm\n  high_out vmovups\n  vzeroupper\n  finish\n");

struct held {
	_Alignas(64) unsigned char in[HELD_SIZE];
	_Alignas(64) unsigned char out[HELD_SIZE];
	hold_registers_fn *hold;
	size_t width;	/* bytes of a vector register */
	size_t vectors;
	int masks;
};

static inline void held_init(struct held *h, unsigned seed)
{
	double d;

	memset(h, 0, sizeof(*h));
	for (size_t i = 0; i < HELD_SIZE; i++)
		h->in[i] = (i * 2654435761u + seed * 40503u) >> 7;
	/* The mask registers are compared in the 16 bits AVX-512F has. */
	for (int i = 0; i < 8; i++)
		memset(h->in + HELD_MASKS + 8 * i + 2, 0, 6);
	/* x87 values must be ordinary numbers: a signalling NaN would come
	 * back quiet. */
	for (int i = 0; i < 8; i++) {
		d = seed * 1000.0 + i + 0.5;
		memcpy(h->in + HELD_X87 + 8 * i, &d, 8);
	}
	h->width = 16;
	h->vectors = 16;
	h->hold = hold_registers_sse;
	if (__builtin_cpu_supports("avx")) {
		h->width = 32;
		h->hold = hold_registers_avx;
	}
	if (__builtin_cpu_supports("avx512f")) {
		h->width = 64;
		h->vectors = 32;
		h->masks = 1;
		h->hold = hold_registers_avx512;
	}
}

/* held_check spins once and returns the name of what changed, or NULL. */
static inline const char *held_check(struct held *h, uint64_t turns)
{
	h->hold(h->in, h->out, turns);
	for (size_t i = 0; i < h->vectors; i++)
		if (memcmp(h->in + 64 * i, h->out + 64 * i, h->width))
			return "vector register";
	if (h->masks && memcmp(h->in + HELD_MASKS, h->out + HELD_MASKS, 64))
		return "mask register";
	if (memcmp(h->in + HELD_GENERAL, h->out + HELD_GENERAL, 12 * 8))
		return "general register";
	if (memcmp(h->in + HELD_X87, h->out + HELD_X87, 64))
		return "x87 register";
	return NULL;
}

#endif
