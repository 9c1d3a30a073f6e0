/*
 * shared [threads | ROW...] - processes that share tables with each other in every way
 * that clone(2) allows, and threads that have left those of their process.
 *
 * In each round the first process changes what the tables say: a variable, the
 * action of a signal, a descriptor, the working directory. Everybody reports
 * what it sees, which must be the new state for those who share the table and
 * the old for all others. And kcmp(2) must find the same tables shared between
 * all pairs as at the start.
 *
 * A ROW is FORKER:FLAGS:DROP:GONE, a further process in terms of struct row.
 */
#include "hold.h"
#include <linux/kcmp.h>
#include <sched.h>
#include <signal.h>

#define THREAD_FLAGS (CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_FILES | CLONE_FS | CLONE_SYSVSEM)
#define STACK (32 << 10)
#define PROBE 200	/* the descriptor that comes and goes */

struct row {
	const char *name;
	int forker;
	int flags;	/* of clone */
	int drop;	/* unshared when its own children are born */
	int gone;	/* then it exits */
};

static const struct row processes[] = {
	{ "main", -1, 0, 0, 0 },
	{ "memory", 0, CLONE_VM, 0, 0 },
	{ "memory and actions", 0, CLONE_VM | CLONE_SIGHAND, 0, 0 },
	{ "descriptors", 0, CLONE_FILES, 0, 0 },
	{ "place", 0, CLONE_FS, 0, 0 },
	{ "descriptors and place", 0, CLONE_FILES | CLONE_FS, 0, 0 },
	{ "everything", 0, CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS | CLONE_SYSVSEM, 0, 0 },
	{ "nothing", 0, 0, 0, 0 },
	{ "grandchild", 6, CLONE_VM | CLONE_FILES, 0, 0 },
	{ "sibling", 6, CLONE_VM | CLONE_PARENT, 0, 0 },
	{ "parent of orphans", 0, CLONE_VM | CLONE_FILES | CLONE_FS, 0, 1 },
	{ "orphan", 10, CLONE_VM | CLONE_FS, 0, 0 },
	{ "orphan's sibling", 10, CLONE_FILES, 0, 0 },
	{ "launcher", 0, 0, 0, 1 },
	{ "twin", 13, CLONE_VM | CLONE_SIGHAND | CLONE_FS, 0, 0 },
	{ "other twin", 13, CLONE_VM | CLONE_SIGHAND | CLONE_FILES, 0, 0 },
	{ "leaver", 0, CLONE_FS | CLONE_FILES, CLONE_FS, 0 },
	{ "carried", 16, CLONE_FS, 0, 0 },
	{ "undo list", 0, CLONE_SYSVSEM, 0, 0 },
};

static const struct row threads[] = {
	{ "main", -1, 0, 0, 0 },
	{ "own descriptors", 0, THREAD_FLAGS, CLONE_FILES, 0 },
	{ "own place", 0, THREAD_FLAGS, CLONE_FS, 0 },
	{ "own everything", 0, THREAD_FLAGS, CLONE_FILES | CLONE_FS | CLONE_SYSVSEM, 0 },
	{ "shares all", 0, THREAD_FLAGS, 0, 0 },
	{ "copy of descriptors", 0, THREAD_FLAGS & ~CLONE_FILES, 0, 0 },
	{ "first of a pair", 0, THREAD_FLAGS & ~(CLONE_FILES | CLONE_FS), 0, 0 },
	{ "second of a pair", 6, THREAD_FLAGS, 0, 0 },
	{ "third, with a place of its own", 6, THREAD_FLAGS & ~CLONE_FS, 0, 0 },
	{ "another process", 0, 0, 0, 0 },
	{ "its thread", 9, THREAD_FLAGS, CLONE_FILES | CLONE_FS, 0 },
};

#define MOST 24

static struct row given[MOST] = { { "main", -1, 0, 0, 0 } };
static const struct row *rows;
static int count;

enum { VM, SIGHAND, FILES, FS, KINDS };

struct seen { unsigned long kind[KINDS]; };

struct state {
	volatile pid_t tid[MOST];
	volatile int ready[MOST];
	volatile unsigned long phase, ack[MOST];
	volatile struct seen seen[MOST];
};

static struct state *state;
static volatile unsigned long cell;
static char stacks[MOST][STACK] __attribute__((aligned(16)));

static void even(int sig) { (void)sig; }
static void odd(int sig) { (void)sig; }

static void nap(void)
{
	struct timespec ts = to_timespec(MS / 5);

	syscall(SYS_nanosleep, &ts, NULL);
}

