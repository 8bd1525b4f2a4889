// Targets for libFuzzer; fuzz.py builds and runs them. FUZZ_TARGET says which one, FUZZ_MODELS is
// a folder with plain.bin and nfc.bin, small models of small tokenizers, one of them with NFC.
//
//     model      a model file that was changed, and a command that uses it
//     tables     a tokenizer's tables that were changed, and a text
//     encoder    a text, beside an encoder that is written as its description is read
//     records    standard input of the commands that read lines, records, ids
//     text       escapes and JSON: what is written is read as what it was
//     options    a command line
//     schema     a schema or a pattern, and a text drawn by its masks
//
// Whatever comes, the program ends with status 0 or 3, or with a message and 1 or 2, and gives back
// what it allocated. The sanitizers see the rest.
#define KL3M_TEST
#include "../../kl3m.c"

#undef malloc
#undef calloc
#undef aligned_alloc
#undef realloc
#undef free
#undef vasprintf
#undef mmap
#undef munmap
#undef read
#undef write
#undef poll
#undef isatty
#undef exit
#undef _exit

#include <setjmp.h>

// ---- The system ----

enum { MOST_BLOCKS = 1 << 16 };

static struct {
    void *live[MOST_BLOCKS];       // what this input has allocated and not given back
    size_t n_live;
    bool counted;                  // not while the models are opened
    jmp_buf end;                   // where the program ends
    const uint8_t *in;             // standard input's rest, n_in bytes
    size_t n_in, most_read;
    Bytes written[3];              // to standard output and error
} system_seen;

static void fail(const char *why) {
    fprintf(stderr, "%s\n--- standard output\n%.*s\n--- standard error\n%.*s\n", why,
            (int)system_seen.written[1].size, system_seen.written[1].data,
            (int)system_seen.written[2].size, system_seen.written[2].data);
    abort();
}

static void *keep(void *memory) {
    if (system_seen.counted && memory) {
        if (system_seen.n_live == MOST_BLOCKS) fail("too many allocations");
        system_seen.live[system_seen.n_live++] = memory;
    }
    return memory;
}

static void unkeep(void *memory) {
    for (size_t i = system_seen.n_live; i-- > 0;)
        if (system_seen.live[i] == memory) {
            system_seen.live[i] = system_seen.live[--system_seen.n_live];
            return;
        }
}

void *fuzz_malloc(size_t n) { return keep(malloc(n)); }

void *fuzz_calloc(size_t n, size_t size) { return keep(calloc(n, size)); }

void *fuzz_aligned_alloc(size_t alignment, size_t n) { return keep(aligned_alloc(alignment, n)); }

void *fuzz_realloc(void *memory, size_t n) {
    unkeep(memory);
    return keep(realloc(memory, n));
}

void fuzz_free(void *memory) {
    unkeep(memory);
    free(memory);
}

int fuzz_vasprintf(char **text, const char *format, va_list arguments) {
    int n = vasprintf(text, format, arguments);
    keep(*text);
    return n;
}

// A copy of the file, behind whose last byte nothing may be read.
void *fuzz_mmap(void *at, size_t n, int rights, int flags, int fd, off_t offset) {
    (void)at, (void)rights, (void)flags;
    char *memory = fuzz_aligned_alloc(LINE_BYTES, n);
    if (fd < 0) memset(memory, 0, n);
    else if (pread(fd, memory, n, offset) != (ssize_t)n) abort();
    return memory;
}

int fuzz_munmap(void *memory, size_t n) {
    (void)n;
    fuzz_free(memory);
    return 0;
}

ssize_t fuzz_read(int fd, void *data, size_t n) {
    if (fd != STDIN_FILENO) return read(fd, data, n);
    if (n > system_seen.n_in) n = system_seen.n_in;
    if (n > system_seen.most_read) n = system_seen.most_read;
    memcpy(data, system_seen.in, n);
    system_seen.in += n, system_seen.n_in -= n;
    return (ssize_t)n;
}

