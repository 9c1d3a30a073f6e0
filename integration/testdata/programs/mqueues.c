/*
 * mqueues - POSIX message queues: full, empty and removed ones; messages of all
 * sizes and priorities; descriptors shared by fork, that do not block, and opened
 * as files; who waits in mq_send and mq_receive, with and without a time-out, and
 * by epoll; who is to be told by a signal, or by nothing at all.
 */
#include "apart.h"

#include <mqueue.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>

#define SIZE 8192
#define MANY 10

static struct worker *workers;
static mqd_t full, still, gone, told, quiet, calls, answers, locked;
static int as_file, ep, nested;
static struct stat had;

static mqd_t make(const char *name, int flags, mode_t mode, long count, long size)
{
	struct mq_attr a = { .mq_maxmsg = count, .mq_msgsize = size };
	mqd_t q = mq_open(name, O_RDWR | O_CREAT | O_EXCL | flags, mode, &a);

	need(q >= 0);
	return q;
}

static char text[SIZE], got[SIZE];

static size_t text_of(int i)
{
	static const size_t sizes[] = { SIZE, 0, 1, 4048, 4049, 5000 };
	size_t n = sizes[i % COUNT(sizes)];

	memset(text, 'a' + i, n);
	return n;
}

static unsigned prio_of(int i)
{
	static const unsigned prios[] = { 3, 32767, 0, 3 };

	return prios[i % COUNT(prios)];
}

static void put(mqd_t q, int i)
{
	need(!mq_send(q, text, text_of(i), prio_of(i)));
}

/* take takes a message and expects it to be the one of number i. */
static void take(mqd_t q, int i)
{
	unsigned prio;
	ssize_t n = mq_receive(q, got, SIZE, &prio);

	if (n != (ssize_t)text_of(i) || memcmp(got, text, n) || prio != prio_of(i))
		fail("message of %zd bytes, priority %u, letter %c is not number %d", n, prio, *got, i);
}

/* The order in which MANY messages are received. */
static const int order[MANY] = { 1, 5, 9, 0, 3, 4, 7, 8, 2, 6 };

static void same_queue(mqd_t q, long flags, long count, long size, long held)
{
	struct mq_attr a;

	need(!mq_getattr(q, &a));
	if (a.mq_flags != flags || a.mq_maxmsg != count || a.mq_msgsize != size || a.mq_curmsgs != held)
		fail("queue %d has flags %lo, %ld of %ld messages of %ld", q, a.mq_flags, a.mq_curmsgs, a.mq_maxmsg, a.mq_msgsize);
}

/* --- who waits --- */

/* Asks and is answered, both by queues that are too short for it. */
static void *asker(void *arg)
{
	struct worker *w = arg;
	char c;

	for (;;) {
		c = w->done;
		need(!mq_send(calls, &c, 1, 1));
		need(mq_receive(answers, &c, 1, NULL) == 1);
		need(c == (char)(w->done + 1));
		w->done++;
	}
	return NULL;
}

static void answerer(struct worker *w)
{
	struct timespec late = { .tv_sec = time(NULL) + 100000 };
	char c;

	for (;;) {
		need(mq_timedreceive(calls, &c, 1, NULL, &late) == 1);
		c++;
		need(!mq_timedsend(answers, &c, 1, 0, &late));
		w->done++;
		doze(2 * MS);
	}
}

static void *blocked_sender(void *arg)
{
	mq_send(full, "x", 1, 0);
	fail("a full queue took a message%s", arg ? "" : "!");
	return NULL;
}

static void *blocked_receiver(void *arg)
{
	struct worker *w = arg;
	struct timespec until;

	for (;; w->done++) {
		until = to_timespec(clock_ns(CLOCK_REALTIME) + 300 * MS);
		need(mq_timedreceive(still, got, SIZE, NULL, &until) == -1);
		need(errno == ETIMEDOUT);
		need(clock_ns(CLOCK_REALTIME) >= until.tv_sec * SEC + until.tv_nsec);
	}
	return NULL;
}

/* --- who is told --- */

static volatile sig_atomic_t tells;
static volatile int told_value;

static void on_told(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (info->si_code == SI_MESGQ && sig == SIGRTMIN + 2)
		told_value = info->si_value.sival_int;
	tells++;
}

static void be_told(void)
{
	struct sigevent e = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 2 };

	e.sigev_value.sival_int = round_no + 7;
	need(!mq_notify(told, &e));
}

/* A message tells once; nobody else can register before. */
static void check_told(long registered)
{
	struct sigevent none = { .sigev_notify = SIGEV_NONE };

	need(mq_notify(told, &none) == -1 && errno == EBUSY);
	need(mq_notify(quiet, &none) == -1 && errno == EBUSY);
	need(!tells);
	need(!mq_send(told, "!", 1, 0));
	need(tells == 1);
	if (told_value != registered + 7)
		fail("told by the value %d, not %ld", told_value, registered + 7);
	need(mq_receive(told, got, SIZE, NULL) == 1);
	tells = 0;
	if (round_no % 2 == 0) {
		need(!mq_send(quiet, "!", 1, 0) && !tells);
		need(mq_receive(quiet, got, SIZE, NULL) == 1);
		need(!mq_notify(quiet, &none));
	}
}

/* --- all of it --- */

