"""The recipe: what the user asks for, as immutable sections that check themselves.

`freeze:` has a file of its own, recipe_freeze.py. `recipe_reader.load_recipe` makes a recipe from YAML and `key=value`
overrides and words the mistakes; `recipe_reference` writes docs/recipe.md from the docstrings. No torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dsfreeze.recipe_freeze import FREEZE_KEYS, SCORES_FORM, AdapterOptions, FreezeOptions, Strategy
from dsfreeze.recipe_preference import PREFERENCE_KEYS, PreferenceOptions
from dsfreeze.recipe_retain import MASKS_FILE, RetainOptions
from dsfreeze.recipe_section import Limits, Section, Seed, Texts, checked_limits, refuse_at, refuse_unread

__all__ = [
    "DATA_KEYS", "FREEZE_KEYS", "SCORES_FORM", "TASKS", "AdapterOptions", "AnalyzeOptions", "DataOptions", "FreezeOptions", "ModelOptions",
    "PreferenceOptions", "Recipe", "RetainOptions", "Section", "Strategy", "Task", "TrainOptions",
]  # fmt: skip

OPTIMIZERS = ("adamw_torch",)
#: The rows that come with dsfreeze.
BUILTIN_ROWS = "builtin:nli"
TASKS = ("classification", "tokens", "causal_lm", "sft", "seq2seq", "preference")
Task = Literal["classification", "tokens", "causal_lm", "sft", "seq2seq", "preference"]

#: The tasks that read a key of `data:`; the others refuse it.
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "label": ("classification", "tokens"),
    "labels": ("classification", "tokens"),
    "num_labels": ("classification", "tokens"),
    "format": ("sft",),
    "answer_only": ("sft",),
    "packing": ("sft",),
    "prefix": ("seq2seq",),
    "max_new_tokens": ("sft", "seq2seq"),
    "held_out": tuple(task for task in TASKS if task != "preference"),  # a pair's reference is measured before the run
}


class ModelOptions(Section):
    """`model:` is a name or this section."""

    name: str
    """A hub id, a folder, a `.gguf` file, or a name that `dsfreeze models` lists."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides every dropout probability of the model's config; None keeps them."""
    attn_implementation: str | None = None
    """transformers' attention implementation (`sdpa`, `eager`, `flash_attention_2`); None lets it choose."""
    trust_remote_code: bool = False
    """Run code that a hub repository brings along. Off, and warned about when on."""


