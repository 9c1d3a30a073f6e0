/*
 * unixes [PART...] - unix sockets with peers: pairs and connections within a
 * process and across processes, by path, by abstract name and without one, their
 * names and credentials, ends that are shut down or closed.
 */
#include "hold.h"

#include <poll.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <linux/sockios.h>
#include <sys/stat.h>
#include <sys/socket.h>
#include <sys/un.h>

static const int types[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET };

/* --- what is asked of a socket --- */

static void expect_creds(int fd, pid_t pid)
{
	struct ucred c = { 0 };
	socklen_t len = sizeof(c);

	need(!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &c, &len));
	if (c.pid != pid || c.uid != geteuid() || c.gid != getegid())
		fail("fd %d has peer %d/%u/%u, not %d", fd, c.pid, c.uid, c.gid, pid);
}

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* A pidfd of the peer is one of a living process with the number. */
static void expect_pidfd(int fd, pid_t pid)
{
	char path[64], text[1024], *line;
	int pidfd = -1;
	socklen_t len = sizeof(pidfd);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &len)) {
		need(errno == ENOPROTOOPT); /* before Linux 6.5 */
		return;
	}
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", pidfd);
	slurp(path, text, sizeof(text));
	line = strstr(text, "Pid:");
	need(line && atoi(line + 4) == pid);
	close(pidfd);
}

static struct sockaddr_un address(const char *name, socklen_t *len)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };

	strcpy(a.sun_path, name);
	*len = offsetof(struct sockaddr_un, sun_path) + strlen(name);
	if (name[0] == '@')
		a.sun_path[0] = 0;
	else if (name[0])
		++*len;
	return a;
}

static void expect_name(int fd, const char *name, int peer)
{
	struct sockaddr_un a = { 0 }, want;
	socklen_t len = sizeof(a), want_len;

	want = address(name, &want_len);
	if (peer)
		need(!getpeername(fd, (void *)&a, &len));
	else
		need(!getsockname(fd, (void *)&a, &len));
	if (len != want_len || memcmp(&a, &want, len))
		fail("fd %d has the name %d:%s%s, not %s", fd, len, a.sun_path,
		     a.sun_path + 1, name);
}

static int flag(int fd, int option)
{
	int value = -1;
	socklen_t len = sizeof(value);

	need(!getsockopt(fd, SOL_SOCKET, option, &value, &len));
	return value;
}

static void pass(int from, int to)
{
	char out[32], in[64] = { 0 };
	int n = snprintf(out, sizeof(out), "round %lu", round_no);

	need(send(from, out, n, MSG_NOSIGNAL) == n);
	need(recv(to, in, sizeof(in), 0) == n && !memcmp(in, out, n));
}

