"""Training with a prefix cache. Oracle: the same run without one; to the last bit in fp32 where shapes are the same, within 1e-6 under padding."""

import json
import shutil

import numpy as np
import pytest
from tiny_runs import llama_folder, tiny_recipe

from dsfreeze.loop import train
from dsfreeze.record import read_record

EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))


def losses(folder):
    return [line["loss"] for line in read_record(folder).steps]


def run(folder, tier="memory", **changes):
    """(losses, summary) of a tiny run with that prefix_cache."""
    changes["freeze"] = {"prefix_cache": tier, **changes.get("freeze", {})}
    changes["train"] = {**EPOCHS, "output_dir": str(folder / tier), **changes.get("train", {})}
    shutil.rmtree(changes["train"]["output_dir"], ignore_errors=True)
    summary = train(tiny_recipe(folder, **changes))
    return losses(changes["train"]["output_dir"]), summary


def texts(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def words(count, length, seed):
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcdefgh"), length)) for _ in range(count)]


def rows_of(task, count, seed):
    if task == "classification":
        return [{"text": text, "label": i % 3} for i, text in enumerate(words(count, 12, seed))]
    if task == "tokens":
        draw = np.random.default_rng(seed)
        return [{"text": list(text), "label": draw.integers(0, 3, 9).tolist()} for text in words(count, 9, seed)]
    if task == "causal_lm":
        return [{"text": "".join(words(1, 16 * count - 1, seed))}]
    return [{"prompt": text, "completion": text[::-1]} for text in words(count, 12, seed)]


def fixed(folder, task):
    """Data of a task whose batches all have one shape, of an even length: torch's attention on a CPU rounds rows of an odd one by
    where they lie in memory."""
    labelled = task in ("classification", "tokens")
    return {
        "train": texts(folder, "fixed", rows_of(task, 24, 0)), "eval": texts(folder, "held-out", rows_of(task, 8, 1)),
        "text": None if task == "sft" else "text", "label": "label" if labelled else None,
        "num_labels": 3 if task == "classification" else None, "labels": ["x", "y", "z"] if task == "tokens" else None,
        "max_length": 16 if task in ("causal_lm", "tokens") else 64,
    }  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "tier"),
    [
        ("classification", "memory"),
        *(pytest.param(task, "memory", marks=SLOW) for task in ("tokens", "causal_lm", "sft")),
        pytest.param("causal_lm", "disk", marks=SLOW),
    ],
)
def test_nothing_changes_to_the_last_bit_with_fixed_shapes(tmp_path, task, tier):
    """Losses of every step, and every figure of the evaluations, which read the cache too."""
    data = fixed(tmp_path, task)
    options = {"task": task, "data": data, "train": {"eval_strategy": "epoch"}}
    (wanted, plain), (found, cached) = run(tmp_path, "off", **options), run(tmp_path, tier, **options)
    assert found == wanted
    assert cached["metrics"] == plain["metrics"]
    told = cached["prefix_cache"]
    assert (told["tier"], told["cut"], plain["prefix_cache"]) == (tier, 2, None)
    assert told["hits"] == told["examples"] * 2 // 3, "all epochs but the first"
    assert told["evaluation_hits"] == told["evaluation_examples"] * 3 // 4, "all evaluations but the first"


@pytest.mark.slow
def test_what_is_told_does_not_grow_with_the_turns_of_a_plan(tmp_path):
    """Oracle: a layer of four trains at a time, so that there are four places to cut, whatever the number of turns; each has its sentence,
    with the visits that were left when it was first met."""
    freeze = {"strategy": "badam", "fraction": None, "active_layers": 1, "switch_every": 2}
    told = run(tmp_path, freeze=freeze, train={"max_steps": 60})[1]["prefix_cache"]["told"]
    assert 2 <= len(told) <= 4
    assert len(told) == len({sentence.partition(" layer")[0].rpartition(" ")[2] for sentence in told})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        ({}, {}),
        ({"strategy": "lora", "fraction": 0.5, "adapter": {"r": 2}}, {}),
        ({"adapter": {"kind": "dora", "r": 2, "dropout": 0.1}}, {}),
        ({"strategy": "head"}, {}),
        ({"strategy": "norms", "fraction": 0.5}, {}),
        ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ({}, {"gradient_checkpointing": True}),
    ],
    ids=["bottom", "lora", "dora", "head", "norms", "accumulation", "checkpointing"],
)
def test_nothing_changes_beyond_rounding_under_padding(tmp_path, freeze, options):
    """Examples meet in other batches in each epoch, so that the same products have other shapes."""
    changes = {"freeze": freeze, "train": options}
    (wanted, plain), (found, cached) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert cached["prefix_cache"]["hits"] == 90
    assert cached["trainable"] == plain["trainable"]


