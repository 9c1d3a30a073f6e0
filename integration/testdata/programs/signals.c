/*
 * signals [PART...] - what belongs to signals and timers: an action with its
 * flags and mask for every signal, queued real-time signals with their values
 * and order, interval timers, POSIX timers, threads that stand on their
 * alternate stack. "counts" writes how many of two signals came to /out/counts.
 */
#include "hold.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

/* --- actions --- */

#define SIGNALS 64
static const int flag_choice[] = { 0,		 SA_RESTART,   SA_NODEFER,
				   SA_SIGINFO,	 SA_ONSTACK,   SA_RESETHAND,
				   SA_NOCLDSTOP, SA_NOCLDWAIT };
static volatile int handled;
static char *volatile handled_at;
static sigset_t handled_mask;

static void handler(int sig)
{
	sigprocmask(SIG_SETMASK, NULL, &handled_mask);
	handled_at = __builtin_frame_address(0);
	handled = sig;
}

/* Signals that other parts of this program use or that cannot be caught. */
static int taken(int sig)
{
	return sig == SIGKILL || sig == SIGSTOP || sig == SIGALRM ||
	       sig == SIGVTALRM || sig == SIGPROF || sig == 32 || sig == 33 ||
	       sig >= SIGRTMAX - 8;
}

/* The bits of the number pick the flags, so every pair of flags occurs. */
static int flags_of(int sig)
{
	int flags = 0;

	for (size_t bit = 0; bit < 6; bit++)
		if (sig >> bit & 1)
			flags |= flag_choice[bit + 1];
	return flags | (sig % 7 ? 0 : SA_NOCLDWAIT);
}

static void action_of(int sig, struct sigaction *sa)
{
	memset(sa, 0, sizeof(*sa));
	sa->sa_handler = sig % 5 == 0 ? SIG_IGN :
			 sig % 5 == 1 ? SIG_DFL : handler;
	sa->sa_flags = flags_of(sig);
	sigaddset(&sa->sa_mask, sig % 8 + 1);
	sigaddset(&sa->sa_mask, SIGRTMIN + sig % 16);
}

static char altstack[65536];

static void make_handlers(void)
{
	stack_t stack = { .ss_sp = altstack, .ss_size = sizeof(altstack) };
	struct sigaction sa;

	need(!sigaltstack(&stack, NULL));
	for (int sig = 1; sig <= SIGNALS; sig++) {
		action_of(sig, &sa);
		if (!taken(sig))
			need(!sigaction(sig, &sa, NULL));
	}
}

static void deliver(int sig, const struct sigaction *sa)
{
	int on_altstack;

	handled = 0;
	need(!raise(sig));
	need(handled == sig);
	on_altstack = handled_at >= altstack &&
		      handled_at < altstack + sizeof(altstack);
	need(on_altstack == !!(sa->sa_flags & SA_ONSTACK));
	need(sigismember(&handled_mask, sig) ==
	     (!(sa->sa_flags & SA_NODEFER) || sigismember(&sa->sa_mask, sig)));
	need(sigismember(&handled_mask, SIGRTMIN + sig % 16) == 1);
	if (sa->sa_flags & SA_RESETHAND)
		need(!sigaction(sig, sa, NULL));
}

static void check_handlers(void)
{
	struct sigaction want, have;
	sigset_t blocked;

	sigprocmask(SIG_SETMASK, NULL, &blocked);
	for (int sig = 1; sig <= SIGNALS; sig++) {
		if (taken(sig))
			continue;
		action_of(sig, &want);
		need(!sigaction(sig, NULL, &have));
		if (have.sa_handler != want.sa_handler ||
		    (have.sa_flags ^ want.sa_flags) & ~0x04000000 ||
		    memcmp(&have.sa_mask, &want.sa_mask, 8))
			fail("action of signal %d changed", sig);
		if (want.sa_handler == handler && !sigismember(&blocked, sig))
			deliver(sig, &want);
	}
}

/* --- pending real-time signals --- */

#define QUEUED (SIGRTMAX - 2)
#define DEPTH 8

/* Values 1..DEPTH wait for the process, 101..100+DEPTH for this thread. */
static void queue_signals(void)
{
	siginfo_t info;

	for (int i = 1; i <= DEPTH; i++) {
		union sigval value = { .sival_int = i };

		need(!sigqueue(getpid(), QUEUED, value));
		memset(&info, 0, sizeof(info));
		info.si_code = SI_QUEUE;
		info.si_pid = getpid();
		info.si_uid = getuid();
		info.si_value.sival_int = 100 + i;
		need(!syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), QUEUED,
			      &info));
	}
}

/* The kernel hands out a thread's own signals before the process's. */
static void drain_signals(void)
{
	struct timespec now = { 0, 0 };
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, QUEUED);
	for (int i = 0; i < 2 * DEPTH; i++) {
		int want = i < DEPTH ? 101 + i : i - DEPTH + 1;

		need(sigtimedwait(&set, &info, &now) == QUEUED);
		if (info.si_value.sival_int != want)
			fail("queued signal %d carries %d, not %d", i,
			     info.si_value.sival_int, want);
		need(info.si_code == SI_QUEUE && info.si_pid == getpid());
	}
	need(sigtimedwait(&set, &info, &now) == -1 && errno == EAGAIN);
}

