#!/usr/bin/env python3
"""Makes tests/references/forward-*.json anew: what transformers computes on tiny models of
models.py.

    pip install -r tests/requirements.txt
    tests/make/make_references.py

`make test` compares with these files, so that it needs nothing but Python itself.
"""
import json
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import tokenizers
import torch
import transformers

import models

MODELS = {
    "multi-head": {"seed": 4},
    "serial-residual": {"seed": 2, "hidden_size": 60, "num_attention_heads": 3, "rotary_pct": 0.3,
                        "rotary_emb_base": 500, "intermediate_size": 37, "vocab_size": 301,
                        "layer_norm_eps": 1e-3, "use_parallel_residual": False},
    "grouped-query": {"seed": 3, "num_attention_heads": 6, "n_kv": 2, "rotary_pct": 1.0},
}
TEXT = models.LEGAL_TEXT[26:116]
POSITIONS = [0, 1, 15, 16, -1]
NEW_TOKENS = 40


def reference(seed, n_kv=None, **overrides):
    config = models.make_config(**overrides)
    weights = models.make_weights(config, n_kv, seed)
    if n_kv:  # transformers knows multi-head attention alone
        weights = models.repeat_kv(config, weights, n_kv)
    with tempfile.TemporaryDirectory() as directory:
        models.save_model(directory, config, weights)
        tokenizer = tokenizers.Tokenizer.from_file(directory + "/tokenizer.json")
        model = transformers.GPTNeoXForCausalLM.from_pretrained(
            directory, dtype=torch.float32).eval()
    ids = tokenizer.encode(TEXT).ids
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        out = model.generate(torch.tensor([ids]),
                             attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                             do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True)[0]
        steps = model(out[None]).logits[0, len(ids) - 1:-1]
    best = steps.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "two tokens are too close: take another seed"
    return {"ids": ids, "positions": POSITIONS,
            "logits": [[round(x, 5) for x in logits[p].tolist()] for p in POSITIONS],
            "greedy": out[len(ids):].tolist()}


def main():
    folder = Path(__file__).resolve().parent.parent / "references"
    folder.mkdir(exist_ok=True)
    made_with = ("transformers %s, torch %s"
                 % (transformers.__version__, torch.__version__.split("+")[0]))
    for name, options in MODELS.items():
        kept = {"made_with": made_with, "options": options, "text": TEXT, **reference(**options)}
        # One member a line, and one row of logits a line.
        lines = ",\n".join(
            "%s: %s" % (json.dumps(key),
                        json.dumps(value, ensure_ascii=False).replace("], [", "],\n["))
            for key, value in kept.items())
        path = folder / ("forward-%s.json" % name)
        path.write_text("{" + lines + "}\n", encoding="utf-8")
        print("%s: %d bytes" % (path.name, path.stat().st_size))


if __name__ == "__main__":
    main()
