"""What every strategy promises on every anatomy: phases tile, never empty, ties together, one digest, prefix kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import anatomies
import pytest
from marks import some_fast

from dsfreeze.anatomy import Anatomy, load_shipped, shipped
from dsfreeze.errors import UserError
from dsfreeze.estimate import estimate
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FREEZE_KEYS, FreezeOptions
from dsfreeze.recipe_freeze import NEEDS_SCORES
from dsfreeze.strategies import STRATEGIES, make_plan
from dsfreeze.strategies.ends import is_task_head

SMALL = anatomies.everything()
GRANULARITIES = ("layer", "matrix", "category", "bias")
#: What a strategy cannot do on a model, by the start of what it says.
EXCUSES = (
    "has no biases",
    "cannot train the head alone",
    "has no matrix to sit on",
    "has no head",
    "no tensor of the",
    "could sit on",
)
#: Long enough for every method to move, and no multiple of a period.
STEPS = 233
#: Strategies of which a longer run begins as a shorter one does.
PREFIX = ("lisa", "badam", "hift", "owlore", "step_ranges")
#: Strategies that a model may leave nothing to do: one without biases, or with a tied head.
MAY_BE_IMPOSSIBLE = ("bitfit", "head")


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> dict[str, str]:
    """A scores file for each anatomy, of layers and tensors."""
    folder = tmp_path_factory.mktemp("scores")
    files = {}
    for name, anatomy in SMALL.items():
        names = [*anatomy.layer_names, *(t.name for t in anatomy.tensors)]
        files[name] = str(folder / f"{name}.json")
        with open(files[name], "w") as file:
            trace = [1 - 0.1 * k for k in range(len(anatomy.blocks) + 1)]
            json.dump({"scores": {n: hash_of(n) for n in names}, "traces": {"deviation": [trace, trace[::-1]]}}, file)
    return files


def hash_of(name: str) -> float:
    return float(sum(name.encode()) % 17)


def options_of(strategy: str, scores_file: str | None = None) -> Iterator[FreezeOptions]:
    more: dict = {"scores": scores_file} if strategy in NEEDS_SCORES else {}
    more |= {"budget": {"flops": "90%"}} if strategy == "budget" else {}
    more |= (
        {"step_ranges": {"layers.[01]": 30, "layers.2": [10, 50], "layers.3": -1}} if strategy == "step_ranges" else {}
    )
    if strategy == "patterns":
        yield FreezeOptions(trainable=["layers.[12]"])
        yield FreezeOptions(frozen=["embed", "layers.0"])
        yield FreezeOptions(freeze_trainable_layers=2)
        return
    yield FreezeOptions(strategy=strategy, **more)
    yield from halves_of(scores_file) if strategy == "half" else ()
    if strategy not in ("budget", "half"):  # refused
        yield FreezeOptions(strategy=strategy, adapter={"categories": ["q", "o"]}, **more)
    for granularity in GRANULARITIES if strategy in FREEZE_KEYS["granularity"] else ():
        if granularity == "bias" and strategy in ("norms", "attention"):
            continue  # two kinds at once: a model may have no tensor that is both
        if granularity in ("category", "bias") and strategy in (*FREEZE_KEYS["active_layers"], "budget"):
            continue  # refused
        if strategy not in FREEZE_KEYS["fraction"] and strategy != "interval":
            yield FreezeOptions(strategy=strategy, granularity=granularity, **more)
            continue
        for fraction in (0.25, 0.5, 0.75):
            yield FreezeOptions(strategy=strategy, granularity=granularity, fraction=fraction, **more)


def halves_of(scores_file: str | None) -> Iterator[FreezeOptions]:
    """Every level, with the options that go with it."""
    for level in ("category", "layer", "model", "element"):
        for more in ({"fraction": 0.25}, {"fraction": 0.6}, {"depth": "top"}, {"round": 3}):
            yield FreezeOptions(strategy="half", level=level, **more)
        yield FreezeOptions(strategy="half", level=level, masks="complement", round=1)
        if level != "element":
            yield FreezeOptions(strategy="half", level=level, scores=scores_file)
    yield FreezeOptions(strategy="half", balanced=True)
    yield FreezeOptions(strategy="half", level="model", count_by="matrices")


def plan_or_excuse(anatomy: Anatomy, options: FreezeOptions) -> FreezePlan | None:
    try:
        return make_plan(anatomy, options, STEPS)
    except UserError as error:
        if any(excuse in str(error) for excuse in EXCUSES):
            return None
        raise


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SMALL)
def test_promises(strategy, name, scores):
    """Oracle: the contract in the plan's and the strategies' docstrings."""
    anatomy = SMALL[name]
    plans = [(options, plan_or_excuse(anatomy, options)) for options in options_of(strategy, scores[name])]
    for options, plan in plans:
        if plan is not None:
            check(anatomy, options, plan)
    assert strategy in MAY_BE_IMPOSSIBLE or any(plan for _, plan in plans)


def check(anatomy: Anatomy, options: FreezeOptions, plan: FreezePlan) -> None:
    adapted = plan.adapted(anatomy)
    moving = options.strategy in FREEZE_KEYS["rewarmup_steps"]
    steps = 0
    for phase in plan.phases:
        assert phase.first_step == steps, "phases tile the run"
        assert phase.trainable
        assert phase.trainable == adapted.in_order(phase.trainable), "in model order, each once, each of this model"
        steps = STEPS if phase.end is None else phase.end
        check_ends(adapted, options, phase.trainable)
    assert steps == STEPS
    assert moving or [phase.num_steps for phase in plan.phases] == [None]
    again = make_plan(anatomy, options, STEPS if moving else 100)
    assert plan.digest == again.digest == FreezePlan.from_json(plan.to_json()).digest
    if options.strategy in PREFIX:
        longer = make_plan(anatomy, options, STEPS + 50)
        assert longer.until(STEPS).digest == plan.until(STEPS).digest
    cost = estimate(anatomy, plan)
    assert 0 < cost.trainable <= cost.total
    assert cost.optimizer_state == 8 * cost.held
    assert cost.held >= cost.trainable
    assert (cost.held > cost.trainable) == bool(plan.masks)
    assert {mask.tensor for mask in plan.masks} <= plan.ever_trained


def check_ends(adapted: Anatomy, options: FreezeOptions, names: tuple[str, ...]) -> None:
    frozen_first = not any(t.name in names for t in adapted.blocks[0].tensors)
    embedding_trains = any(t.name in names for t in adapted.layer("embed").tensors)
    if options.strategy not in ("patterns", "head", "lisa", "owlore", "hift", "step_ranges", "half"):
        assert not (frozen_first and embedding_trains), "the embedding is frozen with layers.0"
    if is_task_head(adapted):
        head = {t.name for t in adapted.layer("head").tensors}
        assert options.granularity == "bias" or options.strategy in ("bitfit", "norms") or head <= set(names)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_bottom_keeps_its_prefix(name, count):
    """Oracle: with n layers frozen from the bottom, embedding and exactly n layers are below everything trainable."""
    anatomy = SMALL[name]
    plan = make_plan(anatomy, FreezeOptions(count=count))
    prefix = [layer.name for layer in anatomy.prefix(plan.phases[0].trainable)]
    assert prefix == (["embed", *(f"layers.{i}" for i in range(count))] if count else [])


@pytest.mark.parametrize("name", [name for name, anatomy in SMALL.items() if anatomy.tied])
def test_ties_are_one(name):
    """Oracle: a tied tensor appears under its one name or not at all, whichever name is asked for."""
    anatomy = SMALL[name]
    (tied,) = anatomy.tied
    for asked in (tied.name, *tied.aliases):
        assert make_plan(anatomy, FreezeOptions(trainable=[asked])).phases[0].trainable[0] == tied.name
        assert tied.name not in make_plan(anatomy, FreezeOptions(frozen=[asked])).phases[0].trainable


def test_digests_do_not_depend_on_the_process():
    """Oracle: another process with another hash seed; ranks compare digests, so sets may not leak their order."""
    code = (
        "import anatomies; from dsfreeze.recipe import FreezeOptions as O;"
        "from dsfreeze.strategies import make_plan as p;"
        "print([p(anatomies.bert(), O(strategy=s, granularity='category')).digest"
        " for s in ('random', 'bottom', 'bitfit', 'lora')]);"
        "print([p(anatomies.bert(), O(strategy=s), 99).digest"
        " for s in ('lisa', 'badam', 'hift', 'sweep', 'gradual_unfreezing', 'freezeout', 'half')])"
    )
    outputs = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(outputs) == 1


def test_no_torch():
    """Oracle: sys.modules of a fresh process."""
    code = (
        "import dsfreeze.strategies, dsfreeze.estimate, dsfreeze.picture, sys;"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'peft') if m in sys.modules])"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def of_each_kind() -> list[str]:
    """Of the shipped anatomies with layers of the same kinds of tensors, the one with the fewest layers.

    What a strategy does depends on the kinds, and on the sizes only by the order of what it sorts.
    """
    anatomies_by_depth = sorted((load_shipped(name) for name in shipped()), key=lambda a: len(a.blocks))
    first: dict[tuple, str] = {}
    for anatomy in anatomies_by_depth:
        kinds = {tuple((t.category, len(t.shape)) for t in block.tensors) for block in anatomy.blocks}
        first.setdefault((anatomy.model_type, frozenset(kinds), bool(anatomy.tied)), anatomy.name)
    return sorted(first.values())


@pytest.mark.parametrize("name", some_fast(of_each_kind(), 2))
def test_shipped_anatomies_take_every_strategy(name):
    """Oracle: the same promises, on the real shapes."""
    take(load_shipped(name), sorted(set(STRATEGIES) - {*NEEDS_SCORES, "patterns", "step_ranges"}))


@pytest.mark.parametrize("name", sorted(set(shipped()) - set(of_each_kind())))
def test_the_other_shipped_anatomies_take_the_usual_ones(name):
    """Oracle: the same promises, on the real shapes; one strategy of each way of choosing."""
    take(load_shipped(name), ["full", "bottom", "bitfit", "lora", "lisa"])


def take(anatomy: Anatomy, strategies: list[str]) -> None:
    for strategy in strategies:
        options = FreezeOptions(strategy=strategy)
        plan = plan_or_excuse(anatomy, options)
        assert plan is not None or strategy in MAY_BE_IMPOSSIBLE
        if plan is not None:
            check(anatomy, options, plan)
