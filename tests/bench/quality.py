#!/usr/bin/env python3
"""What smaller weights cost: kl3m's bf16 and q8 and llama.cpp's Q8_0, beside float64.

    tests/bench/quality.py

Prints a Markdown table: for each model the mean Kullback-Leibler divergence of the next token's
distribution from that of a float64 computation with the f32 weights, and the small, trained model's
perplexity of texts that it was not trained on. The models are that of tests/tiny; random weights at
the shapes of kl3m-002-170m; and these with outliers, as trained models have them: in each norm 1
channel of 100 is 20 to 100 times as large, and what reads it as much smaller, so that the network
is the same. Needs bench_peers.py's packages (a folder of them: --env in its help) and 10 GB of
memory.
"""
import sys

sys.dont_write_bytecode = True

import json
import os
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "live"), str(HERE.parent / "make")]

import torch

import bench_peers
import models
from forward import REAL, Model, torch_uniform
from harness import ROOT, export, run_kl3m, tmpdir
from tiny_grammar import Composer

TYPES = ("f32", "bf16", "q8")


def with_outliers(config, weights):
    """In each norm some channels times 20 to 100, and the columns that read them divided by it."""
    draw, hidden = random.Random(7), config["hidden_size"]
    readers = {"input_layernorm": "attention.query_key_value",
               "post_attention_layernorm": "mlp.dense_h_to_4h"}
    pairs = [("gpt_neox.final_layer_norm", "embed_out.weight")]
    for n in range(config["num_hidden_layers"]):
        layer = "gpt_neox.layers.%d." % n
        pairs += [(layer + norm, layer + reader + ".weight") for norm, reader in readers.items()]
    for norm, reader in pairs:
        shape, values = weights[reader]
        columns = torch.frombuffer(values, dtype=torch.float32).view(shape)
        for channel in draw.sample(range(hidden), hidden // 100):
            factor = draw.uniform(20, 100)
            for part in (".weight", ".bias"):
                weights[norm + part][1][channel] *= factor
            columns[:, channel] /= factor
    return weights


def logits(path, prompt, count, width):
    out = tmpdir() / "logits"
    done = run_kl3m("-m", path, "-f", prompt, "--logits", out, timeout=600)
    assert done.code == 0, done.err
    return torch.from_file(str(out), size=count * width, dtype=torch.float32).view(count, width)


def divergence(exact, got):
    """Mean over positions, in nats."""
    p, q = torch.log_softmax(exact.double(), -1), torch.log_softmax(got.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def of_llama(folder, config, ids):
    """The logits of llama.cpp's Q8_0 of the same weights."""
    bench_peers.SHAPES.update({name: config[name] for name in bench_peers.SHAPES})
    os.environ["KL3M_BENCH_TYPE"] = "q8"
    if not (folder / "q8.gguf").exists():
        (folder / "hf").symlink_to(folder, target_is_directory=True)
        bench_peers.write_gguf(folder / "q8.gguf")
    worker = bench_peers.LlamaCpp(folder, "no flash attention")
    return torch.tensor([worker.last_logits(ids[:n + 1]) for n in range(0, len(ids), 8)])


def row(title, config, weights, prompts):
    """Divergence from float64 for each type, then llama.cpp's, at every 8th position. prompts:
    lists of ids, or how many to make up."""
    model = Model(config, weights=weights)
    found = {kind: [] for kind in (*TYPES, "Q8_0")}
    files = {"f32": model.bin}
    for kind in TYPES[1:]:
        files[kind] = tmpdir() / (kind + ".bin")
        run_kl3m("-m", model.bin, "--quantize", kind, "-o", files[kind], timeout=600)
    for ids in prompts if isinstance(prompts, list) else range(prompts):
        if isinstance(ids, int):
            ids = model.prompt(256, ids)[0]
        prompt = model.file_of(ids)
        exact = torch.cat([piece for _, piece in model.exact(ids)])
        for kind in TYPES:
            found[kind].append(divergence(exact, logits(files[kind], prompt, 256,
                                                        config["vocab_size"])))
        found["Q8_0"].append(divergence(exact[::8], of_llama(model.directory, config, ids)))
    return title, {kind: sum(values) / len(values) for kind, values in found.items()}


def documents(count):
    """Texts of the small model's grammar that it was not trained on."""
    return "\n".join(Composer(random.Random(10 ** 6 + i)).document()[0] for i in range(count))


def perplexities():
    path, found = tmpdir() / "text", {}
    path.write_text(documents(60))
    source = export(ROOT / "tests" / "tiny")
    for kind in TYPES:
        model = source
        if kind != "f32":
            model = tmpdir() / (kind + ".bin")
            run_kl3m("-m", source, "--quantize", kind, "-o", model)
        done = run_kl3m("-m", model, "--score", "-f", path, "--json", timeout=600)
        found[kind] = json.loads(done.text)["perplexity"][0]
    return found


def main():
    real = dict(models.make_config(), **REAL)
    tiny = ROOT / "tests" / "tiny"
    config, weights = models.multi_head(tiny)
    path = tmpdir() / "text"
    path.write_text(documents(8))
    ids = list(map(int, run_kl3m("-m", export(tiny), "--tokenize", "-f", path).text.split()))
    results = [row("small, trained", config, weights, [ids[i:i + 256] for i in (0, 256, 512)]),
               row("random", real, models.make_weights(real, uniform=torch_uniform(3)), 2),
               row("random, with outliers", real, with_outliers(
                   real, models.make_weights(real, uniform=torch_uniform(3))), 2)]
    print("| mean divergence from float64, nats | " + " | ".join((*TYPES, "llama.cpp Q8_0")) + " |")
    print("|---|" + "--:|" * 4)
    for title, found in results:
        print("| %s | %s |" % (title, " | ".join("%.2g" % value for value in found.values())))
    found = perplexities()
    print("| small, perplexity of other texts | %s | |"
          % " | ".join("%.5f" % found[kind] for kind in TYPES))


if __name__ == "__main__":
    main()
