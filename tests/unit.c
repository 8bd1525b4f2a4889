// Looks inside kl3m.c, where the command line cannot: built and run by test_unit.py and
// live/sampling.py.
//
//     unit math          compares exp, GELU, norms, sines and powers with the C library's double or
//                        long double
//     unit philox        the generator's known answers
//     unit utf8          every sequence of up to 4 bytes that can matter, against a plain
//                        description of UTF-8
//     unit threads       every piece is run once, whatever the threads do
//     unit stack         workers have the stack that an unoptimized product needs
//     unit prefill       how the rows of a pass are divided among prompts
//     unit guesses       the table of guesses beside plain counting over the whole text
//     unit many MODEL    20 texts by 1, 2, 3, 5 and 7 threads, however few CPUs there are
//     unit pass_time     what a row costs, found again from passes that obey a known line
//     unit distribution  reads f64 { temperature, top_k, top_p, min_p, penalty, n, n_history,
//                        masked }, n f32 logits, n_history u32 ids and, if masked, a bit of u64s
//                        for each token that is allowed, from standard input, again and again;
//                        writes a line "id probability ..."
#define KL3M_TEST
#include "../kl3m.c"

static double largest_error;

static void worst(double got, double want, double unit) {
    double error = fabs(got - want) / unit;
    if (!(error <= largest_error)) largest_error = error;
}

static void say(const char *kind, const char *what, double limit) {
    printf("%-8s %-44s %.3g, at most %.3g%s\n", kind, what, largest_error, limit,
           largest_error <= limit ? "" : " FAILED");
    if (!(largest_error <= limit)) exit(1);
    largest_error = 0;
}

static void check_kernels(const Kernels *k) {
    static float tile[2 * BLOCK_FLOATS], out[2 * BLOCK_FLOATS];
    // Row 0 of a tile of scores: e^x beside e^0, so that the largest is 0.
    for (double x = -86; x <= 0; x += 86.0 / 400000) {
        tile[0] = (float)x;
        tile[1] = 0;
        k->softmax(2, tile);
        double want = exp((double)(float)x);
        worst(tile[0], want, want * 0x1p-24);
    }
    say(k->name, "exp, units in the last place", 3);
    for (double x = -40; x <= 40; x += 1e-4) {
        tile[0] = (float)x;
        k->finish(1, tile, &(Finish){ .gelu = true, .out = out, .row_stride = BLOCK,
                                      .block_stride = BLOCK_FLOATS });
        double exact = (float)x * 0.5 * erfc(-(float)x / sqrt(2));
        worst(out[0], exact, fabs(x) < 1 ? 1 : fabs(x));
    }
    say(k->name, "GELU, absolute or relative to |x|", 1.2e-7);
    // Of n numbers the largest of every 16th, 256 at a time; and with one that is not finite among
    // them.
    static const float broken[] = { INFINITY, -INFINITY, NAN };
    for (int n = 1; n <= 1100; n++) {
        float x[1100], most[80];
        for (int i = 0; i < n; i++) x[i] = (float)(100 * sin(i * i + n));
        k->maxima(n, x, most);
        worst(k->all_finite(n, x), true, 1);
        for (int i = 0; i < (n + 255) / 256 * 16; i++) {
            float largest = -INFINITY;
            for (int j = i / 16 * 256 + i % 16; j < n && j < i / 16 * 256 + 256; j += 16)
                largest = fmaxf(largest, x[j]);
            worst(most[i] == largest, true, 1);
        }
        x[n * 7 % 13 * n / 13] = broken[n % 3];
        worst(k->all_finite(n, x), false, 1);
    }
    say(k->name, "the largest of many, and whether all are finite", 0);
    // A norm over 29 columns of 3 rows, with weights and biases.
    for (int n = 1; n <= 32; n++) {
        float weight[PAIR] = {0}, bias[PAIR] = {0};
        memset(tile, 0, sizeof tile);
        for (int i = 0; i < n; i++) {
            weight[i] = (float)(1 + 0.1 * sin(i));
            bias[i] = (float)cos(i);
            for (int r = 0; r < 3; r++) *cell(tile, r, i) = (float)(5 * sin(i * i + r) + r);
        }
        k->layer_norm((Norm){ n, 1e-5f, weight, bias }, 3, tile, out);
        for (int r = 0; r < 3; r++) {
            double mean = 0, variance = 0;
            for (int i = 0; i < n; i++) mean += *cell(tile, r, i) / (double)n;
            for (int i = 0; i < n; i++) variance += pow(*cell(tile, r, i) - mean, 2) / n;
            for (int i = 0; i < PAIR; i++) {
                double normal = (*cell(tile, r, i) - mean) / sqrt(variance + 1e-5);
                worst(*cell(out, r, i), i < n ? normal * weight[i] + bias[i] : 0, 1);
            }
        }
    }
    say(k->name, "layer norm", 2e-6);
}

