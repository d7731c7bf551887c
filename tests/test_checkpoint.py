"""Checkpoints: what is written comes back bit for bit, and what is not whole is refused by name. Oracle: bit-identity."""

import json
import os
import shutil
from threading import Event

import pytest
import torch

from dsfreeze import checkpoint as checkpoints
from dsfreeze.checkpoint import Base
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Phase

BASE = Base("tiny", "abc" * 10, "anatomy-digest")
PLAN = FreezePlan("top", (Phase(0, None, ("a.weight", "b.weight")),))


def state(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {
            "weight": torch.randn(4, 3, generator=generator).bfloat16(),
            "master": torch.randn(4, 3, generator=generator),
            "exp_avg": torch.randn(4, 3, generator=generator),
            "exp_avg_sq": torch.rand(4, 3, generator=generator),
            "step": torch.tensor(7.0),
        }
        for name in ("a.weight", "b.weight")
    }


def write(folder, step=10, **options):
    return checkpoints.save(folder, step, state(step), PLAN, BASE, {"loader": {"epoch": 1}}, **options)


def test_round_trip_is_bit_identical(tmp_path):
    found = checkpoints.open_checkpoint(write(tmp_path))
    back = found.state()
    for name, entry in state(10).items():
        assert {k: v.dtype for k, v in back[name].items()} == {k: v.dtype for k, v in entry.items()}
        assert all(torch.equal(back[name][kind], value) for kind, value in entry.items())
    assert found.step == 10
    assert found.trainer_state == {"global_step": 10, "loader": {"epoch": 1}}


def test_a_search_goes_on_beside_its_caller(tmp_path, monkeypatch):
    """Oracle: the newest is looked at before anybody asks, and told of by who asks: a thread's warning would be nobody's."""
    write(tmp_path, 1)
    (write(tmp_path, 2) / "weights.safetensors").write_bytes(b"cut short")
    looked, real = Event(), checkpoints.sha256_of

    def watched(path):
        if path.parent.name == "checkpoint-1":
            looked.set()
        return real(path)

    monkeypatch.setattr(checkpoints, "sha256_of", watched)
    search = checkpoints.Search(tmp_path, True)
    assert looked.wait(10)
    with pytest.warns(UserWarning, match="Passed over: .*checkpoint-2"):
        assert search.result().step == 1
    missing = checkpoints.Search(tmp_path, tmp_path / "checkpoint-7")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        missing.result()


def test_where_a_search_may_find_none(tmp_path):
    """Oracle: False and None want none; `auto` takes one where one of ours lies, and complains where none of ours is whole."""
    assert checkpoints.Search(tmp_path, "auto").result() is None
    (tmp_path / "checkpoint-9").mkdir()  # another tool's
    assert checkpoints.Search(tmp_path, "auto").result() is None
    path = write(tmp_path, 2)
    assert [checkpoints.Search(tmp_path, wanted).result() for wanted in (False, None)] == [None, None]
    with pytest.warns(UserWarning, match="Passed over: .*checkpoint-9"):
        assert checkpoints.Search(tmp_path, "auto").result().step == 2
    (path / "weights.safetensors").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="Passed over"), pytest.raises(UserError, match="none of them is whole"):
        checkpoints.Search(tmp_path, "auto").result()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("plan"), "'plan'"),
        (lambda m: m.update(base={"name": "tiny"}), "'base' is not what a checkpoint has there"),
        (lambda m: m.update(base={**m["base"], "hash": 7}), "'base' is not what"),
        (lambda m: m.update(tensors={"a.weight": [4, 3]}), "'tensors' is not what"),
        (lambda m: m.update(step="10"), "'step' is not what"),
        (lambda m: m.update(sha256=[]), "'sha256' is not what"),
    ],
)
def test_a_manifest_that_was_changed_by_hand(tmp_path, change, told):
    """Oracle: the file and the key, by name; and the one before it is gone on from."""
    write(tmp_path, 1)
    path = write(tmp_path, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"manifest.json cannot be read: .*{told}"):
        checkpoints.open_checkpoint(path.parent)
    with pytest.warns(UserWarning, match="Passed over"):
        assert checkpoints.find_checkpoint(tmp_path, True).step == 1


