/*
 * tmpfs - what the container keeps in its own file systems in memory: entries
 * of every type with owners, modes, times and attributes, open and mapped
 * files, POSIX shared memory and semaphores that another process uses too.
 * With "chown", some belong to other users.
 */
#include "hold.h"

#include <dirent.h>
#include <semaphore.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>

#define DIR "/dev/shm/tree"
#define SPARSE (3LL << 30)

struct want {
	const char *path;
	mode_t mode;
};

static const struct want wants[] = {
	{ "/dev/shm", S_IFDIR | 01777 },
	{ "/run/top", S_IFDIR | 0750 },
	{ DIR, S_IFDIR | 0711 },
	{ DIR "/sticky", S_IFDIR | 01777 },
	{ DIR "/setgid", S_IFDIR | 02770 },
	{ DIR "/closed", S_IFDIR | 0 },
	{ DIR "/empty", S_IFREG | 0604 },
	{ DIR "/text", S_IFREG | 0640 },
	{ DIR "/readonly", S_IFREG | 0400 },
	{ DIR "/setuid", S_IFREG | 04711 },
	{ DIR "/sparse", S_IFREG | 0600 },
	{ DIR "/setgid/link", S_IFREG | 0640 },
	{ DIR "/symlink", S_IFLNK | 0777 },
	{ DIR "/dangling \xff\n", S_IFLNK | 0777 },
	{ DIR "/fifo", S_IFIFO | 0622 },
	{ DIR "/sock", S_IFSOCK | 0755 },
	{ "/dev/own", S_IFREG | 0600 },
	{ "/dev/null", S_IFCHR | 0666 },
};

static struct stat had[COUNT(wants)];

