"""Add a penalty to a training loop that you have: as a loss term, or as a hook with the loop untouched.

    python examples/add_penalty.py          # the loss term
    python examples/add_penalty.py --hook   # the hook

Both shrink weights towards zero. Neither makes them exactly zero: for that, see swap_optimizer.py.
"""

import argparse

import torch
from digits import accuracy, batches, load, network
from torch import nn

import torchreg


def main():
    """Train with an Elastic Net penalty, and print what was penalised and how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hook", action="store_true", help="attach to the optimizer instead of adding to the loss")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    reg = torchreg.Regularizer(model, torchreg.ElasticNet(l1=5e-4, l2=5e-4))  # the first of two lines
    print(reg, "\n")
    if args.hook:
        reg.attach(optimizer)  # the second of two lines, or …

    for x, y in batches(x_train, y_train, args.epochs):
        loss = nn.functional.cross_entropy(model(x), y)
        if not args.hook:
            loss = loss + reg()  # … the second of two lines
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"penalty {reg().item():.3f}, test accuracy {accuracy(model, x_test, y_test):.1%}")
    print(f"weights that are exactly zero: {torchreg.sparsity(reg).fraction:.1%}")


if __name__ == "__main__":
    main()
