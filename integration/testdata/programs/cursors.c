/*
 * cursors DIRECTORY... - directories that were read half-way, on any file
 * system: at every restore the names still to come must be those still to come,
 * each once. With "rm=DIRECTORY" what was read of one that is there already was
 * removed since, as rm -r does it.
 */
#include "hold.h"

#include <dirent.h>
#include <sys/socket.h>
#include <sys/un.h>

#define NAMES 40
#define READERS_MAX 32

struct reader {
	int fd;
	struct text rest; /* names to come, sorted */
};

static struct reader readers[READERS_MAX];
static size_t count;

static int by_name(const void *a, const void *b)
{
	return strcmp(*(char **)a, *(char **)b);
}

/* Reads what is to come and goes back. */
static void rest_of(int fd, struct text *t)
{
	static char buf[64 << 10], *names[4096];
	off_t at = lseek(fd, 0, SEEK_CUR);
	size_t n = 0, used = 0;
	ssize_t got;

	need(at >= 0);
	while ((got = getdents64(fd, buf + used, sizeof(buf) - used)) > 0) {
		for (ssize_t o = 0; o < got;) {
			struct dirent64 *e = (void *)(buf + used + o);

			names[n++] = e->d_name;
			o += e->d_reclen;
		}
		used += got;
	}
	need(got == 0 && lseek(fd, at, SEEK_SET) == at);
	qsort(names, n, sizeof(names[0]), by_name);
	t->len = 0;
	t->buf[0] = 0;
	for (size_t i = 0; i < n; i++)
		text_add(t, "%s\n", names[i]);
}

/* A reader that has read so many bytes of entries. */
static int open_reader(const char *dir, size_t bytes)
{
	static char buf[64 << 10];
	int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	need(fd >= 0 && count < READERS_MAX && bytes < sizeof(buf));
	if (bytes)
		need(getdents64(fd, buf, bytes) > 0);
	readers[count++].fd = fd;
	return fd;
}

static void make_name(const char *dir, int i)
{
	struct sockaddr_un where = { .sun_family = AF_UNIX };
	char name[80], other[80];
	int fd;

	snprintf(name, sizeof(name), "%s/name-%d", dir, i);
	snprintf(other, sizeof(other), "%s/name-%d", dir, i - 1);
	switch (i % 5) {
	case 0:
		need(!mkdir(name, 0700));
		break;
	case 1:
		fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
		need(fd >= 0 && !close(fd));
		break;
	case 2:
		need(!link(other, name));
		break;
	case 3:
		need(!symlink(other, name));
		break;
	case 4: /* which restore binds late */
		snprintf(where.sun_path, sizeof(where.sun_path), "%s", name);
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		need(fd >= 0);
		need(!bind(fd, (void *)&where, sizeof(where)));
		if (i % 2)
			need(!listen(fd, 1));
		else
			close(fd);
	}
}

static void make(const char *base)
{
	char dir[48], name[80];

	snprintf(dir, sizeof(dir), "%s/half", base);
	need(!mkdir(dir, 0755));
	for (int i = 0; i < NAMES; i++)
		make_name(dir, i);
	open_reader(dir, 0);
	open_reader(dir, 120);
	int fd = open_reader(dir, 600);
	open_reader(dir, 32 << 10); /* all */
	need((readers[count++].fd = dup(fd)) >= 0);
	/* One to come goes, and one that the engine's own order is not. */
	snprintf(name, sizeof(name), "%s/name-16", dir);
	need(!unlink(name));
	open_reader(dir, 300);
}

/* Reads half of a directory and removes it as it goes. */
static void make_removing(const char *dir)
{
	static char buf[8 << 10];
	struct stat st;
	char path[512];
	int fd = open_reader(dir, 0);
	ssize_t n = getdents64(fd, buf, sizeof(buf));

	need(n > (ssize_t)sizeof(buf) / 2);
	for (ssize_t o = 0; o < n;) {
		struct dirent64 *e = (void *)(buf + o);

		snprintf(path, sizeof(path), "%s/%s", dir, e->d_name);
		need(!lstat(path, &st));
		if (S_ISREG(st.st_mode))
			need(!unlink(path));
		o += e->d_reclen;
	}
}

int main(int argc, char **argv)
{
	struct text *now = malloc(sizeof(*now));

	report_open("cursors");
	for (int i = 1; i < argc; i++) {
		if (!strncmp(argv[i], "rm=", 3))
			make_removing(argv[i] + 3);
		else
			make(argv[i]);
	}
	for (size_t i = 0; i < count; i++)
		rest_of(readers[i].fd, &readers[i].rest);
	for (;; doze(10 * MS)) {
		for (size_t i = 0; i < count; i++) {
			rest_of(readers[i].fd, now);
			if (strcmp(now->buf, readers[i].rest.buf)) {
				say("to come was\n%.200s", readers[i].rest.buf);
				say("and is\n%.200s", now->buf);
				fail("reader %zu", i);
			}
		}
		tick();
	}
}
