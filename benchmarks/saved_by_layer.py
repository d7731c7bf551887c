"""What each layer keeps for the backward pass under plans that freeze half of a model: why freezing the top needs more memory than
freezing the bottom. One forward pass of SmolLM2-135M (fp32, 2 x 128 tokens) with hooks on what autograd
saves; a storage counts once, where it is first saved, and parameters do not. Writes docs/saved-by-layer.svg too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import machine, write
from torch import nn

from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.model import load_model
from dsfreeze.recipe import FreezeOptions, ModelOptions
from dsfreeze.strategies import make_plan

PLANS: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    "bottom 50 %": {"strategy": "bottom", "fraction": 0.5},
    "top 50 %": {"strategy": "top", "fraction": 0.5},
    "every second": {"strategy": "interval", "fraction": 0.5},
    "half (HFT)": {"strategy": "half"},
}
BATCH, LENGTH = 2, 128
FIGURE = Path(__file__).parents[1] / "docs" / "saved-by-layer.svg"


class Saved:
    """Bytes that autograd saves within each layer, and outside all of them."""

    def __init__(self, module: nn.Module, layers: list[nn.Module]) -> None:
        self.bytes, self.outside = [0] * len(layers), 0
        self._known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self._kept: list[torch.Tensor] = []  # alive, so that no address comes twice
        self._at: int | None = None
        self._hooks = [
            hook
            for number, layer in enumerate(layers)
            for hook in (
                layer.register_forward_pre_hook(lambda *_, number=number: setattr(self, "_at", number)),
                layer.register_forward_hook(lambda *_: setattr(self, "_at", None)),
            )
        ]

    def pack(self, value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(value)
            if self._at is None:
                self.outside += storage.nbytes()
            else:
                self.bytes[self._at] += storage.nbytes()
        return value

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def saved_by_layer(module: nn.Module, options: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    plan = make_plan(read_anatomy(module, "smollm2-135m"), FreezeOptions(**options))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in plan.phases[0].trainable)
    saved = Saved(module, list(module.get_submodule("model.layers")))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda value: value):
        loss = module(input_ids=ids, labels=ids).loss
    saved.close()
    del loss
    mib = [round(size / 2**20, 3) for size in saved.bytes]
    return {"layers_mib": mib, "layers_total_mib": round(sum(mib), 1), "outside_mib": round(saved.outside / 2**20, 1)}


def draw(plans: dict[str, dict[str, Any]]) -> None:
    import matplotlib
    import seaborn

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{name}: {found['layers_total_mib']:.0f} MiB" for name, found in plans.items()]
    values = [found["layers_mib"] for found in plans.values()]
    figure, axis = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    seaborn.heatmap(
        values,
        vmin=0,
        cmap="crest",
        yticklabels=names,
        xticklabels=5,
        linewidths=0.5,
        ax=axis,
        cbar_kws={"label": "MiB of a layer"},
    )
    axis.set_xlabel("layer, counted from the input")
    axis.set_title("SmolLM2-135M, 2 x 128 tokens: what each layer saves for the backward pass", fontsize=11)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    module = load_model(ModelOptions(name="smollm2-135m"), "causal_lm", None, seed=0).train()
    ids = torch.randint(1000, 20000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    plans = {name: saved_by_layer(module, options, ids) for name, options in PLANS.items()}
    draw(plans)
    write(
        __file__,
        {
            "machine": machine(),
            "model": "smollm2-135m",
            "batch": BATCH,
            "length": LENGTH,
            "dtype": "float32",
            "plans": plans,
        },
    )


if __name__ == "__main__":
    main()
