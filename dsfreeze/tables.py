"""Tables for people: a run's summary, metrics, the list of models, the quickstart's comparison. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from dsfreeze.ranking import STABLE


def gib(num_bytes: float) -> str:
    """Bytes as a figure with a unit a person reads (powers of 1024)."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def million(count: float) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,.0f}"


def metrics_table(name: str, metrics: Mapping[str, float]) -> Table:
    table = Table("metric", "value", title=f"evaluation of {name}", title_justify="left")
    for metric, value in metrics.items():
        table.add_row(metric, f"{value:.4f}")
    return table


def _left_out(summary: Mapping[str, Any]) -> str:
    skipped = summary.get("skipped_steps", 0)
    return f" ({skipped} left out, not finite)" if skipped else ""


def summary_table(summary: Mapping[str, Any]) -> Table:
    """What a training run did and took."""
    table = Table(show_header=False, title="summary", title_justify="left")
    memory = summary["memory"]
    rows = [
        ("steps", f"{summary['steps']}{_left_out(summary)}, last loss {summary['loss']:.4f}"),
        ("trainable", f"{million(summary['trainable'])} of {million(summary['total'])} parameters "
                      f"({100 * summary['trainable'] / summary['total']:.1f} %)" + _held(summary)),
        ("FLOPs per token", f"{100 * summary['flops_vs_full']:.0f} % of full tuning" + _spared(summary)),
        ("seconds per step", f"{summary['seconds_per_step']:.3f} (median)" if summary["seconds_per_step"] else "no step was left"),
        ("optimizer state", f"{gib(memory['optimizer_state'] + memory['masters'])} (masters and moments, this rank)"
                            + _predicted_states(summary)),
        ("peak memory", gib(memory["peak"]) + _predicted_peak(summary)),
    ]  # fmt: skip
    if summary["switches"]:
        waits = f"; {gib(memory['parked'])} of state waits for its tensors' return" if memory["parked"] else ""
        rows.append(("switches", f"{summary['switches']} in {summary['seconds_switching']:.2f} s{waits}"))
    if chosen := summary["selection"]:
        number = chosen["decisions"]
        rows.append(("selection", f"{number} decision{'s' * (number > 1)} in {chosen['seconds']:.2f} s, peak memory "
                                  f"{gib(chosen['peak'])} until the last ({gib(chosen['peak_after'])} after it), "
                                  f"{gib(chosen['host_bytes'])} of copies in host memory"))  # fmt: skip
    if cache := summary.get("prefix_cache"):
        rows.append(("prefix cache", _cache_figures(cache)))
    for when, metrics in summary["metrics"].items():
        rows.append((when, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())))
    if summary["never_moved"]:
        rows.append(("never moved", ", ".join(summary["never_moved"][:3])))
    rows += [(key, summary[key]) for key in ("record", "model") if summary[key]]
    for row in rows:
        table.add_row(*row)
    return table


def _held(summary: Mapping[str, Any]) -> str:
    """Where masks hold elements back, how many the trained tensors have."""
    held = summary.get("held", summary["trainable"])
    return f", in tensors of {million(held)}" if held > summary["trainable"] else ""


def _spared(summary: Mapping[str, Any]) -> str:
    """What is left of the FLOPs where the prefix is read."""
    cache = summary.get("prefix_cache")
    if not cache or not cache["hits"]:
        return ""
    left = summary["flops_vs_full"] - cache["flops_spared"] / summary["full_flops_per_token"]
    return f", {100 * left:.0f} % where the prefix is read from the cache"


