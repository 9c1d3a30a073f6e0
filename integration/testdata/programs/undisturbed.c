/*
 * undisturbed - the target of failed and repeated checkpoints. It spins with
 * everything in registers, sleeps in many system calls, and looks for any trace
 * somebody may have left in it: a signal, an EINTR, a changed register, mask,
 * alternate stack or mapping, a descriptor or child more, a tracer, a lost
 * timer. It starts no thread, maps nothing and opens nothing to stay after its
 * first round. A line of its report is "ROUND gap=MICROSECONDS", the longest
 * time since the last line in which the watching thread did not run.
 */
#include "hold.h"
#include "registers.h"

#include <dirent.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/timerfd.h>

#define SPINNERS 3
#define PERIOD (30 * MS)	/* of the timed sleepers */
#define FOREVER (100000 * SEC)

/* --- no signal but the alarm --- */

static volatile int unexpected;
static volatile unsigned long alarms;

static void on_alarm(int sig)
{
	(void)sig;
	alarms++;
}

static void on_other(int sig)
{
	unexpected = sig;
}

/* Signals that are ignored by default stay uncaught, as in most programs. */
static void catch_all(void)
{
	static const int left[] = { SIGKILL, SIGSTOP, SIGCHLD, SIGURG,
				    SIGWINCH, SIGCONT, 32, 33 };
	struct sigaction sa = { .sa_handler = on_other };

	for (int sig = 1; sig <= 64; sig++) {
		size_t i = 0;

		while (i < COUNT(left) && left[i] != sig)
			i++;
		if (i == COUNT(left))
			need(!sigaction(sig, &sa, NULL));
	}
	sa.sa_handler = on_alarm;
	need(!sigaction(SIGALRM, &sa, NULL));
}

/* --- what a thread is --- */

struct self {
	sigset_t mask;
	stack_t stack;
	char name[16];
	char altstack[16384];
};

static void set_self(struct self *s, const char *name)
{
	stack_t stack = { .ss_sp = s->altstack,
			  .ss_size = sizeof(s->altstack) };

	prctl(PR_SET_NAME, name);
	need(!sigaltstack(&stack, NULL) && !sigaltstack(NULL, &s->stack));
	pthread_sigmask(SIG_SETMASK, NULL, &s->mask);
	prctl(PR_GET_NAME, s->name);
}

static void check_self(const struct self *s)
{
	char name[16] = "";
	sigset_t mask;
	stack_t stack;

	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	need(!memcmp(&mask, &s->mask, 8));
	sigaltstack(NULL, &stack);
	need(stack.ss_sp == s->stack.ss_sp && stack.ss_flags == 0);
	prctl(PR_GET_NAME, name);
	need(!strcmp(name, s->name));
	if (unexpected)
		fail("signal %d was delivered", unexpected);
}

/* --- the sleepers; all that return do so on time and without EINTR --- */

static int quiet_pipe[2], quiet_epoll, quiet_event, tick_fd;

static void sleep_nanosleep(void)
{
	struct timespec ts = to_timespec(PERIOD);

	need(!nanosleep(&ts, NULL));
}

static void sleep_absolute(void)
{
	struct timespec ts = to_timespec(mono_ns() + PERIOD);

	need(!clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL));
}

static void sleep_poll(void)
{
	struct pollfd p = { quiet_pipe[0], POLLIN, 0 };

	need(poll(&p, 1, PERIOD / MS) == 0 && p.revents == 0);
}

static void sleep_epoll(void)
{
	struct epoll_event ev;

	need(epoll_wait(quiet_epoll, &ev, 1, PERIOD / MS) == 0);
}

static void sleep_futex(void)
{
	struct timespec ts = to_timespec(PERIOD);
	int word = 1;

	need(syscall(SYS_futex, &word, FUTEX_WAIT, 1, &ts, NULL, 0) == -1);
	need(errno == ETIMEDOUT);
}

static void sleep_sigwait(void)
{
	struct timespec ts = to_timespec(PERIOD);
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 7);
	need(sigtimedwait(&set, NULL, &ts) == -1 && errno == EAGAIN);
}

static void sleep_timerfd(void)
{
	uint64_t n = 0;

	need(read(tick_fd, &n, 8) == 8 && n > 0);
}

static void sleep_alarm(void)
{
	unsigned long before = alarms;

	need(pause() == -1 && errno == EINTR && alarms > before);
}

/* These never return. */
static void stay_nanosleep(void)
{
	struct timespec ts = to_timespec(FOREVER);

	fail("nanosleep returned %d", nanosleep(&ts, NULL));
}

