#!/usr/bin/env python3
"""The sampler beside transformers' own processors, on the same logits.

    pip install -r tests/requirements.txt
    tests/live/sampling.py
"""
import sys

sys.dont_write_bytecode = True

import random
from pathlib import Path

import numpy
import torch
from transformers import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import run_tests, selected, test
from test_unit import distributions


def processors(temperature, k, p, min_p, penalty):
    """In the order in which generate() puts them, each where it is in force."""
    return LogitsProcessorList(
        ([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else [])
        + [TemperatureLogitsWarper(temperature)] + ([TopKLogitsWarper(k)] if k else [])
        + ([TopPLogitsWarper(p)] if p < 1 else []) + ([MinPLogitsWarper(min_p)] if min_p else []))


@test("the sampler keeps the tokens that transformers' processors keep, with their "
      "probabilities to 1e-5")
def kept_tokens():
    draw, generator, cases = random.Random(1), numpy.random.default_rng(1), []
    for _ in range(400):
        logits = generator.normal(0, 3.6, draw.choice((50, 1001, 32768))).astype("f4")
        settings = (draw.choice((0.3, 0.7, 1.0, 2.0)), draw.choice((0, 1, 5, 50, 1000)),
                    draw.choice((1.0, 0.95, 0.5, 0.1)), draw.choice((0.0, 0.02, 0.3)),
                    draw.choice((1.0, 1.2, 0.9)))
        history = [draw.randrange(len(logits)) for _ in range(draw.choice((1, 30)))]
        cases.append((settings, logits.tolist(), history, None))
    largest = kept = 0
    for (settings, logits, history, _), got in zip(cases, distributions(cases)):
        # In float64: in float32 the sum that top-p cuts is off by more than a rare token's share.
        scores = processors(*settings)(torch.tensor([history]),
                                       torch.tensor([logits], dtype=torch.float64))
        want = torch.softmax(scores, -1)[0].numpy()
        assert sorted(got) == numpy.flatnonzero(want).tolist(), (
            settings, len(got), numpy.count_nonzero(want))
        largest = max([largest] + [abs(want[i] - share) for i, share in got.items()])
        kept += len(got)
    print("     400 distributions, %d tokens kept, largest difference of a probability %.1e"
          % (kept, largest))
    assert largest <= 1e-5


if __name__ == "__main__":
    sys.exit(run_tests(selected([], "__main__")))   # not those of test_unit.py as well
