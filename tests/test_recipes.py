import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers as hf

from mxd.cli import demo as demo_command
from mxd.cli.main import main
from mxd.recipes import (
    RECIPES,
    find_recipe,
    gemma_3_4b,
    paper_gpt2,
    paper_llama_3_2_3b,
    paper_pythia_1_4b,
    paper_pythia_410m,
    qwen3_1_7b,
    stories260k,
)
from mxd.training.config import TrainConfig
from mxd.training.grid import plan_students
from tests.tiny_run import Command, TinyRun, assert_refused, training

PAPER: dict[str, object] = {
    # Oldfield et al., 2025: corpus, split, tokens, batch, rate, schedule, optimiser, context, buffer, type and seed.
    "text": ("Skylion007/openwebtext",),
    "split": "train",
    "tokens": 480_000_000,
    "batch_tokens": 4096,
    "lr": 1e-4,
    "warmup_tokens": "auto",  # which comes to the paper's 5,000 steps: see below
    "schedule": "constant",
    "weight_decay": 0.0,
    "clip": None,
    "context": 128,
    "buffer_tokens": 524_288,
    "precision": "float32",
    "model_dtype": "float32",
    "seed": 42,
    "k": (16, 32, 64, 128, 256),
    "seeds": 1,  # "one seed, no error bars"
    "aux_coefficient": 0.0,  # "dead experts: none"
    # Oldfield et al., 2025: transcoders 32 times as wide; the dense branch as wide as the model's.
    "expansion": 32,
    "num_latents": None,
    "hidden": "auto",
    # Oldfield et al., 2025: the released start, with output biases of zero.
    "init": "paper",
    "init_from": None,
    "output_bias": "zeros",
    "normalize_input": False,
    # Oldfield et al., 2025: the three methods of the table; the module is replaced at every position.
    "kind": ("mxd", "transcoder", "skip-transcoder"),
    "special_positions": "replace",
    # Oldfield et al., 2025: 200 batches of 128 sequences of 128 tokens.
    "eval_tokens": 3_276_800,
}
MODELS = {
    # Oldfield et al., 2025: model and headline layer; GELU but for Llama, whose activation is not known: its own.
    "paper-gpt2": (paper_gpt2, {"model": "openai-community/gpt2", "layer": (8,), "activation": "gelu"}),
    "paper-pythia-410m": (
        paper_pythia_410m,
        {"model": "EleutherAI/pythia-410m", "layer": (15,), "activation": "gelu"},
    ),
    "paper-pythia-1.4b": (
        paper_pythia_1_4b,
        {"model": "EleutherAI/pythia-1.4b", "layer": (12,), "activation": "gelu"},
    ),
    "paper-llama-3.2-3b": (
        paper_llama_3_2_3b,
        {"model": "meta-llama/Llama-3.2-3B", "layer": (12,), "activation": "auto"},
    ),
    # The paper has neither of these: layers are ours, all else is carried over.
    "qwen3-1.7b": (qwen3_1_7b, {"model": "Qwen/Qwen3-1.7B-Base", "layer": (14,), "activation": "auto"}),
    "gemma-3-4b": (gemma_3_4b, {"model": "google/gemma-3-4b-pt", "layer": (17,), "activation": "auto"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_has_the_papers_settings_field_by_field(name: str) -> None:
    build, own = MODELS[name]
    config = find_recipe(name).config()
    assert config == build()
    expected = PAPER | own | {"recipe": name}
    resolved = asdict(config)
    assert {field: resolved[field] for field in expected} == expected
    plain = TrainConfig(model="x", text=("x",), layer=(0,), tokens=1)
    # Of the rest the paper says nothing.
    assert {name for name in set(resolved) - set(expected) if resolved[name] != getattr(plain, name)} == set()
    assert build(layer=5) == replace(config, layer=(5,))
    assert config.warmup == 5000 * 4096


def test_a_recipe_of_fewer_tokens_warms_up_over_fewer(mxd: Command, tmp_path: Path) -> None:
    assert replace(paper_gpt2(layer=5), tokens=1_000_000).warmup == 100_000
    assert replace(paper_gpt2(), tokens=960_000_000).warmup == 5000 * 4096
    assert replace(paper_gpt2(), warmup_tokens=123).warmup == 123
    # As docs/training.md has it.
    words = ["train", "--recipe", "paper-gpt2", "--layer", "5", "--tokens", "1M"]
    ended = mxd(*words, "--out", tmp_path / "run", "--dry-run")
    assert (ended.status, "1,000,000 tokens" in ended.err) == (0, True), ended.err


@pytest.mark.parametrize(
    ("name", "experts", "matched", "transcoder", "hidden"),
    [
        # Oldfield et al., 2025: experts of the released formula, parameters of a transcoder, dense width.
        ("paper-gpt2", 21_490, 21_504, 37.77e6, 3072),
        ("paper-pythia-410m", 28_658, None, 67e6, 4096),
        ("paper-pythia-1.4b", 57_330, None, 269e6, 8192),
        ("paper-llama-3.2-3b", 86_015, None, 604e6, 8192),
    ],
)
def test_parameters_are_matched_to_the_papers_budget(
    name: str, experts: int, matched: int | None, transcoder: float, hidden: int
) -> None:
    recipe = find_recipe(name)
    config = replace(recipe.config(), k=(32,))
    students = {student.kind: student for student in plan_students(config, recipe.shape.sites(config.layers))}
    assert students["mxd"].network.num_latents == pytest.approx(experts, rel=1e-3)
    assert matched in (None, students["mxd"].network.num_latents)
    assert getattr(students["mxd"].network, "d_hidden", None) == hidden
    assert students["transcoder"].network.num_latents == 32 * recipe.shape.d_model
    assert students["transcoder"].parameters == pytest.approx(transcoder, rel=6e-3)
    for student in students.values():
        assert student.parameters == pytest.approx(students["transcoder"].parameters, rel=1e-4)
        assert student.lr == 1e-4


NEOX = {"vocab_size": 50_304, "max_position_embeddings": 2048}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    # What the models' own config.json files say.
    "paper-gpt2": ("gpt2", {}),
    "paper-pythia-410m": (
        "gpt_neox",
        NEOX | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "paper-pythia-1.4b": (
        "gpt_neox",
        NEOX | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "paper-llama-3.2-3b": (
        "llama",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": (
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
    ),
    "gemma-3-4b": (
        "gemma3",
        {
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262_208,
            },
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_shape_of_a_recipe_is_that_of_its_model(name: str) -> None:
    model_type, sizes = CONFIGURATIONS[name]
    shape = find_recipe(name).shape
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(model_type, **sizes))
    weights = dict(model.named_parameters())
    assert sum(weight.numel() for weight in weights.values()) == shape.parameters
    last = [weight for key, weight in weights.items() if f".{shape.num_layers - 1}." in key and "vision" not in key]
    assert sum(weight.numel() for weight in last) == shape.block_parameters
    assert model.get_input_embeddings().weight.shape[1] == shape.d_model


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_layer_and_the_last_can_be_asked_for_and_no_further_one(name: str) -> None:
    shape, build = find_recipe(name).shape, find_recipe(name).config
    sites = shape.sites((0, shape.num_layers - 1))
    assert all(layer < shape.num_layers for layer in build().layers)
    assert {(site.d_in, site.d_hidden, site.d_out, site.gated) for site in sites.values()} == {
        (shape.d_model, shape.d_hidden, shape.d_model, shape.gated)
    }
    with pytest.raises(ValueError, match=rf"layer must lie in \[0, {shape.num_layers - 1}\]"):
        shape.sites((shape.num_layers,))


def test_our_own_small_recipes() -> None:
    assert find_recipe("demo").config() == demo_command.DEMO
    whole = stories260k()
    assert (whole.layer, whole.k, whole.seeds) == ((0, 1, 2, 3, 4), (4, 8, 16, 32, 64, 128), 3)
    assert stories260k(layer=2).layer == (2,)


def seen_by_make_plan(patch: pytest.MonkeyPatch, arguments: list[str]) -> TrainConfig:
    """Return the configuration that a command makes of its arguments."""
    seen: list[TrainConfig] = []

    def take(config: TrainConfig, stored: object) -> NoReturn:
        seen.append(config)
        raise ValueError("seen")

    patch.setattr("mxd.cli.train.make_plan", take)
    with pytest.raises(SystemExit):
        main(arguments)
    (config,) = seen
    return config


def test_every_option_given_beside_a_recipe_replaces_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "run")]
    plain = seen_by_make_plan(monkeypatch, ["train", "--recipe", "paper-gpt2", *out])
    assert plain == paper_gpt2()
    changes = "--layer 5 6 --tokens 1M --lr mxd 1e-3 transcoder 2e-3 skip-transcoder 3e-3 --k 8 --warmup-tokens 4096"
    changed = seen_by_make_plan(monkeypatch, ["train", *out, *changes.split(), "--recipe=paper-gpt2"])
    assert changed == replace(
        paper_gpt2(),
        layer=(5, 6),
        tokens=1_000_000,
        lr={"mxd": 1e-3, "transcoder": 2e-3, "skip-transcoder": 3e-3},
        k=(8,),
        warmup_tokens=4096,
    )
    values = asdict(TrainConfig(model="m", text=("a", "b"), layer=(1, 3), tokens=4096))
    given = [
        word
        for name, value in values.items()
        if name != "recipe" and value is not None
        for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,)))
        if not isinstance(value, bool)
    ]
    everything = seen_by_make_plan(monkeypatch, ["train", "--recipe", "paper-gpt2", *out, *given])
    assert asdict(everything) == values | {"recipe": "paper-gpt2"}


