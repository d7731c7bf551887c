"""Chats and instructions: their shapes, what the loss falls on, and packing."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_tasks import needs_shared, prepared, rows_file
from tiny_runs import byte_tokenizer
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from dsfreeze.data import check_packing
from dsfreeze.data.packing import fill_bins
from dsfreeze.errors import UserError

SHARED = Path(__file__).parents[1] / "../shared"
STORIES = SHARED / "weights/stories15M"

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: As some reasoning models have it: only the last answer keeps its reasoning.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def chat_tokenizer(template: str = CHATML) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learnt(example: Any, tokenizer: Any) -> str:
    """The labelled text, stretches separated by |."""
    pieces: list[list[int]] = [[]]
    for label in example["labels"]:
        if label == -100:
            pieces.append([])
        else:
            pieces[-1].append(label)
    return "|".join(tokenizer.decode(piece) for piece in pieces if piece)


SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"},
            {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"},
        ],
    },
    "alpaca": {
        "system": "Be brief.", "instruction": "Two?", "input": "", "output": "2", "history": [["One?", "1"]],
    },
    "prompt_completion": {"prompt": CHAT[:4], "completion": CHAT[4:]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_chat_is_the_same_chat(tmp_path: Path, shape: str) -> None:
    """Oracle: the chat template filled in by hand; the loss on each answer with the mark that ends it."""
    tokenizer = chat_tokenizer()
    data = prepared("sft", tokenizer, train=rows_file(tmp_path, [SHAPES[shape]]))
    text = "<|system|>Be brief.<|end|>\n<|user|>One?<|end|>\n<|assistant|>1<|end|>\n"
    text += "<|user|>Two?<|end|>\n<|assistant|>2<|end|>\n"
    assert tokenizer.decode(data.train[0]["input_ids"]) == text
    assert learnt(data.train[0], tokenizer) == "1<|end|>\n|2<|end|>\n"


def test_questions_answers_and_instructions_with_input(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    rows = [{"question": "6 x 7?", "answer": "42"}]
    asked = prepared("sft", tokenizer, train=rows_file(tmp_path, rows), answer_only=False)
    assert learnt(asked.train[0], tokenizer) == "<|user|>6 x 7?<|end|>\n<|assistant|>42<|end|>\n"
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    told = prepared("sft", tokenizer, train=rows_file(tmp_path, rows))
    assert tokenizer.decode(told.train[0]["input_ids"]) == "<|user|>Add.\n\n1 2<|end|>\n<|assistant|>3<|end|>\n"
    named = prepared("sft", tokenizer, train=rows_file(tmp_path, rows), text=["input", "output"])
    assert tokenizer.decode(named.train[0]["input_ids"]) == "<|user|>1 2<|end|>\n<|assistant|>3<|end|>\n"


def test_a_template_that_rewrites_earlier_turns_gives_an_example_each(tmp_path: Path) -> None:
    """Oracle: the contexts in which the model would give each answer, by hand."""
    tokenizer = chat_tokenizer(FORGETFUL)
    chat = [dict(turn) for turn in CHAT[1:]]
    for turn in (1, 3):
        chat[turn]["content"] = f"hm</think>{chat[turn]['content']}"
    data = prepared("sft", tokenizer, train=rows_file(tmp_path, [{"messages": chat}]))
    assert [tokenizer.decode(data.train[i]["input_ids"]) for i in range(len(data.train))] == [
        "<|user|>One?<|end|><|assistant|>hm</think>1<|end|>",
        "<|user|>One?<|end|><|assistant|>1<|end|><|user|>Two?<|end|><|assistant|>hm</think>2<|end|>",
    ]
    assert [learnt(data.train[i], tokenizer) for i in range(2)] == ["hm</think>1<|end|>", "hm</think>2<|end|>"]


def test_a_tokenizer_without_template_gets_a_plain_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.WARNING):
        data = prepared("sft", tokenizer, train=rows_file(tmp_path, [{"question": "Who?", "answer": "Me."}]))
    assert "no chat template" in caplog.text
    assert tokenizer.chat_template
    assert tokenizer.decode(data.train[0]["input_ids"]) == "User: Who?\nAssistant:\nMe.</s>\n"
    assert learnt(data.train[0], tokenizer) == "Me.</s>\n"


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not at hand: a sentencepiece tokenizer")
def test_the_plain_template_lets_the_first_word_be_learnt(tmp_path: Path) -> None:
    """A sentencepiece tokenizer joins a blank to the word behind it: after `Assistant: ` an answer of one word would be part of the
    prompt. Oracle: the tokens learnt and the tokens of the prompt are those of the chat, cut in two."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    path = rows_file(tmp_path, [{"question": "Good or bad?", "answer": "bad"}])
    data = prepared("sft", tokenizer, train=path, eval=path, metrics=["exact_match"])
    ids = data.train[0]["input_ids"]
    assert learnt(data.train[0], tokenizer).startswith("bad</s>")
    assert data.prompts.input_ids[0] == ids[: len(data.prompts.input_ids[0])]
    answer = [label for label in data.train[0]["labels"] if label != -100]
    assert [*data.prompts.input_ids[0], *answer] == ids


