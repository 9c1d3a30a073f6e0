/*
 * areas - mappings of every odd kind: locked, growing, sealed, guarded, at the
 * edges of the address space, of sealed memfds and of memory whose file has
 * gone. Each keeps its contents, its VmFlags and its behaviour.
 */
#include "hold.h"
#include <sys/prctl.h>

#define PAGE 4096UL
#define PAGES 8

#define GUARD_INSTALL 102
#define SYS_MSEAL 462
#define DROPPABLE 8
#define SET_VMA 0x53564d41

static char text[1 << 20];

static void read_smaps(void)
{
	slurp("/proc/self/smaps", text, sizeof(text));
}

/* What read_smaps has read of the area that holds p. */
static const char *smaps_of(const void *p)
{
	unsigned long start, end, at = (unsigned long)p;
	char *rest;

	for (const char *line = text; line; line = strchr(line, '\n')) {
		if (*line == '\n')
			line++;
		start = strtoul(line, &rest, 16);
		if (*rest != '-')
			continue;
		end = strtoul(rest + 1, NULL, 16);
		if (start <= at && at < end)
			return line;
	}
	fail("%p is not mapped", p);
}

/* Its line from part on. */
static const char *smaps_line(const void *p, const char *part)
{
	static char line[256];
	const char *at = strstr(smaps_of(p), part);

	need(at);
	snprintf(line, sizeof(line), "%.*s", (int)strcspn(at, "\n"), at);
	return line;
}

/* Without "gu", which says only that there may be guard pages: areas that are
 * one for a moment give it to each other. */
static const char *vm_flags(const void *p)
{
	char *flags = (char *)smaps_line(p, "VmFlags:");
	char *guard = strstr(flags, " gu");

	if (guard)
		memmove(guard, guard + 3, strlen(guard + 3) + 1);
	return flags;
}

/* --- areas of which all that is to be kept are flags and contents --- */

static struct area {
	const char *name;
	unsigned char *p;
	size_t size;
	int prot; /* last one; contents are looked at if it is readable */
	char flags[256];
} areas[32];
static size_t area_count;
static int data_fd;

static struct area *add(const char *name, void *at, size_t size, int prot,
			int flags, int fd)
{
	struct area *a = &areas[area_count];

	a->name = name;
	a->size = size;
	a->prot = prot;
	a->p = mmap(at, size, prot, flags, fd, 0);
	if (a->p == MAP_FAILED)
		fail("%s: %s", name, strerror(errno));
	if (prot & PROT_WRITE)
		fill_pattern(a->p, size, area_count);
	area_count++;
	return a;
}

static struct area *add_anon(const char *name, int flags)
{
	return add(name, NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | flags, -1);
}

static void protect(struct area *a, int prot)
{
	need(!mprotect(a->p, a->size, prot));
	a->prot = prot;
}

static unsigned char *sealed, *guarded, *dontfork, *wiped, *noreserve;

