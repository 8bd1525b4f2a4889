"""README's recipes for many files and many machines, run as they stand there."""
import json
import re
import shutil
import socket
import subprocess
import sys
import time

from harness import KL3M, ROOT, Skip, expect, run, small_model, test, tmpdir
from test_schedule import lines, random_prompts

# A program in kl3m's place that dies in the middle of its second run, after part of its output.
DYING = """#!/bin/sh
if mkdir "$(dirname "$0")/first" 2>/dev/null; then exec '{kl3m}' "$@"; fi
if mkdir "$(dirname "$0")/second" 2>/dev/null; then '{kl3m}' "$@" | head -n 3; kill -9 $$; fi
exec '{kl3m}' "$@"
"""


def recipe(word):
    """The one command of README's shell blocks that has this word."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"),
                        flags=re.M | re.S)
    found = [block for block in blocks if word in block]
    expect(len(found), 1, "recipes with " + word)
    return found[0]


def kitchen(prompts, program=None):
    """A folder with all that a recipe names: ./kl3m, demo.bin and prompts.txt."""
    place = tmpdir()
    if program:
        (place / "kl3m").write_text(program.format(kl3m=KL3M))
        (place / "kl3m").chmod(0o755)
    else:
        (place / "kl3m").symlink_to(KL3M)
    (place / "demo.bin").symlink_to(small_model())
    (place / "prompts.txt").write_bytes(prompts)
    return place


def cook(place, command):
    done = run(["sh", "-c", command], cwd=place)
    return done.code, (place / "texts.txt").read_bytes()


def alone(place, *args):
    """One process's exit status and output."""
    done = run([KL3M, "-m", place / "demo.bin", "-s", "1", "-n", "16", *args],
               input=(place / "prompts.txt").read_bytes())
    return done.code, done.out


def need(program):
    if shutil.which(program) is None:
        raise Skip(program + " is not installed")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def connected(port):
    """As soon as somebody listens there."""
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


@test("README's recipe for GNU parallel gives one process's bytes, with a worker killed and "
      "prompts that cannot be run")
def gnu_parallel():
    need("parallel")
    prompts = random_prompts(1000, 6)
    for program in None, DYING:
        place = kitchen(lines([p[:60] for p in prompts]), program)
        expect(cook(place, recipe("parallel ")), alone(place), program)
    # Prompts too long for the context are no reason to run a block again: their places stay empty.
    place = kitchen(
        lines(["The " * 500 if i % 250 == 7 else p[:60] for i, p in enumerate(prompts)]))
    status, texts = alone(place)
    expect(status, 3)
    expect(cook(place, recipe("parallel ")), (0, texts))


# In place of ssh: a host that is this one, where a login begins in a folder of its own, with SHELL
# set as sshd sets it (parallel runs the commands there with it, and without it none, silently).
HOST = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
echo login >>'{place}/logins'
mkdir -p '{place}/home' && cd '{place}/home' && SHELL=/bin/sh exec sh -c "$*"
"""


@test("with --sshlogin, as README adds it, the parts run on other hosts, and the bytes are those "
      "of one process")
def other_hosts():
    need("parallel")
    added = re.search(r"add `(--sshlogin [^`]*)`",
                      (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    place = kitchen(lines([p[:60] for p in random_prompts(1000, 7)]))
    (place / "ssh").write_text(HOST.format(place=place))
    (place / "ssh").chmod(0o755)
    command = recipe("parallel ").replace("parallel ", "PARALLEL_SSH='%s' parallel %s "
                                          % (place / "ssh", added), 1)
    expect(cook(place, command), alone(place))
    assert len((place / "logins").read_text().split()) >= 4, (
        "four parts of 250 lines run on the hosts")


@test("README's recipe for xargs -0 runs each file as a prompt, whatever its name")
def xargs():
    place = kitchen(b"")
    texts = {"a b": "The State", "c\nd": "of New York\n", "-e": "Law"}
    (place / "clauses").mkdir()
    want = b""
    for name, text in sorted(texts.items()):
        (place / "clauses" / (name + ".txt")).write_text(text)
    order = subprocess.run(["sh", "-c", "find clauses -name '*.txt' -print0 | sort -z"], cwd=place,
                           stdout=subprocess.PIPE).stdout.split(b"\0")[:-1]
    for name in order:
        want += run([KL3M, "-m", place / "demo.bin", "-s", "1", "-n", "16", "-f",
                     place / name.decode()]).out
    expect(cook(place, recipe("xargs -0")), (0, want))


@test("README's Python that keeps the program open asks and is answered, in order")
def kept_open():
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"),
                        flags=re.M | re.S)
    block, = [block for block in blocks if "def ask" in block]
    place = kitchen(b"")
    done = run([sys.executable, "-c", block], cwd=place)
    expect((done.code, done.err), (0, ""))
    assert done.text.startswith("Governing Law.\n") and "\nNotices.\n" in done.text, done.text


@test("README's socat serves whoever connects")
def service():
    need("socat")
    place, found = kitchen(b""), []
    port = free_port()
    command = recipe("socat").replace("8170", str(port))
    server = subprocess.Popen(["sh", "-c", "exec " + command], cwd=place)
    try:
        for prompt in ("Governing Law.\n", "Notices.\n"):
            with connected(port) as client:
                client.sendall(json.dumps({"prompt": prompt, "id": prompt}).encode() + b"\n")
                client.shutdown(socket.SHUT_WR)
                found.append(json.loads(client.makefile().read()))
    finally:
        server.terminate()
        server.wait(timeout=20)
    expect([one["id"] for one in found], ["Governing Law.\n", "Notices.\n"])
    assert all(one["generated_text"][0].startswith(one["id"]) for one in found), found