/* What one process or thread sees of the four tables. */
static void observe(volatile struct seen *s)
{
	struct sigaction sa;
	char cwd[64];

	s->kind[VM] = cell;
	need(!sigaction(SIGUSR1, NULL, &sa));
	s->kind[SIGHAND] = sa.sa_handler == odd;
	s->kind[FILES] = fcntl(PROBE, F_GETFD) >= 0;
	need(syscall(SYS_getcwd, cwd, sizeof(cwd)) > 0);
	s->kind[FS] = !strcmp(cwd, "/bin");
}

static int worker(void *arg);

static void bear(int me)
{
	for (int i = 0; i < count; i++) {
		const struct row *r = &rows[i];
		int thread = r->flags & CLONE_THREAD;
		int pid;

		if (r->forker != me)
			continue;
		pid = clone(worker, stacks[i] + STACK, r->flags | (thread ? 0 : SIGCHLD), (void *)(long)i);
		need(pid > 0);
		while (!state->ready[i])
			nap();
		if (r->gone)
			need(waitpid(pid, NULL, 0) == pid);
	}
}

static int worker(void *arg)
{
	int me = (long)arg;
	unsigned long phase = 0;

	state->tid[me] = syscall(SYS_gettid);
	bear(me);
	need(!rows[me].drop || !unshare(rows[me].drop));
	state->ready[me] = 1;
	if (rows[me].gone)
		syscall(SYS_exit, 0);
	for (;;) {
		while (state->phase == phase)
			nap();
		phase = state->phase;
		observe(&state->seen[me]);
		state->ack[me] = phase;
	}
}

static const int kinds[] = { KCMP_VM, KCMP_SIGHAND, KCMP_FILES, KCMP_FS, KCMP_SYSVSEM };

static int same(int i, int j, int kind)
{
	long r = syscall(SYS_kcmp, state->tid[i], state->tid[j], kind, 0, 0);

	need(r >= 0);
	return r == 0;
}

/* Compares all pairs with how it was at the start. */
static void compare(int first)
{
	static char was[MOST][MOST][COUNT(kinds)];

	for (int i = 0; i < count; i++)
		for (int j = 0; j < i; j++)
			for (size_t k = 0; k < COUNT(kinds) && !rows[i].gone && !rows[j].gone; k++) {
				int now = same(i, j, kinds[k]);

				if (first)
					was[i][j][k] = now;
				else if (was[i][j][k] != now)
					fail("%s and %s: kcmp of kind %d was %d and is %d", rows[i].name,
					     rows[j].name, kinds[k], was[i][j][k], now);
			}
}

/* Gives the tables another state and has everybody look at them. */
static void turn(int first)
{
	unsigned long phase = state->phase + 1;
	struct sigaction sa = { .sa_handler = phase % 2 ? odd : even };
	static struct seen old[MOST];
	int still = 0;

	cell = phase;
	need(!sigaction(SIGUSR1, &sa, NULL));
	need(!chdir(phase % 2 ? "/bin" : "/out"));
	if (phase % 2)
		need(dup3(report_fd, PROBE, O_CLOEXEC) == PROBE);
	else
		need(!close(PROBE));
	observe(&state->seen[0]);
	state->phase = phase;
	for (int i = 1; i < count; i++) {
		for (; !rows[i].gone && state->ack[i] != phase; nap())
			if (++still > 100 * STALLED)
				fail("%s does not go on", rows[i].name);
		for (int k = 0; k < KINDS && !rows[i].gone; k++) {
			unsigned long now = state->seen[i].kind[k];

			if (same(0, i, kinds[k]))
				old[i].kind[k] = state->seen[0].kind[k];
			else if (first)
				old[i].kind[k] = now;
			if (now != old[i].kind[k])
				fail("%s sees %lu in table %d, not %lu", rows[i].name, now, k, old[i].kind[k]);
		}
	}
}

int main(int argc, char **argv)
{
	rows = processes, count = COUNT(processes);
	if (argc > 1 && !strcmp(argv[1], "threads"))
		rows = threads, count = COUNT(threads);
	else if (argc > 1) {
		rows = given;
		for (count = 1; count < argc && count < MOST; count++) {
			struct row *r = &given[count];

			r->name = argv[count];
			need(sscanf(argv[count], "%d:%i:%i:%d", &r->forker, &r->flags, &r->drop, &r->gone) == 4);
		}
	}
	report_open(rows == threads ? "shared-threads" : "shared");
	state = map_shared(sizeof(*state));
	state->tid[0] = getpid();
	cell = 7;
	bear(0);
	compare(1);
	for (int first = 1;; first = 0) {
		turn(first);
		compare(0);
		tick();
		doze(5 * MS);
	}
}
