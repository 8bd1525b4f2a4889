#!/usr/bin/env python3
"""Runs the tests: all of them, or those whose module or sentence contains one of the given words.

    tests/run.py [WORD...]

Each module runs in a process of its own, as many at once as this one may use CPUs and two at least;
the lines of a module come together when it has ended. A word that selects no test is a failure: a
sentence that was reworded must not leave a selection in silence.
"""
import sys

sys.dont_write_bytecode = True

import importlib
import os
import re
import signal
import subprocess
import tempfile
import time

from harness import ROOT, cache, closing_line, run_tests, selected, tests

# Those that take longest begin first: the last one begun runs alone at the end.
LONGEST = ["test_speculation", "test_readme", "test_forward", "test_faults", "test_streams",
           "test_schedule", "test_tokenizer", "test_cli"]


def load(module):
    """Imports a module of tests; one that cannot be imported counts as a test that failed."""
    try:
        importlib.import_module(module)
    except Exception as error:
        def fail(error=error):
            raise error
        tests.append((module, "%s.py can be imported" % module, fail))


def cpus():
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
               else os.cpu_count() or 1)


class Running:
    """A module's tests in a process that leads a session: so it is ended with all that it started,
    and a Ctrl-C of the terminal reaches it through this one alone."""

    def __init__(self, module, words):
        self.module, self.out = module, tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, __file__, "--module", module, *words],
                                        stdin=subprocess.DEVNULL, stdout=self.out,
                                        stderr=subprocess.STDOUT, start_new_session=True,
                                        env=dict(os.environ, KL3M_TEST_CACHE=str(cache())))

    def stop(self, number):
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def report(self, count):
        """Shows what the module said and adds up its tests."""
        self.out.seek(0)
        lines = self.out.read()
        found = re.search(rb"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?\n\Z",
                          lines, flags=re.M)
        if found:
            lines = lines[:found.start()]
            for kind, number in zip(("ok", "FAIL", "skip"), found.groups()):
                count[kind] += int(number or 0)
        else:
            lines += (b"FAIL %s.py ended with status %d in the middle\n"
                      % (self.module.encode(), self.process.returncode))
            count["FAIL"] += 1
        sys.stdout.buffer.write(lines)
        sys.stdout.flush()


def run_modules(waiting, words):
    """Runs modules side by side and returns the exit status."""
    stopped, running, count = [], [], {"ok": 0, "FAIL": 0, "skip": 0}
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        # SIGHUP ignored, as by nohup, stays so.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: stopped.append(number))
    while (waiting or running) and not stopped:
        while waiting and len(running) < cpus():
            running.append(Running(waiting.pop(0), words))
        time.sleep(0.02)
        for one in [one for one in running if one.process.poll() is not None]:
            running.remove(one)
            one.report(count)
    for one in running:
        one.stop(signal.SIGTERM)
    for one in running:
        try:
            one.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        one.stop(signal.SIGKILL)
    print(closing_line(count))
    return 128 + stopped[0] if stopped else 1 if count["FAIL"] or not any(count.values()) else 0


def main(words):
    # A shell has its background jobs ignore Ctrl-C, and a program keeps to that: those under test
    # must not inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if words[:1] == ["--module"]:
        module, words = words[1], words[2:]
        # An exception, so that what is temporary is removed.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        load(module)
        return run_tests(selected(words, module))
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        load(path.stem)
    unknown = [word for word in words if not selected([word])]
    for word in unknown:
        print("FAIL no test has %r in its module's name or its sentence" % word)
    if unknown:
        print(closing_line({"ok": 0, "FAIL": len(unknown), "skip": 0}))
        return 1
    modules = sorted({module for module, _, _ in selected(words)})
    if len(modules) == 1:   # its lines may come as they are made
        return run_tests(selected(words))
    return run_modules([one for one in LONGEST if one in modules]
                       + [one for one in modules if one not in LONGEST], words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
