"""run.py itself, on modules of tests that are made for it."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from harness import PATIENCE, ROOT, expect, test, tmpdir


def folder(**modules):
    """A project with run.py and these modules of tests, and nothing to test."""
    top = tmpdir()
    (top / "tests").mkdir()
    for name in ("run.py", "harness.py", "models.py"):
        shutil.copy(ROOT / "tests" / name, top / "tests")
    for name, text in modules.items():
        (top / "tests" / ("test_%s.py" % name)).write_text(
            "import os, subprocess, time\n"
            "from harness import ROOT, Skip, once, test, tmpdir\n" + text)
    return top


def start(top, *words):
    """run.py with a place of its own for what is temporary."""
    (top / "tmp").mkdir(exist_ok=True)
    env = dict(os.environ, TMPDIR=str(top / "tmp"))
    env.pop("KL3M_TEST_CACHE", None)
    return subprocess.Popen([sys.executable, str(top / "tests" / "run.py"), *words], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(top, *words):
    child = start(top, *words)
    out = child.communicate(timeout=PATIENCE)[0].decode()
    expect(os.listdir(top / "tmp"), [], "what is left of a run")
    return child.returncode, out


# Two modules that end well only if they run at the same time.
MEETING = """
@test("{me} first")
def _():
    (ROOT / "{me}").touch()
    for _ in range(3000):
        if (ROOT / "{other}").exists():
            return
        time.sleep(0.01)
    raise AssertionError("{other} did not come")

@test("{me} second")
def _():
    def make(path):
        with open(ROOT / "made", "a") as file:
            file.write("{me} ")
        path.touch()
    assert once("shared", make).exists()
"""


@test("modules of tests run side by side, the lines of each together, and what they share "
      "is made once")
def side_by_side():
    top = folder(a=MEETING.format(me="a", other="b"), b=MEETING.format(me="b", other="a"))
    status, out = run(top)
    blocks = ["ok   a first\nok   a second\n", "ok   b first\nok   b second\n"]
    assert (status, out) in [(0, "".join(order) + "4 passed, 0 failed\n")
                             for order in (blocks, blocks[::-1])], (status, out)
    assert (top / "made").read_text() in ("a ", "b ")


@test("a test that fails, a module that cannot be imported and one that ends in the middle each "
      "make the exit status 1")
def failures():
    good = '@test("good")\ndef _():\n    pass\n@test("not here")\ndef _():\n    raise Skip("why")\n'
    for text, line in (
            ('@test("bad")\ndef _():\n    assert 1 == 2\n',
             "FAIL bad\n    test_c.py:5: assert 1 == 2\n"),
            ("import nowhere\n",
             r"FAIL test_c.py can be imported\n    test_c.py:3: ModuleNotFoundError .*\n"),
            ('@test("dies")\ndef _():\n    os._exit(0)\n',
             "FAIL test_c.py ended with status 0 in the middle\n")):
        status, out = run(folder(a=good, c=text))
        expect(status, 1, out)
        assert re.search("(?:^|\n)" + line, out) and "ok   good\nskip not here: why\n" in out, out
        assert out.endswith("\n1 passed, 1 failed, 1 skipped\n"), out
    expect(run(folder(a="")), (1, "0 passed, 0 failed\n"))


@test("words select tests by module or sentence, and one that selects none is named and fails "
      "before anything runs")
def words_select():
    top = folder(a='@test("one")\ndef _():\n    pass\n@test("two --x")\ndef _():\n    pass\n',
                 b='import test_a\n@test("three")\ndef _():\n    pass\n')
    expect(run(top, "one"), (0, "ok   one\n1 passed, 0 failed\n"))
    expect(run(top, "test_a"), (0, "ok   one\nok   two --x\n2 passed, 0 failed\n"))
    assert run(top, "--x", "test_b") in [(0, one + two + "2 passed, 0 failed\n") for one, two in (
        ("ok   two --x\n", "ok   three\n"), ("ok   three\n", "ok   two --x\n"))]
    status, out = run(top, "one", "fuor", "test_b", "test_c")
    expect(out,
           "FAIL no test has 'fuor' in its module's name or its sentence\n"
           "FAIL no test has 'test_c' in its module's name or its sentence\n0 passed, 2 failed\n")
    expect(status, 1)


ENDLESS = """
@test("endless {me}")
def _():
    subprocess.run(["sh", "-c", "echo $$ >'%s'; mv '%s' '%s'; exec sleep 1000" % (
        ROOT / "{me}.new", ROOT / "{me}.new", ROOT / "{me}")], cwd=tmpdir())
"""


def runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@test("an interrupt or SIGTERM ends the tests and all that they started, and nothing "
      "temporary is left")
def stopped_run():
    for number in signal.SIGINT, signal.SIGTERM:
        top = folder(a=ENDLESS.format(me="a"), b=ENDLESS.format(me="b"), c=ENDLESS.format(me="c"))
        child = start(top, "endless")
        until = time.monotonic() + 60
        while not ((top / "a").exists() and (top / "b").exists()) and time.monotonic() < until:
            time.sleep(0.01)
        child.send_signal(number)
        out = child.communicate(timeout=PATIENCE)[0].decode()
        expect((child.returncode, out), (128 + number, "0 passed, 0 failed\n"))
        for name in "ab":
            process = int((top / name).read_text())
            until = time.monotonic() + 10      # who inherits it may take a moment to see its end
            while runs(process) and time.monotonic() < until:
                time.sleep(0.01)
            assert not runs(process), "a test's program runs on"
        expect(os.listdir(top / "tmp"), [])
