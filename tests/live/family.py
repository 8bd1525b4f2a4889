#!/usr/bin/env python3
"""What transformers saves, and the rest of the GPT-NeoX family: folders of a fine-tuned model, with
an adapter merged; Pythia's shapes and tokenizer.

    pip install -r tests/requirements.txt
    tests/live/family.py [WORD...]
"""
import sys

sys.dont_write_bytecode = True

import json
import re
from array import array
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import models
from harness import ROOT, SHARED, Skip, expect, export, run_kl3m, run_tests, selected, test, tmpdir
from tokenizer_tools import tokenize

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(1)

CLAUSE = "The Tenant shall pay the rent on the first day of each month."
TEXTS = ["Governing Law.\n", CLAUSE, "e\u0301 \u00e9 \u212b \u0958", "a" + 40 * "\u0323\u0301",
         "<|end|>x", "  two  spaces ", "\u1100\u1161\u11a8", ""]


def base(tokenizer_class):
    """The small trained model, multi-head as transformers has it, with its tokenizer."""
    folder = tmpdir() / "base"
    tiny = ROOT / "tests" / "tiny"
    models.save_model(folder, *models.multi_head(tiny), tokenizer=tiny / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": tokenizer_class, "bos_token": "<|start|>", "eos_token": "<|end|>",
        "unk_token": "<|unk|>", "pad_token": "<|pad|>"}))
    return folder


def train(model, tokenizer, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.tensor([tokenizer(CLAUSE)["input_ids"]])
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def program_logits(model, text, vocab):
    out = tmpdir() / "logits"
    done = run_kl3m("-m", model, "-p", text, "--no-escape", "--logits", out)
    expect(done.code, 0, done.err)
    found = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32)
    return found.view(-1, vocab)


def hold(folder, texts, bound=1e-4):
    """The exported folder has the ids and logits that transformers computes from it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    file = export(folder)
    ids = tokenize(file, [text.encode() for text in texts])
    expect(ids, [tokenizer(text)["input_ids"] for text in texts])
    for text, its in zip(texts, ids):
        if not its:
            continue
        with torch.no_grad():
            want = model(torch.tensor([its])).logits[0]
        got = program_logits(file, text, model.config.vocab_size)
        worst = (got - want).abs().max().item()
        assert worst <= bound, (text, worst)
    return file


@test("a folder that transformers 5 saved after some steps of fine-tuning has its ids and logits")
def fine_tuned():
    normalized = set()
    for kind in ("GPTNeoXTokenizer", "PreTrainedTokenizerFast"):
        source, folder = base(kind), tmpdir() / "tuned"
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        train(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = json.loads((folder / "tokenizer.json").read_text())
        normalized.add(json.dumps(saved["normalizer"]))
        hold(folder, TEXTS)
    assert any("NFC" in one for one in normalized), normalized


def merge_recipe():
    """README's lines that merge an adapter, as a function of the names in them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block, = re.findall(r"^```python\n((?:(?!```).*\n)*?.*merge_and_unload(?:.*\n)*?)^```$", text,
                        flags=re.M)
    return block


@test("an adapter, merged by README's lines, has the ids and logits of the merged model")
def adapter():
    source, adapted, merged = base("GPTNeoXTokenizer"), tmpdir() / "adapter", tmpdir() / "merged"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules=["query_key_value", "dense"], init_lora_weights=False))
    train(model, tokenizer)
    model.save_pretrained(adapted)
    tokenizer.save_pretrained(adapted)
    recipe = merge_recipe().replace('"adapter"', repr(str(adapted)))
    exec(recipe.replace('"merged"', repr(str(merged))), {})
    hold(merged, TEXTS)


PYTHIA = {"70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16),
          "1.4b": (2048, 24, 16)}


@test("Pythia's shapes, with its tokenizer, have transformers' ids and logits")
def pythia():
    if SHARED is None or not (SHARED / "gpt-neox-20b" / "tokenizer.json").is_file():
        raise Skip("the tokenizer of GPT-NeoX-20B is not here")
    for name, (hidden, layers, heads) in PYTHIA.items():
        folder = tmpdir() / ("pythia-" + name)
        config = transformers.GPTNeoXConfig(
            hidden_size=hidden, num_hidden_layers=min(layers, 4), num_attention_heads=heads,
            intermediate_size=4 * hidden, vocab_size=50304, max_position_embeddings=2048,
            rotary_pct=0.25, bos_token_id=0, eos_token_id=0, hidden_act="gelu",
            use_parallel_residual=True, tie_word_embeddings=False)
        model = transformers.GPTNeoXForCausalLM(config)
        # bf16 and in parts, as large ones are; the loader makes fp32 of it again
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="90MB")
        tokenizer = (SHARED / "gpt-neox-20b" / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}))
        file = hold(folder, [text for text in TEXTS if "<|end|>" not in text])
        info = run_kl3m("-m", file, "--info").text
        assert "starts from   <|endoftext|> (0)" in info and "ends with     <|endoftext|>" in info
        done = run_kl3m("-m", file, "-p", "The", "-n", 4, "-s", 1)
        expect(done.code, 0, done.err)


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
