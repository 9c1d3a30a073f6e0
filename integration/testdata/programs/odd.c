/*
 * odd WHAT - holds something that no checkpoint takes, or of which one warns,
 * and goes on for ever.
 */
#include "hold.h"

#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/user.h>

static volatile pid_t *other;

static void *wait_for_ever(void *arg)
{
	*other = gettid();
	for (;;)
		doze(SEC);
	return arg;
}

static void child(void *(*body)(void *), int in_thread)
{
	pthread_t thread;

	other = map_shared(4096);
	if (!fork()) {
		if (in_thread)
			need(!pthread_create(&thread, NULL, body, NULL));
		else
			body(NULL);
		for (;;)
			doze(SEC);
	}
	while (!*other)
		doze(MS);
}

static void be_tracer(void)
{
	child(wait_for_ever, 0);
	need(!ptrace(PTRACE_SEIZE, *other, 0, 0));
}

static void be_thread_tracer(void)
{
	child(wait_for_ever, 1);
	need(!ptrace(PTRACE_SEIZE, *other, 0, 0));
}

static void *trace_me(void *arg)
{
	need(!ptrace(PTRACE_TRACEME, 0, 0, 0));
	*other = gettid();
	raise(SIGSTOP);
	return arg;
}

static void be_parent_of_traced(void)
{
	child(trace_me, 0);
	need(waitpid(*other, NULL, 0) == *other);
}

/* A debugger that has gone and left its watchpoint. */
static void be_watched(void)
{
	child(wait_for_ever, 0);
	need(!ptrace(PTRACE_ATTACH, *other, 0, 0));
	need(waitpid(*other, NULL, 0) == *other);
	need(!ptrace(PTRACE_POKEUSER, *other,
		     offsetof(struct user, u_debugreg[0]), &round_no));
	need(!ptrace(PTRACE_POKEUSER, *other,
		     offsetof(struct user, u_debugreg[7]), 1 | 1 << 16));
	need(!ptrace(PTRACE_DETACH, *other, 0, 0));
}

static void be_listened(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_swapoff, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { COUNT(code), code };
	int fd;

	need(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
		     SECCOMP_FILTER_FLAG_NEW_LISTENER, &prog);
	need(fd >= 0 && !close(fd));
}

static void be_full(void)
{
	static char status[4096];
	struct rlimit l;

	slurp("/proc/self/status", status, sizeof(status));
	l.rlim_cur = strtoul(strstr(status, "VmSize:") + 7, NULL, 10) << 10;
	l.rlim_max = RLIM_INFINITY;
	need(!setrlimit(RLIMIT_AS, &l));
}

static void be_keeper(void)
{
	need(syscall(SYS_add_key, "user", "odd", "secret", 6,
		     KEY_SPEC_PROCESS_KEYRING) > 0);
	need(syscall(SYS_add_key, "user", "odd", "secret", 6,
		     KEY_SPEC_SESSION_KEYRING) > 0);
}

static void be_iosharer(void)
{
	need(!syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
	if (!syscall(SYS_clone, CLONE_IO | SIGCHLD, NULL, NULL, NULL, NULL))
		for (;;)
			pause();
}

static void be_cored(void)
{
	struct rlimit core = { 0 };
	pid_t child;

	need(!getrlimit(RLIMIT_CORE, &core));
	core.rlim_cur = core.rlim_max;
	need(!setrlimit(RLIMIT_CORE, &core));
	child = fork();
	if (!child)
		abort();
	siginfo_t info;
	need(!waitid(P_PID, child, &info, WEXITED | WNOWAIT) && info.si_code == CLD_DUMPED);
}

/* A domain that forbids to make block devices, and so next to nothing. */
static void be_landlocked(void)
{
	struct landlock_ruleset_attr attr = {
		.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_BLOCK,
	};
	int fd = syscall(SYS_landlock_create_ruleset, &attr, sizeof(attr), 0);

	need(fd >= 0);
	need(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	need(!syscall(SYS_landlock_restrict_self, fd, 0));
	need(!close(fd));
}

/* Dumpable by root only: what fs.suid_dumpable makes of a change of ids. */
static int rooted;

static void be_rooted(void)
{
	need(!setresuid(7, 7, 7));
	need(prctl(PR_GET_DUMPABLE) == 2);
	rooted = 1;
}

static const struct {
	const char *name;
	void (*be)(void);
} kinds[] = {
	{ "tracer", be_tracer },
	{ "thread-tracer", be_thread_tracer },
	{ "traceme", be_parent_of_traced },
	{ "watched", be_watched },
	{ "listened", be_listened },
	{ "full", be_full },
	{ "keeper", be_keeper },
	{ "iosharer", be_iosharer },
	{ "cored", be_cored },
	{ "landlocked", be_landlocked },
	{ "rooted", be_rooted },
};

int main(int argc, char **argv)
{
	report_open("odd");
	for (size_t i = 0; i < COUNT(kinds); i++)
		if (wanted(argc, argv, kinds[i].name))
			kinds[i].be();
	for (;;) {
		if (rooted)
			need(prctl(PR_GET_DUMPABLE) == 2);
		tick();
		doze(20 * MS);
	}
}
