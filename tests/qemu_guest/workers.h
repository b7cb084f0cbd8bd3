/* The workers: one a vCPU, each touching the pages it owns, in shuffled order, for ever. */
#ifndef WORKERS_H
#define WORKERS_H

#include <stdint.h>

#include "gaps.h"

struct tally {
    uint64_t pages, reads, writes, bad;
    unsigned workers;
    struct gaps gaps; /* Since the last reset. */
};

/* Say on the console what failed, with errno, and exit. */
void fail(const char *what) __attribute__((noreturn));

uint64_t monotonic_ns(void);

/* Take and lock memory, and fill it with the pages' first versions. */
void fill_memory(uint64_t seed, uint64_t mib);

/* Start one worker on each vCPU. */
void start_workers(void);

/* At most so many accesses a second and worker; 0: no bound. */
void limit_rate(uint64_t accesses_a_second);

void reset_gaps(void);
void read_tally(struct tally *tally);

/* Wait until every worker is between two accesses and stays there; let them go on. */
void rest(void);
void go_on(void);

/* While the workers rest: check every page, and return how many are wrong or ever were. */
uint64_t check_all(void);

/* What was wrong with the first bad page, or "none". */
const char *first_bad(void);

/* While the workers rest: flip one byte of a page. */
void flip(uint64_t page, unsigned byte);

#endif
