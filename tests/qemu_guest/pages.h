/* What a page of the workload holds: a function of the seed, the page's number and its version, with a checksum.
 *
 * Word 0 is the page's number, word 1 its version, words 2 to 510 a stream begun from all three, word 511 a checksum
 * over the others. A page that arrived wrong can so be told apart: never filled, an older version, another page's.
 */
#ifndef PAGES_H
#define PAGES_H

#include <stdint.h>

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, BODY = 2, SUM = PAGE_WORDS - 1 };

struct mismatch {
    uint32_t word;
    uint64_t expected, found;
};

static inline uint64_t scrambled(uint64_t x)
{
    x ^= x >> 31;
    x *= 0xd6e8feb86659fd93u;
    x ^= x >> 32;
    x *= 0xa0761d6478bd642fu;
    return x ^ x >> 29;
}

static inline uint64_t first_state(uint64_t seed, uint64_t page, uint32_t version)
{
    return scrambled(scrambled(scrambled(seed + 1) + page) + version);
}

static inline uint64_t next_state(uint64_t state)
{
    return state * 0x5851f42d4c957f2du + 0x14057b7ef767814fu;
}

static inline uint64_t summed(uint64_t sum, uint64_t word)
{
    return (sum ^ word) * 0x9e3779b97f4a7c15u;
}

static inline void fill_page(uint64_t *words, uint64_t seed, uint64_t page, uint32_t version)
{
    uint64_t state = first_state(seed, page, version);
    uint64_t sum = summed(summed(0, page), version);

    words[0] = page;
    words[1] = version;
    for (int i = BODY; i < SUM; i++) {
        state = next_state(state);
        words[i] = state;
        sum = summed(sum, state);
    }
    words[SUM] = sum;
}

/* Whether every word is what it must be; of a wrong page, the first word that is not. */
static inline int page_is_right(const uint64_t *words, uint64_t seed, uint64_t page, uint32_t version, struct mismatch *first)
{
    uint64_t state = first_state(seed, page, version);
    uint64_t sum = summed(summed(0, page), version);

#define MUST_BE(index, value) \
    if (words[index] != (value)) { \
        *first = (struct mismatch){ (index), (value), words[index] }; \
        return 0; \
    }
    MUST_BE(0, page)
    MUST_BE(1, version)
    for (int i = BODY; i < SUM; i++) {
        state = next_state(state);
        MUST_BE(i, state)
        sum = summed(sum, state);
    }
    MUST_BE(SUM, sum)
#undef MUST_BE
    return 1;
}

/* What a wrong page looks like. */
static inline const char *kind_of_wrong(const uint64_t *words, uint64_t page)
{
    uint64_t any = 0, sum = 0;

    for (int i = 0; i < PAGE_WORDS; i++)
        any |= words[i];
    if (!any)
        return "zero";
    for (int i = 0; i < SUM; i++)
        sum = summed(sum, words[i]);
    if (sum != words[SUM])
        return "torn";
    return words[0] == page ? "stale" : "foreign";
}

#endif
