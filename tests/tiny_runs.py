"""Tiny models with byte tokenizers as folders, and tiny data, made on the spot: a whole training in a second or two."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedTokenizerFast, T5Config

from dsfreeze.recipe import Recipe


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus <pad> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def llama_folder(folder: Path, *, layers: int = 4, hidden: int = 32, seed: int = 0, tied: bool = False) -> Path:
    """A random Llama (fp32, dropout-free) saved as a Hugging Face folder."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=258, max_position_embeddings=512, tie_word_embeddings=tied,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return _save(folder, AutoModelForCausalLM, config, seed)


def t5_folder(folder: Path, seed: int = 0) -> Path:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=258, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return _save(folder, AutoModelForSeq2SeqLM, config, seed)


def _save(folder: Path, kind: Any, config: Any, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def classification_data(folder: Path, rows: int = 45, evaluation: int = 18) -> dict[str, Any]:
    """Three classes told apart by the last letter; `data:` of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", rows), ("eval", evaluation)):
        lines = []
        for i in range(count):
            letters = "".join(draw.choices("xyz", k=draw.randint(2, 9)))
            lines.append(json.dumps({"text": letters + "abc"[i % 3] * draw.randint(1, 3), "label": i % 3}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"),
        "text": "text", "label": "label", "num_labels": 3, "max_length": 64,
    }  # fmt: skip


def preference_data(folder: Path, rows: int = 21, evaluation: int = 7, seed: int = 0) -> dict[str, Any]:
    """Prompts of letters with two answers of other lengths; `data:` of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)

    def letters(most: int) -> str:
        return "".join(draw.choices("abcdefgh", k=draw.randint(1, most)))

    for name, count in (("train", rows), ("eval", evaluation)):
        lines = [
            json.dumps({"prompt": letters(12), "chosen": f"x{letters(9)}", "rejected": f"y{letters(9)}"})
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"),
        "text": None, "label": None, "num_labels": None, "max_length": 64,
    }  # fmt: skip


def preference_recipe(folder: Path, **changes: Any) -> Recipe:
    """`tiny_recipe` for preferences, evaluated before and after."""
    data = {**preference_data(folder / "pairs"), **changes.pop("data", {})}
    train = {"eval_strategy": "end", "learning_rate": 1e-3, **changes.pop("train", {})}
    return tiny_recipe(folder, task="preference", data=data, train=train, **changes)


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """A classification recipe on a tiny Llama in `folder`; `train`, `freeze`, `data` are merged over the defaults."""
    model = folder / "model"
    if not model.exists():
        llama_folder(model)
    values: dict[str, Any] = {
        "model": str(model), "task": "classification", "zero": "local",
        "data": classification_data(folder / "data"),
        "freeze": {"strategy": "bottom", "fraction": 0.5},
        "train": {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
                  "warmup_steps": 2, "output_dir": str(folder / "run"), "save_strategy": "no", "eval_strategy": "no"},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = (
            {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        )
    return Recipe.model_validate(values)
