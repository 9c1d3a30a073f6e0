/*
 * sysv - System V IPC: segments attached once, twice, read-only, in part and by
 * nobody, removed and locked ones; semaphores with values, adjustments to undo
 * and sleepers; message queues with messages and sleepers at both ends.
 */
#include "apart.h"

#include <signal.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define PAGES 8
#define SIZE (PAGES * 4096 - 100)

static struct worker *workers;

/* --- segments --- */

static int shm_id, lonely_id, removed_id, locked_id;
static volatile uint64_t *shm_rw, *shm_ro, *removed, *locked;
static volatile unsigned char *part;
static struct shmid_ds shm_had;

static uint64_t word(size_t i)
{
	return (i + 1) * 0x9e3779b97f4a7c15ULL;
}

static void make_segments(void)
{
	int waste = shmget(IPC_PRIVATE, 1, 0600);

	need(waste >= 0 && !shmctl(waste, IPC_RMID, NULL)); /* no id is 0 */
	shm_id = shmget(0x1234, SIZE, IPC_CREAT | IPC_EXCL | 0640);
	lonely_id = shmget(IPC_PRIVATE, SIZE, 0600);
	removed_id = shmget(0x4321, 4096, IPC_CREAT | IPC_EXCL | 0600);
	locked_id = shmget(IPC_PRIVATE, 4096, 0600);
	need(shm_id >= 0 && lonely_id >= 0 && removed_id >= 0 &&
	     locked_id >= 0);
	shm_rw = shmat(shm_id, NULL, 0);
	shm_ro = shmat(shm_id, NULL, SHM_RDONLY);
	part = shmat(shm_id, NULL, 0);
	removed = shmat(removed_id, NULL, 0);
	locked = shmat(locked_id, NULL, 0);
	need(shm_rw != (void *)-1 && shm_ro != (void *)-1 &&
	     part != (void *)-1 && removed != (void *)-1 &&
	     locked != (void *)-1);
	need(!munmap((void *)(part + 4096), 4096));
	need(!mprotect((void *)(part + 4 * 4096), 4096, PROT_READ));
	for (size_t i = 0; i < SIZE / 8; i++)
		shm_rw[i] = word(i);
	uint64_t *lonely = shmat(lonely_id, NULL, 0);
	need(lonely != (void *)-1);
	for (size_t i = 0; i < SIZE / 8; i += 512)
		lonely[i] = word(i + 7);
	need(!shmdt(lonely));
	removed[5] = 55;
	need(!shmctl(removed_id, IPC_RMID, NULL));
	locked[5] = 66;
	need(!shmctl(locked_id, SHM_LOCK, NULL));
}

static void same_perm(struct ipc_perm *a, struct ipc_perm *b)
{
	need(a->__key == b->__key && a->uid == b->uid && a->gid == b->gid);
	need(a->cuid == b->cuid && a->cgid == b->cgid && a->mode == b->mode);
}

static void check_segments(void)
{
	struct shmid_ds ds;
	unsigned char resident[PAGES];

	need(shmget(0x1234, 0, 0) == shm_id);
	need(!shmctl(shm_id, IPC_STAT, &ds));
	same_perm(&ds.shm_perm, &shm_had.shm_perm);
	need(ds.shm_segsz == SIZE);
	if (ds.shm_nattch != shm_had.shm_nattch)
		fail("%lu attachments, not %lu", (long)ds.shm_nattch,
		     (long)shm_had.shm_nattch);
	for (size_t i = 1; i < SIZE / 8; i++)
		need(shm_ro[i] == word(i));
	/* All attachments are one memory. */
	shm_rw[0] = round_no;
	need(shm_ro[0] == round_no && *(uint64_t *)part == round_no);
	need(*(uint64_t *)(part + 4 * 4096) == word(4 * 512));
	need(mincore((void *)(part + 4096), 4096, resident) && errno == ENOMEM);
	need(mprotect((void *)shm_ro, 4096, PROT_READ | PROT_WRITE) == -1 &&
	     errno == EACCES);
	need(!mprotect((void *)(part + 4 * 4096), 4096,
		       PROT_READ | PROT_WRITE) &&
	     !mprotect((void *)(part + 4 * 4096), 4096, PROT_READ));
	if (round_no % 8 == 0) {
		uint64_t *lonely = shmat(lonely_id, NULL, SHM_RDONLY);

		need(lonely != (void *)-1);
		for (size_t i = 0; i < SIZE / 8; i += 512)
			need(lonely[i] == word(i + 7));
		need(!shmdt(lonely));
		/* An attachment is undone by its address. */
		void *again = shmat(shm_id, NULL, 0), *at = (void *)shm_rw;
		need(again != (void *)-1 && !shmdt(at));
		need(shmat(shm_id, at, 0) == at && !shmdt(again));
	}
	need(removed[5] == 55 && !shmctl(removed_id, IPC_STAT, &ds));
	need(ds.shm_perm.mode == (SHM_DEST | 0600) && ds.shm_nattch > 1);
	need(shmget(0x4321, 0, 0) == -1 && errno == ENOENT);
	need(locked[5] == 66 && !shmctl(locked_id, IPC_STAT, &ds));
	need(ds.shm_perm.mode == (SHM_LOCKED | 0600));
}

