/*
 * creds [ROLE...] - children in different roles: ids, capabilities, seccomp,
 * root and working directory, limits, session. Each describes itself in text
 * by everything the kernel tells of it and compares that with the first time.
 * Wants CAP_SETUID, SETGID, SETPCAP and SYS_CHROOT.
 */
#include "hold.h"

#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>

/* --- the description --- */

/* The lines of /proc/self/status that are a task's own and do not change by
 * its running. A changed root has no /proc to read them from. */
static void add_status(struct text *t)
{
	static const char *const keys[] = {
		"Name:",     "Umask:",	"Tgid:",   "Pid:",    "PPid:",
		"TracerPid:", "Uid:",	"Gid:",	   "FDSize:", "Groups:",
		"NSpgid:",   "NSsid:",	"Threads:", "SigBlk:", "SigIgn:",
		"SigCgt:",   "CapInh:", "CapPrm:", "CapEff:", "CapBnd:",
		"CapAmb:",   "NoNewPrivs:", "Seccomp:", "Seccomp_filters:",
		"THP_enabled:",
	};
	static char status[8192];
	char *line, *save;

	if (access("/proc/self/status", R_OK))
		return;
	slurp("/proc/self/status", status, sizeof(status));
	for (line = strtok_r(status, "\n", &save); line;
	     line = strtok_r(NULL, "\n", &save))
		for (size_t i = 0; i < COUNT(keys); i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				text_add(t, "%s\n", line);
	slurp("/proc/self/oom_score_adj", status, sizeof(status));
	text_add(t, "oom_score_adj %s", status);
}

static void add_ids(struct text *t)
{
	uid_t uid[3];
	gid_t gid[3], groups[64];
	int n;

	need(!getresuid(&uid[0], &uid[1], &uid[2]));
	need(!getresgid(&gid[0], &gid[1], &gid[2]));
	text_add(t, "uid %u %u %u gid %u %u %u groups", uid[0], uid[1], uid[2],
	    gid[0], gid[1], gid[2]);
	n = getgroups(COUNT(groups), groups);
	for (int i = 0; i < n; i++)
		text_add(t, " %u", groups[i]);
	text_add(t, "\npid %d %d %d %d\n", getpid(), getppid(), getpgid(0),
	    getsid(0));
}

static void add_prctl(struct text *t)
{
	static const struct {
		const char *name;
		int option;
	} plain[] = { { "securebits", PR_GET_SECUREBITS },
		      { "no_new_privs", PR_GET_NO_NEW_PRIVS },
		      { "keepcaps", PR_GET_KEEPCAPS },
		      { "timerslack", PR_GET_TIMERSLACK },
		      { "dumpable", PR_GET_DUMPABLE },
		      { "thp_disable", PR_GET_THP_DISABLE } };
	int value = 0;

	for (size_t i = 0; i < COUNT(plain); i++)
		text_add(t, "%s %d\n", plain[i].name,
		    prctl(plain[i].option, 0, 0, 0, 0));
	need(!prctl(PR_GET_PDEATHSIG, &value));
	text_add(t, "pdeathsig %d\n", value);
	need(!prctl(PR_GET_CHILD_SUBREAPER, &value));
	text_add(t, "subreaper %d\n", value);
}

static void add_limits(struct text *t)
{
	struct rlimit r;
	cpu_set_t cpus;

	for (int i = 0; i < RLIM_NLIMITS; i++) {
		need(!getrlimit(i, &r));
		text_add(t, "rlimit %d %lx %lx\n", i, r.rlim_cur, r.rlim_max);
	}
	/* The seccomp role forbids getpriority: its error is described. */
	errno = 0;
	text_add(t, "nice %d errno %d\n", getpriority(PRIO_PROCESS, 0), errno);
	need(!sched_getaffinity(0, sizeof(cpus), &cpus));
	text_add(t, "policy %d cpus %d\n", sched_getscheduler(0), CPU_COUNT(&cpus));
}

static void add_places(struct text *t)
{
	static char cwd[4096];
	struct stat root, here;
	mode_t mask = umask(0);

	umask(mask);
	need(getcwd(cwd, sizeof(cwd)));
	need(!stat("/", &root) && !stat(".", &here));
	text_add(t, "umask %o cwd %s root %lu here %lu\n", mask, cwd, root.st_ino,
	    here.st_ino);
}

static void describe(struct text *t)
{
	t->len = 0;
	add_status(t);
	add_ids(t);
	add_prctl(t);
	add_limits(t);
	add_places(t);
}

/* --- the roles --- */

static void be_plain(void)
{
}

static void set_caps(uint32_t permitted, uint32_t effective, uint32_t inherit)
{
	struct __user_cap_header_struct head = {
		_LINUX_CAPABILITY_VERSION_3, 0
	};
	struct __user_cap_data_struct data[2] = {
		{ effective, permitted, inherit }, { 0, 0, 0 }
	};

	need(!syscall(SYS_capset, &head, data));
}

static void be_user(void)
{
	static const gid_t groups[] = { 100, 200, 300, 70000 };

	need(!setgroups(COUNT(groups), groups));
	need(!setresgid(1001, 1002, 1003));
	need(!setresuid(1001, 1002, 1003));
}

static void be_user_with_caps(void)
{
	need(!prctl(PR_SET_KEEPCAPS, 1));
	be_user();
	set_caps(1 << CAP_KILL | 1 << CAP_NET_BIND_SERVICE, 1 << CAP_KILL,
		 1 << CAP_KILL);
	need(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0));
}

