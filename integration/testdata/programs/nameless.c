/*
 * nameless - files and directories that are held under names they have lost:
 * removed, replaced, renamed, linked elsewhere, never named. What they hold, who
 * shares them and how /proc calls them must stay as it was. Three children map
 * one of them, run from a removed executable and stand in a removed directory.
 */
#include "hold.h"

#include <sys/xattr.h>

#include <sys/vfs.h>

static struct held {
	int fd;
	char link[256];
} holds[32];
static int held_count;

static void link_of(int fd, char *to)
{
	char path[64];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, to, 255);
	need(n > 0);
	to[n] = 0;
}

/* hold remembers how /proc calls a descriptor; called when its name has gone. */
static void hold(int fd)
{
	need(fd >= 0);
	holds[held_count].fd = fd;
	link_of(fd, holds[held_count++].link);
}

static void check_names(void)
{
	char now[256];

	for (int i = 0; i < held_count; i++) {
		link_of(holds[i].fd, now);
		if (strcmp(now, holds[i].link))
			fail("fd %d was %s and is %s", holds[i].fd,
			     holds[i].link, now);
	}
}

static int create(const char *path, int flags)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | flags, 0640);

	if (fd < 0)
		fail("create %s: %s", path, strerror(errno));
	return fd;
}

static struct stat st_of(int fd)
{
	struct stat st;

	need(!fstat(fd, &st));
	return st;
}

static void expect(int fd, off_t at, const char *text)
{
	char b[64] = "";

	need(pread(fd, b, strlen(text), at) == (ssize_t)strlen(text));
	if (strcmp(b, text))
		fail("fd %d holds '%s' at %lld, not '%s'", fd, b,
		     (long long)at, text);
}

/* --- removed: several descriptors, mappings and a child share it --- */

static int rw_fd, append_fd, read_fd, place_fd;
static volatile unsigned long *shared_map;
static char *private_map;

static void make_removed(void)
{
	rw_fd = create("/out/nameless.removed", 0);
	need(!ftruncate(rw_fd, 3 * 4096 + 5));
	need(pwrite(rw_fd, "begin", 5, 4096) == 5);
	need(pwrite(rw_fd, "end", 3, 3 * 4096 + 2) == 3);
	append_fd = open("/out/nameless.removed", O_WRONLY | O_APPEND);
	read_fd = open("/out/nameless.removed", O_RDONLY | O_NONBLOCK);
	place_fd = open("/out/nameless.removed", O_PATH);
	need(lseek(read_fd, 4098, SEEK_SET) == 4098);
	shared_map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED,
			  rw_fd, 0);
	private_map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE,
			   read_fd, 0);
	need(shared_map != MAP_FAILED && private_map != MAP_FAILED);
	private_map[0] = 'p';
	need(!unlink("/out/nameless.removed"));
	need(!fchmod(rw_fd, 0604));
	hold(rw_fd);
	hold(append_fd);
	hold(read_fd);
	hold(place_fd);
}

static void check_removed(void)
{
	struct stat st = st_of(rw_fd), other = st_of(append_fd);
	char c = 'a' + round_no % 26, d;

	need(!st.st_nlink && (st.st_mode & 07777) == 0604);
	need(st.st_ino == other.st_ino && st.st_dev == other.st_dev);
	other = st_of(read_fd);
	need(st.st_ino == other.st_ino);
	other = st_of(place_fd);
	need(st.st_ino == other.st_ino);
	need(access("/out/nameless.removed", F_OK) && errno == ENOENT);
	need(lseek(read_fd, 0, SEEK_CUR) == 4098);
	expect(read_fd, 4096, "begin");
	need(private_map[0] == 'p' && private_map[4096] == 'b');
	/* One file still: what is written here is seen there. */
	need(pwrite(rw_fd, &c, 1, 5000) == 1);
	need(pread(read_fd, &d, 1, 5000) == 1 && c == d);
	need(((volatile char *)shared_map)[5000] == c);
	need((fcntl(append_fd, F_GETFL) & (O_APPEND | O_ACCMODE)) ==
	     (O_APPEND | O_WRONLY));
	need(st.st_size == (off_t)(3 * 4096 + 5 + round_no));
	need(write(append_fd, &c, 1) == 1);
}

