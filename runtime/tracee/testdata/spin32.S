/* A 32-bit process: gcc -m32 -nostdlib -static. It maps no file to count in. */
	.globl _start
_start:	incl word
	jmp _start
	.data
word:	.long 0
	.section .note.GNU-stack,"",@progbits
