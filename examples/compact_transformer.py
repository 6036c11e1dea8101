"""Attention heads and feed-forward units of a small transformer: trained so that most become zero, then removed.

python examples/compact_transformer.py

It learns to guess the next character of Python's own help texts, which differ a little between versions of Python.
"""

import argparse

import torch
from topics import batches, held_out_loss, load, loss_of, network

import torchreg
from torchreg.export import compact

HEADS, UNITS = "*.self_attn.in_proj_*", "*.linear1.*"


def train(model, optimizer, text, steps, target=None, seed=0):
    """Random passages, a learning rate that warms up and then decays to nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1, cycle_momentum=False)
    for x, y in batches(text, steps, seed=seed):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        schedule.step()
        if target is not None:
            target.step()


def main():
    """Train a dense network, train one with a target for its heads and units, refit and compact it, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="with the penalty")
    parser.add_argument("--refit", type=int, default=350, help="steps without it")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=float, default=0.5, help="the fraction of the heads that is to go")
    parser.add_argument("--units", type=float, default=0.75, help="the fraction of the units that is to go")
    args = parser.parse_args()

    text, held_out, characters = load()
    dense = network(characters, args.layers)
    train(dense, torch.optim.AdamW(dense.parameters(), lr=2e-3, weight_decay=0), text, args.steps + args.refit)
    print(f"dense: loss {held_out_loss(dense, held_out):.3f} nats per character")

    model = network(characters, args.layers)
    x, _ = next(iter(batches(held_out, 1)))
    couplings = torchreg.coupled_groups(model, x)
    rules = {
        HEADS: torchreg.GroupLasso(1.0, couplings.groups("*.self_attn")),
        UNITS: torchreg.GroupLasso(1.0, couplings.groups("*.linear1")),
    }
    reg = torchreg.Regularizer(model, rules)
    optimizer = torchreg.ProxAdamW(reg.param_groups(), lr=2e-3, weight_decay=0)
    goals = {HEADS: args.heads, UNITS: args.units}
    times = {"after": args.steps // 10, "until": args.steps * 6 // 10}
    target = torchreg.TargetSparsity(optimizer, goals, of="groups", **times)
    train(model, optimizer, text, args.steps, target)
    print(torchreg.group_sparsity(reg), "\n")
    print(f"with zeros: loss {held_out_loss(model, held_out):.3f}")

    with torchreg.freeze_zeros(reg):
        train(model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0), text, args.refit, seed=1)
    before = held_out_loss(model, held_out)
    small, report = (result := compact(model.eval(), x, seconds=5)).model, result.report
    print(report, "\n")
    print(f"refitted: loss {before:.4f}; compacted: loss {held_out_loss(small, held_out):.4f}")
    exported = torch.export.export(small.eval(), (x,)).module()
    print(f"torch.export: outputs differ by {(exported(x) - small(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
