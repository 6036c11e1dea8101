"""A sparse network with Lightning: a callback, and the module stays as it is.

python examples/lightning_digits.py --logdir runs/lightning
"""

import argparse

import lightning.pytorch as lightning
import torch
from digits import accuracy, load, network
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchreg
from torchreg.integrations.lightning import RegularizationCallback


class Digits(lightning.LightningModule):
    """A module that knows nothing of penalties."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        """The data's loss."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Plain AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    """Train towards 85 % zeros, with averaged weights that have the same zeros."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--logdir", default="runs/lightning")
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    batches = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)
    steps = args.epochs * len(batches)

    penalties = RegularizationCallback(
        {"net.*.weight": torchreg.L1(1e-3)},
        route="proximal",
        schedule=lambda optimizer: torchreg.TargetSparsity(optimizer, 0.85, until=steps * 2 // 3),
        every=50,
        reprox=True,
    )
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        callbacks=[penalties, EMAWeightAveraging(decay=0.95)],  # in this order: the average gets the zeros
        logger=[TensorBoardLogger(args.logdir), CSVLogger(args.logdir)],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Digits()
    trainer.fit(model, batches)

    report = torchreg.sparsity({name: p for name, p in model.named_parameters() if name.endswith("weight")})
    print(f"averaged weights: test accuracy {accuracy(model.net, x_test, y_test):.1%}, zeros {report.fraction:.1%}")


if __name__ == "__main__":
    main()
