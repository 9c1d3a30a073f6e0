/*
 * nested NAME SCRIPT - makes namespaces inside the container and holds them. The
 * script is read by the first process; each character is a step:
 *
 *	[...]	start a thread that runs the steps up to the matching bracket
 *	(...)	fork a child that runs the steps up to the matching bracket
 *	{F...}	the same, cloned into the new namespaces that the capital letters
 *		F name: U user, P pid, H uts, I ipc, N net, C cgroup, M mount
 *	u	unshare a user namespace in which the caller is root
 *	e	unshare a user namespace without maps
 *	p	unshare a pid namespace for the children to come
 *	h	unshare a uts namespace with names of its own
 *	i n c	unshare an ipc, net or cgroup namespace
 *	l	bring the loopback up
 *	t	unshare a time namespace, a million seconds ahead, for the children
 *	m	unshare a mount namespace, private throughout
 *	r	mount /proc anew
 *	f	mount a tmpfs over /tmp		b	bind /etc over /sys
 *	o	hold the network namespace open
 *	y	mount a tmpfs over /tmp and fill it; hold a file open and stand there
 *	a	mount another tmpfs over that
 *	v	share /tmp with /tmp/peer, and have slaves of it
 *	q	make a tmpfs the root, with parts of the old one (pivot_root)
 *	d	hold a directory and a file open, and stand, in /tmp
 *	w	open a unix and a TCP socket
 *	j	join all namespaces but the user's of the child forked last
 *	k	start a thread
 *	s g	setsid, setpgid(0, 0)		x	exit, reaped by the parent
 *	z	exit and stay a zombie
 *
 * A parent goes on only after its child's whole script has run. Then everybody
 * holds: each compares what it sees of itself and its namespaces to what it saw
 * at first, and the first process that those who shared namespaces still do,
 * and no others.
 */
#include "hold.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/utsname.h>

#define HOLDERS_MAX 64
#define AHEAD 1000000LL

static const char *const kinds[] = {
	"cgroup", "ipc", "mnt", "net", "pid", "pid_for_children",
	"time", "time_for_children", "user", "uts",
};

struct held {
	volatile int count;	/* processes that hold, but for the first */
	struct worker worker[HOLDERS_MAX];
	unsigned long inode[HOLDERS_MAX][COUNT(kinds)];
};

static struct held *held;
static pid_t last_child;
static __thread int first;	/* this is the first thread of the first process */
static int proc;	/* the container's /proc */
static int ahead;	/* a time namespace was made above */
static __thread int file = -1, dir = -1;	/* held open by step d */
static __thread int net = -1;	/* by step o */
static __thread off_t written;

static int at_proc(const char *path)
{
	return openat(proc, path, O_RDONLY | O_CLOEXEC);
}

