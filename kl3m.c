#ifndef KIND   // all but room 5, which the file includes of itself once for each kind of CPU
// kl3m: runs ALEA Institute's KL3M legal language models (GPT-NeoX) on a plain computer.
//
//     ./kl3m -p "Governing Law.\n" -t 0.3 -n 32
//
// The promise: a logit is a pure function of the model file and the tokens before it. It is the
// same to the last bit for any number of threads, any neighbours in the pass, any split of the
// prompt, any compiler, and on AVX-512, AVX2, NEON and plain C. Four rules keep it:
//   Rule 1. A sum is a chain of fused multiply-adds in the order of the inner dimension, a chain
//      for each output and each SUM_BLOCK inputs, from input 0 on; a block's chain begins with
//      nothing, and the blocks' sums are added in their order. Sums over positions, attention's,
//      are one chain. Or, where outputs are few (norms, softmax), 16 partial sums of every 16th
//      term are folded in one fixed tree. A SIMD lane is an output or one of the 16, so the width
//      of the CPU's vectors changes nothing. Of q8 weights a chain is one over groups of inputs,
//      whose sums are exact integers, up to CHUNK inputs.
//   Rule 2. Multiplications and additions are fused where FMA is written and nowhere else:
//      -ffp-contract=off.
//   Rule 3. exp, the normal distribution, sines and powers are ours: a C library promises no bits.
//      Square root and division are IEEE 754's, which does.
//   Rule 4. Threads, batch and split choose which outputs are computed when, never how. A row reads
//      the keys and values of the positions before it and its own, in their order.
// They hold for finite numbers; logits that are not finite are reported as a fault of the model.
//
// Everything the network computes is laid out in blocks of 16 columns, so that the result of one
// product is ready to be the input of the next:
//   weights     panels [outputs / 16][inputs][16]: a lane is an output, inputs in their order
//   activations tiles  [rows / 12][columns / 16][12][16]: what twelve rows of a pass need, in the
//               order they need it
//   keys        [32 positions / 16][head size][16]: panels whose outputs are positions
//   values      [head size / 16][32 positions][16]: panels whose inputs are positions
// One kernel, `product`, computes the linear layers, q k^T and p v.
//
// The rooms, each of which calls only those above it:
//    1. Ground         errors, memory, files, signals, clock
//    2. Text           bytes that grow, escapes, JSON
//    3. Model file     sections, sizes, weights; the file stays where it is mapped
//    4. Lanes          the kinds of CPU: vector width, fused multiply-add
//    5. Kernels        arithmetic over blocks and tiles
//    6. Threads        parallel(pieces)
//    7. KV cache       pages of keys and values, sequences that share them
//    8. Linear layers  rows of a pass in tiles, times weights
//    9. Attention      queries, scores, values
//   10. Forward        rows in, logits out
//   11. Sampling       logits in, one token out, or how likely each is
//   12. Guesses        what may come next, from ids alone
//   13. Patterns       regular expressions become automata
//   14. Schema         a JSON Schema becomes a graph of values, with what each costs
//   15. Constraint     which bytes may follow, and so which tokens
//   16. Requests       a prompt and its continuations, from pages set aside to the last token
//   17. Scheduling     passes: planned, run, read
//   18. Prompts        lines, records, files; their ids
//   19. Results        lines, JSON, a stream, figures, shades
//   20. Commands       generate, score, check, tokenize, detokenize, logits, info, verify, learn,
//                      quantize
//   21. Options        the table that the parser, --help and the README's table come from
//   22. Main

#define _GNU_SOURCE   // sched_getaffinity, vasprintf, getentropy; macOS ignores it
#include "tokenizer.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#ifdef __APPLE__
#define st_mtim st_mtimespec   // what POSIX calls it has another name there
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

// The Makefile takes back what these macros do not tell (clang's -fassociative-math, say).
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "-ffast-math, -Ofast and their kin change results: kl3m must be compiled without them"
#endif
_Static_assert(sizeof(0.1) == sizeof(double),
               "-fsingle-precision-constant changes results: kl3m must be compiled without it");
_Static_assert(FLT_EVAL_METHOD == 0,
               "kl3m needs float arithmetic in float (on x86-32: -msse2 -mfpmath=sse)");
_Static_assert(sizeof(float) == 4 && sizeof(void *) == 8,
               "kl3m needs a 64-bit machine with IEEE floats");

#define VERSION "0.1"
#define MOST_SEED ((1ull << 53) - 1)   // a double, and so JSON, holds each

enum {
    BLOCK = 16,                 // columns of a block, and the partial sums of rule 1
    TILE = 12,                  // rows of a tile
    PAGE = 32,                  // positions of a page of keys and values
    PAIR = 2 * BLOCK,           // outputs of two panels: dimensions are padded to it
    BLOCK_FLOATS = TILE * BLOCK,
    SUM_BLOCK = 256,            // inputs of a chain (rule 1)
    LINE_BYTES = 64,            // of a cache line
    HUGE_PAGE = 2 << 20,        // bytes
    QUANT_GROUP = 64,           // inputs that share a scale in q8 weights
    MOST_HEAD_SIZE = 4096,
    INFINITE_BITS = 0x7F800000, // the least bits, but for the sign, of a float that is not
};

// ---- 1. Ground ----
// What every other room stands on. A fault ends in one of three ways: usage_error (exit status 2),
// die (1), or, for one prompt among many, a message kept in its request (3). From here on the rest
// may assume that memory asked for is there, that what is written arrives, and that what was
// interrupted leaves no half-written file behind.

enum { OK = 0, FAILED = 1, USAGE = 2, SOME_FAILED = 3 };   // and 128 + a signal's number

static const char *volatile unfinished_file;   // removed if the program ends before it is whole
static atomic_int interrupted;                 // the exit status a signal asked for, or 0
static int stop_pipe[2] = { -1, -1 };          // readable once a signal has come, for poll
static double waited;                          // for input, in seconds
static const int stop_signals[] = { SIGINT, SIGTERM, SIGHUP };

enum { STOP_SIGNALS = sizeof stop_signals / sizeof *stop_signals };

// Bytes on their way to a descriptor, collected until there are `room` of them.
typedef struct { int fd; const char *name; char *data; size_t size, room; } Writer;

static char stdout_buffer[1 << 16];
static Writer standard_output = { .fd = STDOUT_FILENO, .name = "standard output",
                                  .data = stdout_buffer, .room = sizeof stdout_buffer };
static bool messages_lost;                     // something could not be written to standard error

static void remove_unfinished(void) {
    if (unfinished_file) unlink(unfinished_file);
}

// Writes all of it; a descriptor that does not block (O_NONBLOCK is its other users' choice too)
// is waited for. False: errno says why.
static bool write_fully(int fd, const char *data, size_t n) {
    while (n > 0) {
        ssize_t put = write(fd, data, n);
        if (put >= 0) data += put, n -= (size_t)put;
        else if (errno == EAGAIN) poll(&(struct pollfd){ .fd = fd, .events = POLLOUT }, 1, -1);
        else if (errno != EINTR) return false;
    }
    return true;
}

static void write_error(const char *s, size_t n) {
    if (!write_fully(STDERR_FILENO, s, n)) messages_lost = true;
}

// A line on standard error, written at once. What is no printable character, in a name from a file
// or an argument, is shown as an escape: it could be a command to the terminal.
static void write_message(const char *format, va_list arguments, const char *end) {
    char text[2 * PATH_MAX], line[sizeof text * 4 + 64] = "kl3m: ";
    size_t n = strlen(line);
    vsnprintf(text, sizeof text, format, arguments);
    for (size_t i = 0, length, left = strlen(text); left > 0; i += length, left -= length) {
        uint32_t code;
        length = utf8_char(text + i, left, &code);
        if (code >= 0x20 && (code < 0x7F || (code >= 0xA0 && code != UINT32_MAX))) {
            memcpy(line + n, text + i, length);
            n += length;
            continue;
        }
        for (size_t k = 0; k < length; k++)
            n += (size_t)sprintf(line + n, "\\x%02x", (unsigned)(uint8_t)text[i + k]);
    }
    n += (size_t)sprintf(line + n, "%s\n", end);
    write_error(line, n);
}

__attribute__((format(printf, 1, 2)))
static void message(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_message(format, arguments, "");
    va_end(arguments);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_fully(standard_output.fd, standard_output.data, standard_output.size);   // not lost
    write_message(format, arguments, "");
    va_end(arguments);
    remove_unfinished();
    _exit(FAILED);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void usage_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_message(format, arguments, "; kl3m --help lists the options");
    va_end(arguments);
    exit(USAGE);
}

static void flush(Writer *w) {
    size_t n = w->size;
    w->size = 0;                               // if it fails, die must not try it again
    if (!write_fully(w->fd, w->data, n)) die("cannot write to %s: %s", w->name, strerror(errno));
}

static void flush_stdout(void) { flush(&standard_output); }

static void write_all(Writer *w, const void *data, size_t n) {
    for (const char *from = data; n > 0;) {
        size_t part = w->room - w->size < n ? w->room - w->size : n;
        memcpy(w->data + w->size, from, part);
        w->size += part, from += part, n -= part;
        if (w->size == w->room) flush(w);
    }
}

// Memory for n objects of a size, at a multiple of `alignment`; never NULL. It holds anything, and
// what lies in it untouched costs nothing.
static void *allocate_raw(size_t n, size_t size, size_t alignment) {
    size_t bytes;
    bool too_much = __builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 2;
    size_t whole = too_much ? 0 : bytes / alignment * alignment + alignment;
    void *memory = too_much ? NULL : aligned_alloc(alignment, whole);
    if (memory == NULL)
        die("out of memory: %zu times %zu bytes were asked for; smaller -b, --rows, -n, -r, -j or "
            "--kv-memory need less", n, size);
    return memory;
}

// The same, aligned for any vector and zeroed.
static void *allocate(size_t n, size_t size) {
    return memset(allocate_raw(n, size, LINE_BYTES), 0, n * size);
}

// The same as allocate_raw, in huge pages if the system has them: for memory that is used whole
// (measured: 4 MB are there in 0.4 ms, in pages of 4 KB in 2.3).
static void *allocate_huge(size_t size) {
    void *memory = allocate_raw(1, size, size < HUGE_PAGE ? LINE_BYTES : HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    if (size >= HUGE_PAGE) madvise(memory, size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return memory;
}

// Zeroed memory that takes time and room only where it is written: for tables that may stay mostly
// empty.
static void *allocate_lazily(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("out of memory: %zu bytes were asked for", size);
    return memory;
}

// Memory that is taken piece by piece and given back at once, or down to a mark.
typedef struct Block Block;
struct Block { Block *before; size_t used, size; };    // its bytes stand behind it

typedef struct { Block *last; size_t size; } Arena;    // size: of all blocks
typedef struct { Block *block; size_t used; } Mark;

enum { BLOCK_BYTES = 1 << 16, BLOCK_HEAD = (sizeof(Block) + 15) / 16 * 16 };

// n bytes at a multiple of 16, which hold anything.
static void *take(Arena *a, size_t n) {
    size_t need = (n + 15) / 16 * 16;
    if (a->last == NULL || a->last->size - a->last->used < need) {
        size_t size = need > BLOCK_BYTES - BLOCK_HEAD ? need : BLOCK_BYTES - BLOCK_HEAD;
        Block *block = allocate_raw(1, BLOCK_HEAD + size, LINE_BYTES);
        *block = (Block){ .before = a->last, .size = size };
        a->last = block;
        a->size += size;
    }
    a->last->used += need;
    return (char *)a->last + BLOCK_HEAD + (a->last->used - need);
}

static void *take_copy(Arena *a, const void *from, size_t n) {
    void *copy = take(a, n);
    if (n) memcpy(copy, from, n);
    return copy;
}

static Mark arena_mark(const Arena *a) {
    return (Mark){ a->last, a->last ? a->last->used : 0 };
}

// Gives back what was taken since the mark was made.
static void arena_reset(Arena *a, Mark mark) {
    while (a->last != mark.block) {
        Block *before = a->last->before;
        a->size -= a->last->size;
        free(a->last);
        a->last = before;
    }
    if (a->last) a->last->used = mark.used;
}

static void arena_free(Arena *a) { arena_reset(a, (Mark){0}); }

enum { LEAST_ROOM = 256 };         // bytes of what grows

// Room for at least `need` bytes in a buffer that grows.
static void *grow(void *memory, size_t *room, size_t need) {
    if (need <= *room) return memory;
    size_t more = need > SIZE_MAX / 4 ? 0 : *room ? *room : LEAST_ROOM;
    while (more && more < need) more *= 2;
    memory = more ? realloc(memory, more) : NULL;
    if (memory == NULL) die("out of memory: %zu bytes were asked for", need);
    *room = more;
    return memory;
}

// Room for one thing more than n of this size, in memory that came from here: what it has room for
// follows from n.
static void *grow_list(void *memory, int n, size_t size) {
    size_t taken = (size_t)n * size, room = n > 0 ? LEAST_ROOM : 0;
    while (room < taken) room *= 2;
    return grow(memory, &room, taken + size);
}

__attribute__((format(printf, 1, 2)))
static char *format_string(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char *s = NULL;
    if (vasprintf(&s, format, arguments) < 0) die("out of memory");
    va_end(arguments);
    return s;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The same clock, which stands still while the program waits for input.
static double busy_seconds(void) { return seconds() - waited; }

static uint64_t system_random(void) {
    uint64_t number;
    if (getentropy(&number, sizeof number) != 0)
        die("the system gives no random numbers: %s", strerror(errno));
    return number;
}

// A line on the terminal that is written over and over, cut to its width; an empty one clears it.
__attribute__((format(printf, 1, 2)))
static void show_status(const char *format, ...) {
    enum { USUAL_WIDTH = 80, MOST_WIDTH = 200 };
    char text[MOST_WIDTH], line[MOST_WIDTH + 16];
    struct winsize window;
    bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    int width = known ? window.ws_col : USUAL_WIDTH;
    int n = snprintf(line, sizeof line, "\r%.*s\033[K", width - 1, text);
    write_error(line, (size_t)n);
}

// Ends the program as this signal does by itself, with nothing half-written left behind.
static void on_end(int number) {
    remove_unfinished();
    signal(number, SIG_DFL);
    raise(number);
}

// The first signal asks the program to finish what it has; a second one ends it.
static void on_stop(int number) {
    if (interrupted) {
        remove_unfinished();
        _exit(interrupted);
    }
    interrupted = 128 + number;
    if (write(stop_pipe[1], "", 1) < 0) {}     // the pipe is empty: it cannot be full
}

// A signal that the parent ignores (nohup, a shell's `&`) stays ignored. A system call that it
// interrupts is begun again (SA_RESTART).
static void catch_signal(int number, void (*handler)(int)) {
    struct sigaction before, ours = { .sa_handler = handler, .sa_flags = SA_RESTART };
    if (sigaction(number, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        sigaction(number, &ours, NULL);
}

// From here on the stop signals end the program in order, and what waits for input waits in
// wait_for_input. A closed pipe ends the program quietly, whoever started it; a file that may not
// grow is an error of its write.
static void catch_signals(void) {
    static const int ends[] = { SIGPIPE, SIGQUIT, SIGALRM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGPROF,
                                SIGXCPU };
    if (pipe(stop_pipe) != 0) die("cannot make a pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++) fcntl(stop_pipe[i], F_SETFD, FD_CLOEXEC);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) catch_signal(ends[i], on_end);
    for (int i = 0; i < STOP_SIGNALS; i++) catch_signal(stop_signals[i], on_stop);
}

// A standard stream that is closed gets a descriptor that cannot be used its way, so that no other
// file takes its number, and reading or writing it fails as it should.
static void hold_standard_streams(void) {
    for (int fd = 0; fd < 3; fd++) {
        int way = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY;
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", way) != fd)
            die("standard stream %d is closed, and /dev/null cannot stand in for it: %s", fd,
                strerror(errno));
    }
}

// Can something be read, or its end be seen, without waiting? With `wait`, waits until it can or a
// signal comes.
static bool wait_for_input(int fd, bool wait) {
    struct pollfd ready[2] = { { .fd = stop_pipe[0], .events = POLLIN },
                               { .fd = fd, .events = POLLIN } };
    double start = seconds();
    while (poll(ready, 2, wait ? -1 : 0) < 0)
        if (errno != EINTR && errno != EAGAIN) die("cannot wait for input: %s", strerror(errno));
    waited += seconds() - start;
    return !interrupted && ready[1].revents != 0;
}

// Goes on as if the signal had not come.
static void forget_interrupt(void) {
    char byte;
    while (read(stop_pipe[0], &byte, 1) < 0 && errno == EINTR) {}
    interrupted = 0;
}

// A file to be read, "-" standard input. A named pipe that nobody writes to yet is waited for when
// it is read, where a signal is seen, and not here.
static int open_input(const char *name) {
    if (strcmp(name, "-") == 0) return STDIN_FILENO;
    int fd = open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) die("cannot open %s: %s", name, strerror(errno));
    return fd;
}

// Ends the program, as a write would, once nobody reads its output any more: the rest need not be
// computed.
static void check_reader(void) {
    struct pollfd out = { .fd = STDOUT_FILENO };
    if (poll(&out, 1, 0) > 0 && out.revents & POLLERR) raise(SIGPIPE);
}

// Where a name leads in the end: links are followed, also one to a file that is not there yet.
static char *follow_links(const char *name) {
    enum { MOST_LINKS = 40 };                  // as Linux has it
    char target[PATH_MAX], *path = format_string("%s", name);
    for (int i = 0;; i++) {
        ssize_t n = readlink(path, target, sizeof target - 1);
        if (n < 0) return path;
        if (i == MOST_LINKS) die("cannot write %s: %s", name, strerror(ELOOP));
        target[n] = 0;
        const char *slash = *target == '/' ? NULL : strrchr(path, '/');
        char *next = format_string("%.*s%s", slash ? (int)(slash + 1 - path) : 0, path, target);
        free(path);
        path = next;
    }
}

// What is no regular file (a pipe, /dev/null). A named pipe waits for its reader, or for a signal.
static int open_direct(const char *name) {
    enum { A_MOMENT = 50 };                    // milliseconds
    for (;;) {
        int fd = open(name, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NONBLOCK);
        if (fd >= 0 || errno != ENXIO) return fd;
        if (interrupted) _exit(interrupted);   // nothing has been begun
        poll(&(struct pollfd){ .fd = stop_pipe[0], .events = POLLIN }, 1, A_MOMENT);
    }
}

// A file that appears under its name when it is whole and not before, with the rights of the one
// it replaces; a link is followed. Meanwhile it has a random name in the same folder, which nobody
// else can have. Writes begin and end at multiples of 2 MB: ext4 (Linux 6.16 and later) then keeps
// it in huge pages. What is no regular file is written as it is.
typedef struct { Writer writer; char *name, *temporary; } Output;

static char *temporary_name(const char *name) {
    const char *slash = strrchr(name, '/');
    return format_string("%.*skl3m-%016llx.part", slash ? (int)(slash + 1 - name) : 0, name,
                         (unsigned long long)system_random());
}

static Output output_open(const char *name) {
    struct stat s;
    bool exists = stat(name, &s) == 0, direct = exists && !S_ISREG(s.st_mode);
    Output out = { .name = direct ? format_string("%s", name) : follow_links(name) };
    mode_t rights = exists ? s.st_mode & 0777 : 0666;
    int fd, flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
    if (direct) fd = open_direct(name);
    else fd = open(unfinished_file = out.temporary = temporary_name(out.name), flags, rights);
    if (fd < 0) unfinished_file = NULL;
    if (fd < 0 || (exists && !direct && fchmod(fd, rights) != 0))
        die("cannot write %s: %s", name, strerror(errno));
    char *buffer = allocate_raw(1, HUGE_PAGE, LINE_BYTES);
    out.writer = (Writer){ .fd = fd, .name = out.name, .data = buffer, .room = HUGE_PAGE };
    return out;
}

static void output_close(Output *out, bool whole) {
    if (whole || !out->temporary) flush(&out->writer);
    bool kept = !(out->temporary && whole) || fsync(out->writer.fd) == 0;
    if (close(out->writer.fd) != 0 || !kept)
        die("cannot write %s: %s", out->name, strerror(errno));
    if (out->temporary && !whole) unlink(out->temporary);
    else if (out->temporary && rename(out->temporary, out->name) != 0)
        die("cannot write %s: %s", out->name, strerror(errno));
    unfinished_file = NULL;
    free(out->temporary);
    free(out->writer.data);
    free(out->name);
}

// ---- 2. Text ----
// Bytes that grow, and how text is written down: escapes in and out, UTF-8, JSON (RFC 8259). Any
// byte may come, and each is accounted for.

// A string of bytes that grows; append leaves a NUL behind it.
typedef struct { char *data; size_t size, room; } Bytes;

static void append(Bytes *b, const void *data, size_t n) {
    b->data = grow(b->data, &b->room, b->size + n + 1);
    if (n) memcpy(b->data + b->size, data, n);
    b->size += n;
    b->data[b->size] = 0;
}

static void append_string(Bytes *b, const char *s) { append(b, s, strlen(s)); }

typedef struct { Bytes *texts; int n; } Texts;

static void add_text(Texts *t, Bytes text) {
    t->texts = grow_list(t->texts, t->n, sizeof text);
    t->texts[t->n++] = text;
}

static void free_texts(Texts *t) {
    for (int i = 0; i < t->n; i++) free(t->texts[i].data);
    free(t->texts);
    *t = (Texts){0};
}

// Takes so many bytes away at the beginning.
static void drop(Bytes *b, size_t n) {
    if (n == 0) return;
    b->size -= n;
    memmove(b->data, b->data + n, b->size);
}

__attribute__((format(printf, 2, 3)))
static void append_format(Bytes *b, const char *format, ...) {
    char s[512];                               // a double with 6 decimals has up to 317
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s, sizeof s, format, arguments);
    va_end(arguments);
    append_string(b, s);
}

// To standard output, at once, and the bytes are given back.
static void print(Bytes *b) {
    write_all(&standard_output, b->data, b->size);
    flush_stdout();
    free(b->data);
    *b = (Bytes){0};
}

// Up to 64 KB more of what wait_for_input has seen; 0 at the end; -1: somebody else has read it.
static ssize_t read_more(int fd, const char *name, Bytes *b) {
    enum { PART = 65536 };
    b->data = grow(b->data, &b->room, b->size + PART);
    ssize_t got = read(fd, b->data + b->size, PART);
    if (got < 0 && errno != EAGAIN && errno != EINTR)
        die("cannot read %s: %s", name, strerror(errno));
    if (got > 0) b->size += (size_t)got;
    return got;
}

// The length of the byte order mark that an input begins with: no part of its text.
static size_t byte_order_mark(const Bytes *b) {
    return b->size >= 3 && memcmp(b->data, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

// A whole file, "-" standard input.
static Bytes read_file(const char *name) {
    int fd = open_input(name);
    Bytes b = {0};
    for (ssize_t got = 1; got != 0;) {
        if (!wait_for_input(fd, true)) _exit(interrupted);     // nothing has been begun
        got = read_more(fd, name, &b);
    }
    if (fd != STDIN_FILENO) close(fd);
    drop(&b, byte_order_mark(&b));
    return b;
}

// The value of `digits` hexadecimal digits at s[0 .. n), or -1.
static long hex(const char *s, size_t n, size_t digits) {
    long value = 0;
    if (n < digits) return -1;
    for (size_t i = 0; i < digits; i++) {
        unsigned char c = (unsigned char)s[i];
        if (!isxdigit(c)) return -1;
        value = value * 16 + (isdigit(c) ? c - '0' : tolower(c) - 'a' + 10);
    }
    return value;
}

// The character of \uHHHH, or of a pair of them, at the beginning of s[0 .. n); *used is the
// length. Half a pair is returned as it is, from 0xD800 to 0xDFFF; -1: there is no such escape.
static long unicode_escape(const char *s, size_t n, size_t *used) {
    long code = n >= 6 && s[0] == '\\' && s[1] == 'u' ? hex(s + 2, n - 2, 4) : -1;
    *used = 6;
    if (code < 0xD800 || code >= 0xDC00 || n < 12 || s[6] != '\\' || s[7] != 'u') return code;
    long low = hex(s + 8, n - 8, 4);
    if (low < 0xDC00 || low >= 0xE000) return code;
    *used = 12;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

// Decodes \n \t \r \\ \" \0 \xHH \uHHHH in place and returns the new length. What is no escape
// stays as it is.
static size_t unescape(char *s, size_t n) {
    static const char names[] = "ntr\\\"0", bytes[] = "\n\t\r\\\"\0";
    size_t out = 0;
    for (size_t i = 0; i < n;) {
        char c = s[i], next = i + 1 < n ? s[i + 1] : 0;
        const char *name = c == '\\' && next ? strchr(names, next) : NULL;
        if (name) {
            s[out++] = bytes[name - names];
            i += 2;
            continue;
        }
        if (c == '\\' && next == 'x' && hex(s + i + 2, n - i - 2, 2) >= 0) {
            s[out++] = (char)hex(s + i + 2, n - i - 2, 2);
            i += 4;
            continue;
        }
        if (c == '\\' && next == 'u') {
            size_t used;
            long code = unicode_escape(s + i, n - i, &used);
            if (code >= 0 && (code < 0xD800 || code >= 0xE000)) {      // half a pair is none
                out += utf8_put(s + out, (uint32_t)code);
                i += used;
                continue;
            }
        }
        s[out++] = s[i++];
    }
    return out;
}

// What text becomes on its way out.
typedef enum {
    AS_IT_IS,
    IN_A_LINE,         // newline, return, tab, NUL and backslash escaped
    BEFORE_A_NUL,      // a NUL becomes U+FFFD
    IN_JSON,           // inside a string of JSON
    JSON_ITSELF,       // JSON already
} Form;

static bool terminal;          // is standard output one? Then control characters are shown

// How many bytes at s[0 .. n), which do not begin a character, one U+FFFD stands for: Unicode's
// maximal part.
static size_t broken_part(const char *s, size_t n) {
    for (size_t k = n < 3 ? n : 3; k > 1; k--)
        if (utf8_unfinished(s, k) == k) return k;
    return 1;
}

// How a character goes out if it cannot go as it is, in escape[]; false: it can. A byte that is
// no character (broken) comes as its code.
static bool escape_of(uint32_t code, bool broken, Form form, char escape[16]) {
    bool json = form == IN_JSON || form == JSON_ITSELF;
    bool control = code < 0x20 || (code >= 0x7F && code < 0xA0);
    const char *named = form == IN_A_LINE ? "\n\r\t\\" : form == IN_JSON ? "\n\r\t\\\"" : "";
    if (code > 0 && code < 0x80 && strchr(named, (int)code)) {
        int letter = code == '\n' ? 'n' : code == '\r' ? 'r' : code == '\t' ? 't' : (int)code;
        snprintf(escape, 16, "\\%c", letter);
    } else if (code == 0 && form == IN_A_LINE) snprintf(escape, 16, "\\0");
    else if (code == 0 && form == BEFORE_A_NUL) snprintf(escape, 16, "\xEF\xBF\xBD");
    else if ((form == IN_JSON && code < 0x20) || (json && terminal && control && code >= 0x7F))
        snprintf(escape, 16, "\\u%04x", code);
    else if (!json && terminal && (broken || (control && code != '\n' && code != '\t')))
        snprintf(escape, 16, broken || code < 0x80 ? "\\x%02x" : "\\u%04x", code);
    else return false;
    return true;
}

static void append_text(Bytes *out, const char *s, size_t n, Form form) {
    for (size_t length; n > 0; s += length, n -= length) {
        uint32_t code;
        char escape[16];
        length = utf8_char(s, n, &code);
        bool broken = code == UINT32_MAX;
        if (broken && form == IN_JSON) {
            length = broken_part(s, n);
            append_string(out, "\xEF\xBF\xBD");
        } else if (escape_of(broken ? (uint8_t)s[0] : code, broken, form, escape))
            append_string(out, escape);
        else append(out, s, length);
    }
}

// KEY: "TEXT", of which the key comes with all that stands before the text's quotes.
static void append_json(Bytes *out, const char *key, const char *s, size_t n) {
    append_string(out, key);
    append_string(out, "\"");
    append_text(out, s, n, IN_JSON);
    append_string(out, "\"");
}

// A number with 6 decimals; what is none, or infinite, is "nan" or "inf", and in JSON null.
static void append_number(Bytes *out, double x, Form form) {
    bool json = form == IN_JSON || form == JSON_ITSELF;
    if (isnan(x) || isinf(x)) append_string(out, json ? "null" : isnan(x) ? "nan" : "inf");
    else append_format(out, "%.6f", fabs(x) < 5e-7 ? 0 : x);   // no -0.000000
}

// One JSON value, read strictly: UTF-8, nested at most MAX_DEPTH deep.
typedef struct {
    const char *start, *at, *end;
    const char *flaw;          // what should stand at `at`, or NULL
    bool halves;               // of pairs of surrogates may stand alone, and say U+FFFD
} Json;

enum { MAX_DEPTH = 200 };

static bool json_fail(Json *j, const char *flaw) {
    if (!j->flaw) j->flaw = flaw;
    return false;
}

static void json_skip_space(Json *j) {
    while (j->at < j->end && strchr(" \t\r\n", *j->at) && *j->at) j->at++;
}

// Skips space, then takes this character if it is next.
static bool json_take(Json *j, char c) {
    json_skip_space(j);
    if (j->at == j->end || *j->at != c) return false;
    j->at++;
    return true;
}

// The escape at j->at becomes *n bytes of text[]; its own length is *used.
static bool json_escape(Json *j, char text[4], size_t *n, size_t *used) {
    static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    size_t left = (size_t)(j->end - j->at);
    const char *name = left > 1 && j->at[1] ? strchr(names, j->at[1]) : NULL;
    if (name) {
        text[0] = meanings[name - names];
        *n = 1, *used = 2;
        return true;
    }
    long unit = unicode_escape(j->at, left, used);
    if (unit < 0) return json_fail(j, "a valid escape was expected");
    bool half = unit >= 0xD800 && unit < 0xE000;
    if (half && !j->halves) return json_fail(j, "a whole pair of surrogates was expected");
    *n = utf8_put(text, half ? 0xFFFD : (uint32_t)unit);
    return true;
}

// A string; what it says is appended to `out` unless that is NULL.
static bool json_string(Json *j, Bytes *out) {
    if (!json_take(j, '"')) return json_fail(j, "a string was expected");
    while (j->at < j->end && *j->at != '"') {
        char text[4];
        uint32_t code;
        size_t used = utf8_char(j->at, (size_t)(j->end - j->at), &code), n = used;
        if (code == UINT32_MAX) return json_fail(j, "UTF-8 was expected");
        if (code < 0x20) return json_fail(j, "an escaped control character was expected");
        memcpy(text, j->at, n);
        if (code == '\\' && !json_escape(j, text, &n, &used)) return false;
        if (out) append(out, text, n);
        j->at += used;
    }
    if (j->at == j->end) return json_fail(j, "the end of the string was expected");
    j->at++;
    return true;
}

static int json_digits(Json *j) {
    int count = 0;
    for (; j->at < j->end && isdigit((unsigned char)*j->at); j->at++) count++;
    return count;
}

static bool json_number(Json *j) {
    const char *number = j->at;
    if (*j->at == '-') j->at++;
    const char *first = j->at;
    int digits = json_digits(j);
    if (digits == 0 || (digits > 1 && *first == '0')) {
        j->at = number;
        return json_fail(j, "a value was expected");
    }
    if (j->at < j->end && *j->at == '.') {
        j->at++;
        if (json_digits(j) == 0) return json_fail(j, "a digit was expected");
    }
    if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
        j->at++;
        if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
        if (json_digits(j) == 0) return json_fail(j, "a digit was expected");
    }
    return true;
}

// Any value, checked and skipped.
static bool json_value(Json *j, int depth) {
    static const char *const words[] = { "true", "false", "null" };
    json_skip_space(j);
    if (depth > MAX_DEPTH) return json_fail(j, "nothing nested deeper was expected");
    if (j->at == j->end) return json_fail(j, "a value was expected");
    if (*j->at == '"') return json_string(j, NULL);
    bool object = *j->at == '{';
    if (object || *j->at == '[') {
        char end = object ? '}' : ']';
        j->at++;
        if (json_take(j, end)) return true;
        do {
            if (object && !json_string(j, NULL)) return false;
            if (object && !json_take(j, ':')) return json_fail(j, "a colon was expected");
            if (!json_value(j, depth + 1)) return false;
        } while (json_take(j, ','));
        if (json_take(j, end)) return true;
        return json_fail(j, object ? "a comma or } was expected" : "a comma or ] was expected");
    }
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(j->end - j->at) >= n && memcmp(j->at, words[i], n) == 0)
            return j->at += n, true;
    }
    return json_number(j);
}

// What stands where JSON is not as it should be, for a message.
static char *json_found(const Json *j) {
    enum { SHOWN = 24 };
    size_t n = (size_t)(j->end - j->at);
    if (n == 0) return format_string("the end of the line");
    Bytes found = {0};
    append_text(&found, j->at, n > SHOWN ? SHOWN - utf8_unfinished(j->at, SHOWN) : n,
                BEFORE_A_NUL);
    if (n > SHOWN) append_string(&found, "...");
    return found.data;
}

// ---- 3. Model file ----
// One file: header, table of sections, sections (README.md has the layout). It is mapped and used
// where it lies. Here every number in it is checked before it is used; from here on the rest may
// assume that each pointer in a Model leads to as many bytes as its comment says and that the
// tokenizer's tables are sound. What else must know how a weight lies asks its Format.

// Files of OLDEST_VERSION are read too: their config ends where the start and end tokens begin,
// which are found by their names.
enum { OLDEST_VERSION = 1, FORMAT_VERSION = 2, ROW_MAJOR = 0, PANELS = 1, MOST_ENDS = 8 };

// Types of sections, as in the file: bytes of any meaning, then what weights may be.
typedef enum { TYPE_BYTES, TYPE_F32, TYPE_BF16, TYPE_Q8, TYPES } Type;

// How a matrix lies: pairs of panels, PAIR outputs each; in a pair its inputs in their order, some
// of them a unit. The two panels are streams of their own, or stand in each unit side by side:
//
//     2 streams   outputs 0 .. 15: input 0, 1, 2 ...      then outputs 16 .. 31: input 0, 1, 2 ...
//     1 stream    input 0 of all 32 outputs, input 1 of all 32, ...
typedef struct {
    const char *name;
    int unit_inputs, unit_bytes;       // of all PAIR outputs
    int streams;
} Format;

// A further type of weights is a row here, a case in room 5's `weights_at`, which widens it, and a
// kernel stamped from `product` with it, or one of its own; where --quantize writes it, a function
// that packs, and for the table of embeddings a case in room 10's load_weights.
static const Format formats[TYPES] = {
    [TYPE_F32] = { "f32", .unit_inputs = 1, .unit_bytes = PAIR * sizeof(float), .streams = 2 },
    // The upper half of an f32, widened when it is read: all arithmetic is that of f32.
    [TYPE_BF16] = { "bf16", .unit_inputs = 1, .unit_bytes = PAIR * sizeof(uint16_t),
                    .streams = 2 },
    // A group of inputs: bytes, which are the weight over its scale, to the nearest whole number,
    // plus 128, as [inputs / 4][PAIR][4], of four inputs the first, third, second, fourth; then
    // each output's scale, bf16. It is multiplied with rows of integers (QuantGroup). Of a table's
    // row, a group's bytes in their order and its one scale.
    [TYPE_Q8] = { "q8", .unit_inputs = QUANT_GROUP, .streams = 1,
                  .unit_bytes = PAIR * (QUANT_GROUP + (int)sizeof(uint16_t)) },
};

// What q8 weights are multiplied with: QUANT_GROUP inputs of the rows of a tile. x is a row's
// number over its scale, to the nearest whole number from -most_quant to most_quant (15 bits); on
// kinds of CPU with PLANES, of four inputs first the high bytes, then the low ones, as weights lie.
typedef struct {
    int16_t x[TILE][QUANT_GROUP];
    int32_t start[TILE];       // what a sum begins with: -128 times the row's sum of x, or 0
    float scale[TILE];         // the row's
    int32_t zero[8];           // so that the next begins a cache line
} QuantGroup;
_Static_assert(sizeof(QuantGroup) % LINE_BYTES == 0, "groups begin cache lines");

static const float most_quant = 16383;

// One matrix [outputs][inputs] of weights; keys and values of a page are such too.
typedef struct {
    const char *at;
    Type type;
    int outputs, inputs;
} Matrix;

static const char file_magic[8] = { 'K', 'L', '3', 'M', '\r', '\n', '\x1a', '\n' };

typedef struct {
    char magic[8];
    uint32_t version, sections;
    uint64_t file_size;
    uint32_t directory_crc;    // of the 24 bytes before it and of the table of sections
    uint8_t zero[36];
} FileHeader;
_Static_assert(sizeof(FileHeader) == 64, "as on disk");

typedef struct {
    char name[56];
    uint32_t type, crc;
    uint64_t offset, size;     // bytes; offsets are multiples of SECTION_ALIGNMENT
    uint32_t rows, cols, layout, zero;
} Section;
_Static_assert(sizeof(Section) == 96, "as on disk");

enum { SECTION_ALIGNMENT = 64 };

typedef struct {
    uint32_t hidden, layers, heads, kv_heads, head_size, rotary_dims, intermediate, vocab, context;
    uint32_t parallel_residual, zero[2];
    double rotary_base, layer_norm_eps;
    // From version 2 on:
    uint32_t start;            // the token of an empty prompt, or TOKENIZER_NONE
    uint32_t n_ends, ends[MOST_ENDS];  // the tokens that end a text
    uint32_t normalizer;       // of prompts: 0, none
    uint32_t rest[5];          // 0
} FileConfig;
_Static_assert(sizeof(FileConfig) == 128 && offsetof(FileConfig, start) == 64, "as on disk");

typedef struct {
    int hidden, layers, heads, kv_heads, head_size, rotary_dims, intermediate, vocab, context;
    bool parallel_residual;    // x + attention(norm1(x)) + mlp(norm2(x)), else one after the other
    double rotary_base, eps;
    int q, kv, qkv;            // columns: heads * head_size, kv_heads * head_size, q + 2 kv
    int sharing;               // query heads that share a kv head
} Config;

typedef struct {               // matrices in panels; vectors are padded to a multiple of PAIR
    const float *norm1, *norm1_bias, *norm2, *norm2_bias;    // [hidden]
    Matrix qkv;                // [q + 2 kv][hidden]: all of Q, all of K, all of V
    Matrix dense;              // [hidden][q]
    Matrix up;                 // [intermediate][hidden]
    Matrix down;               // [hidden][intermediate]
    const float *qkv_bias, *dense_bias, *up_bias, *down_bias;
} Layer;

typedef struct {
    const char *path;
    const uint8_t *map;        // [size]
    size_t size;
    const Section *sections;   // [n_sections]
    uint32_t n_sections;
    FileConfig file_config;    // as version 2 has it
    Config c;
    Tokenizer tokenizer;
    const char *about;         // "key\tvalue\n" lines, about_size bytes
    size_t about_size;
    Matrix embed_in;           // [vocab][hidden] row-major, unpadded
    Layer *layers;             // [layers]
    const float *norm, *norm_bias;     // [hidden]
    Matrix embed_out;          // [vocab][hidden] in panels
    bool quantized;            // some matrices are q8
    Type kv_type;              // of keys and values: bf16 if so, else f32
} Model;

// The file that is mapped, as it was then: for room 22, which tells why a fault happened.
static struct { int fd; const char *start; struct stat as_opened; } mapped_file = { .fd = -1 };

static int padded(int n) { return (n + PAIR - 1) / PAIR * PAIR; }

static int groups_of(int inputs) { return (inputs + QUANT_GROUP - 1) / QUANT_GROUP; }

// Bytes of a pair of panels with so many inputs.
static long pair_bytes(Type type, int inputs) {
    const Format *f = &formats[type];
    return (long)((inputs + f->unit_inputs - 1) / f->unit_inputs) * f->unit_bytes;
}

// From a pair's first panel to its second.
static long panel_stride(Type type, int inputs) {
    return formats[type].streams == 2 ? pair_bytes(type, inputs) / 2 : 0;
}

// Bytes of a matrix in panels.
static long panels_bytes(Type type, int outputs, int inputs) {
    return padded(outputs) / PAIR * pair_bytes(type, inputs);
}

// From one unit of inputs to the next, in a stream.
static int step_bytes(Type type) { return formats[type].unit_bytes / formats[type].streams; }

// Of one input, rounded up: for what is fetched ahead.
static int pace_of(Type type) {
    return (step_bytes(type) + formats[type].unit_inputs - 1) / formats[type].unit_inputs;
}

// How far behind a stream's beginning an input lies.
static long input_bytes(Type type, int input) {
    return (long)(input / formats[type].unit_inputs) * step_bytes(type);
}

// Bytes of a row of a row-major table.
static long row_bytes(Type type, int columns) {
    const Format *f = &formats[type];
    return (long)((columns + f->unit_inputs - 1) / f->unit_inputs) * f->unit_bytes / PAIR;
}

static uint64_t matrix_bytes(Type type, uint32_t layout, int rows, int columns) {
    return (uint64_t)(layout == PANELS ? panels_bytes(type, rows, columns)
                                       : rows * row_bytes(type, columns));
}

// The upper half of a float's bits, rounded to nearest, ties to even. A finite number may become
// infinite; what is no number stays none.
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static const char *pair_of(const Matrix *m, int pair) {
    return m->at + pair * pair_bytes(m->type, m->inputs);
}

// CRC-32 as in zlib (reflected 0xEDB88320), eight bytes a step over eight tables ("slicing by 8",
// Kounavis and Berry 2005).
static uint32_t crc32_of(uint32_t crc, const void *bytes, size_t n) {
    static uint32_t table[8][256];
    const uint8_t *data = bytes;
    if (table[0][1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xEDB88320u : 0);
            table[0][i] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++)
                table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    }
    crc = ~crc;
    for (; n >= 8; n -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
              table[4][low >> 24] ^ table[3][high & 255] ^ table[2][high >> 8 & 255] ^
              table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    while (n--) crc = crc >> 8 ^ table[0][(crc ^ *data++) & 255];
    return ~crc;
}

// The section with this name, or NULL. Sections are mostly asked for in their order: the search
// begins at *at and leaves there the place behind what it found.
static const Section *find_section_from(const Model *m, const char *name, uint32_t *at) {
    for (uint32_t i = 0; i < m->n_sections; i++) {
        const Section *s = &m->sections[(*at + i) % m->n_sections];
        if (strcmp(s->name, name) != 0) continue;
        *at = (uint32_t)(s - m->sections) + 1;
        return s;
    }
    return NULL;
}

// The same, wherever it is.
static const Section *seek_section(const Model *m, const char *name) {
    return find_section_from(m, name, &(uint32_t){0});
}

__attribute__((noreturn))
static void die_missing(const Model *m, const char *name) {
    die("%s: the section %s is missing; export the model again", m->path, name);
}

static const Section *find_section(const Model *m, const char *name) {
    const Section *s = seek_section(m, name);
    if (s == NULL) die_missing(m, name);
    return s;
}

// What a tensor of the model must be, and where its address goes: into one of the two.
typedef struct {
    const char *name;
    int rows, cols;
    uint32_t layout;
    Matrix *matrix;
    const float **vector;      // one row, padded, always f32
} Tensor;

// The place of a tensor is found and checked to be as the program expects it.
static void find_tensor(Model *m, const char *name, const Tensor *t, uint32_t *at) {
    const Section *s = find_section_from(m, name, at);
    if (s == NULL) die_missing(m, name);
    // Vectors are f32, matrices what they say, if the program knows it.
    bool weights = t->matrix && s->type > TYPE_BYTES && s->type < TYPES;
    Type type = weights ? (Type)s->type : TYPE_F32;
    uint64_t bytes = matrix_bytes(type, t->layout, t->rows, t->vector ? padded(t->cols) : t->cols);
    if (s->type != type || s->rows != (uint32_t)t->rows || s->cols != (uint32_t)t->cols ||
        s->layout != t->layout || s->size != bytes)
        die("%s: %s: found type %u, %u x %u, layout %u, %llu bytes; expected type %d, %d x %d, "
            "layout %u, %llu bytes; export the model again", m->path, name, s->type, s->rows,
            s->cols, s->layout, (unsigned long long)s->size, type, t->rows, t->cols, t->layout,
            (unsigned long long)bytes);
    const void *place = m->map + s->offset;
    if (t->vector) *t->vector = place;
    else *t->matrix = (Matrix){ place, type, t->rows, t->cols };
    m->quantized |= type == TYPE_Q8;
}

static void find_tensors(Model *m) {
    const Config *c = &m->c;
    uint32_t at = 0;
    Tensor ends[] = {
        { "embed_in.weight", c->vocab, c->hidden, ROW_MAJOR, .matrix = &m->embed_in },
        { "final_layer_norm.weight", 1, c->hidden, ROW_MAJOR, .vector = &m->norm },
        { "final_layer_norm.bias", 1, c->hidden, ROW_MAJOR, .vector = &m->norm_bias },
        { "embed_out.weight", c->vocab, c->hidden, PANELS, .matrix = &m->embed_out },
    };
    m->layers = allocate((size_t)c->layers, sizeof *m->layers);
    for (int i = 0; i < c->layers; i++) {
        Layer *l = &m->layers[i];
        Tensor tensors[] = {
            { "input_layernorm.weight", 1, c->hidden, .vector = &l->norm1 },
            { "input_layernorm.bias", 1, c->hidden, .vector = &l->norm1_bias },
            { "post_attention_layernorm.weight", 1, c->hidden, .vector = &l->norm2 },
            { "post_attention_layernorm.bias", 1, c->hidden, .vector = &l->norm2_bias },
            { "attention.query_key_value.weight", c->qkv, c->hidden, PANELS, .matrix = &l->qkv },
            { "attention.query_key_value.bias", 1, c->qkv, .vector = &l->qkv_bias },
            { "attention.dense.weight", c->hidden, c->q, PANELS, .matrix = &l->dense },
            { "attention.dense.bias", 1, c->hidden, .vector = &l->dense_bias },
            { "mlp.dense_h_to_4h.weight", c->intermediate, c->hidden, PANELS, .matrix = &l->up },
            { "mlp.dense_h_to_4h.bias", 1, c->intermediate, .vector = &l->up_bias },
            { "mlp.dense_4h_to_h.weight", c->hidden, c->intermediate, PANELS, .matrix = &l->down },
            { "mlp.dense_4h_to_h.bias", 1, c->hidden, .vector = &l->down_bias },
        };
        for (size_t t = 0; t < sizeof tensors / sizeof *tensors; t++) {
            char name[96];
            snprintf(name, sizeof name, "layers.%d.%s", i, tensors[t].name);
            find_tensor(m, name, &tensors[t], &at);
        }
    }
    for (size_t t = 0; t < sizeof ends / sizeof *ends; t++)
        find_tensor(m, ends[t].name, &ends[t], &at);
}

static uint32_t version_of(const Model *m) { return ((const FileHeader *)m->map)->version; }

static void read_config(Model *m) {
    const Section *s = find_section(m, "config");
    bool oldest = version_of(m) == OLDEST_VERSION;
    size_t size = oldest ? offsetof(FileConfig, start) : sizeof(FileConfig);
    if (s->type != TYPE_BYTES || s->size != size)
        die("%s: the config has a wrong size; export it again", m->path);
    memcpy(&m->file_config, m->map + s->offset, size);
    FileConfig f = m->file_config;
    // Limits far above any model of the family, low enough that no product of two overflows.
    struct { const char *name; uint32_t value, least, most; } checks[] = {
        { "hidden", f.hidden, 1, 1 << 16 },
        { "layers", f.layers, 1, 1 << 12 },
        { "heads", f.heads, 1, 1 << 12 },
        { "kv_heads", f.kv_heads, 1, f.heads },
        { "head_size", f.head_size, 1, MOST_HEAD_SIZE },
        { "rotary_dims", f.rotary_dims, 0, f.head_size },
        { "intermediate", f.intermediate, 1, 1 << 18 },
        { "vocab", f.vocab, 1, 1 << 22 },
        { "context", f.context, 1, 1 << 20 },
        { "parallel_residual", f.parallel_residual, 0, 1 },
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (checks[i].value < checks[i].least || checks[i].value > checks[i].most)
            die("%s: config: %s is %u, expected %u to %u; export the model again", m->path,
                checks[i].name, checks[i].value, checks[i].least, checks[i].most);
    bool sizes_agree = f.hidden == f.heads * f.head_size && f.heads % f.kv_heads == 0 &&
                       f.rotary_dims % 2 == 0;
    if (!sizes_agree || !(f.rotary_base >= 1 && f.rotary_base <= 1e12) ||
        !(f.layer_norm_eps >= 0 && f.layer_norm_eps <= 1))
        die("%s: config: the sizes contradict each other; export the model again", m->path);
    m->c = (Config){
        .hidden = (int)f.hidden, .layers = (int)f.layers, .heads = (int)f.heads,
        .kv_heads = (int)f.kv_heads, .head_size = (int)f.head_size,
        .rotary_dims = (int)f.rotary_dims, .intermediate = (int)f.intermediate,
        .vocab = (int)f.vocab, .context = (int)f.context,
        .parallel_residual = f.parallel_residual, .rotary_base = f.rotary_base,
        .eps = f.layer_norm_eps, .q = (int)(f.heads * f.head_size),
        .kv = (int)(f.kv_heads * f.head_size),
        .qkv = (int)((f.heads + 2 * f.kv_heads) * f.head_size),
        .sharing = (int)(f.heads / f.kv_heads),
    };
}

static void read_tokenizer(Model *m) {
    const Section *s = find_section(m, "tokenizer");
    const char *flaw = tokenizer_open(&m->tokenizer, m->map + s->offset, s->size);
    if (flaw) die("%s: %s; export the model again", m->path, flaw);
    if (m->tokenizer.tokens > (uint32_t)m->c.vocab)
        die("%s: %u tokens but %d rows of weights; export the model again", m->path,
            m->tokenizer.tokens, m->c.vocab);
}

static void check_token(const Model *m, const char *what, uint32_t id) {
    if (id >= (uint32_t)m->c.vocab)
        die("%s: config: the %s token is %u of %d; export the model again", m->path, what, id,
            m->c.vocab);
}

// The tokens that a text begins from and ends with.
static void read_ends(Model *m) {
    FileConfig *f = &m->file_config;
    if (version_of(m) == OLDEST_VERSION) {
        f->start = tokenizer_find_added(&m->tokenizer, "<|start|>");
        f->ends[0] = tokenizer_find_added(&m->tokenizer, "<|end|>");
        f->n_ends = f->ends[0] != TOKENIZER_NONE;
    }
    if (f->normalizer != 0 || f->n_ends > MOST_ENDS)
        die("%s: config: normalizer %u and %u end tokens are not known to this program; a newer "
            "one may know them", m->path, f->normalizer, f->n_ends);
    if (f->start != TOKENIZER_NONE) check_token(m, "start", f->start);
    for (uint32_t i = 0; i < f->n_ends; i++) check_token(m, "end", f->ends[i]);
}

static bool is_end(const Model *m, uint32_t token) {
    for (uint32_t i = 0; i < m->file_config.n_ends; i++)
        if (m->file_config.ends[i] == token) return true;
    return false;
}

static void check_directory(const Model *m) {
    const FileHeader *h = (const FileHeader *)m->map;
    const char *again = "export the model again, or copy it again";
    if (memcmp(h->magic, file_magic, sizeof file_magic) != 0)
        die("%s is not a kl3m model; export_weights.py makes one", m->path);
    if (h->version < OLDEST_VERSION || h->version > FORMAT_VERSION)
        die("%s has version %u of the format, this program reads versions %d to %d: export the "
            "model again", m->path, h->version, OLDEST_VERSION, FORMAT_VERSION);
    if (h->file_size != m->size)
        die("%s has %zu bytes and should have %llu: it was cut or changed; %s", m->path, m->size,
            (unsigned long long)h->file_size, again);
    if (h->sections > (m->size - sizeof *h) / sizeof(Section))
        die("%s: %u sections do not fit in the file; %s", m->path, h->sections, again);
    uint32_t crc = crc32_of(0, m->map, offsetof(FileHeader, directory_crc));
    crc = crc32_of(crc, m->map + sizeof *h, h->sections * sizeof(Section));
    if (crc != h->directory_crc)
        die("%s: the table of sections is damaged; %s", m->path, again);
    const Section *s = (const Section *)(m->map + sizeof *h);
    for (uint32_t i = 0; i < h->sections; i++, s++)
        if (memchr(s->name, 0, sizeof s->name) == NULL || s->offset % SECTION_ALIGNMENT != 0 ||
            s->offset > m->size || s->size > m->size - s->offset)
            die("%s: section %u lies outside the file; %s", m->path, i, again);
}

static void map_file(Model *m) {
    int fd = open(m->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);     // no named pipe holds us up
    struct stat *s = &mapped_file.as_opened;
    if (fd < 0 || fstat(fd, s) != 0)
        die("cannot open the model %s: %s; export_weights.py makes one, and where the program was "
            "built so do `make model` and, small, `make demo`", m->path, strerror(errno));
    if (S_ISDIR(s->st_mode))
        die("%s is a directory, not a model file; make one with: python3 export_weights.py %s",
            m->path, m->path);
    if (!S_ISREG(s->st_mode)) die("%s is not a regular file, so it cannot be mapped", m->path);
    m->size = (size_t)s->st_size;
    if (m->size < sizeof(FileHeader))
        die("%s: %zu bytes are no model; export it again, or copy it again", m->path, m->size);
    void *map = mmap(NULL, m->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) die("cannot map the model %s: %s", m->path, strerror(errno));
#ifdef MADV_HUGEPAGE
    // A file not in memory is then read 2 MB at a time (measured: at the disk's 4 GB/s, else at
    // 1.6), and mapped so if the system can.
    madvise(map, m->size, MADV_HUGEPAGE);
#endif
    m->map = map;
    mapped_file.fd = fd;
    mapped_file.start = map;
}

// Maps and checks a model file. No weight is read: that is for `forward` and --verify.
static Model model_open(const char *path) {
    Model m = { .path = path, .kv_type = TYPE_F32 };
    map_file(&m);
    check_directory(&m);
    const FileHeader *h = (const FileHeader *)m.map;
    m.sections = (const Section *)(m.map + sizeof *h);
    m.n_sections = h->sections;
    read_config(&m);
    read_tokenizer(&m);
    read_ends(&m);
    const Section *about = find_section(&m, "about");
    m.about = (const char *)m.map + about->offset;
    m.about_size = about->size;
    find_tensors(&m);
    if (m.quantized) m.kv_type = TYPE_BF16;
    return m;
}

static void model_close(Model *m) {
    free(m->layers);
    tokenizer_close(&m->tokenizer);
    munmap((void *)(uintptr_t)m->map, m->size);
    close(mapped_file.fd);
    mapped_file.fd = -1;
}

__attribute__((noreturn))
static void die_not_finite(const Model *m) {
    die("%s: the logits are not finite: its weights are damaged or overflow; kl3m --verify checks "
        "the file", m->path);
}

// A section to be written: its offset is found here, its checksum stands in it; and its bytes, or,
// where somebody makes them, from what: into memory that serves until the next are made.
typedef struct {
    Section section;
    const void *data;
    uint64_t alignment;
    const void *(*make)(void *arg, const Section *source);
    void *arg;
    const Section *source;
} Part;

// A model file of these sections, in their order, padded to whole huge pages.
static void write_sections(Writer *out, Part *parts, uint32_t n) {
    uint64_t end = sizeof(FileHeader) + n * sizeof(Section), at = end;
    FileHeader h = { .version = FORMAT_VERSION, .sections = n };
    memcpy(h.magic, file_magic, sizeof file_magic);
    for (Part *p = parts; p < parts + n; p++) {
        p->section.offset = (end + p->alignment - 1) / p->alignment * p->alignment;
        end = p->section.offset + p->section.size;
    }
    h.file_size = (end + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uint32_t directory = crc32_of(0, &h, offsetof(FileHeader, directory_crc));
    for (Part *p = parts; p < parts + n; p++)
        directory = crc32_of(directory, &p->section, sizeof p->section);
    h.directory_crc = directory;
    write_all(out, &h, sizeof h);
    for (Part *p = parts; p < parts + n; p++) write_all(out, &p->section, sizeof p->section);
    for (Part *p = parts; p < parts + n; at = p->section.offset + p->section.size, p++) {
        for (; at < p->section.offset; at++) write_all(out, "", 1);
        write_all(out, p->make ? p->make(p->arg, p->source) : p->data, p->section.size);
    }
    for (; at < h.file_size; at++) write_all(out, "", 1);
}

// ---- 4. Lanes ----
// What differs between kinds of CPU, and all of it: a vector's width, how many rows of sums fit in
// the registers (ROWS x VECTORS accumulators), the fused multiply-add, the splat, and UPPER_HALVES,
// which widens numbers of 16 bits to upper halves of 32 (gcc 12, left to itself, needs five
// instructions where AVX-512 has one). Room 5 is compiled once for each kind by including this file
// again with these set (an editor may grey it out). Compiler vectors do the rest. Which kind runs
// is decided when the program starts; no kind gives other bits, only other speeds. A new kind of
// CPU is a block here and a line in choose_kernels.

// n panels of weights, in pairs: the two of a pair lie `stride` bytes apart, a pair and the one
// behind it `next` bytes.
typedef struct { const char *at; long stride, next; int n; } Panels;

// What is fetched from memory meanwhile; everywhere in this program that is a hint, and no result
// depends on it. As many streams of bytes as a product has panels, which lie as panels do: at each
// step, of one input, `pace` bytes of each; 0: nothing is.
typedef struct { const char *at; long stride, next, pace; } Ahead;

// Rows of a tile, of which so many inputs are multiplied, from a block's first on: floats, or for
// q8 weights QuantGroups, from a group's first on.
typedef struct { const void *at; int rows, inputs; } Factor;

// Where the sums go, and what becomes of those that are there: nothing; the blocks' are added to
// them; or they are what the first chain goes on from.
typedef enum { REPLACE, ADD, CONTINUE } Before;
typedef struct { float *at; Before before; } Sums;

// Structs of more than two words come by address: copies of what was just written made attention's
// and the linear layers' own instructions twice as slow (measured: 16 sequences 1%).
typedef void Product(Factor a, const Panels *w, const Ahead *ahead, Sums c);

// y = norm(x) over n columns.
typedef struct { int n; float eps; const float *weight, *bias; } Norm;

// How finish ends a linear layer: out = gelu(y) or y, y = residual + (c + bias + bias2).
typedef struct {
    const float *bias, *bias2; // [PAIR], or NULL
    const float *residual;     // laid out as out, or NULL
    bool gelu;
    float *out;
    long row_stride, block_stride;     // floats from a row, and a block of 16 columns, to the next
} Finish;

// Columns of one row, from the one numbered `first` on; its blocks of 16 lie `stride` floats apart.
typedef struct { float *at; int first, stride; } Columns;

typedef struct {
    const char *name;
    Product *product[TYPES];
    void (*finish)(int rows, const float *c, const Finish *f);
    void (*layer_norm)(Norm norm, int rows, const float *x, float *y);
    void (*quantize)(int rows, int columns, const float *x, QuantGroup *groups);
    float (*softmax)(int keys, float *scores);
    void (*scale_columns)(int n, float factor, Columns from, Columns to);
    bool (*all_finite)(int n, const float *x);
    void (*maxima)(int n, const float *x, float *most);
    void (*to_halves)(int n, const float *x, uint16_t *y);
    void (*exp_sums)(int n, float largest, const float *x, float *sums);
    const char *(*miscompiled)(void);
} Kernels;

// Named sums, not an array of them: gcc and clang keep an array of vectors in memory unless every
// loop over it is unrolled early enough, which neither promises (measured: clang 14 ran three
// times slower).
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define EACH_QUANT_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define EACH_COUNT(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, KIND)
// Into the second-level cache: the first is full of what is in use.
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)

// Besides, for q8: how many rows and vectors of sums of integers fit in the registers (QROWS x
// QVECTORS), and DOT(sum, w, x), which adds to each lane of 32 bits its two products of 16 bits.
// A lane of weights has four bytes, one for each input of a step: the even ones are those of its
// first two inputs, as numbers of 16 bits. Where PLANES is 1, DOT adds four products of 8 bits
// instead: x = 128 * high + low, two planes of bytes, and the sum of the first is shifted before
// the second's is added.
#define EVEN_BYTES(w) ((w) & 0x00FF00FF)
#define ODD_BYTES(w) ((ivec)((uvec)(w) >> 8) & 0x00FF00FF)
// DOT where no instruction does it.
#define PLAIN_DOT(sum, w, x) \
    ((sum) + ((w) & 0xFFFF) * ((ivec)((uvec)(x) << 16) >> 16) + ((w) >> 16) * ((x) >> 16))

#if defined(__x86_64__)
#define RELAX() _mm_pause()   // tells the core that a loop only waits

// Number i of 16 goes to word 2 i + 1, and 0 to the others. (Measured: 12 rows of bf16 4% faster
// than by widening and shifting.)
#define UPPER_HALVES_512(p) _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, \
    _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 16), \
    _mm512_castsi256_si512(_mm256_loadu_si256(p)))
#define KIND avx512vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,fma")))
#define LANES 16
#define ROWS 12
#define PANELS_AT_ONCE 2
#define FMA(a, b, c) (vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define SPLAT(x) (vec)_mm512_set1_ps(x)
#define UPPER_HALVES(p) UPPER_HALVES_512(p)
#define QROWS 6
#define QVECTORS 2
#define PLANES 0
#define DOT(sum, w, x) (ivec)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x))
#include "kl3m.c"
#undef KIND

#define KIND avx512
#define TARGET __attribute__((target("avx512f,avx512bw,fma")))
#define LANES 16
#define ROWS 12
#define PANELS_AT_ONCE 2
#define FMA(a, b, c) (vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define SPLAT(x) (vec)_mm512_set1_ps(x)
#define UPPER_HALVES(p) UPPER_HALVES_512(p)
#define QROWS 6
#define QVECTORS 2
#define PLANES 0
#define DOT(sum, w, x) ((sum) + (ivec)_mm512_madd_epi16((__m512i)(w), (__m512i)(x)))
#include "kl3m.c"
#undef KIND

#define KIND avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define SPLAT(x) (vec)_mm256_set1_ps(x)
#define UPPER_HALVES(p) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16)
#define QROWS 2
#define QVECTORS 4
#define PLANES 0
#define DOT(sum, w, x) ((sum) + (ivec)_mm256_madd_epi16((__m256i)(w), (__m256i)(x)))
#include "kl3m.c"
#undef KIND

#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#define KIND neondot
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define LANES 4
#define ROWS 6
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#define SPLAT(x) (vec)vdupq_n_f32(x)
#define UPPER_HALVES(p) vshll_n_u16(vld1_u16(p), 16)
#define QROWS 2
#define QVECTORS 4
#define PLANES 1
#define DOT(sum, w, x) (ivec)vdotq_s32((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(x))
#include "kl3m.c"
#undef KIND

#define KIND neon
#define TARGET
#define LANES 4
#define ROWS 6
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#define SPLAT(x) (vec)vdupq_n_f32(x)
#define UPPER_HALVES(p) vshll_n_u16(vld1_u16(p), 16)
#define QROWS 2
#define QVECTORS 4
#define PLANES 0
#define DOT PLAIN_DOT
#include "kl3m.c"
#undef KIND
#else
#define RELAX() ((void)0)
#endif

// For CPUs without a fused multiply-add: the C library's fmaf is exact everywhere, and slow.
#define KIND portable
#define TARGET
#define LANES 4
#define ROWS 2
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec){ fmaf((a)[0], (b)[0], (c)[0]), fmaf((a)[1], (b)[1], (c)[1]), \
                            fmaf((a)[2], (b)[2], (c)[2]), fmaf((a)[3], (b)[3], (c)[3]) }
#define SPLAT(x) (vec){ x, x, x, x }
#define UPPER_HALVES(p) (__builtin_convertvector(*(const NAME(halves) *)(p), uvec) << 16)
#define QROWS 2
#define QVECTORS 4
#define PLANES 0
#define DOT PLAIN_DOT
#include "kl3m.c"
#undef KIND

// Denormal numbers as IEEE 754 has them. They are, unless the program was linked with flags that
// bring start-up code which flushes them to zero (-ffast-math and -funsafe-math-optimizations do).
// Threads inherit it.
static void keep_denormals(void) {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() & ~0x8040u);
#elif defined(__aarch64__)
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" : : "r"(control & ~(1ull << 24)));
#endif
}

#if defined(__aarch64__)
static bool has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return true;                               // each CPU of Apple's that runs macOS
#endif
}
#endif

// The kernels of this name, or with NULL the fastest that this CPU runs; NULL if it has none such.
static const Kernels *choose_kernels(const char *name) {
#if defined(__x86_64__)
    bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#endif
    struct { const Kernels *kernels; bool here; } kinds[] = {
#if defined(__x86_64__)
        { &kernels_avx512vnni, wide && __builtin_cpu_supports("avx512vnni") },
        { &kernels_avx512, wide },
        { &kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") },
#elif defined(__aarch64__)
        { &kernels_neondot, has_dotprod() },
        { &kernels_neon, true },
#endif
        { &kernels_portable, true },
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const Kernels *k = kinds[i].kernels;
        if (kinds[i].here && (name == NULL || strcmp(name, k->name) == 0)) return k;
    }
    return NULL;
}

#endif   // not KIND

#ifdef KIND
// ---- 5. Kernels ----
// Arithmetic over pointers and sizes, compiled once for each kind of CPU. A tile's row r has its
// block b at tile + b * BLOCK_FLOATS + r * BLOCK. Nothing here knows a model, a thread or a
// position.

#define PER_BLOCK (BLOCK / LANES)              // vectors in a block of 16
#define VECTORS (PER_BLOCK * PANELS_AT_ONCE)   // of outputs that `product_rows` computes: 2 or 4
#define INLINE static inline __attribute__((always_inline)) TARGET
typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(uvec) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(pair) __attribute__((may_alias));     // of numbers of 16 bits
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define vec NAME(vec)
#define ivec NAME(ivec)
#define uvec NAME(uvec)
#define LOAD(p) (*(const vec *)(const void *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define SELECT(mask, yes, no) (vec)(((mask) & (ivec)(yes)) | (~(mask) & (ivec)(no)))

// Vector v of the weights that a step multiplies, of VECTORS: those of two panels, `stride` bytes
// apart, or of one. A type other than f32 widens its weights here.
INLINE vec NAME(weights_at)(const Type type, const char *w, long stride, const int v) {
    const char *panel = w + v / PER_BLOCK * stride;
    if (type == TYPE_F32) return LOAD(panel + v % PER_BLOCK * LANES * (int)sizeof(float));
    const void *at = panel + v % PER_BLOCK * LANES * (int)sizeof(uint16_t);
    return (vec)UPPER_HALVES(at);
}

// The place of vector v of row r among the sums.
#define OUT(v, r) (c.at + (v) / PER_BLOCK * BLOCK_FLOATS + (r) * BLOCK + (v) % PER_BLOCK * LANES)

// The registers of product_rows. Row r of the tile has VECTORS sums, and the four weights above
// them are all that a step loads; the macros are its statements for one row.
//
//                    w0    w1    w2    w3       a step: one input's weights for all outputs
//     x = a[r][i]    s_r   t_r   u_r   v_r      each sum += x * the weights above it
#define START(r) \
    vec s##r = {0}, t##r = {0}, u##r = {0}, v##r = {0}; \
    if (r < R && c.before == CONTINUE) { \
        s##r = LOAD(OUT(0, r)), t##r = LOAD(OUT(1, r)); \
        if (VECTORS > 2) u##r = LOAD(OUT(2, r)), v##r = LOAD(OUT(3, r)); \
    }
#define STEP(r) \
    if (r < R) { \
        vec x = SPLAT(in[r * BLOCK + i]); \
        s##r = FMA(x, w0, s##r), t##r = FMA(x, w1, t##r); \
        if (VECTORS > 2) u##r = FMA(x, w2, u##r), v##r = FMA(x, w3, v##r); \
    }
#define FINISH(r) \
    if (r < R && c.before == ADD) { \
        s##r += LOAD(OUT(0, r)), t##r += LOAD(OUT(1, r)); \
        if (VECTORS > 2) u##r += LOAD(OUT(2, r)), v##r += LOAD(OUT(3, r)); \
    } \
    if (r < R) { \
        STORE(OUT(0, r), s##r), STORE(OUT(1, r), t##r); \
        if (VECTORS > 2) STORE(OUT(2, r), u##r), STORE(OUT(3, r), v##r); \
    }

// What a step of a product asks for from memory: a line of each of up to four panels, `pace` bytes
// on with each step.
typedef struct { const char *at[4]; long pace; } NAME(Lines);

// c[r][j] = sum over inputs i of a[r][i] * w[j][i], for R rows (a constant in each copy) and the
// outputs of PANELS_AT_ONCE panels: rule 1's chains, as many at a time as the registers hold.
INLINE void NAME(product_rows)(const Type type, const int R, Factor a, Panels w, NAME(Lines) due,
                               Sums c) {
    const int step = step_bytes(type);
    const float *in = a.at;
    const char *first = due.at[0], *second = due.at[1];
    for (int done = 0; done < a.inputs; c.before = ADD) {
        int end = a.inputs - done < SUM_BLOCK ? a.inputs : done + SUM_BLOCK;
        EACH_ROW(START)
        for (; done < end; done += BLOCK, in += BLOCK_FLOATS) {
            int n = end - done < BLOCK ? end - done : BLOCK;
            for (int i = 0; i < n; i++, w.at += step, first += due.pace, second += due.pace) {
                vec w0 = NAME(weights_at)(type, w.at, w.stride, 0), w2 = w0;
                vec w1 = NAME(weights_at)(type, w.at, w.stride, 1), w3 = w1;
                if (VECTORS > 2) w2 = NAME(weights_at)(type, w.at, w.stride, 2);
                if (VECTORS > 2) w3 = NAME(weights_at)(type, w.at, w.stride, 3);
                PREFETCH(first);
                if (PANELS_AT_ONCE > 1) PREFETCH(second);
                EACH_ROW(STEP)
                (void)w2, (void)w3;
            }
        }
        EACH_ROW(FINISH)
    }
}

// The same for one row, which has few sums: those of four panels, so that the processor need not
// wait for each. The lines that are due are fetched if `fetch`.
INLINE void NAME(product_row)(const Type type, const bool fetch, Factor a, const char *const w[4],
                              NAME(Lines) due, Sums c) {
    const int step = step_bytes(type);
    const float *in = a.at;
    long at = 0, line = 0;
    for (int done = 0; done < a.inputs; c.before = ADD) {
        int end = a.inputs - done < SUM_BLOCK ? a.inputs : done + SUM_BLOCK;
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        if (c.before == CONTINUE) {
            s0 = LOAD(OUT(0, 0)), s1 = LOAD(OUT(1, 0));
            s2 = LOAD(OUT(2, 0)), s3 = LOAD(OUT(3, 0));
        }
        for (; done < end; done += BLOCK, in += BLOCK_FLOATS) {
            int n = end - done < BLOCK ? end - done : BLOCK;
            for (int i = 0; i < n; i++, at += step, line += due.pace) {
                vec x = SPLAT(in[i]);
                if (fetch)
                    for (int panel = 0; panel < 4; panel++) PREFETCH(due.at[panel] + line);
                s0 = FMA(x, NAME(weights_at)(type, w[0] + at, 0, 0), s0);
                s1 = FMA(x, NAME(weights_at)(type, w[1] + at, 0, 0), s1);
                s2 = FMA(x, NAME(weights_at)(type, w[2] + at, 0, 0), s2);
                s3 = FMA(x, NAME(weights_at)(type, w[3] + at, 0, 0), s3);
            }
        }
        if (c.before == ADD) {
            s0 += LOAD(OUT(0, 0)), s1 += LOAD(OUT(1, 0));
            s2 += LOAD(OUT(2, 0)), s3 += LOAD(OUT(3, 0));
        }
        STORE(OUT(0, 0), s0), STORE(OUT(1, 0), s1), STORE(OUT(2, 0), s2), STORE(OUT(3, 0), s3);
    }
}

// A pair of panels for 1 to TILE rows, in parts of ROWS. What is due is fetched during all parts.
INLINE void NAME(product_pair)(const Type type, Factor a, Panels w, Ahead ahead, Sums c) {
    int parts = (a.rows + ROWS - 1) / ROWS;
    long pace = ahead.pace / parts, stride = w.n > 1 ? w.stride : 0;
    w.stride = stride;
    for (int panel = 0; panel < 2; panel += PANELS_AT_ONCE, w.at += stride) {
        const char *due = ahead.at + panel * ahead.stride;
        for (int part = 0; part < parts; part++) {
            int r = part * ROWS;
            long behind = part * a.inputs * pace;
            NAME(Lines) lines = { { due + behind, due + ahead.stride + behind }, pace };
            Factor from = { (const float *)a.at + r * BLOCK, a.rows - r, a.inputs };
            Sums to = { c.at + panel * BLOCK_FLOATS + r * BLOCK, c.before };
            switch (from.rows < ROWS ? from.rows : ROWS) {
#define CASE(n) \
            case n: \
                if (n <= ROWS) NAME(product_rows)(type, n, from, w, lines, to); \
                break;
            EACH_COUNT(CASE)
#undef CASE
            }
        }
    }
}

// The same for any number of panels: a [inputs / 16][12][16], w [panels][inputs][16], c
// [panels][12][16] with room for pairs of them. Meanwhile what is needed next is fetched from
// memory. Four panels at once pay off where one is a single vector (measured: decoding at position
// 3,840 6% faster; with AVX2 nothing).
INLINE void NAME(product)(const Type type, Factor a, Panels w, Ahead ahead, Sums c) {
    bool four = LANES == BLOCK && formats[type].streams == 2 && a.rows == 1;
    for (int pairs; w.n > 0; w.n -= 2 * pairs, c.at += 2 * pairs * BLOCK_FLOATS) {
        pairs = four && w.n > 2 ? 2 : 1;
        if (pairs == 2) {
            const char *third = w.at + w.next, *fourth = w.n > 3 ? third + w.stride : third;
            const char *from[] = { w.at, w.at + w.stride, third, fourth };
            const char *due = ahead.at, *more = due + ahead.stride;
            NAME(Lines) lines = { { due, more, due + ahead.next, more + ahead.next }, ahead.pace };
            if (ahead.pace > 0) NAME(product_row)(type, true, a, from, lines, c);
            else NAME(product_row)(type, false, a, from, lines, c);
        } else NAME(product_pair)(type, a, w, ahead, c);
        w.at += pairs * w.next;
        ahead.at += pairs * ahead.next;
    }
}

static TARGET __attribute__((noinline))
void NAME(product_f32)(Factor a, const Panels *w, const Ahead *ahead, Sums c) {
    NAME(product)(TYPE_F32, a, *w, *ahead, c);
}

static TARGET __attribute__((noinline))
void NAME(product_bf16)(Factor a, const Panels *w, const Ahead *ahead, Sums c) {
    NAME(product)(TYPE_BF16, a, *w, *ahead, c);
}

// The same of q8 weights and QuantGroups. The registers of quant_rows: row r has QVECTORS sums of
// integers and as many of floats, and a step is four inputs, of which a lane of 32 bits has an
// output's bytes, each the weight plus 128.
//
//            w0  w1  w2  w3     a step's weights: first the even bytes, as numbers of 16 bits,
//     x      s_r t_r u_r v_r        times the row's first two inputs; then the odd ones, times
//            S_r T_r U_r V_r        the others
//            e0  e1  e2  e3     behind a group's 16 steps: the outputs' scales; its sums, which are
//            f_r g_r h_r k_r        exact, become floats and are multiplied and added
//
// A sum begins with -128 times the sum of x. Odd bytes have sums of their own (S_r ...) where there
// are registers, so that none need wait for the one before it. The row's scale comes last, once a
// call, and so once for each CHUNK inputs.
#define QUANT_TWICE (R * QVECTORS <= 4 || PLANES)
#define QUANT_BEGIN(r) vec f##r = {0}, g##r = {0}, h##r = {0}, k##r = {0};
#define QUANT_START(r) \
    ivec s##r = {0}, t##r = {0}, u##r = {0}, v##r = {0}, z##r = {0}; \
    ivec S##r = {0}, T##r = {0}, U##r = {0}, V##r = {0}; \
    if (r < R) s##r = t##r = u##r = v##r = z##r + in->start[first + r];
#define QUANT_EVEN(r) \
    if (r < R) { \
        ivec x = z##r + ((const NAME(pair) *)(const void *)in->x[first + r])[2 * step]; \
        s##r = DOT(s##r, w0, x), t##r = DOT(t##r, w1, x); \
        if (QVECTORS > 2) u##r = DOT(u##r, w2, x), v##r = DOT(v##r, w3, x); \
    }
#define QUANT_ODD(r) \
    if (r < R) { \
        ivec x = z##r + ((const NAME(pair) *)(const void *)in->x[first + r])[2 * step + 1]; \
        if (QUANT_TWICE) { \
            S##r = DOT(S##r, w0, x), T##r = DOT(T##r, w1, x); \
            if (QVECTORS > 2) U##r = DOT(U##r, w2, x), V##r = DOT(V##r, w3, x); \
        } else { \
            s##r = DOT(s##r, w0, x), t##r = DOT(t##r, w1, x); \
            if (QVECTORS > 2) u##r = DOT(u##r, w2, x), v##r = DOT(v##r, w3, x); \
        } \
    }
#define QUANT_SUM(s, S) __builtin_convertvector(PLANES ? ((s) << 7) + (S) : (s) + (S), vec)
#define QUANT_FINISH(r) \
    if (r < R) { \
        f##r = FMA(QUANT_SUM(s##r, S##r), e0, f##r), g##r = FMA(QUANT_SUM(t##r, T##r), e1, g##r); \
        if (QVECTORS > 2) { \
            h##r = FMA(QUANT_SUM(u##r, U##r), e2, h##r); \
            k##r = FMA(QUANT_SUM(v##r, V##r), e3, k##r); \
        } \
    }
#define QUANT_PUT(r, sum, vector) \
    if (c.before == ADD) sum = FMA(sum, scale, LOAD(QUANT_OUT(r, vector))); \
    else sum *= scale; \
    STORE(QUANT_OUT(r, vector), sum);
#define QUANT_END(r) \
    if (r < R) { \
        vec scale = SPLAT(groups->scale[first + r]); \
        QUANT_PUT(r, f##r, 0) QUANT_PUT(r, g##r, 1) \
        if (QVECTORS > 2) { QUANT_PUT(r, h##r, 2) QUANT_PUT(r, k##r, 3) } \
    }
// Vector v of what a walk computes of row r, whose first output is `output` of the pair's.
#define QUANT_OUT(r, v) (c.at + (output + (v) * LANES) / BLOCK * BLOCK_FLOATS + \
                         (first + (r)) * BLOCK + (output + (v) * LANES) % BLOCK)

// A step's weights of vector v: the first two inputs', or (odd) the others'; with PLANES all.
INLINE ivec NAME(quant_weights)(const char *w, const int v, const bool odd) {
    ivec bytes = *(const ivec *)(const void *)(w + v * 4 * LANES);
    if (PLANES) return bytes ^ (int32_t)0x80808080;
    return odd ? ODD_BYTES(bytes) : EVEN_BYTES(bytes);
}

INLINE vec NAME(quant_scales)(const char *w, const int v) {
    return NAME(weights_at)(TYPE_BF16, w + v * 2 * LANES, 0, 0);
}

// A walk through n groups of weights, for the rows from `first` of the tile on; what is due is
// fetched meanwhile.
typedef struct { const char *weights, *due; long pace; int n, first; } NAME(Walk);

// R rows (a constant in each copy), and QVECTORS vectors of outputs from `output` of the pair on.
INLINE void NAME(quant_rows)(const int R, const QuantGroup *groups, NAME(Walk) walk,
                             const int output, Sums c) {
    const int scales = PAIR * QUANT_GROUP, first = walk.first;
    const char *w = walk.weights, *due = walk.due, *line = due;
    const long pace = walk.pace;               // bytes a step
    EACH_QUANT_ROW(QUANT_BEGIN)
    for (const QuantGroup *in = groups; in < groups + walk.n; in++, w += step_bytes(TYPE_Q8)) {
        EACH_QUANT_ROW(QUANT_START)
        for (int step = 0; step < QUANT_GROUP / 4; step++) {
            const char *at = w + step * PAIR * 4 + output * 4;
            ivec w0 = NAME(quant_weights)(at, 0, false), w1 = NAME(quant_weights)(at, 1, false);
            ivec w2 = w0, w3 = w1;
            if (QVECTORS > 2) {
                w2 = NAME(quant_weights)(at, 2, false);
                w3 = NAME(quant_weights)(at, 3, false);
            }
            for (due += pace; line < due; line += LINE_BYTES) PREFETCH(line);
            EACH_QUANT_ROW(QUANT_EVEN)
            w0 = NAME(quant_weights)(at, 0, true), w1 = NAME(quant_weights)(at, 1, true);
            if (QVECTORS > 2) {
                w2 = NAME(quant_weights)(at, 2, true);
                w3 = NAME(quant_weights)(at, 3, true);
            }
            EACH_QUANT_ROW(QUANT_ODD)
            (void)w2, (void)w3;
        }
        vec e0 = NAME(quant_scales)(w + scales + output * 2, 0), e2 = e0;
        vec e1 = NAME(quant_scales)(w + scales + output * 2, 1), e3 = e1;
        if (QVECTORS > 2) {
            e2 = NAME(quant_scales)(w + scales + output * 2, 2);
            e3 = NAME(quant_scales)(w + scales + output * 2, 3);
        }
        EACH_QUANT_ROW(QUANT_FINISH)
        (void)e2, (void)e3;
    }
    EACH_QUANT_ROW(QUANT_END)
}

static TARGET __attribute__((noinline))
void NAME(product_q8)(Factor a, const Panels *w, const Ahead *ahead, Sums c) {
    enum { WALKS = PAIR / (QVECTORS * LANES) };        // over the pair
    int parts = (a.rows + QROWS - 1) / QROWS, n = groups_of(a.inputs);
    NAME(Walk) walk = { w->at, ahead->at, 4 * ahead->pace / (parts * WALKS), n, 0 };
    for (int output = 0; output < PAIR; output += QVECTORS * LANES)
        for (int first = 0; first < a.rows; first += QROWS) {
            walk.first = first;
            switch (a.rows - first < QROWS ? a.rows - first : QROWS) {
#define CASE(rows) \
            case rows: \
                if (rows <= QROWS && WALKS == 1) NAME(quant_rows)(rows, a.at, walk, 0, c); \
                else if (rows <= QROWS) NAME(quant_rows)(rows, a.at, walk, output, c); \
                break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
            walk.due += n * (QUANT_GROUP / 4) * walk.pace;
        }
}

// A row's numbers of a group as two planes: of four inputs the first, third, second and fourth's
// high bytes, then their low ones.
INLINE void NAME(split_planes)(int16_t *x) {
    for (int i = 0; i < QUANT_GROUP; i += 4) {
        const int16_t four[] = { x[i], x[i + 2], x[i + 1], x[i + 3] };
        int8_t *to = (int8_t *)(x + i);
        for (int j = 0; j < 4; j++) {
            to[j] = (int8_t)(four[j] >> 7);
            to[j + 4] = (int8_t)(four[j] & 127);
        }
    }
}

// The bits of the largest magnitudes so far and of x's: integers that are in the numbers' order,
// and at least INFINITE_BITS of what is not finite.
INLINE ivec NAME(wider)(ivec widest, vec x) {
    ivec size = (ivec)x & 0x7FFFFFFF, wider = size > widest;
    return (size & wider) | (widest & ~wider);
}

INLINE int32_t NAME(widest_lane)(ivec widest) {
    int32_t most = 0;
    for (int i = 0; i < LANES; i++) most = widest[i] > most ? widest[i] : most;
    return most;
}

// The rows of a tile become integers: groups[columns / QUANT_GROUP, rounded up]. x has its columns
// up to a multiple of PAIR, 0 behind those that there are. A row that holds a number that is
// not finite gets the scale NaN; one whose numbers are next to nothing becomes 0.
static TARGET void NAME(quantize)(int rows, int columns, const float *x, QuantGroup *groups) {
    int blocks = (columns + PAIR - 1) / PAIR * 2, n = groups_of(columns);
    for (int r = 0; r < rows; r++, x += BLOCK) {
        ivec widest = {0};
        for (int b = 0; b < blocks; b++)
            for (int lane = 0; lane < BLOCK; lane += LANES)
                widest = NAME(wider)(widest, LOAD(x + b * BLOCK_FLOATS + lane));
        int32_t most = NAME(widest_lane)(widest);
        float largest, scale = 0, factor = 0;
        memcpy(&largest, &most, sizeof largest);
        if (most >= INFINITE_BITS) scale = NAN;
        else if (largest > 1e-30f) scale = largest / most_quant, factor = most_quant / largest;
        for (int g = 0; g < n; g++) {
            ivec sums = {0};
            int32_t sum = 0;
            for (int i = 0; i < QUANT_GROUP; i += LANES) {
                int b = g * (QUANT_GROUP / BLOCK) + i / BLOCK;
                // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
                const vec round = SPLAT(12582912.0f);
                vec y = {0};
                if (b < blocks && factor > 0)
                    y = LOAD(x + b * BLOCK_FLOATS + i % BLOCK) * SPLAT(factor);
                ivec number = (ivec)(y + round) - (ivec)round;
                sums += number;
                void *to = groups[g].x[r] + i;
                *(NAME(halves) *)to = __builtin_convertvector((uvec)number, NAME(halves));
            }
            for (int i = 0; i < LANES; i++) sum += sums[i];
            groups[g].start[r] = PLANES ? 0 : -128 * sum;
            groups[g].scale[r] = scale;
            if (PLANES) NAME(split_planes)(groups[g].x[r]);
        }
    }
}

// e^x to 1.5 units in the last place for x in [-86, 0], all that is asked for; 0 below, where a
// float loses digits; NaN of NaN. x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite 1980), e^r by
// its Taylor polynomial of degree 7.
INLINE vec NAME(exp_vec)(vec x) {
    // 1.5 * 2^23: adding it leaves the nearest integer in the low bits.
    const vec round = SPLAT(12582912.0f);
    ivec tiny = x < SPLAT(-86.0f);
    x = SELECT(tiny, SPLAT(-86.0f), x);
    vec shifted = FMA(x, SPLAT(1.44269504f), round), n = shifted - round;
    // ln 2 in two parts, the first with 9 bits: n times it is exact.
    vec r = FMA(n, SPLAT(-0.693359375f), x);
    r = FMA(n, SPLAT(2.12194440e-4f), r);
    vec p = SPLAT(1.0f / 5040);
    p = FMA(p, r, SPLAT(1.0f / 720));
    p = FMA(p, r, SPLAT(1.0f / 120));
    p = FMA(p, r, SPLAT(1.0f / 24));
    p = FMA(p, r, SPLAT(1.0f / 6));
    p = FMA(p, r, SPLAT(0.5f));
    p = FMA(p, r, SPLAT(1.0f));
    p = FMA(p, r, SPLAT(1.0f));
    // Times 2^n, which is exact.
    vec power = (vec)((((ivec)shifted - (ivec)round) << 23) + 0x3F800000);
    return (vec)((ivec)(p * power) & ~tiny);
}

// x Phi(x), Phi the normal distribution: the GELU of Hendrycks and Gimpel (2016), not its tanh
// approximation. Phi(-a) = e^-R(a) for a >= 0; R is a minimax polynomial of degree 10 for
// -ln Phi(-a) on [0, 6], weighted so that Phi is within 6e-8 everywhere; it goes on growing beyond.
INLINE vec NAME(gelu_vec)(vec x) {
    vec a = (vec)((ivec)x & 0x7FFFFFFF);
    a = SELECT(a > SPLAT(12.0f), SPLAT(12.0f), a);
    vec r = SPLAT(1.38183269e-08f);
    r = FMA(r, a, SPLAT(-4.40040111e-07f));
    r = FMA(r, a, SPLAT(5.97732151e-06f));
    r = FMA(r, a, SPLAT(-4.38331008e-05f));
    r = FMA(r, a, SPLAT(0.000163617588f));
    r = FMA(r, a, SPLAT(5.93684199e-05f));
    r = FMA(r, a, SPLAT(-0.00488305697f));
    r = FMA(r, a, SPLAT(0.036391899f));
    r = FMA(r, a, SPLAT(0.318294853f));
    r = FMA(r, a, SPLAT(0.797886014f));
    r = FMA(r, a, SPLAT(0.693147182f));
    vec tail = NAME(exp_vec)(-r);
    ivec negative = x < SPLAT(0.0f);
    return x * SELECT(negative, tail, SPLAT(1.0f) - tail);
}

// PAIR columns of some rows of a tile of sums become what a linear layer gives.
static TARGET void NAME(finish)(int rows, const float *c, const Finish *to) {
    const Finish f = *to;
    for (int block = 0; block < 2; block++)
        for (int r = 0; r < rows; r++)
            for (int lane = 0; lane < BLOCK; lane += LANES) {
                long at = block * f.block_stride + r * f.row_stride + lane;
                vec y = LOAD(c + block * BLOCK_FLOATS + r * BLOCK + lane);
                if (f.bias) y += LOAD(f.bias + block * BLOCK + lane);
                if (f.bias2) y += LOAD(f.bias2 + block * BLOCK + lane);
                if (f.residual) y += LOAD(f.residual + at);
                if (f.gelu) y = NAME(gelu_vec)(y);
                STORE(f.out + at, y);
            }
}

// Sixteen partial sums into one, always in this order.
static TARGET float NAME(fold)(float *s) {
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias over the n columns of each row (Ba et al.
// 2016). x and y are tiles; columns from n on, up to a multiple of PAIR, come out as 0.
static TARGET void NAME(layer_norm)(Norm norm, int rows, const float *x, float *y) {
    static const float ones[2 * BLOCK] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    int n = norm.n, blocks = (n + PAIR - 1) / PAIR * 2;
    for (int r = 0; r < rows; r++, x += BLOCK, y += BLOCK) {
        float sum[BLOCK] = {0}, squares[BLOCK] = {0};
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec s = {0};
            for (int b = 0; b < blocks; b++) s += LOAD(x + b * BLOCK_FLOATS + lane);
            STORE(sum + lane, s);
        }
        float mean = NAME(fold)(sum) / (float)n;
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec s = {0};
            for (int b = 0; b < blocks; b++) {
                int left = n - b * BLOCK;
                int skip = left >= BLOCK ? 0 : left > 0 ? BLOCK - left : BLOCK;
                vec d = LOAD(x + b * BLOCK_FLOATS + lane) - SPLAT(mean);
                d *= LOAD(ones + skip + lane);
                STORE(y + b * BLOCK_FLOATS + lane, d);
                s = FMA(d, d, s);
            }
            STORE(squares + lane, s);
        }
        float scale = 1.0f / sqrtf(NAME(fold)(squares) / (float)n + norm.eps);
        for (int b = 0; b < blocks; b++)
            for (int lane = 0; lane < BLOCK; lane += LANES) {
                float *at = y + b * BLOCK_FLOATS + lane;
                vec scaled = LOAD(at) * SPLAT(scale);
                int column = b * BLOCK + lane;
                STORE(at, FMA(scaled, LOAD(norm.weight + column), LOAD(norm.bias + column)));
            }
    }
}

// scores[j] = e^(scores[j] - largest) for one row of a tile, j < keys; the rest of the last block
// becomes 0. Returns the sum.
static TARGET float NAME(softmax)(int keys, float *scores) {
    int blocks = (keys + BLOCK - 1) / BLOCK;
    for (int j = keys; j < blocks * BLOCK; j++)
        scores[j / BLOCK * BLOCK_FLOATS + j % BLOCK] = -INFINITY;
    vec most = SPLAT(-INFINITY);
    for (int b = 0; b < blocks; b++)
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec x = LOAD(scores + b * BLOCK_FLOATS + lane);
            most = SELECT(x > most, x, most);
        }
    float largest = most[0], sum[BLOCK] = {0};
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (int lane = 0; lane < BLOCK; lane += LANES) {
        vec s = {0};
        for (int b = 0; b < blocks; b++) {
            vec e = NAME(exp_vec)(LOAD(scores + b * BLOCK_FLOATS + lane) - SPLAT(largest));
            STORE(scores + b * BLOCK_FLOATS + lane, e);
            s += e;
        }
        STORE(sum + lane, s);
    }
    return NAME(fold)(sum);
}

// n columns of one row times a factor become columns of another.
static TARGET void NAME(scale_columns)(int n, float factor, Columns from, Columns to) {
    for (int i = 0, run; i < n; i += run) {
        int from_skip = (from.first + i) % BLOCK, to_skip = (to.first + i) % BLOCK;
        run = BLOCK - (from_skip > to_skip ? from_skip : to_skip);
        const float *x = from.at + (from.first + i) / BLOCK * from.stride + from_skip;
        float *y = to.at + (to.first + i) / BLOCK * to.stride + to_skip;
        if (run == BLOCK && n - i >= BLOCK)
            for (int lane = 0; lane < BLOCK; lane += LANES)
                STORE(y + lane, SPLAT(factor) * LOAD(x + lane));
        else for (int j = 0; j < run && i + j < n; j++) y[j] = factor * x[j];
    }
}

// Are all of n numbers finite? Told by their bits, so that no flag of a compiler makes it forget.
static TARGET bool NAME(all_finite)(int n, const float *x) {
    ivec widest = {0};
    for (; n >= LANES; n -= LANES, x += LANES) widest = NAME(wider)(widest, LOAD(x));
    int32_t most = NAME(widest_lane)(widest);
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    return most < INFINITE_BITS;
}

// n numbers, a multiple of BLOCK, as room 3's to_bf16 has each.
static TARGET void NAME(to_halves)(int n, const float *x, uint16_t *y) {
    for (int i = 0; i < n; i += LANES) {
        uvec bits = (uvec)LOAD(x + i);
        uvec half = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        uvec none = (uvec)((ivec)(bits & 0x7FFFFFFF) > 0x7F800000);
        half = (half & ~none) | (none & 0x7FC0);
        *(NAME(halves) *)(void *)(y + i) = __builtin_convertvector(half, NAME(halves));
    }
}

// The largest of every 16th of 256 numbers, for all n of them, 256 at a time; -INFINITY of none:
// most[n / 256, rounded up][16].
static TARGET void NAME(maxima)(int n, const float *x, float *most) {
    enum { GROUP_OF = BLOCK * BLOCK };
    for (; n >= GROUP_OF; n -= GROUP_OF, x += GROUP_OF, most += BLOCK)
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec largest = LOAD(x + lane);
            for (int i = lane; i < GROUP_OF; i += BLOCK) {
                vec v = LOAD(x + i);
                largest = SELECT(v > largest, v, largest);
            }
            STORE(most + lane, largest);
        }
    for (int i = 0; n > 0 && i < BLOCK; i++) most[i] = -INFINITY;
    for (int i = 0; i < n; i++)
        if (x[i] > most[i % BLOCK]) most[i % BLOCK] = x[i];
}

// e^(x - largest), summed over every 16th of 256 numbers, for all n of them: sums[n / 256, rounded
// up][16], laid out as maxima's. Sixteen terms at most are summed here, so little is lost.
static TARGET void NAME(exp_sums)(int n, float largest, const float *x, float *sums) {
    enum { GROUP_OF = BLOCK * BLOCK };
    float last[GROUP_OF];
    for (; n > 0; n -= GROUP_OF, x += GROUP_OF, sums += BLOCK) {
        if (n < GROUP_OF) {
            memcpy(last, x, (size_t)n * sizeof *x);
            for (int i = n; i < GROUP_OF; i++) last[i] = -INFINITY;
            x = last;
        }
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec sum = {0};
            for (int i = lane; i < GROUP_OF; i += BLOCK)
                sum += NAME(exp_vec)(LOAD(x + i) - SPLAT(largest));
            STORE(sums + lane, sum);
        }
    }
}

// What is wrong with how this was compiled, or NULL. (1 + 2^-12)^2 is 1 + 2^-11 when it is rounded
// by itself: was it fused with the difference, against rule 2? Are there NaN and infinity (not
// after clang's -fno-honor-nans)?
static TARGET const char *NAME(miscompiled)(void) {
    volatile float factor = 1 + 0x1p-12f, zero = 0;
    float x = factor, none = zero / zero, infinite = 1 / zero;
    if (x * x - (1 + 0x1p-11f) != 0) return "without -ffp-contract=off";
    if (none == none || !(infinite > FLT_MAX)) return "without NaN or infinity";
    return NULL;
}

#define STRING_(x) #x
#define STRING(x) STRING_(x)
static const Kernels NAME(kernels) = {
    .name = STRING(KIND), .finish = NAME(finish), .layer_norm = NAME(layer_norm),
    .product = { [TYPE_F32] = NAME(product_f32), [TYPE_BF16] = NAME(product_bf16),
                 [TYPE_Q8] = NAME(product_q8) },
    .quantize = NAME(quantize),
    .softmax = NAME(softmax), .scale_columns = NAME(scale_columns),
    .all_finite = NAME(all_finite), .maxima = NAME(maxima), .to_halves = NAME(to_halves),
    .exp_sums = NAME(exp_sums),
    .miscompiled = NAME(miscompiled),
};

#undef STRING_
#undef STRING
#undef TARGET
#undef LANES
#undef ROWS
#undef PANELS_AT_ONCE
#undef FMA
#undef SPLAT
#undef UPPER_HALVES
#undef QROWS
#undef QVECTORS
#undef PLANES
#undef DOT
#undef QUANT_TWICE
#undef QUANT_BEGIN
#undef QUANT_START
#undef QUANT_EVEN
#undef QUANT_ODD
#undef QUANT_SUM
#undef QUANT_FINISH
#undef QUANT_PUT
#undef QUANT_END
#undef QUANT_OUT
#undef PER_BLOCK
#undef VECTORS
#undef INLINE
#undef vec
#undef ivec
#undef uvec
#undef LOAD
#undef STORE
#undef SELECT
#undef OUT
#undef START
#undef STEP
#undef FINISH
#endif   // KIND

#ifndef KIND
// In double, of which few are needed, but the same ones everywhere: the rotary tables and the
// sampler. e^x, x <= 0, and ln x, x > 0, by Taylor series after a reduction of the argument, right
// to a few units in the 16th digit.
static double exp_double(double x) {
    if (x < -700) return 0;
    double n = floor(x * 1.4426950408889634 + 0.5), r = x - n * 0.693147180369123816490, sum = 1;
    r -= n * 1.90821492927058770002e-10;       // ln 2 in two parts, the first with 33 bits
    for (int i = 14; i > 0; i--) sum = 1 + sum * r / i;
    return ldexp(sum, (int)n);
}

static double log_double(double x) {
    int exponent;
    double mantissa = frexp(x, &exponent);     // [0.5, 1)
    if (mantissa < 0.70710678118654752) mantissa *= 2, exponent--;
    double s = (mantissa - 1) / (mantissa + 1), sum = 0;   // ln m = 2 artanh s, |s| < 0.172
    for (int i = 25; i > 0; i -= 2) sum = 1.0 / i + sum * s * s;
    return 2 * s * sum + exponent * 0.69314718055994531;
}

typedef struct { float cosine, sine; } Rotation;

// Of an angle, 0 <= angle < 2^20, less the nearest multiple of pi/2, which is subtracted in three
// parts of 33 bits (as in FreeBSD's msun, e_rem_pio2.c).
static Rotation rotation_by(double angle) {
    double n = floor(angle * 0.63661977236758134 + 0.5);
    double r = angle - n * 1.57079632673412561417e+00;
    r -= n * 6.07710050630396597660e-11;
    r -= n * 2.02226624879595063154e-21;
    double sine = 1, cosine = 1;
    for (int i = 18; i > 0; i -= 2) {
        sine = 1 - sine * r * r / (i * (i + 1));
        cosine = 1 - cosine * r * r / (i * (i - 1));
    }
    sine *= r;
    int quadrant = (int)fmod(n, 4);
    double c = quadrant & 1 ? sine : cosine, s = quadrant & 1 ? cosine : sine;
    return (Rotation){ (float)(quadrant == 1 || quadrant == 2 ? -c : c),
                       (float)(quadrant >= 2 ? -s : s) };
}

// ---- 6. Threads ----
// One verb: parallel(pieces, run, arg) calls run(arg, piece, thread) once for each piece and
// returns when all are done. Each thread is dealt pieces that lie side by side, since it walks
// through those fastest, and takes them from the first on; one that has none left takes another's,
// from the last on (work stealing, Blumofe and Leiserson 1999). So fast and slow cores finish
// together, and a worker that comes late, or never because another process has its core, holds up
// nobody unless it is in the middle of a piece. Workers that wait spin for a moment, then sleep.
// The calling thread is thread 0 and works too.

typedef void (*Run)(void *arg, int piece, int thread);

// The pieces first .. end - 1 that are left of a thread's, as end << 32 | first; on a cache line of
// its own.
typedef struct { _Alignas(LINE_BYTES) _Atomic uint64_t pieces; } Range;

static Range only_range;               // the calling thread's, until there are workers

static struct {
    int threads;
    pthread_t *workers;                // [threads - 1]
    Range *ranges;                     // [threads]
    // The job. Only who has taken a piece of it reads it, and it changes only when all its pieces
    // are done: so a worker that was away between its look at a range and a compare-and-swap that
    // succeeds has a piece of the job as it is now.
    _Atomic(Run) run;
    _Atomic(void *) arg;
    atomic_int done;
    atomic_uint round;                 // counts jobs
    atomic_int sleepers;
    atomic_bool over;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {
    .threads = 1, .ranges = &only_range,
    .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
};

// Turns of the waiting loop: some 50 to 100 microseconds, longer than the gap between two steps of
// a pass.
enum { SPINS = 4000 };

static void pause_a_moment(int spins) {
    RELAX();
    if (spins % 256 == 255) sched_yield();     // somebody else may want this core
}

static uint64_t range_of(int first, int end) { return (uint64_t)end << 32 | (uint32_t)first; }

// Takes the first piece of a thread's own range, or the last one of another's. False: nobody has
// any left.
static bool take_piece(int thread, int *piece) {
    for (int i = 0; i < pool.threads;) {
        Range *range = &pool.ranges[(thread + i) % pool.threads];
        uint64_t seen = atomic_load(&range->pieces);
        int first = (int)(uint32_t)seen, end = (int)(seen >> 32);
        if (first == end) {
            i++;
            continue;
        }
        *piece = i == 0 ? first : end - 1;
        uint64_t left = i == 0 ? range_of(first + 1, end) : range_of(first, end - 1);
        if (atomic_compare_exchange_weak(&range->pieces, &seen, left)) return true;
    }
    return false;
}

static void work(int thread) {
    int done = 0;
    for (int piece; take_piece(thread, &piece); done++) {
        Run run = atomic_load(&pool.run);
        run(atomic_load(&pool.arg), piece, thread);
    }
    atomic_fetch_add(&pool.done, done);
}

// Is there no new job since round `seen`?
static bool nothing_new(unsigned seen) {
    return atomic_load(&pool.round) == seen && !atomic_load(&pool.over);
}

static void *worker(void *number) {
    while (!atomic_load(&pool.over)) {
        unsigned seen = atomic_load(&pool.round);
        work((int)(intptr_t)number);
        int spins = 0;
        while (spins < SPINS && nothing_new(seen)) pause_a_moment(spins++);
        if (spins < SPINS) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleepers, 1);
        while (nothing_new(seen)) pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.sleepers, 1);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

static void wake_workers(void) {
    if (atomic_load(&pool.sleepers) == 0) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static void parallel(int pieces, Run run, void *arg) {
    if (pieces == 1) {
        run(arg, 0, 0);
        return;
    }
    atomic_store(&pool.run, run);
    atomic_store(&pool.arg, arg);
    atomic_store(&pool.done, 0);
    for (int i = 0; i < pool.threads; i++) {
        int first = (int)((long)pieces * i / pool.threads);
        int end = (int)((long)pieces * (i + 1) / pool.threads);
        atomic_store(&pool.ranges[i].pieces, range_of(first, end));
    }
    atomic_fetch_add(&pool.round, 1);
    if (pool.threads > 1) wake_workers();
    work(0);
    for (int spins = 0; atomic_load(&pool.done) < pieces; spins++) pause_a_moment(spins);
}

static void threads_start(int threads) {
    enum { STACK = 1 << 20 };                  // musl gives 128 KB; compiled with -O0, a product
                                               // needs 241 KB
    pthread_t *workers = pool.workers = allocate((size_t)threads, sizeof *workers);
    sigset_t stops, before;                    // the main thread's; a SIGBUS is its thread's own
    sigemptyset(&stops);
    for (int i = 0; i < STOP_SIGNALS; i++) sigaddset(&stops, stop_signals[i]);
    pthread_sigmask(SIG_BLOCK, &stops, &before);
    pool.ranges = allocate_raw((size_t)threads, sizeof *pool.ranges, LINE_BYTES);
    for (int i = 0; i < threads; i++) atomic_init(&pool.ranges[i].pieces, 0);
    pool.threads = threads;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    for (int i = 1; i < threads; i++) {
        int error = pthread_create(&workers[i - 1], &attributes, worker, (void *)(intptr_t)i);
        if (error)
            die("cannot start thread %d: %s; a smaller -j needs fewer", i + 1, strerror(error));
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void threads_stop(void) {
    atomic_store(&pool.over, true);
    wake_workers();
    for (int i = 0; i < pool.threads - 1; i++) pthread_join(pool.workers[i], NULL);
    free(pool.workers);
    free(pool.ranges);
    pool.ranges = &only_range;
    pool.threads = 1;
    atomic_store(&pool.over, false);
}

// ---- 7. KV cache ----
// Keys and values of a sequence, in pages of PAGE positions for all layers. Sequences that begin
// alike share pages: a page belongs to all that use it and is copied when one of several users
// wants to write. After kv_reserve the positions asked for may be written. No arithmetic here.

typedef struct Page { struct Page *next; int users; char *bytes; } Page;

typedef struct {
    long page_bytes;           // [layers][kv_heads][head_bytes]
    long pages;                // that there are, in use or spare
    Page *spare;
} KVCache;

typedef struct {
    Page **pages;
    int n_pages;
    int length;                // positions that hold a token
} Sequence;

// Of one head in a page: keys, panels [PAGE positions][head size], then values, panels
// [head size][PAGE positions].
static long key_bytes(const Model *m) { return panels_bytes(m->kv_type, PAGE, m->c.head_size); }
static long value_bytes(const Model *m) { return panels_bytes(m->kv_type, m->c.head_size, PAGE); }
static long head_bytes(const Model *m) { return key_bytes(m) + value_bytes(m); }

static long page_bytes(const Model *m) { return head_bytes(m) * m->c.kv_heads * m->c.layers; }

static KVCache kv_open(const Model *m) { return (KVCache){ .page_bytes = page_bytes(m) }; }

static int pages_for(int positions) { return (positions + PAGE - 1) / PAGE; }

static Page *kv_take_page(KVCache *kv) {
    Page *page = kv->spare;
    if (page) kv->spare = page->next;
    else {
        page = allocate(1, sizeof *page);
        page->bytes = allocate_huge((size_t)kv->page_bytes);
        kv->pages++;
    }
    page->users = 1;
    return page;
}

static void kv_drop_page(KVCache *kv, Page *page) {
    if (--page->users > 0) return;
    page->next = kv->spare;
    kv->spare = page;
}

// Makes positions length .. end - 1 of a sequence writable: pages of its own, the last begun one
// copied if shared.
static void kv_reserve(KVCache *kv, Sequence *s, int end) {
    int need = pages_for(end), first = s->length / PAGE;
    if (need > s->n_pages) {
        size_t room = (size_t)s->n_pages * sizeof *s->pages;
        s->pages = grow(s->pages, &room, (size_t)need * sizeof *s->pages);
        while (s->n_pages < need) s->pages[s->n_pages++] = kv_take_page(kv);
    }
    if (first < need && s->pages[first]->users > 1) {
        Page *own = kv_take_page(kv);
        memcpy(own->bytes, s->pages[first]->bytes, (size_t)kv->page_bytes);
        kv_drop_page(kv, s->pages[first]);
        s->pages[first] = own;
    }
}

// A sequence that begins with the first so many positions of another.
static Sequence kv_fork(const Sequence *from, int length) {
    Sequence s = { .length = length, .n_pages = pages_for(length) };
    s.pages = allocate((size_t)s.n_pages, sizeof *s.pages);
    for (int i = 0; i < s.n_pages; i++) (s.pages[i] = from->pages[i])->users++;
    return s;
}

static void kv_free(KVCache *kv, Sequence *s) {
    for (int i = 0; i < s->n_pages; i++) kv_drop_page(kv, s->pages[i]);
    free(s->pages);
    *s = (Sequence){0};
}

static void kv_close(KVCache *kv) {
    while (kv->spare) {
        Page *page = kv->spare;
        kv->spare = page->next;
        free(page->bytes);
        free(page);
    }
}

// ---- 8. Linear layers ----
// Rows of a pass, and weights times all of them. A row is a token at a position of a sequence;
// prefill, decoding and batches are only different rows of one pass. Rows of one sequence stand
// together, at successive positions. A layer's outputs go through memory pair by pair of panels,
// and the weights that come next are fetched while these are multiplied. (What else is fetched
// ahead: for attention, in room 9; by products for attention, in room 10.)

typedef struct {
    Sequence *sequence;
    int position;
    uint32_t token;
    bool wants_logits;
} Row;

// The work of attention is cut into tiles of up to TILE slots. A slot is a query head of a row; the
// heads that share a kv head stand side by side, so that its keys are read once for all of them.
typedef struct {
    int first_row, first_slot; // slot i: row first_row + (first_slot + i) / sharing
    int slots;
    bool alone;                // it holds all rows that its sequence has in the pass
} Span;

// What linear layers read.
enum { NORMED1, NORMED2, ATTENDED, MLP, FINAL, QUANTIZED };

// One block of memory for the largest pass, and the pass that is run in it.
typedef struct {
    const Model *m;
    const Kernels *kernels;
    double *frequency;         // [rotary_dims / 2] radians a position
    float *x, *normed1, *normed2;      // tiles [rows][hidden]
    float *attended;           // tiles [rows][q]
    float *qkv;                // tiles [rows][q + 2 kv]
    float *mlp;                // tiles [rows][intermediate]
    float *final;              // tiles [logits rows][hidden]
    QuantGroup *quants[QUANTIZED];     // the same as integers, where the model has q8 weights
    float *logits;             // [logits rows][padded vocab] row-major
    Rotation *rotations;       // [rows][rotary_dims / 2]
    Span *spans;
    float **scratch;           // [threads] a thread's query, output and score tiles
    int *logit_rows;           // [logits rows] the row of the pass each belongs to
    const Row *rows;           // [n] the pass: set by forward, as are those below
    int n, n_logits, n_sequences, n_spans, layer;
    bool split;                // a sequence has more rows in the pass than one span holds
} Work;

static long tile_at(int tile, int columns) { return (long)tile * TILE * columns; }

// Row r of a tile, from this column on until its block ends.
static float *cell(float *tile, int r, int column) {
    return tile + (long)(column / BLOCK) * BLOCK_FLOATS + r * BLOCK + column % BLOCK;
}

static int rows_in_tile(int n, int tile) {
    int left = n - tile * TILE;
    return left < TILE ? left : TILE;
}

static int tiles_of(int n) { return (n + TILE - 1) / TILE; }

// One product of a linear layer: in [rows][inputs] times weights [outputs][inputs], plus bias.
typedef struct {
    const void *in;            // tiles of floats, or for q8 weights of QuantGroups
    Matrix weights;
    const float *bias;
} Term;

// A term's rows of a tile, from an input on.
static const void *in_at(const Term *t, int tile, int input) {
    int inputs = t->weights.inputs;
    if (t->weights.type == TYPE_Q8)
        return (const QuantGroup *)t->in + (long)tile * groups_of(inputs) + input / QUANT_GROUP;
    return (const float *)t->in + tile_at(tile, padded(inputs)) + (long)input * TILE;
}

// out = the terms' sum, finished. A second term's blocks are added behind the first's; it is there
// where the attention's and the MLP's last products go into the same x.
typedef struct {
    Term terms[2];
    int n_terms;
    float *out;
    int columns;               // of out, padded; the outputs may be some of them
    const float *residual;     // NULL, or tiles like out
    bool gelu;
    bool row_major;            // out is [rows][columns] instead of tiles
} Linear;

// Layers that may be computed side by side. Pieces that follow one another share their weights.
typedef struct {
    const Kernels *kernels;
    const Linear *layers;
    int rows, groups, pieces;
} LinearJob;

// A piece multiplies GROUP tiles by CHUNK inputs of a pair of panels at a time, and fetches the
// next CHUNK meanwhile: with 1,024 inputs the whole next pair. (Measured, 16 rows: fetching 128
// steps ahead while the first tile was multiplied left memory idle during the second, 40 ms a pass;
// this way 27.) With FEW rows memory alone decides, and the CPU's own prefetching keeps it busier
// (measured: decoding 8% faster). CHUNK is part of q8's arithmetic: another gives other bits.
enum { GROUP = 5, CHUNK = 1024, FEW = 4 };
_Static_assert(CHUNK % SUM_BLOCK == 0 && CHUNK % QUANT_GROUP == 0, "they begin at fixed inputs");

typedef struct {
    const LinearJob *job;
    const Linear *layer;
    int pair, first_tile, tiles;
} LinearPiece;

// Places in memory that are read once a piece is done, to be fetched meanwhile: CHUNK lines of
// each, or as many as there are inputs. A tile can fetch two of them in a chunk, while the first
// tiles fetch the weights.
enum { PLACES = 2 * GROUP };
typedef struct { const char *at[PLACES]; int n; } Due;

static const Due nothing_due = { .n = 0 };

// Of a piece's tiles, those that fetch the next weights if there are other places to fetch.
static int weight_tiles(int tiles) { return (tiles + 3) / 4; }

// The places 2 * pair and 2 * pair + 1.
static Ahead ahead_of_places(const Due *due, int pair) {
    int first = 2 * pair, left = due->n - first;
    if (left <= 0) return (Ahead){ .at = due->at[0] };
    const char *const *at = due->at + first;
    return (Ahead){ at[0], .stride = left > 1 ? at[1] - at[0] : 0, .pace = LINE_BYTES };
}

// What follows on input `from` of a term's pair: its next inputs, the next term's, or the next
// pair's of the first term.
static Ahead ahead_of_weights(const LinearPiece *p, int term, int from) {
    bool within = from < p->layer->terms[term].weights.inputs;
    bool last = term + 1 == p->layer->n_terms;
    const Matrix *w = &p->layer->terms[within ? term : last ? 0 : term + 1].weights;
    int pair = p->pair + (!within && last);
    return (Ahead){ pair_of(w, pair) + (within ? input_bytes(w->type, from) : 0),
                    .stride = panel_stride(w->type, w->inputs) };
}

// A term's products with some tiles, added to their sums.
static void add_term(const LinearPiece *p, int term, const Due *due,
                     float (*sums)[2 * BLOCK_FLOATS]) {
    const Term *t = &p->layer->terms[term];
    const Matrix *w = &t->weights;
    const int step = pace_of(w->type);
    int own = due->n ? weight_tiles(p->tiles) : p->tiles;
    int left = p->job->rows - p->first_tile * TILE, rows = left < own * TILE ? left : own * TILE;
    Panels panels = { .stride = panel_stride(w->type, w->inputs), .n = 2 };
    for (int i = 0; i < w->inputs; i += CHUNK) {
        int n = w->inputs - i < CHUNK ? w->inputs - i : CHUNK;
        panels.at = pair_of(w, p->pair) + input_bytes(w->type, i);
        Ahead ahead = ahead_of_weights(p, term, i + CHUNK);
        for (int tile = 0; tile < p->tiles; tile++) {
            int here = rows_in_tile(p->job->rows, p->first_tile + tile);
            const void *in = in_at(t, p->first_tile + tile, i);
            // Of the bytes of each step a tile fetches its share.
            ahead.pace = rows <= FEW ? 0 : (step * here + rows - 1) / rows;
            Before before = i > 0 || term > 0 ? ADD : REPLACE;
            if (tile >= own)
                ahead = ahead_of_places(due, i / CHUNK * (p->tiles - own) + tile - own);
            p->job->kernels->product[w->type]((Factor){ in, here, n }, &panels, &ahead,
                                              (Sums){ sums[tile], before });
            ahead.at += n * ahead.pace;
        }
    }
}

static int pairs_of(const Linear *l) { return padded(l->terms[0].weights.outputs) / PAIR; }

static int tiles_of_piece(const LinearJob *job, int piece) {
    int left = tiles_of(job->rows) - piece % job->groups * GROUP;
    return left < GROUP ? left : GROUP;
}

// Piece: a pair of panels times a group of tiles.
static void multiply_piece(const LinearJob *job, int piece, const Due *due) {
    LinearPiece p = { job, job->layers, .pair = piece / job->groups,
                      .first_tile = piece % job->groups * GROUP,
                      .tiles = tiles_of_piece(job, piece) };
    for (; p.pair >= pairs_of(p.layer); p.layer++) p.pair -= pairs_of(p.layer);
    const Linear *l = p.layer;

    float sums[GROUP][2 * BLOCK_FLOATS] __attribute__((aligned(LINE_BYTES)));
    for (int i = 0; i < l->n_terms; i++) add_term(&p, i, due, sums);
    const float *bias[2] = { NULL, NULL };
    for (int i = 0; i < l->n_terms; i++)
        if (l->terms[i].bias) bias[i] = l->terms[i].bias + p.pair * PAIR;
    for (int tile = 0; tile < p.tiles; tile++) {
        long at = tile_at(p.first_tile + tile, l->columns) +
                  (long)p.pair * (l->row_major ? PAIR : 2 * BLOCK_FLOATS);
        job->kernels->finish(rows_in_tile(job->rows, p.first_tile + tile), sums[tile], &(Finish){
            .bias = bias[0], .bias2 = bias[1], .gelu = l->gelu, .out = l->out + at,
            .residual = l->residual ? l->residual + at : NULL,
            .row_stride = l->row_major ? l->columns : BLOCK,
            .block_stride = l->row_major ? BLOCK : BLOCK_FLOATS });
    }
}

static void linear_piece(void *arg, int piece, int thread) {
    (void)thread;
    multiply_piece(arg, piece, &nothing_due);
}

static LinearJob linear_job(const Work *w, const Linear *layers, int n_layers, int rows) {
    LinearJob job = { w->kernels, layers, rows, .groups = (tiles_of(rows) + GROUP - 1) / GROUP };
    for (int i = 0; i < n_layers; i++) job.pieces += pairs_of(&layers[i]) * job.groups;
    return job;
}

static void linear(const Work *w, const Linear *layers, int n_layers, int rows) {
    LinearJob job = linear_job(w, layers, n_layers, rows);
    parallel(job.pieces, linear_piece, &job);
}

// A linear layer of one term, whose outputs are columns of tiles.
static Linear linear_of(Term term, float *out, int columns) {
    return (Linear){ .terms = { term }, .n_terms = 1, .out = out, .columns = columns };
}

// Some outputs of such a layer: `from` and `n` multiples of PAIR.
static Linear some_outputs(Linear l, int from, int n) {
    Term *t = &l.terms[0];
    t->weights.at = pair_of(&t->weights, from / PAIR);
    t->weights.outputs = n;
    if (t->bias) t->bias += from;
    l.out += (long)from * TILE;
    return l;
}

// ---- 9. Attention ----
// out = softmax(q k^T / sqrt(head size)) v over positions 0 .. a row's own, in their order, for
// each query head. In: qkv of all rows of the pass; out: `attended`. The unit of work is a kv head
// of a span: its rows' keys and values are stored, then its queries meet those of all positions.

// Some kv heads of all spans: [spans][n] pieces. Of each sequence so many pages are on their way
// already, since the products that stood before them fetched them.
typedef struct { Work *w; int first, n, fetched; } KvHeads;

// One piece: the slots of a span, for one kv head.
typedef struct {
    const Work *w;
    const Span *span;
    Page **pages;
    int head, last;            // the kv head; the last row's position, and so the last to be read
    int common;                // positions that all slots see; later slots see more
    int row[TILE], column[TILE], position[TILE];   // of each slot; column: its query's first
    float *query, *out;        // tiles [TILE][head size]
    float *scores;             // a tile [TILE][positions]
    float sum[TILE];           // of a slot's scores, once they are exponentials
} Slots;

// A row of qkv, as row 0 of a tile.
static float *qkv_row(const Work *w, int row) {
    return w->qkv + tile_at(row / TILE, padded(w->m->c.qkv)) + row % TILE * BLOCK;
}

static char *head_keys(const Work *w, const Page *page, int head) {
    return page->bytes + ((long)w->layer * w->m->c.kv_heads + head) * head_bytes(w->m);
}

static char *head_values(const Work *w, const Page *page, int head) {
    return head_keys(w, page, head) + key_bytes(w->m);
}

// Rotates the first rotary_dims columns of a head of a row of qkv, in place: pairs
// (i, i + rotary_dims / 2) by position * frequency[i] (the half-split form of GPT-NeoX).
static void rotate_head(const Work *w, int row, int first_column) {
    int half = w->m->c.rotary_dims / 2;
    float *qkv = qkv_row(w, row);
    const Rotation *by = w->rotations + row * half;
    for (int i = 0, run; i < half; i += run, by += run) {
        float *a = cell(qkv, 0, first_column + i);
        float *b = cell(qkv, 0, first_column + half + i);
        int in_a = BLOCK - (first_column + i) % BLOCK;
        int in_b = BLOCK - (first_column + half + i) % BLOCK;
        run = in_a < in_b ? in_a : in_b;
        if (run > half - i) run = half - i;
        for (int j = 0; j < run; j++) {
            float x = a[j] * by[j].cosine - b[j] * by[j].sine;
            b[j] = b[j] * by[j].cosine + a[j] * by[j].sine;
            a[j] = x;
        }
    }
}

// A row's kv head as bf16: columns of qkv from `first` on, into halves[head size, padded].
static void round_head(const Work *w, int row, int first, uint16_t *halves) {
    float numbers[MOST_HEAD_SIZE + BLOCK] __attribute__((aligned(LINE_BYTES)));
    int size = w->m->c.head_size;
    memset(numbers + size / BLOCK * BLOCK, 0, BLOCK * sizeof *numbers);
    w->kernels->scale_columns(size, 1, (Columns){ qkv_row(w, row), first, BLOCK_FLOATS },
                              (Columns){ numbers, 0, BLOCK });
    w->kernels->to_halves((size + BLOCK - 1) / BLOCK * BLOCK, numbers, halves);
}

// store_row where keys and values are bf16.
static void store_halves(const Work *w, int row, int head, char *keys, char *values) {
    uint16_t halves[MOST_HEAD_SIZE + BLOCK];
    const Config *c = &w->m->c;
    int size = c->head_size, offset = w->rows[row].position % PAGE;
    uint16_t *key = (uint16_t *)(void *)keys + offset / BLOCK * (long)BLOCK * size + offset % BLOCK;
    round_head(w, row, c->q + head * size, halves);
    for (int i = 0; i < size; i++) key[(long)i * BLOCK] = halves[i];
    round_head(w, row, c->q + c->kv + head * size, halves);
    for (int i = 0; i < size; i += BLOCK)
        memcpy(values + ((long)i * PAGE + offset * BLOCK) * (long)sizeof *halves, halves + i,
               BLOCK * sizeof *halves);
}

// The rotated key and the value of a row's kv head go to their page.
static void store_row(const Work *w, int row, int head) {
    const Config *c = &w->m->c;
    int size = c->head_size, key_column = c->q + head * size;
    int position = w->rows[row].position, offset = position % PAGE;
    const Page *page = w->rows[row].sequence->pages[position / PAGE];
    float *qkv = qkv_row(w, row);
    float *keys = (float *)(void *)head_keys(w, page, head);
    float *values = (float *)(void *)head_values(w, page, head);
    keys += offset / BLOCK * (long)BLOCK * size + offset % BLOCK;
    rotate_head(w, row, key_column);
    if (w->m->kv_type == TYPE_BF16) {
        store_halves(w, row, head, head_keys(w, page, head), head_values(w, page, head));
        return;
    }
    w->kernels->scale_columns(
        size, 1, (Columns){ qkv, key_column + c->kv, BLOCK_FLOATS },
        (Columns){ values + offset * BLOCK, 0, PAGE * BLOCK });
    for (int i = 0, run; i < size; i += run) {
        const float *key = cell(qkv, 0, key_column + i);
        run = BLOCK - (key_column + i) % BLOCK;
        if (run > size - i) run = size - i;
        for (int j = 0; j < run; j++) keys[(long)(i + j) * BLOCK] = key[j];
    }
}

// The same for the rows of a span whose first slot is in it.
static void store_span(const Work *w, const Span *span, int head) {
    int sharing = w->m->c.sharing;
    int row = span->first_row + (span->first_slot + sharing - 1) / sharing;
    int end = span->first_row + (span->first_slot + span->slots + sharing - 1) / sharing;
    for (; row < end; row++) store_row(w, row, head);
}

// Piece: a kv head of a span.
static void store_piece(void *arg, int piece, int thread) {
    (void)thread;
    const KvHeads *heads = arg;
    const Span *span = &heads->w->spans[piece / heads->n];
    if (!span->alone) store_span(heads->w, span, heads->first + piece % heads->n);
}

static void find_slots(Slots *s, const Work *w, const Span *span, int head, int thread) {
    const Config *c = &w->m->c;
    int sharing = c->sharing, size = c->head_size;
    long head_tile = (long)padded(size) * TILE;
    s->w = w, s->span = span, s->head = head;
    s->query = w->scratch[thread];
    s->out = s->query + head_tile;
    s->scores = s->out + head_tile;
    s->pages = w->rows[span->first_row].sequence->pages;
    for (int i = 0; i < span->slots; i++) {
        int slot = span->first_slot + i;
        s->row[i] = span->first_row + slot / sharing;
        s->column[i] = (head * sharing + slot % sharing) * size;
        s->position[i] = w->rows[s->row[i]].position;
    }
    int last_row = span->first_row + (span->first_slot + span->slots - 1) / sharing;
    s->common = w->rows[span->first_row + span->first_slot / sharing].position + 1;
    s->last = w->rows[last_row].position;
}

// Rotated queries over sqrt(head size).
static void load_queries(const Slots *s) {
    const Config *c = &s->w->m->c;
    float scale = 1.0f / sqrtf((float)c->head_size);
    for (int i = 0; i < s->span->slots; i++) {
        rotate_head(s->w, s->row[i], s->column[i]);
        Columns query = { qkv_row(s->w, s->row[i]), s->column[i], BLOCK_FLOATS };
        s->w->kernels->scale_columns(c->head_size, scale, query,
                                     (Columns){ s->query + i * BLOCK, 0, BLOCK_FLOATS });
    }
}

// How many of the first n positions lie in page p: 0 to PAGE.
static int in_page(int n, int p) {
    n -= p * PAGE;
    return n < 0 ? 0 : n < PAGE ? n : PAGE;
}

// What is fetched ahead of attention, all of it. (Measured against page by page, and all that a
// page holds: 48 sequences 0.5 to 2.5% faster up to position 79, 5% at 120 and 220.)
//
// First, of the next piece what its rows have in qkv: another core may have computed it (measured,
// 48 sequences: 1 to 2%).
static void fetch_head(const Work *w, const Span *span, int head) {
    const Config *c = &w->m->c;
    int sharing = c->sharing, size = c->head_size, n = span->slots / sharing;
    struct { int from, columns; } parts[] = {
        { head * sharing * size, sharing * size },
        { c->q + head * size, size },
        { c->q + c->kv + head * size, size },
    };
    for (int row = span->first_row; row < span->first_row + n; row++)
        for (int part = 0; part < 3; part++)
            for (int i = 0; i < parts[part].columns; i += BLOCK)
                __builtin_prefetch(cell(qkv_row(w, row), 0, parts[part].from + i), 1);
}

// Second, while pages p and p + 1 give scores: the next two pages' keys; behind the last of them
// the first two's values.
static Ahead ahead_of_scores(const Slots *s, int p, int fetched) {
    const Work *w = s->w;
    int last_page = s->last / PAGE, next_page = p + 2 <= last_page ? p + 2 : 0;
    bool one_panel = next_page && s->last / BLOCK == 2 * next_page;    // it is the last, half used
    const char *keys = head_keys(w, s->pages[next_page], s->head);
    return (Ahead){
        .at = next_page ? keys : keys + key_bytes(w->m),
        .stride = one_panel ? 0 : panel_stride(w->m->kv_type, w->m->c.head_size),
        .next = next_page < last_page ? head_keys(w, s->pages[next_page + 1], s->head) - keys : 0,
        .pace = next_page < fetched ? 0 : step_bytes(w->m->kv_type),
    };
}

// Third, while page p's values are summed: the next page's values as far as they are used; behind
// the last of them keys of the head that is likely to be this thread's next.
static Ahead ahead_of_values(const Slots *s, int p, int fetched, bool more) {
    const Work *w = s->w;
    int last_page = s->last / PAGE, used = PAGE;
    // Of the next head the first page, or the second if the first is on its way.
    int next_page = fetched == 1 && last_page > 0 ? 1 : 0;
    const char *at = head_keys(w, s->pages[next_page], more ? s->head + 1 : s->head);
    if (p < last_page) {
        next_page = p + 1;
        at = head_values(w, s->pages[next_page], s->head);
        used = in_page(s->last + 1, next_page);
    }
    long pair = pair_bytes(w->m->kv_type, PAGE);
    return (Ahead){ at, .stride = panel_stride(w->m->kv_type, PAGE), .next = pair,
                    .pace = next_page < fetched ? 0 : step_bytes(w->m->kv_type) * used / PAGE };
}

// scores[slot][position] = query . key. A product takes the keys of two pages, of their panels
// those that hold any.
static void score_keys(const Slots *s, int fetched) {
    const Work *w = s->w;
    Type type = w->m->kv_type;
    for (int p = 0; p <= s->last / PAGE; p += 2) {
        int panels = s->last / BLOCK + 1 - 2 * p;
        const char *keys = head_keys(w, s->pages[p], s->head), *next = keys;
        if (p < s->last / PAGE) next = head_keys(w, s->pages[p + 1], s->head);
        Panels two = { keys, .stride = panel_stride(type, w->m->c.head_size), .next = next - keys,
                       .n = panels < 4 ? panels : 4 };
        Ahead ahead = ahead_of_scores(s, p, fetched);
        Sums scores = { s->scores + (long)p * 2 * BLOCK_FLOATS, REPLACE };
        w->kernels->product[type]((Factor){ s->query, s->span->slots, w->m->c.head_size }, &two,
                                  &ahead, scores);
    }
}

// out[slot] = the sum of scores[slot][position] * value. Positions that all slots see are summed
// for all at once; those that only later slots see, slot by slot.
static void sum_values(const Slots *s, int fetched, bool more) {
    const Work *w = s->w;
    Type type = w->m->kv_type;
    long pair = pair_bytes(type, PAGE);
    for (int p = 0; p <= s->last / PAGE; p++) {
        const float *weights = s->scores + (long)p * 2 * BLOCK_FLOATS;
        Ahead ahead = ahead_of_values(s, p, fetched, more);
        Panels values = { head_values(w, s->pages[p], s->head), panel_stride(type, PAGE), pair,
                          padded(w->m->c.head_size) / BLOCK };
        int common = in_page(s->common, p);
        if (common > 0)
            w->kernels->product[type]((Factor){ weights, s->span->slots, common }, &values, &ahead,
                                      (Sums){ s->out, p > 0 ? CONTINUE : REPLACE });
        for (int i = 0; i < s->span->slots && common < PAGE; i++) {
            int end = in_page(s->position[i] + 1, p);
            Panels some = values;
            for (int j = common, n; j < end; j += n) {
                n = BLOCK - j % BLOCK < end - j ? BLOCK - j % BLOCK : end - j;
                some.at = values.at + input_bytes(type, j);
                const float *own = weights + j / BLOCK * BLOCK_FLOATS + i * BLOCK + j % BLOCK;
                w->kernels->product[type]((Factor){ own, 1, n }, &some, &ahead,
                                          (Sums){ s->out + i * BLOCK, CONTINUE });
            }
        }
    }
}

// Piece: a kv head of a span.
static void attention_piece(void *arg, int piece, int thread) {
    const KvHeads *heads = arg;
    const Work *w = heads->w;
    const Span *span = &w->spans[piece / heads->n];
    int head = heads->first + piece % heads->n;
    bool more = piece % heads->n + 1 < heads->n;       // the next piece is the next head
    if (span->alone && more) fetch_head(w, span, head + 1);
    if (span->alone) store_span(w, span, head);        // what is written here is read by this core
    Slots s = {0};
    find_slots(&s, w, span, head, thread);
    load_queries(&s);
    score_keys(&s, heads->fetched);
    for (int i = 0; i < span->slots; i++)
        s.sum[i] = w->kernels->softmax(s.position[i] + 1, s.scores + i * BLOCK);
    sum_values(&s, heads->fetched, more);
    for (int i = 0; i < span->slots; i++) {
        int row = s.row[i];
        float *out = w->attended + tile_at(row / TILE, padded(w->m->c.q)) + row % TILE * BLOCK;
        w->kernels->scale_columns(w->m->c.head_size, 1.0f / s.sum[i],
                                  (Columns){ s.out + i * BLOCK, 0, BLOCK_FLOATS },
                                  (Columns){ out, s.column[i], BLOCK_FLOATS });
    }
}

// Keys and values that more than one piece reads are stored before any reads them.
static void store_split(KvHeads heads) {
    if (heads.w->split) parallel(heads.w->n_spans * heads.n, store_piece, &heads);
}

static void attention(KvHeads heads) {
    store_split(heads);
    parallel(heads.w->n_spans * heads.n, attention_piece, &heads);
}

// Cuts the pass into spans: rows of one sequence, TILE slots at a time.
static void find_spans(Work *w) {
    int sharing = w->m->c.sharing;
    w->n_sequences = w->n_spans = 0;
    w->split = false;
    for (int first = 0, end; first < w->n; first = end) {
        const Sequence *sequence = w->rows[first].sequence;
        for (end = first + 1; end < w->n && w->rows[end].sequence == sequence; end++) {}
        int slots = (end - first) * sharing;
        for (int slot = 0; slot < slots; slot += TILE)
            w->spans[w->n_spans++] = (Span){
                .first_row = first, .first_slot = slot, .alone = slots <= TILE,
                .slots = slots - slot < TILE ? slots - slot : TILE };
        if (slots > TILE) w->split = true;
        w->n_sequences++;
    }
}

// ---- 10. Forward ----
// Rows in, logits out. The layer (parallel residual; without it, norm2 reads x after the attention
// was added):
//
//     x ─┬─ norm1 ─ qkv ─ rotary ─ keys, values ─ attention ─ dense ─┬─ + ─ x
//        ├─ norm2 ─ up ─ GELU ─ down ──────────────────────────────┤
//        └─────────────────────────────────────────────────────────┘
//
// forward cannot fail and allocates nothing.

static Work work_open(const Model *m, const Kernels *kernels, int max_rows, int max_logits) {
    const Config *c = &m->c;
    Work w = { .m = m, .kernels = kernels };
    size_t rows = (size_t)tiles_of(max_rows) * TILE, half = (size_t)c->rotary_dims / 2;
    size_t logit_rows = (size_t)tiles_of(max_logits) * TILE, hidden = (size_t)padded(c->hidden);
    struct { float **field; size_t rows, columns; } table[] = {
        { &w.x, rows, hidden },
        { &w.normed1, rows, hidden },
        { &w.normed2, rows, hidden },
        { &w.attended, rows, (size_t)padded(c->q) },
        { &w.qkv, rows, (size_t)padded(c->qkv) },
        { &w.mlp, rows, (size_t)padded(c->intermediate) },
        { &w.final, logit_rows, hidden },
        { &w.logits, logit_rows, (size_t)padded(c->vocab) },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        *table[i].field = allocate_raw(table[i].rows, table[i].columns * sizeof(float),
                                       LINE_BYTES);
    // What attention does not write is 0 (q8's rows of integers look at it).
    if (c->q % PAIR) memset(w.attended, 0, rows * (size_t)padded(c->q) * sizeof *w.attended);
    const int columns[QUANTIZED] = { c->hidden, c->hidden, c->q, c->intermediate, c->hidden };
    for (int i = 0; i < QUANTIZED && m->quantized; i++)
        w.quants[i] = allocate_raw((i == FINAL ? logit_rows : rows) / TILE,
                                   (size_t)groups_of(columns[i]) * sizeof *w.quants[i], LINE_BYTES);
    size_t spans_a_row = (size_t)c->sharing / TILE + 1;
    w.rotations = allocate_raw(rows, (half + 1) * sizeof *w.rotations, LINE_BYTES);
    w.spans = allocate_raw(rows, spans_a_row * sizeof *w.spans, LINE_BYTES);
    w.logit_rows = allocate(logit_rows, sizeof *w.logit_rows);
    w.frequency = allocate(half + 1, sizeof *w.frequency);
    for (size_t i = 0; i < half; i++)          // base ^ (-2 i / dims), Su et al. 2021
        w.frequency[i] = exp_double(-2.0 * (double)i / c->rotary_dims *
                                    log_double(c->rotary_base));
    w.scratch = allocate((size_t)pool.threads, sizeof *w.scratch);
    size_t score_tile = (size_t)(c->context / PAGE + 1) * PAGE * TILE;
    size_t head_tile = (size_t)padded(c->head_size) * TILE;
    for (int i = 0; i < pool.threads; i++)
        w.scratch[i] = allocate_raw(score_tile + 2 * head_tile, sizeof(float), LINE_BYTES);
    return w;
}

static void work_close(Work *w) {
    void *blocks[] = { w->x, w->normed1, w->normed2, w->attended, w->qkv, w->mlp, w->final,
                       w->logits, w->rotations, w->spans, w->logit_rows, w->frequency };
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) free(blocks[i]);
    for (int i = 0; i < QUANTIZED; i++) free(w->quants[i]);
    for (int i = 0; i < pool.threads; i++) free(w->scratch[i]);
    free(w->scratch);
}

// Numbers i .. i + n - 1 of a row of a table.
static void load_weights(Type type, const char *row, int i, int n, float *to) {
    if (type == TYPE_F32) memcpy(to, row + (long)i * (long)sizeof *to, (size_t)n * sizeof *to);
    for (int j = 0; type == TYPE_BF16 && j < n; j++) {
        uint16_t half;
        memcpy(&half, row + (long)(i + j) * (long)sizeof half, sizeof half);
        to[j] = from_bf16(half);
    }
    if (type != TYPE_Q8) return;
    const char *group = row + row_bytes(type, i / QUANT_GROUP * QUANT_GROUP);
    uint16_t scale;
    memcpy(&scale, group + QUANT_GROUP, sizeof scale);
    for (int j = 0; j < n; j++)
        to[j] = (float)((uint8_t)group[i % QUANT_GROUP + j] - 128) * from_bf16(scale);
}

// A tile of what a linear layer reads, as integers, where the model has q8 weights.
static void quantize_tile(const Work *w, int which, int tile, int rows, const float *x) {
    const Config *c = &w->m->c;
    int columns = which == ATTENDED ? c->q : which == MLP ? c->intermediate : c->hidden;
    if (!w->m->quantized) return;
    w->kernels->quantize(rows, columns, x + tile_at(tile, padded(columns)),
                         w->quants[which] + (long)tile * groups_of(columns));
}

// Piece: a tile's tokens become rows of x, its positions cosines and sines.
static void embed_piece(void *arg, int tile, int thread) {
    (void)thread;
    Work *w = arg;
    const Matrix *table = &w->m->embed_in;
    int hidden = table->inputs, half = w->m->c.rotary_dims / 2;
    float *x = w->x + tile_at(tile, padded(hidden));
    for (int r = 0; r < rows_in_tile(w->n, tile); r++) {
        const Row *row = &w->rows[tile * TILE + r];
        const char *from = table->at + row->token * row_bytes(table->type, hidden);
        for (int i = 0; i < padded(hidden); i += BLOCK) {
            int n = hidden - i < 0 ? 0 : hidden - i < BLOCK ? hidden - i : BLOCK;
            memset(cell(x, r, i), 0, BLOCK * sizeof *x);
            load_weights(table->type, from, i, n, cell(x, r, i));
        }
        for (int i = 0; i < half; i++)
            w->rotations[(tile * TILE + r) * half + i] =
                rotation_by(row->position * w->frequency[i]);
    }
}

static void norm_tile(const Work *w, int tile, const float *weight, const float *bias, float *out) {
    const Config *c = &w->m->c;
    long at = tile_at(tile, padded(c->hidden));
    w->kernels->layer_norm((Norm){ c->hidden, (float)c->eps, weight, bias },
                           rows_in_tile(w->n, tile), w->x + at, out + at);
}

static void norm2_piece(void *arg, int tile, int thread) {
    (void)thread;
    const Work *w = arg;
    const Layer *l = &w->m->layers[w->layer];
    norm_tile(w, tile, l->norm2, l->norm2_bias, w->normed2);
    quantize_tile(w, NORMED2, tile, rows_in_tile(w->n, tile), w->normed2);
}

// Piece: a tile's first norm, and the second too if it reads the same x.
static void norms_piece(void *arg, int tile, int thread) {
    const Work *w = arg;
    const Layer *l = &w->m->layers[w->layer];
    norm_tile(w, tile, l->norm1, l->norm1_bias, w->normed1);
    quantize_tile(w, NORMED1, tile, rows_in_tile(w->n, tile), w->normed1);
    if (w->m->c.parallel_residual) norm2_piece(arg, tile, thread);
}

// Piece: a tile of the rows that want logits, gathered and normed.
static void final_norm_piece(void *arg, int tile, int thread) {
    (void)thread;
    const Work *w = arg;
    const Config *c = &w->m->c;
    float *final = w->final + tile_at(tile, padded(c->hidden));
    int rows = rows_in_tile(w->n_logits, tile);
    for (int r = 0; r < rows; r++) {
        int row = w->logit_rows[tile * TILE + r];
        float *x = w->x + tile_at(row / TILE, padded(c->hidden));
        for (int i = 0; i < padded(c->hidden); i += BLOCK)
            memcpy(cell(final, r, i), cell(x, row % TILE, i), BLOCK * sizeof *x);
    }
    w->kernels->layer_norm((Norm){ c->hidden, (float)c->eps, w->m->norm, w->m->norm_bias }, rows,
                           final, final);
    quantize_tile(w, FINAL, tile, rows, w->final);
}

// Pieces: a tile of what attention, and the MLP's first half, gave.
static void attended_piece(void *arg, int tile, int thread) {
    (void)thread;
    const Work *w = arg;
    quantize_tile(w, ATTENDED, tile, rows_in_tile(w->n, tile), w->attended);
}

static void mlp_piece(void *arg, int tile, int thread) {
    (void)thread;
    const Work *w = arg;
    quantize_tile(w, MLP, tile, rows_in_tile(w->n, tile), w->mlp);
}

static void outputs_piece(void *arg, int tile, int thread) {
    attended_piece(arg, tile, thread);
    mlp_piece(arg, tile, thread);
}

// A step of its own, since a row's largest number must be known; nothing without q8 weights.
static void quantize_step(Work *w, Run piece) {
    if (w->m->quantized) parallel(tiles_of(w->n), piece, w);
}

static Term term_of(const Work *w, int which, const float *x, Matrix weights, const float *bias) {
    const void *in = weights.type == TYPE_Q8 ? (const void *)w->quants[which] : x;
    return (Term){ in, weights, bias };
}

// Attention beside products: those wait for the processor, attention for memory. Each piece of a
// linear layer has its share of attention's pieces, whose keys and values are fetched during the
// products. There is time for a few pages of each sequence, and many sequences at once are mostly
// short; further pages are fetched by attention itself.

typedef struct { LinearJob linear; KvHeads heads; } BesideJob;

// Pages of a sequence's keys and values that are fetched so at most. (Measured, 48 sequences at
// positions 64 to 79: with 3 pages a head's attention takes 4,800 cycles, with 2 5,600.)
enum { PAGES_AHEAD = 3 };

// Of the attention pieces from .. to - 1 as many pages as there is room for, each piece's first
// before any one's second. Returns how many pages of each are on their way.
static int places_of_pages(const KvHeads *heads, int from, int to, int room, int lines, Due *due) {
    const Work *w = heads->w;
    int sharing = w->m->c.sharing;
    for (int page = 0; page < PAGES_AHEAD; page++)
        for (int i = from; i < to; i++) {
            const Span *span = &w->spans[i / heads->n];
            int end = span->first_slot + span->slots - 1;
            const Row *last = &w->rows[span->first_row + end / sharing];
            if (last->position / PAGE < page) continue;
            const char *at = head_keys(w, last->sequence->pages[page], heads->first + i % heads->n);
            const char *before = due->n ? due->at[due->n - 1] : NULL;
            // The place before it may reach over this head too.
            bool covered = before && at > before &&
                           at + head_bytes(w->m) <= before + (long)lines * LINE_BYTES;
            if (covered) continue;
            if (due->n == room) return page;
            due->at[due->n++] = at;
        }
    return PAGES_AHEAD;
}

// Piece: one of a linear layer and its share of attention.
static void beside_piece(void *arg, int piece, int thread) {
    BesideJob *job = arg;
    KvHeads heads = job->heads;
    long attentions = (long)heads.w->n_spans * heads.n;
    int from = (int)(piece * attentions / job->linear.pieces);
    int to = (int)((piece + 1) * attentions / job->linear.pieces);
    int tiles = tiles_of_piece(&job->linear, piece), room = 2 * (tiles - weight_tiles(tiles));
    int inputs = job->linear.layers->terms->weights.inputs;
    Due due = { .n = 0 };
    heads.fetched = places_of_pages(&heads, from, to, room, inputs < CHUNK ? inputs : CHUNK, &due);
    multiply_piece(&job->linear, piece, &due);
    for (int i = from; i < to; i++) attention_piece(&heads, i, thread);
}

static void beside(const Linear *layers, int n_layers, KvHeads heads) {
    BesideJob job = { linear_job(heads.w, layers, n_layers, heads.w->n), heads };
    parallel(job.linear.pieces, beside_piece, &job);
}

// Does it pay off? Only with many sequences; the halves of the heads must share no pair of panels,
// and there must be pieces enough for all threads. Measured against one after the other, on two
// cores: 8 sequences 3% slower, 12 the same, 16 and 20 4 and 5% faster, 48 5 to 13%.
static bool beside_pays_off(const Work *w) {
    const Config *c = &w->m->c;
    int q = c->q / 2, kv = c->kv / 2;
    return c->parallel_residual && w->n_sequences > TILE && c->kv_heads % 2 == 0 &&
           kv % PAIR == 0 && (q + 2 * kv) / PAIR >= 2 * pool.threads;
}

// qkv, attention and the MLP's up-projection in three steps: the first half of the heads is
// computed; beside the second half's products stands attention of the first, beside the
// up-projection that of the second.
static void attention_beside_products(Work *w, const Linear *qkv, const Linear *up) {
    const Config *c = &w->m->c;
    int q = c->q / 2, kv = c->kv / 2, half = c->kv_heads / 2;
    KvHeads heads = { w, .n = 0 };
    for (int part = 0; part < 2; part++) {
        Linear layers[3] = { some_outputs(*qkv, part * q, q),
                             some_outputs(*qkv, c->q + part * kv, kv),
                             some_outputs(*qkv, c->q + c->kv + part * kv, kv) };
        beside(layers, 3, heads);
        heads = (KvHeads){ w, .first = part * half, .n = half };
        store_split(heads);
    }
    beside(up, 1, heads);
}

// One layer: x becomes x + attention(norm1(x)) + mlp(norm2(x)), in the drawing's order.
static void run_layer(Work *w) {
    const Config *c = &w->m->c;
    const Layer *l = &w->m->layers[w->layer];
    int tiles = tiles_of(w->n), hidden = padded(c->hidden);
    Term in_qkv = term_of(w, NORMED1, w->normed1, l->qkv, l->qkv_bias);
    Term in_up = term_of(w, NORMED2, w->normed2, l->up, l->up_bias);
    Term in_dense = term_of(w, ATTENDED, w->attended, l->dense, l->dense_bias);
    Term in_down = term_of(w, MLP, w->mlp, l->down, l->down_bias);
    Linear qkv = linear_of(in_qkv, w->qkv, padded(c->qkv));
    Linear up = linear_of(in_up, w->mlp, padded(c->intermediate));
    Linear dense = linear_of(in_dense, w->x, hidden), down = linear_of(in_down, w->x, hidden);
    up.gelu = true;
    dense.residual = down.residual = w->x;

    parallel(tiles, norms_piece, w);
    if (!c->parallel_residual) {
        linear(w, &qkv, 1, w->n);
        attention((KvHeads){ w, .n = c->kv_heads });
        quantize_step(w, attended_piece);
        linear(w, &dense, 1, w->n);
        parallel(tiles, norm2_piece, w);
        linear(w, &up, 1, w->n);
        quantize_step(w, mlp_piece);
        linear(w, &down, 1, w->n);
        return;
    }
    if (beside_pays_off(w)) attention_beside_products(w, &qkv, &up);
    else {
        linear(w, (Linear[]){ qkv, up }, 2, w->n);
        attention((KvHeads){ w, .n = c->kv_heads });
    }
    quantize_step(w, outputs_piece);
    dense.terms[dense.n_terms++] = down.terms[0];
    linear(w, &dense, 1, w->n);
}

// Runs n rows, 1 <= n <= the most that Work has room for, through the model: writes their keys and
// values, whose pages the caller has reserved, and leaves in w->logits the logits of the rows that
// want them, in the order of the rows.
static void forward(Work *w, const Row *rows, int n) {
    const Config *c = &w->m->c;
    w->rows = rows;
    w->n = n;
    find_spans(w);
    parallel(tiles_of(n), embed_piece, w);
    for (w->layer = 0; w->layer < c->layers; w->layer++) run_layer(w);

    w->n_logits = 0;
    for (int i = 0; i < n; i++)
        if (rows[i].wants_logits) w->logit_rows[w->n_logits++] = i;
    if (w->n_logits == 0) return;
    parallel(tiles_of(w->n_logits), final_norm_piece, w);
    Linear logits = linear_of(term_of(w, FINAL, w->final, w->m->embed_out, NULL), w->logits,
                              padded(c->vocab));
    logits.row_major = true;
    linear(w, &logits, 1, w->n_logits);
}

static const float *logits_of(const Work *w, int i) {
    return w->logits + (long)i * padded(w->m->c.vocab);
}

// ---- 11. Sampling ----
// Logits in, one token out, in the order of transformers' processors: repetition penalty,
// temperature, top-k, top-p, min-p, draw. Ties go to the lower id everywhere. A draw is a function
// of the seed, the prompt's tokens, the number of the continuation and the position, so nothing
// else in work can move it. The logits are only read. A new filter is a step of `distribution`.

typedef struct {
    double temperature, top_p, min_p, penalty;
    long top_k;                // 0: all
} Sampling;

// What a token is chosen from, and the number that chooses.
typedef struct {
    const float *logits;       // [n], finite
    int n;
    const uint32_t *prompt, *drawn;    // [n_prompt], [n_drawn]: what the penalty counts
    int n_prompt, n_drawn;
    const uint64_t *allowed;   // a bit a token, at least one of them set; NULL: any may be drawn
    bool unpenalized;          // the repetition penalty does not count here
    double number;             // in [0, 1)
} Choice;

typedef struct { float logit; uint32_t id; double weight; } Candidate;   // weight: probability
                                                                         // up to a factor

// What one thread needs to sample.
typedef struct {
    const Kernels *kernels;
    Candidate *candidates;     // [vocab]
    float *changed;            // [vocab] logits after the penalty and the mask
    float *maxima;             // of the logits, then the maxima's: see find_maxima
    float *sums;               // of what was exponentiated: see find_ranks
} Sampler;

// Numbers are looked at in groups of 256, and of each group 16 maxima are found.
static int maxima_of(int n) { return (n + BLOCK * BLOCK - 1) / (BLOCK * BLOCK) * BLOCK; }

static Sampler sampler_open(const Kernels *kernels, int vocab) {
    size_t n = (size_t)vocab;
    size_t maxima = (size_t)maxima_of(vocab) + (size_t)maxima_of(maxima_of(vocab));
    return (Sampler){ kernels, allocate_raw(n, sizeof(Candidate), LINE_BYTES),
                      allocate_raw(n, sizeof(float), LINE_BYTES),
                      allocate_raw(maxima, sizeof(float), LINE_BYTES),
                      allocate_raw((size_t)maxima_of(vocab), sizeof(float), LINE_BYTES) };
}

static void sampler_close(Sampler *s) {
    free(s->candidates);
    free(s->changed);
    free(s->maxima);
    free(s->sums);
}

// One look at n logits, so that the rest need not look at each. (Measured: loops over the
// vocabulary, left to the compiler, took 4% of a full batch's time.)
//
//     logits      group 0: ids 0 .. 255          group 1: 256 .. 511       ...      n
//     maxima      16: of ids 0, 16, 32 ...;      16 more                   ...      n / 16
//                 of 1, 17, 33 ...; and so on
//     behind them 16 of the first 256 of these                             ...      n / 256
static void find_maxima(const Sampler *s, const float *logits, int n) {
    s->kernels->maxima(n, logits, s->maxima);
    s->kernels->maxima(maxima_of(n), s->maxima, s->maxima + maxima_of(n));
}

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
// 2011): a bijection of the counter under the key, good enough to be used as a generator without
// state.
static void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c[4] = { counter[0], counter[1], counter[2], counter[3] }, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        uint32_t next[4] = { (uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b,
                             (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a };
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    memcpy(out, c, sizeof c);
}

// A number in [0, 1) of 53 bits: the draw of one position.
static double uniform(uint64_t seed, uint64_t stream, uint32_t continuation, uint32_t position) {
    uint32_t counter[4] = { position, continuation, (uint32_t)stream, (uint32_t)(stream >> 32) };
    uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) }, out[4];
    philox(counter, key, out);
    return (double)(((uint64_t)out[0] << 32 | out[1]) >> 11) * 0x1p-53;
}

// FNV-1a over the ids' bytes, little-endian: prompts with other tokens draw from other streams.
static uint64_t stream_of(const uint32_t *ids, int n) {
    uint64_t h = 14695981039346656037u;
    for (int i = 0; i < n; i++)
        for (int byte = 0; byte < 4; byte++)
            h = (h ^ (ids[i] >> 8 * byte & 255)) * 1099511628211u;
    return h;
}

static bool better(const Candidate *a, const Candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static int by_rank(const void *a, const void *b) {
    return better(a, b) ? -1 : better(b, a);
}

// A candidate joins the k best so far, a heap with the worst at its root, if it is one of them.
// Returns how many there are.
static int offer(Candidate *heap, int size, long k, Candidate new) {
    int i;
    if (size < k) {                            // a leaf more: up from there
        for (i = size++; i > 0 && better(&heap[(i - 1) / 2], &new); i = (i - 1) / 2)
            heap[i] = heap[(i - 1) / 2];
    } else {                                   // instead of the root: down from there
        if (!better(&new, &heap[0])) return size;
        for (i = 0; 2 * i + 1 < size;) {
            int worse = 2 * i + 1;
            if (worse + 1 < size && better(&heap[worse], &heap[worse + 1])) worse++;
            if (!better(&new, &heap[worse])) break;
            heap[i] = heap[worse];
            i = worse;
        }
    }
    heap[i] = new;
    return size;
}

// The k best of n logits, whose maxima are found, into heap[k], best first. k of the maxima's
// maxima reach the k-th best of these, and so do the k best logits: nothing below it need be looked
// at. With k = 50 that leaves some 60 of 32,768.
static int take_top(const float *logits, int n, long k, const float *maxima, Candidate *heap) {
    int count = maxima_of(n), few = maxima_of(count), size = 0;
    float least = -INFINITY;
    if (k <= few) {
        for (int i = 0; i < few; i++)
            size = offer(heap, size, k, (Candidate){ .logit = maxima[count + i] });
        least = heap[0].logit;
        size = 0;
    }
    for (int i = 0; i < count; i++) {
        if (maxima[i] < least) continue;
        int first = i / BLOCK * BLOCK * BLOCK + i % BLOCK;
        for (int id = first; id < first + BLOCK * BLOCK && id < n; id += BLOCK) {
            Candidate candidate = { .logit = logits[id], .id = (uint32_t)id };
            if (logits[id] >= least) size = offer(heap, size, k, candidate);
        }
        if (size == k) least = heap[0].logit;
    }
    qsort(heap, (size_t)size, sizeof *heap, by_rank);
    return size;
}

// transformers' RepetitionPenaltyLogitsProcessor (Keskar et al. 2019): each token that has
// occurred, once.
static void penalize(const float *logits, int n, const uint32_t *ids, int n_ids, double penalty,
                     float *out) {
    for (int i = 0; i < n_ids; i++) {
        if (ids[i] >= (uint32_t)n) continue;
        float x = logits[ids[i]];
        out[ids[i]] = (float)(x < 0 ? x * penalty : x / penalty);
    }
}

// The first of the largest of n logits, whose maxima are found.
static uint32_t argmax(const float *logits, int n, const float *maxima) {
    int count = maxima_of(n), first = 0, id;
    for (int i = 1; i < count; i++)
        if (maxima[i] > maxima[first]) first = i;
    for (id = first / BLOCK * BLOCK * BLOCK; logits[id] != maxima[first]; id++) {}
    return (uint32_t)id;
}

// The nucleus is the shortest list of the likeliest tokens that reaches top_p (Holtzman et al.
// 2020). Tokens each below (1 - top_p) / count of the total cannot be in it: without them the sort
// is short.
static int keep_nucleus(double top_p, Candidate *candidates, int count, bool sorted,
                        double *total) {
    double least = (1 - top_p) * *total / count, before = 0, reach = top_p * *total;
    int kept = 0, n = 0;
    for (int i = 0; i < count; i++)
        if (candidates[i].weight >= least) candidates[kept++] = candidates[i];
    if (!sorted) qsort(candidates, (size_t)kept, sizeof *candidates, by_rank);
    for (; n < kept && (n == 0 || before < reach); n++) before += candidates[n].weight;
    *total = before;
    return n;
}

// Those that have at least this share of the likeliest one's weight, which is 1.
static int keep_likely(double min_p, Candidate *candidates, int count, double *total) {
    int kept = 0;
    *total = 0;
    for (int i = 0; i < count; i++)
        if (candidates[i].weight >= min_p) {
            *total += candidates[i].weight;
            candidates[kept++] = candidates[i];
        }
    return kept;
}

// The tokens that may be drawn, with weights that sum to *total: the distribution that
// transformers would draw from. temperature > 0, the logits' maxima found. Returns how many, in
// sampler->candidates.
static int distribution(const Sampling *s, const float *logits, int n, const Sampler *sampler,
                        double *total) {
    Candidate *candidates = sampler->candidates;
    bool all = s->top_k == 0 || s->top_k >= n;
    int count = n;
    if (!all) count = take_top(logits, n, s->top_k, sampler->maxima, candidates);
    else for (int i = 0; i < n; i++)
        candidates[i] = (Candidate){ .logit = logits[i], .id = (uint32_t)i };
    double largest = all ? logits[argmax(logits, n, sampler->maxima)] : candidates[0].logit;
    *total = 0;
    for (int i = 0; i < count; i++) {
        candidates[i].weight = exp_double((candidates[i].logit - largest) / s->temperature);
        *total += candidates[i].weight;
    }
    if (s->top_p < 1) count = keep_nucleus(s->top_p, candidates, count, !all, total);
    if (s->min_p > 0) count = keep_likely(s->min_p, candidates, count, total);
    return count;
}

// The logits that the filters see: after the penalty, -infinity where a token is not allowed.
// NULL: the penalty makes them overflow.
static const float *logits_to_filter(const Sampling *s, const Choice *c, const Sampler *sampler) {
    float *changed = sampler->changed;
    bool penalized = s->penalty != 1 && !c->unpenalized;
    if (!penalized && c->allowed == NULL) return c->logits;
    memcpy(changed, c->logits, (size_t)c->n * sizeof *changed);
    if (penalized) {
        penalize(c->logits, c->n, c->prompt, c->n_prompt, s->penalty, changed);
        penalize(c->logits, c->n, c->drawn, c->n_drawn, s->penalty, changed);
        if (!sampler->kernels->all_finite(c->n, changed)) return NULL;
    }
    for (int i = 0; c->allowed && i < c->n; i++)
        if (!(c->allowed[i / 64] >> i % 64 & 1)) changed[i] = -INFINITY;
    return changed;
}

// One token, or TOKENIZER_NONE: the penalty makes the logits overflow.
static uint32_t sample(const Sampling *s, const Choice *c, const Sampler *sampler) {
    const float *logits = logits_to_filter(s, c, sampler);
    if (logits == NULL) return TOKENIZER_NONE;
    find_maxima(sampler, logits, c->n);
    if (s->temperature == 0) return argmax(logits, c->n, sampler->maxima);
    double total;
    int count = distribution(s, logits, c->n, sampler, &total), drawn_at = 0;
    double target = c->number * total;
    // Rounding may leave a rest: then it is the last that has a weight.
    for (int i = 0; i < count && target >= 0; i++) {
        if (sampler->candidates[i].weight > 0) drawn_at = i;
        target -= sampler->candidates[i].weight;
    }
    return sampler->candidates[drawn_at].id;
}

// A token and its log-probability, natural, in the model's own distribution: before penalty,
// temperature and filters.
typedef struct { uint32_t id; double logprob; } Ranked;

// ln softmax of n finite logits: found[0] is the token's, found[1 .. likeliest] are the likeliest
// ones in their order (where there are no more, their id is TOKENIZER_NONE). The sum of the
// exponentials has one order: 16 at a time in float, these sums in double. Within 1e-6 of the
// exact ln softmax.
static void find_ranks(const Sampler *s, const float *logits, int n, uint32_t token, int likeliest,
                       Ranked *found) {
    find_maxima(s, logits, n);
    int count = take_top(logits, n, likeliest < n ? likeliest : n, s->maxima, s->candidates);
    float largest = s->candidates[0].logit;
    s->kernels->exp_sums(n, largest, logits, s->sums);
    double total = 0;
    for (int i = 0; i < maxima_of(n); i++) total += s->sums[i];
    double zero = largest + log_double(total);         // the logit whose probability is 1
    found[0] = (Ranked){ token, logits[token] - zero };
    for (int i = 0; i < likeliest; i++) {
        found[1 + i] = (Ranked){ .id = TOKENIZER_NONE };
        if (i < count) found[1 + i] = (Ranked){ s->candidates[i].id,
                                                s->candidates[i].logit - zero };
    }
}

// e to the mean of -ln p over tokens: as if each had been one of so many, all equally likely. NAN
// of none.
static double perplexity(double logprob, long tokens) {
    return tokens ? 1 / exp_double(logprob / (double)tokens) : NAN;
}

// ---- 12. Guesses ----
// At the next tokens, from ids alone. For the last 0 to ORDER tokens a table holds which tokens
// followed them most often, in the prompts and in all that was drawn; the model's file may bring
// one to begin with. A guess becomes a row of the pass behind the rows that it follows from, and is
// kept if the sampler draws it there: it may be wrong, or come from a hostile file, but it cannot
// change a text.

// Measured on 97,000 tokens of licences, at most 11 guesses, 2% of a pass for each: 2.24 tokens in
// a pass's time with ORDER 5 and MOST_SEEN 255, 2.32 with 5 and 31, 2.42 with 8 and 15. What was
// said last is what will be said next.
enum {
    ORDER = 8, FOLLOWERS = 2, WAYS = 4, CONTEXTS = 1 << 19, MOST_SEEN = 15, CLASSES = 16,
    MOST_TRIES = 128,
};

// What followed one context; in the model's file it is the same. Four are a cache line.
typedef struct {
    uint32_t check;                    // other bits of the context's hash
    uint8_t seen;                      // how often, of late; 0: the place is free
    uint8_t count[FOLLOWERS], zero;    // of the commonest followers, falling
    uint32_t next[FOLLOWERS];
} Context;
_Static_assert(sizeof(Context) == 16, "as on disk");

enum { TABLE_BYTES = CONTEXTS * sizeof(Context) };

typedef struct { uint32_t ids[ORDER]; int n; } Tail;   // a text's last tokens, the newest first

typedef struct {
    Context *table;                    // [CONTEXTS], WAYS places for each value of the hash
    bool owned;                        // else it lies in the model's file
    // How often guesses came true, by how likely the table thought them: it is not trusted.
    double hits[CLASSES], tries[CLASSES];
} Guesses;

typedef struct { uint32_t token; double chance; } Guess;

static void push(Tail *t, uint32_t token) {
    memmove(t->ids + 1, t->ids, (ORDER - 1) * sizeof *t->ids);
    t->ids[0] = token;
    if (t->n < ORDER) t->n++;
}

// The places of a tail's last 0 to ORDER tokens. One that is not there is made, in place of what
// was seen least, or is NULL.
static void find_contexts(const Guesses *g, const Tail *t, bool make, Context *found[ORDER + 1]) {
    uint64_t hash = 0;
    for (int order = 0; order <= ORDER; order++) {
        found[order] = NULL;
        if (order > t->n) continue;
        if (order > 0) hash = (hash ^ (t->ids[order - 1] + 1)) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
        Context *set = g->table + (hash & (CONTEXTS / WAYS - 1)) * WAYS, *least = set;
        uint32_t check = (uint32_t)(hash >> 32);
        for (Context *c = set; c < set + WAYS && !found[order]; c++) {
            if (c->seen && c->check == check) found[order] = c;
            if (c->seen < least->seen) least = c;
        }
        if (found[order] || !make) continue;
        *least = (Context){ .check = check };
        found[order] = least;
    }
}

// One token more has followed a context. One that is not among its followers takes a step of the
// last one's away, and then its place (Misra and Gries, "Finding repeated elements", 1982).
static void add_follower(Context *c, uint32_t token) {
    if (c->seen >= MOST_SEEN) {
        c->seen /= 2;
        for (int i = 0; i < FOLLOWERS; i++) c->count[i] /= 2;
    }
    c->seen++;
    int i = 0;
    while (i < FOLLOWERS - 1 && c->count[i] && c->next[i] != token) i++;
    if (c->count[i] && c->next[i] != token) {
        c->count[i]--;
        return;
    }
    c->next[i] = token;
    c->count[i]++;
    for (; i > 0 && c->count[i] > c->count[i - 1]; i--) {
        uint8_t count = c->count[i];
        c->count[i] = c->count[i - 1], c->count[i - 1] = count;
        c->next[i] = c->next[i - 1], c->next[i - 1] = token;
    }
}

// A text has grown by a token.
static void learn(const Guesses *g, Tail *t, uint32_t token) {
    Context *found[ORDER + 1];
    find_contexts(g, t, true, found);
    for (int order = 0; order <= ORDER && found[order]; order++)
        add_follower(found[order], token);
    push(t, token);
}

// How likely a token is to follow: what was seen after a longer context counts for as many tokens
// as were seen there, what a shorter one says for one more (as in Dirichlet smoothing; MacKay and
// Peto 1995).
static double chance_of(Context *const found[ORDER + 1], uint32_t token) {
    double p = 0;
    for (int order = 0; order <= ORDER; order++) {
        const Context *c = found[order];
        if (c == NULL) continue;
        int count = 0;
        for (int i = 0; i < FOLLOWERS; i++)
            if (c->count[i] && c->next[i] == token) count = c->count[i];
        p = (count + p) / (c->seen + 1);
    }
    return p;
}

// The token that is likeliest to follow, and how likely the table thinks it; chance 0: none is.
static Guess likeliest(const Guesses *g, const Tail *t) {
    Context *found[ORDER + 1];
    Guess best = {0};
    find_contexts(g, t, false, found);
    for (int from = ORDER; from >= 0; from--)
        for (int i = 0; i < FOLLOWERS && found[from] && found[from]->count[i]; i++) {
            uint32_t token = found[from]->next[i];
            double chance = chance_of(found, token);
            if (chance > best.chance) best = (Guess){ token, chance };
        }
    return best;
}

static int class_of(double p) { return p < 1 ? (int)(p * (double)CLASSES) : CLASSES - 1; }

// A guess at the next token, with the probability that it comes true, 0 if there is none.
static Guess propose(const Guesses *g, const Tail *t) {
    Guess guess = likeliest(g, t);
    int class = class_of(guess.chance);
    if (guess.chance > 0) guess.chance = g->hits[class] / g->tries[class];
    return guess;
}

// A token was drawn: what would have been guessed is held against it, whether or not it was. The
// last MOST_TRIES or so of a class count.
static void judge(Guesses *g, const Tail *t, uint32_t token) {
    Guess guess = likeliest(g, t);
    if (guess.chance == 0) return;
    int class = class_of(guess.chance);
    g->hits[class] += guess.token == token;
    if (++g->tries[class] < (double)MOST_TRIES) return;
    g->hits[class] /= 2;
    g->tries[class] /= 2;
}

// The table of the model's file, made writable in this process's memory; NULL: it brings none.
static Context *table_in_file(const Model *m) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const Section *s = seek_section(m, "guesses");
    if (s == NULL) return NULL;
    if (s->type != TYPE_BYTES || s->size != TABLE_BYTES)
        die("%s: the table of guesses has %llu bytes, expected %d; make it again with --learn, or "
            "run without it: --no-speculation", m->path, (unsigned long long)s->size, TABLE_BYTES);
    bool apart = s->offset >= sizeof(FileHeader) + m->n_sections * sizeof *s;
    for (const Section *o = m->sections; o < m->sections + m->n_sections; o++)
        apart &= o == s || o->offset >= s->offset + TABLE_BYTES || o->offset + o->size <= s->offset;
    if (!apart)
        die("%s: the table of guesses lies over other sections; export the model again, or run "
            "without the table: --no-speculation", m->path);
    uintptr_t start = (uintptr_t)(m->map + s->offset), first = start / page * page;
    if (mprotect((void *)first, start - first + TABLE_BYTES, PROT_READ | PROT_WRITE) != 0)
        die("%s: cannot use its table of guesses: %s; --no-speculation runs without it", m->path,
            strerror(errno));
    return (Context *)start;
}

// With the table of the model's file, if it brings one; with an empty one if not, or if m is NULL.
static Guesses guesses_open(const Model *m) {
    Guesses g = { .table = m ? table_in_file(m) : NULL };
    if (g.table == NULL) g = (Guesses){ .table = allocate_lazily(TABLE_BYTES), .owned = true };
    for (int class = 0; class < CLASSES; class++) {    // until more is known, the table is believed
        g.tries[class] = (double)MOST_TRIES / 64;
        g.hits[class] = g.tries[class] * (class + 0.5) / (double)CLASSES;
    }
    return g;
}

static void guesses_close(Guesses *g) {
    if (g->owned) munmap(g->table, TABLE_BYTES);
}

// ---- 13. Patterns ----
// A regular expression (ECMA-262 with the u flag) becomes an automaton over characters: read into a
// tree, written out as states that eat a character or step on for nothing (Thompson, "Regular
// expression search algorithm", 1968), and these, in sets, become the automaton's (Rabin and Scott,
// "Finite automata and their decision problems", 1959). Lengths are counted beside it, so that
// maxLength 100,000 costs nothing. Where ECMA-262 and Python differ on a class, what both accept
// belongs to it. Everything here is taken from an Arena and goes with it.

// Characters: spans of code points, in order and apart once charset_close has seen them.
typedef struct { uint32_t first, last; } Interval;
typedef struct { Interval *spans; int n, room; } Charset;

enum {
    MOST_CODE = 0x10FFFF, FIRST_SURROGATE = 0xD800, LAST_SURROGATE = 0xDFFF,
    MOST_REPEATS = 1 << 20,        // in {n,m}; the states have their own limit
    MOST_GROUPS = 200,             // one in another
    MOST_NFA = 4096,               // states of a pattern that eat or step
    MOST_STATES = 32768,           // of an automaton
    MOST_CLASSES = 4096,           // of characters that an automaton tells apart
    MOST_ARROWS = 1 << 22,         // states times classes
    MOST_PATTERN = 1 << 16,        // bytes
    MOST_SPANS = 1 << 16,          // of a class as it is written
    MOST_NEEDS = 1 << 21,          // cells of all tables of lengths and counts
    BEYOND = 1 << 30,              // a cost that nothing has, and of two such the sum
};

static uint32_t plus(uint32_t a, uint32_t b) { return a + b < BEYOND ? a + b : BEYOND; }
static uint32_t lesser(uint32_t a, uint32_t b) { return a < b ? a : b; }

static void charset_add(Arena *a, Charset *s, uint32_t first, uint32_t last) {
    if (s->n == s->room) {
        int room = s->room ? 2 * s->room : 4;
        Interval *more = take(a, (size_t)room * sizeof *more);
        if (s->n) memcpy(more, s->spans, (size_t)s->n * sizeof *more);
        s->spans = more, s->room = room;
    }
    s->spans[s->n++] = (Interval){ first, last };
}

static void charset_join(Arena *a, Charset *s, const Charset *other) {
    for (int i = 0; i < other->n; i++)
        charset_add(a, s, other->spans[i].first, other->spans[i].last);
}

static int by_first(const void *a, const void *b) {
    const Interval *x = a, *y = b;
    return x->first != y->first ? (x->first < y->first ? -1 : 1) : 0;
}

// Puts a set in order. Surrogates are no characters, and go.
static void charset_close(Arena *a, Charset *s) {
    Charset closed = {0};
    if (s->n) qsort(s->spans, (size_t)s->n, sizeof *s->spans, by_first);
    for (int i = 0, k = 0; i < s->n; i = k) {
        uint32_t first = s->spans[i].first, last = s->spans[i].last;
        for (k = i + 1; k < s->n && s->spans[k].first <= last + 1; k++)
            if (s->spans[k].last > last) last = s->spans[k].last;
        if (first < FIRST_SURROGATE)
            charset_add(a, &closed, first, last < FIRST_SURROGATE ? last : FIRST_SURROGATE - 1);
        if (last > LAST_SURROGATE)
            charset_add(a, &closed, first > LAST_SURROGATE ? first : LAST_SURROGATE + 1, last);
    }
    *s = closed;
}

// All characters that are not in s.
static Charset charset_others(Arena *a, Charset s) {
    Charset all = {0}, others = {0};
    charset_join(a, &all, &s);
    charset_close(a, &all);
    uint32_t from = 0;
    for (int i = 0; i < all.n; i++) {
        if (all.spans[i].first > from) charset_add(a, &others, from, all.spans[i].first - 1);
        from = all.spans[i].last + 1;
    }
    if (from <= MOST_CODE) charset_add(a, &others, from, MOST_CODE);
    charset_close(a, &others);
    return others;
}

// A class as two readers understand it: what both take for a member, and what either does.
typedef struct { Charset both, either; } Class;

static void class_add(Arena *a, Class *c, uint32_t first, uint32_t last) {
    charset_add(a, &c->both, first, last);
    charset_add(a, &c->either, first, last);
}

static Class class_others(Arena *a, const Class *c) {
    return (Class){ charset_others(a, c->either), charset_others(a, c->both) };
}

// A class, or all that is not in it, becomes part of another one.
static void class_join(Arena *a, Class *c, Class found, bool others) {
    if (others) found = class_others(a, &found);
    charset_join(a, &c->both, &found.both);
    charset_join(a, &c->either, &found.either);
}

// Letters (1) or numbers (2) of Unicode, as the tokenizer's tables have them.
static void add_unicode(Arena *a, Charset *s, int kind) {
    for (uint32_t code = 0, next; code <= MOST_CODE; code = next)
        if (unicode_class(code, &next) == kind) charset_add(a, s, code, next - 1);
}

// \d \w \s and their opposites \D \W \S: ECMA-262's digits and words are ASCII, Python's are
// Unicode's; of white space each knows some that the other does not.
static bool class_named(Arena *a, char name, Class *c) {
    static const Interval digits[] = { { '0', '9' } };
    static const Interval word[] = { { '0', '9' }, { 'A', 'Z' }, { '_', '_' }, { 'a', 'z' } };
    static const Interval spaces[] = { { 9, 13 }, { 32, 32 }, { 0xA0, 0xA0 }, { 0x1680, 0x1680 },
                                   { 0x2000, 0x200A }, { 0x2028, 0x2029 }, { 0x202F, 0x202F },
                                   { 0x205F, 0x205F }, { 0x3000, 0x3000 } };
    static const Interval more_spaces[] = { { 0x1C, 0x1F }, { 0x85, 0x85 }, { 0xFEFF, 0xFEFF } };
    static const struct { char name; const Interval *spans; size_t n; } names[] = {
        { 'd', digits, 1 }, { 'w', word, 4 }, { 's', spaces, 9 },
    };
    Class found = {0};
    size_t i = 0;
    while (i < 3 && names[i].name != tolower((unsigned char)name)) i++;
    if (i == 3) return false;
    for (const Interval *s = names[i].spans; s < names[i].spans + names[i].n; s++)
        class_add(a, &found, s->first, s->last);
    if (names[i].name != 's') add_unicode(a, &found.either, 2);
    if (names[i].name == 'w') add_unicode(a, &found.either, 1);
    for (size_t k = 0; names[i].name == 's' && k < 3; k++)
        charset_add(a, &found.either, more_spaces[k].first, more_spaces[k].last);
    class_join(a, c, found, isupper((unsigned char)name));
    return true;
}

static const char nothing_matches[] = "nothing matches it";
static const char many_cells[] = "lengths and counts, times the states and members that they are "
                                 "kept for, need more than 2097152 cells";
static const char many_states[] = "it makes too large an automaton: more than 4096 classes of "
                                  "characters, 32768 states, or 4194304 arrows";

typedef struct Regex Regex;
struct Regex {
    enum { NOTHING, ONE_OF, BEHIND, EITHER, REPEATED, AT_START, AT_END } kind;
    Charset set;                   // ONE_OF
    const Regex *a, *b;            // a behind which b stands; either of them; what is repeated
    uint32_t least, most;          // times; most BEYOND: any number
};

typedef struct {
    Arena *arena;
    const char *at, *end;
    int groups;                    // open ones
    const char *flaw;              // or NULL
} RegexReader;

static const Regex *regex_fail(RegexReader *r, const char *flaw) {
    static const Regex nothing = { .kind = NOTHING };
    if (r->flaw == NULL) r->flaw = flaw;
    r->at = r->end;
    return &nothing;
}

static const Regex *regex_node(RegexReader *r, Regex node) {
    Regex *made = take(r->arena, sizeof *made);
    *made = node;
    return made;
}

static bool regex_take(RegexReader *r, const char *text) {
    size_t n = strlen(text);
    if ((size_t)(r->end - r->at) < n || memcmp(r->at, text, n) != 0) return false;
    r->at += n;
    return true;
}

// Does one of these characters stand at `at`?
static bool regex_sees(const RegexReader *r, const char *characters) {
    return r->at < r->end && *r->at && strchr(characters, *r->at);
}

static uint32_t regex_char(RegexReader *r) {
    uint32_t code;
    r->at += utf8_char(r->at, (size_t)(r->end - r->at), &code);
    if (code == UINT32_MAX) regex_fail(r, "it is not UTF-8");
    return code;
}

// So many hexadecimal digits, at `at`.
static uint32_t regex_hex(RegexReader *r, size_t digits) {
    long code = hex(r->at, (size_t)(r->end - r->at), digits);
    if (code < 0) return regex_fail(r, "an escape lacks hexadecimal digits"), 0;
    r->at += digits;
    return (uint32_t)code;
}

// What stands behind "\u": HHHH, a pair of them, or {H...}.
static uint32_t regex_unicode(RegexReader *r) {
    uint32_t code = 0;
    if (regex_take(r, "{")) {
        while (r->at < r->end && *r->at != '}' && code <= MOST_CODE)
            code = code * 16 + regex_hex(r, 1);
        bool empty = r->at[-1] == '{';
        if (!regex_take(r, "}") || empty || code > MOST_CODE) regex_fail(r, "a bad \\u{...}");
        return code;
    }
    size_t used;
    long pair = unicode_escape(r->at - 2, (size_t)(r->end - r->at) + 2, &used);
    if (pair < 0) return regex_hex(r, 4);
    r->at += used - 2;
    return (uint32_t)pair;
}

// The character of an escape whose letter has been read.
static uint32_t regex_escape(RegexReader *r, uint32_t letter) {
    static const char names[] = "tnvfr0", meanings[] = "\t\n\v\f\r";
    const char *name = letter < 0x80 ? strchr(names, (int)letter) : NULL;
    bool digit = r->at < r->end && isdigit((unsigned char)*r->at);
    if (letter == '0' && digit) return regex_fail(r, "an octal escape"), 0;
    if (name && *name) return (uint8_t)meanings[name - names];
    if (letter == 'x') return regex_hex(r, 2);
    if (letter == 'u') return regex_unicode(r);
    if (letter == 'c' && r->at < r->end && isalpha((unsigned char)*r->at))
        return (uint32_t)*r->at++ & 31;
    if (letter < 0x80 && isalnum((int)letter)) regex_fail(r, "an unknown escape");
    return letter;
}

// \p{L}, \P{Number} and so on, behind the p.
static void regex_property(RegexReader *r, bool others, Class *c) {
    static const struct { const char *name; int kind; } names[] = {
        { "{L}", 1 }, { "{Letter}", 1 }, { "{gc=L}", 1 }, { "{General_Category=Letter}", 1 },
        { "{N}", 2 }, { "{Number}", 2 }, { "{gc=N}", 2 }, { "{General_Category=Number}", 2 },
    };
    Class found = {0};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (regex_take(r, names[i].name)) {
            add_unicode(r->arena, &found.both, names[i].kind);
            found.either = found.both;
            class_join(r->arena, c, found, others);
            return;
        }
    regex_fail(r, "of \\p only \\p{L} and \\p{N} are supported");
}

// One member of a class, whose escape may be a class itself. True: it is *code.
static bool regex_member(RegexReader *r, Class *c, uint32_t *code) {
    *code = regex_char(r);
    if (*code != '\\') return true;
    if (r->at == r->end) return regex_fail(r, "a backslash at the end"), true;
    uint32_t letter = regex_char(r);
    if (letter < 0x80 && class_named(r->arena, (char)letter, c)) return false;
    if (letter == 'p' || letter == 'P') return regex_property(r, letter == 'P', c), false;
    *code = letter == 'b' ? 8 : regex_escape(r, letter);
    return true;
}

// [...], behind the bracket.
static const Regex *regex_class(RegexReader *r) {
    Class c = {0};
    bool others = regex_take(r, "^");
    while (r->at < r->end && *r->at != ']') {
        uint32_t first, last;
        bool single = regex_member(r, &c, &first);
        if (c.either.n > MOST_SPANS) return regex_fail(r, "a class of more than 65536 spans");
        if (!single) continue;
        last = first;
        if (r->end - r->at > 1 && r->at[0] == '-' && r->at[1] != ']') {
            r->at++;
            if (!regex_member(r, &c, &last) || last < first)
                return regex_fail(r, "a range out of order");
        }
        class_add(r->arena, &c, first, last);
    }
    if (!regex_take(r, "]")) return regex_fail(r, "a class lacks its ]");
    if (others) c = class_others(r->arena, &c);
    charset_close(r->arena, &c.both);
    return regex_node(r, (Regex){ .kind = ONE_OF, .set = c.both });
}

// What a backslash begins, outside a class.
static const Regex *regex_escaped(RegexReader *r) {
    Class c = {0};
    const char *at = r->at - 1;
    if (regex_sees(r, "bB"))
        return regex_fail(r, "\\b and \\B are not supported");
    if (regex_sees(r, "k123456789"))
        return regex_fail(r, "backreferences are not supported");
    uint32_t code;
    r->at = at;
    if (regex_member(r, &c, &code)) class_add(r->arena, &c, code, code);
    charset_close(r->arena, &c.both);
    return regex_node(r, (Regex){ .kind = ONE_OF, .set = c.both });
}

// Takes {n}, {n,} or {n,m}; false: it is none, and the brace stands for itself.
static bool regex_counts(RegexReader *r, uint32_t *least, uint32_t *most) {
    const char *at = r->at + 1;
    uint32_t numbers[2] = { 0, 0 };
    int given[2] = { 0, 0 };
    for (int i = 0; i < 2; i++) {
        for (; at < r->end && isdigit((unsigned char)*at); at++, given[i]++)
            if (numbers[i] < MOST_REPEATS) numbers[i] = numbers[i] * 10 + (uint32_t)(*at - '0');
        if (i == 0 && (given[0] == 0 || at == r->end || *at != ',')) break;
        if (i == 0) at++;
    }
    bool comma = at > r->at && at[-1] == ',';
    if (r->end - r->at > 1 && r->at[1] == ',') regex_fail(r, "{,m} is read in two ways");
    if (given[0] == 0 || at >= r->end || *at != '}') return false;
    *least = numbers[0];
    *most = given[1] ? numbers[1] : comma ? BEYOND : numbers[0];
    r->at = at + 1;
    return true;
}

static const Regex *regex_repeated(RegexReader *r, const Regex *what) {
    uint32_t least = 1, most = 1, none;
    if (regex_take(r, "*")) least = 0, most = BEYOND;
    else if (regex_take(r, "+")) most = BEYOND;
    else if (regex_take(r, "?")) least = 0;
    else if (r->at == r->end || *r->at != '{' || !regex_counts(r, &least, &most)) return what;
    if (most < least) return regex_fail(r, "a repetition out of order");
    regex_take(r, "?");                        // as few as possible: the same texts
    if (regex_sees(r, "*+?") || (regex_sees(r, "{") && regex_counts(r, &none, &none)))
        return regex_fail(r, "nothing to repeat");
    return regex_node(r, (Regex){ .kind = REPEATED, .a = what, .least = least, .most = most });
}

// What a parenthesis begins, up to its contents.
static void regex_open_group(RegexReader *r) {
    if (++r->groups > MOST_GROUPS) regex_fail(r, "groups are nested too deep");
    if (!regex_take(r, "?") || regex_take(r, ":")) return;
    bool named = regex_take(r, "<"), look = regex_sees(r, "=!");
    if (look) regex_fail(r, "lookaround is not supported");
    else if (!named) regex_fail(r, "an unknown kind of group");
    else if (regex_sees(r, ">")) regex_fail(r, "a group without a name");
    else while (r->at < r->end && *r->at++ != '>') {}
}

// What stands for one character, or for none: ^ and $.
static const Regex *regex_single(RegexReader *r) {
    static const uint32_t line_ends[] = { '\n', '\r', 0x2028, 0x2029 };
    Charset set = {0};
    uint32_t none;
    if (regex_sees(r, "*+?") || (regex_sees(r, "{") && regex_counts(r, &none, &none)))
        return regex_fail(r, "nothing to repeat");
    if (regex_take(r, "^")) return regex_node(r, (Regex){ .kind = AT_START });
    if (regex_take(r, "$")) return regex_node(r, (Regex){ .kind = AT_END });
    if (regex_take(r, "[")) return regex_class(r);
    if (regex_take(r, "\\")) return regex_escaped(r);
    uint32_t code = regex_char(r);
    if (code == '.') {
        for (size_t i = 0; i < 4; i++) charset_add(r->arena, &set, line_ends[i], line_ends[i]);
        set = charset_others(r->arena, set);
    } else charset_add(r->arena, &set, code, code);
    charset_close(r->arena, &set);
    return regex_node(r, (Regex){ .kind = ONE_OF, .set = set });
}

// Alternatives, up to the end or to a parenthesis.
static const Regex *regex_read(RegexReader *r) {
    const Regex *before = NULL, *all = regex_node(r, (Regex){ .kind = NOTHING });
    while (r->at < r->end && *r->at != ')') {
        const Regex *one;
        if (regex_take(r, "|")) {
            before = before ? regex_node(r, (Regex){ .kind = EITHER, .a = before, .b = all }) : all;
            all = regex_node(r, (Regex){ .kind = NOTHING });
            continue;
        }
        if (regex_take(r, "(")) {
            regex_open_group(r);
            one = regex_read(r);
            r->groups--;
            if (!regex_take(r, ")")) return regex_fail(r, "a group lacks its )");
        } else one = regex_single(r);
        if (one->kind != AT_START && one->kind != AT_END) one = regex_repeated(r, one);
        all = regex_node(r, (Regex){ .kind = BEHIND, .a = all, .b = one });
    }
    return before ? regex_node(r, (Regex){ .kind = EITHER, .a = before, .b = all }) : all;
}

// A step of the search: it eats a character of its set, or goes on for nothing to one of two, or
// only at the text's beginning or end; or it is the end.
typedef enum { EATS, SPLITS, AT_BEGIN_ONLY, AT_END_ONLY, ENDS } StepKind;
typedef struct { StepKind kind; int set, next, other; } Step;

typedef struct {
    Arena *arena;
    Step *steps;                   // [n], room for MOST_NFA
    const Charset **sets;          // [n_sets], room for MOST_NFA
    int n, n_sets;
    const char *flaw;
} Steps;

static int add_step(Steps *s, Step step) {
    if (s->n == MOST_NFA) {
        s->flaw = "it has more than 4096 states";
        return 0;
    }
    s->steps[s->n] = step;
    return s->n++;
}

static int set_of(Steps *s, const Charset *set) {
    for (int i = s->n_sets; i-- > 0;)
        if (s->sets[i] == set) return i;
    if (s->n_sets == MOST_NFA) return 0;       // add_step says so
    s->sets[s->n_sets] = set;
    return s->n_sets++;
}

// The steps of a tree, in front of the step `next`. Returns the first.
static int write_steps(Steps *s, const Regex *r, int next) {
    if (s->flaw) return 0;
    for (; r->kind == BEHIND && !s->flaw; r = r->a) next = write_steps(s, r->b, next);
    int others = -1;                           // of alternatives that stand behind the first
    for (; r->kind == EITHER && !s->flaw; r = r->a) {
        int last = write_steps(s, r->b, next);
        others = others < 0 ? last : add_step(s, (Step){ SPLITS, .next = last, .other = others });
    }
    if (others >= 0)
        return add_step(s, (Step){ SPLITS, .next = write_steps(s, r, next), .other = others });
    switch (r->kind) {
    case ONE_OF: return add_step(s, (Step){ EATS, .set = set_of(s, &r->set), .next = next });
    case AT_START: return add_step(s, (Step){ AT_BEGIN_ONLY, .next = next });
    case AT_END: return add_step(s, (Step){ AT_END_ONLY, .next = next });
    case REPEATED: break;
    default: return next;
    }
    int at = next;
    if (r->most == BEYOND) {
        at = add_step(s, (Step){ SPLITS, .other = next });
        int body = write_steps(s, r->a, at);
        s->steps[at].next = body;
    } else for (uint32_t i = r->least; i < r->most && !s->flaw; i++)
        at = add_step(s, (Step){ SPLITS, .next = write_steps(s, r->a, at), .other = next });
    for (uint32_t i = 0, before = 0; i < r->least && !s->flaw; i++) {
        before = (uint32_t)s->n;
        at = write_steps(s, r->a, at);
        if (before == (uint32_t)s->n) break;   // it is nothing, however often
    }
    return at;
}

// An automaton over characters. Its states are 0 (the first) to states - 1; from each of them an
// accepting one can be reached.
typedef struct {
    uint32_t *starts;              // [spans]: where a span of one class begins; it ends at the next
    uint16_t *class_of;            // [spans]
    uint16_t ascii[128];           // the classes of these
    uint32_t *next;                // [states][classes]: a state, or NO_STATE
    bool *accepts;                 // [states]
    uint32_t *weight[2];           // [classes]: bytes of the shortest character, as it is and in a
                                   // string of JSON
    uint32_t spans, classes, states;
} Automaton;

#define NO_STATE UINT32_MAX

// The bytes that a character takes as it is, or in a string of JSON: of the control characters
// some have short escapes, the others are \u00xx.
static uint32_t char_bytes(uint32_t code, bool json) {
    if (json && code < 0x20) return strchr("\b\f\n\r\t", (int)code) && code ? 2 : 6;
    if (json && (code == '"' || code == '\\')) return 2;
    return code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
}

static uint32_t span_of(const Automaton *a, uint32_t code) {
    uint32_t low = 0, high = a->spans;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (a->starts[middle] <= code) low = middle;
        else high = middle;
    }
    return low;
}

static uint32_t state_behind(const Automaton *a, uint32_t state, uint32_t code) {
    uint32_t class = code < 128 ? a->ascii[code] : a->class_of[span_of(a, code)];
    return a->next[state * a->classes + class];
}

// What follows from its spans and their classes.
static void weigh_classes(Arena *arena, Automaton *a) {
    static const uint32_t lengths[] = { 0x80, 0x800, 0x10000 };
    for (int json = 0; json < 2; json++) {
        a->weight[json] = take(arena, a->classes * sizeof(uint32_t));
        for (uint32_t i = 0; i < a->classes; i++) a->weight[json][i] = BEYOND;
    }
    for (uint32_t code = 0; code < 128; code++) a->ascii[code] = a->class_of[span_of(a, code)];
    for (uint32_t i = 0; i < a->spans; i++) {
        uint32_t last = i + 1 < a->spans ? a->starts[i + 1] - 1 : MOST_CODE;
        for (int json = 0; json < 2; json++) {
            uint32_t *weight = &a->weight[json][a->class_of[i]];
            for (uint32_t code = a->starts[i]; code <= last && code < 128; code++)
                *weight = lesser(*weight, char_bytes(code, json));
            for (int k = 0; k < 3; k++)
                if (last >= lengths[k] && (k == 2 || a->starts[i] < lengths[k + 1]))
                    *weight = lesser(*weight, char_bytes(lengths[k], json));
        }
    }
}

// The states that a search may be in, as a sorted list, and the same as an automaton's state.
typedef struct { const int *steps; int n; } StateSet;

// Many state sets, each found by its contents.
typedef struct {
    Arena *arena;
    StateSet *sets;                // [n], room for half the slots
    uint32_t *slots;               // [n_slots], a power of two: n + 1; 0: empty
    uint32_t n, n_slots;
    bool first_apart;              // the first is found by nobody: it is where a text begins
} StateSets;

static uint32_t hash_ints(const int *numbers, int n) {
    uint64_t h = 14695981039346656037u;
    for (int i = 0; i < n; i++) h = (h ^ (uint32_t)numbers[i]) * 1099511628211u;
    return (uint32_t)(h >> 32 ^ h);
}

// The slot of a set, or an empty one.
static uint32_t *slot_of_set(const StateSets *s, const int *steps, int n) {
    for (uint32_t slot = hash_ints(steps, n);; slot++) {
        uint32_t *at = &s->slots[slot & (s->n_slots - 1)];
        if (*at == 0) return at;
        const StateSet *found = &s->sets[*at - 1];
        if (found->n == n && memcmp(found->steps, steps, (size_t)n * sizeof *steps) == 0)
            return at;
    }
}

// Twice the room, or some to begin with.
static void grow_sets(StateSets *s) {
    enum { FIRST_SLOTS = 256 };
    s->n_slots = s->n_slots ? 2 * s->n_slots : FIRST_SLOTS;
    StateSet *sets = take(s->arena, s->n_slots / 2 * sizeof *sets);
    if (s->n) memcpy(sets, s->sets, s->n * sizeof *sets);
    s->sets = sets;
    s->slots = take(s->arena, s->n_slots * sizeof *s->slots);
    memset(s->slots, 0, s->n_slots * sizeof *s->slots);
    for (uint32_t i = s->first_apart; i < s->n; i++)
        *slot_of_set(s, sets[i].steps, sets[i].n) = i + 1;
}

// The number of a set, which is new if it was not there. NO_STATE: there are too many.
static uint32_t find_set(StateSets *s, const int *steps, int n) {
    if (2 * s->n == s->n_slots) grow_sets(s);
    uint32_t *slot = slot_of_set(s, steps, n);
    if (*slot) return *slot - 1;
    if (s->n == MOST_STATES) return NO_STATE;
    s->sets[s->n] = (StateSet){ take_copy(s->arena, steps, (size_t)n * sizeof *steps), n };
    *slot = ++s->n;
    return s->n - 1;
}

// Divides all characters into classes: those that the same sets hold. holds[class][set] is a bit.
// NULL: there are too many.
static uint64_t *find_classes(const Steps *s, Automaton *a) {
    size_t words = ((size_t)s->n_sets + 63) / 64 + 1;
    Charset edges = {0};
    charset_add(s->arena, &edges, 0, 0);
    for (int i = 0; i < s->n_sets; i++)
        for (int k = 0; k < s->sets[i]->n; k++) {
            Interval span = s->sets[i]->spans[k];
            charset_add(s->arena, &edges, span.first, span.first);
            if (span.last < MOST_CODE)
                charset_add(s->arena, &edges, span.last + 1, span.last + 1);
        }
    qsort(edges.spans, (size_t)edges.n, sizeof *edges.spans, by_first);
    a->starts = take(s->arena, (size_t)edges.n * sizeof *a->starts);
    a->class_of = take(s->arena, (size_t)edges.n * sizeof *a->class_of);
    for (int i = 0; i < edges.n; i++)
        if (i == 0 || edges.spans[i].first != edges.spans[i - 1].first)
            a->starts[a->spans++] = edges.spans[i].first;
    uint64_t *held = take(s->arena, a->spans * words * sizeof *held);
    size_t most = a->spans < MOST_CLASSES ? a->spans : MOST_CLASSES;
    uint64_t *holds = take(s->arena, most * words * sizeof *holds);
    memset(held, 0, a->spans * words * sizeof *held);
    for (int i = 0; i < s->n_sets; i++)
        for (int k = 0; k < s->sets[i]->n; k++)
            for (uint32_t at = span_of(a, s->sets[i]->spans[k].first);
                 at < a->spans && a->starts[at] <= s->sets[i]->spans[k].last; at++)
                held[at * words + (size_t)i / 64] |= 1ull << i % 64;
    for (uint32_t i = 0; i < a->spans; i++) {
        uint32_t class = 0;
        while (class < a->classes && memcmp(holds + class * words, held + i * words,
                                            words * sizeof *held) != 0) class++;
        if (class == MOST_CLASSES) return NULL;
        if (class == a->classes) memcpy(holds + a->classes++ * words, held + i * words,
                                        words * sizeof *held);
        a->class_of[i] = (uint16_t)class;
    }
    return holds;
}

// What can be reached for nothing: the steps met so far.
typedef struct {
    const Steps *s;
    bool *met;                     // [steps]
    int *list, *stack;             // [n] those met; room for each step, and twice as much
    int n;
} Closure;

static void close_over(Closure *c, int from, bool at_start, bool at_end) {
    int n = 0;
    c->stack[n++] = from;
    while (n > 0) {
        int i = c->stack[--n];
        if (c->met[i]) continue;
        c->met[i] = true;
        c->list[c->n++] = i;
        const Step *step = &c->s->steps[i];
        bool on = step->kind == SPLITS || (step->kind == AT_BEGIN_ONLY && at_start) ||
                  (step->kind == AT_END_ONLY && at_end);
        if (on) c->stack[n++] = step->next;
        if (step->kind == SPLITS) c->stack[n++] = step->other;
    }
}

static int by_step(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

// Of the steps met those that matter, sorted, at the list's beginning; returns how many. The next
// closure begins anew.
static int take_met(Closure *c) {
    int kept = 0;
    for (int i = 0; i < c->n; i++) {
        StepKind kind = c->s->steps[c->list[i]].kind;
        c->met[c->list[i]] = false;
        if (kind == EATS || kind == ENDS || kind == AT_END_ONLY) c->list[kept++] = c->list[i];
    }
    c->n = 0;
    if (kept > 1) qsort(c->list, (size_t)kept, sizeof *c->list, by_step);
    return kept;
}

// May the text end here, perhaps where it begins? `set` has been closed over, but not over its end.
static bool set_accepts(Closure *c, const StateSet *set, bool at_start) {
    bool accepts = false;
    for (int i = 0; i < set->n; i++) {
        accepts |= c->s->steps[set->steps[i]].kind == ENDS;
        if (c->s->steps[set->steps[i]].kind == AT_END_ONLY)
            close_over(c, set->steps[i], at_start, true);
    }
    int n = take_met(c);
    for (int i = 0; i < n; i++) accepts |= c->s->steps[c->list[i]].kind == ENDS;
    return accepts;
}

// The fewest characters to an accepting state, and of the shortest such text the bytes.
typedef struct { uint32_t chars, bytes; } Need;

static void better_need(Need *least, Need other) {
    if (other.chars < least->chars ||
        (other.chars == least->chars && other.bytes < least->bytes)) *least = other;
}

// A row of needs: of each state one character more than those of `behind`, at least.
static void needs_before(const Automaton *a, const Need *behind, bool json, Need *row) {
    for (uint32_t state = 0; state < a->states; state++) {
        row[state] = (Need){ BEYOND, BEYOND };
        for (uint32_t class = 0; class < a->classes; class++) {
            uint32_t next = a->next[state * a->classes + class];
            if (next == NO_STATE || a->weight[json][class] == BEYOND) continue;
            better_need(&row[state],
                        (Need){ plus(behind[next].chars, 1),
                                plus(behind[next].bytes, a->weight[json][class]) });
        }
    }
}

// The states in the order of their distance to an end: breadth first, against the arrows.
static void needs_to_end(Arena *arena, const Automaton *a, bool json, Need *row) {
    uint32_t n = a->states, *first = take(arena, (n + 2) * sizeof *first);
    uint32_t *queue = take(arena, (n + 1) * sizeof *queue), head = 0, tail = 0;
    typedef struct { uint32_t from, weight; } Arrow;
    Arrow *arrows = take(arena, ((size_t)n * a->classes + 1) * sizeof *arrows);
    memset(first, 0, (n + 2) * sizeof *first);
    for (uint32_t i = 0; i < n * a->classes; i++)
        if (a->next[i] != NO_STATE) first[a->next[i] + 2]++;
    for (uint32_t i = 2; i < n + 2; i++) first[i] += first[i - 1];
    for (uint32_t state = 0; state < n; state++) {         // by the state that they lead to
        row[state] = a->accepts[state] ? (Need){ 0, 0 } : (Need){ BEYOND, BEYOND };
        if (a->accepts[state]) queue[tail++] = state;
        for (uint32_t class = 0; class < a->classes; class++) {
            uint32_t to = a->next[state * a->classes + class];
            if (to != NO_STATE)
                arrows[first[to + 1]++] = (Arrow){ state, a->weight[json][class] };
        }
    }
    while (head < tail) {
        uint32_t state = queue[head++];
        for (Arrow *arrow = arrows + first[state]; arrow < arrows + first[state + 1]; arrow++) {
            Need *before = &row[arrow->from];
            if (arrow->weight == BEYOND || before->chars <= row[state].chars) continue;
            if (before->chars == BEYOND) queue[tail++] = arrow->from;
            better_need(before, (Need){ row[state].chars + 1,
                                        plus(row[state].bytes, arrow->weight) });
        }
    }
}

// Leaves out the arrows to states from which no end can be reached. False: the first is one.
static bool drop_dead_states(Arena *arena, Automaton *a) {
    Need *row = take(arena, a->states * sizeof *row);
    needs_to_end(arena, a, false, row);
    for (uint32_t i = 0; i < a->states * a->classes; i++)
        if (a->next[i] != NO_STATE && row[a->next[i]].chars == BEYOND) a->next[i] = NO_STATE;
    return row[0].chars < BEYOND;
}

// Room for one state's row more in a->next, which has `room` of them.
static void grow_states(Arena *arena, Automaton *a, uint32_t state, uint32_t *room) {
    if (state < *room) return;
    *room = *room ? 2 * *room : 16;
    uint32_t *more = take(arena, *room * a->classes * sizeof *more);
    if (state) memcpy(more, a->next, state * a->classes * sizeof *more);
    a->next = more;
}

// A copy that lasts: what an automaton was made with is given up.
static const Automaton *keep_automaton(Arena *arena, const Automaton *a) {
    size_t arrows = (size_t)a->states * a->classes;
    Automaton *kept = take(arena, sizeof *kept);
    *kept = *a;
    kept->starts = take_copy(arena, a->starts, a->spans * sizeof *a->starts);
    kept->class_of = take_copy(arena, a->class_of, a->spans * sizeof *a->class_of);
    kept->next = take_copy(arena, a->next, arrows * sizeof *a->next);
    kept->accepts = take_copy(arena, a->accepts, a->states * sizeof *a->accepts);
    for (int json = 0; json < 2; json++)
        kept->weight[json] = take_copy(arena, a->weight[json], a->classes * sizeof(uint32_t));
    return kept;
}

// The automaton of the steps from `entry` on (Rabin and Scott's sets of states).
static const char *find_states(Steps *s, int entry, Automaton *a) {
    uint64_t *holds = find_classes(s, a);
    size_t words = ((size_t)s->n_sets + 63) / 64 + 1;
    uint32_t room = 0;
    if (holds == NULL) return many_states;
    weigh_classes(s->arena, a);
    size_t n = (size_t)s->n;
    Closure c = { s, take(s->arena, n), take(s->arena, n * sizeof(int)),
                  take(s->arena, (2 * n + 1) * sizeof(int)), 0 };
    memset(c.met, 0, n);
    StateSets sets = { .arena = s->arena };
    close_over(&c, entry, true, false);
    int first = take_met(&c);
    find_set(&sets, c.list, first);
    memset(sets.slots, 0, sets.n_slots * sizeof *sets.slots);
    sets.first_apart = true;
    a->accepts = take(s->arena, MOST_STATES * sizeof *a->accepts);
    for (uint32_t state = 0; state < sets.n; state++) {
        if (sets.n * a->classes > MOST_ARROWS) return many_states;
        grow_states(s->arena, a, state, &room);
        const StateSet set = sets.sets[state];
        a->accepts[state] = set_accepts(&c, &set, state == 0);
        for (uint32_t class = 0; class < a->classes; class++) {
            bool any = false;
            for (int i = 0; i < set.n; i++) {
                const Step *step = &s->steps[set.steps[i]];
                size_t word = class * words + (size_t)step->set / 64;
                if (step->kind != EATS || !(holds[word] >> step->set % 64 & 1)) continue;
                close_over(&c, step->next, false, false);
                any = true;
            }
            uint32_t *next = &a->next[state * a->classes + class];
            *next = NO_STATE;
            if (!any) continue;
            int reached = take_met(&c);
            *next = find_set(&sets, c.list, reached);
            if (*next == NO_STATE) return many_states;
        }
    }
    a->states = sets.n;
    return drop_dead_states(s->arena, a) ? NULL : nothing_matches;
}

// The steps of a pattern: of all texts that hold a match of it or, `whole`, are one. Returns the
// first.
static int steps_of(Steps *s, const Regex *tree, bool whole) {
    Charset *all = take(s->arena, sizeof *all);
    *all = charset_others(s->arena, (Charset){0});
    int end = add_step(s, (Step){ .kind = ENDS }), any = set_of(s, all);
    if (whole) return write_steps(s, tree, end);
    int behind = add_step(s, (Step){ SPLITS, .other = end });
    s->steps[behind].next = add_step(s, (Step){ EATS, .set = any, .next = behind });
    int entry = write_steps(s, tree, behind);
    int before = add_step(s, (Step){ SPLITS, .other = entry });
    int eats = add_step(s, (Step){ EATS, .set = any, .next = before });
    if (!s->flaw) s->steps[before].next = eats;
    return before;
}

// The automaton of a pattern; NULL: *flaw says why there is none.
static const Automaton *automaton_of(Arena *arena, const char *pattern, size_t n, bool whole,
                                     const char **flaw) {
    Arena scratch = {0};
    Automaton a = {0};
    RegexReader reader = { .arena = &scratch, .at = pattern, .end = pattern + n };
    if (n > MOST_PATTERN) regex_fail(&reader, "it has more than 65536 bytes");
    const Regex *tree = regex_read(&reader);
    if (!reader.flaw && reader.at < reader.end) reader.flaw = "a ) without its group";
    *flaw = reader.flaw;
    Steps s = { .arena = &scratch, .steps = take(&scratch, MOST_NFA * sizeof *s.steps),
                .sets = take(&scratch, MOST_NFA * sizeof *s.sets) };
    int entry = *flaw ? 0 : steps_of(&s, tree, whole);
    if (!*flaw) *flaw = s.flaw;
    if (!*flaw) *flaw = find_states(&s, entry, &a);
    const Automaton *kept = *flaw ? NULL : keep_automaton(arena, &a);
    arena_free(&scratch);
    return kept;
}

// The characters that two automata tell apart, as pairs of their classes: pairs[class]. NULL: there
// are too many.
static uint32_t *pair_classes(Arena *arena, const Automaton *x, const Automaton *y, Automaton *a) {
    uint32_t spans = x->spans + y->spans, *pairs = take(arena, spans * sizeof *pairs), i = 0, k = 0;
    a->starts = take(arena, spans * sizeof *a->starts);
    a->class_of = take(arena, spans * sizeof *a->class_of);
    for (uint32_t start = 0; start <= MOST_CODE;) {
        uint32_t pair = (uint32_t)x->class_of[i] << 16 | y->class_of[k], class = 0;
        while (class < a->classes && pairs[class] != pair) class++;
        if (class == MOST_CLASSES) return NULL;
        if (class == a->classes) pairs[a->classes++] = pair;
        a->starts[a->spans] = start;
        a->class_of[a->spans++] = (uint16_t)class;
        uint32_t next_x = i + 1 < x->spans ? x->starts[i + 1] : MOST_CODE + 1;
        uint32_t next_y = k + 1 < y->spans ? y->starts[k + 1] : MOST_CODE + 1;
        start = lesser(next_x, next_y);
        i += start == next_x, k += start == next_y;
    }
    weigh_classes(arena, a);
    return pairs;
}

static const char *find_pairs(Arena *arena, const Automaton *x, const Automaton *y, Automaton *a) {
    const uint32_t *pairs = pair_classes(arena, x, y, a);
    if (pairs == NULL) return many_states;
    StateSets sets = { .arena = arena };
    find_set(&sets, (int[]){ 0, 0 }, 2);
    a->accepts = take(arena, MOST_STATES * sizeof *a->accepts);
    for (uint32_t state = 0, room = 0; state < sets.n; state++) {
        if (sets.n * a->classes > MOST_ARROWS) return many_states;
        grow_states(arena, a, state, &room);
        uint32_t in_x = (uint32_t)sets.sets[state].steps[0];
        uint32_t in_y = (uint32_t)sets.sets[state].steps[1];
        a->accepts[state] = x->accepts[in_x] && y->accepts[in_y];
        for (uint32_t class = 0; class < a->classes; class++) {
            uint32_t to_x = x->next[in_x * x->classes + (pairs[class] >> 16)];
            uint32_t to_y = y->next[in_y * y->classes + (pairs[class] & 0xFFFF)];
            uint32_t *next = &a->next[state * a->classes + class];
            *next = NO_STATE;
            if (to_x == NO_STATE || to_y == NO_STATE) continue;
            *next = find_set(&sets, (int[]){ (int)to_x, (int)to_y }, 2);
            if (*next == NO_STATE) return many_states;
        }
    }
    a->states = sets.n;
    return drop_dead_states(arena, a) ? NULL : nothing_matches;
}

// The automaton of what both accept; NULL: *flaw says why there is none.
static const Automaton *automaton_of_both(Arena *arena, const Automaton *x, const Automaton *y,
                                          const char **flaw) {
    Arena scratch = {0};
    Automaton a = {0};
    *flaw = find_pairs(&scratch, x, y, &a);
    const Automaton *kept = *flaw ? NULL : keep_automaton(arena, &a);
    arena_free(&scratch);
    return kept;
}

// Texts of characters that an automaton accepts, of least to most characters: what is needed to
// reach an end. A row of needs for each number of characters that are still missing.
typedef struct {
    const Automaton *automaton;
    uint32_t least, most;
    bool json;                     // written as a string of JSON, else as they are
    bool formatted;                // also by a format, which others may not enforce
    const Need *needs;             // [least + 1][states]
    Need worst;                    // the most of each
} Language;

static const Need *need_of(const Language *l, uint32_t state, uint32_t count) {
    uint32_t missing = count < l->least ? l->least - count : 0;
    return &l->needs[missing * l->automaton->states + state];
}

// May a text be in this state after so many characters?
static bool lives(const Language *l, uint32_t state, uint32_t count) {
    return state != NO_STATE && plus(need_of(l, state, count)->chars, count) <= l->most;
}

// Finds what is needed. `cells` counts those of all tables. NULL, or why it cannot be.
static const char *find_needs(Arena *arena, Language *l, uint64_t *cells) {
    const Automaton *a = l->automaton;
    *cells += (uint64_t)a->states * (l->least + 1ull);
    if (*cells > MOST_NEEDS) return many_cells;
    Need *needs = take(arena, (l->least + 1) * a->states * sizeof *needs);
    needs_to_end(arena, a, l->json, needs);
    for (uint32_t i = 1; i <= l->least; i++)
        needs_before(a, needs + (i - 1) * a->states, l->json, needs + i * a->states);
    for (uint32_t i = 0; i < (l->least + 1) * a->states; i++) {
        if (needs[i].chars == BEYOND) continue;
        if (needs[i].chars > l->worst.chars) l->worst.chars = needs[i].chars;
        if (needs[i].bytes > l->worst.bytes) l->worst.bytes = needs[i].bytes;
    }
    l->needs = needs;
    return NULL;
}

// Does it accept this text, in UTF-8?
static bool language_holds(const Language *l, const char *s, size_t n) {
    uint32_t state = 0, count = 0, code;
    for (size_t length; n > 0 && state != NO_STATE; s += length, n -= length, count++) {
        length = utf8_char(s, n, &code);
        state = code == UINT32_MAX ? NO_STATE : state_behind(l->automaton, state, code);
    }
    return state != NO_STATE && l->automaton->accepts[state] && count >= l->least &&
           count <= l->most;
}

// ---- 14. Schema ----
// A JSON Schema becomes a graph of values: each may be one of several atoms (words, strings,
// numbers, arrays, objects), and arrays and objects name the values inside them. A value is known
// by the schemas that hold for it all at once, so allOf, $ref and what stands beside them merge by
// themselves, and recursion ends where the same schemas meet again. Everything that is not
// supported is refused, all at once, each with its JSON pointer. Of each atom the fewest tokens
// that write it are found, so that a text can always be brought to its end within a limit.

// A node of a trie of tokens, depth first: its children begin behind it.
typedef struct {
    uint32_t token;                // that ends here, or TOKENIZER_NONE
    uint32_t end;                  // the first node that is not below it
    uint16_t depth;                // 0: the token's first byte
    uint8_t byte;
} TrieNode;

typedef struct {
    TrieNode *nodes;               // [n]
    uint32_t n, roots[256];        // the node of a token's first byte; n: there is none
} Trie;

enum { LONGEST_USABLE = 1024, GLUES = 16 };    // bytes of a token: longer ones are not drawn

// The tokens that may be drawn.
typedef struct {
    Trie all, quotes;              // quotes: those that hold a quotation mark
    uint32_t most_bytes;           // of a token
    uint64_t *usable;              // a bit a token
    uint32_t glue[GLUES];          // the fewest tokens of each Glue
    Tokenizer *tokenizer;
    Arena arena;
} Vocabulary;

typedef struct { const char *text; size_t n; uint32_t token; } TokenText;

static int by_text(const void *a, const void *b) {
    const TokenText *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->n < y->n ? x->n : y->n);
    return order ? order : x->n < y->n ? -1 : x->n > y->n;
}

// Tokens that the encoder makes of their own text. The others it never makes (an added token,
// mostly the single space, lies in them), so the model was not trained on them.
static size_t usable_tokens(Tokenizer *t, TokenText *found) {
    size_t n = 0;
    uint32_t *ids = allocate(tokenizer_most_ids(t, LONGEST_USABLE), sizeof *ids);
    for (uint32_t id = 0; id < t->tokens; id++) {
        TokenText one = { .token = id };
        one.text = tokenizer_text(t, id, &one.n);
        if (one.n == 0 || one.n > LONGEST_USABLE || tokenizer_is_special(t, id)) continue;
        if (tokenizer_encode(t, one.text, one.n, true, ids) == 1 && ids[0] == id) found[n++] = one;
    }
    free(ids);
    qsort(found, n, sizeof *found, by_text);
    return n;
}

// The trie of n tokens in the order of their bytes.
static Trie trie_of(Arena *arena, const TokenText *texts, size_t n) {
    size_t bytes = 0;
    for (size_t i = 0; i < n; i++) bytes += texts[i].n;
    Trie t = { .nodes = take(arena, bytes * sizeof *t.nodes) };
    uint32_t path[LONGEST_USABLE], depth = 0;
    for (const TokenText *one = texts; one < texts + n; one++) {
        uint32_t shared = 0;
        while (shared < depth && shared < one->n &&
               t.nodes[path[shared]].byte == (uint8_t)one->text[shared]) shared++;
        while (depth > shared) t.nodes[path[--depth]].end = t.n;
        for (; depth < one->n; depth++) {
            path[depth] = t.n;
            t.nodes[t.n++] = (TrieNode){
                .token = depth + 1 == one->n ? one->token : TOKENIZER_NONE,
                .depth = (uint16_t)depth, .byte = (uint8_t)one->text[depth],
            };
        }
    }
    while (depth > 0) t.nodes[path[--depth]].end = t.n;
    for (int byte = 0; byte < 256; byte++) t.roots[byte] = t.n;
    for (uint32_t i = 0; i < t.n; i = t.nodes[i].end) t.roots[t.nodes[i].byte] = i;
    return t;
}

static void vocabulary_close(Vocabulary *v) {
    if (v == NULL) return;
    arena_free(&v->arena);
    free(v->usable);
    free(v);
}

// The node below another one on this byte; t->n: there is none.
static uint32_t trie_child(const Trie *t, uint32_t node, uint8_t byte) {
    for (uint32_t i = node + 1; i < t->nodes[node].end; i = t->nodes[i].end)
        if (t->nodes[i].byte == byte) return i;
    return t->n;
}

// The fewest tokens that write text[i .. n), of each i, to left[0 .. n].
static void count_tokens(const Vocabulary *v, const char *text, size_t n, uint32_t *left) {
    const Trie *t = &v->all;
    left[n] = 0;
    for (size_t i = n; i-- > 0;) {
        uint32_t node = t->roots[(uint8_t)text[i]];
        left[i] = BEYOND;
        for (size_t end = i + 1; node < t->n; end++) {
            if (t->nodes[node].token != TOKENIZER_NONE)
                left[i] = lesser(left[i], plus(left[end], 1));
            if (end == n) break;
            node = trie_child(t, node, (uint8_t)text[end]);
        }
    }
}

// May this token be drawn?
static bool usable(const Vocabulary *v, uint32_t token) {
    return token < v->tokenizer->tokens && v->usable[token / 64] >> token % 64 & 1;
}

// The texts of structure that stand between values, and the fewest tokens that write each.
typedef enum {
    OPEN_LIST, OPEN_LIST_QUOTE, EMPTY_LIST, CLOSE_LIST, QUOTE_CLOSE_LIST, EMPTY_OBJECT,
    OPEN_OBJECT_QUOTE, CLOSE_OBJECT, QUOTE_CLOSE_OBJECT, COMMA, COMMA_QUOTE, QUOTE_COMMA,
    QUOTE_COMMA_QUOTE, QUOTE_COLON, QUOTE_COLON_QUOTE, COLON_QUOTE,
} Glue;

static const char *const glue_texts[GLUES] = {
    "[", "[\"", "[]", "]", "\"]", "{}", "{\"", "}", "\"}", ",", ",\"", "\",", "\",\"", "\":",
    "\":\"", ":\"",
};

// Every text can be written: each byte of UTF-8 must have a token of its own.
static Vocabulary *vocabulary_open(Tokenizer *t) {
    Vocabulary *v = allocate(1, sizeof *v);
    TokenText *texts = allocate_raw(t->tokens, sizeof *texts, LINE_BYTES);
    size_t n = usable_tokens(t, texts), quotes = 0;
    v->tokenizer = t;
    v->all = trie_of(&v->arena, texts, n);
    v->usable = allocate(t->tokens / 64 + 1, sizeof *v->usable);
    for (size_t i = 0; i < n; i++) {
        v->usable[texts[i].token / 64] |= 1ull << texts[i].token % 64;
        if (texts[i].n > v->most_bytes) v->most_bytes = (uint32_t)texts[i].n;
        if (memchr(texts[i].text, '"', texts[i].n)) texts[quotes++] = texts[i];
    }
    v->quotes = trie_of(&v->arena, texts, quotes);
    free(texts);
    for (int byte = 0; byte < 0xF5; byte++) {
        uint32_t node = v->all.roots[byte];
        bool alone = node < v->all.n && v->all.nodes[node].token != TOKENIZER_NONE;
        if (!alone && byte != 0xC0 && byte != 0xC1)
            die("the model's tokenizer has no token for byte %d alone, so not every text can be "
                "written; schemas and patterns need that", byte);
    }
    for (int i = 0; i < GLUES; i++) {
        uint32_t left[4];
        count_tokens(v, glue_texts[i], strlen(glue_texts[i]), left);
        v->glue[i] = left[0];
    }
    return v;
}

typedef struct Value Value;
typedef struct Item Item;
struct Item {                      // of JSON: a value and where it stands
    enum { IS_NULL, IS_FALSE, IS_TRUE, IS_NUMBER, IS_STRING, IS_LIST, IS_OBJECT } kind;
    const char *source;            // [size]: as it stands in the text
    size_t size;
    const char *text;              // [length]: what a string says
    size_t length;
    const char *name;              // [name_length]: of the member that it is
    size_t name_length;
    Item *parent, *first, *next;
    int n, index;                  // children; its place among its parent's
    bool checked;                  // as a schema
    bool on_path, no_cycle;        // of schemas that hold at once: see has_cycle
    bool noted;                    // a oneOf, to be proven
    bool dropped;                  // a keyword that is not enforced
    const Automaton *automaton;    // of a pattern or a format
};

static void read_string(Arena *arena, Json *j, const char **text, size_t *n) {
    Bytes said = {0};
    append(&said, "", 0);
    json_string(j, &said);
    *text = take_copy(arena, said.data, said.size + 1);
    *n = said.size;
    free(said.data);
}

// A value of JSON that is known to be sound.
static Item *read_item(Arena *arena, Json *j, Item *parent) {
    Item *item = take(arena, sizeof *item), **last = &item->first;
    json_skip_space(j);
    *item = (Item){ .parent = parent, .source = j->at };
    char c = *j->at;
    bool object = c == '{';
    if (c == '"') {
        item->kind = IS_STRING;
        read_string(arena, j, &item->text, &item->length);
    } else if (object || c == '[') {
        item->kind = object ? IS_OBJECT : IS_LIST;
        j->at++;
        for (bool more = !json_take(j, object ? '}' : ']'); more; more = json_take(j, ',')) {
            const char *name = NULL;
            size_t length = 0;
            if (object) read_string(arena, j, &name, &length);
            if (object) json_take(j, ':');
            Item *child = read_item(arena, j, item);
            child->name = name, child->name_length = length, child->index = item->n++;
            *last = child;
            last = &child->next;
        }
        if (item->n) json_take(j, object ? '}' : ']');
    } else {
        item->kind = c == 'n' ? IS_NULL : c == 'f' ? IS_FALSE : c == 't' ? IS_TRUE : IS_NUMBER;
        json_value(j, 0);
    }
    item->size = (size_t)(j->at - item->source);
    return item;
}

static bool is_text(const char *text, size_t n, const char *word) {
    return n == strlen(word) && memcmp(text, word, n) == 0;
}

static bool says(Item *i, const char *word) {
    return i->kind == IS_STRING && is_text(i->text, i->length, word);
}

// The member of an object with this name, the last of equals; NULL: there is none.
static Item *member_named(Item *object, const char *name, size_t n) {
    Item *found = NULL;
    if (object == NULL || object->kind != IS_OBJECT) return NULL;
    for (Item *m = object->first; m; m = m->next)
        if (m->name_length == n && memcmp(m->name, name, n) == 0) found = m;
    return found && !found->dropped ? found : NULL;
}

static Item *member_of(Item *object, const char *name) {
    return member_named(object, name, strlen(name));
}

// Where an item stands: a JSON pointer (RFC 6901).
static void append_pointer(Bytes *out, Item *item) {
    if (item == NULL || item->parent == NULL) return;      // the root, or a pattern's
    append_pointer(out, item->parent);
    append_string(out, "/");
    if (item->parent->kind == IS_LIST) append_format(out, "%d", item->index);
    for (size_t i = 0; item->parent->kind == IS_OBJECT && i < item->name_length; i++) {
        char c = item->name[i];
        if (c == '~' || c == '/') append_string(out, c == '~' ? "~0" : "~1");
        else append(out, &c, 1);
    }
}

// A number as digits * 10^exponent, the digits not ending in 0. False: it has too many digits.
typedef __int128 Wide;
typedef struct { Wide digits; int exponent; } Decimal;     // the digits with their sign

enum { MOST_DIGITS = 36 };         // that a Wide holds

static bool decimal_of(Item *item, Decimal *d) {
    const char *s = item->source, *end = s + item->size;
    bool negative = *s == '-', point = false;
    long exponent = 0, written = 0;
    *d = (Decimal){0};
    int digits = 0;
    for (s += negative; s < end && *s != 'e' && *s != 'E'; s++) {
        if (*s == '.') point = true;
        else if (*s == '0' && digits == 0) exponent -= point;
        else if (digits++ < MOST_DIGITS) d->digits = d->digits * 10 + (*s - '0'), exponent -= point;
        else if (*s != '0') return false;
        else exponent += !point;
    }
    bool minus = end - s > 1 && s[1] == '-';
    for (s += s < end ? 1 + (s[1] == '-' || s[1] == '+') : 0; s < end; s++)
        if (written < 10000) written = written * 10 + (*s - '0');
    exponent += minus ? -written : written;
    while (d->digits && d->digits % 10 == 0) d->digits /= 10, exponent++;
    d->exponent = d->digits ? (int)exponent : 0;
    if (negative) d->digits = -d->digits;
    return true;
}

// Digits in all.
static int decimal_digits(Decimal d) {
    int n = 0;
    for (Wide rest = d.digits; rest; rest /= 10) n++;
    return n;
}

static bool same_item(Item *a, Item *b) {
    Decimal x, y;
    if (a == b) return true;
    if (a->kind != b->kind) return false;
    switch (a->kind) {
    case IS_NUMBER:
        return decimal_of(a, &x) && decimal_of(b, &y) && x.digits == y.digits &&
               x.exponent == y.exponent;
    case IS_STRING: return a->length == b->length && memcmp(a->text, b->text, a->length) == 0;
    case IS_LIST: case IS_OBJECT: break;
    default: return true;
    }
    Item *other = b->first;
    for (Item *i = a->first; i; i = i->next) {
        if (a->kind == IS_OBJECT) other = member_named(b, i->name, i->name_length);
        if (other == NULL || !same_item(i, other)) return false;
        other = other->next;
    }
    return a->n == b->n;
}

// The fewest tokens that write something, and how deep what they write is nested.
typedef struct { uint32_t tokens, depth; } Cost;

static const Cost no_way = { BEYOND, 0 };

static Cost cheaper(Cost a, Cost b) {
    bool less = a.tokens < b.tokens || (a.tokens == b.tokens && a.depth < b.depth);
    return less ? a : b;
}

// One behind the other.
static Cost both_costs(Cost a, Cost b) {
    return (Cost){ plus(a.tokens, b.tokens), a.depth > b.depth ? a.depth : b.depth };
}

static Cost and_tokens(Cost a, uint32_t tokens) {
    return (Cost){ plus(a.tokens, tokens), a.depth };
}

// A text that is known: of an enum as it stands in JSON; of a member its name, "name": with both
// quotes and the colon.
typedef struct {
    const char *text;              // [length]
    uint32_t length;
    const uint32_t *left[2];       // [length + 1]: tokens to its end; to the quote that opens a
                                   // string behind it (of a member)
    // Of a member, from where it may follow: behind {, behind a comma's place, behind a quote that
    // is due and a comma's.
    uint32_t opened[2], joined[2], quoted[2];
    const Value *value;            // of a member
    uint32_t number;               // its place in the order of the schema
    bool required;
} Word;

// Numbers between bounds, in units of 10^-scale.
typedef struct {
    Wide low, high, multiple;      // inclusive; what they must be multiples of
    int scale, most_digits;        // digits after the point at most; of whole numbers (others have
                                   // 15 in all, so that every reader tells them from a bound)
    bool exponent;                 // may be written with one
} Numbers;

typedef struct {
    const Value **first;           // [n_first]: of the first items
    const Value *rest;             // of those behind them
    uint32_t n_first, least, most;
    Cost *left[2];                 // [least + 1]: tokens behind so many items; where a quote is due
} List;

// Members come in the order of the schema, optional ones may be left out. A free name may stand
// anywhere: it is none of the schema's, and was not used before.
typedef struct {
    const Word *words;             // [n], sorted by their text
    const uint32_t *order;         // [n]: the word of each member, in the schema's order
    const uint32_t *required;      // [n + 1]: how many of the members from each on are
    uint32_t n, least, most;
    Cost *left[2];                 // [n + 1][least + 1]: tokens behind a value, by the next member
                                   // that may follow and how many are still missing
    const Value *free;             // of members with free names; NULL: there are none
    Language names;                // of these
    const Word *taken;             // [n_taken], sorted: names that are not free, without quotes
    uint32_t n_taken, name_bytes;  // bytes of a free name, if members must have one; BEYOND: there
                                   // are not enough of them
    bool any_name;                 // is free, if it is not taken
    bool closed;                   // by its schema, and not only by us
} Members;

typedef struct {
    enum { WORDS, STRING, NUMBER, ARRAY, OBJECT } kind;
    bool quoted;                   // it stands in quotes
    Cost cost;                     // of it all, or of what stands between its quotes
    const Word *words;             // [n_words], sorted: WORDS
    uint32_t n_words;
    Language language;             // STRING
    Numbers numbers;               // NUMBER
    List list;                     // ARRAY
    Members members;               // OBJECT
} Atom;

// A schema that holds for a value, or what else does: it is this value; it has none of the members
// that this schema requires; one of this list's schemas holds.
typedef enum { SCHEMA, CONSTANT, FORBIDS, ONE_AMONG } EntryKind;
typedef struct { Item *item; EntryKind kind; } Entry;

typedef struct { Entry *at; int n, room; } Entries;

struct Value {
    Entries entries, key;          // all that hold; the same, sorted
    Atom **atoms;                  // [n], room for MOST_ATOMS: it is one of them
    int n;
    Bytes listed[2];               // Words that it may be: without quotes, and in them
    Cost inner, whole;             // of the cheapest in quotes, between them; of the others
};

enum {
    MOST_VALUES = 10000, MOST_ATOMS = 256, MOST_EXPANSIONS = 10000,
    MOST_WORDS = 1 << 16, USUAL_DIGITS = 15, MOST_WHOLE = 18, MOST_FORMATS = 16,
    MOST_MEMORY = 256 << 20, MOST_NAMES = 10000,
    MOST_LIVE = 64,                // alternatives of one kind, positions of a frame: the bits of
                                   // Position.serves
};

// What is being compiled, and what came of it.
typedef struct {
    Arena arena;
    const Vocabulary *vocabulary;
    Item *root;
    const Texts *ignored;          // keywords that are not enforced where they are not supported
    Texts refusals, unchecked;
    Value **values;                // [n_values]
    Item **due;                    // [n_due]: schemas that are still to be checked
    Item **one_ofs;                // [n_one_ofs]: whose alternatives must exclude each other
    int n_values, n_due, n_one_ofs, expansions;
    bool rejected;                 // whatever keywords are left out
    uint64_t cells;                // of all tables
    Arena scratch;                 // for what is not kept
    const Value *value;            // of the whole text
    uint32_t least_tokens, deepest;
    const Automaton *any;          // of all texts
    const Automaton *formats[MOST_FORMATS];    // those that were asked for
    long number;                   // of all that are made, from 1
    bool empty;                    // only the empty text fits
    int users;                     // requests that hold it
} Schema;

// #POINTER: WHY, once in its list.
static void add_reason(Texts *reasons, Item *at, const char *keyword, const char *why) {
    Bytes line = {0};
    append_string(&line, "#");
    append_pointer(&line, at);
    append_format(&line, ": %s%s%s", keyword, *keyword ? ": " : "", why);
    for (int i = 0; i < reasons->n; i++)
        if (strcmp(reasons->texts[i].data, line.data) == 0) {
            free(line.data);
            return;
        }
    add_text(reasons, line);
}

// The schema at `at` cannot be used, whatever is left out.
static void reject(Schema *c, Item *at, const char *why) {
    c->rejected = true;
    add_reason(&c->refusals, at ? at : c->root, "", why);
}

// A keyword's value is not supported, or not as it should be. It is left out, so that the reasons
// that come after it are found too; with --schema-ignore that is no fault, and remembered.
static void refuse(Schema *c, Item *keyword, const char *why) {
    bool ignored = false;
    for (int i = 0; c->ignored && i < c->ignored->n; i++)
        ignored |= strcmp(c->ignored->texts[i].data, keyword->name) == 0;
    keyword->dropped = true;
    add_reason(ignored ? &c->unchecked : &c->refusals, keyword->parent, keyword->name, why);
}

// A number that counts: not negative, and whole. At most BEYOND - 1.
static bool count_of(Item *item, uint32_t *count) {
    Decimal d;
    if (item->kind != IS_NUMBER || !decimal_of(item, &d) || d.digits < 0 || d.exponent < 0)
        return false;
    Wide n = d.digits;
    for (int i = 0; i < d.exponent && n < BEYOND; i++) n *= 10;
    *count = n < BEYOND ? (uint32_t)n : BEYOND - 1;
    return true;
}

static Item *find_anchor(Item *in, const char *name, size_t n) {
    Item *anchor = member_of(in, "$anchor"), *id = member_of(in, "id");
    if (anchor && anchor->length == n && memcmp(anchor->text, name, n) == 0) return in;
    if (id && id->length == n + 1 && *id->text == '#' && memcmp(id->text + 1, name, n) == 0)
        return in;
    for (Item *child = in->first; child; child = child->next) {
        Item *found = find_anchor(child, name, n);
        if (found) return found;
    }
    return NULL;
}

// What one name of a JSON pointer in a URI's fragment leads to.
static Item *follow_name(Arena *arena, Item *at, const char *s, size_t n) {
    char *name = take(arena, n + 1);
    size_t length = 0;
    for (size_t i = 0; i < n; i++) {
        char c = s[i];
        if (c == '%' && hex(s + i + 1, n - i - 1, 2) >= 0) {
            c = (char)hex(s + i + 1, n - i - 1, 2);
            i += 2;
        }
        if (c == '~' && i + 1 < n && (s[i + 1] == '0' || s[i + 1] == '1'))
            c = s[++i] == '0' ? '~' : '/';
        name[length++] = c;
    }
    if (at->kind == IS_OBJECT) return member_named(at, name, length);
    if (at->kind != IS_LIST || length == 0 || length > 9) return NULL;
    int index = 0;
    for (size_t i = 0; i < length; i++) {
        if (!isdigit((unsigned char)name[i])) return NULL;
        index = index * 10 + (name[i] - '0');
    }
    Item *child = at->first;
    while (child && child->index != index) child = child->next;
    return child;
}

// Where a $ref leads, or NULL. Only into the same document.
static Item *follow_reference(Schema *c, Item *reference) {
    const char *s = reference->text;
    size_t n = reference->length;
    Item *id = member_of(c->root, "$id"), *at = c->root;
    if (id == NULL) id = member_of(c->root, "id");
    size_t base = id && id->kind == IS_STRING ? id->length : 0;
    while (base && id->text[base - 1] == '#') base--;
    if (base && n >= base && memcmp(s, id->text, base) == 0 && (n == base || s[base] == '#'))
        s += base, n -= base;
    else if (n == 0 || *s != '#') return NULL;
    if (n) s++, n--;
    if (n && *s != '/') return find_anchor(c->root, s, n);
    while (at && n) {
        size_t length = 0;
        s++, n--;
        while (length < n && s[length] != '/') length++;
        at = follow_name(&c->scratch, at, s, length);
        s += length, n -= length;
    }
    return at;
}

// Formats that are enforced, as patterns of the whole text (RFC 3339, 5321, 1123, 4291, 4122, 3986;
// ISO 8601 for durations). Years begin with 1: Python knows no year 0. No leap seconds.
#define DIGITS_2(most) "(?:[0-" most "]\\d)"
#define DATE "(?:(?:\\d{3}[1-9]|\\d\\d[1-9]\\d|\\d[1-9]\\d\\d|[1-9]\\d{3})-(?:(?:0[13578]|1[02])-" \
    "(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|2[0-8]))|" \
    "(?:\\d\\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
#define HOURS "(?:[01]\\d|2[0-3])"
#define TIME HOURS ":[0-5]\\d:[0-5]\\d(?:\\.\\d+)?(?:[Zz]|[+-]" HOURS ":[0-5]\\d)"
#define IN_A_DAY "T(?:\\d+H(?:\\d+M(?:\\d+S)?)?|\\d+M(?:\\d+S)?|\\d+S)"
#define LABEL "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define HOST LABEL "(?:\\." LABEL ")*"
#define BYTE "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define IPV4 BYTE "(?:\\." BYTE "){3}"
#define H16 "[0-9A-Fa-f]{1,4}"
#define LOW_32 "(?:" H16 ":" H16 "|" IPV4 ")"
#define IPV6 "(?:(?:" H16 ":){6}" LOW_32 "|::(?:" H16 ":){5}" LOW_32 "|(?:" H16 ")?::(?:" H16 \
    ":){4}" LOW_32 "|(?:(?:" H16 ":)?" H16 ")?::(?:" H16 ":){3}" LOW_32 "|(?:(?:" H16 ":){0,2}" \
    H16 ")?::(?:" H16 ":){2}" LOW_32 "|(?:(?:" H16 ":){0,3}" H16 ")?::" H16 ":" LOW_32 "|(?:(?:" \
    H16 ":){0,4}" H16 ")?::" LOW_32 "|(?:(?:" H16 ":){0,5}" H16 ")?::" H16 "|(?:(?:" H16 \
    ":){0,6}" H16 ")?::)"
#define ATOM "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
#define PLAIN_URI "[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}"
#define SEGMENT "(?:" PLAIN_URI "|[:@])"

static const struct { const char *name, *pattern; uint32_t most; } text_formats[] = {
    { "date", DATE, BEYOND },
    { "time", TIME, BEYOND },
    { "date-time", DATE "[Tt]" TIME, BEYOND },
    { "duration", "P(?:\\d+W|(?:\\d+Y(?:\\d+M(?:\\d+D)?)?|\\d+M(?:\\d+D)?|\\d+D)(?:" IN_A_DAY ")?|"
      IN_A_DAY ")", BEYOND },
    { "email", "(?:" ATOM "(?:\\." ATOM ")*|\"(?:[ !#-\\[\\]-~]|\\\\[ -~])*\")@(?:" HOST "|\\[(?:"
      IPV4 "|IPv6:" IPV6 ")\\])", BEYOND },
    { "hostname", HOST, 253 },
    { "ipv4", IPV4, BEYOND },
    { "ipv6", IPV6, BEYOND },
    { "uuid", "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", BEYOND },
    { "uri", "[A-Za-z][A-Za-z0-9+.-]*:(?://(?:(?:" PLAIN_URI "|:)*@)?(?:\\[" IPV6 "\\]|(?:"
      PLAIN_URI ")*)(?::\\d*)?(?:/" SEGMENT "*)*|/(?:" SEGMENT "+(?:/" SEGMENT "*)*)?|" SEGMENT
      "+(?:/" SEGMENT "*)*)?(?:\\?(?:" SEGMENT "|[/?])*)?(?:#(?:" SEGMENT "|[/?])*)?", BEYOND },
};

enum { TEXT_FORMATS = sizeof text_formats / sizeof *text_formats };
_Static_assert((int)TEXT_FORMATS <= (int)MOST_FORMATS, "Schema has a place for each");

// The format that an item names, or TEXT_FORMATS.
static int format_named(Item *item) {
    int i = 0;
    while (item && i < TEXT_FORMATS && !says(item, text_formats[i].name)) i++;
    return i;
}

static void check_later(Schema *c, Item *item) {
    c->due = grow_list(c->due, c->n_due, sizeof *c->due);
    c->due[c->n_due++] = item;
}

// How a keyword's value must be, and what becomes of it.
typedef enum {
    REFUSED, REFUSED_IF_NOT_EMPTY, REFUSED_IF_TRUE, A_SCHEMA, SCHEMAS, SCHEMA_OR_LIST,
    NAMED_SCHEMAS, A_COUNT, A_NUMBER,
    A_BOUND, NAMES, A_REFERENCE, A_PATTERN, A_FORMAT, TYPE_NAMES, SOME_VALUES, A_FACTOR,
} Rule;

static const struct { const char *name; Rule rule; } keywords[] = {
    { "not", REFUSED }, { "if", REFUSED }, { "contains", REFUSED },
    { "dependencies", REFUSED_IF_NOT_EMPTY }, { "dependentRequired", REFUSED_IF_NOT_EMPTY },
    { "dependentSchemas", REFUSED_IF_NOT_EMPTY }, { "propertyNames", REFUSED_IF_NOT_EMPTY },
    { "unevaluatedItems", REFUSED_IF_NOT_EMPTY },
    { "unevaluatedProperties", REFUSED_IF_NOT_EMPTY }, { "uniqueItems", REFUSED_IF_TRUE },
    { "$dynamicRef", REFUSED }, { "$recursiveRef", REFUSED },
    { "additionalProperties", A_SCHEMA }, { "additionalItems", A_SCHEMA },
    { "items", SCHEMA_OR_LIST }, { "prefixItems", SCHEMAS }, { "allOf", SCHEMAS },
    { "anyOf", SCHEMAS }, { "oneOf", SCHEMAS }, { "properties", NAMED_SCHEMAS },
    { "patternProperties", NAMED_SCHEMAS }, { "minItems", A_COUNT }, { "maxItems", A_COUNT },
    { "minProperties", A_COUNT }, { "maxProperties", A_COUNT }, { "minLength", A_COUNT },
    { "maxLength", A_COUNT }, { "minimum", A_NUMBER }, { "maximum", A_NUMBER },
    { "exclusiveMinimum", A_BOUND }, { "exclusiveMaximum", A_BOUND }, { "multipleOf", A_FACTOR },
    { "required", NAMES }, { "$ref", A_REFERENCE }, { "pattern", A_PATTERN },
    { "format", A_FORMAT }, { "type", TYPE_NAMES }, { "enum", SOME_VALUES },
};

static void check_pattern(Schema *c, Item *item, const char *pattern, size_t n, Item *at) {
    const char *flaw;
    item->automaton = automaton_of(&c->arena, pattern, n, false, &flaw);
    c->cells += item->automaton ? item->automaton->states : 0;
    if (c->cells > MOST_NEEDS) reject(c, at, many_cells);
    if (item->automaton == NULL && flaw != nothing_matches)
        refuse(c, at, flaw);
}

static const Automaton *format_automaton(Schema *c, int format) {
    const char *flaw, *pattern = text_formats[format].pattern;
    if (c->formats[format] == NULL)
        c->formats[format] = automaton_of(&c->arena, pattern, strlen(pattern), true, &flaw);
    return c->formats[format];
}

static void check_format(Schema *c, Item *m) {
    static const char *const others[] = {
        "idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template",
        "json-pointer", "relative-json-pointer", "regex",
    };
    int i = format_named(m);
    if (i < TEXT_FORMATS)
        m->automaton = format_automaton(c, i);
    for (size_t k = 0; k < sizeof others / sizeof *others; k++)
        if (says(m, others[k])) refuse(c, m, "this format is not supported");
}

static void check_types(Schema *c, Item *m) {
    static const char *const names[] = { "null", "boolean", "object", "array", "number", "string",
                                         "integer" };
    Item *type = m->kind == IS_LIST ? m->first : m;
    if (m->kind == IS_LIST && m->n == 0) type = m;
    for (; type; type = m->kind == IS_LIST ? type->next : NULL) {
        size_t i = 0;
        while (i < 7 && !says(type, names[i])) i++;
        if (i == 7) refuse(c, m, "there is no such type");
    }
}

// A map may have one pattern for its names, and then no properties.
static void check_map(Schema *c, Item *m) {
    bool patterns = is_text(m->name, m->name_length, "patternProperties");
    Item *properties = member_of(m->parent, "properties");
    if (m->kind != IS_OBJECT) refuse(c, m, "an object was expected");
    if (patterns && (m->n > 1 || (m->n == 1 && properties && properties->n))) {
        refuse(c, m, "more than one pattern, or one beside properties, is not supported");
        return;
    }
    for (Item *s = m->first; s; s = s->next) {
        if (patterns) check_pattern(c, s, s->name, s->name_length, m);
        check_later(c, s);
    }
}

static void check_reference(Schema *c, Item *m) {
    Item *target = m->kind == IS_STRING ? follow_reference(c, m) : NULL;
    if (target) check_later(c, target);
    else refuse(c, m, "it leads to nothing in this document");
}

static void check_names(Schema *c, Item *m) {
    bool good = m->kind == IS_LIST;
    for (Item *name = m->first; name; name = name->next) good &= name->kind == IS_STRING;
    if (!good) refuse(c, m, "a list of names was expected");
}

static void check_factor(Schema *c, Item *m) {
    Decimal d;
    if (m->kind != IS_NUMBER || !decimal_of(m, &d) || d.digits <= 0)
        refuse(c, m, "a number above 0 was expected");
    else if (d.exponent < 0) refuse(c, m, "fractions are not supported");
    else if (d.exponent > MOST_WHOLE) refuse(c, m, "it is beyond 10^18");
}

static void check_value(Schema *c, Item *m, Rule rule) {
    uint32_t count;
    Decimal d;
    bool truth = m->kind == IS_TRUE || m->kind == IS_FALSE;
    switch (rule) {
    case REFUSED:
        if (is_text(m->name, m->name_length, "if") && !member_of(m->parent, "then") &&
            !member_of(m->parent, "else")) break;
        refuse(c, m, "not supported");
        break;
    case REFUSED_IF_NOT_EMPTY:                 // as a schema or a list of rules it says nothing
        if (m->kind != IS_TRUE && !(m->kind == IS_OBJECT && m->n == 0))
            refuse(c, m, "not supported");
        break;
    case REFUSED_IF_TRUE:
        if (m->kind != IS_FALSE) refuse(c, m, "not supported");
        break;
    case A_SCHEMA: check_later(c, m); break;
    case SCHEMA_OR_LIST:
        if (m->kind != IS_LIST) check_later(c, m);
        for (Item *s = m->kind == IS_LIST ? m->first : NULL; s; s = s->next) check_later(c, s);
        break;
    case SCHEMAS:
        if (m->kind != IS_LIST || m->n == 0)
            refuse(c, m, "a list of schemas was expected");
        for (Item *s = m->first; s; s = s->next) check_later(c, s);
        break;
    case NAMED_SCHEMAS: check_map(c, m); break;
    case A_COUNT:
        if (!count_of(m, &count)) refuse(c, m, "a count was expected");
        break;
    case A_BOUND:
        if (truth) break;
        // fall through
    case A_NUMBER:
        if (m->kind != IS_NUMBER || !decimal_of(m, &d))
            refuse(c, m, "a number of at most 36 digits was expected");
        break;
    case A_FACTOR: check_factor(c, m); break;
    case NAMES: check_names(c, m); break;
    case A_REFERENCE: check_reference(c, m); break;
    case A_PATTERN:
        if (m->kind != IS_STRING) refuse(c, m, "a string was expected");
        else check_pattern(c, m, m->text, m->length, m);
        break;
    case A_FORMAT: check_format(c, m); break;
    case TYPE_NAMES: check_types(c, m); break;
    case SOME_VALUES:
        if (m->kind != IS_LIST || m->n == 0)
            refuse(c, m, "a list of values was expected");
        if (m->n > MOST_WORDS) refuse(c, m, "more than 65536 values");
        break;
    }
}

// Is there a way from a schema back to itself on which nothing is written?
static bool has_cycle(Schema *c, Item *item, int depth) {
    static const char *const lists[] = { "allOf", "anyOf", "oneOf" };
    enum { LONGEST_CHAIN = 2000 };
    if (item->on_path || depth > LONGEST_CHAIN) return true;
    if (item->no_cycle || item->kind != IS_OBJECT) return false;
    item->on_path = true;
    Item *reference = member_of(item, "$ref");
    bool found = false;
    if (reference && reference->kind == IS_STRING) {
        Item *target = follow_reference(c, reference);
        found = target && has_cycle(c, target, depth + 1);
    }
    for (int i = 0; i < 3 && !found; i++) {
        Item *list = member_of(item, lists[i]);
        for (Item *s = list ? list->first : NULL; s && !found; s = s->next)
            found = has_cycle(c, s, depth + 1);
    }
    item->on_path = false, item->no_cycle = true;
    return found;
}

// All schemas that the root leads to.
static void check_schemas(Schema *c) {
    check_later(c, c->root);
    while (c->n_due > 0) {
        Item *item = c->due[--c->n_due];
        if (item->checked || item->kind == IS_TRUE || item->kind == IS_FALSE) continue;
        item->checked = true;
        if (item->kind != IS_OBJECT) {
            reject(c, item, "an object, true or false was expected");
            continue;
        }
        for (Item *m = item->first; m; m = m->next)
            for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
                if (is_text(m->name, m->name_length, keywords[i].name))
                    check_value(c, m, keywords[i].rule);
        if (!c->rejected && has_cycle(c, item, 0))
            reject(c, item, "it leads back to itself, and nothing is written on the way");
    }
}

// With one more, which may stand in the same memory: whoever goes on with both copies them.
static Entries with_entry(Schema *c, Entries e, Item *item, EntryKind kind) {
    enum { FIRST_ROOM = 4 };
    if (e.n == e.room) {
        e.room = e.room ? 2 * e.room : FIRST_ROOM;
        Entry *more = take(&c->scratch, (size_t)e.room * sizeof *more);
        if (e.n) memcpy(more, e.at, (size_t)e.n * sizeof *more);
        e.at = more;
    }
    e.at[e.n++] = (Entry){ item, kind };
    return e;
}

static Entries copy_entries(Arena *arena, Entries e) {
    return (Entries){ take_copy(arena, e.at, (size_t)e.n * sizeof *e.at), e.n, e.n };
}

static bool holds_entry(Entries e, Entry one) {
    for (int i = 0; i < e.n; i++)
        if (e.at[i].item == one.item && e.at[i].kind == one.kind) return true;
    return false;
}

static int by_entry(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    if (x->item != y->item) return x->item->source < y->item->source ? -1 : 1;
    return (int)x->kind - (int)y->kind;
}

static bool same_entries(Entries a, Entries b) {
    bool same = a.n == b.n;
    for (int i = 0; i < a.n && same; i++)
        same = a.at[i].item == b.at[i].item && a.at[i].kind == b.at[i].kind;
    return same;
}

// The value for which all of these hold: the one that is known already, or a new one, not built.
static Value *value_of(Schema *c, Entries e) {
    Entries once = { .n = 0 };
    for (int i = 0; i < e.n; i++)
        if (!holds_entry(once, e.at[i])) once = with_entry(c, once, e.at[i].item, e.at[i].kind);
    Entries sorted = copy_entries(&c->scratch, once);
    if (sorted.n) qsort(sorted.at, (size_t)sorted.n, sizeof *sorted.at, by_entry);
    for (int i = 0; i < c->n_values; i++)
        if (same_entries(c->values[i]->key, sorted)) return c->values[i];
    if (c->n_values == MOST_VALUES) {
        reject(c, c->root, "more than 10000 values, after merging");
        return c->values[0];
    }
    Value *v = take(&c->arena, sizeof *v);
    *v = (Value){ .entries = copy_entries(&c->arena, once), .inner = no_way, .whole = no_way,
                  .key = copy_entries(&c->arena, sorted) };
    c->values = grow_list(c->values, c->n_values, sizeof *c->values);
    return c->values[c->n_values++] = v;
}

static Item *first_item(Entries flat) { return flat.n ? flat.at[0].item : NULL; }

static void add_atom(Schema *c, Value *v, Atom atom) {
    int alike = 0;
    for (int i = 0; i < v->n; i++) alike += v->atoms[i]->kind == atom.kind;
    if (alike == MOST_LIVE) {
        reject(c, first_item(v->entries), "more than 64 alternatives of one kind");
        return;
    }
    if (v->n == MOST_ATOMS) {
        reject(c, first_item(v->entries), "more than 256 alternatives of one value");
        return;
    }
    if (v->n == 0) v->atoms = take(&c->arena, MOST_ATOMS * sizeof *v->atoms);
    atom.cost = no_way;
    v->atoms[v->n++] = take_copy(&c->arena, &atom, sizeof atom);
}

// A string of JSON, with the escapes that we write, quotes around it.
static void append_quoted(Bytes *out, const char *s, size_t n) {
    static const char named[] = "\b\f\n\r\t\"\\", letters[] = "bfnrt\"\\";
    append_string(out, "\"");
    for (size_t i = 0; i < n; i++) {
        const char *name = s[i] ? strchr(named, s[i]) : NULL;
        if (name) append_format(out, "\\%c", letters[name - named]);
        else if ((uint8_t)s[i] < 0x20) append_format(out, "\\u%04x", (unsigned)(uint8_t)s[i]);
        else append(out, s + i, 1);
    }
    append_string(out, "\"");
}

// "name":
static void append_name(Bytes *out, const char *name, size_t n) {
    append_quoted(out, name, n);
    append_string(out, ":");
}

// A number as it is written: whole ones without a point.
static void append_decimal(Bytes *out, Decimal d) {
    char digits[MOST_DIGITS + 1];
    int n = 0, point = 0;
    bool far = d.exponent > MOST_WHOLE || decimal_digits(d) + d.exponent < -5;
    int exponent = far ? d.exponent : 0;       // written as such
    d.exponent -= exponent;
    if (d.digits < 0) append_string(out, "-"), d.digits = -d.digits;
    for (Wide rest = d.digits; rest || n == 0; rest /= 10) digits[n++] = (char)('0' + rest % 10);
    point = -d.exponent;
    for (int i = n > point ? n - 1 : point; i >= 0; i--) {
        if (i == point - 1) append_string(out, ".");
        append(out, i < n ? digits + i : "0", 1);
    }
    for (int i = 0; i < d.exponent; i++) append_string(out, "0");
    if (exponent) append_format(out, "e%d", exponent);
}

// A value without children, as it is written.
static void append_scalar(Bytes *out, Item *item) {
    Decimal d;
    if (item->kind == IS_STRING) append_quoted(out, item->text, item->length);
    else if (item->kind == IS_NUMBER && decimal_of(item, &d)) append_decimal(out, d);
    else append(out, item->source, item->size);
}

// A word of a value, once.
static void list_word(Schema *c, Value *v, Item *item) {
    Bytes text = {0};
    bool quoted = item->kind == IS_STRING;
    append_scalar(&text, item);
    Word word = { .text = take_copy(&c->arena, text.data, text.size + 1),
                  .length = (uint32_t)text.size };
    append(&v->listed[quoted], &word, sizeof word);
    free(text.data);
}

// What the keyword is in each schema that holds: goes through the entries from *at on.
static Item *next_keyword(Entries flat, const char *keyword, int *at) {
    while (*at < flat.n) {
        const Entry *e = &flat.at[(*at)++];
        Item *found = e->kind == SCHEMA ? member_of(e->item, keyword) : NULL;
        if (found) return found;
    }
    return NULL;
}

// The largest (or least) of a count in the schemas that hold.
static uint32_t merged_count(Entries flat, const char *keyword, bool largest, uint32_t without) {
    uint32_t count, merged = without;
    Item *m;
    for (int at = 0; (m = next_keyword(flat, keyword, &at)) != NULL;)
        if (count_of(m, &count) && (largest ? count > merged : count < merged)) merged = count;
    return merged;
}

enum { T_NULL = 1, T_BOOLEAN = 2, T_STRING = 4, T_INTEGER = 8, T_FRACTION = 16, T_ARRAY = 32,
       T_OBJECT = 64, T_ALL = 127 };

// The types that all schemas allow, as bits.
static int merged_types(Entries flat) {
    static const struct { const char *name; int bits; } names[] = {
        { "null", T_NULL }, { "boolean", T_BOOLEAN }, { "string", T_STRING },
        { "integer", T_INTEGER }, { "number", T_INTEGER | T_FRACTION }, { "array", T_ARRAY },
        { "object", T_OBJECT },
    };
    int types = T_ALL;
    Item *m;
    for (int at = 0; (m = next_keyword(flat, "type", &at)) != NULL;) {
        int its = 0;
        for (Item *t = m->kind == IS_LIST ? m->first : m; t;
             t = m->kind == IS_LIST ? t->next : NULL)
            for (size_t i = 0; i < sizeof names / sizeof *names; i++)
                if (says(t, names[i].name)) its |= names[i].bits;
        types &= its;
    }
    for (int i = 0; i < flat.n; i++)           // what is no object would fit all of a oneOf
        if (flat.at[i].kind == FORBIDS) types &= T_OBJECT;
    return types;
}

// What the patterns, formats and lengths of all schemas allow. NULL, or why it cannot be; the flaw
// is nothing_matches if no string is allowed.
static const char *merged_language(Schema *c, Entries flat, Language *l) {
    static const char *const keys[] = { "pattern", "format" };
    const Automaton *both = NULL;
    const char *flaw = NULL;
    *l = (Language){ .least = merged_count(flat, "minLength", true, 0), .json = true,
                     .most = merged_count(flat, "maxLength", false, BEYOND - 1) };
    Item *m;
    for (int k = 0; k < 2; k++)
        for (int at = 0; !flaw && (m = next_keyword(flat, keys[k], &at)) != NULL;) {
            if (k == 0 && m->automaton == NULL) return nothing_matches;
            if (m->automaton == NULL) continue;
            if (both == NULL) both = m->automaton;
            else if (both != m->automaton)
                both = automaton_of_both(&c->arena, both, m->automaton, &flaw);
            if (k == 1) l->most = lesser(l->most, text_formats[format_named(m)].most);
            l->formatted |= k == 1;
        }
    if (flaw) return flaw;
    l->automaton = both ? both : c->any;
    return l->least > l->most ? nothing_matches : NULL;
}

static void add_strings(Schema *c, Value *v, Entries flat) {
    Atom atom = { .kind = STRING, .quoted = true };
    const char *flaw = merged_language(c, flat, &atom.language);
    if (!flaw) flaw = find_needs(&c->arena, &atom.language, &c->cells);
    if (flaw && flaw != nothing_matches) reject(c, first_item(flat), flaw);
    if (!flaw && lives(&atom.language, 0, 0)) add_atom(c, v, atom);
}

static Wide power_of_10(int n) {
    Wide power = 1;
    while (n-- > 0) power *= 10;
    return power;
}

// A number in units of 10^-scale, rounded up or down. Beyond 10^MOST_WHOLE it is that.
static Wide in_units(Decimal d, int scale, bool up) {
    Wide most = power_of_10(MOST_WHOLE + scale);
    int shift = d.exponent + scale;
    Wide units = d.digits;
    for (; shift > 0; shift--) {
        units *= 10;
        if (units > most || units < -most) break;
    }
    Wide rest = 0;
    for (; shift < 0 && units; shift++) {
        rest |= units % 10;
        units /= 10;
    }
    if (rest > 0 && up) units++;
    if (rest < 0 && !up) units--;
    return units > most ? most : units < -most ? -most : units;
}

// Digits before the point, and behind it.
static int whole_digits(Decimal d) {
    int n = decimal_digits(d) + d.exponent;
    return n > 0 ? n : 0;
}

static int fraction_digits(Decimal d) { return d.exponent < 0 ? -d.exponent : 0; }

// A bound is one of these keywords; drafts up to 4 say with a boolean whether it is exclusive.
typedef struct { const char *keyword, *exclusive; bool low; } Bound;

static const Bound bounds[] = {
    { "minimum", "exclusiveMinimum", true }, { "maximum", "exclusiveMaximum", false },
    { "exclusiveMinimum", NULL, true }, { "exclusiveMaximum", NULL, false },
};

// Goes through all bounds: each as a number, and whether it is exclusive.
static Item *next_bound(Entries flat, int bound, int *at, Decimal *d, bool *exclusive) {
    Item *m;
    while ((m = next_keyword(flat, bounds[bound].keyword, at)) != NULL) {
        if (m->kind != IS_NUMBER) continue;
        Item *by = bounds[bound].exclusive ? member_of(m->parent, bounds[bound].exclusive) : NULL;
        *exclusive = bounds[bound].exclusive == NULL || (by && by->kind == IS_TRUE);
        decimal_of(m, d);
        return m;
    }
    return NULL;
}

static Wide common_divisor(Wide a, Wide b) { return b ? common_divisor(b, a % b) : a; }

// The numbers that all schemas allow. False: there are none.
static bool merged_range(Schema *c, Entries flat, bool whole, Numbers *r) {
    int most_fraction = 0, most_whole = 0, n_bounds = 0;
    Decimal d;
    bool exclusive;
    Item *m;
    *r = (Numbers){ .multiple = 1 };
    for (int at = 0; (m = next_keyword(flat, "multipleOf", &at)) != NULL; whole = true) {
        if (!decimal_of(m, &d) || d.exponent < 0) return whole;
        Wide factor = in_units(d, 0, true), both = common_divisor(r->multiple, factor);
        r->multiple = r->multiple / both * factor;
        if (r->multiple > power_of_10(MOST_WHOLE)) r->multiple = power_of_10(MOST_WHOLE);
    }
    for (int i = 0; i < 4; i++)
        for (int at = 0; next_bound(flat, i, &at, &d, &exclusive); n_bounds++) {
            if (fraction_digits(d) > most_fraction) most_fraction = fraction_digits(d);
            if (whole_digits(d) > most_whole) most_whole = whole_digits(d);
        }
    int behind = most_fraction + 1 < USUAL_DIGITS ? USUAL_DIGITS : most_fraction + 1;
    r->scale = whole ? 0 : behind < MOST_WHOLE ? behind : MOST_WHOLE;
    r->most_digits = USUAL_DIGITS;
    if (most_whole > MOST_WHOLE) most_whole = MOST_WHOLE;
    if (most_whole > USUAL_DIGITS) r->most_digits = MOST_WHOLE;
    r->high = power_of_10(MOST_WHOLE + r->scale) - 1, r->low = -r->high;
    for (int i = 0; i < 4; i++)
        for (int at = 0; (m = next_bound(flat, i, &at, &d, &exclusive)) != NULL;) {
            Wide units = in_units(d, r->scale, bounds[i].low);
            bool exact = in_units(d, r->scale, !bounds[i].low) == units;
            Wide step = exclusive && exact;
            if (bounds[i].low && units + step > r->low) r->low = units + step;
            if (!bounds[i].low && units - step < r->high) r->high = units - step;
            if (r->low > power_of_10(MOST_WHOLE + r->scale) - 1 ||
                r->high < 1 - power_of_10(MOST_WHOLE + r->scale))
                reject(c, m, "no number below 10^18 is left");
        }
    r->exponent = !whole && n_bounds == 0;
    return r->low <= r->high;
}

// Is there a multiple of `step` between two numbers that are not negative?
static bool has_multiple(Wide low, Wide high, Wide step) {
    return low <= high && high / step * step >= low;
}

// What is written of a number: its digits as one, how many stand before the point and behind it.
typedef struct {
    Wide digits;
    uint8_t whole, fraction;
    bool negative, pointed;
    uint8_t exponent;              // 0: there is none; else 1 + its digits
    bool signed_exponent;
} Digits;

// Is one of the numbers in the range that have `more` digits more before the point and `behind` in
// all behind it, of which those written are the first?
static bool reaches(const Numbers *r, const Digits *d, int more, int behind) {
    Wide low = d->digits * power_of_10(more), high = low + power_of_10(more) - 1;
    Wide unit = power_of_10(r->scale - behind);
    if (d->whole == 0 && more > 1) low = power_of_10(more - 1);        // no leading zeros
    int shift = r->scale - d->fraction;
    low *= power_of_10(shift), high = high * power_of_10(shift) + power_of_10(shift) - unit;
    Wide least = d->negative ? -r->high : r->low, most = d->negative ? -r->low : r->high;
    if (least < d->negative) least = d->negative;          // there is no -0
    if (low < least) low = least;
    if (high > most) high = most;
    return has_multiple(low, high, r->scale ? unit : r->multiple);
}

// The fewest bytes that make it a number of the range; 0: it is one.
static uint32_t digits_left(const Numbers *r, const Digits *d) {
    if (d->exponent) return d->exponent == 1;
    bool ends = d->pointed ? d->fraction > 0 : d->whole > 0;
    if (ends && reaches(r, d, 0, d->fraction)) return 0;
    uint32_t best = BEYOND;
    int room = r->most_digits - d->whole - d->fraction, most = room;
    if (d->pointed || (d->whole && d->digits == 0)) most = 0;
    if (d->whole + most > MOST_WHOLE) most = MOST_WHOLE - d->whole;
    for (int more = d->whole == 0; more <= most; more++) {
        int behind = d->pointed ? d->fraction + (d->fraction == 0) : 0;
        int most_behind = USUAL_DIGITS - d->whole - more;
        if (most_behind > r->scale) most_behind = r->scale;
        if (most_behind < 0) most_behind = 0;  // whole numbers may have more digits
        if (behind > most_behind || !reaches(r, d, more, most_behind)) continue;
        while (!reaches(r, d, more, behind)) behind++;     // it ends at most_behind
        best = lesser(best, (uint32_t)(more + behind - d->fraction + (behind && !d->pointed)));
    }
    return best;
}

static void add_numbers(Schema *c, Value *v, Entries flat, bool whole) {
    Atom atom = { .kind = NUMBER };
    if (!merged_range(c, flat, whole, &atom.numbers)) return;
    Digits none = {0}, minus = { .negative = true };
    if (lesser(digits_left(&atom.numbers, &none), digits_left(&atom.numbers, &minus)) < BEYOND)
        add_atom(c, v, atom);
}

// A number modulo a whole one of at most 10^MOST_WHOLE, neither negative.
static Wide remainder_of(Decimal d, Wide divisor) {
    Wide rest = d.digits % divisor;
    for (int i = 0; i < d.exponent && rest; i++) rest = rest * 10 % divisor;
    return rest;
}

// Less than 0, 0 or more, as x is less than y, equal or more: exactly.
static int compare_decimals(Decimal x, Decimal y) {
    int sign_x = x.digits < 0 ? -1 : x.digits > 0, sign_y = y.digits < 0 ? -1 : y.digits > 0;
    if (sign_x != sign_y || sign_x == 0) return sign_x - sign_y;
    int whole_x = decimal_digits(x) + x.exponent, whole_y = decimal_digits(y) + y.exponent;
    if (whole_x != whole_y) return whole_x < whole_y ? -sign_x : sign_x;
    for (; x.exponent > y.exponent; x.exponent--) x.digits *= 10;      // as many as the other has
    for (; y.exponent > x.exponent; y.exponent--) y.digits *= 10;
    return x.digits < y.digits ? -1 : x.digits > y.digits;
}

static bool fits_number(Schema *c, Entries flat, Item *v) {
    Decimal d, bound;
    bool exclusive;
    Item *m;
    if (!decimal_of(v, &d)) {
        reject(c, v, "a number of more than 36 digits");
        return false;
    }
    for (int i = 0; i < 4; i++)
        for (int at = 0; next_bound(flat, i, &at, &bound, &exclusive);) {
            int order = bounds[i].low ? compare_decimals(d, bound) : compare_decimals(bound, d);
            if (order < 0 || (order == 0 && exclusive)) return false;
        }
    if (d.digits < 0) d.digits = -d.digits;
    for (int at = 0; (m = next_keyword(flat, "multipleOf", &at)) != NULL;) {
        decimal_of(m, &bound);
        if (d.exponent < 0 || remainder_of(d, in_units(bound, 0, true))) return false;
    }
    return true;
}

// Does a value that stands in the schema fit all of them? Of one with children only what it is.
static bool fits_scalar(Schema *c, Entries flat, Item *v) {
    Decimal d;
    static const int type_of[] = { T_NULL, T_BOOLEAN, T_BOOLEAN, T_INTEGER | T_FRACTION, T_STRING,
                                   T_ARRAY, T_OBJECT };
    int its = type_of[v->kind];
    if (v->kind == IS_NUMBER && decimal_of(v, &d)) its = d.exponent < 0 ? T_FRACTION : T_INTEGER;
    if (!(merged_types(flat) & its)) return false;
    for (int i = 0; i < flat.n; i++) {
        if (flat.at[i].kind == CONSTANT && !same_item(flat.at[i].item, v)) return false;
        if (flat.at[i].kind != SCHEMA) continue;
        Item *constant = member_of(flat.at[i].item, "const");
        Item *listed = member_of(flat.at[i].item, "enum");
        if (constant && !same_item(constant, v)) return false;
        if (listed == NULL || listed == v->parent) continue;
        Item *found = listed->first;
        while (found && !same_item(found, v)) found = found->next;
        if (!found) return false;
    }
    return v->kind != IS_NUMBER || fits_number(c, flat, v);
}

// The schemas of an array's items by their place: the list of the first ones, and the one of the
// rest, each NULL if there is none. Drafts before 2020-12 call them otherwise.
static void find_items(Item *schema, Item **first, Item **rest) {
    Item *items = member_of(schema, "items"), *prefix = member_of(schema, "prefixItems");
    bool old = items && items->kind == IS_LIST;
    *first = old ? items : prefix;
    *rest = old ? member_of(schema, "additionalItems") : items;
}

// The value at a place of an array; place -1: behind all that have a schema of their own.
static const Value *value_at(Schema *c, Entries flat, int place) {
    Entries e = {0};
    for (int i = 0; i < flat.n; i++) {
        Item *first = NULL, *rest = NULL, *child;
        if (flat.at[i].kind == SCHEMA) find_items(flat.at[i].item, &first, &rest);
        if (flat.at[i].kind == CONSTANT) first = flat.at[i].item;
        child = first ? first->first : NULL;
        while (child && child->index != place) child = child->next;
        if (child == NULL) child = rest;
        if (child) e = with_entry(c, e, child, child == rest ? SCHEMA : flat.at[i].kind);
    }
    return value_of(c, e);
}

static void add_array(Schema *c, Value *v, Entries flat) {
    Atom atom = { .kind = ARRAY };
    List *l = &atom.list;
    l->least = merged_count(flat, "minItems", true, 0);
    l->most = merged_count(flat, "maxItems", false, BEYOND - 1);
    for (int i = 0; i < flat.n; i++) {
        Item *first = NULL, *rest;
        if (flat.at[i].kind == SCHEMA) find_items(flat.at[i].item, &first, &rest);
        if (flat.at[i].kind == CONSTANT) {
            first = flat.at[i].item;
            uint32_t n = (uint32_t)first->n;
            if (n < l->least) return;
            l->least = n, l->most = lesser(l->most, n);
        }
        if (first && (uint32_t)first->n > l->n_first) l->n_first = (uint32_t)first->n;
    }
    if (l->least > l->most) return;
    c->cells += l->least + 1;
    if (c->cells > MOST_NEEDS) {
        reject(c, first_item(flat), many_cells);
        return;
    }
    l->first = take(&c->arena, (l->n_first + 1) * sizeof *l->first);
    for (uint32_t i = 0; i < l->n_first; i++) l->first[i] = value_at(c, flat, (int)i);
    l->rest = value_at(c, flat, -1);
    for (int quoted = 0; quoted < 2; quoted++) {
        Cost *left = take(&c->arena, (l->least + 1) * sizeof *left);
        for (uint32_t i = 0; i <= l->least; i++) left[i] = no_way;
        l->left[quoted] = left;
    }
    add_atom(c, v, atom);
}

typedef struct { const char *text; size_t n; bool forbidden, required; } Name;
typedef struct { Name *at; int n; size_t room; bool impossible; } Names;

// Adds a name, or finds it. Beyond MOST_NAMES nothing is looked for: the object is rejected.
static Name *find_name(Names *names, const char *text, size_t n) {
    if (names->n > MOST_NAMES) return &names->at[MOST_NAMES];
    for (int i = 0; i < names->n; i++)
        if (names->at[i].n == n && memcmp(names->at[i].text, text, n) == 0) return &names->at[i];
    names->at = grow(names->at, &names->room, ((size_t)names->n + 1) * sizeof *names->at);
    names->at[names->n] = (Name){ .text = text, .n = n };
    return &names->at[names->n++];
}

// The names that the schemas speak of: those that have a schema in their order, then others that
// are required, then others that are forbidden.
static Names find_names(Entries flat) {
    Names names = {0};
    for (int i = 0; i < flat.n; i++) {
        Item *object = flat.at[i].item;
        bool constant = flat.at[i].kind == CONSTANT;
        Item *properties = constant ? object : member_of(object, "properties");
        for (Item *m = properties && flat.at[i].kind != FORBIDS ? properties->first : NULL; m;
             m = m->next)
            find_name(&names, m->name, m->name_length)->required |= constant;
    }
    for (int i = 0; i < flat.n; i++) {
        Item *required = flat.at[i].kind == SCHEMA ? member_of(flat.at[i].item, "required") : NULL;
        for (Item *m = required ? required->first : NULL; m; m = m->next)
            find_name(&names, m->text, m->length)->required = true;
    }
    for (int i = 0; i < flat.n; i++) {         // not all of these: none that is not required
        if (flat.at[i].kind != FORBIDS) continue;
        bool any = false;
        for (Item *m = member_of(flat.at[i].item, "required")->first; m; m = m->next) {
            Name *name = find_name(&names, m->text, m->length);
            if (!name->required) name->forbidden = any = true;
        }
        names.impossible |= !any;
    }
    return names;
}

// The only pattern of a map's names, or NULL.
static Item *map_of(Item *schema) {
    Item *patterns = member_of(schema, "patternProperties");
    return patterns && patterns->n == 1 ? patterns->first : NULL;
}

// May this name be a member of such a map?
static bool map_holds(const Item *map, const Name *name) {
    Language l = { .automaton = map->automaton, .most = BEYOND };
    return map->automaton && language_holds(&l, name->text, name->n);
}

// The value of a member; NULL: it cannot be there.
static const Value *value_named(Schema *c, Entries flat, const Name *name) {
    Entries e = {0};
    for (int i = 0; i < flat.n; i++) {
        Item *object = flat.at[i].item, *its = NULL;
        if (flat.at[i].kind == FORBIDS) continue;
        if (flat.at[i].kind == CONSTANT) {
            its = member_named(object, name->text, name->n);
            if (its == NULL) return NULL;
            e = with_entry(c, e, its, CONSTANT);
            continue;
        }
        its = member_named(member_of(object, "properties"), name->text, name->n);
        Item *map = map_of(object);
        if (!its && map && map_holds(map, name)) its = map;
        if (!its) its = member_of(object, "additionalProperties");
        if (its) e = with_entry(c, e, its, SCHEMA);
    }
    return name->forbidden ? NULL : value_of(c, e);
}

// What members with free names are, and which names these are. An object that names its members
// has no others unless its schema says so: what we write is then sure to fit.
static const char *find_free(Schema *c, Entries flat, Members *m) {
    Entries e = {0};
    const Automaton *both = NULL;
    const char *flaw = NULL;
    bool open = true;
    for (int i = 0; i < flat.n && !flaw; i++) {
        Item *object = flat.at[i].item;
        if (flat.at[i].kind == CONSTANT) open = false, m->closed = true;
        if (flat.at[i].kind != SCHEMA) continue;
        Item *more = member_of(object, "additionalProperties"), *map = map_of(object);
        Item *properties = member_of(object, "properties");
        if (more && more->kind == IS_FALSE) m->closed = true;
        if (!map && (more ? more->kind == IS_FALSE : properties && properties->n)) open = false;
        if (map && map->automaton == NULL) open = false;
        else if (map && both == NULL) both = map->automaton;
        else if (map && both != map->automaton)
            both = automaton_of_both(&c->arena, both, map->automaton, &flaw);
        if (map || more) e = with_entry(c, e, map ? map : more, SCHEMA);
    }
    m->names = (Language){ .automaton = both ? both : c->any, .most = BEYOND - 1, .json = true };
    m->any_name = both == NULL;
    if (!flaw) flaw = find_needs(&c->arena, &m->names, &c->cells);
    if (open && !flaw) m->free = value_of(c, e);
    return flaw == nothing_matches ? NULL : flaw;
}

// The word of a member's name, with what it costs from where it may follow.
static Word name_word(Schema *c, const Name *name) {
    static const char *const ends[] = { "", "\"" };
    Bytes text = {0};
    append_string(&text, "\",");
    append_name(&text, name->text, name->n);
    Word w = { .length = (uint32_t)text.size - 2, .required = name->required };
    w.text = (char *)take_copy(&c->arena, text.data, text.size + 1) + 2;
    for (int quote = 0; quote < 2; quote++) {
        uint32_t *left = take(&c->arena, (text.size + 2) * sizeof *left), opened;
        append_string(&text, ends[quote]);
        count_tokens(c->vocabulary, text.data, text.size, left);
        w.quoted[quote] = left[0], w.joined[quote] = left[1], w.left[quote] = left + 2;
        text.data[1] = '{';
        uint32_t *from = take(&c->arena, (text.size + 2) * sizeof *from);
        count_tokens(c->vocabulary, text.data + 1, text.size - 1, from);
        opened = from[0];
        text.data[1] = ',';
        w.opened[quote] = opened;
    }
    free(text.data);
    return w;
}

static int by_word(const void *a, const void *b) {
    const Word *x = a, *y = b;
    int order = memcmp(x->text, y->text, lesser(x->length, y->length));
    return order ? order : x->length < y->length ? -1 : x->length > y->length;
}

// How many names a language has up to so many bytes, or in all: at most `most`, and then *bytes is
// the least length that has as many.
static uint32_t count_names(Arena *arena, const Language *l, uint32_t most, uint32_t *bytes) {
    enum { LONGEST_NAME = 64 };
    const Automaton *a = l->automaton;
    uint32_t total = 0;
    // ways[length][state]: texts of so many bytes from the first state to this one
    uint32_t *ways = take(arena, (LONGEST_NAME + 1) * a->states * sizeof *ways);
    memset(ways, 0, (LONGEST_NAME + 1) * a->states * sizeof *ways);
    ways[0] = 1;
    for (*bytes = 0; *bytes <= LONGEST_NAME; ++*bytes) {
        uint32_t *from = ways + *bytes * a->states;
        for (uint32_t state = 0; state < a->states; state++)
            if (a->accepts[state]) total = plus(total, from[state]);
        if (total >= most) return most;
        for (uint32_t i = 0; i < a->spans; i++) {      // of a span's first characters at least
            uint32_t class = a->class_of[i], weight = char_bytes(a->starts[i], true);
            uint32_t last = i + 1 < a->spans ? a->starts[i + 1] : MOST_CODE + 1, n = 0;
            for (uint32_t code = a->starts[i]; code < last && code < a->starts[i] + 128; code++)
                n += char_bytes(code, true) == weight;
            for (uint32_t state = 0; state < a->states; state++) {
                uint32_t next = a->next[state * a->classes + class];
                if (next == NO_STATE || *bytes + weight > LONGEST_NAME) continue;
                uint32_t *to = &ways[(*bytes + weight) * a->states + next];
                *to = plus(*to, from[state] < BEYOND / 128 ? from[state] * n : BEYOND);
            }
        }
    }
    return total;
}

// Where an object must have members, free names are counted, so that there are always enough.
static bool count_free_names(Schema *c, Members *m) {
    uint32_t most = m->least - lesser(m->least, m->required[0]) + m->n_taken, found;
    if (m->least == 0 || m->free == NULL) return true;
    found = count_names(&c->arena, &m->names, most, &m->name_bytes);
    if (found < most) m->name_bytes = BEYOND;
    return found >= most;
}

static void add_object(Schema *c, Value *v, Entries flat) {
    Atom atom = { .kind = OBJECT };
    Members *m = &atom.members;
    m->least = merged_count(flat, "minProperties", true, 0);
    m->most = merged_count(flat, "maxProperties", false, BEYOND - 1);
    const char *flaw = find_free(c, flat, m);
    if (flaw) reject(c, first_item(flat), flaw);
    Names names = find_names(flat);
    if (names.n > MOST_NAMES) {
        reject(c, first_item(flat), "more than 10000 members");
        free(names.at);
        return;
    }
    size_t n = (size_t)names.n;
    Word *words = take(&c->arena, (n + 1) * sizeof *words);
    Word *taken = take(&c->arena, (n + 1) * sizeof *taken);
    bool possible = m->least <= m->most && !names.impossible;
    for (int i = 0; i < names.n; i++) {
        const Value *value = value_named(c, flat, &names.at[i]);
        Word w = name_word(c, &names.at[i]);
        taken[m->n_taken++] = (Word){ .text = w.text + 1, .length = w.length - 3 };
        w.value = value, w.number = m->n;
        if (value) words[m->n++] = w;
        else possible &= !names.at[i].required;
    }
    free(names.at);
    uint32_t *order = take(&c->arena, (m->n + 1) * sizeof *order);
    uint32_t *required = take(&c->arena, (m->n + 1) * sizeof *required);
    required[m->n] = 0;
    for (uint32_t i = m->n; i-- > 0;) required[i] = required[i + 1] + words[i].required;
    if (m->n) qsort(words, m->n, sizeof *words, by_word);
    if (m->n_taken) qsort(taken, m->n_taken, sizeof *taken, by_word);
    for (uint32_t i = 0; i < m->n; i++) order[words[i].number] = i;
    m->words = words, m->taken = taken, m->order = order, m->required = required;
    if (!possible || required[0] > m->most) return;
    c->cells += (m->n + 1ull) * (m->least + 1ull);
    if (c->cells > MOST_NEEDS) {
        reject(c, first_item(flat), many_cells);
        return;
    }
    if (!count_free_names(c, m) && m->least > m->n) return;
    for (int quoted = 0; quoted < 2; quoted++) {
        size_t size = (m->n + 1) * (m->least + 1);
        Cost *left = take(&c->arena, size * sizeof *left);
        for (size_t i = 0; i < size; i++) left[i] = no_way;
        m->left[quoted] = left;
    }
    add_atom(c, v, atom);
}

// A value behind a text that takes so many tokens without the quote that opens a string, and with
// it; and what follows the value, without and with a quote that is due.
static Cost value_cost(const Value *v, uint32_t without, uint32_t with, Cost after,
                       Cost after_quoted) {
    return cheaper(and_tokens(both_costs(v->whole, after), without),
                   and_tokens(both_costs(v->inner, after_quoted), with));
}

static const Value *item_value(const List *l, uint32_t place) {
    return place < l->n_first ? l->first[place] : l->rest;
}

// Behind so many items of an array.
static Cost list_left(const List *l, uint32_t count, bool quoted) {
    return l->left[quoted][lesser(count, l->least)];
}

static Cost update_list(const Vocabulary *v, List *l) {
    Cost *plain = l->left[0], *quoted = l->left[1];
    plain[l->least] = (Cost){ v->glue[CLOSE_LIST], 0 };
    quoted[l->least] = (Cost){ v->glue[QUOTE_CLOSE_LIST], 0 };
    uint32_t comma = v->glue[COMMA], comma_quote = v->glue[COMMA_QUOTE];
    uint32_t quote_comma = v->glue[QUOTE_COMMA], both = v->glue[QUOTE_COMMA_QUOTE];
    for (uint32_t i = l->least; i-- > 1;) {
        const Value *item = item_value(l, i);
        plain[i] = value_cost(item, comma, comma_quote, plain[i + 1], quoted[i + 1]);
        quoted[i] = value_cost(item, quote_comma, both, plain[i + 1], quoted[i + 1]);
    }
    if (l->least == 0) return (Cost){ v->glue[EMPTY_LIST], 0 };
    return value_cost(item_value(l, 0), v->glue[OPEN_LIST], v->glue[OPEN_LIST_QUOTE], plain[1],
                      quoted[1]);
}

// Behind a member's value: of the members the next one may be `next`, so many have been written.
static Cost members_left(const Members *m, uint32_t next, uint32_t count, bool quoted) {
    uint32_t missing = count < m->least ? m->least - count : 0;
    return m->left[quoted][next * (m->least + 1) + missing];
}

// A free member behind `joined` tokens, and what follows.
static Cost free_cost(const Vocabulary *v, const Members *m, uint32_t joined, Cost after,
                      Cost after_quoted) {
    if (m->free == NULL) return no_way;
    uint32_t name = plus(joined, m->name_bytes);
    return value_cost(m->free, plus(name, v->glue[QUOTE_COLON]),
                      plus(name, v->glue[QUOTE_COLON_QUOTE]),
                      after, after_quoted);
}

static Cost update_members(const Vocabulary *v, Members *m) {
    Cost *plain = m->left[0], *quoted = m->left[1], open = no_way;
    uint32_t width = m->least + 1, end = m->n * width;
    plain[end] = (Cost){ v->glue[CLOSE_OBJECT], 0 };
    quoted[end] = (Cost){ v->glue[QUOTE_CLOSE_OBJECT], 0 };
    for (uint32_t k = 1; k < width; k++) {     // a quote that is due is a token more at most
        Cost after = plain[end + k - 1];
        plain[end + k] = free_cost(v, m, v->glue[COMMA_QUOTE], after, and_tokens(after, 1));
        quoted[end + k] = and_tokens(plain[end + k], 1);
    }
    for (uint32_t i = m->n; i-- > 0;)
        for (uint32_t k = 0; k < width; k++) {
            const Word *w = &m->words[m->order[i]];
            size_t at = i * width + k, next = (i + 1) * width, behind = next + (k ? k - 1 : 0);
            plain[at] = value_cost(w->value, w->joined[0], w->joined[1], plain[behind],
                                   quoted[behind]);
            quoted[at] = value_cost(w->value, w->quoted[0], w->quoted[1], plain[behind],
                                    quoted[behind]);
            if (w->required) continue;
            plain[at] = cheaper(plain[at], plain[next + k]);
            quoted[at] = cheaper(quoted[at], quoted[next + k]);
        }
    if (m->least == 0 && m->required[0] == 0) return (Cost){ v->glue[EMPTY_OBJECT], 0 };
    for (uint32_t i = 0; i < m->n; i++) {
        const Word *w = &m->words[m->order[i]];
        size_t behind = (i + 1) * width + (m->least ? m->least - 1 : 0);
        open = cheaper(open, value_cost(w->value, w->opened[0], w->opened[1], plain[behind],
                                        quoted[behind]));
        if (w->required) return open;
    }
    Cost after = plain[end + m->least - 1];
    return cheaper(open, free_cost(v, m, v->glue[OPEN_OBJECT_QUOTE], after, and_tokens(after, 1)));
}

static Cost cost_of(const Schema *c, Atom *a) {
    static const Digits none = {0}, minus = { .negative = true };
    Cost cost = no_way;
    switch (a->kind) {
    case WORDS:
        for (const Word *w = a->words; w < a->words + a->n_words; w++)
            cost.tokens = lesser(cost.tokens, w->left[0][a->quoted]);
        return cost;
    case STRING: return (Cost){ need_of(&a->language, 0, 0)->bytes, 0 };
    case NUMBER:
        cost.tokens = plus(digits_left(&a->numbers, &minus), 1);
        return (Cost){ lesser(cost.tokens, digits_left(&a->numbers, &none)), 0 };
    case ARRAY: cost = update_list(c->vocabulary, &a->list); break;
    case OBJECT: cost = update_members(c->vocabulary, &a->members); break;
    }
    cost.depth++;
    return cost;
}

// Finds the costs of all values, which rest on each other, until none becomes less.
static void find_costs(Schema *c) {
    bool changed = true;
    for (int round = 0; changed; round++) {    // from both ends in turn: chains run either way
        changed = false;
        for (int at = 0; at < c->n_values; at++) {
            Value *v = c->values[round % 2 ? at : c->n_values - 1 - at];
            for (int k = 0; k < v->n; k++) {
                Atom *a = v->atoms[k];
                Cost cost = cost_of(c, a), *least = a->quoted ? &v->inner : &v->whole;
                changed |= cost.tokens != a->cost.tokens || cost.depth != a->cost.depth;
                a->cost = cost;
                *least = cheaper(*least, cost);
            }
        }
    }
    for (int i = 0; i < c->n_values; i++) {    // what cannot be written is no alternative
        Value *v = c->values[i];
        int n = 0;
        for (int k = 0; k < v->n; k++)
            if (v->atoms[k]->cost.tokens < BEYOND) v->atoms[n++] = v->atoms[k];
        v->n = n;
        if (v->whole.depth + 1 > c->deepest) c->deepest = v->whole.depth + 1;
    }
}

// A schema that asks for members and nothing else.
static Item *only_required(Item *schema) {
    static const char *const allowed[] = { "required", "title", "description", "$comment" };
    if (schema->kind != IS_OBJECT) return NULL;
    for (Item *m = schema->first; m; m = m->next) {
        size_t i = 0;
        while (i < 4 && !is_text(m->name, m->name_length, allowed[i])) i++;
        if (i == 4) return NULL;
    }
    return member_of(schema, "required");
}

static bool all_only_required(Item *list) {
    for (Item *s = list->first; s; s = s->next)
        if (!only_required(s) || only_required(s)->n == 0) return false;
    return true;
}

// A oneOf's alternatives must exclude each other. Where each only asks for members, that is had by
// forbidding in each the others' members; else it has to be proven once all is built.
static void note_one_of(Schema *c, Item *list) {
    if (list->noted || all_only_required(list)) return;
    list->noted = true;
    c->one_ofs = grow_list(c->one_ofs, c->n_one_ofs, sizeof *c->one_ofs);
    c->one_ofs[c->n_one_ofs++] = list;
}

// What else holds where a schema does: its $ref, all of allOf, one of anyOf and oneOf. The first to
// be looked at is the last of `due`.
static Entries with_others(Schema *c, Item *schema, Entries due) {
    Item *any = member_of(schema, "anyOf"), *one = member_of(schema, "oneOf");
    Item *all = member_of(schema, "allOf"), *reference = member_of(schema, "$ref");
    if (any) due = with_entry(c, due, any, ONE_AMONG);
    if (one) due = with_entry(c, due, one, ONE_AMONG);
    if (one) note_one_of(c, one);
    int first = due.n;
    for (Item *s = all ? all->first : NULL; s; s = s->next) due = with_entry(c, due, s, SCHEMA);
    for (int i = first, last = due.n - 1; i < last; i++, last--) {     // the first comes first
        Entry swapped = due.at[i];
        due.at[i] = due.at[last], due.at[last] = swapped;
    }
    Item *target = reference ? follow_reference(c, reference) : NULL;
    return target ? with_entry(c, due, target, SCHEMA) : due;
}

// What a value may be where all of these hold and no alternative is open any more.
static void add_atoms(Schema *c, Value *v, Entries flat) {
    Item *listed = NULL;
    bool several = false;                      // the first of an enum
    for (int i = 0; i < flat.n && !listed; i++) {
        Item *schema = flat.at[i].kind == SCHEMA ? flat.at[i].item : NULL;
        if (flat.at[i].kind == CONSTANT) listed = flat.at[i].item;
        else if (schema && member_of(schema, "const")) listed = member_of(schema, "const");
        else if (schema && member_of(schema, "enum"))
            listed = member_of(schema, "enum")->first, several = true;
    }
    Language l;
    const char *flaw = listed ? merged_language(c, flat, &l) : NULL;
    if (flaw && flaw != nothing_matches) reject(c, first_item(flat), flaw);
    for (Item *one = listed; one; one = several ? one->next : NULL) {
        bool text = one->kind == IS_STRING;
        if (!fits_scalar(c, flat, one)) continue;
        if (text && (flaw || !language_holds(&l, one->text, one->length))) continue;
        Entries its = with_entry(c, flat, one, CONSTANT);
        if (one->kind == IS_LIST) add_array(c, v, its);
        else if (one->kind == IS_OBJECT) add_object(c, v, its);
        else list_word(c, v, one);
    }
    if (listed) return;
    static Item null = { .kind = IS_NULL, .source = "null", .size = 4 };
    static Item no = { .kind = IS_FALSE, .source = "false", .size = 5 };
    static Item yes = { .kind = IS_TRUE, .source = "true", .size = 4 };
    int types = merged_types(flat);
    if (types & T_NULL) list_word(c, v, &null);
    if (types & T_BOOLEAN) list_word(c, v, &no), list_word(c, v, &yes);
    if (types & T_STRING) add_strings(c, v, flat);
    if (types & T_INTEGER) add_numbers(c, v, flat, !(types & T_FRACTION));
    if (types & T_ARRAY) add_array(c, v, flat);
    if (types & T_OBJECT) add_object(c, v, flat);
}

// Goes through all combinations of alternatives: `due` is still to be looked at, `flat` holds.
static void expand(Schema *c, Value *v, Entries due, Entries flat) {
    if (c->arena.size + c->scratch.size > MOST_MEMORY) {
        reject(c, first_item(v->entries), "it takes more than 256 MB of memory");
        return;
    }
    if (++c->expansions > MOST_EXPANSIONS) {
        reject(c, first_item(v->entries), "more than 10000 combinations of alternatives");
        return;
    }
    while (due.n > 0) {
        Entry e = due.at[--due.n];
        if (holds_entry(flat, e)) continue;
        if (e.kind == ONE_AMONG) {
            bool exclude = is_text(e.item->name, e.item->name_length, "oneOf") &&
                           all_only_required(e.item);
            for (Item *s = e.item->first; s && !c->rejected; s = s->next) {
                Mark mark = arena_mark(&c->scratch);
                Entries its = with_entry(c, copy_entries(&c->scratch, due), s, SCHEMA);
                for (Item *o = exclude ? e.item->first : NULL; o; o = o->next)
                    if (o != s) its = with_entry(c, its, o, FORBIDS);
                expand(c, v, its, copy_entries(&c->scratch, flat));
                arena_reset(&c->scratch, mark);
            }
            return;
        }
        if (e.kind == SCHEMA && e.item->kind == IS_FALSE) return;
        if (e.kind == SCHEMA && e.item->kind == IS_TRUE) continue;
        flat = with_entry(c, flat, e.item, e.kind);
        if (e.kind == SCHEMA) due = with_others(c, e.item, due);
    }
    add_atoms(c, v, flat);
}

// The words of a value become an atom, sorted, each once.
static void add_words(Schema *c, Value *v, bool quoted) {
    size_t n = v->listed[quoted].size / sizeof(Word), kept = 0;
    Word *words = take_copy(&c->arena, v->listed[quoted].data, n * sizeof *words);
    free(v->listed[quoted].data);
    v->listed[quoted] = (Bytes){0};
    if (n == 0) return;
    qsort(words, n, sizeof *words, by_word);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || by_word(&words[i], &words[kept - 1]) != 0) words[kept++] = words[i];
    for (Word *w = words; w < words + kept; w++) {
        uint32_t *left = take(&c->arena, (w->length + 1) * sizeof *left);
        count_tokens(c->vocabulary, w->text, w->length - quoted, left);
        w->left[0] = left;
    }
    add_atom(c, v, (Atom){ .kind = WORDS, .quoted = quoted, .words = words,
                           .n_words = (uint32_t)kept });
}

static void build_value(Schema *c, Value *v) {
    Entries due = {0};
    for (int i = v->entries.n; i-- > 0;)       // the first is looked at first
        due = with_entry(c, due, v->entries.at[i].item, v->entries.at[i].kind);
    Mark mark = arena_mark(&c->scratch);
    c->expansions = 0;
    expand(c, v, due, (Entries){0});
    arena_reset(&c->scratch, mark);
    for (int quoted = 0; quoted < 2; quoted++) add_words(c, v, quoted);
}

static bool word_in(const Atom *a, const Word *w) {
    for (uint32_t i = 0; i < a->n_words; i++)
        if (by_word(&a->words[i], w) == 0) return true;
    return false;
}

// Is none of a's words one that the other atom may write? Words of strings are compared as they
// are written, so one with an escape is not proven.
static bool words_exclude(const Atom *a, const Atom *b) {
    for (const Word *w = a->words; w < a->words + a->n_words; w++) {
        bool escaped = memchr(w->text, '\\', w->length) != NULL, may = false;
        if (b->kind == WORDS) may = word_in(b, w);
        else if (b->kind == STRING && a->quoted)
            may = escaped || b->language.formatted ||
                  language_holds(&b->language, w->text + 1, w->length - 2);
        else if (b->kind == NUMBER) may = *w->text == '-' || isdigit((unsigned char)*w->text);
        if (may) return false;
    }
    return true;
}

static bool strings_exclude(const Language *x, const Language *y) {
    Arena scratch = {0};
    const char *flaw = NULL;
    if (x->formatted || y->formatted) return false;
    if (x->most < y->least || y->most < x->least) return true;
    automaton_of_both(&scratch, x->automaton, y->automaton, &flaw);
    arena_free(&scratch);
    return flaw == nothing_matches;
}

static bool ranges_exclude(const Numbers *x, const Numbers *y) {
    Wide to_x = power_of_10(MOST_WHOLE - x->scale), to_y = power_of_10(MOST_WHOLE - y->scale);
    return x->high * to_x < y->low * to_y || y->high * to_y < x->low * to_x;
}

static const Word *member_word(const Members *m, const Word *name) {
    for (const Word *w = m->words; w < m->words + m->n; w++)
        if (by_word(w, name) == 0) return w;
    return NULL;
}

// Does nothing that fits x fit y, since it lacks a member or has one too many?
static bool members_exclude(const Members *x, const Members *y) {
    for (const Word *w = y->words; w < y->words + y->n; w++)
        if (w->required && x->closed && !x->free && !member_word(x, w)) return true;
    for (const Word *w = x->words; w < x->words + x->n; w++)
        if (w->required && y->closed && !y->free && !member_word(y, w)) return true;
    return false;
}

// Is it certain, by themselves, that two atoms have no text in common?
static bool atoms_exclude(const Atom *a, const Atom *b) {
    if (a->kind == WORDS) return words_exclude(a, b);
    if (b->kind == WORDS) return words_exclude(b, a);
    if (a->kind != b->kind) return true;
    switch (a->kind) {
    case STRING: return strings_exclude(&a->language, &b->language);
    case NUMBER: return ranges_exclude(&a->numbers, &b->numbers);
    case ARRAY: return a->list.least > b->list.most || b->list.least > a->list.most;
    case OBJECT: return members_exclude(&a->members, &b->members);
    default: return false;
    }
}

// Is it certain that nothing fits both of two values' schemas? Objects
// may differ in a member that one of them must have, arrays in an item that both have.
static bool values_exclude(const Value *x, const Value *y, int depth) {
    enum { DEEPEST = 3 };
    for (int i = 0; i < x->n * y->n; i++) {
        const Atom *a = x->atoms[i / y->n], *b = y->atoms[i % y->n];
        bool apart = atoms_exclude(a, b), both = a->kind == b->kind && depth < DEEPEST;
        const Members *m = &a->members;
        for (uint32_t k = 0; !apart && both && a->kind == OBJECT && k < m->n; k++) {
            const Word *other = member_word(&b->members, &m->words[k]);
            if (other && (other->required || m->words[k].required))
                apart = values_exclude(m->words[k].value, other->value, depth + 1);
        }
        uint32_t items = lesser(a->list.least, b->list.least);
        for (uint32_t k = 0; !apart && both && a->kind == ARRAY && k < items; k++)
            apart = values_exclude(item_value(&a->list, k), item_value(&b->list, k), depth + 1);
        if (!apart) return false;
    }
    return true;
}

// The value of one schema alone.
static Value *value_of_schema(Schema *c, Item *schema) {
    return value_of(c, with_entry(c, (Entries){0}, schema, SCHEMA));
}

// Builds all values, and of the oneOfs that were met proves that their alternatives exclude each
// other.
static void build_values(Schema *c) {
    int built = 0, proven = 0;
    while (built < c->n_values || proven < c->n_one_ofs) {
        if (built < c->n_values) build_value(c, c->values[built++]);
        else for (Item *s = c->one_ofs[proven++]->first; s; s = s->next) value_of_schema(c, s);
        if (c->rejected) return;
    }
    for (int i = 0; i < c->n_one_ofs; i++) {
        bool apart = true;
        for (Item *s = c->one_ofs[i]->first; s; s = s->next)
            for (Item *o = c->one_ofs[i]->first; o != s; o = o->next)
                apart &= values_exclude(value_of_schema(c, s), value_of_schema(c, o), 0);
        if (!apart)
            refuse(c, c->one_ofs[i], "its alternatives are not certain to exclude each other; "
                                     "anyOf does where that is no matter");
    }
}

static Schema *schema_new(const Vocabulary *v, const Texts *ignored) {
    Schema *c = allocate(1, sizeof *c);
    static long made;
    const char *flaw;
    c->vocabulary = v, c->ignored = ignored, c->number = ++made;
    c->any = automaton_of(&c->arena, "[^]*", 4, true, &flaw);
    return c;
}

static void schema_free(Schema *c) {
    if (c == NULL) return;
    for (int i = 0; i < c->n_values; i++)
        for (int quoted = 0; quoted < 2; quoted++) free(c->values[i]->listed[quoted].data);
    free_texts(&c->refusals);
    free_texts(&c->unchecked);
    free(c->values);
    free(c->due);
    free(c->one_ofs);
    arena_free(&c->scratch);
    arena_free(&c->arena);
    free(c);
}

// The fewest tokens that write a text; nothing fits if there are none.
static void find_least(Schema *c) {
    Cost quoted = and_tokens(c->value->inner, 2), least = cheaper(quoted, c->value->whole);
    c->least_tokens = least.depth <= MAX_DEPTH ? least.tokens : BEYOND;
    if (c->least_tokens == BEYOND)
        reject(c, c->root, "nothing fits it: what it asks for contradicts itself");
}

// A schema, ready to be used if it has no refusals.
static Schema *schema_of_text(const Vocabulary *v, const Texts *ignored, const char *text,
                              size_t n) {
    Schema *c = schema_new(v, ignored);
    const char *copy = take_copy(&c->arena, text, n);
    Json j = { .start = copy, .at = copy, .end = copy + n };
    bool sound = json_value(&j, 0);
    json_skip_space(&j);
    if (sound && j.at < j.end) json_fail(&j, "the end was expected");
    if (j.flaw) {
        Bytes line = {0};
        append_format(&line, "it is no JSON: at byte %td %s", j.at - j.start, j.flaw);
        add_text(&c->refusals, line);
        c->rejected = true;
        return c;
    }
    j.at = j.start;
    c->root = read_item(&c->arena, &j, NULL);
    check_schemas(c);
    if (c->rejected) return c;
    c->value = value_of_schema(c, c->root);
    build_values(c);
    if (c->refusals.n) return c;
    find_costs(c);
    find_least(c);
    return c;
}

// A text that matches a pattern from end to end, as it is.
static Schema *schema_of_pattern(const Vocabulary *v, const char *pattern) {
    Schema *c = schema_new(v, NULL);
    Atom atom = { .kind = STRING, .language = { .most = BEYOND - 1 } };
    const char *flaw;
    atom.language.automaton = automaton_of(&c->arena, pattern, strlen(pattern), true, &flaw);
    if (!flaw) flaw = find_needs(&c->arena, &atom.language, &c->cells);
    if (flaw) {
        Bytes line = {0};
        append_string(&line, flaw);
        add_text(&c->refusals, line);
        c->rejected = true;
        return c;
    }
    Value *value = value_of(c, (Entries){0});
    add_atom(c, value, atom);
    c->value = value;
    find_costs(c);
    find_least(c);
    c->empty = c->least_tokens == 0;
    for (uint32_t i = 0; i < atom.language.automaton->classes; i++)
        c->empty &= atom.language.automaton->next[i] == NO_STATE;
    return c;
}

// ---- 15. Constraint ----
// What may follow, byte by byte, so that a text can still become one that fits its schema; and from
// that, which tokens. The state is a stack of frames, one for each value that is open. A frame
// holds the positions that are possible, each in one atom; a position serves those of the frame
// below for whose value it stands, so alternatives never multiply stacks. Each position carries
// what is needed behind its value, and so the fewest tokens to the end are known: there is always a
// token that leaves one less. With R tokens left one is allowed only if R - 1 or fewer are needed
// behind it. So a limit always meets a text that fits.

// Where a text stands in its language: in a state, behind so many characters, and perhaps in the
// middle of one.
typedef struct {
    uint32_t state, count, code;   // code: of a character that is not whole, its bits or digits
    uint8_t part, left, length;    // bytes of UTF-8 still to come; in all
} Reader;

enum { BETWEEN, IN_UTF8, IN_ESCAPE, IN_HEX };  // parts; of IN_HEX `left` digits are still to come

// The characters that a part of one may become: spans, and the bytes that each still takes.
static int completions(const Reader *r, Interval spans[8], uint32_t bytes[8]) {
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    static const Interval escapes[] = { { 0, 7 }, { 0xB, 0xB }, { 0xE, 0x1F }, { 8, 0xA },
                                    { 0xC, 0xD }, { '"', '"' }, { '\\', '\\' } };
    int n = 0;
    if (r->part == IN_UTF8) {
        uint32_t first = r->code << 6 * r->left, last = first + (1u << 6 * r->left) - 1;
        if (first < least[r->length]) first = least[r->length];
        if (last > MOST_CODE) last = MOST_CODE;
        if (last >= FIRST_SURROGATE && first <= LAST_SURROGATE) last = FIRST_SURROGATE - 1;
        spans[n] = (Interval){ first, last }, bytes[n++] = r->left;
    }
    for (int i = 0; r->part == IN_ESCAPE && i < 7; i++)
        spans[n] = escapes[i], bytes[n++] = i < 3 ? 5 : 1;
    for (int i = 0; r->part == IN_HEX && i < 3; i++) {     // no others are written as \u00xx
        Interval span = escapes[i];
        uint32_t first = r->code << 4, last = first + 15;
        if (r->left == 1 && span.first < first) span.first = first;
        if (r->left == 1 && span.last > last) span.last = last;
        spans[n] = span, bytes[n++] = r->left;
    }
    return n;
}

// The fewest bytes from here to an end of the text; BEYOND: there is no way.
static uint32_t reader_left(const Language *l, const Reader *r) {
    const Automaton *a = l->automaton;
    if (r->part == BETWEEN)
        return lives(l, r->state, r->count) ? need_of(l, r->state, r->count)->bytes : BEYOND;
    Interval spans[8];
    uint32_t bytes[8], best = BEYOND;
    int n = completions(r, spans, bytes);
    for (int i = 0; i < n; i++) {
        if (spans[i].first > spans[i].last) continue;
        for (uint32_t k = span_of(a, spans[i].first);
             k < a->spans && a->starts[k] <= spans[i].last; k++) {
            uint32_t next = a->next[r->state * a->classes + a->class_of[k]];
            if (lives(l, next, r->count + 1))
                best = lesser(best, plus(bytes[i], need_of(l, next, r->count + 1)->bytes));
        }
    }
    return best;
}

static bool read_char(const Language *l, Reader *r, uint32_t code) {
    r->state = state_behind(l->automaton, r->state, code);
    r->count++;
    r->part = BETWEEN;
    return lives(l, r->state, r->count);
}

// The first byte of a character that has several.
static bool read_lead(const Language *l, Reader *r, uint8_t byte) {
    if (byte < 0xC2 || byte > 0xF4) return false;
    r->length = byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    r->left = r->length - 1;
    r->code = byte & (0x7Fu >> r->length);
    r->part = IN_UTF8;
    return reader_left(l, r) < BEYOND;
}

// What stands behind a backslash.
static bool read_escape(const Language *l, Reader *r, uint8_t byte) {
    static const char letters[] = "bfnrt\"\\", meanings[] = "\b\f\n\r\t\"\\";
    const char *letter = byte ? strchr(letters, byte) : NULL;
    if (letter) return read_char(l, r, (uint8_t)meanings[letter - letters]);
    r->part = IN_HEX, r->left = 4, r->code = 0;
    return byte == 'u' && reader_left(l, r) < BEYOND;
}

static bool read_hex(const Language *l, Reader *r, uint8_t byte) {
    bool digit = byte >= '0' && byte <= '9', letter = byte >= 'a' && byte <= 'f';
    if (!(digit || letter)) return false;
    r->code = r->code << 4 | (digit ? (uint32_t)byte - '0' : (uint32_t)byte - 'a' + 10);
    bool control = r->code < 0x20 && (r->left > 1 || !strchr("\b\t\n\f\r", (int)r->code) ||
                                      r->code == 0);
    if (--r->left == 0) return control && read_char(l, r, r->code);
    return r->code <= 1 && (r->left == 1 || r->code == 0) && reader_left(l, r) < BEYOND;
}

// One byte more of the text, which is no quotation mark that ends it. False: no text of the
// language goes on so.
static inline bool read_byte(const Language *l, Reader *r, uint8_t byte) {
    if (r->part == BETWEEN) {
        if (l->json && (byte < 0x20 || byte == '"')) return false;
        if (l->json && byte == '\\') {
            r->part = IN_ESCAPE;
            return reader_left(l, r) < BEYOND;
        }
        return byte < 0x80 ? read_char(l, r, byte) : read_lead(l, r, byte);
    }
    if (r->part == IN_ESCAPE) return read_escape(l, r, byte);
    if (r->part == IN_HEX) return read_hex(l, r, byte);
    if ((byte & 0xC0) != 0x80) return false;
    r->code = r->code << 6 | (byte & 0x3F);
    if (--r->left == 0) return read_char(l, r, r->code);
    return reader_left(l, r) < BEYOND;
}

static bool read_whole(const Language *l, const Reader *r) {
    return r->part == BETWEEN && l->automaton->accepts[r->state] && r->count >= l->least &&
           r->count <= l->most;
}

// A byte more of a number. False: none of the range is written so.
static bool read_digit(const Numbers *r, Digits *d, uint8_t byte) {
    bool digit = byte >= '0' && byte <= '9';
    if (d->exponent) {
        if (!digit && !(d->exponent == 1 && !d->signed_exponent && (byte == '-' || byte == '+')))
            return false;
        if (digit) return ++d->exponent <= 3;
        d->signed_exponent = true;
        return true;
    }
    bool ends = d->pointed ? d->fraction > 0 : d->whole > 0;
    if (r->exponent && ends && (byte == 'e' || byte == 'E') && digits_left(r, d) == 0) {
        d->exponent = 1;
        return true;
    }
    if (byte == '-' && !d->negative && d->whole == 0) d->negative = true;
    else if (byte == '.' && !d->pointed && d->whole > 0) d->pointed = true;
    else if (!digit || (!d->pointed && d->whole && d->digits == 0) ||
             (d->pointed ? d->fraction >= r->scale || d->whole + d->fraction >= USUAL_DIGITS
                         : d->whole >= r->most_digits)) return false;
    else {
        d->digits = d->digits * 10 + (byte - '0');
        if (d->pointed) d->fraction++;
        else d->whole++;
    }
    return digits_left(r, d) < BEYOND;
}

// The letters of a free name as they are written, the last one first; and names that an object has
// used.
typedef struct Letter Letter;
struct Letter { const Letter *before; char byte; };
typedef struct Used Used;
struct Used { const Used *before; const char *text; uint32_t length; };

typedef enum {
    OPENING,                       // nothing is written of it
    IN_WORD, IN_STRING, IN_NUMBER,
    IN_NAME,                       // at 0: behind the { or the comma
    IN_FREE_NAME, BEFORE_COLON,    // behind a free name
    BEFORE_VALUE,
    BEFORE_ITEM,                   // behind the [: or it ends
    IN_VALUE,                      // the frame above stands for it
    BEHIND_VALUE,
} Phase;

// Where a text may stand in one atom.
typedef struct {
    const Atom *atom;
    uint64_t serves;               // the positions of the frame below whose value this is
    uint32_t rest[2];              // tokens needed behind its value; and where its closing quote
                                   // is one's beginning
    uint32_t at, low, high;        // bytes read of a word or name; of the words, the names or, in a
                                   // free name, those that are taken: which begin so
    uint32_t count, next;          // items or members written; the first member that may follow
    Phase phase;
    bool free;                     // the value is that of a free name
    Reader reader;                 // of a string or a free name
    Digits digits;
    const Letter *name;
    const Used *used, *alike;      // all of its object; those that begin as this free name does
} Position;

typedef struct Frame Frame;
struct Frame {
    const Frame *below;            // NULL: it is the text itself
    uint32_t depth;                // frames below it
    int n;                         // 0: the text is at its end
    Position at[];
};

// The byte of a word at a place; -1 behind its end.
static int byte_at(const Word *w, uint32_t at) {
    return at < w->length ? (uint8_t)w->text[at] : -1;
}

// The first of the sorted words low to high whose byte at a place is not below this one.
static uint32_t first_word(const Word *words, uint32_t low, uint32_t high, uint32_t at, int byte) {
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (byte_at(&words[middle], at) < byte) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Of the words that are possible those that go on with this byte. False: none.
static bool narrow(const Word *words, Position *p, uint8_t byte) {
    p->low = first_word(words, p->low, p->high, p->at, byte);
    p->high = first_word(words, p->low, p->high, p->at, byte + 1);
    p->at++;
    return p->low < p->high;
}

// Does a name that is not free, or was used, begin with the letters so far?
static bool begins_taken(const Position *p) { return p->low < p->high || p->alike; }

// Are they such a name?
static bool is_taken(const Position *p) {
    bool taken = p->low < p->high && p->atom->members.taken[p->low].length == p->at;
    for (const Used *u = p->alike; u; u = u->before) taken |= u->length == p->at;
    return taken;
}

// May this member be the next one?
static bool may_come(const Position *p, const Word *w) {
    const Members *m = &p->atom->members;
    return w->number >= p->next && m->required[w->number] == m->required[p->next] &&
           w->value->n > 0 && p->count + 1 + m->required[w->number + 1] <= m->most &&
           members_left(m, w->number + 1, p->count + 1, false).tokens < BEYOND;
}

static bool may_be_free(const Position *p) {
    const Members *m = &p->atom->members;
    return m->free && m->free->n > 0 && p->count + 1 + m->required[p->next] <= m->most &&
           members_left(m, p->next, p->count + 1, false).tokens < BEYOND;
}

static bool may_close(const Position *p) {
    const Members *m = &p->atom->members;
    if (p->atom->kind == ARRAY) return p->count >= p->atom->list.least;
    return p->count >= m->least && m->required[p->next] == 0;
}

// A free name begins.
static void begin_name(Position *p) {
    p->phase = IN_FREE_NAME, p->reader = (Reader){0}, p->name = NULL;
    p->at = p->low = 0, p->high = p->atom->members.n_taken;
    p->alike = p->used;
}

// One byte more of a free name, whatever names are taken.
static bool read_letter(Arena *arena, Position *p, uint8_t byte) {
    if (!read_byte(&p->atom->members.names, &p->reader, byte)) return false;
    const Used *alike = NULL;
    for (const Used *u = p->alike; u; u = u->before) {
        if (u->length <= p->at || (uint8_t)u->text[p->at] != byte) continue;
        Used *one = take(arena, sizeof *one);
        *one = (Used){ alike, u->text, u->length };
        alike = one;
    }
    Letter *letter = take(arena, sizeof *letter);
    *letter = (Letter){ p->name, (char)byte };
    p->name = letter, p->alike = alike;
    narrow(p->atom->members.taken, p, byte);
    return true;
}

// A free name is whole: it is one of those used.
static void use_name(Arena *arena, Position *p) {
    char *text = take(arena, p->at + 1);
    uint32_t at = p->at;
    for (const Letter *l = p->name; l; l = l->before) text[--at] = l->byte;
    Used *used = take(arena, sizeof *used);
    *used = (Used){ p->used, text, p->at };
    p->phase = BEFORE_COLON, p->used = used, p->free = true;
    p->name = NULL, p->alike = NULL;
}

// The fewest bytes that make a free name of the letters so far. Where names that are taken begin
// with them, all that may follow is tried.
static uint32_t name_left(Arena *arena, const Position *p, uint32_t most) {
    const Language *names = &p->atom->members.names;
    uint32_t best = BEYOND, least = reader_left(names, &p->reader);
    if (least > most || !begins_taken(p)) return least;
    if (read_whole(names, &p->reader) && !is_taken(p)) return 0;
    for (int pass = 0; pass < 2; pass++)       // first those that no taken name begins with
        for (int byte = 0; byte < 256 && best > 1; byte++) {
            Mark mark = arena_mark(arena);
            Position next = *p;
            if (read_letter(arena, &next, (uint8_t)byte) && begins_taken(&next) == (pass == 1))
                best = lesser(best, plus(1, name_left(arena, &next, lesser(best, most) - 1)));
            arena_reset(arena, mark);
        }
    return best;
}

// One byte more, after which a name that is not taken must still be possible. Where any text is a
// name there always is one.
static bool read_name(Arena *arena, Position *p, uint8_t byte) {
    if (!read_letter(arena, p, byte)) return false;
    return p->atom->members.any_name || name_left(arena, p, BEYOND) < BEYOND;
}

// The value that is due at a position, and what is needed behind it.
static const Value *due_value(const Position *p, Cost *after, Cost *after_quoted) {
    const Atom *a = p->atom;
    if (a->kind == ARRAY) {
        *after = list_left(&a->list, p->count + 1, false);
        *after_quoted = list_left(&a->list, p->count + 1, true);
        return item_value(&a->list, p->count);
    }
    const Members *m = &a->members;
    uint32_t next = p->free ? p->next : m->words[p->low].number + 1;
    *after = members_left(m, next, p->count + 1, false);
    *after_quoted = members_left(m, next, p->count + 1, true);
    return p->free ? m->free : m->words[p->low].value;
}

// The cost of what a position's value still needs, and its own end.
static Cost due_cost(const Position *p, uint32_t without, uint32_t with) {
    Cost after, after_quoted;
    const Value *v = due_value(p, &after, &after_quoted);
    return value_cost(v, without, with, after, after_quoted);
}

// Of an object behind { or a comma, or in the middle of a name.
static Cost name_cost(Arena *arena, const Vocabulary *v, const Position *p) {
    const Members *m = &p->atom->members;
    Cost best = no_way;
    if (p->phase == IN_NAME && p->at == 0 && p->count == 0 && may_close(p)) best.tokens = 1;
    Position at = *p, free = *p;
    for (; p->phase == IN_NAME && at.low < p->high; at.low++) {
        const Word *w = &m->words[at.low];
        if (may_come(p, w))
            best = cheaper(best, due_cost(&at, w->left[0][p->at], w->left[1][p->at]));
    }
    bool first = p->phase == IN_NAME && p->at == 0;
    if (!(first && may_be_free(p)) && p->phase != IN_FREE_NAME) return best;
    if (first) begin_name(&free);
    free.free = true;
    uint32_t name = plus(name_left(arena, &free, BEYOND), first);
    return cheaper(best, due_cost(&free, plus(name, v->glue[QUOTE_COLON]),
                                  plus(name, v->glue[QUOTE_COLON_QUOTE])));
}

// The fewest tokens from a position to the end of the whole text.
static uint32_t position_left(Arena *arena, const Vocabulary *v, const Position *p,
                              uint32_t depth) {
    const Atom *a = p->atom;
    Cost cost = no_way;
    uint32_t own = 1, quoted = a->quoted;
    switch (p->phase) {
    case OPENING: cost = and_tokens(a->cost, quoted), own = 0; break;
    case IN_WORD:
        for (const Word *w = a->words + p->low; w < a->words + p->high; w++)
            cost.tokens = lesser(cost.tokens, w->left[0][p->at]);
        break;
    case IN_STRING: cost.tokens = reader_left(&a->language, &p->reader); break;
    case IN_NUMBER: cost.tokens = digits_left(&a->numbers, &p->digits); break;
    case IN_NAME: case IN_FREE_NAME: cost = name_cost(arena, v, p); break;
    case BEFORE_COLON: cost = due_cost(p, 1, v->glue[COLON_QUOTE]); break;
    case BEFORE_ITEM:
        if (p->atom->list.least == 0) cost.tokens = 1;
        if (p->atom->list.most > 0) cost = cheaper(cost, due_cost(p, 0, 1));
        break;
    case BEFORE_VALUE: cost = due_cost(p, 0, 1); break;
    case IN_VALUE: break;
    case BEHIND_VALUE:
        if (a->kind == ARRAY) cost = list_left(&a->list, p->count, false);
        else cost = members_left(&a->members, p->next, p->count, false);
    }
    if (depth + own + cost.depth > MAX_DEPTH && (a->kind == ARRAY || a->kind == OBJECT))
        return BEYOND;
    return plus(cost.tokens, p->rest[quoted]);
}

static uint32_t frame_left(Arena *arena, const Vocabulary *v, const Frame *f) {
    uint32_t best = f->n ? BEYOND : 0;
    for (int i = 0; i < f->n; i++)
        best = lesser(best, position_left(arena, v, &f->at[i], f->depth));
    return best;
}

// Everything that a walk over bytes needs.
typedef struct {
    const Schema *schema;
    const Vocabulary *vocabulary;
    Arena *arena;                  // frames are taken from it
} Walk;

// Is a value at its end that has no mark of its end: a number, a word without quotes, a text that
// matches a pattern?
static bool is_whole(const Position *p) {
    const Atom *a = p->atom;
    if (p->phase == IN_NUMBER) return digits_left(&a->numbers, &p->digits) == 0;
    if (p->phase == IN_WORD) return !a->quoted && a->words[p->low].length == p->at;
    if (a->kind != STRING || a->quoted) return false;
    return read_whole(&a->language, &p->reader);
}

// What a byte makes of a position: 0 to 2 others, or ENDS_VALUE. At first out[0] is a copy of the
// position.
enum { ENDS_VALUE = -1 };

static int step_opening(const Position *p, uint8_t byte, Position *out) {
    const Atom *a = p->atom;
    switch (a->kind) {
    case WORDS:
        out->phase = IN_WORD, out->high = a->n_words;
        return narrow(a->words, out, byte);
    case STRING:
        out->phase = IN_STRING;
        return a->quoted ? byte == '"' : read_byte(&a->language, &out->reader, byte);
    case NUMBER:
        out->phase = IN_NUMBER;
        return read_digit(&a->numbers, &out->digits, byte);
    case ARRAY:
        out->phase = BEFORE_ITEM;
        return byte == '[';
    default:
        out->phase = IN_NAME, out->high = a->members.n;
        return byte == '{';
    }
}

static int step_name(const Walk *w, const Position *p, uint8_t byte, Position *out) {
    const Members *m = &p->atom->members;
    bool first = p->at == 0, any = false;
    int n = 0;
    if (first && byte == '}') return p->count == 0 && may_close(p) ? ENDS_VALUE : 0;
    if (narrow(m->words, out, byte)) {
        for (uint32_t i = out->low; i < out->high && !any; i++) any = may_come(out, &m->words[i]);
        if (any && m->words[out->low].length == out->at) out->phase = BEFORE_VALUE;
        n += any;
    }
    if (!first || byte != '"' || !may_be_free(p)) return n;
    Position *free = &out[n];
    *free = *p;
    begin_name(free);
    return n + (m->any_name || name_left(w->arena, free, BEYOND) < BEYOND);
}

static int step_free_name(const Walk *w, const Position *p, uint8_t byte, Position *out) {
    if (byte != '"' || p->reader.part != BETWEEN) return read_name(w->arena, out, byte);
    use_name(w->arena, out);
    return read_whole(&p->atom->members.names, &p->reader) && !is_taken(p);
}

// Behind a value: a comma, if there may be more, or the end.
static int step_behind(const Walk *w, const Position *p, uint8_t byte, Position *out) {
    const Atom *a = p->atom;
    bool array = a->kind == ARRAY;
    if (byte == (array ? ']' : '}')) return may_close(p) ? ENDS_VALUE : 0;
    if (byte != ',') return 0;
    if (array) {
        out->phase = BEFORE_VALUE;
        return p->count < a->list.most && item_value(&a->list, p->count)->n > 0;
    }
    out->phase = IN_NAME, out->at = 0, out->low = 0, out->high = a->members.n;
    out->free = false;
    return name_cost(w->arena, w->vocabulary, out).tokens < BEYOND;
}

static int step_position(const Walk *w, const Position *p, uint8_t byte, Position *out) {
    const Atom *a = p->atom;
    *out = *p;
    switch (p->phase) {
    case OPENING: return step_opening(p, byte, out);
    case IN_WORD:
        if (!narrow(a->words, out, byte)) return 0;
        return a->quoted && byte == '"' && a->words[out->low].length == out->at ? ENDS_VALUE : 1;
    case IN_STRING:
        if (byte == '"' && a->quoted && p->reader.part == BETWEEN)
            return read_whole(&a->language, &p->reader) ? ENDS_VALUE : 0;
        return read_byte(&a->language, &out->reader, byte);
    case IN_NUMBER: return read_digit(&a->numbers, &out->digits, byte);
    case IN_NAME: return step_name(w, p, byte, out);
    case IN_FREE_NAME: return step_free_name(w, p, byte, out);
    case BEFORE_COLON:
        out->phase = BEFORE_VALUE;
        return byte == ':';
    case BEFORE_ITEM: return byte == ']' && a->list.least == 0 ? ENDS_VALUE : 0;
    case BEHIND_VALUE: return step_behind(w, p, byte, out);
    default: return 0;
    }
}

static Frame *new_frame(const Walk *w, const Frame *below, int room) {
    Frame *f = take(w->arena, sizeof *f + (size_t)room * sizeof *f->at);
    *f = (Frame){ .below = below, .depth = below ? below->depth + 1 : 0 };
    return f;
}

// Adds a position to a frame. Of too many those are kept that need the fewest tokens: the promise
// holds, though not all that fits can be written. Where the levels that are left matter, a position
// that needs more of them is none.
static void add_position(const Walk *w, Frame *f, const Position *p) {
    bool deep = f->depth + w->schema->deepest > MAX_DEPTH;
    if (deep && position_left(w->arena, w->vocabulary, p, f->depth) >= BEYOND) return;
    if (f->n < MOST_LIVE) {
        f->at[f->n++] = *p;
        return;
    }
    int worst = 0;
    uint32_t most = 0, its = position_left(w->arena, w->vocabulary, p, f->depth);
    for (int i = 0; i < f->n; i++) {
        uint32_t left = position_left(w->arena, w->vocabulary, &f->at[i], f->depth);
        if (left > most) most = left, worst = i;
    }
    if (its < most) f->at[worst] = *p;
}

// The frame on which a value has been written for these of its positions.
static const Frame *close_value(const Walk *w, const Frame *f, uint64_t done) {
    Frame *next = new_frame(w, f ? f->below : NULL, f ? f->n : 0);
    for (int i = 0; f && i < f->n; i++) {
        if (!(done >> i & 1)) continue;
        Position *p = &next->at[next->n++];
        *p = f->at[i];
        if (p->atom->kind == OBJECT && !p->free)
            p->next = p->atom->members.words[p->low].number + 1;
        p->count++;
        p->phase = BEHIND_VALUE;
    }
    return next;
}

// The frame of the values that are due in f and begin with this byte, on f; NULL: none does.
static const Frame *open_value(const Walk *w, const Frame *f, uint8_t byte) {
    Frame *waits = new_frame(w, f->below, f->n);
    memcpy(waits->at, f->at, (size_t)f->n * sizeof *f->at);
    waits->n = f->n;
    Frame *next = new_frame(w, waits, MOST_LIVE);
    for (int i = 0; i < f->n; i++) {
        const Position *p = &f->at[i];
        Cost after, after_quoted;
        if (p->phase == BEFORE_ITEM && p->atom->list.most == 0) continue;
        const Value *v = due_value(p, &after, &after_quoted);
        waits->at[i].phase = IN_VALUE;
        uint32_t rest[] = { plus(after.tokens, p->rest[0]),
                            plus(after_quoted.tokens, p->rest[0]) };
        for (int k = 0; k < v->n; k++) {
            Position *same = next->at, out[2];
            while (same < next->at + next->n && same->atom != v->atoms[k]) same++;
            if (same < next->at + next->n) {   // two positions wait for the same
                same->serves |= 1ull << i;
                for (int q = 0; q < 2; q++) same->rest[q] = lesser(same->rest[q], rest[q]);
                continue;
            }
            Position opening = { .atom = v->atoms[k], .serves = 1ull << i,
                                 .rest = { rest[0], rest[1] } };
            out[0] = opening;
            if (step_opening(&opening, byte, out)) add_position(w, next, out);
        }
    }
    return next->n ? next : NULL;
}

// What a byte makes of a state; NULL: it cannot follow.
static const Frame *step(const Walk *w, const Frame *f, uint8_t byte) {
    if (f->n == 0) return NULL;
    bool item = f->at[0].phase == BEFORE_ITEM && byte != ']';
    if (f->at[0].phase == BEFORE_VALUE || item) return open_value(w, f, byte);
    int room = 2 * f->n < MOST_LIVE ? 2 * f->n : MOST_LIVE;
    Frame *next = new_frame(w, f->below, room);
    uint64_t done = 0, whole = 0;
    for (int i = 0; i < f->n; i++) {
        Position out[2];
        int n = step_position(w, &f->at[i], byte, out);
        if (n == ENDS_VALUE) done |= f->at[i].serves;
        for (int k = 0; k < n; k++) add_position(w, next, &out[k]);
        if (n == 0 && is_whole(&f->at[i])) whole |= f->at[i].serves;
    }
    if (next->n) return next;
    if (done) return close_value(w, f->below, done);
    return whole && f->below ? step(w, close_value(w, f->below, whole), byte) : NULL;
}

// The state before anything is written.
static const Frame *opening_frame(const Walk *w) {
    const Value *v = w->schema->value;
    Frame *f = new_frame(w, NULL, v->n);
    for (int i = 0; i < v->n; i++)
        f->at[f->n++] = (Position){ .atom = v->atoms[i], .serves = 1, .rest = { 0, 1 } };
    return f;
}

// May the text end here?
static bool may_end(const Frame *f) {
    bool whole = f->n == 0;
    for (int i = 0; i < f->n && !f->below; i++) whole |= is_whole(&f->at[i]);
    return whole;
}

// Is what follows text of the content's own, and not of its structure?
static bool in_content(const Frame *f) { return f->n > 0 && f->at[0].phase == IN_STRING; }

// Is a text that may end here at its end, since nothing may follow?
static bool must_end(const Walk *w, const Frame *f) {
    if (f->n == 0) return true;
    if (!may_end(f)) return false;
    Mark mark = arena_mark(w->arena);
    bool goes_on = false;
    for (int byte = 0; byte < 256 && !goes_on; byte++)
        goes_on = step(w, f, (uint8_t)byte) != NULL;
    arena_reset(w->arena, mark);
    return !goes_on;
}

// What is seen of a text on the way to where it does not fit.
typedef struct {
    const Frame *frame;            // where it stands
    const Frame *object;           // the last one in which a name was due, and where
    size_t at, name_at;
} Judged;

static Judged judge_text(const Walk *w, const char *text, size_t n) {
    Judged j = { .frame = opening_frame(w) };
    for (; j.at < n; j.at++) {
        bool name = j.frame->n && j.frame->at[0].phase == IN_NAME && j.frame->at[0].at == 0;
        if (name) j.object = j.frame, j.name_at = j.at;
        const Frame *next = step(w, j.frame, (uint8_t)text[j.at]);
        if (next == NULL) break;
        j.frame = next;
    }
    return j;
}

// The state behind these bytes; NULL: they cannot follow.
static const Frame *step_over(const Walk *w, const Frame *f, const Bytes *text) {
    for (size_t i = 0; i < text->size && f; i++) f = step(w, f, (uint8_t)text->data[i]);
    return f;
}

// A child of an item, and its place among those that are written; BEYOND: the schema names no such
// member.
typedef struct { Item *item; uint32_t place; } Placed;

static int by_place(const void *a, const void *b) {
    const Placed *x = a, *y = b;
    if (x->place != y->place) return x->place < y->place ? -1 : 1;
    return x->item->index - y->item->index;
}

// The children of an item that was opened in f, in the order in which they would be written.
static Placed *placed_children(const Walk *w, const Frame *f, Item *item) {
    Placed *all = take(w->arena, (size_t)item->n * sizeof *all);
    for (Item *i = item->first; i; i = i->next) {
        Placed *its = &all[i->index];
        *its = (Placed){ i, item->kind == IS_LIST ? 0 : BEYOND };
        if (item->kind == IS_LIST) continue;
        Bytes name = {0};
        append_name(&name, i->name, i->name_length);
        Word word = { .text = name.data, .length = (uint32_t)name.size };
        for (int k = 0; k < f->n && its->place == BEYOND; k++) {
            const Word *found = member_word(&f->at[k].atom->members, &word);
            if (found) its->place = found->number;
        }
        free(name.data);
    }
    if (item->n) qsort(all, (size_t)item->n, sizeof *all, by_place);
    return all;
}

// May an object that was opened in f have members that its schema does not name, though we write
// none?
static bool only_we_close(const Frame *f) {
    bool open = true;
    for (int i = 0; i < f->n; i++)
        open &= !f->at[i].atom->members.free && !f->at[i].atom->members.closed;
    return open;
}

// The state behind a value without children if it were written as we write, a number with no more
// digits than we give it.
static const Frame *step_scalar(const Walk *w, const Frame *f, Item *item) {
    Bytes text = {0};
    Decimal d;
    append_scalar(&text, item);
    const Frame *next = step_over(w, f, &text);
    if (next == NULL && item->kind == IS_NUMBER && decimal_of(item, &d)) {
        int whole = whole_digits(d) ? whole_digits(d) : 1;
        while (d.exponent < 0 && whole + fraction_digits(d) > USUAL_DIGITS)
            d.digits /= 10, d.exponent++;
        text.size = 0;
        append_decimal(&text, d);
        next = step_over(w, f, &text);
    }
    free(text.data);
    return next;
}

// The state behind a value if it were written as we write, members in the order of the schema and
// without those that only we leave out; NULL: it does not fit.
static const Frame *step_item(const Walk *w, const Frame *f, Item *item) {
    Bytes text = {0};
    bool object = item->kind == IS_OBJECT;
    if (!object && item->kind != IS_LIST) return step_scalar(w, f, item);
    f = step(w, f, object ? '{' : '[');
    if (f == NULL) return NULL;
    Placed *children = placed_children(w, f, item);
    bool open = object && only_we_close(f);
    for (int i = 0; i < item->n && f; i++) {
        Item *child = children[i].item;
        if (children[i].place == BEYOND && open) continue;
        if (object) append_name(&text, child->name, child->name_length);
        f = step_over(w, f, &text);
        if (f) f = step_item(w, f, child);
        text.size = 0;
        append_string(&text, ",");
    }
    free(text.data);
    return f ? step(w, f, object ? '}' : ']') : NULL;
}

// Does the text, which is JSON, fit its schema when it is written as we write?
static bool fits_as_written(const Walk *w, const char *text, size_t n) {
    Json j = { .start = text, .at = text, .end = text + n };
    bool sound = json_value(&j, 0);
    json_skip_space(&j);
    if (w->schema->root == NULL || !sound || j.at < j.end) return false;
    j.at = j.start;
    const Frame *f = step_item(w, opening_frame(w), read_item(w->arena, &j, NULL));
    return f && may_end(f);
}

// Does text[at], of a JSON text of n bytes, stand in a string? And in an escape there?
static bool in_string(const char *text, size_t n, size_t at, bool *escaped) {
    bool inside = false;
    for (size_t i = 0; i <= at && i < n; i++) {
        if (inside && text[i] == '\\') {
            i += text[i + 1] == 'u' ? 5 : 1;
            *escaped = i >= at;
        } else if (i < at && text[i] == '"') inside = !inside;
    }
    return inside;
}

// Does a number stand before text[at]?
static bool behind_number(const char *text, size_t at) {
    size_t first = at;
    while (first > 0 && strchr("0123456789.eE+-", text[first - 1])) first--;
    return first < at && strchr("0123456789-", text[first]);
}

// The decision of ours by which a text is refused that fits its schema; NULL: none is known.
static const char *decision(const Walk *w, const Judged *j, const char *text, size_t n) {
    if (!fits_as_written(w, text, n)) return NULL;
    bool escaped = false, inside = in_string(text, n, j->at, &escaped);
    char c = j->at < n ? text[j->at] : 0;
    if (!inside && c && strchr(" \t\r", c)) return "white space is not written";
    if (escaped) return "a character is written as itself, or with its shortest escape";
    if (!inside && behind_number(text, j->at))
        return "a number is written in its shortest form, with at most 15 digits, an integer "
               "without fraction and exponent";
    const Frame *f = j->object;
    bool named = false;
    for (int i = 0; f && i < f->n; i++) {
        const Members *m = &f->at[i].atom->members;
        for (const Word *word = m->words; word < m->words + m->n; word++)      // "name":
            named |= n - j->name_at > word->length &&
                     memcmp(text + j->name_at, word->text, word->length) == 0;
    }
    return named ? "members come in the order of the schema"
                 : "members that the schema does not name are not written";
}

// "ok", or where and why a text does not fit. False: it does not.
static bool append_verdict(Bytes *out, const Schema *c, const char *text, size_t n) {
    Arena arena = {0};
    Walk w = { c, c->vocabulary, &arena };
    Judged j = judge_text(&w, text, n);
    bool fits = j.at == n && may_end(j.frame);
    if (fits) append_string(out, "ok");
    else {
        enum { SHOWN = 12 };
        int expected = 0;
        Bytes list = {0};
        append_format(out, "at byte %zu ", j.at);
        for (int byte = 0x20; byte < 0x7F && expected <= SHOWN; byte++)
            if (step(&w, j.frame, (uint8_t)byte))
                append_format(&list, "%s%c", expected++ ? " " : "", byte);
        if (j.frame->n == 0) append_string(out, "the end was expected");
        else if (expected == 0 || expected > SHOWN)
            append_string(out, "something else was expected");
        else append_format(out, "%s%s was expected", expected > 1 ? "one of " : "", list.data);
        append_string(out, "; found ");
        size_t length = n - j.at < SHOWN ? n - j.at : SHOWN;
        if (length < n - j.at) length -= utf8_unfinished(text + j.at, length);
        if (j.at < n) append_text(out, text + j.at, length ? length : 1, IN_JSON);
        else append_string(out, "the end");
        const char *ours = decision(&w, &j, text, n);
        if (ours) append_format(out, " (a decision of kl3m: %s)", ours);
        free(list.data);
    }
    arena_free(&arena);
    return fits;
}

// The tokens that stay within a language, whatever its lengths, from one of its states on: kept,
// since most of a text stands in strings.
typedef struct {
    long schema;                   // its number; 0: the place is free
    const Automaton *automaton;
    uint32_t state;
    uint64_t *bits;
} Inside;

enum { KEPT = 64 };

// What one thread needs to find the tokens that may follow.
typedef struct {
    const Vocabulary *vocabulary;
    Arena arena;
    const Frame **path;            // [LONGEST_USABLE] the states behind a token's bytes
    Reader *readers;               // [LONGEST_USABLE]
    Mark *marks;                   // [LONGEST_USABLE + 1]
    Inside kept[KEPT];
    int last_kept;
    uint64_t *allowed;             // [words] a bit a token
    size_t words;
} Masker;

static Masker masker_open(const Vocabulary *v, int vocab) {
    size_t words = ((size_t)vocab + 63) / 64;
    return (Masker){ .vocabulary = v, .words = words, .allowed = allocate(words, sizeof(uint64_t)),
                     .path = allocate(LONGEST_USABLE, sizeof(Frame *)),
                     .readers = allocate(LONGEST_USABLE, sizeof(Reader)),
                     .marks = allocate(LONGEST_USABLE + 1, sizeof(Mark)) };
}

static void masker_close(Masker *k) {
    for (int i = 0; i < KEPT; i++) free(k->kept[i].bits);
    arena_free(&k->arena);
    free(k->allowed);
    free(k->path);
    free(k->readers);
    free(k->marks);
}

static void set_bit(uint64_t *bits, uint32_t i) { bits[i / 64] |= 1ull << i % 64; }

// The tokens of a trie behind which at most `most` tokens are needed.
static void walk_trie(Masker *k, const Walk *w, const Trie *t, const Frame *f, uint32_t most) {
    k->marks[0] = arena_mark(&k->arena);
    for (uint32_t i = 0; i < t->n;) {
        const TrieNode *node = &t->nodes[i];
        arena_reset(&k->arena, k->marks[node->depth]);
        const Frame *next = step(w, node->depth ? k->path[node->depth - 1] : f, node->byte);
        if (next == NULL) {
            i = node->end;
            continue;
        }
        k->path[node->depth] = next;
        k->marks[node->depth + 1] = arena_mark(&k->arena);
        if (node->token != TOKENIZER_NONE &&
            frame_left(&k->arena, k->vocabulary, next) <= most) set_bit(k->allowed, node->token);
        i++;
    }
    arena_reset(&k->arena, k->marks[0]);
}

// The tokens that stay within a language, behind which at most `most` bytes are needed to its end.
static void walk_language(Masker *k, const Language *l, const Reader *from, uint32_t most,
                          uint64_t *bits) {
    const Trie *t = &k->vocabulary->all;
    for (uint32_t i = 0; i < t->n;) {
        const TrieNode *node = &t->nodes[i];
        Reader *r = &k->readers[node->depth];
        *r = node->depth ? r[-1] : *from;
        if (!read_byte(l, r, node->byte)) {
            i = node->end;
            continue;
        }
        if (node->token != TOKENIZER_NONE && reader_left(l, r) <= most)
            set_bit(bits, node->token);
        i++;
    }
}

// The same where neither lengths nor the limit matter.
static const uint64_t *inside_tokens(Masker *k, long schema, const Language *l, uint32_t state) {
    for (Inside *i = k->kept; i < k->kept + KEPT; i++)
        if (i->schema == schema && i->automaton == l->automaton && i->state == state)
            return i->bits;
    Inside *new = &k->kept[k->last_kept = (k->last_kept + 1) % KEPT];
    Language any_length = *l;
    any_length.least = 0, any_length.most = BEYOND - 1;
    if (new->bits == NULL) new->bits = allocate(k->words, sizeof *new->bits);
    memset(new->bits, 0, k->words * sizeof *new->bits);
    new->schema = schema, new->automaton = l->automaton, new->state = state;
    walk_language(k, &any_length, &(Reader){ .state = state }, BEYOND - 1, new->bits);
    return new->bits;
}

// The state behind a token; NULL: it may not follow.
static const Frame *step_token(const Walk *w, const Frame *f, uint32_t token) {
    size_t n;
    const char *text = tokenizer_text(w->vocabulary->tokenizer, token, &n);
    for (size_t i = 0; i < n && f; i++) f = step(w, f, (uint8_t)text[i]);
    return n ? f : NULL;
}

// Of the tokens that go on with a free name so that it begins like one that is taken each is looked
// at: something must be left to be written behind it. `f` holds the name's position alone.
static void check_taken(Masker *k, const Walk *w, const Frame *f, uint32_t most) {
    const Trie *t = &k->vocabulary->all;
    k->marks[0] = arena_mark(&k->arena);
    for (uint32_t i = 0; i < t->n;) {
        const TrieNode *node = &t->nodes[i];
        arena_reset(&k->arena, k->marks[node->depth]);
        const Frame *next = step(w, node->depth ? k->path[node->depth - 1] : f, node->byte);
        bool on_path = next && next->n && next->at[0].phase == IN_FREE_NAME;
        if (on_path && !begins_taken(&next->at[0])) {      // the automaton has said all
            i = node->end;
            continue;
        }
        k->path[node->depth] = next;
        k->marks[node->depth + 1] = arena_mark(&k->arena);
        uint32_t end = next ? i + 1 : node->end;
        for (uint32_t below = i; below < end; below++) {   // without a state nothing below it fits
            uint32_t token = t->nodes[below].token;
            if (token == TOKENIZER_NONE) continue;
            k->allowed[token / 64] &= ~(1ull << token % 64);
            if (next && frame_left(&k->arena, k->vocabulary, next) <= most)
                set_bit(k->allowed, token);
        }
        i = end;
    }
    arena_reset(&k->arena, k->marks[0]);
}

// The tokens that stay in a string or a free name, by its automaton alone.
static void find_inside(Masker *k, const Walk *w, const Frame *f, const Position *p,
                        uint32_t left) {
    enum { PART_OF_A_NAME = 16 };  // bytes that end any character and make any name a free one
    bool name = p->phase == IN_FREE_NAME;
    const Language *l = name ? &p->atom->members.names : &p->atom->language;
    uint32_t most_chars = plus(plus(p->reader.count, k->vocabulary->most_bytes), l->worst.chars);
    uint32_t needed = position_left(&k->arena, k->vocabulary, p, f->depth);
    uint32_t own = name ? name_left(&k->arena, p, BEYOND) : reader_left(l, &p->reader);
    bool long_enough = p->reader.count >= l->least || l->automaton == w->schema->any;
    bool roomy = p->reader.part == BETWEEN && long_enough && most_chars <= l->most &&
                 plus(plus(needed, l->worst.bytes), PART_OF_A_NAME) < left;
    if (roomy) {
        const uint64_t *inside = inside_tokens(k, w->schema->number, l, p->reader.state);
        for (size_t i = 0; i < k->words; i++) k->allowed[i] |= inside[i];
    } else if (needed - own < left)
        walk_language(k, l, &p->reader, left - 1 - (needed - own), k->allowed);
    if (!name || (roomy && p->atom->members.any_name)) return;
    Frame *alone = new_frame(w, f->below, 1);
    alone->at[alone->n++] = *p;
    check_taken(k, w, alone, left - 1);
}

// The tokens that may follow when `left` of them may still be drawn, into k->allowed. Positions do
// not know of each other, so each kind of them is asked in its own way.
static void find_allowed(Masker *k, const Schema *c, const Frame *f, uint32_t left) {
    Walk w = { c, k->vocabulary, &k->arena };
    Frame *others = new_frame(&w, f->below, f->n);
    bool quotes = false;
    memset(k->allowed, 0, k->words * sizeof *k->allowed);
    for (int i = 0; i < f->n && left > 0; i++) {
        const Position *p = &f->at[i];
        bool inside = p->phase == IN_STRING || p->phase == IN_FREE_NAME;
        if (inside) find_inside(k, &w, f, p, left);
        else others->at[others->n++] = *p;
        quotes |= inside && (p->phase == IN_FREE_NAME || p->atom->quoted);
    }
    others->depth = f->depth;
    if (others->n > 0) walk_trie(k, &w, &k->vocabulary->all, others, left - 1);
    if (quotes) walk_trie(k, &w, &k->vocabulary->quotes, f, left - 1);
    arena_free(&k->arena);
}

typedef struct {
    const Schema *schema;          // NULL: any text will do
    const Frame *frame;
    Arena arena;                   // holds it, and what it was before
    size_t kept;                   // bytes of it when it was last copied
    int drawn;                     // tokens
    bool ended;                    // nothing may follow them, or the last one ends a text
} Constraint;

static const Letter *copy_letters(Arena *a, const Letter *from) {
    const Letter *copy = NULL;
    const Letter **at = &copy;
    for (; from; from = from->before) {
        Letter *letter = take_copy(a, from, sizeof *from);
        *at = letter;
        at = &letter->before;
    }
    return copy;
}

static const Used *copy_used(Arena *a, const Used *from) {
    const Used *copy = NULL;
    const Used **at = &copy;
    for (; from; from = from->before) {
        Used *used = take_copy(a, from, sizeof *from);
        used->text = take_copy(a, from->text, from->length);
        *at = used;
        at = &used->before;
    }
    return copy;
}

static const Frame *copy_frame(Arena *a, const Frame *from) {
    if (from == NULL) return NULL;
    Frame *f = take_copy(a, from, sizeof *from + (size_t)from->n * sizeof *from->at);
    f->below = copy_frame(a, from->below);
    for (int i = 0; i < f->n; i++) {
        f->at[i].name = copy_letters(a, from->at[i].name);
        f->at[i].used = copy_used(a, from->at[i].used);
        f->at[i].alike = copy_used(a, from->at[i].alike);
    }
    return f;
}

static void constraint_begin(Constraint *c, const Schema *schema) {
    *c = (Constraint){ .schema = schema };
    if (schema == NULL) return;
    c->frame = opening_frame(&(Walk){ schema, schema->vocabulary, &c->arena });
}

static void constraint_close(Constraint *c) {
    arena_free(&c->arena);
    *c = (Constraint){0};
}

// A token has been drawn, perhaps an end token. What its text was is forgotten now and then. False:
// it may not follow.
static bool constraint_take(Constraint *c, uint32_t token, bool end) {
    enum { FORGOTTEN = 1 << 18 };
    Walk w = { c->schema, c->schema->vocabulary, &c->arena };
    const Frame *next = end ? NULL : step_token(&w, c->frame, token);
    c->drawn++;
    c->ended = next == NULL || must_end(&w, next);
    if (next == NULL) return end && may_end(c->frame);
    c->frame = next;
    if (c->arena.size < 2 * c->kept + FORGOTTEN) return true;
    Arena copy = {0};
    c->frame = copy_frame(&copy, next);
    arena_free(&c->arena);
    c->arena = copy, c->kept = copy.size;
    return true;
}

// The only byte that may follow, of those that a structure is made of, or -1. Strings and numbers
// are not asked: there it is seldom one, and each byte costs time. It serves for guesses alone.
static int only_byte(const Walk *w, const Frame *f) {
    int found = -1;
    for (int i = 0; i < f->n; i++)
        if (f->at[i].phase == IN_STRING || f->at[i].phase == IN_NUMBER ||
            f->at[i].phase == IN_FREE_NAME) return -1;
    for (int byte = '"'; byte <= '}'; byte++) {
        if (step(w, f, (uint8_t)byte) == NULL) continue;
        if (found >= 0) return -1;
        found = byte;
    }
    return may_end(f) ? -1 : found;
}

// The first token of the text that must follow, as the encoder would cut it; TOKENIZER_NONE: none
// must, or a longer token may span its end.
static uint32_t forced_token(const Walk *w, const Frame *f) {
    enum { MOST_FORCED = 24 };
    char text[MOST_FORCED];
    uint32_t ids[MOST_FORCED];
    size_t n = 0;
    Mark mark = arena_mark(w->arena);
    for (int byte; n < MOST_FORCED && (byte = only_byte(w, f)) >= 0; n++) {
        text[n] = (char)byte;
        f = step(w, f, (uint8_t)byte);
    }
    bool end = n > 0 && f->n == 0;             // nothing may follow
    arena_reset(w->arena, mark);
    ptrdiff_t count = n ? tokenizer_encode(w->vocabulary->tokenizer, text, n, true, ids) : 0;
    if (count > 1 || (count == 1 && end)) return ids[0];
    return TOKENIZER_NONE;
}

// ---- 16. Requests ----
// A prompt and its continuations, from the reading to the last token: what they hold, what ends
// them, and the pages that are promised to them. A request's life, of which the scheduler (room
// 17) takes each step:
//
//     read ──> WAITING ──> PREFILLING ──> RUNNING ──> DONE ──> delivered, freed
//              for pages   its prompt     its continuations
//
// One that cannot be run (error), or wants nothing, is DONE at once. Where texts are scored, what a
// request's continuations say is known, and they run as prompts do, many rows in a pass; a text
// that nothing stands before has an empty prompt and is its own continuation. What a schema
// constrains is a Continuation's state: draw_piece (room 17) asks it which tokens may follow and
// takes it further with each token it draws, propose_next with each guess.

typedef enum { UNDECIDED, BY_EOS, BY_LENGTH, BY_STOP, BY_SCHEMA } Reason;
typedef enum { WAITING, PREFILLING, RUNNING, DONE } State;

typedef struct Request Request;

// Guesses of a continuation in the next pass: tokens that may follow those that were drawn. Its
// rows, the last drawn one and these, are a tile's at most.
typedef struct {
    uint32_t ids[TILE - 1];    // [n]
    int n;
    Tail tail;                 // of the text and the guesses
    Guess next;                // that may join them; its chance: that all up to it come true
    const Frame *frame;        // behind them, where a schema constrains the text
} Chain;

typedef struct {
    Request *request;
    uint32_t number;           // among the request's continuations
    Sequence sequence;         // of the prompt and what was drawn: all but what is due
    uint32_t *ids;             // [n] drawn so far; room for the limit
    int n;
    Reason reason;
    Bytes text;                // what they decode to, cut before a stop text
    Tail tail;
    Chain chain;
    Ranked *ranks;             // [n][1 + likeliest] of each token drawn or scored; or NULL
    Constraint constraint;
    // Of what is to be scored (Settings.scores): all its tokens, which lie in the request's ids
    // and stand behind its prompt. n of them are scored so far, from known[unscored] on.
    const uint32_t *known;     // [n_known]
    int n_known, unscored;
} Continuation;

struct Request {
    Request *next;
    State state;
    char *error;               // why it cannot be run, or NULL
    long line;                 // of the input, from 1; 0: the prompt was not a line
    long number;               // in the order of the input
    size_t record_size;        // bytes that it took there
    char *prompt;              // [prompt_size]; NULL: the line held none
    size_t prompt_size;
    Bytes members;             // of JSON, that came with it

    uint32_t *ids;             // [n] what the model is given
    int n;
    int prompt_tokens;         // n, or 0 for an empty prompt, which starts from <|start|>
    int limit;                 // new tokens at most
    int before;                // of the ids so many were drawn before: it goes on with a text,
    Bytes begun;               // which has come so far
    uint64_t seed, stream;     // of its draws
    const uint32_t *forced;    // NULL, or [limit]: drawn instead; tests/bench replays known text
    Schema *schema;            // that its continuations fit, or NULL; it is one of its users

    Sequence prompt_kv;        // of the prompt as far as it was run; shared by its continuations
    Tail tail;                 // of the prompt
    Continuation *continuations;
    int n_continuations;
    bool windows;              // they are those of the prompt, which is scored itself
    int started, finished, delivered;  // of them
    int promised;              // of them that have pages, and so may be in work at once
};

// What a run is asked for.
typedef struct {
    Sampling sampling;
    long returns;              // continuations of each prompt
    long batch, rows;          // most sequences in work, most rows in a pass; 0: what pays off
    long kv_memory;            // bytes for keys and values
    long most_kv_memory;       // that may be asked for on this machine
    bool ignore_eos;
    bool every_position;       // the logits of each position of the prompts, and no new tokens
    bool scores;               // the continuations are known: how likely are they?
    bool converses;            // one prompt after another, and perhaps the last text goes on
    long logprobs;             // of each place so many tokens' are wanted, besides that of its own;
                               // -1: none
    Texts stops;               // end a continuation, which is cut before them
    const Vocabulary *vocabulary;      // of texts that must fit a schema; NULL: none must
    Schema *schema;            // that all must fit; NULL: each request brings its own
    const char *schema_member; // the member of a record that holds it
    bool pattern;              // the schema is a pattern, and the texts are no JSON
    Texts ignored;             // keywords of schemas that are not enforced if not supported
} Settings;

// How many of the likeliest tokens of each place are kept: the first tells whether a token is
// greedy. 0: nothing is.
static int likeliest_of(const Settings *s) {
    return s->logprobs > 0 ? (int)s->logprobs : s->scores || s->logprobs == 0;
}

// Where the first stop text ends that became whole with the bytes from `old` on; *length is its
// length. Among those that end at the same byte the longest counts. Nothing depends on where
// tokens end.
static bool find_stop(const Texts *s, const Bytes *text, size_t old, size_t *end, size_t *length) {
    *length = 0;
    for (*end = old + 1; *end <= text->size; ++*end) {
        for (int i = 0; i < s->n; i++) {
            const Bytes *stop = &s->texts[i];
            if (stop->size <= *end && stop->size > *length &&
                memcmp(text->data + *end - stop->size, stop->data, stop->size) == 0)
                *length = stop->size;
        }
        if (*length) return true;
    }
    return false;
}

// How many bytes at the end of a text might yet become part of a stop text: they are not shown
// before it is known.
static size_t held_for_stop(const Texts *s, const Bytes *text) {
    size_t held = 0;
    for (int i = 0; i < s->n; i++)
        for (size_t n = s->texts[i].size - 1; n > held; n--)
            if (n <= text->size && memcmp(text->data + text->size - n, s->texts[i].data, n) == 0) {
                held = n;
                break;
            }
    return held;
}

// The token at a position of a continuation: of its prompt, or drawn, or guessed.
static uint32_t token_at(const Continuation *c, int position) {
    int drawn = position - c->request->n, guessed = drawn - c->n;
    if (drawn < 0) return c->request->ids[position];
    return guessed < 0 ? c->ids[drawn] : c->chain.ids[guessed];
}

// A drawn token, which stands at ids[n] already, joins its continuation, which it may end.
static void accept_token(const Model *m, const Settings *s, Continuation *c) {
    uint32_t token = c->ids[c->n++];
    size_t old = c->text.size, n, end;
    const char *text = tokenizer_text(&m->tokenizer, token, &n);
    if (!tokenizer_is_special(&m->tokenizer, token)) append(&c->text, text, n);
    if (find_stop(&s->stops, &c->text, old, &end, &n)) {
        c->reason = BY_STOP;
        c->text.size = end - n;
    } else if (c->constraint.ended && c->n == c->constraint.drawn) c->reason = BY_SCHEMA;
    else if (is_end(m, token) && !s->ignore_eos) c->reason = BY_EOS;
    else if (c->n >= c->request->limit) c->reason = BY_LENGTH;
}

// The whole pages of a prompt that has been run: the next prompts may begin alike.
typedef struct { uint32_t *ids; Sequence sequence; long used; } Beginning;

// Few: their pages could be used again, and new ones cost time (measured: 1 ms).
enum { BEGINNINGS = 4 };

// Pages, and how many of them requests in work may come to use: no more than the ceiling, so that
// what has begun can always go on. promised is the sum over requests that are PREFILLING or RUNNING
// of prompt_pages, and continuation_pages times their own promised.
typedef struct {
    KVCache kv;
    long promised, ceiling;
    Beginning beginnings[BEGINNINGS];
    long uses;                 // of beginnings, counted
} Pages;

static void forget(Pages *p, Beginning *b) {
    kv_free(&p->kv, &b->sequence);
    free(b->ids);
    *b = (Beginning){0};
}

// Promises so many pages more, at the cost of the beginnings that were used longest ago. False:
// there are not enough now.
static bool promise(Pages *p, int pages) {
    if (p->promised + pages > p->ceiling) return false;
    for (;;) {
        long kept = 0;
        Beginning *oldest = NULL;
        for (Beginning *b = p->beginnings; b < p->beginnings + BEGINNINGS; b++) {
            kept += b->sequence.n_pages;
            if (b->ids && (oldest == NULL || b->used < oldest->used)) oldest = b;
        }
        if (oldest == NULL || p->promised + pages + kept <= p->ceiling) break;
        forget(p, oldest);
    }
    p->promised += pages;
    return true;
}

// What a request needs for its prompt, and for each continuation behind the pages that it shares
// with the prompt: all but the one that holds the prompt's last token, which it may run again.
static int prompt_pages(const Request *r) { return pages_for(r->n); }
static int continuation_pages(const Request *r) {
    return pages_for(r->n + r->limit) - (r->n - 1) / PAGE;
}

// Bytes of keys and values that it needs at least, to go on whatever else is in work.
static double bytes_needed(const Request *r, const Model *m) {
    return (double)(prompt_pages(r) + continuation_pages(r)) * (double)page_bytes(m);
}

// Positions at the beginning of two prompts, whole pages of them, that hold the same tokens.
static int common_beginning(const uint32_t *a, const uint32_t *b, int most) {
    int n = 0;
    while (n < most && memcmp(a + n, b + n, PAGE * sizeof *a) == 0) n += PAGE;
    return n;
}

// Takes over what another prompt that begins alike has computed. False: one before it in the list
// will soon have more, and it pays to wait; the first that is being prefilled never does.
static bool share_beginning(Pages *p, const Request *first, Request *r) {
    int most = (r->n - 1) / PAGE * PAGE, best = 0;     // one row must be left, for its logits
    const Sequence *from = NULL;
    Beginning *known = NULL;
    for (const Request *q = first; q != r; q = q->next) {
        if (q->state != PREFILLING && q->state != RUNNING) continue;
        int whole = q->n / PAGE * PAGE, common;
        common = common_beginning(q->ids, r->ids, whole < most ? whole : most);
        if (common > best) best = common, from = &q->prompt_kv;
    }
    for (Beginning *b = p->beginnings; b < p->beginnings + BEGINNINGS; b++) {
        int whole = b->sequence.length;
        int common = common_beginning(b->ids, r->ids, whole < most ? whole : most);
        if (common > 0 && common >= best) best = common, from = &b->sequence, known = b;
    }
    if (best == 0) return true;
    if (from->length < best) return false;
    r->prompt_kv = kv_fork(from, best);
    if (known) known->used = ++p->uses;
    return true;
}

// Gives up what of a prompt's keys and values is no whole page.
static void keep_whole_pages(Pages *p, Request *r) {
    Sequence whole = kv_fork(&r->prompt_kv, r->prompt_kv.length / PAGE * PAGE);
    kv_free(&p->kv, &r->prompt_kv);
    r->prompt_kv = whole;
}

// Keeps a prompt's whole pages for those that may begin alike.
static void remember_beginning(Pages *p, Request *r) {
    Beginning *place = p->beginnings;
    int length = r->prompt_kv.length;
    for (Beginning *b = p->beginnings; b < p->beginnings + BEGINNINGS; b++) {
        if (b->ids && b->sequence.length >= length &&
            common_beginning(b->ids, r->ids, length) == length) return;    // it is known
        if (b->used < place->used) place = b;
    }
    if (length == 0) return;
    if (place->ids) forget(p, place);
    *place = (Beginning){ .ids = r->ids, .sequence = r->prompt_kv, .used = ++p->uses };
    r->ids = NULL;
    r->prompt_kv = (Sequence){0};
}

static void make_continuations(Request *r, long n) {
    r->n_continuations = (int)n;
    r->continuations = allocate((size_t)n, sizeof *r->continuations);
    for (int i = 0; i < r->n_continuations; i++)
        r->continuations[i] = (Continuation){ .request = r, .number = (uint32_t)i };
}

// A request is read: its continuations are made, unless they are known, and if it is to be run it
// waits for pages.
static void begin_request(Request *r, const Settings *s) {
    bool empty = r->schema && r->schema->empty;            // nothing is to be written
    bool runs = !r->error && (r->limit > 0 || s->every_position) && !empty;
    r->state = runs ? WAITING : DONE;
    if (r->error) return;
    r->stream = stream_of(r->ids, r->prompt_tokens);
    if (!s->scores) make_continuations(r, s->returns);
    for (int i = 0; i < r->n_continuations; i++)
        r->continuations[i].reason = runs ? UNDECIDED : empty ? BY_SCHEMA : BY_LENGTH;
}

// Begins the next continuation of a prompt that has been run, behind so many of its positions. Each
// copies the prompt's last page, if it is not whole; the last one may have it.
static Continuation *start_continuation(Pages *p, const Settings *s, Request *r, int behind) {
    Continuation *c = &r->continuations[r->started++];
    int scored = c->n_known > c->unscored ? c->n_known - c->unscored : 0;
    size_t tokens = (size_t)(s->scores ? scored : r->limit);
    if (!s->scores) c->ids = allocate(tokens, sizeof *c->ids);
    int likeliest = likeliest_of(s);
    if (likeliest)
        c->ranks = allocate_raw(tokens, (1 + (size_t)likeliest) * sizeof *c->ranks, LINE_BYTES);
    append(&c->text, r->begun.data, r->begun.size);        // an empty text is a string too
    c->sequence = kv_fork(&r->prompt_kv, behind);
    if (r->schema) constraint_begin(&c->constraint, r->schema);
    c->tail = r->tail;
    if (r->started == r->n_continuations) keep_whole_pages(p, r);
    return c;
}

// A request's prompt and all its continuations have been run.
static void end_request(Pages *p, Request *r) {
    r->state = DONE;
    p->promised -= prompt_pages(r) + (long)r->promised * continuation_pages(r);
    r->promised = 0;
    if (r->prompt_kv.length % PAGE) keep_whole_pages(p, r);
    remember_beginning(p, r);
    kv_free(&p->kv, &r->prompt_kv);
}

// What a text's keys and values hold becomes its request's prompt, which will be remembered.
static void keep_text(Pages *p, Continuation *c) {
    Request *r = c->request;
    uint32_t *ids = allocate((size_t)r->n + (size_t)c->n, sizeof *ids);
    memcpy(ids, r->ids, (size_t)r->n * sizeof *ids);
    memcpy(ids + r->n, c->ids, (size_t)c->n * sizeof *ids);
    free(r->ids);
    kv_free(&p->kv, &r->prompt_kv);
    r->ids = ids, r->prompt_kv = c->sequence;
    c->sequence = (Sequence){0};
}

// A continuation is decided. Its pages go to the next one, or back.
static void end_continuation(Pages *p, const Settings *s, Continuation *c) {
    Request *r = c->request;
    if (s->converses && r->n_continuations == 1) keep_text(p, c);
    kv_free(&p->kv, &c->sequence);
    constraint_close(&c->constraint);
    r->finished++;
    if (r->finished == r->n_continuations) end_request(p, r);
    else if (r->started == r->n_continuations) {
        p->promised -= continuation_pages(r);
        r->promised--;
    }
}

static void request_free(Request *r, KVCache *kv) {
    for (int i = 0; i < r->n_continuations; i++) {
        kv_free(kv, &r->continuations[i].sequence);
        constraint_close(&r->continuations[i].constraint);
        free(r->continuations[i].ids);
        free(r->continuations[i].text.data);
        free(r->continuations[i].ranks);
    }
    kv_free(kv, &r->prompt_kv);
    if (r->schema) r->schema->users--;
    free(r->continuations);
    free(r->ids);
    free(r->prompt);
    free(r->members.data);
    free(r->begun.data);
    free(r->error);
    free(r);
}

// ---- 17. Scheduling ----
// Requests come from a client, are run some at a time, and go back to it in the order they came.
// A pass is planned, run and read. It holds, for every continuation in work, the row of its last
// token and guesses behind it, and of what is known (prompts, continuations to be scored) as many
// rows as there is room for;
// and a list of readings: whose logits come out, and what for. What is in a pass never changes what
// comes out of it, so this room is free to choose.

// Who asks, and is told; what is NULL is not told.
typedef struct {
    void *arg;
    // The next request, or NULL: there is none now (*ended: none ever again). `wait`: nothing else
    // is to be done.
    Request *(*next)(void *arg, bool wait, bool *ended);
    void (*begun)(void *arg, const Request *r);        // it was read, and has no error
    void (*grown)(void *arg, const Continuation *c);   // by a token or more
    // It is decided; in the order of the input and of the continuations' numbers.
    void (*decided)(void *arg, Continuation *c);
    // Of the next position of a prompt, where all were asked for.
    void (*logits)(void *arg, const float *logits);
    void (*done)(void *arg, Request *r);               // in the order of the input
} Client;

// Rows of the last pass's logits and what they are for: to draw a continuation's next tokens, to
// score its tokens, to begin a request's continuations, or to be handed out. A new use of logits is
// a purpose here, planned in plan_prompt and read in read_pass.
typedef struct {
    enum { TO_DRAW, TO_SCORE, TO_BEGIN, TO_HAND_OUT } purpose;
    Continuation *continuation;        // of the first two
    Request *request;                  // of the others
    int first, n;                      // rows of logits
} Reading;

// Known tokens that a pass may take further: a request's prompt, or of its continuations one that
// is scored (NULL: none).
typedef struct { Request *request; Continuation *continuation; int left, rows; } Prefill;

// Tokens to be drawn: from the logits of a continuation's last token, and of guesses behind it
// while the draw before picks them. They go to ids[n ..] of the continuation.
typedef struct {
    Continuation *continuation;
    const float *logits;               // [rows][padded vocab]
    int rows, drawn;
    enum { NO_FAULT, NOT_FINITE, PENALTY_OVERFLOWS, NOTHING_FITS } fault;
} Draw;

// How long a pass takes by its rows: a line through those that were run, the last ones above all.
typedef struct { double rows, seconds, variance, covariance; } PassTime;

// What was done so far.
typedef struct {
    long requests, passes, rows, tokens;
    long draws, decoded, guesses;      // continuations summed up over the passes, tokens that they
                                       // drew there, guesses
    double first_token;                // when it was drawn, in busy_seconds()
} Figures;

enum {
    USUAL_ROWS = 256,                  // of a pass
    USUAL_BATCH = 48,                  // sequences in work
    MOST_ROWS = 65536,
    MOST_BATCH = 1024,
    MOST_GUESSES = 48,                 // in a pass
    MOST_HELD = 16,                    // requests, in batches, that wait for one before them
};

typedef struct {
    const Model *m;
    const Kernels *kernels;
    Settings settings;
    Client client;
    Guesses *guesses;                  // NULL: one token a pass
    int batch, max_rows;               // in force
    Pages pages;
    Work work;
    Sampler *samplers;                 // [threads]
    Masker *maskers;                   // [threads], where texts must fit a schema
    Arena frames;                      // of guesses at such texts, in the pass that is planned
    Request *first, *last;             // read and not delivered, in the order of the input
    Request *waiting;                  // the last one read, while there are no pages for it
    int n_requests;                    // in the list
    int in_work;                       // prompts being prefilled, and continuations
    bool ended;                        // the client has no more
    Continuation **running;            // [n_running]
    int n_running;
    // The pass.
    Prefill *prefills;                 // [n_prefills], room for the batch
    Row *rows;                         // [n_rows]
    Reading *readings;                 // [n_readings]
    Draw *draws;                       // [batch]
    int n_rows, n_logits, n_readings, n_prefills;
    bool only_decoding;
    PassTime time;
    Figures figures;
} Scheduler;

typedef struct { const Scheduler *s; Draw *draws; } DrawJob;

// The tokens that may follow where a schema constrains a continuation; NULL: no token is left that
// may be drawn.
static const uint64_t *allowed_tokens(const Scheduler *s, const Continuation *c, Masker *k) {
    const FileConfig *file = &s->m->file_config;
    const Frame *f = c->constraint.frame;
    int left = c->request->limit - c->constraint.drawn;
    find_allowed(k, c->constraint.schema, f, (uint32_t)left);
    bool any = false;
    for (uint32_t i = 0; i < file->n_ends && may_end(f); i++) set_bit(k->allowed, file->ends[i]);
    for (size_t i = 0; i < k->words && !any; i++) any = k->allowed[i] != 0;
    return any ? k->allowed : NULL;
}

// Piece: the tokens of one continuation: the guesses that come true, and the first that was not
// guessed.
static void draw_piece(void *arg, int piece, int thread) {
    const DrawJob *job = arg;
    const Scheduler *s = job->s;
    Draw *d = &job->draws[piece];
    Continuation *c = d->continuation;
    const Request *r = c->request;
    int vocab = s->m->c.vocab;
    for (bool guessed = true; guessed && d->drawn < d->rows;) {
        int n = c->n + d->drawn;
        Choice choice = {
            .logits = d->logits + (long)d->drawn * padded(vocab), .n = vocab,
            .prompt = r->ids, .n_prompt = r->n, .drawn = c->ids, .n_drawn = n,
            .number = uniform(r->seed, r->stream, c->number, (uint32_t)(n + r->before)),
        };
        if (!s->kernels->all_finite(vocab, choice.logits)) d->fault = NOT_FINITE;
        if (d->fault) return;
        if (c->constraint.schema) {
            choice.unpenalized = !in_content(c->constraint.frame);
            choice.allowed = allowed_tokens(s, c, &s->maskers[thread]);
            c->constraint.ended = choice.allowed == NULL;
            if (c->constraint.ended && !may_end(c->constraint.frame)) d->fault = NOTHING_FITS;
            if (c->constraint.ended) return;
        }
        uint32_t token = sample(&s->settings.sampling, &choice, &s->samplers[thread]);
        if (token == TOKENIZER_NONE) d->fault = PENALTY_OVERFLOWS;
        if (d->fault) return;
        if (r->forced) token = r->forced[n];
        c->ids[n] = token;
        int likeliest = likeliest_of(&s->settings);
        if (likeliest)
            find_ranks(&s->samplers[thread], choice.logits, vocab, token, likeliest,
                       c->ranks + (long)n * (1 + likeliest));
        guessed = d->drawn + 1 < d->rows && c->chain.ids[d->drawn] == token;
        d->drawn++;
        if (c->constraint.schema && !constraint_take(&c->constraint, token, is_end(s->m, token)))
            d->fault = NOTHING_FITS;
        guessed &= !c->constraint.ended;
    }
}

// What cannot be drawn is a fault, unless the text ended before it.
static void check_draw(const Scheduler *s, const Draw *d) {
    if (d->continuation->reason != UNDECIDED || d->fault == NO_FAULT) return;
    if (d->fault == PENALTY_OVERFLOWS)
        die("--repetition-penalty %g makes logits overflow; one nearer to 1 does not",
            s->settings.sampling.penalty);
    if (d->fault == NOTHING_FITS) die("a text cannot go on under its schema: a fault of kl3m");
    die_not_finite(s->m);
}

// Draws for the first n of s->draws at once, and goes on with those that are not decided.
static void draw_all(Scheduler *s, int n) {
    parallel(n, draw_piece, &(DrawJob){ s, s->draws });
    if (n > 0 && s->figures.tokens == 0) s->figures.first_token = busy_seconds();
    for (Draw *d = s->draws; d < s->draws + n; d++) {
        Continuation *c = d->continuation;
        for (int i = 0; i < d->drawn && c->reason == UNDECIDED; i++) {
            if (s->guesses) {
                judge(s->guesses, &c->tail, c->ids[c->n]);
                learn(s->guesses, &c->tail, c->ids[c->n]);
            }
            accept_token(s->m, &s->settings, c);
            s->figures.tokens++;
        }
        check_draw(s, d);
        if (c->reason == UNDECIDED && c->constraint.ended) c->reason = BY_SCHEMA;
        c->sequence.length = c->request->n + c->n - 1;     // the last token is due
        if (c->reason == UNDECIDED) s->running[s->n_running++] = c;
        else {
            s->in_work--;
            end_continuation(&s->pages, &s->settings, c);
        }
        if (s->client.grown) s->client.grown(s->client.arg, c);
    }
}

// Hands over what is done, up to the first continuation that is not.
static void deliver(Scheduler *s) {
    for (Request *r; (r = s->first) != NULL;) {
        for (; r->delivered < r->n_continuations; r->delivered++) {
            Continuation *c = &r->continuations[r->delivered];
            if (c->reason == UNDECIDED) break;
            if (s->client.decided) s->client.decided(s->client.arg, c);
            free(c->ids);
            c->ids = NULL;
        }
        if (r->state != DONE) return;
        s->first = r->next;
        if (s->first == NULL) s->last = NULL;
        s->n_requests--;
        if (s->client.done) s->client.done(s->client.arg, r);
        request_free(r, &s->pages.kv);
    }
}

// Reads a request into the list. False: there is none now.
static bool read_next(Scheduler *s) {
    bool idle = s->in_work == 0 && s->first == NULL;
    Request *r = s->client.next(s->client.arg, idle, &s->ended);
    if (r == NULL) return false;
    if (s->last) s->last->next = r;
    else s->first = r;
    s->last = r;
    s->n_requests++;
    r->number = s->figures.requests++;
    begin_request(r, &s->settings);
    if (!r->error && s->client.begun) s->client.begun(s->client.arg, r);
    if (r->state == WAITING) s->waiting = r;
    return true;
}

// May a request's next continuation begin?
static bool may_start(Scheduler *s, Request *r) {
    if (r->state != RUNNING || r->started == r->n_continuations || s->in_work >= s->batch)
        return false;
    if (r->started - r->finished < r->promised) return true;
    if (!promise(&s->pages, continuation_pages(r))) return false;
    r->promised++;
    return true;
}

static bool wholly_scored(const Continuation *c) { return c->unscored + c->n >= c->n_known; }

// A continuation is scored to its end.
static void end_score(Scheduler *s, Continuation *c) {
    c->reason = BY_LENGTH;
    s->in_work--;
    end_continuation(&s->pages, &s->settings, c);
}

// Begins as many of a request's continuations as there is room for. One that is to be drawn runs
// its prompt's last token again, for its logits; most began when these were at hand
// (begin_continuations).
static void start_more(Scheduler *s, Request *r) {
    bool scores = s->settings.scores;
    while (may_start(s, r)) {
        Continuation *c = start_continuation(&s->pages, &s->settings, r,
                                             scores ? r->n : r->n - 1);
        s->in_work++;
        if (scores && wholly_scored(c)) end_score(s, c);   // nothing of it is asked for
        else s->running[s->n_running++] = c;
    }
}

// The request that waits is prefilled from now on, if there are pages for it and for one of its
// continuations, so that it can always go on.
static bool admit_waiting(Scheduler *s) {
    Request *r = s->waiting;
    if (!promise(&s->pages, prompt_pages(r) + continuation_pages(r))) return false;
    for (int i = 0; s->guesses && i < r->n; i++) learn(s->guesses, &r->tail, r->ids[i]);
    r->promised = 1;
    s->waiting = NULL;
    if (r->n > 0) r->state = PREFILLING, s->in_work++;
    else r->state = RUNNING, start_more(s, r);             // nothing stands before what is scored
    return true;
}

// Fills the batch: with continuations of prompts that are prefilled until none is left to begin,
// and only then with new prompts. So no more prompts are held than the batch has places, but for
// finished ones that wait for one before them.
static void admit(Scheduler *s) {
    for (Request *r = s->first; r; r = r->next) start_more(s, r);
    while (!interrupted && s->in_work < s->batch && s->n_requests < MOST_HELD * s->batch) {
        if (s->waiting == NULL && (s->ended || !read_next(s))) break;
        if (s->waiting && !admit_waiting(s)) break;
        deliver(s);
    }
}

static int by_age(const void *a, const void *b) {
    const Prefill *x = a, *y = b;
    if (x->continuation == y->continuation && x->request == y->request) return 0;
    if (x->request != y->request) return x->request->number < y->request->number ? -1 : 1;
    return x->continuation->number < y->continuation->number ? -1 : 1;
}

static int by_rows_left(const void *a, const void *b) {
    const Prefill *x = a, *y = b;
    return x->left != y->left ? x->left - y->left : by_age(a, b);
}

// What there is to prefill: prompts, and what is scored behind them.
static void find_prefills(Scheduler *s) {
    s->n_prefills = 0;
    for (Request *r = s->first; r; r = r->next) {
        if (r->state != PREFILLING) continue;
        if (r->prompt_kv.length == 0 && !share_beginning(&s->pages, s->first, r)) continue;
        s->prefills[s->n_prefills++] = (Prefill){ r, .left = r->n - r->prompt_kv.length };
    }
    for (int i = 0; s->settings.scores && i < s->n_running; i++) {
        Continuation *c = s->running[i];       // after the last token nothing is asked
        int left = c->request->n + c->n_known - 1 - c->sequence.length;
        s->prefills[s->n_prefills++] = (Prefill){ c->request, c, .left = left };
    }
    qsort(s->prefills, (size_t)s->n_prefills, sizeof *s->prefills, by_age);
}

// Divides `room` rows among what is to be prefilled: half go to the oldest, in their order, so that
// results come early; the rest to those that need the fewest, so that a short prompt does not wait
// for a long one. Returns how many were given.
static int plan_prefill(Scheduler *s, int room) {
    int half = room / 2, given = 0;
    size_t n = (size_t)s->n_prefills;
    for (int pass = 0; pass < 2; pass++) {
        int left = pass ? room - given : half;
        for (Prefill *p = s->prefills; p < s->prefills + n; p++) {
            int more = p->left < left ? p->left : left;
            p->rows += more, p->left -= more, left -= more, given += more;
        }
        qsort(s->prefills, n, sizeof *s->prefills, pass == 0 ? by_rows_left : by_age);
    }
    return given;
}

// What one row more adds to a pass, in seconds. Until passes of several sizes were seen it is
// thought to cost what it does where memory is the limit: little. It never costs nothing: its
// logits and its draw are work too.
static double row_seconds(const PassTime *t) {
    static const double free_rows = 32, most_free_rows = 48;
    double usual = t->seconds / (t->rows + free_rows), most = t->seconds / t->rows;
    double least = t->seconds / (t->rows + most_free_rows);
    return fmin(fmax((t->covariance + usual) / (t->variance + 1), least), most);
}

// What a pass of n rows took becomes part of it.
static void measure_pass(PassTime *t, int n, double taken) {
    static const double last = 32;             // passes that count
    taken = fmax(taken, 1e-9);                 // a coarse clock may see no time pass
    if (t->rows == 0) *t = (PassTime){ .rows = n, .seconds = taken };
    double rows = n - t->rows, expected = t->seconds + rows * row_seconds(t);
    double time = fmin(taken, 1.5 * expected) - t->seconds;    // a disturbed pass is no rule
    t->rows += rows / last, t->seconds += time / last;
    t->variance += (rows * rows - t->variance) / last;
    t->covariance += (rows * time - t->covariance) / last;
}

// What one row more adds to a pass of n rows, as a share of the time that pass takes.
static double row_share(const PassTime *t, int n) {
    PassTime time = t->rows > 0 ? *t : (PassTime){ .rows = n, .seconds = 1 };
    double row = row_seconds(&time);
    return row / (time.seconds + (n - time.rows) * row);
}

// The state behind a token, if the token may follow a chain in a text that must fit a schema.
static const Frame *frame_behind(Scheduler *s, const Continuation *c, uint32_t token) {
    Walk w = { c->constraint.schema, s->settings.vocabulary, &s->frames };
    int left = c->request->limit - c->n - c->chain.n - 1;
    const Frame *f = usable(s->settings.vocabulary, token) ? step_token(&w, c->chain.frame, token)
                                                           : NULL;
    bool ends = f && frame_left(&s->frames, s->settings.vocabulary, f) <= (uint32_t)left;
    return ends ? f : NULL;
}

// Where a schema constrains the text: what must follow is guessed, what may not follow is not.
static void hold_to_schema(Scheduler *s, Continuation *c) {
    static const double sure = 0.9;            // the text is, but a model may cut it otherwise
    Walk w = { c->constraint.schema, s->settings.vocabulary, &s->frames };
    Guess *next = &c->chain.next;
    if (c->chain.frame == NULL || c->chain.frame->n == 0) {
        next->chance = 0;
        return;
    }
    uint32_t forced = forced_token(&w, c->chain.frame);
    if (forced != TOKENIZER_NONE && next->chance < sure) *next = (Guess){ forced, sure };
    if (next->chance > 0 && !frame_behind(s, c, next->token)) next->chance = 0;
}

// The guess that may stand behind a chain, whose own chance to come true is given.
static void propose_next(Scheduler *s, Continuation *c, double chance) {
    Guess *next = &c->chain.next;
    *next = propose(s->guesses, &c->chain.tail);
    if (next->token >= (uint32_t)s->m->c.vocab) next->chance = 0;
    if (c->constraint.schema) hold_to_schema(s, c);
    next->chance *= chance;
}

// Is there room for another guess? A continuation has a tile's rows at most, and a draw must come
// after it.
static bool may_guess(const Continuation *c) {
    return 1 + c->chain.n < TILE && c->n + c->chain.n + 1 < c->request->limit;
}

static void add_guess(Scheduler *s, Continuation *c) {
    Chain *chain = &c->chain;
    Guess taken = chain->next;
    if (c->constraint.schema) chain->frame = frame_behind(s, c, taken.token);
    chain->ids[chain->n++] = taken.token;
    push(&chain->tail, taken.token);
    propose_next(s, c, taken.chance);
}

// Chooses the guesses of a pass that has n rows without them, each of which brings a token or takes
// one in: always the likeliest, as long as it promises more tokens a second than the pass has
// before it. Returns how many.
static int plan_guesses(Scheduler *s, int n) {
    double tokens = n;
    arena_free(&s->frames);
    for (int i = 0; i < s->n_running; i++) {
        Continuation *c = s->running[i];
        c->chain = (Chain){ .tail = c->tail, .frame = c->constraint.frame };
        if (s->guesses) propose_next(s, c, 1);
    }
    int guesses = 0, most = s->max_rows - n < MOST_GUESSES ? s->max_rows - n : MOST_GUESSES;
    for (; s->guesses && guesses < most; guesses++) {
        Continuation *best = NULL;
        for (int i = 0; i < s->n_running; i++) {
            Continuation *c = s->running[i];
            if (may_guess(c) && (!best || c->chain.next.chance > best->chain.next.chance)) best = c;
        }
        double least = tokens * row_share(&s->time, n + guesses);
        if (best == NULL || !(best->chain.next.chance > least)) break;
        tokens += best->chain.next.chance;
        add_guess(s, best);
    }
    return guesses;
}

// The rows of a continuation: the token that is due, and its guesses. All of them are drawn from.
static void plan_continuation(Scheduler *s, Continuation *c) {
    int from = c->sequence.length, n = 1 + c->chain.n;
    kv_reserve(&s->pages.kv, &c->sequence, from + n);
    for (int i = 0; i < n; i++)
        s->rows[s->n_rows++] = (Row){ &c->sequence, from + i, token_at(c, from + i), true };
    s->readings[s->n_readings++] = (Reading){ TO_DRAW, .continuation = c, .first = s->n_logits,
                                              .n = n };
    s->n_logits += n;
}

// The rows of a prompt that it was given. Of its last token, or of each, logits are read; or none,
// where what follows is known.
static void plan_prompt(Scheduler *s, Request *r, int rows) {
    bool every = s->settings.every_position, scores = s->settings.scores;
    int end = r->prompt_kv.length + rows, wanted = every ? rows : end == r->n && !scores;
    kv_reserve(&s->pages.kv, &r->prompt_kv, end);
    for (int i = r->prompt_kv.length; i < end; i++)
        s->rows[s->n_rows++] = (Row){ &r->prompt_kv, i, r->ids[i],
                                      every || (i == r->n - 1 && !scores) };
    r->prompt_kv.length = end;                 // nobody looks before the pass has been run
    if (!every && end < r->n) return;
    s->readings[s->n_readings++] = (Reading){ every ? TO_HAND_OUT : TO_BEGIN, .request = r,
                                              .first = s->n_logits, .n = wanted };
    s->n_logits += wanted;
}

// The rows of a continuation to be scored. A row's logits say how likely the token behind it is.
static void plan_score(Scheduler *s, Continuation *c, int rows) {
    int behind = c->request->n, from = c->sequence.length - behind, end = from + rows;
    int first = c->unscored - 1 > from ? c->unscored - 1 : from;       // whose logits are wanted
    int wanted = end > first ? end - first : 0;
    kv_reserve(&s->pages.kv, &c->sequence, behind + end);
    for (int i = from; i < end; i++)
        s->rows[s->n_rows++] = (Row){ &c->sequence, behind + i, c->known[i], i >= first };
    c->sequence.length = behind + end;
    if (wanted == 0) return;
    s->readings[s->n_readings++] = (Reading){ TO_SCORE, .continuation = c, .first = s->n_logits,
                                              .n = wanted };
    s->n_logits += wanted;
}

static void plan_pass(Scheduler *s) {
    s->n_rows = s->n_logits = s->n_readings = 0;
    int drawn = s->settings.scores ? 0 : s->n_running;
    find_prefills(s);
    int prefilled = plan_prefill(s, s->max_rows - drawn);
    s->only_decoding = prefilled == 0;
    s->figures.guesses += plan_guesses(s, drawn + prefilled);
    for (int i = 0; i < drawn; i++) plan_continuation(s, s->running[i]);
    for (Prefill *p = s->prefills; p < s->prefills + s->n_prefills; p++) {
        if (p->rows == 0) continue;
        if (p->continuation) plan_score(s, p->continuation, p->rows);
        else plan_prompt(s, p->request, p->rows);
    }
}

// A prompt has been run: of its continuations begin as many as there are places, from the logits
// of its last token. Some end with their first token and make room for others. What is known
// begins as it does without a prompt.
static void begin_continuations(Scheduler *s, Request *r, const float *logits) {
    r->state = RUNNING;
    s->in_work--;                              // its continuations take places of their own
    if (s->settings.scores) start_more(s, r);
    for (int n = 1; n > 0 && !s->settings.scores;) {
        for (n = 0; may_start(s, r); n++) {
            Continuation *c = start_continuation(&s->pages, &s->settings, r, r->n);
            s->draws[n] = (Draw){ .continuation = c, .logits = logits, .rows = 1 };
            s->in_work++;
        }
        draw_all(s, n);
    }
}

// Piece: a row of logits, and the token that it says something of.
static void score_piece(void *arg, int row, int thread) {
    const Scheduler *s = arg;
    const Reading *r = s->readings;
    while (row >= r->first + r->n) r++;
    const Continuation *c = r->continuation;
    int place = c->n + row - r->first, likeliest = likeliest_of(&s->settings);
    int vocab = s->m->c.vocab;
    const float *logits = logits_of(&s->work, row);
    Ranked *found = c->ranks + (long)place * (1 + likeliest);
    if (s->kernels->all_finite(vocab, logits))
        find_ranks(&s->samplers[thread], logits, vocab, c->known[c->unscored + place], likeliest,
                   found);
    else found->id = TOKENIZER_NONE;
}

static void read_scores(Scheduler *s) {
    parallel(s->n_logits, score_piece, s);
    int width = 1 + likeliest_of(&s->settings);
    for (const Reading *r = s->readings; r < s->readings + s->n_readings; r++) {
        Continuation *c = r->continuation;
        if (r->purpose != TO_SCORE) continue;
        for (int i = c->n; i < c->n + r->n; i++)
            if (c->ranks[(long)i * width].id == TOKENIZER_NONE) die_not_finite(s->m);
        c->n += r->n;
        s->figures.tokens += r->n;
        if (wholly_scored(c)) end_score(s, c);
        if (s->client.grown) s->client.grown(s->client.arg, c);
    }
    int left = 0;
    for (int i = 0; i < s->n_running; i++)
        if (s->running[i]->reason == UNDECIDED) s->running[left++] = s->running[i];
    s->n_running = left;
}

static void hand_out_logits(Scheduler *s, const Reading *reading) {
    Request *r = reading->request;
    for (int i = 0; i < reading->n; i++) {
        const float *logits = logits_of(&s->work, reading->first + i);
        if (!s->kernels->all_finite(s->m->c.vocab, logits)) die_not_finite(s->m);
        s->client.logits(s->client.arg, logits);
    }
    if (r->prompt_kv.length < r->n) return;
    s->in_work--;
    for (int i = 0; i < r->n_continuations; i++) r->continuations[i].reason = BY_LENGTH;
    end_request(&s->pages, r);
}

static void read_draws(Scheduler *s) {
    int n = 0;
    long before = s->figures.tokens;
    s->n_running = 0;
    for (const Reading *r = s->readings; r < s->readings + s->n_readings; r++)
        if (r->purpose == TO_DRAW)
            s->draws[n++] = (Draw){ .continuation = r->continuation, .rows = r->n,
                                    .logits = logits_of(&s->work, r->first) };
    draw_all(s, n);
    s->figures.draws += n;
    s->figures.decoded += s->figures.tokens - before;
}

static void read_pass(Scheduler *s) {
    if (s->settings.scores) read_scores(s);
    else read_draws(s);
    for (const Reading *r = s->readings; r < s->readings + s->n_readings; r++) {
        if (r->purpose == TO_BEGIN)
            begin_continuations(s, r->request, logits_of(&s->work, r->first));
        if (r->purpose == TO_HAND_OUT) hand_out_logits(s, r);
    }
}

static void run_pass(Scheduler *s) {
    double start = seconds();
    forward(&s->work, s->rows, s->n_rows);
    check_reader();
    s->figures.passes++;
    s->figures.rows += s->n_rows;
    read_pass(s);
    if (s->only_decoding) measure_pass(&s->time, s->n_rows, seconds() - start);
    deliver(s);
}

// The rows to make room for: those asked for, or if none were (0) the usual number, but never more
// than can be used.
static int rows_of_pass(long asked, int usual, long most) {
    long rows = asked == 0 ? usual : asked < MOST_ROWS ? asked : MOST_ROWS;
    return (int)(rows < most ? rows : most);
}

static Scheduler scheduler_open(const Model *m, const Kernels *kernels, Settings settings,
                                Client client, Guesses *guesses) {
    Scheduler s = { .m = m, .kernels = kernels, .settings = settings, .client = client,
                    .guesses = guesses };
    // What is allowed is not always used: more rows than this cannot be in a pass, or pay for their
    // memory.
    long batch = settings.batch == 0 ? USUAL_BATCH
               : settings.batch < MOST_BATCH ? settings.batch : MOST_BATCH;
    int usual = batch > USUAL_ROWS ? (int)batch : USUAL_ROWS;
    s.max_rows = rows_of_pass(settings.rows, usual, batch * m->c.context);
    s.batch = batch < s.max_rows ? (int)batch : s.max_rows;
    int most_logits = s.batch + (guesses ? MOST_GUESSES : 0);
    if (settings.every_position || settings.scores || most_logits > s.max_rows)
        most_logits = s.max_rows;
    s.pages.kv = kv_open(m);
    s.pages.ceiling = settings.kv_memory / s.pages.kv.page_bytes;
    s.work = work_open(m, kernels, s.max_rows, most_logits);
    s.running = allocate((size_t)s.batch, sizeof *s.running);
    s.prefills = allocate((size_t)s.batch, sizeof *s.prefills);
    s.rows = allocate((size_t)s.max_rows, sizeof *s.rows);
    s.readings = allocate((size_t)s.batch, sizeof *s.readings);
    s.draws = allocate((size_t)s.batch, sizeof *s.draws);
    s.samplers = allocate((size_t)pool.threads, sizeof *s.samplers);
    for (int i = 0; i < pool.threads; i++) s.samplers[i] = sampler_open(kernels, m->c.vocab);
    if (settings.vocabulary)
        s.maskers = allocate((size_t)pool.threads, sizeof *s.maskers);
    for (int i = 0; i < pool.threads && s.maskers; i++)
        s.maskers[i] = masker_open(settings.vocabulary, m->c.vocab);
    return s;
}

// Runs requests until the client has no more, or a signal comes.
static void schedule(Scheduler *s) {
    while (!interrupted) {
        deliver(s);
        admit(s);
        plan_pass(s);
        if (s->n_rows > 0) run_pass(s);
        else if (s->ended && s->first == NULL) return;
        else if (s->waiting && s->in_work == 0 && !interrupted)
            die("a prompt waits for memory that nothing holds: a fault of kl3m");
    }
}

// With what was not delivered, and all keys and values.
static void scheduler_close(Scheduler *s) {
    for (Request *r; (r = s->first) != NULL;) {
        s->first = r->next;
        request_free(r, &s->pages.kv);
    }
    for (int i = 0; i < pool.threads; i++) sampler_close(&s->samplers[i]);
    for (int i = 0; i < pool.threads && s->maskers; i++) masker_close(&s->maskers[i]);
    arena_free(&s->frames);
    free(s->maskers);
    for (int i = 0; i < BEGINNINGS; i++) forget(&s->pages, &s->pages.beginnings[i]);
    free(s->samplers);
    free(s->draws);
    free(s->readings);
    free(s->rows);
    free(s->prefills);
    free(s->running);
    work_close(&s->work);
    kv_close(&s->pages.kv);
}

// ---- 18. Prompts ----
// Where prompts come from (-p, -f, records of a descriptor, read as they are needed), and how each
// becomes a request: escapes, JSON, token ids. Nothing is printed here.

typedef struct {
    const char *prompt, *file; // of -p and -f; neither: records of standard input
    bool no_escape, null, jsonl;
    bool scores;               // a prompt may come with continuations, to be scored
} Source;

typedef struct {
    const char *truncate;      // "left", "right", or NULL: not
    bool no_special;           // special tokens are read as plain text
    long new_tokens;
    long stride;               // of windows, from one's beginning to the next one's; 0: half of one
    long seed;                 // -1: each prompt draws its own from the system
} PromptRules;

// A prompt as it was read.
typedef struct {
    Bytes text;
    Bytes members;             // of JSON that came with it
    Texts continuations;
    Bytes schema;              // JSON, as it stands in the record; no data: there is none
    bool continued;            // there are continuations, if only an empty list
    bool wrong;                // they are no texts
} Prompt;

static void prompt_free(Prompt *p) {
    free(p->text.data);
    free(p->members.data);
    free(p->schema.data);
    free_texts(&p->continuations);
}

typedef struct {
    int fd;
    const char *name;          // in messages
    char delimiter;            // newline or NUL
    Bytes buffer;
    size_t start, scanned;     // the next record's; there is no delimiter before scanned
    bool marked, ended;        // marked: it began with a byte order mark, which is dropped
    long line;                 // of the last record, from 1
    size_t taken;              // its bytes, its end included
} Records;

// The next record, without its delimiter, valid until the next call. 1: there is one; 0: none yet,
// and `wait` is false or a signal came; -1: no more.
static int next_record(Records *in, bool wait, char **text, size_t *n) {
    append(&in->buffer, "", 0);                // so that there is something to look at
    for (;;) {
        if (in->line == 0 && !in->marked && byte_order_mark(&in->buffer)) {
            in->start = in->scanned = byte_order_mark(&in->buffer);
            in->marked = true;
        }
        size_t left = in->buffer.size - in->scanned;
        char *end = memchr(in->buffer.data + in->scanned, in->delimiter, left);
        if (end || (in->ended && in->start < in->buffer.size)) {
            *text = in->buffer.data + in->start;
            *n = (end ? (size_t)(end - in->buffer.data) : in->buffer.size) - in->start;
            in->taken = *n + (end != NULL);
            in->start = in->scanned = in->start + in->taken;
            in->line++;
            if (end && in->delimiter == '\n' && *n && (*text)[*n - 1] == '\r') --*n;
            return 1;
        }
        if (in->ended) return -1;
        if (!wait_for_input(in->fd, false)) {
            if (!wait) return 0;
            flush_stdout();                    // whoever waits has shown what there is
            if (!wait_for_input(in->fd, true)) return 0;
        }
        drop(&in->buffer, in->start);
        in->start = 0;
        in->scanned = in->buffer.size;
        if (read_more(in->fd, in->name, &in->buffer) == 0) in->ended = true;
    }
}

// Schemas of records, each compiled once for each text, as long as it is on the shelf.
typedef struct { Bytes text; Schema *schema; long used; } ShelvedSchema;
typedef struct { ShelvedSchema *at; int n; long uses; } Shelf;

enum { SHELVED = 64 };             // more only while requests hold them

// The schema of a text; it stays at least as long as it has users.
static Schema *find_schema(Shelf *shelf, const Settings *s, const Bytes *text) {
    ShelvedSchema *oldest = NULL;
    for (int i = 0; i < shelf->n; i++) {
        ShelvedSchema *one = &shelf->at[i];
        bool same = one->text.size == text->size &&
                    memcmp(one->text.data, text->data, text->size) == 0;
        if (same) return one->used = ++shelf->uses, one->schema;
        if (one->schema->users == 0 && (!oldest || one->used < oldest->used)) oldest = one;
    }
    if (shelf->n >= SHELVED && oldest) {
        free(oldest->text.data);
        schema_free(oldest->schema);
    } else {
        shelf->at = grow_list(shelf->at, shelf->n, sizeof *shelf->at);
        oldest = &shelf->at[shelf->n++];
    }
    *oldest = (ShelvedSchema){ .used = ++shelf->uses };
    append(&oldest->text, text->data, text->size);
    oldest->schema = schema_of_text(s->vocabulary, &s->ignored, text->data, text->size);
    return oldest->schema;
}

// Prompts one by one: the one of -p or -f, or records.
typedef struct {
    const Source *source;
    Records records;
    Shelf shelf;
    bool single, given;
} Prompts;

static Prompts prompts_open(const Source *source) {
    return (Prompts){ .source = source, .single = source->prompt || source->file,
                      .records = { .fd = STDIN_FILENO, .name = "standard input",
                                   .delimiter = source->null ? 0 : '\n' } };
}

// As next_record, with escapes decoded where they are to be, into p, whose memory is used again;
// *line is 0 for a single prompt. With `scores` the first tab of a line separates a text from its
// continuation.
static int next_prompt(Prompts *all, bool wait, Prompt *p, long *line) {
    const Source *s = all->source;
    char *text;
    size_t n;
    *line = 0;
    p->text.size = 0;
    if (all->single && all->given) return -1;
    if (all->single) {
        all->given = true;
        if (s->file) p->text = read_file(s->file);
        else append_string(&p->text, s->prompt);
        if (s->prompt && !s->no_escape) p->text.size = unescape(p->text.data, p->text.size);
        return 1;
    }
    int got = next_record(&all->records, wait, &text, &n);
    *line = all->records.line;
    if (got < 1) return got;
    bool plain = s->null || s->jsonl;
    char *tab = s->scores && !plain ? memchr(text, '\t', n) : NULL;
    size_t first = tab ? (size_t)(tab - text) : n;
    append(&p->text, text, first);
    if (!s->no_escape && !plain) p->text.size = unescape(p->text.data, first);
    if (tab == NULL) return 1;
    Bytes behind = {0};
    append(&behind, tab + 1, n - first - 1);
    if (!s->no_escape) behind.size = unescape(behind.data, behind.size);
    add_text(&p->continuations, behind);
    p->continued = true;
    return 1;
}

static void prompts_close(Prompts *p) {
    for (int i = 0; i < p->shelf.n; i++) {
        free(p->shelf.at[i].text.data);
        schema_free(p->shelf.at[i].schema);
    }
    free(p->shelf.at);
    free(p->records.buffer.data);
}

// Is this the name of a member that the output has of its own?
static bool is_ours(const Settings *s, const Bytes *name) {
    bool scored = s->scores, drawn = !scored;
    struct { const char *name; bool ours; } members[] = {
        { "prompt", true }, { "error", true }, { "logprobs", s->logprobs >= 0 },
        { "generated_text", drawn }, { "finish_reason", drawn }, { "prompt_tokens", drawn },
        { "new_tokens", drawn }, { "seed", drawn },
        { "continuation", scored }, { "logprob", scored }, { "tokens", scored },
        { "perplexity", scored }, { "bits_per_byte", scored }, { "greedy", scored },
        { "unchecked", s->ignored.n > 0 },
    };
    for (size_t i = 0; i < sizeof members / sizeof *members; i++)
        if (strcmp(name->data, members[i].name) == 0 && name->size == strlen(members[i].name))
            return members[i].ours;
    return false;
}

// The value of "continuation": a string, or a list of them. False: it is something else, or a
// string has half a pair of surrogates.
static bool json_continuations(Json *j, Prompt *p) {
    free_texts(&p->continuations);             // the last member of this name counts
    p->continued = true;
    bool list = json_take(j, '[');
    if (list && json_take(j, ']')) return true;
    do {
        json_skip_space(j);
        Bytes text = {0};
        append(&text, "", 0);
        if (*j->at != '"' || !json_string(j, &text)) return free(text.data), false;
        add_text(&p->continuations, text);
    } while (list && json_take(j, ','));
    return !list || json_take(j, ']');
}

// One member of an object known to be sound: what "prompt" and, to be scored, "continuation" say
// goes to p, of another the member as it is, with a comma behind it, to p's members, unless it is
// ours. j->flaw says what is wrong with the last prompt, *fault where; *continuation is where the
// last one stands.
static void json_member(Json *j, const Settings *s, Prompt *p, const char **fault,
                        const char **continuation) {
    json_skip_space(j);
    const char *member = j->at;
    Bytes name = {0};
    append(&name, "", 0);
    json_string(j, &name);
    json_take(j, ':');
    json_skip_space(j);
    const char *value = j->at;
    bool ours = is_ours(s, &name), is_prompt = ours && strcmp(name.data, "prompt") == 0;
    bool is_continuation = ours && strcmp(name.data, "continuation") == 0;
    bool is_schema = s->schema_member && is_text(name.data, name.size, s->schema_member);
    free(name.data);
    if (is_prompt) {
        *fault = j->at;
        p->text.size = 0;
        j->flaw = *j->at == '"' ? NULL : "the prompt must be a string";
    }
    Json strict = { .start = j->start, .at = value, .end = j->end };
    if (is_continuation) p->wrong = !json_continuations(&strict, p), *continuation = value;
    if (is_prompt && *value == '"' && !json_string(&strict, &p->text))
        j->flaw = strict.flaw, *fault = strict.at;
    j->at = value;
    json_value(j, 0);
    if (is_schema) {
        p->schema.size = 0;
        append(&p->schema, value, (size_t)(j->at - value));
    }
    if (ours || is_schema) return;
    append(&p->members, member, (size_t)(j->at - member));
    append_string(&p->members, ", ");
}

// An object with a "prompt" that is a string. The last of equal names counts. Sound JSON keeps its
// other members, whatever is wrong with its prompt.
static bool json_record(Json *j, const Settings *s, Prompt *p) {
    j->halves = true;                          // in members that are passed through
    if (!json_value(j, -1)) return false;
    json_skip_space(j);
    if (j->at < j->end) return json_fail(j, "the end of the line was expected");
    j->at = j->start;
    if (!json_take(j, '{')) return json_fail(j, "an object was expected");
    j->flaw = "there is no member \"prompt\"";
    const char *fault = j->start, *continuation = NULL;
    for (bool more = !json_take(j, '}'); more; more = json_take(j, ','))
        json_member(j, s, p, &fault, &continuation);
    p->wrong &= j->flaw == NULL;               // the prompt comes first
    if (p->wrong)
        j->flaw = "a string or a list of strings, of whole characters, was expected",
        fault = continuation;
    if (j->flaw) j->at = fault;
    return j->flaw == NULL;
}

// As many ids as a text of n bytes may have.
static size_t most_ids(const Model *m, size_t n) { return tokenizer_most_ids(&m->tokenizer, n); }

// A text's ids, into ids[], which has room for most_ids. Returns how many.
static size_t encode(Model *m, bool no_special, const char *text, size_t n, uint32_t *ids) {
    ptrdiff_t count = tokenizer_encode(&m->tokenizer, text, n, no_special, ids);
    if (count < 0) die("out of memory for a prompt of %zu bytes", n);
    return (size_t)count;
}

// Why a request with so many prompt tokens, of which `keep` may be kept, cannot be run; NULL: it
// can.
static char *refusal(const Model *m, const PromptRules *rules, size_t count, size_t keep) {
    size_t context = (size_t)m->c.context;
    bool more = rules->new_tokens > 0;
    size_t most = more ? context - 1 : context;
    if (count == 0 && m->file_config.start == TOKENIZER_NONE)
        return format_string("the prompt is empty and the model has no <|start|> token; give a "
                             "prompt");
    if (rules->truncate && keep == 0 && count > 0)
        return format_string("%ld new tokens leave no place for a prompt in the context of %zu; a "
                             "smaller -n does", rules->new_tokens, context);
    if (rules->truncate && count > keep) return NULL;
    if (count > most || most == 0)
        return format_string("the prompt has %zu tokens, the context holds %zu%s; shorten it, or "
                             "cut it with --truncate left", count, context,
                             more ? ", new ones included" : "");
    return NULL;
}

// Why its keys and values do not fit under the ceiling; NULL: they do.
static char *memory_refusal(const Request *r, const Model *m, const Settings *s) {
    double need = bytes_needed(r, m);
    bool runs = r->limit > 0 || s->every_position;
    if (!runs || need <= (double)s->kv_memory) return NULL;
    bool draws = !s->scores && !s->every_position;
    const char *what = draws ? "prompt and its new tokens need"
                     : s->scores ? "text needs" : "prompt needs";
    bool larger = need <= (double)s->most_kv_memory;
    return format_string("the %s %.1f MB of keys and values, %s allows %.1f; %s%s does", what,
                         need * 1e-6, larger ? "--kv-memory" : "the memory here",
                         (double)(larger ? s->kv_memory : s->most_kv_memory) * 1e-6,
                         draws ? "a smaller -n or " : "",
                         larger ? "a larger --kv-memory" : "more memory");
}

// The ids that the model is given for a request's prompt: cut as --truncate says, <|start|> for an
// empty one; and how many may be drawn. A prompt that cannot be run leaves its reason in r->error.
static void give_tokens(Request *r, Model *m, const PromptRules *rules, const Settings *s) {
    size_t context = (size_t)m->c.context, keep = 0;
    if (rules->new_tokens < m->c.context) keep = context - (size_t)rules->new_tokens;
    r->ids = allocate(most_ids(m, r->prompt_size) + 1, sizeof *r->ids);
    size_t count = encode(m, rules->no_special, r->prompt, r->prompt_size, r->ids);
    r->error = refusal(m, rules, count, keep);
    if (r->error) return;
    if (rules->truncate && count > keep) {
        if (strcmp(rules->truncate, "left") == 0)
            memmove(r->ids, r->ids + count - keep, keep * sizeof *r->ids);
        count = keep;
    }
    if (count == 0) r->ids[0] = m->file_config.start;
    r->prompt_tokens = (int)count;
    r->n = count > 0 ? (int)count : 1;
    int room = m->c.context - r->n;
    r->limit = rules->new_tokens < room ? (int)rules->new_tokens : room;
    if (r->schema && (uint32_t)r->limit < r->schema->least_tokens)
        r->error = format_string("the %s needs at least %u new tokens, and %d may be drawn "
                                 "(-n, and what the prompt leaves of the context); a larger -n or "
                                 "a shorter prompt does", s->pattern ? "pattern" : "schema",
                                 r->schema->least_tokens, r->limit);
    else r->error = memory_refusal(r, m, s);
}

// A request for this text, which it copies, and the schema that its continuations must fit.
static Request *new_request(Model *m, const PromptRules *rules, const Settings *s,
                            const char *text, size_t n, Schema *schema) {
    Request *r = allocate(1, sizeof *r);
    r->prompt = memcpy(allocate(n + 1, 1), text, n);
    r->prompt_size = n;
    if (s->scores) return r;
    r->schema = schema;
    if (schema) schema->users++;
    give_tokens(r, m, rules, s);
    r->seed = rules->seed >= 0 ? (uint64_t)rules->seed : system_random() >> 11;
    return r;
}

// The windows in which a request's text is scored, all but its first token: of the context's
// length, each `stride` tokens behind the one before it, until one reaches the end. A token is
// scored in the window that reaches it first (transformers' guide, "Perplexity of fixed-length
// models").
static void find_windows(Request *r, Model *m, const PromptRules *rules) {
    long context = m->c.context, half = context > 1 ? context / 2 : 1;
    long stride = rules->stride ? rules->stride : half;
    r->windows = true;
    r->ids = allocate(most_ids(m, r->prompt_size) + 1, sizeof *r->ids);
    size_t count = encode(m, rules->no_special, r->prompt, r->prompt_size, r->ids);
    long tokens = (long)count, behind = tokens - context;      // the first window
    if (rules->truncate)
        r->error = format_string("--truncate cuts the text before a continuation, and here is "
                                 "none: a tab and the continuation, or with --jsonl the member "
                                 "\"continuation\"");
    else if (tokens > INT_MAX || (context == 1 && tokens > 1))
        r->error = format_string("the text has %ld tokens, too many to be scored", tokens);
    if (r->error) return;
    make_continuations(r, 1 + (behind > 0 ? (behind + stride - 1) / stride : 0));
    r->limit = (int)(tokens < context ? tokens : context) - 1;
    if (r->limit < 0) r->limit = 0;
    for (int i = 0; i < r->n_continuations; i++) {
        Continuation *c = &r->continuations[i];
        long begin = i * stride, left = tokens - begin;
        c->known = r->ids + begin;
        c->n_known = (int)(left < context ? left : context);
        c->unscored = i == 0 ? 1 : (int)(context - stride);
    }
}

// A request's continuations, to be scored behind its text. They share all of it but its last
// token, which each of them begins with, for the logits that it leaves.
static void find_continuations(Request *r, Model *m, const PromptRules *rules, Texts *given) {
    size_t most = (size_t)m->c.context + 1, room = most_ids(m, r->prompt_size) + 1;
    size_t longest = 0;
    for (int i = 0; i < given->n; i++) room += most_ids(m, given->texts[i].size) + 1;
    r->ids = allocate(room, sizeof *r->ids);
    size_t text = encode(m, rules->no_special, r->prompt, r->prompt_size, r->ids), at;
    if (text == 0 && m->file_config.start == TOKENIZER_NONE) {
        r->error = format_string("the text before the continuation is empty and the model has no "
                                 "<|start|> token; give a text");
        return;
    }
    if (text == 0) r->ids[text++] = m->file_config.start;
    make_continuations(r, given->n);
    at = text;
    for (int i = 0; i < given->n; i++) {
        Continuation *c = &r->continuations[i];
        Bytes *its = &given->texts[i];
        uint32_t *ids = r->ids + at;
        ids[0] = r->ids[text - 1];
        size_t n = encode(m, rules->no_special, its->data, its->size, ids + 1);
        if (n > longest) longest = n;
        at += 1 + n;
        c->known = ids, c->n_known = 1 + (int)(n < most ? n : most), c->unscored = 1;
        c->text = *its, *its = (Bytes){0};
    }
    size_t keep = rules->truncate && longest < most ? most - longest : text;
    if (keep < text) memmove(r->ids, r->ids + text - keep, keep * sizeof *r->ids);
    if (keep < text) text = keep;
    if (text + longest > most)
        r->error = format_string("the text has %zu tokens and its continuation %zu, together at "
                                 "most %zu can be scored; shorten them%s", text, longest, most,
                                 rules->truncate ? "" : ", or cut the text with --truncate left");
    r->n = (int)text - 1;
    r->limit = (int)longest;
}

// Why a record's schema cannot be used; NULL: it can. All that is refused stands in one line.
static char *schema_refusal(const Settings *s, const Prompt *p, const Schema *schema) {
    Bytes all = {0};
    if (p->schema.data == NULL)
        return format_string("there is no member \"%s\", which should hold its schema",
                             s->schema_member);
    for (int i = 0; schema && i < schema->refusals.n; i++) {
        append_string(&all, i ? "; " : "the schema is refused: ");
        append_string(&all, schema->refusals.texts[i].data);
    }
    return all.data;
}

// A request for what was read. Of a prompt its text and members are taken over, and the
// continuations too.
static Request *request_for(Prompts *all, Prompt *p, Model *m, const PromptRules *rules,
                            const Settings *s) {
    Schema *schema = s->schema;
    char *refused = NULL;
    if (s->schema_member) {
        if (p->schema.data) schema = find_schema(&all->shelf, s, &p->schema);
        refused = schema_refusal(s, p, schema);
    }
    Request *r = new_request(m, rules, s, p->text.data, p->text.size, refused ? NULL : schema);
    if (refused) free(r->error);
    if (refused) r->error = refused;
    if (!s->scores) return r;
    if (p->continued) find_continuations(r, m, rules, &p->continuations);
    else find_windows(r, m, rules);
    if (!r->error) r->error = memory_refusal(r, m, s);
    return r;
}

// The next prompt's request; NULL: there is none now (*ended: none ever again).
static Request *read_request(Prompts *all, Model *m, const PromptRules *rules, const Settings *s,
                             bool wait, bool *ended) {
    Prompt p = {0};
    long line;
    int got = next_prompt(all, wait, &p, &line);
    if (got < 0) *ended = true;
    if (got < 1) return NULL;
    Request *r;
    Bytes given = p.text;
    Json record = { .start = given.data, .at = given.data, .end = given.data + given.size };
    if (all->source->jsonl) {
        p.text = (Bytes){0};
        append(&p.text, "", 0);
    }
    if (!all->source->jsonl || json_record(&record, s, &p)) r = request_for(all, &p, m, rules, s);
    else {
        char *found = json_found(&record);
        if (p.wrong) r = new_request(m, rules, s, p.text.data, p.text.size, NULL);
        else r = allocate(1, sizeof *r);
        r->error = format_string("no %s in JSON: at byte %td %s; found %s",
                                 p.wrong ? "continuation" : "prompt", record.at - record.start,
                                 record.flaw, found);
        free(found);
    }
    if (all->source->jsonl) free(given.data);
    r->members = p.members;
    p.members = (Bytes){0};
    prompt_free(&p);
    r->line = line;
    r->record_size = all->records.taken;
    return r;
}

// ---- 19. Results ----
// What becomes of requests, on standard output: the shape is chosen once. A text goes out whole or,
// streamed, in whole characters; it is never edited, only escaped where a line or a terminal needs
// it. A new form of output is a Shape, or a Form of room 2, and its cases here.

typedef enum {
    STREAM,                    // one text, as it grows
    LINES,                     // a line, or what ends in NUL, for each continuation
    OBJECTS,                   // a line of JSON for each prompt
    ROWS, LABELS,              // figures of a score: a line for each text; a line each
    HEAT,                      // one text, each token shaded by its surprise, as it is scored
} Shape;

// A line of progress on standard error, while a file of prompts is run.
typedef struct {
    bool on;
    double started, shown;     // seconds(): when it began, when it was shown last (0: not)
    long done;                 // prompts
    double size, done_size;    // bytes of the input, 0 if nobody knows; of the prompts done
} Progress;

typedef struct {
    Shape shape;
    Form form;                 // of texts
    const char *end;           // of a text: one byte
    bool echo, verbose;
    int returns;               // continuations of each prompt
    const Tokenizer *tokenizer;        // of the scored tokens
    const Settings *settings;
    size_t shown;              // bytes of the streamed continuation
    Bytes begun;               // HEAT: of a character whose last byte is not there yet
    int shade;                 // that the terminal has now; 0: none
    bool colour;
    bool some_failed;
    Progress progress;
} Results;

static Results results_of(Shape shape, bool null, bool echo, const Settings *s) {
    bool lines = shape == LINES || shape == OBJECTS;
    bool figures = shape == ROWS || shape == LABELS;
    Form form = null ? BEFORE_A_NUL : lines ? IN_A_LINE : AS_IT_IS;
    if (s->vocabulary && !s->pattern) form = JSON_ITSELF;
    return (Results){ .shape = shape, .end = null && !figures ? "" : "\n", .echo = echo,
                      .form = form,
                      .returns = (int)s->returns, .settings = s };
}

static void hide_progress(Progress *p) {
    if (p->shown > 0) show_status("%s", "");
    p->shown = 0;
}

// Five times a second.
static void show_progress(Progress *p, long tokens) {
    double now = seconds(), taken = now - p->started;
    if (!p->on || taken < 0.5 || now - p->shown < 0.2) return;
    char left[32] = "";
    if (p->size > 0 && p->done_size > 0) {
        // A file may grow meanwhile.
        double rest = fmax(taken * (p->size - p->done_size) / p->done_size, 0);
        snprintf(left, sizeof left, ", %.0f:%02.0f left", floor(rest / 60), floor(fmod(rest, 60)));
    }
    show_status("kl3m: %ld prompt%s, %.0f tokens/s%s", p->done, p->done == 1 ? "" : "s",
                (double)tokens / taken, left);
    p->shown = now;
}

// A continuation behind its prompt, joined before it is escaped: a character may begin in the one
// and end in the other.
static Bytes whole_text(const Continuation *c, bool echo) {
    Bytes text = {0};
    if (echo) append(&text, c->request->prompt, c->request->prompt_size);
    append(&text, c->text.data, c->text.size);
    return text;
}

static const Ranked *ranks_of(const Results *o, const Continuation *c, int place) {
    return c->ranks + (long)place * (1 + likeliest_of(o->settings));
}

// The likeliest tokens of a place, as many as were asked for: [{"id", "token", "logprob"}, ...].
static void append_likeliest(Bytes *out, const Results *o, const Ranked *ranks) {
    append_string(out, "[");
    for (long i = 0; i < o->settings->logprobs && ranks[i].id != TOKENIZER_NONE; i++) {
        size_t n;
        const char *text = tokenizer_text(o->tokenizer, ranks[i].id, &n);
        append_format(out, "%s{\"id\": %u, ", i ? ", " : "", ranks[i].id);
        append_json(out, "\"token\": ", text, n);
        append_string(out, ", \"logprob\": ");
        append_number(out, ranks[i].logprob, IN_JSON);
        append_string(out, "}");
    }
    append_string(out, "]");
}

// The log-probabilities of each token of n continuations, as one list: {"ids", "tokens",
// "token_logprobs", "top_logprobs"}.
static void append_logprobs(Bytes *out, const Results *o, const Continuation *c, int n) {
    static const char *const names[] = { "{\"ids\": [", "], \"tokens\": [",
                                         "], \"token_logprobs\": [", "], \"top_logprobs\": [" };
    size_t length;
    for (int member = 0; member < 4; member++) {
        append_string(out, names[member]);
        const char *comma = "";
        for (int i = 0; i < n; i++)
            for (int place = 0; place < c[i].n; place++, comma = ", ") {
                const Ranked *ranks = ranks_of(o, &c[i], place);
                const char *text = tokenizer_text(o->tokenizer, ranks->id, &length);
                if (member == 0) append_format(out, "%s%u", comma, ranks->id);
                else if (member == 1) append_json(out, comma, text, length);
                else append_string(out, comma);
                if (member == 2) append_number(out, ranks->logprob, IN_JSON);
                if (member == 3) append_likeliest(out, o, ranks + 1);
            }
    }
    append_string(out, "]}");
}

// What a score says of a text.
typedef struct { double logprob; long tokens, bytes; bool greedy; } Score;

// The figures, as columns, labels and JSON name them.
static const char *const figure_names[] = { "logprob", "tokens", "perplexity", "bits_per_byte",
                                            "greedy" };

enum { LOGPROB, TOKENS, PERPLEXITY, BITS_PER_BYTE, GREEDY, FIGURES };

// Of the scored tokens of n continuations together, summed in their order. A special token is no
// text, and so has no bytes.
static Score score_of(const Results *o, const Continuation *c, int n) {
    Score score = { .greedy = true };
    for (int i = 0; i < n; i++)
        for (int place = 0; place < c[i].n; place++) {
            const Ranked *ranks = ranks_of(o, &c[i], place);
            size_t bytes;
            tokenizer_text(o->tokenizer, ranks->id, &bytes);
            score.logprob += ranks->logprob;
            score.tokens++;
            score.greedy &= ranks[1].id == ranks->id;
            if (!tokenizer_is_special(o->tokenizer, ranks->id)) score.bytes += (long)bytes;
        }
    return score;
}

static void append_score(Bytes *out, const Score *s, int figure, Form form) {
    static const double ln_2 = 0.69314718055994531;
    double none = s->tokens ? INFINITY : NAN;          // per byte, where there are none
    switch (figure) {
    case LOGPROB: append_number(out, s->logprob, form); break;
    case TOKENS: append_format(out, "%ld", s->tokens); break;
    case PERPLEXITY: append_number(out, perplexity(s->logprob, s->tokens), form); break;
    case BITS_PER_BYTE:
        append_number(out, s->bytes ? -s->logprob / ln_2 / (double)s->bytes : none, form);
        break;
    case GREEDY:
        if (form == IN_JSON) append_string(out, s->greedy ? "true" : "false");
        else append_string(out, s->greedy ? "1" : "0");
    }
}

// A row of figures, or lines of them with their names.
static void append_figures(Bytes *out, const Results *o, const Request *r) {
    Score score = score_of(o, r->continuations, r->n_continuations);
    for (int i = 0; i < FIGURES; i++) {
        if (o->shape == LABELS) append_format(out, "%-15s", figure_names[i]);
        append_score(out, &score, i, IN_A_LINE);
        append_string(out, o->shape == LABELS || i + 1 == FIGURES ? "\n" : "\t");
    }
}

// , "continuation": [...], "logprob": [...] and so on: one entry a continuation, or one for all
// windows of a text.
static void append_scores(Bytes *out, const Results *o, const Request *r) {
    int lists = r->windows ? 1 : r->n_continuations, each = r->windows ? r->n_continuations : 1;
    if (!r->windows) append_string(out, ", \"continuation\": [");
    for (int i = 0; !r->windows && i < lists; i++) {
        const Bytes *text = &r->continuations[i].text;
        append_json(out, i ? ", " : "", text->data, text->size);
    }
    if (!r->windows) append_string(out, "]");
    for (int figure = 0; figure < FIGURES; figure++) {
        append_format(out, ", \"%s\": [", figure_names[figure]);
        for (int i = 0; i < lists; i++) {
            Score score = score_of(o, r->continuations + i, each);
            append_string(out, i ? ", " : "");
            append_score(out, &score, figure, IN_JSON);
        }
        append_string(out, "]");
    }
}

// , "generated_text": [...], "finish_reason": [...] and so on.
static void append_generated(Bytes *out, const Request *r, bool echo) {
    static const char *const reasons[] = {
        [BY_EOS] = "eos", [BY_LENGTH] = "length", [BY_STOP] = "stop", [BY_SCHEMA] = "schema",
    };
    const Continuation *c = r->continuations;
    append_string(out, ", \"generated_text\": [");
    for (int i = 0; i < r->n_continuations; i++) {
        Bytes text = whole_text(&c[i], echo);
        append_json(out, i ? ", " : "", text.data, text.size);
        free(text.data);
    }
    append_string(out, "], \"finish_reason\": [");
    for (int i = 0; i < r->n_continuations; i++)
        append_format(out, "%s\"%s\"", i ? ", " : "", reasons[c[i].reason]);
    append_format(out, "], \"prompt_tokens\": %d, \"new_tokens\": [", r->prompt_tokens);
    for (int i = 0; i < r->n_continuations; i++)
        append_format(out, "%s%d", i ? ", " : "", c[i].n);
    append_format(out, "], \"seed\": %llu", (unsigned long long)r->seed);
    if (r->schema == NULL || r->schema->ignored == NULL || r->schema->ignored->n == 0) return;
    append_string(out, ", \"unchecked\": [");
    for (int i = 0; i < r->schema->unchecked.n; i++)
        append_json(out, i ? ", " : "", r->schema->unchecked.texts[i].data,
                    r->schema->unchecked.texts[i].size);
    append_string(out, "]");
}

// One object: the members that came with a prompt of --jsonl, the prompt (null where a line held
// none), and what became of it, or the error.
static void append_object(Bytes *out, const Results *o, const Request *r) {
    append_string(out, "{");
    append_text(out, r->members.data, r->members.size, JSON_ITSELF);
    if (r->prompt) append_json(out, "\"prompt\": ", r->prompt, r->prompt_size);
    else append_string(out, "\"prompt\": null");
    if (r->error) append_json(out, ", \"error\": ", r->error, strlen(r->error));
    else if (o->settings->scores) append_scores(out, o, r);
    else append_generated(out, r, o->echo);
    int lists = r->windows ? 1 : r->n_continuations;
    if (!r->error && o->settings->logprobs >= 0) {
        append_string(out, ", \"logprobs\": [");
        for (int i = 0; i < lists; i++) {
            append_string(out, i ? ", " : "");
            append_logprobs(out, o, r->continuations + i, r->windows ? r->n_continuations : 1);
        }
        append_string(out, "]");
    }
    append_string(out, "}\n");
}

// --heat. From pale yellow to red, of a terminal's 256 colours; a token of one bit has none, one of
// MOST_BITS or more the last.
static const int shades[] = { 230, 229, 223, 222, 216, 215, 209, 203, 202, 196 };

enum { SHADES = sizeof shades / sizeof *shades, MOST_BITS = 12 };

static int shade_of(double logprob) {
    double bits = -logprob / 0.69314718055994531;
    if (!(bits > 1)) return 0;
    if (bits >= (double)MOST_BITS) return SHADES;
    return 1 + (int)((bits - 1) / (MOST_BITS - 1) * (SHADES - 1));
}

static void append_shade(Bytes *out, int shade) {
    if (shade == 0) append_string(out, "\033[0m");
    else append_format(out, "\033[38;5;16;48;5;%dm", shades[shade - 1]);     // black on it
}

// A token's text, in whole characters: one that tokens share has the last one's shade. Ends of
// lines have none, which would reach to the terminal's edge.
static void show_shaded(Results *o, uint32_t id, int shade) {
    Bytes out = {0};
    size_t n;
    const char *text = tokenizer_text(o->tokenizer, id, &n);
    append(&o->begun, text, n);
    size_t whole = o->begun.size - utf8_unfinished(o->begun.data, o->begun.size), length;
    for (size_t i = 0; i < whole; i += length) {
        uint32_t code;
        length = utf8_char(o->begun.data + i, whole - i, &code);
        int its = !o->colour || code == '\n' || code == '\r' ? 0 : shade;
        if (its != o->shade) append_shade(&out, its);
        o->shade = its;
        append_text(&out, o->begun.data + i, length, o->form);
    }
    drop(&o->begun, whole);
    print(&out);
}

static void show_heat(Results *o, const Continuation *c) {
    for (int place = 0; place < c->n; place++) {
        const Ranked *ranks = ranks_of(o, c, place);
        show_shaded(o, ranks->id, shade_of(ranks->logprob));
    }
}

// What the shades mean, on standard error.
static void show_legend(const Results *o) {
    Bytes out = {0};
    if (!o->colour) return;
    append_string(&out, "kl3m: bits of surprise:");
    for (int i = 1; i <= SHADES; i++) {
        append_string(&out, " ");
        append_shade(&out, i);
        append_format(&out, " %.0f%s ", 1 + (double)(i - 1) * (MOST_BITS - 1) / (SHADES - 1),
                      i == SHADES ? "+" : "");
        append_shade(&out, 0);
    }
    append_string(&out, "\n");
    write_error(out.data, out.size);
    free(out.data);
}

// A stream begins with its prompt, a shaded text with the token that nothing stands before.
static void show_begun(Results *o, const Request *r) {
    if (o->shape == HEAT && r->continuations->n_known > 0)
        show_shaded(o, r->continuations->known[0], 0);
    if (o->shape != STREAM || !o->echo) return;
    Bytes out = {0};
    append_text(&out, r->prompt, r->prompt_size, o->form);
    print(&out);
}

// What is certain of a streamed continuation goes out: no stop text can begin in it, and its
// characters are whole.
static void show_grown(Results *o, const Continuation *c) {
    size_t end = c->text.size;
    if (o->shape != STREAM) return;
    if (c->reason == UNDECIDED) {
        end -= held_for_stop(&o->settings->stops, &c->text);
        end -= utf8_unfinished(c->text.data, end);
    }
    if (end <= o->shown) return;
    Bytes out = {0};
    append_text(&out, c->text.data + o->shown, end - o->shown, o->form);
    o->shown = end;
    print(&out);
}

// A continuation's line, at once: its text need not be kept, however many there are. What is scored
// is shown with its request.
static void show_decided(Results *o, Continuation *c) {
    if (o->shape == HEAT) show_heat(o, c);
    if (o->shape != STREAM && o->shape != LINES) return;
    Bytes out = {0};
    if (o->shape == LINES) {
        Bytes text = whole_text(c, o->echo);
        append_text(&out, text.data, text.size, o->form);
        free(text.data);
    }
    append(&out, o->end, 1);
    print(&out);
    free(c->text.data);
    c->text = (Bytes){0};
}

// The text's end: of a character that is not whole, what there is; and one newline more.
static void end_heat(Results *o, Bytes *out) {
    if (o->shade) append_shade(out, 0);
    append_text(out, o->begun.data, o->begun.size, o->form);
    append_string(out, "\n");
    free(o->begun.data);
    o->begun = (Bytes){0};
}

// A request's object or figures, or an empty place for each continuation that it does not have.
static void show_done(Results *o, Request *r) {
    Bytes out = {0};
    char where[32] = "";
    if (r->line) snprintf(where, sizeof where, "line %ld: ", r->line);
    o->progress.done++;
    o->progress.done_size += (double)r->record_size;
    bool seeded = o->verbose && !r->error && !o->settings->scores;
    if (r->error || seeded) hide_progress(&o->progress);
    if (r->error) message("%s%s", where, r->error);
    if (seeded) message("%sseed %llu", where, (unsigned long long)r->seed);
    o->some_failed |= r->error != NULL;
    bool figures_there = (o->shape == ROWS || o->shape == LABELS) && !r->error && r->state == DONE;
    if (o->shape == OBJECTS) append_object(&out, o, r);
    else if (figures_there) append_figures(&out, o, r);
    else if (o->shape == HEAT) end_heat(o, &out);
    else if (o->settings->scores) append(&out, o->end, 1);
    else for (; r->delivered < o->returns; r->delivered++) append(&out, o->end, 1);
    print(&out);
}

// How many of a request's places are to be shown after a signal: up to the last one that is
// decided.
static int count_shown(const Results *o, const Request *r) {
    bool open = o->shape == STREAM || o->shape == HEAT;        // something of it was shown
    int places = r->state == DONE || open ? o->returns : 0;
    for (int i = r->delivered; o->shape == LINES && i < r->n_continuations; i++)
        if (r->continuations[i].reason != UNDECIDED) places = i + 1;
    return places;
}

// After a signal, of requests that were not delivered: what is decided, and an empty place for what
// stands undecided before it.
static void show_interrupted(Results *o, Request *first) {
    Request *end = first;
    int last = 0;              // places of the last request to be shown
    for (Request *r = first; r; r = r->next) {
        int places = count_shown(o, r);
        if (places > 0) end = r->next, last = places;
    }
    for (Request *r = first; r != end; r = r->next) {
        int places = r->next == end ? last : o->returns;
        if (r->state != DONE && o->shape == OBJECTS) r->error = format_string("interrupted");
        for (; o->shape == LINES && !r->error && r->delivered < places; r->delivered++) {
            Continuation *c = &r->continuations[r->delivered];
            if (c->reason == UNDECIDED) write_all(&standard_output, o->end, 1);
            else show_decided(o, c);
        }
        if (!r->error && o->shape == LINES) r->delivered = o->returns;
        show_done(o, r);
    }
}

// ---- 20. Commands ----
// What the options ask for, one function each. They return the exit status.

enum { MOST_GIVEN = 64 };

// The values of an option that may be repeated.
typedef struct { const char *texts[MOST_GIVEN]; int n; } Given;

typedef struct {
    const char *model, *logits, *quantize, *out;
    const char *schema, *regex;
    Source source;
    PromptRules rules;
    Settings settings;
    Given stops, ignored;
    bool no_echo, json, no_speculation, heat, no_colour, quiet, verbose;
    bool score, check, tokenize, detokenize, info, verify, learn, help, version;     // commands
    long threads;              // 0: as many as pay off
    long tokens;               // that --learn samples
} Options;

// The last text of a conversation, which an empty line goes on with.
typedef struct {
    uint32_t *ids;             // [n]: the prompt's, and behind them those drawn
    size_t room;
    int n, prompt_tokens, drawn;
    uint64_t seed;
    Bytes text;
    bool open;                 // only a limit, or Ctrl-C, has ended it
} LastText;

// Everything `generate` knows; the scheduler's callbacks get it.
typedef struct {
    const Options *o;
    Model *m;
    Settings settings;         // the options', with the stop texts
    PromptRules rules;
    Prompts prompts;
    Results results;
    Scheduler scheduler;
    LastText last;             // of a conversation
    Request *line;             // its next request
} Generation;

static void keep_ids(LastText *l, const uint32_t *ids, int n) {
    l->ids = grow(l->ids, &l->room, (size_t)(l->n + n + 1) * sizeof *ids);
    if (n) memcpy(l->ids + l->n, ids, (size_t)n * sizeof *ids);
    l->n += n;
}

// What was drawn of the text, as far as it has come.
static void keep_drawn(LastText *l, const Continuation *c) {
    keep_ids(l, c->ids, c->n);
    l->drawn += c->n;
    l->text.size = 0;
    append(&l->text, c->text.data, c->text.size);
    l->open = c->reason == BY_LENGTH || c->reason == UNDECIDED;
}

static Request *next_generation(void *arg, bool wait, bool *ended) {
    Generation *g = arg;
    return read_request(&g->prompts, g->m, &g->rules, &g->settings, wait, ended);
}

static void generation_begun(void *arg, const Request *r) {
    show_begun(&((Generation *)arg)->results, r);
}

static void generation_grown(void *arg, const Continuation *c) {
    Generation *g = arg;
    show_progress(&g->results.progress, g->scheduler.figures.tokens);
    show_grown(&g->results, c);
}

static void generation_decided(void *arg, Continuation *c) {
    Generation *g = arg;
    if (g->settings.converses) keep_drawn(&g->last, c);
    show_decided(&g->results, c);
}

static void generation_done(void *arg, Request *r) { show_done(&((Generation *)arg)->results, r); }

static Progress progress_of(const Options *o) {
    struct stat input;
    Progress p = { .started = seconds() };
    bool lines = !o->source.prompt && !o->source.file;
    p.on = lines && !o->quiet && isatty(STDERR_FILENO) && !isatty(STDOUT_FILENO);
    if (lines && fstat(STDIN_FILENO, &input) == 0 && S_ISREG(input.st_mode))
        p.size = (double)(input.st_size - lseek(STDIN_FILENO, 0, SEEK_CUR));
    return p;
}

// -v's figures of a run that began and ended then, in busy_seconds().
static void show_figures(const Scheduler *s, double start, double end) {
    const Figures *f = &s->figures;
    message("%ld passes, %ld rows, %ld %s tokens in %.3f s, %.1f tokens/s, %s, %d threads",
            f->passes, f->rows, f->tokens, s->settings.scores ? "scored" : "new", end - start,
            (double)f->tokens / (end - start), s->kernels->name, pool.threads);
    message("%.1f of %.1f MB for keys and values",
            (double)s->pages.kv.pages * (double)s->pages.kv.page_bytes * 1e-6,
            (double)s->settings.kv_memory * 1e-6);
    if (s->guesses && f->draws > 0)
        message("%.2f tokens a pass, %ld of %ld guesses came true",
                (double)f->decoded / (double)f->draws, f->decoded - f->draws, f->guesses);
    if (f->tokens > 1 && !s->settings.scores)
        message("first token after %.3f s, %ld more at %.2f tokens/s", f->first_token - start,
                f->tokens - 1, (double)(f->tokens - 1) / (end - f->first_token));
}

// The values of a repeated option as bytes.
static Texts texts_of(const Given *given, bool escaped) {
    Texts texts = {0};
    for (int i = 0; i < given->n; i++) {
        Bytes text = {0};
        append_string(&text, given->texts[i]);
        if (escaped) text.size = unescape(text.data, text.size);
        add_text(&texts, text);
    }
    return texts;
}

// Everything that a run needs, for results of this shape. `next` is where prompts come from.
static void open_run(Generation *g, Shape shape, const Kernels *kernels, Guesses *guesses,
                     Request *(*next)(void *arg, bool wait, bool *ended)) {
    const Options *o = g->o;
    Client client = { g, .next = next, .begun = generation_begun, .grown = generation_grown,
                      .decided = generation_decided, .done = generation_done };
    bool echo = !o->no_echo && g->settings.vocabulary == NULL && !g->settings.converses;
    g->prompts = prompts_open(&o->source);
    g->results = results_of(shape, o->source.null, echo, &g->settings);
    g->results.tokenizer = &g->m->tokenizer;
    g->results.colour = shape == HEAT && !o->no_colour;
    g->results.verbose = o->verbose;
    g->results.progress = progress_of(o);
    g->scheduler = scheduler_open(g->m, kernels, g->settings, client, guesses);
}

// Runs all prompts and shows what became of them, in this shape.
static int run_all(Generation *g, Shape shape, const Kernels *kernels) {
    const Options *o = g->o;
    Guesses guesses = {0}, *used = NULL;
    if (!o->no_speculation && !g->settings.scores) {
        guesses = guesses_open(g->m);
        used = &guesses;
    }
    open_run(g, shape, kernels, used, next_generation);
    if (!o->quiet) show_legend(&g->results);
    double start = busy_seconds();
    schedule(&g->scheduler);
    hide_progress(&g->results.progress);
    if (interrupted) show_interrupted(&g->results, g->scheduler.first);
    if (o->verbose) show_figures(&g->scheduler, start, busy_seconds());
    scheduler_close(&g->scheduler);
    if (used) guesses_close(used);
    prompts_close(&g->prompts);
    return interrupted ? interrupted : g->results.some_failed ? SOME_FAILED : OK;
}

static bool single(const Source *s) { return s->prompt || s->file; }

// The schema or pattern that all texts must fit; ends the program with its refusals.
static Schema *schema_for(const Options *o, const Model *m, const Vocabulary *v,
                          const Texts *ignored) {
    Schema *schema;
    if (o->schema) {
        Bytes text = read_file(o->schema);
        schema = schema_of_text(v, ignored, text.data ? text.data : "", text.size);
        free(text.data);
    } else schema = schema_of_pattern(v, o->regex);
    const char *name = o->schema ? o->schema : "--regex";
    for (int i = 0; i < schema->refusals.n; i++)
        message("%s: %s", name, schema->refusals.texts[i].data);
    if (schema->refusals.n && !schema->rejected)
        usage_error("%s is refused; --schema-ignore WORD leaves a keyword out, by the name it has "
                    "above", name);
    if (schema->refusals.n) usage_error("%s is refused", name);
    if (schema->least_tokens >= (uint32_t)m->c.context)
        usage_error("%s needs at least %u new tokens, the context of %d holds %d behind a prompt",
                    name, schema->least_tokens, m->c.context, m->c.context - 1);
    return schema;
}

// What a run's texts must fit, into its settings. Returns the vocabulary to be closed in the end;
// NULL: they are free.
static Vocabulary *constrain(const Options *o, Model *m, Settings *s) {
    if (!o->schema && !o->regex && !s->schema_member) return NULL;
    Vocabulary *v = vocabulary_open(&m->tokenizer);
    s->vocabulary = v;
    s->pattern = o->regex != NULL;
    s->ignored = texts_of(&o->ignored, false);
    if (s->schema_member) return v;
    s->schema = schema_for(o, m, v, &s->ignored);
    if (o->rules.new_tokens < s->schema->least_tokens)
        usage_error("-n %ld is too few: %s needs at least %u new tokens", o->rules.new_tokens,
                    o->schema ? o->schema : "the pattern", s->schema->least_tokens);
    return v;
}

// What is asked for, with the stop texts and what texts must fit. It stays where it is: schemas
// refer to its settings.
static Vocabulary *generation_open(Generation *g, const Options *o, Model *m) {
    *g = (Generation){ .o = o, .m = m, .settings = o->settings, .rules = o->rules };
    g->settings.stops = texts_of(&o->stops, !o->source.no_escape);
    return constrain(o, m, &g->settings);
}

static void generation_close(Generation *g, Vocabulary *vocabulary) {
    free_texts(&g->settings.stops);
    free_texts(&g->settings.ignored);
    schema_free(g->settings.schema);
    vocabulary_close(vocabulary);
    free(g->last.ids);
    free(g->last.text.data);
}

static int generate(const Options *o, Model *m, const Kernels *kernels) {
    Shape texts = single(&o->source) && o->settings.returns == 1 ? STREAM : LINES;
    Generation g;
    Vocabulary *vocabulary = generation_open(&g, o, m);
    int status = run_all(&g, o->json ? OBJECTS : texts, kernels);
    generation_close(&g, vocabulary);
    return status;
}

static int score(const Options *o, Model *m, const Kernels *kernels) {
    const char *truncate = o->rules.truncate;
    Generation g = { .o = o, .m = m, .settings = o->settings, .rules = o->rules };
    Shape figures = o->heat ? HEAT : single(&o->source) ? LABELS : ROWS;
    if (truncate && (strcmp(truncate, "left") != 0 || single(&o->source)))
        usage_error("with --score, --truncate left cuts the text before a continuation, and "
                    "nothing else");
    if (o->heat && !single(&o->source))
        usage_error("--heat shades one text, that of -p or -f");
    if (o->rules.stride >= m->c.context)
        usage_error("--stride: '%ld' is not a whole number from 1 to %d, the context less 1",
                    o->rules.stride, m->c.context - 1);
    g.settings.scores = true;
    return run_all(&g, o->json ? OBJECTS : figures, kernels);
}

// --check: the least -n, or each line of standard input judged by what would generate it.
static int check(const Options *o, Model *m, const Kernels *kernels) {
    (void)kernels;
    Vocabulary *v = vocabulary_open(&m->tokenizer);
    Texts ignored = texts_of(&o->ignored, false);
    Schema *schema = schema_for(o, m, v, &ignored);
    Records in = { .fd = STDIN_FILENO, .name = "standard input", .delimiter = '\n' };
    int status = OK;
    bool any = false;
    char *text;
    size_t n;
    while (!isatty(STDIN_FILENO) && !interrupted && next_record(&in, true, &text, &n) == 1) {
        Bytes out = {0};
        any = true;
        if (!append_verdict(&out, schema, text, n)) status = SOME_FAILED;
        append_string(&out, "\n");
        print(&out);
    }
    for (int i = 0; !any && i < schema->unchecked.n; i++)
        message("not enforced: %s", schema->unchecked.texts[i].data);
    if (!any && !interrupted) {
        Bytes out = {0};
        append_format(&out, "least -n %u\n", schema->least_tokens);
        print(&out);
    }
    free(in.buffer.data);
    schema_free(schema);
    free_texts(&ignored);
    vocabulary_close(v);
    return interrupted ? interrupted : status;
}

// The only request of a run, once.
static Request *hand_over(Request **one, bool *ended) {
    Request *r = *one;
    *one = NULL;
    *ended = r == NULL;
    return r;
}

static Request *next_said(void *arg, bool wait, bool *ended) {
    (void)wait;
    return hand_over(&((Generation *)arg)->line, ended);
}

// A request for a prompt of the conversation, which is its last text from now on.
static Request *begin_text(Generation *g, Prompt *p) {
    Request *r = request_for(&g->prompts, p, g->m, &g->rules, &g->settings);
    LastText *l = &g->last;
    l->n = l->drawn = 0;
    l->open = false;
    l->prompt_tokens = r->prompt_tokens, l->seed = r->seed;
    if (!r->error) keep_ids(l, r->ids, r->n);
    g->results.shown = 0;
    return r;
}

// A request that goes on with the last text as if -n had been larger: the same seed and draws.
// NULL: there is nothing to go on with.
static Request *go_on(Generation *g) {
    LastText *l = &g->last;
    int room = g->m->c.context - l->n;
    bool alone = g->settings.returns == 1 && !g->settings.vocabulary;
    if (!l->open || !alone || g->rules.new_tokens == 0) return NULL;
    if (room <= 0) message("the context of %d tokens is full", g->m->c.context);
    if (room <= 0) return NULL;
    Request *r = allocate(1, sizeof *r);
    r->prompt = allocate(1, 1);
    r->ids = memcpy(allocate((size_t)l->n, sizeof *r->ids), l->ids,
                    (size_t)l->n * sizeof *r->ids);
    r->n = l->n, r->prompt_tokens = l->prompt_tokens, r->before = l->drawn, r->seed = l->seed;
    r->limit = g->rules.new_tokens < room ? (int)g->rules.new_tokens : room;
    r->error = memory_refusal(r, g->m, &g->settings);
    append(&r->begun, l->text.data, l->text.size);
    g->results.shown = l->text.size;
    return r;
}

// Reads a line; its request goes to g->line, if it asks for something. False: there are no more.
static bool read_line(Generation *g) {
    Prompt p = {0};
    long line;
    write_error("> ", 2);
    int got = next_prompt(&g->prompts, true, &p, &line);
    if (got == 1 && p.text.size == 0) g->line = go_on(g);
    else if (got == 1) g->line = begin_text(g, &p);
    prompt_free(&p);
    if (got != 1) write_error("\n", 1);
    return got >= 0;
}

// Ctrl-C ends a text, or a line, and not the program. Nothing of it is left in the scheduler.
static void end_text(Generation *g, const Kernels *kernels, Guesses *guesses) {
    Request *r = g->scheduler.first;
    if (r && r->started > r->delivered) keep_drawn(&g->last, r->continuations);
    if (r) g->last.open = true;
    show_interrupted(&g->results, r);
    Client client = g->scheduler.client;
    scheduler_close(&g->scheduler);
    g->scheduler = scheduler_open(g->m, kernels, g->settings, client, guesses);
    forget_interrupt();
}

// A terminal: each line is a prompt, whose text streams out.
static int converse(const Options *o, Model *m, const Kernels *kernels) {
    Generation g;
    Vocabulary *vocabulary = generation_open(&g, o, m);
    g.settings.converses = true;
    Guesses guesses = {0}, *used = o->no_speculation ? NULL : &guesses;
    if (used) guesses = guesses_open(m);
    open_run(&g, o->settings.returns == 1 ? STREAM : LINES, kernels, used, next_said);
    if (!o->quiet)
        message("continues legal text: a line is a prompt, an empty one goes on with the last "
                "text; Ctrl-C ends a text, Ctrl-D the program, kl3m --help lists the options");
    double start = busy_seconds();
    while (!interrupted && read_line(&g)) {
        g.scheduler.ended = false;
        if (g.line) schedule(&g.scheduler);
        if (interrupted == 128 + SIGINT) end_text(&g, kernels, used);
    }
    if (o->verbose) show_figures(&g.scheduler, start, busy_seconds());
    scheduler_close(&g.scheduler);
    if (used) guesses_close(used);
    prompts_close(&g.prompts);
    generation_close(&g, vocabulary);
    return interrupted ? interrupted : OK;
}

// Ids as digits and spaces, by hand and into one buffer: printf, or an allocation for each line,
// would take longer than the encoding.
static void append_ids(Bytes *out, const uint32_t *ids, size_t n) {
    out->data = grow(out->data, &out->room, out->size + 11 * n + 1);
    char *at = out->data + out->size;
    for (size_t i = 0; i < n; i++) {
        uint32_t id = ids[i];
        int digits = 1;
        if (i) *at++ = ' ';
        for (uint32_t rest = id; rest >= 10; rest /= 10) digits++;
        for (int d = digits; d-- > 0; id /= 10) at[d] = (char)('0' + id % 10);
        at += digits;
    }
    *at++ = '\n';
    out->size = (size_t)(at - out->data);
}

static int tokenize(const Options *o, Model *m, const Kernels *kernels) {
    (void)kernels;
    Prompts prompts = prompts_open(&o->source);
    Bytes out = {0};
    uint32_t *ids = NULL;
    size_t room = 0;
    Prompt p = {0};
    long line;
    while (!interrupted && next_prompt(&prompts, true, &p, &line) == 1) {
        ids = grow(ids, &room, (most_ids(m, p.text.size) + 1) * sizeof *ids);
        out.size = 0;
        append_ids(&out, ids, encode(m, o->rules.no_special, p.text.data, p.text.size, ids));
        write_all(&standard_output, out.data, out.size);
    }
    prompt_free(&p);
    flush_stdout();
    free(out.data);
    free(ids);
    prompts_close(&prompts);
    return interrupted;
}

// Ids separated by spaces become text. False: what stands at *bad is no id of the model.
static bool decode_line(const Model *m, const char *s, size_t n, Bytes *text, size_t *bad) {
    for (size_t i = 0; i < n;) {
        if (s[i] == ' ') {
            i++;
            continue;
        }
        uint64_t id = 0;
        for (*bad = i; i < n && isdigit((unsigned char)s[i]) && id < UINT32_MAX; i++)
            id = id * 10 + (uint64_t)(s[i] - '0');
        if (i == *bad || (i < n && s[i] != ' ') || id >= (uint64_t)m->c.vocab) return false;
        size_t length;
        const char *bytes = tokenizer_text(&m->tokenizer, (uint32_t)id, &length);
        if (!tokenizer_is_special(&m->tokenizer, (uint32_t)id)) append(text, bytes, length);
    }
    return true;
}

// Lines of ids come from -p or -f as from standard input; they end in a newline, with -0 too.
static int detokenize(const Options *o, Model *m, const Kernels *kernels) {
    (void)kernels;
    enum { MOST_SHOWN = 20 };
    const Source *source = &o->source;
    Records in = { .fd = open_input(source->file ? source->file : "-"),
                   .name = source->file ? source->file : "standard input", .delimiter = '\n' };
    if (source->prompt) {
        append_string(&in.buffer, source->prompt);
        append_string(&in.buffer, "\n");
        in.ended = true;
    }
    int status = OK;
    Bytes out = {0}, text = {0};
    char *s;
    size_t n, bad = 0;
    while (!interrupted && next_record(&in, true, &s, &n) == 1) {
        text.size = out.size = 0;
        if (decode_line(m, s, n, &text, &bad))
            append_text(&out, text.data, text.size, source->null ? BEFORE_A_NUL : IN_A_LINE);
        else {
            int length = 0;
            while (bad + (size_t)length < n && s[bad + (size_t)length] != ' ' &&
                   length < MOST_SHOWN) length++;
            message("line %ld: %.*s is no token id from 0 to %d", in.line, length, s + bad,
                    m->c.vocab - 1);
            status = SOME_FAILED;
        }
        append(&out, source->null ? "" : "\n", 1);
        write_all(&standard_output, out.data, out.size);
    }
    flush_stdout();
    if (in.fd != STDIN_FILENO) close(in.fd);
    free(in.buffer.data);
    free(text.data);
    free(out.data);
    return interrupted ? interrupted : status;
}

// --logits: of every position of one prompt, fp32, [tokens][vocab].
typedef struct { Request *request; Writer *out; size_t bytes; } LogitsJob;

static Request *next_logits(void *arg, bool wait, bool *ended) {
    (void)wait;
    return hand_over(&((LogitsJob *)arg)->request, ended);
}

static void write_logits(void *arg, const float *logits) {
    LogitsJob *job = arg;
    write_all(job->out, logits, job->bytes);
}

// The one prompt's request; NULL: a signal came.
static Request *only_request(const Options *o, Model *m, const Settings *settings) {
    Prompts prompts = prompts_open(&o->source);
    PromptRules rules = o->rules;
    rules.new_tokens = 0;
    Prompt more = {0};
    long line;
    bool ended = false;
    Request *r = read_request(&prompts, m, &rules, settings, true, &ended);
    if (ended) usage_error("--logits: standard input holds no prompt");
    if (r && next_prompt(&prompts, true, &more, &line) == 1)
        usage_error("--logits takes one prompt, and standard input holds more than one line");
    prompts_close(&prompts);
    return r;
}

static int logits(const Options *o, Model *m, const Kernels *kernels) {
    Settings settings = o->settings;
    settings.every_position = true;
    settings.returns = settings.batch = 1;
    LogitsJob job = { .request = only_request(o, m, &settings),
                      .bytes = (size_t)m->c.vocab * sizeof(float) };
    if (job.request == NULL) return interrupted;
    if (job.request->error) {
        message("%s", job.request->error);
        request_free(job.request, NULL);
        return SOME_FAILED;
    }
    Output out = output_open(o->logits);
    job.out = &out.writer;
    Client client = { &job, .next = next_logits, .logits = write_logits };
    Scheduler s = scheduler_open(m, kernels, settings, client, NULL);
    schedule(&s);
    output_close(&out, !interrupted);
    scheduler_close(&s);
    return interrupted;
}

// A token's text and id, or that there is none.
static void append_token(Bytes *out, const Model *m, uint32_t id) {
    size_t n;
    const char *text = tokenizer_text(&m->tokenizer, id, &n);
    if (id == TOKENIZER_NONE) {
        append_string(out, "nothing: an empty prompt is refused");
        return;
    }
    append_text(out, text, n, IN_A_LINE);
    append_format(out, " (%u)", id);
}

static int info(const Options *o, Model *m, const Kernels *kernels) {
    (void)o, (void)kernels;
    const Config *c = &m->c;
    Bytes out = {0};
    for (size_t i = 0, start = 0; i < m->about_size; i++) {
        if (m->about[i] != '\n') continue;
        const char *line = m->about + start, *tab = memchr(line, '\t', i - start);
        size_t key = tab ? (size_t)(tab - line) : 0, skip = key + (tab != NULL);
        append_text(&out, line, key, IN_A_LINE);
        for (size_t pad = key; pad < 14; pad++) append(&out, " ", 1);
        append_text(&out, line + skip, i - start - skip, IN_A_LINE);
        append(&out, "\n", 1);
        start = i + 1;
    }
    double parameters = 0;
    for (uint32_t i = 0; i < m->n_sections; i++)
        parameters += (double)m->sections[i].rows * m->sections[i].cols;
    append_format(&out, "format        version %u, %s weights, %zu bytes\n",
                  version_of(m), formats[m->embed_out.type].name, m->size);
    append_format(&out, "parameters    %.0f\n", parameters);
    append_format(&out, "layers        %d, %s residual\n", c->layers,
                  c->parallel_residual ? "parallel" : "serial");
    append_format(&out, "hidden        %d, intermediate %d\n", c->hidden, c->intermediate);
    append_format(&out, "heads         %d of %d, %d for keys and values, ", c->heads,
                  c->head_size, c->kv_heads);
    append_format(&out, "rotary %d of %d, base %g\n", c->rotary_dims, c->head_size,
                  c->rotary_base);
    append_format(&out, "vocabulary    %d, %u tokens\n", c->vocab, m->tokenizer.tokens);
    append_string(&out, "starts from   ");
    append_token(&out, m, m->file_config.start);
    append_string(&out, "\nends with     ");
    for (uint32_t i = 0; i < m->file_config.n_ends; i++) {
        append_string(&out, i ? ", " : "");
        append_token(&out, m, m->file_config.ends[i]);
    }
    append_string(&out, m->file_config.n_ends ? "\n" : "nothing: each text reaches its limit\n");
    append_format(&out, "context       %d tokens\n", c->context);
    append_format(&out, "guesses       %s\n", seek_section(m, "guesses")
                      ? "a table of its own teaching" : "no table; --learn makes one");
    print(&out);
    return OK;
}

// Reads the whole file and compares each section's checksum.
static int verify(const Options *o, Model *m, const Kernels *kernels) {
    (void)o, (void)kernels;
    int damaged = 0;
    for (uint32_t i = 0; i < m->n_sections && !interrupted; i++) {
        const Section *s = &m->sections[i];
        if (crc32_of(0, m->map + s->offset, s->size) == s->crc) continue;
        message("%s: the section %s is damaged; export the model again, or copy it again", m->path,
                s->name);
        damaged++;
    }
    if (interrupted) return interrupted;
    if (damaged) return FAILED;
    Bytes out = {0};
    append_text(&out, m->path, strlen(m->path), IN_A_LINE);
    append_format(&out, ": %u sections, %zu bytes: the checksums are right\n", m->n_sections,
                  m->size);
    print(&out);
    return OK;
}

// --learn: the model's file once more, with a table of guesses that the model teaches it. What it
// samples from these beginnings is learnt in their order, up to the last token asked for, so the
// table depends on the seed alone.

static const char *const openings[] = {
    "Governing Law.\n", "This Agreement", "WHEREAS, ", "NOW, THEREFORE, ",
    "Section 1. Definitions.\n", "Under this", "The Company", "The parties agree that",
    "IN WITNESS WHEREOF, ", "Confidentiality.\n", "Termination.\n", "Notices.\n", "The term \"",
    "Pursuant to", "In accordance with", "Each party shall", "The Tenant shall", "The Borrower",
    "The court held that", "Plaintiff", "It is so ORDERED", "Subject to", "No person shall",
    "The Secretary", "Indemnification.\n", "Representations and Warranties.\n",
    "Entire Agreement.\n", "Severability.\n", "Assignment.\n", "Limitation of Liability.\n",
    "Payment.\n", "Force Majeure.\n",
};

enum { OPENINGS = sizeof openings / sizeof *openings, USUAL_TOKENS = 40000 };

typedef struct {
    const Options *o;
    Model *m;
    Guesses table;
    uint64_t seed;
    long begun, delivered;     // texts
    long learnt, tokens;       // so far, in the end
    double shown;              // seconds(): when progress was
} Learning;

// The next beginning, as long as those in work may not be enough.
static Request *next_opening(void *arg, bool wait, bool *ended) {
    (void)wait;
    Learning *l = arg;
    PromptRules rules = l->o->rules;
    long each = rules.new_tokens < l->m->c.context ? rules.new_tokens : l->m->c.context;
    *ended = l->learnt == l->tokens;
    if (*ended || l->learnt + (l->begun - l->delivered) * each >= l->tokens) return NULL;
    const char *opening = openings[l->begun % OPENINGS];
    rules.seed = (long)((l->seed + (uint64_t)(l->begun++ / OPENINGS)) & MOST_SEED);
    Request *r = new_request(l->m, &rules, &l->o->settings, opening, strlen(opening), NULL);
    if (r->error) die("%s: nothing can be sampled to learn from: %s", l->m->path, r->error);
    for (int i = 0; i < r->n; i++) push(&r->tail, r->ids[i]);
    return r;
}

static void learn_text(void *arg, Continuation *c) {
    Learning *l = arg;
    for (int i = 0; i < c->n && l->learnt < l->tokens; i++, l->learnt++)
        learn(&l->table, &c->tail, c->ids[i]);
}

static void opening_done(void *arg, Request *r) {
    (void)r;
    Learning *l = arg;
    l->delivered++;
    if (l->o->quiet || !isatty(STDERR_FILENO) || seconds() - l->shown < 0.2) return;
    show_status("kl3m: %ld of %ld tokens sampled", l->learnt, l->tokens);
    l->shown = seconds();
}

// A section of the model's file as it is to be written again, in this program's version.
static Part part_of(const Model *m, const Section *s) {
    Part p = { .section = *s, .data = m->map + s->offset, .alignment = SECTION_ALIGNMENT };
    if (strcmp(s->name, "config") == 0) {
        p.data = &m->file_config;
        p.section.size = sizeof m->file_config;
        p.section.crc = crc32_of(0, p.data, p.section.size);
    }
    return p;
}

// The model's file with a table of guesses behind its other sections, in place of one that it has.
static void write_guesses(const Model *m, Output *out, const Context *table) {
    enum { SMALL_PAGE = 4096 };
    Part *parts = allocate(m->n_sections + 1, sizeof *parts), *p = parts;
    for (const Section *s = m->sections; s < m->sections + m->n_sections; s++)
        if (strcmp(s->name, "guesses") != 0) *p++ = part_of(m, s);
    *p++ = (Part){ .section = { .name = "guesses", .type = TYPE_BYTES, .size = TABLE_BYTES,
                                .crc = crc32_of(0, table, TABLE_BYTES) },
                   .data = table, .alignment = SMALL_PAGE };
    write_sections(&out->writer, parts, (uint32_t)(p - parts));
    free(parts);
}

static void check_room(const Options *o, double need, const Output *out) {
    struct statvfs disk;
    double room = need;
    if (out->temporary && statvfs(out->temporary, &disk) == 0)
        room = (double)disk.f_bavail * (double)disk.f_frsize;
    if (room < need)
        die("%s: the disk has %.0f MB left, %.0f are needed; make room, or name another place",
            o->out, room * 1e-6, need * 1e-6);
}

// On standard output; or, where what was written may lie there, on standard error.
static void tell(Bytes *said, bool direct) {
    if (direct) write_error(said->data, said->size);
    else print(said);
    free(said->data);
}

static void say_learnt(const Options *o, const Learning *l, size_t own, bool direct) {
    Bytes said = {0};
    append_text(&said, o->out, strlen(o->out), IN_A_LINE);
    append_format(&said, ": the model with a table of guesses from %ld tokens of its own",
                  l->learnt);
    if (o->source.file) {
        append_format(&said, " and %zu of ", own);
        append_text(&said, o->source.file, strlen(o->source.file), IN_A_LINE);
    }
    append_string(&said, "\n");
    tell(&said, direct);
}

// Of a text of the user's, last, so it counts most. Returns its tokens.
static size_t learn_from(Learning *l, const Bytes *text) {
    uint32_t *ids = allocate(most_ids(l->m, text->size) + 1, sizeof *ids);
    size_t n = encode(l->m, l->o->rules.no_special, text->data, text->size, ids);
    Tail tail = {0};
    for (size_t i = 0; i < n; i++) learn(&l->table, &tail, ids[i]);
    free(ids);
    return n;
}

static int learn_guesses(const Options *o, Model *m, const Kernels *kernels) {
    if (o->rules.new_tokens == 0)
        usage_error("--learn samples texts: -n, --max-new-tokens must be at least 1");
    long seed = o->rules.seed;
    Learning l = { .o = o, .m = m, .table = guesses_open(NULL),
                   .seed = seed >= 0 ? (uint64_t)seed : system_random() >> 11,
                   .tokens = o->tokens ? o->tokens : USUAL_TOKENS };
    Client client = { &l, .next = next_opening, .decided = learn_text, .done = opening_done };
    Bytes text = {0};
    size_t own = 0;
    if (o->source.file) text = read_file(o->source.file);
    Output out = output_open(o->out);          // now, not when all is done: it may not be possible
    bool direct = out.temporary == NULL;
    check_room(o, (double)m->size + (double)TABLE_BYTES, &out);
    double start = seconds();
    Scheduler s = scheduler_open(m, kernels, o->settings, client, NULL);
    schedule(&s);
    if (l.shown > 0) show_status("%s", "");
    if (!interrupted) {
        if (text.size > 0) own = learn_from(&l, &text);
        write_guesses(m, &out, l.table.table);
        if (o->verbose)
            message("seed %llu, %ld tokens sampled in %.1f s", (unsigned long long)l.seed,
                    l.learnt, seconds() - start);
    }
    output_close(&out, !interrupted);
    if (!interrupted && !o->quiet) say_learnt(o, &l, own, direct);
    free(text.data);
    guesses_close(&l.table);
    scheduler_close(&s);
    return interrupted;
}

// --quantize: the model's file once more, with matrices of another type. Each is packed twice, for
// its checksum, which stands before it, and to be written: packing is quick, and so nothing of the
// file need be held but one matrix.

typedef struct {
    const Options *o;
    const Model *m;
    Type type;
    char *packed;              // a section; room for the largest
    const Section *source;     // of what is packed now
    float *powers;             // [its columns] that they are multiplied with before
    float *sizes;              // [hidden] scratch
    atomic_bool broken;        // some weight is not finite in this type
    atomic_bool changed;       // some weight is another number in this type
    double done, whole;        // bytes of matrices, each twice
    double shown;              // seconds(): when progress was
} Quantizing;

enum { PACKED_AT_ONCE = 1 << 16 };     // floats

// Piece: some floats, in whatever order they lie.
static void pack_bf16(void *arg, int piece, int thread) {
    (void)thread;
    Quantizing *q = arg;
    size_t first = (size_t)piece * PACKED_AT_ONCE, end = q->source->size / sizeof(float);
    if (end > first + PACKED_AT_ONCE) end = first + PACKED_AT_ONCE;
    const float *from = (const void *)(q->m->map + q->source->offset);
    uint16_t *to = (void *)q->packed;
    bool broken = false, changed = false;
    for (size_t i = first; i < end; i++) {
        to[i] = to_bf16(from[i]);
        broken |= (to[i] & 0x7F80) == 0x7F80;
        changed |= from_bf16(to[i]) != from[i];
    }
    if (broken) atomic_store(&q->broken, true);
    if (changed) atomic_store(&q->changed, true);
}

// Equalizing, for q8. A trained model has channels that leave a norm much larger than the others,
// and a row's integers share one scale. So a norm's weight and bias of such a channel are divided
// by a power of two and the column of the matrix that reads it is multiplied with it, which changes
// no product. (Measured on random weights with 1 channel of 100 20 to 100 times as large:
// divergence 0.0010 instead of 0.020.) Each norm has one reader.

typedef struct { const float *weight, *bias; } NormParts;

// The tensor that is this section, by its place and size: what else a file may hold is copied. A
// matrix, and the norm that it alone reads (both NULL: there is none); NULL: it is no matrix.
static const Matrix *matrix_at(const Model *m, const Section *s, NormParts *norm) {
    const void *place = m->map + s->offset;
    const Matrix *found = NULL;
    *norm = (NormParts){ NULL, NULL };
    if (place == m->embed_in.at) found = &m->embed_in;
    if (place == m->embed_out.at) {
        found = &m->embed_out;
        *norm = (NormParts){ m->norm, m->norm_bias };
    }
    for (const Layer *l = m->layers; l < m->layers + m->c.layers && found == NULL; l++) {
        if (place == l->qkv.at) found = &l->qkv, *norm = (NormParts){ l->norm1, l->norm1_bias };
        if (place == l->up.at) found = &l->up, *norm = (NormParts){ l->norm2, l->norm2_bias };
        if (place == l->dense.at) found = &l->dense;
        if (place == l->down.at) found = &l->down;
    }
    if (found == NULL || s->type != (uint32_t)found->type) return NULL;
    bool table = found == &m->embed_in;
    uint32_t layout = table ? ROW_MAJOR : PANELS;
    bool same = s->rows == (uint32_t)found->outputs && s->cols == (uint32_t)found->inputs &&
                s->layout == layout &&
                s->size == matrix_bytes(found->type, layout, found->outputs, found->inputs);
    return same ? found : NULL;
}

// The norm that this section is a part of; both NULL: it is none's.
static NormParts norm_at(const Model *m, const Section *s) {
    const void *place = m->map + s->offset;
    if (s->size != (uint64_t)row_bytes(TYPE_F32, padded(m->c.hidden))) return (NormParts){ 0 };
    if (place == m->norm || place == m->norm_bias) return (NormParts){ m->norm, m->norm_bias };
    for (const Layer *l = m->layers; l < m->layers + m->c.layers; l++) {
        if (place == l->norm1 || place == l->norm1_bias)
            return (NormParts){ l->norm1, l->norm1_bias };
        if (place == l->norm2 || place == l->norm2_bias)
            return (NormParts){ l->norm2, l->norm2_bias };
    }
    return (NormParts){ NULL, NULL };
}

// The nearest power of two to x > 0, as its exponent.
static int nearest_power(float x) {
    int exponent;
    return frexpf(x, &exponent) >= 0.70710678f ? exponent : exponent - 1;
}

static int by_number(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

// The powers of two that a norm is divided by, into q->powers[hidden]: how much larger, or smaller,
// a channel leaves it than the median one does; 1 where it is not at least four times. Of no norm:
// n times 1.
static void find_powers(Quantizing *q, NormParts norm, int n) {
    enum { LEAST_POWER = 2, MOST_POWER = 20 };
    for (int i = 0; i < n; i++) q->powers[i] = 1;
    if (norm.weight == NULL) return;
    float *sizes = q->sizes;
    for (int i = 0; i < n; i++)        // of a normed number: its mean is 0, its variance 1
        sizes[i] = sqrtf(norm.weight[i] * norm.weight[i] + norm.bias[i] * norm.bias[i]);
    memcpy(q->powers, sizes, (size_t)n * sizeof *sizes);
    qsort(sizes, (size_t)n, sizeof *sizes, by_number);
    float median = sizes[n / 2];
    for (int i = 0; i < n; i++) {
        float ratio = q->powers[i] / median;
        int power = ratio > 0 && ratio <= FLT_MAX ? nearest_power(ratio) : 0;
        bool worth = abs(power) >= LEAST_POWER && abs(power) <= MOST_POWER;
        q->powers[i] = worth ? ldexpf(1, power) : 1;
    }
}

// A norm's weight or bias, divided.
static const void *pack_norm(void *arg, const Section *source) {
    Quantizing *q = arg;
    const float *from = (const void *)(q->m->map + source->offset);
    float *to = (void *)q->packed;
    find_powers(q, norm_at(q->m, source), q->m->c.hidden);
    memcpy(to, from, source->size);
    for (int i = 0; i < q->m->c.hidden; i++) to[i] = from[i] / q->powers[i];
    return to;
}

// A group of weights, `stride` floats apart, n of them, to be multiplied with powers of two: their
// scale, and their bytes in their places. The scale is the least bf16 with which none is beyond
// 127; those that are not there are 128, which is 0.
typedef struct { const float *at; long stride; int n; const float *powers; } Weights;

static uint16_t pack_group(Quantizing *q, Weights w, uint8_t *to, const int places[QUANT_GROUP]) {
    float largest = 0, inverse = 0;
    bool broken = false;
    for (int i = 0; i < w.n; i++) {
        float size = fabsf(w.at[i * w.stride] * w.powers[i]);
        broken |= !(size <= FLT_MAX);
        largest = size > largest ? size : largest;
    }
    uint16_t scale = to_bf16(largest / 127);
    if (from_bf16(scale) < largest / 127) scale++;
    if (broken) atomic_store(&q->broken, true);
    if (largest > 1e-30f) inverse = 1 / from_bf16(scale);
    else scale = 0;                            // next to nothing: 1 / scale might overflow
    for (int i = 0; i < QUANT_GROUP; i++) {
        bool there = i < w.n && !broken;
        float x = there ? rintf(w.at[i * w.stride] * w.powers[i] * inverse) : 0;
        x = x > 127 ? 127 : x < -127 ? -127 : x;       // inverse was rounded
        to[places[i]] = (uint8_t)((int)x + 128);
    }
    return scale;
}

// Piece: a pair of panels.
static void pack_q8_pair(void *arg, int pair, int thread) {
    (void)thread;
    Quantizing *q = arg;
    int inputs = (int)q->source->cols, places[QUANT_GROUP];
    char *to = q->packed + pair * pair_bytes(TYPE_Q8, inputs);
    const float *from = (const void *)(q->m->map + q->source->offset);
    for (int i = 0; i < QUANT_GROUP; i++) places[i] = i / 4 * PAIR * 4 + i % 2 * 2 + i / 2 % 2;
    for (int group = 0; group < groups_of(inputs); group++, to += formats[TYPE_Q8].unit_bytes)
        for (int output = 0; output < PAIR; output++) {
            int first = group * QUANT_GROUP, left = inputs - first;
            long panel = pair * 2 + output / BLOCK;
            Weights w = { from + (panel * inputs + first) * BLOCK + output % BLOCK, BLOCK,
                          left < QUANT_GROUP ? left : QUANT_GROUP, q->powers + first };
            uint16_t scale = pack_group(q, w, (uint8_t *)to + output * 4, places);
            memcpy(to + PAIR * QUANT_GROUP + output * (int)sizeof scale, &scale, sizeof scale);
        }
}

// Piece: a row of a table.
static void pack_q8_row(void *arg, int row, int thread) {
    (void)thread;
    Quantizing *q = arg;
    int columns = (int)q->source->cols, places[QUANT_GROUP];
    const float *from = (const float *)(const void *)(q->m->map + q->source->offset) +
                        (long)row * columns;
    char *to = q->packed + row * row_bytes(TYPE_Q8, columns);
    for (int i = 0; i < QUANT_GROUP; i++) places[i] = i;
    for (int first = 0; first < columns; first += QUANT_GROUP) {
        int left = columns - first;
        Weights w = { from + first, 1, left < QUANT_GROUP ? left : QUANT_GROUP,
                      q->powers + first };
        uint16_t scale = pack_group(q, w, (uint8_t *)to, places);
        memcpy(to + QUANT_GROUP, &scale, sizeof scale);
        to += row_bytes(TYPE_Q8, QUANT_GROUP);
    }
}

static void show_packed(Quantizing *q) {
    if (q->o->quiet || !isatty(STDERR_FILENO) || seconds() - q->shown < 0.2) return;
    show_status("kl3m: %.0f%% packed and written", 100 * q->done / q->whole);
    q->shown = seconds();
}

__attribute__((noreturn))
static void die_broken(const Quantizing *q, const Section *source) {
    die("%s: %s has weights that are not finite in %s; kl3m --verify checks the file", q->m->path,
        source->name, formats[q->type].name);
}

// A matrix's bytes in the new type.
static const void *pack(void *arg, const Section *source) {
    Quantizing *q = arg;
    if (interrupted) return q->packed;
    q->source = source;
    size_t floats = source->size / sizeof(float);
    int rows = (int)source->rows;
    NormParts norm;
    matrix_at(q->m, source, &norm);
    if (q->type == TYPE_Q8) find_powers(q, norm, (int)source->cols);
    if (q->type == TYPE_BF16)
        parallel((int)((floats + PACKED_AT_ONCE - 1) / PACKED_AT_ONCE), pack_bf16, q);
    else if (source->layout == PANELS) parallel(padded(rows) / PAIR, pack_q8_pair, q);
    else parallel(rows, pack_q8_row, q);
    if (atomic_load(&q->broken)) die_broken(q, source);
    q->done += (double)source->size;
    show_packed(q);
    return q->packed;
}

// A matrix as it will be; its bytes are made when they are asked for.
static Part packed_part(Quantizing *q, const Section *source) {
    Part p = { .section = *source, .alignment = SECTION_ALIGNMENT, .make = pack, .arg = q,
               .source = source };
    int rows = (int)source->rows, cols = (int)source->cols;
    if (source->type != TYPE_F32)
        die("%s has %s weights; quantize the f32 file that it was made from", q->m->path,
            formats[source->type].name);
    p.section.type = q->type;
    p.section.size = matrix_bytes(q->type, source->layout, rows, cols);
    q->whole += 2 * (double)source->size;
    return p;
}

static Type type_named(const char *name) {
    Type type = TYPE_F32;
    while (strcmp(formats[type].name, name) != 0) type++;
    return type;
}

static void say_quantized(const Quantizing *q, double bytes, bool direct) {
    Bytes said = {0};
    append_text(&said, q->o->out, strlen(q->o->out), IN_A_LINE);
    append_format(&said, ": the model with %s weights, %.1f MB", formats[q->type].name,
                  bytes * 1e-6);
    if (q->type == TYPE_BF16 && !q->changed)
        append_string(&said, "; each weight was such a number, so it computes the same bits");
    append_string(&said, "\n");
    tell(&said, direct);
}

// A section as it will be written: matrices in the new type, norms divided, the others as they are.
static Part new_part(Quantizing *q, const Section *s, const Kernels *kernels) {
    NormParts norm;
    if (matrix_at(q->m, s, &norm)) return packed_part(q, s);
    Part p = part_of(q->m, s);
    const float *numbers = (const void *)p.data;
    if (s->type == TYPE_F32 && s->size / sizeof *numbers <= INT_MAX &&
        !kernels->all_finite((int)(s->size / sizeof *numbers), numbers))
        die_broken(q, s);
    if (q->type == TYPE_Q8 && norm_at(q->m, s).weight)
        p.make = pack_norm, p.arg = q, p.source = s;
    return p;
}

static int quantize_model(const Options *o, Model *m, const Kernels *kernels) {
    Quantizing q = { .o = o, .m = m, .type = type_named(o->quantize) };
    Part *parts = allocate(m->n_sections, sizeof *parts);
    size_t largest = 0, columns = 0;
    double bytes = 0;
    for (uint32_t i = 0; i < m->n_sections; i++) {
        const Section *s = &m->sections[i];
        parts[i] = new_part(&q, s, kernels);
        bytes += (double)parts[i].section.size;
        if (!parts[i].source) continue;
        if (parts[i].section.size > largest) largest = parts[i].section.size;
        if (s->cols > columns) columns = s->cols;
    }
    q.packed = allocate_huge(largest);
    q.powers = allocate(columns, sizeof *q.powers);
    q.sizes = allocate((size_t)m->c.hidden, sizeof *q.sizes);
    Output out = output_open(o->out);
    bool direct = out.temporary == NULL;
    check_room(o, bytes + (double)HUGE_PAGE, &out);
    for (Part *p = parts; p < parts + m->n_sections && !interrupted; p++)
        if (p->source) p->section.crc = crc32_of(0, p->make(&q, p->source), p->section.size);
    if (!interrupted) write_sections(&out.writer, parts, m->n_sections);
    if (q.shown > 0) show_status("%s", "");
    output_close(&out, !interrupted);
    if (!interrupted && !o->quiet) say_quantized(&q, bytes, direct);
    free(q.packed);
    free(q.powers);
    free(q.sizes);
    free(parts);
    return interrupted;
}

// ---- 21. Options ----
// One table: the parser, the rules of what goes with what, --help and the README's table (a test
// compares them) come from it. A number is parsed whole and held to its range; none is changed in
// silence. The environment is read here and nowhere else.

typedef enum { FLAG, TEXT, REPEATED_TEXT, CHOICE, WHOLE, REAL, SIZE } Kind;

typedef int Command(const Options *o, Model *m, const Kernels *kernels);

typedef struct {
    char letter;               // or 0
    const char *name, *value;  // value: its name in --help; for CHOICE the words, separated by |
    Kind kind;
    void *address;
    const char *help;
    double least, most;        // inclusive; most INFINITY: any finite number
    bool above;                // the value must lie above least
    bool once;                 // it may not be given twice
    const char *excludes;      // options that it does not go with, separated by spaces; or NULL
    const char *needs;         // options, separated by spaces, without which it is nothing: one of
                               // them must be given; or NULL
    const char *why;           // of these two, for the message
    Command *command;          // what it asks for instead of generating, or NULL
    bool passes;               // the command runs passes, and so needs threads
    const char *group;         // in --help, of the options from this one on; or NULL
} Option;

static Options options = {
    .rules = { .new_tokens = 128, .seed = -1 },
    .settings = { .returns = 1, .logprobs = -1,
                  .sampling = { .temperature = 0.3, .top_k = 50, .top_p = 1, .penalty = 1 } },
};

// What has no meaning where a schema constrains the texts.
#define FREE_TEXT "stop score logits ignore-eos tokenize detokenize learn quantize info verify"

static const Option option_table[] = {
    { 'm', "model", "FILE", TEXT, &options.model,
      .help = "the exported model (default: see below)",
      .group = "Most used" },
    { 'p', "prompt", "TEXT", TEXT, &options.source.prompt,
      .help = "the prompt, escapes (\\n \\t \\xHH ...) decoded", .once = true, .excludes = "file" },
    { 'f', "file", "FILE", TEXT, &options.source.file,
      .help = "the whole file is the prompt; - is stdin", .once = true },
    { 'n', "max-new-tokens", "N", WHOLE, &options.rules.new_tokens,
      .help = "at most N new tokens (128)",
      .most = INT_MAX },
    { 't', "temperature", "T", REAL, &options.settings.sampling.temperature,
      .help = "0 is greedy (0.3)",
      .most = INFINITY },
    { 's', "seed", "S", WHOLE, &options.rules.seed,
      .help = "0 to 2^53 - 1, fixes every draw (the system's)", .most = MOST_SEED },
    { 'r', "num-return-sequences", "R", WHOLE, &options.settings.returns,
      .help = "continuations of each prompt (1)", .least = 1, .most = INT_MAX },
    { 0, "no-echo", NULL, FLAG, &options.no_echo,
      .help = "print the continuation without the prompt" },
    { 0, "json", NULL, FLAG, &options.json, .help = "one JSON object a prompt, one a line" },
    { 0, "jsonl", NULL, FLAG, &options.source.jsonl,
      .help = "each line is JSON with \"prompt\"; implies --json",
      .excludes = "prompt file null tokenize detokenize logits",
      .why = "it generates, and its prompts come from lines of standard input" },
    { '0', "null", NULL, FLAG, &options.source.null,
      .help = "prompts and texts end in NUL, as they are",
      .group = "Prompts" },
    { 0, "no-escape", NULL, FLAG, &options.source.no_escape,
      .help = "take prompts and stop texts as they are" },
    { 0, "truncate", "left|right", CHOICE, &options.rules.truncate,
      .help = "cut a prompt there until N tokens fit" },
    { 0, "no-special", NULL, FLAG, &options.rules.no_special,
      .help = "read <|end|> in a prompt as plain text" },
    { 'k', "top-k", "K", WHOLE, &options.settings.sampling.top_k,
      .help = "draw from the K likeliest; 0 is off (50)", .most = INT_MAX,
      .group = "Sampling" },
    { 0, "top-p", "P", REAL, &options.settings.sampling.top_p,
      .help = "draw from the nucleus of probability P (1)", .most = 1 },
    { 0, "min-p", "P", REAL, &options.settings.sampling.min_p,
      .help = "least share of the likeliest's probability (0)", .most = 1 },
    { 0, "repetition-penalty", "R", REAL, &options.settings.sampling.penalty,
      .help = "as in transformers (1)", .most = INFINITY, .above = true },
    { 0, "stop", "TEXT", REPEATED_TEXT, &options.stops,
      .help = "end before TEXT; may be repeated" },
    { 0, "ignore-eos", NULL, FLAG, &options.settings.ignore_eos, .help = "go on past <|end|>" },
    { 0, "score", NULL, FLAG, &options.score,
      .help = "score each text instead of continuing it",
      .command = score, .passes = true,
      .excludes = "max-new-tokens temperature top-k top-p min-p repetition-penalty "
                  "num-return-sequences seed stop ignore-eos no-echo no-speculation",
      .why = "nothing is drawn",
      .group = "Scores" },
    { 0, "stride", "N", WHOLE, &options.rules.stride,
      .help = "with --score: of windows (half the context)",
      .least = 1, .most = INT_MAX, .needs = "score" },
    { 0, "logprobs", "N", WHOLE, &options.settings.logprobs,
      .help = "in JSON: each token's, and N likeliest ones'", .most = 100, .needs = "json jsonl" },
    { 0, "heat", NULL, FLAG, &options.heat,
      .help = "with --score: the text, shaded by its surprise", .needs = "score",
      .excludes = "json jsonl null", .why = "it shows one text in colours" },
    { 0, "schema", "FILE", TEXT, &options.schema,
      .help = "texts are JSON that fits this JSON Schema",
      .excludes = "regex schema-member " FREE_TEXT, .why = "the schema says where a text ends",
      .group = "Structured output" },
    { 0, "regex", "PATTERN", TEXT, &options.regex,
      .help = "texts match PATTERN from end to end",
      .excludes = "schema-member " FREE_TEXT, .why = "the pattern says where a text ends" },
    { 0, "schema-member", "NAME", TEXT, &options.settings.schema_member,
      .help = "of records: the member that is its schema", .needs = "jsonl",
      .excludes = FREE_TEXT, .why = "the schema says where a text ends" },
    { 0, "schema-ignore", "WORD", REPEATED_TEXT, &options.ignored,
      .help = "do not enforce this keyword if unsupported", .needs = "schema schema-member" },
    { 0, "check", NULL, FLAG, &options.check,
      .help = "say the least -n, or judge lines of stdin", .command = check,
      .needs = "schema regex", .excludes = "prompt file null jsonl json",
      .why = "it judges lines of standard input" },
    { 0, "tokenize", NULL, FLAG, &options.tokenize, .help = "print each prompt's token ids",
      .command = tokenize,
      .group = "Tokens" },
    { 0, "detokenize", NULL, FLAG, &options.detokenize,
      .help = "lines of token ids in, their text out",
      .command = detokenize },
    { 0, "logits", "FILE", TEXT, &options.logits, .help = "write the prompt's logits, fp32",
      .command = logits, .passes = true },
    { 0, "info", NULL, FLAG, &options.info,
      .help = "say what the model file holds", .command = info,
      .group = "Model files" },
    { 0, "verify", NULL, FLAG, &options.verify, .help = "check the model file's checksums",
      .command = verify },
    { 0, "learn", NULL, FLAG, &options.learn,
      .help = "write the model with a table of guesses (-o)",
      .command = learn_guesses, .passes = true, .needs = "out",
      .excludes = "prompt null json jsonl stop num-return-sequences no-speculation",
      .why = "it samples a text of each of its own beginnings, and learns from -f FILE" },
    { 0, "tokens", "N", WHOLE, &options.tokens, .help = "with --learn: sample N tokens (40000)",
      .least = 1, .most = 0x1p40, .needs = "learn" },
    { 0, "quantize", "bf16|q8", CHOICE, &options.quantize,
      .help = "write the model with smaller weights (-o)",
      .command = quantize_model, .passes = true, .needs = "out",
      .excludes = "prompt file null json jsonl",
      .why = "it reads the model and nothing else" },
    { 'o', "out", "FILE", TEXT, &options.out, .help = "the file that --learn, --quantize write",
      .needs = "learn quantize" },
    { 'j', "threads", "J", WHOLE, &options.threads,
      .help = "threads (the CPUs this process may use)",
      .least = 1, .most = INT_MAX,
      .group = "Machine" },
    { 'b', "batch", "B", WHOLE, &options.settings.batch,
      .help = "most sequences in work at once (48)",
      .least = 1, .most = INT_MAX },
    { 0, "rows", "N", WHOLE, &options.settings.rows,
      .help = "most rows (tokens) in one pass (256, or B)",
      .least = 1, .most = INT_MAX },
    { 0, "kv-memory", "SIZE", SIZE, &options.settings.kv_memory,
      .help = "ceiling for keys and values, as 512M or 2G", .least = 1, .most = 0x1p60 },
    { 0, "no-speculation", NULL, FLAG, &options.no_speculation,
      .help = "one token a pass: no guesses" },
    { 'q', "quiet", NULL, FLAG, &options.quiet, .help = "errors only on standard error",
      .group = "Other" },
    { 'v', "verbose", NULL, FLAG, &options.verbose, .help = "seeds and timings on standard error" },
    { 'h', "help", NULL, FLAG, &options.help, .help = "this text" },
    { 0, "version", NULL, FLAG, &options.version, .help = "the program's version" },
};

enum { OPTIONS = sizeof option_table / sizeof *option_table };

static bool given[OPTIONS];            // on the command line

static int show_help(void) {
    Bytes out = {0};
    append_string(&out, "usage: kl3m [options]\n"
                        "Continues legal text with a KL3M model: -p TEXT, -f FILE, or a prompt a "
                        "line\non standard input. In brackets: the default.\n\n");
    for (int i = 0; i < OPTIONS; i++) {
        const Option *o = &option_table[i];
        char left[64];
        if (o->group) append_format(&out, "%s%s:\n", i ? "\n" : "", o->group);
        snprintf(left, sizeof left, "%c%c%s --%s%s%s", o->letter ? '-' : ' ',
                 o->letter ? o->letter : ' ', o->letter ? "," : " ", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        append_format(&out, "  %-30s %s\n", left, o->help);
    }
    append_string(&out,
        "\nThe model is $KL3M_MODEL, else kl3m-002-170m.bin in the current directory, in\n"
        "$XDG_DATA_HOME/kl3m (~/.local/share/kl3m), beside the program, or in\n"
        "../share/kl3m from there. KL3M_ISA=avx512vnni|avx512|avx2|neondot|neon|portable\n"
        "forces a set of instructions. Exit status: 0 done, 1 failed, 2 wrong command\n"
        "line, 3 some prompts could not be run, 130 and 143 after Ctrl-C and SIGTERM.\n");
    print(&out);
    return OK;
}

static int show_version(void) {
    Bytes out = {0};
    append_format(&out, "kl3m %s, model format %d\n", VERSION, FORMAT_VERSION);
    print(&out);
    return OK;
}

// "-n, --max-new-tokens" as messages name an option.
typedef struct { char text[64]; } Title;

static Title title_of(const Option *o) {
    Title t;
    if (o->letter) snprintf(t.text, sizeof t.text, "-%c, --%s", o->letter, o->name);
    else snprintf(t.text, sizeof t.text, "--%s", o->name);
    return t;
}

static void parse_number(const Option *o, const char *text) {
    char range[96], *end;
    if (o->most == INFINITY)
        snprintf(range, sizeof range, "a finite number %s %.0f",
                 o->above ? "above" : "of at least", o->least);
    else snprintf(range, sizeof range, "%s from %.0f to %.0f",
                  o->kind == WHOLE ? "a whole number" : "a number", o->least, o->most);
    const char *allowed = o->kind == WHOLE ? "-0123456789" : "+-.0123456789eE";
    double value = strtod(text, &end);
    bool parsed = *text && *end == 0 && strspn(text, allowed) == strlen(text);
    if (!parsed || !isfinite(value) || value < o->least || value > o->most ||
        (o->above && value <= o->least))
        usage_error("%s: '%s' is not %s", title_of(o).text, text, range);
    if (o->kind == REAL) *(double *)o->address = value;
    else *(long *)o->address = (long)value;    // whole and at most 2^53 - 1: exact
}

// Bytes, or with a letter behind the number units of 1024, 1024^2, 1024^3 bytes.
static void parse_size(const Option *o, const char *text) {
    static const char units[] = "KMG";
    const char *unit = NULL;
    char *end;
    double value = strtod(text, &end);
    bool plain = end > text && strspn(text, "0123456789.") == (size_t)(end - text);
    if (*end && end[1] == 0) unit = strchr(units, toupper((unsigned char)*end));
    if (unit) value = ldexp(value, 10 * (int)(unit - units + 1));
    if (!plain || (*end && !unit) || !(value >= o->least && value <= o->most))
        usage_error("%s: '%s' is not a size from 1 byte to 2^60, as 512M or 2G", title_of(o).text,
                    text);
    *(long *)o->address = (long)value;
}

static void parse_choice(const Option *o, const char *text) {
    size_t n = strlen(text);
    const char *at = n ? strstr(o->value, text) : NULL;
    bool begins = at && (at == o->value || at[-1] == '|');
    if (!begins || (at[n] && at[n] != '|') || strchr(text, '|'))
        usage_error("%s: '%s' is not one of %s", title_of(o).text, text, o->value);
    *(const char **)o->address = text;
}

static void add_given(const Option *o, const char *text) {
    Given *all = o->address;
    if (all->n == MOST_GIVEN) usage_error("%s: more than %d of them", title_of(o).text, MOST_GIVEN);
    if (*text == 0) usage_error("%s: the text is empty", title_of(o).text);
    all->texts[all->n++] = text;
}

static void set_option(const Option *o, const char *value) {
    bool *is_given = &given[o - option_table];
    if (o->once && *is_given)
        usage_error("%s is given twice; one prompt goes here, a file of prompts on standard input",
                    title_of(o).text);
    *is_given = true;
    switch (o->kind) {
    case FLAG: *(bool *)o->address = true; break;
    case SIZE: parse_size(o, value); break;
    case WHOLE: case REAL: parse_number(o, value); break;
    case REPEATED_TEXT: add_given(o, value); break;
    case CHOICE: parse_choice(o, value); break;
    case TEXT:
        if (o->address != &options.source.prompt && o->address != &options.regex && *value == 0)
            usage_error("%s: the name is empty", title_of(o).text);
        *(const char **)o->address = value;
    }
}

static const Option *find_option(char letter, const char *name, size_t n) {
    for (const Option *o = option_table; o < option_table + OPTIONS; o++) {
        bool named = strlen(o->name) == n && strncmp(o->name, name, n) == 0;
        if (letter ? o->letter == letter : named) return o;
    }
    return NULL;
}

// How many letters must be changed, put in or left out to make one name of another (Levenshtein
// 1966).
static size_t distance(const char *a, size_t n, const char *b) {
    enum { LONGEST_NAME = 64 };
    size_t row[LONGEST_NAME + 1], m = strlen(b);
    if (m > LONGEST_NAME) return n + m;
    for (size_t k = 0; k <= m; k++) row[k] = k;
    for (size_t i = 0; i < n; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t k = 0; k < m; k++) {
            size_t changed = diagonal + (a[i] != b[k]), more = row[k] < row[k + 1] ? row[k]
                                                                                  : row[k + 1];
            diagonal = row[k + 1];
            row[k + 1] = changed < more + 1 ? changed : more + 1;
        }
    }
    return row[m];
}

// The option's name that is nearest to one that is none; NULL: nothing is near.
static const char *nearest_name(const char *name, size_t n) {
    const char *nearest = NULL;
    size_t least = n / 3 + 2;
    for (const Option *o = option_table; o < option_table + OPTIONS; o++) {
        bool begins = n > 1 && strncmp(o->name, name, n) == 0;
        size_t far = begins ? 1 : distance(name, n, o->name);
        if (far < least) least = far, nearest = o->name;
    }
    return nearest;
}

// --name, --name=value or --name value, at argv[i]. Returns the last argument that it took.
static int parse_long(int argc, char **argv, int i) {
    char *name = argv[i] + 2;
    size_t n = strcspn(name, "=");
    const char *value = name[n] ? name + n + 1 : NULL;
    for (char *c = name; c < name + n; c++)
        if (*c == '_') *c = '-';
    const Option *o = find_option(0, name, n);
    const char *nearest = o ? NULL : nearest_name(name, n);
    if (nearest) usage_error("--%.*s is no option, --%s is", (int)n, name, nearest);
    if (o == NULL) usage_error("--%.*s is no option", (int)n, name);
    if (o->kind == FLAG && value) usage_error("%s takes no value", title_of(o).text);
    if (o->kind != FLAG && value == NULL && ++i == argc)
        usage_error("%s needs a value: %s", title_of(o).text, o->value);
    set_option(o, value ? value : argv[i]);
    return i;
}

// -q, -qv, -n32 or -n 32.
static int parse_letters(int argc, char **argv, int i) {
    for (char *c = argv[i] + 1; *c; c++) {
        const Option *o = find_option(*c, "", 0);
        if (o == NULL) usage_error("-%c is no option", *c);
        if (o->kind == FLAG) {
            set_option(o, "");
            continue;
        }
        if (c[1] == 0 && ++i == argc)
            usage_error("%s needs a value: %s", title_of(o).text, o->value);
        set_option(o, c[1] ? c + 1 : argv[i]);
        break;
    }
    return i;
}

static void check_needs(const Option *o) {
    Bytes needed = {0};
    bool met = o->needs == NULL;
    for (const char *name = o->needs; name && *name; name += *name == ' ') {
        size_t n = strcspn(name, " ");
        const Option *other = find_option(0, name, n);
        met |= given[other - option_table];
        append_format(&needed, "%s%s", needed.size ? " or " : "", title_of(other).text);
        name += n;
    }
    if (!met) usage_error("%s goes with %s", title_of(o).text, needed.data);
    free(needed.data);
}

// The table's rules of what goes with what, and one command at a time.
static void check_options(void) {
    const Option *chosen = NULL;
    for (int i = 0; i < OPTIONS; i++) {
        const Option *o = &option_table[i];
        if (!given[i]) continue;
        for (const char *name = o->excludes; name && *name;) {
            size_t n = strcspn(name, " ");
            const Option *other = find_option(0, name, n);
            if (given[other - option_table])
                usage_error("%s and %s exclude each other%s%s", title_of(o).text,
                            title_of(other).text, o->why ? ": " : "", o->why ? o->why : "");
            name += n + (name[n] == ' ');
        }
        check_needs(o);
        if (o->command && chosen)
            usage_error("%s and %s exclude each other", title_of(chosen).text, title_of(o).text);
        if (o->command) chosen = o;
    }
}

// The option whose command is to be carried out; NULL: none, so it is to generate.
static const Option *chosen_option(void) {
    for (int i = 0; i < OPTIONS; i++)
        if (given[i] && option_table[i].command) return &option_table[i];
    return NULL;
}

static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i];
        if (strcmp(arg, "--") == 0 && i + 1 == argc) break;
        if (strcmp(arg, "--") == 0) usage_error("'%s' is no option; a prompt goes after -p",
                                                argv[i + 1]);
        if (arg[0] != '-' || arg[1] == 0)
            usage_error("'%s' is no option; a prompt goes after -p", arg);
        i = arg[1] == '-' ? parse_long(argc, argv, i) : parse_letters(argc, argv, i);
    }
    check_options();
    options.json |= options.source.jsonl;
    options.source.scores = options.score;
    const char *no_color = getenv("NO_COLOR");
    options.no_colour = no_color && *no_color;
    options.verbose &= !options.quiet;
}

// Is somebody there to talk to? Then a prompt is asked for line by line.
static bool is_conversation(void) {
    const Source *s = &options.source;
    return !s->prompt && !s->file && !s->jsonl && !s->null && !options.json &&
           isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
}

// The file that runs: on Linux what the kernel says, elsewhere the name it was called by, looked up
// as the shell does.
static char *find_program(const char *name) {
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    if (n > 0) return format_string("%s", program);
    const char *folders = getenv("PATH");
    for (size_t length; folders && *folders && !strchr(name, '/');) {
        length = strcspn(folders, ":");
        const char *slash = length ? "/" : "";
        snprintf(program, sizeof program, "%.*s%s%s", (int)length, folders, slash, name);
        if (access(program, X_OK) == 0) return format_string("%s", program);
        folders += length + (folders[length] == ':');
    }
    return format_string("%s", name);
}

// The first model there is where --help says one may be; a message with the names that were tried
// if there is none. `name` is what the program was called by.
static char *find_model(const char *name) {
    if (options.model) return format_string("%s", options.model);
    const char *named = getenv("KL3M_MODEL"), *file = "kl3m-002-170m.bin";
    if (named && *named) return format_string("%s", named);
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    char *program = find_program(name), *slash = strrchr(program, '/');
    if (slash) *slash = 0;
    const char *beside = slash ? program : ".";
    char *places[] = {
        format_string("%s", file),
        data && *data ? format_string("%s/kl3m/%s", data, file)
                      : format_string("%s/.local/share/kl3m/%s", home ? home : "", file),
        format_string("%s/%s", beside, file),
        format_string("%s/../share/kl3m/%s", beside, file),
    };
    free(program);
    char *found = NULL;
    for (int i = 0; i < 4; i++) {
        if (!found && access(places[i], F_OK) == 0) found = places[i];
        else free(places[i]);
    }
    if (!found)
        die("there is no model: no %s in the current directory, in $XDG_DATA_HOME/kl3m "
            "(~/.local/share/kl3m), beside the program or in ../share/kl3m from there; type "
            "`make model` where the program was built (`make demo` makes a small one, demo.bin), "
            "or name one with -m FILE or $KL3M_MODEL",
            file);
    return found;
}

// The kernels of the set of instructions that KL3M_ISA asks for, else the fastest.
static const Kernels *find_kernels(void) {
    const char *isa = getenv("KL3M_ISA");
    const Kernels *kernels = choose_kernels(isa && *isa ? isa : NULL);
    if (kernels == NULL)
        die("KL3M_ISA=%s: there is no such set of instructions in this CPU; avx512vnni, avx512, "
            "avx2, neondot, neon and portable are the names", isa);
    const char *flaw = kernels->miscompiled();
    if (flaw)
        die("this program was compiled %s, which its results need; build it with make", flaw);
    return kernels;
}

#ifdef __linux__
// The first number of a cgroup's file, divided by the second if there is one: "quota period" of
// version 2's cpu.max is CPUs, memory.max is bytes. INFINITY where there is no file or no limit
// ("max", or -1 in version 1).
static double limit_in(const char *folder, const char *path, const char *name) {
    char file[PATH_MAX + 128];
    snprintf(file, sizeof file, "/sys/fs/cgroup%s%s/%s", folder, path, name);
    FILE *f = fopen(file, "re");
    double limit = 0, period = 1;
    bool limited = f && fscanf(f, "%lf %lf", &limit, &period) >= 1 && limit > 0 && period > 0;
    if (f) fclose(f);
    return limited ? limit / period : INFINITY;
}

// Is this one of the words that commas separate?
static bool has_word(const char *words, const char *word) {
    for (size_t n; *words; words += n + (words[n] == ',')) {
        n = strcspn(words, ",");
        if (n == strlen(word) && memcmp(words, word, n) == 0) return true;
    }
    return false;
}

// The path of the cgroup that this process is in: of version 2 (controller ""), or of a controller
// of version 1. Lines are "number:controllers:path"; "" where there is none. Inside a container the
// path may be the host's, and the files at the root are the container's own.
static void cgroup_path(const char *controller, char path[PATH_MAX]) {
    char line[PATH_MAX + 64];
    FILE *f = fopen("/proc/self/cgroup", "re");
    *path = 0;
    while (f && *path == 0 && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':');
        char *at = controllers ? strchr(controllers + 1, ':') : NULL;
        if (at == NULL) continue;
        *at = 0;
        bool here = *controller ? has_word(controllers + 1, controller) : controllers[1] == 0;
        if (here) snprintf(path, PATH_MAX, "%.*s", (int)strcspn(at + 1, "\n"), at + 1);
    }
    if (f) fclose(f);
}

// The least limit in the files of this name of the cgroup that this process is in, and of its
// parents; divided by those of `period` where that is not NULL.
static double limit_of_cgroup(const char *controller, const char *name, const char *period) {
    char path[PATH_MAX], folder[32] = "";
    if (*controller) snprintf(folder, sizeof folder, "/%s", controller);
    double least = INFINITY;
    for (cgroup_path(controller, path);; *strrchr(path, '/') = 0) {
        double limit = limit_in(folder, path, name);
        double per = period ? limit_in(folder, path, period) : 1;
        if (per < INFINITY) least = fmin(least, limit / per);
        if (strrchr(path, '/') == NULL) return least;
    }
}
#endif

// The CPUs that this process may use at once: its affinity mask, or a cgroup's quota, rounded up,
// if that is less.
static int usable_cpus(void) {
    double cpus = (double)sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
    cpus = fmin(cpus, ceil(limit_of_cgroup("", "cpu.max", NULL)));
    cpus = fmin(cpus, ceil(limit_of_cgroup("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")));
#endif
    return cpus < 1 ? 1 : cpus > 1024 ? 1024 : (int)cpus;
}

// The bytes of memory that this process may use: the machine's, or those of a cgroup it is in if
// that has less.
static double usable_memory(void) {
    double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
#ifdef __linux__
    memory = fmin(memory, limit_of_cgroup("", "memory.max", NULL));
    memory = fmin(memory, limit_of_cgroup("memory", "memory.limit_in_bytes", NULL));
#endif
    return memory;
}

// ---- 22. Main ----

// Was the model that is mapped changed in place?
static bool model_was_changed(void) {
    struct stat now;
    const struct stat *then = &mapped_file.as_opened;
    return mapped_file.fd >= 0 && fstat(mapped_file.fd, &now) == 0 &&
           (now.st_size != then->st_size || now.st_mtim.tv_sec != then->st_mtim.tv_sec ||
            now.st_mtim.tv_nsec != then->st_mtim.tv_nsec);
}

#define CHANGED "the model file was changed while it was in use; replace it by a whole new file"

static struct sigaction before_fault[2];   // what a SIGBUS, a SIGSEGV met before we looked

// A model that is cut (SIGBUS inside the map), or changed in place, while it is mapped is no fault
// of ours, and said to be the file's. Any other fault goes the way it would have gone.
static void on_fault(int number, siginfo_t *fault, void *context) {
    static const char cut[] =
        "kl3m: the model file was cut or its disk failed while it was in use\n";
    static const char changed[] = "kl3m: " CHANGED "\n";
    static atomic_flag told = ATOMIC_FLAG_INIT;
    (void)context;
    uintptr_t at = (uintptr_t)fault->si_addr, start = (uintptr_t)mapped_file.start;
    bool inside = start && at >= start && at - start < (uintptr_t)mapped_file.as_opened.st_size;
    const char *text = number == SIGBUS && inside ? cut : model_was_changed() ? changed : NULL;
    remove_unfinished();
    if (text == NULL || fault->si_code <= 0) {             // ours, or another process's doing
        sigaction(number, &before_fault[number == SIGSEGV], NULL);
        if (fault->si_code <= 0) raise(number);
        return;                                            // the instruction is run again
    }
    while (atomic_flag_test_and_set(&told)) pause();       // another thread has met it too
    if (write(STDERR_FILENO, text, strlen(text)) < 0) {}   // there is nowhere else to say it
    _exit(FAILED);
}

// As many as -j says, and no more than there are CPUs for: threads that wait for each other's CPU
// only cost time.
static int threads_wanted(void) {
    int cpus = usable_cpus();
    if (options.threads > cpus && options.verbose)
        message("-j %ld: %d threads, as many as there are CPUs to use", options.threads, cpus);
    return options.threads && options.threads < cpus ? (int)options.threads : cpus;
}

// As many bytes as --kv-memory says, or a quarter of the memory; and no more than three quarters,
// since a cgroup that is full ends the program without a word.
static void limit_kv_memory(Settings *s) {
    double memory = usable_memory();
    s->most_kv_memory = (long)(memory / 4 * 3);
    if (s->kv_memory == 0) s->kv_memory = (long)(memory / 4);
    if (s->kv_memory <= s->most_kv_memory) return;
    s->kv_memory = s->most_kv_memory;
    if (options.verbose)
        message("--kv-memory: %.1f MB, three quarters of the memory", (double)s->kv_memory * 1e-6);
}

static int carry_out(const char *name) {
    limit_kv_memory(&options.settings);
    char *path = find_model(name);
    Model m = model_open(path);
    const Kernels *kernels = find_kernels();
    const Option *chosen = chosen_option();
    Command *command = chosen ? chosen->command : is_conversation() ? converse : generate;
    bool passes = chosen == NULL || chosen->passes;
    keep_denormals();
    if (passes) threads_start(threads_wanted());
    int status = command(&options, &m, kernels);
    if (model_was_changed()) die("%s", CHANGED);           // though nothing has met it
    if (passes) threads_stop();
    model_close(&m);
    free(path);
    return status;
}

#ifndef KL3M_TEST   // programs in tests/ include this file
int main(int argc, char **argv) {
    hold_standard_streams();
    catch_signals();
    struct sigaction on = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO };
    sigaction(SIGBUS, &on, &before_fault[0]);
    sigaction(SIGSEGV, &on, &before_fault[1]);
    parse_options(argc, argv);
    terminal = isatty(STDOUT_FILENO);
    if (options.help) return show_help();
    if (options.version) return show_version();
    int status = carry_out(argv[0]);
    return status == OK && messages_lost ? FAILED : status;
}
#endif
#endif   // not KIND
