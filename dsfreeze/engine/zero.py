"""DeepSpeed ZeRO, stages 0 to 3, in bf16 or fp32, optimizer on the device or offloaded to the CPU.

What this file knows of DeepSpeed 0.19.8 and works around:
- Gradients are averaged over ranks and divided by the accumulation steps; ours are sums, so losses are scaled back.
- Stage 0 in bf16 takes a trial step while it is built; it runs at learning rate 0 and its state is dropped.
- Stage 0 in fp32 steps the bare optimizer and reports no gradient norm.
- A gradient that is not finite is applied in bf16 at stages 1 and 2 where a check is off; it is switched on, so that
  no stage takes such a step: `step` returns inf then.
- Stage 1 in bf16 with fp32 accumulation keeps a full fp32 gradient for ever (BF16_Optimizer); it is refused.
- `safe_get_full_*` fails in every group but the first (stages 1, 2) and GatheredParameters may read before a step's
  all-gather has ended (stage 3): state is read from the shards themselves.
- `engine.destroy` leaves its hooks on the module (#7204); `close` removes them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import Piece, TensorState, whereabouts
from dsfreeze.engine.base import BaseEngine
from dsfreeze.engine.flats import Flat, Pieces, Range, Slot, lay_out
from dsfreeze.engine.gradients import gradient_shares, gradient_views, renew_norms
from dsfreeze.engine.groups import make_adamw, settings_of
from dsfreeze.engine.layout import flats_of, gradient_buffers
from dsfreeze.engine.parcels import Parcel
from dsfreeze.engine.process import agree, import_deepspeed
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.engine.rebuild import close, quiet
from dsfreeze.engine.refreeze import ledger_of, refreeze, regroup
from dsfreeze.engine.support import require_tested_version, unsupported
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe


class ZeroEngine(BaseEngine):
    """One rank of a DeepSpeed run; `config` is the whole DeepSpeed configuration. Needs the process group."""

    def __init__(
        self, module: nn.Module, anatomy: Anatomy, recipe: Recipe, config: dict[str, Any], **rule: Any
    ) -> None:
        ranks = read_ranks()
        self.rank, self.world_size, self.config = ranks.rank, ranks.world_size, config
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        waiting = torch.device("cpu") if self.stage == 3 else ranks.device
        super().__init__(module, anatomy, recipe, ranks.device, weights_on=waiting, **rule)
        self.accumulation = recipe.train.gradient_accumulation_steps
        self._micro_steps = 0
        self.engine: Any = None

    # -- building ----------------------------------------------------------------------------------------------

    def _build(self) -> list[Flat]:
        self._refuse_full_gradients()
        require_tested_version()
        self.optimizer = make_adamw(self.groups, self._named, self.recipe.train)
        deepspeed = import_deepspeed()
        if self.stage == 3:  # cut up parameter by parameter, straight from the host: no device ever holds the whole
            deepspeed.zero.Init(module=self.module, config_dict_or_path=self.config)
        self.engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        whereabouts.limit(self.recipe.train.ddp_timeout)
        self._refuse_other_steps()
        if self.stage == 0:
            self.optimizer.state.clear()
        elif self.stage < 3:
            self.engine.optimizer.check_grad_overflow = True
        return flats_of(self.engine, self.rank, self.world_size)

    def spread(self) -> None:
        """At stage 3 hold a share of each weight, without an optimizer, for passes that train nothing; else the whole."""
        if self.stage < 3:
            return
        require_tested_version()
        deepspeed = import_deepspeed()
        deepspeed.zero.Init(module=self.module, config_dict_or_path=self.config)
        self.engine, *_ = deepspeed.initialize(model=self.module, config=self.config, dist_init_required=False)
        whereabouts.limit(self.recipe.train.ddp_timeout)

    def _refreeze(self, names: tuple[str, ...]) -> None:
        settings = {name: settings_of(group) for group in self.groups for name in group.tensors}
        self.engine = refreeze(self.engine, names, self.rule, drop_master=self.drop_master, settings=settings)
        self._take_over()

    def _take_over(self) -> None:
        self.optimizer = self.engine.basic_optimizer
        self.flats = flats_of(self.engine, self.rank, self.world_size)

    def _prepare_groups(self, steps: Mapping[str, float | None]) -> None:
        if any(len({steps[name] for name in flat.names}) > 1 for flat in self.flats):
            self.engine = regroup(self.engine, steps)
            self._take_over()

    def _parked(self) -> list[Parcel]:
        return ledger_of(self.engine).parked if self.engine else []

    def _park(self, state: Mapping[str, TensorState]) -> None:
        ledger_of(self.engine).parked = self._sharded_parcels(state) if self.stage else self._whole_parcels(state)

    def _sharded_parcels(self, state: Mapping[str, TensorState]) -> list[Parcel]:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, entry in state.items():
            if set(entry) - {"weight"}:
                step = float(entry["step"]) if "step" in entry else None
                groups.setdefault((self.anatomy.layer_of[name].name, step, *sorted(entry)), []).append(name)
        kind = Pieces if self.stage == 3 else Range
        parcels = []
        for names in groups.values():
            slots = [Slot(name, self._place(name)[1], 0) for name in names]
            flat = lay_out(kind, slots, self.rank, self.world_size, self._place(names[0])[0])
            parcels.append(self._parcel_of(flat, state))
        return parcels

    def _gradient_shares(self) -> list[torch.Tensor]:
        return gradient_shares(self.engine)

    def _gradient_views(self) -> list[list[torch.Tensor]]:
        return gradient_views(self.engine)

    def _renew_norms(self) -> None:
        renew_norms(self.engine)

    def _drop(self, pieces: list[Piece]) -> None:
        with quiet(logging.ERROR):  # it warns of every step that it does not take
            super()._drop(pieces)

    def _refuse_full_gradients(self) -> None:
        assert self.config is not None, "DeepSpeed has a configuration"
        accumulates = self.config.get("data_types", {}).get("grad_accum_dtype")
        if self.stage == 1 and self.dtype == torch.bfloat16 and accumulates in ("fp32", "float32"):
            raise UserError(
                "data_types.grad_accum_dtype: fp32 at stage 1 in bf16 makes DeepSpeed keep a full fp32 gradient of "
                "every trained tensor on every rank. Use stage 2, which shards it, or drop the key."
            )

    def _refuse_other_steps(self) -> None:
        """Elements are held back around the steps of one torch optimizer over tensors that we know."""
        refused = next(unsupported(self.engine), None) if self.holding.masks else None
        if refused:
            raise UserError(f"{refused}. A plan with masks of elements needs what refreeze needs.")

    # -- training ----------------------------------------------------------------------------------------------

    def _forward(self, **batch: Any) -> Any:
        return self.engine(**batch)

    def _backward(self, loss: torch.Tensor) -> None:
        assert self._micro_steps < self.accumulation, "step after gradient_accumulation_steps calls"
        self._micro_steps += 1
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if self._micro_steps < self.accumulation:
            self.engine.step()  # counts the micro-step, updates nothing

    def _update(self) -> float:
        assert self._micro_steps == self.accumulation, "step after gradient_accumulation_steps calls, no fewer"
        self._micro_steps = 0
        if self.stage == 0 and self.dtype == torch.float32:
            norm = self._bare_step()
        else:
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm())
        return norm if math.isfinite(norm) else math.inf

    def _bare_step(self) -> float:
        """A step at stage 0 in fp32, where gradients are whole; they are dropped when the norm, which is returned, is not finite."""
        norm = float(get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        if not math.isfinite(norm):
            self.engine.zero_grad()
            self.engine.clip_fp32_gradients = lambda: None  # which fails where there is no gradient
        self.engine.step()
        self.engine.__dict__.pop("clip_fp32_gradients", None)
        return norm

    def _generate_options(self) -> dict[str, Any]:
        # at stage 3 every forward is collective: ranks must generate equally long
        return {"synced_gpus": True} if self.stage == 3 and self.world_size > 1 else {}

    # -- ranks -------------------------------------------------------------------------------------------------

    def sum(self, values: list[float]) -> list[float]:
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        # added in rank order, so that every rank gets the same bits
        return torch.stack(everyone).cpu().cumsum(0)[-1].tolist()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def _agree(self, value: str, what: str) -> None:
        agree(value, what)

    def _collect(self, share: torch.Tensor, world_size: int) -> list[torch.Tensor]:
        if world_size == 1:
            return [share.reshape(-1).cpu()] if self.rank == 0 else []
        # offloaded shares travel by way of the device: NCCL carries nothing else
        mine = share.reshape(-1).to(self.device).contiguous()
        shares = [torch.empty_like(mine) for _ in range(world_size)] if self.rank == 0 else None
        dist.gather(mine, shares)
        return [s.cpu() for s in shares or ()]

    # -- weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        if not self._sharded:
            return super().export_weights(names)
        weights = {}
        for name in names:
            parameter = self._named[name]
            shares = self._collect(_share(parameter).data, self.world_size)
            if shares:
                weights[name] = _joined(shares, parameter).clone()
        return weights

    def whole_weight(self, name: str) -> torch.Tensor:
        if not self._sharded:
            return super().whole_weight(name)
        parameter = self._named[name]
        mine = _share(parameter).data.reshape(-1).to(self.device)
        shares = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(shares, mine)
        return _joined(shares, parameter)

    def join(self, name: str, first: int, mine: torch.Tensor | None) -> torch.Tensor:
        if self.stage == 0 or self.world_size == 1:
            return super().join(name, first, mine)
        full = torch.zeros(self.anatomy.by_name[name].numel, device=self.device)
        if mine is not None:
            full[first : first + mine.numel()] = mine
        dist.all_reduce(full)
        return full

    def write_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        if not self._sharded:
            super().write_weights(weights)
            return
        for name, value in weights.items():
            parameter, share = self._named[name], _share(self._named[name])
            size = share.numel()
            piece = value.reshape(-1)[self.rank * size : (self.rank + 1) * size]
            share.data.reshape(-1)[: len(piece)].copy_(piece)
            if _is_gathered(parameter):
                parameter.data.copy_(value.view(parameter.data.shape))

    @property
    def _sharded(self) -> bool:
        return self.stage == 3 and self.engine is not None

    def _held(self, parameter: nn.Parameter) -> torch.Tensor:
        return _share(parameter).data if self._sharded else parameter.data

    def _first_held(self, parameter: nn.Parameter) -> int:
        return self.rank * _share(parameter).numel() if self._sharded else 0

    def _copies(self, parameter: nn.Parameter) -> Iterable[torch.Tensor]:
        if not self._sharded:
            return (parameter.data,)
        share = _share(parameter)
        return (share, parameter.data) if _is_gathered(parameter) else (share,)

    def _gradient_buffers(self) -> Iterable[torch.Tensor | None]:
        return gradient_buffers(self.engine) if self.engine else ()

    def close(self) -> None:
        super().close()
        if self.engine is not None:
            close(self.engine)
            self.engine = None


def _share(parameter: Any) -> torch.Tensor:
    """This rank's share of a weight of stage 3."""
    share: torch.Tensor = parameter.ds_tensor
    return share


def _is_gathered(parameter: Any) -> bool:
    """Whether the whole weight is here too: it is small enough to stay."""
    return bool(parameter.data.numel() == parameter.ds_numel)


def _joined(shares: list[torch.Tensor], parameter: Any) -> torch.Tensor:
    """A weight of stage 3 from the ranks' shares, of which the last is padded."""
    return torch.cat(shares)[: parameter.ds_numel].view(parameter.ds_shape)
