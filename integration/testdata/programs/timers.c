/*
 * timers [late] - timers of every clock and kind. Each round asserts that they
 * have their interval and no more than that left, that none has gone off more
 * often than time has passed by its clock, and that each goes on. Besides:
 * signals of expired timers that wait behind a mask are there once and say how
 * often the timer has expired, and timers set to a wall-clock time go off then
 * (unless "late" is given).
 */
#include "hold.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#define ROUND (20 * MS)
#define HELD SIGRTMIN		/* blocked: of timers that wait */
#define COUNTED (SIGRTMIN + 1)	/* handled: of timers that go off */

/* --- periodic timers of every clock --- */

#define EVERY (40 * MS)

enum { OWN, OTHER_THREAD, BY_OTHER_THREAD, OTHER_PROCESS, TO_OTHER_THREAD };

static struct periodic {
	const char *name;
	clockid_t clock;
	int whose;
	int cpu;	/* cpu clocks begin anew at a restore */
	timer_t id;
	volatile unsigned long fired;
	long long since;
	struct worker worker;
} periodic[] = {
	{ .name = "MONOTONIC", .clock = CLOCK_MONOTONIC },
	{ .name = "REALTIME", .clock = CLOCK_REALTIME },
	{ .name = "BOOTTIME", .clock = CLOCK_BOOTTIME },
	{ .name = "TAI", .clock = CLOCK_TAI },
	{ .name = "to a thread", .clock = CLOCK_MONOTONIC, .whose = TO_OTHER_THREAD },
	{ .name = "PROCESS_CPUTIME", .clock = CLOCK_PROCESS_CPUTIME_ID, .cpu = 1 },
	{ .name = "THREAD_CPUTIME", .clock = CLOCK_THREAD_CPUTIME_ID, .cpu = 1 },
	{ .name = "another thread's", .whose = OTHER_THREAD, .cpu = 1 },
	{ .name = "made by another thread", .clock = CLOCK_THREAD_CPUTIME_ID,
	  .whose = BY_OTHER_THREAD, .cpu = 1 },
	{ .name = "another process's", .whose = OTHER_PROCESS, .cpu = 1 },
};

static pthread_t other;
static volatile pid_t other_tid;
static pid_t child;

static void on_counted(int sig, siginfo_t *info, void *context)
{
	struct periodic *p = info->si_value.sival_ptr;

	(void)sig;
	(void)context;
	if (p < periodic || p >= periodic + COUNT(periodic) ||
	    info->si_code != SI_TIMER)
		fail("timer signal with value %p, code %d", (void *)p,
		     info->si_code);
	if (p->whose == TO_OTHER_THREAD && gettid() != other_tid)
		fail("timer signal came to thread %d", gettid());
	p->fired += 1 + info->si_overrun;
}

static void make_one(struct periodic *p)
{
	struct itimerspec every = { to_timespec(EVERY), to_timespec(EVERY) };
	struct sigevent ev = { .sigev_notify = SIGEV_SIGNAL,
			       .sigev_signo = COUNTED };

	if (p->whose == TO_OTHER_THREAD) {
		ev.sigev_notify = SIGEV_THREAD_ID;
		ev._sigev_un._tid = other_tid;
	}
	ev.sigev_value.sival_ptr = p;
	if (p->whose == OTHER_THREAD)
		need(!pthread_getcpuclockid(other, &p->clock));
	if (p->whose == OTHER_PROCESS)
		need(!clock_getcpuclockid(child, &p->clock));
	need(!timer_create(p->clock, &ev, &p->id));
	p->since = clock_ns(p->cpu ? CLOCK_MONOTONIC : p->clock);
	need(!timer_settime(p->id, 0, &every, NULL));
	p->worker.name = p->name;
}

static void burn(void)
{
	for (long long until = clock_ns(CLOCK_THREAD_CPUTIME_ID) + MS;
	     clock_ns(CLOCK_THREAD_CPUTIME_ID) < until;)
		;
}

