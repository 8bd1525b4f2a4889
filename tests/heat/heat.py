#!/usr/bin/env python3
"""Draws heat.svg: what `kl3m --score --heat` shows of lease.txt with the small model.

    make demo && tests/heat/heat.py [MODEL [OUT]]
"""
import os
import re
import subprocess
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS, WIDTH, HEIGHT, LEFT = 104, 7.22, 17, 12      # of a line; of a character, in pixels


def rgb(colour):
    """Of a terminal's 256 colours one of the cube of 216."""
    levels = (0, 95, 135, 175, 215, 255)
    n = colour - 16
    return "#%02x%02x%02x" % (levels[n // 36], levels[n // 6 % 6], levels[n % 6])


def coloured(output):
    """[(character, its background or None)]"""
    found, colour = [], None
    for code, text in re.findall(r"(?:\x1b\[([\d;]*)m)?([^\x1b]*)", output):
        if code:
            colour = None if code == "0" else rgb(int(code.split(";")[-1]))
        found += [(letter, colour) for letter in text]
    return found


def wrapped(letters):
    """Lines of at most COLUMNS characters, broken at spaces."""
    line = []
    for letter, colour in letters:
        if letter == "\n":
            yield line
            line = []
            continue
        line.append((letter, colour))
        if len(line) > COLUMNS:
            at = max(i for i, (letter, _) in enumerate(line) if letter == " ") + 1
            yield line[:at]
            line = line[at:]
    if line:
        yield line


def main():
    model = sys.argv[1] if len(sys.argv) > 1 else ROOT / "demo.bin"
    program = os.environ.get("KL3M") or ROOT / "kl3m"
    command = [program, "-m", model, "--score", "--heat", "-q", "-f", HERE / "lease.txt"]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
    parts, y = [], 8
    for line in wrapped(coloured(output.rstrip("\n"))):
        start = 0
        while start < len(line):
            end, colour = start, line[start][1]
            while end < len(line) and line[end][1] == colour:
                end += 1
            if colour:
                parts.append('<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s"/>'
                             % (LEFT + start * WIDTH, y, (end - start) * WIDTH, HEIGHT, colour))
            start = end
        text = "".join(letter for letter, _ in line)
        parts.append('<text x="%d" y="%d" textLength="%.1f">%s</text>'
                     % (LEFT, y + 13, len(text.rstrip()) * WIDTH, escape(text.rstrip())))
        y += HEIGHT
    width = 2 * LEFT + COLUMNS * WIDTH
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "heat.svg"
    out.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img">'
        '<title>A lease, each token shaded by its surprise</title>\n'
        '<style>text{font:12px monospace;fill:#000;white-space:pre}</style>\n'
        '<rect width="100%%" height="100%%" fill="#fff"/>\n%s\n</svg>\n'
        % (width, y + 8, "\n".join(parts)), encoding="utf-8")


if __name__ == "__main__":
    main()
