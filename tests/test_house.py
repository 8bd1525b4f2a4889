"""The rules of the house that a script can check: files, rooms and what they call, lengths."""
import re
import subprocess

from harness import ROOT, Skip, expect, run_kl3m, test

COLUMNS, LONGEST, PARAMETERS = 100, 60, 6   # of a line; lines of a function; of a function

# What a room of kl3m.c may call, besides itself and the C library.
ROOMS = {
    "Opening": [], "Ground": [], "Text": ["Ground"], "Model file": ["Ground"], "Lanes": [],
    "Kernels": ["Model file", "Lanes"], "Threads": ["Ground", "Lanes"],
    "KV cache": ["Ground", "Model file"],
    "Linear layers": ["Ground", "Model file", "Lanes", "Kernels", "Threads", "KV cache"],
    "Attention": ["Ground", "Model file", "Lanes", "Kernels", "Threads", "KV cache",
                  "Linear layers"],
    "Forward": ["Ground", "Model file", "Lanes", "Kernels", "Threads", "KV cache",
                "Linear layers", "Attention"],
    "Sampling": ["Ground", "Kernels"], "Guesses": ["Ground", "Model file"],
    "Patterns": ["Ground", "Text"], "Schema": ["Ground", "Text", "Patterns"],
    "Constraint": ["Ground", "Text", "Patterns", "Schema"],
    "Requests": ["Ground", "Text", "Model file", "KV cache", "Sampling", "Guesses", "Constraint"],
    "Scheduling": ["Ground", "Model file", "Threads", "KV cache", "Linear layers", "Attention",
                   "Forward", "Sampling", "Guesses", "Schema", "Constraint", "Requests"],
    "Prompts": ["Ground", "Text", "Model file", "Schema", "Requests"],
    "Results": ["Ground", "Text", "Sampling", "Requests"],
    "Commands": ["Ground", "Text", "Model file", "Threads", "Guesses", "Schema", "Constraint",
                 "Requests", "Scheduling", "Prompts", "Results"],
    "Options": ["Ground", "Text", "Lanes", "Commands"],
    "Main": ["Ground", "Model file", "Lanes", "Threads", "Commands", "Options"],
}


