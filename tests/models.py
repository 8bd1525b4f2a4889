"""Small random models in Hugging Face layout, with a tokenizer of the real one's make.

The random numbers are plain uniform ones from Python's generator, whose bits are the same on
every machine and version, so that references made elsewhere belong to the same weights.
"""
import collections
import functools
import json
import math
import random
import re
import shutil
import struct
import sys
from array import array
from pathlib import Path

# The text that the merges are learnt from. Tests take their prompts from it too.
LEGAL_TEXT = """\
Section 1. Governing Law.
This Agreement shall be governed by and construed in accordance with the laws of the State of
Delaware, without regard to its conflict of laws principles. The parties agree that any dispute
arising under this Agreement shall be brought in the courts of the State of New York, and each
party hereby submits to the jurisdiction of those courts.
(a) Confidential Information. "Confidential Information" means all information, in any form,
that is disclosed by one party to the other party under this Agreement. The receiving party
shall not disclose the Confidential Information to any third party, and shall use it only for
the purposes of this Agreement, except as required by law or by order of a court.
(b) Termination. Either party may terminate this Agreement upon thirty (30) days' written notice
to the other party. Sections 4, 7 and 12 shall survive the termination of this Agreement.
(c) Notices. All notices required or permitted under this Agreement shall be in writing and shall
be delivered to the address of the receiving party that is set forth in § 9.2 – Notices.
Under this proposed rule, the Federal agency must determine the effect on State, local, and
Tribal governments. Medical devices are regulated by the Food and Drug Administration under 21
CFR Part 820, as amended on January 1, 1998 and on December 31, 2023. The term “covered product”
doesn't include any product that's exempt; we're proposing to amend it, and they'll be notified
if the Secretary has determined that it isn't exempt. Section 5. Limitation of Liability.
IN NO EVENT SHALL EITHER PARTY BE LIABLE FOR ANY INDIRECT OR CONSEQUENTIAL DAMAGES, INCLUDING
WITHOUT LIMITATION LOSS OF PROFITS, EVEN IF THE PARTY HAS BEEN ADVISED OF SUCH DAMAGES.
The borrower shall pay to the lender the principal amount of $1,250,000.00, together with
interest on the unpaid balance at the rate of 4.75% per annum, on the first day of each month.
If the tenant fails to pay the rent within ten (10) days after it is due, the landlord may
terminate the lease. Née Company, S.A., a société anonyme, is a party to the lease.
"""

SPECIAL = ["<|start|>", "<|end|>", "<|pad|>", "<|unk|>", "<|sep|>", "<|cls|>", "<|mask|>"]

# As in the real tokenizer these are found before the BPE sees the text. The first ones matter
# most: a small vocabulary has room for those alone.
ADDED = ([" ", "\n", "  ", "\n\n", "(a)", "2023", "</p>", " href=", "    ", "1998"]
         + [" " * n for n in [*range(3, 4), *range(5, 21)]] + ["\n" * n for n in range(3, 13)]
         + ["\t" * n for n in range(2, 6)] + ["\r" * n for n in range(2, 5)]
         + [str(year) for year in [1776, 1781, *range(1990, 1998), *range(1999, 2023)]]
         + ["(b)", "(c)", "(d)", "(1)", "(2)", "(i)", "(ii)", "<p>", "<p", "<div", "</div>", "<a",
            " class=", '"}', '":"', "https://", "http://", "```", "===", "**", "<?xml"])

# ---- Tokenizer --------------------------------------------------------------------------------