// Rule 1, as it is written: of each SUM_BLOCK inputs a chain of fused multiply-adds from nothing
// (or from what is there), the blocks' sums added in their order.
static float plain_sum(const float *a, const float *w, int inputs, float there, Before before) {
    float sum = before == ADD ? there : 0;
    for (int first = 0; first < inputs; first += SUM_BLOCK) {
        float chain = before == CONTINUE ? there : 0;
        for (int i = first; i < inputs && i < first + SUM_BLOCK; i++)
            chain = fmaf(a[i], w[i], chain);
        sum = first == 0 && before != ADD ? chain : sum + chain;
        before = ADD;
    }
    return sum;
}

// What q8 is, as it is written: a row's integers, exact sums over each group of inputs, times the
// output's scale, added in the groups' order, the row's scale last.
typedef struct {
    int x[TILE][320], w[PAIR][320];    // [inputs, padded]
    float scale[TILE], scales[PAIR][5];
} PlainQ8;

// The row's integers, by rounding in double: to nearest, ties to even.
static void plain_quantize(PlainQ8 *q, int r, const float *x, int n, int padded_to) {
    float largest = 0;
    for (int i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    q->scale[r] = largest / most_quant;
    float factor = most_quant / largest;
    for (int i = 0; i < padded_to; i++) q->x[r][i] = i < n ? (int)nearbyint(x[i] * factor) : 0;
}

static float plain_q8(const PlainQ8 *q, int r, int j, int groups, bool add, float there) {
    float sum = 0;
    for (int g = 0; g < groups; g++) {
        long long exact = 0;
        for (int i = g * QUANT_GROUP; i < (g + 1) * QUANT_GROUP; i++)
            exact += (long long)q->w[j][i] * q->x[r][i];
        sum = fmaf((float)exact, q->scales[j][g], sum);
    }
    return add ? fmaf(sum, q->scale[r], there) : sum * q->scale[r];
}

// Rows of floats become integers and meet a pair of q8 panels, for 1 to 12 rows of 1 to 320 inputs.
static void check_q8(const Kernels *k) {
    static const int sizes[] = { 1, 31, 64, 65, 128, 300, 320 };
    static PlainQ8 q;
    static QuantGroup groups[5];
    static float tile[320 * TILE], sums[2 * BLOCK_FLOATS], there[TILE][PAIR];
    static char panels[5 * PAIR * (QUANT_GROUP + 2)] __attribute__((aligned(LINE_BYTES)));
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        int inputs = sizes[n], count = (inputs + QUANT_GROUP - 1) / QUANT_GROUP;
        memset(tile, 0, sizeof tile);
        for (int r = 0; r < TILE; r++) {
            float row[320];
            for (int i = 0; i < inputs; i++)
                *cell(tile, r, i) = row[i] = (float)(sin(i * 1.3 + r * 7.1) * pow(10, r - 6));
            plain_quantize(&q, r, row, inputs, count * QUANT_GROUP);
        }
        char *at = panels;
        for (int g = 0; g < count; g++, at += formats[TYPE_Q8].unit_bytes)
            for (int j = 0; j < PAIR; j++) {
                static const int places[] = { 0, 2, 1, 3 };
                uint16_t scale = to_bf16((float)(1 + j + g) / 1000);
                q.scales[j][g] = from_bf16(scale);
                memcpy(at + PAIR * QUANT_GROUP + 2 * j, &scale, sizeof scale);
                for (int i = 0; i < QUANT_GROUP; i++) {
                    int w = (i * 37 + j * 101 + g * 11) % 255 - 127;
                    q.w[j][g * QUANT_GROUP + i] = w;
                    at[i / 4 * PAIR * 4 + j * 4 + places[i % 4]] = (char)(w + 128);
                }
            }
        for (int rows = 1; rows <= TILE; rows++)
            for (int add = 0; add < 2; add++) {
                for (int r = 0; r < TILE; r++)
                    for (int j = 0; j < PAIR; j++)
                        *cell(sums, r, j) = there[r][j] = (float)(r - j) / 3;
                k->quantize(rows, inputs, tile, groups);
                k->product[TYPE_Q8]((Factor){ groups, rows, inputs },
                                    &(Panels){ .at = panels, .n = 2 }, &(Ahead){ .at = panels },
                                    (Sums){ sums, add ? ADD : REPLACE });
                for (int r = 0; r < rows; r++)
                    for (int j = 0; j < PAIR; j++)
                        worst(*cell(sums, r, j) != plain_q8(&q, r, j, count, add, there[r][j]), 0,
                              1);
            }
    }
    say(k->name, "q8, to the last bit", 0);
    static const float broken[] = { INFINITY, -INFINITY, NAN };
    for (int i = 0; i < 3; i++) {      // the row that has it becomes NaN, the others do not
        *cell(tile, 1, 17) = broken[i];
        k->quantize(3, 64, tile, groups);
        worst(isnan(groups[0].scale[1]) && !isnan(groups[0].scale[0] + groups[0].scale[2]), 1, 1);
    }
    memset(tile, 0, sizeof tile);
    *cell(tile, 0, 3) = 1e-40f;
    k->quantize(1, 64, tile, groups);
    worst(groups[0].scale[0], 0, 1);
    say(k->name, "what cannot be quantized", 0);
    for (int i = 0; i < 100000; i++) { // bf16 as room 3 has it, one by one
        float numbers[BLOCK] = {0};
        uint16_t halves[BLOCK];
        uint32_t bits = (uint32_t)i * 42949u;
        memcpy(numbers, &bits, sizeof bits);
        k->to_halves(BLOCK, numbers, halves);
        worst(halves[0] != to_bf16(numbers[0]) || halves[1] != 0, 0, 1);
    }
    say(k->name, "bf16", 0);
}

