"""Patterns: whole path components, nearest names, and other trainers' spellings."""

from __future__ import annotations

import anatomies
import pytest
from pydantic import ValidationError

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan
from dsfreeze.strategies.patterns import match_globs, match_regexes

DEEP = anatomies.llama(depth=12)


def layers(anatomy: Anatomy, names) -> set[str]:
    return {anatomy.layer_of[name].name for name in names}


def trained(anatomy: Anatomy, **options) -> set[str]:
    return set(make_plan(anatomy, FreezeOptions(**options)).phases[0].trainable)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.1", {"layers.1"}),
        ("layers.1.*", {"layers.1"}),
        ("model.layers.1", {"layers.1"}),
        ("layers.1?", {"layers.10", "layers.11"}),
        ("layers.[0-2].mlp", {"layers.0", "layers.1", "layers.2"}),
        ("embed", {"embed"}),
        ("norm", {"norm"}),
        ("head", {"head"}),
        ("lm_head", {"head"}),
        ("embed_*", {"embed"}),
        ("layers", {f"layers.{i}" for i in range(12)}),
    ],
)
def test_layers_matched(pattern, found):
    """Oracle: written by hand; the first rows are the reason for whole components (layers.1 is not layers.10)."""
    assert layers(DEEP, match_globs(DEEP, [pattern], "freeze.trainable")) == found


def test_one_matrix_everywhere():
    found = match_globs(DEEP, ["q_proj.weight"], "freeze.trainable")
    assert found == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)}


def test_layers_are_named_alike_in_every_architecture():
    """Oracle: GPT-2 calls it transformer.h.3, BERT bert.encoder.layer.3."""
    for anatomy in (anatomies.gpt2(), anatomies.bert()):
        found = match_globs(anatomy, ["layers.3"], "freeze.trainable")
        assert found == {t.name for t in anatomy.layer("layers.3").tensors}


def test_layers_count_through_both_stacks():
    anatomy = anatomies.t5(depth=2)
    assert layers(anatomy, match_globs(anatomy, ["layers.2"], "x")) == {"layers.2"}
    assert layers(anatomy, match_globs(anatomy, ["decoder.block.0"], "x")) == {"layers.2"}


def test_an_architecture_that_says_layers_in_both_stacks():
    """BART's decoder.layers.0 is this house's layers.2: the pattern `layers.0` means the first layer alone."""
    text = anatomies.t5(depth=2).to_json().replace("coder.block", "coder.layers")
    anatomy = Anatomy.from_json(text)
    assert layers(anatomy, match_globs(anatomy, ["layers.0"], "x")) == {"layers.0"}
    assert layers(anatomy, match_globs(anatomy, ["decoder.layers.0"], "x")) == {"layers.2"}


def test_a_tied_head_is_the_embedding():
    anatomy = anatomies.llama(tied=True)
    for pattern in ("lm_head", "head", "embed_tokens"):
        assert match_globs(anatomy, [pattern], "x") == {"model.embed_tokens.weight"}


