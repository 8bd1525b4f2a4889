"""The command line: options, prompts in, model files, messages, exit statuses, signals."""
import fcntl
import json
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib

from harness import (KL3M, PATIENCE, Skip, expect, run_kl3m, small_directory, small_model, test,
                     tmpdir, until, until_it_catches)
from tokenizer_tools import escape

CONTEXT = 4096     # long enough for a text that takes seconds


def model():
    return small_model(max_position_embeddings=CONTEXT)


def kl3m(*args, input=None, code=0, **more):
    """Runs the program with the model and holds it to an exit status."""
    done = run_kl3m("-m", model(), *args, input=input, **more)
    assert done.code == code, "ended with %d: %r: %s" % (done.code, args, done.err)
    return done


def says(text, word):
    """Is this a word (or number) of the text?"""
    return re.search(r"(?<![\w.-])%s(?![\w-]|\.\d)" % re.escape(word), text) is not None


def check_error(done, code, *words):
    """It failed with this status, printed no result, and said why in one line with these words."""
    expect((done.code, done.out), (code, b""), done.err)
    assert done.err.endswith("\n") and done.err.count("\n") == 1 and len(done.err) > 20, (
        repr(done.err))
    for word in words:
        assert word in done.err, "%r is not in %r" % (word, done.err)


# ---- Options ----------------------------------------------------------------------------------

NOT_WHOLE = ["", "abc", "1.5", "1e3", "0x10", "5x", "5 ", "--", "1_000", "1,000", "nan", "inf",
             "１", "1e400", "99999999999999999999", "-99999999999999999999", "-1"]
NOT_REAL = ["", "abc", "nan", "-nan", "inf", "-inf", "infinity", "1e400", "-1e400", "0.5x", "1 ",
            "0,5", "--", "-0.01"]
WHOLE, REAL = "whole number", "number"
NUMBERS = [  # names, kind, the range's ends, values in range, values out of it
    ("-n --max-new-tokens", WHOLE, ["0"], ["0", "1", "300"], []),
    ("-t --temperature", REAL, ["0"], ["0", "0.7", ".5", "5.", "1e-3", "1E3", "1e30"], []),
    ("-k --top-k", WHOLE, ["0"], ["0", "1", "520", "2000000000"], []),
    ("--top-p", REAL, ["0", "1"], ["0", "0.5", "1", "1.0"], ["1.01", "2"]),
    ("--min-p", REAL, ["0", "1"], ["0", "0.5", "1", "1.0"], ["1.01", "2"]),
    ("--repetition-penalty", REAL, ["0"], ["1e-3", "0.5", "1", "2"], ["0", "0.0"]),
    ("-r --num-return-sequences", WHOLE, ["1"], ["1", "2"], ["0"]),
    ("-s --seed", WHOLE, ["0", "9007199254740991"],
     ["0", "9007199254740991"], ["9007199254740992"]),
    ("-j --threads", WHOLE, ["1"], ["1", "5"], ["0"]),
    ("-b --batch", WHOLE, ["1"], ["1", "5"], ["0"]),
    ("--rows", WHOLE, ["1"], ["1", "5"], ["0"]),
]


def forms(name, value):
    """The ways to write an option with its value."""
    if name.startswith("--"):
        return [[name, value], [name + "=" + value],
                [name.replace("-", "_").replace("__", "--", 1), value]]
    return [[name, value]] + ([[name + value]] if value else [])


@test("a number out of its option's range, or none at all, is status 2 with the option "
      "and the range")
def numbers_out_of_range():
    for names, kind, ends, _, out in NUMBERS:
        for value in (NOT_WHOLE if kind == WHOLE else NOT_REAL) + out:
            every = [form for name in names.split() for form in forms(name, value)]
            args = every[len(value) % len(every)]  # a different form each time
            done = run_kl3m(*args, "-p", "Q")
            check_error(done, 2)
            assert any(says(done.err, name) for name in names.split()), "%r: %s" % (args, done.err)
            for end in ends:
                assert says(done.err, end), (
                    "%r: the range's %s is not in: %s" % (args, end, done.err))


@test("a number in its option's range is taken, in every form of the option")
def numbers_in_range():
    for names, _, _, values, _ in NUMBERS:
        for value in values:
            for name in names.split():
                for args in forms(name, value):
                    assert kl3m("-p", "Q", "-n2", *args, "-q").out.startswith(b"Q"), args
    # Refused, or more than there is room for: never a few.
    for n in (2 ** 31, 2 ** 32, 2 ** 32 + 1, 2 ** 63 - 1):
        done = run_kl3m("-m", small_model(), "-n", n, "-p", "Q", "--json", "--ignore-eos")
        if done.code != 2:
            expect(json.loads(done.out)["new_tokens"], [127], "-n %d" % n)


