// A file of short prompts against this machine's limits, both measured in the same run: `make bench-prompts`, or
//
//     bench_prompts MODEL [PROMPTS [NEW_TOKENS]]     1,000 prompts and 64 new tokens of each, unless told otherwise
//
// The prompts are run as kl3m runs the lines of its standard input. Every second or so they wait, between two passes,
// while the bandwidth of memory and the peak of multiplications and additions are measured; so it is known how many bytes
// and operations the machine could have had in the time that the prompts took, from before the first to behind the last.
// The larger of the shares that they needed is their share of the roofline. They need, for each text, a row for each token
// but the last, the logits of each token drawn and attention to all before it; and the weights once a pass. Guesses that
// did not come true are no need. Then some of the prompts are run again, one at a time and without guesses.
#define KL3M_TEST
#include "../kl3m.c"

enum { ALONE = 8 };            // prompts that are run one at a time

typedef struct {
    Model *m;
    Scheduler s;
    Bench b;                   // what measure_limits wants
    long prompts, new_tokens, begun;
    Limits limits, least, most;          // the last that were measured, the least and the most
    double resumed, taken;     // seconds() when the prompts went on after that; seconds they took before
    Needs could, needed;
    double kept;               // positions whose keys and values were read
    bool measured;
} File;

// The limits now. The time since the last measurement is held to the mean of both.
static void measure(File *f) {
    double taken = f->measured ? seconds() - f->resumed : 0;
    Limits l = measure_limits(&f->b, 0, true), *before = &f->limits;
    if (!f->measured) *before = f->least = f->most = l;
    f->taken += taken;
    f->could.bytes += taken * (l.bandwidth + before->bandwidth) / 2;
    f->could.operations += taken * (l.peak + before->peak) / 2;
    f->least = (Limits){ fmin(f->least.bandwidth, l.bandwidth), fmin(f->least.peak, l.peak) };
    f->most = (Limits){ fmax(f->most.bandwidth, l.bandwidth), fmax(f->most.peak, l.peak) };
    f->limits = l;
    f->measured = true;
    f->resumed = seconds();
}

// Two openings with a number between them, which makes each prompt another one.
static Request *next_prompt_of(void *arg, bool wait, bool *ended) {
    (void)wait;
    File *f = arg;
    *ended = f->begun == f->prompts;
    if (*ended) return NULL;
    Request *r = allocate(1, sizeof *r);
    long i = f->begun++;
    r->prompt = format_string("%s%ld. %s", openings[i % OPENINGS], i, openings[i / OPENINGS % OPENINGS]);
    r->prompt_size = strlen(r->prompt);
    give_tokens(r, f->m, &options, f->new_tokens);
    if (r->error) die("%s", r->error);
    r->limit = (int)f->new_tokens;
    r->seed = 1;
    r->hash = hash_tokens(r->ids, r->given);
    return r;
}

static void between_passes(void *arg, Continuation *c) {
    (void)c;
    File *f = arg;
    if (seconds() - f->resumed > 1) measure(f);
}

static void count_needs(void *arg, Request *r) {
    File *f = arg;
    const Continuation *c = &r->continuations[0];
    double prompt = r->n, rows = prompt + c->n - 1, seen = rows * (rows + 1) / 2;
    f->needed.operations += needs_of(&f->s.m->c, rows, c->n, 0, seen).operations;
    f->kept += prompt + seen - prompt * (prompt + 1) / 2;      // a prompt's are read once, then for each token
    request_free(r, 1, &f->s.kv);
}

static void run_prompts(File *f, Model *m, const Kernels *kernels, Drafts *drafts) {
    f->m = m;
    f->s = new_scheduler(&options, m, kernels);
    f->s.ignore_eos = true, f->s.drafts = drafts, f->s.arg = f;
    f->s.source = next_prompt_of, f->s.progress = between_passes, f->s.finished = ignore, f->s.sink = count_needs;
    f->b = (Bench){ .m = m, .work.kernels = kernels, .parts = (int)(m->size / sizeof(float) / READ_FLOATS) };
    measure(f);
    schedule(&f->s);
    measure(f);
    scheduler_free(&f->s);
    f->needed.bytes = (double)(f->s.passes - 1) * needs_of(&m->c, 0, 1, 0, 0).bytes + needs_of(&m->c, 0, 1, f->kept, 0).bytes;
}

int main(int argc, char **argv) {
    File all = { .prompts = argc > 2 ? atol(argv[2]) : 1000, .new_tokens = argc > 3 ? atol(argv[3]) : 64 };
    if (argc < 2 || argc > 4 || all.prompts < 1 || all.new_tokens < 1)
        die("usage: bench_prompts MODEL [PROMPTS [NEW_TOKENS]]");
    catch_signals();
    Model m = model_open(argv[1]);
    const Kernels *kernels = find_kernels();
    keep_denormals();
    threads_start(usable_cpus());
    options.kv_memory = usual_kv_memory();
    Drafts drafts = drafts_open(&m);
    run_prompts(&all, &m, kernels, &drafts);
    File alone = { .prompts = all.prompts < ALONE ? all.prompts : ALONE, .new_tokens = all.new_tokens };
    options.batch = 1;
    if (!interrupted) run_prompts(&alone, &m, kernels, NULL);
    if (!interrupted) {
        double speed = (double)all.s.tokens_drawn / all.taken, slow = (double)alone.s.tokens_drawn / alone.taken;
        double bytes = all.needed.bytes / all.could.bytes, operations = all.needed.operations / all.could.operations;
        printf("%ld prompts, %ld new tokens, %ld passes in %.1f s, %.1f tokens/s, %s, %d threads\n", all.begun,
               all.s.tokens_drawn, all.s.passes, all.taken, speed, kernels->name, pool.threads);
        printf("multiplies and adds    %6.1f to %6.1f GFLOP/s, needed %5.1f%%\n", all.least.peak * 1e-9,
               all.most.peak * 1e-9, 100 * operations);
        printf("reads                  %6.1f to %6.1f GB/s,    needed %5.1f%%\n", all.least.bandwidth * 1e-9,
               all.most.bandwidth * 1e-9, 100 * bytes);
        printf("share of the roofline  %.1f%%\n", 100 * fmax(bytes, operations));
        printf("one at a time          %.1f tokens/s without guesses; together %.1f times as fast\n", slow, speed / slow);
    }
    drafts_close(&drafts);
    threads_stop();
    model_close(&m);
    return interrupted;
}
