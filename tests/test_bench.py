"""--bench: that it measures what it says and says it in order. How fast anything is, no test asks."""
import json
import re
import signal
import subprocess
import time

from harness import KL3M, expect, run_kl3m, small_model, test
from test_unit import compiled, run_unit

WORKS = ["decode", "decode at position 240", "prefill of 32 tokens", "prefill of 240 tokens",
         "decode, 16 sequences at once", "decode, 48 sequences at once"]


def model():
    return small_model(max_position_embeddings=256)


@test("the roofline of the real shapes: 537 MB and 268 MFLOP a token, 201 MFLOP in prefill, attention and its cache on top")
def _():
    run_unit("roofline")


@test("--bench --json gives one object: the machine's limits, each kind of work against them, and the first token")
def _():
    done = run_kl3m("-m", model(), "--bench", "--json", "-j", 2)
    expect((done.code, done.err, done.out.count(b"\n")), (0, "", 1))
    found = json.loads(done.out)
    expect(sorted(found), ["bandwidth", "first_token", "isa", "model", "peak", "threads", "work"])
    expect((found["threads"], found["model"]), (2, str(model())))
    assert found["isa"] in ("avx512", "avx2", "neon", "portable"), found
    expect([work["name"] for work in found["work"]], WORKS)
    for limits in found["bandwidth"], found["peak"]:
        assert len(limits) == 2 and all(limit > 1e6 for limit in limits), limits
    for work in found["work"]:
        assert work["tokens_per_second"] > 0 and work["limit"] > 0 and 0 < work["share"], work
    first = found["first_token"]
    assert first["prompt_tokens"] > 1 and 0 < first["pass_seconds"] < first["seconds"], first


@test("--bench shows the same as a table with a bar for each kind of work, on lines of at most 84 columns")
def _():
    done = run_kl3m("-m", model(), "--bench")
    expect((done.code, done.err), (0, ""))
    assert max(map(len, done.text.split("\n"))) <= 84, done.text
    for work in WORKS:
        bars = re.findall(r"^%s +[\d.]+ +[\d.]+ +(\d+)%% (#*\.*)$" % re.escape(work), done.text, flags=re.M)
        expect(len(bars), 1, work)
        share, bar = bars[0]
        expect(len(bar), 24, work)
        assert abs(bar.count("#") - min(int(share) * 0.24, 24)) <= 1, done.text
    assert re.search(r"^shell to first token +[\d.]+ ms, [\d.]+ times the pass of \d+ tokens itself$", done.text, flags=re.M)


@test("--bench refuses a context too short to measure in, and ends at a Ctrl-C with 130 and no half table")
def _():
    done = run_kl3m("-m", small_model(max_position_embeddings=64), "--bench")
    expect((done.code, done.out), (1, b""))
    assert "context of 64" in done.err, done.err
    child = subprocess.Popen([KL3M, "-m", model(), "--bench"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env={"KL3M_ISA": "portable"})
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    expect((child.returncode, out, err), (130, b"", b""))


@test("make bench-prompts runs all prompts with all their tokens, and holds them to limits measured meanwhile")
def _():
    found = subprocess.run([str(compiled("bench_prompts")), str(model()), "60", "9"], stdout=subprocess.PIPE,
                           check=True, timeout=100).stdout.decode()
    assert re.match(r"60 prompts, 540 new tokens, \d+ passes in [\d.]+ s, [\d.]+ tokens/s, ", found), found
    shares = [float(share) for share in re.findall(r"needed +([\d.]+)%", found)]
    assert len(shares) == 2 and max(shares) > 0, found
    assert re.search(r"^share of the roofline +%s%%$" % max(shares), found, flags=re.M), found
    assert re.search(r"^one at a time +[\d.]+ tokens/s without guesses; together [\d.]+ times as fast$", found, flags=re.M), found
