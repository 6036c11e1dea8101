"""A path with its cross-validation: the coefficients at each strength, and which strengths the folds choose."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchreg.cli.output import CommandError, reason
from torchreg.one_standard_error import mean_errors, one_standard_error

BEST, SIMPLE = "least error", "one standard error"
STEPS = 100_000


@dataclass(frozen=True)
class Problem:
    """What is fitted, and how.

    Attributes:
        name: of the data.
        x: shape (rows, features).
        y: shape (rows,).
        features: their names.
        target: its name.
        l1_ratio: the share of L1.
        folds: of the cross-validation, whose rows are shuffled by ``seed``.
        count: how many strengths.
        eps: the weakest over the strongest.
        standardise: whether each feature is divided by its standard deviation.
    """

    name: str
    x: Any
    y: Any
    features: Sequence[str]
    target: str
    l1_ratio: float
    folds: int
    seed: int
    count: int
    eps: float
    standardise: bool


@dataclass(frozen=True)
class Path:
    """A fitted path.

    Attributes:
        problem: what was fitted.
        alphas: the strengths (m,), falling.
        coefs: coefficients (features, m) of the features as they were penalised: standardised, unless told otherwise.
        scales: by what each feature was divided, (features,).
        means: of the features (features,).
        errors: mean squared errors (m, folds).
        best: the position of the strength with the least mean error.
        simple: the position of the one chosen by the rule of one standard error.
    """

    problem: Problem
    alphas: Any
    coefs: Any
    scales: Any
    means: Any
    errors: Any
    best: int
    simple: int

    @property
    def choices(self) -> dict[str, int]:
        """The positions of the chosen strengths, the stronger one first."""
        return {SIMPLE: self.simple, BEST: self.best}

    @property
    def original(self) -> Any:
        """Coefficients (features, m) for the features in their own units."""
        return self.coefs / self.scales[:, None]

    @property
    def intercepts(self) -> Any:
        """Intercepts (m,) that go with `original`."""
        return self.problem.y.mean() - self.means @ self.original

    def entered(self) -> list[float | None]:
        """The largest strength at which each coefficient is not zero; None where there is none."""
        alive = self.coefs != 0
        return [float(self.alphas[row.argmax()]) if row.any() else None for row in alive]


def fit_path(problem: Problem) -> Path:
    """Solve the problem at all strengths, and cross-validate.

    Raises:
        CommandError: if the data can't be fitted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold

    from torchreg.linear import ElasticNetCV, enet_path

    x, means, scales = _prepared(problem)
    y = problem.y - problem.y.mean()
    folds = KFold(problem.folds, shuffle=True, random_state=problem.seed)
    settings: dict[str, Any] = {"l1_ratio": problem.l1_ratio, "max_iter": STEPS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            model = ElasticNetCV(alphas=problem.count, eps=problem.eps, cv=folds, **settings).fit(x, y)
            alphas, coefs, _ = enet_path(x, y, alphas=model.alphas_, **settings)
    except (ValueError, ArithmeticError, RuntimeError, ConvergenceWarning) as error:
        raise CommandError(f"the path failed: {reason(error)}") from None
    errors = model.mse_path_.reshape(len(alphas), -1)
    if not (np.isfinite(coefs).all() and np.isfinite(errors).all()):
        raise CommandError("the path failed: the data are too large for float64")
    if not alphas[-1] < alphas[0]:
        raise CommandError(f"no column is correlated with {problem.target!r}")
    return Path(problem, alphas, coefs, scales, means, errors, *one_standard_error(alphas, errors))


def _prepared(problem: Problem) -> tuple[Any, Any, Any]:
    """Centred, perhaps standardised features, their means, and what they were divided by; constant ones become zero."""
    x, y = problem.x, problem.y
    if len(y) < 2 * problem.folds:
        raise CommandError(f"argument --folds: {problem.folds} folds need {2 * problem.folds} rows, got {len(y)}")
    if not y.min() < y.max():
        raise CommandError(f"the target {problem.target!r} is constant")
    with np.errstate(over="ignore", invalid="ignore"):
        means = x.mean(0)
        centred = x - means
        centred[:, x.min(0) == x.max(0)] = 0  # exactly, whatever the mean's rounding
        scales = centred.std(0) if problem.standardise else np.ones(x.shape[1])
        scales = np.where(scales == 0, 1.0, scales)
        centred /= scales
        power = (y - y.mean()) @ (y - y.mean())
    if not (np.isfinite(centred).all() and np.isfinite(power) and np.isfinite(scales).all()):
        raise CommandError("the data are too large for float64: scale the columns")
    return centred, means, scales


def document(path: Path) -> dict[str, Any]:
    """Plain values for JSON. `coefficients` are for the features' own units, `standardised` as they were penalised."""
    p, (means, spread) = path.problem, mean_errors(path.errors)
    return {
        "data": {"name": p.name, "rows": len(p.y), "features": list(p.features), "target": p.target},
        "settings": {
            "l1_ratio": p.l1_ratio,
            "folds": p.folds,
            "seed": p.seed,
            "eps": p.eps,
            "standardise": p.standardise,
        },
        "alphas": path.alphas.tolist(),
        "mean_squared_error": means.tolist(),
        "standard_error": spread.tolist(),
        "intercepts": path.intercepts.tolist(),
        "coefficients": path.original.T.tolist(),
        "standardised": path.coefs.T.tolist() if p.standardise else None,
        "entered_at": path.entered(),
        "choices": {
            name.replace(" ", "_"): {
                "alpha": float(path.alphas[i]),
                "mean_squared_error": float(means[i]),
                "features": [f for f, w in zip(p.features, path.coefs[:, i], strict=True) if w != 0],
            }
            for name, i in path.choices.items()
        },
    }


def as_json(path: Path) -> str:
    """`document` as strict JSON."""
    return json.dumps(document(path), indent=1, allow_nan=False)


def as_csv(path: Path) -> str:
    """One line for each strength: errors, intercept and the coefficients for the features' own units."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["alpha", "mean_squared_error", "standard_error", "nonzero", "intercept", *path.problem.features])
    means, spread = mean_errors(path.errors)
    for i, alpha in enumerate(path.alphas.tolist()):
        coefs = path.original[:, i].tolist()
        nonzero = sum(w != 0 for w in coefs)
        writer.writerow([alpha, float(means[i]), float(spread[i]), nonzero, float(path.intercepts[i]), *coefs])
    return out.getvalue()
