/*
 * connections [alone|many] - a server of TCP, a thread a connection, and a client of
 * its own over loopback, unless it is to be alone; or processes with many connections
 * each, which all echo. What a client wants it says with its first byte:
 *
 *   D  a stream of numbers, for as long as the client takes it
 *   U  to send such a stream; at its end it gets the count of them
 *   E  an echo
 *   H  nothing: our side is shut at once, and what comes is read like U
 *   W  "late\n" once /out/connections.go is there, whatever it shuts before
 *
 * A round of the report is one exchange of the program with itself.
 */
#include "hold.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

#define BLOCK 8192

#define PORT 7000

static void write_all(int fd, const void *data, size_t size)
{
	for (const char *p = data; size > 0;) {
		ssize_t n = write(fd, p, size);

		need(n > 0);
		p += n;
		size -= n;
	}
}

static void download(int fd)
{
	uint32_t block[BLOCK], next = 0;

	for (;;) {
		for (int i = 0; i < BLOCK; i++)
			block[i] = next++;
		for (size_t at = 0; at < sizeof(block);) {
			ssize_t n = write(fd, (char *)block + at,
					  sizeof(block) - at);

			if (n <= 0) {
				need(errno == EPIPE || errno == ECONNRESET);
				return;
			}
			at += n;
		}
	}
}

/* take reads numbers to the end of the stream and returns how many. */
static uint32_t take(int fd)
{
	static __thread unsigned char buf[BLOCK * 4];
	uint32_t next = 0, number;
	size_t have = 0;

	for (;;) {
		ssize_t n = read(fd, buf + have, sizeof(buf) - have);

		if (n < 0 && errno == ECONNRESET)
			return next;
		need(n >= 0);
		if (n == 0) {
			need(have == 0);
			return next;
		}
		have += n;
		for (size_t at = 0; at + 4 <= have; at += 4) {
			memcpy(&number, buf + at, 4);
			if (number != next)
				fail("number %u instead of %u", number, next);
			next++;
		}
		memmove(buf, buf + have / 4 * 4, have % 4);
		have %= 4;
	}
}

static void echo(int fd)
{
	char buf[4096];
	ssize_t n;

	while ((n = read(fd, buf, sizeof(buf))) > 0)
		write_all(fd, buf, n);
	need(n == 0 || errno == ECONNRESET);
}

static void wait_for_word(int fd)
{
	while (access("/out/connections.go", F_OK))
		doze(5 * MS);
	write_all(fd, "late\n", 5);
}

static void *serve(void *arg)
{
	int fd = (intptr_t)arg;
	uint32_t count;
	char what;

	if (read(fd, &what, 1) == 1) {
		switch (what) {
		case 'D':
			download(fd);
			break;
		case 'U':
			count = take(fd);
			write_all(fd, &count, 4);
			break;
		case 'E':
			echo(fd);
			break;
		case 'H':
			need(!shutdown(fd, SHUT_WR));
			take(fd);
			break;
		case 'W':
			wait_for_word(fd);
			break;
		default:
			fail("a client wants %c", what);
		}
	}
	close(fd);
	return NULL;
}

static void *accept_all(void *arg)
{
	int listener = (intptr_t)arg;
	pthread_attr_t attr;
	pthread_t thread;

	need(!pthread_attr_init(&attr));
	need(!pthread_attr_setstacksize(&attr, 128 << 10));
	need(!pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED));
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		need(fd >= 0);
		need(!pthread_create(&thread, &attr, serve,
				     (void *)(intptr_t)fd));
	}
	return NULL;
}

/* What a connection knows of itself must stay. */
static struct sockaddr_in self_name, self_peer;
static struct tcp_info self_info;

static void read_self(int fd, struct sockaddr_in *name, struct sockaddr_in *peer,
		      struct tcp_info *info)
{
	socklen_t size = sizeof(*name);

	memset(info, 0, sizeof(*info));
	need(!getsockname(fd, (void *)name, &size));
	size = sizeof(*peer);
	need(!getpeername(fd, (void *)peer, &size));
	size = sizeof(*info);
	need(!getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size));
}