static void expect_silent(int fd)
{
	char c;

	need(recv(fd, &c, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN);
}

static int new_socket(int type, const char *name)
{
	int fd = socket(AF_UNIX, type, 0);
	socklen_t len;
	struct sockaddr_un a = address(name, &len);

	need(fd >= 0);
	if (name[0] && name[0] != '@')
		unlink(name);
	if (name[0])
		need(!bind(fd, (void *)&a, len));
	return fd;
}

static int listen_at(int type, const char *name)
{
	int fd = new_socket(type, name);

	need(!listen(fd, 8));
	return fd;
}

static void connect_to(int fd, const char *name)
{
	socklen_t len;
	struct sockaddr_un a = address(name, &len);

	need(!connect(fd, (void *)&a, len));
}

/* --- pairs within a task --- */

static int pairs[COUNT(types)][2];

static void make_pairs(void)
{
	for (size_t i = 0; i < COUNT(types); i++) {
		need(!socketpair(AF_UNIX, types[i] | SOCK_CLOEXEC, 0, pairs[i]));
		need(!fcntl(pairs[i][1], F_SETFL, O_NONBLOCK));
	}
	need(!fcntl(pairs[0][0], F_SETFD, 0));
}

static void check_pairs(void)
{
	for (size_t i = 0; i < COUNT(types); i++) {
		int *end = pairs[i];

		pass(end[0], end[1]);
		pass(end[1], end[0]);
		expect_silent(end[0]);
		expect_creds(end[0], getpid());
		expect_creds(end[1], getpid());
		expect_name(end[0], "", 0);
		expect_name(end[1], "", 1);
		need(flag(end[0], SO_TYPE) == types[i]);
		need(fcntl(end[1], F_GETFL) & O_NONBLOCK);
		need(fcntl(end[0], F_GETFD) == (i ? FD_CLOEXEC : 0));
	}
}

/* --- pairs between parent and child, both with epoll --- */

static int to_child[COUNT(types)];
static pid_t parent, partner;

static void echo(int *ends, int count)
{
	int ep = epoll_create1(0);

	for (int i = 0; i < count; i++) {
		struct epoll_event ev = { .events = EPOLLIN, .data.fd = ends[i] };

		need(ep >= 0 && !epoll_ctl(ep, EPOLL_CTL_ADD, ends[i], &ev));
	}
	for (;;) {
		struct epoll_event ev;
		char buf[64];
		int n = epoll_wait(ep, &ev, 1, -1);

		need(n == 1);
		expect_creds(ev.data.fd, parent);
		expect_pidfd(ev.data.fd, parent);
		n = recv(ev.data.fd, buf, sizeof(buf), MSG_DONTWAIT);
		if (n == 0)
			_exit(0);
		need(n > 0 && send(ev.data.fd, buf, n, 0) == n);
	}
}

static void make_across(void)
{
	int ends[COUNT(types)];

	parent = getpid();
	for (size_t i = 0; i < COUNT(types); i++) {
		int both[2];

		need(!socketpair(AF_UNIX, types[i], 0, both));
		to_child[i] = both[0];
		ends[i] = both[1];
	}
	partner = fork();
	if (!partner) {
		for (size_t i = 0; i < COUNT(types); i++)
			close(to_child[i]);
		echo(ends, COUNT(types));
	}
	for (size_t i = 0; i < COUNT(types); i++)
		close(ends[i]);
}

static void check_across(void)
{
	for (size_t i = 0; i < COUNT(types); i++) {
		pass(to_child[i], to_child[i]);
		expect_creds(to_child[i], parent);
	}
}

/* --- a server and clients, by path and by abstract name --- */

static const struct {
	const char *name;
	int type;
	const char *own; /* the client's own name */
} places[] = {
	{ "/out/unixes.sock", SOCK_STREAM, "" },
	{ "@unixes", SOCK_STREAM, "@unixes-client" },
	{ "/out/unixes.seq", SOCK_SEQPACKET, "/out/unixes.own" },
	{ "@unixes-seq", SOCK_SEQPACKET, "" },
};
static int clients[COUNT(places)];
static pid_t server;

static void serve(int *listeners)
{
	int ep = epoll_create1(0), accepted[COUNT(places)];
	struct epoll_event ev;

	for (size_t i = 0; i < COUNT(places); i++) {
		ev = (struct epoll_event){ .events = EPOLLIN, .data.u32 = i };
		need(!epoll_ctl(ep, EPOLL_CTL_ADD, listeners[i], &ev));
		accepted[i] = accept4(listeners[i], NULL, NULL, SOCK_CLOEXEC);
		need(accepted[i] >= 0);
		ev.data.u32 = 100 + i;
		need(!epoll_ctl(ep, EPOLL_CTL_ADD, accepted[i], &ev));
	}
	for (;;) {
		char buf[64];
		int n = epoll_wait(ep, &ev, 1, -1), i = ev.data.u32 % 100, fd;

		need(n == 1);
		if (ev.data.u32 < 100) { /* one that comes and goes */
			fd = accept(listeners[i], NULL, NULL);
			need(fd >= 0);
			expect_creds(fd, parent);
			need(recv(fd, buf, 1, 0) == 1 && send(fd, buf, 1, 0) == 1);
			close(fd);
			continue;
		}
		fd = accepted[i];
		expect_creds(fd, parent);
		expect_pidfd(fd, parent);
		expect_name(fd, places[i].name, 0);
		expect_name(fd, places[i].own, 1);
		need((n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT)) > 0);
		need(send(fd, buf, n, 0) == n);
	}
}

