"""Guesses: they may be right, wrong or hostile, and no byte of the output depends on them."""
import array
import functools
import json
import os
import random
import re
import struct
import subprocess
import time
import zlib

from harness import KL3M, PATIENCE, ROOT, expect, run_kl3m, small_model, test, tiny_model, tmpdir
from models import LEGAL_TEXT
from test_bench import SOURCES, compile_bench, run_bench
from test_unit import run_unit

TABLE = 8 << 20      # bytes
CHANGES = {          # lines of kl3m.c, and what they become in the build below
    "Guess taken = chain->next;":
        "Guess taken = chain->next;\n"
        'if (getenv("WRONG")) taken.token = (taken.token + 1) % (uint32_t)s->m->c.vocab;',
    "if (guess.chance > 0) guess.chance = g->hits[class] / g->tries[class];":
        "if (guess.chance > 0)\n"
        'guess.chance = getenv("EAGER") ? 1 : g->hits[class] / g->tries[class];',
    "return row / (time.seconds + (n - time.rows) * row);":
        "return 0.02 + 0 * row;",
}


def trained():
    """The small trained model: its text is predictable, so guesses come true."""
    return tiny_model()


@functools.lru_cache(None)
def taught():
    """The same with a table that it was taught by itself."""
    out = tmpdir() / "taught.bin"
    done = run_kl3m("-m", trained(), "--learn", "-o", out, "-s", 1, "--tokens", 20000)
    expect(done.code, 0, done.err)
    return out


def prompts(count, seed=1):
    draw = random.Random(seed)
    texts = ["Governing Law.\n", "This Agreement", "", "The", "Section 1. Definitions.\n",
             LEGAL_TEXT[:500], "Termination.\n"]
    while len(texts) < count:
        at = draw.randrange(len(LEGAL_TEXT) - 100)
        texts.append(LEGAL_TEXT[at:at + draw.randrange(1, 80)])
    return b"".join(text.replace("\n", "\\n").encode() + b"\n" for text in texts)


def figures(err):
    """Tokens a pass, true guesses and guesses, as -v has them."""
    found = re.search(r"([\d.]+) tokens a pass, (\d+) of (\d+) guesses came true", err)
    return ((float(found.group(1)), int(found.group(2)), int(found.group(3))) if found
            else (1.0, 0, 0))


@functools.lru_cache(None)
def steady():
    """A build that does not look at the clock: a row more costs it a fiftieth of any pass, so its
    figures are the same in each run. With WRONG in its environment it corrupts every guess, with
    EAGER it guesses all it can. Its sources lie beside it."""
    place = tmpdir()
    (place / "tests" / "bench").mkdir(parents=True)
    for file in SOURCES:
        (place / file).write_bytes((ROOT / file).read_bytes())
    source = (place / "kl3m.c").read_text()
    for line, new in CHANGES.items():
        expect(source.count(line), 1, "the line that is to be changed")
        source = source.replace(line, new)
    (place / "kl3m.c").write_text(source)
    subprocess.run([os.environ.get("CC") or "cc", "-std=c11", "-O1", "-ffp-contract=off",
                    "-pthread", "-o", "steady", "kl3m.c", "tokenizer.c", "-lm"], check=True,
                   cwd=place)
    return place / "steady"


@functools.lru_cache(None)
def steady_bench():
    out = steady().parent / "bench"
    compile_bench(out, root=out.parent, level="-O1")
    return out


SETTINGS = [
    ["-t", 0.3],
    ["-t", 0],
    ["-t", 1, "-k", 0],
    ["-t", 0.7, "--top-p", 0.9, "-r", 3],
    ["-t", 0.3, "--repetition-penalty", 1.3],
    ["-t", 0.3, "--ignore-eos", "-n", 100],
    ["-t", 0.3, "--stop", "th", "--stop", "of the"],
    ["-t", 0.3, "-b", 1],
    ["-t", 0.3, "-b", 3, "--rows", 5, "-r", 2],
    ["-t", 0.3, "-n", 1],
    ["-t", 0.3, "-n", 2],
    ["-t", 0.5, "-j", 3, "-n", 90],
]


def generate(model, settings, count, isa, *args, program=None, env=None):
    env = dict(env or {})
    if isa:
        env["KL3M_ISA"] = isa
    return run_kl3m("-m", model, "-s", 5, "-n", 40, "--json", "-v", *settings, *args,
                    input=prompts(count), env=env, program=program)


@functools.lru_cache(None)
def without_guesses(model, settings, count, isa):
    return generate(model, settings, count, isa, "--no-speculation")


