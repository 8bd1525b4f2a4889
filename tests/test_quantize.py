"""Weights of other types: what --quantize writes, and one arithmetic within each type."""
import math
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import time
import zlib
from array import array

from harness import (KL3M, expect, export, once, quantized_model, run_kl3m, small_directory,
                     small_model, test, tiny_model, tmpdir)
from test_cli import File
from models import make_config, make_weights, save_model
from naive import Naive
from test_forward import (KINDS, LONG, LONG_TEXT, TEXT, check_close, generate_one, logits, rows,
                          tokens)

TYPES = {"bf16": 2, "q8": 3}
GROUP = 64


def quantized(kind, source, *args):
    """The model that --quantize writes, and what it says."""
    out = tmpdir() / (kind + ".bin")
    done = run_kl3m("-m", source, "--quantize", kind, "-o", out, *args)
    expect((done.code, done.err), (0, ""))
    return out, done.text


def sections(path):
    """{name: (type, rows, columns, layout, bytes)}, checksums checked."""
    data, found = path.read_bytes(), {}
    count = struct.unpack_from("<I", data, 12)[0]
    for at in range(64, 64 + 96 * count, 96):
        name = data[at:at + 56].split(b"\0")[0].decode()
        kind, crc, offset, size, height, width, layout = struct.unpack_from("<IIQQIII", data,
                                                                            at + 56)
        expect(zlib.crc32(data[offset:offset + size]), crc, name)
        found[name] = kind, height, width, layout, data[offset:offset + size]
    return found


def is_matrix(name):
    return name.endswith(".weight") and "norm" not in name


def nearest_bf16(bits):
    """The upper half of a float's bits, rounded to nearest, ties to even, in integers."""
    low, high = bits & 0xFFFF, bits >> 16
    return high + (low > 0x8000 or (low == 0x8000 and high & 1))


@test("--quantize bf16 rounds each matrix to nearest even where it lies, and copies all else")
def bf16_file():
    for options in ({}, {"n_kv": 2}, dict(LONG)):
        source = small_model(**options)
        made, said = quantized("bf16", source)
        assert said.startswith(str(made) + ": the model with bf16 weights, "), said
        assert "same bits" not in said
        before, after = sections(source), sections(made)
        expect(list(after), list(before))
        for name, (kind, height, width, layout, data) in before.items():
            if not is_matrix(name):
                expect(after[name], before[name], name)
                continue
            want = array("H", map(nearest_bf16, array("I", data))).tobytes()
            expect(after[name], (2, height, width, layout, want), name)
        assert ", bf16 weights," in run_kl3m("-m", made, "--info").text
        expect(run_kl3m("-m", made, "--verify").code, 0)


@test("a bf16 file computes what the f32 file of the rounded weights does, bit for bit; where the weights were such numbers it says so")
def bf16_bits():
    for options in ({}, {"n_kv": 2, "use_parallel_residual": False}, dict(LONG)):
        rounded = small_model(dtype="BF16", **options)
        made, said = quantized("bf16", rounded)
        assert said.endswith(
            "; each weight was such a number, so it computes the same bits\n"), said
        text = LONG_TEXT[:150]
        expect(logits(made, text), logits(rounded, text), options)
        args = ["-s", 3, "-n", 40, "-t", 0.8, "--json", "-r", 2, "--no-escape"]
        for prompt in (text.encode().replace(b"\n", b" "), b""):
            expect(run_kl3m("-m", made, *args, input=prompt + b"\n").out,
                   run_kl3m("-m", rounded, *args, input=prompt + b"\n").out)
        score = ["--score", "--json", "--logprobs", 1, "--no-escape"]
        expect(run_kl3m("-m", made, *score, "-p", text).out,
               run_kl3m("-m", rounded, *score, "-p", text).out)
    made, said = quantized("bf16", tiny_model())
    assert "same bits" in said, said
    args = ["-p", "Governing Law.\\n", "-n", 60, "-s", 1]
    expect(run_kl3m("-m", made, *args).out, run_kl3m("-m", tiny_model(), *args).out)


def widened(half):
    return struct.unpack("<f", struct.pack("<I", half << 16))[0]


