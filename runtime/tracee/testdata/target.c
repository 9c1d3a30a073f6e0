/*
 * A process that notices when something happens to it. Each thread counts its
 * rounds and its errors in a file that the test maps.
 *
 *	target FILE MODE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;

struct state { /* one a thread; the test knows this layout */
	volatile u64 rounds, errors, code, eintr, signals, value, tid, late;
};
static struct state *states; /* states[63] is from the test to us */
#define COMMAND (states[63].value)

static u64 now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void fail(struct state *s, u64 code)
{
	if (!s->errors++)
		s->code = code;
}

/* ---- mask and alternate stack of a thread stay as they are ---- */
static __thread u64 want_mask;
static __thread void *want_stack;

static void own_signals(int alt, int alarms)
{
	sigset_t m;
	stack_t ss = {0};
	sigemptyset(&m);
	if (!alarms) /* while the main thread is stopped, they go to any that lets them */
		sigaddset(&m, SIGALRM);
	sigaddset(&m, SIGUSR2);
	sigaddset(&m, SIGRTMAX);
	pthread_sigmask(SIG_SETMASK, &m, 0);
	memcpy(&want_mask, &m, 8);
	if (alt) {
		ss.ss_size = 65536;
		ss.ss_sp = want_stack = malloc(ss.ss_size);
		sigaltstack(&ss, 0);
	}
}

static void check_signals(struct state *s)
{
	sigset_t m;
	stack_t ss;
	u64 x;
	pthread_sigmask(0, 0, &m);
	memcpy(&x, &m, 8);
	if (x != want_mask)
		fail(s, 100);
	sigaltstack(0, &ss);
	if (ss.ss_sp != want_stack)
		fail(s, 101);
}

/* ---- registers ---- */
struct frame {
	u64 in[16], out[16], kin[2], kout[2], rsp, loops, flag_errors, red_errors, extra;
};
extern void spin(struct frame *, const void *, void *);
extern const int vectorBytes;

static void spinner(struct state *s, int alt, u64 extra)
{
	static __thread char vin[2048], vout[2048];
	struct frame f;
	own_signals(alt, !(extra & 0x40000));
	for (u64 k = 1;; k++) {
		memset(&f, 0, sizeof f);
		for (int i = 0; i < 16; i++)
			f.in[i] = k * 0x9e3779b97f4a7c15ull + i * 0x123456789abcdefull;
		for (int i = 0; i < vectorBytes; i++)
			vin[i] = k * 7 + i * 13 + (i >> 6);
		f.kin[0] = k * 77, f.kin[1] = ~k;
		f.loops = 3000, f.extra = extra;
		spin(&f, vin, vout);
		for (int i = 0; i < 15; i++)
			if (i != 5 && f.in[i] != f.out[i])
				fail(s, 10 + i);
		if (vectorBytes == 2048 && (f.kin[0] != f.kout[0] || f.kin[1] != f.kout[1]))
			fail(s, 30);
		if (memcmp(vin, vout, vectorBytes))
			fail(s, 40);
		if (f.flag_errors)
			fail(s, 50);
		if (f.red_errors)
			fail(s, 51);
		check_signals(s);
		s->rounds++;
	}
}

/* ---- real-time signals arrive in order, each once ---- */
static __thread struct state *self;

static void on_rt(int n, siginfo_t *si, void *u)
{
	u64 v = (unsigned)si->si_value.sival_int;
	if (v != self->signals + 1)
		fail(self, 60);
	self->signals = v;
}

static void on_alarm(int n) {}

static void queue_rt(struct state *to, unsigned *seq)
{
	siginfo_t si = {0};
	si.si_code = SI_QUEUE;
	si.si_pid = getpid();
	si.si_value.sival_int = *seq + 1;
	if (to->tid && syscall(SYS_rt_tgsigqueueinfo, getpid(), to->tid, SIGRTMIN, &si) == 0)
		++*seq;
}

/* ---- sleeping calls ---- */
#ifdef SYS__newselect
#define SELECT SYS__newselect
#else
#define SELECT SYS_select
#endif
static int pipes[2];
static unsigned gate;

static void timed(struct state *s, int kind)
{
	const u64 want = 15000000;
	own_signals(0, 0);
	for (;; s->rounds++) {
		struct timespec q = {0, want};
		struct timeval tv = {0, want / 1000};
		unsigned never = 0;
		u64 t = now();
		long r = 0;
		switch (kind) {
		case 0: r = syscall(SYS_nanosleep, &q, 0); break;
		case 1: r = syscall(SYS_poll, 0, 0, 15); break;
		case 2: r = syscall(SYS_futex, &never, FUTEX_WAIT, 0, &q, 0, 0); break;
		case 3: r = syscall(SELECT, 0, 0, 0, 0, &tv); break;
		case 4: r = syscall(SYS_ppoll, 0, 0, &q, 0, 8); break;
		case 5: r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &q, 0); break;
		}
		t = now() - t;
		if (r < 0 && errno == EINTR)
			s->eintr++;
		else if (r < 0 && errno != ETIMEDOUT)
			fail(s, 1000 + errno);
		if (t < want)
			fail(s, 70);
		if (t > s->late)
			s->late = t;
		check_signals(s);
	}
}

