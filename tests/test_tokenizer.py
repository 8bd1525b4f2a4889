"""--tokenize and --detokenize: against ids the `tokenizers` library found, against a plain and slow
tokenizer (tokenizer_tools.py), and by properties that must hold for any text.
"""
import json
import random
import re
import resource
import string
import struct
import unicodedata
import zlib

import models
from harness import (SHARED, Skip, expect, export, run_kl3m, small_directory, small_model, test,
                     tmpdir)
from tokenizer_tools import (LETTER, NUMBER, OTHER, REFERENCES, SPACE, NaiveTokenizer, detokenize,
                             escape, odd_tokenizer, provoking_text, random_bytes, real_setting,
                             small_setting, tokenize, tokenizer_hash)


def settings():
    """The small tokenizer, and the real one where it is."""
    return [small_setting()] + ([real_setting()] if SHARED else [])


def model_with(tokenizer):
    directory = tmpdir()
    models.write_model(directory, tokenizer=tokenizer, vocab_size=1000)
    return export(directory)


def expect_ids(texts, got, want):
    for text, ids, right in zip(texts, got, want):
        expect(ids, right, "ids of %r" % text[:200])


# ---- Ids --------------------------------------------------------------------------------------

@test("the ids of 3,005 texts are those of the tokenizers library with the real tokenizer")
def vectors_of_the_real_tokenizer():
    if SHARED is None:
        raise Skip("the texts and the real tokenizer.json are not here")
    with open(SHARED / "vectors" / "tokens.jsonl", encoding="utf-8") as file:
        vectors = [json.loads(line) for line in file]
    expect(len(vectors), 3005)
    texts = [vector["text"].encode() for vector in vectors]
    expect_ids(texts, tokenize(real_setting().model, texts), [vector["ids"] for vector in vectors])


def references(name):
    with open(REFERENCES / name, encoding="ascii") as file:
        return [json.loads(line) for line in file]


def compare_with_references(name, tokenizer, model):
    made, *records = references(name)
    expect(made["tokenizer"], tokenizer_hash(tokenizer),
           "%s was made with another tokenizer: run tests/make/tokenizer_vectors.py" % name)
    encoded = [record for record in records if "text" in record]
    texts = [record["text"].encode() for record in encoded]
    expect_ids(texts, tokenize(model, texts), [record["ids"] for record in encoded])
    expect_ids(texts, tokenize(model, texts, "--no-special"),
               [record.get("plain", record["ids"]) for record in encoded])

    decoded = [record for record in records if "decoded" in record]
    out = detokenize(model, [record["ids"] for record in decoded])
    for record, line in zip(decoded, out):
        expect(line.decode("utf-8", "replace").encode(), escape(record["decoded"].encode()),
               "text of %r" % record["ids"])


@test("the ids and the texts of the small tokenizer are those of the tokenizers library")
def vectors_of_the_small_tokenizer():
    compare_with_references("tokenizer_small.jsonl", models.small_tokenizer(), small_model())


@test("so they are where added tokens overlap, special or not, searched for first or later")
def overlapping_added_tokens():
    odd = odd_tokenizer()
    compare_with_references("tokenizer_odd.jsonl", odd, model_with(odd))


@test("the ids of random texts are those of a plain tokenizer, bytes that are not UTF-8 included")
def random_texts():
    for setting in settings():
        rng = random.Random(4)
        added = list(setting.naive.added)
        texts = [provoking_text(rng, added).encode() for _ in range(800)]
        texts += [random_bytes(rng, rng.randrange(1, 20)) for _ in range(400)]
        texts += [b"".join((provoking_text(rng, added).encode()[:9], random_bytes(rng, 3)))
                  for _ in range(400)]
        for plain_specials in (False, True):
            options = ["--no-special"] if plain_specials else []
            expect_ids(texts, tokenize(setting.model, texts, *options),
                       [setting.naive.encode(text, plain_specials) for text in texts])


