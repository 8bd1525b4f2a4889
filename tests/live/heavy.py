#!/usr/bin/env python3
"""Many prompts, little memory, few or old CPUs, other processes: the same bytes as alone.

    tests/live/heavy.py [WORD...]

KL3M_HEAVY_COUNT=N sends N prompts through each pipe instead of 100,000; with fewer, what a tenth of
them needs is not yet all, and growth is not judged. Takes some minutes, 3 GB on the disk and 2 GB
of memory. Without clang, qemu-x86_64 or the right to make a cgroup some of it is skipped.
"""
import sys

sys.dont_write_bytecode = True

import collections
import functools
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import (KL3M, ROOT, SHARED, Skip, expect, quantized_model, run, run_kl3m, run_tests,
                     selected, small_model, test, tmpdir)
from models import LEGAL_TEXT, REAL_SHAPES

COUNT = int(os.environ.get("KL3M_HEAVY_COUNT", 100000))

CONTEXT = 256
SMALL = {"max_position_embeddings": CONTEXT, "hidden_size": 32, "num_attention_heads": 2,
         "intermediate_size": 32, "num_hidden_layers": 1}

# What the largest resident set may grow by in the last nine tenths of the answers. Measured: up to
# 0.2 MB. The smallest block of malloc has 32 bytes: one lost for each prompt would be 2.9 MB. Under
# schemas, up to 2 MB, and from run to run 5 MB between the peaks after a tenth: it depends on which
# of those that are kept are large at the same time.
GROWTH = {"generation": 2.5e6, "schemas": 8e6, "scores": 2.5e6}


def report(text, *values):
    print("     " + text % values, flush=True)


def real_model():
    tokenizer = SHARED and str(SHARED / "kl3m-002-170m" / "tokenizer.json")
    return small_model(tokenizer=tokenizer, **REAL_SHAPES)


# ---- Work ---------------------------------------------------------------------------------------

# Options; lines in; for each of them, whether it must be refused; lines out for each.
Work = collections.namedtuple("Work", "args lines refused each")


def text(draw):
    """A line: mostly short; or empty, not UTF-8, about as long as the context, or much longer."""
    kind, source = draw.random(), LEGAL_TEXT.encode()
    if kind < 0.02:
        return b""
    size = draw.randrange(*(1200, 2000) if kind < 0.022 else (400, 600) if kind < 0.03 else (1, 60))
    at = draw.randrange(len(source) - size)
    line = bytearray(source[at:at + size])
    if 0.03 < kind < 0.06:
        line[draw.randrange(size)] = draw.choice(b"\x80\xc3\xe2\xf0\xff")
    return bytes(line).replace(b"\n", b"\\n")


def texts_and_tokens(count, draw):
    lines = [text(draw) for _ in range(count)]
    done = run_kl3m("-m", small_model(**SMALL), "--tokenize", input=b"\n".join(lines) + b"\n")
    expect(done.out.count(b"\n"), count, done.err)
    # An empty one takes a place of the context too.
    return [(line, max(1, len(ids.split()))) for line, ids in zip(lines, done.out.split(b"\n"))]


def generation(count):
    lines, tokens = zip(*texts_and_tokens(count, random.Random(1)))
    return Work(["-s", "7", "-n", "8", "-r", "3"], lines, [n >= CONTEXT for n in tokens], 3)


@functools.lru_cache(maxsize=None)
def schemas():
    """200 of them, three times as many as the program keeps, each with its least -n."""
    path, found = tmpdir() / "schema", []
    for i in range(50):
        for schema in ({"enum": ["a%d" % i, None]}, {"type": "integer", "minimum": i},
                       {"type": "array", "items": {"enum": [i, "x"]}, "maxItems": 1 + i % 7},
                       {"type": "object", "properties": {"k%d" % i: {"type": "boolean"}},
                        "required": ["k%d" % i]}):
            path.write_text(json.dumps(schema))
            said = run_kl3m("-m", small_model(**SMALL), "--check", "--schema", path).text
            found.append((path.read_bytes(), int(said.split()[-1])))
    return found


