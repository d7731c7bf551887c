"""Scaling studies. Oracles: closed forms written out here, and the least of all that fits, found by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from dsfreeze.errors import UserError
from dsfreeze.estimate.price import PlanCost
from dsfreeze.hardware import find_device
from dsfreeze.planner import study as module
from dsfreeze.planner import sweep
from dsfreeze.planner.study import RECORD, RESOLVED, fitting, label, read_study, run_study, smallest_cluster
from dsfreeze.recipe import FreezeOptions
from dsfreeze.recipe_yaml import dump_yaml
from dsfreeze.setting import Workload
from dsfreeze.shapes import known_activations, known_anatomy
from dsfreeze.strategies import make_plan
from dsfreeze.tables import study_table

MODEL = "llama-3-8b"
BASE = {
    "models": [MODEL],
    "strategies": ["full", {"strategy": "bottom", "fraction": 0.5}],
    "gpus": [1, 8],
    "device": "h200",
}


@pytest.fixture
def written(tmp_path):
    """Writes a study with its record in the test's folder; `...` takes a key out."""

    def write(**changes) -> Path:
        values = {**BASE, "output_dir": str(tmp_path / "out"), **changes}
        path = tmp_path / "study.yaml"
        path.write_text(dump_yaml({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(written):
    return lambda **changes: run_study(read_study(written(**changes)))


class TestReading:
    @pytest.mark.parametrize(("text", "numbers"), [
        ("1..1024", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]), ("3..20", [3, 6, 12, 20]), ("8,64", [8, 64]), (6, [6]),
        ([8, 6, 8], [8, 6]),
    ])  # fmt: skip
    def test_numbers_of_devices(self, written, text, numbers):
        """Oracle: by hand."""
        assert read_study(written(gpus=text)).gpus == numbers

    @pytest.mark.parametrize(("changes", "message"), [
        ({"gpus": "7..5"}, "a range goes up"),
        ({"gpus": "1-8"}, "study.yaml:7: gpus 1-8: write numbers such as 8,16,64"),
        ({"gpus": [0]}, r"gpus\[0\] is 0"),
        ({"stages": [4]}, r"stages\[0\] is 4"),
        ({"tokens": 0}, "tokens is 0"),
        ({"device": ...}, "device is missing. The device, such as h200"),
        ({"divice": "h200"}, "study.yaml:12: divice is an unknown key. Did you mean 'device'"),
        ({"strategies": [{"strategy": "bottom", "fracton": 0.5}]}, "strategies.0..fracton is an unknown key. Did you mean 'fraction'"),
        ({"strategies": ["botom"]}, "Did you mean 'bottom'"),
        ({"strategies": [{"strategy": "lora", "offset": 1}]}, "does not read it"),
    ])  # fmt: skip
    def test_mistakes(self, written, changes, message):
        with pytest.raises(UserError, match=message):
            read_study(written(**changes))

    def test_all_mistakes_at_once(self, written):
        with pytest.raises(UserError, match=r"2 mistakes:\n.*study.yaml:7: gpus.*\n.*study.yaml:11: stage .*'stages'"):
            read_study(written(gpus=[0], stage=[1]))

    def test_what_is_not_yaml(self, tmp_path):
        path = tmp_path / "study.yaml"
        path.write_text("models: [a\n", encoding="utf-8")
        with pytest.raises(UserError, match="not YAML"):
            read_study(path)
        with pytest.raises(UserError, match="There is no study"):
            read_study(tmp_path / "none.yaml")

    def test_the_resolved_study_is_the_same_one(self, run, written, tmp_path):
        """Oracle: reading what was written; every key stands in it."""
        run(strategies=["lora", {"strategy": "interval", "fraction": 0.5}], price_per_gpu_hour=2.5)
        again = read_study(tmp_path / "out" / RESOLVED)
        assert again == read_study(tmp_path / "study.yaml")
        assert set(again.resolved()) == set(module.Study.model_fields)

    def test_labels(self):
        assert label(FreezeOptions(strategy="full")) == "full"
        assert label(FreezeOptions(strategy="bottom", fraction=0.5)) == "bottom fraction=0.5"


class TestFigures:
    @pytest.mark.parametrize(("batch", "width"), [(1, 2), (2, 4)])
    def test_a_row_by_hand(self, run, batch, width):
        """Oracle: seconds per token x tokens x devices / 3600, from the plan's price at that setting."""
        record = run(tokens=3e6, per_device_train_batch_size=batch, bf16=width == 2)
        anatomy = known_anatomy(MODEL, "causal_lm", None)
        cost = PlanCost(
            anatomy, make_plan(anatomy, FreezeOptions(fraction=0.5)), known_activations(MODEL).of("causal_lm", None, width),
            Workload(micro_batch_size=batch, gradient_checkpointing=True), sequence_length=4096, dtype_bytes=width,
        )  # fmt: skip
        price = cost.at(2, 8)
        step = price.on(find_device("h200")).total
        row = next(r for r in record["rows"] if (r["strategy"], r["gpus"], r["stage"]) == ("bottom fraction=0.5", 8, 2))
        assert (row["bytes"], row["seconds_per_step"]) == (price.peaks.most, step)
        assert row["seconds_per_token"] == pytest.approx(step / (8 * batch * 4096))
        assert row["gpu_hours"] == pytest.approx(step / (8 * batch * 4096) * 3e6 * 8 / 3600)
        assert row["price"] is None

    def test_a_doubled_price_doubles_the_price(self, run, tmp_path):
        """Oracle: proportion, in every row; and nothing else changes with it."""
        once, twice = (run(price_per_gpu_hour=n, output_dir=str(tmp_path / str(n)))["rows"] for n in (2, 4))
        assert [2 * row.pop("price") for row in once] == [row.pop("price") for row in twice]
        assert once == twice

    def test_tokens_are_hours(self, run, tmp_path):
        few, many = (run(tokens=n, output_dir=str(tmp_path / str(n)))["rows"] for n in (1e6, 3e6))
        assert [row["gpu_hours"] for row in many] == pytest.approx([3 * row["gpu_hours"] for row in few])

    def test_what_fits(self, run):
        """Oracle: the datasheet's bytes less two GiB."""
        usable = find_device("h200").memory - 2 * 2**30
        rows = run()["rows"]
        assert {row["fits"] for row in rows} == {True, False}
        assert all(row["fits"] == (row["bytes"] <= usable) for row in rows)

    def test_the_smallest_cluster_is_the_least_that_fits(self, run):
        """Oracle: going through the rows from the fewest devices up."""
        record = run(models=["llama-3-70b"], gpus="1..32")
        for plan in record["plans"]:
            rows = [row for row in record["rows"] if row["strategy"] == plan["strategy"]]
            gpus = next(n for n in (1, 2, 4, 8, 16, 32) if any(row["fits"] for row in rows if row["gpus"] == n))
            able = [row for row in rows if row["gpus"] == gpus and row["fits"]]
            assert gpus > 1
            assert plan["smallest"]["gpus"] == gpus
            fastest = min(row["seconds_per_step"] for row in able)
            assert fastest <= plan["smallest"]["seconds_per_step"] <= fastest / (1 - sweep.WORTH) ** 3
        full, half = (plan["smallest"]["gpus"] for plan in record["plans"])
        assert full > half

    def test_a_higher_stage_must_be_worth_it(self):
        """Oracle: by hand, on either side of the planner's margin; fewer devices come first, whatever it takes."""

        def row(gpus, stage, seconds, fits=True):
            return {"gpus": gpus, "stage": stage, "seconds_per_step": seconds, "fits": fits}

        little, much = row(2, 3, 1 - 0.9 * sweep.WORTH), row(2, 3, 1 - 1.1 * sweep.WORTH)
        lower, others = row(2, 1, 1.0), [row(2, 0, 2.0), row(1, 0, 0.1, fits=False), row(4, 0, 0.1)]
        assert smallest_cluster([little, lower, *others]) == lower
        assert smallest_cluster([much, lower, *others]) == much
        assert smallest_cluster([row(1, 0, 0.1, fits=False)]) is None

    def test_freezing_more_never_costs_more(self, run):
        """Oracle: monotony, in bytes and seconds of every cell."""
        shares = (0.25, 0.5, 0.75)
        rows = run(strategies=["full", *({"strategy": "bottom", "fraction": f} for f in shares)])["rows"]
        each = [[row for row in rows if row["strategy"] == name] for name in dict.fromkeys(r["strategy"] for r in rows)]
        for more, less in pairwise(each):
            for a, b in zip(more, less, strict=True):
                assert (a["gpus"], a["stage"]) == (b["gpus"], b["stage"])
                assert b["bytes"] <= a["bytes"]
                assert b["seconds_per_step"] < a["seconds_per_step"]

    def test_the_largest_model_by_hand(self, run):
        """Oracle: 405,853,388,800 parameters x 16 bytes / 64 at stage 3, and at most 45 GB for all that is not model state."""
        record = run(models=["llama-3-405b"], strategies=["full"], gpus=[64], stages=[3])
        states = 405_853_388_800 * 16 / 64
        assert states < record["rows"][0]["bytes"] < states + 45e9

    def test_fitting_keeps_a_row_for_each_cluster(self, run):
        record = run()
        best = list(fitting(record))
        assert len({(row["strategy"], row["gpus"]) for row in best}) == len(best)
        assert all(row["fits"] for row in best)


class TestPrefixCache:
    def test_by_hand(self, run):
        """Oracle: 16 of Llama-3-8B's layers: 218,103,808 matrix elements and 4 x 4096 x 4096 a kernel, two FLOPs an element, at
        half of 989.5e12; 4096 x 2 bytes over 64e9, and over an eighth of 3.5e9 where eight devices read."""
        (row,) = run(gpus=[8])["prefix_cache"]
        assert row["strategy"] == "bottom fraction=0.5"
        assert row["bytes_a_token"] == 8192
        assert row["recompute_seconds"] == pytest.approx(16 * (2 * 218_103_808 + 4 * 4096 * 4096) / (0.5 * 989.5e12))
        assert row["host_seconds"] == pytest.approx(8192 / 64e9)
        assert row["storage_seconds"] == pytest.approx(8192 * 8 / 3.5e9)
        assert row["storage_pays"] == pytest.approx(row["recompute_seconds"] / row["storage_seconds"])
        assert row["step_speedup"] == pytest.approx(row["seconds_per_step"] / row["cached_seconds_per_step"])

    def test_all_layers_may_lie_below(self, run):
        """Oracle: the head alone trains, so all 32 layers are read, twice what half of them take to recompute."""
        half, head = run(strategies=[{"strategy": "bottom", "fraction": 0.5}, "head"], gpus=[1])["prefix_cache"]
        assert head["recompute_seconds"] == pytest.approx(2 * half["recompute_seconds"])
        assert head["step_speedup"] > half["step_speedup"]

    def test_nothing_frozen_below_nothing_cached(self, run):
        assert run(strategies=["full", "lora", {"strategy": "top", "fraction": 0.5}])["prefix_cache"] == []


class TestLeftOut:
    def test_what_a_model_cannot_do_is_told(self, run):
        """Oracle: a Llama has no biases; the other plans are priced."""
        record = run(strategies=["bitfit", "full"])
        (left,) = record["left_out"]
        assert (left["model"], left["strategy"]) == (MODEL, "bitfit")
        assert "no biases" in left["reason"]
        assert [plan["strategy"] for plan in record["plans"]] == ["full"]

    def test_unknown_activations_are_told(self, run, monkeypatch):
        monkeypatch.setattr(module, "known_activations", lambda name: None)
        record = run()
        assert [row["reason"] for row in record["left_out"]] == [
            f"The activations of model '{MODEL}' are not known here."
        ] * 2
        assert record["rows"] == []

    def test_an_encoder_has_no_causal_lm(self, run):
        assert "causal_lm" in run(models=["bert-base"], strategies=["full"])["left_out"][0]["reason"]

    @pytest.mark.parametrize(("changes", "message"), [
        ({"models": [MODEL, "lama"]}, "The shape of model 'lama' is not known"), ({"device": "h300"}, "no device 'h300'"),
    ])  # fmt: skip
    def test_what_nobody_knows_is_an_error_before_anything_is_priced(
        self, run, tmp_path, monkeypatch, changes, message
    ):
        monkeypatch.setattr(module, "_priced", lambda *_: pytest.fail("priced"))
        with pytest.raises(UserError, match=message):
            run(**changes)
        assert not (tmp_path / "out").exists()


class TestRecord:
    def test_it_reads_back(self, run, tmp_path):
        record = run()
        assert json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8")) == record
        assert record["format_version"] == 1
        assert set(record["device"]["sources"]) < set(record["device"])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD, RESOLVED]

    def test_an_existing_study_is_kept(self, run, tmp_path):
        """Oracle: the files' bytes."""
        run()
        files = [tmp_path / "out" / name for name in (RECORD, RESOLVED)]
        before = [path.read_bytes() for path in files]
        with pytest.raises(UserError, match=r"holds another study\. Name another output_dir"):
            run(tokens=5)
        assert [path.read_bytes() for path in files] == before
        run()
        assert [path.read_bytes() for path in files] == before

    def test_figures_of_another_version_are_kept(self, run, tmp_path, monkeypatch):
        run()
        monkeypatch.setattr(sweep, "RESERVED", 2**37)
        with pytest.raises(UserError, match="with other figures"):
            run()

    def test_a_folder_that_cannot_be_made(self, run, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(UserError, match="Cannot write"):
            run(output_dir=str(tmp_path / "file" / "out"))

    def test_a_long_study_shows_how_far_it_is(self, written, monkeypatch):
        console = Console(record=True, force_terminal=False)
        run_study(read_study(written()), console)
        assert "pricing" not in console.export_text(clear=False)
        monkeypatch.setattr(module, "_LONG", 1)
        run_study(read_study(written()), console)
        assert "pricing plans: 2 rounds" in console.export_text()


def test_table(run):
    """Oracle: the record's own figures, where a reader looks for them."""
    record = run(
        strategies=["bitfit", "full", {"strategy": "bottom", "fraction": 0.5}], price_per_gpu_hour=2, stages=[0]
    )
    console = Console(width=160, record=True)
    console.print(study_table(record))
    text = console.export_text()
    _, half = record["plans"]
    smallest = half["smallest"]
    line = next(line for line in text.splitlines() if "bottom" in line)
    assert line.split()[-7:] == [
        str(smallest["gpus"]), "0", f"{smallest['bytes'] / 2**30:.1f}",
        f"{1e6 * smallest['seconds_per_token']:.3g}", f"{smallest['gpu_hours']:,.1f}", f"{smallest['price']:,.2f}",
        f"{record['prefix_cache'][0]['step_speedup']:.2f}x",
    ]  # fmt: skip
    assert "none" in next(line for line in text.splitlines() if "full" in line)
    assert "left out: llama-3-8b, bitfit" in text


def test_the_shipped_study_is_one():
    """Oracle: the scripts' own study, whose models' shapes and activations are all shipped."""
    study = read_study(Path(__file__).parents[1] / "benchmarks" / "scaling.yaml")
    assert all(known_anatomy(name, "causal_lm", None) for name in study.models)
    assert len(study.strategies) == 6
    assert (study.gpus[0], study.gpus[-1]) == (1, 1024)
