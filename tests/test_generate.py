"""What comes out of a prompt: text, JSON, reasons to stop, seeds, continuations, ids, logits.

Most tests use a model whose answers are known before the program runs: its layers add nothing, so
the last token alone decides the next one, and embed_out is made so that each token of CHAINS is
followed by the one after it there with a probability of 1 to many digits.
"""
import array
import functools
import itertools
import json
import math
import random
import re
import socket
import subprocess
import sys

import models
from harness import KL3M, PATIENCE, expect, export, run_kl3m, small_model, test, tmpdir
from tokenizer_tools import detokenize, escape, tokenize

CONTEXT = 128      # of the models used here
ROWS = 520         # of their vocabularies, the last eight of which have no token
END = 1

ALPHABET = models.byte_alphabet()
VOCABULARY = models.small_tokenizer(ROWS - 8)["model"]["vocab"]
# A token of several letters, whose second and third letter appear in it once.
WORD = max((t for t in VOCABULARY if t.isascii() and t.isalpha() and t.find(t[1:3]) == 1), key=len)


def byte_ids(*texts):
    """The ids of the one-byte tokens of each byte."""
    return [VOCABULARY[ALPHABET[b]] for text in texts for b in text]


EURO_E_SMILE = "€é😀".encode()
NOT_UTF8 = b"\xff\xe1(\xf1\x9e)"
ODD = b"\n\t\r\0\\ \""
CHAINS = [
    [*byte_ids(b"QXZJKW"), END, *byte_ids(b"##")],       # "Q" is answered by "XZJKW" and the end
    [*byte_ids(b"@"), VOCABULARY[WORD], *byte_ids(b"&"), END],
    [*byte_ids(b"$", ODD, b";"), END],
    [*byte_ids(b"%", EURO_E_SMILE, b"!"), END],
    [*byte_ids(b"^", NOT_UTF8), END],
    [*byte_ids(b"="), ROWS - 3, *byte_ids(b"~"), END],
    [0, *byte_ids(b"?"), END],                           # what an empty prompt starts from
]
# After each of these a fair coin decides between "a" and "b", whose logits are equal bit for bit.
COIN = {token: byte_ids(b"ab") for token in byte_ids(b"<ab")}


@functools.lru_cache(maxsize=None)
def chain_model():
    follow = {a: [b] for chain in CHAINS for a, b in zip(chain, chain[1:])}
    follow.update(COIN)
    hidden = 64
    config = models.make_config(hidden_size=hidden, num_hidden_layers=1, vocab_size=ROWS)
    weights = models.make_weights(config)

    def fill(name, value):
        shape, values = weights[name]
        weights[name] = (shape, array.array("f", [value]) * len(values))
    for name in weights:
        if "attention.dense" in name or "mlp.dense_4h_to_h" in name:
            fill(name, 0.0)
    fill("gpt_neox.final_layer_norm.weight", 1.0)
    fill("gpt_neox.final_layer_norm.bias", 0.0)
    fill("embed_out.weight", 0.0)

    rows_in, rows_out = weights["gpt_neox.embed_in.weight"][1], weights["embed_out.weight"][1]
    for token, nexts in follow.items():
        row = rows_in[token * hidden:(token + 1) * hidden]
        mean = sum(row) / hidden
        spread = math.sqrt(sum((v - mean) ** 2 for v in row) / hidden)
        for after in nexts:  # a logit of about 100, where the rest stay below 60
            for i in range(hidden):
                rows_out[after * hidden + i] += 100 / hidden * (row[i] - mean) / spread
    directory = tmpdir()
    models.save_model(directory, config, weights)
    return export(directory)


def kl3m(*args, model=None, input=None, code=0):
    """Runs the program and holds it to an exit status."""
    done = run_kl3m("-m", model or chain_model(), *args, input=input)
    assert done.code == code, "ended with %d: %r: %s" % (done.code, args, done.err)
    return done


def objects(*args, model=None, input=None, code=0):
    """What --json prints, read back."""
    out = kl3m("--json", *args, model=model, input=input, code=code).out
    assert out.endswith(b"\n") or not out, out
    return [json.loads(line.decode("utf-8")) for line in out.split(b"\n")[:-1]]


def file_of(prompts):
    """Prompts as lines of standard input."""
    return b"".join(escape(p.encode()) + b"\n" for p in prompts)


