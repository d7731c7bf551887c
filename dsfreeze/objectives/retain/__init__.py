"""What keeps earlier tasks, beside the objective: one file a method, a literal dict of them, and what they refuse.

A run is one task of a sequence. A method is a `Term` made of a job and of what earlier tasks left (`memory.py`); every one works on
what this rank steps (`Engine.pieces`), so that it costs no rank more than its share, and is the same at every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dsfreeze.engine.process import together
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.der import Der
from dsfreeze.objectives.retain.ewc import Ewc
from dsfreeze.objectives.retain.gem import AGem, Gem
from dsfreeze.objectives.retain.l2_sp import L2Sp
from dsfreeze.objectives.retain.memory import Memory, open_alike, require_writable
from dsfreeze.objectives.retain.o_lora import OLora
from dsfreeze.objectives.retain.osf import Osf
from dsfreeze.objectives.retain.packnet import PackNet

RETAIN: dict[str, Callable[[Job, Memory], Term]] = {
    "l2_sp": L2Sp,
    "ewc": Ewc,
    "gem": Gem,
    "a_gem": AGem,
    "der": Der,
    "o_lora": OLora,
    "osf": Osf,
    "packnet": PackNet,
}

_OF_WEIGHTS = ("l2_sp", "ewc", "osf", "packnet")
_OF_EXAMPLES = ("gem", "a_gem", "der")


def terms_of(job: Job) -> list[Term]:
    """The terms that the recipe asks for; UserError when they do not go with the rest of it, or with `retain.memory` (collective)."""
    options = job.recipe.retain
    if options.method == "none":
        return []
    together(lambda: _look_around(job))
    memory = open_alike(job)
    return [together(lambda: RETAIN[options.method](job, memory))]


def _look_around(job: Job) -> None:
    for problem in _problems(job):
        raise UserError(problem)
    if job.recipe.retain.remember is not None:
        require_writable(job.recipe.retain.remember)


def _problems(job: Job) -> Iterator[str]:
    recipe, plan, method = job.recipe, job.plan, job.recipe.retain.method
    here = f"retain.method '{method}'"
    if plan.adapter is not None and method in _OF_WEIGHTS:
        yield (
            f"{here} is about a model's own weights, and freeze.adapter trains others, which are new in every task. Leave "
            "adapters out, or use retain.method o_lora."
        )
    if method == "o_lora" and (plan.adapter is None or plan.adapter.kind != "lora"):
        yield f"{here} keeps adapters of LoRA apart; write freeze.strategy: lora."
    moves = len({phase.trainable for phase in plan.phases}) > 1 or plan.decide_at is not None
    if moves and method in (*_OF_WEIGHTS, "o_lora"):
        yield (
            f"{here} needs one set of tensors that trains throughout, and strategy '{plan.strategy}' moves. Choose one that "
            "stays, or retain.method gem, a_gem or der."
        )
    if job.eviction is not None and method in ("ewc", *_OF_EXAMPLES):
        yield f"{here} runs other examples through the whole model, and the prefix is evicted; write freeze.evict_prefix: false."
    if recipe.data.packing and method in ("ewc", *_OF_EXAMPLES):
        yield f"{here} tells examples apart, and data.packing puts several into one sequence; write data.packing: false."
    if recipe.task == "preference" and method in ("ewc", *_OF_EXAMPLES):
        yield (
            f"{here} needs a loss of single examples, and task preference compares pairs by what a reference model, another one for each "
            "task, says of them; use l2_sp, o_lora, osf or packnet."
        )