/* --- larger than 4 GiB, nearly all of it holes --- */

#define HUGE_AT (5LL << 30)

static int huge_fd;
static blkcnt_t huge_blocks;
static const struct timespec past[2] = { { 1000, 1 }, { 2000, 123456789 } };

static void make_huge(void)
{
	huge_fd = create("/out/nameless.huge", 0);
	need(pwrite(huge_fd, "low", 3, 0) == 3);
	need(pwrite(huge_fd, "high", 4, HUGE_AT) == 4);
	need(!ftruncate(huge_fd, HUGE_AT + (1 << 20)));
	need(!fsetxattr(huge_fd, "user.note", "a\0b", 3, 0));
	need(!unlink("/out/nameless.huge"));
	need(!fsync(huge_fd) && !futimens(huge_fd, past));
	huge_blocks = st_of(huge_fd).st_blocks;
	hold(huge_fd);
}

static void check_huge(void)
{
	struct stat st = st_of(huge_fd);
	char note[8];

	need(st.st_size == HUGE_AT + (1 << 20) && !st.st_nlink);
	need(st.st_mtim.tv_sec == past[1].tv_sec &&
	     st.st_mtim.tv_nsec == past[1].tv_nsec);
	need(st.st_blocks <= huge_blocks + 16);
	need(fgetxattr(huge_fd, "user.note", note, 8) == 3);
	need(!memcmp(note, "a\0b", 3));
	expect(huge_fd, 0, "low");
	expect(huge_fd, HUGE_AT, "high");
}

/* --- renamed, replaced, linked elsewhere, never named --- */

static int renamed_fd, replaced_fd, linked_fd, unnamed_fd, direct_fd;
static int symlink_fd, old_symlink_fd;

static void make_others(void)
{
	int fd;

	renamed_fd = create("/out/nameless.a", 0);
	need(!rename("/out/nameless.a", "/out/nameless.b"));
	hold(renamed_fd);

	replaced_fd = create("/out/nameless.replaced~", 0);
	need(write(replaced_fd, "old", 3) == 3);
	fd = create("/out/nameless.new", 0);
	need(write(fd, "new", 3) == 3 && !close(fd));
	/* The second generation has the name beside it; so has this one. */
	need(!unlink("/out/nameless.replaced~"));
	fd = create("/out/nameless.replaced", 0);
	need(write(fd, "old", 3) == 3);
	need(!rename("/out/nameless.new", "/out/nameless.replaced"));
	close(replaced_fd);
	replaced_fd = fd;

	linked_fd = create("/out/nameless.linked", O_TRUNC);
	unlink("/out/nameless.other");
	need(!link("/out/nameless.linked", "/out/nameless.other"));
	need(!unlink("/out/nameless.linked"));
	hold(linked_fd);

	unnamed_fd = open("/out", O_TMPFILE | O_RDWR, 0600);
	need(unnamed_fd >= 0 && write(unnamed_fd, "none", 4) == 4);

	direct_fd = create("/out/nameless.direct", O_DIRECT);
	need(!unlink("/out/nameless.direct"));
	hold(direct_fd);

	unlink("/out/nameless.symlink");
	need(!symlink("/nowhere", "/out/nameless.symlink"));
	symlink_fd = open("/out/nameless.symlink", O_PATH | O_NOFOLLOW);
	hold(symlink_fd);
	need(!symlink("/gone", "/out/nameless.oldlink"));
	old_symlink_fd = open("/out/nameless.oldlink", O_PATH | O_NOFOLLOW);
	need(!unlink("/out/nameless.oldlink"));
	hold(old_symlink_fd);
}

static void expect_target(int fd, const char *target)
{
	char b[64] = "";

	need(readlinkat(fd, "", b, sizeof(b) - 1) > 0 && !strcmp(b, target));
}

