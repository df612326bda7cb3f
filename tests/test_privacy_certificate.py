"""Certificates: the bounds against the true distance, the derived constants against the data, and every refusal."""

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mxd.privacy.certificate import Bound, Certificate, Constant, rounded_up
from mxd.privacy.certify import (
    CertifyConfig,
    certify_logistic,
    pretrain_logistic,
)
from mxd.privacy.distance_bounds import FullStep, distance_bounds
from mxd.privacy.gaussian import noise_scale
from mxd.privacy.logistic import (
    LogisticObjective,
    gradient_rounding,
    logistic_constants,
    product_rounding,
    require_strong_convexity,
    with_constant,
)
from mxd.privacy.newton import minimise, newton_direction
from mxd.privacy.objective import ObjectiveConfig, Uniformity, accuracy_loss, uniformity_loss
from tests.logistic_problems import KINDS, problem, random_problem


def data(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 4, generator=generator)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long() if classes == 3 else (x[:, 0] > 0).long()
    return x[:10], x[10:], labels[10:]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0, 3))
def test_every_bound_is_at_least_the_true_distance(seed: int, kind: Uniformity, far: float) -> None:
    made = random_problem(seed, kind)
    constants = logistic_constants(made)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(made.num_parameters, dtype=torch.float64, generator=generator)
    exact = minimise(made, torch.zeros_like(noise))
    before = exact + far * noise / noise.norm()
    assert float(exact.norm()) <= constants.minimiser_radius
    for _ in range(3):
        direction = newton_direction(made, before)
        after = before - direction.vector
        distance = float((after - exact).norm())
        bounds = distance_bounds(made, constants, FullStep(before, direction, after))
        assert bounds["a priori, ball"].value is not None
        for name, bound in bounds.items():
            # The minimiser itself is known to rounding only.
            assert bound.value is None or distance <= bound.value + 1e-13, name
        before = after


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(0.01, 4))
def test_constants_hold_everywhere(seed: int, kind: Uniformity, spread: float) -> None:
    made = random_problem(seed, kind)
    constants, slack = logistic_constants(made), 1 + 1e-9
    generator = torch.Generator().manual_seed(seed)
    w, v = spread * torch.randn(2, made.num_parameters, dtype=torch.float64, generator=generator)
    here, there = made.hessian(w), made.hessian(v)
    eigenvalues = torch.linalg.eigvalsh(here)
    assert float(eigenvalues[0]) >= constants.strong_convexity / slack
    assert float(eigenvalues[-1]) <= constants.smoothness * slack
    away = float((w - v).norm())
    assert float(torch.linalg.eigvalsh(here - there).abs().max()) <= constants.hessian_lipschitz * away * slack
    assert float((made.gradient(w) - made.gradient(v)).norm()) <= constants.smoothness * away * slack
    assert float(made.accuracy_gradient(w).norm()) <= constants.accuracy_slope * slack
    retained, protected = ((rows @ made.matrix(w), rows @ made.matrix(v)) for rows in (made.retained, made.protected))
    losses = [float(accuracy_loss(logits, made.labels)) for logits in retained]
    assert abs(losses[0] - losses[1]) <= constants.accuracy_slope * away * slack
    uniform = [float(uniformity_loss(logits, kind)) for logits in protected]
    assert abs(uniform[0] - uniform[1]) <= constants.uniformity_slope * away * slack


def test_rounding_is_bounded_by_what_is_added_for_it() -> None:
    made = problem(classes=4, seed=5)
    constants = logistic_constants(made)
    w, v = 5 * torch.randn(2, made.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(7))
    turned = LogisticObjective(
        protected=made.protected.flip(0),
        retained=made.retained[order],
        labels=made.labels[order],
        num_classes=4,
        config=made.config,
    )
    change = float((made.gradient(w) - turned.gradient(w)).norm())
    assert 0 < change <= 2 * gradient_rounding(made, constants, w) < 1e-11
    change = float((made.hessian_at(w)(v) - turned.hessian_at(w)(v)).norm())
    assert change <= 2 * product_rounding(made, constants, w, v) < 1e-9


