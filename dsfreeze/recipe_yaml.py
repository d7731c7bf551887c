"""YAML as recipes use it: plain values, each with the line it stands on; safe on any bytes.

Scalars are read by YAML 1.2's core schema, not PyYAML's 1.1: `5e-5` is a number, `no` and `on` are texts (so that
`eval_strategy: no` means what Hugging Face's does; a true-or-false key still takes them), `12:30` and `2024-01-01` are
texts. Anchors, aliases, merge keys and tags are refused: nothing in a recipe needs them, and they are how YAML bites.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsfreeze.errors import UserError

Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
_QUOTES = "; a text that begins with * & ! % @ or ` needs quotes"
_TAG = "tag:yaml.org,2002:"
_CORE = (  # tag, pattern, characters it can begin with (YAML 1.2.2, section 10.3.2)
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)  # fmt: skip


@dataclass
class Document:
    """What a file says: values, the line of every key (counted from 1), and mistakes that are no YAML errors."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    mistakes: list[tuple[Key, int, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        parser: Any = self
        if parser.check_event(yaml.AliasEvent):
            event = parser.peek_event()
            problem = f"'*{event.anchor}' is an alias, which a recipe cannot hold"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Unicode's own line ends go in double quotes: PyYAML folds them away in any other style."""
        style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
        node: yaml.Node = self.represent_scalar(_TAG + "str", text, style=style)
        return node


if hasattr(yaml, "CSafeLoader"):

    class _QuickLoader(yaml.CSafeLoader):
        pass

    _Quick: Any = _QuickLoader
else:
    _Quick = None
#: What keeps text from libyaml: more than printable ASCII, aliases, tags and their like, brackets that hold something, deep nesting.
_UNUSUAL = re.compile(
    rb"[^\n\x20-\x7e]|[&*!@`?|>]|^%|^---|^\.\.\.|\[(?!\])|(?<!\[)\]|\{(?!\})|(?<!\{)\}|^ {24}|- - - - ", re.MULTILINE
)


def _use_core_schema(*classes: Any) -> None:
    for cls in classes:
        cls.yaml_implicit_resolvers = {}
        for name, pattern, first in _CORE:
            cls.add_implicit_resolver(_TAG + name, re.compile(pattern), first)


_use_core_schema(_Loader, _Dumper, *([_Quick] if _Quick else []))
_Dumper.add_representer(str, _Dumper.represent_text)


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back as the same value, keys in the order given."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a small text file; UserError when there is none, or it is far too large to be `what`."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the {what} file in it.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes: that is no {what}.")
        return path.read_bytes()
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"There is no {what} {path}.{_nearby(path)}") from None
    except (OSError, ValueError) as error:  # a name too long, one with a NUL, no permission
        raise UserError(f"Cannot read the {what} {path}: {error}.") from None


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    names = sorted(other.name for other in path.parent.iterdir() if path.suffix and other.suffix == path.suffix)
    return f" Files of that kind in {path.parent}: {', '.join(names[:12])}." if names else ""


def parse_yaml(content: bytes, name: str) -> Document:
    """Read a mapping; UserError, with the line, when `content` is not YAML or not a mapping."""
    try:
        root = _compose(content)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{_at(name, error.problem_mark)}: not YAML: {_problem(error)}.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape like \\UFFFFFFFF is a ValueError of chr()
        detail = str(error).replace("\n", " ")
        raise UserError(f"{name} is not a text file in YAML: {detail}.") from None
    except RecursionError:
        raise UserError(f"{name} nests its values too deeply to be a recipe.") from None
    document = Document()
    if root is None:
        return document
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{name}: a recipe is a mapping (lines like `model: smollm2-135m`), not {_kind(root)}.")
    document.values = _build(root, (), document) or {}
    return document


def _compose(content: bytes) -> yaml.Node | None:
    """The tree of nodes. libyaml makes the same, faster, of what `dump_yaml` writes (hundreds of records are read at once); all
    other text, and every mistake, is for PyYAML's own parser, whose depth is bounded and whose messages are worded for people."""
    if _Quick is not None and not _UNUSUAL.search(content):
        with suppress(yaml.YAMLError):
            quick: yaml.Node | None = yaml.compose(content, Loader=_Quick)
            return quick
    return yaml.compose(content, Loader=_Loader)


def parse_value(text: str) -> Any:
    """The value of `key=value`: a quoted text, a flow list or mapping, or else a plain scalar taken whole.

    `*.bias` and `translate English to German: ` are texts here. Raises UserError when a quote or bracket does not fit.
    """
    if not text.lstrip().startswith(("[", "{", '"', "'")):
        name = _resolve(text.strip())
        return text if name == "str" else _scalar(name, text.strip())
    content = f"value: {text.strip()}".encode("utf-8", "surrogatepass")
    document = parse_yaml(content, "value")
    if document.mistakes:
        raise UserError(document.mistakes[0][2])
    return document.values["value"]


def _resolve(text: str) -> str:
    for name, pattern, _ in _CORE:
        if re.match(pattern, text):
            return name
    return "str"


def _build(node: yaml.Node, key: Key, document: Document) -> Any:
    """The node's value, noting lines and mistakes on the way (the composer has bounded the depth)."""
    name = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode):
        if name == "map":
            return dict(_items(node, key, document))
    elif isinstance(node, yaml.SequenceNode):
        if name == "seq":
            return [_build(child, (*key, i), document) for i, child in enumerate(node.value)]
    elif name in {"null", "bool", "int", "float", "str"}:
        try:
            return _scalar(name, node.value)
        except ValueError as error:
            _mistake(document, key, node, f"{node.value!r:.40} is not readable as {name}: {error}")
            return None
    _mistake(document, key, node, f"the tag {node.tag} is not allowed in a recipe; write the plain value")
    return None


def _items(node: yaml.MappingNode, key: Key, document: Document) -> Iterator[tuple[str, Any]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _mistake(document, key, key_node, "a key must be a plain word")
            continue
        name, line = key_node.value, key_node.start_mark.line + 1
        if name in seen:
            _mistake(document, (*key, name), key_node, f"given twice; it stands on line {seen[name]} already")
            continue
        seen[name] = document.lines[(*key, name)] = line
        yield name, _build(value_node, (*key, name), document)


def _scalar(name: str, text: str) -> Any:
    if name == "null":
        return None
    if name == "bool":
        return text.lower() == "true"
    if name == "int":
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if name == "float":
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def _mistake(document: Document, key: Key, node: yaml.Node, text: str) -> None:
    document.mistakes.append((key, node.start_mark.line + 1, text))


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the single value {node.value!r:.40}"


def _at(name: str, mark: yaml.Mark | None) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    text = " ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in text:
        return text + "; indent with spaces"
    return text + (_QUOTES if "alias" in text or "anchor" in text or "cannot start any token" in text else "")
