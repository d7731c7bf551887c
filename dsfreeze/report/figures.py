"""Figures of a report as inline SVG, drawn for a phone's width and for light and dark pages alike. Needs seaborn.

Few things a figure: at most MOST_LINES lines and MOST_BARS bars, and a sentence on what is left out. Colours are of one lightness (husl), so
that all of them stand out on white and on black; ink is the page's own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

from dsfreeze.plotting import EXTRA
from dsfreeze.report.sections import Figure
from dsfreeze.report.setups import Setup, spread

MOST_LINES, MOST_BANDS, MOST_BARS, MOST_POINTS = 8, 4, 16, 50
#: Of a label as much as fits beside a bar; tables have it whole.
_LABEL = 30
_WIDTH = 4.4  # inches, which a phone shows at nearly their own size
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)
_REFERENCES = re.compile(r'(?:url\(#|href="#| id=")[^)"]+')
#: seaborn's ink and background, and what a page has for them.
_INK = {
    "#262626": "currentColor", "#000000": "currentColor", "#333333": "currentColor", "#cccccc": "var(--rule)", "#b0b0b0": "var(--rule)",
}  # fmt: skip


def missing() -> str:
    """The empty text, or what to install for figures."""
    return "" if importlib.util.find_spec("seaborn") else EXTRA


def loss_curves(setups: Sequence[Setup]) -> Figure | None:
    """Training loss by step: of each setup the mean of its runs, and, while there are few, a band from the least to the greatest."""
    having = [setup for setup in setups if any(run.losses for run in setup.runs)]
    if not having:
        return None
    drawn, left_out = _most(having, MOST_LINES)
    width = max(1, -(-max(step for setup in drawn for run in setup.runs for step, _ in run.losses) // MOST_POINTS))
    banded = len(drawn) <= MOST_BANDS
    seaborn, pyplot = _libraries()
    colours = seaborn.husl_palette(len(drawn), l=0.55, s=0.9)
    with _style(seaborn):
        rows = len(drawn)
        figure, axis = pyplot.subplots(figsize=(_WIDTH, 2.6 + 0.19 * rows), layout="constrained")
        for number, setup in enumerate(drawn):
            steps, mean, low, high = _binned(setup, width)
            style = _DASHES[number % len(_DASHES)]
            axis.plot(
                steps,
                mean,
                color=colours[number],
                linestyle=style,
                linewidth=1.4,
                label=_short(setup.label, 2 * _LABEL),
            )
            if banded and len(setup.runs) > 1:
                axis.fill_between(steps, low, high, color=colours[number], alpha=0.18, linewidth=0)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss")
        figure.legend(loc="outside lower left", ncols=1, fontsize=7.5, frameon=False, handlelength=3)
    told = [f"Each point is the mean of {width} steps."] if width > 1 else []
    if any(len(setup.runs) > 1 for setup in drawn):
        told.append(
            f"Lines are means of a setup's runs{', bands go from the least to the greatest' if banded else ''}."
        )
    ends = "; ".join(f"{setup.label}: {_ends(setup)}" for setup in drawn)
    return inline_svg(figure, "Training loss", f"Training loss by step. {ends}.", " ".join([*told, *left_out]))


def bars(title: str, unit: str, setups: Sequence[tuple[str, Sequence[float]]], *, scale: float = 1.0) -> Figure | None:
    """Means as bars, deviations (n - 1) as lines, single runs as points; of `setups`, (label, values), those that have any. Values are
    divided by `scale`."""
    having = [(label, [value / scale for value in values]) for label, values in setups if values]
    if not having:
        return None
    drawn = having[:MOST_BARS]
    seaborn, pyplot = _libraries()
    # a number before each label keeps two that are cut to the same text apart; it is not shown
    names = [f"{number}\0{_short(label, _LABEL)}" for number, (label, _) in enumerate(drawn)]
    points: dict[str, list[Any]] = {
        "x": [value for _, values in drawn for value in values],
        "y": [name for name, (_, values) in zip(names, drawn, strict=True) for _ in values],
    }
    with _style(seaborn):
        figure, axis = pyplot.subplots(figsize=(_WIDTH, 0.75 + 0.27 * len(drawn)), layout="constrained")
        seaborn.barplot(points, x="x", y="y", order=names, orient="y", errorbar="sd", color=seaborn.husl_palette(1, h=0.66, l=0.55)[0],
                        saturation=1, width=0.62, err_kws={"linewidth": 1.1, "color": "#333333"}, ax=axis)  # fmt: skip
        if len(points["x"]) > len(drawn):
            seaborn.stripplot(points, x="x", y="y", order=names, orient="y", color="#333333", size=2.4, alpha=0.6, jitter=False, ax=axis)  # fmt: skip
        axis.set_yticks(range(len(names)), [name.partition("\0")[2] for name in names])
        axis.set_xlabel(unit)
        axis.set_ylabel("")
        axis.grid(visible=False, axis="y")
    told = "; ".join(f"{label}: {_mean_text(values)}" for label, values in drawn)
    several = ["Points are single runs, lines their deviation."] if len(points["x"]) > len(drawn) else []
    note = " ".join([*several, *_left_out(len(having) - len(drawn), "bars")])
    return inline_svg(figure, title, f"{title}, {unit}. {told}.", note)


def leading(setups: Sequence[Setup], most: int) -> list[Setup]:
    """At most so many, in their own order: those with most finished runs, and of as many the best by score."""

    def rank(setup: Setup) -> tuple[int, float]:
        return -len(setup.done), -(spread(setup.values("score"))[0] or 0.0)

    kept = {id(setup) for setup in sorted(setups, key=rank)[:most]}
    return [setup for setup in setups if id(setup) in kept]


def _most(setups: Sequence[Setup], most: int) -> tuple[list[Setup], list[str]]:
    kept = leading(setups, most)
    return kept, _left_out(len(setups) - len(kept), "setups")


def _left_out(number: int, what: str) -> list[str]:
    return [f"{number} more {what} are left out here; the table has all."] if number else []


def _mean_text(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.4g}" + ("" if deviation is None else f" ± {deviation:.2g} (of {len(values)})")


def _ends(setup: Setup) -> str:
    """Mean of the first and of the last losses."""
    ends = [(run.losses[0][1], run.losses[-1][1]) for run in setup.runs if run.losses]
    first, last = (spread([end[side] for end in ends])[0] for side in (0, 1))
    return f"from {first:.3g} to {last:.3g}"


def _binned(setup: Setup, width: int) -> tuple[Any, Any, Any, Any]:
    """The middles of bins of `width` steps, and in each the mean over runs, the least and the greatest."""
    import numpy as np

    runs = [run.losses for run in setup.runs if run.losses]
    count = max((run[-1][0] - 1) // width + 1 for run in runs)
    sums, numbers = np.zeros((len(runs), count)), np.zeros((len(runs), count))
    for row, run in enumerate(runs):
        bins = (np.asarray([step for step, _ in run]) - 1) // width
        np.add.at(sums[row], bins, [loss for _, loss in run])
        np.add.at(numbers[row], bins, 1)
    with np.errstate(invalid="ignore"):
        means = np.ma.masked_invalid(sums / numbers)
    known = ~means.mask.all(axis=0) if means.mask is not np.ma.nomask else np.ones(count, bool)
    steps = np.arange(count) * width + (width + 1) / 2
    mean, low, high = (np.asarray(each)[known] for each in (means.mean(axis=0), means.min(axis=0), means.max(axis=0)))
    return steps[known], mean, low, high


def _short(text: str, most: int) -> str:
    """Cut in the middle, where names differ least; matplotlib is to see no mathematics in it, and nothing to leave out of a legend."""
    text = "".join(char if char.isprintable() else "�" for char in text)
    text = text if len(text) <= most else text[: most // 2 - 1] + "…" + text[-(most // 2) :]
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _libraries() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    return importlib.import_module("seaborn"), importlib.import_module("matplotlib.pyplot")


def _style(seaborn: Any) -> Any:
    return seaborn.axes_style(
        "whitegrid", {"axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False}
    )  # fmt: skip


# -- SVG that a page can take ---------------------------------------------------------------------------------------


def inline_svg(figure: Any, title: str, description: str, note: str = "") -> Figure:
    """A matplotlib figure as SVG inside a page, and closes it: text stays text, ink becomes the page's colour, the background falls
    away, title and description are there for screen readers, ids are the figure's own."""
    from matplotlib import pyplot

    text = StringIO()
    with inline_style(title):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return adapted(text.getvalue(), title, description, note)


