/*
 * descriptors [PART...] - descriptors of what is no file: watches, tasks,
 * namespaces, packets, timers. Each round looks whether they are as they were.
 */
#include "hold.h"

#include <linux/limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

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

/* --- pidfd, and files of /proc that outlive their task --- */

static int live_pidfd, own_pidfd, zombie_pidfd, gone_pidfd[2], gone_file, gone_dir, mounts_fd, late_ep;
static pid_t live_pid, gone_pid;
static char gone_path[64];

struct exit_info { /* struct pidfd_info, first version */
	uint64_t mask, cgroup;
	uint32_t ids[11];
	int32_t code;
};
#define GET_EXIT_INFO _IOWR(0xff, 11, struct exit_info)

static pid_t child_that(int code)
{
	pid_t pid = fork();

	need(pid >= 0);
	if (pid)
		return pid;
	if (code >= 0)
		_exit(code);
	for (;;)
		pause();
}

static int pidfd_of(pid_t pid, unsigned flags)
{
	int fd = syscall(SYS_pidfd_open, pid, flags);

	need(fd >= 0);
	return fd;
}

static void epoll_add(int ep, int fd, unsigned events, uint64_t data)
{
	struct epoll_event ev = { .events = events, .data.u64 = data };

	need(!epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev));
}

static void make_pidfd(void)
{
	int go[2];
	char c;

	live_pid = child_that(-1);
	live_pidfd = pidfd_of(live_pid, O_NONBLOCK);
	own_pidfd = pidfd_of(getpid(), O_EXCL); /* PIDFD_THREAD */
	zombie_pidfd = pidfd_of(child_that(7), 0);
	need(!waitid(P_PIDFD, zombie_pidfd, &(siginfo_t){ 0 }, WEXITED | WNOWAIT));
	need(!pipe(go));
	gone_pid = fork();
	need(gone_pid >= 0);
	if (!gone_pid) {
		need(read(go[0], &c, 1) == 1);
		_exit(3);
	}
	gone_pidfd[0] = pidfd_of(gone_pid, 0);
	gone_pidfd[1] = pidfd_of(gone_pid, O_NONBLOCK);
	snprintf(gone_path, sizeof(gone_path), "/proc/%d/status", gone_pid);
	gone_file = open(gone_path, O_RDONLY | O_CLOEXEC);
	need(gone_file >= 0);
	*strrchr(gone_path, '/') = 0;
	gone_dir = open(gone_path, O_RDONLY | O_DIRECTORY);
	need(gone_dir >= 0);
	need(write(go[1], "x", 1) == 1 && waitpid(gone_pid, NULL, 0) == gone_pid);
	need(!close(go[0]) && !close(go[1]));
	mounts_fd = open("/proc/self/mountinfo", O_RDONLY);
	late_ep = epoll_create1(0);
	need(mounts_fd >= 0 && late_ep >= 0);
	epoll_add(late_ep, live_pidfd, EPOLLIN, 1);
	epoll_add(late_ep, zombie_pidfd, EPOLLIN, 2);
	epoll_add(late_ep, gone_pidfd[0], EPOLLIN | EPOLLONESHOT, 3);
	epoll_add(late_ep, mounts_fd, EPOLLPRI, 4);
	{
		struct epoll_event ev[4];

		need(epoll_wait(late_ep, ev, 4, 0) == 2); /* the third has fired */
	}
}

/* --- a thread, by a pidfd of it and its file in /proc --- */

static int thread_pidfd, thread_file;
static volatile pid_t thread_tid;

static void *be_thread(void *arg)
{
	thread_tid = gettid();
	for (;;)
		pause();
	return arg;
}

static void make_thread(void)
{
	pthread_t t;
	char path[64];

	need(!pthread_create(&t, NULL, be_thread, NULL));
	while (!thread_tid)
		doze(MS);
	thread_pidfd = pidfd_of(thread_tid, O_EXCL | O_NONBLOCK);
	snprintf(path, sizeof(path), "/proc/self/task/%d/comm", thread_tid);
	thread_file = open(path, O_RDWR | O_CLOEXEC);
	need(thread_file >= 0);
}

