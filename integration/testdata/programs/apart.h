/*
 * apart.h - programs that hold the objects of an ipc namespace do so in one of
 * their own making, where that is asked for: "apart", and "user" too for one that
 * belongs to a user namespace. Their parent stays where it was and holds objects
 * of the same ids, keys and names there.
 */
#ifndef APART_H
#define APART_H

#include "hold.h"

#include <mqueue.h>
#include <sched.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

static inline void put_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		fail("%s: %s", path, strerror(errno));
	close(fd);
}

/* The limits of an ipc namespace of the program's making, and their values. */
static const char *const limits[][2] = {
	{ "/proc/sys/kernel/shmmni", "77\n" },
	{ "/proc/sys/kernel/msgmnb", "20000\n" },
	{ "/proc/sys/kernel/sem", "32000\t1024000000\t500\t99\n" },
	{ "/proc/sys/fs/mqueue/msg_max", "44\n" },
};

/* The calls tell; a file of /proc/sys would be that of this namespace, and cannot
 * be open at a checkpoint. */
static inline void check_limits(void)
{
	struct mq_attr most = { .mq_maxmsg = 44, .mq_msgsize = 1 }, more = { .mq_maxmsg = 45, .mq_msgsize = 1 };
	struct shminfo shm;
	struct msginfo msg;
	union {
		struct seminfo *info;
	} sem = { &(struct seminfo){ 0 } };
	mqd_t q;

	need(shmctl(0, IPC_INFO, (void *)&shm) >= 0 && shm.shmmni == 77);
	need(msgctl(0, IPC_INFO, (void *)&msg) >= 0 && msg.msgmnb == 20000);
	need(semctl(0, 0, IPC_INFO, sem) >= 0 && sem.info->semmni == 99);
	need(mq_open("/more", O_RDWR | O_CREAT, 0600, &more) == -1 && errno == EINVAL);
	q = mq_open("/most", O_RDWR | O_CREAT, 0600, &most);
	need(q >= 0 && !mq_unlink("/most") && !mq_close(q));
}

/* go_apart returns in a child with an ipc namespace, and a user namespace, of its
 * own. hold and check are for the parent, which stays. */
static inline void go_apart(int user, void (*hold)(void), void (*check)(void))
{
	char line[64];
	uid_t uid = getuid();
	gid_t gid = getgid();
	pid_t child = fork();

	need(child >= 0);
	if (child) {
		hold();
		for (;;) {
			check();
			need(waitpid(child, NULL, WNOHANG) == 0);
			doze(10 * MS);
		}
	}
	need(!unshare(CLONE_NEWIPC | (user ? CLONE_NEWUSER : 0)));
	if (user) {
		put_text("/proc/self/setgroups", "deny");
		snprintf(line, sizeof(line), "0 %u 1", uid);
		put_text("/proc/self/uid_map", line);
		snprintf(line, sizeof(line), "0 %u 1", gid);
		put_text("/proc/self/gid_map", line);
	}
	for (size_t i = 0; i < COUNT(limits); i++)
		put_text(limits[i][0], limits[i][1]);
}

#endif
