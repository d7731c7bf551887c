"""Static strategies against sets written down by hand from their formulas (docs/methods.md)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random

import anatomies
import pytest

from dsfreeze.anatomy import Anatomy, Layer, Tensor, load_shipped
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FREEZE_KEYS, FreezeOptions, Strategy
from dsfreeze.strategies import ADAPTIVE, STRATEGIES, make_plan
from dsfreeze.strategies.ends import tied_names
from dsfreeze.strategies.static import every_nth


def plan_of(anatomy: Anatomy, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options))


def trained(anatomy: Anatomy, **options) -> set[str]:
    return set(plan_of(anatomy, **options).phases[0].trainable)


def frozen_layers(anatomy: Anatomy, **options) -> set[int]:
    names = trained(anatomy, **options)
    return {i for i, layer in enumerate(anatomy.blocks) if not any(t.name in names for t in layer.tensors)}


def whole(anatomy: Anatomy, *layers: str) -> set[str]:
    return {t.name for name in layers for t in anatomy.layer(name).tensors}


DEEP = anatomies.llama(depth=12)
#: One layer of one matrix, and nothing else.
BARE = Anatomy("bare", "none", (Layer("layers.0", (Tensor("layers.0.up.weight", (2, 2), "up"),), "layers.0"),))


def test_every_name_the_recipe_knows_has_a_strategy():
    """Oracle: the recipe's Literal."""
    assert set(STRATEGIES) == set(Strategy.__args__)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"strategy": "bottom", "fraction": 0.25}, {0, 1, 2}),
        ({"strategy": "bottom"}, set(range(6))),
        ({"strategy": "bottom", "count": 5}, set(range(5))),
        ({"strategy": "bottom", "fraction": 0.0}, set()),
        ({"strategy": "top", "fraction": 0.25}, {9, 10, 11}),
        ({"strategy": "top", "count": 0}, set()),
        ({"strategy": "interval", "fraction": 0.5}, {1, 3, 5, 7, 9, 11}),
        ({"strategy": "interval", "fraction": 0.5, "offset": 0}, {0, 2, 4, 6, 8, 10}),
        ({"strategy": "interval", "fraction": 0.25}, {3, 7, 11}),
        ({"strategy": "interval", "fraction": 0.75}, set(range(12)) - {3, 7, 11}),
        ({"strategy": "interval", "count": 4}, {2, 5, 8, 11}),
        ({"strategy": "interval"}, {1, 3, 5, 7, 9, 11}),
        ({"strategy": "middle", "count": 4}, {0, 1, 10, 11}),
        ({"strategy": "middle", "count": 5}, {0, 1, 2, 10, 11}),
        ({"strategy": "random", "count": 4, "seed": 7}, set(Random(7).sample(range(12), 4))),
        ({"strategy": "full"}, set()),
        ({"strategy": "head"}, set(range(12))),
    ],
)
def test_layers_by_position(options, frozen):
    """Oracle: the formulas, worked out by hand for 12 layers."""
    assert frozen_layers(DEEP, **options) == frozen


@pytest.mark.parametrize(
    ("size", "fraction", "expected"), [(8, "1/2", {1, 3, 5, 7}), (9, "1/3", {2, 5, 8}), (9, "2/3", {0, 1, 3, 4, 6, 7})]
)
def test_every_nth(size, fraction, expected):
    """Oracle: {i : (i + 1) % every == 0}, and its complement above one half."""
    assert every_nth(size, Fraction(fraction)) == expected


def test_interval_says_what_resulted():
    """Oracle: round(1 / 0.4) = 2, so 6 of 12 freeze where 4 were asked for."""
    plan = plan_of(DEEP, strategy="interval", fraction=0.4)
    assert "6 of 12 layers frozen (asked for fraction 0.4" in plan.notes[0]


