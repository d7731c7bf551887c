"""The plan as a value. Oracle: definitions written out by hand."""

from __future__ import annotations

import json

import pytest

from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Mask, Phase, Rate

A, B, C = ("a.weight",), ("b.weight",), ("a.weight", "b.weight")
PLAN = FreezePlan(
    "made", (Phase(0, 2, A), Phase(2, 3, B, lr_step=0), Phase(5, 1, A), Phase(6, None, C)), state="offload",
    rewarmup_steps=2, rates=(Rate("layers.0", 0.5, 4),), decide_at=9,
    masks=(Mask("a.weight", 2, rows=((0, 1), (3, 4))), Mask("b.weight", 5, share=0.5, seed=1)),
)  # fmt: skip


def test_the_phase_of_a_step():
    assert [PLAN.phase_at(step).first_step for step in (0, 1, 2, 4, 5, 6, 600)] == [0, 0, 2, 2, 5, 6, 6]
    closed = FreezePlan("made", (Phase(0, 2, A), Phase(2, 3, B)))
    assert closed.phase_at(9) == closed.phases[-1]


def test_json_and_back_keeps_everything_and_writes_a_set_once():
    again = FreezePlan.from_json(PLAN.to_json())
    assert (again, again.digest) == (PLAN, PLAN.digest)
    assert json.loads(PLAN.to_json())["sets"] == [list(A), list(B), list(C)]


def test_the_json_of_a_plan_is_what_other_versions_read():
    """Oracle: written out. Its digest is in checkpoints and exports; a plan without masks has the one it had before there were any."""
    plan = FreezePlan("made", (Phase(0, 2, A), Phase(2, None, B)), state="clear")
    written = json.loads(plan.to_json())
    digest = written.pop("digest")
    assert written == {
        "adapter": None, "decide_at": None, "drop_master": False, "notes": [], "phases": [[0, 2, 0, None], [2, None, 1, None]],
        "rates": [], "rewarmup_steps": 0, "sets": [["a.weight"], ["b.weight"]], "state": "clear", "strategy": "made",
    }  # fmt: skip
    assert digest == plan.digest
    none = {"share": None, "seed": None, "file": None, "sha256": None}
    assert json.loads(PLAN.to_json())["masks"] == [
        {**none, "tensor": "a.weight", "trained": 2, "rows": [[0, 1], [3, 4]]},
        {**none, "tensor": "b.weight", "trained": 5, "rows": [], "share": 0.5, "seed": 1},
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"phases": (Phase(0, None, A),)}, {"state": "keep"}, {"rewarmup_steps": 3}, {"rates": ()}, {"decide_at": 8},
        {"masks": ()}, {"masks": (PLAN.masks[0], Mask("b.weight", 5, share=0.5, seed=2))},
        {"phases": (*PLAN.phases[:1], Phase(2, 3, B), *PLAN.phases[2:])},
    ],
    ids=str,
)  # fmt: skip
def test_the_digest_tells_plans_apart(change):
    assert FreezePlan(**{**vars_of(PLAN), **change}).digest != PLAN.digest


def test_strategy_and_notes_are_not_in_the_digest():
    assert FreezePlan(**{**vars_of(PLAN), "strategy": "other", "notes": ("told",)}).digest == PLAN.digest


def vars_of(plan):
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def test_until_is_what_was_done():
    assert PLAN.until(4).phases == (Phase(0, 2, A), Phase(2, 2, B, 0))
    assert PLAN.until(5).ever_trained == {"a.weight", "b.weight"}
    assert PLAN.until(2).ever_trained == {"a.weight"}
    assert PLAN.until(7).phases[-1] == Phase(6, 1, C)
    assert (PLAN.until(2).masks, PLAN.until(3).masks) == (PLAN.masks[:1], PLAN.masks)
    longer = FreezePlan(**{**vars_of(PLAN), "phases": (*PLAN.phases[:3], Phase(6, 5, C), Phase(11, None, A))})
    assert longer.until(8).digest == PLAN.until(8).digest
    assert longer.until(12).digest != PLAN.until(12).digest


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ((), "at least one phase"),
        ((Phase(1, None, A),), "Phase 0 .* starts at step 1 and leaves a gap .* write first_step 0"),
        ((Phase(0, 3, A), Phase(2, None, B)), "Phase 1 .* starts at step 2 and overlaps .* write first_step 3"),
        ((Phase(0, 3, A), Phase(4, None, B)), "Phase 1 .* leaves a gap"),
        ((Phase(0, 0, A),), "has 0 steps"),
        ((Phase(0, None, A), Phase(2, 3, B)), "Phase 0 .* has no end"),
        ((Phase(0, 2, A), Phase(2, None, ())), "nothing to train from step 2 on"),
    ],
)
def test_phases_that_do_not_tile_the_run_are_refused(phases, told):
    with pytest.raises(UserError, match=told):
        FreezePlan("made", phases)


def test_a_master_is_dropped_with_the_moments_or_not_at_all():
    with pytest.raises(UserError, match="drop_master goes with state 'clear'"):
        FreezePlan("made", (Phase(0, None, A),), drop_master=True)


@pytest.mark.parametrize("broken", ['{"a": 1}', "[]", "{", PLAN.to_json().replace('"offload"', '"keep"')])
def test_what_is_no_plan_is_refused(broken):
    with pytest.raises(UserError, match=r"Not a freeze plan|changed by hand"):
        FreezePlan.from_json(broken)
