#!/usr/bin/env python3
"""The exporter and the real huggingface_hub, on one cache and one local server.

    pip install -r tests/requirements.txt
    tests/live/hub.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import copy
import json
import os
import subprocess
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import PATIENCE, expect, run_tests, selected, test
from test_export import ROTARY
from test_hub import COMMIT, MAIN_FILES, MODEL, TOKEN, WEIGHTS, Case, FakeHub, clean, model_files

import huggingface_hub  # noqa: F401  so that the tests fail at once where it is not
import transformers

# What a process with the library does; its words on standard output are JSON.
LIBRARY = """
import json, os, sys
import huggingface_hub as hub
from huggingface_hub import constants
model, names = %r, %r
def get(revision=None, names=names):
    return {name: hub.hf_hub_download(model, name, revision=revision) for name in names}
def say(value):
    print(json.dumps(value))
"""


def library(code, environment, names=MAIN_FILES):
    """Starts these lines in a process with the library."""
    environment = {"HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", LIBRARY % (MODEL, names) + code],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def said(child):
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err.decode()
    return json.loads(out)


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 30 s")


@test("what the exporter downloads, huggingface_hub and transformers find offline")
def library_finds_our_download():
    for shards in (1, 3):
        case = Case(model_files(shards))
        names = sorted(case.hub.files)
        case.hub.revisions["v1/a"] = COMMIT
        case.check_works()
        expect(case.run("--revision", "v1/a")[0], 0)
        case.hub.log.clear()
        offline = case.environment(HF_HUB_OFFLINE=1)
        for revision in (None, "main", "v1/a", COMMIT):
            found = said(library("say(get(%r))" % revision, offline, names))
            want = case.folder / "snapshots" / COMMIT
            expect(found, {name: str(want / name) for name in names}, str(revision))
        expect(said(library("say(hub.snapshot_download(model))", offline)), str(want))
        found = said(library("""
info = hub.scan_cache_dir()
[repo] = info.repos
[revision] = repo.revisions
say([len(info.warnings), repo.repo_id, repo.size_on_disk, revision.commit_hash,
     sorted(revision.refs), sorted(file.file_name for file in revision.files)])""", offline))
        size = sum(map(len, case.hub.files.values()))
        expect(found, [0, MODEL, size, COMMIT, ["main", "v1/a"], names],
               "what it makes of the cache")
        found = said(library("""
