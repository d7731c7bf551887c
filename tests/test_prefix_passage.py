"""A forward pass that starts above the prefix. Oracle: the whole pass of the same model, to the last bit; for what must be refused, a model that
reads more than the states."""

import pytest
import torch
from architectures import EXPECTED
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsfreeze.errors import UserError
from dsfreeze.model import read_anatomy
from dsfreeze.prefix.passage import Passage, Span, cut_of, require_fixed_positions, require_passable, require_suffix

STACKS = [name for name in EXPECTED if name != "t5"]


def built(name):
    torch.manual_seed(0)
    module = EXPECTED[name].build("cpu").eval()
    return module, read_anatomy(module, name)


def batch_of(lengths=(6, 4)):
    """Token ids padded on the right, with their mask."""
    torch.manual_seed(1)
    ids, mask = torch.randint(4, 96, (2, max(lengths))), torch.zeros(2, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, length:], mask[row, :length] = 0, 1
    return {"input_ids": ids, "attention_mask": mask}


def forward_of(module):
    return torch.no_grad()(lambda batch: module(**batch))


def used_blocks(module, anatomy, run):
    """Numbers of the layers that compute something while `run()` goes."""
    seen = []
    handles = []
    for number, layer in enumerate(anatomy.blocks):
        inner = next(
            m
            for m in module.get_submodule(layer.path).modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        )
        handles.append(inner.register_forward_hook(lambda *_, number=number: seen.append(number)))
    run()
    for handle in handles:
        handle.remove()
    return sorted(set(seen))


@pytest.mark.parametrize("name", STACKS)
def test_the_upper_layers_give_the_same_logits_from_the_states(name):
    """Every cut of every architecture; padded positions hold zeros, as the cache leaves them."""
    module, anatomy = built(name)
    passage, forward, batch = Passage(module, anatomy), forward_of(module), batch_of()
    whole = forward(batch).logits
    for cut in range(1, len(anatomy.blocks) + 1):
        with passage.over(Span(keep=cut)) as kept:
            assert torch.equal(forward(batch).logits, whole)
        states = kept.states * batch["attention_mask"].unsqueeze(-1)
        with passage.over(Span(cut, states)):
            found = forward(batch).logits
        real = batch["attention_mask"].bool() if found.ndim == 3 else slice(None)
        assert torch.equal(found[real], whole[real]), cut
    assert torch.equal(forward(batch).logits, whole), "nothing is left behind in the module"


@pytest.mark.parametrize("name", ["llama", "bloom", "bert", "opt"])
def test_what_is_left_out_computes_nothing(name):
    module, anatomy = built(name)
    passage, forward, batch = Passage(module, anatomy), forward_of(module), batch_of()
    module.get_input_embeddings().register_forward_pre_hook(lambda *_: seen.append("embedding"))
    seen = []
    with passage.over(Span(keep=1)) as kept:
        forward(batch)
    width = kept.states
    weights = [p for n, p in module.named_parameters() if n.startswith(anatomy.blocks[0].path + ".")]
    for parameter in (*weights, module.get_input_embeddings().weight):
        parameter.data.fill_(float("nan"))  # whoever reads them is found out
    with passage.over(Span(1, width, keep=2)) as kept:
        if any("lm_head" in alias for t in anatomy.tensors for alias in t.aliases):
            forward(batch)  # the head is the embedding: NaN there
        else:
            assert torch.isfinite(forward(batch).logits).all()
    assert torch.isfinite(kept.states).all()


def test_a_span_runs_its_layers_alone():
    module, anatomy = built("llama")
    passage, forward, batch = Passage(module, anatomy), forward_of(module), batch_of()
    with passage.over(Span(keep=1)) as one:
        forward(batch)
    with passage.over(Span(keep=2)) as two:
        forward(batch)

    def run():
        with passage.over(Span(1, one.states, stop=2, keep=2)) as kept:
            forward(batch)
        assert torch.equal(kept.states, two.states)

    assert used_blocks(module, anatomy, run) == [1]
    assert used_blocks(module, anatomy, lambda: forward(batch)) == [0, 1, 2]