static void check_thread(void)
{
	char line[64];

	snprintf(line, sizeof(line), "\nPid:\t%d\n", thread_tid);
	need(strstr(info_of(thread_pidfd), line));
	need((fcntl(thread_pidfd, F_GETFL) & (O_EXCL | O_NONBLOCK)) == (O_EXCL | O_NONBLOCK));
	need(!syscall(SYS_pidfd_send_signal, thread_pidfd, 0, NULL, 0));
	need(write(thread_file, "named", 5) == 5 && !lseek(thread_file, 0, SEEK_SET));
	memset(line, 0, sizeof(line));
	need(read(thread_file, line, sizeof(line)) == 6 && !strcmp(line, "named\n"));
	need(!lseek(thread_file, 0, SEEK_SET));
	need(fcntl(thread_file, F_GETFD) & FD_CLOEXEC);
}

/* A path that /proc shows of a descriptor. */
static const char *link_of(int fd)
{
	static char text[128];
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, text, sizeof(text) - 1);
	need(n > 0);
	text[n] = 0;
	return text;
}

static void check_gone(void)
{
	struct exit_info info = { .mask = 1 << 3 };
	struct stat a, b;
	char c;

	for (int i = 0; i < 2; i++) {
		struct pollfd p = { gone_pidfd[i], POLLIN, 0 };

		need(strstr(info_of(gone_pidfd[i]), "\nPid:\t-1\n"));
		need(syscall(SYS_pidfd_send_signal, gone_pidfd[i], 0, NULL, 0) == -1 && errno == ESRCH);
		need(poll(&p, 1, 0) == 1 && p.revents == (POLLIN | POLLHUP));
		need(!!(fcntl(gone_pidfd[i], F_GETFL) & O_NONBLOCK) == i);
	}
	need(!ioctl(gone_pidfd[0], GET_EXIT_INFO, &info));
	need((info.mask & 1 << 3) && WIFEXITED(info.code) && WEXITSTATUS(info.code) == 3);
	need(!fstat(gone_pidfd[0], &a) && !fstat(gone_pidfd[1], &b) && a.st_ino == b.st_ino);
	need(!fstat(live_pidfd, &b) && a.st_ino != b.st_ino);
	need(read(gone_file, &c, 1) == -1 && errno == ESRCH);
	need((fcntl(gone_file, F_GETFD) & FD_CLOEXEC));
	need(!strncmp(link_of(gone_file), gone_path, strlen(gone_path)) && strstr(link_of(gone_file), "/status"));
	need(openat(gone_dir, "status", O_RDONLY) == -1 && (errno == ENOENT || errno == ESRCH));
}

static void check_pidfd(void)
{
	struct epoll_event ev[4];
	siginfo_t si = { 0 };
	char line[64];
	struct pollfd p = { live_pidfd, POLLIN, 0 };

	snprintf(line, sizeof(line), "\nPid:\t%d\n", live_pid);
	need(strstr(info_of(live_pidfd), line));
	need(fcntl(live_pidfd, F_GETFL) & O_NONBLOCK);
	need(!syscall(SYS_pidfd_send_signal, live_pidfd, 0, NULL, 0));
	need(poll(&p, 1, 0) == 0);
	need(waitid(P_PIDFD, live_pidfd, &si, WEXITED) == -1 && errno == EAGAIN);
	snprintf(line, sizeof(line), "\nPid:\t%d\n", getpid());
	need(strstr(info_of(own_pidfd), line) && (fcntl(own_pidfd, F_GETFL) & O_EXCL));
	need(!syscall(SYS_pidfd_send_signal, own_pidfd, 0, NULL, 0));
	need(!waitid(P_PIDFD, zombie_pidfd, &si, WEXITED | WNOWAIT | WNOHANG));
	need(si.si_code == CLD_EXITED && si.si_status == 7);
	check_gone();
	need(epoll_wait(late_ep, ev, 4, 0) == 1 && ev[0].data.u64 == 2);
}

