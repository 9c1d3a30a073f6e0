/*
 * forest SCRIPT - grows a tree of processes and holds it. The script is read
 * by the first process; each character is a step:
 *
 *	(...)	fork a child that runs the steps up to the matching bracket
 *	s	setsid			g	setpgid(0, 0)
 *	p	setpgid(0, the parent's group)
 *	r	become a child subreaper
 *	x	exit; the parent reaps it, its children go to the nearest subreaper
 *		above, or else to the first process
 *	z	exit and stay a zombie
 *
 * A parent goes on only after its child's whole script has run, so the same
 * script grows the same forest with the same pids. Then everybody holds: each
 * checks that its pid, group and session stay and counts in shared memory.
 */
#include "hold.h"
#include <sys/prctl.h>

#define TREES_MAX WORKERS_MAX

struct grown {
	volatile int count;	/* processes that hold */
	struct worker worker[TREES_MAX];
};

static struct grown *grown;
static pid_t first;

/* Returns the bracket that closes the one before at. */
static const char *matching(const char *at)
{
	for (int depth = 1; depth; at++) {
		if (!*at)
			fail("unbalanced script");
		depth += *at == '(' ? 1 : *at == ')' ? -1 : 0;
	}
	return at - 1;
}

static void hold_for_ever(void)
{
	int me = __atomic_fetch_add(&grown->count, 1, __ATOMIC_SEQ_CST);
	pid_t pid = getpid(), group = getpgid(0), session = getsid(0);
	int cell = pid;

	need(me < TREES_MAX);
	grown->worker[me].name = "tree";
	for (;;) {
		need(getpid() == pid && gettid() == pid && cell == pid);
		need(getpgid(0) == group && getsid(0) == session);
		if (pid != first)
			grown->worker[me].done++;
		else
			return;
		doze(20 * MS);
	}
}

static void run(const char *at, int ready);

/* The child's end of the pipe closes when its script has run, or it exits. */
static void fork_child(const char *steps)
{
	int ends[2];
	char how = 0;
	pid_t pid;

	need(!pipe(ends));
	pid = fork();
	need(pid >= 0);
	if (!pid) {
		close(ends[0]);
		run(steps, ends[1]);
	}
	close(ends[1]);
	while (read(ends[0], &how, 1) == -1 && errno == EINTR)
		;
	close(ends[0]);
	if (how == 'x')
		need(waitpid(pid, NULL, 0) == pid);
}

static void finish(int ready, char how)
{
	if (ready >= 0) {
		need(write(ready, &how, 1) == 1);
		close(ready);
	}
	if (how != 'h')
		_exit(0);
}

/* Runs the steps up to the closing bracket; in a child it does not return. */
static void run(const char *at, int ready)
{
	for (; *at && *at != ')'; at++) {
		switch (*at) {
		case '(': {
			const char *end = matching(at + 1);

			fork_child(at + 1);
			at = end;
			break;
		}
		case 's':
			need(setsid() == getpid());
			break;
		case 'g':
			need(!setpgid(0, 0));
			break;
		case 'p':
			need(!setpgid(0, getpgid(getppid())));
			break;
		case 'r':
			need(!prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
			break;
		case 'x':
		case 'z':
			finish(ready, *at);
			break;
		default:
			fail("unknown step '%c'", *at);
		}
	}
	finish(ready, 'h');
	hold_for_ever();
}

int main(int argc, char **argv)
{
	report_open("forest");
	first = getpid();
	grown = map_shared(sizeof(*grown));
	run(argc > 1 ? argv[1] : "", -1);
	for (;;) {
		for (int i = 0; i < grown->count; i++)
			if (grown->worker[i].done)
				watch(&grown->worker[i], 1);
		tick();
		doze(20 * MS);
	}
}
