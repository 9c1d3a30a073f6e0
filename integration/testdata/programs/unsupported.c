/*
 * unsupported - holds one object, named by its argument, that no checkpoint
 * saves.
 */
#include "hold.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/netlink.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <mqueue.h>
#include <sched.h>
#include <signal.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define PAGE 4096UL
#define MEMFD_SECRET 447

static void hold_secret(void)
{
	int fd = syscall(MEMFD_SECRET, 0);

	need(fd >= 0);
	need(!ftruncate(fd, PAGE));
	need(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED);
	need(!close(fd));
}

static void hold_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	void *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(fd >= 0 && p != MAP_FAILED);
	need(!ioctl(fd, UFFDIO_API, &api));
	reg.range.start = (unsigned long)p;
	reg.range.len = PAGE;
	need(!ioctl(fd, UFFDIO_REGISTER, &reg));
}

/* One that serves nothing yet. */
static void hold_bare(void)
{
	need(syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY) == 4);
}

static void hold_uring(void)
{
	struct io_uring_params params = { 0 };

	need(syscall(SYS_io_uring_setup, 4, &params) == 4);
}

/* Whoever opens the file waits for an answer. */
static void hold_judge(void)
{
	need(fanotify_init(FAN_CLASS_CONTENT, O_RDONLY) == 4);
	need(!close(open("/out/judged", O_RDWR | O_CREAT, 0600)));
	need(!fanotify_mark(4, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, "/out/judged"));
}

/* A namespace that only the descriptor keeps. */
static void hold_lonely(void)
{
	pid_t pid = getpid();
	int own = open("/proc/self/ns/net", O_RDONLY);
	int fd;

	need(own == 4 && pid == 1);
	need((fd = fcntl(own, F_DUPFD, 20)) == 20 && !close(own));
	need(!unshare(CLONE_NEWNET) && open("/proc/self/ns/net", O_RDONLY) == 4);
	need(!setns(fd, CLONE_NEWNET) && !close(fd));
}

static void hold_aio(void)
{
	aio_context_t ctx = 0;
	struct iocb request = { .aio_lio_opcode = IOCB_CMD_POLL,
				.aio_buf = POLLIN };
	struct iocb *list = &request;
	int ends[2];

	need(!pipe(ends));
	request.aio_fildes = ends[0];
	need(!syscall(SYS_io_setup, 8, &ctx));
	need(syscall(SYS_io_submit, ctx, 1L, &list) == 1);
}

/* As mq_notify(3) does it, which keeps the socket open. */
static void hold_mqthread(void)
{
	static char cookie[32];
	int sock = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0);
	mqd_t q = mq_open("/told", O_RDWR | O_CREAT | O_EXCL, 0600, NULL);
	struct sigevent e = { .sigev_notify = SIGEV_THREAD, .sigev_signo = sock };

	e.sigev_value.sival_ptr = cookie;
	need(sock >= 0 && q >= 0 && !syscall(SYS_mq_notify, q, &e) && !close(sock));
}

int main(int argc, char **argv)
{
	report_open("unsupported");
	if (wanted(argc, argv, "secret"))
		hold_secret();
	if (wanted(argc, argv, "uffd"))
		hold_uffd();
	if (wanted(argc, argv, "bare"))
		hold_bare();
	if (wanted(argc, argv, "uring"))
		hold_uring();
	if (wanted(argc, argv, "judge"))
		hold_judge();
	if (wanted(argc, argv, "lonely"))
		hold_lonely();
	if (wanted(argc, argv, "aio"))
		hold_aio();
	if (wanted(argc, argv, "mqthread"))
		hold_mqthread();
	for (;; doze(20 * MS))
		tick();
}
