/*
 * locks - file locks of every kind, held by two processes and waited for by
 * others. Each kind must be in the way of exactly those in whose way it was, in
 * the name of its owner, and who waits must wait on until the lock is given up.
 */
#include "hold.h"

#include <signal.h>
#include <sys/file.h>

#define COUNTED "/out/locks.posix"

static struct shared {
	struct worker waiters[3];
	volatile int turn;	/* rounds in which the waiters may pass */
	volatile pid_t child;
	volatile unsigned long checked;	/* by the child */
} *shared;

static pid_t parent;
static int posix_fd, flock_fd, ofd_fd, other_fd, read_lease, write_lease;

static int lock(int fd, int command, short type, off_t start, off_t length)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET,
			   .l_start = start, .l_len = length };

	return fcntl(fd, command, &l);
}

/* in_the_way expects that pid has a lock of this kind and extent. */
static void in_the_way(int fd, int command, off_t at, short type, pid_t pid,
		       off_t start, off_t length)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET,
			   .l_start = at, .l_len = 1 };

	need(!fcntl(fd, command, &l));
	if (l.l_type != type || (type != F_UNLCK && (l.l_pid != pid ||
	    l.l_start != start || l.l_len != length)))
		fail("at %lld: lock %d of %d, %lld+%lld", (long long)at,
		     l.l_type, l.l_pid, (long long)l.l_start,
		     (long long)l.l_len);
}

static int file(const char *name, int flags)
{
	int fd = open(name, flags | O_CREAT, 0600);

	need(fd >= 0);
	return fd;
}

/* --- those who wait --- */

static void await_turn(struct worker *w, int flock_it)
{
	int fd = file(flock_it ? "/out/locks.flock" : COUNTED, O_RDWR), turn;

	for (;;) {
		turn = shared->turn;
		if (flock_it)
			need(!flock(fd, LOCK_EX));
		else
			need(!lock(fd, w == &shared->waiters[1] ?
					   F_OFD_SETLKW : F_SETLKW,
				   F_WRLCK, 0, 10));
		w->done++;
		if (shared->turn == turn)
			fail("a lock was had out of turn");
		if (flock_it)
			need(!flock(fd, LOCK_UN));
		else
			need(!lock(fd, w == &shared->waiters[1] ? F_OFD_SETLK :
								  F_SETLK,
				   F_UNLCK, 0, 10));
		while (shared->turn % 2)
			doze(MS);
	}
}

/* --- the other owner --- */

static void other_owner(void)
{
	int fd = file(COUNTED, O_RDWR);

	shared->child = getpid();
	need(!lock(fd, F_SETLK, F_WRLCK, 10, 10));
	for (;;) {
		if (!(shared->turn % 2))
			in_the_way(fd, F_GETLK, 20, F_RDLCK, parent, 20, 0);
		/* What it holds itself is not in its way. */
		in_the_way(fd, F_GETLK, 12, F_UNLCK, 0, 0, 0);
		shared->checked++;
		doze(5 * MS);
	}
}

/* --- signals about files: to whom, which, and that they still come --- */

static int signal_pipe[2], owned_fd;
static volatile sig_atomic_t came, came_fd;

static void on_io(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	came++;
	came_fd = info->si_fd;
}

static void make_owners(void)
{
	struct f_owner_ex tid = { F_OWNER_TID, getpid() },
			  group = { F_OWNER_PGRP, getpgrp() };
	struct sigaction sa = { .sa_sigaction = on_io, .sa_flags = SA_SIGINFO |
						      SA_RESTART };

	need(!sigaction(SIGRTMIN + 3, &sa, NULL));
	need(!pipe(signal_pipe));
	need(!fcntl(signal_pipe[0], F_SETOWN_EX, &tid));
	need(!fcntl(signal_pipe[0], F_SETSIG, SIGRTMIN + 3));
	need(!fcntl(signal_pipe[0], F_SETFL, O_ASYNC | O_NONBLOCK));
	owned_fd = file("/out/locks.owned", O_RDWR);
	need(!fcntl(owned_fd, F_SETOWN_EX, &group));
}

