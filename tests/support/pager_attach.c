/* docs/attach-protocol.md, spoken without a library: one thread that asks, obeys and attaches again.
 *
 * It never touches the machine's memory: what a device needs of it is done by the clerk, another thread.
 */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define MESSAGE_BYTES 65536
#define MAX_FDS 4
#define ANSWER_TIMEOUT_S 10
#define RETRY_FIRST_MS 200
#define RETRY_LAST_MS 2000
#define AGAIN_MS 50
#define MAX_BACKLOG 32

/* Numbers of a newer kernel than the headers may be of. */
#define MISSING_SHMEM (1 << 5)
#define THREAD_ID (1 << 8)
#define WP_HUGETLBFS_SHMEM (1 << 12)
#define WP_UNPOPULATED (1 << 13)
#define POISON (1 << 14)
#define WP_ASYNC (1 << 15)
#define SYNC_FEATURES (MISSING_SHMEM | THREAD_ID | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | POISON)
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

struct packet {
    char text[MESSAGE_BYTES + 1];
    char type[32];
    uint64_t id;
    int fd; /* or -1 */
};

/* A job for the clerk, and what came of it. */
struct job {
    enum { IDLE, ASKED, WORKING, DONE } stage;
    bool load;
    uint64_t id, size;
    int fd; /* what came with the load, or what goes with the answer */
    char error[ERROR_BYTES];
};

static int descriptors[3] = {-1, -1, -1}; /* pagemap, tracking, sync */
static int sock = -1;
static uint64_t next_id = 1;
static struct packet *backlog[MAX_BACKLOG];
static int backlog_size;
static char peer[ERROR_BYTES];
static struct job job;
static enum { NO_STANDBY, STANDBY_WANTED, STANDBY_SENT, STANDBY_GRANTED, STANDBY_REFUSED } standby;
static uint64_t standby_id;

/* -- descriptors -------------------------------------------------------------------------------------------------- */

static int open_userfaultfd(uint64_t features)
{
    int flags = O_CLOEXEC | O_NONBLOCK, fd = (int)syscall(SYS_userfaultfd, flags);
    if (fd < 0) {
        int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        fd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, flags) : -1;
        if (device >= 0)
            close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
        close(fd);
        return -1;
    }
    return fd;
}

void attach_open_descriptors(void)
{
    descriptors[0] = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (descriptors[0] < 0)
        die("/proc/self/pagemap: %s", strerror(errno));
    descriptors[1] = open_userfaultfd(SYNC_FEATURES | WP_ASYNC);
    if (descriptors[1] >= 0)
        descriptors[2] = open_userfaultfd(SYNC_FEATURES);
    tracked = descriptors[1] >= 0;
}

/* -- as much JSON as there is ------------------------------------------------------------------------------------- */

static const char *skip_string(const char *at)
{
    for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && at[1])
            at++;
    return *at ? at + 1 : at;
}

static const char *skip_space(const char *at)
{
    while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
        at++;
    return at;
}

static const char *skip_value(const char *at)
{
    int depth = 0;
    do {
        if (*at == '"') {
            at = skip_string(at);
            continue;
        }
        if (*at == '{' || *at == '[')
            depth++;
        else if (*at == '}' || *at == ']')
            depth--;
        at++;
    } while (*at && (depth > 0 || (*at != ',' && *at != '}')));
    return at;
}

/* Return where the value of a field of the message begins, or NULL. */
static const char *field(const char *message, const char *name)
{
    const char *at = skip_space(message);
    if (*at != '{')
        return NULL;
    for (at = skip_space(at + 1); *at == '"'; at = skip_space(at + 1)) {
        const char *key = at + 1, *end = skip_string(at);
        at = skip_space(end);
        if (*at != ':')
            return NULL;
        at = skip_space(at + 1);
        if ((size_t)(end - 1 - key) == strlen(name) && !strncmp(key, name, strlen(name)))
            return at;
        at = skip_space(skip_value(at));
        if (*at != ',')
            return NULL;
    }
    return NULL;
}

