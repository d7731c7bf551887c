"""All of training: phases, steps, evaluation, checkpoints, the record.

    for phase in plan.phases: engine.enter(phase); steps ...

Every rank runs this; rank 0 alone writes and prints. What the ranks must agree on (recipe, plan, checkpoint, a signal, a
full disk) is compared before anybody acts on it, so that a mistake is an error on every rank and never a hang.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dsfreeze.checkpoint import Checkpoint, Search, seek_start
from dsfreeze.data import Loader, check_packing, num_steps_of
from dsfreeze.durations import Durations
from dsfreeze.engine import Engine, Memory, whereabouts
from dsfreeze.engine.process import agree, build_engine, process_group, together
from dsfreeze.engine.ranks import Ranks, is_out_of_memory, read_ranks
from dsfreeze.environment import describe_environment
from dsfreeze.estimate import estimate
from dsfreeze.estimate.flops import prefix_flops
from dsfreeze.evaluation import evaluate
from dsfreeze.folder_lock import FolderLock
from dsfreeze.interrupt import Interrupt, Interrupted
from dsfreeze.job import Job, prepare_job
from dsfreeze.journal import Journal
from dsfreeze.nonfinite import NonFiniteSteps
from dsfreeze.objectives import Term, objective_of
from dsfreeze.objectives.retain import terms_of
from dsfreeze.out_of_memory import explained
from dsfreeze.phases import Phases
from dsfreeze.prediction import predict, sentence
from dsfreeze.prefix.ahead import ReadAhead, Ready
from dsfreeze.prefix.cache import PrefixCache
from dsfreeze.progress import StepBar, watched
from dsfreeze.recipe import Recipe
from dsfreeze.reference import measure_reference, recall_reference
from dsfreeze.saving import CheckpointWriter, find_start, resume_step, save_model
from dsfreeze.schedule import learning_rate_schedule, rates_at
from dsfreeze.screen import screen
from dsfreeze.stopping import EarlyStopping
from dsfreeze.trackers import require_trackers


def train(recipe: Recipe, console: Console | None = None, *, sought: Search | None = None) -> dict[str, Any]:
    """Run a recipe from start (or checkpoint) to exported model; returns the summary that the record holds.

    `sought` is a search for the checkpoint that has begun (`checkpoint.seek_start`); without one it begins here.
    Raises UserError for a user's mistake, on every rank; Interrupted after a signal, with a checkpoint written.
    """
    console = console or screen()
    with process_group(recipe) as ranks:
        agree(recipe.digest, "the recipe")
        together(lambda: require_trackers(recipe))
        sought = sought or seek_start(recipe)
        job = together(lambda: prepare_job(recipe))
        run = Run(job, console if ranks.rank == 0 else Console(quiet=True), ranks)
        return run.start(sought)


class Run:
    """One rank's run of a job."""

    def __init__(self, job: Job, console: Console, ranks: Ranks) -> None:
        options = job.recipe.train
        self.job, self.options, self.console = job, options, console
        self.leader = ranks.rank == 0
        self.journal = Journal(leader=self.leader)
        self.loader = Loader(
            job.data.train, job.data.collate, job.data.num_items,
            per_device_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            rank=ranks.rank, world_size=ranks.world_size, seed=options.seed,
        )  # fmt: skip
        assert job.data.train is not None, "the loader has checked it"
        self.total = num_steps_of(options, len(job.data.train), ranks.world_size)
        self.schedule = learning_rate_schedule(options, self.total)
        self.phases = Phases(job, self.journal, self.console, self.total)
        self.prefix = PrefixCache(job, ranks, self.console, self.total, self.loader.steps_per_epoch)
        self.steps = ReadAhead(self.loader, self.prefix)
        self.terms: list[Term] = []
        self.stopping = EarlyStopping(job)
        self.nonfinite = NonFiniteSteps(job.recipe)
        self.writer = CheckpointWriter(job)
        self.step = 0
        self.metrics: dict[str, dict[str, float]] = {}
        self.durations = Durations()
        self.loss = math.nan
        self.fullest = (0, 0)
        self.before: Memory | None = None

    # -- the run -----------------------------------------------------------------------------------------------

    def start(self, sought: Search) -> dict[str, Any]:
        lock = FolderLock(self.job.output_dir, "train.output_dir")
        try:
            return self._start(find_start(self.job, self.total, self.loader.global_batch_size, lock, sought))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            ranks = read_ranks()
            raise explained(error, self.job, ranks.device, ranks.world_size, whereabouts.at) from error
        finally:
            lock.release(tidy=True)

    def _start(self, resumed: Checkpoint | None) -> dict[str, Any]:
        if resumed and self.job.plan.decide_at is not None:
            self.job.plan = resumed.plan  # an adaptive plan, as far as it has been decided
        if resumed:
            recall_reference(self.job, resumed)
        self.terms = terms_of(self.job)
        engine: Engine | None = None
        try:
            if self.job.eviction is not None:
                self.prefix.prefill()
            engine = build_engine(self.job.module, self.job.held, self.job.recipe, self.job.plan)
            engine.objective = objective_of(self.job.recipe)
            self.phases.start(engine, resumed.step if resumed else 0)
            if self.job.recipe.data.packing:
                check_packing(engine.no_grad_forward, self.job.module.config.vocab_size)
            for term in self.terms:
                term.start(engine)
            if resumed:
                self._resume(engine, resumed)
            together(lambda: self._open_journal(engine, resume_step(self.job, resumed)))
            return self._run(engine)
        finally:
            self.writer.close()
            self.journal.close()
            self.steps.close()
            self.prefix.close()
            if engine is not None:
                engine.close()

    def _resume(self, engine: Engine, found: Checkpoint) -> None:
        engine.load_state(found.state())
        state = found.trainer_state
        self.steps.load_state_dict(state["loader"])
        self.phases.load_state_dict(state["phases"])
        self.metrics.update(state["metrics"])
        for part, own in (("stopping", self.stopping), ("nonfinite", self.nonfinite)):
            if part in state:  # absent from checkpoints of older versions
                own.load_state_dict(state[part])
        self.step, self.loss = found.step, state["loss"]
        self.console.print(f"resumed from {found.folder}", highlight=False)

    def _open_journal(self, engine: Engine, resume_step: int | None) -> None:
        environment = describe_environment(engine.device, engine.world_size)
        self.journal.open(self.job.recipe, self.job.first_plan, environment, engine.config, resume_step=resume_step)
        for term in self.terms:
            self.journal.event("retain", method=self.job.recipe.retain.method, rule=term.rule)

    def _run(self, engine: Engine) -> dict[str, Any]:
        with Interrupt() as interrupt:
            self.prefix.enter(engine, self.phases.phase_at(self.step), self.step)
            if self.step == 0:
                self._measure_reference(engine)
                self._evaluate(engine, "before")
            self.before = engine.memory(reset_peak=True)
            with StepBar(self.console, self.total, self.step, self.options.logging_steps, shown=self.leader) as bar:
                while self.step < self.total and not self.stopping.over:
                    self._one_step(engine, next(self.steps), interrupt, bar)
            self.writer.wait()
        # from here on a signal acts at once: the last step is saved, and resuming does what is left
        memory = engine.memory()
        if self.durations.number:
            self.phases.look(engine, self.step)
        for term in self.terms:
            term.finish(engine)
        self._evaluate(engine, "after", cached=not self.stopping.go_back(engine, self.step))
        return self._finish(engine, memory)

    def _one_step(self, engine: Engine, ready: Ready, interrupt: Interrupt, bar: StepBar) -> None:
        began, step = time.perf_counter(), ready.step
        whereabouts.begin(f"step {self.step + 1}")
        phase = self.phases.enter(engine, self.step)
        self.prefix.enter(engine, phase, self.step)
        # dropout depends on (seed, step, rank) alone, so a resumed run needs no generator state
        torch.manual_seed(hash((self.options.seed, self.step, engine.rank)) % 2**63)
        for term in self.terms:
            term.before_passes(engine, self.step)
        loss = 0.0
        for (batch, items), chosen, staged in zip(step.micro_batches, step.chosen, ready.staged, strict=True):
            sequences, positions = batch["input_ids"].shape
            self.fullest = max(self.fullest, (sequences, positions), key=math.prod)
            with self.prefix.around(engine, self.prefix.train, chosen, batch, staged, counts=items > 0):
                loss += self.nonfinite.see(engine.forward_backward(batch, items / step.global_items), chosen)
        for term in self.terms:
            term.before_step(engine, self.step)
        learning_rate, own = rates_at(self.job.plan, self.step, self.schedule, self.options.learning_rate)
        norm = engine.step(learning_rate, own)
        failed = float(self.journal.failure is not None or self.writer.failed)
        loss, tokens, failures, *signals = engine.sum([loss, float(step.tokens), failed, *interrupt.flags()])
        seconds = time.perf_counter() - began
        taken = self.nonfinite.taken(engine, self.step + 1, loss, norm)
        if failures:
            self.writer.wait()
            together(self.journal.raise_failure)
        self.step, self.loss = self.step + 1, loss if taken else self.loss
        self.durations.add(seconds)
        self.prefix.after_step(seconds + self.steps.last_wait)
        memory = engine.memory()
        line = {
            "step": self.step, "epoch": step.epoch, "loss": loss, "learning_rate": learning_rate, "grad_norm": norm,
            "seconds": seconds, "tokens": int(tokens), "tokens_per_second": tokens / seconds,
            "memory_allocated": memory.allocated, "memory_peak": memory.peak, "phase": phase.first_step,
        }  # fmt: skip
        if not taken:
            line["skipped"] = True
        if self.terms:
            line["penalty"] = sum(term.value(engine) for term in self.terms)
        self.journal.step(line, track=self.step % self.options.logging_steps == 0 or self.step == self.total)
        bar.advance(self.step, self.loss, tokens / seconds)
        self.phases.after_step(engine, self.step, self.loss, learning_rate)
        if any(signals):
            folder = self._save(engine)
            self.writer.wait()
            raise Interrupted(interrupt.first(signals), self.step, str(folder))
        self._between_steps(engine, step.last_of_epoch)

    def _between_steps(self, engine: Engine, epoch_ended: bool) -> None:
        o, step, last = self.options, self.step, self.step == self.total
        if epoch_ended:
            self.prefix.share(engine)
        due = (o.eval_strategy == "steps" and step % o.eval_steps == 0) or (o.eval_strategy == "epoch" and epoch_ended)
        if (due and not last) or (self.stopping.patience and (due or last)):
            self._evaluate(engine, f"step {step}", between=True)
        if last or self.stopping.over:  # as transformers does, the last step is saved whatever save_steps says
            if o.save_strategy != "no":
                self._save(engine)
            return
        if (o.save_strategy == "steps" and step % o.save_steps == 0) or (o.save_strategy == "epoch" and epoch_ended):
            self._save(engine)

    def _measure_reference(self, engine: Engine) -> None:
        rows = {"train": self.prefix.train, "eval": self.prefix.eval}
        arounds = {part: partial(self.prefix.around, engine, of, counts=False) for part, of in rows.items()}
        measure_reference(engine, self.job, arounds, watched(self.console, "measuring the reference"))

    def _evaluate(self, engine: Engine, when: str, *, between: bool = False, cached: bool = True) -> None:
        """`between` steps on what is held out of the training data, if anything is. `cached`: what the prefix's cache holds is of these
        weights."""
        data = (self.job.data.held_out if between else None) or self.job.data
        if data.eval is None or self.options.eval_strategy == "no":
            return
        whereabouts.begin(f"the evaluation {when}")
        own = cached and data is self.job.data
        around = partial(self.prefix.around, engine, self.prefix.eval) if own else None
        self.metrics[when] = evaluate(engine, data, self.job.recipe, around)
        self.journal.evaluation(when, self.step, self.metrics[when])
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics[when].items())
        self.console.print(f"[bold]evaluation[/] {when}: {figures}", highlight=False)
        if between and self.stopping.patience:
            self.stopping.judge(engine, self.step, self.metrics[when])

    # -- the end -----------------------------------------------------------------------------------------------

    def _save(self, engine: Engine) -> Path:
        state = {
            "loader": self.steps.state_dict(), "global_batch_size": self.loader.global_batch_size,
            "metrics": self.metrics, "loss": self.loss, "phases": self.phases.state_dict(), "num_steps": self.total,
            "stopping": self.stopping.state_dict(), "nonfinite": self.nonfinite.state_dict(),
        }  # fmt: skip
        whereabouts.begin(f"the checkpoint of step {self.step}")
        folder = self.writer.save(engine, self.step, state)
        self.journal.event("checkpoint", step=self.step, folder=folder.name)
        return folder

    def _finish(self, engine: Engine, memory: Memory) -> dict[str, Any]:
        """Export the model, if it is wanted, and write the summary, which every rank returns."""
        whereabouts.begin("the end of the run")
        summary = self._summary(engine, memory)
        summary["predicted"] = self._predicted(engine, memory) if self.leader else None
        if self.options.export:
            summary["model"] = str(save_model(engine, self.job, self.metrics.get("after", {})))
        together(lambda: self.journal.summary(summary))
        if self.leader:
            self.stopping.drop()
        told: dict[str, Any] = engine.gather(summary)[0]
        return told

    def _predicted(self, engine: Engine, memory: Memory) -> dict[str, Any] | None:
        """What the planner says of this run, and a word where the peak was another; None where no step was left to run."""
        if not self.durations.number or self.before is None:
            return None
        predicted = predict(
            self.prefix.as_chosen(),
            engine.world_size,
            self.total,
            self.fullest,
            self.before,
            memory,
            on_cpu=engine.device.type == "cpu",
            cache_bytes=self.prefix.bytes_in_process,
        )
        if told := sentence(predicted, memory.peak):
            self.console.print(f"[yellow]note:[/] {told}", highlight=False)
        return predicted

    def _summary(self, engine: Engine, memory: Memory) -> dict[str, Any]:
        job, selection = self.job, self.phases.selection
        peak = max(memory.peak, selection["peak"])
        cost = estimate(
            job.anatomy, job.plan, world_size=engine.world_size, sequence_length=job.recipe.data.max_length,
            num_steps=self.total,
        )  # fmt: skip
        return {
            "steps": self.step, "skipped_steps": self.nonfinite.skipped, "loss": self.loss, "metrics": self.metrics,
            "strategy": job.plan.strategy, "plan_digest": job.plan.digest,
            "trainable": cost.trainable, "held": cost.held, "total": cost.total,
            "flops_vs_full": cost.flops_per_token / cost.full_flops_per_token, "full_flops_per_token": cost.full_flops_per_token,
            "seconds_per_step": self.durations.median(warming=2), "memory": {**asdict(memory), "peak": peak},
            "never_moved": list(self.phases.still), "switches": self.phases.switches,
            "seconds_switching": self.phases.seconds_switching, "prefix_cache": self._prefix_summary(engine),
            "selection": {**selection, "peak_after": memory.peak} if selection["decisions"] else None,
            "early_stopping": self.stopping.summary(), "record": str(job.output_dir), "model": None,
        }  # fmt: skip

    def _prefix_summary(self, engine: Engine) -> dict[str, Any] | None:
        found = self.prefix.summary(engine)
        if found is None:
            return None
        taken, phase = self.durations.total, self.job.plan.phases[-1]
        spared = prefix_flops(self.job.anatomy, frozenset(phase.trainable), self.job.recipe.data.max_length)
        return {
            **found, "flops_spared": spared, "seconds_waited": self.steps.waited,
            "wait_share": self.steps.waited / (taken + self.steps.waited) if taken else 0.0,
        }  # fmt: skip
