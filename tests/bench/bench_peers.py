#!/usr/bin/env python3
"""kl3m's speed beside that of transformers, llama.cpp and CTranslate2: one model, the same work,
measured in turn.

    tests/bench/bench_peers.py [--only transformers,llama,ct2] [--rounds N] [--env DIR]
                               [--model-dir DIR] [--no-svg] [--type f32|bf16|q8]

Random weights at the shapes of kl3m-002-170m, all usable CPUs. Prints a Markdown table and, of
f32, draws bench.svg. With bf16 the peer is llama.cpp's BF16, with q8 its Q8_0 and CTranslate2's
int8. The peers are installed into a virtual environment: some GB, and llama.cpp is compiled. It and
the model's files (2.7 GB and more) are gone at the end, unless a folder is given to keep them in;
what is there is used again. Once all is installed a run takes about 25 minutes on two CPUs; nothing
else should run meanwhile. Linux only; these versions of the peers want Python 3.11 or later.

The parts, in order: packages, peers, the model's files, processes, prompts, works, agreement,
measuring, results.
"""
import sys

sys.dont_write_bytecode = True

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import tempfile
import time
from array import array
from datetime import date
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
sys.path.append(str(TESTS))

import models  # noqa: E402

KL3M = Path(os.environ.get("KL3M") or ROOT / "kl3m").resolve()
BENCH = "tests/bench/bench"     # as the Makefile names it
THREADS = len(os.sched_getaffinity(0))
SHAPES = dict(models.REAL_SHAPES)


def say(text):
    print("bench_peers.py: " + text, file=sys.stderr, flush=True)


def run(command, **more):
    """Runs a command to its end; one that fails ends the script."""
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          **more)
    if done.returncode:
        sys.exit("bench_peers.py: status %d from %s"
                 % (done.returncode, " ".join(map(str, command))[:300]))
    return done.stdout


# ---- Packages -----------------------------------------------------------------------------------

PACKAGES = {"torch": "2.15.0", "transformers": "5.23.0", "numpy": "2.4.6", "ctranslate2": "4.8.5",
            "gguf": "0.19.0", "cmake": "4.4.4", "ninja": "1.13.2"}
# This one comes as source. It is compiled for the CPU it is on, with the cmake and ninja from
# above.
COMPILED = {"llama-cpp-python": "0.3.36"}


def is_complete(python):
    """Whether this environment has every package in its version."""
    code = ("from importlib.metadata import version\n"
            "assert all(version(name).split('+')[0] == v for name, v in %r.items())"
            % {**PACKAGES, **COMPILED})
    return python.exists() and subprocess.run([str(python), "-c", code],
                                              stderr=subprocess.DEVNULL).returncode == 0


def prepare_environment(folder):
    """The Python of a virtual environment that has the peers."""
    python = folder / "bin" / "python"
    if not is_complete(python):
        say("installing the peers in %s: ten minutes or more" % folder)
        run([sys.executable, "-m", "venv", folder])
        environ = dict(os.environ, PATH="%s:%s" % (folder / "bin", os.environ["PATH"]))
        for packages in (PACKAGES, COMPILED):
            run([python, "-m", "pip", "install", "-q", *map("==".join, packages.items())],
                env=environ)
    return python


# ---- Peers --------------------------------------------------------------------------------------
# Each runs in worker processes of its own, one for each of its settings. What a worker can be asked
# for:
#   last_logits(ids)               the logits after these tokens
#   generate(ids, count)           the seconds from a prompt to `count` tokens; with 1 this is
#                                  prefill
#   score(ids)                     the seconds to the log-probability of every token but the first,
#                                  and their sum
#   decode(context, first, count)  the seconds of `count` passes, each of a token for each sequence,
#                                  and the ids drawn last. `first` are the sequences' first tokens;
#                                  a context comes before them (before one sequence) without being
#                                  measured, and stays for the next call.
# Tokens are always the likeliest. Where the best setting depends on the work or on the CPU,
# `settings` has several (and the environment each wants): before a work is measured they are tried,
# and the fastest takes part. `usual` is what a work takes that has no time to try. Figures in
# comments are of two cores of an EPYC with AVX-512.