// Row r's input i of a tile, output j's of two pairs of panels one behind the other.
static void check_products(const Kernels *k) {
    enum { MOST = 1300, PANELS_HERE = 4, OUTPUTS = PANELS_HERE * BLOCK };
    static const int sizes[] = { 1, 7, 16, 255, 256, 257, 511, 512, 768, 1000, 1024, MOST };
    static float tile[(MOST + BLOCK) * TILE], panels[OUTPUTS * MOST], rows[TILE][MOST];
    static float weights[OUTPUTS][MOST], sums[PANELS_HERE * BLOCK_FLOATS], there[TILE][OUTPUTS];
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        int inputs = sizes[n];
        for (int i = 0; i < inputs; i++) {
            for (int r = 0; r < TILE; r++)
                *cell(tile, r, i) = rows[r][i] = (float)sin(i * 1.3 + r * 7.1 + inputs);
            for (int j = 0; j < OUTPUTS; j++)
                panels[(j / BLOCK * inputs + i) * BLOCK + j % BLOCK] = weights[j][i] =
                    (float)cos(i * 0.7 + j * 3.3);
        }
        for (int count = 1; count <= TILE; count++)
            for (int before = REPLACE; before <= CONTINUE; before++) {
                for (int r = 0; r < TILE; r++)
                    for (int j = 0; j < OUTPUTS; j++)
                        *cell(sums, r, j) = there[r][j] = (float)(r - j) / 3;
                long panel = inputs * BLOCK * (long)sizeof(float);
                Panels w = { (const char *)panels, panel, 2 * panel, PANELS_HERE };
                Ahead ahead = { w.at, panel, 2 * panel, 0 };
                k->product[TYPE_F32]((Factor){ tile, count, inputs }, &w, &ahead,
                                     (Sums){ sums, (Before)before });
                for (int r = 0; r < count; r++)
                    for (int j = 0; j < OUTPUTS; j++)
                        worst(*cell(sums, r, j) != plain_sum(rows[r], weights[j], inputs,
                                                            there[r][j], (Before)before), 0, 1);
            }
    }
    say(k->name, "sums are those of rule 1, to the last bit", 0);
}

