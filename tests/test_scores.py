"""Scores: log-probabilities that agree with float64, and every line of their contract."""
import json
import math
import os
import pty
import re
import resource
import select
import signal
import subprocess
import time

from harness import (KL3M, PATIENCE, Skip, expect, run_kl3m, small_directory, small_model, test,
                     tiny_model, tmpdir)
from models import LEGAL_TEXT, SPECIAL
from naive import Naive
from test_cli import File
from test_forward import KINDS, TEXT, generate_one, logits, rows, tokens

FIGURES = ["logprob", "tokens", "perplexity", "bits_per_byte", "greedy"]


def score(*args, input=None, code=0, model=None, **more):
    """Standard output of --score."""
    done = run_kl3m("-m", model or small_model(), "--score", *args, input=input, **more)
    expect(done.code, code, done.err)
    return done.text


def objects(*args, **more):
    return [json.loads(line) for line in score(*args, **more).splitlines()]


def records(*values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def log_softmax(row):
    """In double."""
    most = max(row)
    zero = most + math.log(math.fsum(math.exp(y - most) for y in row))
    return [x - zero for x in row]


def table(model, text):
    """{id: bytes} of the ids of a text, as the program decodes them one by one."""
    ids = sorted(set(tokens(model, text)))
    done = run_kl3m("-m", model, "--detokenize", "-0",
                    input=b"".join(b"%d\n" % i for i in ids))
    return dict(zip(ids, done.out.split(b"\0")))


def close(got, want, bound, what=""):
    assert len(got) == len(want), "%s: %d numbers, not %d" % (what, len(got), len(want))
    for a, b in zip(got, want):
        assert abs(a - b) <= bound, "%s: %r is not %r" % (what, a, b)


@test("each token's log-probability is ln softmax of its logits to 1e-5 in float64, and the N likeliest are those of the logits, in their order")
def as_the_logits_say():
    text = TEXT[:150]
    for options in ({}, {"vocab_size": 301}, {"vocab_size": 1500, "hidden_size": 64}):
        model = small_model(**options)
        ids = tokens(model, text)
        want = [log_softmax(row) for row in rows(logits(model, text), len(ids))]
        one, = objects("--json", "--logprobs", 7, "--no-escape", "-p", text, model=model)
        listed, = one["logprobs"]
        expect(listed["ids"], ids[1:])
        close(listed["token_logprobs"], [row[i] for row, i in zip(want, ids[1:])], 1e-5)
        for row, likeliest in zip(want, listed["top_logprobs"]):
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:7]
            expect([entry["id"] for entry in likeliest], order)
            close([entry["logprob"] for entry in likeliest], [row[i] for i in order], 1e-5)
        close(one["logprob"], [math.fsum(row[i] for row, i in zip(want, ids[1:]))], 1e-3)
        greedy = all(row[i] == max(row) for row, i in zip(want, ids[1:]))
        expect(one["greedy"], [greedy])


@test("log-probabilities are those of the network in float64 to 1e-4, multi-head and grouped-query")
def as_float64_says():
    for options in ({}, {"n_kv": 2}, {"use_parallel_residual": False}):
        model, text = small_model(**options), TEXT[100:170]
        ids = tokens(model, text)
        want = [log_softmax(row)[i] for row, i in
                zip(Naive(small_directory(**options)).logits(ids), ids[1:])]
        one, = objects("--json", "--logprobs", 0, "--no-escape", "-p", text, model=model)
        close(one["logprobs"][0]["token_logprobs"], want, 1e-4)
        expect(one["logprobs"][0]["top_logprobs"], [[]] * len(want))