class Transformers:
    # The setting is the kind of cache. A dynamic one is copied for each token, which makes 2.5
    # tokens/s at position 3,840 where a static one makes 12; in prefill of as many the dynamic one
    # is a little ahead, at all else neither. The loop over the model's forward saves what
    # generate() does beside it. Left out: eager attention (80% of sdpa's speed in prefill, the same
    # in decoding); torch.compile with the static cache, weights frozen or not (17 to 21 tokens/s
    # instead of 15, after 1 to 3 minutes of compiling for each shape, and slower for 16 sequences).
    title, version, usual = "transformers", "transformers", "dynamic cache"
    settings = {"dynamic cache": {}, "static cache": {}}

    def __init__(self, folder, setting):
        import torch
        from transformers import DynamicCache, GPTNeoXForCausalLM, StaticCache
        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = GPTNeoXForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
        config = self.model.config
        self.new_cache = {
            "dynamic cache": lambda places: DynamicCache(config=config),
            "static cache": lambda places: StaticCache(config=config, max_cache_len=places),
        }[setting]
        self.context = None

    def forward(self, rows, cache):
        with self.torch.inference_mode():
            return self.model(rows, past_key_values=cache, use_cache=True,
                              logits_to_keep=1).logits[:, -1]

    def passes(self, rows, cache, count):
        """Seconds and the tokens drawn last."""
        start = time.perf_counter()
        for _ in range(count):
            rows = self.forward(rows, cache).argmax(-1, keepdim=True)
        last = rows[:, 0].tolist()
        return time.perf_counter() - start, last

    def last_logits(self, ids):
        return self.forward(self.torch.tensor([ids]), self.new_cache(len(ids)))[0].tolist()

    def generate(self, ids, count):
        return self.passes(self.torch.tensor([ids]), self.new_cache(len(ids) + count), count)[0]

    def score(self, ids):
        """By the loop of its guide to perplexity: windows of the context, half of it apart."""
        places, total, previous = SHAPES["max_position_embeddings"], 0, 0
        start = time.perf_counter()
        with self.torch.inference_mode():
            for begin in range(0, len(ids), places // 2):
                end = min(begin + places, len(ids))
                window = self.torch.tensor([ids[begin:end]])
                target = window.clone()
                target[:, :len(window[0]) - (end - previous)] = -100
                loss = self.model(window, labels=target, use_cache=False).loss
                total -= loss.item() * (target[:, 1:] != -100).sum().item()
                previous = end
                if end == len(ids):
                    break
        return time.perf_counter() - start, total

    def decode(self, context, first, count):
        if not context or context != self.context:
            self.context, self.cache = context, self.new_cache(len(context) + count)
            if context:
                self.forward(self.torch.tensor([context]), self.cache)
        result = self.passes(self.torch.tensor(first)[:, None], self.cache, count)
        if context:
            self.forget(count)
        return result

    def forget(self, count):
        """Takes the last tokens out of the cache; crop() is there for the dynamic one only."""
        for layer in self.cache.layers:
            if isinstance(layer.get_seq_length(), int):
                layer.crop(-count)
            else:
                layer.cumulative_length.sub_(count)


class LlamaCpp:
    # Flash attention is ahead in prefill of 512 tokens (590 tokens/s for 410), for 16 sequences
    # (310 for 200, or for 285 with one cache for all, kv_unified) and mostly in prefill of 3,840
    # (200 to 220 for 190 to 230); behind in decoding at 3,840 (13 to 17 for 22). Passes of 128, 256
    # and 2,048 tokens in prefill: slower or the same. Keys and values are fp16, its default. Driven
    # through the C functions, which spares it the Python class's work.
    title, version, usual = "llama.cpp", "llama-cpp-python", "flash attention"
    settings = {"flash attention": {}, "no flash attention": {}}
    PASS = 512

    def __init__(self, folder, setting):
        import ctypes
        import llama_cpp
        import numpy
        self.api, self.as_array = llama_cpp, numpy.ctypeslib.as_array
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.flash = {"flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
                      "no flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}[setting]
        path = folder / (os.environ.get("KL3M_BENCH_TYPE", "f32") + ".gguf")
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(),
                                                          llama_cpp.llama_model_default_params())
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.llama, self.size, self.context = None, (0, 0), None

    def make_room(self, sequences, places):
        """A context of llama.cpp's with room for so many sequences of so many tokens, empty."""
        if self.size[0] != sequences or self.size[1] < places:
            if self.llama:
                self.api.llama_free(self.llama)
            params = self.api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * -(-places // 256) * 256, sequences
            params.n_batch = params.n_ubatch = self.PASS
            params.n_threads = params.n_threads_batch = THREADS
            params.flash_attn_type = self.flash
            self.llama, self.size = (self.api.llama_init_from_model(self.model, params),
                                     (sequences, places))
        self.context = None
        self.api.llama_memory_clear(self.api.llama_get_memory(self.llama), True)

    def feed(self, batch):
        if self.api.llama_decode(self.llama, batch):
            raise RuntimeError("llama_decode failed")

    def prefill(self, ids):
        """The logits after one sequence's next tokens."""
        for start in range(0, len(ids), self.PASS):
            part = ids[start:start + self.PASS]
            tokens = (self.api.llama_token * len(part))(*part)   # the batch points to it
            self.feed(self.api.llama_batch_get_one(tokens, len(part)))
        return self.as_array(self.api.llama_get_logits_ith(self.llama, -1), (self.vocab,))

    def together(self, batch, ids, position):
        """The likeliest next tokens of all sequences, which go on with one token each."""
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        self.feed(batch)
        return self.as_array(self.api.llama_get_logits(self.llama),
                             (len(ids), self.vocab)).argmax(1).tolist()

    def last_logits(self, ids):
        self.make_room(1, len(ids))
        return self.prefill(ids).tolist()

    def generate(self, ids, count):
        self.make_room(1, len(ids) + count)
        start = time.perf_counter()
        for _ in range(count):
            ids = [int(self.prefill(ids).argmax())]
        return time.perf_counter() - start

    def score(self, ids):
        """Logits of all tokens, and ln softmax by numpy, in float32."""
        import numpy
        self.make_room(1, len(ids))
        batch, total = self.api.llama_batch_init(self.PASS, 0, 1), 0
        start = time.perf_counter()
        for first in range(0, len(ids), self.PASS):
            part = ids[first:first + self.PASS]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, first + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            self.feed(batch)
            targets = ids[first + 1:first + 1 + len(part)]
            rows = self.as_array(self.api.llama_get_logits(self.llama),
                                 (len(part), self.vocab))[:len(targets)]
            most = rows.max(1)
            zero = most + numpy.log(numpy.exp(rows - most[:, None]).sum(1))
            total += float((rows[numpy.arange(len(targets)), targets] - zero).sum())
        seconds = time.perf_counter() - start
        self.api.llama_batch_free(batch)
        return seconds, total

    def decode(self, context, first, count):
        if not context or context != self.context:
            self.make_room(len(first), len(context) + count)
            self.context = context
            if context:
                self.prefill(context)
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.llama), 0, len(context), -1)
        batch, ids = self.api.llama_batch_init(len(first), 0, 1), first
        start = time.perf_counter()
        for position in range(len(context), len(context) + count):
            ids = self.together(batch, ids, position)
        seconds = time.perf_counter() - start
        self.api.llama_batch_free(batch)
        return seconds, ids


