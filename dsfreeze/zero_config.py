"""What DeepSpeed is told: a file of ds_configs/ (or the user's own) and a recipe become one dict, one owner per key.

The recipe owns batch sizes, accumulation, clipping, precision, optimizer and schedule; the file owns the rest. "auto"
in the file means "whoever owns it decides", and none is left in the result. A file that contradicts the recipe is one
error listing every conflict with both values. No torch, no deepspeed: the tables in zero_keys.py stand in for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfreeze import zero_keys
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import Recipe
from dsfreeze.recipe_yaml import read_file

LOCAL = "local"
AUTO = "auto"
Config = dict[str, Any]
_PACKAGED = Path(__file__).parent / "_ds_configs"
_IN_REPOSITORY = Path(__file__).parents[1] / "ds_configs"


def is_local(recipe: Recipe) -> bool:
    """Whether the recipe asks for plain PyTorch in one process instead of DeepSpeed."""
    return recipe.zero == LOCAL


def stage_of(config: Config) -> int:
    """The ZeRO stage, 0 to 3, of a resolved config."""
    return int(config["zero_optimization"]["stage"])


def offload_of(config: Config) -> bool:
    """Whether a resolved config keeps optimizer state and masters in CPU memory."""
    return "offload_optimizer" in config["zero_optimization"]


def bucket_of(largest_set: int | None) -> int:
    """What "auto" is for DeepSpeed's buffers, in elements: no more than the largest set that trains can fill."""
    bucket = min(zero_keys.BUCKET, largest_set or zero_keys.BUCKET)
    return bucket + bucket % 2  # DeepSpeed asserts that bucket sizes are even


def ds_configs() -> dict[str, Path]:
    """The shipped files by name: those in the installed package, else the repository's."""
    folder = _PACKAGED if _PACKAGED.is_dir() else _IN_REPOSITORY
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_ds_config(name_or_path: str) -> Path:
    """The file that a recipe's `zero:` means; UserError with the nearest name when there is none."""
    shipped = ds_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix == ".json" or "/" in name_or_path:
        return path
    raise UserError(
        f"zero: there is no ds_config '{name_or_path}'.{did_you_mean(name_or_path, [*shipped, LOCAL])} "
        "Or name a DeepSpeed JSON by its path."
    )