ssize_t fuzz_write(int fd, const void *data, size_t n) {
    if (fd != STDOUT_FILENO && fd != STDERR_FILENO) return write(fd, data, n);
    bool counted = system_seen.counted;
    system_seen.counted = false;
    append(&system_seen.written[fd], data, n);
    system_seen.counted = counted;
    return (ssize_t)n;
}

int fuzz_poll(struct pollfd *fds, nfds_t n, int timeout) {
    (void)timeout;
    for (nfds_t i = 0; i < n; i++) fds[i].revents = fds[i].fd == STDIN_FILENO ? POLLIN : 0;
    return (int)n;
}

int fuzz_isatty(int fd) { return (void)fd, 0; }

void fuzz_exit(int status) { longjmp(system_seen.end, status + 1); }

#define malloc fuzz_malloc
#define free fuzz_free

// ---- Inputs ----

typedef struct { const uint8_t *at; size_t n; } Input;

static unsigned next_byte(Input *in) { return in->n ? in->n--, *in->at++ : 0; }

// Up to a NUL, which is dropped, or all; a copy with a NUL behind it.
static char *next_string(Input *in, size_t *n) {
    const uint8_t *end = in->n ? memchr(in->at, 0, in->n) : NULL;
    *n = end ? (size_t)(end - in->at) : in->n;
    char *copy = allocate(*n + 1, 1);
    if (*n) memcpy(copy, in->at, *n);
    in->at += *n + (end != NULL), in->n -= *n + (end != NULL);
    return copy;
}

// Changes some places: how many, and of each three bytes of where, how many bytes, the bytes.
static void change(Input *in, uint8_t *data, size_t n) {
    for (unsigned changes = next_byte(in); changes > 0 && in->n > 0; changes--) {
        size_t at = next_byte(in);
        at |= (size_t)next_byte(in) << 8;
        at |= (size_t)next_byte(in) << 16;
        for (unsigned count = next_byte(in); count > 0 && in->n > 0; count--, at++)
            data[at % n] = (uint8_t)next_byte(in);
    }
}

static struct { Model model; Vocabulary *vocabulary; Bytes file; } fixtures[2];
static const Kernels *kernels;
static Options usual_options;
static int model_file;             // the changed model, for map_file
static char model_name[64];

// ---- Targets: each returns the program's exit status ----

static int fuzz_model(Input *in) {
    enum { SELDOM = 255 };             // 2 MB are written then, which takes long
    static Command *const commands[] = { info, verify, generate, score, tokenize, logits };
    unsigned flags = next_byte(in), chosen = next_byte(in);
    Command *command = commands[chosen % (sizeof commands / sizeof *commands)];
    if (chosen == SELDOM) command = quantize_model;
    Bytes data = {0};
    append(&data, fixtures[flags & 1].file.data, fixtures[flags & 1].file.size);
    change(in, (uint8_t *)data.data, data.size);
    FileHeader *h = (FileHeader *)data.data;
    if (!(flags & 2) && h->sections <= (data.size - sizeof *h) / sizeof(Section)) {
        h->file_size = data.size;      // so that more than the checksum is met
        h->directory_crc = crc32_of(0, data.data, offsetof(FileHeader, directory_crc));
        h->directory_crc = crc32_of(h->directory_crc, data.data + sizeof *h,
                                    h->sections * sizeof(Section));
    }
    if (pwrite(model_file, data.data, data.size, 0) != (ssize_t)data.size) abort();
    free(data.data);
    options.source.prompt = "The State of\n New York's 12 laws";
    options.rules.new_tokens = 3;
    options.rules.seed = 1;
    options.quiet = true;          // what is written to /dev/null is told on standard error
    options.no_speculation = flags & 4;
    options.quantize = flags & 8 ? "q8" : "bf16";
    options.out = options.logits = "/dev/null";
    Model m = model_open(model_name);
    int status = command(&options, &m, kernels);
    model_close(&m);
    return status;
}

