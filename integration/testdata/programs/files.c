/*
 * files [PART...] - open files of every kind with their state: flags, offsets,
 * contents in flight, who shares them. A child holds the other end of some.
 *
 * Sockets only listen. A connection is made when the harness creates
 * /out/files.connect, which is removed once every listener has accepted one:
 * so none is open at the moment of a checkpoint.
 */
#include "hold.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

/* --- regular files --- */

static int plain_fd, append_fd, readonly_fd;
static off_t plain_at;

static void make_regular(void)
{
	plain_fd = open("/out/files.plain", O_RDWR | O_CREAT | O_TRUNC, 0640);
	need(plain_fd >= 0 && write(plain_fd, "0123456789", 10) == 10);
	append_fd = open("/out/files.append",
			 O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
	readonly_fd = open("/out/files.plain", O_RDONLY | O_NOFOLLOW);
	need(append_fd >= 0 && readonly_fd >= 0);
	need(lseek(readonly_fd, 3, SEEK_SET) == 3);
	plain_at = 10;
}

static void check_regular(void)
{
	char c;

	need(lseek(plain_fd, 0, SEEK_CUR) == plain_at);
	plain_at = 10 + round_no % 4096;
	need(lseek(plain_fd, plain_at, SEEK_SET) == plain_at);
	need(lseek(readonly_fd, 0, SEEK_CUR) == 3);
	need(pread(readonly_fd, &c, 1, 4) == 1 && c == '4');
	need(write(readonly_fd, "x", 1) == -1 && errno == EBADF);
	need((fcntl(append_fd, F_GETFL) & (O_APPEND | O_ACCMODE)) ==
	     (O_APPEND | O_WRONLY));
	/* Appending ignores the offset, wherever it is. */
	need(lseek(append_fd, 0, SEEK_SET) == 0);
	need(write(append_fd, "a", 1) == 1);
	need(lseek(append_fd, 0, SEEK_CUR) == (off_t)round_no + 1);
}

/* --- a directory read half-way --- */

static int dir_fd;
static off_t dir_at;
static char dir_rest[4096];
static ssize_t dir_rest_size;

static void make_directory(void)
{
	char name[64], some[128];

	mkdir("/out/files.dir", 0755);
	for (int i = 0; i < 40; i++) {
		snprintf(name, sizeof(name), "/out/files.dir/%d", i);
		close(open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	}
	dir_fd = open("/out/files.dir", O_RDONLY | O_DIRECTORY);
	need(dir_fd >= 0);
	need(getdents64(dir_fd, some, sizeof(some)) > 0);
	dir_at = lseek(dir_fd, 0, SEEK_CUR);
	dir_rest_size = getdents64(dir_fd, dir_rest, sizeof(dir_rest));
	need(dir_rest_size > 0);
	need(lseek(dir_fd, dir_at, SEEK_SET) == dir_at);
}

static void check_directory(void)
{
	static char now[sizeof(dir_rest)];

	need(lseek(dir_fd, 0, SEEK_CUR) == dir_at);
	need(getdents64(dir_fd, now, sizeof(now)) == dir_rest_size);
	need(!memcmp(now, dir_rest, dir_rest_size));
	need(lseek(dir_fd, dir_at, SEEK_SET) == dir_at);
}

/* --- devices --- */

static int null_fd, zero_fd;

static void make_devices(void)
{
	null_fd = open("/dev/null", O_RDWR);
	zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	need(null_fd >= 0 && zero_fd >= 0);
}

static void check_devices(void)
{
	char c = 'x';

	need(write(null_fd, &c, 1) == 1 && read(null_fd, &c, 1) == 0);
	need(read(zero_fd, &c, 1) == 1 && c == 0);
}

/* --- pipes and fifos with contents --- */

#define CONTENT 10000
static int pipe_fd[2], small_fd[2], fifo_fd;

static char content_at(size_t i, unsigned seed)
{
	return (i * 31 + seed) % 251;
}

static void put_content(int fd, unsigned seed)
{
	char buf[CONTENT];

	for (size_t i = 0; i < CONTENT; i++)
		buf[i] = content_at(i, seed);
	need(write(fd, buf, CONTENT) == CONTENT);
}

static void check_content(int fd, unsigned seed)
{
	char buf[CONTENT + 1];
	int queued = 0;

	need(!ioctl(fd, FIONREAD, &queued) && queued == CONTENT);
	need(read(fd, buf, sizeof(buf)) == CONTENT);
	for (size_t i = 0; i < CONTENT; i++)
		need(buf[i] == content_at(i, seed));
}

static void make_pipes(void)
{
	need(!pipe2(pipe_fd, O_NONBLOCK));
	put_content(pipe_fd[1], 1);
	need(!pipe2(small_fd, O_CLOEXEC));
	need(fcntl(small_fd[1], F_SETPIPE_SZ, 16384) == 16384);
	unlink("/out/files.fifo");
	need(!mkfifo("/out/files.fifo", 0600));
	fifo_fd = open("/out/files.fifo", O_RDWR);
	need(fifo_fd >= 0);
	put_content(fifo_fd, 2);
}

static void check_pipes(void)
{
	check_content(pipe_fd[0], 1);
	put_content(pipe_fd[1], 1);
	need(fcntl(pipe_fd[0], F_GETFL) & O_NONBLOCK);
	need(fcntl(small_fd[0], F_GETPIPE_SZ) == 16384);
	check_content(fifo_fd, 2);
	put_content(fifo_fd, 2);
}

/* --- sharing: duplicates here, and one open file of two processes --- */

static int shared_fd, shared_dup, other_fd, to_child[2], from_child[2];

/* The child answers each byte with the offset it sees in the shared file. */
static void child(void)
{
	off_t at;
	char c;

	close(to_child[1]);
	close(from_child[0]);
	while (read(to_child[0], &c, 1) == 1) {
		at = lseek(shared_fd, 0, SEEK_CUR);
		need(write(from_child[1], &at, sizeof(at)) == sizeof(at));
	}
	_exit(0);
}

static void make_sharing(void)
{
	shared_fd = open("/out/files.plain", O_RDONLY | O_CREAT, 0600);
	shared_dup = fcntl(shared_fd, F_DUPFD_CLOEXEC, 100);
	other_fd = open("/out/files.plain", O_RDONLY);
	need(shared_fd >= 0 && shared_dup >= 100 && other_fd >= 0);
	need(!pipe(to_child) && !pipe(from_child));
	if (!fork())
		child();
	close(to_child[0]);
	close(from_child[1]);
}

static void check_sharing(void)
{
	off_t at = round_no, seen;

	need(lseek(shared_fd, at, SEEK_SET) == at);
	need(lseek(shared_dup, 0, SEEK_CUR) == at);
	need(lseek(other_fd, 0, SEEK_CUR) == 0);
	need(write(to_child[1], "?", 1) == 1);
	need(read(from_child[0], &seen, sizeof(seen)) == sizeof(seen));
	need(seen == at);
	need(fcntl(shared_fd, F_GETFD) == 0);
	need(fcntl(shared_dup, F_GETFD) == FD_CLOEXEC);
}

/* --- eventfd --- */

static int count_fd, semaphore_fd;

static void make_eventfd(void)
{
	count_fd = eventfd(7, EFD_NONBLOCK);
	semaphore_fd = eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC);
	need(count_fd >= 0 && semaphore_fd >= 0);
}

static void check_eventfd(void)
{
	eventfd_t value;

	need(!eventfd_read(count_fd, &value) && value == 7);
	need(eventfd_read(count_fd, &value) == -1 && errno == EAGAIN);
	need(!eventfd_write(count_fd, 7));
	need(!eventfd_read(semaphore_fd, &value) && value == 1);
	need(!eventfd_write(semaphore_fd, 1));
}

/* --- timerfd --- */

#define TICK (100 * MS)
static int tick_fd, far_fd, idle_fd;
static long long tick_since, far_at;
static uint64_t ticks;
static struct worker ticker = { .name = "timerfd" };

static void make_timerfd(void)
{
	struct itimerspec every = { to_timespec(TICK), to_timespec(TICK) };
	struct itimerspec far = { { 0, 0 }, { 0, 0 } };

	tick_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	far_fd = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC);
	idle_fd = timerfd_create(CLOCK_REALTIME, 0);
	tick_since = mono_ns();
	need(!timerfd_settime(tick_fd, 0, &every, NULL));
	far_at = clock_ns(CLOCK_BOOTTIME) + 3600 * SEC;
	far.it_value = to_timespec(far_at);
	need(!timerfd_settime(far_fd, TFD_TIMER_ABSTIME, &far, NULL));
}

