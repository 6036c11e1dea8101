"""Watching sparsity: counts, reports, TensorBoard."""

from torchreg.monitor.living import GroupReport, LivingGroups, group_sparsity
from torchreg.monitor.report import SparsityReport, TensorSparsity, sparsity
from torchreg.monitor.tensorboard import SparsityMonitor

__all__ = [
    "GroupReport",
    "LivingGroups",
    "SparsityMonitor",
    "SparsityReport",
    "TensorSparsity",
    "group_sparsity",
    "sparsity",
]
