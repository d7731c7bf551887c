"""The reference of a preference run: what the model before the first step gives the pairs' answers.

Measured once, by the model that is about to be trained, so that no second model is held: two numbers a pair, on every rank,
for data.train and data.eval. A run leaves them in its folder, reference.safetensors, with the digests of the model and of the
tokens they belong to; a resumed run, and an evaluation of its model, read them there. They are never measured again, for the
weights are others by then.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsfreeze.checkpoint import Checkpoint
from dsfreeze.data import Examples, TaskData
from dsfreeze.data.examples import Pairs
from dsfreeze.engine.process import agree, together
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.errors import UserError
from dsfreeze.evaluation import Around, over_all
from dsfreeze.objectives.preference import answer_log_probs
from dsfreeze.progress import Watch
from dsfreeze.record import REFERENCE

if TYPE_CHECKING:
    from dsfreeze.engine import Engine
    from dsfreeze.job import Job

FORMAT = "1"


def measure_reference(engine: Engine, job: Job, arounds: Mapping[str, Around], watch: Watch[Any] = iter) -> None:
    """Let the pairs know their reference, from the engine's weights as they are, and write it down (collective). Nothing for a task
    without pairs. `arounds`: what a forward pass over the examples of data.train, data.eval runs within; `watch` shows progress."""
    for part, examples, pairs in _parts(job.data):
        table = _measured(engine, job, examples, arounds[part], watch)
        if not np.isfinite(table).all():
            raise UserError(
                f"The model gives answers of data.{part} log-probabilities that are not finite, and no preference can be measured against "
                f"them. {'Write train.bf16: false.' if job.recipe.train.bf16 else 'Look whether its files are whole.'}"
            )
        pairs.reference = table
    if any(_parts(job.data)):
        together(lambda: _write(job) if engine.rank == 0 else None)


def _measured(engine: Engine, job: Job, examples: Examples, around: Around, watch: Watch[Any]) -> np.ndarray:
    def run(chosen: np.ndarray) -> list[list[float]]:
        batch = job.data.collate([examples[index] for index in chosen])
        with around(chosen, batch):
            logits = engine.no_grad_forward(batch).logits
        return answer_log_probs(logits, batch["labels"])[0].view(-1, 2).tolist()

    size = job.recipe.train.per_device_eval_batch_size
    return np.asarray(over_all(engine, examples.num_tokens, size, run, watch), dtype=np.float32)


def recall_reference(job: Job, resumed: Checkpoint) -> None:
    """Let the pairs of a resumed run know the reference that it began with, from its folder or the checkpoint's (collective).

    UserError, on every rank, where there is none, or it is of another model or other data."""
    if not any(_parts(job.data)):
        return
    folders = list(dict.fromkeys((resumed.folder.parent, job.output_dir)))
    found = together(lambda: _read(job.data, folders, job.base.hash))
    agree(_digest(pairs.reference for _, _, pairs in _parts(job.data)), "the reference log-probabilities")
    together(lambda: _write(job) if read_ranks().rank == 0 and found != job.output_dir else None)


def reference_of_run(data: TaskData, folder: Path | None) -> None:
    """Let the pairs of an evaluation know the reference of the run in `folder`; UserError without one."""
    evaluated = replace(data, train=None)
    if not any(_parts(evaluated)):
        return
    if folder is None:
        raise UserError(
            "Task preference is evaluated against the model that a run began with. Name the run: `dsfreeze evaluate RUN`, a folder "
            f"that holds {REFERENCE}."
        )
    _read(evaluated, [folder], None)


def _parts(data: TaskData) -> Iterator[tuple[str, Examples, Pairs]]:
    for part, examples in (("train", data.train), ("eval", data.eval)):
        if examples is not None and isinstance(examples.rows, Pairs):
            yield part, examples, examples.rows


# -- the file ------------------------------------------------------------------------------------------------------


def _write(job: Job) -> None:
    tables = {part: pairs.reference for part, _, pairs in _parts(job.data) if pairs.reference is not None}
    told = {part: pairs.digest for part, _, pairs in _parts(job.data)}
    path = job.output_dir / REFERENCE
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tables, aside, metadata={"format": FORMAT, "model": job.base.hash, **told})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"Could not write {path}: {error}. Free disk space, or set train.output_dir to another disk."
        ) from error


def _read(data: TaskData, folders: Sequence[Path], model: str | None) -> Path:
    """Let the pairs know what the first of the folders that has the file says, and return that; `model` is the hash it must be of."""
    found = next((folder for folder in folders if (folder / REFERENCE).is_file()), None)
    if found is None:
        raise UserError(
            f"No {REFERENCE} in {' or '.join(map(str, folders))}: the log-probabilities under the model that the run began with, which "
            "task preference measures against. Put the file back, or start a new run."
        )
    path = found / REFERENCE
    told, tables = _load(path)
    if told.get("format") != FORMAT:
        raise UserError(f"{path} has format {told.get('format')}; this version reads {FORMAT}. Start a new run.")
    if model is not None and told.get("model") != model:
        raise UserError(
            f"{path} is of another model ({told.get('model', '')[:12]}, this is {model[:12]}). Give the model that the run began with."
        )
    for part, _, pairs in _parts(data):
        if told.get(part) != pairs.digest:
            raise UserError(
                f"{path} is of other pairs than data.{part} gives now. Use the data section and the tokenizer that the run began with, "
                "or start a new run."
            )
        pairs.reference = _checked(path, tables.get(part), len(pairs))
    return found


def _load(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    """What the file says of itself, and its tables."""
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, TypeError) as error:  # numpy has no bf16
        raise UserError(f"{path} is not a whole safetensors file of numbers: {error}. Start a new run.") from None


def _checked(path: Path, table: np.ndarray | None, number: int) -> np.ndarray:
    if table is None or table.shape != (number, 2) or table.dtype != np.float32 or not np.isfinite(table).all():
        raise UserError(f"{path} is damaged: {number} pairs have two finite numbers each. Start a new run.")
    return table


def _digest(tables: Iterable[np.ndarray | None]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        assert table is not None, "it has been read"
        digest.update(table.tobytes())
    return digest.hexdigest()
