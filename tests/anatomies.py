"""Small anatomies made by hand for tests, named and shaped as transformers names and shapes these families."""

from __future__ import annotations

from collections.abc import Iterable

from dsfreeze.anatomy import Anatomy, Layer, Tensor


def matrix(name: str, rows: int, columns: int, category: str, **extra) -> Tensor:
    return Tensor(f"{name}.weight", (rows, columns), category, 2 * rows * columns, **extra)


def gain(name: str, size: int, *, bias: bool = False) -> list[Tensor]:
    return [Tensor(f"{name}.weight", (size,), "norm")] + ([Tensor(f"{name}.bias", (size,), "bias")] if bias else [])


def bias(name: str, size: int) -> Tensor:
    return Tensor(f"{name}.bias", (size,), "bias")


def linear(name: str, rows: int, columns: int, category: str) -> list[Tensor]:
    return [matrix(name, rows, columns, category), bias(name, rows)]


def embedding(name: str, rows: int, columns: int, tied_to: Iterable[str] = ()) -> Tensor:
    aliases = tuple(tied_to)
    does_products = any("lm_head" in alias or "decoder.weight" in alias for alias in aliases)
    return Tensor(name, (rows, columns), "embed", 2 * rows * columns if does_products else 0, aliases)


def llama(
    depth: int = 4, d: int = 8, vocab: int = 32, *, tied: bool = False, labels: int = 0, mlp: int = 4,
    qkv_bias: bool = False, kv: int | None = None,
) -> Anatomy:  # fmt: skip
    """Llama (Qwen2 with `qkv_bias`): `labels` > 0 gives it a classification head instead of the language model's."""
    blocks = []
    for i in range(depth):
        path = f"model.layers.{i}"
        tensors = []
        for category, rows in (("q", d), ("k", kv or d), ("v", kv or d)):
            tensors.append(matrix(f"{path}.self_attn.{category}_proj", rows, d, category))
            tensors += [bias(f"{path}.self_attn.{category}_proj", rows)] if qkv_bias else []
        tensors.append(matrix(f"{path}.self_attn.o_proj", d, d, "o"))
        tensors += [matrix(f"{path}.mlp.{c}_proj", mlp * d, d, c) for c in ("gate", "up")]
        tensors.append(matrix(f"{path}.mlp.down_proj", d, mlp * d, "down"))
        tensors += gain(f"{path}.input_layernorm", d) + gain(f"{path}.post_attention_layernorm", d)
        blocks.append(Layer(f"layers.{i}", tuple(tensors), path))
    embed = embedding("model.embed_tokens.weight", vocab, d, ["lm_head.weight"] if tied and not labels else [])
    layers = [Layer("embed", (embed,)), *blocks, Layer("norm", tuple(gain("model.norm", d)))]
    if labels:
        layers.append(Layer("head", (matrix("score", labels, d, "head"),)))
    elif not tied:
        layers.append(Layer("head", (matrix("lm_head", vocab, d, "head"),)))
    return Anatomy("tiny-llama", "llama", tuple(layers), d, d, vocab)


def gpt2(depth: int = 4, d: int = 8, vocab: int = 32) -> Anatomy:
    """GPT-2: fused c_attn, matrices stored (in, out), tied head, biases everywhere."""
    blocks = []
    for i in range(depth):
        path = f"transformer.h.{i}"
        conv = [("attn.c_attn", 3 * d, d, "qkv"), ("attn.c_proj", d, d, "o")]
        mlp = [("mlp.c_fc", 4 * d, d, "up"), ("mlp.c_proj", d, 4 * d, "down")]
        tensors = gain(f"{path}.ln_1", d, bias=True)
        parts = {"qkv": (("q", d), ("k", d), ("v", d))}
        for name, rows, columns, category in conv:
            own = parts.get(category, ())
            tensors += [matrix(f"{path}.{name}", columns, rows, category, fan_in_fan_out=True, parts=own)]
            tensors += [bias(f"{path}.{name}", rows)]
        tensors += gain(f"{path}.ln_2", d, bias=True)
        for name, rows, columns, category in mlp:
            tensors += [matrix(f"{path}.{name}", columns, rows, category, fan_in_fan_out=True)]
            tensors += [bias(f"{path}.{name}", rows)]
        blocks.append(Layer(f"layers.{i}", tuple(tensors), path))
    words = embedding("transformer.wte.weight", vocab, d, ["lm_head.weight"])
    embed = (words, embedding("transformer.wpe.weight", 16, d))
    norm = Layer("norm", tuple(gain("transformer.ln_f", d, bias=True)))
    return Anatomy("tiny-gpt2", "gpt2", (Layer("embed", embed), *blocks, norm), d, d, vocab)


