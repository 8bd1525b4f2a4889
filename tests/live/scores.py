#!/usr/bin/env python3
"""Scores beside transformers, by the loop of its guide to perplexity, and beside float64 at the
real shapes.

    pip install -r tests/requirements.txt
    tests/live/scores.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import json
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from forward import Model, real_model, report
from harness import expect, run_kl3m, run_tests, selected, test


def token_scores(model, path, *options):
    """ids and log-probabilities of all tokens but the first."""
    done = run_kl3m("-m", model.bin, "--score", "--json", "--logprobs", 0, "-f", path, *options)
    expect((done.code, done.err), (0, ""))
    listed, = json.loads(done.text)["logprobs"]
    return listed["ids"], torch.tensor(listed["token_logprobs"], dtype=torch.float64)


def guide(reference, ids, context, stride):
    """huggingface.co/docs/transformers/perplexity, with each token's value instead of the mean."""
    found, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = torch.tensor([ids[begin:end]])
        target = window.clone()
        target[:, :-(end - previous)] = -100
        with torch.no_grad():
            logits = reference(window).logits[0, :-1]
        shifted = target[0, 1:]
        kept = shifted != -100
        each = torch.log_softmax(logits.double(), -1)[torch.arange(len(shifted)), shifted.clamp(0)]
        found.append(each[kept])
        previous = end
        if end == len(ids):
            break
    return torch.cat(found)


@test("with every stride each token's log-probability is transformers' on the guide's windows, to 1e-4 of it or 1e-5")
def windows():
    context, worst = 32, 0.0
    model = Model(models.make_config(max_position_embeddings=context))
    ids, path = model.prompt(90)
    for stride in range(1, context):
        got_ids, got = token_scores(model, path, "--stride", stride)
        expect(got_ids, ids[1:])
        want = guide(model.reference, ids, context, stride)
        expect(len(got), len(want))
        error = (got - want).abs()
        assert (error <= torch.clamp(1e-4 * want.abs(), min=1e-5)).all(), (stride, error.max())
        worst = max(worst, error.max().item())
    report("largest difference %.1e", worst)


@test("at the real shapes each log-probability is within 1e-4 of float64, to position 4,095")
def real_shapes():
    model = real_model()
    ids, path = model.prompt(4096, seed=2)
    got_ids, got = token_scores(model, path)
    expect(got_ids, ids[1:])
    want = []
    for start, exact in model.exact(ids):
        rows = torch.log_softmax(exact, -1)
        targets = torch.tensor(ids[start + 1:start + 1 + len(rows)])
        want.append(rows[torch.arange(len(targets)), targets])
    error = (got - torch.cat(want)).abs()
    report("largest difference from float64 %.2g, mean %.2g", error.max(), error.mean())
    assert error.max() <= 1e-4


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