static void *be_other(void *arg)
{
	(void)arg;
	other_tid = gettid();
	for (size_t i = 0; i < COUNT(periodic); i++)
		if (periodic[i].whose == BY_OTHER_THREAD)
			make_one(&periodic[i]);
	for (;;) {
		burn();
		doze(ROUND / 4);
	}
	return NULL;
}

static void make_periodic(void)
{
	struct sigaction sa = { .sa_sigaction = on_counted,
				.sa_flags = SA_SIGINFO | SA_RESTART };

	sigaction(COUNTED, &sa, NULL);
	child = fork();
	need(child >= 0);
	while (!child) {
		burn();
		doze(ROUND / 4);
	}
	need(!pthread_create(&other, NULL, be_other, NULL));
	while (!other_tid)
		doze(MS);
	for (size_t i = 0; i < COUNT(periodic); i++)
		if (periodic[i].whose != BY_OTHER_THREAD)
			make_one(&periodic[i]);
}

static void check_periodic(void)
{
	struct itimerspec now;

	for (size_t i = 0; i < COUNT(periodic); i++) {
		struct periodic *p = &periodic[i];
		unsigned long fired = p->fired;
		long long left, passed;

		need(!timer_gettime(p->id, &now));
		need(now.it_interval.tv_sec * SEC + now.it_interval.tv_nsec ==
		     EVERY);
		left = now.it_value.tv_sec * SEC + now.it_value.tv_nsec;
		if (left <= 0 || left > EVERY)
			fail("%s has %lld left", p->name, left);
		passed = clock_ns(p->cpu ? CLOCK_MONOTONIC : p->clock) - p->since;
		if (!p->cpu && (long long)fired > passed / EVERY + 1)
			fail("%s went off %lu times in %lld ns", p->name, fired,
			     passed);
		p->worker.done = fired;
		watch(&p->worker, 1);
	}
}

/* --- expired, and not delivered --- */

static timer_t once, again;
static long long again_since, counted;

static timer_t make_held(int value)
{
	struct sigevent ev = { .sigev_notify = SIGEV_SIGNAL,
			       .sigev_signo = HELD };
	timer_t id;

	ev.sigev_value.sival_int = value;
	need(!timer_create(CLOCK_MONOTONIC, &ev, &id));
	return id;
}

static void start_once(void)
{
	struct itimerspec soon = { { 0, 0 }, { 0, 1000 } };

	need(!timer_settime(once, 0, &soon, NULL));
	doze(MS);
}

static void make_pending(void)
{
	struct itimerspec every = { to_timespec(3 * MS), to_timespec(3 * MS) };

	once = make_held(1);
	again = make_held(2);
	again_since = mono_ns();
	need(!timer_settime(again, 0, &every, NULL));
	start_once();
	doze(4 * MS);
}

/* Every tenth round takes the signals: one of each, and no more. */
static void check_pending(void)
{
	struct timespec none = { 0, 0 };
	struct itimerspec left;
	siginfo_t info;
	sigset_t set;
	int seen = 0;

	sigpending(&set);
	need(sigismember(&set, HELD));
	need(!timer_gettime(once, &left));
	need(!left.it_value.tv_sec && !left.it_value.tv_nsec);
	if (round_no % 10)
		return;
	sigemptyset(&set);
	sigaddset(&set, HELD);
	for (int i = 0; i < 2; i++) {
		long long most;

		need(sigtimedwait(&set, &info, &none) == HELD);
		need(info.si_code == SI_TIMER);
		seen |= info.si_value.sival_int;
		if (info.si_value.sival_int != 2) {
			need(info.si_overrun == 0);
			continue;
		}
		counted += 1 + info.si_overrun;
		most = (mono_ns() - again_since) / (3 * MS);
		/* A restored one may begin anew to count what waits. */
		if (counted > most)
			fail("expired %lld times of %lld", counted, most);
		need(timer_getoverrun(again) == info.si_overrun);
	}
	need(seen == 3);
	/* The periodic one may have expired once more by now. */
	if (sigtimedwait(&set, &info, &none) == HELD) {
		need(info.si_value.sival_int == 2);
		counted += 1 + info.si_overrun;
	}
	doze(4 * MS);
	start_once();
}