@test("words that begin alike have their own ids, in whatever order they come")
def words_that_begin_alike():
    setting = small_setting()
    letters = string.ascii_lowercase
    texts = [(start + a + b).encode()
             for start in ("Agreemen", "AgreementAgreem", "AgreementAgreeme")
             for a in letters for b in ["", *letters]] * 2
    random.Random(5).shuffle(texts)
    expect_ids(texts, tokenize(setting.model, texts),
               [setting.naive.encode(text) for text in texts])


@test("of pairs with the same rank the leftmost becomes a token first")
def leftmost_of_equals():
    tokenizer = models.small_tokenizer(700)   # it has merges of l, o, s and 0 with themselves
    model = small_model(tokenizer=tokenizer, vocab_size=700)
    naive = NaiveTokenizer(small_directory(tokenizer=tokenizer, vocab_size=700) / "tokenizer.json")
    texts = [(letter * n).encode() for letter in "los0" for n in range(2, 12)]
    want = [naive.encode(text) for text in texts]
    assert len(set(naive.encode(b"lll"))) == 2, "l and ll"
    expect_ids(texts, tokenize(model, texts), want)


@test("every added token is found alone, between letters, doubled and with its end cut off")
def every_added_token():
    for setting in settings():
        texts = [text.encode() for token in setting.naive.added
                 for text in (token, "a" + token + "b", token + token, token[:-1],
                              token + "\n" + token[:-1] + "z")]
        got = tokenize(setting.model, texts)
        expect(got[::5], [[i] for i in setting.naive.added.values()], "ids of the added tokens")
        expect_ids(texts, got, [setting.naive.encode(text) for text in texts])


@test("letters, numbers and white space are told apart as in the tokenizers library")
def classes_of_characters():
    # A tokenizer whose only merges join "!", "a", "1" or a tab with the first byte of a character:
    # the merge happens exactly where the pattern leaves the two in one word, that is, where the
    # character has that class.
    alphabet, probes = models.byte_alphabet(), {OTHER: "!", LETTER: "a", NUMBER: "1", SPACE: "\t"}
    tokenizer = models.small_tokenizer(263)
    vocab = tokenizer["model"]["vocab"]
    merges = [(alphabet[ord(probe)], alphabet[lead]) for probe in probes.values()
              for lead in range(0xC2, 0xF5)]
    vocab.update({left + right: len(vocab) + i for i, (left, right) in enumerate(merges)})
    tokenizer["model"]["merges"] = ["%s %s" % pair for pair in merges]

    # Both sides of both ends of each range of a class, and every sixteenth character.
    class_of, codes = {}, set(range(0, 0x110000, 16))
    for record, kind in zip(references("character_classes.jsonl")[1:], (LETTER, NUMBER, SPACE)):
        for first, last in record["ranges"]:
            class_of.update(dict.fromkeys(range(first, last + 1), kind))
            codes.update((first - 1, first, last, last + 1))
    codes = [code for code in sorted(codes) if code >= 0x80 and not 0xD800 <= code < 0xE000]

    byte_id = [str(vocab[alphabet[byte]]) for byte in range(256)]
    texts, want = [], []
    for code in codes:
        char = chr(code)
        lead, *rest = char.encode()
        ids = []
        for kind, probe in probes.items():
            if kind == class_of.get(code, OTHER):
                ids.append(str(vocab[alphabet[ord(probe)] + alphabet[lead]]))
            else:
                ids += [byte_id[ord(probe)], byte_id[lead]]
            ids += [byte_id[byte] for byte in rest]
        texts.append("".join(probe + char for probe in probes.values()))
        want.append(" ".join(ids))
    done = run_kl3m("-m", model_with(tokenizer), "--tokenize", "-0",
                    input="".join(text + "\0" for text in texts).encode())
    expect(done.code, 0, done.err)
    for text, got, right in zip(texts, done.text.splitlines(), want):
        expect(got, right, "ids of %r" % text)
    expect(len(done.text.splitlines()), len(want))


