"""Comparisons on a tiny model. Oracles: separate calls of train, an uninterrupted comparison, files written by hand, real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from compare_kit import QUIET, TIMES, TRAIN, compare, grid_file, launched_by, priced_at_once, run_here, without_times

from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare import processes, running
from dsfreeze.compare.pricing import Prices
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.results import RESULTS, read_results
from dsfreeze.compare.statistics import summarise
from dsfreeze.errors import UserError
from dsfreeze.interrupt import Interrupted
from dsfreeze.loop import Run, train
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record

KEY = "tiny/letters/{}/size-all/seed-{}"


def by_hand(folder: Path, out: str, seed: int, **freeze: Any) -> Recipe:
    data = {
        "train": str(folder / "data/train.jsonl"), "eval": str(folder / "data/eval.jsonl"), "text": "text", "label": "label",
        "num_labels": 3, "max_length": 64, "max_train_examples": 3200, "metrics": ["accuracy"],
    }  # fmt: skip
    options = {**TRAIN, "seed": seed, "output_dir": str(folder / out), "save_strategy": "no", "export": False}
    values = {
        "model": str(folder / "model"),
        "task": "classification",
        "zero": "local",
        "data": data,
        "freeze": freeze,
        "train": options,
    }
    return Recipe.model_validate(values)


def test_the_outcomes_are_those_of_separate_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    state = compare(grid_file(tmp_path, seeds=[7, 8]))
    assert read_results(tmp_path / "out" / RESULTS) == state
    assert list(state["cells"]) == [KEY.format(method, seed) for method in ("full", "bottom50") for seed in (7, 8)]
    for method, freeze in (("full", {"strategy": "full"}), ("bottom50", {"strategy": "bottom", "fraction": 0.5})):
        for seed in (7, 8):
            summary = train(by_hand(tmp_path, f"hand/{method}-{seed}", seed, **freeze), QUIET)
            steps = read_record(summary["record"]).steps
            per_token = summary["flops_vs_full"] * summary["full_flops_per_token"]
            expected = {
                "model": "tiny", "task": "letters", "method": method, "size": None, "seed": seed, "status": "done", "reason": None,
                "run": f"runs/{KEY.format(method, seed)}", "score": 100 * summary["metrics"]["after"]["accuracy"],
                "metrics": summary["metrics"]["after"], "trainable": summary["trainable"], "total": summary["total"], "steps": 2,
                "flops": per_token * sum(line["tokens"] for line in steps), "learning_rate": 1e-2,
            }  # fmt: skip
            cell = state["cells"][KEY.format(method, seed)]
            assert {key: value for key, value in cell.items() if key not in TIMES} == expected
            assert 0 < cell["seconds"] < 60
            assert cell["peak_bytes"] > 2**20


def test_the_same_comparison_twice_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other folders, of methods that draw and that decide as they run too; and a finished one runs nothing."""
    seen = run_here(monkeypatch)
    path = grid_file(tmp_path, methods=["random", "lisa", "lora", "adt_l"], train={"max_steps": 6})
    first, second = (compare(path, f"output_dir={tmp_path / name}") for name in ("one", "two"))
    assert {cell["status"] for cell in first["cells"].values()} == {"done"}
    assert without_times(first)["cells"] == without_times(second)["cells"]
    ran = len(seen)
    assert compare(path, f"output_dir={tmp_path / 'one'}") == first
    assert len(seen) == ran


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