static void check_timerfd(void)
{
	struct itimerspec now;
	uint64_t n;
	long long left;

	if (read(tick_fd, &n, 8) == 8)
		ticks += n;
	else
		need(errno == EAGAIN);
	/* A timer that stood still may miss ticks; none comes too early. */
	need((long long)ticks <= (mono_ns() - tick_since) / TICK + 1);
	ticker.done = ticks;
	watch(&ticker, 1);
	need(!timerfd_gettime(tick_fd, &now));
	need(now.it_interval.tv_nsec == TICK);
	need(!timerfd_gettime(far_fd, &now));
	left = now.it_value.tv_sec * SEC + now.it_value.tv_nsec;
	left -= far_at - clock_ns(CLOCK_BOOTTIME);
	need(left >= -10 * MS && left <= SEC);
	need(!timerfd_gettime(idle_fd, &now));
	need(!now.it_value.tv_sec && !now.it_value.tv_nsec);
}

/* --- epoll --- */

static int epoll_fd, level_fd, edge_fd, quiet_pipe[2];

static void watch_fd(int ep, int fd, unsigned events, uint64_t data)
{
	struct epoll_event ev = { .events = events, .data.u64 = data };

	need(fd >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev));
}

static void make_epoll(void)
{
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	level_fd = eventfd(0, EFD_NONBLOCK);
	edge_fd = eventfd(0, EFD_NONBLOCK);
	need(!pipe(quiet_pipe));
	watch_fd(epoll_fd, level_fd, EPOLLIN, 0x1111111122222222);
	watch_fd(epoll_fd, edge_fd, EPOLLIN | EPOLLET, 0x3333333344444444);
	watch_fd(epoll_fd, quiet_pipe[0], EPOLLIN | EPOLLONESHOT, 0x55);
}

