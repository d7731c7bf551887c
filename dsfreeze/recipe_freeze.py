"""`freeze:` of a recipe: what trains and what does not, and which strategy reads which key. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dsfreeze.recipe_section import Limits, Section, Seed, Texts, checked_limits, refuse_unread

Strategy = Literal[
    "full", "head", "bottom", "top", "interval", "random", "middle", "ranked", "budget", "salf", "half", "patterns",
    "bitfit", "norms", "attention", "lora", "dora",
    "lisa", "badam", "hift", "owlore", "sweep", "gradual_unfreezing", "freezeout", "step_ranges",
    "adt_h", "adt_l", "autofreeze", "tang_like", "egeria_like", "smartfrz", "adagradselect", "grass", "blockllm",
]  # fmt: skip

#: What a file of scores looks like, for messages.
SCORES_FORM = '{"scores": {"layers.0": 0.12, ...}}'

#: Keys that decide how a plan is run, not what it trains: another value goes on with the same checkpoint.
CACHE_KEYS = ("prefix_cache", "prefix_cache_dtype", "prefix_cache_dir", "evict_prefix")

#: Strategies that cannot do without a file of scores.
NEEDS_SCORES = ("ranked", "owlore", "budget", "salf")

_BY_FRACTION = ("bottom", "top", "random", "middle", "ranked", "bitfit", "norms", "attention", "lora", "dora")
_BY_NUMBER = (*_BY_FRACTION, "interval")
_ROTATING = ("lisa", "badam", "hift", "owlore")
_RETURNING = (*_ROTATING, "sweep", "step_ranges")  # what stops training may come back, or may be told to
_SCHEDULED = (*_RETURNING, "gradual_unfreezing", "freezeout")
_ADT = ("adt_h", "adt_l")
_DECIDING = ("autofreeze", "tang_like", "egeria_like", "smartfrz", "adagradselect", "grass", "blockllm")
_ADAPTIVE = (*_ADT, *_DECIDING)
#: The strategies that read a key of `freeze:`; the others refuse it. Keys that are not here are read by all.
FREEZE_KEYS: dict[str, tuple[str, ...]] = {
    # full and head say aloud that they do not use a number: it is a natural override
    "fraction": (*_BY_NUMBER, *_ADT, "half", "full", "head"),
    "count": (*_BY_NUMBER, *_ADT, "full", "head"),
    "rounding": (*_BY_FRACTION, *_ADT),
    "offset": ("interval",),
    "granularity": (*_BY_NUMBER, *_ROTATING, "sweep", "budget"),
    "seed": ("random", "half", *_ROTATING, "adagradselect", "grass", "blockllm"),
    "scores": (*NEEDS_SCORES, "half"),
    "score": ("ranked", "owlore", "budget", "half"),
    "level": ("half",),
    "round": ("half",),
    "masks": ("half",),
    "depth": ("half",),
    "balanced": ("half",),
    "count_by": ("half",),
    "budget": ("budget",),
    "trace": ("salf",),
    "gain": ("salf",),
    "tau": ("salf",),
    "cut": ("salf",),
    "min_layers": ("salf",),
    "max_layers": ("salf",),
    "padding": ("salf",),
    "flat": ("salf",),
    "trainable": ("patterns",),
    "frozen": ("patterns",),
    "unfrozen_parameters": ("patterns",),
    "freeze_trainable_layers": ("patterns",),
    "active_layers": (*_ROTATING, "sweep", "gradual_unfreezing", "adagradselect", "grass"),
    "switch_every": (*_ROTATING, "gradual_unfreezing", *_DECIDING),
    "order": ("badam", "hift", "sweep"),
    "state": (*_RETURNING, *_ADAPTIVE),
    "drop_master": (*_RETURNING, *_ADAPTIVE),
    "rewarmup_steps": (*_SCHEDULED, *_ADAPTIVE),
    "discriminative_factor": ("gradual_unfreezing",),
    "t0": ("freezeout",),
    "power": ("freezeout",),
    "scale_rates": ("freezeout",),
    "step_ranges": ("step_ranges",),
    "track_steps": _ADT,
    "measure": _ADT,
    "stability_check": _ADT,
    "percentile": ("autofreeze",),
    "threshold": ("tang_like",),
    "window": ("egeria_like", "smartfrz"),
    "slope": ("egeria_like",),
    "hits": ("egeria_like",),
    "thaw_factor": ("egeria_like",),
    "variance": ("smartfrz",),
    "min_cka": ("smartfrz",),
    "epsilon": ("adagradselect",),
    "epsilon_decay": ("adagradselect",),
    "temperature": ("grass",),
    "ema": ("grass",),
    "sparsity": ("blockllm",),
    "patience": ("blockllm",),
}


class AdapterOptions(Section):
    """Low-rank adapters on the matrices of the trainable layers; their own weights stay frozen."""

    kind: Literal["lora", "dora"] = "lora"
    """LoRA (arXiv 2106.09685) or DoRA (2402.09353)."""
    r: Annotated[int, Field(ge=1)] = 8
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update counts alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    categories: Texts = ["q", "k", "v", "o", "up", "gate", "down"]
    """Matrices that get one; a fused matrix counts when any of its parts is named."""


class FreezeOptions(Section):
    """Which tensors train."""

    strategy: Strategy = "bottom"
    """How the frozen layers are chosen; README has the table, docs/methods/ those that move."""
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the units (layers, by default) to freeze; with `count` unset, 0.5. half takes 0.25 to 0.75."""
    count: Annotated[int, Field(ge=0)] | None = None
    """Number of units to freeze, instead of `fraction`."""
    rounding: Literal["floor", "nearest", "ceil"] = "floor"
    """Rounding of fraction x units (the paper is silent; floor is ours). Also read as `round: floor`."""
    offset: Annotated[int, Field(ge=0)] | None = None
    """interval: freeze unit i when (i - offset) % every == 0; None freezes when (i + 1) % every == 0, so layers.0
    trains."""
    granularity: Literal["layer", "matrix", "category", "bias"] = "layer"
    """Units that are frozen: whole layers; single matrices; matrices within each category; or layers of which the
    biases alone train."""
    embed: Literal["auto", "freeze", "train"] = "auto"
    """The embedding; auto freezes it exactly when layers.0 is frozen whole."""
    norm: Literal["auto", "freeze", "train"] = "auto"
    """The final norm; auto trains it, except where a strategy says itself what trains (head, bitfit, attention,
    patterns) and with adapters."""
    head: Literal["auto", "freeze", "train"] = "auto"
    """The head; auto trains it, unless it is tied to a frozen embedding."""
    seed: Seed = 42
    """random, half, lisa, owlore, badam, hift, adagradselect, grass, blockllm: seed of the draws."""
    scores: Path | None = None
    """A JSON file of scores, as `dsfreeze analyze` writes it, or {"scores": {"layers.0": 0.12, ...}}. ranked: the
    lowest-scored units are frozen; owlore: the weights of the draw; budget: what each unit brings; salf: its traces; half: the
    highest-scored train instead of those drawn."""
    score: str | None = None
    """Which of the scores that `dsfreeze analyze` took; None takes the file's own choice."""
    budget: Limits | None = None
    """budget: limits that the set keeps, such as {flops: -40%}: shares of full tuning (0.5x, 50%, -40%), or, of memory on a
    rank, 40GiB, and of trainable parameters, 10M. `time` is taken as FLOPs (ours)."""
    level: Literal["category", "layer", "model", "element"] = "category"
    """half: what is drawn: in each layer 2 of q, k, v, o, half of up, gate, down and half of the norms; whole layers; matrices of the
    whole model; or single elements of every tensor."""
    round: Annotated[int, Field(ge=0)] = 0
    """half: number of the training stage, from 0; each draws its own half."""
    masks: Literal["fresh", "same", "complement"] = "fresh"
    """half: a fresh draw in each round; round 0's in all; or in odd rounds what the even round before froze."""
    depth: Literal["uniform", "bottom", "top"] = "uniform"
    """half: the layers in which it freezes: all, or the bottom or top half of them (ours); the others train whole."""
    balanced: bool = False
    """half, level category: draw one of q and o and one of k and v, which is exactly half of the attention however queries are
    grouped (ours)."""
    count_by: Literal["numel", "matrices"] = "numel"
    """half, level model: half of the elements, or half of the number of matrices (which is published is unknown; numel is ours)."""
    trace: str = "deviation"
    """salf: which of the analyzed traces."""
    gain: Literal["a", "b", "c", "d"] = "a"
    """salf: formula of a layer's gain: a the plain reduction of the deviation, b of its logarithm, c the local exponent, d
    the share of the whole, summed up to `tau` (the published one is unknown; all four are ours)."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.9
    """salf with gain d: share of the reduction that lies in the frozen layers."""
    cut: Literal["median", "mode", "q25"] = "median"
    """salf: the calibration examples' ends of freezing become one by their median, their mode or their lower quartile."""
    min_layers: Annotated[int, Field(ge=1)] = 1
    """salf: at least so many layers train."""
    max_layers: Annotated[int, Field(ge=1)] | None = None
    """salf: the budget: at most so many layers train."""
    padding: Literal["none", "fill"] = "none"
    """salf: with `max_layers`, fill trains exactly so many even where fewer would do."""
    flat: Literal["min_layers", "train_all"] = "min_layers"
    """salf: what an example trains whose deviation never changes."""
    trainable: Texts | None = None
    """patterns: globs on whole path components (`layers.1.*` never means layers.10); what they match trains, the rest
    is frozen."""
    frozen: Texts | None = None
    """patterns: what they match is frozen, the rest trains; may be given beside `trainable`, and wins."""
    unfrozen_parameters: Texts | None = None
    """Spectrum's and axolotl's spelling: regular expressions matched from the start of the name."""
    freeze_trainable_layers: int | None = None
    """LLaMA-Factory's spelling: n > 0 trains the last n layers, n < 0 the first -n; embedding, norm and head frozen."""
    adapter: AdapterOptions | None = None
    """Adapters on the trainable layers instead of their own weights."""
    mask_file: Path | None = None
    """Of the tensors in this file (safetensors of booleans by tensor name, as retain.method packnet leaves them) only the elements
    that are true train, whatever the strategy; not with one that decides as it runs."""

    # -- moving: what trains changes on the way (docs/methods/)
    active_layers: Annotated[int, Field(ge=1)] | None = None
    """Units that train at once, or that one stage thaws; None takes the method's own (lisa, adagradselect and grass 2,
    owlore 5, the others 1). Also read as lisa_activated_layers, lisa_n_layers."""
    switch_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between switches or decisions; None takes the method's own (lisa, tang_like, adagradselect and grass 20,
    badam and owlore 50, hift 1, egeria_like and smartfrz 5, blockllm 100, autofreeze a tenth of the run;
    gradual_unfreezing shares the run out). Also read as lisa_step_interval, lisa_interval_steps, badam_switch_interval."""
    order: Literal["auto", "ascending", "descending", "random"] = "auto"
    """In which order units take their turn, ascending from the input; auto is random for badam, afresh each sweep, and
    ascending for hift and sweep. Also read as badam_switch_mode."""
    state: Literal["auto", "keep", "clear", "offload"] = "auto"
    """Adam's state of what stops training: keep it on the device, clear it, or park it on the host; auto takes the
    method's own (lisa, owlore, step_ranges and adagradselect keep, hift and grass offload, the others clear)."""
    drop_master: bool = False
    """With state clear: drop the fp32 master too, so that training resumes from the rounded bf16 weight."""
    rewarmup_steps: Annotated[int, Field(ge=0)] = 0
    """After a switch, steps in which the learning rate rises to the schedule's again."""
    discriminative_factor: Annotated[float, Field(ge=1)] = 1.0
    """gradual_unfreezing: each group trains at the rate of the one above divided by this (ULMFiT's four groups: 2.6)."""
    t0: Annotated[float, Field(gt=0, le=1)] = 0.8
    """freezeout: share of the run after which layers.0 stops, before it is raised to `power`."""
    power: Annotated[int, Field(ge=1, le=3)] = 3
    """freezeout: 1 is the linear schedule, 3 the cubic one."""
    scale_rates: bool = True
    """freezeout: a layer that stops early trains at a rate that is higher by as much."""
    step_ranges: dict[str, Any] | None = None
    """step_ranges: when each pattern's tensors are frozen: N for the first N steps, [first, last] with both ends, last
    -1 to the end, -1 alone throughout, or a list of such pairs. What no pattern names trains."""
    # -- the prefix: what lies below all that trains
    prefix_cache: Literal["off", "memory", "disk", "auto"] = "off"
    """Store the states that leave the frozen prefix, once for each example, and read them from the second epoch on (the prefix
    runs without dropout in any case): in memory, gone with the run; on disk, shared between runs with the same prefix; auto
    takes what pays and fits, and says why."""
    prefix_cache_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """How cached states are stored: auto as they are computed, so that nothing changes; int8 keeps a scale for each token, and
    errs by up to 1/254 of the token's largest value."""
    prefix_cache_dir: Path | None = None
    """Where cached states lie on disk; None takes `prefix` in dsfreeze's cache folder."""
    evict_prefix: bool = False
    """Cache the states before the first step, layer by layer, and train without the prefix's weights in memory."""
    # -- adaptive: what trains next is decided from what the run measured
    track_steps: Annotated[int, Field(ge=1)] = 5
    """adt_h, adt_l: steps in which all layers train and are watched before some freeze."""
    measure: Literal["abs_l2", "rel_l2", "rms", "grad_l2"] = "abs_l2"
    """adt_h, adt_l: weight change in L2 norm, relative to the start weights, or per element; or the gradients' L2 norm, which
    needs no copy of the start weights."""
    stability_check: bool = False
    """adt_h, adt_l: rank the layers halfway through the tracking too, and say so when the two rankings disagree."""
    percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    """autofreeze: layers in front of the first one whose gradient changed by this percentile or more freeze."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """tang_like: the front layer freezes when its gradient falls below this share of its largest so far."""
    window: Annotated[int, Field(ge=2)] = 20
    """egeria_like, smartfrz: decisions over which a trend or a variance is taken."""
    slope: Annotated[float, Field(gt=0)] = 1e-4
    """egeria_like: a trend of plasticity below this, per decision, is flat."""
    hits: Annotated[int, Field(ge=1)] = 2
    """egeria_like: flat trends in a row that freeze the front layer."""
    thaw_factor: Annotated[float, Field(gt=1)] | None = 10.0
    """egeria_like: everything thaws when the learning rate is this many times below what it was at the first freeze;
    None never thaws."""
    variance: Annotated[float, Field(gt=0)] = 1e-4
    """smartfrz: the similarity to the start model varies less than this in a layer that may freeze."""
    min_cka: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """smartfrz: and is above this."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 1.0
    """adagradselect: probability, at the first decision, of taking the layers with the largest gradients."""
    epsilon_decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """adagradselect: epsilon is multiplied by this at every decision."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """grass: softmax temperature; None takes the mean of what it divides, so that only ratios count."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """grass: weight of a layer's former gradient size when it is measured again."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """blockllm: share of the layers' elements that are frozen."""
    patience: Annotated[int, Field(ge=1)] = 100
    """blockllm: losses whose mean must not exceed that of all since the last switch."""

    @field_validator("budget")
    @classmethod
    def _limits(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        return value and checked_limits(value)

    @model_validator(mode="before")
    @classmethod
    def _a_word_for_round_is_the_rounding(cls, values: Any) -> Any:
        """`round: ceil` was the rounding's key until `round` became a number."""
        if (
            not isinstance(values, dict)
            or values.get("round") not in ("floor", "nearest", "ceil")
            or "rounding" in values
        ):
            return values
        return {("rounding" if key == "round" else key): value for key, value in values.items()}

    @model_validator(mode="before")
    @classmethod
    def _patterns_imply_their_strategy(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "strategy" in values:
            return values
        keys = ("trainable", "frozen", "unfrozen_parameters", "freeze_trainable_layers", "step_ranges")
        given = [key for key in keys if values.get(key) is not None]
        return {**values, "strategy": "step_ranges" if given == ["step_ranges"] else "patterns"} if given else values

    @model_validator(mode="after")
    def _agree(self) -> FreezeOptions:
        refuse_unread(self, FREEZE_KEYS, "freeze.strategy", self.strategy)
        if self.fraction is not None and self.count is not None:
            raise ValueError("fraction and count exclude each other; keep one")
        if self.count is not None and self.rounding != "floor":
            raise ValueError("rounding is about a fraction of the units, and count is a whole number; keep one")
        if self.strategy in NEEDS_SCORES and self.scores is None:
            raise ValueError(
                f"strategy '{self.strategy}' needs freeze.scores, a file that `dsfreeze analyze` writes, or JSON such as "
                f"{SCORES_FORM}"
            )
        if self.strategy == "budget" and not self.budget:
            raise ValueError("strategy 'budget' needs freeze.budget, such as {flops: -40%} or {memory: 40GiB}")
        if self.strategy == "budget" and (self.granularity in ("category", "bias") or self.adapter is not None):
            raise ValueError(
                "strategy 'budget' chooses among whole layers or matrices: granularity layer or matrix, no adapter"
            )
        if self.max_layers is not None and self.max_layers < self.min_layers:
            raise ValueError(
                f"max_layers is {self.max_layers} and min_layers {self.min_layers}; the most is not the least"
            )
        named = self.trainable or self.frozen or self.unfrozen_parameters or self.freeze_trainable_layers is not None
        if self.strategy == "patterns" and not named:
            raise ValueError("strategy 'patterns' needs freeze.trainable or freeze.frozen, a list of patterns")
        if self.evict_prefix and self.prefix_cache == "off":
            raise ValueError(
                "evict_prefix trains on cached states alone, and prefix_cache is off; write memory, disk or auto"
            )
        if self.mask_file is not None and self.strategy in _ADAPTIVE:
            raise ValueError(
                f"mask_file needs a plan that is made beforehand, and '{self.strategy}' decides as it runs"
            )
        if self.strategy == "half":
            self._agree_on_half()
        self._agree_on_moving()
        return self

    def _agree_on_half(self) -> None:
        if self.fraction is not None and not 0.25 <= self.fraction <= 0.75:
            raise ValueError(
                f"strategy 'half' freezes 0.25 to 0.75 of the layers, and fraction is {self.fraction:g}. Write 0.5, or strategy "
                "'random' with granularity category for any other share"
            )
        if self.adapter is not None:
            raise ValueError(
                "strategy 'half' chooses which of the model's own weights train, and with freeze.adapter none do. Write strategy "
                "'lora', or 'random' with granularity category and the adapter"
            )
        if self.balanced and (self.level != "category" or self.fraction not in (None, 0.5)):
            raise ValueError("balanced makes the attention exactly half: it goes with level category and fraction 0.5")
        if self.count_by != "numel" and self.level != "model":
            raise ValueError(
                f"count_by is about level model, and level is {self.level}; leave it out, or write level: model"
            )
        if self.score is not None and self.scores is None:
            raise ValueError(
                "score names one of the scores in freeze.scores, which is missing; name the file, or leave it out"
            )
        if self.level == "element" and self.scores is not None:
            raise ValueError(
                "scores rank tensors and layers, and level element draws single elements; write another level"
            )

    def _agree_on_moving(self) -> None:
        if self.strategy in (*_ROTATING, "sweep") and self.granularity in ("category", "bias"):
            raise ValueError(
                f"strategy '{self.strategy}' moves over layers or single matrices, not over granularity "
                f"'{self.granularity}'; write layer or matrix"
            )
        if self.strategy == "sweep" and self.order == "random":
            raise ValueError("strategy 'sweep' slides its window, so its order is ascending or descending, not random")
        if self.drop_master and self.state in ("keep", "offload"):
            raise ValueError(f"drop_master drops what state '{self.state}' is told to hold; write state: clear")
        if self.strategy == "step_ranges" and not self.step_ranges:
            raise ValueError(
                "strategy 'step_ranges' needs freeze.step_ranges, such as {embed: 100, layers.0: [50, -1]}"
            )
