"""Penalties: the mathematics, one small immutable object each."""

from torchreg.penalties.base import Penalty, Step, Strength, from_dict
from torchreg.penalties.cardinality import TopK
from torchreg.penalties.constraints import Box, NonNegative
from torchreg.penalties.n_of_m import NM
from torchreg.penalties.nonconvex import L0, MCP, SCAD, LHalf, LogSum
from torchreg.penalties.separable import L1, L2, ElasticNet, soft_threshold
from torchreg.penalties.spectral import NuclearNorm
from torchreg.penalties.structured import GroupLasso, SparseGroupLasso

__all__ = [
    "L0",
    "L1",
    "L2",
    "MCP",
    "NM",
    "SCAD",
    "Box",
    "ElasticNet",
    "GroupLasso",
    "LHalf",
    "LogSum",
    "NonNegative",
    "NuclearNorm",
    "Penalty",
    "SparseGroupLasso",
    "Step",
    "Strength",
    "TopK",
    "from_dict",
    "soft_threshold",
]
