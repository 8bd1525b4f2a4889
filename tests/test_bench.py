"""tests/bench/bench.c: that it measures what it says and says it in order. How fast anything is, no
test asks."""
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from harness import (KL3M, PATIENCE, ROOT, Skip, expect, once, run, small_model, test, tmpdir,
                     until_it_catches)

WORKS = ["decode", "decode at position 240", "prefill of 32 tokens", "prefill of 240 tokens",
         "score of 32 tokens", "decode, 16 sequences at once", "decode, 48 sequences at once"]
SOURCES = ("kl3m.c", "tokenizer.c", "tokenizer.h", "tests/bench/bench.c")


def compile_bench(out, root=ROOT, level="-O2"):
    """The program built from the sources there."""
    subprocess.run([os.environ.get("CC") or "cc", "-std=c11", level, "-ffp-contract=off",
                    "-pthread", "-o", str(out), "tests/bench/bench.c", "tokenizer.c", "-lm"],
                   check=True, cwd=root)


def bench():
    if os.environ.get("BENCH"):
        return Path(os.environ["BENCH"]).resolve()
    return once("bench", compile_bench)


def run_bench(*args, program=None, env=None):
    return run([program or bench(), *(str(a) if isinstance(a, int) else a for a in args)], env=env)


def model():
    return small_model(max_position_embeddings=256)


@test("the roofline of the real shapes: 537 MB and 268 MFLOP a token, 201 MFLOP in prefill, "
      "attention and its cache on top")
def roofline_of_the_real_shapes():
    done = run_bench("--self-check")
    expect((done.code, done.err, done.out), (0, "", b""))


@test("bench --json gives one object: the machine's limits, each kind of work against them, and "
      "the first token")
def one_object():
    done = run_bench(model(), "--json", "-j", 2, "--windows", 3, "--kl3m", KL3M)
    expect((done.code, done.err, done.out.count(b"\n")), (0, "", 1))
    found = json.loads(done.out)
    expect(sorted(found), ["bandwidth", "first_token", "isa", "model", "peak", "threads", "work"])
    expect((found["threads"], found["model"]), (2, str(model())))
    assert found["isa"] in ("avx512vnni", "avx512", "avx2", "neondot", "neon", "portable"), found
    expect([work["name"] for work in found["work"]], WORKS)
    for limits in found["bandwidth"], found["peak"]:
        assert len(limits) == 2 and all(limit > 1e6 for limit in limits), limits
    for work in found["work"]:
        assert work["tokens_per_second"] > 0 and work["limit"] > 0 and 0 < work["share"], work
    first = found["first_token"]
    assert first["prompt_tokens"] > 1 and 0 < first["pass_seconds"] < first["seconds"], first


@test("bench shows the same as a table with a bar for each kind of work, on lines of at most 84 "
      "columns")
def table_with_bars():
    done = run_bench(model(), "--windows=2", "--kl3m", KL3M)
    expect((done.code, done.err), (0, ""))
    assert max(map(len, done.text.split("\n"))) <= 84, done.text
    for work in WORKS:
        bars = re.findall(r"^%s +[\d.]+ +[\d.]+ +(\d+)%% (#*\.*)$" % re.escape(work), done.text,
                          flags=re.M)
        expect(len(bars), 1, work)
        share, bar = bars[0]
        expect(len(bar), 24, work)
        assert abs(bar.count("#") - min(int(share) * 0.24, 24)) <= 1, done.text
    assert re.search(r"^shell to first token +[\d.]+ ms, [\d.]+ times the pass of \d+ tokens "
                     r"itself$", done.text, flags=re.M)


@test("bench measures every kind of CPU that this one is, and no other")
def every_kind_of_cpu():
    ran = []
    for isa in ("avx512vnni", "avx512", "avx2", "neondot", "neon", "portable"):
        done = run_bench(model(), "--json", "--windows", 1, "--kl3m", KL3M, env={"KL3M_ISA": isa})
        here = run([KL3M, "-m", model(), "-p", "Q", "-n", "1"], env={"KL3M_ISA": isa}).code == 0
        expect(done.code, 0 if here else 1, done.err)
        if here:
            ran.append(json.loads(done.out)["isa"])
    assert ran[-1] == "portable" and len(set(ran)) == len(ran), ran


