"""Refreezing on a GPU, one process. Oracle: the allocator, which must come back to the same value; the CPU's losses."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from tiny import config_of, llama_anatomy, phase_of, recipe_of, tiny_llama, train_steps

from dsfreeze.engine.process import process_group
from dsfreeze.engine.zero import ZeroEngine
from dsfreeze.plan import Phase

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SETS = [["layers.0", "head"], ["layers.2", "layers.3", "head"], ["layers.3", "norm", "head"]]


def engine_of(name, rule, **train):
    model = tiny_llama(hidden=128)
    anatomy, recipe = llama_anatomy(model), recipe_of(name, adam_epsilon=1e-2, **train)
    return ZeroEngine(model, anatomy, recipe, config_of(recipe, 1), state=rule)


def rotate(engine, times):
    losses = []
    for number in range(times):
        engine.enter(Phase(0, None, phase_of(engine.anatomy, SETS[number % 3]).trainable))
        losses += train_steps(engine, number, number + 1, lr=5e-3)[0]
    return losses


@pytest.mark.parametrize("rule", ["keep", "clear", "offload"])
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_allocated_bytes_come_back(name, rule):
    with process_group(recipe_of(name)):
        engine = engine_of(name, rule, bf16=True)
        held = []
        for _ in range(4):
            rotate(engine, 6)
            gc.collect()
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
        engine.close()
        assert len(set(held[1:])) == 1, held


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_losses_are_the_cpu_s(name, monkeypatch):
    with process_group(recipe_of(name)):
        engine = engine_of(name, "offload")
        on_gpu = rotate(engine, 9)
        engine.close()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from dsfreeze.engine.local import LocalEngine

    model = tiny_llama(hidden=128)
    local = LocalEngine(model, llama_anatomy(model), recipe_of("local", adam_epsilon=1e-2), state="offload")
    assert on_gpu == pytest.approx(rotate(local, 9), abs=1e-3)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
