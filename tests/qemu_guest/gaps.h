/* How long accesses took, of those that took more than 8 us: counts in 64 buckets an octave, which is within 1 %. */
#ifndef GAPS_H
#define GAPS_H

#include <stdint.h>
#include <string.h>

#define SHORTEST_GAP_NS 8000u
#define LONG_GAP_NS 10000000u

/* Octave 12 holds 4,096 to 8,191 ns; the last one begins at 18 minutes. */
enum { FIRST_OCTAVE = 12, LAST_OCTAVE = 40, SUB_BITS = 6, BUCKETS = (LAST_OCTAVE - FIRST_OCTAVE + 1) << SUB_BITS };

/* Written by one worker; others read it while it changes, so each figure is stored whole. */
struct gaps {
    uint64_t count, over_10ms, total_ns, longest_ns, longest_step_ns;
    uint32_t buckets[BUCKETS];
};

static inline void store(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

static inline uint64_t load(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static inline int bucket_of(uint64_t ns)
{
    int octave = 63 - __builtin_clzll(ns);

    if (octave > LAST_OCTAVE)
        return BUCKETS - 1;
    return ((octave - FIRST_OCTAVE) << SUB_BITS) + (int)(ns >> (octave - SUB_BITS) & ((1 << SUB_BITS) - 1));
}

/* The middle of a bucket, in ns. */
static inline double middle_of(int bucket)
{
    int octave = FIRST_OCTAVE + (bucket >> SUB_BITS);
    uint64_t width = 1ull << (octave - SUB_BITS);

    return (double)(1ull << octave) + ((bucket & ((1 << SUB_BITS) - 1)) + 0.5) * (double)width;
}

static inline void add_gap(struct gaps *gaps, uint64_t ns)
{
    uint32_t *bucket = &gaps->buckets[bucket_of(ns)];

    __atomic_store_n(bucket, *bucket + 1, __ATOMIC_RELAXED);
    store(&gaps->count, gaps->count + 1);
    store(&gaps->total_ns, gaps->total_ns + ns);
    if (ns > LONG_GAP_NS)
        store(&gaps->over_10ms, gaps->over_10ms + 1);
    if (ns > gaps->longest_ns)
        store(&gaps->longest_ns, ns);
}

static inline void merge_gaps(struct gaps *sum, const struct gaps *of)
{
    uint64_t longest = load(&of->longest_ns), step = load(&of->longest_step_ns);

    sum->count += load(&of->count);
    sum->over_10ms += load(&of->over_10ms);
    sum->total_ns += load(&of->total_ns);
    if (longest > sum->longest_ns)
        sum->longest_ns = longest;
    if (step > sum->longest_step_ns)
        sum->longest_step_ns = step;
    for (int i = 0; i < BUCKETS; i++)
        sum->buckets[i] += __atomic_load_n(&of->buckets[i], __ATOMIC_RELAXED);
}

/* The gap that `percent` of all do not exceed, in ns; 0 without gaps. */
static inline double percentile(const struct gaps *gaps, unsigned percent)
{
    uint64_t total = 0, seen = 0;

    for (int i = 0; i < BUCKETS; i++)
        total += gaps->buckets[i];
    for (int i = 0; i < BUCKETS; i++) {
        seen += gaps->buckets[i];
        if (seen && seen * 100 >= total * percent)
            return middle_of(i);
    }
    return 0;
}

#endif
