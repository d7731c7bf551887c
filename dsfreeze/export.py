"""Writes models: a complete `from_pretrained` folder, or the trained tensors alone (a delta) and their way back.

    MODEL/  config.json, model*.safetensors, tokenizer, generation_config.json, README.md, dsfreeze_plan.json
    DELTA/  delta.safetensors (the tensors that trained, adapters unmerged), delta.json (base, task, plan), README.md

Both have SHA256SUMS of their tensors' files, as `sha256sum -c` reads it. Folders are written under another name and renamed when whole. Only a folder of our own is replaced.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsfreeze.adapters import add_adapters, merge_adapters
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.engine.process import import_deepspeed
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import parse_json, sha256_of
from dsfreeze.model import base_hash, load_model, load_tokenizer
from dsfreeze.model_card import model_card, public_name
from dsfreeze.plan import FreezePlan
from dsfreeze.quiet import quiet_transformers
from dsfreeze.recipe import ModelOptions, Recipe

if TYPE_CHECKING:
    from dsfreeze.checkpoint import Base

DELTA_FORMAT = 2
WEIGHTS, MANIFEST, PLAN, CARD = "delta.safetensors", "delta.json", "dsfreeze_plan.json", "README.md"
SUMS = "SHA256SUMS"
MERGED = "dsfreeze_merge.json"  # what a merged model was made of (`dsfreeze.merging`)


def export_model(
    folder_out: Path,
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, torch.Tensor] | None,
    plan: FreezePlan,
    recipe: Recipe,
    metrics: Mapping[str, float],
) -> Path:
    """Write the module as a folder that plain transformers loads; adapters are merged, dtypes kept; returns the folder.

    `weights` (full tensors under the names of `module.named_parameters()`) take the place of the module's own; they
    must be all of them when the module's are sharded. The module is left as it is. UserError when the folder cannot be
    written or a weight's name is none of the model's.
    """
    whole = _rebuild(module, plan, weights or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say about the architecture was said when it was loaded
        anatomy = read_anatomy(whole, recipe.model.name)
    return _write_model(folder_out, whole, tokenizer, plan, model_card(anatomy, plan, recipe, metrics))


def export_delta(
    folder_out: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    module: PreTrainedModel,
    plan: FreezePlan,
    recipe: Recipe,
    base: Base,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the trained tensors and what `fill_delta` needs to put them back; returns the folder.

    `weights` must hold every tensor that the plan trains; `module` (adapters in place) is asked for its config alone.
    """
    trained = {name: weights[name].detach().cpu().contiguous() for name in sorted(plan.ever_trained)}
    config: Any = module.config
    labelled = recipe.task in ("classification", "tokens")
    manifest = {
        "format_version": DELTA_FORMAT,
        "base": {**vars(base), "name": public_name(base.name)},
        "task": recipe.task,
        "num_labels": config.num_labels if labelled else None,
        "labels": [config.id2label[i] for i in range(config.num_labels)] if labelled else None,
        "dtype": str(module.dtype).removeprefix("torch."),
        "seed": recipe.train.seed,
        "dropout": recipe.model.dropout,
        "plan": json.loads(plan.to_json()),
    }
    anatomy = read_anatomy(module, recipe.model.name)
    with written_aside(folder_out) as aside:
        save_file(trained, aside / WEIGHTS)
        manifest["sha256"] = sha256_of(aside / WEIGHTS)
        (aside / CARD).write_text(model_card(anatomy, plan, recipe, metrics or {}), encoding="utf-8")
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return folder_out


def fill_delta(delta_folder: Path, base_options: ModelOptions, out: Path) -> Path:
    """The whole model again, from a delta and its base: loads the base, checks its hash, writes `out`.

    UserError when the folder is no whole delta or the base is not the one it was trained from.
    """
    manifest, trained = _read_delta(delta_folder)
    plan = FreezePlan.from_json(json.dumps(manifest["plan"]))
    options = base_options.model_copy(update={"dropout": manifest["dropout"]})
    module = load_model(
        options,
        manifest["task"],
        manifest["num_labels"],
        labels=manifest["labels"],
        dtype=getattr(torch, manifest["dtype"]),
        seed=manifest["seed"],
    )
    found, wanted = base_hash(module), manifest["base"]["hash"]
    if found != wanted:
        raise UserError(
            f"{delta_folder} was trained from '{manifest['base']['name']}' ({wanted[:12]}), and '{options.name}' "
            f"({found[:12]}) has other weights. Give the model it was trained from."
        )
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=manifest["seed"])
    card = (delta_folder / CARD).read_text(encoding="utf-8")
    return _write_model(out, _rebuild(module, plan, trained), load_tokenizer(options), plan, card)