@test("any other fault of the command line is status 2 with a message that names it")
def faults_of_the_command_line():
    cases = [
        (["--frobnicate"], "--frobnicate"), (["--frobnicate=3"], "--frobnicate"), (["-z"], "-z"),
        (["-Z5"], "-Z"), (["--n", "5"], "--n"), (["--JSON"], "--JSON"), (["-N", "5"], "-N"),
        (["--top-kk", "5"], "--top-kk"), (["--max-new", "3"], "--max-new"),
        (["--temp", "1"], "--temp"), (["--temp=1"], "--temp"),
        (["--see=1"], "--see"), (["--ignore"], "--ignore"), (["--no-esc"], "--no-esc"),
        (["--max_new=3"], "--max"), (["--promp=x"], "--promp"),
        (["--json=1"], "--json"), (["--no-echo=yes"], "--no-echo"), (["--verify="], "--verify"),
        (["stray"], "stray"), (["--", "stray"], "stray"), (["--", "--json"], "--json"),
        (["--json", "stray"], "stray"), (["--truncate", "middle"], "--truncate"),
        (["--truncate="], "--truncate"), (["--truncate=Left"], "--truncate"),
        (["--truncate=lef"], "--truncate"), (["--stop", ""], "--stop"), (["--stop="], "--stop"),
        (["-n=5"], "-n"), (["-s", "-s"], "-s"),
    ]
    for args, word in cases:
        done = run_kl3m("-p", "Q", *args)
        check_error(done, 2, word)
        if "--truncate" in word:
            assert says(done.err, "left") and says(done.err, "right"), done.err
        if args[0] != "--":
            check_error(run_kl3m(*args, "-p", "Q"), 2, word)
    for option in ("-m --model -p --prompt -f --file -n --max-new-tokens -t --temperature -k "
                   "--top-k --top-p --min-p --repetition-penalty -r --num-return-sequences -s "
                   "--seed --stop --truncate -j --threads -b --batch --rows --logits").split():
        done = run_kl3m(option)
        check_error(done, 2)
        assert says(done.err, option), "%s without a value: %s" % (option, done.err)
    for args, words in ((["-o", "x"], "-o, --out goes with --learn or --quantize"),
                        (["--check"], "--check goes with --schema or --regex"),
                        (["-t", "inf"], "'inf' is not a finite number of at least 0")):
        check_error(run_kl3m(*args), 2, words)
    for args in (["-p", "a", "-p", "b"], ["-p", "a", "--prompt=a"], ["-pa", "-f", "x"],
                 ["-f", "x", "-f", "x"], ["--file=x", "--prompt", "a"], ["-p", "", "-p", ""],
                 ["-f", "-", "-p", ""]):
        done = run_kl3m(*args)
        check_error(done, 2)
        assert (says(done.err, "-p") or says(done.err, "-f") or "--prompt" in done.err
                or "--file" in done.err), done.err


@test("--opt=value, -n32, underscores, values that begin with a hyphen and repeated options work")
def forms_of_options():
    greedy = ["-p", "Q", "-t0", "--ignore-eos"]
    five = kl3m(*greedy, "-n", "5").out
    for args in (["-n5"], ["--max-new-tokens", "5"], ["--max-new-tokens=5"], ["--max_new_tokens=5"],
                 ["-n05"], ["--max_new-tokens", "5"], ["-n", "9", "-n", "5"],
                 ["--max-new-tokens=9", "-n5"], ["-n5", "--"], ["-n5", "-t9", "-t0"],
                 ["-n5", "-m", "nowhere.bin", "-m", model()],
                 ["-n5", "--no_special", "--ignore_eos", "--no-special", "--rows=9", "--rows=8"]):
        expect(kl3m(*greedy, *args).out, five, args)
    for args, prompt in [(["-p", "-n"], "-n"), (["-p--help"], "--help"),
                         (["--prompt=--json"], "--json"), (["--prompt", "-q"], "-q"),
                         (["-p", "--"], "--"), (["--prompt=a=b"], "a=b"), (["-p=x"], "=x"),
                         (["--prompt=a_b-c"], "a_b-c"), (["--prompt="], ""), (["-p", ""], ""),
                         (["-p", "-"], "-"),
                         (["--prompt", "--max_new_tokens=9"], "--max_new_tokens=9"),
                         (["-p", "-p", "--"], "-p")]:
        expect(kl3m("-n0", *args).out.decode(), prompt + "\n", args)