def _cache_figures(cache: Mapping[str, Any]) -> str:
    """Where the states lie, how many were read, and what a step that reads them takes."""
    if not cache["examples"] or cache["tier"] == "off":
        return str(cache["reason"])
    lines = [
        f"{100 * cache['hits'] / cache['examples']:.0f} % of {cache['examples']:,} examples read above layer {cache['cut']} "
        f"({gib(cache['bytes'])} in {'memory' if cache['tier'] == 'memory' else cache['where']})"
    ]
    cached, computed = cache["seconds_per_cached_step"], cache["seconds_per_computed_step"]
    if cached and computed:
        lines.append(
            f"a step with it {cached:.3f} s, without {computed:.3f} s: {computed / cached:.2f} times as fast; waited {100 * cache['wait_share']:.1f} %"
        )
    if cache["evicted_bytes"]:
        lines.append(f"trained without the prefix's weights, {gib(cache['evicted_bytes'])}")
    return "\n".join(lines)


def filled_table(filled: Mapping[str, Any]) -> Table:
    """What `dsfreeze cache` stored, and what of it was there already."""
    table = Table(show_header=False, title=f"prefix cache of {filled['model']}", title_justify="left")
    seconds, tokens = filled["seconds"], filled["computed_tokens"]
    there = filled["examples"] - filled["computed_examples"]
    table.add_row("states", f"what leaves layer {filled['layers']}, {gib(filled['bytes'])}")
    table.add_row("examples", f"{filled['examples']:,}, of which {there:,} were there already")
    table.add_row(
        "computed", f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)" if tokens else "nothing"
    )
    table.add_row("folder", escape(str(filled["where"])))
    return table


def _predicted_states(summary: Mapping[str, Any]) -> str:
    predicted = summary.get("predicted") or {}
    return f", predicted {gib(predicted['optimizer_state'] + predicted['masters'])}" if "peak" in predicted else ""


def _predicted_peak(summary: Mapping[str, Any]) -> str:
    predicted = summary.get("predicted") or {}
    if "reason" in predicted:
        return f" (not predicted: {predicted['reason']})"
    return f", predicted {gib(predicted['peak'])} ({100 * predicted['peak_error']:+.0f} %)" if predicted else ""


def scores_table(content: Mapping[str, Any]) -> Table:
    """An analysis: of each score the layers that matter most and least, its stability, and where it comes from."""
    table = Table(
        title=f"where to fine-tune {content['model']['name']}", title_justify="left", box=SIMPLE, pad_edge=False
    )
    for name in ("score", "most", "least", "rho"):
        table.add_column(name, no_wrap=name == "score", justify="right" if name == "rho" else "left")
    for name, found in content["all"].items():
        layers = {key.partition(".")[2]: value for key, value in found["scores"].items() if key.startswith("layers.")}
        ranked = sorted(layers, key=lambda key: -layers[key])
        rho = found["spearman"]
        stable = "no data" if rho is None else f"{rho:.2f}" if rho >= STABLE else f"[bold red]{rho:.2f}[/]"
        shown = f"[bold]{name}[/]" if name == content["score"] else name
        table.add_row(shown, " ".join(ranked[:6]), " ".join(ranked[:-5:-1]), stable)
    seconds = ", ".join(f"{source} {cost['seconds']:.1f}" for source, cost in content["passes"].items())
    cuts = content["cuts"]
    ends = "; ".join(f"{gain.upper()} {c['dataset']['median']} ({c['agreement']:.0%} as A)" for gain, c in cuts.items())
    table.caption = (
        f"rho: rank agreement between halves of {content['data']['num_examples']} examples; red below {STABLE}\n"
        + (f"freezing ends after layer (SALF, by gain): {ends}\n" if cuts else "")
        + f"selection took {content['seconds']:.1f} s: {seconds}"
    )
    table.caption_justify = "left"
    return table