/* --- namespaces --- */

static int own_ns[8], nested_ns, nested_user;
static const char *const ns_names[] = { "cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts" };
static pid_t nested_pid;

static void same_namespace(int fd, pid_t pid, const char *name)
{
	char path[64], text[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", pid, name);
	n = readlink(path, text, sizeof(text) - 1);
	need(n > 0);
	text[n] = 0;
	if (strcmp(text, link_of(fd)))
		fail("%s is not %s any more but %s", path, link_of(fd), text);
}

static int open_namespace(pid_t pid, const char *name)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/ns/%s", pid, name);
	fd = open(path, O_RDONLY);
	need(fd >= 0);
	return fd;
}

static void make_namespaces(void)
{
	int ready[2];
	char c;

	for (size_t i = 0; i < COUNT(own_ns); i++)
		own_ns[i] = open_namespace(getpid(), ns_names[i]);
	need(!pipe(ready));
	nested_pid = fork();
	need(nested_pid >= 0);
	if (!nested_pid) {
		need(!unshare(CLONE_NEWUSER | CLONE_NEWUTS));
		need(write(ready[1], "x", 1) == 1 && !close(ready[0]) && !close(ready[1]));
		for (;;)
			pause();
	}
	need(read(ready[0], &c, 1) == 1);
	need(!close(ready[0]) && !close(ready[1]));
	nested_ns = open_namespace(nested_pid, "uts");
	nested_user = open_namespace(nested_pid, "user");
}

static void check_namespaces(void)
{
	for (size_t i = 0; i < COUNT(own_ns); i++)
		same_namespace(own_ns[i], getpid(), ns_names[i]);
	same_namespace(nested_ns, nested_pid, "uts");
	same_namespace(nested_user, nested_pid, "user");
}

/* --- epoll: entries that have fired, exclusive ones, parameters --- */

#define SPENT 12
static int odd_ep, spent_pipe[SPENT][2], odd_event, odd_listener, closed_dup, spent_used;
static unsigned long odd_sum;

struct busy_poll { /* struct epoll_params */
	uint32_t usecs;
	uint16_t budget;
	uint8_t prefer, pad;
};
#define GET_BUSY_POLL _IOR(0x8a, 2, struct busy_poll)
#define SET_BUSY_POLL _IOW(0x8a, 1, struct busy_poll)

/* What stands in fdinfo of an epoll's entries, in whatever order. */
static unsigned long entries_of(int ep)
{
	unsigned long sum = 0, data;
	unsigned tfd, events;

	for (char *p = info_of(ep); (p = strstr(p, "tfd:")); p++)
		if (sscanf(p, "tfd: %u events: %x data: %lx", &tfd, &events, &data) == 3)
			sum += (tfd * 31UL + events) * 1000003UL + data * 7919UL;
	return sum;
}

