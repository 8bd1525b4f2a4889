// Measures schemas: how long one takes to be compiled, and each mask along given texts. Lines of
// standard input are a schema and texts, separated by tabs; a line of JSON comes out for each:
// {"compile": ms, "least": tokens, "texts": [{"ids": [...], "masks": [us, ...], "fits": true}]}, or
// {"refused": true}. Run by schemas.py.
#define KL3M_TEST
#include "../../kl3m.c"

// One walk along a text: the time of each mask is kept if it is less than before.
static bool walk_text(const Schema *c, Masker *k, const uint32_t *ids, size_t n, double *least) {
    Constraint text;
    bool fits = true;
    constraint_begin(&text, c);
    for (size_t i = 0; i < n && fits; i++) {
        double start = seconds();
        find_allowed(k, c, text.frame, 1 << 20);
        least[i] = fmin(least[i], seconds() - start);
        fits = k->allowed[ids[i] / 64] >> ids[i] % 64 & 1;
        fits = fits && constraint_take(&text, ids[i], false);
    }
    fits &= may_end(text.frame);
    constraint_close(&text);
    return fits;
}

static void measure_text(Bytes *out, const Schema *c, Model *m, const char *s, size_t n) {
    enum { RUNS = 5 };
    size_t most = most_ids(m, n) + 1;
    uint32_t *ids = allocate(most, sizeof *ids);
    double *least = allocate(most, sizeof *least);
    bool fits = true;
    size_t count = encode(m, true, s, n, ids);
    for (size_t i = 0; i < count; i++) least[i] = INFINITY;
    for (int run = 0; run < RUNS; run++) {     // each with nothing remembered
        Masker k = masker_open(c->vocabulary, m->c.vocab);
        fits &= walk_text(c, &k, ids, count, least);
        masker_close(&k);
    }
    append_string(out, "{\"ids\": [");
    for (size_t i = 0; i < count; i++) append_format(out, "%s%u", i ? ", " : "", ids[i]);
    append_string(out, "], \"masks\": [");
    for (size_t i = 0; i < count && least[i] < INFINITY; i++)
        append_format(out, "%s%.2f", i ? ", " : "", least[i] * 1e6);
    append_format(out, "], \"fits\": %s}", fits ? "true" : "false");
    free(ids);
    free(least);
}

int main(int argc, char **argv) {
    if (argc != 2) die("usage: masks MODEL < LINES");
    Model m = model_open(argv[1]);
    Vocabulary *v = vocabulary_open(&m.tokenizer);
    Records in = { .fd = STDIN_FILENO, .name = "standard input", .delimiter = '\n' };
    char *line;
    size_t n;
    while (next_record(&in, true, &line, &n) == 1) {
        Bytes out = {0};
        char *end = line + n, *tab = memchr(line, '\t', n);
        double start = seconds();
        Schema *c = schema_of_text(v, NULL, line, (size_t)((tab ? tab : end) - line));
        double taken = seconds() - start;
        if (c->refusals.n) append_string(&out, "{\"refused\": true");
        else append_format(&out, "{\"compile\": %.4f, \"least\": %u, \"texts\": [", taken * 1e3,
                           c->least_tokens);
        for (char *text = tab; text && c->refusals.n == 0; text = tab) {
            tab = memchr(text + 1, '\t', (size_t)(end - text - 1));
            if (text != memchr(line, '\t', n)) append_string(&out, ", ");
            measure_text(&out, c, &m, text + 1, (size_t)((tab ? tab : end) - text - 1));
        }
        append_string(&out, c->refusals.n ? "}\n" : "]}\n");
        print(&out);
        schema_free(c);
    }
    free(in.buffer.data);
    vocabulary_close(v);
    model_close(&m);
    return OK;
}
