"""What unit.c finds inside the program, and the sampler against other ways to compute the same."""
import math
import os
import random
import struct
import subprocess

from harness import (PATIENCE, ROOT, expect, once, quantized_model, run_kl3m, small_model, test,
                     tmpdir)


def compiled(name):
    """tests/NAME.c, which includes kl3m.c, as a program."""
    return once(name, lambda out: subprocess.run(
        [os.environ.get("CC") or "cc", "-std=c11", "-O2", "-ffp-contract=off", "-pthread", "-o",
         str(out), str(ROOT / "tests" / (name + ".c")), str(ROOT / "tokenizer.c"), "-lm"],
        check=True, cwd=ROOT))


def unit():
    return compiled("unit")


def run_unit(part):
    done = subprocess.run([str(unit()), part], stdout=subprocess.PIPE, timeout=PATIENCE)
    expect(done.returncode, 0, done.stdout.decode())


@test("exp, GELU, norms, sines and powers are those of the C library in double, for "
      "every kind of CPU")
def math_functions():
    run_unit("math")


@test("a pass rotates by angles in double: at position 4,095 they are as exact as at 0")
def rotations():
    run_unit("rotations")


@test("the generator gives Philox4x32-10's known answers")
def philox():
    run_unit("philox")


@test("whole, broken and unfinished characters are told apart as Unicode's table of UTF-8 says")
def utf8():
    run_unit("utf8")


@test("a parallel step runs each piece once, however many threads there are and whether they sleep")
def parallel_steps():
    run_unit("threads")


@test("more threads than there are CPUs, which the program does not start, write the same bytes too")
def more_threads_than_cpus():
    for model in (small_model(), quantized_model("q8")):
        done = subprocess.run([str(unit()), "many", str(model)], stdout=subprocess.PIPE,
                              check=True, timeout=PATIENCE)
        texts = done.stdout.split(b"\0")[:-1]
        expect([text.count(b"\n") for text in texts], [20] * 5)
        expect(texts, texts[:1] * 5)
        expect(texts[0], run_kl3m("-m", model, "-s", 1, "-n", 30, "-r", 20, "-p",
                                  "This Agreement shall be governed by the laws of the State of "
                                  "Delaware").out)


def distributions(cases):
    """The sampler's {id: probability} for cases of (settings, logits, history, allowed ids or
    None)."""
    data = b""
    for (temperature, k, p, min_p, penalty), logits, history, allowed in cases:
        n = len(logits)
        data += struct.pack("<8d", temperature, k, p, min_p, penalty, n, len(history),
                            allowed is not None)
        data += struct.pack("<%df" % n, *logits) + struct.pack("<%dI" % len(history), *history)
        if allowed is not None:
            data += sum(1 << i for i in set(allowed)).to_bytes((n + 63) // 64 * 8, "little")
    done = subprocess.run([str(unit()), "distribution"], input=data, stdout=subprocess.PIPE,
                          check=True, timeout=PATIENCE)
    for line in done.stdout.decode().splitlines():
        words = line.split()
        shares = zip(map(int, words[::2]), map(float, words[1::2]))
        yield {i: share for i, share in shares if share > 0}


def plain_distribution(settings, logits, history, allowed=None):
    """The same by transformers' definitions, one step after the other, in double."""
    temperature, k, p, min_p, penalty = settings
    scores = list(logits)
    for i in set(history):
        scores[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
    ids = sorted(range(len(scores)) if allowed is None else set(allowed),
                 key=lambda i: (-scores[i], i))
    if k:
        ids = ids[:k]

    def share(ids):
        most = max(scores[i] for i in ids)
        weights = {i: math.exp((scores[i] - most) / temperature) for i in ids}
        total = math.fsum(weights.values())
        return {i: w / total for i, w in weights.items()}
    shares, kept, before = share(ids), [], 0.0
    for i in ids:
        if p < 1 and kept and before >= p:
            break
        kept.append(i)
        before += shares[i]
    shares = share(kept)
    kept = [i for i in kept if shares[i] >= min_p * shares[kept[0]]]
    return share(kept)


@test("the sampler keeps the tokens that transformers' definitions keep of those allowed, with "
      "their probabilities")
def sampler_keeps_the_right_tokens():
    draw, cases = random.Random(5), []
    for number in range(300):
        n = draw.choice((1, 2, 7, 100, 256, 1000, 5000))
        logits = [struct.unpack("<f", struct.pack("<f", draw.gauss(0, 3.5)))[0] for _ in range(n)]
        if number % 5 == 0:   # ties
            logits = [float(round(x)) for x in logits]
        settings = (draw.choice((0.01, 0.3, 1, 2.5)), draw.choice((0, 1, 3, 50)),
                    draw.choice((1, 0.9, 0.3, 0.0)), draw.choice((0, 0.05, 1)),
                    draw.choice((1, 1.3, 0.8)))
        allowed = None if number % 3 else [draw.randrange(n) for _ in range(draw.choice((1, 3, n)))]
        cases.append((settings, logits,
                      [draw.randrange(n) for _ in range(draw.choice((0, 5)))], allowed))
    for case, got in zip(cases, distributions(cases)):
        want = plain_distribution(*case)
        # A penalized logit is rounded to float, so that two which were apart may tie.
        expect(sorted(got), sorted(want), case[0])
        for i in want:
            assert abs(got[i] - want[i]) < 1e-6, (case[0], i, got[i], want[i])


@test("draws follow the distribution: chi-square over thousands of continuations")
def draws_follow_the_distribution():
    model, drawn = small_model(), 4000
    logits_file = tmpdir() / "logits"
    run = run_kl3m("-m", model, "-p", "The State", "--logits", logits_file)
    expect(run.code, 0, run.err)
    data = logits_file.read_bytes()
    vocab = len(data) // 4 // len(run_kl3m("-m", model, "-p", "The State",
                                           "--tokenize").text.split())
    logits = struct.unpack("<%df" % vocab, data[-4 * vocab:])
    texts = run_kl3m("-m", model, "--detokenize",
                     input="\n".join(map(str, range(vocab))).encode()).out.split(b"\n")
    for temperature, k, p in ((1, 0, 1), (1, 0, 0.8), (2, 20, 1)):
        shares = plain_distribution((temperature, k, p, 0, 1), logits, [])
        run = run_kl3m("-m", model, "-p", "The State", "-n1", "-r", drawn, "-t", temperature, "-k",
                       k, "--top-p", p, "-s", 7, "--no-echo", "--ignore-eos")
        counts = {}
        for line in run.out.split(b"\n")[:-1]:
            counts[line] = counts.get(line, 0) + 1
        expected = {}
        for i, share in shares.items():   # several ids may have one text (none, say)
            expected[texts[i]] = expected.get(texts[i], 0) + drawn * share
        assert set(counts) <= set(expected), set(counts) - set(expected)
        rare = [text for text in expected if expected[text] < 5]
        cells = [(counts.get(text, 0), expected[text]) for text in expected if expected[text] >= 5]
        if rare:
            cells.append((sum(counts.get(text, 0) for text in rare),
                          sum(expected[text] for text in rare)))
        chi = sum((got - want) ** 2 / want for got, want in cells)
        free = len(cells) - 1
        assert free >= 5 and abs(chi - free) < 4.5 * math.sqrt(2 * free), (chi, free)
