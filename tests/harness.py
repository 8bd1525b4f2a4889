"""What every test uses: registering tests, running the programs, temporary models.

A test is a function under @test("the sentence it shows"); it fails by raising (assert does),
and raises Skip("why") where something it needs is not there. run.py runs those of test_*.py.
"""
import atexit
import fcntl
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import models

ROOT = Path(__file__).resolve().parent.parent
KL3M = Path(os.environ.get("KL3M") or ROOT / "kl3m").resolve()
PATIENCE = 600   # seconds after which a process is taken to hang, on a machine of any speed
SHARED = ROOT.parent / "shared" if (ROOT.parent / "shared").is_dir() else None

tests = []  # (module, sentence, function), in the order in which they were met


class Skip(Exception):
    """Raised by a test that cannot run here; its text says why."""


def test(sentence):
    def register(function):
        tests.append((function.__module__, sentence, function))
        return function
    return register


def reason(error):
    """The failure in a few lines: the last place in the tests outside this file, and what."""
    place = [frame for frame in traceback.extract_tb(error.__traceback__)
             if ROOT / "tests" in Path(frame.filename).parents and frame.filename != __file__][-1]
    kind = "" if type(error) is AssertionError else type(error).__name__ + " "
    text = "%s:%d: %s%s" % (Path(place.filename).name, place.lineno, kind, str(error) or place.line)
    return "    " + text.replace("\n", "\n    ")


def selected(words, module=None):
    """The tests whose module or sentence contains one of the words; without words all. Of this
    module alone, if one is named: a module may import another one of tests."""
    return [one for one in tests if module in (None, one[0])
            and (not words or any(word in one[0] or word in one[1] for word in words))]


def closing_line(count):
    skipped = ", %d skipped" % count["skip"] if count["skip"] else ""
    return "%d passed, %d failed%s" % (count["ok"], count["FAIL"], skipped)


def run_tests(chosen):
    """Runs these tests one after the other and returns the exit status."""
    count = {"ok": 0, "FAIL": 0, "skip": 0}
    for _, sentence, function in chosen:
        start, kind, more = time.monotonic(), "ok", ""
        try:
            function()
        except Skip as why:
            kind, more = "skip", ": %s" % why
        except Exception as error:
            kind, more = "FAIL", "\n" + reason(error)
        took = time.monotonic() - start
        if kind == "ok" and took > 2:
            more = " (%.1f s)" % took
        count[kind] += 1
        print("%-4s %s%s" % (kind, sentence, more), flush=True)
    print(closing_line(count))
    return 1 if count["FAIL"] or not any(count.values()) else 0


def expect(got, want, what=""):
    """Fails where the two differ, and shows both (their beginnings, if they are long)."""
    if got != want:
        def clip(x):
            text = repr(x)
            return text if len(text) < 400 else text[:400] + "..."
        raise AssertionError("%s\n  got  %s\n  want %s" % (what, clip(got), clip(want)))


def tmpdir():
    """A fresh directory that is gone when the tests end."""
    path = Path(tempfile.mkdtemp(prefix="kl3m-test-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


class Result:
    def __init__(self, out, err, code):
        self.out = out                            # bytes: text out need not be UTF-8
        self.err = err.decode("utf-8", "replace")
        self.code = code                          # negative: the signal that ended it

    @property
    def text(self):
        return self.out.decode("utf-8")


def run(command, input=None, env=None, timeout=PATIENCE, cwd=None):
    """Runs a command. env adds to the environment; a value of None takes a name out of it."""
    full = dict(os.environ)
    full.pop("KL3M_MODEL", None)
    for name, value in (env or {}).items():
        if value is None:
            full.pop(name, None)
        else:
            full[name] = value
    command = [str(word) if isinstance(word, Path) else word for word in command]
    try:
        done = subprocess.run(command, input=b"" if input is None else input, env=full, cwd=cwd,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError("still running after %g s: %r" % (timeout, command))
    return Result(done.stdout, done.stderr, done.returncode)


def until(condition, what="it"):
    """Waits for it to come true, looking often."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what + " did not happen"
        time.sleep(0.01)


def until_it_catches(child):
    """Waits until a process has a handler for SIGTERM, and so for SIGINT, which comes before it."""
    status = Path("/proc/%d/status" % child.pid)
    if not status.exists():
        time.sleep(1)
        return
    until(lambda: int(re.search(r"SigCgt:\t(\w+)", status.read_text()).group(1), 16)
          >> (signal.SIGTERM - 1) & 1, "a handler")


def run_kl3m(*args, input=None, env=None, timeout=PATIENCE, cwd=None, program=None):
    """Runs the program (or another build of it) with these options."""
    args = [str(a) if isinstance(a, (int, float)) else a for a in args]
    return run([program or KL3M, *args], input, env, timeout, cwd)


def run_export(*args, input=None, env=None, timeout=PATIENCE, cwd=None):
    return run([sys.executable, ROOT / "export_weights.py", *args], input, env, timeout, cwd)


def export(directory, out=None, *args):
    """Exports a Hugging Face directory and returns the model file's path."""
    out = Path(out) if out else tmpdir() / "model.bin"
    done = run_export(directory, "-o", out, *args)
    assert done.code == 0, "export_weights.py ended with %d: %s" % (done.code, done.err)
    return out


@functools.lru_cache(maxsize=None)
def cache():
    """The folder of what the modules of one run share, each in its process."""
    return Path(os.environ.get("KL3M_TEST_CACHE") or tmpdir())


def once(name, make):
    """A file or folder of this name that make(path) makes the first time that any module of this
    run asks for it. One name is one file: do not change it."""
    path = cache() / name
    with open(cache() / (name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make(cache() / (name + ".new"))
            (cache() / (name + ".new")).rename(path)
    return path


def small_directory(**options):
    """A Hugging Face directory with a tiny random model; options are write_model's."""
    return once(_name("small", options), lambda path: models.write_model(path, **options))


def small_model(**options):
    """The same model, exported. One call with the same options is one file: do not change it."""
    return once(_name("small", options) + ".bin",
                lambda path: export(small_directory(**options), path))


def quantized_model(kind, **options):
    """The same model with weights of another type. Do not change it."""
    def make(path):
        done = run_kl3m("-m", small_model(**options), "--quantize", kind, "-o", path)
        assert done.code == 0, done.err
    return once(_name(kind, options) + ".bin", make)


def _name(name, options):
    return name + "-" + hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]


def tiny_model():
    """The small trained model of tests/tiny, exported as `make demo` does. Do not change it."""
    return once("demo.bin", lambda path: export(ROOT / "tests" / "tiny", path))
