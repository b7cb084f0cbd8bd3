#define _GNU_SOURCE
#include "workers.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "pages.h"

enum { MOST_WORKERS = 16, MOST_DESCRIBED = 32, NAP_NS = 20000000 };

struct worker {
    pthread_t thread;
    uint64_t number, reads, writes;
    uint64_t gap_era; /* The reset that `gaps` is from. */
    struct gaps gaps;
};

static struct {
    uint64_t seed, pages;
    uint64_t *memory;
    uint32_t *versions;
    uint8_t *known_bad;
    double ns_per_tick;
    unsigned workers;
    struct worker worker[MOST_WORKERS];

    uint64_t rate, gap_era, rest_wanted; /* Read by the workers at any time. */
    pthread_mutex_t gate;
    pthread_cond_t moved;
    unsigned resting;

    pthread_mutex_t bad_lock;
    uint64_t bad;
    char first_bad[160];
} my = {
    .gate = PTHREAD_MUTEX_INITIALIZER,
    .moved = PTHREAD_COND_INITIALIZER,
    .bad_lock = PTHREAD_MUTEX_INITIALIZER,
    .first_bad = "none",
};

void fail(const char *what)
{
    printf("the workload failed: %s: %s\n", what, strerror(errno));
    exit(1);
}

uint64_t monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t to_ns(uint64_t ticks)
{
    return (uint64_t)((double)ticks * my.ns_per_tick);
}

static void nap(uint64_t ns)
{
    struct timespec length = { 0, (long)(ns < NAP_NS ? ns : NAP_NS) };

    nanosleep(&length, NULL);
}

/* Pages */

static uint64_t *words_of(uint64_t page)
{
    return my.memory + page * PAGE_WORDS;
}

static void *locked(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (at == MAP_FAILED || mlock(at, bytes) < 0)
        fail("taking and locking memory");
    return at;
}

void fill_memory(uint64_t seed, uint64_t mib)
{
    my.seed = seed;
    my.pages = mib << 8;
    my.memory = locked(my.pages * PAGE_BYTES);
    my.versions = locked(my.pages * sizeof *my.versions);
    my.known_bad = locked(my.pages);
    for (uint64_t page = 0; page < my.pages; page++)
        fill_page(words_of(page), my.seed, page, 0);
}

static void note_bad(uint64_t page, const struct mismatch *at)
{
    pthread_mutex_lock(&my.bad_lock);
    if (!my.known_bad[page]) {
        char text[sizeof my.first_bad];

        my.known_bad[page] = 1;
        snprintf(text, sizeof text, "page:%lu,version:%u,kind:%s,word:%u,expected:%016lx,found:%016lx", page,
                 my.versions[page], kind_of_wrong(words_of(page), page), at->word, at->expected, at->found);
        if (my.bad < MOST_DESCRIBED)
            printf("bad page: %s\n", text);
        if (!my.bad)
            memcpy(my.first_bad, text, sizeof text);
        store(&my.bad, my.bad + 1);
    }
    pthread_mutex_unlock(&my.bad_lock);
}

/* Whether the page is right; a page that was wrong once counts as wrong for ever. */
static int check(uint64_t page)
{
    struct mismatch at;

    if (!page_is_right(words_of(page), my.seed, page, my.versions[page], &at))
        note_bad(page, &at);
    return !my.known_bad[page];
}

uint64_t check_all(void)
{
    uint64_t bad = 0;

    for (uint64_t page = 0; page < my.pages; page++)
        bad += !check(page);
    return bad;
}

const char *first_bad(void)
{
    return my.first_bad;
}

void flip(uint64_t page, unsigned byte)
{
    ((uint8_t *)words_of(page))[byte] ^= 0x40;
}

/* Workers */

static void rest_if_wanted(void)
{
    if (!load(&my.rest_wanted))
        return;
    pthread_mutex_lock(&my.gate);
    my.resting++;
    pthread_cond_broadcast(&my.moved);
    while (load(&my.rest_wanted))
        pthread_cond_wait(&my.moved, &my.gate);
    my.resting--;
    pthread_mutex_unlock(&my.gate);
}

void rest(void)
{
    pthread_mutex_lock(&my.gate);
    store(&my.rest_wanted, 1);
    while (my.resting < my.workers)
        pthread_cond_wait(&my.moved, &my.gate);
    pthread_mutex_unlock(&my.gate);
}

void go_on(void)
{
    pthread_mutex_lock(&my.gate);
    store(&my.rest_wanted, 0);
    pthread_cond_broadcast(&my.moved);
    pthread_mutex_unlock(&my.gate);
}