static void make_epoll(void)
{
	struct busy_poll busy = { 40, 8, 1, 0 };
	struct epoll_event ev[SPENT + 4];
	struct sockaddr_un un = { .sun_family = AF_UNIX, .sun_path = "\0descriptors" };
	int fd;
	char c;

	odd_ep = epoll_create1(EPOLL_CLOEXEC);
	odd_event = eventfd(0, EFD_NONBLOCK);
	odd_listener = socket(AF_UNIX, SOCK_STREAM, 0);
	need(odd_ep >= 0 && odd_event >= 0 && odd_listener >= 0);
	need(!bind(odd_listener, (void *)&un, sizeof(sa_family_t) + 12) && !listen(odd_listener, 4));
	for (int i = 0; i < SPENT; i++) {
		need(!pipe(spent_pipe[i]) && write(spent_pipe[i][1], "x", 1) == 1);
		epoll_add(odd_ep, spent_pipe[i][0], EPOLLIN | EPOLLONESHOT | (i & 1 ? EPOLLET : 0), i);
	}
	epoll_add(odd_ep, spent_pipe[0][1], EPOLLOUT | EPOLLONESHOT, 100);
	epoll_add(odd_ep, odd_event, EPOLLOUT | EPOLLONESHOT, 101);
	need(epoll_wait(odd_ep, ev, COUNT(ev), 0) == SPENT + 2);
	for (int i = 0; i < SPENT; i++)
		need(read(spent_pipe[i][0], &c, 1) == 1);
	fd = dup(odd_event);
	need(fd >= 0);
	epoll_add(odd_ep, fd, EPOLLIN | EPOLLEXCLUSIVE | EPOLLET, 102);
	closed_dup = dup(odd_event);
	need(closed_dup >= 0);
	epoll_add(odd_ep, closed_dup, EPOLLIN | EPOLLRDHUP, 103);
	need(!close(closed_dup)); /* its entry stays, for the file is open */
	epoll_add(odd_ep, odd_listener, EPOLLIN | EPOLLONESHOT, 104); /* that has not fired */
	need(!ioctl(odd_ep, SET_BUSY_POLL, &busy));
	odd_sum = entries_of(odd_ep);
}

static void check_epoll(void)
{
	struct busy_poll busy = { 0 };
	struct epoll_event ev[SPENT + 8];

	need(!ioctl(odd_ep, GET_BUSY_POLL, &busy) && busy.usecs == 40 && busy.budget == 8 && busy.prefer == 1);
	need(entries_of(odd_ep) == odd_sum);
	need(epoll_wait(odd_ep, ev, COUNT(ev), 0) == 0);
	if (again && spent_used < SPENT) { /* a hang-up that nobody has asked for */
		need(!close(spent_pipe[spent_used][1]));
		need(epoll_wait(odd_ep, ev, COUNT(ev), 0) == 0);
		ev[0].events = EPOLLONESHOT;
		ev[0].data.u64 = 5;
		need(!epoll_ctl(odd_ep, EPOLL_CTL_MOD, spent_pipe[spent_used][0], ev));
		need(epoll_wait(odd_ep, ev, COUNT(ev), 0) == 1 && ev[0].events == EPOLLHUP && ev[0].data.u64 == 5);
		spent_used++;
		odd_sum = entries_of(odd_ep);
	}
	need(!eventfd_write(odd_event, 1));
	need(epoll_wait(odd_ep, ev, COUNT(ev), 0) == 2);
	for (int i = 0; i < 2; i++)
		need(ev[i].events == EPOLLIN && (ev[i].data.u64 == 102 || ev[i].data.u64 == 103));
	need(!eventfd_read(odd_event, &(eventfd_t){ 0 }));
}

/* --- pipes: packets, many of them, full ones, fifos without a name --- */

#define PIPES 100
static int packet_pipe[2], mixed_pipe[2], many[PIPES][2], lost_fifo[2], full_pipe[2];
static pid_t blocked_pid;
static const int packet_sizes[] = { 3, 1, 4096, 1, 700 };

static void put_packets(void)
{
	char buf[4096];

	for (size_t i = 0; i < COUNT(packet_sizes); i++) {
		memset(buf, 'a' + i, sizeof(buf));
		need(write(packet_pipe[1], buf, packet_sizes[i]) == packet_sizes[i]);
	}
	/* A stream, a packet behind it, and a stream again. */
	memset(buf, 's', sizeof(buf));
	need(write(mixed_pipe[1], buf, 4096) == 4096);
	need(!fcntl(mixed_pipe[1], F_SETFL, O_NONBLOCK | O_DIRECT));
	need(write(mixed_pipe[1], "packet", 6) == 6);
	need(!fcntl(mixed_pipe[1], F_SETFL, O_NONBLOCK));
	need(write(mixed_pipe[1], "stream", 6) == 6);
	need(write(lost_fifo[0], "lost", 4) == 4);
}