def test_a_certificate_has_the_noise_of_its_smallest_bound() -> None:
    protected, retained, labels = data()
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=1)
    step = certify_logistic(protected, retained, labels, config, num_classes=3)
    certificate = step.certificate
    assert certificate.certified
    smallest = min(bound.value for bound in certificate.bounds.values() if bound.value is not None)
    assert certificate.sensitivity == smallest
    assert certificate.sigma == noise_scale(epsilon=1.0, delta=1e-5, sensitivity=smallest)
    assert {constant.origin for constant in certificate.constants.values()} == {"given", "computed", "derived"}
    assert "(1, 1e-05)-indistinguishable" in certificate.statement()
    again = certify_logistic(protected, retained, labels.int(), config, num_classes=3)
    assert step.released is not None
    assert again.released is not None
    assert step.experimental is None
    assert not bool((step.released == step.stepped).any())
    assert not bool((step.released == again.released).any())
    assert bool((step.stepped == again.stepped).all())


def test_seeded_noise_is_for_experiments_and_never_certified() -> None:
    protected, retained, labels = data()
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=1, noise_seed=3)
    step, again = (certify_logistic(protected, retained, labels, config, num_classes=3) for _ in range(2))
    certificate = step.certificate
    assert not certificate.certified
    assert certificate.sigma is None
    assert certificate.statement().startswith("No certificate: the noise is seeded")
    assert certificate.to_json()["noise"] == "seeded"
    assert certificate.to_json()["certified"] is False
    assert Certificate.from_json(json.dumps(certificate.to_json())) == certificate
    with pytest.raises(ValueError, match="the noise is seeded"):
        certificate.public_json()
    assert step.released is None
    assert step.experimental is not None
    assert again.experimental is not None
    assert bool((step.experimental == again.experimental).all())
    secret = certify_logistic(
        protected, retained, labels, CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=1), num_classes=3
    ).certificate
    assert secret.noise == "secret"
    assert certificate.experimental_sigma == secret.sigma == secret.experimental_sigma
    forged = json.dumps(certificate.to_json() | {"certified": True})
    with pytest.raises(ValueError, match="claims certified"):
        Certificate.from_json(forged)


def test_what_may_be_published_does_not_tell_of_the_weights_without_noise() -> None:
    protected, retained, labels = data()
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=0)
    starts = 0.1 * torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    one, two = (
        certify_logistic(protected, retained, labels, config, num_classes=3, pretrained=start).certificate
        for start in starts
    )
    shown = [certificate.public_json() for certificate in (one, two)]
    # From two starts everything that may be published is the same, but for the noise and the sentence that names it.
    assert {name for name in shown[0] if shown[0][name] != shown[1][name]} == {
        "bounds",
        "sensitivity",
        "sigma",
        "statement",
    }
    public = one.public()
    assert set(public.bounds) == {"smallest"}
    moved = {name for name in one.constants if one.constants[name] != two.constants[name]}
    assert moved == set(one.constants) - set(public.constants)
    assert {"gradient_after", "step_residual", "norm_before", "rounding_after"} <= moved
    assert {"strong_convexity", "hessian_lipschitz", "largest_norm"} <= set(public.constants)
    read = Certificate.from_json(json.dumps(shown[0], allow_nan=False))
    assert read == public
    assert (read.certified, read.sigma, read.statement()) == (True, one.sigma, one.statement())


def test_examples_in_both_sets_are_refused_and_counted() -> None:
    protected, retained, labels = data()
    both = torch.cat([protected[:1], retained[:-3], protected[4:6].double()])
    with pytest.raises(ValueError, match="3 of 50 retained rows are also protected"):
        certify_logistic(protected, both, labels, CertifyConfig(), num_classes=3)
    zero = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="1 of 50 retained rows is also protected; remove it"):
        certify_logistic(-zero, torch.cat([zero, retained[1:]]), labels, CertifyConfig(), num_classes=3)


def test_constants_are_rounded_outwards_however_many_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = with_constant(torch.randn(50_000, 2, dtype=torch.float64, generator=generator))
    made = LogisticObjective(
        protected=rows[:5],
        retained=rows,
        labels=(rows[:, 0] > 0).long(),
        num_classes=2,
        config=ObjectiveConfig(theta=0.5, weight_decay=0.1, uniformity="kl-u-p"),
    )
    constants = logistic_constants(made)
    plain = float(torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1])
    assert 2 * len(rows) * 2.0**-53 < constants.retained_moment / plain - 1 < 1e-9
    squares = [sum((Fraction(x) ** 2 for x in row), Fraction(0)) for row in rows[:200].tolist()]
    few = logistic_constants(
        LogisticObjective(
            protected=rows[:5], retained=rows[:200], labels=made.labels[:200], num_classes=2, config=made.config
        )
    )
    assert Fraction(few.largest_norm) ** 2 >= max(squares)
    assert Fraction(few.retained_square) >= sum(squares) / 200