def read_ds_config(path: Path) -> Config:
    """The file's content; UserError when it is missing, no JSON, no object, or gives a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> Config:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f'{path}: "{doubled}" is given twice.')
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise UserError(f"{path}: {constant} is not JSON.")

    content = read_file(path, "ds_config")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=refuse)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno}).") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file.") from None
    except RecursionError:
        raise UserError(f"{path} nests its values too deeply to be a ds_config.") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a ds_config is an object ({{...}}), not {type(value).__name__}.")
    return value


def deepspeed_config(recipe: Recipe, world_size: int, largest_set: int | None = None) -> Config:
    """What `deepspeed.initialize` gets for this recipe on `world_size` ranks; plain JSON values, no "auto".

    `largest_set` is the number of elements of the plan's largest trainable set; buffers need not be larger. Raises one
    UserError with every conflict between file and recipe, every unknown key and every key that cannot work here.
    """
    assert not is_local(recipe), "a local run has no DeepSpeed config"
    path = find_ds_config(recipe.zero)
    given = read_ds_config(path)
    problems = list(_shape_problems(given))
    if not problems:
        given = _tidy(given)
        owned = _owned(recipe, world_size)
        problems = [*_refusals(given), *_stage_problems(given, recipe.train.bf16), *_conflicts(given, owned)]
    if problems:
        told = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{path}:{told}")
    return _resolve(given, owned, largest_set)


# -- what is wrong -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Owned:
    """A value the recipe decides, and the words that say where."""

    value: Any
    words: str


def _owned(recipe: Recipe, world_size: int) -> dict[str, _Owned]:
    train = recipe.train
    micro, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    product = (
        f"per_device_train_batch_size x gradient_accumulation_steps x ranks = {micro} x {accumulation} x {world_size}"
    )
    return {
        "train_micro_batch_size_per_gpu": _Owned(micro, "train.per_device_train_batch_size"),
        "gradient_accumulation_steps": _Owned(accumulation, "train.gradient_accumulation_steps"),
        "train_batch_size": _Owned(micro * accumulation * world_size, product),
        "gradient_clipping": _Owned(train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": _Owned(train.bf16, "train.bf16"),
    }


def _conflicts(given: Config, owned: dict[str, _Owned]) -> Iterator[str]:
    for key, owner in owned.items():
        theirs = _get(given, key)
        if theirs not in (None, AUTO) and not _same(theirs, owner.value):
            yield (
                f'"{key}" is {_json(theirs)}, but the recipe says {_json(owner.value)} ({owner.words}). '
                'The recipe owns it: change it there, and write "auto" here or leave it out.'
            )
    for key, (value, reason) in zero_keys.REQUIRED.items():
        theirs = _get(given, key)
        if theirs not in (None, AUTO) and not _same(theirs, value):
            yield f'"{key}" is {_json(theirs)}, but must be {_json(value)}: {reason}.'


def _same(one: Any, other: Any) -> bool:
    """Equality in JSON's eyes: 1 is 1.0, but not true."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _shape_problems(given: Config) -> Iterator[str]:
    """Keys that do not exist, and sections and values of the wrong type."""
    removed = [key for key in zero_keys.REFUSED if "." not in key]
    yield from _unknown(given, [*zero_keys.TOP_LEVEL, *removed], "")
    for key in ("zero_optimization", "bf16", "bfloat16", "fp16", "data_types", "checkpoint", "compile", "timers"):
        if not isinstance(given.get(key, {}), dict):
            yield f'"{key}" is {_json(given[key])}; it is an object, such as {{"stage": 2}} or {{"enabled": true}}.'
    zero = given.get("zero_optimization")
    if isinstance(zero, dict):
        gone = [key.partition(".")[2] for key in zero_keys.REFUSED if key.startswith("zero_optimization.")]
        yield from _unknown(zero, [*zero_keys.ZERO, *gone], "zero_optimization.")
        yield from _wrong_types(zero)
    tables = {
        "zero_optimization.offload_optimizer": zero_keys.OFFLOAD_OPTIMIZER,
        "zero_optimization.offload_param": zero_keys.OFFLOAD_PARAM,
        "bf16": zero_keys.BF16, "bfloat16": zero_keys.BF16, "data_types": zero_keys.DATA_TYPES,
    }  # fmt: skip
    for key, names in tables.items():
        section = _get(given, key)
        if isinstance(section, dict):
            yield from _unknown(section, names, f"{key}.")
    if "bf16" in given and "bfloat16" in given:
        yield '"bfloat16" is an old name of "bf16", and both are given; keep "bf16".'


def _unknown(section: Config, names: Iterable[str], prefix: str) -> Iterator[str]:
    names = list(names)
    for key in section:
        if key not in names:
            near = did_you_mean(key, names, how_many_listed=0)
            yield f'"{prefix}{key}" is no key of DeepSpeed 0.19.8.{near or did_you_mean(key, names)}'


def _wrong_types(zero: Config) -> Iterator[str]:
    words = {int: "a whole number", bool: "true or false", dict: "an object"}
    for key, value in zero.items():
        expected = zero_keys.ZERO.get(key)
        if expected is None or (value in (None, AUTO) and key != "stage"):
            continue
        if expected is int:
            right = not isinstance(value, bool) and isinstance(value, int | float) and value >= 0 and value % 1 == 0
        else:
            right = isinstance(value, expected)
        if not right or (key == "stage" and value not in (0, 1, 2, 3)):
            kind = "0, 1, 2 or 3" if key == "stage" else words[expected]
            yield f'"zero_optimization.{key}" is {_json(value)}; it takes {kind}.'
        elif key == "allgather_bucket_size" and value % 2:
            yield f'"zero_optimization.{key}" is {_json(value)}; it takes an even number.'


