/*
 * sleepers [late] [KIND...] - threads that sleep in every system call that can
 * sleep, for a short and for a long time. Each asserts that it never sees an
 * EINTR it did not ask for, never wakes before its time by CLOCK_MONOTONIC, not
 * much later either where the kernel can tell how much of it is left ("late"
 * takes that back), and finds the call's arguments unchanged. Half of the kinds
 * run in a child, so that the first process of the container is not the only
 * one to sleep.
 */
#include "hold.h"

#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/un.h>

#define SHORT (300 * MS)
#define LONG (3 * SEC)
#define ROUND (50 * MS)
#define SLACK (SEC + 4 * ROUND)	/* besides what whole rounds came late */
#define WAKE SIGUSR1		/* what a waker sends; its handler says so */
#define WAITED (SIGRTMIN + 3)	/* blocked everywhere, for rt_sigtimedwait */

static __thread volatile int woken;

static void on_wake(int sig)
{
	(void)sig;
	woken++;
}

/* A waker is a thread that lets time pass and then ends its sleeper's call. */
struct waker {
	long long ns;
	pthread_t thread, sleeper;
	int fd;
	volatile int *word;
	volatile int finished;
};

static void *wake_by_signal(void *arg)
{
	struct waker *w = arg;

	doze(w->ns);
	/* Again and again: the first may come before the call has begun. */
	while (!w->finished) {
		pthread_kill(w->sleeper, WAKE);
		doze(50 * MS);
	}
	return NULL;
}

static void *wake_by_write(void *arg)
{
	struct waker *w = arg;

	doze(w->ns);
	need(write(w->fd, "12345678", 8) == 8);
	return NULL;
}

static void *wake_by_futex(void *arg)
{
	struct waker *w = arg;

	doze(w->ns);
	*w->word = 1;
	syscall(SYS_futex, w->word, FUTEX_WAKE, 1, NULL, NULL, 0);
	return NULL;
}

static void wake_later(struct waker *w, long long ns, void *(*how)(void *))
{
	w->ns = ns;
	w->sleeper = pthread_self();
	need(!pthread_create(&w->thread, NULL, how, w));
}

static void wake_done(struct waker *w)
{
	w->finished = 1;
	need(!pthread_join(w->thread, NULL));
}

/* --- the kinds: each sleeps once for ns --- */

static void do_nanosleep(long long ns)
{
	struct timespec ts = to_timespec(ns), rem = { -1, -1 };

	need(!nanosleep(&ts, &rem));
	need(ts.tv_sec * SEC + ts.tv_nsec == ns);
}

static void do_clock_relative(long long ns)
{
	struct timespec ts = to_timespec(ns);

	need(!clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL));
	need(ts.tv_sec * SEC + ts.tv_nsec == ns);
}

static void do_clock_absolute(long long ns)
{
	long long until = mono_ns() + ns;
	struct timespec ts = to_timespec(until);

	need(!clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL));
	need(ts.tv_sec * SEC + ts.tv_nsec == until && mono_ns() >= until);
}

/* Boot time has an offset of its own in a time namespace. */
static void do_clock_boottime(long long ns)
{
	long long until = clock_ns(CLOCK_BOOTTIME) + ns;
	struct timespec ts = to_timespec(until);

	need(!clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &ts, NULL));
	need(clock_ns(CLOCK_BOOTTIME) >= until);
}

static void make_pipe(int *ends)
{
	need(!pipe2(ends, O_CLOEXEC));
}

static void close_pipe(int *ends)
{
	close(ends[0]);
	close(ends[1]);
}

/* CLOCK_TAI has no offset in a time namespace; relative, it is like any. */
static void do_clock_tai(long long ns)
{
	struct timespec ts = to_timespec(ns), rem = { -1, -1 };

	need(!clock_nanosleep(CLOCK_TAI, 0, &ts, &rem));
}

/* By wall clock, which a checkpoint does not stop. */
static void do_clock_realtime(long long ns)
{
	long long until = clock_ns(CLOCK_REALTIME) + ns;
	struct timespec ts = to_timespec(until);

	need(!clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &ts, NULL));
	need(clock_ns(CLOCK_REALTIME) >= until);
}

static void do_poll(long long ns)
{
	int ends[2];
	struct pollfd p[2];

	make_pipe(ends);
	p[0] = p[1] = (struct pollfd){ ends[0], POLLIN | POLLPRI, 0 };
	need(poll(p, 2, ns / MS) == 0);
	need(p[0].fd == ends[0] && p[0].events == (POLLIN | POLLPRI));
	need(!p[0].revents && !p[1].revents);
	close_pipe(ends);
}

