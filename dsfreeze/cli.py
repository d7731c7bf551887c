"""The command line: parses, calls, prints. Every command takes `--json`: one object on standard output, nothing else there;
progress and warnings go to standard error. Of several ranks rank 0 alone prints; an error is said by each that meets it.

Exit codes: 0 done, 1 a bug of ours, 2 a mistake that the message says how to mend, 128 + n ended by signal n.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dsfreeze import __version__
from dsfreeze.errors import UserError
from dsfreeze.interrupt import Interrupted
from dsfreeze.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    help="Choose which layers to fine-tune, know what it costs, and train exactly that under DeepSpeed ZeRO.",
)  # fmt: skip

#: Number of classes of built-in data, known without importing what makes them.
BUILTIN_LABELS: dict[str | None, int] = {"builtin:nli": 3}

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, overrides of its keys, or both."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def _tell_version(wanted: bool) -> None:
    if wanted:
        _write(f"dsfreeze {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the whole command."""


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; a UserError is printed without a traceback."""
    if not _is_leader():
        warnings.simplefilter("ignore", UserWarning)  # every rank meets the same ones
    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except UserError as error:
        _say(f"[bold red]error:[/] {_escape(str(error))}")
        return 2
    except Interrupted as interrupted:
        _say(f"[bold yellow]stopped:[/] {_escape(str(interrupted))}")
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(
            error, "show"
        ):  # only click's own errors (a missing argument, an unknown option) can show themselves
            raise
        error.show(file=sys.stderr)
        return 2


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, highlight=False)


def _is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_json(value: Any) -> None:
    _write(json.dumps(value, indent=2, default=str) + "\n")


def _write(text: str) -> None:
    if _is_leader():
        sys.stdout.write(text)


def _show(drawing: Any) -> None:
    if _is_leader():
        Console().print(drawing)


def read_words(words: Sequence[str] | None) -> Recipe:
    """A recipe from the command line's words: at most one file, the rest `key=value`."""
    from dsfreeze.recipe_reader import load_recipe

    # os.path's answer to a name that is too long is no; Path's is an error
    files = [word for word in words or () if "=" not in word or os.path.isfile(word)]
    overrides = [word for word in words or () if word not in files]
    if len(files) > 1:
        raise UserError(f"Two recipes given: {files[0]} and {files[1]}. Name one; overrides are written key=value.")
    return load_recipe(Path(files[0]) if files else None, overrides)


# -- commands ----------------------------------------------------------------------------------------------------


