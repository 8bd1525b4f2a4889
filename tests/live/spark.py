#!/usr/bin/env python3
"""README's recipe for Apache Spark in local mode: the bytes of one process, with a worker killed on
the way.

    tests/live/spark.py [FOLDER]     PySpark is installed in FOLDER, or in a scratch one; needs Java

Spark cuts the file into partitions and runs one kl3m for each; it runs a partition again when its
kl3m fails."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # the modules of tests/

from harness import ROOT, expect, run
from test_recipes import DYING, alone, kitchen
from test_schedule import lines, random_prompts

PYSPARK = "pyspark==4.1.4"


def environment(folder):
    """The Python of a virtual environment that has PySpark."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PYSPARK], check=True)
    return python


def recipe():
    """README's Python block that pipes."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"),
                        flags=re.M | re.S)
    found = [block for block in blocks if ".pipe(" in block]
    expect(len(found), 1)
    return found[0]


def check(python, program, what):
    place = kitchen(lines([p[:60] for p in random_prompts(400, 7)] + ["The " * 500]), program)
    done = run([python, "-c", recipe()], cwd=place,
               env={"PYSPARK_PYTHON": str(python)})
    expect(done.code, 0, done.err[-2000:])
    parts = sorted((place / "texts").glob("part-*"))
    expect((3, b"".join(part.read_bytes() for part in parts)), alone(place, "--json"), what)
    print("ok   %s: the same bytes from %d partitions" % (what, len(parts)), flush=True)


def main():
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(Path(sys.argv[1] if len(sys.argv) > 1 else scratch).resolve())
        check(python, None, "one kl3m a partition")
        check(python, DYING, "one of them killed in the middle")


if __name__ == "__main__":
    main()
