/*
 * sandboxed - processes with seccomp filters that kill for next to every system
 * call: for those that a checkpoint makes in them, had it no way around.
 */
#include "hold.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

#define KEPT 7 /* of the children, allowed everywhere */
static const unsigned allowed[] = {
	SYS_nanosleep, SYS_clock_nanosleep, SYS_restart_syscall, SYS_write,
	SYS_rt_sigreturn, SYS_exit, SYS_exit_group,
	/* and what a task needs to come back from a batch by itself */
	SYS_mmap, SYS_munmap, SYS_rt_sigprocmask, SYS_tgkill,
};

static void allow(size_t count, unsigned otherwise)
{
	struct sock_filter code[2 * COUNT(allowed) + 2], *c = code;
	struct sock_fprog prog = { 0, code };

	*c++ = (struct sock_filter)BPF_STMT(
		BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (size_t i = 0; i < count; i++) {
		*c++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
						    allowed[i], 0, 1);
		*c++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K,
						    SECCOMP_RET_ALLOW);
	}
	*c++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, otherwise);
	prog.len = c - code;
	need(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	need(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog));
}


static struct worker workers[] = {
	{ .name = "some" }, { .name = "few" }, { .name = "trap" },
	{ .name = "strict" },
};

int main(void)
{
	static const struct timespec nap = { 0, 3 * MS };
	struct worker *w;
	int pace[2];
	char c = 0;

	report_open("sandboxed");
	need(!pipe(pace));
	w = map_shared(sizeof(workers));
	memcpy(w, workers, sizeof(workers));
	for (size_t i = 0; i < COUNT(workers); i++) {
		if (fork())
			continue;
		switch (i) {
		case 0:
			allow(COUNT(allowed), SECCOMP_RET_KILL_PROCESS);
			break;
		case 1:
			allow(KEPT, SECCOMP_RET_KILL_PROCESS);
			break;
		case 2:
			allow(KEPT, SECCOMP_RET_TRAP);
			break;
		case 3:
			need(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
			while (read(pace[0], &c, 1) == 1) /* it may not sleep */
				w[3].done++;
		}
		for (;;) {
			syscall(SYS_nanosleep, &nap, NULL);
			w[i].done++;
		}
	}
	for (;;) {
		int status;

		need(write(pace[1], &c, 1) == 1);
		need(!waitpid(-1, &status, WNOHANG));
		watch(w, COUNT(workers));
		tick();
		doze(10 * MS);
	}
}