static int fuzz_tables(Input *in) {
    const Model *m = &fixtures[next_byte(in) & 1].model;
    const Section *s = seek_section(m, "tokenizer");
    uint8_t *tables = allocate_raw(s->size, 1, LINE_BYTES);
    memcpy(tables, m->map + s->offset, s->size);
    change(in, tables, s->size);
    Tokenizer t;
    if (tokenizer_open(&t, tables, s->size)) return free(tables), OK;
    size_t most = tokenizer_most_ids(&t, in->n);
    uint32_t *ids = malloc(most * sizeof *ids);
    for (int plain = 0; plain < 2; plain++) {
        ptrdiff_t n = tokenizer_encode(&t, (const char *)in->at, in->n, plain, ids);
        if (n < 0 || (size_t)n > most) fail("more ids than may be");
        for (ptrdiff_t i = 0; i < n; i++) {
            size_t length;
            const char *text = tokenizer_text(&t, ids[i], &length);
            if (ids[i] >= t.tokens) fail("an unknown token");
            crc32_of(0, text, length);             // all of it may be read
            tokenizer_is_special(&t, ids[i]);
        }
    }
    tokenizer_find_added(&t, "<|end|>");
    free(ids);
    tokenizer_close(&t);
    free(tables);
    return OK;
}

// ---- The encoder again, plainly ----

// The longest token of a trie that s[0 .. n) begins with, by walking over all edges.
static size_t plain_match(const Tokenizer *t, int trie, const char *s, size_t n, uint32_t *token) {
    uint32_t node = t->root[trie];
    size_t longest = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t child = 0;
        for (uint32_t k = 0; k < t->edge_slots; k++)
            if (t->edges[k].a == node && t->edges[k].b == (uint8_t)s[i]) child = t->edges[k].x;
        if (child == 0) break;
        node = child;
        if (t->node_token[node] != TOKENIZER_NONE) longest = i + 1, *token = t->node_token[node];
    }
    return longest;
}

static void plain_word(const Tokenizer *t, const char *s, size_t n, Bytes *ids) {
    size_t first = ids->size / sizeof(uint32_t), count = n;
    for (size_t i = 0; i < n; i++)
        append(ids, &t->byte_token[(uint8_t)s[i]], sizeof(uint32_t));
    uint32_t *word = (uint32_t *)(void *)ids->data + first;
    for (;;) {
        uint32_t best = TOKENIZER_NONE, made = 0;
        size_t at = 0;
        for (size_t i = 0; i + 1 < count; i++)
            for (uint32_t k = 0; k < t->merge_slots; k++) {
                const TokenizerSlot *m = &t->merges[k];
                if (m->a == word[i] && m->b == word[i + 1] && m->x < best)
                    best = m->x, made = m->y, at = i;
            }
        if (best == TOKENIZER_NONE) break;
        word[at] = made;
        for (size_t i = at + 1; i + 1 < count; i++) word[i] = word[i + 1];
        count--;
    }
    ids->size = (first + count) * sizeof(uint32_t);
}

static int class_at(const char *s, size_t n, size_t *length) {
    uint32_t code, next;
    *length = utf8_char(s, n, &code);
    return code == UINT32_MAX ? 0 : unicode_class(code, &next);
}

// The length of the word that GPT-2's pattern cuts off at s[0 .. n).
static size_t plain_cut(const char *s, size_t n) {
    static const char *const endings[] = { "'s", "'t", "'re", "'ve", "'m", "'ll", "'d" };
    enum { OTHERS, LETTERS, NUMBERS, SPACES };
    size_t length, at = 0, last = 0;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if (strlen(endings[i]) <= n && memcmp(s, endings[i], strlen(endings[i])) == 0)
            return strlen(endings[i]);
    if (*s == ' ' && n > 1 && class_at(s + 1, n - 1, &length) != SPACES) at = 1;
    int class = class_at(s + at, n - at, &length);
    while (at < n && class_at(s + at, n - at, &length) == class) at += last = length;
    bool followed = at < n && class == SPACES && at > last;
    return followed ? at - last : at;
}

