"""Activations on disk: computed once, and read by memory map ever after.

A cache is a folder with

- `cache.json`: format, identity (whose activations these are), dtype, and contexts of a shard;
- `tokens/<shard, eight digits>.safetensors`: the token ids of so many consecutive contexts of the training text, and
  where in the text they end;
- `layer-<layer>/<shard>.safetensors`: `x` and `target` of that layer's MLP at all their positions.

A shard is always whole, and which contexts it holds follows from its number: runs with other batches, buffers or
numbers of tokens read the same files, and add what is missing. Each file carries the SHA-256 of its content and of
what it claims to be. It is written beside its place, reaches the disk and is renamed, so that a process killed at any
moment leaves whole files only; the next one writes over what was left half done.

Several processes may read and add at one time: they take turns at adding shards, on the file `.lock`. (A lock for as
long as a run lasts would also keep out the runs that only read.)
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxd.atomic import canonical_json, nearest_folder, partial_path, settle_file, sync_folder, write_json_atomically
from mxd.data.tokens import TokenPosition, TokenStream
from mxd.locks import in_turn
from mxd.models import MlpPair

PASSES_PER_SHARD = 8
"""Runs of the model that fill a shard."""
FORMAT, CACHE_FILE = 1, "cache.json"
COMPARED = {
    "model_dtype": "--model-dtype",
    "fingerprint": "model",
    "revision": "model revision",
    "module": "--module",
    "tokenizer": "tokenizer",
    "text_digest": "text",
    "context": "--context",
    "order_seed": "--seed",
    "precision": "model precision",
    "dtype": "--cache-dtype",
    "shard_contexts": "shards of",
}
"""Fields in which a run's identity and a cache's must agree, with their names in messages, the most telling first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """Whose activations a cache holds: everything that decides a number in it."""

    model: str
    """The model's id; shown, not compared, since a folder may have moved."""
    fingerprint: str
    """Digest of the model's configuration, weights and buffers."""
    revision: str | None
    """The model's commit on the hub."""
    model_dtype: str
    """Type of the model's weights."""
    precision: str
    """Type of the model's matrix products."""
    module: str | None
    """Path of the MLPs, where one was given."""
    text: str
    """The text's name; shown, not compared."""
    text_digest: str
    """Digest of the documents, or commit and split of a hub dataset."""
    tokenizer: str
    """Digest of the tokenizer."""
    context: int
    """Tokens of a context."""
    order_seed: int | None
    """Seed of the contexts' order; None where they come in the order of the text."""
    dtype: str
    """Type in which activations are kept."""
    shard_contexts: int
    """Contexts of a shard."""

    def digest(self) -> str:
        """Digest of all that decides a number, for the checksums of shards."""
        return hashlib.sha256(canonical_json({name: getattr(self, name) for name in COMPARED}).encode()).hexdigest()

    def difference(self, other: "CacheIdentity") -> tuple[str, str, str] | None:
        """The first thing in which two caches differ, as a message names it, here and in the other; None if equal."""
        for field, name in COMPARED.items():
            if getattr(self, field) != getattr(other, field):
                return name, self._shown(field), other._shown(field)
        return None

    def _shown(self, field: str) -> str:
        value = str(getattr(self, field))
        if field == "fingerprint":
            return f"{self.model} (fingerprint {value[:12]})"
        return f"{self.text} ({value[:12]})" if field == "text_digest" else value


class Coverage(NamedTuple):
    """How much of what a run needs a cache holds already."""

    bytes_there: int
    """Bytes that need not be written."""
    bytes_missing: int
    """Bytes that are to be written."""


