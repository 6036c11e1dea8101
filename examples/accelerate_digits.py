"""A sparse network in a loop with Accelerate, saved and resumed.

python examples/accelerate_digits.py --logdir runs/accelerate
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from digits import accuracy, load, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchreg
from torchreg.integrations.accelerate import AcceleratedRegularization


def main():
    """Train in two halves: the second goes on from the saved state."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--logdir", type=Path, default=Path("runs/accelerate"))
    args = parser.parse_args()

    x_train, y_train, x_test, y_test = load()
    steps = args.epochs * -(-len(x_train) // 64)

    for half in (1, 2):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=args.logdir)
        accelerator.init_trackers("run")
        model = network()
        reg = torchreg.Regularizer(model, torchreg.L1(1e-3))
        optimizer = torchreg.Proximal(torch.optim.AdamW(reg.param_groups(), lr=3e-3))
        batches = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

        penalties = AcceleratedRegularization(
            accelerator,
            model,
            optimizer,
            reg,
            route="groups",
            schedule=lambda optimizer: torchreg.TargetSparsity(optimizer, 0.85, until=steps * 2 // 3),
            every=50,
        )
        if half == 2:
            accelerator.load_state(args.logdir / "state")
        for _ in range(args.epochs // 2):
            for x, y in batches:
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(args.logdir / "state")
        print(f"after {penalties.steps} steps: zeros {torchreg.sparsity(reg).fraction:.1%}")
        penalties.detach()  # writes the last log
        accelerator.end_training()

    print(f"test accuracy {accuracy(model, x_test, y_test):.1%}")


if __name__ == "__main__":
    main()
