"""What all groups are: values that say how weights are cut, with a plain-dict form."""

from __future__ import annotations

import dataclasses
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchreg.cuts import Cut
from torchreg.wording import one_line

_KINDS: dict[str, type[Groups]] = {}


class Groups(ABC):
    """How weights are cut: an immutable value that compares by content."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[cls.__name__] = cls

    @abstractmethod
    def of(self, shape: Sequence[int]) -> Cut:
        """The groups of a weight of this shape.

        Raises:
            ValueError: if they don't fit it.
        """

    def count(self, shape: Sequence[int]) -> int:
        """The number of groups of a weight of this shape."""
        return self.of(shape).count

    def sizes(self, shape: Sequence[int]) -> int | Tensor:
        """The number of weights in each group: an int where all are alike, else an int64 vector."""
        return self.of(shape).sizes

    def to(self, device: torch.device | str) -> Groups:
        """The same groups with their tensors on ``device``."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors only; `from_dict` is the way back."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init)  # type: ignore[arg-type]
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
        return {"type": type(self).__name__, **plain}


def from_dict(data: Mapping[str, Any]) -> Groups:
    """Rebuild groups from their ``to_dict`` form.

    >>> from torchreg import groups
    >>> groups.from_dict(groups.Blocks(4).to_dict())
    Blocks(k=4, dim=-1)

    Raises:
        ValueError: if the type is unknown or the fields are not that type's.
    """
    fields = dict(data)
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(f"Expected the type of groups to be one of {sorted(_KINDS)}, got {one_line(name)}.")
    expected = {f.name for f in dataclasses.fields(_KINDS[name]) if f.init}  # type: ignore[arg-type]
    if set(fields) != expected:
        raise ValueError(f"Expected the fields of {name} to be {sorted(expected)}, got {sorted(map(str, fields))}.")
    return _KINDS[name](**fields)


def checked_int(name: str, value: Any, least: int | None = None) -> int:
    """Return an integer, or raise."""
    allowed = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Expected `{name}` to be {allowed}, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"Expected `{name}` to be {allowed}, got {value}.")
    return int(value)
