"""Options of the test run. No test asks the model hub: without a network each question would wait for its time-outs."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help="write docs/compatibility.json from what tests/distributed/test_compatibility.py finds",
    )
