"""The path from all features to few: a network whose input columns are shrunk more and more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchreg.features.reweighting import reweighted_columns
from torchreg.features.training import Rows, check_finite, step, train
from torchreg.optim import ProxAdamW

_ALONE = 20
"""At the first strength the median column would be gone after so many strengths if no gradient held it."""
_NARROWER = 0.9
"""The columns that are left are copied when they are fewer than this part of those in memory."""


@dataclass(frozen=True)
class FeaturePath:
    """What a selector's network kept at every strength, from dense to sparse.

    Attributes:
        strengths: of the penalty, ascending; the first is 0. Shape (m,).
        n_features: how many features were left, never ascending. Shape (m,).
        scores: on the validation data, the accuracy or R² of the network as it was: shrunk, not refitted. Shape (m,).
        errors: their standard errors.
        norms: of each feature's column of weights, exactly 0 once it is dropped. Shape (m, features).
    """

    strengths: Any
    n_features: Any
    scores: Any
    errors: Any
    norms: Any

    def __len__(self) -> int:
        return len(self.strengths)

    def support(self, index: int) -> Any:
        """Which features were left at a strength: a mask of shape (features,)."""
        return self.norms[index] > 0

    def ranking(self, index: int = -1) -> Any:
        """The features from most to least important, at a strength: a permutation of shape (features,).

        First those that were left, by their norms, then the others: those dropped last first, and of those dropped at
        the same strength the one with the larger norm before.
        """
        norms = self.norms[: range(len(self))[index] + 1]
        last = len(norms) - 1 - (norms[::-1] > 0).argmax(axis=0)  # the last strength that a feature survived
        last = np.where((norms > 0).any(axis=0), last, 0)
        return np.lexsort((-norms[last, np.arange(norms.shape[1])], -last))


class Shrinking:
    """A network in training whose input columns are penalised together and, once zero, stay zero.

    Where it is a plain sequence that starts with its input layer, columns that are zero are taken out of the layer
    and of the data as they become many, which changes nothing but the time.
    """

    def __init__(
        self, network: nn.Module, layer: nn.Linear, rows: Rows, validation: Rows | None, *, power: float, **adam: Any
    ) -> None:
        self.network, self.layer = network, layer
        self.rows, self.validation = rows, validation
        self.features = layer.in_features
        self.columns = torch.arange(self.features, device=layer.weight.device)
        self.penalty = reweighted_columns(power)
        others: list[Tensor] = [p for p in network.parameters() if p is not layer.weight]
        self.optimizer = ProxAdamW([{"params": [layer.weight]}, {"params": others}], **adam)
        self.hold: RemovableHandle | None = None
        self.narrows = type(network) is nn.Sequential and network[0] is layer

    def first_strength(self, steps: int) -> float:
        """Where shrinkage begins to tell, given the steps at each strength: see `_ALONE`."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state[self.layer.weight]
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        at_once = self.penalty.group_scales([self.layer.weight.detach()], [group["lr"] / (v.sqrt() + group["eps"])])
        at_once = at_once[(at_once > 0) & (v.sum(0) > 0)]  # a constant feature has no gradient, and is gone at once
        return float(at_once.median()) / (_ALONE * steps) if len(at_once) else 1.0

    def shrink(self, strength: float, batches: list[Tensor]) -> None:
        """Train at a strength, on these batches."""
        group = self.optimizer.param_groups[0]
        group["penalty"], group["strength_scale"] = self.penalty, strength
        self.network.train()
        for some in batches:
            step(self.network, self.optimizer, self.rows, some)

    def norms(self) -> Tensor:
        """Of all columns."""
        norms = self.layer.weight.detach().norm(dim=0)
        return norms.new_zeros(self.features).index_copy_(0, self.columns, norms)

    def settle(self) -> None:
        """Keep columns zero that are zero now."""
        alive = self.layer.weight.detach().norm(dim=0) > 0
        left = int(alive.sum())
        if self.narrows and 0 < left < _NARROWER * len(alive):
            self._narrow(alive.nonzero()[:, 0])
        elif left < len(alive):
            self._hold(alive)

    def _hold(self, alive: Tensor) -> None:
        """Let no gradient or moment of gradients move the other columns."""
        weight = self.layer.weight
        for value in self.optimizer.state[weight].values():
            if value.shape == weight.shape:
                value.mul_(alive)
        if self.hold is not None:
            self.hold.remove()
        self.hold = weight.register_hook(lambda grad: grad * alive)

    def _narrow(self, kept: Tensor) -> None:
        """Take all other columns out of the layer, its optimizer's state and the data."""
        old = self.layer.weight
        new = nn.Parameter(old.detach().index_select(1, kept))
        state = self.optimizer.state.pop(old)
        self.optimizer.state[new] = {
            key: value.index_select(1, kept) if value.shape == old.shape else value for key, value in state.items()
        }
        self.optimizer.param_groups[0]["params"] = [new]
        self.layer.weight, self.layer.in_features = new, len(kept)
        self.columns = self.columns[kept]
        self.rows = self.rows.columns(kept)
        if self.validation is not None:
            self.validation = self.validation.columns(kept)


