"""Where the states of examples are kept: in this process's memory, or on disk, shared between processes and runs.

A store never gives wrong states and never ends a run: what is damaged, missing or of another length is absent, and a disk that
refuses is written to no more. What it may not do is tell who may write: that is the folder's lock (folder.py).
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

from torch import Tensor

from dsfreeze.prefix.codec import Codec
from dsfreeze.prefix.shards import (
    KEY_BYTES,
    DamagedShard,
    Example,
    ForeignShard,
    Shard,
    open_shard,
    remove_abandoned,
    write_shard,
)

SHARD_BYTES = 64 * 2**20


class Store(Protocol):
    """Hidden states (T, width) by example key (16 bytes). One thread may add while another reads."""

    failure: str | None
    """Why nothing is written any more; None while all is well."""
    damaged: list[str]
    """What was found damaged and forgotten, each with its reason."""
    refused: int
    """How often an example was not stored because the codec cannot hold its values."""

    def __contains__(self, key: bytes) -> bool: ...

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the states held, as stored."""

    def add(self, key: bytes, states: Tensor) -> None:
        """Copy `states` (T, width), any float dtype, on the CPU. Ignored where the key is there already."""

    def read(self, key: bytes, out: Tensor) -> bool:
        """Fill `out` (T, width), any float dtype. False when the key is not there (any more) or has another length.

        After False, `out` holds nothing of use.
        """

    def flush(self) -> None:
        """What was added is on disk."""

    def refresh(self) -> int:
        """Take in what others have written since; returns how many examples are new."""

    def close(self) -> None: ...


class MemoryStore:
    """States in this process's memory; gone with it. `limit`: bytes that they may take, None for any number."""

    def __init__(self, width: int, codec: Codec, limit: int | None = None) -> None:
        self.width, self.codec, self.limit = width, codec, limit
        self.failure: str | None = None
        self.damaged: list[str] = []
        self.refused = 0
        self._examples: dict[bytes, Example] = {}
        self._tokens = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._examples

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def nbytes(self) -> int:
        return self._tokens * self.codec.bytes_per_token(self.width)

    def add(self, key: bytes, states: Tensor) -> None:
        if self.failure or key in self:
            return
        if self.limit is not None and self.nbytes + len(states) * self.codec.bytes_per_token(self.width) > self.limit:
            self.failure = (
                f"The states take more than the {self.limit / 1e9:.3g} GB of memory that were free. The run goes on with the "
                f"{len(self)} examples that are stored; nothing is added to them any more."
            )
            return
        example = _encoded(self.codec, self.width, key, states)
        if example is None:
            self.refused += 1
            return
        self._examples[key] = example
        self._tokens += len(example.payload)

    def read(self, key: bytes, out: Tensor) -> bool:
        example = self._examples.get(key)
        if example is None or example.payload.shape != out.shape:
            return False
        self.codec.decode(example.payload, example.scales, out)
        return True

    def flush(self) -> None:
        pass

    def refresh(self) -> int:
        return 0

    def close(self) -> None:
        self._examples, self._tokens = {}, 0


