#ifndef KIND   // the whole file but room 4, which it includes once for each kind of CPU
// kl3m: runs ALEA Institute's KL3M legal language models (GPT-NeoX) on a plain computer.
//
//     ./kl3m -p "Governing Law.\n" -t 0.3 -n 32
//
// The promise: a logit is a pure function of the model file and the tokens before it. It is the same to the last bit
// for any number of threads, any neighbours in the pass, any split of the prompt, any compiler, and on AVX-512, AVX2,
// NEON and plain C. Four rules keep it:
//   Rule 1. A sum is one chain of fused multiply-adds in the order of the inner dimension, one chain for each output; or,
//      where outputs are few (norms, softmax), 16 partial sums of every 16th term, folded in one fixed tree. A SIMD
//      lane is an output or one of the 16, so the width of the CPU's vectors changes nothing.
//   Rule 2. Multiplications and additions are fused where FMA is written and nowhere else: -ffp-contract=off.
//   Rule 3. exp, the normal distribution, sines and powers are ours: a C library promises no bits. Square root and
//      division are IEEE 754's, which does.
//   Rule 4. Threads, batch and split choose which outputs are computed when, never how. A row reads the keys and values
//      of the positions before it and its own, in their order.
// They hold for finite numbers; logits that are not finite are reported as a fault of the model.
//
// Everything the network computes is laid out in blocks of 16 columns, so that the result of one product is ready to
// be the input of the next:
//   weights     panels [outputs / 16][inputs][16]: a lane is an output, the inner dimension is walked in order
//   activations tiles  [rows / 12][columns / 16][12][16]: what twelve rows of a pass need, in the order they need it
//   keys        [32 positions / 16][head size][16]: panels whose outputs are positions
//   values      [head size / 16][32 positions][16]: panels whose inputs are positions
// One kernel, `product`, computes the linear layers, q k^T and p v.
//
// The rooms, each of which calls only those above it:
//    1. Ground        errors, memory, files
//    2. Model file    header, sections, checks; the weights stay where the file is mapped
//    3. Lanes         the kinds of CPU: vector width, fused multiply-add
//    4. Kernels       arithmetic over blocks and tiles
//    5. Threads       parallel(pieces)
//    6. KV cache      pages of keys and values, sequences that share them
//    7. Forward       rows in, logits out
//    8. Sampling      logits in, one token out
//    9. Drafts        guesses at the next tokens, from ids alone
//   10. Scheduling    requests, the rows of the next pass, stop rules
//   11. Input         prompts: lines, escapes
//   12. Output        text and JSON, in the order of the prompts
//   13. Commands      generate, tokenize, detokenize, logits, info, verify, learn, bench, replay
//   14. Options       the table that the parser and --help read
//   15. Main

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
#include <spawn.h>
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// The Makefile takes back what these macros do not tell (clang's -fassociative-math, say).
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "-ffast-math, -Ofast and their kin change results: kl3m must be compiled without them"
#endif
_Static_assert(sizeof(0.1) == sizeof(double), "-fsingle-precision-constant changes results: kl3m must be compiled without");
_Static_assert(FLT_EVAL_METHOD == 0, "kl3m needs float arithmetic in float (on x86-32: -msse2 -mfpmath=sse)");
_Static_assert(sizeof(float) == 4 && sizeof(void *) == 8, "kl3m needs a 64-bit machine with IEEE floats");

#define VERSION "0.1"
#define MOST_SEED ((1ull << 53) - 1)   // a double, and so JSON, holds each

enum {
    BLOCK = 16,                 // columns of a block, and the partial sums of rule 1
    TILE = 12,                  // rows of a tile
    PAGE = 32,                  // positions of a page of keys and values
    PAIR = 2 * BLOCK,           // outputs of two panels: dimensions are padded to it
    BLOCK_FLOATS = TILE * BLOCK,
    USUAL_ROWS = 256,           // of a pass, unless --rows or --batch asks for others
    USUAL_BATCH = 48,           // sequences in work, unless --batch asks for others
    MAX_ROWS = 65536,
    MAX_BATCH = 1024,           // sequences
    MAX_STOPS = 64,
    HUGE_PAGE = 2 << 20,        // bytes
};

// ---- 1. Ground ----
// What every other room stands on. A fault ends in one of three ways: usage_error (exit status 2), die (1), or, for
// one prompt among many, a message kept in its request (3). From here on the rest may assume that memory asked for
// is there and that what was interrupted leaves no half-written file behind.

enum { OK = 0, FAILED = 1, USAGE = 2, SOME_FAILED = 3 };   // and 128 + a signal's number

static const char *volatile unfinished_file;   // removed if the program ends before it is whole
static volatile sig_atomic_t interrupted;      // the exit status a signal asked for, or 0
static char program[PATH_MAX];                 // the file that runs, or the name it was called by
static int stop_pipe[2] = { -1, -1 };          // readable once a signal has come: for those who wait in poll
static const int stop_signals[] = { SIGINT, SIGTERM, SIGHUP };

// Bytes on their way to a descriptor, collected until there are `room` of them.
typedef struct { int fd; const char *name; char *data; size_t size, room; } Writer;

static char output_buffer[1 << 16];
static Writer standard_output = { STDOUT_FILENO, "standard output", output_buffer, 0, sizeof output_buffer };
static bool messages_lost;                     // something could not be written to standard error

// Writes all of it; a descriptor that does not block (O_NONBLOCK is its other users' choice too) is waited for. False:
// errno says why.
static bool write_fully(int fd, const char *data, size_t n) {
    while (n > 0) {
        ssize_t put = write(fd, data, n);
        if (put >= 0) data += put, n -= (size_t)put;
        else if (errno == EAGAIN) poll(&(struct pollfd){ .fd = fd, .events = POLLOUT }, 1, -1);
        else if (errno != EINTR) return false;
    }
    return true;
}

static void write_error(const char *s, size_t n) { messages_lost |= !write_fully(STDERR_FILENO, s, n); }

// A line on standard error, written at once. What is no printable character, in a name from a file or an argument, is
// shown as an escape: it could be a command to the terminal.
static void message_of(const char *format, va_list arguments, const char *end) {
    char text[2 * PATH_MAX], line[sizeof text * 4 + 64] = "kl3m: ";
    size_t n = strlen(line);
    vsnprintf(text, sizeof text, format, arguments);
    for (size_t i = 0, length, left = strlen(text); left > 0; i += length, left -= length) {
        uint32_t code;
        length = utf8_char(text + i, left, &code);
        if (code >= 0x20 && (code < 0x7F || (code >= 0xA0 && code != UINT32_MAX))) {
            memcpy(line + n, text + i, length);
            n += length;
        } else for (size_t k = 0; k < length; k++) n += (size_t)sprintf(line + n, "\\x%02x", (unsigned)(uint8_t)text[i + k]);
    }
    n += (size_t)sprintf(line + n, "%s\n", end);
    write_error(line, n);
}

__attribute__((format(printf, 1, 2)))
static void message(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    message_of(format, arguments, "");
    va_end(arguments);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_fully(standard_output.fd, standard_output.data, standard_output.size);   // what is finished is not lost
    message_of(format, arguments, "");
    if (unfinished_file) unlink(unfinished_file);
    _exit(FAILED);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void usage_error(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    message_of(format, arguments, "; kl3m --help lists the options");
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

// Memory for n objects of a size, at a multiple of `alignment`; never NULL. It holds anything, and what lies in it
// untouched costs nothing.
static void *allocate_raw(size_t n, size_t size, size_t alignment) {
    size_t bytes;
    bool too_much = __builtin_mul_overflow(n, size, &bytes) || bytes > SIZE_MAX / 2;
    void *memory = too_much ? NULL : aligned_alloc(alignment, bytes / alignment * alignment + alignment);
    if (memory == NULL)
        die("out of memory: %zu times %zu bytes were asked for; smaller -b, --rows, -n, -r or -j need less", n, size);
    return memory;
}

// The same, aligned for any vector and zeroed.
static void *allocate(size_t n, size_t size) {
    return memset(allocate_raw(n, size, 64), 0, n * size);
}

// The same as allocate_raw, in huge pages if the system has them: for memory that is used whole (measured: 4 MB are
// there in 0.4 ms, in pages of 4 KB in 2.3).
static void *allocate_huge(size_t n, size_t size) {
    void *memory = allocate_raw(n, size, n * size < HUGE_PAGE ? 64 : HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    if (n * size >= HUGE_PAGE) madvise(memory, n * size / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return memory;
}

// Zeroed memory that takes time and room only where it is written: for tables that may stay mostly empty.
static void *allocate_lazily(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("out of memory: %zu bytes were asked for", size);
    return memory;
}

// Room for at least `need` bytes in a buffer that grows.
static void *grow(void *memory, size_t *room, size_t need) {
    if (need <= *room) return memory;
    size_t more = need > SIZE_MAX / 4 ? 0 : *room ? *room : 256;
    while (more && more < need) more *= 2;
    memory = more ? realloc(memory, more) : NULL;
    if (memory == NULL) die("out of memory: %zu bytes were asked for", need);
    *room = more;
    return memory;
}

// A string of bytes that grows.
typedef struct { char *data; size_t size, room; } Bytes;

static void append(Bytes *b, const void *data, size_t n) {
    b->data = grow(b->data, &b->room, b->size + n + 1);
    if (n) memcpy(b->data + b->size, data, n);
    b->size += n;
    b->data[b->size] = 0;
}

static void append_string(Bytes *b, const char *s) { append(b, s, strlen(s)); }

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

// A line on the terminal that is written over and over, cut to its width; an empty one clears it.
__attribute__((format(printf, 1, 2)))
static void show_status(const char *format, ...) {
    enum { USUAL_WIDTH = 80, MOST_WIDTH = 200 };
    char text[MOST_WIDTH], line[MOST_WIDTH + 16];
    struct winsize window;
    int width = ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0 ? window.ws_col : USUAL_WIDTH;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    int n = snprintf(line, sizeof line, "\r%.*s\033[K", width - 1, text);
    write_error(line, (size_t)n);
}

// Ends the program as this signal does by itself, with nothing half-written left behind.
static void on_end(int number) {
    if (unfinished_file) unlink(unfinished_file);
    signal(number, SIG_DFL);
    raise(number);
}

// The first signal asks the program to finish what it has; a second one ends it.
static void on_signal(int number) {
    if (interrupted) {
        if (unfinished_file) unlink(unfinished_file);
        _exit(interrupted);
    }
    interrupted = 128 + number;
    if (write(stop_pipe[1], "", 1) < 0) {}     // the pipe is empty: it cannot be full
}

// A signal that the parent ignores (nohup, a shell's `&`) stays ignored. What it finds in a write goes on.
static void catch_signal(int number, void (*handler)(int)) {
    struct sigaction before, ours = { .sa_handler = handler, .sa_flags = SA_RESTART };
    if (sigaction(number, NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(number, &ours, NULL);
}

// From here on the stop signals end the program in order, and what waits for input waits in wait_for_input. A closed
// pipe ends the program quietly, whoever started it; a file that may not grow is an error of its write.
static void catch_signals(void) {
    static const int ends[] = { SIGPIPE, SIGQUIT, SIGALRM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGPROF, SIGXCPU };
    if (pipe(stop_pipe) != 0) die("cannot make a pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++) fcntl(stop_pipe[i], F_SETFD, FD_CLOEXEC);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) catch_signal(ends[i], on_end);
    for (size_t i = 0; i < sizeof stop_signals / sizeof *stop_signals; i++) catch_signal(stop_signals[i], on_signal);
}

// A standard stream that is closed gets a descriptor that cannot be used its way, so that no other file takes its
// number, and reading or writing it fails as it should.
static void hold_standard_streams(void) {
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            die("standard stream %d is closed, and /dev/null cannot stand in for it: %s", fd, strerror(errno));
}

// Can something be read, or its end be seen, without waiting? With `wait`, waits until it can or a signal comes.
static bool wait_for_input(int fd, bool wait) {
    struct pollfd ready[2] = { { .fd = stop_pipe[0], .events = POLLIN }, { .fd = fd, .events = POLLIN } };
    while (poll(ready, 2, wait ? -1 : 0) < 0 && errno == EINTR) {}
    return !interrupted && ready[1].revents != 0;
}

// A file to be read, "-" standard input. A named pipe that nobody writes to yet is waited for when it is read, where a
// signal is seen, and not here.
static int open_input(const char *name) {
    if (strcmp(name, "-") == 0) return STDIN_FILENO;
    int fd = open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) die("cannot open %s: %s", name, strerror(errno));
    return fd;
}

// Up to 64 KB more of what wait_for_input has seen; 0 at the end; -1: somebody else has read it.
static ssize_t read_more(int fd, const char *name, Bytes *b) {
    enum { PART = 65536 };
    b->data = grow(b->data, &b->room, b->size + PART);
    ssize_t got = read(fd, b->data + b->size, PART);
    if (got < 0 && errno != EAGAIN && errno != EINTR) die("cannot read %s: %s", name, strerror(errno));
    if (got > 0) b->size += (size_t)got;
    return got;
}

// The length of the byte order mark that an input begins with: no part of its text.
static size_t byte_order_mark(const Bytes *b) { return b->size >= 3 && memcmp(b->data, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0; }

// Ends the program, as a write would, once nobody reads its output any more: the rest need not be computed.
static void check_reader(void) {
    struct pollfd out = { .fd = STDOUT_FILENO };
    if (poll(&out, 1, 0) > 0 && out.revents & POLLERR) raise(SIGPIPE);
}

static uint64_t system_random(void) {
    uint64_t number;
    if (getentropy(&number, sizeof number) != 0) die("the system gives no random numbers: %s", strerror(errno));
    return number;
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
    int fd;
    while ((fd = open(name, O_WRONLY | O_TRUNC | O_CLOEXEC | O_NONBLOCK)) < 0 && errno == ENXIO && !interrupted)
        poll(&(struct pollfd){ .fd = stop_pipe[0], .events = POLLIN }, 1, A_MOMENT);
    if (fd < 0 && interrupted) _exit(interrupted);             // nothing has been begun
    return fd;
}

// A file that appears under its name when it is whole and not before, with the rights of the one it replaces; a link is
// followed. Meanwhile it has a random name in the same folder, which nobody else can have. Writes begin and end at
// multiples of 2 MB: ext4 (Linux 6.16 and later) then keeps it in huge pages. What is no regular file is written as it is.
typedef struct { Writer writer; char *name, *temporary; } Output;

static Output output_open(const char *name) {
    struct stat s;
    bool exists = stat(name, &s) == 0, direct = exists && !S_ISREG(s.st_mode);
    Output out = { .name = direct ? format_string("%s", name) : follow_links(name) };
    mode_t rights = exists ? s.st_mode & 0777 : 0666;
    if (!direct) {
        const char *slash = strrchr(out.name, '/');
        out.temporary = format_string("%.*skl3m-%016llx.part", slash ? (int)(slash + 1 - out.name) : 0, out.name,
                                      (unsigned long long)system_random());
        unfinished_file = out.temporary;
    }
    int fd = direct ? open_direct(name) : open(out.temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, rights);
    if (fd < 0) unfinished_file = NULL;
    if (fd < 0 || (exists && !direct && fchmod(fd, rights) != 0)) die("cannot write %s: %s", name, strerror(errno));
    out.writer = (Writer){ fd, out.name, allocate_raw(1, HUGE_PAGE, 64), 0, HUGE_PAGE };
    return out;
}

static void output_close(Output *out, bool whole) {
    if (whole || !out->temporary) flush(&out->writer);
    if ((out->temporary && whole && fsync(out->writer.fd) != 0) || close(out->writer.fd) != 0)
        die("cannot write %s: %s", out->name, strerror(errno));
    if (out->temporary && !whole) unlink(out->temporary);
    else if (out->temporary && rename(out->temporary, out->name) != 0)
        die("cannot write %s: %s", out->name, strerror(errno));
    unfinished_file = NULL;
    free(out->temporary);
    free(out->writer.data);
    free(out->name);
}

// ---- 2. Model file ----
// One file: header, table of sections, sections (README.md has the layout). It is mapped and used where it lies. Here
// every number in it is checked before it is used; from here on the rest may assume that each pointer in a Model
// leads to as many floats as its comment says and that the tokenizer's tables are sound.

enum { FORMAT_VERSION = 1, TYPE_BYTES = 0, TYPE_F32 = 1, ROW_MAJOR = 0, PANELS = 1 };

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
    uint64_t offset, size;     // bytes; offsets are multiples of 64
    uint32_t rows, cols, layout, zero;
} Section;
_Static_assert(sizeof(Section) == 96, "as on disk");

typedef struct {
    uint32_t hidden, layers, heads, kv_heads, head_size, rotary_dims, intermediate, vocab, context;
    uint32_t parallel_residual, zero[2];
    double rotary_base, layer_norm_eps;
} FileConfig;
_Static_assert(sizeof(FileConfig) == 64, "as on disk");

typedef struct {
    int hidden, layers, heads, kv_heads, head_size, rotary_dims, intermediate, vocab, context;
    bool parallel_residual;    // x + attention(norm1(x)) + mlp(norm2(x)), else one after the other
    double rotary_base, eps;
    int q, kv, qkv;            // columns: heads * head_size, kv_heads * head_size, q + 2 kv
} Config;

typedef struct {               // matrices are panels [outputs][inputs], vectors are padded to a multiple of PAIR
    const float *norm1, *norm1_bias, *norm2, *norm2_bias;    // [hidden]
    const float *qkv, *qkv_bias;                             // [q + 2 kv][hidden]: all of Q, all of K, all of V
    const float *dense, *dense_bias;                         // [hidden][q]
    const float *up, *up_bias;                               // [intermediate][hidden]
    const float *down, *down_bias;                           // [hidden][intermediate]
} Layer;

typedef struct {
    const char *path;
    const uint8_t *map;
    size_t size;
    const Section *sections;
    uint32_t n_sections;
    Config c;
    Tokenizer tokenizer;
    uint32_t start_token, end_token;
    const char *about;         // "key\tvalue\n" lines, about_size bytes
    size_t about_size;
    const float *embed_in;     // [vocab][hidden] row-major, unpadded
    Layer *layers;             // [layers]
    const float *norm, *norm_bias;   // [hidden]
    const float *embed_out;    // panels [vocab][hidden]
} Model;

// The file that is mapped, as it was then.
static struct { const char *path; struct stat as_opened; } mapped_file;

static int padded(int n) { return (n + PAIR - 1) / PAIR * PAIR; }

// CRC-32 as in zlib (reflected 0xEDB88320), eight bytes a step over eight tables ("slicing by 8", Kounavis and Berry
// 2005).
static uint32_t crc32_of(uint32_t crc, const uint8_t *data, size_t n) {
    static uint32_t table[8][256];
    if (table[0][1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xEDB88320u : 0);
            table[0][i] = c;
        }
        for (int k = 1; k < 8; k++)
            for (int i = 0; i < 256; i++) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 255];
    }
    crc = ~crc;
    for (; n >= 8; n -= 8, data += 8) {
        uint32_t low, high;
        memcpy(&low, data, 4);
        memcpy(&high, data + 4, 4);
        low ^= crc;
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
    }
    while (n--) crc = crc >> 8 ^ table[0][(crc ^ *data++) & 255];
    return ~crc;
}

static const Section *seek_section(const Model *m, const char *name) {
    static uint32_t at;        // sections are mostly asked for in their order: the search goes on behind the last
    for (uint32_t i = 0; i < m->n_sections; i++, at++) {
        if (at >= m->n_sections) at = 0;
        if (strcmp(m->sections[at].name, name) == 0) return &m->sections[at];
    }
    return NULL;
}

static const Section *find_section(const Model *m, const char *name) {
    const Section *s = seek_section(m, name);
    if (s) return s;
    die("%s: the section %s is missing; export the model again", m->path, name);
}

// The weights of a section, checked to be f32 [rows][cols] in the layout the program expects.
static const float *find_tensor(const Model *m, const char *name, int rows, int cols, uint32_t layout) {
    const Section *s = find_section(m, name);
    uint64_t floats = layout == PANELS ? (uint64_t)padded(rows) * (uint64_t)cols
                    : rows == 1 ? (uint64_t)padded(cols) : (uint64_t)rows * (uint64_t)cols;
    if (s->type != TYPE_F32 || s->rows != (uint32_t)rows || s->cols != (uint32_t)cols || s->layout != layout ||
        s->size != 4 * floats)
        die("%s: %s: found type %u, %u x %u, layout %u, %llu bytes; expected type %d, %d x %d, layout %u, %llu bytes; "
            "export the model again", m->path, name, s->type, s->rows, s->cols, s->layout,
            (unsigned long long)s->size, TYPE_F32, rows, cols, layout, 4 * (unsigned long long)floats);
    return (const float *)(const void *)(m->map + s->offset);
}

static const float *layer_tensor(const Model *m, int layer, const char *name, int rows, int cols, uint32_t layout) {
    char full[96];
    snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    return find_tensor(m, full, rows, cols, layout);
}

static void read_config(Model *m) {
    const Section *s = find_section(m, "config");
    FileConfig f;
    if (s->type != TYPE_BYTES || s->size != sizeof f) die("%s: the config has a wrong size; export it again", m->path);
    memcpy(&f, m->map + s->offset, sizeof f);
    // Limits far above any model of the family, low enough that no product of two of them overflows.
    struct { const char *name; uint32_t value, least, most; } checks[] = {
        { "hidden", f.hidden, 1, 1 << 16 }, { "layers", f.layers, 1, 1 << 12 }, { "heads", f.heads, 1, 1 << 12 },
        { "kv_heads", f.kv_heads, 1, f.heads }, { "head_size", f.head_size, 1, 1 << 12 },
        { "rotary_dims", f.rotary_dims, 0, f.head_size }, { "intermediate", f.intermediate, 1, 1 << 18 },
        { "vocab", f.vocab, 1, 1 << 22 }, { "context", f.context, 1, 1 << 20 },
        { "parallel_residual", f.parallel_residual, 0, 1 },
    };
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (checks[i].value < checks[i].least || checks[i].value > checks[i].most)
            die("%s: config: %s is %u, expected %u to %u; export the model again", m->path, checks[i].name,
                checks[i].value, checks[i].least, checks[i].most);
    if (f.hidden != f.heads * f.head_size || f.heads % f.kv_heads != 0 || f.rotary_dims % 2 != 0 ||
        !(f.rotary_base >= 1 && f.rotary_base <= 1e12) || !(f.layer_norm_eps >= 0 && f.layer_norm_eps <= 1))
        die("%s: config: the sizes contradict each other; export the model again", m->path);
    m->c = (Config){
        .hidden = (int)f.hidden, .layers = (int)f.layers, .heads = (int)f.heads, .kv_heads = (int)f.kv_heads,
        .head_size = (int)f.head_size, .rotary_dims = (int)f.rotary_dims, .intermediate = (int)f.intermediate,
        .vocab = (int)f.vocab, .context = (int)f.context, .parallel_residual = f.parallel_residual,
        .rotary_base = f.rotary_base, .eps = f.layer_norm_eps, .q = (int)(f.heads * f.head_size),
        .kv = (int)(f.kv_heads * f.head_size), .qkv = (int)((f.heads + 2 * f.kv_heads) * f.head_size),
    };
}

static void read_tokenizer(Model *m) {
    const Section *s = find_section(m, "tokenizer");
    const char *flaw = tokenizer_open(&m->tokenizer, m->map + s->offset, s->size);
    if (flaw) die("%s: %s; export the model again", m->path, flaw);
    m->start_token = tokenizer_find_added(&m->tokenizer, "<|start|>");
    m->end_token = tokenizer_find_added(&m->tokenizer, "<|end|>");   // none: generation ends by length alone
    if (m->tokenizer.tokens > (uint32_t)m->c.vocab)
        die("%s: %u tokens but %d rows of weights; export the model again", m->path, m->tokenizer.tokens, m->c.vocab);
}

static void read_tensors(Model *m) {
    const Config *c = &m->c;
    m->embed_in = find_tensor(m, "embed_in.weight", c->vocab, c->hidden, ROW_MAJOR);
    m->layers = allocate((size_t)c->layers, sizeof *m->layers);
    for (int i = 0; i < c->layers; i++) {
        Layer *l = &m->layers[i];
        struct { const char *name; const float **field; int rows, cols; uint32_t layout; } table[] = {
            { "input_layernorm.weight", &l->norm1, 1, c->hidden, ROW_MAJOR },
            { "input_layernorm.bias", &l->norm1_bias, 1, c->hidden, ROW_MAJOR },
            { "post_attention_layernorm.weight", &l->norm2, 1, c->hidden, ROW_MAJOR },
            { "post_attention_layernorm.bias", &l->norm2_bias, 1, c->hidden, ROW_MAJOR },
            { "attention.query_key_value.weight", &l->qkv, c->qkv, c->hidden, PANELS },
            { "attention.query_key_value.bias", &l->qkv_bias, 1, c->qkv, ROW_MAJOR },
            { "attention.dense.weight", &l->dense, c->hidden, c->q, PANELS },
            { "attention.dense.bias", &l->dense_bias, 1, c->hidden, ROW_MAJOR },
            { "mlp.dense_h_to_4h.weight", &l->up, c->intermediate, c->hidden, PANELS },
            { "mlp.dense_h_to_4h.bias", &l->up_bias, 1, c->intermediate, ROW_MAJOR },
            { "mlp.dense_4h_to_h.weight", &l->down, c->hidden, c->intermediate, PANELS },
            { "mlp.dense_4h_to_h.bias", &l->down_bias, 1, c->hidden, ROW_MAJOR },
        };
        for (size_t t = 0; t < sizeof table / sizeof *table; t++)
            *table[t].field = layer_tensor(m, i, table[t].name, table[t].rows, table[t].cols, table[t].layout);
    }
    m->norm = find_tensor(m, "final_layer_norm.weight", 1, c->hidden, ROW_MAJOR);
    m->norm_bias = find_tensor(m, "final_layer_norm.bias", 1, c->hidden, ROW_MAJOR);
    m->embed_out = find_tensor(m, "embed_out.weight", c->vocab, c->hidden, PANELS);
}

static void check_directory(const Model *m) {
    const FileHeader *h = (const FileHeader *)m->map;
    const char *again = "export the model again, or copy it again";
    if (memcmp(h->magic, "KL3M\r\n\x1a\n", 8) != 0)
        die("%s is not a kl3m model; export_weights.py makes one", m->path);
    if (h->version != FORMAT_VERSION)
        die("%s has version %u of the format, this program reads version %d: export the model again", m->path,
            h->version, FORMAT_VERSION);
    if (h->file_size != m->size)
        die("%s has %zu bytes and should have %llu: it was cut or changed; %s", m->path, m->size,
            (unsigned long long)h->file_size, again);
    if (h->sections > (m->size - sizeof *h) / sizeof(Section))
        die("%s: %u sections do not fit in the file; %s", m->path, h->sections, again);
    uint32_t crc = crc32_of(crc32_of(0, m->map, 24), m->map + sizeof *h, h->sections * sizeof(Section));
    if (crc != h->directory_crc) die("%s: the table of sections is damaged; %s", m->path, again);
    const Section *s = (const Section *)(m->map + sizeof *h);
    for (uint32_t i = 0; i < h->sections; i++, s++)
        if (memchr(s->name, 0, sizeof s->name) == NULL || s->offset % 64 != 0 || s->offset > m->size ||
            s->size > m->size - s->offset)
            die("%s: section %u lies outside the file; %s", m->path, i, again);
}

// Maps and checks a model file. No weight is read: that is for `forward` and --verify.
static Model model_open(const char *path) {
    Model m = { .path = path };
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);    // so that no named pipe holds us up
    struct stat s;
    if (fd < 0 || fstat(fd, &s) != 0) die("cannot open the model %s: %s", path, strerror(errno));
    if (S_ISDIR(s.st_mode))
        die("%s is a directory, not a model file; make one with: python3 export_weights.py %s", path, path);
    if (!S_ISREG(s.st_mode)) die("%s is not a regular file, so it cannot be mapped", path);
    m.size = (size_t)s.st_size;
    if (m.size < sizeof(FileHeader)) die("%s: %zu bytes are no model; export it again, or copy it again", path, m.size);
    void *map = mmap(NULL, m.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (map == MAP_FAILED) die("cannot map the model %s: %s", path, strerror(errno));
    close(fd);
#ifdef MADV_HUGEPAGE
    madvise(map, m.size, MADV_HUGEPAGE);       // a file not in memory is then read 2 MB at a time (measured: at the
#endif                                         // disk's 4 GB/s, else at 1.6), and mapped so if the system can
    m.map = map;
    mapped_file.path = path;
    mapped_file.as_opened = s;
    check_directory(&m);
    const FileHeader *h = (const FileHeader *)m.map;
    m.sections = (const Section *)(m.map + sizeof *h);
    m.n_sections = h->sections;
    read_config(&m);
    read_tokenizer(&m);
    const Section *about = find_section(&m, "about");
    m.about = (const char *)m.map + about->offset;
    m.about_size = about->size;
    read_tensors(&m);
    return m;
}

static void model_close(Model *m) {
    free(m->layers);
    tokenizer_close(&m->tokenizer);
    munmap((void *)(uintptr_t)m->map, m->size);
}

// ---- 3. Lanes ----
// What differs between kinds of CPU, and all of it: a vector's width, how many rows of sums fit in the registers
// (ROWS x VECTORS accumulators), the fused multiply-add and the splat. Room 4 is compiled once for each kind by
// including this file again with these set (an editor may grey it out). Compiler vectors do the rest. Which kind runs
// is decided when the program starts; no kind gives other bits, only other speeds.

// n panels, in pairs: the two of a pair lie `stride` floats apart, a pair and the one behind it `next` floats.
typedef struct { const float *at; long stride, next; int n; } Panels;

// As many that are due soon, of each of which `pace` bytes are fetched at a step; 0: they need not be.
typedef struct { const float *at; long stride, next, pace; } Ahead;

typedef struct {
    const char *name;
    void (*product)(int rows, int k, const float *a, Panels w, Ahead ahead, float *c, bool add);
    void (*finish)(int rows, const float *c, const float *bias, const float *bias2, const float *residual, bool gelu,
                   float *out, long row_stride, long block_stride);
    void (*layer_norm)(int rows, int n, float eps, const float *x, const float *weight, const float *bias, float *y);
    float (*softmax)(int keys, float *scores);
    void (*scale_columns)(int n, float factor, const float *from, int from_column, long from_stride, float *to,
                          int to_column, long to_stride);
    bool (*survey)(int n, const float *x, float *most);
    float (*read)(long n, const float *p);
    double (*multiply_add)(int n, float *sink);
    const char *(*miscompiled)(void);
} Kernels;

// Named sums, not an array of them: gcc and clang keep an array of vectors in memory unless every loop over it is
// unrolled early enough, which neither promises (measured: clang 14 ran three times slower).
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define EACH_COUNT(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12)
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, KIND)
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)   // into the second-level cache: the first is full of what is in use

#if defined(__x86_64__)
#define RELAX() _mm_pause()   // tells the core that a loop only waits
#define KIND avx512
#define TARGET __attribute__((target("avx512f,fma")))
#define LANES 16
#define ROWS 12
#define PANELS_AT_ONCE 2
#define FMA(a, b, c) (vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define SPLAT(x) (vec)_mm512_set1_ps(x)
#include "kl3m.c"
#undef KIND

#define KIND avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define SPLAT(x) (vec)_mm256_set1_ps(x)
#include "kl3m.c"
#undef KIND

#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#define KIND neon
#define TARGET
#define LANES 4
#define ROWS 6
#define PANELS_AT_ONCE 1
#define FMA(a, b, c) (vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b))
#define SPLAT(x) (vec)vdupq_n_f32(x)
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
#include "kl3m.c"
#undef KIND

// Denormal numbers as IEEE 754 has them. They are, unless the program was linked with flags that bring start-up code
// which flushes them to zero (-ffast-math and -funsafe-math-optimizations do). Threads inherit it.
static void keep_denormals(void) {
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() & ~0x8040u);
#endif
}

// The kernels of this name, or with NULL the fastest that this CPU runs; NULL if it has none such.
static const Kernels *choose_kernels(const char *name) {
    struct { const Kernels *kernels; bool here; } kinds[] = {
#if defined(__x86_64__)
        { &kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma") },
        { &kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") },
#elif defined(__aarch64__)
        { &kernels_neon, true },
#endif
        { &kernels_portable, true },
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i].here && (name == NULL || strcmp(name, kinds[i].kernels->name) == 0)) return kinds[i].kernels;
    return NULL;
}

#endif   // not KIND

#ifdef KIND
// ---- 4. Kernels ----
// Arithmetic over pointers and sizes, compiled once for each kind of CPU. A tile's row r has its block b at
// tile + b * BLOCK_FLOATS + r * BLOCK. Nothing here knows a model, a thread or a position.

#define PER_BLOCK (BLOCK / LANES)                  // vectors in a block of 16
#define VECTORS (PER_BLOCK * PANELS_AT_ONCE)       // vectors of outputs that `product_rows` computes: 2 or 4
#define INLINE static inline __attribute__((always_inline)) TARGET
typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * LANES)));
#define vec NAME(vec)
#define ivec NAME(ivec)
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define SELECT(mask, yes, no) (vec)(((mask) & (ivec)(yes)) | (~(mask) & (ivec)(no)))

