/*
 * guest - is brought into a container (runc exec), with a child in a session of
 * its own, and an orphan that has a zombie. Everybody checks whose child it is;
 * its standard output must take what is written to it, whatever it is by now.
 */
#include "hold.h"
#include <signal.h>

static struct worker *worker;

/* hold counts for ever, and checks who is who. */
static void hold(int me, const char *name, pid_t parent, pid_t session)
{
	pid_t pid = getpid(), group = getpgid(0);

	worker[me].name = name;
	for (;;) {
		need(getpid() == pid && getppid() == parent);
		need(getpgid(0) == group && getsid(0) == session);
		if (me == 0)
			return;
		worker[me].done++;
		doze(20 * MS);
	}
}

/* orphan is the child of a child that is gone. Its own child is a zombie. */
static void orphan(pid_t session)
{
	pid_t dead;
	siginfo_t si;

	while (getppid() != 1)
		doze(MS);
	dead = fork();
	need(dead >= 0);
	if (!dead) {
		raise(SIGKILL);
		_exit(1);
	}
	worker[2].name = "orphan";
	for (;;) {
		need(getppid() == 1 && getsid(0) == session);
		need(!waitid(P_PID, dead, &si, WEXITED | WNOWAIT));
		need(si.si_pid == dead && si.si_code == CLD_KILLED && si.si_status == SIGKILL);
		worker[2].done++;
		doze(20 * MS);
	}
}

int main(void)
{
	pid_t pid = getpid(), child;
	char c;

	report_open("guest");
	worker = map_shared(3 * sizeof(*worker));
	child = fork();
	need(child >= 0);
	if (!child) {
		need(setsid() == getpid());
		hold(1, "child", pid, getpid());
	}
	child = fork();
	need(child >= 0);
	if (!child) {
		child = fork();
		need(child >= 0);
		if (!child)
			orphan(pid);
		_exit(0);
	}
	need(waitpid(child, NULL, 0) == child);
	need(!fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK));
	for (;;) {
		need(getpid() == pid && getpgid(0) == pid && getsid(0) == pid);
		hold(0, "guest", 0, pid);
		need(write(1, "round\n", 6) == 6);
		need(read(0, &c, 1) <= 0);
		if (worker[1].done && worker[2].done) {
			watch(&worker[1], 2);
			tick();
		}
		doze(20 * MS);
	}
}
