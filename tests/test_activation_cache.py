import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from mxd.data.activation_cache import ActivationCache, CacheIdentity
from mxd.data.activations import ActivationStream, Pairs
from mxd.data.tokens import LocalTokens
from mxd.models import MlpPair

WIDTHS = {1: (3, 2), 4: (5, 5)}
NUM_TOKENS, CONTEXT, SHARD, PASS = 500, 8, 6, 3
TABLES = {layer: tuple(torch.randn(NUM_TOKENS, width) for width in pair) for layer, pair in WIDTHS.items()}
SIZES = {layer: SHARD * CONTEXT * sum(pair) * 4 for layer, pair in WIDTHS.items()}
IDENTITY = CacheIdentity(
    model="tiny",
    fingerprint="f" * 64,
    revision="main",
    model_dtype="float32",
    precision="float32",
    module=None,
    text="a.txt",
    text_digest="a" * 32,
    tokenizer="b" * 32,
    context=CONTEXT,
    order_seed=5,
    dtype="float32",
    shard_contexts=SHARD,
)


class Model:
    """Stands for a language model whose activations depend on the token alone."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int]] = []
        """Layer, and number of contexts, of every pass."""

    def __call__(self, contexts: Int[Tensor, "n context"], layers: Collection[int]) -> Mapping[int, MlpPair]:
        self.ran += [(layer, len(contexts)) for layer in layers]
        return {layer: MlpPair(*(table[contexts] for table in TABLES[layer])) for layer in layers}


def no_model(contexts: Int[Tensor, "n context"], layers: Collection[int]) -> NoReturn:
    raise AssertionError("the model must not run")


class CountedTokens(LocalTokens):
    """A text that counts the contexts that are read, by copies of itself too."""

    def __init__(self, seed: int = 5) -> None:
        self.read: list[int] = []
        super().__init__(np.arange(1, NUM_TOKENS), context=CONTEXT, bos=0, seed=seed)

    def take(self, count: int) -> Int[Tensor, "count context"]:
        self.read.append(count)
        return super().take(count)


def open_cache(
    folder: Path,
    model: object,
    *,
    layers: Collection[int] = (1, 4),
    num_contexts: int = 30,
    identity: CacheIdentity = IDENTITY,
    tokens: LocalTokens | None = None,
) -> ActivationCache:
    return ActivationCache(
        folder,
        identity,
        model,  # pyright: ignore[reportArgumentType]
        tokens or CountedTokens(),
        widths={layer: WIDTHS[layer] for layer in layers},
        forward_contexts=PASS,
        num_contexts=num_contexts,
    )


def contexts_of_text(count: int) -> Int[Tensor, "count context"]:
    return CountedTokens().take(count)


def assert_right(cache: ActivationCache, first: int, count: int, layers: Collection[int] = (1, 4)) -> None:
    contexts = contexts_of_text(first + count)[first:]
    read = cache.read(first, contexts)
    assert sorted(read) == sorted(layers)
    for layer in layers:
        for found, table in zip(read[layer], TABLES[layer], strict=True):
            assert torch.equal(found, table[contexts].to(cache.dtype))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_whatever_is_read_in_any_order_and_by_any_process_is_the_models_and_computed_once(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int]], reopened: int
) -> None:
    folder, model = tmp_path_factory.mktemp("cache") / "cache", Model()
    cache = open_cache(folder, model)
    for number, (first, count) in enumerate(reads):
        if number == reopened:
            cache = open_cache(folder, model)
        assert_right(cache, first, count)
    shards = {shard for first, count in reads for shard in range(first // SHARD, (first + count - 1) // SHARD + 1)}
    assert sorted(model.ran) == sorted([(1, PASS), (4, PASS)] * (SHARD // PASS) * len(shards))
    for first, count in reads:
        assert_right(open_cache(folder, no_model), first, count)


def test_nothing_is_written_before_the_first_read_and_then_whole_shards(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    cache = open_cache(folder, Model())
    assert cache.coverage() == (0, 5 * (sum(SIZES.values()) + SHARD * CONTEXT * 4))
    assert not folder.parent.exists()
    assert_right(cache, 7, 1)
    name = "00000001.safetensors"
    assert files_of(folder) == [".lock", "cache.json", f"layer-1/{name}", f"layer-4/{name}", f"tokens/{name}"]
    there, missing = cache.coverage()
    assert there == missing // 4 == sum(SIZES.values()) + SHARD * CONTEXT * 4
    assert abs((folder / "layer-4" / name).stat().st_size - SIZES[4]) < 600


def test_more_tokens_and_other_layers_compute_only_what_is_missing(tmp_path: Path) -> None:
    first = Model()
    assert_right(open_cache(tmp_path, first, layers=(1,), num_contexts=12), 0, 12, layers=(1,))
    assert first.ran == [(1, PASS)] * 4
    wider, tokens = Model(), CountedTokens()
    cache = open_cache(tmp_path, wider, num_contexts=12, tokens=tokens)
    assert_right(cache, 0, 12)
    assert wider.ran == [(4, PASS)] * 4
    assert tokens.read == [], "which contexts a shard holds is known from its tokens"
    longer = Model()
    assert_right(open_cache(tmp_path, longer, layers=(4,), num_contexts=24), 0, 24, layers=(4,))
    assert longer.ran == [(4, PASS)] * 4
    assert open_cache(tmp_path, no_model, num_contexts=12).coverage().bytes_missing == 0
    assert open_cache(tmp_path, no_model, num_contexts=24).coverage().bytes_missing == 2 * SIZES[1]


def test_a_text_is_read_on_from_the_shard_before_where_there_is_one(tmp_path: Path) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 2 * SHARD)
    tokens = CountedTokens()
    assert_right(open_cache(tmp_path, Model(), tokens=tokens), 3 * SHARD, SHARD)
    assert tokens.read == [SHARD, SHARD], "one shard to pass over, one to keep"
    shutil.rmtree(tmp_path / "tokens")
    tokens = CountedTokens()
    assert_right(open_cache(tmp_path, no_model, tokens=tokens), SHARD, SHARD)
    assert tokens.read == [SHARD, SHARD]


@given(
    batch_tokens=st.integers(5, 40),
    buffer_tokens=st.integers(1, 200),
    total_tokens=st.integers(1, 160),
    seed=st.integers(0, 3),
)
@settings(max_examples=15, deadline=None)
def test_runs_with_other_batches_and_buffers_read_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, batch_tokens: int, buffer_tokens: int, total_tokens: int, seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-cache"
    contexts = 64
    if not folder.exists():
        open_cache(folder, Model()).read(0, contexts_of_text(contexts))

    def run_model(first: int, contexts: Int[Tensor, "n context"]) -> Mapping[int, MlpPair]:
        return Model()(contexts, list(WIDTHS))

    def stream(pairs: Pairs) -> ActivationStream:
        return ActivationStream(
            pairs,
            CountedTokens(),
            widths=WIDTHS,
            batch_tokens=batch_tokens,
            buffer_tokens=buffer_tokens,
            total_tokens=total_tokens,
            forward_contexts=4,
            special_ids={0},
            seed=seed,
        )

    cache = open_cache(folder, no_model, num_contexts=contexts)
    for cached, plain in zip(stream(cache.read), stream(run_model), strict=True):
        for layer in WIDTHS:
            assert all(map(torch.equal, cached.layers[layer], plain.layers[layer]))


def test_rounded_activations_are_the_same_for_who_writes_and_who_reads(tmp_path: Path) -> None:
    identity = replace(IDENTITY, dtype="bfloat16")
    writer = open_cache(tmp_path, Model(), identity=identity)
    assert writer.dtype == torch.bfloat16
    assert_right(writer, 0, 30)
    assert_right(open_cache(tmp_path, no_model, identity=identity), 0, 30)
    assert abs((tmp_path / "layer-4/00000000.safetensors").stat().st_size - SIZES[4] // 2) < 600


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped byte at the end": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "flipped byte of the first number": lambda content: content[:-400] + bytes([content[-400] ^ 64]) + content[-399:],
    "flipped byte of the header": lambda content: content.replace(b"sha256", b"sha257", 1),
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"0",
    "something else": lambda content: b"not a shard, but long enough to look like one",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["layer-4", "tokens"])
def test_a_damaged_shard_is_refused_by_name_and_computed_again_once_removed(
    tmp_path: Path, damage: str, kind: str
) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 18)
    path = tmp_path / kind / "00000001.safetensors"
    good = path.read_bytes()
    path.write_bytes(DAMAGE[damage](good))
    cache = open_cache(tmp_path, no_model)
    assert_right(cache, 0, SHARD)
    with pytest.raises(ValueError, match=r"must be a whole shard of this cache; it is not .*: remove it") as refused:
        assert_right(cache, 0, 18)
    assert str(path) in str(refused.value)
    path.unlink()
    model = Model()
    assert_right(open_cache(tmp_path, model), 0, 18)
    assert model.ran == ([(4, PASS)] * 2 if kind == "layer-4" else [])
    assert path.read_bytes() == good


def test_shards_in_each_others_places_are_refused(tmp_path: Path) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 18)
    shutil.copy(tmp_path / "layer-4/00000000.safetensors", tmp_path / "layer-4/00000001.safetensors")
    with pytest.raises(ValueError, match="its checksum does not hold"):
        open_cache(tmp_path, no_model).read(SHARD, contexts_of_text(2 * SHARD)[SHARD:])


def test_a_checksum_is_computed_once_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 12)
    checked: list[tuple[str, int]] = []
    plain = ActivationCache._checksum

    def noting(cache: ActivationCache, kind: str, shard: int, *rest: Mapping[str, object]) -> str:
        checked.append((kind, shard))
        return plain(cache, kind, shard, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ActivationCache, "_checksum", noting)
    cache = open_cache(tmp_path, no_model)
    for first in (0, 3, 6, 0):
        assert_right(cache, first, 3)
    assert sorted(checked) == sorted((kind, shard) for kind in ("tokens", "layer-1", "layer-4") for shard in (0, 1))


def test_other_tokens_than_those_that_were_kept_are_refused(tmp_path: Path) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 12)
    with pytest.raises(ValueError, match="this run's text and tokenizer; it has other tokens in shard 1"):
        open_cache(tmp_path, no_model).read(SHARD, contexts_of_text(SHARD))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "other", "fingerprint": "e" * 64}, r"model tiny \(fingerprint f{12}\), this run has other \("),
        ({"fingerprint": "f" * 63 + "e"}, "model tiny"),
        ({"revision": None}, "model revision main, this run has None"),
        ({"model_dtype": "bfloat16", "fingerprint": "e" * 64}, "--model-dtype float32, this run has bfloat16"),
        ({"precision": "bfloat16"}, "model precision float32, this run has bfloat16"),
        ({"module": "model.{layer}"}, "--module None, this run has model.{layer}"),
        ({"text": "b.txt", "text_digest": "c" * 32}, r"text a.txt \(a{12}\), this run has b.txt \(c{12}\)"),
        ({"tokenizer": "c" * 32}, "tokenizer bbb"),
        ({"context": 16}, "--context 8, this run has 16"),
        ({"order_seed": 6}, "--seed 5, this run has 6"),
        ({"dtype": "bfloat16"}, "--cache-dtype float32, this run has bfloat16"),
        ({"shard_contexts": 12}, "shards of 6, this run has 12"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 1)
    with pytest.raises(ValueError, match=f"was made with .*{expected}.*; give another --cache"):
        open_cache(tmp_path, no_model, identity=replace(IDENTITY, **changes))  # pyright: ignore[reportArgumentType]


def test_a_model_or_text_that_has_moved_is_the_same(tmp_path: Path) -> None:
    assert_right(open_cache(tmp_path, Model()), 0, 6)
    assert_right(open_cache(tmp_path, no_model, identity=replace(IDENTITY, model="/elsewhere", text="c.txt")), 0, 6)


def test_what_is_no_cache_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(ValueError, match="must be a cache, or an empty or a new folder"):
            open_cache(folder, no_model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    assert_right(open_cache(tmp_path / "empty", Model()), 0, 1)
    description = tmp_path / "empty" / "cache.json"
    stored = json.loads(description.read_text())
    for content in ("{", "[]", json.dumps(stored | {"format": 2}), json.dumps({"format": 1, "identity": {}})):
        description.write_text(content)
        with pytest.raises(ValueError, match=r"cache\.json must describe a cache"):
            open_cache(tmp_path / "empty", no_model)
    assert files_of(tmp_path / "folder") == ["mine"]


def test_a_disk_that_fails_leaves_whole_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def fail(path: Path) -> None:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mxd.data.activation_cache.settle_file", fail)
        with pytest.raises(OSError, match=r"the cache must be written to .*00000001.*No space left"):
            assert_right(open_cache(tmp_path, Model()), 0, 18)
    assert len(files_of(tmp_path)) == 2 + 4
    model = Model()
    assert_right(open_cache(tmp_path, model), 0, 18)
    assert len(model.ran) == 8