static void plain_encode(const Tokenizer *t, int trie, const char *s, size_t n, Bytes *ids) {
    size_t start = 0;
    for (size_t at = 0; trie < 2 && at < n;) {
        uint32_t token = 0;
        size_t length = plain_match(t, trie, s + at, n - at, &token);
        at += length ? 0 : 1;
        if (length == 0) continue;
        plain_encode(t, trie + 1, s + start, at - start, ids);
        append(ids, &token, sizeof token);
        start = at += length;
    }
    if (trie < 2) plain_encode(t, trie + 1, s + start, n - start, ids);
    for (size_t length; trie == 2 && n > 0; s += length, n -= length) {
        length = plain_cut(s, n);
        plain_word(t, s, length, ids);
    }
}

static int fuzz_encoder(Input *in) {
    unsigned flags = next_byte(in);
    Tokenizer *t = &fixtures[flags & 1].model.tokenizer;
    bool plain = flags & 2;
    const char *text = (const char *)in->at;
    size_t n = in->n, most = tokenizer_most_ids(t, n), at = 0;
    uint32_t *ids = malloc(most * sizeof *ids);
    ptrdiff_t count = tokenizer_encode(t, text, n, plain, ids);
    if (count < 0 || (size_t)count > most) fail("more ids than may be");
    if (t->nfc == NULL) {
        Bytes want = {0};
        plain_encode(t, plain, text, n, &want);
        bool same = want.size == (size_t)count * sizeof *ids;
        if (!same || (want.size && memcmp(want.data, ids, want.size) != 0)) fail("other ids");
        for (ptrdiff_t i = 0; i < count; i++) {
            size_t length;
            const char *part = tokenizer_text(t, ids[i], &length);
            if (length > n - at || memcmp(part, text + at, length) != 0) fail("another text");
            at += length;
        }
        if (at != n) fail("not all of the text");
        free(want.data);
    }
    free(ids);
    return OK;
}

// ---- Records ----

// A line of JSON, whole. Members that are passed through may hold halves of pairs of surrogates.
static void check_json(const char *s, size_t n) {
    Json j = { .start = s, .at = s, .end = s + n, .halves = true };
    if (!json_value(&j, 0)) fail("output that is no JSON");
    json_skip_space(&j);
    if (j.at != j.end) fail("output with something behind its JSON");
}

static size_t count_records(const uint8_t *s, size_t n, uint8_t end) {
    if (n >= 3 && memcmp(s, "\xEF\xBB\xBF", 3) == 0) s += 3, n -= 3;
    size_t count = n > 0 && s[n - 1] != end;
    for (size_t i = 0; i < n; i++) count += s[i] == end;
    return count;
}

// One result for each record, whatever it is, and JSON where it should be.
static void check_results(size_t records, char end, bool json) {
    const Bytes *out = &system_seen.written[STDOUT_FILENO];
    size_t count = 0;
    for (size_t at = 0; at < out->size; count++) {
        const char *stop = memchr(out->data + at, end, out->size - at);
        if (stop == NULL) fail("a result without its end");
        size_t next = (size_t)(stop - out->data);
        if (json) check_json(out->data + at, next - at);
        at = next + 1;
    }
    if (count != records) fail("not one result for each record");
}