// The place of vector v of row r in a tile of outputs, and of vector v among the panels' weights.
#define OUT(v, r) (c + (v) / PER_BLOCK * BLOCK_FLOATS + (r) * BLOCK + (v) % PER_BLOCK * LANES)
#define WEIGHT(v) LOAD(w + (v) / PER_BLOCK * stride + (v) % PER_BLOCK * LANES)
#define START(r) \
    vec s##r = {0}, t##r = {0}, u##r = {0}, v##r = {0}; \
    if (r < R && add) { \
        s##r = LOAD(OUT(0, r)), t##r = LOAD(OUT(1, r)); \
        if (VECTORS > 2) u##r = LOAD(OUT(2, r)), v##r = LOAD(OUT(3, r)); \
    }
#define STEP(r) \
    if (r < R) { \
        vec x = SPLAT(a[r * BLOCK + i]); \
        s##r = FMA(x, w0, s##r), t##r = FMA(x, w1, t##r); \
        if (VECTORS > 2) u##r = FMA(x, w2, u##r), v##r = FMA(x, w3, v##r); \
    }
#define FINISH(r) \
    if (r < R) { \
        STORE(OUT(0, r), s##r), STORE(OUT(1, r), t##r); \
        if (VECTORS > 2) STORE(OUT(2, r), u##r), STORE(OUT(3, r), v##r); \
    }

// c[r][j] = (add ? c[r][j] : 0) + sum over i < k of a[r][i] * w[j][i], for R rows (a constant in each copy) and the
// outputs of PANELS_AT_ONCE panels: rule 1's chains, as many at a time as the registers hold. At each step a line of
// `first` and `second` is asked for.
INLINE void NAME(product_rows)(const int R, int k, const float *a, const float *w, long stride, const char *first,
                               const char *second, long pace, float *c, bool add) {
    EACH_ROW(START)
    for (int done = 0; done < k; done += BLOCK, a += BLOCK_FLOATS) {
        int n = k - done < BLOCK ? k - done : BLOCK;
        for (int i = 0; i < n; i++, w += BLOCK, first += pace, second += pace) {
            vec w0 = WEIGHT(0), w1 = WEIGHT(1), w2 = VECTORS > 2 ? WEIGHT(2) : w0, w3 = VECTORS > 2 ? WEIGHT(3) : w1;
            PREFETCH(first);
            if (PANELS_AT_ONCE > 1) PREFETCH(second);
            EACH_ROW(STEP)
            (void)w2, (void)w3;
        }
    }
    EACH_ROW(FINISH)
}

// The same for one row, which has few sums: those of four panels, so that the processor need not wait for each. Lines of
// what is due soon are fetched from ahead[0] .. [3] on, if `fetch`.
INLINE void NAME(product_row)(const bool fetch, int k, const float *a, const float *const w[4], const char *const ahead[4],
                              long pace, float *c, bool add) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    if (add) s0 = LOAD(OUT(0, 0)), s1 = LOAD(OUT(1, 0)), s2 = LOAD(OUT(2, 0)), s3 = LOAD(OUT(3, 0));
    long at = 0, line = 0;
    for (int done = 0; done < k; done += BLOCK, a += BLOCK_FLOATS) {
        int n = k - done < BLOCK ? k - done : BLOCK;
        for (int i = 0; i < n; i++, at += BLOCK, line += pace) {
            vec x = SPLAT(a[i]);
            if (fetch)
                for (int panel = 0; panel < 4; panel++) PREFETCH(ahead[panel] + line);
            s0 = FMA(x, LOAD(w[0] + at), s0), s1 = FMA(x, LOAD(w[1] + at), s1);
            s2 = FMA(x, LOAD(w[2] + at), s2), s3 = FMA(x, LOAD(w[3] + at), s3);
        }
    }
    STORE(OUT(0, 0), s0), STORE(OUT(1, 0), s1), STORE(OUT(2, 0), s2), STORE(OUT(3, 0), s3);
}

// The same for 1 to TILE rows and any number of panels: a [k / 16][12][16], w [panels][k][16], c [panels][12][16] with
// room for pairs of them. Meanwhile what is needed next is fetched from memory. Four panels at once pay off where one is
// a single vector (measured: decoding at position 3,840 6% faster; with AVX2 nothing).
static TARGET __attribute__((noinline))
void NAME(product)(int rows, int k, const float *a, Panels w, Ahead ahead, float *c, bool add) {
    int parts = (rows + ROWS - 1) / ROWS, pairs;
    long pace = ahead.pace / parts;
    for (; w.n > 0; w.n -= 2 * pairs, c += 2 * pairs * BLOCK_FLOATS) {
        const float *first = w.at, *second = w.n > 1 ? first + w.stride : first;
        const char *line = (const char *)ahead.at, *more = (const char *)(ahead.at + ahead.stride);
        pairs = LANES == BLOCK && rows == 1 && w.n > 2 ? 2 : 1;
        if (pairs == 2) {
            const float *third = first + w.next, *fourth = w.n > 3 ? third + w.stride : third;
            const float *from[] = { first, second, third, fourth };
            long next = ahead.next * (long)sizeof(float);
            const char *soon[] = { line, more, line + next, more + next };
            if (pace > 0) NAME(product_row)(true, k, a, from, soon, pace, c, add);
            else NAME(product_row)(false, k, a, from, soon, pace, c, add);
        } else for (int panel = 0; panel < 2; panel += PANELS_AT_ONCE, first = second, line = more) {
            for (int part = 0; part < parts; part++) {
                int r = part * ROWS;
                long behind = part * k * pace;
                switch (rows - r < ROWS ? rows - r : ROWS) {
#define CASE(n) case n: \
                    if (n <= ROWS) NAME(product_rows)(n, k, a + r * BLOCK, first, second - first, line + behind, \
                                                      more + behind, pace, c + panel * BLOCK_FLOATS + r * BLOCK, add); \
                    break;
                    EACH_COUNT(CASE)
#undef CASE
                }
            }
        }
        w.at += pairs * w.next;
        ahead.at += pairs * ahead.next;
    }
}

// e^x to 1.5 units in the last place for x in [-86, 0], all that is asked for; 0 below, where a float loses digits; NaN
// of NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite 1980), e^r by its Taylor polynomial of degree 7.
INLINE vec NAME(exp_vec)(vec x) {
    const vec round = SPLAT(12582912.0f);          // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    ivec tiny = x < SPLAT(-86.0f);
    x = SELECT(tiny, SPLAT(-86.0f), x);
    vec shifted = FMA(x, SPLAT(1.44269504f), round), n = shifted - round;
    vec r = FMA(n, SPLAT(-0.693359375f), x);       // ln 2 in two parts, the first with 9 bits: n times it is exact
    r = FMA(n, SPLAT(2.12194440e-4f), r);
    vec p = SPLAT(1.0f / 5040);
    p = FMA(p, r, SPLAT(1.0f / 720));
    p = FMA(p, r, SPLAT(1.0f / 120));
    p = FMA(p, r, SPLAT(1.0f / 24));
    p = FMA(p, r, SPLAT(1.0f / 6));
    p = FMA(p, r, SPLAT(0.5f));
    p = FMA(p, r, SPLAT(1.0f));
    p = FMA(p, r, SPLAT(1.0f));
    vec power = (vec)((((ivec)shifted - (ivec)round) << 23) + 0x3F800000);     // 2^n; times p it is exact
    return (vec)((ivec)(p * power) & ~tiny);
}

// x Phi(x), Phi the normal distribution: the GELU of Hendrycks and Gimpel (2016), not its tanh approximation.
// Phi(-a) = e^-R(a) for a >= 0; R is a minimax polynomial of degree 10 for -ln Phi(-a) on [0, 6], weighted so that
// Phi is within 6e-8 everywhere; it goes on growing beyond 6.
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

// out = act(c + bias) or residual + (c + bias + bias2), for PAIR columns of some rows. c is a tile; so are out and
// residual, at strides of the caller's; bias2 and residual may be NULL; act is the GELU or nothing.
static TARGET void NAME(finish)(int rows, const float *c, const float *bias, const float *bias2, const float *residual,
                                bool gelu, float *out, long row_stride, long block_stride) {
    for (int block = 0; block < 2; block++)
        for (int r = 0; r < rows; r++)
            for (int lane = 0; lane < BLOCK; lane += LANES) {
                long at = block * block_stride + r * row_stride + lane;
                vec y = LOAD(c + block * BLOCK_FLOATS + r * BLOCK + lane);
                if (bias) y += LOAD(bias + block * BLOCK + lane);
                if (bias2) y += LOAD(bias2 + block * BLOCK + lane);
                if (residual) y += LOAD(residual + at);
                if (gelu) y = NAME(gelu_vec)(y);
                STORE(out + at, y);
            }
}

// Sixteen partial sums into one, always in this order.
static TARGET float NAME(fold)(float *s) {
    for (int half = BLOCK / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias over the n columns of each row (Ba et al. 2016). x and y are
// tiles; columns from n on, up to a multiple of PAIR, come out as 0.
static TARGET void NAME(layer_norm)(int rows, int n, float eps, const float *x, const float *weight, const float *bias,
                                    float *y) {
    static const float ones[2 * BLOCK] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    int blocks = (n + PAIR - 1) / PAIR * 2;
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
                int left = n - b * BLOCK, skip = left >= BLOCK ? 0 : left > 0 ? BLOCK - left : BLOCK;
                vec d = (LOAD(x + b * BLOCK_FLOATS + lane) - SPLAT(mean)) * LOAD(ones + skip + lane);
                STORE(y + b * BLOCK_FLOATS + lane, d);
                s = FMA(d, d, s);
            }
            STORE(squares + lane, s);
        }
        float scale = 1.0f / sqrtf(NAME(fold)(squares) / (float)n + eps);
        for (int b = 0; b < blocks; b++)
            for (int lane = 0; lane < BLOCK; lane += LANES) {
                float *at = y + b * BLOCK_FLOATS + lane;
                STORE(at, FMA(LOAD(at) * SPLAT(scale), LOAD(weight + b * BLOCK + lane), LOAD(bias + b * BLOCK + lane)));
            }
    }
}

// scores[j] = e^(scores[j] - largest) for one row of a tile, j < keys; the rest of the last block becomes 0. Returns
// the sum.
static TARGET float NAME(softmax)(int keys, float *scores) {
    int blocks = (keys + BLOCK - 1) / BLOCK;
    for (int j = keys; j < blocks * BLOCK; j++) scores[j / BLOCK * BLOCK_FLOATS + j % BLOCK] = -INFINITY;
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

// n columns of one row times a factor become columns of another: each row is blocks of 16 columns, so many floats apart.
static TARGET void NAME(scale_columns)(int n, float factor, const float *from, int from_column, long from_stride,
                                       float *to, int to_column, long to_stride) {
    for (int i = 0, run; i < n; i += run) {
        int from_skip = (from_column + i) % BLOCK, to_skip = (to_column + i) % BLOCK;
        run = BLOCK - (from_skip > to_skip ? from_skip : to_skip);
        const float *x = from + (from_column + i) / BLOCK * from_stride + from_skip;
        float *y = to + (to_column + i) / BLOCK * to_stride + to_skip;
        if (run == BLOCK && n - i >= BLOCK)
            for (int lane = 0; lane < BLOCK; lane += LANES) STORE(y + lane, SPLAT(factor) * LOAD(x + lane));
        else for (int j = 0; j < run && i + j < n; j++) y[j] = factor * x[j];
    }
}

// The largest of every 16th of 256 floats, for all n of them, 256 at a time: most[n / 256, rounded up][16], of none
// -INFINITY. False: not all are finite. That is told by the bits, so that no flag of a compiler makes it forget.
static TARGET bool NAME(survey)(int n, const float *x, float *most) {
    enum { NOT_FINITE = 0x7F800000 };          // the least bits, but for the sign, of what is not
    int32_t bits[BLOCK] = {0}, largest_bits = 0;
    ivec widest = {0};
    for (; n >= BLOCK * BLOCK; n -= BLOCK * BLOCK, x += BLOCK * BLOCK, most += BLOCK)
        for (int lane = 0; lane < BLOCK; lane += LANES) {
            vec largest = LOAD(x + lane);
            for (int i = lane; i < BLOCK * BLOCK; i += BLOCK) {
                vec v = LOAD(x + i);
                ivec size = (ivec)v & 0x7FFFFFFF, wider = size > widest;
                largest = SELECT(v > largest, v, largest);
                widest = (size & wider) | (widest & ~wider);
            }
            STORE(most + lane, largest);
        }
    for (int i = 0; n > 0 && i < BLOCK; i++) most[i] = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (x[i] > most[i % BLOCK]) most[i % BLOCK] = x[i];
        memcpy(bits, x + i, sizeof *bits);
        bits[0] &= 0x7FFFFFFF;
        if (bits[0] > largest_bits) largest_bits = bits[0];
    }
    memcpy(bits, &widest, sizeof widest);
    for (int i = 0; i < LANES; i++) largest_bits = bits[i] > largest_bits ? bits[i] : largest_bits;
    return largest_bits < NOT_FINITE;
}

// What --bench holds this CPU to, apart from everything above. Reads n floats, a multiple of 4 blocks.
static TARGET float NAME(read)(long n, const float *p) {
    float sum[BLOCK] = {0};
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (long i = 0; i < n; i += 4 * LANES) {
        s0 += LOAD(p + i), s1 += LOAD(p + i + LANES), s2 += LOAD(p + i + 2 * LANES), s3 += LOAD(p + i + 3 * LANES);
    }
    STORE(sum, s0 + s1 + s2 + s3);
    return NAME(fold)(sum);
}

// n fused multiply-adds into each of product_rows' sums, with nothing to load. Returns the floating-point operations.
static TARGET double NAME(multiply_add)(int n, float *sink) {
#define START_PEAK(r) vec s##r = SPLAT(r), t##r = SPLAT(r + 12), u##r = SPLAT(r + 24), v##r = SPLAT(r + 36);
#define STEP_PEAK(r) \
    if (r < ROWS) { \
        s##r = FMA(x, y, s##r), t##r = FMA(x, y, t##r); \
        if (VECTORS > 2) u##r = FMA(x, y, u##r), v##r = FMA(x, y, v##r); \
    }
#define FINISH_PEAK(r) y += s##r + t##r + u##r + v##r;
    vec x = SPLAT(0.5f), y = SPLAT(0.25f);
    EACH_ROW(START_PEAK)
    for (int i = 0; i < n; i++) { EACH_ROW(STEP_PEAK) }
    EACH_ROW(FINISH_PEAK)
    *sink = y[0];
    return 2.0 * n * ROWS * VECTORS * LANES;
#undef START_PEAK
#undef STEP_PEAK
#undef FINISH_PEAK
}

// What is wrong with how this was compiled, or NULL. (1 + 2^-12)^2 is 1 + 2^-11 when it is rounded by itself: was it
// fused with the difference, against rule 2? Are there NaN and infinity (not after clang's -fno-honor-nans)?
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
    .name = STRING(KIND), .product = NAME(product), .finish = NAME(finish), .layer_norm = NAME(layer_norm),
    .softmax = NAME(softmax), .scale_columns = NAME(scale_columns), .survey = NAME(survey), .miscompiled = NAME(miscompiled),
    .read = NAME(read), .multiply_add = NAME(multiply_add),
};

#undef STRING_
#undef STRING
#undef TARGET
#undef LANES
#undef ROWS
#undef PANELS_AT_ONCE
#undef FMA
#undef SPLAT
#undef PER_BLOCK
#undef VECTORS
#undef INLINE
#undef vec
#undef ivec
#undef LOAD
#undef STORE
#undef SELECT
#undef OUT
#undef WEIGHT
#undef START
#undef STEP
#undef FINISH
#endif   // KIND

#ifndef KIND
// ---- 5. Threads ----
// One verb: parallel(pieces, run, arg) calls run(arg, piece, thread) once for each piece and returns when all are
// done. Each thread is dealt pieces that lie side by side, since it walks through those fastest, and takes them from the
// first on; one that has none left takes another's, from the last on (work stealing, Blumofe and Leiserson 1999). So
// fast and slow cores finish together, and a worker that comes late, or never because another process has its core,
// holds up nobody unless it is in the middle of a piece. Workers that wait spin for a moment, then sleep. The calling
// thread is thread 0 and works too.

typedef void (*Run)(void *arg, int piece, int thread);

// The pieces first .. end - 1 that are left of a thread's, as end << 32 | first; on a cache line of its own.
typedef struct { _Alignas(64) _Atomic uint64_t pieces; } Range;

static Range only_range;               // the calling thread's, until there are workers

