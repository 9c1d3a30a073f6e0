/*
 * mixture SEED - a random mix of open files of every kind, shared by dup, fork and
 * CLONE_FILES across a random tree of processes. What each open file is to hold is
 * noted in shared memory; one process after the other does with each of its
 * descriptors what its kind is for, and looks whether that comes out. A round is
 * over when all have.
 */
#include "hold.h"

#include <dirent.h>
#include <mqueue.h>
#include <pty.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <termios.h>

enum kind {
	NONE, PIPE_R, PIPE_W, FIFO, EVENT, TIMER, SIGNAL, EPOLL, FILE_, APPEND,
	GONE, UNNAMED, DIRECTORY, PLACE, MEMFD, NULL_, LISTENER, INOTIFY, MASTER,
	SLAVE, PIDFD, PROC, QUEUE, NAMESPACE, PAIR, DIRECT, KINDS
};

#define MOST 400	/* open files */
#define FDS 120		/* numbers in use */
#define PROCS 8
#define WATCHED 6

struct file {		/* an open file description */
	enum kind kind;
	int other;	/* the end of the same object, or where its state is */
	int flags;
	long pos, count, in, out;
	char path[64];
	int watched[WATCHED], nwatched;
};

static struct shared {
	volatile int turn, nprocs, nfiles, grown[PROCS];
	struct file file[MOST];
} *sh;

static int held[FDS];	/* by number: an index of sh->file, 0 for none */
static uint64_t seed;
static int self, sharing; /* sharing: the table is another's too */

static unsigned rnd(unsigned n)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (seed >> 11) % n;
}

/* The signal of a signalfd: blocked everywhere, and real-time ones queue. */
#define SIGNO(i) (SIGRTMIN + 1 + (i) % 20)

static uint8_t block[4096] __attribute__((aligned(4096)));

static uint8_t pattern(int i, long at)
{
	return i * 31 + at * 7 + (at >> 8);
}

static int put(int fd, int i)
{
	need(fd >= 0);
	if (fd >= FDS) {
		close(fd);
		return -1;
	}
	held[fd] = i;
	if (rnd(3) == 0)
		need(!fcntl(fd, F_SETFD, FD_CLOEXEC));
	return fd;
}

static int new_file(enum kind kind, int *index)
{
	int i = ++sh->nfiles;

	need(i < MOST);
	sh->file[i].kind = kind;
	sh->file[i].other = i;
	snprintf(sh->file[i].path, sizeof(sh->file[i].path), "/tmp/m/%d", i);
	*index = i;
	return i;
}

static void fill(int fd, int i)
{
	uint8_t buf[300];

	for (int at = 0; at < 300; at++)
		buf[at] = pattern(i, at);
	need(write(fd, buf, 300) == 300);
	sh->file[i].pos = lseek(fd, rnd(200), SEEK_SET);
}

static void make_epoll(int i)
{
	struct file *f = &sh->file[i];
	struct epoll_event e = { .events = EPOLLIN };
	int ep = epoll_create1(0), used[MOST] = { 0 };

	need(ep >= 0);
	for (int fd = 0; fd < FDS && f->nwatched < WATCHED; fd++) {
		int t = held[fd];

		if (!t || used[t] || sh->file[t].kind != EVENT || rnd(2))
			continue;
		used[t] = 1;
		e.data.u64 = t | (uint64_t)fd << 32;
		need(!epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
		f->watched[f->nwatched++] = t;
	}
	put(ep, i);
}

static void make_terminal(int i)
{
	struct termios raw;
	int m, s, j;

	need(!openpty(&m, &s, NULL, NULL, NULL));
	need(!tcgetattr(s, &raw));
	cfmakeraw(&raw);
	need(!tcsetattr(s, TCSANOW, &raw));
	need(!fcntl(m, F_SETFL, O_NONBLOCK));
	new_file(SLAVE, &j);
	sh->file[j].other = i;
	put(s, j);
	put(m, i);
}

static void make_listener(int i)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);

	strcpy(a.sun_path, sh->file[i].path);
	need(fd >= 0 && !bind(fd, (void *)&a, sizeof(a)) && !listen(fd, 5));
	put(fd, i);
}

