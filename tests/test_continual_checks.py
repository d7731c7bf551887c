"""What is refused before a model is loaded. Oracles: rows written so that exactly one thing is wrong, and counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from continual_kit import probe_of, rows_of, sequence, task_of, write_lines
from rich.console import Console

from dsfreeze.continual import rounds
from dsfreeze.continual.checks import bad_pairs, clashes, wording
from dsfreeze.continual.prepare import prepare
from dsfreeze.continual.reading import read_course
from dsfreeze.errors import UserError


def row(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def labelled(frame: str, labels: str, start: int = 0) -> list[dict[str, Any]]:
    """Twelve rows whose prompts have nothing in common but the frame's two ends, each label in turn."""
    texts = [f"{chr(97 + n)}{start + n}{chr(109 - n)}" for n in range(12)]
    return [row(frame.format(text), labels[n % len(labels)]) for n, text in enumerate(texts)]


@pytest.mark.parametrize(("one", "other", "clash"), [
    (labelled("{}", "ab"), labelled("{}", "xy", 50), "nothing in their prompts tells them apart"),
    (labelled("Q: {}?", "ab"), labelled("Q: {}?", "abc", 50), r"\('a', 'b' against 'a', 'b', 'c'\)"),
    (labelled("{}", "ab"), labelled("{}", "ba", 50), None),  # the same labels
    (labelled("{}", "ab"), labelled("News: {}", "xy", 50), None),  # a frame that tells
    (labelled("{}", "ab"), labelled("{} It is", "xy", 50), None),
    (labelled("{}", "ab"), labelled("{}", "uvwxyz123456", 50), None),  # every answer once: no closed set
    (labelled("Q: {}", "ab"), labelled("Q: {}", "xy"), "12 prompts are in both with other answers, such as 'Q: a0m': 'a' in the one, 'x'"),
    (labelled("Q: {}", "ab"), labelled("Q: {}", "ab"), None),  # the same rows
])  # fmt: skip
def test_clashes(one: list[Any], other: list[Any], clash: str | None) -> None:
    found = list(clashes([wording("one", one), wording("other", other)]))
    assert len(found) == (clash is not None)
    if clash is not None:
        with pytest.raises(UserError, match=f"tasks 'one' and 'other' clash: .*{clash}"):
            raise UserError(found[0])


def test_three_tasks_make_three_pairs() -> None:
    tasks = [
        wording(name, labelled("{}", labels, n))
        for n, (name, labels) in enumerate((("a", "ab"), ("b", "xy"), ("c", "12")))
    ]
    assert len(list(clashes(tasks))) == 3


