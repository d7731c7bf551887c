"""The planner: tables over strategies, stages and clusters, what fits, calibration. Oracles: closed forms, exhaustive search, the
prices that the table's own cells are made of."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from test_core_imports import heavy_after

from dsfreeze.cli import run
from dsfreeze.errors import UserError
from dsfreeze.hardware import find_device
from dsfreeze.planner.caching import cache_of
from dsfreeze.planner.calibration import calibrate
from dsfreeze.planner.fit import WAYS, Fit
from dsfreeze.planner.request import Request, make_planner, parse_budget, parse_gpus, words_of
from dsfreeze.planner.sweep import RESERVED, STRATEGIES, Ground, advice, cell, plans_of, rows_as_dicts, sweep
from dsfreeze.recipe import FreezeOptions
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.setting import Workload, workload_of
from dsfreeze.shapes import SHAPES, known_activations, known_anatomy
from dsfreeze.strategies import make_plan

GIB = 2**30


def ground_of(model: str = "qwen2.5-0.5b", device: str = "h100", **more) -> Ground:
    anatomy, activations = known_anatomy(model, "causal_lm", None), known_activations(model)
    assert anatomy is not None
    assert activations is not None
    return Ground(
        anatomy, activations.of("causal_lm", None, 2), Workload(), find_device(device), sequence_length=1024, **more
    )


@pytest.fixture(scope="module")
def ground() -> Ground:
    return ground_of()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_priced(name):
    """Oracle: each shipped shape has a profile that fits its anatomy: as many layers, and no cause that names no tensor."""
    anatomy, activations = known_anatomy(name, "causal_lm", None) if "bert" not in name else known_anatomy(
        name, "classification", 2), known_activations(name)  # fmt: skip
    assert activations is not None
    assert len(activations.kinds) == len(anatomy.blocks)
    task = "classification" if "bert" in name else "causal_lm"
    found = activations.of(task, None, 2)
    for part, layer in zip(found.blocks, anatomy.blocks, strict=True):
        names = {t.name.removeprefix(layer.path + ".") for t in layer.tensors}
        assert {c.rstrip(">") for s in part.stored for c in s.causes} <= names | {""}
    ends = {t.name for layer in anatomy.layers if not layer.is_block for t in layer.tensors}
    assert {c for part in (found.ends.embed, found.ends.end) for s in part.stored for c in s.causes} <= ends | {""}
    full = found.passes(anatomy, [t.name for t in anatomy.tensors], 1, 128)
    assert full.total > found.passes(anatomy, [t.name for t in anatomy.blocks[-1].tensors], 1, 128).total > 0


class TestSweep:
    def test_a_row_for_each_plan_and_stage(self, ground):
        plans, left_out = plans_of(ground.anatomy, STRATEGIES, None)
        rows = sweep(ground, plans, (1, 8))
        assert [(r.strategy, r.stage) for r in rows] == [(s, z) for s in STRATEGIES for z in range(4)]
        assert left_out == {}
        assert all([at.gpus for at in row.cells] == [1, 8] for row in rows)

    def test_what_a_model_cannot_have_is_told(self):
        anatomy = known_anatomy("llama-3-8b", "causal_lm", None)
        plans, left_out = plans_of(anatomy, {"bitfit": {"strategy": "bitfit"}, "full": {"strategy": "full"}}, None)
        assert list(plans) == ["full"]
        assert "bias" in left_out["bitfit"]

    def test_fits_is_the_peak_against_the_device(self, ground):
        """Oracle: the definition, with the framework's share kept free, or the budget as it stands."""
        plans, _ = plans_of(ground.anatomy, {"full": {"strategy": "full"}}, None)
        (row,) = sweep(ground, plans, (1,), (0,))
        peak = row.cells[0].price.peaks.most
        assert row.cells[0].fits == (peak <= find_device("h100").memory - RESERVED)
        for budget, fits in ((peak, True), (peak - 1, False)):
            (row,) = sweep(replace(ground, budget=budget), plans, (1,), (0,))
            assert row.cells[0].fits is fits

    def test_ranks_of_a_cpu_share_its_memory(self):
        ground = ground_of(device="cpu")
        shared = find_device("cpu").per_node
        assert ground.usable(1) == find_device("cpu").memory
        assert ground.usable(64) == find_device("cpu").memory // shared

    def test_advice_is_the_fastest_stage_that_fits(self, ground):
        """Oracle: by hand from the rows; a higher stage must be faster by more than ten per cent."""
        plans, _ = plans_of(ground.anatomy, STRATEGIES, None)
        rows = sweep(ground, plans, (8,))
        for strategy, stage in advice(rows, 0).items():
            mine = {r.stage: r.cells[0] for r in rows if r.strategy == strategy and r.cells[0].fits}
            fastest = min(at.seconds.total for at in mine.values())
            assert mine[stage].seconds.total <= fastest / 0.9**3
            assert all(mine[lower].seconds.total > mine[stage].seconds.total for lower in mine if lower < stage)

    def test_a_frozen_giant_is_not_advised_stage_3_where_lower_ones_fit(self):
        """Oracle: the reports of users: 33e9 frozen parameters, few that train, 8 devices: stage 3 gathers them each pass for
        nothing where they fit whole."""
        ground = ground_of("qwen2.5-32b", "h200")
        plans, _ = plans_of(ground.anatomy, {"last": {"count": 63}}, None)
        rows = sweep(replace(ground, workload=Workload(gradient_checkpointing=True)), plans, (8,))
        assert advice(rows, 0)["last"] in (0, 1, 2)
        by_stage = {row.stage: row.cells[0].price.states.weights for row in rows}
        assert by_stage[2] == pytest.approx(65.5e9, rel=0.01)
        assert by_stage[3] == pytest.approx(65.5e9 / 8, rel=0.01)

    def test_nothing_is_advised_where_nothing_fits(self, ground):
        plans, _ = plans_of(ground.anatomy, {"full": {"strategy": "full"}}, None)
        assert advice(sweep(replace(ground, budget=GIB // 4), plans, (1,)), 0) == {"full": None}

    def test_plain_values(self, ground):
        plans, _ = plans_of(ground.anatomy, {"full": {"strategy": "full"}}, None)
        rows = sweep(ground, plans, (2,), (1,))
        (entry,) = json.loads(json.dumps(rows_as_dicts(ground, rows)))
        at = rows[0].cells[0]
        assert entry["peak_bytes"] == max(entry["peaks"].values()) == at.price.peaks.most
        assert entry["seconds_per_step"] == pytest.approx(sum(entry["seconds"].values()))
        assert entry["tokens_per_second"] == pytest.approx(2 * 1024 / entry["seconds_per_step"])
        assert entry["flops_per_step"] == 1024 * entry["flops_per_token"]


class TestFit:
    @pytest.mark.slow
    def test_against_exhaustive_search(self):
        """Oracle: every number of layers, every way, tried one by one."""
        ground = ground_of("smollm2-135m", budget=GIB)
        fit = Fit(ground, 1)
        fitting = {n: fit.best(n) for n in range(1, 31)}
        most = max(n for n, found in fitting.items() if found)
        assert fit.most_layers() == most
        best = max((found for found in fit._ways(most) if found.at.fits), key=lambda found: found.at.tokens_per_second)
        assert fit.choices()[0] == best

    def test_everything_fits_a_large_device(self):
        fit = Fit(ground_of("smollm2-135m", "h200"), 1)
        chosen = fit.choices()[0]
        assert (chosen.trained, chosen.offload) == (30, False)

    @pytest.mark.slow
    def test_a_smaller_budget_never_trains_more(self):
        counts = [Fit(ground_of("smollm2-135m", budget=b * GIB // 4), 1).most_layers() for b in (8, 4, 3, 2)]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < counts[0]

    def test_nothing_fits(self):
        """Oracle: the sentence says that the weights are too much, what is nearest, and what would help."""
        with pytest.raises(UserError, match=r"weights alone take.*nearest.*ZeRO-\d.*More devices"):
            Fit(ground_of(budget=GIB // 2), 1).choices()

    def test_a_global_batch_is_kept(self):
        """Oracle: sequences of a step, on every way that is offered."""
        fit = Fit(ground_of("smollm2-135m"), 4, 24)
        ways = list(fit._ways(30))
        assert {way.micro_batch_size for way in ways} == {1, 2}  # 4 x 4 does not divide 24
        assert all(way.at.price.tokens == 24 // 4 * 1024 for way in ways)

    def test_ways_are_those_that_exist(self):
        assert all(not offload or stage >= 2 for stage, offload in WAYS)


class TestWords:
    def test_a_bare_model_is_a_large_language_model(self):
        recipe = load_recipe(None, words_of(None, "llama-3-8b", 4096, None, None, "h200"))
        train = recipe.train
        assert (recipe.task, recipe.data.max_length) == ("causal_lm", 4096)
        assert (train.bf16, train.gradient_checkpointing, train.per_device_train_batch_size) == (True, True, 1)

    def test_what_is_written_counts(self):
        recipe = load_recipe(None, words_of(["train.bf16=false", "task=sft"], "llama-3-8b", None, 3, False, None))
        train = recipe.train
        assert (recipe.task, train.bf16, train.gradient_checkpointing, train.per_device_train_batch_size) == (
            "sft",
            False,
            False,
            3,
        )

    @pytest.mark.parametrize(("text", "counts"), [
        ("8,16,64", (8, 16, 64)), ("1..8", (1, 2, 4, 8)), ("1..6", (1, 2, 4, 6)), ("3", (3,)), ("64,8,8", (8, 64)),
    ])  # fmt: skip
    def test_gpus(self, text, counts):
        assert parse_gpus(text) == counts

    @pytest.mark.parametrize("text", ["0", "8,", "x", "8..4", "-1", "1e3", "0..8", "99999999", "1...8"])
    def test_wrong_gpus(self, text):
        with pytest.raises(UserError, match="--gpus"):
            parse_gpus(text)

    def test_budget(self):
        assert parse_budget("80GiB") == 80 * GIB
        for wrong in ("80", "50%", "lots", "-3GiB"):
            with pytest.raises(UserError, match="--fit"):
                parse_budget(wrong)


def planner_of(words: list[str], request: Request):
    from dsfreeze.cli.known import anatomy_of

    return make_planner(load_recipe(None, words), request, anatomy_of, None)


class TestMistakes:
    WORDS = ("model=smollm2-135m", "task=causal_lm")

    @pytest.mark.parametrize(("request_", "message"), [
        (Request(gpus="8"), "Say on which device"),
        (Request(device="b100"), "no device 'b100'"),
        (Request(device="NVIDIA A100-SXM4-40GB"), "no device"),
        (Request(device="h100", gpus="3", global_batch_size=32), "cannot be shared by 3 devices"),
        (Request(device="h100", gpus="1,2", global_batch_size=32), "several"),
    ])  # fmt: skip
    def test_requests(self, request_, message):
        with pytest.raises(UserError, match=message):
            planner_of(list(self.WORDS), request_)

    @pytest.mark.parametrize(("words", "message"), [
        (["plan", "--model", "lama-3-8b", "--gpus", "1", "--device", "h100"], "llama-3-8b"),
        (["plan", "--model", "llama-3-8b", "--gpus", "1", "--device", "titan"], "h200, h100, a100"),
        (["plan", "--model", "llama-3-8b", "--fit", "2GiB", "--gpus", "1", "--device", "h100"], "weights alone"),
        (["plan", "--model", "llama-3-8b", "--gpus", "1", "--device", "h100", "--calibrate", "nowhere"], "nowhere"),
        (["plan", "--study", "nowhere.yaml"], "nowhere.yaml"),
    ])  # fmt: skip
    def test_on_the_command_line(self, words, message, capsys):
        assert run(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err.replace("\n", " ")


class TestCommand:
    def test_the_table(self, capsys):
        assert run(["plan", "--model", "llama-3-8b", "--gpus", "8,16", "--device", "h200", "--seq", "4096"]) == 0
        shown = capsys.readouterr().out
        assert all(label in shown for label in ("8 x h200", "16 x h200", "bottom 50 %", "lora"))

    def test_json_has_every_item(self, capsys):
        assert run(["plan", "--model", "llama-3-8b", "--gpus", "8", "--device", "h200", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert len(content["rows"]) == 4 * len(STRATEGIES)
        assert {"frozen weights", "masters", "activations", "logits and loss", "prefix cache"} <= set(
            content["rows"][0]["bytes"]
        )
        assert content["device"]["sources"]["memory"]

    def test_ones_own_plan_comes_first(self, capsys):
        assert (
            run(["plan", "--model", "llama-3-8b", "freeze.count=5", "--gpus", "8", "--device", "h200", "--json"]) == 0
        )
        assert json.loads(capsys.readouterr().out)["rows"][0]["strategy"] == "yours: bottom"

    def test_fit(self, capsys):
        assert (
            run(["plan", "--model", "smollm2-135m", "--fit", "1GiB", "--gpus", "1", "--device", "rtx4090", "--json"])
            == 0
        )
        fits = json.loads(capsys.readouterr().out)["fits"]
        assert all(found["peak_bytes"] <= GIB for found in fits)
        assert [found["layers_trained"] for found in fits] == sorted((f["layers_trained"] for f in fits), reverse=True)

    @pytest.mark.slow
    def test_the_default_table_of_a_large_model_needs_no_torch_and_two_seconds(self):
        """Oracle: `sys.modules`; of three runs the fastest counts, in processor seconds."""
        argv = ["plan", "--model", "llama-3-70b", "--gpus", "8,16,64", "--device", "h200", "--seq", "4096", "--json"]
        quietly = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): run({argv})\n"
        assert heavy_after(f"from dsfreeze.cli import run\n{quietly}pass") == ""
        seconds = []
        for _ in range(3):
            began = time.process_time()
            run(argv)
            seconds.append(time.process_time() - began)
        assert min(seconds) < 2


class TestPrefixCache:
    """Oracles: figures of SmolLM2-135M by hand: 30 layers of 3,538,944 elements in matrices, hidden and attention width 576."""

    SMALL = ("plan", "model=smollm2-135m", "task=causal_lm", "data.max_length=512")
    SPARED = 15 * (2 * 3_538_944 + 4 * 512 * 576)

    def json(self, capsys, *words) -> dict:
        assert run([*self.SMALL, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def lines(self, capsys, monkeypatch, *words, columns=80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run([*self.SMALL, *words]) == 0
        return capsys.readouterr().out.splitlines()

    def test_the_picture_has_every_figure(self, capsys):
        found = self.json(capsys, "train.bf16=true")["prefix_cache"]
        recomputed = self.SPARED / (0.5 * 989.5e12)
        assert (found["device"], found["layers"], found["token_bytes"], found["visits"]) == ("h100", 15, 1152, 3.0)
        assert found["bytes_per_million_tokens"] == 1_152_000_000
        assert found["recompute_seconds"] == pytest.approx(recomputed)
        assert found["needed_bandwidth"] == pytest.approx(1152 / recomputed)
        assert found["bandwidth"] == {"memory": pytest.approx(64e9), "disk": pytest.approx(3.5e9)}
        assert found["break_even_epoch"] == {"memory": 2, "disk": None}

    def test_the_picture_says_it_in_three_lines(self, capsys, monkeypatch):
        *_, first, second, third = self.lines(capsys, monkeypatch, "train.bf16=true")
        assert first == "prefix cache     1.12 KiB a token of 15 layers, 1.07 GiB a million tokens"
        assert second.strip() == "reading pays above 4.6 GB/s (h100: disk 3.5, memory 64 GB/s)"
        assert third.strip() == "pays in memory from epoch 2; off here: freeze.prefix_cache=auto"

    @pytest.mark.parametrize(("words", "end"), [
        (["freeze.prefix_cache=disk"], "pays from epoch 2; here: disk"),
        (["train.num_train_epochs=1"], "no example comes twice in 1 epoch"),
        (["train.num_train_epochs=0.5", "freeze.prefix_cache=auto"], "no example comes twice in 0.5 epochs; here: auto"),
        (["train.max_steps=5", "train.num_train_epochs=1"], "pays from epoch 2; off here: freeze.prefix_cache=auto"),
    ])  # fmt: skip
    def test_what_the_recipe_has(self, capsys, monkeypatch, words, end):
        assert self.lines(capsys, monkeypatch, *words)[-1].strip() == end

    @pytest.mark.parametrize(
        "words",
        [["freeze.strategy=full"], ["freeze.strategy=lora"], ["freeze.strategy=smartfrz", "train.max_steps=500"]],
    )
    def test_where_nothing_lies_below_nothing_is_said(self, capsys, words):
        assert self.json(capsys, *words)["prefix_cache"] is None

    def test_of_a_plan_that_decides_later_nothing_is_said(self):
        """Oracle: the same plan with all of it known has a cache."""
        ground = ground_of("smollm2-135m")
        plan = make_plan(ground.anatomy, FreezeOptions(fraction=0.5), 80)
        values = {"storage": "auto", "dtype_bytes": 2, "sequence_length": 512, "device": ground.device, "ranks": 1}
        assert cache_of(ground.anatomy, plan, **values).layers == 15
        assert cache_of(ground.anatomy, replace(plan, decide_at=40), **values) is None

    def test_the_tables_caption(self, capsys, monkeypatch):
        """Oracle: the same figures, those of int8 (580 bytes), and a line for each plan with a prefix, none too long."""
        words = (
            "--device",
            "h100",
            "--gpus",
            "1,8",
            "train.bf16=true",
            "freeze.prefix_cache_dtype=int8",
            "--prefix-cache",
        )
        shown = self.lines(capsys, monkeypatch, *words)
        text = " ".join(" ".join(shown).split())
        assert "Prefix cache: 580 B a token, 553.13 MiB a million tokens." in text
        assert "64 GB/s from memory and 438 MB/s from disk (8 share the disk); the seconds above are with disk." in text
        needed = 580 / (self.SPARED / (0.5 * 989.5e12))
        assert f"  bottom 50 %: above {needed / 1e9:.3g} GB/s; pays in memory from epoch 2, on disk never" in shown
        assert [line.partition(":")[0].strip() for line in shown if "; pays" in line] == [
            "yours: bottom".partition(":")[0], "bottom 25 %", "bottom 50 %", "bottom 75 %"
        ]  # fmt: skip

    def test_the_tables_figures(self, capsys):
        """Oracle: a recipe's choice counts as the option does; a cell's bandwidth is what a step that never waits reads."""
        words = ("--device", "h100", "--gpus", "8", "train.bf16=true")
        plain, option, chosen = (
            self.json(capsys, *words, *more) for more in ([], ["--prefix-cache"], ["freeze.prefix_cache=auto"])
        )
        assert plain["prefix_cache"] == {}
        assert all(row["cache_bandwidth"] is None for row in plain["rows"])
        assert set(option["prefix_cache"]) == {"bottom 25 %", "bottom 50 %", "bottom 75 %"}
        assert chosen["prefix_cache"] == {
            **option["prefix_cache"],
            "yours: bottom": option["prefix_cache"]["bottom 50 %"],
        }
        row = next(r for r in chosen["rows"] if (r["strategy"], r["stage"]) == ("yours: bottom", 2))
        tokens = row["tokens_per_second"] * row["seconds_per_step"] / 8
        reading = tokens * 1152 * 8 / 3.5e9
        assert row["seconds"]["host"] == pytest.approx(reading)
        assert row["cache_bandwidth"] == pytest.approx(tokens * 1152 / (row["seconds_per_step"] - reading))

    def test_a_calibration_counts(self):
        """Oracle: a device half as fast recomputes twice as long and reads as fast."""
        once, twice = (
            replace(planner, ground=replace(planner.ground, scale=scale)).caches(planner.plans()[0])["bottom 50 %"]
            for planner in [
                planner_of(["model=smollm2-135m", "task=causal_lm"], Request(device="h100", prefix_cache=True))
            ]
            for scale in (1.0, 2.0)
        )
        assert twice.recompute_seconds == pytest.approx(2 * once.recompute_seconds)
        assert twice.disk_seconds == once.disk_seconds

    def test_evicted_weights(self, capsys):
        """Oracle: fifteen layers of 3,540,096 elements in bf16; the embedding is the head, and stays. The peak falls by as much."""
        cached = ("train.bf16=true", "freeze.prefix_cache=disk")
        kept, gone = (self.json(capsys, *cached, *more) for more in ([], ["freeze.evict_prefix=true"]))
        evicted = 2 * 15 * 3_540_096
        assert kept["bytes_per_rank"]["weights"] - gone["bytes_per_rank"]["weights"] == evicted
        assert {name: kept["peaks"][name] - gone["peaks"][name] for name in kept["peaks"]} == dict.fromkeys(
            ("forward", "backward", "step"), evicted
        )


@pytest.mark.parametrize(("words", "expected"), [
    ([], (False, "auto", False, False)),
    (["freeze.prefix_cache=memory", "freeze.prefix_cache_dtype=int8"], (True, "int8", True, False)),
    (["freeze.prefix_cache=disk", "freeze.evict_prefix=true"], (True, "auto", False, True)),
    (["freeze.prefix_cache=auto"], (True, "auto", False, False)),
])  # fmt: skip
def test_a_recipes_workload_has_its_cache(words, expected):
    """Oracle: by hand; auto is priced as the slower tier."""
    work = workload_of(load_recipe(None, ["model=smollm2-135m", *words]))
    assert (work.prefix_cache, work.prefix_cache_dtype, work.cache_in_memory, work.evict_prefix) == expected


class TestCalibration:
    def record(self, tmp_path, seconds, *, device="cpu", tokens=512):
        """A record as a run leaves it, with made-up seconds."""
        from dsfreeze.plan import FreezePlan, Phase
        from dsfreeze.record import Record

        recipe = load_recipe(
            None, ["model=smollm2-135m", "task=causal_lm", "train.per_device_train_batch_size=4", "data.max_length=128"]
        )
        plan = FreezePlan("full", (Phase(0, None, ("w",)),))
        record = Record.create(tmp_path / "run", recipe, plan, {"device": device, "world_size": 1})
        for step, taken in enumerate(seconds, start=1):
            record.step({"step": step, "seconds": taken, "tokens": tokens})
        return tmp_path / "run"

    def price(self, recipe, world_size, length):
        from dsfreeze.cli.known import anatomy_of
        from dsfreeze.planner.request import price_of_run

        return price_of_run(anatomy_of, recipe, world_size, length)

    def test_the_run_itself_is_predicted_exactly(self, tmp_path):
        """Oracle: the definition: with the scale, the formula gives the measured median."""
        device = find_device("cpu")
        folder = self.record(tmp_path, [9.0, 9.0, 1.5, 1.0, 2.0])
        found = calibrate(folder, device, self.price)
        recipe = load_recipe(folder / "recipe.yaml", [])
        assert self.price(recipe, 1, 128).on(device, found.scale).total == pytest.approx(1.5)

    def test_its_mean_length_counts(self, tmp_path):
        """Oracle: half the tokens in the same time is the scale of a slower device, nearly twice."""
        device = find_device("cpu")
        whole = calibrate(self.record(tmp_path / "a", [1.0] * 5), device, self.price)
        half = calibrate(self.record(tmp_path / "b", [1.0] * 5, tokens=256), device, self.price)
        assert 1.5 < half.scale / whole.scale < 2

    def test_another_device_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="ran on cpu"):
            calibrate(self.record(tmp_path, [1.0] * 5), find_device("h100"), self.price)
        with pytest.raises(UserError, match="no device"):
            calibrate(self.record(tmp_path / "x", [1.0] * 5, device="NVIDIA B300"), find_device("h100"), self.price)

    def test_too_few_steps(self, tmp_path):
        with pytest.raises(UserError, match="2 steps"):
            calibrate(self.record(tmp_path, [1.0, 1.0]), find_device("cpu"), self.price)


def test_cell_is_the_price_on_the_device():
    """Oracle: PlanCost itself."""
    ground = ground_of("smollm2-135m")
    plans, _ = plans_of(ground.anatomy, {"full": {"strategy": "full"}}, None)
    cost = ground.cost(plans["full"])
    at = cell(ground, cost, 2, 8)
    assert at.price == cost.at(2, 8)
    assert at.seconds == cost.at(2, 8).on(ground.device)
