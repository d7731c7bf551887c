"""A shard: one safetensors file with the states of many examples, whole or absent, never trusted unchecked.

    checksums  int64 (n,)      crc32 of each example's states and scales
    keys       uint8 (n, 16)
    lengths    int32 (n,)      tokens of each example
    scales     fp32 (sum,)     int8 only
    states     (sum, width)    in the codec's dtype

The header's metadata tells the format, the codec, the width, and the crc32 of the first three tensors: were a flipped bit in a
key or a length to go unnoticed, an example would be given another one's states. Examples are read by positioned reads, not
through a mapping: mapped pages count as the process's memory. Any reader of safetensors opens the file; we write it ourselves
because safetensors' own writer wants each tensor in one piece, a second copy of all that waits to be written.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsfreeze.files import parse_json
from dsfreeze.prefix.codec import CODECS, Codec

FORMAT, FORMAT_VERSION = "dsfreeze-prefix", "1"
KEY_BYTES = 16
_LONGEST_HEADER = 1 << 20
_ABANDONED_SECONDS = 86_400


class DamagedShard(Exception):
    """A shard that is not as it was written; the message is the reason."""


class ForeignShard(Exception):
    """A whole safetensors file that is no shard of a format we read."""


class Example(NamedTuple):
    """What a shard holds of one example: payload (T, width) and scales (T,) as `Codec.encode` gives them."""

    key: bytes
    payload: Tensor
    scales: Tensor | None


@dataclass(eq=False)
class Shard:
    """An open shard's index; no descriptor stays open. `starts` (n + 1,) counts tokens from the first example on."""

    path: Path
    codec: Codec
    width: int
    keys: list[bytes]
    starts: np.ndarray
    checksums: np.ndarray
    states_at: int
    scales_at: int
    stamp: tuple[int, ...]
    _proof: tuple[tuple[int, ...], bytearray] = field(init=False)
    """Which examples were verified, and the stamp of the file they were verified in."""

    def __post_init__(self) -> None:
        self._proof = self.stamp, bytearray(len(self.keys))

    def length(self, position: int) -> int:
        """Tokens of the example at `position`."""
        return int(self.starts[position + 1] - self.starts[position])

    def read(self, position: int, into: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Payload (T, width) and scales (T,) of one example, by one positioned read each.

        `into` takes the payload: contiguous, on the CPU, in the codec's dtype. The checksum is compared the first time that this
        process reads the example, and again when the file has changed. DamagedShard when it differs; OSError as the disk gives
        it, or when the file is not the one that was opened. `into` holds nothing of use then.
        """
        length = self.length(position)
        payload = torch.empty((length, self.width), dtype=self.codec.dtype) if into is None else into
        example = Example(self.keys[position], payload, torch.empty(length) if self.codec.scaled else None)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            stamp = _stamp(handle)
            self._fill_verified(handle, stamp, position, example)
        except DamagedShard:
            if stamp == self.stamp:
                raise
            raise OSError(errno.ESTALE, "changed since it was opened", str(self.path)) from None
        finally:
            os.close(handle)
        return payload, example.scales

    def _fill_verified(self, handle: int, stamp: tuple[int, ...], position: int, example: Example) -> None:
        first = int(self.starts[position])
        _fill(handle, _raw(example.payload), self.states_at + first * self.width * self.codec.dtype.itemsize)
        if example.scales is not None:
            _fill(handle, _raw(example.scales), self.scales_at + first * 4)
        of, verified = self._proof
        if of != stamp:  # touched, or another file under this name: nothing of it is verified
            _, verified = self._proof = stamp, bytearray(len(self.keys))
        if not verified[position]:
            if _checksum(example) != self.checksums[position]:
                raise DamagedShard(f"the checksum of example {position} is wrong")
            verified[position] = 1


# -- writing


def write_shard(path: Path, codec: Codec, width: int, examples: Sequence[Example]) -> None:
    """Write a shard under a temporary name, then give it `path`, which must be free: FileExistsError otherwise.

    OSError as the disk gives it; nothing is left behind then. Not synced: what a power cut tears, the checksums find.
    """
    aside = path.with_name(f".{path.stem}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with aside.open("xb") as file:
            for piece in _pieces(codec, width, examples):
                file.write(piece)
        _rename_to_free(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of writers that died: on this host by their process, elsewhere after a day."""
    for path in folder.glob(".*.tmp"):
        found = re.fullmatch(r"\.[^.]+\.([^.]+)\.(\d+)\.[0-9a-f]+\.tmp", path.name)
        with suppress(OSError):
            if found and (_is_dead(found[1], int(found[2])) or _is_old(path)):
                path.unlink()


def owner() -> str:
    """This process in the names of folders that are gone with it."""
    return f"{_host()}-{os.getpid()}"


def remove_abandoned_folders(parent: Path, prefix: str, *, elsewhere: bool) -> None:
    """Remove the folders `<prefix><owner>-<letters and digits>` of processes of this host that died; with `elsewhere` those of other
    hosts too, a day after they were last written."""
    for path in parent.glob(f"{prefix}*"):
        found = re.fullmatch(re.escape(prefix) + r"(.+)-(\d+)-[a-z0-9_]+", path.name)
        with suppress(OSError):
            if found and (_is_dead(found[1], int(found[2])) or (elsewhere and found[1] != _host() and _is_old(path))):
                shutil.rmtree(path, ignore_errors=True)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS


def _pieces(codec: Codec, width: int, examples: Sequence[Example]) -> Iterator[bytes | memoryview]:
    """The file from its first byte to its last."""
    tokens = sum(len(example.payload) for example in examples)
    index = {
        "checksums": np.array([_checksum(example) for example in examples], dtype="<i8"),
        "keys": np.frombuffer(b"".join(example.key for example in examples), dtype=np.uint8),
        "lengths": np.array([len(example.payload) for example in examples], dtype="<i4"),
    }
    yield _header(codec, width, len(examples), tokens, _index_checksum(index))
    yield from (array.tobytes() for array in index.values())
    yield from (_raw(example.scales) for example in examples if example.scales is not None)
    yield from (_raw(example.payload) for example in examples)


def _header(codec: Codec, width: int, num_examples: int, num_tokens: int, index_checksum: int) -> bytes:
    fields = {"format": FORMAT, "version": FORMAT_VERSION, "codec": codec.name, "width": str(width)}
    header = {"__metadata__": {**fields, "index": str(index_checksum)}}
    header |= _entries(_layout(codec, width, num_examples, num_tokens))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text


def _layout(codec: Codec, width: int, num_examples: int, num_tokens: int) -> dict[str, tuple[str, list[int], int]]:
    """The tensors in the file's order, each with its dtype, shape and bytes."""
    layout = {
        "checksums": ("I64", [num_examples], 8 * num_examples),
        "keys": ("U8", [num_examples, KEY_BYTES], KEY_BYTES * num_examples),
        "lengths": ("I32", [num_examples], 4 * num_examples),
    }
    if codec.scaled:
        layout["scales"] = ("F32", [num_tokens], 4 * num_tokens)
    layout["states"] = (codec.tag, [num_tokens, width], num_tokens * width * codec.dtype.itemsize)
    return layout


def _entries(layout: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    """The layout as safetensors' header tells it."""
    ends = list(accumulate(size for _, _, size in layout.values()))
    return {
        name: {"dtype": tag, "shape": shape, "data_offsets": [end - size, end]}
        for end, (name, (tag, shape, size)) in zip(ends, layout.items(), strict=True)
    }


def _rename_to_free(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)  # unlike a rename, it never replaces what another process put there
    except FileExistsError:
        raise
    except OSError:
        # no hard links on this disk: two writers of one name could still meet between these two lines
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        os.rename(aside, path)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname()) or "host"


def _is_dead(host: str, pid: int) -> bool:
    if host != _host():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # another user's
    return False


# -- opening


def open_shard(path: Path) -> Shard:
    """Read a shard's header and index, and hold them against each other and against the file's size.

    Raises DamagedShard (with the reason), ForeignShard (another format, or a codec we do not know), OSError.
    """
    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
        header, start = _read_header(file, os.fstat(file.fileno()).st_size)
        codec, width, index_checksum = _metadata(header)
        layout = _checked_layout(header, codec, width)
        ends = list(accumulate((size for _, _, size in layout.values()), initial=start))
        if ends[-1] != os.fstat(file.fileno()).st_size:
            raise DamagedShard("its size is not what its header says")
        index = {
            "checksums": np.frombuffer(file.read(layout["checksums"][2]), dtype="<i8"),
            "keys": np.frombuffer(file.read(layout["keys"][2]), dtype=np.uint8),
            "lengths": np.frombuffer(file.read(layout["lengths"][2]), dtype="<i4"),
        }
    if _index_checksum(index) != index_checksum:
        raise DamagedShard("the checksum of its index is wrong")
    starts = np.concatenate([[0], np.cumsum(index["lengths"], dtype=np.int64)])
    if (index["lengths"] < 0).any() or starts[-1] != layout["states"][1][0]:
        raise DamagedShard("its lengths do not add up")
    keys = index["keys"].tobytes()
    return Shard(
        path=path,
        codec=codec,
        width=width,
        keys=[keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)],
        starts=starts,
        checksums=index["checksums"],
        states_at=ends[-2],
        scales_at=ends[3],
        stamp=stamp,
    )


