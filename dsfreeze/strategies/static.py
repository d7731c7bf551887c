"""Strategies whose choice holds for the whole run, by position, by kind, by a given ranking or by name.

Each is a function (anatomy, options, num_steps) -> plan with one open phase; `num_steps` is there for strategies that
move. Formulas, sources and what is known of each: docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from fractions import Fraction
from random import Random

from dsfreeze.anatomy import ATTENTION, Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import AdapterOptions, FreezeOptions
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.ends import auto_ends, tied_head, tied_names
from dsfreeze.strategies.patterns import matched_by_options
from dsfreeze.strategies.scores_file import lowest, read_scores
from dsfreeze.strategies.selection import Rule, Unit, choose, share

# -- by position ---------------------------------------------------------------------------------------------------


def full(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Everything trains."""
    return _layered(anatomy, *_without_number(options), rule=lambda units, number: (), fraction=0)


def bottom(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze {0 .. n-1}, nearest the input: the one choice that shortens backward."""
    return _layered(anatomy, options, rule=lambda units, number: range(number))


def top(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze {L-n .. L-1}, nearest the output."""
    return _layered(anatomy, options, rule=lambda units, number: range(len(units) - number, len(units)))


def middle(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Train the middle band: both ends freeze alike, the odd one at the bottom."""

    def rule(units: Sequence[Unit], number: int) -> list[int]:
        below = number - number // 2
        return [*range(below), *range(len(units) - number // 2, len(units))]

    return _layered(anatomy, options, rule=rule)


def interval(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze every n-th (see `every_nth`); the number that results may differ from the number asked for."""

    def rule(units: Sequence[Unit], number: int) -> set[int]:
        asked = share(options, 0.5) if options.count is None else Decimal(number) / max(1, len(units))
        return every_nth(len(units), Fraction(asked), options.offset)

    return _layered(anatomy, options, rule=rule)


def every_nth(size: int, fraction: Fraction, offset: int | None = None) -> set[int]:
    """{i : (i + 1) % every == 0} with every = round(1 / fraction); with an offset, {i : (i - offset) % every == 0}.

    Above one half it is the complement of the set for 1 - fraction, so 0.75 trains exactly what 0.25 freezes.
    """
    if fraction > Fraction(1, 2):
        return set(range(size)) - every_nth(size, 1 - fraction, offset)
    if not fraction:
        return set()
    every = round(1 / fraction)
    first = every - 1 if offset is None else offset
    return {index for index in range(size) if (index - first) % every == 0}


def random(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze n units drawn without replacement by `random.Random(seed)`: the control of every other choice."""
    draw = Random(options.seed)
    return _layered(anatomy, options, rule=lambda units, number: draw.sample(range(len(units)), number))


# -- by a ranking, by name -----------------------------------------------------------------------------------------


def ranked(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze the n units with the lowest scores of a file; equal scores freeze from the bottom. Categories that a score of matrices
    says nothing of (norms) train, where there is one for others."""
    path = options.scores
    assert path is not None, "FreezeOptions has checked it"
    scores = read_scores(path, options.score, anatomy)
    of_tensors = any(tensor.name in scores for tensor in anatomy.block_tensors)

    def rule(units: Sequence[Unit], number: int) -> Iterable[int]:
        if options.granularity == "category" and of_tensors and not any(unit.name in scores for unit in units):
            return ()
        return lowest(scores, units, number, path)

    return _layered(anatomy, options, rule=rule)


def patterns(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Train what freeze.trainable names, or all but what freeze.frozen names."""
    matched, notes = matched_by_options(anatomy, options)
    return _plan(anatomy, options, matched, notes)


def head(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """The head alone trains."""
    tied = tied_head(anatomy)
    if tied is not None:
        raise UserError(
            f"Strategy 'head' cannot train the head alone: {' is tied to '.join(tied_names(tied))}, the embedding, so "
            "both would train. Use strategy 'bottom' with fraction 1.0 to train the final norm, or a task with a head "
            f"of its own, or say it plainly: strategy 'patterns' with trainable: [{tied.name}]."
        )
    if options.head == "freeze":
        raise UserError("Strategy 'head' trains the head, but freeze.head is 'freeze'. Drop one of the two.")
    if options.adapter is not None:
        raise UserError("Strategy 'head' trains no layer that freeze.adapter could sit on. Use strategy 'lora'.")
    names = frozenset(t.name for layer in anatomy.layers if layer.name == "head" for t in layer.tensors)
    if not names:
        raise UserError(f"Strategy 'head': {anatomy.name} has no head. Choose another strategy, or another task.")
    options, notes = _without_number(options)
    return _plan(anatomy, options, names, notes)


# -- by kind -------------------------------------------------------------------------------------------------------


def bitfit(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Every bias and the task's head [arXiv 2106.10199]."""
    return _of_kind(anatomy, options, biases(anatomy))


def norms(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Every norm's gain, and bias where it has one, and the task's head [arXiv 2312.11420]."""
    modules = {t.module for t in anatomy.tensors if t.category == "norm"}
    kept = frozenset(t.name for t in anatomy.tensors if t.category == "norm" or (t.is_bias and t.module in modules))
    if not kept:
        raise UserError(f"Strategy 'norms': {anatomy.name} has no norm with weights.")
    return _of_kind(anatomy, options, kept)


def attention(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """The attention projections q, k, v and o (or the fused one), with their biases, and the task's head."""
    modules = {t.module for t in anatomy.block_tensors if t.category in ATTENTION}
    if not modules:
        raise UserError(f"Strategy 'attention': {anatomy.name} has no tensor of the categories {', '.join(ATTENTION)}.")
    kept = frozenset(t.name for t in anatomy.block_tensors if t.module in modules)
    return _of_kind(anatomy, options, kept)


def lora(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """LoRA on every layer, and the task's head [arXiv 2106.09685]."""
    if options.adapter is not None and options.adapter.kind != "lora":
        raise UserError("Strategy 'lora' contradicts freeze.adapter.kind 'dora'. Use strategy 'dora' or drop the kind.")
    return _adapted(anatomy, options, "lora")


def dora(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """DoRA on every layer, and the task's head [arXiv 2402.09353]."""
    return _adapted(anatomy, options, "dora")


def biases(anatomy: Anatomy) -> frozenset[str]:
    """Names of all biases; UserError when the transformer layers have none."""
    if not any(t.is_bias for t in anatomy.block_tensors):
        raise UserError(
            f"{anatomy.name} has no biases in its layers: nothing for 'bitfit' or freeze.granularity 'bias' to train. "
            "Strategy 'norms' trains the norm gains instead: as few numbers, and every model has them."
        )
    return frozenset(t.name for t in anatomy.tensors if t.is_bias)


# -- the common way ------------------------------------------------------------------------------------------------


def _layered(
    anatomy: Anatomy, options: FreezeOptions, notes: tuple[str, ...] = (), *, rule: Rule, fraction: float = 0.5,
    kept: frozenset[str] | None = None,
) -> FreezePlan:  # fmt: skip
    """Choose among the layers by the rule, let the ends follow, and make the plan."""
    if options.granularity == "bias":
        kept = biases(anatomy) if kept is None else biases(anatomy) & kept
    choice = choose(anatomy, options, rule, fraction=fraction, kept=kept)
    ends = auto_ends(anatomy, choice.trainable, kept=kept, adapter=options.adapter is not None)
    return _plan(anatomy, options, choice.trainable | ends, notes + choice.notes)


def _of_kind(anatomy: Anatomy, options: FreezeOptions, kept: frozenset[str]) -> FreezePlan:
    """One kind of tensor, in all layers unless a fraction or a count freezes the bottom ones."""
    return _layered(anatomy, options, rule=lambda units, number: range(number), fraction=0, kept=kept)


def _adapted(anatomy: Anatomy, options: FreezeOptions, kind: str) -> FreezePlan:
    given = options.adapter or AdapterOptions()
    options = options.model_copy(update={"adapter": given.model_copy(update={"kind": kind})})
    return _layered(anatomy, options, rule=lambda units, number: range(number), fraction=0)


def _plan(anatomy: Anatomy, options: FreezeOptions, auto: frozenset[str], notes: tuple[str, ...]) -> FreezePlan:
    """The plan that trains `auto`, as the options alter it, to the end of the run."""
    return build_plan(anatomy, options, [Stage(0, None, auto)], notes)


def _without_number(options: FreezeOptions) -> tuple[FreezeOptions, tuple[str, ...]]:
    """The options without fraction and count, and a note when that drops one: these strategies freeze by no number."""
    if not options.fraction and not options.count:
        return options, ()
    dropped = "fraction" if options.fraction else "count"
    cleared = options.model_copy(update={"fraction": None, "count": None})
    return cleared, (f"freeze.{dropped} has no meaning for '{options.strategy}' and is not used",)
