/*
 * prefork - a master that fills memory and forks workers, which share it until
 * they write. Contents must stay each process's own, and what was shared with
 * the process it was forked from must be shared again: smaps tells.
 */
#include "hold.h"

#define PAGE 4096UL
#define PAGES 4096UL /* of the area that is shared */
#define WORKERS 4

static char text[1 << 18];
static unsigned char *big, *mixed, *tail, *file;
static volatile unsigned long *counts; /* one of each process, shared */
static int who;			       /* 0 is the master */

static void check_zero(const unsigned char *p, size_t size, const char *what)
{
	for (size_t i = 0; i < size; i++)
		if (p[i])
			fail("process %d, %s: not zero at %zu", who, what, i);
}

/* An area that is not joined with its neighbours. */
static unsigned char *map(size_t size)
{
	unsigned char *p = mmap(NULL, size + 2 * PAGE, PROT_NONE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(p != MAP_FAILED);
	p += PAGE;
	need(!mprotect(p, size, PROT_READ | PROT_WRITE));
	need(!madvise(p, size, MADV_NOHUGEPAGE));
	return p;
}

/* Page i of the big area is written by process i % 64, if there is one: by
 * the master after it has forked, too. 10 is the grandchild. */
static int writer_of(size_t page) { return page % 64; }

static void write_mine(void)
{
	for (size_t i = 0; i < PAGES; i++)
		if (writer_of(i) == who)
			fill_pattern(big + i * PAGE, PAGE, 1000 + who);
}

static void make(void)
{
	int fd;

	big = map(PAGES * PAGE);
	for (size_t i = 0; i < PAGES; i++)
		fill_pattern(big + i * PAGE, PAGE, i);
	mixed = map(64 * PAGE);
	fill_pattern(mixed, 64 * PAGE, 7);
	tail = map(16 * PAGE);
	fill_pattern(tail, 16 * PAGE, 8);
	fd = open("/out/prefork.data", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	need(fd >= 0);
	fill_pattern(mixed, 16 * PAGE, 7);
	need(write(fd, mixed, 16 * PAGE) == 16 * (ssize_t)PAGE);
	file = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	need(file != MAP_FAILED);
	close(fd);
	fill_pattern(file + 4 * PAGE, 4 * PAGE, 9);
	need(sbrk(32 * PAGE) != (void *)-1);
}

/* Each worker also does something else to its memory. */
static void differ(void)
{
	switch (who) {
	case 1: /* discards, and what shows then */
		need(!madvise(mixed + 8 * PAGE, 8 * PAGE, MADV_DONTNEED));
		need(!madvise(file + 4 * PAGE, PAGE, MADV_DONTNEED));
		break;
	case 2: /* makes holes and protects */
		need(!munmap(mixed + 8 * PAGE, 8 * PAGE));
		need(!mprotect(mixed + 32 * PAGE, 8 * PAGE, PROT_READ));
		need(!mprotect(mixed + 48 * PAGE, 8 * PAGE, PROT_NONE));
		break;
	case 3: /* grows */
		tail = mremap(tail, 16 * PAGE, 32 * PAGE, MREMAP_MAYMOVE);
		need(tail != MAP_FAILED);
		fill_pattern(tail + 16 * PAGE, 16 * PAGE, 18);
		need(sbrk(64 * PAGE) != (void *)-1);
		break;
	case 4: /* advises */
		need(!madvise(mixed, 64 * PAGE, MADV_DONTFORK));
		need(!mlock(tail, 16 * PAGE));
		break;
	}
}

static void check_big(void)
{
	for (size_t i = 0; i < PAGES; i++) {
		int mine = writer_of(i) == who || (who == 10 && writer_of(i) == 1);

		check_filled(big + i * PAGE, PAGE,
			     mine ? 1000 + writer_of(i) : (int)i, "big");
	}
}

static void check_others(void)
{
	static unsigned char vec[8];

	switch (who) {
	case 1:
	case 10:
		check_filled(mixed, 8 * PAGE, 7, "before discarded");
		check_zero(mixed + 8 * PAGE, 8 * PAGE, "discarded");
		need(*(uint64_t *)(file + 4 * PAGE) == (4 * PAGE + 1) * 0x9e3779b97f4a7c15ull + 7);
		break;
	case 2:
		check_filled(mixed, 8 * PAGE, 7, "before a hole");
		need(mincore(mixed + 8 * PAGE, 8 * PAGE, vec) == -1 && errno == ENOMEM);
		need(!mprotect(mixed + 48 * PAGE, 8 * PAGE, PROT_READ));
		need(*(uint64_t *)(mixed + 48 * PAGE) == (48 * PAGE + 1) * 0x9e3779b97f4a7c15ull + 7);
		need(!mprotect(mixed + 48 * PAGE, 8 * PAGE, PROT_NONE));
		break;
	case 3:
		check_filled(mixed, 64 * PAGE, 7, "mixed");
		check_filled(tail, 16 * PAGE, 8, "tail");
		check_filled(tail + 16 * PAGE, 16 * PAGE, 18, "its growth");
		/* mremap takes one mapping only. */
		tail = mremap(tail, 32 * PAGE, 33 * PAGE, MREMAP_MAYMOVE);
		need(tail != MAP_FAILED);
		check_zero(tail + 32 * PAGE, PAGE, "more growth");
		need(mremap(tail, 33 * PAGE, 32 * PAGE, 0) == tail);
		break;
	default:
		check_filled(mixed, 64 * PAGE, 7, "mixed");
		check_filled(tail, 16 * PAGE, 8, "tail");
		check_filled(file, 4 * PAGE, 7, "file");
		check_filled(file + 4 * PAGE, 4 * PAGE, 9, "changed file");
		break;
	}
}

/* How much of the big area is shared with somebody, in pages. */
static size_t shared_pages(void)
{
	unsigned long clean = 0, dirty = 0;
	char start[32], *at, *line;

	snprintf(start, sizeof(start), "%lx-", (unsigned long)big);
	slurp("/proc/self/smaps", text, sizeof(text));
	at = strstr(text, start);
	need(at);
	line = strstr(at, "Shared_Clean:");
	need(line && sscanf(line, "Shared_Clean: %lu", &clean) == 1);
	line = strstr(at, "Shared_Dirty:");
	need(line && sscanf(line, "Shared_Dirty: %lu", &dirty) == 1);
	return (clean + dirty) / 4;
}

static int cousins; /* the master has gone, the workers share without it */

/* Of 64 pages, the master has written one and this process one or two. */
static void check_sharing(void)
{
	size_t shared = shared_pages(), least = PAGES * 61 / 64;

	if (!cousins && shared < least)
		fail("process %d: %zu of %lu pages are shared, not %zu", who,
		     shared, PAGES, least);
}

static void work(void)
{
	for (;; doze(20 * MS)) {
		check_big();
		check_others();
		check_sharing();
		counts[who]++;
	}
}

static void start(int number)
{
	pid_t pid = fork();

	need(pid >= 0);
	if (pid)
		return;
	who = number;
	write_mine();
	differ();
	if (who == 1)
		start(10);
	work();
}

/* Leaves workers to init that have no memory of the same origin with it. */
static void make_cousins(void)
{
	pid_t pid = fork();

	need(pid >= 0);
	if (!pid) {
		make();
		for (int i = 1; i <= WORKERS; i++)
			start(i);
		_exit(0);
	}
	need(waitpid(pid, NULL, 0) == pid);
}

int main(int argc, char **argv)
{
	static struct worker workers[] = {
		{ .name = "worker" }, { .name = "worker" }, { .name = "worker" },
		{ .name = "worker" }, { .name = "grandchild" },
	};

	report_open("prefork");
	counts = map_shared(PAGE);
	cousins = argc > 1 && wanted(argc, argv, "cousins");
	if (cousins) {
		make_cousins();
	} else {
		make();
		for (int i = 1; i <= WORKERS; i++)
			start(i);
		doze(100 * MS);
		write_mine();
	}
	for (;;) {
		if (!cousins) {
			check_big();
			check_others();
			check_sharing();
		}
		for (size_t i = 0; i < COUNT(workers); i++)
			workers[i].done = counts[i < WORKERS ? i + 1 : 10];
		watch(workers, COUNT(workers));
		tick();
		doze(10 * MS);
	}
}