static struct {
    int threads;
    pthread_t *workers;                // [threads - 1]
    Range *ranges;                     // [threads]
    // The job. Only who has taken a piece of it reads it, and it changes only when all its pieces are done: so a worker
    // that was away between its look at a range and a compare-and-swap that succeeds has a piece of the job as it is now.
    _Atomic(Run) run;
    _Atomic(void *) arg;
    atomic_int done;
    atomic_uint round;                 // counts jobs
    atomic_int sleepers;
    atomic_bool over;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = { .threads = 1, .ranges = &only_range, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER };

enum { SPINS = 4000 };                 // some 50 to 100 microseconds, longer than the gap between two steps of a pass

static void pause_a_moment(int spins) {
    RELAX();
    if (spins % 256 == 255) sched_yield();    // another process, or a thread of ours, may want this core
}

static uint64_t range_of(int first, int end) { return (uint64_t)end << 32 | (uint32_t)first; }

// Takes the first piece of a thread's own range, or the last one of another's. False: nobody has any left.
static bool take_piece(int thread, int *piece) {
    for (int i = 0; i < pool.threads;) {
        Range *range = &pool.ranges[(thread + i) % pool.threads];
        uint64_t seen = atomic_load(&range->pieces);
        int first = (int)(uint32_t)seen, end = (int)(seen >> 32);
        *piece = i == 0 ? first : end - 1;
        if (first == end) i++;
        else if (atomic_compare_exchange_weak(&range->pieces, &seen, i == 0 ? range_of(first + 1, end)
                                                                             : range_of(first, end - 1))) return true;
    }
    return false;
}

static void work(int thread) {
    int done = 0;
    for (int piece; take_piece(thread, &piece); done++) atomic_load(&pool.run)(atomic_load(&pool.arg), piece, thread);
    atomic_fetch_add(&pool.done, done);
}

static void *worker(void *number) {
    while (!atomic_load(&pool.over)) {
        unsigned seen = atomic_load(&pool.round);
        work((int)(intptr_t)number);
        int spins = 0;
        while (spins < SPINS && atomic_load(&pool.round) == seen && !atomic_load(&pool.over)) pause_a_moment(spins++);
        if (spins < SPINS) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleepers, 1);
        while (atomic_load(&pool.round) == seen && !atomic_load(&pool.over)) pthread_cond_wait(&pool.wake, &pool.lock);
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
    for (int i = 0; i < pool.threads; i++)
        atomic_store(&pool.ranges[i].pieces, range_of((int)((long)pieces * i / pool.threads),
                                                      (int)((long)pieces * (i + 1) / pool.threads)));
    atomic_fetch_add(&pool.round, 1);
    if (pool.threads > 1) wake_workers();
    work(0);
    for (int spins = 0; atomic_load(&pool.done) < pieces; spins++) pause_a_moment(spins);
}

static void threads_start(int threads) {
    pthread_t *workers = pool.workers = allocate((size_t)threads, sizeof *workers);
    sigset_t stops, before;                    // the main thread's; a fault such as SIGBUS is its thread's own
    sigemptyset(&stops);
    for (size_t i = 0; i < sizeof stop_signals / sizeof *stop_signals; i++) sigaddset(&stops, stop_signals[i]);
    pthread_sigmask(SIG_BLOCK, &stops, &before);
    pool.ranges = allocate_raw((size_t)threads, sizeof *pool.ranges, 64);
    for (int i = 0; i < threads; i++) atomic_init(&pool.ranges[i].pieces, 0);
    pool.threads = threads;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);   // musl gives 128 KB; an unoptimized product needs 241
    for (int i = 1; i < threads; i++) {
        int error = pthread_create(&workers[i - 1], &attributes, worker, (void *)(intptr_t)i);
        if (error) die("cannot start thread %d: %s; a smaller -j needs fewer", i + 1, strerror(error));
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

// ---- 6. KV cache ----
// Keys and values of a sequence, in pages of PAGE positions for all layers. Sequences that begin alike share pages:
// a page belongs to all that use it and is copied when one of several users wants to write. After kv_reserve the
// positions asked for may be written. No arithmetic here.

typedef struct Page { struct Page *next; int users; float *floats; } Page;

typedef struct {
    long page_floats;          // [layers][kv_heads][head_floats]
    long pages;                // that there are, in use or spare
    Page *spare;
} KVCache;

typedef struct {
    Page **pages;
    int n_pages;
    int length;                // positions that hold a token
} Sequence;

// Of one head in a page: keys [2][head size][16], then values [head size / 16][32][16].
static long head_floats(const Config *c) { return PAGE * ((long)c->head_size + padded(c->head_size)); }

static KVCache kv_open(const Config *c) {
    return (KVCache){ .page_floats = head_floats(c) * c->kv_heads * c->layers };
}

static long page_bytes(const KVCache *kv) { return kv->page_floats * (long)sizeof(float); }

static Page *kv_take_page(KVCache *kv) {
    Page *page = kv->spare;
    if (page) kv->spare = page->next;
    else {
        page = allocate(1, sizeof *page);
        page->floats = allocate_huge((size_t)kv->page_floats, sizeof(float));
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

// Makes positions length .. end - 1 of a sequence writable: pages of its own, the last begun one copied if shared.
static void kv_reserve(KVCache *kv, Sequence *s, int end) {
    int need = (end + PAGE - 1) / PAGE, first = s->length / PAGE;
    if (need > s->n_pages) {
        size_t room = (size_t)s->n_pages * sizeof *s->pages;
        s->pages = grow(s->pages, &room, (size_t)need * sizeof *s->pages);
        while (s->n_pages < need) s->pages[s->n_pages++] = kv_take_page(kv);
    }
    if (first < need && s->pages[first]->users > 1) {
        Page *own = kv_take_page(kv);
        memcpy(own->floats, s->pages[first]->floats, (size_t)kv->page_floats * sizeof(float));
        kv_drop_page(kv, s->pages[first]);
        s->pages[first] = own;
    }
}

// A sequence that begins with the first so many positions of another.
static Sequence kv_fork(const Sequence *from, int length) {
    Sequence s = { .length = length, .n_pages = (length + PAGE - 1) / PAGE };
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
        free(page->floats);
        free(page);
    }
}

// ---- 7. Forward ----
// Rows in, logits out. A row is a token at a position of a sequence; prefill, decoding and batches are only different
// rows of one pass. Rows of one sequence stand together, at successive places. The layer (parallel residual; without it,
// norm2 reads x after the attention was added):
//
//     x ─┬─ norm1 ─ qkv ─ rotary ─ keys, values ─ attention ─ dense ─┬─ + ─ x
//        ├─ norm2 ─ up ─ GELU ─ down ──────────────────────────────┤
//        └─────────────────────────────────────────────────────────┘
//
// forward cannot fail and allocates nothing.

typedef struct {
    Sequence *sequence;
    int position;
    int place;                 // where its key and value go: the position, but for a side guess, seen by no other row
    uint32_t token;
    bool wants_logits;
} Row;

// The work of attention is cut into tiles of up to TILE slots. A slot is a query head of a row; the heads that share
// a kv head stand side by side, so that its keys are read once for all of them.
typedef struct {
    int first_row, first_slot, slots;      // slot i: row first_row + (first_slot + i) / r, r = heads / kv_heads
    bool alone;                            // it holds all rows that its sequence has in the pass
} Span;

typedef struct { float cosine, sine; } Turn;

typedef struct {
    const Model *m;
    const Kernels *kernels;
    int max_rows, max_logits;
    double *frequency;         // [rotary_dims / 2] radians a position
    float *x, *normed1, *normed2, *attended;   // tiles [rows][hidden], the last [rows][q]
    float *qkv;                // tiles [rows][q + 2 kv]
    float *mlp;                // tiles [rows][intermediate]
    float *final;              // tiles [logits rows][hidden]
    float *logits;             // [logits rows][padded vocab] row-major
    Turn *turns;               // [rows][rotary_dims / 2]
    Span *spans;
    float **scratch;           // [threads] a thread's query, score and output tiles
    const Row *rows;           // the pass: set by forward
    int n, n_logits, n_sequences, n_spans, layer;
    bool split;                // a sequence has more rows in the pass than one span holds
    int *logit_rows;           // [logits rows] the row of the pass each belongs to
} Work;

// e^x, x <= 0, and ln x, x > 0, sine and cosine in double: Taylor series after a reduction of the argument, right to
// a few units in the 16th digit. The rotary tables and the sampler need few of them, but the same ones everywhere.
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

// The angle, 0 <= angle < 2^20, less the nearest multiple of pi/2, which is subtracted in three parts of 33 bits
// (as in FreeBSD's msun, e_rem_pio2.c).
static Turn turn_by(double angle) {
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
    return (Turn){ (float)(quadrant == 1 || quadrant == 2 ? -c : c), (float)(quadrant >= 2 ? -s : s) };
}

static long tile_at(int tile, int columns) { return (long)tile * TILE * columns; }

// The floats of row r of a tile, column by column.
static float *cell(float *tile, int r, int column) {
    return tile + (long)(column / BLOCK) * BLOCK_FLOATS + r * BLOCK + column % BLOCK;
}

static int rows_in_tile(int n, int tile) { return n - tile * TILE < TILE ? n - tile * TILE : TILE; }
static int tiles_of(int n) { return (n + TILE - 1) / TILE; }

static Work work_open(const Model *m, const Kernels *kernels, int max_rows, int max_logits) {
    const Config *c = &m->c;
    Work w = { .m = m, .kernels = kernels, .max_rows = max_rows, .max_logits = max_logits };
    size_t rows = (size_t)tiles_of(max_rows) * TILE, logit_rows = (size_t)tiles_of(max_logits) * TILE;
    size_t hidden = (size_t)padded(c->hidden), half = (size_t)c->rotary_dims / 2;
    struct { float **field; size_t rows, columns; } table[] = {
        { &w.x, rows, hidden }, { &w.normed1, rows, hidden }, { &w.normed2, rows, hidden },
        { &w.attended, rows, (size_t)padded(c->q) }, { &w.qkv, rows, (size_t)padded(c->qkv) },
        { &w.mlp, rows, (size_t)padded(c->intermediate) }, { &w.final, logit_rows, hidden },
        { &w.logits, logit_rows, (size_t)padded(c->vocab) },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        *table[i].field = allocate_raw(table[i].rows, table[i].columns * sizeof(float), 64);
    w.turns = allocate_raw(rows, (half + 1) * sizeof *w.turns, 64);
    w.spans = allocate_raw(rows, (size_t)(c->heads / c->kv_heads / TILE + 1) * sizeof *w.spans, 64);
    w.logit_rows = allocate(logit_rows, sizeof *w.logit_rows);
    w.frequency = allocate(half + 1, sizeof *w.frequency);
    for (size_t i = 0; i < half; i++)          // base ^ (-2 i / dims), Su et al. 2021
        w.frequency[i] = exp_double(-2.0 * (double)i / c->rotary_dims * log_double(c->rotary_base));
    w.scratch = allocate((size_t)pool.threads, sizeof *w.scratch);
    size_t score_tile = (size_t)(c->context / PAGE + 1) * PAGE * TILE, head_tile = (size_t)padded(c->head_size) * TILE;
    for (int i = 0; i < pool.threads; i++) w.scratch[i] = allocate_raw(score_tile + 2 * head_tile, sizeof(float), 64);
    return w;
}

static void work_close(Work *w) {
    void *blocks[] = { w->x, w->normed1, w->normed2, w->attended, w->qkv, w->mlp, w->final, w->logits, w->turns,
                       w->spans, w->logit_rows, w->frequency };
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) free(blocks[i]);
    for (int i = 0; i < pool.threads; i++) free(w->scratch[i]);
    free(w->scratch);
}

// A tile's tokens become rows of x, its positions cosines and sines.
static void embed_piece(void *arg, int tile, int thread) {
    (void)thread;
    Work *w = arg;
    const Config *c = &w->m->c;
    float *x = w->x + tile_at(tile, padded(c->hidden));
    int half = c->rotary_dims / 2;
    for (int r = 0; r < rows_in_tile(w->n, tile); r++) {
        const Row *row = &w->rows[tile * TILE + r];
        const float *embedding = w->m->embed_in + (long)row->token * c->hidden;
        for (int i = 0; i < padded(c->hidden); i += BLOCK) {
            int n = c->hidden - i < 0 ? 0 : c->hidden - i < BLOCK ? c->hidden - i : BLOCK;
            memset(cell(x, r, i), 0, BLOCK * sizeof *x);
            memcpy(cell(x, r, i), embedding + i, (size_t)n * sizeof *x);
        }
        for (int i = 0; i < half; i++)
            w->turns[(tile * TILE + r) * half + i] = turn_by(row->position * w->frequency[i]);
    }
}

static void norm_tile(const Work *w, int tile, const float *weight, const float *bias, float *out) {
    const Config *c = &w->m->c;
    long at = tile_at(tile, padded(c->hidden));
    w->kernels->layer_norm(rows_in_tile(w->n, tile), c->hidden, (float)c->eps, w->x + at, weight, bias, out + at);
}

static void norm2_piece(void *arg, int tile, int thread) {
    (void)thread;
    const Work *w = arg;
    const Layer *l = &w->m->layers[w->layer];
    norm_tile(w, tile, l->norm2, l->norm2_bias, w->normed2);
}

static void norms_piece(void *arg, int tile, int thread) {
    const Work *w = arg;
    const Layer *l = &w->m->layers[w->layer];
    norm_tile(w, tile, l->norm1, l->norm1_bias, w->normed1);
    if (w->m->c.parallel_residual) norm2_piece(arg, tile, thread);
}

// The rows that want logits, gathered into tiles of their own and normed.
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
    w->kernels->layer_norm(rows, c->hidden, (float)c->eps, final, w->m->norm, w->m->norm_bias, final);
}

// A linear layer over all tiles: out = finish(sum of in weights^T). A second term continues the first's chain of sums;
// it is there where the attention's and the MLP's last products go into the same x.
typedef struct { const float *in, *weights, *bias; int inputs; } Term;

typedef struct {
    Term terms[2];
    int n_terms;
    float *out;
    int outputs, columns;      // columns: of out, padded; the outputs may be some of them
    const float *residual;     // NULL, or tiles like out
    bool gelu, row_major;      // row_major: out is [rows][columns] instead of tiles
} Linear;

typedef struct { const Work *w; const Linear *layers; int rows, groups, pieces; } LinearJob;

// A piece multiplies GROUP tiles by CHUNK inputs of a pair of panels at a time, and fetches the next CHUNK meanwhile:
// with 1,024 inputs the whole next pair. (Measured, 16 rows: fetching 128 steps ahead while the first tile was
// multiplied left memory idle during the second, 40 ms a pass; this way 27.) With FEW rows memory alone decides, and the
// CPU's own prefetching keeps it busier (measured: decoding 8% faster).
enum { GROUP = 5, CHUNK = 1024, FEW = 4 };

// Places in memory that are read once a piece is done: CHUNK lines each, or as many as there are inputs, two of which a tile
// can fetch in a chunk while the first tiles fetch the weights. SOON_PAGES: of a sequence's keys and values at most.
// (Measured, 48 sequences at positions 64 to 79: with 3 pages a head's attention takes 4,800 cycles, with 2 5,600.)
enum { PLACES = 2 * GROUP, SOON_PAGES = 3 };
typedef struct { const float *at[PLACES]; int n; } Soon;

static int own_tiles(int tiles) { return (tiles + 3) / 4; }

static Ahead soon_ahead(const Soon *soon, int pair) {
    if (2 * pair >= soon->n) return (Ahead){ soon->at[0], 0, 0, 0 };
    const float *const *at = soon->at + 2 * pair;
    return (Ahead){ at[0], 2 * pair + 1 < soon->n ? at[1] - at[0] : 0, 0, 64 };
}

static int pairs_of(const Linear *l) { return padded(l->outputs) / PAIR; }

static const float *panels_of(const Term *t, int pair) { return t->weights + (long)pair * PAIR * t->inputs; }

// The products of a term with a pair of panels and some tiles, added to c. The pair `next_pair` of `next`, which is due
// then, is fetched during all tiles, or, if there is more to fetch, during the first of them.
static void add_term(const LinearJob *job, const Term *t, int pair, const Term *next, int next_pair, int first_tile,
                     int tiles, const Soon *soon, float (*c)[2 * BLOCK_FLOATS], bool add) {
    int columns = padded(t->inputs), left = job->rows - first_tile * TILE;
    int own = soon->n ? own_tiles(tiles) : tiles, rows = left < own * TILE ? left : own * TILE;
    for (int i = 0; i < t->inputs; i += CHUNK, add = true) {
        int n = t->inputs - i < CHUNK ? t->inputs - i : CHUNK;
        const float *panels = panels_of(t, pair) + (long)i * BLOCK;
        Ahead ahead = { panels + CHUNK * BLOCK, (long)BLOCK * t->inputs, 0, 0 };
        if (i + CHUNK >= t->inputs) ahead = (Ahead){ panels_of(next, next_pair), (long)BLOCK * next->inputs, 0, 0 };
        for (int tile = 0; tile < tiles; tile++) {
            int here = rows_in_tile(job->rows, first_tile + tile);
            ahead.pace = rows <= FEW ? 0 : (64 * here + rows - 1) / rows;     // of the line of each step its share
            if (tile >= own) ahead = soon_ahead(soon, i / CHUNK * (tiles - own) + tile - own);
            job->w->kernels->product(here, n, t->in + tile_at(first_tile + tile, columns) + (long)i * TILE,
                                     (Panels){ panels, (long)BLOCK * t->inputs, 0, 2 }, ahead, c[tile], add);
            ahead.at += n * ahead.pace / (long)sizeof(float);
        }
    }
}

static int tiles_of_piece(const LinearJob *job, int piece) {
    int left = tiles_of(job->rows) - piece % job->groups * GROUP;
    return left < GROUP ? left : GROUP;
}

// A pair of panels times a group of tiles. Pieces that follow one another share their panels.
static void multiply_piece(const LinearJob *job, int piece, const Soon *soon) {
    int pair = piece / job->groups, first_tile = piece % job->groups * GROUP, tiles = tiles_of_piece(job, piece);
    const Linear *l = job->layers;
    for (; pair >= pairs_of(l); l++) pair -= pairs_of(l);

    float c[GROUP][2 * BLOCK_FLOATS] __attribute__((aligned(64)));
    for (int i = 0; i < l->n_terms; i++) {
        bool last = i + 1 == l->n_terms;
        const Term *next = last ? l->terms : l->terms + 1;
        add_term(job, &l->terms[i], pair, next, last ? pair + 1 : pair, first_tile, tiles, soon, c, i > 0);
    }
    const float *bias[2] = { NULL, NULL };
    for (int i = 0; i < l->n_terms; i++)
        if (l->terms[i].bias) bias[i] = l->terms[i].bias + pair * PAIR;
    for (int tile = 0; tile < tiles; tile++) {
        long at = tile_at(first_tile + tile, l->columns) + (long)pair * (l->row_major ? PAIR : 2 * BLOCK_FLOATS);
        job->w->kernels->finish(rows_in_tile(job->rows, first_tile + tile), c[tile], bias[0], bias[1],
                                l->residual ? l->residual + at : NULL, l->gelu, l->out + at,
                                l->row_major ? l->columns : BLOCK, l->row_major ? BLOCK : BLOCK_FLOATS);
    }
}

static void linear_piece(void *arg, int piece, int thread) {
    (void)thread;
    multiply_piece(arg, piece, &(Soon){0});
}

static LinearJob linear_job(const Work *w, const Linear *layers, int n_layers, int rows) {
    LinearJob job = { w, layers, rows, (tiles_of(rows) + GROUP - 1) / GROUP, 0 };
    for (int i = 0; i < n_layers; i++) job.pieces += pairs_of(&layers[i]) * job.groups;
    return job;
}

// A linear layer of one term: all its outputs (from 0 on, n of them), or some, in tiles: `from` and `n` multiples of PAIR.
static Linear outputs_of(Term term, float *out, int columns, int from, int n) {
    term.weights = panels_of(&term, from / PAIR);
    if (term.bias) term.bias += from;
    return (Linear){ .terms = { term }, .n_terms = 1, .out = out + (long)from * TILE, .outputs = n, .columns = columns };
}

static void linear(const Work *w, const Linear *layers, int n_layers, int rows) {
    LinearJob job = linear_job(w, layers, n_layers, rows);
    parallel(job.pieces, linear_piece, &job);
}

// The floats of a kv head in a page: keys first, its values behind them.
static float *kv_head(const Work *w, const Page *page, int head) {
    const Config *c = &w->m->c;
    return page->floats + ((long)w->layer * c->kv_heads + head) * head_floats(c);
}

// Turns the first rotary_dims columns of a head of a row of qkv, in place: pairs (i, i + rotary_dims / 2) by position *
// frequency[i] (the half-split form of GPT-NeoX).
static void turn_head(const Work *w, int row, int first_column) {
    int half = w->m->c.rotary_dims / 2;
    float *tile = w->qkv + tile_at(row / TILE, padded(w->m->c.qkv));
    const Turn *turns = w->turns + row * half;
    for (int i = 0, run; i < half; i += run, turns += run) {
        float *a = cell(tile, row % TILE, first_column + i), *b = cell(tile, row % TILE, first_column + half + i);
        int in_a = BLOCK - (first_column + i) % BLOCK, in_b = BLOCK - (first_column + half + i) % BLOCK;
        run = in_a < in_b ? in_a : in_b;
        if (run > half - i) run = half - i;
        for (int j = 0; j < run; j++) {
            float x = a[j] * turns[j].cosine - b[j] * turns[j].sine;
            b[j] = b[j] * turns[j].cosine + a[j] * turns[j].sine;
            a[j] = x;
        }
    }
}

// Fetches what a span's rows have of a kv head: another core may have computed it (measured, 48 sequences: 1 to 2%).
static void fetch_head(const Work *w, const Span *span, int head) {
    const Config *c = &w->m->c;
    int sharing = c->heads / c->kv_heads, size = c->head_size, n = span->slots / sharing;
    struct { int from, columns; } parts[] = {
        { head * sharing * size, sharing * size }, { c->q + head * size, size }, { c->q + c->kv + head * size, size },
    };
    for (int row = span->first_row; row < span->first_row + n; row++)
        for (int part = 0; part < 3; part++)
            for (int i = 0; i < parts[part].columns; i += BLOCK)
                __builtin_prefetch(cell(w->qkv + tile_at(row / TILE, padded(c->qkv)), row % TILE, parts[part].from + i), 1);
}

// Of the rows of a span, the turned keys and the values of a kv head go to their pages.
static void store_span(const Work *w, const Span *span, int head) {
    const Config *c = &w->m->c;
    int sharing = c->heads / c->kv_heads, size = c->head_size, key_column = c->q + head * size;
    int row = span->first_row + (span->first_slot + sharing - 1) / sharing;
    int end = span->first_row + (span->first_slot + span->slots + sharing - 1) / sharing;
    for (; row < end; row++) {
        float *qkv = w->qkv + tile_at(row / TILE, padded(c->qkv));
        int place = w->rows[row].place, slot = place % PAGE;
        float *page = kv_head(w, w->rows[row].sequence->pages[place / PAGE], head);
        float *values = page + (long)PAGE * size;
        float *keys = page + slot / BLOCK * (long)BLOCK * size + slot % BLOCK;
        turn_head(w, row, key_column);
        w->kernels->scale_columns(size, 1, qkv + row % TILE * BLOCK, key_column + c->kv, BLOCK_FLOATS,
                                  values + slot * BLOCK, 0, PAGE * BLOCK);
        for (int i = 0, run; i < size; i += run) {
            const float *key = cell(qkv, row % TILE, key_column + i);
            run = BLOCK - (key_column + i) % BLOCK;
            if (run > size - i) run = size - i;
            for (int j = 0; j < run; j++) keys[(long)(i + j) * BLOCK] = key[j];
        }
    }
}

// Some kv heads of all spans: [spans][n] pieces.
typedef struct { Work *w; int first, n, fetched; } KvHeads;    // fetched: of each span so many pages are on their way already

// Piece: a kv head of a span.
static void store_piece(void *arg, int piece, int thread) {
    (void)thread;
    const KvHeads *heads = arg;
    const Span *span = &heads->w->spans[piece / heads->n];
    if (!span->alone) store_span(heads->w, span, heads->first + piece % heads->n);
}

// How many of the first n positions lie in page p: 0 to PAGE.
static int in_page(int n, int p) {
    n -= p * PAGE;
    return n < 0 ? 0 : n < PAGE ? n : PAGE;
}

// Piece: a kv head of a span. out = softmax(q k^T / sqrt(head size)) v over positions 0 .. the row's own, in their
// order. A side guess finds those of all other positions where they belong, and its own in its place behind them.
static void attention_piece(void *arg, int piece, int thread) {
    const KvHeads *heads = arg;
    const Work *w = heads->w;
    const Config *c = &w->m->c;
    const Kernels *kernels = w->kernels;
    const Span *span = &w->spans[piece / heads->n];
    int head = heads->first + piece % heads->n;
    bool more = piece % heads->n + 1 < heads->n;       // the next piece is the next head
    int sharing = c->heads / c->kv_heads, size = c->head_size, slots = span->slots;
    float *query = w->scratch[thread], *out = query + (long)padded(size) * TILE, *scores = out + (long)padded(size) * TILE;
    float scale = 1.0f / sqrtf((float)size);
    // Of each slot; column: its query head's first; in_place: how many positions it sees where they belong.
    int row[TILE] = {0}, column[TILE] = {0}, position[TILE] = {0}, in_place[TILE] = {0}, first = INT_MAX;
    if (span->alone && more) fetch_head(w, span, head + 1);
    if (span->alone) store_span(w, span, head);        // what is written here is read by this core
    for (int s = 0; s < slots; s++) {
        row[s] = span->first_row + (span->first_slot + s) / sharing;
        column[s] = (head * sharing + (span->first_slot + s) % sharing) * size;
        position[s] = w->rows[row[s]].position;
        in_place[s] = position[s] + (w->rows[row[s]].place == position[s]);
        first = in_place[s] < first ? in_place[s] : first;
        turn_head(w, row[s], column[s]);
        kernels->scale_columns(size, scale, w->qkv + tile_at(row[s] / TILE, padded(c->qkv)) + row[s] % TILE * BLOCK,
                               column[s], BLOCK_FLOATS, query + s * BLOCK, 0, BLOCK_FLOATS);
    }
    Page **pages = w->rows[span->first_row].sequence->pages;
    int last = w->rows[row[slots - 1]].place, last_page = last / PAGE;
    // A product takes the keys of two pages, of their panels those that hold any. What is fetched ahead, unless it was before:
    // the next two pages' keys, behind the last the first two's values, then the next page's values as far as they are
    // used, and at the end keys of the head that is likely to be this thread's next. (Measured against page by page, and
    // all that a page holds: 48 sequences 0.5 to 2.5% faster up to position 79, 5% at 120 and 220.)
    for (int p = 0; p <= last_page; p += 2) {
        int panels = last / BLOCK + 1 - 2 * p, then = p + 2 <= last_page ? p + 2 : 0;
        const float *keys = kv_head(w, pages[p], head), *next = kv_head(w, pages[then], head);
        long apart = p < last_page ? kv_head(w, pages[p + 1], head) - keys : 0;
        bool one_due = panels == 5;
        Ahead ahead = { .at = then ? next : next + (long)PAGE * size, .stride = one_due ? 0 : (long)BLOCK * size,
                        .next = then < last_page ? kv_head(w, pages[then + 1], head) - next : 0,
                        .pace = then < heads->fetched ? 0 : 64 };
        kernels->product(slots, size, query, (Panels){ keys, (long)BLOCK * size, apart, panels < 4 ? panels : 4 }, ahead,
                         scores + (long)p * 2 * BLOCK_FLOATS, false);
    }
    float sum[TILE];
    for (int s = 0; s < slots; s++) {
        *cell(scores, s, position[s]) = *cell(scores, s, w->rows[row[s]].place);
        sum[s] = kernels->softmax(position[s] + 1, scores + s * BLOCK);
    }

    // Positions that all slots see are summed for all at once; those that only later slots see, slot by slot.
    for (int p = 0; p <= last_page; p++) {
        const float *weights = scores + (long)p * 2 * BLOCK_FLOATS;
        int then = p < last_page ? p + 1 : heads->fetched == 1 && last_page > 0;
        const float *next = p < last_page ? kv_head(w, pages[then], head) + (long)PAGE * size
                          : kv_head(w, pages[then], more ? head + 1 : head);
        int common = in_page(first, p);
        Panels values = { kv_head(w, pages[p], head) + (long)PAGE * size, PAGE * BLOCK, 2 * PAGE * BLOCK, padded(size) / BLOCK };
        int due = p < last_page ? in_page(last + 1, then) : PAGE;
        Ahead ahead = { next, PAGE * BLOCK, 2 * PAGE * BLOCK, then < heads->fetched ? 0 : 64 * due / PAGE };
        if (common > 0) kernels->product(slots, common, weights, values, ahead, out, p > 0);
        for (int s = 0; s < slots && common < PAGE; s++) {
            int place = w->rows[row[s]].place;
            Panels some = values;
            for (int j = common, n; j < in_page(in_place[s], p); j += n) {
                int left = in_page(in_place[s], p) - j;
                n = BLOCK - j % BLOCK < left ? BLOCK - j % BLOCK : left;
                some.at = values.at + j * BLOCK;
                kernels->product(1, n, weights + j / BLOCK * BLOCK_FLOATS + s * BLOCK + j % BLOCK, some, ahead,
                                 out + s * BLOCK, true);
            }
            some.at = values.at + place % PAGE * BLOCK;
            if (place != position[s] && place / PAGE == p)
                kernels->product(1, 1, cell(scores, s, position[s]), some, ahead, out + s * BLOCK, true);
        }
    }
    for (int s = 0; s < slots; s++)
        kernels->scale_columns(size, 1.0f / sum[s], out + s * BLOCK, 0, BLOCK_FLOATS,
                               w->attended + tile_at(row[s] / TILE, padded(c->q)) + row[s] % TILE * BLOCK, column[s],
                               BLOCK_FLOATS);
}

typedef struct { LinearJob linear; KvHeads heads; } BesideJob;

// Piece: one of a linear layer and its share of the attention's, whose keys and values are fetched during the products:
// those wait for the processor, attention for memory. Texts are short, as many sequences mostly are; pages that there is
// no time for are fetched as ever.
static void beside_piece(void *arg, int piece, int thread) {
    BesideJob *job = arg;
    KvHeads heads = job->heads;
    const Work *w = heads.w;
    int sharing = w->m->c.heads / w->m->c.kv_heads;
    long attentions = (long)w->n_spans * heads.n;
    int from = (int)(piece * attentions / job->linear.pieces), to = (int)((piece + 1) * attentions / job->linear.pieces);
    int tiles = tiles_of_piece(&job->linear, piece), room = 2 * (tiles - own_tiles(tiles));
    int inputs = job->linear.layers->terms->inputs, lines = inputs < CHUNK ? inputs : CHUNK;
    Soon soon = {0};
    for (bool full = false; !full && heads.fetched < SOON_PAGES; heads.fetched += !full)
        for (int i = from; i < to && !full; i++) {
            const Span *span = &w->spans[i / heads.n];
            const Row *last = &w->rows[span->first_row + (span->first_slot + span->slots - 1) / sharing];
            if (last->place / PAGE < heads.fetched) continue;
            const float *at = kv_head(w, last->sequence->pages[heads.fetched], heads.first + i % heads.n);
            const float *place = soon.n ? soon.at[soon.n - 1] : NULL;
            bool covered = place && at > place && at + head_floats(&w->m->c) <= place + lines * BLOCK;
            full = !covered && soon.n == room;
            if (!covered && !full) soon.at[soon.n++] = at;
        }
    multiply_piece(&job->linear, piece, &soon);
    for (int i = from; i < to; i++) attention_piece(&heads, i, thread);
}

static void beside(const Linear *layers, int n_layers, KvHeads heads) {
    BesideJob job = { linear_job(heads.w, layers, n_layers, heads.w->n), heads };
    parallel(job.linear.pieces, beside_piece, &job);
}

// Cuts the pass into spans: rows of one sequence, TILE slots at a time.
static void find_spans(Work *w) {
    int sharing = w->m->c.heads / w->m->c.kv_heads;
    w->n_sequences = w->n_spans = 0;
    w->split = false;
    for (int first = 0, end; first < w->n; first = end) {
        for (end = first + 1; end < w->n && w->rows[end].sequence == w->rows[first].sequence; end++) {}
        int slots = (end - first) * sharing;
        for (int slot = 0; slot < slots; slot += TILE)
            w->spans[w->n_spans++] = (Span){ .first_row = first, .first_slot = slot, .alone = slots <= TILE,
                                             .slots = slots - slot < TILE ? slots - slot : TILE };
        if (slots > TILE) w->split = true;
        w->n_sequences++;
    }
}

// From the norms of x to what attention gives, and to the MLP's up-projection if it reads the same x (`up`; NULL: not).
// With many sequences in three steps: the first half of the heads is computed; beside the second half's products stands
// attention of the first, beside the up-projection that of the second. For that the halves must share no pair of panels,
// and there must be pieces enough for all threads. Measured against one after the other, on two cores: 8 sequences 3%
// slower, 12 the same, 16 and 20 4 and 5% faster, 48 5 to 13%.
static void attend(Work *w, const Linear *up) {
    const Config *c = &w->m->c;
    const Layer *l = &w->m->layers[w->layer];
    Term normed = { w->normed1, l->qkv, l->qkv_bias, c->hidden };
    int columns = padded(c->qkv), q = c->q / 2, kv = c->kv / 2, half = c->kv_heads / 2;
    bool apart = c->kv_heads % 2 == 0 && kv % PAIR == 0;
    bool many = up && apart && w->n_sequences > TILE && (q + 2 * kv) / PAIR >= 2 * pool.threads;
    KvHeads heads = { w, 0, c->kv_heads, 0 };
    if (!many) {
        Linear layers[2] = { outputs_of(normed, w->qkv, columns, 0, c->qkv) };
        if (up) layers[1] = *up;
        linear(w, layers, up ? 2 : 1, w->n);
        if (w->split) parallel(w->n_spans * heads.n, store_piece, &heads);
        parallel(w->n_spans * heads.n, attention_piece, &heads);
        return;
    }
    heads.n = 0;
    for (int part = 0; part < 2; part++) {
        Linear layers[3] = { outputs_of(normed, w->qkv, columns, part * q, q),
                             outputs_of(normed, w->qkv, columns, c->q + part * kv, kv),
                             outputs_of(normed, w->qkv, columns, c->q + c->kv + part * kv, kv) };
        beside(layers, 3, heads);
        heads = (KvHeads){ w, part * half, half, 0 };
        if (w->split) parallel(w->n_spans * half, store_piece, &heads);
    }
    beside(up, 1, heads);
}

// Runs n rows, 1 <= n <= max_rows, through the model: writes their keys and values, whose pages the caller has
// reserved, and leaves in w->logits the logits of the rows that want them, in the order of the rows.
static void forward(Work *w, const Row *rows, int n) {
    const Config *c = &w->m->c;
    int tiles = tiles_of(n), hidden = padded(c->hidden);
    w->rows = rows;
    w->n = n;
    find_spans(w);
    parallel(tiles, embed_piece, w);
    for (w->layer = 0; w->layer < c->layers; w->layer++) {
        const Layer *l = &w->m->layers[w->layer];
        Term attended = { w->attended, l->dense, l->dense_bias, c->q };
        Term mlp = { w->mlp, l->down, l->down_bias, c->intermediate };
        Linear up = outputs_of((Term){ w->normed2, l->up, l->up_bias, c->hidden }, w->mlp, padded(c->intermediate), 0,
                               c->intermediate);
        up.gelu = true;
        Linear dense = { .terms = { attended, mlp }, .n_terms = c->parallel_residual ? 2 : 1, .out = w->x,
                         .outputs = c->hidden, .columns = hidden, .residual = w->x };
        parallel(tiles, norms_piece, w);
        attend(w, c->parallel_residual ? &up : NULL);
        linear(w, &dense, 1, n);
        if (!c->parallel_residual) {
            Linear down = outputs_of(mlp, w->x, hidden, 0, c->hidden);
            down.residual = w->x;
            parallel(tiles, norm2_piece, w);
            linear(w, &up, 1, n);
            linear(w, &down, 1, n);
        }
    }
    w->n_logits = 0;
    for (int i = 0; i < n; i++)
        if (rows[i].wants_logits) w->logit_rows[w->n_logits++] = i;
    if (w->n_logits == 0) return;
    parallel(tiles_of(w->n_logits), final_norm_piece, w);
    Linear logits = outputs_of((Term){ w->final, w->m->embed_out, NULL, c->hidden }, w->logits, padded(c->vocab), 0,
                               c->vocab);
    logits.row_major = true;
    linear(w, &logits, 1, w->n_logits);
}

static const float *logits_of(const Work *w, int i) { return w->logits + (long)i * padded(w->m->c.vocab); }

__attribute__((noreturn))
static void die_not_finite(const Model *m) {
    die("%s: the logits are not finite: its weights are damaged or overflow; kl3m --verify checks the file", m->path);
}

// ---- 8. Sampling ----
// Logits in, one token out, in the order of transformers' processors: repetition penalty, temperature, top-k, top-p,
// min-p, draw. Ties go to the lower id everywhere. A draw is a function of the seed, the prompt's tokens, the number
// of the continuation and the position, so nothing else in work can move it. The logits are only read.

typedef struct {
    double temperature, top_p, min_p, penalty;
    long top_k;
} Sampling;

typedef struct { float logit; uint32_t id; double weight; } Candidate;   // weight: probability, up to a factor

// How many maxima `survey` finds.
static int maxima_of(int n) { return (n + BLOCK * BLOCK - 1) / (BLOCK * BLOCK) * BLOCK; }

// What one thread needs to sample: candidates and penalized [vocab], and what survey_logits finds.
typedef struct { const Kernels *kernels; Candidate *candidates; float *penalized, *largest; } SamplingScratch;

static SamplingScratch sampling_open(const Kernels *kernels, int vocab) {
    size_t n = (size_t)vocab, maxima = (size_t)maxima_of(vocab) + (size_t)maxima_of(maxima_of(vocab));
    return (SamplingScratch){ kernels, allocate_raw(n, sizeof(Candidate), 64), allocate_raw(n, sizeof(float), 64),
                              allocate_raw(maxima, sizeof(float), 64) };
}

static void sampling_close(SamplingScratch *s) { free(s->candidates), free(s->penalized), free(s->largest); }

// One look at n logits, so that the rest need not look at each: their maxima, and behind these the maxima's. (Measured: loops
// over the vocabulary, left to the compiler, took 4% of a full batch's time.) False: they are not finite.
static bool survey_logits(const SamplingScratch *s, const float *logits, int n) {
    bool finite = s->kernels->survey(n, logits, s->largest);
    s->kernels->survey(maxima_of(n), s->largest, s->largest + maxima_of(n));
    return finite;
}

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011): a bijection of
// the counter under the key, good enough to be used as a generator without state.
static void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c[4] = { counter[0], counter[1], counter[2], counter[3] }, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        uint32_t next[4] = { (uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1,
                             (uint32_t)a };
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    memcpy(out, c, sizeof c);
}

// A number in [0, 1) of 53 bits: the draw of one position.
static double uniform(uint64_t seed, uint64_t prompt_hash, uint32_t continuation, uint32_t position) {
    uint32_t counter[4] = { position, continuation, (uint32_t)prompt_hash, (uint32_t)(prompt_hash >> 32) };
    uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) }, out[4];
    philox(counter, key, out);
    return (double)(((uint64_t)out[0] << 32 | out[1]) >> 11) * 0x1p-53;
}