def models_table(rows: Iterable[Any]) -> Table:
    table = Table(box=SIMPLE, title="embedded models, and shapes to plan with", title_justify="left", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("parameters", no_wrap=True, justify="right")
    table.add_column("what")
    for row in rows:
        table.add_row(row.name, million(row.parameters), f"{row.what}. {row.licence}. At hand: {row.available}")
    table.caption = (
        "Or write model: as a hub id (those above plan without the hub), a folder that\nfrom_pretrained loads, or a .gguf "
        "file. One more shape to plan with: models --add config.json."
    )
    table.caption_justify = "left"
    return table


def _predicted_row(*summaries: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The planner's word on both peaks, where it has one."""
    peaks = [(summary.get("predicted") or {}).get("peak") for summary in summaries]
    return [("peak memory, predicted", gib, *peaks)] if all(peaks) else []


def comparison_table(frozen: Mapping[str, Any], full: Mapping[str, Any]) -> Table:
    """The quickstart's end: what freezing saved, measured beside full tuning in one run."""
    table = Table(
        "", "this plan", "full tuning", "ratio", title="what freezing saved, measured in this run", title_justify="left"
    )
    before, after = (frozen["metrics"].get(when, {}) for when in ("before", "after"))  # a run may evaluate nothing
    for metric in (name for name in after if name != "loss"):
        table.add_row(f"{metric} before", f"{before[metric]:.3f}" if metric in before else "", "", "")
        table.add_row(f"{metric} after", f"[bold]{after[metric]:.3f}[/]", "", "")
    table.add_row("parameters", million(frozen["total"]), million(full["total"]), "")
    rows = [
        ("trainable parameters", million, frozen["trainable"], full["trainable"]),
        ("optimizer state", gib, *(s["memory"]["optimizer_state"] for s in (frozen, full))),
        ("peak memory", gib, *(s["memory"]["peak"] for s in (frozen, full))),
        *_predicted_row(frozen, full),
        ("seconds per step", "{:.3f}".format, frozen["seconds_per_step"], full["seconds_per_step"]),
        ("FLOPs per token (formula)", "{:.0%}".format, frozen["flops_vs_full"], full["flops_vs_full"]),
    ]
    for name, show, mine, theirs in rows:
        table.add_row(name, show(mine), show(theirs), f"{mine / theirs:.2f}" if theirs else "")
    return table


def study_table(record: Mapping[str, Any]) -> Table:
    """A scaling study: of each plan the smallest cluster that holds it, what the training takes there, and whether a prefix cache pays."""
    study, device = record["study"], record["device"]["name"]
    title = f"smallest clusters of {device}, {study['tokens']:.3g} tokens in sequences of {study['sequence_length']}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    priced = study["price_per_gpu_hour"] is not None
    for name in ("model", "strategy"):
        table.add_column(name, no_wrap=True)
    for name in ("GPUs", "ZeRO", "GiB", "s/Mtok", "GPU-h", *(["price"] if priced else []), "cache"):
        table.add_column(name, justify="right", no_wrap=True)
    cached = {(row["model"], row["strategy"]): row for row in record["prefix_cache"]}
    for plan in record["plans"]:
        figures = _cluster_figures(plan["smallest"], priced) or ["[red]none[/]"]
        filled = [*figures, *[""] * (5 + priced - len(figures))]
        cache = _cache_figure(cached.get((plan["model"], plan["strategy"])))
        table.add_row(plan["model"], plan["strategy"].replace(" fraction=", " "), *filled, cache)
    left = [f"left out: {row['model']}, {row['strategy']}. {row['reason']}" for row in record["left_out"]]
    explained = "cache: the step's speed-up with the frozen prefix read from storage, once it is filled"
    table.caption, table.caption_justify = "\n".join(map(escape, [explained, *left])), "left"
    return table


def _cluster_figures(smallest: Mapping[str, Any] | None, priced: bool) -> list[str]:
    if smallest is None:
        return []
    return [
        f"{smallest['gpus']:,}",
        str(smallest["stage"]),
        f"{smallest['bytes'] / 2**30:.1f}",
        f"{1e6 * smallest['seconds_per_token']:.3g}",
        f"{smallest['gpu_hours']:,.1f}",
        *([f"{smallest['price']:,.2f}"] if priced else []),
    ]


def _cache_figure(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['step_speedup']:.2f}x" if row["step_speedup"] > 1 else "no"
