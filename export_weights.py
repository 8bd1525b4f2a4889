#!/usr/bin/env python3
"""Turn a GPT-NeoX model in Hugging Face layout into the one flat file that kl3m maps.

In:  a directory with config.json, tokenizer.json and model.safetensors (or its index and shards),
     or the name of a model on the hub, whose files are found in huggingface_hub's cache or
     downloaded into it.
Out: header, section table, then "config", "about", "tokenizer" and the weights as fp32, packed as
     the forward pass walks them, each at a 64-byte-aligned offset with a checksum (README.md: the
     format).

What kl3m would not compute exactly as the reference does is refused by name, before anything is
written. The same input gives the same bytes. Python 3.9 is all it needs, and room for 32 rows of a
tensor at a time.

Parts, in order: errors, messages, files and JSON, config, safetensors, tensor table, weights,
tokenizer, hub, about, the file, command line. A part calls only parts above it.
"""
import argparse
import contextlib
import email.utils
import errno
import fcntl
import glob
import hashlib
import heapq
import http.client
import io
import json
import math
import os
import random
import re
import secrets
import select
import shutil
import signal
import ssl
import stat
import struct
import sys
import time
import unicodedata
import urllib.parse
import urllib.request
import zlib
from array import array
from collections import Counter, namedtuple

PROGRAM = "export_weights.py"
FORMAT_VERSION = 2

# ---- Errors ----


class ExportError(Exception):
    """One line for the user: what is wrong, what was expected, what to do."""


def short(text):
    return text if len(text) <= 80 else text[:77] + "..."


def show(value):
    """A value from somebody else's file, short enough for a message."""
    return short("nothing" if value is None else json.dumps(value))


def expect(ok, what, found, expected, remedy):
    if not ok:
        raise ExportError(f"{what}: found {show(found)}, expected {expected}; {remedy}")


# ---- Messages ----

class Patient(io.RawIOBase):
    """A standard stream to write to. If it is non-blocking and full we wait, and nothing is lost;
    if it is a pipe or a terminal that has gone, no export ends for want of a reader."""

    def __init__(self, descriptor):
        self.descriptor = descriptor

    def fileno(self):
        return self.descriptor

    def isatty(self):
        return os.isatty(self.descriptor)

    def writable(self):
        return True

    def write(self, data):
        left = bytes(data)
        while left:
            try:
                left = left[os.write(self.descriptor, left):]
            except BlockingIOError:
                select.select([], [self.descriptor], [])
            except OSError:
                break
        return len(data)


def draw(text):
    """Text in place of the terminal's last line."""
    columns = 0
    with contextlib.suppress(OSError):   # it may have gone
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    width = (columns or 80) - 1
    print("\r" + text[:width].ljust(width), end="\r", file=sys.stderr, flush=True)


def note(text):
    """A line for the user; a bar gives way to it. Names of files and what servers say stand in it,
    and a terminal would obey their control characters: those are shown as escapes."""
    if sys.stderr.isatty():
        draw("")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode()
                   for char in text)
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


class Progress:
    """How far it is: a bar if standard error is a terminal, drawn at most ten times a second, else
    a line every ten seconds."""

    def __init__(self, total, done=0):
        self.total, self.first, self.start = total, done, time.monotonic()
        self.bar = sys.stderr.isatty()
        self.drawn = 0.0 if self.bar else self.start

    def show(self, name, done):
        now = time.monotonic()
        if done < self.first:   # begun again
            self.first, self.start = done, now
        if now - self.drawn < (0.1 if self.bar else 10):
            return
        self.drawn = now
        rate = (done - self.first) / (now - self.start + 0.001)
        minutes, seconds = divmod(int((self.total - done) / rate) if rate else 0, 60)
        text = (f"{done / 1e6:.0f} of {self.total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{minutes}:{seconds:02} left  {name}")
        if self.bar:
            draw(f"[{'#' * (20 * done // self.total):20}] {text}")
        else:
            note(text)


# ---- Files and JSON ----

# The most bytes of a JSON text, since one that is made to do so takes 25 times its size in memory
# and a second for each 4 MB. With all the layers that kl3m takes, and their buffers, a safetensors
# header has 8 MB and an index 5; the real tokenizer.json has 2 MB, the real config.json 1 KB.
HEADER_LIMIT, TOKENIZER_LIMIT, CONFIG_LIMIT = 1 << 24, 1 << 25, 1 << 20
DAMAGED = "the file is damaged or cut short: remove it and download it again"
CHUNK = 1 << 16   # bytes at a time

RESAVE = "load it with transformers and use save_pretrained, which writes model.safetensors"
# What else may stand under a file's name, by its first bytes, and what to do then.
KINDS = (
    (rb"version https://git-lfs\.github\.com/spec/",
     "a Git LFS pointer, not the file that it stands for",
     "run `git lfs pull` in its folder, or download the file itself"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)", "a web page, not the file",
     "download the file itself: its address on the hub has /resolve/ where the page's has /blob/"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a pickle of PyTorch", RESAVE),
    (rb"GGUF", "a model for llama.cpp", "pass the model that it was made from"),
    (rb"\x89HDF", "a model for TensorFlow", RESAVE))

# What mends a fault of the disk, where that is known.
MENDS = {errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room in your quota there",
         **dict.fromkeys((errno.EACCES, errno.EPERM), "get the right to do that there"),
         errno.EROFS: "have that disk mounted for writing",
         **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
                         "move what stands there out of the way"),
         errno.EFBIG: "raise the limit for a file's size (ulimit -f)",
         errno.EIO: "see whether that disk is well",
         errno.ENAMETOOLONG: "use shorter names"}


def fault(error, otherwise):
    """A fault of the disk in words: what, and what to do about it."""
    mend = MENDS.get(error.errno)
    return f"{error.strerror or error}; {f'{mend}, or {otherwise}' if mend else otherwise}"


@contextlib.contextmanager
def reading(what, otherwise="take another copy of it"):
    """Says of a fault within that it is this file's, which is the source's and not OUT."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot read {what}: {fault(error, otherwise)}")


def look(path):
    """What os.stat says, or None if there is nothing. What cannot be told is a fault, where
    os.path.isfile and its like say no."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):   # the last: NUL in the name
        return None


def is_plain(status):
    return status is not None and stat.S_ISREG(status.st_mode)


def status_of(path):
    """The same of a file of the source."""
    with reading(path):
        return look(path)


def is_folder(path):
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def size_of(path, expected, remedy):
    """The size of a plain file, which must be there."""
    status = status_of(path)
    expect(is_plain(status), path, None, expected, remedy)
    return status.st_size


def explain_start(path, start):
    """Refuses a file that is not of the kind it should be and starts as others do."""
    for pattern, what, remedy in KINDS:
        if re.match(pattern, start):
            raise ExportError(f"{path} is {what}; {remedy}")


def remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def rename(path, new):
    """What is there, if anything."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, new)


@contextlib.contextmanager
def at_the_end(action):
    """Does this when all within is done, be it after an error or a signal."""
    try:
        yield
    finally:
        try:
            action()
        except BaseException:   # a signal at this very moment; later ones are ignored
            action()
            raise


@contextlib.contextmanager
def part_beside(path):
    """A new file that is to take path's place. If it did not when all is done, it is removed. No
    other process has its name."""
    part = f"{path}.{secrets.token_hex(4)}.part"
    with at_the_end(lambda: remove(part)), open(part, "xb") as file:
        yield file


def keep_rights(file, path):
    """The new file may be read by those alone who may read the one whose place it takes."""
    with contextlib.suppress(FileNotFoundError):
        older = os.stat(path)
        for owner, group in ((-1, older.st_gid), (older.st_uid, -1)):
            with contextlib.suppress(OSError):   # only root may give a file away
                os.fchown(file.fileno(), owner, group)
        newer = os.fstat(file.fileno())
        rights = older.st_mode & (0o777 if newer.st_gid == older.st_gid else 0o707)
        if stat.S_IMODE(newer.st_mode) != rights:   # a disk without rights has the same for all
            os.fchmod(file.fileno(), rights)


def parse_object(data, where):
    """The JSON object in data (bytes). Which of two equal keys counts JSON leaves open."""
    def members(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {show(key)} is there twice")
        return table
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{where} is not sound JSON: {error}; {DAMAGED}")
    expect(isinstance(value, dict), where, value, "a JSON object", DAMAGED)
    return value


def read_object(directory, name, limit):
    path = os.path.join(directory, name)
    size = size_of(path, f"the model's {name}", "pass the directory that has it")
    expect(size <= limit, path, size, f"at most {limit} bytes", "no model that kl3m runs has more")
    with reading(path), open(path, "rb") as file:
        data = file.read()
    explain_start(path, data)
    return parse_object(data, path)


def is_count(value):
    return type(value) is int and value >= 0   # isinstance would let True pass


# ---- Config ----

# As they lie in the file.
Config = namedtuple("Config", "hidden layers heads kv_heads head_size rotary_dims intermediate "
                              "vocab context parallel_residual rotary_base eps")

NOBODY = 0xFFFFFFFF  # no token; in a hash table an empty slot
NOT_COMPUTED = "kl3m computes nothing else"
MOST_ENDS = 8        # tokens that end a text, as they lie in the file
GENERATION = "generation_config.json"    # a model may have none
# The most that kl3m's read_config takes.
SIZES = {"hidden_size": 1 << 16, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12,
         "intermediate_size": 1 << 18, "vocab_size": 1 << 22, "max_position_embeddings": 1 << 20}
HEAD_SIZE_LIMIT = 1 << 12
# Where kl3m computes one value only; it is also what transformers takes for a missing field.
FIXED = {"model_type": "gpt_neox", "hidden_act": "gelu", "attention_bias": True,
         "tie_word_embeddings": False}
OTHERS = "transformers and llama.cpp run"    # models that kl3m does not
REMEDIES = {"model_type": f"kl3m runs GPT-NeoX models; {OTHERS} this one",
            "hidden_act": f"kl3m computes nothing else; {OTHERS} a model that was trained so",
            "tie_word_embeddings": "save it untied, with embed_out.weight a copy of "
                                   "gpt_neox.embed_in.weight"}
# What transformers takes for a missing max_position_embeddings. Its defaults for the other sizes
# are those of GPT-NeoX-20B, so that a config without them is not whole.
CONTEXT = 2048
ROPE_NUMBERS = ("partial_rotary_factor", "rope_theta")
ROPE_PLACES = ("rope_scaling", "rope_parameters")   # in the order in which transformers 5 looks


def expect_field(ok, name, found, expected, remedy="correct the field"):
    expect(ok, f"config.json: {name}", found, expected, remedy)


def check_number(name, value, least, most):
    ok = type(value) in (int, float) and least <= value <= most   # NaN fails every comparison
    expect_field(ok, name, value, f"a number from {least} to {most}")


def scales_nothing(name, value, fields):
    """Whether an entry of rope_scaling or rope_parameters leaves the positions as they are."""
    if name in ("rope_type", "type"):
        return value == "default" or value == "linear" and fields.get("factor") == 1
    if name in ("factor", "attention_factor"):
        return value in (None, 1)
    return value is None or name in (*ROPE_NUMBERS, "original_max_position_embeddings")


def check_rope(config):
    """Positions are not scaled, whichever of the two places is read."""
    for place in ROPE_PLACES:
        fields = {} if config.get(place) is None else config[place]
        expect_field(isinstance(fields, dict), place, fields, "null or an object", NOT_COMPUTED)
        for name, value in fields.items():
            expect_field(scales_nothing(name, value, fields), f"{place}.{name}", value,
                         'only rope_type "default"', NOT_COMPUTED)


def rope_number(config, newer, older, default, least, most):
    """The number that transformers 5 reads: the newer name in the first place that is not empty, or
    else the older one at the top, which is all that transformers 4 reads. Neither reads the newer
    name at the top. What is there and not read must agree: somebody meant it."""
    spellings = {f"{place}.{newer}": (config.get(place) or {}).get(newer) for place in ROPE_PLACES}
    spellings.update({older: config.get(older), newer: config.get(newer)})
    place = next(filter(config.get, ROPE_PLACES), None)
    if place and newer in config[place]:
        read = f"{place}.{newer}"
    else:
        read = older if older in config else "its default"
    number = spellings.get(read, default)
    check_number(read, number, least, most)
    for name, value in spellings.items():
        expect_field(value is None or value == number, name, value,
                     f"{number} as transformers takes it from {read}",
                     f"take it out, or set {older} too if the model was trained so")
    return float(number)


def read_config(config):
    """config.json as a Config; kv_heads stays 0, since only the tensors tell it."""
    for name, only in FIXED.items():
        value = config.get(name, only)
        ok = type(value) is type(only) and value == only
        expect_field(ok, name, value, show(only), REMEDIES.get(name, NOT_COMPUTED))
    parallel = config.get("use_parallel_residual", True)
    expect_field(type(parallel) is bool, "use_parallel_residual", parallel, "true or false")
    expect_field(config.get("quantization_config") is None, "quantization_config",
                 config.get("quantization_config"), "nothing", "save the model without it")
    config = {"max_position_embeddings": CONTEXT, "layer_norm_eps": 1e-5, **config}
    for name, most in SIZES.items():
        value = config.get(name)
        expect_field(is_count(value) and 1 <= value <= most, name, value,
                     f"a whole number from 1 to {most}")
    hidden, layers, heads, intermediate, vocab, context = (config[name] for name in SIZES)
    expect_field(hidden % heads == 0, "hidden_size", hidden,
                 f"a multiple of num_attention_heads {heads}")
    head_size = hidden // heads
    expect_field(head_size <= HEAD_SIZE_LIMIT, "hidden_size", hidden,
                 f"at most {HEAD_SIZE_LIMIT} for each of num_attention_heads {heads}", NOT_COMPUTED)
    head_dim = config.get("head_dim")   # only for rotary dimensions does the reference read it
    expect_field(head_dim in (None, head_size), "head_dim", head_dim, head_size, NOT_COMPUTED)
    check_rope(config)
    share = rope_number(config, "partial_rotary_factor", "rotary_pct", 0.25, 0, 1)
    rotary_dims = int(head_size * share)
    expect_field(rotary_dims % 2 == 0, "rotary_pct (partial_rotary_factor)", share,
                 f"an even number of rotary dimensions, not {rotary_dims} of {head_size}",
                 NOT_COMPUTED)
    base = rope_number(config, "rope_theta", "rotary_emb_base", 10000, 1, 1e12)
    eps = config["layer_norm_eps"]
    check_number("layer_norm_eps", eps, 1e-30, 1)
    return Config(hidden, layers, heads, 0, head_size, rotary_dims, intermediate, vocab, context,
                  parallel, base, float(eps))


def tokens_named(name, sources, vocab):
    """The ids that config.json or generation_config.json has under this name, one or a list; None:
    neither has any. As in transformers generation_config.json, the first here, wins, and null is
    as good as absent."""
    for file, fields in sources:
        value = fields.get(name)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        ok = 0 < len(ids) <= MOST_ENDS and all(is_count(i) and i < vocab for i in ids)
        expect(ok, f"{file}: {name}", value, f"a token's id below {vocab}, or up to {MOST_ENDS} in "
               "a list", "correct it, or set it to null")
        return list(dict.fromkeys(ids))
    return None


def config_section(config, sources, tokenizer):
    """Sizes, then the tokens that texts start from and end with: those that the model's files
    (sources) name by id, else <|start|> and <|end|>, if the tokenizer has them; no normalizer."""
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    start = tokens_named("bos_token_id", sources, config.vocab)
    ends = tokens_named("eos_token_id", sources, config.vocab)
    start = start or [ids.get("<|start|>", NOBODY)]
    ends = ends or [ids[name] for name in ("<|end|>",) if name in ids]
    return struct.pack("<10I8x2d", *config) + struct.pack(
        "<10I24x", start[0], len(ends), *(ends + [0] * (MOST_ENDS - len(ends))))


# ---- Safetensors ----

Tensor = namedtuple("Tensor", "name path dtype shape offset size")   # offset in its file, in bytes

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
# What some versions saved beside the weights: kl3m makes the mask and the frequencies itself.
BUFFER = re.compile(r"gpt_neox\.(layers\.\d+\.attention\.)?(bias|masked_bias|rotary_emb\.inv_freq)")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MIXED = "index and shards are of different models: download them again"


def read_safetensors(path):
    """{name: Tensor} of one file without buffers. Its tensors must cover the data, none overlap."""
    file_size = size_of(path, "a file", "download it")
    with reading(path), open(path, "rb") as file:
        start = file.read(200)
        data_start = 8 + int.from_bytes(start[:8], "little")
        if not 8 < data_start <= min(file_size, 8 + HEADER_LIMIT):
            explain_start(path, start)
            expect(not re.fullmatch(rb"[\s!-~]+", start), path, start.decode("ascii", "replace"),
                   "weights", "download the file itself, with HF_TOKEN if that is asked for")
            expect(False, path, data_start - 8, f"a header's size that fits a file of {file_size} "
                   f"bytes, and at most {HEADER_LIMIT}", DAMAGED)
        file.seek(8)
        header = parse_object(file.read(data_start - 8), f"{path}: header")
    header.pop("__metadata__", None)
    tensors = [read_entry(path, name, entry, data_start, file_size)
               for name, entry in header.items()]
    end = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        expect(tensor.offset == end, f"{path}: {show(tensor.name)}: offset", tensor.offset,
               f"{end}, the end of the tensor before it", DAMAGED)
        end += tensor.size
    expect(end == file_size, f"{path}: size", file_size, f"{end} as its header says", DAMAGED)
    return {tensor.name: tensor for tensor in tensors if not BUFFER.fullmatch(tensor.name)}


def read_entry(path, name, entry, data_start, file_size):
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, ends = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    ok = (isinstance(dtype, str) and isinstance(shape, list) and all(map(is_count, shape))
          and isinstance(ends, list) and all(map(is_count, ends)) and len(ends) == 2
          and ends[0] <= ends[1] <= file_size - data_start)
    expect(ok, f"{path}: {show(name)}", entry, "dtype, shape and data_offsets inside the file",
           DAMAGED)
    return Tensor(name, path, dtype, shape, data_start + ends[0], ends[1] - ends[0])


def read_index(directory):
    """{tensor's name: shard's name}; no shard's name leads out of the directory."""
    shard_of = read_object(directory, INDEX, HEADER_LIMIT).get("weight_map")
    expect(isinstance(shard_of, dict), f"{INDEX}: weight_map", shard_of, "an object", DAMAGED)
    for name, shard in shard_of.items():
        expect(isinstance(shard, str) and re.fullmatch(r"\w[\w.-]*", shard),
               f"{INDEX}: {show(name)}", shard, "a plain file name", DAMAGED)
    return shard_of