static void make_server(void)
{
	int ready[2];
	char c;

	parent = getpid();
	need(!pipe(ready));
	server = fork();
	if (!server) {
		int listeners[COUNT(places)];

		for (size_t i = 0; i < COUNT(places); i++)
			listeners[i] = listen_at(places[i].type, places[i].name);
		need(write(ready[1], "r", 1) == 1);
		close(ready[0]);
		close(ready[1]);
		serve(listeners);
	}
	need(read(ready[0], &c, 1) == 1);
	close(ready[0]);
	close(ready[1]);
	for (size_t i = 0; i < COUNT(places); i++) {
		clients[i] = new_socket(places[i].type, places[i].own);
		connect_to(clients[i], places[i].name);
	}
}

static void check_server(void)
{
	for (size_t i = 0; i < COUNT(places); i++) {
		int fd = socket(AF_UNIX, places[i].type, 0);
		char c = 'x';

		pass(clients[i], clients[i]);
		expect_creds(clients[i], server);
		expect_pidfd(clients[i], server);
		expect_name(clients[i], places[i].own, 0);
		expect_name(clients[i], places[i].name, 1);
		connect_to(fd, places[i].name);
		need(send(fd, &c, 1, 0) == 1 && recv(fd, &c, 1, 0) == 1);
		close(fd);
	}
}

/* --- half-closed, and left alone --- */

static int half[2], deaf[2], alone, alone_named, reset;

static void make_ends(void)
{
	int gone[2], l;

	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, half));
	need(!shutdown(half[0], SHUT_WR));
	need(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, deaf));
	need(!shutdown(deaf[0], SHUT_RD));
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, gone));
	close(gone[1]);
	alone = gone[0];
	/* One whose peer died with something unread: told once. */
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, gone));
	need(write(gone[0], "unread", 6) == 6);
	close(gone[1]);
	reset = gone[0];
	/* An accepted one, of a server that has gone too. */
	l = listen_at(SOCK_STREAM, "/out/unixes.gone");
	gone[0] = new_socket(SOCK_STREAM, "");
	connect_to(gone[0], "/out/unixes.gone");
	alone_named = accept(l, NULL, NULL);
	need(alone_named >= 0);
	close(gone[0]);
	close(l);
	unlink("/out/unixes.gone");
}

