/*
 * locks [PART...] - what threads and processes do with futexes and their like,
 * held across a checkpoint: mutexes that hand their owner's priority on and
 * that notice its death, threads that are joined, barriers that have been
 * registered for, a restartable sequence that a thread is in.
 */
#include "hold.h"

#include <linux/membarrier.h>
#include <linux/rseq.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/rseq.h>

#define GET_REGISTRATIONS (1 << 9) /* MEMBARRIER_CMD_GET_REGISTRATIONS */
#define HELD (120 * MS)	/* how long a lock is held, longer than a checkpoint's start */

static pthread_mutex_t *make_mutex(int protocol, int robust)
{
	pthread_mutex_t *m = map_shared(sizeof(*m));
	pthread_mutexattr_t a;

	pthread_mutexattr_init(&a);
	pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setprotocol(&a, protocol);
	pthread_mutexattr_setrobust(&a, robust);
	need(!pthread_mutex_init(m, &a));
	return m;
}

/* --- priority inheritance: always held, and always waited for --- */

static pthread_mutex_t *pi;
static struct worker pi_workers[3] = { { .name = "pi" }, { .name = "pi" }, { .name = "pi" } };
static volatile int pi_inside;

static void *take_pi(void *arg)
{
	struct worker *w = arg;

	for (;;) {
		need(!pthread_mutex_lock(pi));
		need(__sync_fetch_and_add(&pi_inside, 1) == 0);
		doze(HELD / 4);
		need(__sync_fetch_and_sub(&pi_inside, 1) == 1);
		need(!pthread_mutex_unlock(pi));
		w->done++;
		doze(MS);
	}
	return NULL;
}

static void make_pi(void)
{
	pthread_t t;

	pi = make_mutex(PTHREAD_PRIO_INHERIT, PTHREAD_MUTEX_STALLED);
	for (size_t i = 0; i < COUNT(pi_workers); i++)
		need(!pthread_create(&t, NULL, take_pi, &pi_workers[i]));
}

static void check_pi(void)
{
	watch(pi_workers, COUNT(pi_workers));
}

/* --- robust: a process dies with the lock, another notices --- */

static struct {
	pthread_mutex_t *mutex;
	struct worker *worker;
} robust[2];

static void die_with(pthread_mutex_t *m)
{
	int err = pthread_mutex_lock(m);

	if (err == EOWNERDEAD) /* its predecessor was slow */
		err = pthread_mutex_consistent(m);
	if (err)
		fail("lock: %s", strerror(err));
	doze(HELD);
	_exit(0);
}

static void *survive(void *arg)
{
	size_t i = (size_t)arg;
	pthread_mutex_t *m = robust[i].mutex;

	for (;;) {
		int status, err;
		pid_t pid = fork();

		need(pid >= 0);
		if (!pid)
			die_with(m);
		doze(HELD / 4); /* it has the lock by now */
		err = pthread_mutex_lock(m);
		if (err == EOWNERDEAD) {
			robust[i].worker->done++;
			need(!pthread_mutex_consistent(m));
		} else {
			need(err == 0); /* it was slow */
		}
		need(!pthread_mutex_unlock(m));
		need(waitpid(pid, &status, 0) == pid);
		need(WIFEXITED(status) && !WEXITSTATUS(status));
	}
	return NULL;
}

static void make_robust(void)
{
	static const int protocols[] = { PTHREAD_PRIO_NONE, PTHREAD_PRIO_INHERIT };
	pthread_t t;

	for (size_t i = 0; i < COUNT(robust); i++) {
		robust[i].mutex = make_mutex(protocols[i], PTHREAD_MUTEX_ROBUST);
		robust[i].worker = map_shared(sizeof(struct worker));
		robust[i].worker->name = "robust";
		need(!pthread_create(&t, NULL, survive, (void *)i));
	}
}

static void check_robust(void)
{
	for (size_t i = 0; i < COUNT(robust); i++)
		watch(robust[i].worker, 1);
}

/* --- a thread's end wakes who joins it, by its tid address --- */

static struct worker joins = { .name = "join" };

static void *end_later(void *arg)
{
	doze(HELD);
	return arg;
}