@test("--no-special reads the special tokens as plain text and still finds the other added tokens")
def no_special():
    for setting in settings():
        naive = setting.naive
        text = b"a<|end|>  <|start|>(a)"
        got, = tokenize(setting.model, [text])
        expect([i for i in got if i in naive.special.values()],
               [naive.special["<|end|>"], naive.special["<|start|>"]])
        plain, = tokenize(setting.model, [text], "--no-special")
        expect([i for i in plain if i in naive.special.values()], [])
        expect([i for i in plain if i in naive.added.values()],
               [naive.added["  "], naive.added["(a)"]])
        expect(detokenize(setting.model, [plain, got]), [text, b"a  (a)"])


# ---- There and back ---------------------------------------------------------------------------

@test("any bytes come back from --tokenize and --detokenize as they were")
def any_bytes_come_back():
    rng = random.Random(6)
    for setting in settings():
        texts = [random_bytes(rng, rng.randrange(200)) for _ in range(1000)]
        texts += [provoking_text(rng, list(setting.naive.added)).encode() for _ in range(1000)]
        ids = tokenize(setting.model, texts, "--no-special")
        expect(detokenize(setting.model, ids), [escape(text) for text in texts])
        expect(detokenize(setting.model, ids, "-0"),
               [text.replace(b"\0", "\ufffd".encode()) for text in texts])