static void expect_end(int fd)
{
	char c;

	need(recv(fd, &c, 1, 0) == 0);
	need(send(fd, &c, 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
}

static void check_ends(void)
{
	struct pollfd p = { .fd = reset };
	char c;

	pass(half[1], half[0]);
	need(recv(half[1], &c, 1, 0) == 0);
	need(send(half[0], &c, 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	pass(deaf[0], deaf[1]);
	need(send(deaf[1], &c, 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	expect_end(alone);
	expect_end(alone_named);
	expect_name(alone_named, "/out/unixes.gone", 0);
	expect_name(alone_named, "", 1);
	expect_creds(alone_named, getpid());
	need(poll(&p, 1, 0) == 1 && p.revents == (POLLERR | POLLHUP));
}

/* --- datagram sockets with names --- */

static int dgram_in, dgram_out, dgram_dead;

static void make_datagrams(void)
{
	int fd;

	dgram_in = new_socket(SOCK_DGRAM, "/out/unixes.dgram");
	dgram_out = new_socket(SOCK_DGRAM, "@unixes-dgram");
	connect_to(dgram_out, "/out/unixes.dgram");
	fd = new_socket(SOCK_DGRAM, "@unixes-dead");
	dgram_dead = new_socket(SOCK_DGRAM, "");
	connect_to(dgram_dead, "@unixes-dead");
	close(fd);
}

static void check_datagrams(void)
{
	struct sockaddr_un a = { 0 }, want;
	socklen_t len = sizeof(a), want_len;
	char buf[16];

	want = address("@unixes-dgram", &want_len);
	need(send(dgram_out, "letter", 6, 0) == 6);
	need(recvfrom(dgram_in, buf, sizeof(buf), 0, (void *)&a, &len) == 6);
	need(len == want_len && !memcmp(&a, &want, len));
	need(sendto(dgram_in, "answer", 6, 0, (void *)&a, len) == 6);
	need(recv(dgram_out, buf, sizeof(buf), 0) == 6);
	expect_name(dgram_out, "/out/unixes.dgram", 1);
	expect_name(dgram_dead, "@unixes-dead", 1);
}

/* --- what is unread, with its boundaries, senders and credentials --- */

static int full[COUNT(types)][2], empty[COUNT(types)][2], last_words, posted, postman, urgent[2];
static pid_t sender;

/* post sends to posted: from one that stays and two that are gone. */
static void post(void)
{
	int fd;

	need(send(postman, "one", 3, 0) == 3);
	fd = new_socket(SOCK_DGRAM, "/out/unixes.stranger");
	connect_to(fd, "/out/unixes.post");
	need(send(fd, "two", 3, 0) == 3);
	close(fd);
	unlink("/out/unixes.stranger");
	fd = new_socket(SOCK_DGRAM, "");
	connect_to(fd, "/out/unixes.post");
	need(send(fd, "three", 5, 0) == 5);
	close(fd);
}

static void make_unread(void)
{
	int on = 1, gone[2], to_sender[2];
	char c;

	for (size_t i = 0; i < COUNT(types); i++) {
		need(!socketpair(AF_UNIX, types[i], 0, full[i]));
		need(!setsockopt(full[i][1], SOL_SOCKET, SO_PASSCRED, &on,
				 sizeof(on)));
		need(send(full[i][0], "first", 5, 0) == 5);
		need(send(full[i][0], "second one", 10, 0) == 10);
		need(!socketpair(AF_UNIX, types[i], 0, empty[i]));
		if (types[i] != SOCK_STREAM)
			need(send(empty[i][0], "", 0, 0) == 0);
		need(send(full[i][1], "back", 4, 0) == 4);
	}
	/* Somebody else's, who will be there all the time. */
	need(!pipe(to_sender));
	sender = fork();
	if (!sender) {
		for (size_t i = 0; i < COUNT(types); i++)
			need(send(full[i][0], "another's", 9, 0) == 9);
		need(write(to_sender[1], "x", 1) == 1);
		for (;;)
			pause();
	}
	need(read(to_sender[0], &c, 1) == 1);
	close(to_sender[0]);
	close(to_sender[1]);
	/* Left behind by one that is closed. */
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, gone));
	need(send(gone[1], "last words", 10, 0) == 10);
	close(gone[1]);
	last_words = gone[0];
	/* Datagrams of several senders, one of them gone. */
	posted = new_socket(SOCK_DGRAM, "/out/unixes.post");
	postman = new_socket(SOCK_DGRAM, "@postman");
	connect_to(postman, "/out/unixes.post");
	post();
	/* An out-of-band byte among others. */
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, urgent));
	need(send(urgent[0], "before", 6, 0) == 6);
	need(send(urgent[0], "!", 1, MSG_OOB) == 1);
	need(send(urgent[0], "behind", 6, 0) == 6);
}

/* peek_at looks at what lies behind the first bytes and leaves it there. */
static int peek_at(int fd, int offset, char *buf, int size, struct ucred *creds)
{
	union {
		struct cmsghdr h;
		char room[CMSG_SPACE(sizeof(struct ucred))];
	} control;
	struct iovec v = { buf, size };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1,
			    .msg_control = &control,
			    .msg_controllen = sizeof(control) };
	int n, off = -1;

	need(!setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset)));
	n = recvmsg(fd, &m, MSG_PEEK | MSG_DONTWAIT);
	need(!setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof(off)));
	memset(creds, 0, sizeof(*creds));
	if (n >= 0 && m.msg_controllen)
		memcpy(creds, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(*creds));
	return n;
}

static void expect_peek(int fd, int offset, const char *text, pid_t from)
{
	char buf[64] = { 0 };
	struct ucred c;
	int n = peek_at(fd, offset, buf, sizeof(buf), &c);

	if (n != (int)strlen(text) || memcmp(buf, text, n) || c.pid != from ||
	    c.uid != geteuid())
		fail("fd %d at %d: %d bytes \"%s\" of %d/%u, not \"%s\" of %d", fd,
		     offset, n, buf, c.pid, c.uid, text, from);
}