/* How much of what has passed was counted, at a moment when all is seen. */
static void check_counted(int late_allowed)
{
	long long most = (mono_ns() - again_since) / (3 * MS);

	if (!late_allowed && round_no % 10 == 0 && counted < most * 9 / 10 - 100)
		fail("expired %lld times of %lld", counted, most);
}

/* --- set to a time of the wall clock --- */

#define AHEAD (1500 * MS)
#define ALARM_SLACK (700 * MS)

static struct alarm_clock {
	clockid_t clock;
	timer_t id;
	long long at, seen_past;
} alarms[] = { { .clock = CLOCK_REALTIME }, { .clock = CLOCK_REALTIME }, { .clock = CLOCK_TAI } };

static void set_alarm(struct alarm_clock *a, long long ahead)
{
	struct itimerspec at = { { 0, 0 }, { 0, 0 } };

	a->at = clock_ns(a->clock) + ahead;
	a->seen_past = 0;
	at.it_value = to_timespec(a->at);
	need(!timer_settime(a->id, TIMER_ABSTIME, &at, NULL));
}

static void make_alarms(void)
{
	struct sigevent ev = { .sigev_notify = SIGEV_NONE };

	for (size_t i = 0; i < COUNT(alarms); i++) {
		need(!timer_create(alarms[i].clock, &ev, &alarms[i].id));
		set_alarm(&alarms[i], AHEAD / (i + 1));
	}
}

static void check_alarms(int late_allowed)
{
	for (size_t i = 0; i < COUNT(alarms); i++) {
		struct alarm_clock *a = &alarms[i];
		long long before = clock_ns(a->clock), now;
		struct itimerspec left;
		int over;

		need(!timer_gettime(a->id, &left));
		over = !left.it_value.tv_sec && !left.it_value.tv_nsec;
		now = clock_ns(a->clock);
		if (over && now < a->at && !late_allowed)
			fail("alarm %zu went off %lld ns early", i, a->at - now);
		if (!over && before > a->at && !a->seen_past)
			a->seen_past = before;
		if (a->seen_past && before > a->seen_past + ALARM_SLACK && !late_allowed)
			fail("alarm %zu is %lld ns late", i, before - a->at);
		if (over)
			set_alarm(a, AHEAD);
	}
}

/* --- interval timers that run on cpu time --- */

static volatile unsigned long virtuals, profs;
static struct worker cpu_workers[] = { { .name = "ITIMER_VIRTUAL" }, { .name = "ITIMER_PROF" } };

static void on_virtual(int sig) { (void)sig; virtuals++; }
static void on_prof(int sig) { (void)sig; profs++; }

static void make_itimers(void)
{
	struct itimerval every = { { 0, 30000 }, { 0, 30000 } };
	struct sigaction v = { .sa_handler = on_virtual, .sa_flags = SA_RESTART };
	struct sigaction p = { .sa_handler = on_prof, .sa_flags = SA_RESTART };

	sigaction(SIGVTALRM, &v, NULL);
	sigaction(SIGPROF, &p, NULL);
	need(!setitimer(ITIMER_VIRTUAL, &every, NULL));
	need(!setitimer(ITIMER_PROF, &every, NULL));
}

static void check_itimers(void)
{
	cpu_workers[0].done = virtuals;
	cpu_workers[1].done = profs;
	watch(cpu_workers, 2);
}

int main(int argc, char **argv)
{
	int late_allowed = argc > 1 && !strcmp(argv[1], "late");
	sigset_t held;

	report_open("timers");
	sigemptyset(&held);
	sigaddset(&held, HELD);
	sigprocmask(SIG_BLOCK, &held, NULL);
	make_periodic();
	make_pending();
	make_alarms();
	make_itimers();
	for (;;) {
		check_periodic();
		check_pending();
		check_counted(late_allowed);
		check_alarms(late_allowed);
		check_itimers();
		tick();
		burn();
		doze(ROUND);
	}
}
