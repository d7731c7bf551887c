"""Whole trainings on two ranks. Oracle: the local engine in one process with the same global batch, held to 1e-5 in fp32."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from forks import outcomes_of, run_ranks
from marks import some_fast
from tiny_runs import tiny_recipe

from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "../shared"
GOLDEN = Path(__file__).parents[1] / "assets" / "golden_rte.json"
STAGES = ("zero0", "zero1", "zero2", "zero3")


def train(values: dict) -> dict:
    """A run's summary (module level: it is pickled by name for the ranks)."""
    from dsfreeze.loop import train as train_recipe

    return train_recipe(Recipe.model_validate(values))


def train_all(runs: list[dict]) -> list[dict]:
    """Within one process group, one run after another."""
    from dsfreeze.engine.process import process_group

    with process_group(Recipe.model_validate(runs[0])):
        return [train(raw) for raw in runs]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_record(folder).steps]


def values(recipe: Recipe, zero: str, folder: Path, *, ranks: int, **options) -> dict:
    """The recipe for `ranks` ranks at the same global batch."""
    raw = recipe.model_dump(mode="json")
    raw["zero"] = zero
    raw["train"] |= {"output_dir": str(folder), **options}
    raw["train"]["per_device_train_batch_size"] //= ranks
    return raw


@pytest.mark.parametrize(
    "freeze",
    some_fast([{}, {"strategy": "interval"}, {"adapter": {"kind": "lora", "r": 2}}]),
    ids=["bottom", "interval", "lora"],
)
def test_every_stage_has_the_losses_of_the_local_engine(tmp_path, freeze):
    # 45 examples in batches of 4: the last batch of an epoch is short, and one rank gets less
    recipe = tiny_recipe(tmp_path, freeze=freeze, train={"max_steps": 13, "eval_strategy": "end", "max_grad_norm": 0.3})
    golden = train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected = losses(tmp_path / "local")
    for zero in STAGES:
        summaries = run_ranks(train, values(recipe, zero, tmp_path / zero, ranks=2), timeout=120)
        assert losses(tmp_path / zero) == pytest.approx(expected, abs=1e-5), zero
        assert summaries[0] == summaries[1]
        # at stage 3 a rank holds no whole tensor, and counts them all the same
        assert [summaries[0][key] for key in ("trainable", "total")] == [golden[key] for key in ("trainable", "total")]
        used = json.loads((tmp_path / zero / "deepspeed.json").read_text())
        assert used["zero_optimization"]["stage"] == int(zero[-1])
        assert summaries[0]["metrics"]["after"] == pytest.approx(golden["metrics"]["after"], abs=1e-5)
        assert (
            summaries[0]["metrics"]["before"] == golden["metrics"]["before"]
        )  # the same bits, not only the same number


@pytest.mark.slow
def test_a_checkpoint_continues_at_another_stage_and_world_size(tmp_path):
    """Oracle: the uninterrupted local run on the same global batch."""
    recipe = tiny_recipe(tmp_path, train={"max_steps": 12, "save_strategy": "steps", "save_steps": 4})
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected = losses(tmp_path / "local")
    start = values(recipe, "zero2", tmp_path / "zero2", ranks=2)
    run_ranks(train, start, timeout=120)
    for zero, ranks in (("zero3", 2), ("zero1", 2)):
        folder = tmp_path / f"resumed-{zero}"
        run_ranks(
            train,
            values(recipe, zero, folder, ranks=ranks, resume_from_checkpoint=str(tmp_path / "zero2" / "checkpoint-4")),
            timeout=120,
        )
        assert losses(folder) == pytest.approx(expected[4:], abs=1e-5), zero
    again = values(
        recipe,
        "local",
        tmp_path / "resumed-local",
        ranks=1,
        resume_from_checkpoint=str(tmp_path / "resumed-zero3" / "checkpoint-8"),
    )
    train(again)
    assert losses(tmp_path / "resumed-local") == pytest.approx(expected[8:], abs=1e-5)


def train_with_own_seed(raw: dict) -> dict:
    import os

    raw["train"]["seed"] += int(os.environ["RANK"])
    return train(raw)


def test_ranks_with_different_recipes_are_an_error_on_every_rank(tmp_path):
    raw = values(tiny_recipe(tmp_path), "zero2", tmp_path / "run", ranks=2)
    found = outcomes_of(train_with_own_seed, raw, timeout=30)
    assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
    assert all("disagree about the recipe" in o.text for o in found)


def fill_the_disk(raw: dict) -> dict:
    from transformers import PreTrainedModel

    from dsfreeze import checkpoint

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = PreTrainedModel.save_pretrained = full
    return train(raw)


@pytest.mark.parametrize("save_strategy", ["steps", "no"], ids=["checkpoint", "export"])
def test_a_full_disk_on_rank_0_is_an_error_on_every_rank(tmp_path, save_strategy):
    raw = values(tiny_recipe(tmp_path, train={"save_strategy": save_strategy}), "zero2", tmp_path / "run", ranks=2)
    found = outcomes_of(fill_the_disk, raw, timeout=60)
    assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
    assert all("No space left" in o.text for o in found)


def fill_the_disk_while_training(raw: dict) -> dict:
    from dsfreeze.record import Record

    def full(*_args):
        raise UserError("Cannot write steps.jsonl: No space left on device.")

    Record.step = full
    return train(raw)


def lose_the_data(raw: dict) -> dict:
    from dsfreeze import loop

    def missing(_recipe):
        raise UserError("There is no file train.jsonl.")

    if os.environ["RANK"] == "1":
        loop.prepare_job = missing
    return train(raw)


@pytest.mark.parametrize("mishap", [fill_the_disk_while_training, lose_the_data])
def test_what_happens_to_one_rank_is_an_error_on_every_rank(tmp_path, mishap):
    raw = values(tiny_recipe(tmp_path), "zero2", tmp_path / "run", ranks=2)
    found = outcomes_of(mishap, raw, timeout=60)
    assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
    struck = 0 if mishap is fill_the_disk_while_training else 1
    assert f"On rank {struck}: " in found[1 - struck].text


def rte(model: str, folder: Path) -> Recipe:
    """The shipped recipe, shortened; Adam's epsilon keeps rounding from growing."""
    return load_recipe(ROOT / "recipes" / "rte.yaml", [
        f"model.name={model}", "zero=local", f"data.train={SHARED / 'data/rte/train.jsonl.gz'}", "data.eval=null",
        "data.max_length=48", "train.max_steps=4", "train.per_device_train_batch_size=4", "train.adam_epsilon=1e-3",
        "train.save_strategy=no", "train.eval_strategy=no", "train.export=false", f"train.output_dir={folder}",
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["minilm-l6", "smollm2-135m"])
def test_rte_has_one_golden_list_of_losses(tmp_path, model):
    """Real data, real weights. Oracle: one committed list, made by the local engine on another day."""
    if not (SHARED / "data/rte").is_dir():
        pytest.skip("RTE is not at hand: expected ../shared/data/rte beside the repository")
    recipe, golden = rte(model, tmp_path), json.loads(GOLDEN.read_text())[model]
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    assert losses(tmp_path / "local") == pytest.approx(golden, abs=1e-5)
    for zero in STAGES:
        run_ranks(train, values(recipe, zero, tmp_path / zero, ranks=2), timeout=200)
        assert losses(tmp_path / zero) == pytest.approx(golden, abs=1e-5), zero
