/* When threads may touch the machine's memory: the machine runs, and no check wants them to stand still.
 *
 * Walkers and readers pass `gate_checkpoint` between any two pages; whoever else touches memory does it between
 * `gate_begin` and `gate_end`. A stop is complete when all of them are at rest, however long one waits for a page.
 */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <time.h>

/* Auto-converge: run this long, then sleep. */
#define SLICE_S 0.010
/* A thread that is early by less than this goes on: sleeping is not more exact. */
#define EARLY_S 0.002
/* One that is late by more than this, because it waited for a page or the machine stood, does not make up for it. */
#define LATE_S 0.020

void gate_open(void)
{
    pthread_mutexattr_t lock;
    pthread_condattr_t changed;
    pthread_mutexattr_init(&lock);
    pthread_mutexattr_setpshared(&lock, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&shared->lock, &lock);
    pthread_mutex_init(&shared->output, &lock);
    pthread_condattr_init(&changed);
    pthread_condattr_setpshared(&changed, PTHREAD_PROCESS_SHARED);
    pthread_condattr_setclock(&changed, CLOCK_MONOTONIC);
    pthread_cond_init(&shared->changed, &changed);
    for (int i = 0; i < options.processes; i++) {
        struct member *member = &shared->members[i];
        member->state = FRESH;
        member->threads = member->parked = options.walkers + options.readers;
        member->look = LOOK_STOP;
    }
}

void gate_lock(void)
{
    pthread_mutex_lock(&shared->lock);
}

void gate_unlock(void)
{
    pthread_mutex_unlock(&shared->lock);
}

void gate_wait(void)
{
    pthread_cond_wait(&shared->changed, &shared->lock);
}

void gate_wake_service(void)
{
    eventfd_write(me->wake, 1);
}

static bool may_run(void)
{
    return me->state == RUNNING && !shared->paused && shared->prepared;
}

/* Something changed: tell whoever waits. With the lock held, as all that follows. */
void gate_refresh(void)
{
    for (int i = 0; i < options.processes; i++) {
        struct member *member = &shared->members[i];
        bool stop = member->state != RUNNING || shared->paused || !shared->prepared;
        __atomic_store_n(&member->look, (stop ? LOOK_STOP : 0) | (member->throttle ? LOOK_THROTTLE : 0),
                         __ATOMIC_RELAXED);
    }
    pthread_cond_broadcast(&shared->changed);
}

void gate_enter_state(enum state state)
{
    if (state == RUNNING && (me->state == FRESH || me->state == STANDBY))
        me->arrivals++;
    if (state == MOVED && me->state != MOVED)
        me->moves++;
    me->state = state;
    gate_refresh();
}

bool gate_quiet(const struct member *member)
{
    return member->parked == member->threads && !member->busy;
}

bool gate_all_stopped(void)
{
    for (int i = 0; i < options.processes; i++)
        if (shared->members[i].state == RUNNING || !gate_quiet(&shared->members[i]))
            return false;
    return true;
}

/* A thread has come to rest: a stop or a check may be waiting for it. */
static void rested(void)
{
    if (me->stop_asked)
        gate_wake_service();
    if (shared->paused || me->state != RUNNING)
        pthread_cond_broadcast(&shared->changed);
}

/* Rest until the machine runs. Says so once: telling it each time it wakes would keep all others awake. */
static void park(void)
{
    me->parked++;
    rested();
    while (!may_run())
        gate_wait();
    me->parked--;
}

/* The same for so long, or until the machine stops running. */
static void rest_for(double seconds)
{
    double until = now_s() + seconds;
    struct timespec deadline = {(time_t)until, (long)((until - (double)(time_t)until) * 1e9)};
    me->parked++;
    rested();
    while (may_run() && pthread_cond_timedwait(&shared->changed, &shared->lock, &deadline) != ETIMEDOUT)
        continue;
    me->parked--;
}

static double sleep_wanted(struct pace *pace, double now)
{
    if (me->throttle && now >= pace->slice_end) {
        double seconds = SLICE_S * me->throttle / (100 - me->throttle);
        pace->slice_end = now + seconds + SLICE_S;
        return seconds;
    }
    if (pace->rate > 0 && pace->next > now + EARLY_S)
        return pace->next - now;
    return 0;
}

void gate_checkpoint(struct pace *pace)
{
    double now = 0;
    int look = __atomic_load_n(&me->look, __ATOMIC_RELAXED);
    if (pace->rate > 0 || look == LOOK_THROTTLE)
        now = now_s();
    if (pace->rate > 0)
        pace->next = (pace->next < now - LATE_S ? now : pace->next) + 1 / pace->rate;
    if (pace->began && !(look & LOOK_STOP) && (!look || now < pace->slice_end) &&
        (pace->rate <= 0 || pace->next <= now + EARLY_S))
        return;
    gate_lock();
    if (!pace->began) {
        pace->began = true;
        me->parked--; /* counted from the start, so that nobody finds a thread missing that is only late */
    }
    if (!may_run())
        park();
    double seconds = sleep_wanted(pace, now_s());
    if (seconds > 0)
        rest_for(seconds);
    if (!may_run())
        park();
    pace->arrival = me->arrivals;
    if (pace->walks && shared->departures++ == shared->departures_before)
        pthread_cond_broadcast(&shared->changed);
    gate_unlock();
}

/* Wait until the machine runs, and hold up any stop until gate_end. */
void gate_begin(void)
{
    gate_lock();
    while (!may_run())
        gate_wait();
    me->busy++;
    gate_unlock();
}

/* The same for who prepares the memory; false: the machine has left meanwhile, there have been other than `moves`. */
bool gate_begin_with(unsigned moves)
{
    gate_lock();
    while ((me->state != RUNNING || shared->paused) && me->moves == moves)
        gate_wait();
    bool here = me->moves == moves;
    me->busy += here;
    gate_unlock();
    return here;
}

void gate_end(void)
{
    gate_lock();
    me->busy--;
    rested();
    gate_unlock();
}

static bool all_rest(void)
{
    for (int i = 0; i < options.processes; i++) {
        const struct member *member = &shared->members[i];
        if (member->parked != member->threads || member->busy != (member == me))
            return false;
    }
    return true;
}

/* Like gate_begin; on return nobody else touches the memory, and at least one page was written since the last time. */
void gate_pause_all(void)
{
    gate_lock();
    while (shared->departures == shared->departures_before)
        gate_wait();
    gate_unlock();
    gate_begin();
    gate_lock();
    shared->paused = true;
    gate_refresh();
    while (!all_rest())
        gate_wait();
    gate_unlock();
}

void gate_resume_all(void)
{
    gate_lock();
    shared->paused = false;
    shared->departures_before = shared->departures;
    gate_refresh();
    gate_unlock();
    gate_end();
}
