"""Parametrised tests of which some cases are enough in a hurry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_fast(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """The first `fast` of the values as they are; the others are slow tests."""
    return [value if number < fast else _slow(value) for number, value in enumerate(values)]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
