/*
 * rootfs - what a container changes in its root file system: below /data, which
 * holds what the test has put there, entries of every type are made, changed,
 * replaced and removed; some are open and mapped, and one is executed. With
 * "rights", some belong to others, raise rights or are device nodes; with "move",
 * a directory of the image is renamed.
 */
#include "hold.h"

#include <dirent.h>
#include <sys/socket.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>

#define SPARSE (6LL << 30)
#define MAPPED (1 << 18)

static void put(const char *path, const char *text, int flags)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644);

	need(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

static void holds(const char *path, off_t at, const char *text)
{
	char buf[64] = "";
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOATIME);

	if (fd < 0)
		fail("%s: %s", path, strerror(errno));
	need(pread(fd, buf, sizeof(buf) - 1, at) >= (ssize_t)strlen(text));
	if (strncmp(buf, text, strlen(text)))
		fail("%s holds %s", path, buf);
	close(fd);
}

static int log_fd, removed_fd, dir_fd;
static uint64_t *shared;

static void make(int rights, int moves)
{
	struct timespec odd[2] = { { 1000000007, 123456789 },
				   { -5, 999999999 } };
	char old[] = "/bin/echo", copy[] = "/data/new/echo", buf[65536];
	int fd, from;
	ssize_t n;

	umask(022);
	need(!chdir("/data"));
	need(!unlink("gone") && !unlink("gonedir/a"));
	need(!unlink("gonedir/b/c") && !rmdir("gonedir/b") && !rmdir("gonedir"));
	need(!unlink("opaque/x") && !unlink("opaque/y") && !rmdir("opaque"));
	need(!mkdir("opaque", 0750));
	put("opaque/x", "another x", O_EXCL);
	put("changed", " and more", O_APPEND);
	need(!unlink("filedir") && !mkdir("filedir", 0711));
	put("filedir/in", "in a directory that was a file", O_EXCL);
	need(!unlink("dirfile/in") && !rmdir("dirfile"));
	put("dirfile", "a file that was a directory", O_EXCL);
	put("hard1", "hard", O_TRUNC);
	need(!chmod("mode", 0640) && !chmod("modedir", 01777));
	put("deep/er/touched", "touched", O_TRUNC);
	need(!rename("deep/er/from", "to"));
	need(!mkdir("new", 0700) && !mkdir("new/closed", 0));
	put("new/text", "hello, world", O_EXCL);
	need(!link("new/text", "deep/link") && !link("new/text", "link"));
	need(!symlink("../new/text", "new/symlink"));
	need(!symlink("/no/where", "dangling \xff\n"));
	need(!mkfifo("fifo", 0622) && !mknod("sock", S_IFSOCK | 0755, 0));
	fd = open("sparse", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	need(fd >= 0 && !ftruncate(fd, SPARSE));
	need(pwrite(fd, "middle", 6, (5LL << 30) + 3) == 6);
	need(pwrite(fd, "end", 3, SPARSE - 3) == 3);
	close(fd);
	need(!setxattr("new/text", "user.note", "\0bin", 4, 0));
	need(!setxattr("deep", "user.empty", "", 0, 0));
	put("readonly", "look", O_EXCL);
	need(!chmod("readonly", 04500) && !utimensat(AT_FDCWD, "readonly", odd, 0));
	need(!utimensat(AT_FDCWD, "new/symlink", odd, AT_SYMLINK_NOFOLLOW));
	if (moves) {
		need(!rename("moved", "moved-here"));
		put("moved-here/more", "more", O_EXCL);
	}
	if (rights) {
		/* cap_net_raw+ep, without the root id of a user namespace */
		static const uint32_t caps[5] = { 0x02000001, 1 << 13, 0, 0, 0 };

		need(!chown("link", 1000, 2000) && !lchown("new/symlink", 3, 4));
		need(!chmod("link", 06755));
		need(!mknod("null", S_IFCHR | 0666, makedev(1, 3)));
		need(!setxattr("changed", "security.capability", caps, 20, 0));
	}
	/* what is open, mapped and executed */
	log_fd = open("new/log", O_RDWR | O_CREAT | O_APPEND, 0600);
	removed_fd = open("removed", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	need(log_fd >= 0 && write(removed_fd, "removed", 7) == 7);
	need(!unlink("removed"));
	dir_fd = open("opaque", O_RDONLY | O_DIRECTORY);
	fd = open("mapped", O_RDWR | O_CREAT, 0600);
	need(dir_fd >= 0 && fd >= 0 && !ftruncate(fd, MAPPED));
	shared = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	need(shared != MAP_FAILED);
	close(fd);
	for (size_t i = 0; i < MAPPED / 8; i++)
		shared[i] = i * 0x9e3779b97f4a7c15ULL;
	need(!chdir("new"));
	from = open(old, O_RDONLY);
	fd = open(copy, O_WRONLY | O_CREAT, 0755);
	need(from >= 0 && fd >= 0);
	while ((n = read(from, buf, sizeof(buf))) > 0)
		need(write(fd, buf, n) == n);
	close(fd);
	close(from);
}

static void absent(const char *path)
{
	need(access(path, F_OK) == -1 && errno == ENOENT);
}

static void check(int rights, int moves)
{
	struct stat st, other;
	char buf[64], line[9];
	uint64_t now;
	int fd;

	absent("/data/gone");
	absent("/data/gonedir");
	absent("/data/opaque/y");
	absent("/data/deep/er/from");
	absent("/data/removed");
	holds("/data/opaque/x", 0, "another x");
	holds("/data/changed", 0, "changed\n and more");
	holds("/data/filedir/in", 0, "in a directory that was a file");
	holds("/data/dirfile", 0, "a file that was a directory");
	holds("/data/hard1", 0, "hard");
	holds("/data/kept", 0, "kept");
	holds("/data/to", 0, "deep/er/from");
	holds("/data/deep/er/touched", 0, "touched");
	holds("/data/deep/er/untouched", 0, "deep/er/untouched");
	holds("/data/sparse", (5LL << 30) + 3, "middle");
	holds("/data/sparse", SPARSE - 3, "end");
	need(!stat("/data/sparse", &st) && st.st_size == SPARSE);
	need(st.st_blocks <= 2 * 4096 / 512 * 4); /* four pages at most */
	need(!stat("text", &st) && !stat("/data/deep/link", &other));
	need(st.st_ino == other.st_ino && st.st_nlink == 3);
	need(getxattr("text", "user.note", buf, sizeof(buf)) == 4 &&
	     !memcmp(buf, "\0bin", 4));
	need(!lstat("/data/readonly", &st) && st.st_mode == (S_IFREG | 04500));
	need(st.st_mtim.tv_sec == -5 && st.st_mtim.tv_nsec == 999999999);
	need(!lstat("/data/sock", &st) && st.st_mode == (S_IFSOCK | 0755));
	need(readlink("/data/dangling \xff\n", buf, sizeof(buf)) == 9);
	if (moves) {
		absent("/data/moved");
		holds("/data/moved-here/inside", 0, "moved/inside");
		holds("/data/moved-here/more", 0, "more");
	}
	if (rights) {
		need(!stat("/data/null", &st) && st.st_rdev == makedev(1, 3));
		need(!stat("/data/link", &st) && st.st_mode == (S_IFREG | 06755));
		need(st.st_uid == 1000 && st.st_gid == 2000);
		need(getxattr("/data/changed", "security.capability", buf, 64) == 20);
	}
	/* open files go on, and are those that have the names */
	snprintf(line, sizeof(line), "%07lu", round_no + 1);
	need(write(log_fd, line, 8) == 8);
	need(!fstat(log_fd, &st) && st.st_size == 8 * ((off_t)round_no + 1));
	need(!stat("/data/new/log", &other) && st.st_ino == other.st_ino);
	need(pread(removed_fd, buf, 64, 0) == 7 && !memcmp(buf, "removed", 7));
	need(!fstat(dir_fd, &st) && !stat("/data/opaque", &other));
	need(st.st_ino == other.st_ino);
	for (size_t i = 1; i < MAPPED / 8; i += 512)
		need(shared[i] == i * 0x9e3779b97f4a7c15ULL);
	shared[0] = round_no;
	fd = open("/data/mapped", O_RDONLY | O_CLOEXEC);
	need(fd >= 0 && read(fd, &now, 8) == 8 && now == round_no);
	close(fd);
}

int main(int argc, char **argv)
{
	int rights = argc > 1 && wanted(argc, argv, "rights");
	int moves = argc > 1 && wanted(argc, argv, "move");
	int fd;

	report_open("rootfs");
	make(rights, moves);
	if (!fork()) { /* runs from a file that is new */
		execl("/data/new/echo", "sleep", "100000", NULL);
		_exit(1);
	}
	fd = open("/data/new", O_RDONLY | O_DIRECTORY);
	need(fd >= 0);
	for (;;) {
		check(rights, moves);
		tick();
		doze(20 * MS);
	}
}
