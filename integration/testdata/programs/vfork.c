/*
 * vfork - processes and a thread that wait in vfork(2) for children that take
 * their time. Making /out/vfork.go ends the waits: the children exit or execute
 * another program, the parents check that nothing of theirs has changed and
 * vfork again, and the file is removed.
 *
 * vfork spawn does nothing but posix_spawn(3); vfork exit is what it starts.
 */
#include "hold.h"
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <xmmintrin.h>

enum { PLAIN, POOR, SESSION, THREAD, PARENTS };

static const char *const names[] = { "plain", "without rights", "child in a session of its own", "thread" };

struct state {
	volatile unsigned long go;		/* how many waits are to end */
	volatile unsigned long waited[PARENTS];	/* how many have */
	struct worker child[PARENTS], others;
};

static struct state *state;
static __thread int me;
static __thread unsigned long turn;
static volatile char avx;

/* What the parent finds in its registers when it comes back. */
static struct {
	long rax, rbx, rdx, rsi, rdi, r8, r9, r10, r12, r13, r14, r15;
	char ymm[2][32];
	int mxcsr;
} got[PARENTS];
static char pattern[2][32];

static void nothing(int sig) { (void)sig; }

/* The vforked child, on its parent's stack and memory. */
static void __attribute__((noreturn, used)) child(void)
{
	struct timespec ts = to_timespec(2 * MS);
	char *argv[] = { "vfork", "exit", NULL }, *envp[] = { NULL };

	if (me == SESSION) {
		struct sigaction sa = { .sa_handler = SIG_IGN };

		syscall(SYS_setsid);
		syscall(SYS_rt_sigaction, SIGUSR1, &sa, NULL, 8);
		syscall(SYS_close, report_fd);
		syscall(SYS_chdir, "/bin");
	}
	while (state->go == turn) {
		state->child[me].done++;
		syscall(SYS_nanosleep, &ts, NULL);
	}
	if (me == POOR)
		syscall(SYS_exit_group, 7);
	syscall(SYS_execve, "/bin/vfork", argv, envp);
	syscall(SYS_exit_group, 98);
	__builtin_unreachable();
}