static void take_packets(void)
{
	char buf[16384];

	for (size_t i = 0; i < COUNT(packet_sizes); i++) {
		need(read(packet_pipe[0], buf, sizeof(buf)) == packet_sizes[i]);
		for (int k = 0; k < packet_sizes[i]; k++)
			need(buf[k] == (char)('a' + i));
	}
	need(read(packet_pipe[0], buf, sizeof(buf)) == -1 && errno == EAGAIN);
	need(read(mixed_pipe[0], buf, sizeof(buf)) == 4096 + 6);
	need(!memcmp(buf + 4096, "packet", 6));
	need(read(mixed_pipe[0], buf, sizeof(buf)) == 6 && !memcmp(buf, "stream", 6));
	need(read(mixed_pipe[0], buf, sizeof(buf)) == -1 && errno == EAGAIN);
	need(read(lost_fifo[1], buf, sizeof(buf)) == 4 && !memcmp(buf, "lost", 4));
	need(read(lost_fifo[1], buf, sizeof(buf)) == -1 && errno == EAGAIN);
}

#define FULL 100000

/* Writes more than there is room for, over and over. */
static void write_blocked(void)
{
	static char buf[FULL];

	for (size_t i = 0; i < FULL; i++)
		buf[i] = i % 251;
	for (;;)
		for (size_t done = 0; done < FULL;) {
			ssize_t n = write(full_pipe[1], buf + done, FULL - done);

			need(n > 0);
			done += n;
		}
}

static void make_pipes(void)
{
	need(!pipe2(packet_pipe, O_DIRECT | O_NONBLOCK));
	need(!pipe2(mixed_pipe, O_NONBLOCK));
	unlink("/out/descriptors.fifo");
	need(!mkfifo("/out/descriptors.fifo", 0640));
	lost_fifo[0] = open("/out/descriptors.fifo", O_RDWR | O_NONBLOCK);
	lost_fifo[1] = open("/out/descriptors.fifo", O_RDONLY | O_NONBLOCK);
	need(lost_fifo[0] >= 0 && lost_fifo[1] >= 0 && !unlink("/out/descriptors.fifo"));
	for (int i = 0; i < PIPES; i++) {
		need(!pipe(many[i]));
		need(write(many[i][1], &i, sizeof(i)) == sizeof(i));
	}
	need(!pipe(full_pipe));
	blocked_pid = fork();
	need(blocked_pid >= 0);
	if (!blocked_pid)
		write_blocked();
	put_packets();
}

static void check_pipes(void)
{
	static size_t taken;
	struct stat st;
	int queued, at;
	char buf[1000];

	take_packets();
	put_packets();
	need(fcntl(packet_pipe[1], F_GETFL) == (O_WRONLY | O_DIRECT | O_NONBLOCK));
	need(fcntl(mixed_pipe[1], F_GETFL) == (O_WRONLY | O_NONBLOCK));
	need(!fstat(lost_fifo[0], &st) && S_ISFIFO(st.st_mode) && (st.st_mode & 07777) == 0640 && st.st_nlink == 0);
	need(!strcmp(link_of(lost_fifo[1]), "/out/descriptors.fifo (deleted)"));
	for (int i = 0; i < PIPES; i++)
		need(!ioctl(many[i][0], FIONREAD, &queued) && queued == sizeof(i));
	need(read(many[round_no % PIPES][0], &at, sizeof(at)) == sizeof(at) && at == (int)(round_no % PIPES));
	need(write(many[round_no % PIPES][1], &at, sizeof(at)) == sizeof(at));
	for (int i = 0; i < 10; i++) {
		size_t have = 0;

		while (have < sizeof(buf)) {
			ssize_t n = read(full_pipe[0], buf + have, sizeof(buf) - have);

			need(n > 0);
			have += n;
		}
		for (size_t k = 0; k < sizeof(buf); k++)
			need((unsigned char)buf[k] == (taken + k) % FULL % 251);
		taken += sizeof(buf);
	}
}

/* --- timerfd: by its clock each goes off when it would have --- */

