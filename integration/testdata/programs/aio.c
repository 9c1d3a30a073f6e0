/*
 * aio - contexts of asynchronous I/O (io_setup): with events that nobody has
 * read, in rings that have gone round, with requests that are under way, one
 * that a thread waits at, and one that a child cannot use.
 */
#include "hold.h"
#include <linux/aio_abi.h>
#include <pthread.h>

struct ring {
	unsigned id, nr, head, tail, magic, compat, incompat, length;
	struct io_event events[];
};

static int null_fd;

static aio_context_t setup(unsigned requests)
{
	aio_context_t ctx = 0;

	need(!syscall(SYS_io_setup, requests, &ctx));
	return ctx;
}

static struct ring *ring_of(aio_context_t ctx)
{
	struct ring *r = (void *)ctx;

	need(r->magic == 0xa10a10a1);
	return r;
}

static void submit(aio_context_t ctx, struct iocb *request)
{
	need(syscall(SYS_io_submit, ctx, 1L, &request) == 1);
}

static void submit_number(aio_context_t ctx, uint64_t number)
{
	struct iocb request = { .aio_data = number,
				.aio_lio_opcode = IOCB_CMD_PREAD,
				.aio_fildes = null_fd };

	submit(ctx, &request);
}

static struct io_event wait_for(aio_context_t ctx)
{
	struct io_event e;

	need(syscall(SYS_io_getevents, ctx, 1L, 1L, &e, NULL) == 1);
	return e;
}

/* A queue holds as many unread events as it did, first in, first out. */
static struct queue {
	aio_context_t ctx;
	unsigned nr, unread;
	uint64_t in, out;
} queues[4];

static void queue_start(struct queue *q, unsigned requests, unsigned turn,
			unsigned unread)
{
	q->ctx = setup(requests);
	q->nr = ring_of(q->ctx)->nr;
	for (unsigned i = 0; i < turn; i++) {
		submit_number(q->ctx, q->in++);
		need(wait_for(q->ctx).data == q->out++);
	}
	for (unsigned i = 0; i < unread; i++)
		submit_number(q->ctx, q->in++);
	q->unread = unread;
}

static void queue_check(struct queue *q)
{
	struct ring *r = ring_of(q->ctx);
	struct io_event e;

	need(r->nr == q->nr && r->head == q->out % r->nr &&
	     r->tail == q->in % r->nr);
	need(q->in - q->out == q->unread);
	if (!q->unread) {
		submit_number(q->ctx, q->in++);
		need(wait_for(q->ctx).data == q->out++);
		return;
	}
	/* By the kernel and, as libaio does, without it, in turn. */
	if (q->out % 2) {
		e = wait_for(q->ctx);
	} else {
		e = r->events[r->head];
		r->head = (r->head + 1) % r->nr;
	}
	need(e.data == q->out++ && !e.res && !e.res2);
	submit_number(q->ctx, q->in++);
}

/* Writes to the disk are under way all the time, one or another. */
#define BLOCK 65536
static aio_context_t disk;
static unsigned char *blocks[4];
static struct iocb writes[4];
static uint64_t written;
static int disk_fd;

static void disk_write(int i)
{
	memset(blocks[i], ++written, BLOCK);
	writes[i] = (struct iocb){ .aio_data = i,
				   .aio_lio_opcode = IOCB_CMD_PWRITE,
				   .aio_fildes = disk_fd,
				   .aio_buf = (unsigned long)blocks[i],
				   .aio_nbytes = BLOCK,
				   .aio_offset = (long)i * BLOCK };
	submit(disk, &writes[i]);
}

static void disk_start(void)
{
	disk = setup(4);
	disk_fd = open("/out/aio.disk", O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC,
		       0600);
	need(disk_fd >= 0);
	for (size_t i = 0; i < COUNT(blocks); i++) {
		need(!posix_memalign((void **)&blocks[i], 4096, BLOCK));
		disk_write(i);
	}
}

static void disk_check(void)
{
	struct io_event e = wait_for(disk);

	need(e.data < COUNT(blocks) && e.res == BLOCK && !e.res2);
	need(e.obj == (unsigned long)&writes[e.data]);
	disk_write(e.data);
}

/* A thread waits for what comes once in a while. */
static aio_context_t seldom;
static volatile uint64_t sent, seen;

static void *waiter(void *unused)
{
	for (;;) {
		need(wait_for(seldom).data == seen + 1);
		seen++;
	}
	return unused;
}

static void seldom_check(void)
{
	if (round_no % 10 != 9)
		return;
	submit_number(seldom, ++sent);
	for (int i = 0; seen != sent; i++) {
		if (i == 2000)
			fail("event %lu does not come", sent);
		doze(MS);
	}
}

/* A child has the mapping, but not the context. */
static volatile unsigned *child_rounds;

_Noreturn static void child(aio_context_t ctx)
{
	for (;; doze(10 * MS)) {
		need(ring_of(ctx)->nr);
		need(syscall(SYS_io_getevents, ctx, 0L, 0L, NULL, NULL) == -1 &&
		     errno == EINVAL);
		(*child_rounds)++;
	}
}

int main(void)
{
	aio_context_t protected, passing = 0;
	pthread_t t;
	unsigned last = 0;

	report_open("aio");
	null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	need(null_fd >= 0);
	queue_start(&queues[0], 8, 0, 0);
	queue_start(&queues[1], 8, 5, 0);
	queue_start(&queues[2], 8, 120, 20); /* round the end of 127 places */
	queue_start(&queues[3], 1500, 2000, 1200);
	protected = setup(300);
	submit_number(protected, 4711);
	need(!mprotect((void *)protected, (ring_of(protected)->nr + 1UL) * 32,
		       PROT_READ));
	disk_start();
	seldom = setup(1);
	need(!pthread_create(&t, NULL, waiter, NULL));
	child_rounds = map_shared(4096);
	switch (fork()) {
	case 0:
		child(queues[2].ctx);
	case -1:
		fail("fork");
	}
	for (;; doze(10 * MS)) {
		for (size_t i = 0; i < COUNT(queues); i++)
			queue_check(&queues[i]);
		need(wait_for(protected).data == 4711);
		submit_number(protected, 4711);
		disk_check();
		seldom_check();
		/* New ones come and go. */
		if (passing)
			need(!syscall(SYS_io_destroy, passing));
		passing = setup(3);
		submit_number(passing, 1);
		if (round_no % 100 == 99) {
			need(*child_rounds > last);
			last = *child_rounds;
		}
		tick();
	}
}
