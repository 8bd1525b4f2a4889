"""The forward pass: right to 1e-4, and the same bits whatever computes it."""
import itertools
import json
import os
import platform
import shutil
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import (KL3M, ROOT, Skip, expect, export, quantized_model, run, run_kl3m,
                     small_directory, small_model, test, tmpdir)
from models import (LEGAL_TEXT, SPECIAL, byte_alphabet, make_config, make_weights, repeat_kv,
                    save_model)
from naive import Naive

TEXT = LEGAL_TEXT[26:]

# Head sizes, inner sizes and vocabularies that no vector's width divides.
SHAPES = {
    "the default tiny shape": {},
    "rotary share 0": {"rotary_pct": 0.0},
    "rotary share 0.25, head size 8": {"num_attention_heads": 6, "rotary_pct": 0.25},
    "rotary share 1, head size 20": {"hidden_size": 60, "num_attention_heads": 3,
                                     "rotary_pct": 1.0},
    "head size 6, grouped-query": {"hidden_size": 54, "num_attention_heads": 9, "n_kv": 3,
                                   "rotary_pct": 0.34},
    "one KV head, intermediate 37, vocabulary 301": {"n_kv": 1, "intermediate_size": 37,
                                                     "vocab_size": 301},
    "serial residual": {"use_parallel_residual": False},
    "serial residual, grouped-query, three layers": {
        "use_parallel_residual": False, "n_kv": 2, "num_hidden_layers": 3, "intermediate_size": 97},
    "one head of 33, hidden size 33": {"hidden_size": 33, "num_attention_heads": 1,
                                       "rotary_pct": 0.25},
    "two heads of 80": {"hidden_size": 160, "num_attention_heads": 2, "num_hidden_layers": 1,
                        "rotary_pct": 0.25},
    "rotary base 100.5": {"rotary_emb_base": 100.5, "rotary_pct": 1.0},
    "norm epsilon 0.1": {"layer_norm_eps": 0.1},
}

# A model and a prompt that cross several blocks of 16 and 32 positions, and fill no block.
LONG = {"hidden_size": 80, "n_kv": 2, "num_hidden_layers": 3, "intermediate_size": 37,
        "vocab_size": 301, "rotary_pct": 0.3, "max_position_embeddings": 320}
LONG_TEXT = TEXT[:400]

KINDS = ["avx512vnni", "avx512", "avx2", "neondot", "neon", "portable"]


def logits(model, text, *options, env=None, program=None):
    """The bytes that --logits writes."""
    out = tmpdir() / "logits"
    done = run_kl3m("-m", model, "--no-escape", "-p", text, "--logits", out, *options, env=env,
                    program=program)
    expect((done.code, done.err), (0, ""), "kl3m --logits")
    return out.read_bytes()


def tokens(model, text):
    done = run_kl3m("-m", model, "--no-escape", "-p", text, "--tokenize")
    expect((done.code, done.err), (0, ""), "kl3m --tokenize")
    return [int(word) for word in done.out.split()]


def rows(data, count):
    """The file's numbers as so many rows."""
    numbers = array("f", data)
    width, rest = divmod(len(numbers), count)
    assert numbers and rest == 0, "%d logits are not %d rows" % (len(numbers), count)
    return [numbers[i:i + width] for i in range(0, len(numbers), width)]


def check_close(got, want, bound, what=""):
    expect(list(map(len, got)), list(map(len, want)), "lengths of the rows, " + what)
    far = [abs(a - b) for g, w in zip(got, want) for a, b in zip(g, w)]
    # NaN fails too.
    assert all(d <= bound for d in far), "%s: logits differ by %g" % (what, max(far))


def generate_one(kind):
    return run_kl3m("-m", small_model(), "-p", "The", "-n", 1, env={"KL3M_ISA": kind})


def kinds():
    """The sets of instructions that this machine and this build have."""
    found = [kind for kind in KINDS if generate_one(kind).code == 0]
    assert "portable" in found, "portable must run everywhere"
    return found


# ---- Right --------------------------------------------------------------------------------------

@test("logits are within 1e-4 of a plain double-precision pass at awkward shapes")
def awkward_shapes():
    for name, options in SHAPES.items():
        model = small_model(**options)
        ids = tokens(model, TEXT[:90])
        want = Naive(small_directory(**options)).logits(ids)
        check_close(rows(logits(model, TEXT[:90]), len(ids)), want, 1e-4, name)


@test("logits are within 1e-4 of the double-precision pass at every position of a long prompt")
def long_prompt():
    model = small_model(**LONG)
    ids = tokens(model, LONG_TEXT)
    assert len(ids) > 200, "the prompt is too short to show anything"
    check_close(rows(logits(model, LONG_TEXT), len(ids)),
                Naive(small_directory(**LONG)).logits(ids), 1e-4)


@test("weights of BF16 and F16, in several shards, give the logits of the double-precision pass")
def half_precision_weights():
    for dtype in ("BF16", "F16"):
        model = small_model(dtype=dtype, shards=3)
        ids = tokens(model, TEXT[:40])
        check_close(rows(logits(model, TEXT[:40]), len(ids)),
                    Naive(small_directory(dtype=dtype, shards=3)).logits(ids), 1e-4, dtype)