# -- the whole model ---------------------------------------------------------------------------------------------------


def _rebuild(module: PreTrainedModel, plan: FreezePlan, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A second module on the CPU with the same class and names; adapters are still in place.

    Built on the meta device and given its tensors, so that a sharded module (whose own parameters are empty) is neither
    touched nor copied.
    """
    with torch.device("meta"), quiet_transformers():
        whole = type(module)(copy.deepcopy(module.config))
    if plan.adapter is not None:
        add_adapters(whole, plan.adapter, seed=0)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers()), **weights}
    # what an adapter is merged into is a copy: peft merges in place
    state = {n: t.detach().cpu().clone() if ".base_layer." in n else t.detach().cpu() for n, t in state.items()}
    shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
    unknown = sorted(weights.keys() - shapes.keys())
    if unknown:
        raise UserError(
            f"The weights hold '{unknown[0]}', which {type(whole).__name__} lacks: they are of another model, or of other "
            f"adapters.{did_you_mean(unknown[0], shapes)}"
        )
    wrong = sorted(name for name in state.keys() & shapes.keys() if state[name].shape != shapes[name])
    assert not wrong, f"export needs full tensors; {wrong[:3]} are sharded or of another model"
    whole.load_state_dict({n: t for n, t in state.items() if n in shapes}, strict=False, assign=True)
    whole.tie_weights()
    absent = sorted(name for name, tensor in whole.state_dict().items() if tensor.is_meta)
    assert not absent, f"export lacks {absent[:3]}"
    if hasattr(whole.config, "use_cache"):
        whole.config.use_cache = True  # training turned it off
    if getattr(module, "generation_config", None) is not None:
        whole.generation_config = copy.deepcopy(module.generation_config)
        _make_valid(whole.generation_config)
    return whole


def _make_valid(generation_config: Any) -> None:
    """Some published models set a temperature without do_sample, which transformers loads but refuses to write."""
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True


def _write_model(
    folder: Path, whole: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: FreezePlan, card: str
) -> Path:
    merge_adapters(whole)
    import_deepspeed()  # save_pretrained imports it (by way of accelerate), and then its log is on standard output
    with written_aside(folder) as aside, quiet_transformers():
        whole.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / CARD).write_text(card, encoding="utf-8")
        (aside / PLAN).write_text(plan.to_json(), encoding="utf-8")
    return folder


# -- folders -----------------------------------------------------------------------------------------------------------


def require_writable(folder: Path) -> None:
    """UserError when `folder` is there and no export of ours wrote it; a run asks before it trains."""
    if folder.exists() and not _is_ours(folder):
        raise UserError(f"{folder} exists and was not written by an export; name another folder, or remove it.")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into; it takes `folder`'s place when the block ends well, and is removed when not."""
    require_writable(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        (aside / SUMS).write_text(sums_of(aside), encoding="utf-8")
        _swap(aside, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Could not write {folder}: {error}. Free disk space, or name a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sums_of(folder: Path) -> str:
    """SHA-256 of a folder's safetensors files, as `sha256sum` writes them."""
    return "".join(f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors")))


def _is_ours(folder: Path) -> bool:
    marks = (PLAN, MANIFEST, MERGED)
    return folder.is_dir() and (any((folder / name).is_file() for name in marks) or not any(folder.iterdir()))


def _swap(aside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _read_delta(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        version, digest = manifest["format_version"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no delta: {MANIFEST} cannot be read ({error}). Write one with --delta.") from None
    if version != DELTA_FORMAT:
        raise UserError(f"{folder} has format {version}; this version of dsfreeze reads {DELTA_FORMAT}.")
    if not (folder / WEIGHTS).is_file() or sha256_of(folder / WEIGHTS) != digest:
        raise UserError(f"{folder / WEIGHTS} is missing, truncated or changed since it was written. Export it again.")
    return manifest, load_file(folder / WEIGHTS)