static void count_access(struct worker *me, uint64_t touch_ns, uint64_t step_ns, int rewrite)
{
    uint64_t era = load(&my.gap_era), *kind = rewrite ? &me->writes : &me->reads;

    store(kind, *kind + 1);
    if (me->gap_era != era) {
        memset(&me->gaps, 0, sizeof me->gaps);
        __atomic_store_n(&me->gap_era, era, __ATOMIC_RELEASE);
    }
    if (touch_ns > SHORTEST_GAP_NS)
        add_gap(&me->gaps, touch_ns);
    if (step_ns > me->gaps.longest_step_ns)
        store(&me->gaps.longest_step_ns, step_ns);
}

/* One access. The gap is the time of the page's first touch, a load or a locked addition of 0; the step that of all. */
static void access_page(struct worker *me, uint64_t page, int rewrite)
{
    uint64_t *words = words_of(page), begun = __rdtsc(), touched;

    if (rewrite)
        __atomic_fetch_add(words, 0, __ATOMIC_SEQ_CST);
    else
        (void)*(volatile uint64_t *)words;
    touched = __rdtsc();
    if (check(page) && rewrite)
        fill_page(words, my.seed, page, ++my.versions[page]);
    count_access(me, to_ns(touched - begun), to_ns(__rdtsc() - begun), rewrite);
}

static void keep_to_rate(uint64_t *due)
{
    uint64_t rate = load(&my.rate), now;

    if (!rate)
        return;
    now = monotonic_ns();
    *due += 1000000000u / rate;
    if (*due + NAP_NS < now)
        *due = now; /* Far behind: what was missed is not made up for in a burst. */
    while (now < *due && load(&my.rate) == rate && !load(&my.rest_wanted)) {
        nap(*due - now);
        now = monotonic_ns();
    }
}

/* The index-th of the numbers below 2^bits in an order that `key` decides; each comes once. */
static uint64_t shuffled(uint64_t index, unsigned bits, uint64_t key)
{
    uint64_t mask = (1ull << bits) - 1;

    for (int round = 0; round < 3; round++) {
        key = scrambled(key + 1);
        index = (index * (key | 1) + (key >> 32)) & mask;
        index ^= index >> (bits / 2 + 1);
    }
    return index;
}

/* Worker w of K owns the pages w, w + K, w + 2K ...: no page is another's. In each round it touches all, shuffled. */
static void *work(void *argument)
{
    struct worker *me = argument;
    uint64_t count = (my.pages - me->number + my.workers - 1) / my.workers, due = 0;
    unsigned bits = 1;

    while (1ull << bits < count)
        bits++;
    for (uint64_t round = 0;; round++) {
        uint64_t key = scrambled(scrambled(my.seed + me->number) + round);

        for (uint64_t i = 0; i < 1ull << bits; i++) {
            uint64_t index = shuffled(i, bits, key);

            if (index >= count)
                continue;
            rest_if_wanted();
            access_page(me, index * my.workers + me->number, (int)(scrambled(key + i) & 1));
            keep_to_rate(&due);
        }
    }
    return NULL;
}

static void measure_tick(void)
{
    uint64_t ns = monotonic_ns(), ticks = __rdtsc();

    for (int i = 0; i < 3; i++)
        nap(NAP_NS);
    my.ns_per_tick = (double)(monotonic_ns() - ns) / (double)(__rdtsc() - ticks);
}

void start_workers(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);

    measure_tick();
    my.workers = cpus < MOST_WORKERS ? (unsigned)cpus : MOST_WORKERS;
    for (unsigned i = 0; i < my.workers; i++) {
        struct worker *worker = &my.worker[i];
        cpu_set_t cpu;

        CPU_ZERO(&cpu);
        CPU_SET(i, &cpu);
        worker->number = i;
        if ((errno = pthread_create(&worker->thread, NULL, work, worker)) ||
            (errno = pthread_setaffinity_np(worker->thread, sizeof cpu, &cpu)))
            fail("starting a worker");
    }
}

void limit_rate(uint64_t accesses_a_second)
{
    store(&my.rate, accesses_a_second);
}

void reset_gaps(void)
{
    store(&my.gap_era, my.gap_era + 1);
}

void read_tally(struct tally *tally)
{
    memset(tally, 0, sizeof *tally);
    tally->pages = my.pages;
    tally->workers = my.workers;
    tally->bad = load(&my.bad);
    for (unsigned i = 0; i < my.workers; i++) {
        struct worker *worker = &my.worker[i];

        tally->reads += load(&worker->reads);
        tally->writes += load(&worker->writes);
        if (__atomic_load_n(&worker->gap_era, __ATOMIC_ACQUIRE) == my.gap_era)
            merge_gaps(&tally->gaps, &worker->gaps);
    }
}