// FNV-1a over the ids' bytes, little-endian: prompts with other tokens draw from other streams.
static uint64_t hash_tokens(const uint32_t *ids, int n) {
    uint64_t h = 14695981039346656037u;
    for (int i = 0; i < n; i++)
        for (int byte = 0; byte < 4; byte++) h = (h ^ (ids[i] >> 8 * byte & 255)) * 1099511628211u;
    return h;
}

static bool better(const Candidate *a, const Candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static int by_rank(const void *a, const void *b) { return better(a, b) ? -1 : better(b, a); }

// A candidate joins the k best so far, a heap with the worst at its root, if it is one of them. Returns how many there are.
static int offer(Candidate *heap, int size, long k, Candidate new) {
    int i;
    if (size < k) {                            // a leaf more: up from there
        for (i = size++; i > 0 && better(&heap[(i - 1) / 2], &new); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
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

// The k best of n surveyed logits into heap[k], best first. k of the maxima's maxima reach the k-th best of these, and so
// do the k best logits: with k = 50, some 60 of 32,768.
static int take_top(const float *logits, int n, long k, const float *largest, Candidate *heap) {
    int maxima = maxima_of(n), few = maxima_of(maxima), size = 0;
    float least = -INFINITY;
    if (k <= few) {
        for (int i = 0; i < few; i++) size = offer(heap, size, k, (Candidate){ .logit = largest[maxima + i] });
        least = heap[0].logit;
        size = 0;
    }
    for (int i = 0; i < maxima; i++) {
        if (largest[i] < least) continue;
        int first = i / BLOCK * BLOCK * BLOCK + i % BLOCK;
        for (int id = first; id < first + BLOCK * BLOCK && id < n; id += BLOCK)
            if (logits[id] >= least) size = offer(heap, size, k, (Candidate){ .logit = logits[id], .id = (uint32_t)id });
        if (size == k) least = heap[0].logit;
    }
    qsort(heap, (size_t)size, sizeof *heap, by_rank);
    return size;
}

// transformers' RepetitionPenaltyLogitsProcessor (Keskar et al. 2019): each token that has occurred, once.
static void penalize(const float *logits, int n, const uint32_t *ids, int n_ids, double penalty, float *out) {
    for (int i = 0; i < n_ids; i++)
        if (ids[i] < (uint32_t)n) {
            float x = logits[ids[i]];
            out[ids[i]] = (float)(x < 0 ? x * penalty : x / penalty);
        }
}

// The first of the largest of n surveyed logits.
static uint32_t argmax(const float *logits, int n, const float *largest) {
    int maxima = maxima_of(n), first = 0, id;
    for (int i = 1; i < maxima; i++)
        if (largest[i] > largest[first]) first = i;
    for (id = first / BLOCK * BLOCK * BLOCK; logits[id] != largest[first]; id++) {}
    return (uint32_t)id;
}

// The tokens that may be drawn, with weights that sum to *total: the distribution that transformers would draw from.
// temperature > 0, the logits surveyed. Returns how many, in scratch->candidates.
static int distribution(const Sampling *s, const float *logits, int n, const SamplingScratch *scratch, double *total) {
    Candidate *candidates = scratch->candidates;
    bool all = s->top_k == 0 || s->top_k >= n;
    int count = n;
    if (all)
        for (int i = 0; i < n; i++) candidates[i] = (Candidate){ .logit = logits[i], .id = (uint32_t)i };
    else count = take_top(logits, n, s->top_k, scratch->largest, candidates);
    double largest = all ? logits[argmax(logits, n, scratch->largest)] : candidates[0].logit;
    *total = 0;
    for (int i = 0; i < count; i++)
        *total += candidates[i].weight = exp_double((candidates[i].logit - largest) / s->temperature);

    if (s->top_p < 1) {
        // The nucleus is the shortest list of the likeliest tokens that reaches top_p (Holtzman et al. 2020). Tokens
        // each below (1 - top_p) / count of the total cannot be in it: without them the sort is short.
        double least = (1 - s->top_p) * *total / count, before = 0, reach = s->top_p * *total;
        int kept = 0;
        for (int i = 0; i < count; i++)
            if (candidates[i].weight >= least) candidates[kept++] = candidates[i];
        if (all) qsort(candidates, (size_t)kept, sizeof *candidates, by_rank);
        for (count = 0; count < kept && (count == 0 || before < reach); count++) before += candidates[count].weight;
        *total = before;
    }
    if (s->min_p > 0) {
        int kept = 0;
        *total = 0;
        for (int i = 0; i < count; i++)
            if (candidates[i].weight >= s->min_p) {      // the likeliest has weight 1
                *total += candidates[i].weight;
                candidates[kept++] = candidates[i];
            }
        count = kept;
    }
    return count;
}

// One token for n surveyed logits after the history of the prompt's and the continuation's tokens; TOKENIZER_NONE: the
// penalty makes them overflow.
static uint32_t sample(const Sampling *s, const float *logits, int n, const uint32_t *prompt, int n_prompt,
                       const uint32_t *drawn, int n_drawn, double u, const SamplingScratch *scratch) {
    if (s->penalty != 1) {
        memcpy(scratch->penalized, logits, (size_t)n * sizeof *logits);
        penalize(logits, n, prompt, n_prompt, s->penalty, scratch->penalized);
        penalize(logits, n, drawn, n_drawn, s->penalty, scratch->penalized);
        logits = scratch->penalized;
        if (!survey_logits(scratch, logits, n)) return TOKENIZER_NONE;
    }
    if (s->temperature == 0) return argmax(logits, n, scratch->largest);
    double total;
    int count = distribution(s, logits, n, scratch, &total), drawn_at = 0;
    double target = u * total;
    for (int i = 0; i < count && target >= 0; i++) {       // rounding may leave a rest: then the last that has a weight
        if (scratch->candidates[i].weight > 0) drawn_at = i;
        target -= scratch->candidates[i].weight;
    }
    return scratch->candidates[drawn_at].id;
}

// ---- 9. Drafts ----
// Guesses at the next tokens, from ids alone. For the last 0 to ORDER tokens a table holds which tokens followed them
// most often, in the prompts and in all that was drawn; the model's file may bring one to begin with. A guess becomes a
// row of the pass behind the rows that it follows from, and is kept if the sampler draws it there: it may be wrong, or
// come from a hostile file, but it cannot change a text.

// Measured on 97,000 tokens of licences, at most 11 guesses, 2% of a pass for each: 2.24 tokens in a pass's time with
// ORDER 5 and MOST_SEEN 255, 2.32 with 5 and 31, 2.42 with 8 and 15. What was said last is what will be said next.
enum { ORDER = 8, FOLLOWERS = 2, WAYS = 4, CONTEXTS = 1 << 19, MOST_SEEN = 15, CLASSES = 16, MOST_TRIES = 128 };

// What followed one context; in the model's file it is the same. Four are a cache line.
typedef struct {
    uint32_t check;                    // other bits of the context's hash
    uint8_t seen;                      // how often, of late; 0: the place is free
    uint8_t count[FOLLOWERS], zero;    // of the commonest followers, falling
    uint32_t next[FOLLOWERS];
} Context;
_Static_assert(sizeof(Context) == 16, "as on disk");

typedef struct { uint32_t ids[ORDER]; int n; } Tail;     // the last tokens of a text, the newest first

typedef struct {
    Context *table, *owned;            // [CONTEXTS], WAYS places for each value of the hash; the latter may be NULL
    // How often first and second guesses came true, by how likely the table thought them: it is not trusted.
    double hits[2][CLASSES], tries[2][CLASSES];
} Drafts;

typedef struct { uint32_t token; double chance; } Guess;

static void push(Tail *t, uint32_t token) {
    memmove(t->ids + 1, t->ids, (ORDER - 1) * sizeof *t->ids);
    t->ids[0] = token;
    if (t->n < ORDER) t->n++;
}

// The places of a tail's last 0 to ORDER tokens. One that is not there is made, in place of what was seen least, or is
// NULL.
static void find_contexts(const Drafts *d, const Tail *t, bool make, Context *found[ORDER + 1]) {
    uint64_t hash = 0;
    for (int order = 0; order <= ORDER; order++) {
        found[order] = NULL;
        if (order > t->n) continue;
        if (order > 0) hash = (hash ^ (t->ids[order - 1] + 1)) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
        Context *set = d->table + (hash & (CONTEXTS / WAYS - 1)) * WAYS, *least = set;
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

// One token more has followed a context. One that is not among its followers takes a step of the last one's away, and
// then its place (Misra and Gries, "Finding repeated elements", 1982).
static void add_follower(Context *c, uint32_t token) {
    if (c->seen >= MOST_SEEN) {
        c->seen /= 2;
        for (int i = 0; i < FOLLOWERS; i++) c->count[i] /= 2;
    }
    c->seen++;
    int i = 0;
    while (i < FOLLOWERS - 1 && c->count[i] && c->next[i] != token) i++;
    if (c->count[i] && c->next[i] != token) c->count[i]--;
    else {
        c->next[i] = token;
        c->count[i]++;
        for (; i > 0 && c->count[i] > c->count[i - 1]; i--) {
            uint8_t count = c->count[i];
            c->count[i] = c->count[i - 1], c->count[i - 1] = count;
            c->next[i] = c->next[i - 1], c->next[i - 1] = token;
        }
    }
}

// A text has grown by a token.
static void learn(const Drafts *d, Tail *t, uint32_t token) {
    Context *found[ORDER + 1];
    find_contexts(d, t, true, found);
    for (int order = 0; order <= ORDER && found[order]; order++) add_follower(found[order], token);
    push(t, token);
}

// The two tokens that are likeliest to follow, and how likely the table thinks them: what it saw after a longer context
// counts for as many tokens as it saw there, what a shorter one says for one more (as in Dirichlet smoothing; MacKay and
// Peto 1995). One that is not there has chance 0.
static void likeliest(const Drafts *d, const Tail *t, Guess best[2]) {
    Context *found[ORDER + 1];
    find_contexts(d, t, false, found);
    best[0] = best[1] = (Guess){0};
    for (int from = ORDER; from >= 0; from--)
        for (int i = 0; i < FOLLOWERS && found[from] && found[from]->count[i]; i++) {
            uint32_t next = found[from]->next[i];
            double p = 0;
            for (int order = 0; order <= ORDER; order++) {
                const Context *c = found[order];
                if (c == NULL) continue;
                int count = 0;
                for (int j = 0; j < FOLLOWERS; j++)
                    if (c->count[j] && c->next[j] == next) count = c->count[j];
                p = (count + p) / (c->seen + 1);
            }
            if (p > best[0].chance && next != best[0].token) best[1] = best[0];
            if (p > best[0].chance) best[0] = (Guess){ next, p };
            else if (p > best[1].chance && next != best[0].token) best[1] = (Guess){ next, p };
        }
}

static int class_of(double p) { return p < 1 ? (int)(p * CLASSES) : CLASSES - 1; }

// Two guesses at the next token, with the probability that they come true, 0 if there is none.
static void propose(const Drafts *d, const Tail *t, Guess guess[2]) {
    likeliest(d, t, guess);
    for (int i = 0; i < 2; i++) {
        int class = class_of(guess[i].chance);
        if (guess[i].chance > 0) guess[i].chance = d->hits[i][class] / d->tries[i][class];
    }
}

// A token was drawn: what would have been guessed is held against it, whether or not it was. The last MOST_TRIES or so
// of a class count.
static void judge(Drafts *d, const Tail *t, uint32_t token) {
    Guess guess[2];
    likeliest(d, t, guess);
    for (int i = 0; i < 2; i++) {
        if (guess[i].chance == 0) continue;
        int class = class_of(guess[i].chance);
        d->hits[i][class] += guess[i].token == token;
        if (++d->tries[i][class] < MOST_TRIES) continue;
        d->hits[i][class] /= 2;
        d->tries[i][class] /= 2;
    }
}

// The table of the model's file, if it brings one, or an empty one (so too if m is NULL). What is learnt stays in this
// process's memory.
static Drafts drafts_open(const Model *m) {
    size_t size = CONTEXTS * sizeof(Context), page = (size_t)sysconf(_SC_PAGESIZE);
    Drafts d = {0};
    const Section *s = m ? seek_section(m, "guesses") : NULL;
    if (s) {
        if (s->type != TYPE_BYTES || s->size != size)
            die("%s: the table of guesses has %llu bytes, expected %zu; make it again with --learn, or run without it: "
                "--no-speculation", m->path, (unsigned long long)s->size, size);
        bool apart = s->offset >= sizeof(FileHeader) + m->n_sections * sizeof *s;      // what is learnt is written here
        for (const Section *o = m->sections; o < m->sections + m->n_sections; o++)
            apart &= o == s || o->offset >= s->offset + size || o->offset + o->size <= s->offset;
        if (!apart)
            die("%s: the table of guesses lies over other sections; export the model again, or run without the table: "
                "--no-speculation", m->path);
        uintptr_t start = (uintptr_t)(m->map + s->offset), first = start / page * page;
        if (mprotect((void *)first, start - first + size, PROT_READ | PROT_WRITE) != 0)
            die("%s: cannot use its table of guesses: %s; --no-speculation runs without it", m->path, strerror(errno));
        d.table = (Context *)start;
    } else d.table = d.owned = allocate_lazily(size);
    for (int i = 0; i < 2; i++)                // until it is known better, the table is believed
        for (int class = 0; class < CLASSES; class++) {
            d.tries[i][class] = MOST_TRIES / 64.0;
            d.hits[i][class] = d.tries[i][class] * (class + 0.5) / CLASSES;
        }
    return d;
}

static void drafts_close(Drafts *d) {
    if (d->owned) munmap(d->owned, CONTEXTS * sizeof(Context));
}

// ---- 10. Scheduling ----
// Requests come from a source, are run some at a time, and go to a sink in the order they came. Each pass holds for
// every continuation in work the row of its last token and guesses behind it, and of prompts being prefilled as many
// rows as there is room for. What is in a pass
// never changes what comes out of it, so this room is free to choose.

// Guesses for one continuation at most (its rows are one tile), and in one pass.
enum { GUESSES = TILE - 1, PASS_GUESSES = 48 };

typedef enum { UNDECIDED, BY_EOS, BY_LENGTH, BY_STOP } Reason;

typedef struct Request Request;

// Guesses of a continuation in the next pass: a chain, which stands behind its ids, and side guesses, each in place of a
// guess of the chain and with nothing behind it. A chance is the probability that all up to there comes true.
typedef struct {
    int guesses, sides;
    Tail tail;                 // of the text and the chain
    Guess next[2];             // at the chain's end: the guess that may join it, and the second best
    Guess second[GUESSES];     // the second best in place of each guess; chance 0: it is a side guess already, or none
    struct { int instead; uint32_t token; } side[GUESSES];
} Draft;

typedef struct {
    Request *request;
    uint32_t number;           // among the request's continuations
    Sequence sequence;
    uint32_t *ids;             // [n] drawn so far, and the chain of guesses; room for the limit
    int n;
    Reason reason;
    Bytes text;                // what they decode to, cut before a stop text
    Tail tail;
    Draft *draft;              // while it runs
} Continuation;

struct Request {
    Request *next;
    long line;                 // of the input, from 1; 0: the prompt was not a line
    long number;               // in the order of the input
    size_t record_size;        // bytes that it took there
    char *prompt;              // NULL: the line was no JSON
    size_t prompt_size;
    Bytes others;              // members that came with it
    uint32_t *ids;             // [n] what the model is given
    int n;
    int given;                 // prompt tokens: n, or 0 for an empty prompt, which starts from <|start|>
    int limit;                 // new tokens at most
    uint64_t seed, hash;
    char *error;               // why it cannot be run, or NULL
    bool admitted, prefilled, done;      // admitted: pages are set aside for it
    Sequence prefix;           // the prompt's keys and values; at last only its whole pages
    float *logits;             // [vocab] after the prompt, from its prefill to its last continuation's start
    int rows;                  // in the next pass
    Continuation *continuations;
    int started, finished, delivered;    // of the continuations
    int ends;                  // continuations whose pages behind the prompt's whole ones are set aside
    Tail tail;                 // of the prompt
    const uint32_t *forced;    // NULL, or [limit]: what --replay has drawn
};

// The whole pages of a prompt that has been run: the next prompts may begin alike.
typedef struct { uint32_t *ids; Sequence sequence; long used; } Beginning;

// How long a pass takes by its rows: a line through those that were run, the last ones above all.
typedef struct { double rows, seconds, variance, covariance; } Pace;

enum { BEGINNINGS = 4 };      // few: their pages could be used again, and new ones cost time (measured: 1 ms)

typedef struct {
    const Model *m;
    Sampling sampling;
    int returns, batch, max_rows;
    long kv_memory;            // bytes
    bool ignore_eos, no_special;
    const Bytes *stops;
    int n_stops;
    // The next request, or NULL: there is none now (*ended: none ever again). `wait`: nothing else is to be done.
    Request *(*source)(void *arg, bool wait, bool *ended);
    void (*progress)(void *arg, Continuation *c);    // a continuation has grown
    void (*finished)(void *arg, Continuation *c);    // one is done; in the order of the input and of their numbers
    void (*sink)(void *arg, Request *r);             // a request is done, or cannot be run; in the order of the input
    void *arg;

    KVCache kv;
    Work work;
    SamplingScratch *scratch;  // [threads]
    Request *first, *last;     // in work or waiting for one before them, in the order of the input
    Request *next;             // the last one read, if there are not yet pages for it
    int waiting, in_work;      // requests in the list; prompts being prefilled and continuations running
    long set_aside, ceiling;   // pages: those that admitted requests may come to use, and all that there may be
    Beginning beginnings[BEGINNINGS];
    long uses;                 // of beginnings, counted
    Request **prefills;        // [batch] scratch of plan_prefill
    Continuation **running;    // [batch]
    int n_running;
    Row *rows;                 // [max_rows]
    Drafts *drafts;            // NULL: one token a pass
    Pace pace;
    long requests, passes, rows_run, tokens_drawn;     // so far
    long draws, decoded, guesses;      // continuations summed up over the passes, tokens that they drew there, guesses
    double first_token;        // when it was drawn, in seconds()
} Scheduler;

// Tokens to be drawn: from the logits of a continuation's last token, and of guesses while the draw before picks them.
typedef struct {
    Continuation *c;
    const float *logits;       // [rows][padded vocab]
    int rows, drawn;           // rows: of the chain; those of side guesses stand behind them
    bool finite;               // the logits
    bool overflow;             // they are no longer after the penalty
    bool aside;                // a side guess came true
} Draw;
typedef struct { Scheduler *s; Draw *draws; } DrawJob;

// The tokens go to ids[n ..] of the continuation: the guesses that came true, and the first that was not guessed.
static void draw_piece(void *arg, int piece, int thread) {
    const DrawJob *job = arg;
    Scheduler *s = job->s;
    Draw *d = &job->draws[piece];
    Continuation *c = d->c;
    const Request *r = c->request;
    int vocab = s->m->c.vocab;
    d->finite = true;
    for (int row = 0, next; row >= 0; row = next) {
        const float *logits = d->logits + (long)row * padded(vocab);
        int n = c->n + d->drawn;
        d->finite = survey_logits(&s->scratch[thread], logits, vocab);
        if (!d->finite) return;
        double u = uniform(r->seed, r->hash, c->number, (uint32_t)n);
        uint32_t token = sample(&s->sampling, logits, vocab, r->ids, r->n, c->ids, n, u, &s->scratch[thread]);
        d->overflow = token == TOKENIZER_NONE;
        if (d->overflow) return;
        if (r->forced) token = r->forced[n];
        next = row + 1 < d->rows && c->ids[n] == token ? row + 1 : -1;
        for (int i = 0; i < c->draft->sides && row < d->rows && next < 0; i++)
            if (c->draft->side[i].instead == row && c->draft->side[i].token == token) next = d->rows + i;
        d->aside |= next >= d->rows;
        d->drawn++;
        c->ids[n] = token;
    }
}

// Where the first stop text ends that became whole with the bytes from `old` on; *length is its length. Among those
// that end at the same byte the longest counts. Nothing depends on where tokens end.
static bool find_stop(const Scheduler *s, const Bytes *text, size_t old, size_t *end, size_t *length) {
    *length = 0;
    for (*end = old + 1; *end <= text->size; ++*end) {
        for (int i = 0; i < s->n_stops; i++) {
            const Bytes *stop = &s->stops[i];
            if (stop->size <= *end && stop->size > *length &&
                memcmp(text->data + *end - stop->size, stop->data, stop->size) == 0) *length = stop->size;
        }
        if (*length) return true;
    }
    return false;
}

// How many bytes at the end of a text might yet become part of a stop text: they are not shown before it is known.
static size_t held_for_stop(const Scheduler *s, const Bytes *text) {
    size_t held = 0;
    for (int i = 0; i < s->n_stops; i++)
        for (size_t n = s->stops[i].size - 1; n > held; n--)
            if (n <= text->size && memcmp(text->data + text->size - n, s->stops[i].data, n) == 0) {
                held = n;
                break;
            }
    return held;
}

// A drawn token joins its continuation, which it may end.
static void accept_token(Scheduler *s, Continuation *c, uint32_t token) {
    c->ids[c->n++] = token;
    s->tokens_drawn++;
    if (s->drafts) {
        judge(s->drafts, &c->tail, token);
        learn(s->drafts, &c->tail, token);
    }
    size_t old = c->text.size, n, end;
    const char *text = tokenizer_text(&s->m->tokenizer, token, &n);
    if (!tokenizer_is_special(&s->m->tokenizer, token)) append(&c->text, text, n);
    if (find_stop(s, &c->text, old, &end, &n)) {
        c->reason = BY_STOP;
        c->text.size = end - n;
    }
    else if (token == s->m->end_token && !s->ignore_eos) c->reason = BY_EOS;
    else if (c->n >= c->request->limit) c->reason = BY_LENGTH;
}

static int pages_for(int positions) { return (positions + PAGE - 1) / PAGE; }

// Pages of a continuation behind the prompt's whole pages, which all its continuations share.
static int end_pages(const Request *r) { return pages_for(r->n + r->limit) - r->n / PAGE; }

static void forget(Scheduler *s, Beginning *b) {
    kv_free(&s->kv, &b->sequence);
    free(b->ids);
    *b = (Beginning){0};
}

// Sets pages aside, if need be those of the beginnings that were used longest ago. False: there are not enough now.
static bool set_aside(Scheduler *s, int pages) {
    if (s->set_aside + pages > s->ceiling) return false;
    for (;;) {
        long kept = 0;
        Beginning *oldest = NULL;
        for (Beginning *b = s->beginnings; b < s->beginnings + BEGINNINGS; b++) {
            kept += b->sequence.n_pages;
            if (b->ids && (oldest == NULL || b->used < oldest->used)) oldest = b;
        }
        if (oldest == NULL || s->set_aside + pages + kept <= s->ceiling) break;
        forget(s, oldest);
    }
    s->set_aside += pages;
    return true;
}

// Positions at the beginning of two prompts, whole pages of them, that hold the same tokens.
static int common_beginning(const uint32_t *a, const uint32_t *b, int most) {
    int n = 0;
    while (n < most && memcmp(a + n, b + n, PAGE * sizeof *a) == 0) n += PAGE;
    return n;
}

// Takes over what another prompt that begins alike has computed, or will soon have: then it is worth to wait, and the
// answer is false. Only prompts before this one count, so the first that is not prefilled never waits.
static bool share_beginning(Scheduler *s, Request *r) {
    int most = (r->n - 1) / PAGE * PAGE, best = 0;     // one row must be left, for its logits
    const Sequence *from = NULL;
    Beginning *known = NULL;
    for (const Request *q = s->first; q != r; q = q->next) {
        if (!q->admitted || q->done) continue;
        int common = common_beginning(q->ids, r->ids, q->n < most ? q->n / PAGE * PAGE : most);
        if (common > best) best = common, from = &q->prefix;
    }
    for (Beginning *b = s->beginnings; b < s->beginnings + BEGINNINGS; b++) {
        int common = common_beginning(b->ids, r->ids, b->sequence.length < most ? b->sequence.length : most);
        if (common > 0 && common >= best) best = common, from = &b->sequence, known = b;
    }
    if (best == 0) return true;
    if (from->length < best) return false;
    r->prefix = kv_fork(from, best);
    if (known) known->used = ++s->uses;
    return true;
}

// Keeps a prompt's whole pages for those that may begin alike.
static void remember_beginning(Scheduler *s, Request *r) {
    Beginning *place = s->beginnings;
    for (Beginning *b = s->beginnings; b < s->beginnings + BEGINNINGS; b++) {
        if (b->ids && b->sequence.length >= r->prefix.length &&
            common_beginning(b->ids, r->ids, r->prefix.length) == r->prefix.length) return;     // it is known
        if (b->used < place->used) place = b;
    }
    if (r->prefix.length == 0) return;
    if (place->ids) forget(s, place);
    *place = (Beginning){ .ids = r->ids, .sequence = r->prefix, .used = ++s->uses };
    r->ids = NULL;
    r->prefix = (Sequence){0};
}

static void finish(Scheduler *s, Continuation *c) {
    Request *r = c->request;
    kv_free(&s->kv, &c->sequence);
    free(c->draft);
    c->draft = NULL;
    s->in_work--;
    r->finished++;
    if (r->started < s->returns) return;       // its pages go to the next one
    bool all = r->finished == s->returns;
    int spare = all ? r->ends : 1;
    s->set_aside -= (long)spare * end_pages(r) + (all ? r->n / PAGE + 1 : 0);
    r->ends -= spare;
    if (!all) return;
    r->done = true;
    remember_beginning(s, r);
    kv_free(&s->kv, &r->prefix);
}

// Draws a token for each of n continuations, all at once.
static void draw_all(Scheduler *s, Draw *draws, int n) {
    parallel(n, draw_piece, &(DrawJob){ s, draws });
    if (n > 0 && s->tokens_drawn == 0) s->first_token = seconds();
    for (int i = 0; i < n; i++) {
        Continuation *c = draws[i].c;
        for (int drawn = 0; drawn < draws[i].drawn && c->reason == UNDECIDED; drawn++) accept_token(s, c, c->ids[c->n]);
        if (!draws[i].finite && c->reason == UNDECIDED) die_not_finite(s->m);
        if (draws[i].overflow && c->reason == UNDECIDED)
            die("--repetition-penalty %g makes logits overflow; one nearer to 1 does not", s->sampling.penalty);
        // The last token has not been run yet, and one before it that was guessed aside must be, in its place.
        c->sequence.length = c->request->n + c->n - 1 - draws[i].aside;
        if (c->reason == UNDECIDED) s->running[s->n_running++] = c;
        else finish(s, c);
        s->progress(s->arg, c);
    }
}

// Hands over what is done, up to the first continuation that is not.
static void deliver(Scheduler *s) {
    for (Request *r; (r = s->first) != NULL;) {
        while (!r->error && r->delivered < s->returns && r->continuations[r->delivered].reason != UNDECIDED) {
            Continuation *c = &r->continuations[r->delivered++];
            s->finished(s->arg, c);
            free(c->ids);
            c->ids = NULL;
        }
        if (!r->done) return;
        s->first = r->next;
        if (s->first == NULL) s->last = NULL;
        s->waiting--;
        s->sink(s->arg, r);
    }
}

// Takes a request from the source into the list. False: there is none now, or it must wait for pages.
static bool take_request(Scheduler *s, bool *ended) {
    Request *r = s->next;
    if (r == NULL) {
        r = s->source(s->arg, s->in_work == 0 && s->first == NULL, ended);
        if (r == NULL) return false;
        if (s->last) s->last->next = r;
        else s->first = r;
        s->last = r;
        r->number = s->requests++;
        s->waiting++;
        r->done = r->error || r->limit == 0;
        if (r->error) return true;
        r->continuations = allocate((size_t)s->returns, sizeof *r->continuations);
        for (int i = 0; i < s->returns; i++)
            r->continuations[i] = (Continuation){ .request = r, .number = (uint32_t)i,
                                                  .reason = r->done ? BY_LENGTH : UNDECIDED };
        if (r->done) return true;
    }
    // Its whole pages, the page that its continuations copy, and one continuation, so that it can always go on.
    r->admitted = set_aside(s, r->n / PAGE + 1 + end_pages(r));
    s->next = r->admitted ? NULL : r;
    if (!r->admitted) return false;
    for (int i = 0; s->drafts && i < r->n; i++) learn(s->drafts, &r->tail, r->ids[i]);
    r->ends = 1;
    s->in_work++;                              // its prefill
    return true;
}

// Begins a continuation of a prompt that is prefilled. The last one takes the page over that they copy.
static Draw start_continuation(Scheduler *s, Request *r) {
    Continuation *c = &r->continuations[r->started++];
    c->ids = allocate((size_t)r->limit, sizeof *c->ids);
    append(&c->text, "", 0);                   // so that an empty text is a string too
    c->sequence = kv_fork(&r->prefix, r->n);
    c->tail = r->tail;
    c->draft = allocate(1, sizeof *c->draft);
    if (r->started == s->returns) {
        Sequence whole = kv_fork(&r->prefix, r->n / PAGE * PAGE);
        kv_free(&s->kv, &r->prefix);
        r->prefix = whole;
    }
    s->in_work++;
    return (Draw){ .c = c, .logits = r->logits, .rows = 1 };
}

// May a request's next continuation begin?
static bool may_start(Scheduler *s, Request *r) {
    if (!r->prefilled || r->started == s->returns || s->in_work >= s->batch) return false;
    if (r->started - r->finished < r->ends) return true;
    if (!set_aside(s, end_pages(r))) return false;
    r->ends++;
    return true;
}

// Fills the batch: with continuations of prompts that are prefilled until none is left to begin, and only then with new
// prompts. So no more prompts are held than the batch has places, but for finished ones that wait for one before them.
static void admit(Scheduler *s, Draw *draws, bool *ended) {
    for (int n = 1; n > 0;) {
        n = 0;
        for (Request *r = s->first; r; r = r->next)
            while (may_start(s, r)) draws[n++] = start_continuation(s, r);
        draw_all(s, draws, n);                 // some end with their first token and make room for others
        for (Request *r = s->first; r; r = r->next)
            if (r->logits && r->started == s->returns) {
                free(r->logits);
                r->logits = NULL;
            }
        deliver(s);
    }
    while (!interrupted && !*ended && s->in_work < s->batch && s->waiting < 16 * s->batch && take_request(s, ended))
        deliver(s);
}

static int by_rows_left(const void *a, const void *b) {
    const Request *x = *(Request *const *)a, *y = *(Request *const *)b;
    int left = (x->n - x->prefix.length) - (y->n - y->prefix.length);
    return left ? left : (x->number > y->number) - (x->number < y->number);
}

// Divides `room` rows among the prompts that are being prefilled: half go to the oldest, in their order, so that
// results come early; the rest to those that need the fewest, so that a short prompt does not wait for a long one.
static void plan_prefill(Scheduler *s, int room) {
    int n = 0, half = room / 2;
    for (Request *r = s->first; r; r = r->next) {
        r->rows = 0;
        if (!r->admitted || r->done || r->prefilled) continue;
        if (r->prefix.length == 0 && !share_beginning(s, r)) continue;
        s->prefills[n++] = r;
    }
    for (int pass = 0; pass < 2; pass++) {
        int left = pass ? room : half;
        for (int i = 0; i < n; i++) {
            Request *r = s->prefills[i];
            int need = r->n - r->prefix.length - r->rows, more = need < left ? need : left;
            r->rows += more, left -= more, room -= more;
        }
        qsort(s->prefills, (size_t)n, sizeof *s->prefills, by_rows_left);
    }
}

// What one row more adds to a pass, in seconds. Until passes of several sizes were seen it is thought to cost what it
// does where memory is the limit: little. It never costs nothing: its logits and its draw are work too.
static double row_seconds(const Pace *p) {
    enum { FREE_ROWS = 32, MOST_FREE_ROWS = 48 };
    double usual = p->seconds / (p->rows + FREE_ROWS), most = p->seconds / p->rows;
    double least = p->seconds / (p->rows + MOST_FREE_ROWS);
    return fmin(fmax((p->covariance + usual) / (p->variance + 1), least), most);
}

// What a pass of n rows took becomes part of the pace.
static void measure_pass(Pace *p, int n, double taken) {
    enum { LAST = 32 };        // passes that count
    taken = fmax(taken, 1e-9);                 // a coarse clock may see no time pass
    if (p->rows == 0) *p = (Pace){ .rows = n, .seconds = taken };
    double rows = n - p->rows, expected = p->seconds + rows * row_seconds(p);
    double time = fmin(taken, 1.5 * expected) - p->seconds;        // a pass that was disturbed is no rule
    p->rows += rows / LAST, p->seconds += time / LAST;
    p->variance += (rows * rows - p->variance) / LAST;
    p->covariance += (rows * time - p->covariance) / LAST;
}

// The same as a part of what a pass of n rows takes.
static double row_share(const Pace *p, int n) {
    Pace pace = p->rows > 0 ? *p : (Pace){ .rows = n, .seconds = 1 };
    double row = row_seconds(&pace);
    return row / (pace.seconds + (n - pace.rows) * row);
}

// What may be guessed behind a continuation's chain of guesses, whose chance to come true is given.
static void extend_draft(const Scheduler *s, Draft *d, double chance) {
    propose(s->drafts, &d->tail, d->next);
    for (int i = 0; i < 2; i++) d->next[i].chance *= d->next[i].token < (uint32_t)s->m->c.vocab ? chance : 0;
}

// The tokens of a continuation that have not been run: the last one, and a side guess that came true before it.
static int rows_due(const Continuation *c) { return c->request->n + c->n - c->sequence.length; }

// The likeliest guess that a continuation may still have: the chain's next or one of the second best; NULL: none, since
// its rows fill a tile or no draw would come after it.
static Guess *best_guess(const Continuation *c) {
    Draft *d = c->draft;
    int guesses = d->guesses + d->sides;
    if (rows_due(c) + guesses == TILE || c->n + guesses + 1 >= c->request->limit) return NULL;
    Guess *best = d->next;
    for (int i = 0; i < d->guesses; i++)
        if (d->second[i].chance > best->chance) best = &d->second[i];
    return best;
}

static void add_guess(const Scheduler *s, const Continuation *c, Guess *best) {
    Draft *d = c->draft;
    Guess taken = *best;
    if (best != d->next) {
        d->side[d->sides].instead = (int)(best - d->second);
        d->side[d->sides++].token = taken.token;
        best->chance = 0;
        return;
    }
    d->second[d->guesses] = d->next[1];
    if (s->max_rows < 2 * s->batch) d->second[d->guesses].chance = 0;   // one that comes true takes two rows then
    c->ids[c->n + d->guesses++] = taken.token;
    push(&d->tail, taken.token);
    extend_draft(s, d, taken.chance);
}

// Chooses the guesses of a pass that has n rows without them, which bring so many tokens or take them in: always the
// likeliest, as long as it promises more tokens a second than the pass has before it. Returns how many.
static int plan_guesses(Scheduler *s, int n, double tokens) {
    for (int i = 0; i < s->n_running; i++) {
        Draft *d = s->running[i]->draft;
        d->guesses = d->sides = 0;
        d->tail = s->running[i]->tail;
        if (s->drafts) extend_draft(s, d, 1);
    }
    int guesses = 0, most = s->max_rows - n < PASS_GUESSES ? s->max_rows - n : PASS_GUESSES;
    for (; s->drafts && guesses < most; guesses++) {
        const Continuation *of = NULL;
        Guess *best = NULL;
        for (int i = 0; i < s->n_running; i++) {
            Guess *guess = best_guess(s->running[i]);
            if (guess && (best == NULL || guess->chance > best->chance)) best = guess, of = s->running[i];
        }
        if (best == NULL || !(best->chance > tokens * row_share(&s->pace, n + guesses))) break;
        tokens += best->chance;
        add_guess(s, of, best);
    }
    return guesses;
}

// Of a continuation its rows that are due, its chain of guesses, its side guesses; from row n of the pass on, with the
// logits from n_logits on. Returns what is to be drawn from them.
static Draw add_rows(Scheduler *s, Continuation *c, int *n, int *n_logits) {
    const Request *r = c->request;
    const Draft *guessed = c->draft;
    int from = c->sequence.length, due = rows_due(c), place = from;
    Draw d = { .c = c, .logits = logits_of(&s->work, *n_logits), .rows = 1 + guessed->guesses };
    kv_reserve(&s->kv, &c->sequence, from + due + guessed->guesses + guessed->sides);
    for (; place < from + due + guessed->guesses; place++)
        s->rows[(*n)++] = (Row){ &c->sequence, place, place, c->ids[place - r->n], place >= from + due - 1 };
    for (int i = 0; i < guessed->sides; i++, place++)
        s->rows[(*n)++] = (Row){ &c->sequence, r->n + c->n + guessed->side[i].instead, place, guessed->side[i].token, true };
    *n_logits += d.rows + guessed->sides;
    return d;
}

// The rows of the next pass; *draws get those that will want tokens. Prompts' rows come last.
static int gather(Scheduler *s, Draw *draws, int *n_draws) {
    int due = 0, n_logits = 0, n = 0;
    for (int i = 0; i < s->n_running; i++) due += rows_due(s->running[i]);
    plan_prefill(s, s->max_rows - due);
    for (Request *r = s->first; r; r = r->next) n += r->rows;
    s->guesses += plan_guesses(s, due + n, s->n_running + n);
    n = *n_draws = 0;
    for (int i = 0; i < s->n_running; i++) draws[(*n_draws)++] = add_rows(s, s->running[i], &n, &n_logits);
    for (Request *r = s->first; r; r = r->next) {
        if (r->rows == 0) continue;
        int end = r->prefix.length + r->rows;
        kv_reserve(&s->kv, &r->prefix, end);
        for (; r->prefix.length < end; r->prefix.length++)
            s->rows[n++] = (Row){ &r->prefix, r->prefix.length, r->prefix.length, r->ids[r->prefix.length],
                                  r->prefix.length == r->n - 1 };
    }
    return n;
}

// The rows to make room for: those asked for, or if none were (0) the usual number, but never more than can be used.
static int rows_of_pass(long asked, int usual, long most) {
    long rows = asked == 0 ? usual : asked < MAX_ROWS ? asked : MAX_ROWS;
    return (int)(rows < most ? rows : most);
}

// Runs requests until the source has no more, or a signal comes.
static void schedule(Scheduler *s) {
    size_t vocab = (size_t)s->m->c.vocab;
    if (s->batch == 0) s->batch = USUAL_BATCH;
    // What is allowed is not always used: more rows than this cannot be in a pass, or pay for their memory.
    if (s->batch > MAX_BATCH) s->batch = MAX_BATCH;
    long most = (long)s->batch * s->m->c.context;
    s->max_rows = rows_of_pass(s->max_rows, s->batch > USUAL_ROWS ? s->batch : USUAL_ROWS, most);
    if (s->max_rows < s->batch) s->batch = s->max_rows;
    s->kv = kv_open(&s->m->c);
    s->ceiling = s->kv_memory / page_bytes(&s->kv);
    int most_logits = s->batch + (s->drafts ? PASS_GUESSES : 0);
    s->work = work_open(s->m, s->work.kernels, s->max_rows, most_logits < s->max_rows ? most_logits : s->max_rows);
    s->running = allocate((size_t)s->batch, sizeof *s->running);
    s->prefills = allocate((size_t)s->batch, sizeof *s->prefills);
    s->rows = allocate((size_t)s->max_rows, sizeof *s->rows);
    s->scratch = allocate((size_t)pool.threads, sizeof *s->scratch);
    for (int i = 0; i < pool.threads; i++) s->scratch[i] = sampling_open(s->work.kernels, s->m->c.vocab);
    Draw *draws = allocate((size_t)s->batch, sizeof *draws);

    for (bool ended = false; !interrupted;) {
        admit(s, draws, &ended);
        int n_draws, n = gather(s, draws, &n_draws);
        if (n == 0 && ended && s->first == NULL) break;
        if (n == 0 && s->next && s->in_work == 0 && !interrupted)
            die("a prompt waits for memory that nothing holds: a fault of kl3m");
        if (n == 0) continue;                  // all that was begun ended with its first token
        double start = seconds();
        forward(&s->work, s->rows, n);
        check_reader();
        s->passes++;
        s->rows_run += n;
        for (Request *r = s->first; r; r = r->next)
            if (r->rows > 0 && r->prefix.length == r->n) {
                r->prefilled = true;
                r->logits = allocate_raw(vocab, sizeof(float), 64);
                int i = 0;
                while (s->rows[s->work.logit_rows[i]].sequence != &r->prefix) i++;
                memcpy(r->logits, logits_of(&s->work, i), vocab * sizeof(float));
                s->in_work--;                  // its continuations take places of their own
            }
        bool only_decoding = n_draws > 0 && s->rows[n - 1].sequence == &draws[n_draws - 1].c->sequence;
        s->n_running = 0;
        long before = s->tokens_drawn;
        draw_all(s, draws, n_draws);
        s->draws += n_draws;
        s->decoded += s->tokens_drawn - before;
        if (only_decoding) measure_pass(&s->pace, n, seconds() - start);
        deliver(s);
    }
    free(draws);
    for (int i = 0; i < pool.threads; i++) sampling_close(&s->scratch[i]);
    free(s->scratch);
    for (int i = 0; i < BEGINNINGS; i++) forget(s, &s->beginnings[i]);
    free(s->rows);
    free(s->prefills);
    free(s->running);
    work_close(&s->work);
}

static void request_free(Request *r, int returns, KVCache *kv) {
    for (int i = 0; r->continuations && i < returns; i++) {
        kv_free(kv, &r->continuations[i].sequence);
        free(r->continuations[i].ids);
        free(r->continuations[i].draft);
        free(r->continuations[i].text.data);
    }
    kv_free(kv, &r->prefix);
    free(r->continuations);
    free(r->logits);
    free(r->ids);
    free(r->prompt);
    free(r->others.data);
    free(r->error);
    free(r);
}

// What was not delivered, and all keys and values.
static void scheduler_free(Scheduler *s) {
    for (Request *r; (r = s->first) != NULL;) {
        s->first = r->next;
        request_free(r, s->returns, &s->kv);
    }
    kv_close(&s->kv);
}

// ---- 11. Input ----
// Where prompts come from: records of a file descriptor, read as they are needed, and the escapes in them. Any byte
// may come.

typedef struct {
    int fd;
    const char *name;          // in messages
    char delimiter;            // newline or NUL
    Bytes buffer;
    size_t start, scanned;     // the next record begins at start; there is no delimiter before scanned
    bool marked, ended;        // marked: it began with a byte order mark, which is dropped
    long line;                 // of the last record, from 1
    size_t taken;              // its bytes, its end included
} Records;

// The next record, without its delimiter, valid until the next call. 1: there is one; 0: none yet, and `wait` is
// false or a signal came; -1: no more.
static int next_record(Records *in, bool wait, char **text, size_t *n) {
    for (;;) {
        if (in->line == 0 && !in->marked && byte_order_mark(&in->buffer)) {
            in->start = in->scanned = byte_order_mark(&in->buffer);
            in->marked = true;
        }
        char *end = in->scanned < in->buffer.size
                  ? memchr(in->buffer.data + in->scanned, in->delimiter, in->buffer.size - in->scanned) : NULL;
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

        in->buffer.size -= in->start;
        if (in->start && in->buffer.size) memmove(in->buffer.data, in->buffer.data + in->start, in->buffer.size);
        in->start = 0;
        in->scanned = in->buffer.size;
        if (read_more(in->fd, in->name, &in->buffer) == 0) in->ended = true;
    }
}

static Bytes read_file(const char *name) {
    int fd = open_input(name);
    Bytes b = {0};
    for (ssize_t got = 1; got != 0;) {
        if (!wait_for_input(fd, true)) _exit(interrupted);      // nothing has been begun
        got = read_more(fd, name, &b);
    }
    if (fd != STDIN_FILENO) close(fd);
    size_t mark = byte_order_mark(&b);
    if (mark) memmove(b.data, b.data + mark, b.size -= mark);
    return b;
}

// The value of `digits` hexadecimal digits at s[0 .. n), or -1.
static long hex(const char *s, size_t n, size_t digits) {
    long value = 0;
    if (n < digits) return -1;
    for (size_t i = 0; i < digits; i++) {
        if (!isxdigit((unsigned char)s[i])) return -1;
        value = value * 16 + (isdigit((unsigned char)s[i]) ? s[i] - '0' : tolower((unsigned char)s[i]) - 'a' + 10);
    }
    return value;
}

static size_t put_utf8(char *out, long code) {
    if (code < 0x80) return out[0] = (char)code, 1;
    size_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)((0xF00 >> n & 0xF0) | code);
    return n;
}

// The character of \uHHHH, or of a pair of them, at the beginning of s[0 .. n); *used is the length. Half a pair is
// returned as it is, from 0xD800 to 0xDFFF; -1: there is no such escape.
static long unicode_escape(const char *s, size_t n, size_t *used) {
    long code = n >= 6 && s[0] == '\\' && s[1] == 'u' ? hex(s + 2, n - 2, 4) : -1;
    *used = 6;
    if (code < 0xD800 || code >= 0xDC00 || n < 12 || s[6] != '\\' || s[7] != 'u') return code;
    long low = hex(s + 8, n - 8, 4);
    if (low < 0xDC00 || low >= 0xE000) return code;
    *used = 12;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

// Decodes \n \t \r \\ \" \0 \xHH \uHHHH in place and returns the new length. What is no escape stays as it is.
static size_t unescape(char *s, size_t n) {
    size_t out = 0;
    for (size_t i = 0; i < n;) {
        static const char names[] = "ntr\\\"0", bytes[] = "\n\t\r\\\"\0";
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
            if (code >= 0 && (code < 0xD800 || code >= 0xE000)) {      // half a pair is no character
                out += put_utf8(s + out, code);
                i += used;
                continue;
            }
        }
        s[out++] = s[i++];
    }
    return out;
}

// A line of --jsonl: one JSON value (RFC 8259), strictly: UTF-8, nothing behind it, nested at most MAX_DEPTH deep.
typedef struct {
    const char *start, *at, *end;
    const char *flaw;          // what is wrong at `at`, or NULL
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

// A string; what it says is appended to `out` unless that is NULL.
static bool json_string(Json *j, Bytes *out) {
    if (!json_take(j, '"')) return json_fail(j, "a string was expected");
    while (j->at < j->end && *j->at != '"') {
        static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        char text[4];
        uint32_t code;
        size_t left = (size_t)(j->end - j->at), used = utf8_char(j->at, left, &code), n = used;
        if (code == UINT32_MAX) return json_fail(j, "UTF-8 was expected");
        if (code < 0x20) return json_fail(j, "an escaped control character was expected");
        memcpy(text, j->at, n);
        const char *name = code == '\\' && left > 1 && j->at[1] ? strchr(names, j->at[1]) : NULL;
        if (name) text[0] = meanings[name - names], used = 2;
        else if (code == '\\') {
            long unit = unicode_escape(j->at, left, &used);
            if (unit < 0) return json_fail(j, "a valid escape was expected");
            if (unit >= 0xD800 && unit < 0xE000) return json_fail(j, "a whole pair of surrogates was expected");
            n = put_utf8(text, unit);
        }
        if (out) append(out, text, n);
        j->at += used;
    }
    if (j->at == j->end) return json_fail(j, "the end of the string was expected");
    j->at++;
    return true;
}

static void json_digits(Json *j, int *count) {
    for (*count = 0; j->at < j->end && isdigit((unsigned char)*j->at); ++*count) j->at++;
}

static bool json_number(Json *j) {
    int digits;
    if (*j->at == '-') j->at++;
    const char *first = j->at;
    json_digits(j, &digits);
    if (digits == 0 || (digits > 1 && *first == '0')) return json_fail(j, "a value was expected");
    if (j->at < j->end && *j->at == '.') {
        j->at++;
        json_digits(j, &digits);
        if (digits == 0) return json_fail(j, "a digit was expected");
    }
    if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
        j->at++;
        if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
        json_digits(j, &digits);
        if (digits == 0) return json_fail(j, "a digit was expected");
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
        return json_take(j, end) || json_fail(j, object ? "a comma or } was expected" : "a comma or ] was expected");
    }
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(j->end - j->at) >= n && memcmp(j->at, words[i], n) == 0) return j->at += n, true;
    }
    return json_number(j);
}

// An object with a "prompt" that is a string: appends what it says to `prompt`, and each other member as it is, with a
// comma behind it, to `others`, but for those that the output has of its own. The last of equal names counts. Sound
// JSON keeps its other members, whatever is wrong with its prompt.
static bool json_record(Json *j, Bytes *prompt, Bytes *others) {
    static const char *const ours[] = { "generated_text", "finish_reason", "prompt_tokens", "new_tokens", "seed",
                                        "error" };
    if (!json_value(j, -1)) return false;
    json_skip_space(j);
    if (j->at < j->end) return json_fail(j, "the end of the line was expected");
    j->at = j->start;
    if (!json_take(j, '{')) return json_fail(j, "an object was expected");
    j->flaw = "there is no member \"prompt\"";
    const char *at_fault = j->start;
    for (bool more = !json_take(j, '}'); more; more = json_take(j, ',')) {
        json_skip_space(j);
        const char *member = j->at;
        Bytes name = {0};
        json_string(j, &name);
        json_take(j, ':');
        json_skip_space(j);
        bool is_prompt = name.size == 6 && memcmp(name.data, "prompt", 6) == 0, is_ours = is_prompt;
        for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
            is_ours |= name.size == strlen(ours[i]) && memcmp(name.data, ours[i], name.size) == 0;
        free(name.data);
        if (is_prompt) {
            at_fault = j->at;
            prompt->size = 0;
            j->flaw = *j->at == '"' ? NULL : "the prompt must be a string";
        }
        if (is_prompt && *j->at == '"') json_string(j, prompt);
        else json_value(j, 0);
        if (is_ours) continue;
        append(others, member, (size_t)(j->at - member));
        append_string(others, ", ");
    }
    if (j->flaw) j->at = at_fault;
    return j->flaw == NULL;
}

// What stands where JSON is not as it should be, for a message.
static char *json_found(const Json *j) {
    enum { SHOWN = 24 };
    size_t n = (size_t)(j->end - j->at);
    if (n == 0) return format_string("the end of the line");
    if (n <= SHOWN) return format_string("%.*s", (int)n, j->at);
    return format_string("%.*s...", SHOWN - (int)utf8_unfinished(j->at, SHOWN), j->at);
}

// ---- 12. Output ----
// Text and JSON on standard output. A text goes out whole or, streamed, in whole characters; it is never edited, only
// escaped where a line or a terminal needs it.

typedef enum { PLAIN, LINE, ZERO_ENDED, JSON, MEMBERS } Form;     // MEMBERS: JSON already

static bool terminal;          // is standard output one? Then control characters are shown, not sent

// How many bytes at s[0 .. n), which do not begin a character, one U+FFFD stands for: Unicode's maximal part.
static size_t broken_part(const char *s, size_t n) {
    for (size_t k = n < 3 ? n : 3; k > 1; k--)
        if (utf8_unfinished(s, k) == k) return k;
    return 1;
}

static void append_text(Bytes *out, const char *s, size_t n, Form form) {
    for (size_t length; n > 0; s += length, n -= length) {
        uint32_t code;
        char escape[16] = "";
        length = utf8_char(s, n, &code);
        bool broken = code == UINT32_MAX;
        if (broken) code = (uint8_t)s[0];
        const char *short_names = form == LINE ? "\n\r\t\\" : form == JSON ? "\n\r\t\\\"" : "";
        bool control = code < 0x20 || (code >= 0x7F && code < 0xA0);
        if (broken && form == JSON) {
            length = broken_part(s, n);
            append_string(out, "\xEF\xBF\xBD");
            continue;
        }
        if (code && strchr(short_names, (int)code) && code < 0x80)
            snprintf(escape, sizeof escape, "\\%c", code == '\n' ? 'n' : code == '\r' ? 'r' : code == '\t' ? 't' : (char)code);
        else if (code == 0 && form == LINE) strcpy(escape, "\\0");
        else if (code == 0 && form == ZERO_ENDED) strcpy(escape, "\xEF\xBF\xBD");
        else if ((form == JSON && code < 0x20) || (form >= JSON && terminal && control && code >= 0x7F))
            snprintf(escape, sizeof escape, "\\u%04x", code);
        else if (form < JSON && terminal && (broken || (control && code != '\n' && code != '\t')))
            snprintf(escape, sizeof escape, broken || code < 0x80 ? "\\x%02x" : "\\u%04x", code);
        if (*escape) append_string(out, escape);
        else append(out, s, length);
    }
}

static void append_json(Bytes *out, const char *key, const char *s, size_t n) {
    append_string(out, key);
    append_string(out, "\"");
    append_text(out, s, n, JSON);
    append_string(out, "\"");
}

static void print(Bytes *b) {
    write_all(&standard_output, b->data, b->size);
    free(b->data);
    *b = (Bytes){0};
}

__attribute__((format(printf, 2, 3)))
static void append_format(Bytes *b, const char *format, ...) {
    char s[128];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s, sizeof s, format, arguments);
    va_end(arguments);
    append_string(b, s);
}

// A continuation behind its prompt, joined before it is escaped: a character may begin in the one and end in the other.
static Bytes whole_text(const Continuation *c, bool echo) {
    Bytes text = {0};
    if (echo) append(&text, c->request->prompt, c->request->prompt_size);
    append(&text, c->text.data, c->text.size);
    return text;
}

// {"prompt", "generated_text", "finish_reason", "prompt_tokens", "new_tokens", "seed"} or {"prompt", "error"}, behind
// the members that came with a prompt of --jsonl. A line that is no JSON has the prompt null.
static void append_request_json(Bytes *out, const Request *r, int returns, bool echo) {
    static const char *const reasons[] = { [BY_EOS] = "eos", [BY_LENGTH] = "length", [BY_STOP] = "stop" };
    append_string(out, "{");
    append_text(out, r->others.data, r->others.size, MEMBERS);
    if (r->prompt) append_json(out, "\"prompt\": ", r->prompt, r->prompt_size);
    else append_string(out, "\"prompt\": null");
    if (r->error) append_json(out, ", \"error\": ", r->error, strlen(r->error));
    else {
        append_string(out, ", \"generated_text\": [");
        for (int i = 0; i < returns; i++) {
            Bytes text = whole_text(&r->continuations[i], echo);
            append_json(out, i ? ", " : "", text.data, text.size);
            free(text.data);
        }
        append_string(out, "], \"finish_reason\": [");
        for (int i = 0; i < returns; i++) append_format(out, "%s\"%s\"", i ? ", " : "", reasons[r->continuations[i].reason]);
        append_format(out, "], \"prompt_tokens\": %d, \"new_tokens\": [", r->given);
        for (int i = 0; i < returns; i++) append_format(out, "%s%d", i ? ", " : "", r->continuations[i].n);
        append_format(out, "], \"seed\": %llu", (unsigned long long)r->seed);
    }
    append_string(out, "}\n");
}

// ---- 13. Commands ----
// What the options ask for, one function each. They return the exit status.

typedef struct {
    const char *model, *prompt, *file, *truncate, *logits, *out, *replay;
    const char *stops[MAX_STOPS];
    int n_stops;
    bool no_escape, null, jsonl, ignore_eos, no_echo, no_special, json, tokenize, detokenize, info, verify, bench,
         learn, no_speculation, quiet, verbose, help, version;
    long new_tokens, top_k, returns, seed, threads, batch, rows;   // seed -1: drawn from the system; 0: as usual
    long kv_memory;            // bytes
    long tokens;               // 0: as usual
    double temperature, top_p, min_p, penalty;
} Options;

// Prompts one by one: the one of -p or -f, or the records of standard input.
typedef struct { const Options *o; Records records; bool single, given; char *owned; } Prompts;

static Prompts prompts_open(const Options *o) {
    Prompts p = { .o = o, .single = o->prompt || o->file,
                  .records = { .fd = STDIN_FILENO, .name = "standard input", .delimiter = o->null ? 0 : '\n' } };
    return p;
}

// As next_record, with escapes decoded where they are to be; *line is 0 for a single prompt.
static int next_prompt(Prompts *p, bool wait, char **text, size_t *n, long *line) {
    *line = 0;
    if (p->single) {
        if (p->given) return -1;
        p->given = true;
        Bytes b = {0};
        if (p->o->file) b = read_file(p->o->file);
        else append(&b, p->o->prompt, strlen(p->o->prompt));
        if (p->o->prompt && !p->o->no_escape) b.size = unescape(b.data, b.size);
        *text = p->owned = b.data;
        *n = b.size;
        return 1;
    }
    int got = next_record(&p->records, wait, text, n);
    if (got == 1 && !p->o->no_escape && !p->o->null && !p->o->jsonl) *n = unescape(*text, *n);
    *line = p->records.line;
    return got;
}

static void prompts_close(Prompts *p) {
    free(p->owned);
    free(p->records.buffer.data);
}

// A text's ids, into ids[], which has room for n. Returns how many.
static size_t encode(Model *m, const Options *o, const char *text, size_t n, uint32_t *ids) {
    ptrdiff_t count = tokenizer_encode(&m->tokenizer, text, n, o->no_special, ids);
    if (count < 0) die("out of memory for a prompt of %zu bytes", n);
    return (size_t)count;
}

// The ids that the model is given for a text, in r: cut as --truncate says, <|start|> for an empty one. A text that
// cannot be run leaves its reason in r->error.
static void give_tokens(Request *r, Model *m, const Options *o, long new_tokens) {
    r->ids = allocate(r->prompt_size + 1, sizeof *r->ids);
    size_t count = encode(m, o, r->prompt, r->prompt_size, r->ids);
    size_t context = (size_t)m->c.context, most = new_tokens > 0 ? context - 1 : context;
    size_t keep = o->truncate ? context - (size_t)(new_tokens < m->c.context ? new_tokens : m->c.context) : most;
    if (count == 0 && m->start_token == TOKENIZER_NONE) {
        r->error = format_string("the prompt is empty and the model has no <|start|> token; give a prompt");
        return;
    }
    if (count == 0) r->ids[0] = m->start_token;
    if (o->truncate && keep == 0 && count > 0)
        r->error = format_string("%ld new tokens leave no place for a prompt in the context of %zu; a smaller -n does",
                                 new_tokens, context);
    else if (o->truncate && count > keep) {
        if (strcmp(o->truncate, "left") == 0) memmove(r->ids, r->ids + count - keep, keep * sizeof *r->ids);
        count = keep;
    } else if (count > most || most == 0)
        r->error = format_string("the prompt has %zu tokens, the context holds %zu%s; shorten it, or cut it with "
                                 "--truncate left", count, context, new_tokens > 0 ? ", new ones included" : "");
    if (r->error) return;
    r->given = (int)count;
    r->n = count > 0 ? (int)count : 1;
    KVCache kv = kv_open(&m->c);
    long tokens = r->n + new_tokens < m->c.context ? r->n + new_tokens : m->c.context;
    double need = (double)(pages_for((int)tokens) + 1) * (double)page_bytes(&kv);
    if ((new_tokens > 0 || o->logits) && need > (double)o->kv_memory)
        r->error = format_string("the prompt%s need%s %.1f MB of keys and values, --kv-memory allows %.1f; %sa larger "
                                 "--kv-memory does", o->logits ? "" : " and its new tokens", o->logits ? "s" : "",
                                 need * 1e-6, (double)o->kv_memory * 1e-6, o->logits ? "" : "a smaller -n or ");
}

// Everything `generate` knows; the scheduler's callbacks get it.
typedef struct {
    const Options *o;
    Model *m;
    Scheduler s;
    Prompts prompts;
    bool stream;               // one prompt, one continuation: shown as it grows
    size_t shown;              // bytes of the continuation
    bool some_failed;
    bool counts;               // shown while it runs: prompts done, tokens a second, time left
    double started, counted;   // seconds(): when it began, when that was shown last
    long done;                 // prompts
    double size, done_size;    // bytes of the input, 0 if nobody knows; of the prompts that are done
} Generation;

static void clear_counts(Generation *g) {
    if (g->counted > 0) show_status("%s", "");
    g->counted = 0;
}

// Five times a second.
static void show_counts(Generation *g) {
    double now = seconds(), taken = now - g->started;
    if (!g->counts || taken < 0.5 || now - g->counted < 0.2) return;
    char left[32] = "";
    if (g->size > 0 && g->done_size > 0) {
        double rest = fmax(taken * (g->size - g->done_size) / g->done_size, 0);    // a file may grow meanwhile
        snprintf(left, sizeof left, ", %.0f:%02.0f left", floor(rest / 60), floor(fmod(rest, 60)));
    }
    show_status("kl3m: %ld prompt%s, %.0f tokens/s%s", g->done, g->done == 1 ? "" : "s",
                (double)g->s.tokens_drawn / taken, left);
    g->counted = now;
}

static uint64_t system_seed(void) { return system_random() >> 11; }

static Request *read_request(void *arg, bool wait, bool *ended) {
    Generation *g = arg;
    char *text;
    size_t n;
    long line;
    int got = next_prompt(&g->prompts, wait, &text, &n, &line);
    if (got < 0) *ended = true;
    if (got < 1) return NULL;
    Request *r = allocate(1, sizeof *r);
    Bytes prompt = {0};
    r->line = line;
    r->record_size = g->prompts.records.taken;
    append(&prompt, text, g->o->jsonl ? 0 : n);
    Json record = { text, text, text + n, NULL };
    if (g->o->jsonl && !json_record(&record, &prompt, &r->others)) {
        free(prompt.data);
        char *found = json_found(&record);
        r->error = format_string("no prompt in JSON: at byte %td %s; found %s", record.at - record.start, record.flaw,
                                 found);
        free(found);
        return r;
    }
    r->prompt = prompt.data;
    r->prompt_size = prompt.size;
    give_tokens(r, g->m, g->o, g->o->new_tokens);
    long room = g->m->c.context - r->n;
    r->limit = (int)(g->o->new_tokens < room ? g->o->new_tokens : room);
    r->seed = g->o->seed >= 0 ? (uint64_t)g->o->seed : system_seed();
    r->hash = hash_tokens(r->ids, r->given);
    if (g->stream && !r->error && !g->o->no_echo) {
        Bytes out = {0};
        append_text(&out, r->prompt, r->prompt_size, g->o->null ? ZERO_ENDED : PLAIN);
        print(&out);
        flush_stdout();
    }
    return r;
}

// Shows what is certain of a streamed continuation: no stop text can begin in it, and its characters are whole.
static void show_progress(void *arg, Continuation *c) {
    Generation *g = arg;
    show_counts(g);
    if (!g->stream) return;
    size_t end = c->text.size;
    if (c->reason == UNDECIDED) {
        end -= held_for_stop(&g->s, &c->text);
        end -= utf8_unfinished(c->text.data, end);
    }
    if (end <= g->shown) return;
    Bytes out = {0};
    append_text(&out, c->text.data + g->shown, end - g->shown, g->o->null ? ZERO_ENDED : PLAIN);
    g->shown = end;
    print(&out);
    flush_stdout();
}

// A continuation's line, at once: its text need not be kept, however many there are.
static void show_line(void *arg, Continuation *c) {
    const Generation *g = arg;
    if (g->o->json) return;
    Bytes out = {0};
    if (!g->stream) {
        Bytes text = whole_text(c, !g->o->no_echo);
        append_text(&out, text.data, text.size, g->o->null ? ZERO_ENDED : LINE);
        free(text.data);
    }
    append(&out, g->o->null ? "" : "\n", 1);
    print(&out);
    flush_stdout();
    free(c->text.data);
    c->text = (Bytes){0};
}

static void show_request(void *arg, Request *r) {
    Generation *g = arg;
    const Options *o = g->o;
    Bytes out = {0};
    char where[32] = "";
    if (r->line) snprintf(where, sizeof where, "line %ld: ", r->line);
    g->done++;
    g->done_size += (double)r->record_size;
    if (r->error || o->verbose) clear_counts(g);
    if (r->error) {
        g->some_failed = true;
        message("%s%s", where, r->error);
    } else if (o->verbose) message("%sseed %llu", where, (unsigned long long)r->seed);
    if (o->json) append_request_json(&out, r, g->s.returns, !o->no_echo);
    else for (; r->delivered < g->s.returns; r->delivered++) append(&out, o->null ? "" : "\n", 1);   // their places
    print(&out);
    flush_stdout();
    request_free(r, g->s.returns, &g->s.kv);
}

// After a signal: what is finished is printed, and an empty place for what stands unfinished before it.
static void show_interrupted(Generation *g) {
    const Scheduler *s = &g->s;
    Request *end = s->first;
    int last = 0;              // of the last request to be shown, continuations up to the last one that is finished
    for (Request *r = s->first; r; r = r->next) {
        int finished = r->done || g->stream ? s->returns : 0;
        for (int i = r->delivered; !g->o->json && !r->error && i < s->returns; i++)
            if (r->continuations[i].reason != UNDECIDED) finished = i + 1;
        if (finished > 0) end = r->next, last = finished;
    }
    while (s->first != end) {
        Request *r = s->first;
        g->s.first = r->next;
        if (!r->done && g->o->json) r->error = format_string("interrupted");
        int places = r->next == end ? last : s->returns;
        for (; !g->o->json && !r->error && !g->stream && r->delivered < places; r->delivered++) {
            Continuation *c = &r->continuations[r->delivered];
            if (c->reason == UNDECIDED) write_all(&standard_output, g->o->null ? "" : "\n", 1);
            else show_line(g, c);
        }
        if (!r->error && !g->stream) r->delivered = s->returns;
        show_request(g, r);
    }
}

static Scheduler new_scheduler(const Options *o, const Model *m, const Kernels *kernels) {
    return (Scheduler){
        .m = m, .sampling = { o->temperature, o->top_p, o->min_p, o->penalty, o->top_k }, .returns = (int)o->returns,
        .batch = (int)o->batch, .max_rows = (int)o->rows, .kv_memory = o->kv_memory, .ignore_eos = o->ignore_eos,
        .work.kernels = kernels,
    };
}

static int generate(const Options *o, Model *m, const Kernels *kernels) {
    Bytes stops[MAX_STOPS] = {{0}};
    for (int i = 0; i < o->n_stops; i++) {
        append_string(&stops[i], o->stops[i]);
        if (!o->no_escape) stops[i].size = unescape(stops[i].data, stops[i].size);
    }
    Generation g = { .o = o, .m = m, .s = new_scheduler(o, m, kernels), .prompts = prompts_open(o),
                     .stream = (o->prompt || o->file) && o->returns == 1 && !o->json };
    g.s.stops = stops, g.s.n_stops = o->n_stops;
    g.s.source = read_request, g.s.progress = show_progress, g.s.finished = show_line, g.s.sink = show_request;
    g.s.arg = &g;
    Drafts drafts;
    if (!o->no_speculation) {
        drafts = drafts_open(m);
        g.s.drafts = &drafts;
    }
    struct stat input;
    bool lines = !o->prompt && !o->file;
    g.counts = lines && !o->quiet && isatty(STDERR_FILENO) && !isatty(STDOUT_FILENO);
    if (lines && fstat(STDIN_FILENO, &input) == 0 && S_ISREG(input.st_mode))
        g.size = (double)(input.st_size - lseek(STDIN_FILENO, 0, SEEK_CUR));
    double start = g.started = seconds();
    schedule(&g.s);
    clear_counts(&g);
    if (interrupted) show_interrupted(&g);
    double end = seconds();
    if (o->verbose) {
        message("%ld passes, %ld rows, %ld new tokens in %.3f s, %.1f tokens/s, %s, %d threads",
                g.s.passes, g.s.rows_run, g.s.tokens_drawn, end - start, (double)g.s.tokens_drawn / (end - start),
                kernels->name, pool.threads);
        message("%.1f of %.1f MB for keys and values",
                (double)g.s.kv.pages * (double)page_bytes(&g.s.kv) * 1e-6, (double)o->kv_memory * 1e-6);
        if (g.s.drafts && g.s.draws > 0)
            message("%.2f tokens a pass, %ld of %ld guesses came true",
                    (double)g.s.decoded / (double)g.s.draws, g.s.decoded - g.s.draws, g.s.guesses);
        if (g.s.tokens_drawn > 1)
            message("first token after %.3f s, %ld more at %.2f tokens/s", g.s.first_token - start,
                    g.s.tokens_drawn - 1, (double)(g.s.tokens_drawn - 1) / (end - g.s.first_token));
    }
    scheduler_free(&g.s);
    if (g.s.drafts) drafts_close(g.s.drafts);
    for (int i = 0; i < o->n_stops; i++) free(stops[i].data);
    prompts_close(&g.prompts);
    return interrupted ? interrupted : g.some_failed ? SOME_FAILED : OK;
}

// Ids as digits and spaces, by hand and into one buffer: printf, or an allocation for each line, would take longer
// than the encoding.
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

static int tokenize(const Options *o, Model *m) {
    Prompts prompts = prompts_open(o);
    Bytes out = {0};
    uint32_t *ids = NULL;
    size_t room = 0, n;
    char *text;
    long line;
    while (!interrupted && next_prompt(&prompts, true, &text, &n, &line) == 1) {
        ids = grow(ids, &room, (n + 1) * sizeof *ids);
        out.size = 0;
        append_ids(&out, ids, encode(m, o, text, n, ids));
        write_all(&standard_output, out.data, out.size);
    }
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
        for (*bad = i; i < n && isdigit((unsigned char)s[i]) && id < UINT32_MAX; i++) id = id * 10 + (uint64_t)(s[i] - '0');
        if (i == *bad || (i < n && s[i] != ' ') || id >= (uint64_t)m->c.vocab) return false;
        size_t length;
        const char *bytes = tokenizer_text(&m->tokenizer, (uint32_t)id, &length);
        if (!tokenizer_is_special(&m->tokenizer, (uint32_t)id)) append(text, bytes, length);
    }
    return true;
}

static int detokenize(const Options *o, const Model *m) {
    // Lines of ids come from -p or -f as from standard input; they end in a newline, with -0 too.
    Records in = { .fd = open_input(o->file ? o->file : "-"), .name = o->file ? o->file : "standard input",
                   .delimiter = '\n' };
    if (o->prompt) {
        append_string(&in.buffer, o->prompt);
        append_string(&in.buffer, "\n");
        in.ended = true;
    }
    int status = OK;
    Bytes out = {0}, text = {0};
    char *s;
    size_t n, bad = 0;
    while (!interrupted && next_record(&in, true, &s, &n) == 1) {
        text.size = out.size = 0;
        if (decode_line(m, s, n, &text, &bad)) append_text(&out, text.data, text.size, o->null ? ZERO_ENDED : LINE);
        else {
            size_t length = 0;
            while (bad + length < n && s[bad + length] != ' ' && length < 20) length++;
            message("line %ld: %.*s is no token id from 0 to %d", in.line, (int)length, s + bad, m->c.vocab - 1);
            status = SOME_FAILED;
        }
        append(&out, o->null ? "" : "\n", 1);
        write_all(&standard_output, out.data, out.size);
    }
    flush_stdout();
    if (in.fd != STDIN_FILENO) close(in.fd);
    free(in.buffer.data);
    free(text.data);
    free(out.data);
    return interrupted ? interrupted : status;
}

// The logits of every position of one prompt, fp32, [tokens][vocab].
static int write_logits(const Options *o, Model *m, const Kernels *kernels) {
    Prompts prompts = prompts_open(o);
    char *text, *more;
    size_t n, n_more;
    long line;
    if (next_prompt(&prompts, true, &text, &n, &line) != 1) {
        if (interrupted) return interrupted;
        usage_error("--logits: standard input holds no prompt");
    }
    Bytes prompt = {0};
    append(&prompt, text, n);
    if (next_prompt(&prompts, true, &more, &n_more, &line) == 1)
        usage_error("--logits takes one prompt, and standard input holds more than one line");
    Request r = { .prompt = prompt.data, .prompt_size = n };
    give_tokens(&r, m, o, 0);
    int status = OK;
    if (r.error) {
        message("%s", r.error);
        status = SOME_FAILED;
    } else {
        int rows = rows_of_pass(o->rows, USUAL_ROWS, r.n);
        Work w = work_open(m, kernels, rows, rows);
        KVCache kv = kv_open(&m->c);
        Sequence sequence = {0};
        Row *pass = allocate((size_t)rows, sizeof *pass);
        SamplingScratch scratch = sampling_open(kernels, m->c.vocab);
        Output out = output_open(o->logits);
        kv_reserve(&kv, &sequence, r.n);
        for (int done = 0, count; done < r.n && !interrupted; done += count) {
            count = r.n - done < rows ? r.n - done : rows;
            for (int i = 0; i < count; i++) pass[i] = (Row){ &sequence, done + i, done + i, r.ids[done + i], true };
            forward(&w, pass, count);
            for (int i = 0; i < count; i++) {
                if (!survey_logits(&scratch, logits_of(&w, i), m->c.vocab)) die_not_finite(m);
                write_all(&out.writer, logits_of(&w, i), (size_t)m->c.vocab * sizeof(float));
            }
        }
        output_close(&out, !interrupted);
        kv_free(&kv, &sequence);
        kv_close(&kv);
        work_close(&w);
        sampling_close(&scratch);
        free(pass);
        status = interrupted;
    }
    free(r.error);
    free(r.ids);
    free(r.prompt);
    prompts_close(&prompts);
    return status;
}

static int show_info(const Model *m) {
    const Config *c = &m->c;
    Bytes out = {0};
    for (size_t i = 0, start = 0; i < m->about_size; i++) {
        if (m->about[i] != '\n') continue;
        const char *line = m->about + start, *tab = memchr(line, '\t', i - start);
        size_t key = tab ? (size_t)(tab - line) : 0;
        append_text(&out, line, key, LINE);
        for (size_t pad = key; pad < 14; pad++) append(&out, " ", 1);
        append_text(&out, line + key + (tab != NULL), i - start - key - (tab != NULL), LINE);
        append(&out, "\n", 1);
        start = i + 1;
    }
    double parameters = 0;
    for (uint32_t i = 0; i < m->n_sections; i++) parameters += (double)m->sections[i].rows * m->sections[i].cols;
    append_format(&out, "format        version %d, f32 weights, %zu bytes\n", FORMAT_VERSION, m->size);
    append_format(&out, "parameters    %.0f\n", parameters);
    append_format(&out, "layers        %d, %s residual\n", c->layers, c->parallel_residual ? "parallel" : "serial");
    append_format(&out, "hidden        %d, intermediate %d\n", c->hidden, c->intermediate);
    append_format(&out, "heads         %d of %d, %d for keys and values, rotary %d of %d, base %g\n", c->heads,
                  c->head_size, c->kv_heads, c->rotary_dims, c->head_size, c->rotary_base);
    append_format(&out, "vocabulary    %d, %u tokens\n", c->vocab, m->tokenizer.tokens);
    append_format(&out, "context       %d tokens\n", c->context);
    append_format(&out, "guesses       %s\n",
                  seek_section(m, "guesses") ? "a table of its own teaching" : "no table; --learn makes one");
    print(&out);
    flush_stdout();
    return OK;
}

// Reads the whole file and compares each section's checksum.
static int verify(const Model *m) {
    int damaged = 0;
    for (uint32_t i = 0; i < m->n_sections && !interrupted; i++) {
        const Section *s = &m->sections[i];
        if (crc32_of(0, m->map + s->offset, s->size) == s->crc) continue;
        message("%s: the section %s is damaged; export the model again, or copy it again", m->path, s->name);
        damaged++;
    }
    if (interrupted) return interrupted;
    if (damaged) return FAILED;
    Bytes out = {0};
    append_text(&out, m->path, strlen(m->path), LINE);
    append_format(&out, ": %u sections, %zu bytes: the checksums are right\n", m->n_sections, m->size);
    print(&out);
    flush_stdout();
    return OK;
}

// --bench. The limit of a piece of work is the roofline (Williams, Waterman and Patterson 2009): the bytes it must read
// over the bandwidth, or its operations over the peak of fused multiply-adds, whichever takes longer. On a shared
// machine both change within seconds, so each window of work stands between two measurements of them, and the share is
// the median of the windows' own shares.

extern char **environ;         // macOS declares it nowhere
static const char bench_prompt[] = "Governing Law.\nThis Agreement";

enum { WINDOWS = 15, READ_FLOATS = 65536, PEAK_PIECES = 16, PEAK_STEPS = 50000, BAR = 24 };

typedef struct { double bandwidth, peak; } Limits;     // bytes and floating-point operations a second
typedef struct { double bytes, operations; } Needs;

typedef struct {
    const char *title;         // with a %d for the tokens of a prompt or of the context
    int sequences, from, tokens, rows;   // of each sequence: first position, tokens in a window, rows in a pass
    int step;                  // positions that a window begins behind the one before it: 0, or its tokens
    int about;                 // the title's number
    double speed, limit, share;          // tokens a second, tokens a second, medians
} BenchWork;

typedef struct {
    const Model *m;
    Work work;
    KVCache kv;
    Sequence *sequences;
    Row *rows;
    int parts;                 // of the model's file, READ_FLOATS each
    double flops[PEAK_PIECES];
    volatile float sink;       // what was summed up goes here, so that no compiler drops the sum
} Bench;

// Piece: a part of the model's file, and behind the last such part a page of the first sequence.
static void read_piece(void *arg, int piece, int thread) {
    (void)thread;
    Bench *b = arg;
    const float *at = (const float *)(const void *)b->m->map + (long)piece * READ_FLOATS;
    bool page = piece >= b->parts;
    if (page) at = b->sequences[0].pages[piece - b->parts]->floats;
    float sum = b->work.kernels->read(page ? b->kv.page_floats / 64 * 64 : READ_FLOATS, at);
    if (sum == 1.0f) b->sink = sum;
}

static void multiply_add_piece(void *arg, int piece, int thread) {
    (void)thread;
    Bench *b = arg;
    float sum;
    b->flops[piece] = b->work.kernels->multiply_add(PEAK_STEPS, &sum);
    if (sum == 1.0f) b->sink = sum;
}

// On this thread alone, or on all: how fast the model's file and the first so many positions' keys and values can be
// read (memory differs from place to place too), and how fast sums can be made of nothing.
static Limits measure_limits(Bench *b, int positions, bool all) {
    int pages = positions / PAGE;
    struct { Run run; int pieces; double taken; } halves[] = {
        { read_piece, b->parts + pages, 0 }, { multiply_add_piece, PEAK_PIECES, 0 },
    };
    for (int i = 0; i < 2; i++) {
        double start = seconds();
        if (all) parallel(halves[i].pieces, halves[i].run, b);
        else for (int piece = 0; piece < halves[i].pieces; piece++) halves[i].run(b, piece, 0);
        halves[i].taken = seconds() - start;
    }
    double flops = 0, floats = (double)b->parts * READ_FLOATS + (double)pages * (double)b->kv.page_floats;
    for (int i = 0; i < PEAK_PIECES; i++) flops += b->flops[i];
    return (Limits){ 4 * floats / halves[0].taken, flops / halves[1].taken };
}

// What must be read and computed for some rows: bytes, if they are one pass (logits: how many rows want them; kept: the
// positions whose keys and values are read), and floating-point operations (seen: the positions that each row attends to,
// summed up).
static Needs needs_of(const Config *c, double rows, double logits, double kept, double seen) {
    double layers = (double)c->layers * c->hidden * (c->qkv + c->q + 2.0 * c->intermediate);
    double table = (double)c->vocab * c->hidden;
    return (Needs){ 4 * (layers + (logits > 0 ? table : 0) + 2.0 * c->layers * c->kv * kept),
                    2 * (rows * layers + logits * table + 2 * seen * c->layers * c->q) };
}

// Seconds that a pass takes at least: rows from position `from` on of each of some sequences, and so many logits rows.
static double roofline(const Config *c, Limits l, int sequences, int from, int rows, int logits) {
    double n = (double)sequences * rows;
    Needs needs = needs_of(c, n, logits, (double)sequences * (from + rows), n * (from + (rows + 1) / 2.0));
    return fmax(needs.bytes / l.bandwidth, needs.operations / l.peak);
}

// The passes of one window from position `from` on: runs them, or with limits says how long they take at least.
static double window_seconds(Bench *b, const BenchWork *w, int from, bool last, const Limits *limits) {
    double start = seconds(), least = 0;
    for (int done = 0, count; done < w->tokens; done += count) {
        count = w->tokens - done < w->rows ? w->tokens - done : w->rows;
        bool logits = w->rows == 1 || (last && done + count == w->tokens);
        if (limits) {
            least += roofline(&b->m->c, *limits, w->sequences, from + done, count, logits ? w->sequences : 0);
            continue;
        }
        int n = 0;
        for (int s = 0; s < w->sequences; s++)
            for (int i = 0; i < count; i++) {
                int position = from + done + i;
                uint32_t token = (uint32_t)((position + 1) * 7919 + s) % (uint32_t)b->m->c.vocab;
                b->rows[n++] = (Row){ &b->sequences[s], position, position, token, logits && i == count - 1 };
            }
        forward(&b->work, b->rows, n);
    }
    return limits ? least : seconds() - start;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_size);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

static void bench_work(Bench *b, BenchWork *w) {
    double shares[WINDOWS], taken = 0, least_taken = 0, tokens = 0;
    int n = 0;
    window_seconds(b, w, w->from, true, NULL);          // its memory is touched for the first time
    for (Limits before = measure_limits(b, w->from, true), after; n < WINDOWS && !interrupted; n++, before = after) {
        int from = w->from + n * w->step;
        bool last = w->step == 0 || n == WINDOWS - 1;
        double work = window_seconds(b, w, from, last, NULL);
        after = measure_limits(b, w->from, true);
        Limits between = { (before.bandwidth + after.bandwidth) / 2, (before.peak + after.peak) / 2 };
        double least = window_seconds(b, w, from, last, &between);
        shares[n] = least / work;
        taken += work, least_taken += least, tokens += w->sequences * w->tokens;
    }
    if (interrupted) return;
    w->speed = tokens / taken;
    w->limit = tokens / least_taken;
    w->share = median(shares, n);
}

// Seconds from the start of a new process of this program to the first byte of its text.
static double first_token_seconds(const Model *m) {
    char threads[16], byte;
    snprintf(threads, sizeof threads, "%d", pool.threads);
    char *arguments[] = { program, "-m", (char *)(uintptr_t)m->path, "-j", threads, "-p",
                          (char *)(uintptr_t)bench_prompt, "-n", "1", "-t", "0", "--no-echo", NULL };
    int ends[2];
    pid_t child;
    posix_spawn_file_actions_t actions;
    if (pipe(ends) != 0 || posix_spawn_file_actions_init(&actions) != 0) die("cannot make a pipe: %s", strerror(errno));
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    double start = seconds();
    int error = posix_spawn(&child, program, &actions, NULL, arguments, environ);
    if (error) die("cannot start %s: %s", program, strerror(error));
    close(ends[1]);
    bool some = read(ends[0], &byte, 1) == 1;
    double taken = seconds() - start;
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
    if (!some && !interrupted) die("%s wrote nothing", program);
    close(ends[0]);
    posix_spawn_file_actions_destroy(&actions);
    return taken;
}

static void append_bar(Bytes *out, double share) {
    for (int i = 0; i < BAR; i++) append_string(out, i + 0.5 < share * BAR ? "#" : ".");
}

typedef struct {
    Limits one, all;           // of one thread, of all
    BenchWork *works;
    int n_works, first_tokens; // first: from the shell to the first token, with a prompt of so many
    double first, first_pass;  // seconds; the pass itself
} BenchResult;

static void show_bench(const Model *m, const Kernels *kernels, const BenchResult *r) {
    Bytes out = {0};
    append_string(&out, m->path);
    append_format(&out, ", %.0f MB, %s, %d thread%s\n\n", (double)m->size * 1e-6, kernels->name, pool.threads,
                  pool.threads > 1 ? "s" : "");
    append_format(&out, "%-28s %9s %9s\n", "this machine", "1 thread", "all");
    append_format(&out, "%-28s %9.1f %9.1f  GB/s\n", "reads", r->one.bandwidth * 1e-9, r->all.bandwidth * 1e-9);
    append_format(&out, "%-28s %9.1f %9.1f  GFLOP/s\n\n", "multiplies and adds", r->one.peak * 1e-9,
                  r->all.peak * 1e-9);
    append_format(&out, "%-28s %9s %9s  share of the limit\n", "this model", "tokens/s", "limit");
    for (int i = 0; i < r->n_works; i++) {
        const BenchWork *w = &r->works[i];
        char title[48];
        snprintf(title, sizeof title, w->title, w->about);
        append_format(&out, "%-28s %9.1f %9.1f  %3.0f%% ", title, w->speed, w->limit, 100 * w->share);
        append_bar(&out, w->share);
        append_string(&out, "\n");
    }
    append_format(&out, "shell to first token         %9.1f ms, %.2f times the pass of %d tokens itself\n",
                  r->first * 1e3, r->first / r->first_pass, r->first_tokens);
    print(&out);
}

// The same for scripts: bytes, operations and tokens a second, seconds.
static void show_bench_json(const Model *m, const Kernels *kernels, const BenchResult *r) {
    Bytes out = {0};
    append_json(&out, "{\"model\": ", m->path, strlen(m->path));
    append_json(&out, ", \"isa\": ", kernels->name, strlen(kernels->name));
    append_format(&out, ", \"threads\": %d, \"bandwidth\": [%.4g, %.4g]", pool.threads, r->one.bandwidth,
                  r->all.bandwidth);
    append_format(&out, ", \"peak\": [%.4g, %.4g], \"work\": [", r->one.peak, r->all.peak);
    for (int i = 0; i < r->n_works; i++) {
        const BenchWork *w = &r->works[i];
        char title[48];
        snprintf(title, sizeof title, w->title, w->about);
        append_json(&out, i ? ", {\"name\": " : "{\"name\": ", title, strlen(title));
        append_format(&out, ", \"tokens_per_second\": %.2f, \"limit\": %.2f, \"share\": %.4f}", w->speed, w->limit,
                      w->share);
    }
    append_format(&out, "], \"first_token\": {\"prompt_tokens\": %d, \"seconds\": %.5f, \"pass_seconds\": %.5f}}\n",
                  r->first_tokens, r->first, r->first_pass);
    print(&out);
}

static int bench(const Options *o, Model *m, const Kernels *kernels) {
    // As far as the context reaches: 3,840 positions are 15 windows of 256, and some are left to decode at.
    int context = m->c.context, far = (context - context / 16) / WINDOWS * WINDOWS, window = far / WINDOWS;
    int near = window / 16, prompt = 2 * window, rows = rows_of_pass(o->rows, USUAL_ROWS, context), few = 16;
    if (window < 16) die("%s: a context of %d tokens is too short for --bench", m->path, context);
    BenchWork works[] = {
        { "decode", .sequences = 1, .from = near, .tokens = 8, .rows = 1 },
        { "decode at position %d", .about = far, .sequences = 1, .from = far, .tokens = 4, .rows = 1 },
        { "prefill of %d tokens", .about = prompt, .sequences = 1, .tokens = prompt, .rows = rows },
        { "prefill of %d tokens", .about = far, .sequences = 1, .tokens = window, .rows = rows, .step = window },
        { "decode, %d sequences at once", .about = few, .sequences = few, .from = near, .tokens = 4, .rows = 1 },
        { "decode, %d sequences at once", .about = USUAL_BATCH, .sequences = USUAL_BATCH, .from = near, .tokens = 2,
          .rows = 1 },
    };
    BenchResult result = { .works = works, .n_works = sizeof works / sizeof *works };
    int most = rows < USUAL_BATCH ? USUAL_BATCH : rows;
    Bench b = { .m = m, .work = work_open(m, kernels, most, USUAL_BATCH), .kv = kv_open(&m->c),
                .parts = (int)(m->size / sizeof(float) / READ_FLOATS) };
    b.rows = allocate((size_t)most, sizeof *b.rows);
    b.sequences = allocate(USUAL_BATCH, sizeof *b.sequences);
    for (int i = 0; i < USUAL_BATCH; i++) {
        kv_reserve(&b.kv, &b.sequences[i], (i ? near : far) + 8);
        for (int p = 0; p < b.sequences[i].n_pages; p++)       // memory that was never written is not memory yet
            memset(b.sequences[i].pages[p]->floats, 0, (size_t)b.kv.page_floats * sizeof(float));
    }

    uint32_t ids[sizeof bench_prompt];
    result.first_tokens = (int)encode(m, o, bench_prompt, strlen(bench_prompt), ids);
    BenchWork first = { .sequences = 1, .tokens = result.first_tokens, .rows = result.first_tokens };
    double one[2][WINDOWS], all[2][WINDOWS], passes[WINDOWS], ratios[WINDOWS];
    for (int i = -1; i < WINDOWS && !interrupted; i++) {       // the first time only warms up
        int at = i < 0 ? 0 : i;
        Limits alone = measure_limits(&b, 0, false), together = measure_limits(&b, 0, true);
        one[0][at] = alone.bandwidth, one[1][at] = alone.peak;
        all[0][at] = together.bandwidth, all[1][at] = together.peak;
        passes[at] = window_seconds(&b, &first, 0, true, NULL);
        ratios[at] = first_token_seconds(m) / passes[at];
    }
    for (int i = 0; i < result.n_works && !interrupted; i++) bench_work(&b, &works[i]);
    if (!interrupted) {
        result.one = (Limits){ median(one[0], WINDOWS), median(one[1], WINDOWS) };
        result.all = (Limits){ median(all[0], WINDOWS), median(all[1], WINDOWS) };
        result.first_pass = median(passes, WINDOWS);
        result.first = median(ratios, WINDOWS) * result.first_pass;
        (o->json ? show_bench_json : show_bench)(m, kernels, &result);
        flush_stdout();
    }
    for (int i = 0; i < USUAL_BATCH; i++) kv_free(&b.kv, &b.sequences[i]);
    kv_close(&b.kv);
    work_close(&b.work);
    free(b.sequences);
    free(b.rows);
    return interrupted;
}

// --bench --replay: decodes texts as if the sampler had picked them, some at a time, and each time twice: one token a
// pass, and with guesses.

typedef struct { char *prompt; size_t prompt_size; uint32_t *ids; int n; long line; } ReplayLine;

typedef struct {
    const Options *o;
    Model *m;
    Scheduler s;
    ReplayLine *lines;         // of this time
    int n_lines, next;
    double ended;              // seconds()
    bool failed;               // a line could not be run
} Replay;

typedef struct { double seconds; long draws, decoded, guesses; Pace pace; } ReplayFigures;

static Request *replay_request(void *arg, bool wait, bool *ended) {
    (void)wait;
    Replay *p = arg;
    *ended = p->next == p->n_lines;
    if (*ended) return NULL;
    const ReplayLine *l = &p->lines[p->next++];
    Request *r = allocate(1, sizeof *r);
    *r = (Request){ .line = l->line, .forced = l->ids, .prompt_size = l->prompt_size };
    r->prompt = memcpy(allocate(l->prompt_size + 1, 1), l->prompt, l->prompt_size);
    give_tokens(r, p->m, p->o, l->n);
    if (!r->error && r->n + l->n > p->m->c.context)
        r->error = format_string("the prompt and its text have %d tokens, the context holds %d; shorten them", r->n + l->n,
                                 p->m->c.context);
    r->limit = l->n;
    return r;
}

static void ignore(void *arg, Continuation *c) { (void)arg, (void)c; }

static void replay_end(void *arg, Request *r) {
    Replay *p = arg;
    p->ended = seconds();
    if (r->error && p->s.drafts) message("line %ld: %s", r->line, r->error);
    p->failed |= r->error != NULL;
    request_free(r, p->s.returns, &p->s.kv);
}

// Runs the lines of this time and adds their figures to f.
static void replay_lines(Replay *p, const Kernels *kernels, Drafts *drafts, ReplayFigures *f) {
    p->s = new_scheduler(p->o, p->m, kernels);
    p->s.returns = 1, p->s.batch = p->n_lines, p->s.ignore_eos = true, p->s.drafts = drafts, p->s.pace = f->pace;
    p->s.source = replay_request, p->s.progress = p->s.finished = ignore, p->s.sink = replay_end, p->s.arg = p;
    p->next = 0;
    schedule(&p->s);
    f->seconds += p->s.tokens_drawn > 0 ? p->ended - p->s.first_token : 0;
    f->draws += p->s.draws, f->decoded += p->s.decoded, f->guesses += p->s.guesses;
    f->pace = p->s.pace;
    scheduler_free(&p->s);
}

// The next lines of the file, at most so many. A line without a tab, or with nothing behind it, is no line of a replay.
static void read_replay(Replay *p, Records *in, int most) {
    char *text;
    size_t n;
    for (p->n_lines = 0; p->n_lines < most && next_record(in, true, &text, &n) == 1;) {
        char *tab = memchr(text, '\t', n), *rest = tab ? tab + 1 : NULL;
        ReplayLine *l = &p->lines[p->n_lines];
        size_t rest_size = tab ? n - (size_t)(rest - text) : 0;
        *l = (ReplayLine){ .line = in->line, .prompt_size = tab ? (size_t)(tab - text) : 0 };
        if (tab && !p->o->no_escape) {
            l->prompt_size = unescape(text, l->prompt_size);
            rest_size = unescape(rest, rest_size);
        }
        l->ids = allocate(rest_size + 1, sizeof *l->ids);
        l->n = (int)encode(p->m, p->o, rest, rest_size, l->ids);
        if (l->n == 0)
            die("%s: line %ld is not a prompt, a tab and its continuation", p->o->replay, in->line);
        l->prompt = memcpy(allocate(l->prompt_size + 1, 1), text, l->prompt_size);
        p->n_lines++;
    }
}

static int replay(const Options *o, Model *m, const Kernels *kernels) {
    Replay p = { .o = o, .m = m };
    Records in = { .fd = open_input(o->replay), .name = o->replay, .delimiter = '\n' };
    int at_once = o->batch ? (int)(o->batch < MAX_BATCH ? o->batch : MAX_BATCH) : 1;
    p.lines = allocate((size_t)at_once, sizeof *p.lines);
    ReplayFigures alone = {0}, guessed = {0};
    Drafts drafts = drafts_open(m);
    for (int turn = 0; !interrupted; turn++) {
        read_replay(&p, &in, at_once);
        if (p.n_lines == 0) break;
        for (int i = 0; i < 2; i++) {          // one first, then the other
            bool guess = (turn + i) % 2;
            replay_lines(&p, kernels, guess ? &drafts : NULL, guess ? &guessed : &alone);
        }
        for (int i = 0; i < p.n_lines; i++) free(p.lines[i].prompt), free(p.lines[i].ids);
    }
    drafts_close(&drafts);
    close(in.fd);
    free(in.buffer.data);
    free(p.lines);
    if (interrupted) return interrupted;
    if (guessed.draws == 0) die("%s: there is nothing to decode: no line has two tokens behind its tab", o->replay);

    double passes = (double)guessed.decoded / (double)guessed.draws;
    double true_guesses = (double)(guessed.decoded - guessed.draws);
    double speeds[2] = { (double)alone.decoded / alone.seconds, (double)guessed.decoded / guessed.seconds };
    Bytes out = {0};
    if (o->json)
        append_format(&out, "{\"tokens\": %ld, \"tokens_per_pass\": %.4f, \"guesses\": %ld, \"guesses_true\": %.0f, "
                      "\"tokens_per_second\": [%.2f, %.2f]}\n", guessed.decoded, passes, guessed.guesses, true_guesses,
                      speeds[0], speeds[1]);
    else {
        append_format(&out, "%-28s %11s %9s\n", "decoding of known text", "tokens/pass", "tokens/s");
        append_format(&out, "%-28s %11.2f %9.1f\n", "one token a pass", 1.0, speeds[0]);
        append_format(&out, "%-28s %11.2f %9.1f, %.2f times as fast\n", "with guesses", passes, speeds[1],
                      speeds[1] / speeds[0]);
        append_format(&out, "%ld tokens; %.0f of %ld guesses came true\n", guessed.decoded, true_guesses, guessed.guesses);
    }
    print(&out);
    flush_stdout();
    return p.failed ? SOME_FAILED : OK;
}

// --learn: the model's file once more, with a table of guesses that the model teaches it. What it samples from these
// beginnings is learnt in their order, up to the last token asked for, so the table depends on the seed alone.

static const char *const openings[] = {
    "Governing Law.\n", "This Agreement", "WHEREAS, ", "NOW, THEREFORE, ", "Section 1. Definitions.\n", "Under this",
    "The Company", "The parties agree that", "IN WITNESS WHEREOF, ", "Confidentiality.\n", "Termination.\n", "Notices.\n",
    "The term \"", "Pursuant to", "In accordance with", "Each party shall", "The Tenant shall", "The Borrower",
    "The court held that", "Plaintiff", "It is so ORDERED", "Subject to", "No person shall", "The Secretary",
    "Indemnification.\n", "Representations and Warranties.\n", "Entire Agreement.\n", "Severability.\n", "Assignment.\n",
    "Limitation of Liability.\n", "Payment.\n", "Force Majeure.\n",
};

enum { OPENINGS = sizeof openings / sizeof *openings };

typedef struct {
    const Options *o;
    Model *m;
    Scheduler s;
    Drafts table;
    uint64_t seed;
    long begun, delivered, learnt, tokens;     // texts begun, texts delivered; tokens so far, and in the end
    double shown;              // seconds(): when progress was
} Learning;

// The next beginning, as long as those in work may not be enough.
static Request *learning_request(void *arg, bool wait, bool *ended) {
    (void)wait;
    Learning *l = arg;
    long each = l->o->new_tokens < l->m->c.context ? l->o->new_tokens : l->m->c.context;
    *ended = l->learnt == l->tokens;
    if (*ended || l->learnt + (l->begun - l->delivered) * each >= l->tokens) return NULL;
    const char *opening = openings[l->begun % OPENINGS];
    Request *r = allocate(1, sizeof *r);
    r->prompt_size = strlen(opening);
    r->prompt = memcpy(allocate(r->prompt_size + 1, 1), opening, r->prompt_size);
    give_tokens(r, l->m, l->o, l->o->new_tokens);
    if (r->error) die("%s: nothing can be sampled to learn from: %s", l->m->path, r->error);
    long room = l->m->c.context - r->n;
    r->limit = (int)(l->o->new_tokens < room ? l->o->new_tokens : room);
    r->seed = (l->seed + (uint64_t)(l->begun++ / OPENINGS)) & MOST_SEED;
    r->hash = hash_tokens(r->ids, r->given);
    for (int i = 0; i < r->n; i++) push(&r->tail, r->ids[i]);
    return r;
}

static void learn_text(void *arg, Continuation *c) {
    Learning *l = arg;
    for (int i = 0; i < c->n && l->learnt < l->tokens; i++, l->learnt++) learn(&l->table, &c->tail, c->ids[i]);
}

static void learning_end(void *arg, Request *r) {
    Learning *l = arg;
    l->delivered++;
    request_free(r, l->s.returns, &l->s.kv);
    if (l->o->quiet || !isatty(STDERR_FILENO) || seconds() - l->shown < 0.2) return;
    show_status("kl3m: %ld of %ld tokens sampled", l->learnt, l->tokens);
    l->shown = seconds();
}

// The model's file with a table of guesses behind its other sections, in place of one that it has. The others move
// together, as far as the table of sections needs more room.
static void write_guesses(const Model *m, Output *out, const Context *table) {
    enum { SMALL_PAGE = 4096 };
    Section *sections = allocate(m->n_sections + 1, sizeof *sections), *s = sections;
    uint64_t first = m->size, end = 0;
    for (uint32_t i = 0; i < m->n_sections; i++) {
        if (strcmp(m->sections[i].name, "guesses") == 0) continue;
        *s = m->sections[i];
        first = s->offset < first ? s->offset : first;
        end = s->offset + s->size > end ? s->offset + s->size : end;
        s++;
    }
    uint32_t n = (uint32_t)(s - sections) + 1;
    uint64_t head = sizeof(FileHeader) + n * sizeof *s, shift = head > first ? (head - first + 63) / 64 * 64 : 0;
    for (s = sections; s < sections + n - 1; s++) s->offset += shift;
    size_t size = CONTEXTS * sizeof *table;
    *s = (Section){ .name = "guesses", .type = TYPE_BYTES, .crc = crc32_of(0, (const uint8_t *)table, size),
                    .offset = (end + shift + SMALL_PAGE - 1) / SMALL_PAGE * SMALL_PAGE, .size = size };
    uint64_t file_size = (s->offset + size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;

    FileHeader h = { .version = FORMAT_VERSION, .sections = n, .file_size = file_size };
    memcpy(h.magic, m->map, sizeof h.magic);
    h.directory_crc = crc32_of(crc32_of(0, (const uint8_t *)&h, 24), (const uint8_t *)sections, n * sizeof *s);
    struct { const void *data; uint64_t at, size; } parts[] = {
        { &h, 0, sizeof h }, { sections, sizeof h, n * sizeof *s }, { m->map + first, first + shift, end - first },
        { table, s->offset, size }, { NULL, file_size, 0 },
    };
    uint64_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; at = parts[i].at + parts[i].size, i++) {
        for (; at < parts[i].at; at++) write_all(&out->writer, "", 1);
        write_all(&out->writer, parts[i].data, parts[i].size);
    }
    free(sections);
}

static int learn_guesses(const Options *o, Model *m, const Kernels *kernels) {
    Learning l = { .o = o, .m = m, .s = new_scheduler(o, m, kernels), .table = drafts_open(NULL),
                   .seed = o->seed >= 0 ? (uint64_t)o->seed : system_seed(), .tokens = o->tokens ? o->tokens : 40000 };
    Bytes text = {0};
    if (o->file) text = read_file(o->file);
    Output out = output_open(o->out);          // now, not when all is done: it may not be possible
    struct statvfs disk;
    double need = (double)m->size + CONTEXTS * sizeof(Context), room = need;
    if (out.temporary && statvfs(out.temporary, &disk) == 0) room = (double)disk.f_bavail * (double)disk.f_frsize;
    if (room < need) die("%s: the disk has %.0f MB left, %.0f are needed", o->out, room * 1e-6, need * 1e-6);
    l.s.returns = 1;
    l.s.source = learning_request, l.s.progress = ignore, l.s.finished = learn_text, l.s.sink = learning_end;
    l.s.arg = &l;
    double start = seconds();
    schedule(&l.s);
    if (l.shown > 0) show_status("%s", "");
    uint32_t *ids = allocate(text.size + 1, sizeof *ids);
    size_t own = interrupted || text.size == 0 ? 0 : encode(m, o, text.data, text.size, ids);
    Tail tail = {0};
    for (size_t i = 0; i < own; i++) learn(&l.table, &tail, ids[i]);     // last, so it counts most
    if (!interrupted) {
        write_guesses(m, &out, l.table.table);
        if (o->verbose)
            message("seed %llu, %ld tokens sampled in %.1f s", (unsigned long long)l.seed, l.learnt,
                    seconds() - start);
    }
    output_close(&out, !interrupted);
    if (!interrupted && !o->quiet) {
        Bytes said = {0};
        append_text(&said, o->out, strlen(o->out), LINE);
        append_format(&said, ": the model with a table of guesses from %ld tokens of its own", l.learnt);
        if (o->file) {
            append_format(&said, " and %zu of ", own);
            append_text(&said, o->file, strlen(o->file), LINE);
        }
        append_string(&said, "\n");
        print(&said);
        flush_stdout();
    }
    free(ids);
    free(text.data);
    drafts_close(&l.table);
    scheduler_free(&l.s);
    return interrupted;
}

// ---- 14. Options ----
// One table: the parser, --help and the README's table (a test compares them) come from it. A number is parsed whole
// and held to its range; nothing is clamped in silence. The environment is read here and nowhere else.

typedef enum { FLAG, TEXT, STOP_TEXT, CHOICE, WHOLE, REAL, SIZE } Kind;

typedef struct {
    char letter;               // or 0
    const char *name, *value;  // value: its name in --help; for CHOICE the words, separated by |
    Kind kind;
    void *address;
    double least, most;        // inclusive; most INFINITY: any finite number
    bool above;                // the value must lie above least
    const char *help;
} Option;

static Options options = {
    .new_tokens = 128, .top_k = 50, .returns = 1, .seed = -1, .threads = 0, .batch = 0, .rows = 0,
    .temperature = 0.3, .top_p = 1, .min_p = 0, .penalty = 1,
};

static const Option option_table[] = {
    { 'm', "model", "FILE", TEXT, &options.model, 0, 0, 0, "the exported model (default: see below)" },
    { 'p', "prompt", "TEXT", TEXT, &options.prompt, 0, 0, 0, "the prompt, escapes (\\n \\t \\xHH ...) decoded" },
    { 'f', "file", "FILE", TEXT, &options.file, 0, 0, 0, "the whole file is the prompt; - is stdin" },
    { 0, "no-escape", NULL, FLAG, &options.no_escape, 0, 0, 0, "take prompts and stop texts as they are" },
    { '0', "null", NULL, FLAG, &options.null, 0, 0, 0, "prompts and texts end in NUL, as they are" },
    { 0, "jsonl", NULL, FLAG, &options.jsonl, 0, 0, 0, "each line is JSON with \"prompt\"; implies --json" },
    { 'n', "max-new-tokens", "N", WHOLE, &options.new_tokens, 0, INT_MAX, 0, "at most N new tokens (128)" },
    { 't', "temperature", "T", REAL, &options.temperature, 0, INFINITY, 0, "0 is greedy (0.3)" },
    { 'k', "top-k", "K", WHOLE, &options.top_k, 0, INT_MAX, 0, "draw from the K likeliest; 0 is off (50)" },
    { 0, "top-p", "P", REAL, &options.top_p, 0, 1, 0, "draw from the nucleus of probability P (1)" },
    { 0, "min-p", "P", REAL, &options.min_p, 0, 1, 0, "least share of the likeliest's probability (0)" },
    { 0, "repetition-penalty", "R", REAL, &options.penalty, 0, INFINITY, 1, "as in transformers (1)" },
    { 'r', "num-return-sequences", "R", WHOLE, &options.returns, 1, INT_MAX, 0, "continuations of each prompt (1)" },
    { 's', "seed", "S", WHOLE, &options.seed, 0, MOST_SEED, 0, "0 to 2^53 - 1, fixes every draw (the system's)" },
    { 0, "stop", "TEXT", STOP_TEXT, NULL, 0, 0, 0, "end before TEXT; may be repeated" },
    { 0, "ignore-eos", NULL, FLAG, &options.ignore_eos, 0, 0, 0, "go on past <|end|>" },
    { 0, "no-echo", NULL, FLAG, &options.no_echo, 0, 0, 0, "print the continuation without the prompt" },
    { 0, "truncate", "left|right", CHOICE, &options.truncate, 0, 0, 0, "cut a prompt there until N tokens fit" },
    { 0, "no-special", NULL, FLAG, &options.no_special, 0, 0, 0, "read <|end|> in a prompt as plain text" },
    { 0, "json", NULL, FLAG, &options.json, 0, 0, 0, "one JSON object a prompt, one a line" },
    { 'j', "threads", "J", WHOLE, &options.threads, 1, INT_MAX, 0, "threads (the CPUs this process may use)" },
    { 'b', "batch", "B", WHOLE, &options.batch, 1, INT_MAX, 0, "most sequences in work at once (48)" },
    { 0, "rows", "N", WHOLE, &options.rows, 1, INT_MAX, 0, "most rows (tokens) in one pass (256, or B)" },
    { 0, "kv-memory", "SIZE", SIZE, &options.kv_memory, 1, 0x1p60, 0, "ceiling for keys and values, as 512M or 2G" },
    { 0, "no-speculation", NULL, FLAG, &options.no_speculation, 0, 0, 0, "one token a pass: no guesses" },
    { 0, "tokenize", NULL, FLAG, &options.tokenize, 0, 0, 0, "print each prompt's token ids" },
    { 0, "detokenize", NULL, FLAG, &options.detokenize, 0, 0, 0, "lines of token ids in, their text out" },
    { 0, "logits", "FILE", TEXT, &options.logits, 0, 0, 0, "write the prompt's logits, fp32" },
    { 0, "info", NULL, FLAG, &options.info, 0, 0, 0, "say what the model file holds" },
    { 0, "verify", NULL, FLAG, &options.verify, 0, 0, 0, "check the model file's checksums" },
    { 0, "learn", NULL, FLAG, &options.learn, 0, 0, 0, "write the model with a table of guesses (-o)" },
    { 'o', "out", "FILE", TEXT, &options.out, 0, 0, 0, "with --learn: the file it writes" },
    { 0, "tokens", "N", WHOLE, &options.tokens, 1, 0x1p40, 0, "with --learn: sample N tokens (40000)" },
    { 0, "bench", NULL, FLAG, &options.bench, 0, 0, 0, "this machine's limits, the model against them" },
    { 0, "replay", "FILE", TEXT, &options.replay, 0, 0, 0, "with --bench: decode its PROMPT TAB TEXT lines" },
    { 'q', "quiet", NULL, FLAG, &options.quiet, 0, 0, 0, "errors only on standard error" },
    { 'v', "verbose", NULL, FLAG, &options.verbose, 0, 0, 0, "seeds and timings on standard error" },
    { 'h', "help", NULL, FLAG, &options.help, 0, 0, 0, "this text" },
    { 0, "version", NULL, FLAG, &options.version, 0, 0, 0, "the program's version" },
};

enum { OPTIONS = sizeof option_table / sizeof *option_table };

static int show_help(void) {
    Bytes out = {0};
    append_string(&out, "usage: kl3m [options]\n"
                        "Continues legal text with a KL3M model: -p TEXT, -f FILE, or a prompt a line\n"
                        "on standard input. In brackets: the default.\n\n");
    for (int i = 0; i < OPTIONS; i++) {
        const Option *o = &option_table[i];
        char left[64];
        snprintf(left, sizeof left, "%c%c%s --%s%s%s", o->letter ? '-' : ' ', o->letter ? o->letter : ' ',
                 o->letter ? "," : " ", o->name, o->value ? " " : "", o->value ? o->value : "");
        append_format(&out, "  %-30s ", left);
        append_string(&out, o->help);
        append_string(&out, "\n");
    }
    append_string(&out, "\nThe model is $KL3M_MODEL, else kl3m-002-170m.bin in the current directory, in\n"
                        "$XDG_DATA_HOME/kl3m (~/.local/share/kl3m), beside the program, or in\n"
                        "../share/kl3m from there. KL3M_ISA=avx512|avx2|neon|portable forces a set of\n"
                        "instructions. Exit status: 0 done, 1 failed, 2 wrong command line, 3 some\n"
                        "prompts could not be run, 130 and 143 after Ctrl-C and SIGTERM.\n");
    print(&out);
    flush_stdout();
    return OK;
}

static int show_version(void) {
    Bytes out = {0};
    append_format(&out, "kl3m %s, model format %d\n", VERSION, FORMAT_VERSION);
    print(&out);
    flush_stdout();
    return OK;
}

// "-n, --max-new-tokens" as messages name an option.
static const char *option_title(const Option *o) {
    static char title[64];
    if (o->letter) snprintf(title, sizeof title, "-%c, --%s", o->letter, o->name);
    else snprintf(title, sizeof title, "--%s", o->name);
    return title;
}

static void parse_number(const Option *o, const char *text) {
    char range[96], *end;
    if (o->most == INFINITY) snprintf(range, sizeof range, "a number %s %.0f", o->above ? "above" : "of at least", o->least);
    else snprintf(range, sizeof range, "%s from %.0f to %.0f", o->kind == WHOLE ? "a whole number" : "a number", o->least, o->most);
    const char *allowed = o->kind == WHOLE ? "-0123456789" : "+-.0123456789eE";
    errno = 0;
    double value = strtod(text, &end);
    bool parsed = *text && *end == 0 && strspn(text, allowed) == strlen(text);
    if (parsed && o->kind == WHOLE) parsed = strrchr(text, '-') == NULL || strrchr(text, '-') == text;
    if (!parsed || !isfinite(value) || value < o->least || value > o->most || (o->above && value <= o->least))
        usage_error("%s: '%s' is not %s", option_title(o), text, range);
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
        usage_error("%s: '%s' is not a size, as 512M or 2G", option_title(o), text);
    *(long *)o->address = (long)value;
}

static void set_option(const Option *o, const char *value) {
    if (o->kind == FLAG) *(bool *)o->address = true;
    else if (o->kind == SIZE) parse_size(o, value);
    else if (o->kind == WHOLE || o->kind == REAL) parse_number(o, value);
    else if (o->kind == STOP_TEXT) {
        if (options.n_stops == MAX_STOPS) usage_error("%s: more than %d stop texts", option_title(o), MAX_STOPS);
        if (*value == 0) usage_error("%s: the text is empty", option_title(o));
        options.stops[options.n_stops++] = value;
    } else if (o->kind == CHOICE) {
        size_t n = strlen(value);
        const char *at = strstr(o->value, value);
        bool whole = n && at && (at == o->value || at[-1] == '|') && (at[n] == 0 || at[n] == '|') && !strchr(value, '|');
        if (!whole) usage_error("%s: '%s' is not one of %s", option_title(o), value, o->value);
        *(const char **)o->address = value;
    } else {
        bool once = o->letter == 'p' || o->letter == 'f';
        if (once && *(const char **)o->address) usage_error("%s is given twice; one prompt goes here, a file of prompts on standard input", option_title(o));
        if (o->letter != 'p' && *value == 0) usage_error("%s: the name is empty", option_title(o));
        *(const char **)o->address = value;
    }
}

static const Option *find_option(char letter, const char *name, size_t n) {
    for (int i = 0; i < OPTIONS; i++) {
        const Option *o = &option_table[i];
        if (letter ? o->letter == letter : strlen(o->name) == n && strncmp(o->name, name, n) == 0) return o;
    }
    return NULL;
}

static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i];
        if (strcmp(arg, "--") == 0 && i + 1 == argc) break;
        if (strcmp(arg, "--") == 0) arg = argv[i + 1];
        if (arg != argv[i] || arg[0] != '-' || arg[1] == 0)
            usage_error("'%s' is no option; a prompt goes after -p", arg);
        if (arg[1] == '-') {
            size_t n = strcspn(arg + 2, "=");
            for (char *c = arg + 2; c < arg + 2 + n; c++)
                if (*c == '_') *c = '-';
            const Option *o = find_option(0, arg + 2, n);
            const char *value = arg[2 + n] ? arg + 3 + n : NULL;
            if (o == NULL) usage_error("--%.*s is no option", (int)n, arg + 2);
            if (o->kind == FLAG && value) usage_error("%s takes no value", option_title(o));
            if (o->kind != FLAG && value == NULL && ++i == argc) usage_error("%s needs a value: %s", option_title(o), o->value);
            set_option(o, value ? value : argv[i]);
            continue;
        }
        for (char *c = arg + 1; *c; c++) {     // -qv, -n32
            const Option *o = find_option(*c, "", 0);
            if (o == NULL) usage_error("-%c is no option", *c);
            if (o->kind == FLAG) {
                set_option(o, "");
                continue;
            }
            if (c[1] == 0 && ++i == argc) usage_error("%s needs a value: %s", option_title(o), o->value);
            set_option(o, c[1] ? c + 1 : argv[i]);
            break;
        }
    }
    if (options.prompt && options.file) usage_error("-p, --prompt and -f, --file exclude each other");
    if (options.jsonl && (options.prompt || options.file || options.null))
        usage_error("--jsonl takes its prompts from lines of standard input: not with -p, -f or -0");
    if (options.jsonl && (options.tokenize || options.detokenize || options.logits))
        usage_error("--jsonl is for generating: not with --tokenize, --detokenize or --logits");
    if (options.jsonl) options.json = true;
    if (options.replay && !options.bench) usage_error("--replay goes with --bench");
    if (options.learn != (options.out != NULL)) usage_error("--learn and -o, --out go together: the model that is written");
    if (options.tokens && !options.learn) usage_error("--tokens goes with --learn");
    bool reaches_nothing = options.n_stops > 0 || options.returns > 1 || options.no_speculation;
    if (options.learn && (options.prompt || options.null || options.json || options.new_tokens == 0 || reaches_nothing))
        usage_error("--learn samples from beginnings of its own, one text of each, and learns from -f FILE: not with -p, -0, "
                    "--json, --jsonl, --stop, -r, --no-speculation or -n 0");
    if (options.replay && (options.prompt || options.file || options.jsonl || reaches_nothing))
        usage_error("--replay takes its prompts and their texts from its file, and runs them with guesses and without: not "
                    "with -p, -f, --jsonl, --stop, -r or --no-speculation");
    int commands = options.tokenize + options.detokenize + (options.logits != NULL) + options.info + options.verify +
                   options.learn + options.bench;
    if (commands > 1)
        usage_error("--tokenize, --detokenize, --logits, --info, --verify, --learn and --bench exclude each other");
    if (options.quiet) options.verbose = false;
    bool needs_prompt = !options.info && !options.verify && !options.bench && !options.learn &&
                        !options.help && !options.version;
    if (needs_prompt && !options.prompt && !options.file && isatty(STDIN_FILENO)) {
        message("usage: kl3m -p TEXT | -f FILE | < PROMPTS, a prompt a line; kl3m --help lists the options");
        exit(USAGE);
    }
}