/* Waits for exactly the event with data. */
static void expect_event(int ep, uint64_t data)
{
	struct epoll_event ev[8];
	int n = epoll_wait(ep, ev, COUNT(ev), 1000);

	if (n != 1 || ev[0].data.u64 != data || ev[0].events != EPOLLIN)
		fail("epoll: %d events, first %llx, wanted %llx", n,
		     (unsigned long long)ev[0].data.u64,
		     (unsigned long long)data);
}

static void expect_silence(int ep)
{
	struct epoll_event ev;

	need(epoll_wait(ep, &ev, 1, 0) == 0);
}

static void check_epoll(void)
{
	eventfd_t value;

	expect_silence(epoll_fd);
	need(!eventfd_write(level_fd, 1));
	expect_event(epoll_fd, 0x1111111122222222);
	expect_event(epoll_fd, 0x1111111122222222);
	need(!eventfd_read(level_fd, &value));
	need(!eventfd_write(edge_fd, 1));
	expect_event(epoll_fd, 0x3333333344444444);
	/* That it is not reported again cannot be asked for here: adding the
	 * descriptor anew at restore rearms the edge, as epoll(7) allows. */
	need(!eventfd_read(edge_fd, &value) && value == 1);
	expect_silence(epoll_fd);
}

/* An entry stays in the interest list under a number that was closed, as long
 * as a duplicate keeps the open file alive. */
static int dup_epoll_fd, kept_fd;

static void make_epoll_dup(void)
{
	int fd = eventfd(0, EFD_NONBLOCK);

	dup_epoll_fd = epoll_create1(0);
	watch_fd(dup_epoll_fd, fd, EPOLLIN, 0x77);
	kept_fd = fcntl(fd, F_DUPFD, 200);
	need(kept_fd >= 200 && !close(fd));
}

static void check_epoll_dup(void)
{
	eventfd_t value;

	need(!eventfd_write(kept_fd, 1));
	expect_event(dup_epoll_fd, 0x77);
	need(!eventfd_read(kept_fd, &value));
	expect_silence(dup_epoll_fd);
}

/* --- listening sockets --- */

static struct listener {
	union {
		struct sockaddr any;
		struct sockaddr_in in;
		struct sockaddr_in6 in6;
		struct sockaddr_un un;
	} addr;
	socklen_t len;
	int fd;
} listeners[4];