/* Copy a text that is only compared or shown: what would need an escape in the next message becomes a "?". */
static void get_text(const char *message, const char *name, char *text, size_t size)
{
    const char *at = field(message, name);
    size_t length = 0;
    if (at && *at == '"')
        for (at++; *at && *at != '"' && length + 1 < size; at++) {
            bool plain = *at != '\\' && (unsigned char)*at >= ' ';
            if (*at == '\\' && at[1])
                at++;
            text[length++] = plain ? *at : '?';
        }
    text[length] = 0;
}

static uint64_t get_number(const char *message, const char *name)
{
    const char *at = field(message, name);
    return at ? strtoull(at, NULL, 10) : 0;
}

static bool get_flag(const char *message, const char *name)
{
    const char *at = field(message, name);
    return at && !strncmp(at, "true", 4);
}

/* -- packets ------------------------------------------------------------------------------------------------------ */

static bool send_packet(const int *fds, int fd_count, const char *format, ...) __attribute__((format(printf, 3, 4)));

static bool send_packet(const int *fds, int fd_count, const char *format, ...)
{
    char text[4096];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    struct iovec content = {text, (size_t)length};
    struct msghdr message = {.msg_iov = &content, .msg_iovlen = 1};
    if (fd_count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)fd_count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)fd_count);
        memcpy(CMSG_DATA(&control.header), fds, sizeof(int) * (size_t)fd_count);
    }
    return sendmsg(sock, &message, MSG_NOSIGNAL) == length;
}

static void take_descriptor(struct packet *packet, struct msghdr *message)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; CMSG_LEN(sizeof(int) * (i + 1)) <= part->cmsg_len; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (packet->fd < 0)
                packet->fd = fd;
            else
                close(fd);
        }
    }
}

static bool receive(struct packet *packet)
{
    char control[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    struct iovec content = {packet->text, MESSAGE_BYTES};
    struct msghdr message = {
        .msg_iov = &content, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t length = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
    packet->fd = -1;
    if (length <= 0)
        return false;
    take_descriptor(packet, &message);
    packet->text[length] = 0;
    get_text(packet->text, "type", packet->type, sizeof packet->type);
    packet->id = get_number(packet->text, "id");
    return true;
}

static bool is(const struct packet *packet, const char *type)
{
    return !strcmp(packet->type, type);
}

static void drop(struct packet *packet)
{
    if (packet->fd >= 0)
        close(packet->fd);
    free(packet);
}

/* Wait for the answer to a question that was sent; orders wait until everything is declared. NULL: lost. */
static struct packet *answer_to(uint64_t id)
{
    for (;;) {
        struct packet *packet = malloc(sizeof *packet);
        if (!packet || !receive(packet)) {
            free(packet);
            return NULL;
        }
        if (is(packet, "refused")) {
            complain("refused: %s", packet->text);
            drop(packet);
            return NULL;
        }
        if (packet->id == id && (is(packet, "ok") || is(packet, "error") || is(packet, "block")))
            return packet;
        if (backlog_size == MAX_BACKLOG)
            die("too many orders while attaching");
        backlog[backlog_size++] = packet;
    }
}

/* -- attaching ---------------------------------------------------------------------------------------------------- */

static int create_block(struct block *block)
{
    int fd = memfd_create(block->name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)block->size))
        die("block %s: %s", block->name, strerror(errno));
    return fd;
}

static void map_block(struct block *block)
{
    if (block->base)
        return;
    void *base = mmap(NULL, block->size, PROT_READ | PROT_WRITE, MAP_SHARED, block->memfd, 0);
    if (base == MAP_FAILED || madvise(base, block->size, MADV_DONTFORK))
        die("block %s: %s", block->name, strerror(errno));
    block->base = base;
}

/* Return whether an answer says yes; `again`: it says not now. What stays a no ends the program. */
static bool accepted(struct packet *packet, const char *what, bool *again)
{
    *again = false;
    if (!is(packet, "error"))
        return true;
    *again = get_flag(packet->text, "again");
    if (!*again)
        die("%s: %s", what, packet->text);
    return false;
}