// The first model there is where --help says one may be; a message with the names that were tried if there is none.
static char *find_model(void) {
    if (options.model) return format_string("%s", options.model);
    const char *named = getenv("KL3M_MODEL"), *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    if (named && *named) return format_string("%s", named);
    const char *file = "kl3m-002-170m.bin";
    char *beside = format_string("%s", program), *slash = strrchr(beside, '/');
    if (slash) *slash = 0;
    char *places[] = {
        format_string("%s", file),
        data && *data ? format_string("%s/kl3m/%s", data, file) : format_string("%s/.local/share/kl3m/%s", home ? home : "", file),
        format_string("%s/%s", slash ? beside : ".", file),
        format_string("%s/../share/kl3m/%s", slash ? beside : ".", file),
    };
    free(beside);
    char *found = NULL;
    for (int i = 0; i < 4; i++) {
        if (!found && access(places[i], F_OK) == 0) found = places[i];
        else free(places[i]);
    }
    if (!found)
        die("there is no model: no %s in the current directory, in $XDG_DATA_HOME/kl3m (~/.local/share/kl3m), beside "
            "the program or in ../share/kl3m from there; type `make model` where the program was built, or name one "
            "with -m FILE or $KL3M_MODEL", file);
    return found;
}

// The kernels of the set of instructions that KL3M_ISA asks for, else the fastest.
static const Kernels *find_kernels(void) {
    const char *isa = getenv("KL3M_ISA");
    const Kernels *kernels = choose_kernels(isa && *isa ? isa : NULL);
    if (kernels == NULL)
        die("KL3M_ISA=%s: there is no such set of instructions in this CPU; avx512, avx2, neon and portable are the "
            "names", isa);
    return kernels;
}