def test_trainable_is_all_that_trains():
    anatomy = anatomies.llama()
    assert trained(anatomy, trainable=["layers.3.mlp"]) == {
        f"model.layers.3.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }


def test_frozen_wins_and_alone_trains_the_rest():
    anatomy = anatomies.llama()
    both = trained(anatomy, trainable=["layers.3"], frozen=["*norm"])
    assert both == {t.name for t in anatomy.layer("layers.3").tensors if "norm" not in t.name}
    rest = trained(anatomy, frozen=["embed", "layers.[01]"])
    assert layers(anatomy, rest) == {"layers.2", "layers.3", "norm", "head"}


def test_a_tasks_own_head_trains_unless_told():
    """A classifier starts from random numbers; freezing it because no pattern names it would be a trap."""
    anatomy = anatomies.llama(labels=2)
    assert "score.weight" in trained(anatomy, trainable=["layers.3"])
    assert "score.weight" not in trained(anatomy, trainable=["layers.3"], head="freeze")
    assert "score.weight" not in trained(anatomy, trainable=["layers.3"], frozen=["head"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("modle.layers.2", r"Did you mean 'model\.layers\.2'"),
        ("layers.12", r"layers\.0 to layers\.11"),
        ("layers.2.self_atn.q_proj", r"layers\.2\.self_attn\.q_proj"),
        ("layers.[", "unfinished bracket"),
        ("layers.[]", "unfinished bracket"),
        ("layers.[!]", "unfinished bracket"),
        ("layers..1", "empty component"),
        ("", "empty component"),
        ("Layers.1", "layers.1"),
    ],
)
@pytest.mark.parametrize("option", ["trainable", "frozen"])
def test_mistakes_have_a_mend(option, pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        make_plan(DEEP, FreezeOptions(**{option: [pattern]}))
    assert f"freeze.{option}" in str(caught.value)


def test_one_bad_pattern_among_good_ones():
    with pytest.raises(UserError, match="nothing_here"):
        make_plan(DEEP, FreezeOptions(trainable=["layers.1", "nothing_here"]))


class TestOtherSpellings:
    def test_spectrum(self):
        """Oracle: the file's own meaning; lm_head is tied here, and one tensor."""
        anatomy = anatomies.llama(depth=12, tied=True)
        lines = ["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.1.mlp.down_proj"]
        found, notes = match_regexes(anatomy, lines)
        assert found == {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"}
        assert notes == ()

    def test_a_dot_is_a_dot(self):
        with pytest.raises(UserError, match="matches no tensor"):
            match_regexes(DEEP, ["model.layers.1.self.attn"])
        assert match_regexes(DEEP, ["model.layers.1[01].*down_proj"])[0]

    @pytest.mark.parametrize(
        ("pattern", "rest"),
        [
            (r"^model\.embed_tokenz\.weight$", " Did you mean 'model.embed_tokens.weight'?"),
            ("modle", " Did you mean 'model'?"),
            ("zzzz", ""),
            ("layers.1.zzzz", " Did you mean 'model.layers.1'? The layers are layers.0 to layers.11."),
        ],
    )
    def test_a_line_that_matches_nothing_is_answered_in_plain_names(self, pattern, rest):
        with pytest.raises(UserError) as caught:
            match_regexes(DEEP, [pattern])
        assert str(caught.value) == f"freeze.unfrozen_parameters: '{pattern}' matches no tensor of {DEEP.name}.{rest}"

    def test_numbers_cut_short_are_said(self):
        found, notes = match_regexes(DEEP, ["model.layers.1"])
        assert layers(DEEP, found) == {"layers.1", "layers.10", "layers.11"}
        assert notes[0].startswith("'model.layers.1' also matches model.layers.10.")

    def test_a_head_that_is_named_is_not_remarked_upon(self):
        anatomy = anatomies.llama(labels=2)
        for named in (
            {"frozen": ["head"]},
            {"trainable": ["layers.3", "head"]},
            {"trainable": ["layers.3"], "frozen": ["head"]},
        ):
            assert not any("new head" in note for note in make_plan(anatomy, FreezeOptions(**named)).notes)

    def test_one_note_does_not_displace_another(self):
        anatomy = anatomies.llama(depth=12, labels=2)
        notes = make_plan(anatomy, FreezeOptions(unfrozen_parameters=["model.layers.1"])).notes
        assert notes[0].startswith("'model.layers.1' also matches")
        assert notes[1] == "the task's new head trains too; freeze.head=freeze would keep its random start"

    @pytest.mark.parametrize("pattern", ["^model.embed_tokens.weight$[:32000]", "model.embed_tokens.weight[10:20]"])
    def test_row_ranges_are_refused_with_the_reason(self, pattern):
        with pytest.raises(UserError, match="Rows cannot train alone"):
            match_regexes(DEEP, [pattern])

    def test_bad_expression(self):
        with pytest.raises(UserError, match="not a regular expression"):
            match_regexes(DEEP, ["model.(layers"])

    def test_nearest_name(self):
        with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.down_proj") as caught:
            match_regexes(DEEP, ["^modle.layers.3.mlp.down_proj"])
        assert "freeze.unfrozen_parameters" in str(caught.value)

    @pytest.mark.parametrize(
        ("number", "expected"),
        [
            (2, {"layers.2", "layers.3"}),
            (1, {"layers.3"}),
            (-1, {"layers.0"}),
            (4, {f"layers.{i}" for i in range(4)}),
            (-4, {f"layers.{i}" for i in range(4)}),
        ],
    )
    def test_freeze_trainable_layers(self, number, expected):
        """Oracle: LLaMA-Factory trains the last n, or the first -n; embedding, norm and head are frozen."""
        anatomy = anatomies.llama()
        assert layers(anatomy, trained(anatomy, freeze_trainable_layers=number)) == expected

    @pytest.mark.parametrize("number", [0, 5, -5])
    def test_freeze_trainable_layers_out_of_range(self, number):
        with pytest.raises(UserError, match="has 4 layers"):
            make_plan(anatomies.llama(), FreezeOptions(freeze_trainable_layers=number))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "bottom", "trainable": ["layers.1"]},
        {"strategy": "lora", "freeze_trainable_layers": 2},
        {"trainable": ["layers.1"], "fraction": 0.5},
        {"unfrozen_parameters": ["model"], "count": 2},
    ],
)
def test_patterns_beside_a_rule_contradict(options):
    with pytest.raises(ValidationError, match=r"freeze\.strategy '\w+' does not read it"):
        FreezeOptions(**options)
