/*
 * jobs - has children in every state of job control and looks at them all the
 * time: what stands still stays so, and wait(2) reports what it has not
 * reported yet, and nothing else. While /out/jobs.connect is there, the children
 * are continued, seen to go on, and put back into their states. With the argument lax a stopped
 * task may show as running for a moment, as it does when its tracer has died.
 */
#include "hold.h"
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#define THREADS 3

static int lax;

static struct job {
	const char *name;
	void (*run)(struct job *);
	int signal;	/* that stops it, or 0 */
	int code;	/* what wait(2) has to tell: CLD_STOPPED, CLD_CONTINUED or 0 */
	pid_t pid;
	volatile unsigned long *count; /* one for each thread, shared */
	unsigned long seen[THREADS];
} *here;

static void *thread(void *count)
{
	for (;;) {
		++*(volatile unsigned long *)count;
		doze(10 * MS);
	}
	return NULL;
}

static void sleeps(struct job *j) { thread((void *)j->count); }

static void has_threads(struct job *j)
{
	pthread_t t;

	for (int i = 1; i < THREADS; i++)
		need(!pthread_create(&t, NULL, thread, (void *)&j->count[i]));
	thread((void *)j->count);
}

static void spins(struct job *j)
{
	for (;;)
		++*j->count;
}

/* A stop and a SIGCONT end epoll_wait(2) with EINTR (signal(7)): nothing else does. */
static void polls(struct job *j)
{
	struct epoll_event e;
	int ep = epoll_create1(0);

	for (;;) {
		need(epoll_wait(ep, &e, 1, 10) == 0 || errno == EINTR);
		++*j->count;
	}
}

/* Its own child is stopped, too; nobody waits for that one. */
static void has_child(struct job *j)
{
	pid_t child = fork();

	need(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		raise(SIGSTOP);
		_exit(0);
	}
	while (j->count[1] == 0) {
		siginfo_t si;

		if (!waitid(P_PID, child, &si, WSTOPPED | WNOWAIT))
			j->count[1] = 1;
	}
	for (;;) {
		siginfo_t si = { 0 };

		need(!waitid(P_PID, child, &si, WSTOPPED | WNOHANG | WNOWAIT));
		need(si.si_pid == child && si.si_status == SIGSTOP);
		++*j->count;
		doze(10 * MS);
	}
}

/* Stop signals wait for it to unblock them. */
static void blocks(struct job *j)
{
	const int stops[] = { SIGTSTP, SIGTTIN, SIGTTOU };
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < COUNT(stops); i++)
		sigaddset(&set, stops[i]);
	need(!sigprocmask(SIG_BLOCK, &set, NULL));
	for (size_t i = 0; i < COUNT(stops); i++)
		need(!(i == 2 ? raise(stops[i]) : kill(getpid(), stops[i])));
	for (;;) {
		need(!sigpending(&set));
		for (size_t i = 0; i < COUNT(stops); i++)
			need(sigismember(&set, stops[i]));
		++*j->count;
		doze(10 * MS);
	}
}

/* A signal with a handler waits for it to be continued. */
static volatile sig_atomic_t handled;

static void handler(int sig)
{
	(void)sig;
	handled++;
}

static void is_signalled(struct job *j)
{
	need(!sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = handler }, NULL));
	for (;;) {
		++*j->count;
		j->count[1] = handled;
		doze(10 * MS);
	}
}

static struct job jobs[] = {
	{ .name = "stopped", .run = sleeps, .signal = SIGSTOP },
	{ .name = "not reported", .run = sleeps, .signal = SIGSTOP, .code = CLD_STOPPED },
	{ .name = "by SIGTSTP", .run = sleeps, .signal = SIGTSTP, .code = CLD_STOPPED },
	{ .name = "by SIGTTIN", .run = sleeps, .signal = SIGTTIN },
	{ .name = "threads", .run = has_threads, .signal = SIGTTOU, .code = CLD_STOPPED },
	{ .name = "spins", .run = spins, .signal = SIGSTOP },
	{ .name = "polls", .run = polls, .signal = SIGSTOP },
	{ .name = "stopped child", .run = has_child, .signal = SIGSTOP, .code = CLD_STOPPED },
	{ .name = "running with a stopped child", .run = has_child },
	{ .name = "signalled", .run = is_signalled, .signal = SIGSTOP },
	{ .name = "continued", .run = sleeps, .code = CLD_CONTINUED },
	{ .name = "blocks", .run = blocks },
};

