#!/usr/bin/env python3
"""Texts made under a schema, validated by Python's jsonschema: the shared schemas where they are,
and random ones.

    pip install -r tests/requirements.txt
    tests/live/schema.py
"""
import sys

sys.dont_write_bytecode = True

import json
import random
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

def otherwise(rng, value, change, as_float):
    """The value, its members in any order, whole numbers perhaps as 1.0; or, at one chance in
    `change` at each place, another value."""
    if change and rng.randrange(change) == 0:
        return rng.choice([None, 7, -0.5, "a", "", [], {}, [value], {"a": value}])
    if isinstance(value, list):
        return [otherwise(rng, item, change, as_float) for item in value]
    if isinstance(value, dict):
        members = [(name, otherwise(rng, item, change, as_float))
                   for name, item in value.items()]
        rng.shuffle(members)
        if change and members and rng.randrange(change) == 0:
            members.pop()
        return dict(members + [("not declared", 1)] * (rng.randrange(8) == 0))
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if as_float and whole and rng.random() < 0.3 else value


verdicts = {"a decision": 0, "none known": 0}     # on what is valid and refused


def judge_others(schema, path, texts):
    """The same values written otherwise, and others: a decision of kl3m is named for none that is
    not valid."""
    check, rng, lines = validator(schema), random.Random(len(texts[0])), []
    as_float = not isinstance(check, jsonschema.Draft4Validator)    # there 1.0 is no integer
    for value in map(json.loads, texts[:3]):
        for change in (0, 5):
            other = otherwise(rng, value, change, as_float)
            forms = {"separators": (",", ":")} if rng.random() < 0.5 else {}
            lines.append((other, json.dumps(other, ensure_ascii=rng.random() < 0.5, **forms)))
    done = run_kl3m("-m", model(), "--check", "--schema", path,
                    input="\n".join(text for _, text in lines).encode())
    for (value, text), verdict in zip(lines, done.text.splitlines()):
        valid, ours = check.is_valid(value), "(a decision of kl3m: " in verdict
        assert valid or not (ours or verdict == "ok"), (path.read_text(), text, verdict)
        if valid and verdict != "ok":
            verdicts["a decision" if ours else "none known"] += 1


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
            texts = made(path, n + more, "-t", t, "-k", 0, "-s", seed)
            hold(schema, path, texts)
        judge_others(schema, path, texts)
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
            texts = made(path, n + more, "-t", 2, "-k", 0, "-s", seed + more)
            hold(schema, path, texts)
        judge_others(schema, path, texts)

    one()
    compiled = sum(n is not None for n in tried)
    print("     %d schemas, %d compiled" % (len(tried), compiled))
    print("     refused for its form: %s" % verdicts)
    assert compiled > 0.5 * len(tried), (compiled, len(tried))


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:])))
