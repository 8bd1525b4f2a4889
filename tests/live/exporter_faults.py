#!/usr/bin/env python3
"""Each call of the exporter to the disk or the network fails, one after the other, once or from
then on, until a run passes untouched: then the bytes are right and the status is 0, or there is one
message and status 1. Never a traceback, a hang, wrong bytes with status 0, half a file under OUT's
name or a part left behind; and the next run, of which no call fails, gives the right bytes.

    tests/live/exporter_faults.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import builtins
import errno
import fcntl
import functools
import io
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from harness import expect, run_tests, selected, test, tmpdir
from test_export import ROWS, export_weights
from test_hub import MODEL, WEIGHTS, FakeHub, clean, model_files, sha256

# Besides the numbers of errors: fewer bytes than asked for, and a peer that has closed. EINTR is
# none of them, since below these names, in C, Python itself calls again.
SHORT, CLOSED = "short", "closed"

# What fails, and how. Of a file object, then of os, then of the network.
CALLS = {"open": (errno.EMFILE,), "read": (errno.EIO, SHORT),
         "write": (errno.ENOSPC, SHORT), "seek": (errno.EIO,), "truncate": (errno.EIO,),
         "close": (errno.EDQUOT,)}
OF_OS = {"stat": (errno.EIO,), "lstat": (errno.EIO,), "fstat": (errno.EIO,),
         "statvfs": (errno.EIO,), "scandir": (errno.EACCES,), "listdir": (errno.EACCES,),
         "readlink": (errno.EIO,), "open": (errno.EACCES,), "mkdir": (errno.EROFS,),
         "unlink": (errno.EIO,), "rename": (errno.EIO,), "replace": (errno.EIO,),
         "symlink": (errno.EPERM,), "fsync": (errno.ENOSPC,), "fchown": (errno.EPERM,),
         "fchmod": (errno.EPERM,), "write": (errno.EIO, errno.EAGAIN, SHORT)}
OF_SOCKETS = {"__init__": (errno.EMFILE,), "connect": (errno.ECONNREFUSED, errno.ETIMEDOUT),
              "setsockopt": (errno.EINVAL,), "sendall": (errno.EPIPE,),
              "recv_into": (errno.ECONNRESET, errno.ETIMEDOUT, CLOSED, SHORT)}
OTHERS = {"socket.getaddrinfo": (socket, (errno.EMFILE,)),
          "fcntl.flock": (fcntl, (errno.ENOLCK,)),
          "random._urandom": (random, (errno.ENOSYS,))}
CALLS.update(("os." + name, errors) for name, errors in OF_OS.items())
CALLS.update(("socket.socket." + name, errors) for name, errors in OF_SOCKETS.items())
CALLS.update((name, errors) for name, (_, errors) in OTHERS.items())


# ---- A process whose calls fail ---------------------------------------------------------------

def shut(self, *_):
    """What recv_into gives if the other side closed before it sent anything."""
    self.shutdown(socket.SHUT_RDWR)
    while self.recv(1 << 16):
        pass
    return 0


def install(call, at, error, stays, met):
    """The call of this name with this number fails so, and with stays all after it; met[0] is 1
    then."""
    count = 0

    def due(name):
        nonlocal count
        count += name == call
        now = name == call and (count == at or stays and count > at)
        if now:
            met[0] = 1
        return now

    def fail(*args):
        raise OSError(error, os.strerror(error), *[arg for arg in args if type(arg) is str][:1])

    def failing(name, real, fewer=None):
        @functools.wraps(real)
        def wrapped(*args, **options):
            if not due(name):
                return real(*args, **options)
            return shut(*args) if error == CLOSED else (
                real(*fewer(*args)) if error == SHORT else fail(*args))
        return wrapped

    class File(io.FileIO):
        """What is under a file object. A file that could not be closed well is closed."""
        __init__ = failing("open", io.FileIO.__init__)
        read, readall = (failing("read", one, lambda self, *_: (self,))
                         for one in (io.FileIO.read, io.FileIO.readall))
        readinto = failing("read", io.FileIO.readinto, lambda self, data: (
            self, memoryview(data)[:-(-len(data) // 2)]))
        write = failing("write", io.FileIO.write, lambda self, data: (
            self, memoryview(data)[:-(-len(data) // 2)]))
        seek, truncate = failing("seek", io.FileIO.seek), failing("truncate", io.FileIO.truncate)

        def close(self):
            was_open = not self.closed
            super().close()
            if was_open and due("close"):
                fail()

    def opened(path, mode="r", buffering=-1, encoding=None, errors=None, opener=None):
        file = File(path, re.sub("[bt]", "", mode), opener=opener)
        if buffering != 0:
            file = (io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode
                    else io.BufferedWriter)(file)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors)

    builtins.open = opened
    os.fsync = lambda _: None   # these tests do not need the disk itself
    for name in OF_OS:
        setattr(os, name, failing("os." + name, getattr(os, name), lambda number, data: (
            number, data[:1])))
    for name in OF_SOCKETS:
        real = getattr(socket.socket, name)
        setattr(socket.socket, name, failing("socket.socket." + name, real, lambda self, data: (
            self, memoryview(data)[:1])))
    for name, (place, _) in OTHERS.items():
        last = name.split(".")[1]
        setattr(place, last, failing(name, getattr(place, last)))


def run(place, args, environment, fault=None):
    """(exit status, lines of standard error, whether the fault was met) of the exporter's main() in
    a fork of this process, which takes milliseconds where an interpreter takes a tenth of a
    second."""
    met, said = mmap.mmap(-1, 1), place.with_name("said")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.alarm(100)   # main() ends with 142 then
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.chdir(place)
            os.environ.clear()
            os.environ.update(clean(environment))
            sys.argv = ["export_weights.py", *args]
            time.sleep = lambda _: None
            if fault:
                install(*fault, met)
            code = export_weights.main()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text().splitlines(), met[0] == 1


# ---- What is exported -------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def hub():
    """The address of a hub, and a socket that keeps it there. It is in a process of its own, since
    a process with threads should not fork."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        theirs.sendall(FakeHub(files()).endpoint.encode())
        theirs.recv(1)   # which comes to nothing when the tests end
        os._exit(0)
    theirs.close()
    return ours.recv(100).decode(), ours