@pytest.mark.parametrize("kept", [True, False])
def test_a_killed_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Killed in the second cell's third step: the first cell stays, the second goes on from its checkpoint or begins anew, and all is
    as if nothing had been."""
    seen, steps, one_step = run_here(monkeypatch), [], Run._one_step
    options = {"max_steps": 4, **({"save_strategy": "steps", "save_steps": 2} if kept else {})}
    path = grid_file(tmp_path, train=options)
    expected = compare(path, f"output_dir={tmp_path / 'whole'}")

    def step(self: Any, *rest: Any) -> None:
        if "bottom50" in str(self.job.output_dir) and self.step == 2:
            raise Killed
        one_step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_one_step", step)
        with pytest.raises(Killed):
            compare(path)
    left = read_results(tmp_path / "out" / RESULTS)["cells"]
    assert [cell["status"] for cell in left.values()] == ["done", "waiting"]
    del seen[:]

    def counted(self: Any, *rest: Any) -> None:
        steps.append(self.step)
        one_step(self, *rest)

    monkeypatch.setattr(Run, "_one_step", counted)
    state = compare(path)
    assert steps == ([2, 3] if kept else [0, 1, 2, 3])
    assert len(seen) == 1
    assert without_times(state)["cells"] == without_times(expected)["cells"]
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_a_half_written_record_is_shown_as_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what writes jobs, which runs nothing."""
    priced_at_once(monkeypatch)
    path = grid_file(tmp_path)
    recipe = by_hand(tmp_path, "out/runs/" + KEY.format("full", 7), 7, strategy="full")
    train(recipe, QUIET)
    (Path(recipe.train.output_dir) / "summary.json").unlink()
    state, _ = running.write_jobs(read_grid(path), anatomy_of, QUIET)
    assert [cell["status"] for cell in state["cells"].values()] == ["interrupted", "waiting"]
    assert state["cells"][KEY.format("full", 7)]["run"] == "runs/" + KEY.format("full", 7)


def test_a_record_of_another_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And left as it is; the others run."""
    run_here(monkeypatch)
    path = grid_file(tmp_path)
    recipe = by_hand(tmp_path, "out/runs/" + KEY.format("full", 7), 7, strategy="full")
    train(recipe, QUIET)
    environment = Path(recipe.train.output_dir) / "environment.json"
    environment.write_text(json.dumps({**json.loads(environment.read_text()), "format_version": 1}))
    cells = compare(path)["cells"]
    assert [cell["status"] for cell in cells.values()] == ["failed", "done"]
    assert "is a record of format 1, and this dsfreeze reads format" in cells[KEY.format("full", 7)]["reason"]
    assert environment.exists()


def test_an_impossible_cell_is_marked_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama has no biases; two steps are too few for four decisions of five; a rank cannot train as much as everything."""
    run_here(monkeypatch)
    matched = {"name": "lora_full", "method": "lora", "match": "parameters", "to": "full"}
    cells = compare(grid_file(tmp_path, methods=["bitfit", "adt_h", matched, "full"]))["cells"]
    assert [cell["status"] for cell in cells.values()] == ["impossible", "impossible", "impossible", "done"]
    reasons = [cell["reason"] for cell in cells.values()]
    assert "has no biases in its layers" in reasons[0]
    assert "2 steps" in reasons[1]
    assert "above the model's width" in reasons[2]


def test_a_crashed_run_is_reported_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends with a traceback's code, and one that is killed; the next call runs both."""
    path = grid_file(tmp_path, methods=["full", "bottom50", "top50"])
    codes = {"full": 1, "bottom50": -9}
    with monkeypatch.context() as patch:
        run_here(patch, lambda words: next((code for name, code in codes.items() if f"/{name}/" in words[1]), 0))
        cells = compare(path)["cells"]
    assert [cell["status"] for cell in cells.values()] == ["failed", "failed", "done"]
    assert [cell["reason"] for cell in cells.values()] == ["exit code 1", "killed by signal 9", None]
    run_here(monkeypatch)
    assert {cell["status"] for cell in compare(path)["cells"].values()} == {"done"}


def test_what_a_run_said_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate at which the loss is no number; the oracle is the loop's own message."""
    run_here(monkeypatch)
    hot = {"name": "hot", "method": "full", "train": {"learning_rate": 1e30, "adam_epsilon": 1e-30, "max_steps": 6}}
    cells = compare(grid_file(tmp_path, methods=[hot, "bottom50"]))["cells"]
    assert [cell["status"] for cell in cells.values()] == ["failed", "done"]
    assert "exit code 2: The loss of step" in cells[KEY.format("hot", 7)]["reason"]


