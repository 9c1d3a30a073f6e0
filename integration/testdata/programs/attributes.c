/*
 * attributes [ROLE...] - what the kernel keeps of a task or a single thread
 * beside its memory and files. Every role is played twice: by the leader of a
 * process whose second thread stays plain, and by the second thread of one
 * whose leader stays plain. All of them describe themselves by everything the
 * kernel tells, and compare that with the first time.
 * Wants CAP_SETUID, SETGID, SETPCAP, SYS_NICE and KILL.
 */
#include "hold.h"

#include <asm/ldt.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#define GET_CPUID 0x1011 /* arch_prctl(2) */
#define GET_XCOMP_PERM 0x1022

/* --- the description --- */

static void add_file(struct text *t, const char *path)
{
	char content[64];

	slurp(path, content, sizeof(content));
	text_add(t, "%s %s\n", path, content);
}

static void add_prctl(struct text *t)
{
	static const int plain[] = {
		PR_GET_SECUREBITS,   PR_GET_NO_NEW_PRIVS,
		PR_GET_TIMERSLACK,   PR_GET_DUMPABLE,
		PR_GET_THP_DISABLE,  PR_MCE_KILL_GET,
		PR_GET_MDWE,	     PR_GET_MEMORY_MERGE,
		PR_GET_IO_FLUSHER,
	};
	unsigned long perm = 0;
	int value = 0;

	for (size_t i = 0; i < COUNT(plain); i++)
		text_add(t, "prctl %d: %d\n", plain[i],
		    prctl(plain[i], 0, 0, 0, 0));
	for (int i = 0; i < 3; i++)
		text_add(t, "speculation %d: %d\n", i,
		    prctl(PR_GET_SPECULATION_CTRL, i, 0, 0, 0));
	need(!prctl(PR_GET_PDEATHSIG, &value));
	text_add(t, "pdeathsig %d\n", value);
	need(!prctl(PR_GET_TSC, &value));
	text_add(t, "tsc %d personality %x cpuid %ld\n", value,
	    personality(0xffffffff), syscall(SYS_arch_prctl, GET_CPUID, 0));
	syscall(SYS_arch_prctl, GET_XCOMP_PERM, &perm);
	text_add(t, "xcomp %lx\n", perm);
}

static void add_ids(struct text *t)
{
	static __thread gid_t groups[65536];
	unsigned sum = 0, uid[3], gid[3];
	int n = syscall(SYS_getgroups, COUNT(groups), groups);

	for (int i = 0; i < n; i++)
		sum = sum * 31 + groups[i];
	need(!syscall(SYS_getresuid, uid, uid + 1, uid + 2));
	need(!syscall(SYS_getresgid, gid, gid + 1, gid + 2));
	text_add(t, "uid %u %u %u gid %u %u %u, %d groups %x\n", uid[0], uid[1],
	    uid[2], gid[0], gid[1], gid[2], n, sum);
}

struct attr {
	unsigned size, policy;
	unsigned long long flags;
	int nice;
	unsigned priority;
	unsigned long long runtime, deadline, period;
};

static void add_capabilities(struct text *t)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3,
						 0 };
	struct __user_cap_data_struct d[2];

	need(!syscall(SYS_capget, &head, d));
	text_add(t, "capabilities %x %x %x, bounding and ambient ",
	    d[0].permitted, d[0].effective, d[0].inheritable);
	for (int i = 0; i <= 40; i++)
		text_add(t, "%d", prctl(PR_CAPBSET_READ, i) +
			     2 * prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET,
				       i, 0, 0));
	text_add(t, "\nseccomp %d\n", prctl(PR_GET_SECCOMP));
}

static void add_scheduling(struct text *t)
{
	struct attr a = { 0 };
	unsigned mode = 0;
	unsigned long nodes[16] = { 0 };
	cpu_set_t cpus;

	need(!syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0));
	text_add(t, "policy %u flags %llx nice %d priority %u runtime %llu %llu %llu\n",
	    a.policy, a.flags, a.nice, a.priority, a.runtime, a.deadline,
	    a.period);
	need(!sched_getaffinity(0, sizeof(cpus), &cpus));
	text_add(t, "cpus %lx ioprio %ld\n", *(unsigned long *)&cpus,
	    syscall(SYS_ioprio_get, 1, 0));
	need(!syscall(SYS_get_mempolicy, &mode, nodes, 1024, 0, 0));
	text_add(t, "mempolicy %x %lx\n", mode, nodes[0]);
}