def phi3(depth: int = 4, d: int = 8, vocab: int = 32, *, kv: int | None = None) -> Anatomy:
    """Phi-3: fused qkv_proj and gate_up_proj, untied head."""
    kv = kv or d
    parts = (("q", d), ("k", kv), ("v", kv)), (("gate", 4 * d), ("up", 4 * d))
    blocks = []
    for i in range(depth):
        path = f"model.layers.{i}"
        tensors = [
            matrix(f"{path}.self_attn.o_proj", d, d, "o"),
            matrix(f"{path}.self_attn.qkv_proj", d + 2 * kv, d, "qkv", parts=parts[0]),
            matrix(f"{path}.mlp.gate_up_proj", 8 * d, d, "gate_up", parts=parts[1]),
            matrix(f"{path}.mlp.down_proj", d, 4 * d, "down"),
            *gain(f"{path}.input_layernorm", d),
            *gain(f"{path}.post_attention_layernorm", d),
        ]
        blocks.append(Layer(f"layers.{i}", tuple(tensors), path))
    ends = (Layer("norm", tuple(gain("model.norm", d))), Layer("head", (matrix("lm_head", vocab, d, "head"),)))
    embed = Layer("embed", (embedding("model.embed_tokens.weight", vocab, d),))
    return Anatomy("tiny-phi3", "phi3", (embed, *blocks, *ends), d, d, vocab)


def bert(depth: int = 4, d: int = 8, vocab: int = 32, labels: int = 3) -> Anatomy:
    """BERT for sequence classification: post-norm, no final norm, a pooler before the classifier."""
    blocks = []
    for i in range(depth):
        path = f"bert.encoder.layer.{i}"
        tensors: list[Tensor] = []
        for name, category in (("query", "q"), ("key", "k"), ("value", "v")):
            tensors += linear(f"{path}.attention.self.{name}", d, d, category)
        tensors += linear(f"{path}.attention.output.dense", d, d, "o")
        tensors += gain(f"{path}.attention.output.LayerNorm", d, bias=True)
        tensors += linear(f"{path}.intermediate.dense", 4 * d, d, "up")
        tensors += linear(f"{path}.output.dense", d, 4 * d, "down")
        tensors += gain(f"{path}.output.LayerNorm", d, bias=True)
        blocks.append(Layer(f"layers.{i}", tuple(tensors), path))
    names = (("word", vocab), ("position", 16), ("token_type", 2))
    embed = [embedding(f"bert.embeddings.{name}_embeddings.weight", rows, d) for name, rows in names]
    embed += gain("bert.embeddings.LayerNorm", d, bias=True)
    head = linear("bert.pooler.dense", d, d, "head") + linear("classifier", labels, d, "head")
    layers = (Layer("embed", tuple(embed)), *blocks, Layer("head", tuple(head)))
    return Anatomy("tiny-bert", "bert", layers, d, d, vocab)


def t5(depth: int = 2, d: int = 8, vocab: int = 32, *, tied: bool = True) -> Anatomy:
    """T5: `depth` encoder layers, then `depth` decoder layers with cross-attention, numbered on; the encoder's
    final norm belongs to its last layer."""
    blocks = []
    for stack in ("encoder", "decoder"):
        for i in range(depth):
            path, tensors = f"{stack}.block.{i}", []
            parts = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
            for number, part in enumerate(parts):
                tensors += [matrix(f"{path}.layer.{number}.{part}.{c}", d, d, c) for c in ("q", "k", "v", "o")]
                tensors += gain(f"{path}.layer.{number}.layer_norm", d)
            last = f"{path}.layer.{len(parts)}"
            tensors += [matrix(f"{last}.DenseReluDense.wi", 4 * d, d, "up")]
            tensors += [matrix(f"{last}.DenseReluDense.wo", d, 4 * d, "down"), *gain(f"{last}.layer_norm", d)]
            if (stack, i) == ("encoder", depth - 1):
                tensors += gain("encoder.final_layer_norm", d)
            blocks.append(Layer(f"layers.{len(blocks)}", tuple(tensors), path, stack))
    aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    embed = Layer("embed", (embedding("shared.weight", vocab, d, aliases),))
    norm = Layer("norm", tuple(gain("decoder.final_layer_norm", d)))
    head = [] if tied else [Layer("head", (matrix("lm_head", vocab, d, "head"),))]
    return Anatomy("tiny-t5", "t5", (embed, *blocks, norm, *head), d, d, vocab)


def everything() -> dict[str, Anatomy]:
    """One of each kind that strategies must get right."""
    return {
        "llama": llama(), "llama-tied": llama(tied=True), "llama-classifier": llama(labels=3),
        "qwen2": llama(qkv_bias=True, kv=4), "deep": llama(depth=12), "gpt2": gpt2(), "phi3": phi3(),
        "bert": bert(), "t5": t5(), "t5-untied": t5(tied=False),
    }  # fmt: skip
