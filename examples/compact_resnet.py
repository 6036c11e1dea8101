"""Channels of a small ResNet: trained so that most become zero, refitted, removed, saved and exported.

    python examples/compact_resnet.py --data fashion_mnist.npz   # arrays x_train, y_train, x_test, y_test
    python examples/compact_resnet.py                            # scikit-learn's digits

A group is a channel in all batch norms that scale and shift it: zero there, it can go, filters and all. (Only the
direction of a filter matters in front of a norm, so that its size says little. --filters puts it into the group.)
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from exporting import check_exports
from images import accuracy, load, network, train
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchreg
from torchreg.export import CompactedSize, compact, save_sparse


def main():
    """Train a dense network, train one with a target for its channels, refit, compact and export it, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file")
    parser.add_argument("--samples", type=int, default=10_000, help="how many training images are used")
    parser.add_argument("--epochs", type=int, default=2, help="with the penalty")
    parser.add_argument("--refit", type=int, default=3, help="epochs without it")
    parser.add_argument("--zeros", type=float, default=0.5, help="the fraction of the channels that is to go")
    parser.add_argument("--filters", action="store_true", help="penalise the filters of a channel, too")
    parser.add_argument("--logdir", type=Path, help="where TensorBoard finds which channels live")
    args = parser.parse_args()

    x, y, x_test, y_test = load(args.data, args.samples)
    dense = network()
    train(dense, torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9), x, y, args.epochs + args.refit)

    model = network()
    channels = torchreg.coupled_groups(model, x[:1]).groups()
    rules = {channels: torchreg.GroupLasso(1.0, channels)}  # all that makes a channel …
    if not args.filters:
        rules = {nn.Conv2d: None, **rules}  # … but for the filters: the first rule wins
    reg = torchreg.Regularizer(model, rules)
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=0.1, momentum=0.9)
    steps = args.epochs * -(-len(x) // 64)
    target = torchreg.TargetSparsity(optimizer, args.zeros, of="groups", after=steps // 10, until=steps * 7 // 10)
    with SummaryWriter(args.logdir) if args.logdir else nullcontext() as writer:
        sizes = {"compacted": CompactedSize(model, x[:1])}
        monitor = writer and torchreg.SparsityMonitor(
            reg, writer, every=max(1, steps // 20), images=True, measures=sizes
        )

        def after_step(loss):
            target.step()
            if monitor:
                monitor.step(loss=loss)

        train(model, optimizer, x, y, args.epochs, after_step)
    print(torchreg.group_sparsity(reg), "\n")
    with torchreg.freeze_zeros(reg):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), x, y, args.refit)

    small, report = (result := compact(model.eval(), x[:1], seconds=2)).model, result.report
    print(report, "\n")
    for name, each in (("dense", dense), ("zeros", model), ("compacted", small)):
        print(f"{name}: test accuracy {accuracy(each, x_test, y_test):.2%}")
    with tempfile.TemporaryDirectory() as folder:
        check_exports(small.eval(), x[:1], Path(folder))
        for name, each in (("dense", dense), ("compacted", small)):
            save_sparse(each, file := Path(folder) / "model.safetensors")
            print(f"{name}: a file of {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