def _read_header(file: BinaryIO, file_size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the tensors start."""
    size = int.from_bytes(file.read(8), "little")
    if size > min(_LONGEST_HEADER, file_size - 8):
        raise DamagedShard("it is shorter than its header says")
    try:
        header = parse_json(file.read(size))
    except ValueError as error:
        raise DamagedShard(f"its header is garbled: {error}") from None
    if not isinstance(header, dict):
        raise DamagedShard("its header is garbled")
    return header, 8 + size


def _metadata(header: dict[str, Any]) -> tuple[Codec, int, int]:
    """Codec, width and the index's checksum."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or (metadata.get("format"), metadata.get("version")) != (FORMAT, FORMAT_VERSION):
        raise ForeignShard("no shard of this format")
    codec = CODECS.get(str(metadata.get("codec")))
    if codec is None:
        raise ForeignShard(f"of a codec that this version does not know: {metadata.get('codec')}")
    try:
        return codec, int(metadata["width"]), int(metadata["index"])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedShard(f"its metadata are garbled: {error}") from None


def _checked_layout(header: dict[str, Any], codec: Codec, width: int) -> dict[str, tuple[str, list[int], int]]:
    """The layout that the header's numbers of examples and tokens give, if the header says just that."""
    try:
        num_examples, num_tokens = header["lengths"]["shape"][0], header["states"]["shape"][0]
        if not (type(num_examples) is type(num_tokens) is int and num_examples >= 0 and num_tokens >= 0 and width > 0):
            raise DamagedShard("its header is garbled: a shape is no shape")
    except (KeyError, TypeError, IndexError) as error:
        raise DamagedShard(f"its header is garbled: {error!r}") from None
    layout = _layout(codec, width, num_examples, num_tokens)
    if {name: entry for name, entry in header.items() if name != "__metadata__"} != _entries(layout):
        raise DamagedShard("its header is garbled: the tensors are not the ones of a shard")
    return layout


# -- bytes


def _raw(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory; through bytes, as NumPy knows no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill(handle: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        got = os.preadv(handle, [memory[done:]], offset + done)
        if got == 0:
            raise DamagedShard("it ends too early")
        done += got


def _checksum(example: Example) -> int:
    crc = zlib.crc32(_raw(example.payload))
    return crc if example.scales is None else zlib.crc32(_raw(example.scales), crc)


def _index_checksum(index: dict[str, np.ndarray]) -> int:
    crc = 0
    for array in index.values():
        crc = zlib.crc32(array.tobytes(), crc)
    return crc


def _stamp(handle: int) -> tuple[int, ...]:
    stat = os.fstat(handle)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