def _refusals(given: Config) -> Iterator[str]:
    for key, reason in zero_keys.REFUSED.items():
        if _is_on(_get(given, key)):
            yield f'"{key}" cannot be used: {reason}.'


def _is_on(value: Any) -> bool:
    if isinstance(value, dict) and "enabled" in value:
        value = value["enabled"]
    return bool(value) and value != AUTO


def _stage_problems(given: Config, bf16: bool) -> Iterator[str]:
    """What a stage cannot do: offload below stage 2, gradients accumulated in another precision."""
    stage = int(_get(given, "zero_optimization.stage") or 0)
    for key, lowest in (("offload_optimizer", 2), ("offload_param", 3)):
        device = _get(given, f"zero_optimization.{key}.device") or "none"
        if device == "nvme":
            yield f'"zero_optimization.{key}" on nvme was never tried with frozen layers; write "device": "cpu".'
        elif device not in ("none", "cpu", AUTO):
            yield f'"zero_optimization.{key}.device" is {_json(device)}.{did_you_mean(str(device), ["cpu", "none"])}'
        elif device == "cpu" and stage < lowest:
            yield f'"zero_optimization.{key}" needs stage {lowest} or higher, and this is stage {stage}.'
    accumulate, model = _get(given, "data_types.grad_accum_dtype"), "bf16" if bf16 else "fp32"
    if accumulate in (None, AUTO, model):
        return
    if (accumulate, model) != ("fp32", "bf16"):
        yield f'"data_types.grad_accum_dtype" is {_json(accumulate)}, but train.bf16 is {_json(bf16)}; write "auto".'
    elif stage == 0:
        yield '"data_types.grad_accum_dtype" fp32 at stage 0 in bf16 is a mix that DeepSpeed lacks; write "auto".'
    elif stage == 1:
        yield (
            '"data_types.grad_accum_dtype" fp32 at stage 1 in bf16 keeps a whole fp32 gradient of every trainable '
            'tensor on every rank; write "auto", or use stage 2, which shards it.'
        )


# -- the result ----------------------------------------------------------------------------------------------------


def _tidy(given: Config) -> Config:
    """A deep copy with today's names, and without sections that are switched off."""
    config: Config = json.loads(json.dumps(given))
    if "bfloat16" in config:
        config["bf16"] = config.pop("bfloat16")
    for key in zero_keys.REFUSED:
        if (value := _get(config, key)) is not None and not _is_on(value):
            _remove(config, key)
    for key in ("offload_optimizer", "offload_param"):
        name = f"zero_optimization.{key}"
        if _get(config, name) is not None and _get(config, f"{name}.device") in (None, "none", AUTO):
            _remove(config, name)
    return config


def _resolve(config: Config, owned: dict[str, _Owned], largest_set: int | None) -> Config:
    for key, owner in owned.items():
        _set(config, key, owner.value)
    for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"):
        config[key] = zero_keys.REQUIRED[key][0]
    types = config.setdefault("data_types", {})
    if types.get("grad_accum_dtype") in (None, AUTO):
        types["grad_accum_dtype"] = "bf16" if config["bf16"]["enabled"] else "fp32"
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = stage = int(zero.get("stage", 0))
    if stage:
        bucket = bucket_of(largest_set)
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[key] = bucket if zero.get(key) in (None, AUTO) else int(zero[key])
    for key, value in zero_keys.AUTO_ZERO.items():
        if zero.get(key) == AUTO:
            zero[key] = value
    resolved: Config = _without_auto(config)
    return resolved


def _without_auto(value: Any) -> Any:
    """What is still "auto" is left to DeepSpeed's default by not being written."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}
    return [_without_auto(inner) for inner in value if inner != AUTO] if isinstance(value, list) else value


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _set(config: Config, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for name in path:
        config = config.setdefault(name, {})
    config[last] = value


def _remove(config: Config, dotted: str) -> None:
    parent, _, last = dotted.rpartition(".")
    (_get(config, parent) if parent else config).pop(last)


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
