"""Watch sparsity in TensorBoard while a network trains.

python examples/monitor_sparsity.py --logdir runs/monitor
tensorboard --logdir runs/monitor
"""

import argparse
from pathlib import Path

from digits import accuracy, batches, load, network
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchreg


def main():
    """Train with L1 by ProxSGD under a monitor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs/monitor"))
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    model = network()
    reg = torchreg.Regularizer(model, torchreg.L1(1e-3))
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.05, momentum=0.9)

    writer = SummaryWriter(args.logdir)
    options = {"optimizer": optimizer, "histograms": True, "images": True, "custom_scalars": True}
    with torchreg.SparsityMonitor(reg, writer, every=50, **options) as monitor:  # the first of two lines
        for x, y in batches(x_train, y_train, args.epochs):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)  # the second of two lines
        test_accuracy = accuracy(model, x_test, y_test)
        monitor.hparams({"optimizer": "ProxSGD", "l1": 1e-3}, {"final/test accuracy": test_accuracy})
    writer.close()

    print(f"test accuracy {test_accuracy:.1%}, exact zeros {torchreg.sparsity(reg).fraction:.1%}")
    print(f"now run: tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
