"""The README.md of an exported model: what it was trained from, the plan, the figures. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from dsfreeze.anatomy import Anatomy
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import Recipe

PIPELINES = {
    "classification": "text-classification",
    "tokens": "token-classification",
    "causal_lm": "text-generation",
    "sft": "text-generation",
    "preference": "text-generation",
    "seq2seq": "text2text-generation",
}
#: Phases listed one by one; a rotating plan has hundreds.
LISTED = 8


def model_card(anatomy: Anatomy, plan: FreezePlan, recipe: Recipe, metrics: Mapping[str, float]) -> str:
    """Markdown with the front matter that the hub reads; `anatomy` has the adapters, if any."""
    base = public_name(recipe.model.name)
    front = ["library_name: transformers", f"pipeline_tag: {PIPELINES[recipe.task]}", "tags: [dsfreeze]"]
    lines = ["---", *front, *([f"base_model: {base}"] if "/" in base else []), "---", ""]
    lines += [
        f"# {base}, fine-tuned with frozen layers",
        "",
        f"Trained by dsfreeze from `{base}`: task `{recipe.task}`, strategy `{plan.strategy}`, "
        f"plan {plan.digest[:12]}.",
        "",
        *_adapter(plan),
        "| steps | trainable parameters | layers that train |",
        "|---|---|---|",
        *(_phase_row(anatomy, plan, phase) for phase in plan.phases[:LISTED]),
    ]
    if len(plan.phases) > LISTED:
        lines.append(f"| ... | | {len(plan.phases) - LISTED} more phases |")
    lines += ["", *(f"- {note}" for note in plan.notes), *([""] if plan.notes else [])]
    lines += [*_training(recipe), *_metrics(metrics)]
    return "\n".join(lines).rstrip() + "\n"


def public_name(name: str) -> str:
    """A model's name as it may be published: a hub id or embedded name whole, of a path the last part alone."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _adapter(plan: FreezePlan) -> Iterator[str]:
    if plan.adapter is not None:
        a = plan.adapter
        kind = {"lora": "LoRA", "dora": "DoRA"}[a.kind]
        yield f"{kind} adapters (r {a.r}, alpha {a.alpha:g}) on {len(a.targets)} matrices, merged into the weights."
        yield ""


def _phase_row(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> str:
    numel = sum(plan.elements_of(anatomy.by_name[name]) for name in phase.trainable)
    steps = f"{phase.first_step} .. {'end' if phase.end is None else phase.end - 1}"
    return (
        f"| {steps} | {numel:,} of {anatomy.numel:,} ({numel / anatomy.numel:.1%}) | {_layers(anatomy, plan, phase)} |"
    )


def _layers(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> str:
    """The layers a phase trains, runs of blocks as `layers.3-5`, `*` after those it trains in part."""
    trained = set(phase.trainable)
    marks: list[tuple[str, int | None, str]] = []
    for layer in anatomy.layers:
        count = sum(plan.elements_of(t) for t in layer.tensors if t.name in trained)
        if count:
            index = int(layer.name.partition(".")[2]) if layer.is_block else None
            marks.append((layer.name, index, "" if count == layer.numel else "*"))
    return ", ".join(_runs(marks))


def _runs(marks: Iterable[tuple[str, int | None, str]]) -> Iterator[str]:
    first = last = None
    mark = ""
    for name, index, this in [*marks, ("", None, "")]:
        if first is not None and last is not None and (index != last + 1 or this != mark):
            yield f"layers.{first}{f'-{last}' if last > first else ''}{mark}"
            first = None
        if index is None:
            if name:
                yield name + this
            continue
        first, last, mark = index if first is None else first, index, this


def _training(recipe: Recipe) -> Iterator[str]:
    t = recipe.train
    yield from ("## Training", "")
    options = {
        "learning rate": f"{t.learning_rate:g} ({t.lr_scheduler_type})",
        "steps": t.max_steps if t.max_steps > 0 else f"{t.num_train_epochs:g} epochs",
        "batch": f"{t.per_device_train_batch_size} per rank x {t.gradient_accumulation_steps}",
        "weights": "bf16" if t.bf16 else "fp32",
        "engine": recipe.zero if re.fullmatch(r"[\w-]+", recipe.zero) else "a DeepSpeed config of the user's",
        "seed": t.seed,
        "freeze": json.dumps(recipe.freeze.model_dump(mode="json", exclude_defaults=True, exclude={"scores"})),
    }
    if recipe.task == "preference":
        options["preference"] = f"{recipe.preference.loss} loss, beta {recipe.preference.beta:g}"
    yield from (f"- {name}: {value}" for name, value in options.items())
    yield ""


def _metrics(metrics: Mapping[str, float]) -> Iterator[str]:
    if metrics:
        yield from ("## Evaluation", "", "| metric | value |", "|---|---|")
        yield from (f"| {name} | {value:.4g} |" for name, value in metrics.items())
