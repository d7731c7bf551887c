"""Change what trains on a live DeepSpeed engine, in place, without losing a moment of Adam.

    engine, *_ = deepspeed.initialize(...)
    engine = dsfreeze.refreeze(engine, [n for n, _ in model.named_parameters() if "layers.3." in n], state="offload")

A requires_grad flag flipped after `initialize` does nothing right: thawed tensors never learn (deepspeedai/DeepSpeed #1767,
#5639), frozen ones keep drifting on momentum and weight decay, and no memory is freed. Works at ZeRO 0-3, in bf16 and
fp32, with the optimizer on the device or on the CPU, and needs nothing else of dsfreeze.

Groups: one per layer, set of hyper-parameters and Adam step count. A flat group has a single step count, so a thawed
tensor may only join those that have made as many steps; and a layer's shard then depends on nothing but the layer and
the number of ranks, so that it stays where it is while others come and go.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch.distributed as dist

from dsfreeze.engine.layout import flats_of, group_numbers, holds_gradients
from dsfreeze.engine.parcels import Parcel, blank, blank_rest, park, put_back, spread
from dsfreeze.engine.ranks import device_of, read_ranks
from dsfreeze.engine.rebuild import read_masters, rebuild_anew, rebuild_in_place, write_masters
from dsfreeze.engine.schedulers import follow_groups
from dsfreeze.engine.support import (
    TESTED,
    is_rounded,
    missing_names,
    require_tested_version,
    unreadable_names,
    unsupported,
)
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import StateRule

#: auto: in place, or anew where DeepSpeed lacks a name that in place needs.
Method = Literal["auto", "in_place", "anew"]


@dataclass
class Ledger:
    """What `refreeze` remembers of an engine: parcels of tensors that do not train now, and every tensor's
    hyper-parameters (its group's, without "params"), who was given a learning rate of their own, and the number of the
    group that each had at the first refreeze."""

    parked: list[Parcel] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    own_rates: set[str] = field(default_factory=set)
    origin: dict[str, int] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)

    def model_of(self, name: str) -> str:
        """Of the tensors whose hyper-parameters are known, the one to follow: itself; its namesake in another layer; one
        of as many dimensions (a gain follows gains); any. Those that were given a rate of their own come last."""
        if name in self.settings:
            return name
        known = [other for other in self.settings if other not in self.own_rates] or list(self.settings)
        alike = (other for other in known if _NUMBER.sub("#", other) == _NUMBER.sub("#", name))
        shaped = (other for other in known if self.dims[other] == self.dims[name])
        return next(alike, None) or next(shaped, None) or known[0]


_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def ledger_of(engine: Any) -> Ledger:
    """The engine's ledger; made at the first call."""
    if not hasattr(engine, "_dsfreeze_ledger"):
        named = engine.module.named_parameters()
        engine._dsfreeze_ledger = Ledger(dims={n: len(getattr(p, "ds_shape", p.shape)) for n, p in named})
    ledger: Ledger = engine._dsfreeze_ledger
    return ledger


def refreeze(
    engine: Any,
    trainable: Iterable[str],
    state: StateRule = "keep",
    *,
    drop_master: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    method: Method = "auto",
) -> Any:
    """Make exactly the named tensors of a DeepSpeed engine trainable; returns the engine (collective, every rank alike).

    trainable: names as `engine.module.named_parameters()` gives them.
    state: what a tensor that stops training takes along. "keep": fp32 master, moments and step count stay on the device;
        "offload": they are parked in pinned CPU memory and restored on return; "clear": moments and step count are
        dropped, so that it starts afresh, and its master is parked on the CPU (in fp32 the weight is its own master, and
        nothing but moments is ever parked). Tensors that go on training keep theirs.
    drop_master: with "clear", the bf16 weight is the truth: no master is kept (BAdam, arXiv 2404.02827).
    settings: hyper-parameters by tensor name ("weight_decay", "lr", ...) that differ from those remembered. A tensor that
        never trained has those of its namesake in another layer, else of a tensor with as many dimensions.
    method: "anew" destroys and initializes the engine, and returns the new one; "in_place" never does that.

    Call it between an optimizer step and the next forward pass. Raises UserError on every rank, before anything has
    changed, for an empty set, unknown names, sets or rules that differ between ranks, gradients not yet stepped, an
    engine or a DeepSpeed version that it does not know. A DeepSpeed learning-rate scheduler goes on with the new groups;
    a wrapper that holds `engine.optimizer` (accelerate's) must be pointed at the new one.
    """
    wanted = [trainable] if isinstance(trainable, str) else list(trainable)
    settings = {name: dict(own) for name, own in (settings or {}).items()}
    names = _checked(engine, wanted, state, drop_master, settings, method)
    if settings or set(names) != set(live_names(engine)):
        engine = _change(engine, names, state, drop_master=drop_master, settings=settings, method=method)
    return engine


def live_names(engine: Any) -> tuple[str, ...]:
    """The tensors that the engine's optimizer steps, whatever their flags say."""
    return tuple(name for flat in flats_of(engine, *_place()) for name in flat.names)


def regroup(engine: Any, steps: Mapping[str, float | None], *, method: Method = "auto") -> Any:
    """Group the tensors that train by layer and the given step counts, before their state is loaded (collective)."""
    return _change(engine, list(live_names(engine)), "keep", steps=steps, method=method)


# -- checks --------------------------------------------------------------------------------------------------------


def _checked(
    engine: Any, trainable: Sequence[str], state: str, drop_master: bool, settings: Mapping[str, Any], method: str
) -> list[str]:
    """The names in the module's order; UserError on every rank unless all ranks ask for the same, possible thing."""
    problem = _problem(engine, trainable, state, drop_master, settings, method)
    wish = repr((sorted(map(str, trainable)), state, drop_master, _in_order(settings), method))
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (problem, hashlib.sha256(wish.encode()).hexdigest()[:12]))
    for rank, (told, _) in enumerate(answers):
        if told:
            raise UserError(told if told == problem else f"On rank {rank}: {told}")
    odd = [rank for rank, (_, digest) in enumerate(answers) if digest != answers[0][1]]
    if odd:
        raise UserError(
            f"The ranks disagree about which tensors train: rank {odd[0]} asked for another set, rule or settings than rank 0. "
            "Draw the set on rank 0 and broadcast it, or seed the draw by (seed, step) alike on every rank."
        )
    chosen = set(trainable)
    return [name for name, _ in engine.module.named_parameters() if name in chosen]