@test("an option that is none is told the one that is nearest, if one is near")
def nearest_option():
    for said, meant in [("--tempature", "--temperature"), ("--temp", "--temperature"),
                        ("--maxnewtokens=3", "--max-new-tokens"), ("--jsnol", "--json"),
                        ("--no-ecco", "--no-echo"), ("--shcema", "--schema")]:
        done = run_kl3m(said)
        assert done.code == 2 and " is no option, %s is" % meant in done.err, (said, done.err)
    for said in ("--xyzzy", "--" + 100 * "a", "--q"):
        done = run_kl3m(said)
        assert done.code == 2 and "is no option; kl3m" in done.err, (said, done.err)


@test("--help and --version go to standard output, fit 80 columns and need no model")
def help_and_version():
    for name in ("-h", "--help"):
        done = run_kl3m(name, env={"KL3M_MODEL": "/nowhere"})
        expect((done.code, done.err), (0, ""))
        for line in done.text.split("\n"):
            assert len(line) <= 80 and line == line.rstrip() and "\t" not in line, repr(line)
        for option in ("-m --model -p --prompt --no-escape -f --file -0 --null -n --max-new-tokens "
                       "-t --temperature -k --top-k --top-p --min-p --repetition-penalty -r "
                       "--num-return-sequences -s --seed --stop --ignore-eos --no-echo --truncate "
                       "--no-special --json -j --threads -b --batch --rows --tokenize "
                       "--detokenize --logits --info --verify -q -v -h --help --version").split():
            assert says(done.text, option), "no %s in --help" % option
        for default in ("128", "0.3", "50", "9007199254740991"):
            assert (says(done.text, default) or default == "9007199254740991"
                    and "2^53" in done.text), default
    done = run_kl3m("--version")
    expect((done.code, done.err, done.text.count("\n")), (0, "", 1))
    assert "kl3m" in done.text and re.search(r"\d", done.text), done.text


# ---- Prompts in -------------------------------------------------------------------------------

ESCAPES = [  # as written, what it stands for
    (rb"\n\t\r\\\"\0", b"\n\t\r\\\"\0"), (rb"\x41\x7e\x7E\x0a", b"A~~\n"),
    (rb"\u0041\u00e9\u20AC", "Aé€".encode()), (rb"\xc3\xa9\xff\x00", b"\xc3\xa9\xff\0"),
    (rb"\ud83d\ude00\uD83D\uDE00", "😀😀".encode()), (rb"\u0000", b"\0"), (rb"\00", b"\x000"),
    (rb"\\n", rb"\n"), (rb"\\\n", b"\\\n"), (rb"\\\\", rb"\\"), (rb"C:\Users", rb"C:\Users"),
    (b"\\", b"\\"), (rb"\q\X41\N\'\1\ ", rb"\q\X41\N\'\1" + b"\\ "), (rb"\x", rb"\x"),
    (rb"\x4", rb"\x4"), (rb"\xg1\x1g", rb"\xg1\x1g"), (rb"\u", rb"\u"), (rb"\u12", rb"\u12"),
    (rb"\u12g4", rb"\u12g4"), (rb"\ud83d", rb"\ud83d"), (rb"\ude00", rb"\ude00"),
    (rb"\ud83dx", rb"\ud83dx"), (rb"\ud83d\n", b"\\ud83d\n"), (rb"\ud83d\u0041", rb"\ud83dA"),
    (rb"\ud83d\ud83d\ude00", r"\ud83d😀".encode()), (rb"\ude00\ud83d", rb"\ude00\ud83d"),
]


@test("escapes in prompts are decoded, bad ones and those after --no-escape stay, and files are "
      "taken as they are")
def escapes_in_prompts():
    written = b"\n".join(a for a, _ in ESCAPES)
    expect(kl3m("-n0", input=written).out.split(b"\n"), [escape(b) for _, b in ESCAPES] + [b""])
    expect(kl3m("-n0", "--no-escape", input=written).out.split(b"\n"),
           [escape(a) for a, _ in ESCAPES] + [b""])
    path = tmpdir() / "prompt"
    for a, b in ESCAPES:
        expect(kl3m("-n0", "-p", a).out, b + b"\n", a)
        expect(kl3m("-n0", "-p", a, "--no-escape").out, a + b"\n", a)
    for text in (written, b"", b"\n", b"a\r\nb\r\n\n", bytes(range(256)) * 2):
        path.write_bytes(text)
        expect(kl3m("-n0", "-f", path).out, text + b"\n")
        expect(kl3m("-n0", "-f", "-", input=text).out, text + b"\n")
        expect(kl3m("-n0", "-f", path, "-r2").out, (escape(text) + b"\n") * 2)
        if b"\0" not in text:
            expect(kl3m("-n0", "-0", input=text + b"\0" + text + b"\0").out,
                   text + b"\0" + text + b"\0")


