"""export_weights.py and the hub: a local server that answers as the hub does, or as it should not.

Nothing leaves 127.0.0.1. A second port there is the other host that the hub sends clients to for
large files. live/hub.py shows that the real huggingface_hub takes this server for the hub.
"""
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import hashlib
import http.server
import json
import os
import pty
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from array import array
from unittest import mock
from urllib.parse import unquote, urlsplit

import models
from harness import PATIENCE, ROOT, expect, run, test, tmpdir, until
from test_export import ModelFile, Source, export_weights, run_inside, unprivileged

MODEL = "some-org/tiny.model-1"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_SecretOfTheTests"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAIN_FILES = ["config.json", "tokenizer.json", WEIGHTS]


# ---- The hub ----------------------------------------------------------------------------------

Request = collections.namedtuple("Request", "host method name path headers")


class Answer:
    """What a server is about to send. A fault changes it; the connection is closed after one."""

    def __init__(self, status=200, headers=None, body=b""):
        self.status, self.body = status, body
        self.headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.reset = False                 # end with RST
        self.pause = None                  # an event to wait for after half of the body


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_hash(data):
    return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()


class FakeHub:
    """One model with its files, and what was asked for it. faults[host, method, name] is a list of
    functions that change the next answers, one each; the last stays in force if it is `always`."""

    def __init__(self, files):
        self.files, self.revisions = files, {"main": COMMIT, COMMIT: COMMIT}
        self.log, self.faults, self.sent = [], collections.defaultdict(list), collections.Counter()
        self.endpoint, self.other = self.serve("hub", self.hub), self.serve("cdn", self.cdn)

    def serve(self, host, answer_to):
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                path = urlsplit(self.path).path   # a proxy gets whole addresses
                name = unquote(path.rsplit("/", 1)[1])
                fake.log.append(Request(host, self.command, name, self.path, self.headers))
                answer = answer_to(path, name, self.headers)
                faults = fake.faults[host, self.command, name]
                if faults:
                    faults[0](answer)
                    self.close_connection = True
                    if not hasattr(faults[0], "always"):
                        faults.pop(0)
                self.send(answer, name)
            do_HEAD = do_GET

            def send(self, answer, name):
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    if value is not None:
                        self.send_header(key, value)
                self.end_headers()
                with contextlib.suppress(OSError):   # a client that has gone
                    if self.command == "GET":
                        fake.sent[name] += len(answer.body) if answer.status < 300 else 0
                        half = len(answer.body) // 2 if answer.pause else 0
                        self.wfile.write(answer.body[:half])
                        if answer.pause:
                            answer.pause.wait(20)
                        self.wfile.write(answer.body[half:])
                if answer.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                               struct.pack("ii", 1, 0))

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(60,), daemon=True).start()
        return "http://127.0.0.1:%d" % server.server_address[1]

    def etag(self, name):
        """Large files go by their sha256 and lie on the other host, small ones by git's hash."""
        data = self.files[name]
        return sha256(data) if name.endswith(".safetensors") else git_hash(data)

    def hub(self, path, name, headers):
        cached = re.fullmatch("/api/resolve-cache/models/%s/%s/[^/]+" % (MODEL, COMMIT), path)
        found = re.fullmatch("/([^/]+/[^/]+)/resolve/([^/]+)/[^/]+", path)
        if not cached and (not found or found[1] != MODEL):
            return Answer(401, {"X-Error-Code": "RepoNotFound",
                                "X-Error-Message": "Invalid username or password."})
        commit = COMMIT if cached else self.revisions.get(unquote(found[2]))
        if not commit:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if name not in self.files:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data, etag = self.files[name], '"%s"' % self.etag(name)
        linked = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(data)), "X-Linked-Etag": etag}
        if name.endswith(".safetensors"):
            location = "%s/%s?Signature=abc&Expires=1/%s" % (self.other, MODEL, name)
            return Answer(302, {**linked, "ETag": '"of-the-redirect"',
                                "Location": location.replace("?", "/%s?" % name)},
                          b"Found. Redirecting")
        if name == "tokenizer.json" and not cached:   # a redirect to the same host
            return Answer(307, {"X-Repo-Commit": commit,
                                "Location": "/api/resolve-cache/models/%s/%s/%s?etag=%s"
                                % (MODEL, commit, name, etag.replace('"', "%22"))},
                          b"Temporary Redirect")
        return ranged(data, headers,
                      {"X-Repo-Commit": commit, "ETag": 'W/' + etag if cached else etag})

    def cdn(self, path, name, headers):
        if "Authorization" in headers:
            return Answer(400)   # as S3 does with two kinds of authorization
        return ranged(self.files[name], headers,
                      {"ETag": '"%s-2"' % hashlib.md5(name.encode()).hexdigest()})

    def asked(self, *hosts):
        """Method and file of each request, those of the hub or the other host or both."""
        return [(request.method, request.name) for request in self.log
                if request.host in (hosts or ("hub", "cdn"))]


def ranged(data, headers, more):
    found = re.fullmatch(r"bytes=(\d+)-", headers.get("Range", ""))
    start = int(found[1]) if found else 0
    if start >= len(data) > 0:
        return Answer(416, {"Content-Range": "bytes */%d" % len(data)})
    if found:
        more = {**more, "Content-Range": "bytes %d-%d/%d" % (start, len(data) - 1, len(data))}
    return Answer(206 if found else 200, {"Accept-Ranges": "bytes", **more}, data[start:])


# Faults. Each returns a function that changes an answer.

