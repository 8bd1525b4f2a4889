"""GPT-NeoX's forward pass the plain way, in double precision, from the Hugging Face directory.

It shares nothing with the program: not the model file, not the exporter, not a kernel. What it
computes is small and slow, and is meant to be read beside the paper's formulas.
"""
import json
import math
import struct
from operator import mul
from pathlib import Path


def numbers(dtype, data):
    if dtype == "F32":
        return struct.unpack("<%df" % (len(data) // 4), data)
    if dtype == "F16":
        return struct.unpack("<%de" % (len(data) // 2), data)
    if dtype == "BF16":  # the upper half of an F32
        halves = struct.unpack("<%dH" % (len(data) // 2), data)
        return struct.unpack("<%df" % len(halves),
                             struct.pack("<%dI" % len(halves), *(h << 16 for h in halves)))
    raise ValueError("dtype " + dtype)


def read_tensors(directory):
    """{name: vector, or list of rows}"""
    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                flat = numbers(entry["dtype"], data[start + begin:start + end])
                width = entry["shape"][-1]
                rows = [flat[i:i + width] for i in range(0, len(flat), width)]
                tensors[name] = rows if len(entry["shape"]) == 2 else flat
    return tensors


def dot(a, b):
    return sum(map(mul, a, b))


def add(*vectors):
    return [sum(parts) for parts in zip(*vectors)]


class Naive:
    def __init__(self, directory):
        config = json.loads((Path(directory) / "config.json").read_text())
        rope = config.get("rope_parameters", {})
        self.tensors = read_tensors(directory)
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.size = config["hidden_size"] // self.heads
        self.rotary = int(self.size * config.get("rotary_pct", rope.get("partial_rotary_factor")))
        self.base = config.get("rotary_emb_base", rope.get("rope_theta"))
        self.eps = config["layer_norm_eps"]
        self.parallel = config["use_parallel_residual"]

    def linear(self, name, x):
        return add([dot(row, x) for row in self.tensors[name + ".weight"]],
                   self.tensors[name + ".bias"])

    def norm(self, name, x):
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / len(x)
        scale = 1 / math.sqrt(variance + self.eps)
        weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        return [(v - mean) * scale * w + b for v, w, b in zip(x, weight, bias)]

    def turn(self, head, position):
        """Rotary embedding: number i and number i + rotary/2 are turned as a pair."""
        half, out = self.rotary // 2, list(head)
        for i in range(half):
            angle = position * self.base ** (-2 * i / self.rotary)
            c, s = math.cos(angle), math.sin(angle)
            a, b = head[i], head[i + half]
            out[i], out[i + half] = a * c - b * s, b * c + a * s
        return out

    def split(self, row, position):
        """A row of query_key_value's output -> the heads of Q, of K and of V."""
        blocks = [row[i:i + self.size] for i in range(0, len(row), self.size)]
        if len(blocks) == 3 * self.heads:  # multi-head: q, k, v of the first head, then of the next
            q, k, v = blocks[0::3], blocks[1::3], blocks[2::3]
        else:                              # grouped: all of Q, all of K, all of V
            n_kv = (len(blocks) - self.heads) // 2
            q, k, v = blocks[:self.heads], blocks[self.heads:-n_kv], blocks[-n_kv:]
        return [self.turn(h, position) for h in q], [self.turn(h, position) for h in k], v

    def attention(self, name, rows):
        """Each row looks at itself and the rows before it."""
        split = [self.split(self.linear(name + ".query_key_value", row), position)
                 for position, row in enumerate(rows)]
        out = []
        for position, (q, _, _) in enumerate(split):
            joined = []
            for h in range(self.heads):
                g = h * len(split[0][1]) // self.heads
                scores = [dot(q[h], k[g]) / math.sqrt(self.size)
                          for _, k, _ in split[:position + 1]]
                most = max(scores)
                shares = [math.exp(s - most) for s in scores]
                total = sum(shares)
                values = zip(*(v[g] for _, _, v in split[:position + 1]))
                joined += [dot(shares, column) / total for column in values]
            out.append(self.linear(name + ".dense", joined))
        return out

    def mlp(self, name, x):
        inner = self.linear(name + ".dense_h_to_4h", x)
        return self.linear(name + ".dense_4h_to_h",
                           [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner])

    def logits(self, tokens):
        """A list of vocabulary numbers for each token."""
        rows = [self.tensors["gpt_neox.embed_in.weight"][t] for t in tokens]
        for n in range(self.layers):
            layer = "gpt_neox.layers.%d." % n
            looked = self.attention(layer + "attention",
                                    [self.norm(layer + "input_layernorm", x) for x in rows])
            middle = [add(x, y) for x, y in zip(rows, looked)]
            # Parallel residual: the MLP reads the same x as attention, not attention's sum.
            read = rows if self.parallel else middle
            rows = [add(m,
                        self.mlp(layer + "mlp", self.norm(layer + "post_attention_layernorm", x)))
                    for m, x in zip(middle, read)]
        rows = [self.norm("gpt_neox.final_layer_norm", x) for x in rows]
        return [[dot(w, x) for w in self.tensors["embed_out.weight"]] for x in rows]