static void expect_post(const char *text, const char *name)
{
	struct sockaddr_un a = { 0 }, want;
	socklen_t len = sizeof(a), want_len;
	char buf[16];
	int n = recvfrom(posted, buf, sizeof(buf), 0, (void *)&a, &len);

	want = address(name, &want_len);
	need(n == (int)strlen(text) && !memcmp(buf, text, n));
	if (*name ? len != want_len || memcmp(&a, &want, len) : len > 2)
		fail("%s is of %d:%s%s, not %s", text, len, a.sun_path,
		     a.sun_path + 1, name);
}

static void check_unread(void)
{
	char buf[16] = { 0 }, c;
	int off = -1, at;
	socklen_t len = sizeof(off);

	for (size_t i = 0; i < COUNT(types); i++) {
		int in = full[i][1];

		need(!getsockopt(in, SOL_SOCKET, SO_PEEK_OFF, &off, &len));
		need(off == -1);
		if (types[i] == SOCK_STREAM) {
			expect_peek(in, 0, "firstsecond one", getpid());
		} else {
			expect_peek(in, 0, "first", getpid());
			expect_peek(in, 5, "second one", getpid());
		}
		expect_peek(in, 15, "another's", sender);
		need(recv(full[i][0], buf, sizeof(buf), MSG_PEEK) == 4);
		need(!getsockopt(in, SOL_SOCKET, SO_PEEK_OFF, &off, &len));
		need(off == -1 && flag(in, SO_PASSCRED) == 1);
		need(flag(full[i][0], SO_PASSCRED) == 0);
		if (types[i] != SOCK_STREAM) {
			need(recv(empty[i][1], buf, 1, MSG_DONTWAIT) == 0);
			need(send(empty[i][0], "", 0, 0) == 0);
		} else {
			expect_silent(empty[i][1]);
		}
	}
	need(recv(last_words, buf, sizeof(buf), MSG_PEEK) == 10);
	need(!memcmp(buf, "last words", 10));
	need(send(last_words, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE);
	expect_post("one", "@postman");
	expect_post("two", "/out/unixes.stranger");
	expect_post("three", "");
	expect_silent(posted);
	post();
	/* The byte is the second thing that is read. */
	need(recv(urgent[1], &c, 1, MSG_OOB | MSG_PEEK) == 1 && c == '!');
	need(!ioctl(urgent[1], SIOCATMARK, &at) && !at);
	need(recv(urgent[1], buf, sizeof(buf), 0) == 6);
	need(!memcmp(buf, "before", 6));
	need(!ioctl(urgent[1], SIOCATMARK, &at) && at);
	need(recv(urgent[1], &c, 1, MSG_OOB) == 1 && c == '!');
	need(recv(urgent[1], buf, sizeof(buf), 0) == 6);
	need(!memcmp(buf, "behind", 6));
	need(send(urgent[0], "before", 6, 0) == 6);
	need(send(urgent[0], "!", 1, MSG_OOB) == 1);
	need(send(urgent[0], "behind", 6, 0) == 6);
}

/* --- descriptors in flight: shared with the table, nested, and a cycle --- */

static int carrier[2], flying_file, circle[2];

static void send_fd(int to, int fd)
{
	char c = 'f', room[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec v = { &c, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1,
			    .msg_control = room, .msg_controllen = sizeof(room) };
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);

	*h = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)),
			       .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(h), &fd, sizeof(fd));
	need(sendmsg(to, &m, 0) == 1);
}

static int take_fd(int from)
{
	char c = 0, room[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec v = { &c, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1,
			    .msg_control = room, .msg_controllen = sizeof(room) };
	int fd = -1;

	need(recvmsg(from, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) == 1);
	if (c != 'f' || m.msg_controllen < CMSG_LEN(sizeof(int)))
		fail("fd %d gave %c with %zu bytes of control", from, c,
		     m.msg_controllen);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
	return fd;
}

/* fly sends a file that the table has too, a pipe with something in it that
 * it has not, and one end of a pair in which a descriptor lies in turn. */
static void fly(void)
{
	int ends[2], inner[2];

	send_fd(carrier[0], flying_file);
	need(!pipe(ends) && write(ends[1], "in a pipe", 9) == 9);
	send_fd(carrier[0], ends[0]);
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, inner));
	send_fd(inner[0], ends[1]);
	send_fd(carrier[0], inner[1]);
	need(send(carrier[0], "behind", 6, 0) == 6);
	close(ends[0]);
	close(ends[1]);
	close(inner[0]);
	close(inner[1]);
}

