"""torchreg: L1, L2, Elastic Net and exact zeros for any PyTorch module."""

import importlib
from typing import Any

from torchreg import export, groups, penalties, rules, schedules
from torchreg.averaging import reprox
from torchreg.coupling import coupled_groups
from torchreg.factorization import defactorize, factorize
from torchreg.monitor import GroupReport, SparsityMonitor, SparsityReport, group_sparsity, sparsity
from torchreg.optim import FISTA, FTRL, RMDA, ProxAdamW, Proximal, ProxSGD
from torchreg.optimality import kkt_residual, strength_max
from torchreg.penalties import (
    L0,
    L1,
    L2,
    MCP,
    NM,
    SCAD,
    Box,
    ElasticNet,
    GroupLasso,
    LHalf,
    LogSum,
    NonNegative,
    NuclearNorm,
    SparseGroupLasso,
    TopK,
)
from torchreg.regularizer import Regularizer
from torchreg.support import freeze_zeros, thaw
from torchreg.target import TargetSparsity

__version__ = "0.1.0"
__all__ = [
    "FISTA",
    "FTRL",
    "L0",
    "L1",
    "L2",
    "MCP",
    "NM",
    "RMDA",
    "SCAD",
    "Box",
    "ElasticNet",
    "FeatureSelector",
    "GroupLasso",
    "GroupReport",
    "LHalf",
    "LogSum",
    "NonNegative",
    "NuclearNorm",
    "ProxAdamW",
    "ProxSGD",
    "Proximal",
    "Regularizer",
    "SparseGroupLasso",
    "SparsityMonitor",
    "SparsityReport",
    "TargetSparsity",
    "TopK",
    "coupled_groups",
    "defactorize",
    "export",
    "factorize",
    "freeze_zeros",
    "group_sparsity",
    "groups",
    "kkt_residual",
    "linear",
    "penalties",
    "reprox",
    "rules",
    "schedules",
    "sparsity",
    "strength_max",
    "thaw",
]


def __getattr__(name: str) -> Any:
    """`torchreg.linear` and `FeatureSelector`, which need scikit-learn, are imported when they are first used."""
    if name == "linear":
        return importlib.import_module("torchreg.linear")
    if name == "FeatureSelector":
        return importlib.import_module("torchreg.features").FeatureSelector
    raise AttributeError(f"module 'torchreg' has no attribute {name!r}")
