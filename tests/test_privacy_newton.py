"""Newton's steps: against autograd and dense algebra, and what they refuse."""

import pytest
import torch
from torch import Tensor, nn

from mxd.privacy.certify import CertifyConfig
from mxd.privacy.examples import Examples
from mxd.privacy.logistic import LogisticObjective, with_constant
from mxd.privacy.model_newton import ModelObjective, StochasticConfig, newton_step_model
from mxd.privacy.newton import (
    AutogradObjective,
    chain_depth,
    conjugate_gradients,
    minimise,
    newton_direction,
    solve_exactly,
    stochastic_direction,
)
from mxd.privacy.objective import Uniformity, objective
from tests.logistic_problems import KINDS, problem


def by_autograd(made: LogisticObjective) -> AutogradObjective:
    def whole(w: Tensor) -> Tensor:
        W = w.view(-1, made.num_classes)
        return objective(
            made.config,
            protected_logits=made.protected @ W,
            retained_logits=made.retained @ W,
            retained_labels=made.labels,
            parameters=[w],
        )

    return AutogradObjective([whole])


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_are_those_of_autograd(kind: Uniformity) -> None:
    made, expected = problem(kind=kind), by_autograd(problem(kind=kind))
    generator = torch.Generator().manual_seed(1)
    w, v = torch.randn(2, made.num_parameters, dtype=torch.float64, generator=generator)
    assert made.value(w) == pytest.approx(expected.value(w))
    torch.testing.assert_close(made.gradient(w), expected.gradient(w))
    torch.testing.assert_close(made.hessian(w), expected.hessian(w))
    torch.testing.assert_close(made.hessian_at(w)(v), expected.hessian_at(w)(v))
    torch.testing.assert_close(made.hessian(w) @ v, made.hessian_at(w)(v))


