"""Evaluation: the figures against the models' own losses and answers, and the same at every world size."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_tasks import SHARED, needs_shared, prepared, rows_file
from tiny_runs import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from dsfreeze.data import TaskData
from dsfreeze.errors import UserError
from dsfreeze.evaluation import evaluate
from dsfreeze.objectives import Objective
from dsfreeze.recipe import Recipe


class Ranks:
    """What simulated ranks share: their gathered values, and a count of the rounds each ran."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.values: list[Any] = [None] * world_size
        self.rounds = [0] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)


class Rank:
    """The part of an engine that evaluation uses; ranks are threads over one model."""

    objective = Objective()

    def __init__(self, module: Any, ranks: Ranks, rank: int) -> None:
        self.module, self.ranks, self.rank, self.world_size = module, ranks, rank, ranks.world_size

    @torch.no_grad()
    def no_grad_forward(self, batch: Any, **options: Any) -> Any:
        self.ranks.rounds[self.rank] += 1
        return self.module(**batch, **options)

    @torch.no_grad()
    def generate(self, batch: Any, **options: Any) -> torch.Tensor:
        self.ranks.rounds[self.rank] += 1
        return self.module.generate(**batch, **options)

    def gather(self, value: Any) -> list[Any]:
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        values = list(self.ranks.values)
        self.ranks.barrier.wait()
        return values


def recipe_for(data: TaskData, **options: Any) -> Recipe:
    train = {"per_device_eval_batch_size": 4}
    return Recipe.model_validate({"model": "any", "task": data.task, "data": options, "train": train})


def on_ranks(module: Any, data: TaskData, world_size: int, **options: Any) -> dict[str, float]:
    """`evaluate` on every simulated rank; all must say the same, in the same number of rounds."""
    ranks, results = Ranks(world_size), [{}] * world_size

    def body(rank: int) -> None:
        results[rank] = evaluate(Rank(module.eval(), ranks, rank), data, recipe_for(data, **options))  # type: ignore[arg-type]

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == results[0] for result in results)
    assert len(set(ranks.rounds)) == 1, "a rank ran another number of rounds: ZeRO-3 would hang"
    return results[0]


def equal_everywhere(module: Any, data: TaskData, **options: Any) -> dict[str, float]:
    alone, *others = (on_ranks(module, data, world_size, **options) for world_size in (1, 2, 3))
    assert others == [alone, alone]
    return alone


def words(count: int) -> list[str]:
    return ["".join("abcdef"[(i * i + j) % 6] for j in range(i % 5 + 2)) for i in range(count)]


