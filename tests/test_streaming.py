"""A backward pass with one gradient at a time. Oracle: autograd's own gradients of the same loss, and the module before and after."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from architectures import EXPECTED
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine.streaming import streamed_gradients
from dsfreeze.model import read_anatomy

KINDS = ("llama", "bert", "gpt2")


def model_of(kind: str) -> tuple[nn.Module, Anatomy]:
    """Random weights, no dropout."""
    config = type(EXPECTED[kind].config)(**EXPECTED[kind].config.to_diff_dict())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    module = auto.from_config(config).eval().requires_grad_(False)
    return module, read_anatomy(module, kind)


def loss_of(module: nn.Module, kind: str) -> torch.Tensor:
    ids = torch.randint(2, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1]) if kind == "bert" else ids
    return module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss


def tensors_of(anatomy: Anatomy, *layers: int) -> list[str]:
    chosen = [anatomy.blocks[k] for k in layers] if layers else anatomy.blocks
    return [t.name for layer in chosen for t in layer.tensors]


def plain(kind: str, names: list[str]) -> dict[str, torch.Tensor]:
    module, _ = model_of(kind)
    for p in module.parameters():
        p.requires_grad_(True)
    loss_of(module, kind).backward()
    return {name: p.grad for name, p in module.named_parameters() if name in names}


def left_behind(module: nn.Module) -> list[Any]:
    """What a pass might leave on a module."""
    found: list[Any] = [name for name, p in module.named_parameters() if p.requires_grad or p.grad is not None]
    found += [name for name, p in module.named_parameters() if p._post_accumulate_grad_hooks]
    for name, part in module.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        found += [name] if part.training or any(hooks) or getattr(part, "gradient_checkpointing", False) else []
    return found


@pytest.mark.parametrize("layers", [(), (1,), (0, 2)], ids=["all layers", "one", "two apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_gradients_are_autograds(kind, layers):
    """Every named tensor once, to a millionth of its layer's largest: key biases have none but rounding."""
    module, anatomy = model_of(kind)
    names, found = tensors_of(anatomy, *layers), {}

    def take(name: str, gradient: torch.Tensor) -> None:
        assert name not in found
        found[name] = gradient.clone()

    with streamed_gradients(module, anatomy, names, take):
        loss_of(module, kind).backward()
    expected = plain(kind, names)
    assert set(found) == set(names) == set(expected)
    for layer in anatomy.blocks:
        own = [t.name for t in layer.tensors if t.name in found]
        scale = max((float(expected[name].abs().max()) for name in own), default=0.0)
        for name in own:
            assert float((found[name] - expected[name]).abs().max()) <= 1e-6 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind):
    module, anatomy = model_of(kind)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with streamed_gradients(module, anatomy, tensors_of(anatomy), lambda *_: None):
        loss_of(module, kind).backward()
    assert left_behind(module) == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind_by_what_fails(kind):
    """In the callback, after some gradients, and between the forward pass and the backward."""
    module, anatomy = model_of(kind)
    calls: list[str] = []

    def fail_at_third(name: str, _: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise RuntimeError("in the middle")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        streamed_gradients(module, anatomy, tensors_of(anatomy), fail_at_third),
    ):
        loss_of(module, kind).backward()
    assert left_behind(module) == []

    def stop_before_it() -> None:
        with streamed_gradients(module, anatomy, tensors_of(anatomy), fail_at_third):
            loss_of(module, kind)
            raise RuntimeError("before it")

    with pytest.raises(RuntimeError, match="before it"):
        stop_before_it()
    assert left_behind(module) == []
    assert len(calls) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_never_a_second_gradient(kind):
    """At every call no parameter holds one, and every tensor handed on before is gone."""
    module, anatomy = model_of(kind)
    handed: list[weakref.ref[torch.Tensor]] = []
    most = [0, 0]

    def take(_: str, gradient: torch.Tensor) -> None:
        most[0] = max(most[0], sum(p.grad is not None for p in module.parameters()))
        most[1] = max(most[1], sum(ref() is not None for ref in handed))
        handed.append(weakref.ref(gradient))

    with streamed_gradients(module, anatomy, tensors_of(anatomy), take):
        loss_of(module, kind).backward()
    assert len(handed) == len(tensors_of(anatomy))
    assert most == [0, 0]


def test_layers_that_can_are_recomputed_and_a_second_pass_gives_the_same():
    """Oracle: a count of each layer's forward calls, two where the backward pass computes it again."""
    module, anatomy = model_of("llama")
    calls = [0] * 3
    for k, layer in enumerate(anatomy.blocks):
        inner = module.get_submodule(layer.path).mlp

        def count(*_: Any, k: int = k) -> None:
            calls[k] += 1

        inner.register_forward_pre_hook(count)
    sums: list[dict[str, float]] = []
    for _ in range(2):
        sums.append({})
        with streamed_gradients(
            module, anatomy, tensors_of(anatomy), lambda n, g: sums[-1].update({n: float(g.sum())})
        ):
            loss_of(module, "llama").backward()
    assert calls == [4, 4, 4]
    assert sums[0] == sums[1]


#: Prints what share of every other block that is freed leaves the resident set. A large block that was freed before is what makes
#: glibc keep smaller ones.
FREED = """
import psutil, torch
from dsfreeze.engine.memory import freed_memory_given_back
torch.ones(7 * 2**20)
with freed_memory_given_back():
    blocks = [torch.ones(2**20) for _ in range(40)]
    before = psutil.Process().memory_info().rss
    del blocks[::2]
    print((before - psutil.Process().memory_info().rss) / (20 * 2**22))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_blocks_go_back_at_once():
    """Oracle: the resident set of a process that does nothing else."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) > 0.9