def test_strong_convexity_is_never_above_the_exact_difference() -> None:
    for seed in range(40):
        base = problem(kind="square", seed=seed)
        needed = logistic_constants(base).smallest_weight_decay
        for more in (1 + 1e-15, 1 + 1e-12, 1.001):
            made = problem(kind="square", decay=needed * more, seed=seed)
            found = logistic_constants(made)
            theta, concavity = Fraction(made.config.theta), Fraction(found.uniformity.concavity)
            exact = Fraction(made.config.weight_decay) - theta * concavity * Fraction(found.protected_moment)
            assert Fraction(found.strong_convexity) < exact


def test_the_named_weight_decay_is_rounded_up() -> None:
    for seed in range(20):
        made = problem(kind="square", decay=1e-4, seed=seed)
        needed = logistic_constants(made).smallest_weight_decay
        with pytest.raises(ValueError, match="smallest that certifies") as error:
            require_strong_convexity(made, logistic_constants(made))
        named = float(str(error.value).split("above ")[1].split(",")[0])
        assert needed <= named <= needed * (1 + 1e-5)


@given(st.floats(1e-300, 1e300))
def test_numbers_are_printed_rounded_up(value: float) -> None:
    assert value <= float(rounded_up(value)) <= value * (1 + 1.1e-5)
    assert len(rounded_up(value).split("e")[0].replace(".", "").lstrip("0")) <= 6


def test_without_a_warm_up_the_step_is_the_paper_s_whole_one() -> None:
    protected, retained, labels = data()
    start = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=0)
    step = certify_logistic(protected, retained, labels, config, num_classes=3, pretrained=start)
    rows = [torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1) for x in (protected, retained)]

    def whole(w: Tensor) -> Tensor:
        W = w.view(5, 3)
        uniform = uniformity_loss(rows[0] @ W, "kl-u-p")
        return 0.6 * uniform + 0.4 * accuracy_loss(rows[1] @ W, labels) + 0.05 * w.square().sum()

    point = start.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(whole(point), point)
    hessian = torch.autograd.functional.hessian(whole, start.flatten())
    assert isinstance(hessian, Tensor)
    expected = start.flatten() - torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(step.stepped.flatten(), expected, rtol=1e-9, atol=1e-10)
    assert bool((step.pretrained == start).all())


def test_without_the_hessian_itself_the_certificate_is_much_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    protected, retained, labels = data()
    config = CertifyConfig(theta=0.6, weight_decay=0.1, warm_up=3)
    exact = certify_logistic(protected, retained, labels, config, num_classes=3)
    monkeypatch.setattr("mxd.privacy.newton.EXACT_PARAMETERS", 3)
    products = certify_logistic(protected, retained, labels, config, num_classes=3, pretrained=exact.pretrained)
    assert "conjugate gradients" in products.certificate.constants["step_length"].meaning
    assert products.certificate.certified
    distance = float((products.stepped - exact.stepped).norm())
    assert exact.certificate.sensitivity is not None
    assert products.certificate.sensitivity is not None
    assert distance <= exact.certificate.sensitivity + products.certificate.sensitivity < 1e-4


def test_json_says_everything_and_is_checked_when_it_is_read() -> None:
    protected, retained, labels = data()
    config = CertifyConfig(weight_decay=0.1, warm_up=0)
    certificate = certify_logistic(protected, retained, labels, config, num_classes=3).certificate
    text = json.dumps(certificate.to_json(), allow_nan=False)
    assert Certificate.from_json(text) == certificate
    for name, value in (("sigma", 1e-3), ("sensitivity", 0.0), ("certified", False)):
        forged = json.dumps(certificate.to_json() | {name: value})
        with pytest.raises(ValueError, match=f"claims {name}"):
            Certificate.from_json(forged)
    for broken in (
        "{",
        "[]",
        "{}",
        text.replace("derived", "believed"),
        text.replace('"epsilon": 1.0', '"epsilon": 0'),
        text.replace('"noise": "secret"', '"noise": "unknown"'),
        text.replace('"noise": "secret", ', ""),
    ):
        with pytest.raises(ValueError, match=r"no certificate|origin|epsilon|noise must be"):
            Certificate.from_json(broken)