def llama_classifier(num_labels: int) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=258,
        pad_token_id=0, num_labels=num_labels, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Oracle: the model run on one example at a time (fp32), and equality across world sizes (both)."""
    rows = [{"text": word, "label": i % 3} for i, word in enumerate(words(18))]
    data = prepared("classification", train=None, eval=rows_file(tmp_path, rows))
    model = llama_classifier(3).to(dtype)
    result = equal_everywhere(model, data)
    if dtype == torch.float32:
        losses, right = [], 0
        for i in range(18):
            outputs = model(**data.collate([data.eval[i]]))
            losses.append(outputs.loss.item())
            right += int(outputs.logits.argmax()) == i % 3
        assert result["loss"] == pytest.approx(sum(losses) / 18, rel=1e-5)
        assert result["accuracy"] == pytest.approx(right / 18)


def test_regression(tmp_path: Path) -> None:
    """Oracle: the model's own mean squared error over the whole set at once."""
    rows = [{"text": word, "label": i / 3} for i, word in enumerate(words(13))]
    data = prepared("classification", train=None, eval=rows_file(tmp_path, rows), num_labels=1)
    model = llama_classifier(1)
    result = equal_everywhere(model, data)
    assert set(result) == {"loss", "pearson", "spearman"}
    outputs = model(**data.collate([data.eval[i] for i in range(13)]))
    assert result["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_tags(tmp_path: Path) -> None:
    """Oracle: the model's own mean loss over all tagged words at once."""
    rows = [{"tokens": words(i % 4 + 1), "tags": (["B-X", "I-X", "O", "O"])[: i % 4 + 1]} for i in range(11)]
    data = prepared("tokens", train=None, eval=rows_file(tmp_path, rows))
    torch.manual_seed(0)
    model = BertForTokenClassification(
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=258,
                   num_labels=3, initializer_range=0.3)
    )  # fmt: skip
    result = equal_everywhere(model, data)
    assert set(result) == {"loss", "entity_precision", "entity_recall", "entity_f1", "accuracy"}
    with torch.no_grad():
        outputs = model(**data.collate([data.eval[i] for i in range(11)]))
    assert result["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


@needs_shared
def test_perplexity_of_stories() -> None:
    """Oracle: the model's own loss, block by block, weighted by tokens; stories260K knows stories (below 15)."""
    folder = SHARED / "weights/stories260K"
    source = str(SHARED / "data/tinystories/validation.jsonl.gz")
    data = prepared(
        "causal_lm", AutoTokenizer.from_pretrained(folder), train=None, eval=source, max_eval_examples=6, max_length=128
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    result = equal_everywhere(model, data)
    losses, items = 0.0, 0
    for i in range(len(data.eval)):
        batch = data.collate([data.eval[i]])
        with torch.no_grad():
            losses += model(**batch).loss.item() * data.num_items(batch)
        items += data.num_items(batch)
    assert result["loss"] == pytest.approx(losses / items, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(losses / items), rel=1e-4)
    assert result["perplexity"] < 15


@needs_shared
def test_answers_generated_in_batches_are_those_generated_alone(tmp_path: Path) -> None:
    """Oracle: greedy decoding of each prompt by itself, unpadded; references made from it are all matched."""
    folder = SHARED / "weights/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    questions = ["Tell me of Lily.", "Once", "The big dog was happy. Then", "A", "Why did she cry?", "The sun"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    answers = []
    for question in questions:
        ids = tokenizer(question + " ", add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    path = rows_file(tmp_path, rows)
    data = prepared("sft", tokenizer, train=None, eval=path, metrics=["exact_match", "rouge", "bleu"])
    result = equal_everywhere(model, data, max_new_tokens=8)
    assert result["exact_match"] == 1.0
    assert result["rouge1"] == pytest.approx(1.0)


@needs_shared
@pytest.mark.parametrize("ends", [False, True])
def test_greedy_match_is_what_generation_gives(tmp_path: Path, ends: bool) -> None:
    """Oracle: greedy decoding of each prompt by itself, token for token. The line's end after the end-of-text token is the template's,
    and no model need write it; here the model ends an answer where it would write a full stop."""
    folder = SHARED / "weights/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    after = f"{tokenizer.eos_token}\n" if ends else ""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}" + after + "{% endif %}{% endfor %}"
    )
    if ends:
        head = model.get_output_embeddings().weight.detach().clone()  # tied to the embedding, which is to stay as it is
        head[tokenizer.eos_token_id] = 1.01 * head[tokenizer.convert_tokens_to_ids(".")]
        model.get_output_embeddings().weight = torch.nn.Parameter(head)
    rows = []
    for index, question in enumerate(
        ["Once upon a time,", "Lily", "The big dog was happy. Then", "A dog", "Tom and his mom"]
    ):
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        rows.append({"question": question, "answer": answer if index != 2 else answer + " cat"})
    data = prepared("sft", tokenizer, train=None, eval=rows_file(tmp_path, rows), metrics=["greedy_match"])
    result = equal_everywhere(model, data)
    right = [_is_greedy(model, data.eval[index], tokenizer.eos_token_id) for index in range(len(rows))]
    assert 0 < sum(right) < len(right)
    assert result["greedy_match"] == sum(right) / len(right)
    with torch.no_grad():
        outputs = model(**data.collate([data.eval[index] for index in range(len(rows))]))
    assert result["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)


def _is_greedy(model: Any, example: Any, end: int) -> bool:
    """Whether greedy decoding writes the example's answer, up to the end-of-text token."""
    start = next(place for place, label in enumerate(example["labels"]) if label != -100)
    prompt, answer = example["input_ids"][:start], example["input_ids"][start:]
    answer = answer[: answer.index(end) + 1] if end in answer else answer
    out = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
    return out[0, start:].tolist() == list(answer)


def test_sequence_to_sequence(tmp_path: Path) -> None:
    """Oracle: the model's own mean loss over the whole set; generated text is compared without the prompt."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=258, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    rows = [{"source": word, "target": word[::-1]} for word in words(9)]
    path = rows_file(tmp_path, rows)
    data = prepared("seq2seq", byte_tokenizer(), train=None, eval=path, metrics=["perplexity", "bleu"])
    result = equal_everywhere(model, data, max_new_tokens=5)
    with torch.no_grad():
        outputs = model(**data.collate([data.eval[i] for i in range(9)]))
    assert result["loss"] == pytest.approx(outputs.loss.item(), rel=1e-4)
    assert 0 <= result["bleu"] <= 100


def test_nothing_to_evaluate_on(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": i} for i in range(2)]
    data = prepared("classification", train=rows_file(tmp_path, rows))
    rank: Any = Rank(None, Ranks(1), 0)
    with pytest.raises(UserError, match=r"data\.eval is empty"):
        evaluate(rank, data, recipe_for(data))