static void be_bounded(void)
{
	need(!prctl(PR_CAPBSET_DROP, CAP_AUDIT_WRITE));
	need(!prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED |
					       SECBIT_NO_SETUID_FIXUP));
	set_caps(1 << CAP_KILL | 1 << CAP_SETUID, 1 << CAP_SETUID, 0);
}

static void add_filter(unsigned nr, unsigned action)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
			 offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { COUNT(code), code };

	need(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog));
}

static void be_filtered(void)
{
	need(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	add_filter(SYS_getpriority, SECCOMP_RET_ERRNO | EXDEV);
	add_filter(SYS_swapoff, SECCOMP_RET_KILL_PROCESS);
}

/* The killing filter is inherited: a child that makes the call dies. */
static void check_filtered(void)
{
	int status = 0;
	pid_t pid = fork();

	need(pid >= 0);
	if (!pid) {
		struct rlimit none = { 0, 0 }; /* SIGSYS would dump core */

		setrlimit(RLIMIT_CORE, &none);
		syscall(SYS_swapoff, "/none");
		_exit(0);
	}
	need(waitpid(pid, &status, 0) == pid);
	need(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
}

static void be_limited(void)
{
	struct rlimit files = { 100, 200 }, core = { 0, 4096 },
		      stack = { 1 << 20, 4 << 20 };

	need(!setrlimit(RLIMIT_NOFILE, &files));
	need(!setrlimit(RLIMIT_CORE, &core));
	need(!setrlimit(RLIMIT_STACK, &stack));
	need(nice(5) == 5);
}

static void be_peculiar(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

	need(fd >= 0 && write(fd, "300", 3) == 3 && !close(fd));
	need(!prctl(PR_SET_NAME, "od) (d \\ name"));
	need(!prctl(PR_SET_TIMERSLACK, 123456));
	need(!prctl(PR_SET_PDEATHSIG, SIGUSR2));
	need(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	need(!prctl(PR_SET_DUMPABLE, 0));
	umask(027);
}

static void be_elsewhere(void)
{
	mkdir("/out/creds.cwd", 0700);
	need(!chdir("/out/creds.cwd"));
}

static void be_chrooted(void)
{
	mkdir("/out/creds.root", 0755);
	mkdir("/out/creds.root/deep", 0755);
	need(!chroot("/out/creds.root") && !chdir("/deep"));
}

static void be_session(void)
{
	need(setsid() == getpid());
}

static void be_group(void)
{
	need(!setpgid(0, 0));
}

static void be_scheduled(void)
{
	struct sched_param none = { 0 };
	cpu_set_t one;

	need(!sched_setscheduler(0, SCHED_BATCH, &none));
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	need(!sched_setaffinity(0, sizeof(one), &one));
}

static const struct role {
	const char *name;
	void (*be)(void), (*check)(void);
} roles[] = {
	{ "plain", be_plain, NULL },
	{ "user", be_user, NULL },
	{ "user-caps", be_user_with_caps, NULL },
	{ "bounded", be_bounded, NULL },
	{ "filtered", be_filtered, check_filtered },
	{ "limited", be_limited, NULL },
	{ "peculiar", be_peculiar, NULL },
	{ "elsewhere", be_elsewhere, NULL },
	{ "chrooted", be_chrooted, NULL },
	{ "session", be_session, NULL },
	{ "group", be_group, NULL },
	{ "scheduled", be_scheduled, NULL },
};

static struct worker *workers;

static void compare(const struct role *role, const struct text *was,
		    const struct text *is)
{
	const char *line = is->buf, *old = was->buf;

	for (size_t i = 0; i < is->len && is->buf[i] == was->buf[i]; i++)
		if (is->buf[i] == '\n') {
			line = is->buf + i + 1;
			old = was->buf + i + 1;
		}
	if (was->len != is->len || memcmp(was->buf, is->buf, is->len))
		fail("%s: was \"%.*s\", is \"%.*s\"", role->name,
		     (int)strcspn(old, "\n"), old, (int)strcspn(line, "\n"),
		     line);
}

static void live(const struct role *role, struct worker *worker)
{
	static struct text first, now;

	role->be();
	describe(&first);
	for (;;) {
		describe(&now);
		compare(role, &first, &now);
		if (role->check)
			role->check();
		worker->done++;
		doze(20 * MS);
	}
}

int main(int argc, char **argv)
{
	report_open("creds");
	workers = map_shared(COUNT(roles) * sizeof(*workers));
	for (size_t i = 0; i < COUNT(roles); i++) {
		workers[i].name = roles[i].name;
		if (wanted(argc, argv, roles[i].name) && !fork())
			live(&roles[i], &workers[i]);
	}
	for (;;) {
		for (size_t i = 0; i < COUNT(roles); i++)
			if (wanted(argc, argv, roles[i].name))
				watch(&workers[i], 1);
		tick();
		doze(20 * MS);
	}
}