@test("bench refuses a context too short to measure in, and ends at a Ctrl-C with 130 and no half "
      "table")
def short_context_and_ctrl_c():
    done = run_bench(small_model(max_position_embeddings=64))
    expect((done.code, done.out), (1, b""))
    assert "context of 64" in done.err, done.err
    child = subprocess.Popen([bench(), model(), "--kl3m", KL3M], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={"KL3M_ISA": "portable"})
    until_it_catches(child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    expect((child.returncode, out, err), (130, b"", b""))


@test("bench says in a line what is wrong with its command line, and what it cannot open or start")
def wrong_command_lines():
    place = tmpdir()
    for args, status, word in (
            ([], 2, "MODEL"),
            ([model(), "more"], 2, "more"),
            ([model(), "--bench"], 2, "--bench"),
            ([model(), "-p", "Q"], 2, "-p"),
            ([model(), "--replay"], 2, "--replay"),
            ([model(), "--replay", place / "x", "-r", 2], 2, "-r"),
            ([model(), "--replay", place / "x", "--prompts"], 2, "--prompts"),
            ([model(), "-b", 2], 2, "-b"),
            ([model(), "--prompts", "--json"], 2, "--json"),
            ([model(), "--prompts", 0], 2, "'0'"),
            ([model(), "--prompts", 1, "x"], 2, "'x'"),
            ([model(), "--prompts=1"], 2, "--prompts"),
            ([model(), "--windows", 16], 2, "16"),
            ([model(), "--prompts", 1, 1, 1], 2, "'1'"),
            ([place / "none"], 1, "none"),
            ([model(), "--kl3m", place / "none"], 1, "none"),
            ([model(), "--replay", place], 1, str(place)),
            ([model(), "--replay", place / "none"], 1, "none")):
        done = run_bench(*args)
        assert done.code == status and word in done.err and done.err.count("\n") == 1, (
            args, done.code, done.err)
        expect(done.out, b"", args)


@test("bench --prompts runs all prompts with all their tokens, and holds them to limits measured "
      "meanwhile")
def many_prompts():
    found = run_bench(model(), "--prompts", 60, 9).text
    assert re.match(r"60 prompts, 540 new tokens, \d+ passes in [\d.]+ s, [\d.]+ tokens/s, ",
                    found), found
    shares = [float(share) for share in re.findall(r"needed +([\d.]+)%", found)]
    assert len(shares) == 2 and max(shares) > 0, found
    assert re.search(r"^share of the roofline +%s%%$" % max(shares), found, flags=re.M), found
    assert re.search(r"^one at a time +[\d.]+ tokens/s without guesses; together [\d.]+ times as "
                     r"fast$", found, flags=re.M), found


def check_make(make):
    """This make's targets in a copy of the project where all is built already, and that make clean
    takes it away."""
    if shutil.which(make) is None:
        raise Skip(make + " is not installed")
    place = tmpdir()
    (place / "tests" / "bench").mkdir(parents=True)
    for name in ("Makefile", *SOURCES):
        shutil.copy(ROOT / name, place / name)
    for name, program in (("kl3m", KL3M), ("tests/bench/bench", bench())):
        shutil.copy(program, place / name)
    (place / "a replay").write_text("This\tAgreement shall be governed\n")
    env = {name: None for name in os.environ if name.startswith(("MAKE", "MFLAGS"))}
    done = run([make, "-s", "bench", "MODEL=%s" % model(), "REPLAY=a replay"], cwd=place, env=env)
    expect((done.code, done.err, done.text.split("\n", 1)[0].split()),
           (0, "", "decoding of known text tokens/pass tokens/s".split()))
    for target, end in (("bench", "--kl3m kl3m"), ("bench-prompts", "--prompts")):
        done = run([make, "-n", target, "MODEL=%s" % model()], cwd=place, env=env)
        assert ("tests/bench/bench %s %s" % (model(), end) in done.text
                and "-std=c11" not in done.text), done.text
    expect(run([make, "-s", "clean"], cwd=place, env=env).code, 0)
    expect([name for name in ("kl3m", "tests/bench/bench") if (place / name).exists()], [])


@test("make bench shows the table or, with REPLAY=FILE, what guesses are worth; make bench-prompts "
      "runs prompts")
def make_bench():
    check_make("make")


@test("so does BSD's make bench")
def bsd_make_bench():
    check_make("bmake")
