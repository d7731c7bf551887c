"""What one run holds of cached states: levels, opened as cuts come and closed when their layers train.

A level is only ever read by the weights that made it: it is known by the digests of its layers, and a layer that trains loses its
digest. Opening one is collective; every rank opens the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dsfreeze.anatomy import Layer
from dsfreeze.engine.process import everyones
from dsfreeze.engine.ranks import Ranks
from dsfreeze.estimate.caching import Choice
from dsfreeze.job import Job, dtype_of
from dsfreeze.model_card import public_name
from dsfreeze.prefix.choice import Stretch, There, stored_as
from dsfreeze.prefix.folder import manifests
from dsfreeze.prefix.keys import layer_digest, manifest_of
from dsfreeze.prefix.levels import Level, disk_root, open_level, stored
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import Store

#: A full CPU copy of a parameter (`Engine.read_weight`, collective at stage 3).
ReadWeight = Callable[[str], torch.Tensor]


class Holdings:
    """The levels of a run; `find` one or `open` it, `forget` layers that train, `close` at the end."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self.levels: list[Level] = []
        # the digests of an evicted prefix come from its files: nobody has its weights any more
        names = [layer.name for layer in job.anatomy.layers]
        self._digests: dict[str, str] = dict(zip(names, job.prefix_digests, strict=False))

    def find(self, stretch: Stretch, read: ReadWeight) -> Level | None:
        """The level of the stretch's prefix as it is now, if it is open."""
        if not self.levels:
            return None
        digests = self._digests_of(stretch.layers, read)
        return next((level for level in self.levels if level.digests == digests), None)

    def open(self, stretch: Stretch, choice: Choice, read: ReadWeight) -> Level:
        """Open the level (collective)."""
        digests = self._digests_of(stretch.layers, read)
        manifest, folder = self._manifest(stretch.cut, digests), self.job.recipe.freeze.prefix_cache_dir
        width = self.job.anatomy.hidden_size
        level = open_level(choice.tier, stretch.cut, digests, manifest, width, self.ranks, folder)
        self.levels.append(level)
        return level

    def there(self, stretch: Stretch, read: ReadWeight, rows: Rows | None) -> There:
        """What lies on disk of the stretch's states."""

        def complete() -> bool:
            if not self._may_lie_on_disk(stretch.cut):  # before all weights are read for a digest
                return False
            stored = self._stored(stretch, read)
            found = bool(len(stored)) and rows is not None and all(key in stored for key in rows.every_key())
            return set(everyones(str(found))) == {"True"}

        def nbytes() -> int:
            return min(int(told) for told in everyones(str(self._stored(stretch, read).nbytes)))

        return There(complete, nbytes)

    def _may_lie_on_disk(self, cut: int) -> bool:
        """Whether every rank finds a folder that fits as far as can be told without the weights (collective)."""
        mine = {key: value for key, value in self._manifest(cut, ()).items() if key not in ("fingerprint", "weights")}
        root = disk_root(self.job.recipe.freeze.prefix_cache_dir)
        found = any(mine.items() <= manifest.items() for manifest in manifests(root))
        return set(everyones(str(found))) == {"True"}

    def _stored(self, stretch: Stretch, read: ReadWeight) -> Store:
        manifest = self._manifest(stretch.cut, self._digests_of(stretch.layers, read))
        return stored(manifest, self.job.anatomy.hidden_size, self.job.recipe.freeze.prefix_cache_dir)

    def forget(self, trained: Iterable[str]) -> None:
        """These tensors have trained: their layers are not what their digests say any more."""
        for name in {self.job.anatomy.layer_of[tensor].name for tensor in trained}:
            self._digests.pop(name, None)

    def drop_stale(self) -> None:
        """Close the levels whose layers have trained since."""
        names = [layer.name for layer in self.job.anatomy.layers]
        for level in list(self.levels):
            if any(self._digests.get(name) != own for name, own in zip(names, level.digests, strict=False)):
                level.close()
                self.levels.remove(level)

    def close(self) -> None:
        while self.levels:
            self.levels.pop().close()

    def _digests_of(self, layers: Sequence[Layer], read: ReadWeight) -> tuple[str, ...]:
        for layer in layers:
            if layer.name not in self._digests:
                self._digests[layer.name] = layer_digest(layer, {t.name: read(t.name) for t in layer.tensors})
        return tuple(self._digests[layer.name] for layer in layers)

    def _manifest(self, cut: int, digests: tuple[str, ...]) -> dict[str, Any]:
        config: Any = self.job.module.config
        recipe = self.job.recipe
        return manifest_of(
            model=public_name(recipe.model.name), config=config, cut=cut, layers=digests, buffers=self._buffers(cut),
            attention=getattr(config, "_attn_implementation", None), dtype=dtype_of(recipe), stored=stored_as(recipe),
            device=self.ranks.device.type, tokenizer=self.job.tokenizer, max_length=recipe.data.max_length,
        )  # fmt: skip

    def _buffers(self, cut: int) -> dict[str, torch.Tensor]:
        """What the prefix's layers keep beside their weights, and is saved with them."""
        paths = tuple(f"{layer.path}." for layer in self.job.anatomy.blocks[:cut])
        saved, parameters = (
            self.job.module.state_dict(keep_vars=True),
            dict(self.job.module.named_parameters(remove_duplicate=False)),
        )
        return {name: value for name, value in saved.items() if name.startswith(paths) and name not in parameters}
