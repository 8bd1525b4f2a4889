#!/usr/bin/env python3
"""Runs the tests: all of them, or those whose module or sentence contains a given word.

    tests/run.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import importlib
import signal

from harness import ROOT, run_tests, test


def load(path):
    """Imports a module of tests; one that cannot be imported counts as a test that failed."""
    try:
        importlib.import_module(path.stem)
    except Exception as error:
        def fail(error=error):
            raise error
        test("%s can be imported" % path.name)(fail)


if __name__ == "__main__":
    # A shell has its background jobs ignore Ctrl-C, and a program keeps to that: those under test must not inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        load(path)
    sys.exit(run_tests(sys.argv[1:]))
