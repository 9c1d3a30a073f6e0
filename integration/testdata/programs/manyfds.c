/*
 * manyfds - a descriptor table of as many descriptors as the argument says: pipes
 * with content, eventfds, files, and duplicates of them. Each round looks at some
 * of them, and all have been looked at after 64 rounds.
 */
#include "hold.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

#define FIRST 16
#define ROUNDS 64

static int epoll;

static void make(int n)
{
	struct rlimit all;
	int fd[2];

	need(!getrlimit(RLIMIT_NOFILE, &all));
	all.rlim_cur = all.rlim_max;
	need(!setrlimit(RLIMIT_NOFILE, &all));
	for (int i = 3; i < FIRST; i++)
		need(i == report_fd || dup2(report_fd, i) == i);
	need((epoll = epoll_create1(0)) == FIRST);
	for (int i = FIRST + 1; i + 5 < n; i += 5) {
		struct epoll_event e = { .events = EPOLLIN, .data.u32 = i };

		need(pipe2(fd, O_NONBLOCK) == 0 && fd[0] == i && fd[1] == i + 1);
		need(write(fd[1], &i, sizeof(i)) == sizeof(i));
		need(eventfd(i, EFD_NONBLOCK) == i + 2);
		need(open("/proc/self/exe", O_RDONLY) == i + 3);
		need(lseek(i + 3, i, SEEK_SET) == i);
		need(dup(i + 3) == i + 4);
		need(!epoll_ctl(epoll, EPOLL_CTL_ADD, i + 2, &e));
	}
}

static void check(int n, int first)
{
	int got;
	uint64_t count;
	struct epoll_event e[8];

	need(epoll_wait(epoll, e, 8, 0) == (n < 80 ? (n - FIRST) / 5 : 8));
	for (int i = FIRST + 1 + 5 * first; i + 5 < n; i += 5 * ROUNDS) {
		need(read(i, &got, 4) == 4 && got == i);
		need(read(i, &got, 4) == -1 && errno == EAGAIN);
		need(write(i + 1, &i, 4) == 4);
		need(read(i + 2, &count, 8) == 8 && count == (uint64_t)i);
		need(write(i + 2, &count, 8) == 8);
		need(lseek(i + 3, 1, SEEK_CUR) == i + 1);
		need(lseek(i + 4, -1, SEEK_CUR) == i);
	}
}

int main(int argc, char **argv)
{
	int n = argc > 1 ? atoi(argv[1]) : 1000;

	report_open("manyfds");
	make(n);
	for (;;) {
		check(n, round_no % ROUNDS);
		tick();
		doze(5 * MS);
	}
}
