"""What a penalty is: value, gradient, proximal operator, optimality residual, plain-dict form."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchreg.groups import Groups
from torchreg.wording import one_line

Strength = float | Tensor
"""A non-negative float, a 0-d tensor, or a tensor that broadcasts to the weight."""

Step = float | Tensor
"""The step of a proximal operator: a non-negative float, a 0-d tensor, or one value per coordinate."""

HALF = (torch.float16, torch.bfloat16)
"""The types that are computed with in float32."""

_REGISTRY: dict[str, type[Penalty]] = {}

P = TypeVar("P", bound="Penalty")


def strength_field(default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field as a strength: checked on creation, multiplied by `Penalty.scaled`."""
    return dataclasses.field(default=default, metadata={"strength": True})


def checked_strength(name: str, value: Any) -> Strength:
    """Return ``value`` as a float or tensor, or raise an error that names ``name``."""
    allowed = f"Expected `{name}` to be a non-negative float or tensor"
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{allowed} of a floating dtype, got a tensor of {value.dtype}.")
        if value.layout != torch.strided:
            raise TypeError(f"{allowed}, dense (strided), got the layout {value.layout}.")
        bad = ~(torch.isfinite(value) & (value >= 0))
        if bool(bad.any()):
            raise ValueError(f"{allowed}, got a tensor with the entry {value[bad].flatten()[0].item()}.")
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{allowed}, got {one_line(value)}.")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{allowed}, got {number}.")
    return number


def checked_weight(w: Tensor) -> Tensor:
    """Return ``w`` if a penalty can be evaluated at it, or raise."""
    if not isinstance(w, Tensor):
        raise TypeError(f"Expected the weight to be a tensor, got {type(w).__name__}.")
    if not (w.is_floating_point() or w.is_complex()):
        raise TypeError(f"Expected the weight to be floating point or complex, got a tensor of {w.dtype}.")
    if w.layout != torch.strided:
        raise TypeError(f"Expected the weight to be dense (strided), got the layout {w.layout}.")
    return w


def checked_step(step: Step, w: Tensor) -> Step:
    """Return ``step`` ready to compute with ``w`` (see `like`), or raise.

    The values of a step tensor with more than one element are not read: that would stall a device.
    """
    allowed = "Expected `step` to be a non-negative float or tensor"
    if isinstance(step, Tensor):
        if step.is_complex() or step.layout != torch.strided:
            raise TypeError(f"{allowed}, real and dense, got a tensor of {step.dtype} and layout {step.layout}.")
        if not broadcasts(step.shape, w.shape):
            raise ValueError(
                f"Expected `step` to broadcast to the weight's shape {tuple(w.shape)}, "
                f"got the shape {tuple(step.shape)}."
            )
    elif isinstance(step, bool) or not isinstance(step, numbers.Real):
        raise TypeError(f"{allowed}, got {step!r}.")
    step = like(step, w)
    if not isinstance(step, Tensor) and not (step >= 0 and math.isfinite(step)):
        raise ValueError(f"{allowed}, got {step}.")
    return step


def arithmetic(w: Tensor) -> Tensor:
    """``w`` in the precision that penalties compute in: float32 for the half types, its own otherwise."""
    return w.float() if w.dtype in HALF else w


def like(value: Strength | Step, w: Tensor) -> Strength | Step:
    """A strength or step ready to compute with ``w``: a float, or a tensor of its device and (real) dtype.

    A 0-d tensor on the CPU becomes a float, which costs nothing there and spares a copy to the device of ``w``.
    """
    value = host_scalar(value)
    if not isinstance(value, Tensor):
        return value if type(value) is float else float(value)  # numpy's is one that tensors can't compute with
    return value.to(device=w.device, dtype=w.dtype.to_real() if w.is_complex() else w.dtype)


def representable(value: float | Tensor, w: Tensor) -> float | Tensor:
    """``value``, or the largest number that ``w``'s type holds: torch refuses to clamp by a larger one."""
    return value if isinstance(value, Tensor) else min(value, torch.finfo(w.dtype).max)


def host_scalar(value: float | Tensor) -> float | Tensor:
    """A float where reading it stalls no device, hides nothing from autograd and breaks no traced graph."""
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 0 and value.device.type == "cpu" and not value.requires_grad:
        return value if torch.compiler.is_compiling() else float(value)
    return value


def paired(weights: Sequence[Tensor], steps: Sequence[Step]) -> list[tuple[Tensor, Step]]:
    """Each weight with its step, or raise ``ValueError``."""
    if len(weights) != len(steps):
        raise ValueError(f"Expected one step for each of {len(weights)} weights, got {len(steps)}.")
    return list(zip(weights, steps, strict=True))


def broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of ``shape`` broadcasts to exactly ``target``."""
    if shape == target:
        return True
    try:
        return torch.broadcast_shapes(shape, target) == target
    except RuntimeError:
        return False


class Penalty(ABC):
    """A penalty R added to the objective: ``min f(w) + R(w)``.

    Subclasses are frozen dataclasses whose strengths are declared with ``strength_field()``. They are immutable
    values: they compare by content, and ``scaled`` returns a new one.

    All methods take a weight of any shape, strides and floating or complex dtype. Half-precision weights are
    computed in float32 and rounded once. Complex weights are penalised by their modulus.
    """

    type_name: ClassVar[str]
    takes_steps: ClassVar[bool] = True
    """Whether `prox` takes one step per coordinate, as adaptive optimizers need it."""

    is_separable: ClassVar[bool] = False
    """Whether each weight is penalised by itself, so that any part of a tensor can be treated without the rest."""

    has_gradient: ClassVar[bool] = True
    """Whether `grad` says where to go: if not, only a proximal optimizer can apply the penalty."""

    _strength_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.type_name = cls.__name__
        own = [name for name, value in vars(cls).items() if isinstance(value, dataclasses.Field)]
        strengths = tuple(name for name in own if vars(cls)[name].metadata.get("strength"))
        cls._strength_names = cls._strength_names + strengths  # here, since torch.compile cannot trace fields()
        if not abstract and not cls.__name__.startswith("_"):
            _REGISTRY[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name in self.strength_names():
            object.__setattr__(self, name, checked_strength(name, getattr(self, name)))

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """R(w), a real 0-d tensor (float32 for half-precision weights)."""

    @abstractmethod
    def grad(self, w: Tensor) -> Tensor:
        """The subgradient of R at ``w`` with the smallest norm, in the shape and dtype of ``w``."""

    @abstractmethod
    def prox(self, w: Tensor, step: Step = 1.0) -> Tensor:
        """``argmin_v ½‖v − w‖² + step·R(v)``, a new tensor.

        ``step`` is a non-negative number or a tensor that broadcasts to ``w`` (a diagonal metric).
        """

    @abstractmethod
    def optimality_residual(self, w: Tensor, grad: Tensor) -> Tensor:
        """The distance from ``−grad`` to the subdifferential of R at ``w``, per coordinate (real).

        ``grad`` is the gradient of the data's loss f alone. All zeros means that ``w`` is stationary for f + R.
        """

    @abstractmethod
    def strength_max(self, grad: Tensor) -> Tensor:
        """The smallest strength at which w = 0 is optimal, a 0-d tensor, given the gradient of f at w = 0.

        It is in units of the strength: ``type(self)(strength_max)``. For a tensor-valued strength t it is the
        factor c of ``c·t``.
        """

    @abstractmethod
    def threshold(self, step: float | Tensor) -> float | Tensor:
        """The modulus up to which ``prox(w, step)`` gives zero: the largest where strengths differ, 0 if never."""

    def value_of_sums(self, moduli: float, squares: float) -> float | None:
        """R from Σ|w| and Σ|w|² alone, or None where they do not tell it, or it would stall a device."""
        return None

    @torch.no_grad()
    def prox_(self, w: Tensor, step: Step = 1.0) -> Tensor:
        """Overwrite ``w`` with ``prox(w, step)`` and return it. Not recorded by autograd."""
        return w.copy_(self.prox(w, step))

    def with_pattern(self, v: Tensor, w: Tensor) -> Tensor:
        """The weights nearest to ``v`` with the pattern that the penalty has made in ``w``: zero where ``w`` is."""
        return v.masked_fill(w == 0, 0)

    def check_step(self, step: float | Tensor) -> None:  # noqa: B027
        """Raise ``ValueError`` where `prox` refuses so long a step. A device's tensor is not read, and passes."""

    @property
    def is_grouped(self) -> bool:
        """Whether the weights of a tensor become zero group by group, so that no modulus tells which of them do."""
        return False

    @property
    def is_joint(self) -> bool:
        """Whether the weights of a rule act on each other, so that they must be given to `prox_all_` together."""
        return False

    @torch.no_grad()
    def prox_all_(self, weights: Sequence[Tensor], steps: Sequence[Step]) -> None:
        """Overwrite all weights of one rule with the proximal operator of their joint penalty.

        ``steps`` holds one step for each weight. Unless the penalty `is_joint` this is `prox_` on each weight.

        Raises:
            ValueError: if there are not as many steps as weights.
        """
        for w, step in paired(weights, steps):
            self.prox_(w, step)

    def value_all(self, weights: Sequence[Tensor]) -> Tensor:
        """R of all weights of one rule, on the device of the first: the sum of `value` unless the penalty `is_joint`.

        There is at least one weight.
        """
        first, *others = (self.value(w) for w in weights)
        return sum((value.to(first.device) for value in others), start=first)

    def residual_all(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The `optimality_residual` of all weights of one rule: of each by itself unless the penalty `is_joint`."""
        return [self.optimality_residual(w, grad) for w, grad in zip(weights, grads, strict=True)]

    def grad_all(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The `grad` of all weights of one rule: of each by itself unless the penalty `is_joint`."""
        return [self.grad(w) for w in weights]

    def strengths_max(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The `strength_max` of all weights of one rule, which is one for all if the penalty `is_joint`."""
        return [self.strength_max(grad) for grad in grads]

    def members(self) -> tuple[str, ...] | None:
        """The names of the parameters that share the penalty's groups, or None where any may have it."""
        return None

    def bound(self: P, names: Sequence[str]) -> P:
        """The penalty on those of its `members`, in this order."""
        return self

    def restricted(self: P, positions: Sequence[int]) -> P:
        """The penalty on those of a rule's weights that are at these positions."""
        return self

    def check_together(self, shapes: Sequence[torch.Size]) -> None:  # noqa: B027
        """Raise ``ValueError`` unless all weights of a rule fit the penalty together."""

    @classmethod
    def strength_names(cls) -> tuple[str, ...]:
        """The names of the fields that hold strengths."""
        return cls._strength_names

    def strengths(self) -> dict[str, Strength]:
        """The strengths by name."""
        return {name: getattr(self, name) for name in self.strength_names()}

    def scaled(self: P, factor: float | Tensor) -> P:
        """The penalty ``factor·R``."""
        return self._with_strengths(lambda strength: strength * factor)

    def to(self: P, device: torch.device | str) -> P:
        """The same penalty with its tensor-valued strengths on ``device``."""
        return self._with_strengths(lambda s: s.to(device) if isinstance(s, Tensor) and s.ndim else s)

    def _with_strengths(self: P, change: Any) -> P:
        new = copy.copy(self)
        for name, strength in self.strengths().items():
            object.__setattr__(new, name, change(strength))
        return new

    def check_shape(self, shape: torch.Size) -> None:
        """Raise ``ValueError`` unless every strength broadcasts to a weight of this shape."""
        for name, strength in self.strengths().items():
            if isinstance(strength, Tensor) and not broadcasts(strength.shape, shape):
                raise ValueError(
                    f"Expected `{name}` of {self.type_name} to broadcast to the weight's shape {tuple(shape)}, "
                    f"got a tensor of shape {tuple(strength.shape)}."
                )

    def check_weight(self, w: Tensor) -> None:
        """Raise unless this penalty can be put on ``w``.

        Raises:
            TypeError: if ``w`` is no dense tensor of floating point or complex numbers, or of a kind that this penalty
                refuses.
            ValueError: if a strength does not broadcast to it.
        """
        self.check_shape(checked_weight(w).shape)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors only: safe for ``torch.load(weights_only=True)``."""
        return {"type": self.type_name, **{name: _plain(value) for name, value in self._fields().items()}}

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self._fields(), other._fields()
        return all(_same(mine[k], theirs[k]) for k in mine)

    def __hash__(self) -> int:
        plain = (tuple(v.shape) if isinstance(v, Tensor) else v for v in self._fields().values())
        return hash((self.type_name, *plain))


def from_dict(data: Mapping[str, Any]) -> Penalty:
    """Rebuild a penalty from its ``to_dict`` form.

    >>> from torchreg import L1, penalties
    >>> penalties.from_dict(L1(0.1).to_dict())
    L1(strength=0.1)

    Raises:
        TypeError: if ``data`` is not a mapping.
        ValueError: if the type is unknown or the fields are not that type's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"Expected a penalty's dict form, got {type(data).__name__}.")
    fields = dict(data)
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"Expected the penalty type to be one of {sorted(_REGISTRY)}, got {one_line(name)}.")
    cls = _REGISTRY[name]
    expected = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(fields) != expected:
        raise ValueError(f"Expected the fields of {name} to be {sorted(expected)}, got {sorted(map(str, fields))}.")
    return cls(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Groups):
        return value.to_dict()
    return value.detach() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.device == b.device and torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)
