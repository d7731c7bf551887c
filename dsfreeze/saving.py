"""What a run finds in its folder and leaves there: checkpoints and the exported model. Every rank calls, rank 0 writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsfreeze import checkpoint as checkpoints
from dsfreeze.background import Background
from dsfreeze.checkpoint import AUTO, Checkpoint, Search
from dsfreeze.engine import Engine
from dsfreeze.engine.process import agree, together
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.errors import UserError
from dsfreeze.export import export_model, require_writable
from dsfreeze.folder_lock import FolderLock
from dsfreeze.job import Job
from dsfreeze.recipe_freeze import CACHE_KEYS
from dsfreeze.record import MODEL, SUMMARY, holds_record, require_free


def find_start(
    job: Job, total_steps: int, global_batch_size: int, lock: FolderLock, sought: Search
) -> Checkpoint | None:
    """The checkpoint to resume from, if any, once everything that this run will write has a place of its own (collective).

    UserError, before DeepSpeed sees any of it, when it is of another plan, model or batch, or has nothing left to do;
    when the ranks see different ones; and when the folder holds what is not ours.
    """
    found = together(lambda: _look_around(job, total_steps, global_batch_size, sought))
    manifest = json.dumps(found.manifest, sort_keys=True) if found else ""
    agree(hashlib.sha256(manifest.encode()).hexdigest(), "the checkpoint to resume from")
    _on_leader(lock.take)
    if found is not None:
        step = found.step
        _on_leader(lambda: checkpoints.set_aside_later(job.output_dir, step))
    return found


def resume_step(job: Job, found: Checkpoint | None) -> int | None:
    """The step after which this run goes on with the record that is there; None where it begins one."""
    if found is not None:
        return found.step
    return 0 if job.recipe.train.resume_from_checkpoint == AUTO and holds_record(job.output_dir) else None


def _look_around(job: Job, total_steps: int, global_batch_size: int, sought: Search) -> Checkpoint | None:
    found = sought.result()
    if found is not None:
        _require_fitting(found, job, total_steps, global_batch_size)
    require_free(job.output_dir, job.plan, resume_step=resume_step(job, found))
    if job.recipe.train.export:
        require_writable(job.output_dir / MODEL)
    return found


def _on_leader(write: Callable[[], object]) -> None:
    """Let rank 0 write; its failure is an error on every rank (collective)."""
    together(write if read_ranks().rank == 0 else lambda: None)


def _require_fitting(found: Checkpoint, job: Job, total_steps: int, global_batch_size: int) -> None:
    """UserError where this run cannot go on from the checkpoint."""
    checkpoints.require_same(found, job.plan, job.base)
    _require_same_batch(job, found.trainer_state["global_batch_size"], global_batch_size)
    _require_same_rules(job, found.trainer_state)
    # a run that was stopped after its last step has its evaluation and its export still to do
    if found.step > total_steps or (found.step == total_steps and (job.output_dir / SUMMARY).exists()):
        raise UserError(
            f"{found.folder} is at step {found.step}, and this run ends at step {total_steps}: nothing is left to do. "
            "Raise train.max_steps or train.num_train_epochs."
        )


def _require_same_batch(job: Job, theirs: int, ours: int) -> None:
    """Where epochs give the length, another batch would change the number of steps and the learning rates' course."""
    if theirs != ours and job.recipe.train.max_steps <= 0:
        raise UserError(
            f"The checkpoint was trained with {theirs} examples a step, and this run has {ours}, so that its epochs have "
            "another number of steps. Set train.per_device_train_batch_size and train.gradient_accumulation_steps so "
            f"that, times the ranks, they give {theirs}; or give the run's length as train.max_steps."
        )


def _require_same_rules(job: Job, state: Mapping[str, Any]) -> None:
    """What the plan does not hold: how an adaptive strategy decides, what is minimised, what retains earlier tasks."""
    ours = _rules(job)
    for section in ("retain", "preference", *(["freeze"] if job.plan.decide_at is not None else [])):
        before = state.get(section, ours[section])  # absent from checkpoints of older versions
        changed = [key for key, value in ours[section].items() if before.get(key) != value]
        if changed:
            key = changed[0]
            raise UserError(
                f"The checkpoint was made with {section}.{key} {before.get(key)!r}, and this recipe says {ours[section][key]!r}: the run "
                "would go on by another rule. Use the recipe it was made with; another rule starts anew, in another train.output_dir."
            )


def _rules(job: Job) -> dict[str, dict[str, Any]]:
    """Sections of the recipe that a resumed run must share. A memory may have moved; whether there is one may not change."""
    recipe = job.recipe
    return {
        "freeze": recipe.freeze.model_dump(mode="json", exclude=set(CACHE_KEYS)),
        "preference": recipe.preference.model_dump(mode="json"),
        "retain": {
            **recipe.retain.model_dump(mode="json", exclude={"remember"}),
            "memory": recipe.retain.memory is not None,
        },
    }


class CheckpointWriter:
    """Writes checkpoints beside the training, which waits while the state is copied to the host, and no longer; where the one before is not
    written yet, for that too. Collective but for `failed`; rank 0 writes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._background = Background("checkpoint")

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last one could not be written."""
        return self._background.failed

    def save(self, engine: Engine, step: int, trainer_state: Mapping[str, Any]) -> Path:
        """Begin to write checkpoint-`step`; returns the folder that will be. UserError when the one before could not be written."""
        job, state = self.job, engine.export_state()
        # as it is now: the loop goes on with these values
        told = json.loads(json.dumps({**trainer_state, **_rules(job)}))
        plan, keep = job.plan, job.recipe.train.save_total_limit

        def write() -> None:
            checkpoints.save(job.output_dir, step, state, plan, job.base, told, first_plan=job.first_plan, keep=keep)

        _on_leader(lambda: self._background.start(write))
        return job.output_dir / f"{checkpoints.PREFIX}{step}"

    def wait(self) -> None:
        """Until every checkpoint is whole; UserError, on every rank, when one could not be written."""
        _on_leader(self._background.wait)

    def close(self) -> None:
        """On every way out, and not collective: what is being written becomes whole."""
        self._background.close()


def save_model(engine: Engine, job: Job, metrics: Mapping[str, float]) -> Path:
    """Write the trained model to output_dir/model; returns the folder (collective).

    Where the prefix is evicted rank 0 reads the whole model again, into host memory, for the prefix's own tensors."""
    folder = job.output_dir / MODEL
    weights = engine.export_weights(t.name for t in job.held.tensors)
    _on_leader(
        lambda: export_model(
            folder,
            job.whole_module(),
            job.tokenizer,
            weights=weights,
            plan=job.plan,
            recipe=job.recipe,
            metrics=metrics,
        )
    )
    return folder
