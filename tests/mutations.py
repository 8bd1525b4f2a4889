#!/usr/bin/env python3
"""Does a test notice when a promise is broken? Each mutation is applied to a copy of the sources,
which is built, and the tests that it names must fail on it.

    tests/mutations.py [WORD...]

With words only those whose promise has one of them. Takes some ten seconds each.
"""
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The promise, as README has it; what is replaced in a source; the words that choose the tests.
Mutation = namedtuple("Mutation", "promise old new words source", defaults=["kl3m.c"])

MUTATIONS = [
    Mutation("the same bits on every kind of CPU",
             "#define FMA(a, b, c) (vec){ fmaf((a)[0], (b)[0], (c)[0]),",
             "#define FMA(a, b, c) (vec){ (a)[0] * (b)[0] + (c)[0],",
             ["logits are the same bytes"]),
    Mutation("logits within 1e-4 of float64, at any position",
             "rotation_by(row->position * w->frequency[i]);",
             "rotation_by((float)row->position * (float)w->frequency[i]);",
             ["rotates by angles"]),
    Mutation("a row does not depend on its neighbours",
             "table->at + row->token * row_bytes(table->type, hidden);",
             "table->at + (row->token ^ (w->n > 30)) * row_bytes(table->type, hidden);",
             ["logits are the same bytes"]),
    Mutation("a draw depends on the prompt, the seed and the position alone",
             ".number = uniform(r->seed, r->stream, c->number, (uint32_t)(n + r->before)),",
             ".number = uniform(r->seed, r->stream, c->number, (uint32_t)(n + s->n_running)),",
             ["a whole file gives"]),
    Mutation("guesses change no text",
             "c->chain.ids[d->drawn] == token;", "c->chain.ids[d->drawn] >= token;",
             ["with guesses and without"]),
    Mutation("under a schema a limit never cuts a text",
             "walk_trie(k, &w, &k->vocabulary->all, others, left - 1);",
             "walk_trie(k, &w, &k->vocabulary->all, others, left);",
             ["whatever is drawn"]),
    Mutation("what is printed fits the schema",
             "p->reader.count >= l->least || l->automaton == w->schema->any;", "true;",
             ["exactly the texts of both"]),
    Mutation("what is finished at a signal is printed",
             "    if (interrupted) show_interrupted(&g->results, g->scheduler.first);",
             "    if (interrupted) (void)show_interrupted;",
             ["Ctrl-C"]),
    Mutation("no file is left half-written",
             "    if (unfinished_file) unlink(unfinished_file);",
             "    (void)unfinished_file;",
             ["what ends the program while it writes"]),
    Mutation("no byte is lost on a stream that does not block",
             "        if (put >= 0) data += put, n -= (size_t)put;",
             "        if (put >= 0) return true;",
             ["test_streams"]),
    Mutation("a stop text is never shown",
             "        end -= held_for_stop(&o->settings->stops, &c->text);",
             "        end -= 0 * held_for_stop(&o->settings->stops, &c->text);",
             ["stop"]),
    Mutation("a score is ln softmax to 1e-5",
             "largest + log_double(total);", "largest + log_double(total + 1e-4 * total);",
             ["ln softmax"]),
    Mutation("every token is scored once, in the window that reaches it first",
             "        c->unscored = i == 0 ? 1 : (int)(context - stride);",
             "        c->unscored = i == 0 ? 1 : (int)(context - stride) + 1;",
             ["window"]),
    Mutation("the penalty does not touch structure",
             "    bool penalized = s->penalty != 1 && !c->unpenalized;",
             "    bool penalized = s->penalty != 1;",
             ["penalty does not touch"]),
    Mutation("a text goes on as if -n had been larger",
             "r->before = l->drawn,", "r->before = l->drawn + 1,", ["goes on with it"]),
    Mutation("token ids are the reference tokenizer's",
             "k = w->least[2 * k] == w->least[k] ? 2 * k : 2 * k + 1;",
             "k = w->least[2 * k + 1] == w->least[k] ? 2 * k + 1 : 2 * k;",
             ["test_tokenizer"], "tokenizer.c"),
    Mutation("what cannot be written is told",
             'if (!write_fully(w->fd, w->data, n)) die("cannot write to %s: %s"',
             'if (!write_fully(w->fd, w->data, n) && n == 0) die("cannot write to %s: %s"',
             ["a full disk is"]),
    Mutation("no text is a command to a terminal",
             "else if (!json && terminal && (broken ||",
             "else if (!json && !terminal && (broken ||",
             ["on a terminal control"]),
]


def caught(mutation, folder):
    """The tests that fail on the program with this fault in it."""
    source = (ROOT / mutation.source).read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        sys.exit("%s: %d places are %r" % (mutation.promise, source.count(mutation.old),
                                           mutation.old))
    # Some tests build programs of their own from the sources, so they too must be the changed ones.
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "*.bin", "__pycache__"))
    changed = source.replace(mutation.old, mutation.new)
    (folder / mutation.source).write_text(changed, encoding="utf-8")
    subprocess.run(["make", "-s", "-B", "-C", folder, "kl3m"], check=True)
    done = subprocess.run([sys.executable, folder / "tests" / "run.py", *mutation.words],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    return [line[5:] for line in done.stdout.splitlines() if line.startswith("FAIL ")]


def main():
    chosen = [m for m in MUTATIONS
              if not sys.argv[1:] or any(word in m.promise for word in sys.argv[1:])]
    missed = 0
    for mutation in chosen:
        with tempfile.TemporaryDirectory() as folder:
            failed = caught(mutation, Path(folder) / "kl3m")
        print("%-4s %s" % ("ok" if failed else "FAIL", mutation.promise), flush=True)
        print("     noticed by: %s" % "; ".join(line[:70] for line in failed) if failed
              else "     no test noticed it", flush=True)
        missed += not failed
    print("%d passed, %d failed" % (len(chosen) - missed, missed))
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
