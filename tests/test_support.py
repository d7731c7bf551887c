"""Versions, names and features, on stubs. Oracle: the range and the sentences written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch

from dsfreeze.engine import support
from dsfreeze.errors import UserError


@pytest.mark.parametrize(
    ("version", "served"),
    [("0.19.6", False), ("0.19.7", True), ("0.19.8", True), ("0.19.8+abc", True), ("0.19.9", False),
     ("0.20.0", False)],
)  # fmt: skip
def test_versions(monkeypatch, version, served):
    monkeypatch.setattr(deepspeed, "__version__", version)
    if served:
        support.require_tested_version()
    else:
        with pytest.raises(UserError, match=f"DeepSpeed {version.replace('.', '[.]')} is installed.*pip install"):
            support.require_tested_version()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_missing_name_is_found(stage):
    names = (*support.READ_NAMES[stage], *support.WRAPPER_NAMES[stage])
    on_engine = (*support.ENGINE_NAMES, "param_names", "_configure_zero_optimizer")
    for lost in (*names, *on_engine):
        wrapper = SimpleNamespace(**{name: 0 for name in names if name != lost})
        have = {name: 0 for name in on_engine if name != lost}
        engine = SimpleNamespace(optimizer=wrapper, zero_optimization_stage=lambda: stage, **have)
        assert [*support.unreadable_names(engine), *support.missing_names(engine)] == [lost]


def test_an_optimizer_is_refused_by_its_name():
    zero = SimpleNamespace(offload_optimizer=None, offload_param=None, zero_hpz_partition_size=1)
    basic = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    engine = SimpleNamespace(
        basic_optimizer=basic, optimizer=basic, mpu=None, dp_world_size=1, _config=SimpleNamespace(zero_config=zero)
    )
    checks = [c for c in support.UNSUPPORTED if "optimizer {optimizer}" in c[1]]
    assert [check(engine) for check, *_ in checks] == [True]
    assert "Adagrad is not supported" in f"{checks[0][1].format(optimizer=type(basic).__name__)} is not supported"