/* SIGTRAP, of which a tracer has need itself: one for the process, with a value,
 * one for this thread. */
static void queue_traps(void)
{
	union sigval value = { .sival_int = 4711 };

	need(!sigqueue(getpid(), SIGTRAP, value));
	need(!syscall(SYS_tgkill, getpid(), gettid(), SIGTRAP));
}

static void drain_traps(void)
{
	struct timespec now = { 0, 0 };
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTRAP);
	need(sigtimedwait(&set, &info, &now) == SIGTRAP);
	need(info.si_code == SI_USER && info.si_pid == getpid());
	need(sigtimedwait(&set, &info, &now) == SIGTRAP);
	need(info.si_code == SI_QUEUE && info.si_value.sival_int == 4711);
	need(sigtimedwait(&set, &info, &now) == -1 && errno == EAGAIN);
}

static void make_pending(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, QUEUED);
	sigaddset(&set, SIGTRAP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	queue_signals();
	queue_traps();
}

static void check_pending(void)
{
	drain_signals();
	queue_signals();
	drain_traps();
	queue_traps();
}

/* --- interval timers --- */

static volatile unsigned long alarms;
static struct worker alarm_worker = { .name = "ITIMER_REAL" };
static long long alarms_since;

#define ALARM_EVERY (100 * MS)

static void on_alarm(int sig)
{
	(void)sig;
	alarms++;
}

static const struct {
	int which;
	struct itimerval value;
} cpu_timers[] = {
	/* Far away: they are about being kept, not about going off. */
	{ ITIMER_VIRTUAL, { { 5000, 250000 }, { 100000, 0 } } },
	{ ITIMER_PROF, { { 6000, 500000 }, { 200000, 0 } } },
};

static void make_itimers(void)
{
	struct itimerval every = { { 0, ALARM_EVERY / 1000 },
				   { 0, ALARM_EVERY / 1000 } };
	struct sigaction sa = { .sa_handler = on_alarm,
				.sa_flags = SA_RESTART };

	sigaction(SIGALRM, &sa, NULL);
	alarms_since = mono_ns();
	need(!setitimer(ITIMER_REAL, &every, NULL));
	for (size_t i = 0; i < COUNT(cpu_timers); i++)
		need(!setitimer(cpu_timers[i].which, &cpu_timers[i].value,
				NULL));
}

static void check_itimers(void)
{
	struct itimerval now;

	need(!getitimer(ITIMER_REAL, &now));
	need(now.it_interval.tv_sec == 0);
	need(now.it_interval.tv_usec == ALARM_EVERY / 1000);
	need(now.it_value.tv_sec == 0);
	/* Every alarm has its time; several may become one, never two. */
	need((long long)alarms <= (mono_ns() - alarms_since) / ALARM_EVERY + 1);
	alarm_worker.done = alarms;
	watch(&alarm_worker, 1);
	for (size_t i = 0; i < COUNT(cpu_timers); i++) {
		const struct itimerval *want = &cpu_timers[i].value;

		need(!getitimer(cpu_timers[i].which, &now));
		need(now.it_interval.tv_sec == want->it_interval.tv_sec);
		need(now.it_interval.tv_usec == want->it_interval.tv_usec);
		need(now.it_value.tv_sec <= want->it_value.tv_sec);
		need(now.it_value.tv_sec > want->it_value.tv_sec / 2);
	}
}

/* --- POSIX timers --- */

static struct posix {
	clockid_t clock;
	int notify;
	long long interval;
	timer_t id;
	volatile unsigned long fired;
	struct worker worker;
} posix[] = {
	{ .clock = CLOCK_MONOTONIC, .notify = SIGEV_SIGNAL,
	  .interval = 70 * MS },
	{ .clock = CLOCK_REALTIME, .notify = SIGEV_THREAD_ID,
	  .interval = 110 * MS },
	{ .clock = CLOCK_BOOTTIME, .notify = SIGEV_SIGNAL,
	  .interval = 130 * MS },
	{ .clock = CLOCK_MONOTONIC, .notify = SIGEV_NONE,
	  .interval = 90 * MS },
};

static void on_posix(int sig, siginfo_t *info, void *context)
{
	struct posix *p = info->si_value.sival_ptr;

	(void)sig;
	(void)context;
	if (p < posix || p >= posix + COUNT(posix) ||
	    info->si_code != SI_TIMER)
		fail("timer signal with value %p, code %d", (void *)p,
		     info->si_code);
	p->fired++;
}