def constrained(count):
    """Records, each with one of the schemas; some without, or with one that is not supported."""
    draw, lines, refused = random.Random(2), [], []
    for prompt, tokens in texts_and_tokens(count, draw):
        (schema, least), kind = draw.choice(schemas()), draw.random()
        schema = b'{"not": {"type": "null"}}' if kind < 0.01 else schema
        lines.append(b'{"id": %d, "prompt": "%s", "%s": %s}'
                     % (len(lines), prompt.replace(b'"', b'\\"'),
                        b"other" if kind > 0.99 else b"s", schema))
        is_utf8 = prompt.decode("utf-8", "ignore").encode() == prompt
        refused.append(not (0.01 <= kind <= 0.99 and is_utf8 and tokens + least <= CONTEXT))
    return Work(["-s", "7", "-n", "24", "--jsonl", "--schema-member", "s"], lines, refused, 1)


def scores(count):
    """A text alone may be longer than the context, but not with a continuation."""
    draw, lines, refused = random.Random(3), [], []
    for (one, n), (two, m) in zip(texts_and_tokens(count, draw), texts_and_tokens(count, draw)):
        pair = draw.random() < 0.5
        lines.append(one + b"\t" + two if pair else one)
        refused.append(pair and n + (m if two else 0) > CONTEXT + 1)
    return Work(["--score"], lines, refused, 1)


KINDS = {"generation": generation, "schemas": constrained, "scores": scores}


def check(work, out, err, code):
    """Each line that is to be refused, and no other, is named on standard error."""
    expect(code, 3 if any(work.refused) else 0, err)
    named = sorted({int(n) for n in re.findall(r"^kl3m: line (\d+): ", err, re.M)})
    expect(named, [i + 1 for i, bad in enumerate(work.refused) if bad], err)
    expect(out.count(b"\n"), len(work.lines) * work.each)


def made(work, *args, **more):
    done = run_kl3m("-m", small_model(**SMALL), *work.args, *args,
                    input=b"".join(line + b"\n" for line in work.lines), **more)
    check(work, done.out, done.err, done.code)
    return done.out


# ---- Many prompts -------------------------------------------------------------------------------

def peak_memory(child):
    status = Path("/proc/%d/status" % child.pid).read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024