static void make_areas(void)
{
	const int private = MAP_PRIVATE | MAP_ANONYMOUS;
	struct area *a;
	unsigned long lowest = 0;

	a = add_anon("locked", 0);
	need(!mlock(a->p, a->size));
	a = add_anon("locked, read-only", 0);
	protect(a, PROT_READ);
	need(!mlock(a->p, a->size));
	a = add_anon("locked, no access", 0);
	protect(a, PROT_NONE);
	need(mlock(a->p, a->size) == -1); /* and is locked all the same */
	a = add_anon("locked on fault", 0);
	need(!madvise(a->p + PAGE, PAGE, MADV_DONTNEED));
	fill_pattern(a->p + PAGE, PAGE, 1);
	need(!mlock2(a->p, a->size, MLOCK_ONFAULT));
	fill_pattern(a->p, a->size, a - areas);

	a = add_anon("mergeable", 0);
	need(!madvise(a->p, a->size, MADV_MERGEABLE) || errno == EINVAL);
	a = add_anon("huge pages", 0);
	need(!madvise(a->p, a->size, MADV_HUGEPAGE) || errno == EINVAL);
	a = add_anon("no huge pages", 0);
	need(!madvise(a->p, a->size, MADV_NOHUGEPAGE) || errno == EINVAL);
	a = add_anon("not dumped", 0);
	need(!madvise(a->p, a->size, MADV_DONTDUMP));
	a = add_anon("not forked", 0);
	need(!madvise(a->p, a->size, MADV_DONTFORK));
	dontfork = a->p;
	a = add_anon("wiped by fork", 0);
	need(!madvise(a->p, a->size, MADV_WIPEONFORK));
	wiped = a->p;
	a = add_anon("named", 0);
	prctl(SET_VMA, 0, a->p, a->size, "a name"); /* CONFIG_ANON_VMA_NAME */
	add("droppable", NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
	    MAP_ANONYMOUS | DROPPABLE, -1);

	a = add_anon("not reserved, read-only", MAP_NORESERVE);
	protect(a, PROT_READ);
	noreserve = mmap(NULL, 1UL << 36, PROT_NONE, private | MAP_NORESERVE,
			 -1, 0);
	need(noreserve != MAP_FAILED);
	need(!mprotect(noreserve + (1UL << 35), PAGE, PROT_READ | PROT_WRITE));
	fill_pattern(noreserve + (1UL << 35), PAGE, 99);

	a = add("/dev/zero, private", NULL, PAGES * PAGE,
		PROT_READ | PROT_WRITE, MAP_PRIVATE,
		open("/dev/zero", O_RDWR | O_CLOEXEC));
	add("/dev/zero, shared", NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
	    MAP_SHARED, open("/dev/zero", O_RDWR | O_CLOEXEC));

	add("last page", (void *)0x7fffffffe000UL, PAGE,
	    PROT_READ | PROT_WRITE, private | MAP_FIXED_NOREPLACE, -1);
	slurp("/proc/sys/vm/mmap_min_addr", text, sizeof(text));
	sscanf(text, "%lu", &lowest);
	if (lowest < PAGE)
		lowest = PAGE;
	add("lowest page", (void *)lowest, PAGE, PROT_READ | PROT_WRITE,
	    private | MAP_FIXED_NOREPLACE, -1);

	a = add_anon("sealed", 0);
	protect(a, PROT_READ);
	need(!syscall(SYS_MSEAL, a->p, a->size, 0));
	sealed = a->p;

	a = add_anon("guarded", 0);
	guarded = a->p;
	need(!madvise(guarded + PAGE, PAGE, GUARD_INSTALL));
	need(!madvise(guarded + 3 * PAGE, 2 * PAGE, GUARD_INSTALL));
	fill_pattern(guarded + 2 * PAGE, PAGE, 77);
	a->prot = 0; /* looked at by check_guarded */

	read_smaps();
	for (size_t i = 0; i < area_count; i++)
		strcpy(areas[i].flags, vm_flags(areas[i].p));
}

static void check_areas(void)
{
	read_smaps();
	for (size_t i = 0; i < area_count; i++) {
		struct area *a = &areas[i];

		if (strcmp(vm_flags(a->p), a->flags))
			fail("%s: %s, was %s", a->name, vm_flags(a->p), a->flags);
		if (a->prot & PROT_READ)
			check_filled(a->p, a->size, i, a->name);
	}
	check_filled(noreserve + (1UL << 35), PAGE, 99, "reserved page");
	need(mprotect(sealed, PAGE, PROT_READ | PROT_WRITE) == -1 &&
	     errno == EPERM);
	need(munmap(sealed, PAGE) == -1 && errno == EPERM);
}

/* A system call tells whether a page can be touched, without a signal. */
static int readable(const void *p)
{
	ssize_t n = pwrite(data_fd, p, 1, 0);

	need(n == 1 || errno == EFAULT);
	return n == 1;
}

static void check_guarded(void)
{
	static const int is[PAGES] = { 0, 1, 0, 1, 1, 0, 0, 0 };

	for (int i = 0; i < PAGES; i++)
		if (readable(guarded + i * PAGE) == is[i])
			fail("guard page %d: readable %d", i, !is[i]);
	check_filled(guarded, PAGE, area_count - 1, "before a guard page");
	check_filled(guarded + 2 * PAGE, PAGE, 77, "between guard pages");
}