@test("a row has log-probability, tokens, perplexity, bits a byte and greedy, as their definitions have it, between tabs with 6 decimals")
def rows_of_figures():
    model = small_model()
    texts = [TEXT[:90], "The State<|end|> of New York", "Née §", "a", ""]
    out = score("--no-escape", input="\n".join(texts).encode() + b"\n")
    lines = out.splitlines()
    expect(len(lines), len(texts))
    for text, line in zip(texts, lines):
        cells = line.split("\t")
        expect(len(cells), 5)
        for at in (0, 2, 3):
            assert re.fullmatch(r"-?\d+\.\d{6}|nan", cells[at]), line
        one, = objects("--json", "--logprobs", 0, "--no-escape", input=text.encode() + b"\n")
        listed, = one["logprobs"]
        total, n = sum(listed["token_logprobs"]), len(listed["ids"])
        texts_of = table(model, text) if text else {}
        size = sum(len(texts_of[i]) for i in listed["ids"])    # a special token has no bytes
        expect(int(cells[1]), n)
        if n == 0:
            expect(cells, ["0.000000", "0", "nan", "nan", "1"])
            expect([one[name] for name in FIGURES], [[0.0], [0], [None], [None], [True]])
            continue
        close([float(cells[0])], [total], 1e-5 * n)
        close([math.log(float(cells[2]))], [-total / n], 1e-5)
        close([float(cells[3])], [-total / math.log(2) / size], 1e-5)
        assert cells[4] in "01"
        close([one[name][0] for name in FIGURES], [float(cell) for cell in cells], 1e-5)
    labelled = score("--no-escape", "-p", texts[0])
    expect([line.split() for line in labelled.splitlines()],
           [list(pair) for pair in zip(FIGURES, lines[0].split("\t"))])
    path = tmpdir() / "text"
    path.write_text(texts[0])
    expect(score("-f", path), labelled)


@test("a text whose tokens are each the likeliest is greedy, and with another token it is not")
def greedy_text():
    model = tiny_model()
    done = run_kl3m("-m", model, "-p", "This Agreement", "-t", 0, "-n", 12, "--json", "--no-echo",
                    "--logprobs", 0)
    made = json.loads(done.text)
    text = made["generated_text"][0]
    expect(tokens(model, text), made["logprobs"][0]["ids"], "cut by the encoder as drawn")
    one, = objects("--jsonl", "--logprobs", 0, model=model, input=records(
        {"prompt": "This Agreement", "continuation": [text, text + "zebra"]}))
    expect(one["greedy"], [True, False])
    expect(one["logprobs"][0], made["logprobs"][0])


@test("text TAB continuation: only the continuation is scored, its ids behind the text's; the first raw tab separates, before escapes are decoded")
def behind_a_tab():
    model = small_model()

    def both(text, continuation):
        """What the logits of the joined ids say, through the program's own ids of each."""
        a, b = tokens(model, text) if text else [0], tokens(model, continuation)
        joined = Naive(small_directory()).logits(a + b)
        return [log_softmax(row)[i] for row, i in zip(joined[len(a) - 1:], b)]

    for text, continuation in (("The", "State of"), ("The St", "ate of"), ("", "The State"),
                               ("This ", "Agreement\tand\nit")):
        escaped = continuation.replace("\t", "\\t").replace("\n", "\\n")
        row, = score(input=(text + "\t" + escaped + "\n").encode()).splitlines()
        want = both(text, continuation)
        expect(int(row.split("\t")[1]), len(want), (text, continuation))
        close([float(row.split("\t")[0])], [sum(want)], 1e-3, (text, continuation))
        if "\n" not in continuation:   # later tabs are text; so is \t without decoding
            raw, = score(input=(text + "\t" + continuation + "\n").encode()).splitlines()
            expect(raw, row)
    plain, = score("--no-escape", input=b"This\ta\\tb\n").splitlines()
    expect(plain.split("\t")[1], str(len(tokens(model, "a\\tb"))))
    empty, = score(input=b"This\t\n").splitlines()
    expect(empty, "0.000000\t0\tnan\tnan\t1")
    whole = score("-0", "--json", input=b"This\tAgreement\0")
    assert json.loads(whole)["prompt"] == "This\tAgreement" and "continuation" not in whole
    one, = objects("--json", "-p", "This\tAgreement")
    expect((one["prompt"], "continuation" in one), ("This\tAgreement", False))
    assert score("-0", input=b"This State\0").endswith("\n")