@pytest.mark.slow
def test_dropout_above_the_cut_draws_the_same_numbers(tmp_path):
    """The prefix has none, with a cache or without; what is drawn above it does not depend on whether the prefix ran."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3, max_position_embeddings=64,
    )  # fmt: skip
    model = llama_folder(tmp_path / "bert")
    BertForSequenceClassification(config).save_pretrained(model)
    changes = {"model": str(model), "data": fixed(tmp_path, "classification")}
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == wanted
    assert summary["prefix_cache"]["hits"] == 48
    (dry, _) = run(tmp_path, "off", **{**changes, "model": {"name": str(model), "dropout": 0.0}})
    assert dry != pytest.approx(wanted, rel=1e-3), "there is dropout"


@pytest.mark.slow
def test_packed_examples(tmp_path):
    rows = [{"prompt": "ab" * (1 + i % 5), "completion": "c" * (1 + i % 7)} for i in range(40)]
    data = {
        **dict.fromkeys(("text", "label", "num_labels")),
        "train": texts(tmp_path, "packed", rows),
        "eval": None,
        "packing": True,
        "max_length": 64,
    }
    changes = {"task": "sft", "data": data}
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    told = summary["prefix_cache"]
    assert told["hits"] == told["examples"] * 2 // 3 > 0


# -- cuts that move ------------------------------------------------------------------------------------------------


def moving(**frozen):
    """layers.0 and the embedding never train, layers.1 as told: steps in which it is frozen. An epoch has 12 steps."""
    return {
        "strategy": "step_ranges",
        "fraction": None,
        "step_ranges": {"embed": [0, -1], "layers.0": [0, -1], **frozen},
    }


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_cut_that_moves_up_goes_on_from_the_stored_states(tmp_path, tier):
    """layers.1 trains for two epochs and is frozen then, as it has become: an epoch extends the lower states, the next reads."""
    changes = {"freeze": moving(**{"layers.1": [24, -1]}), "train": {"num_train_epochs": 4}}
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, tier, **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    told = summary["prefix_cache"]
    assert (told["cut"], told["hits"], told["extended"], told["examples"]) == (2, 90, 45, 180)


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_cut_that_moves_down_reads_what_is_stored_there(tmp_path, tier):
    """Up and down again: layers.1 is frozen in the second epoch alone; the third reads the first one's states."""
    changes = {"freeze": moving(**{"layers.1": [12, 23]})}
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, tier, **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    told = summary["prefix_cache"]
    assert (told["hits"], told["extended"], told["examples"]) == (45, 45, 135)


@pytest.mark.slow
def test_a_cut_that_moves_down_computes_where_nothing_is_stored(tmp_path):
    changes = {"freeze": moving(**{"layers.1": 24}), "train": {"num_train_epochs": 4}}
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    told = summary["prefix_cache"]
    assert (told["hits"], told["extended"]) == (90, 0), "the second epoch above layers.1, the fourth above layers.0"


@pytest.mark.slow
def test_states_of_weights_that_have_trained_since_are_never_read(tmp_path):
    """layers.1 is frozen, trains, and is frozen again: its states of before are of other weights."""
    changes = {
        "freeze": moving(**{"layers.1": [[0, 11], [24, -1]]}),
        "train": {"num_train_epochs": 3, "learning_rate": 1e-2},
    }
    (wanted, _), (found, summary) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert summary["prefix_cache"]["hits"] == 0
    stale, _ = run(
        tmp_path,
        "memory",
        **{
            **changes,
            "freeze": moving(**{"layers.1": [[0, 11], [24, -1]]}),
            "train": {**changes["train"], "learning_rate": 1e-3},
        },
    )
    assert stale != pytest.approx(wanted, rel=1e-5), "the trained layer makes a difference that the test sees"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["autofreeze", "gradual_unfreezing", "hift"])
def test_methods_that_move_have_the_same_losses(tmp_path, strategy):
    (wanted, _), (found, _) = (
        run(tmp_path, tier, freeze={"strategy": strategy, "fraction": None, "switch_every": 6})
        for tier in ("off", "memory")
    )
    assert found == pytest.approx(wanted, rel=1e-5)
