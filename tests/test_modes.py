"""What evaluates and what trains inside one forward pass, in models whose dropouts stand in different places."""

from __future__ import annotations

import pytest
import torch
from tiny import examples, llama_anatomy, phase_of, recipe_of, tiny_llama
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.modes import Modes
from dsfreeze.errors import UserError
from dsfreeze.model import read_anatomy
from dsfreeze.plan import Phase
from dsfreeze.recipe import Recipe


def bert():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, num_labels=3))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))


def t5():
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


BATCH = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def enter(model, layers, labels, **train):
    anatomy = read_anatomy(model, "tiny")
    names = [t.name for layer in anatomy.layers if layer.name in layers for t in layer.tensors]
    recipe = Recipe.model_validate({"model": "tiny", "zero": "local", "train": train})
    engine = LocalEngine(model, anatomy, recipe)
    engine.enter(Phase(0, None, anatomy.in_order(names)))
    return engine, {**BATCH, "labels": labels}


def modes_while_training(engine, batch):
    """For every module, whether it was training each time it was called."""
    seen: dict[str, list[bool]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, _, name=name: seen.setdefault(name, []).append(m.training))
        for name, module in engine.module.named_modules()
    ]
    engine.forward_backward(batch, 1.0)
    for handle in handles:
        handle.remove()
    return seen


def test_bert_drops_nothing_in_the_prefix_and_something_before_the_classifier():
    engine, batch = enter(bert(), ["layers.2", "head"], torch.tensor([0, 2]))
    seen = modes_while_training(engine, batch)
    assert seen["bert.embeddings.dropout"] == [False]
    assert seen["bert.encoder.layer.1.output.dropout"] == [False]
    assert seen["bert.encoder.layer.2.output.dropout"] == [True]
    assert seen["dropout"] == [True]


def test_gpt2_embedding_dropout_belongs_to_the_prefix():
    engine, batch = enter(gpt2(), ["layers.1", "layers.2", "norm"], BATCH["input_ids"])
    seen = modes_while_training(engine, batch)
    assert seen["transformer.drop"] == [False]
    assert seen["transformer.h.0.mlp.dropout"] == [False]
    assert seen["transformer.h.1.mlp.dropout"] == [True]


def test_t5_stack_dropout_is_off_below_and_on_above():
    """The encoder uses one dropout module on its input and on its output: off the first time, on the second."""
    engine, batch = enter(t5(), ["layers.1", "layers.2", "layers.3"], BATCH["input_ids"])
    seen = modes_while_training(engine, batch)
    assert seen["encoder.dropout"] == [False, True]
    assert seen["decoder.dropout"] == [True, True]
    assert seen["encoder.block.0.layer.1.dropout"] == [False]


def test_without_a_prefix_everything_trains():
    engine, batch = enter(bert(), ["embed", "layers.2"], torch.tensor([0, 2]))
    assert all(all(flags) for flags in modes_while_training(engine, batch).values())


def test_what_leaves_the_prefix_depends_on_the_input_alone():
    """Oracle: two forward passes under dropout; block 1 of 3 gives the same bits twice, block 2 does not."""
    engine, batch = enter(bert(), ["layers.2", "head"], torch.tensor([0, 2]))
    outputs = {1: [], 2: []}
    for index, kept in outputs.items():
        block = engine.module.bert.encoder.layer[index]
        block.register_forward_hook(lambda m, a, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o))
    for _ in range(2):
        engine.forward_backward(batch, 1.0)
    assert torch.equal(*outputs[1])
    assert not torch.equal(*outputs[2])


def test_close_takes_everything_away_again():
    engine, batch = enter(gpt2(), ["layers.2"], BATCH["input_ids"], gradient_checkpointing=True)
    blocks = engine.module.transformer.h
    assert [b.gradient_checkpointing for b in blocks] == [False, False, True]
    engine.close()
    assert [b.gradient_checkpointing for b in blocks] == [False, False, False]
    assert not blocks[1]._forward_hooks
    engine.module.train()
    assert engine.module(**batch).loss.requires_grad


def test_blocks_that_cannot_recompute_are_named(monkeypatch):
    model = bert()
    anatomy = read_anatomy(model, "tiny")
    monkeypatch.delattr("transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing")
    with pytest.raises(UserError, match=r"BertLayer .*gradient_checkpointing=false"):
        Modes(model, anatomy, [anatomy.layer("layers.2").tensors[0].name], checkpointing=True)


def saved_by_block(engine, batch):
    """Bytes that forward keeps for backward, each once and without the weights: by the block that keeps them, and in all."""
    seen = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    blocks = engine.module.model.layers
    kept, current = [0] * (len(blocks) + 1), [len(blocks)]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: current.__setitem__(0, index))
        block.register_forward_hook(lambda *_: current.__setitem__(0, len(blocks)))

    def pack(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[current[0]] += storage.nbytes()
        return tensor

    engine._modes.train()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.module(**batch, use_cache=False)
    return kept[:-1], sum(kept)


def lm8(layers, **train):
    """The reference model of the measurements below: 8 layers, 128 wide, and a batch of 4 x 128 tokens."""
    model = tiny_llama(layers=8, hidden=128, vocab=64)
    anatomy = llama_anatomy(model)
    engine = LocalEngine(model, anatomy, recipe_of("local", **train))
    engine.enter(phase_of(anatomy, [f"layers.{index}" for index in layers]))
    return engine, examples(0, count=4, length=128, vocab=64)


@pytest.mark.parametrize("lowest", [0, 3, 6])
def test_nothing_is_saved_below_the_lowest_trainable_layer(lowest):
    """Oracle: what autograd itself packs, block by block; every block above keeps something, frozen or not."""
    by_block, _ = saved_by_block(*lm8([lowest, lowest + 1]))
    assert [kept > 0 for kept in by_block] == [index >= lowest for index in range(8)]


@pytest.mark.parametrize(
    ("layers", "plain", "checkpointed"), [((6, 7), 9.18, 0.88), ((3, 4), 18.22, 1.63), ((0, 1), 27.25, 2.38)]
)
def test_checkpointing_from_the_lowest_trainable_layer_up_keeps_little(layers, plain, checkpointed):
    """Oracle: MiB measured apart from this code, by the same hooks. Checkpointing the trainable layers alone, as others
    do, keeps 9.95 for layers 3-4 and 18.98 for 0-1: low layers then run out of memory where high ones do not."""
    for checkpointing, expected in ((False, plain), (True, checkpointed)):
        _, total = saved_by_block(*lm8(layers, gradient_checkpointing=checkpointing))
        assert total / 2**20 == pytest.approx(expected, rel=0.01)
