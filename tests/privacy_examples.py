"""Small examples and models for the tests of `mxd.privacy`."""

from pathlib import Path
from typing import Any, cast

import pyarrow
import torch
from pyarrow import csv, parquet
from torch import nn

from mxd.privacy.examples import Examples

CLASSES = 3


def blobs(count: int, seed: int, *, features: int = 4) -> Examples:
    """Points around one of three centres, with the centre's number as their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = 2.0 * torch.randn(CLASSES, features, generator=torch.Generator().manual_seed(99))
    return Examples(inputs=centres[labels] + torch.randn(count, features, generator=generator), labels=labels)


def network(seed: int = 0, *, features: int = 4, hidden: int = 16) -> nn.Sequential:
    """A multilayer perceptron."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def trained(examples: Examples, seed: int = 0) -> nn.Sequential:
    """The perceptron, fitted to the examples."""
    assert isinstance(examples.inputs, torch.Tensor)
    model = network(seed, features=examples.inputs.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(examples.inputs), examples.labels).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def save_table(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a table as .csv or .parquet, whichever the name says; return where."""
    table: Any = cast(Any, pyarrow).table(columns)
    if path.suffix == ".csv":
        cast(Any, csv).write_csv(table, path)
    else:
        cast(Any, parquet).write_table(table, path)
    return path
