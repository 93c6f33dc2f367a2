/* What the machine's memory holds, and the oracle over it.
 *
 * Page 0 of the first block is the header: how far each walker has come. All other pages are numbered through all blocks
 * and shared out among the walkers of all processes. A walker goes round its share and adds one to each page's counter, so
 * all of the memory follows from the header: any page that is zero, another one, torn or older than the header says
 * is a violation, which readers find while the machine runs. Memory as it was when the machine arrived can be hashed
 * later, by taking from each counter what was added since.
 */
#define _GNU_SOURCE
#include "pager.h"

#include <string.h>

#define MAGIC 0x7265676170ull /* "pager" */
#define FNV_START 0xcbf29ce484222325ull
#define FNV_PRIME 0x100000001b3ull

/* The words of a page; all others are constant. */
enum { NUMBER_FRONT = 0, COUNT_FRONT = 1, NUMBER_BACK = 510, COUNT_BACK = 511 };

struct slot {
    uint64_t steps, unused[7];
};

struct header {
    uint64_t magic, plan, unused[6];
    struct slot slots[MAX_WALKERS];
};

_Static_assert(sizeof(struct header) == PAGE, "the header is one page");

/* The pages of one walker, in the order in which it goes round: stride * position + start, modulo pages. */
struct share {
    uint64_t first, pages, stride, unstride, start;
};

static uint64_t page_count, plan;
static struct share shares[MAX_WALKERS];

static uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static struct header *header(void)
{
    return (struct header *)blocks[0].base;
}

static uint64_t hash_word(uint64_t hash, uint64_t word)
{
    return (hash ^ word) * FNV_PRIME;
}

/* -- where is what ------------------------------------------------------------------------------------------------ */