# ---- Where a text ends ------------------------------------------------------------------------

@test("a continuation ends at <|end|>, at -n, at the context's end or before a stop text, and "
      "JSON says which")
def ends_of_continuations():
    # prompt, options, continuation, tokens drawn, reason
    whole = ODD.decode() + ";"
    cases = [
        ("Q", [], "XZJKW", 6, "eos"),
        ("Q", ["-n", 6], "XZJKW", 6, "eos"),
        ("Q", ["-n", 5], "XZJKW", 5, "length"),
        ("Q", ["-n", 3], "XZJ", 3, "length"),
        ("Q", ["-n", 0], "", 0, "length"),
        ("Q", ["--ignore-eos", "-n", 10], "XZJKW####", 10, "length"),
        ("Q", ["--ignore-eos", "-n", 1000], "XZJKW" + "#" * 121, CONTEXT - 1, "length"),
        ("#", [], "#" * (CONTEXT - 1), CONTEXT - 1, "length"),
        ("", ["--ignore-eos", "-n", 1000], "?" + "#" * 125, CONTEXT - 1, "length"),
        ("", [], "?", 2, "eos"),
        # Stop texts
        ("Q", ["--stop", "X"], "", 1, "stop"),
        ("Q", ["--stop", "Z"], "X", 2, "stop"),
        ("Q", ["--stop", "ZJK"], "X", 4, "stop"),
        ("Q", ["--stop", "ZJK", "-n", 4], "X", 4, "stop"),
        ("Q", ["--stop", "KW", "--stop", "ZJ"], "X", 3, "stop"),
        ("Q", ["--stop", "ZJ", "--stop", "KW"], "X", 3, "stop"),
        ("Q", ["--stop", "Z", "--stop", "XZ"], "", 2, "stop"),       # both end there; this is first
        ("Q", ["--stop", "ZJKW", "--stop", "JK"], "XZ", 4, "stop"),  # this one is whole first
        ("Q", ["--stop", "ZK"], "XZJKW", 6, "eos"),
        ("Q", ["--stop", "KWQ"], "XZJKW", 6, "eos"),                 # waited for in vain
        ("Q", ["--stop", "JKW", "-n", 4], "XZJK", 4, "length"),
        ("Q", ["--stop", "W", "--ignore-eos"], "XZJK", 5, "stop"),
        ("Q", ["--stop", "W#", "--ignore-eos"], "XZJK", 7, "stop"),  # <|end|> has no text
        ("Q", ["--stop=-x", "--stop=--"], "XZJKW", 6, "eos"),
        ("Q", ["--stop", "Q"], "XZJKW", 6, "eos"),                   # not counted in the prompt
        ("Q", ["--stop", "QX"], "XZJKW", 6, "eos"),                  # nor where it begins there
        ("XQ", ["--stop", "X"], "", 1, "stop"),
        ("Q", list(itertools.chain.from_iterable(["--stop", c] for c in "abcdefghijklmnopqrstuvK")),
         "XZJ", 4, "stop"),
        ("@", [], WORD + "&", 3, "eos"),
        ("@", ["--stop", WORD[1:3]], WORD[:1], 1, "stop"),           # inside one token
        ("@", ["--stop", WORD[-1] + "&"], WORD[:-1], 2, "stop"),
        ("%", ["--stop", "é"], "€", 5, "stop"),
        ("%", ["--stop", r"\u00e9\ud83d\ude00"], "€", 9, "stop"),
        ("$", [], whole, 9, "eos"),
        ("$", ["--stop", r"\t"], "\n", 2, "stop"),
        ("$", ["--stop", r"\n\x09"], "", 2, "stop"),
        ("$", ["--stop", r"\0"], "\n\t\r", 4, "stop"),
        ("$", ["--stop", r"\t", "--no-escape"], whole, 9, "eos"),
        ("$", ["--stop", "\\", "--no-escape"], "\n\t\r\0", 5, "stop"),
        ("=", [], "~", 3, "eos"),  # a row without a token has no text
        ("=", ["--stop", "~"], "", 2, "stop"),
    ]
    for prompt, args, want, drawn, reason in cases:
        what = "%r %r" % (prompt, args)
        got, = objects("-p", prompt, *args)
        expect((got["generated_text"], got["new_tokens"], got["finish_reason"]),
               ([prompt + want], [drawn], [reason]), what)
        full = (prompt + want).encode()
        expect(kl3m("-p", prompt, *args).out, full + b"\n", what + ", streamed")
        expect(kl3m(*args, input=prompt.encode() + b"\n").out, escape(full) + b"\n",
               what + ", as a line")
        expect(kl3m("-p", prompt, *args, "--no-echo").out, want.encode() + b"\n",
               what + ", no echo")


