"""The file of scores and traces. Oracles: what was written into it, read back; for anything else, a UserError that says what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anatomies
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsfreeze.anatomy import load_shipped
from dsfreeze.errors import UserError
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan
from dsfreeze.strategies.scores_file import model_digest, read_analysis, read_scores, read_traces

LLAMA = anatomies.llama(depth=2)
SIMPLE = {"scores": {"layers.0": 1, "layers.1": 0.5}}
#: As `dsfreeze analyze` writes it, as far as strategies read it.
WHOLE = {
    "model": {"name": "tiny", "layers": 2, "digest": model_digest(LLAMA)},
    "score": "change",
    **SIMPLE,
    "all": {"change": {"scores": SIMPLE["scores"]}, "fisher": {"scores": {"layers.0": -1.0, "layers.1": 7.5}}},
    "traces": {"deviation": [[1.0, 0.5, 0.25], [1, 0, 0]], "logit_lens": [[3.0, 2.0, 1.0]]},
}


@pytest.fixture
def written(tmp_path):
    def write(content) -> Path:
        path = tmp_path / "scores.json"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def told(read, *words) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    return str(caught.value)


# -- what is read --------------------------------------------------------------------------------------------------


def test_the_simple_form_and_the_whole_one(written):
    assert read_scores(written(SIMPLE)) == SIMPLE["scores"]
    assert read_scores(written(SIMPLE), None, LLAMA) == SIMPLE["scores"], "without a model it is about any"
    assert read_scores(written({**SIMPLE, "model": {"name": "mine"}}), None, LLAMA) == SIMPLE["scores"]
    assert read_scores(written(WHOLE), None, LLAMA) == SIMPLE["scores"]


def test_another_score_of_the_file(written):
    assert read_scores(written(WHOLE), "fisher", LLAMA) == {"layers.0": -1.0, "layers.1": 7.5}


def test_traces(written):
    assert read_traces(written(WHOLE), "deviation", LLAMA) == [[1.0, 0.5, 0.25], [1.0, 0.0, 0.0]]
    assert read_traces(written(WHOLE), "logit_lens", LLAMA) == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("scores", "frozen"), [(None, "layers.1"), ("change", "layers.1"), ("fisher", "layers.0")], ids=str
)
def test_freeze_score_picks_for_ranked(scores, frozen, written):
    """Oracle: the lower of two scores."""
    plan = make_plan(LLAMA, FreezeOptions(strategy="ranked", scores=written(WHOLE), score=scores))
    trained = {LLAMA.layer_of[name].name for name in plan.phases[0].trainable}
    assert {"layers.0", "layers.1"} - trained == {frozen}


@pytest.mark.parametrize("content", [SIMPLE, WHOLE], ids=["simple", "whole"])
def test_owlore_draws_by_either_form(content, written):
    options = FreezeOptions(strategy="owlore", scores=written(content), active_layers=1, switch_every=5)
    plan = make_plan(LLAMA, options, 1000)
    turns = {LLAMA.layer_of[name].name for phase in plan.phases for name in phase.trainable}
    assert {"layers.0", "layers.1"} <= turns


def test_a_whole_analysis(written, tmp_path):
    """Oracle: what was written; then what is none, by its path and with what to name instead."""
    assert read_analysis(written(WHOLE)) == WHOLE
    for content in (SIMPLE, {**WHOLE, "all": []}, {**WHOLE, "model": {"digest": 3}}, [], b"{", b"\xff"):
        path = written(content)
        message = told(read_analysis, path)
        assert message.startswith(f"{path} is no analysis")
        assert message.endswith(". Name a scores.json that `dsfreeze analyze` wrote.")
    assert "(FileNotFoundError" in told(read_analysis, tmp_path / "none.json")


# -- which model ---------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_layers_whatever_the_head():
    """Oracle: the same body under another head or vocabulary; another width, depth or name of a tensor."""
    assert model_digest(anatomies.llama(depth=2, labels=3)) == model_digest(LLAMA)
    assert model_digest(anatomies.llama(depth=2, vocab=99, tied=True)) == model_digest(LLAMA)
    renamed = [replace(t, name=t.name.replace("q_proj", "query")) for t in LLAMA.blocks[0].tensors]
    layers = (LLAMA.layers[0], replace(LLAMA.blocks[0], tensors=tuple(renamed)), *LLAMA.layers[2:])
    others = [anatomies.llama(depth=3), anatomies.llama(depth=2, d=16), replace(LLAMA, layers=layers)]
    assert len({model_digest(other) for other in (LLAMA, *others)}) == 4


def test_a_shipped_model_keeps_its_digest_under_another_task():
    whole = load_shipped("smollm2-135m")
    assert model_digest(whole.for_task("classification", 3)) == model_digest(whole)


@pytest.mark.parametrize("read", [read_scores, read_traces])
def test_a_file_of_another_model(read, written):
    """Oracle: both models by name and number of layers, and what to do."""
    other = anatomies.llama(depth=3)
    message = told(read, written(WHOLE), "deviation" if read is read_traces else None, other)
    assert "was made for tiny with 2 layers" in message
    assert "not those of tiny-llama (3 layers). Analyze this model: `dsfreeze analyze RECIPE`." in message


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"),
    [("NaN", "nan, which cannot be ranked"), ("Infinity", "inf, which cannot"), ("-Infinity", "-inf, which cannot"),
     ("1e999", "inf, which cannot"), ("1" + "0" * 400, "cannot be ranked"), ("-1" + "0" * 400, "cannot be ranked"),
     ('"high"', "'high', which is not a number"), ("true", "True, which is not a number"), ("null", "None, which is not"),
     ("[1]", "[1], which is not"), ("{}", "{}, which is not")],
    ids=["nan", "inf", "-inf", "1e999", "huge", "-huge", "text", "bool", "null", "list", "mapping"],
)  # fmt: skip
def test_what_is_no_score(value, what, written):
    """Oracle: the name, the value, and what a score is; alike among the scores, in `all` and in traces."""
    plain = f'{{"scores": {{"layers.0": 1, "layers.1": {value}}}'
    path = written(plain + "}")
    message = told(read_scores, path)
    assert f"'{path}' gives layers.1 the score" in message
    assert what in message
    assert message.endswith(("Write one.", "Write a finite number."))
    among = written(f'{plain}, "all": {{"x": {{"scores": {{"layers.0": {value}}}}}}}, "traces": {{"t": [[1, 1, 1], [1, {value}, 1]]}}}}')  # fmt: skip
    assert f"'{path}' gives layers.0 the score" in told(read_scores, among, "x")
    assert f"'{path}' gives traces.t[1][1] the score" in told(read_traces, among, "t", LLAMA)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "cannot be read as JSON"), (b"\xff\xfe\x00", "cannot be read as JSON"), (b"{", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"), (b'{"scores": ' + b'{"a": ' * 100_000, "cannot be read as JSON"),
        (b'{"scores": ' + b"9" * 5000 + b"}", "cannot be read as JSON"), (b"[1, 2]", 'has no "scores"'),
        (b'"scores"', 'has no "scores"'), (b"{}", 'has no "scores"'), (b'{"scores": [1]}', 'has no "scores"'),
        (b'{"scores": null, "model": 3}', 'has no "scores"'),
    ],
    ids=["empty", "bytes", "cut", "deep", "deep-mapping", "digits", "list", "text", "nothing", "scores-list", "null"],
)  # fmt: skip
def test_what_is_no_file_of_scores(content, what, written):
    message = told(read_scores, written(content), None, LLAMA)
    assert what in message
    assert '{"scores": {"layers.0": 0.12, ...}}' in message


def test_no_file_or_no_file_at_all(tmp_path):
    assert "there is no file" in told(read_scores, tmp_path / "none.json")
    assert "cannot be read" in told(read_scores, tmp_path)
    assert "cannot be read" in told(read_scores, Path("\0"))


@pytest.mark.parametrize("known", [WHOLE["all"], None, [], {"change": 3}, {"fisher": None}])
def test_a_score_that_is_not_there(known, written):
    """Oracle: the nearest name where there is one, and what to do in any case."""
    message = told(read_scores, written({**WHOLE, "all": known}), "fischer", LLAMA)
    assert "has no score 'fischer'" in message
    assert "Leave freeze.score out" in message
    assert "`dsfreeze analyze RECIPE`" in message
    assert ("Did you mean 'fisher'" in message) == (known is not None and "fisher" in known)
    assert "Valid: ." not in message


def test_a_score_without_scores(written):
    assert "has no score 'fisher'" in told(read_scores, written({**WHOLE, "all": {"fisher": 3}}), "fisher")
    assert 'has no "scores"' in told(read_scores, written({**WHOLE, "all": {"fisher": {}}}), "fisher")


@pytest.mark.parametrize("known", [None, [], {}, {"deviations": []}, 3])
def test_traces_that_are_not_there(known, written):
    message = told(read_traces, written({**WHOLE, "traces": known}), "deviation", LLAMA)
    assert "holds no traces 'deviation'" in message
    assert "`dsfreeze analyze RECIPE analyze.scores=deviation`" in message
    assert ("Did you mean 'deviations'" in message) == (known == {"deviations": []})


@pytest.mark.parametrize(
    "rows", [[], {}, None, 3, "abc", [1, 2, 3], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3], [1, 2]], ["abc"]]
)
def test_traces_of_another_shape(rows, written):
    """Oracle: two layers make three latent spaces."""
    message = told(read_traces, written({"traces": {"deviation": rows}}), "deviation", LLAMA)
    assert "must be lists of 3 numbers, one for the embedding and each layer" in message


@pytest.mark.parametrize("strategy", ["ranked", "owlore", "budget"])
@pytest.mark.parametrize("granularity", ["layer", "matrix"])
def test_a_unit_without_a_score(strategy, granularity, written):
    """Oracle: the first unit that lacks one, how many more do, and which names are asked for."""
    more = {"budget": {"flops": "90%"}} if strategy == "budget" else {}
    options = FreezeOptions(
        strategy=strategy, scores=written({"scores": {"layers.0": 1}}), granularity=granularity, **more
    )
    message = told(make_plan, LLAMA, options, 100)
    missing = "model.layers.0.self_attn.q_proj.weight and 17 more."
    if granularity == "layer":
        missing = "layers.1. Did you mean 'layers.0'?"
    assert message.startswith(f"freeze.scores: '{options.scores}' has no score for {missing} Scores must be those of")
    assert "by layer where freeze.granularity (of half, freeze.level) is layer, by tensor elsewhere" in message


def test_two_units_without_a_score_and_one_that_is_near(written):
    """Oracle: one more beside the first, and the nearest name that the file has."""
    scores = {"layers.00": 1.0, "layers.2": 1.0}
    options = FreezeOptions(strategy="ranked", scores=written({"scores": scores}))
    message = told(make_plan, anatomies.llama(depth=3), options, 100)
    assert "has no score for layers.0 and 1 more. Did you mean 'layers.00'? Scores must be" in message


def test_salf_says_where_traces_come_from(written):
    message = told(make_plan, LLAMA, FreezeOptions(strategy="salf", scores=written(SIMPLE)))
    assert "`dsfreeze analyze RECIPE analyze.scores=deviation`" in message


# -- anything ------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["scores", "all", "traces", "model", "digest", "x", "deviation", "layers.0", "layers.1"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), True])
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)
TRACES = st.lists(st.lists(NUMBERS, min_size=2, max_size=4), max_size=3)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "scores": st.dictionaries(NAMES, NUMBERS) | VALUES,
        "all": st.dictionaries(NAMES, st.fixed_dictionaries({"scores": st.dictionaries(NAMES, NUMBERS)}) | VALUES),
        "traces": st.dictionaries(NAMES, TRACES | VALUES) | VALUES,
        "model": st.just(WHOLE["model"]) | VALUES,
    },
)
STRATEGIES = [
    {"strategy": "ranked"}, {"strategy": "ranked", "score": "x"}, {"strategy": "owlore", "active_layers": 1},
    {"strategy": "budget", "budget": {"flops": "70%"}}, {"strategy": "budget", "budget": {"memory": "90%"}, "score": "x"},
    *({"strategy": "salf", "gain": gain, "cut": cut} for gain, cut in (("a", "median"), ("b", "mode"), ("c", "q25"), ("d", "q25"))),
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(LIKELY, VALUES), chosen=st.sampled_from(STRATEGIES))
@example(content={"scores": {"layers.0": 1e308, "layers.1": 1e308}}, chosen=STRATEGIES[3])
@example(content={"traces": {"deviation": [[1e308, -1e308, 1e308]]}}, chosen=STRATEGIES[-1])
def test_any_json_gives_a_plan_or_a_user_error(content, chosen, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with contextlib.suppress(UserError):
        assert make_plan(LLAMA, FreezeOptions(scores=path, **chosen), 100).phases


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_give_scores_or_a_user_error(content, tmp_path):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(read_scores(path, None, LLAMA), dict)


def test_categories_without_a_score_train(tmp_path: Path) -> None:
    """By hand: of each kind of matrix the half with the lower score freezes, and the norms, which a score of matrices has not, train."""
    anatomy = load_shipped("minilm-l6").for_task("classification", 2)
    matrices = [t.name for t in anatomy.block_tensors if len(t.shape) == 2]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": {name: float(n) for n, name in enumerate(matrices)}}), encoding="utf-8")
    plan = make_plan(anatomy, FreezeOptions(strategy="ranked", granularity="category", fraction=0.5, scores=path))
    lower = {
        t.name for layer in anatomy.blocks[:3] for t in layer.tensors if t.category != "norm" and len(t.shape) == 2
    }
    still = {t.name for t in anatomy.block_tensors} - plan.ever_trained
    assert {name for name in still if name in matrices} == lower
    assert not {t.name for t in anatomy.block_tensors if t.category == "norm"} & still


def test_categories_of_a_file_that_scores_layers_have_no_score(written: Callable[[Any], Path]) -> None:
    """Not a tensor is scored, so it is not the norms alone that have none."""
    options = FreezeOptions(strategy="ranked", granularity="category", fraction=0.5, scores=written(SIMPLE))
    assert "has no score for model.layers.0." in told(make_plan, LLAMA, options)
