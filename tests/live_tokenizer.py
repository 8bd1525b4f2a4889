#!/usr/bin/env python3
"""Compare --tokenize with the `tokenizers` library, text by text, and measure both:

    pip install tokenizers==0.23.3
    python3 tests/live_tokenizer.py

The tokenizer is the real one where ../shared is present, else the small one of models.py.
"""
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, as ours
os.environ["RAYON_NUM_THREADS"] = "1"

import tokenizers

import models
from harness import KL3M, SHARED, tmpdir
from tokenizer_tools import detokenize, provoking_text, real_setting, small_setting, tokenize

LICENCES = Path("/usr/share/common-licenses")  # English legal text that every Debian system has
counts = {"ok": 0, "FAIL": 0}


def report(sentence, failure=""):
    kind = "FAIL" if failure else "ok"
    counts[kind] += 1
    print("%-4s %s%s" % (kind, sentence, "\n     " + failure if failure else ""), flush=True)


def compare(sentence, setting, library, texts, plain_specials=False):
    """Report the first of these texts that has other ids than the library's, if one has."""
    library.encode_special_tokens = plain_specials
    got = tokenize(setting.model, [text.encode() for text in texts], *["--no-special"] * plain_specials, timeout=600)
    want = (encoding.ids for encoding in library.encode_batch_fast(texts))
    different = [(text, ids, right) for text, ids, right in zip(texts, got, want) if ids != right]
    failure = "%d texts differ; %r is %r, should be %r" % (len(different), *(str(x)[:300] for x in different[0])) \
        if different else ""
    report(sentence, failure)


def compare_decoding(sentence, setting, library, id_lists):
    got = detokenize(setting.model, id_lists, "-0", timeout=600)
    want = library.decode_batch(id_lists, skip_special_tokens=True)
    # The library has U+FFFD for bytes that are not UTF-8; the program has them as they are, and U+FFFD for NUL.
    different = [ids for ids, text, right in zip(id_lists, got, want)
                 if text.decode("utf-8", "replace") != right.replace("\0", "\ufffd")]
    report(sentence, "%d differ, so %r" % (len(different), different[0]) if different else "")


def every_character():
    return [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def english_lines():
    text = models.LEGAL_TEXT
    for path in sorted(LICENCES.iterdir()) if LICENCES.is_dir() else []:
        if not path.is_symlink():
            text += path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.splitlines() if line]


def correctness(setting, library):
    added = list(setting.naive.added)
    characters = every_character()
    for sentence, form in (("alone", "%s"), ("between letters", "a%sa"), ("between numbers", "1%s1"),
                           ("after a space", " %s"), ("after a tab", "\t%s"), ("doubled", "%s%s")):
        texts = [form.replace("%s", char) for char in characters]
        compare("every character %s has the library's ids" % sentence, setting, library, texts)

    rng = random.Random(11)
    texts = [provoking_text(rng, added) for _ in range(50000)]
    compare("50,000 random texts have the library's ids", setting, library, texts)
    compare("they have with the special tokens read as plain text", setting, library, texts, plain_specials=True)
    texts = ["".join(rng.choice(characters) for _ in range(rng.randrange(20))) for _ in range(20000)]
    compare("20,000 texts of random characters have the library's ids", setting, library, texts)

    english = "\n".join(english_lines())
    provoking = "".join(provoking_text(rng, added) for _ in range(100000))
    compare("texts of millions of characters have the library's ids", setting, library,
            [english * (1 + 3000000 // len(english)), provoking])
    compare("a megabyte of one thing has the library's ids", setting, library,
            [unit * (1000000 // len(unit)) for unit in
             ("a", " ", "\n", "0", "<", "ab", "\u0301", "\U0001f600", "' ", "\xe9", "\u4e2d")]
            + ["".join(rng.choice("aeiourstn") for _ in range(1000000))])

    size = library.get_vocab_size()
    compare_decoding("20,000 random lists of ids have the library's text", setting, library,
                     [[i] for i in range(size)] + [[rng.randrange(size) for _ in range(20)] for _ in range(20000)])


def speed(setting, library):
    """Megabytes a second of both on the same lines, in turn."""
    lines = [line for line in english_lines() if "\\" not in line]
    random.Random(12).shuffle(lines)
    lines *= 1 + 8000000 // sum(map(len, lines))
    path = tmpdir() / "lines.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = path.stat().st_size / 1e6
    ours, theirs = [], []
    for _ in range(3):
        with open(path, "rb") as file:
            start = time.perf_counter()
            subprocess.run([KL3M, "-m", setting.model, "--tokenize"], stdin=file, stdout=subprocess.DEVNULL, check=True)
            ours.append(size / (time.perf_counter() - start))
        start = time.perf_counter()
        library.encode_batch(lines)
        theirs.append(size / (time.perf_counter() - start))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print("%.1f MB of English lines, medians of 3: --tokenize %.1f MB/s (start and output included), tokenizers' "
          "encode_batch %.2f MB/s, one thread each: %.1f times" % (size, ours, theirs, ours / theirs))


def main():
    setting = real_setting() if SHARED else small_setting()
    library = tokenizers.Tokenizer.from_file(str(setting.path))
    print("tokenizers %s, %s" % (tokenizers.__version__, "the real tokenizer" if SHARED else "the small tokenizer"))
    correctness(setting, library)
    speed(setting, library)
    print("%d passed, %d failed" % (counts["ok"], counts["FAIL"]))
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