/* What fork makes of the areas. */
static void check_fork(void)
{
	int status;
	pid_t pid = fork();

	need(pid >= 0);
	if (!pid) {
		for (size_t i = 0; i < PAGES * PAGE; i++)
			if (wiped[i])
				fail("fork did not wipe");
		if (readable(dontfork))
			fail("an area was forked that must not be");
		if (readable(guarded + PAGE) || !readable(guarded))
			fail("guard pages are lost in a child");
		_exit(0);
	}
	need(waitpid(pid, &status, 0) == pid);
	need(status == 0);
}

/* --- a stack of its own that grows down --- */

static unsigned char *stack_top;

static void make_stack(void)
{
	/* Far from where mmap puts what comes later, which would be in its way. */
	unsigned char *p = mmap((void *)0x100000000000, 2 * PAGE,
				PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN |
					MAP_FIXED_NOREPLACE, -1, 0);

	need(p != MAP_FAILED);
	stack_top = p + 2 * PAGE;
	fill_pattern(stack_top - PAGE, PAGE, 55);
}

static void check_stack(void)
{
	unsigned char *p = stack_top - (2 + round_no % 500) * PAGE;

	*(volatile unsigned char *)p = 1; /* grows or faults */
	check_filled(stack_top - PAGE, PAGE, 55, "stack");
	need(strstr(vm_flags(stack_top - PAGE), " gd"));
}

/* --- memfds that are sealed while mapped --- */

enum { WRITE_SEALED, FUTURE_SEALED, NOEXEC_SEALED, EXEC_SEALED, PLAIN, MEMFDS };

static struct {
	const char *name;
	int fd, seals;
	unsigned char *p, *ro;
	mode_t mode;
	char maps[256];
} memfds[MEMFDS] = {
	{ .name = "write sealed" }, { .name = "future\\write" },
	{ .name = "" },             { .name = "exec" },
	{ .name = "plain" },
};

static unsigned char *map_fd(int fd, int prot, int flags)
{
	unsigned char *p = mmap(NULL, PAGES * PAGE, prot, flags, fd, 0);

	need(p != MAP_FAILED);
	return p;
}

static void make_memfds(void)
{
	for (int i = 0; i < MEMFDS; i++) {
		int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
		struct stat st;
		int fd;

		if (i == NOEXEC_SEALED)
			flags = MFD_CLOEXEC | 8;
		if (i == PLAIN)
			flags = MFD_CLOEXEC;
		fd = memfds[i].fd = memfd_create(memfds[i].name, flags);
		need(fd >= 0);
		need(!ftruncate(fd, PAGES * PAGE));
		memfds[i].p = map_fd(fd, PROT_READ | PROT_WRITE, MAP_SHARED);
		fill_pattern(memfds[i].p, PAGES * PAGE, 200 + i);
		switch (i) {
		case WRITE_SEALED:
			need(!munmap(memfds[i].p, PAGES * PAGE));
			need(!fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW));
			memfds[i].p = map_fd(fd, PROT_READ, MAP_SHARED);
			break;
		case FUTURE_SEALED:
			need(!fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
			memfds[i].ro = map_fd(fd, PROT_READ, MAP_SHARED);
			break;
		case EXEC_SEALED:
			need(!munmap(memfds[i].p, PAGES * PAGE));
			need(!fcntl(fd, F_ADD_SEALS, 0x20));
			memfds[i].p = map_fd(fd, PROT_READ | PROT_EXEC, MAP_SHARED);
			break;
		}
		memfds[i].seals = fcntl(fd, F_GET_SEALS);
		need(!fstat(fd, &st));
		memfds[i].mode = st.st_mode;
		read_smaps();
		strcpy(memfds[i].maps, smaps_line(memfds[i].p, "/memfd:"));
	}
	need(memfds[NOEXEC_SEALED].seals == 0x20);
	need(memfds[EXEC_SEALED].seals & F_SEAL_WRITE);
}

