"""Balanced logistic regression on few features and on many."""

import warnings

import numpy as np
from jaxtyping import Bool, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

MOST_NEWTON = 256
"""Features up to which Newton's method, which holds and factors a matrix of features by features, is used."""
MOST_ITERATIONS = 200


class Scale:
    """Brings features to unit variance, and dense ones to mean 0, as on the training part.

    The penalty then weighs on all features alike, whatever the unit of a kind's codes.
    """

    def __init__(self, train: Float[np.ndarray, "train width"]) -> None:
        self._mean = train.mean(axis=0)
        deviation = train.std(axis=0)
        # A feature that never changes tells nothing, whatever it is divided by.
        self._deviation = np.where(deviation > 0, deviation, 1)

    def __call__(self, values: Float[np.ndarray, "part width"]) -> Float[np.ndarray, "part width"]:
        """Return the features, scaled."""
        return (values - self._mean) / self._deviation


def fit_probe(x: Float[np.ndarray, "train width"], positive: Bool[np.ndarray, " train"]) -> LogisticRegression:
    """Return a logistic regression with an L2 penalty (C = 1) in which both classes weigh the same in all.

    Up to 256 features it is fitted by Newton's method with Cholesky factors, as in the paper's code, else by L-BFGS; at
    most 200 iterations.
    """
    solver = "newton-cholesky" if x.shape[1] <= MOST_NEWTON else "lbfgs"
    probe = LogisticRegression(class_weight="balanced", solver=solver, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        # After so many iterations the probe is as good as it will be for comparing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(x, positive)
