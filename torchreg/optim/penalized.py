"""What all optimizers with penalties in their param groups share: the groups' checks, and checkpoints."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from torchreg.kernels.graphs import is_captured
from torchreg.optim.groups import (
    adopt_penalties,
    check_form,
    check_keys,
    check_penalized_params,
    check_required,
    check_state_shapes,
    packed,
    share_scales,
)
from torchreg.optim.loading import all_or_nothing


class PenalizedOptimizer(Optimizer):
    """An optimizer whose groups may hold ``penalty`` and ``strength_scale``."""

    applies_penalties = True

    _required: ClassVar[tuple[str, ...]]
    """Hyperparameters without which a loaded group is another optimizer's."""
    _origin: ClassVar[str]
    """The optimizers whose states can be loaded, in words."""
    _buffers: ClassVar[tuple[str, ...]]
    """The entries of the state that have their parameter's shape."""
    _later: ClassVar[Mapping[str, Any]] = {}
    """Values of hyperparameters that a loaded group may lack."""
    _local: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that are a matter of the machine, not of the checkpoint's."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Used by unpickling, deepcopy and load_state_dict alike; checks before it changes anything."""
        groups, current = state["param_groups"], self.__dict__.get("param_groups", [])
        check_required(groups, self._required, self._origin)
        adopt_penalties(groups, current)
        check_state_shapes(groups, state["state"], self._buffers)
        for i, group in enumerate(groups):
            for key, default in self._later.items():
                group.setdefault(key, default)
            if i < len(current):
                group.update({key: current[i][key] for key in self._local})
            self._check_group(group)
        share_scales(groups, current)
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer.add_param_group`. Unknown keys are refused."""
        if isinstance(param_group, dict):
            check_keys(param_group, self.defaults)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_penalized_params(self.param_groups[-1], index=len(self.param_groups) - 1)
            self._check_params(self.param_groups[-1])
        except (RuntimeError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings and tensors; penalties in their dict form."""
        return packed(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of the torch optimizer that it extends.

        One that does not fit is refused and changes nothing.

        Raises:
            ValueError: if it is no optimizer's state, or one of other groups, shapes or hyperparameters.
            TypeError: if a hyperparameter or penalty in it is of the wrong type.
        """
        check_form(state_dict)
        with all_or_nothing(self):
            super().load_state_dict(state_dict)
            self._loaded(state_dict)

    def _loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Called with what has just been loaded."""

    def _with_gradients(
        self, group: Mapping[str, Any], index: int, by_rows: Container[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and their gradients.

        Args:
            group: the param group.
            index: which it is.
            by_rows: left out are parameters of these ids and those with a gradient of rows; None where there are none.

        Raises:
            TypeError: if one of the gradients is sparse.
        """
        params = list(group["params"])
        found = [p.grad for p in params]
        if not by_rows and {grad is not None and grad.layout for grad in found} == {torch.strided}:
            return params, found
        params, grads = [], []
        for position, (p, grad) in enumerate(zip(group["params"], found, strict=True)):
            if grad is None or (by_rows and id(p) in by_rows):
                continue
            if grad.layout is not torch.strided:
                if by_rows is not None and grad.layout is torch.sparse_coo:
                    continue
                name = group["param_names"][position] if "param_names" in group else f"{position} of group {index}"
                raise TypeError(
                    f"{type(self).__name__} needs dense gradients, but the one of parameter {name} (shape "
                    f"{tuple(p.shape)}) is {grad.layout}; build its embedding with sparse=False."
                )
            params.append(p)
            grads.append(grad)
        return params, grads

    def _check_not_captured(self) -> None:
        """Raise where the step would be captured that counts on the host: a replay would repeat its numbers."""
        if is_captured():
            raise RuntimeError(f"Steps of {type(self).__name__} can't be captured in a torch.cuda.CUDAGraph.")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise unless the hyperparameters make sense."""
        raise NotImplementedError

    def _check_params(self, group: Mapping[str, Any]) -> None:
        """Raise unless each parameter of a group can be stepped."""
