/* A multi-threaded workload in C for tests of migration: what its four source files know of each other.
 *
 * pager.c         arguments, threads, commands
 * pager_gate.c    when threads may touch the machine's memory
 * pager_memory.c  what the memory holds, and the oracle over it
 * pager_attach.c  docs/attach-protocol.md, spoken without a library
 *
 * Why C: in Python a faulting bytecode holds the interpreter lock, so that threads fault one at a time.
 *
 * Two rules. The service thread (pager_attach.c) never touches the machine's memory, so that it answers whoever waits
 * for a page. Nobody touches it while holding the gate's lock, for the same reason.
 */
#ifndef PAGER_H
#define PAGER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096u
#define PAGE_WORDS 512u
#define MAX_BLOCKS 8
#define MAX_MEMBERS 8
/* One cache line of the header page each, after the first. */
#define MAX_WALKERS 63
#define NAME_BYTES 256
#define ERROR_BYTES 512

enum state { FRESH, RUNNING, STOPPED, MOVED, STANDBY };

/* One process of the workload, as all of them see it. Under the lock, but for `look`. */
struct member {
    enum state state;
    bool unacknowledged; /* stopping, and the daemon has not been told yet that it stopped */
    bool stop_asked;
    uint64_t stop_id;
    int throttle;
    unsigned arrivals; /* how many machines began to run here */
    unsigned moves;    /* how many went away */
    int threads;       /* walkers and readers; at rest: */
    int parked;
    int busy; /* other threads that touch memory */
    bool ready;
    bool refused; /* the daemon did not want its standby */
    int look; /* LOOK_*: what a passing thread has to look at */
    int wake; /* eventfd of the service thread */
    pid_t pid;
};

enum { LOOK_STOP = 1, LOOK_THROTTLE = 2 };

/* Shared by all processes of this workload; nothing of the machine is in here. */
struct shared {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_mutex_t output;
    bool paused;   /* for a check: everything stands still, the machine runs */
    bool prepared; /* the memory holds a machine (it need not have arrived) */
    bool quitting;
    uint64_t departures, departures_before; /* walkers that went on; the same when the last check ended */
    uint64_t at[MAX_WALKERS]; /* each walker's steps when the machine began to run here... */
    unsigned at_arrival[MAX_WALKERS]; /* ... and whether it has looked since (member.arrivals) */
    uint64_t violations, reads;
    uint64_t device_saves, device_loads, device_steps;
    struct member members[MAX_MEMBERS];
};

struct block {
    char name[NAME_BYTES];
    size_t size;
    bool blank; /* never written: has to read as zeros */
    int memfd;
    uint64_t *base;
};

struct options {
    const char *attach, *name, *device;
    uint64_t seed;
    int walkers, readers, processes; /* walkers and readers of each process */
    double rate, read_rate;          /* a second, of all walkers or readers together; 0: as fast as they can */
    bool scattered, twin;
    int touch_on_load; /* pages; negative: none */
};

/* What a look at the whole memory found. */
struct verdict {
    bool invariant;
    uint64_t steps, at, hash, block_hash[MAX_BLOCKS];
};

extern struct options options;
extern struct block blocks[MAX_BLOCKS];
extern int block_count;
extern struct shared *shared;
extern struct member *me;
extern int my_index;
extern bool tracked;

/* pager.c */
double now_s(void);
uint64_t random_word(uint64_t *seed);
void tell(const char *event, const char *format, ...) __attribute__((format(printf, 2, 3)));
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* pager_gate.c */
struct pace {
    bool began, walks;
    unsigned arrival; /* the machine this thread last knew of */
    double slice_end; /* of auto-converge */
    double rate, next;
};
void gate_open(void);
void gate_lock(void);
void gate_unlock(void);
void gate_wait(void);
void gate_refresh(void);
void gate_enter_state(enum state state);
void gate_checkpoint(struct pace *pace);
void gate_begin(void);
bool gate_begin_with(unsigned moves);
void gate_end(void);
void gate_pause_all(void);
void gate_resume_all(void);
bool gate_quiet(const struct member *member);
bool gate_all_stopped(void);
void gate_wake_service(void);

/* pager_memory.c */
void memory_plan(void);
bool memory_prepare(void);
void memory_step(int walker);
uint64_t memory_steps(int walker);
uint64_t memory_total_steps(void);
uint64_t memory_page_count(void);
void memory_read(uint64_t *seed);
void memory_verify_page(uint64_t page);
void memory_verify_all(struct verdict *verdict, bool as_it_arrived);
uint64_t *memory_page(uint64_t page);
void memory_restore(uint64_t page);
void memory_age(uint64_t page);
uint64_t memory_constant(uint64_t page, unsigned word);
int memory_total_walkers(void);
void memory_violation(const char *kind, uint64_t page);

/* pager_attach.c */
void attach_open_descriptors(void);
void *attach_serve(void *nothing);
bool attach_standby(void);
const char *attach_peer(void);

#endif
