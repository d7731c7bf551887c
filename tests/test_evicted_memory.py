"""What a run without its prefix holds. The oracle is the resident set of the same run with it, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evicted_memory import HIDDEN, LAYERS
from tiny_runs import llama_folder

#: Of a layer of `llama_folder`: q and o, k and v of half the heads, three matrices of the MLP, two norms; fp32.
LAYER = 4 * (3 * HIDDEN**2 + 3 * HIDDEN * 2 * HIDDEN + 2 * HIDDEN)
TRAINED, PREFIX = 2, LAYERS - 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's record of the peak")
def test_the_resident_set_is_lower_by_the_prefix(tmp_path: Path) -> None:
    """During steps by the prefix's weights; before them never more than the suffix and a group, which takes what will be gradients and
    Adam's states."""
    llama_folder(tmp_path / "large" / "model", layers=LAYERS, hidden=HIDDEN)
    whole, suffix = (_measured(tmp_path, evicts) for evicts in ("false", "true"))
    saved, states = whole["held"] - suffix["held"], TRAINED * LAYER * 3
    assert saved == pytest.approx(PREFIX * LAYER, rel=0.1)
    assert suffix["held"] <= TRAINED * LAYER + states
    assert suffix["building"] <= 1.1 * (TRAINED * LAYER + states)


def _measured(folder: Path, evicts: str) -> dict[str, int]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "evicted_memory.py"), str(folder), evicts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