static uint64_t greatest_divisor(uint64_t a, uint64_t b)
{
    while (b) {
        uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static uint64_t inverse(uint64_t value, uint64_t modulus)
{
    int64_t a = (int64_t)modulus, b = (int64_t)value, x = 0, y = 1;
    while (b) {
        int64_t quotient = a / b, rest = a % b, next = x - quotient * y;
        a = b, b = rest, x = y, y = next;
    }
    return (uint64_t)(x < 0 ? x + (int64_t)modulus : x);
}

static void plan_share(struct share *share, int walker)
{
    uint64_t walkers = (uint64_t)memory_total_walkers();
    share->first = page_count * (uint64_t)walker / walkers;
    share->pages = page_count * ((uint64_t)walker + 1) / walkers - share->first;
    if (!share->pages)
        die("too little memory: less than a page for each of %d walkers", (int)walkers);
    share->stride = share->unstride = 1 % share->pages;
    share->start = 0;
    if (options.scattered && share->pages > 2) {
        /* The golden section scatters best. */
        share->stride = (uint64_t)((double)share->pages * 0.6180339887) | 1;
        while (greatest_divisor(share->stride, share->pages) != 1)
            share->stride++;
        share->stride %= share->pages;
        share->unstride = inverse(share->stride, share->pages);
        share->start = options.seed % share->pages;
    }
}

void memory_plan(void)
{
    page_count = 0;
    plan = hash_word(FNV_START, options.seed);
    for (int i = 0; i < block_count; i++) {
        if (!blocks[i].blank)
            page_count += blocks[i].size / PAGE;
        plan = hash_word(hash_word(plan, blocks[i].size), blocks[i].blank);
    }
    page_count--;
    plan = hash_word(hash_word(plan, (uint64_t)memory_total_walkers()), options.scattered);
    for (int i = 0; i < memory_total_walkers(); i++)
        plan_share(&shares[i], i);
}

int memory_total_walkers(void)
{
    return options.walkers * options.processes;
}

uint64_t memory_page_count(void)
{
    return page_count;
}

uint64_t *memory_page(uint64_t page)
{
    uint64_t rest = page + 1; /* the header */
    for (int i = 0; i < block_count; i++) {
        if (blocks[i].blank)
            continue;
        if (rest < blocks[i].size / PAGE)
            return blocks[i].base + rest * PAGE_WORDS;
        rest -= blocks[i].size / PAGE;
    }
    die("there is no page %llu", (unsigned long long)page);
}

static int owner(uint64_t page)
{
    int walker = 0;
    while (page - shares[walker].first >= shares[walker].pages)
        walker++;
    return walker;
}

static uint64_t page_at(const struct share *share, uint64_t position)
{
    return share->first + (share->stride * position + share->start) % share->pages;
}

/* How often a walker that made so many steps has been at a page of its share. */
static uint64_t expected(const struct share *share, uint64_t page, uint64_t steps)
{
    uint64_t offset = page - share->first + share->pages - share->start;
    uint64_t position = offset % share->pages * share->unstride % share->pages;
    return steps / share->pages + (position < steps % share->pages);
}

uint64_t memory_constant(uint64_t page, unsigned word)
{
    uint64_t value = (page * PAGE_WORDS + word + 1) * 0x9e3779b97f4a7c15ull ^ options.seed;
    value = (value ^ (value >> 29)) * 0xbf58476d1ce4e5b9ull;
    return value ^ (value >> 32);
}

/* -- writing ------------------------------------------------------------------------------------------------------ */

static void write_page(uint64_t page, uint64_t count)
{
    uint64_t *words = memory_page(page);
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        words[i] = memory_constant(page, i);
    words[NUMBER_FRONT] = page + 1;
    words[NUMBER_BACK] = ~(page + 1);
    words[COUNT_FRONT] = words[COUNT_BACK] = count;
}

static uint64_t expected_now(uint64_t page)
{
    int walker = owner(page);
    return expected(&shares[walker], page, memory_steps(walker));
}

/* Write what the page has to hold. Everything else stands still. */
void memory_restore(uint64_t page)
{
    write_page(page, expected_now(page));
}

/* Make the page one round older than it is, for a test of the oracle. Everything else stands still. */
void memory_age(uint64_t page)
{
    write_page(page, expected_now(page) - 1);
}

/* Write the first content, if nothing is there; say whether that was so. */
bool memory_prepare(void)
{
    uint64_t magic = load(&header()->magic);
    if (magic == MAGIC) {
        if (header()->plan != plan)
            die("the memory here was written by a pager with other arguments");
        return false;
    }
    if (shared->prepared) {
        memory_violation(magic ? "stamp" : "zero", (uint64_t)-1);
        return false;
    }
    for (uint64_t page = 0; page < page_count; page++)
        write_page(page, 0);
    header()->plan = plan;
    store(&header()->magic, MAGIC);
    return true;
}

uint64_t memory_steps(int walker)
{
    return load(&header()->slots[walker].steps);
}

uint64_t memory_total_steps(void)
{
    uint64_t total = 0;
    for (int i = 0; i < memory_total_walkers(); i++)
        total += memory_steps(i);
    return total;
}

void memory_step(int walker)
{
    const struct share *share = &shares[walker];
    uint64_t steps = memory_steps(walker);
    uint64_t page = page_at(share, steps % share->pages);
    uint64_t *words = memory_page(page);
    uint64_t count = load(&words[COUNT_FRONT]);
    if (words[NUMBER_FRONT] != page + 1 || words[NUMBER_BACK] != ~(page + 1))
        memory_violation(words[NUMBER_FRONT] ? "stamp" : "zero", page);
    else if (count != words[COUNT_BACK])
        memory_violation("torn", page);
    else if (count != steps / share->pages)
        memory_violation(count < steps / share->pages ? "stale" : "ahead", page);
    store(&words[COUNT_FRONT], count + 1);
    store(&words[COUNT_BACK], count + 1);
    store(&header()->slots[walker].steps, steps + 1);
}

/* -- reading ------------------------------------------------------------------------------------------------------ */

void memory_violation(const char *kind, uint64_t page)
{
    uint64_t before = __atomic_fetch_add(&shared->violations, 1, __ATOMIC_RELAXED);
    if (before < 10)
        tell("violation", "\"kind\": \"%s\", \"page\": %lld, \"process\": %d", kind, (long long)page, my_index);
}

/* Return what is wrong with the part of a page that never changes, or NULL. */
static const char *inspect_constants(const uint64_t *words, uint64_t page)
{
    if (words[NUMBER_FRONT] != page + 1 || words[NUMBER_BACK] != ~(page + 1))
        return words[NUMBER_FRONT] || words[NUMBER_BACK] ? "stamp" : "zero";
    for (unsigned i = COUNT_FRONT + 1; i < NUMBER_BACK; i++)
        if (words[i] != memory_constant(page, i))
            return "content";
    return NULL;
}

/* The same for its counters, while its walker may be at it: `low` to `high` rounds. */
static const char *inspect_counters(const uint64_t *words, uint64_t page)
{
    int walker = owner(page);
    uint64_t low = expected(&shares[walker], page, memory_steps(walker));
    for (int attempt = 0; attempt < 1000; attempt++) {
        uint64_t front = load(&words[COUNT_FRONT]);
        uint64_t back = load(&words[COUNT_BACK]);
        if (front != load(&words[COUNT_FRONT]))
            continue;
        if (front != back && front != back + 1)
            return "torn";
        if (front < low)
            return "stale";
        /* The walker counts its step after it changed the page. */
        return front > expected(&shares[walker], page, memory_steps(walker)) + 1 ? "ahead" : NULL;
    }
    return NULL; /* never still for long enough */
}

void memory_verify_page(uint64_t page)
{
    const uint64_t *words = memory_page(page);
    const char *wrong = inspect_constants(words, page);
    if (!wrong)
        wrong = inspect_counters(words, page);
    if (wrong)
        memory_violation(wrong, page);
    __atomic_fetch_add(&shared->reads, 1, __ATOMIC_RELAXED);
}

static bool all_zero(const uint64_t *words)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        any |= words[i];
    return !any;
}

/* Verify any page. */
void memory_read(uint64_t *seed)
{
    uint64_t blank = 0;
    for (int i = 0; i < block_count; i++)
        blank += blocks[i].blank ? blocks[i].size / PAGE : 0;
    uint64_t page = random_word(seed) % (page_count + blank);
    if (page < page_count) {
        memory_verify_page(page);
        return;
    }
    page -= page_count;
    for (int i = 0; i < block_count; i++) {
        if (!blocks[i].blank)
            continue;
        if (page < blocks[i].size / PAGE) {
            if (!all_zero(blocks[i].base + page * PAGE_WORDS))
                memory_violation("not blank", page);
            break;
        }
        page -= blocks[i].size / PAGE;
    }
    __atomic_fetch_add(&shared->reads, 1, __ATOMIC_RELAXED);
}

static const char *inspect_at_rest(const uint64_t *words, uint64_t page, uint64_t count)
{
    const char *wrong = inspect_constants(words, page);
    if (wrong)
        return wrong;
    if (words[COUNT_FRONT] != words[COUNT_BACK])
        return "torn";
    if (words[COUNT_FRONT] != count)
        return words[COUNT_FRONT] < count ? "stale" : "ahead";
    return NULL;
}

/* Hash a page with `added` taken from its counters. */
static uint64_t hash_page(uint64_t hash, const uint64_t *words, uint64_t added)
{
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        hash = hash_word(hash, words[i] - (i == COUNT_FRONT || i == COUNT_BACK ? added : 0));
    return hash;
}

static uint64_t hash_header(const uint64_t *at)
{
    struct header copy;
    memcpy(&copy, header(), sizeof copy);
    for (int i = 0; i < memory_total_walkers(); i++)
        copy.slots[i].steps = at[i];
    return hash_page(FNV_START, (const uint64_t *)&copy, 0);
}

/* Look at all of the memory, and hash it as it is or as it arrived. Nobody else touches it. */
void memory_verify_all(struct verdict *verdict, bool as_it_arrived)
{
    uint64_t steps[MAX_WALKERS] = {0}, at[MAX_WALKERS] = {0}, page = 0;
    *verdict = (struct verdict){.invariant = load(&header()->magic) == MAGIC, .hash = FNV_START};
    for (int i = 0; i < memory_total_walkers(); i++) {
        /* A walker that has not taken a look yet has not taken a step either. */
        const struct member *member = &shared->members[i / options.walkers];
        bool looked = as_it_arrived && shared->at_arrival[i] == member->arrivals;
        steps[i] = memory_steps(i);
        at[i] = looked ? shared->at[i] : steps[i];
        verdict->steps += steps[i];
        verdict->at += at[i];
    }
    for (int i = 0; i < block_count; i++) {
        uint64_t hash = i ? FNV_START : hash_header(at);
        for (const uint64_t *words = blocks[i].base + (i ? 0 : PAGE_WORDS);
             words < blocks[i].base + blocks[i].size / sizeof *words; words += PAGE_WORDS) {
            const char *wrong = blocks[i].blank && !all_zero(words) ? "not blank" : NULL;
            uint64_t added = 0;
            if (!blocks[i].blank) {
                int walker = owner(page);
                uint64_t count = expected(&shares[walker], page, steps[walker]);
                added = count - expected(&shares[walker], page, at[walker]);
                wrong = inspect_at_rest(words, page, count);
                page++;
            }
            if (wrong) {
                verdict->invariant = false;
                memory_violation(wrong, blocks[i].blank ? (uint64_t)-1 : page - 1);
            }
            hash = hash_page(hash, words, added);
        }
        verdict->block_hash[i] = hash;
        verdict->hash = hash_word(verdict->hash, hash);
    }
}
