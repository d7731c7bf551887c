"""Draws the README's pictures (needs the extra `notebook`): docs/prefix_cache.svg from prefix_cache.json, docs/saving.svg from
step_time.json and state_bytes.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns

HERE = Path(__file__).parent
NAMES = {
    "full": "full tuning",
    "top50": "top 50 % frozen",
    "bottom50": "bottom 50 % frozen",
    "bottom75": "bottom 75 % frozen",
}
#: Rows of the first picture: in prefix_cache.json, for people, whose it is.
CACHED = (
    ("full", "full tuning", 1),
    ("llamafactory-lora", "LoRA, LLaMA-Factory", 2),
    ("peft-lora", "LoRA, PEFT", 2),
    ("lora", "LoRA", 1),
    ("llamafactory-freeze-50", "bottom 50 % frozen, LLaMA-Factory", 2),
    ("peft-freeze-50", "bottom 50 % frozen, PEFT", 2),
    ("bottom50", "bottom 50 % frozen", 1),
    ("bottom50_memory", "bottom 50 % frozen, prefix cached", 0),
    ("llamafactory-freeze-75", "bottom 75 % frozen, LLaMA-Factory", 2),
    ("peft-freeze-75", "bottom 75 % frozen, PEFT", 2),
    ("bottom75", "bottom 75 % frozen", 1),
    ("bottom75_memory", "bottom 75 % frozen, prefix cached", 0),
)
LAYERS = 12
FROZEN = {"full": (), "top50": range(6, 12), "bottom50": range(6), "bottom75": range(9)}


def draw_plans(axis: plt.Axes, colours: list) -> None:
    """One column a plan, one cell a layer, the input below."""
    for column, name in enumerate(NAMES):
        frozen = FROZEN[name]
        lowest = next(i for i in range(LAYERS) if i not in frozen)
        for layer in range(LAYERS):
            colour = colours[0] if layer not in frozen else colours[2] if layer < lowest else colours[1]
            axis.add_patch(plt.Rectangle((column + 0.12, layer + 0.08), 0.76, 0.84, color=colour, linewidth=0))
    axis.set(xlim=(0, len(NAMES)), ylim=(0, LAYERS), ylabel="layer, input at the bottom", title="What trains")
    axis.set_xticks(
        [c + 0.5 for c in range(len(NAMES))], [n.replace(" frozen", "").replace(" ", "\n", 1) for n in NAMES.values()]
    )
    labels = ("trains", "frozen, gradient passes through", "frozen prefix: no backward at all")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (colours[0], colours[1], colours[2])]
    axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    sns.despine(ax=axis, left=True, bottom=True)


def draw_times(axis: plt.Axes, colours: list) -> None:
    plans = json.loads((HERE / "step_time.json").read_text())["plans"]
    for row, name in enumerate(NAMES):
        times = plans[name]["times_faster_than_full"]
        error = [[times["median"] - times["q1"]], [times["q3"] - times["median"]]]
        axis.barh(row, times["median"], xerr=error, color=colours[0], height=0.55, error_kw={"linewidth": 1})
        axis.plot([plans[name]["by_flops"]] * 2, [row - 0.38, row + 0.38], color="black", linewidth=2)
        axis.text(0.04, row, f"{times['median']:.2f}×", va="center", color="white", fontweight="bold")
    axis.set_yticks(range(len(NAMES)), NAMES.values())
    axis.set(xlabel="steps per second, full tuning = 1", title="What it saves (measured; black line: by FLOPs)")
    sns.despine(ax=axis)


def draw_bytes(axis: plt.Axes, colours: list) -> None:
    rows = json.loads((HERE / "state_bytes.json").read_text())["bytes"]
    names = [n for n in NAMES if f"zero2 bf16 {n}" in rows]
    for row, name in enumerate(names):
        counted = rows[f"zero2 bf16 {name}"]["counted"]
        size = (counted["masters"] + counted["optimizer_state"]) / 2**20
        axis.barh(row, size, color=colours[0], height=0.55)
        axis.text(size, row, f" {size:.0f} MiB", va="center")
    axis.set_yticks(range(len(names)), [NAMES[n] for n in names])
    axis.set(xlabel="masters and moments, MiB (bf16, ZeRO-2)", title="Optimizer state")
    axis.margins(x=0.18)
    sns.despine(ax=axis)


def draw_cached(axis: plt.Axes, colours: list) -> None:
    """Steps per second with the prefix read from a cache, beside what else there is."""
    plans = json.loads((HERE / "prefix_cache.json").read_text())["plans"]
    rows = [row for row in CACHED if row[0] in plans]
    for row, (name, _, kind) in enumerate(reversed(rows)):
        times = plans[name]["times_faster_than_full"]
        error = [[times["median"] - times["q1"]], [times["q3"] - times["median"]]]
        axis.barh(row, times["median"], xerr=error, color=colours[kind], height=0.62, error_kw={"linewidth": 1})
        if "by_flops" in plans[name]:
            axis.plot([plans[name]["by_flops"]] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
        axis.text(
            0.04, row, f"{times['median']:.2f}×", va="center", color="white" if kind < 2 else "black", fontweight="bold"
        )
    axis.set_yticks(range(len(rows)), [label for _, label, _ in reversed(rows)])
    axis.set(xlabel="steps per second, full tuning = 1 (median and quartiles; black line: by FLOPs)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    labels = ("dsfreeze, the prefix read from its cache", "dsfreeze", "other tools, same machine, in turns")
    axis.legend(handles, labels, loc="upper right", frameon=False)
    sns.despine(ax=axis)


def draw_prefix_cache(palette: list) -> None:
    figure, axis = plt.subplots(figsize=(10, 4.6))
    draw_cached(axis, [palette[5], palette[2], (0.8, 0.82, 0.84)])
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "prefix_cache.svg", metadata={"Date": None})


def main() -> None:
    sns.set_theme(style="ticks", font_scale=0.85)
    plt.rcParams["svg.hashsalt"] = "dsfreeze"
    palette = sns.color_palette("crest", 6)
    draw_prefix_cache(palette)
    colours = [palette[4], (0.72, 0.76, 0.78), (0.9, 0.92, 0.93)]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.9), width_ratios=(1.0, 1.2, 1.0))
    draw_plans(left, colours)
    draw_times(middle, colours)
    draw_bytes(right, colours)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "saving.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
