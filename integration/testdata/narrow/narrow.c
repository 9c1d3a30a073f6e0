/*
 * narrow - what only 32-bit code has, held for ever: segments of its own (GDT and
 * LDT) in fs and es beside the libc's in gs, its registers, handlers that get its
 * frames with and without a restorer, calls by int $0x80 and by the vdso's entry,
 * with times of 32 and of 64 bits, and stretches of 64-bit code in between.
 * gcc -m32; see programs/hold.h for what a round is.
 */
#include "../programs/hold.h"

#include <asm/ldt.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/auxv.h>

#define ROUND (50 * MS)
#define NAP (400 * MS)
#define LATE (SEC + 600 * MS)
#define THREADS 8

static volatile unsigned turns[THREADS];
static unsigned sysinfo; /* the vdso's entry for calls */

static int raw(int nr, long a, long b, long c, long d, long e)
{
	int ret;

	asm volatile("int $0x80" : "=a"(ret)
		     : "0"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
		     : "memory");
	return ret;
}

static int entry(int nr, long a, long b, long c, long d, long e)
{
	int ret;

	asm volatile("call *%%gs:0x10" : "=a"(ret)
		     : "0"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
		     : "memory");
	return ret;
}

/* ---- registers, flags, vectors and segments, of a thread that only counts ---- */
struct frame {
	unsigned in[6], out[6], loops, bad;
	unsigned char vin[128], vout[128], x87[20];
};

/* hold puts selectors into fs and es, loads eax ebx ecx edx esi ebp, eight vectors
 * and two x87 registers and spins, with the carry flag set, until loops is 0; each
 * turn compares the first words of both segments. */
extern void hold(struct frame *f, unsigned in_fs, unsigned in_es, unsigned fs, unsigned es);
asm(".text\n"
    "hold:\n"
    "  push %ebx; push %esi; push %edi; push %ebp; push %es\n"
    "  mov 24(%esp), %edi\n"
    "  mov 36(%esp), %eax; mov %eax, %fs\n"
    "  mov 40(%esp), %eax; mov %eax, %es\n"
    "  movups 56(%edi), %xmm0; movups 72(%edi), %xmm1\n"
    "  movups 88(%edi), %xmm2; movups 104(%edi), %xmm3\n"
    "  movups 120(%edi), %xmm4; movups 136(%edi), %xmm5\n"
    "  movups 152(%edi), %xmm6; movups 168(%edi), %xmm7\n"
    "  fldpi; fldl2e\n"
    "  mov 0(%edi), %eax; mov 4(%edi), %ebx; mov 8(%edi), %ecx\n"
    "  mov 12(%edi), %edx; mov 16(%edi), %esi; mov 20(%edi), %ebp\n"
    "1: push %eax\n"
    "  mov 32(%esp), %eax; cmp %fs:0, %eax; jne 3f\n"
    "  mov 36(%esp), %eax; cmp %es:0, %eax; jne 3f\n"
    "  pop %eax\n"
    "  stc\n"
    "  decl 48(%edi)\n"
    "  jnc 2f\n"
    "  jnz 1b\n"
    "  jmp 4f\n"
    "3: pop %eax\n"
    "2: incl 52(%edi)\n"
    "4: mov %eax, 24(%edi); mov %ebx, 28(%edi); mov %ecx, 32(%edi)\n"
    "  mov %edx, 36(%edi); mov %esi, 40(%edi); mov %ebp, 44(%edi)\n"
    "  movups %xmm0, 184(%edi); movups %xmm1, 200(%edi)\n"
    "  movups %xmm2, 216(%edi); movups %xmm3, 232(%edi)\n"
    "  movups %xmm4, 248(%edi); movups %xmm5, 264(%edi)\n"
    "  movups %xmm6, 280(%edi); movups %xmm7, 296(%edi)\n"
    "  fstpt 312(%edi); fstpt 322(%edi)\n"
    "  pop %es; pop %ebp; pop %edi; pop %esi; pop %ebx\n"
    "  ret\n");

