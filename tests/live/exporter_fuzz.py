#!/usr/bin/env python3
"""The exporter over damaged files and a hub's damaged answers, drawn by hypothesis: it ends in one
message, status 1 and nothing left, or in a file that the program takes. From a hub, whatever its
answers, it ends in the right bytes or in a message, and the next run in the right bytes.

    pip install -r tests/requirements.txt
    tests/live/exporter_fuzz.py [SECONDS [SEED]]
"""
import sys

sys.dont_write_bytecode = True

import copy
import http.client
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import time
from pathlib import Path
from unittest import mock

import hypothesis
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from harness import expect, run_kl3m, run_tests, selected, test, tmpdir
from test_export import run_inside
from test_hub import COMMIT, OTHER, Case, FakeHub

SECONDS = float((sys.argv[1:] or ["40"])[0])
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
LONGEST, MEMORY = 60, 1 << 30   # seconds and bytes of one export, many times what these need


def campaign(inputs, check, seconds):
    """Tries inputs for so long, a batch after the other, and returns what check said of each."""
    said, failed, end = [], [], time.monotonic() + seconds
    for batch in range(1 << 20):
        @hypothesis.seed(SEED + batch)
        @hypothesis.settings(max_examples=100, database=None, deadline=None, print_blob=False,
                             report_multiple_bugs=False,
                             suppress_health_check=list(hypothesis.HealthCheck),
                             phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink))
        @hypothesis.given(inputs)
        def one(given):
            if failed or time.monotonic() < end:   # making it smaller takes its time
                failed.append(given)
                said.append(check(given))
                failed.remove(given)
        try:
            one()
        except Exception:
            print("     seed %d, the smallest input: %.2000r" % (SEED + batch, failed[-1]))
            raise
        if time.monotonic() > end:
            return said


# ---- Damage -----------------------------------------------------------------------------------

class Members(list):
    """An object of JSON as a list of [key, value], so that a key can be there twice."""


class Raw(str):
    """What stands in a JSON text as it is."""

    def __repr__(self):
        return "Raw(%d, %.60s)" % (len(self), self)


def parse(text):
    return json.loads(text, object_pairs_hook=lambda pairs: Members(map(list, pairs)))


def written(node):
    if type(node) is Members:
        return "{%s}" % ", ".join("%s: %s" % (written(key), written(value)) for key, value in node)
    if type(node) is dict:
        return written(Members(node.items()))
    if type(node) is list:
        return "[%s]" % ", ".join(map(written, node))
    return node if type(node) is Raw else json.dumps(node)


def places(inside, found):
    """[list, place] of every node below, but of a long list's only the ends: a vocabulary would
    hide all else."""
    for at in range(len(inside)) if len(inside) < 50 else (0, 1, len(inside) - 1):
        found.append((inside, at))
        node = inside[at][1] if type(inside) is Members else inside[at]
        if isinstance(node, list):
            places(node, found)
    return found


def damage_tree(root, how, number, value, other):
    """A change at one place of the JSON in root, a list of one."""
    found = places(root, [])
    inside, at = found[number % len(found)]
    member = type(inside) is Members
    old = inside[at][1] if member else inside[at]
    if how == "delete" and inside is not root:
        del inside[at]
    elif how == "double" and inside is not root:
        inside.insert(at, copy.deepcopy(inside[at]))
    elif how == "rename" and member:
        inside[at][0] = value if isinstance(value, str) else str(old)
    else:
        if how == "copy":
            there, place = found[other % len(found)]
            value = copy.deepcopy(there[place][1] if type(there) is Members else there[place])
        elif how == "nudge" and type(old) in (int, float):
            value = old + other % 9 - 4
        elif how == "nudge" and isinstance(old, str):
            value = old + str(value)
        if member:
            inside[at][1] = value
        else:
            inside[at] = value


def splice(data, at, cut, more):
    at %= len(data) + 1
    return data[:at] + more + data[at + cut:]


def damaged(files, step):
    """One step of damage to files, {name: bytes}."""
    kind, number, *how = step
    name = sorted(files)[number % len(files)]
    data, head = files[name], b""
    if name.endswith(".safetensors"):   # its data are left alone, mostly
        size = int.from_bytes(data[:8], "little")
        head, data, rest = data[:8], data[8:8 + size], data[8 + size:]
    if kind == "length" and head:
        length = how[0] if how[1] else len(data) + how[0] % 64 - 32
        head = struct.pack("<Q", length & (1 << 64) - 1)
    elif kind == "bytes":
        data = splice(data, *how)
    elif kind == "tree":
        try:
            root = [parse(data)]
            damage_tree(root, *how)
            data = written(root[0]).encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):   # an earlier step made it no JSON, or too deep for us
            return
        head = head and struct.pack("<Q", len(data))
    elif kind == "file":
        other = sorted(files)[how[0] % len(files)]
        if other == name:
            del files[name]
        else:
            files[name] = files[other]
        return
    files[name] = head + data + rest if head else data