def test_weight_decay_is_counted_once() -> None:
    small, large = problem(decay=0.1), problem(decay=0.6)
    w = torch.randn(small.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    identity = torch.eye(len(w), dtype=torch.float64)
    torch.testing.assert_close(large.gradient(w) - small.gradient(w), 0.5 * w)
    torch.testing.assert_close(large.hessian(w) - small.hessian(w), 0.5 * identity)


def test_a_full_step_minimises_a_quadratic_at_once() -> None:
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    hessian, b = factor @ factor.T + torch.eye(6, dtype=torch.float64), torch.arange(6, dtype=torch.float64)
    quadratic = AutogradObjective([lambda w: w @ hessian @ w / 2, lambda w: -(b @ w)])
    start = torch.randn(6, dtype=torch.float64, generator=generator)
    after = start - newton_direction(quadratic, start).vector
    torch.testing.assert_close(after, torch.linalg.solve(hessian, b))


def test_conjugate_gradients_agree_with_cholesky() -> None:
    made = problem(classes=4)
    w = torch.ones(made.num_parameters, dtype=torch.float64)
    slope, hessian = made.gradient(w), made.hessian(w)
    found = conjugate_gradients(made.hessian_at(w), slope)
    torch.testing.assert_close(found, solve_exactly(hessian, slope), rtol=1e-6, atol=1e-8)


def test_beyond_a_few_thousand_parameters_only_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem()
    w = torch.ones(made.num_parameters, dtype=torch.float64)
    exact = newton_direction(made, w)
    monkeypatch.setattr("mxd.privacy.newton.EXACT_PARAMETERS", 3)
    products = newton_direction(made, w)
    assert (exact.method, products.method) == ("exact Hessian, Cholesky", "conjugate gradients")
    torch.testing.assert_close(products.vector, exact.vector, rtol=1e-6, atol=1e-8)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    hessian = torch.diag(torch.tensor([1.0, -0.25], dtype=torch.float64))
    right = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"positive definite.*smallest eigenvalue is -0\.25"):
        solve_exactly(hessian, right)
    with pytest.raises(ValueError, match=r"positive definite"):
        conjugate_gradients(lambda v: hessian @ v, torch.tensor([0.1, 1.0], dtype=torch.float64))


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    broken = AutogradObjective([lambda w: w.log().sum()])
    with pytest.raises(ValueError, match="finite"):
        newton_direction(broken, torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_conjugate_gradients_say_that_they_stopped_short() -> None:
    hessian = torch.diag(torch.logspace(0, 8, 30, dtype=torch.float64))
    with pytest.raises(ValueError, match="relative residual"):
        conjugate_gradients(lambda v: hessian @ v, torch.ones(30, dtype=torch.float64), max_iterations=5)


def test_the_stochastic_estimate_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    hessian, right = x.T @ x / 20 + 0.5 * torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    scale = float(x.square().sum(1).max()) + 0.5

    def product(v: Tensor, drawn: torch.Generator) -> Tensor:
        row = x[int(torch.randint(20, (1,), generator=drawn))]
        return row * (row @ v) + 0.5 * v

    depth = chain_depth(scale, float(torch.linalg.eigvalsh(hessian)[0]), 120)
    found = stochastic_direction(product, right, scale=scale, depth=depth, repeats=120, seed=5)
    torch.testing.assert_close(found, torch.linalg.solve(hessian, right), rtol=0.08, atol=0.03)
    series = stochastic_direction(lambda v, _: hessian @ v, right, scale=scale, depth=4 * depth, repeats=1, seed=0)
    torch.testing.assert_close(series, torch.linalg.solve(hessian, right), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("numbers", [(0.0, 5, 1), (1.0, 0, 1), (1.0, 5, 0)])
def test_an_estimate_from_nothing_is_refused(numbers: tuple[float, int, int]) -> None:
    scale, depth, repeats = numbers
    with pytest.raises(ValueError, match="above 0"):
        stochastic_direction(lambda v, _: v, torch.ones(2), scale=scale, depth=depth, repeats=repeats, seed=0)
    with pytest.raises(ValueError, match="diverged"):
        stochastic_direction(lambda v, _: 1e3 * v, torch.ones(2), scale=0.1, depth=99, repeats=1, seed=0)
    with pytest.raises(ValueError, match="smallest"):
        chain_depth(1.0, 2.0, 1)


@pytest.mark.parametrize("decay", [1e-4, 0.1])
def test_the_minimum_is_one_to_machine_precision(decay: float) -> None:
    made = problem(decay=decay, seed=7)
    far = 30 * torch.randn(made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    found = minimise(made, far)
    assert float(made.gradient(found).norm()) < 1e-14
    torch.testing.assert_close(found, minimise(made, torch.zeros_like(far)), rtol=1e-8, atol=1e-9)


def sets(classes: int = 3) -> tuple[Examples, Examples]:
    made = problem(classes=classes)
    protected = Examples(inputs=made.protected[:, :-1].float(), labels=torch.zeros(10, dtype=torch.long))
    return protected, Examples(inputs=made.retained[:, :-1].float(), labels=made.labels)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_a_linear_model_steps_as_the_logistic_regression_does(batch_size: int) -> None:
    protected, retained = sets()
    model = nn.Linear(4, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=1)
    step = newton_step_model(model, protected, retained, config, batch_size=batch_size)
    assert all(bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True))
    wide = LogisticObjective(
        protected=with_constant(protected.inputs),  # pyright: ignore[reportArgumentType]
        retained=with_constant(retained.inputs),  # pyright: ignore[reportArgumentType]
        labels=retained.labels,
        num_classes=3,
        config=config.objective,
    )
    w = torch.cat([before[0].T, before[1][None]]).double().flatten()
    for _ in range(2):
        w = w - newton_direction(wide, w).vector
    moved = list(step.model.parameters())
    torch.testing.assert_close(torch.cat([moved[0].T, moved[1][None]]).double().flatten(), w, rtol=1e-4, atol=1e-5)
    assert not step.certificate.certified
    assert "not known to be linear" in step.certificate.statement()
    assert "smallest_eigenvalue" in step.certificate.statement()


def test_an_estimated_step_is_near_the_exact_one() -> None:
    protected, retained = sets()
    torch.manual_seed(0)
    model, config = nn.Linear(4, 3), CertifyConfig(theta=0.6, weight_decay=1.0, warm_up=0)
    made = ModelObjective(model, protected, retained, config, batch_size=8)
    largest = 0.5 * float(with_constant(retained.inputs).square().sum(1).max()) + 1.0  # pyright: ignore[reportArgumentType]
    stochastic = StochasticConfig(scale=largest, depth=20, repeats=2, sample=10)
    exact, found = newton_direction(made, made.start).vector, made.estimated_direction(made.start, stochastic)
    assert float((found - exact).norm() / exact.norm()) < 0.1
    quick = StochasticConfig(scale=largest, depth=1, repeats=1)
    step = newton_step_model(model, protected, retained, config, stochastic=quick)
    assert not step.certificate.certified


def test_a_saddle_of_a_network_is_refused() -> None:
    protected, retained = sets()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.nn.init.zeros_(model[2].weight)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="positive definite"):
        newton_step_model(model, protected, retained, CertifyConfig(weight_decay=1e-6, warm_up=0))


def test_batches_go_to_the_models_device() -> None:
    protected, retained = sets()
    # Where nothing is computed, tensors of two devices are refused as on an accelerator.
    model = nn.Linear(4, 3).to("meta")
    objective = ModelObjective(model, protected, retained, CertifyConfig(), batch_size=4)
    assert objective.start.device.type == "meta"
    assert objective.gradient(objective.start).device.type == "meta"
    assert objective.hessian_at(objective.start)(objective.start).device.type == "meta"
