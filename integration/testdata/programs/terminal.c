/*
 * terminal - pseudo-terminals: their settings, whose controlling terminals they
 * are, who is in the foreground, what still works and what is hung up. With the
 * argument "own" the container's own terminal is looked at too.
 */
#include "hold.h"

#include <pty.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <termios.h>

static int with_own;

/* --- a pair with a session on its slave: a shell and its jobs, so to speak --- */

static int master, number;
static struct shared {
	volatile pid_t leader, job;
	volatile unsigned long asked, answered;
} *shared;
static struct termios settings;
static const struct winsize size = { 33, 77, 5, 6 };

static void set_raw(struct termios *t)
{
	t->c_iflag = BRKINT | IXANY;
	t->c_oflag = OPOST | ONLCR;
	t->c_lflag = ISIG | NOFLSH;
	t->c_cc[VINTR] = 7;
	t->c_cc[VMIN] = 1;
	t->c_cc[VTIME] = 0;
}

/* job is in the foreground process group and answers what it reads. */
static void job(int slave, int tty)
{
	char word[8];

	setpgid(0, 0);
	shared->job = getpid();
	for (;;) {
		ssize_t n = read(slave, word, 4);

		need(n == 4 && !memcmp(word, "ping", 4));
		need(tcgetpgrp(slave) == getpgrp() && tcgetpgrp(tty) == getpgrp());
		need(tcgetsid(tty) == shared->leader);
		need(write(tty, "pong\n", 5) == 5);
		shared->answered++;
	}
}

/* loner has given the session's terminal up. */
static void loner(int tty)
{
	need(!ioctl(tty, TIOCNOTTY));
	for (;;) {
		need(open("/dev/tty", O_RDWR) < 0 && errno == ENXIO);
		doze(10 * MS);
	}
}

static void leader(int slave)
{
	int tty;
	pid_t pid;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	need(setsid() > 0 && !ioctl(slave, TIOCSCTTY, 0));
	signal(SIGTTOU, SIG_IGN);
	tty = open("/dev/tty", O_RDWR | O_CLOEXEC);
	need(tty >= 0);
	shared->leader = getpid();
	pid = fork();
	if (!pid)
		job(slave, tty);
	setpgid(pid, pid);
	need(!tcsetpgrp(slave, pid));
	if (!fork())
		loner(tty);
	for (;;) {
		need(tcgetpgrp(tty) == pid);
		need(tcgetsid(slave) == getpid());
		doze(10 * MS);
	}
}

static void make_session(void)
{
	int slave;

	shared = map_shared(sizeof(*shared));
	need(!openpty(&master, &slave, NULL, NULL, &size));
	need(!ioctl(master, TIOCGPTN, &number));
	need(!fcntl(master, F_SETFD, FD_CLOEXEC));
	need(!tcgetattr(slave, &settings));
	set_raw(&settings);
	need(!tcsetattr(slave, TCSANOW, &settings));
	need(!tcgetattr(slave, &settings));
	need(!fchmod(slave, 0600));
	if (!fork())
		leader(slave);
	close(slave);
	while (!shared->job || tcgetpgrp(master) != shared->job)
		doze(MS);
}

static void check_session(void)
{
	struct termios now = settings;
	struct winsize w;
	struct stat st;
	char path[64], got[8];
	int n;

	need(!ioctl(master, TIOCGPTN, &n) && n == number);
	need(!tcgetattr(master, &now) && !memcmp(&now, &settings, sizeof(now)));
	need(!ioctl(master, TIOCGWINSZ, &w) && !memcmp(&w, &size, sizeof(w)));
	need(tcgetpgrp(master) == shared->job);
	snprintf(path, sizeof(path), "/dev/pts/%d", number);
	need(!stat(path, &st) && (st.st_mode & 0777) == 0600);
	need(write(master, "ping", 4) == 4);
	for (size_t have = 0; have < 6;) { /* ONLCR makes six of five */
		ssize_t n = read(master, got + have, 6 - have);

		need(n > 0);
		have += n;
	}
	need(!memcmp(got, "pong\r\n", 6));
}

/* --- odd ones --- */

static int packet, unopened, closed, locked, hung, exclusive;

/* --- what lies unread, for ever --- */

static int cooked[2], full[2], full_size;
static const char typed[] = "one\ntwo\n\004part";	/* an end of file before it */

static int new_master(int flags)
{
	int fd = posix_openpt(O_RDWR | O_NOCTTY | flags);

	need(fd >= 0);
	return fd;
}

static int slave_of(int fd)
{
	int slave, zero = 0;

	need(!ioctl(fd, TIOCSPTLCK, &zero));
	slave = ioctl(fd, TIOCGPTPEER, O_RDWR | O_NOCTTY);
	need(slave >= 0);
	return slave;
}