def unpacked(name, height, width, data):
    """A q8 matrix: rows of (bytes of the inputs, scales of the groups), by the format's words."""
    groups = -(-width // GROUP)
    if name == "embed_in.weight":
        size = groups * (GROUP + 2)
        expect(len(data), height * size, name)
        for row in range(height):
            line = data[row * size:(row + 1) * size]
            parts = [line[g * (GROUP + 2):(g + 1) * (GROUP + 2)] for g in range(groups)]
            yield (b"".join(part[:GROUP] for part in parts),
                   [struct.unpack("<H", part[GROUP:])[0] for part in parts])
        return
    pair_size, group_size = groups * 32 * (GROUP + 2), 32 * (GROUP + 2)
    expect(len(data), -(-height // 32) * pair_size, name)
    for row in range(-(-height // 32) * 32):
        at, j = row // 32 * pair_size, row % 32
        found, scales = bytearray(), []
        for g in range(groups):
            group = data[at + g * group_size:at + (g + 1) * group_size]
            for i in range(0, GROUP, 4):
                first, third, second, fourth = group[i * 32 + j * 4:i * 32 + j * 4 + 4]
                found += bytes([first, second, third, fourth])
            scales.append(struct.unpack_from("<H", group, 32 * GROUP + 2 * j)[0])
        yield bytes(found), scales


def f32_rows(name, height, width, data):
    """The same matrix's numbers in an f32 file, row by row, the padding too."""
    numbers = array("f", data)
    if name == "embed_in.weight":
        for row in range(height):
            yield list(numbers[row * width:(row + 1) * width])
        return
    for row in range(-(-height // 32) * 32):
        yield [numbers[(row // 16 * width + i) * 16 + row % 16] for i in range(width)]


def dequantized(path):
    """{name: rows of numbers} of the matrices of a q8 file."""
    found = {}
    for name, (kind, height, width, _, data) in sections(path).items():
        if is_matrix(name):
            expect(kind, 3, name)
            found[name] = [[(row[i] - 128) * widened(scales[i // GROUP]) for i in range(width)]
                           for row, scales in unpacked(name, height, width, data)][:height]
    return found


@test("--quantize q8 has each group's least scale in bf16, each weight the nearest step, zeros where there is nothing, and copies all else")
def q8_file():
    for options in ({}, {"n_kv": 1, "hidden_size": 160, "num_attention_heads": 2,
                         "intermediate_size": 300, "num_hidden_layers": 1}, dict(LONG)):
        source = small_model(**options)
        made, said = quantized("q8", source)
        assert said.startswith(str(made) + ": the model with q8 weights, "), said
        before, after = sections(source), sections(made)
        expect(list(after), list(before))
        for name, (_, height, width, layout, data) in before.items():
            if not is_matrix(name):
                expect(after[name], before[name], name)
                continue
            expect(after[name][:4], (3, height, width, layout), name)
            pairs = zip(unpacked(name, height, width, after[name][4]),
                        f32_rows(name, height, width, data))
            for (bytes_of, scales), numbers in pairs:
                for g, half in enumerate(scales):
                    group = numbers[g * GROUP:(g + 1) * GROUP]
                    scale, most = widened(half), max(map(abs, group))
                    assert scale * 127 >= most * (1 - 1e-6), name
                    assert half == 0 or widened(half - 1) * 127 < most * (1 + 1e-6), name
                    line = bytes_of[g * GROUP:(g + 1) * GROUP]
                    expect(set(line[len(group):]) <= {128}, True, name + ": padding")
                    for byte, x in zip(line, group):
                        assert 1 <= byte <= 255, name
                        assert abs((byte - 128) * scale - x) <= scale * 0.5001, (name, byte, x)
        assert ", q8 weights," in run_kl3m("-m", made, "--info").text
        expect(run_kl3m("-m", made, "--verify").code, 0)


@test("--quantize q8 takes outliers out of the norms: channels made 64 times as large, their columns as much smaller, give the same file")
def equalized():
    config = make_config()
    plain, loud = make_weights(config), make_weights(config)
    hidden = config["hidden_size"]
    pairs = [("gpt_neox.final_layer_norm", "embed_out.weight")]
    for n in range(config["num_hidden_layers"]):
        layer = "gpt_neox.layers.%d." % n
        pairs += [(layer + "input_layernorm", layer + "attention.query_key_value.weight"),
                  (layer + "post_attention_layernorm", layer + "mlp.dense_h_to_4h.weight")]
    changed = 0
    for norm, reader in pairs:
        size = [math.hypot(loud[norm + ".weight"][1][i], loud[norm + ".bias"][1][i])
                for i in range(hidden)]
        median = sorted(size)[hidden // 2]
        for i in range(0, hidden, 7):
            if not 0.8 < size[i] / median < 1.25:
                continue       # the nearest power would be another than 64
            changed += 1
            for part in (".weight", ".bias"):
                loud[norm + part][1][i] *= 64
            for at in range(i, len(loud[reader][1]), hidden):
                loud[reader][1][at] /= 64
    assert changed > 10, changed
    files = []
    for weights in (plain, loud):
        folder = tmpdir()
        save_model(folder, config, weights)
        files.append(sections(quantized("q8", export(folder))[0]))
    for name in files[0]:
        if name != "about":    # it names the folder
            expect(files[1][name], files[0][name], name)


class HalfCache(Naive):
    """Keys and values are kept in bf16."""

    def split(self, row, position):
        def half(x):
            bits, = struct.unpack("<I", struct.pack("<f", x))
            return widened(nearest_bf16(bits))
        q, k, v = super().split(row, position)
        return q, [list(map(half, head)) for head in k], [list(map(half, head)) for head in v]


@test("a q8 file computes the network of its own weights, keys and values in bf16: within 0.05 of a double-precision pass with them")
def q8_network():
    for options in ({}, {"n_kv": 2}, {"use_parallel_residual": False}):
        made, _ = quantized("q8", small_model(**options))
        naive, text = HalfCache(small_directory(**options)), TEXT[:90]
        ids = tokens(made, text)
        for name, rows_of in dequantized(made).items():
            theirs = name if name == "embed_out.weight" else "gpt_neox." + name
            if "query_key_value" in name and "n_kv" not in options:
                # In the file all of Q, all of K, all of V; in the source head by head.
                size, heads = naive.size, naive.heads
                rows_of = [row for head in range(heads) for part in range(3)
                           for row in rows_of[(part * heads + head) * size:][:size]]
            expect(len(rows_of), len(naive.tensors[theirs]), name)
            naive.tensors[theirs] = rows_of
        want, got = naive.logits(ids), rows(logits(made, text), len(ids))
        check_close(got, want, 0.05, str(options))


@test("within each type the bytes are the same on every kind of CPU, for any threads, rows, batch and guesses")
def one_arithmetic():
    for kind in TYPES:
        for options in (LONG, {"hidden_size": 160, "num_attention_heads": 2, "n_kv": 1,
                               "intermediate_size": 300, "num_hidden_layers": 1}):
            model = quantized_model(kind, **options)
            text = LONG_TEXT[:260] if "max_position_embeddings" in options else TEXT[:100]
            want = logits(model, text)
            for isa in KINDS:
                if generate_one(isa).code == 0:
                    expect(logits(model, text, env={"KL3M_ISA": isa}), want, (kind, isa))
            for more in (["-j", 1], ["-j", 5], ["--rows", 1], ["--rows", 7], ["--rows", 13],
                         ["--rows", 100]):
                expect(logits(model, text, *more), want, (kind, more))
        model = quantized_model(kind, **LONG)
        prompts = "".join(TEXT[i * 20:i * 20 + 60].replace("\n", " ") + "\n"
                          for i in range(30)).encode()
        args = ["-m", model, "-s", 5, "-n", 20, "-t", 0.7]
        want = run_kl3m(*args, input=prompts).out
        for more in (["-b", 1], ["-b", 30, "-j", 3], ["--no-speculation"], ["--rows", 9]):
            expect(run_kl3m(*args, *more, input=prompts).out, want, (kind, more))
        odd = quantized_model(kind)    # of which no row ends a block of 32 columns
        for fill in ("85", "129", "1"):    # what the C library puts into memory that is asked for
            expect(logits(odd, TEXT[:60], env={"MALLOC_PERTURB_": fill}), logits(odd, TEXT[:60]),
                   (kind, fill))


@test("a file that is quantized already is refused by its type, and so are weights that are not finite in the new one")
def refused():
    made = quantized_model("bf16")
    for kind in TYPES:
        done = run_kl3m("-m", made, "--quantize", kind, "-o", tmpdir() / "again.bin")
        expect((done.code, done.out), (1, b""))
        assert "bf16 weights; quantize the f32 file" in done.err, done.err
        for bits in (0x7F800000, 0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF7FFFFF):
            if kind == "q8" and bits == 0xFF7FFFFF:
                continue
            data = bytearray(small_model().read_bytes())
            at = section_offset(data, "layers.1.mlp.dense_4h_to_h.weight")
            struct.pack_into("<I", data, at + 400, bits)
            spoilt, out = tmpdir() / "spoilt.bin", tmpdir() / "out.bin"
            spoilt.write_bytes(data)
            done = run_kl3m("-m", spoilt, "--quantize", kind, "-o", out)
            expect((done.code, done.out, out.exists(), list(out.parent.iterdir())),
                   (1, b"", False, []))
            assert "layers.1.mlp.dense_4h_to_h.weight" in done.err and "finite" in done.err
        for name in ("final_layer_norm.weight", "layers.0.input_layernorm.bias",
                     "layers.1.mlp.dense_h_to_4h.bias"):
            data = bytearray(small_model().read_bytes())
            struct.pack_into("<I", data, section_offset(data, name) + 8, 0x7FC00000)
            spoilt.write_bytes(data)
            done = run_kl3m("-m", spoilt, "--quantize", kind, "-o", out)
            expect((done.code, done.out, out.exists()), (1, b"", False), name)
            assert name in done.err and "finite" in done.err, done.err


@test("--quantize runs from a terminal, and says what it wrote on standard error where the model itself goes to standard output")
def from_a_terminal():
    master, slave = pty.openpty()
    out = tmpdir() / "out.bin"
    done = subprocess.run([KL3M, "-m", str(small_model()), "--quantize", "q8", "-o", str(out)],
                          stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(slave)
    os.close(master)
    expect((done.returncode, done.stderr), (0, b""))
    piped = subprocess.run("'%s' -m '%s' --quantize q8 -o /dev/stdout | cat"
                           % (KL3M, small_model()), shell=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    expect(piped.stdout, out.read_bytes())
    assert b"the model with q8 weights" in piped.stderr


@test("sections that no tensor of the model is are copied, whatever they say of themselves")
def odd_sections():
    learnt = tmpdir() / "learnt.bin"
    run_kl3m("-m", small_model(), "--learn", "-o", learnt, "--tokens", 20, "-n", 10, "-s", 1)
    whole = bytearray(learnt.read_bytes())
    entry = next(at for at in range(64, 64 + 96 * 60, 96) if whole[at:at + 7] == b"guesses")
    for kind, height, width, layout in ((99, 1, 1, 1), (2 ** 31 - 1, 4, 4, 1), (1, 4096, 4096, 1),
                                        (1, 1, 1, 1), (3, 100, 100, 0), (2 ** 32 - 1, 0, 0, 1)):
        for name in (b"extra", b"layers.0.input_layernorm.gamma"):
            for type_of in TYPES:
                file = File()
                file.data, file.count = bytearray(whole), len(sections(learnt))
                file.data[entry:entry + 56] = name + bytes(56 - len(name))
                struct.pack_into("<I", file.data, entry + 56, kind)
                struct.pack_into("<III", file.data, entry + 80, height, width, layout)
                path, out = tmpdir() / "odd.bin", tmpdir() / "out.bin"
                path.write_bytes(file.sign().data)
                done = run_kl3m("-m", path, "--quantize", type_of, "-o", out)
                if kind == 1 and done.code == 1:   # numbers that are not finite
                    assert name.decode() + " has weights that are not finite" in done.err, done.err
                    continue
                expect(done.code, 0, (kind, name, done.err))
                expect(sections(out)[name.decode()], sections(path)[name.decode()])


def section_offset(data, wanted):
    for at in range(64, 64 + 96 * struct.unpack_from("<I", data, 12)[0], 96):
        if data[at:at + 56].split(b"\0")[0].decode() == wanted:
            return struct.unpack_from("<Q", data, at + 64)[0]
    raise AssertionError(wanted)


@test("--quantize wants -o and takes no prompt; what it writes may be the model itself, and --learn goes on from it")
def command_line():
    for args, named in (([], "--out"), (["-o", "x", "-p", "a"], "--prompt"),
                        (["-o", "x", "--json"], "--json"), (["-o", "x", "--learn"], "--learn")):
        done = run_kl3m("-m", small_model(), "--quantize", "bf16", *args)
        assert done.code == 2 and named in done.err, done.err
    done = run_kl3m("-m", small_model(), "--quantize", "q4", "-o", "x")
    assert done.code == 2 and "bf16" in done.err, done.err
    for kind in TYPES:
        own = tmpdir() / "own.bin"
        shutil.copy(tiny_model(), own)
        expect(run_kl3m("-m", own, "--quantize", kind, "-o", own, "-q").out, b"")
        text = run_kl3m("-m", own, "-p", "This Agreement", "-s", 1, "-n", 20).out
        done = run_kl3m("-m", own, "--learn", "-o", own, "--tokens", 200, "-s", 1)
        expect(done.code, 0, done.err)
        expect(run_kl3m("-m", own, "-p", "This Agreement", "-s", 1, "-n", 20).out, text)
        info = run_kl3m("-m", own, "--info").text
        assert ", %s weights," % kind in info and "a table" in info, info
        again = tmpdir() / "learnt.bin"      # the other way round: the table is copied
        run_kl3m("-m", tiny_model(), "--learn", "-o", again, "--tokens", 200, "-s", 1)
        both, _ = quantized(kind, again)
        expect(sections(both)["guesses"], sections(again)["guesses"])


@test("a full disk or a signal leaves nothing half-written by --quantize")
def nothing_half_written():
    folder = tmpdir()
    done = run_kl3m("-m", small_model(), "--quantize", "bf16", "-o", "/dev/full")
    assert done.code == 1 and "No space left" in done.err, done.err
    large = once("large-for-signals.bin", lambda path: export(
        small_directory(hidden_size=512, num_attention_heads=8, vocab_size=8000,
                        intermediate_size=1024), path))
    for delay in (0.0, 0.02, 0.05, 0.1):
        child = subprocess.Popen([KL3M, "-m", str(large), "--quantize", "bf16", "-q", "-o",
                                  str(folder / "out.bin")], stderr=subprocess.DEVNULL)
        time.sleep(delay)
        child.send_signal(signal.SIGTERM)
        code = child.wait()
        left = [path.name for path in folder.iterdir()]
        assert code in (143, -15) and not left or code in (0, 143) and left == ["out.bin"], (
            code, left)
        for path in folder.iterdir():
            expect(run_kl3m("-m", path, "--verify").code, 0)
            path.unlink()


@test("a file whose type of weights is wrong for its size or unknown is refused")
def wrong_types():
    for kind in TYPES:
        made = quantized_model(kind)
        for name in ("embed_in.weight", "layers.0.attention.dense.weight", "embed_out.weight"):
            for wrong in (0, 1, 2, 3, 4, 77, 2 ** 32 - 1):
                file = File()
                file.data = bytearray(made.read_bytes())
                entry = next(at for at in range(64, len(file.data), 96)
                             if file.data[at:at + 56].split(b"\0")[0].decode() == name)
                if wrong == struct.unpack_from("<I", file.data, entry + 56)[0]:
                    continue
                done = file.put("I", entry + 56, wrong).sign().run()
                expect(done.code, 1, (kind, name, wrong))
                assert name in done.err, done.err


@test("a damaged or hostile q8 or bf16 file gives some text or the message about the model, and never a crash")
def damaged():
    draw = random.Random(2)
    for kind in TYPES:
        whole = quantized_model(kind).read_bytes()
        places = [(section_offset(whole, name), len(found[4])) for name, found in
                  sections(quantized_model(kind)).items() if is_matrix(name)]
        for number in range(40):
            data, path = bytearray(whole), tmpdir() / "damaged.bin"
            for _ in range(1 + number * 10):
                offset, size = draw.choice(places)
                data[offset + draw.randrange(size)] = draw.choice((0, 127, 128, 255, 0x80, 0x7F))
            if number % 4 == 0:    # a whole matrix of one byte: scales that are NaN, or huge
                offset, size = draw.choice(places)
                data[offset:offset + size] = bytes([draw.choice((0xFF, 0x7F, 0))]) * size
            path.write_bytes(data)
            for args in (["-n", 4, "-s", 1], ["--score"]):
                done = run_kl3m("-m", path, "-p", "The State of Delaware", *args)
                assert done.code == 0 or done.code == 1 and "not finite" in done.err, (
                    kind, number, done.code, done.err)
            path.unlink()