static bool declare_block(struct block *block, bool *again)
{
    uint64_t id = next_id++;
    if (!send_packet(NULL, 0, "{\"type\":\"block\",\"id\":%llu,\"name\":\"%s\",\"size\":%zu,\"page_size\":%u}",
                     (unsigned long long)id, block->name, block->size, PAGE))
        return false;
    struct packet *answer = answer_to(id);
    if (!answer)
        return false;
    bool yes = accepted(answer, block->name, again);
    if (yes && block->memfd < 0) {
        if (get_flag(answer->text, "exists")) {
            block->memfd = answer->fd;
            answer->fd = -1;
        } else {
            block->memfd = create_block(block);
        }
    }
    drop(answer);
    if (!yes)
        return true;
    map_block(block);
    id = next_id++;
    if (!send_packet(&block->memfd, 1, "{\"type\":\"map\",\"id\":%llu,\"name\":\"%s\",\"address\":%llu,\"size\":%zu}",
                     (unsigned long long)id, block->name, (unsigned long long)(uintptr_t)block->base, block->size))
        return false;
    answer = answer_to(id);
    if (!answer)
        return false;
    accepted(answer, block->name, again);
    drop(answer);
    return true;
}

/* Ask until the answer is not "not now". False: the connection is lost. */
static bool insist(const char *type, const char *name)
{
    for (;;) {
        bool again = false;
        uint64_t id = next_id++;
        if (!send_packet(NULL, 0, "{\"type\":\"%s\",\"id\":%llu%s%s%s}", type, (unsigned long long)id,
                         *name ? ",\"name\":\"" : "", name, *name ? "\"" : ""))
            return false;
        struct packet *answer = answer_to(id);
        if (!answer)
            return false;
        accepted(answer, type, &again);
        drop(answer);
        if (!again)
            return true;
        usleep(AGAIN_MS * 1000);
    }
}

static bool declare(void)
{
    for (int i = 0; i < block_count; i++) {
        bool again = false;
        do {
            if (again)
                usleep(AGAIN_MS * 1000);
            if (!declare_block(&blocks[i], &again))
                return false;
        } while (again);
    }
    if (options.device && my_index == 0 && !insist("device", options.device))
        return false;
    return insist("ready", "");
}

static bool say_hello(void)
{
    static const char *const STATES[] = {"fresh", "running", "stopped", "moved", "standby"};
    int count = descriptors[1] < 0 ? 1 : descriptors[2] < 0 ? 2 : 3;
    gate_lock();
    const char *state = STATES[me->state];
    gate_unlock();
    char name[NAME_BYTES + 16];
    snprintf(name, sizeof name, my_index ? "%s-%d" : "%s", options.name, my_index + 1);
    return send_packet(descriptors, count,
                       "{\"type\":\"hello\",\"version\":1,\"name\":\"%s\",\"pause\":\"cooperative\",\"state\":\"%s\","
                       "\"fds\":[\"pagemap\"%s%s],\"features\":[]}",
                       name, state, count > 1 ? ",\"tracking\"" : "", count > 2 ? ",\"sync\"" : "");
}

static void moved(const struct packet *packet)
{
    gate_lock();
    get_text(packet->text, "peer", peer, sizeof peer);
    if (me->state == RUNNING || me->state == STOPPED)
        gate_enter_state(MOVED);
    gate_unlock();
}

static bool welcomed(void)
{
    struct packet packet;
    char state[16];
    if (!receive(&packet))
        return false;
    if (packet.fd >= 0)
        close(packet.fd);
    if (!is(&packet, "welcome")) {
        if (is(&packet, "refused") && !get_flag(packet.text, "again"))
            die("refused: %s", packet.text);
        complain("not welcome: %s", packet.text);
        return false;
    }
    get_text(packet.text, "state", state, sizeof state);
    if (!strcmp(state, "moved"))
        moved(&packet);
    if (!declare())
        return false;
    gate_lock();
    if (me->state == FRESH && !strcmp(state, "running"))
        gate_enter_state(RUNNING);
    me->ready = true;
    gate_refresh();
    gate_unlock();
    return true;
}

static bool attach(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {ANSWER_TIMEOUT_S, 0};
    if (strlen(options.attach) >= sizeof address.sun_path)
        die("%s: too long for the path of a socket", options.attach);
    strcpy(address.sun_path, options.attach);
    sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0)
        die("socket: %s", strerror(errno));
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return !connect(sock, (struct sockaddr *)&address, sizeof address) && (say_hello(), welcomed());
}

