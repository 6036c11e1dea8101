"""A recommender with more items than are worth knowing: rows of its table become zero, at the cost of the rows in use.

    python examples/embeddings.py

Ratings are made up: of many items only the first ones differ from each other. Group lasso on the rows of the embedding
finds them. Prints the error, how many items are left, and what of the table one step touches.
"""

import argparse

import torch
from torch import nn

import torchreg


class Recommender(nn.Module):
    """A rating is the product of what is known of a user and of an item."""

    def __init__(self, users, items, width=8):
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width, sparse=True)

    def forward(self, users, items):
        """The ratings of pairs."""
        return (self.users(users) * self.items(items)).sum(1)


def ratings(count, users, items, known, seed):
    """Users, items and ratings, of which only those of the first ``known`` items are more than noise."""
    generator = torch.Generator().manual_seed(0)
    tastes, kinds = (torch.randn(n, 4, generator=generator) for n in (users, items))
    kinds[known:] = 0
    generator = torch.Generator().manual_seed(seed)
    user, item = (torch.randint(0, n, (count,), generator=generator) for n in (users, items))
    return user, item, (tastes[user] * kinds[item]).sum(1) + 0.1 * torch.randn(count, generator=generator)


def main():
    """Train with sparse gradients, and print what is left of the items."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strength", type=float, default=4e-4)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    users, known = 50, args.items // 10
    model = Recommender(users, args.items)

    reg = torchreg.Regularizer(model, {"items.weight": torchreg.GroupLasso(args.strength, "rows")})
    optimizer = torchreg.ProxSGD(reg.param_groups(), lr=1.0, momentum=0.9)
    optimizer.settle_lookups(model)  # rows take the steps they missed before they are read

    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0 * (1 - step / args.steps)
        user, item, y = ratings(128, users, args.items, known, seed=1 + step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(user, item), y).backward()
        optimizer.step()
    optimizer.flush()

    alive = (model.items.weight != 0).any(1)
    user, item, y = ratings(10_000, users, args.items, known, seed=0)
    print(f"mean squared error {nn.functional.mse_loss(model(user, item), y).item():.3f} of {y.var().item():.3f}")
    print(f"items left: {int(alive.sum())}, {int(alive[:known].sum())} of them among the {known} that differ")
    print(f"rows touched in a step: at most {100 * 128 / args.items:.1f} % of the table")


if __name__ == "__main__":
    main()