static void do_poll_forever(long long ns)
{
	struct waker w = { 0 };
	struct pollfd p;
	int ends[2];

	make_pipe(ends);
	p = (struct pollfd){ ends[0], POLLIN, 0 };
	w.fd = ends[1];
	wake_later(&w, ns, wake_by_write);
	need(poll(&p, 1, -1) == 1);
	need(p.revents == POLLIN);
	wake_done(&w);
	close_pipe(ends);
}

static void do_ppoll(long long ns)
{
	struct timespec ts = to_timespec(ns);
	sigset_t before, during, after;

	pthread_sigmask(SIG_SETMASK, NULL, &before);
	sigfillset(&during);
	need(ppoll(NULL, 0, &ts, &during) == 0);
	pthread_sigmask(SIG_SETMASK, NULL, &after);
	need(!memcmp(&before, &after, 8));
}

static void do_select(long long ns)
{
	struct timeval tv = { ns / SEC, ns % SEC / 1000 };
	fd_set set;
	int ends[2];

	make_pipe(ends);
	FD_ZERO(&set);
	FD_SET(ends[0], &set);
	need(select(ends[0] + 1, &set, NULL, NULL, &tv) == 0);
	need(!FD_ISSET(ends[0], &set));
	close_pipe(ends);
}

static void do_epoll(long long ns)
{
	struct epoll_event ev = { .events = EPOLLIN };
	int ep = epoll_create1(EPOLL_CLOEXEC), efd = eventfd(0, EFD_CLOEXEC);

	need(ep >= 0 && efd >= 0);
	need(!epoll_ctl(ep, EPOLL_CTL_ADD, efd, &ev));
	need(epoll_wait(ep, &ev, 1, ns / MS) == 0);
	close(ep);
	close(efd);
}

static void do_epoll_pwait2(long long ns)
{
	struct timespec ts = to_timespec(ns);
	struct epoll_event ev;
	int ep = epoll_create1(EPOLL_CLOEXEC);

	need(ep >= 0);
	need(syscall(SYS_epoll_pwait2, ep, &ev, 1, &ts, NULL, 0) == 0);
	need(ts.tv_sec * SEC + ts.tv_nsec == ns);
	close(ep);
}

/* The system call itself, which writes the rest into its argument. */
static void do_pselect(long long ns)
{
	struct timespec ts = to_timespec(ns);
	sigset_t during, before, after;
	struct { sigset_t *set; size_t size; } mask = { &during, 8 };

	pthread_sigmask(SIG_SETMASK, NULL, &before);
	sigfillset(&during);
	need(syscall(SYS_pselect6, 0, NULL, NULL, NULL, &ts, &mask) == 0);
	pthread_sigmask(SIG_SETMASK, NULL, &after);
	need(!memcmp(&before, &after, 8));
	need(ts.tv_sec == 0 && ts.tv_nsec == 0);
}

static void set_timeout(int fd, int which, long long ns)
{
	struct timeval tv = { ns / SEC, ns % SEC / 1000 };

	need(!setsockopt(fd, SOL_SOCKET, which, &tv, sizeof(tv)));
}

static void do_recv(long long ns)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in any = { .sin_family = AF_INET };
	char byte;

	need(fd >= 0 && !bind(fd, (struct sockaddr *)&any, sizeof(any)));
	set_timeout(fd, SO_RCVTIMEO, ns);
	need(recv(fd, &byte, 1, 0) == -1 && errno == EAGAIN);
	close(fd);
}

static void do_accept(long long ns)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in any = { .sin_family = AF_INET };

	need(fd >= 0 && !bind(fd, (struct sockaddr *)&any, sizeof(any)));
	need(!listen(fd, 1));
	set_timeout(fd, SO_RCVTIMEO, ns);
	need(accept(fd, NULL, NULL) == -1 && errno == EAGAIN);
	close(fd);
}

static void do_futex(long long ns)
{
	struct waker w = { 0 };
	volatile int word = 0;

	w.word = &word;
	wake_later(&w, ns, wake_by_futex);
	while (!word)
		if (syscall(SYS_futex, &word, FUTEX_WAIT, 0, NULL, NULL, 0))
			need(errno == EAGAIN);
	wake_done(&w);
}

static void do_futex_timed(long long ns)
{
	struct timespec ts = to_timespec(ns);
	int word = 5;

	need(syscall(SYS_futex, &word, FUTEX_WAIT, 5, &ts, NULL, 0) == -1);
	need(errno == ETIMEDOUT);
	need(ts.tv_sec * SEC + ts.tv_nsec == ns && word == 5);
}

static void do_futex_absolute(long long ns)
{
	struct timespec ts = to_timespec(mono_ns() + ns);
	int word = 5;

	need(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 5, &ts, NULL,
		     FUTEX_BITSET_MATCH_ANY) == -1);
	need(errno == ETIMEDOUT);
}