#ifdef __linux__
// The first number of a cgroup's file, divided by the second if there is one: "quota period" of version 2's cpu.max is
// CPUs, memory.max is bytes. INFINITY where there is no file or no limit ("max", or -1 in version 1).
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

// The path of the cgroup that this process is in: of version 2 (controller ""), or of a controller of version 1. Lines
// are "number:controllers:path"; "" where there is none. Inside a container the path may be the host's, and the files
// at the root are the container's own.
static void cgroup_path(const char *controller, char path[PATH_MAX]) {
    char line[PATH_MAX + 64];
    FILE *f = fopen("/proc/self/cgroup", "re");
    *path = 0;
    while (f && *path == 0 && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':'), *at = controllers ? strchr(controllers + 1, ':') : NULL;
        if (at == NULL) continue;
        *at = 0;
        bool here = *controller ? has_word(controllers + 1, controller) : controllers[1] == 0;
        if (here) snprintf(path, PATH_MAX, "%.*s", (int)strcspn(at + 1, "\n"), at + 1);
    }
    if (f) fclose(f);
}

// The least limit in the files of this name of the cgroup that this process is in, and of its parents; divided by those
// of `period` where that is not NULL.
static double limit_of_cgroup(const char *controller, const char *name, const char *period) {
    char path[PATH_MAX], folder[32] = "";
    if (*controller) snprintf(folder, sizeof folder, "/%s", controller);
    double least = INFINITY;
    for (cgroup_path(controller, path);; *strrchr(path, '/') = 0) {
        double limit = limit_in(folder, path, name), per = period ? limit_in(folder, path, period) : 1;
        if (per < INFINITY) least = fmin(least, limit / per);
        if (strrchr(path, '/') == NULL) return least;
    }
}
#endif