@pytest.mark.parametrize(("how", "number"), [("floor", 4), ("nearest", 5), ("ceil", 5)])
def test_rounding(how, number):
    """Oracle: 18 x 0.25 = 4.5 (Gemma-2b, the case the paper leaves open)."""
    gemma = anatomies.llama(depth=18)
    assert frozen_layers(gemma, fraction=0.25, rounding=how) == set(range(number))


def test_fraction_is_taken_as_written():
    """Oracle: 0.29 x 100 is 29; in binary floating point it is 28.999..."""
    assert len(frozen_layers(anatomies.llama(depth=100), fraction=0.29)) == 29


class TestEnds:
    """Embedding, norm and head; oracle: the sets written out."""

    def test_bottom_freezes_the_embedding_and_trains_norm_and_head(self):
        anatomy = anatomies.llama()
        assert trained(anatomy, count=2) == whole(anatomy, "layers.2", "layers.3", "norm", "head")

    def test_top_trains_the_embedding(self):
        anatomy = anatomies.llama()
        expected = whole(anatomy, "embed", "layers.0", "layers.1", "norm", "head")
        assert trained(anatomy, strategy="top", count=2) == expected

    def test_options_win(self):
        anatomy = anatomies.llama()
        names = trained(anatomy, count=2, embed="train", norm="freeze", head="freeze")
        assert names == whole(anatomy, "embed", "layers.2", "layers.3")

    def test_all_layers_frozen_leaves_norm_and_head(self):
        anatomy = anatomies.llama()
        assert trained(anatomy, fraction=1.0) == whole(anatomy, "norm", "head")

    def test_a_tied_head_freezes_with_the_embedding(self):
        anatomy = anatomies.llama(tied=True)
        plan = plan_of(anatomy, count=2)
        assert set(plan.phases[0].trainable) == whole(anatomy, "layers.2", "layers.3", "norm")
        assert any("lm_head.weight is tied to model.embed_tokens.weight" in note for note in plan.notes)

    def test_training_a_tied_head_trains_the_embedding(self):
        anatomy = anatomies.llama(tied=True)
        plan = plan_of(anatomy, count=2, head="train")
        assert "model.embed_tokens.weight" in plan.phases[0].trainable
        assert any("backward runs through every layer" in note for note in plan.notes)

    @pytest.mark.parametrize(("embed", "head"), [("freeze", "train"), ("train", "freeze")])
    def test_contradicting_a_tie_names_both(self, embed, head):
        with pytest.raises(UserError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
            plan_of(anatomies.llama(tied=True), embed=embed, head=head)

    def test_an_end_the_model_lacks(self):
        with pytest.raises(UserError, match="has no norm"):
            plan_of(anatomies.bert(), norm="train")

    def test_an_encoder_frozen_whole_takes_its_norm_along(self):
        anatomy = anatomies.t5()
        assert "encoder.final_layer_norm.weight" not in trained(anatomy, count=2)
        assert "encoder.final_layer_norm.weight" in trained(anatomy, count=1)


class TestGranularity:
    """Oracle: names worked out by hand on two layers."""

    def test_matrix_takes_weights_in_model_order_and_biases_follow(self):
        anatomy = anatomies.llama(depth=2, qkv_bias=True)
        frozen = whole(anatomy, "layers.0", "layers.1") - trained(anatomy, granularity="matrix", count=2)
        stem = "model.layers.0.self_attn"
        assert frozen == {f"{stem}.{x}_proj.{y}" for x in "qk" for y in ("weight", "bias")}

    def test_a_frozen_first_matrix_leaves_the_embedding_trainable(self):
        assert "model.embed_tokens.weight" in trained(anatomies.llama(), granularity="matrix", count=2)

    def test_category_freezes_half_of_each(self):
        anatomy = anatomies.llama(depth=4)
        names = trained(anatomy, strategy="random", granularity="category", fraction=0.5, seed=3)
        for category in ("q", "k", "v", "o", "gate", "up", "down"):
            own = [t.name for layer in anatomy.blocks for t in layer.tensors if t.category == category]
            assert len(names & set(own)) == 2
        norms = [t.name for layer in anatomy.blocks for t in layer.tensors if t.category == "norm"]
        assert len(names & set(norms)) == 4

    def test_category_bottom_is_by_depth(self):
        anatomy = anatomies.phi3()
        assert frozen_layers(anatomy, granularity="category") == {0, 1}

    def test_bias_trains_the_biases_of_the_trainable_layers(self):
        anatomy = anatomies.bert(depth=2)
        biases = {t.name for t in anatomy.layer("layers.1").tensors if t.is_bias}
        assert trained(anatomy, granularity="bias", count=1) == biases | whole(anatomy, "head")

    def test_bias_without_biases(self):
        with pytest.raises(UserError, match="Strategy 'norms'"):
            plan_of(anatomies.llama(), granularity="bias")


class TestKinds:
    """Oracle: the definitions in docs/methods.md, spelled out."""

    def test_bitfit(self):
        anatomy = anatomies.bert()
        biases = {t.name for t in anatomy.tensors if t.name.endswith(".bias")}
        assert trained(anatomy, strategy="bitfit") == biases | whole(anatomy, "head")

    def test_a_head_with_few_rows_is_a_tasks_own(self):
        """BERT looks up 2 token types and 16 positions as well as words; 2 labels do not make a language model."""
        for labels in (2, 16):
            anatomy = anatomies.bert(labels=labels)
            assert whole(anatomy, "head") <= trained(anatomy, strategy="norms")

    def test_bitfit_on_a_model_without_biases_offers_norms(self):
        with pytest.raises(UserError, match="'norms'"):
            plan_of(anatomies.llama(), strategy="bitfit")

    def test_norms_of_a_language_model(self):
        anatomy = anatomies.llama()
        assert trained(anatomy, strategy="norms") == {t.name for t in anatomy.tensors if "norm" in t.name}

    def test_norms_train_with_their_biases(self):
        anatomy = anatomies.bert()
        expected = {t.name for t in anatomy.tensors if "LayerNorm" in t.name} | whole(anatomy, "head")
        assert trained(anatomy, strategy="norms") == expected

    def test_attention_can_be_combined_with_a_fraction(self):
        anatomy = anatomies.llama(depth=2, labels=3)
        projections = {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"}
        assert trained(anatomy, strategy="attention", fraction=0.5) == projections | {"score.weight"}

    def test_attention_takes_fused_projections(self):
        names = trained(anatomies.phi3(depth=1), strategy="attention")
        assert names == {f"model.layers.0.self_attn.{x}_proj.weight" for x in ("qkv", "o")}

    def test_head(self):
        anatomy = anatomies.bert()
        assert trained(anatomy, strategy="head") == whole(anatomy, "head")

    def test_head_tied(self):
        with pytest.raises(UserError, match="tied"):
            plan_of(anatomies.llama(tied=True), strategy="head")

    def test_head_frozen_is_a_contradiction(self):
        with pytest.raises(UserError, match=r"freeze\.head"):
            plan_of(anatomies.llama(), strategy="head", head="freeze")


class TestAdapters:
    """Oracle: peft's names, and that nothing but adapters and a task's own head trains."""

    def test_lora_is_on_every_layer(self):
        anatomy = anatomies.llama(labels=3)
        plan = plan_of(anatomy, strategy="lora")
        matrices = [t for layer in anatomy.blocks for t in layer.tensors if t.category != "norm"]
        assert plan.adapter.targets == tuple(t.name for t in matrices)
        rest = {name for name in plan.phases[0].trainable if ".lora_" not in name}
        assert rest == {"score.weight"}
        assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in plan.phases[0].trainable

    def test_a_language_models_head_stays_frozen(self):
        assert not [n for n in plan_of(anatomies.llama(), strategy="lora").phases[0].trainable if ".lora_" not in n]

    def test_dora_has_magnitudes(self):
        plan = plan_of(anatomies.llama(), strategy="dora", adapter={"r": 2})
        assert (plan.adapter.kind, plan.adapter.r) == ("dora", 2)
        assert any("lora_magnitude_vector" in name for name in plan.phases[0].trainable)

    @pytest.mark.parametrize("strategy", ["bottom", "random", "attention", "interval"])
    def test_adapters_sit_on_the_trainable_layers_alone(self, strategy):
        anatomy = anatomies.phi3(depth=4)
        free = frozen_layers(anatomy, strategy=strategy, count=2)
        plan = plan_of(anatomy, strategy=strategy, count=2, adapter={"categories": ["q", "down"]})
        adapted = {int(name.split(".")[2]) for name in plan.adapter.targets}
        assert adapted == {0, 1, 2, 3} - free
        kinds = {name.split(".")[-2] for name in plan.adapter.targets}
        assert kinds == ({"qkv_proj"} if strategy == "attention" else {"qkv_proj", "down_proj"})

    def test_unknown_category(self):
        with pytest.raises(UserError, match=r"freeze.adapter.categories names 'gat'.*Did you mean 'gate'"):
            plan_of(anatomies.llama(), adapter={"categories": ["gat"]})

    def test_no_category(self):
        with pytest.raises(UserError, match=r"none of the categories \(none\) is among"):
            plan_of(anatomies.llama(), adapter={"categories": []})

    @pytest.mark.parametrize("granularity", ["layer", "matrix"])
    def test_what_takes_turns_holds_adapters(self, granularity):
        """Oracle: by hand: two layers of seven matrices; with q and v adapted, layers take turns or four matrices."""
        options = FreezeOptions(strategy="badam", switch_every=1, order="ascending", granularity=granularity,
                                adapter={"categories": ["q", "v"]})  # fmt: skip
        plan = make_plan(anatomies.llama(depth=2), options, 8)
        turns = [{name.rpartition(".lora_")[0] for name in phase.trainable} for phase in plan.phases[:4]]
        q, v = (f"model.layers.{{}}.self_attn.{name}_proj" for name in "qv")
        by_layer = [{q.format(i), v.format(i)} for i in (0, 1)]
        by_matrix = [{q.format(0)}, {v.format(0)}, {q.format(1)}, {v.format(1)}]
        assert turns == (by_layer * 2 if granularity == "layer" else by_matrix)
        assert not any("packed expert" in note for note in plan.notes)

    @pytest.mark.parametrize("strategy", ["norms", "bitfit"])
    def test_nothing_to_sit_on(self, strategy):
        with pytest.raises(UserError, match="no matrix"):
            plan_of(anatomies.gpt2(), strategy=strategy, adapter={})

    def test_lora_that_says_dora(self):
        with pytest.raises(UserError, match="'dora'"):
            plan_of(anatomies.llama(), strategy="lora", adapter={"kind": "dora"})


class TestRanked:
    """Oracle: order by (score, depth), written out."""

    def options(self, tmp_path, scores, **more):
        path = tmp_path / "scores.json"
        path.write_text(json.dumps({"scores": scores}))
        return {"strategy": "ranked", "scores": path, **more}

    def test_freezes_the_lowest(self, tmp_path):
        scores = {"layers.0": 3, "layers.1": 0.5, "layers.2": 2, "layers.3": 1, "head": 9}
        assert frozen_layers(anatomies.llama(), **self.options(tmp_path, scores)) == {1, 3}

    def test_ties_freeze_from_the_bottom(self, tmp_path):
        scores = {f"layers.{i}": 1.0 for i in range(4)}
        assert frozen_layers(anatomies.llama(), **self.options(tmp_path, scores)) == {0, 1}

    def test_by_tensor(self, tmp_path):
        anatomy = anatomies.llama(depth=1)
        scores = {t.name: float(i) for i, t in enumerate(reversed(anatomy.tensors))}
        names = trained(anatomy, **self.options(tmp_path, scores, granularity="matrix", count=1))
        assert "model.layers.0.post_attention_layernorm.weight" not in names

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"scores": {"layers.0": NaN}}', "nan"),
            ('{"scores": {"layers.0": "high"}}', "not a number"),
            ('{"scores": {"layers.0": 1, "layers.1": 1, "layers.2": 1}}', r"layers\.3"),
            ('{"score": {}}', 'no "scores"'),
            ("{", "JSON"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        path = tmp_path / "scores.json"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            plan_of(anatomies.llama(), strategy="ranked", scores=path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r'no file .*\{"scores": \{"layers\.0"'):
            plan_of(anatomies.llama(), strategy="ranked", scores=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("anatomy", "options", "told"),
    [
        (anatomies.llama(labels=3), {"strategy": "head", "head": "freeze"}, "freeze.head is 'freeze'. Drop one of the two."),
        (anatomies.llama(labels=3), {"strategy": "head", "adapter": {}}, "trains no layer that freeze.adapter could sit on. Use strategy 'lora'."),
        (anatomies.llama(tied=True), {"strategy": "head"}, "lm_head.weight is tied to model.embed_tokens.weight, the embedding, so both would train."),
    ],
)  # fmt: skip
def test_a_head_that_cannot_train_alone(anatomy, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        plan_of(anatomy, **options)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_kind_of_adapter_is_the_strategys(kind):
    assert plan_of(anatomies.llama(), strategy=kind).adapter.kind == kind


@pytest.mark.parametrize("strategy", ["full", "head"])
@pytest.mark.parametrize(("given", "told"), [({"fraction": 0.5}, "fraction"), ({"count": 3}, "count"), ({}, None)])
def test_a_number_that_means_nothing_is_dropped_and_said(strategy, given, told):
    anatomy = anatomies.llama(labels=2)
    plan = plan_of(anatomy, strategy=strategy, **given)
    expected = (f"freeze.{told} has no meaning for '{strategy}' and is not used",) if told else ()
    assert (plan.notes, plan.phases) == (expected, plan_of(anatomy, strategy=strategy).phases)


def test_the_only_layer_can_freeze():
    assert frozen_layers(anatomies.llama(depth=1), strategy="interval", count=1) == {0}


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("attention", "has no tensor of the categories q, k, v, o, qkv."),
        ("norms", "has no norm with weights."),
        ("head", "has no head. Choose another strategy, or another task."),
    ],
)
def test_a_model_without_what_a_strategy_trains(strategy, told):
    with pytest.raises(UserError) as caught:
        plan_of(BARE, strategy=strategy)
    assert str(caught.value) == f"Strategy '{strategy}': bare {told}"


def test_above_one_half_an_offset_counts_for_what_trains():
    """Oracle: by hand: of twelve, every fourth from the second trains, 1, 5 and 9."""
    assert frozen_layers(DEEP, strategy="interval", fraction=0.75, offset=1) == set(range(12)) - {1, 5, 9}


@pytest.mark.parametrize(
    ("aliases", "head"),
    [
        (("lm_head.weight",), "lm_head.weight"),
        (("lm_head.weight", "decoder.embed_tokens.weight"), "lm_head.weight"),
        (("decoder.embed_tokens.weight", "embed_out.weight", "encoder.embed_tokens.weight"), "embed_out.weight"),
        (("a.weight", "b.weight"), "b.weight"),
    ],
)
def test_a_tied_matrix_is_named_as_the_head_that_it_is(aliases, head):
    tied = Tensor("model.embed_tokens.weight", (4, 4), "embed", 32, aliases)
    assert tied_names(tied) == (head, "model.embed_tokens.weight")


def test_packed_experts_take_no_adapter():
    """Oracle: by hand: 94 layers, each with gate and up in one tensor and down in another, three axes each."""
    experts = load_shipped("qwen3-235b-a22b")
    told = "188 packed expert tensors take no adapter and stay frozen"
    plan = plan_of(experts, strategy="lora", adapter={"categories": ["q", "gate", "up", "down"]})
    assert told in plan.notes
    assert {name.split(".")[-2] for name in plan.adapter.targets} == {"q_proj"}
    assert told not in plan_of(experts, strategy="lora", adapter={"categories": ["q"]}).notes
    message = "has no matrix to sit on: none of the categories gate, up is among what this choice of layers trains."
    with pytest.raises(UserError, match=message):
        plan_of(experts, strategy="lora", adapter={"categories": ["gate", "up"]})


def test_scores_of_another_model_are_refused(tmp_path):
    """Oracle: a digest that no model has; `ranked` hands its model to the reader of scores."""
    path = tmp_path / "scores.json"
    scores = {f"layers.{i}": 1.0 for i in range(4)}
    path.write_text(json.dumps({"scores": scores, "model": {"name": "other", "layers": 4, "digest": "0" * 64}}))
    with pytest.raises(UserError, match="was made for other with 4 layers"):
        plan_of(anatomies.llama(), strategy="ranked", scores=path)


def test_count_beyond_the_layers():
    with pytest.raises(UserError, match="from 0 to 4"):
        plan_of(anatomies.llama(), count=5)


def test_everything_frozen():
    with pytest.raises(UserError, match="nothing to train"):
        plan_of(anatomies.llama(), fraction=1.0, norm="freeze", head="freeze")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["freeze.fraction=1.0", "freeze.norm=freeze", "freeze.head=freeze"], "nothing to train"),
        (["freeze.trainable=modle.layers.2"], "model.layers.2"),
        (["freeze.trainable=layers.["], "unfinished bracket"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_deepspeed_is_imported(words, message):
    """Oracle: exit code, message and sys.modules of a fresh process. DeepSpeed itself says IndexError, or nothing."""
    code = (
        "import sys; from dsfreeze.__main__ import main\n"
        f"sys.argv = ['dsfreeze', 'plan', 'model=smollm2-135m', *{words}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'deepspeed') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stderr
    assert message in " ".join(done.stderr.split())


def test_unknown_strategy_has_a_nearest_name():
    options = FreezeOptions().model_copy(update={"strategy": "buttom"})
    with pytest.raises(UserError, match="'bottom'"):
        make_plan(anatomies.llama(), options)


def test_a_number_that_means_nothing_is_said():
    """`full` beside a recipe's fraction is a natural override: it wins, aloud."""
    plan = plan_of(anatomies.llama(), strategy="full", fraction=0.5)
    assert frozen_layers(anatomies.llama(), strategy="full", fraction=0.5) == set()
    assert any("not used" in note for note in plan.notes)


#: A value for each key of FREEZE_KEYS that changes the plan of a strategy that reads it.
TOLD = {
    "fraction": {"fraction": 0.75}, "count": {"count": 1}, "rounding": {"fraction": 0.3, "rounding": "ceil"}, "offset": {"offset": 0},
    "granularity": {"granularity": "matrix", "fraction": 0.4}, "seed": {"seed": 5, "order": "random"}, "scores": {"scores": "scores.json"},
    "trainable": {"trainable": ["layers.1"]}, "frozen": {"frozen": ["layers.2.attention"]}, "unfrozen_parameters": {"unfrozen_parameters": ["bert"]},
    "freeze_trainable_layers": {"freeze_trainable_layers": 2},
    "active_layers": {"active_layers": 3}, "switch_every": {"switch_every": 5}, "order": {"order": "descending"},
    "state": {"state": "offload"}, "drop_master": {"drop_master": True, "state": "clear"}, "rewarmup_steps": {"rewarmup_steps": 3},
    "discriminative_factor": {"discriminative_factor": 2.6}, "t0": {"t0": 0.5}, "power": {"power": 1},
    "scale_rates": {"scale_rates": False}, "step_ranges": {"step_ranges": {"layers.0": 7}},
    "score": {"score": "other"}, "budget": {"budget": {"flops": "75%"}}, "trace": {"trace": "early"}, "gain": {"gain": "c"},
    "tau": {"tau": 0.2, "gain": "d"}, "cut": {"cut": "q25"}, "min_layers": {"min_layers": 3}, "max_layers": {"max_layers": 1},
    "padding": {"padding": "fill", "max_layers": 3}, "flat": {"flat": "train_all", "trace": "flat"},
    "level": {"level": "layer"}, "round": {"round": 2}, "masks": {"masks": "complement", "round": 1}, "depth": {"depth": "top"},
    "balanced": {"balanced": True}, "count_by": {"count_by": "matrices", "level": "model"},
}  # fmt: skip
#: Ends of freezing 1, 2, 2, 3 by the plain gain, and 1, 3, 3, 3 by gain c; one layer on; and none.
EARLY = [[1.0, 0.5, 0.45, 0.4, 0.38]] * 4
TRACES = {
    "deviation": [EARLY[0], [1.0, 0.9, 0.6, 0.4, 0.38], [1.0, 0.9, 0.6, 0.4, 0.38], [1.0, 0.95, 0.9, 0.5, 0.45]],
    "early": EARLY,
    "flat": [[1.0] * 5] * 4,
}
#: Read in order to say that they are not used (see test_a_number_that_means_nothing_is_said).
SAID_UNUSED = {(strategy, key) for strategy in ("full", "head") for key in ("fraction", "count")}


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(ADAPTIVE)))  # those: tests/test_adaptive.py
def test_the_table_of_keys_is_what_strategies_do(strategy, tmp_path, monkeypatch):
    """Oracle: the plan, which a key changes exactly where FREEZE_KEYS says that the strategy reads it."""
    monkeypatch.chdir(tmp_path)
    anatomy = anatomies.bert(depth=4)
    for name, lowest in (("own", "layers.3"), ("scores", "layers.0")):
        scores = {layer.name: float(layer.name != lowest) for layer in anatomy.blocks}
        other = {layer.name: 5.0 if layer.name == lowest else 1.0 for layer in anatomy.blocks}
        content = {
            "scores": scores | dict.fromkeys(anatomy.by_name, 1.0), "traces": TRACES if name == "own" else {**TRACES, "deviation": EARLY},
            "all": {"other": {"scores": other | dict.fromkeys(anatomy.by_name, 1.0)}},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    required: dict = {
        "ranked": {"scores": Path("own.json")}, "patterns": {"trainable": ["layers.2"]},
        "owlore": {"scores": Path("own.json"), "active_layers": 2}, "hift": {"state": "keep"},
        "step_ranges": {"step_ranges": {"layers.1": 5}}, "salf": {"scores": Path("own.json")}, "half": {"seed": 4},
        "budget": {"scores": Path("own.json"), "budget": {"flops": "90%"}},
    }.get(strategy, {})  # fmt: skip
    plain = FreezeOptions(strategy=strategy, **required)
    assert set(TOLD) == {key for key, readers in FREEZE_KEYS.items() if set(readers) - set(ADAPTIVE)}
    for key, values in TOLD.items():
        beside = {name: value for name, value in values.items() if name != key}
        if strategy == "half" and key in ("scores", "score"):  # those of the file are layers'
            beside |= {"level": "layer", **({"scores": Path("own.json")} if key == "score" else {})}
        before = plain.model_copy(update=beside)
        after = before.model_copy(update={key: Path(values[key]) if key == "scores" else values[key]})
        changed = make_plan(anatomy, before, 120).digest != make_plan(anatomy, after, 120).digest
        assert changed == (strategy in FREEZE_KEYS[key] and (strategy, key) not in SAID_UNUSED), key


def test_a_resolved_recipe_plans_the_same():
    """Oracle: the plan before the options were written out and read back (a record's recipe must resume)."""
    for given in ({"trainable": ["layers.2"]}, {"strategy": "head"}, {"strategy": "dora"}, {"count": 1}):
        options = FreezeOptions(**given)
        again = FreezeOptions(**json.loads(json.dumps(options.model_dump(mode="json"))))
        anatomy = anatomies.bert()
        assert make_plan(anatomy, options).digest == make_plan(anatomy, again).digest