@test("by default 128 tokens are drawn, at temperature 0.3 from the 50 likeliest")
def sampling_defaults():
    model = small_model(max_position_embeddings=300)
    default, = objects("-p", "Section", "-s", 5, "--ignore-eos", model=model)
    expect(default["new_tokens"], [128])
    said, = objects("-p", "Section", "-s", 5, "--ignore-eos", "-n128", "-t", ".3", "-k50",
                    "--top-p=1", "--min-p=0", "--repetition-penalty=1", "-r1", model=model)
    expect(said, default)


@test("a prompt may fill the context with -n 0, and one token less leaves room for one token")
def room_for_the_prompt():
    for length, args, new in [(CONTEXT, ["-n", 0], 0), (CONTEXT - 1, ["-n", 1], 1),
                              (CONTEXT - 1, [], 1), (CONTEXT - 1, ["-n", 99], 1)]:
        got, = objects("-p", "X" * (length - 1) + "Q", *args)
        expect((got["prompt_tokens"], got["new_tokens"], got["finish_reason"]),
               (length, [new], ["length"]))


@test("a prompt that does not fit is refused: status 3, a message with its line, the figures "
      "and the remedy")
def too_long_prompts():
    for length, args in [(CONTEXT + 1, ["-n", 0]), (CONTEXT, ["-n", 1]), (CONTEXT, []),
                         (5 * CONTEXT, [])]:
        long = b"Q" * length
        lines = kl3m(*args, "-t0", input=b"Q\n" + long + b"\nQ\n", code=3)
        expect(lines.out.split(b"\n")[1:], [b"", lines.out.split(b"\n")[0], b""])
        got = objects(*args, "-t0", "-s1", input=b"Q\n" + long + b"\nQ\n", code=3)
        expect(sorted(got[1]), ["error", "prompt"])
        expect(got[1]["prompt"], long.decode())
        expect(got[0], got[2])
        assert got[1]["error"].strip()
        single = kl3m(*args, "-p", long, code=3)
        expect(single.out, b"\n")
        for err in (lines.err, single.err):
            for word in (str(length), str(CONTEXT), "--truncate"):
                assert re.search(r"(?<!\d)%s\b" % re.escape(word), err), "no %s in %r" % (word, err)
        assert re.search(r"\bline 2\b", lines.err), lines.err
        several = kl3m(*args, "-r3", "-t0", input=long + b"\nQ\n", code=3)
        expect(several.out[:3], b"\n\n\n", "each continuation's place is kept")
        expect(several.out[3:], lines.out[:lines.out.index(b"\n") + 1] * 3)


@test("--truncate takes tokens from its side of a long prompt until the new ones fit, "
      "and only then")
def truncation():
    model, n = small_model(), 28
    letters = "".join(random.Random(3).choice("QXZJKW@#") for _ in range(300))
    expect(len(tokenize(model, [letters.encode()])[0]), 300, "each letter is a token")
    sample = ["-n", n, "-s", 9, "-t1", "--ignore-eos", "--no-echo"]
    keep = CONTEXT - n

    def run(prompt, *args):
        got, = objects("-p", prompt, *sample, *args, model=model)
        return got["generated_text"], got["new_tokens"]
    for length in (keep + 1, CONTEXT, CONTEXT + 1, 300):
        prompt = letters[:length]
        expect(run(prompt, "--truncate", "left"), run(prompt[-keep:]))
        expect(run(prompt, "--truncate=right"), run(prompt[:keep]))
        expect(run(prompt, "--truncate=right")[1], [n])
    for prompt in (letters[:keep], "Q", ""):
        expect(run(prompt, "--truncate", "left"), run(prompt))
        expect(run(prompt, "--truncate", "right"), run(prompt))
    expect(run(letters[:keep + 10])[1], [n - 10], "without --truncate the context ends it")


# ---- How a text is written --------------------------------------------------------------------

