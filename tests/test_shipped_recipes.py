"""Every shipped recipe runs, shortened: real models and real data where they are at hand. Oracle: the record each leaves."""

import math
from pathlib import Path

import pytest
from tiny_runs import t5_folder

from dsfreeze.loop import train
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record

ROOT = Path(__file__).parents[1]
SHORT = (
    "train.max_steps=2", "train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2", "train.export=false",
    "train.save_strategy=no", "data.max_train_examples=8", "data.max_eval_examples=4", "data.max_length=192",
)  # fmt: skip
#: What the evaluation of each must hold.
METRICS = {
    "rte": "accuracy", "conll2003": "entity_f1", "gsm8k": "exact_match", "wikitext2": "perplexity", "multi30k": "bleu",
    "lora": "accuracy", "lisa": "accuracy", "dpo": "reward_accuracy",
}  # fmt: skip


#: Sequences of tasks, which tests/test_continual_cli.py runs.
SEQUENCES = {"continual"}
#: Comparisons, which tests/test_compare_cli.py runs.
COMPARISONS = {"compare_quick"}


def test_there_is_a_case_for_every_recipe():
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == {*METRICS, *SEQUENCES, *COMPARISONS}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", METRICS)
def test_a_shipped_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = [f"train.output_dir={tmp_path / 'run'}"]
    if name in ("gsm8k", "multi30k"):
        more.append("data.max_new_tokens=4")
    if name == "lisa":
        more.append("freeze.switch_every=1")
    if name == "multi30k":
        more.append(f"model={t5_folder(tmp_path / 't5')}")
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", [*SHORT, *more])
    if "shared" in str(recipe.data.train) and not Path(recipe.data.train).exists():
        pytest.skip(f"{recipe.data.train} is not at hand: its data belong beside the repository")
    summary = train(recipe)
    record = read_record(tmp_path / "run")
    assert [line["step"] for line in record.steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in record.steps)
    assert METRICS[name] in summary["metrics"]["after"]
    assert summary["switches"] == (name == "lisa")
