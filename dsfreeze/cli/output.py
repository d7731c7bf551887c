"""What commands say: results on standard output, everything else on standard error; of several ranks rank 0 alone prints results."""

from __future__ import annotations

import json
import os
from typing import Any

from dsfreeze.screen import screen, show_result, write_result


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def say(message: str) -> None:
    screen(soft_wrap=True).print(message, highlight=False)


def is_leader() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    write(json.dumps(value, indent=2, default=str) + "\n")


def write(text: str) -> None:
    if is_leader():
        write_result(text)


def show(drawing: Any) -> None:
    if is_leader():
        show_result(drawing)
