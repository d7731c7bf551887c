"""Preference pairs: their shapes, where labels lie, what is cut, left out and refused."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_sft import CHATML, FORGETFUL, chat_tokenizer, learnt
from test_data_tasks import SHARED, needs_shared, prepared, rows_file
from transformers import AutoTokenizer

from dsfreeze.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


ASKED = [user("One?"), said("1"), user("Two?")]
SHARE = [{"from": "human", "value": "One?"}, gpt("1"), {"from": "human", "value": "Two?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAPES: dict[str, dict[str, Any]] = {
    "texts beside messages": {"system": "Be brief.", "prompt": ASKED, "chosen": "2", "rejected": "3"},
    "messages": {"prompt": [SYSTEM, *ASKED], "chosen": [said("2")], "rejected": [said("3")]},
    "single messages": {"system": "Be brief.", "messages": ASKED, "chosen": said("2"), "rejected": said("3")},
    "LLaMA-Factory's": {"system": "Be brief.", "conversations": SHARE, "chosen": gpt("2"), "rejected": gpt("3")},
    "Alpaca's": {
        "system": "Be brief.", "instruction": "Two?", "input": "", "history": [["One?", "1"]], "chosen": "2", "rejected": "3",
    },
    "whole conversations": {"system": "Be brief.", "chosen": [*ASKED, said("2")], "rejected": [*ASKED, said("3")]},
    "whole beside a prompt": {"prompt": "Two?", "chosen": [SYSTEM, *ASKED, said("2")], "rejected": [SYSTEM, *ASKED, said("3")]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_is_the_same_pair(tmp_path: Path, shape: str) -> None:
    """Oracle: the chat template filled in by hand; labels on the last answer and the mark that ends it, in both sequences."""
    tokenizer = chat_tokenizer()
    data = prepared("preference", tokenizer, train=rows_file(tmp_path, [SHAPES[shape]]))
    before = (
        "<|system|>Be brief.<|end|>\n<|user|>One?<|end|>\n<|assistant|>1<|end|>\n<|user|>Two?<|end|>\n<|assistant|>"
    )
    for answer, text in (("chosen", "2<|end|>\n"), ("rejected", "3<|end|>\n")):
        assert tokenizer.decode(data.train[0][answer]["input_ids"]) == before + text
        assert learnt(data.train[0][answer], tokenizer) == text
    assert data.train.num_items.tolist() == [1]
    assert data.train.num_tokens.tolist() == [sum(len(data.train[0][a]["input_ids"]) for a in ("chosen", "rejected"))]


def test_the_prompt_is_found_by_name(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "no", "query": "Two?", "chosen": "2", "rejected": "3"}]
    named = prepared("preference", tokenizer, train=rows_file(tmp_path, rows), text="query")
    assert tokenizer.decode(named.train[0]["chosen"]["input_ids"]) == "<|user|>Two?<|end|>\n<|assistant|>2<|end|>\n"


def test_earlier_answers_are_written_as_the_template_has_them(tmp_path: Path) -> None:
    """Oracle: by hand, for a template that drops old reasoning."""
    tokenizer = chat_tokenizer(FORGETFUL)
    asked = [user("One?"), said("hm</think>1"), user("Two?")]
    rows = [{"prompt": asked, "chosen": "so</think>2", "rejected": "3"}]
    data = prepared("preference", tokenizer, train=rows_file(tmp_path, rows))
    text = "<|user|>One?<|end|><|assistant|>1<|end|><|user|>Two?<|end|><|assistant|>so</think>2<|end|>"
    assert tokenizer.decode(data.train[0]["chosen"]["input_ids"]) == text


def test_a_batch_has_chosen_and_rejected_in_turn(tmp_path: Path) -> None:
    """Oracle: the pairs' own tokens, padded on the right; an item is a pair; sequences by themselves are padded alike."""
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "a" * i, "chosen": "b" * (2 * i), "rejected": "c" * 3} for i in (1, 4)]
    data = prepared("preference", tokenizer, train=rows_file(tmp_path, rows))
    batch = data.collate([data.train[1], data.train[0]])
    wanted = [data.train[i][answer] for i in (1, 0) for answer in ("chosen", "rejected")]
    for row, sequence in enumerate(wanted):
        length = len(sequence["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sequence["input_ids"]
        assert batch["labels"][row].tolist() == sequence["labels"] + [-100] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][row].sum() == length
    assert data.num_items(batch) == 2
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(data.collate(wanted)["input_ids"], batch["input_ids"])
    assert data.train.sequences_of([1, 0]) == [2, 3, 0, 1]
    assert [data.train.sequences[i] for i in (2, 3, 0, 1)] == wanted


def test_a_long_answer_loses_its_end(tmp_path: Path) -> None:
    """Oracle: the same pair uncut, its tokens beyond data.max_length dropped."""
    tokenizer = chat_tokenizer()
    path = rows_file(tmp_path, [{"prompt": "why", "chosen": "b" * 50, "rejected": "c"}])
    whole = prepared("preference", tokenizer, train=path).train[0]
    cut = prepared("preference", tokenizer, train=path, max_length=60).train[0]
    assert cut["rejected"] == whole["rejected"]
    assert cut["chosen"]["input_ids"] == whole["chosen"]["input_ids"][:60]
    assert cut["chosen"]["labels"] == whole["chosen"]["labels"][:60]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x" * 80, "chosen": "y", "rejected": "z"},
        {"prompt": "x", "chosen": "y" * 80 + "a", "rejected": "y" * 80 + "b"},
    ],
    ids=["no room for an answer", "answers that differ beyond the cut"],
)
def test_pairs_that_can_teach_nothing_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: dict[str, str]
) -> None:
    rows = [row, {"prompt": "x", "chosen": "y", "rejected": "z"}]
    with caplog.at_level(logging.WARNING):
        data = prepared("preference", chat_tokenizer(), train=rows_file(tmp_path, rows), max_length=60)
    assert len(data.train) == 1
    assert learnt(data.train[0]["rejected"], chat_tokenizer()) == "z<|end|>\n"
    assert "left out 1 of 2 examples" in caplog.text
    lack = r"all 1 examples are without two answers that begin, and differ, within data\.max_length = 60"
    with pytest.raises(UserError, match=lack):
        prepared("preference", chat_tokenizer(), train=rows_file(tmp_path, [row]), max_length=60)