@test("a newline or its return and newline ends a line, the last may lack it, and any other "
      "byte is kept")
def ends_of_lines():
    for given, texts in [(b"", []), (b"\n", [b""]), (b"\n\na", [b"", b"", b"a"]),
                         (b"a\r\nb\n", [b"a", b"b"]), (b"a\rb\r\r\n\r\n", [b"a\\rb\\r", b""]),
                         (b"a\0b\n\0", [b"a\\0b", b"\\0"]),
                         (b"\xff\xfe\n\xe2\x82", [b"\xff\xfe", b"\xe2\x82"]),
                         (b" a  \n\ta\n", [b" a  ", b"\\ta"]),
                         ("a\ufeff\u2028b\x0b\x0c\x85\n".encode(),
                          ["a\ufeff\u2028b\x0b\x0c\x85".encode()])]:
        expect(kl3m("-n0", input=given).out, b"".join(text + b"\n" for text in texts), given)


@test("a line of a megabyte among others is refused and its place is kept")
def megabyte_line():
    for length in (10 ** 6, 2 ** 20):
        given = b"Q\n" + b"Q" * length + b"\nQ\n"
        done = kl3m("-n0", input=given, code=3)
        expect(done.out, b"Q\n\nQ\n")
        assert (says(done.err, "line 2") and says(done.err, str(length))
                and says(done.err, str(CONTEXT))), done.err
        expect(done.err.count("\n"), 1)
        got = [json.loads(line)
               for line in kl3m("-n0", "--json", input=given, code=3).out.split(b"\n")[:-1]]
        expect([sorted(o) == ["error", "prompt"] for o in got], [False, True, False])
        expect(len(got[1]["prompt"]), length)