static unsigned in_gdt[1024] __attribute__((aligned(4096)));
static unsigned in_ldt[1024] __attribute__((aligned(4096)));

static struct user_desc segment(unsigned number, void *base)
{
	struct user_desc d = { .entry_number = number, .base_addr = (unsigned)base,
			       .limit = 4095, .seg_32bit = 1, .useable = 1 };

	return d;
}

static void *counter(void *arg)
{
	struct user_desc d = segment(-1, in_gdt);
	struct frame f;
	unsigned fs, es = 3 << 3 | 7;

	need(!raw(SYS_set_thread_area, (long)&d, 0, 0, 0, 0));
	fs = d.entry_number << 3 | 3;
	for (unsigned k = 1;; k++) {
		memset(&f, 0, sizeof(f));
		for (int i = 0; i < 6; i++)
			f.in[i] = k * 0x9e3779b9u + i * 0x12345679u;
		for (int i = 0; i < 128; i++)
			f.vin[i] = k * 7 + i * 13;
		f.loops = 300000;
		hold(&f, in_gdt[0], in_ldt[0], fs, es);
		if (f.bad || memcmp(f.in, f.out, sizeof(f.in)) || memcmp(f.vin, f.vout, sizeof(f.vin)) ||
		    memcmp(f.x87, "\xbc\xf0\x17\x5c\x29\x3b\xaa\xb8\xff\x3f\x35\xc2\x68\x21\xa2\xda\x0f\xc9\x00\x40", 20))
			fail("registers or segments have changed (%u)", f.bad);
		turns[(long)arg]++;
		doze(10 * MS);
	}
}

/* ---- 64-bit code in a 32-bit program ---- */
static void *wide(void *arg)
{
	static const unsigned char code[] = {
		0x49, 0xb8, 8, 7, 6, 5, 4, 3, 2, 1,	/* mov $0x0102030405060708, %r8 */
		0x4d, 0x89, 0xc1,			/* mov %r8, %r9 */
		0xb9, 0x40, 0x42, 0x0f, 0x00,		/* mov $1000000, %ecx */
		0x49, 0xff, 0xc0,			/* inc %r8 */
		0x49, 0xff, 0xc1,			/* inc %r9 */
		0xff, 0xc9,				/* dec %ecx */
		0x75, 0xf6,				/* jne back to the first inc */
		0x31, 0xc0,				/* xor %eax, %eax */
		0x4d, 0x39, 0xc8,			/* cmp %r9, %r8 */
		0x0f, 0x94, 0xc0,			/* sete %al */
		0xcb,					/* lret */
	};
	unsigned char *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct { unsigned ip; unsigned short cs; } to = { (unsigned)at, 0x33 };

	need(at != MAP_FAILED);
	memcpy(at, code, sizeof(code));
	for (;;) {
		unsigned same;

		asm volatile("lcall *%1" : "=a"(same) : "m"(to) : "ecx", "memory", "cc");
		need(same == 1);
		turns[(long)arg]++;
		doze(10 * MS);
	}
}

/* ---- calls that wait ---- */
struct wait {
	const char *name;
	int (*by)(int, long, long, long, long, long);
	int nr, wide;
};

static struct wait waits[] = {
	{ "nanosleep", raw, SYS_nanosleep, 0 },
	{ "clock_nanosleep_time64", raw, 407, 1 },
	{ "clock_nanosleep", entry, 267, 0 },
	{ "futex", entry, SYS_futex, 0 },
	{ "futex_time64", raw, 422, 1 },
	{ "poll", entry, SYS_poll, 0 },
};

