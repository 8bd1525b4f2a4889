"""For the tests of the tokenizer: the program's --tokenize and --detokenize as functions, a
tokenizer whose added tokens overlap, the tokenizer written a second time, plainly and slowly, and
texts that provoke it.
"""
import hashlib
import json
import unicodedata
from pathlib import Path

import models
from harness import ROOT, SHARED, Skip, run_kl3m, small_directory, small_model

REFERENCES = ROOT / "tests" / "references"
BYTE_OF = {char: byte for byte, char in models.byte_alphabet().items()}

# ---- The program ------------------------------------------------------------------------------


def escape(data):
    """Bytes as the program writes them on a line, and reads them from one."""
    for plain, escaped in ((b"\\", b"\\\\"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t"),
                           (b"\0", b"\\0")):
        data = data.replace(plain, escaped)
    return data


def lines_out(done, count, end=b"\n"):
    assert done.code == 0, "status %d: %s" % (done.code, done.err)
    lines = done.out.split(end)
    assert lines.pop() == b"" and len(lines) == count, (
        "%d lines for %d prompts" % (len(lines), count))
    return lines


def tokenize(model, texts, *options, timeout=60):
    """The ids of each text (bytes), as lists. The texts go in as lines, with escapes."""
    done = run_kl3m("-m", model, "--tokenize", *options,
                    input=b"".join(escape(text) + b"\n" for text in texts), timeout=timeout)
    return [[int(number) for number in line.split()] for line in lines_out(done, len(texts))]


def detokenize(model, id_lists, *options, timeout=60):
    """The text (bytes) of each list of ids, as the program writes it: escaped, unless options say
    -0."""
    lines = "".join(" ".join(map(str, ids)) + "\n" for ids in id_lists)
    done = run_kl3m("-m", model, "--detokenize", *options, input=lines.encode(), timeout=timeout)
    return lines_out(done, len(id_lists), b"\0" if "-0" in options else b"\n")


class Setting:
    """A tokenizer.json and a model exported with it."""
    def __init__(self, directory, model):
        self.path = Path(directory) / "tokenizer.json"
        self.model = model
        self.naive = NaiveTokenizer(self.path)


def small_setting():
    return Setting(small_directory(), small_model())


def real_setting():
    """The real tokenizer on weights next to nothing."""
    if SHARED is None:
        raise Skip("the real tokenizer.json is not here")
    options = dict(tokenizer=SHARED / "kl3m-002-170m" / "tokenizer.json", vocab_size=32768,
                   hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
    return Setting(small_directory(**options), small_model(**options))


def normalizing_settings():
    """The real tokenizer as transformers 5 saves it, and that of GPT-NeoX-20B and Pythia: both with
    NFC."""
    if SHARED is None:
        raise Skip("the real tokenizers are not here")
    found = []
    for name, rows in (("kl3m-002-170m", 32768), ("gpt-neox-20b", 50304)):
        tokenizer = json.loads((SHARED / name / "tokenizer.json").read_text(encoding="utf-8"))
        options = dict(tokenizer={**tokenizer, "normalizer": {"type": "NFC"}}, vocab_size=rows,
                       hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
                       intermediate_size=8)
        found.append(Setting(small_directory(**options), small_model(**options)))
    return found


# ---- Tokenizers for references ----------------------------------------------------------------

# (content, special, normalized): tokens that overlap. Those not normalized are looked for first.
ODD = [("aXb", True, False), ("X<", True, False), ("Xb", False, False), ("bQ", False, False),
       ("bQ1", True, False), ("Q1", True, True), ("aQ", True, True), ("1<", False, True),
       ("QQ1Q", False, True), ("1X", False, True), ("aX", False, True), ("ab", False, True),
       ("abab", True, True)]


def odd_tokenizer():
    tokenizer = models.small_tokenizer(263)
    for content, special, normalized in ODD:
        tokenizer["added_tokens"].append({
            "id": 256 + len(tokenizer["added_tokens"]), "content": content, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": normalized, "special": special})
    return tokenizer


def tokenizer_hash(tokenizer):
    return hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()


# ---- The tokenizer again ----------------------------------------------------------------------

OTHER, LETTER, NUMBER, SPACE = range(4)


def char_class(char):
    """By the tables of this Python, which know fewer characters than the program's. A byte that is
    not UTF-8 is a lone surrogate here, so OTHER."""
    if char.isspace():
        return OTHER if "\x1c" <= char <= "\x1f" else SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata.category(char)[0], OTHER)


def words(text):
    """The pieces that GPT-2's pattern cuts a text into."""
    classes = [char_class(char) for char in text]
    at = 0
    while at < len(text):
        end = at
        contraction = next((c for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
                            if text.startswith(c, at)), "")
        if contraction:
            end += len(contraction)
        elif (classes[at] != SPACE
              or (text[at] == " " and at + 1 < len(text) and classes[at + 1] != SPACE)):
            end += text[at] == " "
            kind = classes[end]
            while end < len(text) and classes[end] == kind:
                end += 1
        else:
            while end < len(text) and classes[end] == SPACE:
                end += 1
            if end < len(text) and end - at > 1:
                end -= 1
        yield text[at:end]
        at = end


class NaiveTokenizer:
    def __init__(self, path):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        self.token_id = data["model"]["vocab"]
        self.added = {t["content"]: t["id"] for t in data["added_tokens"]}
        self.special = {t["content"]: t["id"] for t in data["added_tokens"] if t["special"]}
        self.size = 1 + max(*self.token_id.values(), *self.added.values())
        self.content = {i: t for t, i in {**self.token_id, **self.added}.items()}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
                  for m in data["model"]["merges"]]
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        # The special tokens are looked for first. Of two that begin at the same place the longer
        # one is taken.
        self.stages = []
        for stage in (self.special, {c: i for c, i in self.added.items() if c not in self.special}):
            by_first = {}
            for content in sorted(stage, key=len, reverse=True):
                by_first.setdefault(content[0], []).append(content)
            self.stages.append(by_first)

    def bpe(self, word):
        parts = [models.byte_alphabet()[byte] for byte in word.encode("utf-8", "surrogateescape")]
        while len(parts) > 1:
            best, at = min((self.rank.get(pair, len(self.rank)), i)
                           for i, pair in enumerate(zip(parts, parts[1:])))
            if best == len(self.rank):
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [self.token_id[part] for part in parts]

    def encode_from(self, stages, text):
        if not stages:
            return [i for word in words(text) for i in self.bpe(word)]
        ids, start, at = [], 0, 0
        while at < len(text):
            found = next((c for c in stages[0].get(text[at], ()) if text.startswith(c, at)), None)
            if found:
                ids += self.encode_from(stages[1:], text[start:at]) + [self.added[found]]
                start = at = at + len(found)
            else:
                at += 1
        return ids + self.encode_from(stages[1:], text[start:])

    def encode(self, data, plain_specials=False):
        return self.encode_from(self.stages[plain_specials:],
                                data.decode("utf-8", "surrogateescape"))

    def decode(self, ids):
        out = b""
        for content in (self.content.get(i, "") for i in ids if i not in self.special.values()):
            inside = all(char in BYTE_OF for char in content)
            out += bytes(BYTE_OF[char] for char in content) if inside else content.encode()
        return out


# ---- Texts ------------------------------------------------------------------------------------

PIECES = [
    # white space, and what only looks or sounds like it
    " ", " ", " ", "  ", "\n", "\n\n", "\t", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d",
    "\x1e", "\x1f", "\x85", "\xa0", "\u1680", "\u180e", "\u2000", "\u2009", "\u200a", "\u200b",
    "\u2028", "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff",
    # contractions, whole, cut and in the wrong case
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "''", "'l", "'r", "'v", "'S", "'LL",
    "'x", "\u2019s", "s", "ll",
    # numbers
    "0", "1", "9", "19", "1998", "2023", "12,345.67", "\u00b2", "\u00bd", "\u0663", "\u2167",
    "\u2460", "\u3007", "\U0001d7d8",
    # letters
    "a", "e", "the", "State", "Agreement", "shall", "I", "A", "\u00e9", "\u00df", "\u00aa",
    "\u02b0", "\u01c5", "\u0416", "\u03a9\u03bc", "\u4e2d", "\u65e5\u672c",
    "\ud55c", "\u05d7", "\u0639\u0642", "\u0e02", "\U00010400", "\U00020000",
    # marks, joiners, emoji
    "\u0301", "\u0308\u0301", "\u093f", "\u0e49", "\u20dd", "\ufe0f", "\u200d", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
    # signs and what no text should have
    ".", ",", "-", "--", "_", "\"", "\\", "\\n", "/", "$", "\u00a7", "\u2014", "\u201c", "<", ">",
    "|", "<|", "|>", "</s>", "\0", "\x01", "\x07", "\x1b", "\x7f", "\x9f", "\u00ad", "\ue000",
    "\uffff", "\U0001fffe", "\U0010ffff",
]


def provoking_text(rng, added):
    """A few pieces of every kind, some of them added tokens or the beginning of one."""
    text = ""
    for _ in range(rng.randrange(1, 16)):
        choice = rng.random()
        if choice < 0.6:
            text += rng.choice(PIECES) * rng.choice((1, 1, 1, 1, 1, 2, 3))
        else:
            token = rng.choice(added)
            text += token if choice < 0.8 else token[:rng.randrange(len(token) + 1)]
    return text


def random_bytes(rng, n):
    """Bytes that are seldom UTF-8: any at all, or mostly those that begin and continue
    characters."""
    choices = rng.choice((range(256), [*range(0x80, 0x100), 0x20, 0x41],
                          [0xC3, 0xE2, 0xED, 0xF0, 0xA0, 0x80, 0x9F, 0x61]))
    return bytes(rng.choice(choices) for _ in range(n))