def follow(
    shrinking: Shrinking,
    fewest: int,
    *,
    dense_epochs: int,
    dense_factor: float,
    growth: float,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> FeaturePath:
    """Train with all features, then at growing strengths until at most ``fewest`` are left.

    Args:
        shrinking: the network.
        fewest: features at which to stop.
        dense_epochs: of training without a penalty.
        dense_factor: of the learning rate in that time.
        growth: the factor from one strength to the next.
        steps: at each strength.
        batch: samples in a batch.
        generator: of the batches.

    Raises:
        ValueError: if the weights become NaN or infinite.
    """
    rows = shrinking.rows
    train(
        shrinking.network,
        shrinking.optimizer,
        rows,
        dense_factor,
        epochs=dense_epochs,
        batch=batch,
        generator=generator,
    )
    records = [_record(shrinking, 0.0)]
    strength = shrinking.first_strength(steps)
    batches = _forever(shrinking.rows, batch, generator)
    while (records[-1][3] > 0).sum() > fewest:
        shrinking.shrink(strength, [next(batches) for _ in range(steps)])
        records.append(_record(shrinking, strength))
        shrinking.settle()
        strength *= growth
    strengths, scores, errors, norms = (np.array(values) for values in zip(*records, strict=True))
    return FeaturePath(strengths, (norms > 0).sum(axis=1), scores, errors, norms)


def _forever(rows: Rows, batch: int, generator: torch.Generator) -> Any:
    while True:
        yield from rows.batches(batch, generator)


def _record(shrinking: Shrinking, strength: float) -> tuple[float, float, float, Any]:
    check_finite(shrinking.network)
    norms = shrinking.norms().cpu().numpy()
    return strength, *score(shrinking.network, shrinking.validation), norms


def score(network: nn.Module, rows: Rows | None) -> tuple[float, float]:
    """The accuracy, or R², of a network and its standard error; NaN without data."""
    if rows is None:
        return float("nan"), float("nan")
    merits = rows.merits(network).double()
    error = merits.std(correction=0) / len(merits) ** 0.5
    if rows.classifies:
        return float(merits.mean()), float(error)
    spread = (rows.y - rows.y.mean(0)).double().square().mean()
    if not bool(spread > 0):
        return float("nan"), float("nan")
    return float(1 + merits.mean() / spread), float(error / spread)


def chosen_count(path: FeaturePath, rule: str) -> int:
    """How many features validation scores ask for.

    Args:
        path: with scores.
        rule: "best", or "one_se": the fewest whose score is at least the best one less its standard error.
    """
    scores = np.where(path.n_features > 0, path.scores, -np.inf)
    if np.isnan(scores).any():
        raise ValueError("Validation scores are NaN: give `n_features_to_select` or more validation data.")
    best = scores.argmax()
    least = scores[best] - (path.errors[best] if rule == "one_se" else 0)
    return int(path.n_features[scores >= least].min())