static void make_posix(void)
{
	struct sigaction sa = { .sa_sigaction = on_posix,
				.sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigevent ev;
	timer_t gap;

	sigaction(SIGRTMAX, &sa, NULL);
	for (size_t i = 0; i < COUNT(posix); i++) {
		struct posix *p = &posix[i];
		struct itimerspec every = { to_timespec(p->interval),
					    to_timespec(p->interval) };

		memset(&ev, 0, sizeof(ev));
		ev.sigev_notify = p->notify;
		ev.sigev_signo = SIGRTMAX;
		ev.sigev_value.sival_ptr = p;
		ev._sigev_un._tid = gettid();
		/* A deleted timer between two leaves a hole in the ids. */
		need(!timer_create(CLOCK_MONOTONIC, NULL, &gap));
		need(!timer_create(p->clock, &ev, &p->id));
		need(!timer_delete(gap));
		need(!timer_settime(p->id, 0, &every, NULL));
		p->worker.name = "posix timer";
	}
}

static void check_posix(void)
{
	struct itimerspec now;

	for (size_t i = 0; i < COUNT(posix); i++) {
		struct posix *p = &posix[i];
		long long left;

		need(!timer_gettime(p->id, &now));
		need(now.it_interval.tv_sec * SEC + now.it_interval.tv_nsec ==
		     p->interval);
		left = now.it_value.tv_sec * SEC + now.it_value.tv_nsec;
		need(left > 0 && left <= p->interval);
		if (p->notify == SIGEV_NONE)
			continue;
		p->worker.done = p->fired;
		watch(&p->worker, 1);
	}
}

/* --- on the alternate stack, with and without SS_AUTODISARM --- */

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1U << 31)
#endif
#define STAY (SIGRTMAX - 6) /* its handler stays for a while */

static struct stander {
	int flags;
	char stack[65536];
	struct worker worker;
} standers[] = { { .flags = 0 }, { .flags = (int)SS_AUTODISARM } };
static __thread struct stander *stander;

/* On its stack a thread is told so, or with SS_AUTODISARM that it has none. */
static void on_stay(int sig, siginfo_t *info, void *context)
{
	char *here = __builtin_frame_address(0);
	ucontext_t *uc = context;
	stack_t now;

	(void)sig;
	(void)info;
	for (int i = 0; i < 10; i++) {
		need(here > stander->stack &&
		     here < stander->stack + sizeof(stander->stack));
		need(!sigaltstack(NULL, &now));
		need(now.ss_flags == (stander->flags ? SS_DISABLE : SS_ONSTACK));
		doze(20 * MS);
	}
	need(uc->uc_stack.ss_sp == stander->stack);
	need(uc->uc_stack.ss_size == sizeof(stander->stack));
}

static void *stand(void *arg)
{
	stack_t stack = { .ss_size = sizeof(stander->stack) }, now;

	stander = arg;
	stack.ss_sp = stander->stack;
	stack.ss_flags = stander->flags;
	need(!sigaltstack(&stack, NULL));
	for (;;) {
		need(!raise(STAY));
		need(!sigaltstack(NULL, &now));
		need(now.ss_sp == stander->stack);
		need(now.ss_size == sizeof(stander->stack));
		need(now.ss_flags == stander->flags);
		stander->worker.done++;
	}
	return NULL;
}

static void make_standers(void)
{
	struct sigaction sa = { .sa_sigaction = on_stay,
				.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
	pthread_t t;

	sigaction(STAY, &sa, NULL);
	for (size_t i = 0; i < COUNT(standers); i++) {
		standers[i].worker.name = "stander";
		need(!pthread_create(&t, NULL, stand, &standers[i]));
	}
}

static void check_standers(void)
{
	for (size_t i = 0; i < COUNT(standers); i++)
		watch(&standers[i].worker, 1);
}

/* --- signals from outside, counted --- */

static volatile int plain, queued;
static int counts_fd = -1;

static void on_plain(int sig) { (void)sig; plain++; }
static void on_queued(int sig) { (void)sig; queued++; }

static void make_counts(void)
{
	struct sigaction sa = { .sa_handler = on_plain, .sa_flags = SA_RESTART };

	sigaction(SIGUSR2, &sa, NULL);
	sa.sa_handler = on_queued;
	sigaction(SIGRTMAX - 7, &sa, NULL);
	counts_fd = open("/out/counts", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	need(counts_fd >= 0);
}

static void check_counts(void)
{
	char line[64];
	int n = snprintf(line, sizeof(line), "%8d %8d\n", plain, queued);

	need(pwrite(counts_fd, line, n, 0) == n);
}

static const struct part parts[] = {
	{ "handlers", make_handlers, check_handlers },
	{ "pending", make_pending, check_pending },
	{ "itimers", make_itimers, check_itimers },
	{ "posix", make_posix, check_posix },
	{ "standers", make_standers, check_standers },
	{ "counts", make_counts, check_counts },
};

int main(int argc, char **argv)
{
	report_open("signals");
	make_parts(argc, argv, parts, COUNT(parts));
	for (;; doze(20 * MS))
		check_parts(argc, argv, parts, COUNT(parts));
}