static void stay_poll(void)
{
	struct pollfd p = { quiet_pipe[0], POLLIN, 0 };

	fail("poll returned %d", poll(&p, 1, -1));
}

static void stay_read(void)
{
	char c;

	fail("read returned %zd", read(quiet_pipe[0], &c, 1));
}

static void stay_futex(void)
{
	int word = 1;

	fail("futex returned %ld",
	     syscall(SYS_futex, &word, FUTEX_WAIT, 1, NULL, NULL, 0));
}

static const struct kind {
	const char *name;
	void (*sleep)(void);
	int stays;
} kinds[] = {
	{ "nanosleep", sleep_nanosleep, 0 },
	{ "absolute", sleep_absolute, 0 },
	{ "poll", sleep_poll, 0 },
	{ "epoll", sleep_epoll, 0 },
	{ "futex", sleep_futex, 0 },
	{ "sigwait", sleep_sigwait, 0 },
	{ "timerfd", sleep_timerfd, 0 },
	{ "alarm", sleep_alarm, 0 },
	{ "stay-nanosleep", stay_nanosleep, 1 },
	{ "stay-poll", stay_poll, 1 },
	{ "stay-read", stay_read, 1 },
	{ "stay-futex", stay_futex, 1 },
};

#define THREADS (COUNT(kinds) + SPINNERS)
static struct worker workers[THREADS];
static struct self selves[THREADS];
static pid_t tids[THREADS];

static void *run_sleeper(void *arg)
{
	size_t i = (size_t)arg;
	sigset_t alarm;

	if (kinds[i].sleep == sleep_alarm) {
		sigemptyset(&alarm);
		sigaddset(&alarm, SIGALRM);
		pthread_sigmask(SIG_UNBLOCK, &alarm, NULL);
	}
	set_self(&selves[i], kinds[i].name);
	tids[i] = gettid();
	for (;;) {
		kinds[i].sleep();
		check_self(&selves[i]);
		workers[i].done++;
	}
	return NULL;
}

static void *run_spinner(void *arg)
{
	static struct held held[SPINNERS];
	size_t i = (size_t)arg, n = i - COUNT(kinds);
	const char *changed;

	set_self(&selves[i], "spinner");
	held_init(&held[n], n + 1);
	tids[i] = gettid();
	for (;;) {
		changed = held_check(&held[n], 50000);
		if (changed)
			fail("%s changed", changed);
		check_self(&selves[i]);
		workers[i].done++;
		if (n)
			doze(MS);
	}
	return NULL;
}

/* --- what the process is --- */

static char scratch[1 << 16];

struct trace {
	char maps[1 << 16], fds[4096], children[4096], status[8192];
};

/*
 * With the argument "moved" the program expects to be restored: the kernel
 * numbers pipes and sockets anew, the standard streams are the restorer's, and
 * the descriptor table may have been larger for a while.
 */
static int moved;

static void forget_number(char *target)
{
	char *bracket = strstr(target, ":[");

	if (moved && bracket)
		strcpy(bracket, ":[]");
}

/*
 * One getdents64 call ends early, as any program must expect, when a signal or
 * a freeze comes while it fills in entries (filldir64 in fs/readdir.c).
 */
static void list_descriptors(char *to, size_t size)
{
	static char entries[8192];
	int dir = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	ssize_t n, at;
	size_t len = 0;

	need(dir >= 0);
	to[0] = 0;
	while ((n = getdents64(dir, entries, sizeof(entries))) > 0) {
		for (at = 0; at < n;) {
			struct dirent64 *d = (void *)(entries + at);
			char target[256] = "";

			at += d->d_reclen;
			if (d->d_name[0] == '.' || atoi(d->d_name) == dir)
				continue;
			need(readlinkat(dir, d->d_name, target,
					sizeof(target) - 1) > 0);
			if (moved && atoi(d->d_name) < 3)
				continue;
			forget_number(target);
			len += snprintf(to + len, size - len, "%s %s\n",
					d->d_name, target);
		}
	}
	need(n == 0);
	close(dir);
}

static void list_children(char *to, size_t size)
{
	size_t len = 0;
	char path[64];

	to[0] = 0;
	for (size_t i = 0; i < THREADS; i++) {
		snprintf(path, sizeof(path), "/proc/self/task/%d/children",
			 tids[i]);
		slurp(path, scratch, sizeof(scratch));
		len += snprintf(to + len, size - len, "%s", scratch);
	}
	slurp("/proc/thread-self/children", scratch, sizeof(scratch));
	snprintf(to + len, size - len, "%s", scratch);
}