// ln softmax in double, and the likeliest by sorting, for vocabularies of 1 to 600 tokens.
static void check_ranks(const Kernels *k) {
    enum { MOST = 600, LIKELIEST = 20 };
    static float logits[MOST];
    Sampler s = sampler_open(k, MOST);
    for (int n = 1; n <= MOST; n += n < 40 ? 1 : 37) {
        Ranked found[1 + LIKELIEST];
        double sum = 0;
        for (int i = 0; i < n; i++) logits[i] = (float)(8 * sin(i * i * 0.7 + n));
        for (int i = 0; i < n; i++) sum += exp(logits[i]);
        uint32_t token = (uint32_t)(n * 7 / 11);
        find_ranks(&s, logits, n, token, LIKELIEST, found);
        worst(found[0].logprob, logits[token] - log(sum), 1);
        for (int i = 1; i <= LIKELIEST; i++) {
            int above = 0;             // how many come before it
            uint32_t id = found[i].id;
            worst((id == TOKENIZER_NONE) != (i > n), 0, 1e-9);
            if (i > n) continue;
            for (int j = 0; j < n; j++)
                above += logits[j] > logits[id] || (logits[j] == logits[id] && j < (int)id);
            worst(above, i - 1, 1e-9);
            worst(found[i].logprob, logits[id] - log(sum), 1);
        }
    }
    sampler_close(&s);
    say(k->name, "ln softmax", 2e-6);
}

static void check_all(const Kernels *k) {
    check_kernels(k);
    check_products(k);
    check_q8(k);
    check_ranks(k);
}

static int check_math(void) {
    static const char *const kinds[] = { "avx512vnni", "avx512", "avx2", "neondot", "neon",
                                         "portable" };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (choose_kernels(kinds[i])) check_all(choose_kernels(kinds[i]));
    for (double x = -700; x <= 0; x += 0.00137) worst(exp_double(x), exp(x), exp(x));
    say("double", "exp, relative", 1e-15);
    for (double x = 1; x < 1e12; x *= 1.0007) worst(log_double(x), log(x), 1 + log(x));
    say("double", "log", 4e-16);
    for (double angle = 0; angle < 1 << 20; angle += angle < 9000 ? 0.0931 : 17.3) {
        Rotation t = rotation_by(angle);
        worst(t.cosine, (double)(float)cos(angle), 0x1p-25);
        worst(t.sine, (double)(float)sin(angle), 0x1p-25);
    }
    // Two roundings that fall apart: 2^-25.
    say("double", "sine and cosine, halves of the last place of 1", 1);
    return 0;
}

// The rotations of a pass, at positions up to 4,095, beside angles in double: one that was computed
// in float would be 1e-4 off.
static int check_rotations(void) {
    enum { HALF = 8, HIDDEN = PAIR };
    static float table[HIDDEN];
    double frequency[HALF];
    float *x = allocate(TILE * HIDDEN, sizeof *x);
    Rotation *rotations = allocate(TILE * HALF, sizeof *rotations);
    Row rows[TILE];
    Model m = { .c = { .rotary_dims = 2 * HALF },
                .embed_in = { (const char *)table, TYPE_F32, 1, HIDDEN } };
    for (int i = 0; i < HALF; i++) frequency[i] = pow(10000, -i / (double)HALF);
    for (int r = 0; r < TILE; r++) rows[r] = (Row){ .position = 4095 - 371 * r };
    Work w = { .m = &m, .frequency = frequency, .x = x, .rotations = rotations, .rows = rows,
               .n = TILE };
    embed_piece(&w, 0, 0);
    for (int r = 0; r < TILE; r++)
        for (int i = 0; i < HALF; i++) {
            double angle = rows[r].position * frequency[i];
            worst(rotations[r * HALF + i].cosine, cos(angle), 1);
            worst(rotations[r * HALF + i].sine, sin(angle), 1);
        }
    say("pass", "rotations", 1e-7);
    free(x);
    free(rotations);
    return 0;
}

