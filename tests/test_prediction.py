"""Predicted and measured beside each other at a run's end. Oracles: the engine's counted bytes, the price of the run's own plan, arithmetic."""

from __future__ import annotations

import re

import pytest
from marks import some_fast
from rich.console import Console
from tiny_runs import llama_folder, tiny_recipe

from dsfreeze import prediction
from dsfreeze.engine import Memory
from dsfreeze.job import prepare_job
from dsfreeze.loop import train
from dsfreeze.record import read_record
from dsfreeze.tables import summary_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))


def test_a_run_records_what_was_predicted(tmp_path):
    """Oracle: bytes counted from the engine's live objects."""
    summary = train(tiny_recipe(tmp_path))
    predicted, memory = summary["predicted"], summary["memory"]
    for kind in ("weights", "masters", "optimizer_state"):
        assert predicted[kind] == memory[kind], kind
    assert predicted["peak_error"] == pytest.approx(memory["peak"] / predicted["peak"] - 1)
    assert read_record(tmp_path / "run").summary["predicted"] == predicted
    console = Console(width=200)
    with console.capture() as shown:
        console.print(summary_table(summary))
    assert re.search(r"peak memory .* predicted [\d.]+ [MG]iB", shown.get())


def test_the_second_run_reads_nothing(tmp_path, monkeypatch):
    """Oracle: the reader is not called again for the same shape in another folder, and the figures are the same."""
    first = train(tiny_recipe(tmp_path / "a"))["predicted"]
    monkeypatch.setattr("dsfreeze.activation_reader.read_activations", None)
    assert train(tiny_recipe(tmp_path / "b"))["predicted"]["bytes"] == first["bytes"]


def test_a_model_that_cannot_be_read_is_told_and_trained(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("odd model")

    monkeypatch.setattr("dsfreeze.activation_reader.read_activations", fails)
    summary = train(tiny_recipe(tmp_path))
    assert summary["predicted"] == {"reason": "odd model"}
    assert summary["steps"] == 8
    with Console(width=200).capture() as shown:
        Console().print(summary_table(summary))
    del shown


class TestPeak:
    START = Memory(weights=100, gradients=0, masters=40, optimizer_state=0, parked=0, allocated=1140, peak=1140)

    def predicted(self, tmp_path, peak: int, **more) -> dict:
        job = prepare_job(tiny_recipe(tmp_path, model=str(llama_folder(tmp_path / "model"))))
        end = Memory(**{**vars(self.START), "peak": peak})
        return prediction.predict(job, 1, 8, (2, 16), self.START, end, **{"on_cpu": True, **more})

    def test_what_is_no_state_is_taken_as_measured(self, tmp_path):
        """Oracle: 1140 - 100 - 40 bytes were there already; the rest of the peak is the price's."""
        from dsfreeze.estimate.price import PlanCost
        from dsfreeze.setting import Workload

        job = prepare_job(tiny_recipe(tmp_path, model=str(llama_folder(tmp_path / "model"))))
        found = prediction.stored_of(job, 4)
        cost = PlanCost(
            job.anatomy, job.plan, found, Workload("classification", 2), dtype_bytes=4, sequence_length=16, num_steps=8
        )
        assert self.predicted(tmp_path, 5000)["peak"] == 1000 + cost.at(0, 1).peaks.most

    @pytest.mark.parametrize(("evict", "stage"), some_fast([(False, 0), (True, 0), (False, 3)], 2))
    def test_with_a_prefix_cache(self, tmp_path, evict, stage):
        """Oracle: the price itself: of a run that keeps its prefix the larger of a step that fills (at stage 3, where the prefix is
        gathered) and one that reads; of one that evicts it the reading step's. On a CPU, what the cache holds in memory on top."""
        from dsfreeze.estimate.price import PlanCost
        from dsfreeze.setting import Workload

        words = {"prefix_cache": "memory", "evict_prefix": evict}
        folder = llama_folder(tmp_path / "model", hidden=512 if stage else 32)
        job = prepare_job(tiny_recipe(tmp_path, model=str(folder), freeze=words, zero="zero3" if stage else "local"))
        found = prediction.stored_of(job, 4)
        fills, reads = (
            PlanCost(job.anatomy, job.plan, found, work, dtype_bytes=4, sequence_length=16, num_steps=8).at(stage, 1)
            for work in (
                Workload("classification", 2),
                Workload("classification", 2, prefix_cache=True, cache_in_memory=True, evict_prefix=evict),
            )
        )
        assert reads.items["prefix cache"] > 0
        assert (fills.peaks.most > reads.peaks.most) == (stage == 3 or evict)
        most = reads.peaks.most if evict else max(fills.peaks.most, reads.peaks.most)
        end = Memory(**{**vars(self.START), "peak": 5000})
        told = prediction.predict(job, 1, 8, (2, 16), self.START, end, on_cpu=True, cache_bytes=777)
        assert told["peak"] == 1000 + 777 + most
        assert told["weights"] == reads.states.weights
        assert (reads.states.weights < fills.states.weights) == evict

    def test_more_than_ten_per_cent_says_so(self, tmp_path):
        """Oracle: arithmetic around the threshold."""
        peak = self.predicted(tmp_path, 1)["peak"]
        for factor, said in ((1.09, None), (0.91, None), (1.2, "20 % above"), (0.8, "20 % below")):
            measured = round(factor * peak)
            told = prediction.sentence(self.predicted(tmp_path, measured), measured)
            assert (told is None) if said is None else (said in told)


def test_the_loop_says_it(tmp_path, monkeypatch):
    """Oracle: the console's text when everything differs by more than nothing."""
    monkeypatch.setattr(prediction, "NOTABLE", -1.0)
    console = Console(record=True, width=200)
    train(tiny_recipe(tmp_path), console)
    assert "the measured peak" in console.export_text()


def test_whatever_goes_wrong_in_pricing_a_run_ends_well(tmp_path, monkeypatch):
    """Oracle: pricing that raises whatever it is called with: a reason in the summary, and the model exported."""
    monkeypatch.setattr(prediction, "PlanCost", lambda *_, **__: next(iter(())))
    summary = train(tiny_recipe(tmp_path))
    assert summary["predicted"] == {"reason": "StopIteration"}
    assert (tmp_path / "run" / "model" / "config.json").is_file()
