"""Let a penalty choose the weights, then fit the chosen ones without it: the zeros stay, the shrinkage goes.

python examples/refit.py
"""

import argparse

import torch
from digits import accuracy, batches, load, network
from torch import nn

import torchreg


def train(model, optimizer, x, y, epochs):
    """Minibatches with a learning rate that decays to nothing."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
    for x_batch, y_batch in batches(x, y, epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_batch), y_batch).backward()
        optimizer.step()
        schedule.step()


def main():
    """Train with L1 by ProxSGD, freeze the zeros, train again without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    model = network()

    def report(when):
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(x_train), y_train)
        zeros = torchreg.sparsity(reg).fraction
        print(
            f"{when}: test accuracy {accuracy(model, x_test, y_test):.1%}, "
            f"training loss {loss:.3f}, exact zeros {zeros:.1%}"
        )

    reg = torchreg.Regularizer(model, torchreg.L1(args.strength))
    chooser = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    train(model, chooser, x_train, y_train, args.epochs)
    report("with the penalty")

    with torchreg.freeze_zeros(model):  # under any optimizer
        fitter = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, fitter, x_train, y_train, args.epochs)
    report("after the refit")


if __name__ == "__main__":
    main()
