"""A name, folder or GGUF file -> tokenizer and module with the head a task needs.

Weights are read from safetensors alone, and code that a repository brings along runs only when the recipe says so. What
the loader changes is what training needs: a pad token, the label names, dropout, no key-value cache, and a fresh head
drawn from the run's seed so that every rank has the same one.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dsfreeze.activations import ATTENTIONS, Activations
from dsfreeze.adapters import add_adapters, merge_adapters
from dsfreeze.anatomy import Anatomy, head_task
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.embedded import EMBEDDED, embedded_folder, gguf_folder
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import why_closed
from dsfreeze.parts import Reading, head_names, reading_only
from dsfreeze.quiet import quiet_transformers
from dsfreeze.recipe import ModelOptions
from dsfreeze.shapes import SHAPES, added, is_added, known_anatomy, list_models

__all__ = [
    "add_adapters", "anatomy_of", "base_hash", "list_models", "load_model", "load_tokenizer", "merge_adapters",
    "read_anatomy",
]  # fmt: skip

#: transformers' auto classes; their methods have no types.
AUTO_CLASSES: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "causal_lm": AutoModelForCausalLM,
    "sft": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "preference": AutoModelForCausalLM,
}
#: Parts of a checkpoint that a model with another head rightly leaves unread.
OTHER_HEADS = (
    "lm_head",
    "cls",
    "pooler",
    "score",
    "classifier",
    "classification_head",
    "qa_outputs",
    "decoder",
    "head",
)


def load_model(
    options: ModelOptions,
    task: str,
    num_labels: int | None,
    *,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 42,
    kept: Collection[str] | None = None,
) -> PreTrainedModel:
    """The module for `task`, weights in `dtype` on the CPU; a head the weights lack is drawn from `seed`.

    `num_labels` counts classes (1: regression) for classification and tokens, and is not looked at otherwise. Warns
    when weights other than a head's are missing or left over; UserError when the model cannot be found, read, or do the
    task. `kept` names the tensors to read, the others are None (`dsfreeze.parts`); then what is missing is a UserError, and
    nothing is said about what is left over.
    """
    config = _task_config(options, task, num_labels, labels)
    with torch.random.fork_rng(devices=[]), reading_only(kept) as reading:
        torch.manual_seed(seed)
        module, info = _from_pretrained(options, task, config, dtype)
    _report_keys(options, module, info, reading)
    module.config.use_cache = False
    module.config.pad_token_id = _pad_token_id(options, module.config)
    generation = getattr(module, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = module.config.pad_token_id
    return module


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; a missing pad token is the end-of-text token."""
    source = locate(options.name)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"Model '{options.name}' has no tokenizer that can be read: {_first_line(error)}.") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"The tokenizer of '{options.name}' has no pad, end or unknown token; add a pad_token to its config."
        )
    return tokenizer


def anatomy_of(options: ModelOptions, task: str, num_labels: int | None) -> Anatomy:
    """The task model's anatomy without its weights: one we know, or read from the config on the meta device."""
    known = known_anatomy(options.name, task, num_labels)
    if known is not None:
        return known
    return read_anatomy(outline_of(options, task, num_labels), options.name)


def outline_of(
    options: ModelOptions, task: str, num_labels: int | None, *, labels: Sequence[str] | None = None
) -> PreTrainedModel:
    """The module that `load_model` gives, on the meta device: classes, names and shapes without memory."""
    config = _task_config(options, task, num_labels, labels)
    with torch.device("meta"), quiet_transformers():
        module: PreTrainedModel = AUTO_CLASSES[task].from_config(config, trust_remote_code=options.trust_remote_code)
    return module


def activations_of(options: ModelOptions, task: str, *, attention: str | None, dtype_bytes: int) -> Activations:
    """What the task model's passes store, read from its config on tensors without memory (a few seconds); UserError when it cannot be."""
    config = _task_config(options, task, None, None)
    attentions = [attention] if attention in ATTENTIONS else ATTENTIONS
    return activations_of_config(config, [task], attentions=attentions, widths=[dtype_bytes])


