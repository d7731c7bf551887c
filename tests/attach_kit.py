"""Trainers with a plan attached, and the same training written by hand in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from tiny import llama_anatomy, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from dsfreeze.integrations import attach
from dsfreeze.plan import FreezePlan, Phase

LR, STEPS = 5e-3, 9
ADAM = {"betas": (0.9, 0.999), "eps": 1e-3}
DECAY = 0.1


def names_of(model, *layers):
    return tuple(t.name for layer in llama_anatomy(model).layers if layer.name in layers for t in layer.tensors)


def plan_of(model, *sets, every=3, **options):
    """Phases of `every` steps, one per set of layers; the last goes on to the end."""
    phases = [Phase(n * every, every, names_of(model, *layers)) for n, layers in enumerate(sets)]
    phases[-1] = replace(phases[-1], num_steps=None)
    return FreezePlan("test", tuple(phases), **options)


def gradual(model, **options):
    """Gradual unfreezing, three phases of three steps."""
    return plan_of(
        model, ("layers.3", "head"), ("layers.2", "layers.3", "norm", "head"),
        ("layers.1", "layers.2", "layers.3", "norm", "head"), **options,
    )  # fmt: skip


def rotating(model, **options):
    """One layer at a time, so that layers leave and come back."""
    blocks = ("layers.3", "layers.1", "layers.3", "layers.2", "layers.1")
    return plan_of(model, *((block, "head") for block in blocks), every=2, **options)


def data(count=64, length=8, vocab=61):
    ids = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(folder, model, *, batch=4, accumulation=1, steps=STEPS, callbacks=(), **options):
    options = {
        "max_grad_norm": 0.0, "save_strategy": "no", "lr_scheduler_type": "linear", "warmup_steps": 2, "report_to": [],
        "logging_strategy": "no", "weight_decay": DECAY, "use_cpu": True, **options,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=steps, learning_rate=LR, adam_epsilon=ADAM["eps"], train_sampling_strategy="sequential",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks))


def rate_at(step, steps=STEPS, warmup=2):
    """transformers' linear schedule, written out."""
    return LR * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


def run_torch(plan, *, batch=4, accumulation=1, steps=STEPS, clip=0.0, until=None):
    """The oracle: one AdamW per tensor, so that nothing is shared; weights after every step."""
    model = tiny_llama()
    named, rows = dict(model.named_parameters()), data()
    optimizers = {
        n: torch.optim.AdamW([p], lr=LR, weight_decay=DECAY if p.dim() > 1 else 0.0, **ADAM) for n, p in named.items()
    }
    active, weights = set(), []
    for step in range(until or steps):
        chosen = set(plan.phase_at(step).trainable)
        for name in active - chosen if plan.state == "clear" else ():
            optimizers[name].state.clear()
        active = chosen
        for name, p in named.items():
            p.requires_grad_(name in active)
            p.grad = None
        for micro in range(accumulation):
            first = (step * accumulation + micro) * batch % len(rows)
            ids = torch.stack([row["input_ids"] for row in rows[first : first + batch]])
            (model(input_ids=ids, labels=ids, use_cache=False).loss / accumulation).backward()
        chosen_parameters = [named[n] for n in named if n in active]
        torch.nn.utils.clip_grad_norm_(chosen_parameters, clip or math.inf)
        for name in active:
            optimizers[name].param_groups[0]["lr"] = rate_at(step, steps)
            optimizers[name].step()
        weights.append({n: p.detach().clone() for n, p in named.items()})
    return weights


class Watch(TrainerCallback):
    """Weights and learning rates at every step, as another callback sees them."""

    def __init__(self, weights_of=None):
        self.weights, self.rates = [], []
        self._weights_of = weights_of or (lambda model: {n: p.detach().clone() for n, p in model.named_parameters()})

    def on_step_begin(self, args, state, control, optimizer=None, **_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, model=None, **_):
        self.weights.append(self._weights_of(model))


def attached(folder, plan_maker=gradual, *, model=None, watch=None, **options):
    """A trainer over the tiny model with a plan, and the callback that watches it (after ours)."""
    model = model or tiny_llama()
    plan = plan_maker(tiny_llama())
    trainer = attach(make_trainer(folder, model, **options), plan)
    watch = watch or Watch()
    trainer.add_callback(watch)
    return trainer, watch, plan


def worst(one, other):
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in other)


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}
