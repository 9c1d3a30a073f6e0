/*
 * hugepages - memory of hugetlb's pages: private, read-only, shared by two
 * processes, and of a memfd, shared and private. It needs 8 pages of 2 MiB.
 */
#include "hold.h"

#include <sys/ipc.h>
#include <sys/shm.h>

#define PAGE (2UL << 20)

static char text[1 << 18];

static unsigned char *map(size_t pages, int flags, int fd)
{
	unsigned char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				flags, fd, 0);

	need(p != MAP_FAILED);
	return p;
}

/* What distinguishes a page: a few words, one of them at its end. */
static void mark(unsigned char *p, unsigned seed)
{
	for (size_t at = 0; at < PAGE; at += PAGE / 16)
		*(uint64_t *)(p + at + 8) = seed * 1000003ull + at;
	*(uint64_t *)(p + PAGE - 8) = seed;
}

static void check_marked(const unsigned char *p, unsigned seed, const char *what)
{
	for (size_t at = 0; at < PAGE; at += PAGE / 16)
		if (*(const uint64_t *)(p + at + 8) != seed * 1000003ull + at ||
		    *(const uint64_t *)(p + at + 16) != 0)
			fail("%s: content changed at %zu", what, at);
	if (*(const uint64_t *)(p + PAGE - 8) != seed)
		fail("%s: content changed at its end", what);
}

static unsigned char *private, *readonly, *fresh, *memfd_shared, *memfd_private;
static struct {
	unsigned char marks[64]; /* the first ones */
	volatile unsigned long here, there;
} *shared;
static int memfd, segment, lonely;
static unsigned char *attached;

static void make(void)
{
	const int anon = MAP_ANONYMOUS | MAP_HUGETLB;

	shared = (void *)map(1, MAP_SHARED | anon, -1);
	mark((unsigned char *)shared, 3);
	if (!fork())
		for (;; doze(5 * MS))
			shared->there = shared->here;
	private = map(1, MAP_PRIVATE | anon, -1);
	mark(private, 1);
	readonly = map(1, MAP_PRIVATE | anon | (21 << MAP_HUGE_SHIFT), -1);
	mark(readonly, 2);
	need(!mprotect(readonly, PAGE, PROT_READ));
	fresh = map(1, MAP_PRIVATE | anon, -1);
	memfd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_ALLOW_SEALING);
	need(memfd >= 0);
	need(!ftruncate(memfd, 2 * PAGE));
	memfd_shared = map(2, MAP_SHARED, memfd);
	mark(memfd_shared, 4);
	mark(memfd_shared + PAGE, 5);
	memfd_private = map(2, MAP_PRIVATE, memfd);
	mark(memfd_private + PAGE, 6);
	need(!fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK));
	segment = shmget(0x77, PAGE - 5000, IPC_CREAT | IPC_EXCL | SHM_HUGETLB | 0600);
	lonely = shmget(IPC_PRIVATE, PAGE, SHM_HUGETLB | 21 << 26 | 0600);
	need(segment >= 0 && lonely >= 0);
	attached = shmat(lonely, NULL, 0);
	need(attached != (void *)-1);
	mark(attached, 8);
	need(!shmdt(attached));
	attached = shmat(segment, NULL, 0);
	need(attached != (void *)-1);
	mark(attached, 7);
}

static void check_segments(void)
{
	struct shmid_ds ds;
	unsigned char *p;

	check_marked(attached, 7, "System V segment");
	need(shmget(0x77, 0, 0) == segment && !shmctl(segment, IPC_STAT, &ds));
	need(ds.shm_segsz == PAGE - 5000 && ds.shm_nattch == 1);
	p = shmat(lonely, NULL, SHM_RDONLY);
	need(p != (void *)-1);
	check_marked(p, 8, "segment that nobody has");
	need(!shmdt(p));
}

static void check(void)
{
	struct stat st;

	check_marked(private, 1, "private");
	check_marked(readonly, 2, "read-only");
	need(pread(memfd, readonly, 1, 0) == -1 && errno == EFAULT);
	need(fresh[round_no % PAGE] == 0);
	check_marked((unsigned char *)shared, 3, "shared");
	if (shared->there + STALLED < shared->here)
		fail("huge pages are not shared any more");
	shared->here = round_no;
	check_marked(memfd_shared, 4, "memfd");
	check_marked(memfd_shared + PAGE, 5, "memfd, second page");
	check_marked(memfd_private, 4, "memfd, private");
	check_marked(memfd_private + PAGE, 6, "memfd, changed");
	need(!fstat(memfd, &st));
	need(st.st_size == 2 * (off_t)PAGE && st.st_blksize == (blksize_t)PAGE);
	need(fcntl(memfd, F_GET_SEALS) == F_SEAL_SHRINK);
}

static void check_smaps(void)
{
	int huge = 0;
	char *at = text;

	slurp("/proc/self/smaps", text, sizeof(text));
	while ((at = strstr(at, "KernelPageSize:     2048 kB"))) {
		huge++;
		at++;
	}
	if (huge != 7)
		fail("%d areas have huge pages", huge);
}

int main(void)
{
	report_open("hugepages");
	make();
	for (;;) {
		check();
		check_smaps();
		if (round_no % 8 == 0)
			check_segments();
		tick();
		doze(10 * MS);
	}
}
