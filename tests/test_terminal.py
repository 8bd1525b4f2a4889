"""A conversation on a terminal: prompts, texts that go on, Ctrl-C and Ctrl-D."""
import os
import pty
import select
import shutil
import signal
import subprocess
import termios
import time

from harness import KL3M, PATIENCE, Skip, expect, run_kl3m, test, tiny_model, tmpdir, until

PROMPT = "Governing Law.\\n"


class Terminal:
    """The program on a pseudo terminal; what it prints comes without returns."""
    def __init__(self, *args, pipe_out=False):
        self.ours, theirs = pty.openpty()
        attributes = termios.tcgetattr(theirs)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, attributes)
        def own_terminal():
            os.setsid()
            os.close(os.open(os.ttyname(theirs), os.O_RDWR))   # becomes the controlling one
        self.child = subprocess.Popen(
            [str(KL3M), "-m", str(tiny_model()), "-s", "1", *map(str, args)], stdin=theirs,
            stdout=subprocess.PIPE if pipe_out else theirs, stderr=theirs,
            preexec_fn=own_terminal)
        os.close(theirs)

    def read(self, until, timeout=PATIENCE):
        """What is printed up to this text, without it."""
        return self.read_to(lambda found: found.endswith(until.encode()), timeout)[:-len(until)]

    def read_to(self, enough, timeout=PATIENCE):
        found, end = b"", time.time() + timeout
        while not enough(found.replace(b"\r\n", b"\n")):
            ready = select.select([self.ours], [], [], max(0, end - time.time()))[0]
            try:
                more = os.read(self.ours, 4096) if ready else b""
            except OSError:
                more = b""
            assert more, "more was expected behind %r" % found
            found += more
        return found.decode().replace("\r\n", "\n")

    def say(self, text):
        os.write(self.ours, text.encode())

    def close(self):
        """Its exit status."""
        code = self.child.wait(timeout=PATIENCE)
        os.close(self.ours)
        return code


def text_of(n, *args):
    return run_kl3m("-m", tiny_model(), "-s", "1", "-n", n, "--no-echo", "-p", PROMPT, *args).text


@test("on a terminal each line is a prompt, its text streams out, an empty line goes on with it, and Ctrl-D leaves")
def conversation():
    terminal = Terminal("-n", 20)
    greeting = terminal.read("> ")
    assert greeting.count("\n") == 1 and "Ctrl-D" in greeting, greeting
    terminal.say("\n")
    expect(terminal.read("> "), "", "an empty line at first does nothing")
    terminal.say(PROMPT + "\n")
    expect(terminal.read("> "), text_of(20))
    for n in (40, 60):
        terminal.say("\n")
        expect(terminal.read("> "), text_of(n)[len(text_of(n - 20)) - 1:])
    terminal.say("Notices.\\n\n")
    want = run_kl3m("-m", tiny_model(), "-s", "1", "-n", "20", "--no-echo", "-p", "Notices.\\n")
    expect(terminal.read("> "), want.text)
    terminal.say("\x04")
    expect(terminal.read("\n"), "")
    expect(terminal.close(), 0)


@test("a text that ended by itself does not go on; a stop text is found across the place where one went on")
def ends_of_texts():
    first, whole = text_of(20), text_of(60)
    # Begins in the first text, which is shown.
    stop = whole[len(first) - 4:][:8].replace("\n", "\\n")
    terminal = Terminal("-q", "-n", 20, "--stop", stop)
    expect(terminal.read("> "), "", "-q greets nobody")
    terminal.say(PROMPT + "\n")
    expect(terminal.read("> "), first)
    terminal.say("\n")
    expect(terminal.read("> "), "\n", "nothing stands before the stop text that is not there")
    terminal.say("\n")
    expect(terminal.read("> "), "", "it has ended")
    terminal.say("\x04")
    expect(terminal.close(), 0)


@test("Ctrl-C ends the text, or the line, and not the program; the text goes on as if it had not been cut")
def interrupted():
    terminal = Terminal("-n", 400, "-j", 1, "--no-speculation")
    terminal.read("> ")
    terminal.say(PROMPT + "\n")
    first = terminal.read_to(lambda found: b"accordance" in found)     # in the middle
    terminal.child.send_signal(signal.SIGINT)
    rest = terminal.read("> ")
    assert len(rest) < 1200 and rest.endswith("\n"), rest
    terminal.child.send_signal(signal.SIGINT)  # at the prompt
    expect(terminal.read("> "), "\n")
    terminal.say("\n")
    more = terminal.read("> ")
    whole = first + rest[:-1] + more
    assert whole[:-1].startswith(text_of(400)[:-1]), whole
    terminal.child.send_signal(signal.SIGTERM)
    expect(terminal.read("\n"), "")
    expect(terminal.close(), 143)


@test("with -r a line each; a prompt that cannot be run is told, and the next line is asked for")
def several():
    terminal = Terminal("-q", "-n", 12, "-r", 3)
    terminal.read("> ")
    terminal.say(PROMPT + "\n")
    want = run_kl3m("-m", tiny_model(), "-s", "1", "-n", 12, "-r", 3, "--no-echo", "-p", PROMPT)
    expect(terminal.read("> "), want.text)
    terminal.say("\n")
    expect(terminal.read("> "), "")
    terminal.say("x " * 600 + "\n")
    assert "context" in terminal.read("> ")
    terminal.say("\x04")
    expect(terminal.close(), 0)


@test("where standard output is no terminal, or with --json and their kin, a terminal is read without a prompt")
def no_conversation():
    for args, pipe_out in ((["-n", 5], True), (["-n", 5, "--json"], False),
                           (["--tokenize"], False)):
        terminal = Terminal(*args, pipe_out=pipe_out)
        terminal.say("The\n\x04")
        if pipe_out:
            out = terminal.child.communicate(timeout=PATIENCE)[0].decode()
        else:
            out = terminal.read("\n")
        assert ">" not in out and out.count("\n") <= 1 and len(out) > 0, out
        expect(terminal.close(), 0)


@test("tmux shows a conversation as a person sees it")
def tmux():
    if shutil.which("tmux") is None:
        raise Skip("tmux is not installed")
    socket = str(tmpdir() / "tmux")
    def ask(*args):
        return subprocess.run(["tmux", "-S", socket, *args], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=PATIENCE).stdout.decode()
    ask("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40",
        "'%s' -m '%s' -s 1 -n 20; echo left; sleep 60" % (KL3M, tiny_model()))
    def screen():
        return "\n".join(line.rstrip() for line in ask("capture-pane", "-p").splitlines())
    def prompts():
        return sum(line.startswith(">") for line in screen().splitlines())
    try:
        for n, keys in enumerate((["Governing Law.\\n", "Enter"], ["Enter"], ["C-c"], ["C-d"])):
            until(lambda: prompts() == n + 1, "prompt %d" % (n + 1))
            ask("send-keys", *keys)
        until(lambda: "left" in screen(), "the end")
        assert text_of(20)[:40] in screen(), screen()
        expect(prompts(), 4, screen())
    finally:
        ask("kill-server")