static void note_self(int fd)
{
	int on = 1, idle = 77;

	need(!setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	need(!setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)));
	need(!setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle)));
	read_self(fd, &self_name, &self_peer, &self_info);
}

static void check_self(int fd)
{
	struct sockaddr_in name, peer;
	struct tcp_info info;
	int value = 0;
	socklen_t size = sizeof(value);

	read_self(fd, &name, &peer, &info);
	need(!memcmp(&name, &self_name, sizeof(name)));
	need(!memcmp(&peer, &self_peer, sizeof(peer)));
	need(info.tcpi_state == TCP_ESTABLISHED);
	need((info.tcpi_options & 7) == (self_info.tcpi_options & 7));
	need(info.tcpi_snd_wscale == self_info.tcpi_snd_wscale);
	need(info.tcpi_rcv_wscale == self_info.tcpi_rcv_wscale);
	need(!getsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, &size) && value);
	need(!getsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &value, &size) && value == 1);
	need(!getsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, &size) && value);
	need(!getsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &value, &size) && value == 77);
}

/* Some of many connections have an option of their own, which must stay theirs. */
static int own_idle(int fd)
{
	return fd % 3 ? 7200 : 1000 + fd % 5;
}

static void check_idle(int fd)
{
	int idle = 0;
	socklen_t size = sizeof(idle);

	need(!getsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, &size));
	if (idle != own_idle(fd))
		fail("keep-alive of fd %d after %d s", fd, idle);
}

/* serve_many echoes what comes through any of its connections. */
static void serve_many(int listener)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLEXCLUSIVE };
	int epfd = epoll_create1(0), fd;
	char buf[4096];
	ssize_t n;
	int idle;

	need(epfd >= 0);
	event.data.fd = listener;
	need(!epoll_ctl(epfd, EPOLL_CTL_ADD, listener, &event));
	for (;;) {
		need(epoll_wait(epfd, &event, 1, -1) == 1);
		fd = event.data.fd;
		if (fd == listener) {
			fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
			if (fd < 0)
				continue; /* another one has it */
			idle = own_idle(fd);
			if (idle != 7200)
				need(!setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle)));
			event.events = EPOLLIN;
			event.data.fd = fd;
			need(!epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event));
			continue;
		}
		check_idle(fd);
		n = read(fd, buf, sizeof(buf));
		if (n > 0)
			write_all(fd, buf, n);
		else if (n == 0 || errno != EAGAIN)
			close(fd);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in6 at = { .sin6_family = AF_INET6 };
	struct sockaddr_in here = { .sin_family = AF_INET };
	int listener, self, on = 1;
	char line[64], back[64];
	pthread_t thread;

	report_open("connections");
	unlink("/out/connections.go");
	signal(SIGPIPE, SIG_IGN);
	listener = socket(AF_INET6, SOCK_STREAM, 0);
	need(listener >= 0);
	at.sin6_port = htons(PORT);
	need(!setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	need(!bind(listener, (void *)&at, sizeof(at)));
	need(!listen(listener, 128));
	if (argc > 1 && !strcmp(argv[1], "many")) {
		need(!fcntl(listener, F_SETFL, O_NONBLOCK));
		for (int i = 0; i < 4; i++)
			if (!fork())
				serve_many(listener);
		for (;; doze(5 * MS))
			tick();
	}
	need(!pthread_create(&thread, NULL, accept_all,
			     (void *)(intptr_t)listener));
	if (argc > 1)
		for (;; doze(5 * MS))
			tick();
	/* Loopback comes up when the harness has found us. */
	here.sin_port = htons(PORT);
	here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	while ((self = socket(AF_INET, SOCK_STREAM, 0)) >= 0 &&
	       connect(self, (void *)&here, sizeof(here))) {
		close(self);
		doze(5 * MS);
	}
	need(!setsockopt(self, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	write_all(self, "E", 1);
	note_self(self);
	for (;;) {
		check_self(self);
		int size = snprintf(line, sizeof(line), "round %lu\n", round_no);

		write_all(self, line, size);
		for (int have = 0; have < size;) {
			ssize_t n = read(self, back + have, size - have);

			need(n > 0);
			have += n;
		}
		need(!memcmp(line, back, size));
		tick();
		doze(5 * MS);
	}
}
