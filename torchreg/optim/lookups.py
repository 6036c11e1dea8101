"""Hooks by which embeddings have the rows settled that they look up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LookupHandle:
    """What `settle_lookups` returns: the hooks on a module's embeddings, and ``remove()``."""

    def __init__(self, optimizer: Optimizer, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"Expected `module` to be an nn.Module, got {type(module).__name__}.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        tables = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
        chosen = [m for m in tables if m.sparse and id(m.weight) in held]
        if not chosen:
            raise ValueError(
                f"None of the {len(tables)} embeddings of the module has sparse=True and its weight in this optimizer."
            )
        settle = _Settle(optimizer)
        self._tables = weakref.WeakSet(chosen)
        self._hooks: list[RemovableHandle] = []
        for table in chosen:
            self._hooks += [
                table.register_forward_pre_hook(settle, with_kwargs=True),
                table.register_state_dict_pre_hook(settle.all_rows),
                table.register_load_state_dict_pre_hook(settle.all_rows),
            ]

    @property
    def is_active(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._hooks)

    def weights(self) -> Iterator[Tensor]:
        """The weights of the embeddings that are left."""
        return (table.weight for table in self._tables)

    def remove(self) -> None:
        """Take the hooks away. Calling it twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> LookupHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Settle:
    """The hook, which keeps the optimizer alive: rows still miss steps. In copies of a module it does nothing."""

    def __init__(self, optimizer: Any = None) -> None:
        self._optimizer = optimizer

    def __reduce__(self) -> Any:
        return _Settle, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs.get("input")
        if isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.int32):
            self._settle(module, rows.detach().reshape(-1))

    def all_rows(self, module: nn.Module, *_: Any) -> None:
        """Settle the whole table."""
        self._settle(module, None)

    def _settle(self, module: nn.Module, rows: Tensor | None) -> None:
        if self._optimizer is not None:
            with torch.no_grad():
                self._optimizer._settle(module.weight, rows)
