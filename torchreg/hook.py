"""The optimizer hook: a penalty's gradient added inside the step of any torch optimizer."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg import kernels, sharding
from torchreg.assignments import PenalizedModel, by_rule
from torchreg.penalties import Penalty, from_dict, sharded
from torchreg.penalties.base import arithmetic, checked_strength, host_scalar

_attached: weakref.WeakKeyDictionary[Optimizer, list[weakref.ref[PenaltyHandle]]] = weakref.WeakKeyDictionary()


class PenaltyHandle:
    """What `Regularizer.attach` returns: removes the hook, and saves and loads its strength scale.

    Before each step the gradients are replaced by their sum with the penalty's, and put back after it. Attaching
    to the step rather than to the backward pass makes the strength independent of gradient accumulation, clipping
    and loss scaling: a fused optimizer that unscales by itself has its scale multiplied in, and leaves the gradients
    unscaled, as it does without the hook. Other hooks that run after the step find the data's gradients put back.

    After a step that raised, the gradients are put back by the next one or by ``remove()``, unless they have been
    changed in between; a closure that raises finds them put back already.
    """

    regularizer: PenalizedModel

    def __init__(self, regularizer: PenalizedModel, optimizer: Optimizer) -> None:
        optimizer = _unwrapped(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if getattr(optimizer, "applies_penalties", False):
            raise ValueError(
                f"{type(optimizer).__name__} applies penalties itself: build it from reg.param_groups() "
                "instead of attaching, or attach to a plain torch optimizer."
            )
        if any(handle.regularizer is regularizer for handle in _handles(optimizer)):
            raise ValueError("This regularizer is attached to this optimizer already; remove() the first handle first.")
        if not any(a.penalty is not None and id(a.parameter) in held for a in regularizer.assignments):
            raise ValueError("The optimizer holds none of the regularizer's penalised parameters.")
        check_gradients((a.name, a.penalty) for a in regularizer.assignments)
        self.regularizer = regularizer
        self._optimizer = weakref.ref(optimizer)
        self._data_grads: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._sums: dict[int, kernels.PenaltySum] = {}  # of the last step, by param group
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # The first to run, and among handles the latest: a hook that zeroes p.grad must find the data's.
        optimizer._optimizer_step_post_hooks.move_to_end(self._hooks[1].id, last=False)  # type: ignore[attr-defined]
        _attached.setdefault(optimizer, []).append(weakref.ref(self))

    def remove(self) -> None:
        """Detach from the optimizer. Calling it twice does no harm."""
        self._restore(only_unchanged=True)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._sums.clear()
        optimizer = self._optimizer()
        if optimizer is not None and self in _handles(optimizer):
            _attached[optimizer].remove(weakref.ref(self))

    def __enter__(self) -> PenaltyHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """The strength scale and every parameter's penalty: numbers, strings and tensors only."""
        penalties = {a.name: a.penalty.to_dict() for a in self.regularizer.assignments if a.penalty is not None}
        return {"strength_scale": self.regularizer.strength_scale.detach().clone(), "penalties": penalties}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the saved strength scale and penalties, as an optimizer takes over its learning rate.

        Raises:
            ValueError: if the saved penalties are for other parameters or shapes.
            TypeError, ValueError: if a saved penalty or scale is not one. In no case is anything changed then.
        """
        mine = {a.name: a for a in self.regularizer.assignments if a.penalty is not None}
        if not isinstance(state, dict) or set(state) != {"strength_scale", "penalties"}:
            raise ValueError("Expected the state of a PenaltyHandle, with the keys 'strength_scale' and 'penalties'.")
        saved = _loaded(state["penalties"])
        scale = torch.as_tensor(checked_strength("strength_scale", state["strength_scale"]))
        if scale.numel() != 1:
            raise ValueError(
                f"Expected the saved `strength_scale` to be one number, got the shape {tuple(scale.shape)}."
            )
        if set(saved) != set(mine):
            raise ValueError(
                f"The saved penalties are for other parameters: {sorted(set(saved) ^ set(mine))} are only on one side."
            )
        check_gradients(saved.items())
        for name, penalty in saved.items():
            try:
                penalty.check_shape(mine[name].parameter.shape)
            except ValueError as error:
                raise ValueError(f"Parameter {name!r}: {error}") from None
        for common, some in by_rule(dataclasses.replace(mine[name], penalty=p) for name, p in saved.items()):
            if common is not None:
                common.check_together([a.parameter.shape for a in some])
        for name, penalty in saved.items():
            mine[name].penalty = penalty.to(mine[name].parameter.device)
        self.regularizer.strength_scale.copy_(scale.reshape(()))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore(only_unchanged=True)  # a step that raised has left its sums behind
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._add(optimizer)
            return None
        wrapped = self._with_penalty(optimizer, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._unscale(optimizer)
        self._restore()

    @torch.no_grad()
    def _unscale(self, optimizer: Optimizer) -> None:
        """Divide the data's gradients by the loss scale in place, as torch's fused steps divide those they are given.

        Their rule for a step that `found_inf` skips, too: the gradients stay scaled.
        """
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if grad_scale is None:
            return
        divisor = grad_scale if found_inf is None else torch.where(found_inf == 1, 1.0, grad_scale)
        for _, grad, _, _ in self._data_grads:  # in as many dimensions, so that half precision divides in float32
            here = sharding.local(grad)
            here.div_(divisor.to(here.device).reshape([1] * here.ndim))

    def _with_penalty(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def objective() -> Any:
            self._restore()
            loss = closure()
            self._add(optimizer)
            if loss is None:
                return None
            sign = -1 if any(group.get("maximize", False) for group in optimizer.param_groups) else 1
            with torch.no_grad():
                return loss + sign * self.regularizer().to(getattr(loss, "device", "cpu"))

        return objective

    def _add(self, optimizer: Optimizer) -> None:
        try:
            self._replace_gradients(optimizer)
        except BaseException:
            for handle in reversed(_handles(optimizer)):
                handle._put_back(only_unchanged=False)
            raise

    @torch.no_grad()
    def _replace_gradients(self, optimizer: Optimizer) -> None:
        penalties = {id(p): (name, penalty) for name, p, penalty in self.regularizer.penalized()}
        grad_scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when the step itself unscales
        scale = host_scalar(self.regularizer.strength_scale)
        together: list[tuple[Tensor, float | Tensor]] = []
        for number, group in enumerate(optimizer.param_groups):
            chosen = [p for p in group["params"] if p.grad is not None and id(p) in penalties]
            if not chosen:
                continue
            for p in chosen:
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"Parameter {penalties[id(p)][0]!r} has a sparse gradient; penalties need dense ones."
                    )
            factor = -scale if group.get("maximize", False) else scale
            if grad_scale is not None:
                factor = grad_scale * (factor.to(grad_scale.device) if isinstance(factor, Tensor) else factor)
            others = {id(p) for p in chosen if penalties[id(p)][1].is_joint or sharding.is_sharded(p)}
            alone = [p for p in chosen if id(p) not in others]
            together += [(p, factor) for p in chosen if id(p) in others]
            known = self._sum_of(number, [penalties[id(p)][1] for p in alone], alone)
            sums = known.added(alone, [p.grad for p in alone], factor)
            self._replace(list(zip(alone, sums, strict=True)))
        if together:
            self._replace(self._added_together(together))

    def _sum_of(self, number: int, penalties: list[Penalty], weights: list[Tensor]) -> kernels.PenaltySum:
        """The penalties of a param group: the last step's, where they are still that."""
        if torch.compiler.is_compiling():  # one that is kept would make torch compile the step once more
            return kernels.PenaltySum(penalties, weights)
        known = self._sums.get(number)
        if known is None or not known.holds(penalties, weights):
            known = self._sums[number] = kernels.PenaltySum(penalties, weights)
        return known

    def _replace(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        for p, total in sums:
            assert p.grad is not None
            self._data_grads.append((p, p.grad, total, total._version))
            p.grad = total

    def _added_together(self, chosen: list[tuple[Tensor, float | Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Parameters that are taken rule by rule, and the sums of their gradients with a factor times the penalty's.

        They are those of penalties that act on all of a rule, and those that are spread over processes.
        """
        factors = {id(p): factor for p, factor in chosen}
        rules: list[tuple[Penalty, list[Tensor]]] = [
            (penalty, [a.parameter for a in some])
            for penalty, some in by_rule(a for a in self.regularizer.assignments if id(a.parameter) in factors)
            if penalty is not None
        ]
        sums: list[tuple[Tensor, Tensor]] = []
        for (_, params), pulls in zip(rules, sharded.grad_all(rules), strict=True):
            for p, pull in zip(params, pulls, strict=True):
                factor = factors[id(p)]
                scaled = pull * (factor.to(pull.device, pull.real.dtype) if isinstance(factor, Tensor) else factor)
                assert p.grad is not None
                total = (arithmetic(sharding.beside(p.grad, p)) + scaled).to(p.grad.dtype)
                sums.append((p, sharding.sharded_like(total, p)))
        return sums

    def _restore(self, *, only_unchanged: bool = False) -> None:
        """Put back the data's gradients: this handle's, after those of handles that have added to its sums."""
        optimizer = self._optimizer()
        handles = [] if optimizer is None else _handles(optimizer)
        later = handles[handles.index(self) :] if self in handles else [self]
        for handle in reversed(later):
            handle._put_back(only_unchanged)

    def _put_back(self, only_unchanged: bool) -> None:
        for p, grad, total, version in self._data_grads:
            if p.grad is not total:  # a closure or the user has put another one there
                continue
            if total._version == version or not only_unchanged:  # else zeroed or accumulated into: it is new data
                p.grad = grad
        self._data_grads.clear()


def is_attached(optimizer: Optimizer) -> bool:
    """Whether a regularizer is attached to the optimizer."""
    return bool(_handles(optimizer))


def check_gradients(penalties: Iterable[tuple[str, Penalty | None]]) -> None:
    """Raise ``ValueError`` if a parameter has a penalty that no loss term and no hook can apply."""
    for name, penalty in penalties:
        if penalty is not None and not penalty.has_gradient:
            raise ValueError(
                f"{penalty.type_name} of parameter {name!r} has no gradient that a loss term or hook could add: "
                "give reg.param_groups() to a proximal optimizer such as torchreg.ProxSGD instead."
            )


def _handles(optimizer: Optimizer) -> list[PenaltyHandle]:
    """The handles attached to an optimizer, which keeps them alive through its hooks, in the order of attaching."""
    return [handle for ref in _attached.get(optimizer, []) if (handle := ref()) is not None]


def _loaded(penalties: Any) -> dict[str, Penalty]:
    if not isinstance(penalties, dict):
        raise TypeError(f"Expected the saved penalties to be a dict by parameter, got {type(penalties).__name__}.")
    return {name: from_dict(data) for name, data in penalties.items()}


def _unwrapped(optimizer: Any) -> Optimizer:
    """The torch optimizer inside wrappers such as Accelerate's, whose own ``step`` runs no hooks."""
    inner = optimizer
    while (inner := getattr(inner, "optimizer", None)) is not None:
        optimizer = inner if isinstance(inner, Optimizer) else optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Expected `optimizer` to be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return optimizer
