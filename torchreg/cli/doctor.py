"""``torchreg doctor``: which implementation of the step each device of this machine would use, and why."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchreg.cli.output import print_result, printable

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Prints which implementation a step with a penalty takes on each device, for each optimizer that has a fused one, why not
that one, and what they are built with. On the CPU this compiles the fused steps, unless that was done before.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser("doctor", help="print what each device would use, and why", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the diagnosis."""
    document = diagnosis()
    print_result(json.dumps(document, indent=2) if arguments.json else _text(document))


def diagnosis() -> dict[str, Any]:
    """Devices, versions, the compiler, the cache folder and the switches: strings, lists and None."""
    import torch

    from torchreg.kernels import toolchain

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]

    def found(path: Callable[[], object]) -> dict[str, str | None]:
        try:
            return {"path": str(path()), "reason": None}
        except toolchain.Unavailable as error:
            return {"path": None, "reason": str(error)}

    return {
        "devices": [_device(device, optimizer) for device in devices for optimizer in ("ProxSGD", "ProxAdamW")],
        "versions": {name: _version(name) for name in ("torchreg", "torch", "triton")},
        "compiler": found(toolchain.compiler),
        "cache": found(toolchain.cache_folder),
        "switches": {name: os.environ.get(name) for name in (toolchain.SWITCH, toolchain.CACHE, "CC")},
    }


def _device(device: torch.device, optimizer: str) -> dict[str, Any]:
    import torch

    from torchreg.kernels import AdamStep, SGDStep, native, pieces, selection, triton_step

    on_cpu, step = device.type == "cpu", SGDStep if optimizer == "ProxSGD" else AdamStep
    missing = selection.unavailable(device, step.KERNEL)
    language, dtypes, smallest = (
        ("C", native.DTYPES, selection.SMALLEST) if on_cpu else ("Triton", triton_step.DTYPES, 0)
    )
    eager = "foreach" if not on_cpu else "tiled" if step is SGDStep else "eager"
    return {
        "device": str(device),
        "optimizer": optimizer,
        "name": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device),
        "step": f"fused ({language})" if missing is None else eager,
        "otherwise": eager,
        "dtypes": [] if missing else [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "smallest": None if missing else smallest,
        "longest_group": None if missing or on_cpu else pieces.LONGEST,
        "not_fused": missing,
    }


def _version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except Exception:  # a broken installation can raise anything
        return None


def _text(document: dict[str, Any]) -> str:
    from torchreg.tables import render

    rows = [[d["device"], d["name"], d["optimizer"], d["step"], _remark(d)] for d in document["devices"]]
    facts = {
        **{name: version or "can't be imported" for name, version in document["versions"].items()},
        **{name: document[name]["path"] or document[name]["reason"] for name in ("compiler", "cache")},
        **{name: "not set" if value is None else value for name, value in document["switches"].items()},
    }
    return "\n\n".join(
        [
            render(
                ["device", "name", "optimizer", "step", "remark"],
                [[printable(cell) for cell in row] for row in rows],
                left=5,
            ),
            render(["built with", ""], [[name, printable(value)] for name, value in facts.items()], left=2),
        ]
    )


def _remark(device: dict[str, Any]) -> str:
    if device["not_fused"]:
        return f"not fused: {device['not_fused']}"
    dtypes = ", ".join(device["dtypes"])
    start = f" from {device['smallest']} weights" if device["smallest"] else ""
    most = f" of at most {device['longest_group']} weights" if device["longest_group"] else ""
    return f"{dtypes}{start}; groups{most} that are neighbours in memory; otherwise {device['otherwise']}"