import transformers
loaded = transformers.GPTNeoXForCausalLM.from_pretrained(model)
say([transformers.AutoTokenizer.from_pretrained(model)("This Agreement").input_ids,
     loaded.config.vocab_size])""", offline))
        expect((len(found[0]) > 1, found[1]),
               (True, json.loads(case.hub.files["config.json"])["vocab_size"]))
        expect(case.hub.log, [], "asked")


@test("what huggingface_hub downloads, the exporter finds offline")
def exporter_finds_their_download():
    for shards in (1, 3):
        case = Case(model_files(shards))
        case.hub.revisions["v1/a"] = COMMIT
        for revision in (None, "v1/a"):
            said(library("say(get(%r))" % revision, case.environment(), sorted(case.hub.files)))
        case.check_works(HF_HUB_OFFLINE=1)
        for revision in ("v1/a", COMMIT):
            case.check_works("--revision", revision, HF_HUB_OFFLINE=1)
        expect(case.hub.log, [], "asked")


@test("neither downloads a blob that the other has, nor one that the other is downloading")
def shared_downloads():
    case = Case()
    said(library("say(get())", case.environment(), MAIN_FILES[:2]))
    case.check_works()
    expect({name for method, name in case.hub.asked() if method == "GET"}, {WEIGHTS})
    case.hub.log.clear()
    said(library("say(get())", case.environment()))
    expect([pair for pair in case.hub.asked() if pair[0] == "GET" and pair[1] in MAIN_FILES], [])

    for library_first in (True, False):
        case = Case()
        go_on = threading.Event()
        case.hub.faults["cdn", "GET", WEIGHTS] = [lambda answer: setattr(answer, "pause", go_on)]
        starts = [lambda: library("say(get())", case.environment()), case.start]
        first, second = starts if library_first else starts[::-1]
        first = first()
        until(lambda: ("GET", WEIGHTS) in case.hub.asked("cdn"))
        second = second()
        until(lambda: case.hub.asked("hub").count(("HEAD", WEIGHTS)) == 2)
        time.sleep(0.5)   # so that the second comes to the lock
        go_on.set()
        for child in (first, second):
            err = child.communicate(timeout=PATIENCE)[1].decode()
            expect(child.returncode, 0, err)
        case.check_exported()
        expect(case.hub.sent[WEIGHTS], len(case.hub.files[WEIGHTS]),
               "library first: %s" % library_first)


@test("cache, token and offline mode are read from the environment as huggingface_hub reads them")
def environment_variables():
    hub = FakeHub(dict(model_files()))
    for more in [{}, {"XDG_CACHE_HOME": "{top}/x"}, {"HF_HOME": "{top}/y"},
                 {"HF_HOME": "~/$USER/$NONE"}, {"HF_HUB_CACHE": "{top}/z"},
                 {"HUGGINGFACE_HUB_CACHE": "$HOME/q"}, {"HF_HOME": ""},
                 {"HUGGINGFACE_HUB_CACHE": "{top}/q", "HF_HUB_CACHE": "~/r"}, {"HF_TOKEN": " a\n"},
                 {"HUGGING_FACE_HUB_TOKEN": "b", "HF_TOKEN": ""},
                 {"HUGGING_FACE_HUB_TOKEN": "b", "HF_TOKEN": "c"}, {"HF_TOKEN": " "},
                 {"HF_TOKEN_PATH": "$HOME/token"}, {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "Yes"},
                 {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "off"}, {"HF_TOKEN_PATH": "{top}/none"},
                 *({"HF_HUB_OFFLINE": value}
                   for value in ("1", "on", "YES", "true", "0", "2", "y", "", " 1")),
                 {"TRANSFORMERS_OFFLINE": "1"},
                 {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "0"},
                 {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": ""}]:
        case = Case(hub=hub)
        for place in (".cache/huggingface", "y"):
            (case.top / place).mkdir(parents=True)
            (case.top / place / "token").write_text("%s-%s\n" % (TOKEN, place[0]))
        (case.top / "token").write_text(TOKEN)
        more = {name: value.format(top=case.top) for name, value in more.items()}
        environment = {"HOME": case.top, "USER": "me", "HF_ENDPOINT": hub.endpoint, **more}
        cache, offline, token = said(library("""
from huggingface_hub.utils import build_hf_headers
say([constants.HF_HUB_CACHE, hub.is_offline_mode(), build_hf_headers().get("authorization")])""",
                                             clean(environment)))
        os.chdir(case.top)   # for paths that are not absolute
        code, err = case.run(**{"HF_HOME": None, **environment})
        sent = {request.headers["Authorization"] for request in hub.log if request.host == "hub"}
        expect((code, sent), (1, set()) if offline else (0, {token}), "%s %s" % (more, err))
        assert (" %s/models--" % cache if offline
                else " to %s/models--" % cache) in err, (cache, err)


@test("GPTNeoXConfig of transformers makes of a config's rotary fields what the "
      "exporter's test says")
def rotary_fields():
    old = transformers.__version__.startswith("4.")
    for fields, of_4, of_5 in ROTARY:
        try:
            config = transformers.GPTNeoXConfig.from_dict(copy.deepcopy(fields))
        except KeyError:
            got = None
        else:
            rope = None if old else config.rope_parameters
            got = ((config.rope_theta, config.rotary_pct) if old else
                   (rope["rope_theta"], rope["partial_rotary_factor"]))
        expect(got, of_4 if old else of_5, str(fields))


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))   # not the tests of test_hub.py as well