static void make_rights(void)
{
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, carrier));
	flying_file = open("/out/unixes.file", O_RDWR | O_CREAT | O_TRUNC, 0600);
	need(flying_file >= 0);
	fly();
	/* Each end waits in the queue of the other. */
	need(!socketpair(AF_UNIX, SOCK_DGRAM, 0, circle));
	send_fd(circle[0], circle[0]);
	send_fd(circle[0], circle[1]);
}

static void check_rights(void)
{
	off_t at = round_no % 1000;
	char buf[16];
	int fd, other, deep, n;

	fd = take_fd(carrier[1]);
	need(lseek(flying_file, at, SEEK_SET) == at);
	need(lseek(fd, 0, SEEK_CUR) == at);
	close(fd);
	fd = take_fd(carrier[1]);
	need(read(fd, buf, sizeof(buf)) == 9 && !memcmp(buf, "in a pipe", 9));
	other = take_fd(carrier[1]);
	deep = take_fd(other);
	need(write(deep, "deep", 4) == 4 && read(fd, buf, sizeof(buf)) == 4);
	need(recv(other, buf, 1, 0) == 0);
	need(recv(carrier[1], buf, 16, 0) == 6 && !memcmp(buf, "behind", 6));
	close(fd);
	close(other);
	close(deep);
	expect_silent(carrier[1]);
	fly();
	for (n = 0; n < 2; n++) {
		fd = take_fd(circle[1]);
		pass(n ? fd : circle[1], n ? circle[0] : fd);
		close(fd);
	}
	expect_silent(circle[1]);
	send_fd(circle[0], circle[0]);
	send_fd(circle[0], circle[1]);
}

/* --- connections not yet accepted; names that moved, went, or are relative --- */

static const struct {
	const char *bound, *now;
	int type;
} spots[] = {
	{ "/out/unixes.wait", "/out/unixes.wait", SOCK_STREAM },
	{ "@unixes-wait", "@unixes-wait", SOCK_SEQPACKET },
	{ "/out/unixes.old", "/out/unixes.new", SOCK_STREAM },
	{ "unixes.rel", "/out/unixes.rel", SOCK_STREAM },
	{ "/out/unixes.lost", "", SOCK_STREAM },
};
#define QUEUED 3
static int waiting_at[COUNT(spots)], queued[COUNT(spots)][QUEUED];

static void make_waiting(void)
{
	need(!chdir("/out"));
	for (size_t i = 0; i < COUNT(spots); i++) {
		waiting_at[i] = listen_at(spots[i].type, spots[i].bound);
		if (spots[i].now[0] && strcmp(spots[i].bound, spots[i].now))
			rename(spots[i].bound, spots[i].now);
		for (int k = 0; k < QUEUED; k++) {
			queued[i][k] = new_socket(spots[i].type, "");
			if (*spots[i].now || k == 0)
				connect_to(queued[i][k], *spots[i].now ? spots[i].now : spots[i].bound);
		}
		if (!spots[i].now[0])
			need(!unlink(spots[i].bound));
	}
	need(!chdir("/"));
}

static void check_waiting(void)
{
	struct stat st;

	for (size_t i = 0; i < COUNT(spots); i++) {
		int fd;

		expect_name(waiting_at[i], spots[i].bound, 0);
		expect_name(queued[i][0], spots[i].bound, 1);
		expect_creds(queued[i][0], getpid());
		if (!spots[i].now[0]) {
			need(stat(spots[i].bound, &st) == -1);
			continue;
		}
		fd = accept(waiting_at[i], NULL, NULL);
		need(fd >= 0);
		expect_creds(fd, getpid());
		pass(queued[i][0], fd);
		pass(fd, queued[i][0]);
		close(fd);
		close(queued[i][0]);
		queued[i][0] = queued[i][1];
		queued[i][1] = queued[i][2];
		queued[i][2] = new_socket(spots[i].type, "");
		connect_to(queued[i][2], spots[i].now);
	}
	need(stat("/out/unixes.old", &st) == -1);
}

