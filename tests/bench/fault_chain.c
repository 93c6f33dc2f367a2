/*
 * What a remote fault cannot do without, and nothing else: the yardsticks of fault latency, with blocking threads.
 *
 *   chain   a thread touches a missing page -> the handler thread comes back from read(userfaultfd) and asks over TCP
 *           -> another process answers with the page -> the handler places it -> the thread goes on: four wake-ups
 *   echo    the same question and the same answer without a fault: two wake-ups
 *
 * The rule of the file: no protocol, no bookkeeping, no second connection; whoever serves faults does at least this.
 *
 * Run as `fault_chain chain|echo TOUCHES PAGES` (PAGES: a power of two, at least TOUCHES). Prints a latency in
 * microseconds per touch and line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
/* Odd, so that it leads once through all pages of a power of two, and far from neighbour to neighbour. */
#define STRIDE 2654435761u

struct request {
    uint64_t offset, length;
};

struct answer {
    struct request request;
    char page[PAGE];
};

static int handler_uffd, handler_socket;
static char *memory;

static void die(const char *what)
{
    fprintf(stderr, "fault_chain: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

/* -- TCP ---------------------------------------------------------------------------------------------------------- */

static bool receive(int sock, void *into, size_t length)
{
    for (char *at = into; length;) {
        ssize_t got = recv(sock, at, length, 0);
        if (got <= 0)
            return false;
        at += got;
        length -= (size_t)got;
    }
    return true;
}

static void transmit(int sock, const void *from, size_t length)
{
    for (const char *at = from; length;) {
        ssize_t sent = send(sock, at, length, MSG_NOSIGNAL);
        if (sent <= 0)
            die("send");
        at += sent;
        length -= (size_t)sent;
    }
}

static void without_delay(int sock)
{
    int on = 1;
    if (setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on))
        die("TCP_NODELAY");
}

/* Ends with its connection. */
static void serve(int listener)
{
    static struct answer answer;
    int sock = accept(listener, NULL, NULL);
    if (sock < 0)
        die("accept");
    without_delay(sock);
    memset(answer.page, 'x', sizeof answer.page);
    while (receive(sock, &answer.request, sizeof answer.request))
        transmit(sock, &answer, sizeof answer);
    _exit(0);
}

/* Start the other process; return a connection to it. */
static int start_server(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0), sock = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &length))
        die("listen");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        close(sock);
        serve(listener);
    }
    close(listener);
    if (connect(sock, (struct sockaddr *)&address, length))
        die("connect");
    without_delay(sock);
    return sock;
}

static void ask(int sock, uint64_t offset, struct answer *answer)
{
    struct request request = {offset, PAGE};
    transmit(sock, &request, sizeof request);
    if (!receive(sock, answer, sizeof *answer))
        die("receive");
}

/* -- faults ------------------------------------------------------------------------------------------------------- */

static void *handle(void *nothing)
{
    static struct answer answer;
    struct uffd_msg message;
    while (read(handler_uffd, &message, sizeof message) == sizeof message) {
        ask(handler_socket, (message.arg.pagefault.address - (uint64_t)memory) & ~(uint64_t)(PAGE - 1), &answer);
        struct uffdio_copy copy = {.dst = (uint64_t)memory + answer.request.offset, .len = answer.request.length};
        copy.src = (uint64_t)answer.page;
        if (ioctl(handler_uffd, UFFDIO_COPY, &copy))
            die("UFFDIO_COPY");
    }
    die("read(userfaultfd)");
    return nothing;
}

/* Memory as a workload has it: a memfd, mapped shared, all of it missing. */
static void register_memory(size_t size)
{
    int memfd = memfd_create("chain", MFD_CLOEXEC);
    if (memfd < 0 || ftruncate(memfd, (off_t)size))
        die("memfd");
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    handler_uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register missing = {{(uint64_t)memory, size}, UFFDIO_REGISTER_MODE_MISSING, 0};
    if (handler_uffd < 0 || ioctl(handler_uffd, UFFDIO_API, &api) || ioctl(handler_uffd, UFFDIO_REGISTER, &missing))
        die("userfaultfd");
}

static void touch(uint64_t offset)
{
    (void)*(volatile char *)(memory + offset);
}

int main(int count, char **arguments)
{
    static struct answer answer;
    bool chain = count == 4 && !strcmp(arguments[1], "chain");
    if (count != 4 || (!chain && strcmp(arguments[1], "echo"))) {
        fprintf(stderr, "usage: fault_chain chain|echo TOUCHES PAGES\n");
        return 2;
    }
    uint64_t touches = strtoull(arguments[2], NULL, 10), pages = strtoull(arguments[3], NULL, 10);
    double *took_us = calloc(touches, sizeof *took_us);
    int sock = start_server();
    if (chain) {
        pthread_t handler;
        register_memory(pages * PAGE);
        handler_socket = sock;
        if (pthread_create(&handler, NULL, handle, NULL))
            die("thread");
    }
    for (uint64_t i = 0; i < touches; i++) {
        uint64_t offset = i * STRIDE % pages * PAGE;
        double began = now_us();
        if (chain)
            touch(offset);
        else
            ask(sock, offset, &answer);
        took_us[i] = now_us() - began;
    }
    for (uint64_t i = 0; i < touches; i++)
        printf("%.2f\n", took_us[i]);
    return 0;
}
