// How fast kl3m is against this machine's own limits: `make bench`, `make bench REPLAY=FILE`,
// `make bench-prompts`, or
//
//     bench MODEL [--json] [--kl3m PATH] [--windows N]   a table of kinds of work (half a minute),
//                                   or one object; PATH: the program whose start is timed (./kl3m),
//                                   N: windows of each kind (15)
//     bench MODEL --replay FILE [-b B] [--json]     what guesses are worth on known text, lines of
//                                   PROMPT TAB TEXT, so many at once (1)
//     bench MODEL --prompts [COUNT [NEW_TOKENS]]    short prompts (1,000) and their texts (of 64)
//     bench --self-check            the roofline against figures worked out by hand
//
// kl3m's own -j, --rows and, where prompts are run, the options of sampling and reading mean what
// they mean there, and so does KL3M_ISA. The limit of a piece of work is the roofline (Williams,
// Waterman and Patterson 2009): the bytes it must read over the bandwidth, or its operations over
// the peak of fused multiply-adds, whichever takes longer. Both limits are measured in the same
// run: on a shared machine they change within seconds.
#define KL3M_TEST
#include "../../kl3m.c"

#include <spawn.h>
#include <sys/wait.h>

extern char **environ;         // macOS declares it nowhere

enum {
    WINDOWS = 15,              // of each kind of work
    PART_BYTES = 1 << 18,      // of the model's file, read as one piece
    READ_AT_ONCE = 256,        // bytes: four vectors of the widest kind
    PEAK_PIECES = 16,
    PEAK_STEPS = 50000,
};

// ---- What a CPU can do ----
// Three loops for each kind of CPU. The first sums up bytes of floats, a multiple of READ_AT_ONCE,
// as fast as memory brings them. The second makes n fused multiply-adds into each of as many sums
// as product_rows has there (ROWS x VECTORS), with nothing to load, and returns how many
// floating-point operations those are. The third does the same with the integers of q8 weights:
// two products of 16 bits a lane, or four of 8. Sums are named as in kl3m.c, and for its reason.

typedef struct {
    const Kernels *kernels;
    float (*read)(long bytes, const char *at);
    double (*multiply_add)(int n, float *sum);
    double (*dot)(int n, float *sum);
} Loops;

#define EACH_SUM(DO, FMA) \
    DO(0, FMA) DO(1, FMA) DO(2, FMA) DO(3, FMA) DO(4, FMA) DO(5, FMA) DO(6, FMA) DO(7, FMA) \
    DO(8, FMA) DO(9, FMA) DO(10, FMA) DO(11, FMA) DO(12, FMA) DO(13, FMA) DO(14, FMA) \
    DO(15, FMA) DO(16, FMA) DO(17, FMA) DO(18, FMA) DO(19, FMA) DO(20, FMA) DO(21, FMA) \
    DO(22, FMA) DO(23, FMA)
#define BEGIN_SUM(i, FMA) vec s##i = y + (float)(i);
#define BEGIN_DOT(i, DOT) vec s##i = y + i;
#define ADD_TO_SUM(i, FMA) if (i < SUMS) s##i = FMA(x, y, s##i);
// A sum is a factor too: else products of the same factors are made once for all.
#define ADD_TO_DOT(i, DOT) if (i < SUMS) s##i = DOT(s##i, x, s##i);
#define END_SUM(i, FMA) total += s##i;

#define LOOPS(KIND, TARGET, SUMS_THERE, FMA, DOT_SUMS, DOT, PRODUCTS) \
    static TARGET float read_##KIND(long bytes, const char *at) { \
        typedef vec_##KIND vec; \
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}; \
        float sum = 0; \
        for (const char *end = at + bytes; at < end; at += 4 * sizeof(vec)) { \
            const vec *v = (const vec *)(const void *)at; \
            s0 += v[0], s1 += v[1], s2 += v[2], s3 += v[3]; \
        } \
        s0 += s1 + s2 + s3; \
        for (size_t i = 0; i < sizeof s0 / sizeof sum; i++) sum += s0[i]; \
        return sum; \
    } \
    static TARGET double multiply_add_##KIND(int n, float *sum) { \
        typedef vec_##KIND vec; \
        enum { SUMS = SUMS_THERE, LANES = sizeof(vec) / sizeof *sum }; \
        vec x = (vec){0} + 0.5f, y = (vec){0} + 0.25f, total = {0}; \
        EACH_SUM(BEGIN_SUM, FMA) \
        for (int i = 0; i < n; i++) { EACH_SUM(ADD_TO_SUM, FMA) } \
        EACH_SUM(END_SUM, FMA) \
        for (int i = 0; i < LANES; i++) *sum += total[i]; \
        return (double)(SUMS * LANES) * 2 * n; \
    } \
    static TARGET double dot_##KIND(int n, float *sum) { \
        typedef ivec_##KIND vec; \
        enum { SUMS = DOT_SUMS, LANES = sizeof(vec) / sizeof *sum }; \
        vec x = (vec){0} + 0x10003, y = (vec){0} + (int)*sum, total = {0}; \
        EACH_SUM(BEGIN_DOT, DOT) \
        for (int i = 0; i < n; i++) { EACH_SUM(ADD_TO_DOT, DOT) } \
        EACH_SUM(END_SUM, DOT) \
        for (int i = 0; i < LANES; i++) *sum += (float)total[i]; \
        return (double)(SUMS * LANES) * 2 * PRODUCTS * n; \
    } \
    static const Loops loops_##KIND = { &kernels_##KIND, read_##KIND, multiply_add_##KIND, \
                                        dot_##KIND };

