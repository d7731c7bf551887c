"""What looks like a credential, taken out of what a report is made of, before anything escapes or cuts it.

Records hold no environment variable, but texts of a user's own (paths, names, prompts) may have a token pasted in, and a report is what
one hands on. Shapes that services give their tokens are known; a password of no particular shape is not, except inside an address.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[A-Za-z0-9]{32,}"
    r"|sk-(?:ant|proj)-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}\b|AIza[\w-]{35})"
    r"|(?<=://)[^\s/@:\"'<>]*:[^\s/@\"'<>]+(?=@)"  # https://user:password@host
)


def redact(text: str) -> str:
    """The text with what has the shape of a token, or of an address's password, replaced; and what no encoding has (of a file's name) as ?."""
    return _TOKENS.sub(REDACTED, text.encode("utf-8", "replace").decode("utf-8"))


def redacted(value: Any) -> Any:
    """The same for every text in a JSON-like value, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, list) else value
