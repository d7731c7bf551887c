"""The folder of one prefix cache: its name, what it was made from, and who may write in it. No torch.

<root>/<first 16 letters of the fingerprint>/
  manifest.json          what the states were made from, for people and for messages: the name alone decides what fits
  .lock                  held by the process that may write
  .writer                its token: who reads it here sees the same folder, on whatever machine
  <writer>-<n>.safetensors
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsfreeze.files import parse_json, write_whole
from dsfreeze.folder_lock import NO_LOCKS

MANIFEST = "manifest.json"
WRITER = ".writer"
NAME_LETTERS = 16
_DIGEST_LETTERS = 12
_LISTED = 3


class CacheFolder:
    """The folder under `root` that a manifest names: a flat dict of strings and numbers, its "fingerprint" among them.

    Where the short name is taken by a manifest of another fingerprint (a folder copied or renamed by hand), the whole
    fingerprint is the name: states are never read as what they are not.
    """

    def __init__(self, root: Path, manifest: Mapping[str, Any]) -> None:
        self.manifest = dict(manifest)
        fingerprint = self.manifest["fingerprint"]
        short = root / fingerprint[:NAME_LETTERS]
        there = _read_manifest(short)
        self.path = short if there is None or there.get("fingerprint") == fingerprint else root / fingerprint
        self.note: str | None = None
        """Why this process may not write, or does so unguarded; a sentence, or None."""
        self._held: FileLock | None = None

    def lock(self) -> bool:
        """Whether this process may write, from now until `release` or its end. Never waits; writes the manifest if it may.

        A disk without locks lets every process write: shards appear whole under names of their own, so that two writers at
        worst store an example twice.
        """
        if self._held is not None:
            return True
        self.note = None
        lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            self._held = lock
        except Timeout:
            self.note = f"Another process writes the prefix cache {self.path}; this one only reads it."
            return False
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                return self._refused(error)
            self.note = (
                f"The disk of the prefix cache {self.path} has no locks; several runs may store the same states."
            )
        try:
            self._describe()
        except OSError as error:
            return self._refused(error)
        return True

    def sign(self, token: str) -> bool:
        """Leave a token in the folder, once we may write; tokens are equally long. False where the disk refuses: then we may not."""
        try:
            # in place: a network disk shows a file's new content sooner than another file under its name
            (self.path / WRITER).write_text(token, encoding="utf-8")
        except OSError as error:
            return self._refused(error)
        return True

    def signed(self) -> str | None:
        """The token that lies in the folder as this process sees it; None where none can be read."""
        try:
            return (self.path / WRITER).read_text(encoding="utf-8") or None
        except (OSError, ValueError):
            return None

    def _refused(self, error: OSError) -> bool:
        self.release()
        self.note = f"The prefix cache {self.path} cannot be written: {error.strerror or error}. It is only read."
        return False

    def release(self) -> None:
        """Let another process write."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def _describe(self) -> None:
        """Write the manifest where there is none, or none that can be read: the states do not depend on it."""
        if _read_manifest(self.path) is None:
            write_whole(self.path / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


def others(root: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Caches of the same model, or of the same weights, that do not fit: a sentence for each of the nearest three.

    Nearest is the one with the fewest differences. Passed over are folders whose manifest cannot be read, and those that differ in
    the cut and the weights below it alone: a run keeps one for each of its cuts.
    """
    found = []
    for path in _subfolders(root):
        theirs = _read_manifest(path)
        if theirs is None or theirs.get("fingerprint") == manifest["fingerprint"] or not _related(theirs, manifest):
            continue
        differing = [k for k in {**manifest, **theirs} if k != "fingerprint" and theirs.get(k) != manifest.get(k)]
        if set(differing) == {"cut", "weights"}:
            continue
        found.append((len(differing), str(path), _sentence(path, differing, theirs, manifest)))
    return [sentence for _, _, sentence in sorted(found)[:_LISTED]]


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that `folder` is on, or will be on; OSError as the disk gives it."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def _sentence(path: Path, differing: list[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    if not differing:
        return f"{path} was made from something else that its manifest does not tell."
    made = [f"with {key} {_short(theirs[key])}" if key in theirs else f"without {key}" for key in differing]
    has = [_short(ours[key]) if key in ours else f"no {key}" for key in differing]
    return f"{path} was made {_listed(made)}; this run has {_listed(has)}."


def _short(value: Any) -> str:
    """The value, of a digest its first letters."""
    text = str(value)
    return text[:_DIGEST_LETTERS] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if words[:-1] else "") + words[-1]


def _related(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return any(key in ours and theirs.get(key) == ours[key] for key in ("model", "weights"))


def _subfolders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except OSError:
        return []


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None where there is none or it is garbled."""
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def manifests(root: Path) -> Iterator[dict[str, Any]]:
    """Those of all folders under `root` that can be read."""
    return filter(None, map(_read_manifest, _subfolders(root)))
