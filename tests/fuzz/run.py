"""Every reader on made-up files: python tests/fuzz/run.py [INPUTS OF EACH] [TARGET ...]

Ends with 1 and leaves the file where a reader does anything but read or refuse in our own words.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

from mutate import mutated
from targets import TARGETS, seeds_of

from dsfreeze.errors import UserError


def fuzz(name: str, inputs: int, folder: Path, *, seed: int = 0) -> tuple[int, int]:
    """(read, refused) of so many inputs; the exception of the first that was neither, with its file left in `folder`."""
    target, draw = TARGETS[name], random.Random(f"{name}/{seed}")
    seeds = list(seeds_of(name))
    target.prepare(folder)
    path, read = folder / target.file, 0
    for _ in range(inputs):
        path.write_bytes(mutated(draw.choice(seeds), draw))
        try:
            target.read(path)
            read += 1
        except UserError:
            continue
    return read, inputs - read


def main() -> None:
    words = sys.argv[1:]
    inputs = int(words.pop(0)) if words and words[0].isdigit() else 1000
    warnings.simplefilter("ignore")
    for name in words or TARGETS:
        folder, began = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-")), time.perf_counter()
        try:
            read, refused = fuzz(name, inputs, folder)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
            sys.exit(f"{name}: {type(error).__name__}: {error!s:.300}\n  of {folder / TARGETS[name].file}")
        print(f"{name}: {read} read, {refused} refused, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