def compare(model, settings, program=None, isa=None, count=16, env=None):
    """Runs prompts with and without guesses; returns the generations compared and the guesses'
    figures."""
    plain = without_guesses(model, tuple(settings), count, isa)
    guessed = generate(model, settings, count, isa, program=program, env=env)
    expect(plain.code, guessed.code, guessed.err)
    expect(figures(plain.err), (1.0, 0, 0), "one token a pass")
    for one, other in zip(guessed.text.split("\n"), plain.text.split("\n")):
        expect(one, other, (settings, isa))
    expect(guessed.out, plain.out)
    texts = sum(len(json.loads(line).get("generated_text", ())) for line in plain.text.splitlines())
    return texts, figures(guessed.err)


@test("hundreds of seeded texts are the same bytes with guesses and without, whatever the settings")
def same_bytes_as_without_guesses():
    texts = true = guesses = 0
    for model in (trained(), taught(), small_model()):
        for settings in SETTINGS:
            compared, (_, right, run) = compare(model, settings, program=steady())
            texts, true, guesses = texts + compared, true + right, guesses + run
    assert texts >= 500 and guesses > 5000 and true > 2000, (texts, guesses, true)


@test("guesses change no byte on any kind of CPU")
def same_bytes_on_every_cpu():
    for isa in ("avx512vnni", "avx512", "avx2", "neondot", "neon", "portable"):
        if run_kl3m("-m", trained(), "-p", "Q", "-n", 1, env={"KL3M_ISA": isa}).code == 0:
            _, (_, true, _) = compare(taught(), ["-t", 0.3], program=steady(), isa=isa, count=7)
            assert true > 30, (isa, true)


@test("builds that corrupt every guess, or that guess all they can, make the same bytes")
def wrong_and_eager_guesses():
    taken = 0
    for settings in SETTINGS:
        _, (_, true, guesses) = compare(taught(), settings, program=steady(), count=8,
                                       env={"WRONG": "1"})
        assert guesses > 20 * true or settings[-2:] in (["-n", 1], ["-n", 2]), (
            settings, true, guesses)
        _, (_, true, _) = compare(taught(), settings, program=steady(), count=8, env={"EAGER": "1"})
        taken += true
    assert taken > 500, taken


def sections(data):
    """A model file's sections by name, and their bytes."""
    count, = struct.unpack_from("<I", data, 12)
    found = {}
    for i in range(count):
        name, kind, crc, offset, size, rows, cols, layout, _ = struct.unpack_from(
            "<56sIIQQIIII", data, 64 + 96 * i)
        found[name.rstrip(b"\0").decode()] = (kind, rows, cols, layout, crc,
                                              data[offset:offset + size])
    return found


def with_table(table, out, offset=None):
    """The trained model with these bytes for a table, whatever they are; or a table that lies at
    another offset."""
    data = bytearray(taught().read_bytes())
    count, = struct.unpack_from("<I", data, 12)
    at = 64 + 96 * (count - 1)
    assert data[at:at + 8] == b"guesses\0"
    if offset is None:
        offset, = struct.unpack_from("<Q", data, at + 64)
        data[offset:offset + TABLE] = bytes(TABLE)
        data[offset:offset + len(table)] = table
    struct.pack_into("<IQQ", data, at + 60, zlib.crc32(table), offset, len(table))
    struct.pack_into("<I", data, 24, zlib.crc32(data[64:64 + 96 * count], zlib.crc32(data[:24])))
    out.write_bytes(data)
    return out


@test("a table of anything changes no byte; one of a wrong size or place is refused, and "
      "--no-speculation does without it")
def hostile_tables():
    out, draw = tmpdir() / "hostile.bin", random.Random(1)
    table = sections(taught().read_bytes())["guesses"][-1]

    def spoil(*change):
        """The contexts stay what they are, and what followed them becomes something else."""
        fields = array.array("B", table)
        for at in range(0, TABLE, 16):
            if table[at + 4]:
                fields[at + 4:at + 16] = array.array("B", bytes(change) or draw.randbytes(12))
        return fields.tobytes()
    tables = [draw.randbytes(TABLE), b"\xff" * TABLE, b"\1" * TABLE, bytes(TABLE),
              spoil(), spoil(*[255] * 12), spoil(1, 200, 200, 0, 9, 0, 0, 0, 9, 0, 0, 0),
              spoil(255, 0, 7, 0, *[0] * 8)]
    for spoilt in tables:
        with_table(spoilt, out)
        compare(out, ["-t", 0.3], count=8)
    for size, offset in ((0, None), (16, None), (TABLE - 16, None),
                         (TABLE, 64), (TABLE, 0), (TABLE, 1 << 20)):
        with_table(tables[0][:size], out, offset)
        done = run_kl3m("-m", out, "-p", "Q", "-n", 4)
        assert done.code == 1 and "guesses" in done.err and "--no-speculation" in done.err, (
            size, offset, done.err)
        expect(run_kl3m("-m", out, "-p", "Q", "-n", 4, "-s", 1, "--no-speculation").out,
               run_kl3m("-m", trained(), "-p", "Q", "-n", 4, "-s", 1).out)


