"""Where the states of one cut are kept: opening a store for it, whoever else uses it.

A level is one cut's store. On disk it is a folder that runs share; in memory it is the process's own, or, for several ranks, a
folder in shared memory that is gone with the run. One run at a time writes a folder, all its ranks together.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsfreeze.embedded import cache_folder
from dsfreeze.engine.process import everyones
from dsfreeze.engine.ranks import Ranks
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.folder import CacheFolder, free_bytes, others
from dsfreeze.prefix.shards import owner, remove_abandoned_folders
from dsfreeze.prefix.store import DiskStore, MemoryStore, Store

#: A file system in memory that all processes of a machine see.
SHARED_MEMORY = Path("/dev/shm")
#: How the names of folders begin in which states wait while a cache is filled.
WAITING = ".waiting-"
#: How the names of folders in shared memory begin.
PASSING = "dsfreeze-"


@dataclass(eq=False)
class Level:
    """The states that leave layer `cut - 1`, made by layers of these digests. `notes`: what there is to say of how it was opened."""

    cut: int
    digests: tuple[str, ...]
    store: Store
    where: str
    notes: list[str] = field(default_factory=list)
    folder: CacheFolder | None = None
    #: This rank's number among those that see what it stores, and how many these are.
    share: tuple[int, int] = (0, 1)

    def close(self) -> None:
        self.store.close()
        if self.folder is not None:
            self.folder.release()

    def scratch(self, width: int, precise: str) -> Store:
        """Where states of one layer wait for the next while the cache is filled: on disk where the level is; `precise` is the codec that
        changes nothing."""
        if self.folder is None:
            return MemoryStore(width, CODECS[precise])
        return _Passing(
            Path(tempfile.mkdtemp(prefix=f"{WAITING}{owner()}-", dir=self.folder.path)),
            width,
            CODECS[precise],
            "waiting",
            may_write=True,
        )


class _Passing(DiskStore):
    """A store whose folder goes with it."""

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def open_level(
    tier: str,
    cut: int,
    digests: tuple[str, ...],
    manifest: Mapping[str, Any],
    width: int,
    ranks: Ranks,
    folder: Path | None,
) -> Level:
    """The store of one cut in that tier (collective). `folder`: where caches lie on disk, None for the usual place."""
    codec, writer = CODECS[manifest["stored"]], f"rank{ranks.rank:05d}"
    if tier == "memory" and ranks.world_size == 1:
        return Level(cut, digests, MemoryStore(width, codec, free_memory(ranks)), "memory")
    if tier == "memory":
        own, share = _shared_memory(ranks)
        return Level(cut, digests, _Passing(own, width, codec, writer, may_write=True), "shared memory", share=share)
    root = disk_root(folder)
    cache = CacheFolder(root, manifest)
    may_write, share = _lock(cache, ranks)
    store = DiskStore(cache.path, width, codec, writer, may_write=may_write)
    notes = [cache.note] if cache.note else []
    if len(store) == 0:
        notes += [f"passed over: {sentence}" for sentence in others(root, manifest)]
    return Level(cut, digests, store, str(cache.path), notes, cache, share=share)


def stored(manifest: Mapping[str, Any], width: int, folder: Path | None) -> DiskStore:
    """The states that lie in the folder of this manifest, none where there is no such folder; nothing in it is touched."""
    path = CacheFolder(disk_root(folder), manifest).path
    return DiskStore(path, width, CODECS[manifest["stored"]], "looking", may_write=False)


def disk_root(folder: Path | None) -> Path:
    return Path(folder).expanduser() if folder else cache_folder() / "prefix"


def free_memory(ranks: Ranks) -> int:
    """Bytes that states may come to lie in, on this machine."""
    available = psutil.virtual_memory().available
    if ranks.world_size == 1:
        return available
    return min(available, shutil.disk_usage(SHARED_MEMORY).free) if SHARED_MEMORY.is_dir() else 0


def free_disk(folder: Path | None) -> int:
    return free_bytes(disk_root(folder))


def _shared_memory(ranks: Ranks) -> tuple[Path, tuple[int, int]]:
    """A folder for the ranks of this machine, that nobody else has, and this rank's share of it (collective)."""
    told = _everyones([_machine(), ranks.rank, f"{owner()}-{uuid.uuid4().hex}"])
    here = [(rank, name) for machine, rank, name in told if machine == _machine()]
    position = [rank for rank, _ in here].index(ranks.rank)
    if position == 0:  # of runs that were killed: nobody else will
        remove_abandoned_folders(SHARED_MEMORY, PASSING, elsewhere=False)
    return SHARED_MEMORY / f"{PASSING}{here[0][1]}", (position, len(here))


def _lock(cache: CacheFolder, ranks: Ranks) -> tuple[bool, tuple[int, int]]:
    """Whether this run may write the folder as this rank sees it, and the rank's share of it (collective).

    The first rank of each machine tries the lock, and who wins it leaves a token: every rank that finds a token of this run in its
    folder sees the folder that the run has won, be it on a disk of the machine's own or on one that machines share.
    """
    token, won = uuid.uuid4().hex, False
    if ranks.local_rank == 0 and cache.lock() and cache.sign(token):
        won = True
        remove_abandoned_folders(cache.path, WAITING, elsewhere=True)  # of fills that were killed
    tokens = set(filter(None, _everyones(token if won else None)))
    seen = cache.signed()
    # without locks another run may have put its token over ours
    may_write = won or seen in tokens
    if may_write and not won:
        cache.note = None  # it was another rank of this run that was faster
    places = _everyones(seen or _machine())
    return may_write, (places[: ranks.rank].count(places[ranks.rank]), places.count(places[ranks.rank]))


def _everyones(value: Any) -> list[Any]:
    """What JSON tells of the ranks' values, in rank order (collective)."""
    return [json.loads(text) for text in everyones(json.dumps(value))]


def _machine() -> str:
    return f"{socket.gethostname()}-{os.environ.get('SLURM_NODEID', '')}"
