#!/usr/bin/env python3
"""Measures schemas beside llguidance and xgrammar, on the same schemas, texts and tokens, in one
run: what compiles, how long it takes, and how long each mask takes along the texts that fit.

    schemas.py SCHEMAS.jsonl TOKENIZER.json [PEER ...]

SCHEMAS: lines {"schema", "valid": [{"json"}], "invalid": [{"json"}]}. Needs llguidance 1.9.1,
xgrammar 0.2.9 and tokenizers. A mask's time is the least of five runs, each begun anew."""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from models import write_model  # noqa: E402

RUNS = 5


def ours(cases, tokenizer):
    """{compile, texts} of each case, by masks.c with a model of no matter what weights."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_model(folder / "model", tokenizer=json.loads(tokenizer), vocab_size=32768,
                    hidden_size=32, num_attention_heads=2, intermediate_size=32,
                    num_hidden_layers=1, max_position_embeddings=4096)
        model, program = folder / "model.bin", folder / "masks"
        subprocess.run([sys.executable, HERE.parent.parent / "export_weights.py",
                        folder / "model", "-o", model], check=True, stderr=subprocess.DEVNULL)
        subprocess.run(["make", "-s", "-B", "-C", HERE.parent.parent, "BENCH=%s" % program,
                        "BENCH_SOURCE=tests/bench/masks.c", program], check=True)
        lines = ["\t".join([json.dumps(case["schema"], ensure_ascii=False),
                            *(x["json"] for x in case["valid"] + case["invalid"])])
                 for case in cases]
        out = subprocess.run([program, model], input="\n".join(lines) + "\n", text=True,
                             stdout=subprocess.PIPE, check=True).stdout
        return [json.loads(line) for line in out.splitlines()]


class Llguidance:
    def __init__(self, tokenizer):
        import llguidance
        import llguidance.numpy
        self.module, self.numpy = llguidance, llguidance.numpy
        self.tokenizer = llguidance.LLTokenizer(tokenizer)
        self.mask = self.numpy.allocate_token_bitmask(1, self.tokenizer.vocab_size)

    def compile(self, schema):
        grammar = self.module.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False})
        matcher = self.module.LLMatcher(self.tokenizer, grammar)
        return None if matcher.is_error() else matcher

    def begin(self, compiled):
        return compiled.deep_copy()

    def fill(self, matcher):
        self.numpy.fill_next_token_bitmask(matcher, self.mask)

    def take(self, matcher, token):
        return matcher.consume_token(token)

    def ends(self, matcher):
        return matcher.is_accepting()


class Xgrammar:
    def __init__(self, tokenizer):
        import tokenizers
        import xgrammar
        self.module = xgrammar
        fast = tokenizers.Tokenizer.from_str(tokenizer)
        names = sorted(fast.get_vocab(), key=fast.get_vocab().get)
        info = xgrammar.TokenizerInfo(names, vocab_type=xgrammar.VocabType.BYTE_LEVEL,
                                      stop_token_ids=[fast.token_to_id("<|end|>")])
        self.compiler = xgrammar.GrammarCompiler(info, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    def compile(self, schema):
        return self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=False,
                                                 separators=(",", ":"), strict_mode=False)

    def begin(self, compiled):
        return self.module.GrammarMatcher(compiled)

    def fill(self, matcher):
        matcher.fill_next_token_bitmask(self.mask)

    def take(self, matcher, token):
        return matcher.accept_token(token)

    def ends(self, matcher):
        return matcher.is_completed() or matcher.accept_token(1)


PEERS = {"llguidance": Llguidance, "xgrammar": Xgrammar}


def measure(peer, case, texts):
    """The same figures of a peer; None: it does not compile the schema."""
    start = time.perf_counter()
    try:
        compiled = peer.compile(case["schema"])
    except Exception:
        compiled = None
    taken = (time.perf_counter() - start) * 1e3
    if compiled is None:
        return {"refused": True}
    found = []
    for text in texts:
        least, fits = [float("inf")] * len(text["ids"]), False
        for _ in range(RUNS):
            matcher, fits = peer.begin(compiled), True
            for i, token in enumerate(text["ids"]):
                start = time.perf_counter()
                peer.fill(matcher)
                least[i] = min(least[i], (time.perf_counter() - start) * 1e6)
                fits = peer.take(matcher, token)
                if not fits:
                    break
            fits = fits and peer.ends(matcher)
        found.append({"masks": [x for x in least if x < float("inf")], "fits": fits})
    return {"compile": taken, "texts": found}


def spread(values):
    values = sorted(values)
    return "%8.0f %8.0f %8.0f" % (statistics.median(values), values[int(len(values) * 0.99)],
                                  values[-1])


def show(name, cases, found):
    compiled = [(case, one) for case, one in zip(cases, found) if "texts" in one]
    masks = [x for case, one in compiled for text in one["texts"][:len(case["valid"])]
             for x in text["masks"] if text["fits"]]
    rejected = sum(not text["fits"] for case, one in compiled
                   for text in one["texts"][:len(case["valid"])])
    accepted = sum(text["fits"] for case, one in compiled
                   for text in one["texts"][len(case["valid"]):])
    print("%-11s %8d %s %s %9d %9d" % (name, len(compiled), spread([
        one["compile"] * 1e3 for _, one in compiled]), spread(masks), rejected, accepted))


def main():
    cases = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
    tokenizer = Path(sys.argv[2]).read_text(encoding="utf-8")
    found = ours(cases, tokenizer)
    # The ids of all texts, also of schemas that we refuse.
    every = ours([{**case, "schema": True} for case in cases], tokenizer)
    print("%d schemas; microseconds: median, 99th of 100, worst" % len(cases))
    print("%-11s %8s %26s %26s %9s %9s" % ("", "compiled", "compile", "mask", "rejected",
                                           "accepted"))
    print("%-11s %8s %26s %26s %9s %9s" % ("", "", "", "", "valid", "invalid"))
    show("kl3m", cases, found)
    for name in sys.argv[3:] or PEERS:
        peer = PEERS[name](tokenizer)
        show(name, cases, [measure(peer, case, all_of["texts"])
                           for case, all_of in zip(cases, every)])


if __name__ == "__main__":
    main()
