#!/usr/bin/env python3
"""Could this model have written these texts? Holds a model file against outputs that were published
with it.

    tests/card.py MODEL.bin [SAMPLES.jsonl]

SAMPLES (card.jsonl: the six of kl3m-002-170m's card, sampled by its makers with top-k 50) has lines
of prompt_ids and output_ids. If the model and the program are those that the samples came from,
each output token lies among the 50 likeliest after the tokens before it; a wrong head layout or
rotary form puts most of them far below. Says how many do, and ends with status 1 unless all do.
"""
import json
import os
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = 50


def kl3m(model, *args, text=None):
    program = os.environ.get("KL3M") or HERE.parent / "kl3m"
    done = subprocess.run([program, "-m", model, *args], input=text, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit("card.py: %s ended with status %d" % (program, done.returncode))
    return done.stdout


def ranks(model, prompt, output):
    """For each token of output, how many others are likelier there."""
    ids = prompt + output
    with tempfile.TemporaryDirectory() as folder:
        text, logits = os.path.join(folder, "text"), os.path.join(folder, "logits")
        with open(text, "wb") as file:
            file.write(kl3m(model, "--detokenize", "-0",
                            text=" ".join(map(str, ids)).encode())[:-1])
        back = list(map(int, kl3m(model, "--tokenize", "-f", text).split()))
        if back != ids:
            sys.exit("card.py: the samples are not of this model's tokenizer: %s became %s"
                     % (ids, back))
        kl3m(model, "-f", text, "--logits", logits)
        numbers = array("f", Path(logits).read_bytes())
    if sys.byteorder != "little":
        numbers.byteswap()
    vocab = len(numbers) // len(ids)
    for position, token in enumerate(output, len(prompt) - 1):
        row = numbers[position * vocab:(position + 1) * vocab]
        yield sum(x > row[token] for x in row)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    model, samples = sys.argv[1], Path(sys.argv[2] if len(sys.argv) == 3 else HERE / "card.jsonl")
    all_ranks = []
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        all_ranks += ranks(model, sample["prompt_ids"], sample["output_ids"])
    among = sum(rank < TOP for rank in all_ranks)
    print("%d of %d published tokens are among the %d likeliest" % (among, len(all_ranks), TOP))
    if among < len(all_ranks):
        print("The file and this program do not compute what the samples came from; the worst "
              "token has %d above it." % max(all_ranks))
    return 0 if among == len(all_ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
