/* A multi-threaded workload in C (see pager.h): arguments, threads, commands on stdin, events on stdout.
 *
 * Events are JSON lines like those of migrated/demo/walker.py. Commands, a line each:
 *
 *   check              everything stands still and all of the memory is verified and hashed
 *   syscall-read PAGE  read(2) writes into a page: a fault inside the kernel
 *   punch PAGE         MADV_REMOVE, read it (zeros), write its content again
 *   lose PAGE          MADV_REMOVE only: a violation, for a test of the oracle
 *   age PAGE           one round older than it should be: a violation, too
 *   fork [PAGE]        a child reads a page through the mapping it did not inherit (MADV_DONTFORK)
 *   touch N            one idle thread touches N random pages and says how long each took, in microseconds
 *   quit
 */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_TOUCHES 100000
/* How much of a page `syscall-read` writes: constant words, so that nothing has to know that it did. */
#define READ_FIRST_WORD 8
#define READ_WORDS 64

struct options options = {.walkers = 4, .readers = 1, .processes = 1, .seed = 1, .touch_on_load = -1};
struct block blocks[MAX_BLOCKS];
int block_count, my_index;
struct shared *shared;
struct member *me;
bool tracked;

double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

uint64_t random_word(uint64_t *seed)
{
    /* splitmix64 */
    uint64_t word = *seed += 0x9e3779b97f4a7c15ull;
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}

/* -- saying things ------------------------------------------------------------------------------------------------ */

static void put(const char *text, size_t length)
{
    while (length) {
        ssize_t done = write(STDOUT_FILENO, text, length);
        if (done < 0 && errno != EINTR)
            return;
        if (done > 0) {
            text += done;
            length -= (size_t)done;
        }
    }
}

/* Write one event; `format` gives its fields, if any. */
void tell(const char *event, const char *format, ...)
{
    struct timespec now;
    char *fields = NULL, *line = NULL;
    va_list arguments;
    va_start(arguments, format);
    if (vasprintf(&fields, format, arguments) < 0)
        abort();
    va_end(arguments);
    clock_gettime(CLOCK_REALTIME, &now);
    int length = asprintf(&line, "{\"event\": \"%s\", \"time\": %.6f%s%s}\n", event,
                          (double)now.tv_sec + (double)now.tv_nsec / 1e9, *fields ? ", " : "", fields);
    if (length < 0)
        abort();
    pthread_mutex_lock(&shared->output);
    put(line, (size_t)length);
    pthread_mutex_unlock(&shared->output);
    free(fields);
    free(line);
}

static void complain_list(const char *format, va_list arguments)
{
    char text[2048];
    vsnprintf(text, sizeof text, format, arguments);
    fprintf(stderr, "pager %s (process %d): %s\n", options.name ? options.name : "?", my_index, text);
}

void complain(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    complain_list(format, arguments);
    va_end(arguments);
}

void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    complain_list(format, arguments);
    va_end(arguments);
    if (my_index)
        kill(shared->members[0].pid, SIGTERM);
    exit(1);
}

/* -- threads that touch memory ------------------------------------------------------------------------------------ */

static void *walk(void *which)
{
    int index = (int)(intptr_t)which, walker = my_index * options.walkers + index;
    struct pace pace = {.walks = true, .rate = options.rate / memory_total_walkers()};
    unsigned arrival = 0;
    for (;;) {
        gate_checkpoint(&pace);
        if (pace.arrival != arrival) {
            uint64_t steps = memory_steps(walker);
            arrival = pace.arrival;
            gate_lock();
            shared->at[walker] = steps;
            shared->at_arrival[walker] = arrival;
            gate_unlock();
        }
        memory_step(walker);
    }
    return NULL;
}

static void *verify(void *which)
{
    uint64_t seed = options.seed + (uint64_t)(my_index * options.readers + (int)(intptr_t)which) + 1;
    struct pace pace = {.rate = options.read_rate / (options.readers * options.processes)};
    for (;;) {
        gate_checkpoint(&pace);
        memory_read(&seed);
    }
    return NULL;
}

static void welcome_machine(unsigned moves)
{
    bool filled = false;
    if (!gate_begin_with(moves))
        return;
    if (my_index == 0) {
        filled = memory_prepare();
        gate_lock();
        shared->prepared = true;
        gate_refresh();
        gate_unlock();
        tell("running", "\"steps\": %llu, \"filled\": %s", (unsigned long long)memory_total_steps(),
             filled ? "true" : "false");
    }
    gate_end();
}

