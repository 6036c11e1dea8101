"""Penalties: the mathematics, one small immutable object each."""

from torchreg.penalties.base import Penalty, Step, Strength, from_dict
from torchreg.penalties.separable import L1, L2, ElasticNet, soft_threshold

__all__ = ["L1", "L2", "ElasticNet", "Penalty", "Step", "Strength", "from_dict", "soft_threshold"]