# ---- What is drawn ----------------------------------------------------------------------------

def small_model(shards):
    top = tmpdir()
    config = models.make_config(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8,
        vocab_size=290, rope_scaling={"rope_type": "default", "factor": 1.0})
    tokenizer = models.small_tokenizer(280)
    if shards > 1:   # parts that the other one lacks
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
        tokenizer["model"]["ignore_merges"] = True
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [
            tokenizer["post_processor"],
            {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [], "special_tokens": {}}]}
    models.save_model(top, config, models.make_weights(config), shards=shards, tokenizer=tokenizer)
    (top / "README.md").write_text("---\nlicense: mit\n---\n")
    (top / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 3]}')
    return {path.name: path.read_bytes() for path in top.iterdir()}


MODELS = [small_model(1), small_model(2)]
WORDS = sorted({json.loads(word) for files in MODELS for name, data in files.items()
                for word in re.findall(r'"(?:\\.|[^"\\])*"', data.decode("latin-1"))
                if name.endswith(".json") and len(word) > 5 and word.isascii()}
               | {"NFC", "Sequence", "TemplateProcessing", "BF16", "F16", "F64", "linear",
                  "normalizers", "processors", "rope_parameters", "partial_rotary_factor",
                  "head_dim", "ignore_merges", "quantization_config", "lm_head.weight", "../x",
                  "a/b", "\0", "__metadata__", "gpt_neox.layers.0.attention.bias"})
NUMBERS = st.integers(-3, 400) | st.sampled_from(
    [1 << 16, 1 << 20, 1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 62,
     (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -1 << 63, 10 ** 400, 10 ** 4299])
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12) | st.sampled_from(WORDS)
RAWS = st.sampled_from(list(map(Raw, (
    "", "NaN", "-Infinity", "1e400", "-0", "01", "'x'", '"\\ud800"', '"\\ud83d\\ude00"', '"\\u00"',
    '"\t"', "1" * 5000, '"%s"' % ("x" * 70000), "[" * 100000, '{"a":' * 50000,
    *("%s%s" % ("[" * deep, "]" * deep) for deep in (300, 900, 990, 5000)),
    *('{"type": "Sequence", "normalizers": [' * deep + '{"type": "NFC"}' + "]}" * deep
      for deep in (1, 2, 300, 450))))))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS | RAWS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=6)
PLACES = st.integers(0, 1 << 12)
BYTES = st.binary(max_size=12) | st.sampled_from(
    [b"{", b"}", b'"', b",", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 5000])
PARTS = st.integers(0, 1 << 16), st.integers(0, 40) | st.just(1 << 20), BYTES
FILES = st.integers(0, 7)
HOWS = st.sampled_from(["replace", "replace", "delete", "double", "rename", "nudge", "copy"])
TREES = st.tuples(st.just("tree"), FILES, HOWS, PLACES, VALUES, PLACES)
OTHERS = (st.tuples(st.just("bytes"), FILES, *PARTS)
          | st.tuples(st.just("length"), FILES, NUMBERS, st.booleans())
          | st.tuples(st.just("file"), FILES, FILES))
STEPS = st.integers(0, 3).flatmap(lambda n: TREES if n else OTHERS)   # trees mostly


# ---- Tests ------------------------------------------------------------------------------------

def check_said(code, err):
    """One message at the end if the status is 1; notes may come before it."""
    assert code in (0, 1) and "MemoryError" not in err, (code, err)
    lines = err.split("\n")
    assert lines.pop() == "" and all(
        re.fullmatch("export_weights.py: [^\0-\x1f\x7f-\x9f]+", line) for line in lines), err
    errors = [line.startswith("export_weights.py: error: ") for line in lines]
    expect(errors, [False] * (len(lines) - code) + [True] * code, err)


@test("damaged files: one message and nothing left, or a file that the program takes")
def damaged_files():
    top = tmpdir()

    def check(given):
        files = dict(MODELS[given[0]])
        for step in given[1]:
            damaged(files, step)
        for name in ("model", "out"):
            shutil.rmtree(top / name, ignore_errors=True)
            (top / name).mkdir()
        for name, data in files.items():
            (top / "model" / name).write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        code, err = run_inside(top / "model", "-o", top / "out" / "model.bin")
        signal.setitimer(signal.ITIMER_REAL, 0)
        check_said(code, err)
        expect(os.listdir(top / "out"), ["model.bin"][code:], err)
        for option in ("--info", "--verify")[:2 - 2 * code]:
            done = run_kl3m("-m", top / "out" / "model.bin", option)
            expect(done.code, 0, (option, done.err))
        return code
    said = campaign(st.tuples(st.integers(0, 1), st.lists(STEPS, min_size=1, max_size=2)), check,
                    SECONDS * 0.7)
    print("     %d inputs, %d of them exported, seed %d" % (len(said), said.count(0), SEED))
    assert said.count(0) > 10 and said.count(1) > 10, said