class CTranslate2:
    # The setting is the library for products of matrices; by itself CTranslate2 takes MKL on
    # Intel's CPUs only. On the EPYC oneDNN makes 58 tokens/s for one sequence and MKL 26, but 77
    # and 165 for 16. Tried without gain: its AVX-512 code (CT2_FORCE_CPU_ISA), no end token,
    # forward_batch for prefill, which computes all positions' logits.
    title, version = "CTranslate2", "ctranslate2"
    usual = "MKL" if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else "oneDNN"
    settings = {"oneDNN": {"CT2_USE_MKL": "0"}, "MKL": {"CT2_USE_MKL": "1"}}

    def __init__(self, folder, setting):
        import ctranslate2
        self.generator = ctranslate2.Generator(
            str(folder / "ct2"), device="cpu", inter_threads=1,
            compute_type="int8" if os.environ.get("KL3M_BENCH_TYPE") == "q8" else "float32",
            intra_threads=THREADS)
        self.tokens = json.loads((folder / "ct2" / "vocabulary.json").read_text(encoding="utf-8"))

    def draw(self, prompts, count, **more):
        """Seconds and the tokens drawn for each prompt."""
        prompts = [[self.tokens[i] for i in ids] for ids in prompts]
        start = time.perf_counter()
        results = self.generator.generate_batch(
            prompts, max_length=count, min_length=count, sampling_topk=1,
            include_prompt_in_result=False, **more)
        return time.perf_counter() - start, [result.sequences_ids[0] for result in results]

    def last_logits(self, ids):
        import numpy
        return numpy.array(self.generator.forward_batch(
            [ids], return_log_probs=False))[0, -1].tolist()

    def generate(self, ids, count):
        return self.draw([ids], count)[0]

    def score(self, ids):
        start = time.perf_counter()
        result, = self.generator.score_batch([[self.tokens[i] for i in ids]])
        return time.perf_counter() - start, sum(result.log_probs)

    def decode(self, context, first, count):
        if not context:
            seconds, drawn = self.draw([[i] for i in first], count)
            return seconds, [ids[-1] for ids in drawn]
        # The kept state is copied before the first pass, so as many passes after that one are
        # measured.
        times = []
        _, drawn = self.draw([first], count + 1, static_prompt=[self.tokens[i] for i in context],
                             cache_static_prompt=True,
                             callback=lambda step: times.append(time.perf_counter()))
        return times[count] - times[0], [drawn[0][count - 1]]


PEERS = {"transformers": Transformers, "llama": LlamaCpp, "ct2": CTranslate2}


