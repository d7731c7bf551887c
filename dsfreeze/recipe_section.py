"""What the sections of a recipe have in common: how they check themselves, and the types that several of them use. No torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails

from dsfreeze.budget import parse_limit

#: A list of texts; a single one may stand alone.
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _limit_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{value!r} alone is no limit; write a share of full tuning such as 0.5x, 50% or -40%")


#: Limits of what may train, by what they limit.
Limits = dict[Literal["memory", "time", "flops", "trainable"], Annotated[str, BeforeValidator(_limit_text)]]


def checked_limits(limits: dict[str, str]) -> dict[str, str]:
    """The same; ValueError when one of them is no limit of its kind."""
    for kind, text in limits.items():
        parse_limit(kind, text)
    return limits


class Section(BaseModel):
    """A part of the recipe: immutable, no unknown keys, its attribute docstrings are the documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def refuse_at(section: Section, where: tuple[str, ...], value: Any, text: str) -> None:
    """Raise one error about the key at `where`, inside `section`."""
    told = InitErrorDetails(type="value_error", loc=where, input=value, ctx={"error": ValueError(text)})
    raise ValidationError.from_exception_data(type(section).__name__, [told])


def refuse_unread(
    section: Section, keys: dict[str, tuple[str, ...]], chooser: str, chosen: str, *, inside: str = ""
) -> None:
    """Raise one error for every key of `section` that differs from its default though `chosen` does not read it.

    Equal to the default is as good as not given: a resolved recipe, with all defaults written out, is one too.
    """
    mistakes = []
    for name, readers in keys.items():
        value, default = getattr(section, name), type(section).model_fields[name].get_default()
        if chosen in readers or value == default:
            continue
        told = ValueError(
            f"{chooser} '{chosen}' does not read it (only {', '.join(readers)}). "
            f"Change {chooser}, or leave this key at its default, {json.dumps(default)}."
        )
        where = (inside, name) if inside else (name,)
        mistakes.append(InitErrorDetails(type="value_error", loc=where, input=value, ctx={"error": told}))
    if mistakes:
        raise ValidationError.from_exception_data(type(section).__name__, mistakes)
