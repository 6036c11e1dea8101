"""Optimizers whose steps end in a proximal operator."""

from torchreg.optim.prox_sgd import ProxSGD

__all__ = ["ProxSGD"]
