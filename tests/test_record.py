"""The record. Oracles: what was written, read back; the bytes on disk after a run was cut short."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import Record, holds_record, read_record, require_free

RECIPE = load_recipe(None, ["model=m", "train.learning_rate=5e-5", "data.labels=['no', '1e3']"])
PLAN = FreezePlan("top", (Phase(0, None, ("a.weight", "b.weight")),), notes=("a note",))
OTHER = FreezePlan("top", (Phase(0, None, ("a.weight",)),))
ENVIRONMENT = {"versions": {"torch": "2.13.0"}, "device": "cpu", "world_size": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "one"


def line(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "learning_rate": 1e-5}


def test_a_whole_run_reads_back(folder):
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    for step in (1, 2, 3):
        record.step(line(step, 1 / step))
    record.event("evaluation", when="after", metrics={"accuracy": 0.5})
    assert read_record(folder).summary is None
    record.summary({"steps": 3, "model": folder / "model"})
    data = read_record(str(folder))
    assert data.recipe == RECIPE.model_dump(mode="json")
    assert data.plan == PLAN
    assert data.environment["versions"] == {"torch": "2.13.0"}
    assert data.environment["format_version"] == 2
    assert data.steps == [line(1), line(2, 0.5), line(3, 1 / 3)]
    assert data.events[0]["event"] == "evaluation"
    assert data.events[0]["metrics"] == {"accuracy": 0.5}
    assert data.summary == {"format_version": 2, "steps": 3, "model": str(folder / "model")}
    assert not list(folder.glob(".*")), "no temporary file is left"


def test_its_recipe_runs_again(folder):
    """Oracle: the recipe itself, texts that look like numbers included."""
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    assert load_recipe(folder / "recipe.yaml") == RECIPE


def test_half_a_last_line_is_passed_over_and_cut_when_the_run_goes_on(folder):
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    record.step(line(1))
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [step["step"] for step in read_record(folder).steps] == [1]
    record = Record.create(folder, RECIPE, PLAN, {"device": "cuda"}, resume_step=3)
    record.step(line(2))
    data = read_record(folder)
    assert [step["step"] for step in data.steps] == [1, 2]
    assert data.environment["device"] == "cpu"
    assert data.events[-1]["event"] == "resumed"
    assert data.events[-1]["environment"] == {"device": "cuda"}


def test_a_resumed_runs_lines_replace_those_it_repeats(folder):
    """Killed at step 5, resumed from the checkpoint at 2, killed again at 3: three steps count."""
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    for step in range(1, 6):
        record.step(line(step, 1.0))
    record.summary({"steps": 5})
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT, resume_step=3)
    record.step(line(3, 2.0))
    data = read_record(folder)
    assert [(step["step"], step["loss"]) for step in data.steps] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert data.summary is None, "a run that goes on is not over"


def test_a_killed_process_leaves_every_step_it_ended(folder):
    """Oracle: SIGKILL, then the lines the process said it had written."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_record import *
record = Record.create(Path({str(folder)!r}), RECIPE, PLAN, ENVIRONMENT)
for step in range(1, 10**9):
    record.step(line(step))
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    seen = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    steps = [step["step"] for step in read_record(folder).steps]
    assert steps[: len(seen)] == seen
    assert steps == list(range(1, len(steps) + 1))


def test_another_runs_record_is_not_overwritten(folder):
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT).step(line(1))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"another run\. Name another train\.output_dir, or remove"):
        Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    with pytest.raises(UserError, match="another freeze plan"):
        Record.create(folder, RECIPE, OTHER, ENVIRONMENT, resume_step=3)
    with pytest.raises(UserError, match="another run"):
        require_free(folder, PLAN)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "checkpoint-1").mkdir()  # only then is there something to continue from
    with pytest.raises(UserError, match=r"continue that run with train\.resume_from_checkpoint=true"):
        require_free(folder, PLAN)


def test_resuming_into_a_new_folder_starts_a_record(folder):
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT, resume_step=3)
    assert holds_record(folder)
    assert read_record(folder).environment["device"] == "cpu"


def test_open_adds_to_a_record_that_is_there(folder):
    with pytest.raises(UserError, match="There is no folder"):
        Record.open(folder)
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    Record.open(folder).event("exported", folder=folder)
    assert read_record(folder).events[0]["folder"] == str(folder)


def test_numbers_that_json_lacks_become_null_and_scalars_become_numbers(folder):
    """Oracle: strict JSON, which knows no NaN."""

    class Scalar:  # numpy's and torch's scalars alike
        def item(self) -> float:
            return 2.5

    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    record.step({"step": 1, "loss": math.nan, "norm": [math.inf, Scalar()]})

    def refuse(constant):
        raise AssertionError(constant)

    text = (folder / "steps.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "norm": [None, 2.5]}


def test_no_secret_of_the_environment_goes_in(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "hf_secret")
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    record.summary({})
    assert not any(b"hf_secret" in path.read_bytes() for path in folder.iterdir())


# -- bad folders ---------------------------------------------------------------------------------------------------


def test_a_folder_without_a_record_names_the_runs_in_it(folder):
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    with pytest.raises(UserError, match=r"holds no record.*Runs in it: one"):
        read_record(folder.parent)
    with pytest.raises(UserError, match="There is no folder"):
        read_record(folder / "nowhere")


def test_an_output_dir_that_is_a_file_or_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        Record.create(tmp_path / "file", RECIPE, PLAN, ENVIRONMENT)
    with pytest.raises(UserError, match="Cannot make the run's folder"):
        Record.create(tmp_path / "file" / "run", RECIPE, PLAN, ENVIRONMENT)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("steps.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', r"steps\.jsonl:2 is not a line of JSON"),
        ("steps.jsonl", "[1]\n", r"steps\.jsonl:1 is not an object"),
        ("steps.jsonl", '{"loss": 1}\n', "a line without a step"),
        ("events.jsonl", "junk\n\n", r"events\.jsonl:1 is not"),
        ("environment.json", "{", r"environment\.json is not JSON"),
        ("environment.json", '{"format_version": 3}', "format 3.*reads format 2"),
        ("plan.json", "{}", r"plan\.json: Not a freeze plan"),
        ("recipe.yaml", "[1]", r"recipe\.yaml"),
        ("summary.json", "[]", "is not a JSON object"),
    ],
)
def test_a_damaged_record_says_which_file(name, content, expected, folder):
    Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        read_record(folder)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        ["recipe.yaml", "plan.json", "environment.json", "steps.jsonl", "events.jsonl", "summary.json"]
    ),
    junk=st.binary(max_size=60),
)
def test_junk_in_any_file_is_a_user_error_or_read(name, junk, tmp_path):
    """Oracle: no other exception."""
    Record.create(tmp_path, RECIPE, PLAN, ENVIRONMENT, resume_step=3)
    whole = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
    (tmp_path / name).write_bytes(junk)
    try:
        read_record(tmp_path)
    except UserError:
        pass
    finally:
        (tmp_path / name).write_bytes(whole)
        if not whole:
            (tmp_path / name).unlink()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_said(folder):
    """Oracle: the kernel's own full device."""
    record = Record.create(folder, RECIPE, PLAN, ENVIRONMENT)
    (folder / "steps.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"Cannot write .*steps\.jsonl: No space left"):
        record.step(line(1))