@test("what a model computes behind the end of a text is no fault of the text's, however far was "
      "guessed")
def guesses_behind_the_end():
    model, data = tmpdir() / "m.bin", bytearray(taught().read_bytes())
    count, = struct.unpack_from("<I", data, 12)
    for i in range(count):
        name, offset = (data[64 + 96 * i:].split(b"\0", 1)[0],
                        struct.unpack_from("<Q", data, 64 + 96 * i + 64)[0])
        if name == b"embed_in.weight":
            hidden, = struct.unpack_from("<I", data, 64 + 96 * i + 84)
            end = json.loads((ROOT / "tests" / "tiny" / "tokenizer.json").read_text(
                encoding="utf-8"))["added_tokens"]
            end, = [token["id"] for token in end if token["content"] == "<|end|>"]
            struct.pack_into("<%df" % hidden, data, offset + 4 * hidden * end,
                             *[float("nan")] * hidden)
    model.write_bytes(data)
    _, (_, true, _) = compare(model, ["-n", 400], program=steady())
    assert true > 100, true


@test("--learn writes the same model with a table, the same bytes for a seed, whatever the batch "
      "and the threads")
def learn_writes_a_table():
    place = tmpdir()

    def learn(name, *args, model=trained()):
        done = run_kl3m("-m", model, "--learn", "-o", place / name, "--tokens", 3001, *args)
        expect(done.code, 0, done.err)
        return (place / name).read_bytes()
    first = learn("a", "-s", 1)
    for args in (["-b", 5], ["-j", 1, "--rows", 9], ["-j", 3, "-b", 100], ["--kv-memory", "3M"]):
        assert learn("b", "-s", 1, *args) == first, args
    assert learn("b", "-s", 2) != first and learn("b", "-s", 1, "-t", 1) != first
    (place / "own.txt").write_text("Whereas the Lessee, hereinafter. " * 20)
    assert learn("b", "-s", 1, "-f", place / "own.txt") != first
    assert learn("b", "-s", 1, model=place / "a") == first, "a table that is there is replaced"
    before, after = sections(trained().read_bytes()), sections(first)
    kind, rows, cols, layout, crc, table = after.pop("guesses")
    expect(after, before)
    expect((kind, len(table), crc), (0, TABLE, zlib.crc32(table)))
    assert table.count(0) < TABLE - 3000
    assert len(first) <= len(trained().read_bytes()) + (16 << 20)
    expect(run_kl3m("-m", place / "a", "--verify").code, 0)
    for model, word in ((trained(), "no table"), (place / "a", "a table")):
        assert re.search("^guesses +%s" % word, run_kl3m("-m", model, "--info").text, flags=re.M)
    # In its own place, and with a directory of sections that was moved for it.
    (place / "c").write_bytes(trained().read_bytes())
    assert learn("c", "-s", 1, model=place / "c") == first
    # Through a link, with the rights that the file had.
    (place / "c").write_bytes(trained().read_bytes())
    (place / "c").chmod(0o600)
    (place / "link").symlink_to("c")
    assert learn("link", "-s", 1, model=place / "link") == first
    assert (place / "link").is_symlink() and (place / "c").stat().st_mode & 0o777 == 0o600
    expect(sorted(os.listdir(place)), ["a", "b", "c", "link", "own.txt"])


