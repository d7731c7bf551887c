"""The entry point of `dsfreeze` and `python -m dsfreeze`.

The deepspeed launcher puts `--local_rank=N` before our own arguments (DeepSpeed #943); the rank comes from the environment, so
it is dropped here, wherever it stands.
"""

import os
import sys


def without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments less `--local_rank=N`, `--local_rank N` and the spelling with a hyphen."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--local_rank", "--local-rank"):
            skip = True
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            kept.append(argument)
    return kept


def main() -> None:
    # Threads that spin while they wait make a step on a busy CPU ten times slower; read when torch is loaded, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dsfreeze.cli import run

    sys.exit(run(without_local_rank(sys.argv[1:])))


if __name__ == "__main__":
    main()
