/*
 * descriptors [PART...] - descriptors of what is no file: watches, tasks,
 * namespaces, packets, timers. Each round looks whether they are as they were.
 */
#include "hold.h"

#include <linux/limits.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>

/* A process that is restored has a new start time. */
static int restored(void)
{
	static unsigned long long began;
	static char stat[4096];
	unsigned long long now;
	int was = began != 0;
	char *p;

	slurp("/proc/self/stat", stat, sizeof(stat));
	p = strrchr(stat, ')') + 2;
	for (int field = 3; field < 22; field++)
		p = strchr(p, ' ') + 1;
	now = strtoull(p, NULL, 10);
	if (now == began)
		return 0;
	began = now;
	return was;
}

/* Whether this round is the first of a restored process. */
static int again;

/* A text of /proc that tells of a descriptor. */
static inline char *info_of(int fd)
{
	static char text[8192], path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	slurp(path, text, sizeof(text));
	return text;
}

/* --- inotify --- */

static int in_fd, queued_fd, removed_fd, unnamed_fd, dir_wd, file_wd, moved_wd,
	link_wd, shm_wd, removed_wd, sys_wd, once_wd, unnamed_wd, overflows;

#define DIR_MASK (IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_EXCL_UNLINK)

static int create(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);

	need(fd >= 0);
	return fd;
}

static int watch_path(int fd, const char *path, unsigned mask)
{
	int wd = inotify_add_watch(fd, path, mask);

	need(wd > 0);
	return wd;
}

static void make_inotify(void)
{
	int unwanted;

	in_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	queued_fd = inotify_init1(IN_NONBLOCK);
	need(in_fd >= 0 && queued_fd >= 0);
	mkdir("/out/watched", 0755);
	mkdir("/out/watched/a", 0755);
	mkdir("/out/watched/a/b", 0755);
	close(create("/out/watched/a/b/file"));
	close(create("/out/watched/a/moves"));
	close(create("/out/watched/a/once"));
	close(create("/dev/shm/watched"));
	unlink("/out/watched/link");
	need(!symlink("nowhere", "/out/watched/link"));
	removed_fd = create("/out/watched/a/removed");
	unnamed_fd = syscall(SYS_memfd_create, "watched", 0);
	need(unnamed_fd >= 0);
	dir_wd = watch_path(in_fd, "/out/watched", DIR_MASK);
	unwanted = watch_path(in_fd, "/out", IN_ATTRIB);
	file_wd = watch_path(in_fd, "/out/watched/a/b/file", IN_ALL_EVENTS);
	moved_wd = watch_path(in_fd, "/out/watched/a/moves", IN_MODIFY);
	link_wd = watch_path(in_fd, "/out/watched/link",
			     IN_DONT_FOLLOW | IN_DELETE_SELF | IN_ATTRIB);
	need(!inotify_rm_watch(in_fd, unwanted));
	removed_wd = watch_path(in_fd, "/out/watched/a/removed", IN_MODIFY);
	shm_wd = watch_path(in_fd, "/dev/shm/watched", IN_MODIFY);
	sys_wd = watch_path(in_fd, "/sys/kernel", IN_OPEN);
	once_wd = watch_path(in_fd, "/out/watched/a/once", IN_ATTRIB | IN_ONESHOT);
	{
		char path[64];

		snprintf(path, sizeof(path), "/proc/self/fd/%d", unnamed_fd);
		unnamed_wd = watch_path(in_fd, path, IN_ATTRIB);
	}
	need(!rename("/out/watched/a/moves", "/out/watched/a/b/moved"));
	need(!unlink("/out/watched/a/removed"));
	/* What was told of that is read. */
	{
		char buf[4096];

		need(read(in_fd, buf, sizeof(buf)) > 0);
	}
	close(create("/out/watched/a/b/queued"));
	watch_path(queued_fd, "/out/watched/a/b/queued", IN_ATTRIB);
	need(!chmod("/out/watched/a/b/queued", 0600));
}

/* The next event is this one. */
static void next_event(char **at, ssize_t *left, int wd, unsigned mask, const char *name)
{
	struct inotify_event *e = (void *)*at;

	need(*left >= (ssize_t)sizeof(*e));
	if (e->wd != wd || e->mask != mask || strcmp(e->len ? e->name : "", name))
		fail("event of %d, %#x, %s instead of %d, %#x, %s", e->wd, e->mask,
		     e->len ? e->name : "", wd, mask, name);
	*at += sizeof(*e) + e->len;
	*left -= sizeof(*e) + e->len;
}