@test("a special token counts and has no bytes: bits a byte are inf in a row and null in JSON; in a file, as with -p, a tab is text")
def no_bytes():
    row, = score(input=b"The\t<|end|>\n").splitlines()
    expect(row.split("\t")[1::2], ["1", "inf"])
    one, = objects("--jsonl", input=records({"prompt": "The", "continuation": "<|end|>"}))
    expect((one["tokens"], one["bits_per_byte"]), ([1], [None]))
    plain, = score("--no-special", input=b"The\t<|end|>\n").splitlines()
    assert int(plain.split("\t")[1]) > 1 and "inf" not in plain, plain
    path = tmpdir() / "text"
    path.write_bytes(b"This\tAgreement")
    expect(score("-f", path), score("-p", "This\tAgreement"))
    expect(score("-f", path).split()[3], str(len(tokens(small_model(), "This\tAgreement")) - 1))


@test("a record's continuation is a string or a list, each scored as it is alone; names that the result has are replaced, other members kept")
def continuations_of_records():
    many = ["State of", "", "Agreement shall be", "State of New York, and each party"]
    one, = objects("--jsonl", "--logprobs", 1, input=records(
        {"id": 7, "tokens": "gone", "prompt": "This is the", "greedy": 1, "seed": 3,
         "continuation": many, "new_tokens": 5, "perplexity": [], "logprobs": 1, "error": 2}))
    expect([name for name in one], ["id", "seed", "new_tokens", "prompt", "continuation", *FIGURES,
                                    "logprobs"])
    expect((one["id"], one["seed"], one["new_tokens"], one["continuation"]), (7, 3, 5, many))
    for i, text in enumerate(many):
        alone, = objects("--jsonl", "--logprobs", 1,
                         input=records({"prompt": "This is the", "continuation": text}))
        expect(alone["continuation"], [text])
        for name in FIGURES + ["logprobs"]:
            expect(alone[name], [one[name][i]], name)
        line = score(input=("This is the\t" + text + "\n").encode()).rstrip("\n").split("\t")
        expect(["nan" if alone[name][0] is None else "%.6f" % alone[name][0] for name in
                ("logprob", "perplexity", "bits_per_byte")], [line[0], line[2], line[3]])
    none, = objects("--jsonl", input=records({"prompt": "This", "continuation": []}))
    expect([none[name] for name in ["continuation"] + FIGURES], [[]] * 6)
    kept, = objects("--jsonl", input=records({"prompt": "This is", "logprobs": 1, "a": {"b": []}}))
    expect((kept["logprobs"], kept["a"], "continuation" in kept), (1, {"b": []}, False))
    last, = objects("--jsonl", input=b'{"continuation": 3, "prompt": "a", "continuation": ["b"]}\n')
    expect(last["continuation"], ["b"])


@test("a continuation that is no string or list of them is that record's error, which names it; the others are scored")
def faulty_continuations():
    wrong = [3, None, {"a": 1}, ["a", 3], [["a"]], True]
    done = run_kl3m("-m", small_model(), "--score", "--jsonl", input=records(
        *({"n": i, "prompt": "This", "continuation": value} for i, value in enumerate(wrong)),
        {"prompt": 3, "continuation": "a"}, {"prompt": "The", "continuation": "State"}))
    expect(done.code, 3)
    found = [json.loads(line) for line in done.text.splitlines()]
    for i, one in enumerate(found[:len(wrong)]):
        expect((one["n"], one["prompt"]), (i, "This"))
        assert "no continuation in JSON: at byte " in one["error"], one
        assert "a list of strings, of whole characters, was expected" in one["error"], one
    assert "the prompt must be a string" in found[-2]["error"]
    expect(found[-1]["tokens"], [len(tokens(small_model(), "State"))])
    expect(done.err.count("\n"), len(wrong) + 1)


