/*
 * spin of spin.S for 32-bit code (gcc -m32): the registers that it has, eight
 * vectors and the carry flag. Gpr order: eax ebx ecx edx esi edi ebp; edi keeps
 * the frame, and out has of the others what in has.
 */
#define OUT 128
#define LOOPS 296
#define FLAGERR 304
#define EXTRA 320
	.text
	.globl spin
spin:
	push %ebx; push %esi; push %edi; push %ebp
	mov 20(%esp), %edi
	mov 24(%esp), %esi
	vmovdqu 0(%esi), %ymm0;    vmovdqu 32(%esi), %ymm1
	vmovdqu 64(%esi), %ymm2;   vmovdqu 96(%esi), %ymm3
	vmovdqu 128(%esi), %ymm4;  vmovdqu 160(%esi), %ymm5
	vmovdqu 192(%esi), %ymm6;  vmovdqu 224(%esi), %ymm7
	mov $32, %ecx
1:	mov -4(%edi,%ecx,4), %eax
	mov %eax, OUT-4(%edi,%ecx,4)
	dec %ecx
	jnz 1b

	pushf
	pushf
	mov EXTRA(%edi), %eax
	or %eax, (%esp)
	popf
	mov 0(%edi), %eax; mov 8(%edi), %ebx; mov 16(%edi), %ecx
	mov 24(%edi), %edx; mov 32(%edi), %esi; mov 48(%edi), %ebp
2:	stc
	decl LOOPS(%edi)
	jc 3f
	incl FLAGERR(%edi)
	cmpl $0, LOOPS(%edi)
3:	jnz 2b
	mov %eax, OUT+0(%edi); mov %ebx, OUT+8(%edi); mov %ecx, OUT+16(%edi)
	mov %edx, OUT+24(%edi); mov %esi, OUT+32(%edi); mov %ebp, OUT+48(%edi)
	popf
	mov 28(%esp), %edx
	vmovdqu %ymm0, 0(%edx);    vmovdqu %ymm1, 32(%edx)
	vmovdqu %ymm2, 64(%edx);   vmovdqu %ymm3, 96(%edx)
	vmovdqu %ymm4, 128(%edx);  vmovdqu %ymm5, 160(%edx)
	vmovdqu %ymm6, 192(%edx);  vmovdqu %ymm7, 224(%edx)
	pop %ebp; pop %edi; pop %esi; pop %ebx
	ret

	.section .rodata
	.globl vectorBytes
vectorBytes:
	.long 256
	.section .note.GNU-stack,"",@progbits