static void __attribute__((noinline)) do_vfork(void)
{
	void *to = &got[me];

	_mm_setcsr(0x3f80);	/* round up */
	asm volatile(
		"push %%rbp\n\tmov %0, %%rbp\n\t"
		"mov $0x1b, %%rbx\n\tmov $0x1d, %%rdx\n\tmov $0x15, %%rsi\n\tmov $0x17, %%rdi\n\t"
		"mov $0x18, %%r8\n\tmov $0x19, %%r9\n\tmov $0x10, %%r10\n\t"
		"mov $0x12, %%r12\n\tmov $0x13, %%r13\n\tmov $0x14, %%r14\n\tmov $0x1f, %%r15\n\t"
		"cmpb $0, avx(%%rip)\n\tje 3f\n\t"
		"vmovdqu pattern(%%rip), %%ymm3\n\tvmovdqu pattern+32(%%rip), %%ymm12\n\t"
		"3: mov $58, %%eax\n\tsyscall\n\t"
		"test %%rax, %%rax\n\tjnz 1f\n\t"
		"sub $1024, %%rsp\n\tand $-16, %%rsp\n\tcall child\n\t"
		"1: mov %%rax, 0(%%rbp)\n\tmov %%rbx, 8(%%rbp)\n\tmov %%rdx, 16(%%rbp)\n\tmov %%rsi, 24(%%rbp)\n\t"
		"mov %%rdi, 32(%%rbp)\n\tmov %%r8, 40(%%rbp)\n\tmov %%r9, 48(%%rbp)\n\tmov %%r10, 56(%%rbp)\n\t"
		"mov %%r12, 64(%%rbp)\n\tmov %%r13, 72(%%rbp)\n\tmov %%r14, 80(%%rbp)\n\tmov %%r15, 88(%%rbp)\n\t"
		"cmpb $0, avx(%%rip)\n\tje 4f\n\t"
		"vmovdqu %%ymm3, 96(%%rbp)\n\tvmovdqu %%ymm12, 128(%%rbp)\n\tvzeroupper\n\t"
		"4: stmxcsr 160(%%rbp)\n\tpop %%rbp"
		: : "r"(to)
		: "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
		  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
		  "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
}

static void __attribute__((noreturn)) parent(int which)
{
	struct sigaction sa = { .sa_handler = nothing }, now;
	sigset_t set, mask;
	char cwd[64];
	int status;

	me = which;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	need(!pthread_sigmask(SIG_BLOCK, &set, NULL));
	need(!sigaction(SIGUSR1, &sa, NULL));
	if (me == POOR)
		need(!setgid(1000) && !setuid(1000));
	for (;;) {
		pid_t tid = gettid();

		do_vfork();
		need(got[me].rax > 0 && waitpid(got[me].rax, &status, 0) == got[me].rax);
		need(WIFEXITED(status) && WEXITSTATUS(status) == 7);
		need(got[me].rbx == 0x1b && got[me].rdx == 0x1d && got[me].rsi == 0x15 && got[me].rdi == 0x17);
		need(got[me].r8 == 0x18 && got[me].r9 == 0x19 && got[me].r10 == 0x10 && got[me].r12 == 0x12);
		need(got[me].r13 == 0x13 && got[me].r14 == 0x14 && got[me].r15 == 0x1f && got[me].mxcsr == 0x3f80);
		need(!avx || !memcmp(got[me].ymm, pattern, sizeof(pattern)));
		need(!sigaction(SIGUSR1, NULL, &now) && now.sa_handler == nothing);
		need(!pthread_sigmask(SIG_BLOCK, NULL, &mask) && sigismember(&mask, SIGUSR2));
		need(gettid() == tid && getcwd(cwd, sizeof(cwd)) && !strcmp(cwd, "/"));
		need(getuid() == (me == POOR ? 1000 : 0) && fcntl(report_fd, F_GETFD) >= 0);
		turn++;
		state->waited[me] = turn;
	}
}

static void *thread(void *arg)
{
	(void)arg;
	parent(THREAD);
}

/* Starts one program after the other, as shells and daemons do. */
static void __attribute__((noreturn)) spawn(void)
{
	char *argv[] = { "vfork", "exit", NULL }, *envp[] = { NULL };

	report_open("spawner");
	for (;;) {
		int status;
		pid_t pid;

		need(!posix_spawn(&pid, "/bin/vfork", NULL, NULL, argv, envp));
		need(waitpid(pid, &status, 0) == pid);
		need(WIFEXITED(status) && WEXITSTATUS(status) == 7);
		tick();
	}
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "exit"))
		return 7;
	if (argc > 1 && !strcmp(argv[1], "spawn"))
		spawn();
	report_open("vfork");
	avx = !!__builtin_cpu_supports("avx");
	for (size_t i = 0; i < sizeof(pattern); i++)
		((char *)pattern)[i] = 3 * i + 1;
	state = map_shared(sizeof(*state));
	for (int i = 0; i < PARENTS; i++) {
		pid_t pid = fork();
		pthread_t t;

		need(pid >= 0);
		state->child[i].name = names[i];
		if (pid)
			continue;
		if (i != THREAD)
			parent(i);
		need(!pthread_create(&t, NULL, thread, NULL));
		for (;; doze(2 * MS))
			state->others.done++;
	}
	state->others.name = "thread beside one that waits";
	for (;;) {
		int all = 1;

		watch(state->child, PARENTS);
		watch(&state->others, 1);
		for (int i = 0; i < PARENTS; i++)
			all = all && state->waited[i] == state->go;
		if (all && !access("/out/vfork.go", F_OK)) {
			unsigned long go = ++state->go, before[PARENTS];

			for (int i = 0; i < PARENTS; i++) {
				for (int still = 0; state->waited[i] != go; doze(MS))
					if (++still > 10 * STALLED)
						fail("%s does not come out of vfork", names[i]);
				before[i] = state->child[i].done;
			}
			for (int i = 0; i < PARENTS; i++)
				while (state->child[i].done == before[i])
					doze(MS);
			need(!unlink("/out/vfork.go"));
		}
		tick();
		doze(5 * MS);
	}
}
