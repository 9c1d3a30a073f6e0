/*
 * subgroups - makes cgroups below its own, as systemd does: with limits, empty
 * ones and nested ones, with tasks and with a single thread in them, given to
 * another user; and looks whether all stays so. With the argument v2 there is one
 * tree with a controller (hugetlb) and a threaded part.
 */
#include "hold.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>

#define V1 "/sys/fs/cgroup/"

static int v2, events;
static pid_t child;
static volatile pid_t worker_tid;

static void set(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, value, strlen(value)) != (ssize_t)strlen(value))
		fail("write %s to %s: %s", value, path, strerror(errno));
	close(fd);
}

static void put(const char *path, pid_t pid)
{
	char text[16];

	snprintf(text, sizeof(text), "%d", pid);
	set(path, text);
}

static void reads(const char *path, const char *want)
{
	char got[4096];
	size_t n = slurp(path, got, sizeof(got));

	while (n && got[n - 1] == '\n')
		got[--n] = 0;
	if (strcmp(got, want))
		fail("%s holds %s, not %s", path, got, want);
}

static void make(const char *path)
{
	if (mkdir(path, 0755))
		fail("mkdir %s: %s", path, strerror(errno));
}

/* is tells whether a task is in a cgroup, by the end of its path. */
static void is(pid_t pid, const char *hierarchy, const char *end)
{
	char path[64], text[4096], *line, *stop;
	size_t n = strlen(end);

	snprintf(path, sizeof(path), "/proc/%d/cgroup", pid);
	slurp(path, text, sizeof(text));
	line = strstr(text, hierarchy);
	if (!line)
		fail("%s has no %s", path, hierarchy);
	stop = strchr(line, '\n');
	if ((size_t)(stop - line) < n || memcmp(stop - n, end, n))
		fail("%d is in %.*s, not in %s", pid, (int)(stop - line), line, end);
}

static void *worker(void *arg)
{
	(void)arg;
	worker_tid = gettid();
	for (;;)
		doze(20 * MS);
	return NULL;
}

static void make_v1(void)
{
	make(V1 "memory/outer");
	make(V1 "memory/outer/inner");
	set(V1 "memory/outer/memory.limit_in_bytes", "67108864");
	set(V1 "memory/outer/inner/memory.swappiness", "17");
	put(V1 "memory/outer/inner/cgroup.procs", child);
	make(V1 "pids/few");
	set(V1 "pids/few/pids.max", "7");
	put(V1 "pids/few/cgroup.procs", child);
	make(V1 "cpu/light");
	make(V1 "cpu/light/empty");
	set(V1 "cpu/light/cpu.shares", "77");
	put(V1 "cpu/light/tasks", worker_tid);
	make(V1 "freezer/cold");
	put(V1 "freezer/cold/cgroup.procs", getpid());
	make(V1 "freezer/frozen");
	set(V1 "freezer/frozen/freezer.state", "FROZEN");
	make(V1 "devices/none");
	set(V1 "devices/none/devices.deny", "a");
	set(V1 "devices/none/devices.allow", "c 1:3 rwm");
	make(V1 "cpuset/one");
	set(V1 "cpuset/one/cpuset.mems", "0");
	set(V1 "cpuset/one/cpuset.cpus", "0");
	put(V1 "cpuset/one/cgroup.procs", child);
	make(V1 "systemd/init.scope");
	put(V1 "systemd/init.scope/cgroup.procs", getpid());
	need(!chown(V1 "systemd/init.scope", 0, 0) && !chmod(V1 "systemd/init.scope", 0700));
	events = open(V1 "pids/few/pids.events", O_RDONLY | O_CLOEXEC);
	need(events >= 0);
}

static void check_v1(void)
{
	struct stat st;
	cpu_set_t cpus;
	char tids[32];

	reads(V1 "memory/outer/memory.limit_in_bytes", "67108864");
	reads(V1 "memory/outer/inner/memory.swappiness", "17");
	reads(V1 "pids/few/pids.max", "7");
	reads(V1 "pids/few/pids.current", "1");
	reads(V1 "cpu/light/cpu.shares", "77");
	reads(V1 "cpu/light/empty/cgroup.procs", "");
	reads(V1 "freezer/frozen/freezer.state", "FROZEN");
	reads(V1 "devices/none/devices.list", "c 1:3 rwm");
	reads(V1 "cpuset/one/cpuset.cpus", "0");
	is(child, ":memory:", "/outer/inner");
	is(child, ":pids:", "/few");
	is(child, ":cpuset:", "/one");
	is(1, ":freezer:", "/cold");
	is(1, ":name=systemd:", "/init.scope");
	snprintf(tids, sizeof(tids), "%d", worker_tid);
	reads(V1 "cpu/light/tasks", tids);
	snprintf(tids, sizeof(tids), "1\n%d", worker_tid);
	reads(V1 "freezer/cold/tasks", tids);
	need(!stat(V1 "systemd/init.scope", &st) && (st.st_mode & 07777) == 0700);
	need(!sched_getaffinity(child, sizeof(cpus), &cpus) && CPU_COUNT(&cpus) == 1);
	need(lseek(events, 0, SEEK_CUR) == 0);
}

static void make_v2(void)
{
	make(V1 "leaf");
	make(V1 "slice");
	make(V1 "slice/service");
	make(V1 "slice/threads");
	put(V1 "leaf/cgroup.procs", getpid());
	put(V1 "slice/service/cgroup.procs", child);
	set(V1 "cgroup.subtree_control", "+hugetlb");
	set(V1 "slice/hugetlb.2MB.max", "4194304");
	set(V1 "slice/cgroup.max.descendants", "5");
	set(V1 "leaf/cgroup.pressure", "0");
	make(V1 "leaf/thread");
	set(V1 "leaf/thread/cgroup.type", "threaded");
	put(V1 "leaf/thread/cgroup.threads", worker_tid);
	set(V1 "slice/threads/cgroup.freeze", "1");
	events = open(V1 "slice/hugetlb.2MB.events", O_RDONLY | O_CLOEXEC);
	need(events >= 0);
}

static void check_v2(void)
{
	char tids[32];

	snprintf(tids, sizeof(tids), "%d", worker_tid);
	reads(V1 "leaf/thread/cgroup.threads", tids);
	reads(V1 "cgroup.subtree_control", "hugetlb");
	reads(V1 "slice/hugetlb.2MB.max", "4194304");
	reads(V1 "slice/cgroup.max.descendants", "5");
	reads(V1 "leaf/cgroup.pressure", "0");
	reads(V1 "leaf/thread/cgroup.type", "threaded");
	reads(V1 "leaf/cgroup.type", "domain threaded");
	reads(V1 "slice/threads/cgroup.freeze", "1");
	is(1, "0::", "/leaf");
	is(child, "0::", "/slice/service");
	need(lseek(events, 0, SEEK_CUR) == 0);
}

int main(int argc, char **argv)
{
	pthread_t t;

	report_open("subgroups");
	v2 = argc > 1 && !strcmp(argv[1], "v2");
	child = fork();
	need(child >= 0);
	for (; !child;)
		pause();
	need(!pthread_create(&t, NULL, worker, NULL));
	while (!worker_tid)
		doze(MS);
	if (argc > 1 && !strcmp(argv[1], "frozen")) {
		make(V1 "freezer/held");
		put(V1 "freezer/held/cgroup.procs", child);
		set(V1 "freezer/held/freezer.state", "FROZEN");
		for (;; doze(10 * MS))
			tick();
	}
	v2 ? make_v2() : make_v1();
	for (;; doze(10 * MS)) {
		v2 ? check_v2() : check_v1();
		tick();
	}
}