/* make opens one file of a kind, or two that belong together. */
static void make(enum kind kind)
{
	struct itimerspec late = { .it_value = { 5000 + rnd(5000), 0 } };
	static const int seals[] = {
		F_SEAL_SHRINK, F_SEAL_GROW | F_SEAL_WRITE, F_SEAL_SEAL, 0x20 /* F_SEAL_EXEC */,
		F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL
	};
	struct mq_attr small = { .mq_maxmsg = 2, .mq_msgsize = 64 };
	int i, j, fd, ends[2];
	sigset_t set;
	struct file *f;

	f = &sh->file[new_file(kind, &i)];
	switch (kind) {
	case PIPE_R:
		need(!pipe2(ends, O_NONBLOCK | (rnd(3) ? 0 : O_DIRECT)));
		new_file(PIPE_W, &j);
		sh->file[j].other = i;
		put(ends[0], i);
		put(ends[1], j);
		break;
	case FIFO:
		need(!mkfifo(f->path, 0600));
		put(open(f->path, O_RDWR | O_NONBLOCK), i);
		break;
	case EVENT:
		f->count = 1 + rnd(1000);
		f->flags = rnd(2) ? EFD_SEMAPHORE : 0;
		put(eventfd(f->count, EFD_NONBLOCK | f->flags), i);
		break;
	case TIMER:
		fd = put(timerfd_create(rnd(2) ? CLOCK_MONOTONIC : CLOCK_BOOTTIME, TFD_NONBLOCK), i);
		f->count = late.it_value.tv_sec;
		if (fd >= 0)
			need(!timerfd_settime(fd, 0, &late, NULL));
		break;
	case SIGNAL:
		sigemptyset(&set);
		sigaddset(&set, SIGNO(i));
		put(signalfd(-1, &set, SFD_NONBLOCK), i);
		break;
	case EPOLL:
		make_epoll(i);
		break;
	case FILE_:
	case APPEND:
	case GONE:
		f->flags = kind == APPEND ? O_APPEND : 0;
		fd = open(f->path, O_RDWR | O_CREAT | O_EXCL | f->flags, 0600);
		need(fd >= 0);
		fill(fd, i);
		f->count = 300;
		if (kind == GONE)
			need(!unlink(f->path));
		put(fd, i);
		if (kind == FILE_ && rnd(2)) { /* once more, by itself */
			new_file(FILE_, &j);
			sh->file[j].other = i;
			sh->file[j].pos = 0;
			put(open(f->path, O_RDONLY), j);
		}
		break;
	case DIRECT: /* larger than 4 GiB, all of it a hole but for one block */
		fd = open(f->path, O_RDWR | O_CREAT | O_EXCL | O_DIRECT, 0600);
		need(fd >= 0 && !ftruncate(fd, 6LL << 30));
		memset(block, pattern(i, 0), sizeof(block));
		need(pwrite(fd, block, sizeof(block), 5LL << 30) == sizeof(block));
		if (rnd(2))
			need(!unlink(f->path));
		put(fd, i);
		break;
	case UNNAMED:
		fd = open("/tmp/m", O_RDWR | O_TMPFILE, 0600);
		need(fd >= 0);
		fill(fd, i);
		put(fd, i);
		break;
	case DIRECTORY:
		need(!mkdir(f->path, 0700));
		put(open(f->path, O_RDONLY | O_DIRECTORY), i);
		break;
	case PLACE:
		need(!symlink("nowhere", f->path));
		put(open(f->path, O_PATH | O_NOFOLLOW), i);
		break;
	case MEMFD:
		fd = memfd_create(f->path, MFD_ALLOW_SEALING);
		need(fd >= 0);
		fill(fd, i);
		if (rnd(2))
			need(!fcntl(fd, F_ADD_SEALS, seals[rnd(COUNT(seals))]));
		f->flags = fcntl(fd, F_GET_SEALS);
		put(fd, i);
		break;
	case NULL_:
		put(open("/dev/null", O_RDWR), i);
		break;
	case LISTENER:
		make_listener(i);
		break;
	case INOTIFY:
		need(!mkdir(f->path, 0700));
		fd = put(inotify_init1(IN_NONBLOCK), i);
		if (fd >= 0)
			need(inotify_add_watch(fd, f->path, IN_CREATE | IN_DELETE) == 1);
		break;
	case MASTER:
		make_terminal(i);
		break;
	case PIDFD:
		f->count = rnd(2) ? getpid() : 1;
		put(syscall(SYS_pidfd_open, (int)f->count, 0), i);
		break;
	case PROC:
		put(open("/proc/1/status", O_RDONLY), i);
		break;
	case QUEUE:
		snprintf(f->path, sizeof(f->path), "/m%d", i);
		put(mq_open(f->path, O_RDWR | O_CREAT | O_EXCL | O_NONBLOCK, 0600, &small), i);
		break;
	case NAMESPACE:
		put(open("/proc/self/ns/uts", O_RDONLY), i);
		break;
	case PAIR:
		need(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends));
		new_file(PAIR, &j);
		sh->file[j].other = i;
		f->other = j;
		put(ends[0], i);
		put(ends[1], j);
		break;
	default:
		fail("kind %d", kind);
	}
}