class DataOptions(Section):
    """Where examples come from and what their columns mean. A column that is None is recognised by its usual names."""

    train: str | None = BUILTIN_ROWS
    """Hub id (`org/set` or `org/set:config`), folder, or a json, jsonl(.gz), csv, parquet or arrow file; `builtin:nli`
    is generated."""
    eval: str | None = BUILTIN_ROWS
    """The same for evaluation; None trains without, and so does a recipe that names rows of its own to train on and none here."""
    train_split: str = "train"
    """Split of a hub dataset or folder to train on."""
    eval_split: str = "validation"
    """Split of a hub dataset or folder to evaluate on."""
    text: Texts | None = None
    """Text column(s): one, or a pair for sentence pairs; source and target for seq2seq; the prompt for preference, whose
    answers are in `chosen` and `rejected`."""
    label: str | None = None
    """Label column (classification), tag column (tokens)."""
    labels: Texts | None = None
    """Label names in index order; None reads them from the training data. A regression has none: see `num_labels`."""
    num_labels: Annotated[int, Field(ge=1)] | None = None
    """Number of classes; 1 makes classification a regression. None counts the training data's."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer"] = "auto"
    """Shape of sft examples; `auto` recognises it by the columns."""
    answer_only: bool = True
    """sft: loss on the answers alone (True) or on every token."""
    packing: bool = False
    """sft: several examples a sequence, each attending to itself alone; causal_lm always fills its sequences."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest sequence, in tokens; longer ones are cut (from the right). A preference pair is two of them."""
    max_train_examples: Annotated[int, Field(ge=1)] | None = None
    """Train on a seeded sample of this many examples."""
    max_eval_examples: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on the first so many examples."""
    held_out: Annotated[float, Field(gt=0)] | None = None
    """Set this much of the training data aside, a share below 1 or a number of rows, and evaluate on it, not on `eval`, while training
    (eval_strategy steps and epoch)."""
    held_out_seed: Seed = 0
    """Draws the rows that are set aside, before max_train_examples draws from the others: the same ones whatever train.seed."""
    prefix: str = ""
    """seq2seq: text before every source ("translate English to German: ")."""
    metrics: Texts | None = None
    """Evaluation metrics; None takes the task's own. Of: accuracy, f1, f1_macro, matthews, pearson, spearman,
    entity_f1, perplexity, reward_accuracy, reward_margin, rewards, greedy_match, rouge, bleu, exact_match, strict_match,
    first_char, rouge_l, edit_similarity, sari."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest generated answer, in tokens, for metrics that generate (all from rouge on)."""

    @model_validator(mode="before")
    @classmethod
    def _built_in_rows_for_themselves(cls, values: Any) -> Any:
        """A model that trains on other rows would be measured on the built-in ones, of another task."""
        if isinstance(values, dict) and "eval" not in values and values.get("train", BUILTIN_ROWS) != BUILTIN_ROWS:
            return {**values, "eval": None}
        return values

    @field_validator("text")
    @classmethod
    def _at_most_two(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(value) not in (1, 2):
            raise ValueError(f"names {len(value)} columns; write one column, or a pair")
        return value


class TrainOptions(Section):
    """`train:` uses the argument names of transformers.TrainingArguments."""

    output_dir: Path = Path("runs/run")
    """Where the record, the checkpoints and the exported model go."""
    max_steps: int = -1
    """Optimizer steps; -1 trains num_train_epochs."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training data."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples per rank and micro-step."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples per rank when evaluating."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-steps per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay; never on biases and norms."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's beta1."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's beta2."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global norm to which gradients are clipped; 0 does not clip."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that may be left out because their loss or gradient is no finite number; one more ends the run, and so does the first by
    default."""
    optim: Literal["adamw_torch"] = "adamw_torch"
    """The optimizer. GaLore and its kin need whole matrices, and ZeRO hands an optimizer flat slices of them."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate, from transformers."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Warm-up as a share of the run, when warmup_steps is 0."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """How often trackers are told; steps.jsonl has every step."""
    eval_strategy: Literal["no", "steps", "epoch", "end"] = "end"
    """When to evaluate during training (before and after are `end`)."""
    eval_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between evaluations, with eval_strategy steps."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """End after so many evaluations in a row that are no better than the best (by the first of data.metrics), and go back to the best
    one's weights. Looks at data.held_out alone, never at data.eval."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write checkpoint-N."""
    save_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints, with save_strategy steps."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = None
    """Keep only the newest so many checkpoints."""
    export: bool = True
    """Write the trained model to output_dir/model at the end, as a folder `from_pretrained` loads."""
    resume_from_checkpoint: bool | Literal["auto"] | Path | None = None
    """True continues from the newest whole checkpoint in output_dir, a path from that one; `auto` does so where there is one and begins
    anew where the run has not come to its first, for schedulers that start a job again."""
    ddp_timeout: Annotated[int, Field(ge=1)] = 1800
    """Seconds that ranks wait for one that does not come, before the run ends and says which it was and where."""
    seed: Seed = 42
    """Seeds model heads, data order and dropout."""
    bf16: bool = False
    """bf16 weights with fp32 masters of the trainable tensors; False is fp32 throughout."""
    gradient_checkpointing: bool = False
    """Recompute activations, from the lowest trainable layer up, non-reentrant."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Only {use_reentrant: false} is possible: reentrant checkpointing gives layers above a frozen prefix no
    gradient."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers beside the record."""
    run_name: str | None = None
    """Name for trackers; None takes output_dir's."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if value in (None, "none"):
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("optim", mode="before")
    @classmethod
    def _works_on_flat_slices(cls, value: Any) -> Any:
        if value in OPTIMIZERS:
            return value
        on_matrices = any(kin in str(value).lower() for kin in ("galore", "apollo", "muon", "shampoo", "soap"))
        why = ": it works on whole matrices, and ZeRO hands an optimizer flat slices of them" if on_matrices else ""
        raise ValueError(f"is {value!r}, which is not offered{why}. Optimizers that work: {', '.join(OPTIMIZERS)}.")

    @field_validator("max_steps")
    @classmethod
    def _steps(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError(f"is {value}; write a positive number of steps, or -1 to train num_train_epochs")
        return value

    @field_validator("gradient_checkpointing_kwargs")
    @classmethod
    def _non_reentrant(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value not in (None, {}, {"use_reentrant": False}):
            raise ValueError(
                f"is {value}; write {{use_reentrant: false}} or leave it out: reentrant checkpointing "
                "gives the layers above a frozen prefix no gradient"
            )
        return value


class AnalyzeOptions(Section):
    """What `dsfreeze analyze` measures, on how much data, and what it recommends."""

    scores: Texts | None = None
    """Scores or families of scores (change, deviation, gradient, magnitude, spectrum, similarity) to take; None takes all that the
    model and the task allow."""
    num_examples: Annotated[int, Field(ge=2)] = 64
    """Training examples to calibrate on, drawn by a hash of their content."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Examples of a batch, over all ranks where it is trained on."""
    seed: Seed = 42
    """Of the sample, the halves that stability is told by, and the random basis."""
    output_dir: Path = Path("runs/analysis")
    """Where scores.json and scores.png go."""
    recommend: str = "greentrainer"
    """The score that the recommendation rests on, and that `freeze.scores` takes from the file unless it is told."""
    budget: Limits = {"flops": "50%"}
    """Limits that the recommendation keeps; see freeze.budget."""
    final_norm: Literal["apply", "fold", "none"] = "apply"
    """deviation: states pass through what follows the last layer (apply), or are compared as they are, with the final norm's
    gain folded into the label's basis (fold) or without it (none)."""
    targets: Literal["average", "vote"] = "average"
    """deviation: an example's answer positions are averaged, or each has a trace of its own."""
    positions: Annotated[int, Field(ge=1)] = 4
    """deviation: at most so many answer positions of an example, evenly spread."""
    ablation: Literal["skip", "reset"] = "skip"
    """ablation: a layer is skipped, or its matrices are drawn anew."""
    ablation_examples: Annotated[int, Field(ge=2)] = 16
    """ablation: on so many of the examples, since it costs about L / 2 forward passes."""
    probe_steps: Annotated[int, Field(ge=1)] = 5
    """change, gradient_norm_change: training steps of each of the two probes."""
    gate_steps: Annotated[int, Field(ge=1)] = 5
    """ila: steps of fitting the gates."""
    gate_learning_rate: Annotated[float, Field(gt=0)] = 0.5
    """ila: Adam's learning rate for the gates' logits."""
    splits: Annotated[int, Field(ge=1)] = 20
    """Random halvings of the calibration data whose mean agreement is a score's stability."""
    reference: str | None = None
    """similarity: a model of the same layers to compare states with: a hub id, a folder or an embedded model."""
    checkpoint: Path | None = None
    """A checkpoint-N of a run of this model, whose weights are analyzed instead."""
    drift_from: Path | None = None
    """An earlier scores.json: how far rankings and ends of freezing have moved since."""

    @field_validator("budget")
    @classmethod
    def _limits(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError("has no limit; write one such as {flops: 50%}")
        return checked_limits(value)


class Recipe(Section):
    """One run, as its user asks for it."""

    model: ModelOptions
    """The model: a name, or a section with `name` and options."""
    task: Task = "classification"
    """What is learnt: classification of sequences (or a regression), token tags, plain text, chats and instructions,
    source to target, which of two answers is preferred."""
    data: DataOptions = DataOptions()
    """The examples."""
    freeze: FreezeOptions = FreezeOptions()
    """What trains and what does not."""
    zero: str = "zero2"
    """A name under ds_configs/, a path to a DeepSpeed JSON, or `local`: plain PyTorch in one process."""
    train: TrainOptions = TrainOptions()
    """How it is trained."""
    preference: PreferenceOptions = PreferenceOptions()
    """What a preference task minimises."""
    retain: RetainOptions = RetainOptions()
    """What is done so that earlier tasks are not forgotten."""
    analyze: AnalyzeOptions = AnalyzeOptions()
    """How `dsfreeze analyze` looks for where to fine-tune."""

    @field_validator("model", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def planned_freeze(self) -> FreezeOptions:
        """What a run of this recipe plans by: `freeze`, with what earlier tasks own held back where packnet retains them."""
        memory, given = self.retain.memory, self.freeze.mask_file
        if self.retain.method != "packnet" or memory is None or given is not None:
            return self.freeze
        return self.freeze.model_copy(update={"mask_file": memory / MASKS_FILE})

    @property
    def digest(self) -> str:
        """Of the resolved values: ranks with the same digest were asked for the same run."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        refuse_unread(self.data, DATA_KEYS, "task", self.task, inside="data")
        refuse_unread(self.preference, PREFERENCE_KEYS, "task", self.task, inside="preference")
        self._agree_on_held_out()
        return self

    def _agree_on_held_out(self) -> None:
        data, train = self.data, self.train
        if data.held_out is not None and self.freeze.evict_prefix:
            told = "is evaluated on by the whole model; drop it, or write freeze.evict_prefix: false"
            refuse_at(self, ("data", "held_out"), data.held_out, told)
        if train.early_stopping_patience is None:
            return
        if data.held_out is None:
            told = (
                "needs data.held_out, rows of the training data to look at, such as 0.1: a run that stops by its evaluation data has "
                "seen them"
            )
        elif train.eval_strategy not in ("steps", "epoch"):
            told = "needs train.eval_strategy steps or epoch"
        else:
            return
        refuse_at(self, ("train", "early_stopping_patience"), train.early_stopping_patience, told)
