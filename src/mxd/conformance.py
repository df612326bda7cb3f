"""A conformance suite for sparse layers, after the fashion of scikit-learn's `check_estimator`.

`check_layer` runs every check that applies to a layer; it serves layers that are not part of this library as well.
A check works on a float64 copy on the CPU whose parameters are drawn at random (the zeros of an initialisation prove
nothing), and leaves the given layer and the global random state as they were. All latents are written out densely, so
the layer should be small.
"""

import copy
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mxd.checkpoint import load_layer, save_layer
from mxd.layers import LAYERS, MixtureOfDecoders, SparseCode, SparseLayer, TopK

EXACT = 1e-10
"""Difference allowed in float64, in units of the largest expected entry (or of 1 where that is smaller)."""
COARSE = 0.03
"""Difference allowed in bfloat16, in the same units."""


class Check(Protocol):
    """One fact that must hold of a layer."""

    __name__: str

    def __call__(self, layer: SparseLayer, *, seed: int = 0) -> None:
        """Raise an `AssertionError` if the fact does not hold."""


def check_layer(layer: SparseLayer, *, seed: int = 0) -> None:
    """Run every check that applies to this layer.

    Args:
        layer: A small layer; it is not altered.
        seed: Seed of the random parameters and inputs.

    Raises:
        AssertionError: If the layer breaks the contract; the message is one sentence saying what does not hold.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for check in CHECKS:
            check(layer, seed=seed)


def check_forward(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that the prediction is the decoded code, and the code the encoded input."""
    layer, x, _ = _example(layer, seed)
    output, code = layer(x), layer.encode(x)
    _require_close(_dense(layer, output.code), _dense(layer, code), "the code of forward(x) must be encode(x)")
    _require_close(output.prediction, layer.decode(x, code), "the prediction must be decode(x, encode(x))")


