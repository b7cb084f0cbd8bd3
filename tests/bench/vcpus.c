/*
 * The threads of the doors' benchmark, as a VMM that is no Python program has them: each takes the next of some pages,
 * touches it through its door, and times that.
 *
 * At the userfaultfd door a touch is a load. At the exit door it is what a VMM does at a vCPU's exit: look at the page's
 * bit, where it is set send the fault as JSON on the hand-off's connection (docs/handoff.md) and wait for its reply, then
 * load. Of the threads that wait one reads, for all, so that no further thread is on a fault's way.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define PRESENT (UINT64_C(1) << 63)
#define MAX_THREADS 64
#define MAX_REPLY 512

struct door {
	const unsigned char *memory;
	const _Atomic uint64_t *bits; /* of missing pages; NULL: the userfaultfd door */
	int connection;               /* of the hand-off */
	int pagemap;                  /* /proc/self/pagemap, where there are no bits */
};

struct vcpu {
	struct run *run;
	uint32_t number;
	uint64_t wanted;
	uint64_t *took; /* ns */
	uint64_t count;
	pthread_cond_t turn;
	bool waits;
	bool answered;
};

struct run {
	const struct door *door;
	const uint64_t *pages;
	uint64_t page_count;
	atomic_uint_fast64_t next;
	atomic_int failure; /* an errno; EBADMSG: a reply that is none, EILSEQ: a page with wrong bytes */
	atomic_bool ended;  /* no replies any more: every page is in, or the pager is gone */
	pthread_barrier_t start;
	pthread_mutex_t lock; /* guards all that follows, and what vcpus have of replies */
	bool somebody_reads;
	size_t unread;
	char text[64 * MAX_REPLY];
	uint32_t threads;
	struct vcpu vcpus[MAX_THREADS];
};

static uint64_t now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (uint64_t)at.tv_sec * 1000000000 + (uint64_t)at.tv_nsec;
}

static bool bit_is_set(const struct door *door, uint64_t page)
{
	return atomic_load_explicit(&door->bits[page / 64], memory_order_acquire) >> (page % 64) & 1;
}

static bool is_missing(const struct door *door, uint64_t page)
{
	uint64_t entry = 0;
	if (door->bits)
		return bit_is_set(door, page);
	off_t at = (off_t)(((uintptr_t)door->memory / PAGE + page) * sizeof entry);
	return pread(door->pagemap, &entry, sizeof entry, at) == sizeof entry && !(entry & PRESENT);
}

static void wake_one_to_read(struct run *run)
{
	for (uint32_t i = 0; i < run->threads; i++)
		if (run->vcpus[i].waits && !run->vcpus[i].answered) {
			pthread_cond_signal(&run->vcpus[i].turn);
			return;
		}
}

static void fail(struct run *run, int error)
{
	int none = 0;
	atomic_compare_exchange_strong(&run->failure, &none, error);
}

/* With the lock held: nobody waits for replies from here on. */
static void end_replies(struct run *run)
{
	atomic_store(&run->ended, true);
	for (uint32_t i = 0; i < run->threads; i++)
		pthread_cond_signal(&run->vcpus[i].turn);
}

/* Takes each whole reply out of the text; a token is the number of its vCPU. */
static void take_replies(struct run *run, const struct vcpu *mine)
{
	char *at = run->text, *end;
	while ((end = memchr(at, '}', run->unread - (size_t)(at - run->text)))) {
		unsigned number;
		*end = '\0';
		const char *token = strstr(at, "\"token\":");
		if (!token || sscanf(token, "\"token\":%u", &number) != 1 || number >= run->threads) {
			fail(run, EBADMSG);
			end_replies(run);
			return;
		}
		run->vcpus[number].answered = true;
		if (&run->vcpus[number] != mine)
			pthread_cond_signal(&run->vcpus[number].turn);
		at = end + 1;
	}
	run->unread -= (size_t)(at - run->text);
	memmove(run->text, at, run->unread);
}