static void part_from_machine(void)
{
    struct verdict verdict;
    gate_lock();
    while (me->state == MOVED && !gate_all_stopped())
        gate_wait();
    gate_unlock();
    if (my_index) {
        attach_standby();
        return;
    }
    memory_verify_all(&verdict, false);
    bool granted = attach_standby();
    gate_lock();
    for (int i = 0; granted && i < options.processes; i++)
        while (shared->members[i].state == MOVED && !shared->members[i].refused)
            gate_wait();
    gate_unlock();
    tell("moved", "\"to\": \"%s\", \"steps\": %llu, \"invariant\": %s, \"hash\": \"%016llx\", \"violations\": %llu",
         attach_peer(), (unsigned long long)verdict.steps, verdict.invariant ? "true" : "false",
         (unsigned long long)verdict.hash, (unsigned long long)shared->violations);
}

/* Meets machines that arrive and leave, because the service thread must not touch them. */
static void *attend(void *nothing)
{
    unsigned arrivals = 0, moves = 0;
    for (;;) {
        gate_lock();
        while (me->arrivals == arrivals && me->moves == moves)
            gate_wait();
        bool arrived = me->arrivals != arrivals;
        arrivals = arrived ? me->arrivals : arrivals;
        moves = arrived ? moves : me->moves;
        gate_unlock();
        if (arrived)
            welcome_machine(moves);
        else
            part_from_machine();
    }
    return nothing;
}

/* -- commands ----------------------------------------------------------------------------------------------------- */

static void check(void)
{
    struct verdict verdict;
    char hashes[MAX_BLOCKS * (NAME_BYTES + 32)] = "", walkers[MAX_WALKERS * 24] = "";
    gate_pause_all();
    memory_verify_all(&verdict, true);
    if (shared->device_loads && verdict.at != shared->device_steps)
        memory_violation("device", (uint64_t)-1);
    for (int i = 0; i < memory_total_walkers(); i++)
        sprintf(walkers + strlen(walkers), "%s%llu", i ? ", " : "", (unsigned long long)memory_steps(i));
    gate_resume_all();
    for (int i = 0; i < block_count; i++)
        sprintf(hashes + strlen(hashes), "%s\"%s\": \"%016llx\"", i ? ", " : "", blocks[i].name,
                (unsigned long long)verdict.block_hash[i]);
    tell("checked",
         "\"steps\": %llu, \"at\": %llu, \"invariant\": %s, \"hash\": \"%016llx\", \"violations\": %llu,"
         " \"blocks\": {%s}, \"walkers\": [%s], \"reads\": %llu, \"device\": {\"saves\": %llu, \"loads\": %llu}",
         (unsigned long long)verdict.steps, (unsigned long long)verdict.at, verdict.invariant ? "true" : "false",
         (unsigned long long)verdict.hash, (unsigned long long)shared->violations, hashes, walkers,
         (unsigned long long)shared->reads, (unsigned long long)shared->device_saves,
         (unsigned long long)shared->device_loads);
}

static void syscall_read(uint64_t page)
{
    uint64_t words[READ_WORDS];
    int ends[2];
    for (unsigned i = 0; i < READ_WORDS; i++)
        words[i] = memory_constant(page, READ_FIRST_WORD + i);
    if (pipe(ends) || write(ends[1], words, sizeof words) != sizeof words)
        die("pipe: %s", strerror(errno));
    gate_begin();
    double began = now_s();
    ssize_t done = read(ends[0], memory_page(page) + READ_FIRST_WORD, sizeof words);
    int error = done < 0 ? errno : 0;
    double took = now_s() - began;
    memory_verify_page(page);
    gate_end();
    close(ends[0]);
    close(ends[1]);
    tell("syscall-read", "\"page\": %llu, \"bytes\": %zd, \"errno\": %d, \"us\": %.1f", (unsigned long long)page, done,
         error, took * 1e6);
}

static void punch(uint64_t page, bool restore)
{
    gate_pause_all();
    uint64_t *words = memory_page(page), any = 0;
    int error = madvise(words, PAGE, MADV_REMOVE) ? errno : 0;
    double began = now_s();
    for (unsigned i = 0; restore && i < PAGE_WORDS; i++)
        any |= *(volatile uint64_t *)&words[i];
    double took = now_s() - began;
    if (restore)
        memory_restore(page);
    gate_resume_all();
    tell(restore ? "punched" : "lost", "\"page\": %llu, \"errno\": %d, \"zero\": %s, \"us\": %.1f",
         (unsigned long long)page, error, any ? "false" : "true", took * 1e6);
}

