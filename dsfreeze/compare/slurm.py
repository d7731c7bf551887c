"""`--launcher slurm`: what is to run as one job array, a script for sbatch beside its recipes; nothing is run. No torch.

A task of the array is one run: it goes on from its checkpoint where it has one (a job that was preempted), else begins anew. Calling the
same command again reads what has finished, and writes the array of what is left: trials first, then the runs at the rates they found.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsfreeze.compare.processes import LOGS, Processes, folder_of
from dsfreeze.compare.queue import Work
from dsfreeze.errors import UserError
from dsfreeze.files import write_whole

SCRIPT = "array.sh"

#: No path stands in an #SBATCH line, whose quoting and % signs sbatch reads in its own way; logs are opened by the shell.
_FORM = """#!/bin/bash
# {count} runs of a comparison, a task each. Submit with: sbatch {script}
# Options of your cluster (--partition, --gres, --time ...) go on sbatch's command line, or here as #SBATCH lines.
#SBATCH --job-name=dsfreeze-compare
#SBATCH --array=0-{last}%{jobs}
#SBATCH --mem={mebibytes}M
#SBATCH --output=/dev/null
set -euo pipefail
cd -- {here}
verbs=(
{verbs}
)
recipes=(
{recipes}
)
folders=(
{folders}
)
logs=(
{logs}
)
task=$SLURM_ARRAY_TASK_ID
folder=${{folders[$task]}}
mkdir -p -- "$(dirname -- "${{logs[$task]}}")"
exec > "${{logs[$task]}}" 2>&1
more=()
[[ ! -e $folder/summary.json && ! -e $folder/scores.json ]] || exit 0
for found in "$folder"/checkpoint-*/manifest.json; do
  [[ ! -e $found ]] || more=(train.resume_from_checkpoint=true)
done
[[ ${{#more[@]}} -gt 0 ]] || rm -rf -- "$folder"
exec {python} -m dsfreeze "${{verbs[$task]}}" "${{recipes[$task]}}" ${{more[@]+"${{more[@]}}"}}
"""


def write_array(processes: Processes, works: Sequence[Work], memory: int, python: str) -> Path:
    """Write the recipes of `works` and the script, each task with `memory` bytes; the script's path."""
    script = processes.folder / "slurm" / SCRIPT
    paths = [processes.write_recipe(work).absolute() for work in works]
    text = _FORM.format(
        count=len(works), script=shlex.quote(str(script)), last=len(works) - 1, jobs=processes.jobs, mebibytes=-(-memory // 2**20),
        here=shlex.quote(str(Path.cwd())), python=shlex.quote(python), verbs=_lines(work.verb for work in works), recipes=_lines(paths),
        folders=_lines(folder_of(work).absolute() for work in works),
        logs=_lines(processes.beside(LOGS, work, ".txt").absolute() for work in works),
    )  # fmt: skip
    try:
        write_whole(script, text)
    except OSError as error:
        raise UserError(
            f"Cannot write {script}: {error.strerror}. Free disk space, and run the same command again."
        ) from None
    return script


def _lines(words: Iterable[object]) -> str:
    return "\n".join(f"  {shlex.quote(str(word))}" for word in words)