def status(code, **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda answer: answer.__init__(code, headers, b"no")


def with_headers(**headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda answer: answer.headers.update(headers)


def cut(count, reset=False):
    """The first bytes of the body alone; the headers promise all."""
    def change(answer):
        answer.body, answer.reset = answer.body[:count], reset
    return change


def body(change):
    """Another body of the length it has."""
    def spoil(answer):
        answer.body = change(answer.body)
        answer.headers["Content-Length"] = str(len(answer.body))
    return spoil


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def always(fault):
    def change(answer):
        fault(answer)
    change.always = True
    return change


# ---- Runs -------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def model_files(shards=1):
    """{name: bytes} of a tiny model. Not to be changed: a Case takes a copy."""
    directory = tmpdir()
    source = Source()
    source.config.pop("_name_or_path", None)
    if shards == 1:
        source.write(directory)
    else:
        tensors = {name: (shape, array("f", data))
                   for name, (_, shape, data) in source.tensors.items()}
        models.save_model(directory, source.config, tensors, shards=shards,
                          tokenizer=source.tokenizer)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def clean(environment):
    """The environment without what speaks of proxies, caches and the hub, and with this."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_"))
            and not name.lower().endswith("_proxy")}
    return {**kept,
            **{name: str(value) for name, value in environment.items() if value is not None}}


class Case:
    """A hub, a cache and a place for OUT. No wait is really waited for: they go to self.waits."""

    def __init__(self, files=None, hub=None):
        self.hub = hub or FakeHub(dict(files or model_files()))
        self.top = tmpdir()
        self.out = self.top / "out" / "model.bin"
        self.out.parent.mkdir()
        self.folder = self.top / "home" / "hub" / ("models--" + MODEL.replace("/", "--"))
        self.waits = []

    def environment(self, **more):
        return clean({"HF_HOME": self.top / "home", "HF_ENDPOINT": self.hub.endpoint, **more})

    def run(self, *args, model=MODEL, **environment):
        self.waits.clear()
        self.hub.log.clear()
        self.hub.sent.clear()
        with mock.patch.dict(os.environ, self.environment(**environment), clear=True), \
                mock.patch.object(time, "sleep", self.waits.append), mock.patch.object(os, "fsync"):
            return run_inside("-o", self.out, *args, "--", model)

    def start(self, code="", **environment):
        """The same in a process of its own, after these lines of Python."""
        lines = ("import resource, shutil, sys\nsys.dont_write_bytecode = True\n"
                 "import export_weights\n"
                 "export_weights.BACK_OFF = 0.01\n%s\nsys.exit(export_weights.main())" % code)
        return subprocess.Popen([sys.executable, "-c", lines, MODEL, "-o", self.out],
                                stderr=subprocess.PIPE,
                                env=dict(self.environment(**environment), PYTHONPATH=str(ROOT)))

    def blob(self, name, more=""):
        return self.folder / "blobs" / (self.hub.etag(name) + more)

    def partial(self, name=WEIGHTS):
        return self.blob(name, ".incomplete")

    def check_works(self, *args, **environment):
        code, err = self.run(*args, **environment)
        assert code == 0, err
        self.check_exported()
        self.check_cache()
        return err

    def check_exported(self):
        """OUT holds what the files say, as it does if a directory is exported."""
        directory = self.top / "plain"
        if not directory.exists():
            directory.mkdir()
            for name, data in self.hub.files.items():
                (directory / name).write_bytes(data)
            expect(run_inside(directory, "-o", self.top / "plain.bin")[0], 0,
                   "the directory's export")
        want, got = ModelFile(self.top / "plain.bin"), ModelFile(self.out)
        expect((got.about["source"], got.about["revision"], got.about["name"]),
               (MODEL, COMMIT, "tiny.model-1"))
        expect(list(got.sections), list(want.sections), "sections")
        for name in set(got.sections) - {"about"}:
            assert got.sections[name] == want.sections[name], name

    def check_cache(self, revision="main"):
        """The layout: whole blobs under their hashes, links to them, the ref; nothing else."""
        files = {name for name in self.hub.files if name != "README.md"}
        snapshot = self.folder / "snapshots" / COMMIT
        expect({path.name: os.readlink(path) for path in snapshot.iterdir()},
               {name: "../../blobs/" + self.hub.etag(name) for name in files}, "the snapshot")
        for name in files:
            assert self.blob(name).read_bytes() == self.hub.files[name], name
        expect(len(list(self.folder.glob("blobs/*"))),
               len({self.hub.etag(name) for name in files}), "blobs")
        if revision != COMMIT:
            expect((self.folder / "refs" / revision).read_text(), COMMIT, "the ref")

    def check_fails(self, words, *args, code=1, lines=None, **environment):
        got, err = self.run(*args, **environment)
        expect(got, code, err)
        last = err.splitlines()[-1]
        assert last.startswith("export_weights.py: error: "), err
        for word in words:
            assert word in last, "no %r in %r" % (word, last)
        assert TOKEN not in err and "Traceback" not in err and "Signature" not in err, err
        if lines:
            expect(err.count("\n"), lines, err)
        expect(os.listdir(self.out.parent), [], "left under OUT's name")
        expect([path.name for path in self.folder.glob("refs/*")], [], "a ref to what is not whole")
        return err


# ---- What is downloaded -----------------------------------------------------------------------

@test("a hub name is downloaded in huggingface_hub's layout and exported as the directory would be")
def download_and_export():
    for shards in (1, 3):
        case = Case(model_files(shards))
        case.hub.files["README.md"] = b"not needed"
        case.check_works()
        names = sorted(name for name in case.hub.files if name != "README.md")
        expect(sorted({name for method, name in case.hub.asked() if method == "GET"}), names,
               "files that were got")
        expect(case.hub.sent, {name: len(case.hub.files[name]) for name in names}, "bytes of each")
        head = [request for request in case.hub.log if request.method == "HEAD"]
        assert all(request.path.split("/")[4] == COMMIT for request in head[1:]
                   if "/resolve/" in request.path), head
        case.out.unlink()
        case.check_works()
        expect(case.hub.asked(), [], "what is in the cache is not asked for")

    done = run([sys.executable, ROOT / "export_weights.py", MODEL], env=case.environment(),
               cwd=case.out.parent)
    expect((done.code, sorted(os.listdir(case.out.parent))),
           (0, ["model.bin", "tiny.model-1.bin"]), done.err)


@test("a hub name is one: what cannot be a directory or a name is refused without a question")
def what_a_hub_name_is():
    case = Case()
    for name in ("model", "a/b/c", "./a/b", "/a/b", "a/", "/b", "a//b", "a/../b", "../b", "a/..",
                 "a/.b", "-a/b", "a/b.", "a--b/c", "a/b..c", "a/b c", "a/b\n", "a/b%2f", "é/b",
                 "a/b?c", "a\\b/c", "http://a/b", ""):
        code, err = case.run(model=name)
        expect((code, err.count("\n"), case.hub.log), (1, 1, []), name)
        assert "org/model" in err and "directory" in err, err
    case.check_fails(["has no config.json", "some-org/tiny.model-1", "revision dev"], "--revision",
                     "dev", lines=1)
    code, err = case.run(model="some-org/other")
    assert code == 1 and "some-org/other" in err and "check the name" in err, err


@test("a slip in a folder's name is called that, at once where it can be told and at the end of "
      "all tries where not")
def mistyped_folder():
    case = Case()
    (case.top / "tests").mkdir()
    (case.top / "a file").write_text("x")
    here = os.getcwd()
    os.chdir(case.top)
    try:
        for name, words in (("tests/tyni", ["no directory tests/tyni", "--revision main"]),
                            ("./tests/tyni", ["no directory"]), ("~/models/x", ["no directory"]),
                            (str(case.top / "tyni"), ["no directory", "tyni"]),
                            ("a file", ['"a file" is a file']),
                            ("https://huggingface.co/some-org/tiny.model-1/tree/main",
                             ["some-org/tiny.model-1"])):
            code, err = case.run(model=name)
            expect((code, err.count("\n"), case.hub.log, case.waits), (1, 1, [], []), name)
            for word in words:
                assert word in err, "no %r in %r" % (word, err)
        # The model on the hub all the same: what is asked for by its revision, and what is in the
        # cache.
        (case.top / MODEL.split("/")[0]).mkdir()
        expect(case.run()[0], 1)
        case.check_works("--revision", "main")
        case.check_works()
        expect(case.hub.log, [])
    finally:
        os.chdir(here)
    case = Case()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = "http://127.0.0.1:%d" % free.getsockname()[1]
    none = "no directory %s here" % MODEL
    case.check_fails([none, "given up after 6 tries"], HF_ENDPOINT=nobody)
    case.check_fails(["no directory here"], HF_HUB_OFFLINE=1)
    for code in (401, 404):
        case.hub.faults["hub", "HEAD", "config.json"] = [status(code)]
        case.check_fails([none])


@test("a model whose weights are of another kind is told what it has on the hub")
def weights_of_another_kind():
    for missing, there, words in ((WEIGHTS, "pytorch_model.bin", ["PyTorch", "save_pretrained"]),
                                  (WEIGHTS, "pytorch_model.bin.index.json",
                                   ["PyTorch", "save_pretrained"]),
                                  ("config.json", "adapter_config.json",
                                   ["adapter", "merge_and_unload"])):
        files = dict(model_files())
        del files[missing]
        case = Case({**files, there: b"{}"})
        err = case.check_fails(["%s on the hub has no model.safetensors but %s" % (MODEL, there),
                                *words])
        assert "no directory" not in err, err
        assert (not case.waits and not [name for method, name in case.hub.asked()
                                        if method == "GET"]), case.hub.log


@test("weights in several formats: only those that are read are asked for")
def several_formats():
    for shards in (1, 2):
        case = Case(model_files(shards))
        others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json",
                  "model.gguf")
        case.hub.files.update(dict.fromkeys(others, b"{}"))
        expect(case.run()[0], 0)
        expect({name for _, name in case.hub.asked()} & set(others), set())


@test("--revision: branches, tags, pull requests and commits; a way out of the cache is refused")
def revisions():
    hub = FakeHub(dict(model_files()))
    for revision in ("v1.0", "feature/new+1", "refs/pr/3", COMMIT, "a b"):
        hub.revisions[revision] = COMMIT
        case = Case(hub=hub)
        expect(case.run("--revision", revision)[0], 0, revision)
        case.check_exported()
        case.check_cache(revision)
        expect(case.folder.joinpath("refs", "main").exists(), False)
        expect(case.run("--revision=" + revision, HF_HUB_OFFLINE=1)[0], 0, revision)
        expect(case.run(HF_HUB_OFFLINE=1)[0], 1, "main is not known yet")
    case = Case(hub=hub)
    for revision in ("..", "../../x", "a/../b", "/etc", "a//b", "a/", ".", "", "a\\b", "a\nb",
                     "a\0b", "a\udcffb"):
        case.check_fails(["--revision"], "--revision=" + revision, lines=1)
        expect(hub.log, [], revision)
    done = run([sys.executable, ROOT / "export_weights.py", case.top, "--revision", "main"])
    assert done.code == 2 and "--revision" in done.err, done.err
    hub.revisions[COMMIT] = OTHER
    case.check_fails(["X-Repo-Commit", OTHER], "--revision", COMMIT)


@test("the cache is used before the network, and alone with HF_HUB_OFFLINE in all its spellings")
def cache_before_network():
    case = Case()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        for value in ("1", "ON", "on", "YES", "yes", "True", "TRUE"):
            case.check_fails(["HF_HUB_OFFLINE", MODEL, str(case.folder)], lines=1, **{name: value})
            expect(case.hub.log, [], value)
    case.check_works(HF_HUB_OFFLINE="0")
    for name in MAIN_FILES:   # what is not whole is not used
        (case.folder / "snapshots" / COMMIT / name).unlink()
        code, err = case.run(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="0")
        assert code == 1 and "not whole" in err and case.hub.log == [], err
        # The first that is set counts.
        case.check_works(HF_HUB_OFFLINE="no", TRANSFORMERS_OFFLINE="1")
        expect([pair for pair in case.hub.asked() if pair[0] == "GET"], [],
               "the blobs are still there")
    case.check_works(HF_HUB_OFFLINE="", TRANSFORMERS_OFFLINE="yes",
                     HF_ENDPOINT="http://127.0.0.1:9")
    case.check_works(HF_TOKEN="bad\x01token", HF_ENDPOINT="nonsense")
    for ref in ("", "main", "../../x", "\0" * 40, COMMIT.upper(), OTHER):
        (case.folder / "refs" / "main").write_text(ref)
        expect(case.run(HF_HUB_OFFLINE="1")[0], 1, ref)
    case.check_works()

    case = Case(model_files(2))
    case.check_works()
    (case.folder / "snapshots" / COMMIT / "model-00002-of-00002.safetensors").unlink()
    assert "not whole" in case.run(HF_HUB_OFFLINE="1")[1]


@test("the cache is where huggingface_hub has it: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, the "
      "home directory")
def places_of_the_cache():
    hub = FakeHub(dict(model_files()))
    for variables, place in [
            ({"HOME": "{top}/a"}, "a/.cache/huggingface/hub"),
            ({"XDG_CACHE_HOME": "{top}/b"}, "b/huggingface/hub"), ({"HF_HOME": "{top}/c"}, "c/hub"),
            ({"HF_HUB_CACHE": "{top}/d"}, "d"),
            ({"HUGGINGFACE_HUB_CACHE": "{top}/e", "HF_HOME": "/f"}, "e"),
            ({"HF_HUB_CACHE": "~/$PLACE/${{PLACE}}", "HUGGINGFACE_HUB_CACHE": "/g", "HOME": "{top}",
              "PLACE": "h"}, "h/h"), ({"HF_HOME": "~/$PLACE", "HOME": "{top}", "PLACE": "i",
                                       "XDG_CACHE_HOME": "/j"}, "i/hub")]:
        case = Case(hub=hub)
        case.folder = case.top / place / case.folder.name
        variables = {name: value.format(top=case.top) for name, value in variables.items()}
        case.check_works(**{"HF_HOME": None, **variables})


# ---- The token --------------------------------------------------------------------------------

@test("the token comes from where huggingface_hub has it, goes to the hub alone and "
      "into no message")
def token_stays_secret():
    hub = FakeHub(dict(model_files()))

    def sent(**environment):
        """The tokens that the hub was given, by a run in a fresh cache."""
        case = Case(hub=hub)
        (case.top / "home").mkdir()
        for name in ("home/token", "another"):
            (case.top / name).write_text("\n %s-of-%s\r\n" % (TOKEN, name[-5:]))
        environment = {name: value.format(top=case.top) for name, value in environment.items()}
        err = case.check_works(**environment)
        assert TOKEN not in err, err
        expect([r.headers["Authorization"] for r in hub.log if r.host == "cdn"], [None],
               "the other host")
        tokens = {r.headers["Authorization"] for r in hub.log if r.host == "hub"}
        assert len(tokens) == 1, tokens
        return tokens.pop()
    in_file = "Bearer %s-of-token" % TOKEN
    for want, environment in [
            (in_file, {}), (in_file, {"HF_TOKEN": ""}), (in_file, {"HF_TOKEN": " \n"}),
            ("Bearer %s-of-other" % TOKEN, {"HF_TOKEN_PATH": "{top}/another"}),
            (None, {"HF_TOKEN_PATH": "{top}/none"}),
            ("Bearer x", {"HF_TOKEN": " x\r\n", "HF_TOKEN_PATH": "{top}"}),
            ("Bearer x", {"HUGGING_FACE_HUB_TOKEN": "x"}),
            ("Bearer y", {"HUGGING_FACE_HUB_TOKEN": "x", "HF_TOKEN": "y"}),
            (None, {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN": "x"}),
            ("Bearer x", {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "0", "HF_TOKEN": "x"})]:
        expect(sent(**environment), want, str(environment))

    # A redirect to another host, for HEAD and GET and a small file too.
    case = Case(hub=hub)
    elsewhere = with_headers(X_Repo_Commit=None, Location=hub.other + "/config.json")
    for method in ("HEAD", "GET"):
        hub.faults["hub", method, "config.json"] = [lambda a: (a.__init__(302), elsewhere(a))]
    hub.faults["cdn", "HEAD", "config.json"] = [with_headers(X_Repo_Commit=COMMIT,
                                                             ETag=hub.etag("config.json"))]
    case.check_works(HF_TOKEN=TOKEN)
    expect([(r.method, r.headers["Authorization"]) for r in hub.log if r.host == "cdn"
            and r.name == "config.json"], [("HEAD", None), ("GET", None)])

    # Tokens that the HTTP library would complain of, showing them.
    for end in ("\x01", "\x7f", "\u00e9", "\u2603", "\udcff"):
        case = Case(hub=hub)
        err = case.check_fails(["token", "characters"], HF_TOKEN=TOKEN + end, lines=1)
        expect(hub.log, [], err)
    case = Case(hub=hub)
    (case.top / "bytes").write_bytes(TOKEN.encode() + b"\xff")
    case.check_fails(["token", "characters"], HF_TOKEN_PATH=case.top / "bytes", lines=1)


@test("401, 403 and 404 are said once and in full: conditions, HF_TOKEN, model, revision, file")
def refused_access():
    page = ["check the name", "accept the conditions on http://127.0.0.1:",
            "/%s and set HF_TOKEN" % MODEL]
    for code, words in ((401, page), (403, page), (404, ["has no", "--revision"]), (400, []),
                        (410, []), (451, [])):
        for method in ("HEAD", "GET"):
            for name in ("config.json", WEIGHTS):
                case = Case()
                # The server repeats the token, as it should not.
                case.hub.faults["hub", method, name] = [
                    always(status(code, X_Error_Message="bad token " + TOKEN))]
                # Where there is no model.safetensors there may be an index.
                named = INDEX if (code, method, name) == (404, "HEAD", WEIGHTS) else name
                revision = ("revision "
                            + ("main" if (method, name) == ("HEAD", "config.json") else COMMIT))
                number = [] if code == 404 else [str(code)]
                case.check_fails(["%s of %s at %s" % (named, MODEL, revision), *number, *words],
                                 HF_TOKEN=TOKEN)
                expect((case.waits, case.hub.asked("hub").count((method, name))), ([], 1),
                       "%s %s" % (method, name))


# ---- Faults that pass -------------------------------------------------------------------------

@test("a busy server and a cut connection are tried again, and what came is not asked for twice")
def busy_server():
    size = len(model_files()[WEIGHTS])
    third, some = size // 3, size // 20

    def no_length(answer):
        with_headers(Content_Length=None)(answer)
        cut(third)(answer)
    for what, place, faults, starts in [
            ("busy at first", ("hub", "HEAD", "config.json"),
             [status(n) for n in (500, 502, 503, 504, 408)], [0]),
            ("busy later", ("hub", "GET", "tokenizer.json"), [status(503), status(429)], [0]),
            ("the other host busy", ("cdn", "GET", WEIGHTS), [status(500)], [0, 0]),
            ("no HTTP", ("hub", "HEAD", WEIGHTS), [lambda answer: answer.__init__(b"garbage")],
             [0]),
            ("cut off", ("cdn", "GET", WEIGHTS), [cut(third)], [0, third]),
            ("cut off without a length", ("cdn", "GET", WEIGHTS), [no_length], [0, third]),
            ("many cuts", ("cdn", "GET", WEIGHTS), [cut(some)] * 12, [some * n for n in range(13)]),
            ("cut before a byte", ("cdn", "GET", WEIGHTS), [cut(0)] * 5, [0] * 6),
            # What came before may be lost.
            ("reset", ("cdn", "GET", WEIGHTS), [cut(third, reset=True)], None)]:
        case = Case()
        case.hub.faults[place] = list(faults)
        case.check_works()
        expect((case.hub.faults[place], len(case.waits)), ([], len(faults)), what)
        if starts:
            ranges = [request.headers["Range"] for request in case.hub.log if request.host == "cdn"]
            expect(ranges, ["bytes=%d-" % start if start else None for start in starts], what)
            expect(case.hub.sent[WEIGHTS], size, what + ": bytes sent")


@test("what answers and speaks no HTTP, and a proxy that refuses, is shown in one short line that a "
      "terminal may be given")
def no_http():
    case = Case()
    for said in (b"SSH-2.0-\x1b[31mx\r\nmore\r\n", b"HTTP/1.1 x\ty\r\n\r\n", b"x" * 9999,
                 b"HTTP/1.1 407 \x1b[31mx\xff" + b"y" * 999 + b"\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            def answer():
                for _ in range(export_weights.TRIES):
                    with server.accept()[0] as client:
                        client.recv(1 << 16)
                        client.sendall(said)
            threading.Thread(target=answer, daemon=True).start()
            here, of_proxy = "http://127.0.0.1:%d" % server.getsockname()[1], b" 407 " in said
            err = case.check_fails(
                ["given up after 6 tries", "407" if of_proxy else said[:4].decode()], lines=6,
                HF_ENDPOINT="https://hub.invalid" if of_proxy else here, https_proxy=here)
        assert all(line.isprintable() and len(line) < 350 for line in err.splitlines()), err


@test("the wait doubles with chance in it; Retry-After counts as seconds or a date, up to "
      "five minutes")
def waits_between_tries():
    def waits(*faults):
        case = Case()
        case.hub.faults["hub", "HEAD", "config.json"] = [*faults, status(404)]   # done
        err = case.check_fails(["has no config.json"])
        expect(err.count("next try in"), len(faults), err)
        return case.waits
    first = set()
    for _ in range(4):
        got = waits(*[status(503)] * 5)
        assert all(2 ** n / 2 <= wait <= 2 ** n for n, wait in enumerate(got)), got
        first.add(got[0])
    assert len(first) == 4, "no chance in %s" % first
    soon, past = (email.utils.formatdate(time.time() + seconds, usegmt=True)
                  for seconds in (250, -100))
    for text, least, most in (("7", 7, 7), ("0", 0, 0), ("300", 300, 300),
                              ("301", 300, 300), ("9" * 9, 300, 300), (soon, 100, 250),
                              (past, 0, 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 300, 300)):
        for code in (429, 503):
            [wait] = waits(status(code, Retry_After=text))
            assert least <= wait <= most, (code, text, wait)
    for text in ("", "-5", "soon", "1.5", "1e9", "nan", "9" * 99, " , ", "Fri, 99 Foo 2099",
                 "\u00b2", "1 Jan 0001"):
        [wait] = waits(status(429, Retry_After=text))
        assert 0 <= wait <= 1, (text, wait)


@test("429: the wait lasts to the end of the window that RateLimit tells, and a second more, up to "
      "five minutes")
def rate_limit():
    def wait(code=429, **headers):
        case = Case()
        case.hub.faults["hub", "HEAD", "config.json"] = [status(code, **headers)]
        case.check_works()
        [wait] = case.waits
        return wait
    # The first is the hub's own form; then what structured fields (RFC 8941) allow, and several
    # windows.
    for text, want in (('"api";r=0;t=45', 46), ('"resolvers";r=0;t=300', 301), ('"api";r=0;t=0', 1),
                       ('"api";r=0;t=301', 301), ('"api";r=0;t=' + "9" * 9, 301),
                       ('"api"; r=0; t=45', 46), ('"api";t=45;r=0', 46),
                       ('"api";r=0;t=45;pk=:cHJ=:', 46), ('"api";r=0;t=45, "pages";r=3;t=200', 46),
                       ('"api";r=0;t=45, "pages";r=0;t=200', 201)):
        expect(wait(RateLimit=text), want, text)
        expect(wait(ratelimit=text), want, text)
    expect(wait(RateLimit='"api";r=0;t=45', Retry_After="7"), 46, "both: the longer")
    expect(wait(RateLimit='"api";r=0;t=45', Retry_After="70"), 70, "both: the longer")
    for text in ('"api";r=7;t=45', '"api";r=0', '"api";t=45', '"api"', "", '"api";r=0;t=-5',
                 '"api";r=0;t=1.5', '"api";r=0;t=' + "9" * 40, "r=0 t=45"):
        assert 0 <= wait(RateLimit=text) <= 1, text   # no window is used up: as without it
        expect(wait(RateLimit=text, Retry_After="7"), 7, text)
    assert 0 <= wait(503,
                     RateLimit='"api";r=0;t=45') <= 1, "a server that is down is not waited for so"


@test("a fault that does not pass ends after six tries in vain, and the next run goes on where "
      "this one stopped")
def lasting_fault():
    case = Case()
    size = len(case.hub.files[WEIGHTS])
    case.hub.faults["cdn", "GET", WEIGHTS] = [cut(1000), cut(5000), always(status(503))]
    case.check_fails([WEIGHTS, "503", "6 tries", "goes on where it stopped"])
    # A cut that brought something, five 503.
    expect((len(case.waits), case.partial().stat().st_size), (6, 6000))
    case.hub.faults.clear()
    case.check_works()
    expect([request.headers["Range"] for request in case.hub.log if request.host == "cdn"],
           ["bytes=6000-"])
    expect(case.hub.sent[WEIGHTS], size - 6000)

    # Nobody there, and a server that falls silent.
    case = Case()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = "http://127.0.0.1:%d" % free.getsockname()[1]
    case.check_fails(["config.json", "127.0.0.1", "refused"], HF_ENDPOINT=nobody)
    expect(len(case.waits), 5)
    silence = threading.Event()
    case.hub.faults["cdn", "GET", WEIGHTS] = [lambda answer: setattr(answer, "pause", silence)]
    with mock.patch.object(export_weights, "TIMEOUT", 3):
        err = case.check_works()
    silence.set()
    assert "the connection broke after %d of %d bytes" % (size // 2, size) in err, err


# ---- Servers that lie -------------------------------------------------------------------------

@test("partial content that is not what was asked for, or that is another file's, gives the right "
      "file all the same")
def odd_partial_content():
    def with_partial(data, *faults):
        case = Case()
        case.folder.joinpath("blobs").mkdir(parents=True)
        case.partial().write_bytes(data)
        case.hub.faults["cdn", "GET", WEIGHTS] = list(faults)
        case.check_works()
        assert not case.hub.faults["cdn", "GET", WEIGHTS]
        return case.hub.sent[WEIGHTS], [r.headers["Range"] for r in case.hub.log if r.host == "cdn"]
    whole = model_files()[WEIGHTS]
    size, half = len(whole), len(whole) // 2
    begun = "bytes=%d-" % half

    def whole_again(answer):   # the range ignored
        answer.__init__(200, {}, whole)
    expect(with_partial(whole[:half]), (size - half, [begun]))
    expect(with_partial(whole[:half], whole_again), (size, [begun]), "200")
    cut_again = with_partial(whole[:half],
                             lambda answer: (whole_again(answer), cut(half // 2)(answer)))
    expect(cut_again, (half // 2 + size - half, [begun] * 2),
           "200 and a cut: nothing of what we had is lost")
    for text in ("bytes 0-%d/%d" % (size - 1, size), "bytes %d-%d/%d" % (half + 1, size - 1, size),
                 "", "bytes", None, "bytes %d" % half, "bytes -%d-9/%d" % (half, size),
                 "bytes */%d" % size):
        expect(with_partial(whole[:half], with_headers(Content_Range=text))[1],
               [begun, None], str(text))
    expect(with_partial(whole[:half],
                        with_headers(Content_Range="bytes %d-%d/*" % (half, size - 1)))[1],
           [begun], "*")
    expect(with_partial(whole[:half], status(416))[1], [begun, None], "416")
    expect(with_partial(whole), (0, []), "all of it is there")
    expect(with_partial(whole + b"more"), (0, []), "more than all of it")
    expect(with_partial(flipped(whole)), (size, [None]), "all of it and damaged")
    expect(with_partial(b"x" * half), (2 * size - half, [begun, None]),
           "the beginning of something else")
    expect(with_partial(b"x" * (size + 1)), (size, [None]))


@test("a wrong hash: once more from the start, then a failure that leaves nothing; "
      "sha256 and git's")
def wrong_hash():
    for name, host in ((WEIGHTS, "cdn"), ("config.json", "hub")):
        size = len(model_files()[name])
        case = Case()
        case.hub.faults[host, "GET", name] = [body(flipped)]
        assert "damaged" in case.check_works()
        case = Case()
        case.hub.faults[host, "GET", name] = [cut(10), always(body(flipped))]
        case.check_fails([name, "hash", case.hub.etag(name)])
        assert not case.partial(name).exists() and not case.blob(name).exists()
        expect(case.hub.sent[name], 10 + size - 10 + size, "once more and no more")
        case.hub.faults.clear()
        case.check_works()


@test("lengths that lie: nothing but the size that the hub names is taken")
def lying_lengths():
    whole = model_files()[WEIGHTS]
    size = len(whole)
    for what, fault, words in [
            ("long", with_headers(Content_Length=str(size + 5)), [str(size + 5)]),
            ("short", with_headers(Content_Length=str(size - 5)), [str(size - 5)]),
            ("nonsense", with_headers(Content_Length="-1"), ["-1"]),
            ("text", with_headers(Content_Length="x\ty" * 99), ["x\\ty", "..."]),
            ("another file's",
             lambda a: a.__init__(200, {}, b"<html>Please log in</html>"), ["26"])]:
        case = Case()
        case.folder.joinpath("blobs").mkdir(parents=True)
        case.partial().write_bytes(b"")
        case.hub.faults["cdn", "GET", WEIGHTS] = [always(fault)]
        case.check_fails([WEIGHTS, str(size), *words])
        expect(case.partial().stat().st_size, 0, what)
        case.hub.faults["cdn", "GET", WEIGHTS] = [fault]
        case.check_works()
    # A longer body than announced, and one without a length: the file is taken, the rest is not.
    for fault in (lambda a: setattr(a, "body", a.body + b"more"),
                  lambda a: (with_headers(Content_Length=None)(a),
                             setattr(a, "body", a.body + b"more"))):
        case = Case()
        case.hub.faults["cdn", "GET", WEIGHTS] = [fault]
        case.check_works()
    for linked in (size + 5, size - 5, 0):   # the hub's own size is wrong
        case = Case()
        case.hub.faults["hub", "HEAD", WEIGHTS] = [with_headers(X_Linked_Size=str(linked))]
        case.check_fails([WEIGHTS])
        assert not case.blob(WEIGHTS).exists()


@test("an answer that is not a hub's is refused before a byte is written")
def not_a_hub():
    for header, values in {
            "X_Repo_Commit": [None, "", "main", COMMIT[:-1], COMMIT + "0", COMMIT.upper(),
                              "../" * 13 + "x"],
            "ETag": [None, "", '""', "../../../x", '"%s"' % ("a" * 39), '"%s"' % ("A" * 40),
                     '"%s-gzip"' % ("a" * 40)],
            "Content_Length": [None, "", "x", "-1", "1e3", "9" * 16]}.items():
        for value in values:
            case = Case()
            case.hub.faults["hub", "HEAD", "config.json"] = [with_headers(**{header: value})]
            case.check_fails(["config.json", "HF_ENDPOINT"], lines=1)
            expect(case.folder.exists(), False, "%s: %r" % (header, value))
    for name in ("tokenizer.json", WEIGHTS):   # another commit half-way
        case = Case()
        case.hub.faults["hub", "HEAD", name] = [always(with_headers(X_Repo_Commit=OTHER))]
        case.check_fails([name, COMMIT, OTHER])
    case = Case()   # the length of the redirect is not the file's
    case.hub.faults["hub", "HEAD", WEIGHTS] = [with_headers(X_Linked_Size=None)]
    case.check_fails([WEIGHTS + ": size"])
    case = Case()
    # A hotel's network.
    case.hub.faults["hub", "HEAD", "config.json"] = [lambda a: a.__init__(200, {}, b"<html>")]
    case.check_fails(["config.json", "X-Repo-Commit", "network"], lines=1)


@test("generation_config.json comes along where the hub has one, and its end tokens are in the file")
def generation_config():
    files = dict(model_files(), **{"generation_config.json": b'{"eos_token_id": [3, 1]}'})
    case = Case(files)
    case.check_works()         # compares the file with that of a directory, and the cache's files
    expect((ModelFile(case.out).start, ModelFile(case.out).ends), (0, [3, 1]))
    case.check_works(HF_HUB_OFFLINE="1")
    # Another program may have left it out: the hub is asked, if it may be.
    (case.folder / "snapshots" / COMMIT / "generation_config.json").unlink()
    code, err = case.run(HF_HUB_OFFLINE="1")
    expect((code, ModelFile(case.out).ends), (0, [1]))
    assert "has no generation_config.json" in err and case.hub.log == [], err
    case.check_works()
    expect(ModelFile(case.out).ends, [3, 1])
    case = Case()
    case.check_works()
    expect(ModelFile(case.out).ends, [1])
    assert case.hub.log
    case.check_works()
    expect(case.hub.log, [], "that there is none is remembered, as huggingface_hub does")


@test("redirects: in circles, to other kinds of addresses, to bad ones and away from https "
      "they are refused")
def redirects():
    def to(location):
        return always(lambda answer: answer.__init__(302, {"Location": location}))
    for method in ("HEAD", "GET"):
        case = Case()
        for name, target in (("config.json", "/x/resolve/y/again"),
                             ("again", "/x/resolve/y/config.json")):
            case.hub.faults["hub", method, name] = [to(target)]
        case.check_fails(["config.json", "redirects"])
        assert len(case.hub.log) <= 5 + 10 and not case.waits, case.hub.asked()
        for location in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x",
                         "http://user:%s@127.0.0.1/" % TOKEN, "http://[/x?Signature=",
                         "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://a..b/",
                         "javascript:x", "http://127.0.0.1/\u00e9", "http://127.0.0.1/ x",
                         "http://%s/" % ("a" * 70), "https://"):
            case = Case()
            case.hub.faults["hub", method, "config.json"] = [to(location)]
            case.check_fails(["redirect", "address"], HF_TOKEN=TOKEN)
            assert not case.waits, location
    for endpoint in ("", "127.0.0.1:1", "file:///x", "ftp://x", "https://",
                     "http://user:%s@127.0.0.1" % TOKEN, "http://[", "http://127.0.0.1:0x1"):
        case = Case()
        case.check_fails(["HF_ENDPOINT"], HF_ENDPOINT=endpoint, lines=1)
    # A server that speaks https would need a certificate: what it says is made up.
    answer = mock.Mock(status=302,
                       headers={"Location": "http://127.0.0.1/x", "X-Repo-Commit": COMMIT})
    for said, word in ((mock.Mock(return_value=answer), "encryption"),
                       (mock.Mock(side_effect=urllib.error.URLError(
                               ssl.SSLCertVerificationError(1, "self-signed certificate"))),
                        "SSL_CERT_FILE")):
        with mock.patch.object(urllib.request.OpenerDirector, "open", said):
            Case().check_fails(["huggingface.co", word], HF_ENDPOINT=None, lines=1)


@test("an index whose shards lead out of the directory is refused before one is asked for")
def shards_outside():
    for shard in ("../x.safetensors", "/etc/passwd", "a/b", "..", "", 3, "a\0b", "a?b",
                  "a%2fb", ".hidden"):
        files = dict(model_files(2))
        index = json.loads(files[INDEX])
        index["weight_map"]["embed_out.weight"] = shard
        files[INDEX] = json.dumps(index).encode()
        case = Case(files)
        case.check_fails([INDEX, "plain file name"])
        expect([name for _, name in case.hub.asked() if name.endswith(".safetensors")],
               [WEIGHTS], str(shard))
    files = dict(model_files(2))
    del files["model-00002-of-00002.safetensors"]
    Case(files).check_fails(["has no model-00002-of-00002.safetensors"])


# ---- The disk, signals, company ---------------------------------------------------------------

@test("a full disk: seen before the download, or said while it is written, and the "
      "next run goes on")
def full_disk():
    case = Case()
    needed = sum(map(len, case.hub.files.values()))
    with mock.patch.object(export_weights.shutil, "disk_usage",
                           lambda path: mock.Mock(free=needed - 1)):
        case.check_fails(["%d bytes of room" % needed, str(needed - 1), "HF_HOME"])
        expect([pair for pair in case.hub.asked() if pair[0] == "GET"], [])
    case.folder.joinpath("blobs").mkdir(exist_ok=True)
    case.partial().write_bytes(case.hub.files[WEIGHTS][:5000])   # what is there needs no room
    with mock.patch.object(export_weights.shutil, "disk_usage",
                           lambda path: mock.Mock(free=needed - 5001)):
        case.check_fails(["%d bytes of room" % (needed - 5000)])

    case = Case()
    child = case.start("resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))")
    err = child.communicate(timeout=PATIENCE)[1].decode()
    expect(child.returncode, 1, err)
    assert ("File too large" in err and "ulimit -f" in err and str(case.folder) in err
            and "Traceback" not in err), err
    expect((case.partial().stat().st_size, os.listdir(case.out.parent)), (100000, []))
    case.check_works()
    expect([r.headers["Range"] for r in case.hub.log if r.host == "cdn"], ["bytes=100000-"])

    case = Case()
    (case.top / "home").write_text("a file")
    case.check_fails(["cannot download", "Not a directory", "HF_HOME"], lines=2)
    case = Case()   # folders in the place of files
    ref, blob = case.folder / "refs" / "main", case.blob("tokenizer.json")
    ref.mkdir(parents=True)
    code, err = case.run()
    assert (code == 1 and str(ref) + ": " in err and "out of the way" in err
            and not case.hub.log), err
    ref.rmdir()
    blob.mkdir(parents=True)
    case.check_fails(["cannot download to %s: Is a directory; move" % blob], lines=2)
    case = Case()   # OUT is looked at before a byte is asked for
    case.out = case.top / "none" / "model.bin"
    code, err = case.run()
    assert code == 1 and "expected a directory" in err and not case.hub.log, err
    case = Case()   # a disk without links
    with mock.patch.object(os, "symlink",
                           side_effect=PermissionError(1, "Operation not permitted")):
        expect(case.run()[0], 0)
    case.check_exported()
    expect(case.run(HF_HUB_OFFLINE=1)[0], 0)


@test("each fault of the cache's disk comes with what mends it, and with the variable that "
      "moves the cache")
def faults_of_the_disk():
    for number, words in ((errno.ENOSPC, ["make room on that disk"]), (errno.EDQUOT, ["quota"]),
                          (errno.EACCES, ["the right"]), (errno.EPERM, ["the right"]),
                          (errno.EROFS, ["mounted for writing"]),
                          (errno.EFBIG, ["ulimit -f"]), (errno.EIO, ["whether that disk is well"]),
                          (errno.ENAMETOOLONG, ["shorter names"]),
                          (errno.ENOTDIR, ["out of the way"]), (errno.ESTALE, [])):
        fault = OSError(number, os.strerror(number), "/some/place")
        for method in ("fetch", "fetch_all"):
            case = Case()
            with mock.patch.object(export_weights.Hub, method, side_effect=fault):
                err = case.check_fails(["cannot download to /some/place: " + os.strerror(number),
                                        "set HF_HOME to", "goes on where it stopped", *words],
                                       lines=2)
            assert number in (errno.ENOSPC, errno.EDQUOT) or "make room" not in err, err
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        case = Case()
        case.folder = case.top / "cache" / case.folder.name
        with mock.patch.object(export_weights.Hub, "fetch", side_effect=OSError(errno.EIO, "x")):
            case.check_fails(["cannot download to %s" % case.folder, "set %s to" % name],
                             **{name: case.top / "cache"})
    case = Case()
    (case.top / "token").write_text(TOKEN)
    opened = open

    def closed(path, *args, **options):
        if str(path).endswith("/token"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)
    with mock.patch("builtins.open", closed):
        case.check_fails(["cannot read the token in %s" % (case.top / "token"), "HF_TOKEN"],
                         HF_TOKEN_PATH=case.top / "token", lines=1)


@test("a part of the cache that may not be looked at is said to be closed, and not taken for absent")
def closed_cache():
    case = Case()
    case.check_works()
    (case.top / "token").mkdir()
    (case.top / "token" / "token").write_text(TOKEN)
    case.top.chmod(0o755)
    case.out.unlink()
    case.out.parent.chmod(0o777)
    case.hub.log.clear()
    blobs, refs, snapshots = (case.folder / name for name in ("blobs", "refs", "snapshots"))
    for closed, said, environment in (
            (refs, "cannot read %s/main" % refs, {"HF_HUB_OFFLINE": 1}),
            (snapshots, "cannot read %s" % snapshots, {}), (blobs, "cannot read", {}),
            (case.top / "token", "cannot read the token in",
             {"HF_HUB_CACHE": case.out.parent, "HF_TOKEN_PATH": case.top / "token" / "token"})):
        closed.chmod(0)
        child = case.start("import os\n" + unprivileged(), **environment)
        err = child.communicate(timeout=PATIENCE)[1].decode()
        closed.chmod(0o755)
        assert (child.returncode == 1 and err.count("\n") == 1 and said in err
                and "Permission denied; get the right" in err), err
        expect((case.hub.log, list(case.out.parent.iterdir())), ([], []), err)


def no_locks(number):
    return mock.patch.object(fcntl, "flock", side_effect=OSError(number, os.strerror(number)))


@test("a cache on a disk without locks, or whose locks keep nobody out, stops and "
      "damages no download")
def no_working_locks():
    for number in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
        case = Case()
        with no_locks(number):
            case.check_works()
    case = Case()
    (case.top / "home" / "hub").mkdir(parents=True)
    (case.top / "home" / "hub" / ".locks").write_text("a file, where no lock can lie")
    case.check_works()
    size = len(case.hub.files[WEIGHTS])
    case = Case()   # what came before a break is resumed there too
    with no_locks(errno.ENOSYS):
        case.hub.faults["cdn", "GET", WEIGHTS] = [cut(5000), always(status(403))]
        case.check_fails([WEIGHTS])
        case.hub.faults.clear()
        case.check_works()
    expect([r.headers["Range"] for r in case.hub.log if r.host == "cdn"], ["bytes=5000-"])
    expect(case.hub.sent[WEIGHTS], size - 5000)

    # Two at once, each of which is told that it has the lock. The first pauses; meanwhile the
    # second begins, meets a server that does not resume, begins again, and ends first.
    everybody = "import fcntl\nfcntl.flock = lambda *args: None"
    for fault in ([], [status(416)], [with_headers(Content_Range="bytes 1-2/3")], [cut(20000)]):
        case = Case()
        go_on = threading.Event()
        case.hub.faults["cdn", "GET", WEIGHTS] = [lambda answer: setattr(answer, "pause", go_on),
                                                  *fault]
        first = case.start(everybody)
        until(lambda: any(path.stat().st_size > size // 4
                          for path in case.folder.glob("blobs/*.incomplete")))
        other = Case(hub=case.hub)
        other.top, other.folder = case.top, case.folder
        for child in (other.start(everybody), first):
            err = child.communicate(timeout=PATIENCE)[1].decode()
            go_on.set()
            expect(child.returncode, 0, err)
            assert "damaged" not in err, err
        case.check_exported()
        case.check_cache()
        expect(case.out.read_bytes() == other.out.read_bytes(), True)


@test("a blob that is damaged and has no name in the snapshot is downloaded anew, so that removing "
      "the name helps")
def damaged_blob():
    case = Case()
    case.check_works()
    case.blob(WEIGHTS).write_bytes(flipped(case.hub.files[WEIGHTS]))
    (case.folder / "snapshots" / COMMIT / WEIGHTS).unlink()
    case.check_works()


@test("Ctrl-C and SIGTERM leave the partial file and nothing under OUT's name; kill -9 "
      "costs no more")
def stopped_download():
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        case = Case()
        go_on, size = threading.Event(), len(case.hub.files[WEIGHTS])
        case.hub.faults["cdn", "GET", WEIGHTS] = [lambda answer: setattr(answer, "pause", go_on)]
        child = case.start()
        until(lambda: case.partial().exists() and case.partial().stat().st_size > size // 4)
        child.send_signal(number)
        err = child.communicate(timeout=PATIENCE)[1].decode()
        go_on.set()
        expect((child.returncode, os.listdir(case.out.parent)), (code, []), err)
        assert number == signal.SIGKILL or err.endswith("\nexport_weights.py: stopped\n"), err
        assert "Traceback" not in err, err
        came = case.partial().stat().st_size
        assert size // 4 < came < size, came
        case.check_works()
        expect([r.headers["Range"] for r in case.hub.log if r.host == "cdn"], ["bytes=%d-" % came])


@test("a signal right after the partial file got the name of this run loses nothing of it")
def stopped_at_the_rename():
    case = Case()
    size = len(case.hub.files[WEIGHTS])
    case.folder.joinpath("blobs").mkdir(parents=True)
    case.partial().write_bytes(case.hub.files[WEIGHTS][:5000])
    child = case.start("import fcntl, os, signal\n"
                       "fcntl.flock = lambda *args: None\n"   # locks that keep nobody out
                       "rename = os.rename\n"
                       "def renamed(name, other):\n"
                       "    rename(name, other)\n"
                       "    os.kill(os.getpid(), signal.SIGTERM)\n"
                       "os.rename = renamed")
    err = child.communicate(timeout=PATIENCE)[1].decode()
    expect((child.returncode, list(case.folder.glob("blobs/*.incomplete"))),
           (143, [case.partial()]), err)
    case.check_works()
    expect(case.hub.sent[WEIGHTS], size - 5000)


@test("two exporters at once download each file once, and both have it")
def two_at_once():
    case = Case()
    go_on = threading.Event()
    case.hub.faults["cdn", "GET", WEIGHTS] = [lambda answer: setattr(answer, "pause", go_on)]
    first, second = case.start(), None
    until(case.partial().exists)
    other = Case(hub=case.hub)
    other.top, other.folder = case.top, case.folder
    second = other.start()
    waiting = second.stderr.readline() + second.stderr.readline()
    assert b"waiting for another download" in waiting, waiting
    go_on.set()
    for child in (first, second):
        err = child.communicate(timeout=PATIENCE)[1].decode()
        expect(child.returncode, 0, err)
    case.check_exported()
    case.check_cache()
    expect((case.out.read_bytes() == other.out.read_bytes(), case.hub.sent[WEIGHTS]),
           (True, len(case.hub.files[WEIGHTS])))


@test("the proxy of the environment is used")
def proxy():
    case = Case()   # the server takes whole addresses, as a proxy does
    case.check_works(HF_ENDPOINT="http://hub.invalid/", http_proxy=case.hub.endpoint,
                     no_proxy="127.0.0.1")
    assert case.hub.log[0].path.startswith("http://hub.invalid/%s/resolve/main/"
                                           % MODEL), case.hub.log[0]


@test("a proxy that does not work is named by its variable and never shown; what is no address is not "
      "tried again")
def broken_proxy():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = "%s@127.0.0.1:%d" % (TOKEN, free.getsockname()[1])   # no message has that word
    for scheme in ("http", "https"):
        name, endpoint = scheme + "_proxy", scheme + "://hub.invalid"
        case = Case()
        case.check_fails(["hub.invalid through the proxy of %s: Connection refused" % name],
                         HF_ENDPOINT=endpoint, **{name: "http://user:" + nobody})
        case.check_fails([name + " is not an address"], HF_ENDPOINT=endpoint, lines=1,
                         **{name: "http://user:" + nobody + "x"})


@test("progress: a bar with rate and time left on a terminal, else a line every ten seconds; "
      "memory stays small")
def progress_bars():
    for terminal in (True, False):
        now, shown = [1000.0], []
        with mock.patch.object(export_weights.time, "monotonic", lambda: now[0]), \
                mock.patch.object(export_weights.sys.stderr, "isatty", lambda: terminal,
                                  create=True), \
                mock.patch.object(export_weights, "draw", shown.append), \
                mock.patch.object(export_weights, "note", shown.append):
            progress = export_weights.Progress(400_000_000, 100_000_000)
            for second in range(1, 61):
                now[0] += 1
                progress.show("model.safetensors", 100_000_000 + 2_000_000 * second)
        text = "%d of 400 MB, 2.0 MB/s, %s left  model.safetensors"
        if terminal:
            expect((len(shown), shown[-1]), (60, "[%-20s] " % ("#" * 11) + text % (220, "1:30")))
        else:
            expect([shown[0], shown[-1], len(shown)],
                   [text % (120, "2:20"), text % (220, "1:30"), 6])

    case = Case()
    case.hub.files["model.safetensors"] = bytes(30_000_000)
    ours, theirs = pty.openpty()
    code = ("def stop(*_):\n    print('rss', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            "    sys.exit()\n"
            "export_weights.read_sections = stop\nstop_at = export_weights.Hub.fetch_all\n"
            "def fetch_all(*args):\n"
            "    print('rss', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
            "    stop_at(*args)\nexport_weights.Hub.fetch_all = fetch_all")
    lines = ("import resource, sys\nsys.dont_write_bytecode = True\nimport export_weights\n%s\n"
             "export_weights.main()")
    child = subprocess.Popen([sys.executable, "-c", lines % code, MODEL, "-o", case.out],
                             stderr=theirs, stdout=subprocess.PIPE,
                             env=dict(case.environment(), PYTHONPATH=str(ROOT)))
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):   # at its end
        while data := os.read(ours, 1 << 16):
            shown += data
    before, after = (int(word) for word in child.communicate(timeout=PATIENCE)[0].split()[1::2])
    assert re.search(rb"\r\[#* *\] \d+ of 30 MB, [\d.]+ MB/s, \d+:\d\d left  model.safetensors",
                     shown), shown
    assert after - before < 4000, "%d KB more while 30 MB came" % (after - before)   # 1 MB here
