#!/usr/bin/env python3
"""Write references/tokenizer_small.jsonl: texts and their ids under the small tokenizer of models.py, as the
`tokenizers` library finds them. To be run again when that tokenizer changes:

    pip install -r requirements.txt
    ./tokenizer_vectors.py

The first line says what made it and from which tokenizer. Then {"text", "ids"}, with "plain" (the ids when special
tokens are read as plain text) where that differs, and {"ids", "decoded"}.
"""
import hashlib
import json
import random
from pathlib import Path

import models
from tokenizer_tools import provoking_text

REFERENCES = Path(__file__).resolve().parent / "references" / "tokenizer_small.jsonl"

TEXTS = [
    "", " ", "\n", "  ", "   ", " \n", "\n ", "\t", "\r\n", "\x0b", "\x1c", "\x85", "a", " a", "a ", "a  b", "a   b",
    "a \n b", "Governing Law.\n", "Under this", "Medical devices are regulated by", "the State", "The party's",
    "don't", "we're they'll", "I'd've", "IT'S", "'s", "''s", " 's", "'", "it\u2019s", "1998", "19981998",
    "1998 2023", "12023", "1,250,000.00", "(a)(b)(c)", "((a))", "<p></p>", "<p", "<", "<<<<", "</", "</p",
    "<a href=", " href", "href=", "\"}\":\"", "```", "=====", "<|end|>", "<|start|>text<|end|>", "<|end", "|end|>",
    "<|end|><|end|>", "<<|end|>>", "a<|end|>b", " <|end|> ", "</s>",
    "<|start|><|end|><|pad|><|unk|><|sep|><|cls|><|mask|>", "<|End|>", "<p<|end|>", "  <|end|>  ", "19<|end|>98",
    "caf\u00e9", "cafe\u0301", "\u4e2d\u6587", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u00b2\u00bd", "\u0663\u0664", "\u2167", "a\u0301\u0301\u0301b", "\u0301", " \u0301", "\u00a0a",
    "\u3000\u3000a", "a\u2028b", "\ufeffa", "\0", "a\0b", "\x7f", "\ufffd", "\U0010ffff", "\U00031350",
    "\u1c89\ua7cb", "\U00010d40", "\U0001e5f1", *(" " * n for n in range(3, 24)), *("\n" * n for n in range(2, 15)),
    *("a" * n for n in (5, 50, 500)),
]


def tokenizer_hash(tokenizer):
    return hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()


def records(tokenizer, size, added):
    rng = random.Random(3)
    for text in TEXTS + models.LEGAL_TEXT.splitlines() + [provoking_text(rng, added) for _ in range(150)]:
        record = {"text": text, "ids": tokenizer.encode(text).ids}
        tokenizer.encode_special_tokens = True
        plain = tokenizer.encode(text).ids
        tokenizer.encode_special_tokens = False
        if plain != record["ids"]:
            record["plain"] = plain
        yield record
    for _ in range(100):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 30))]
        yield {"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)}


def main():
    import tokenizers  # here, since the tests read this file without having the library

    small = models.small_tokenizer()
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(small))
    added = [token["content"] for token in small["added_tokens"]]
    made = {"made_by": "tests/tokenizer_vectors.py with tokenizers %s" % tokenizers.__version__,
            "tokenizer": tokenizer_hash(small)}
    with open(REFERENCES, "w", encoding="ascii") as file:
        for record in [made, *records(tokenizer, tokenizer.get_vocab_size(), added)]:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