class ActivationCache:
    """The activations of a run's contexts: read where the folder has them, else computed, kept, and then read.

    What a run trains on is always what the files hold, so that the run that writes a cache, one that reads it, and one
    that does some of both see the same numbers, also where `dtype` rounds the model's.

    Args:
        folder: Where the cache is or is to be; nothing is written before the first shard is.
        identity: Whose activations are wanted.
        pairs: Runs the model on contexts and returns what flows through the MLPs of some layers.
        tokens: The training text; read from its present position, which must be its beginning, by a copy.
        widths: Layer to the widths `(d_in, d_out)` of its MLP.
        forward_contexts: Contexts of one run of the model.
        num_contexts: Contexts that will be read.

    Raises:
        ValueError: If the folder holds something else, or activations of another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: CacheIdentity,
        pairs: Callable[[Int[Tensor, "n context"], Collection[int]], Mapping[int, MlpPair]],
        tokens: TokenStream,
        *,
        widths: Mapping[int, tuple[int, int]],
        forward_contexts: int,
        num_contexts: int,
    ) -> None:
        self.folder = folder
        self._identity = identity
        self._pairs = pairs
        self._widths = widths
        self._forward_contexts = forward_contexts
        self._shard_contexts = identity.shard_contexts
        self._num_shards = -(-num_contexts // self._shard_contexts)
        self._text = _TextReader(tokens, self._shard_contexts)
        self._verified: set[Path] = set()
        self.dtype = cast(torch.dtype, getattr(torch, identity.dtype))
        """Type in which activations are kept and handed out."""
        _is_cache(folder, identity)

    @property
    def shard_bytes(self) -> int:
        """Memory that a shard takes while it is computed."""
        return sum(self._layer_bytes(layer) for layer in self._widths)

    def coverage(self) -> Coverage:
        """Look at which files are there; they are opened when they are read."""
        sizes = {f"layer-{layer}": self._layer_bytes(layer) for layer in self._widths}
        sizes["tokens"] = self._shard_contexts * self._identity.context * torch.int32.itemsize
        names = {_name(shard) for shard in range(self._num_shards)}
        there = missing = 0
        for folder, size in sizes.items():
            found = self.folder / folder
            kept = len(names.intersection(os.listdir(found))) if found.is_dir() else 0
            there, missing = there + kept * size, missing + (len(names) - kept) * size
        return Coverage(there, missing)

    @torch.no_grad()
    def read(self, first: int, contexts: Int[Tensor, "n context"]) -> dict[int, MlpPair]:
        """Return the activations of consecutive contexts, running the model on what is in no shard yet.

        They are on the CPU and may be maps of files: not to be changed.

        Args:
            first: Number of the first context.
            contexts: The contexts, which must be those that the shards were made of.

        Raises:
            ValueError: If the contexts are others, or a file is damaged.
            OSError: If a shard cannot be written.
        """
        parts: dict[int, list[MlpPair]] = {layer: [] for layer in self._widths}
        last = first + len(contexts)
        for shard in range(first // self._shard_contexts, -(-last // self._shard_contexts)):
            start = shard * self._shard_contexts
            low, high = max(first - start, 0), min(last - start, self._shard_contexts)
            self._require_shard(shard)
            ids = self._open_tokens(shard)[0][low:high]
            if not torch.equal(ids, contexts[start + low - first : start + high - first].to(ids)):
                raise ValueError(
                    f"the cache in {self.folder} must have been made with this run's text and tokenizer; it has other "
                    f"tokens in shard {shard}: give another --cache."
                )
            for layer, pair in self._open_layers(shard).items():
                parts[layer].append(MlpPair(pair.x[low:high], pair.target[low:high]))
        # Only a piece across two shards is copied.
        return {
            layer: pairs[0] if len(pairs) == 1 else MlpPair(*map(torch.cat, zip(*pairs, strict=True)))
            for layer, pairs in parts.items()
        }

    def _layer_bytes(self, layer: int) -> int:
        return self._shard_contexts * self._identity.context * sum(self._widths[layer]) * self.dtype.itemsize

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / kind / _name(shard)

    def _missing(self, shard: int) -> list[int]:
        return [layer for layer in self._widths if not self._path(f"layer-{layer}", shard).is_file()]

    def _open_tokens(self, shard: int) -> tuple[Int[Tensor, "n context"], dict[str, Any]]:
        """The token ids of a shard, and where in the text they end."""
        like = torch.empty(self._shard_contexts, self._identity.context, dtype=torch.int32, device="meta")
        tensors, facts = self._open("tokens", shard, {"ids": like})
        return tensors["ids"], facts

    def _open_layers(self, shard: int) -> dict[int, MlpPair]:
        return {
            layer: MlpPair(**self._open(f"layer-{layer}", shard, self._empty(widths, "meta"))[0])
            for layer, widths in self._widths.items()
        }

    def _empty(self, widths: tuple[int, int], device: str) -> dict[str, Tensor]:
        sizes = (self._shard_contexts, self._identity.context)
        return {
            name: torch.empty(*sizes, width, dtype=self.dtype, device=device)
            for name, width in zip(("x", "target"), widths, strict=True)
        }

    def _open(self, kind: str, shard: int, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a file, mapped, and what else it holds; checked when this process first opens it."""
        path = self._path(kind, shard)
        try:
            with safe_open(path, framework="pt") as file:
                facts = cast(dict[str, Any], json.loads((file.metadata() or {})["mxd"]))
                tensors = {name: cast(Tensor, file.get_tensor(name)) for name in like}
            if any(t.shape != like[name].shape or t.dtype != like[name].dtype for name, t in tensors.items()):
                raise ValueError("its shapes or types are others")
            claimed = facts.pop("sha256")
            if path not in self._verified and claimed != self._checksum(kind, shard, tensors, facts):
                raise ValueError("its checksum does not hold")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be a whole shard of this cache; it is not ({error}): remove it, and it is computed again."
            ) from error
        self._verified.add(path)
        return tensors, facts

    def _checksum(self, kind: str, shard: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
        claims = {"identity": self._identity.digest(), "kind": kind, "shard": shard, "facts": facts}
        digest = hashlib.sha256(canonical_json(claims).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _require_shard(self, shard: int) -> None:
        """See to it that the shard's tokens and every wanted layer are there."""
        if not self._missing(shard) and self._path("tokens", shard).is_file():
            return
        with self._turn_to_write():
            # Another process may have come first.
            if not self._path("tokens", shard).is_file():
                self._write_tokens(shard)
            ids, _ = self._open_tokens(shard)
            if missing := self._missing(shard):
                self._write_layers(shard, ids.long(), missing)

    def _write_tokens(self, shard: int) -> None:
        before = next((known for known in range(shard, 0, -1) if self._path("tokens", known - 1).is_file()), 0)
        if before and self._text.shard != shard:
            self._text.restore(before, TokenPosition(**self._open_tokens(before - 1)[1]["ends"]))
        ids = self._text.read(shard)
        self._write("tokens", shard, {"ids": ids.int()}, {"ends": self._text.state()._asdict()})

    def _write_layers(self, shard: int, ids: Int[Tensor, "n context"], layers: Collection[int]) -> None:
        kept = {layer: self._empty(self._widths[layer], "cpu") for layer in layers}
        for first in range(0, len(ids), self._forward_contexts):
            rows = slice(first, first + self._forward_contexts)
            for layer, pair in self._pairs(ids[rows], layers).items():
                kept[layer]["x"][rows] = pair.x
                kept[layer]["target"][rows] = pair.target
        for layer in layers:
            self._write(f"layer-{layer}", shard, kept[layer], {})

    def _write(self, kind: str, shard: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        path = self._path(kind, shard)
        # One key: the order of several would differ from process to process.
        described = {**facts, "sha256": self._checksum(kind, shard, tensors, facts)}
        partial = partial_path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, partial, metadata={"mxd": canonical_json(described)})
            settle_file(partial)
            partial.replace(path)
            sync_folder(path.parent)
            self._verified.add(path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"the cache must be written to {path}, which failed ({error})") from error
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _turn_to_write(self) -> Generator[None, None, None]:
        """Wait until no other process adds to the cache; where files cannot be locked, nothing is waited for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with in_turn(self.folder / ".lock"):
            # Made or changed by another process since this one began.
            if not _is_cache(self.folder, self._identity):
                content = {"format": FORMAT, "identity": asdict(self._identity)}
                write_json_atomically(self.folder / CACHE_FILE, content)
            yield


class _TextReader:
    """The training text shard by shard, on its own: the run's stream reads block by block."""

    def __init__(self, tokens: TokenStream, shard_contexts: int) -> None:
        self._beginning = tokens.state()
        self._shard_contexts = shard_contexts
        # A shallow copy shares what its original reads from until it is told where to read.
        self._tokens = copy.copy(tokens)
        self.restore(0, self._beginning)

    def restore(self, shard: int, position: TokenPosition) -> None:
        self._tokens.restore(position)
        self.shard = shard

    def state(self) -> TokenPosition:
        return self._tokens.state()

    def read(self, shard: int) -> Int[Tensor, "n context"]:
        """The shard's contexts; reads through the text as far as it must."""
        if self.shard > shard:
            self.restore(0, self._beginning)
        while self.shard < shard:
            self._tokens.take(self._shard_contexts)
            self.shard += 1
        contexts = self._tokens.take(self._shard_contexts)
        self.shard += 1
        return contexts


def _name(shard: int) -> str:
    return f"{shard:08d}.safetensors"


def _is_cache(folder: Path, identity: CacheIdentity) -> bool:
    """Whether the folder is a cache of this identity; False where a new one can be made there.

    Anything else in its place is refused.
    """
    file = folder / CACHE_FILE
    # A killed process leaves names with a dot. Listed before the file is looked for, which another run may be writing.
    taken = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if not file.is_file():
        if taken or not nearest_folder(folder).is_dir():
            raise ValueError(
                f"{folder} must be a cache, or an empty or a new folder; it is none; give another --cache."
            )
        return False
    try:
        content = cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version of mxd has {FORMAT}")
        stored = CacheIdentity(**content["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must describe a cache ({error}); give another --cache, or remove this one."
        ) from error
    if difference := stored.difference(identity):
        name, old, new = difference
        raise ValueError(f"the cache in {folder} was made with {name} {old}, this run has {new}; give another --cache.")
    return True