def check_code(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that the code holds the scores that are selected, rectified and not renormalised, each once."""
    layer, x, _ = _example(layer, seed)
    code, k, rule = layer.encode(x), layer.config.k, layer.selection.name
    shape = len(x), k if rule == TopK.name else code.values.shape[1]
    for name, part in (("values", code.values), ("indices", code.indices)):
        _require(part.shape == shape, f"the code's {name} must have shape {shape}; got {(*part.shape,)}.")
    _require(bool((code.values >= 0).all()), "the code's values must be nonnegative.")
    within = (code.indices >= 0) & (code.indices < layer.config.num_latents)
    _require(bool(within.all()), f"the code's indices must lie in [0, {layer.config.num_latents - 1}].")
    for values, indices in zip(code.values, code.indices, strict=True):
        used = indices[values > 0]
        _require(len(used.unique()) == len(used), "the code's indices must be distinct where the value is not 0.")
    expected = _restate(layer, x).code
    _require_close(_dense(layer, code), expected, f"encode(x) must keep what {rule} selects with k {k}, rectified")


def check_affine(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that decoding is `base + Σ value · atom`, for the input's own code and for edited ones."""
    layer, x, generator = _example(layer, seed)
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
        _require_close(layer.decode(x, code), expected, f"decode must be base + Σ value · atom for {name}")


def check_dense_branch(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that every atom is the dense branch, where there is one, times a vector that no input changes."""
    layer, x, _ = _example(layer, seed)
    dense = layer.dense_branch(x)
    if dense is not None:
        atoms = layer.atoms(x, torch.arange(layer.config.num_latents).expand(len(x), -1))
        sentence = "every atom must be the dense branch times a vector that no input changes"
        _require_close(atoms * dense[0], atoms[0] * dense[:, None], sentence)


def check_gradients(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check the gradients of the input and of every parameter against a dense restatement of the layer."""
    layer, x, _ = _example(layer, seed)
    output, expected = layer(x.requires_grad_()), _restate(layer, x)
    _require_close(output.prediction, expected.prediction, "the prediction must be base + Σ value · atom, all latents")
    actual = _gradients(layer, x, output.prediction, _dense(layer, output.code))
    for (name, gradient), (_, restated) in zip(actual, _gradients(layer, x, *expected), strict=True):
        _require_close(gradient, restated, f"the gradient of {name} must be that of the dense restatement")


def check_encode_among(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that `encode_among` selects among the given latents only, and that its gradients reach the scorer."""
    layer, x, generator = _example(layer, seed)
    chosen = torch.randperm(layer.config.num_latents, generator=generator)[: -(-layer.config.num_latents // 2)]
    k = min(layer.config.k, len(chosen))
    with torch.no_grad():
        layer.scorer.bias[chosen[0]] += 10.0
    code = layer.encode_among(x, chosen, k)
    _require(bool(torch.isin(code.indices, chosen).all()), "encode_among must select among the given latents only.")
    scores = layer.pre_activations(x)[:, chosen]
    kept = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(k).indices, 1.0)
    expected = torch.zeros(len(x), layer.config.num_latents, dtype=x.dtype)
    expected = expected.index_copy(1, chosen, scores.relu() * kept)
    _require_close(_dense(layer, code), expected, f"encode_among must keep the {k} largest of the given latents")
    parameters = tuple(layer.parameters())
    actual = torch.autograd.grad(code.values.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    restated = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True, materialize_grads=True)
    _require(any(bool(gradient.any()) for gradient in actual), "encode_among's gradients must reach the scorer.")
    for (name, _), gradient, wanted in zip(layer.named_parameters(), actual, restated, strict=True):
        _require_close(gradient, wanted, f"encode_among's gradient of {name} must be that of the dense restatement")


def check_batch_dimensions(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that leading dimensions, none, one or two of them, do not matter, and that a batch may be empty."""
    layer, x, _ = _example(layer, seed)
    expected = layer(x)
    dense = _dense(layer, expected.code)
    for name, batch in {"no": (), "one": (len(x),), "two": (2, len(x) // 2)}.items():
        output = layer(x.view(*batch, -1) if batch else x[0])
        prediction, code = (expected.prediction, dense) if batch else (expected.prediction[0], dense[0])
        sentence = f"an input with {name} leading dimensions must give the same"
        _require_close(output.prediction, prediction.view(*batch, -1), f"{sentence} prediction")
        _require_close(_dense(layer, output.code), code.view(*batch, -1), f"{sentence} code")
    for shape in ((0,), (2, 0)):
        empty = torch.zeros(*shape, layer.config.d_in, dtype=x.dtype, requires_grad=True)
        prediction = layer(empty).prediction
        _require(prediction.shape == (*shape, layer.config.d_out), "an empty batch must give an empty prediction.")
        gradients = _gradients(layer, empty, prediction, prediction.new_zeros(0))
        _require(not any(bool(part.any()) for _, part in gradients), "an empty batch's gradients must be zero.")


def check_input_maps(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a change of the input's scale and origin can be folded into `input_maps`, where there are any."""
    layer, x, generator = _example(layer, seed)
    if not layer.input_maps():
        return
    expected = layer(x)
    dense = _dense(layer, expected.code)
    scale, shift = torch.rand(2, layer.config.d_in, generator=generator, dtype=x.dtype) + 0.5
    with torch.no_grad():
        for weight, bias in layer.input_maps():
            bias += shift @ weight
            weight *= scale[:, None]
    output = layer((x - shift) / scale)
    _require_close(_dense(layer, output.code), dense, "input_maps must name every map the code's scores are made of")
    _require_close(output.prediction, expected.prediction, "input_maps must name every map of the input")


def check_bfloat16(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a bfloat16 copy runs forward and backward and stays near the exact layer."""
    layer, x, _ = _example(layer, seed)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    _require_near(low, x.to(torch.bfloat16), nullcontext(), "in bfloat16")
    _require(low(x.to(torch.bfloat16)).prediction.dtype == torch.bfloat16, "a bfloat16 layer must predict in bfloat16.")


def check_autocast(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a float32 copy runs forward and backward under bfloat16 autocast and stays near the exact layer."""
    layer, x, _ = _example(layer, seed)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    _require_near(copy.deepcopy(layer).to(torch.float32), x.float(), autocast, "under bfloat16 autocast")


def check_expert_tensor(layer: SparseLayer, *, seed: int = 0) -> None:
    r"""Check Lemma 2 of a mixture of decoders: its forward pass is that of the tensor it never builds.

    The tensor's three forms are the explicit sum $\sum_n a_n W_n^\top z$, the Khatri–Rao form of its third unfolding,
    $W_{(3)} = (C \odot D)^\top$, and the mode products $W \times_1 a \times_2 z$.
    """
    mixture, x, _ = _example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    output, z = mixture(x), mixture.encoder(x)
    a = _dense(mixture, output.code)
    tensor = torch.stack([mixture.expert_weight(n) for n in range(mixture.config.num_experts)])
    explicit = mixture.base(x) + sum(a[:, n, None] * (z @ tensor[n]) for n in range(len(tensor)))
    _require_close(output.prediction, explicit, "the prediction must be Σ_n a_n W_nᵀ z + b")
    columns = zip(mixture.W_expert.t(), mixture.W_dec.t(), strict=True)
    khatri_rao = torch.stack([torch.kron(c, d) for c, d in columns], dim=1)
    unfolding = tensor.permute(2, 0, 1).flatten(1)
    _require_close(unfolding, khatri_rao.t(), "the experts' third unfolding must be the Khatri-Rao product (C ⊙ D)ᵀ")
    folded = torch.stack([khatri_rao.t() @ torch.kron(*row) for row in zip(a, z, strict=True)]) + mixture.base(x)
    _require_close(output.prediction, folded, "the prediction must be (C ⊙ D)ᵀ (a ⊗ z) + b")
    first_mode = (a @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
    modes = torch.linalg.vecdot(z[:, :, None], first_mode, dim=1) + mixture.base(x)
    _require_close(output.prediction, modes, "the prediction must be W ×₁ a ×₂ z + b")


def check_expert_rank(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check Lemma 1 of a mixture of decoders: an expert has the rank of the decoder's columns in its own support."""
    mixture, _, generator = _example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    d_hidden, d_out = mixture.W_dec.shape
    full = min(d_hidden, d_out)
    for rank in sorted({full, max(1, full // 2), 1}, reverse=True):
        left = torch.randn(d_hidden, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, d_out, generator=generator, dtype=torch.float64)
        for zeros in sorted({0, 1, d_out // 2, d_out - 1, d_out}):
            vector = torch.rand(d_out, generator=generator, dtype=torch.float64) + 0.5
            vector[torch.randperm(d_out, generator=generator)[:zeros]] = 0.0
            with torch.no_grad():
                mixture.W_dec.copy_(left @ right)
                mixture.W_expert[0] = vector
            found = int(torch.linalg.matrix_rank(mixture.expert_weight(0)))
            expected = min(rank, d_out - zeros)
            _require(
                found == expected == int(torch.linalg.matrix_rank(mixture.W_dec[:, vector != 0])),
                f"an expert with {zeros} zeros over a decoder of rank {rank} must have rank {expected}; got {found}.",
            )


def check_first_step(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that a mixture of decoders whose decoder is zero moves only the decoder and the output bias at first."""
    mixture, x, generator = _example(layer, seed)
    if not isinstance(mixture, MixtureOfDecoders):
        return
    with torch.no_grad():
        mixture.W_dec.zero_()
    before = copy.deepcopy(mixture.state_dict())
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=0.1, weight_decay=0.0)
    target = torch.randn(len(x), mixture.config.d_out, generator=generator, dtype=x.dtype)
    (mixture(x).prediction - target).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in mixture.state_dict().items() if not torch.equal(tensor, before[name])}
    _require(
        moved == {"W_dec", "b_dec"},
        f"from a decoder of zeros the first step must move W_dec and b_dec only; it moved {', '.join(sorted(moved))}.",
    )


def check_saving(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that saving and loading is the identity, and that another process writes the same bytes.

    It applies to the registered kinds only: others have no name under which they could be found again.
    """
    if layer.kind not in LAYERS or type(layer) is not LAYERS[layer.kind].layer:
        return
    layer = _example(layer, seed).layer
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        save_layer(layer, first)
        loaded = load_layer(first)
        _require(loaded.config == layer.config, "a saved and loaded layer must have the same configuration.")
        state, expected = loaded.state_dict(), layer.state_dict()
        same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        _require(same, "a saved and loaded layer must have the same weights, bit for bit.")
        resave = "import sys, mxd.checkpoint as disk; disk.save_layer(disk.load_layer(sys.argv[1]), sys.argv[2])"
        command = [sys.executable, "-c", resave, str(first), str(second)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        _require(process.returncode == 0, f"another process must be able to load and save it; {process.stderr[-500:]}")
        written, again = ({file.name: file.read_bytes() for file in path.iterdir()} for path in (first, second))
        _require(written == again, "another process that loads and saves a layer must write the same bytes.")


def check_compiles(layer: SparseLayer, *, seed: int = 0) -> None:
    """Check that `torch.compile` takes the layer as one graph and changes neither values nor gradients.

    `check_layer` leaves it out: it takes long, needs a C++ compiler, and jaxtyping's import hook breaks it.
    """
    layer, x, _ = _example(layer, seed)
    expected = layer(x.requires_grad_())
    # Layers share their code, of which a process compiles only so many versions.
    torch.compiler.reset()
    output = torch.compile(layer, fullgraph=True)(x)
    _require_close(output.prediction, expected.prediction, "the compiled layer must make the same prediction")
    dense, wanted = _dense(layer, output.code), _dense(layer, expected.code)
    _require_close(dense, wanted, "the compiled layer must return the same code")
    eager = _gradients(layer, x, expected.prediction, wanted)
    for (name, gradient), (_, uncompiled) in zip(_gradients(layer, x, output.prediction, dense), eager, strict=True):
        _require_close(gradient, uncompiled, f"the compiled layer must have the same gradient of {name}")


CHECKS: tuple[Check, ...] = (
    check_forward,
    check_code,
    check_affine,
    check_dense_branch,
    check_gradients,
    check_encode_among,
    check_batch_dimensions,
    check_input_maps,
    check_bfloat16,
    check_autocast,
    check_expert_tensor,
    check_expert_rank,
    check_first_step,
    check_saving,
)
"""The checks that `check_layer` runs; each returns at once for a layer that it does not apply to."""


class _Example(NamedTuple):
    layer: SparseLayer
    x: Tensor
    generator: torch.Generator


class _Restatement(NamedTuple):
    prediction: Tensor
    code: Tensor


def _example(layer: SparseLayer, seed: int, tokens: int = 8) -> _Example:
    """Return a float64 copy with random parameters, half of whose inputs have fewer than `k` active latents."""
    generator = torch.Generator().manual_seed(seed)
    layer = copy.deepcopy(layer).to("cpu", torch.float64).requires_grad_().eval()
    layer.zero_grad()
    with torch.no_grad():
        for buffer in layer.selection.buffers():
            buffer.fill_(COARSE / 2)  # a threshold that rounding may cross unnoticed
        for parameter in layer.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter.shape[0] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = torch.randn(tokens, layer.config.d_in, generator=generator, dtype=torch.float64)
        smallest = layer.pre_activations(x).topk(layer.config.k).values[:, -1].sort().values
        # Between two of them: a score of exactly zero has two one-sided derivatives.
        layer.scorer.bias.sub_(smallest[tokens // 2 - 1 : tokens // 2 + 1].mean())
    return _Example(layer, x, generator)


def _restate(layer: SparseLayer, x: Tensor) -> _Restatement:
    scores = layer.pre_activations(x)
    code = scores.relu() * layer.selection.kept(scores.detach(), layer.config.k)
    everyone = torch.arange(layer.config.num_latents).expand(len(x), -1)
    return _Restatement(layer.base(x) + torch.einsum("tn,tno->to", code, layer.atoms(x, everyone)), code)


def _gradients(layer: SparseLayer, x: Tensor, prediction: Tensor, code: Tensor) -> list[tuple[str, Tensor]]:
    """Return the gradients of a fixed random function of prediction and dense code."""
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        ((part * torch.randn(part.shape, generator=generator, dtype=part.dtype)).sum() for part in (prediction, code)),
        start=torch.zeros((), dtype=prediction.dtype),
    )
    names, leaves = zip(("the input", x), *layer.named_parameters(), strict=True)
    return list(zip(names, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True), strict=True))


def _dense(layer: SparseLayer, code: SparseCode) -> Tensor:
    return code.dense(layer.config.num_latents)


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
    _require_close(fixed.double(), exact.decode(exact_x, code), f"predictions {where} must be near the exact", COARSE)
    values, expected = (_dense(layer, part).double().sort().values for part in (output.code, code))
    _require_close(values, expected, f"coefficients {where} must be near the exact", COARSE)
    _require(bool(output.prediction.isfinite().all()), f"predictions {where} must be finite.")
    gradients = torch.autograd.grad(loss, tuple(layer.parameters()), allow_unused=True, materialize_grads=True)
    for (name, parameter), gradient in zip(layer.named_parameters(), gradients, strict=True):
        fits = gradient.dtype == parameter.dtype and bool(gradient.isfinite().all())
        _require(fits, f"the gradient of {name} {where} must be finite and have the parameter's type.")


def _require_close(actual: Tensor, expected: Tensor, sentence: str, tolerance: float = EXACT) -> None:
    shapes = tuple(actual.shape), tuple(expected.shape)
    _require(shapes[0] == shapes[1], f"{sentence}; its shape is {shapes[0]}, not {shapes[1]}.")
    if actual.numel() == 0:
        return
    difference = float((actual - expected).detach().abs().max())
    allowed = tolerance * max(1.0, float(expected.detach().abs().max()))
    _require(difference <= allowed, f"{sentence}; it is off by {difference:.2g}.")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)
