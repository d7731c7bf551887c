"""Writes dsfreeze/anatomies/*.json and dsfreeze/anatomies/activations/*.json from the public configs of well-known models, on
tensors without memory.

    python -m tests.make_anatomies [NAME ...]     (ten minutes for all)

`test_anatomy.py` holds the files against these configs, `test_shapes.py` their totals against the published ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from public_models import PUBLIC, meta_module

from dsfreeze.anatomy import SHIPPED
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.model import activations_of_config


def main() -> None:
    for name in sys.argv[1:] or PUBLIC:
        config = PUBLIC[name].config
        (SHIPPED / f"{name}.json").write_text(
            read_anatomy(meta_module(config), name).to_json() + "\n", encoding="utf-8"
        )
        (SHIPPED / "activations" / f"{name}.json").write_text(
            activations_of_config(config).to_json() + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