static void put(const char *path, const char *text)
{
	int fd = openat(proc, path, O_WRONLY | O_CLOEXEC);

	need(fd >= 0);
	need(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

static void map_root(unsigned int uid, unsigned int gid)
{
	char line[64];

	put("self/setgroups", "deny");
	snprintf(line, sizeof(line), "0 %u 1", uid);
	put("self/uid_map", line);
	snprintf(line, sizeof(line), "0 %u 1", gid);
	put("self/gid_map", line);
}

static void note_file(struct text *s, const char *path)
{
	int fd = at_proc(path);
	ssize_t n;

	text_add(s, "%s:\n", path);
	if (fd < 0)
		return;
	while ((n = read(fd, s->buf + s->len, sizeof(s->buf) - 1 - s->len)) > 0)
		s->len += n;
	s->buf[s->len] = 0;
	close(fd);
}

/* The lines of status that tell who and where a process is. */
static void note_status(struct text *s)
{
	static const char *const keys[] = {
		"NStgid:", "NSpgid:", "NSsid:", "Uid:", "Gid:", "Groups:",
		"CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "NoNewPrivs:",
	};
	static __thread struct text all;

	all.len = 0;
	note_file(&all, "thread-self/status");
	for (char *rest, *line = strtok_r(all.buf, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
		for (size_t i = 0; i < COUNT(keys); i++)
			if (!strncmp(line, keys[i], strlen(keys[i])))
				text_add(s, "%s\n", line);
}

static int by_text(const void *a, const void *b)
{
	return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Mounts without their ids and those of their peer groups, sorted. */
static void note_mounts(struct text *s)
{
	static __thread struct text all, one;
	const char *lines[128];
	int n = 0;

	all.len = one.len = 0;
	note_file(&all, "thread-self/mountinfo");
	for (char *rest, *line = strtok_r(all.buf, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
		char *at = line, *tail = strstr(line, " - ");

		for (int skip = 0; tail && skip < 3; skip++)
			at = strchr(at, ' ') + 1;
		if (!tail)
			continue;
		need(n < (int)COUNT(lines));
		lines[n++] = one.buf + one.len;
		for (; at < tail + 3; at++)
			if (*at < '0' || *at > '9' || at[-1] == '/' ||
			    (at[-1] >= 'a' && at[-1] <= 'z'))
				text_add(&one, "%c", *at);
		text_add(&one, "%s", strtok_r(tail + 3, " ", &at));
		one.len++;	/* and its end */
	}
	qsort(lines, n, sizeof(lines[0]), by_text);
	for (int i = 0; i < n; i++)
		text_add(s, "%s\n", lines[i]);
}

/* The processes that the /proc in place shows. */
static void note_proc(struct text *s)
{
	int list[512], n = 0;
	struct dirent *e;
	DIR *d = opendir("/proc");

	need(d);
	while ((e = readdir(d)))
		if (atoi(e->d_name) && n < (int)COUNT(list))
			list[n++] = atoi(e->d_name);
	closedir(d);
	text_add(s, "proc:");
	for (int i = 0; i < n; i++)
		text_add(s, " %d", list[i]);
	text_add(s, "\n");
}

static void note_network(struct text *s)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq req = { .ifr_name = "lo" };

	need(fd >= 0);
	need(!ioctl(fd, SIOCGIFFLAGS, &req));
	text_add(s, "lo %x\n", req.ifr_flags);
	close(fd);
}

static void look(struct text *s)
{
	struct utsname uts;
	char cwd[256];

	s->len = 0;
	need(!uname(&uts));
	text_add(s, "%d %d %d %d\n", getpid(), getppid(), getpgid(0), getsid(0));
	text_add(s, "%s %s\n", uts.nodename, uts.domainname);
	text_add(s, "%u %u %u %u\n", getuid(), geteuid(), getgid(), getegid());
	text_add(s, "cwd %s\n", getcwd(cwd, sizeof(cwd)) ? cwd : "?");
	note_status(s);
	note_file(s, "thread-self/uid_map");
	note_file(s, "thread-self/gid_map");
	note_file(s, "thread-self/setgroups");
	note_file(s, "thread-self/cgroup");
	note_mounts(s);
	note_proc(s);
	note_network(s);
	text_add(s, "ahead %d\n", ahead ? mono_ns() / SEC / AHEAD >= ahead : 0);
}

static void note_inodes(int me)
{
	char path[64];
	struct stat st;

	for (size_t i = 0; i < COUNT(kinds); i++) {
		snprintf(path, sizeof(path), "thread-self/ns/%s", kinds[i]);
		held->inode[me][i] = fstatat(proc, path, &st, 0) ? 0 : st.st_ino;
	}
}

/* Those who share a namespace, or have none, are the same as ever. What the
 * others have noted may be from before a restore. */
static void compare_inodes(unsigned long (*was)[COUNT(kinds)], int n, int patience)
{
	for (int a = 0; a < n; a++)
		for (int b = 0; b < n; b++)
			for (size_t i = 0; i < COUNT(kinds); i++)
				for (size_t j = 0; j < COUNT(kinds); j++)
					if ((was[a][i] == was[b][j]) !=
					    (held->inode[a][i] == held->inode[b][j])) {
						if (patience) {
							doze(20 * MS);
							note_inodes(0);
							compare_inodes(was, n, patience - 1);
							return;
						}
						fail("%s of holder %d, %s of %d: were %lu, %lu, are %lu, %lu",
						     kinds[i], a, kinds[j], b, was[a][i], was[b][j],
						     held->inode[a][i], held->inode[b][j]);
					}
}

/* A file of /proc that was open over a restore may have another length before
 * the place it was read up to, so only what is seen again and again counts. */
static void compare(struct text *was, struct text *is)
{
	size_t at = 0;

	for (int looks = 0; looks < 3; looks++) {
		look(is);
		if (is->len == was->len && !memcmp(is->buf, was->buf, is->len))
			return;
	}
	while (at < is->len && is->buf[at] == was->buf[at])
		at++;
	while (at && is->buf[at - 1] != '\n')
		at--;
	was->buf[at + strcspn(was->buf + at, "\n")] = 0;
	is->buf[at + strcspn(is->buf + at, "\n")] = 0;
	fail("it was %s, it is %s", was->buf + at, is->buf + at);
}

static int memory = -1, top = -1;	/* held open by step y */
static int removed = -1, listener;
static char *mapped;
static int below;	/* something covers it */
static int shared;	/* step v */

static void check_content(int at)
{
	struct stat st, now;
	char text[32] = "";

	need(!fstat(memory, &st) && st.st_size == 300000 && st.st_blocks <= 16 && st.st_nlink == 2);
	need(pread(memory, text, 7, 0) == 7 && !strcmp(text, "content"));
	need(!fstatat(at, "f", &now, 0) && now.st_ino == st.st_ino && now.st_dev == st.st_dev);
	need(!fstatat(top, "link", &now, 0) && now.st_ino == st.st_ino);
	need(readlinkat(top, "symlink", text, sizeof(text)) == 7 && !memcmp(text, "nowhere", 7));
	need(!fstatat(top, "fifo", &now, 0) && now.st_mode == (S_IFIFO | 0640));
	need(lseek(memory, 0, SEEK_CUR) == 3);
	need(!memcmp(mapped, "content", 7) && !memcmp(mapped + 4096, "private", 7));
	if (removed < 0)
		return;
	need(pread(removed, text, 7, 0) == 7 && !memcmp(text, "removed", 7));
	need(!fstat(removed, &now) && now.st_nlink == 0 && now.st_dev == st.st_dev);
}

/* Who knows the path gets to the socket. */
static void check_listener(void)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX, .sun_path = "/tmp/d/sock" };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), peer;

	need(fd >= 0 && !connect(fd, (void *)&at, sizeof(at)));
	peer = accept(listener, NULL, NULL);
	need(peer >= 0 && !close(peer) && !close(fd));
}

/* A mount appears with the peers and the slaves. */
static void check_shared(void)
{
	struct stat st, now;

	need(!mount("event", "/tmp/peer/point", "tmpfs", 0, NULL));
	need(!stat("/tmp/point", &st) && !stat("/tmp/peer/point", &now) && st.st_dev == now.st_dev);
	need(!stat("/tmp/slave/point", &now) && st.st_dev == now.st_dev);
	need(!umount("/tmp/peer/point"));
	need(!stat("/tmp/slave/point", &now) && st.st_dev != now.st_dev);
	need(!mount("event", "/tmp/slave/point", "tmpfs", 0, NULL));
	need(!stat("/tmp/slave/point", &st) && !stat("/tmp/point", &now) && st.st_dev != now.st_dev);
	need(!umount("/tmp/slave/point"));
}

static void use_memory(void)
{
	struct stat st, now;

	if (memory >= 0)
		check_content(dir);
	if (memory >= 0 && !below)
		need(!stat("/tmp/d", &st) && !fstat(dir, &now) && st.st_ino == now.st_ino);
	if (listener && !below)
		check_listener();
	if (below)
		need(!access("/tmp/above", F_OK) && access("/tmp/d", F_OK));
	if (shared)
		check_shared();
}

/* The file goes on where it was, and is the one that its name says. */
static void use_files(void)
{
	struct stat held, named;
	char text[8];

	if (net >= 0) {
		struct stat own;

		need(!fstat(net, &held));
		need(!fstatat(proc, "thread-self/ns/net", &own, 0));
		need(held.st_ino == own.st_ino);
	}
	use_memory();
	if (file < 0)
		return;
	need(lseek(file, 0, SEEK_CUR) == written);
	written += snprintf(text, sizeof(text), "%d\n", (int)(written % 100));
	need(write(file, text, strlen(text)) == (ssize_t)strlen(text));
	need(!fstat(file, &held) && !stat("/etc/held", &named));
	need(held.st_ino == named.st_ino && held.st_dev == named.st_dev);
	need(!fstat(dir, &held) && !stat(".", &named));
	need(held.st_ino == named.st_ino && held.st_dev == named.st_dev);
	need(!faccessat(dir, "../held", F_OK, 0));
}

static void hold_for_ever(void)
{
	static __thread struct text was, is;
	int me;

	if (first)
		return;	/* the first is holder 0 */
	me = __atomic_add_fetch(&held->count, 1, __ATOMIC_SEQ_CST);
	need(me < HOLDERS_MAX);
	held->worker[me].name = "holder";
	while (!held->worker[0].done) {	/* until all have been made */
		note_inodes(me);
		held->worker[me].done++;
		doze(5 * MS);
	}
	look(&was);
	for (;;) {
		note_inodes(me);
		compare(&was, &is);
		use_files();
		held->worker[me].done++;
		doze(20 * MS);
	}
}

static void run(const char *at, int ready);

/* Returns the bracket that closes the one before at. */
static const char *matching(const char *at)
{
	for (int depth = 1; depth; at++) {
		if (!*at)
			fail("unbalanced script");
		depth += strchr("({[", *at) ? 1 : strchr(")}]", *at) ? -1 : 0;
	}
	return at - 1;
}

static long flags_of(const char **steps)
{
	static const char letters[] = "UPHINCM";
	static const long flags[] = { CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWUTS,
		CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_NEWNS };
	long all = 0;

	for (const char *found; **steps && (found = strchr(letters, **steps)); ++*steps)
		all |= flags[found - letters];
	return all;
}

struct apart {
	const char *steps;
	int ready;
};

static void *start_apart(void *arg)
{
	struct apart a = *(struct apart *)arg;

	run(a.steps, a.ready);
	return NULL;
}

static void start_thread_apart(const char *steps)
{
	struct apart a = { .steps = steps };
	pthread_t thread;
	int ends[2];
	char how;

	need(!pipe2(ends, O_CLOEXEC));
	a.ready = ends[1];
	need(!pthread_create(&thread, NULL, start_apart, &a));
	need(read(ends[0], &how, 1) == 1);
	close(ends[0]);
}

/* The child's end of the pipe closes when its script has run, or it exits. */
static void fork_child(const char *steps)
{
	unsigned int uid = getuid(), gid = getgid();
	long flags = flags_of(&steps);
	int ends[2];
	char how = 0;

	need(!pipe(ends));
	last_child = syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);
	need(last_child >= 0);
	if (!last_child) {
		first = 0;
		close(ends[0]);
		if (flags & CLONE_NEWUSER)
			map_root(uid, gid);
		run(steps, ends[1]);
	}
	close(ends[1]);
	while (read(ends[0], &how, 1) == -1 && errno == EINTR)
		;
	close(ends[0]);
	if (how == 'x')
		need(waitpid(last_child, NULL, 0) == last_child);
}

static void unshare_user(int maps)
{
	unsigned int uid = getuid(), gid = getgid();

	need(!unshare(CLONE_NEWUSER));
	if (maps)
		map_root(uid, gid);
}

static void unshare_uts(void)
{
	char name[32];

	need(!unshare(CLONE_NEWUTS));
	snprintf(name, sizeof(name), "host-%d", getpid());
	need(!sethostname(name, strlen(name)));
	need(!setdomainname("nested.example", 14));
}

static void unshare_time(void)
{
	char line[64], path[64];
	int mono = mono_ns() / SEC / AHEAD + 1;

	need(!unshare(CLONE_NEWTIME));
	snprintf(line, sizeof(line), "monotonic %lld 0", AHEAD * mono);
	snprintf(path, sizeof(path), "%d/timens_offsets", gettid());
	put(gettid() == getpid() ? "self/timens_offsets" : path, line);
	if (gettid() == getpid())
		ahead = mono;
}

static void loopback_up(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq req = { .ifr_name = "lo", .ifr_flags = IFF_UP };

	need(fd >= 0 && !ioctl(fd, SIOCSIFFLAGS, &req));
	close(fd);
}

static void open_files(void)
{
	need(mkdir("/tmp/held", 0700) == 0 || errno == EEXIST);
	dir = open("/tmp/held", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	file = open("/etc/held", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	need(dir >= 0 && file >= 0);
	need(!chdir("/tmp/held"));
}

static void hold_memory(void);

static void fill_memory(void)
{
	need(!mount("own", "/tmp", "tmpfs", MS_NOSUID, "size=1m,mode=711"));
	need(!mkdir("/tmp/d", 0750) && !symlink("nowhere", "/tmp/symlink"));
	need(!mkfifo("/tmp/fifo", 0640) && !chmod("/tmp/fifo", 0640));
	top = open("/tmp", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = open("/tmp/d", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	memory = open("/tmp/d/f", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	need(dir >= 0 && memory >= 0 && !link("/tmp/d/f", "/tmp/link"));
	need(write(memory, "content", 7) == 7 && !ftruncate(memory, 300000));
	need(lseek(memory, 3, SEEK_SET) == 3 && !chdir("/tmp/d"));
	hold_memory();
}

static void hold_memory(void)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX, .sun_path = "/tmp/d/sock" };

	mapped = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, memory, 0);
	need(mapped != MAP_FAILED);
	memcpy(mapped + 4096, "private", 7);
	if (removed >= 0)
		close(removed);
	removed = open("/tmp/removed", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	need(removed >= 0 && write(removed, "removed", 7) == 7 && !unlink("/tmp/removed"));
	if (listener)
		close(listener);
	listener = 0;
	if (access("/tmp/d/sock", F_OK)) {
		listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		need(listener > 0 && !bind(listener, (void *)&at, sizeof(at)) && !listen(listener, 3));
	}
}

static void cover(void)
{
	need(!close(removed) && !close(listener) && !mount("cover", "/tmp", "tmpfs", 0, "mode=755"));
	removed = -1;
	listener = 0;
	close(open("/tmp/above", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	below = 1;
}

static void share(void)
{
	need(!mkdir("/tmp/peer", 0755) && !mkdir("/tmp/slave", 0755) && !mkdir("/tmp/point", 0755));
	need(!mount("/tmp", "/tmp", NULL, MS_BIND, NULL));
	need(!mount(NULL, "/tmp", NULL, MS_SHARED, NULL));
	need(!mkdir("/tmp/out", 0755));
	need(!mount("/tmp", "/tmp/slave", NULL, MS_BIND, NULL));
	need(!mount(NULL, "/tmp/slave", NULL, MS_SLAVE, NULL));
	need(!mount("/tmp", "/tmp/peer", NULL, MS_BIND, NULL));
	shared = 1;
}

static void pivot(void)
{
	static const char *const parts[] = { "/bin", "/proc", "/out", "/etc" };
	char point[64];

	need(!mount("root", "/tmp", "tmpfs", 0, "mode=755"));
	need(!mkdir("/tmp/new", 0755) && !mkdir("/tmp/new/tmp", 0700) && !mkdir("/tmp/new/old", 0700));
	need(!mount("/tmp/new", "/tmp/new", NULL, MS_BIND, NULL));
	for (size_t i = 0; i < COUNT(parts); i++) {
		snprintf(point, sizeof(point), "/tmp/new%s", parts[i]);
		need(!mkdir(point, 0755));
		need(!mount(parts[i], point, NULL, MS_BIND | (strcmp(parts[i], "/proc") ? 0 : MS_REC), NULL));
	}
	need(!mount(NULL, "/tmp/new/etc", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOEXEC, NULL));
	need(!chdir("/tmp/new") && !syscall(SYS_pivot_root, ".", "old"));
	need(!chdir("/") && !umount2("/old", MNT_DETACH) && !rmdir("/old"));
}

static void open_sockets(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(7000) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	need(fd >= 0 && !bind(fd, (void *)&any, sizeof(any)) && !listen(fd, 3));
	need(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) >= 0);
}

static void join_child(void)
{
	static const char *const order[] = { "ipc", "uts", "net", "cgroup", "pid", "mnt" };
	char path[64];

	for (size_t i = 0; i < COUNT(order); i++) {
		int fd;

		snprintf(path, sizeof(path), "%d/ns/%s", last_child, order[i]);
		fd = at_proc(path);
		need(fd >= 0);
		need(!setns(fd, 0));
		close(fd);
	}
}

/* A thread whose ids stay, as it and /proc see them. */
static void *hold_thread(void *tid)
{
	pid_t me = gettid();

	*(volatile pid_t *)tid = me;
	for (;;) {
		need(gettid() == me);
		doze(20 * MS);
	}
}

static void start_thread(void)
{
	static volatile pid_t tid;
	pthread_t thread;

	tid = 0;
	need(!pthread_create(&thread, NULL, hold_thread, (void *)&tid));
	while (!tid)
		doze(MS);
}

static void step(char c)
{
	switch (c) {
	case 'u': unshare_user(1); break;
	case 'e': unshare_user(0); break;
	case 'p': need(!unshare(CLONE_NEWPID)); break;
	case 'h': unshare_uts(); break;
	case 'i': need(!unshare(CLONE_NEWIPC)); break;
	case 'n': need(!unshare(CLONE_NEWNET)); break;
	case 'c': need(!unshare(CLONE_NEWCGROUP)); break;
	case 'l': loopback_up(); break;
	case 't': unshare_time(); break;
	case 'm':
		need(!unshare(CLONE_NEWNS));
		need(!mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL));
		break;
	case 'r': need(!mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL)); break;
	case 'f': need(!mount("fresh", "/tmp", "tmpfs", MS_NOSUID, "size=64k,mode=755")); break;
	case 'b': need(!mount("/etc", "/sys", NULL, MS_BIND, NULL)); break;
	case 'y': fill_memory(); break;
	case 'a': cover(); break;
	case 'v': share(); break;
	case 'q': pivot(); break;
	case 'd': open_files(); break;
	case 'o':
		net = openat(proc, "thread-self/ns/net", O_RDONLY | O_CLOEXEC);
		need(net >= 0);
		break;
	case 'w': open_sockets(); break;
	case 'j': join_child(); break;
	case 'k': start_thread(); break;
	case 's': need(setsid() == getpid()); break;
	case 'g': need(!setpgid(0, 0)); break;
	default: fail("unknown step %c", c);
	}
}

static void run(const char *at, int ready)
{
	for (; *at && !strchr(")}]", *at); at++) {
		if (*at == '[') {
			start_thread_apart(at + 1);
			at = matching(at + 1);
		} else if (*at == '(' || *at == '{') {
			fork_child(at + 1);
			at = matching(at + 1);
		} else if (*at == 'x' || *at == 'z') {
			need(write(ready, at, 1) == 1);
			_exit(*at == 'z' ? 7 : 0);
		} else {
			step(*at);
		}
	}
	if (ready >= 0) {
		need(write(ready, "h", 1) == 1);
		close(ready);
	}
	hold_for_ever();
}

int main(int argc, char **argv)
{
	static unsigned long was[HOLDERS_MAX][COUNT(kinds)];
	static struct text seen, now;

	need(argc == 3);
	report_open(argv[1]);
	held = map_shared(sizeof(*held));
	first = 1;
	proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	need(proc >= 0);
	run(argv[2], -1);
	held->worker[0].done++;
	doze(200 * MS);	/* all have looked at themselves, and now we */
	look(&seen);
	note_inodes(0);
	memcpy(was, held->inode, sizeof(was));
	for (;;) {
		compare(&seen, &now);
		note_inodes(0);
		compare_inodes(was, held->count + 1, 100);
		held->worker[0].done++;
		watch(held->worker + 1, held->count);
		tick();
		doze(20 * MS);
	}
}
