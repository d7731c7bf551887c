"""launch.sh, its Python replaced by a script that writes down what it is asked. Oracles: those words, and exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_kit import ROOT, STAMPED, fake_venv, write_program

NOTE = 'for word in "$@"; do printf "%s\\037" "$word"; done >>"$NOTES"; echo >>"$NOTES"'
TRAIN = ["-m", "dsfreeze.supervise", "deepspeed.launcher.runner"]
MODULE = ["--module", "dsfreeze", "train"]


class Checkout:
    """A copy of launch.sh and what it reads, in a folder whose name has blanks, and the calls that it made."""

    def __init__(self, folder: Path) -> None:
        self.root, self.notes = folder / "a check out", folder / "notes"
        self.venv, self.tools = folder / "an environment", folder / "tools"
        self.root.mkdir()
        for name in ("launch.sh", *STAMPED):
            shutil.copy(ROOT / name, self.root)
        self.tools.mkdir()
        for tool in ("bash", "env", "cat", "cksum", "tr", "dirname", "touch", "chmod", "cp", "mkdir"):
            (self.tools / tool).symlink_to(shutil.which(tool))

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it on a machine without GPU tools and without any python but the environment's."""
        base = {"PATH": str(self.tools), "NOTES": str(self.notes), "DSFREEZE_VENV": str(self.venv)}
        return subprocess.run(
            [str(self.root / "launch.sh"), *words], env=base | environment, cwd=self.root.parent,
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        """What Python was asked, call by call."""
        if not self.notes.exists():
            return []
        return [line.split("\037")[:-1] for line in self.notes.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def checkout(tmp_path):
    """Installed already."""
    made = Checkout(tmp_path)
    fake_venv(made.venv, NOTE, root=made.root)
    return made


@pytest.fixture
def bare(tmp_path):
    """Nothing installed; the system's python makes an environment whose python takes notes."""
    made = Checkout(tmp_path)
    copies = [f'mkdir -p "$3/bin"; cp "$0" "$3/bin/{name}"' for name in ("python", "pip")]
    write_program(made.tools / "python3", NOTE, 'case "$1 $2" in "-m venv")', *copies, ";; esac")
    return made


def test_words_reach_the_launcher_as_they_are(checkout):
    words = ["--num_gpus", "2", "--launcher_args", "a b", "my recipe.yaml", "data.prefix=a  'b' $HOME *", "model=m"]
    done = checkout.run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert checkout.calls() == [[*TRAIN, *words[:4], *MODULE, *words[4:]]]


def test_a_recipe_can_be_analyzed(checkout):
    checkout.run("analyze", "--num_gpus", "2", "my recipe.yaml", "analyze.scores=change")
    words = ["--module", "dsfreeze", "analyze", "my recipe.yaml", "analyze.scores=change"]
    assert checkout.calls() == [[*TRAIN, "--num_gpus", "2", *words]]


@pytest.mark.parametrize("key", ["tasks", "suite"])
def test_a_sequence_of_tasks_is_known_by_its_keys(checkout, key):
    """Below the top level, and beside `analyze`, the word means nothing."""
    file = checkout.root.parent / "my tasks.yaml"
    file.write_text(f"model: m\n{key}: []\n", encoding="utf-8")
    assert checkout.run("--num_gpus", "2", file.name, "seeds=1").stderr == ""
    file.write_text(f"model: m\ndata:\n  {key}: []\n", encoding="utf-8")
    checkout.run("--num_gpus", "2", file.name)
    launched = [*TRAIN, "--num_gpus", "2", "--module", "dsfreeze"]
    assert checkout.calls() == [[*launched, "continual", file.name, "seeds=1"], [*launched, "train", file.name]]


def test_a_comparison_starts_its_runs_itself(checkout):
    file = checkout.root.parent / "my grid.yaml"
    file.write_text("models: [m]\ntasks: []\n", encoding="utf-8")
    assert checkout.run("--launcher", "slurm", file.name, "seeds=1").stderr == ""
    assert checkout.calls() == [["-m", "dsfreeze", "compare", "--launcher", "slurm", file.name, "seeds=1"]]


def test_without_a_gpu_one_rank_is_chosen_and_told(checkout):
    done = checkout.run("--master_port", "29501", "r.yml")
    assert checkout.calls() == [[*TRAIN, "--master_port", "29501", "--num_accelerators", "1", *MODULE, "r.yml"]]
    assert "one rank" in done.stderr


@pytest.mark.parametrize("options", [
    "--num_gpus 2", "--num_gpus=2", "--num_accelerators 2", "--num_nodes 2", "--hostfile hosts", "--hostfile=hosts",
    "-H hosts", "-Hhosts", "--include localhost:0", "--include=localhost:0", "-i localhost:0", "--exclude localhost:1",
    "-e localhost:1",
])  # fmt: skip
def test_devices_that_were_chosen_stay(checkout, options):
    done = checkout.run(*options.split(), "r.yaml")
    assert checkout.calls() == [[*TRAIN, *options.split(), *MODULE, "r.yaml"]]
    assert done.stderr == ""


@pytest.mark.parametrize("tool", ["nvidia-smi", "rocm-smi"])
def test_with_a_gpu_the_launcher_counts(checkout, tool):
    write_program(checkout.tools / tool)
    checkout.run("r.yaml")
    assert checkout.calls() == [[*TRAIN, *MODULE, "r.yaml"]]


@pytest.mark.parametrize("words", [["--num_gpus", "2"], ["train.max_steps=3"]])
def test_no_recipe_is_a_mistake_with_the_usage(checkout, words):
    done = checkout.run(*words)
    assert done.returncode == 2
    assert "Usage: ./launch.sh [analyze] [launcher options] recipe.yaml" in done.stderr
    assert checkout.calls() == []


@pytest.mark.parametrize("words", [[], ["quickstart"], ["quickstart", "--json", "train.max_steps=3"]])
def test_the_quickstart(checkout, words):
    assert checkout.run(*words).returncode == 0
    assert checkout.calls() == [["-m", "dsfreeze", "quickstart", *words[1:]]]


def test_the_tests(checkout):
    assert checkout.run("test", "-m", "not slow").returncode == 0
    checks = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", "--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--nbmake", "-m", "not slow"],
    ]
    assert checkout.calls() == [["-m", *check] for check in checks]


def test_an_environment_named_from_here(checkout):
    """`test` changes folder; a relative DSFREEZE_VENV still means the same one."""
    assert checkout.run("test", DSFREEZE_VENV=checkout.venv.name).returncode == 0
    assert len(checkout.calls()) == 4


def test_the_launchers_exit_code_is_ours(checkout):
    write_program(checkout.venv / "bin" / "python", "exit 7")
    assert checkout.run("r.yaml").returncode == 7


def installations(checkout: Checkout) -> list[list[str]]:
    return [call for call in checkout.calls() if call[:3] == ["-m", "pip", "install"]]


def test_installs_once_and_again_when_requirements_change(bare):
    for _ in range(2):
        assert bare.run("r.yaml").returncode == 0
        assert len(installations(bare)) == 3
    assert installations(bare)[1][-2:] == ["-e", f"{bare.root}[models]"]
    for times, name in enumerate(STAMPED, 2):
        with (bare.root / name).open("a") as file:
            file.write("# newer\n")
        bare.run("r.yaml")
        assert len(installations(bare)) == 3 * times, name
    assert sum(call[:2] == ["-m", "venv"] for call in bare.calls()) == 1


def test_an_installation_that_failed_is_done_again(bare):
    """Oracle: no training after a pip that fails, and pip asked again the next time."""
    bare.run("r.yaml")
    python = bare.venv / "bin" / "python"
    works = python.read_text()
    (bare.root / "constraints.txt").write_text("changed\n")
    python.write_text(works + "exit 1\n")
    trained = bare.calls().count(bare.calls()[-1])
    assert bare.run("r.yaml").returncode == 1
    assert bare.calls().count([*TRAIN, "--num_accelerators", "1", *MODULE, "r.yaml"]) == trained
    python.write_text(works)
    assert bare.run("r.yaml").returncode == 0
    assert bare.calls().count([*TRAIN, "--num_accelerators", "1", *MODULE, "r.yaml"]) == trained + 1


@pytest.mark.parametrize(("version", "code"), [((3, 10, 14), 1), ((3, 11, 0), 0), ((4, 0, 0), 0)])
def test_an_old_python_is_refused(bare, version, code):
    """Oracle: the very check that launch.sh makes, by a real Python that says it is another version."""
    check = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    works = (bare.tools / "python3").read_text().splitlines()[1:]
    old = f'[ "$1" != -c ] || exec "{sys.executable}" -c "{check}" "$2"'
    python = write_program(bare.tools / "some python", old, *works)
    (bare.tools / "python3").unlink()
    done = bare.run("r.yaml", PYTHON=str(python))
    assert done.returncode == code, done.stderr
    assert ("Python 3.11 or newer" in done.stderr) == bool(code)
    assert bare.venv.exists() != bool(code)


def test_the_script_runs_in_an_old_bash():
    """macOS has 3.2, where an empty array is an unbound variable. Oracle: every such expansion is guarded."""
    text = (ROOT / "launch.sh").read_text(encoding="utf-8")
    assert text.count('"${launcher[@]}"') == text.count('${launcher[@]+"${launcher[@]}"}')
    assert os.access(ROOT / "launch.sh", os.X_OK)