MERGE = "merge it into its base model (PEFT's merge_and_unload, then save_pretrained) and pass that"
# Weights that are not what an export reads: the names of their files, what they are, what to do.
OTHER_WEIGHTS = (
    (r"adapter_(config\.json|model\..*)", "an adapter without its base model", MERGE),
    (r"model-\d+-of-\d+\.safetensors", "a shard without the index", f"download {INDEX} too"),
    (r".*\.safetensors", "which is not the name", f"rename it to {SINGLE} if it is the model"),
    (r"pytorch_model.*\.(bin|json)|(model|consolidated).*\.(pt|pth|ckpt)", "PyTorch's format",
     RESAVE),
    (r".*\.gguf", "llama.cpp's format", "pass the model that it was made from"),
    (r"flax_model.*|tf_model.*|.*\.(h5|msgpack|onnx|ot|npz)", "another library's format", RESAVE))


def explain_weights(place, names):
    """Refuses a place that has weights of another kind among its files."""
    for pattern, what, remedy in OTHER_WEIGHTS:
        for name in filter(re.compile(pattern).fullmatch, sorted(names)):
            raise ExportError(f"{place} has no {SINGLE} but {name}, {what}; {remedy}")


def check_folder(directory):
    """Whether the directory has what an export needs; if not, what is there instead is named."""
    with reading(directory):
        names = os.listdir(directory)
    if SINGLE not in names and INDEX not in names:
        explain_weights(directory, names)
        for below in "*", os.path.join("snapshots", "*"):   # the latter in the hub's cache
            pattern = os.path.join(glob.escape(directory), below, "config.json")
            for found in sorted(glob.glob(pattern)):
                raise ExportError(f"{directory} has no {SINGLE}; pass the folder in it that has "
                                  f"the model, such as {os.path.dirname(found)}")
        raise ExportError(f"{directory} has no {SINGLE} and no {INDEX}; pass the directory that "
                          "has the model, or its name on the hub like org/model")
    for name in ("config.json", "tokenizer.json"):
        remedy = f"copy the {name} of that model, or of its base model, there"
        if name == "tokenizer.json" and "tokenizer.model" in names:
            remedy = f"a SentencePiece tokenizer is of another family: {OTHERS} this model"
        expect(name in names, os.path.join(directory, name), None, "the model's, beside its "
               "weights", remedy)


def read_tensors(directory):
    """{name: Tensor} of model.safetensors, or of the shards that its index names."""
    single = os.path.join(directory, SINGLE)
    if status_of(single) or not status_of(os.path.join(directory, INDEX)):
        return read_safetensors(single)
    shard_of = read_index(directory)
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in read_safetensors(os.path.join(directory, shard)).items():
            found = shard_of.get(name)
            expect(found == shard, f"{INDEX}: {show(name)}", found, shard, MIXED)
            tensors[name] = tensor
    for name, shard in shard_of.items():
        expect(name in tensors or BUFFER.fullmatch(name), f"{shard}: {show(name)}", None,
               "the tensor", MIXED)
    return tensors


# ---- Tensor table ----

VECTOR, TABLE, PANELS = "vector", "table", "panels"   # how a weight lies in the file

Weight = namedtuple("Weight", "name source rows cols kind")   # a vector is one row

ANOTHER = "the weights are not of the model that config.json describes, or not all of them are here"
QKV = "attention.query_key_value"
PROJECTIONS = "embed_out.weight", "lm_head.weight"   # its names: transformers has both since 5.14


def tensor_table(config):
    """Every weight in the file's order: the one list that drives checking, packing and writing."""
    hidden, wide = config.hidden, config.intermediate

    def norm(name):
        for part in (".weight", ".bias"):
            yield Weight(name + part, "gpt_neox." + name + part, 1, hidden, VECTOR)

    def linear(name, rows, cols):
        yield Weight(name + ".weight", "gpt_neox." + name + ".weight", rows, cols, PANELS)
        yield Weight(name + ".bias", "gpt_neox." + name + ".bias", 1, rows, VECTOR)

    yield Weight("embed_in.weight", "gpt_neox.embed_in.weight", config.vocab, hidden, TABLE)
    for number in range(config.layers):
        layer = f"layers.{number}."
        yield from norm(layer + "input_layernorm")
        yield from norm(layer + "post_attention_layernorm")
        yield from linear(layer + QKV, hidden + 2 * config.kv_heads * config.head_size, hidden)
        yield from linear(layer + "attention.dense", hidden, hidden)
        yield from linear(layer + "mlp.dense_h_to_4h", wide, hidden)
        yield from linear(layer + "mlp.dense_4h_to_h", hidden, wide)
    yield from norm("final_layer_norm")
    yield Weight(PROJECTIONS[0], PROJECTIONS[0], config.vocab, hidden, PANELS)


def count_kv_heads(config, tensors):
    """From the rows of the first query_key_value; the reference ignores num_key_value_heads."""
    name = f"gpt_neox.layers.0.{QKV}.weight"
    shape = tensors[name].shape if name in tensors else None
    rows = shape[0] if shape else 0
    if rows == 3 * config.hidden:
        return config.heads
    kv_heads, rest = divmod(rows - config.hidden, 2 * config.head_size)
    expect(rest == 0 and kv_heads > 0 and config.heads % kv_heads == 0, name, shape,
           f"{3 * config.hidden} rows (multi-head) or {config.hidden} + {2 * config.head_size} for "
           f"each key-value head, whose number divides {config.heads}", ANOTHER)
    return kv_heads


def same_data(one, other):
    """Whether two tensors of one size hold the same bytes."""
    with reading(one.path), open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        sizes = (min(CHUNK, one.size - done) for done in range(0, one.size, CHUNK))
        return all(first.read(size) == second.read(size) for size in sizes)


def with_one_projection(tensors):
    """The tensors with the projection to the vocabulary under its older name. If both names are
    there, the reference takes one of the two, so they must be the same."""
    old, new = (tensors.get(name) for name in PROJECTIONS)
    if old and new:
        same = (old.dtype, old.shape, old.size) == (new.dtype, new.shape, new.size)
        expect(same and same_data(old, new), "tensors", PROJECTIONS,
               "one of the two, or the same in both", "take out the one that was not trained")
    others = {name: tensor for name, tensor in tensors.items() if name not in PROJECTIONS}
    return {**others, PROJECTIONS[0]: old or new} if old or new else others


def check_names(tensors):
    """Refuses weights that were saved with something around the model, or without its head."""
    embedding = "embed_in.weight"
    expected = "gpt_neox." + embedding
    for name in tensors:
        expect(".lora_" not in name, "tensors", name, "no adapter", MERGE)
        if name.endswith(embedding):
            around = name[:-len(embedding)]
            remedy = (MERGE if "base_model." in around else
                      "save the model itself and not what wraps it" if around else
                      "save the whole GPTNeoXForCausalLM and not the GPTNeoXModel in it")
            expect(name == expected, "tensors", name, expected, remedy)


def check_tensors(config, tensors):
    """Hold every weight of the table against the files; no tensor may be missing or left over."""
    unknown = dict(tensors)
    strange = sorted(unknown.keys() - {weight.source for weight in tensor_table(config)})
    for weight in tensor_table(config):
        tensor = unknown.pop(weight.source, None)
        shape = [weight.cols] if weight.kind == VECTOR else [weight.rows, weight.cols]
        names = PROJECTIONS if weight.source in PROJECTIONS else [weight.source]
        expect(tensor, " or ".join(names), *(strange[:1] or [None]), f"a tensor of shape {shape}",
               ANOTHER)
        expect(tensor.shape == shape, f"{tensor.name}: shape", tensor.shape, shape, ANOTHER)
        expect(tensor.dtype in ITEM_SIZE, f"{tensor.name}: dtype", tensor.dtype, "F32, F16 or BF16",
               "save the weights as one of these")
        size = weight.rows * weight.cols * ITEM_SIZE[tensor.dtype]
        expect(tensor.size == size, f"{tensor.name}: bytes", tensor.size, size, DAMAGED)
    for name in sorted(unknown):
        expect(False, "tensors", name, "only those of config.json's GPT-NeoX model", NOT_COMPUTED)


