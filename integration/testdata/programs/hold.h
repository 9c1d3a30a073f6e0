/*
 * hold.h - what the state-holding test programs share.
 *
 * A program holds some kernel state for ever and checks it in a loop. After
 * each good round it appends one line with the number of the round to
 * /out/NAME, through a descriptor opened once: the numbers must go on without
 * a gap over a checkpoint and a restore. A violated invariant appends
 * "FAIL reason" and ends the process with status 99.
 *
 * Nothing here is asynchronous or needs a descriptor but the report's own, so
 * that a program tests the kinds of state it is about and not its harness.
 */
#ifndef HOLD_H
#define HOLD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000LL	/* nanoseconds */
#define SEC 1000000000LL
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

static int report_fd = -1;
static unsigned long round_no;

/* say appends one line to the report in one write, so that lines of several
 * processes never mix. */
static inline void say(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line) - 1, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	if (write(report_fd, line, n) != n)
		_exit(98);
}

#define fail(fmt, ...)                                                         \
	do {                                                                   \
		say("FAIL %s:%d pid %d round %lu: " fmt, __FILE__, __LINE__,   \
		    getpid(), round_no, ##__VA_ARGS__);                        \
		_exit(99);                                                     \
	} while (0)

/* need fails with errno when an invariant does not hold. */
#define need(cond)                                                             \
	do {                                                                   \
		if (!(cond))                                                   \
			fail("%s (errno %d, %s)", #cond, errno,                \
			     strerror(errno));                                 \
	} while (0)

static inline void report_open(const char *name)
{
	char path[128];

	snprintf(path, sizeof(path), "/out/%s", name);
	report_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (report_fd < 0) {
		perror(path);
		exit(97);
	}
}

/* tick reports one more good round. */
static inline void tick(void)
{
	say("%lu", ++round_no);
}

static inline long long clock_ns(clockid_t id)
{
	struct timespec ts;

	clock_gettime(id, &ts);
	return ts.tv_sec * SEC + ts.tv_nsec;
}

static inline long long mono_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static inline struct timespec to_timespec(long long ns)
{
	return (struct timespec){ ns / SEC, ns % SEC };
}

/* doze sleeps between rounds; an EINTR is for the program's own signals to
 * explain, so it is not looked at here. */
static inline void doze(long long ns)
{
	struct timespec ts = to_timespec(ns);

	nanosleep(&ts, NULL);
}

static inline void *map_shared(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	need(p != MAP_FAILED);
	return p;
}

/* slurp reads a whole small file (of /proc, mostly) into buf without malloc,
 * which would change the address space that the caller is about to compare.
 * Returns the length; the text is NUL-terminated. */
static inline size_t slurp(const char *path, char *buf, size_t size)
{
	size_t have = 0;
	ssize_t n = 0;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail("open %s: %s", path, strerror(errno));
	while (have < size - 1 &&
	       (n = read(fd, buf + have, size - 1 - have)) > 0)
		have += n;
	if (n < 0)
		fail("read %s: %s", path, strerror(errno));
	close(fd);
	buf[have] = 0;
	return have;
}

/* fill writes a pattern that says of each word where it belongs. */
static inline void fill_pattern(unsigned char *p, size_t size, unsigned seed)
{
	for (size_t i = 0; i < size; i += 8)
		*(uint64_t *)(p + i) = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
}

static inline void check_filled(const unsigned char *p, size_t size,
				unsigned seed, const char *what)
{
	for (size_t i = 0; i < size; i += 8)
		if (*(const uint64_t *)(p + i) !=
		    (i + 1) * 0x9e3779b97f4a7c15ull + seed)
			fail("%s: content changed at offset %zu", what, i);
}

/* A text is what a program describes its state in, to compare it. */
struct text {
	char buf[32 << 10];
	size_t len;
};

static inline void text_add(struct text *t, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	t->len += vsnprintf(t->buf + t->len, sizeof(t->buf) - t->len, fmt, ap);
	va_end(ap);
	need(t->len < sizeof(t->buf));
}

/* A worker is a thread or process that counts its own good rounds in memory
 * the main program sees. watch fails when one has stood still for STALLED
 * rounds of the main program: rounds and not seconds, because a container may
 * rightly stand still for any time. */
#define WORKERS_MAX 256
#define STALLED 600

struct worker {
	const char *name;
	volatile unsigned long done;
	unsigned long seen;
	unsigned long still;
};

static inline void watch(struct worker *w, size_t count)
{
	for (size_t i = 0; i < count; i++, w++) {
		unsigned long done = w->done;

		if (done != w->seen) {
			w->seen = done;
			w->still = 0;
		} else if (++w->still > STALLED) {
			fail("worker %zu (%s) does not go on after %lu", i,
			     w->name ? w->name : "?", done);
		}
	}
}

/* wanted tells whether part is among the arguments; no argument wants all. */
static inline int wanted(int argc, char **argv, const char *part)
{
	for (int i = 1; i < argc; i++)
		if (!strcmp(argv[i], part))
			return 1;
	return argc < 2;
}

/* part is one of the things that a program holds: made once, checked in each
 * round. */
struct part {
	const char *name;
	void (*make)(void), (*check)(void);
};

static inline void make_parts(int argc, char **argv, const struct part *parts,
			      size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (wanted(argc, argv, parts[i].name))
			parts[i].make();
}

static inline void check_parts(int argc, char **argv, const struct part *parts,
			       size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (wanted(argc, argv, parts[i].name))
			parts[i].check();
	tick();
}

#endif