static int check_philox(void) {
    // Random123's kat_vectors for philox4x32 with 10 rounds.
    static const struct { uint32_t counter[4], key[2], want[4]; } known[] = {
        { { 0, 0, 0, 0 }, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { { ~0u, ~0u, ~0u, ~0u }, { ~0u, ~0u },
          { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, { 0xa4093822, 0x299f31d0 },
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        philox(known[i].counter, known[i].key, out);
        if (memcmp(out, known[i].want, sizeof out) != 0) {
            printf("known answer %d is another\n", i);
            return 1;
        }
    }
    return 0;
}

// Can these bytes be continued to, or are they (whole), one well-formed character? Unicode 16,
// table 3-7.
static bool begins_character(const uint8_t *s, size_t n, bool *whole) {
    static const struct { int least, most, length, second_least, second_most; } rows[] = {
        { 0x00, 0x7F, 1, 0, 0 }, { 0xC2, 0xDF, 2, 0x80, 0xBF }, { 0xE0, 0xE0, 3, 0xA0, 0xBF },
        { 0xE1, 0xEC, 3, 0x80, 0xBF }, { 0xED, 0xED, 3, 0x80, 0x9F }, { 0xEE, 0xEF, 3, 0x80, 0xBF },
        { 0xF0, 0xF0, 4, 0x90, 0xBF }, { 0xF1, 0xF3, 4, 0x80, 0xBF }, { 0xF4, 0xF4, 4, 0x80, 0x8F },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (s[0] < rows[i].least || s[0] > rows[i].most || n > (size_t)rows[i].length) continue;
        if (n > 1 && (s[1] < rows[i].second_least || s[1] > rows[i].second_most)) return false;
        for (size_t k = 2; k < n; k++)
            if (s[k] < 0x80 || s[k] > 0xBF) return false;
        *whole = n == (size_t)rows[i].length;
        return true;
    }
    return false;
}

static int check_utf8(void) {
    static const uint8_t edges[] = {
        0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF,
        0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF,
    };
    enum { N = sizeof edges };
    for (int i = 0; i < N * N * N * N; i++) {
        uint8_t s[4] = { edges[i % N], edges[i / N % N], edges[i / N / N % N],
                         edges[i / N / N / N] };
        for (size_t n = 1; n <= 4; n++) {
            uint32_t code;
            bool whole = false;
            size_t length = 0, unfinished = 0, got = utf8_char((const char *)s, n, &code);
            for (size_t k = 1; k <= n; k++)
                if (begins_character(s, k, &whole) && whole) length = k;
            for (size_t k = 1; k <= 3 && k <= n; k++)
                if (begins_character(s + n - k, k, &whole) && !whole) unfinished = k;
            if (got != (length ? length : 1) || (code == UINT32_MAX) != (length == 0) ||
                utf8_unfinished((const char *)s, n) != unfinished) {
                printf("%02x %02x %02x %02x, %zu bytes\n", s[0], s[1], s[2], s[3], n);
                return 1;
            }
        }
    }
    return 0;
}

static atomic_int times[1000];
static void count_piece(void *arg, int piece, int thread) {
    (void)thread;
    atomic_fetch_add((atomic_int *)arg + piece, 1);
}

static int check_threads(void) {
    threads_start(5);
    for (int round = 1; round <= 20000; round++) {
        int pieces = round % 7 ? round % 40 : 1000;
        memset(times, 0, sizeof times);
        parallel(pieces, count_piece, times);
        for (int i = 0; i < 1000; i++)
            if (times[i] != (i < pieces)) {
                printf("round %d, piece %d of %d ran %d times\n", round, i, pieces, times[i]);
                return 1;
            }
        if (round % 5000 == 0) usleep(30000);      // long enough for the workers to fall asleep
    }
    threads_stop();
    // A worker must not miss the end, whatever it is doing then.
    for (int cycle = 0; cycle < 3000; cycle++) {
        threads_start(3);
        for (int i = 0; i < 20; i++) parallel(5, count_piece, times);
        threads_stop();
    }
    return 0;
}

// Workers have room for half a megabyte, whatever the system gives a thread by default.
__attribute__((noinline))
static void use_half_a_megabyte(void) {
    volatile char room[1 << 19];
    for (size_t i = 0; i < sizeof room; i += 1024) room[i] = 1;
}

static void use_stack(void *arg, int piece, int thread) {
    (void)arg, (void)piece;
    if (thread > 0) use_half_a_megabyte();
    usleep(20000);                                 // so that each thread has a piece
}

static int check_stack(void) {
    threads_start(3);
    parallel(12, use_stack, NULL);
    threads_stop();
    return 0;
}

// A NUL ends what a number of threads has written.
static int generate_by_many(const char *path) {
    static const int numbers[] = { 1, 2, 3, 5, 7 };
    Model m = model_open(path);
    options.source.prompt = "This Agreement shall be governed by the laws of the State of Delaware";
    options.rules.new_tokens = 30;
    options.rules.seed = 1;
    options.settings.returns = 20;
    options.settings.kv_memory = 1 << 28;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        threads_start(numbers[i]);
        int status = generate(&options, &m, choose_kernels(NULL));
        threads_stop();
        if (status != OK) return status;
        write_all(&standard_output, "", 1);
    }
    flush_stdout();
    model_close(&m);
    return 0;
}

static void read_exactly(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(1);
}

static int print_distributions(void) {
    double head[8];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        Sampling s = { .temperature = head[0], .top_k = (long)head[1], .top_p = head[2],
                       .min_p = head[3], .penalty = head[4] };
        int n = (int)head[5], n_history = (int)head[6];
        size_t words = ((size_t)n + 63) / 64;
        float *given = allocate((size_t)n, sizeof *given);
        uint32_t *history = allocate((size_t)n_history, sizeof *history);
        uint64_t *allowed = allocate(words, sizeof *allowed);
        Sampler sampler = sampler_open(choose_kernels(NULL), n);
        read_exactly(given, (size_t)n * sizeof *given);
        read_exactly(history, (size_t)n_history * sizeof *history);
        if (head[7] != 0) read_exactly(allowed, words * sizeof *allowed);
        // The history is split as that of a prompt and its continuation is.
        Choice c = { .logits = given, .n = n, .prompt = history, .n_prompt = n_history / 2,
                     .drawn = history + n_history / 2, .n_drawn = n_history - n_history / 2,
                     .allowed = head[7] != 0 ? allowed : NULL };
        const float *filtered = logits_to_filter(&s, &c, &sampler);
        double total;
        find_maxima(&sampler, filtered, n);
        int count = distribution(&s, filtered, n, &sampler, &total);
        for (int i = 0; i < count; i++) {
            Candidate one = sampler.candidates[i];
            printf("%s%u %.17g", i ? " " : "", one.id, one.weight / total);
        }
        printf("\n");
        free(given);
        free(history);
        free(allowed);
        sampler_close(&sampler);
    }
    return 0;
}

// The rows that prompts with so many tokens left get of a pass, beside what the rule says.
static int check_prefill(void) {
    static const struct { int room, n, need[4], want[4]; } cases[] = {
        { 16, 2, { 200, 3 }, { 13, 3 } },
        { 16, 3, { 200, 100, 3 }, { 8, 5, 3 } },
        { 16, 2, { 3, 200 }, { 3, 13 } },
        { 16, 4, { 2, 3, 2, 1 }, { 2, 3, 2, 1 } },
        { 16, 2, { 10, 10 }, { 10, 6 } },
        { 1, 2, { 5, 2 }, { 0, 1 } },
        { 16, 3, { 6, 50, 5 }, { 6, 5, 5 } },
        { 0, 1, { 5 }, { 0 } },
        { 256, 1, { 3000 }, { 256 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Request requests[4] = {0};
        Prefill found[4];
        Scheduler s = { .first = requests, .prefills = found };
        for (int r = 0; r < cases[i].n; r++)
            requests[r] = (Request){
                .n = cases[i].need[r] + 1, .prompt_kv.length = 1, .state = PREFILLING,
                .number = r, .next = r + 1 < cases[i].n ? &requests[r + 1] : NULL,
            };
        find_prefills(&s);
        plan_prefill(&s, cases[i].room);
        for (int r = 0; r < cases[i].n; r++)
            if (found[r].request != &requests[r] || found[r].rows != cases[i].want[r]) {
                printf("case %zu, prompt %d: %d rows, expected %d\n", i, r, found[r].rows,
                       cases[i].want[r]);
                return 1;
            }
    }
    return 0;
}

// How often a text of n tokens has `next` behind the last `order` tokens; *seen: how often it has
// any.
static int count_followers(const uint32_t *ids, int n, int order, uint32_t next, int *seen) {
    int count = 0;
    *seen = 0;
    for (int i = order; i < n; i++)
        if (memcmp(ids + i - order, ids + n - order, (size_t)order * sizeof *ids) == 0) {
            ++*seen;
            count += ids[i] == next;
        }
    return count;
}

// Texts of two tokens, which have as many places as there are followers, no longer than what is
// counted exactly.
static int check_guesses(void) {
    Guesses g = guesses_open(NULL);
    uint32_t state = 1, ids[MOST_SEEN + 1];
    for (int text = 0; text < 3000; text++) {
        memset(g.table, 0, TABLE_BYTES);
        Tail tail = {0};
        for (int n = 0; n <= MOST_SEEN; n++) {
            double want[2] = {0};
            Guess got = likeliest(&g, &tail);
            for (uint32_t next = 0; next < 2; next++)
                for (int order = 0, seen; order <= ORDER && order <= n; order++) {
                    int count = count_followers(ids, n, order, next, &seen);
                    if (seen) want[next] = (count + want[next]) / (seen + 1);
                }
            uint32_t best = want[1] > want[0];
            if (fabs(got.chance - want[best]) > 1e-12 ||
                (want[0] != want[1] && got.token != best)) {
                printf("text %d, token %d: %g, expected %g\n", text, n, got.chance, want[best]);
                return 1;
            }
            state = state * 1664525 + 1013904223;
            ids[n] = state >> 28 < 11;
            learn(&g, &tail, ids[n]);
            if (tail.n != (n < ORDER ? n + 1 : ORDER) || tail.ids[0] != ids[n]) return 1;
        }
    }
    // What comes true less often than the table says is believed less.
    Tail tail = {0};
    Guess before = propose(&g, &tail);
    for (int i = 0; i < 1000; i++) judge(&g, &tail, before.token + (i % 10 > 0));
    Guess guess = propose(&g, &tail);
    if (fabs(guess.chance - 0.1) > 0.05 || before.chance < 0.3) {
        printf("one in ten comes true, %g expected, %g before\n", guess.chance, before.chance);
        return 1;
    }
    guesses_close(&g);
    return 0;
}

// Passes that take `base` and `row` for each row more: what one row adds, as a part of the whole.
static int check_pass_time(void) {
    static const double cases[][2] = { { 1, 0.02 }, { 1, 0.2 }, { 20e-6, 5e-6 }, { 1, 0 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        PassTime time = {0};
        double base = cases[i][0], row = cases[i][1];
        for (int pass = 0; pass < 200; pass++) {
            int n = 1 + pass * 7 % 12;
            // Every twentieth is disturbed, as by another program.
            measure_pass(&time, n, (base + row * n) * (pass % 20 == 7 ? 30 : 1));
        }
        for (int n = 1; n <= 48; n *= 2) {
            // A row is never free: 48 more than the usual pass has, here 6.5, would take twice its
            // time.
            double got = row_share(&time, n), want = fmax(row / (base + row * n), 1 / (48 + 6.5));
            if (!(got >= 0) || fabs(got - want) > 0.25 * want + 0.02) {
                printf("a pass of %g and %g a row, %d rows: %g, expected %g\n", base, row, n, got,
                       want);
                return 1;
            }
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    static const struct { const char *name; int (*run)(void); } parts[] = {
        { "math", check_math }, { "philox", check_philox }, { "utf8", check_utf8 },
        { "threads", check_threads }, { "stack", check_stack }, { "prefill", check_prefill },
        { "guesses", check_guesses }, { "pass_time", check_pass_time },
        { "rotations", check_rotations },
        { "distribution", print_distributions },
    };
    if (argc == 3 && strcmp(argv[1], "many") == 0) return generate_by_many(argv[2]);
    for (size_t i = 0; argc == 2 && i < sizeof parts / sizeof *parts; i++)
        if (strcmp(argv[1], parts[i].name) == 0) return parts[i].run();
    return 2;
}
