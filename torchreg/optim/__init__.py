"""Optimizers whose steps end in a proximal operator."""

from torchreg.optim.base import ProximalOptimizer, ProxPoint
from torchreg.optim.fista import FISTA
from torchreg.optim.ftrl import FTRL
from torchreg.optim.prox_adamw import ProxAdamW
from torchreg.optim.prox_sgd import ProxSGD
from torchreg.optim.proximal import Proximal
from torchreg.optim.rmda import RMDA

__all__ = ["FISTA", "FTRL", "RMDA", "ProxAdamW", "ProxPoint", "ProxSGD", "Proximal", "ProximalOptimizer"]
