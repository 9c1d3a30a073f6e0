/*
 * mounts [shared] - mounts that the container makes, changes and takes away
 * itself: new file systems with content, parts of others, mounts on top of
 * others with files open below, peer groups and slaves. With "shared" all
 * mounts are made shared first. What /proc tells of all mounts must stay, but
 * for numbers, and what is open below others must stay reachable.
 */
#include "hold.h"
#include <sys/mount.h>

#define M "/out/m/"
#define MOUNTS_MAX 128

struct line {
	int id, parent, peers, master, unbindable;
	char dev[16], root[256], point[256], options[128], rest[512];
};

struct table {
	int n;
	struct line line[MOUNTS_MAX];
	char text[MOUNTS_MAX][1024];
};

/* The name of a group or of a file system is the first point it is seen at. */
static const char *group_name(struct table *t, int group)
{
	const char *name = NULL;

	if (!group)
		return "-";
	for (int i = 0; i < t->n; i++)
		if (t->line[i].peers == group && (!name || strcmp(t->line[i].point, name) < 0))
			name = t->line[i].point;
	return name ? name : "outside";
}

static const char *fs_name(struct table *t, const char *dev)
{
	const char *name = NULL;

	for (int i = 0; i < t->n; i++)
		if (!strcmp(t->line[i].dev, dev) && (!name || strcmp(t->line[i].point, name) < 0))
			name = t->line[i].point;
	return name;
}

static struct line *parent_of(struct table *t, struct line *l)
{
	for (int i = 0; i < t->n; i++)
		if (t->line[i].id == l->parent)
			return &t->line[i];
	return NULL;
}

static int by_text(const void *a, const void *b)
{
	return strcmp(a, b);
}

/* Reads mountinfo into lines that have no numbers in them, sorted. */
static void read_mounts(struct table *t)
{
	static char all[64 << 10];
	char *save = NULL;

	slurp("/proc/self/mountinfo", all, sizeof(all));
	t->n = 0;
	for (char *at = strtok_r(all, "\n", &save); at; at = strtok_r(NULL, "\n", &save)) {
		struct line *l = &t->line[t->n++];
		char *dash = strstr(at, " - "), *f;

		need(t->n < MOUNTS_MAX && dash);
		memset(l, 0, sizeof(*l));
		*dash = 0;
		need(sscanf(at, "%d %d %15s %255s %255s %127s", &l->id, &l->parent,
			    l->dev, l->root, l->point, l->options) == 6);
		if ((f = strstr(at, " shared:")))
			l->peers = atoi(f + 8);
		if ((f = strstr(at, " master:")))
			l->master = atoi(f + 8);
		l->unbindable = strstr(at, " unbindable") != NULL;
		snprintf(l->rest, sizeof(l->rest), "%s", dash + 3);
		if (!strncmp(l->rest, "tmpfs tmpfs ro", 14)) {	/* a masked path, which */
			l->rest[14] = 0;	/* another engine may make in another way */
			strcpy(l->dev, "masked");
		}
	}
	for (int i = 0; i < t->n; i++) {
		struct line *l = &t->line[i], *p = parent_of(t, l);

		snprintf(t->text[i], sizeof(t->text[i]), "%s %s on %s %s of %s; %s; peers %s, master %s, %d; %s",
			 l->point, l->root, p ? p->point : "nothing", p ? p->rest : "", fs_name(t, l->dev),
			 l->options, group_name(t, l->peers), group_name(t, l->master), l->unbindable, l->rest);
	}
	qsort(t->text, t->n, sizeof(t->text[0]), by_text);
}

static struct table first;

static void check_mounts(void)
{
	static struct table now;

	read_mounts(&now);
	for (int i = 0; i < first.n && i < now.n; i++)
		if (strcmp(first.text[i], now.text[i]))
			fail("was %.200s, is %.200s", first.text[i], now.text[i]);
	if (first.n != now.n)
		fail("there were %d mounts, there are %d", first.n, now.n);
}

static int create(const char *path, const char *text)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0640);

	if (fd < 0)
		fail("create %s: %s", path, strerror(errno));
	need(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	return fd;
}

static void put(const char *path, const char *text)
{
	close(create(path, text));
}

static void holds(int fd, const char *text)
{
	char buf[64];
	ssize_t n = pread(fd, buf, sizeof(buf) - 1, 0);

	need(n >= 0);
	buf[n] = 0;
	if (strcmp(buf, text))
		fail("fd %d holds %s and not %s", fd, buf, text);
}

static void shows(const char *path, const char *text)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail("open %s: %s", path, strerror(errno));
	holds(fd, text);
	close(fd);
}

static void dir(const char *path)
{
	if (mkdir(path, 0755) && errno != EEXIST)
		fail("mkdir %s: %s", path, strerror(errno));
}