class DiskStore:
    """States in a folder's shards, and in a buffer until they fill one; a killed process loses its buffer and nothing else.

    `writer` begins the names of this process's shards: letters, digits, _ and -; two processes may share one. With
    `may_write` false nothing is added, and nothing in the folder is touched. Shards of another codec, width or format are
    passed over. Shards that turn out damaged are forgotten, told in `damaged`, and removed where we may write.

    The index takes some 250 bytes of memory for each example. Until they are written, up to `shard_bytes` of states do too.
    """

    def __init__(
        self, folder: Path, width: int, codec: Codec, writer: str, *, may_write: bool, shard_bytes: int = SHARD_BYTES
    ) -> None:
        assert re.fullmatch(r"[A-Za-z0-9_-]+", writer), writer
        self.folder, self.width, self.codec, self.writer = folder, width, codec, writer
        self.may_write, self.shard_bytes = may_write, shard_bytes
        self.failure: str | None = None
        self.refused = 0
        self.damaged: list[str] = []
        self._lock = Lock()  # the seven below; never held while the disk is read or written
        self._shards: set[Shard] = set()
        self._index: dict[bytes, tuple[Shard, int]] = {}
        self._copies: dict[bytes, list[tuple[Shard, int]]] = {}  # what the index has from another shard; few, if any
        self._indexed_tokens = 0
        self._buffer: dict[bytes, Example] = {}
        self._buffered_tokens = 0
        self._seen: set[str] = set()
        self._writing = Lock()  # one shard is written at a time
        self._number: int | None = None
        if may_write:
            self._prepare()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._buffer or key in self._index

    def __len__(self) -> int:
        with self._lock:
            return len(self._buffer) + len(self._index)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return (self._indexed_tokens + self._buffered_tokens) * self.codec.bytes_per_token(self.width)

    def add(self, key: bytes, states: Tensor) -> None:
        if not self.may_write or self.failure or key in self:
            return
        example = _encoded(self.codec, self.width, key, states)
        if example is None:
            self.refused += 1
            return
        with self._lock:
            if key not in self._index:
                self._buffer[key] = example
                self._buffered_tokens += len(example.payload)
            full = self._buffered_tokens * self.codec.bytes_per_token(self.width) >= self.shard_bytes
        if full:
            self.flush()

    def read(self, key: bytes, out: Tensor) -> bool:
        with self._lock:
            buffered, (shard, position) = self._buffer.get(key), self._index.get(key, (None, 0))
        if buffered is not None:
            return self._decode(buffered.payload, buffered.scales, out)
        if shard is None or (shard.length(position), self.width) != tuple(out.shape):
            return False
        direct = out.dtype == self.codec.dtype and out.device.type == "cpu" and out.is_contiguous()
        try:
            payload, scales = shard.read(position, out.detach() if direct else None)
        except (DamagedShard, OSError) as error:
            self._forget(shard, error)
            return False
        return direct or self._decode(payload, scales, out)

    def flush(self) -> None:
        """Write the buffer as one shard. Sets `failure` where the disk refuses, and drops the buffer then."""
        with self._writing:
            with self._lock:
                examples = list(self._buffer.values())
            if not examples:
                return
            try:
                self._open(self._write(examples))
            except OSError as error:
                self._fail(error)
            with self._lock:
                for example in examples:
                    self._unbuffer(example.key)

    def refresh(self) -> int:
        before = len(self)
        try:
            # sorted, so that of two copies every process that starts anew reads the same one
            found = sorted(path for path in self.folder.glob("*.safetensors") if path.name not in self._seen)
        except OSError:
            found = []
        for path in found:
            with suppress(OSError):  # gone again, or not to be read now: asked again next time
                self._open(path)
        return max(0, len(self) - before)

    def close(self) -> None:
        self.flush()

    # -- the folder

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.folder)
        except OSError as error:
            self._fail(error)

    def _write(self, examples: list[Example]) -> Path:
        """Write a shard under the first free number after all that this writer's name has had so far."""
        if self._number is None:
            pattern = re.compile(rf"{self.writer}-(\d+)\.safetensors")
            names = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
            self._number = max((int(name[1]) for name in names if name), default=-1)
        while True:
            self._number += 1
            path = self.folder / f"{self.writer}-{self._number:06d}.safetensors"
            with suppress(FileExistsError):  # another process of that name was faster
                write_shard(path, self.codec, self.width, examples)
                return path

    def _open(self, path: Path) -> None:
        """Take in a shard, or remember never to ask for it again; OSError as the disk gives it."""
        try:
            shard = open_shard(path)
        except DamagedShard as error:
            with self._lock:
                self._seen.add(path.name)
            self._tell_damaged(path, error)
            return
        except ForeignShard:
            shard = None
        with self._lock:
            new = path.name not in self._seen  # not taken in by another thread meanwhile
            self._seen.add(path.name)
            if new and shard is not None and shard.codec == self.codec and shard.width == self.width:
                self._shards.add(shard)
                self._take(shard)

    def _take(self, shard: Shard) -> None:
        for position, key in enumerate(shard.keys):
            if key in self._index:
                self._copies.setdefault(key, []).append((shard, position))
            else:
                self._index[key] = shard, position
                self._indexed_tokens += shard.length(position)
            self._unbuffer(key)

    def _drop(self, shard: Shard) -> None:
        """Take a shard's examples out of the index; those that another shard has too are read from there."""
        for key in shard.keys:
            copies = [(other, at) for other, at in self._copies.pop(key, []) if other is not shard]
            owner, position = self._index.get(key, (None, 0))
            if owner is shard:
                self._indexed_tokens -= shard.length(position)
                del self._index[key]
                if copies:
                    self._index[key] = other, at = copies.pop(0)
                    self._indexed_tokens += other.length(at)
            if copies:
                self._copies[key] = copies

    def _unbuffer(self, key: bytes) -> None:
        example = self._buffer.pop(key, None)
        self._buffered_tokens -= len(example.payload) if example else 0

    def _forget(self, shard: Shard, error: DamagedShard | OSError) -> None:
        """Drop a shard's examples, but those that another shard has too. One that could not be read may come back later."""
        with self._lock:
            if shard not in self._shards:
                return
            self._shards.remove(shard)
            self._drop(shard)
            if isinstance(error, OSError):
                self._seen.discard(shard.path.name)
        self._tell_damaged(shard.path, error)

    def _tell_damaged(self, path: Path, error: DamagedShard | OSError) -> None:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        if (line := f"{path}: {reason}") not in self.damaged:  # a disk that refuses may do so again at every refresh
            self.damaged.append(line)
        if self.may_write and isinstance(error, DamagedShard):
            with suppress(OSError):
                path.unlink()

    def _fail(self, error: OSError) -> None:
        self.failure = (
            f"The prefix cache {self.folder} could not be written: {error.strerror or error}. What it holds is still "
            "read; nothing is added to it any more."
        )

    # -- parts

    def _decode(self, payload: Tensor, scales: Tensor | None, out: Tensor) -> bool:
        if payload.shape != out.shape:
            return False
        self.codec.decode(payload, scales, out)
        return True


def _encoded(codec: Codec, width: int, key: bytes, states: Tensor) -> Example | None:
    """The example as stored, or None where the codec cannot hold it."""
    assert len(key) == KEY_BYTES, key
    assert states.ndim == 2, states.shape
    assert states.shape[1] == width, states.shape
    encoded = codec.encode(states)
    return encoded and Example(key, *encoded)