static void lose(void)
{
    if (sock >= 0)
        close(sock);
    sock = -1;
    while (backlog_size)
        drop(backlog[--backlog_size]);
    gate_lock();
    me->stop_asked = false;
    /* A stop the daemon never heard the end of did not happen. */
    if (me->unacknowledged && me->state == STOPPED)
        gate_enter_state(RUNNING);
    me->unacknowledged = false;
    if (standby == STANDBY_SENT)
        standby = STANDBY_WANTED;
    gate_unlock();
}

/* -- devices: the clerk, who may touch memory --------------------------------------------------------------------- */

static void save_device(struct job *task)
{
    uint64_t state[2] = {++shared->device_saves, memory_total_steps()};
    task->fd = memfd_create("device", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (task->fd < 0 || write(task->fd, state, sizeof state) != sizeof state)
        snprintf(task->error, sizeof task->error, "device state: %s", strerror(errno));
}

static void load_device(struct job *task)
{
    uint64_t state[2], seed = options.seed;
    ssize_t length = pread(task->fd, state, sizeof state, 0);
    close(task->fd);
    task->fd = -1;
    if (length != sizeof state || task->size != sizeof state) {
        snprintf(task->error, sizeof task->error, "device state: expected %zu bytes, found %llu", sizeof state,
                 (unsigned long long)task->size);
        return;
    }
    shared->device_loads++;
    shared->device_saves = state[0];
    shared->device_steps = state[1];
    if (options.touch_on_load < 0)
        return;
    if (memory_total_steps() != state[1])
        memory_violation("device", (uint64_t)-1);
    for (int i = 0; i < options.touch_on_load; i++)
        memory_verify_page(random_word(&seed) % memory_page_count());
}

static void *work(void *nothing)
{
    for (;;) {
        gate_lock();
        while (job.stage != ASKED)
            gate_wait();
        job.stage = WORKING;
        gate_unlock();
        if (job.load)
            load_device(&job);
        else
            save_device(&job);
        gate_lock();
        job.stage = DONE;
        gate_unlock();
        gate_wake_service();
    }
    return nothing;
}

static void order_device(struct packet *packet, bool load)
{
    gate_lock();
    bool idle = job.stage == IDLE && (packet->fd >= 0) == load;
    if (idle) {
        job = (struct job){.stage = ASKED,
                           .load = load,
                           .id = packet->id,
                           .size = get_number(packet->text, "size"),
                           .fd = packet->fd};
        packet->fd = -1;
        gate_refresh();
    }
    gate_unlock();
    if (!idle)
        send_packet(NULL, 0, "{\"type\":\"error\",\"id\":%llu,\"error\":\"the device is busy\"}",
                    (unsigned long long)packet->id);
}

static void answer_device(void)
{
    gate_lock();
    struct job done = job;
    if (job.stage == DONE)
        job.stage = IDLE;
    gate_unlock();
    if (done.stage != DONE)
        return;
    unsigned long long id = done.id;
    if (*done.error)
        send_packet(NULL, 0, "{\"type\":\"error\",\"id\":%llu,\"error\":\"%s\"}", id, done.error);
    else if (done.load)
        send_packet(NULL, 0, "{\"type\":\"loaded\",\"id\":%llu}", id);
    else
        send_packet(&done.fd, 1, "{\"type\":\"saved\",\"id\":%llu}", id);
    if (done.fd >= 0)
        close(done.fd);
}

/* -- orders ------------------------------------------------------------------------------------------------------- */

static void order_stop(uint64_t id)
{
    gate_lock();
    if (me->state == RUNNING) {
        gate_enter_state(STOPPED);
        me->unacknowledged = true;
    }
    me->stop_asked = true;
    me->stop_id = id;
    gate_unlock();
}

static void answer_stop(void)
{
    gate_lock();
    bool stopped = me->stop_asked && gate_quiet(me);
    uint64_t id = me->stop_id;
    if (stopped)
        me->stop_asked = me->unacknowledged = false;
    gate_unlock();
    if (stopped)
        send_packet(NULL, 0, "{\"type\":\"stopped\",\"id\":%llu}", (unsigned long long)id);
}

static void order_cont(uint64_t id)
{
    gate_lock();
    bool gone = me->state == MOVED;
    me->stop_asked = me->unacknowledged = false;
    if (!gone)
        gate_enter_state(RUNNING);
    gate_unlock();
    if (gone)
        send_packet(NULL, 0, "{\"type\":\"error\",\"id\":%llu,\"error\":\"the machine moved away from here\"}",
                    (unsigned long long)id);
    else
        send_packet(NULL, 0, "{\"type\":\"running\",\"id\":%llu}", (unsigned long long)id);
}

static void take_standby(const struct packet *packet)
{
    gate_lock();
    if (standby == STANDBY_SENT && packet->id == standby_id) {
        if (is(packet, "ok")) {
            standby = STANDBY_GRANTED;
            gate_enter_state(STANDBY);
        } else {
            standby = get_flag(packet->text, "again") ? STANDBY_WANTED : STANDBY_REFUSED;
        }
        gate_refresh();
    }
    gate_unlock();
    if (is(packet, "error"))
        complain("%s", packet->text);
}

static void obey(struct packet *packet)
{
    if (is(packet, "stop")) {
        order_stop(packet->id);
    } else if (is(packet, "cont")) {
        order_cont(packet->id);
    } else if (is(packet, "save") || is(packet, "load")) {
        order_device(packet, is(packet, "load"));
    } else if (is(packet, "throttle")) {
        gate_lock();
        me->throttle = (int)get_number(packet->text, "percent");
        gate_refresh();
        gate_unlock();
    } else if (is(packet, "moved")) {
        moved(packet);
    } else if (is(packet, "ok") || is(packet, "error")) {
        take_standby(packet);
    } else {
        complain("unexpected: %s", packet->text);
    }
}

static void ask_standby(void)
{
    gate_lock();
    bool wanted = standby == STANDBY_WANTED;
    if (wanted) {
        standby = STANDBY_SENT;
        standby_id = next_id++;
    }
    gate_unlock();
    if (wanted)
        send_packet(NULL, 0, "{\"type\":\"standby\",\"id\":%llu}", (unsigned long long)standby_id);
}

/* Offer the memory for overwriting; return whether the daemon took the offer. For other threads. */
bool attach_standby(void)
{
    gate_lock();
    standby = STANDBY_WANTED;
    me->refused = false;
    gate_wake_service();
    while (standby != STANDBY_GRANTED && standby != STANDBY_REFUSED)
        gate_wait();
    bool granted = standby == STANDBY_GRANTED;
    standby = NO_STANDBY;
    me->refused = !granted;
    gate_refresh();
    gate_unlock();
    return granted;
}

/* Serve until the connection is lost (true) or the program ends (false). */
static bool serve_connection(void)
{
    for (;;) {
        for (int i = 0; i < backlog_size; i++) {
            obey(backlog[i]);
            drop(backlog[i]);
        }
        backlog_size = 0;
        answer_stop();
        answer_device();
        ask_standby();
        if (shared->quitting) {
            send_packet(NULL, 0, "{\"type\":\"bye\"}");
            return false;
        }
        struct pollfd wanted[] = {{.fd = sock, .events = POLLIN}, {.fd = me->wake, .events = POLLIN}};
        poll(wanted, 2, standby == STANDBY_WANTED ? AGAIN_MS : -1);
        eventfd_t count;
        if (wanted[1].revents)
            eventfd_read(me->wake, &count);
        if (!wanted[0].revents)
            continue;
        struct packet *packet = malloc(sizeof *packet);
        if (!packet || !receive(packet) || is(packet, "refused")) {
            free(packet);
            return true;
        }
        obey(packet);
        drop(packet);
    }
}

/* The service thread. */
void *attach_serve(void *nothing)
{
    pthread_t clerk;
    int retry_ms = RETRY_FIRST_MS;
    if (options.device && my_index == 0)
        pthread_create(&clerk, NULL, work, NULL);
    for (;;) {
        if (attach()) {
            retry_ms = RETRY_FIRST_MS;
            if (!serve_connection())
                return nothing;
        }
        lose();
        struct pollfd wake = {.fd = me->wake, .events = POLLIN};
        poll(&wake, 1, retry_ms);
        if (shared->quitting)
            return nothing;
        retry_ms = retry_ms * 2 < RETRY_LAST_MS ? retry_ms * 2 : RETRY_LAST_MS;
    }
}

const char *attach_peer(void)
{
    return peer;
}