// The CPUs that this process may use at once: its affinity mask, or a cgroup's quota, rounded up, if that is less.
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

// A quarter of the memory that this process may use: the machine's, or that of a cgroup it is in if that is less.
static long usual_kv_memory(void) {
    double memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
#ifdef __linux__
    memory = fmin(memory, limit_of_cgroup("", "memory.max", NULL));
    memory = fmin(memory, limit_of_cgroup("memory", "memory.limit_in_bytes", NULL));
#endif
    return (long)(memory / 4);
}

// ---- 15. Main ----

static struct sigaction before_fault;      // what a fault met before we looked

// A model that is cut, or changed in place, while it is mapped is no fault of ours, and said to be the file's. Any other
// fault goes the way it would have gone.
static void on_fault(int number) {
    static const char cut[] = "kl3m: the model file was cut or its disk failed while it was in use\n";
    static const char changed[] = "kl3m: the model file was changed while it was in use; replace it by a whole new file\n";
    struct stat now;
    const struct stat *then = &mapped_file.as_opened;
    bool same = mapped_file.path && stat(mapped_file.path, &now) == 0 && now.st_ino == then->st_ino &&
                now.st_size == then->st_size && now.st_mtim.tv_sec == then->st_mtim.tv_sec &&
                now.st_mtim.tv_nsec == then->st_mtim.tv_nsec;
    if (unfinished_file) unlink(unfinished_file);
    if (number == SIGBUS) write_error(cut, sizeof cut - 1);
    else if (!same) write_error(changed, sizeof changed - 1);
    if (number == SIGBUS || !same) _exit(FAILED);
    sigaction(SIGSEGV, &before_fault, NULL);   // the instruction is run again
}

