"""Files appear whole or not at all. Oracle: what lies in the folder."""

from __future__ import annotations

import os

import pytest

from dsfreeze.files import write_whole


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.json"
    for text in ("one", "two"):
        write_whole(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_where_the_disk_refuses_the_old_file_stays_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_whole(path, "old")

    def refuses(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