@test("what cannot be read is status 1 with its name: a prompt file, a directory, standard input")
def unreadable_sources():
    for args in (["-f", "/nowhere/prompt"], ["-f", tmpdir()]):
        check_error(run_kl3m("-m", model(), *args), 1, str(args[1]))
    place = os.open("/", os.O_RDONLY)
    done = subprocess.run([str(KL3M), "-m", str(model())], stdin=place, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    os.close(place)
    expect((done.returncode, done.stdout), (1, b""))
    expect(done.stderr.count(b"\n"), 1, done.stderr)


# ---- Standard output and standard error -------------------------------------------------------

@test("-v adds to standard error alone, -q leaves only errors there")
def verbose_and_quiet():
    for args in (["-p", "Q"], ["-p", "Q", "--json"], ["-p", "Q", "-r2"], ["--tokenize", "-p", "Q"]):
        plain = kl3m("-s7", *args)
        loud, quiet = kl3m("-s7", "-v", *args), kl3m("-s7", "-q", *args)
        expect((loud.out, quiet.out, quiet.err), (plain.out, plain.out, ""), args)
    loud = kl3m("-s7", "-v", "-p", "Q")
    assert (re.search(r"seed\D*7\b", loud.err)
            and re.search(r"\d", loud.err.replace("7", ""))), loud.err
    assert says(kl3m("-q", "-n0", input=b"Q" * 5000 + b"\n", code=3).err, "line 1")
    check_error(run_kl3m("-q", "-m", "/nowhere.bin", "-p", "Q"), 1, "/nowhere.bin")


@test("on a terminal control characters in lines are shown as escapes")
def control_characters_on_a_terminal():
    ours, theirs = pty.openpty()
    subprocess.run([str(KL3M), "-m", str(model()), "-n0"], input=b"a\x1b[2Jb\x07\x7f\xc3\xa9\nc\n",
                   stdout=theirs, timeout=PATIENCE)
    os.close(theirs)
    got = b""
    try:
        while got.count(b"\n") < 2 and select.select([ours], [], [], 5)[0]:
            got += os.read(ours, 1000)
    finally:
        os.close(ours)
    assert re.fullmatch(rb"a\\(x|u00)1[bB]\[2Jb\\(x|u00)07\\(x|u00)7[fF]\xc3\xa9\r\nc\r\n",
                        got), got
    expect(kl3m("-n0", input=b"a\x1b\x07\n").out, b"a\x1b\x07\n", "elsewhere they stay")


@test("a reader that closes the pipe ends the program quietly, as SIGPIPE does")
def closed_pipe():
    lines = b"Q\n" * 2000
    for args in (["-n0"], ["-n0", "--json"], ["-n0", "-v"], ["-n20", "--ignore-eos"],
                 ["--tokenize"], ["-p", "Q"], ["--help"], ["--info"]):
        # SIGPIPE as it is by default, or ignored as under some parents.
        for restore in (True, False):
            reader, writer = os.pipe()
            os.close(reader)
            done = subprocess.run([str(KL3M), "-m", str(model()), *args],
                                  input=lines, stdout=writer, stderr=subprocess.PIPE,
                                  restore_signals=restore, timeout=PATIENCE)
            os.close(writer)
            assert done.returncode in (-signal.SIGPIPE, 141), (args, done.returncode, done.stderr)
            if "-v" not in args:
                expect(done.stderr, b"", args)
    # A reader that has had enough: the rest is not computed.
    child = start("-n", 300, "--ignore-eos", input=b"Q\n" * 5000)
    child.stdout.close()
    assert child.wait(timeout=PATIENCE) in (-signal.SIGPIPE, 141)


@test("a full disk is status 1 with a message, and leaves nothing half-written")
def full_disk():
    if not os.path.exists("/dev/full"):
        raise Skip("this system has no /dev/full")
    for args in (["-p", "Q"], ["-n0"], ["-n0", "-0"], ["--json", "-p", "Q"],
                 ["--tokenize", "-p", "Q"], ["--detokenize"], ["--help"], ["--version"],
                 ["--info"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([str(KL3M), "-m", str(model()), *args], input=b"300\n",
                                  stdout=full, stderr=subprocess.PIPE, timeout=PATIENCE)
        expect(done.returncode, 1, args)
        expect(done.stderr.count(b"\n"), 1, args)
    for place, limit in (("/nowhere/logits", None), (str(tmpdir()), None),
                         (str(tmpdir() / "logits"), 1000)):
        def small_files():
            # So that writing past the limit is an error.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        done = subprocess.run([str(KL3M), "-m", str(model()), "-p", "QQ", "--logits", place],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              preexec_fn=small_files if limit else None, timeout=PATIENCE)
        expect((done.returncode, done.stdout), (1, b""), place)
        assert place.encode() in done.stderr and done.stderr.count(b"\n") == 1, done.stderr
        if limit:
            expect(os.listdir(os.path.dirname(place)), [])
    place = tmpdir() / "logits"
    kl3m("-p", "Q" * 5000, "--logits", place, code=3)
    expect(list(place.parent.iterdir()), [], "a prompt that cannot be run leaves no file")


# ---- Signals ----------------------------------------------------------------------------------

def start(*args, input=None):
    """The program at work; its standard input holds `input`, or stays open and empty."""
    child = subprocess.Popen([str(KL3M), "-m", str(model()), *map(str, args)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if input is not None:
        child.stdin.write(input)
        child.stdin.close()
        child.stdin = None
        select.select([child.stdout], [], [], 1)  # it has begun to print, or has had the time
    until_it_catches(child)
    return child


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@test("Ctrl-C ends with 130 and SIGTERM with 143, after what is finished was printed whole")
def interrupted():
    args = ["-n", 1500, "--ignore-eos", "-s", 5, "-t1"]
    first = kl3m(*args, input=b"Q\n").out
    for number, status in STATUS.items():
        child = start(*args, input=b"Q\n" * 2000)
        child.send_signal(number)
        out, err = child.communicate(timeout=PATIENCE)
        expect(child.returncode, status, err)
        lines = out.split(b"\n")
        expect(lines.pop(), b"", "the last line is whole")
        assert len(lines) < 2000 and set(lines) <= {first[:-1]}, (len(lines), lines[-1:])
        # A streaming text stops where it is, at a whole character.
        child = start("-p", "Q", *args, "-n", CONTEXT, input=b"")
        child.send_signal(number)
        out, err = child.communicate(timeout=PATIENCE)
        expect(child.returncode, status, err)
        assert out.startswith(b"Q"), out[:20]
        # Waiting for a prompt is left at once.
        child = start()
        child.send_signal(number)
        expect(child.wait(timeout=PATIENCE), status)


@test("a second Ctrl-C ends the program at once, though nobody reads what it has finished")
def second_interrupt():
    if b"__tsan_init" in KL3M.read_bytes():
        raise Skip("ThreadSanitizer holds a signal back until the write that waits has returned")
    page = 4096        # less than the texts that are finished at once

    def fill(pipe):
        """Bytes in it that nobody has read yet."""
        found = bytearray(4)
        fcntl.ioctl(pipe, termios.FIONREAD, found)
        return int.from_bytes(found, sys.byteorder)

    for number, status in STATUS.items():
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, page)
        child = subprocess.Popen([str(KL3M), "-m", str(model()), "-n", "60", "--ignore-eos", "-r",
                                  "100000", "-p", "Q"], stdout=theirs)
        os.close(theirs)
        until(lambda: fill(ours) > page - 600)     # what does not fit whole waits
        child.send_signal(number)
        time.sleep(0.3)
        assert child.poll() is None, "it waits for its reader"
        child.send_signal(number)
        expect(child.wait(timeout=PATIENCE), status)
        os.close(ours)


# ---- Model files ------------------------------------------------------------------------------

TABLE, ENTRY = 64, 96   # where the section table starts, the bytes of an entry


class File:
    """A model file's bytes, to spoil."""

    def __init__(self):
        self.data = bytearray(small_model().read_bytes())
        self.count = struct.unpack_from("<I", self.data, 12)[0]
        self.sections = {}   # name: (place of the entry, offset, size)
        for at in range(TABLE, TABLE + ENTRY * self.count, ENTRY):
            name = self.data[at:at + 56].split(b"\0")[0].decode()
            self.sections[name] = (at, *struct.unpack_from("<QQ", self.data, at + 64))

    def put(self, form, at, value):
        struct.pack_into("<" + form, self.data, at, value)
        return self

    def sign(self, section=None):
        """Makes the checksums right again, so that what is behind them is tested."""
        if section:
            at, offset, size = self.sections[section]
            self.put("I", at + 60, zlib.crc32(self.data[offset:offset + size]))
        table = self.data[TABLE:TABLE + ENTRY * self.count]
        return self.put("I", 24, zlib.crc32(table, zlib.crc32(self.data[:24])))

    def run(self, *args):
        path = tmpdir() / "spoilt.bin"
        path.write_bytes(self.data)
        done = run_kl3m("-m", path, *(args or ["-p", "This Agreement", "-n3", "-t0"]))
        path.unlink()
        if done.code == 1:
            assert ("spoilt.bin" in done.err and done.err.count("\n") == 1
                    and done.err.endswith("\n")), done.err
        return done


@test("a model that is missing, not a file, cut short or something else is status 1 with one line "
      "that says so")
def not_a_model():
    for path in ("/nowhere/model.bin", str(tmpdir()), "/dev/null",
                 small_directory() / "model.safetensors", small_directory() / "tokenizer.json"):
        check_error(run_kl3m("-m", path, "-p", "Q"), 1, str(path))
    whole = File()
    size, draw = len(whole.data), random.Random(1)
    ends = {0, 1, 7, 8, 9, 12, 16, 24, 28, 63, 64, 65, 160, 1000, size - 1, size - 64, size // 2,
            *(offset for _, offset, _ in whole.sections.values()),
            *(draw.randrange(size) for _ in range(20))}
    for end in ends:
        cut = File()
        del cut.data[end:]
        for args in (["-p", "Q"], ["--tokenize", "-p", "Q"], ["--info"], ["--verify"]):
            expect(cut.run(*args).code, 1, "%d bytes of %d, %s" % (end, size, args))
    longer = File()
    longer.data += bytes(64)
    expect(longer.run().code, 1)
    for args in ([], ["--verify"]):
        done = File().put("B", 3, ord("m")).sign().run(*args, "-p", "Q")
        check_error(done, 1, "spoilt.bin")
    for version in (0, 3, 99, 2 ** 32 - 1):
        for file in (File().put("I", 8, version), File().put("I", 8, version).sign()):
            check_error(file.run(), 1, "version", "export")


@test("a model file with any byte of its header or directory changed is refused, or gives "
      "what it gave")
def changed_header():
    draw, want = random.Random(2), File().run().out
    end = TABLE + ENTRY * File().count
    for at in [*range(64), *(draw.randrange(64, end) for _ in range(60))]:
        file = File()
        done = file.put("B", at, file.data[at] ^ 1 << draw.randrange(8)).run()
        if 28 <= at < 64:  # bytes without a meaning
            assert done.code == 1 or done.out == want, at
        else:
            expect(done.code, 1, "byte %d" % at)


@test("a model file whose checksums are right and whose numbers are wrong is refused and never "
      "crashes the program")
def wrong_numbers_right_checksums():
    draw = random.Random(3)
    huge = [0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1]
    some = list(File().sections)[:6]
    cases = ([("I", 12, n) for n in huge]
             + [("Q", 16, n) for n in huge + [2 ** 63, 2 ** 64 - 1, 2 ** 64 - 64]])
    for name in some:
        at = File().sections[name][0]
        cases += [("I", at + field, n) for field in (56, 80, 84, 88) for n in huge + [2, 3, 9]]
        cases += [("Q", at + field, n) for field in (64, 72)
                  for n in huge + [64, 2 ** 63, 2 ** 64 - 64, 2 ** 64 - 1]]
        cases += [("B", at, 0), ("B", at, ord("X")), ("B", at + 55, ord("X"))]
    for form, place, n in cases:
        assert File().put(form, place, n).sign().run().code in (0, 1), (form, place, n)
    end = TABLE + ENTRY * File().count
    for _ in range(60):
        place = draw.randrange(12, end)
        assert File().put("B", place, draw.randrange(256)).sign().run().code in (0, 1), place

    config = File().sections["config"][1]
    for field in range(12):
        # Field 8 is the context.
        for n in (0, 1, 3, 47, 100000) + ((2 ** 31, 2 ** 32 - 1) if field != 8 else ()):
            code = File().put("I", config + 4 * field, n).sign("config").run().code
            # A small context has no room.
            assert code in (0, 1) or code == 3 and field == 8, (field, n)
    for field in (0, 1, 2, 3, 4, 6, 7):  # these decide the shapes of tensors
        expect(File().put("I", config + 4 * field, 0).sign("config").run().code, 1,
               "field %d" % field)
    for at in (48, 56):
        for x in (0.0, -1.0, float("inf"), float("nan")):
            assert File().put("d", config + at, x).sign("config").run().code in (0, 1), (at, x)


    for at in range(64, 128, 4):    # the start token, the number of end tokens, these, normalizer
        for n in (0, 1, 8, 9, 511, 520, 2 ** 31, 2 ** 32 - 2, 2 ** 32 - 1):
            code = File().put("I", config + at, n).sign("config").run().code
            assert code in (0, 1), (at, n)
    expect(File().put("I", config + 68, 8).sign("config").run().code, 0)
    for at, n in ((64, 520), (68, 9), (72, 2 ** 32 - 1), (104, 1)):
        spoilt = File().put("I", config + 68, 8).put("I", config + at, n).sign("config")
        expect(spoilt.run().code, 1, at)
    check_error(File().put("I", config + 104, 1).sign("config").run(), 1, "normalizer", "newer")


@test("a file of version 1 of the format is read as one of version 2 that names the same tokens")
def version_1():
    old = File()
    place = old.sections["config"][0]
    old.put("I", 8, 1).put("Q", place + 72, 64)
    old.sections["config"] = (place, old.sections["config"][1], 64)
    path, learnt = tmpdir() / "old.bin", tmpdir() / "learnt.bin"
    path.write_bytes(old.sign("config").data)
    args = ["-s", 1, "-n", 30, "-t", 1, "--json", "-r", 3]
    for text in (b"The State\n", b"\n"):
        want = run_kl3m("-m", small_model(), *args, input=text)
        got = run_kl3m("-m", path, *args, input=text)
        expect((got.code, got.out), (0, want.out), got.err)
    assert "version 1," in run_kl3m("-m", path, "--info").text
    expect(run_kl3m("-m", path, "--verify").code, 0)
    done = run_kl3m("-m", path, "--learn", "-o", learnt, "--tokens", 50, "-n", 20, "-s", 1)
    expect(done.code, 0, done.err)
    assert "version 2," in run_kl3m("-m", learnt, "--info").text
    expect(run_kl3m("-m", learnt, "--verify").code, 0)
    expect(run_kl3m("-m", learnt, *args, input=b"\n").out,
           run_kl3m("-m", small_model(), *args, input=b"\n").out)


@test("a model file with a spoilt tokenizer never crashes the program")
def spoilt_tokenizer():
    draw, place = random.Random(4), File().sections["tokenizer"]
    for n in range(80):
        at = place[1] + draw.randrange(64 if n < 30 else place[2])
        file = File().put("B", at, draw.randrange(256))
        for args in (["--tokenize", "-p", "This Agreement shall be <|end|> governed (a)"], []):
            assert file.run(*args).code in (0, 1, 3), (at, args)
    for field in range(7):
        for n in (0, 1, 3, 2 ** 31, 2 ** 32 - 1):
            assert File().put("I", place[1] + 8 + 4 * field,
                              n).sign("tokenizer").run().code in (0, 1, 3), (field, n)


@test("--verify finds one changed bit anywhere in the file and names the section")
def verify_finds_one_bit():
    expect(File().run("--verify").code, 0)
    draw, sections = random.Random(5), File().sections
    for name, (_, offset, size) in sections.items():
        file = File()
        at = offset + draw.randrange(size)
        done = file.put("B", at, file.data[at] ^ 1 << draw.randrange(8)).run("--verify")
        expect(done.code, 1, "byte %d, in %s" % (at, name))
        if name not in ("config", "tokenizer"):  # those may be found wrong in other words
            assert says(done.err, name), "%s is not in %r" % (name, done.err)


@test("--info shows what the model file says about itself, and its shape")
def info_shows_the_file():
    _, offset, size = File().sections["about"]
    done = run_kl3m("-m", small_model(), "--info")
    expect((done.code, done.err), (0, ""))
    for line in File().data[offset:offset + size].decode().splitlines():
        key, value = line.split("\t")
        assert value in done.text, "%s: %r is not in --info" % (key, value)
    # Hidden, layers, heads, intermediate, vocabulary, context.
    for number in (48, 2, 4, 80, 520, 128):
        assert says(done.text, str(number)), "no %d in %s" % (number, done.text)


@test("the model is -m's, else KL3M_MODEL's, else the first of the places where it is looked for")
def where_the_model_is_looked_for():
    home, good = tmpdir(), small_model()
    program = home / "bin" / "kl3m"
    places = [home / "here", home / "data" / "kl3m", home / "bin", home / "share" / "kl3m"]
    for place in places:
        place.mkdir(parents=True)
    shutil.copy(KL3M, program)
    bad = home / "empty.bin"
    bad.touch()

    def run(*args, **env):
        env = {"HOME": str(home / "home"), "XDG_DATA_HOME": str(home / "data"), **env}
        return run_kl3m("-p", "Q", "-n0", *args, program=program, cwd=home / "here", env=env)
    if run().code == 0:
        raise Skip("a model is installed on this system")
    none = run()
    expect((none.code, none.out), (1, b""))
    assert "kl3m-002-170m.bin" in none.err and "make model" in none.err, none.err
    for last in reversed(places):  # each place comes before those that were filled earlier
        file = last / "kl3m-002-170m.bin"
        shutil.copy(bad, file)
        expect(run().code, 1, last)
        expect(run("-m", good).code, 0)
        expect(run(KL3M_MODEL=str(good)).code, 0)
        shutil.copy(good, file)
        expect(run().out, b"Q\n", last)
        expect(run(KL3M_MODEL=str(bad)).code, 1)
        check_error(run("-m", "/nowhere.bin"), 1, "/nowhere.bin")
        check_error(run(KL3M_MODEL="/nowhere.bin"), 1, "/nowhere.bin")
        expect(run("-m", good, KL3M_MODEL=str(bad)).code, 0)
        shutil.copy(bad, file)
    for place in places:
        (place / "kl3m-002-170m.bin").unlink()
    shared = home / "home" / ".local" / "share" / "kl3m"
    shared.mkdir(parents=True)
    shutil.copy(good, shared / "kl3m-002-170m.bin")
    expect(run(XDG_DATA_HOME=None).out, b"Q\n")


@test("-j starts no more threads than there are CPUs to use, and -v says so")
def no_more_threads_than_cpus():
    if not hasattr(os, "sched_setaffinity"):
        raise Skip("this system has no affinity")
    given = ["-p", "Q", "-n", 2, "-s", 1, "-v"]
    everywhere = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(everywhere)])
        many, one = kl3m("-j", 64, *given), kl3m("-j", 1, *given)
    finally:
        os.sched_setaffinity(0, everywhere)
    expect(many.out, one.out)
    assert "-j 64: 1 threads" in many.err and re.search(r", 1 threads$", many.err, re.M), many.err
    assert "-j 1:" not in one.err, one.err


@test("no core is kept busy while the program waits for a prompt")
def idle_while_waiting():
    child = subprocess.Popen([str(KL3M), "-m", str(model()), "-n2", "-j", "4"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(b"Q\n")
    child.stdin.flush()
    child.stdout.readline()   # answered at once, though the input has not ended
    time.sleep(1)
    child.stdin.close()
    _, status, used = os.wait4(child.pid, 0)
    child.stdout.close()
    assert status == 0 and used.ru_utime + used.ru_stime < 0.5, (status, used)


@test("the lines of -r come out as they are finished, and Ctrl-C loses none of them")
def continuations_come_as_they_finish():
    child = start("-r", 100000, "-n", 20, "--ignore-eos", "-s", 1, "-p", "Q")
    first = child.stdout.readline()
    child.send_signal(signal.SIGINT)
    rest = child.stdout.read()
    expect(child.wait(timeout=PATIENCE), 130)
    whole = kl3m("-r", 40, "-n", 20, "--ignore-eos", "-s", 1, "-p", "Q").out.split(b"\n")[:-1]
    lines = (first + rest).split(b"\n")
    expect(lines.pop(), b"", "the last line is whole")
    # An unfinished continuation before a finished one leaves its place empty.
    for number, (got, want) in enumerate(zip(lines, whole)):
        assert got in (want, b""), (number, got, want)
    assert lines[0] == whole[0] and lines[-1] != b"", lines[-3:]
