"""Watching sparsity: counts, reports, TensorBoard."""

from torchreg.monitor.report import SparsityReport, TensorSparsity, sparsity
from torchreg.monitor.tensorboard import SparsityMonitor

__all__ = ["SparsityMonitor", "SparsityReport", "TensorSparsity", "sparsity"]
