#!/usr/bin/env python3
"""lm-evaluation-harness on kl3m, through tests/lm_eval_kl3m.py, beside its own `hf` model.

    pip install -r tests/requirements.txt
    tests/live/evaluator.py

Tasks of our own on the small model of tests/tiny: which of four endings is likeliest, the
perplexity of clauses, and a text to be continued.
"""
import sys

sys.dont_write_bytecode = True

import functools
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

import lm_eval
from lm_eval.tasks import TaskManager

import lm_eval_kl3m
import models
from harness import KL3M, ROOT, expect, run_tests, selected, test, tiny_model, tmpdir

# A beginning, its right ending, three others. They are cut at tokens: before a space.
ENDINGS = [
    ("This Agreement shall be governed by", "the laws of the State", "the zebra of the Term",
     "a party of ten (10)", "and in the Notices"),
    ("Either party may terminate this Agreement upon", "thirty (30) days", "the laws of",
     "Delaware and", "is a zebra"),
    ("The Tenant shall pay", "the rent", "governed by", "Delaware York", "this zebra"),
    ("This Agreement may be amended", "only by", "zebra by", "York in", "thirty of"),
    ("in the courts of the State of", "New York", "the party", "zebra rent", "shall be"),
    ("The receiving party shall not", "disclose the", "Delaware the", "York (10)", "of and"),
    ("each party hereby", "submits to the", "zebra to the", "Delaware of the", "laws by the"),
    ("The Borrower shall", "pay to", "Delaware to", "zebra to", "York to"),
]
CLAUSES = [
    "This Agreement shall be governed by and construed in accordance with the laws of the State "
    "of Delaware.",
    "Either party may terminate this Agreement upon thirty (30) days written notice to the other "
    "party.",
    "The zebra of the moon is a purple (10) Lease, and the courts of York eat it.",
]


def write_tasks(folder):
    """Three tasks: a YAML and a file of JSON lines each."""
    def task(name, rows, options):
        path = folder / (name + ".jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"task": name, "dataset_path": "json", "test_split": "test",
                  "dataset_kwargs": {"data_files": {"test": str(path)}},
                  "metadata": {"version": 1}}
        # JSON is YAML.
        (folder / (name + ".yaml")).write_text(json.dumps({**common, **options}, indent=1))

    rows = []
    for i, (start, *endings) in enumerate(ENDINGS):
        turned = endings[-i % 4:] + endings[:-i % 4]   # the right one is not always the first
        rows.append({"start": start, "endings": turned, "right": turned.index(endings[0])})
    task("endings", rows, {
        "output_type": "multiple_choice", "doc_to_text": "{{start}}",
        "doc_to_choice": "{{endings}}", "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    task("clauses", [{"text": text} for text in CLAUSES], {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]})
    task("greedy", [{"start": start, "next": ""} for start, *_ in ENDINGS], {
        "output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "{{next}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}]})


@functools.lru_cache(maxsize=None)
def twin():
    """tests/tiny as transformers reads it: multi-head, with the names of its special tokens."""
    source, folder = ROOT / "tests" / "tiny", tmpdir()
    models.save_model(folder, *models.multi_head(source), tokenizer=source / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>",
        "eos_token": "<|end|>", "pad_token": "<|pad|>"}))
    return folder


@functools.lru_cache(maxsize=None)
def evaluate(model, arguments):
    folder = tmpdir()
    write_tasks(folder)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["endings", "clauses", "greedy"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True, batch_size=1, bootstrap_iters=0, verbosity="ERROR")


def both():
    ours = evaluate("kl3m", "program=%s,model=%s" % (KL3M, tiny_model()))
    theirs = evaluate("hf", "pretrained=%s,dtype=float32,device=cpu" % twin())
    return ours, theirs


def numbers(result, task):
    """The model's answer to each request of a task, in order."""
    return [answer for sample in sorted(result["samples"][task], key=lambda s: s["doc_id"])
            for answer in sample["filtered_resps"]]


@test("lm_eval's figures of kl3m are those of its own hf model: the same accuracy, perplexities to 1e-4")
def same_figures():
    ours, theirs = both()
    for task in ("endings", "clauses", "greedy"):
        for name, want in theirs["results"][task].items():
            got = ours["results"][task][name]
            if not isinstance(want, float):
                continue
            print("     %-8s %-24s kl3m %.6f, hf %.6f" % (task, name.split(",")[0], got, want))
            assert abs(got - want) <= (1e-4 * want if task == "clauses" else 0), (task, name)
    assert 0.5 <= ours["results"]["endings"]["acc,none"] < 1.01


@test("each log-likelihood is hf's to 1e-3, each greedy flag and each greedy text the same")
def same_answers():
    ours, theirs = both()
    got, want = numbers(ours, "endings"), numbers(theirs, "endings")
    expect((len(got), len(want)), (4 * len(ENDINGS),) * 2)
    expect([greedy for _, greedy in got], [greedy for _, greedy in want])
    far = [abs(a - b) for (a, _), (b, _) in zip(got, want)]
    rolled = [abs(a - b) for a, b in zip(numbers(ours, "clauses"), numbers(theirs, "clauses"))]
    expect(len(rolled), len(CLAUSES))
    print("     largest difference %.1e of endings, %.1e of clauses" % (max(far), max(rolled)))
    assert max(far + rolled) <= 1e-3
    expect(numbers(ours, "greedy"), numbers(theirs, "greedy"))


if __name__ == "__main__":
    sys.exit(run_tests(selected(sys.argv[1:], "__main__")))