@test("--learn says at once what it cannot do, and leaves nothing half-written")
def learn_refuses_at_once():
    place = tmpdir()
    # What is said before anything is sampled: these tokens would take hours.
    for args, status, word in (
            (["--learn"], 2, "--out"),
            (["-o", place / "x", "-p", "Q"], 2, "--learn"),
            (["--learn", "-o", place / "no" / "x"], 1, str(place / "no" / "x")),
            (["--learn", "-o", place], 1, str(place)),
            (["--learn", "-o", place / "x", "-f", place / "none"], 1, "none"),
            (["--learn", "-o", place / "x", "-p", "Q"], 2, "--learn"),
            (["--learn", "-o", place / "x", "-n", 0], 2, "-n, --max-new-tokens"),
            (["--learn", "-o", place / "x", "--tokens", 0], 2, "--tokens"),
            (["--learn", "-o", place / "x", "--stop", "Q"], 2, "--stop"),
            (["--learn", "-o", place / "x", "--json"], 2, "--json"),
            (["--learn", "-o", place / "x", "--truncate", "left", "-n", 4000], 1, "-n")):
        more = ["--tokens", 1 << 36] if "--learn" in args and "--tokens" not in args else []
        done = run_kl3m("-m", trained(), *args, *more)
        assert done.code == status and word in done.err and done.err.count("\n") == 1, (
            args, done.code, done.err)
    done = run_kl3m("-m", trained(), "-p", "Q", "--tokens", 5)
    assert done.code == 2 and "--learn" in done.err, done.err
    expect(os.listdir(place), [])
    child = subprocess.Popen([KL3M, "-m", str(trained()), "--learn", "-o", str(place / "x"),
                              "--tokens", "100000000"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not os.listdir(place) and child.poll() is None:
        time.sleep(0.01)
    child.terminate()
    out, err = child.communicate(timeout=PATIENCE)
    expect((child.returncode, out, err), (143, b"", b""))
    expect(os.listdir(place), [])
    done = run_kl3m("-m", trained(), "--learn", "-o", "/dev/full", "--tokens", 100)
    assert done.code == 1 and "/dev/full" in done.err and done.out == b"", done.err


@test("a model's own table makes guesses come true from its first text on, and -f teaches it the "
      "user's")
def own_table_and_own_text():
    replay, place = tmpdir() / "replay", tmpdir()
    done = run_kl3m("-m", trained(), "-s", 9, "--json", "-n", 60, "--no-echo", input=prompts(30, 3))
    texts = [json.loads(line) for line in done.text.splitlines()]
    lines = [(t["prompt"], t["generated_text"][0]) for t in texts
             if t["prompt"] and len(t.get("generated_text", [""])[0]) > 20]
    assert len(lines) > 15

    def write(lines):
        escape = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        replay.write_text("".join(
            "\t".join("".join(escape.get(c, c) for c in part) for part in line) + "\n"
            for line in lines))

    def measure(model):
        done = run_bench(model, "--replay", replay, "--json", program=steady_bench())
        expect(done.code, 0, done.err)
        return json.loads(done.text)
    write(lines)
    tokens = sum(len(run_kl3m("-m", trained(), "--tokenize", "-p", text,
                              "--no-escape").text.split()) - 1 for _, text in lines)
    without, own = measure(trained()), measure(taught())
    expect((without["tokens"], own["tokens"]), (tokens, tokens),
           "the first token of each line comes with its prompt")
    for got in (without, own):
        passes = got["tokens"] / got["tokens_per_pass"]
        assert (abs(passes - (tokens - got["guesses_true"])) < 0.01 * passes
                and got["guesses"] >= got["guesses_true"]), got
        assert min(got["tokens_per_second"]) > 0
    assert (own["tokens_per_pass"] > 2.2
            and own["tokens_per_pass"] > 1.5 * without["tokens_per_pass"]), (own, without)
    # A text that the model would never write is known after -f has brought it.
    words = random.Random(4).choices("zeugma quorum yclept fjord vexed jynx".split(), k=60)
    (place / "own.txt").write_text(" ".join(words))
    write([("zeugma", " ".join(words[20:]))])
    done = run_kl3m("-m", trained(), "--learn", "-o", place / "m", "--tokens", 2000, "-s", 1,
                    "-f", place / "own.txt")
    expect(done.code, 0, done.err)
    before, after = measure(taught()), measure(place / "m")
    assert after["tokens_per_pass"] > 1.3 * before["tokens_per_pass"], (before, after)


@test("bench --replay takes prompts, tabs and texts, and says which line is none or too long")
def bench_replay():
    replay = tmpdir() / "replay"

    def run(text, *args):
        replay.write_text(text)
        return run_bench(small_model(), "--replay", replay, *args)
    done = run("a\\tb\tThe State of Delaware\n\tx y z\nThis\tAgreement shall be governed", "-b", 2)
    expect((done.code, done.err), (0, ""))
    assert re.fullmatch(
        r"decoding of known text +tokens/pass +tokens/s\n"
        r"one token a pass +1\.00 +[\d.]+\n"
        r"with guesses +[\d.]+ +[\d.]+, [\d.]+ times as fast\n"
        r"\d+ tokens; \d+ of \d+ guesses came true\n", done.text), done.text
    for text, word in (("no tab\n", "line 1"), ("a\tb c\nQ\t\n", "line 2"), ("", "nothing")):
        done = run(text)
        assert done.code == 1 and word in done.err and str(replay) in done.err, (text, done.err)
    for long in ("%s\tb c d" % ("word " * 500), "b c d\t%s" % ("word " * 500)):
        done = run(long + "\nQ\tone two three\n")
        assert done.code == 3 and "line 1: " in done.err and done.err.count("\n") == 1, done.err


@test("the table counts what followed, and its likeliest token is the one that plain counting "
      "finds")
def table_counts():
    run_unit("guesses")


@test("the cost of a row is found from the passes that were run")
def cost_of_a_row():
    run_unit("pass_time")
