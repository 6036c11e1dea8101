"""How sparse a model is: a table, a dict, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from torchreg import tables
from torchreg.monitor.counting import NOT_APPLICABLE, counted_all, named_weights, which_weights
from torchreg.monitor.transfer import fetch


@dataclass(frozen=True)
class TensorSparsity:
    """The counts of one tensor, or of all (``name="total"``, where rows and columns are summed).

    ``zero_rows`` of ``rows`` slices of the first dimension (output units, filters) and ``zero_columns`` of
    ``columns`` slices of the second (input units, channels) are all zero; None for fewer than two dimensions.
    """

    name: str
    shape: tuple[int, ...] | None
    size: int
    zeros: int
    rows: int | None
    zero_rows: int | None
    columns: int | None
    zero_columns: int | None
    l1_norm: float
    l2_norm: float

    @property
    def fraction(self) -> float:
        """Zeros over size, 0 for an empty tensor."""
        return self.zeros / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The counts and the fraction as plain Python values."""
        values = asdict(self)
        values["shape"] = None if self.shape is None else list(self.shape)
        return {**values, "fraction": self.fraction}


@dataclass(frozen=True)
class SparsityReport:
    """The exact zeros of a set of tensors; ``print()`` shows a table. Made by `torchreg.sparsity`.

    Attributes:
        tensors: the counts of each.
        weights: which weights these are, such as ``"averaged"``, whose zeros are fewer than those of the weights that
            were averaged; empty if that was not said.
    """

    tensors: tuple[TensorSparsity, ...]
    weights: str = ""

    @property
    def total(self) -> TensorSparsity:
        """All tensors together."""
        t = self.tensors
        two_dimensional = [entry for entry in t if entry.rows is not None]
        return TensorSparsity(
            name="total",
            shape=None,
            size=sum(entry.size for entry in t),
            zeros=sum(entry.zeros for entry in t),
            rows=sum(entry.rows or 0 for entry in two_dimensional),
            zero_rows=sum(entry.zero_rows or 0 for entry in two_dimensional),
            columns=sum(entry.columns or 0 for entry in two_dimensional),
            zero_columns=sum(entry.zero_columns or 0 for entry in two_dimensional),
            l1_norm=math.fsum(entry.l1_norm for entry in t) if all(math.isfinite(e.l1_norm) for e in t) else math.nan,
            l2_norm=math.hypot(*(entry.l2_norm for entry in t)),
        )

    @property
    def fraction(self) -> float:
        """Zeros over size of all tensors together."""
        return self.total.fraction

    def __getitem__(self, name: str) -> TensorSparsity:
        for entry in self.tensors:
            if entry.name == name:
                return entry
        raise KeyError(f"No tensor {name!r} in this report of {len(self.tensors)}.")

    def to_dict(self) -> dict[str, Any]:
        """``{"tensors": [...], "total": {...}, "weights": "..."}`` in plain Python values."""
        tensors = [entry.to_dict() for entry in self.tensors]
        return {"tensors": tensors, "total": self.total.to_dict(), "weights": self.weights}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as strict JSON: NaN and infinite norms become null. ``options`` go to ``json.dumps``."""
        return json.dumps(_finite(self.to_dict()), allow_nan=False, **options)

    def to_csv(self) -> str:
        """One line per tensor, with a heading, the total last."""
        out = io.StringIO()
        rows = [entry.to_dict() for entry in (*self.tensors, self.total)]
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shape = "" if row["shape"] is None else "x".join(map(str, row["shape"]))
            writer.writerow({**row, "shape": shape})
        return out.getvalue()

    def __str__(self) -> str:
        columns = ("parameter", "shape", "size", "zeros", "sparsity", "zero rows", "zero columns", "L1 norm", "L2 norm")
        table = tables.render(columns, [_cells(entry) for entry in self.tensors], footer=_cells(self.total), left=2)
        return f"{self.weights} weights\n\n{table}" if self.weights else table


def sparsity(source: Any) -> SparsityReport:
    """Count the exact zeros of a model, or of anything that holds weights.

    Tied weights count once. Integer tensors (counters, quantised weights) are left out. The counting happens on the
    weights' own device, with one transfer to the host at the end. What is sharded over processes is counted by all of
    them together: all must call this.

    Args:
        source: a module (all its parameters), a `Regularizer` (the penalised ones), an optimizer, a mapping from
            names to tensors such as a state dict, or an iterable of tensors or (name, tensor) pairs. The weights of a
            ``torch.optim.swa_utils.AveragedModel`` are reported as ``"averaged"``.

    Raises:
        TypeError: if ``source`` is none of these.
        ValueError: if a tensor holds no values (on the meta device, or not initialised yet).

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> model.weight.data = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, -4.0]])
    >>> report = torchreg.sparsity(model)
    >>> report.total.zeros, report["weight"].zero_rows, report["weight"].zero_columns, report["weight"].l2_norm
    (4, 1, 1, 5.0)
    >>> print(report)
    parameter   shape   size   zeros   sparsity   zero rows   zero columns   L1 norm   L2 norm
    ──────────────────────────────────────────────────────────────────────────────────────────
    weight      2×3        6       4     66.7 %         1/2            1/3         7         5
    ──────────────────────────────────────────────────────────────────────────────────────────
    total                  6       4     66.7 %         1/2            1/3         7         5
    """
    weights = list(named_weights(source))
    counts = fetch(counted_all([w for _, w in weights]))
    return SparsityReport(
        tuple(entry(name, tuple(w.shape), c.tolist()) for (name, w), c in zip(weights, counts, strict=True)),
        which_weights(source),
    )


def entry(name: str, shape: tuple[int, ...], counts: list[float]) -> TensorSparsity:
    """A tensor's counts (see `counting.counted`) as a report's entry."""
    zeros, zero_rows, zero_columns, l1_norm, l2_norm = counts
    has_rows = zero_rows != NOT_APPLICABLE
    return TensorSparsity(
        name=name,
        shape=shape,
        size=math.prod(shape),
        zeros=int(zeros),
        rows=shape[0] if has_rows else None,
        zero_rows=int(zero_rows) if has_rows else None,
        columns=shape[1] if has_rows else None,
        zero_columns=int(zero_columns) if has_rows else None,
        l1_norm=l1_norm,
        l2_norm=l2_norm,
    )


def _cells(e: TensorSparsity) -> tuple[str, ...]:
    return (
        e.name,
        "" if e.shape is None else "×".join(map(str, e.shape)) or "scalar",
        f"{e.size:,}",
        f"{e.zeros:,}",
        f"{100 * e.fraction:.1f} %",
        "–" if e.rows is None else f"{e.zero_rows}/{e.rows}",
        "–" if e.columns is None else f"{e.zero_columns}/{e.columns}",
        f"{e.l1_norm:.4g}",
        f"{e.l2_norm:.4g}",
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