static int fuzz_records(Input *in) {
    enum { LINES_IN, JSON_OUT, RECORDS_IN, SCORES, SCORED_RECORDS, IDS_OUT, IDS_IN, JUDGED, KINDS };
    static Command *const commands[KINDS] = { generate, generate, generate, score, score, tokenize,
                                              detokenize, check };
    unsigned kind = next_byte(in) % KINDS, flags = next_byte(in), more = next_byte(in);
    Options *o = &options;
    bool lines = kind != RECORDS_IN && kind != SCORED_RECORDS, draws = kind <= RECORDS_IN;
    o->source.null = flags & 1 && lines && kind != JUDGED;
    o->source.no_escape = flags & 2;
    o->rules.no_special = flags & 4;
    if (flags & 8 && (draws || kind == SCORES)) o->rules.truncate = flags & 16 ? "left" : "right";
    if (kind == SCORES || kind == SCORED_RECORDS) o->score = o->source.scores = true;
    if (o->score && o->rules.truncate) o->rules.truncate = "left";
    o->source.jsonl = !lines;
    o->json = !lines || kind == JSON_OUT || (flags & 32 && kind == SCORES);
    if (flags & 64 && o->json) o->settings.logprobs = 1;
    o->no_speculation = true;
    o->rules.seed = 7;
    o->rules.new_tokens = more % 4;
    if (more & 4 && kind == RECORDS_IN) {
        o->settings.schema_member = "s";
        o->rules.new_tokens += 8;
    }
    if (more & 8 && draws) o->settings.returns = 2;
    o->settings.batch = more & 16 ? 1 : 0;
    if (more & 32 && kind <= JSON_OUT) o->stops = (Given){ { "e", "\\n" }, 2 };
    if (kind == JUDGED) o->regex = more & 64 ? "a+b" : "[^x]*(\\d|\\p{L}){2,3}";
    char delimiter = o->source.null ? 0 : '\n';
    size_t records = count_records(in->at, in->n, kind == IDS_IN ? '\n' : (uint8_t)delimiter);
    bool plain = o->json || kind == SCORES || kind == IDS_OUT;
    system_seen.in = in->at, system_seen.n_in = in->n;
    system_seen.most_read = more & 128 ? 1 + more % 7 : SIZE_MAX;
    int status = commands[kind](o, &fixtures[flags >> 7].model, kernels);
    if (kind == JUDGED && records == 0) records = 1;       // the least -n
    if (draws && !o->json) records *= (size_t)o->settings.returns;
    check_results(records, plain ? '\n' : delimiter, o->json);
    return status;
}

// ---- Text ----

static int fuzz_text(Input *in) {
    unsigned flags = next_byte(in);
    const char *s = (const char *)in->at;
    size_t n = in->n;
    terminal = flags & 1;
    for (Form form = AS_IT_IS; form <= JSON_ITSELF; form++) {
        Bytes out = {0};
        append(&out, "", 0);
        append_text(&out, s, n, form);
        for (size_t i = 0, length; i < out.size; i += length) {
            uint32_t code;
            length = utf8_char(out.data + i, out.size - i, &code);
            bool control = code < 0x20 || code == 0x7F || (code >= 0x80 && code < 0xA0);
            if (terminal && form != JSON_ITSELF && control && code != '\n' && code != '\t')
                fail("a control character on a terminal");
        }
        if (form == IN_A_LINE && !terminal) {
            if (memchr(out.data, '\n', out.size)) fail("a newline in a line");
            size_t back = unescape(out.data, out.size);
            if (back != n || (n && memcmp(out.data, s, n) != 0)) fail("another text out of a line");
        }
        if (form == BEFORE_A_NUL && memchr(out.data, 0, out.size)) fail("a NUL before the NUL");
        free(out.data);
    }
    Bytes quoted = {0}, back = {0}, again = {0};
    append_json(&quoted, "", s, n);
    Json j = { .start = quoted.data, .at = quoted.data, .end = quoted.data + quoted.size };
    append(&back, "", 0);
    if (!json_string(&j, &back) || j.at != j.end) fail("a string that is no JSON");
    append_json(&again, "", back.data, back.size);
    if (again.size != quoted.size || memcmp(again.data, quoted.data, again.size) != 0)
        fail("another string out of JSON");
    bool sound = true;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        length = utf8_char(s + i, n - i, &code);
        sound &= code != UINT32_MAX;
    }
    if (sound && (back.size != n || memcmp(back.data, s, n) != 0)) fail("another text out of JSON");
    // What is a value is one in a list too, and no part of a longer one.
    Json value = { .start = s, .at = s, .end = s + n };
    if (json_value(&value, 1)) {
        Bytes list = {0};
        append_string(&list, "[");
        append(&list, s, (size_t)(value.at - s));
        append_string(&list, ",null]");
        check_json(list.data, list.size);
        free(list.data);
    } else if (value.flaw == NULL) fail("no JSON, and no flaw");
    free(quoted.data);
    free(back.data);
    free(again.data);
    return OK;
}

// ---- Options ----