@pytest.mark.parametrize(("chosen", "rejected", "told"), [
    ("yes", "no", None),
    ("yes", " yes\n", "have the same answer twice"),
    ({"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "yes"}, "have the same answer twice"),
    ({"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}, None),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}], None),
    ("", "no", "lack an answer"), (None, "no", "lack an answer"), ("yes", {"from": "gpt", "value": ""}, "lack an answer"),
])  # fmt: skip
def test_pairs(chosen: Any, rejected: Any, told: str | None) -> None:
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": chosen, "rejected": rejected}]
    found = list(bad_pairs("likes", "train", rows))
    assert found == (
        [] if told is None else [f"'likes', train: 1 of 2 rows {told}, the first of them row 2. Drop them."]
    )


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    """Before any model is loaded: there is none at the path."""
    empty = {
        "train": write_lines(tmp_path / "empty.jsonl", []),
        "eval": write_lines(tmp_path / "e.jsonl", rows_of("one", "eval", 2)),
    }
    holed = {"train": write_lines(tmp_path / "h.jsonl", [{"text": "a", "label": None}]), "eval": empty["eval"]}
    tasks = [
        task_of(tmp_path, "one", prompt="{txt}"),
        task_of(tmp_path, "two", prompt="{text}"),
        {**task_of(tmp_path, "three", prompt="{text}"), "data": {**task_of(tmp_path, "three")["data"]}},
        {**task_of(tmp_path, "one"), "name": "empty", "data": empty},
        {**task_of(tmp_path, "one"), "name": "holed", "data": holed},
    ]
    path = sequence(
        tmp_path, tasks=tasks, probes=[{**probe_of(tmp_path), "data": {"eval": str(tmp_path / "none.jsonl")}}]
    )
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        rounds.run_course(read_course(path), Console(quiet=True))
    lines = str(error.value).splitlines()
    assert lines[0] == "5 mistakes before the first round:"
    for line, told in zip(lines[1:], (
        "task 'one': .*one_train.jsonl has no column 'txt', which a template names. Did you mean 'text'",
        "task 'empty': data.train: .*empty.jsonl",
        "task 'holed': .*h.jsonl, row 1: 'label' is missing",
        "probe 'cat': data.eval: no file .*none.jsonl",
        "tasks 'two' and 'three' clash",
    ), strict=True):  # fmt: skip
        with pytest.raises(UserError, match=told):
            raise UserError(line)
    assert not (tmp_path / "out" / "results.json").exists()


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    """Tokens are bytes. `User: one: TEXT\\nAssistant:\\n` has 27 of them and the text, an answer its letters, </s> and the line's end."""
    rows = [{"text": "x", "label": "y" * n} for n in (3, 12, 60)] + [{"text": "x" * 99, "label": "y"}]
    data = {role: write_lines(tmp_path / f"long_{role}.jsonl", rows) for role in ("train", "eval")}
    path = sequence(tmp_path, tasks=[{**task_of(tmp_path, "one"), "data": data}], data={"max_length": 32})
    told = r"'one', train: 1 of 4 answers are longer than data.max_length \(32 tokens\); the longest, row 3, has 62.*\n.*'one', eval: 1 of 4"
    with pytest.raises(UserError, match=told):
        prepare(read_course(path))
    found = prepare(read_course(path, ["long_answers=cut"]))["one"]
    assert list(found["notes"]) == [
        "'one', train: of 4 rows 2 lose the end of their answer at data.max_length = 32 tokens, and 1 are left out, whose answer would "
        "begin beyond it",
        "'one', eval: 1 of 4 prompts are longer than data.max_length = 32 tokens and lose their beginning",
    ]


def test_columns_that_cannot_be_mixed(tmp_path: Path) -> None:
    texts = [
        {"name": name, "task": "causal_lm", "data": {"train": write_lines(tmp_path / f"{name}.jsonl", [{column: "ab cd"}] * 9), "eval": str(tmp_path / f"{name}.jsonl"), "text": column}}
        for name, column in (("one", "text"), ("two", "body"))
    ]  # fmt: skip
    prepare(read_course(sequence(tmp_path, tasks=texts)))
    with pytest.raises(UserError, match=r"tasks 'one' and 'two' cannot be mixed .*: one of them alone has body, text"):
        prepare(read_course(sequence(tmp_path, tasks=texts, methods=["replay"])))


def test_shapes_of_chats_are_read_without_templates(tmp_path: Path) -> None:
    """Oracle: the rendered file, by hand; of a chat of several turns the last answer is the completion."""
    chat = [
        {"from": "human", "value": "1?"},
        {"from": "gpt", "value": "one"},
        {"from": "human", "value": "2?"},
        {"from": "gpt", "value": "two"},
    ]
    path = write_lines(tmp_path / "chats.jsonl", [{"conversations": chat}])
    task = {"name": "chats", "data": {"train": path, "eval": path}, "metric": "perplexity"}
    found = prepare(read_course(sequence(tmp_path, tasks=[task])))["chats"]
    assert Path(found["train"]).read_text() == (
        '{"prompt": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "2?"}], '
        '"completion": [{"role": "assistant", "content": "two"}]}\n'
    )
    assert (found["num_train"], found["num_eval"], found["max_new_tokens"]) == (1, 1, None)


def test_samples_are_drawn_once(tmp_path: Path) -> None:
    path = sequence(tmp_path, "one", data={"max_train_examples": 5, "max_eval_examples": 2})
    first, again = (prepare(read_course(path))["one"] for _ in range(2))
    assert (first["num_train"], first["num_eval"]) == (5, 2)
    assert first == again