def serve(peer, setting, folder):
    """A worker: requests as lines of JSON in, results out. What libraries print on standard output
    is kept apart."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = PEERS[peer](Path(folder), setting)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=results, flush=True)


def once(peer, setting, folder, ids, count):
    """What a user's script does: import, load, generate. One byte on standard output says that it
    is done."""
    result = os.dup(1)
    os.dup2(2, 1)
    PEERS[peer](Path(folder), setting).generate(json.loads(ids), int(count))
    os.write(result, b"\n")


# ---- The model's files --------------------------------------------------------------------------

def write_hf(out):
    """The random model. Its vocabulary's rows are those of the real one; the tokenizer's 2,048 do
    for prompts."""
    models.write_model(out, tokenizer=TESTS / "tiny" / "tokenizer.json", **SHAPES)


def write_gguf(out):
    """For llama.cpp: its names, and all of Q, K and V instead of theirs head by head. Matrices are
    of the type that the file is named by: q8 is llama.cpp's Q8_0."""
    import gguf
    from safetensors.numpy import load_file
    heads, size = (SHAPES["num_attention_heads"],
                   SHAPES["hidden_size"] // SHAPES["num_attention_heads"])
    names = {"attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
    writer = gguf.GGUFWriter(out, "gptneox")
    writer.add_context_length(SHAPES["max_position_embeddings"])
    writer.add_embedding_length(SHAPES["hidden_size"])
    writer.add_block_count(SHAPES["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPES["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_rope_dimension_count(int(size * SHAPES["rotary_pct"]))
    writer.add_parallel_residual(True)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(SHAPES["vocab_size"])
    writer.add_tokenizer_model("no_vocab")   # ids in, ids out
    for name, tensor in load_file(out.parent / "hf" / "model.safetensors").items():
        layer, part = re.match(r"gpt_neox\.layers\.(\d+)\.(.*)\.", name), name.rpartition(".")[2]
        if layer and layer[2] == "attention.query_key_value":
            tensor = tensor.reshape(heads, 3, size, -1).swapaxes(0, 1).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.F32
        if tensor.ndim == 2 and "f32" not in out.name:
            kind = gguf.GGMLQuantizationType["Q8_0" if "q8" in out.name else "BF16"]
            tensor = gguf.quants.quantize(tensor, kind)
        writer.add_tensor("blk.%s.%s.%s" % (layer[1], names[layer[2]], part) if layer else
                          {"gpt_neox.embed_in.weight": "token_embd.weight",
                           "embed_out.weight": "output.weight"}.get(name, "output_norm." + part),
                          tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ct2(out):
    """For CTranslate2. Its converter knows transformers 4: two names that transformers 5 changed
    are given back."""
    import ctranslate2
    import transformers
    transformers.GPTNeoXConfig.rotary_pct = property(
        lambda config: config.rope_parameters["partial_rotary_factor"])
    transformers.GPTNeoXForCausalLM.embed_out = property(lambda model: model.lm_head)
    ctranslate2.converters.TransformersConverter(str(out.parent / "hf")).convert(str(out))


WRITERS = {"hf": write_hf, "f32.gguf": write_gguf, "bf16.gguf": write_gguf, "q8.gguf": write_gguf,
           "ct2": write_ct2}


def write_file(name, out):
    """One of the files. In a process of its own: the memory a parent ever used would count as its
    children's."""
    WRITERS[name](Path(out))


def prepare_model(folder, python, kind):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("hf", "f32.bin", kind + ".bin", kind + ".gguf", "ct2"):
        if (folder / name).exists():
            continue
        say("writing the model: %s" % name)
        unfinished = folder / ("unfinished-" + name)
        if name == "f32.bin":
            run([sys.executable, ROOT / "export_weights.py", folder / "hf", "-o", unfinished])
        elif name == kind + ".bin":
            run([KL3M, "-m", folder / "f32.bin", "--quantize", kind, "-o", unfinished, "-q"])
        else:
            run([python, __file__, "--write", name, unfinished])
        unfinished.rename(folder / name)


# ---- Processes ----------------------------------------------------------------------------------

class Program:
    """A process that reads lines and answers each with a line."""
    running = []

    def __init__(self, command, log, environ=None):
        self.name, self.log = " ".join(map(str, command))[:200], log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=errors, env=environ)
        Program.running.append(self)

    def ask(self, lines):
        """Seconds until all answers are there, and the answers."""
        start = time.perf_counter()
        self.process.stdin.write("".join(line + "\n" for line in lines).encode())
        self.process.stdin.flush()
        answers = [self.process.stdout.readline() for _ in lines]
        seconds = time.perf_counter() - start
        if not answers[-1]:
            sys.exit("bench_peers.py: %s ended:\n%s"
                     % (self.name, self.log.read_text(errors="replace")[-2000:]))
        return seconds, answers

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        Program.running.remove(self)

    def cpu_ticks(self):
        fields = Path("/proc/%d/stat" % self.process.pid).read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def settle():
    """Waits until no process computes any more: threads of some libraries spin for a while after
    their work."""
    for _ in range(100):
        before = [program.cpu_ticks() for program in Program.running]
        time.sleep(0.05)
        if before == [program.cpu_ticks() for program in Program.running]:
            return
    say("a process that should be idle uses the CPU: do not trust these figures")


def run_measured(command, environ=None):
    """Seconds from the start of a process to its first byte of output, and the most memory it had,
    in MB."""
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=errors, env=environ, bufsize=0)
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        errors.seek(0)
        if process.returncode or not first:
            sys.exit("bench_peers.py: %s failed:\n%s"
                     % (command[0], errors.read().decode(errors="replace")[-2000:]))
    return seconds, usage.ru_maxrss * 1024 / 1e6


class Kl3m:
    """The program, as its users start it."""
    title = "kl3m"

    def __init__(self, folder, scratch, kind):
        self.model, self.scratch = folder / (kind + ".bin"), scratch

    def command(self, *options):
        return [KL3M, "-m", self.model, "-j", THREADS, "-t", 0, "--ignore-eos", "--no-echo",
                "--no-speculation", *options]

    def start(self, *options):
        """Prompts on standard input, one a line, and their continuations out."""
        return Program(self.command(*options), self.scratch / "kl3m.log")

    def file(self, text):
        path = self.scratch / "prompt"
        path.write_text(text)
        return path

    def tokenize(self, lines):
        path = self.scratch / "lines"
        path.write_text("\n".join(lines) + "\n")
        with open(path) as file:
            out = subprocess.run([KL3M, "-m", self.model, "--tokenize"], stdin=file,
                                 stdout=subprocess.PIPE, check=True)
        return [list(map(int, line.split())) for line in out.stdout.splitlines()]

    def last_logits(self, text):
        out = self.scratch / "logits"
        run([KL3M, "-m", self.model, "-j", THREADS, "-f", self.file(text), "--logits", out])
        with open(out, "rb") as file:
            file.seek(-4 * SHAPES["vocab_size"], os.SEEK_END)
            return array("f", file.read())


class Peer:
    """One of the others: its workers, started when they are first asked, and the one that takes
    part in a work."""

    def __init__(self, name, python, folder, scratch):
        self.name, self.title, self.python, self.folder, self.scratch = (
            name, PEERS[name].title, python, folder, scratch)
        self.workers, self.setting = {}, None

    def environ(self):
        return dict(os.environ, HF_HUB_OFFLINE="1", **PEERS[self.name].settings[self.setting])

    def ask(self, do, **request):
        if self.setting not in self.workers:
            command = [self.python, __file__, "--serve", self.name, self.setting, self.folder]
            log = self.scratch / ("%s, %s.log" % (self.name, self.setting))
            self.workers[self.setting] = Program(command, log, self.environ())
        return json.loads(self.workers[self.setting].ask([json.dumps(dict(request, do=do))])[1][0])

    def run_once(self, ids, count):
        return run_measured([self.python, __file__, "--once", self.name, self.setting, self.folder,
                             ids, count], self.environ())


# ---- Prompts ------------------------------------------------------------------------------------

class Prompts:
    """Texts with an exact number of tokens: words that are one token each, and the space between,
    which is one too."""

    def __init__(self, kl3m):
        vocab = json.loads((TESTS / "tiny" / "tokenizer.json").read_text(
            encoding="utf-8"))["model"]["vocab"]
        words = sorted(word for word in vocab if re.fullmatch("[a-z]{2,}", word))
        self.words = [word for word, ids in zip(words, kl3m.tokenize(words)) if len(ids) == 1]
        self.kl3m, self.random = kl3m, random.Random(1)

    def new(self, count, texts=1):
        """[(text, ids)], new ones each time: nothing can be taken from what was computed before."""
        words = [self.random.sample(self.words, texts) for _ in range((count + 1) // 2)]
        lines = [" ".join(line) + " " * (count % 2 == 0) for line in zip(*words)]
        found = self.kl3m.tokenize(lines)
        assert [len(ids) for ids in found] == [count] * texts, (
            "prompts of %d tokens have %s" % (count, found))
        return list(zip(lines, found))


# ---- Works --------------------------------------------------------------------------------------
# What is measured. prompt() makes the input of one pair of windows; ours() and theirs() measure it,
# in the unit. A slow work has a third as many pairs and no windows to warm up. `settings` are those
# to try; all, where it has none.

class Decode:
    """Each sequence begins with one token, so that n new tokens are n passes: nothing is
    guessed."""
    unit, slow, settings = "tokens/s", False, {}

    def __init__(self, sequences, passes):
        self.sequences, self.passes = sequences, passes
        self.title = ("decode, %d sequences together" % sequences if sequences > 1
                      else "decode, one sequence")

    def begin(self, kl3m, prompts):
        self.prompts = prompts
        self.program = kl3m.start("-n", self.passes,
                                  *(["-b", self.sequences] if self.sequences > 1 else []))

    def prompt(self):
        return self.prompts.new(1, self.sequences)

    def ours(self, prompt):
        return len(prompt) * self.passes / self.program.ask([text for text, _ in prompt])[0]

    def theirs(self, peer, prompt):
        first = [ids[0] for _, ids in prompt]
        return len(prompt) * self.passes / peer.ask("decode", context=[], first=first,
                                                    count=self.passes)[0]

    def end(self):
        self.program.end()


class DecodeMany(Decode):
    """kl3m with its usual batch, beyond which it gains little; each peer with the one of these that
    it is fastest with."""
    unit, slow, batches = "tokens/s", True, (16, 48, 96)
    settings = {"transformers": ["static cache"], "llama": ["flash attention"], "ct2": ["MKL"]}

    def __init__(self, sequences, passes):
        super().__init__(sequences, passes)
        self.title, self.best = "decode, as many sequences together as pay off", {}

    def prompt(self):
        return self.prompts.new(1, max(self.batches))

    def ours(self, prompt):
        return super().ours(prompt[:self.sequences])

    def theirs(self, peer, prompt):
        if peer.name not in self.best:
            tried = super().theirs
            found = {count: max(tried(peer, prompt[:count]) for _ in range(2))
                     for count in self.batches}
            self.best[peer.name] = max(found, key=found.get)
            say("%s, %s sequences together: %s tokens/s" % (peer.title, ", ".join(map(str, found)),
                                                           ", ".join(map(shown, found.values()))))
        return super().theirs(peer, prompt[:self.best[peer.name]])


class DecodeText:
    """What guesses are worth on text that people wrote and Debian has, with no table to begin with.
    The peer has one token a pass, whatever the text is."""
    title, unit, slow, passes = "decode legal text, with guesses", "tokens/s", True, 32
    settings = {"transformers": [], "ct2": []}
    text, line, prompt_part = Path("/usr/share/common-licenses/GPL-3"), 1600, 1300   # characters

    def begin(self, kl3m, prompts):
        self.kl3m, self.prompts = kl3m, prompts
        text = self.text.read_text(encoding="utf-8").replace("\\", "\\\\").replace("\n", "\\n")
        lines = [text[i:i + self.line] for i in range(0, len(text) - self.line, self.line)]
        self.file = kl3m.file("".join(
            line[:self.prompt_part] + "\t" + line[self.prompt_part:] + "\n" for line in lines))
        run(["make", "-s", "-C", ROOT, BENCH])

    def prompt(self):
        return self.prompts.new(1)[0][1]

    def ours(self, prompt):
        done = run([ROOT / BENCH, self.kl3m.model, "-j", THREADS, "--replay", self.file, "--json"])
        figures = json.loads(done)
        say("guesses: %.2f tokens a pass, %.1f tokens/s without them"
            % (figures["tokens_per_pass"], figures["tokens_per_second"][0]))
        return figures["tokens_per_second"][1]

    def theirs(self, peer, prompt):
        return self.passes / peer.ask("decode", context=[], first=prompt, count=self.passes)[0]

    def end(self):
        pass


class DecodeFar:
    """kl3m reads its prompt each time and says itself how fast the tokens after the first came; the
    others keep it."""
    unit, slow, passes = "tokens/s", True, 32
    settings = {"transformers": ["static cache"], "llama": ["no flash attention"],
                "ct2": [CTranslate2.usual]}

    def __init__(self, position):
        self.position, self.title = position, "decode at position {:,}".format(position)

    def begin(self, kl3m, prompts):
        self.kl3m, self.text_and_ids = kl3m, prompts.new(self.position)[0]
        self.file = kl3m.file(self.text_and_ids[0])

    def prompt(self):
        return self.text_and_ids[1]

    def ours(self, prompt):
        command = list(map(str, self.kl3m.command("-f", self.file, "-n", self.passes + 1, "-v")))
        errors = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                check=True).stderr.decode()
        return float(re.search(r"first token after .*, %d more at ([\d.]+) tokens/s" % self.passes,
                               errors)[1])

    def theirs(self, peer, prompt):
        return self.passes / peer.ask("decode", context=prompt, first=prompt[-1:],
                                      count=self.passes)[0]

    def end(self):
        pass


class Prefill:
    """From a prompt to one new token."""
    unit, slow, settings = "tokens/s", False, {}

    def __init__(self, count):
        self.count, self.title = count, "prefill of {:,} tokens".format(count)

    def begin(self, kl3m, prompts):
        self.prompts, self.program = prompts, kl3m.start("-n", 1)

    def prompt(self):
        return self.prompts.new(self.count)[0]

    def ours(self, prompt):
        return self.count / self.program.ask([prompt[0]])[0]

    def theirs(self, peer, prompt):
        return self.count / peer.ask("generate", ids=prompt[1], count=1)

    def end(self):
        self.program.end()


class PrefillFar(Prefill):
    slow, settings = True, {"transformers": [Transformers.usual], "ct2": [CTranslate2.usual]}


class Score:
    """Log-probabilities of all tokens of a text but the first."""
    unit, slow, settings = "tokens/s", False, {}

    def __init__(self, count):
        self.count, self.title = count, "score of {:,} tokens".format(count)

    def begin(self, kl3m, prompts):
        self.prompts = prompts
        self.program = Program([KL3M, "-m", kl3m.model, "-j", THREADS, "--score"],
                               kl3m.scratch / "kl3m.log")

    def prompt(self):
        return self.prompts.new(self.count)[0]

    def ours(self, prompt):
        seconds, answers = self.program.ask([prompt[0]])
        self.last = prompt[1], float(answers[0].split(b"\t")[0])
        return self.count / seconds

    def theirs(self, peer, prompt):
        seconds, total = peer.ask("score", ids=prompt[1])
        ids, ours = self.last
        if ids == prompt[1] and abs(total / ours - 1) > 0.01:
            sys.exit("bench_peers.py: %s scores %.1f where kl3m scores %.1f"
                     % (peer.title, total, ours))
        return self.count / seconds

    def end(self):
        self.program.end()


class FirstToken:
    """A new process each time, up to its first token. The others are given ids, and so are spared
    their tokenizers."""
    title, unit, slow = "shell to first token, prompt of 10", "s", True
    settings = {name: [peer.usual] for name, peer in PEERS.items()}
    count, new = 10, 1

    def begin(self, kl3m, prompts):
        self.kl3m, self.prompts = kl3m, prompts

    def prompt(self):
        return self.prompts.new(self.count)[0]

    def ours(self, prompt):
        return run_measured(self.kl3m.command("-p", prompt[0], "-n", self.new))[0]

    def theirs(self, peer, prompt):
        return peer.run_once(prompt[1], self.new)[0]

    def end(self):
        pass


class Memory(FirstToken):
    """The most that such a process has in memory; for kl3m and llama.cpp the mapped file's pages
    are counted."""
    title, unit, count, new = "peak memory, prompt of 512, 16 new tokens", "MB", 512, 16

    def ours(self, prompt):
        return run_measured(self.kl3m.command("-p", prompt[0], "-n", self.new))[1]

    def theirs(self, peer, prompt):
        return peer.run_once(prompt[1], self.new)[1]


WORKS = [Decode(1, 32), DecodeText(), DecodeFar(3840), Decode(16, 16), DecodeMany(48, 16),
         Prefill(512), PrefillFar(3840), Score(512), FirstToken(), Memory()]


# ---- Agreement ----------------------------------------------------------------------------------

# In logits of standard deviation 3.5; llama.cpp keeps keys, values and GELU's table in fp16. Of 8
# bits each has its own, and the likeliest token may be another.
FAR_APART = {"f32": 0.05, "bf16": 0.3, "q8": 1.5}


def likeliest(logits):
    return max(range(len(logits)), key=logits.__getitem__)


def check_agreement(kl3m, peers, prompts, kind):
    """Ends the script unless every worker computes what kl3m does: in prefill, after a kept prompt,
    and together."""
    text, ids = prompts.new(65)[0]
    several = prompts.new(1, 16)
    ours, want = kl3m.last_logits(text), [likeliest(kl3m.last_logits(word)) for word, _ in several]
    for peer in peers:
        for peer.setting in PEERS[peer.name].settings:
            theirs = peer.ask("last_logits", ids=ids)
            apart = max(abs(a - b) for a, b in zip(ours, theirs))
            far = peer.ask("decode", context=ids[:-1], first=ids[-1:], count=1)[1]
            together = peer.ask("decode", context=[], first=[i for _, (i,) in several], count=1)[1]
            say("%s, %s: logits at most %.1g from kl3m's" % (peer.title, peer.setting, apart))
            same = far == [likeliest(ours)] and together == want
            if apart > FAR_APART[kind] or (kind == "f32" and not same):
                sys.exit("bench_peers.py: %s (%s) does not compute what kl3m does"
                         % (peer.title, peer.setting))


# ---- Measuring ----------------------------------------------------------------------------------

def choose_setting(work, peer):
    """Takes the peer's fastest setting for this work, and leaves it warm. Only speeds have several
    to try."""
    candidates = work.settings.get(peer.name, list(PEERS[peer.name].settings))
    if work.slow and len(candidates) == 1:
        peer.setting = candidates[0]
        return
    found = {}
    for peer.setting in candidates:
        for _ in range(1 if work.slow else 2):
            settle()
            found[peer.setting] = work.theirs(peer, work.prompt())
    peer.setting = max(found, key=found.get)


def measure(work, kl3m, peers, prompts, rounds):
    """The medians of all, and for each peer the median ratio of a window to kl3m's just before it:
    above 1, kl3m is ahead."""
    work.begin(kl3m, prompts)
    peers = [peer for peer in peers if work.settings.get(peer.name) != []]
    if not work.slow:
        work.ours(work.prompt())
    for peer in peers:
        choose_setting(work, peer)
    values, ratios = {"kl3m": []}, {}
    for _ in range(max(1, rounds // 3) if work.slow else rounds):
        for peer in peers:
            prompt = work.prompt()
            settle()
            ours = work.ours(prompt)
            settle()
            theirs = work.theirs(peer, prompt)
            values["kl3m"].append(ours)
            values.setdefault(peer.title, []).append(theirs)
            ratios.setdefault(peer.title, []).append(
                ours / theirs if work.unit == "tokens/s" else theirs / ours)
    work.end()
    values = {name: statistics.median(found) for name, found in values.items()}
    ratios = {name: statistics.median(found) for name, found in ratios.items()}
    others = ["%s (%s) %s, kl3m %.2f times as good"
              % (peer.title, peer.setting, shown(values[peer.title]), ratios[peer.title])
              for peer in peers]
    say("%s, %s: kl3m %s; %s" % (work.title, work.unit, shown(values["kl3m"]), "; ".join(others)))
    return work, values, ratios


# ---- Results ------------------------------------------------------------------------------------

def shown(value):
    return ("%.2f" % value if value < 10 else "%.1f" % value if value < 100
            else "{:,.0f}".format(value))


def cpu_model():
    found = re.search(r"^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), flags=re.M)
    return found[1] if found else os.uname().machine


def table(results, peers):
    names = ["kl3m"] + [peer.title for peer in peers]
    lines = ["| | %s | kl3m against the best of them |" % " | ".join(names),
             "|---|" + "--:|" * (len(names) + 1)]
    for work, values, ratios in results:
        best = min(ratios, key=ratios.get)
        cells = ([shown(values[name]) if name in values else "" for name in names]
                 + ["%.2f (%s)" % (ratios[best], best)])
        lines.append("| %s, %s | %s |" % (work.title, work.unit, " | ".join(cells)))
    return "\n".join(lines)


def draw(results, peers, below):
    """Bars, grouped by work, each group with a scale of its own. Colours that can be read on white
    and on black."""
    names, parts, y = ["kl3m"] + [peer.title for peer in peers], [], 56
    for work, values, _ in results:
        better = "" if work.unit == "tokens/s" else " (less is better)"
        parts.append('<text x="16" y="%d" class="w">%s, %s%s</text>'
                     % (y, work.title, work.unit, better))
        most = max(values.values())
        for name in [name for name in names if name in values]:
            y += 18
            width = max(1, round(500 * values[name] / most))
            kind = ' class="k"' if name == "kl3m" else ""
            parts.append('<text x="108" y="%d" text-anchor="end"%s>%s</text>'
                         '<rect x="116" y="%d" width="%d" height="13" rx="2"%s/>'
                         '<text x="%d" y="%d"%s>%s</text>'
                         % (y, kind, name, y - 11, width, kind, 116 + width + 6, y, kind,
                            shown(values[name])))
        y += 32
    lines = ['<text x="16" y="%d" class="s">%s</text>' % (y + 16 * i, escape(line))
             for i, line in enumerate(below)]
    y += 16 * len(below)
    style = ("text{font:12px system-ui,sans-serif;fill:#6e7781}.t{font-size:16px;font-weight:600}"
             ".w{font-weight:600}.s{font-size:11px}rect{fill:#8c959f}"
             "@media(prefers-color-scheme:dark){text{fill:#8b949e}}"
             "rect.k{fill:#2f81f7}text.k{fill:#2f81f7;font-weight:600}")
    title = ('<text x="16" y="28" class="t">'
             'kl3m beside other programs: one model, fp32, on a CPU</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="700" height="%d" viewBox="0 0 700 %d"'
            ' role="img">'
            '<title>kl3m\'s speed and memory beside those of %s</title>\n'
            '<style>%s</style>\n%s\n</svg>\n'
            % (y, y, ", ".join(names[1:]), style, "\n".join([title, *parts, *lines])))


def bench(args, scratch):
    python = prepare_environment((args.env or scratch / "env").absolute())
    folder = (args.model_dir or scratch / "model").absolute()
    os.environ["KL3M_BENCH_TYPE"] = args.type     # for the workers
    prepare_model(folder, python, args.type)
    kl3m = Kl3m(folder, scratch, args.type)
    peers = [Peer(name, python, folder, scratch) for name in args.only]
    prompts = Prompts(kl3m)
    check_agreement(kl3m, peers, prompts, args.type)
    results = [measure(work, kl3m, peers, prompts, args.rounds) for work in WORKS]

    versions = {**PACKAGES, **COMPILED}
    where = "%s, %s, %d threads" % (date.today(), cpu_model(), THREADS)
    who = ", ".join([run([KL3M, "--version"]).decode().split(",")[0].strip()]
                    + ["%s %s" % (PEERS[name].version, versions[PEERS[name].version])
                       for name in args.only])
    print("%s; %s; random weights at the shapes of kl3m-002-170m, %s\n\n%s"
          % (where, who, args.type, table(results, peers)))
    if not args.no_svg and args.type == "f32":
        below = ["%s. Random weights at the shapes of kl3m-002-170m." % where, who + "."]
        (HERE / "bench.svg").write_text(draw(results, peers, below), encoding="utf-8")
        say("wrote %s" % (HERE / "bench.svg"))


def main():
    for option, function in (("--serve", serve), ("--once", once), ("--write", write_file)):
        if sys.argv[1:2] == [option]:   # this script, as it starts itself
            return function(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="LIST", default=",".join(PEERS),
                        help="peers, of %(default)s")
    parser.add_argument("--rounds", type=int, default=9,
                        help="pairs of windows; slow works have a third (%(default)s)")
    parser.add_argument("--env", type=Path, metavar="DIR",
                        help="the environment, kept and used again")
    parser.add_argument("--model-dir", type=Path, metavar="DIR",
                        help="the model's files, kept and used again")
    parser.add_argument("--no-svg", action="store_true", help="print the table only")
    parser.add_argument("--type", choices=("f32", "bf16", "q8"), default="f32",
                        help="of the weights (%(default)s)")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if args.type != "f32":     # what else there is of this type
        args.only = [name for name in args.only
                     if name == "llama" or (name == "ct2" and args.type == "q8")]
    if not set(args.only) <= set(PEERS):
        parser.error("--only takes %s" % ", ".join(PEERS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that nothing is left behind
    with tempfile.TemporaryDirectory(prefix="kl3m-bench-") as scratch:
        try:
            bench(args, Path(scratch))
        finally:
            for program in list(Program.running):
                program.end()


if __name__ == "__main__":
    main()
