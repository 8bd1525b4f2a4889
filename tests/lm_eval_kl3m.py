"""EleutherAI's lm-evaluation-harness on kl3m. Copy this file beside your tasks:

    import lm_eval, lm_eval_kl3m      # the second makes the model's name known
    lm_eval.simple_evaluate(model="kl3m", tasks=["..."],
                            model_args="program=./kl3m,model=kl3m-002-170m.bin")

Each kind of request is one run of the program over a file of records. As the harness's own `hf`
model, it moves a context's trailing spaces to the continuation, and begins a rolling text behind
the start token; unlike it, it encodes context and continuation each by itself, and a rolling text
has to fit the model's context.
"""
import itertools
import json
import subprocess

import lm_eval.models   # the names of its own models; without this, registering one hides them
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model


@register_model("kl3m")
class Kl3m(LM):
    def __init__(self, program="./kl3m", model=None, max_gen_toks=256, **_):
        super().__init__()
        self.command = [program] + (["-m", model] if model else [])
        self.max_gen_toks = max_gen_toks

    def run(self, records, *options):
        """What the program says of each record, in their order."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        done = subprocess.run([*self.command, "--jsonl", "--truncate", "left", *options],
                              input=lines.encode(), stdout=subprocess.PIPE)
        results = [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]
        faults = [result["error"] for result in results if "error" in result]
        if done.returncode or faults:
            raise RuntimeError("kl3m ended with status %d: %s" % (done.returncode, faults[:1]))
        return results

    def loglikelihood(self, requests, **_):
        records = []   # one for each context and the continuations that follow one another
        for context, group in itertools.groupby((r.args for r in requests), lambda args: args[0]):
            kept = context.rstrip()
            spaces = context[len(kept):]
            records.append({"prompt": kept, "continuation": [spaces + args[1] for args in group]})
        return [pair for result in self.run(records, "--score")
                for pair in zip(result["logprob"], result["greedy"])]

    def loglikelihood_rolling(self, requests, **_):
        records = [{"prompt": "", "continuation": r.args[0]} for r in requests]
        return [result["logprob"][0] for result in self.run(records, "--score")]

    def generate_until(self, requests, **_):
        texts = []
        for wanted, group in itertools.groupby((r.args for r in requests), lambda args: args[1]):
            until = wanted.get("until") or []
            stops = [until] if isinstance(until, str) else until
            sampled = wanted.get("do_sample") and wanted.get("temperature", 1)
            options = ["-n", str(wanted.get("max_gen_toks", self.max_gen_toks)),
                       "-t", str(sampled or 0), "-s", "1", "-k", "0", "--no-echo", "--no-escape"]
            options += [word for stop in stops for word in ("--stop", stop)]
            results = self.run([{"prompt": context} for context, _ in group], *options)
            texts += [result["generated_text"][0] for result in results]
        return texts
