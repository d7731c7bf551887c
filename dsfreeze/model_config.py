"""A config.json of the user's -> the anatomy of each task model that transformers builds from it, on the meta device.

transformers takes a field that its config class does not know without a word, and a misspelt `num_hiden_layers` would be
a model of the default depth; so every field is checked before a config is made of them. Only this one file is read, and
no code beside it runs.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from dsfreeze.activations import Activations
from dsfreeze.anatomy import Anatomy, head_task
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import parse_json
from dsfreeze.model import AUTO_CLASSES, able_tasks, activations_of_config
from dsfreeze.quiet import quiet_transformers

#: Fields that hold nothing of a model's shape, though a config class may not know them.
BOOKKEEPING = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "attn_implementation", "auto_map",
    "bos_token_id", "custom_pipelines", "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "id2label", "label2id", "language", "license", "model_type", "num_labels", "output_attentions", "output_hidden_states", "output_past", "pad_token_id",
    "dropout_rate", "problem_type", "quantization_config", "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache", "_sliding_window_pattern",
    # rotary positions, which old files spell out field by field
    "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "partial_rotary_factor",
    # how experts are chosen and balanced, not how many there are
    "aux_loss_alpha", "ep_size", "scoring_func", "seq_aux", "topk_method", "router_jitter_noise",
    # of earlier versions of BERT and GPT-2
    "position_embedding_type", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "n_ctx", "predict_special_tokens", "reference_compile",
))  # fmt: skip
#: Fields that would change the shape at any other value than this one, which is all that transformers builds.
ONLY_AT = {"moe_layer_freq": 1}
#: Fields whose numbers are sizes; those of the first kind cannot be 0.
POSITIVE = re.compile(
    r"(vocab|hidden|(moe_)?intermediate)_size|num_(hidden_layers|layers|attention_heads|heads|key_value_heads)"
    r"|n_(layer|head|embd)|d_(model|ff|kv)|\w*head_dim|\w+_lora_rank|(encoder|decoder)_(layers|attention_heads|ffn_dim)"
)
SIZE = re.compile(r"\w*(_size|_dim|_rank|_layers|_heads|_experts|_embeddings)|n_(inner|positions)")
#: How transformers' code takes and looks for fields that a config class does not declare.
TAKEN = re.compile(r'kwargs\.(?:pop|get|setdefault)\(\s*"(\w+)"')
LOOKED_FOR = re.compile(r'getattr\(\s*(?:self\.)?config,\s*"(\w+)"')
#: More than any model has; layers are built one by one, other sizes only multiplied.
MOST_LAYERS, MOST_OF_A_SIZE, MOST_PARAMETERS = 2_000, 2**24, 10**14


def read_config_anatomies(path: Path, name: str) -> dict[str, Anatomy]:
    """The anatomy, under `name`, of the model of every task the config can do, the language model first.

    Classifiers have two labels. UserError says which field of which file is wrong, and what to write instead.
    """
    file = config_file(path)
    raw = _read_json(file)
    config = _make_config(file, raw)
    _check_divisions(file, raw, config)
    able = set(map(head_task, able_tasks(config)))
    tasks = sorted(able, key=("causal_lm", "seq2seq", "classification", "tokens").index)
    if not tasks:
        raise UserError(f"{file}: model_type '{config.model_type}' is no language model or classifier of text.")
    return {task: _read_task(file, config, task, name) for task in tasks}


def read_config_activations(path: Path) -> Activations | None:
    """What passes of the config's models store; None where they cannot be run without data."""
    file = config_file(path)
    try:
        return activations_of_config(_make_config(file, _read_json(file)))
    except UserError:
        return None


def config_file(path: Path) -> Path:
    """The file that the user means by a path to it, or to its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = "holds no config.json" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}. Give --add a model's config.json, or the folder that holds it.")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = parse_json(file.read_text(encoding="utf-8"), object_hook=_number_or_object)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON file ({error}). Give a model's config.json.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds no JSON object. Give a model's config.json.")
    return raw


def _number_or_object(found: dict[str, Any]) -> Any:
    """What JSON has no number for (infinity), as transformers writes it."""
    return float(found["__float__"]) if set(found) == {"__float__"} else found


def _make_config(file: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The config of the fields in `raw`, each of them known and sensible."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UserError(f"{file} has no model_type. Add the one its model has in transformers, such as 'llama'.")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{file}: transformers has no model_type '{kind}'.{did_you_mean(kind, CONFIG_MAPPING)} "
            "A model with code of its own can be added as the type whose tensors it has."
        )
    for where, config_class, part in _parts(CONFIG_MAPPING[kind], raw, ""):
        _check_fields(file, where, config_class, part)
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[kind].from_dict(_without_bookkeeping(raw))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{file}: {_sentence(error)}") from None
    return config


def _without_bookkeeping(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that a config is made of; what names code or a quantisation is left out."""
    return {
        key: value
        for key, value in raw.items()
        if key not in ("auto_map", "quantization_config", "transformers_version", *ONLY_AT)
    }