class Line:
    """What http.client needs of a connection, to the hub of this process."""

    def __init__(self, answer):
        self.answer, self.asked = answer, b""

    def sendall(self, data):
        self.asked += data

    def makefile(self, *_):
        return io.BytesIO(self.answer(self.asked))

    def ignored(self, *_):
        pass
    close = settimeout = setsockopt = ignored


class NearHub(FakeHub):
    """A hub whose answers, as bytes, go through faults: {number of the answer: what changes}."""

    def serve(self, host, _):
        return "http://%s.test" % host

    def connect(self, where, *_):
        return Line(lambda asked: self.bytes_of(where[0], asked))

    def bytes_of(self, host, asked):
        stream = io.BytesIO(asked)
        method, path, _ = stream.readline().decode("latin-1").split(" ", 2)
        headers = http.client.parse_headers(stream)
        path = path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        make = self.cdn if host == "cdn.test" and name in self.files else self.hub
        answer = make(path, name, headers)
        faults = self.faults.get(len(self.log), [])
        self.log.append(path)
        for kind, *fault in faults:
            if kind == "status":
                answer.status = fault[0]
            elif kind == "header":
                answer.headers[fault[0]] = fault[1]
        head = "HTTP/1.1 %s x\r\n" % answer.status + "".join(
            "%s: %s\r\n" % (name, value) for name, value in answer.headers.items()
            if value is not None) + "\r\n"
        data = head.encode("utf-8", "replace") + (answer.body if method == "GET" else b"")
        for kind, *fault in faults:
            if kind == "bytes":
                data = splice(data, *fault)
        return data


HEADERS = st.sampled_from([
    "X-Repo-Commit", "ETag", "X-Linked-Etag", "X-Linked-Size", "Content-Length", "Location",
    "Content-Range", "Retry-After", "RateLimit", "Transfer-Encoding", "Content-Encoding",
    "Connection"])
HEADER_VALUES = (st.none() | NUMBERS | st.text(max_size=20) | st.sampled_from([
    COMMIT, OTHER, "chunked", "gzip", "bytes 0-9/*", "bytes 5-9/10", "W/\"\"", "\"%s\"" % COMMIT,
    "a" * 64, "/", "//hub.test/x", "http://cdn.test/config.json", "https://hub.test/x", "http://[",
    "http://a:b@c/", "/a b", "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 9999 99:99:99 +9999",
    "1 Jan 0", "\"api\";r=0;t=9", "x" * 70000, "a\r\nETag: b", "\x1b[31m", "-1", "0x10", "1_0"])
    | st.lists(st.sampled_from("Fri, 31 Dec 2099 23:59:59 GMT +0100 : - / 0 99999999999".split()),
               max_size=8).map(" ".join))
FAULTS = (st.tuples(st.just("header"), HEADERS, HEADER_VALUES)
          | st.tuples(st.just("status"), st.sampled_from(
              [0, 100, 101, 200, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 408, 416, 429,
               500, 503, 999, -1, "2_0", "x", ""]))
          | st.tuples(st.just("bytes"), *PARTS))


@test("a hub's damaged answers: the right bytes or a message, and the next run the right bytes")
def damaged_answers():
    files = {name: data for name, data in MODELS[0].items() if name != "generation_config.json"}
    case = Case(hub=NearHub(files))

    def run(faults):
        case.hub.faults = faults
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        code, err = case.run()
        signal.setitimer(signal.ITIMER_REAL, 0)
        check_said(code, err)
        parts = [path for path in case.top.rglob("*.part")]
        return code, err, parts, [path.read_bytes() for path in case.out.parent.iterdir()]

    with mock.patch.object(socket, "create_connection", case.hub.connect):
        want = run({})[3]

        def check(faults):
            for place in (case.top / "home", case.out.parent):
                shutil.rmtree(place, ignore_errors=True)
            case.out.parent.mkdir()
            code, err, *left = run(faults)
            expect(left, [[], [] if code else want], err)
            code_then, err, *left = run({})
            expect((code_then, left), (0, [[], want]), err)
            return code
        said = campaign(st.dictionaries(st.integers(0, 12), st.lists(FAULTS, min_size=1,
                                                                     max_size=3),
                                        min_size=1, max_size=3), check, SECONDS * 0.3)
    print("     %d inputs, %d of them exported, seed %d" % (len(said), said.count(0), SEED))
    assert said.count(0) > 10 and said.count(1) > 10, said


def hangs(*_):
    raise AssertionError("longer than %d s" % LONGEST)


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.exit(run_tests(selected([], "__main__")))