static void do_futex_realtime(long long ns)
{
	struct timespec ts = to_timespec(clock_ns(CLOCK_REALTIME) + ns);
	int word = 5;

	need(syscall(SYS_futex, &word, FUTEX_WAIT_BITSET | FUTEX_CLOCK_REALTIME,
		     5, &ts, NULL, FUTEX_BITSET_MATCH_ANY) == -1);
	need(errno == ETIMEDOUT);
}

static void do_futex_waitv(long long ns)
{
	struct timespec ts = to_timespec(mono_ns() + ns);
	uint32_t word = 5;
	/* struct futex_waitv: u64 val, uaddr; u32 flags (FUTEX2_SIZE_U32) */
	struct { uint64_t val, uaddr; uint32_t flags, reserved; } w = {
		5, (uintptr_t)&word, 2, 0
	};

	need(syscall(SYS_futex_waitv, &w, 1, 0, &ts, CLOCK_MONOTONIC) == -1);
	need(errno == ETIMEDOUT);
}

/* A condition variable with an absolute time by either clock. */
static void wait_condition(clockid_t clock, long long ns)
{
	struct timespec ts = to_timespec(clock_ns(clock) + ns);
	pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t c = PTHREAD_COND_INITIALIZER;
	int err = 0;

	pthread_mutex_lock(&m);
	while (!err) /* a condition may wake for nothing */
		err = pthread_cond_clockwait(&c, &m, clock, &ts);
	need(err == ETIMEDOUT);
	pthread_mutex_unlock(&m);
}

static void do_cond_monotonic(long long ns)
{
	wait_condition(CLOCK_MONOTONIC, ns);
}

static void do_cond_realtime(long long ns)
{
	wait_condition(CLOCK_REALTIME, ns);
}

static void do_sigtimedwait(long long ns)
{
	struct timespec ts = to_timespec(ns);
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, WAITED);
	need(syscall(SYS_rt_sigtimedwait, &set, &info, &ts, 8) == -1);
	need(errno == EAGAIN);
}

static void do_semtimedop(long long ns)
{
	static __thread int set = -1;
	struct timespec ts = to_timespec(ns);
	struct sembuf down = { 0, -1, 0 };

	if (set < 0)
		set = semget(IPC_PRIVATE, 1, 0600);
	need(set >= 0);
	need(semtimedop(set, &down, 1, &ts) == -1 && errno == EAGAIN);
}

static void do_read(long long ns)
{
	struct waker w = { 0 };
	char got[8];
	int ends[2];

	make_pipe(ends);
	w.fd = ends[1];
	wake_later(&w, ns, wake_by_write);
	need(read(ends[0], got, 8) == 8 && !memcmp(got, "12345678", 8));
	wake_done(&w);
	close_pipe(ends);
}

static void do_wait4(long long ns)
{
	int status = 0;
	pid_t pid = fork();

	need(pid >= 0);
	if (!pid) {
		doze(ns);
		_exit(37);
	}
	need(wait4(pid, &status, 0, NULL) == pid);
	need(WIFEXITED(status) && WEXITSTATUS(status) == 37);
}

static void do_pause(long long ns)
{
	struct waker w = { 0 };
	int before = woken;

	wake_later(&w, ns, wake_by_signal);
	need(pause() == -1 && errno == EINTR);
	need(woken > before);
	wake_done(&w);
}