static void add_status(struct text *t)
{
	static const char *const keys[] = {
		"Name:", "Uid:", "Gid:", "CapInh:", "CapPrm:", "CapEff:",
		"CapBnd:", "CapAmb:", "NoNewPrivs:", "Seccomp:",
		"Seccomp_filters:", "THP_enabled:", "Speculation",
	};
	static char status[800000];
	char *line, *save;

	/* Open files of single threads below /proc are not checkpointed. */
	if (gettid() != getpid())
		return;
	slurp("/proc/self/status", status, sizeof(status));
	for (line = strtok_r(status, "\n", &save); line;
	     line = strtok_r(NULL, "\n", &save))
		for (size_t i = 0; i < COUNT(keys); i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				text_add(t, "%s\n", line);
}

static void describe(struct text *t)
{
	t->len = 0;
	add_status(t);
	add_ids(t);
	add_capabilities(t);
	add_prctl(t);
	add_scheduling(t);
	add_file(t, "/proc/self/coredump_filter");
	add_file(t, "/proc/self/loginuid");
}

/* --- the roles --- */

static void be_plain(void)
{
}

/* Raw calls change one thread; libc's would change them all. */
static void be_user(void)
{
	static const gid_t groups[] = { 7, 100, 4000000000u };

	need(!syscall(SYS_setgroups, COUNT(groups), groups));
	need(!syscall(SYS_setresgid, 1001, 1002, 1003));
	need(!syscall(SYS_setresuid, 1001, 1002, 1003));
}

static void be_crowd(void)
{
	static gid_t groups[65536];

	for (size_t i = 0; i < COUNT(groups); i++)
		groups[i] = 100000 + i;
	need(!syscall(SYS_setgroups, COUNT(groups), groups));
}

static void be_capable(void)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3,
						 0 };
	struct __user_cap_data_struct data[2] = {
		{ 1 << CAP_SETPCAP, 1 << CAP_SETPCAP | 1 << CAP_KILL,
		  1 << CAP_KILL },
	};

	need(!syscall(SYS_prctl, PR_CAPBSET_DROP, CAP_AUDIT_WRITE));
	need(!syscall(SYS_prctl, PR_SET_SECUREBITS, 0x21)); /* NOROOT, its
							     * lock not */
	need(!syscall(SYS_capset, &head, data));
	need(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0));
}

static void be_peculiar(void)
{
	need(!prctl(PR_SET_NAME, "\xff\n\\) R 1 (\x01\x7f"));
	need(!prctl(PR_SET_PDEATHSIG, SIGURG));
	need(!prctl(PR_SET_TIMERSLACK, 1234567));
	need(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	need(personality(PER_LINUX | ADDR_NO_RANDOMIZE | READ_IMPLIES_EXEC |
			 UNAME26) != -1);
	need(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
}

static void be_late(void)
{
	need(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0));
	need(!prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0));
	/* Since Linux 6.18: but for memory that asks for them. */
	if (prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0))
		need(errno == EINVAL);
}

static void be_closed(void)
{
	int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);

	need(fd >= 0 && write(fd, "0x7a", 4) == 4 && !close(fd));
	need(!prctl(PR_SET_MDWE, 1, 0, 0, 0));
	need(!prctl(PR_SET_DUMPABLE, 0));
}