@test("on lines newline, return, tab, NUL and backslash are escaped; a single prompt's text is raw")
def escaped_lines():
    text = b"$" + ODD + b";"
    expect(kl3m("-p", "$").out, text + b"\n")
    for args in ([], ["--no-escape"]):
        expect(kl3m(*args, input=b"$\n$\n").out, (escape(text) + b"\n") * 2)
    expect(kl3m("-p", "$", "-r2").out, (escape(text) + b"\n") * 2, "with -r each is a line")
    expect(kl3m("-p", r"\t$", "-r2", "-n0").out, b"\\t$\n" * 2)
    got, = objects("-p", "$")
    expect(got["generated_text"], [text.decode()])


@test("with -0 texts go in and come out as they are and end in NUL; a NUL that the model "
      "makes is U+FFFD")
def nul_separated_texts():
    want = (b"$" + ODD + b";").replace(b"\0", "\ufffd".encode())
    expect(kl3m("-0", input=b"$\0$").out, (want + b"\0") * 2)
    expect(kl3m("-0", "-n0", input=b"a\nb\0\0\\n\r\n\0").out, b"a\nb\0\0\\n\r\n\0")
    expect(kl3m("-0", input=b"").out, b"")
    expect(kl3m("-0", "-r2", "-n0", input=b"a\0b\0").out, b"a\0a\0b\0b\0")
    expect([o["generated_text"] for o in objects("-0", input=b"$\0Q\0")],
           [["$" + ODD.decode() + ";"], ["QXZJKW"]])


@test("bytes that are not UTF-8 come out as they are, and in JSON as Python's replace has them")
def bytes_that_are_not_utf8():
    expect(kl3m("-p", "^").out, b"^" + NOT_UTF8 + b"\n")
    expect(kl3m(input=b"^\n").out, b"^" + NOT_UTF8 + b"\n")
    got, = objects("-p", "^")
    expect(got["generated_text"], ["^" + NOT_UTF8.decode("utf-8", "replace")])
    got, = objects("-p", "^", "-n", 2)  # a character that is cut short
    expect(got["generated_text"], ["^\ufffd\ufffd"])
    expect(kl3m("-p", "%", "-n", 2).out, b"%\xe2\x82\n")
    expect(kl3m("-p", "%", "--stop", r"\x82").out, b"%\xe2\n")
    for n in range(1, 40):  # and any bytes of a prompt
        draw = random.Random(n)
        some = b"ab\xc2\xe0\xe2\x82\xac\xed\xa0\x80\xef\xf0\x90\x9f\x98\xf4\x8f\xf5\xff\xc0\x7f "
        lines = [bytes(draw.choice(some) for _ in range(n)) for _ in range(8)]
        got = objects("--no-escape", "-n0", input=b"\n".join(lines) + b"\n")
        expect([o["prompt"] for o in got], [line.decode("utf-8", "replace") for line in lines])
        expect(kl3m("--no-escape", "-n0", input=b"\n".join(lines)).out, b"\n".join(lines) + b"\n")


@test("a single prompt's text comes as it is made, in whole characters, with one newline "
      "more at its end")
def text_as_it_is_made():
    # Over a datagram socket each write of the program is a packet of its own.
    def packets(*args):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        with ours, theirs:
            command = [str(KL3M), "-m", str(chain_model()), *args]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=theirs,
                                  timeout=PATIENCE)
            expect(done.returncode, 0)
            ours.setblocking(False)
            got = []
            try:
                while True:
                    got.append(ours.recv(1 << 16))
            except BlockingIOError:
                return got
    for args, want in [(["-p", "%"], b"%" + EURO_E_SMILE + b"!\n"),
                       (["-p", "%", "--no-echo"], EURO_E_SMILE + b"!\n"),
                       (["-p", "Q"], b"QXZJKW\n"), (["-p", "Q", "--stop", "KWQ"], b"QXZJKW\n")]:
        got = packets(*args)
        expect(b"".join(got), want)
        assert len(got) >= 3, "the text came in %d pieces: %r" % (len(got), got)
        for piece in got:
            piece.decode("utf-8")  # raises where a character is torn
    # Nothing of a stop text is shown, in no packet.
    expect(b"".join(packets("-p", "Q", "--stop", "JKW")), b"QXZ\n")


# ---- JSON -------------------------------------------------------------------------------------

