"""The ends of a model: embedding, final norm and head, and the ties between them.

A strategy chooses among the transformer layers; what the ends do follows from that choice (`auto`) unless the options
say otherwise (`freeze`, `train`). A tied matrix is one tensor with two names, so the two ends cannot disagree on it.
"""

from __future__ import annotations

from dsfreeze.anatomy import Anatomy, Tensor
from dsfreeze.errors import UserError
from dsfreeze.recipe import FreezeOptions


def tied_head(anatomy: Anatomy) -> Tensor | None:
    """The embedding that is also the head's matrix: it multiplies every token, which a mere look-up does not."""
    ends = {t.name for name in ("embed", "head") for t in _tensors(anatomy, name)}
    return next((t for t in anatomy.tied if t.name in ends and t.flops_per_token), None)


def tied_names(tied: Tensor) -> tuple[str, str]:
    """(the name as head, the name as embedding) of a tied matrix, for messages."""
    heads = [alias for alias in tied.aliases if "head" in alias or "out" in alias]
    return (heads or list(tied.aliases))[-1], tied.name


def is_task_head(anatomy: Anatomy) -> bool:
    """Whether the head is the task's own (classes, tags), made afresh, not one row per word of the vocabulary."""
    if tied_head(anatomy) is not None:
        return False
    looked_up = [t.shape[0] for t in _tensors(anatomy, "embed") if t.category == "embed"]
    words = anatomy.vocab_size or max(looked_up, default=0)
    head = _tensors(anatomy, "head")
    return bool(head) and all(t.shape[0] != words for t in head if len(t.shape) == 2)


def end_names(anatomy: Anatomy, end: str) -> frozenset[str]:
    """The tensors of `embed`, `norm` or `head`; a tied matrix belongs to both of its ends."""
    names = {t.name for t in _tensors(anatomy, end)}
    tied = tied_head(anatomy)
    return frozenset(names | ({tied.name} if tied is not None and end in ("embed", "head") else set()))


def all_ends(anatomy: Anatomy) -> frozenset[str]:
    """Embedding, final norm and head."""
    return frozenset().union(*(end_names(anatomy, end) for end in ("embed", "norm", "head")))


def auto_ends(
    anatomy: Anatomy, blocks: frozenset[str], *, kept: frozenset[str] | None = None, adapter: bool = False
) -> frozenset[str]:
    """What trains beside `blocks`, the trainable tensors of the transformer layers, when the options say `auto`.

    The embedding is frozen exactly when `layers.0` trains nothing; the norm trains; so does the head, unless it is
    tied to a frozen embedding. Where a strategy trains one kind of tensor (`kept`), that holds for these ends too, and
    with adapters none of them trains; a task's own head always does, since it starts from random numbers.
    """
    allowed = frozenset() if adapter else kept
    embed = frozenset() if _first_is_frozen(anatomy, blocks) else end_names(anatomy, "embed")
    norm = end_names(anatomy, "norm")
    head = frozenset(t.name for t in _tensors(anatomy, "head"))
    chosen = embed | norm | head  # a tied head is among the embedding's tensors, and goes with it
    if allowed is not None:
        chosen &= allowed
    return chosen | (head if is_task_head(anatomy) else frozenset())


def apply_options(anatomy: Anatomy, options: FreezeOptions, auto: frozenset[str]) -> frozenset[str]:
    """Override `auto` by freeze.embed, freeze.norm and freeze.head; UserError when they contradict a tie."""
    tied = tied_head(anatomy)
    if tied is not None and {options.embed, options.head} == {"freeze", "train"}:
        head, embed = tied_names(tied)
        raise UserError(
            f"freeze.embed is '{options.embed}' and freeze.head is '{options.head}', but {head} is tied to "
            f"{embed}: they are one tensor. Give both the same value, or leave one on 'auto'."
        )
    chosen = set(auto)
    for end, wish in (("embed", options.embed), ("norm", options.norm), ("head", options.head)):
        if wish == "train" and not end_names(anatomy, end):
            raise UserError(f"freeze.{end} is 'train', but {anatomy.name} has no {end}. Leave it on 'auto'.")
        if wish == "train":
            chosen |= end_names(anatomy, end)
        elif wish == "freeze":
            chosen -= end_names(anatomy, end)
    return frozenset(chosen)


def describe_ends(anatomy: Anatomy, trainable: frozenset[str]) -> tuple[str, ...]:
    """Notes on ties, on what a trainable embedding costs, and on frozen layers that the gradient must cross."""
    notes = []
    tied = tied_head(anatomy)
    if tied is not None:
        state = "train as one" if tied.name in trainable else "are frozen as one"
        notes.append(f"{' is tied to '.join(tied_names(tied))}: they {state}")
    blocks = anatomy.blocks
    active = [any(t.name in trainable for t in layer.tensors) for layer in blocks]
    embed = bool(end_names(anatomy, "embed") & trainable)
    lowest = 0 if embed else next((i for i, trains in enumerate(active) if trains), len(blocks))
    crossed = sum(not trains for trains in active[lowest:])
    if embed and blocks and not active[0]:
        notes.append("the embedding trains, so backward runs through every layer; freeze.embed=freeze would spare it")
    if crossed:
        them = "1 frozen layer lies" if crossed == 1 else f"{crossed} frozen layers lie"
        notes.append(f"{them} above something trainable: the gradient still crosses, and pays for, its way down")
    return tuple(notes)


def _tensors(anatomy: Anatomy, name: str) -> tuple[Tensor, ...]:
    return tuple(t for layer in anatomy.layers if layer.name == name for t in layer.tensors)


def _first_is_frozen(anatomy: Anatomy, blocks: frozenset[str]) -> bool:
    return bool(anatomy.blocks) and not any(t.name in blocks for t in anatomy.blocks[0].tensors)