static void make_queues(void)
{
	struct sigaction sa = { .sa_sigaction = on_told, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigevent none = { .sigev_notify = SIGEV_NONE };
	struct epoll_event e = { .events = EPOLLIN, .data.u64 = 77 };

	full = make("/full", 0, 0640, MANY, SIZE);
	for (int i = 0; i < MANY; i++)
		put(full, i);
	still = make("/still", 0, 0600, 1, SIZE);
	gone = make("/gone", O_NONBLOCK, 0600, MANY, 5000);
	put(gone, 2);
	need(!mq_unlink("/gone"));
	mq_close(make("/gone", 0, 0604, 3, 30)); /* another with its name */
	told = make("/told", 0, 0600, 2, SIZE);
	quiet = make("/quiet", 0, 0600, 2, SIZE);
	calls = make("/calls", 0, 0600, 1, 1);
	answers = make("/answers", 0, 0600, 1, 1);
	locked = make("/locked", 0, 0, 1, 1); /* nobody may open it again */
	need(!fcntl(locked, F_SETFD, 0));
	need(!sigaction(SIGRTMIN + 2, &sa, NULL));
	need(!mq_notify(quiet, &none));
	if (!nested) /* else it is mounted nowhere */
		need((as_file = open("/dev/mqueue/full", O_RDONLY | O_CLOEXEC)) >= 0);
	need(!fstat(full, &had));
	ep = epoll_create1(EPOLL_CLOEXEC);
	need(ep >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, still, &e));
}

static void check_full(void)
{
	struct stat now;
	char status[128];
	mqd_t other;

	same_queue(full, 0, MANY, SIZE, MANY);
	need(!fstat(full, &now));
	need(now.st_mode == had.st_mode && now.st_uid == had.st_uid && now.st_gid == had.st_gid);
	need(now.st_mtim.tv_sec == had.st_mtim.tv_sec && now.st_mtim.tv_nsec == had.st_mtim.tv_nsec);
	need(nested || pread(as_file, status, sizeof(status) - 1, 0) > 0);
	if (!nested && !strstr(status, "QSIZE:33531 "))
		fail("status: %s", status);
	other = mq_open("/full", O_RDONLY | O_NONBLOCK);
	need(other >= 0);
	same_queue(other, O_NONBLOCK, MANY, SIZE, MANY);
	need(!mq_close(other));
}

/* drain takes everything out and puts it back, while its sender waits. */
static void drain(pthread_t sender)
{
	need(!pthread_cancel(sender) && !pthread_join(sender, NULL));
	for (int i = 0; i < MANY; i++)
		take(full, order[i]);
	same_queue(full, 0, MANY, SIZE, 0);
	for (int i = 0; i < MANY; i++)
		put(full, i);
	need(!fstat(full, &had));
}

/* --- what the parent holds that has stayed --- */

static void hold_own(void)
{
	full = make("/full", 0, 0600, 2, 8);
	need(!mq_send(full, "own", 3, 5));
}

static void check_own(void)
{
	unsigned prio;

	same_queue(full, 0, 2, 8, 1);
	need(mq_receive(full, got, 8, &prio) == 3 && prio == 5 && !memcmp(got, "own", 3));
	need(!mq_send(full, "own", 3, 5));
}

int main(int argc, char **argv)
{
	pthread_t sender, other;
	long registered;
	struct epoll_event e;
	struct stat st;

	report_open("mqueues");
	workers = map_shared(sizeof(*workers) * 3);
	workers[0].name = "asker";
	workers[1].name = "answerer";
	workers[2].name = "receiver";
	if (argc > 1) {
		nested = 1;
		go_apart(wanted(argc, argv, "user"), hold_own, check_own);
	}
	make_queues();
	pid_t child = fork();
	need(child >= 0);
	if (!child)
		answerer(&workers[1]);
	need(!pthread_create(&sender, NULL, blocked_sender, NULL));
	need(!pthread_create(&other, NULL, asker, &workers[0]));
	need(!pthread_create(&other, NULL, blocked_receiver, &workers[2]));
	for (;;) {
		be_told();
		registered = round_no;
		tick();
		doze(5 * MS);
		watch(workers, 3);
		check_told(registered);
		check_full();
		if (nested)
			check_limits();
		if (round_no % 16 == 0) {
			drain(sender);
			need(!pthread_create(&sender, NULL, blocked_sender, NULL));
		}
		same_queue(gone, O_NONBLOCK, MANY, 5000, 1);
		need(!fstat(gone, &st) && st.st_nlink == 0);
		need(nested || (!stat("/dev/mqueue/gone", &st) && (st.st_mode & 07777) == 0604));
		same_queue(locked, 0, 1, 1, 0);
		need(!fstat(locked, &st) && (st.st_mode & 07777) == 0);
		need(!fcntl(locked, F_GETFD) && fcntl(told, F_GETFD) == FD_CLOEXEC);
		need(epoll_wait(ep, &e, 1, 0) == 0);
		/* The descriptor's flags are its own. */
		struct mq_attr on = { .mq_flags = O_NONBLOCK }, off = { 0 };
		need(!mq_setattr(told, &on, NULL));
		need(mq_receive(told, got, SIZE, NULL) == -1 && errno == EAGAIN);
		need(!mq_setattr(told, &off, NULL));
	}
}