/* --- semaphores --- */

#define HIGH 30000
static int sem_id, undo_id, wait_id;
static pid_t holder;
static const unsigned short values[] = { 3, 0, 32767, 17 };

static int op1(int id, int num, int op, int flags)
{
	struct sembuf b = { num, op, flags };

	return semop(id, &b, 1);
}

static int value(int id, int num)
{
	return semctl(id, num, GETVAL);
}

static void fork_holder(void)
{
	holder = fork();
	if (holder)
		return;
	/* It takes two, gives one, takes much and gives much. */
	need(!op1(undo_id, 0, -2, SEM_UNDO) && !op1(undo_id, 1, 1, SEM_UNDO));
	need(!op1(undo_id, 2, -HIGH, SEM_UNDO));
	need(!op1(undo_id, 3, HIGH, SEM_UNDO));
	need(!op1(wait_id, 1, 1, 0)); /* ready */
	for (;;)
		pause();
}

static void make_semaphores(void)
{
	sem_id = semget(0x5678, COUNT(values), IPC_CREAT | IPC_EXCL | 0604);
	undo_id = semget(IPC_PRIVATE, 4, 0600);
	wait_id = semget(IPC_PRIVATE, 3, 0600);
	need(sem_id >= 0 && undo_id >= 0 && wait_id >= 0);
	need(!semctl(sem_id, 0, SETALL, values));
	need(!semctl(undo_id, 0, SETVAL, 5) && !semctl(undo_id, 2, SETVAL, HIGH));
	fork_holder();
	need(!op1(wait_id, 1, -1, 0));
	/* One sleeps until it is given something, and gives something back. */
	if (!fork()) {
		for (;;) {
			need(!op1(wait_id, 0, -1, SEM_UNDO));
			workers[0].done++;
			need(!op1(wait_id, 0, 1, SEM_UNDO | IPC_NOWAIT) &&
			     !op1(wait_id, 0, -1, SEM_UNDO | IPC_NOWAIT));
			need(!op1(wait_id, 2, 1, 0));
		}
	}
	/* One sleeps with a time-out far away. */
	if (!fork()) {
		struct sembuf b = { 1, -3, 0 };
		struct timespec far = { 10000, 0 };

		semtimedop(wait_id, &b, 1, &far);
		fail("semtimedop came back, errno %d", errno);
	}
}

static void check_semaphores(void)
{
	unsigned short now[COUNT(values)];

	need(semget(0x5678, 0, 0) == sem_id);
	need(!semctl(sem_id, 0, GETALL, now));
	need(!memcmp(now, values, sizeof(values)));
	need(value(undo_id, 0) == 3 && value(undo_id, 1) == 1);
	need(value(undo_id, 2) == 0 && value(undo_id, 3) == HIGH);
	need(!op1(wait_id, 0, 1, 0) && !op1(wait_id, 2, -1, 0));
	if (round_no % 16 == 15) {
		/* What the holder has taken and given goes back with it. */
		need(!kill(holder, SIGKILL));
		need(waitpid(holder, NULL, 0) == holder);
		need(value(undo_id, 0) == 5 && value(undo_id, 1) == 0);
		need(value(undo_id, 2) == HIGH && value(undo_id, 3) == 0);
		fork_holder();
		need(!op1(wait_id, 1, -1, 0));
	}
}

/* --- message queues --- */

struct message {
	long type;
	char text[4000];
};

static int msg_id, ask_id, full_id;
static const struct {
	long type;
	size_t size;
} texts[] = { { 5, 100 }, { 1, 0 }, { 5, 3999 }, { 1L << 40, 1 } };

static void fill(struct message *m, size_t i)
{
	m->type = texts[i].type;
	memset(m->text, 'a' + i, texts[i].size);
}