GOOD = {"prompt": "Two?", "chosen": "2", "rejected": "3"}
TALK = {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}
ANSWERED = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, {"rejected": "2"}, "'chosen' and 'rejected' are the same: there is nothing to prefer"),
        (GOOD, {"chosen": None}, "'chosen' is missing. Fill it in"),
        (GOOD, {"rejected": " \n"}, "'rejected' is an empty answer"),
        (GOOD, {"prompt": ""}, r"the prompt \('prompt'\) is empty"),
        (TALK, {"chosen": [user("a"), said("c")]}, "'chosen' and 'rejected' are the same"),
        (TALK, {"chosen": [said("b")], "rejected": [said("c")]}, r"the prompt \(what .* begin with alike\) is empty"),
        (TALK, {"chosen": [user("a")]}, "'chosen' holds nothing beyond the prompt"),
        (TALK, {"chosen": [*TALK["chosen"], user("d"), said("e")]}, "'chosen' holds assistant, user, assistant beyond"),
        (TALK, {"chosen": [user("a"), said(" ")]}, "'chosen' is an empty answer"),
        (TALK, {"chosen": []}, "'chosen' is no list of turns, or an empty one"),
        (TALK, {"chosen": [{"role": "usr", "content": "x"}]}, "'chosen': unknown role 'usr'"),
        (TALK, {"chosen": [{"role": "user", "content": None}]}, "'chosen': a turn needs the texts"),
        (ANSWERED, {"prompt": [user("a"), said("b")]}, r"the prompt \('prompt'\) ends with a turn of the assistant"),
        ({"prompt": "a", **TALK}, {"chosen": [said("b")]}, "one of 'chosen' and 'rejected' is a whole conversation"),
    ],
)
def test_mistakes_in_pairs_name_the_row(tmp_path: Path, good: Any, bad: Any, message: str) -> None:
    path = rows_file(tmp_path, [good, {**good, **bad}])
    with pytest.raises(UserError, match=f"row 2: {message}"):
        prepared("preference", chat_tokenizer(), train=path)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "chosen": 1, "rejected": 2}, {}, "row 1: 'chosen' holds 1, which is neither a text nor turns"),
        ({"prompt": "a", "chosen": "b"}, {}, "has no column 'rejected'. Task preference reads 'chosen' and 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, {}, r"row 1: the prompt \(what .* begin with alike\) is empty"),
        (GOOD, {"text": "promt"}, "data.text: .* has no column 'promt'.*Did you mean 'prompt'"),
        (GOOD, {"text": ["prompt", "chosen"]}, "data.text names prompt and chosen; task preference reads the prompt's"),
        (GOOD, {"metrics": ["perplexity"]}, "'perplexity' is not for this task"),
    ],
)
def test_mistakes_in_columns(tmp_path: Path, row: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared("preference", chat_tokenizer(), train=rows_file(tmp_path, [row]), **options)


def test_what_a_template_refuses_names_the_row(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    rows = rows_file(tmp_path, [GOOD, {**GOOD, "prompt": "x"}])
    assert len(prepared("preference", chat_tokenizer(template), train=rows).train) == 2
    rows = rows_file(tmp_path, [{**GOOD, "system": "Be brief."}])
    with pytest.raises(UserError, match="row 1: the chat template refuses these turns: no system turns"):
        prepared("preference", chat_tokenizer(template), train=rows)


@needs_shared
def test_real_pairs() -> None:
    """Oracle: the file itself. This tokenizer's first token of an answer holds the space before it, and counts as the prompt's."""
    path = SHARED / "data/dpo_en_demo/validation.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "weights/stories260K")
    data = prepared("preference", tokenizer, train=str(path), max_length=100_000)
    assert len(data.train) == len(rows) == 50
    for index in (0, 17, 49):
        for answer in ("chosen", "rejected"):
            text = "".join(learnt(data.train[index][answer], tokenizer).replace("</s>", "").split())
            whole = "".join(rows[index][answer]["value"].split())
            assert whole.endswith(text)
            assert len(text) > len(whole) - 8
