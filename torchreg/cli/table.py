"""A table of numbers to predict one column of: from a CSV file, an .npz file, or a data set of scikit-learn."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchreg.cli.arguments import check_file
from torchreg.cli.data import read_npz
from torchreg.cli.output import CommandError, printable, reason

BUNDLED = ("diabetes", "breast_cancer", "wine", "iris", "linnerud")
DELIMITERS = ",;\t"
LONGEST_FIELD = 60
SHOWN = 8


@dataclass(frozen=True)
class Table:
    """Columns of finite numbers, or of zeros where they are dropped.

    Attributes:
        name: of the file or data set.
        columns: their names, no two alike.
        values: shape (rows, columns), float64.
        target: the position of the column that is predicted unless another one is asked for; None is none.
    """

    name: str
    columns: tuple[str, ...]
    values: Any
    target: int | None

    def position(self, option: str, wanted: str) -> int:
        """Where the column is, by its name or its number: 1 is the first, -1 the last.

        Raises:
            CommandError: if there is none.
        """
        if wanted in self.columns:
            return self.columns.index(wanted)
        count = len(self.columns)
        try:
            number = int(wanted)
        except ValueError:
            number = 0
        if not 1 <= abs(number) <= count:
            raise CommandError(f"argument {option}: no column {wanted!r}; {_known(self.columns)}")
        return number - 1 if number > 0 else count + number

    def problem(self, target: str | None, drop: Sequence[str]) -> tuple[Any, Any, list[str], str]:
        """X (rows, features), y (rows,), the names of the features, and that of the target.

        Raises:
            CommandError: if there is no such column, or nothing is left to predict with or to predict.
        """
        dropped = {self.position("--drop", name) for name in drop}
        where = self.target if target is None else self.position("--target", target)
        if where is None:
            raise CommandError(f"argument --target: say which column of {self.name} to predict; {_known(self.columns)}")
        if where in dropped:
            raise CommandError(f"argument --drop: {self.columns[where]!r} is the target; --target names another one")
        features = [i for i in range(len(self.columns)) if i != where and i not in dropped]
        if not features:
            raise CommandError(f"{self.name} has no column to predict {self.columns[where]!r} with")
        return self.values[:, features], self.values[:, where], [self.columns[i] for i in features], self.columns[where]


def load_table(data: str, drop: Sequence[str] = ()) -> Table:
    """The table of a file, or of a data set of scikit-learn if there is no such file.

    Args:
        data: a path, or a name of `BUNDLED`.
        drop: names or numbers of columns that need not hold numbers.

    Raises:
        CommandError: if it can't be read as one.
    """
    path, name = Path(data), data.replace("-", "_").lower()
    if name in BUNDLED and not path.is_file():
        return bundled(name)
    try:
        check_file(path, f"--data {data!r}")
    except CommandError as error:
        hint = f" (data sets: {', '.join(BUNDLED)})" if "does not exist" in str(error) else ""
        raise CommandError(f"{error}{hint}") from None
    return read_arrays(path) if path.suffix.lower() == ".npz" else read_csv(path, drop)


def bundled(name: str) -> Table:
    """A data set that comes with scikit-learn. A target of more than two classes is left out: they have no order.

    Raises:
        CommandError: if scikit-learn is missing.
    """
    try:
        import sklearn.datasets
    except ImportError:
        raise CommandError(f"{name} comes with scikit-learn: pip install 'torchreg-sparse[sklearn]'") from None
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    values, names = bunch.data, list(bunch.feature_names)
    several = bunch.target.ndim == 2
    classes = None if several or name == "diabetes" else len(bunch.target_names)
    if several:
        values, names = np.hstack([values, bunch.target]), names + list(bunch.target_names)
    elif classes is None or classes == 2:
        values, names = np.column_stack([values, bunch.target]), [*names, "target"]
    return _table(name, names, values, None if several or (classes or 0) > 2 else len(names) - 1)


def read_arrays(path: Path) -> Table:
    """The arrays X (rows, features) and y (rows,) of an .npz file; `names` may hold the features'. y is the target.

    Raises:
        CommandError: if they are missing or malformed. Nothing is unpickled.
    """
    arrays = read_npz(path, ("X", "y"), ("names",))
    x, y, names = arrays["X"], arrays["y"], arrays.get("names")
    for name, values, ndim in (("X", x, 2), ("y", y, 1)):
        if values.dtype.kind not in "uifb":
            raise CommandError(f"{name} must hold real numbers, got the dtype {values.dtype}")
        if values.ndim != ndim:
            wanted = "(samples, features)" if ndim == 2 else "(samples,)"
            raise CommandError(f"{name} must have the shape {wanted}, got {values.shape}")
        if not np.isfinite(values).all():
            raise CommandError(f"{name} holds {'NaN' if np.isnan(values).any() else 'infinite values'}")
    if len(x) != len(y):
        raise CommandError(f"X has {len(x)} samples but y has {len(y)}")
    if names is None:
        columns = [f"x{i + 1}" for i in range(x.shape[1])]
    elif names.dtype.kind != "U" or names.shape != (x.shape[1],):
        raise CommandError(f"names must hold {x.shape[1]} strings, got {names.dtype} of the shape {names.shape}")
    else:
        columns = [str(name) for name in names]
    return _table(
        path.stem, [*columns, "y"], np.column_stack([x.astype(np.float64), y.astype(np.float64)]), len(columns)
    )


def read_csv(path: Path, drop: Sequence[str] = ()) -> Table:
    """The columns of a CSV file, separated by commas, semicolons or tabs; the last one is the target.

    A first line with a field that is no number has the names of the columns. Fields may be quoted.

    Raises:
        CommandError: if it is no such file, with the line and column of what is not a number.
    """
    named = f"--data {str(path)!r}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(1 << 20)
            file.seek(0)
            delimiter = max(DELIMITERS, key=first.count)
            lines = _lines(csv.reader(file, delimiter=delimiter, strict=True), named)
            _, head = next(lines, (0, []))
            if not head:
                raise CommandError(f"{named} is empty")
            header = any(_number(field) is None for field in head)
            columns = [field.strip() or f"x{i + 1}" for i, field in enumerate(head)]
            names = columns if header else [f"x{i + 1}" for i in range(len(head))]
            kept = _kept(names, drop)
            flat = array("d", () if header else _numbers(1, head, names, kept, named))
            for line, fields in lines:
                flat.extend(_numbers(line, fields, names, kept, named))
    except CommandError:
        raise
    except UnicodeDecodeError:
        raise CommandError(f"{named} is not a CSV file in UTF-8") from None
    except (OSError, csv.Error) as error:
        raise CommandError(f"{named} can't be read: {reason(error)}") from None
    if not flat:
        raise CommandError(f"{named} has a line of names, but no rows")
    return _table(path.stem, names, np.frombuffer(flat).reshape(-1, len(names)), len(names) - 1)


def _lines(reader: Any, named: str) -> Iterator[tuple[int, list[str]]]:
    """Each line that is not blank, with its number."""
    for fields in reader:
        if any("\0" in field for field in fields):
            raise CommandError(f"{named} is not a CSV file: it holds binary data")
        if any(field.strip() for field in fields):
            yield reader.line_num, fields


def _kept(names: Sequence[str], drop: Sequence[str]) -> set[int]:
    table = Table("", tuple(names), None, None)
    return set(range(len(names))) - {table.position("--drop", name) for name in drop}


def _numbers(line: int, fields: Sequence[str], names: Sequence[str], kept: set[int], named: str) -> list[float]:
    """The fields as numbers, 0 where they are dropped."""
    if len(fields) != len(names):
        raise CommandError(
            f"{named}, line {line}: expected {len(names)} values as in the first line, got {len(fields)}"
        )
    found: list[float] = []
    for i, field in enumerate(fields):
        value = _number(field) if i in kept else 0.0
        if value is None or not math.isfinite(value):
            what = f"holds {_short(field)!r}, which is no finite number" if field.strip() else "is empty"
            raise CommandError(f"{named}, line {line}: column {_short(names[i])!r} {what} (--drop leaves a column out)")
        found.append(value)
    return found


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def _table(name: str, columns: Sequence[str], values: Any, target: int | None) -> Table:
    clean = [printable(column) for column in columns]
    twice = (
        next((column for column in clean if clean.count(column) > 1), None) if len(set(clean)) < len(clean) else None
    )
    if twice is not None:
        raise CommandError(f"{printable(name)} has two columns {_short(twice)!r}")
    return Table(printable(name), tuple(clean), np.asarray(values, dtype=np.float64), target)


def _known(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
    return f"there are {', '.join(map(_short, columns[:SHOWN]))}{more}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_FIELD else text[: LONGEST_FIELD - 1] + "…"
