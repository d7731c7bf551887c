"""Writes dsfreeze/anatomies/*.json from the public configs of well-known models, on the meta device.

    python -m tests.make_anatomies

`test_anatomy.py` holds the files against these configs, `test_shapes.py` their totals against the published ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from public_models import PUBLIC, meta_module

from dsfreeze.anatomy import SHIPPED
from dsfreeze.anatomy_reader import read_anatomy


def main() -> None:
    for name, model in PUBLIC.items():
        anatomy = read_anatomy(meta_module(model.config), name)
        (SHIPPED / f"{name}.json").write_text(anatomy.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
