"""The table of devices: invariants and closed forms, since a copy of the datasheets would prove nothing."""

from __future__ import annotations

import pytest

from dsfreeze.errors import UserError
from dsfreeze.hardware import DEVICES, FIGURES, find_device

GPUS = [device for name, device in DEVICES.items() if name != "cpu"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_figure_has_a_source_and_is_possible(device):
    """Oracle: what holds of any device: fp32 is no faster than bf16, a wire no faster than the memory at its end."""
    assert set(device.sources) == set(FIGURES)
    assert all(getattr(device, figure) > 0 and device.sources[figure] for figure in FIGURES)
    assert device.fp32_flops <= device.bf16_flops
    assert device.network_bandwidth <= device.link_bandwidth <= device.memory_bandwidth
    assert device.storage_bandwidth <= device.host_bandwidth <= device.memory_bandwidth
    assert (device.flops(2), device.flops(4)) == (device.bf16_flops, device.fp32_flops)


@pytest.mark.parametrize("device", GPUS, ids=[device.name for device in GPUS])
def test_a_gpu_computes_about_200_times_for_every_byte_it_reads(device):
    """Oracle: the balance of every GPU since 2020; a unit that slipped (GB for TB, Gb for GB, sparse for dense) does not pass."""
    assert 100 < device.bf16_flops / device.memory_bandwidth < 450
    assert 10e9 * 0.9 < device.memory / 2 < 110e9
    assert "sparsity" not in device.sources["bf16_flops"] or "halved" in device.sources["bf16_flops"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_ring_goes_as_fast_as_its_slowest_part(device):
    """Oracle: by hand. Within a node the link; over nodes also the cards: one for a lone rank, all of a full node's."""
    link, card, node = device.link_bandwidth, device.network_bandwidth, device.per_node
    assert {device.ring_bandwidth(ranks) for ranks in range(1, node + 1)} == {link}
    assert device.ring_bandwidth(node + 1) == min(link, card)
    assert device.ring_bandwidth(2 * node) == device.ring_bandwidth(4 * node) == min(link, node * card)


@pytest.mark.parametrize(
    ("name", "found"),
    [("h100", "h100"), ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("L40S", "l40s"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("nvidia geforce rtx 4090", "rtx4090"), ("RTX 4090", "rtx4090"),
     ("AMD Instinct MI300X", "mi300x"), ("CPU", "cpu")],
)  # fmt: skip
def test_names(name, found):
    assert find_device(name) is DEVICES[found]


@pytest.mark.parametrize(
    ("name", "near"),
    [("h20", "h200"), ("a10", "a100"), ("NVIDIA H100 PCIe", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("", ""),
     ("NVIDIA GeForce RTX 4090 D", "rtx4090"), ("NVIDIA", ""), ("mi300", "mi300x")],
)  # fmt: skip
def test_an_unknown_device_is_never_another(name, near):
    """Oracle: UserError with the valid names; the devices here are slower or smaller than those they resemble."""
    with pytest.raises(UserError, match="There is no device") as caught:
        find_device(name)
    assert all(valid in str(caught.value) for valid in DEVICES)
    assert not near or f"'{near}'" in str(caught.value)


def test_no_two_devices_share_a_name():
    owners = {}
    for device in DEVICES.values():
        for spelling in (device.name, *device.spellings):
            owners.setdefault("".join(filter(str.isalnum, spelling.casefold())), set()).add(device.name)
    assert all(len(names) == 1 for names in owners.values())
