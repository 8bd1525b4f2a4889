"""The rules of the house that a script can check: files, rooms, names, lengths."""
import re
import subprocess

from harness import ROOT, Skip, expect, run_kl3m, test

LONGEST = 120   # lines of a function


def source(name):
    """A file of the project as it is."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(text):
    """The same lines without comments, strings and characters."""
    def blank(match):
        found = match.group()
        return "\n" * found.count("\n") if found.startswith("/") else found[0] * 2
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, text, flags=re.S)


def rooms():
    """{name: code} of kl3m.c, in order; what comes before the first banner is "Opening"."""
    parts = re.split(r"^// ---- \d+\. (.+?) -+$", source("kl3m.c"), flags=re.M)
    return dict(zip(["Opening", *parts[1::2]], map(code_of, parts[0::2])))


def functions(code):
    """(name, lines) of each function. Its head begins a line, and a brace at a line's beginning ends it."""
    for match in re.finditer(r"^\w[^;{}#=]*?(\w+)\([^;{}]*\)\s*\{\n.*?^\}$", code, flags=re.M | re.S):
        yield match.group(1), match.group().count("\n") + 1


@test("the project's top level holds what a user looks for and nothing else")
def _():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        raise Skip("git is not there to tell what belongs to the project")
    if done.returncode:
        raise Skip("not a git checkout")
    names = {name.split("/")[0] for name in done.stdout.decode().split("\n")}
    want = {"kl3m.c", "tokenizer.c", "tokenizer.h", "export_weights.py", "Makefile", "tests", "README.md", "LICENSE"}
    expect(sorted(n for n in names if n and not n.startswith(".")), sorted(want))


@test("README's table of options and --help name the same options")
def _():
    def names(lines):
        return {name for line in lines for name in re.findall(r"(?<![\w-])--?[a-zA-Z0-9][\w-]*", line)}
    tables = re.findall(r"(?:^\|.*\n)+", source("README.md"), flags=re.M)
    rows = [row.split("|")[1] for table in tables if "--max-new-tokens" in table for row in table.splitlines()]
    # In --help the names come first on their line, and two spaces or more after them what they mean.
    told = [line.strip().split("  ")[0] for line in run_kl3m("--help").text.split("\n") if re.match(r"\s+-", line)]
    expect(sorted(names(rows)), sorted(names(told)))


@test("kl3m.c's banners are the rooms that its opening lists")
def _():
    text = source("kl3m.c")
    opening = text[:text.index("#include")]
    first = list(re.finditer(r"^//\s+1\. ", opening, flags=re.M))[-1]  # the rules above them are numbered too
    listed = re.findall(r"^//\s+(\d+)\. +(\S.*)$", opening[first.start():], flags=re.M)
    banners = re.findall(r"^// ---- (\d+)\. (.+?) -+$", text, flags=re.M)
    assert len(banners) > 5, banners
    expect([n for n, _ in listed], [n for n, _ in banners])
    for (number, line), (_, name) in zip(listed, banners):
        assert re.match(re.escape(name) + r"\b", line), "room %s is %r and listed as %r" % (number, name, line)
    expect(len(re.findall(r"^// ----", text, flags=re.M)), len(banners), "banners of another form")


@test("kl3m.c needs no prototypes: what is called stands above")
def _():
    code = code_of(source("kl3m.c"))
    expect(re.findall(r"^(?:static|extern)\b[^=;{}#]*\([^;{}]*\)\s*;", code, flags=re.M), [])


@test("memory is asked for in the first room only, the environment in the options, instructions in the lanes")
def _():
    rules = [  # what is looked for, the rooms where it may stand
        (r"\b(?:malloc|calloc|realloc|aligned_alloc|posix_memalign|strdup|strndup|asprintf|getline|getdelim)\s*\(",
         {"Ground"}),
        (r"\b(?:getenv|secure_getenv)\s*\(", {"Options", "Main"}),
        (r"\b_mm\w*|\bvfma\w*|__builtin_(?:ia32|neon)\w*|\bv(?:ld1|st1|dup|add|mul)q?_\w+", {"Lanes"}),
    ]
    for pattern, allowed in rules:
        where = {name for name, code in rooms().items() if re.search(pattern, code)}
        assert where <= allowed, "%s stands in %s" % (pattern, sorted(where - allowed))
        assert where, "%s stands nowhere: this test looks for the wrong thing" % pattern


@test("no function is longer than %d lines" % LONGEST)
def _():
    for name in ("kl3m.c", "tokenizer.c"):
        found = list(functions(code_of(source(name))))
        assert len(found) > 10, "only %d functions found in %s" % (len(found), name)
        long = [(function, lines) for function, lines in found if lines > LONGEST]
        expect(long, [], name)


@test("tokenizer.c stands alone: it includes its own header and the C library's")
def _():
    expect(set(re.findall(r'#include "(.*?)"', source("tokenizer.c") + source("tokenizer.h"))), {"tokenizer.h"})
    assert not re.search(r"kl3m", code_of(source("tokenizer.c") + source("tokenizer.h")), flags=re.I)