def test_prompts_end_where_the_answer_begins(tmp_path: Path) -> None:
    """Oracle: prompt and reference put together are the whole chat; a long prompt loses its beginning."""
    tokenizer = chat_tokenizer()
    path = rows_file(tmp_path, [{"messages": CHAT}])
    prompts = prepared("sft", tokenizer, train=None, eval=path, metrics=["rouge"]).prompts
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert whole.startswith(tokenizer.decode(prompts.input_ids[0]) + "2")
    assert prompts.references == ["2"]
    cut = prepared("sft", tokenizer, train=None, eval=path, metrics=["bleu"], max_length=100).prompts
    assert cut.input_ids[0] == prompts.input_ids[0][-100:]
    assert prepared("sft", tokenizer, train=None, eval=path).prompts is None  # no metric asks for them


def test_chats_whose_answer_is_cut_off_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "x" * 80, "answer": "y"}, {"question": "x", "answer": "y"}]
    with caplog.at_level(logging.WARNING):
        data = prepared("sft", chat_tokenizer(), train=rows_file(tmp_path, rows), max_length=60)
    assert len(data.train) == 1
    assert "left out 1 of 2 examples" in caplog.text
    with pytest.raises(
        UserError, match=r"all \d+ examples are without an answer that begins within data\.max_length = 30"
    ):
        prepared("sft", chat_tokenizer(), train=rows_file(tmp_path, rows), max_length=30)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"messages": [{"role": "usr", "content": "x"}]}, {}, "row 2: 'messages': unknown role 'usr'.*'user'"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "row 2: no turn of the assistant"),
        ({"messages": []}, {}, "row 2: 'messages' is no list of turns, or an empty one"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "row 2: 'messages': a turn needs the texts"),
        ({"messages": CHAT}, {"format": "alpaca"}, "format: alpaca: .*no column 'instruction'"),
        ({"messages": CHAT}, {"text": ["messages", "messages"], "format": "messages"}, r"reads 1 column\(s\)"),
    ],
)
def test_mistakes_in_chats_name_the_row(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = rows_file(tmp_path, [{"messages": CHAT}, row])
    with pytest.raises(UserError, match=message):
        prepared("sft", chat_tokenizer(), train=path, **options)


def test_an_unknown_shape_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the known shapes \(messages: messages; sharegpt: conversations;"):
        prepared("sft", chat_tokenizer(), train=rows_file(tmp_path, [{"a": "x", "b": "y"}]))


def test_what_a_template_refuses_names_the_row(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="row 1: the chat template refuses these turns: no system turns"):
        prepared("sft", chat_tokenizer(template), train=rows_file(tmp_path, [{"messages": CHAT}]))


# -- packing -------------------------------------------------------------------------------------------------------


def test_bins_hold_everything_once_and_are_nearly_full() -> None:
    """Oracle: counting; best fit decreasing needs at most 11/9 of the fewest possible bins, plus one."""
    lengths = [(7 * i * i) % 97 + 1 for i in range(300)]
    bins = fill_bins(lengths, 100)
    assert Counter(i for members in bins for i in members) == Counter(range(300))
    assert all(sum(lengths[i] for i in members) <= 100 for members in bins)
    assert len(bins) <= 11 / 9 * sum(lengths) / 100 + 1


@needs_shared
@pytest.mark.parametrize(("attention", "answer_only"), [("sdpa", True), ("eager", True), ("sdpa", False)])
def test_packed_loss_is_the_unpacked_loss(tmp_path: Path, attention: str, answer_only: bool) -> None:
    """Oracle: the loss of the same chats one by one, weighted by their items; items and tokens are the same too."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "weights/stories260K")
    answers = ["Once upon a time", "there was", "a little girl named Lily. She", "x", "loved to play outside"]
    path = rows_file(tmp_path, [{"question": f"Tell {i}", "answer": text} for i, text in enumerate(answers)])
    apart = prepared("sft", tokenizer, train=path, max_length=90, answer_only=answer_only)
    packed = prepared("sft", tokenizer, train=path, max_length=90, answer_only=answer_only, packing=True)
    assert len(packed.train) < len(apart.train)
    assert packed.train.num_items.sum() == apart.train.num_items.sum()
    assert packed.train.num_tokens.sum() == apart.train.num_tokens.sum()
    model = LlamaForCausalLM.from_pretrained(SHARED / "weights/stories260K", attn_implementation=attention)

    def total(data: Any, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        loss = torch.zeros(())
        for start in range(0, len(data.train), size):
            rows = range(start, min(start + size, len(data.train)))
            batch = data.collate([data.train[i] for i in rows])
            items = data.num_items(batch)
            assert items == data.train.num_items[list(rows)].sum()
            loss = loss + model(**batch, use_cache=False).loss * items / data.train.num_items.sum()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    (loss, gradients), (expected, wanted) = total(packed, 2), total(apart, 1)
    assert torch.isclose(loss, expected, rtol=1e-6)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=5e-6)  # sums in another order


def test_a_model_that_cannot_keep_examples_apart_is_refused() -> None:
    """Oracle: Llama honours position_ids; Bloom's positions come from the attention mask alone."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "vocab_size": 64}
    llama = LlamaForCausalLM(
        LlamaConfig(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2, **shape)
    ).eval()
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, initializer_range=0.2, **shape)).eval()
    with torch.no_grad():
        check_packing(lambda batch: llama(**batch, use_cache=False), 64)
        with pytest.raises(UserError, match=r"data\.packing: this model"):
            check_packing(lambda batch: llama(**batch, use_cache=True), 64)  # transformers then ignores the starts
        with pytest.raises(UserError, match=r"data\.packing: this model"):
            check_packing(lambda batch: bloom(**batch, use_cache=False), 64)
