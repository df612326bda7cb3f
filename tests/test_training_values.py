"""What Python code may give a setting, and what is refused by name."""

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxd.cli.numbers import parse_layers
from mxd.training.config import TrainConfig

LEAST: dict[str, Any] = {"model": "m", "text": ("t",), "layer": (0,), "tokens": 100}


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**(LEAST | settings))


def test_a_single_value_stands_for_a_tuple_of_one_and_text_is_not_taken_apart() -> None:
    found = config(text="stdlib", kind="mxd", k=32, layer=3)
    assert (found.text, found.kind, found.k, found.layer) == (("stdlib",), ("mxd",), (32,), (3,))
    assert found == config(text=["stdlib"], kind=["mxd"], k=[32], layer=range(3, 4))
    assert found == replace(found)


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ({"num_latents": [8, 16], "k": 4}, (8, 16)),
        ({"num_latents": 8, "k": 4}, 8),
        ({"num_latents": np.int64(8), "k": 4}, 8),
        ({"model": Path("a/b")}, "a/b"),
        ({"clip": 1}, 1.0),
        ({"clip": np.float32(0.5)}, 0.5),
        ({"lr": {"shared-transcoder": 1}}, {"shared-transcoder": 1.0}),
        ({"hidden": ["auto", 8]}, ("auto", 8)),
        ({"normalize_experts": [True, False]}, (True, False)),
    ],
)
def test_values_come_to_the_type_of_their_setting(given_value: dict[str, Any], expected: object) -> None:
    found = getattr(config(**given_value), next(iter(given_value)))
    assert found == expected
    assert type(found) is type(expected)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": "12k"}, r"tokens must be a whole number; got '12k'\. Write counts as 480_000_000"),
    ({"tokens": 1e6}, r"tokens must be a whole number; got 1000000\.0\. Write 1_000_000\."),
    ({"tokens": True}, r"tokens must be a whole number; got True"),
    ({"tokens": None}, r"tokens must be a whole number; got None"),
    ({"k": "4"}, r"k must be a whole number, or several of them; got '4'"),
    ({"k": [4, "8"]}, r"k must be a whole number, or several of them; got \[4, '8'\]"),
    ({"layer": "0-3"}, r"layer must be a whole number or 'all', or several of them; got '0-3'"),
    ({"text": 3}, r"text must be text, or several of them; got 3"),
    ({"model": None}, r"model must be text; got None"),
    ({"schedule": "cosine"}, r"schedule must be 'constant' or 'linear'; got 'cosine'"),
    ({"hidden": "own"}, r"hidden must be a whole number or 'auto', or several of them; got 'own'"),
    ({"normalize_experts": 1}, r"normalize_experts must be True or False, or several of them; got 1"),
    ({"lr": {"mxd": "1e-3"}}, r"lr must be a number or 'auto' or pairs of kind and number; got"),
    ({"weight_decay": "0.1"}, r"weight_decay must be a number; got '0\.1'\.$"),
    ({"tokns": 5}, r"unexpected keyword argument 'tokns'"),
]


@pytest.mark.parametrize(("given_value", "message"), REFUSED)
def test_what_is_of_another_type_is_refused_by_name(given_value: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        config(**given_value)


def test_what_a_run_records_is_read_back_as_it_was() -> None:
    import json

    found = config(kind="mxd", num_latents=(8, 16), k=(2, 4), lr={"mxd": 1e-3}, hidden=("auto", 4), clip=1.0)
    assert TrainConfig(**json.loads(json.dumps(asdict(found)))) == found
    assert all(type(getattr(found, field.name)) is not list for field in fields(TrainConfig))


def test_all_layers_are_numbers_once_the_model_is_known() -> None:
    every = config(layer="all")
    with pytest.raises(ValueError, match="layer must be numbers here; got all"):
        _ = every.layers
    assert every.of_blocks(3).layers == (0, 1, 2)
    assert config(layer=5).of_blocks(3).layers == (5,)


@pytest.mark.parametrize(
    ("words", "layers"),
    [("all", "all"), ("3", (3,)), ("0-3", (0, 1, 2, 3)), ("7 2-4 0", (7, 2, 3, 4, 0)), ("4-4", (4,))],
)
def test_layers_are_read_as_people_write_them(words: str, layers: object) -> None:
    assert parse_layers(words.split()) == layers


@pytest.mark.parametrize("words", ["", "3-1", "-1", "a", "1,2", "all 3", "1-", "0-99999999999"])
def test_what_names_no_layers_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"^layer must "):
        parse_layers(words.split())


@given(st.lists(st.integers(0, 200), min_size=1, unique=True))
def test_numbers_alone_come_back_in_their_order(layers: list[int]) -> None:
    assert parse_layers([str(layer) for layer in layers]) == tuple(layers)
    assert math.prod(config(layer=layers).layers) == math.prod(layers)
