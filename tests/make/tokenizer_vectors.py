#!/usr/bin/env python3
"""Write what the `tokenizers` library does to tests/references/: to be run again when one of these
tokenizers changes.

    pip install -r tests/requirements.txt
    tests/make/tokenizer_vectors.py

tokenizer_small.jsonl and tokenizer_odd.jsonl: texts and ids under the small tokenizer of models.py
and under the odd one of tokenizer_tools.py. The first line says what made the file and from which
tokenizer; then come {"text", "ids"}, with "plain" (the ids when special tokens are read as plain
text) where that differs, and {"ids", "decoded"}. character_classes.jsonl: for letters, numbers and
white space, the ranges of their code points, both ends included.
"""
import json
import random
import sys
from pathlib import Path

import tokenizers

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from tokenizer_tools import REFERENCES, odd_tokenizer, provoking_text, tokenizer_hash

TEXTS = [
    "", " ", "\n", "  ", "   ", " \n", "\n ", "\t", "\r\n", "\x0b", "\x1c", "\x85", "a", " a", "a ",
    "a  b", "a   b", "a \n b", "Governing Law.\n", "Under this", "Medical devices are regulated by",
    "the State", "The party's", "don't", "we're they'll", "I'd've", "IT'S", "'s", "''s", " 's", "'",
    "it\u2019s", "1998", "19981998", "1998 2023", "12023", "1,250,000.00", "(a)(b)(c)", "((a))",
    "<p></p>", "<p", "<", "<<<<", "</", "</p", "<a href=", " href", "href=", "\"}\":\"", "```",
    "=====", "<|end|>", "<|start|>text<|end|>", "<|end", "|end|>", "<|end|><|end|>", "<<|end|>>",
    "a<|end|>b", " <|end|> ", "</s>", "<|start|><|end|><|pad|><|unk|><|sep|><|cls|><|mask|>",
    "<|End|>", "<p<|end|>", "  <|end|>  ", "19<|end|>98", "caf\u00e9", "cafe\u0301", "\u4e2d\u6587",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u00b2\u00bd", "\u0663\u0664",
    "\u2167", "a\u0301\u0301\u0301b", "\u0301", " \u0301", "\u00a0a", "\u3000\u3000a", "a\u2028b",
    "\ufeffa", "\0", "a\0b", "\x7f", "\ufffd", "\U0010ffff", "\U00031350", "\u1c89\ua7cb",
    "\U00010d40", "\U0001e5f1", "..", "..\0", "..\0\0", *(" " * n for n in range(3, 24)),
    *("\n" * n for n in range(2, 15)), *("a" * n for n in (5, 50, 500)),
    *(("agreement" * 20)[:n] for n in (15, 16, 17, 127, 128, 129)),
]


def small_texts(rng):
    added = [token["content"] for token in models.small_tokenizer()["added_tokens"]]
    return TEXTS + models.LEGAL_TEXT.splitlines() + [provoking_text(rng, added) for _ in range(150)]


def odd_texts(rng):
    return ["".join(rng.choice("aXbQ1< ") for _ in range(rng.randrange(1, 20))) for _ in range(300)]


def records(tokenizer, texts, rng):
    for text in texts:
        record = {"text": text, "ids": tokenizer.encode(text).ids}
        tokenizer.encode_special_tokens = True
        plain = tokenizer.encode(text).ids
        tokenizer.encode_special_tokens = False
        if plain != record["ids"]:
            record["plain"] = plain
        yield record
    for _ in range(100):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 30))]
        yield {"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)}


def classes(cut):
    """A class is what joins a letter, a digit or a tab in one piece of the text."""
    for name, probe in ("letter", "a"), ("number", "1"), ("space", "\t"):
        ranges = []
        for code in range(0x110000):
            if 0xD800 <= code < 0xE000 or len(cut(probe + chr(code))) > 1:
                continue
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
        yield {"class": name, "ranges": ranges}


def write(name, *lines):
    with open(REFERENCES / name, "w", encoding="ascii") as file:
        for line in lines:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def main():
    made_by = "tests/make/tokenizer_vectors.py with tokenizers %s" % tokenizers.__version__
    rng = random.Random(3)
    for name, source, texts in (("small", models.small_tokenizer(), small_texts(rng)),
                                ("odd", odd_tokenizer(), odd_texts(rng))):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(source))
        write("tokenizer_%s.jsonl" % name,
              {"made_by": made_by, "tokenizer": tokenizer_hash(source)},
              *records(tokenizer, texts, rng))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    write("character_classes.jsonl", {"made_by": made_by}, *classes(byte_level.pre_tokenize_str))


if __name__ == "__main__":
    main()
