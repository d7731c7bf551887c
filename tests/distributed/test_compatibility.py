"""Every strategy at every stage, with offload, with gradient checkpointing, stopped and resumed: docs/compatibility.*

Oracle of a cell: the losses of the local engine's uninterrupted run on the same global batch, in fp32, to 1e-5. Its answer
is "yes", or the reason of a UserError; nothing else passes. The docs say what this test found with --write-compatibility;
without, it runs every strategy at one of the layouts, by turns, and is held to the docs.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import compatibility
import pytest
from compatibility import CHECKPOINTING, LAYOUTS
from forks import run_ranks
from test_adaptive_runs import RULES
from test_train import losses, train, values
from tiny_runs import llama_folder, tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record
from dsfreeze.strategies import STRATEGIES

STEPS, RESUMED_AT = 8, 5
#: what a strategy needs to be told, beside its name; the switches are such that one comes before step 5 and one after
OPTIONS = {
    **{name: {} for name in STRATEGIES},
    "ranked": {"scores": {f"layers.{i}": i % 3 for i in range(4)}},
    "budget": {"scores": {f"layers.{i}": 1 + i for i in range(4)}, "budget": {"flops": "85%"}},
    "salf": {"scores": {}, "max_layers": 2},
    "patterns": {"trainable": ["layers.1.*.q_proj", "layers.2", "head"]},
    "lisa": {"active_layers": 1, "switch_every": 3},
    "badam": {"switch_every": 2, "active_layers": 3},  # layers return before the end
    "owlore": {"active_layers": 1, "switch_every": 3, "scores": {f"layers.{i}": 1 + i for i in range(4)}},
    "sweep": {"order": "descending"},
    "gradual_unfreezing": {"switch_every": 3},
    "freezeout": {"t0": 0.25, "power": 1},
    "step_ranges": {"step_ranges": {"layers.0": 3, "layers.1": [2, 6], "embed": -1}},
    **RULES,
    "blockllm": {**RULES["blockllm"], "switch_every": 1},  # it looks at the loss often enough to see one rise
}
MOVING = ("lisa", "badam", "hift", "owlore", "sweep", "gradual_unfreezing", "freezeout", "step_ranges", *RULES)


@dataclass(frozen=True)
class Ran:
    """How a cell's run ended: its summary, or the sentence of the UserError that refused it."""

    summary: dict | None
    refusal: str = ""


def attempt(raw: dict) -> Ran:
    try:
        return Ran(train(raw))
    except UserError as error:
        return Ran(None, str(error))
    except Exception as error:
        error.add_note(f"in {raw['train']['output_dir']}")
        raise


def attempt_all(runs: list[dict]) -> list[Ran]:
    """Within one process group, one run after another (on every rank)."""
    from dsfreeze.engine.process import process_group

    with process_group(Recipe.model_validate(runs[0])):
        return [attempt(raw) for raw in runs]


def recipe_of(folder: Path, strategy: str) -> Recipe:
    """A short run on a tiny Llama with biases, which `bitfit` needs."""
    config = AutoConfig.from_pretrained(llama_folder(folder / "model"), attention_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    options = {"fraction": None, "strategy": strategy, **OPTIONS[strategy]}
    if "scores" in options:
        content = {"scores": options["scores"], "traces": {"deviation": [[1.0, 0.9, 0.5, 0.4, 0.3]]}}
        (folder / "scores.json").write_text(json.dumps(content))
        options["scores"] = str(folder / "scores.json")
    train = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": RESUMED_AT, "export": False,
             "warmup_steps": 0, "learning_rate": 5e-3, "adam_epsilon": 1e-2, "weight_decay": 0.1}  # fmt: skip
    return tiny_recipe(folder, freeze=options, train=train)


def cell(folder: Path, layout: str, checkpointing: str) -> tuple[Path, Path]:
    """Where a cell's uninterrupted run and its resumed one go."""
    return folder / f"{layout}-{checkpointing}", folder / f"{layout}-{checkpointing}-resumed"


def runs_of(recipe: Recipe, folder: Path, layout: str) -> list[dict]:
    """A run to the end and one resumed from its middle, without and with gradient checkpointing."""
    runs = []
    for checkpointing in CHECKPOINTING:
        whole, resumed = cell(folder, layout, checkpointing)
        options = {"ranks": 1 if layout == "local" else 2, "gradient_checkpointing": checkpointing == "on"}
        middle = str(whole / f"checkpoint-{RESUMED_AT}")
        runs += [
            values(recipe, layout, whole, **options),
            values(recipe, layout, resumed, **options, resume_from_checkpoint=middle),
        ]
    return runs


def decided(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["plan"]["digest"]) for line in read_record(folder).revisions]


def answers(folder: Path, layout: str, checkpointing: str, ended: list[Ran], local: dict) -> dict[str, str]:
    """What compatibility.json holds of a cell; AssertionError when it ran and is not the local run `local`."""
    (whole, resumed), where = cell(folder, layout, checkpointing), f"{layout}, checkpointing {checkpointing}"
    golden, found = folder / "local-off", {}
    for asked, place, ran, first in zip(compatibility.ASKED, (whole, resumed), ended, (0, RESUMED_AT), strict=True):
        if ran.summary is None:
            found[asked] = ran.refusal
            continue
        assert losses(place) == pytest.approx(losses(golden)[first:], abs=1e-5), f"{where}, {asked}"
        assert decided(place) == [line for line in decided(golden) if line[0] > first], f"{where}, {asked}"
        told = [ran.summary[key] for key in ("switches", "plan_digest")]
        assert told == [local["switches"], local["plan_digest"]], f"{where}, {asked}"
        found[asked] = "yes"
    return found


def sample(strategy: str, layouts: list[str]) -> list[str]:
    """One layout, another for the next strategy: all of them take minutes, and run when the file is written."""
    return [layouts[list(STRATEGIES).index(strategy) % len(layouts)]]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_everywhere(strategy, tmp_path, request):
    recipe = recipe_of(tmp_path, strategy)
    alone = attempt_all(runs_of(recipe, tmp_path, "local"))
    local = alone[0].summary
    assert (local["switches"] > 0) == (strategy in MOVING)
    assert local["never_moved"] == []
    writes = request.config.getoption("--write-compatibility")
    layouts = [layout for layout in LAYOUTS if layout != "local"]
    layouts = layouts if writes else sample(strategy, layouts)
    runs = [raw for layout in layouts for raw in runs_of(recipe, tmp_path, layout)]
    ended, other = run_ranks(attempt_all, runs, timeout=300)
    assert ended == other, "the ranks tell the same"
    ended = iter([*alone, *ended])
    found = {setting: {} for setting in CHECKPOINTING}
    for layout in ("local", *layouts):
        for setting in CHECKPOINTING:
            found[setting][layout] = answers(tmp_path, layout, setting, [next(ended), next(ended)], local)
    if writes:
        versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
        compatibility.record(strategy, found, {"versions": versions, "steps": STEPS, "resumed_at": RESUMED_AT})
    told = compatibility.read()["outcomes"][strategy]
    assert found == {setting: {layout: told[setting][layout] for layout in ("local", *layouts)} for setting in told}
    shutil.rmtree(tmp_path)


def test_the_page_is_the_file_rendered():
    """Oracle: compatibility.json, and the list of what refreeze refuses; the page is written by hand nowhere."""
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.render(compatibility.read())


def test_the_page_speaks_of_every_strategy():
    assert list(compatibility.read()["outcomes"]) == list(STRATEGIES)
