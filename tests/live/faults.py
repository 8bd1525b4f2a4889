#!/usr/bin/env python3
"""Each call that can fail, fails once, one after the other, until a run passes untouched: then the
bytes are right and the status is 0, or there is a message and another status. Never a signal, a
hang, a wrong byte with status 0, half a file under its name or a part left behind.

    tests/live/faults.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import errno
import os
import subprocess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import KL3M, PATIENCE, expect, run_tests, selected, small_model, test, tmpdir

PROMPTS = b"Governing Law.\nThe Tenant\n\n"
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}'

# What is run: options, standard input, the file that is written or None.
WORKS = {
    "generation": (["-p", "The State", "-n", "6", "-s", "1"], b"", None),
    "a file of prompts": (["-n", "5", "-s", "1", "-r", "2", "--json"], PROMPTS, None),
    "scores": (["--score", "--json"], PROMPTS, None),
    "a schema": (["--schema", "SCHEMA", "-n", "30", "-s", "1"], PROMPTS, None),
    "schemas of records": (["--jsonl", "--schema-member", "s", "-n", "30", "-s", "1"],
                           b'{"prompt": "a", "s": %s}\n' % SCHEMA.encode(), None),
    "logits": (["-p", "The State", "--logits", "OUT"], b"", "OUT"),
    "a table of guesses": (["--learn", "-o", "OUT", "--tokens", "30", "-s", "1"], b"", "OUT"),
    "quantizing": (["--quantize", "q8", "-o", "OUT"], b"", "OUT"),
    "token ids": (["--tokenize"], PROMPTS, None),
    "texts of token ids": (["--detokenize"], b"1 2 3\n\n300\n", None),
    "what fits a schema": (["--schema", "SCHEMA", "--check"], b'{"a":"x"}\nno\n', None),
    "windows of a long text": (["--score", "--stride", "3"], b"The State of New York " * 12, None),
    "the model": (["--info"], b"", None),
    "its checksums": (["--verify"], b"", None),
}

# Calls, the error that each has, and how many of them are tried one by one; then every 17th.
CALLS = {"alloc": (errno.ENOMEM, 120), "open": (errno.EMFILE, 40), "read": (errno.EIO, 40),
         "write": (errno.ENOSPC, 40), "mmap": (errno.ENOMEM, 40), "mprotect": (errno.EACCES, 9),
         "rename": (errno.EIO, 9), "fsync": (errno.EIO, 9), "pipe": (errno.EMFILE, 9),
         "poll": (errno.ENOMEM, 20), "getentropy": (errno.ENOSYS, 20),
         "pthread_create": (errno.EAGAIN, 9)}


def library():
    out = tmpdir() / "faults.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", out,
                    Path(__file__).with_name("faults.c"), "-ldl"], check=True)
    return out


def once(work, preload=None, **more):
    """(exit status, standard output, standard error, the file written, what else is left)."""
    args, given, written = WORKS[work]
    folder = tmpdir()
    (folder / "schema.json").write_text(SCHEMA)
    names = {"OUT": "out", "SCHEMA": "schema.json"}
    env = dict(os.environ, **more)
    if preload:
        env.update(LD_PRELOAD=str(preload), FAIL_REPORT=str(folder / "report"))
    done = subprocess.run([str(KL3M), "-m", str(small_model()), "-j", "2",
                           *(names.get(arg, arg) for arg in args)], input=given, env=env,
                          cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=PATIENCE)
    out = folder / "out"
    data = out.read_bytes() if out.exists() else None
    left = sorted(set(os.listdir(folder)) - {"schema.json", "report", "out"})
    return done.returncode, done.stdout, done.stderr, data, left, (folder / "report").exists()


def each_fails(preload, work, call, error, short=False):
    """Returns how many calls failed."""
    want = once(work)
    expect(want[0], 3 if work == "what fits a schema" else 0, want[2])
    failed, at = 0, 1
    more = {"FAIL_CALL": call, "FAIL_ERRNO": str(error)}
    if short:
        more["FAIL_SHORT"] = "1"
    while True:
        code, out, err, data, left, met = once(work, preload, FAIL_AT=str(at), **more)
        what = (work, call, error, at, code, err)
        assert left == [], (what, left)
        if code == want[0]:
            assert out == want[1], what
            assert data == want[3], what
        else:
            assert code in (1, 2, 3) and err.startswith(b"kl3m: "), what
            assert data in (None, want[3]), what           # the file may have been whole before
        if short or error == errno.EINTR:
            expect(code, want[0], what)
        if not met:
            return failed
        failed += 1
        at += 1 if at < CALLS[call][1] else 17


@test("each call that fails once ends in the right bytes, or in a message and nothing half-done")
def each_call_fails():
    preload, total = library(), 0
    for work in WORKS:
        for call, (error, _) in CALLS.items():
            total += each_fails(preload, work, call, error)
    print("     %d calls failed" % total)
    assert total > 500, total


@test("short reads and writes and interrupted calls change nothing")
def short_calls():
    preload, total = library(), 0
    for work in WORKS:
        for call in ("read", "write"):
            total += each_fails(preload, work, call, 0, short=True)
        for call in ("read", "write", "poll"):
            total += each_fails(preload, work, call, errno.EINTR)
    print("     %d calls were short or interrupted" % total)
    assert total > 50, total


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
