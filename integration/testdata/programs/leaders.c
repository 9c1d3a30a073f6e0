/*
 * leaders - processes whose first thread has ended while others run on: the
 * process stands as a zombie, works, and ends with the status of the last thread.
 * While /out/leaders.connect is there, they end and are made anew.
 */
#include "hold.h"
#include <pthread.h>
#include <signal.h>

#define THREADS 3
#define STATUS 7

static struct shared {
	volatile unsigned long count[THREADS];
	volatile int end;
	volatile pid_t child;
} *shared;

static struct leader {
	const char *name;
	uid_t uid;
	int forks, opens;
	pid_t pid;
	struct shared *shared;
	unsigned long seen[THREADS];
} leaders[] = {
	{ .name = "plain" },
	{ .name = "of a user", .uid = 1000 },
	{ .name = "with a child of a thread", .forks = 1 },
	{ .name = "with a file", .opens = 1 },
};

static void *thread(void *at)
{
	struct leader *l = at;
	static volatile int next;
	int me = __atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST), fd = -1;
	pid_t pid = getpid(), tid = gettid(), child = 0;

	if (me == 1 && l->opens)
		need((fd = open("/out/leaders", O_RDONLY)) >= 0);
	if (me == 1 && l->forks) {
		child = fork();
		need(child >= 0);
		if (!child)
			for (;;)
				pause();
		l->shared->child = child;
	}
	while (!l->shared->end) {
		char c;

		need(getpid() == pid && gettid() == tid && getuid() == l->uid);
		need(fd < 0 || pread(fd, &c, 1, 0) == 1);
		l->shared->count[me]++;
		doze(10 * MS);
	}
	if (child) {
		need(!kill(child, SIGKILL));
		need(waitpid(child, NULL, 0) == child);
	}
	syscall(SYS_exit, STATUS);
	return NULL;
}

static void start(struct leader *l)
{
	pthread_t t;

	memset(l->shared, 0, sizeof(*l->shared));
	memset(l->seen, 0, sizeof(l->seen));
	l->pid = fork();
	need(l->pid >= 0);
	if (l->pid)
		return;
	need(!l->uid || !setuid(l->uid));
	for (int i = 0; i < THREADS; i++)
		need(!pthread_create(&t, NULL, thread, l));
	syscall(SYS_exit, 1);
}

static void check(struct leader *l)
{
	char path[64], text[4096];
	siginfo_t si = { 0 };
	char *uid;

	need(!waitid(P_PID, l->pid, &si, WEXITED | WNOHANG | WNOWAIT) && !si.si_pid);
	snprintf(path, sizeof(path), "/proc/%d/status", l->pid);
	for (int i = 0; i < 1000 && (slurp(path, text, sizeof(text)), !strstr(text, "State:\tZ")); i++)
		doze(MS);
	if (!strstr(text, "State:\tZ"))
		fail("%s: its main thread has not ended", l->name);
	if (!strstr(text, "Threads:\t4") || !(uid = strstr(text, "Uid:\t")) || (uid_t)atoi(uid + 5) != l->uid)
		fail("%s: %s", l->name, text);
	for (int i = 0; i < THREADS; i++) {
		for (int n = 0; n < 5000 && l->shared->count[i] == l->seen[i]; n++)
			doze(MS);
		if (l->shared->count[i] == l->seen[i])
			fail("%s: thread %d stands still", l->name, i);
		l->seen[i] = l->shared->count[i];
	}
	if (l->forks)
		need(!kill(l->shared->child, 0));
}

static void finish(struct leader *l)
{
	int status;

	l->shared->end = 1;
	need(waitpid(l->pid, &status, 0) == l->pid);
	if (status != STATUS << 8)
		fail("%s: it ended with %#x", l->name, status);
}

int main(void)
{
	report_open("leaders");
	tick();
	for (size_t i = 0; i < COUNT(leaders); i++) {
		leaders[i].shared = map_shared(sizeof(*shared));
		start(&leaders[i]);
	}
	for (;;) {
		for (size_t i = 0; i < COUNT(leaders); i++)
			check(&leaders[i]);
		if (!access("/out/leaders.connect", F_OK)) {
			for (size_t i = 0; i < COUNT(leaders); i++) {
				finish(&leaders[i]);
				start(&leaders[i]);
			}
			need(!unlink("/out/leaders.connect"));
		}
		tick();
		doze(20 * MS);
	}
}
