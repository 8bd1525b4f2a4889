"""export_weights.py: the file read back by another reader, what is refused, what is left behind.

The reader follows the README's description of the format and shares nothing with the exporter.
Most cases call the exporter's main() in this process, which is quicker than a process for each.
"""
import ast
import contextlib
import copy
import errno
import fcntl
import functools
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
import zlib
from array import array
from pathlib import Path
from unittest import mock

import models
from harness import PATIENCE, ROOT, SHARED, Skip, expect, run_export, test, tmpdir

sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True   # no __pycache__ beside the program
import export_weights  # noqa: E402

NONE = 0xFFFFFFFF
TOKENS, ROWS = 300, 304   # of the tiny model: some rows of its embedding have no token
QKV = "gpt_neox.layers.0.attention.query_key_value."


# ---- Reader -----------------------------------------------------------------------------------

class ModelFile:
    """A model file as the format describes it, every claim checked."""

    def __init__(self, path):
        data = Path(path).read_bytes()
        magic, version, count, size, checksum = struct.unpack_from("<8sIIQI", data)
        expect((magic, version, size), (b"KL3M\r\n\x1a\n", 2, len(data)), "header")
        expect(checksum, zlib.crc32(data[:24] + data[64:64 + 96 * count]), "checksum of the table")
        expect(data[28:64], bytes(36), "the header's last bytes")
        self.sections, end = {}, 64 + 96 * count
        for n in range(count):
            name, kind, checksum, offset, size, rows, cols, layout, zero = struct.unpack_from(
                "<56sIIQQIIII", data, 64 + 96 * n)
            name = name.rstrip(b"\0").decode()
            expect(offset, -(-end // 64) * 64, name + ": the next multiple of 64")
            expect(data[end:offset], bytes(offset - end), name + ": the gap before it")
            end = offset + size
            assert end <= len(data) and zero == 0 and name not in self.sections, name
            expect(zlib.crc32(data[offset:end]), checksum, name + ": checksum")
            self.sections[name] = kind, rows, cols, layout, data[offset:end]
        expect(end, len(data), "the file's end")
        self.config = dict(zip(
            "hidden layers heads kv_heads head_size rotary_dims intermediate vocab context "
            "parallel_residual zero1 zero2 rotary_base eps".split(),
            struct.unpack_from("<12I2d", self.text("config"))))
        self.start, count, *ends = struct.unpack_from("<10I", self.text("config"), 64)
        self.ends = ends[:count]
        expect((len(self.text("config")), ends[count:], self.text("config")[104:]),
               (128, [0] * (8 - count), bytes(24)), "the config's end")
        self.about = dict(line.split("\t") for line in self.text("about").decode().splitlines())

    def text(self, name):
        kind, rows, cols, layout, data = self.sections[name]
        expect((kind, rows, cols, layout), (0, 0, 0, 0), name)
        return data

    def numbers(self, name):
        """A tensor's fp32 bits, row by row, without padding, and its shape."""
        kind, rows, cols, layout, data = self.sections[name]
        expect(kind, 1, name + ": type")
        bits = memoryview(data).cast("I")
        padded = -(-rows // 32) * 32
        if name == "embed_in.weight":
            expect((layout, len(bits)), (0, rows * cols), name)
            return [rows, cols], list(bits)
        if rows == 1:
            expect((layout, len(bits)), (0, -(-cols // 32) * 32), name)
            expect(list(bits[cols:]), [0] * (len(bits) - cols), name + ": padding")
            return [cols], list(bits[:cols])
        expect((layout, len(bits)), (1, padded * cols), name)
        every = [bits[(r // 16 * cols + c) * 16 + r % 16] for r in range(padded)
                 for c in range(cols)]
        expect(every[rows * cols:], [0] * ((padded - rows) * cols), name + ": padding")
        return [rows, cols], every[:rows * cols]


class Tables:
    """The tokenizer section."""

    def __init__(self, data):
        magic, self.tokens, *slots, nodes, early, late, size = struct.unpack_from("<8s7I", data)
        expect((magic, data[36:64]), (b"BPETOK1\n", bytes(28)), "the tokenizer's header")
        self.at, self.data = 64, data
        self.merges, self.edges = (self.hash_table(n) for n in slots)
        self.node_token = self.u32s(nodes)
        self.byte_token = self.u32s(256)
        offsets = self.u32s(self.tokens + 1)
        self.flags = data[self.at:self.at + self.tokens]
        text = data[self.at + self.tokens:]
        expect((len(text), offsets[0], offsets[-1]), (size, 0, size), "the tokenizer's text")
        self.texts = [text[a:b] for a, b in zip(offsets, offsets[1:])]
        self.early, self.late = self.trie(early), self.trie(late)

    def u32s(self, count):
        self.at += 4 * count
        return struct.unpack_from("<%dI" % count, self.data, self.at - 4 * count)

    def hash_table(self, slots):
        """{(a, b): (c, d)}, each found again by walking from the slot where its key starts."""
        numbers = self.u32s(4 * slots)
        rows = [numbers[i:i + 4] for i in range(0, len(numbers), 4)]
        used = {row[:2]: row[2:] for row in rows if row[0] != NONE}
        assert slots >= 16 and slots & (slots - 1) == 0 and slots >= 2 * len(used), slots
        expect({row for row in rows if row[0] == NONE}, {(NONE, 0, 0, 0)}, "empty slots")
        for a, b in used:
            slot = (((a << 32 | b) * 0x9E3779B97F4A7C15) % 2**64 >> 32) % slots
            while rows[slot][:2] != (a, b):
                assert rows[slot][0] != NONE, "a key that a search does not find"
                slot = (slot + 1) % slots
        return used

    def trie(self, root):
        """{text: token} of everything below this node."""
        children, found, ahead = {}, {}, [(root, b"")]
        for (node, byte), (child, zero) in self.edges.items():
            children.setdefault(node, []).append((child, bytes([byte])))
            expect(zero, 0, "the last number of an edge")
        for node, text in ahead:
            if self.node_token[node] != NONE:
                found[text] = self.node_token[node]
            ahead.extend((child, text + byte) for child, byte in children.get(node, ()))
        return found


# ---- Models to spoil --------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def base():
    config = models.make_config(vocab_size=ROWS, num_hidden_layers=1)
    tensors = {name: ("F32", shape, values.tobytes())
               for name, (shape, values) in models.make_weights(config).items()}
    return config, models.small_tokenizer(TOKENS), tensors


class Source:
    """The files of a tiny model as objects, for a case to change before they are written."""

    def __init__(self):
        self.config, self.tokenizer, self.tensors = copy.deepcopy(base())
        self.change_header = lambda header: None   # of the safetensors file
        self.change_bytes = {}                     # file name: what to do to its bytes at last

    def write(self, directory):
        header, data = {}, b""
        for name, (dtype, shape, raw) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape,
                            "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        self.change_header(header)
        text = json.dumps(header).encode()
        files = {"config.json": json.dumps(self.config).encode(),
                 "tokenizer.json": json.dumps(self.tokenizer).encode(),
                 "model.safetensors": struct.pack("<Q", len(text)) + text + data}
        for name, content in files.items():
            content = self.change_bytes.get(name, lambda data: data)(content)
            if content is not None:
                (directory / name).write_bytes(content)


def run_inside(*args):
    """main() with these arguments: (exit status, standard error)."""
    err, argv = io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in export_weights.STOPPERS}
    sys.argv = ["export_weights.py", *map(str, args)]
    try:
        with contextlib.redirect_stderr(err):
            code = export_weights.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, err.getvalue()


def exported(change=lambda source: None, name="model"):
    """The bytes of the file made of the tiny model after this change."""
    top = tmpdir()
    (top / name).mkdir()
    source = Source()
    change(source)
    source.write(top / name)
    code, err = run_inside(top / name, "-o", top / "out.bin")
    assert code == 0, err
    return (top / "out.bin").read_bytes()


def check_refused(change, words):
    top = tmpdir()
    (top / "model").mkdir()
    (top / "out").mkdir()
    source = Source()
    written = change(source, top / "model") if change.__code__.co_argcount == 2 else change(source)
    if written != "written":
        source.write(top / "model")
    code, err = run_inside(top / "model", "-o", top / "out" / "model.bin")
    shutil.rmtree(top / "model")
    assert code == 1, "status %s: %s" % (code, err)
    assert (err.startswith("export_weights.py: error: ") and err.count("\n") == 1
            and err.endswith("\n")), err
    for word in words:
        assert word in err, "no %r in %r" % (word, err)
    expect(os.listdir(top / "out"), [], "left behind")


def check_all_refused(table):
    """All rows are tried, so that one failure does not hide the next."""
    failures = []
    for what, change, words in table:
        try:
            check_refused(change, words)
        except AssertionError as error:
            failures.append("%s: %s" % (what, error))
        except Exception as error:   # a traceback that a user would see
            failures.append("%s: %s %s" % (what, type(error).__name__, error))
    assert not failures, "\n".join(failures)


# What a case changes. Each returns a function that takes a Source.

def config(**fields):
    return lambda source: source.config.update(fields)


def tokenizer(part=None, **fields):
    return lambda source: (source.tokenizer[part] if part else source.tokenizer).update(fields)


def added(place, **fields):
    return lambda source: source.tokenizer["added_tokens"][place].update(fields)


def without_last_merge(source):
    source.tokenizer["model"]["merges"].pop()
    source.tokenizer["model"]["ignore_merges"] = True


def vocabulary(**tokens):
    return lambda source: source.tokenizer["model"]["vocab"].update(tokens)


def merges(*more):
    return lambda source: source.tokenizer["model"]["merges"].extend(more)


def without(*path):
    """The last name of the path taken out of the config or the tokenizer."""
    def change(source):
        place = getattr(source, path[0])
        for name in path[1:-1]:
            place = place[name]
        del place[path[-1]]
    return change


def tensor(name, dtype="F32", shape=None, data=None):
    """This tensor, put in or changed; its data are zeros, or the old ones if the shape is."""
    def change(source):
        old = source.tensors.get(name)
        raw = data
        if raw is None and shape is None and dtype == "F32":
            raw = old[2]
        new_shape = old[1] if shape is None else shape
        if raw is None:
            count = 1
            for n in new_shape:
                count *= n
            raw = bytes(count * {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2,
                                 "BOOL": 1}[dtype])
        source.tensors[name] = dtype, new_shape, raw
    return change


def entry(**fields):
    """Fields of embed_out.weight, the last tensor, in the safetensors header."""
    def change(source):
        source.change_header = lambda header: header["embed_out.weight"].update(fields)
    return change


def raw(name, change):
    def spoil(source):
        source.change_bytes[name] = change
    return spoil


# ---- Form -------------------------------------------------------------------------------------

@test("the exporter's lines have at most 100 columns, its functions at most 60 lines")
def house_rules():
    text = (ROOT / "export_weights.py").read_text(encoding="utf-8")
    expect([line for line in text.split("\n") if len(line) > 100], [])
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.FunctionDef)}
    assert len(lengths) > 50, lengths
    expect({name: length for name, length in lengths.items() if length > 60}, {})


@test("a part of the exporter names only what stands in it or in a part above it, and its opening "
      "lists the parts in order")
def parts():
    text = (ROOT / "export_weights.py").read_text(encoding="utf-8")
    banners = list(re.finditer("^# ---- (.+) ----$", text, re.M))
    listed = re.search(r"Parts, in order: (.*?)\.", text, re.S)[1].replace("\n", " ")
    expect(", ".join(banner[1] for banner in banners).lower(), listed.lower())

    def part(node):
        return sum(text.count("\n", 0, banner.start()) < node.lineno for banner in banners)

    def names(node, context):
        return {name.id for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, context)}
    nodes = ast.parse(text).body
    home = {name: part(node) for node in nodes
            for name in ([node.name] if hasattr(node, "name") else names(node, ast.Store))}
    assert len(home) > 100, home
    for node in nodes:
        own = {*names(node, ast.Store),
               *(name.arg for name in ast.walk(node) if isinstance(name, ast.arg))}
        expect([name for name in names(node, ast.Load)
                if name not in own and home.get(name, 0) > part(node)], [], node.lineno)


# ---- What is kept -----------------------------------------------------------------------------

def widened(dtype, data):
    """The fp32 bits of a tensor's bytes."""
    if dtype == "F16":
        values = struct.unpack("<%de" % (len(data) // 2), data)
        return list(memoryview(struct.pack("<%df" % len(values), *values)).cast("I"))
    if dtype == "BF16":
        return [bits << 16 for bits in memoryview(data).cast("H")]
    return list(memoryview(data).cast("I"))


def in_file_order(config, n_kv, name, shape, bits):
    """Rows of query_key_value as the file has them: all of Q, all of K, all of V."""
    heads = config["num_attention_heads"]
    if ".query_key_value." not in name or n_kv != heads:
        return bits
    size, width = config["hidden_size"] // heads, len(bits) // shape[0]
    out = []
    for part in range(3):
        for head in range(heads):
            first = (head * 3 + part) * size
            out += bits[first * width:(first + size) * width]
    return out


@test("every number of the source is in the file: F32, F16, BF16, shards, all layouts of "
      "keys, odd sizes")
def every_number_arrives():
    odd = dict(hidden_size=70, num_attention_heads=7, intermediate_size=33, vocab_size=301,
               rotary_pct=0.4)
    cases = [
        dict(), dict(n_kv=2), dict(n_kv=1), dict(dtype="F16"), dict(dtype="BF16"),
        dict(dtype="BF16", n_kv=2), dict(shards=3), dict(shards=2, dtype="F16", n_kv=1), dict(odd),
        dict(odd, n_kv=1, dtype="BF16"), dict(num_attention_heads=1, rotary_pct=0.0,
                                              num_hidden_layers=1, use_parallel_residual=False),
        dict(num_attention_heads=48, rotary_pct=0.0, hidden_size=48, n_kv=16),
    ]
    for options in cases:
        directory = tmpdir() / "model"
        settings = models.write_model(directory, **dict({"vocab_size": 300}, **options))
        code, err = run_inside(directory, "-o", directory / "out.bin")
        assert code == 0, (options, err)
        file = ModelFile(directory / "out.bin")
        hidden, heads, dtype = (settings["hidden_size"], settings["num_attention_heads"],
                                options.get("dtype", "F32"))
        n_kv = options.get("n_kv", heads)
        expect(file.config, {
            "hidden": hidden, "layers": settings["num_hidden_layers"], "heads": heads,
            "kv_heads": n_kv, "head_size": hidden // heads,
            "rotary_dims": int(hidden // heads * settings["rotary_pct"]),
            "intermediate": settings["intermediate_size"], "vocab": settings["vocab_size"],
            "context": 128, "parallel_residual": int(settings["use_parallel_residual"]), "zero1": 0,
            "zero2": 0, "rotary_base": 10000.0, "eps": 1e-5}, str(options))
        weights = models.make_weights(settings, options.get("n_kv"))
        names = (["config", "about", "tokenizer"]
                 + [name.replace("gpt_neox.", "") for name in weights])
        expect(list(file.sections), names, "sections and their order")
        for name, (shape, values) in weights.items():
            bits = widened(dtype, models.to_bytes(values, dtype))
            want = in_file_order(settings, n_kv, name, shape, bits)
            expect(file.numbers(name.replace("gpt_neox.", "")), (shape, want),
                   "%s of %s" % (name, options))


@test("every finite F16 and BF16 becomes the same number in fp32, subnormal ones and -0 too")
def every_half_precision_number():
    for dtype, infinity in (("F16", 0x7C00), ("BF16", 0x7F80)):
        finite = [half for half in range(65536) if half & infinity != infinity]
        finite += [0] * (-len(finite) % 48)
        data = array("H", finite).tobytes()
        top = tmpdir()
        source = Source()
        rows = len(finite) // 48
        source.config["vocab_size"] = rows
        tensor("gpt_neox.embed_in.weight", dtype, [rows, 48], data)(source)
        tensor("embed_out.weight", dtype, [rows, 48], data)(source)
        source.write(top)
        code, err = run_inside(top, "-o", top / "out.bin")
        assert code == 0, err
        file = ModelFile(top / "out.bin")
        for name in ("embed_in.weight", "embed_out.weight"):
            expect(file.numbers(name), ([rows, 48], widened(dtype, data)), dtype)


def saved_by_transformers_5(source):
    old = source.config
    for name in ("torch_dtype", "rotary_emb_base", "rope_scaling"):
        del old[name]
    old.update(dtype="float32", rope_parameters={
        "partial_rotary_factor": old.pop("rotary_pct"), "rope_theta": 10000,
        "rope_type": "default"})


def template(*pieces):
    return {"type": "TemplateProcessing", "single": list(pieces), "special_tokens": {},
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}]}


SEQUENCE_A = {"Sequence": {"id": "A", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
              "use_regex": True}


def pairs(source):
    model = source.tokenizer["model"]
    model["merges"] = [merge.split(" ") for merge in model["merges"]]


def backwards(source):
    source.tensors = dict(reversed(source.tensors.items()))


def with_buffers(source):
    for name, dtype in (("bias", "BOOL"), ("masked_bias", "F16"), ("rotary_emb.inv_freq", "F32")):
        tensor("gpt_neox.layers.0.attention." + name, dtype, [3])(source)


def metadata(source):
    source.change_header = lambda header: header.update({"__metadata__": {"format": "pt"}})


def two_spellings(source):
    source.config.update(partial_rotary_factor=0.5, rope_theta=10000.0,
                         rope_scaling={"type": "default"})


@test("what changes no id and no number gives the same file")
def same_file():
    want = exported()
    expect(exported(), want, "the same again")
    for what, change in [
            ("config as transformers 5 saves it", saved_by_transformers_5),
            ("config with more than one spelling", two_spellings),
            ("rotary share from rope_scaling", lambda source: (
                without("config", "rotary_pct")(source),
                config(rope_scaling={"rope_type": "default",
                                     "partial_rotary_factor": 0.5})(source))),
            ("no hidden_act", without("config", "hidden_act")),
            ("no attention_bias", without("config", "attention_bias")),
            ("no tie_word_embeddings", without("config", "tie_word_embeddings")),
            ("no use_parallel_residual", without("config", "use_parallel_residual")),
            ("no layer_norm_eps", without("config", "layer_norm_eps")),
            ("a factor of 1", config(rope_scaling={"rope_type": "default", "factor": 1.0})),
            ("a factor of 1 for transformers 5", lambda source: (
                saved_by_transformers_5(source),
                source.config["rope_parameters"].update(factor=1.0))),
            ("linear, a factor of 1", config(rope_scaling={"type": "linear", "factor": 1.0})),
            ("what the default does not read", config(rope_scaling={
                "rope_type": "default", "type": "default", "factor": None, "attention_factor": 1.0,
                "original_max_position_embeddings": 64, "beta_fast": None, "beta_slow": None})),
            ("nulls that are not read", config(rope_theta=None, partial_rotary_factor=None,
                                               head_dim=None, quantization_config=None)),
            ("head_dim", config(head_dim=12)),
            ("another num_key_value_heads", config(num_key_value_heads=7)),
            ("another torch_dtype", config(torch_dtype="bfloat16")),
            ("tensors in another order", backwards),
            ("buffers", with_buffers),
            ("metadata", metadata),
            ("spaces after the header", raw("model.safetensors", lambda data: struct.pack(
                "<Q", 5 + struct.unpack("<Q", data[:8])[0]) + b" " * 5 + data[8:])),
            ("merges as pairs", pairs),
            ("truncation",
             tokenizer(truncation={"direction": "Right", "max_length": 5, "stride": 0})),
            ("padding", tokenizer(padding={"strategy": "BatchLongest", "pad_id": 2})),
            ("no post_processor", tokenizer(post_processor=None)),
            ("a template that adds nothing", tokenizer(post_processor=template(SEQUENCE_A))),
            ("a sequence that adds nothing", tokenizer(post_processor={
                "type": "Sequence", "processors": [BYTE_LEVEL, template(SEQUENCE_A)]})),
            ("trim_offsets", tokenizer("pre_tokenizer", trim_offsets=False)),
            ("no use_regex", without("tokenizer", "pre_tokenizer", "use_regex")),
            ("the decoder's flags", tokenizer("decoder", add_prefix_space=False, use_regex=False)),
            ("dropout 0", tokenizer("model", dropout=0.0)),
            ("empty affixes",
             tokenizer("model", continuing_subword_prefix="", end_of_word_suffix="")),
            ("unk_token", tokenizer("model", unk_token="<|unk|>", fuse_unk=True)),
            ("ignore_merges false", tokenizer("model", ignore_merges=False)),
            ("ignore_merges true where the merges make each token",
             tokenizer("model", ignore_merges=True)),
            ("a normalizer of no steps", tokenizer(normalizer={
                "type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]})),
            ("no byte_fallback", without("tokenizer", "model", "byte_fallback"))]:
        assert exported(change) == want, what


# ---- Tokenizer --------------------------------------------------------------------------------

def check_tables(tables, source):
    """The tokenizer section against tokenizer.json, by other means than the exporter's."""
    alphabet = models.byte_alphabet()
    of_char = {char: byte for byte, char in alphabet.items()}
    vocab = source["model"]["vocab"]
    entries = source["added_tokens"]
    names = {number: token for token, number in vocab.items()}
    names.update((token["id"], token["content"]) for token in entries)
    expect(tables.tokens, max(names) + 1, "tokens")
    for number, text in enumerate(tables.texts):
        name = names.get(number, "")
        inside = all(char in of_char for char in name)
        expect(text, bytes(of_char[char] for char in name) if inside else name.encode(),
               "token %d" % number)
    flags = bytearray(tables.tokens)
    for token in entries:
        flags[token["id"]] = 2 + (1 if token["special"] else 0)
    expect(tables.flags, bytes(flags), "flags")
    expect(list(tables.byte_token), [vocab[alphabet[byte]] for byte in range(256)],
           "tokens of the bytes")
    want = {}
    for rank, merge in enumerate(source["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        want[vocab[left], vocab[right]] = rank, vocab[left + right]
    expect(tables.merges, want, "merges")
    for trie, normalized in ((tables.early, False), (tables.late, True)):
        expect(trie, {token["content"].encode(): token["id"] for token in entries
                      if token["normalized"] is normalized},
               "added tokens, normalized %s" % normalized)


@test("the tokenizer section holds tokenizer.json: texts, flags, merges and added tokens, each "
      "found by its key")
def tokenizer_section():
    def strange(source):
        # In the byte alphabet, outside it, with a NUL; then one that the vocabulary has.
        model, entries = source.tokenizer["model"], source.tokenizer["added_tokens"]
        for content, special, normalized in (("\u00e9t\u00e9", False, True),
                                             ("\u201cx\u201d", False, False), ("a\0b", True, True)):
            entries.append(dict(entries[0], id=entries[-1]["id"] + 1, content=content,
                                special=special, normalized=normalized))
        word = next(token for token in model["vocab"] if len(token) == 2)
        entries.append(dict(entries[0], id=model["vocab"][word], content=word, special=False))
        model["merges"].append(model["merges"][0])   # the last of two counts
        tensor("gpt_neox.embed_in.weight", shape=[320, 48])(source)
        tensor("embed_out.weight", shape=[320, 48])(source)
        config(vocab_size=320)(source)

    def bare(source):
        source.tokenizer["added_tokens"].clear()
        source.tokenizer["model"]["merges"].clear()
    for change in (lambda source: None, strange, pairs, bare):
        top = tmpdir()
        source = Source()
        change(source)
        source.write(top)
        code, err = run_inside(top, "-o", top / "out.bin")
        assert code == 0, err
        check_tables(Tables(ModelFile(top / "out.bin").text("tokenizer")), source.tokenizer)


@test("the real tokenizer.json comes out whole, 1,636 added tokens and 30,876 merges")
def real_tokenizer():
    if not SHARED:
        raise Skip("the real tokenizer.json is not there")
    real = SHARED / "kl3m-002-170m" / "tokenizer.json"
    directory = tmpdir()
    models.write_model(directory, tokenizer=real, vocab_size=32768, hidden_size=8,
                       intermediate_size=8, rotary_pct=0.0)
    code, err = run_inside(directory, "-o", directory / "out.bin")
    assert code == 0, err
    tables = Tables(ModelFile(directory / "out.bin").text("tokenizer"))
    check_tables(tables, json.loads(real.read_text(encoding="utf-8")))
    expect((tables.tokens, len(tables.merges), len(tables.early), len(tables.late)),
           (32768, 30876, 7, 1629))


# ---- What is refused --------------------------------------------------------------------------

@test("a config that the program would not compute exactly is refused by the name of its field")
def refused_configs():
    table = [
        (("%s = %r" % (field, value)), config(**{field: value}), [field]) for field, values in {
            "model_type": ["llama", None, 1], "hidden_act": ["gelu_new", "relu", None, ["gelu"]],
            "attention_bias": [False, 1, None, "true"], "tie_word_embeddings": [True, 0, None],
            "use_parallel_residual": ["yes", 1, None],
            "rope_scaling": [
                {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic"}, {"factor": 2},
                {"rope_type": "default", "factor": 2}, "linear", [], 1, {"type": "linear"},
                {"type": "default", "rope_type": "linear", "factor": 2}, {"attention_factor": 2},
                {"rope_type": "dynamic", "factor": 1.0}, {"rope_theta": None}, {"mscale": 1}],
            "rope_parameters": [{"rope_type": "yarn"}, {"rope_type": None},
                                {"rope_theta": 500}, "default", {"partial_rotary_factor": 0.25}],
            "hidden_size": [0, -48, 48.0, True, "48", None, [48], 10 ** 12, 50, 10 ** 400],
            "num_hidden_layers": [0, -1, 1.0, True, None, 2 ** 40],
            "num_attention_heads": [0, 5, False, "4", None, 1e9],
            "intermediate_size": [0, -80, "80", None, float("nan")],
            "vocab_size": [0, 10 ** 11, None, 300.5],
            "max_position_embeddings": [0, -1, True, None, float("inf")],
            "rotary_pct": [1.5, -0.5, float("nan"), "0.5", True, 0.25, [0.5], 10 ** 400, None],
            "partial_rotary_factor": [0.25, False, float("nan")],
            "rotary_emb_base": [0, -10000, float("inf"), float("nan"), "10000", True, 500, None],
            "rope_theta": [500, {}],
            "layer_norm_eps": [0, -1e-5, float("nan"), float("inf"), "1e-5", True, 2, 0.0, None],
            "head_dim": [6, 24, 0, "12", [12]],
            "quantization_config": [{}, {"quant_method": "gptq", "bits": 4}],
        }.items() for value in values]
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "vocab_size"):
        table.append(("no " + field, without("config", field), [field]))
    table += [
        ("an odd number of rotary dimensions", config(rotary_pct=0.25),
         ["rotary_pct", "3", "even"]),
        ("two shares", config(rotary_pct=0.5, partial_rotary_factor=0.0),
         ["rotary_pct", "partial_rotary_factor"]),
        ("two bases", config(rotary_emb_base=500),
         ["rotary_emb_base", "rope_theta", "500", "10000"]),
        ("heads", config(num_attention_heads=5), ["hidden_size", "48", "num_attention_heads 5"]),
        ("the share's value", config(rotary_pct=1.5), ["rotary_pct", "1.5", "from 0 to 1"]),
        ("the value's place", config(rope_parameters={"rope_type": "yarn"}),
         ["rope_parameters.rope_type", "yarn"]),
    ]
    table += [   # what kl3m would refuse to load
        (field, config(**{field: value}), [field, "from 1 to %d" % (value - 1)])
        for field, value in [
            ("num_hidden_layers", 4097),
            ("num_attention_heads", 4097), ("intermediate_size", 262145),
            ("vocab_size", 4194305), ("max_position_embeddings", 1048577), ("hidden_size", 65537)]]
    table += [("head size", config(hidden_size=4 * 4097), ["hidden_size", "at most 4096"]),
              ("base", config(rotary_emb_base=1.1e12), ["rotary_emb_base", "1000000000000"])]
    check_all_refused(table)
    # These are not refused.
    exported(config(max_position_embeddings=1048576, rotary_emb_base=10 ** 12, rope_theta=10 ** 12))


# What GPTNeoXConfig of transformers makes of these configs, 4.57.6 and 5.24.0: (base, rotary
# share), or None where it fails. Where the two differ transformers 5 counts, since only that writes
# such a config.
ROTARY = [
    ({}, (10000, 0.25), (10000, 0.25)),
    ({"rope_theta": 500}, (10000, 0.25), (10000, 0.25)),
    ({"partial_rotary_factor": 0.5}, (10000, 0.25), (10000, 0.25)),
    ({"rope_theta": 10000, "partial_rotary_factor": 0.25}, (10000, 0.25), (10000, 0.25)),
    ({"rope_theta": None, "partial_rotary_factor": None}, (10000, 0.25), (10000, 0.25)),
    ({"rotary_emb_base": 500}, (500, 0.25), (500, 0.25)),
    ({"rotary_emb_base": 500, "rope_theta": 500}, (500, 0.25), (500, 0.25)),
    ({"rotary_emb_base": 500, "rope_theta": 700}, (500, 0.25), (500, 0.25)),
    ({"rotary_pct": 0.5}, (10000, 0.5), (10000, 0.5)),
    ({"rotary_pct": 0.5, "partial_rotary_factor": 0.5}, (10000, 0.5), (10000, 0.5)),
    ({"rotary_pct": 0.5, "partial_rotary_factor": 1.0}, (10000, 0.5), (10000, 0.5)),
    ({"rope_parameters": {"rope_theta": 500, "rope_type": "default"}}, (10000, 0.25), (500, 0.25)),
    ({"rope_parameters": {"rope_theta": 500}, "rotary_emb_base": 700}, (700, 0.25), (500, 0.25)),
    ({"rope_parameters": {"rope_theta": 500}, "rope_theta": 700}, (10000, 0.25), (500, 0.25)),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}, "rotary_emb_base": 500},
     (500, 0.25), (500, 0.5)),
    ({"rope_parameters": {}, "rope_theta": 500}, (10000, 0.25), (10000, 0.25)),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 500}}, (10000, 0.25), (500, 0.25)),
    ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 500}}, None, (500, 0.25)),
    ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 500}},
     (10000, 0.25), (10000, 0.25)),
    ({"rope_scaling": {"type": "default", "rope_theta": 500},
      "rope_parameters": {"rope_theta": 700}}, (10000, 0.25), (500, 0.25)),
]


