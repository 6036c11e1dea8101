"""The estimator that selects features."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.feature_selection import SelectorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, RealNotInt, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchreg.features.inputs import input_layer
from torchreg.features.path import Shrinking, chosen_count, follow
from torchreg.features.targets import Classes, read_targets
from torchreg.features.training import NetworkFactory, Rows, batch_size, perceptron, predicted, train

_DENSE_FACTOR = 3.0
"""Times the path's learning rate is that before it."""
_REAL, _WHOLE = numbers.Real, numbers.Integral


class FeatureSelector(SelectorMixin, BaseEstimator):
    """Selects features by a network whose input columns are shrunk to exact zeros, and fits a network to those left.

    A classifier or regressor network is first trained with all features, and then while the strength λ of a penalty on
    the columns of its first weight matrix grows from step to step:

        min f(W, θ) + λ Σ_j c_j ‖W_·j‖₂,    c_j = (mean ‖W‖ / ‖W_·j‖)^reweight

    by `ProxAdamW`, in Adam's metric. A feature whose column is zero is dropped for good. Large columns are hardly
    shrunk (c_j is small), so that what the network loses are features and not the size of its weights. A new network
    is then trained on the selected features alone, without the penalty: ``predict`` and ``score`` are its.

    It is a selector of scikit-learn: ``transform``, ``inverse_transform``, ``get_support`` and
    ``get_feature_names_out`` are those of `sklearn.feature_selection.SelectorMixin`, and it goes into pipelines.

    Args:
        n_features_to_select: an integer; a part of all features (a float in (0, 1]); or None to let validation data
            choose by ``rule``, after a path down to one feature.
        task: "classification", "regression", or "auto": the former if y is of strings, booleans or whole numbers.
        hidden: the widths of the hidden layers, with ReLU: several, or one. ``()`` makes a linear model.
        network: a function of the numbers of features and outputs that returns a `torch.nn.Module`, used in place of
            ``hidden`` for both networks. It must read its features by one `torch.nn.Linear` only, and give logits of
            all classes or one number for each target, scaled to mean 0 and deviation 1.
        dropout: after each hidden layer, of the last network only.
        reweight: the power in c_j: 0 is the plain group lasso.
        growth: the factor from one strength to the next, more than 1.
        steps_per_strength: batches at each strength. Slower paths, by this or by growth, select a little better.
        dense_epochs: passes over the data before the penalty.
        epochs: passes over the data to train the last network.
        batch_size: samples in a batch; "auto" is 1/32 of the samples, from 8 to 256.
        learning_rate: on the path; before it, it is three times that. The last network's is ``refit_learning_rate``.
            Both rise over the first tenth and then fall to zero along a cosine, on the path it is constant.
        refit_learning_rate: see there.
        weight_decay: of all networks, decoupled as in AdamW.
        standardize: scale features to mean 0 and deviation 1. Without it the columns' norms depend on the units.
        validation_fraction: of the samples, to judge the networks on the path; the last one is trained on all. 0 for
            none; ``n_features_to_select`` must then be given.
        rule: how None is decided: "one_se" for the fewest features whose score is within a standard error of the best,
            or "best".
        device: "auto" for CUDA where it is available, else the CPU; or a torch device.
        random_state: seed or RandomState of the split, the weights and the batches. Torch's own generator is left as
            it was.

    Attributes:
        support_: a mask of the selected features, shape (features,).
        n_features_: how many there are.
        ranking_: 1 for selected features, then 2 for the one that was dropped last, and so on, as in
            `sklearn.feature_selection.RFE`.
        path_: `FeaturePath`, what was left at each strength, and the validation scores.
        network_: the last network, a function of the selected features, standardised.
        classes_: for classification, the labels.
        task_: "classification" or "regression".

    Raises:
        ValueError: for unsuitable data or parameters, as in scikit-learn; if more features are asked for than there
            are, a network reads its input by more than one layer, or training diverges.

    >>> from sklearn.datasets import load_digits
    >>> from torchreg import FeatureSelector
    >>> X, y = load_digits(return_X_y=True)
    >>> selector = FeatureSelector(10, steps_per_strength=5, epochs=20, random_state=0).fit(X[:1200], y[:1200])
    >>> selector.transform(X).shape
    (1797, 10)
    >>> selector.score(X[1200:], y[1200:]) > 0.75
    True

    Source: group lasso on a network's inputs: Scardapane, Comminiello, Hussain and Uncini, Group sparse regularization
    for deep neural networks, Neurocomputing, 2017; the path from dense to sparse: Lemhadri, Ruan, Abraham and
    Tibshirani, LassoNet: a neural network with feature sparsity, JMLR, 2021; the reweighting: Candès, Wakin and Boyd,
    Enhancing sparsity by reweighted l1 minimization, Journal of Fourier Analysis and Applications, 2008.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_features_to_select": [
            None,
            Interval(_WHOLE, 1, None, closed="left"),
            Interval(RealNotInt, 0, 1, closed="right"),
        ],
        "task": [StrOptions({"auto", "classification", "regression"})],
        "hidden": ["array-like", Interval(_WHOLE, 1, None, closed="left")],
        "network": [None, callable],
        "dropout": [Interval(_REAL, 0, 1, closed="left")],
        "reweight": [Interval(_REAL, 0, None, closed="left")],
        "growth": [Interval(_REAL, 1, None, closed="neither")],
        "steps_per_strength": [Interval(_WHOLE, 1, None, closed="left")],
        "dense_epochs": [Interval(_WHOLE, 1, None, closed="left")],
        "epochs": [Interval(_WHOLE, 1, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(_WHOLE, 1, None, closed="left")],
        "learning_rate": [Interval(_REAL, 0, None, closed="neither")],
        "refit_learning_rate": [Interval(_REAL, 0, None, closed="neither")],
        "weight_decay": [Interval(_REAL, 0, None, closed="left")],
        "standardize": ["boolean"],
        "validation_fraction": [Interval(_REAL, 0, 1, closed="left")],
        "rule": [StrOptions({"one_se", "best"})],
        "device": [str, torch.device],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_features_to_select: float | None = None,
        *,
        task: str = "auto",
        hidden: Any = (100,),
        network: NetworkFactory | None = None,
        dropout: float = 0.0,
        reweight: float = 1.0,
        growth: float = 1.05,
        steps_per_strength: int = 50,
        dense_epochs: int = 10,
        epochs: int = 100,
        batch_size: int | str = "auto",
        learning_rate: float = 1e-3,
        refit_learning_rate: float = 5e-3,
        weight_decay: float = 0.1,
        standardize: bool = True,
        validation_fraction: float = 0.125,
        rule: str = "one_se",
        device: Any = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_features_to_select = n_features_to_select
        self.task = task
        self.hidden = hidden
        self.network = network
        self.dropout = dropout
        self.reweight = reweight
        self.growth = growth
        self.steps_per_strength = steps_per_strength
        self.dense_epochs = dense_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.refit_learning_rate = refit_learning_rate
        self.weight_decay = weight_decay
        self.standardize = standardize
        self.validation_fraction = validation_fraction
        self.rule = rule
        self.device = device
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> FeatureSelector:
        """Follow the path, choose features and train the last network on them.

        Args:
            X: shape (samples, features).
            y: class labels, shape (samples,), or real numbers, (samples,) or (samples, targets).
            X_val, y_val: validation data in place of a part of X; they are never trained on.
        """
        if (X_val is None) != (y_val is None):
            raise ValueError("Expected both of `X_val` and `y_val` or none of them.")
        X, y = validate_data(
            self, _array(X), _array(y), dtype=[np.float64, np.float32], multi_output=True, ensure_min_samples=2
        )
        wanted = self._wanted(X.shape[1], X_val is not None)
        random = check_random_state(self.random_state)
        self._targets = read_targets(y, self.task)
        targets = self._targets.encode(y)
        if X_val is not None:
            X_val, y_val = validate_data(
                self, _array(X_val), _array(y_val), reset=False, dtype=[np.float64, np.float32], multi_output=True
            )
            train_on, judge = (X, targets), (X_val, self._targets.encode(y_val))
        else:
            inside, outside = self._split(targets, random)
            train_on, judge = (X[inside], targets[inside]), (X[outside], targets[outside])
        with _seeded(random.randint(2**31 - 1), self._device()) as generator:
            self._select(*train_on, judge if len(judge[0]) else None, wanted, generator)
            self._refit(X, targets, generator)
        return self

    def predict(self, X: Any) -> Any:
        """The classes, or real numbers, that the last network predicts.

        Args:
            X: shape (samples, features): all of them, not only the selected ones.

        Returns:
            shape (samples,), or (samples, targets).
        """
        output = self._output(X)
        return self._targets.decode(output)

    @property
    def task_(self) -> str:
        """What the targets were taken for: "classification" or "regression"."""
        check_is_fitted(self)
        return self._targets.task

    @property
    def classes_(self) -> Any:
        """The labels; for classification only."""
        check_is_fitted(self)
        if not isinstance(self._targets, Classes):
            raise AttributeError("FeatureSelector has classes_ for classification only.")
        return self._targets.labels

    @available_if(lambda self: not hasattr(self, "_targets") or self.task_ == "classification")
    def predict_proba(self, X: Any) -> Any:
        """The probabilities of the classes, in the order of ``classes_``; for classification only.

        Args:
            X: shape (samples, features).

        Returns:
            shape (samples, classes).
        """
        return torch.from_numpy(self._output(X)).softmax(1).numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy of the last network, or R² for regression.

        Args:
            X: shape (samples, features).
            y: the true labels or numbers.
            sample_weight: shape (samples,).
        """
        measure = accuracy_score if self.task_ == "classification" else r2_score
        return float(measure(_array(y), self.predict(X), sample_weight=sample_weight))

    def _get_support_mask(self) -> Any:
        check_is_fitted(self)
        return self.support_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.non_deterministic = self.random_state is None
        return tags

    def _wanted(self, features: int, validated: bool) -> int | None:
        wanted = self.n_features_to_select
        if wanted is None:
            if not validated and self.validation_fraction == 0:
                raise ValueError("With n_features_to_select=None validation data have to choose: got none.")
            return None
        if not isinstance(wanted, _WHOLE):
            return max(1, int(wanted * features))
        if wanted > features:
            raise ValueError(f"n_features_to_select={wanted} must be at most the number of features, {features}.")
        return int(wanted)

    def _split(self, targets: Any, random: Any) -> tuple[Any, Any]:
        """The rows to train on and those to judge by, of every class where there are enough."""
        rows = np.arange(len(targets))
        if self.validation_fraction == 0:
            return rows, rows[:0]
        held_out = min(max(1, round(self.validation_fraction * len(rows))), len(rows) - 1)
        strata = self._targets.strata(targets, min(held_out, len(rows) - held_out))
        return tuple(train_test_split(rows, test_size=held_out, random_state=random, stratify=strata))

    def _select(self, X: Any, targets: Any, judge: Any, wanted: int | None, generator: torch.Generator) -> None:
        scaler = StandardScaler().fit(X) if self.standardize else None
        rows = self._rows(X, targets, scaler)
        network = self._network(X.shape[1], dropout=0.0)
        layer = input_layer(network, rows.x, self._targets.outputs)
        shrinking = Shrinking(
            network,
            layer,
            rows,
            None if judge is None else self._rows(judge[0], judge[1], scaler),
            power=self.reweight,
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        self.path_ = follow(
            shrinking,
            1 if wanted is None else wanted,
            dense_epochs=self.dense_epochs,
            dense_factor=_DENSE_FACTOR,
            growth=self.growth,
            steps=self.steps_per_strength,
            batch=batch_size(self.batch_size, len(targets)),
            generator=generator,
        )
        if wanted is None:
            wanted = chosen_count(self.path_, self.rule)
        order = self.path_.ranking(int((self.path_.n_features <= wanted).argmax()))
        self.support_ = np.zeros(X.shape[1], dtype=bool)
        self.support_[order[:wanted]] = True
        self.n_features_ = wanted
        self.ranking_ = np.ones(X.shape[1], dtype=int)
        self.ranking_[order[wanted:]] = np.arange(2, X.shape[1] - wanted + 2)

    def _refit(self, X: Any, targets: Any, generator: torch.Generator) -> None:
        X = X[:, self.support_]
        self._scaler = StandardScaler().fit(X) if self.standardize else None
        rows = self._rows(X, targets, self._scaler)
        self.network_ = self._network(X.shape[1], dropout=self.dropout)
        optimizer = torch.optim.AdamW(
            self.network_.parameters(), lr=self.refit_learning_rate, weight_decay=self.weight_decay
        )
        batch = batch_size(self.batch_size, len(targets))
        train(self.network_, optimizer, rows, epochs=self.epochs, batch=batch, generator=generator)
        self.network_.eval()

    def _network(self, features: int, dropout: float) -> nn.Module:
        outputs = self._targets.outputs
        if self.network is None:
            widths = [int(width) for width in np.atleast_1d(self.hidden)]
            if min(widths, default=1) < 1:
                raise ValueError(f"Expected `hidden` to hold positive widths, got {self.hidden!r}.")
            return perceptron(features, widths, outputs, dropout).to(self._device(), torch.float32)
        network = self.network(features, outputs)
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected `network` to return a torch.nn.Module, got {type(network).__name__}.")
        return network.to(self._device(), torch.float32)

    def _rows(self, X: Any, targets: Any, scaler: StandardScaler | None) -> Rows:
        X = X if scaler is None else scaler.transform(X)
        x = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32)).to(self._device())
        return Rows(x, torch.from_numpy(np.ascontiguousarray(targets)).to(self._device()))

    def _output(self, X: Any) -> Any:
        """The last network's output for all samples."""
        check_is_fitted(self)
        X = validate_data(self, _array(X), reset=False, dtype=[np.float64, np.float32])[:, self.support_]
        X = X if self._scaler is None else self._scaler.transform(X)
        device = next(self.network_.parameters()).device
        return (
            predicted(self.network_, torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32)).to(device))
            .cpu()
            .numpy()
        )

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator of batches; within the block torch's own are seeded and gradients recorded, afterwards as before."""
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def _array(a: Any) -> Any:
    """A tensor's values as an array, and anything else as it is."""
    return a.detach().cpu().numpy() if isinstance(a, Tensor) else a
