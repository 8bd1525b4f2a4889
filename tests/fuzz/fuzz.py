#!/usr/bin/env python3
"""Builds fuzz.c with clang's libFuzzer, AddressSanitizer and UBSan, and runs its targets: first the
inputs that are kept in corpus/, then new ones.

    tests/fuzz/fuzz.py [--seconds N] [--keep FOLDER] [TARGET...]

New inputs are tried for N seconds a target (0: none; 20 if nothing is said), as many targets at
once as there are CPUs. With --keep what reaches code that nothing before it reached is kept in
FOLDER/TARGET, to go on from the next time. The corpus is made anew of both with `FOLDER/fuzz
-merge=1 -use_counters=0 -max_len=1500 NEW tests/fuzz/corpus/TARGET FOLDER/TARGET`, and with
FUZZ_TARGET=TARGET and FUZZ_MODELS=FOLDER in the environment: the smallest input for each place.
An input that shows a fault is kept in the current folder, as TARGET-crash-...
"""
import sys

sys.dont_write_bytecode = True

import argparse
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))   # the modules of tests/

import models
from harness import ROOT, small_model, tmpdir

TARGETS = ["model", "tables", "encoder", "records", "text", "options", "schema"]
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion",
         "-Wno-unused-function", "-ffp-contract=off", "-pthread",
         "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined",
         "-include", str(HERE / "system.h")]
LIMITS = ["-timeout=60", "-rss_limit_mb=3000", "-detect_leaks=0", "-len_control=0"]


def build(folder):
    """The program, its models, and the words that options and schemas are made of."""
    subprocess.run([os.environ.get("CC") or "clang", *FLAGS, "-o", folder / "fuzz", HERE / "fuzz.c",
                    ROOT / "tokenizer.c", "-lm"], check=True)
    # 700 tokens, with merges of l, o, s and 0 with themselves, and a few rows without a token.
    plain = models.small_tokenizer(700)
    sizes = dict(vocab_size=708, hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
                 intermediate_size=8, max_position_embeddings=40)
    nfc = {**plain, "normalizer": {"type": "NFC"}}
    shutil.copy(small_model(tokenizer=plain, **sizes), folder / "plain.bin")
    shutil.copy(small_model(tokenizer=nfc, **sizes), folder / "nfc.bin")
    words = set(re.findall(r'"([$a-zA-Z][\w$-]{2,24})"', (ROOT / "kl3m.c").read_text("utf-8")))
    (folder / "words").write_text("".join('"%s"\n' % word for word in sorted(words)))


def run(folder, target, *args):
    """The exit status and what was said."""
    env = dict(os.environ, FUZZ_TARGET=target, FUZZ_MODELS=str(folder))
    done = subprocess.run([folder / "fuzz", *LIMITS, *args], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def fuzz(folder, target, seconds):
    """Replays a target's corpus, then tries new inputs. Returns whether all went well, and a line
    about it."""
    corpus, new = HERE / "corpus" / target, folder / target
    kept = sorted(corpus.iterdir())
    code, said = run(folder, target, *kept)
    tried = "%d inputs of the corpus" % len(kept)
    if code == 0 and seconds > 0:
        new.mkdir(exist_ok=True)
        code, said = run(folder, target, "-max_total_time=%d" % seconds, "-print_final_stats=1",
                         "-dict=%s" % (folder / "words"), "-artifact_prefix=%s-" % target, new,
                         corpus)
        found = re.search(r"stat::number_of_executed_units: *(\d+)", said)
        tried += ", %s new ones" % (found.group(1) if found else "no")
    return code == 0, "%s: %s%s" % (target, tried, "" if code == 0 else "\n" + said[-8000:])


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    args = parser.parse_args()
    unknown = set(args.targets) - set(TARGETS)
    if unknown:
        parser.error("there is no target %s; there are %s" % (unknown.pop(), ", ".join(TARGETS)))
    folder = args.keep.resolve() if args.keep else tmpdir()
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    failed = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for well, line in pool.map(lambda one: fuzz(folder, one, args.seconds), args.targets):
            print("%s %s" % ("    " if well else "FAIL", line), flush=True)
            failed += not well
    print("%d passed, %d failed" % (len(args.targets) - failed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