static int fuzz_options(Input *in) {
    enum { MOST_GIVEN_WORDS = 32 };
    char *words[MOST_GIVEN_WORDS + 1] = { NULL };
    int n = 1;
    words[0] = format_string("kl3m");
    for (size_t length; in->n > 0 && n < MOST_GIVEN_WORDS; n++) words[n] = next_string(in, &length);
    parse_options(n, words);
    // All numbers are in their ranges now.
    for (const Option *o = option_table; o < option_table + OPTIONS; o++) {
        if (!given[o - option_table] || (o->kind != WHOLE && o->kind != REAL)) continue;
        double x = o->kind == REAL ? *(double *)o->address : (double)*(long *)o->address;
        if (!(x >= o->least && x <= o->most) || !isfinite(x)) fail("a number out of its range");
    }
    for (int i = 0; i < n; i++) free(words[i]);
    return OK;
}

// ---- Schemas ----

// Each token's bit is what stepping over its bytes says.
static void check_mask(const Masker *k, const Constraint *c, uint32_t left) {
    Arena arena = {0};
    Walk w = { c->schema, c->schema->vocabulary, &arena };
    for (uint32_t id = 0; id < k->words * 64; id++) {
        bool got = k->allowed[id / 64] >> id % 64 & 1, want = false;
        if (left > 0 && usable(w.vocabulary, id)) {
            const Frame *next = step_token(&w, c->frame, id);
            want = next && frame_left(&arena, w.vocabulary, next) <= left - 1;
        }
        if (got != want) fail("a mask that is wrong");
    }
    arena_free(&arena);
}

// Some allowed token, the first behind `from`; TOKENIZER_NONE: none is.
static uint32_t allowed_from(const Masker *k, uint32_t from) {
    for (uint32_t i = 0, all = (uint32_t)k->words * 64; i < all; i++) {
        uint32_t id = (from + i) % all;
        if (k->allowed[id / 64] >> id % 64 & 1) return id;
    }
    return TOKENIZER_NONE;
}

// Draws what the input says of what the masks allow; what comes must be judged to fit.
static void draw_text(Input *in, const Schema *c, int vocab) {
    enum { MOST_TOKENS = 48 };
    unsigned checked = next_byte(in);
    uint32_t left = c->least_tokens + next_byte(in) % MOST_TOKENS;
    Masker k = masker_open(c->vocabulary, vocab);
    Constraint text;
    Bytes out = {0}, verdict = {0};
    append(&out, "", 0);
    constraint_begin(&text, c);
    for (unsigned drawn = 0; left > 0 && !text.ended && drawn < 2 * MOST_TOKENS; drawn++, left--) {
        unsigned choice = next_byte(in);
        find_allowed(&k, c, text.frame, left);
        if (drawn % 16 == checked % 16) check_mask(&k, &text, left);
        uint32_t id = allowed_from(&k, choice * 7 + next_byte(in));
        if (may_end(text.frame) && (choice == 255 || id == TOKENIZER_NONE)) break;
        if (id == TOKENIZER_NONE) fail("a dead end");
        size_t n;
        const char *bytes = tokenizer_text(c->vocabulary->tokenizer, id, &n);
        append(&out, bytes, n);
        if (!constraint_take(&text, id, false)) fail("a token that was allowed is not taken");
    }
    bool whole = left == 0 || text.ended || may_end(text.frame);
    if (whole && !may_end(text.frame)) fail("a text that is cut");
    if (whole && !append_verdict(&verdict, c, out.data, out.size)) fail("a text that does not fit");
    free(out.data);
    free(verdict.data);
    constraint_close(&text);
    masker_close(&k);
}

static int fuzz_schema(Input *in) {
    unsigned flags = next_byte(in);
    size_t n;
    Texts ignored = {0};
    if (flags & 2) {
        Bytes word = {0};
        append_string(&word, "format");
        add_text(&ignored, word);
    }
    char *text = next_string(in, &n);
    const Vocabulary *v = fixtures[0].vocabulary;
    Schema *c = flags & 1 ? schema_of_pattern(v, text) : schema_of_text(v, &ignored, text, n);
    if (c->refusals.n == 0) draw_text(in, c, fixtures[0].model.c.vocab);
    for (int i = 0; i < c->refusals.n; i++)
        if (c->refusals.texts[i].size == 0) fail("a refusal without a reason");
    schema_free(c);
    free_texts(&ignored);
    free(text);
    return OK;
}

