"""Numbers and machines that break the rules: NaN, overflow, compilers' flags, a model changed under
way, limits."""
import os
import random
import re
import resource
import shutil
import struct
import subprocess

from harness import KL3M, PATIENCE, ROOT, Skip, expect, run, run_kl3m, small_model, test, tmpdir
from test_cli import File
from test_forward import kinds
from test_unit import unit

PROMPT = "This Agreement shall be governed by the laws of the State of Delaware"


def expect_fault(done, *words):
    expect((done.code, done.out), (1, b""), done.err)
    expect(done.err.count("\n"), 1, done.err)
    for word in words:
        assert word in done.err, (word, done.err)


# ---- Numbers ------------------------------------------------------------------------------------

@test("a NaN of any kind in any weight that a text uses ends in the message about the model, on "
      "every kind of CPU")
def nan_anywhere():
    draw, place = random.Random(1), tmpdir() / "broken.bin"
    # Sixteen tokens: a block of scores without a place that holds none (whose -infinity makes a NaN
    # of its own).
    prompt, ids = PROMPT, []
    while len(ids) != 16:
        ids = list(map(int, run_kl3m("-m", small_model(), "--tokenize", "-p", prompt).out.split()))
        prompt = prompt[:-1] if len(ids) != 16 else prompt
    whole = File()
    names = [name for name in whole.sections if name not in ("config", "about", "tokenizer")]
    for kind in kinds():
        for n, name in enumerate(names):
            if kind == "portable" and n % 5:
                continue   # it is slow, and its kernels are the same lines
            at, offset, _ = whole.sections[name]
            rows, cols, layout = struct.unpack_from("<III", whole.data, at + 80)
            # Of a matrix in panels the first 16 rows' inputs lie side by side; of the table, the
            # row of a token.
            where = (ids[3] * cols if name.startswith("embed_in")
                     else draw.randrange(16 * cols if layout else cols))
            for nan in (0x7FC00080, 0x7F800001, 0xFFC12345, 0x7FFFFFFF):
                data = bytearray(whole.data)
                struct.pack_into("<I", data, offset + 4 * where, nan)
                place.write_bytes(data)
                done = run_kl3m("-m", place, "-p", prompt, "-n", 1, "-q", "--no-echo",
                                env={"KL3M_ISA": kind})
                assert done.code == 1 and "not finite" in done.err, (
                    kind, name, hex(nan), done.out, done.err)
    # The key's bias alone, all of it, as it was seen.
    at, offset, _ = whole.sections["layers.1.attention.query_key_value.bias"]
    for i in range(48, 96):
        struct.pack_into("<I", whole.data, offset + 4 * i, 0x7FC00080)
    expect_fault(whole.run("-p", prompt, "-n1", "--no-echo"), "not finite")


@test("a repetition penalty that makes logits overflow is a fault with its name, and one that "
      "does not is none")
def penalty_overflows():
    for penalty in ("1e-39", "1e-300", "1e-320", "1e300", "1e308"):
        for more in (["-k0"], [], ["-t0"], ["--top-p", "0.5"], ["--no-speculation"], ["-r2"]):
            expect_fault(run_kl3m("-m", small_model(), "-p", PROMPT, "-n4", "--no-echo",
                                  "--repetition-penalty", penalty, *more), "--repetition-penalty")
    for penalty in ("1e-30", "1e-3", "1000", "1e30"):
        done = run_kl3m("-m", small_model(), "-p", PROMPT, "-n4", "--repetition-penalty", penalty)
        expect(done.code, 0, penalty)


# ---- Compilers ----------------------------------------------------------------------------------

def compile_program(compiler, *flags, out=None):
    """Builds the program as the Makefile does. Returns what the compiler ended with, and the
    program."""
    out = tmpdir() / "kl3m"
    env = {"MAKEFLAGS": None, "MFLAGS": None, "MAKELEVEL": None}
    return run(["make", "-s", "-B", "CC=" + compiler, "CFLAGS=" + " ".join(flags), "OUT=%s" % out],
               env=env, cwd=ROOT), out


@test("flags that change floating-point numbers are refused when it is compiled or when it starts, "
      "or change nothing")
def flags_that_change_numbers():
    want = None
    for compiler, flags in (("gcc", "-fsingle-precision-constant"),
                            ("clang", "-fno-honor-nans"), ("clang", "-fno-honor-infinities"),
                            ("gcc", "-fno-trapping-math -fno-math-errno"),
                            ("gcc", "-ffinite-math-only"), ("clang", "-ffinite-math-only")):
        slow = compiler == "clang" and os.environ.get("KL3M_TEST_SLOW") != "1"
        if slow or shutil.which(compiler) is None:
            continue
        if want is None:
            want = run_kl3m("-m", small_model(), "-p", PROMPT, "-s1", "-n20").out
        done, program = compile_program(compiler, "-O1", *flags.split())
        if done.code:
            assert "kl3m must be compiled without" in done.err, (flags, done.err)
            continue
        got = run_kl3m("-m", small_model(), "-p", PROMPT, "-s1", "-n20", program=program)
        if got.code == 0:
            expect(got.out, want, flags)
        else:
            expect_fault(got, "compiled")
        if "honor-nans" in flags:
            expect(got.code, 1, "it takes comparisons with NaN away")


@test("threads have room for what an unoptimized build keeps on the stack")
def threads_have_room():
    # musl gives a thread 128 KB, and so does the C library here if that is the limit.
    done = subprocess.run([str(unit()), "stack"], timeout=PATIENCE,
                          preexec_fn=lambda: resource.setrlimit(
                              resource.RLIMIT_STACK, (128 << 10, resource.RLIM_INFINITY)))
    expect(done.returncode, 0)


