#!/usr/bin/env python3
"""Print the tables of characters that tokenizer.c holds, from the Unicode Character Database.

The GPT-2 pattern asks three things of a character: is it a letter, a number, white space. The
`tokenizers` library answers with the tables of Unicode 16.0.0, so they come from the package
unicodedata2 of that version. Its NFC is that of Unicode 9.0.0: of the newer tables those entries
are left out that the library does not know.

    pip install -r tests/requirements.txt
    tests/make/unicode_table.py

tests/test_tokenizer.py compares the program's classes with those the library shows,
tests/live/tokenizer.py its NFC.
"""
import sys

import unicodedata2
from tokenizers.normalizers import NFC, NFD

OTHER, LETTER, NUMBER, SPACE = range(4)

# The property White_Space. Python's isspace() is another set: it has U+001C to U+001F too.
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000}


def char_class(code):
    if code in WHITE_SPACE:
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(unicodedata2.category(chr(code))[0], OTHER)


def runs():
    """(first code point, class) wherever the class changes."""
    last = None
    for code in range(0x110000):
        now = char_class(code)
        if now != last:
            yield code, now
        last = now


def print_table():
    print("""\
// Classes of all code points, Unicode 16.0.0: each entry is (first code point << 2) | class and
// holds up to the next entry. Class 0: other or unassigned, 1: letter, 2: number, 3: white space.
// Printed by tests/make/unicode_table.py.
static const uint32_t unicode_runs[] = {""")
    line = "   "
    for code, now in runs():
        entry = f" {code << 2 | now},"
        if len(line + entry) > 100:
            print(line)
            line = "   "
        line += entry
    print(line)
    print("};")


def print_numbers(head, numbers):
    print(head)
    line = "   "
    for number in numbers:
        entry = " %d," % number
        if len(line + entry) > 100:
            print(line)
            line = "   "
        line += entry
    print(line + "\n};")


def combining_class(code):
    """As the library orders marks: 0 for those that came after Unicode 9."""
    mark, found = chr(code), unicodedata2.combining(chr(code))
    if found == 0:
        return 0
    # Behind a mark of a larger class, or in front of one of a smaller class, it would move.
    if found == 1:
        moved = NFD().normalize_str("a\u0301" + mark) == "a" + mark + "\u0301"
    else:
        moved = NFD().normalize_str("a" + mark + "\u0334") == "a\u0334" + NFD().normalize_str(mark)
    return found if moved else 0


def class_runs():
    last = 0
    for code in range(0x110000):
        now = 0 if 0xD800 <= code < 0xE000 else combining_class(code)
        if now != last:
            yield code << 8 | now
        last = now


def decompositions():
    """Runs of code points: the first, how many, then of each the one or two that it becomes; the
    first of these with 2^31 added if the two do not become it again."""
    run = []

    def whole(run):
        return [run[0][0], len(run)] + [x for _, *both in run for x in both] if run else []

    for code in range(0x110000):
        parts = unicodedata2.decomposition(chr(code))
        if not parts or parts[0] == "<" or 0xD800 <= code < 0xE000:
            continue
        if NFD().normalize_str(chr(code)) == chr(code):    # the library does not know it
            continue
        a, b = ([int(part, 16) for part in parts.split()] + [0])[:2]
        again = b and NFC().normalize_str(chr(a) + chr(b)) == chr(code)
        if run and run[-1][0] != code - 1:
            yield from whole(run)
            run = []
        run.append((code, a if again else a | 1 << 31, b))
    yield from whole(run)


def print_nfc():
    print_numbers("""
// Canonical combining classes of Unicode 9.0.0, those of the library's NFC: each entry is (first
// code point << 8) | class and holds up to the next one. Printed by tests/make/unicode_table.py.
static const uint32_t class_runs[] = {""", [0, *class_runs()])
    print_numbers("""
// Canonical decompositions of the same, in runs: the first code point, how many follow one another,
// and of each the two that it becomes (or one and 0). The first of two that do not become it again
// has 2^31 added. Printed by tests/make/unicode_table.py.
static const uint32_t decompositions[] = {""", decompositions())


if __name__ == "__main__":
    if unicodedata2.unidata_version != "16.0.0":
        sys.exit(f"unicodedata2 has Unicode {unicodedata2.unidata_version}; install "
                 f"unicodedata2==16.0.0")
    print_table()
    print_nfc()
