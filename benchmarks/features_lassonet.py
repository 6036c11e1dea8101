"""LassoNet as its authors run it: their package, the settings of experiments/run.py in their repository."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import numpy as np
import torch
from features_data import Split
from sklearn.model_selection import train_test_split

EPOCHS, BATCH, M = 1000, 256, 10


class _Enough(Exception):
    """Few enough features are left."""


def is_installed() -> bool:
    return importlib.util.find_spec("lassonet") is not None


def run(split: Split, features: int, hidden: int, seed: int) -> dict[str, Any]:
    """The accuracy of LassoNet's own second network on the features that it selects, which they are, and CPU seconds.

    Their path is followed until no more than ``features`` are left, not to its end: the selection is the same.

    Raises:
        ImportError: if lassonet is not installed.
    """
    import lassonet

    begin = time.process_time()
    x, x_val, y, y_val = train_test_split(split.x, split.y, test_size=0.125, random_state=seed)
    settings = {
        "M": M,
        "hidden_dims": (hidden,),
        "n_iters": EPOCHS,
        "random_state": seed,
        "torch_seed": seed,
        "device": "cpu",
        "verbose": 0,
    }
    torch.manual_seed(seed)
    model, kept = lassonet.LassoNetClassifier(batch_size=BATCH, **settings), []

    def stop(_: Any, history: list[Any]) -> None:
        if history[-1].selected.sum() <= features:
            kept.append(history[-1].selected.numpy())
            raise _Enough

    try:
        model.path(x, y, X_val=x_val, y_val=y_val, callback=stop)
    except _Enough:
        selected = kept[0]
    chosen = np.flatnonzero(selected)
    second = lassonet.LassoNetClassifier(**settings)
    second.path(x[:, chosen], y, X_val=x_val[:, chosen], y_val=y_val, lambda_seq=[])
    accuracy = float(second.score(split.x_judge[:, chosen], split.y_judge))
    return {
        "accuracy": round(accuracy, 4),
        "seconds": round(time.process_time() - begin, 1),
        "features": chosen.tolist(),
    }
