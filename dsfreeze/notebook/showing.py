"""How notebooks look: one style for their figures, one frame for their findings. Needs seaborn and IPython, imported where they are used."""

from __future__ import annotations

from html import escape
from typing import Any


def set_style() -> None:
    """Seaborn's white grid. Names that a user chose are text in figures, where `$` begins no formula (so see `log_ticks`)."""
    import seaborn

    seaborn.set_theme(
        style="whitegrid", palette="colorblind", font_scale=0.85,
        rc={"figure.dpi": 110, "figure.constrained_layout.use": True, "text.parse_math": False, "axes.titlelocation": "left"},
    )  # fmt: skip


def log_ticks(*axes: Any) -> None:
    """Plain numbers on the logarithmic scales of matplotlib axes, whose own labels are formulas."""
    from matplotlib.ticker import NullFormatter

    for axis in (each for plot in axes for each in (plot.xaxis, plot.yaxis) if each.get_scale() == "log"):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def finding(sentence: str) -> Any:
    """A sentence in a frame, its text escaped."""
    from IPython.display import HTML

    return HTML(framed(sentence))


def framed(sentence: str) -> str:
    style = "border-left: 4px solid #0173b2; padding: 0.4em 0.8em; margin: 0.4em 0"
    return f'<p style="{style}"><b>Finding.</b> {escape(sentence)}</p>'