@test("--json gives one object a prompt with the contract's members, in raw UTF-8")
def json_members():
    prompts = ["Q", "", "This Agreement § shall\n\t\"be\" \\ governed\0\x1f\x7f", "%",
               "  spaces  ", "😀 é €"]
    model = small_model()
    counts = [len(ids) for ids in tokenize(model, [p.encode() for p in prompts])]
    got = objects("-n9", "-r2", "-t1", model=model, input=file_of(prompts))
    expect(len(got), len(prompts))
    for one, prompt, count in zip(got, prompts, counts):
        expect(sorted(one),
               ["finish_reason", "generated_text", "new_tokens", "prompt", "prompt_tokens", "seed"])
        expect((one["prompt"], one["prompt_tokens"]), (prompt, count))
        for name in ("generated_text", "finish_reason", "new_tokens"):
            expect(len(one[name]), 2, name)
        assert all(text.startswith(prompt) for text in one["generated_text"])
        assert all(new == 9 if reason == "length" else reason == "eos" and 1 <= new <= 9
                   for new, reason in zip(one["new_tokens"], one["finish_reason"])), one
        assert type(one["seed"]) is int and 0 <= one["seed"] < 2 ** 53
    raw = kl3m("--json", "-p", "%").out
    assert EURO_E_SMILE in raw and raw.count(b"\n") == 1, raw
    expect([o["generated_text"] for o in objects("--no-echo", input=b"Q\n%\n")],
           [["XZJKW"], ["€é😀!"]])
    expect(objects(input=b""), [])
    expect(len(objects("-0", "-n0", input=b"Q\nQ\0Q")), 2)


# ---- Seeds, places, threads -------------------------------------------------------------------

PROMPTS = ["Governing Law.\n", "", "Under this", "Q", "This Agreement shall be governed by",
           "Under this proposed rule,"]
SAMPLED = ["-t1", "-n20"]


@test("with -s each result depends on nothing but its own prompt, number, seed and "
      "sampling options")
def seeded_results_stand_alone():
    model, seed = small_model(), ["-s", 1234]
    alone = {p: objects("-p", p, "-r3", *seed, *SAMPLED, model=model)[0] for p in PROMPTS}

    def check(prompts, *args, input=None, r=3):
        for one, prompt in zip(objects(*args, "-r", r, *seed, *SAMPLED, model=model, input=input),
                               prompts):
            for name in ("generated_text", "finish_reason", "new_tokens"):
                expect(one[name], alone[prompt][name][:r],
                       "%s of %r with %r" % (name, prompt, args))
            expect(one["seed"], 1234)
    for args in ([], ["-j1"], ["-j2"], ["-j3"], ["--rows", 1], ["--rows", 3], ["-b1"],
                 ["--batch=2"], ["-b99"], ["-j2", "--rows", 5, "-b3"]):
        check(PROMPTS, *args, input=file_of(PROMPTS))
    for r in (1, 2):
        check(PROMPTS, input=file_of(PROMPTS), r=r)
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS)) + PROMPTS[:2] * 2
    check(shuffled, input=file_of(shuffled))
    check(PROMPTS, "-0", input=b"".join(p.encode() + b"\0" for p in PROMPTS))
    for prompt in PROMPTS:
        path = tmpdir() / "prompt.txt"
        path.write_bytes(prompt.encode())
        check([prompt], "-f", path)
        check([prompt], "-f", "-", input=prompt.encode())
    # Fewer new tokens: the same text, shorter.
    short, = objects("-p", PROMPTS[0], "-r3", *seed, *SAMPLED, "-n", 7, model=model)
    for a, b in zip(short["generated_text"], alone[PROMPTS[0]]["generated_text"]):
        assert b.startswith(a), (a, b)


@test("continuations of a prompt differ, and so do seeds and prompts with the same seed")
def continuations_differ():
    # 60 fair coins fall alike once in 2^60 runs.
    coins = ["-t1", "-k0", "-n60", "--no-echo"]

    def flips(*args, input=None):
        return [text for one in objects(*coins, *args, input=input)
                for text in one["generated_text"]]
    texts = (flips("-s", 0, "-r5", input=b"<\na\nb\n<<\n")
             + flips("-s", 1, "-r5", input=b"<\na\nb\n<<\n")
             + flips("-s", 2 ** 53 - 1, input=b"<\n"))
    expect(len(set(texts)), len(texts))
    assert all(set(text) == {"a", "b"} for text in texts), texts
    share = sum(text.count("a") for text in texts) / (60 * len(texts))
    # Six standard deviations.
    assert 0.44 < share < 0.56, "a share of %g of 2460 fair coins is heads" % share