static void reader(struct state *s)
{
	unsigned v, want = 0;
	own_signals(0, 0);
	for (;; s->rounds++) {
		long r = read(pipes[0], &v, sizeof v);
		if (r < 0 && errno == EINTR) {
			s->eintr++;
			continue;
		}
		if (r != sizeof v || v != want++)
			fail(s, 80);
		check_signals(s);
	}
}

static void waiter(struct state *s)
{
	own_signals(0, 0);
	for (;; s->rounds++) {
		unsigned v = __atomic_load_n(&gate, __ATOMIC_SEQ_CST);
		if (syscall(SYS_futex, &gate, FUTEX_WAIT, v, 0, 0, 0) < 0 && errno != EAGAIN) {
			if (errno == EINTR)
				s->eintr++;
			else
				fail(s, 90);
		}
		check_signals(s);
	}
}

static void pauser(struct state *s)
{
	own_signals(0, 0);
	pause();
	fail(s, 91);
	for (;;)
		pause();
}

static void forker(struct state *s)
{
	own_signals(0, 0);
	for (;; s->rounds++) {
		int status;
		pid_t p = fork();
		if (p == 0)
			_exit(7);
		if (p < 0 || waitpid(p, &status, 0) != p || WEXITSTATUS(status) != 7)
			fail(s, 92);
		check_signals(s);
		usleep(2000);
	}
}

static void feeder(struct state *s)
{
	unsigned seq0 = 0, seq1 = 0, v = 0;
	own_signals(0, 0);
	for (;; s->rounds++) {
		struct timespec q = {0, 300000};
		syscall(SYS_nanosleep, &q, 0);
		if (write(pipes[1], &v, sizeof v) == sizeof v)
			v++;
		__atomic_add_fetch(&gate, 1, __ATOMIC_SEQ_CST);
		syscall(SYS_futex, &gate, FUTEX_WAKE, 1, 0, 0, 0);
		queue_rt(&states[0], &seq0);
		queue_rt(&states[1], &seq1);
	}
}

static void *thread(void *arg)
{
	long kind = (long)arg;
	struct state *s = self = &states[kind];
	s->tid = syscall(SYS_gettid);
	switch (kind) {
	case 0: spinner(s, 0, 0);
	case 1: spinner(s, 1, 0x200000);           /* ID */
	case 2: reader(s);
	case 3: waiter(s);
	case 4: case 5: case 6: case 7: case 8: case 9: timed(s, kind - 4);
	case 10: pauser(s);
	case 11: forker(s);
	case 12: feeder(s);
	case 13: spinner(s, 0, 0x240000);          /* AC, ID; gets no signals */
	}
	return 0;
}

static void start(long kind)
{
	pthread_t t;
	pthread_create(&t, 0, thread, (void *)kind);
}

/* ready: every thread has been round once, and maps nothing any more */
static void ready(const long *kinds, int n)
{
	for (int i = 0; i < n; i++)
		while (kinds[i] != 10 && !states[kinds[i]].rounds)
			usleep(1000);
	states[62].rounds = 1;
	for (;;)
		pause();
}

static void all(void)
{
	struct sigaction a = {0};
	struct itimerval it = {{0, 5000}, {0, 5000}};
	a.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
	a.sa_sigaction = on_rt;
	sigaction(SIGRTMIN, &a, 0);
	a.sa_flags = SA_RESTART;
	a.sa_handler = on_alarm;
	sigaction(SIGALRM, &a, 0);
	if (pipe(pipes))
		exit(1);
	long kinds[14];
	for (long k = 0; k <= 13; k++)
		start(kinds[k] = k);
	setitimer(ITIMER_REAL, &it, 0);
	ready(kinds, 14);
}

/* ---- rseq: an unlocked counter a CPU, correct only if aborts are kept ---- */
struct my_rseq { uint32_t cpu_start, cpu; u64 cs; uint32_t flags, node, mm_cid, pad; } __attribute__((aligned(32)));
static __thread struct my_rseq area;
static volatile u64 counter;