static void put(const char *path, const char *text, mode_t mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	need(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	need(!fchmod(fd, mode));
	close(fd);
}

static void make_entries(int chowns)
{
	struct timespec odd[2] = { { 1000000007, 123456789 },
				   { -5, 999999999 } };
	int fd;

	umask(0);
	need(!mkdir("/run/top", 0750) && !mkdir(DIR, 0711));
	need(!mkdir(DIR "/sticky", 0700) && !chmod(DIR "/sticky", 01777));
	need(!mkdir(DIR "/setgid", 0700) && !chmod(DIR "/setgid", 02770));
	need(!mkdir(DIR "/closed", 0));
	put(DIR "/empty", "", 0604);
	put(DIR "/text", "hello, world", 0640);
	put(DIR "/readonly", "look but do not touch", 0400);
	put(DIR "/setuid", "#!/bin/sh\n", 04711);
	put("/dev/own", "in /dev", 0600);
	fd = open(DIR "/sparse", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	need(fd >= 0 && !ftruncate(fd, SPARSE));
	need(pwrite(fd, "middle", 6, SPARSE / 2 + 3) == 6);
	need(pwrite(fd, "end", 3, SPARSE - 3) == 3);
	close(fd);
	need(!link(DIR "/text", DIR "/setgid/link"));
	need(!symlink("text", DIR "/symlink"));
	need(!symlink("/no/where", DIR "/dangling \xff\n"));
	need(!mkfifo(DIR "/fifo", 0622) && !mkfifo(DIR "/fifo2", 0622));
	need(!mknod(DIR "/sock", S_IFSOCK | 0755, 0));
	need(!setxattr(DIR "/text", "user.note", "\0bin", 4, 0));
	need(!setxattr(DIR "/sticky", "user.empty", "", 0, 0));
	if (chowns)
		need(!chown(DIR "/text", 1000, 2000) &&
		     !lchown(DIR "/symlink", 3, 4) &&
		     !chown(DIR "/setuid", 5, 6) &&
		     !chmod(DIR "/setuid", 04711));
	need(!utimensat(AT_FDCWD, DIR "/readonly", odd, 0));
	need(!utimensat(AT_FDCWD, DIR "/symlink", odd, AT_SYMLINK_NOFOLLOW));
	unlink("/dev/core"); /* what the engine made may go too */
}

static void remember(void)
{
	for (size_t i = 0; i < COUNT(wants); i++) {
		need(!lstat(wants[i].path, &had[i]));
		need(had[i].st_mode == wants[i].mode);
	}
}

static void holds(const char *path, off_t at, const char *text)
{
	char buf[64] = "";
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOATIME);

	need(fd >= 0);
	need(pread(fd, buf, strlen(text), at) == (ssize_t)strlen(text));
	need(!strcmp(buf, text));
	close(fd);
}

static void check_entries(void)
{
	struct stat st, other;
	char buf[64];

	for (size_t i = 0; i < COUNT(wants); i++) {
		const char *path = wants[i].path;
		struct stat *h = &had[i];

		if (lstat(path, &st))
			fail("%s is gone", path);
		if (st.st_mode != h->st_mode || st.st_uid != h->st_uid ||
		    st.st_gid != h->st_gid || st.st_nlink != h->st_nlink)
			fail("%s: mode %o %o, owner %d:%d %d:%d, links %ld %ld",
			     path, st.st_mode, h->st_mode, st.st_uid,
			     st.st_gid, h->st_uid, h->st_gid,
			     (long)st.st_nlink, (long)h->st_nlink);
		if (st.st_size != h->st_size ||
		    memcmp(&st.st_mtim, &h->st_mtim, sizeof(st.st_mtim)))
			fail("%s: size %ld %ld, mtime %ld.%ld %ld.%ld", path,
			     st.st_size, h->st_size, st.st_mtim.tv_sec,
			     st.st_mtim.tv_nsec, h->st_mtim.tv_sec,
			     h->st_mtim.tv_nsec);
	}
	holds(DIR "/text", 0, "hello, world");
	holds(DIR "/readonly", 0, "look but do not touch");
	holds(DIR "/sparse", SPARSE / 2 + 3, "middle");
	holds(DIR "/sparse", SPARSE - 3, "end");
	holds("/dev/own", 0, "in /dev");
	need(!stat(DIR "/sparse", &st) && st.st_blocks == 16);
	need(!stat(DIR "/text", &st) && !stat(DIR "/setgid/link", &other));
	need(st.st_ino == other.st_ino && st.st_dev == other.st_dev);
	need(readlink(DIR "/symlink", buf, sizeof(buf)) == 4);
	need(readlink(DIR "/dangling \xff\n", buf, sizeof(buf)) == 9);
	need(!memcmp(buf, "/no/where", 9));
	need(getxattr(DIR "/text", "user.note", buf, sizeof(buf)) == 4 &&
	     !memcmp(buf, "\0bin", 4));
	need(getxattr(DIR "/sticky", "user.empty", buf, sizeof(buf)) == 0);
	need(!stat("/dev/null", &st) && st.st_rdev == makedev(1, 3));
	need(access("/dev/core", F_OK) == -1 && errno == ENOENT);
}

/* --- files that are open, mapped, growing --- */

#define MAPPED (1 << 20)
static int log_fd, fifo_fd, start_fd, end_fd;
static ssize_t listed;
static unsigned char *shared;

static void make_open(void)
{
	int fd = shm_open("/mapped", O_RDWR | O_CREAT | O_EXCL, 0600);

	need(fd >= 0 && !ftruncate(fd, MAPPED));
	shared = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	need(shared != MAP_FAILED);
	close(fd);
	for (size_t i = 0; i < MAPPED; i += 8)
		*(uint64_t *)(shared + i) = i * 0x9e3779b97f4a7c15ULL;
	log_fd = open("/run/top/log", O_RDWR | O_CREAT | O_APPEND, 0600);
	need(log_fd >= 0);
	char some[4096];
	start_fd = open(DIR, O_RDONLY | O_DIRECTORY);
	end_fd = open(DIR, O_RDONLY | O_DIRECTORY);
	need(start_fd >= 0 && end_fd >= 0);
	while (getdents64(end_fd, some, sizeof(some)) > 0)
		;
	fifo_fd = open(DIR "/fifo2", O_RDWR | O_NONBLOCK);
	need(fifo_fd >= 0 && write(fifo_fd, "in flight", 9) == 9);
}

static void check_open(void)
{
	struct stat st, mapped;
	char buf[16], line[8], some[4096];
	ssize_t whole;

	need(pread(log_fd, line, 8, 8 * (round_no ? round_no - 1 : 0)) ==
	     (round_no ? 8 : 0));
	need(!round_no || atol(line) == (long)round_no);
	snprintf(line, sizeof(line), "%07lu", round_no + 1);
	need(write(log_fd, line, 8) == 8);
	need(!fstat(log_fd, &st) && st.st_size == 8 * ((off_t)round_no + 1));
	need(!stat("/run/top/log", &mapped) && st.st_ino == mapped.st_ino);
	need(read(fifo_fd, buf, sizeof(buf)) == 9 && !memcmp(buf, "in fl", 5));
	need(write(fifo_fd, "in flight", 9) == 9);
	for (size_t i = 64; i < MAPPED; i += 8)
		need(*(uint64_t *)(shared + i) == i * 0x9e3779b97f4a7c15ULL);
	need(getdents64(end_fd, some, sizeof(some)) == 0);
	whole = getdents64(start_fd, some, sizeof(some));
	need(whole > 0 && (!listed || listed == whole));
	listed = whole;
	need(lseek(start_fd, 0, SEEK_SET) == 0);
	/* The mapping and the name are one file. */
	*(uint64_t *)shared = round_no;
	int fd = shm_open("/mapped", O_RDONLY, 0);
	uint64_t now;
	need(fd >= 0 && read(fd, &now, 8) == 8 && now == round_no);
	close(fd);
}

/* --- a named semaphore and a mutex between processes --- */

static sem_t *ping, *pong;

static void make_peer(void)
{
	ping = sem_open("/ping", O_CREAT | O_EXCL, 0600, 0);
	pong = sem_open("/pong", O_CREAT | O_EXCL, 0600, 0);
	need(ping != SEM_FAILED && pong != SEM_FAILED);
	if (!fork()) {
		for (;;) {
			need(!sem_wait(ping));
			need(!sem_post(pong));
		}
	}
}

static void check_peer(void)
{
	struct timespec late;

	clock_gettime(CLOCK_REALTIME, &late);
	late.tv_sec += 120;
	need(!sem_post(ping));
	need(!sem_timedwait(pong, &late));
	sem_t *again = sem_open("/ping", 0); /* the same by name */
	int value;
	need(again != SEM_FAILED && !sem_post(again));
	need(!sem_timedwait(pong, &late));
	need(!sem_getvalue(ping, &value) && value == 0);
	need(!sem_close(again));
}

int main(int argc, char **argv)
{
	report_open("tmpfs");
	make_entries(argc > 1 && !strcmp(argv[1], "chown"));
	make_open();
	make_peer();
	remember();
	for (;;) {
		check_entries();
		check_open();
		check_peer();
		tick();
		doze(10 * MS);
	}
}