@test("an empty prompt has one row of logits, that of <|start|>")
def empty_prompt():
    want = Naive(small_directory()).logits([SPECIAL.index("<|start|>")])
    check_close(rows(logits(small_model(), ""), 1), want, 1e-4)


def references():
    paths = sorted((ROOT / "tests" / "references").glob("forward-*.json"))
    assert paths, "tests/references is empty: tests/make/make_references.py fills it"
    for path in paths:
        kept = json.loads(path.read_text(encoding="utf-8"))
        yield path.stem, kept


@test("logits are within 1e-4 of those of transformers in fp32 (kept references)")
def logits_of_transformers():
    for name, kept in references():
        model = small_model(**kept["options"])
        expect(tokens(model, kept["text"]), kept["ids"], name + ": tokens")
        got = rows(logits(model, kept["text"]), len(kept["ids"]))
        check_close([got[p] for p in kept["positions"]], kept["logits"], 1e-4, name)


@test("the double-precision pass itself agrees with transformers (kept references)")
def naive_agrees_with_transformers():
    for name, kept in references():
        got = Naive(small_directory(**kept["options"])).logits(kept["ids"])
        check_close([got[p] for p in kept["positions"]], kept["logits"], 5e-5, name)


def token_bytes(directory):
    """What each token decodes to, read from tokenizer.json; special tokens are skipped."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    back = {character: byte for byte, character in byte_alphabet().items()}
    table = {i: bytes(back[c] for c in text)
             for text, i in tokenizer["model"]["vocab"].items() if text not in SPECIAL}
    for token in tokenizer["added_tokens"]:
        if not token["special"]:
            table[token["id"]] = token["content"].encode()
    return table


@test("the greedy continuation is that of transformers (kept references)")
def greedy_as_transformers():
    for name, kept in references():
        table = token_bytes(small_directory(**kept["options"]))
        want = b"".join(table.get(i, b"") for i in kept["greedy"])
        done = run_kl3m("-m", small_model(**kept["options"]), "--no-escape", "-p", kept["text"],
                        "--no-echo", "-n", len(kept["greedy"]), "-t", 0, "--ignore-eos")
        expect((done.out, done.code), (want + b"\n", 0), name)


@test("a prompt may fill the whole context with --logits, and not pass it")
def full_context():
    model = small_model()
    text = "a " * 64  # a space is a token of its own: two tokens each
    expect(len(logits(model, text)), 128 * 520 * 4, "bytes of logits")
    out = tmpdir() / "logits"
    done = run_kl3m("-m", model, "-p", text + "a", "--logits", out)
    assert done.code in (1, 3) and "129" in done.err and "128" in done.err, (done.code, done.err)


# ---- The same -----------------------------------------------------------------------------------

def check_same(want, settings):
    """settings: (options, environment, program); each must give the bytes of `want`."""
    model = small_model(**LONG)
    for options, env, program in settings:
        got = logits(model, LONG_TEXT, *options, env=env, program=program)
        if got != want:
            where = [at // 4 for at in range(0, len(want), 4) if got[at:at + 4] != want[at:at + 4]]
            raise AssertionError(
                "with %s %s %d of %d logits have other bits, the first in row %d" % (
                    options, env or "", len(where), len(want) // 4, where[0] // 301))


@test("logits are the same bytes for any number of threads, rows in a pass, and set of "
      "instructions")
def same_bytes_however_computed():
    want = logits(small_model(**LONG), LONG_TEXT)
    threads = [["-j", j] for j in (1, 2, 3, 7)]
    passes = [["--rows", n] for n in (1, 7, 64, 320)]
    environments = [{"KL3M_ISA": kind} for kind in kinds()]
    check_same(want, [(options, None, None) for options in threads + passes])
    check_same(want, [([], env, None) for env in environments])
    check_same(want, [(j + n, env, None) for j, n, env in itertools.product(
        threads[::2], passes[::3] + [["--rows", 12]], environments)])
    # Heads of five and more panels, a query alone in its pass: other ways through the kernels.
    heads = small_model(hidden_size=160, num_attention_heads=2, num_hidden_layers=1,
                        max_position_embeddings=320)
    want = logits(heads, LONG_TEXT)
    for n, env in itertools.product(passes[:3], environments):
        assert logits(heads, LONG_TEXT, *n, env=env) == want, (n, env)
    # Sums of several blocks and, in the MLP, of more than are multiplied at a time.
    wide = small_model(hidden_size=312, num_attention_heads=3, num_hidden_layers=1,
                       intermediate_size=1300, max_position_embeddings=64)
    want = logits(wide, LONG_TEXT[:80])
    for n, env in itertools.product((["-j", 1, "--rows", 1], ["--rows", 5], ["-j", 3]),
                                    environments):
        assert logits(wide, LONG_TEXT[:80], *n, env=env) == want, (n, env)


@test("a row of logits does not depend on the tokens after it")
def later_tokens_change_nothing():
    model, width = small_model(**LONG), 301 * 4
    want = logits(model, LONG_TEXT)
    ends = [at for at, letter in enumerate(LONG_TEXT) if letter == " "]
    # Text that ends before a space is the same tokens with the space or without.
    for end in ends[::4]:
        got = logits(model, LONG_TEXT[:end])
        assert want.startswith(got), (
            "the first %d tokens have other logits alone" % (len(got) // width))


@test("a grouped-query model has the logits of the multi-head model with its KV heads repeated, to "
      "the last bit")
def grouped_query_is_multi_head():
    for heads, n_kv in ((6, 2), (6, 3), (4, 1)):
        config = make_config(num_attention_heads=heads)
        weights = make_weights(config, n_kv, seed=heads + n_kv)
        both = []
        for tensors in (weights, repeat_kv(config, weights, n_kv)):
            directory = tmpdir()
            save_model(directory, config, tensors)
            both.append(logits(export(directory), TEXT[:130]))
        assert both[0] == both[1], "%d heads, %d KV heads" % (heads, n_kv)


@test("generation gives the same bytes for the same prompt, seed and options")
def generation_repeats():
    model = small_model(**LONG)
    lines = (TEXT[:60].replace("\n", " ") + "\n" + TEXT[100:260].replace("\n", " ")
             + "\n\nThe\n").encode()
    for sampling in (["-t", 0], ["-t", 1, "-k", 0, "-r", 3]):
        def generate(*options, **env):
            done = run_kl3m("-m", model, "-n", 50, "--json", "-s", 7, *sampling, *options,
                            input=lines, env=env)
            expect((done.code, done.err), (0, ""), "kl3m %s" % (options,))
            return done.out
        want = generate("-j", 1)
        expect(want.count(b"\n"), 4, "lines")
        for options in (["-j", 2], ["-j", 3], ["--rows", 1], ["--rows", 7], ["-b", 1], ["-b", 3],
                        ["-j", 3, "--rows", 12, "-b", 2]):
            expect(generate(*options), want, " ".join(map(str, options)))
        for kind in kinds():
            expect(generate(KL3M_ISA=kind), want, kind)


@test("a set of instructions that the CPU lacks, or that nobody knows, is an error")
def unknown_instructions():
    for kind in set(KINDS) - set(kinds()) | {"mmx"}:
        done = generate_one(kind)
        expect((done.out, done.code), (b"", 1), kind)
        assert kind in done.err and "KL3M_ISA" in done.err, done.err


@test("every set of instructions that the system says the CPU has is used")
def every_instruction_set_is_used():
    cpuinfo = Path("/proc/cpuinfo")
    if (platform.machine() != "x86_64" or not cpuinfo.exists()
        or KL3M.read_bytes()[18:20] != b"\x3e\x00"):
        raise Skip("only x86-64 Linux lists them, and only for a program built for it")
    flags = set(cpuinfo.read_text().split())
    expect("avx2" in kinds(), {"avx2", "fma"} <= flags, "avx2")
    expect("avx512" in kinds(), "avx512f" in flags, "avx512")


# ---- Other builds -------------------------------------------------------------------------------

def build(compiler, flags):
    """The program, built in a copy of the tree."""
    directory = tmpdir()
    for name in ["Makefile"] + [p.name for p in ROOT.glob("*.[ch]")]:
        shutil.copy(ROOT / name, directory)
    # What `make test` was given must not reach this make.
    env = {"MAKEFLAGS": None, "MFLAGS": None, "MAKELEVEL": None}
    done = run(["make", "-C", directory, "kl3m", "CC=" + compiler, "CFLAGS=" + flags], env=env)
    expect(done.code, 0, done.err)
    return directory / "kl3m"


def check_builds(compilers, levels):
    models = [small_model(**LONG), quantized_model("bf16", **LONG), quantized_model("q8", **LONG)]
    want = [logits(model, LONG_TEXT) for model in models]
    with ThreadPoolExecutor(2) as pool:
        for program in pool.map(build, *zip(*itertools.product(compilers, levels))):
            for kind in kinds():
                for model, bytes_of in zip(models, want):
                    got = logits(model, LONG_TEXT, env={"KL3M_ISA": kind}, program=program)
                    expect(got == bytes_of, True, (program, kind, model))


@test("the compiler builds the same bytes at -O1 and -O3")
def compiler_at_two_levels():
    check_builds([os.environ.get("CC", "cc")], ["-O1", "-O3"])


@test("gcc and clang build the same bytes at -O0 to -O3, without a warning")
def compilers_at_all_levels():
    if os.environ.get("KL3M_TEST_SLOW") != "1":
        raise Skip("takes half a minute; KL3M_TEST_SLOW=1 runs it")
    check_builds([c for c in ("gcc", "clang") if shutil.which(c)],
                 [level + " -Werror" for level in ("-O0", "-O1", "-O2", "-O3", "-O3 -march=native",
                                                   "-O3 -funsafe-math-optimizations")])