def windows(n, context, stride):
    """The guide's loop: (begin, end, first token scored) of each window."""
    found, before = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        found.append((begin, end, max(before, begin + 1)))
        before = end
        if end == n:
            return found


@test("a text longer than the context is scored in the windows of transformers' guide, for every stride; each token but the first once")
def strides():
    shape = {"max_position_embeddings": 24, "hidden_size": 24, "num_attention_heads": 2,
             "intermediate_size": 24, "vocab_size": 280}
    model, naive = small_model(**shape), Naive(small_directory(**shape))
    text = TEXT[:110].replace("\n", " ")
    ids = tokens(model, text)
    assert len(ids) > 50
    memory = {}

    def exact(begin, end):
        if (begin, end) not in memory:
            memory[begin, end] = [log_softmax(row) for row in naive.logits(ids[begin:end])]
        return memory[begin, end]

    for stride in [*range(1, 24), None]:
        want = []
        for begin, end, first in windows(len(ids), 24, stride or 12):
            want += [exact(begin, end)[at - 1 - begin][ids[at]] for at in range(first, end)]
        expect(len(want), len(ids) - 1)
        option = ["--stride", stride] if stride else []
        one, = objects("--json", "--logprobs", 0, "--no-escape", "-p", text, *option, model=model)
        listed, = one["logprobs"]
        expect(listed["ids"], ids[1:])
        close(listed["token_logprobs"], want, 1e-4, "stride %s" % stride)
        close(one["logprob"], [sum(want)], 1e-3)
        expect(one["tokens"], [len(want)])
        row = score("--no-escape", *option, input=text.encode(), model=model)
        close([float(row.split("\t")[0])], one["logprob"], 2e-6)
    for n in (23, 24, 25, 36, 37):     # at the edges of the first two windows
        part = run_kl3m("-m", model, "--detokenize", "-0",
                        input=" ".join(map(str, ids[:n])).encode()).out[:-1].decode()
        if tokens(model, part) != ids[:n]:
            continue
        want = [exact(b, e)[at - 1 - b][ids[at]] for b, e, f in windows(n, 24, 12)
                for at in range(f, e)]
        one, = objects("--json", "--logprobs", 0, "--no-escape", "-p", part, model=model)
        close(one["logprobs"][0]["token_logprobs"], want, 1e-4, "%d tokens" % n)


@test("--stride must lie below the context, and a context of one token scores continuations alone")
def limits_of_strides():
    for stride in (128, 1000):
        done = run_kl3m("-m", small_model(), "--score", "--stride", stride, "-p", "a")
        expect((done.code, "1 to 127" in done.err), (2, True), done.err)
    expect(run_kl3m("-m", small_model(), "--stride", 3, "-p", "a").code, 2)
    one = small_model(max_position_embeddings=1)
    done = run_kl3m("-m", one, "--score", input=b"a\nThe State\na\tb\n\tb\n")
    expect(done.code, 3, done.err)
    lines = done.text.split("\n")
    expect((lines[0], lines[1], lines[4]), ("0.000000\t0\tnan\tnan\t1", "", ""))
    assert lines[2].split("\t")[1] == "1" and lines[3].split("\t")[1] == "1", lines


