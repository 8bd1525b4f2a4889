"""What README.md shows is what is printed, and the make targets do what it says."""
import functools
import json
import os
import re
import shutil
import subprocess
import sys

from harness import KL3M, PATIENCE, ROOT, Skip, expect, export, run_kl3m, test, tiny_model, tmpdir
from tokenizer_tools import tokenize

DEMO_PROMPT = "Governing Law.\n"


def run_make(*args, cwd, make="make"):
    # As from a shell: what a make that runs the tests was told (-s, CFLAGS) is not for this one.
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run([make, *args], cwd=cwd, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=PATIENCE)
    expect(done.returncode, 0, done.stderr.decode())
    return done.stdout.decode()


@functools.lru_cache(None)
def checkout(make="make"):
    """A copy of what is in the project for this make, without what was built in it."""
    folder = tmpdir() / "kl3m"
    folder.mkdir()
    for name in ("kl3m.c", "tokenizer.c", "tokenizer.h", "export_weights.py", "Makefile"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@test("the commands in README.md print what stands below them")
def commands_print_what_is_shown():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    examples = 0
    folder = tmpdir()
    (folder / "kl3m").symlink_to(KL3M)
    (folder / "demo.bin").symlink_to(tiny_model())
    (folder / "tests").symlink_to(ROOT / "tests")
    for block in re.findall(r"^```console\n(.*?)^```$", text, flags=re.M | re.S):
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, flags=re.M):
            if "jq" in command.split() and shutil.which("jq") is None:
                continue
            done = subprocess.run(["sh", "-c", command], cwd=folder, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=PATIENCE)
            expect(done.stdout.decode(), output, command)
            examples += 1
    assert examples >= 5, examples


@test("the picture of --heat in README.md is what is printed")
def picture_of_heat():
    drawn = tmpdir() / "heat.svg"
    subprocess.run([sys.executable, ROOT / "tests" / "heat" / "heat.py", tiny_model(), drawn],
                   env=dict(os.environ, KL3M=str(KL3M)), check=True)
    expect(drawn.read_bytes(), (ROOT / "tests" / "heat" / "heat.svg").read_bytes())


def check_demo(make):
    shown = re.search(r"^```sh\n[^`]*make demo[^`]*```\n+```text\n(.*?)^```$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)[1]
    how = ["CC=%s" % (os.environ.get("CC") or "cc"), "CFLAGS=-O1", "PYTHON=%s" % sys.executable]
    place = checkout(make)
    said = run_make("-s", "-j", "4", *how, "demo", cwd=place, make=make)
    if make == "bmake":   # with -j it has standard error there too
        said = re.sub("^export_weights.py: .*\n", "", said)
    expect(said, shown.split("\n", 1)[1])
    expect(run_make(*how, "demo", cwd=place, make=make), shown, "the second time nothing is built")
    assert "\nguesses       a table" in run_kl3m("-m", place / "demo.bin", "--info").text
    # What took an hour to download is not made again because the program is newer.
    model = place / "model.bin"
    model.write_text("the user's")
    os.utime(model, (0, 0))
    run_make(*how, "MODEL=model.bin", "HUB=/nowhere", "model.bin", cwd=place, make=make)
    expect(model.read_text(), "the user's")


@test("make demo builds, exports the small model and prints the text that README.md shows")
def demo():
    check_demo("make")


@test("so does BSD's make")
def demo_of_bsd_make():
    if shutil.which("bmake") is None:
        raise Skip("bmake is not installed")
    check_demo("bmake")


@test("make install puts program and model under PREFIX below DESTDIR, where the program finds it, "
      "and uninstall removes both")
def install_and_uninstall():
    folder, stage = checkout(), tmpdir() / "with space"
    run_make("-s", "CFLAGS=-O1", cwd=folder)
    shutil.copy(tiny_model(), folder / "kl3m-002-170m.bin")
    run_make("-s", "install", "PREFIX=/opt/kl3m", "DESTDIR=%s" % stage, cwd=folder)
    installed = stage / "opt/kl3m/bin/kl3m"
    done = subprocess.run([str(installed), "-p", DEMO_PROMPT, "-t0", "-n5"], cwd=str(tmpdir()),
                          stdout=subprocess.PIPE,
                          env={"HOME": "/nowhere", "PATH": os.environ["PATH"]}, timeout=PATIENCE)
    expect((done.returncode, done.stdout),
           (0, run_kl3m("-m", tiny_model(), "-p", DEMO_PROMPT, "-t0", "-n5").out))
    run_make("-s", "uninstall", "PREFIX=/opt/kl3m", "DESTDIR=%s" % stage, cwd=folder)
    expect([path for path in stage.rglob("*") if not path.is_dir()], [])


def samples(model, path):
    """Six texts of the model's own, as card.jsonl has those of the real one."""
    with open(path, "w") as file:
        for prompt in ("Governing Law.\n", "Under this"):
            done = run_kl3m("-m", model, "-p", prompt, "-t", 0.5, "-n", 32, "-r", 8, "-s", 3,
                            "--json", "--ignore-eos")
            result, kept = json.loads(done.text), 0
            for text, new in zip(result["generated_text"], result["new_tokens"]):
                (ids,) = tokenize(model, [text.encode()])
                # Else it drew what no text encodes to.
                if len(ids) == result["prompt_tokens"] + new and kept < 3:
                    file.write(json.dumps({"prompt_ids": ids[:-new], "output_ids": ids[-new:]})
                               + "\n")
                    kept += 1


def run_card(model, path):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "card.py"), str(model), str(path)],
                          stdout=subprocess.PIPE, env=dict(os.environ, KL3M=str(KL3M)),
                          timeout=PATIENCE)
    return done.returncode, done.stdout.decode()


@test("card.py passes a model's own samples, and fails them when query, key and value rows "
      "are shuffled")
def card_of_the_models_own_samples():
    path = tmpdir() / "samples.jsonl"
    samples(tiny_model(), path)
    count = sum(len(json.loads(line)["output_ids"]) for line in path.read_text().splitlines())
    assert count >= 128, count
    expect(run_card(tiny_model(), path),
           (0, "%d of %d published tokens are among the 50 likeliest\n" % (count, count)))

    # The tiny model's safetensors with the rows of query_key_value in reverse: the file is sound,
    # the layout wrong.
    shuffled = tmpdir() / "shuffled"
    shutil.copytree(ROOT / "tests" / "tiny", shuffled)
    data = bytearray((shuffled / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name.endswith("query_key_value.weight"):
            begin, end = (start + offset for offset in entry["data_offsets"])
            size = (end - begin) // entry["shape"][0]
            rows = [data[at:at + size] for at in range(begin, end, size)]
            data[begin:end] = b"".join(reversed(rows))
    (shuffled / "model.safetensors").write_bytes(data)
    status, said = run_card(export(shuffled), path)
    among = int(said.split()[0])
    assert status == 1 and among < 0.9 * count, said


@test("the published outputs are those of the cards, by their ids alone")
def published_outputs():
    from harness import SHARED
    if SHARED is None:
        raise Skip("there is no ../shared here")
    ours = [json.loads(line) for line in (ROOT / "tests" / "card.jsonl").read_text().splitlines()]
    theirs = [json.loads(line)
              for line in (SHARED / "vectors" / "card.jsonl").read_text().splitlines()]
    expect(ours, [{key: one[key] for key in ("prompt_ids", "output_ids")} for one in theirs
                  if one["model"] == "kl3m-002-170m"])
