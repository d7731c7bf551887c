"""Bottom freezing and LoRA in other tools, on the model of the prefix cache's benchmark: one method, one process, one thread.

Run by the python of the peers' environment (benchmarks/README.md says how to make it), which need not know dsfreeze:
`python prefix_cache_peers.py llamafactory-freeze-50`. It says what it is in a line of JSON, then trains a step only when asked:
`step N` on standard input is answered by the N steps' seconds, `quit` ends it. `Peer` is the asking side.

A step is forward, backward, clipping where the tool clips, AdamW and zeroing the gradient; fetching the batch is left out. The
peers are given their faster settings: LLaMA-Factory's gradient checkpointing, on by default, is off; AdamW is torch's fused one;
frozen models train whole blocks alone, neither the last norm nor the head. LLaMA-Factory runs its own command's code from
arguments to trainer, on a text of random words. `torch-*` are plain loops over transformers' model, without any tool.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCKS, WORDS, BATCH, LENGTH = 12, 1024, 4, 128
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-4


class Peer:
    """A method in a process of its own, idle until asked."""

    def __init__(self, python: str, method: str) -> None:
        self.method = method
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        self.process = subprocess.Popen(
            [python, __file__, method], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True
        )
        self.about: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.words.seek(0)
            raise RuntimeError(f"{self.method} ended with status {status}:\n{self.words.read()[-2000:]}")
        return json.loads(line)

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def seconds(self, steps: int) -> float:
        """Train some steps; the median of their seconds."""
        self._say(f"step {steps}")
        return statistics.median(self._answer())

    def close(self) -> None:
        self._say("quit")
        self.process.wait()
        self.words.close()


class Pace:
    """The answering side: holds training before a step until one is asked for, and times it."""

    def __init__(self, method: str) -> None:
        self.about: dict[str, Any] = {"method": method, **_versions()}
        self.asked, self.seconds, self.began = 0, list[float](), 0.0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the tools print goes to standard error

    def begin(self, model: Any) -> None:
        if len(self.seconds) == self.asked:
            self._answer(self.seconds or self.about | _trained(model))
            order, *count = sys.stdin.readline().split() or ["quit"]
            if order == "quit":
                raise SystemExit
            self.asked, self.seconds = int(count[0]), []
        self.began = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def _answer(self, what: Any) -> None:
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "peft", "llamafactory"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _trained(model: Any) -> dict[str, Any]:
    tensors = list(model.parameters())
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "trainable": sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
    }


def bench_model() -> Any:
    """The model of benchmarks/step_time.py."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=BLOCKS, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=WORDS, tie_word_embeddings=False, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# Plain loops: a function makes the model trainable as it should be.


def freeze(blocks: int) -> Callable[[Any], Any]:
    """Only the last blocks train."""

    def prepared(model: Any) -> Any:
        model.requires_grad_(False)
        model.model.layers[-blocks:].requires_grad_(True)
        return model

    return prepared


def peft_freeze(blocks: int) -> Callable[[Any], Any]:
    """The same in PEFT: the last blocks as modules to save; PEFT wants an adapter beside them, here of rank 1 on the head."""

    def prepared(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        whole = [f"layers.{index}" for index in range(BLOCKS - blocks, BLOCKS)]
        return get_peft_model(model, LoraConfig(r=1, target_modules=["lm_head"], modules_to_save=whole))

    return prepared


def peft_lora(blocks: int = BLOCKS) -> Callable[[Any], Any]:
    """LoRA of rank 8 on every linear map of the last blocks."""

    def prepared(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        where = list(range(BLOCKS - blocks, BLOCKS))
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, layers_to_transform=where))

    return prepared


def plain_loop(prepared: Callable[[Any], Any], pace: Pace) -> None:
    import torch

    model = prepared(bench_model()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)
    tokens = torch.randint(3, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    while True:
        pace.begin(model)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pace.end()


# LLaMA-Factory: what `llamafactory-cli train` runs, held at each step by a callback.


def _without_audio() -> None:
    """LLaMA-Factory imports torchaudio, whose wheels load only beside a CUDA torch; a model of text never calls it."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)


def _write_inputs(folder: Path) -> None:
    """A model folder whose tokenizer knows as many words as the model, and 64 batches of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", *(f"w{index}" for index in range(3, WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    bench_model().save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words[3:], k=LENGTH - 1)) + " " for _ in range(64 * BATCH)]  # and one </s>
    (folder / "texts.json").write_text(json.dumps([{"text": text} for text in texts]))
    about = {"texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(about))


def llama_factory(options: dict[str, Any], pace: Pace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"HF_HOME": temporary, "HF_DATASETS_CACHE": temporary, "HF_HUB_OFFLINE": "1"}
        _without_audio()
        _write_inputs(folder)
        from llamafactory.train.tuner import run_exp
        from transformers import TrainerCallback

        class Held(TrainerCallback):
            def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
                pace.begin(model)

            def on_step_end(self, *_: Any, **__: Any) -> None:
                pace.end()

        arguments = {
            "model_name_or_path": str(folder / "model"), "stage": "pt", "do_train": True, **options,
            "dataset": "texts", "dataset_dir": temporary, "cutoff_len": LENGTH, "output_dir": str(folder / "out"),
            "per_device_train_batch_size": BATCH, "max_steps": 1_000_000, "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant", "disable_gradient_checkpointing": True, "use_cpu": True,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        run_exp(arguments, [Held()])


METHODS: dict[str, tuple[Callable[[Any, Pace], None], Any]] = {
    "torch-full": (plain_loop, lambda model: model),
    "torch-freeze-50": (plain_loop, freeze(6)),
    "torch-freeze-75": (plain_loop, freeze(3)),
    "peft-freeze-50": (plain_loop, peft_freeze(6)),
    "peft-freeze-75": (plain_loop, peft_freeze(3)),
    "peft-lora": (plain_loop, peft_lora()),
    "peft-lora-top-50": (plain_loop, peft_lora(6)),
    "peft-lora-top-75": (plain_loop, peft_lora(3)),
    "llamafactory-full": (llama_factory, {"finetuning_type": "full"}),
    "llamafactory-freeze-50": (llama_factory, {"finetuning_type": "freeze", "freeze_trainable_layers": 6}),
    "llamafactory-freeze-75": (llama_factory, {"finetuning_type": "freeze", "freeze_trainable_layers": 3}),
    "llamafactory-lora": (llama_factory, {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}),
}


def main(method: str) -> None:
    if method not in METHODS:
        raise SystemExit(f"no method {method!r}; there are {', '.join(METHODS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    pace = Pace(method)
    import torch

    torch.set_num_threads(1)
    run, setting = METHODS[method]
    run(setting, pace)


if __name__ == "__main__":
    main(sys.argv[1])
