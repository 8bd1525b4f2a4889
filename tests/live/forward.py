#!/usr/bin/env python3
"""The program beside a float64 computation and transformers, at the real shapes and others.

    pip install -r tests/requirements.txt
    tests/live/forward.py [WORD...]

Random weights, with logits of the size of a real model's. Needs 6 GB of memory and some minutes.
"""
import sys

sys.dont_write_bytecode = True

import functools
import json
import random
from array import array
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from harness import SHARED, expect, export, run_kl3m, run_tests, selected, test, tmpdir
from naive import Naive

# Those of kl3m-003-1.7b, but for 8 of its 32 layers and a small vocabulary: an output's sum does
# not know how many others there are.
LARGE = {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32,
         "intermediate_size": 8192, "vocab_size": 1024, "max_position_embeddings": 512,
         "rotary_pct": 0.25}

AWKWARD = {
    "head size 20, intermediate 37, vocabulary 1001": {
        "hidden_size": 100, "num_attention_heads": 5, "rotary_pct": 0.5, "intermediate_size": 37,
        "vocab_size": 1001},
    "serial residual, rotary share 1": {
        "hidden_size": 96, "use_parallel_residual": False, "rotary_pct": 1.0,
        "intermediate_size": 300},
    "grouped-query, 3 KV heads of 9, head size 6": {
        "hidden_size": 54, "num_attention_heads": 9, "n_kv": 3, "rotary_pct": 0.34},
    "one KV head of 8, rotary base 500000": {
        "hidden_size": 256, "num_attention_heads": 8, "n_kv": 1, "rotary_pct": 0.25,
        "rotary_emb_base": 500000},
    "rotary share 1, 4032 positions": {"rotary_pct": 1.0, "max_position_embeddings": 4096},
    "rotary share 0, six layers, norm epsilon 0.01": {
        "rotary_pct": 0.0, "num_hidden_layers": 6, "layer_norm_eps": 0.01},
    "head size 128, grouped-query, serial residual": {
        "hidden_size": 512, "num_attention_heads": 4, "n_kv": 2, "use_parallel_residual": False},
}


# ---- Models -------------------------------------------------------------------------------------

def numbered_tokenizer(size):
    """Token 5000 is the text <5000>, and so on above the bytes: any ids can be a prompt."""
    tokenizer = models.small_tokenizer(263)
    tokenizer["added_tokens"] += [dict(tokenizer["added_tokens"][0], id=i, content="<%d>" % i,
                                       special=False, normalized=True) for i in range(263, size)]
    return tokenizer


def token_text(i):
    if i >= 263:
        return b"<%d>" % i
    if i < len(models.SPECIAL):
        return b""
    return bytes([sorted(models.byte_alphabet(),
                         key=models.byte_alphabet().get)[i - len(models.SPECIAL)]])