#define PERIOD (37 * MS)
#define FAR (3000 * SEC)
#define EXACT (4 * MS)
static const clockid_t timer_clocks[] = { CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME };
static int relative_fd[3], absolute_fd[3], cancel_fd, ticking_fd, unread_fd, once_fd;
static long long relative_end[3], absolute_end[3], cancel_end, tick_begin, unread_begin;
static unsigned long long ticked;

static int new_timer(clockid_t clock, int flags, long long value, long long interval)
{
	struct itimerspec spec = { to_timespec(interval), to_timespec(value) };
	int fd = timerfd_create(clock, TFD_NONBLOCK);

	need(fd >= 0 && !timerfd_settime(fd, flags, &spec, NULL));
	return fd;
}

static void make_timers(void)
{
	for (size_t i = 0; i < COUNT(timer_clocks); i++) {
		relative_end[i] = clock_ns(i == 2 ? CLOCK_MONOTONIC : timer_clocks[i]) + FAR;
		relative_fd[i] = new_timer(timer_clocks[i], 0, FAR, 0);
		absolute_end[i] = clock_ns(timer_clocks[i]) + FAR;
		absolute_fd[i] = new_timer(timer_clocks[i], TFD_TIMER_ABSTIME, absolute_end[i], 0);
	}
	cancel_end = clock_ns(CLOCK_REALTIME) + FAR;
	cancel_fd = new_timer(CLOCK_REALTIME, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, cancel_end, SEC);
	tick_begin = unread_begin = mono_ns();
	ticking_fd = new_timer(CLOCK_MONOTONIC, TFD_TIMER_ABSTIME, tick_begin + PERIOD, PERIOD);
	unread_fd = new_timer(CLOCK_BOOTTIME, 0, PERIOD, PERIOD);
	once_fd = new_timer(CLOCK_MONOTONIC, 0, 1, 0);
}

/* How far a timer is from its end, from where it should be. */
static void exact(int fd, long long end, clockid_t clock)
{
	struct itimerspec now;
	long long off = clock_ns(clock) - end, after;

	need(!timerfd_gettime(fd, &now));
	after = clock_ns(clock) - end;
	off += now.it_value.tv_sec * SEC + now.it_value.tv_nsec;
	after += now.it_value.tv_sec * SEC + now.it_value.tv_nsec;
	if (off > EXACT || after < -EXACT)
		fail("a timer of clock %d is off by %lld to %lld microseconds", clock, off / 1000, after / 1000);
}

static void periods(long long n, long long least, long long most)
{
	if (n < (least - EXACT) / PERIOD || n > most / PERIOD)
		fail("%lld periods after %lld to %lld microseconds", n, least / 1000, most / 1000);
}

static void check_timers(void)
{
	long long before;
	uint64_t n = 0;

	for (size_t i = 0; i < COUNT(timer_clocks); i++) {
		exact(relative_fd[i], relative_end[i], i == 2 ? CLOCK_MONOTONIC : timer_clocks[i]);
		exact(absolute_fd[i], absolute_end[i], timer_clocks[i]);
		need(strstr(info_of(absolute_fd[i]), "settime flags: 01\n"));
		need(strstr(info_of(relative_fd[i]), "settime flags: 00\n"));
	}
	exact(cancel_fd, cancel_end, CLOCK_REALTIME);
	need(strstr(info_of(cancel_fd), "settime flags: 03\n"));
	need(strstr(info_of(once_fd), "ticks: 1\n") || !round_no);
	before = mono_ns();
	if (read(ticking_fd, &n, 8) == 8)
		ticked += n;
	periods(ticked, before - tick_begin, mono_ns() - tick_begin);
	if (round_no % 20 != 19)
		return;
	before = mono_ns();
	need(read(unread_fd, &n, 8) == 8);
	periods(n, before - unread_begin, mono_ns() - unread_begin);
	unread_begin += n * PERIOD;
}

/* --- fanotify: what anybody may have, and what takes CAP_SYS_ADMIN --- */

static int fan_fd, fan_all = -1, fan_used;