/* The mask of sigsuspend is in force only during the call. */
static void do_sigsuspend(long long ns)
{
	sigset_t own, before, during, after;
	struct waker w = { 0 };
	int woken_before;

	sigemptyset(&own);
	sigaddset(&own, WAKE);
	pthread_sigmask(SIG_BLOCK, &own, &before);
	pthread_sigmask(SIG_SETMASK, NULL, &own);
	during = own;
	sigdelset(&during, WAKE);
	woken_before = woken;
	wake_later(&w, ns, wake_by_signal);
	need(sigsuspend(&during) == -1 && errno == EINTR);
	need(woken == woken_before + 1);
	pthread_sigmask(SIG_SETMASK, NULL, &after);
	need(!memcmp(&own, &after, 8));
	wake_done(&w);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

enum {
	EXACT = 1,	/* the time left is kept */
	WALL = 2,	/* by wall clock: may seem early after a restore */
};

static const struct kind {
	const char *name;
	void (*sleep)(long long ns);
	int flags;
	long long ns; /* instead of LONG */
} kinds[] = {
	{ "nanosleep", do_nanosleep, EXACT, 0 },
	{ "clock-relative", do_clock_relative, EXACT, 0 },
	{ "clock-absolute", do_clock_absolute, EXACT, 0 },
	{ "clock-boottime", do_clock_boottime, EXACT, 0 },
	{ "clock-tai", do_clock_tai, EXACT, 0 },
	{ "clock-realtime", do_clock_realtime, EXACT | WALL, 0 },
	{ "poll", do_poll, EXACT, 0 },
	{ "poll-forever", do_poll_forever, 0, 0 },
	{ "ppoll", do_ppoll, EXACT, 0 },
	{ "select", do_select, EXACT, 0 },
	{ "pselect", do_pselect, EXACT, 0 },
	{ "epoll", do_epoll, 0, 0 },
	{ "epoll-pwait2", do_epoll_pwait2, 0, 0 },
	{ "recv", do_recv, 0, 0 },
	{ "accept", do_accept, 0, 0 },
	{ "futex", do_futex, 0, 0 },
	{ "futex-timed", do_futex_timed, EXACT, 0 },
	{ "futex-absolute", do_futex_absolute, EXACT, 0 },
	{ "futex-realtime", do_futex_realtime, EXACT | WALL, 0 },
	{ "futex-waitv", do_futex_waitv, EXACT, 0 },
	{ "cond-monotonic", do_cond_monotonic, EXACT, 0 },
	{ "cond-realtime", do_cond_realtime, EXACT | WALL, 0 },
	{ "sigtimedwait", do_sigtimedwait, 0, 0 },
	{ "semtimedop", do_semtimedop, 0, 0 },
	{ "read", do_read, 0, 0 },
	/* Its child is looked for in the process tree, before and after. */
	{ "wait4", do_wait4, 0, 20 * SEC },
	{ "pause", do_pause, 0, 0 },
	{ "sigsuspend", do_sigsuspend, 0, 0 },
};

static int late_allowed;

/* How long the main program has stood still, all in all: stopped, or waiting
 * for a processor. Everybody else may be late by as much. */
static volatile long long *still;

static void note_stillness(void)
{
	static long long last;
	long long now = mono_ns();

	if (last && now - last > 3 * ROUND)
		*still += now - last - ROUND;
	last = now;
}

struct job {
	const struct kind *kind;
	struct worker *worker;
	long long ns;
};

/* Timers may be late but not early; a clock read just before the call makes
 * the time seem longer, never shorter. */
static void *run_job(void *arg)
{
	struct job *job = arg;

	for (;;) {
		long long still_before = *still, start = mono_ns(), took;

		errno = 0;
		job->kind->sleep(job->ns);
		took = mono_ns() - start;
		/* poll and select count milli- and microseconds. */
		if (took < job->ns - 1000 && !(job->kind->flags & WALL))
			fail("%s of %lld ns woke after %lld", job->kind->name,
			     job->ns, took);
		if (took > job->ns + SLACK + *still - still_before &&
		    job->kind->flags & EXACT && !late_allowed)
			fail("%s of %lld ns woke only after %lld, with %lld of standing still",
			     job->kind->name, job->ns, took,
			     *still - still_before);
		job->worker->done++;
	}
	return NULL;
}

static struct worker *workers;
static size_t worker_count;

/* Starts the wanted kinds of one half, a thread for each kind and time. */
static void start(int argc, char **argv, size_t half)
{
	static struct job jobs[2 * COUNT(kinds)];
	pthread_t thread;

	for (size_t i = 0; i < 2 * COUNT(kinds); i++) {
		const struct kind *k = &kinds[i / 2];

		if (i / 2 % 2 != half || !wanted(argc, argv, k->name))
			continue;
		jobs[i] = (struct job){ k, &workers[i], i & 1 ? k->ns ?: LONG : SHORT };
		need(!pthread_create(&thread, NULL, run_job, &jobs[i]));
	}
}

int main(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = on_wake };
	sigset_t blocked;

	report_open("sleepers");
	if (argc > 1 && !strcmp(argv[1], "late")) {
		late_allowed = 1;
		argc--, argv++;
	}
	sigaction(WAKE, &sa, NULL);
	sigemptyset(&blocked);
	sigaddset(&blocked, WAITED);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	still = map_shared(sizeof(*still));
	worker_count = 2 * COUNT(kinds);
	workers = map_shared(worker_count * sizeof(*workers));
	for (size_t i = 0; i < worker_count; i++)
		workers[i].name = kinds[i / 2].name;
	if (!fork()) {
		start(argc, argv, 1);
		for (;;)
			pause();
	}
	start(argc, argv, 0);
	for (;;) {
		for (size_t i = 0; i < worker_count; i++)
			if (wanted(argc, argv, workers[i].name))
				watch(&workers[i], 1);
		tick();
		note_stillness();
		doze(ROUND);
	}
}