def test_a_recipes_own_settings_may_be_left_unread_and_others_may_not(
    mxd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["train", "--recipe", "paper-gpt2", "--kind", "transcoder", "--out", str(tmp_path / "run")]
    assert seen_by_make_plan(monkeypatch, asked).activation == "gelu"
    for ended in (mxd(*asked, "--hidden", 64), mxd(*asked, "--hidden", 64, "--dry-run")):
        assert_refused(ended, "train", "hidden 64 is read by mxd, shared-transcoder, low-rank only", "kind transcoder")


def test_an_unknown_recipe_is_refused_with_the_known_ones(mxd: Command, tmp_path: Path) -> None:
    ended = mxd("train", "--recipe", "paper-gpt3", "--out", tmp_path / "run")
    assert_refused(ended, "train", "recipe must be one of", "got 'paper-gpt3'", *RECIPES)
    assert not (tmp_path / "run").exists()
    ended = mxd("train", "--out", tmp_path / "run", "--recipe")
    assert ended.status == 2
    assert "Traceback" not in ended.err


def test_recipes_are_listed_and_explained(mxd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = mxd("train", "--recipe", "list")
    assert (listed.status, listed.err) == (0, "")
    assert set(RECIPES) <= set(listed.out.split())
    explained = mxd("train", "--recipe", "paper-gpt2", "--help")
    assert explained.status == 0
    assert "480000000" in explained.out


def test_run_json_has_the_recipes_name_and_everything_that_it_came_to(
    mxd: Command, tiny: TinyRun, tmp_path: Path
) -> None:
    words = training(tiny, tmp_path / "run", "--recipe", "stories260k", seeds=None)
    assert mxd(*words).status == 0
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    config = stored["config"]
    assert set(config) == {field.name for field in fields(TrainConfig)}
    assert (config["recipe"], config["seeds"], config["k"], config["tokens"]) == ("stories260k", 3, [4], 1024)
    assert [student["id"] for student in stored["students"]] == [f"transcoder-k4-seed{seed}" for seed in range(3)]
    assert mxd(*words, "--resume").status == 0