@test("a text and its continuation may have the context's tokens and one more; --truncate left cuts the text, never the continuation")
def bounds_of_continuations():
    shape = {"max_position_embeddings": 24, "num_hidden_layers": 1}
    model = small_model(**shape)

    def of(n, letter="x"):
        """A text of n tokens: bytes that no merge joins."""
        text = (letter + "\x7f") * ((n + 1) // 2)
        text = text[:n]
        expect(len(tokens(model, text)), n)
        return text

    for text, continuation, fits in ((20, 5, True), (20, 6, False), (1, 24, True), (1, 25, False),
                                     (24, 1, True), (25, 1, False), (0, 24, True)):
        line = (of(text) if text else "") + "\t" + of(continuation, "y") + "\n"
        done = run_kl3m("-m", model, "--score", input=line.encode())
        expect((done.code, bool(done.text.strip())), (0 if fits else 3, fits), line)
        if not fits:
            expect(done.text, "\n")
            assert "line 1: the text has %d tokens and its continuation %d" % (
                text, continuation) in done.err and "25" in done.err, done.err
        # With the cut the text that is left is its end.
        cut = run_kl3m("-m", model, "--score", "--truncate", "left", input=line.encode())
        expect(cut.code, 0 if continuation <= 24 else 3, cut.err)
        if continuation <= 24 and text:
            short = of(text)[-min(text, 25 - continuation):] + "\t" + of(continuation, "y") + "\n"
            expect(cut.text, score(input=short.encode(), model=model))
    for args, input, code in ((["--truncate", "right"], b"a\tb\n", 2),
                              (["--truncate", "left", "-p", "a"], None, 2),
                              (["--truncate", "left"], b"a b\n", 3)):
        done = run_kl3m("-m", model, "--score", *args, input=input)
        expect((done.code, "--truncate" in done.err), (code, True), done.err)


@test("scores are the same bytes for any threads, batch, rows, memory and kind of CPU, alone or in a file")
def same_bytes():
    model = small_model()
    texts = [TEXT[i * 37:i * 37 + 5 + 61 * (i % 9)] for i in range(20)]
    texts += ["This Agreement shall\t" + text[:150] for text in texts[:12]]
    texts += [TEXT[:40] + "\tState", TEXT[:40] + "\tof"]
    data = "".join(text.replace("\n", "\\n") + "\n" for text in texts).encode()
    lines = ["--json", "--logprobs", 2, "--stride", 50]
    want = score(*lines, input=data)
    expect(want.count("\n"), len(texts))
    for more in (["-j", 1], ["-j", 5], ["-b", 1], ["-b", 3, "--rows", 5], ["--rows", 1],
                 ["--rows", 1000, "-b", 200], ["--kv-memory", "300K"]):
        expect(score(*lines, *more, input=data), want, more)
    for kind in KINDS:
        if generate_one(kind).code == 0:
            expect(score(*lines, input=data, env={"KL3M_ISA": kind}), want, kind)
    for at in (0, 7, 25, 33):
        line = data.splitlines(keepends=True)[at]
        expect(score(*lines, input=line), want.splitlines(keepends=True)[at])


@test("options that mean nothing with --score are refused by name, --heat and --logprobs where they mean nothing")
def refused_options():
    for option in (["-r", 2], ["-n", 3], ["-t", 1], ["-k", 4], ["--top-p", 0.5], ["--min-p", 0.5],
                   ["--repetition-penalty", 2], ["-s", 1], ["--stop", "a"], ["--ignore-eos"],
                   ["--no-echo"], ["--no-speculation"], ["--tokenize"],
                   ["--logits", "x"], ["--info"]):
        done = run_kl3m("-m", small_model(), "--score", "-p", "a", *option)
        assert done.code == 2 and option[0] in done.err and "--score" in done.err, done.err
    for args, named in ((["--heat", "-p", "a"], "--score"), (["--score", "--heat"], "-f"),
                        (["--score", "--heat", "--json", "-p", "a"], "--json"),
                        (["--score", "--heat", "-0", "-p", "a"], "--null"),
                        (["--logprobs", 1, "-p", "a"], "--json"),
                        (["--score", "--logprobs", 1, "-p", "a"], "--json"),
                        (["--json", "--logprobs", 101, "-p", "a"], "0 to 100"),
                        (["--json", "--logprobs", -1, "-p", "a"], "0 to 100")):
        done = run_kl3m("-m", small_model(), *args)
        assert done.code == 2 and named in done.err, (args, done.err)


@test("--logprobs in generation gives each new token's in the model's own distribution: the logits', whatever the sampler does, with speculation and without")
def drawn_logprobs():
    model = small_model()
    prompt = TEXT[:60].replace("\n", " ")
    args = ["-m", model, "--json", "--logprobs", 3, "-n", 30, "-s", 4, "-r", 3, "--no-escape",
            "--repetition-penalty", 1.7, "-t", 0.9, "--top-p", 0.9, "--stop", "e", "-p", prompt]
    done = run_kl3m(*args)
    made = json.loads(done.text)
    expect(run_kl3m(*args, "--no-speculation").text, done.text)
    expect(run_kl3m(*args, "-j", 3, "--rows", 9).text, done.text)
    before = tokens(model, prompt)
    naive = Naive(small_directory())
    for i, listed in enumerate(made["logprobs"]):
        ids = listed["ids"]
        expect([len(listed[name]) for name in listed], [made["new_tokens"][i]] * 4)
        want = [log_softmax(row) for row in naive.logits(before + ids)[len(before) - 1:-1]]
        close(listed["token_logprobs"], [row[i] for row, i in zip(want, ids)], 1e-4)
        for row, top in zip(want, listed["top_logprobs"]):
            close([entry["logprob"] for entry in top], sorted(row, reverse=True)[:3], 1e-4)
    assert "stop" in made["finish_reason"] and len(set(made["new_tokens"])) > 1, made
    plain = run_kl3m("-m", model, "--json", "-n", 5, "-s", 1, "-p", "a")
    assert "logprobs" not in plain.text
    kept = json.loads(run_kl3m("-m", model, "--jsonl", "-n", 1, input=records(
        {"prompt": "a", "logprobs": 9, "continuation": "b", "greedy": 1})).text)
    expect((kept["logprobs"], kept["continuation"], kept["greedy"]), (9, "b", 1))


@test("with --logprobs a token that is half a character shows as U+FFFD, a special token by its name, and a row without a token as nothing")
def odd_tokens():
    model = small_model()
    one, = objects("--json", "--logprobs", 100, "-p", "a<|end|>\\u00a7\\xffb")
    listed, = one["logprobs"]
    expect(listed["tokens"][0], "<|end|>")
    expect(listed["tokens"][-1], "b")
    assert listed["tokens"][-2] == "\ufffd", listed["tokens"]
    texts = {entry["id"]: entry["token"] for top in listed["top_logprobs"] for entry in top}
    names = {i: text for i, text in texts.items() if i < len(SPECIAL)}
    expect(names, {i: SPECIAL[i] for i in names})
    every = small_model(vocab_size=301)
    one, = objects("--json", "--logprobs", 100, "-p", TEXT[:300], model=every)
    found = {entry["id"]: entry["token"] for top in one["logprobs"][0]["top_logprobs"]
             for entry in top}
    beyond = [i for i in found if i >= 293]
    assert beyond and all(found[i] == "" for i in beyond), beyond


def shades(text):
    """[(visible text, colour or None)] of what --heat prints."""
    parts = re.split(r"\x1b\[([\d;]*)m", text)
    found, colour = [(parts[0], None)], None
    for code, shown in zip(parts[1::2], parts[2::2]):
        colour = None if code == "0" else int(code.split(";")[-1])
        found.append((shown, colour))
    return found


@test("--heat shows the text as it is, shaded by each token's surprise: none up to 1 bit, red from 12; a newline more at its end, a legend on standard error")
def heat():
    model, text = tiny_model(), "The term of this Lease is ten zebra (10) years.\nIt § ends. Ø"
    args = ["-m", model, "--score", "--no-escape", "-p", text]
    done = run_kl3m(*args, "--heat", env={"NO_COLOR": None})
    shown = shades(done.text)
    expect("".join(part for part, _ in shown), text + "\n")
    bits = {}
    listed, = json.loads(run_kl3m(*args, "--json", "--logprobs", 0).text)["logprobs"]
    data, at = text.encode(), len(text.encode())
    sizes = {i: len(b) for i, b in table(model, text).items()}
    for i, logprob in zip(reversed(listed["ids"]), reversed(listed["token_logprobs"])):
        for byte in range(at - sizes[i], at):
            bits[byte] = -logprob / math.log(2)
        at -= sizes[i]
    ramp = [None, 230, 229, 223, 222, 216, 215, 209, 203, 202, 196]
    at = 0
    for part, colour in shown:
        for letter in part:
            at += len(letter.encode())
            b = bits.get(at - 1, 0)    # of its last byte: a character that tokens share
            if at > len(data) or letter == "\n" or b <= 1:
                expect(colour, None, (letter, b))
            elif b >= 12:
                expect(colour, 196, (letter, b))
            else:
                assert abs(ramp.index(colour) - 1 - (b - 1) / 11 * 9) <= 1, (letter, b, colour)
    assert len({colour for _, colour in shown}) > 3
    expect([colour for part, colour in shown if "zebra" in part or "z" in part] != [None], True)
    assert done.err.startswith("kl3m: bits of surprise:") and "12+" in done.err
    quiet = run_kl3m(*args, "--heat", "-q")
    expect((quiet.text, quiet.err), (done.text, ""))
    plain = run_kl3m(*args, "--heat", env={"NO_COLOR": "1"})
    expect((plain.text, plain.err), (text + "\n", ""))


@test("--heat keeps every byte, in windows too, and ends what is no whole character as it is")
def heat_of_bytes():
    model = small_model(max_position_embeddings=24, num_hidden_layers=1)
    path = tmpdir() / "text"
    for data in (b"", b"a", b"\xff\xfe", "§".encode()[:1], TEXT[:150].encode() + b"\0\xc2",
                 b"The <|end|>\r\n\x1b[7m"):
        path.write_bytes(data)
        done = run_kl3m("-m", model, "--score", "--heat", "--stride", 5, "-f", path)
        expect(done.code, 0, done.err)
        bare = re.sub(rb"\x1b\[(0|38;5;16;48;5;\d+)m", b"", done.out)
        expect(bare, data + b"\n")


@test("on a terminal --heat escapes the text's own control characters and keeps its colours")
def heat_on_a_terminal():
    master, slave = pty.openpty()
    child = subprocess.Popen([KL3M, "-m", str(tiny_model()), "--score", "--heat", "-p",
                              "The term \\x1b[7m of zebra"], stdin=slave, stdout=slave,
                             stderr=subprocess.DEVNULL)
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 20)[0]:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        shown += part
        if not part:
            break
    os.close(master)
    expect(child.wait(), 0)
    assert b"\\x1b" in shown and b"\x1b[7m" not in shown and b"\x1b[38;5;16;48;5;" in shown, shown