@test("the rotary base and share are those that transformers computes with, or the config is "
      "refused by name")
def rotary_base_and_share():
    names = ("rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
    for fields, _, wanted in ROTARY:
        stated = [value for place in (fields, *fields.values()) if isinstance(place, dict)
                  for name, value in place.items() if name in names and value is not None]

        def change(source):
            for name in (*names, "rope_scaling"):
                source.config.pop(name, None)
            source.config.update(fields, num_attention_heads=3)   # of 16 numbers
        if all(value in wanted for value in stated):
            file = tmpdir() / "out.bin"
            file.write_bytes(exported(change))
            got = ModelFile(file).config
            expect((got["rotary_base"], got["rotary_dims"]), (wanted[0], 16 * wanted[1]),
                   str(fields))
        else:
            check_refused(change, ["config.json: "])


@test("the published configs are read as they are, and a missing context as transformers has it")
def published_configs():
    file = tmpdir() / "out.bin"
    file.write_bytes(exported(without("config", "max_position_embeddings")))
    expect(ModelFile(file).config["context"], 2048)
    if not SHARED:
        raise Skip("the published configs are not there")
    for name, sizes in (("kl3m-002-170m", (1024, 16, 16, 0, 64, 16, 1024, 32768, 4096)),
                        ("kl3m-003-1.7b", (2048, 32, 32, 0, 64, 16, 8192, 32768, 8192))):
        published = json.loads((SHARED / name / "config.json").read_text(encoding="utf-8"))
        expect(tuple(export_weights.read_config(published)), (*sizes, True, 10000.0, 1e-5), name)


def renamed(names):
    """Tensors under other names, in the places that they have."""
    def change(source):
        source.tensors = {names.get(name, name): tensor for name, tensor in source.tensors.items()}
    return change


def with_both(changes=lambda tensor: tensor):
    """lm_head.weight beside embed_out.weight, changed."""
    def change(source):
        source.tensors["lm_head.weight"] = changes(source.tensors["embed_out.weight"])
    return change


@test("the projection to the vocabulary is taken by either name, by both if they are the same, "
      "in shards too")
def names_of_the_projection():
    want = exported()
    new_name = renamed({"embed_out.weight": "lm_head.weight"})
    for what, change in (("lm_head", new_name), ("both", with_both()),
                         ("both, lm_head first",
                          lambda source: (with_both()(source), backwards(source)))):
        assert exported(change) == want, what

    def in_shards(source, names):
        """One shard a name."""
        directory = tmpdir() / "model"
        tensors = {name: (shape, array("f", data))
                   for name, (_, shape, data) in source.tensors.items()}
        models.save_model(directory, source.config, tensors, shards=len(tensors),
                          tokenizer=source.tokenizer)
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert index[names[0]] != index.get(names[1]), index
        return directory
    for change, names in ((new_name, ("lm_head.weight", "")),
                          (with_both(), ("embed_out.weight", "lm_head.weight"))):
        source = Source()
        change(source)
        directory = in_shards(source, names)
        code, err = run_inside(directory, "-o", directory / "out.bin")
        expect((code, (directory / "out.bin").read_bytes() == want), (0, True), err)

    def one_bit(tensor):
        return (*tensor[:2], tensor[2][:-1] + bytes([tensor[2][-1] ^ 1]))
    both = ["embed_out.weight", "lm_head.weight", "one of the two"]
    check_all_refused([
        ("both, one bit apart", with_both(one_bit), both),
        ("both, another shape", with_both(lambda tensor: (tensor[0], [48, ROWS], tensor[2])), both),
        ("both, another type",
         with_both(lambda tensor: ("BF16", tensor[1], tensor[2][:len(tensor[2]) // 2])), both),
        ("neither", lambda source: source.tensors.pop("embed_out.weight"),
         ["embed_out.weight or lm_head.weight"]),
        ("lm_head of another size", lambda source: (
            new_name(source), tensor("lm_head.weight", shape=[301, 48])(source)),
         ["lm_head.weight", "[301, 48]"]),
        ("a bias of lm_head", tensor("lm_head.bias", shape=[ROWS]), ["lm_head.bias"])])


@test("tensors that are missing, unknown, of another shape or dtype, or not finite are "
      "refused by name")
def wrong_tensors():
    first = "gpt_neox.layers.0.attention.dense.weight"

    def gone(source):
        del source.tensors[first]

    def grouped(kv_heads):
        return lambda source: (tensor(QKV + "weight", shape=[48 + 24 * kv_heads, 48])(source),
                               tensor(QKV + "bias", shape=[48 + 24 * kv_heads])(source))

    def spoiled(name, dtype, *units):
        """The tensor in this dtype, all zeros but for its last number."""
        def change(source):
            shape = source.tensors[name][1]
            size = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
            count = len(source.tensors[name][2]) // 4
            source.tensors[name] = dtype, shape, bytes((count - 1) * size) + bytes(units)
        return change
    bias = "gpt_neox.final_layer_norm.bias"
    check_all_refused([
        ("a tensor is missing", gone, [first, "found nothing", "[48, 48]"]),
        ("the first query_key_value is missing",
         lambda source: source.tensors.pop(QKV + "weight"), [QKV + "weight"]),
        ("a layer is missing", config(num_hidden_layers=2),
         ["gpt_neox.layers.1.input_layernorm.weight"]),
        ("another shape", tensor(first, shape=[48, 47]), [first, "[48, 47]", "[48, 48]"]),
        ("transposed", tensor("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", shape=[48, 80]),
         ["dense_h_to_4h.weight", "[48, 80]", "[80, 48]"]),
        ("a vector as a matrix", tensor(bias, shape=[1, 48]), [bias, "[1, 48]", "[48]"]),
        ("another rank", tensor(first, shape=[48, 48, 1]), [first, "[48, 48, 1]"]),
        ("another vocabulary", config(vocab_size=305),
         ["embed_in.weight", "[304, 48]", "[305, 48]"]),
        ("embed_out of another size", tensor("embed_out.weight", shape=[301, 48]),
         ["embed_out.weight", "[301, 48]"]),
        ("three key heads of four", grouped(3), [QKV + "weight", "[120, 48]", "144", "divides 4"]),
        ("no key heads", grouped(0), [QKV + "weight", "[48, 48]"]),
        ("more key heads than heads", grouped(5), [QKV + "weight", "[168, 48]"]),
        ("half a key head", tensor(QKV + "weight", shape=[60, 48]), [QKV + "weight", "[60, 48]"]),
        ("a query_key_value without rows", tensor(QKV + "weight", shape=[0, 48]),
         [QKV + "weight", "[0, 48]"]),
        ("a scalar query_key_value", tensor(QKV + "weight", shape=[]), [QKV + "weight", "[]"]),
        ("a bias of another layout", tensor(QKV + "bias", shape=[96]),
         [QKV + "bias", "[96]", "[144]"]),
        ("F64", tensor(first, "F64"), [first, "F64", "F32, F16 or BF16"]),
        ("I32", tensor(first, "I32"), [first, "I32"]),
        ("an unknown tensor", tensor("gpt_neox.layers.0.attention.q_norm.weight", shape=[12]),
         ["q_norm.weight"]),
        ("an unknown layer", tensor("gpt_neox.layers.1.input_layernorm.weight", shape=[48]),
         ["layers.1.input"]),
        ("a bias of embed_out", tensor("embed_out.bias", shape=[ROWS]), ["embed_out.bias"]),
        ("a name with a line break", tensor("a\nb\u201c", shape=[1]), ["a\\nb"]),
        ("F32 infinity", spoiled(bias, "F32", 0, 0, 0x80, 0x7F), [bias, "finite"]),
        ("F32 -infinity", spoiled(bias, "F32", 0, 0, 0x80, 0xFF), [bias, "finite"]),
        ("F32 NaN", spoiled(first, "F32", 1, 0, 0x80, 0x7F), [first, "finite"]),
        ("F16 infinity", spoiled(bias, "F16", 0, 0x7C), [bias, "finite"]),
        ("F16 NaN", spoiled(first, "F16", 0, 0xFE), [first, "finite"]),
        ("BF16 infinity", spoiled("embed_out.weight", "BF16", 0x80, 0x7F),
         ["embed_out.weight", "finite"]),
        ("BF16 NaN",
         spoiled("gpt_neox.embed_in.weight", "BF16", 0xC0, 0xFF), ["embed_in.weight", "finite"]),
    ])
    large = struct.pack("<f", 3.4e38)   # as large as they come, and finite
    exported(spoiled(bias, "F32", *large))


@test("a damaged or hostile safetensors file is refused")
def hostile_safetensors():
    def bytes_of(change):
        return raw("model.safetensors", change)

    def header(change):
        """The header's text changed, and its length with it."""
        def spoil(data):
            size = struct.unpack("<Q", data[:8])[0]
            text = change(data[8:8 + size])
            return struct.pack("<Q", len(text)) + text + data[8 + size:]
        return bytes_of(spoil)

    def offsets(a, b):
        def change(source):
            def both(entries):
                last = entries["embed_out.weight"]["data_offsets"]
                entries["embed_out.weight"]["data_offsets"] = [last[0] + a, last[1] + b]
            source.change_header = both
        return change

    def length(size):
        return bytes_of(lambda data: struct.pack("<Q", size) + data[8:])
    name, first = "embed_out.weight", "gpt_neox.embed_in.weight"
    check_all_refused([
        ("missing", bytes_of(lambda data: None), ["model.safetensors"]),
        ("empty", bytes_of(lambda data: b""), ["header"]),
        ("seven bytes", bytes_of(lambda data: data[:7]), ["header"]),
        ("eight bytes", bytes_of(lambda data: data[:8]), ["header"]),
        ("half the header", bytes_of(lambda data: data[:500]), ["header"]),
        ("one byte short", bytes_of(lambda data: data[:-1]), ["model.safetensors", "download"]),
        ("one byte more", bytes_of(lambda data: data + b"\0"), ["size", "download"]),
        ("no data", bytes_of(lambda data: data[:8 + struct.unpack("<Q", data[:8])[0]]),
         ["download"]),
        ("a pointer file", bytes_of(lambda data: b"version https://git-lfs.github.com/spec/v1\n"),
         ["Git LFS"]),
        ("length 0", length(0), ["header"]),
        ("length 2^63", length(2 ** 63), ["header", str(2 ** 63)]),
        ("length 2^64 - 1", length(2 ** 64 - 1), ["header"]),
        ("length in the middle", length(100), ["header", "JSON"]),
        ("no JSON", header(lambda text: b"x" * len(text)), ["JSON"]),
        ("not UTF-8", header(lambda text: b'{"\xff": 1}'), ["JSON"]),
        ("a list", header(lambda text: b"[]"), ["object"]),
        ("a number", header(lambda text: b"1" * 300), ["object"]),
        ("a huge number",
         header(lambda text: b'{"a": ' + b"1" * 9999 + b"}"), ["model.safetensors"]),
        ("deep", header(lambda text: b"[" * 200000), ["JSON"]),
        ("nothing in it", header(lambda text: b"{}"), ["size"]),
        ("a name twice",
         header(lambda text: text.replace(b'"gpt_neox.embed_in.weight"', b'"embed_out.weight"')),
         ["embed_out.weight", "twice"]),
        ("a field twice", header(lambda text: text.replace(b'"shape"', b'"dtype"', 1)),
         ["dtype", "twice"]),
        ("an entry that is none",
         lambda s: setattr(s, "change_header", lambda h: h.update({name: 3})), [name]),
        ("a null entry", lambda s: setattr(s, "change_header", lambda h: h.update({name: None})),
         [name]),
        ("no dtype", entry(dtype=None), [name, "dtype"]),
        ("a dtype that is a number", entry(dtype=32), [name]),
        ("an unknown dtype", entry(dtype="F32X"), [name, "F32X"]),
        ("a dtype of another size", entry(dtype="F16"),
         [name, str(ROWS * 48 * 4), str(ROWS * 48 * 2)]),
        ("no shape", entry(shape=None), [name]),
        ("a shape that is a number", entry(shape=14400), [name]),
        ("a negative size", entry(shape=[-ROWS, -48]), [name]),
        ("a size with a fraction", entry(shape=[float(ROWS), 48]), [name]),
        ("a size that is true", entry(shape=[True, 48]), [name]),
        ("a huge size", entry(shape=[2 ** 62, 48]), [name, "[304, 48]"]),
        ("sizes that overflow", entry(shape=[2 ** 32, 2 ** 32]), [name]),
        ("many sizes", entry(shape=[2 ** 62] * 10000), [name]),
        ("no offsets", entry(data_offsets=None), [name]),
        ("one offset", entry(data_offsets=[0]), [name]),
        ("three offsets", entry(data_offsets=[0, 1, 2]), [name]),
        ("offsets that are text", entry(data_offsets=["0", "1"]), [name]),
        ("negative offsets", entry(data_offsets=[-8, -4]), [name]),
        ("huge offsets", entry(data_offsets=[2 ** 64, 2 ** 64 + 4]), [name]),
        ("offsets of 4,300 digits", lambda s: setattr(s, "change_header", lambda h: h[first].update(
            data_offsets=[0, 10 ** 4300 - 1])), [first]),
        ("offsets past the end", offsets(4, 4), [name]),
        ("offsets backwards", offsets(4, -10 ** 5), [name]),
        ("an overlap", offsets(-4, -4), [name, "offset"]),
        ("a gap", offsets(4, 0), [name, "offset"]),
        ("the same place twice", entry(data_offsets=[0, ROWS * 48 * 4]), ["offset"]),
        ("everything", entry(data_offsets=[0, 4 * 10 ** 9]), [name]),
        ("a directory",
         lambda s, d: (s.write(d), (d / "model.safetensors").unlink(),
                       (d / "model.safetensors").mkdir(), "written")[-1],
         ["model.safetensors"]),
    ])


@test("shards: what the index and the files do not agree on is refused, and so is a way out of "
      "the directory")
def disagreeing_shards():
    def shards(change=lambda index: None, files=lambda directory: None):
        def build(source, directory):
            tensors = {name: (shape, array("f", data))
                       for name, (_, shape, data) in source.tensors.items()}
            models.save_model(directory, source.config, tensors, shards=2,
                              tokenizer=source.tokenizer)
            path = directory / index_name
            index = json.loads(path.read_text())
            change(index)
            path.write_text(json.dumps(index))
            files(directory)
            return "written"
        return build

    def mapped(file, name="embed_out.weight"):
        return shards(lambda index: index["weight_map"].update({name: file}))
    first, second, index_name = (
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json")
    check_all_refused([
        ("no weight_map", shards(lambda index: index.pop("weight_map")), ["weight_map"]),
        ("weight_map is a list", shards(lambda index: index.update(weight_map=[second])),
         ["weight_map"]),
        ("weight_map is empty", shards(lambda index: index.update(weight_map={})),
         [QKV + "weight"]),
        ("the parent directory",
         mapped("../model.safetensors"), ["../model.safetensors", "plain file name"]),
        ("an absolute path", mapped("/etc/passwd"), ["/etc/passwd", "plain file name"]),
        ("a directory below", mapped("a/b"), ["a/b", "plain file name"]),
        ("two dots", mapped(".."), ["plain file name"]),
        ("a number", mapped(3), ["plain file name"]),
        ("an empty name", mapped(""), ["plain file name"]),
        ("a NUL", mapped("a\0b"), ["plain file name"]),
        ("no such shard", mapped("model-00003-of-00002.safetensors"),
         ["model-00003-of-00002.safetensors"]),
        ("in another shard", mapped(first), ["embed_out.weight", first, second]),
        ("in no shard", mapped(first, "gpt_neox.more.weight"), ["gpt_neox.more.weight", first]),
        ("not in the index", shards(lambda index: index["weight_map"].pop("embed_out.weight")),
         ["embed_out.weight"]),
        ("a shard is missing", shards(files=lambda d: (d / second).unlink()), [second]),
        ("a shard is short", shards(files=lambda d: os.truncate(d / second, 40000)), [second]),
        ("one shard twice", shards(files=lambda d: shutil.copyfile(d / first, d / second)),
         [second]),
        ("the index is broken", shards(files=lambda d: (d / index_name).write_text("{")),
         ["JSON", index_name]),
    ])


@test("a tokenizer that would give other ids is refused by name, with the remedy")
def refused_tokenizers():
    remedy = "base model"
    entries = models.small_tokenizer(TOKENS)["added_tokens"]
    last = entries[-1]

    def more(**fields):
        return lambda source: source.tokenizer["added_tokens"].append(dict(last, **fields))

    def swapped(source):
        tokens = source.tokenizer["added_tokens"]
        tokens[-1], tokens[-2] = tokens[-2], tokens[-1]

    def no_byte(source):
        vocab = source.tokenizer["model"]["vocab"]
        vocab["\u0120\u0120\u0120"] = vocab.pop("\u0100")   # byte 0

    def same_under_nfc(source):
        source.tokenizer["normalizer"] = nfc
        for number, content in enumerate(("caf\u00e9", "cafe\u0301"), TOKENS):
            more(content=content, id=number)(source)
    nfc = {"type": "NFC"}
    split = {"type": "Sequence",
             "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]}
    start = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    check_all_refused([(what, change, [*words, remedy]) for what, change, words in [
        ("a normalizer", tokenizer(normalizer={"type": "NFKC"}), ["normalizer", "NFKC", "NFC"]),
        ("normalizers", tokenizer(normalizer={"type": "Sequence", "normalizers": [
            nfc, {"type": "Lowercase"}]}), ["normalizer"]),
        ("no normalizer", tokenizer(normalizer=[1]), ["normalizer"]),
        ("no pre_tokenizer", tokenizer(pre_tokenizer=None), ["pre_tokenizer"]),
        ("another pre_tokenizer",
         tokenizer(pre_tokenizer={"type": "Whitespace"}), ["pre_tokenizer", "Whitespace"]),
        ("pre_tokenizers", tokenizer(pre_tokenizer=split), ["pre_tokenizer", "Sequence"]),
        ("a pre_tokenizer that is a list", tokenizer(pre_tokenizer=[1]), ["pre_tokenizer"]),
        ("add_prefix_space", tokenizer("pre_tokenizer", add_prefix_space=True),
         ["add_prefix_space", "true"]),
        ("no add_prefix_space", without("tokenizer", "pre_tokenizer", "add_prefix_space"),
         ["add_prefix_space"]),
        ("use_regex", tokenizer("pre_tokenizer", use_regex=False), ["use_regex", "false"]),
        ("no decoder", tokenizer(decoder=None), ["decoder"]),
        ("another decoder", tokenizer(decoder={"type": "WordPiece"}), ["decoder", "WordPiece"]),
        ("another model", tokenizer("model", type="WordPiece"), ["model", "WordPiece", "BPE"]),
        ("no model", tokenizer(model=None), ["model"]),
        ("dropout", tokenizer("model", dropout=0.1), ["dropout", "0.1"]),
        ("byte_fallback", tokenizer("model", byte_fallback=True), ["byte_fallback"]),
        ("ignore_merges", without_last_merge, ["ignore_merges", "merges do not make"]),
        ("a prefix", tokenizer("model", continuing_subword_prefix="##"),
         ["continuing_subword_prefix", "##"]),
        ("a suffix", tokenizer("model", end_of_word_suffix="</w>"), ["end_of_word_suffix", "</w>"]),
        ("a template that adds",
         tokenizer(post_processor=template(start, SEQUENCE_A)), ["post_processor"]),
        ("a template without the text", tokenizer(post_processor=template()), ["post_processor"]),
        ("a template with the text twice",
         tokenizer(post_processor=template(SEQUENCE_A, SEQUENCE_A)), ["post_processor"]),
        ("RobertaProcessing",
         tokenizer(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 1]}),
         ["post_processor", "RobertaProcessing"]),
        ("one of two that adds", tokenizer(post_processor={
            "type": "Sequence", "processors": [BYTE_LEVEL, template(SEQUENCE_A, start)]}),
         ["post_processor"]),
        ("a post_processor that is none",
         tokenizer(post_processor="ByteLevel"), ["post_processor"]),
        ("processors that are none",
         tokenizer(post_processor={"type": "Sequence", "processors": 3}), ["post_processor"]),
        ("lstrip", added(8, lstrip=True), ["lstrip", json.dumps(entries[8]["content"])]),
        ("rstrip", added(8, rstrip=True), ["rstrip"]),
        ("single_word", added(8, single_word=True), ["single_word"]),
        ("no lstrip", without("tokenizer", "added_tokens", 8, "lstrip"), ["lstrip"]),
        ("normalized is text", added(8, normalized="yes"), ["normalized"]),
        ("no special", without("tokenizer", "added_tokens", 8, "special"), ["special"]),
        ("an added token without text", added(8, content=""), ["content"]),
        ("an added token of a number", added(8, content=5), ["content"]),
        ("an added token that is none", lambda s: s.tokenizer["added_tokens"].append(7), ["7"]),
        ("added_tokens that are none", tokenizer(added_tokens={}), ["added_tokens"]),
        ("an added id that is taken", added(-1, id=100), ["id", "100"]),
        ("an added id that leaves a gap", added(-1, id=last["id"] + 1), ["id", str(last["id"])]),
        ("a vocabulary id changed", added(0, id=1), ["<|start|>", "id"]),
        ("an added id of text", added(-1, id="5"), ["id"]),
        ("an added id of true", added(-1, id=True), ["id"]),
        ("an added token twice", more(), ["id", "once"]),
        ("added tokens in another order", swapped, ["id"]),
        ("a token that is too long", vocabulary(**{"a" * 4097: TOKENS}), ["4097", "at most 4096"]),
        ("an added token that is too long", more(content="~" * 2 ** 21, id=TOKENS),
         ["2097152", "at most 4096"]),
        ("an added token that is so before it is decoded", more(content="\u00e9" * 2049, id=TOKENS),
         ["4098", "at most 4096"]),
        ("added tokens that NFC makes the same", same_under_nfc, ["[300, 301]", "NFC"]),
        ("two tokens of one id", vocabulary(zzz=7), ["zzz", "id", "7"]),
        ("a negative id", vocabulary(zzz=-1), ["zzz", "-1"]),
        ("an id of text", vocabulary(zzz="5"), ["zzz"]),
        ("an id of true", vocabulary(zzz=True), ["zzz"]),
        ("an id with a fraction", vocabulary(zzz=299.0), ["zzz"]),
        ("an id beyond the embedding", vocabulary(zzz=ROWS), ["zzz", "304", "embed_in"]),
        ("more tokens than rows", lambda source: [
            more(content="~" * n, id=TOKENS - 2 + n)(source) for n in range(2, 7)],
         ['"~~~~~~"', "304 rows"]),
        ("a huge id", vocabulary(zzz=10 ** 30), ["zzz"]),
        ("a gap that the library would fill", lambda source: (
            source.tokenizer["added_tokens"].clear(),
            source.tokenizer["model"]["vocab"].update(zzz=299),
            source.tokenizer["added_tokens"].extend([dict(last, id=298)])), ["id", "298"]),
        ("no vocabulary", tokenizer("model", vocab=None), ["vocab"]),
        ("a vocabulary that is a list", tokenizer("model", vocab=["a"]), ["vocab"]),
        ("a byte without a token", no_byte, ["\\u0100", "byte 0"]),
        ("merges that are none", tokenizer("model", merges=None), ["merges"]),
        ("a merge of three", merges("a b c"), ["merge", "a b c"]),
        ("a merge of one", merges("ab"), ["merge", "ab"]),
        ("a merge of three as a list", merges(["a", "b", "c"]), ["merge"]),
        ("a merge of numbers", merges([1, 2]), ["merge"]),
        ("a merge that is none", merges(5), ["merge", "5"]),
        ("a merge of an unknown part", merges("a \u2603"), ["merge", "\\u2603", "vocabulary"]),
        ("a merge with an unknown result", merges(["q", "x"]), ["merge", "qx", "vocabulary"]),
    ]] + [
        ("half a surrogate pair", added(-1, content="a\ud800"), ["\\ud800", "download"]),
        ("half a pair in the vocabulary", lambda source: (
            source.tokenizer["added_tokens"].clear(), vocabulary(**{"\udfff": TOKENS})(source)),
         ["\\udfff", "download"]),
    ])
    exported(more(content="~" * 4096, id=TOKENS))


@test("a hash table in which kl3m would search for long is refused as soon as a run is too long")
def long_runs():
    inverse = pow(0x9E3779B97F4A7C15, -1, 1 << 64)

    def keys(count, slot=0):
        """So many keys that start at this slot, in any table of up to 2^18 slots."""
        numbers = (((n << 18 | slot) << 32) * inverse % 2 ** 64 for n in range(count))
        return {divmod(number, 1 << 32): (0, 0) for number in numbers}
    for fine in (keys(256), keys(256, -1 % 2 ** 18), {**keys(200), **keys(56, 150)}):
        export_weights.hash_table("merges", fine)
    for what in (keys(257), keys(257, -1 % 2 ** 18), {**keys(200), **keys(57, 150)}, keys(2 ** 14)):
        start = time.process_time()
        try:
            export_weights.hash_table("merges", what)
        except export_weights.ExportError as error:
            assert "merges" in str(error) and "256" in str(error), error
        else:
            raise AssertionError("%d keys are taken" % len(what))
        assert time.process_time() - start < 1


@test("files that are missing, not JSON, or not readable are refused in one line")
def unreadable_files():
    table = []
    for name in ("config.json", "tokenizer.json"):
        table += [(what + " " + name, raw(name, change), [name]) for what, change in [
            ("no", lambda data: None),
            ("an empty", lambda data: b""), ("a list in", lambda data: b"[1]"),
            ("null in", lambda data: b"null"), ("half of", lambda data: data[:len(data) // 2]),
            ("bad UTF-8 in", lambda data: b"\xff" + data),
            ("UTF-16 in", lambda data: data.decode().encode("utf-16")),
            ("deep", lambda data: b'{"a":' * 100000),
            ("deep and whole",
             lambda data: data[:-1] + b', "z": ' + b"[" * 900 + b"]" * 900 + b', "z": 1}'),
            ("a key twice in", lambda data: b'{"version": 1, ' + data[1:-1] + b', "version": 1}'),
            ("more after", lambda data: data + b"x")]]
    check_all_refused(table)
    for source, words in (("no/such/directory", ["directory"]), ("", ["directory"]),
                          (ROOT / "export_weights.py", ["directory"])):
        code, err = run_inside(source, "-o", tmpdir() / "x.bin")
        expect((code, err.count("\n")), (1, 1), err)
        for word in words:
            assert word in err, err


def said_of(directory):
    """The one line that an export of this directory ends with."""
    out = tmpdir() / "x.bin"
    code, err = run_inside(directory, "-o", out)
    assert (code == 1 and err.startswith("export_weights.py: error: ")
            and err.count("\n") == 1), (code, err)
    assert not out.exists()
    return err


RESAVE = ["transformers", "save_pretrained"]


@test("models of other families are refused by name, with what to do")
def other_families():
    for fields, words in [({"model_type": "mixtral"}, ["mixtral", "GPT-NeoX", "transformers"]),
                          ({"model_type": "llama"}, ["llama", "GPT-NeoX", "transformers"]),
                          ({"hidden_act": "gelu_fast"}, ["gelu_fast", "transformers"]),
                          ({"tie_word_embeddings": True}, ["tie_word_embeddings", "untied"])]:
        check_refused(config(**fields), words)

    def sentence_piece(source, folder):
        source.write(folder)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"x")
        return "written"
    check_refused(sentence_piece, ["SentencePiece", "transformers"])


@test("a folder with weights of another kind, or without a part, is told what it has "
      "and what to do")
def other_kinds_of_weights():
    for names, words in [   # what the folder has in place of model.safetensors
            (["pytorch_model.bin"], ["pytorch_model.bin", "PyTorch", *RESAVE]),
            (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
             ["pytorch_model-00001-of", *RESAVE]),
            (["consolidated.00.pth"], ["consolidated.00.pth", *RESAVE]),
            (["model.pt"], ["model.pt", *RESAVE]),
            (["optimizer.pt", "pytorch_model.bin", "training_args.bin"],
             ["pytorch_model.bin", *RESAVE]),
            (["kl3m.Q8_0.gguf"], ["kl3m.Q8_0.gguf", "llama.cpp", "made from"]),
            (["flax_model.msgpack"], ["flax_model.msgpack", *RESAVE]),
            (["tf_model.h5"], ["tf_model.h5", *RESAVE]), (["model.onnx"], ["model.onnx", *RESAVE]),
            (["weights.safetensors"], ["weights.safetensors", "rename it to model.safetensors"]),
            (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
             ["model-00001-of-00002.safetensors", "download model.safetensors.index.json"]),
            (["adapter_config.json", "adapter_model.safetensors"], ["adapter", "merge_and_unload"]),
            (["model.bin", "README.md"], ["no model.safetensors", "org/model"]),
            ([], ["no model.safetensors"])]:
        for has_config in (True, False):
            source = small_source()
            (source / "model.safetensors").unlink()
            for name in names:
                (source / name).write_bytes(b"x")
            if not has_config:
                (source / "config.json").unlink()
            err = said_of(source)
            for word in [str(source), *words]:
                assert word in err, "no %r in %r" % (word, err)
    for name in ("config.json", "tokenizer.json"):
        source = small_source()
        (source / name).unlink()
        err = said_of(source)
        assert str(source / name) in err and "base model" in err and "copy" in err, err
    top = tmpdir()
    for below in ("checkpoint-500", "models--some--model/snapshots/" + "0" * 40):
        source = small_source(top, below)
        err = said_of(source.parent.parent if "snapshots" in below else source.parent)
        assert str(source) in err and "pass the folder in it" in err, err
    expect(run_inside(top / "checkpoint-500", "-o", top / "x.bin")[0], 0)


@test("control characters in the names of files reach no terminal: messages show them as escapes")
def names_with_control_characters():
    strange = "\x1b[31mred\x9b\u202e\u2028"
    source = small_source()
    (source / "model.safetensors").rename(source / (strange + ".safetensors"))
    top = tmpdir()
    (top / strange).mkdir()
    (top / strange / "config.json").write_text("{}")
    for folder in (source, top, top / "none" / strange, top / strange):
        err = said_of(folder)
        assert err[:-1].isprintable() and ("\\x1b[31mred\\x9b\\u202e\\u2028" in err
                                           or "\\u001b[31mred" in err), err


@test("a Git LFS pointer, a web page or another format in a file's place is called that, with the "
      "remedy that works")
def other_formats():
    pointer = (b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\n"
               b"size 671788032\n" % (b"0" * 64))
    for content, words in [
            (pointer, ["a Git LFS pointer", "git lfs pull", "download"]),
            (b"<!doctype html>\n<html class=\"\"><head>", ["a web page", "/resolve/"]),
            (b"\n <HTML>\n<body>Please log in", ["a web page", "/resolve/"]),
            (b"\xef\xbb\xbf<!DOCTYPE html>", ["a web page"]),
            (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["a web page"]),
            (b"PK\x03\x04" + bytes(100), ["pickle of PyTorch", *RESAVE]),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", ["pickle of PyTorch", *RESAVE]),
            (b"GGUF\x03\0\0\0", ["llama.cpp", "made from"]),
            (b"\x89HDF\r\n\x1a\n", ["TensorFlow", *RESAVE])]:
        for name in ("model.safetensors", "config.json", "tokenizer.json",
                     "model.safetensors.index.json"):
            source = small_source()
            if name.endswith("index.json"):
                (source / "model.safetensors").unlink()
            (source / name).write_bytes(content)
            err = said_of(source)
            for word in [str(source / name), *words]:
                assert word in err, "no %r in %r" % (word, err)
            assert "damaged" not in err, err
    for text in (b"Entry not found", b"Invalid username or password.",
                 b'{"error":"Repository not found"}', b"no\n"):
        source = small_source()
        (source / "model.safetensors").write_bytes(text)
        err = said_of(source)
        assert json.dumps(text.decode()) in err and "download the file itself" in err, err
    for size in (0x10280, 0x10380, 0x40480):   # a sound file that begins as a pickle does
        def padded(data, size=size):
            length = struct.unpack("<Q", data[:8])[0]
            return (struct.pack("<Q", size) + data[8:8 + length] + b" " * (size - length)
                    + data[8 + length:])
        exported(raw("model.safetensors", padded))


@test("weights under other names are refused by the name that they have, the one expected, and how "
      "to save them")
def other_names_of_weights():
    def prefix(text, cut=""):
        return lambda source: renamed({name: text + name[len(cut):] if name.startswith(cut)
                                       else name for name in source.tensors})(source)
    lora = "base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight"
    merge, expected = ["merge_and_unload"], "gpt_neox.embed_in.weight"
    check_all_refused([
        ("of a PeftModel",
         prefix("base_model.model."), ["base_model.model." + expected, expected, *merge]),
        ("an adapter",
         lambda source: (source.tensors.clear(), tensor(lora, shape=[1])(source)), [lora, *merge]),
        ("an adapter beside the weights",
         lambda source: tensor(lora[len("base_model.model."):], shape=[1])(source),
         ["lora_A", *merge]),
        ("of a DistributedDataParallel", prefix("module."),
         ["module." + expected, expected, "wraps"]),
        ("of torch.compile", prefix("_orig_mod."), ["_orig_mod." + expected, expected, "wraps"]),
        ("of another wrapper", prefix("model."), ["model." + expected, expected, "wraps"]),
        ("of GPTNeoXModel", prefix("", "gpt_neox."),
         ['"embed_in.weight"', expected, "GPTNeoXForCausalLM"]),
        ("of a classifier", renamed({"embed_out.weight": "score.weight"}),
         ["embed_out.weight", '"score.weight"']),
        ("of another architecture",
         renamed({"gpt_neox.layers.0.attention.dense.weight": "model.o_proj.weight"}),
         ["gpt_neox.layers.0.attention.dense.weight", '"model.o_proj.weight"']),
    ])


@test("whole words: merges are done as by the rule, in a time that does not grow with the square of a "
      "token's length")
def merges_of_whole_words():
    def by_rule(ids, merges):
        """The pair of the lowest rank, the leftmost of equals, until there is none."""
        while pairs := [(merges[pair][0], at) for at, pair in enumerate(zip(ids, ids[1:]))
                        if pair in merges]:
            at = min(pairs)[1]
            ids = [*ids[:at], merges[ids[at], ids[at + 1]][1], *ids[at + 2:]]
        return ids
    draw = random.Random(1)
    for _ in range(500):
        pairs = [(draw.randrange(6), draw.randrange(6)) for _ in range(12)]
        merges = {pair: (rank, draw.randrange(6)) for rank, pair in enumerate(pairs)}
        ids = [draw.randrange(6) for _ in range(draw.randrange(12))]
        expect(export_weights.merged(ids, merges), by_rule(ids, merges), (ids, merges))
    doubled = {(number, number): (number, number + 1) for number in range(12)}
    start = time.process_time()
    for _ in range(5):
        expect(export_weights.merged([0] * 4096, doubled), [12])
    assert time.process_time() - start < 5, "it took 3 s each when all pairs were looked at again"


# ---- The file on the disk ---------------------------------------------------------------------

def small_source(top=None, name="model", change=lambda source: None):
    directory = (top or tmpdir()) / name
    directory.mkdir(parents=True)
    source = Source()
    change(source)
    source.write(directory)
    return directory


def contents(directory):
    """{path: bytes} of all files below."""
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file()}


def run_changed(code, *args, **options):
    """The exporter in a process of its own after these lines of Python: (exit status, standard
    error)."""
    lines = ("import os, resource, shutil, signal, sys\nsys.dont_write_bytecode = True\n"
             "import export_weights\n")
    done = subprocess.run([sys.executable, "-c", lines + code + "\nsys.exit(export_weights.main())",
                           *map(str, args)], env=dict(os.environ, PYTHONPATH=str(ROOT)),
                          stderr=subprocess.PIPE, timeout=PATIENCE, **options)
    return done.returncode, done.stderr.decode()


@test("a failed, stopped or killed export leaves nothing behind and an older file untouched")
def failed_export_leaves_nothing():
    source = small_source()
    for what, code, status, words in [
            ("Ctrl-C", "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGINT)", 130,
             ["stopped"]),
            ("Ctrl-C again while it clears up",
             "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGINT)\n"
             "unlink = os.unlink\n"
             "os.unlink = lambda path: (os.kill(os.getpid(), signal.SIGINT), unlink(path))",
             130, ["stopped"]),
            ("SIGTERM", "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGTERM)", 143,
             ["stopped"]),
            ("SIGHUP",   # which nohup ignores, and it runs tests too
             "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
             "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGHUP)", 129, ["stopped"]),
            *(("signal %d" % number,
               "signal.signal(%d, signal.SIG_DFL)\n"
               "os.fsync = lambda fd: os.kill(os.getpid(), %d)" % (number, number),
               128 + number, ["stopped"])
              for number in (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
                             signal.SIGALRM, signal.SIGVTALRM)),
            ("a limit that is sent as a signal",
             "signal.setitimer(signal.ITIMER_PROF, 0.01)\n"
             "os.fsync = lambda fd: [0 for _ in range(10 ** 9)]",
             128 + signal.SIGPROF, ["stopped"]),
            ("a file too large", "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))", 1,
             ["cannot write", "File too large", "model.bin", "ulimit -f", "nothing has changed"]),
            ("a full disk", "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)",
             1, ["cannot write", "found 1,", "bytes of room"]),
            ("a fault at the end",
             "def fault(fd): raise OSError(5, 'Input/output error')\nos.fsync = fault", 1,
             ["cannot write", "Input/output error", "disk"]),
            ("a source that cannot be read",
             "def fault(*args): raise OSError(5, 'Input/output error')\n"
             "export_weights.fp32_bits = fault", 1,
             ["cannot read", "model.safetensors", "another copy"]),
            ("a source that shrinks",
             "size = export_weights.check_tensors\n"
             "def shrink(config, tensors):\n"
             "    size(config, tensors)\n"
             "    os.truncate(tensors['embed_out.weight'].path, 100000)\n"
             "export_weights.check_tensors = shrink", 1, ["model.safetensors"])]:
        for older in (None, b"an older model"):
            top = tmpdir()
            if older:
                (top / "model.bin").write_bytes(older)
            kept = (source / "model.safetensors").read_bytes()
            code_now, err = run_changed(code, source, "-o", top / "model.bin")
            (source / "model.safetensors").write_bytes(kept)
            expect(code_now, status, "%s: %s" % (what, err))
            assert err.count("\n") == 1 and all(word in err for word in words), err
            expect({path.name: path.read_bytes() for path in top.iterdir()},
                   {"model.bin": older} if older else {}, what)


@test("a signal while the error is written is one all the same")
def stopped_at_the_error():
    code, err = run_changed("note = export_weights.note\n"
                            "def stopped(text):\n"
                            "    if text.startswith('error'):\n"
                            "        os.kill(os.getpid(), signal.SIGTERM)\n"
                            "    note(text)\n"
                            "export_weights.note = stopped", "no/such/directory")
    expect((code, err), (143, "export_weights.py: stopped\n"))


@test("a fault of the disk where a file is only looked at is said with its remedy, and not taken "
      "for a file that is not there")
def faults_of_looking():
    source, out = small_source(), tmpdir() / "model.bin"
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    expect(run_inside(source, "-o", out)[0], 0)
    want = out.read_bytes()
    for name in ("stat", "scandir", "listdir", "statvfs", "fstat", "fchmod"):
        real, calls, at = getattr(os, name), [], 0
        while len(calls) == at:
            at += 1
            calls.clear()

            def failing(*args, **options):
                if len(calls) < at:   # else the one that fails has been
                    calls.append(args)
                    if len(calls) == at:
                        raise OSError(errno.EIO, "Input/output error")
                return real(*args, **options)
            out.write_bytes(b"older")
            out.chmod(0o600)
            with mock.patch.object(os, name, failing):
                code, err = run_inside(source, "-o", out)
            expect((out.read_bytes(), stat.S_IMODE(out.stat().st_mode), os.listdir(out.parent)),
                   (b"older" if code else want, 0o600, ["model.bin"]), (name, at, err))
            assert err.count("\n") == 1 and (code == 0 or "; " in err), (name, at, err)
        assert at > 1, name


@test("a read of the disk that brings less than was asked for changes nothing")
def short_reads():
    class Short(io.FileIO):
        def readinto(self, data):
            return super().readinto(memoryview(data)[:-(-len(data) // 2)])

    opened = open

    def short(path, mode="r", buffering=-1, **options):
        if mode != "rb":
            return opened(path, mode, buffering, **options)
        return io.BufferedReader(Short(path)) if buffering else Short(path)
    want = exported()
    with mock.patch("builtins.open", short):
        expect(exported() == want, True)


@test("OUT: the default name, a link followed, an older file replaced, what cannot be "
      "written refused")
def where_out_goes():
    top = tmpdir()
    source = small_source(top, "some-model")
    (top / "link").symlink_to(source)
    (top / "work").mkdir()
    done = run_export(top / "link", cwd=top / "work")
    expect((done.code, os.listdir(top / "work")), (0, ["some-model.bin"]),
           "the directory's real name: " + done.err)
    made = (top / "work" / "some-model.bin").read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    expect(stat.S_IMODE((top / "work" / "some-model.bin").stat().st_mode), 0o666 & ~umask,
           "permissions")

    (top / "old").write_bytes(b"old")
    (top / "old link").symlink_to(top / "old")
    expect(run_inside(source, "--output=%s" % (top / "old link"))[0], 0)
    expect((top / "old").read_bytes(), made, "written through the link")
    assert (top / "old link").is_symlink()

    for out, word in ((top / "work", "a plain file"), ("/dev/null", "a plain file"),
                      ("", "a plain file"), ("%s/new/" % top, "a plain file"),
                      ("%s/new/." % top, "a plain file"), ("%s/old/" % top, "a plain file"),
                      (top / "none" / "x.bin", "expected a directory"),
                      (top / "old" / "x.bin", "a directory"),
                      (source / "model.safetensors", "source"), (source / "config.json", "source")):
        code, err = run_inside(source, "-o", out)
        expect((code, err.count("\n")), (1, 1), "%s: %s" % (out, err))
        assert word in err and "cannot write" in err, err
    expect(sorted(os.listdir(top)), ["link", "old", "old link", "some-model", "work"])
    expect(sorted(os.listdir(source)), ["config.json", "model.safetensors", "tokenizer.json"])


def cached(top):
    """The tiny model as huggingface_hub's cache has it: its snapshot's directory."""
    files, commit = small_source(top, "files"), "0123456789abcdef0123456789abcdef01234567"
    (files / "README.md").write_text("---\nlicense: mit\n---\n")
    folder = top / "models--some--model"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for number, path in enumerate(sorted(files.iterdir())):
        path.rename(folder / "blobs" / ("%040x" % number))
        (snapshot / path.name).symlink_to("../../blobs/%040x" % number)
    return snapshot


@test("OUT is no file of the source and none of the hub's cache, whatever the name or link it is "
      "given by")
def out_is_no_source():
    for in_cache in (True, False):
        top = tmpdir()
        source = cached(top) if in_cache else small_source(top)
        weights = source / "model.safetensors"
        (top / "link.bin").symlink_to(weights)
        (top / "link of a link.bin").symlink_to(top / "link.bin")
        (top / "tokenizer.bin").symlink_to(source / "tokenizer.json")
        os.link(weights.resolve(), top / "hard.bin")
        (top / "folder").symlink_to(source)
        outs = [weights, top / "link.bin", top / "link of a link.bin", top / "tokenizer.bin",
                top / "hard.bin", top / "folder" / "model.safetensors", source / "tokenizer.json",
                source / "config.json"]
        if in_cache:
            other = top / "models--other--model" / "blobs" / ("%040x" % 7)   # of another model
            other.parent.mkdir(parents=True)
            other.write_bytes(b"other")
            refs = top / "models--some--model" / "refs"
            (refs / "pr").mkdir(parents=True)
            (refs / "main").write_text(source.name)
            (top / "link of a ref.bin").symlink_to(refs / "main")
            outs += [source / "README.md", weights.resolve(), other, source / "new.bin",
                     refs / "main", refs / "pr" / "1", top / "link of a ref.bin"]
        before = contents(top)
        for out in outs:
            code, err = run_inside(source, "-o", out)
            assert (code == 1 and "cannot write" in err
                    and ("source" in err or "cache" in err)), (out, code, err)
            expect(err.count("\n"), 1, err)
            expect(contents(top), before, str(out))
    weights.unlink()   # a name that leads nowhere yet
    (top / "dangling.safetensors").symlink_to(top / "nowhere.bin")
    expect(run_inside(source, "-o", top / "dangling.safetensors")[0], 1)
    assert not (top / "nowhere.bin").exists()

    source = small_source()   # an older export in the source's own folder is no source
    for _ in range(2):
        expect(run_inside(source, "-o", source / "model.bin")[0], 0)
    (top / "open").mkdir()
    (top / "open" / "model.bin").write_bytes(b"not to be read")
    for path, mode in ((top, 0o755), (top / "open", 0o777), (top / "open" / "model.bin", 0)):
        path.chmod(mode)
    code, err = run_changed(unprivileged(), small_source(top, "another"), "-o",
                            top / "open" / "model.bin")
    expect((code, stat.S_IMODE((top / "open" / "model.bin").stat().st_mode)), (0, 0), err)


@test("a file keeps the rights that it had when it is replaced, and has them from the "
      "first byte on")
def rights_of_out():
    source = small_source()
    for mode in (0o600, 0o640, 0o444, 0o664):
        out = tmpdir() / "model.bin"
        out.write_bytes(b"older")
        out.chmod(mode)
        seen = []
        with mock.patch.object(
                export_weights, "write_sections",
                lambda file, *_: seen.append(os.fstat(file.fileno()).st_mode & 0o777)):
            expect(run_inside(source, "-o", out)[0], 0)
        expect((seen, out.stat().st_mode & 0o777, out.read_bytes()), ([mode], mode, b""), oct(mode))
        if os.geteuid() == 0:   # and its owner
            os.chown(out, 4321, 1234)
            expect(run_inside(source, "-o", out)[0], 0)
            expect((out.stat().st_uid, out.stat().st_gid, out.stat().st_mode & 0o777),
                   (4321, 1234, mode))
    out = tmpdir() / "model.bin"   # a group that cannot be kept: no other has its rights
    out.write_bytes(b"older")
    out.chmod(0o664)
    group = os.fstat
    with mock.patch.object(os, "fchown", side_effect=PermissionError), mock.patch.object(
            os, "fstat", lambda fd: os.stat_result([*group(fd)[:5], 99, *group(fd)[6:]])):
        expect(run_inside(source, "-o", out)[0], 0)
    expect(stat.S_IMODE(out.stat().st_mode), 0o604)


def unprivileged():
    """Lines of Python that give up root's rights, if we have them, and read before what may be
    closed to others."""
    return "import gettext, locale\nos.setgid(65534)\nos.setuid(65534)" if os.geteuid() == 0 else ""


@test("where OUT cannot be written is said with the remedy, and so is a source that "
      "may not be read")
def unwritable_out():
    top = tmpdir()
    top.chmod(0o755)
    source = small_source(top)
    for name, mode in (("closed", 0o555), ("open", 0o777), ("sticky", 0o1777), ("hidden", 0)):
        (top / name).mkdir()
        (top / name).chmod(mode)
    (top / "sticky" / "model.bin").write_bytes(b"root's")
    (top / "sticky").chmod(0o1777)
    before = contents(top)
    cases = [(top / "closed" / "model.bin", ["Permission denied", "right", "another -o"]),
             *((top / "hidden" / name, ["Permission denied", "right", "another -o"])
               for name in ("model.bin", "below/model.bin")),
             (top / "open" / ("m" * 250 + ".bin"), ["File name too long", "shorter", "another -o"])]
    if os.geteuid() == 0:
        cases.append((top / "sticky" / "model.bin", ["a file of yours", "another -o"]))
    for out, words in cases:   # before the source is looked at, which may be long in coming
        code, err = run_changed(unprivileged() + "\nexport_weights.resolve = None",
                                source, "-o", out)
        assert code == 1 and err.count("\n") == 1 and "cannot write" in err, err
        for word in words:
            assert word in err, "no %r in %r" % (word, err)
        expect(contents(top), before, err)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (source / name).chmod(0)
        code, err = run_changed(unprivileged(), source, "-o", top / "open" / "model.bin")
        (source / name).chmod(0o644)
        assert (code == 1 and err.count("\n") == 1 and "cannot read" in err and name in err
                and "right" in err), err


@test("a header that no model has is refused before it costs memory; the longest that kl3m "
      "can run is not")
def endless_header():
    layer = ([name for name in base()[2] if ".layers.0." in name]
             + ["gpt_neox.layers.0.attention." + name
                for name in ("bias", "masked_bias", "rotary_emb.inv_freq")])
    entry = {"dtype": "BF16", "shape": [65536, 262144], "data_offsets": [10 ** 12, 10 ** 12]}
    longest = {name.replace(".0.", ".%d." % number): entry for number in range(4096)
               for name in layer}
    assert len(json.dumps(longest)) < 16 << 20
    source = small_source()
    kept = {name: (source / name).read_bytes() for name in os.listdir(source)}
    # Twelve times as much as it needs.
    limit = "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))"
    for name, text in (("model.safetensors", b'{"a": [%s{}]}'),
                       ("tokenizer.json", b'{"a": [%s{}]}'), ("config.json", b'{"a": [%s{}]}'),
                       ("model.safetensors.index.json", b'{"a": [%s{}]}')):
        for size in (40 << 20, 120 << 20):
            data = text % (b"{}," * (size // 3))
            if name == "model.safetensors":
                data = struct.pack("<Q", len(data)) + data
            if name.endswith(".index.json"):
                (source / "model.safetensors").unlink()
            (source / name).write_bytes(data)
            code, err = run_changed(limit, source, "-o", source / "model.bin")
            assert code == 1 and err.count("\n") == 1 and name in err and "at most" in err, err
            for other, data in kept.items():
                (source / other).write_bytes(data)


@test("standard error that is closed, has no reader or is full loses no export, and what is full "
      "loses no line")
def broken_standard_error():
    source = small_source()
    want = exported()
    slow = ("numbers = iter(range(1000))\n"
            "export_weights.Progress.show = lambda *_: export_weights.note('x' * 8000 + "
            "str(next(numbers)))")
    for what, code in (("closed", "os.close(2); sys.stderr = None"), ("no reader", slow),
                       ("full disk", slow)):
        out = tmpdir() / "model.bin"
        ours, theirs = os.pipe()
        os.close(ours)
        if what == "full disk":
            os.close(theirs)
            theirs = os.open("/dev/full", os.O_WRONLY)
        lines = "import os, sys\nsys.dont_write_bytecode = True\nimport export_weights\n%s\n" \
                "sys.exit(export_weights.main())" % code
        done = subprocess.run([sys.executable, "-c", lines, source, "-o", out], stderr=theirs,
                              timeout=PATIENCE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        os.close(theirs)
        expect((done.returncode, out.read_bytes() == want), (0, True), what)

    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    out = tmpdir() / "model.bin"
    lines = "import sys\nsys.dont_write_bytecode = True\nimport export_weights\n%s\n" \
            "sys.exit(export_weights.main())" % slow
    child = subprocess.Popen([sys.executable, "-c", lines, source, "-o", out], stderr=theirs,
                             env=dict(os.environ, PYTHONPATH=str(ROOT)))
    os.close(theirs)
    time.sleep(0.5)   # it fills the pipe meanwhile
    with os.fdopen(ours, "rb") as file:
        said = file.read().decode().splitlines()
    expect((child.wait(30), out.read_bytes() == want), (0, True), "non-blocking")
    expect(said[:-1],
           ["export_weights.py: " + "x" * 8000 + str(number) for number in range(len(said) - 1)])
    assert len(said) > len(ModelFile(out).sections), said
    assert said[-1].startswith("export_weights.py: wrote "), said[-1]


@test("one closing line on standard error, a bar only on a terminal, nothing on standard output")
def progress_and_closing_line():
    source = small_source()
    out = tmpdir() / "model.bin"
    done = run_export(source, "-o", out)
    expect((done.code, done.out, done.err.count("\n")), (0, b"", 1), done.err)
    assert str(out) in done.err and "%.1f MB" % (out.stat().st_size / 1e6) in done.err, done.err
    expect(run_export(source, "-o", out, env={"LC_ALL": "C", "PYTHONUTF8": "0"}).code, 0)

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    child = subprocess.Popen([sys.executable, ROOT / "export_weights.py", source, "-o", out],
                             stderr=theirs, stdout=subprocess.DEVNULL)
    expect(child.wait(60), 0)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert "\r[" in shown and "MB/s" in shown and "config" in shown, shown
    expect({len(line) for line in shown.split("\r") if line.startswith(("[", " "))}, {119},
           "one column less than the terminal that it is drawn on")


@test("a wrong command line is status 2, --help is status 0 and names every option")
def command_line():
    for args in ((), ("a", "b"), ("a", "-o"), ("a", "--nonsense"), ("a", "--out", "b"),
                 ("a", "--dtype=bf16")):
        done = run_export(*args, cwd=tmpdir())
        expect(done.code, 2, str(args))
        assert "export_weights.py: error: " in done.err and "Traceback" not in done.err, done.err
    for word in ("-h", "--help"):
        done = run_export(word)
        expect((done.code, done.err), (0, ""))
        for name in ("SOURCE", "-o", "--output", "OUT", "--revision", "config.json",
                     "tokenizer.json", "model.safetensors"):
            assert name in done.text, done.text


# ---- About ------------------------------------------------------------------------------------

@test("the file names the tokens that texts start from and end with, where the tokenizer has them")
def start_and_ends():
    def renamed(*names):
        def change(source):
            source.config.update(bos_token_id=None, eos_token_id=None)
            for token in source.tokenizer["added_tokens"]:
                if token["content"] in names:
                    vocab = source.tokenizer["model"]["vocab"]
                    other = token["content"] + "x"
                    vocab[other] = vocab.pop(token["content"])
                    token["content"] = other
        return change
    for names, start, ends in (((), 0, [1]), (("<|start|>",), NONE, [1]), (("<|end|>",), 0, [])):
        top = tmpdir()
        code, err = run_inside(small_source(top, "model", renamed(*names)), "-o", top / "out.bin")
        expect(code, 0, err)
        found = ModelFile(top / "out.bin")
        expect((found.start, found.ends), (start, ends), names)


@test("config.json's and generation_config.json's ids of the start and the end come before the names; the latter file wins, null is absent, and no ids are refused")
def start_and_ends_by_id():
    def found(config_ids, generation=None):
        top = tmpdir()
        directory = small_source(top, "model", config(**config_ids))
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        code, err = run_inside(directory, "-o", top / "out.bin")
        if code:
            return err
        file = ModelFile(top / "out.bin")
        return file.start, file.ends
    expect(found({"bos_token_id": 5, "eos_token_id": [7, 9, 7]}), (5, [7, 9]))
    expect(found({"bos_token_id": None, "eos_token_id": None}), (0, [1]))
    expect(found({"bos_token_id": 5, "eos_token_id": 6}, {"eos_token_id": [2, 3]}), (5, [2, 3]))
    expect(found({"bos_token_id": 5, "eos_token_id": 6}, {"eos_token_id": None}), (5, [6]))
    expect(found({"bos_token_id": 5, "eos_token_id": 6}, {"bos_token_id": 8}), (8, [6]))
    for wrong in (-1, ROWS, 1.5, "1", True, [], list(range(9)), [1, "2"], {}):
        said = found({"eos_token_id": wrong})
        assert isinstance(said, str) and "config.json: eos_token_id" in said, (wrong, said)
        said = found({}, {"bos_token_id": wrong})
        assert isinstance(said, str) and "generation_config.json: bos_token_id" in said, said
    damaged = found({}, "no object")
    assert isinstance(damaged, str) and "generation_config.json" in damaged, damaged


@test("the file says where it comes from: name, source, revision, licence, attribution, citation")
def where_the_file_comes_from():
    def about(change=lambda source: None, name="model", readme=None):
        top = tmpdir()
        directory = small_source(top, name, change)
        if readme is not None:
            (directory / "README.md").write_bytes(readme)
        code, err = run_inside(directory, "-o", top / "out.bin")
        assert code == 0, err
        return ModelFile(top / "out.bin").about
    unknown = {key: "unknown" for key in ("revision", "license", "attribution", "citation")}
    exporter = "export_weights.py, format 2"
    expect(about(),
           dict(unknown, name="tiny-random", source="model (tiny-random)", exporter=exporter))
    expect(about(without("config", "_name_or_path")),
           dict(unknown, name="model", source="model", exporter=exporter))
    expect(about(config(_name_or_path=5)),
           dict(unknown, name="model", source="model", exporter=exporter))
    expect(about(config(_name_or_path="a\tb\n\x9bc\ud800")),
           dict(unknown, name="a b  c?", source="model (a b  c?)", exporter=exporter))

    for found in (about(config(_name_or_path="kl3m-002-170m")),
                  about(config(_name_or_path="alea-institute/kl3m-002-170m/")),
                  about(without("config", "_name_or_path"), "kl3m-002-170m")):
        expect((found["name"], found["license"]), ("kl3m-002-170m", "CC-BY 4.0"))
        assert "ALEA Institute" in found["attribution"] and "Bommarito" in found["citation"], found

    commit = "0123456789abcdef0123456789abcdef01234567"
    found = about(without("config", "_name_or_path"), "models--some--model/snapshots/" + commit)
    expect((found["name"], found["source"], found["revision"]), ("model", "some/model", commit))

    for readme, license in ((b"---\nlanguage: en\nlicense: mit\ntags:\n- x\n---\n# Card\n", "mit"),
                            (b"---\r\nlicense: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
                            (b"# Card\nlicense: mit\n", "unknown"),
                            (b"---\nlicense:\n---\nlicense: mit\n", "unknown"),
                            (b"", "unknown"), (b"---\nlicense: \xff\n", "unknown")):
        expect(about(readme=readme)["license"], license, str(readme))