@test("-r gives R lines a prompt in the order of the prompts, and the first does not depend on R")
def numbered_continuations():
    three = kl3m("-r3", "-s5", "-t1", "-n12", input=b"<\nQ\na\n").out.split(b"\n")
    one = kl3m("-s5", "-t1", "-n12", input=b"<\nQ\na\n").out.split(b"\n")
    expect(len(three), 10)
    expect(three[0::3][:3], one[:3])
    expect([line[:1] for line in three], [b"<"] * 3 + [b"Q"] * 3 + [b"a"] * 3 + [b""])
    expect(three[3:6], [b"QXZJKW"] * 3)
    expect(kl3m("-r3", "-s5", "-t1", "-n12", "-p", "a").out.split(b"\n")[:3], three[6:9])
    texts = [text for o in objects("-r3", "-s5", "-t1", "-n12", input=b"<\nQ\na\n")
             for text in o["generated_text"]]
    expect([text.encode() for text in texts], three[:9])
    expect(kl3m("-r200", "-n0", input=b"a\nb\n").out, b"a\n" * 200 + b"b\n" * 200)


@test("without -s each prompt draws a seed, which JSON and -v report and -s takes")
def drawn_seeds():
    coins = ["-t1", "-n60"]
    got = objects(*coins, input=b"<\n<\n<\n")
    for name in ("seed", "generated_text"):
        expect(len({str(o[name]) for o in got}), 3, name + " of equal lines")
    for one in got:
        expect(objects(*coins, "-s", one["seed"], "-p", "<"), [one])
    loud = kl3m(*coins, "-v", "-p", "<")
    seeds = re.findall(r"seed\D*(\d+)", loud.err)
    expect(len(seeds), 1, loud.err)
    expect(kl3m(*coins, "-s", seeds[0], "-p", "<").out, loud.out)


# ---- Greedy and the sampling options ----------------------------------------------------------

def last_logits(prompt, model=None):
    path = tmpdir() / "logits"
    expect(kl3m("--logits", path, "-p", prompt, model=model).out, b"")
    values = array.array("f", path.read_bytes())
    if sys.byteorder == "big":
        values.byteswap()
    return values[-ROWS:]


@test("-t 0 takes the largest of --logits' last row, and of equal ones the lower id")
def greedy_takes_the_largest():
    model = small_model()
    prompts = ["", "Q", "Section 1.", "shall be", "7 and 12", "é", "the laws of the State of",
               "(a) Notices. "]
    best = []
    for prompt in prompts:
        row = last_logits(prompt, model)
        best.append(max(range(ROWS), key=lambda i: (row[i], -i)))
    out = kl3m("-t0", "-n1", "--no-echo", model=model, input=file_of(prompts)).out
    expect(out.split(b"\n")[:-1], detokenize(model, [[i] for i in best]))
    row = last_logits("<")
    a, b = byte_ids(b"ab")
    expect(row[a], row[b], "the coin is fair")
    expect(kl3m("-t0", "-n9", "-p", "<").out, b"<" + b"a" * 9 + b"\n")


@test("options that leave one candidate give the greedy text, and of equal candidates the "
      "lower id stays")
def one_candidate_is_greedy():
    model = small_model()
    greedy = kl3m("-t0", "-n20", model=model, input=file_of(PROMPTS)).out
    for args in (["-k1", "-t1"], ["--top-p=0", "-t1"], ["--min-p=1", "-t1"], ["-t", "1e-30"],
                 ["-t", "1e-300"], ["-t0", "-k7", "--top-p=.5", "--min-p=.1"], ["-t0", "-s3"]):
        expect(kl3m(*args, "-n20", model=model, input=file_of(PROMPTS)).out, greedy, " ".join(args))
    for args in (["-k1"], ["--top-p=.4"], ["-k2", "--top-p=.4"]):
        expect(kl3m(*args, "-t1", "-n30", "-p", "<").out, b"<" + b"a" * 30 + b"\n", " ".join(args))
    hot = kl3m("-t", "1e300", "-n30", "--ignore-eos", "-p", "Q", "--no-echo").out
    assert b"XZJKW" not in hot, (
        "at a great temperature the 50 likeliest are equally likely: %r" % hot)