static void make_fanotify(void)
{
	fan_fd = syscall(SYS_fanotify_init, FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_NONBLOCK | FAN_CLOEXEC, O_RDONLY);
	need(fan_fd >= 0);
	mkdir("/dev/shm/marked", 0755);
	close(create("/dev/shm/marked/file"));
	close(create("/dev/shm/marked/quiet"));
	need(!fanotify_mark(fan_fd, FAN_MARK_ADD, FAN_ATTRIB | FAN_MODIFY, AT_FDCWD, "/dev/shm/marked/file"));
	need(!fanotify_mark(fan_fd, FAN_MARK_ADD, FAN_ATTRIB | FAN_EVENT_ON_CHILD | FAN_ONDIR, AT_FDCWD, "/dev/shm/marked"));
	need(!fanotify_mark(fan_fd, FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, FAN_ATTRIB, AT_FDCWD, "/dev/shm/marked/quiet"));
	fan_all = syscall(SYS_fanotify_init, FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC, O_RDWR);
	if (fan_all < 0) {
		need(errno == EPERM);
		return;
	}
	need(!fanotify_mark(fan_all, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_CLOSE_WRITE, AT_FDCWD, "/dev/shm"));
	need(!fanotify_mark(fan_all, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN, AT_FDCWD, "/dev/mqueue"));
	need(!fanotify_mark(fan_all, FAN_MARK_ADD | FAN_MARK_IGNORE_SURV, FAN_CLOSE_WRITE, AT_FDCWD, "/dev/shm/marked/quiet"));
}

/* Reads events, which are about these, and closes what they come with. */
static void fan_events(int fd, int count, unsigned long long mask)
{
	char buf[4096];
	ssize_t n = read(fd, buf, sizeof(buf));
	struct fanotify_event_metadata *e = (void *)buf;

	if (count == 0) {
		need(n == -1 && errno == EAGAIN);
		return;
	}
	for (; count > 0; count--, e = FAN_EVENT_NEXT(e, n)) {
		need(FAN_EVENT_OK(e, n));
		if (e->mask != mask)
			fail("an event %#llx instead of %#llx", e->mask, mask);
		need(e->fd < 0 || !close(e->fd));
	}
	need(n == 0);
}

static void check_fanotify(void)
{
	int fd;

	fan_events(fan_fd, 0, 0);
	need(!chmod("/dev/shm/marked/file", 0600));
	need(!chmod("/dev/shm/marked/quiet", 0600));
	fan_events(fan_fd, 1, FAN_ATTRIB);
	need(!chmod("/dev/shm/marked", 0755));
	fan_events(fan_fd, 1, FAN_ATTRIB | FAN_ONDIR);
	need((fcntl(fan_fd, F_GETFL) & O_NONBLOCK) && (fcntl(fan_fd, F_GETFD) & FD_CLOEXEC));
	if (fan_all < 0)
		return;
	fan_events(fan_all, 0, 0);
	fd = open("/dev/shm/marked/file", O_RDWR);
	need(fd >= 0 && !close(fd));
	fd = open("/dev/shm/marked/quiet", O_RDWR);
	need(fd >= 0 && !close(fd));
	fan_events(fan_all, 1, FAN_CLOSE_WRITE);
	fan_used++;
}

static const struct part parts[] = {
	{ "inotify", make_inotify, check_inotify },
	{ "pidfd", make_pidfd, check_pidfd },
	{ "namespaces", make_namespaces, check_namespaces },
	{ "pipes", make_pipes, check_pipes },
	{ "thread", make_thread, check_thread }, /* behind all who fork, with the next */
	{ "epoll", make_epoll, check_epoll },
	{ "fanotify", make_fanotify, check_fanotify },
	{ "timers", make_timers, check_timers },
};

int main(int argc, char **argv)
{
	report_open("descriptors");
	make_parts(argc, argv, parts, COUNT(parts));
	for (restored();; doze(20 * MS)) {
		again = restored();
		check_parts(argc, argv, parts, COUNT(parts));
	}
}