// The file that runs: on Linux what the kernel says, elsewhere the name it was called by, looked up as the shell does.
static void find_program(const char *name) {
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = 0;
    if (*program) return;
    snprintf(program, sizeof program, "%s", name);
    const char *folders = getenv("PATH");
    if (strchr(name, '/') || folders == NULL) return;
    for (size_t length; *folders; folders += length + (folders[length] == ':')) {
        length = strcspn(folders, ":");
        snprintf(program, sizeof program, "%.*s%s%s", (int)length, folders, length ? "/" : "", name);
        if (access(program, X_OK) == 0) return;
    }
}

static int run_command(void) {
    if (options.kv_memory == 0) options.kv_memory = usual_kv_memory();
    char *path = find_model();
    Model m = model_open(path);
    const Kernels *kernels = find_kernels();
    keep_denormals();
    const char *flaw = kernels->miscompiled();
    if (flaw) die("this program was compiled %s, which its results need; build it with make", flaw);
    int status;
    if (options.info) status = show_info(&m);
    else if (options.verify) status = verify(&m);
    else if (options.tokenize) status = tokenize(&options, &m);
    else if (options.detokenize) status = detokenize(&options, &m);
    else {
        threads_start(options.threads ? (int)options.threads : usable_cpus());
        status = options.replay ? replay(&options, &m, kernels) : options.bench ? bench(&options, &m, kernels)
               : options.learn ? learn_guesses(&options, &m, kernels)
               : options.logits ? write_logits(&options, &m, kernels) : generate(&options, &m, kernels);
        threads_stop();
    }
    model_close(&m);
    free(path);
    return status;
}

#ifndef KL3M_TEST   // tests/unit.c includes this file
int main(int argc, char **argv) {
    hold_standard_streams();
    catch_signals();
    signal(SIGBUS, on_fault);
    sigaction(SIGSEGV, &(struct sigaction){ .sa_handler = on_fault }, &before_fault);
    parse_options(argc, argv);
    terminal = isatty(STDOUT_FILENO);
    if (options.help) return show_help();
    if (options.version) return show_version();
    find_program(argv[0]);
    int status = run_command();
    return status == OK && messages_lost ? FAILED : status;
}
#endif
#endif   // not KIND
