"""dsfreeze: choose which layers to fine-tune, know what it costs, and train exactly that under DeepSpeed ZeRO.

The public names below are imported when they are first used, so `import dsfreeze` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsfreeze.anatomy import Anatomy
    from dsfreeze.engine.refreeze import refreeze
    from dsfreeze.errors import UserError
    from dsfreeze.integrations import attach
    from dsfreeze.loop import train
    from dsfreeze.plan import FreezePlan, Phase
    from dsfreeze.recipe import Recipe
    from dsfreeze.recipe_reader import load_recipe
    from dsfreeze.record import read_record
    from dsfreeze.strategies import make_plan

__version__ = "0.1.0"
__all__ = [
    "Anatomy", "FreezePlan", "Phase", "Recipe", "UserError", "__version__",
    "attach", "load_recipe", "make_plan", "read_record", "refreeze", "train",
]  # fmt: skip

_HOMES = {
    "Anatomy": "anatomy", "FreezePlan": "plan", "Phase": "plan", "Recipe": "recipe", "UserError": "errors",
    "attach": "integrations", "load_recipe": "recipe_reader", "make_plan": "strategies", "read_record": "record",
    "refreeze": "engine.refreeze", "train": "loop",
}  # fmt: skip


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOMES:
        raise AttributeError(f"module 'dsfreeze' has no attribute '{name}'")
    return getattr(import_module(f"dsfreeze.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
