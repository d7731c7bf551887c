"""Parcels and names, in one process. Oracles: the tensors that went in; rules written out by hand."""

from __future__ import annotations

import pytest
import torch

from dsfreeze.engine.flats import Range, Slot, whole
from dsfreeze.engine.parcels import Parcel, blank, blank_rest, park, put_back, spread
from dsfreeze.engine.refreeze import Ledger, layer_of


def parcel(*names, state=True, has_master=True, live=True):
    slots = tuple(Slot(name, (2, 2), 4 * n) for n, name in enumerate(names))
    tensor = torch.arange(4.0 * len(names))
    entry = {"step": torch.tensor(7.0), "exp_avg": tensor + 100, "exp_avg_sq": tensor + 200} if state else {}
    return Parcel(Range(tensor, slots, 0, 1), entry, has_master, live)


@pytest.mark.parametrize(
    ("rule", "drop", "kinds"),
    [("keep", False, {"master", "exp_avg", "exp_avg_sq"}), ("offload", False, {"master", "exp_avg", "exp_avg_sq"}),
     ("clear", False, {"master"}), ("clear", True, None)],
)  # fmt: skip
def test_what_a_tensor_takes_along(rule, drop, kinds):
    live = parcel("a")
    parked = park(live, rule, drop_master=drop)
    assert (parked and set(parked.shares())) == kinds
    if parked:
        assert (parked.step, parked.live) == (None if rule == "clear" else 7.0, False)
        for kind, share in parked.shares().items():
            assert torch.equal(share, live.shares()[kind])
            assert (share.data_ptr() == live.shares()[kind].data_ptr()) == (rule == "keep")  # moved, not copied


def test_in_fp32_moments_alone_are_parked():
    assert set(park(parcel("a", has_master=False), "keep", drop_master=False).shares()) == {"exp_avg", "exp_avg_sq"}
    assert park(parcel("a", has_master=False), "clear", drop_master=False) is None


def test_what_is_parked_stays_as_it_is():
    parked = parcel("a", live=False)
    assert park(parked, "clear", drop_master=True) is parked


def test_spread_and_put_back():
    """Tensors of two parcels are regrouped by name, and the rest of a cut parcel keeps its own."""
    sources = [parcel("a", "b"), parcel("c")]
    flat = Range(torch.zeros(8), (Slot("c", (2, 2), 0), Slot("b", (2, 2), 4)), 0, 1)
    target, rest = blank(flat, sources[0]), blank_rest(sources[0], {"a"})
    spread(sources, [target, rest], torch.device("cpu"))
    assert target.shares()["exp_avg"].tolist() == [100, 101, 102, 103, 104, 105, 106, 107]
    assert rest.shares()["exp_avg_sq"].tolist() == [200, 201, 202, 203]
    assert (rest.flat.names, rest.step, rest.live) == (("a",), 7.0, True)
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.AdamW([weight])
    put_back(target, Range(weight, flat.slots, 0, 1), optimizer)
    assert weight.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert optimizer.state[weight]["exp_avg"] is target.state["exp_avg"]


def test_the_rest_of_a_parcel_that_holds_nothing():
    """In fp32, before the first step, there is neither master nor moments."""
    rest = blank_rest(parcel("a", "b", state=False, has_master=False), {"b"})
    assert rest.shares() == {}
    assert park(rest, "keep", drop_master=False) is None


def test_step_counts():
    tensor = torch.zeros(4)
    assert Parcel(whole("a", tensor)).step is None
    assert Parcel(whole("a", tensor), {"momentum_buffer": tensor}).step == 0.0  # SGD: not the same as no state


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.10.mlp.up.weight", "model.layers.10"), ("0.weight", "0"), ("lm_head.weight", "lm_head"),
     ("model.norm.weight", "model.norm"), ("gate", ""), ("h.3.experts.5.w1", "h.3"), ("block2.weight", "block2")],
)  # fmt: skip
def test_layers_by_name(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "model"),
    [("h.1.w", "h.1.w"), ("h.2.w", "h.1.w"), ("h.2.bias", "h.1.bias"), ("3.weight", "0.weight"), ("gain", "h.1.bias")],
)
def test_whose_settings_a_new_tensor_has(name, model):
    dims = {"0.weight": 2, "h.1.w": 2, "h.1.bias": 1, "h.2.w": 2, "h.2.bias": 1, "3.weight": 2, "gain": 1}
    ledger = Ledger(settings={n: {"lr": 1.0} for n in ("0.weight", "h.1.w", "h.1.bias")}, dims=dims)
    assert ledger.model_of(name) == model
