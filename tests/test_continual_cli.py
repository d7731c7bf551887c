"""`dsfreeze continual`, its table and its figure. Oracles: the results file, what a person is meant to read, and pixels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from continual_kit import sequence
from rich.console import Console

from dsfreeze import cli
from dsfreeze.continual.figure import draw_figure
from dsfreeze.continual.results import FIGURE, RESULTS, read_results, summarise
from dsfreeze.continual.tables import continual_table
from dsfreeze.errors import UserError

ROOT = Path(__file__).parents[1]
TASKS = ["news", "chats"]


def row(number: int, scores: list[float], norm: float = 1.0, share: float | None = 1.0) -> dict[str, Any]:
    named = dict(zip([*TASKS, "stories"], scores, strict=True))
    return {
        "round": number, "task": TASKS[number - 1], "scores": named, "numbers": {"stories": {"perplexity": 4.0}},
        "update_norm": norm, "trainable_share": share, "seconds": 2.0,
    }  # fmt: skip


def state_of(probes: list[str], **more: dict[str, Any]) -> dict[str, Any]:
    """Results by hand: full tuning on two seeds, a method that draws, and a curve."""

    def run(
        label: str, seed: int, rows: list[Any], draw: int | None = None, alpha: float | None = None
    ) -> dict[str, Any]:
        return {
            "label": label,
            "method": label.partition("@")[0],
            "seed": seed,
            "draw": draw,
            "alpha": alpha,
            "rounds": rows,
        }

    runs = {
        "full/1": run("full", 1, [row(1, [80, 5, 20]), row(2, [70, 90, 10], 4)]),
        "full/2": run("full", 2, [row(1, [84, 5, 20]), row(2, [70, 90, 14], 4)]),
        "random/1-0": run("random", 1, [row(1, [70, 5, 22]), row(2, [70, 80, 20], 2, 0.5)], 0),
        "random/1-1": run("random", 1, [row(1, [72, 5, 22]), row(2, [72, 80, 20], 2, 0.5)], 1),
        **{
            f"wise_ft@{a}": run(f"wise_ft@{a}", 1, [row(1, [9 + 70 * a, 5, 25]), row(2, [9 + 60 * a, 9 + 80 * a, 25 - 12 * a], 4 * a)], None, a)
            for a in (0, 0.5, 1)
        },
        **more,
    }  # fmt: skip
    state: dict[str, Any] = {
        "spec": {"bwt": "T-1"}, "sequence": TASKS, "probes": probes, "runs": runs,
        "start": {"scores": {"news": 9.0, "chats": 9.0, "stories": 25.0}, "numbers": {}},
    }  # fmt: skip
    return {**state, "summary": summarise(state)}


def shown(state: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(continual_table(state))
    return console.export_text()


def test_the_table() -> None:
    """Means by hand, the deviations over seeds below them, and those over draws; of the curve its middle alone. What was right of news
    before its round is 5, and 9 before all: FWT -4."""
    text = shown(state_of(["stories"]))
    rows = [line.split() for line in text.partition("R: score")[0].splitlines() if line.split()]
    lines = {words[0]: number for number, words in enumerate(rows)}
    assert rows[lines["full"]][1:] == ["80.0", "-12.0", "12.0", "-4.0", "86.0", "12.0", "100.0%", "4"]
    assert rows[lines["full"] + 1] == ["±0.0", "±2.8", "±2.8", "±0.0", "±1.4", "±2.8"]
    assert rows[lines["random"]][1] == "75.5"
    assert rows[lines["random"] + 1][0] == "(0.7)"  # over draws, of 75 and 76
    assert "wise_ft@0.5" in text
    assert "wise_ft@1 " not in text
    assert "over T-1" in text
    assert "(25.0 before)" in text


def test_the_denominator_is_the_files() -> None:
    state = state_of(["stories"])
    text = shown({**state, "spec": {"bwt": "T"}})
    assert "-6.0" in text
    assert "over T;" in text


def test_the_table_fits_eighty_columns() -> None:
    text = shown(state_of(["stories"]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "nothing is cut off"
    assert "…" not in shown(state_of(["stories"]), 80)


@pytest.mark.parametrize("probes", [["stories"], []])
def test_the_figure_has_a_point_for_each_method(tmp_path: Path, monkeypatch: Any, probes: list[str]) -> None:
    """Oracle: what is in the axes: an error bar a method, the whole curve as one line, both controls."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    state = state_of(probes)
    assert draw_figure(state, tmp_path / "figure.png") == ""
    left, right = figures[0].axes
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    key = "general_ability" if probes else "op"
    curve = left.lines[0]
    points = [state["summary"][f"wise_ft@{a}"] for a in (0, 0.5, 1)]
    assert list(curve.get_xdata()) == [each["learning_accuracy"]["mean"] for each in points]
    assert list(curve.get_ydata()) == [each[key]["mean"] for each in points]
    assert list(right.lines[0].get_xdata()) == [each["update_norm"]["mean"] for each in points]
    at = {bars.get_label(): bars.lines[0].get_xydata()[0].tolist() for bars in left.containers}
    assert at == {
        name: [state["summary"][name]["learning_accuracy"]["mean"], state["summary"][name][key]["mean"]]
        for name in ("full", "random")
    }
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert {"full", "random"} < set(names)
    assert "learning accuracy" in left.get_xlabel()
    assert "L2 norm" in right.get_xlabel()


def test_nothing_finished_is_no_figure(tmp_path: Path) -> None:
    state = {**state_of([]), "summary": {}}
    assert draw_figure(state, tmp_path / "f.png") == "no method has finished all rounds"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = sequence(tmp_path, "one", "two")
    assert cli.run(["continual", str(path), "seeds=[3]"]) == 0
    out = capsys.readouterr()
    assert "2 tasks in sequence: one, two" in out.out
    assert "full/seed-3 round 2 of 2: two (1 rounds to go" in out.err
    assert f"{RESULTS} and {FIGURE}" in out.err
    assert cli.run(["continual", str(path), "seeds=[3]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_results(tmp_path / "out" / RESULTS)
    assert (tmp_path / "out" / FIGURE).exists()
    monkeypatch.setitem(sys.modules, "seaborn", None)
    assert cli.run(["continual", str(path), "seeds=[3]"]) == 0
    assert "no figure: install the figure's library with pip install 'dsfreeze[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["continual", "none.yaml"], "There is no sequence of tasks none.yaml"),
    (["continual"], "Missing argument"),
    (["continual", "{file}", "methods=[ful]"], "command line: methods[0] method 'ful' does not exist"),
])  # fmt: skip
def test_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = str(sequence(tmp_path, "one"))
    assert cli.run([word.format(file=path) for word in words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 99}', b"\xff"])
def test_damaged_results_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(UserError, match="results"):
        read_results(tmp_path / RESULTS)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "../shared/weights/stories15M").exists(), reason="../shared is not at hand")
def test_the_shipped_sequence_runs(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Shortened; on a real model and real data."""
    monkeypatch.chdir(ROOT)
    words = [
        "train.max_steps=1",
        "data.max_train_examples=8",
        "data.max_eval_examples=4",
        "methods=[full, half]",
        "zero=local",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert cli.run(["continual", "recipes/continual.yaml", *words, "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert {len(run["rounds"]) for run in state["runs"].values()} == {len(state["sequence"])}
    assert set(state["summary"]) == {method["name"] for method in state["spec"]["methods"]}
