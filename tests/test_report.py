"""The report. Oracles: html.parser for structure and escaping, the csv module reading back, numbers of records written by hand."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from report_kit import Outline, cell, comparison_of, run_of, sequence_of

from dsfreeze import cli
from dsfreeze.errors import UserError
from dsfreeze.report import figures, write_report
from dsfreeze.report.redact import REDACTED, redact
from dsfreeze.report.sections import Page, Section, Table
from dsfreeze.report.setups import setups_of
from dsfreeze.report.text import to_markdown

#: A name that closes whatever it stands in, in HTML, Markdown and a spreadsheet.
EVIL = "=<script>alert(1)</script>\"'|`&amp;"


def everything(folder: Path) -> Path:
    """Runs, one of them interrupted, a record of another version, a comparison and a sequence."""
    for seed, accuracy in ((1, 0.5), (2, 0.75)):
        run_of(folder / f"half-{seed}", "freeze.fraction=0.5", f"train.seed={seed}", accuracy=accuracy)
    run_of(folder / "full", "freeze.strategy=full", accuracy=0.8)
    run_of(folder / "killed", "freeze.strategy=full", "train.seed=3", ended=False)
    (run_of(folder / "old") / "environment.json").write_text('{"format_version": 1}')
    cells = [
        cell("full", 1, 80.0), cell("full", 2, 82.0), cell("bottom", 1, 70.0), cell("bottom", 2, None, status="failed", reason="CUDA is <gone>"),
        cell("bitfit", 1, None, status="impossible", reason="the model has no biases"),
    ]  # fmt: skip
    comparison_of(folder / "grid", *cells)
    sequence_of(folder / "tasks2")
    return folder


def page_of(paths: list[Path], tmp_path: Path, **options: Any) -> Outline:
    write_report(paths, tmp_path / "report.html", **options)
    return Outline((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    folder = tmp_path_factory.mktemp("whole")
    return page_of([everything(folder / "runs")], folder)


# -- the page ------------------------------------------------------------------------------------------------------


def test_rates_at_the_end_of_their_range_are_in_the_report(tmp_path: Path) -> None:
    trials = [{"learning_rate": rate, "score": rate} for rate in (1e-4, 1e-3)]
    comparison_of(
        tmp_path / "grid",
        cell("full", 1, 80.0),
        tuning={"m/rte/full/size-all": {"trials": trials, "learning_rate": 1e-3}},
    )
    write_report([tmp_path / "grid"], tmp_path / "page.md")
    assert "the highest for full (1 of 1) of those tried" in (tmp_path / "page.md").read_text()


def test_the_runs_are_a_table(whole: Outline) -> None:
    rows = {row["run"]: row for row in whole.table("A row for each run")}
    assert set(rows) == {"full", "half-1", "half-2", "killed"}
    expected = {
        "state": "done", "seed": "1", "steps": "3", "score": "50.00", "metric": "accuracy", "loss": "0.5000", "trained": "25.00 %",
        "FLOPs": "40 %", "s/step": "0.500", "time (s)": "1.5", "peak memory": "2.00 GiB",
    }  # fmt: skip
    assert {key: rows["half-1"][key] for key in expected} == expected
    assert rows["killed"]["state"] == "interrupted: no summary.json; 3 of 3 steps done"
    assert rows["killed"]["score"] == "–"


def test_setups_have_means_and_deviations(whole: Outline) -> None:
    """Oracle: of 50 and 75 by hand: 62.5, 12.5 times the root of 2."""
    rows = {row["setup"]: row for row in whole.table("A row for each setup")}
    assert rows["bottom"]["score"] == "62.50 ± 17.68"
    assert (rows["full"]["runs"], rows["full"]["done"], rows["full"]["score"]) == ("2", "1", "80.00")


def test_comparisons(whole: Outline) -> None:
    scores = whole.table("Scores, 0 to 100: means over seeds ± their deviation (n - 1)")
    assert [(row["method"], row["rte"]) for row in scores] == [
        ("full", "81.00 ± 1.41"),
        ("bottom", "70.00"),
        ("bitfit", "–"),
    ]
    costs = whole.table("Costs, means over a method's finished cells")[0]
    assert (costs["cells done"], costs["time (s)"], costs["peak memory"], costs["TFLOPs of the run"]) == (
        "2",
        "10.0",
        "1.00 GiB",
        "2",
    )
    without = {row["cell"]: (row["state"], row["reason"]) for row in whole.table("Cells without a result")}
    assert without == {
        "m/rte/bottom/size-all/seed-2": ("failed", "CUDA is <gone>"),
        "m/rte/bitfit/size-all/seed-1": ("impossible", "the model has no biases"),
    }
    assert "5 cells: 3 done, 1 failed, 1 impossible." in whole.of("p")


def test_sequences(whole: Outline) -> None:
    (row,) = whole.table("Numbers by method")
    assert (row["OP"], row["BWT"]) == ("81 ± 1.4", "-11 ± 1.4")
    matrix = whole.table("R: score on each task after each round")
    assert [row["news"] for row in matrix] == ["9", "80", "70", "84", "72"]


def test_what_was_not_read_is_said_first(whole: Outline) -> None:
    assert whole.of("h2")[0] == "Not read"
    assert [row["record"] for row in whole.table("What was not read")] == ["old"]
    assert "4 runs: 3 done, 1 interrupted (or still going on)." in whole.of("p")


def test_environment_and_recipes(whole: Outline) -> None:
    (row,) = whole.table("A row for each surroundings that runs had")
    assert (row["runs"], row["device"], row["versions"]) == ("4", "cpu", "dsfreeze 0.1.0, torch 2.13.0")
    assert len([tag for tag, _ in whole.tags if tag == "details"]) == 2
    assert any("fraction: 0.5" in text for text in whole.of("pre"))


def test_headings_figures_and_tables_are_accessible(whole: Outline) -> None:
    levels = [int(tag[1]) for tag, _ in whole.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    ids = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands once"
    pictures = [attributes for tag, attributes in whole.tags if tag == "svg"]
    assert len(pictures) == 5 + 3 + 4 + 1
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    assert len([text for text in whole.of("desc") if text]) == len(pictures)
    assert dict(whole.tags)["html"] == {"lang": "en"}
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        a for t, a in whole.tags if t == "meta"
    ]
    links = [attributes["href"] for tag, attributes in whole.tags if tag == "a"]
    assert [f"#{name}" for name in ids if name and name.startswith("section-")] == links


def test_nothing_is_fetched_and_nothing_runs(whole: Outline) -> None:
    """Oracle: no attribute that loads, but to the page itself; no script and no handler."""
    for tag, attributes in whole.tags:
        assert tag not in ("script", "img", "link", "iframe", "object", "image", "use") or tag == "use", tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name != "src"
            if name.endswith("href"):
                assert (value or "").startswith("#"), value
            for inside in re.findall(r"url\(([^)]*)", value or ""):
                assert inside.startswith("#")
    assert not re.search(r"@import|url\(", "".join(whole.of("style")))


def test_what_came_from_data_is_escaped_everywhere(tmp_path: Path) -> None:
    """Oracle: the parser meets the text as text, whole, and no tag of it."""
    safe = EVIL.replace("/", "∕")
    run_of(tmp_path / "runs" / safe, f"model={json.dumps(EVIL)}", "data.labels=[a]")
    run_of(tmp_path / "runs" / "other", "model=</svg><script>x</script>")
    comparison_of(tmp_path / "runs" / "g", cell(EVIL, 1, 50.0), cell("x", 1, None, status=EVIL, reason=EVIL))
    outline = page_of([tmp_path / "runs"], tmp_path, title=EVIL)
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.of("h1") == [EVIL]
    assert safe in [row["run"] for row in outline.table("A row for each run")]
    assert EVIL in [row["reason"] for row in outline.table("Cells without a result")]
    assert any(EVIL[:5] in text for text in outline.of("text")), "in a figure too"


def test_names_that_no_encoding_has_do_not_stop_a_report(tmp_path: Path) -> None:
    """A file's name may hold bytes that are no UTF-8, control characters, and what matplotlib reads as mathematics."""
    for number, name in enumerate(("a\udcff", "b\x01", "$x_{$", "_hidden")):
        run_of(tmp_path / "runs" / str(number), f"model={json.dumps(name)}" if number else "model=plain")
        if not number:
            (tmp_path / "runs" / "0").rename(tmp_path / "runs" / name)
    outline = page_of([tmp_path / "runs"], tmp_path)
    assert len(outline.table("A row for each run")) == 4
    assert any("_hidden" in text for text in outline.of("text")), "it has its line in the legend"