static void list_status(char *to, size_t size)
{
	static const char *const keys[] = {
		"State:",  "TracerPid:", "FDSize:", "Threads:", "SigQ:",
		"SigPnd:", "ShdPnd:",	 "SigBlk:", "SigIgn:",	"SigCgt:",
		"VmLck:",  "Seccomp:",
	};
	char *line, *save;
	size_t len = 0;

	slurp("/proc/thread-self/status", scratch, sizeof(scratch));
	for (line = strtok_r(scratch, "\n", &save); line;
	     line = strtok_r(NULL, "\n", &save))
		for (size_t i = 0; i < COUNT(keys); i++)
			/* An alarm may be on its way at any moment. */
			if (!strncmp(line, keys[i], strlen(keys[i])) &&
			    strncmp(line, "ShdPnd", 6) &&
			    strncmp(line, "SigQ", 4) &&
			    (!moved || strncmp(line, "FDSize", 6)))
				len += snprintf(to + len, size - len, "%s\n",
						line);
}

static void look(struct trace *t)
{
	slurp("/proc/self/maps", t->maps, sizeof(t->maps));
	list_descriptors(t->fds, sizeof(t->fds));
	list_children(t->children, sizeof(t->children));
	list_status(t->status, sizeof(t->status));
}

static void compare(const char *what, const char *was, const char *is)
{
	if (!strcmp(was, is))
		return;
	while (*was && *was == *is)
		was++, is++;
	fail("%s changed: was ...%.100s, is ...%.100s", what, was, is);
}

/*
 * A thread whose tracer has died in the middle of its work takes a moment, in
 * which the others run already, to put itself back: on a busy machine it may
 * have to wait for a processor. What is there longer is left behind.
 */
static void check_traces(void)
{
	static struct trace first, now;
	long long until = mono_ns() + 500 * MS;

	look(round_no == 2 ? &first : &now);
	if (round_no <= 2) /* the first rounds still fault and map */
		return;
	while (strcmp(first.maps, now.maps) && mono_ns() < until) {
		doze(MS);
		look(&now);
	}
	compare("maps", first.maps, now.maps);
	compare("descriptors", first.fds, now.fds);
	compare("children", first.children, now.children);
	compare("status", first.status, now.status);
}

/* --- latency: how long the watching thread was kept from running --- */

static long long worst_gap(void)
{
	long long worst = 0, last = mono_ns(), now, until = last + 25 * MS;

	do {
		doze(500000);
		now = mono_ns();
		if (now - last > worst)
			worst = now - last;
		last = now;
	} while (now < until);
	return worst;
}

static void make_things(void)
{
	struct itimerspec every = { to_timespec(PERIOD), to_timespec(PERIOD) };
	struct epoll_event ev = { .events = EPOLLIN };

	need(!pipe2(quiet_pipe, O_CLOEXEC));
	quiet_event = eventfd(0, EFD_CLOEXEC);
	quiet_epoll = epoll_create1(EPOLL_CLOEXEC);
	need(!epoll_ctl(quiet_epoll, EPOLL_CTL_ADD, quiet_event, &ev));
	tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	need(!timerfd_settime(tick_fd, 0, &every, NULL));
}

int main(int argc, char **argv)
{
	struct itimerval every = { { 0, PERIOD / 1000 }, { 0, PERIOD / 1000 } };
	pthread_t thread;
	sigset_t blocked;

	moved = argc > 1 && !strcmp(argv[1], "moved");
	report_open("undisturbed");
	catch_all();
	make_things();
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGALRM);
	sigaddset(&blocked, SIGRTMIN + 7);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	for (size_t i = 0; i < THREADS; i++) {
		workers[i].name = i < COUNT(kinds) ? kinds[i].name : "spinner";
		need(!pthread_create(&thread, NULL,
				     i < COUNT(kinds) ? run_sleeper :
							run_spinner,
				     (void *)i));
	}
	need(!setitimer(ITIMER_REAL, &every, NULL));
	doze(100 * MS);
	for (;;) {
		long long gap = worst_gap();

		check_traces();
		for (size_t i = 0; i < THREADS; i++)
			if (i >= COUNT(kinds) || !kinds[i].stays)
				watch(&workers[i], 1);
		if (unexpected)
			fail("signal %d was delivered", unexpected);
		say("%lu gap=%lld", ++round_no, gap / 1000);
	}
}