static void check_others(void)
{
	struct stat st, other;
	char c = 'a' + round_no % 26, d, name[256];
	int fd;

	st = st_of(renamed_fd);
	need(!stat("/out/nameless.b", &other) && st.st_ino == other.st_ino);

	expect(replaced_fd, 0, "old");
	need(!st_of(replaced_fd).st_nlink);
	link_of(replaced_fd, name);
	need(!strncmp(name, "/out/nameless.replaced", 22) &&
	     strstr(name, " (deleted)"));
	fd = open("/out/nameless.replaced", O_RDONLY);
	need(fd >= 0);
	expect(fd, 0, "new");
	close(fd);

	st = st_of(linked_fd);
	need(st.st_nlink == 1 && !stat("/out/nameless.other", &other));
	need(st.st_ino == other.st_ino);
	need(access("/out/nameless.linked", F_OK));
	fd = open("/out/nameless.other", O_RDONLY);
	need(pwrite(linked_fd, &c, 1, 0) == 1);
	need(pread(fd, &d, 1, 0) == 1 && c == d && !close(fd));

	expect(unnamed_fd, 0, "none");
	need((fcntl(unnamed_fd, F_GETFL) & O_TMPFILE) == O_TMPFILE);
	need(lseek(unnamed_fd, 0, SEEK_CUR) == 4);
	need(fcntl(direct_fd, F_GETFL) & O_DIRECT);
	expect_target(symlink_fd, "/nowhere");
	expect_target(old_symlink_fd, "/gone");
}

/* link_unnamed shows at the end of the test that it can be given a name yet. */
static void link_unnamed(void)
{
	char path[64];

	if (access("/out/nameless.connect", F_OK))
		return;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", unnamed_fd);
	unlink("/out/nameless.named");
	need(!linkat(AT_FDCWD, path, AT_FDCWD, "/out/nameless.named",
		     AT_SYMLINK_FOLLOW));
	need(!unlink("/out/nameless.named"));
	close(unnamed_fd);
	unnamed_fd = open("/out", O_TMPFILE | O_RDWR, 0600);
	need(unnamed_fd >= 0 && write(unnamed_fd, "none", 4) == 4);
	unlink("/out/nameless.connect");
}

/* --- directories --- */

static int dir_fd, sub_fd, in_fd;

static void make_directories(void)
{
	need(!mkdir("/out/nameless.d", 0750) || errno == EEXIST);
	need(!mkdir("/out/nameless.d/sub", 0705) || errno == EEXIST);
	dir_fd = open("/out/nameless.d", O_RDONLY | O_DIRECTORY);
	sub_fd = open("/out/nameless.d/sub", O_PATH);
	in_fd = create("/out/nameless.d/sub/in", 0);
	need(write(in_fd, "in", 2) == 2);
	need(!unlink("/out/nameless.d/sub/in"));
	need(!rmdir("/out/nameless.d/sub") && !rmdir("/out/nameless.d"));
	hold(dir_fd);
	hold(sub_fd);
	hold(in_fd);
}

static void check_directories(void)
{
	struct stat up, st = st_of(dir_fd);

	need(S_ISDIR(st.st_mode) && (st.st_mode & 07777) == 0750);
	need((st_of(sub_fd).st_mode & 07777) == 0705);
	need(!fstatat(sub_fd, "..", &up, 0) && up.st_ino == st.st_ino);
	need(openat(dir_fd, "x", O_CREAT | O_RDWR, 0600) == -1 &&
	     errno == ENOENT);
	expect(in_fd, 0, "in");
	need(access("/out/nameless.d", F_OK) && errno == ENOENT);
}

/* --- files of an overlay's lower directory, removed or copied up --- */

static int below_fd = -1, up_fd, copied_fd;
static char below[16], up[16], *below_map;