def test_credentials_are_taken_out(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 8
    run_of(tmp_path / "one", f"data.train=https://me:pass@host/{token}.jsonl")
    for suffix in (".html", ".md", ".csv"):
        write_report([tmp_path / "one"], tmp_path / f"r{suffix}")
        text = (tmp_path / f"r{suffix}").read_text(encoding="utf-8").replace("\\", "")
        assert token not in text
        assert "me:pass" not in text
        assert REDACTED in text


@pytest.mark.parametrize(
    "text", ["runs/sk-learn-and-more-of-a-long-name-than-that", "hf_home", "https://host:80/a@b", "lr=5e-05", "a" * 64]
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    everything(tmp_path / "runs")
    pages = []
    for name in ("a.html", "b.html"):
        write_report([tmp_path / "runs"], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


# -- figures -------------------------------------------------------------------------------------------------------


def setups(tmp_path: Path, number: int, **more: Any) -> list[Any]:
    from dsfreeze.report.reading import gather

    for count in range(number):
        run_of(tmp_path / f"run-{count}", f"model=m{count}", **more)
    return setups_of(gather([tmp_path]).runs)


def test_a_figure_of_many_is_cut_and_says_so(tmp_path: Path) -> None:
    """Oracle: counted: lines in the axes, bars by their labels, and the sentence."""
    many = setups(tmp_path, figures.MOST_BARS + 4)
    curves = figures.loss_curves(many)
    assert curves is not None
    left = f"{len(many) - figures.MOST_LINES} more setups are left out here; the table has all."
    assert curves.note == left
    assert curves.svg.count("<svg") == 1
    assert sum(f">{setup.label}<" in curves.svg for setup in many) == figures.MOST_LINES
    drawn = figures.bars("Score", "points", [(setup.label, setup.values("score")) for setup in many])
    assert drawn is not None
    assert drawn.note == "4 more bars are left out here; the table has all."
    assert sum(f">{setup.label}<" in drawn.svg for setup in many) == figures.MOST_BARS


@pytest.mark.parametrize(("number", "bands"), [(figures.MOST_BANDS, figures.MOST_BANDS), (figures.MOST_BANDS + 1, 0)])
def test_bands_are_drawn_while_there_are_few(tmp_path: Path, number: int, bands: int) -> None:
    """Oracle: counted: filled shapes without a line, and the sentence."""
    from dsfreeze.report.reading import gather

    for count in range(number):
        for seed in (1, 2):
            run_of(tmp_path / f"{count}-{seed}", f"model=m{count}", f"train.seed={seed}", losses=(2.0, 1.0 * seed))
    curves = figures.loss_curves(setups_of(gather([tmp_path]).runs))
    assert curves is not None
    assert curves.svg.count("fill-opacity: 0.18") == bands
    assert ("bands" in curves.note) == bool(bands)


def test_curves_are_means_and_ranges_in_bins(tmp_path: Path) -> None:
    """Oracle: by hand: two runs, bins of two steps, the second run a step shorter."""
    run_of(tmp_path / "a", "train.seed=1", "train.max_steps=9", losses=(4.0, 2.0, 1.0, 3.0))
    run_of(tmp_path / "b", "train.seed=2", "train.max_steps=9", losses=(2.0, 2.0, 6.0))
    from dsfreeze.report.reading import gather

    (setup,) = setups_of(gather([tmp_path]).runs)
    steps, mean, low, high = figures._binned(setup, 2)
    assert steps.tolist() == [1.5, 3.5]
    assert mean.tolist() == [2.5, 4.0]
    assert low.tolist() == [2.0, 2.0]
    assert high.tolist() == [3.0, 6.0]


def test_a_figures_ink_is_the_pages(tmp_path: Path) -> None:
    """Oracle: none of seaborn's own inks is left, and colours stand out (3 : 1, WCAG 1.4.11) on both papers."""
    (curves,) = [figures.loss_curves(setups(tmp_path, 8))]
    assert curves is not None
    colours = set(re.findall("#[0-9a-f]{6}", curves.svg))
    assert not colours & {"#262626", "#000000", "#ffffff", "#cccccc"}
    assert len(colours) == 8
    for paper in ("#ffffff", "#16181d"):
        assert min(contrast(colour, paper) for colour in colours) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_pages_colours_have_contrast() -> None:
    """Oracle: WCAG AA, 4.5 : 1 for text on each background that it stands on."""
    template = (Path(figures.__file__).parent / "page.html.jinja").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{[^}]*\}", template)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for ink in ("ink", "quiet", "link"):
            assert min(contrast(colours[ink], colours[paper]) for paper in ("paper", "raised")) >= 4.5


def test_without_seaborn_the_page_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "seaborn", None)
    assert cli.run(["report", str(run_of(tmp_path / "one")), "-o", str(tmp_path / "r.html")]) == 0
    assert "no figures: install the figure's library with pip install 'dsfreeze[plot]'" in capsys.readouterr().err
    outline = Outline((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "svg" not in {tag for tag, _ in outline.tags}
    assert any("pip install 'dsfreeze[plot]'" in text for text in outline.of("p"))


# -- Markdown and CSV ----------------------------------------------------------------------------------------------


def test_csv_reads_back_in_full(tmp_path: Path) -> None:
    """Oracle: the csv module; numbers are the records' own."""
    write_report([everything(tmp_path / "runs")], tmp_path / "r.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text(encoding="utf-8"))))
    assert [row["kind"] for row in rows] == ["cell"] * 5 + ["sequence"] * 2 + ["run"] * 4 + ["not read"]
    by_name = {row["name"]: row for row in rows}
    half = by_name["half-1"]
    assert (float(half["score"]), int(half["peak_bytes"]), float(half["after.accuracy"])) == (50.0, 2**31, 0.5)
    assert (half["seed"], half["method"], half["state"]) == ("1", "bottom", "done")
    assert by_name["killed"]["state"] == "interrupted"
    assert by_name["killed"]["score"] == ""
    assert float(by_name["m/rte/full/size-all/seed-2"]["flops"]) == 2e12
    assert by_name["m/rte/bottom/size-all/seed-2"]["reason"] == "CUDA is <gone>"
    assert float(by_name["full/seed-1"]["sequence.bwt"]) == -10.0


def test_csv_holds_no_formula(tmp_path: Path) -> None:
    """Oracle: what a spreadsheet runs begins with one of = + - @."""
    comparison_of(tmp_path / "grid", cell("=1+1", 1, -3.5, reason="@x", metrics={"+m": 1.0}))
    write_report([tmp_path / "grid"], tmp_path / "r.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text(encoding="utf-8")))
    assert (row["method"], row["reason"], row["score"]) == ("'=1+1", "'@x", "-3.5")


def test_markdown_has_the_same_tables(tmp_path: Path) -> None:
    write_report([everything(tmp_path / "runs")], tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert text.startswith("# Report\n")
    assert "| half-1 | done | bottom | 1 | 3 | 50.00 | accuracy |" in text
    assert "CUDA is &lt;gone&gt;" in text
    assert "```yaml\nmodel:\n" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| half-1 | done")}
    assert widths == {14}


def test_markdown_escapes() -> None:
    """Oracle: a cell stays a cell, and no tag, link, code or emphasis is left."""
    table = Table("t", ("a|b",), [[EVIL], ["two\nlines"], ["[x](javascript:1) *b* _c_"]])
    text = to_markdown(Page("# t", [], [Section("s", tables=[table])]))
    assert "<script>" not in text
    assert r"\|\`" in text
    assert "| two lines |" in text
    assert r"\[x\](javascript:1) \*b\* \_c\_" in text
    assert text.startswith(r"# \# t")


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    everything(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", "runs", "-o", "r.csv"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "not read: old: " in told
    assert "wrote r.csv: 4 runs, 1 comparison, 1 sequence, 1 of the runs interrupted" in told
    assert cli.run(["report", "runs/full", "runs/killed", "-o", "new/r.md", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["runs"], told["interrupted"], told["not_read"]) == (2, ["killed"], [])
    assert (tmp_path / "new" / "r.md").exists()


@pytest.mark.parametrize(("words", "message"), [
    (["report"], "Missing argument"),
    (["report", ".", "-o", "r.html"], "no record of a run in there"),
    (["report", "nowhere"], "There is no nowhere"),
    (["report", "one", "-o", "r.pdf"], "-o r.pdf: a report is written as .html, .md, .csv"),
    (["report", "one", "-o", "r.csv/x.csv"], "Cannot write the report"),
])  # fmt: skip
def test_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "one" in words:
        run_of(tmp_path / "one")
    (tmp_path / "r.csv").write_text("")
    assert cli.run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    with pytest.raises(UserError, match="Cannot write the report"):
        write_report([run_of(tmp_path / "one")], tmp_path / "r.html")