@test("a long text and short ones do not hold each other up: the short ones are done while the long one is in work, and what waits is bounded")
def side_by_side():
    model = small_model()
    short = [b"The State of Delaware %d\n" % i for i in range(40)]
    long = (TEXT * 3).replace("\n", " ").encode() + b"\n"
    done = run_kl3m("-m", model, "--score", "-v", "--rows", 32, "--stride", 8,
                    input=long + b"".join(short))
    expect((done.code, done.text.count("\n")), (0, 41), done.err)
    passes, n_rows, scored = map(int, re.search(
        r"(\d+) passes, (\d+) rows, (\d+) scored tokens", done.err).groups())
    expect(scored, sum(int(row.split("\t")[1]) for row in done.text.splitlines()))
    assert passes <= n_rows / 32 + 2, "passes were not filled: %d of %d rows" % (passes, n_rows)


@test("a list of continuations computes its text once")
def shared_text():
    text, endings = TEXT[:200], ["State", "of", "New York", "the"]
    done = run_kl3m("-m", small_model(), "--score", "--jsonl", "-v",
                    input=records({"prompt": text, "continuation": endings}))
    n_rows = int(re.search(r"(\d+) rows", done.err).group(1))
    model = small_model()
    expect(n_rows, len(tokens(model, text)) - 1 + sum(len(tokens(model, e)) for e in endings))


