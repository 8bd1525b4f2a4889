"""A core taken by another process: python3 tests/bench/bench_neighbour.py MODEL

Decodes and prefills in turns with and without a process that keeps one core busy, and prints the
share of the speed that is left, medians of the pairs. A program whose threads wait for each other
at every step can fall far below the half that two cores of which one is shared leave it. Exit
status 1 below 45%. Linux alone: the core is chosen by affinity."""
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

KL3M = Path(__file__).resolve().parents[2] / "kl3m"
LEAST, PAIRS = 0.45, 9


def spin(core):
    """A process that does nothing, all the time, on one core."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(busy.pid, {core})
    return busy


class Resident:
    """A kl3m that answers line by line, so that nothing but its passes is timed."""

    def __init__(self, model, new_tokens):
        self.process = subprocess.Popen([KL3M, "-m", model, "-t", "0", "-n", str(new_tokens),
                                         "--ignore-eos", "--no-echo", "--no-speculation"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def seconds(self, prompt):
        start = time.monotonic()
        self.process.stdin.write(prompt.encode() + b"\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline().endswith(b"\n"):
            sys.exit("kl3m ended early")
        return time.monotonic() - start

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.split("\n")[0])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("one core alone cannot be shared in part")
    works = [("decode", Resident(sys.argv[1], 24), "The"),
             ("prefill", Resident(sys.argv[1], 1),
              "the laws of the State and the provisions of this Agreement; " * 8)]
    worst = 1.0
    for name, resident, prompt in works:
        resident.seconds(prompt)
        shares = []
        for _ in range(PAIRS):
            alone = resident.seconds(prompt)
            busy = spin(cores[-1])
            time.sleep(0.1)   # Python has started, and the scheduler has seen it
            shares.append(alone / resident.seconds(prompt))
            busy.kill()
            busy.wait()
        resident.close()
        share = statistics.median(shares)
        worst = min(worst, share)
        print(f"{name}: {share:.0%} of the speed with one of {len(cores)} cores taken "
              f"({min(shares):.0%} to {max(shares):.0%})")
    return 0 if worst >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