def activations_of_config(config: PreTrainedConfig, tasks: Iterable[str] = (), **ways: Any) -> Activations:
    """The same of a config, for some tasks or for every one it can do; `ways` are `read_activations`' own."""
    from dsfreeze.activation_reader import read_activations

    def build(auto: Any, task: str) -> Callable[[PreTrainedConfig], PreTrainedModel]:
        def built(config: PreTrainedConfig) -> PreTrainedModel:
            config.num_labels, config.pad_token_id = 2, getattr(config, "pad_token_id", None) or 0
            config.problem_type = "single_label_classification" if task == "classification" else None
            module: PreTrainedModel = auto.from_config(config)
            return module

        return built

    chosen = dict.fromkeys(map(head_task, tasks or able_tasks(config)))
    return read_activations(config, {task: build(AUTO_CLASSES[task], task) for task in chosen}, **ways)


def base_hash(source: nn.Module | Path) -> str:
    """SHA-256 that tells one set of base weights from another.

    Of a folder: its safetensors files, in the order of their names. Of a module: name, shape, dtype and bytes of every
    parameter, a fresh head included.
    """
    if isinstance(source, nn.Module):
        return hash_tensors(source.named_parameters())
    digest = hashlib.sha256()
    files = sorted(Path(source).glob("*.safetensors"))
    if not files:
        raise UserError(f"{source} holds no safetensors file.")
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, shape, dtype and bytes of each tensor, in the order given; they need not be there all at once."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def locate(name: str) -> str:
    """What transformers shall load for a model's name: a folder of ours or the user's, or a hub id as it stands."""
    if name in EMBEDDED:
        return str(embedded_folder(name))
    if name in SHAPES:
        raise UserError(
            f"'{name}' is a shape to plan with; it comes without weights. Give its hub id, {SHAPES[name].hub_id}, or a "
            "folder."
        )
    if is_added(name):
        raise UserError(f"'{name}' is a shape that you added to plan with. Give the folder or hub id of its weights.")
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and os.path.isfile(path):  # os.path answers no to a name too long, Path raises
        return str(gguf_folder(path))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is no model folder: it has no config.json. A run's exported model is in RUN/model."
            )
        return str(path)
    if os.path.exists(path) or path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        what = "is a file, not a folder or .gguf file" if os.path.exists(path) else "does not exist"
        raise UserError(f"Model '{name}' {what}.{did_you_mean(name, EMBEDDED)}")
    return name


# -- config ------------------------------------------------------------------------------------------------------------


def _read_config(options: ModelOptions) -> PreTrainedConfig:
    source = locate(options.name)
    if options.trust_remote_code:
        warnings.warn(f"Code from '{options.name}' runs here (model.trust_remote_code is on).", stacklevel=3)
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code)
            return config
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        if os.path.isdir(source):
            raise UserError(f"{Path(source) / 'config.json'} cannot be used: {_first_line(error)}.") from error
        raise UserError(
            f"No model '{options.name}': it is neither a folder nor an embedded model, and as a hub id it could not be "
            f"fetched ({_first_line(error)}).{did_you_mean(options.name, [*EMBEDDED, *SHAPES, *added()], how_many_listed=0)}"
        ) from error


def _task_config(
    options: ModelOptions, task: str, num_labels: int | None, labels: Sequence[str] | None
) -> PreTrainedConfig:
    """The model's config with labels, problem type and dropout set; UserError when it cannot do the task."""
    config = _read_config(options)
    _require_task(options, config, task)
    if task in ("classification", "tokens"):
        config.num_labels = num_labels or 2
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
    if task == "classification":
        config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
    if options.dropout is not None:
        _set_dropout(config, options.dropout)
    return config


def _require_task(options: ModelOptions, config: PreTrainedConfig, task: str) -> None:
    if options.trust_remote_code and getattr(config, "auto_map", None):
        return
    able = able_tasks(config)
    if task not in able:
        raise UserError(
            f"Model '{options.name}' ({config.model_type}) cannot do task '{task}'. "
            f"Its tasks: {', '.join(able) or 'none that dsfreeze has'}."
        )