# ---- Weights ----
# Numbers pass as fp32 bits in arrays of 4-byte integers, little-endian as in the source and the
# file: they are moved, never computed with, so this machine's byte order does not matter.

BLOCK = 32   # rows read and packed at a time; panels and vectors are padded to a multiple of it
LANES = 16   # rows that lie side by side in a panel


def padded(count):
    return -(-count // BLOCK) * BLOCK


def weight_size(weight):
    """Bytes of a weight in the file."""
    if weight.kind == VECTOR:
        return 4 * padded(weight.cols)
    return 4 * weight.cols * (padded(weight.rows) if weight.kind == PANELS else weight.rows)


def source_rows(config, name, rows):
    """The source's row for each row in the file. Query, key and value rows lie there in the file's
    order (all of Q, of K, of V) if heads share keys, else as [head][q, k, v][head size]."""
    if QKV not in name or config.kv_heads != config.heads:
        return range(rows)
    return [(3 * head + part) * config.head_size + row
            for part in range(3) for head in range(config.heads) for row in range(config.head_size)]


def read_rows(file, tensor, numbers, cols):
    """The rows with these numbers as fp32 bits, [len(numbers)][cols]."""
    row_size = cols * ITEM_SIZE[tensor.dtype]
    raw = bytearray(len(numbers) * row_size)
    first = 0
    while first < len(numbers):   # one read for each run of neighbours
        end = first + 1
        while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            end += 1
        file.seek(tensor.offset + numbers[first] * row_size)
        got = file.readinto(memoryview(raw)[first * row_size:end * row_size])
        expect(got == (end - first) * row_size, tensor.path, got, "more bytes", DAMAGED)
        first = end
    return fp32_bits(raw, tensor)


def fp32_bits(raw, tensor):
    """Bytes of a tensor as fp32 bits: each F16 and BF16 is a number of fp32 too. All are finite."""
    if tensor.dtype == "F16":
        count = len(raw) // 2
        raw = struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", raw))
    elif tensor.dtype == "BF16":   # the upper half of an fp32
        halves = array("H", bytes(2 * len(raw)))
        halves[1::2] = array("H", raw)
        raw = halves.tobytes()
    top = raw[3::4]   # sign and seven bits of exponent; all seven set means 1.7e38 or more
    if b"\x7f" in top or b"\xff" in top:
        for value in struct.unpack(f"<{len(top)}f", raw):
            expect(math.isfinite(value), tensor.name, value, "finite numbers",
                   "the weights are damaged")
    return array("I", raw)


def pack_panels(bits, rows, cols):
    """[rows][cols], at most 32 rows, as two panels [2][cols][16]; missing rows are zeros."""
    panels = array("I", [0]) * (BLOCK * cols)
    for row in range(rows):
        start = row // LANES * LANES * cols
        panels[start + row % LANES:start + LANES * cols:LANES] = bits[row * cols:(row + 1) * cols]
    return panels


def weight_blocks(config, weight, tensor):
    """The weight as it lies in the file, a block of rows at a time."""
    # Not unbuffered: one read of a disk may bring less than it was asked for.
    with reading(tensor.path), open(tensor.path, "rb") as file:
        if weight.kind == VECTOR:
            bits = read_rows(file, tensor, source_rows(config, weight.name, weight.cols), 1)
            yield bits + array("I", [0]) * (padded(weight.cols) - weight.cols)
            return
        numbers = source_rows(config, weight.name, weight.rows)
        for first in range(0, weight.rows, BLOCK):
            part = numbers[first:first + BLOCK]
            bits = read_rows(file, tensor, part, weight.cols)
            yield pack_panels(bits, len(part), weight.cols) if weight.kind == PANELS else bits


# ---- Tokenizer ----

Added = namedtuple("Added", "id content normalized special")

EARLY, LATE = 0, 1     # roots of the tries: added tokens matched before the others, the others
BASE_MODEL = "use the tokenizer.json of the base model"   # a folder saved again often has another
LONGEST_TOKEN = 4096   # bytes; this and the next are tokenizer.c's: it opens no file with more
LONGEST_RUN = 256      # slots of a hash table that are taken in a row

# Part, field, what the library takes for a missing one, what kl3m computes.
STAGES = (("pre_tokenizer", "type", None, ["ByteLevel"]),
          ("pre_tokenizer", "add_prefix_space", None, [False]),
          ("pre_tokenizer", "use_regex", True, [True]),
          ("decoder", "type", None, ["ByteLevel"]),
          ("model", "type", None, ["BPE"]),
          ("model", "dropout", None, [None, 0]),
          ("model", "continuing_subword_prefix", None, [None, ""]),
          ("model", "end_of_word_suffix", None, [None, ""]),
          ("model", "byte_fallback", False, [False]),
          ("model", "ignore_merges", False, [True, False]))    # true: see check_whole_words


def expect_part(ok, name, found, expected):
    expect(ok, f"tokenizer.json: {name}", found, expected, BASE_MODEL)


def byte_alphabet():
    """GPT-2's alphabet, {character: byte} by byte: printable Latin-1 stands for itself, the other
    68 bytes for the characters from U+0100 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 324))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


BYTE_OF = byte_alphabet()
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}    # bytes that no UTF-8 has; NeoX has no tokens for them


def utf8(token):
    try:
        return token.encode()
    except UnicodeEncodeError:   # half a surrogate pair
        raise ExportError(f"tokenizer.json: token {show(token)} is not Unicode text; {DAMAGED}")


def decoded(token):
    """What a token decodes to: bytes by the alphabet, or its own UTF-8 if a character leaves it."""
    return bytes(map(BYTE_OF.get, token)) if BYTE_OF.keys() >= set(token) else utf8(token)


def adds_nothing(step):
    """Whether a step of the post_processor leaves the ids of a text as they are."""
    if step.get("type") == "ByteLevel":   # it moves offsets only
        return True
    pieces = step.get("single") if step.get("type") == "TemplateProcessing" else None
    if not (isinstance(pieces, list) and len(pieces) == 1 and isinstance(pieces[0], dict)):
        return False
    text = pieces[0].get("Sequence")
    return isinstance(text, dict) and text.get("id") == "A"


def normalizers(step):
    """The names of a normalizer's steps; None is no step."""
    if step is None:
        return []
    fields = step if isinstance(step, dict) else {}
    inner = fields.get("normalizers")
    if fields.get("type") == "Sequence" and isinstance(inner, list):
        return [name for one in inner for name in normalizers(one)]
    return [str(fields.get("type"))]


def check_stages(tokenizer):
    """Refuse what would give other ids; truncation and padding leave the ids of a text alone."""
    steps = normalizers(tokenizer.get("normalizer"))
    expect_part(set(steps) <= {"NFC"}, "normalizer", tokenizer.get("normalizer"),
                "nothing or NFC")
    for part, name, default, accepted in STAGES:
        fields = tokenizer.get(part)
        expect_part(isinstance(fields, dict), part, fields, "an object")
        value = fields.get(name, default)
        expect_part(value in accepted, f"{part}.{name}", value, show(accepted[-1]))
    post = tokenizer.get("post_processor")
    sequence = isinstance(post, dict) and post.get("type") == "Sequence"
    steps = post.get("processors") if sequence else [post] if post is not None else []
    ok = isinstance(steps, list) and all(
        isinstance(step, dict) and adds_nothing(step) for step in steps)
    expect_part(ok, "post_processor", post, "one that adds no tokens")


def check_length(token, text):
    expect_part(len(text) <= LONGEST_TOKEN, f"bytes of {show(token)}", len(text),
                f"at most {LONGEST_TOKEN}, the longest token that kl3m takes")


def check_token(token, number, rows):
    check_length(token, decoded(token))
    expect_part(is_count(number) and number < rows, f"id of {show(token)}", number,
                f"a whole number below the {rows} rows of gpt_neox.embed_in.weight")


def read_vocab(model, rows):
    """{token: id}: each id one token's, and a token for each byte that UTF-8 has."""
    vocab = model.get("vocab")
    expect_part(isinstance(vocab, dict), "model.vocab", vocab, "an object")
    owner = {}
    for token, number in vocab.items():
        check_token(token, number, rows)
        ok = owner.setdefault(number, token) == token
        expect_part(ok, f"id of {show(token)}", number,
                    f"another than that of {show(owner[number])}")
    for token, byte in BYTE_OF.items():
        expect_part(token in vocab or byte in NEVER, f"model.vocab: {show(token)}", None,
                    f"the token of byte {byte}")
    return vocab


def read_merges(model, vocab):
    """{(left id, right id): (rank, merged id)}; of two equal pairs the last counts, as there."""
    merges, table = model.get("merges"), {}
    expect_part(isinstance(merges, list), "model.merges", merges, "a list")
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ok = (isinstance(pair, list) and len(pair) == 2
              and all(isinstance(part, str) for part in pair))
        expect_part(ok, f"merge {rank}", merge, '"a b" or ["a", "b"]')
        left, right = pair
        for token in (left, right, left + right):
            expect_part(token in vocab, f"merge {rank}", merge, f"{show(token)} in the vocabulary")
        table[vocab[left], vocab[right]] = rank, vocab[left + right]
    return table


def merged(ids, merges):
    """What the merges make of these ids: the pair of the lowest rank first, the leftmost of
    equals. Pairs wait in a heap, so that a long token costs hardly more than as many short ones."""
    before = list(range(-1, len(ids)))   # the neighbours of each that is left
    after = list(range(1, len(ids) + 1))
    ids = [*ids, None]                   # behind the last, and in place of each that is gone
    waiting = []

    def enqueue(at):
        pair = ids[at], ids[after[at]]
        if pair in merges:
            heapq.heappush(waiting, (merges[pair][0], at, pair))
    for at in range(len(after)):
        enqueue(at)
    while waiting:
        _, at, pair = heapq.heappop(waiting)
        if (ids[at], ids[after[at]]) != pair:   # it became another meanwhile
            continue
        ids[at], ids[after[at]] = merges[pair][1], None
        after[at] = after[after[at]]
        before[after[at]] = at
        for changed in (before[at], at):
            if changed >= 0:
                enqueue(changed)
    return [number for number in ids if number is not None]


def check_whole_words(model, vocab, merges, added):
    """With ignore_merges the library takes a word that is a token as that token. kl3m always
    merges, which is the same if the merges make each token of its own characters (but for the
    added ones, which are found before)."""
    apart = {token.content for token in added}
    for token, number in vocab.items() if model.get("ignore_merges") else ():
        if token in apart:
            continue
        ids = merged([vocab.get(char, NOBODY) for char in token], merges)
        expect_part(ids == [number], "model.ignore_merges", True,
                    f"false, since the merges do not make {show(token)}")


def read_added(tokenizer, vocab, rows):
    """added_tokens as Added, held to the ids that the library gives them whatever the file says:
    the vocabulary's, or else the next free one."""
    entries = tokenizer.get("added_tokens")
    expect_part(isinstance(entries, list), "added_tokens", entries, "a list")
    owner, added = {number: token for token, number in vocab.items()}, {}
    next_id = len(vocab)
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        token = Added(*map(fields.get, Added._fields))
        where = f"added token {show(token.content)}"
        expect_part(isinstance(token.content, str) and token.content, where, entry, "content")
        for name in ("single_word", "lstrip", "rstrip"):
            expect_part(fields.get(name) is False, f"{where}: {name}", fields.get(name), "false")
        for name in ("normalized", "special"):
            value = fields.get(name)
            expect_part(type(value) is bool, f"{where}: {name}", value, "true or false")
        check_token(token.content, token.id, rows)
        expected = vocab.get(token.content, next_id)
        ok = token.id == expected and token.content not in added
        expect_part(ok, f"{where}: id", token.id,
                    f"{expected} as the tokenizers library numbers it, once")
        ok = owner.setdefault(token.id, token.content) == token.content
        expect_part(ok, f"{where}: id", token.id, f"another than that of {show(owner[token.id])}")
        next_id = max(next_id, token.id + 1)
        added[token.content] = token
    return list(added.values())


def u32s(numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def hash_table(what, entries):
    """{(a, b): (c, d)} as open-addressed slots of four u32, at most half full: (slots, bytes)."""
    slots = 1 << max(4, (2 * len(entries) - 1).bit_length())
    table = [NOBODY, 0, 0, 0] * slots
    taken = bytearray(2 * slots)   # a flag for each slot, twice: behind the last comes the first
    for (a, b), (c, d) in entries.items():
        first = ((a << 32 | b) * 0x9E3779B97F4A7C15 >> 32) & (slots - 1)
        slot = taken.find(0, first, first + LONGEST_RUN + 1)
        if slot < 0:   # the run is too long already
            break
        slot &= slots - 1
        taken[slot] = taken[slot + slots] = 1
        table[4 * slot:4 * slot + 4] = a, b, c, d
    expect_part(bytes([1]) * (LONGEST_RUN + 1) not in taken,
                f"the hash table of {what}: slots taken in a row", LONGEST_RUN + 1,
                f"at most {LONGEST_RUN}, which is so unless ids are chosen to collide")
    return slots, u32s(table)


def build_tries(added):
    """Tries over the UTF-8 of the added tokens: {(node, byte): (child, 0)}, [token of a node]."""
    edges, node_token = {}, [NOBODY, NOBODY]
    for token in added:
        node = LATE if token.normalized else EARLY
        text = utf8(token.content)
        check_length(token.content, text)
        for byte in text:
            child = edges.setdefault((node, byte), (len(node_token), 0))[0]
            if child == len(node_token):
                node_token.append(NOBODY)
            node = child
        expect_part(node_token[node] == NOBODY, f"added token {show(token.content)}",
                    [node_token[node], token.id], "one id, since NFC makes their texts the same")
        node_token[node] = token.id
    return edges, node_token


def tokenizer_section(tokenizer, rows):
    """The tables that tokenizer.c maps; every id has one of the embedding's rows."""
    check_stages(tokenizer)
    vocab = read_vocab(tokenizer["model"], rows)
    table = read_merges(tokenizer["model"], vocab)
    merge_slots, merges = hash_table("model.merges", table)
    added = read_added(tokenizer, vocab, rows)
    check_whole_words(tokenizer["model"], vocab, table, added)
    nfc = bool(normalizers(tokenizer.get("normalizer")))
    # The library looks for those that are not to be matched early in what has been normalized.
    edges, node_token = build_tries(
        [token._replace(content=unicodedata.normalize("NFC", token.content))
         if nfc and token.normalized else token for token in added])
    trie_slots, trie = hash_table("added_tokens", edges)
    names = {number: token for token, number in vocab.items()}
    names.update((token.id, token.content) for token in added)
    texts = [decoded(names.get(number, "")) for number in range(max(names) + 1)]
    flags = bytearray(len(texts))
    for token in added:
        flags[token.id] = token.special | 2
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    header = struct.pack("<8s7I28x", b"BPETOK2\n" if nfc else b"BPETOK1\n", len(texts),
                         merge_slots, trie_slots,
                         len(node_token), EARLY, LATE, offsets[-1])
    byte_tokens = [vocab.get(token, NOBODY) for token in BYTE_OF]
    numbers = map(u32s, (node_token, byte_tokens, offsets))
    return b"".join([header, merges, trie, *numbers, flags, *texts])


# ---- Hub ----
# The cache is huggingface_hub's own: each finds what the other downloaded. A model's folder there
# has blobs/ETAG, snapshots/COMMIT/FILE -> ../../blobs/ETAG, and refs/REVISION with the commit it
# stands for. blobs/ETAG.incomplete is what came so far; the next run goes on with it.

Source = namedtuple("Source", "directory name revision")   # real path; the hub's name if known
Remote = namedtuple("Remote", "name commit etag size")     # a file as the hub describes it

TRIES = 6            # in a row without a new byte before we give up
BACK_OFF = 1.0       # seconds before the second try, twice as many before each further one
LONGEST_WAIT = 300   # seconds, even if a server asks for more; the hub counts in windows of 300
TIMEOUT = 30         # seconds without a sign of life
REDIRECTS = 10

COMMIT = "[0-9a-f]{40}"
NO_HUB = "this is not how a hub answers: check HF_ENDPOINT and the network"
NO_ADDRESS = ("HF_ENDPOINT, a proxy or a redirect is not an address like https://HOST/...; "
              "correct it")


class Broken(Exception):
    """A fault that may pass: what, and the seconds that the server asks us to wait, or None."""


class Missing(ExportError):
    """The hub has no such file."""


def switched_on(*names):
    """Whether the first of these that is not empty says yes, in huggingface_hub's words."""
    values = [os.environ[name] for name in names if os.environ.get(name)]
    return bool(values) and values[0].upper() in ("1", "ON", "YES", "TRUE")


def path_setting(name, default):
    return os.path.expandvars(os.path.expanduser(os.environ.get(name, default)))


def another_cache():
    """What to do if the cache cannot lie where it does: the variable that counts here."""
    names = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in os.environ]
    return f"set {[*names, 'HF_HOME'][0]} to another place"


def hub_token(home):
    """The user's token, or "". No message may show it."""
    if switched_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return ""
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN", "")
    path = path_setting("HF_TOKEN_PATH", os.path.join(home, "token"))
    if not token.strip():
        with reading(f"the token in {path}", "set HF_TOKEN"):
            if is_plain(look(path)):
                with open(path, encoding="utf-8", errors="replace") as file:
                    token = file.read()
    token = token.replace("\r", "").replace("\n", "").strip()
    if not (token.isascii() and token.isprintable()):   # http.client would show it in its complaint
        raise ExportError("HF_TOKEN or the token's file has characters that no token has; "
                          "correct it")
    return token


def address(text, base=""):
    """A full address and its (scheme, host, port). A bad one is not shown: it may be signed."""
    try:
        url = urllib.parse.urljoin(base, text)
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        ok = parts.hostname and parts.username is None and re.fullmatch("[!-~]+", url)
    except (ValueError, KeyError):
        ok = False
    if not ok:
        raise ExportError(NO_ADDRESS)
    return url, (parts.scheme, parts.hostname, port)


def retry_after(answer):
    """Seconds from Retry-After, a number or a date, or None."""
    text = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return min(int(text), LONGEST_WAIT)
    try:
        date = email.utils.mktime_tz(email.utils.parsedate_tz(text))
    except (TypeError, ValueError, OverflowError, IndexError):
        return None
    return min(max(0, date - time.time()), LONGEST_WAIT)


def window_end(answer):
    """Seconds to the end of the windows whose requests we have used up, or None. The hub tells it
    as `RateLimit: "api";r=0;t=45` (draft-ietf-httpapi-ratelimit-headers), in whole seconds."""
    ends = []
    for window in ",".join(answer.headers.get_all("RateLimit", [])).split(","):
        rest = dict(re.findall(r";\s*([rt])\s*=\s*([0-9]{1,9})\s*(?=;|$)", window.strip()))
        if int(rest.get("r", 1)) == 0 and "t" in rest:
            ends.append(min(int(rest["t"]), LONGEST_WAIT) + 1)
    return max(ends, default=None)


def asked_wait(answer):
    """Seconds that a busy server asks us to wait, the longer if it does so twice, or None."""
    waits = [retry_after(answer), window_end(answer) if answer.status == 429 else None]
    return max((wait for wait in waits if wait is not None), default=None)


def persist(what, action, reached=lambda: 0):
    """action(), tried again after faults that may pass; a try after which reached() is more was
    not in vain."""
    tries, best = 0, reached()
    while True:
        try:
            return action()
        except Broken as broken:
            what_broke, wait = broken.args
        now = reached()
        tries, best = 1 if now > best else tries + 1, max(now, best)
        if tries == TRIES:
            raise ExportError(f"{what}: {what_broke}; given up after {tries} tries; run it again "
                              "later, the download goes on where it stopped")
        if wait is None:
            wait = BACK_OFF * 2 ** (tries - 1) * random.uniform(0.5, 1)
        note(f"{what}: {what_broke}; next try in {wait:.0f} s")
        time.sleep(wait)


def open_or_create(path, flags):
    return os.open(path, flags | os.O_CREAT, 0o666)


def is_whole(path, size):
    status = look(path)
    return is_plain(status) and status.st_size == size


def has_hash(path, etag):
    """Whether this is the file that the hub means: by its sha256, or by git's hash of it."""
    digest = hashlib.sha256()
    if len(etag) == 40:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path), usedforsecurity=False)
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            digest.update(block)
    return digest.hexdigest() == etag