# ---- Files and machines -------------------------------------------------------------------------

@test("a model that is changed in place while it is in use ends in a message, status 1")
def changed_in_place():
    for fill in (b"\x7f", b"\xff"):
        place = tmpdir() / "model.bin"
        shutil.copy(small_model(), place)
        child = subprocess.Popen([str(KL3M), "-m", str(place), "-n1", "--json"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE)
        child.stdin.write(b"Q\n")
        child.stdin.flush()
        assert child.stdout.readline().startswith(b'{"prompt": "Q"')
        file = File()
        _, offset, size = file.sections["tokenizer"]
        with open(place, "r+b") as model:   # in place, as cp does, and as no export of ours
            model.seek(offset + 64)
            model.write(fill * (size - 64))
        try:
            out, err = child.communicate(PROMPT.encode()
                                         + b" and any other words than those before\n",
                                         timeout=PATIENCE)
        except BrokenPipeError:
            out, err = child.communicate(timeout=PATIENCE)
        expect(child.returncode, 1, err)
        assert b"changed" in err and err.count(b"\n") == 1, err


@test("--logits keeps to --kv-memory")
def logits_keep_to_the_ceiling():
    out = tmpdir() / "logits"
    done = run_kl3m("-m", small_model(), "-p", PROMPT, "--kv-memory", "1K", "--logits", out)
    expect((done.code, done.out), (3, b""))
    assert "--kv-memory" in done.err and not out.exists(), done.err
    expect(run_kl3m("-m", small_model(), "-p", PROMPT, "--kv-memory", "10M", "--logits", out).code,
           0)


def in_namespace(commands, *args):
    """Runs the program after these commands in mounts of its own, for as long as it runs."""
    if run(["unshare", "-m", "true"]).code:
        raise Skip("this system lets us make no namespace of mounts")
    script = "mount --make-rprivate / && %s && shift && exec \"$@\"" % commands
    return run(["unshare", "-m", "sh", "-ec", script, "sh", "x", *map(str, args)])


@test("keys and values take a quarter of what a cgroup of version 1 or 2 allows, with a larger "
      "--kv-memory at most three quarters; no more threads run than it has CPUs")
def limits_of_cgroups():
    def allowed(files, lines, *more):
        """Megabytes for keys and values, and threads, where /sys/fs/cgroup has these files and
        /proc/self/cgroup these lines."""
        place = tmpdir()
        for name, text in files.items():
            file = place / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (place / "self").write_text(lines)
        bind = ("mount --bind '%s/cgroup' /sys/fs/cgroup && mount --bind '%s/self' "
                "/proc/self/cgroup" % (place, place))
        # /proc/self is the shell that binds, and stays it through exec.
        done = in_namespace(bind.replace("/proc/self", "/proc/$$"), KL3M, "-m", small_model(), "-p",
                            "x", "-n2", "-v", *more)
        expect(done.code, 0, done.err)
        expect("--kv-memory: 75.0 MB, three quarters of the memory" in done.err, "9G" in more)
        return (float(re.search(r"of ([\d.]+) MB for keys and values", done.err).group(1)),
                int(re.search(r"(\d+) threads", done.err).group(1)))
    limit, quarter, cpus = "100000000\n", 25.0, len(os.sched_getaffinity(0))
    one = {"memory/memory.limit_in_bytes": "9223372036854771712\n",
           "memory/a/memory.limit_in_bytes": limit,
           "memory/a/b/memory.limit_in_bytes": "200000000\n",
           "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
           "cpu/z/cpu.cfs_quota_us": "50000\n", "cpu/z/cpu.cfs_period_us": "100000\n"}
    most = allowed({"x": ""}, "0::/\n")
    assert most[0] > 100 and most[1] == cpus, most
    lines = "5:cpu,cpuacct:%s\n4:memory:%s\n1:name=systemd:/y\n0::/\n"
    expect(allowed(one, lines % ("/y", "/a/b")), (quarter, cpus), "the parent's, of version 1")
    expect(allowed(one, lines % ("/z", "/a")), (quarter, 1), "half a CPU")
    expect(allowed(one, lines % ("/y", "/")), most, "none of its own")
    one["memory/memory.limit_in_bytes"] = limit
    expect(allowed(one, lines % ("/y", "/docker/1234")), (quarter, cpus),
           "a container sees its own at the root")
    two = {"memory.max": "max\n", "a/memory.max": limit, "a/b/memory.max": "max\n",
           "cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}
    expect(allowed(two, "0::/a/b\n"), (quarter, 1), "the parent's, of version 2")
    expect(allowed(two, "0::/\n"), most)
    expect(allowed(two, "0::/a/b\n", "--kv-memory", "60M", "-j", 9), (62.9, 1))
    expect(allowed(two, "0::/a/b\n", "--kv-memory", "9G"), (3 * quarter, 1))


@test("started through PATH, the program finds its own folder also where there is no /proc")
def no_proc():
    home = tmpdir()
    (home / "bin").mkdir()
    shutil.copy(KL3M, home / "bin" / "kl3m")
    shutil.copy(small_model(), home / "bin" / "kl3m-002-170m.bin")
    hide = ("mount -t tmpfs tmpfs /proc && cd / && unset KL3M_MODEL && HOME=/none "
            "XDG_DATA_HOME=/none PATH='/nowhere:%s/bin':$PATH" % home)
    for name in ("kl3m", "'%s'/bin/kl3m" % home):
        done = in_namespace(hide + " && exec %s -p Q -n0 -j1" % name, "true")
        expect((done.out, done.code), (b"Q\n", 0), done.err)