def test_a_metric_that_came_out_as_no_number_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a correlation of equal answers does, which a record holds as null: done, and said to have no score."""
    run_here(monkeypatch)
    path = grid_file(tmp_path)
    compare(path)
    summary = tmp_path / "out/runs" / KEY.format("full", 7) / "summary.json"
    values = json.loads(summary.read_text())
    values["metrics"]["after"]["accuracy"] = None
    summary.write_text(json.dumps(values))
    (tmp_path / "out" / RESULTS).unlink()
    cells = compare(path)["cells"]
    assert cells[KEY.format("full", 7)]["status"] == "done"
    assert cells[KEY.format("full", 7)]["score"] is None
    (lost,) = summarise(cells).lost
    assert (lost.key, lost.reason) == (KEY.format("full", 7), "ended without a score")


PRETEND = "import os, signal, sys; os.kill(os.getpid(), 9) if 'full' in sys.argv[1] else sys.exit('no such thing')"


def test_real_processes_that_die_do_not_end_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kills itself as `kill -9` would, the other says why it ends; no shell is asked."""
    priced_at_once(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # so that they are not forked
    monkeypatch.setattr(processes, "command_of", lambda work, recipe: [sys.executable, "-c", PRETEND, work.key])
    cells = compare(grid_file(tmp_path), "jobs=2")["cells"]
    assert [cell["status"] for cell in cells.values()] == ["failed", "failed"]
    assert [cell["reason"] for cell in cells.values()] == ["killed by signal 9", "exit code 1: no such thing"]


SAY_GPU = "import os, sys; print('error:', os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('OMP_NUM_THREADS')); sys.exit(1)"


def test_runs_at_once_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes say which one they see; two of three names are in use at once, and the first is free again for the third run."""
    priced_at_once(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    started: list[str] = []
    monkeypatch.setattr(processes, "command_of", lambda work, recipe: [sys.executable, "-c", SAY_GPU])
    launch = processes.launch
    monkeypatch.setattr(
        processes, "launch", lambda *words: started.append(words[3]["CUDA_VISIBLE_DEVICES"]) or launch(*words)
    )
    cells = compare(grid_file(tmp_path, methods=["full", "bottom50"], seeds=[1, 2]), "jobs=2")["cells"]
    assert started[:2] == ["4", "6"]
    assert set(started) <= {"4", "6"}, "the third is never needed"
    assert {cell["reason"] for cell in cells.values()} <= {f"exit code 1: {gpu} 4" for gpu in ("4", "6")}


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes, "_DRIVER", tmp_path)
    assert processes.visible_gpus() == []
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert processes.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.visible_gpus() == [], "an empty name hides them all"


SLOW = "import time; time.sleep(60)"


def test_a_signal_ends_what_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to us is SIGTERM to the run; the exit code is the signal's, and the cell is interrupted."""
    started: list[Any] = []

    def launch(command: Sequence[str], log: Any, lock: Any, environment: Any) -> Any:
        started.append(subprocess.Popen([sys.executable, "-c", SLOW], start_new_session=True))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    launched_by(monkeypatch, launch)
    with pytest.raises(Interrupted, match="Run the same command again to go on") as stopped:
        compare(grid_file(tmp_path))
    assert stopped.value.exit_code == 143
    assert started[0].wait() == -signal.SIGTERM
    cells = read_results(tmp_path / "out" / RESULTS)["cells"]
    assert [cell["status"] for cell in cells.values()] == ["interrupted", "waiting"]


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    """Nor does one begin while a run of a killed one is alive: the process below is started as a run is."""
    path = grid_file(tmp_path)
    with processes.alone(tmp_path / "out") as lock:
        with pytest.raises(
            UserError, match=rf"out is in use by another run \(process {os.getpid()} on .*name another output_dir"
        ):
            compare(path)
        child = processes.launch([sys.executable, "-c", SLOW], subprocess.DEVNULL, lock, os.environ)
    try:
        with pytest.raises(UserError, match="or by one that it left behind"):
            compare(path)
    finally:
        child.terminate()
        child.wait()


def test_another_comparison_is_refused_and_a_longer_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run_here(monkeypatch)
    path = grid_file(tmp_path)
    first = compare(path)
    with pytest.raises(UserError, match=r"What differs: train.learning_rate \(0.01 there, 0.02 here\)"):
        compare(path, "train.learning_rate=0.02")
    with pytest.raises(UserError, match=r"differs: methods.full.train.max_steps \(null there, 1 here\)"):
        compare(path, "methods=[{name: full, train: {max_steps: 1}}]")
    del seen[:]
    more = compare(path, "methods=[full, bottom50, top50]", "sizes=[all, 8]")
    assert len(seen) == 4
    assert {key: more["cells"][key] for key in first["cells"]} == first["cells"]
    assert more["cells"]["tiny/letters/full/size-8/seed-7"]["size"] == 8
    del seen[:]
    shutil.rmtree(tmp_path / "out/runs" / KEY.format("full", 7))  # its outcome is known without it
    compare(path, "methods=[full]", "seeds=[7, 8]")
    assert [words[0] for words in seen] == ["train"]
    with (tmp_path / "data/eval.jsonl").open("a") as file:
        file.write('{"text": "xa", "label": 0}\n')
    with pytest.raises(UserError, match=r"the file letters.eval"):
        compare(path)


def test_memory_too_small_for_a_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    priced_at_once(monkeypatch)
    cells = compare(grid_file(tmp_path, methods=["full"]), "memory=700MiB")["cells"]
    assert cells[KEY.format("full", 7)]["status"] == "impossible"
    assert cells[KEY.format("full", 7)]["reason"] == "it takes 769.00 MiB by prediction, and memory is 700.00 MiB"


def test_a_model_that_is_not_there_is_a_mistake_before_anything(tmp_path: Path) -> None:
    path = grid_file(tmp_path, models=[{"name": "gone", "model": str(tmp_path / "gone")}])
    with pytest.raises(UserError, match=r"grid.yaml:\d+: models\[0\]"):
        compare(path)


def test_methods_that_need_an_analysis_have_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all seeds; the plan is the one that the analysis's own file gives."""
    seen = run_here(monkeypatch)
    state = compare(grid_file(tmp_path, methods=["spectrum", "salf"], seeds=[7, 8], analyze={"num_examples": 16}))
    assert [words[0] for words in seen] == ["analyze", "analyze", "train", "train", "train", "train"]
    assert {cell["status"] for cell in state["cells"].values()} == {"done"}
    scores = tmp_path / "out/analyses/tiny/letters/size-all/snr/scores.json"
    recipe = by_hand(
        tmp_path, "hand", 7, strategy="ranked", granularity="category", fraction=0.5, score="snr", scores=str(scores)
    )  # fmt: skip
    assert train(recipe, QUIET)["metrics"]["after"] == state["cells"][KEY.format("spectrum", 7)]["metrics"]


def test_prefix_caches_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second seed reads what the first has stored: the oracle is its summary."""
    run_here(monkeypatch)
    state = compare(
        grid_file(tmp_path, methods=["bottom50"], seeds=[7, 8], prefix_cache="disk", train={"max_steps": 12})
    )
    first, second = (
        read_record(tmp_path / "out" / cell["run"]).summary["prefix_cache"] for cell in state["cells"].values()
    )
    assert first["hits"] < second["hits"] == second["examples"] == 45


def test_an_analysis_waits_for_no_empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is priced, as full tuning would be, so that with several jobs it runs beside others."""
    run_here(monkeypatch)
    asked: list[str] = []
    monkeypatch.setattr(Prices, "peak", lambda self, recipe: asked.append(recipe.freeze.strategy) or 2**20)
    compare(grid_file(tmp_path, methods=["bottom50", "spectrum"], analyze={"num_examples": 16}), "jobs=2")
    assert set(asked) == {"bottom", "full", "ranked"}
