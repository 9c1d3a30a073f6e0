/*
 * threads - eight threads, each with its own registers, TLS, floating-point
 * control words, signal mask, alternate stack, name, robust list and rseq
 * area; two more that wake each other by futex; and short-lived ones that die
 * holding a robust mutex and are joined through clear_child_tid.
 */
#include "hold.h"
#include "registers.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

#define THREADS 8
#define PINGERS 2

static struct worker workers[THREADS + PINGERS];
static __thread int tls_number = 42;
static __thread char tls_text[32] = "not set";

/* What a thread must find the same for ever. */
struct self {
	int index;
	pid_t tid;
	sigset_t mask;
	stack_t altstack;
	char name[16];
	void *robust;
	size_t robust_len;
	unsigned short x87_control;
	unsigned int mxcsr;
	void *tls_at;
};

static void set_self(struct self *s)
{
	static const unsigned short rounding[] = { 0, 0x400, 0x800, 0xc00 };

	s->tid = gettid();
	snprintf(s->name, sizeof(s->name), "hold-%d", s->index);
	prctl(PR_SET_NAME, s->name);
	sigemptyset(&s->mask);
	sigaddset(&s->mask, SIGRTMIN + s->index);
	sigaddset(&s->mask, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &s->mask, NULL);
	s->altstack.ss_size = 16384 + 4096 * s->index;
	s->altstack.ss_sp = malloc(s->altstack.ss_size);
	sigaltstack(&s->altstack, NULL);
	/* Rounding and precision; flush-to-zero for every other thread. */
	s->x87_control = 0x007f | rounding[s->index % 4] |
			 (s->index & 1 ? 0x200 : 0x300);
	s->mxcsr = 0x1f80 | (rounding[s->index % 4] << 3) |
		   (s->index & 1 ? 0x8000 : 0);
	tls_number = 1000 + s->index;
	snprintf(tls_text, sizeof(tls_text), "thread %d", s->index);
	s->tls_at = &tls_number;
	need(!syscall(SYS_get_robust_list, 0, &s->robust, &s->robust_len));
}

static void check_rseq(void)
{
	struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() +
					    __rseq_offset);
	unsigned cpu;

	if (!__rseq_size)
		fail("glibc did not register an rseq area");
	need((int)area->cpu_id >= 0);
	need(area->cpu_id_start == area->cpu_id);
	/* The kernel keeps the area up to date only while it is registered;
	 * a migration between the two reads is tried again. */
	for (int i = 0;; i++) {
		need(!syscall(SYS_getcpu, &cpu, NULL, NULL));
		if (*(volatile __u32 *)&area->cpu_id == cpu)
			break;
		need(i < 1000);
	}
	/* Registering the same area again is EBUSY only if it is there. */
	need(syscall(SYS_rseq, area, 32, 0, RSEQ_SIG) == -1 && errno == EBUSY);
}

static void check_self(const struct self *s)
{
	char name[16] = "";
	unsigned short x87;
	unsigned int mxcsr;
	stack_t stack;
	sigset_t mask;
	void *robust;
	size_t len;

	asm volatile("fnstcw %0\n stmxcsr %1" : "=m"(x87), "=m"(mxcsr));
	need(x87 == s->x87_control);
	need((mxcsr & ~0x3fu) == s->mxcsr); /* without the sticky flags */
	need(gettid() == s->tid);
	prctl(PR_GET_NAME, name);
	need(!strcmp(name, s->name));
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	need(!memcmp(&mask, &s->mask, 8));
	sigaltstack(NULL, &stack);
	need(stack.ss_sp == s->altstack.ss_sp);
	need(stack.ss_size == s->altstack.ss_size && stack.ss_flags == 0);
	need(&tls_number == s->tls_at && tls_number == 1000 + s->index);
	need(!strncmp(tls_text, "thread ", 7) && tls_text[7] == '0' + s->index);
	need(!syscall(SYS_get_robust_list, 0, &robust, &len));
	need(robust == s->robust && len == s->robust_len);
	check_rseq();
}

static void *hold_thread(void *arg)
{
	static struct held held[THREADS];
	struct self s = { .index = (int)(long)arg };
	struct held *h = &held[s.index];
	const char *changed;

	set_self(&s);
	held_init(h, s.index + 1);
	for (;;) {
		asm volatile("fldcw %0\n ldmxcsr %1"
			     : : "m"(s.x87_control), "m"(s.mxcsr));
		changed = held_check(h, 20000);
		if (changed)
			fail("thread %d: %s changed", s.index, changed);
		check_self(&s);
		workers[s.index].done++;
		if (s.index & 1)
			doze(5 * MS);
	}
	return NULL;
}

/* Two threads hand a turn to and fro, waiting by futex without a time-out. */
static volatile int turn;

static void *ping(void *arg)
{
	int me = (int)(long)arg;

	for (;;) {
		while (turn != me) {
			int other = !me;

			if (syscall(SYS_futex, &turn, FUTEX_WAIT, other, NULL,
				    NULL, 0) == -1)
				need(errno == EAGAIN);
		}
		workers[THREADS + me].done++;
		doze(2 * MS);
		turn = !me;
		need(syscall(SYS_futex, &turn, FUTEX_WAKE, 1, NULL, NULL, 0) >=
		     0);
	}
	return NULL;
}

static pthread_mutex_t robust_mutex;

static void *die_with_mutex(void *arg)
{
	need(!pthread_mutex_lock(&robust_mutex));
	doze(30 * MS);
	return arg;
}

/* A thread ends owning the mutex; whichever moment it was checkpointed at,
 * join must return and the next owner must be told. */
static void check_robust(void)
{
	pthread_t thread;
	void *result;

	need(!pthread_create(&thread, NULL, die_with_mutex, &robust_mutex));
	need(!pthread_join(thread, &result));
	need(result == &robust_mutex);
	need(pthread_mutex_lock(&robust_mutex) == EOWNERDEAD);
	need(!pthread_mutex_consistent(&robust_mutex));
	need(!pthread_mutex_unlock(&robust_mutex));
}

int main(void)
{
	static const char *const names[] = { "registers", "ping" };
	pthread_mutexattr_t attr;
	pthread_t thread;

	report_open("threads");
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust_mutex, &attr);
	for (long i = 0; i < THREADS + PINGERS; i++) {
		workers[i].name = names[i >= THREADS];
		if (i < THREADS)
			need(!pthread_create(&thread, NULL, hold_thread,
					     (void *)i));
		else
			need(!pthread_create(&thread, NULL, ping,
					     (void *)(i - THREADS)));
	}
	for (;;) {
		check_robust();
		watch(workers, COUNT(workers));
		tick();
	}
}
