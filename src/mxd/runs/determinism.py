"""What a device must be told so that equal steps give equal bits on it."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_STRICT = "error"
# Its settings are properties of the module's own class, which a type checker does not see.
_MEMORY: Any = torch.utils.deterministic


def reserve_workspace() -> None:
    """Have cuBLAS compute with workspaces of one size, as PyTorch asks for; cuBLAS reads it when CUDA starts.

    A value that the environment has already stays.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")


@contextmanager
def deterministic(device: str | torch.device, precision: str = "float32") -> Generator[None, None, None]:
    """Have equal operations give equal bits on a CUDA device for as long as this is open; elsewhere nothing is changed.

    Without it gradients of attention and of convolutions are summed in an order that changes from run to run, and cuDNN
    computes convolutions of float32 in TF32. What was set before is restored at the end, but for the size of cuBLAS'
    workspaces.

    Args:
        device: Where a loop computes.
        precision: Type of its matrix products; convolutions are in TF32 only where this is not `float32`.

    Raises:
        ValueError: If an operation is met that has no deterministic implementation on the device.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    reserve_workspace()
    cudnn = torch.backends.cudnn
    mode, fill = torch.get_deterministic_debug_mode(), _MEMORY.fill_uninitialized_memory
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    try:
        # What use_deterministic_algorithms sets, without the compiler that it loads.
        torch.set_deterministic_debug_mode(_STRICT)
        # Memory that is read before it is written would be a fault of PyTorch's own; to fill all of it takes time.
        _MEMORY.fill_uninitialized_memory = False
        cudnn.deterministic, cudnn.benchmark = True, False
        cudnn.allow_tf32 = before[2] and precision != "float32"
        yield
    except RuntimeError as error:
        operation, said, _ = str(error).partition(" does not have a deterministic implementation")
        if not said:
            raise
        raise ValueError(
            f"on {device} every operation must have a deterministic implementation, so that a run can be resumed bit "
            f"for bit; {operation} has none; choose --device cpu."
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        _MEMORY.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before