def lock_now(file):
    """Whether nobody holds this file's lock, which then is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path, what):
    """Holds the lock that huggingface_hub takes for the same blob, and says whether that keeps
    others out: some disks have no locks, and some give one to everybody who asks."""
    with contextlib.ExitStack() as files:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            ours, another = (files.enter_context(open(path, "ab")) for _ in range(2))
            if not lock_now(ours):
                note(f"{what}: waiting for another download of it")
                fcntl.flock(ours, fcntl.LOCK_EX)
            alone = not lock_now(another)
        except OSError:
            alone = False
        yield alone


@contextlib.contextmanager
def partial_file(blob, alone):
    """The name of what came so far of a blob. Where no lock keeps others out it is ours alone as
    long as we write to it, and at the end what is left of it is for the next run."""
    partial = blob + ".incomplete"
    if alone:
        yield partial
        return
    ours = f"{blob}.{secrets.token_hex(4)}.incomplete"
    with at_the_end(lambda: rename(ours, partial)):
        rename(partial, ours)
        yield ours


def link_blob(blob, name):
    """The file of the snapshot as a link to its blob, at once and whoever else makes it too."""
    link = f"{name}.{secrets.token_hex(4)}.part"
    with at_the_end(lambda: remove(link)):
        try:
            os.symlink(os.path.join("..", "..", "blobs", os.path.basename(blob)), link)
            os.replace(link, name)
        except OSError:   # a disk without links
            os.replace(blob, name)


class Hub:
    """A model on the hub, to be downloaded to its folder in the cache."""

    def __init__(self, model, folder, token):
        self.model, self.folder, self.token = model, folder, token
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.home = address(self.endpoint)[1]
        # With these handlers alone there is no file: or ftp:, and no redirect that we have not
        # looked at.
        self.opener = urllib.request.OpenerDirector()
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler,
                        urllib.request.HTTPSHandler):
            self.opener.add_handler(handler())

    def request(self, method, url, where, headers):
        """One answer, whatever its status. The token goes to the hub alone."""
        headers = {"User-Agent": PROGRAM, **headers}
        request = urllib.request.Request(url, None, headers, method=method)
        direct = request.host   # in whose place urllib puts a proxy
        if self.token and where == self.home:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            return self.opener.open(request, timeout=TIMEOUT)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)   # inside what urllib makes of it
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ExportError(f"{where[1]}: {reason}; if your network has a certificate of its "
                                  "own, SSL_CERT_FILE is for it")
            proxy = where[0] + "_proxy"   # its address may have a password
            if isinstance(reason, http.client.InvalidURL):   # the hub's own has been looked at
                raise ExportError(f"{proxy} is not an address like http://HOST:PORT; correct it")
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            through = "" if request.host == direct else f" through the proxy of {proxy}"
            # Short, since it may be what the server sent.
            raise Broken(f"{where[1]}{through}: {short(said)}", None)
        except ValueError:
            raise ExportError(NO_ADDRESS)

    def ask(self, method, name, revision, headers):
        """The answer after all redirects. That to HEAD is the hub's own, which describes the file,
        and not the one of another host where the file itself is."""
        revision_part = urllib.parse.quote(revision, safe="")
        url, here = address("/".join((self.endpoint, self.model, "resolve", revision_part,
                                      urllib.parse.quote(name))))
        for _ in range(REDIRECTS):
            answer = self.request(method, url, here, headers)
            target = answer.headers.get("Location") if answer.status // 100 == 3 else None
            if target is None:
                return self.checked(answer, f"{name} of {self.model} at revision {revision}")
            before, (url, here) = here, address(target, url)
            if before[0] == "https" != here[0]:
                raise ExportError(f"{name}: {before[1]} sends us on without encryption; {NO_HUB}")
            if method == "HEAD" and here != before and "X-Repo-Commit" in answer.headers:
                return answer
            answer.close()
        raise ExportError(f"{name}: more than {REDIRECTS} redirects; {NO_HUB}")

    def checked(self, answer, what):
        """The answer, if its status is not that of a failure."""
        status = answer.status
        if status < 400 or status == 416:   # 416: the partial file is no beginning of the server's
            return answer
        answer.close()
        if status == 404:
            raise Missing(f"{self.endpoint} has no {what}; check the name and --revision")
        if status in (401, 403):
            raise ExportError(f"{self.endpoint} does not give us {what} ({status}); check the "
                              "name; if the model is private or gated, accept the conditions on "
                              f"{self.endpoint}/{self.model} and set HF_TOKEN to "
                              f"{'another' if self.token else 'a'} token that may read it")
        if status in (408, 429) or status >= 500:
            raise Broken(f"the server answers {status}", asked_wait(answer))
        raise ExportError(f"{self.endpoint} answers {status} for {what}; {NO_HUB}")

    def describe(self, name, revision):
        """The file as a Remote."""
        answer = persist(name, lambda: self.ask("HEAD", name, revision, {}))
        answer.close()
        headers = answer.headers
        commit = headers.get("X-Repo-Commit", "")
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag", "")).lstrip("W/").strip('"')
        size = headers.get("X-Linked-Size", "")
        if not size and answer.status == 200:   # else it is the length of a redirect
            size = headers.get("Content-Length", "")
        for what, found, expected in (
                ("X-Repo-Commit", commit, revision if re.fullmatch(COMMIT, revision) else COMMIT),
                ("ETag", etag, COMMIT + "|[0-9a-f]{64}"), ("size", size, "[0-9]{1,15}")):
            expect(re.fullmatch(expected, found), f"{self.endpoint}: {name}: {what}", found,
                   expected, NO_HUB)
        return Remote(name, commit, etag, int(size))

    def receive(self, remote, file, progress):
        """One request for what the partial file lacks."""
        done = file.seek(0, os.SEEK_END)
        if done >= remote.size:
            file.truncate(remote.size)
            return
        rest = {"Range": f"bytes={done}-"} if done else {}
        with self.ask("GET", remote.name, remote.commit, rest) as answer:
            content_range = answer.headers.get("Content-Range", "")
            part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
            if answer.status == 200:   # the whole file, whatever we asked for: over what we have
                done = file.seek(0)
                total = answer.headers.get("Content-Length", "*")
            elif answer.status == 206 and part and part[1] == str(done):
                total = part[2]
            else:
                file.truncate(0)   # the next request is for the whole
                raise Broken(f"the server does not send the bytes from {done} on "
                             f"({answer.status})", None)
            if total not in ("*", str(remote.size)):
                raise Broken(f"the server announces {show(total)} bytes, not {remote.size}", None)
            while done < remote.size:
                try:
                    data = answer.read1(min(CHUNK, remote.size - done))
                except (OSError, http.client.HTTPException):
                    data = b""
                if not data:
                    raise Broken(f"the connection broke after {done} of {remote.size} bytes", None)
                file.write(data)
                done += len(data)
                progress.show(remote.name, done)

    def fetch(self, remote, blob, partial):
        """The file as a blob, by way of the partial file."""
        if is_whole(blob, remote.size) and has_hash(blob, remote.etag):
            return
        for last in (False, True):
            with open(partial, "r+b", opener=open_or_create) as file:
                progress = Progress(remote.size, file.seek(0, os.SEEK_END))
                persist(remote.name, lambda: self.receive(remote, file, progress),
                        lambda: file.seek(0, os.SEEK_END))
                file.flush()
                os.fsync(file.fileno())
            if has_hash(partial, remote.etag):
                os.replace(partial, blob)
                return
            os.unlink(partial)
            if not last:
                note(f"{remote.name}: what came is damaged; once more from the start")
        raise ExportError(f"{remote.name}: twice what came has not the hash {remote.etag}; "
                          "try again later")

    def fetch_all(self, remotes, snapshot):
        """Those of the files that the snapshot lacks, as names of blobs."""
        blobs = os.path.join(self.folder, "blobs")
        os.makedirs(blobs, exist_ok=True)
        os.makedirs(snapshot, exist_ok=True)
        files = [(remote, os.path.join(blobs, remote.etag), os.path.join(snapshot, remote.name))
                 for remote in remotes]
        needed = 0
        for remote, blob, name in files:
            if not is_whole(blob, remote.size) and not is_whole(name, remote.size):
                part = blob + ".incomplete"
                needed += remote.size - (os.path.getsize(part) if os.path.exists(part) else 0)
        free = shutil.disk_usage(blobs).free
        expect(free >= needed, blobs, free, f"{needed} bytes of room",
               "make room, or " + another_cache())
        cache, folder = os.path.split(self.folder)
        for remote, blob, name in files:
            lock = os.path.join(cache, ".locks", folder, remote.etag + ".lock")
            with locked(lock, remote.name) as alone:
                if is_whole(name, remote.size):
                    continue
                with partial_file(blob, alone) as partial:
                    self.fetch(remote, blob, partial)
                link_blob(blob, name)

    def explain(self, revision):
        """Refuses a model that has weights of another kind on the hub."""
        for name in "adapter_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json":
            with contextlib.suppress(Missing):
                explain_weights(f"{self.model} on the hub", [self.describe(name, revision).name])

    def describe_weights(self, commit):
        """The one file of weights, or else their index."""
        with contextlib.suppress(Missing):
            return self.describe(SINGLE, commit)
        try:
            return self.describe(INDEX, commit)
        except Missing:
            self.explain(commit)
            raise

    def download(self, revision):
        """The directory of the snapshot, with all that an export needs."""
        try:
            config = self.describe("config.json", revision)
        except ExportError as error:
            if isinstance(error, Missing):
                self.explain(revision)
            raise ExportError(f"{error} (and there is no directory {self.model} here)")
        note(f"downloading {self.model}, commit {config.commit}, to {self.folder}")
        snapshot = os.path.join(self.folder, "snapshots", config.commit)
        tokenizer = self.describe("tokenizer.json", config.commit)
        weights = self.describe_weights(config.commit)
        files = [config, tokenizer, weights]
        try:
            files.insert(2, self.describe(GENERATION, config.commit))
        except Missing:
            mark = no_file(self.folder, config.commit, GENERATION)
            os.makedirs(os.path.dirname(mark), exist_ok=True)
            open(mark, "ab").close()
        self.fetch_all(files, snapshot)
        if weights.name == INDEX:
            shards = sorted(set(read_index(snapshot).values()))
            self.fetch_all([self.describe(shard, config.commit) for shard in shards], snapshot)
        if revision != config.commit:   # at last: it may have stood for another whole snapshot
            ref = os.path.join(self.folder, "refs", revision)
            os.makedirs(os.path.dirname(ref), exist_ok=True)
            with part_beside(ref) as file:
                file.write(config.commit.encode())
                file.flush()
                os.replace(file.name, ref)
        return snapshot


def no_file(folder, commit, name):
    """The name by which huggingface_hub's cache says that a commit has no such file."""
    return os.path.join(folder, ".no_exist", commit, name)