static void make_queues(void)
{
	struct message m;

	msg_id = msgget(0x9abc, IPC_CREAT | IPC_EXCL | 0622);
	ask_id = msgget(IPC_PRIVATE, 0600);
	full_id = msgget(IPC_PRIVATE, 0600);
	need(msg_id >= 0 && ask_id >= 0 && full_id >= 0);
	for (size_t i = 0; i < COUNT(texts); i++) {
		fill(&m, i);
		need(!msgsnd(msg_id, &m, texts[i].size, IPC_NOWAIT));
	}
	struct msqid_ds ds;
	need(!msgctl(msg_id, IPC_STAT, &ds));
	ds.msg_qbytes = 5000;
	need(!msgctl(msg_id, IPC_SET, &ds));
	m.type = 3;
	while (!msgsnd(full_id, &m, 4000, IPC_NOWAIT))
		;
	need(errno == EAGAIN);
	/* One waits for questions, one for room. */
	if (!fork()) {
		for (;;) {
			need(msgrcv(ask_id, &m, 8, 1, 0) == 8);
			m.type = 2;
			workers[1].done++;
			need(!msgsnd(ask_id, &m, 8, 0));
		}
	}
	if (!fork()) {
		m.type = 4;
		for (;;) {
			need(!msgsnd(full_id, &m, 4000, 0));
			workers[2].done++;
		}
	}
}

static void check_queues(void)
{
	struct message m, want;
	struct msqid_ds ds;
	unsigned long question = round_no, answer;

	need(msgget(0x9abc, 0) == msg_id);
	need(!msgctl(msg_id, IPC_STAT, &ds));
	need(ds.msg_qnum == COUNT(texts) && ds.msg_qbytes == 5000);
	need(ds.msg_perm.mode == 0622 && ds.msg_perm.__key == 0x9abc);
	for (size_t i = 0; i < COUNT(texts); i++) { /* once round */
		fill(&want, i);
		need(msgrcv(msg_id, &m, sizeof(m.text), 0, IPC_NOWAIT) ==
		     (ssize_t)texts[i].size);
		need(m.type == want.type &&
		     !memcmp(m.text, want.text, texts[i].size));
		need(!msgsnd(msg_id, &want, texts[i].size, IPC_NOWAIT));
	}
	m.type = 1;
	memcpy(m.text, &question, 8);
	need(!msgsnd(ask_id, &m, 8, IPC_NOWAIT));
	need(msgrcv(ask_id, &m, 8, 2, 0) == 8);
	memcpy(&answer, m.text, 8);
	need(answer == question);
	need(msgrcv(full_id, &m, sizeof(m.text), 0, 0) == 4000);
	need(m.type == 3 || m.type == 4);
}

/* --- what the parent holds that has stayed --- */

static volatile uint64_t *stayed;

static void hold_own(void)
{
	need(shmget(IPC_PRIVATE, 1, 0600) >= 0);
	shm_id = shmget(0x1234, SIZE, IPC_CREAT | IPC_EXCL | 0640);
	need(shm_id >= 0);
	stayed = shmat(shm_id, NULL, 0);
	need(stayed != (void *)-1);
	stayed[1] = 4711;
	sem_id = semget(0x5678, 1, IPC_CREAT | IPC_EXCL | 0600);
	need(sem_id >= 0 && !op1(sem_id, 0, 7, SEM_UNDO));
	msg_id = msgget(0x9abc, IPC_CREAT | IPC_EXCL | 0600);
	need(msg_id >= 0);
}

static void check_own(void)
{
	struct shmid_ds ds;
	struct msqid_ds q;

	need(shmget(0x1234, 0, 0) == shm_id && !shmctl(shm_id, IPC_STAT, &ds));
	need(ds.shm_nattch == 1 && stayed[1] == 4711);
	need(semget(0x5678, 0, 0) == sem_id && value(sem_id, 0) == 7);
	need(!op1(sem_id, 0, -3, SEM_UNDO) && !op1(sem_id, 0, 3, SEM_UNDO));
	need(msgget(0x9abc, 0) == msg_id && !msgctl(msg_id, IPC_STAT, &q));
	need(q.msg_qnum == 0);
}

int main(int argc, char **argv)
{
	int nested = argc > 1;

	report_open("sysv");
	workers = map_shared(4096);
	if (nested)
		go_apart(wanted(argc, argv, "user"), hold_own, check_own);
	make_segments();
	make_semaphores();
	make_queues();
	need(!shmctl(shm_id, IPC_STAT, &shm_had)); /* attached by children too */
	for (;;) {
		check_segments();
		check_semaphores();
		check_queues();
		if (nested)
			check_limits();
		watch(workers, 3);
		tick();
		doze(10 * MS);
	}
}
