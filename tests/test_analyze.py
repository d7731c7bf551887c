"""The analyzer, end to end on tiny models. Oracles: planted truths, the model's own forward pass by hand, the file before and after."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from marks import some_fast
from rich.console import Console
from tiny_runs import byte_tokenizer, llama_folder, t5_folder, tiny_recipe
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, LlamaForCausalLM

import dsfreeze.analyze as analyzer
from dsfreeze.analyze.calibration import calibration_sample
from dsfreeze.analyze.figure import draw_figure
from dsfreeze.analyze.passes import PASSES
from dsfreeze.cli import run
from dsfreeze.errors import UserError
from dsfreeze.job import load_task
from dsfreeze.loop import train
from dsfreeze.recipe import AnalyzeOptions, Recipe
from dsfreeze.record import read_record
from dsfreeze.scores import SCORES

SMALL = {
    "num_examples": 12, "batch_size": 4, "ablation_examples": 4, "probe_steps": 2, "gate_steps": 2, "splits": 3,
}  # fmt: skip


def calibrated(folder: Path, *, analyze: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """`tiny_recipe` with a small calibration."""
    return tiny_recipe(folder, analyze={**SMALL, "output_dir": str(folder / "analysis"), **(analyze or {})}, **changes)


def analyze(recipe: Recipe) -> dict[str, Any]:
    return analyzer.analyze(recipe, Console(quiet=True))


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PLAIN = {"eval": None, "text": None, "label": None, "num_labels": None}


def language_data(folder: Path) -> dict[str, Any]:
    """Documents that make 20 blocks, the last one shorter."""
    draw = random.Random(1)
    rows = [{"text": "".join(draw.choices("abcd ", k=25))} for _ in range(20)]
    return {**PLAIN, "train": rows_file(folder / "text.jsonl", rows), "text": "text", "max_length": 27}


def chat_data(folder: Path) -> dict[str, Any]:
    rows = [{"question": "why " * (i % 3 + 1), "answer": "since " + "abc"[i % 3] * (1 + i % 4)} for i in range(14)]
    return {**PLAIN, "train": rows_file(folder / "chats.jsonl", rows), "max_length": 64}


def pair_data(folder: Path) -> dict[str, Any]:
    rows = [{"source": "abc"[i % 3] * (i + 1), "target": ["de fg", "lm no pq", "t"][i % 3]} for i in range(14)]
    return {**PLAIN, "train": rows_file(folder / "pairs.jsonl", rows), "max_length": 64}


def number_data(folder: Path) -> dict[str, Any]:
    rows = [{"text": "abc"[i % 3] * (i % 5 + 1), "label": i / 10} for i in range(14)]
    return {"train": rows_file(folder / "numbers.jsonl", rows), "eval": None, "num_labels": 1}


def bert_folder(folder: Path, seed: int = 0) -> Path:
    """An encoder with a pooler, saved without a head."""
    config = BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def gpt2_folder(folder: Path) -> Path:
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def changed_llama(folder: Path, change: Callable[[LlamaForCausalLM], None], **options: Any) -> Path:
    """`llama_folder`'s model after `change`."""
    llama_folder(folder, **options)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def layers_of(content: dict[str, Any], score: str) -> list[float]:
    scores = content["all"][score]["scores"]
    return [scores[f"layers.{k}"] for k in range(content["model"]["layers"])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tiny Llama has been analyzed by every score that needs no reference."""
    folder = tmp_path_factory.mktemp("home")
    analyze(calibrated(folder, analyze={"budget": {"flops": "80%"}}))
    return folder


@pytest.fixture(scope="module")
def content(home: Path) -> dict[str, Any]:
    return json.loads((home / "analysis" / "scores.json").read_text())


# -- every score, every task ---------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "classification": {"model": llama_folder},
    "an encoder": {"model": bert_folder},
    "causal_lm": {"model": llama_folder, "data": language_data, "task": "causal_lm"},
    "sft": {"model": llama_folder, "data": chat_data, "task": "sft"},
}


def recipe_of(kind: str, folder: Path, **options: Any) -> Recipe:
    choice = KINDS[kind]
    changes = {key: choice[key] for key in ("task",) if key in choice}
    if "data" in choice:
        changes["data"] = choice["data"](folder)
    options.setdefault("reference", str(choice["model"](folder / "reference", seed=1)))
    return calibrated(folder, model=str(choice["model"](folder / "model")), analyze=options, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_of_every_layer_is_a_finite_number(tmp_path, kind):
    """Oracle: the list of scores, the layers, and the file, which holds what was returned."""
    recipe = recipe_of(kind, tmp_path)
    found = analyze(recipe)
    assert found["left_out"] == {}
    assert list(found["all"]) == list(SCORES)
    layers = {f"layers.{k}" for k in range(found["model"]["layers"])}
    for name, taken in found["all"].items():
        assert layers <= set(taken["scores"]), name
        assert all(isfinite(value) for value in taken["scores"].values()), name
        assert taken["spearman"] is None or -1 <= taken["spearman"] <= 1, name
    for trace in found["traces"].values():
        assert len(trace) == 12
        assert {len(row) for row in trace} == {len(layers) + 1}
    assert json.loads((tmp_path / "analysis" / "scores.json").read_text()) == json.loads(json.dumps(found))


@pytest.mark.parametrize("options", [{"num_examples": 2}, {"num_examples": 4, "batch_size": 4}])
@pytest.mark.filterwarnings("error:.*empty slice:RuntimeWarning")
def test_one_batch_of_examples_still_has_two_halves(tmp_path, options):
    """Of one batch a half would be empty, and its scores no numbers."""
    found = analyze(
        calibrated(tmp_path, analyze={"scores": ["gradient", "similarity"], "ablation_examples": 2, **options})
    )
    assert all(isfinite(taken["spearman"]) for taken in found["all"].values())


def test_one_example_has_no_halves():
    """Oracle: the recipe's own validation."""
    for options in ({"num_examples": 1}, {"ablation_examples": 1}):
        with pytest.raises(ValueError, match="greater than or equal to 2"):
            AnalyzeOptions.model_validate(options)


def test_an_encoder_decoder_has_no_single_stack_and_the_scores_that_need_one_are_left_out(tmp_path):
    model = str(t5_folder(tmp_path / "model"))
    recipe = calibrated(tmp_path, model=model, task="seq2seq", data=pair_data(tmp_path))
    found = analyze(recipe)
    assert set(found["left_out"]) == {"traces", "states", "ablation"}
    assert all("two" in reason for reason in found["left_out"].values())
    needing = {name for name, score in SCORES.items() if score.source in ("traces", "states", "reference", "ablation")}
    assert set(found["all"]) == set(SCORES) - needing
    assert found["traces"] == found["cuts"] == {}
    assert found["model"]["layers"] == 4
    for asked in ("deviation", "similarity", "ablation"):
        with pytest.raises(UserError, match="two"):
            analyze(
                calibrated(tmp_path, model=model, task="seq2seq", data=pair_data(tmp_path), analyze={"scores": [asked]})
            )


def test_a_regression_has_no_deviation(tmp_path):
    found = analyze(calibrated(tmp_path, data=number_data(tmp_path)))
    assert set(found["left_out"]) == {"traces"}
    assert {"block_influence", "cka_consecutive", "ablation", "fisher", "ila"} <= set(found["all"])
    with pytest.raises(UserError, match="regression has no label"):
        analyze(calibrated(tmp_path, data=number_data(tmp_path), analyze={"scores": ["deviation"]}))


# -- planted truths ------------------------------------------------------------------------------------------------


def silence(layer: int) -> Callable[[LlamaForCausalLM], None]:
    def change(model: LlamaForCausalLM) -> None:
        block = model.model.layers[layer]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()

    return change


def amplify(layer: int) -> Callable[[LlamaForCausalLM], None]:
    def change(model: LlamaForCausalLM) -> None:
        block = model.model.layers[layer]
        block.self_attn.o_proj.weight.mul_(60)
        block.mlp.down_proj.weight.mul_(60)

    return change


def test_a_layer_that_is_the_identity_has_no_influence_and_is_not_missed(tmp_path):
    model = changed_llama(tmp_path / "model", silence(2))
    found = analyze(calibrated(tmp_path, model=str(model), analyze={"scores": ["similarity", "ablation"]}))
    for score in ("block_influence", "cka_consecutive", "ablation"):
        values = layers_of(found, score)
        assert values[2] == pytest.approx(0, abs=1e-6), score
        assert min(abs(value) for k, value in enumerate(values) if k != 2) > 1e-6, score


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_with_a_huge_contribution_is_on_top(tmp_path, layer):
    model = changed_llama(tmp_path / "model", amplify(layer))
    found = analyze(calibrated(tmp_path, model=str(model), analyze={"scores": ["similarity"]}))
    values = layers_of(found, "block_influence")
    assert values.index(max(values)) == layer


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_what_has_moved_from_the_reference_is_named_first(tmp_path, layer):
    """Layers below the one that differs give what the reference's give; it is the first that does not."""
    reference = llama_folder(tmp_path / "reference")
    model = changed_llama(tmp_path / "model", amplify(layer))
    options = {"scores": ["cka_reference", "plasticity_reference"], "reference": str(reference)}
    found = analyze(calibrated(tmp_path, model=str(model), analyze=options))
    for score in options["scores"]:
        values = layers_of(found, score)
        moved = [abs(value) > 1e-9 for value in values]
        assert moved.index(True) == layer, (score, values)


def test_a_copy_is_the_reference(tmp_path):
    options = {"scores": ["cka_reference", "plasticity_reference"], "reference": str(llama_folder(tmp_path / "model"))}
    found = analyze(calibrated(tmp_path, analyze=options))
    for score in options["scores"]:
        assert layers_of(found, score) == pytest.approx([0] * 4, abs=1e-12)


def by_hand_trace(recipe: Recipe) -> list[list[float]]:
    """1 - cosine of every space's state to the label's row of the head's pseudo-inverse, position by position, by the model's own
    hidden states; the mean of each example."""
    _, data, module = load_task(recipe)
    examples = calibration_sample(data, recipe.analyze.num_examples, recipe.analyze.seed)
    gain, norm = module.model.norm.weight.detach().double(), module.model.norm
    basis = torch.linalg.pinv(module.lm_head.weight.detach().double().T)
    rows = []
    for index in range(len(examples)):
        batch = data.collate([examples[index]])
        reached: list[torch.Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, reached=reached: reached.append(args[0]))
        with torch.no_grad():
            outputs = module(input_ids=batch["input_ids"], output_hidden_states=True)
            spaces = torch.stack([*outputs.hidden_states[:-1], reached[0]])[:, 0, :-1]
            handle.remove()
            if recipe.analyze.final_norm == "apply":
                spaces = norm(spaces)
        rows_of_labels = basis[batch["labels"][0, 1:]]
        if recipe.analyze.final_norm == "fold":
            rows_of_labels = rows_of_labels / gain
        distance = 1 - cosine_similarity(spaces.double(), rows_of_labels.unsqueeze(0), dim=-1)
        rows.append(distance.mean(1).tolist())
    return rows


@pytest.mark.parametrize("final_norm", ["apply", "fold", "none"])
def test_the_deviation_is_a_hand_computed_one(tmp_path, final_norm):
    """Every position of 27-token blocks is looked at; the final norm's gains are far from 1."""

    def uneven(model: LlamaForCausalLM) -> None:
        model.model.norm.weight.copy_(torch.linspace(0.2, 3, 32))

    model = changed_llama(tmp_path / "model", uneven)
    options = {"scores": ["deviation"], "final_norm": final_norm, "positions": 64, "num_examples": 5}
    recipe = calibrated(tmp_path, model=str(model), task="causal_lm", data=language_data(tmp_path), analyze=options)
    found = torch.tensor(analyze(recipe)["traces"]["deviation"])
    assert found.flatten().tolist() == pytest.approx(torch.tensor(by_hand_trace(recipe)).flatten().tolist(), abs=2e-5)


def test_votes_are_single_positions_whose_mean_is_the_average(tmp_path):
    """Oracle: the averaged traces of the same positions."""
    data, options = language_data(tmp_path), {"scores": ["deviation"], "positions": 3, "num_examples": 5}

    def traces(targets: str) -> list[list[float]]:
        recipe = calibrated(tmp_path, task="causal_lm", data=data, analyze={**options, "targets": targets})
        return analyze(recipe)["traces"]["deviation"]

    votes, averages = torch.tensor(traces("vote")), torch.tensor(traces("average"))
    assert votes.shape == (15, 5)
    assert votes.view(5, 3, 5).mean(1).flatten().tolist() == pytest.approx(averages.flatten().tolist(), abs=1e-6)


# -- the sample ----------------------------------------------------------------------------------------------------


def shuffled(path: str) -> None:
    lines = Path(path).read_text().splitlines(keepends=True)
    random.Random(5).shuffle(lines)
    Path(path).write_text("".join(lines))


@pytest.mark.parametrize("number", some_fast([12, 45]), ids=["a sample", "all examples"])
def test_the_order_of_the_training_file_changes_nothing(tmp_path, number):
    """To the bit, every number of the file but the seconds and bytes."""
    options = {"num_examples": number, "probe_steps": 1, "gate_steps": 1}
    recipe = calibrated(tmp_path, analyze=options)
    one = analyze(recipe)
    shuffled(recipe.data.train)
    other = analyze(recipe)
    for measured in ("passes", "seconds"):
        del one[measured], other[measured]
    assert other == one


def test_another_seed_draws_other_examples(tmp_path):
    found = [
        analyze(calibrated(tmp_path, analyze={"scores": ["block_influence"], "seed": seed}))["all"]["block_influence"][
            "scores"
        ]
        for seed in (1, 2)
    ]
    assert found[0] != found[1]


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_examples": 46}, "only 45 examples.*num_examples=45"),
        ({"scores": ["fischer"]}, "'fischer'.*fisher"),
        ({"scores": ["cka_reference"]}, "analyze.reference"),
        ({"recommend": "greentrainr"}, "greentrainr.*greentrainer"),
        ({"scores": ["deviation"], "final_norm": "fold"}, "norm with a bias"),
        ({"reference": "other"}, "has 2 layers.*3 layers"),
        ({"drift_from": "other/scores.json"}, "is of elsewhere with 2 layers"),
        ({"drift_from": "no.json"}, "is no analysis"),
        ({"drift_from": "list.json"}, "is no analysis"),
        ({"drift_from": "plain.json"}, "is no analysis"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(tmp_path, monkeypatch, options, told):
    """Each on a tiny GPT-2 of three layers. Oracle: the words of the error."""
    monkeypatch.chdir(tmp_path)
    llama_folder(Path("other"), layers=2)
    elsewhere = {"model": {"digest": "0", "name": "elsewhere", "layers": 2}, "all": {}, "cuts": {}}
    Path("other/scores.json").write_text(json.dumps(elsewhere))
    Path("list.json").write_text("[1, 2]")
    Path("plain.json").write_text('{"scores": {"layers.0": 1}}')
    options = {"scores": ["snr"], **options} if "scores" not in options and "reference" not in options else options
    recipe = calibrated(tmp_path, model=str(gpt2_folder(tmp_path / "model")), analyze=options)
    with pytest.raises(UserError, match=told):
        analyze(recipe)
    assert not (tmp_path / "analysis" / "scores.json").exists()


@pytest.mark.parametrize(
    ("scores", "tensor"),
    [("gradient_norm", "model.layers.1.mlp.up_proj.weight"), ("block_influence", "model.layers.1.mlp.up_proj.weight"),
     ("snr", "model.layers.1.mlp.up_proj.weight"), ("ablation", "model.layers.1.mlp.up_proj.weight"),
     ("deviation", "model.layers.1.mlp.up_proj.weight"), ("change", "model.layers.1.mlp.up_proj.weight")],
)  # fmt: skip
def test_weights_that_are_not_finite_are_told_with_score_and_layer(tmp_path, scores, tensor):
    model = changed_llama(tmp_path / "model", lambda model: model.get_parameter(tensor).fill_(float("nan")))
    with pytest.raises(
        UserError, match=r"(Score '\w+' of [\w.]*layers\.\d.*|The probe's loss or gradient).*not finite"
    ):
        analyze(calibrated(tmp_path, model=str(model), analyze={"scores": [scores]}))


def test_a_checkpoint_of_adapters_is_refused_and_so_is_another_models(tmp_path):
    freeze = {"adapter": {"kind": "lora", "r": 2}}
    saving = {"max_steps": 1, "save_strategy": "steps", "export": False}
    train(tiny_recipe(tmp_path, freeze=freeze, train=saving), Console(quiet=True))
    options = {"checkpoint": str(tmp_path / "run" / "checkpoint-1"), "scores": ["snr"]}
    with pytest.raises(UserError, match="holds adapters"):
        analyze(calibrated(tmp_path, analyze=options))
    train(tiny_recipe(tmp_path, train={**saving, "output_dir": str(tmp_path / "plain")}), Console(quiet=True))
    options["checkpoint"] = str(tmp_path / "plain" / "checkpoint-1")
    wider = llama_folder(tmp_path / "wider", hidden=64)
    with pytest.raises(UserError, match="checkpoint of another model"):
        analyze(calibrated(tmp_path, model=str(wider), analyze=options))


# -- what is analyzed, and what it leaves behind -------------------------------------------------------------------


def test_a_checkpoint_is_analyzed_as_the_model_that_was_exported_from_it(tmp_path):
    """Oracle: the scores of that export. The head has been trained: its rows are the basis, not a fit."""
    train(tiny_recipe(tmp_path, train={"max_steps": 3, "save_strategy": "steps"}), Console(quiet=True))
    by_checkpoint = analyze(calibrated(tmp_path, analyze={"checkpoint": str(tmp_path / "run" / "checkpoint-3")}))
    exported = analyze(calibrated(tmp_path, model=str(tmp_path / "run" / "model")))
    base = analyze(calibrated(tmp_path))
    assert by_checkpoint["all"] == exported["all"] != base["all"]
    assert by_checkpoint["traces"] == exported["traces"]


@pytest.mark.parametrize("family", ["deviation", "gradient"])
def test_a_score_is_as_stable_whatever_else_is_taken(home, content, tmp_path, family):
    """Oracle: the analysis that took everything."""
    alone = analyze(calibrated(home, analyze={"scores": [family], "output_dir": str(tmp_path)}))
    assert {name: found["spearman"] for name, found in alone["all"].items()} == {
        name: found["spearman"] for name, found in content["all"].items() if found["family"] == family
    }


def test_an_analysis_agrees_with_itself(home, content):
    recipe = calibrated(
        home, analyze={"drift_from": str(home / "analysis" / "scores.json"), "output_dir": str(home / "again")}
    )
    drift = analyze(recipe)["drift"]
    assert set(drift["spearman"]) == set(content["all"])
    assert set(drift["spearman"].values()) == {1.0}
    assert all(now == before for now, before in drift["ends"].values())


@pytest.mark.parametrize("ablation", ["skip", "reset"])
def test_the_weights_are_the_same_bits_afterwards(tmp_path, monkeypatch, ablation):
    """Gates, ablation and gradients included; no hook, no gradient, no flag is left."""
    kept: list[Any] = []

    def load(recipe: Recipe) -> Any:
        found = load_task(recipe)
        kept.append((found[2], {name: p.detach().clone() for name, p in found[2].named_parameters()}))
        return found

    monkeypatch.setattr(analyzer, "load_task", load)
    assert analyze(calibrated(tmp_path, analyze={"ablation": ablation}))["left_out"] == {}
    module, before = kept[0]
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in module.parameters())
    assert not any(
        m.training or m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules()
    )


def test_resetting_a_layer_is_not_skipping_it(tmp_path):
    found = [
        layers_of(analyze(calibrated(tmp_path, analyze={"scores": ["ablation"], "ablation": mode})), "ablation")
        for mode in ("skip", "reset")
    ]
    assert all(abs(one - other) > 1e-7 for one, other in zip(*found, strict=True))


def test_an_analysis_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    old = tmp_path / "analysis" / "scores.json"
    old.parent.mkdir()
    old.write_text("the old one")

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setitem(PASSES, "fisher", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        analyze(calibrated(tmp_path, analyze={"scores": ["gradient"]}))
    monkeypatch.undo()
    monkeypatch.setattr(analyzer, "recommend", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        analyze(calibrated(tmp_path, analyze={"scores": ["snr"]}))
    assert old.read_text() == "the old one"
    assert list(old.parent.iterdir()) == [old]


# -- what it is for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freeze",
    [
        {"strategy": "ranked", "fraction": 0.5},
        {"strategy": "ranked", "fraction": 0.5, "score": "fisher"},
        {"strategy": "budget", "fraction": None, "budget": {"flops": "70%"}},
        {"strategy": "salf", "fraction": None, "cut": "mode", "gain": "b"},
        {"strategy": "half", "score": "wanda"},
    ],
)
def test_a_run_trains_by_the_file(home, content, tmp_path, freeze):
    """Oracles: by hand, from the numbers of the file."""
    options = {**freeze, "scores": str(home / "analysis" / "scores.json")}
    summary = train(
        tiny_recipe(home, freeze=options, train={"max_steps": 3, "export": False, "output_dir": str(tmp_path)}),
        Console(quiet=True),
    )
    assert summary["steps"] == 3
    trained = {name.split(".")[2] for name in read_record(tmp_path).plan.phases[0].trainable if ".layers." in name}
    values = layers_of(content, freeze.get("score", content["score"]))
    best_first = [str(k) for k in sorted(range(4), key=lambda k: -values[k])]
    if freeze["strategy"] == "ranked":
        assert trained == set(best_first[:2])
    elif freeze["strategy"] == "budget":
        assert summary["flops_vs_full"] <= 0.7
        assert trained
    elif freeze["strategy"] == "half":
        scores, names = content["all"]["wanda"]["scores"], set(read_record(tmp_path).plan.phases[0].trainable)
        for k in range(4):
            own = [name for name in scores if name.startswith(f"model.layers.{k}.self_attn")]
            assert names & set(own) == set(sorted(own, key=lambda name: -scores[name])[:2])
    else:
        end = min(content["cuts"]["b"]["dataset"]["mode"], 3)
        assert trained == {str(k) for k in range(end, 4)}


def test_the_recommendation_is_a_recipe_that_plans_what_it_says(home, content, tmp_path):
    """Oracle: the plan of a run with the lines as they stand."""
    said = content["recommendation"]
    lines = yaml.safe_load(said["recipe"])["freeze"]
    options = {"max_steps": 1, "export": False, "output_dir": str(tmp_path)}
    summary = train(tiny_recipe(home, freeze={"fraction": None, **lines}, train=options), Console(quiet=True))
    trained = {f"layers.{n.split('.')[2]}" for n in read_record(tmp_path).plan.phases[0].trainable if ".layers." in n}
    assert trained == set(said["layers"])
    assert summary["flops_vs_full"] == pytest.approx(said["flops"], abs=0.01)
    assert f"{said['gain']:.0%} of the estimated gain" in said["sentence"]


# -- what the user sees --------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_one_object(tmp_path, capsys):
    recipe = calibrated(
        tmp_path,
        analyze={
            "scores": ["deviation", "gradient_norm", "snr"],
            "recommend": "gradient_norm",
            "budget": {"flops": "80%"},
        },
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert run(["analyze", str(file)]) == 0
    shown = capsys.readouterr()
    for word in (
        "where to fine-tune",
        "deviation_d",
        "gradient_norm",
        "no data",
        "strategy: budget",
        "of the step FLOPs",
        "next would be layers.",
    ):
        assert word in shown.out, word
    assert "scores.png" in shown.err
    assert (tmp_path / "analysis" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert run(["analyze", str(file), "--json", "analyze.scores=[snr]"]) == 0
    assert list(json.loads(capsys.readouterr().out)["all"]) == ["snr"]
    assert run(["analyze", str(file), "analyze.scores=[sn]"]) != 0
    assert "snr" in capsys.readouterr().err


def test_the_figure_is_a_picture_with_and_without_traces(content, tmp_path):
    assert draw_figure(content, tmp_path / "one.png") == ""
    assert draw_figure({**content, "traces": {}, "cuts": {}}, tmp_path / "other.png") == ""
    sizes = [(tmp_path / name).stat().st_size for name in ("one.png", "other.png")]
    assert sizes[0] > sizes[1] > 1000


def test_without_seaborn_it_is_said_what_to_install(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "seaborn", None)
    assert "pip install 'dsfreeze[plot]'" in draw_figure(content, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
