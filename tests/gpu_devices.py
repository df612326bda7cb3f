"""Which devices a test of what a GPU does runs on: the CPU everywhere, and a CUDA device where there is one."""

import pytest
import torch

_cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; see `make bench-gpu`"),
    ],
)
on_gpu = pytest.mark.parametrize("device", [_cuda])
on_every_device = pytest.mark.parametrize("device", ["cpu", _cuda])
