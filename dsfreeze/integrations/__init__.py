"""Freeze plans in trainers that are not ours: Hugging Face's `Trainer`, TRL's `SFTTrainer` and `DPOTrainer`.

from dsfreeze.integrations import attach
attach(trainer, plan).train()
"""

from dsfreeze.integrations.trainer import attach

__all__ = ["attach"]