def source(name):
    """A file of the project as it is."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(text):
    """The same lines without comments, strings and characters."""
    def blank(match):
        found = match.group()
        return "\n" * found.count("\n") if found.startswith("/") else found[0] * 2
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, text,
                  flags=re.S)


def rooms():
    """{name: code} of kl3m.c, in order; what comes before the first banner is "Opening"."""
    parts = re.split(r"^// ---- \d+\. (.+?) -+$", source("kl3m.c"), flags=re.M)
    return dict(zip(["Opening", *parts[1::2]], map(code_of, parts[0::2])))


def functions(code):
    """(name, parameters, lines) of each function. Its head begins a line, and a brace at a line's
    beginning ends it; in the kernels its name is NAME(name)."""
    code = re.sub(r"__attribute__\(\(.*?\)\)\n?", "", code)
    head = r"^\w[^;{}#=]*?\b(NAME\(\w+\)|\w+)\(([^;{}]*)\)\s*\{(?:\n.*?^\}|[^\n]*\})$"
    for match in re.finditer(head, code, flags=re.M | re.S):
        name = re.sub(r"NAME\((\w+)\)", r"\1", match.group(1))
        parameters = re.sub(r"\([^()]*\)", "", match.group(2))   # commas inside another's
        count = 0 if parameters.strip() in ("", "void") else parameters.count(",") + 1
        yield name, count, match.group().count("\n") + 1


def calls(code):
    """The names that stand before a parenthesis, but for members: those are called through what
    the room was given."""
    code = re.sub(r"NAME\((\w+)\)", r"\1", code)
    return set(re.findall(r"(?<![\w.>])(\w+)\s*\(", code))


@test("the project's top level holds what a user looks for and nothing else")
def top_level():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        raise Skip("git is not there to tell what belongs to the project")
    if done.returncode:
        raise Skip("not a git checkout")
    names = {name.split("/")[0] for name in done.stdout.decode().split("\n")}
    want = {"kl3m.c", "tokenizer.c", "tokenizer.h", "export_weights.py", "Makefile", "tests",
            "README.md", "LICENSE"}
    expect(sorted(n for n in names if n and not n.startswith(".")), sorted(want))


@test("README's table of options and --help name the same options")
def tables_of_options():
    def names(lines):
        return {name for line in lines
                for name in re.findall(r"(?<![\w-])--?[a-zA-Z0-9][\w-]*", line)}
    tables = re.findall(r"(?:^\|.*\n)+", source("README.md"), flags=re.M)
    rows = [row.split("|")[1] for table in tables if "--max-new-tokens" in table
            for row in table.splitlines()]
    # In --help the names come first on their line, and two spaces or more after them what they
    # mean.
    told = [line.strip().split("  ")[0] for line in run_kl3m("--help").text.split("\n")
            if re.match(r"\s+-", line)]
    expect(sorted(names(rows)), sorted(names(told)))


@test("kl3m.c's banners are the rooms that its opening lists, each with a paragraph below it")
def banners():
    text = source("kl3m.c")
    opening = text[:text.index("#include")]
    first = list(re.finditer(r"^//\s+1\. ", opening, flags=re.M))[-1]
    listed = re.findall(r"^//\s+(\d+)\. +(\S.*)$", opening[first.start():], flags=re.M)
    found = re.findall(r"^// ---- (\d+)\. (.+?) -+$\n(.*)", text, flags=re.M)
    expect([name for _, name, _ in found], list(ROOMS)[1:])
    expect([n for n, _ in listed], [n for n, _, _ in found])
    for (number, line), (_, name, below) in zip(listed, found):
        assert re.match(re.escape(name) + r"\b", line), "room %s is %r, listed as %r" % (
            number, name, line)
        assert below.startswith("// ") or name == "Main", "no paragraph below %s" % name
    expect(len(re.findall(r"^// ----", text, flags=re.M)), len(found), "banners of another form")


@test("a room of kl3m.c calls only itself and the rooms that it may")
def what_rooms_call():
    home, code = {}, rooms()
    for room, text in code.items():
        for name, _, _ in functions(text):
            assert home.setdefault(name, room) == room, "%s stands in two rooms" % name
    assert len(home) > 250, "only %d functions found" % len(home)
    faults = []
    for room, text in code.items():
        for name in calls(text):
            if name in home and home[name] != room and home[name] not in ROOMS[room]:
                faults.append("%s calls %s of %s" % (room, name, home[name]))
    expect(faults, [])
    order = list(ROOMS)
    for room, others in ROOMS.items():
        late = [other for other in others if order.index(other) >= order.index(room)]
        assert late == [] or (room, late) == ("Kernels", []), (room, late)


@test("kl3m.c needs no prototypes: what is called stands above")
def no_prototypes():
    code = code_of(source("kl3m.c"))
    expect(re.findall(r"^(?:static|extern)\b[^=;{}#]*\([^;{}]*\)\s*;", code, flags=re.M), [])


@test("memory is asked for in the first room, the environment read in the options, instructions in the lanes, standard error written in the first")
def one_place_each():
    rules = [  # what is looked for, the rooms where it may stand
        (r"\b(?:malloc|calloc|realloc|aligned_alloc|posix_memalign|strdup|strndup|v?asprintf|"
         r"getline|getdelim)\s*\(", {"Ground"}),
        (r"\bstderr\b|\bSTDERR_FILENO\b", {"Ground", "Commands", "Main"}),
        (r"\b(?:getenv|secure_getenv)\s*\(", {"Options"}),
        (r"\b_mm\w*|\bvfma\w*|__builtin_(?:ia32|neon)\w*|\bv(?:ld1|st1|dup|add|mul)q?_\w+",
         {"Lanes"}),
        (r"\bparallel\s*\(", {"Threads", "Linear layers", "Attention", "Forward", "Scheduling",
                                "Commands"}),
    ]
    for pattern, allowed in rules:
        where = {name for name, code in rooms().items() if re.search(pattern, code)}
        assert where <= allowed, "%s stands in %s" % (pattern, sorted(where - allowed))
        assert where or "stderr" in pattern, "%s stands nowhere" % pattern


def c_sources():
    return ["kl3m.c", "tokenizer.c", "tokenizer.h",
            *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("*.c")))]


@test("no line is longer than %d columns" % COLUMNS)
def columns():
    names = c_sources() + ["export_weights.py", "Makefile", ".ci/run"]
    names += [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("*.py"))]
    long = ["%s:%d" % (name, number) for name in names
            for number, line in enumerate(source(name).split("\n"), 1)
            if len(line) > COLUMNS and not line.startswith('@test("')]
    expect(long, [])


@test("no function has more than %d lines or %d parameters" % (LONGEST, PARAMETERS))
def sizes_of_functions():
    for name in ("kl3m.c", "tokenizer.c"):
        found = list(functions(code_of(source(name))))
        assert len(found) > 10, "only %d functions found in %s" % (len(found), name)
        large = [one for one in found if one[1] > PARAMETERS or one[2] > LONGEST]
        expect(large, [], name)


@test("no field, constant or function of kl3m.c is without use")
def nothing_is_dead():
    code = code_of(source("kl3m.c"))
    words = re.findall(r"\w+", re.sub(r"NAME\((\w+)\)", r"\1", code))
    count = {}
    for word in words:
        count[word] = count.get(word, 0) + 1
    names = [name for name, _, _ in functions(code)]
    for body in re.findall(r"\b(?:struct|enum)(?:\s+\w+)?\s*\{([^{}]*)\}", code):
        names += re.findall(r"(\w+)(?:\[[^\]]*\])*\s*(?=[;,}=]|$)", body)
    known = {"main", "zero"}   # zero: what is so on disk
    dead = sorted({name for name in names if re.match(r"[A-Za-z_]", name)
                   and count.get(name, 0) < 2} - known)
    expect(dead, [])


@test("tokenizer.c stands alone: it includes its own header and the C library's")
def tokenizer_alone():
    both = source("tokenizer.c") + source("tokenizer.h")
    expect(set(re.findall(r'#include "(.*?)"', both)), {"tokenizer.h"})
    assert not re.search(r"kl3m", code_of(both), flags=re.I)


# Messages that leave nothing to be done, or say it without a semicolon.
ENOUGH = ["out of memory", "a fault of kl3m", "the system gives no random numbers",
          "cannot make a pipe", "so it cannot be mapped", "cannot map the model",
          "nothing can be sampled to learn from", "in %s; kl3m", "out of memory for a prompt"]


@test("a message that ends the program says what to do, or gives the system's own reason")
def messages_have_remedies():
    text = source("kl3m.c")
    found, bare = 0, []
    for call in re.finditer(r'\bdie\(((?:[^;"]|"(?:\\.|[^"\\])*")*?)\);', text):
        said = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', call.group(1)))
        found += bool(said)
        reasoned = "strerror" in call.group(1) or ";" in said or ": export" in said
        if said not in ("", "%s") and not reasoned and not any(x in said for x in ENOUGH):
            bare.append(said)
    assert found > 40, found
    expect([x for x in bare if not re.search(r"makes? |make it|expected|'-|--|export", x)], [])