/* --- calls that wait --- */

static int mute[2], stuffed[2], quiet_listener;
static struct worker *sleeping;

static void make_blocked(void)
{
	char chunk[4096] = { 0 };

	sleeping = map_shared(3 * sizeof(*sleeping));
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, mute));
	need(!socketpair(AF_UNIX, SOCK_STREAM, 0, stuffed));
	quiet_listener = listen_at(SOCK_STREAM, "@unixes-quiet");
	for (int i = 0; i < 3; i++) {
		char c[4096];

		if (fork())
			continue;
		close(mute[0]);
		close(stuffed[1]);
		for (;; sleeping[i].done++) {
			if (i == 0)
				need(recv(mute[1], c, 1, 0) == 1);
			else if (i == 1)
				need(send(stuffed[0], chunk, sizeof(chunk), 0) == sizeof(chunk));
			else
				need(!close(accept(quiet_listener, NULL, NULL)));
		}
	}
}

static void check_blocked(void)
{
	char chunk[4096];
	int fd = new_socket(SOCK_STREAM, "");

	need(send(mute[0], "x", 1, 0) == 1);
	need(recv(stuffed[1], chunk, sizeof(chunk), 0) > 0);
	connect_to(fd, "@unixes-quiet");
	close(fd);
	watch(sleeping, 3);
}

/* --- a peer outside, where OUTSIDE says, until it is closed --- */

static int outside = -1;

static void make_outside(void)
{
	if (!getenv("OUTSIDE"))
		return;
	outside = new_socket(SOCK_STREAM, "");
	connect_to(outside, getenv("OUTSIDE"));
}

static void check_outside(void)
{
	char c = 'o';

	if (outside < 0)
		return;
	if (send(outside, &c, 1, MSG_NOSIGNAL) == 1)
		return;
	need(errno == EPIPE && recv(outside, &c, 1, 0) == 0);
	need(!mkdir("/out/unixes.closed", 0755));
	close(outside);
	outside = -1;
}

/* --- a thousand pairs, in five processes --- */

#define HOLDERS 5
#define EACH 200
static struct worker *holding;

static void hold_many(struct worker *w)
{
	int many[EACH][2];

	for (int i = 0; i < EACH; i++) {
		need(!socketpair(AF_UNIX, types[i % 3], 0, many[i]));
		need(send(many[i][0], &i, sizeof(i), 0) == sizeof(i));
	}
	for (;; w->done++) {
		for (int i = 0; i < EACH; i++) {
			int got = -1;

			need(recv(many[i][1], &got, sizeof(got), MSG_PEEK) ==
			     sizeof(got));
			need(got == i);
		}
		doze(20 * MS);
	}
}

static void make_many(void)
{
	holding = map_shared(HOLDERS * sizeof(*holding));
	for (int i = 0; i < HOLDERS; i++)
		if (!fork())
			hold_many(&holding[i]);
}

static void check_many(void)
{
	watch(holding, HOLDERS);
}

static const struct part parts[] = {
	{ "pairs", make_pairs, check_pairs },
	{ "across", make_across, check_across },
	{ "server", make_server, check_server },
	{ "ends", make_ends, check_ends },
	{ "datagrams", make_datagrams, check_datagrams },
	{ "unread", make_unread, check_unread },
	{ "rights", make_rights, check_rights },
	{ "waiting", make_waiting, check_waiting },
	{ "blocked", make_blocked, check_blocked },
	{ "many", make_many, check_many },
	{ "outside", make_outside, check_outside },
};

int main(int argc, char **argv)
{
	report_open("unixes");
	make_parts(argc, argv, parts, COUNT(parts));
	for (;; doze(5 * MS))
		check_parts(argc, argv, parts, COUNT(parts));
}