def test_a_manifest_of_brackets(tmp_path):
    """Oracle: Python's reader gives up on it with a RecursionError."""
    path = write(tmp_path, 2) / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(RecursionError):
        json.loads(path.read_text())
    with pytest.raises(UserError, match="nested too deeply"):
        checkpoints.open_checkpoint(path.parent)


def test_newest_is_found_by_number_not_by_letters(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert checkpoints.find_checkpoint(tmp_path, True).step == 100


def test_keep_drops_the_oldest_only_after_the_new_one_is_whole(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("name", [checkpoints.WEIGHTS, checkpoints.STATE, checkpoints.TRAINER, checkpoints.MANIFEST])
def test_a_truncated_file_is_named_and_the_other_checkpoint_offered(tmp_path, name):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name) as caught:
        checkpoints.open_checkpoint(folder)
    assert "checkpoint-1" in str(caught.value)


def test_a_flipped_bit_is_noticed(tmp_path):
    folder = write(tmp_path)
    content = bytearray((folder / checkpoints.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / checkpoints.WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="changed since it was written"):
        checkpoints.open_checkpoint(folder)


def test_another_plan_is_refused_with_both_differences(tmp_path):
    found = checkpoints.open_checkpoint(write(tmp_path))
    other = FreezePlan("bottom", (Phase(0, None, ("b.weight", "c.weight")),))
    with pytest.raises(UserError, match=r"'top'.*'bottom'.*a\.weight.*c\.weight"):
        checkpoints.require_same(found, other, BASE)
    checkpoints.require_same(found, PLAN, BASE)


def test_another_model_is_refused_with_both_names(tmp_path):
    found = checkpoints.open_checkpoint(write(tmp_path))
    with pytest.raises(UserError, match=r"'tiny'.*'other'"):
        checkpoints.require_same(found, PLAN, Base("other", "def" * 10, "anatomy-digest"))


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    """Oracle: the old checkpoint still verifies, and nothing half-written stays."""
    write(tmp_path, 1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*Earlier checkpoints are intact"):
        write(tmp_path, 2, keep=1)
    assert checkpoints.find_checkpoint(tmp_path, True).step == 1
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"]


def test_rewriting_a_step_replaces_it(tmp_path):
    write(tmp_path, 1)
    checkpoints.save(tmp_path, 1, state(5), PLAN, BASE, {})
    back = checkpoints.find_checkpoint(tmp_path, True).state()
    assert torch.equal(back["a.weight"]["weight"], state(5)["a.weight"]["weight"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"]


def test_nothing_to_resume_from_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.find_checkpoint(tmp_path, True)
    with pytest.raises(UserError, match=r"manifest\.json"):
        checkpoints.find_checkpoint(tmp_path, tmp_path / "checkpoint-5")


def test_a_plan_changed_by_hand_in_the_manifest_is_refused(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / checkpoints.MANIFEST).read_text())
    manifest["plan"]["sets"][0] = ["a.weight"]
    (folder / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="changed by hand"):
        checkpoints.require_same(checkpoints.open_checkpoint(folder), PLAN, BASE)


@pytest.mark.parametrize("damage", ["empty", "truncated", "unreadable"])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over_with_a_warning(tmp_path, damage):
    """Oracle: the one before it, which still verifies; the warning names the damaged one. A path names what must be whole."""
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "truncated":
        (folder / checkpoints.STATE).write_bytes(b"")
    else:
        (folder / checkpoints.MANIFEST).unlink()
        (folder / checkpoints.MANIFEST).mkdir()
    with pytest.warns(UserWarning, match=r"Passed over: .*checkpoint-2"):
        assert checkpoints.find_checkpoint(tmp_path, True).step == 1
    with pytest.raises(UserError, match=r"checkpoint-2.*Others in .*: checkpoint-1;"):
        checkpoints.find_checkpoint(tmp_path, folder)


def test_when_no_checkpoint_is_whole_all_are_named(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / checkpoints.WEIGHTS).unlink()
    with (
        pytest.warns(UserWarning, match="Passed over"),
        pytest.raises(UserError, match="checkpoint-1, checkpoint-2: none of them is whole"),
    ):
        checkpoints.find_checkpoint(tmp_path, True)


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(tmp_path):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / checkpoints.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="has format 99"):
        checkpoints.find_checkpoint(tmp_path, True)


def test_keep_spares_the_one_just_written_whatever_its_number(tmp_path):
    """Oracle: the folders by hand; a run that resumed from 100 writes 200 beside 500 and 1000."""
    for step in (100, 500, 1000):
        write(tmp_path, step)
    write(tmp_path, 200, keep=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-200", "checkpoint-1000"]
    write(tmp_path, 300, keep=1)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-300"]


def trainers(folder, step):
    """What transformers' Trainer leaves: the same name, other files."""
    theirs = folder / f"checkpoint-{step}"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes(b"theirs")
    (theirs / "trainer_state.json").write_text("{}")
    return theirs


def test_a_checkpoint_of_another_program_is_never_removed(tmp_path):
    """Oracle: its bytes afterwards; it counts neither for `keep` nor as the newest, and a clash of names renames it."""
    theirs = trainers(tmp_path, 1)
    for step in (2, 3):
        write(tmp_path, step, keep=1)
    assert (theirs / "model.safetensors").read_bytes() == b"theirs"
    trainers(tmp_path, 500)
    with pytest.warns(UserWarning, match=r"checkpoint-500 .*manifest\.json"):
        assert checkpoints.find_checkpoint(tmp_path, True).step == 3
    with pytest.warns(
        UserWarning, match=r"checkpoint-500 is no checkpoint of dsfreeze; it is now .*abandoned-checkpoint-500"
    ):
        write(tmp_path, 500)
    assert (tmp_path / "abandoned-checkpoint-500" / "model.safetensors").read_bytes() == b"theirs"
    assert checkpoints.find_checkpoint(tmp_path, True).step == 500


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path, 1)
    real = shutil.rmtree

    def refuse(folder, *args, **options):
        if folder.name == "checkpoint-1":
            raise PermissionError(13, "Permission denied")
        return real(folder, *args, **options)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match=r"Could not remove .*checkpoint-1: .*Permission denied"):
        assert write(tmp_path, 2, keep=1).name == "checkpoint-2"


def test_checkpoints_of_an_abandoned_branch_are_set_aside(tmp_path):
    """Oracle: the weights that were there, under the new names, and the newest that is left."""
    for step in (100, 500, 1000):
        write(tmp_path, step)
    (tmp_path / "abandoned-checkpoint-500").mkdir()
    theirs = trainers(tmp_path, 700)
    assert [p.name for p in checkpoints.set_aside_later(tmp_path, 100)] == [
        "abandoned-checkpoint-500-2",
        "abandoned-checkpoint-1000",
    ]
    assert theirs.is_dir()
    back = checkpoints.open_checkpoint(tmp_path / "abandoned-checkpoint-1000").state()
    assert torch.equal(back["a.weight"]["weight"], state(1000)["a.weight"]["weight"])
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-100"]
    assert checkpoints.set_aside_later(tmp_path, 100) == []
    assert checkpoints.set_aside_later(tmp_path / "not-there", 100) == []


def test_a_branch_that_cannot_be_set_aside_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, 5)
    monkeypatch.setattr(type(tmp_path), "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(UserError, match="after step 1"):
        checkpoints.set_aside_later(tmp_path, 1)