def cached_snapshot(folder, revision, offline):
    """The directory of a snapshot that is whole in the cache, or None. Another program may have had
    no use for the end tokens: unless there is no network, they must be there, or known not to."""
    ref = os.path.join(folder, "refs", revision)
    expect(not is_folder(ref), ref, "a folder", "a file that names a commit",
           "move it out of the way")
    if is_plain(status_of(ref)):
        with reading(ref), open(ref, encoding="utf-8", errors="replace") as file:
            revision = file.read(100).strip()
    if not re.fullmatch(COMMIT, revision):
        return None
    snapshot = os.path.join(folder, "snapshots", revision)

    def has(name):
        return is_plain(status_of(os.path.join(snapshot, name)))
    weights = read_index(snapshot).values() if has(INDEX) and not has(SINGLE) else [SINGLE]
    if not all(map(has, ["config.json", "tokenizer.json", *weights])):
        return None
    unknown = not has(GENERATION) and not status_of(no_file(folder, revision, GENERATION))
    if unknown and offline:
        note(f"{snapshot} has no {GENERATION}, and without a network nobody knows whether the "
             "model has one: the end tokens are those of config.json")
    return snapshot if offline or not unknown else None


def check_model(source):
    """Whether SOURCE, which is no directory, is what a name on the hub looks like."""
    remedy = "pass a directory that has a model, or a name on the hub like org/model"
    if status_of(source):
        raise ExportError(f"{show(source)} is a file; {remedy}")
    ok = re.fullmatch(r"\b[\w.-]+\b/\b[\w.-]+\b", source, re.ASCII)
    if not ok or "--" in source or ".." in source:
        page = re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)", source, re.ASCII)
        named = f" ({page[1]}, if that is its page)" if page else ""
        raise ExportError(f"there is no directory {show(source)}; {remedy}{named}")


