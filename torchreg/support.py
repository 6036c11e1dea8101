"""The support, frozen: zeros that stay zero, so that the weights left can be refitted without the penalty."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from torchreg import sharding, unsettled
from torchreg.penalties import L1
from torchreg.rules import WEIGHTS, assign
from torchreg.wording import one_line

_NOT_PER_WEIGHT = {"settled", "step", "step_size", "mu_product", "mu", "eta"}
"""State that may have the parameter's shape and is no moment of its gradients: Rprop's step sizes, counters of a 0-d
parameter, what rows have missed. Zero in them would stop or break the step, and they carry nothing to leak."""


@dataclass
class _Frozen:
    """What is known of a parameter with a frozen support."""

    zeros: Tensor
    owner: object
    hook: RemovableHandle | None = None


_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a model that is dropped takes its entries along
_step_hooks: list[RemovableHandle] = []


def freeze_zeros(source: Any, select: Any = None) -> FrozenSupport:
    """Keep the weights that are exactly zero now at +0.0, whatever optimizer steps.

    The recipe that it is for, debiasing: train with an L1 penalty by a proximal optimizer, freeze the zeros, and
    fine-tune the weights left without the penalty, which no longer pulls them towards zero (``examples/refit.py``).

    After each backward pass the gradients at the zeros are zeroed (``.grad`` itself, so that clipping sees the
    restricted problem), and after each step of any ``torch.optim.Optimizer`` the weights and the optimizer's moments
    there are. So weight decay, momentum from before, stale Adam moments or gradients that were put there by hand move
    nothing, and a weight that is thawed starts from zero moments. No step waits for a device.

    It holds for these parameter objects. Copies of the model (deepcopy, pickle) are not frozen: freeze them too. After
    a restart load the model and freeze again, which gives the same support, since the zeros are in the weights; the
    handle's ``state_dict()`` keeps it even where a weight has become zero by itself in between. Loading other weights
    into a frozen model lasts until the next step.

    Args:
        source: what to freeze. Of a module the weights that a bare penalty selects (`torchreg.rules.WEIGHTS`); of a
            `torchreg.Regularizer` the penalised parameters; of an optimizer those of the groups with a penalty, or,
            where there is none, those with two dimensions or more; or a parameter or several, biases included.
        select: for a module, a selector as in rules instead: a glob, regex, module class, predicate or parameters.

    Returns:
        A handle with ``remove()``, ``state_dict()`` and ``load_state_dict()``, also a context manager. It need not be
        kept: `thaw` undoes it too.

    Raises:
        TypeError: if ``source`` is none of these.
        ValueError: if a parameter is frozen already, holds no values, or is selected by nothing.

    Warns:
        UserWarning: if a tensor is zero everywhere (it can't learn any more), or no tensor has a zero.

    >>> import torch, torchreg
    >>> model = torch.nn.Linear(3, 1)
    >>> _ = model.weight.data.copy_(torch.tensor([[0.5, 0.0, -1.0]]))
    >>> handle = torchreg.freeze_zeros(model)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    >>> model.weight.data
    tensor([[ 0.4000,  0.0000, -1.1000]])
    >>> handle.remove()

    Source: refitting on the support: Belloni and Chernozhukov, Least squares after model selection in high-dimensional
    sparse models, Bernoulli, 2013.
    """
    parameters = _parameters(source, select)
    for name, p in parameters.items():
        if p in _frozen:
            raise ValueError(f"Parameter {name!r} is frozen already: remove() its handle or torchreg.thaw() it first.")
        if p.device.type == "meta" or is_lazy(p):
            raise ValueError(f"Parameter {name!r} holds no values: it is on the meta device or not initialised yet.")
        if p.layout != torch.strided:
            raise TypeError(f"Parameter {name!r} has the layout {p.layout}: only dense ones can be frozen.")
    unsettled.settle(parameters.values())
    zeros = {name: sharding.local(p.detach()) == 0 for name, p in parameters.items()}
    _warn(zeros, parameters)
    handle = FrozenSupport(parameters)
    handle._freeze(zeros)
    return handle


def thaw(source: Any) -> None:
    """Undo `freeze_zeros` for whatever is frozen of a source. Does no harm where nothing is.

    Args:
        source: as for `freeze_zeros`, but of a module or an optimizer all parameters are meant.

    Raises:
        TypeError: if it is not such a source.

    >>> import torch, torchreg
    >>> weight = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    >>> _ = torchreg.freeze_zeros(weight)
    >>> torchreg.thaw(weight)
    """
    if isinstance(source, nn.Module) and not _is_regularizer(source):
        parameters: list[Tensor] = list(source.parameters())
    elif hasattr(source, "param_groups") and not _is_regularizer(source):
        parameters = [p for group in source.param_groups for p in group["params"]]
    else:
        parameters = list(_parameters(source, None).values())
    for p in parameters:
        _release(p)


class FrozenSupport:
    """What `freeze_zeros` returns: thaws, and saves and loads which weights are frozen."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = {name: weakref.ref(p) for name, p in parameters.items()}
        self._owner = object()

    def support(self) -> dict[str, Tensor]:
        """By parameter, True where a weight is free, in its layout. What has been thawed is not in it."""
        return {name: sharding.sharded_like(~entry.zeros, p) for name, (p, entry) in self._held().items()}

    def remove(self) -> None:
        """Thaw. Calling it twice does no harm."""
        for p, _ in self._held().values():
            _release(p)

    def __enter__(self) -> FrozenSupport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        shapes = [f"{name} {'×'.join(map(str, p.shape)) or 'scalar'}" for name, (p, _) in self._held().items()]
        return f"FrozenSupport({', '.join(shapes) or 'thawed'})"

    def state_dict(self) -> dict[str, Any]:
        """The frozen zeros of each parameter, a bit each, and its shape; loads with ``weights_only=True``.

        They are those of whole tensors: if these are sharded over processes, all of them must call this.
        """
        held = self._held()
        return {
            "zeros": {name: _packed(_whole(entry.zeros, p)) for name, (p, entry) in held.items()},
            "shapes": {name: list(p.shape) for name, (p, _) in held.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Freeze the saved support instead, and zero its weights.

        Raises:
            ValueError: if it is the support of other parameters or shapes (nothing is changed then).
        """
        held = self._held()
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"zeros", "shapes"}:
            raise ValueError("Expected the state of a FrozenSupport, with the keys 'zeros' and 'shapes'.")
        saved, shapes = state_dict["zeros"], state_dict["shapes"]
        for key in ("zeros", "shapes"):
            if not isinstance(state_dict[key], Mapping):
                raise ValueError(
                    f"Expected {key!r} of the saved support to be a dict, got {one_line(state_dict[key])}."
                )
        if not set(saved) == set(shapes) == set(held):
            only = sorted(map(str, set(saved) ^ set(held) | set(shapes) ^ set(held)))
            raise ValueError(f"The saved support is of other parameters: {only} are only on one side.")
        for name, (p, _) in held.items():
            if not _is_shape(shapes[name], p) or not _fits(saved[name], p):
                raise ValueError(
                    f"The saved support of parameter {name!r} is for the shape {_shown(shapes[name])}, "
                    f"its parameter has {tuple(p.shape)}."
                )
        for name, (p, entry) in held.items():
            entry.zeros = sharding.layout(p).part(_unpacked(saved[name].to(p.device), p.shape))
            sharding.local(p).masked_fill_(entry.zeros, 0)

    def _held(self) -> dict[str, tuple[Tensor, _Frozen]]:
        """What is still alive and frozen by this handle."""
        held = {}
        for name, ref in self._parameters.items():
            p = ref()
            entry = None if p is None else _frozen.get(p)
            if p is not None and entry is not None and entry.owner is self._owner:
                held[name] = (p, entry)
        return held

    @torch.no_grad()
    def _freeze(self, zeros: Mapping[str, Tensor]) -> None:
        for name, ref in self._parameters.items():
            p = ref()
            assert p is not None  # the caller holds it
            sharding.local(p).masked_fill_(zeros[name], 0)  # a −0.0 becomes +0.0
            hook = p.register_post_accumulate_grad_hook(_mask_gradient) if p.requires_grad else None
            _frozen[p] = _Frozen(zeros[name], self._owner, hook)
            if p.grad is not None:
                _mask_gradient(p)
        if not _step_hooks:
            _step_hooks.append(register_optimizer_step_post_hook(_after_step))


def _release(p: Tensor) -> None:
    entry = _frozen.pop(p, None)
    if entry is not None and entry.hook is not None:
        entry.hook.remove()
    if not len(_frozen) and _step_hooks:
        _step_hooks.pop().remove()


@torch.no_grad()
def _mask_gradient(p: Tensor) -> None:
    """After a backward pass has added to ``p.grad``."""
    entry, grad = _frozen.get(p), p.grad
    if entry is not None and grad is not None and grad.layout == torch.strided and not grad.requires_grad:
        grad = sharding.local(grad)
        grad.masked_fill_(_zeros(entry, grad), 0)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any optimizer: the last of all its hooks."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            entry = _frozen.get(p)
            if entry is None:
                continue
            part = sharding.local(p)
            part.masked_fill_(_zeros(entry, part), 0)
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape and key not in _NOT_PER_WEIGHT:
                    value = sharding.local(value)
                    value.masked_fill_(_zeros(entry, value), 0)


def _zeros(entry: _Frozen, near: Tensor) -> Tensor:
    """The zeros on a tensor's device, where they stay: the model has been moved since."""
    if entry.zeros.device != near.device:
        entry.zeros = entry.zeros.to(near.device)
    return entry.zeros


def _parameters(source: Any, select: Any) -> dict[str, Tensor]:
    """The named parameters of a source that are to be frozen."""
    if _is_regularizer(source):
        _refuse_select(select, source)
        return {a.name: a.parameter for a in source.assignments if a.penalty is not None}
    if isinstance(source, nn.Module):
        assignments = assign(source, {WEIGHTS if select is None else select: L1(0.0)})
        return {a.name: a.parameter for a in assignments if a.penalty is not None}
    _refuse_select(select, source)
    if hasattr(source, "param_groups"):
        return _of_optimizer(source)
    listed = [source] if isinstance(source, Tensor) else source
    if isinstance(listed, (str, Mapping)) or not isinstance(listed, Iterable):
        raise TypeError(
            "Expected a module, a Regularizer, an optimizer, a parameter or several, "
            f"got {source.__name__ if isinstance(source, type) else type(source).__name__}."
        )
    found: dict[int, tuple[str, Tensor]] = {}
    for i, p in enumerate(listed):
        if not isinstance(p, Tensor) or not p.is_leaf:
            raise TypeError(f"Expected parameters, got {type(p).__name__} at position {i}.")
        found.setdefault(id(p), (str(i), p))
    return dict(found.values())


def _of_optimizer(optimizer: Any) -> dict[str, Tensor]:
    groups = list(enumerate(optimizer.param_groups))
    penalised = [(i, group) for i, group in groups if group.get("penalty") is not None]
    found = {}
    for i, group in penalised or groups:
        names = group.get("param_names") or [f"group{i}.{k}" for k in range(len(group["params"]))]
        pairs = zip(names, group["params"], strict=True)
        found.update({name: p for name, p in pairs if penalised or p.ndim >= 2})
    if not found:
        raise ValueError(
            "The optimizer holds no parameter to freeze: none of its groups has a penalty, and no parameter two "
            "dimensions or more. Give the parameters themselves."
        )
    return found


def _refuse_select(select: Any, source: Any) -> None:
    if select is not None:
        raise ValueError(f"Expected `select` only with a module, got a {type(source).__name__}.")


def _is_regularizer(source: Any) -> bool:
    return hasattr(source, "assignments") and hasattr(source, "strength_scale")


def _warn(zeros: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Say so where freezing can't be meant. Reads the device once."""
    filled = [(name, p) for name, p in parameters.items() if p.numel()]
    sums = sharding.summed([zeros[name].sum() for name, _ in filled], [sharding.layout(p) for _, p in filled])
    counts = torch.stack([count.to(sums[0].device) for count in sums]).tolist() if filled else []
    dead = [name for (name, p), count in zip(filled, counts, strict=True) if count == p.numel()]
    if dead:
        warnings.warn(f"Freezing {', '.join(map(repr, dead))}: all zeros, nothing in it can learn.", stacklevel=3)
    if not sum(counts):
        warnings.warn("No weight is exactly zero: there is nothing to freeze.", stacklevel=3)


def _whole(zeros: Tensor, p: Tensor) -> Tensor:
    """The zeros of a whole parameter from those of what is here of it."""
    return sharding.whole(sharding.sharded_like(zeros.to(torch.uint8), p)).bool() if sharding.is_sharded(p) else zeros


def _packed(zeros: Tensor) -> Tensor:
    """Eight to a byte, the first in the lowest bit."""
    bits = nn.functional.pad(zeros.flatten().to(torch.uint8), (0, -zeros.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(shape)


def _shown(shape: Any) -> str:
    return one_line(tuple(shape) if isinstance(shape, list) else shape)


def _is_shape(saved: Any, p: Tensor) -> bool:
    return isinstance(saved, (list, tuple)) and all(type(n) is int for n in saved) and list(saved) == list(p.shape)


def _fits(packed: Any, p: Tensor) -> bool:
    return (
        isinstance(packed, Tensor)
        and packed.dtype == torch.uint8
        and packed.layout == torch.strided
        and packed.shape == (-(-p.numel() // 8),)
    )
