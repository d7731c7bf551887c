"""A piece of a comparison's work as a process of its own: its words, its files, what it says when it fails. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsfreeze.compare.forking import POSSIBLE, ForkServer
from dsfreeze.compare.queue import Process, Result, Work
from dsfreeze.errors import UserError
from dsfreeze.files import write_whole
from dsfreeze.folder_lock import FolderLock
from dsfreeze.recipe_yaml import dump_yaml
from dsfreeze.record import SUMMARY, read_record

SCORES, RECIPES, LOGS = "scores.json", "recipes", "logs"
#: Where NVIDIA's driver lists its GPUs, a folder each.
_DRIVER = Path("/proc/driver/nvidia/gpus")
#: Lines of a log's end in which a run says why it failed.
_TAIL = 20
#: Exit codes of a run that a signal ended, after its checkpoint or before it had anything to save.
_STOPPED = (130, 143, -2, -15)
_AGAIN = "Free disk space, and run the same command again."


@contextmanager
def alone(folder: Path) -> Iterator[int | None]:
    """A lock on the folder: its file descriptor, which processes inherit, so that a killed comparison's runs hold it."""
    lock = FolderLock(folder, "output_dir")
    lock.take()
    try:
        yield lock.fileno()
    finally:
        lock.release()


class Processes:
    """Starts work whose files lie below `folder`, and says how it ended."""

    def __init__(self, folder: Path, *, lock: int | None, jobs: int, keep_models: bool) -> None:
        self.folder, self.lock, self.jobs, self.keep_models = folder, lock, jobs, keep_models
        self.gpus = visible_gpus()
        self.server = ForkServer(folder / LOGS / "server.txt")
        self.launch = self.server.launch if POSSIBLE and not self.gpus else launch
        self._on: dict[str, str] = {}  # which GPU work is on

    def start(self, work: Work) -> Process:
        """The process; what an earlier one left is gone on with from its checkpoint, or removed."""
        command = [*command_of(work, self.write_recipe(work))]
        if work.verb == "train" and is_resumable(folder_of(work)):
            command.append("train.resume_from_checkpoint=true")
        else:
            shutil.rmtree(folder_of(work), ignore_errors=True)  # a record without a checkpoint is of no use
        log = self.beside(LOGS, work, ".txt")
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as file:
                return self.launch(command, file, self.lock, self._environment(work))
        except OSError as error:
            raise UserError(f"Cannot start a run with the log {log}: {error.strerror}. {_AGAIN}") from None

    def close(self) -> None:
        """Nothing more is started."""
        self.server.close()

    def write_recipe(self, work: Work) -> Path:
        path = self.beside(RECIPES, work, ".yaml")
        try:
            write_whole(path, dump_yaml(work.recipe.model_dump(mode="json")))
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}. {_AGAIN}") from None
        return path

    def ended(self, work: Work, code: int) -> Result:
        """The result of a process with that exit code (-n: killed by signal n)."""
        self._on.pop(work.key, None)
        found = finished(work) if code == 0 else None
        if found is None:
            return Result("interrupted" if code in _STOPPED else "failed", self._why(work, code))
        if not self.keep_models:
            for checkpoint in folder_of(work).glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        return found

    def _environment(self, work: Work) -> dict[str, str]:
        """Runs at once share the cores, and have a GPU each while there are enough."""
        environment = dict(os.environ)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        if self.gpus:
            taken = list(self._on.values())
            self._on[work.key] = environment["CUDA_VISIBLE_DEVICES"] = min(self.gpus, key=taken.count)
        return environment

    def _why(self, work: Work, code: int) -> str:
        """What a run said last, and how it ended."""
        path = self.beside(LOGS, work, ".txt")
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()][-_TAIL:]
        said = [line.partition(": ")[2] for line in lines if line.startswith(("error: ", "stopped: "))] or lines[-1:]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {said[-1]}" if said else how

    def beside(self, kind: str, work: Work, ending: str) -> Path:
        """A file about the work, outside of its own folder."""
        relative = folder_of(work).relative_to(self.folder)
        return self.folder / kind / relative.with_name(relative.name + ending)


def launch(command: Sequence[str], log: Any, lock: int | None, environment: Mapping[str, str]) -> Process:
    """A process of its own session, so that signals reach it through us alone."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        pass_fds=() if lock is None else (lock,),
    )  # fmt: skip


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or numbers of all that the driver lists; empty on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(_DRIVER.glob("*"))]


def command_of(work: Work, recipe: Path) -> list[str]:
    """The words that run it."""
    return [sys.executable, "-m", "dsfreeze", work.verb, str(recipe)]


def folder_of(work: Work) -> Path:
    """Where its files go."""
    return Path(work.recipe.analyze.output_dir if work.verb == "analyze" else work.recipe.train.output_dir)


def finished(work: Work) -> Result | None:
    """What is there whole, None where nothing is. A record of another version is said to be one, and stays as it is."""
    folder = folder_of(work)
    if work.verb == "analyze":
        return Result("done") if (folder / SCORES).is_file() else None
    if not (folder / SUMMARY).is_file():
        return None
    try:
        return Result("done", record=read_record(folder))
    except UserError as error:
        return Result("failed", str(error))


def is_resumable(folder: Path) -> bool:
    """Whether a run has left a checkpoint of its own."""
    return any(folder.glob("checkpoint-*/manifest.json"))
