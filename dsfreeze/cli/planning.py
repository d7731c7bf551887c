"""`plan`: one plan as a picture with its costs, a table over stages and clusters, or a study."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsfreeze.cli.known import anatomy_of, num_steps_of
from dsfreeze.cli.output import escape, print_json, say, show
from dsfreeze.cli.words import AsJson, Words, read_words
from dsfreeze.recipe import Recipe
from dsfreeze.screen import screen


def plan(
    words: Words = None,
    model: Annotated[
        str | None, typer.Option(help="The model, instead of a recipe: a name of `dsfreeze models`.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Devices: 8,16,64, or 1..1024 for powers of two.")] = None,
    device: Annotated[str | None, typer.Option(help="h200, h100, a100, l40s, rtx4090, mi300x or cpu.")] = None,
    seq: Annotated[int | None, typer.Option(help="Positions of a sequence (data.max_length).", min=2)] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch.", min=1)] = None,
    global_batch: Annotated[int | None, typer.Option(help="Sequences of a step, all devices together.", min=1)] = None,
    checkpointing: Annotated[bool | None, typer.Option(help="Recompute activations.")] = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Read the frozen prefix from a cache, and say when that pays.")
    ] = False,
    fit: Annotated[str | None, typer.Option(help="What fits these bytes a device and trains fastest: 80GiB.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="A measured run's folder: seconds as it had them.")] = None,
    study: Annotated[Path | None, typer.Option(help="A scaling study, as YAML: writes its record.")] = None,
    world_size: Annotated[int, typer.Option(help="Ranks to price the one plan for.", min=1)] = 1,
    as_json: AsJson = False,
) -> int:
    """Show what a freeze plan trains and costs, before anything runs; with --gpus and --device over stages and clusters."""
    from dsfreeze.planner.request import Request, words_of

    if study is not None:
        return _study(study, as_json)
    recipe = read_words(words_of(words, model, seq, batch, checkpointing, device))
    request = Request(gpus, device, fit, calibrate, global_batch, prefix_cache)
    return _plan_table(recipe, request, as_json) if request.wants_table else _plan_picture(recipe, world_size, as_json)


def _plan_picture(recipe: Recipe, world_size: int, as_json: bool) -> int:
    from dsfreeze.estimate import estimate
    from dsfreeze.picture import draw, plan_as_dict
    from dsfreeze.planner.caching import cache_as_dict, cache_line, cache_of_run
    from dsfreeze.setting import setting_of, workload_of
    from dsfreeze.strategies import make_plan

    anatomy, notes = anatomy_of(recipe)
    setting = setting_of(recipe, world_size)
    freeze_plan = make_plan(anatomy, recipe.planned_freeze, num_steps_of(recipe), setting)
    freeze_plan = replace(freeze_plan, notes=(*freeze_plan.notes, *notes))
    cost = estimate(
        freeze_plan.adapted(anatomy), freeze_plan, num_steps=num_steps_of(recipe),
        evict_prefix=recipe.freeze.evict_prefix, **asdict(setting),
    )  # fmt: skip
    price = _known_price(recipe, world_size)
    cache, device = cache_of_run(recipe, anatomy, freeze_plan, world_size)
    if as_json:
        told = {"peaks": price and asdict(price.peaks), "prefix_cache": cache and cache_as_dict(cache, device)}
        print_json({**plan_as_dict(anatomy, freeze_plan, cost), **told})
        return 0
    show(draw(anatomy, freeze_plan, cost))
    if price is not None:
        from dsfreeze.planner.tables import peak_line

        show(peak_line(price, workload_of(recipe).micro_batch_size))
    if cache is not None:
        show(cache_line(cache, device, recipe.freeze.prefix_cache))
    return 0


def _known_price(recipe: Recipe, world_size: int) -> Any:
    """The whole price where what the model's passes store is at hand; else None, for reading it would take a while."""
    from dsfreeze.anatomy import head_task
    from dsfreeze.planner.request import price_of_run
    from dsfreeze.shapes import known_activations

    known = known_activations(recipe.model.name)
    ends = {task for profile in known.profiles.values() for task in profile.ends} if known else set()
    if head_task(recipe.task) not in ends:
        return None
    return price_of_run(anatomy_of, recipe, world_size, recipe.data.max_length)


def _plan_table(recipe: Recipe, request: Any, as_json: bool) -> int:
    from dsfreeze.planner.caching import cache_as_dict
    from dsfreeze.planner.request import make_planner
    from dsfreeze.planner.sweep import rows_as_dicts, sweep
    from dsfreeze.planner.tables import fit_table, found_as_dict, plan_table, planner_as_dict

    planner = make_planner(recipe, request, anatomy_of, num_steps_of(recipe))
    if request.fit is not None:
        found = {gpus: planner.fit(gpus).choices() for gpus in planner.gpus}
        if as_json:
            print_json(
                {**planner_as_dict(planner), "fits": [found_as_dict(f) for each in found.values() for f in each]}
            )
        else:
            show(fit_table(planner, found))
        return 0
    plans, left_out = planner.plans()
    rows, caches = sweep(planner.ground, plans, planner.gpus), planner.caches(plans)
    if as_json:
        told = {label: cache_as_dict(cache, planner.ground.device) for label, cache in caches.items()}
        priced = {"prefix_cache": told, "rows": rows_as_dicts(planner.ground, rows)}
        print_json({**planner_as_dict(planner), "left_out": left_out, **priced})
        return 0
    show(plan_table(planner, rows, caches))
    for label, reason in left_out.items():
        say(f"left out: {label}. {escape(reason)}")
    return 0


def _study(file: Path, as_json: bool) -> int:
    from dsfreeze.planner.study import read_study, run_study
    from dsfreeze.tables import study_table

    record = run_study(read_study(file), screen())
    if as_json:
        print_json(record)
    else:
        show(study_table(record))
    return 0