def hub_snapshot(model, revision):
    """The directory of a model's snapshot in the cache, downloaded if it is not there."""
    check_model(model)
    named = revision is not None
    revision = revision if named else "main"
    ok = not {"", ".", ".."} & set(revision.split("/")) and revision.isprintable()
    expect(ok and "\\" not in revision, "--revision", revision, "a branch, a tag or a commit",
           "correct it")
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = path_setting("HF_HOME", os.path.join(caches, "huggingface"))
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))   # its older name
    cache = path_setting("HF_HUB_CACHE", cache)
    folder = os.path.join(cache, "models--" + model.replace("/", "--"))
    offline = switched_on("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    snapshot = cached_snapshot(folder, revision, offline)
    owner = model.split("/")[0]
    if snapshot is None and not named and os.path.isdir(owner):   # a slip, most likely
        raise ExportError(f"there is no directory {model}, though there is {owner}; correct it, or "
                          "add --revision main if you mean the model on the hub")
    if snapshot is None and offline:
        raise ExportError(f"{model} at revision {revision} is not whole in {folder}, and no "
                          "directory here; unset HF_HUB_OFFLINE")
    try:
        return snapshot or Hub(model, folder, hub_token(home)).download(revision)
    except OSError as error:   # the disk's: those of the network are dealt with above
        where = error.filename2 or error.filename or folder   # of two names the new one
        raise ExportError(f"cannot download to {where}: "
                          f"{fault(error, another_cache())}; run it again then, the download goes "
                          "on where it stopped")


def resolve(source, revision):
    """The directory that SOURCE means, as a Source."""
    path = os.path.realpath(source if is_folder(source) else hub_snapshot(source, revision))
    snapshot = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$", path)
    if snapshot:
        return Source(path, snapshot[1].replace("--", "/"), snapshot[2])
    return Source(path, os.path.basename(path), "unknown")


# ---- About ----

KL3M = {"license": "CC-BY 4.0",
        "attribution": "KL3M model by the ALEA Institute (https://aleainstitute.ai), licensed "
                       "under CC-BY 4.0; this file holds its values in another layout",
        "citation": "Bommarito, Katz, Bommarito: KL3M Tokenizers: A Family of Domain-Specific and "
                    "Character-Level Tokenizers for Legal, Financial, and Preprocessing "
                    "Applications, 2025, arXiv:2503.17247"}


def card_license(directory):
    """What README.md's front matter has as `license:`, or None."""
    path = os.path.join(directory, "README.md")
    if not is_plain(status_of(path)):
        return None
    with reading(path), open(path, "rb") as file:
        text = file.read(1 << 16).decode("utf-8", "replace")
    front = re.match(r"---\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    line = front and re.search(r"^license:[ \t]*['\"]?([\w.-]+)", front[1], re.MULTILINE)
    return line and line[1]


def about_section(source, config):
    """Lines of key TAB value."""
    called = config.get("_name_or_path")
    called = called.rstrip("/") if isinstance(called, str) else ""
    name = os.path.basename(called or source.name)
    about = {"name": name,
             "source": source.name if called in source.name else f"{source.name} ({called})",
             "revision": source.revision, "license": "unknown", "attribution": "unknown",
             "citation": "unknown", "exporter": f"{PROGRAM}, format {FORMAT_VERSION}"}
    if name.lower().startswith("kl3m"):
        about.update(KL3M)
    about["license"] = card_license(source.directory) or about["license"]
    lines = (f"{key}\t" + re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", value)
             for key, value in about.items())
    return "".join(line + "\n" for line in lines).encode("utf-8", "replace")


# ---- The file ----

# blocks: an iterable of bytes.
Section = namedtuple("Section", "name type rows cols layout size blocks")

BYTES, F32 = 0, 1   # section types


def read_sections(source):
    """All sections in order, all checked; weights are read when their blocks are asked for."""
    check_folder(source.directory)
    config_json = read_object(source.directory, "config.json", CONFIG_LIMIT)
    config = read_config(config_json)
    tensors = with_one_projection(read_tensors(source.directory))
    check_names(tensors)
    config = config._replace(kv_heads=count_kv_heads(config, tensors))
    check_tensors(config, tensors)
    tokenizer = read_object(source.directory, "tokenizer.json", TOKENIZER_LIMIT)
    tables = tokenizer_section(tokenizer, config.vocab)    # checks added_tokens
    sources = [("config.json", config_json)]
    if status_of(os.path.join(source.directory, GENERATION)):
        sources.insert(0, (GENERATION, read_object(source.directory, GENERATION, CONFIG_LIMIT)))
    texts = {"config": config_section(config, sources, tokenizer),
             "about": about_section(source, config_json), "tokenizer": tables}
    return [Section(name, BYTES, 0, 0, 0, len(data), [data]) for name, data in texts.items()] + [
        Section(weight.name, F32, weight.rows, weight.cols, int(weight.kind == PANELS),
                weight_size(weight), weight_blocks(config, weight, tensors[weight.source]))
        for weight in tensor_table(config)]


def place(sections):
    """Each section's offset, a multiple of 64, and the file's size."""
    offsets, end = [], 64 + 96 * len(sections)
    for section in sections:
        offsets.append((end + 63) // 64 * 64)
        end = offsets[-1] + section.size
    return offsets, end


MAGIC = b"KL3M\r\n\x1a\n"
HUGE_PAGE = 2 << 20   # bytes


def write_sections(file, sections, progress):
    """The sections, then, with their checksums known, header and table in front of them.

    Writes begin and end at multiples of 2 MB: Linux (from 6.16 on, on ext4) then keeps the file in
    huge pages, and kl3m maps it with a tenth of the page faults."""
    offsets, file_size = place(sections)
    table, written, waiting = b"", 0, bytearray()
    for section, offset in zip(sections, offsets):
        waiting += bytes(offset - written - len(waiting))
        checksum = 0
        for block in section.blocks:
            waiting += block
            checksum = zlib.crc32(block, checksum)
            progress.show(section.name, written + len(waiting))
            whole = len(waiting) // HUGE_PAGE * HUGE_PAGE
            with memoryview(waiting) as view:
                written += file.write(view[:whole])
            del waiting[:whole]
        table += struct.pack("<56sIIQQIIII", section.name.encode(), section.type, checksum, offset,
                             section.size, section.rows, section.cols, section.layout, 0)
    file.write(waiting)
    head = struct.pack("<8sIIQ", MAGIC, FORMAT_VERSION, len(sections), file_size)
    file.seek(0)
    file.write(head + struct.pack("<I36x", zlib.crc32(head + table)) + table)


ANOTHER_OUT = "pass another -o"


@contextlib.contextmanager
def writing(out, left=""):
    """Says of a fault within that OUT cannot be written."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {out}: {fault(error, ANOTHER_OUT)}{left}")


def check_target(out):
    """OUT's real path, if a file can be put there: seen before a long download, not after it."""
    path = os.path.realpath(out)   # a link is followed, not replaced
    folder = os.path.dirname(path)
    what = f"cannot write {out}"
    expect(os.path.basename(out) not in ("", "."), what, out, "the name of a plain file",
           "add a file's name")
    with writing(out):
        older, above = look(path), look(folder)
    expect(above and stat.S_ISDIR(above.st_mode), what, folder, "a directory", "create it")
    expect(older is None or is_plain(older), what, path, "a plain file or a new one", ANOTHER_OUT)
    for name in (out, path):
        expect(not name.lower().endswith((".json", ".safetensors")), what, name,
               "no name of a source's file", ANOTHER_OUT)
    expect(not re.search("/(models|datasets|spaces)--[^/]+/(blobs|refs|snapshots)/", path), what,
           path, "no file of the hub's cache", ANOTHER_OUT)
    with writing(out):
        if older and above.st_mode & stat.S_ISVTX:   # as /tmp: files are their owners' there
            owners = {0, above.st_uid, older.st_uid}
            expect(os.geteuid() in owners, what, path, "a file of yours", ANOTHER_OUT)
        with part_beside(path):
            pass
    return path


def check_not_source(out, directory):
    """OUT is no file of the source by another name or link. An older export there is none of it."""
    with reading(directory):
        entries = [entry.path for entry in os.scandir(directory) if entry.is_file()]
    with reading(out):
        for path in entries if os.path.exists(out) else ():
            if os.path.samefile(path, out):
                with open(out, "rb") as file:
                    expect(file.read(len(MAGIC)) == MAGIC, f"cannot write {out}", path,
                           "no file of the source", ANOTHER_OUT)


def write_model(out, path, sections, progress):
    """Write OUT, whose real path this is, whole or not at all."""
    with writing(out, "; nothing has changed there"):
        free = shutil.disk_usage(os.path.dirname(path)).free
        expect(free >= progress.total, f"cannot write {out}", free,
               f"{progress.total} bytes of room", "make room or " + ANOTHER_OUT)
        with part_beside(path) as file:
            keep_rights(file, path)
            write_sections(file, sections, progress)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)


# ---- Command line ----

# All that ask a program to end, Ctrl-\ and what batch systems and limits send among them.
STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
            signal.SIGUSR2, signal.SIGXCPU, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)


class Stopped(BaseException):
    """A signal to end, as an exception, so that the temporary file is removed on the way out."""


def stop(number, _frame):
    for other in STOPPERS:   # a second one must not disturb that
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def export(source, out, revision):
    start = time.monotonic()
    if out is None:   # realpath: SOURCE may be ".", or a link
        out = os.path.basename(os.path.realpath(source)) + ".bin"
    path = check_target(out)
    found = resolve(source, revision)
    check_not_source(out, found.directory)
    sections = read_sections(found)
    progress = Progress(place(sections)[1])
    write_model(out, path, sections, progress)
    note(f"wrote {out}: {progress.total / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")


def main():
    if sys.stderr is None:   # it was closed
        sys.stderr = open(os.devnull, "w")
    elif sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(Patient(sys.stderr.fileno()), sys.stderr.encoding,
                                      sys.stderr.errors, line_buffering=True)
    parser = argparse.ArgumentParser(
        prog=PROGRAM, allow_abbrev=False,
        description="Turn a GPT-NeoX model in Hugging Face layout into the one file that kl3m "
                    "reads.")
    parser.add_argument("source", metavar="SOURCE", help="directory with config.json, "
                        "tokenizer.json and model.safetensors (or its index and shards), or a "
                        "model on the hub such as alea-institute/kl3m-002-170m")
    parser.add_argument("-o", "--output", metavar="OUT", help="the file to write (default: the hub "
                        "name's last part, or the base name of the directory's real path, + .bin, "
                        "in the current directory)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub "
                        "(default: main)")
    arguments = parser.parse_args()
    if arguments.revision is not None and os.path.isdir(arguments.source):
        parser.error("--revision is for models on the hub, and SOURCE is a directory here")
    for number in STOPPERS:
        if signal.getsignal(number) != signal.SIG_IGN:   # as nohup leaves SIGHUP
            signal.signal(number, stop)
    try:   # the outer one, since a signal may come while the error is written
        try:
            export(arguments.source, arguments.output, arguments.revision)
        except (ExportError, OSError, RecursionError, MemoryError) as error:
            note(f"error: {str(error) or type(error).__name__}")
            return 1
    except Stopped as stopped:
        note("stopped")
        return 128 + stopped.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
