"""Channels of a small ResNet: trained so that most become zero, refitted, removed, saved and exported.

    python examples/compact_resnet.py --data fashion_mnist.npz   # arrays x_train, y_train, x_test, y_test
    python examples/compact_resnet.py                            # scikit-learn's digits

A group is a channel in all tensors that make it: rows of convolutions, scale and shift of batch norms.
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from exporting import check_exports
from images import accuracy, load, network
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchreg
from torchreg.export import compact, save_sparse


def train(model, optimizer, x, y, epochs, after_step=lambda loss: None):
    """Minibatches, a learning rate that warms up and then decays to nothing."""
    rates, steps = [group["lr"] for group in optimizer.param_groups], epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.2, cycle_momentum=False)
    for chosen in (some for _ in range(epochs) for some in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step(loss)


def main():
    """Train a dense network, train one with a target for its channels, refit, compact and export it, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file")
    parser.add_argument("--samples", type=int, default=10_000, help="how many training images are used")
    parser.add_argument("--epochs", type=int, default=5, help="with the penalty")
    parser.add_argument("--refit", type=int, default=2, help="epochs without it")
    parser.add_argument("--zeros", type=float, default=0.75, help="the fraction of the channels' weights that is to go")
    parser.add_argument("--logdir", type=Path, help="where TensorBoard finds which channels live")
    args = parser.parse_args()

    x, y, x_test, y_test = load(args.data, args.samples)
    dense = network()
    train(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9), x, y, args.epochs + args.refit)

    model = network()
    reg = torchreg.Regularizer(model, torchreg.GroupLasso(1.0, torchreg.coupled_groups(model, x[:1]).groups()))
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    steps = args.epochs * -(-len(x) // 64)
    target = torchreg.TargetSparsity(optimizer, args.zeros, after=steps // 10, until=steps * 7 // 10)
    with SummaryWriter(args.logdir) if args.logdir else nullcontext() as writer:
        monitor = writer and torchreg.SparsityMonitor(reg, writer, every=max(1, steps // 50), images=True)

        def after_step(loss):
            target.step()
            if monitor:
                monitor.step(loss=loss)

        train(model, optimizer, x, y, args.epochs, after_step)
    print(torchreg.group_sparsity(reg), "\n")
    with torchreg.freeze_zeros(reg):
        train(model, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), x, y, args.refit)

    small, report = (result := compact(model.eval(), x[:1], seconds=3)).model, result.report
    print(report, "\n")
    for name, each in (("dense", dense), ("zeros", model), ("compacted", small)):
        print(f"{name}: test accuracy {accuracy(each, x_test, y_test):.2%}")
    with tempfile.TemporaryDirectory() as folder:
        check_exports(small.eval(), x[:1], Path(folder))
        save_sparse(small, Path(folder) / "small.safetensors")


if __name__ == "__main__":
    main()