@app.command()
def train(
    words: Words = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and DeepSpeed config.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Fine-tune: `dsfreeze train recipe.yaml freeze.fraction=0.75`."""
    recipe = read_words(words)
    if print_config:
        return _print_config(recipe, as_json)
    from dsfreeze.loop import train as train_recipe

    summary = train_recipe(recipe, Console(stderr=True))
    if as_json:
        _print_json(summary)
    else:
        from dsfreeze.tables import summary_table

        _show(summary_table(summary))
    return 0


def _print_config(recipe: Recipe, as_json: bool) -> int:
    from dsfreeze.recipe_yaml import dump_yaml

    config, notes = _deepspeed_config(recipe)
    resolved = {"recipe": recipe.model_dump(mode="json"), "deepspeed": config}
    if as_json:
        _print_json({**resolved, "notes": notes})
    else:
        _write("".join(f"# note: {note}\n" for note in notes) + dump_yaml(resolved))
    return 0


def _deepspeed_config(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """What DeepSpeed will be given, {} without it, and notes on what is not certain before the run."""
    from dsfreeze.zero_config import deepspeed_config, is_local

    if is_local(recipe):
        return {}, []
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        anatomy, notes = _anatomy(recipe)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        note = f"bucket sizes are upper bounds, a run takes no more than its plan trains; the model could not be read: {why}"
        return deepspeed_config(recipe, world_size), [note]
    from dsfreeze.engine.process import engine_config
    from dsfreeze.setting import setting_of
    from dsfreeze.strategies import make_plan

    freeze_plan = make_plan(anatomy, recipe.planned_freeze, _num_steps(recipe), setting_of(recipe, world_size))
    return engine_config(recipe, freeze_plan, freeze_plan.adapted(anatomy), world_size), list(notes)


@app.command()
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

    anatomy, notes = _anatomy(recipe)
    setting = setting_of(recipe, world_size)
    freeze_plan = make_plan(anatomy, recipe.planned_freeze, _num_steps(recipe), setting)
    freeze_plan = replace(freeze_plan, notes=(*freeze_plan.notes, *notes))
    cost = estimate(
        freeze_plan.adapted(anatomy), freeze_plan, num_steps=_num_steps(recipe),
        evict_prefix=recipe.freeze.evict_prefix, **asdict(setting),
    )  # fmt: skip
    price = _known_price(recipe, world_size)
    cache, device = cache_of_run(recipe, anatomy, freeze_plan, world_size)
    if as_json:
        told = {"peaks": price and asdict(price.peaks), "prefix_cache": cache and cache_as_dict(cache, device)}
        _print_json({**plan_as_dict(anatomy, freeze_plan, cost), **told})
        return 0
    _show(draw(anatomy, freeze_plan, cost))
    if price is not None:
        from dsfreeze.planner.tables import peak_line

        _show(peak_line(price, workload_of(recipe).micro_batch_size))
    if cache is not None:
        _show(cache_line(cache, device, recipe.freeze.prefix_cache))
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
    return price_of_run(_anatomy, recipe, world_size, recipe.data.max_length)


def _plan_table(recipe: Recipe, request: Any, as_json: bool) -> int:
    from dsfreeze.planner.caching import cache_as_dict
    from dsfreeze.planner.request import make_planner
    from dsfreeze.planner.sweep import rows_as_dicts, sweep
    from dsfreeze.planner.tables import fit_table, found_as_dict, plan_table, planner_as_dict

    planner = make_planner(recipe, request, _anatomy, _num_steps(recipe))
    if request.fit is not None:
        found = {gpus: planner.fit(gpus).choices() for gpus in planner.gpus}
        if as_json:
            _print_json(
                {**planner_as_dict(planner), "fits": [found_as_dict(f) for each in found.values() for f in each]}
            )
        else:
            _show(fit_table(planner, found))
        return 0
    plans, left_out = planner.plans()
    rows, caches = sweep(planner.ground, plans, planner.gpus), planner.caches(plans)
    if as_json:
        told = {label: cache_as_dict(cache, planner.ground.device) for label, cache in caches.items()}
        priced = {"prefix_cache": told, "rows": rows_as_dicts(planner.ground, rows)}
        _print_json({**planner_as_dict(planner), "left_out": left_out, **priced})
        return 0
    _show(plan_table(planner, rows, caches))
    for label, reason in left_out.items():
        _say(f"left out: {label}. {_escape(reason)}")
    return 0


def _study(file: Path, as_json: bool) -> int:
    from dsfreeze.planner.study import read_study, run_study
    from dsfreeze.tables import study_table

    record = run_study(read_study(file), Console(stderr=True))
    if as_json:
        _print_json(record)
    else:
        _show(study_table(record))
    return 0


def _anatomy(recipe: Recipe) -> tuple[Any, tuple[str, ...]]:
    """An anatomy that is shipped or was added (no torch), else read on the meta device; notes on guesses."""
    from dsfreeze.shapes import known_anatomy

    num_labels, notes = _num_labels(recipe)
    known = known_anatomy(recipe.model.name, recipe.task, num_labels)
    if known is not None:
        return known, notes
    from dsfreeze.model import anatomy_of

    return anatomy_of(recipe.model, recipe.task, num_labels), notes


def _num_steps(recipe: Recipe) -> int | None:
    """The run's length as far as it is known without reading the data."""
    return recipe.train.max_steps if recipe.train.max_steps > 0 else None


def _num_labels(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """How many classes the head has, as far as is known without reading the data."""
    data = recipe.data
    known = len(data.labels or ()) or data.num_labels or BUILTIN_LABELS.get(data.train or data.eval)
    if known or recipe.task not in ("classification", "tokens"):
        return known or 2, ()
    return 2, ("the head is taken to have 2 labels, for the data are not read here; data.num_labels sets their number",)


@app.command()
def analyze(words: Words = None, as_json: AsJson = False) -> int:
    """Say where to fine-tune: how much each layer matters, how sure that is, and what to train within a budget."""
    from dsfreeze.analyze import FIGURE, SCORES_FILE
    from dsfreeze.analyze import analyze as analyze_recipe

    recipe = read_words(words)
    content = analyze_recipe(recipe, Console(stderr=True))
    if not _is_leader():
        return 0
    from dsfreeze.analyze.figure import draw_figure
    from dsfreeze.tables import scores_table

    folder = Path(recipe.analyze.output_dir)
    missing = draw_figure(content, folder / FIGURE)
    if as_json:
        _print_json(content)
        return 0
    _show(scores_table(content))
    for source, reason in content["left_out"].items():
        _say(f"left out: {source}. {_escape(reason)}")
    advice = content["recommendation"]
    _write("\n".join(["", advice["sentence"], *advice.get("told", ()), "", advice.get("recipe", "")]))
    _say(f"wrote {_escape(str(folder / SCORES_FILE))}" + (f"; no figure: {missing}" if missing else f" and {FIGURE}"))
    return 0


@app.command()
def cache(words: Words = None, as_json: AsJson = False) -> int:
    """Store what leaves the frozen prefix for every example, on disk, for all runs with that prefix: seeds, rates, methods."""
    from dsfreeze.commands import fill_cache

    filled = fill_cache(read_words(words), Console(stderr=True))
    if as_json:
        if _is_leader():
            _print_json(filled)
    else:
        from dsfreeze.tables import filled_table

        _show(filled_table(filled))
    return 0


@app.command()
def evaluate(words: Words = None, as_json: AsJson = False) -> int:
    """Evaluate a model without training: a recipe, or a run's folder (its exported model)."""
    from dsfreeze.commands import evaluate_recipe, recipe_of_run

    folder = next((word for word in words or () if os.path.isdir(word)), None)
    rest = [word for word in words or () if word != folder]
    recipe = recipe_of_run(Path(folder), rest) if folder else read_words(rest)
    metrics = evaluate_recipe(recipe, Path(folder) if folder else None)
    if as_json:
        _print_json({"model": recipe.model.name, "metrics": metrics})
    else:
        from dsfreeze.tables import metrics_table

        _show(metrics_table(recipe.model.name, metrics))
    return 0


@app.command()
def continual(
    file: Annotated[
        Path, typer.Argument(metavar="TASKS.yaml", help="A sequence of tasks, and methods to compare on it.")
    ],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its keys.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train on a sequence of tasks, and say what is learnt and what is forgotten; goes on where it was stopped."""
    from dsfreeze.continual.reading import read_course

    course = read_course(file, words or ())
    from dsfreeze.continual.rounds import run_course

    state = run_course(course, Console(stderr=True))
    if not _is_leader():
        return 0
    from dsfreeze.continual.figure import draw_figure
    from dsfreeze.continual.results import FIGURE, RESULTS
    from dsfreeze.continual.tables import continual_table

    folder = Path(course.spec.output_dir)
    missing = draw_figure(state, folder / FIGURE)
    if as_json:
        _print_json(state)
        return 0
    _show(continual_table(state))
    _say(f"wrote {_escape(str(folder / RESULTS))}" + (f"; no figure: {missing}" if missing else f" and {FIGURE}"))
    return 0


@app.command()
def export(
    run_folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint-N folder, or, with --base, a delta.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    delta: Annotated[bool, typer.Option("--delta", help="Write the trained tensors alone.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Fill a delta in again from this model.")] = None,
    as_json: AsJson = False,
) -> int:
    """Write a complete `from_pretrained` folder from a run or checkpoint, a delta, or a delta made whole again."""
    if not _is_leader():
        return 0  # one process's work
    from dsfreeze.commands import export_folder

    folder = export_folder(run_folder, output, delta=delta, base=base)
    if as_json:
        _print_json({"folder": str(folder)})
    else:
        _say(f"wrote {_escape(str(folder))}")
    return 0


@app.command()
def merge(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="START END | MEMBER...", help="Model folders; with --reset, also KEY=VALUE of a recipe."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    alpha: Annotated[
        float | None, typer.Option(help="Of END so much, of START the rest; 0.5 unless it is said.")
    ] = None,
    average: Annotated[bool, typer.Option("--average", help="The mean of all the folders.")] = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="END with START's values where the plan of freeze.* would freeze.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Make a model of models, without training: between two (WiSE-FT), the mean of several (a soup), or one partly reset."""
    if not _is_leader():
        return 0  # one process's work
    from dsfreeze.commands import merge_folders

    folder = merge_folders(words, output, alpha=alpha, average=average, reset=reset)
    if as_json:
        _print_json({"folder": str(folder)})
    else:
        _say(f"wrote {_escape(str(folder))}")
    return 0


@app.command()
def models(
    add: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Learn the shape of this config.json (or folder with one), to plan with."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name that --add gives it; else its folder's.")] = None,
    as_json: AsJson = False,
) -> int:
    """List the models that can be named, and say what else `model:` can be; with `--add`, name one more."""
    from dsfreeze.shapes import list_models

    if add is not None:
        return _add_model(add, name, as_json)
    if name is not None:
        raise UserError("--name names what --add adds. Give both: dsfreeze models --add CONFIG --name NAME.")
    rows = list_models()
    if as_json:
        _print_json({"models": [vars(row) for row in rows]})
    else:
        from dsfreeze.tables import models_table

        _show(models_table(rows))
    return 0


def _add_model(path: Path, name: str | None, as_json: bool) -> int:
    """Read a config's task models and keep their anatomies under a name, which is its folder's where none is given."""
    from dsfreeze.shapes import add, require_free_name

    whole = path.expanduser().resolve()
    name = name or (whole.parent.name if whole.name == "config.json" else whole.stem if whole.is_file() else whole.name)
    require_free_name(name)
    if not _is_leader():
        return 0  # one process's work
    from dsfreeze.model_config import config_file, read_config_activations, read_config_anatomies

    source = config_file(path.expanduser())
    tasks = read_config_anatomies(source, name)
    _say(f"reading what the passes of {name} store, up to a minute ...")
    activations = read_config_activations(source)
    file = add(name, str(source.resolve()), tasks, activations)
    anatomy = next(iter(tasks.values()))
    if as_json:
        _print_json({"name": name, "parameters": anatomy.numel, "tasks": list(tasks), "file": str(file)})
    else:
        for note in anatomy.notes:
            _say(f"note: {_escape(note)}")
        if activations is None:
            _say("note: its passes cannot be run without data, so peaks and seconds are not planned for it")
        _say(f"added {name}: {anatomy.numel:,} parameters, {len(anatomy.blocks)} layers; tasks {', '.join(tasks)}")
        _say(f"try: dsfreeze plan model={name} task={next(iter(tasks))}")
    return 0


@app.command()
def quickstart(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the quickstart's recipe.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Fine-tune SmolLM2-135M with its bottom 75 % frozen on a built-in task, and show what that saved."""
    from dsfreeze.quickstart import quickstart as start

    return start(words or [], as_json=as_json)