static void check_memfds(void)
{
	for (int i = 0; i < MEMFDS; i++) {
		const char *maps;
		struct stat st;
		unsigned char *again;
		int now = fcntl(memfds[i].fd, F_GET_SEALS);

		if (now != memfds[i].seals)
			fail("memfd %d: seals %x, were %x", i, now, memfds[i].seals);
		need(!fstat(memfds[i].fd, &st));
		if (st.st_mode != memfds[i].mode)
			fail("memfd %d: mode %o, was %o", i, st.st_mode, memfds[i].mode);
		maps = smaps_line(memfds[i].p, "/memfd:");
		if (strcmp(maps, memfds[i].maps))
			fail("memfd %d: name %s, was %s", i, maps, memfds[i].maps);
		if (i != FUTURE_SEALED) /* its first word counts */
			check_filled(memfds[i].p, PAGES * PAGE, 200 + i, "memfd");
		again = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			     memfds[i].fd, 0);
		need((again == MAP_FAILED) == !!(now & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)));
		if (again != MAP_FAILED)
			need(!munmap(again, PAGE));
	}
	need(mprotect(memfds[WRITE_SEALED].p, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES);
	need(mprotect(memfds[FUTURE_SEALED].ro, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES);
	need(pwrite(memfds[FUTURE_SEALED].fd, "", 1, 0) == -1 && errno == EPERM);
	need(fchmod(memfds[NOEXEC_SEALED].fd, 0777) == -1 && errno == EPERM);
	*(volatile unsigned long *)memfds[FUTURE_SEALED].p = round_no;
	need(*(volatile unsigned long *)memfds[FUTURE_SEALED].ro == round_no);
}

/* --- shared memory whose file was removed, as shm_unlink does --- */

static struct shm {
	volatile unsigned long here, there;
	unsigned char pattern[3 * PAGE];
} *shm;
static int shm_fd;

static void make_shm(void)
{
	shm_fd = open("/dev/shm/removed", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
	need(shm_fd >= 0);
	need(!ftruncate(shm_fd, sizeof(*shm) + 100));
	shm = mmap(NULL, sizeof(*shm), PROT_READ | PROT_WRITE, MAP_SHARED, shm_fd, 0);
	need(shm != MAP_FAILED);
	need(!unlink("/dev/shm/removed"));
	fill_pattern(shm->pattern, sizeof(shm->pattern), 31);
	if (fork())
		return;
	for (;; doze(5 * MS))
		shm->there = shm->here;
}

static void check_shm(void)
{
	struct stat st;
	char link[256] = "", path[64];

	check_filled(shm->pattern, sizeof(shm->pattern), 31, "removed file");
	if (shm->there + STALLED < shm->here)
		fail("the removed file is not shared any more");
	shm->here = round_no;
	need(pread(shm_fd, &st, 8, 0) == 8);
	need(*(unsigned long *)&st == round_no);
	need(!fstat(shm_fd, &st));
	need(st.st_nlink == 0 && (st.st_mode & 0777) == 0640);
	need(st.st_size == sizeof(*shm) + 100);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", shm_fd);
	need(readlink(path, link, sizeof(link) - 1) > 0);
	if (strcmp(link, "/dev/shm/removed (deleted)"))
		fail("the removed file is now %s", link);
	need(access("/dev/shm/removed", F_OK) == -1);
}

/* --- what is mapped from now on is locked --- */

static volatile unsigned long *onfault_rounds;

static void check_future(int onfault)
{
	unsigned char vec, *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(p != MAP_FAILED);
	need(msync(p, PAGE, MS_INVALIDATE) == -1 && errno == EBUSY);
	need(!mincore(p, PAGE, &vec));
	need((vec & 1) == !onfault);
	need(!munmap(p, PAGE));
}

static void make_future(void)
{
	onfault_rounds = map_shared(PAGE);
	if (!fork()) {
		need(!mlockall(MCL_FUTURE | MCL_ONFAULT));
		for (;; doze(5 * MS)) {
			check_future(1);
			++*onfault_rounds;
		}
	}
	need(!mlockall(MCL_FUTURE));
}

static void check_onfault(void)
{
	static struct worker w = { .name = "locks on fault" };

	w.done = *onfault_rounds;
	watch(&w, 1);
}

int main(void)
{
	report_open("areas");
	data_fd = open("/out/areas.data", O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	need(data_fd >= 0);
	make_areas();
	make_stack();
	make_memfds();
	make_shm();
	make_future();
	for (;;) {
		check_areas();
		check_guarded();
		check_fork();
		check_stack();
		check_memfds();
		check_shm();
		check_future(0);
		check_onfault();
		tick();
		doze(10 * MS);
	}
}