static void *join_all(void *arg)
{
	for (;;) {
		pthread_t t;
		void *got;

		need(!pthread_create(&t, NULL, end_later, &joins));
		need(!pthread_join(t, &got) && got == &joins);
		joins.done++;
	}
	return arg;
}

static void make_joins(void)
{
	pthread_t t;

	need(!pthread_create(&t, NULL, join_all, NULL));
}

static void check_joins(void) { watch(&joins, 1); }

/* --- membarrier: who has registered may, who has not may not --- */

static int barrier(int command)
{
	return syscall(SYS_membarrier, command, 0, 0);
}

static volatile int *unregistered;

static void check_unregistered(void)
{
	if (barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) != -1 || errno != EPERM ||
	    barrier(GET_REGISTRATIONS) > 0)
		*unregistered = -1;
}

static void make_membarrier(void)
{
	unregistered = map_shared(sizeof(int));
	if (!fork())
		for (;;) {
			check_unregistered();
			doze(20 * MS);
		}
	need(!barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED));
	need(!barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE));
	need(!barrier(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED));
}

static void check_membarrier(void)
{
	need(!barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED));
	need(!barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE));
	need(barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ) == -1 && errno == EPERM);
	need(barrier(GET_REGISTRATIONS) ==
	     (MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED |
	      MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE |
	      MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED));
	need(!*unregistered);
}

/* --- a restartable sequence: a thread that is in one all the time --- */

static volatile unsigned long begun, aborted, finished;
static volatile long leave;

/* Begins a sequence that ends when leave is set. Whoever has been stopped in
 * it must come out by its abort handler and begin anew. */
static void sequence(struct rseq *area)
{
	__asm__ volatile goto(
		".pushsection .data.rel, \"aw\"\n\t"
		".balign 32\n"
		"3:\t.long 0, 0\n\t"
		".quad 1f, 2f - 1f, 4f\n\t"
		".popsection\n\t"
		"leaq 3b(%%rip), %%rax\n\t"
		"movq %%rax, %c[cs](%[area])\n"
		"1:\tcmpq $0, leave(%%rip)\n\t"
		"je 1b\n\t"
		"incq finished(%%rip)\n"
		"2:\tjmp %l[out]\n\t"
		".long 0x53053053\n"
		"4:\tincq aborted(%%rip)\n\t"
		"jmp %l[out]\n"
		:
		: [area] "r"(area), [cs] "i"(offsetof(struct rseq, rseq_cs))
		: "rax", "memory", "cc"
		: out);
out:
	return;
}

static void *be_in_sequence(void *arg)
{
	struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);

	for (;;) {
		begun++;
		sequence(area);
	}
	return arg;
}

static void make_rseq(void)
{
	pthread_t t;

	need(__rseq_size);
	need(!pthread_create(&t, NULL, be_in_sequence, NULL));
}

/* Between a checkpoint and a restore the wall clock goes on and the monotonic
 * one does not: that tells that there was one. */
static void check_rseq(void)
{
	static unsigned long begun_before;
	static long long apart_before;
	long long first = mono_ns(), apart = clock_ns(CLOCK_REALTIME) - first;

	if (mono_ns() - first > 50 * MS)
		return; /* the two were not read together */
	if (apart_before && apart - apart_before > 100 * MS)
		if (begun == begun_before)
			fail("a sequence was not aborted; %lu were begun, %lu aborted", begun, aborted);
	apart_before = apart;
	begun_before = begun;
	need(finished == 0);
}

static const struct {
	const char *name;
	void (*make)(void), (*check)(void);
} parts[] = {
	{ "membarrier", make_membarrier, check_membarrier },
	{ "pi", make_pi, check_pi },
	{ "robust", make_robust, check_robust },
	{ "joins", make_joins, check_joins },
	{ "rseq", make_rseq, check_rseq },
};

int main(int argc, char **argv)
{
	report_open("locks");
	for (size_t i = 0; i < COUNT(parts); i++)
		if (wanted(argc, argv, parts[i].name))
			parts[i].make();
	for (;;) {
		for (size_t i = 0; i < COUNT(parts); i++)
			if (wanted(argc, argv, parts[i].name))
				parts[i].check();
		tick();
		doze(20 * MS);
	}
}