def test_a_pass_that_fails_leaves_the_module_as_it_was():
    module, anatomy = built("llama")
    passage, forward, batch = Passage(module, anatomy), forward_of(module), batch_of()
    whole = forward(batch).logits
    with pytest.raises(RuntimeError, match="midway"), passage.over(Span(1, torch.zeros(2, 6, 32), keep=2)):
        raise RuntimeError("midway")
    assert torch.equal(forward(batch).logits, whole)
    assert not any("forward" in vars(m) or m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("name", STACKS)
def test_every_architecture_passes_the_checks(name):
    module, anatomy = built(name)
    passage, forward, batch = Passage(module, anatomy), forward_of(module), batch_of((6, 6))
    require_passable(passage, forward, batch, 2, torch.float32)
    with passage.over(Span(keep=2)) as kept:
        forward(batch)
    alone = Passage(module, anatomy)  # has never seen a layer of the prefix
    require_suffix(alone, forward, batch, kept.states, 2)
    assert alone.gives_tuple == passage.gives_tuple == (name in ("bloom", "falcon", "deberta-v2"))


class SeesEmbedding(LlamaForCausalLM):
    """Its last layer adds the embedding, as architectures with per-layer embeddings do."""

    def __init__(self, config):
        super().__init__(config)
        last = self.model.layers[-1]
        self.model.embed_tokens.register_forward_hook(lambda _, __, out: setattr(self, "seen", out))
        last.register_forward_hook(lambda _, __, out: out + self.seen)


class KeepsValues(LlamaForCausalLM):
    """Its last layer takes something that the first one has left lying about."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: setattr(self, "values", out))
        self.model.layers[-1].register_forward_hook(lambda _, __, out: out + self.values.mean())


class LossSeesEmbedding(LlamaForCausalLM):
    """Its loss alone reads what the prefix computes, as a mixture's balancing term does."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda _, __, out: setattr(self, "seen", out))

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        if found.loss is not None:
            found.loss = found.loss + self.seen.square().sum()
        return found


def odd(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=96
    )
    module = kind(config).eval()
    return Passage(module, read_anatomy(module, "odd")), forward_of(module)


@pytest.mark.parametrize("kind", [SeesEmbedding, KeepsValues])
def test_a_model_whose_upper_layers_read_more_is_refused(kind):
    passage, forward = odd(kind)
    with passage.over(Span(keep=2)) as kept:
        forward(batch_of((6, 6)))
    if kind is KeepsValues:
        del passage.module.values
    with pytest.raises(UserError, match=rf"{kind.__name__} cannot start above its prefix.*prefix_cache: off"):
        require_suffix(Passage(passage.module, passage.anatomy), forward, batch_of((6, 6)), kept.states, 2)
    with pytest.raises(UserError, match="differs"):
        require_passable(passage, forward, batch_of((6, 6)), 2, torch.float32)


def test_a_loss_that_reads_more_is_refused():
    passage, forward = odd(LossSeesEmbedding)
    batch = batch_of((6, 6))
    require_passable(passage, forward, batch, 2, torch.float32)  # without labels there is nothing to see
    with pytest.raises(UserError, match="differs"):
        require_passable(passage, forward, {**batch, "labels": batch["input_ids"]}, 2, torch.float32)


def test_what_lies_about_is_found_out_though_the_examples_are_the_same():
    passage, forward = odd(KeepsValues)
    one = {name: value[:1] for name, value in batch_of((6, 6)).items()}
    for batch in (one, {name: value.repeat(2, 1) for name, value in one.items()}):
        with pytest.raises(UserError, match="differs"):
            require_passable(passage, forward, batch, 2, torch.float32)


def test_routers_whose_logits_are_in_the_loss_are_refused(monkeypatch):
    module, anatomy = built("mixtral")
    monkeypatch.setattr(module.config, "output_router_logits", True)  # the config is the architecture list's
    with pytest.raises(UserError, match="reads the routers of all layers"):
        Passage(module, anatomy)


def test_states_of_another_precision_are_refused():
    module, anatomy = built("llama")
    with pytest.raises(UserError, match=r"pass on torch.float32 in a run in torch.bfloat16"):
        require_passable(Passage(module, anatomy), forward_of(module), batch_of(), 2, torch.bfloat16)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_batch_are_refused_beyond_the_usual_length(kind):
    passage, _ = odd(LlamaForCausalLM)
    usual = passage.module.config.max_position_embeddings
    require_fixed_positions(passage, 2 * usual)
    passage.module.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": usual}
    require_fixed_positions(passage, usual)
    with pytest.raises(UserError, match=f"{kind}.*at most {usual} would do"):
        require_fixed_positions(passage, usual + 1)


def test_an_encoder_decoder_is_refused_by_name():
    module, anatomy = built("t5")
    with pytest.raises(UserError, match="t5 has two"):
        Passage(module, anatomy)


def test_the_cut_is_the_number_of_layers_below_all_that_trains():
    _, anatomy = built("llama")
    names = {layer.name: [t.name for t in layer.tensors] for layer in anatomy.layers}
    assert cut_of(anatomy, names["layers.2"] + names["head"]) == 2
    assert cut_of(anatomy, names["head"]) == 3
    assert cut_of(anatomy, names["layers.0"]) == 0
    assert cut_of(anatomy, names["embed"] + names["layers.2"]) == 0