def files():
    return {**model_files(2), "generation_config.json": b'{"eos_token_id": [3, 1]}'}


def plain(top):
    """A directory, and an older file of ours in OUT's place, which others may not read."""
    (top / "model").mkdir()
    for name, data in model_files().items():
        (top / "model" / name).write_bytes(data)
    (top / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    (top / "model" / "generation_config.json").write_bytes(b'{"eos_token_id": [3, 1]}')
    (top / "out" / "model.bin").write_bytes(b"older")
    (top / "out" / "model.bin").chmod(0o600)
    return ["model"]


def shards(top):
    models.write_model(top / "model", dtype="BF16", shards=3, n_kv=2, vocab_size=ROWS,
                       num_hidden_layers=1)
    return ["model"]


def half_a_download(top):
    """The second shard has come in part."""
    blobs = top / "home" / "hub" / ("models--" + MODEL.replace("/", "--")) / "blobs"
    blobs.mkdir(parents=True)
    data = files()["model-00002-of-00002.safetensors"]
    (blobs / (sha256(data) + ".incomplete")).write_bytes(data[:1000])
    return [MODEL]


def cached(top):
    """All has come."""
    expect(run(top, [MODEL, "-o", "warm"], environment(top))[0], 0)
    (top / "warm").unlink()
    return [MODEL]


def environment(top):
    return {"HF_HOME": top / "home", "HF_ENDPOINT": hub()[0]}


def contents(top):
    """{name: what it is} of all that is there."""
    return {str(path.relative_to(top)): os.readlink(path) if path.is_symlink() else
            (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) if path.is_file() else None
            for path in top.rglob("*")}


class Work:
    """One kind of export, from the same start each time."""

    def __init__(self, make):
        self.start = tmpdir() / "start"
        (self.start / "out").mkdir(parents=True)
        self.place = self.start.with_name("place")
        self.args = [*make(self.start), "-o", "out/model.bin"]
        self.before = contents(self.start)
        code, said, _ = self.once()
        expect(code, 0, said)
        self.want = contents(self.place)

    def once(self, fault=None, anew=True):
        if anew:
            shutil.rmtree(self.place, ignore_errors=True)
            shutil.copytree(self.start, self.place, symlinks=True)
        return run(self.place, self.args, environment(self.place), fault)

    def check(self, *fault):
        """Whether there was such a call to fail."""
        code, said, met = self.once(fault)
        call, _, error, stays = fault
        what = (*fault, code, said)
        assert code in (0, 1), what
        if call != "os.write":   # through which the messages go
            assert all(line.startswith("export_weights.py: ") for line in said), what
            errors = [line.startswith("export_weights.py: error: ") for line in said]
            assert errors == [False] * (len(said) - code) + [True] * code, what
            assert code == 0 or "; " in said[-1], what   # what to do
        if error == SHORT or call == "os.write" or "socket" in call and not stays:
            expect(code, 0, what)
        after, out = contents(self.place), "out/model.bin"
        assert after.get(out) == self.want[out] or code and (
            after.get(out) == self.before.get(out)), what
        strange = {name for name in after.keys() - self.want.keys()
                   if not re.fullmatch(".*/blobs/[0-9a-f]+[.]incomplete", name)}
        expect(strange, set(), what)
        expect({name for name in self.before if not name.startswith(("out", "home"))
                and after.get(name) != self.before[name]}, set(), what)
        if code or "home/hub" in after:
            code, said, _ = self.once(anew=False)
            expect((code, contents(self.place)[out]), (0, self.want[out]), (what, said))
        return met


def each_fails(make, stays=False):
    """The first calls of each name one by one, then every fifth."""
    work, failed = Work(make), 0
    for call, errors in CALLS.items():
        for error in errors:
            at = 1
            # What cannot be removed is left, and who says that it waits is waited for.
            while not (stays and (call == "os.unlink" or error == errno.EAGAIN)) and work.check(
                    call, at, error, stays):
                failed += 1
                at += 1 if at < (6 if stays else 20) else 5
    print("     %d calls failed" % failed)
    return failed


@test("a directory: each call that fails ends in the right bytes, or in a message and nothing left")
def of_a_directory():
    failed = each_fails(plain) + each_fails(plain, stays=True)
    assert failed > 200, failed


@test("three shards of BF16: the same")
def of_shards():
    failed = each_fails(shards)
    assert failed > 100, failed


@test("a download that goes on: the same, and a fault of the network that passes stops nothing")
def of_a_download():
    failed = each_fails(half_a_download) + each_fails(half_a_download, stays=True)
    assert failed > 500, failed


@test("a model in the cache: the same")
def of_the_cache():
    failed = each_fails(cached)
    assert failed > 120, failed


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