def through_a_pipe(work):
    """The lines out, and the process's peak when a tenth of them was out and when all were."""
    def write():
        child.stdin.write(b"".join(line + b"\n" for line in work.lines))
        child.stdin.flush()

    with open(tmpdir() / "stderr", "w+b") as said, subprocess.Popen(
            [KL3M, "-m", str(small_model(**SMALL)), *work.args], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=said) as child:
        writer = threading.Thread(target=write)
        writer.start()
        total = len(work.lines) * work.each
        out = [child.stdout.readline() for _ in range(total // 10)]
        early = peak_memory(child)
        out += [child.stdout.readline() for _ in range(total - len(out))]
        late = peak_memory(child)          # it waits for more lines, so it is still there
        writer.join()
        child.stdin.close()
        out.append(child.stdout.read())
        child.wait()
        said.seek(0)
        check(work, b"".join(out), said.read().decode("utf-8", "replace"), child.returncode)
    return out, early, late


@test("100,000 prompts: an answer each, as alone, in memory that does not grow")
def many_prompts():
    if not Path("/proc/self/status").exists():
        raise Skip("the system does not say how much memory a process has used")
    for kind, make in KINDS.items():
        work, start = make(COUNT), time.monotonic()
        out, early, late = through_a_pipe(work)
        took, draw = time.monotonic() - start, random.Random(4)
        bad = [i for i, refused in enumerate(work.refused) if refused]
        for i in draw.sample(range(COUNT), 60) + draw.sample(bad, min(20, len(bad))):
            alone = made(Work(work.args, [work.lines[i]], [work.refused[i]], work.each))
            expect(b"".join(out[i * work.each:(i + 1) * work.each]), alone, work.lines[i])
        report("%s: %d lines in %.1f s, %d of them refused, %.1f MB after a tenth and %.1f at the "
               "end", kind, COUNT, took, len(bad), early * 1e-6, late * 1e-6)
        assert COUNT < 100000 or late - early < GROWTH[kind], (kind, early, late)


# ---- Threads and processes ----------------------------------------------------------------------

@test("ThreadSanitizer has nothing to say of a part of them, and the bytes are the same")
def no_races():
    if not shutil.which("clang"):
        raise Skip("there is no clang")
    watched = tmpdir() / "kl3m"
    done = run(["make", "-s", "-B", "CC=clang", "CFLAGS=-O1 -g -fsanitize=thread",
                "OUT=%s" % watched, watched], cwd=ROOT)
    expect(done.code, 0, done.err)
    for make in KINDS.values():
        work = make(300)
        expect(made(work, "-j", 4, program=watched), made(work))


def on_two_cpus(threads):
    """A pool of threads whose children run on two CPUs."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    return ThreadPoolExecutor(threads, initializer=os.sched_setaffinity, initargs=(0, cpus))


@test("eight processes on one model file and two CPUs: each ends with the bytes it has alone")
def many_processes():
    works = [make(count) for count in (500, 600, 700) for make in KINDS.values()][:8]
    alone = [made(work) for work in works]
    with on_two_cpus(8) as pool:
        expect(list(pool.map(made, works)), alone)


@test("-j 64 on two CPUs starts two threads, and takes no longer than -j 2")
def too_many_threads():
    def seconds(threads, args, given):
        start = time.monotonic()
        done = run_kl3m("-m", real_model(), "-s", 1, "--ignore-eos", "-v", "-j", threads, *args,
                        input=given)
        took = time.monotonic() - start
        used = re.search(r"tokens/s, \w+, (\d+) thread", done.err)
        assert done.code == 0 and used and int(used.group(1)) <= 2, done.err
        return took

    def ratio(i, work):
        """Of one pair of runs, now one and now the other first."""
        took = {threads: seconds(threads, *work) for threads in ((2, 64) if i % 2 else (64, 2))}
        return took[64] / took[2]

    prompts = b"".join(b"The State of %d and its law\n" % i for i in range(16))
    with on_two_cpus(1) as pool:
        for name, *work in (("one text", ["-p", "This", "-n", "40", "--no-speculation"], b""),
                            ("a file of prompts", ["-n", "8"], prompts)):
            pool.submit(seconds, 2, *work).result()            # the model is in memory after it
            ratios = list(pool.map(lambda i: ratio(i, work), range(7)))
            report("%s: -j 64 takes %.2f times as long as -j 2 (%.2f to %.2f)", name,
                   statistics.median(ratios), min(ratios), max(ratios))
            assert statistics.median(ratios) < 1.5, ratios     # lax: a machine may be busy


# ---- Little memory ------------------------------------------------------------------------------

@contextmanager
def cgroup(limit):
    """A new cgroup with so many bytes below our own: the file to enter it by, and a function that
    says its peak."""
    own = dict(line.split(":", 2)[1:] for line in
               Path("/proc/self/cgroup").read_text().splitlines())
    first = "memory" in own                                     # version 1
    folder = Path("/sys/fs/cgroup" + ("/memory" + own["memory"] if first else own.get("", "")),
                  "kl3m-test-%d" % os.getpid())
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        raise Skip("no cgroup with a limit can be made: %s" % error)
    peak = folder / ("memory.max_usage_in_bytes" if first else "memory.peak")
    try:
        yield folder / "cgroup.procs", lambda: int(peak.read_text())
    finally:
        folder.rmdir()


def within(limit, *args, input=None):
    """Runs the program at the real shapes behind a command of the shell that limits it."""
    prompt = ["-p", "This"] if input is None else []
    return run(["sh", "-c", limit + ' && exec "$@"', "sh", KL3M, "-m", real_model(), "-s", "1",
                *prompt, *args], input)


def forget(path):
    """Its pages leave memory, so that who reads them next is charged for them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SIXTEEN = ["-n", "16", "-t", "1", "--ignore-eos", "--json", "--logprobs", "0"]


@test("in a cgroup of 1 GB the real shapes run, three processes as well as one: they share the map")
def one_gigabyte():
    size, want = real_model().stat().st_size, within(":", *SIXTEEN).out
    for count in (1, 3):
        forget(real_model())
        with cgroup(2 ** 30) as (entry, peak), ThreadPoolExecutor(count) as pool:
            for done in pool.map(lambda _: within("echo 0 >%s" % entry, *SIXTEEN), range(count)):
                expect((done.out, done.code), (want, 0), done.err)
            report("%d at once: %.0f MB at the peak, the model has %.0f", count, peak() * 1e-6,
                   size * 1e-6)
            if peak() < size / 2:
                raise Skip("what is read of the model is not charged to the cgroup")
            assert peak() < size + count * 50e6, peak()


@test("in one of 100 MB they run too, slowly; and what cannot fit is said")
def hundred_megabytes():
    want = within(":", *SIXTEEN).out
    forget(real_model())
    with cgroup(100 * 2 ** 20) as (entry, _):
        start, done = time.monotonic(), within("echo 0 >%s" % entry, *SIXTEEN)
        expect((done.out, done.code), (want, 0), done.err)
        report("16 tokens in %.1f s", time.monotonic() - start)
        # By itself the program keeps a quarter of it for keys and values, and at most three.
        for n, more, reason in (
                ("4000", [], "the memory here allows 78.6; a smaller -n or more memory does"),
                ("4000", ["--kv-memory", "9G"], "the memory here allows 78.6; a smaller -n"),
                ("300", [], "--kv-memory allows 26.2; a smaller -n or a larger --kv-memory does")):
            done = within("echo 0 >%s" % entry, "-n", n, *more)
            expect(done.code, 3, done.err)
            assert reason in done.err, done.err


@test("a --kv-memory beyond a cgroup of 1 GB is not filled: prompts wait until there is room")
def more_than_there_is():
    prompts = b"".join(b"%d law" % i + b" law" * 1450 + b"\n" for i in range(3))
    with cgroup(2 ** 30) as (entry, peak):
        done = within("echo 0 >%s" % entry, "-v", "-n", "1", "--kv-memory", "9G", input=prompts)
        expect((done.code, done.out.count(b"\n")), (0, 3), done.err)
        used, most = re.search(r"([\d.]+) of ([\d.]+) MB for keys", done.err).groups()
        report("%s of %s MB for keys and values, %.0f MB at the peak", used, most, peak() * 1e-6)
        assert 400 < float(used) <= float(most) == 805.3, done.err


@test("where the system gives no more memory there is a message and status 1")
def address_space():
    for megabytes, args, message in (
            (500, [], "cannot map the model"), (1000, ["-r", "1000000000"], "out of memory"),
            (1000, ["-r", "4000", "-b", "4000", "-n", "99", "--kv-memory", "9G"], "out of memory"),
            (1000, ["--rows", "1000000"], "out of memory")):
        done = within("ulimit -v %d" % (megabytes * 1024), *args)
        assert done.code == 1 and done.err.startswith("kl3m: " + message), (args, done.err)
    done = within("ulimit -v 1024000", "-n", "2", "-r", "200", "--kv-memory", "64M")
    expect((done.code, done.out.count(b"\n")), (0, 200), done.err)


# ---- Other CPUs ---------------------------------------------------------------------------------

@test("CPUs without AVX-512, AVX2 and AVX give the same bytes")
def old_cpus():
    if platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"):
        raise Skip("there is no qemu-x86_64, or this is no x86-64")

    def outputs(model, *before):
        program, logits = [*before, KL3M, "-m", model], tmpdir() / "logits"
        lines = run([*program, "-s", "1", "-v", "-n", "20", "-r", "2"], env={"KL3M_ISA": None},
                    input=b"The State of New York\nThis Agreement\n\n")
        file = run([*program, "-p", LEGAL_TEXT[:150], "--logits", logits], env={"KL3M_ISA": None})
        expect((lines.code, file.code), (0, 0), lines.err + file.err)
        kind = re.search(r"tokens/s, (\w+), \d+ thread", lines.err).group(1)
        return kind, (lines.out, logits.read_bytes())

    for model in (small_model(), quantized_model("bf16"), quantized_model("q8")):
        _, want = outputs(model)
        for cpu, kind in {"Haswell": "avx2", "SandyBridge": "portable", "Nehalem": "portable",
                          "qemu64": "portable"}.items():
            expect(outputs(model, "qemu-x86_64", "-cpu", cpu), (kind, want), (cpu, model))


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