static void check_closed(void)
{
	need(mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
		  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
}

static void be_timeless(void)
{
	need(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
}

/* PR_SET_TIMERSLACK 0 goes back to the slack that a thread's maker had. */
static void *slack_child(void *arg)
{
	for (;;) {
		need(!prctl(PR_SET_TIMERSLACK, 888000));
		doze(20 * MS);
		need(prctl(PR_GET_TIMERSLACK) == 888000);
		need(!prctl(PR_SET_TIMERSLACK, 0));
		need(prctl(PR_GET_TIMERSLACK) == 777000);
	}
	return arg;
}

static void be_slack(void)
{
	pthread_t thread;

	need(!prctl(PR_SET_TIMERSLACK, 777000));
	need(!pthread_create(&thread, NULL, slack_child, NULL));
	need(!prctl(PR_SET_TIMERSLACK, 999000));
}

static void set_attr(struct attr a)
{
	a.size = sizeof(a);
	need(!syscall(SYS_sched_setattr, 0, &a, 0));
}

static void be_fifo(void)
{
	set_attr((struct attr){ .policy = SCHED_FIFO, .priority = 3,
				.flags = 1 /* RESET_ON_FORK */ });
}

static void be_rr(void)
{
	set_attr((struct attr){ .policy = SCHED_RR, .priority = 7 });
}

static void be_deadline(void)
{
	set_attr((struct attr){ .policy = 6 /* DEADLINE */,
				.runtime = 3000000, .deadline = 20000000,
				.period = 40000000 });
}

static void be_idle(void)
{
	set_attr((struct attr){ .policy = SCHED_IDLE, .nice = 4 });
	need(!syscall(SYS_ioprio_set, 1, 0, 3 << 13));
}

static void be_batch(void)
{
	cpu_set_t one;

	set_attr((struct attr){ .policy = SCHED_BATCH, .nice = -3, .flags = 1,
				.runtime = 5000000 /* its slice */ });
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	need(!sched_setaffinity(0, sizeof(one), &one));
	need(!syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
}

static void be_numa(void)
{
	unsigned long node = 1;

	need(!syscall(SYS_set_mempolicy, 2 /* BIND */ | 1 << 15 /* STATIC */,
		      &node, 64));
}

/* Areas with policies of their own, set by the second role of every kind. */
static char *bound;

static void be_bound(void)
{
	unsigned long node = 1;

	bound = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	need(bound != MAP_FAILED);
	bound[2 * 4096] = 7;
	need(!syscall(SYS_mbind, bound + 4096, 4 * 4096, 2, &node, 64, 0));
	need(!syscall(SYS_mbind, bound + 8 * 4096, 4 * 4096,
		      3 /* INTERLEAVE */, &node, 64, 0));
}

static void check_bound(void)
{
	static const unsigned want[] = { 0, 2, 2, 2, 2, 0, 0, 0,
					 3, 3, 3, 3, 0, 0, 0, 0 };

	need(bound[2 * 4096] == 7);
	for (size_t i = 0; i < COUNT(want); i++) {
		unsigned mode = 99;
		unsigned long nodes[16] = { 0 };

		need(!syscall(SYS_get_mempolicy, &mode, nodes, 1024,
			      bound + 4096 * i, 2 /* MPOL_F_ADDR */));
		need(mode == want[i] && nodes[0] == (want[i] ? 1 : 0));
	}
}

/* Segments: a word read through GS, which selects an entry of the process's
 * table or of the thread's own. */
static unsigned word_at_segment(void)
{
	unsigned value;

	asm volatile("movl %%gs:0, %0" : "=r"(value));
	return value;
}

static void load_gs(unsigned selector)
{
	asm volatile("movl %0, %%gs" : : "r"(selector));
}

static struct user_desc segment(unsigned entry, void *base)
{
	return (struct user_desc){
		.entry_number = entry, .base_addr = (unsigned long)base,
		.limit = 0xfffff, .seg_32bit = 1, .limit_in_pages = 1,
		.useable = 1,
	};
}

static unsigned ldt_word = 0x1d7c0de, gdt_word = 0x9d7c0de;

static void be_local(void)
{
	struct user_desc d = segment(300, &ldt_word);

	need(!syscall(SYS_modify_ldt, 0x11, &d, sizeof(d)));
	d = segment(3, NULL);
	d.limit_in_pages = 0;
	d.limit = 0x123;
	d.read_exec_only = 1;
	need(!syscall(SYS_modify_ldt, 0x11, &d, sizeof(d)));
	load_gs(300 << 3 | 7);
}

static void check_local(void)
{
	unsigned limit = 0;

	need(word_at_segment() == ldt_word);
	asm volatile("lsl %1, %0" : "=r"(limit) : "r"(3 << 3 | 7));
	need(limit == 0x123);
}

static int old_call(int nr, void *arg)
{
	int result;

	asm volatile("int $0x80" : "=a"(result) : "a"(nr), "b"(arg)
		     : "memory", "r8", "r9", "r10", "r11");
	return result;
}

static void be_segmented(void)
{
	static struct user_desc d; /* below 4 GiB */

	d = segment(-1, &gdt_word);
	need(!old_call(243 /* set_thread_area */, &d) && d.entry_number == 12);
	load_gs(12 << 3 | 3);
	d = segment(14, &ldt_word);
	need(!old_call(243, &d));
}

static void check_segmented(void)
{
	static struct user_desc d;

	need(word_at_segment() == gdt_word);
	d = (struct user_desc){ .entry_number = 14 };
	need(!old_call(244 /* get_thread_area */, &d));
	need(d.base_addr == (unsigned long)&ldt_word && d.limit == 0xfffff);
	d = (struct user_desc){ .entry_number = 13 };
	need(!old_call(244, &d) && d.seg_not_present);
}

/* System calls dispatched to the thread itself, as emulators have it. */
static volatile char dispatch;
static volatile sig_atomic_t dispatched;

static void on_dispatch(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	dispatch = 0;
	dispatched = info->si_syscall;
}

static void be_dispatcher(void)
{
	struct sigaction sa = { .sa_sigaction = on_dispatch,
				.sa_flags = SA_SIGINFO };

	need(!sigaction(SIGSYS, &sa, NULL));
	need(!prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON,
		    0x10000, 0x1000, &dispatch));
}

static void check_dispatcher(void)
{
	dispatched = 0;
	dispatch = 1;
	syscall(500); /* no such call: it is not made */
	need(dispatched == 500 && dispatch == 0);
}

/* A limit that leaves some room, but not much. */
static void be_narrow(void)
{
	static char status[4096];
	struct rlimit l;

	slurp("/proc/self/status", status, sizeof(status));
	l.rlim_cur = l.rlim_max =
		(strtoul(strstr(status, "VmSize:") + 7, NULL, 10) + 128) << 10;
	need(!setrlimit(RLIMIT_AS, &l));
}

static void check_narrow(void)
{
	void *p = mmap(NULL, 64 << 10, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS,
		       -1, 0);

	need(p != MAP_FAILED && !munmap(p, 64 << 10));
	need(mmap(NULL, 192 << 10, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		  0) == MAP_FAILED);
}

static void filter(unsigned nr, unsigned result, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
			 offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, result),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { COUNT(code), code };

	need(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	need(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog));
}

/* Filters of one thread; what it forbids its process's other one may. */
static void be_filtered(void)
{
	filter(SYS_swapoff, SECCOMP_RET_ERRNO | EXDEV,
	       SECCOMP_FILTER_FLAG_LOG);
	filter(SYS_swapon, SECCOMP_RET_ERRNO | EDOM,
	       SECCOMP_FILTER_FLAG_SPEC_ALLOW);
}

static void check_filtered(void)
{
	static int round;

	/* The audit log gets a line for each. */
	if (round++ % 32 == 0)
		need(syscall(SYS_swapoff, "/none") == -1 && errno == EXDEV);
	need(syscall(SYS_swapon, "/none", 0) == -1 && errno == EDOM);
}

static void be_synced(void)
{
	filter(SYS_swapoff, SECCOMP_RET_ERRNO | EXDEV,
	       SECCOMP_FILTER_FLAG_TSYNC);
}

static void check_synced(void)
{
	need(syscall(SYS_swapoff, "/none") == -1 && errno == EXDEV);
}

/* Strict mode: nothing but read and write. Its plain partner keeps it going. */
static int to_strict[2], from_strict[2];

static void be_strict(void)
{
	need(!pipe(to_strict) && !pipe(from_strict));
}

static void strict_loop(volatile unsigned long *done)
{
	char c;

	need(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
	while (read(to_strict[0], &c, 1) == 1 &&
	       write(from_strict[1], &c, 1) == 1)
		++*done;
	syscall(SYS_exit, 0);
}

static void check_strict(void)
{
	static char status[4096];
	static char n;
	char c = 0;

	n++;
	need(write(to_strict[1], &n, 1) == 1);
	need(read(from_strict[0], &c, 1) == 1 && c == n);
	slurp("/proc/self/status", status, sizeof(status));
	need(strstr(status, gettid() == getpid() ? "Seccomp:\t0" :
						   "Seccomp:\t1"));
}

static const struct role {
	const char *name;
	void (*be)(void), (*check)(void);
	void (*both)(void); /* holds in the plain thread too */
} roles[] = {
	{ "plain", be_plain, NULL, NULL },
	{ "user", be_user, NULL, NULL },
	{ "crowd", be_crowd, NULL, NULL },
	{ "capable", be_capable, NULL, NULL },
	{ "peculiar", be_peculiar, NULL, NULL },
	{ "late", be_late, NULL, NULL },
	{ "closed", be_closed, check_closed, check_closed },
	{ "timeless", be_timeless, NULL, NULL },
	{ "slack", be_slack, NULL, NULL },
	{ "fifo", be_fifo, NULL, NULL },
	{ "rr", be_rr, NULL, NULL },
	{ "deadline", be_deadline, NULL, NULL },
	{ "idle", be_idle, NULL, NULL },
	{ "batch", be_batch, NULL, NULL },
	{ "numa", be_numa, NULL, NULL },
	{ "bound", be_bound, check_bound, NULL },
	{ "local", be_local, check_local, NULL },
	{ "segmented", be_segmented, check_segmented, NULL },
	{ "dispatcher", be_dispatcher, check_dispatcher, NULL },
	{ "narrow", be_narrow, check_narrow, NULL },
	{ "filtered", be_filtered, check_filtered, NULL },
	{ "synced", be_synced, check_synced, check_synced },
	{ "strict", be_strict, NULL, check_strict },
};

#define PLAYERS (4 * COUNT(roles)) /* two threads of two processes each */
static struct worker *workers;

static void compare(const char *name, const struct text *was,
		    const struct text *is)
{
	const char *line = is->buf, *old = was->buf;

	for (size_t i = 0; i < is->len && is->buf[i] == was->buf[i]; i++)
		if (is->buf[i] == '\n') {
			line = is->buf + i + 1;
			old = was->buf + i + 1;
		}
	if (was->len != is->len || memcmp(was->buf, is->buf, is->len))
		fail("%s: was \"%.*s\", is \"%.*s\"", name,
		     (int)strcspn(old, "\n"), old, (int)strcspn(line, "\n"),
		     line);
}

struct player {
	const struct role *role;
	int plays; /* the role; the other one stays plain */
	struct worker *worker;
	pthread_barrier_t *ready;
};

static void *live(void *arg)
{
	static __thread struct text first, now;
	struct player *me = arg;
	void (*check)(void) = me->plays ? me->role->check : me->role->both;

	if (me->plays)
		me->role->be();
	pthread_barrier_wait(me->ready);
	if (me->plays && me->role->be == be_strict)
		strict_loop(&me->worker->done);
	describe(&first);
	for (;;) {
		describe(&now);
		compare(me->worker->name, &first, &now);
		if (check)
			check();
		me->worker->done++;
		doze(30 * MS);
	}
	return NULL;
}

static void process(const struct role *role, int leader, struct worker *w)
{
	static pthread_barrier_t ready;
	static struct player players[2];
	pthread_t thread;

	if (fork())
		return;
	pthread_barrier_init(&ready, NULL, 2);
	for (int i = 0; i < 2; i++)
		players[i] = (struct player){ role, (i == 0) == leader, w + i,
					      &ready };
	need(!pthread_create(&thread, NULL, live, &players[1]));
	live(&players[0]);
}

int main(int argc, char **argv)
{
	report_open("attributes");
	workers = map_shared(PLAYERS * sizeof(*workers));
	for (size_t i = 0; i < PLAYERS; i++)
		workers[i].name = roles[i / 4].name;
	for (size_t i = 0; i < PLAYERS; i += 2)
		if (wanted(argc, argv, workers[i].name))
			process(&roles[i / 4], i / 2 % 2 == 0, &workers[i]);
	for (;;) {
		for (size_t i = 0; i < PLAYERS; i++)
			if (wanted(argc, argv, workers[i].name))
				watch(&workers[i], 1);
		tick();
		doze(20 * MS);
	}
}
