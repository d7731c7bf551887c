"""The analyzer: recipe -> calibration data -> passes -> scores, their stability, a recommendation -> scores.json.

Passes are collective and share the examples among the ranks; each gives the same numbers at every world size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dsfreeze import __version__
from dsfreeze.analyze.bench import Bench
from dsfreeze.analyze.calibration import calibration_sample
from dsfreeze.analyze.cuts import cuts_of
from dsfreeze.analyze.passes import COVERS, PASSES
from dsfreeze.analyze.recommend import recommend
from dsfreeze.analyze.stability import drift_between, stabilities_of
from dsfreeze.anatomy import Anatomy
from dsfreeze.checkpoint import open_checkpoint
from dsfreeze.engine.process import agree, evaluation_engine, process_group, together
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.job import load_task
from dsfreeze.model import read_anatomy
from dsfreeze.progress import watched
from dsfreeze.recipe import AnalyzeOptions, Recipe
from dsfreeze.scores import FAMILIES, SCORES, Observations, Scores
from dsfreeze.screen import screen
from dsfreeze.strategies.scores_file import model_digest, read_analysis

SCORES_FILE, FIGURE = "scores.json", "scores.png"
FORMAT_VERSION = 1


def analyze(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Measure, write analyze.output_dir, and return what scores.json holds, on every rank; UserError for a user's mistake."""
    console = console or screen()
    _require_own_loss(recipe)
    names = requested(recipe.analyze)
    recipe = _still(recipe)
    with process_group(recipe) as ranks:
        agree(recipe.digest, "the recipe")
        began = time.perf_counter()
        leader = ranks.rank == 0
        _, data, module = together(lambda: load_task(recipe))
        anatomy = read_anatomy(module, recipe.model.name)
        earlier = together(lambda: _earlier(recipe.analyze.drift_from, anatomy))
        together(lambda: _load_checkpoint(module, anatomy, recipe.analyze.checkpoint))
        examples = together(lambda: calibration_sample(data, recipe.analyze.num_examples, recipe.analyze.seed))
        engine = evaluation_engine(module, anatomy, recipe)
        bench = Bench(recipe, anatomy, data, examples, engine)
        try:
            seen, costs, left_out = _run(bench, names, console if leader else Console(quiet=True))
        finally:
            engine.close()
        content = _content(bench, names, seen, costs, left_out)
        content["seconds"] = time.perf_counter() - began
        if earlier:
            content["drift"] = drift_between(content, earlier)
        together(lambda: _write(content, recipe, anatomy, ranks.world_size) if leader else None)
        shared: dict[str, Any] = engine.gather(content)[0]
        return shared


# -- what is asked for ---------------------------------------------------------------------------------------------


def requested(options: AnalyzeOptions) -> list[str]:
    """Names of scores; UserError for a name that is neither a score nor a family."""
    if options.recommend not in SCORES:
        raise UserError(f"analyze.recommend is '{options.recommend}'.{did_you_mean(options.recommend, SCORES)}")
    chosen: list[str] = []
    for word in options.scores or FAMILIES:
        if word not in SCORES and word not in FAMILIES:
            raise UserError(f"analyze.scores names '{word}'.{did_you_mean(word, [*FAMILIES, *SCORES])}")
        chosen += [name for name, score in SCORES.items() if word in (name, score.family)]
    if options.reference is None:
        needing = [name for name in chosen if SCORES[name].source == "reference"]
        if options.scores and set(needing) & set(options.scores):
            raise UserError(f"Score '{needing[0]}' compares with a reference model; name one in analyze.reference.")
        chosen = [name for name in chosen if name not in needing]
    if options.probe_steps < 2:
        if "gradient_norm_change" in (options.scores or ()):
            raise UserError(
                "Score 'gradient_norm_change' compares the probe's steps; write analyze.probe_steps=2 or more."
            )
        chosen = [name for name in chosen if name != "gradient_norm_change"]
    return [name for name in SCORES if name in chosen]


def _require_own_loss(recipe: Recipe) -> None:
    """UserError for a task whose loss is not the model's own, which gradients and transitions are taken of."""
    if recipe.task == "preference":
        raise UserError(
            "An analysis measures by the model's own loss, and task preference compares two answers. Analyze with task=sft on the chosen "
            "ones (of texts, data.text=[prompt,chosen]); freeze.scores takes its scores.json in a preference run."
        )


def _still(recipe: Recipe) -> Recipe:
    """Without dropout, so that numbers are those of the weights, and without packing: examples are looked at one by one."""
    parts = {"model": {"dropout": 0.0}, "data": {"packing": False}}
    return recipe.model_copy(update={key: getattr(recipe, key).model_copy(update=new) for key, new in parts.items()})


def _earlier(path: Path | None, anatomy: Anatomy) -> dict[str, Any] | None:
    """The analysis to compare with; UserError, before anything is measured, when it is none of this model."""
    if path is None:
        return None
    earlier = read_analysis(path)
    model = earlier["model"]
    if model["digest"] != model_digest(anatomy):
        raise UserError(
            f"analyze.drift_from: {path} is an analysis of {model['name']} with {model['layers']} layers, this is "
            f"{anatomy.name} with {len(anatomy.blocks)}. Compare analyses of one model."
        )
    return earlier


