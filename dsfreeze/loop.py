"""All of training: phases, steps, evaluation, checkpoints, the record.

    for phase in plan.phases: engine.enter(phase); steps ...

Every rank runs this; rank 0 alone writes and prints. What the ranks must agree on (recipe, plan, a signal, a full disk) is
compared before anybody acts on it, so that a mistake is an error on every rank and never a hang.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsfreeze import checkpoint as checkpoints
from dsfreeze.data import Loader, Step, check_packing
from dsfreeze.engine import Engine
from dsfreeze.engine.process import agree, build_engine, process_group
from dsfreeze.environment import describe_environment
from dsfreeze.errors import UserError
from dsfreeze.estimate import estimate
from dsfreeze.evaluation import evaluate
from dsfreeze.export import export_model
from dsfreeze.interrupt import Interrupt, Interrupted
from dsfreeze.job import Job, prepare_job
from dsfreeze.progress import StepBar
from dsfreeze.recipe import Recipe
from dsfreeze.record import Record, require_free
from dsfreeze.schedule import learning_rate_schedule
from dsfreeze.trackers import require_trackers, start_trackers


def train(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe from start (or checkpoint) to exported model; returns the summary that the record holds.

    Raises UserError for a user's mistake, on every rank; Interrupted after a signal, with a checkpoint written.
    """
    console = console or Console(stderr=True)
    with process_group(recipe) as ranks:
        agree(hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(), "the recipe")
        require_trackers(recipe)
        job = prepare_job(recipe)
        agree(job.plan.digest, "the freeze plan")
        run = Run(job, console if ranks.rank == 0 else Console(quiet=True), ranks)
        return run.start()