def _parts(
    config_class: type[PreTrainedConfig], raw: dict[str, Any], where: str
) -> Iterator[tuple[str, type[PreTrainedConfig], dict[str, Any]]]:
    """(path, class, fields) of a config and of each config within it."""
    yield where, config_class, raw
    for key, sub in (config_class.sub_configs or {}).items():
        part = raw.get(key)
        if not isinstance(part, dict):
            continue
        kind: Any = part.get("model_type")
        if kind in CONFIG_MAPPING:
            sub = CONFIG_MAPPING[kind]
        if "__dataclass_fields__" in vars(sub):  # AutoConfig says nothing about its fields
            yield from _parts(sub, part, f"{where}{key}.")


def _check_fields(file: Path, where: str, config_class: type[PreTrainedConfig], raw: dict[str, Any]) -> None:
    known = known_fields(config_class)
    for field, value in raw.items():
        if field not in known and ONLY_AT.get(field) != value:
            raise UserError(
                f"{file}: {config_class.__name__} has no field '{where}{field}', so it would be left unread."
                f"{did_you_mean(field, known, how_many_listed=0)} Correct it, or remove it from a copy of the file."
            )
        if SIZE.fullmatch(field) or POSITIVE.fullmatch(field):
            _check_size(file, where + field, field, value)


def known_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields that a config class or its models read: its own, their other names, and those that neither declares."""
    own = {field.name for field in fields(config_class)}
    own |= {name for pair in config_class.attribute_map.items() for name in pair} | {"tie_word_embeddings"}
    return own | set(config_class.sub_configs or ()) | _read_undeclared(config_class) | BOOKKEEPING


def _read_undeclared(config_class: type[PreTrainedConfig]) -> set[str]:
    """Fields that the class writes of itself or takes from what is left over, or that its models look for."""
    post_inits = [vars(base).get("__post_init__") for base in config_class.__mro__ if base is not PreTrainedConfig]
    made = "".join(inspect.getsource(post_init) for post_init in post_inits if post_init is not None)
    folder = Path(inspect.getfile(config_class)).parent
    models = "".join(file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py"))
    written: set[str] = set()
    with quiet_transformers(), suppress(Exception):  # a few classes have no defaults
        written = set(config_class().to_dict())
    return {*written, *TAKEN.findall(made), *LOOKED_FOR.findall(models)}


def _check_size(file: Path, path: str, field: str, value: Any) -> None:
    if value is None or isinstance(value, bool | list | dict):
        return  # not a size, or one a layer; the config class knows which
    must_be_positive = POSITIVE.fullmatch(field) is not None
    if must_be_positive and not isinstance(value, int):
        raise UserError(f"{file}: {path} is {value!r}. Write a whole number.")
    if must_be_positive and value < 1:
        raise UserError(f"{file}: {path} is {value}. Write a number of at least 1.")
    most = MOST_LAYERS if field.endswith(("layers", "n_layer")) else MOST_OF_A_SIZE
    if isinstance(value, int) and value > most:
        raise UserError(f"{file}: {path} is {value:,}, more than any model has. Write a number of at most {most:,}.")


def _check_divisions(file: Path, raw: dict[str, Any], config: PreTrainedConfig) -> None:
    """Heads share the hidden size evenly, unless a head's size is given; queries share keys and values evenly."""
    try:
        text = config.get_text_config()
        width, heads, groups = (
            getattr(text, name, None) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
    except (ValueError, AttributeError, RuntimeError):  # two text models in one, or numbers that differ by layer
        return
    own = next(
        (part for part in raw.values() if isinstance(part, dict) and part.get("model_type") == text.model_type), raw
    )
    if isinstance(width, int) and isinstance(heads, int) and not _head_size_is_given(own, text) and width % heads:
        raise UserError(
            f"{file}: hidden_size {width} is no multiple of num_attention_heads {heads}. Correct one of them, or give "
            "head_dim."
        )
    if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups:
        raise UserError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}. Correct one of them."
        )


def _head_size_is_given(raw: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether a head's size is in the file, or a default of the class, rather than made of the hidden size."""
    names = {"head_dim", "d_kv", "qk_nope_head_dim", "attention_head_size"}
    defaults = {f.name: f.default for f in fields(type(config)) if f.name in names}
    return any(raw.get(name) for name in names) or any(value not in (None, MISSING) for value in defaults.values())


def _read_task(file: Path, config: PreTrainedConfig, task: str, name: str) -> Anatomy:
    config.num_labels = 2
    try:
        with torch.device("meta"), quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the anatomy's notes say the same
            anatomy = read_anatomy(AUTO_CLASSES[task].from_config(config, trust_remote_code=False), name)
    except Exception as error:  # transformers' classes, and their configs when read, may fail in any way on odd numbers
        raise UserError(
            f"{file}: no {config.model_type} model can be built and read from it: {_sentence(error)}"
        ) from error
    if anatomy.numel > MOST_PARAMETERS:
        raise UserError(f"{file}: its sizes make {anatomy.numel:,} parameters, more than any model has. Correct them.")
    return anatomy


def _sentence(error: BaseException) -> str:
    """The last line of what transformers says, where it names field and value."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ").rstrip(".") + "."
