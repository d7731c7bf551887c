"""A trainer's checkpoint folders in our format: what was trained so far, by name, beside the trainer's own small files.

Left out are the model's whole weights and `optimizer.pt` or DeepSpeed's `global_step` folders, which load one layer's
state into another once the set has moved (DeepSpeed #2288). Written last, like in our own loop: the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from dsfreeze import checkpoint as portable
from dsfreeze.anatomy import Anatomy
from dsfreeze.checkpoint import MANIFEST, PREFIX, TRAINER, Base, Checkpoint
from dsfreeze.engine import TensorState
from dsfreeze.engine.process import agree, together
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json
from dsfreeze.integrations.adopted import Adopted
from dsfreeze.integrations.rates import Rates
from dsfreeze.plan import FreezePlan


class Checkpoints:
    """Replaces the methods of a trainer that write and read checkpoints; `engine` and `rates` come with `train()`."""

    engine: Adopted
    rates: Rates

    def __init__(self, trainer: Any, plan: FreezePlan, base: Base, anatomy: Anatomy) -> None:
        self.trainer, self.plan, self.base, self.anatomy = trainer, plan, base, anatomy
        self._saving = False
        self._upstream_save, self._upstream_model = trainer._save_checkpoint, trainer.save_model
        trainer._save_checkpoint, trainer.save_model = self._save, self._save_model
        trainer._save_optimizer_and_scheduler = self._save_scheduler
        trainer._load_from_checkpoint, trainer._load_best_model = self._load_nothing, self._load_best

    # -- saving ------------------------------------------------------------------------------------------------

    def _save(self, model: Any, trial: Any) -> None:
        trainer, arguments = self.trainer, self.trainer.args
        run = Path(trainer._get_output_dir(trial=trial))
        folder = run / f"{PREFIX}{trainer.state.global_step}"
        self._on_writer(lambda: (folder / MANIFEST).unlink(missing_ok=True))
        limit, arguments.save_total_limit = arguments.save_total_limit, None  # older ones go when this one is whole
        self._saving = True
        try:
            self._upstream_save(model, trial)
        finally:
            self._saving, arguments.save_total_limit = False, limit
        state = self.engine.export_state()
        if arguments.save_only_model:
            state = {name: {"weight": entry["weight"]} for name, entry in state.items()}
        self._on_writer(lambda: self._write(folder, state))
        if arguments.should_save:
            rotate_checkpoints(str(run), limit, trainer.state.best_model_checkpoint, use_mtime=True)

    def _on_writer(self, write: Any) -> None:
        together(write if self.trainer.args.should_save else lambda: None)

    def _write(self, folder: Path, state: Mapping[str, TensorState]) -> None:
        step = self.trainer.state.global_step
        trainer_state = parse_json((folder / TRAINER).read_text(encoding="utf-8"))
        try:
            portable.write_files(folder, step, state, self.plan, self.plan, self.base, trainer_state)
        except OSError as error:
            raise UserError(
                f"Could not write {folder}: {error}. Earlier checkpoints are intact; free disk space, or set output_dir to "
                "another disk, and resume from the newest that has a manifest.json."
            ) from error

    def _save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model where the user asks for it; in a checkpoint everything but its weights."""
        if not self._saving:
            self._upstream_model(output_dir, _internal_call)
            return
        assert output_dir is not None
        self.trainer._save(output_dir, state_dict={})
        for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME) if self.trainer.args.should_save else ():
            (Path(output_dir) / name).unlink(missing_ok=True)

    def _save_scheduler(self, output_dir: str) -> None:
        if self.trainer.args.should_save:
            torch.save(self.rates.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    # -- loading -----------------------------------------------------------------------------------------------

    def find(self, folder: str | Path) -> Checkpoint:
        """The checkpoint in a folder, once it is known to be whole and of this plan and model (collective)."""
        found = together(lambda: self._open(Path(folder)))
        manifest = json.dumps(found.manifest, sort_keys=True)
        agree(hashlib.sha256(manifest.encode()).hexdigest(), "the checkpoint to resume from")
        return found

    def _open(self, folder: Path) -> Checkpoint:
        found = portable.open_checkpoint(folder)
        self._require_same_plan(found)
        portable.require_same(found, self.plan, self.base)
        wanted, held = self.plan.until(found.step).ever_trained, set(found.manifest["tensors"])
        if wanted != held:
            name = sorted(wanted ^ held)[0]
            raise UserError(
                f"{folder} {'holds' if name in held else 'lacks'} '{name}', which the plan has "
                f"{'not ' if name in held else ''}trained by step {found.step}. The folder was changed; use another."
            )
        return found

    def _require_same_plan(self, found: Checkpoint) -> None:
        """UserError that names the first step, and its layers, at which the checkpoint's past is not this plan's."""
        steps = sorted({p.first_step for plan in (found.plan, self.plan) for p in plan.phases})
        for step in (s for s in steps if s < found.step):
            theirs, ours = set(found.plan.phase_at(step).trainable), set(self.plan.phase_at(step).trainable)
            if theirs != ours:
                raise UserError(
                    f"{found.folder} belongs to another plan. At step {step} it trained "
                    f"{self._layers(theirs - ours) or 'nothing'} that this plan freezes, and froze "
                    f"{self._layers(ours - theirs) or 'nothing'} that this plan trains. Attach the plan it was made "
                    "with, or start anew in another output_dir."
                )

    def _layers(self, names: set[str]) -> str:
        return ", ".join(layer.name for layer in self.anatomy.layers if any(t.name in names for t in layer.tensors))

    def load(self, found: Checkpoint) -> None:
        """Weights, state and scheduler into what `train()` has built (collective)."""
        self.engine.load_state(found.state())
        path = found.folder / SCHEDULER_NAME
        if path.is_file():
            self.rates.load_state_dict(torch.load(path, weights_only=True))

    def _load_nothing(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Before the optimizer is built: refuse what cannot be resumed; the loading comes after."""
        self.find(resume_from_checkpoint)

    def _load_best(self) -> None:
        self.engine.load_weights(self.find(self.trainer.state.best_model_checkpoint).state())