@test("a text of thousands of tokens over a large vocabulary needs no room for all its logits")
def memory():
    if os.environ.get("KL3M"):
        raise Skip("a build with sanitizers reserves memory of its own")
    model = once_large()
    text = (LEGAL_TEXT * 4)[:9000].replace("\n", " ")

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (700 << 20, 700 << 20))
    done = subprocess.run([KL3M, "-m", str(model), "--score", "-j", "1"], input=text.encode(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=limited)
    expect(done.returncode, 0, done.stderr)
    count = int(done.stdout.split(b"\t")[1])
    assert count * 66000 * 4 > 700 << 20, "only %d tokens" % count


def once_large():
    return small_model(vocab_size=66000, hidden_size=16, num_attention_heads=2, n_kv=1,
                       num_hidden_layers=1, intermediate_size=16, max_position_embeddings=4096)


@test("Ctrl-C prints the rows of what is finished, each in its place, and ends with 130")
def interrupted():
    model = small_model()
    child = subprocess.Popen([KL3M, "-m", str(model), "--score"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    child.stdin.write(b"The State\nThe Agreement\n")
    first = child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=PATIENCE)
    expect(child.returncode, 130)
    expect((first + out).decode(), score(input=b"The State\nThe Agreement\n"))
    lease = "-p", (TEXT * 40).replace("\n", " "), "--stride", "1"
    child = subprocess.Popen([KL3M, "-m", str(model), "--score", "--heat", *lease],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    begun = child.stdout.read(200)
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=PATIENCE)
    expect(child.returncode, 130)
    assert (begun + rest).endswith(b"\n")


@test("after Ctrl-C a row stands in its text's line, also where a text of many windows stands before it")
def interrupted_in_windows():
    model, short = small_model(), [b"The State of %d\n" % i for i in range(60)]
    long = (TEXT * 8).replace("\n", " ").encode() + b"\n"
    want = ["-"] + score(input=b"".join(short), model=model).splitlines()
    for delay in (0.3, 0.6, 1.0):
        child = subprocess.Popen([KL3M, "-m", str(model), "--score", "--rows", "2", "--stride",
                                  "127", "-j", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE)
        child.stdin.write(long + b"".join(short))
        child.stdin.flush()
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=PATIENCE)
        for number, line in enumerate(out.decode().splitlines()):
            if line and number:
                expect(line, want[number], "line %d after %g s" % (number, delay))


@test("windows keep the log-probabilities of what they score alone, not of all they hold")
def memory_of_windows():
    if os.environ.get("KL3M"):
        raise Skip("a build with sanitizers reserves memory of its own")

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
    done = subprocess.run([KL3M, "-m", str(small_model()), "--score", "--json", "--logprobs", "100",
                           "--stride", "1", "-j", "1", "--kv-memory", "4M"],
                          input=(TEXT * 4).replace("\n", " ").encode(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, preexec_fn=limited)
    expect(done.returncode, 0, done.stderr)


@test("a text whose keys and values do not fit in --kv-memory is refused, and others are scored")
def too_little_memory():
    done = run_kl3m("-m", small_model(), "--score", "--kv-memory", "60K",
                    input=TEXT[:150].replace("\n", " ").encode() + b"\nThe State\n")
    expect(done.code, 3, done.err)
    assert "line 1: the text needs" in done.err and "--kv-memory" in done.err, done.err
    expect(done.text.split("\n")[0], "")
    expect(done.text.split("\n")[1] + "\n", score(input=b"The State\n"))


@test("a model whose logits are not finite is a fault of the model, in scores and in --logprobs")
def not_finite():
    spoilt = File()
    spoilt.put("I", spoilt.sections["embed_out.weight"][1], 0x7FC00000)
    for args in (["--score"], ["--json", "--logprobs", "2", "-n", "3"]):
        done = spoilt.run(*args, "-p", "The State")
        expect((done.code, done.out), (1, b""))
        assert "not finite" in done.err, done.err