static void make_odd(void)
{
	int one = 1, fd, hole = new_master(0);

	packet = new_master(O_NONBLOCK);
	need(!ioctl(packet, TIOCPKT, &one));
	unopened = new_master(O_NONBLOCK);
	closed = new_master(0);
	close(slave_of(closed));
	locked = new_master(0);
	fd = new_master(0);
	hung = slave_of(fd);
	close(fd);
	exclusive = slave_of(new_master(0));
	need(!ioctl(exclusive, TIOCEXCL));
	close(hole); /* its number is free, those behind it are not */
}

static void check_odd(void)
{
	struct pollfd p;
	char path[64], c;
	int n, got;

	need(!ioctl(packet, TIOCGPKT, &got) && got);
	need(read(packet, &c, 1) < 0 && errno == EAGAIN);
	need(read(unopened, &c, 1) < 0 && errno == EAGAIN);
	need(read(closed, &c, 1) < 0 && errno == EIO);
	p = (struct pollfd){ closed, POLLIN, 0 };
	need(poll(&p, 1, 0) == 1 && p.revents & POLLHUP);
	need(!ioctl(locked, TIOCGPTLCK, &got) && got);
	need(!ioctl(locked, TIOCGPTN, &n));
	snprintf(path, sizeof(path), "/dev/pts/%d", n);
	need(open(path, O_RDWR | O_NOCTTY) < 0 && errno == EIO);
	need(read(hung, &c, 1) == 0);
	need(write(hung, "x", 1) < 0 && errno == EIO);
	need(!ioctl(exclusive, TIOCGEXCL, &got) && got);
}

/* --- the container's own terminal --- */

static struct termios own_settings;

static void make_own(void)
{
	need(isatty(0) && isatty(1) && isatty(2));
	need(!tcgetattr(0, &own_settings));
	own_settings.c_lflag &= ~ECHO;
	own_settings.c_cc[VINTR] = 6;
	need(!tcsetattr(0, TCSANOW, &own_settings));
	need(!tcgetattr(0, &own_settings));
}

static void check_own(void)
{
	struct termios now = own_settings;
	char name[64];
	int fd = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);

	need(fd >= 0 && isatty(fd));
	close(fd);
	need(!tcgetattr(0, &now) && !memcmp(&now, &own_settings, sizeof(now)));
	need(!ttyname_r(0, name, sizeof(name)) && !strcmp(name, "/dev/pts/0"));
	need(tcgetsid(0) == 1 && tcgetpgrp(0) == 1);
	fd = open("/dev/tty", O_RDWR | O_CLOEXEC);
	need(fd >= 0);
	close(fd);
}

static void make_unread(void)
{
	static char block[1 << 14];
	struct termios raw;
	ssize_t n;

	need(!openpty(&cooked[0], &cooked[1], NULL, NULL, NULL));
	need(write(cooked[0], typed, sizeof(typed) - 1) == sizeof(typed) - 1);
	need(!openpty(&full[0], &full[1], NULL, NULL, NULL));
	cfmakeraw(memset(&raw, 0, sizeof(raw)));
	need(!tcsetattr(full[1], TCSANOW, &raw));
	for (size_t i = 0; i < sizeof(block); i++)
		block[i] = i * 7 / 5;
	need(!fcntl(full[1], F_SETFL, O_NONBLOCK));
	while ((n = write(full[1], block + full_size, sizeof(block) - full_size)) > 0)
		full_size += n;
	need(errno == EAGAIN && full_size > 4096);
	doze(10 * MS);
}

static size_t take(int fd, char *to, size_t size)
{
	size_t have = 0;
	ssize_t n = 1;

	while (have < size && (n = read(fd, to + have, size - have)) > 0)
		have += n;
	return have;
}

/* Everything is taken out, looked at, and put back. */
static void check_unread(void)
{
	static char block[1 << 14];
	int wait;

	need(take(full[0], block, full_size) == (size_t)full_size);
	for (int i = 0; i < full_size; i++)
		need(block[i] == (char)(i * 7 / 5));
	need(!ioctl(full[0], TIOCINQ, &wait) && wait == 0);
	for (int n = 0; n < full_size;) {
		ssize_t put = write(full[1], block + n, full_size - n);

		if (put > 0)
			n += put;
		else
			doze(MS);
	}
	need(read(cooked[1], block, 100) == 4 && !memcmp(block, "one\n", 4));
	need(read(cooked[1], block, 100) == 4 && !memcmp(block, "two\n", 4));
	need(read(cooked[1], block, 100) == 0);
	need(write(cooked[0], "ly\n", 3) == 3);
	need(read(cooked[1], block, 100) == 7 && !memcmp(block, "partly\n", 7));
	need(take(cooked[0], block, 18) == 18); /* the echo */
	need(!memcmp(block, "one\r\ntwo\r\npartly\r\n", 18));
	need(write(cooked[0], typed, sizeof(typed) - 1) == sizeof(typed) - 1);
}

int main(int argc, char **argv)
{
	with_own = argc > 1 && !strcmp(argv[1], "own");
	report_open("terminal");
	if (with_own)
		make_own();
	make_session();
	make_odd();
	make_unread();
	for (;;) {
		if (with_own)
			check_own();
		check_session();
		check_odd();
		check_unread();
		tick();
		doze(20 * MS);
	}
}
