#!/usr/bin/env python3
"""Print the table of character classes that tokenizer.c holds, from the Unicode Character Database.

The GPT-2 pattern asks three things of a character: is it a letter, a number, white space. The
`tokenizers` library answers with the tables of Unicode 16.0.0, so they come from the package
unicodedata2 of that version:

    pip install -r tests/requirements.txt
    tests/make/unicode_table.py

tests/test_tokenizer.py compares the program's classes with those the library shows.
"""
import sys

import unicodedata2

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


if __name__ == "__main__":
    if unicodedata2.unidata_version != "16.0.0":
        sys.exit(f"unicodedata2 has Unicode {unicodedata2.unidata_version}; install "
                 f"unicodedata2==16.0.0")
    print_table()
