/*
 * memory - every kind of private and shared memory, with contents, holes,
 * protections and advice; a growing heap and stack; the vdso; and what /proc
 * tells of the address space. Three processes share one anonymous area.
 */
#include "hold.h"

#define PAGE 4096UL
#define PAGES 256
#define SHARERS 3

static unsigned char *map_private(size_t pages, int prot)
{
	unsigned char *p = mmap(NULL, pages * PAGE, prot,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(p != MAP_FAILED);
	return p;
}

/* --- private anonymous memory with holes --- */

static unsigned char *sparse;

/* Bit 63 of a pagemap entry: present, bit 62: swapped out. */
static int page_exists(const void *p)
{
	uint64_t entry = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	need(fd >= 0);
	need(pread(fd, &entry, 8, (uintptr_t)p / PAGE * 8) == 8);
	close(fd);
	return (entry >> 62) != 0;
}

/* Page n of the sparse area: touched when n % 3 is 0, touched and dropped
 * again when 1, never touched when 2. */
static void make_sparse(void)
{
	sparse = map_private(PAGES, PROT_READ | PROT_WRITE);
	need(!madvise(sparse, PAGES * PAGE, MADV_NOHUGEPAGE));
	for (int i = 0; i < PAGES; i++)
		if (i % 3 != 2)
			fill_pattern(sparse + i * PAGE, PAGE, i);
	for (int i = 1; i < PAGES; i += 3)
		need(!madvise(sparse + i * PAGE, PAGE, MADV_DONTNEED));
}

static void check_sparse(void)
{
	for (int i = 0; i < PAGES; i++) {
		unsigned char *p = sparse + i * PAGE;

		if (page_exists(p) != (i % 3 == 0))
			fail("sparse page %d: exists %d", i, page_exists(p));
		if (i % 3 == 0)
			check_filled(p, PAGE, i, "sparse");
	}
}

/* --- areas that cannot be written or even read --- */

static unsigned char *readonly, *noaccess;
static int data_fd;

static void make_protected(void)
{
	readonly = map_private(4, PROT_READ | PROT_WRITE);
	fill_pattern(readonly, 4 * PAGE, 7);
	need(!mprotect(readonly, 4 * PAGE, PROT_READ));
	noaccess = map_private(4, PROT_READ | PROT_WRITE);
	fill_pattern(noaccess, 4 * PAGE, 9);
	need(!mprotect(noaccess, 4 * PAGE, PROT_NONE));
}

static void check_protected(void)
{
	check_filled(readonly, 4 * PAGE, 7, "read-only");
	/* A system call reports the protection without a fault. */
	need(pread(data_fd, readonly, 1, 0) == -1 && errno == EFAULT);
	need(write(report_fd, noaccess, 1) == -1 && errno == EFAULT);
	need(!mprotect(noaccess, 4 * PAGE, PROT_READ));
	check_filled(noaccess, 4 * PAGE, 9, "no-access");
	need(!mprotect(noaccess, 4 * PAGE, PROT_NONE));
}

/* --- files --- */

static unsigned char *file_private, *file_shared;

static void make_files(void)
{
	static unsigned char block[8 * PAGE];

	data_fd = open("/out/memory.data",
		       O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	need(data_fd >= 0);
	fill_pattern(block, sizeof(block), 3);
	need(write(data_fd, block, sizeof(block)) == sizeof(block));
	file_private = mmap(NULL, sizeof(block), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE, data_fd, 0);
	need(file_private != MAP_FAILED);
	file_shared = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			   data_fd, 4 * PAGE);
	need(file_shared != MAP_FAILED);
	fill_pattern(file_private + PAGE, PAGE, 33); /* page 1 leaves the file */
}

/* The shared mapping and the file must show each other's writes, and the
 * private one's changed page must not reach the file. */
static void check_files(void)
{
	static unsigned char page[PAGE];

	check_filled(file_private + PAGE, PAGE, 33, "private file, own page");
	need(pread(data_fd, page, PAGE, PAGE) == (ssize_t)PAGE);
	need(memcmp(page, file_private + PAGE, PAGE));
	need(pread(data_fd, page, PAGE, 0) == (ssize_t)PAGE);
	need(!memcmp(page, file_private, PAGE));

	*(volatile unsigned long *)file_shared = round_no;
	need(pread(data_fd, page, 8, 4 * PAGE) == 8);
	need(*(unsigned long *)page == round_no);
	*(unsigned long *)page = ~round_no;
	need(pwrite(data_fd, page, 8, 5 * PAGE) == 8);
	need(*(volatile unsigned long *)(file_shared + PAGE) == ~round_no);
}

/* --- shared anonymous memory of three processes --- */

struct shared {
	struct worker sharer[SHARERS];
	volatile unsigned long echo[SHARERS];
	unsigned char pattern[4 * PAGE];
};

static struct shared *shared;

/* Sharer i copies its left neighbour's count into echo: memory that is no
 * longer shared stops the echo. */
static void share(int i)
{
	int left = (i + SHARERS - 1) % SHARERS;

	shared->sharer[i].done++;
	shared->echo[i] = shared->sharer[left].done;
	check_filled(shared->pattern, sizeof(shared->pattern), 5, "shared");
}

static void make_shared(void)
{
	shared = map_shared(sizeof(*shared));
	fill_pattern(shared->pattern, sizeof(shared->pattern), 5);
	for (int i = 0; i < SHARERS; i++)
		shared->sharer[i].name = "sharer";
	for (int i = 1; i < SHARERS; i++) {
		pid_t pid = fork();

		need(pid >= 0);
		if (pid)
			continue;
		for (;;) {
			share(i);
			doze(10 * MS);
		}
	}
}

static void check_shared(void)
{
	share(0);
	watch(shared->sharer, SHARERS);
	for (int i = 0; i < SHARERS; i++) {
		int left = (i + SHARERS - 1) % SHARERS;
		unsigned long gap = shared->sharer[left].done - shared->echo[i];

		if (gap > STALLED)
			fail("sharer %d no longer sees %d", i, left);
	}
}

/* --- heap, stack, vdso --- */

static void check_heap(void)
{
	unsigned char *p = sbrk(2 * PAGE);

	need(p != (void *)-1);
	fill_pattern((void *)(((uintptr_t)p + 7) & ~7ul), 2 * PAGE - 8, 11);
	need(sbrk(-2 * (long)PAGE) == p + 2 * PAGE);
}

static __attribute__((noinline)) unsigned long recurse(unsigned depth)
{
	volatile unsigned char frame[PAGE];

	frame[0] = depth;
	frame[PAGE - 1] = depth;
	if (depth)
		return recurse(depth - 1) + (frame[0] == frame[PAGE - 1]);
	return 1;
}

/* Every round goes one page deeper, so that the stack's area has to grow in
 * each generation; it stays far below the usual limit of 8 MiB. */
static void check_stack(void)
{
	unsigned depth = 16 + round_no % 1500;

	need(recurse(depth) == depth + 1);
}

/* glibc reads the clock through the vdso, whose data pages carry the time
 * namespace's offset; the system call must agree with it. */
static void check_vdso(void)
{
	static const clockid_t ids[] = { CLOCK_MONOTONIC, CLOCK_BOOTTIME,
					 CLOCK_REALTIME };
	struct timespec ts;

	for (size_t i = 0; i < COUNT(ids); i++) {
		long long before, user, after;

		need(!syscall(SYS_clock_gettime, ids[i], &ts));
		before = ts.tv_sec * SEC + ts.tv_nsec;
		user = clock_ns(ids[i]);
		need(!syscall(SYS_clock_gettime, ids[i], &ts));
		after = ts.tv_sec * SEC + ts.tv_nsec;
		if (user < before || user > after)
			fail("clock %d: vdso %lld, system calls %lld-%lld",
			     ids[i], user, before, after);
	}
}

/* The clocks that count from boot never go back. */
static void check_clocks(void)
{
	static long long mono, boot;
	long long m = mono_ns(), b = clock_ns(CLOCK_BOOTTIME);

	need(m >= mono && b >= boot);
	mono = m;
	boot = b;
}

/* --- advice and /proc --- */

static const struct {
	int advice;
	const char *flag;
} advised[] = {
	{ MADV_DONTFORK, "dc" },   { MADV_DONTDUMP, "dd" },
	{ MADV_HUGEPAGE, "hg" },   { MADV_NOHUGEPAGE, "nh" },
	{ MADV_SEQUENTIAL, "sr" }, { MADV_RANDOM, "rr" },
	{ MADV_WIPEONFORK, "wf" },
};

static unsigned char *advised_at[COUNT(advised)];

static void make_advised(void)
{
	for (size_t i = 0; i < COUNT(advised); i++) {
		advised_at[i] = map_private(2, PROT_READ | PROT_WRITE);
		fill_pattern(advised_at[i], PAGE, i);
		/* Without transparent huge pages in the kernel two pieces of
		 * advice are EINVAL; then there is nothing to keep. */
		if (madvise(advised_at[i], 2 * PAGE, advised[i].advice))
			advised_at[i] = NULL;
	}
}

static char text[1 << 17];

/* Finds the VmFlags line of the area that starts at p. */
static const char *vm_flags(const void *p)
{
	char start[32];
	char *at;

	snprintf(start, sizeof(start), "%lx-", (unsigned long)p);
	at = strstr(text, start);
	return at ? strstr(at, "VmFlags:") : NULL;
}

static void check_advised(void)
{
	slurp("/proc/self/smaps", text, sizeof(text));
	for (size_t i = 0; i < COUNT(advised); i++) {
		const char *flags, *found;

		if (!advised_at[i])
			continue;
		flags = vm_flags(advised_at[i]);
		found = flags ? strstr(flags, advised[i].flag) : NULL;
		if (!found || found > strchr(flags, '\n'))
			fail("advice %s is gone", advised[i].flag);
		check_filled(advised_at[i], PAGE, i, "advised");
	}
}

static const char *const proc_files[] = { "/proc/self/cmdline",
					  "/proc/self/environ",
					  "/proc/self/auxv" };
static char proc_text[COUNT(proc_files)][8192];
static size_t proc_size[COUNT(proc_files)];
static char exe[256];
static char maps_text[1 << 16];

/*
 * Maps as a list of areas with protection and name. Left out: what may rightly
 * change, which is the low end of [stack], and device, inode and name of shared
 * anonymous memory, which the kernel backs with a new file.
 */
static void read_maps(char *to, size_t size)
{
	char *line, *save, *name;
	unsigned long start, end, offset, inode;
	char perms[5], dev[16];
	size_t n = 0;
	int at;

	slurp("/proc/self/maps", text, sizeof(text));
	for (line = strtok_r(text, "\n", &save); line;
	     line = strtok_r(NULL, "\n", &save)) {
		need(sscanf(line, "%lx-%lx %4s %lx %15s %lu %n", &start, &end,
			    perms, &offset, dev, &inode, &at) >= 6);
		name = line + at;
		if (!strcmp(name, "[stack]"))
			start = 0;
		if (perms[3] == 's' && strncmp(name, "/out/", 5))
			n += snprintf(to + n, size - n, "%lx-%lx %s shared\n",
				      start, end, perms);
		else
			n += snprintf(to + n, size - n,
				      "%lx-%lx %s %lx %s %lu %s\n", start, end,
				      perms, offset, dev, inode, name);
		need(n < size);
	}
}

static void make_proc(void)
{
	for (size_t i = 0; i < COUNT(proc_files); i++)
		proc_size[i] = slurp(proc_files[i], proc_text[i],
				     sizeof(proc_text[i]));
	need(readlink("/proc/self/exe", exe, sizeof(exe) - 1) > 0);
	read_maps(maps_text, sizeof(maps_text));
}

static void differ(const char *what, const char *was, const char *is)
{
	while (*was && *was == *is)
		was++, is++;
	fail("%s changed: was ...%.120s, is ...%.120s", what, was, is);
}

static void check_proc(void)
{
	static char now[1 << 16];
	size_t n;

	for (size_t i = 0; i < COUNT(proc_files); i++) {
		n = slurp(proc_files[i], now, sizeof(now));
		if (n != proc_size[i] || memcmp(now, proc_text[i], n))
			fail("%s changed", proc_files[i]);
	}
	memset(now, 0, sizeof(exe));
	need(readlink("/proc/self/exe", now, sizeof(exe) - 1) > 0);
	need(!strcmp(now, exe));
	read_maps(now, sizeof(now));
	if (strcmp(now, maps_text))
		differ("/proc/self/maps", maps_text, now);
}

int main(void)
{
	report_open("memory");
	make_sparse();
	make_protected();
	make_files();
	make_shared();
	make_advised();
	make_proc();
	for (;;) {
		check_sparse();
		check_protected();
		check_files();
		check_shared();
		check_heap();
		check_stack();
		check_vdso();
		check_clocks();
		check_advised();
		check_proc();
		tick();
		doze(20 * MS);
	}
}