static void *waiter(void *arg)
{
	struct wait *w = arg;
	const long long t[2] = { NAP / SEC, NAP % SEC };
	const int t32[2] = { NAP / SEC, NAP % SEC };
	const void *time = w->wide ? (void *)t : (void *)t32;

	for (;;) {
		long long before = mono_ns(), took;
		unsigned word = 7;
		int ret = 0;

		switch (w->nr) {
		case SYS_nanosleep:
			ret = w->by(w->nr, (long)time, 0, 0, 0, 0);
			break;
		case 267: case 407:
			ret = w->by(w->nr, CLOCK_MONOTONIC, 0, (long)time, 0, 0);
			break;
		case SYS_futex: case 422:
			ret = w->by(w->nr, (long)&word, FUTEX_WAIT, 7, (long)time, 0);
			if (ret == -ETIMEDOUT)
				ret = 0;
			break;
		case SYS_poll:
			ret = w->by(w->nr, 0, 0, NAP / MS, 0, 0);
		}
		took = mono_ns() - before;
		if (ret || took < NAP || took > NAP + LATE)
			fail("%s returned %d after %lld ms", w->name, ret, took / MS);
		turns[2 + (w - waits)]++;
	}
}

/* ---- handlers ---- */
static volatile unsigned plain, queued, wrong;

static void on_plain(int sig)
{
	if (sig != SIGUSR1)
		wrong++;
	plain++;
}

static void on_queued(int sig, siginfo_t *si, void *context)
{
	ucontext_t *u = context;

	if (sig != SIGRTMIN || si->si_code != SI_QUEUE || si->si_value.sival_int != (int)queued ||
	    (u->uc_mcontext.gregs[REG_CS] & 0xffff) != 0x23)
		wrong++;
	queued++;
}

struct kernel_action { void *handler; unsigned long flags; void *restorer; unsigned long mask[2]; };

static void install(void)
{
	/* Both return by way of the vdso, for want of a restorer. */
	struct kernel_action a = { on_plain, 0, NULL, { 0, 0 } };

	need(!raw(SYS_rt_sigaction, SIGUSR1, (long)&a, 0, 8, 0));
	a.handler = on_queued;
	a.flags = SA_SIGINFO | SA_RESTART;
	need(!raw(SYS_rt_sigaction, SIGRTMIN, (long)&a, 0, 8, 0));
}

static void handled(void)
{
	unsigned before = plain, value = queued;

	need(!raise(SIGUSR1) && plain == before + 1);
	need(!sigqueue(getpid(), SIGRTMIN, (union sigval){ .sival_int = value }) && queued == value + 1);
	need(!wrong);
}

static void start(void *(*body)(void *), void *arg)
{
	pthread_t t;

	need(!pthread_create(&t, NULL, body, arg));
}

int main(void)
{
	struct user_desc d = segment(3, in_ldt);
	struct timespec boot;
	sigset_t all, own;

	report_open("narrow");
	sysinfo = getauxval(AT_SYSINFO);
	need(sysinfo);
	in_gdt[0] = 0x600d;
	in_ldt[0] = 0x1d7;
	need(!raw(SYS_modify_ldt, 1, (long)&d, sizeof(d), 0, 0));
	install();
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &own);
	start(counter, (void *)0);
	start(wide, (void *)1);
	for (unsigned i = 0; i < COUNT(waits); i++)
		start(waiter, &waits[i]);
	pthread_sigmask(SIG_SETMASK, &own, NULL);
	for (unsigned quiet[THREADS] = { 0 }, seen[THREADS] = { 0 };;) {
		handled();
		need(!clock_gettime(CLOCK_BOOTTIME, &boot)); /* of the vdso */
		need(getauxval(AT_SYSINFO) == sysinfo);
		for (int i = 0; i < THREADS; i++) {
			quiet[i] = seen[i] == turns[i] ? quiet[i] + 1 : 0;
			seen[i] = turns[i];
			if (quiet[i] > 100)
				fail("thread %d stands still", i);
		}
		tick();
		doze(ROUND);
	}
}
