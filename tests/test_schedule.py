"""Many prompts at once: the same bytes whatever is in work beside them, within the memory that is
allowed."""
import json
import os
import pty
import random
import re
import subprocess
import threading
import time

from harness import KL3M, PATIENCE, Skip, expect, run_kl3m, small_model, test, tmpdir
from models import LEGAL_TEXT
from test_unit import run_unit

SIZES = {"max_position_embeddings": 640, "hidden_size": 64, "num_attention_heads": 4}


def model():
    return small_model(**SIZES)


def lines(prompts):
    return b"".join(prompt.replace("\n", "\\n").encode() + b"\n" for prompt in prompts)


def random_prompts(count, seed):
    """Prompts of 1 to 400 characters, many with a beginning in common with another."""
    draw, prompts = random.Random(seed), []
    for _ in range(count):
        start = (draw.choice(prompts)[:draw.randrange(1, 300)]
                 if prompts and draw.random() < 0.6 else "")
        at = draw.randrange(len(LEGAL_TEXT) - 200)
        prompts.append(start + LEGAL_TEXT[at:at + draw.randrange(1, 100)])
    return prompts


def figures(*args, input):
    """What -v says of a run: passes, rows, tokens and the MB of keys and values, with its
    output."""
    done = run_kl3m("-m", model(), "-s", 1, "-v", *args, input=input)
    expect(done.code, 0, done.err)
    passes, rows, tokens = map(int, re.search(r"(\d+) passes, (\d+) rows, (\d+) new tokens",
                                              done.err).groups())
    megabytes, ceiling = map(float,
                             re.search(r"([\d.]+) of ([\d.]+) MB for keys", done.err).groups())
    return done.out, passes, rows, tokens, megabytes, ceiling


def count_tokens(prompts):
    done = run_kl3m("-m", model(), "--tokenize", input=lines(prompts))
    return [len(line.split()) for line in done.text.split("\n")[:-1]]