#define DOT_PLAIN(w, x, s) ((s) + ((w) & 0xFFFF) * ((x) & 0xFFFF) + ((w) >> 16) * ((x) >> 16))
#if defined(__x86_64__)
#define VNNI(w, x, s) (vec)_mm512_dpwssd_epi32((__m512i)(s), (__m512i)(w), (__m512i)(x))
#define MADD_512(w, x, s) ((s) + (vec)_mm512_madd_epi16((__m512i)(w), (__m512i)(x)))
#define MADD_256(w, x, s) ((s) + (vec)_mm256_madd_epi16((__m256i)(w), (__m256i)(x)))
LOOPS(avx512vnni, __attribute__((target("avx512f,avx512bw,avx512vnni,fma"))), 24, _mm512_fmadd_ps,
      24, VNNI, 2)
LOOPS(avx512, __attribute__((target("avx512f,avx512bw,fma"))), 24, _mm512_fmadd_ps, 24, MADD_512, 2)
LOOPS(avx2, __attribute__((target("avx2,fma"))), 12, _mm256_fmadd_ps, 12, MADD_256, 2)
#elif defined(__aarch64__)
static vec_neon fma_neon(vec_neon a, vec_neon b, vec_neon c) {
    return (vec_neon)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#define SDOT(w, x, s) (vec)vdotq_s32((int32x4_t)(s), (int8x16_t)(w), (int8x16_t)(x))
LOOPS(neon, , 24, fma_neon, 16, DOT_PLAIN, 2)
static __attribute__((target("arch=armv8.2-a+dotprod")))
vec_neondot fma_neondot(vec_neondot a, vec_neondot b, vec_neondot c) {
    return (vec_neondot)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
LOOPS(neondot, __attribute__((target("arch=armv8.2-a+dotprod"))), 24, fma_neondot, 16, SDOT, 4)
#endif

static vec_portable fma_portable(vec_portable a, vec_portable b, vec_portable c) {
    for (int i = 0; i < 4; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
LOOPS(portable, , 8, fma_portable, 8, DOT_PLAIN, 2)

static const Loops *loops_for(const Kernels *kernels) {
    static const Loops *const kinds[] = {
#if defined(__x86_64__)
        &loops_avx512vnni, &loops_avx512, &loops_avx2,
#elif defined(__aarch64__)
        &loops_neondot, &loops_neon,
#endif
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (kinds[i]->kernels == kernels) return kinds[i];
    return &loops_portable;
}

// ---- Limits and needs ----

// Bytes, operations on floats, and those on integers; a second, and that a piece of work needs.
typedef struct { double bandwidth, peak, dots; } Limits;
typedef struct { double bytes, operations, dots; } Needs;

// What limits are measured with: the model's file, and pages of keys and values behind it (memory
// differs from place to place too).
typedef struct {
    const Model *m;
    const Loops *loops;
    int parts;                 // of the file
    Page *const *pages;
    long page_bytes;
    double (*peak)(int n, float *sum); // the loop that is measured now: multiply_add or dot
    double operations[PEAK_PIECES];
    volatile float sink;       // what was summed up goes here, so that no compiler drops the sum
} Probe;

static Probe probe_of(const Model *m, const Kernels *kernels) {
    return (Probe){ .m = m, .loops = loops_for(kernels), .parts = (int)(m->size / PART_BYTES),
                    .page_bytes = page_bytes(m) / READ_AT_ONCE * READ_AT_ONCE };
}

// Piece: a part of the model's file, and behind the last such part a page.
static void read_piece(void *arg, int piece, int thread) {
    (void)thread;
    Probe *p = arg;
    bool page = piece >= p->parts;
    const char *at = page ? p->pages[piece - p->parts]->bytes
                          : (const char *)p->m->map + (long)piece * PART_BYTES;
    float sum = p->loops->read(page ? p->page_bytes : PART_BYTES, at);
    if (sum == 1.0f) p->sink = sum;
}

static void peak_piece(void *arg, int piece, int thread) {
    (void)thread;
    Probe *p = arg;
    float sum = 0;
    p->operations[piece] = p->peak(PEAK_STEPS, &sum);
    if (sum == 1.0f) p->sink = sum;
}

static double seconds_of(Probe *p, Run loop, int pieces, bool all) {
    double start = seconds();
    if (all) parallel(pieces, loop, p);
    else for (int piece = 0; piece < pieces; piece++) loop(p, piece, 0);
    return seconds() - start;
}

// Operations a second of one of the loops.
static double peak_of(Probe *p, double (*loop)(int n, float *sum), bool all) {
    double operations = 0;
    p->peak = loop;
    double taken = seconds_of(p, peak_piece, PEAK_PIECES, all);
    for (int i = 0; i < PEAK_PIECES; i++) operations += p->operations[i];
    return operations / taken;
}

// On this thread alone, or on all: how fast the model's file and the first so many pages can be
// read, and how fast sums can be made of nothing.
static Limits measure_limits(Probe *p, int pages, bool all) {
    double bytes = (double)p->parts * (double)PART_BYTES + (double)pages * (double)p->page_bytes;
    double reading = seconds_of(p, read_piece, p->parts + pages, all);
    double peak = peak_of(p, p->loops->multiply_add, all);
    double dots = p->m->quantized ? peak_of(p, p->loops->dot, all) : 0;
    return (Limits){ bytes / reading, peak, dots };
}

// Work, told by what it needs.
typedef struct {
    double passes;             // each of which reads the weights
    double rows, logits;       // rows, and those of them that want logits
    double kept;               // positions whose keys and values are read, of all passes
    double seen;               // positions that each row attends to, summed up
} Task;

static double bytes_of(const Matrix *w) {
    return (double)panels_bytes(w->type, w->outputs, w->inputs);
}

static Needs needs_of(const Model *m, const Task *t) {
    const Matrix *out = &m->embed_out;
    double bytes = t->logits > 0 ? bytes_of(out) : 0, weights = 0;
    for (const Layer *l = m->layers; l < m->layers + m->c.layers; l++) {
        const Matrix *matrices[] = { &l->qkv, &l->dense, &l->up, &l->down };
        for (int i = 0; i < 4; i++) {
            bytes += bytes_of(matrices[i]);
            weights += (double)matrices[i]->outputs * matrices[i]->inputs;
        }
    }
    double position = (double)page_bytes(m) / (double)PAGE;
    double multiplied = 2 * (t->rows * weights + t->logits * out->outputs * out->inputs);
    double attention = 4 * t->seen * m->c.layers * m->c.q;
    if (m->quantized)
        return (Needs){ t->passes * bytes + t->kept * position, attention, multiplied };
    return (Needs){ t->passes * bytes + t->kept * position, multiplied + attention, 0 };
}

// Seconds of the processor's.
static double computing(Needs n, Limits l) {
    return n.operations / l.peak + (n.dots > 0 ? n.dots / l.dots : 0);
}

// A pass: `rows` rows from position `from` on of each of some sequences, of which so many want
// logits.
typedef struct { int sequences, from, rows, logits; } Pass;

static int n_of(Pass p) { return p.sequences * p.rows; }

// Seconds that it takes at least.
static double roofline(const Model *m, Limits l, Pass p) {
    double n = n_of(p);
    Task task = { .passes = 1, .rows = n, .logits = p.logits,
                  .kept = (double)p.sequences * (p.from + p.rows),
                  .seen = n * (p.from + (p.rows + 1) / 2.0) };
    Needs needs = needs_of(m, &task);
    return fmax(needs.bytes / l.bandwidth, computing(needs, l));
}

// kl3m-002-170m: 134.4 M weights are read for a token, 100.9 M of them without the vocabulary.
static int self_check(void) {
    enum { LAYERS = 16, HIDDEN = 1024, VOCAB = 32768 };
    Layer layers[LAYERS];
    Matrix square = { NULL, TYPE_F32, HIDDEN, HIDDEN };
    Model m = { .layers = layers, .kv_type = TYPE_F32,
                .c = { .layers = LAYERS, .kv_heads = 16, .head_size = 64, .q = HIDDEN },
                .embed_out = { NULL, TYPE_F32, VOCAB, HIDDEN } };
    for (int i = 0; i < LAYERS; i++)
        layers[i] = (Layer){ .qkv = { NULL, TYPE_F32, 3 * HIDDEN, HIDDEN }, .dense = square,
                             .up = square, .down = square };
    const Limits memory = { 1, INFINITY, INFINITY }, arithmetic = { INFINITY, 1, 1 };
    const double weights = 16 * 6 * 1048576.0, table = 32 * 1048576.0, all = weights + table;
    // Of a position 4 * 2 * 16 * 1024 bytes of keys and values, and 4 * 16 * 1024 operations.
    const double keys = 131072, attention = 65536;
    const struct { Limits limits; Pass pass; double want; } cases[] = {
        { memory, { 1, 0, 1, 1 }, 4 * all + keys },
        { memory, { 1, 3839, 1, 1 }, 4 * all + 3840 * keys },
        { memory, { 16, 0, 1, 16 }, 4 * all + 16 * keys },
        { memory, { 1, 256, 256, 0 }, 4 * weights + 512 * keys },
        { arithmetic, { 1, 0, 1, 1 }, 2 * all + attention },
        { arithmetic, { 16, 0, 1, 16 }, 16 * (2 * all + attention) },
        { arithmetic, { 1, 100, 2, 0 }, 4 * weights + (101 + 102) * attention },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double got = roofline(&m, cases[i].limits, cases[i].pass);
        if (!(fabs(got - cases[i].want) < 0.5))
            die("case %zu of the roofline: %.0f, expected %.0f", i, got, cases[i].want);
    }
    return OK;
}

// ---- The command line ----

typedef struct {
    const char *model, *replay, *kl3m;
    bool prompts, self_check;
    long windows, count, new_tokens;
} Asked;

static Asked asked = { .kl3m = "./kl3m", .windows = WINDOWS, .count = 1000, .new_tokens = 64 };

static const Option own_options[] = {
    { .name = "replay", .kind = TEXT, .address = &asked.replay },
    { .name = "kl3m", .kind = TEXT, .address = &asked.kl3m },
    { .name = "windows", .kind = WHOLE, .address = &asked.windows, .least = 1, .most = WINDOWS },
    { .name = "prompts", .kind = FLAG, .address = &asked.prompts },
    { .name = "self-check", .kind = FLAG, .address = &asked.self_check },
};

enum { OWN_OPTIONS = sizeof own_options / sizeof *own_options };

__attribute__((noreturn))
static void wrong_use(const char *what) {
    message("%s; usage: bench MODEL [--json] [--kl3m PATH] [--windows N] [-j J], bench MODEL "
            "--replay FILE [-b B] [--json], bench MODEL --prompts [COUNT [NEW_TOKENS]]", what);
    exit(USAGE);
}

// --name, --name=value or --name value of an option of ours, at argv[i]. Returns the last argument
// that it took, or 0: it is none of them.
static int parse_own(int argc, char **argv, int i) {
    const char *name = strncmp(argv[i], "--", 2) == 0 ? argv[i] + 2 : "", *value;
    size_t n = strcspn(name, "=");
    for (const Option *o = own_options; o < own_options + OWN_OPTIONS; o++) {
        if (strlen(o->name) != n || memcmp(o->name, name, n) != 0) continue;
        bool flag = o->kind == FLAG;
        value = name[n] ? name + n + 1 : !flag && i + 1 < argc ? argv[++i] : NULL;
        if (flag != (value == NULL))
            wrong_use(format_string("--%s %s", o->name, flag ? "takes no value" : "needs a value"));
        if (flag) *(bool *)o->address = true;
        else if (o->kind == WHOLE) parse_number(o, value);
        else *(const char **)o->address = value;
        return i;
    }
    return 0;
}

// Of kl3m's options that were given, those that `takes` does not name mean nothing here.
static void refuse_others(const char *takes) {
    for (size_t n; *takes; takes += n + (takes[n] == ' ')) {
        n = strcspn(takes, " ");
        given[find_option(0, takes, n) - option_table] = false;
    }
    for (int i = 0; i < OPTIONS; i++)
        if (given[i])
            wrong_use(format_string("%s means nothing here", title_of(&option_table[i]).text));
}

static void parse(int argc, char **argv) {
    const Option count = { .name = "prompts", .kind = WHOLE, .address = &asked.count, .least = 1,
                           .most = INT_MAX };
    Option new_tokens = count;
    const char *places[3] = { NULL };
    int n = 0;
    for (int i = 1, last; i < argc; i++) {
        if ((last = parse_own(argc, argv, i)) != 0) i = last;
        else if (strncmp(argv[i], "--", 2) == 0) i = parse_long(argc, argv, i);
        else if (argv[i][0] == '-' && argv[i][1]) i = parse_letters(argc, argv, i);
        else if (n < 3) places[n++] = argv[i];
        else wrong_use(format_string("'%s' is too much", argv[i]));
    }
    asked.model = places[0];
    new_tokens.address = &asked.new_tokens;
    if (asked.self_check) return;
    if (asked.model == NULL) wrong_use("no MODEL was given");
    if (n > 1 && !asked.prompts) wrong_use(format_string("'%s' is too much", places[1]));
    if (n > 1) parse_number(&count, places[1]);
    if (n > 2) parse_number(&new_tokens, places[2]);
    if (asked.prompts && asked.replay) wrong_use("--prompts and --replay exclude each other");
    const char *takes = "threads rows json";
    if (asked.replay) takes = "threads batch rows kv-memory json no-escape no-special temperature "
                              "top-k top-p min-p repetition-penalty";
    if (asked.prompts) takes = "threads batch rows kv-memory temperature top-k top-p min-p "
                               "repetition-penalty";
    refuse_others(takes);
}

// ---- The table ----
// Each window of work stands between two measurements of the limits, and the share is the median
// of the windows' own shares.

static const char first_prompt[] = "Governing Law.\nThis Agreement";

typedef struct {
    const char *title;         // with a %d for `number`
    int number, sequences;
    int from, step;            // where a sequence's first window begins; the next one behind that
    int tokens, rows;          // of a sequence, in a window and in a pass
    bool scored;               // each row wants logits, and they are looked at as --score does
    double speed, limit, share;        // tokens a second, tokens a second, median
} BenchWork;

typedef struct {
    const Model *m;
    const Kernels *kernels;
    Probe probe;
    Work work;
    KVCache kv;
    Sequence *sequences;       // [USUAL_BATCH]
    Row *rows;                 // of the largest pass
    Sampler *samplers;         // [threads]
} Bench;

typedef struct {
    Limits one, all;           // of one thread, of all
    BenchWork *works;
    int n_works;
    int first_tokens;          // of first_prompt
    double first, first_pass;  // seconds: from the shell to the first token, and the pass itself
} BenchResult;

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_size);
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// A text that is read window by window has all of them, however few were asked for.
static int windows_of(const BenchWork *w) { return w->step ? WINDOWS : (int)asked.windows; }

// The pass of a window that begins `done` tokens behind its first position. The last token
// of a text wants logits.
static Pass pass_of(const BenchWork *w, int window, int done) {
    int left = w->tokens - done, rows = left < w->rows ? left : w->rows;
    bool last = (w->step == 0 || window == WINDOWS - 1) && rows == left;
    return (Pass){ w->sequences, w->from + window * w->step + done, rows,
                   .logits = w->scored ? rows : w->rows == 1 || last ? w->sequences : 0 };
}

// Piece: a row's logits.
static void rank_piece(void *arg, int row, int thread) {
    const Bench *b = arg;
    const float *logits = logits_of(&b->work, row);
    Ranked found[2];
    if (b->kernels->all_finite(b->m->c.vocab, logits))
        find_ranks(&b->samplers[thread], logits, b->m->c.vocab, 0, 1, found);
}

static void run_bench_pass(Bench *b, Pass p) {
    int n = 0;
    for (int s = 0; s < p.sequences; s++)
        for (int i = 0; i < p.rows; i++) {
            int position = p.from + i;
            uint32_t token = (uint32_t)((position + 1) * 7919 + s) % (uint32_t)b->m->c.vocab;
            bool wanted = p.logits == n_of(p) || (p.logits > 0 && i == p.rows - 1);
            b->rows[n++] = (Row){ &b->sequences[s], position, token, wanted };
        }
    forward(&b->work, b->rows, n);
    if (p.rows > 1 && p.logits == n) parallel(n, rank_piece, b);
}

static double run_window(Bench *b, const BenchWork *w, int window) {
    double start = seconds();
    for (int done = 0; done < w->tokens; done += w->rows)
        run_bench_pass(b, pass_of(w, window, done));
    return seconds() - start;
}

// The seconds that it takes at least.
static double least_seconds(const Model *m, const BenchWork *w, int window, Limits limits) {
    double least = 0;
    for (int done = 0; done < w->tokens; done += w->rows)
        least += roofline(m, limits, pass_of(w, window, done));
    return least;
}

static void run_work(Bench *b, BenchWork *w) {
    double shares[WINDOWS], taken = 0, least_taken = 0, tokens = 0;
    int n = 0, pages = w->from / PAGE;
    run_window(b, w, 0);                       // its memory is touched for the first time
    Limits before = measure_limits(&b->probe, pages, true), after;
    for (; n < windows_of(w) && !interrupted; n++, before = after) {
        double work = run_window(b, w, n);
        after = measure_limits(&b->probe, pages, true);
        Limits between = { (before.bandwidth + after.bandwidth) / 2,
                           (before.peak + after.peak) / 2, (before.dots + after.dots) / 2 };
        double least = least_seconds(b->m, w, n, between);
        shares[n] = least / work;
        taken += work, least_taken += least, tokens += w->sequences * w->tokens;
    }
    if (interrupted) return;
    w->speed = tokens / taken;
    w->limit = tokens / least_taken;
    w->share = median(shares, n);
}

// Seconds from the start of a new process of kl3m to the first byte of its text.
static double first_token_seconds(const Model *m) {
    char threads[16], byte, *arguments[] = {
        (char *)(uintptr_t)asked.kl3m, "-m", (char *)(uintptr_t)m->path, "-j", threads, "-p",
        (char *)(uintptr_t)first_prompt, "-n", "1", "-t", "0", "--no-echo", NULL };
    int ends[2];
    pid_t child;
    posix_spawn_file_actions_t actions;
    snprintf(threads, sizeof threads, "%d", pool.threads);
    if (pipe(ends) != 0 || posix_spawn_file_actions_init(&actions) != 0)
        die("cannot make a pipe: %s", strerror(errno));
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    double start = seconds();
    int error = posix_spawn(&child, asked.kl3m, &actions, NULL, arguments, environ);
    if (error)
        die("cannot start %s: %s; make builds it, and --kl3m PATH says where it is", asked.kl3m,
            strerror(error));
    close(ends[1]);
    bool some = read(ends[0], &byte, 1) == 1;
    double taken = seconds() - start;
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {}
    if (!some && !interrupted) die("%s wrote nothing", asked.kl3m);
    close(ends[0]);
    posix_spawn_file_actions_destroy(&actions);
    return taken;
}

// The limits, and from the shell to the first token. The first time only warms up.
static void measure_machine(Bench *b, Model *m, BenchResult *r) {
    uint32_t ids[sizeof first_prompt];
    double one[3][WINDOWS], all[3][WINDOWS], passes[WINDOWS], ratios[WINDOWS];
    int n = (int)asked.windows;
    r->first_tokens = (int)encode(m, false, first_prompt, strlen(first_prompt), ids);
    BenchWork first = { .sequences = 1, .tokens = r->first_tokens, .rows = r->first_tokens };
    for (int i = -1; i < n && !interrupted; i++) {
        int at = i < 0 ? 0 : i;
        Limits alone = measure_limits(&b->probe, 0, false);
        Limits together = measure_limits(&b->probe, 0, true);
        one[0][at] = alone.bandwidth, one[1][at] = alone.peak, one[2][at] = alone.dots;
        all[0][at] = together.bandwidth, all[1][at] = together.peak, all[2][at] = together.dots;
        passes[at] = run_window(b, &first, 0);
        ratios[at] = first_token_seconds(m) / passes[at];
    }
    if (interrupted) return;
    r->one = (Limits){ median(one[0], n), median(one[1], n), median(one[2], n) };
    r->all = (Limits){ median(all[0], n), median(all[1], n), median(all[2], n) };
    r->first_pass = median(passes, n);
    r->first = median(ratios, n) * r->first_pass;
}

static Bytes title_of_work(const BenchWork *w) {
    Bytes title = {0};
    const char *number = strstr(w->title, "%d");
    append(&title, w->title, number ? (size_t)(number - w->title) : strlen(w->title));
    if (number) append_format(&title, "%d%s", w->number, number + 2);
    return title;
}

static void show_table(const Bench *b, const BenchResult *r) {
    enum { BAR = 24 };
    Bytes out = {0};
    append_text(&out, b->m->path, strlen(b->m->path), IN_A_LINE);
    append_format(&out, ", %.0f MB, %s, %d thread%s\n\n", (double)b->m->size * 1e-6,
                  b->kernels->name, pool.threads, pool.threads > 1 ? "s" : "");
    append_format(&out, "%-28s %9s %9s\n", "this machine", "1 thread", "all");
    append_format(&out, "%-28s %9.1f %9.1f  GB/s\n", "reads", r->one.bandwidth * 1e-9,
                  r->all.bandwidth * 1e-9);
    append_format(&out, "%-28s %9.1f %9.1f  GFLOP/s\n", "multiplies and adds",
                  r->one.peak * 1e-9, r->all.peak * 1e-9);
    if (b->m->quantized)
        append_format(&out, "%-28s %9.1f %9.1f  G operations/s\n", "the same with integers",
                      r->one.dots * 1e-9, r->all.dots * 1e-9);
    append_string(&out, "\n");
    append_format(&out, "%-28s %9s %9s  share of the limit\n", "this model", "tokens/s", "limit");
    for (const BenchWork *w = r->works; w < r->works + r->n_works; w++) {
        Bytes title = title_of_work(w);
        append_format(&out, "%-28s %9.1f %9.1f  %3.0f%% ", title.data, w->speed, w->limit,
                      100 * w->share);
        for (int i = 0; i < BAR; i++)
            append_string(&out, i + 0.5 < w->share * (double)BAR ? "#" : ".");
        append_string(&out, "\n");
        free(title.data);
    }
    append_format(&out, "%-28s %9.1f ms, %.2f times the pass of %d tokens itself\n",
                  "shell to first token", r->first * 1e3, r->first / r->first_pass,
                  r->first_tokens);
    print(&out);
}

// The same for scripts: bytes, operations and tokens a second, seconds.
static void show_object(const Bench *b, const BenchResult *r) {
    Bytes out = {0};
    append_json(&out, "{\"model\": ", b->m->path, strlen(b->m->path));
    append_json(&out, ", \"isa\": ", b->kernels->name, strlen(b->kernels->name));
    append_format(&out, ", \"threads\": %d, \"bandwidth\": [%.4g, %.4g]", pool.threads,
                  r->one.bandwidth, r->all.bandwidth);
    append_format(&out, ", \"peak\": [%.4g, %.4g], \"work\": [", r->one.peak, r->all.peak);
    for (const BenchWork *w = r->works; w < r->works + r->n_works; w++) {
        Bytes title = title_of_work(w);
        append_json(&out, w == r->works ? "{\"name\": " : ", {\"name\": ", title.data, title.size);
        append_format(&out, ", \"tokens_per_second\": %.2f, \"limit\": %.2f, \"share\": %.4f}",
                      w->speed, w->limit, w->share);
        free(title.data);
    }
    append_format(&out, "], \"first_token\": {\"prompt_tokens\": %d, \"seconds\": %.5f, ",
                  r->first_tokens, r->first);
    append_format(&out, "\"pass_seconds\": %.5f}}\n", r->first_pass);
    print(&out);
}

// Sequences with room for positions up to `far`, of the first, and `near`, of the others; passes of
// so many rows.
static Bench bench_open(const Model *m, const Kernels *kernels, int far, int near, int rows) {
    int most = rows < USUAL_BATCH ? USUAL_BATCH : rows;
    Bench b = { .m = m, .kernels = kernels, .probe = probe_of(m, kernels), .kv = kv_open(m),
                .work = work_open(m, kernels, most, most) };
    b.rows = allocate((size_t)most, sizeof *b.rows);
    b.sequences = allocate(USUAL_BATCH, sizeof *b.sequences);
    b.samplers = allocate((size_t)pool.threads, sizeof *b.samplers);
    for (int i = 0; i < pool.threads; i++) b.samplers[i] = sampler_open(kernels, m->c.vocab);
    for (int i = 0; i < USUAL_BATCH; i++) {
        Sequence *s = &b.sequences[i];
        kv_reserve(&b.kv, s, i ? near : far);
        for (int p = 0; p < s->n_pages; p++)   // memory that was never written is not memory yet
            memset(s->pages[p]->bytes, 0, (size_t)b.kv.page_bytes);
    }
    b.probe.pages = b.sequences[0].pages;
    return b;
}

static void bench_close(Bench *b) {
    for (int i = 0; i < USUAL_BATCH; i++) kv_free(&b->kv, &b->sequences[i]);
    kv_close(&b->kv);
    work_close(&b->work);
    for (int i = 0; i < pool.threads; i++) sampler_close(&b->samplers[i]);
    free(b->samplers);
    free(b->sequences);
    free(b->rows);
}

static int table(Model *m, const Kernels *kernels) {
    // As far as the context reaches: 3,840 positions are 15 windows of 256, and some are left to
    // decode at.
    enum { LEAST_WINDOW = 16, SOME = 16, DECODED = 8 };
    int context = m->c.context, far = (context - context / 16) / WINDOWS * WINDOWS;
    int window = far / WINDOWS, near = window / 16, prompt = 2 * window;
    int rows = rows_of_pass(options.settings.rows, USUAL_ROWS, context);
    if (window < LEAST_WINDOW)
        die("%s: a context of %d tokens is too short to measure in", m->path, context);
    BenchWork works[] = {
        { "decode", .sequences = 1, .from = near, .tokens = DECODED, .rows = 1 },
        { "decode at position %d", far, .sequences = 1, .from = far, .tokens = 4, .rows = 1 },
        { "prefill of %d tokens", prompt, .sequences = 1, .tokens = prompt, .rows = rows },
        { "prefill of %d tokens", far, .sequences = 1, .tokens = window, .rows = rows,
          .step = window },
        { "score of %d tokens", prompt, .sequences = 1, .tokens = prompt, .rows = rows,
          .scored = true },
        { "decode, %d sequences at once", SOME, .sequences = SOME, .from = near, .tokens = 4,
          .rows = 1 },
        { "decode, %d sequences at once", USUAL_BATCH, .sequences = USUAL_BATCH, .from = near,
          .tokens = 2, .rows = 1 },
    };
    BenchResult result = { .works = works, .n_works = sizeof works / sizeof *works };
    Bench b = bench_open(m, kernels, far + DECODED, near + DECODED, rows);
    measure_machine(&b, m, &result);
    for (int i = 0; i < result.n_works && !interrupted; i++) run_work(&b, &works[i]);
    if (!interrupted) (options.json ? show_object : show_table)(&b, &result);
    bench_close(&b);
    return interrupted;
}

// ---- Known text ----
// Lines of a prompt, a tab and its continuation are decoded as if the sampler had picked the
// continuation, some at a time, and each time twice: one token a pass, and with guesses.

typedef struct {
    char *prompt;              // [prompt_size]
    size_t prompt_size;
    uint32_t *ids;             // [n] the continuation
    int n;
    long number;               // in the file, from 1
} ReplayLine;

typedef struct {
    double seconds;            // behind the first token of each time
    long draws, decoded, guesses;
    PassTime time;             // carried over from time to time
} ReplayFigures;

typedef struct {
    Model *m;
    const Kernels *kernels;
    Settings settings;
    ReplayLine *lines;         // [n_lines] of this time
    int n_lines, next;
    bool tells;                // of lines that cannot be run: each is, twice
    double ended;              // seconds()
    bool failed;               // a line could not be run
} Replay;

static Request *next_line(void *arg, bool wait, bool *ended) {
    (void)wait;
    Replay *p = arg;
    *ended = p->next == p->n_lines;
    if (*ended) return NULL;
    const ReplayLine *l = &p->lines[p->next++];
    PromptRules rules = { .no_special = options.rules.no_special, .new_tokens = l->n };
    Request *r = new_request(p->m, &rules, &p->settings, l->prompt, l->prompt_size,
                             NULL);
    if (!r->error && r->limit < l->n)
        r->error = format_string("the prompt and its text have %d tokens, the context holds %d; "
                                 "shorten them", r->n + l->n, p->m->c.context);
    r->line = l->number;
    r->forced = l->ids;
    return r;
}

static void line_done(void *arg, Request *r) {
    Replay *p = arg;
    p->ended = seconds();
    if (r->error && p->tells) message("line %ld: %s", r->line, r->error);
    p->failed |= r->error != NULL;
}

// Runs the lines of this time and adds their figures to f.
static void replay_lines(Replay *p, Guesses *guesses, ReplayFigures *f) {
    Client client = { p, .next = next_line, .done = line_done };
    p->settings.batch = p->n_lines;
    p->next = 0;
    p->tells = guesses != NULL;
    Scheduler s = scheduler_open(p->m, p->kernels, p->settings, client, guesses);
    s.time = f->time;
    schedule(&s);
    f->seconds += s.figures.tokens > 0 ? p->ended - s.figures.first_token : 0;
    f->draws += s.figures.draws;
    f->decoded += s.figures.decoded;
    f->guesses += s.figures.guesses;
    f->time = s.time;
    scheduler_close(&s);
}

// A line without a tab, or with nothing behind it, is no line of a replay.
static ReplayLine parse_line(Model *m, const Records *in, char *text, size_t n) {
    char *tab = memchr(text, '\t', n), *rest = tab ? tab + 1 : text + n;
    size_t rest_size = (size_t)(text + n - rest);
    ReplayLine l = { .number = in->line, .prompt_size = tab ? (size_t)(tab - text) : 0 };
    if (!options.source.no_escape) {
        l.prompt_size = unescape(text, l.prompt_size);
        rest_size = unescape(rest, rest_size);
    }
    l.ids = allocate(most_ids(m, rest_size) + 1, sizeof *l.ids);
    l.n = (int)encode(m, options.rules.no_special, rest, rest_size, l.ids);
    if (l.n == 0)
        die("%s: line %ld is not a prompt, a tab and its continuation", in->name, in->line);
    l.prompt = memcpy(allocate(l.prompt_size + 1, 1), text, l.prompt_size);
    return l;
}

// The next lines of the file, at most so many. Returns how many.
static int read_lines(Replay *p, Records *in, int most) {
    char *text;
    size_t n;
    for (p->n_lines = 0; p->n_lines < most && next_record(in, true, &text, &n) == 1;)
        p->lines[p->n_lines++] = parse_line(p->m, in, text, n);
    return p->n_lines;
}

static void show_replay(const ReplayFigures *alone, const ReplayFigures *guessed) {
    double passes = (double)guessed->decoded / (double)guessed->draws;
    long came_true = guessed->decoded - guessed->draws;
    double slow = (double)alone->decoded / alone->seconds;
    double speed = (double)guessed->decoded / guessed->seconds;
    Bytes out = {0};
    if (options.json) {
        append_format(&out, "{\"tokens\": %ld, \"tokens_per_pass\": %.4f, \"guesses\": %ld, ",
                      guessed->decoded, passes, guessed->guesses);
        append_format(&out, "\"guesses_true\": %ld, \"tokens_per_second\": [%.2f, %.2f]}\n",
                      came_true, slow, speed);
    } else {
        append_format(&out, "%-28s %11s %9s\n", "decoding of known text", "tokens/pass",
                      "tokens/s");
        append_format(&out, "%-28s %11.2f %9.1f\n", "one token a pass", 1.0, slow);
        append_format(&out, "%-28s %11.2f %9.1f, %.2f times as fast\n", "with guesses", passes,
                      speed, speed / slow);
        append_format(&out, "%ld tokens; %ld of %ld guesses came true\n", guessed->decoded,
                      came_true, guessed->guesses);
    }
    print(&out);
}

static int replay(Model *m, const Kernels *kernels) {
    Records in = { .fd = open_input(asked.replay), .name = asked.replay, .delimiter = '\n' };
    Replay p = { .m = m, .kernels = kernels, .settings = options.settings };
    long batch = options.settings.batch ? options.settings.batch : 1;
    int at_once = batch < MOST_BATCH ? (int)batch : MOST_BATCH;
    ReplayFigures alone = {0}, guessed = {0};
    Guesses guesses = guesses_open(m);
    p.settings.ignore_eos = true;
    p.lines = allocate((size_t)at_once, sizeof *p.lines);
    for (int turn = 0; !interrupted && read_lines(&p, &in, at_once) > 0; turn++) {
        for (int i = 0; i < 2; i++) {          // one first, then the other
            bool guess = (turn + i) % 2;
            replay_lines(&p, guess ? &guesses : NULL, guess ? &guessed : &alone);
        }
        for (int i = 0; i < p.n_lines; i++) free(p.lines[i].prompt), free(p.lines[i].ids);
    }
    guesses_close(&guesses);
    if (in.fd != STDIN_FILENO) close(in.fd);
    free(in.buffer.data);
    free(p.lines);
    if (interrupted) return interrupted;
    if (guessed.draws == 0)
        die("%s: there is nothing to decode: no line has two tokens behind its tab", asked.replay);
    show_replay(&alone, &guessed);
    return p.failed ? SOME_FAILED : OK;
}

// ---- Short prompts ----
// Run as kl3m runs the lines of its standard input. Every second or so they wait, between two
// passes, while the limits are measured; so it is known how many bytes and operations the machine
// could have had in the time that the prompts took, from before the first to behind the last. The
// larger of the shares that they needed is their share of the roofline. They need, for each text, a
// row for each token but the last, the logits of each token drawn and attention to all before it;
// and the weights once a pass. Guesses that did not come true are no need. Then some of the prompts
// are run again, one at a time and without guesses.

typedef struct {
    Model *m;
    Settings settings;
    Probe probe;
    long prompts, begun;
    Limits limits, least, most;        // the last that were measured, the least and the most
    double resumed;            // seconds(): when the prompts went on after that
    double taken;              // seconds that they took before it
    Needs could;               // what the machine could have had
    Task task;
    Figures figures;
} PromptFile;

static void note_limits(PromptFile *f, double taken) {
    Limits l = measure_limits(&f->probe, 0, true), before = f->limits;
    f->taken += taken;
    f->could.bytes += taken * (l.bandwidth + before.bandwidth) / 2;
    f->could.operations += taken * (l.peak + before.peak) / 2;
    f->could.dots += taken * (l.dots + before.dots) / 2;
    f->least = (Limits){ fmin(f->least.bandwidth, l.bandwidth), fmin(f->least.peak, l.peak), 0 };
    f->most = (Limits){ fmax(f->most.bandwidth, l.bandwidth), fmax(f->most.peak, l.peak), 0 };
    f->limits = l;
    f->resumed = seconds();
}

// Two openings with a number between them, which makes each prompt another one.
static Request *next_of_file(void *arg, bool wait, bool *ended) {
    (void)wait;
    PromptFile *f = arg;
    *ended = f->begun == f->prompts;
    if (*ended) return NULL;
    long i = f->begun++;
    PromptRules rules = { .new_tokens = asked.new_tokens, .seed = 1 };
    char *text = format_string("%s%ld. %s", openings[i % OPENINGS], i,
                               openings[i / OPENINGS % OPENINGS]);
    Request *r = new_request(f->m, &rules, &f->settings, text, strlen(text), NULL);
    free(text);
    if (r->error) die("%s", r->error);
    return r;
}

static void between_passes(void *arg, const Continuation *c) {
    (void)c;
    PromptFile *f = arg;
    double taken = seconds() - f->resumed;
    if (taken > 1) note_limits(f, taken);
}

// A prompt's keys and values are read once, then for each token.
static void count_needs(void *arg, Request *r) {
    Task *t = &((PromptFile *)arg)->task;
    int drawn = r->continuations[0].n;
    double prompt = r->n, rows = prompt + drawn - 1, seen = rows * (rows + 1) / 2;
    t->rows += rows;
    t->logits += drawn;
    t->seen += seen;
    t->kept += prompt + seen - prompt * (prompt + 1) / 2;
}

// So many prompts, from the first on.
static PromptFile run_prompts(Model *m, const Kernels *kernels, Settings settings, long prompts,
                              Guesses *guesses) {
    PromptFile f = { .m = m, .settings = settings, .probe = probe_of(m, kernels),
                     .prompts = prompts, .least = { INFINITY, INFINITY, 0 } };
    Client client = { &f, .next = next_of_file, .grown = between_passes, .done = count_needs };
    f.settings.ignore_eos = true;
    Scheduler s = scheduler_open(m, kernels, f.settings, client, guesses);
    note_limits(&f, 0);
    schedule(&s);
    note_limits(&f, seconds() - f.resumed);
    f.figures = s.figures;
    f.task.passes = (double)s.figures.passes;
    scheduler_close(&s);
    return f;
}

static void show_prompts(const Kernels *kernels, const PromptFile *f, const PromptFile *alone) {
    double speed = (double)f->figures.tokens / f->taken;
    double slow = (double)alone->figures.tokens / alone->taken;
    Needs needed = needs_of(f->m, &f->task);
    double bytes = needed.bytes / f->could.bytes;
    double operations = needed.operations / f->could.operations;
    if (needed.dots > 0) operations += needed.dots / f->could.dots;
    Bytes out = {0};
    append_format(&out, "%ld prompts, %ld new tokens, %ld passes in %.1f s, %.1f tokens/s, ",
                  f->begun, f->figures.tokens, f->figures.passes, f->taken, speed);
    append_format(&out, "%s, %d threads\n", kernels->name, pool.threads);
    append_format(&out, "multiplies and adds    %6.1f to %6.1f GFLOP/s, needed %5.1f%%\n",
                  f->least.peak * 1e-9, f->most.peak * 1e-9, 100 * operations);
    append_format(&out, "reads                  %6.1f to %6.1f GB/s,    needed %5.1f%%\n",
                  f->least.bandwidth * 1e-9, f->most.bandwidth * 1e-9, 100 * bytes);
    append_format(&out, "share of the roofline  %.1f%%\n", 100 * fmax(bytes, operations));
    append_format(&out, "one at a time          %.1f tokens/s without guesses; ", slow);
    append_format(&out, "together %.1f times as fast\n", speed / slow);
    print(&out);
}

static int prompts(Model *m, const Kernels *kernels) {
    enum { ALONE = 8 };
    Settings one = options.settings;
    one.batch = 1;
    Guesses guesses = guesses_open(m);
    PromptFile f = run_prompts(m, kernels, options.settings, asked.count, &guesses), alone;
    if (!interrupted)
        alone = run_prompts(m, kernels, one, asked.count < ALONE ? asked.count : ALONE, NULL);
    if (!interrupted) show_prompts(kernels, &f, &alone);
    guesses_close(&guesses);
    return interrupted;
}

int main(int argc, char **argv) {
    hold_standard_streams();
    catch_signals();
    parse(argc, argv);
    if (asked.self_check) return self_check();
    terminal = isatty(STDOUT_FILENO);
    limit_kv_memory(&options.settings);
    Model m = model_open(asked.model);
    const Kernels *kernels = find_kernels();
    keep_denormals();
    threads_start(options.threads ? (int)options.threads : usable_cpus());
    int status = (asked.replay ? replay : asked.prompts ? prompts : table)(&m, kernels);
    flush_stdout();
    threads_stop();
    model_close(&m);
    return status;
}