static void make_overlay(void)
{
	below_fd = open("/etc/passwd", O_RDONLY);
	need(read(below_fd, below, 10) == 10);
	below_map = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, below_fd, 0);
	need(below_map != MAP_FAILED && !unlink("/etc/passwd"));
	hold(below_fd);
	copied_fd = open("/etc/group", O_RDONLY);
	need(read(copied_fd, up, 10) == 10);
	up_fd = open("/etc/group", O_RDWR);
	need(up_fd >= 0);
	hold(copied_fd);
}

static void check_overlay(void)
{
	if (below_fd < 0)
		return;
	expect(below_fd, 0, below);
	need(!memcmp(below_map, below, 10));
	need(lseek(below_fd, 0, SEEK_CUR) == 10);
	need(access("/etc/passwd", F_OK));
	need(pwrite(up_fd, round_no % 2 ? "X" : "Y", 1, 0) == 1);
	expect(copied_fd, 0, round_no % 2 ? "X" : "Y");
	expect(copied_fd, 1, up + 1);
}

/* --- children --- */

static struct worker *workers;

static void count_up(void)
{
	for (;;) {
		shared_map[0]++;
		workers[0].done++;
		doze(5 * MS);
	}
}

static void stand_nowhere(void)
{
	char b[128] = "";

	need(!mkdir("/out/nameless.cwd", 0755) || errno == EEXIST);
	need(!chdir("/out/nameless.cwd") && !rmdir("/out/nameless.cwd"));
	for (;;) {
		need(!getcwd(b, sizeof(b)) && errno == ENOENT);
		need(readlink("/proc/self/cwd", b, sizeof(b) - 1) > 0);
		need(!strcmp(b, "/out/nameless.cwd (deleted)"));
		need(access("..", F_OK) == 0);
		workers[1].done++;
		doze(5 * MS);
	}
}

/* The executable that is run after its removal is a copy of this one; its
 * counter lies in the removed file, on a descriptor that is inherited. */
static void run_removed(int counter, const char *self)
{
	char b[128] = "", arg[16], buf[65536];
	int from = open(self, O_RDONLY), to, fd;
	ssize_t n;

	to = open("/out/nameless.exe", O_WRONLY | O_CREAT | O_TRUNC, 0755);
	need(from >= 0 && to >= 0);
	while ((n = read(from, buf, sizeof(buf))) > 0)
		need(write(to, buf, n) == n);
	close(to);
	fd = open("/out/nameless.exe", O_RDONLY | O_CLOEXEC);
	need(!unlink("/out/nameless.exe"));
	snprintf(arg, sizeof(arg), "%d", counter);
	snprintf(b, sizeof(b), "/proc/self/fd/%d", fd);
	execl(b, "nameless", "running", arg, NULL);
	fail("exec: %s", strerror(errno));
}

static void running(int counter)
{
	volatile unsigned long *count;
	char b[128] = "";

	report_open("nameless");
	count = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, counter,
		     0);
	need(count != MAP_FAILED);
	for (;;) {
		need(readlink("/proc/self/exe", b, sizeof(b) - 1) > 0);
		need(!strcmp(b, "/out/nameless.exe (deleted)"));
		need(open("/proc/self/exe", O_RDWR) == -1 && errno == ETXTBSY);
		count[1]++;
		doze(5 * MS);
	}
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "running"))
		running(atoi(argv[2]));
	report_open("nameless");
	make_removed();
	make_huge();
	make_others();
	make_directories();
	if (argc > 1 && !strcmp(argv[1], "overlay"))
		make_overlay();
	workers = map_shared(4096);
	workers[0].name = "mapping";
	workers[1].name = "directory";
	workers[2].name = "executable";
	if (!fork())
		count_up();
	if (!fork())
		stand_nowhere();
	if (!fork())
		run_removed(rw_fd, argv[0]);
	for (;;) {
		check_names();
		check_removed();
		check_huge();
		check_others();
		check_directories();
		check_overlay();
		link_unnamed();
		workers[2].done = shared_map[1];
		watch(workers, 3);
		tick();
		doze(10 * MS);
	}
}