def peak_memory(*args, input):
    """The largest resident set in bytes, read while the program waits for more prompts; and the
    output."""
    if not os.path.exists("/proc/self/status"):
        raise Skip("the system does not say how much memory a process has used")
    with subprocess.Popen([KL3M, "-m", str(model()), "-s", "1", *args], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        writer = threading.Thread(target=lambda: (child.stdin.write(input), child.stdin.flush()))
        writer.start()
        out = b"".join(child.stdout.readline() for _ in range(input.count(b"\n")))
        writer.join()
        with open("/proc/%d/status" % child.pid) as file:
            peak = re.search(r"VmHWM:\s*(\d+) kB", file.read()).group(1)
        child.stdin.close()
    expect(child.returncode, 0)
    return int(peak) * 1024, out


@test("a whole file gives the bytes that each of its lines gives alone, for any batch, rows, "
      "threads and memory")
def whole_file_as_each_line():
    prompts = random_prompts(60, 1)
    args = ["-m", model(), "-s", 9, "-n", 40, "-t", 1]
    alone = b"".join(run_kl3m(*args, input=lines([prompt])).out for prompt in prompts)
    expect(alone.count(b"\n"), 60)
    for more in ([], ["-b", 1], ["-b", 7, "--rows", 13], ["-b", 200, "-j", 3],
                 ["--kv-memory", "1M"], ["-b", 5, "--kv-memory", "3M", "--rows", 40]):
        expect(run_kl3m(*args, *more, input=lines(prompts)).out, alone, more)
    three = run_kl3m(*args, "-r", 3, "--kv-memory", "1M", input=lines(prompts)).out
    expect(b"".join(line + b"\n" for line in three.split(b"\n")[:-1:3]), alone)


@test("so do grouped-query models and others whose attention stands beside the products, split "
      "prompts and guesses too")
def other_shapes_and_split_prompts():
    prompts = random_prompts(40, 3)
    # Heads of 16 columns: each half of them fills pairs of panels.
    for heads, shape in [(8, {}), (32, {"n_kv": 4})]:
        args = ["-m", small_model(hidden_size=16 * heads, num_attention_heads=heads,
                                  max_position_embeddings=640, **shape),
                "-s", 5, "-n", 24, "-t", 0.1]
        want = run_kl3m(*args, "-b", 1, "-j", 1, "--no-speculation", input=lines(prompts)).out
        expect(want.count(b"\n"), 40)
        for more in (["-b", 40, "-j", 1, "--rows", 300], ["-b", 30, "-j", 3],
                     ["-b", 16, "-j", 2, "--no-speculation"]):
            expect(run_kl3m(*args, *more, input=lines(prompts)).out, want, (heads, more))


@test("a beginning that prompts have in common is computed once, whether they run together or one "
      "after the other")
def common_beginnings():
    start = LEGAL_TEXT[:500]
    prompts = [start + end for end in ("A", "The", " of the State", "\n\nLaw", "")]
    common, own = count_tokens([start])[0], count_tokens(prompts)
    assert common > 96, common
    # All but the part of a page at the end, for each but the first.
    shared = sum(own) - 4 * (common // 32 * 32)
    for more in ([], ["-b", 1], ["-b", 2, "--rows", 50]):
        out, _, rows, _, _, _ = figures("-n", 1, *more, input=lines(prompts))
        assert rows <= shared + 32, (rows, shared, more)
    expect(out, b"".join(figures("-n", 1, input=lines([prompt]))[0] for prompt in prompts))
    # A prompt that goes on where a remembered one ends; bytes that are a token each, so that
    # nothing lies behind them.
    odd = bytes(random.Random(1).choice(b"\x81\x91\xa1\xb1\xc1\xf9\xfb\xfe") for _ in range(300))
    one, two = (run_kl3m("-m", model(), "-0", "-n", 2, "-s", 1, input=text).out
                for text in (odd[:34], odd))
    expect(run_kl3m("-m", model(), "-0", "-n", 2, "-s", 1, "-b", 1,
                    input=odd[:34] + b"\0" + odd).out, one + two)
    # Another prompt between them does not make the program forget, and its own beginning is not
    # taken for theirs.
    between = ["Something else altogether. " * 5]
    _, _, rows, _, _, _ = figures("-n", 1, "-b", 1,
                                  input=lines(prompts[:1] + between + prompts[1:]))
    assert rows <= shared + 32 + count_tokens(between)[0], rows


@test("keys and values stay below --kv-memory; a prompt that cannot fit is refused and "
      "keeps its place")
def memory_ceiling():
    prompts = random_prompts(80, 2)
    want = figures("-n", 50, input=lines(prompts))
    for size in ("2M", "1M"):
        got = figures("-n", 50, "-b", 80, "--kv-memory", size, input=lines(prompts))
        expect(got[0], want[0])
        ceiling = int(size[0]) * 1048576e-6
        assert got[4] <= ceiling and abs(got[5] - ceiling) < 0.06, got[1:]
    assert want[4] > 2.2, "the ceiling was no constraint"
    done = run_kl3m("-m", model(), "-s", 1, "-n", 4, "--kv-memory", "150K",
                    input=lines(["The", LEGAL_TEXT[:600], "The"]))
    expect((done.code, done.out.split(b"\n")[0], done.out.split(b"\n")[1]),
           (3, done.out.split(b"\n")[2], b""))
    assert "line 2" in done.err and "--kv-memory" in done.err, done.err
    # So is an empty prompt, which starts from <|start|>; nothing is refused for memory that it will
    # not use.
    for text, n, code in (("", 200, 3), ("", 4, 0), (LEGAL_TEXT[:600], 0, 0)):
        done = run_kl3m("-m", model(), "-n", n, "--kv-memory", "150K", input=lines([text]))
        expect((done.code, "--kv-memory" in done.err), (code, code == 3), done.err)
    # Continuations that end before the last one begins give their pages back too: else the rest
    # would wait for ever.
    for more in (["-n", 1, "-b", 2], ["-n", 20, "-b", 3], ["-n", 40, "-b", 50]):
        free = figures("-r", 5, *more, input=lines(prompts))[0]
        expect(figures("-r", 5, *more, "--kv-memory", "800K", input=lines(prompts))[0], free, more)
    # The system's own count, with pages so many that they show.
    small, _ = peak_memory("-n", "250", "-b", "300", "--kv-memory", "1M",
                           input=lines(["The"] * 300))
    large, _ = peak_memory("-n", "250", "-b", "300", "--kv-memory", "1G",
                           input=lines(["The"] * 300))
    assert large - small > 8e6, (small, large)


@test("ten thousand prompts need no more memory than a hundred")
def ten_thousand_prompts():
    few, _ = peak_memory("-n", "2", input=lines(["The State %d" % i for i in range(100)]))
    many, out = peak_memory("-n", "2", input=lines(["The State %d" % i for i in range(10000)]))
    expect(out.count(b"\n"), 10000)
    assert many < few + 6e6, (few, many)


@test("half of a pass's rows go to the oldest prompts, the rest to those that need the fewest")
def rows_of_a_pass():
    run_unit("prefill")


@test("from a slow writer each prompt is answered before the next one comes, and an endless one is "
      "served until it stops")
def slow_writer():
    with subprocess.Popen([KL3M, "-m", str(model()), "-n", "3", "-s", "1"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        for i in range(4):
            child.stdin.write(b"The State %d\n" % i)
            child.stdin.flush()
            assert child.stdout.readline().startswith(b"The State %d" % i)
        child.stdin.close()
        expect(child.stdout.read(), b"")
    shell = ("yes 'The State' | '%s' -m '%s' -n 2 -s 1 | head -n 500 | sort | uniq -c"
             % (KL3M, model()))
    done = subprocess.run(["sh", "-c", shell], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=PATIENCE)
    expect((done.stdout.split()[0], done.stdout.count(b"\n"), done.stderr), (b"500", 1, b""))


def run_slowly(*args, input, terminal=True):
    """What a run shows on standard error, a terminal or not, and what it writes; slow enough to
    show something."""
    ours, theirs = pty.openpty()
    with open(input, "rb") as source:
        child = subprocess.Popen([KL3M, "-m", str(model()), "-s", "1", "-b", "1", "-j", "1", *args],
                                 stdin=source, stdout=subprocess.PIPE,
                                 stderr=theirs if terminal else subprocess.PIPE,
                                 env={"KL3M_ISA": "portable"})
    os.close(theirs)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(child.stdout.read()))
    reader.start()
    shown = b""
    try:
        while terminal:
            shown += os.read(ours, 4096)
    except OSError:     # nobody has the terminal open any more
        pass
    shown += b"" if terminal else child.stderr.read()
    reader.join()
    os.close(ours)
    expect(child.wait(), 0)
    return shown.decode(), seen[0]


@test("on a terminal standard error counts the prompts while they run and is clean at the end; "
      "elsewhere and with -q it is silent")
def counter_on_a_terminal():
    def run(*args, terminal=True):
        return run_slowly("-n", "200", *args, input=prompts, terminal=terminal)
    prompts = tmpdir() / "prompts.txt"
    prompts.write_bytes(lines(random_prompts(25, 5)))
    shown, out = run()
    expect(out.count(b"\n"), 25)
    steps = re.findall(r"\rkl3m: (\d+) prompts?, (\d+) tokens/s(?:, (\d+):(\d\d) left)?\033\[K",
                       shown)
    assert steps and steps[-1][2] and int(steps[-1][0]) <= 25, shown
    expect(sorted(int(step[0]) for step in steps), [int(step[0]) for step in steps])
    assert shown.endswith("\r\033[K"), shown
    expect(run("-q")[0], "")
    expect(run(terminal=False)[0], "")


@test("--learn counts its tokens on a terminal, says at the end what it wrote, and with -q neither")
def learning_on_a_terminal():
    out = tmpdir() / "taught.bin"

    def learn(*args, **more):
        return run_slowly("--learn", "-o", str(out), "--tokens", "400", "-n", "40", *args,
                          input=os.devnull, **more)
    shown, said = learn()
    steps = re.findall(r"\rkl3m: (\d+) of 400 tokens sampled\033\[K", shown)
    assert (steps and sorted(map(int, steps)) == list(map(int, steps))
            and shown.endswith("\r\033[K")), shown
    expect(said.decode(),
           "%s: the model with a table of guesses from 400 tokens of its own\n" % out)
    expect(learn("-q"), ("", b""))
    expect(learn(terminal=False), ("", said))


# ---- --jsonl ------------------------------------------------------------------------------------

def jsonl(*records, code=0, args=()):
    """The objects that come out for these lines, and what standard error says."""
    data = b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in (
        line for record in records for line in (record, b"\n")))
    done = run_kl3m("-m", model(), "-s", 1, "-n", 5, "--jsonl", *args, input=data)
    expect(done.code, code, done.err)
    return [json.loads(line) for line in done.text.split("\n")[:-1]], done.err


@test("--jsonl takes the prompt from each line's object and passes the other members "
      "through as they are")
def jsonl_members():
    plain = json.loads(run_kl3m("-m", model(), "-s", 1, "-n", 5, "--json",
                                input=b"The State\n").out)
    others = {"id": 7, "text\u00e9": "\u201cquoted\u201d \\ \n\x00\U0001F600",
              "deep": [1, {"a": [None, True, -0.5e-3]}, []]}
    (one, two, three), _ = jsonl(
        {"prompt": "The State", **others}, b'\t{"prompt":"The \\u0053tate" , "id":1.50}\r',
        {"seed": 9, "error": "x", "prompt": "The State", "generated_text": 1})
    expect(one, {**plain, **others})
    expect(two, {**plain, "id": 1.5})
    expect(three, plain)
    raw = run_kl3m("-m", model(), "-s", 1, "-n", 5, "--jsonl",
                   input=b'{"n": 1.50e0, "prompt": "The State"}').out
    assert raw.startswith(b'{"n": 1.50e0, "prompt": "The State", '), raw
    # Half a pair of surrogates is JSON: Python writes it for a file's name that is not UTF-8.
    half = b'"file\\udcff": "a\\udcff.txt", '
    raw = run_kl3m("-m", model(), "-s", 1, "-n", 5, "--jsonl",
                   input=b'{%b"prompt": "The State"}\n{%b"prompt": "\\udcff"}' % (half, half))
    expect((raw.code, raw.out.count(half)), (3, 2), raw.out)
    fault = json.loads(raw.out.split(b"\n")[1])["error"]
    assert "at byte 41 a whole pair of surrogates was expected; found \\udcff" in fault, fault
    # What a prompt says is taken as it is: no escapes are decoded in it a second time.
    (one,), _ = jsonl({"prompt": "a\\n\n\u00e9\x00"})
    expect(one["prompt"], "a\\n\n\u00e9\x00")
    assert one["generated_text"][0].startswith("a\\n\n\u00e9\x00"), one


@test("a line of --jsonl that is broken is an error of that line alone, with its place; so "
      "Python's json finds it too")
def broken_jsonl():
    good = {"prompt": "The State"}
    broken = [b"", b"{", b"[]", b'"x"', b"null", b"{}", b'{"prompt": 1}', b'{"prompt": "x"',
              b'{"prompt": "x"}}', b'{"prompt": "x", }', b'{"prompt": "x" "y": 1}',
              b"{'prompt': 'x'}", b'{"prompt": "\\x"}', b'{"prompt": "\\ud800"}',
              b'{"prompt": "\\ud800\\u0041"}', b'{"prompt": "a\tb"}', b'{"prompt": "\xff"}',
              b'{"prompt": "x", "n": 01}', b'{"prompt": "x", "n": 1.}', b'{"prompt": "x", "n": .5}',
              b'{"prompt": "x", "n": 1e}', b'{"prompt": "x", "n": NaN}',
              b'{"prompt": "x", "n": tru}',
              b'{"prompt": "x", "n": -}', b'{"prompt": "x", "n": [1 2]}',
              b'{"prompt": "x", "n": [1,]}', b'{"prompt": "x", "n": {"a" 1}}',
              b'{"prompt": "x", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"prompt": "\\u12"}',
              b'{"prompt": "x\\', b'{"prompt": "x\\u', b'\xef\xbb\xbf{"prompt": "x"}']
    out, err = jsonl(*(line for bad in broken for line in (bad, good)), code=3)
    for i, bad in enumerate(broken):
        expect(sorted(out[2 * i]), ["error", "prompt"], bad)
        expect(out[2 * i]["prompt"], None, bad)
        assert "line %d:" % (2 * i + 1) in err, err
        if b"01}" in bad:
            assert "at byte 21 a value was expected; found 01}" in out[2 * i]["error"], out[2 * i]
        expect(out[2 * i + 1]["prompt"], "The State", bad)
    # Any line with a byte changed is taken when Python takes it (but for NaN and lone surrogates),
    # and refused else.
    draw = random.Random(4)
    line = b'{"id": [1, -2.5e3, {"x": "\\u00e9"}], "prompt": "The \\"State\\"", "ok": true}'
    changed = [line[:i] + bytes([draw.choice(b'{}[]",:\\u0e.-1 tn\x01\xc3')])
               + line[i + draw.randrange(2):]
               for i in (draw.randrange(len(line)) for _ in range(400))]
    done = run_kl3m("-m", model(), "-s", 1, "-n", 1, "--jsonl", "-q",
                    input=b"\n".join(changed) + b"\n")
    results = done.text.split("\n")[:-1]
    expect(len(results), len(changed))
    for source, result in zip(changed, map(json.loads, results)):
        try:
            record = json.loads(source.decode())
            fine = isinstance(record, dict) and isinstance(record.get("prompt"), str)
        except ValueError:
            fine = False
        expect("error" not in result, fine, source)


@test("--jsonl goes with no other source of prompts and with no other command")
def jsonl_alone():
    for args in (["-p", "x"], ["-f", "x"], ["-0"], ["--tokenize"], ["--logits", "x"],
                 ["--detokenize"]):
        done = run_kl3m("-m", model(), "--jsonl", *args)
        expect((done.code, done.out), (2, b""), args)
        assert "--jsonl" in done.err, done.err


@test("--kv-memory takes bytes or K, M and G, and nothing else")
def sizes_of_memory():
    for size in ("1000000", "1000K", "1m", "0.5G", "2g"):
        expect(run_kl3m("-m", model(), "-n", 1, "--kv-memory", size, "-p", "x").code, 0, size)
    for size in ("", "0", "-1", "1T", "1MB", "M", "1 M", "1e9", "0x10", "nan", "inf",
                 "99999999999G", "1.2.3M"):
        done = run_kl3m("-m", model(), "--kv-memory", size, "-p", "x")
        expect((done.code, done.out), (2, b""), size)
        assert "--kv-memory: '%s' is not a size from 1 byte" % size in done.err, done.err


@test("-v's figures leave out what was waited for: prompts that are not there yet")
def waiting():
    child = subprocess.Popen([str(KL3M), "-m", str(model()), "-n", "4", "-s", "1", "-v"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    late = 3.0
    time.sleep(late)
    err = child.communicate(b"The State\n", timeout=PATIENCE)[1].decode()
    first = float(re.search(r"first token after ([\d.]+) s", err).group(1))
    took = float(re.search(r"new tokens in ([\d.]+) s", err).group(1))
    assert first <= took < late, err
