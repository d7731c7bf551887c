"""Start-up of the commands that need no model: `--help`, and `plan` on a shipped anatomy. Seconds of a whole process, and what it imported."""

from __future__ import annotations

import subprocess
import sys
import time

from common import machine, spread, write

COMMANDS = {
    "help": ["--help"],
    "plan": ["plan", "model=smollm2-135m", "freeze.strategy=bottom", "freeze.fraction=0.5"],
}
ROUNDS = 11


def seconds(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dsfreeze", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    for words in COMMANDS.values():
        seconds(words)  # byte-compiles
    times = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, words in COMMANDS.items():
            times[name].append(seconds(words))
    write(__file__, {"machine": machine(), "seconds": {name: spread(values) for name, values in times.items()}})


if __name__ == "__main__":
    main()
