"""The recommendation: what to train within the limits, what that brings and costs, and how sure the ranking is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.ranking import STABLE
from dsfreeze.recipe import FreezeOptions, Recipe
from dsfreeze.setting import setting_of
from dsfreeze.strategies.budgeted import TOLD, Balance


def recommend(
    path: Path, content: Mapping[str, Any], recipe: Recipe, anatomy: Anatomy, world_size: int
) -> dict[str, Any]:
    """`sentence`, `layers`, `gain` and `flops` (shares), `next` (`told` of the first few) and the `recipe` lines; when nothing
    fits, the sentence says so and the rest is missing. `path` holds the scores."""
    options = FreezeOptions.model_validate(
        {"strategy": "budget", "scores": path, "score": content["score"], "budget": recipe.analyze.budget}
    )
    balance = Balance(anatomy, options, setting_of(recipe, world_size))
    try:
        choice = balance.solve()
    except UserError as error:
        return {"sentence": f"no recommendation: {error}"}
    gain = choice.gain / balance.gain
    flops = balance.cost(balance.trained(choice.items))[1] / balance.full
    layers, following = [item.name for item in choice.items], balance.next_units(choice)
    agreement, needed = (content["all"][content["score"]][key] for key in ("spearman", "examples_needed"))
    return {
        "sentence": f"train layer{'s' * (len(layers) > 1)} {ranges(layers)}: {gain:.0%} of the estimated gain at {flops:.0%} of the step FLOPs; "
        + _certainty(agreement, needed),
        "layers": layers,
        "gain": gain,
        "flops": flops,
        "next": [asdict(unit) for unit in following],
        "told": [str(unit) for unit in following[:TOLD]],
        "recipe": _lines(recipe, content["score"]),
    }


def _certainty(agreement: float | None, needed: int | None) -> str:
    if agreement is None:
        return "the ranking rests on the weights alone"
    if agreement >= STABLE:
        return f"the ranking is stable, rho {agreement:.2f}"
    more = f"about {needed} examples would do (analyze.num_examples)" if needed else "more examples may not help"
    return f"the ranking is NOT stable, rho {agreement:.2f} between halves of the data: {more}"


def _lines(recipe: Recipe, score: str) -> str:
    limits = ", ".join(f"{kind}: {text}" for kind, text in recipe.analyze.budget.items())
    path = Path(recipe.analyze.output_dir) / "scores.json"
    return f"freeze:\n  strategy: budget\n  budget: {{{limits}}}\n  scores: {path}\n  score: {score}\n"


def ranges(layers: Iterable[str]) -> str:
    """`layers.1 layers.2 layers.5` as "1-2, 5"."""
    numbers = [int(name.rpartition(".")[2]) for name in layers]
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
