"""Packages that only one trainer needs."""

from __future__ import annotations

import importlib
from typing import Any


def required(module: str, extra: str, *instead: str) -> Any:
    """Import a module of another project, or the first of those that may stand for it.

    Raises:
        ImportError: if none is there; the message says how to install the first.
    """
    for name in (module, *instead):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and lacks something itself
    package = module.partition(".")[0]
    raise ImportError(f"torchreg.integrations.{extra} needs {package}: pip install 'torchreg-sparse[{extra}]'")