static void age(uint64_t page)
{
    gate_pause_all();
    memory_age(page);
    gate_resume_all();
    tell("aged", "\"page\": %llu", (unsigned long long)page);
}

static void fork_child(uint64_t page)
{
    int status = 0;
    volatile uint64_t *words = memory_page(page);
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_DUMPABLE, 0);
        _exit(words[0] == page + 1 ? 0 : 1);
    }
    if (child < 0)
        die("fork: %s", strerror(errno));
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        continue;
    tell("forked", "\"page\": %llu, \"signal\": %d, \"status\": %d", (unsigned long long)page,
         WIFSIGNALED(status) ? WTERMSIG(status) : 0, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

static void touch(int count)
{
    static uint64_t seed;
    static char all[MAX_TOUCHES * 16], cold[MAX_TOUCHES * 16];
    char *at = all, *cold_at = cold;
    if (count < 0 || count > MAX_TOUCHES)
        count = MAX_TOUCHES;
    if (!seed)
        seed = options.seed + (uint64_t)getpid();
    *all = *cold = 0;
    for (int i = 0; i < count; i++) {
        uint64_t page = random_word(&seed) % memory_page_count();
        unsigned char resident = 0;
        gate_begin();
        mincore(memory_page(page), PAGE, &resident);
        double began = now_s();
        (void)*(volatile uint64_t *)memory_page(page);
        double us = (now_s() - began) * 1e6;
        memory_verify_page(page);
        gate_end();
        at += sprintf(at, "%s%.1f", at == all ? "" : ", ", us);
        if (!(resident & 1))
            cold_at += sprintf(cold_at, "%s%.1f", cold_at == cold ? "" : ", ", us);
    }
    /* "cold": not in memory a moment before, so that it was fetched. */
    tell("touched", "\"us\": [%s], \"cold_us\": [%s]", all, cold);
}

static bool obey(const char *line)
{
    static uint64_t seed = 1;
    char command[32] = "";
    unsigned long long number = 0;
    int found = sscanf(line, "%31s %llu", command, &number);
    uint64_t page = (found > 1 ? number : random_word(&seed)) % memory_page_count();
    if (!strcmp(command, "check"))
        check();
    else if (!strcmp(command, "syscall-read"))
        syscall_read(page);
    else if (!strcmp(command, "punch"))
        punch(page, true);
    else if (!strcmp(command, "lose"))
        punch(page, false);
    else if (!strcmp(command, "age"))
        age(page);
    else if (!strcmp(command, "fork"))
        fork_child(page);
    else if (!strcmp(command, "touch"))
        touch((int)number);
    else if (!strcmp(command, "quit"))
        return false;
    else
        complain("unknown command: %s", line);
    return true;
}

/* -- start and end ------------------------------------------------------------------------------------------------ */

static void add_block(const char *name, const char *size, bool blank)
{
    struct block *block = &blocks[block_count++];
    if (block_count > MAX_BLOCKS)
        die("at most %d blocks", MAX_BLOCKS);
    snprintf(block->name, sizeof block->name, "%s", name);
    *block->name ? (void)0 : die("a block has no name");
    block->size = strtoull(size, NULL, 10);
    if (!block->size || block->size % PAGE)
        die("block %s: its size must be a multiple of %u, not %s", block->name, PAGE, size);
    block->blank = blank;
    block->memfd = -1;
}

static void add_named_block(char *argument, bool blank)
{
    char *colon = strrchr(argument, ':');
    if (!colon)
        die("expected NAME:SIZE, found %s", argument);
    *colon = 0;
    add_block(argument, colon + 1, blank);
}

static void read_arguments(int count, char **arguments)
{
    static const struct option NAMES[] = {
        {"attach", 1, 0, 'a'},      {"name", 1, 0, 'n'},    {"ram", 1, 0, 'r'},       {"block", 1, 0, 'b'},
        {"blank", 1, 0, 'z'},       {"seed", 1, 0, 's'},    {"walkers", 1, 0, 'w'},   {"readers", 1, 0, 'm'},
        {"processes", 1, 0, 'p'},   {"device", 1, 0, 'd'},  {"rate", 1, 0, 'R'},      {"read-rate", 1, 0, 'Q'},
        {"touch-on-load", 1, 0, 't'}, {"twin", 0, 0, 'T'},  {"pattern", 1, 0, 'P'},   {0, 0, 0, 0},
    };
    for (int option; (option = getopt_long(count, arguments, "", NAMES, NULL)) != -1;) {
        switch (option) {
        case 'a': options.attach = optarg; break;
        case 'n': options.name = optarg; break;
        case 'r': add_block("heap", optarg, false); break;
        case 'b': add_named_block(optarg, false); break;
        case 'z': add_named_block(optarg, true); break;
        case 's': options.seed = strtoull(optarg, NULL, 10); break;
        case 'w': options.walkers = atoi(optarg); break;
        case 'm': options.readers = atoi(optarg); break;
        case 'p': options.processes = atoi(optarg); break;
        case 'd': options.device = optarg; break;
        case 'R': options.rate = atof(optarg); break;
        case 'Q': options.read_rate = atof(optarg); break;
        case 't': options.touch_on_load = atoi(optarg); break;
        case 'T': options.twin = true; break;
        case 'P': options.scattered = !strcmp(optarg, "random"); break;
        default: exit(2);
        }
    }
    if (!options.attach || !options.name || !block_count || blocks[0].blank)
        die("needed: --attach, --name, and a first block that is not blank (--ram SIZE or --block NAME:SIZE)");
    if (options.processes < 1 || options.processes > MAX_MEMBERS || options.walkers < 1 || options.readers < 0 ||
        memory_total_walkers() > MAX_WALKERS)
        die("at most %d processes and %d walkers in all", MAX_MEMBERS, MAX_WALKERS);
}

static void start(void *(*body)(void *), intptr_t argument, const char *name)
{
    pthread_t thread;
    int error = pthread_create(&thread, NULL, body, (void *)argument);
    if (error)
        die("thread %s: %s", name, strerror(error));
    pthread_setname_np(thread, name);
}

static void fork_members(void)
{
    shared->members[0].pid = getpid();
    for (int i = 1; i < options.processes; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork: %s", strerror(errno));
        if (child == 0) {
            my_index = i;
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != shared->members[0].pid)
                exit(1);
            break;
        }
        shared->members[i].pid = child;
    }
    me = &shared->members[my_index];
    me->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

/* End with all that was forked: who is killed by its parent's death is left for somebody else to bury. */
static void *await_end(void *nothing)
{
    sigset_t signals;
    int number;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigwait(&signals, &number);
    for (int i = 1; i < options.processes; i++)
        kill(shared->members[i].pid, SIGKILL);
    while (wait(NULL) > 0)
        continue;
    _exit(0);
    return nothing;
}

static bool all_ready(void)
{
    for (int i = 0; i < options.processes; i++)
        if (!shared->members[i].ready)
            return false;
    return true;
}

static void lead(void)
{
    char line[256], pids[MAX_MEMBERS * 16] = "";
    gate_lock();
    while (!all_ready())
        gate_wait();
    gate_unlock();
    for (int i = 0; i < options.processes; i++)
        sprintf(pids + strlen(pids), "%s%d", i ? ", " : "", shared->members[i].pid);
    tell("ready", "\"tracked\": %s, \"pids\": [%s]", tracked ? "true" : "false", pids);
    while (fgets(line, sizeof line, stdin) && obey(line))
        continue;
    gate_lock();
    shared->quitting = true;
    gate_refresh();
    gate_unlock();
}

int main(int count, char **arguments)
{
    pthread_t service;
    read_arguments(count, arguments);
    memory_plan();
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        abort();
    gate_open();
    shared->prepared = options.twin;
    fork_members();
    if (my_index == 0) {
        sigset_t signals;
        sigemptyset(&signals);
        sigaddset(&signals, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &signals, NULL);
        start(await_end, 0, "end");
    }
    attach_open_descriptors();
    if (pthread_create(&service, NULL, attach_serve, NULL))
        die("no service thread");
    start(attend, 0, "attend");
    for (int i = 0; i < options.walkers; i++)
        start(walk, i, "walk");
    for (int i = 0; i < options.readers; i++)
        start(verify, i, "verify");
    if (my_index == 0)
        lead();
    gate_lock();
    while (!shared->quitting)
        gate_wait();
    gate_unlock();
    gate_wake_service();
    pthread_join(service, NULL);
    while (my_index == 0 && wait(NULL) > 0)
        continue;
    return 0;
}
