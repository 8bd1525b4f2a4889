#!/usr/bin/env python3
"""--tokenize beside the `tokenizers` library, text by text, and the speed of both.

    pip install -r tests/requirements.txt
    tests/live/tokenizer.py [WORD...]

The tokenizer is the real one where ../shared is present, else the small one of models.py. Takes
about two minutes.
"""
import os
import sys

sys.dont_write_bytecode = True
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as ours
os.environ["RAYON_NUM_THREADS"] = "1"

import functools
import random
import resource
import statistics
import subprocess
import time
import unicodedata
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from harness import KL3M, SHARED, run_tests, selected, test, tmpdir
from tokenizer_tools import (detokenize, normalizing_settings, provoking_text, real_setting,
                             small_setting, tokenize)

LICENCES = Path("/usr/share/common-licenses")  # English legal text that every Debian system has


@functools.lru_cache(maxsize=None)
def setting():
    return real_setting() if SHARED else small_setting()


@functools.lru_cache(maxsize=None)
def library():
    return tokenizers.Tokenizer.from_file(str(setting().path))


def compare(texts, plain_specials=False, place=None):
    place = place or setting()
    reference = library() if place == setting() else tokenizers.Tokenizer.from_file(str(place.path))
    reference.encode_special_tokens = plain_specials
    options = ["--no-special"] if plain_specials else []
    for at in range(0, len(texts), 50000):
        part = texts[at:at + 50000]
        got = tokenize(place.model, [text.encode() for text in part], *options)
        for text, ids, encoding in zip(part, got, reference.encode_batch_fast(part)):
            assert ids == encoding.ids, (
                "%.200r is %.200r, in the library %.200r" % (text, ids, encoding.ids))
    reference.encode_special_tokens = False


@functools.lru_cache(maxsize=None)
def characters():
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


@functools.lru_cache(maxsize=None)
def provoking_texts():
    rng = random.Random(11)
    added = list(setting().naive.added)
    return [provoking_text(rng, added) for _ in range(50000)]


@functools.lru_cache(maxsize=None)
def english_lines():
    text = models.LEGAL_TEXT
    for path in sorted(LICENCES.iterdir()) if LICENCES.is_dir() else []:
        if not path.is_symlink():
            text += path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines() if line]


# ---- Ids and texts ----------------------------------------------------------------------------

@test("every character has the library's ids: alone, doubled, between letters, between digits, "
      "after white space")
def every_character():
    for form in ("{0}", "{0}{0}", "a{0}a", "1{0}1", " {0}", "\t{0}"):
        compare([form.format(char) for char in characters()])


@test("50,000 random texts have the library's ids")
def random_texts():
    compare(provoking_texts())


@test("they have with encode_special_tokens and --no-special")
def without_special_tokens():
    compare(provoking_texts(), plain_specials=True)


def composing_texts(added):
    """Of marks, of what decomposes and of Hangul, beside added tokens."""
    rng, found = random.Random(17), []
    marks = [c for c in characters() if unicodedata.combining(c)]
    parts = [c for c in characters() if unicodedata.decomposition(c)[:1] not in ("", "<")]
    hangul = [chr(code) for code in (*range(0x1100, 0x1114), *range(0x1161, 0x1177),
                                     *range(0x11A7, 0x11C4), 0xAC00, 0xAC01, 0xAC1C, 0xD7A3)]
    for _ in range(50000):
        kinds = rng.choices((list("aeoAO sXQ1<"), marks, marks, parts, hangul, added),
                            k=rng.randrange(1, 12))
        found.append("".join(rng.choice(kind) for kind in kinds))
    return found + ["a" + "".join(rng.choice(marks) for _ in range(800)) for _ in range(50)]


@test("with NFC every character has the library's ids, alone, before and behind a mark, and so have "
      "100,000 random texts: the real tokenizer as transformers 5 saves it, and GPT-NeoX's")
def normalizing():
    for place in normalizing_settings():
        added = list(place.naive.added)
        for form in ("{0}", "a{0}a", "{0}\u0301", "\u1100{0}"):
            compare([form.format(char) for char in characters()], place=place)
        compare(composing_texts(added), place=place)
        compare(composing_texts(added), plain_specials=True, place=place)
        rng = random.Random(18)
        compare([provoking_text(rng, added) for _ in range(50000)], place=place)
        compare(["e\u0301" * 300000, "\u0301" * 300000, "\uac00\u11a8" * 200000], place=place)


@test("20,000 texts of random characters have the library's ids")
def random_characters():
    rng = random.Random(13)
    compare(["".join(rng.choice(characters()) for _ in range(rng.randrange(20)))
             for _ in range(20000)])


@test("texts of millions of characters have the library's ids")
def long_texts():
    english = "\n".join(english_lines())
    compare([english * (1 + 3000000 // len(english)), "".join(provoking_texts() * 2)])


@test("a megabyte of one thing has the library's ids")
def megabyte_of_one_thing():
    rng = random.Random(14)
    compare([unit * (1000000 // len(unit)) for unit in
             ("a", " ", "\n", "0", "<", "ab", "' ", "\xe9", "\u0301", "\u4e2d", "\U0001f600")]
            + ["".join(rng.choice("aeiourstn") for _ in range(1000000))])


@test("every id and 20,000 random lists of ids have the library's text")
def decoded_ids():
    rng, size = random.Random(15), library().get_vocab_size()
    id_lists = ([[i] for i in range(size)]
                + [[rng.randrange(size) for _ in range(20)] for _ in range(20000)])
    got = detokenize(setting().model, id_lists, "-0")
    want = library().decode_batch(id_lists, skip_special_tokens=True)
    for ids, text, right in zip(id_lists, got, want):
        # The library has U+FFFD for bytes that are not UTF-8; the program has them as they are, and
        # U+FFFD for NUL.
        assert text.decode("utf-8", "replace") == right.replace("\0", "\ufffd"), "ids %r" % ids


# ---- Speed ------------------------------------------------------------------------------------

def print_speed():
    """A measurement, not a test: how fast the machine is just now must not decide."""
    if not LICENCES.is_dir():
        return
    lines = [line for line in english_lines() if "\\" not in line]
    random.Random(16).shuffle(lines)
    lines *= 1 + 8000000 // sum(map(len, lines))
    path = tmpdir() / "lines.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    megabytes = path.stat().st_size / 1e6

    # Processor time, since others may use the machine meanwhile; each uses one thread. Ours is the
    # whole program's, from its start to the ids written.
    def ours():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(path, "rb") as file:
            subprocess.run([KL3M, "-m", setting().model, "--tokenize"], stdin=file,
                           stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return megabytes / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def theirs():
        start = time.process_time()
        library().encode_batch(lines)
        return megabytes / (time.process_time() - start)

    pairs = [(ours(), theirs()) for _ in range(5)]
    mine, other = (statistics.median(pair[i] for pair in pairs) for i in range(2))
    print("     %.1f MB of English lines: --tokenize %.1f MB/s, encode_batch %.2f MB/s, %.1f times"
          % (megabytes, mine, other, mine / other))


if __name__ == "__main__":
    print("tokenizers %s with %s tokenizer"
          % (tokenizers.__version__, "the real" if SHARED else "the small"))
    if len(sys.argv) == 1:
        print_speed()
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
