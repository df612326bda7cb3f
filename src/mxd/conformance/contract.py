"""Checks of the contract that every sparse layer fulfils."""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mxd.conformance.example import COARSE, dense_code, example, gradients_of, require, require_close, restate
from mxd.layers import SparseCode, SparseLayer, TopK


def check_forward(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that the prediction is the decoded code, and the code the encoded input."""
    layer, x, _ = example(layer, seed)
    output, code = layer(x), layer.encode(x)
    require_close(dense_code(layer, output.code), dense_code(layer, code), "the code of forward(x) must be encode(x)")
    require_close(output.prediction, layer.decode(x, code), "the prediction must be decode(x, encode(x))")


def check_code(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that the code holds the scores that are selected, rectified and not renormalised, each once."""
    layer, x, _ = example(layer, seed)
    code, k, rule = layer.encode(x), layer.config.k, layer.selection.name
    shape = len(x), k if rule == TopK.name else code.values.shape[1]
    for name, part in (("values", code.values), ("indices", code.indices)):
        require(part.shape == shape, f"the code's {name} must have shape {shape}; got {(*part.shape,)}.")
    require(bool((code.values >= 0).all()), "the code's values must be nonnegative.")
    within = (code.indices >= 0) & (code.indices < layer.config.num_latents)
    require(bool(within.all()), f"the code's indices must lie in [0, {layer.config.num_latents - 1}].")
    for values, indices in zip(code.values, code.indices, strict=True):
        used = indices[values > 0]
        require(len(used.unique()) == len(used), "the code's indices must be distinct where the value is not 0.")
    expected = restate(layer, x).code
    require_close(dense_code(layer, code), expected, f"encode(x) must keep what {rule} selects with k {k}, rectified")


def check_affine(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that decoding is `base + Σ value · atom`, for the input's own code and for edited ones."""
    layer, x, generator = example(layer, seed)
    own = layer.encode(x)
    factors = torch.randn(own.values.shape, generator=generator, dtype=x.dtype)
    edits = {
        "the input's own code": own,
        "a code with scaled values": SparseCode(own.values * factors, own.indices),
        "another input's code": SparseCode(own.values.roll(1, 0) + factors, own.indices.roll(1, 0)),
        "an empty code": SparseCode(torch.zeros_like(own.values), own.indices),
    }
    for name, code in edits.items():
        expected = layer.base(x) + (code.values[..., None] * layer.atoms(x, code.indices)).sum(-2)
        require_close(layer.decode(x, code), expected, f"decode must be base + Σ value · atom for {name}")


def check_dense_branch(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that every atom is the dense branch, where there is one, times a vector that no input changes."""
    layer, x, _ = example(layer, seed)
    dense = layer.dense_branch(x)
    if dense is not None:
        atoms = layer.atoms(x, torch.arange(layer.config.num_latents).expand(len(x), -1))
        sentence = "every atom must be the dense branch times a vector that no input changes"
        require_close(atoms * dense[0], atoms[0] * dense[:, None], sentence)


def check_fixed_atoms(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that the layer says of its atoms whether any input changes them."""
    layer, x, _ = example(layer, seed)
    atoms = layer.atoms(x, torch.arange(layer.config.num_latents).expand(len(x), -1))
    fixed = bool((atoms == atoms[:1]).all())
    require(
        layer.fixed_atoms == fixed,
        f"fixed_atoms must be {fixed} where inputs {'do not ' if fixed else ''}change the atoms; it is "
        f"{layer.fixed_atoms}.",
    )


def check_gradients(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check the gradients of the input and of every parameter against a dense restatement of the layer."""
    layer, x, _ = example(layer, seed)
    output, expected = layer(x.requires_grad_()), restate(layer, x)
    require_close(output.prediction, expected.prediction, "the prediction must be base + Σ value · atom, all latents")
    actual = gradients_of(layer, x, output.prediction, dense_code(layer, output.code))
    for (name, gradient), (_, restated) in zip(actual, gradients_of(layer, x, *expected), strict=True):
        require_close(gradient, restated, f"the gradient of {name} must be that of the dense restatement")


def check_encode_among(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that `encode_among` selects among the given latents only, and that its gradients reach the scorer."""
    layer, x, generator = example(layer, seed)
    chosen = torch.randperm(layer.config.num_latents, generator=generator)[: -(-layer.config.num_latents // 2)]
    k = min(layer.config.k, len(chosen))
    with torch.no_grad():
        layer.scorer.bias[chosen[0]] += 10.0
    code = layer.encode_among(x, chosen, k)
    require(bool(torch.isin(code.indices, chosen).all()), "encode_among must select among the given latents only.")
    scores = layer.pre_activations(x)[:, chosen]
    kept = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(k).indices, 1.0)
    expected = torch.zeros(len(x), layer.config.num_latents, dtype=x.dtype)
    expected = expected.index_copy(1, chosen, scores.relu() * kept)
    require_close(dense_code(layer, code), expected, f"encode_among must keep the {k} largest of the given latents")
    parameters = tuple(layer.parameters())
    actual = torch.autograd.grad(code.values.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    restated = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    require(any(bool(gradient.any()) for gradient in actual), "encode_among's gradients must reach the scorer.")
    for (name, _), gradient, wanted in zip(layer.named_parameters(), actual, restated, strict=True):
        require_close(gradient, wanted, f"encode_among's gradient of {name} must be that of the dense restatement")


def check_batch_dimensions(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that leading dimensions, none, one or two of them, do not matter, and that a batch may be empty."""
    layer, x, _ = example(layer, seed)
    expected = layer(x)
    dense = dense_code(layer, expected.code)
    for name, batch in {"no": (), "one": (len(x),), "two": (2, len(x) // 2)}.items():
        output = layer(x.view(*batch, -1) if batch else x[0])
        prediction, code = (expected.prediction, dense) if batch else (expected.prediction[0], dense[0])
        sentence = f"an input with {name} leading dimensions must give the same"
        require_close(output.prediction, prediction.view(*batch, -1), f"{sentence} prediction")
        require_close(dense_code(layer, output.code), code.view(*batch, -1), f"{sentence} code")
    for shape in ((0,), (2, 0)):
        empty = torch.zeros(*shape, layer.config.d_in, dtype=x.dtype, requires_grad=True)
        prediction = layer(empty).prediction
        require(prediction.shape == (*shape, layer.config.d_out), "an empty batch must give an empty prediction.")
        gradients = gradients_of(layer, empty, prediction, prediction.new_zeros(0))
        require(not any(bool(part.any()) for _, part in gradients), "an empty batch's gradients must be zero.")


def check_input_maps(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a change of the input's scale and origin can be folded into `input_maps`, where there are any."""
    layer, x, generator = example(layer, seed)
    if not layer.input_maps():
        return
    expected = layer(x)
    dense = dense_code(layer, expected.code)
    scale, shift = torch.rand(2, layer.config.d_in, generator=generator, dtype=x.dtype) + 0.5
    with torch.no_grad():
        for weight, bias in layer.input_maps():
            bias += shift @ weight
            weight *= scale[:, None]
    output = layer((x - shift) / scale)
    require_close(dense_code(layer, output.code), dense, "input_maps must name every map the code's scores are made of")
    require_close(output.prediction, expected.prediction, "input_maps must name every map of the input")


def check_bfloat16(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a bfloat16 copy runs forward and backward and stays near the exact layer."""
    layer, x, _ = example(layer, seed)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    _require_near(low, x.to(torch.bfloat16), nullcontext(), "in bfloat16")
    require(low(x.to(torch.bfloat16)).prediction.dtype == torch.bfloat16, "a bfloat16 layer must predict in bfloat16.")


def check_autocast(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a float32 copy runs forward and backward under bfloat16 autocast and stays near the exact layer."""
    layer, x, _ = example(layer, seed)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    _require_near(copy.deepcopy(layer).to(torch.float32), x.float(), autocast, "under bfloat16 autocast")


def _require_near(layer: SparseLayer, x: Tensor, context: AbstractContextManager[object], where: str) -> None:
    """Require finite gradients, and values near those of the exact layer.

    Rounding may let nearly equal scores change places, so predictions are compared at a fixed code.
    """
    exact, exact_x = copy.deepcopy(layer).to(torch.float64), x.double()
    code = exact.encode(exact_x)
    with context:
        output = layer(x)
        fixed = layer.decode(x, SparseCode(code.values.to(x.dtype), code.indices))
        loss = output.prediction.square().sum()
    require_close(fixed.double(), exact.decode(exact_x, code), f"predictions {where} must be near the exact", COARSE)
    values, expected = (dense_code(layer, part).double().sort().values for part in (output.code, code))
    require_close(values, expected, f"coefficients {where} must be near the exact", COARSE)
    require(bool(output.prediction.isfinite().all()), f"predictions {where} must be finite.")
    gradients = torch.autograd.grad(loss, tuple(layer.parameters()), allow_unused=True, materialize_grads=True)
    for (name, parameter), gradient in zip(layer.named_parameters(), gradients, strict=True):
        fits = gradient.dtype == parameter.dtype and bool(gradient.isfinite().all())
        require(fits, f"the gradient of {name} {where} must be finite and have the parameter's type.")