// ---- One input ----

static const struct { const char *name; int (*run)(Input *in); } targets[] = {
    { "model", fuzz_model }, { "tables", fuzz_tables }, { "encoder", fuzz_encoder },
    { "records", fuzz_records }, { "text", fuzz_text }, { "options", fuzz_options },
    { "schema", fuzz_schema },
};

static int (*target)(Input *in);

// Each message is a line that begins with the program's name and has no control character.
static void check_messages(int status) {
    const Bytes *said = &system_seen.written[STDERR_FILENO];
    bool begins = true;
    for (size_t i = 0; i < said->size; i++) {
        if (begins && (said->size - i < 6 || memcmp(said->data + i, "kl3m: ", 6) != 0))
            fail("a message of another form");
        begins = said->data[i] == '\n';
        if ((uint8_t)said->data[i] < 0x20 && !begins) fail("a control character in a message");
    }
    if (!begins) fail("a message without an end");
    if (status != OK && status != FAILED && status != USAGE && status != SOME_FAILED)
        fail("an unknown exit status");
    if ((status == FAILED || status == USAGE) && said->size == 0) fail("no message");
}

static void begin_input(void) {
    system_seen.n_live = system_seen.n_in = 0;
    for (int fd = STDOUT_FILENO; fd <= STDERR_FILENO; fd++) system_seen.written[fd].size = 0;
    options = usual_options;
    memset(given, 0, sizeof given);
    terminal = messages_lost = false;
    standard_output.size = 0;
    unfinished_file = NULL;
    if (mapped_file.fd >= 0) close(mapped_file.fd);
    mapped_file.fd = -1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    begin_input();
    int ended = setjmp(system_seen.end);
    if (ended == 0) {
        Input in = { data, n };
        system_seen.counted = true;
        int status = target(&in);
        flush_stdout();
        system_seen.counted = false;
        if (system_seen.n_live > 0) fail("memory was not given back");
        check_messages(status);
        return 0;
    }
    system_seen.counted = false;
    while (system_seen.n_live > 0) free(system_seen.live[system_seen.n_live - 1]);
    check_messages(ended - 1);
    return 0;
}

static void open_fixtures(const char *folder) {
    static const char *const names[] = { "plain", "nfc" };
    for (int i = 0; i < 2; i++) {
        static char paths[2][PATH_MAX];
        snprintf(paths[i], sizeof paths[i], "%s/%s.bin", folder, names[i]);
        Model *m = &fixtures[i].model;
        *m = model_open(paths[i]);
        size_t end = 0;
        for (const Section *s = m->sections; s < m->sections + m->n_sections; s++)
            if (s->offset + s->size > end) end = s->offset + s->size;
        append(&fixtures[i].file, m->map, end);
        fixtures[i].vocabulary = vocabulary_open(&m->tokenizer);   // which encodes: all is there
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *name = getenv("FUZZ_TARGET"), *folder = getenv("FUZZ_MODELS");
    for (size_t i = 0; name && i < sizeof targets / sizeof *targets; i++)
        if (strcmp(name, targets[i].name) == 0) target = targets[i].run;
    if (!target || !folder) fail("FUZZ_TARGET and FUZZ_MODELS say what is fuzzed; use fuzz.py");
    if (setjmp(system_seen.end) != 0) fail("the models cannot be opened");
    open_fixtures(folder);
    mapped_file.fd = -1;
    model_file = memfd_create("model", 0);
    snprintf(model_name, sizeof model_name, "/proc/self/fd/%d", model_file);
    kernels = choose_kernels(NULL);
    threads_start(1);
    options.settings.kv_memory = 64 << 20;
    usual_options = options;
    return 0;
}