# GPT-2's pattern, with the letters and digits that LEGAL_TEXT has.
PATTERN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """GPT-2's character for each byte: itself where it prints, else one from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printing}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printing))
    return table


@functools.lru_cache(maxsize=None)
def learn_merges(limit=420):
    """Byte-pair merges of LEGAL_TEXT, the most frequent pair first."""
    alphabet = byte_alphabet()
    words = collections.Counter()
    for word in PATTERN.findall(LEGAL_TEXT):
        for form in {word, word.strip() or word}:
            words[tuple(alphabet[b] for b in form.encode())] += 1
    merges = []
    while len(merges) < limit:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined = collections.Counter()
        for word, n in words.items():
            parts = []
            for part in word:
                if parts and (parts[-1], part) == best:
                    parts[-1] += part
                else:
                    parts.append(part)
            joined[tuple(parts)] += n
        words = joined
    return merges


def small_tokenizer(size=512):
    """tokenizer.json with `size` tokens (at least 263), as a dict."""
    spare = size - len(SPECIAL) - 256
    added = ADDED[:spare // 3]
    alphabet = byte_alphabet()
    tokens = SPECIAL + sorted(alphabet.values())
    merges, texts = [], []
    for left, right in learn_merges():
        if left + right not in texts:
            if len(texts) == spare - len(added):
                break
            texts.append(left + right)
        merges.append((left, right))
    random.Random(1).shuffle(texts)  # the real vocabulary is not in the order of the merges either
    tokens += texts

    def added_token(i, content, special):
        return {"id": i, "content": content, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": not special, "special": special}

    def byte_level(prefix, offsets):
        return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": offsets,
                "use_regex": True}

    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(i, s, True) for i, s in enumerate(SPECIAL)]
                        + [added_token(len(tokens) + i, s, False) for i, s in enumerate(added)],
        "normalizer": None,
        "pre_tokenizer": byte_level(False, True),
        "post_processor": byte_level(True, False),
        "decoder": byte_level(True, True),
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False,
                  "vocab": {s: i for i, s in enumerate(tokens)},
                  "merges": ["%s %s" % pair for pair in merges]},
    }


# ---- Config and weights -----------------------------------------------------------------------

# The shapes of kl3m-002-170m, for where its own config is not at hand.
REAL_SHAPES = {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
               "intermediate_size": 1024, "vocab_size": 32768, "max_position_embeddings": 4096,
               "rotary_pct": 0.25, "num_key_value_heads": 8}


def make_config(**overrides):
    """The real config.json's fields at a tiny size. num_key_value_heads is not to be believed
    there either: the tensor's shape says how many there are. rotary_pct differs, since a quarter
    of a head of 12 would be an odd number, which is refused."""
    config = {
        "_name_or_path": "tiny-random", "architectures": ["GPTNeoXForCausalLM"],
        "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 1, "hidden_act": "gelu", "hidden_dropout": 0.0, "hidden_size": 48,
        "initializer_range": 0.02, "intermediate_size": 80, "layer_norm_eps": 1e-5,
        "max_position_embeddings": 128, "model_type": "gpt_neox", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 2,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000,
        "rotary_emb_base": 10000, "rotary_pct": 0.5, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.38.0.dev0", "use_cache": False,
        "use_parallel_residual": True, "vocab_size": 520,
    }
    config.update(overrides)
    if "rope_theta" not in overrides:
        config["rope_theta"] = config["rotary_emb_base"]
    return config


def plain_uniform(seed):
    """uniform(count, low, width): an array of so many numbers from low on."""
    draw = random.Random(seed).random
    return lambda count, low, width: array("f", (low + width * draw() for _ in range(count)))


def make_weights(config, n_kv=None, seed=0, uniform=None):
    """{name: (shape, array of floats)}. With n_kv below the number of heads the query_key_value
    rows are all of Q, all of K, all of V; with as many, or None, they are interleaved by head.
    uniform: other numbers than plain_uniform's, where there are too many of those to wait for."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    n_kv = heads if n_kv is None else n_kv
    uniform = uniform or plain_uniform(seed)
    weights = {}

    def add(name, shape, spread, middle=0.0):
        """Uniform numbers with this standard deviation."""
        width = spread * math.sqrt(12)
        weights[name] = (shape, uniform(math.prod(shape), middle - width / 2, width))

    def linear(name, rows, columns, gain=1.0):
        add(name + ".weight", [rows, columns], gain / math.sqrt(columns))
        add(name + ".bias", [rows], 0.2)

    def norm(name):
        add(name + ".weight", [hidden], 0.2, 1.0)
        add(name + ".bias", [hidden], 0.1)

    add("gpt_neox.embed_in.weight", [config["vocab_size"], hidden], 0.1)
    for n in range(config["num_hidden_layers"]):
        layer = "gpt_neox.layers.%d." % n
        norm(layer + "input_layernorm")
        norm(layer + "post_attention_layernorm")
        linear(layer + "attention.query_key_value", hidden + 2 * n_kv * (hidden // heads),
               hidden, 1.5)
        linear(layer + "attention.dense", hidden, hidden)
        linear(layer + "mlp.dense_h_to_4h", config["intermediate_size"], hidden)
        linear(layer + "mlp.dense_4h_to_h", hidden, config["intermediate_size"])
    norm("gpt_neox.final_layer_norm")
    # Norms leave about one per element, so this gives logits of a standard deviation of 3.5.
    add("embed_out.weight", [config["vocab_size"], hidden], 3.5 / math.sqrt(hidden))
    return weights


def repeat_kv(config, weights, n_kv):
    """The multi-head twin of grouped-query weights: each K and V head once for each query head
    that it serves, in the interleaved layout."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = hidden // heads
    twin = dict(weights)
    for name, (shape, values) in weights.items():
        if ".query_key_value." in name:
            step = size * math.prod(shape[1:])  # the numbers of one head
            blocks = [values[i:i + step] for i in range(0, len(values), step)]
            out = array("f")
            for head in range(heads):
                group = head * n_kv // heads
                for block in (head, heads + group, heads + n_kv + group):
                    out += blocks[block]
            twin[name] = ([3 * hidden, *shape[1:]], out)
    return twin


def multi_head(source):
    """(config, weights) of a directory's model as transformers knows it: if it is grouped-query,
    its multi-head twin."""
    from naive import read_tensors
    config = json.loads((Path(source) / "config.json").read_text())
    weights = {}
    for name, rows in read_tensors(source).items():
        matrix = isinstance(rows, list)
        flat = array("f", (x for row in rows for x in row) if matrix else rows)
        weights[name] = ([len(rows), len(rows[0])] if matrix else [len(rows)], flat)
    heads, size = config["num_attention_heads"], config["hidden_size"]
    height = weights["gpt_neox.layers.0.attention.query_key_value.weight"][0][0]
    n_kv = (height * heads // size - heads) // 2
    if n_kv < heads:
        weights = repeat_kv(config, weights, n_kv)
    return dict(config, torch_dtype="float32"), weights


# ---- Files ------------------------------------------------------------------------------------

def to_bytes(values, dtype):
    """Floats as a safetensors file holds them, rounded to nearest."""
    assert sys.byteorder == "little", "the tests write little-endian files as the memory has them"
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return struct.pack("<%de" % len(values), *values)
    if dtype == "BF16":
        bits = memoryview(values.tobytes()).cast("I")
        return array("H", [(b + 0x7fff + (b >> 16 & 1)) >> 16 for b in bits]).tobytes()
    raise ValueError(dtype)


def write_safetensors(path, tensors):
    """tensors: {name: (dtype, shape, bytes)}"""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape, data in tensors.values():
            file.write(data)


def save_model(directory, config, weights, dtype="F32", shards=1, tokenizer=None):
    """Writes the directory. tokenizer: a dict, the path of a tokenizer.json, or None for the
    small one (which leaves a few rows of the vocabulary without a token)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer is None:
        tokenizer = small_tokenizer(max(263, config["vocab_size"] - 8))
    if isinstance(tokenizer, dict):
        text = json.dumps(tokenizer, ensure_ascii=False, indent=2)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(tokenizer, directory / "tokenizer.json")

    tensors = {name: (dtype, shape, to_bytes(values, dtype))
               for name, (shape, values) in weights.items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    names, where = list(tensors), {}
    for shard in range(shards):
        part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        file = "model-%05d-of-%05d.safetensors" % (shard + 1, shards)
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        where.update(dict.fromkeys(part, file))
    size = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_model(directory, seed=0, dtype="F32", shards=1, tokenizer=None, n_kv=None,
                **config_overrides):
    """A random model in this directory; returns its config."""
    config = make_config(**config_overrides)
    save_model(directory, config, make_weights(config, n_kv, seed), dtype, shards, tokenizer)
    return config