def able_tasks(config: PreTrainedConfig) -> list[str]:
    """The tasks that transformers has a class for, without an encoder's causal one."""
    able = [name for name, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping]
    masked: Any = AutoModelForMaskedLM
    is_encoder = type(config) in masked._model_mapping and not config.is_encoder_decoder
    if is_encoder and not getattr(config, "is_decoder", False):
        # BERT and its like have a causal head too, but would look at the tokens they are to predict
        able = [name for name in able if AUTO_CLASSES[name] is not AutoModelForCausalLM]
    return able


def _set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability; layerdrop, which skips whole layers, is not one."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for field, value in part.to_dict().items():
            is_probability = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if is_probability and ("dropout" in field or field.endswith(("_pdrop", "_drop"))):
                setattr(part, field, probability)


def _pad_token_id(options: ModelOptions, config: PreTrainedConfig) -> int:
    """The tokenizer's pad token, which batches hold and classifiers look for; without a tokenizer the config's."""
    try:
        return int(load_tokenizer(options).pad_token_id)
    except UserError:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        candidates = (config.pad_token_id, *ends, 0)
        found: int = next(i for i in candidates if i is not None and i >= 0)
        return found


# -- weights -----------------------------------------------------------------------------------------------------------


def _from_pretrained(
    options: ModelOptions, task: str, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    source = locate(options.name)
    extra = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    try:
        with quiet_transformers():
            loaded: tuple[PreTrainedModel, dict[str, Any]] = AUTO_CLASSES[task].from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=options.trust_remote_code,
                ignore_mismatched_sizes=True,  # a head for another number of labels is replaced; the rest is checked
                output_loading_info=True,
                **extra,
            )
            return loaded
    except SafetensorError as error:
        raise UserError(_corrupt(source, error)) from error
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        closed = None
        if os.path.isdir(source):
            closed = next(filter(None, map(why_closed, sorted(Path(source).glob("*.*")))), None)
            _require_safetensors(Path(source))
        raise UserError(f"Model '{options.name}' cannot be loaded: {closed or _first_line(error) + '.'}") from error


def _corrupt(source: str, error: SafetensorError) -> str:
    """Names the safetensors file that cannot be opened."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as broken:
            return f"{file} is truncated or corrupt ({_first_line(broken)}). Fetch or export it again."
    return f"The weights of '{source}' are truncated or corrupt ({_first_line(error)}). Fetch them again."


def _require_safetensors(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no safetensors file, and dsfreeze reads no pickled weights (*.bin, *.pt). Load it with "
            "transformers where you trust it, and write it again with save_pretrained."
        )


def _report_keys(options: ModelOptions, module: nn.Module, info: dict[str, Any], reading: Reading) -> None:
    """Warn about weights that did not find their place, heads apart; UserError when a size does not fit or none did, or a part lacks any."""
    anatomy = reading.anatomy or _quiet_anatomy(module, options.name)
    head = head_names(anatomy)
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    wrong = sorted(set(mismatched) - head)
    if wrong:
        raise UserError(
            f"The weights of '{options.name}' do not fit its config.json: {_some(wrong)} have another shape."
        )
    missing = sorted(set(info["missing_keys"]) - head)
    marked: Any = module
    marked.has_fresh_head = bool(head & {*info["missing_keys"], *mismatched})
    if missing and reading.kept is not None:
        raise UserError(
            f"'{options.name}' lacks weights ({_some(missing)}), and a model that is read in parts must have them all, its "
            "head apart. Write freeze.evict_prefix: false."
        )
    blocks = {t.name for t in anatomy.block_tensors}
    if blocks <= set(missing):
        raise UserError(
            f"The weights of '{options.name}' fit no layer of {type(module).__name__}; check its config.json."
        )
    if missing:
        warnings.warn(f"'{options.name}' lacks weights, drawn at random: {_some(missing)}.", stacklevel=3)
    if reading.kept is not None:
        return
    unexpected = sorted(k for k in info["unexpected_keys"] if not set(k.split(".")[:2]) & set(OTHER_HEADS))
    if unexpected:
        warnings.warn(f"'{options.name}' has weights that the model does not use: {_some(unexpected)}.", stacklevel=3)


def _quiet_anatomy(module: nn.Module, name: str) -> Anatomy:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_anatomy(module, name)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
