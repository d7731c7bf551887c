"""Options of the test run. No test asks the model hub: without a network each question would wait for its time-outs."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many workers as cores: threads of one would wait in turn for those of another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help="write docs/compatibility.json from what tests/distributed/test_compatibility.py finds",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks take a kernel each."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("slow")