def _in_order(settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return sorted((name, sorted(own.items())) for name, own in settings.items())


def _problem(
    engine: Any, trainable: Sequence[str], state: str, drop_master: bool, settings: Mapping[str, Any], method: str
) -> str:
    """What is wrong with the call on this rank; empty when nothing is."""
    if not hasattr(engine, "zero_optimization_stage"):
        return f"refreeze takes the engine that deepspeed.initialize returned, not a {type(engine).__name__}."
    if state not in get_args(StateRule) or method not in get_args(Method):
        return (
            f"state is {state!r} and method {method!r}; state is one of {', '.join(get_args(StateRule))}, method one of "
            f"{', '.join(get_args(Method))}."
        )
    if drop_master and state != "clear":
        return f"drop_master goes with state='clear', which drops the moments too; state is '{state}'."
    try:
        if method != "anew":
            require_tested_version()
    except UserError as error:
        return f"{error} Or call refreeze(..., method='anew'), which builds the engine again."
    refused = next(unsupported(engine), None)
    if refused:
        return f"{refused}."
    unreadable = unreadable_names(engine)
    if unreadable:
        return f"This DeepSpeed has no {unreadable[0]}, where masters lie. Install one of {' to '.join(TESTED)}."
    lacking = missing_names(engine) if method == "in_place" else []
    if lacking:
        return f"This DeepSpeed has no {lacking[0]}, which a change in place needs. Use method='auto' or 'anew'."
    return _set_problem(engine, trainable) or _settings_problem(engine, settings) or _timing_problem(engine)


def _set_problem(engine: Any, trainable: Sequence[str]) -> str:
    if not trainable:
        return "Nothing to train: the set is empty. Name at least one tensor, or stop training."
    return _name_problem(engine, trainable)


def _name_problem(engine: Any, names: Iterable[str]) -> str:
    known = dict(engine.module.named_parameters())
    everything = dict(engine.module.named_parameters(remove_duplicate=False))
    for name in names:
        if name in everything and name not in known:
            first = next(n for n, p in known.items() if p is everything[name])
            return f"'{name}' is tied to '{first}': they are one tensor. Name '{first}'."
        if name not in known:
            return f"The model has no tensor '{name}'.{did_you_mean(name, known)}"
    return ""


def _settings_problem(engine: Any, settings: Mapping[str, Mapping[str, Any]]) -> str:
    known = {**engine.basic_optimizer.defaults, **engine.basic_optimizer.param_groups[0]}
    if getattr(engine, "lr_scheduler", None) is not None and any("lr" in own for own in settings.values()):
        return "settings name an lr, which the engine's scheduler would overwrite. Leave out one of the two."
    for name, own in settings.items():
        odd = next((key for key in own if key not in known), None)
        if odd is not None:
            return f"settings of '{name}': the optimizer has no '{odd}'.{did_you_mean(odd, known)}"
    return _name_problem(engine, settings)


def _timing_problem(engine: Any) -> str:
    if holds_gradients(engine):
        return (
            "Gradients are accumulated and not yet stepped: they would be lost. Call refreeze after engine.step() has "
            "made the optimizer step."
        )
    return ""


# -- the change ----------------------------------------------------------------------------------------------------


def _change(
    engine: Any,
    names: Sequence[str],
    rule: StateRule,
    *,
    drop_master: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    steps: Mapping[str, float | None] | None = None,
    method: Method = "auto",
) -> Any:
    ledger = ledger_of(engine)
    _remember(engine, ledger, settings or {})
    pool = [*ledger.parked, *_live_parcels(engine)]
    counts = {name: parcel.step for parcel in pool for name in parcel.flat.names}
    groups, origins, away = _groups(engine, names, ledger, {**counts, **(steps or {})})
    anew = method == "anew" or (method == "auto" and _lacks_names(engine))
    masters = read_masters(engine, live_names(engine)) if anew else {}
    engine = rebuild_anew(engine, groups) if anew else rebuild_in_place(engine, groups)
    engine._dsfreeze_ledger = ledger
    follow_groups(engine, origins, away)
    ledger.parked = _settle(engine, pool, rule, drop_master=drop_master, with_masters=not masters)
    write_masters(engine, masters)
    _relink(engine)
    return engine


def _lacks_names(engine: Any) -> bool:
    lacking = missing_names(engine)
    if lacking:
        warnings.warn(
            f"DeepSpeed has no {lacking[0]}: the engine is built anew at every change of what trains, which is slower.",
            stacklevel=2,
        )
    return bool(lacking)


def _place() -> tuple[int, int]:
    ranks = read_ranks()
    return ranks.rank, ranks.world_size


def _live_parcels(engine: Any) -> list[Parcel]:
    state, rounded = engine.basic_optimizer.state, is_rounded(engine)
    return [
        Parcel(flat, dict(state.get(flat.tensor, {})), has_master=rounded, live=True)
        for flat in flats_of(engine, *_place())
    ]


def _remember(engine: Any, ledger: Ledger, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Note the hyper-parameters of what trains now; those that are away follow the learning rate of their first group
    where it has one, except those that were given their own."""
    groups = engine.basic_optimizer.param_groups
    first, live = not ledger.origin, set()
    rates: dict[int, set[float]] = {}
    for flat, number in zip(flats_of(engine, *_place()), group_numbers(engine), strict=True):
        for name in flat.names:
            ledger.settings[name] = {key: value for key, value in groups[number].items() if key != "params"}
            if first:
                ledger.origin[name] = number
            live.add(name)
            if name not in ledger.own_rates:
                rates.setdefault(ledger.origin[name], set()).add(groups[number]["lr"])
    for name in ledger.settings.keys() - live - ledger.own_rates:
        now = rates.get(ledger.origin[name], set())
        if len(now) == 1:
            ledger.settings[name]["lr"] = next(iter(now))
    for name, own in settings.items():
        model = ledger.model_of(name)
        ledger.origin.setdefault(name, ledger.origin[model])
        ledger.settings[name] = {**ledger.settings[model], **own}
        if "lr" in own:
            ledger.own_rates.add(name)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, by its name alone: up to its first number, else its module's path."""
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0]


def _groups(
    engine: Any, names: Sequence[str], ledger: Ledger, steps: Mapping[str, float | None]
) -> tuple[list[dict[str, Any]], list[int], list[bool]]:
    """Parameter groups in the module's order; for each, the number of the group that it had at first, and whether nothing
    of that one trains until now, so that nobody has its rate of now."""
    parameters = dict(engine.module.named_parameters())
    live = {ledger.origin[name] for name in live_names(engine)}
    scheduled = getattr(engine, "lr_scheduler", None) is not None
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    origins: dict[tuple[Any, ...], int] = {}
    for name in names:
        model = ledger.model_of(name)
        settings, origin = ledger.settings[model], ledger.origin.setdefault(name, ledger.origin[model])
        # two groups may have one rate now (at the start of a warm-up) and, by their scheduler, two later
        alike = (repr(sorted(settings.items())), steps.get(name), origin if scheduled else None)
        key = (settings.get("layer") or layer_of(name), *alike)
        groups.setdefault(key, {**settings, "params": []})["params"].append(parameters[name])
        origins.setdefault(key, origin)
    return list(groups.values()), list(origins.values()), [origin not in live for origin in origins.values()]


def _settle(engine: Any, pool: list[Parcel], rule: StateRule, *, drop_master: bool, with_masters: bool) -> list[Parcel]:
    """Give every new flat the state that its tensors had, wherever it lies in the pool; what is left there, parked.

    `with_masters` False leaves out the masters of tensors that go on training: they are carried otherwise.
    """
    optimizer, targets = engine.basic_optimizer, []
    for flat in flats_of(engine, *_place()):
        alike = [p for p in pool if p.flat.names == flat.names and flat.alike(p.flat)]
        overlapping = [p for p in pool if set(p.flat.names) & set(flat.names)]
        if alike:
            pool.remove(alike[0])
            put_back(
                replace(alike[0], has_master=alike[0].has_master and (with_masters or not alike[0].live)),
                flat,
                optimizer,
            )
        elif overlapping:
            targets.append(blank(flat, overlapping[0]))
    wanted = {name for target in targets for name in target.flat.names}
    cut = [parcel for parcel in pool if wanted & set(parcel.flat.names)]
    rests = [blank_rest(parcel, rest) for parcel in cut if (rest := set(parcel.flat.names) - wanted)]
    spread(cut, [*targets, *rests], device_of(read_ranks().local_rank))
    for target in targets:
        put_back(target, target.flat, optimizer)
    idle = [parcel for parcel in pool if not wanted & set(parcel.flat.names)]
    return [kept for parcel in (*idle, *rests) if (kept := park(parcel, rule, drop_master=drop_master))]


def _relink(engine: Any) -> None:
    """Stages 1 and 2: let DeepSpeed's own readers (`safe_get_*`) see the shares that were put back."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
        wrapper._link_all_hp_params()
        # DeepSpeed links once, when its first group has stepped: the others' state would stay unseen
        wrapper._lazy_init_hp_params_optimizer_state = partial(_link_states, weakref.proxy(wrapper), set())
        wrapper._lazy_init_hp_params_optimizer_state()


def _link_states(wrapper: Any, linked: set[int]) -> None:
    """Show the optimizer's state to the parameters of every group that has got one since the last call."""
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    state = wrapper.optimizer.state
    for number, master in enumerate(wrapper.single_partition_of_fp32_groups):
        if number not in linked and state.get(master):
            lazy_init_hp_params_optimizer_state(wrapper.bit16_groups[number], master, state)
            linked.add(number)