/* --- what each is for --- */

static void use_queue_of_bytes(int fd, struct file *f, int reads, int writes)
{
	struct file *q = &sh->file[f->other]; /* who keeps the state */
	uint8_t byte;
	int n, i = f->other;

	need(!ioctl(fd, FIONREAD, &n) && n == q->in - q->out);
	if (writes && n < 12) { /* of packets a pipe holds 16 */
		byte = pattern(i, q->in);
		if (write(fd, &byte, 1) == 1) {
			q->in++;
			n++;
		} else { /* nobody reads */
			need(errno == EPIPE);
		}
	}
	if (reads && n > 3) {
		need(read(fd, &byte, 1) == 1);
		need(byte == pattern(i, q->out));
		q->out++;
	}
}

static void use_event(int fd, struct file *f)
{
	uint64_t v;

	need(read(fd, &v, 8) == 8);
	need(v == (f->flags ? 1 : (uint64_t)f->count));
	f->count -= v;
	v = 1 + f->count % 5;
	need(write(fd, &v, 8) == 8);
	f->count += v;
}

static void use_file(int fd, int i)
{
	struct file *f = &sh->file[i];
	uint8_t byte;
	int sealed = f->kind == MEMFD && f->flags & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE);

	need(lseek(fd, 0, SEEK_CUR) == f->pos);
	if (f->pos < 299) {
		need(read(fd, &byte, 1) == 1 && byte == pattern(f->other, f->pos));
		f->pos++;
	} else {
		f->pos = lseek(fd, 7, SEEK_SET);
	}
	byte = pattern(f->other, 3);
	if (f->kind == APPEND) {
		struct stat st;

		need(write(fd, "x", 1) == 1);
		need(!fstat(fd, &st) && st.st_size == ++f->count);
		f->pos = lseek(fd, 9, SEEK_SET);
	} else if (f->other == i && !sealed) {
		need(pwrite(fd, &byte, 1, 3) == 1);
	} else if (sealed) {
		need(pwrite(fd, &byte, 1, 3) == -1 && errno == EPERM);
	}
	if (f->kind == MEMFD)
		need(fcntl(fd, F_GET_SEALS) == f->flags);
}

static void use_epoll(int fd, struct file *f)
{
	struct epoll_event e[WATCHED + 1];
	int n = epoll_wait(fd, e, WATCHED + 1, 0), found = 0;

	need(n >= 0);
	for (int k = 0; k < f->nwatched; k++)
		for (int m = 0; m < n; m++)
			found += f->watched[k] == (int)(uint32_t)e[m].data.u64;
	/* Those that nobody holds any more are gone from it. */
	need(found == n && n <= f->nwatched && f->count <= n);
}

static void use_inotify(int fd, struct file *f)
{
	char path[80], buf[512] __attribute__((aligned(8)));

	need(read(fd, buf, sizeof(buf)) == -1 && errno == EAGAIN);
	snprintf(path, sizeof(path), "%s/x", f->path);
	int x = open(path, O_CREAT | O_WRONLY | O_EXCL, 0600);
	need(x >= 0);
	close(x);
	need(!unlink(path));
	ssize_t n = read(fd, buf, sizeof(buf));
	struct inotify_event *e = (void *)buf;
	need(n >= (ssize_t)sizeof(*e));
	if (e->mask == IN_Q_OVERFLOW) /* restored with events in it */
		return;
	need(n == 2 * (ssize_t)(sizeof(*e) + 16));
	need(e->wd == 1 && e->mask == IN_CREATE);
}

