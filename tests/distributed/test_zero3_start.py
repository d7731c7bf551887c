"""ZeRO-3 begins with a model that no rank ever held whole on its device. Oracle: ceil(numel / 2) of every tensor."""

from __future__ import annotations

from forks import run_ranks
from tiny import llama_anatomy, tiny_llama
from zero_kit import SHARDED, make_zero

from dsfreeze.engine.process import import_deepspeed, process_group


def held_when_deepspeed_begins() -> tuple[int, int]:
    """(elements of whole tensors, elements of shards) on this rank, as deepspeed.initialize finds the model."""
    from tiny import recipe_of

    deepspeed, found = import_deepspeed(), []
    real = deepspeed.initialize

    def look(*, model, **options):
        parameters = list(model.parameters())
        found.append((sum(p.data.numel() for p in parameters), sum(p.ds_tensor.numel() for p in parameters)))
        return real(model=model, **options)

    deepspeed.initialize = look
    with process_group(recipe_of("zero3")):
        make_zero("bottom", "zero3", SHARDED).close()
    return found[0]


def test_the_model_is_cut_up_before_deepspeed_sees_it():
    tensors = llama_anatomy(tiny_llama()).tensors
    shards = sum(-(-tensor.numel // 2) for tensor in tensors)
    assert run_ranks(held_when_deepspeed_begins) == [(0, shards)] * 2