def _load_checkpoint(module: nn.Module, anatomy: Anatomy, folder: Path | None) -> None:
    """Put the weights of a run's checkpoint into the model that it was trained from; a head that it trained is fresh no more."""
    if folder is None:
        return
    checkpoint = open_checkpoint(folder)
    if checkpoint.plan.adapter is not None:
        raise UserError(
            f"analyze.checkpoint: {folder} holds adapters. Export it (`dsfreeze export {folder} -o FOLDER`) and analyze that."
        )
    named, state = dict(module.named_parameters()), checkpoint.state()
    for name, entry in state.items():
        if name not in named or named[name].shape != entry["weight"].shape:
            raise UserError(
                f"analyze.checkpoint: {folder} holds '{name}', which this model does not have in that shape: it is a "
                "checkpoint of another model or task."
            )
        with torch.no_grad():
            named[name].copy_(entry["weight"])
    if any(anatomy.layer_of[name].name == "head" for name in state):
        marked: Any = module
        marked.has_fresh_head = False


# -- running -------------------------------------------------------------------------------------------------------


def _run(bench: Bench, names: Iterable[str], console: Console) -> tuple[Observations, dict[str, Any], dict[str, str]]:
    """Every pass that the scores rest on, with its cost. One that the model or the task does not allow is left out, with the
    reason, unless its scores, or the reference that it compares with, were asked for by name."""
    seen = Observations(bench.anatomy)
    costs: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    wanted = {SCORES[name].source for name in names} | ({"states"} if bench.options.reference else set())
    for source in (source for source in PASSES if source in wanted):
        if any(COVERS.get(made) == source for made in costs):
            continue
        began = time.perf_counter()
        bench.engine.memory(reset_peak=True)
        try:
            seen = PASSES[source](replace(bench, watch=watched(console, f"analyzing: {source}")), seen)
        except UserError as error:
            if bench.options.scores is not None or source == "reference":
                raise
            left_out[source] = str(error)
            continue
        costs[source] = {"seconds": time.perf_counter() - began, "peak": bench.engine.memory().peak}
    return seen, costs, left_out


# -- what comes out ------------------------------------------------------------------------------------------------


def _content(
    bench: Bench, names: Sequence[str], seen: Observations, costs: dict[str, Any], left_out: dict[str, str]
) -> dict[str, Any]:
    options, recipe = bench.recipe.analyze, bench.recipe
    names = [name for name in names if SCORES[name].source not in left_out]
    if not names:
        raise UserError("No score could be taken: " + " ".join(left_out.values()))
    scores = {name: _finite(name, SCORES[name].compute(seen)) for name in names}
    stable = stabilities_of(names, seen, len(bench.examples), splits=options.splits, seed=options.seed)
    taken = {
        name: {
            "family": SCORES[name].family, "spearman": stable[name].spearman, "examples_needed": stable[name].needed,
            "scores": scores[name],
        }
        for name in names
    }  # fmt: skip
    chosen = options.recommend if options.recommend in taken else next(iter(taken))
    traces = {name: rows.tolist() for name, rows in seen.traces.items()}
    return {
        "format_version": FORMAT_VERSION,
        "dsfreeze": __version__,
        "model": {
            "name": recipe.model.name, "layers": len(bench.anatomy.blocks), "digest": model_digest(bench.anatomy),
            "checkpoint": options.checkpoint and str(options.checkpoint), "fresh_head": bench.engine.module.has_fresh_head,
        },
        "task": recipe.task,
        "data": {"train": recipe.data.train, "num_examples": len(bench.examples), "seed": options.seed},
        "score": chosen,
        "scores": taken[chosen]["scores"],
        "all": taken,
        "traces": traces,
        "cuts": cuts_of(traces["deviation"], seen.labels, options.batch_size) if traces else {},
        "left_out": left_out,
        "passes": costs,
    }  # fmt: skip


def _finite(name: str, found: Scores) -> dict[str, float]:
    scores = {key: float(value) for key, value in found.items()}
    wrong = next((key for key, value in scores.items() if not isfinite(value)), None)
    if wrong is not None:
        raise UserError(
            f"Score '{name}' of {wrong} is {scores[wrong]}: the model's weights or its loss on this data are not finite. "
            "Check the model with `dsfreeze evaluate`, or leave the score out of analyze.scores."
        )
    return scores


def _write(content: dict[str, Any], recipe: Recipe, anatomy: Anatomy, world_size: int) -> None:
    """scores.json, whole or not at all; the recommendation is made from the file, as a plan would be."""
    path = Path(recipe.analyze.output_dir) / SCORES_FILE
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        content["recommendation"] = recommend(temporary, content, recipe, anatomy, world_size)
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} (analyze.output_dir): {error.strerror}.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