static void use_terminal(int fd, struct file *f)
{
	char buf[8];

	if (f->kind == SLAVE && sh->file[f->other].count == 0) {
		if (write(fd, "tty", 3) == 3)
			sh->file[f->other].count = 3;
		else /* nobody has the master */
			need(errno == EIO);
	} else if (f->kind == MASTER && f->count) {
		need(read(fd, buf, 8) == 3 && !memcmp(buf, "tty", 3));
		f->count = 0;
	}
}

static void use_listener(struct file *f, int fd)
{
	struct sockaddr_un a = { 0 };
	socklen_t size = sizeof(a), one = sizeof(int);
	int listens = 0;

	need(!getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &one) && listens);
	need(!getsockname(fd, (void *)&a, &size) && !strcmp(a.sun_path, f->path));
	int c = socket(AF_UNIX, SOCK_STREAM, 0), peer;

	need(accept(fd, NULL, NULL) == -1 && errno == EAGAIN);
	need(c >= 0 && !connect(c, (void *)&a, size));
	need((peer = accept(fd, NULL, NULL)) >= 0);
	close(peer);
	close(c);
}

static void use_signal(int fd, int i)
{
	struct signalfd_siginfo info;
	union sigval v = { .sival_int = i };

	need(read(fd, &info, sizeof(info)) == -1 && errno == EAGAIN);
	need(!sigqueue(getpid(), SIGNO(i), v));
	need(read(fd, &info, sizeof(info)) == sizeof(info));
	need((int)info.ssi_signo == SIGNO(i) && info.ssi_int == i);
}

static void use_queue(int fd)
{
	char text[64];
	unsigned priority;

	need(!mq_send(fd, "text", 4, 5));
	need(mq_receive(fd, text, sizeof(text), &priority) == 4 && priority == 5);
}

static void use(int fd)
{
	int i = held[fd];
	struct file *f = &sh->file[i];
	struct itimerspec left;
	struct stat st, named;
	char buf[64];
	uint64_t v;

	switch (f->kind) {
	case PIPE_R:
		use_queue_of_bytes(fd, f, 1, 0);
		break;
	case PIPE_W:
		use_queue_of_bytes(fd, f, 0, 1);
		break;
	case FIFO:
		use_queue_of_bytes(fd, f, 1, 1);
		break;
	case EVENT:
		use_event(fd, f);
		break;
	case TIMER:
		need(read(fd, &v, 8) == -1 && errno == EAGAIN);
		need(!timerfd_gettime(fd, &left));
		need(left.it_value.tv_sec <= f->count && left.it_value.tv_sec > f->count - 300);
		break;
	case SIGNAL:
		use_signal(fd, i);
		break;
	case EPOLL:
		use_epoll(fd, f);
		break;
	case FILE_:
	case APPEND:
	case GONE:
	case UNNAMED:
	case MEMFD:
		use_file(fd, i);
		break;
	case DIRECT:
		need(fcntl(fd, F_GETFL) & O_DIRECT);
		memset(block, 0, sizeof(block));
		need(pread(fd, block, sizeof(block), 5LL << 30) == sizeof(block));
		need(block[0] == pattern(i, 0) && block[4095] == block[0]);
		need(!fstat(fd, &st) && st.st_size == 6LL << 30 && st.st_blocks <= 64);
		break;
	case DIRECTORY:
	case PLACE:
		need(!fstat(fd, &st) && !lstat(f->path, &named));
		need(st.st_ino == named.st_ino && st.st_mode == named.st_mode);
		break;
	case NULL_:
		need(write(fd, "x", 1) == 1 && read(fd, buf, 1) == 0);
		break;
	case LISTENER:
		use_listener(f, fd);
		break;
	case INOTIFY:
		use_inotify(fd, f);
		break;
	case MASTER:
	case SLAVE:
		use_terminal(fd, f);
		break;
	case PIDFD:
		need(!syscall(SYS_pidfd_send_signal, fd, 0, NULL, 0));
		break;
	case PROC:
		need(pread(fd, buf, 5, 0) == 5 && !memcmp(buf, "Name:", 5));
		break;
	case QUEUE:
		use_queue(fd);
		break;
	case NAMESPACE:
		need(ioctl(fd, 0xb703) == CLONE_NEWUTS); /* NS_GET_NSTYPE */
		break;
	case PAIR:
		/* what one side wrote the other reads; each keeps what it has sent */
		need(!ioctl(fd, FIONREAD, &st.st_mode));
		need((long)(int)st.st_mode == sh->file[f->other].in - f->out);
		if (sh->file[f->other].in > f->out) {
			need(read(fd, buf, 1) == 1 && (uint8_t)buf[0] == pattern(f->other, f->out));
			f->out++;
		}
		if (f->in - sh->file[f->other].out < 20) {
			buf[0] = pattern(i, f->in);
			if (send(fd, buf, 1, MSG_NOSIGNAL) == 1)
				f->in++;
			else /* nobody has the other side */
				need(errno == EPIPE);
		}
		break;
	default:
		fail("fd %d is of no kind", fd);
	}
}