static void *rseq_thread(void *arg)
{
	struct state *s = &states[(long)arg];
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof one, &one);
	s->tid = syscall(SYS_gettid);
	if (syscall(SYS_rseq, &area, 32, 0, 0x53053053)) {
		fail(s, errno);
		return 0;
	}
	while (COMMAND != 1) {
		int done = 0;
#ifdef __x86_64__
		asm volatile(
			".pushsection __rseq_cs, \"aw\"\n"
			".balign 32\n"
			"3: .long 0, 0\n .quad 1f, 2f-1f, 4f\n"
			".popsection\n"
			"lea 3b(%%rip), %%rax\n"
			"mov %%rax, %[cs]\n"
			"1: mov %[counter], %%rcx\n"
			"mov $20000, %%edx\n"
			"6: dec %%edx\n"
			"jnz 6b\n"
			"inc %%rcx\n"
			"mov %%rcx, %[counter]\n"
			"2: movl $1, %[done]\n"
			"jmp 5f\n"
			".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n"
			"4: nop\n"
			"5:\n"
			: [cs] "=m"(area.cs), [counter] "+m"(counter), [done] "+m"(done)
			:: "rax", "rcx", "rdx", "cc", "memory");
#endif
		if (done)
			s->rounds++;
		else
			s->eintr++; /* aborts */
	}
	s->value = counter;
	return 0;
}

static void rseq_mode(void)
{
	pthread_t t[2];
	for (long i = 0; i < 2; i++)
		pthread_create(&t[i], 0, rseq_thread, (void *)(i + 1));
	states[62].rounds = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], 0);
	states[0].value = counter;
	states[0].rounds = 1;
	for (;;)
		pause();
}

/* ---- seccomp: what we would call is deadly ---- */
static void seccomp_mode(void)
{
#define KILL(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		KILL(SYS_mmap), KILL(SYS_munmap), KILL(SYS_tgkill), KILL(SYS_getppid),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof code / sizeof *code, code};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog))
		fail(&states[0], errno);
	for (;; states[0].rounds++) {
		struct timespec q = {0, 100000};
		states[62].rounds = 1;
		syscall(SYS_nanosleep, &q, 0);
		if (COMMAND == 1)
			syscall(SYS_getppid);
	}
}

/* ---- every default-ignored signal has a handler ---- */
static void on_any(int n) { states[0].signals++; }

static void caught_mode(void)
{
	int sigs[] = {SIGURG, SIGWINCH, SIGCHLD, SIGCONT};
	struct sigaction a = {0};
	a.sa_handler = on_any;
	a.sa_flags = SA_RESTART;
	for (int i = 0; i < 4; i++)
		sigaction(sigs[i], &a, 0);
	start(0), start(4), start(5);
	ready((long[]){0, 4, 5}, 3);
}

/* ---- like Go: all but SIGCONT have a handler ---- */
static void cont_mode(void)
{
	int sigs[] = {SIGURG, SIGWINCH, SIGCHLD};
	struct sigaction a = {0};
	a.sa_handler = on_any;
	a.sa_flags = SA_RESTART;
	for (int i = 0; i < 3; i++)
		sigaction(sigs[i], &a, 0);
	start(0), start(4), start(13);
	ready((long[]){0, 4, 13}, 3);
}

/* ---- no vdso: our code goes behind the text ---- */
static long call(long nr, unsigned long a, unsigned long b)
{
#ifdef __i386__ /* whose libc makes its calls by way of the vdso */
	long ret;
	asm volatile("int $0x80" : "=a"(ret) : "0"(nr), "b"(a), "c"(b) : "memory");
	return ret;
#else
	return syscall(nr, a, b);
#endif
}

static void novdso_mode(void)
{
	char line[256];
	unsigned long from[8], to[8], n = 0;
	FILE *f = fopen("/proc/self/maps", "r");
	while (n < 8 && fgets(line, sizeof line, f))
		if (strstr(line, "[v") && !strstr(line, "vsyscall") && sscanf(line, "%lx-%lx", &from[n], &to[n]) == 2)
			n++;
	fclose(f);
	while (n--)
		call(SYS_munmap, from[n], to[n] - from[n]);
	for (;; states[0].rounds++) {
		struct timespec q = {0, 100000};
		states[62].rounds = 1;
		if (call(SYS_nanosleep, (unsigned long)&q, 0))
			states[0].eintr++;
	}
}

/* ---- its own system calls raise SIGSYS, as Wine has it ---- */
static void dispatch_mode(void)
{
	static volatile char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */
	if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector))
		fail(&states[0], errno);
	states[62].rounds = 1;
	for (;; states[0].rounds++)
		selector = COMMAND;
}

int main(int argc, char **argv)
{
	int fd = open(argv[1], O_RDWR);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	states = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (states == MAP_FAILED)
		return 1;
	if (!strcmp(argv[2], "all")) all();
	if (!strcmp(argv[2], "rseq")) rseq_mode();
	if (!strcmp(argv[2], "seccomp")) seccomp_mode();
	if (!strcmp(argv[2], "caught")) caught_mode();
	if (!strcmp(argv[2], "cont")) cont_mode();
	if (!strcmp(argv[2], "novdso")) novdso_mode();
	if (!strcmp(argv[2], "dispatch")) dispatch_mode();
	return 2;
}