class Run:
    """One rank's run of a job."""

    def __init__(self, job: Job, console: Console, ranks: Any) -> None:
        options = job.recipe.train
        self.job, self.options, self.console = job, options, console
        self.output_dir = Path(options.output_dir)
        self.leader = ranks.rank == 0
        self.loader = Loader(
            job.data.train, job.data.collate, job.data.num_items,
            per_device_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            rank=ranks.rank, world_size=ranks.world_size, seed=options.seed,
        )  # fmt: skip
        per_epoch = self.loader.steps_per_epoch
        self.total = options.max_steps if options.max_steps > 0 else math.ceil(options.num_train_epochs * per_epoch)
        self.learning_rate = learning_rate_schedule(options, self.total)
        self.step = 0
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds: list[float] = []
        self.last_loss = math.nan

    # -- the run -----------------------------------------------------------------------------------------------

    def start(self) -> dict[str, Any]:
        resumed = self._find_checkpoint()
        require_free(self.output_dir, self.job.plan, resume=resumed is not None)
        engine = build_engine(self.job.module, self.job.anatomy, self.job.recipe, self.job.plan)
        try:
            engine.enter(self.job.plan.phase_at(resumed.step if resumed else 0))
            if self.job.recipe.data.packing:
                check_packing(engine.no_grad_forward, self.job.module.config.vocab_size)
            if resumed:
                self._resume(engine, resumed)
            with Interrupt() as interrupt:
                self._open_record(engine, resuming=resumed is not None)
                return self._run(engine, interrupt)
        finally:
            engine.close()

    def _run(self, engine: Engine, interrupt: Interrupt) -> dict[str, Any]:
        if self.step == 0:
            self._evaluate(engine, "before")
        engine.memory(reset_peak=True)
        with StepBar(self.console, self.total, self.step, self.options.logging_steps, shown=self.leader) as bar:
            steps = iter(self.loader)
            while self.step < self.total:
                self._one_step(engine, next(steps), interrupt, bar)
        memory = engine.memory()
        moved = engine.movement()
        self._evaluate(engine, "after")
        return self._finish(engine, memory, moved)

    def _one_step(self, engine: Engine, step: Step, interrupt: Interrupt, bar: StepBar) -> None:
        began = time.perf_counter()
        engine.enter(self.job.plan.phase_at(self.step))
        # dropout depends on (seed, step, rank) alone, so a resumed run needs no generator state
        torch.manual_seed(hash((self.options.seed, self.step, engine.rank)) % 2**63)
        loss = 0.0
        for batch, items in step.micro_batches:
            loss += engine.forward_backward(batch, items / step.global_items)
        learning_rate = self.learning_rate(self.step)
        norm = engine.step(learning_rate)
        loss, tokens, *signals = engine.sum([loss, float(step.tokens), *interrupt.flags()])
        seconds = time.perf_counter() - began
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"The loss of step {self.step} is {loss} and its gradient norm {norm}: training cannot go on. Lower "
                f"train.learning_rate (now {self.options.learning_rate:g}), check the data for empty examples, or set "
                "train.max_grad_norm."
            )
        self.step, self.last_loss = self.step + 1, loss
        self.seconds.append(seconds)
        memory = engine.memory()
        line = {
            "step": self.step, "epoch": step.epoch, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm,
            "seconds": seconds, "tokens": int(tokens), "tokens_per_second": tokens / seconds,
            "memory_allocated": memory.allocated, "memory_peak": memory.peak,
        }  # fmt: skip
        self._write(line)
        bar.advance(self.step, loss, tokens / seconds)
        if any(signals):
            raise Interrupted(interrupt.first(signals), self.step, self._save(engine))
        self._between_steps(engine, step.last_of_epoch)

    def _between_steps(self, engine: Engine, epoch_ended: bool) -> None:
        o, step = self.options, self.step
        if step == self.total:  # as transformers does, the last step is saved whatever save_steps says
            if o.save_strategy != "no":
                self._save(engine)
            return
        if (o.eval_strategy == "steps" and step % o.eval_steps == 0) or (o.eval_strategy == "epoch" and epoch_ended):
            self._evaluate(engine, f"step {step}")
        if (o.save_strategy == "steps" and step % o.save_steps == 0) or (o.save_strategy == "epoch" and epoch_ended):
            self._save(engine)

    def _evaluate(self, engine: Engine, when: str) -> None:
        if self.job.data.eval is None or self.options.eval_strategy == "no":
            return
        self.metrics[when] = evaluate(engine, self.job.data, self.job.recipe)
        self._event("evaluation", when=when, step=self.step, metrics=self.metrics[when])
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics[when].items())
        self.console.print(f"[bold]evaluation[/] {when}: {figures}", highlight=False)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> checkpoints.Checkpoint | None:
        """The checkpoint to resume from, held against the plan before DeepSpeed sees any of it."""
        wanted = self.options.resume_from_checkpoint
        if not wanted:
            return None
        found = checkpoints.find_checkpoint(self.output_dir, wanted)
        checkpoints.require_same(found, self.job.plan, self.job.base)
        if found.step >= self.total:
            raise UserError(
                f"{found.folder} is at step {found.step}, and this run ends at step {self.total}: nothing is left to do. "
                "Raise train.max_steps or train.num_train_epochs."
            )
        return found

    def _resume(self, engine: Engine, found: checkpoints.Checkpoint) -> None:
        engine.load_state(found.state())
        state = found.trainer_state
        self.loader.load_state_dict(state["loader"])
        self.metrics.update(state["metrics"])
        self.step = found.step
        self.console.print(f"resumed from {found.folder}", highlight=False)

    def _save(self, engine: Engine) -> str:
        """Write checkpoint-`step`; returns the folder."""
        state = engine.export_state()
        folder = self.output_dir / f"checkpoint-{self.step}"

        def write() -> None:
            trainer_state = {"loader": self.loader.state_dict(), "metrics": self.metrics}
            keep = self.options.save_total_limit
            checkpoints.save(self.output_dir, self.step, state, self.job.plan, self.job.base, trainer_state, keep=keep)

        self._on_leader(engine, write)
        self._event("checkpoint", step=self.step, folder=folder.name)
        return str(folder)

    def _on_leader(self, engine: Engine, write: Callable[[], object]) -> None:
        """Let rank 0 write; its failure is an error on every rank, for none may wait for a rank that has gone."""
        problem = ""
        if self.leader:
            try:
                write()
            except UserError as error:
                problem = str(error)
        problem = engine.gather(problem)[0]
        if problem:
            raise UserError(problem)

    # -- the record (rank 0) -----------------------------------------------------------------------------------

    def _open_record(self, engine: Engine, *, resuming: bool) -> None:
        if not self.leader:
            return
        environment = describe_environment(engine.device, engine.world_size)
        self.record = Record.create(self.output_dir, self.job.recipe, self.job.plan, environment, resume=resuming)
        self.trackers = start_trackers(self.job.recipe)

    def _write(self, line: dict[str, Any]) -> None:
        if not self.leader:
            return
        self.record.step(line)
        if self.step % self.options.logging_steps == 0 or self.step == self.total:
            for tracker in self.trackers:
                tracker.log(self.step, {k: v for k, v in line.items() if k != "step"})

    def _event(self, kind: str, **fields: Any) -> None:
        if self.leader:
            self.record.event(kind, **fields)

    def _finish(self, engine: Engine, memory: Any, moved: Any) -> dict[str, Any]:
        """Export the model, if it is wanted, and write the summary, which every rank returns."""
        if moved.frozen_changed:
            raise AssertionError(f"frozen tensors changed: {moved.frozen_changed[:3]}")
        summary = self._summary(engine, memory, moved)
        summary["model"] = self._export(engine) if self.options.export else None
        if self.leader:
            self.record.summary(summary)
            for tracker in self.trackers:
                tracker.finish()
        return engine.gather(summary)[0]

    def _export(self, engine: Engine) -> str:
        """Write the trained model to output_dir/model; returns the folder."""
        job, folder = self.job, self.output_dir / "model"
        weights = engine.export_weights(t.name for t in job.anatomy.tensors)
        metrics = self.metrics.get("after", {})

        def write() -> None:
            export_model(
                folder, job.module, job.tokenizer, weights=weights, plan=job.plan, recipe=job.recipe, metrics=metrics
            )

        self._on_leader(engine, write)
        return str(folder)

    def _summary(self, engine: Engine, memory: Any, moved: Any) -> dict[str, Any]:
        cost = estimate(self.job.anatomy, self.job.plan, world_size=engine.world_size)
        steady = self.seconds[2:] or self.seconds
        return {
            "steps": self.step, "loss": self.last_loss, "metrics": self.metrics,
            "strategy": self.job.plan.strategy, "plan_digest": self.job.plan.digest,
            "trainable": cost.trainable, "total": cost.total,
            "flops_vs_full": cost.flops_per_token / cost.full_flops_per_token,
            "seconds_per_step": statistics.median(steady), "memory": asdict(memory),
            "never_moved": list(moved.never_moved), "record": str(self.output_dir),
        }  # fmt: skip
