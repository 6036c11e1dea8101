"""How far a momentum optimizer moves a weight, in the long run, for each unit of gradient and learning rate."""

from __future__ import annotations


def sgd_momentum_gain(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> float:
    """G, the factor that torch's SGD momentum applies to a constant gradient.

    G = (1−d)/(1−μ), 1 + μ(1−d)/(1−μ) with Nesterov momentum, and 1 without momentum. A proximal step must shrink by
    lr·G·λ; shrinking by lr·λ solves the problem with the strength λ/G.

    >>> round(sgd_momentum_gain(0.9), 12)
    10.0

    Raises:
        ValueError: if the gain is infinite or negative (μ ≥ 1 or d > 1).
    """
    if momentum == 0:
        return 1.0
    if not 0 <= momentum < 1:
        raise ValueError(f"Expected `momentum` to be in [0, 1) beside a penalty, got {momentum}.")
    if not dampening <= 1:
        raise ValueError(f"Expected `dampening` to be at most 1 beside a penalty, got {dampening}.")
    gain = (1 - dampening) / (1 - momentum)
    return 1 + momentum * gain if nesterov else gain