def torch_uniform(seed):
    """As models.plain_uniform, for hundreds of millions of numbers."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(count, low, width):
        numbers = array("f")
        numbers.frombytes((low + width * torch.rand(count, generator=generator)).numpy().tobytes())
        return numbers
    return uniform


class Model:
    """A random model: its files, its exported file, and transformers with the same weights."""

    def __init__(self, config, n_kv=None, seed=0, uniform=None, weights=None):
        self.config, self.directory, self.n_kv = config, tmpdir(), n_kv
        weights = weights or models.make_weights(config, n_kv, seed, uniform)
        tokenizer = numbered_tokenizer(config["vocab_size"])
        models.save_model(self.directory, config, weights, tokenizer=tokenizer)
        self.bin = export(self.directory)
        if n_kv:  # transformers knows multi-head attention alone
            weights = models.repeat_kv(config, weights, n_kv)
            self.twin = tmpdir()
            models.save_model(self.twin, config, weights, tokenizer=tokenizer)
        else:
            self.twin = self.directory
        self.weights = {name: torch.frombuffer(values, dtype=torch.float32).view(shape)
                        for name, (shape, values) in weights.items()}

    @functools.cached_property
    def reference(self):
        model = transformers.GPTNeoXForCausalLM.from_pretrained(
            self.twin, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return model

    def prompt(self, count, seed=0):
        """Random ids and the file whose text they are."""
        ids = random.Random(seed).choices(range(263, self.config["vocab_size"]), k=count)
        return ids, self.file_of(ids)

    def file_of(self, ids):
        path = tmpdir() / "prompt"
        path.write_bytes(b"".join(map(token_text, ids)))
        return path

    def logits(self, path, count):
        """What kl3m computes, mapped from its file."""
        out, width = tmpdir() / "logits", self.config["vocab_size"]
        done = run_kl3m("-m", self.bin, "-f", path, "--logits", out)
        expect((done.code, done.err, out.stat().st_size), (0, "", count * width * 4),
               "kl3m --logits")
        return torch.from_file(str(out), size=count * width, dtype=torch.float32).view(count, width)

    def exact(self, ids):
        """The same in float64, rotary tables too: pieces of 256 rows, as (first position,
        logits)."""
        config, heads = self.config, self.config["num_attention_heads"]
        size = config["hidden_size"] // heads
        rotary = int(size * config["rotary_pct"])
        w = lambda name: self.weights[name].double()
        norm = lambda x, name: F.layer_norm(x, x.shape[1:], w(name + ".weight"), w(name + ".bias"),
                                            config["layer_norm_eps"])
        linear = lambda x, name: F.linear(x, w(name + ".weight"), w(name + ".bias"))

        powers = config["rotary_emb_base"] ** (
            -torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
        angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * powers
        cos, sin = angles.cos(), angles.sin()

        def turn(x):
            a, b, rest = x.split([rotary // 2, rotary // 2, size - rotary], dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

        def attend(x, name):
            q, k, v = linear(x, name + ".query_key_value").view(
                -1, heads, 3, size).permute(2, 1, 0, 3)
            out = F.scaled_dot_product_attention(turn(q)[None], turn(k)[None], v[None],
                                                 is_causal=True)[0]
            return linear(out.transpose(0, 1).reshape(len(ids), -1), name + ".dense")

        def mlp(x, name):
            return linear(F.gelu(linear(x, name + ".dense_h_to_4h")), name + ".dense_4h_to_h")

        x = w("gpt_neox.embed_in.weight")[ids]
        for n in range(config["num_hidden_layers"]):
            layer = "gpt_neox.layers.%d." % n
            middle = x + attend(norm(x, layer + "input_layernorm"), layer + "attention")
            read = x if config["use_parallel_residual"] else middle
            x = middle + mlp(norm(read, layer + "post_attention_layernorm"), layer + "mlp")
        x = norm(x, "gpt_neox.final_layer_norm")
        head = w("embed_out.weight")
        for start in range(0, len(ids), 256):
            yield start, x[start:start + 256] @ head.T

    def check_greedy(self, ids, path, count):
        with torch.no_grad():
            out = self.reference.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False, max_new_tokens=count, use_cache=True)
        want = b"".join(map(token_text, out[0, len(ids):].tolist())) + b"\n"
        done = run_kl3m("-m", self.bin, "-f", path, "-n", count, "-t", 0, "--ignore-eos",
                        "--no-echo")
        expect((done.out, done.code), (want, 0), "greedy text")


@functools.lru_cache(maxsize=None)
def real_model():
    config = dict(models.make_config(), **models.REAL_SHAPES)
    if SHARED:
        config = json.loads((SHARED / "kl3m-002-170m" / "config.json").read_text())
        expect({name: config[name] for name in models.REAL_SHAPES}, models.REAL_SHAPES)
    return Model(config)


@functools.lru_cache(maxsize=None)
def awkward_models():
    found = []
    for name, options in AWKWARD.items():
        options = dict(options)
        n_kv = options.pop("n_kv", None)
        found.append((name, Model(models.make_config(**{"max_position_embeddings": 512, **options}),
                                  n_kv)))
    return found


def far(a, b):
    """The largest difference, in float64; NaN where a number is NaN."""
    return (a.double() - b.double()).abs().max().item()


def report(text, *values):
    print("     " + text % values, flush=True)


# ---- Tests --------------------------------------------------------------------------------------

@test("real shapes: in each range of positions logits are as close to float64 as transformers', or within 2e-5")
def real_logits():
    model, count = real_model(), 4096
    ids, path = model.prompt(count)
    got = model.logits(path, count)
    with torch.no_grad():
        theirs = model.reference(torch.tensor([ids])).logits[0]
        ends = [64, 2048, 4096]
        most = {end: [0.0, 0.0, 0.0] for end in ends}
        spread, means = [], []
        for start, exact in model.exact(ids):
            spread.append(exact.std().item())
            means.append((got[start:start + 256].double() - exact).abs().mean().item())
            for low, end in zip([0] + ends, ends):
                rows = slice(max(low - start, 0), max(end - start, 0))
                if exact[rows].numel():
                    ours, other = got[start:start + 256][rows], theirs[start:start + 256][rows]
                    assert torch.isfinite(ours).all(), "logits that are not finite"
                    pairs = [(ours, exact[rows]), (ours, other), (other, exact[rows])]
                    most[end] = [max(m, far(a, b)) for m, (a, b) in zip(most[end], pairs)]
    report("logits have a standard deviation of %.2f, their mean difference from float64 is %.2g",
           sum(spread) / len(spread), sum(means) / len(means))
    for low, end in zip([0] + ends, ends):
        report("positions %4d to %4d: kl3m from float64 %.2g, kl3m from transformers %.2g, "
               "transformers from float64 %.2g", low, end - 1, *most[end])
    for ours, between, other in most.values():
        assert ours <= max(other, 2e-5) and between <= 5e-4, most


@test("the 1.7b's shapes, 8 of its layers: logits within 2e-5 of float64")
def large_logits():
    model = Model(dict(models.make_config(), **LARGE), uniform=torch_uniform(1))
    ids, path = model.prompt(128)
    got = model.logits(path, len(ids))
    exact = torch.cat([piece for _, piece in model.exact(ids)])
    error = (got.double() - exact).abs()
    report("standard deviation %.2f, largest difference %.2g, mean %.2g", exact.std(), error.max(),
           error.mean())
    assert error.max() <= 2e-5


@test("real shapes: 256 greedy tokens are those of transformers")
def real_greedy():
    model = real_model()
    model.check_greedy(*model.prompt(40, seed=1), 256)


@test("awkward shapes: logits within 1e-4 of float64 and 5e-4 of transformers, 64 greedy "
      "tokens the same")
def awkward_shapes():
    for name, model in awkward_models():
        ids, path = model.prompt(model.config["max_position_embeddings"] - 64)
        got = model.logits(path, len(ids))
        with torch.no_grad():
            theirs = model.reference(torch.tensor([ids])).logits[0]
            exact = torch.cat([piece for _, piece in model.exact(ids)])
        ours, between, other = far(got, exact), far(got, theirs), far(theirs, exact)
        report("%s: kl3m from float64 %.2g, kl3m from transformers %.2g, transformers from "
               "float64 %.2g", name, ours, between, other)
        # At far positions the fp32 angles of transformers cost it more than 5e-4 by itself.
        assert ours <= 1e-4 and between <= max(5e-4, other + 1e-4), name
        model.check_greedy(ids, path, 64)


@test("the float64 computation and the one in plain Python are the same")
def float64_is_naive():
    for name, model in awkward_models():
        ids, _ = model.prompt(20)
        exact = torch.cat([piece for _, piece in model.exact(ids)])
        plain = torch.tensor(Naive(model.directory).logits(ids), dtype=torch.float64)
        assert far(exact, plain) < 1e-9, "%s: %g" % (name, far(exact, plain))


@test("a model saved again by transformers, in shards, has the same logits to the last bit")
def saved_again():
    model = Model(models.make_config())
    again = tmpdir()
    model.reference.save_pretrained(again, max_shard_size="100KB")
    config = json.loads((again / "config.json").read_text())
    assert "rope_parameters" in config and len(list(again.glob("*.safetensors"))) > 1, config
    (again / "tokenizer.json").write_bytes((model.directory / "tokenizer.json").read_bytes())
    _, path = model.prompt(100)
    want = model.logits(path, 100)
    model.bin = export(again)
    assert torch.equal(model.logits(path, 100).view(torch.int32), want.view(torch.int32))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