static void make_addresses(void)
{
	static const char path[] = "/out/files.sock", name[] = "\0files";

	listeners[0].addr.in = (struct sockaddr_in){
		AF_INET, htons(7001), { htonl(INADDR_LOOPBACK) }, { 0 }
	};
	listeners[0].len = sizeof(struct sockaddr_in);
	listeners[1].addr.in6.sin6_family = AF_INET6;
	listeners[1].addr.in6.sin6_port = htons(7002);
	listeners[1].addr.in6.sin6_addr = in6addr_loopback;
	listeners[1].len = sizeof(struct sockaddr_in6);
	listeners[2].addr.un.sun_family = AF_UNIX;
	memcpy(listeners[2].addr.un.sun_path, path, sizeof(path));
	listeners[2].len = sizeof(struct sockaddr_un);
	listeners[3].addr.un.sun_family = AF_UNIX;
	memcpy(listeners[3].addr.un.sun_path, name, sizeof(name) - 1);
	listeners[3].len = sizeof(sa_family_t) + sizeof(name) - 1;
	unlink(path);
}

static void make_listeners(void)
{
	int on = 1;

	make_addresses();
	for (size_t i = 0; i < COUNT(listeners); i++) {
		struct listener *l = &listeners[i];

		l->fd = socket(l->addr.any.sa_family,
			       SOCK_STREAM | SOCK_CLOEXEC, 0);
		need(l->fd >= 0);
		need(!setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &on,
				 sizeof(on)));
		need(!bind(l->fd, &l->addr.any, l->len));
		need(!listen(l->fd, 16));
	}
}

static void accept_one(struct listener *l)
{
	struct linger reset = { 1, 0 }; /* leaves no TIME_WAIT behind */
	int there, here = socket(l->addr.any.sa_family, SOCK_STREAM, 0);
	char c = 0;

	need(here >= 0);
	need(!connect(here, &l->addr.any, l->len));
	there = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC);
	need(there >= 0);
	need(write(here, "!", 1) == 1 && read(there, &c, 1) == 1 && c == '!');
	need(!setsockopt(here, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
	close(here);
	close(there);
}

static void check_listeners(void)
{
	for (size_t i = 0; i < COUNT(listeners); i++) {
		int fd = listeners[i].fd, listening = 0, reuse = 0;
		socklen_t len = sizeof(int);

		need(!getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening,
				 &len));
		need(!getsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, &len));
		need(listening && reuse);
		need(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	}
	if (access("/out/files.connect", F_OK))
		return;
	for (size_t i = 0; i < COUNT(listeners); i++)
		accept_one(&listeners[i]);
	need(!unlink("/out/files.connect"));
}

/* --- files of /proc and /sys --- */

static int status_fd, mtu_fd;

static void make_kernel_files(void)
{
	char c;

	status_fd = open("/proc/self/status", O_RDONLY);
	mtu_fd = open("/sys/class/net/lo/mtu", O_RDONLY | O_CLOEXEC);
	need(status_fd >= 0 && mtu_fd >= 0);
	need(read(mtu_fd, &c, 1) == 1 && c == '6');
}

static void check_kernel_files(void)
{
	char text[2048] = "", pid[32];

	need(pread(status_fd, text, sizeof(text) - 1, 0) > 0);
	snprintf(pid, sizeof(pid), "\nPid:\t%d\n", getpid());
	need(strstr(text, pid));
	need(lseek(mtu_fd, 0, SEEK_CUR) == 1);
	memset(text, 0, sizeof(text));
	need(pread(mtu_fd, text, sizeof(text) - 1, 0) == 6);
	need(!strcmp(text, "65536\n"));
}

static const struct part parts[] = {
	{ "regular", make_regular, check_regular },
	{ "directory", make_directory, check_directory },
	{ "devices", make_devices, check_devices },
	{ "pipes", make_pipes, check_pipes },
	{ "sharing", make_sharing, check_sharing },
	{ "eventfd", make_eventfd, check_eventfd },
	{ "timerfd", make_timerfd, check_timerfd },
	{ "epoll", make_epoll, check_epoll },
	{ "epoll-dup", make_epoll_dup, check_epoll_dup },
	{ "listen", make_listeners, check_listeners },
	{ "kernel", make_kernel_files, check_kernel_files },
};

int main(int argc, char **argv)
{
	report_open("files");
	make_parts(argc, argv, parts, COUNT(parts));
	for (;; doze(20 * MS))
		check_parts(argc, argv, parts, COUNT(parts));
}