static void check_owners(void)
{
	struct f_owner_ex ex;
	int was = came;
	char c;

	need(!fcntl(signal_pipe[0], F_GETOWN_EX, &ex));
	need(ex.type == F_OWNER_TID && ex.pid == parent);
	need(fcntl(signal_pipe[0], F_GETSIG) == SIGRTMIN + 3);
	need(fcntl(signal_pipe[0], F_GETFL) == (O_ASYNC | O_NONBLOCK));
	need(!fcntl(owned_fd, F_GETOWN_EX, &ex));
	need(ex.type == F_OWNER_PGRP && ex.pid == getpgrp());
	need(!fcntl(signal_pipe[1], F_GETOWN_EX, &ex) && !ex.pid);
	need(write(signal_pipe[1], "x", 1) == 1);
	need(came == was + 1 && came_fd == signal_pipe[0]);
	need(read(signal_pipe[0], &c, 1) == 1 && c == 'x');
}

static void make(void)
{
	posix_fd = file(COUNTED, O_RDWR);
	flock_fd = file("/out/locks.flock", O_RDWR);
	ofd_fd = file("/out/locks.ofd", O_RDWR);
	other_fd = file("/out/locks.ofd", O_RDWR);
	close(file("/out/locks.lease", O_RDWR));
	close(file("/out/locks.wlease", O_RDWR));
	read_lease = open("/out/locks.lease", O_RDONLY);
	write_lease = open("/out/locks.wlease", O_RDWR);
	need(!lock(posix_fd, F_SETLK, F_WRLCK, 0, 10));
	need(!lock(posix_fd, F_SETLK, F_RDLCK, 20, 0));
	need(!flock(flock_fd, LOCK_EX));
	need(!lock(ofd_fd, F_OFD_SETLK, F_RDLCK, 5, 5));
	need(!lock(ofd_fd, F_OFD_SETLK, F_WRLCK, 100, 1));
	need(!fcntl(read_lease, F_SETLEASE, F_RDLCK));
	need(!fcntl(write_lease, F_SETLEASE, F_WRLCK));
}

static void check(void)
{
	int fd = open("/out/locks.flock", O_RDWR | O_CLOEXEC);

	need(fd >= 0);
	need(flock(fd, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK);
	close(fd);
	in_the_way(posix_fd, F_GETLK, 10, F_WRLCK, shared->child, 10, 10);
	in_the_way(posix_fd, F_GETLK, 0, F_UNLCK, 0, 0, 0);
	in_the_way(other_fd, F_OFD_GETLK, 5, F_RDLCK, -1, 5, 5);
	in_the_way(other_fd, F_OFD_GETLK, 100, F_WRLCK, -1, 100, 1);
	in_the_way(other_fd, F_OFD_GETLK, 50, F_UNLCK, 0, 0, 0);
	in_the_way(ofd_fd, F_OFD_GETLK, 100, F_UNLCK, 0, 0, 0);
	need(fcntl(read_lease, F_GETLEASE) == F_RDLCK);
	need(fcntl(write_lease, F_GETLEASE) == F_WRLCK);
}

/* pass gives the locks up that are waited for, and takes them again. */
static void pass(void)
{
	unsigned long was[3];

	for (int i = 0; i < 3; i++)
		was[i] = shared->waiters[i].done;
	doze(20 * MS);
	for (int i = 0; i < 3; i++)
		need(shared->waiters[i].done == was[i]);
	shared->turn++;
	need(!lock(posix_fd, F_SETLK, F_UNLCK, 0, 10));
	need(!flock(flock_fd, LOCK_UN));
	for (int i = 0; i < 3; i++)
		while (shared->waiters[i].done == was[i])
			doze(MS);
	need(!lock(posix_fd, F_SETLKW, F_WRLCK, 0, 10));
	need(!flock(flock_fd, LOCK_EX));
	shared->turn++;
}

int main(void)
{
	struct worker child = { .name = "other owner" };

	report_open("locks");
	parent = getpid();
	shared = map_shared(4096);
	make();
	make_owners();
	if (!fork())
		other_owner();
	for (int i = 0; i < 3; i++)
		if (!fork())
			await_turn(&shared->waiters[i], i == 2);
	while (!shared->child || !shared->checked)
		doze(MS);
	for (;;) {
		check();
		check_owners();
		if (round_no % 16 == 15)
			pass();
		child.done = shared->checked;
		watch(&child, 1);
		tick();
		doze(10 * MS);
	}
}
