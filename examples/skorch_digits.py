"""Search the strength of a penalty with skorch and scikit-learn, as any other parameter.

python examples/skorch_digits.py
"""

import argparse

import torch
from digits import load, network
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from torch import nn

import torchreg
from torchreg.integrations.skorch import RegularizationCallback


def main():
    """Find the sparsest network that is as good as the best."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = (part.numpy() for part in load())
    net = NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=64,
        max_epochs=args.epochs,
        train_split=None,
        callbacks=[("penalty", RegularizationCallback(route="proximal"))],
        verbose=0,
    )
    strengths = {"callbacks__penalty__rules": [torchreg.L1(s) for s in (1e-4, 1e-3, 1e-2)]}
    search = GridSearchCV(net, strengths, cv=3).fit(x_train, y_train)

    for params, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        print(f"{params['callbacks__penalty__rules']}: accuracy {score:.1%}")
    best = search.best_estimator_
    print(f"test accuracy {best.score(x_test, y_test):.1%}, zeros {best.history[-1, 'sparsity']:.1%}")


if __name__ == "__main__":
    main()