static void mnt(const char *source, const char *point, const char *type, unsigned long flags, const char *data)
{
	if (mount(source, point, type, flags, data))
		fail("mount %s: %s", point, strerror(errno));
}

static void fresh(const char *source, const char *point, const char *type, unsigned long flags, const char *data)
{
	dir(point);
	mnt(source, point, type, flags, data);
}

static int covered, covered_dir, low, deep, null, link_fd, ro_fd;
static volatile char *mapped;
static struct worker *stander;

/* A process that stands, and has its root, where nobody gets by path. */
static void stand(void)
{
	struct stat was, now;

	need(!chdir(M "hid/sub") && !chroot(M "hid"));
	need(!stat(".", &was));
	stander->done = 1;
	for (;;) {
		char cwd[256];

		need(!stat(".", &now) && now.st_ino == was.st_ino && now.st_dev == was.st_dev);
		need(!access("/x", R_OK) && !access("y", R_OK));
		need(getcwd(cwd, sizeof(cwd)) && !strcmp(cwd, "/sub"));
		stander->done++;
		doze(20 * MS);
	}
}

static void cover(void)
{
	dir(M "hid");
	dir(M "hid/sub");
	put(M "hid/sub/y", "y");
	covered = create(M "hid/x", "below");
	covered_dir = open(M "hid/sub", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	need(!symlink("nowhere", M "hid/link"));
	link_fd = open(M "hid/link", O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (mknod(M "hid/null", S_IFCHR | 0666, 0x103)) {	/* in a user namespace */
		put(M "hid/null", "");
		mnt("/dev/null", M "hid/null", NULL, MS_BIND, NULL);
	}
	null = open(M "hid/null", O_RDWR | O_CLOEXEC);
	mapped = mmap(NULL, 4096, PROT_READ, MAP_SHARED, covered, 0);
	need(covered_dir >= 0 && link_fd >= 0 && null >= 0 && mapped != MAP_FAILED);
	if (!fork()) {
		stand();
		_exit(1);
	}
	while (!stander->done)
		doze(MS);
	mnt("cover", M "hid", "tmpfs", 0, "mode=755");
	put(M "hid/x", "above");
}

static void check_covered(void)
{
	struct stat st;
	char text[64];

	holds(covered, "below");
	shows(M "hid/x", "above");
	need(mapped[0] == 'b');
	need(faccessat(covered_dir, "y", R_OK, 0) == 0);
	need(readlinkat(link_fd, "", text, sizeof(text)) == 7);
	need(write(null, "x", 1) == 1);
	need(!fstat(covered, &st) && st.st_nlink == 1);
}

static void stack(void)
{
	fresh("low", M "s", "tmpfs", 0, "mode=700");
	low = create(M "s/file", "low");
	fresh("deep", M "s/deep", "tmpfs", MS_NOEXEC, "mode=755");
	deep = create(M "s/deep/file", "deep");
	mnt("high", M "s", "tmpfs", MS_NODEV, "mode=750");
	put(M "s/file", "high");
	mnt(M "t/src", M "s", NULL, MS_BIND, NULL);
}

static void check_stack(void)
{
	holds(low, "low");
	holds(deep, "deep");
	shows(M "s/inner", "inner");
	need(access(M "s/file", F_OK) == -1);
}

/* What systemd mounts, where the kernel has it. */
static void make_kernels(void)
{
	static const char *types[] = { "fusectl", "debugfs", "tracefs", "securityfs", "configfs", "binfmt_misc", "hugetlbfs" };
	char known[4096], line[32], at[64];

	slurp("/proc/filesystems", known, sizeof(known));
	for (size_t i = 0; i < COUNT(types); i++) {
		snprintf(line, sizeof(line), "\t%s\n", types[i]);
		snprintf(at, sizeof(at), M "%s", types[i]);
		if (strstr(known, line))
			fresh("kernel", at, types[i], MS_NOSUID | MS_NODEV, NULL);
	}
}

static void make(int mapped_ids)
{
	if (!mapped_ids)
		make_kernels();
	fresh("own", M "t", "tmpfs", MS_NOSUID, "size=1m,mode=711");
	dir(M "t/src");
	dir(M "t/lower");
	dir(M "t/upper");
	dir(M "t/work");
	dir(M "t/point");
	put(M "t/src/inner", "inner");
	put(M "t/lower/l", "l");
	put(M "t/file", "file");
	need(!truncate(M "t/file", 300000));
	dir(M "b");
	mnt(M "t/src", M "b", NULL, MS_BIND, NULL);
	mnt(NULL, M "b", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NODEV, NULL);
	put(M "f", "");
	mnt(M "t/file", M "f", NULL, MS_BIND, NULL);
	dir(M "e");
	mnt("/bin", M "e", NULL, MS_BIND, NULL);
	dir(M "t/merged");
	mnt("ov", M "t/merged", "overlay", 0, mapped_ids ?
	    "userxattr,lowerdir=" M "t/lower,upperdir=" M "t/upper,workdir=" M "t/work" :
	    "lowerdir=" M "t/lower,upperdir=" M "t/upper,workdir=" M "t/work");
	put(M "t/merged/new", "new");
	fresh("p", M "p", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, "hidepid=1");
	fresh("none", M "y", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, NULL);
	fresh("d", M "d", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666");
	fresh("q", M "q", "mqueue", MS_NOSUID | MS_NODEV, NULL);
	fresh("ro", M "ro", "tmpfs", 0, "mode=755");
	put(M "ro/file", "ro");
	mnt("ro", M "ro", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	ro_fd = open(M "ro/file", O_RDONLY | O_CLOEXEC);
	need(ro_fd >= 0);
}

/* What the bundle has mounted is changed. */
static void change(int mapped_ids)
{
	need(!umount("/dev/mqueue"));
	mnt(NULL, "/dev/shm", NULL, MS_REMOUNT | MS_NOSUID | MS_NODEV, "size=4m");
	put("/dev/shm/kept", "kept");
	mnt(NULL, "/proc/bus", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOEXEC | MS_NOSUID | MS_NODEV, NULL);
	if (!mapped_ids)
		need(!umount2("/sys/firmware", MNT_DETACH));
}

static void share(void)
{
	dir(M "sl");
	dir(M "ss");
	dir(M "t2");
	mnt(NULL, M "t", NULL, MS_SHARED, NULL);
	mnt(M "t", M "t2", NULL, MS_BIND, NULL);
	mnt(M "t", M "sl", NULL, MS_BIND, NULL);
	mnt(NULL, M "sl", NULL, MS_SLAVE, NULL);
	mnt(M "t", M "ss", NULL, MS_BIND, NULL);
	mnt(NULL, M "ss", NULL, MS_SLAVE, NULL);
	mnt(NULL, M "ss", NULL, MS_SHARED, NULL);
	fresh("u", M "u", "tmpfs", 0, NULL);
	mnt(NULL, M "u", NULL, MS_UNBINDABLE, NULL);
}

/* A mount appears with the peers and the slaves, and not with the peers of a slave. */
static void check_events(void)
{
	mnt("event", M "t/point", "tmpfs", 0, NULL);
	put(M "t/point/x", "x");
	shows(M "t2/point/x", "x");
	shows(M "sl/point/x", "x");
	shows(M "ss/point/x", "x");
	need(!umount(M "t2/point"));
	need(access(M "sl/point/x", F_OK) == -1 && access(M "t/point/x", F_OK) == -1);
	mnt("event", M "ss/point", "tmpfs", 0, NULL);
	put(M "ss/point/x", "x");
	need(access(M "t/point/x", F_OK) == -1 && access(M "sl/point/x", F_OK) == -1);
	need(!umount(M "ss/point"));
	need(mount(M "u", M "e", NULL, MS_BIND, NULL) == -1 && errno == EINVAL);
}

static void check(void)
{
	struct stat st;

	check_mounts();
	check_covered();
	check_stack();
	shows(M "b/inner", "inner");
	need(open(M "b/inner", O_WRONLY) == -1 && errno == EROFS);
	need(!stat(M "f", &st) && st.st_size == 300000 && st.st_blocks <= 16);
	shows(M "t/merged/l", "l");
	shows(M "t/merged/new", "new");
	shows(M "t/upper/new", "new");
	shows(M "ro/file", "ro");
	holds(ro_fd, "ro");
	need(open(M "ro/file", O_WRONLY) == -1 && errno == EROFS);
	need(!access(M "p/self/stat", R_OK) && !access(M "y/class", R_OK) && !access(M "e/busybox", R_OK));
	need(!access(M "d/ptmx", F_OK));
	shows("/dev/shm/kept", "kept");
	need(access("/dev/mqueue", F_OK) == 0);
}

int main(int argc, char **argv)
{
	char map[64];
	int mapped_ids;

	report_open("mounts");
	stander = map_shared(sizeof(*stander));
	stander->name = "stander";
	slurp("/proc/self/uid_map", map, sizeof(map));
	mapped_ids = atoi(map + 10) != 0;
	need(!mkdir("/out/m", 0755));
	if (argc > 1 && !strcmp(argv[1], "shared"))
		mnt(NULL, "/", NULL, MS_REC | MS_SHARED, NULL);
	make(mapped_ids);
	cover();
	stack();
	change(mapped_ids);
	share();
	read_mounts(&first);
	need(first.n > 20);
	for (;;) {
		check();
		watch(stander, 1);
		if (!access("/out/mounts.connect", F_OK)) {
			check_events();
			need(!unlink("/out/mounts.connect"));
		}
		tick();
		doze(20 * MS);
	}
}
