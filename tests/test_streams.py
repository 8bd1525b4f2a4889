"""Descriptors and files as other programs hand them over: closed, non-blocking, pipes, links,
limits."""
import fcntl
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
import zlib

from harness import (KL3M, PATIENCE, Skip, expect, run, run_kl3m, small_model, test, tmpdir,
                     until, until_it_catches)

MARK = b"\xef\xbb\xbf"


def shell(command, *words, **more):
    """Runs a line of the shell, in which "$@" is the program with the model and these options."""
    more.setdefault("timeout", 20)
    return subprocess.run(["sh", "-c", command, "sh", str(KL3M), "-m", str(small_model()),
                           *map(str, words)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **more)


def fails(done, *words):
    """Status 1, nothing printed, one line of message with these words."""
    expect((done.returncode, done.stdout), (1, b""), done.stderr)
    expect(done.stderr.count(b"\n"), 1, done.stderr)
    for word in words:
        assert word in done.stderr, (word, done.stderr)


# ---- Closed streams -----------------------------------------------------------------------------

@test("a closed standard input is status 1 with a message if it is to be read, and no "
      "matter if not")
def closed_input():
    for args in ([], ["--tokenize"], ["--detokenize"], ["--jsonl"], ["-f", "-"], ["-0"],
                 ["--logits", "/dev/null"]):
        fails(shell('"$@" <&-', "-n4", *args), b"standard input" if args != ["-f", "-"] else b"-")
    for args in (["-p", "x"], ["--tokenize", "-p", "x"]):
        want = shell('"$@"', "-n4", "-t0", *args)
        got = shell('"$@" <&-', "-n4", "-t0", *args)
        expect((got.returncode, got.stdout), (0, want.stdout), args)


@test("a closed standard output or standard error is status 1, and what it would have got goes "
      "nowhere else")
def closed_output():
    for args in (["-p", "x"], ["-p", "x", "--json"], ["--tokenize", "-p", "x"], ["--help"],
                 ["--version"], ["--info"], ["--verify"]):
        for closed in (">&-", "<&- >&-"):
            fails(shell('"$@" ' + closed, "-n4", *args), b"standard output")
    # No file may be given the number of a closed stream: what is written there would land in it.
    place = tmpdir()
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        logits = place / "logits"
        expect(shell('"$@" ' + closed, "-p", "xy", "-v", "--logits", logits).returncode, 0)
        expect(logits.stat().st_size % (520 * 4), 0, closed)
        logits.unlink()
    expect(shell('"$@" 2>&-', "-n4", "-p", "x").returncode, 0)
    expect(shell('"$@" 2>&-', "-n4", "-p", "x", "-v").returncode, 1,
           "figures were asked for and have no place")
    expect(shell('"$@" 2>&-', "-n4", "--nothing").returncode, 2)


# ---- Streams that do not block ------------------------------------------------------------------

def read_slowly(reader):
    data = b""
    while True:
        part = os.read(reader, 4096)
        if not part:
            return data
        data += part
        time.sleep(0.002)


@test("an output that does not block is waited for, standard error too: all arrives")
def unblocking_output():
    # Pipes of one page, so that they are full at once, and a reader who sleeps before and in
    # between.
    lines = "".join("This Agreement number %d\n" % i for i in range(200)).encode() * 5
    broken = b"Q" * 5000 + b"\n"
    for args, given, stream in ((["-n0"], lines, 1), (["--tokenize"], lines, 1),
                                (["-n0", "--json"], lines, 1),
                                (["--detokenize"], b"300 301 302\n" * 4000, 1),
                                (["-n1"], broken * 60, 2),
                                (["-p", "Q" * 30000, "-n0", "--truncate", "left"], b"", 1)):
        want = run_kl3m("-m", small_model(), "-s1", *args, input=given)
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(writer, False)
        source = tmpdir() / "lines"
        source.write_bytes(given)
        with open(source, "rb") as stdin:
            child = subprocess.Popen([str(KL3M), "-m", str(small_model()), "-s1", *args],
                                     stdin=stdin,
                                     stdout=writer if stream == 1 else subprocess.DEVNULL,
                                     stderr=writer if stream == 2 else subprocess.DEVNULL)
        os.close(writer)
        time.sleep(0.1)
        got = read_slowly(reader)
        os.close(reader)
        expect(child.wait(timeout=PATIENCE), want.code, args)
        expect(got.decode(), want.text if stream == 1 else want.err, args)


@test("an input that does not block is waited for: lines, -f and records that come in pieces")
def unblocking_input():
    for args in (["-n0"], ["-n0", "-f", "-"], ["-n0", "-0"]):
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        child = subprocess.Popen([str(KL3M), "-m", str(small_model()), *args], stdin=reader,
                                 stdout=subprocess.PIPE)
        os.close(reader)
        for part in (b"The ", b"State", b" of"):
            time.sleep(0.05)
            os.write(writer, part)
        os.close(writer)
        out, _ = child.communicate(timeout=PATIENCE)
        expect((child.returncode, out),
               (0, b"The State of" + (b"\0" if "-0" in args else b"\n")), args)


# ---- Files that are written ---------------------------------------------------------------------

def leftovers(place, *known):
    return sorted(set(os.listdir(place)) - set(known))


@test("two programs that write one file at once leave one whole file, though their process ids "
      "are the same")
def same_process_id():
    if run(["unshare", "--pid", "--fork", "true"]).code:
        raise Skip("this system lets us make no namespace of processes")
    place = tmpdir()
    want = run_kl3m("-m", small_model(), "-p", "The State of Delaware", "--logits", place / "want")
    expect(want.code, 0, want.err)
    for _ in range(3):
        command = ["unshare", "--pid", "--fork", str(KL3M), "-m", str(small_model()), "-p",
                   "The State of Delaware", "--rows", "1", "--logits", str(place / "out")]
        both = [subprocess.Popen(command) for _ in range(2)]
        expect([child.wait(timeout=PATIENCE) for child in both], [0, 0])
        expect((place / "out").read_bytes(), (place / "want").read_bytes())
    expect(leftovers(place, "want"), ["out"])
    # Meanwhile each has a file of its own.
    command = ["unshare", "--pid", "--fork", str(KL3M), "-m", str(small_model()), "--learn",
               "--tokens", "60000", "-s", "1", "-q", "-o", str(place / "learnt")]
    both = [subprocess.Popen(command) for _ in range(2)]
    most = 0
    while any(child.poll() is None for child in both):
        most = max(most, len(leftovers(place, "want", "out", "learnt")))
        time.sleep(0.01)
    expect(([child.returncode for child in both], most), ([0, 0], 2))
    expect(leftovers(place, "want", "out"), ["learnt"])
    expect(run_kl3m("-m", place / "learnt", "--verify").code, 0)


@test("what ends the program while it writes a file leaves nothing of it: signals, a reader that "
      "goes, a full file")
def nothing_stays():
    place = tmpdir()
    model = place / "model.bin"
    shutil.copy(small_model(), model)
    out = place / "out.bin"
    learn = [str(KL3M), "-m", str(model), "--learn", "--tokens", "100000000", "-o", str(out)]
    for number in (signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
                   signal.SIGVTALRM, signal.SIGPROF, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        def as_usual():   # whoever runs the tests may ignore signals: nohup does
            signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        child = subprocess.Popen(learn, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 preexec_fn=as_usual)
        until(lambda: [name for name in leftovers(place, "model.bin") if name.endswith(".part")])
        child.send_signal(number)
        out_text, err = child.communicate(timeout=PATIENCE)
        stops = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
        expect((child.returncode, out_text), (stops.get(number, -number), b""), (number, err))
        expect(leftovers(place, "model.bin"), [], number)
    # Nobody reads what it will say.
    done = shell('"$@" | true', "--learn", "--tokens", 100000000, "-o", out)
    expect(leftovers(place, "model.bin"), [])
    done = shell('ulimit -f 4; "$@"', "--learn", "--tokens", 10, "-o", out)
    fails(done, b"out.bin", b"too large")
    expect(leftovers(place, "model.bin"), [])
    done = shell('ulimit -f 1; "$@"', "-p", "The State", "--logits", place / "logits")
    fails(done, b"logits", b"too large")
    expect(leftovers(place, "model.bin"), [])


@test("a file that is replaced keeps its rights, links are followed to where they lead, also to "
      "what is not there yet")
def links_and_rights():
    place = tmpdir()
    (place / "deep").mkdir()
    write = ["-m", small_model(), "-p", "xy", "--logits"]
    for before in (0o600, 0o644, 0o400, 0o660):
        old = place / "old"
        old.write_bytes(b"x")
        old.chmod(before)
        expect(run_kl3m(*write, old).code, 0)
        expect(old.stat().st_mode & 0o777, before)
        assert old.stat().st_size > 1
        old.unlink()
    (place / "relative").symlink_to("deep/target")
    (place / "absolute").symlink_to(place / "relative")
    for _ in range(2):   # the second time there is a file
        expect(run_kl3m(*write, place / "absolute").code, 0)
        assert (place / "absolute").is_symlink() and (place / "relative").is_symlink()
        assert (not (place / "deep/target").is_symlink()
                and (place / "deep/target").stat().st_size > 1)
    (place / "round").symlink_to("round")
    done = run_kl3m(*write, place / "round")
    expect(done.code, 1)
    assert "round" in done.err and done.err.count("\n") == 1, done.err
    learnt = place / "learnt"
    learnt.symlink_to("deep/model.bin")
    done = run_kl3m("-m", small_model(), "--learn", "--tokens", 10, "-o", learnt)
    expect(done.code, 0, done.err)
    assert learnt.is_symlink() and (place / "deep/model.bin").stat().st_size > 1
    long_name = place / ("n" * 250)   # nearly the longest that there may be
    expect(run_kl3m(*write, long_name).code, 0)


# ---- Named pipes --------------------------------------------------------------------------------

@test("a named pipe as the model is refused at once; one that is read or written waits, and "
      "Ctrl-C ends that")
def named_pipes():
    place = tmpdir()
    pipe = place / "pipe"
    os.mkfifo(pipe)
    done = run_kl3m("-m", pipe, "-p", "x")
    expect(done.code, 1)
    assert "pipe" in done.err and "regular" in done.err, done.err
    model = ["-m", str(small_model())]
    for args in (["-f"], ["--detokenize", "-f"], ["--tokenize", "-f"], ["-p", "x", "--logits"],
                 ["--learn", "--tokens", "10", "-f"]):
        more = ["-o", str(place / "learnt")] if "--learn" in args else []
        child = subprocess.Popen([str(KL3M), *model, *args, str(pipe), *more],
                                 stdin=subprocess.DEVNULL)
        until_it_catches(child)
        time.sleep(0.1)
        expect(child.poll(), None, args)
        child.send_signal(signal.SIGINT)
        expect(child.wait(timeout=PATIENCE), 130, args)
    expect(leftovers(place), ["pipe"])
    # What comes through it is what a file gives.
    child = subprocess.Popen([str(KL3M), *model, "-n0", "-f", str(pipe)], stdout=subprocess.PIPE)
    time.sleep(0.1)
    with open(pipe, "wb") as writer:
        writer.write(b"The State")
    expect((child.communicate(timeout=PATIENCE)[0], child.returncode), (b"The State\n", 0))
    expect(run_kl3m(*model, "-p", "xy", "--logits", place / "logits").code, 0)
    child = subprocess.Popen([str(KL3M), *model, "-p", "xy", "--logits", str(pipe)])
    time.sleep(0.1)
    with open(pipe, "rb") as reader:
        expect(reader.read(), (place / "logits").read_bytes())
    expect(child.wait(timeout=PATIENCE), 0)


# ---- Input --------------------------------------------------------------------------------------

@test("a byte order mark at the start of standard input or of -f is no part of the text; "
      "elsewhere it is")
def byte_order_marks():
    def ids(*args, given=None):
        return run_kl3m("-m", small_model(), "--tokenize", *args, input=given).out
    text = b"The State\nof\n"
    path = tmpdir() / "text"
    for given in (text, b"x", b"", b"\n", MARK + b"x", MARK[:2], MARK[:1] + b"\n"):
        path.write_bytes(MARK + given)
        plain = tmpdir() / "plain"
        plain.write_bytes(given)
        if not given.startswith(MARK):
            expect(ids(given=MARK + given), ids(given=given), given)
            expect(ids("-f", path), ids("-f", plain), given)
            expect(ids("-0", given=MARK + given), ids("-0", given=given), given)
        else:
            expect(ids("--no-escape", given=MARK + given), ids("-p", MARK + b"x"),
                   "only one is dropped")
    expect(ids(given=b"x\n" + MARK + b"y\n").split(b"\n")[1], ids("-p", MARK + b"y")[:-1],
           "inside a file it is text")
    assert ids("-p", MARK + b"y") != ids("-p", b"y")
    record = b'{"prompt": "x"}\n'
    got = [run_kl3m("-m", small_model(), "-s1", "-n2", "--jsonl", input=mark + record * 2).out
           for mark in (MARK, b"")]
    expect(got[0], got[1])
    got = [run_kl3m("-m", small_model(), "--detokenize", input=mark + b"300\n301\n").out
           for mark in (MARK, b"")]
    expect(got[0], got[1])


@test("a record that is sound JSON keeps its members, whatever its prompt is; one that is not says "
      "what was found")
def records_keep_members():
    def result(line):
        done = run_kl3m("-m", small_model(), "-n1", "--jsonl", input=line + b"\n")
        expect(done.code, 3, line)
        return json.loads(done.out), done.err
    for prompt in (b"null", b"7", b"[1]", b'{"prompt": "x"}', b"true", b'"x", "prompt": 5'):
        for line in (b'{"id": 7, "prompt": %s, "tag": "a"}',
                     b'{"prompt": %s, "id": 7, "tag": "a"}'):
            got, err = result(line % prompt)
            expect((got.pop("id"), got.pop("tag"), got.pop("prompt")), (7, "a", None), line)
            expect(list(got), ["error"])
            found = prompt[:12].decode() if b"," not in prompt else "5"
            assert ("string" in got["error"] and "found " + found in got["error"]
                    and got["error"] in err), (got, err)
    got, err = result(b'{"id": 7, "text": "x"}')
    expect(sorted(got), ["error", "id", "prompt", "text"])
    assert "prompt" in got["error"] and "text" in got["error"], got
    for line, found in ((b'{"id": 7, "prompt" "x"}', '"x"}'), (b'{"id": 7', "end of the line"),
                        (b"7", "7"), (b'{"id": 7, "prompt": "x"} x', "x"), (b"{'id': 7}", "'id'"),
                        (b"", "end of the line"), (b'{"id": nul, "prompt": "x"}', "nul"),
                        (b'["prompt"]', '["prompt"]')):
        got, err = result(line)
        expect((sorted(got), got["prompt"]), (["error", "prompt"], None), line)
        assert re.search("byte [0-9]+ .* expected; found .*" + re.escape(found),
                         got["error"]), (line, got)
    got, err = result(b'{"id": 7, "prompt": "\xff"}')
    assert "\ufffd" in got["error"] and "\\xff" in err, (got, err)
    # So it is with a whole line of any length: what is shown of it is short, and cut between
    # characters.
    got, err = result(b"{" + "é".encode() * 50000)
    assert len(got["error"]) < 200 and "\ufffd" not in got["error"], got


# ---- Terminals ----------------------------------------------------------------------------------

def on_terminal(columns, *args, given=b""):
    """What a terminal of so many columns on standard error is sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([str(KL3M), *map(str, args)], stdin=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    child.stdin.write(given)
    child.stdin.close()
    shown = b""
    try:
        while select.select([ours], [], [], 20)[0]:
            shown += os.read(ours, 4096)
    except OSError:   # the other end is closed
        pass
    os.close(ours)
    child.wait(timeout=PATIENCE)
    return shown.decode()


@test("a line that is written over and over fits its terminal, however narrow")
def narrow_terminal():
    model = small_model(max_position_embeddings=4096)
    for columns in (7, 100):
        for args, given in ((["-n", 4000, "--ignore-eos", "-b1", "-j1", "--no-speculation"],
                             b"Q\n" * 4),
                            (["--learn", "--tokens", 30000, "-o", tmpdir() / "x"], b"")):
            shown = on_terminal(columns, "-m", model, *args, given=given)
            steps = [step for step in re.split("\r|\033\\[K|\n", shown) if step]
            assert steps, (columns, args, shown)
            assert max(map(len, steps)) < columns, (columns, args, steps)
            assert (steps[-1].startswith("kl3m: "[:columns - 1])
                    and shown.endswith("\r\033[K")), shown


@test("names from a model file or the command line reach a terminal without their "
      "control characters")
def names_are_escaped():
    evil = "\033[2Jx\x07\u009b1m\r\n"
    place = tmpdir() / ("a" + evil + ".bin")
    expect(run_kl3m("-m", small_model(), "--learn", "--tokens", 10, "-q", "-o", place).code, 0)
    data = bytearray(place.read_bytes())
    at = data.index(b"guesses\0")
    name = evil.encode()[:16]
    data[at:at + len(name)] = name
    offset, count = (struct.unpack_from("<Q", data, at + 64)[0],
                     struct.unpack_from("<I", data, 12)[0])
    data[offset] ^= 1
    struct.pack_into("<I", data, 24, zlib.crc32(data[64:64 + 96 * count], zlib.crc32(data[:24])))
    place.write_bytes(data)
    done = run_kl3m("-m", place, "--verify")
    assert "\\x1b[2Jx" in done.err, done.err
    for args in (["-m", place, "--verify"], ["-m", tmpdir() / evil, "-p", "x"], ["--" + evil],
                 ["-n", evil], [evil], ["-f", evil, "-m", small_model()],
                 ["-m", small_model(), "-p", "x", "--logits", "/nowhere/" + evil]):
        done = run_kl3m(*args)
        assert done.code in (1, 2), args
        assert done.err.endswith("\n") and done.err[:-1].isprintable(), repr(done.err)
