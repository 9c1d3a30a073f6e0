/*
 * cursors DIRECTORY... - directories that were read half-way, on any file
 * system: whoever reads them meets each name once, whenever it is stopped. With "rm=DIRECTORY" what was read of one that is there already was
 * removed since, as rm -r does it.
 */
#include "hold.h"

#include <dirent.h>
#include <sys/socket.h>
#include <sys/un.h>

#define NAMES 40
#define READERS_MAX 32
#define NAMES_MAX 4096

/* A reader reads a few names a round, and begins anew at the end: it keeps no
 * positions, which are others after a restore. */
struct reader {
	int fd, other; /* a dup, or the same */
	size_t count;
	char *names[NAMES_MAX];
	char met[NAMES_MAX]; /* since it began */
};

static struct reader readers[READERS_MAX];
static size_t count;

static char buf[64 << 10];

/* Notes the names in a buffer. */
static void learn(struct reader *r, ssize_t n)
{
	for (ssize_t o = 0; o < n;) {
		struct dirent64 *e = (void *)(buf + o);

		need(r->count < NAMES_MAX);
		need((r->names[r->count++] = strdup(e->d_name)) != NULL);
		o += e->d_reclen;
	}
}

static void meet(struct reader *r, ssize_t n)
{
	for (ssize_t o = 0; o < n;) {
		struct dirent64 *e = (void *)(buf + o);
		size_t i = 0;

		while (i < r->count && strcmp(r->names[i], e->d_name))
			i++;
		if (i == r->count || r->met[i])
			fail("reader %d met %s %s", (int)(r - readers), e->d_name,
			     i < r->count ? "twice" : "which is not there");
		r->met[i] = 1;
		o += e->d_reclen;
	}
}

static void step(struct reader *r)
{
	ssize_t n = getdents64(round_no % 2 ? r->fd : r->other, buf, 96);

	need(n >= 0);
	meet(r, n);
	if (n > 0)
		return;
	for (size_t i = 0; i < r->count; i++)
		if (!r->met[i])
			fail("reader %d has not met %s", (int)(r - readers), r->names[i]);
	need(getdents64(r->fd, buf, sizeof(buf)) == 0);
	need(lseek(r->fd, 0, SEEK_SET) == 0);
	memset(r->met, 0, sizeof(r->met));
}

/* A reader that has read so many bytes of entries. */
static struct reader *open_reader(const char *dir, size_t bytes)
{
	struct reader *r = &readers[count++];
	ssize_t n;

	need(count <= READERS_MAX && bytes < sizeof(buf));
	r->fd = r->other = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	need(r->fd >= 0);
	while ((n = getdents64(r->fd, buf, sizeof(buf))) > 0)
		learn(r, n);
	need(n == 0 && lseek(r->fd, 0, SEEK_SET) == 0);
	if (bytes) {
		n = getdents64(r->fd, buf, bytes);
		need(n > 0);
		meet(r, n);
	}
	return r;
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
	/* One goes, and one comes. */
	snprintf(name, sizeof(name), "%s/name-16", dir);
	need(!unlink(name));
	make_name(dir, NAMES + 1);
	open_reader(dir, 0);
	open_reader(dir, 120);
	struct reader *r = open_reader(dir, 600);
	need((r->other = dup(r->fd)) >= 0);
	open_reader(dir, 32 << 10); /* all */
	open_reader(dir, 300);
}

/* Has read half of a directory and removed it as it went. */
static void make_removing(const char *dir)
{
	struct reader *r = open_reader(dir, 8 << 10);
	struct stat st;
	char path[512];

	for (size_t i = 0; i < r->count; i++) {
		snprintf(path, sizeof(path), "%s/%s", dir, r->names[i]);
		need(!lstat(path, &st));
		if (r->met[i] && S_ISREG(st.st_mode)) {
			need(!unlink(path));
			free(r->names[i]);
			r->names[i] = r->names[r->count - 1];
			r->met[i] = r->met[--r->count];
			i--;
		}
	}
}

int main(int argc, char **argv)
{
	report_open("cursors");
	for (int i = 1; i < argc; i++) {
		if (!strncmp(argv[i], "rm=", 3))
			make_removing(argv[i] + 3);
		else
			make(argv[i]);
	}
	for (;; doze(10 * MS)) {
		for (size_t i = 0; i < count; i++)
			step(&readers[i]);
		tick();
	}
}