/* Reads once, with the lock held but while it waits. */
static void read_for_all(struct run *run, const struct vcpu *mine)
{
	size_t room = sizeof run->text - run->unread;
	run->somebody_reads = true;
	pthread_mutex_unlock(&run->lock);
	ssize_t got = recv(run->door->connection, run->text + run->unread, room, 0);
	bool interrupted = got < 0 && errno == EINTR;
	pthread_mutex_lock(&run->lock);
	run->somebody_reads = false;
	if (got > 0) {
		run->unread += (size_t)got;
		take_replies(run, mine);
	} else if (!interrupted) {
		end_replies(run);
	}
}

static void ask(struct run *run, struct vcpu *mine, uint64_t page)
{
	char request[128];
	int length = snprintf(request, sizeof request, "{\"vcpu\":%u,\"offset\":%llu,\"flags\":0,\"token\":%u}",
			      mine->number, (unsigned long long)page * PAGE, mine->number);
	pthread_mutex_lock(&run->lock);
	mine->answered = false;
	mine->waits = true;
	pthread_mutex_unlock(&run->lock);
	/* The kernel takes so few bytes whole or not at all, so what several threads send never mixes. */
	bool sent = send(run->door->connection, request, (size_t)length, MSG_NOSIGNAL) == length;
	pthread_mutex_lock(&run->lock);
	if (!sent)
		end_replies(run);
	while (!mine->answered && !atomic_load(&run->ended)) {
		if (run->somebody_reads)
			pthread_cond_wait(&mine->turn, &run->lock);
		else
			read_for_all(run, mine);
	}
	mine->waits = false;
	if (!run->somebody_reads)
		wake_one_to_read(run);
	pthread_mutex_unlock(&run->lock);
}

static uint64_t touch(struct run *run, struct vcpu *mine, uint64_t page)
{
	const struct door *door = run->door;
	while (door->bits && bit_is_set(door, page)) {
		if (atomic_load(&run->ended)) {
			fail(run, ECONNRESET);
			break;
		}
		ask(run, mine, page);
	}
	return *(const volatile uint64_t *)(door->memory + page * PAGE);
}

static void *work(void *argument)
{
	struct vcpu *mine = argument;
	struct run *run = mine->run;
	pthread_barrier_wait(&run->start);
	while (mine->count < mine->wanted && !atomic_load(&run->failure)) {
		uint64_t index = atomic_fetch_add(&run->next, 1);
		if (index >= run->page_count)
			break;
		uint64_t page = run->pages[index];
		if (!is_missing(run->door, page))
			continue;
		uint64_t began = now();
		uint64_t found = touch(run, mine, page);
		mine->took[mine->count++] = now() - began;
		if (found != page + 1)
			fail(run, EILSEQ);
	}
	return NULL;
}

/*
 * Touches pages from some threads at once, each `wanted` of them, and times each touch in `took` (threads * wanted ns;
 * 0 where a thread found no more). `used` becomes how many of the pages were looked at, `elapsed` the ns of all.
 * Returns 0, or an errno.
 */
int touch_pages(const struct door *door, const uint64_t *pages, uint64_t page_count, uint32_t threads, uint64_t wanted,
		uint64_t *took, uint64_t *used, uint64_t *elapsed)
{
	static struct run run;
	pthread_t ids[MAX_THREADS];
	uint32_t started = 0;

	if (!threads || threads > MAX_THREADS)
		return EINVAL;
	memset(&run, 0, sizeof run);
	run.door = door;
	run.pages = pages;
	run.page_count = page_count;
	run.threads = threads;
	pthread_mutex_init(&run.lock, NULL);
	pthread_barrier_init(&run.start, NULL, threads + 1);
	for (; started < threads; started++) {
		struct vcpu *one = &run.vcpus[started];
		*one = (struct vcpu){.run = &run, .number = started, .wanted = wanted, .took = took + started * wanted};
		pthread_cond_init(&one->turn, NULL);
		int error = pthread_create(&ids[started], NULL, work, one);
		if (error) /* Those that were started wait at the barrier for ever: the process is to end. */
			return error;
	}
	pthread_barrier_wait(&run.start);
	uint64_t began = now();
	for (uint32_t i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	*elapsed = now() - began;
	*used = atomic_load(&run.next) < page_count ? atomic_load(&run.next) : page_count;
	return atomic_load(&run.failure);
}
