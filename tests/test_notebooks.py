"""The notebooks as files. Oracles: their JSON, the repository's files, and what Jupyter shows of folders that are not right.

That each runs is nbmake's to say: `pytest --nbmake notebooks`, which `./launch.sh test` runs with everything else.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: Beginnings of paths that only one machine has.
PATHS = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|mnt|opt|workspace)/|[A-Z]:\\")


def cells_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_there_are_seven():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stripped_and_begins_with_its_folder(path):
    cells = cells_of(path, "code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    first = "".join(cells[0]["source"])
    assert re.search(r'^RECORDS = os\.environ\.get\("DSFREEZE_RECORDS", "[\w./]+"\)', first, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_links_to_is_there(path):
    text = "".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))
    links = re.findall(r"\]\(([\w./]+)\)", text)
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_nothing_names_a_machines_path():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and ".ipynb_checkpoints" not in path.parts]
    assert len(files) > 20
    assert [str(path) for path in files if PATHS.search(path.read_text(encoding="utf-8"))] == []


def test_the_check_of_paths_can_fail():
    assert PATHS.search('"model": "/home/someone/model"')
    assert not PATHS.search("https://x.org/root/of/all ../work/x")


# -- as Jupyter shows them -----------------------------------------------------------------------------------------


def executed(name: str, records: Path, monkeypatch) -> tuple[list[dict[str, Any]], str]:
    """(all outputs, what the last error shows or nothing) of a notebook over a folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("DSFREEZE_RECORDS", str(records))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}, allow_errors=False
    )
    error = ""
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError:
        error = next("\n".join(o["traceback"]) for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "error")  # fmt: skip
    return [output for cell in notebook.cells for output in cell.get("outputs", [])], error


@pytest.mark.slow
def test_a_wrong_folder_is_a_message_without_a_traceback(tmp_path, monkeypatch):
    _, error = executed("07_read_your_run", tmp_path / "nowhere", monkeypatch)
    assert error.startswith("UserError: RECORDS is ")
    assert "Traceback" not in error


@pytest.mark.slow
def test_names_of_runs_are_text(tmp_path, monkeypatch):
    """A run's folder may be called anything: its name is no markup in tables and no formula in figures."""
    name = "<img src=x onerror=alert(1)> $\\frac{"
    shutil.copytree(FOLDER / "records" / "nli" / "full", tmp_path / name)
    outputs, error = executed("07_read_your_run", tmp_path, monkeypatch)
    assert error == ""
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pages) > 4
    assert [page for page in pages if "<img" in page] == []
    assert any("&lt;img" in page for page in pages)
