#!/usr/bin/env python3
"""Texts made under a schema, validated by Python's jsonschema: the shared schemas where they are,
and random ones.

    pip install -r tests/requirements.txt
    tests/live/schema.py
"""
import sys

sys.dont_write_bytecode = True

import json
import re
from pathlib import Path

import jsonschema
import jsonschema._keywords
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

jsonschema._keywords.re = regex    # which knows \p

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import SHARED, Skip, expect, run_kl3m, run_tests, selected, small_model, test, tmpdir

DRAFTS = {"draft-04": jsonschema.Draft4Validator, "draft-06": jsonschema.Draft6Validator,
          "draft-07": jsonschema.Draft7Validator}


def validator(schema):
    named = str(schema.get("$schema", "")) if isinstance(schema, dict) else ""
    for draft, kind in DRAFTS.items():
        if draft in named:
            return kind(schema)
    return jsonschema.Draft202012Validator(schema)


def model():
    """Random weights, small; with the real tokenizer where it is."""
    options = dict(max_position_embeddings=4096)
    if SHARED:
        tokenizer = json.loads((SHARED / "kl3m-002-170m" / "tokenizer.json").read_text())
        options.update(tokenizer=tokenizer, vocab_size=32768, hidden_size=32,
                       num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
        return _model(json.dumps(options))
    return small_model(**options)


_models = {}


def _model(options):
    from harness import export
    from models import write_model
    if options not in _models:
        folder = tmpdir()
        write_model(folder / "real", **json.loads(options))
        _models[options] = export(folder / "real")
    return _models[options]


def written(schema):
    path = tmpdir() / "schema.json"
    path.write_text(json.dumps(schema, ensure_ascii=False), encoding="utf-8")
    return path


def least(path):
    """None: the schema is refused."""
    done = run_kl3m("-m", model(), "--check", "--schema", path, input=b"")
    assert done.code in (0, 2), done.err
    return int(done.text.split()[2]) if done.code == 0 else None


def made(path, n, *args):
    """The texts of two prompts, three of each, which end within n tokens."""
    done = run_kl3m("-m", model(), "--schema", path, "-n", n, "-r", 3, "--json", *args,
                    input=b"Governing Law.\n\n")
    expect(done.code, 0, done.err)
    texts = []
    for line in done.text.splitlines():
        one = json.loads(line)
        assert max(one["new_tokens"]) <= n and set(one["finish_reason"]) <= {"schema", "length"}
        texts += one["generated_text"]
    return texts


def hold(schema, path, texts):
    """All parse, fit, and are what the program itself would accept."""
    check = validator(schema)
    for text in texts:
        errors = list(check.iter_errors(json.loads(text)))
        assert not errors, (schema, text, errors[0].message)
    done = run_kl3m("-m", model(), "--check", "--schema", path, input="\n".join(texts).encode())
    expect(set(done.text.splitlines()), {"ok"}, (schema, texts, done.text))


@test("texts under the shared schemas fit, at several seeds, temperatures and limits from the least on")
def shared():
    if SHARED is None or not (SHARED / "schemas" / "shared.jsonl").is_file():
        raise Skip("there are no shared schemas")
    compiled = 0
    for line in (SHARED / "schemas" / "shared.jsonl").open(encoding="utf-8"):
        schema = json.loads(line)["schema"]
        path = written(schema)
        n = least(path)
        if n is None:
            continue
        compiled += 1
        for seed, (more, t) in enumerate([(0, 0), (0, 1), (1, 0.3), (5, 2), (40, 1), (200, 0.3)]):
            hold(schema, path, made(path, n + more, "-t", t, "-k", 0, "-s", seed))
    print("     %d schemas" % compiled)
    assert compiled >= 78, compiled


def schemas():
    """Schemas of the supported set."""
    names = st.sampled_from(["a", "b", "ab", "\u00e9\n", '"', ""])
    count = st.integers(0, 3)
    scalar = st.none() | st.booleans() | st.integers(-50, 50) | st.sampled_from(
        ["", "a", "x\"y", "\u00e9", 0.5, -2.25])
    bounds = st.one_of(st.integers(-100, 100), st.sampled_from([0.5, -1.25, 1e3, 99.99]))

    def some(**members):
        return st.fixed_dictionaries({}, optional=members)

    leaf = st.one_of(
        some(type=st.just("string"), minLength=count, maxLength=st.integers(2, 9)),
        some(type=st.just("string"), pattern=st.sampled_from(
            ["^a+$", "[bc]", "^(x|yz){2,}$", r"^\d{2}-\w$", "a$", r"^\p{L}*$", "^[^a]?b"]),
            minLength=count),
        some(type=st.just("string"), format=st.sampled_from(
            ["date", "time", "email", "ipv4", "uuid", "duration", "hostname", "uri"])),
        some(type=st.sampled_from(["integer", "number", ["integer", "null"]]), minimum=bounds,
             maximum=bounds, multipleOf=st.integers(1, 9)),
        some(type=st.just("number"), exclusiveMinimum=bounds, exclusiveMaximum=bounds),
        st.fixed_dictionaries({"enum": st.lists(scalar | st.lists(scalar, max_size=2), min_size=1,
                                                max_size=4)}),
        st.fixed_dictionaries({"const": scalar}), st.just(True), st.just({"type": "boolean"}),
        st.just({"$ref": "#"}))

    def larger(inner):
        return st.one_of(
            some(type=st.just("object"), properties=st.dictionaries(names, inner, max_size=4),
                 required=st.lists(names, max_size=2, unique=True),
                 additionalProperties=st.booleans() | inner, minProperties=count,
                 maxProperties=st.integers(2, 5)),
            some(type=st.just("object"), patternProperties=st.dictionaries(
                st.sampled_from(["^[a-c]$", "^x", "1"]), inner, min_size=1, max_size=1),
                additionalProperties=st.just(False), minProperties=count),
            some(type=st.just("array"), items=inner | st.just(False),
                 prefixItems=st.lists(inner, min_size=1, max_size=2), minItems=count,
                 maxItems=st.integers(2, 4)),
            some(anyOf=st.lists(inner, min_size=1, max_size=3)),
            some(oneOf=st.lists(inner, min_size=1, max_size=2)),
            some(allOf=st.lists(inner, min_size=1, max_size=2)))

    return st.recursive(leaf, larger, max_leaves=8)


@test("texts under random schemas of the supported set fit")
def random_schemas():
    tried = []

    @settings(max_examples=400, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(schemas(), st.integers(0, 2 ** 31))
    def one(schema, seed):
        path = written(schema)
        n = least(path)
        tried.append(n)
        if n is None:
            return
        for more in (0, 3, 30):
            hold(schema, path, made(path, n + more, "-t", 2, "-k", 0, "-s", seed + more))

    one()
    compiled = sum(n is not None for n in tried)
    print("     %d schemas, %d compiled" % (len(tried), compiled))
    assert compiled > 0.5 * len(tried), (compiled, len(tried))


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:])))
