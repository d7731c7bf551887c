"""Trackers. Oracles: the event file, read back by TensorBoard's own reader; a wandb that notes what it is told."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from dsfreeze import trackers
from dsfreeze.errors import UserError
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.trackers import start_trackers


def recipe(folder: Path, *overrides: str):
    return load_recipe(None, ["model=m", f"train.output_dir={folder}", *overrides])


def test_none_are_started_unless_asked(tmp_path):
    assert start_trackers(recipe(tmp_path)) == []


def test_tensorboard_reads_back(tmp_path):
    """Oracle: tensorboard's event reader."""
    pytest.importorskip("tensorboard", reason="needs dsfreeze[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = start_trackers(recipe(tmp_path, "train.report_to=tensorboard"))
    tracker.log(1, {"train/loss": 2.5, "note": "text", "whole": True})
    tracker.log(2, {"train/loss": 1.5, "train/tokens": 7})
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]
    assert [event.value for event in events.Scalars("train/tokens")] == [7]
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/tokens"}
    assert "recipe/text_summary" in events.Tags()["tensors"]


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; what it is told is in `told`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.told: list = []
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)

    def init(self, **options):
        self.told.append(("init", options))
        return types.SimpleNamespace(
            log=lambda values, step: self.told.append(("log", step, values)),
            finish=lambda: self.told.append(("finish",)),
        )


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_wandb_is_told_the_recipe_the_numbers_and_the_end(tmp_path, wandb):
    asked = recipe(tmp_path / "one", "train.report_to=[wandb]")
    (tracker,) = start_trackers(asked)
    tracker.log(3, {"train/loss": 0.5, "kind": "text"})
    tracker.finish()
    (_, options), *rest = wandb.told
    assert options == {
        "project": "dsfreeze", "name": "one", "dir": str(tmp_path / "one"), "config": asked.model_dump(mode="json"),
    }  # fmt: skip
    assert rest == [("log", 3, {"train/loss": 0.5}), ("finish",)]


def test_names_and_projects_can_be_chosen(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    start_trackers(recipe(tmp_path, "train.report_to=[wandb]", "train.run_name=first"))
    options = wandb.told[0][1]
    assert (options["project"], options["name"]) == ("mine", "first")


def test_a_wandb_that_will_not_start_is_the_users_to_mend(tmp_path, wandb):
    def refuse(**options):
        raise wandb.errors.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"wandb did not start: api_key not configured\. Log in with `wandb login`"):
        start_trackers(recipe(tmp_path, "train.report_to=[wandb]"))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_names_the_extra(name, tmp_path, monkeypatch):
    """Before anything starts, so that no run is half begun."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"{name}, which is not installed: pip install {name}"):
        start_trackers(recipe(tmp_path, f"train.report_to=[{name}]"))
