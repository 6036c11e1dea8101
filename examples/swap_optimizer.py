"""Swap the optimizer for a proximal one: the same loop ends with weights that are exactly zero.

    python examples/swap_optimizer.py

Prints the sparsity of every layer, and whether the strength does anything.
"""

import argparse

import torch
from digits import accuracy, batches, load, network
from torch import nn

import torchreg


def main():
    """Train with L1 by ProxSGD, and print the zeros it left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    model = network()

    reg = torchreg.Regularizer(model, torchreg.L1(args.strength))  # the first of two lines
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)  # the second of two lines
    steps = args.epochs * -(-len(x_train) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for x, y in batches(x_train, y_train, args.epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()

    def data_loss():
        return nn.functional.cross_entropy(model(x_train), y_train)

    print(torchreg.sparsity(model), "\n")
    print(f"test accuracy {accuracy(model, x_test, y_test):.1%}")
    print(f"KKT residual {torchreg.kkt_residual(reg, data_loss).item():.1e} beside the strength {args.strength:.1e}")
    for name, strength in torchreg.strength_max(reg, data_loss, per_parameter=True).items():
        print(f"{name} would be empty from the strength {strength:.2g} on, all else as it is")


if __name__ == "__main__":
    main()