@test("a megabyte of one thing is tokenized in seconds and comes back whole")
def megabyte_of_one_thing():
    rng = random.Random(7)
    size = 1000000
    texts = [unit * (size // len(unit))
             for unit in (b"a", b" ", b"\n", b"\t", b"0", b"<", b"ab", b"a ", b"' ", b"(a", b"\xff",
                          "\u0301".encode(), "\U0001f600".encode())]
    texts.append("".join(rng.choice("aeiourstn") for _ in range(size)).encode())
    for setting in settings():
        for text in texts:
            there = run_kl3m("-m", setting.model, "--tokenize", "-0",
                             input=text + b"\0")
            back = run_kl3m("-m", setting.model, "--detokenize", "-0", input=there.out)
            expect((there.code, back.code), (0, 0), there.err + back.err)
            expect(back.out == text + b"\0", True, "a megabyte of %r" % text[:8])


@test("a line of many megabytes among short ones keeps its place")
def long_line_keeps_its_place():
    long = models.LEGAL_TEXT.encode() * 2000
    texts = [b"Under this", long, b"", b"the State"]
    got = tokenize(small_model(), texts)
    expect([got[0], got[2], got[3]], [*tokenize(small_model(), [texts[0], b"", texts[3]])])
    expect(detokenize(small_model(), got) == [escape(text) for text in texts], True)


@test("characters that span tokens are decoded whole, and special tokens to nothing")
def characters_across_tokens():
    for setting in settings():
        byte_id = {byte: setting.naive.token_id[char]
                   for byte, char in models.byte_alphabet().items()}
        text = "§ 9 – “covered” \U0001f600 né"
        spelled = [byte_id[byte] for byte in text.encode()]
        specials = list(setting.naive.special.values())
        expect(detokenize(setting.model,
                          [spelled, specials, specials[:1] + spelled + specials[1:]]),
               [text.encode(), b"", text.encode()])
        # Half a character stays half a character.
        expect(detokenize(setting.model, [spelled[:1], spelled[1:2]]),
               [text.encode()[:1], text.encode()[1:2]])


@test("ids decode to what the plain tokenizer makes of them")
def decoded_ids():
    for setting in settings():
        naive, rng = setting.naive, random.Random(8)
        id_lists = [[i] for i in range(naive.size)]
        id_lists += [[rng.randrange(naive.size) for _ in range(rng.randrange(30))]
                     for _ in range(500)]
        expect(detokenize(setting.model, id_lists), [escape(naive.decode(ids)) for ids in id_lists])


# ---- Prompts in, lines out --------------------------------------------------------------------

def tokenize_raw(*options, input=None):
    done = run_kl3m("-m", small_model(), "--tokenize", *options, input=input)
    expect(done.code, 0, done.err)
    return done.out


def ids_line(*texts):
    """What --tokenize should print for these texts (bytes)."""
    encode = small_setting().naive.encode
    return "".join(" ".join(map(str, encode(text))) + "\n" for text in texts).encode()


def nfc_model():
    """The small tokenizer with the NFC normalizer that transformers 5 adds."""
    return small_model(tokenizer={**models.small_tokenizer(), "normalizer": {"type": "NFC"}})


@test("with an NFC normalizer a text has the ids of its NFC, each piece between special tokens by itself; bytes that are no text stay")
def normalized():
    rng = random.Random(21)
    marks = [chr(code) for code in range(0x300, 0x370)] + list("\u0591\u05b0\u3099\u302a\u0f71")
    letters = list("aeou AE\u1ea1\u00e9\u0958\u2126\uf900\u0344\u1100\u1161\u11a8\uac00\uac01") + [
        "\U0001d15e", "\U0001d165", "\u09c7", "\u09be", "\u0cc6", "\u0cc2", "\u0cd5"]
    pieces = [letters, marks, marks, ["<|end|>"], ["\u4e2d", "7", "\n"]]
    texts = ["".join(rng.choice(rng.choice(pieces)) for _ in range(rng.randrange(1, 30)))
             for _ in range(4000)]
    texts += ["a" + "".join(rng.choice(marks) for _ in range(3000)), 2000 * "\U0001d160",
              "\u0301x", "<|end|>\u0301<|end|>"]
    composed = ["<|end|>".join(unicodedata.normalize("NFC", part) for part in text.split("<|end|>"))
                for text in texts]
    assert composed != texts
    want = tokenize(small_model(tokenizer=models.small_tokenizer()),
                    [text.encode() for text in composed])
    expect(tokenize(nfc_model(), [text.encode() for text in texts]), want)
    broken = [b"\xff", b"e\xcc", b"\xcc\x81\xcc", b"\xcce\xcc\x81\xff", b"\xff\xcc\x81"]
    want = tokenize(small_model(tokenizer=models.small_tokenizer()),
                    [text.replace(b"e\xcc\x81", b"\xc3\xa9") for text in broken])
    expect(tokenize(nfc_model(), broken), want)


@test("what is normalized is what the model is given: the echo and the text that comes out are as they were")
def echo_is_not_normalized():
    done = run_kl3m("-m", nfc_model(), "-p", "e\u0301", "-n", 0)
    expect(done.text, "e\u0301\n")
    scored = run_kl3m("-m", nfc_model(), "--score", "--json", "-p", "e\u0301\u0344 \U0001d160")
    expect(scored.code, 0, scored.err)


@test("a text that NFC makes longer has room to be learnt from: the same table as from its NFC")
def longer_by_nfc():
    folder, tables = tmpdir(), []
    for text in ("\u0958" * 300000, "\u0915\u093c" * 300000):
        (folder / "text").write_text(text, encoding="utf-8")
        done = run_kl3m("-m", nfc_model(), "--learn", "-o", folder / "out", "--tokens", 20, "-s", 1,
                        "-f", folder / "text")
        expect(done.code, 0, done.err)
        tables.append((folder / "out").read_bytes())
    assert tables[0] == tables[1]


@test("a vocabulary without tokens for bytes that UTF-8 never has leaves them out, and takes all text")
def bytes_without_tokens():
    tokenizer = models.small_tokenizer()
    alphabet = models.byte_alphabet()
    names = alphabet if isinstance(alphabet, dict) else dict(enumerate(alphabet))
    gone = [names[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    vocab = tokenizer["model"]["vocab"]
    free = iter("never%d" % i for i in range(len(gone)))
    tokenizer["model"]["vocab"] = {next(free) if token in gone else token: number
                                   for token, number in vocab.items()}
    model = small_model(tokenizer=tokenizer)
    plain = small_model(tokenizer=models.small_tokenizer())
    text = b"The \xe4\xb8\xad \xf0\x9f\x98\x80 State"
    expect(tokenize(model, [b"\xff" + text + b"\xc0", b"\xf5", b"a\xfeb"]),
           tokenize(plain, [text, b"", b"a"])[:2] + [tokenize(plain, [b"a", b"b"])[0] +
                                                    tokenize(plain, [b"b"])[0]])


@test("an empty prompt is an empty line, and no prompt is none")
def no_prompt():
    expect(tokenize_raw("-p", ""), b"\n")
    expect(tokenize_raw(input=b"\n\na\n\n"), b"\n\n" + ids_line(b"a") + b"\n")
    expect(tokenize_raw("-0", input=b"\0\0"), b"\n\n")
    expect(tokenize_raw(input=b""), b"")
    expect(tokenize_raw("-0", input=b""), b"")
    done = run_kl3m("-m", small_model(), "--detokenize", input=b"\n\n")
    expect((done.code, done.out), (0, b"\n\n"), done.err)


@test("escapes in prompts are decoded, and bad ones stay as they are")
def escapes_in_prompts():
    cases = [
        (rb"Governing Law.\n", b"Governing Law.\n"), (rb"a\tb\rc", b"a\tb\rc"),
        (rb"a\\nb", rb"a\nb"), (rb"\"x\"", b'"x"'), (rb"a\0b", b"a\0b"), (rb"\012", b"\x0012"),
        (rb"\x41\x4a\x4A", b"AJJ"), (rb"caf\xc3\xa9", "café".encode()), (rb"\xff", b"\xff"),
        (rb"caf\u00e9 \u4E2D", "café 中".encode()), (rb"\ud83d\ude00", "😀".encode()),
        (rb"C:\Users", rb"C:\Users"), (rb"C:\dir\a", rb"C:\dir\a"), (rb"\x4", rb"\x4"),
        (rb"\xg1", rb"\xg1"), (rb"\u12", rb"\u12"), (rb"\u12g4", rb"\u12g4"),
        (rb"\ud83d", rb"\ud83d"), (rb"\ud83dx", rb"\ud83dx"), (rb"\ude00\ud83d", rb"\ude00\ud83d"),
        (rb"\ud83d\u0041", rb"\ud83dA"), (b"end\\", b"end\\"),
        ("né\\n".encode(), "né\n".encode()),
    ]
    expect_lines = ids_line(*[text for _, text in cases]).splitlines()
    all_got = tokenize_raw(input=b"\n".join(c for c, _ in cases)).splitlines()
    for (escaped, _), got, want in zip(cases, all_got, expect_lines):
        expect(got, want, "ids of the line %r" % escaped)
    for (escaped, _), want in zip(cases, expect_lines):
        expect(tokenize_raw("-p", escaped), want + b"\n", "ids of -p %r" % escaped)
    raw = b"".join(c + b"\n" for c, _ in cases)
    expect(tokenize_raw("--no-escape", input=raw), ids_line(*[c for c, _ in cases]), "--no-escape")
    expect(tokenize_raw("--no-escape", "-p", rb"a\nb"), ids_line(rb"a\nb"), "--no-escape -p")


@test("a newline ends a line, a return before it is dropped, NUL bytes stay and the last line may "
      "lack its end")
def ends_of_lines():
    expect(tokenize_raw(input=b"a\r\nb\r\r\nc\rd\ne\0f\n\r\nlast"),
           ids_line(b"a", b"b\r", b"c\rd", b"e\0f", b"", b"last"))
    expect(tokenize_raw(input=b"bad \xff\xe2\x82\n\xf0\x9f"),
           ids_line(b"bad \xff\xe2\x82", b"\xf0\x9f"))


@test("with -0 prompts end in NUL and are taken as they are")
def nul_separated():
    texts = [b"two\nlines\n", b"return\r\n", rb"C:\new\x41", b"", b"\xff\xfe", b"last"]
    expect(tokenize_raw("-0", input=b"".join(text + b"\0" for text in texts)), ids_line(*texts))
    expect(tokenize_raw("-0", input=b"\0".join(texts)), ids_line(*texts), "without the last NUL")


@test("-p, -f and standard input give the same ids")
def sources_of_prompts():
    text = "Section 1. “Née”\n\n(a) it's 2023\\n\r\n".encode()
    path = tmpdir() / "prompt.txt"
    path.write_bytes(text)
    want = ids_line(text)
    expect(tokenize_raw("-f", path), want)
    expect(tokenize_raw("-f", "-", input=text), want)
    expect(tokenize_raw("-p", escape(text)), want)
    expect(tokenize_raw(input=escape(text)), want)
    path.write_bytes(b"a\0b\xff")
    expect(tokenize_raw("-f", path), ids_line(b"a\0b\xff"))
    path.write_bytes(b"")
    expect(tokenize_raw("-f", path), b"\n")


# ---- Lines of ids -----------------------------------------------------------------------------

@test("ids of rows that have no token decode to nothing")
def rows_without_token():
    tokens = small_setting().naive.size
    line = small_setting().naive.encode(b"the State")
    expect(detokenize(small_model(), [[tokens], line + [tokens, 519]]), [b"", b"the State"])


@test("a line that is not ids keeps its place, is named, and makes the exit status 3")
def lines_that_are_not_ids():
    good = ids_line(b"the State").strip()
    bad = [b"abc", b"-1", b"1.5", b"1,2", b"0x10", good + b" x", b"520", b"4294967296",
           b"18446744073709551621", b"9" * 30, b"1\0", b"\xff", "１".encode(), b"1e2"]
    for line in bad:
        done = run_kl3m("-m", small_model(), "--detokenize",
                        input=good + b"\n" + line + b"\n" + good + b"\n")
        expect((done.code, done.out), (3, b"the State\n\nthe State\n"),
               "the line %r\n%s" % (line, done.err))
        assert re.search(r"\bline 2\b", done.err), "the line %r: %s" % (line, done.err)
        expect(len(done.err.splitlines()), 1, done.err)
    lines = b"\n".join([good, *bad, good])
    done = run_kl3m("-m", small_model(), "--detokenize", "-0", input=lines)
    expect((done.code, done.out), (3, b"the State\0" + b"\0" * len(bad) + b"the State\0"), done.err)
    for number in range(2, 2 + len(bad)):
        assert re.search(r"\bline %d\b" % number, done.err), "line %d: %s" % (number, done.err)


# ---- Hostile tables ---------------------------------------------------------------------------

NOBODY = 2 ** 32 - 1


class Tables:
    """The small model's tokenizer section, to spoil; its layout is at the top of tokenizer.c."""

    def __init__(self):
        self.model = bytearray(small_model().read_bytes())
        count, = struct.unpack_from("<I", self.model, 12)
        self.end = 64 + 96 * count
        self.entry, = [at for at in range(64, self.end, 96)
                       if self.model[at:at + 10] == b"tokenizer\0"]
        offset, size = struct.unpack_from("<QQ", self.model, self.entry + 64)
        data = bytes(self.model[offset:offset + size])
        tokens, merges, edges, nodes, *self.roots, _ = struct.unpack_from("<7I", data, 8)
        numbers = struct.unpack_from("<%dI" % (4 * (merges + edges) + nodes + 256 + tokens + 1),
                                     data, 64)
        slots = [numbers[i:i + 4] for i in range(0, 4 * (merges + edges), 4)]
        self.merges, self.edges, rest = slots[:merges], slots[merges:], numbers[4 * len(slots):]
        self.nodes, self.bytes = list(rest[:nodes]), rest[nodes:nodes + 256]
        self.offsets = list(rest[nodes + 256:])
        self.flags = data[-tokens - self.offsets[-1]:-self.offsets[-1]]
        self.text = data[-self.offsets[-1]:]

    def spread(self, name, slots):
        """The same table with more slots."""
        old = [slot for slot in getattr(self, name) if slot[0] != NOBODY]
        table = [(NOBODY, 0, 0, 0)] * slots
        for a, b, *value in old:
            at = ((a << 32 | b) * 0x9E3779B97F4A7C15 >> 32) % slots
            while table[at][0] != NOBODY:
                at = (at + 1) % slots
            table[at] = (a, b, *value)
        setattr(self, name, table)
        return table

    def fill(self, name, at):
        """An entry in this slot that no text looks for, if the slot is empty."""
        table = getattr(self, name)
        if table[at][0] == NOBODY:
            table[at] = (0, 1000 + at, 0, 0)
            if name == "edges":
                table[at] = (0, 1000 + at, len(self.nodes), 0)
                self.nodes.append(NOBODY)

    def run_of(self, name, length):
        """Makes exactly so many slots in a row occupied, from the table's end on to its
        beginning."""
        table = self.spread(name, 4096)
        start, = [at for at in range(-length + 1, 0)
                  if table[at - 1][0] == table[at + length][0] == NOBODY][:1]
        for at in range(start, start + length):
            self.fill(name, at % len(table))

    def write(self):
        flat = [number for slot in self.merges + self.edges for number in slot]
        flat += [*self.nodes, *self.bytes, *self.offsets]
        data = (struct.pack("<8s7I28x", b"BPETOK1\n", len(self.flags), len(self.merges),
                            len(self.edges), len(self.nodes), *self.roots, len(self.text))
                + struct.pack("<%dI" % len(flat), *flat) + self.flags + self.text)
        self.model += bytes(-len(self.model) % 64)
        struct.pack_into("<IQQ", self.model, self.entry + 60, zlib.crc32(data),
                         len(self.model), len(data))
        self.model += data
        struct.pack_into("<Q", self.model, 16, len(self.model))
        struct.pack_into("<I", self.model, 24,
                         zlib.crc32(self.model[64:self.end], zlib.crc32(self.model[:24])))
        path = tmpdir() / "hostile.bin"
        path.write_bytes(self.model)
        return path

    def check(self, flaw=None):
        """Refused at once and for this flaw; without one, taken, and with the ids that the model
        has unspoilt."""
        path, text = self.write(), b"This Agreement<|end|>  1990\n"
        begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = run_kl3m("-m", path, "--info")
        took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun
        if flaw is None:
            expect(done.code, 0, done.err)
            expect(tokenize(path, [text]), tokenize(small_model(), [text]))
        else:
            assert (done.code == 1 and flaw in done.err
                    and done.err.count("\n") == 1), (flaw, done.err)
        assert took < 2, "%s: %.1f s" % (flaw, took)   # the nearly full table took 12 s


@test("a hash table nearly full, or with a long run of occupied slots, is refused at once")
def crowded_hash_table():
    Tables().check()
    for name, flaw in (("merges", "the table of merges is too full"),
                       ("edges", "the table of trie edges is too full")):
        full = Tables()
        for at in range(len(full.spread(name, 1 << 19)) - 1):
            full.fill(name, at)
        full.check(flaw)
        small = Tables()
        for at in range(len(getattr(small, name))):
            small.fill(name, at)
        small.check(flaw)
        for length, said in (256, None), (257, flaw):
            run = Tables()
            run.run_of(name, length)
            run.check(said)


@test("tries that would be walked again and again are refused: too deep, or with nodes shared; so "
      "are endless tokens")
def hostile_tries():
    def chain(length):
        tables = Tables()
        tables.spread("edges", 1 << 14)
        rest = [at for at, slot in enumerate(tables.edges) if slot[0] == NOBODY][::3][:length]
        parent = tables.roots[0]
        for at in rest:     # where no search finds them
            tables.edges[at] = (parent, 1000, len(tables.nodes), 0)
            parent = len(tables.nodes)
            tables.nodes.append(NOBODY)
        return tables
    chain(4096).check()
    chain(4097).check("an added token is too long")

    shared = chain(2)
    free = [at for at, slot in enumerate(shared.edges) if slot[0] == NOBODY][0]
    shared.edges[free] = (shared.roots[1], 1000, len(shared.nodes) - 1, 0)
    shared.check("a node with two parents")

    for length, flaw in (4096, None), (4097, "a token is too long"):
        tables = Tables()
        last = tables.offsets[-1] - tables.offsets[-2]
        tables.text += b"x" * (length - last)
        tables.offsets[-1] += length - last
        tables.check(flaw)