static void no_events(int fd)
{
	char buf[4096];
	struct inotify_event *e = (void *)buf;
	ssize_t n = read(fd, buf, sizeof(buf));

	if (n >= 0)
		fail("%zd bytes of events, the first of %d, %#x, %s", n, e->wd, e->mask, e->len ? e->name : "");
	need(errno == EAGAIN);
}

/* Watches see what is done, and nothing that was done by others. */
static void check_watches(void)
{
	char buf[4096], *at = buf;
	ssize_t left;
	int fd;

	no_events(in_fd);
	need(pwrite(removed_fd, "x", 1, 0) == 1);
	fd = open("/out/watched/a/b/file", O_RDONLY);
	need(fd >= 0 && !close(fd));
	need(!rename("/out/watched/a/b/moved", "/out/watched/moved"));
	need(!truncate("/out/watched/moved", round_no % 7));
	need(!rename("/out/watched/moved", "/out/watched/a/b/moved"));
	need(!truncate("/dev/shm/watched", round_no % 7));
	need(!fchmod(unnamed_fd, 0600));
	need((fd = open("/sys/kernel", O_RDONLY | O_DIRECTORY)) >= 0 && !close(fd));
	left = read(in_fd, buf, sizeof(buf));
	next_event(&at, &left, removed_wd, IN_MODIFY, "");
	next_event(&at, &left, file_wd, IN_OPEN, "");
	next_event(&at, &left, file_wd, IN_CLOSE_NOWRITE, "");
	next_event(&at, &left, dir_wd, IN_MOVED_TO, "moved");
	next_event(&at, &left, moved_wd, IN_MODIFY, "");
	next_event(&at, &left, dir_wd, IN_MOVED_FROM, "moved");
	next_event(&at, &left, shm_wd, IN_MODIFY, "");
	next_event(&at, &left, unnamed_wd, IN_ATTRIB, "");
	next_event(&at, &left, sys_wd, IN_OPEN | IN_ISDIR, "");
	need(left == 0);
	if (round_no % 50 == 49) {
		char *end;

		at = buf;
		need(!chmod("/out/watched/a/once", 0640));
		need(!unlink("/out/watched/link"));
		left = read(in_fd, buf, sizeof(buf));
		next_event(&at, &left, once_wd, IN_ATTRIB, "");
		next_event(&at, &left, once_wd, IN_IGNORED, "");
		next_event(&at, &left, link_wd, IN_ATTRIB, "");
		end = at;
		next_event(&at, &left, link_wd, IN_DELETE_SELF, "");
		next_event(&at, &left, link_wd, IN_IGNORED, "");
		next_event(&at, &left, dir_wd, IN_DELETE, "link");
		need(at > end && left == 0);
		need(!symlink("nowhere", "/out/watched/link"));
		once_wd = watch_path(in_fd, "/out/watched/a/once", IN_ATTRIB | IN_ONESHOT);
		link_wd = watch_path(in_fd, "/out/watched/link", IN_DONT_FOLLOW | IN_DELETE_SELF | IN_ATTRIB);
		need(once_wd > unnamed_wd && link_wd == once_wd + 1);
		at = buf;
		left = read(in_fd, buf, sizeof(buf));
		next_event(&at, &left, dir_wd, IN_CREATE, "link");
		need(left == 0);
	}
}

static void check_inotify(void)
{
	char buf[4096], *at = buf;
	int waiting;
	ssize_t left;

	check_watches();
	need((fcntl(in_fd, F_GETFD) & FD_CLOEXEC) && !(fcntl(queued_fd, F_GETFD) & FD_CLOEXEC));
	/* Events that nobody has read become one that says they are lost. */
	overflows |= again;
	need(!ioctl(queued_fd, FIONREAD, &waiting));
	if (overflows)
		need(waiting == sizeof(struct inotify_event));
	if (round_no % 20 != 19)
		return;
	left = read(queued_fd, buf, sizeof(buf));
	if (overflows)
		next_event(&at, &left, -1, IN_Q_OVERFLOW, "");
	else
		next_event(&at, &left, 1, IN_ATTRIB, "");
	need(left == 0);
	need(!chmod("/out/watched/a/b/queued", 0600));
	overflows = 0;
}

static const struct {
	const char *name;
	void (*make)(void), (*check)(void);
} parts[] = {
	{ "inotify", make_inotify, check_inotify },
};

int main(int argc, char **argv)
{
	report_open("descriptors");
	for (size_t i = 0; i < COUNT(parts); i++)
		if (wanted(argc, argv, parts[i].name))
			parts[i].make();
	for (restored();; doze(20 * MS)) {
		again = restored();
		for (size_t i = 0; i < COUNT(parts); i++)
			if (wanted(argc, argv, parts[i].name))
				parts[i].check();
		tick();
	}
}
