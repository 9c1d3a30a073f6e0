/*
 * crowd PROCESSES THREADS - many processes and, in one more, many threads. Each
 * waits for the next round, checks its pid and answers; a round is good when
 * all have answered.
 */
#include "hold.h"
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>

static struct {
	volatile unsigned round;
	volatile unsigned answers;
} *shared;

static void futex(volatile unsigned *word, int op, unsigned value)
{
	syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void *member(void *unused)
{
	pid_t pid = getpid(), tid = gettid(), parent = getppid();

	for (unsigned seen = 0;;) {
		unsigned now = shared->round;

		if (now == seen) {
			futex(&shared->round, FUTEX_WAIT, seen);
			continue;
		}
		need(getpid() == pid && gettid() == tid && getppid() == parent);
		need(now == seen + 1);
		seen = now;
		__atomic_fetch_add(&shared->answers, 1, __ATOMIC_SEQ_CST);
	}
	return unused;
}

int main(int argc, char **argv)
{
	unsigned processes = atoi(argv[1]), threads = argc > 2 ? atoi(argv[2]) : 0;

	report_open("crowd");
	shared = map_shared(sizeof(*shared));
	for (unsigned i = 0; i < processes + !!threads; i++) {
		pid_t pid = fork();

		need(pid >= 0);
		if (pid)
			continue;
		if (i == processes) {
			pthread_attr_t attr;
			pthread_t t;

			need(!pthread_attr_init(&attr));
			need(!pthread_attr_setstacksize(&attr, 16384));
			for (unsigned n = 1; n < threads; n++)
				need(!pthread_create(&t, &attr, member, NULL));
		}
		member(NULL);
	}
	for (;;) {
		shared->answers = 0;
		__atomic_fetch_add(&shared->round, 1, __ATOMIC_SEQ_CST);
		futex(&shared->round, FUTEX_WAKE, INT_MAX);
		for (int i = 0; shared->answers < processes + threads; i++) {
			if (i == 10000)
				fail("only %u of %u answer", shared->answers, processes + threads);
			doze(MS);
		}
		tick();
		doze(300 * MS);
	}
}