@test("--repetition-penalty bears on the tokens of the prompt and of the continuation")
def penalty_bears_on_prompt_and_continuation():
    def text(*args):
        return kl3m("-t0", "-n4", "--no-echo", *args).out
    expect(text("-p", "#"), b"####\n")
    assert text("-p", "#", "--repetition-penalty=1000")[:1] != b"#"
    expect(text("-p", "<", "--repetition-penalty=1.01")[:2], b"ab")
    expect(text("-p", "a<", "--repetition-penalty=1.01")[:1], b"b")


# ---- Ids and logits ---------------------------------------------------------------------------

@test("--tokenize gives a line of ids for each prompt, and --detokenize the texts again as lines "
      "or with -0 raw")
def tokenize_and_back():
    texts = (models.LEGAL_TEXT.split("\n")
             + ["", " ", "a\tb\n\r\\", "\\n", "Q" * 500, "é€😀", "  (a)  1998\n\n\n"])
    ids = kl3m("--tokenize", input=file_of(texts)).out
    expect(ids.count(b"\n"), len(texts))
    assert re.fullmatch(rb"((\d+( \d+)*)?\n)*", ids), ids
    expect(kl3m("--detokenize", input=ids).out, file_of(texts))
    raw = b"".join(text.encode() + b"\0" for text in texts)
    expect(kl3m("--detokenize", "-0", input=ids).out, raw)
    expect(kl3m("--tokenize", "-0", input=raw).out, ids, "ids are on lines with -0 too")


@test("special tokens in a prompt are tokens or, with --no-special, plain text, and the echo is "
      "the prompt as given")
def special_tokens_in_prompts():
    for text in ("Q<|end|>Q", "<|start|>", "<|mask|><|pad|>", "<|end", "a <|sep|> b"):
        special, = tokenize(chain_model(), [text.encode()])
        plain, = tokenize(chain_model(), [text.encode()], "--no-special")
        expect([models.SPECIAL[i] for i in special if i < 7], re.findall(r"<\|\w+\|>", text))
        assert not [i for i in plain if i < 7], plain
        expect(detokenize(chain_model(), [plain, special]),
               [text.encode(), re.sub(r"<\|\w+\|>", "", text).encode()],
               "special tokens have no text")
        for args in ([], ["--no-special"]):
            expect(kl3m("-n0", "-p", text, *args).out.decode(), text + "\n")
    expect(kl3m("-p", "<|start|>", "--no-echo").out, b"?\n")
    assert kl3m("-p", "<|start|>", "--no-echo", "--no-special").out != b"?\n"


@test("--logits writes [tokens][vocabulary] numbers of fp32 and nothing else, for an empty "
      "prompt one row")
def logits_file():
    model = small_model()
    for text in ("Q", "Governing Law.\n", "", "Q" * (CONTEXT - 1), "Q" * CONTEXT):
        path = tmpdir() / "logits"
        done = kl3m("--logits", path, "-f", "-", model=model, input=text.encode())
        expect(done.out, b"")
        rows = len(tokenize(model, [text.encode()])[0]) or 1
        expect(path.stat().st_size, rows * ROWS * 4, repr(text))
        values = array.array("f", path.read_bytes())
        if sys.byteorder == "big":
            values.byteswap()
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        assert 2 < spread < 6, "the logits' standard deviation is %g" % spread
        expect([p.name for p in path.parent.iterdir()], ["logits"])


@test("a model without a start token takes any text but an empty one, which is that line's error")
def no_start_token():
    tokenizer = json.loads(json.dumps(models.small_tokenizer()).replace("<|start|>", "<|other|>"))
    model = small_model(tokenizer=tokenizer, bos_token_id=None)
    done = run_kl3m("-m", model, "-n", 0, input=b"Q\n\nQ\n")
    expect((done.code, done.out), (3, b"Q\n\nQ\n"))
    assert "line 2: the prompt is empty and the model has no <|start|> token" in done.err, done.err
    done = run_kl3m("-m", model, "--score", input=b"Q\tQ\n\tQ\n")
    expect((done.code, done.out.count(b"\n"), done.out.split(b"\n")[1]), (3, 2, b""))
    assert "line 2: the text before the continuation is empty" in done.err, done.err
