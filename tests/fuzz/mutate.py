"""Made-up content: whole files, cut, spliced, with bytes and words exchanged. All of it follows from the seed."""

from __future__ import annotations

import random

#: What readers stumble over.
WORDS = (
    b"null", b"NaN", b"-1", b"1e999", b"99999999999999999999", b"\"\"", b"[]", b"{}", b"true", b"~", b"&a [*a]", b"!!python/object:os.system", b"../../etc/passwd",
    b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"- ", b": ", b"{", b"}", b"[", b"]", b"\"", b"'", b"\n", b"\t", b"#", b"|", b">", b"%", b"<<: ", b"0x1F", b"1_000", b".inf",
    b"2026-01-01", b"\\u0000", b"\\ud800", b"[" * 2000, b"{\"a\":" * 500, b"9" * 5000, "\u202e\u0000\u2028".encode(),
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content after one to five changes."""
    for _ in range(draw.randint(1, 5)):
        content = draw.choice((_flip, _cut, _insert, _replace, _double, _swap))(content, draw)
    return content


def _at(content: bytes, draw: random.Random) -> int:
    return draw.randint(0, len(content))


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return draw.randbytes(1)
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    first, last = sorted((_at(content, draw), _at(content, draw)))
    return content[:first] + content[last:] if draw.random() < 0.7 else content[:first]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = _at(content, draw)
    word = draw.choice(WORDS) if draw.random() < 0.8 else draw.randbytes(draw.randint(1, 8))
    return content[:at] + word + content[at:]


def _replace(content: bytes, draw: random.Random) -> bytes:
    """A whole word of the file gives way to another."""
    parts = content.split(b" ")
    parts[draw.randrange(len(parts))] = draw.choice(WORDS)
    return b" ".join(parts)


def _double(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    return b"\n".join([*lines[: at + 1], *lines[at:]])


def _swap(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    first, second = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)
