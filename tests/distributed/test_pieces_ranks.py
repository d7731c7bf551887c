"""What this rank steps (`Engine.pieces`), edited gradients and gradients of steps that are not taken, at every stage on two ranks."""

from __future__ import annotations

import pytest
import torch
from forks import run_ranks
from tiny import examples, llama_anatomy, micro_batches, phase_of, recipe_of, tiny_llama
from zero_kit import LAYOUTS, make_local, make_zero

from dsfreeze.engine.process import process_group

STEPS, PULL = 4, 0.3
TRAIN = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}


def whole(engine, of):
    """Full tensors on every rank from what `of(piece)` gives of each."""
    mine = {piece.name: (piece.first, of(piece)) for piece in of.pieces}
    names = phase_of(engine.anatomy, "interval").trainable
    return {name: engine.join(name, *mine.get(name, (0, None))).cpu() for name in names}


class Seen:
    """Takes pieces, and copies of their gradients."""

    def __call__(self, piece):
        return self.kept[piece.name]

    def take(self, pieces):
        self.pieces = pieces
        self.kept = {piece.name: piece.gradient.float().clone() for piece in pieces}


def pulled_training(engine):
    """Losses, norms and weights of a training whose gradients are edited, with two steps between that are not taken."""
    start = {(p.name, p.first): p.value.clone() for p in engine.pieces()}
    plain, squared = Seen(), Seen()
    losses, norms = [], []
    for step in range(STEPS):
        batches = micro_batches(examples(90 + step), engine.rank, engine.world_size, 2)
        engine.scratch_gradients(batches, plain.take)
        engine.scratch_gradients(batches, squared.take, squared=True)
        loss = 0.0
        for batch, weight in micro_batches(examples(step), engine.rank, engine.world_size, 2):
            loss += engine.forward_backward(batch, weight)
        with engine.edited_gradients() as pieces:
            for piece in pieces:
                piece.add(PULL * (piece.value - start[piece.name, piece.first]))
        norms.append(engine.step(1e-2))
        losses.append(engine.sum([loss])[0])
    weights = {n: engine.read_weight(n).float() for n in phase_of(engine.anatomy, "interval").trainable}
    return losses, norms, weights, whole(engine, plain), whole(engine, squared)


def plain_training():
    """The oracle: torch's AdamW, the penalty written out as a term of the loss, squares batch by batch."""
    model = tiny_llama()
    names = set(phase_of(llama_anatomy(model), "interval").trainable)
    trained = {n: p for n, p in model.named_parameters() if n in names}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    losses, norms = [], []
    for step in range(STEPS):
        # on two ranks with two micro-steps each there are four micro-batches of one example
        parts = [
            torch.autograd.grad(model(**batch).loss * weight, trained.values())
            for batch, weight in micro_batches(examples(90 + step), 0, 1, 4)
        ]
        sums = [sum(column) for column in zip(*parts, strict=True)]
        squares = [sum(g.square() for g in column) for column in zip(*parts, strict=True)]
        loss = sum(model(**batch).loss * weight for batch, weight in micro_batches(examples(step), 0, 1, 4))
        (loss + PULL / 2 * sum((p - start[n]).square().sum() for n, p in trained.items())).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    flat = [{n: t.detach().reshape(-1) for n, t in zip(trained, column, strict=True)} for column in (sums, squares)]
    return losses, norms, {n: p.detach() for n, p in trained.items()}, *flat


def everywhere(layouts, bf16):
    found = []
    with process_group(recipe_of()):
        for name, zero in layouts:
            engine = make_zero("interval", name, zero, bf16=bf16, **TRAIN)
            found.append(pulled_training(engine))
            engine.close()
    return found


def close(found, wanted, where, atol):
    assert found[0] == pytest.approx(wanted[0], abs=atol), where
    assert found[1] == pytest.approx(wanted[1], rel=10 * atol), where
    for got, want in zip(found[2:], wanted[2:], strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            scale = max(1.0, 1.0 / float(value.abs().max()))
            torch.testing.assert_close(
                got[name].view_as(value) * scale, value * scale, atol=atol, rtol=0, msg=f"{where} {name}"
            )


def test_local_edits_and_drops_as_plain_pytorch():
    """Oracle: `plain_training`; the local engine is handed two micro-batches of two examples, so squares are left out."""
    found, wanted = pulled_training(make_local("interval", **TRAIN)), plain_training()
    close(found[:4], wanted[:4], "local", 2e-5)


@pytest.mark.slow
def test_every_stage_edits_and_drops_as_plain_pytorch():
    """Oracle: `plain_training`, with clipping that bites, accumulation, offload and shards that cut tensors."""
    wanted = plain_training()
    for rank, found in enumerate(run_ranks(everywhere, LAYOUTS, False, timeout=120)):
        for layout, got in zip(LAYOUTS, found, strict=True):
            close(got, wanted, f"rank {rank} {layout}", 2e-5)


@pytest.mark.slow
def test_every_stage_edits_in_bf16():
    """Oracle: the local engine in bf16. Weights of few bits: to two spacings near 1."""
    layouts = [("zero0", {}), ("zero2", {}), ("zero3", {"stage3_param_persistence_threshold": 0})]
    wanted = pulled_training(make_local("interval", bf16=True, **TRAIN))
    (found, _) = run_ranks(everywhere, layouts, True, timeout=120)
    for layout, got in zip(layouts, found, strict=True):
        close(got[:3], wanted[:3], str(layout), 2e-2)
