"""Penalties: the mathematics, one small immutable object each."""

from torchreg.penalties.base import Penalty, Step, Strength, from_dict
from torchreg.penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum
from torchreg.penalties.separable import L1, L2, ElasticNet, soft_threshold

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "SCAD",
    "ElasticNet",
    "LHalf",
    "LogSum",
    "Penalty",
    "Step",
    "Strength",
    "from_dict",
    "soft_threshold",
]