/* --- the forest --- */

static void mix(void)
{
	static const enum kind kinds[] = {
		PIPE_R, PIPE_R, FIFO, EVENT, EVENT, TIMER, SIGNAL, EPOLL, FILE_, APPEND,
		GONE, UNNAMED, DIRECTORY, PLACE, MEMFD, NULL_, LISTENER, INOTIFY,
		MASTER, PIDFD, PROC, QUEUE, NAMESPACE, PAIR, PAIR, DIRECT
	};
	int fd, to;

	for (int n = 3 + rnd(8); n > 0 && sh->nfiles < MOST - 4; n--)
		make(kinds[rnd(COUNT(kinds))]);
	for (int n = rnd(12); n > 0; n--) {
		fd = rnd(FDS);
		to = 4 + rnd(FDS - 4);
		if (!held[fd] || held[to] || to == report_fd)
			continue;
		need(dup3(fd, to, rnd(2) ? O_CLOEXEC : 0) == to);
		held[to] = held[fd];
	}
	for (int n = rnd(12); n > 0; n--) {
		fd = rnd(FDS);
		if (held[fd]) {
			close(fd);
			held[fd] = 0;
		}
	}
}

static void live(void)
{
	for (;;) {
		while (sh->turn != self)
			doze(MS);
		for (int fd = 0; fd < FDS; fd++)
			if (held[fd])
				use(fd);
		round_no++;
		if (self == 0)
			say("%lu", round_no);
		sh->turn = (self + 1) % sh->nprocs;
	}
}

/* grow makes a process's children, each with all below it. */
static void grow(int depth)
{
	for (int n = rnd(4); n > 0 && depth < 3 && sh->nprocs < PROCS; n--) {
		int number = sh->nprocs++, shares = rnd(3) == 0;
		uint64_t own = seed * 0x9e3779b97f4a7c15ULL + number;
		pid_t pid = syscall(SYS_clone, SIGCHLD | (shares ? CLONE_FILES : 0), 0, 0, 0, 0);

		need(pid >= 0);
		sharing |= shares;
		if (!pid) {
			self = number;
			seed = own | 1;
			if (!shares) {
				sharing = 0;
				mix();
				grow(depth + 1);
			}
			sh->grown[self] = 1;
			live();
		}
		while (!sh->grown[number])
			doze(MS / 4);
	}
}

int main(int argc, char **argv)
{
	sigset_t all;

	seed = (argc > 1 ? strtoull(argv[1], NULL, 0) : 1) * 0x9e3779b97f4a7c15ULL | 1;
	report_open("mixture");
	sh = map_shared(sizeof(*sh));
	sh->nprocs = 1;
	need(!mkdir("/tmp/m", 0700));
	sigemptyset(&all);
	for (int i = 0; i < 20; i++)
		sigaddset(&all, SIGNO(i));
	need(!sigprocmask(SIG_BLOCK, &all, NULL));
	signal(SIGPIPE, SIG_IGN);
	mix();
	grow(0);
	if (!sharing)
		mix();
	live();
}