def inline_style(salt: str) -> AbstractContextManager[None]:
    """How matplotlib is to write SVG: text as text, the same bytes each time."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt})


def adapted(drawing: str, title: str, description: str, note: str = "") -> Figure:
    """The same for SVG that matplotlib has written."""
    root = ET.fromstring(drawing)
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    # matplotlib makes some ids of addresses in memory: they are numbered in their order instead
    words = "\n".join((title, description, _REFERENCES.sub("", ET.tostring(root, encoding="unicode"))))
    own = "figure-" + hashlib.sha256(words.encode()).hexdigest()[:8]
    ids = {
        name: f"{own}-{n}" for n, name in enumerate(dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^)"]+)', drawing)))
    }
    for defs in root.iter(f"{{{_SVG}}}defs"):
        for style in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(style)  # it would hold for the whole page
    for element in root.iter():
        _adapt(element, ids)
    root.attrib = {
        "viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{own}-title {own}-description",
        "style": "fill: currentColor; stroke-linejoin: round; stroke-linecap: butt; "
        f"min-width: {float(root.attrib['viewBox'].split()[2]):.0f}px",  # a narrow page scrolls, and its text can still be read
    }  # fmt: skip
    for position, (tag, words) in enumerate((("title", title), ("description", description))):
        told = ET.Element(f"{{{_SVG}}}{'desc' if tag == 'description' else tag}", {"id": f"{own}-{tag}"})
        told.text = words
        root.insert(position, told)
    return Figure(title, ET.tostring(root, encoding="unicode"), description, note)


def _adapt(element: ET.Element, ids: Mapping[str, str]) -> None:
    if (name := element.attrib.pop("id", None)) in ids:
        element.set("id", ids[str(name)])
    for key, value in list(element.attrib.items()):
        if key.endswith("href"):
            element.set(key, "#" + ids[value.removeprefix("#")])
        elif key in ("style", "fill", "stroke", "clip-path"):
            linked = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{ids[found[1]]})", value)
            element.set(key, "".join(_recoloured(linked, element.tag)))


def _recoloured(style: str, tag: str) -> Iterator[str]:
    """The style with ink as the page's and, of shapes, white as nothing."""
    for part in re.split(r"(#[0-9a-f]{6}\b)", style):
        if part == "#ffffff" and not tag.endswith("text"):
            yield "none"
        else:
            yield _INK.get(part, part)