def test_an_estimated_constant_makes_it_no_certificate() -> None:
    bounds = {"a posteriori": Bound(0.5, "‖∇M‖ / m")}
    proved = {"m": Constant(0.1, "derived", "strong convexity")}
    assert Certificate(epsilon=1.0, delta=1e-5, constants=proved, bounds=bounds, noise="secret").certified
    guessed = Certificate(
        epsilon=1.0,
        delta=1e-5,
        constants={"m": Constant(0.1, "estimated", "at one point")},
        bounds=bounds,
        noise="secret",
    )
    assert not guessed.certified
    assert guessed.sigma is None
    assert guessed.statement() == "No certificate: estimated, not proved: m."
    assert Certificate.from_json(json.dumps(guessed.to_json())) == guessed
    empty = Certificate(
        epsilon=1.0, delta=1e-5, constants=proved, bounds={"local": Bound(None, "needs more")}, noise="secret"
    )
    assert empty.statement() == "No certificate: no bound on the distance to the minimiser holds."
    with pytest.raises(ValueError, match="finite"):
        Certificate(epsilon=1.0, delta=1e-5, constants=proved, bounds={"b": Bound(math.inf, "")}, noise="secret")


def test_a_ball_that_may_cut_the_minimiser_off_is_not_certified() -> None:
    protected, retained, labels = data()
    inside = CertifyConfig(weight_decay=0.1, radius=50.0)
    assert certify_logistic(protected, retained, labels, inside, num_classes=3).certificate.certified
    config = CertifyConfig(weight_decay=0.1, radius=1e-3)
    step = certify_logistic(protected, retained, labels, config, num_classes=3)
    assert not step.certificate.certified
    assert step.released is None
    assert step.noise_accuracy_cost is None
    assert "raise radius above" in step.certificate.statement()


@pytest.mark.parametrize("kind", ["kl-p-u", "square"])
def test_the_smallest_weight_decay_that_certifies_is_named_and_certifies(kind: Uniformity) -> None:
    protected, retained, labels = data()
    with pytest.raises(ValueError, match="smallest that certifies") as error:
        certify_logistic(protected, retained, labels, CertifyConfig(uniformity=kind, weight_decay=1e-3), num_classes=3)
    named = float(str(error.value).split("above ")[1].split(",")[0])
    config = CertifyConfig(uniformity=kind, weight_decay=1.01 * named)
    step = certify_logistic(protected, retained, labels, config, num_classes=3)
    assert step.certificate.certified
    assert step.certificate.bounds["self-concordant"].value is None


def test_convexity_is_truly_lost_below_a_curvature_bound() -> None:
    made = problem(kind="square", classes=2, theta=0.999, decay=1e-6)
    along = made.protected[0] / made.protected[0].norm()
    w = torch.outer(2.3 * along, torch.tensor([1.0, -1.0], dtype=torch.float64)).flatten()
    assert float(torch.linalg.eigvalsh(made.hessian(w))[0]) < 0
    with pytest.raises(ValueError, match="positive definite"):
        newton_direction(made, w)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protected": torch.zeros(0, 4)}, "protected set .* is empty"),
        ({"retained": torch.full((50, 4), math.nan)}, "retained features must be finite"),
        ({"protected": torch.zeros(2, 5)}, "equally wide"),
        ({"retained_labels": torch.full((50,), 3)}, r"labels must lie in \[0, 2\]"),
        ({"retained_labels": torch.zeros(49, dtype=torch.long)}, "one label"),
        ({"pretrained": torch.zeros(4, 3)}, "one bias row"),
        ({"pretrained": torch.full((5, 3), math.inf)}, "pretrained weights must be finite"),
    ],
)
def test_unfit_data_are_refused(changed: dict[str, Tensor], message: str) -> None:
    protected, retained, labels = data()
    given_ = {"protected": protected, "retained": retained, "retained_labels": labels} | changed
    with pytest.raises(ValueError, match=message):
        certify_logistic(**given_, config=CertifyConfig(), num_classes=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"theta": 0.0}, "theta"),
        ({"theta": 1.0}, "theta"),
        ({"weight_decay": 0.0}, "weight_decay must be above 0"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"warm_up": -1}, "warm_up"),
        ({"radius": 0.0}, "radius"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CertifyConfig(**settings_)  # pyright: ignore[reportArgumentType]


def test_pretraining_finds_the_minimum_of_the_cross_entropy() -> None:
    _, retained, labels = data()
    W = pretrain_logistic(retained, labels, num_classes=3, weight_decay=0.05).requires_grad_()
    rows = torch.cat([retained.double(), torch.ones(len(retained), 1, dtype=torch.float64)], 1)
    loss = accuracy_loss(rows @ W, labels) + 0.025 * W.square().sum()
    assert float(torch.autograd.grad(loss, W)[0].norm()) < 1e-14