static char state(pid_t pid)
{
	char path[64], text[512];

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	slurp(path, text, sizeof(text));
	return strrchr(text, ')')[2];
}

/* stop brings a job into its state; what wait(2) says on the way is taken. */
static void stop(struct job *j)
{
	siginfo_t si;

	if (j->signal || j->code == CLD_CONTINUED) {
		int sig = j->signal ? j->signal : SIGSTOP;

		need(!kill(j->pid, sig));
		need(!waitid(P_PID, j->pid, &si, WSTOPPED | (j->code == CLD_STOPPED ? WNOWAIT : 0)));
		need(si.si_code == CLD_STOPPED && si.si_status == sig);
	}
	if (j->code == CLD_CONTINUED) {
		need(!kill(j->pid, SIGCONT));
		need(!waitid(P_PID, j->pid, &si, WCONTINUED | WNOWAIT));
	}
	if (j->run == is_signalled)
		need(!kill(j->pid, SIGUSR1));
	for (int i = 0; i < THREADS; i++)
		j->seen[i] = j->count[i];
}

/* check looks at a job without changing what wait(2) has to tell. */
static void check(struct job *j)
{
	siginfo_t si = { 0 };

	here = j;
	need(!waitid(P_PID, j->pid, &si, WSTOPPED | WCONTINUED | WEXITED | WNOHANG | WNOWAIT));
	if (si.si_pid && si.si_code != j->code)
		fail("%s: wait tells code %d status %d", j->name, si.si_code, si.si_status);
	if (j->code && !si.si_pid)
		fail("%s: wait tells nothing", j->name);
	if (j->code == CLD_STOPPED && si.si_status != j->signal)
		fail("%s: wait tells signal %d", j->name, si.si_status);
	for (int i = 0; lax && j->signal && state(j->pid) != 'T' && i < 50; i++)
		doze(MS);
	if (j->signal && state(j->pid) != 'T')
		fail("%s: its state is %c", j->name, state(j->pid));
	for (int i = 0; j->signal && i < THREADS; i++)
		if (j->count[i] != j->seen[i])
			fail("%s: thread %d has gone on", j->name, i);
}

/* go lets a job run, and wait(2) tell what it has to. */
static void go(struct job *j)
{
	unsigned long before[THREADS];
	siginfo_t si;

	for (int i = 0; i < THREADS; i++)
		before[i] = j->count[i];
	if (j->code)
		need(!waitid(P_PID, j->pid, &si, j->code == CLD_STOPPED ? WSTOPPED : WCONTINUED));
	if (j->signal) {
		need(!kill(j->pid, SIGCONT));
		need(!waitid(P_PID, j->pid, &si, WCONTINUED));
		need(si.si_code == CLD_CONTINUED);
	}
	for (int i = 0; i < (j->run == has_threads ? THREADS : 1); i++)
		while (j->count[i] < before[i] + 2)
			doze(MS);
	if (j->run == is_signalled)
		while (j->count[1] == before[1])
			doze(MS);
	stop(j);
}

int main(int argc, char **argv)
{
	report_open("jobs");
	lax = argc > 1 && !strcmp(argv[1], "lax");
	for (size_t i = 0; i < COUNT(jobs); i++) {
		struct job *j = &jobs[i];

		j->count = map_shared(THREADS * sizeof(*j->count));
		j->pid = fork();
		need(j->pid >= 0);
		if (!j->pid) {
			setpgid(0, 0);
			here = j;
			j->run(j);
		}
		while (!*j->count || (j->run == has_threads && !j->count[THREADS - 1]))
			doze(MS);
		stop(j);
	}
	for (;;) {
		for (size_t i = 0; i < COUNT(jobs); i++)
			check(&jobs[i]);
		if (!access("/out/jobs.connect", F_OK)) {
			for (size_t i = 0; i < COUNT(jobs); i++)
				go(&jobs[i]);
			need(!unlink("/out/jobs.connect"));
		}
		tick();
		doze(20 * MS);
	}
}
