"""``torchreg inspect``: the exact zeros of a checkpoint, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchreg.cli.arguments import check_file, groups_argument
from torchreg.cli.claims import check_archive, check_tensors
from torchreg.cli.output import CommandError, print_result, printable, reason

if TYPE_CHECKING:
    from torch import Tensor

    from torchreg.groups import Groups
    from torchreg.monitor import GroupReport

MODEL_KEYS = ("state_dict", "model_state_dict", "model")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

DESCRIPTION = """\
Counts the exact zeros in a checkpoint: a state dict, or a dict that holds one under 'state_dict', 'model_state_dict' or
'model'. Otherwise all floating point tensors in nested dicts count, but for the state of optimizers. Left out are the
statistics of norm layers (names that end in running_mean, running_var or num_batches_tracked). Tied weights count once.
Files are loaded with weights_only=True: nothing in them is executed. Of a .safetensors file, also one that
torchreg.export.save_sparse wrote without its zeros, the size on disk is compared with that of its dense tensors.
"""


def add_parser(commands: Any) -> None:
    """Add the command's arguments."""
    parser = commands.add_parser("inspect", help="count the exact zeros of a checkpoint", description=DESCRIPTION)
    parser.add_argument("file", type=Path, metavar="FILE", help=".pt, .pth, .bin, .ckpt or .safetensors")
    parser.add_argument(
        "--groups",
        type=groups_argument,
        metavar="GROUPS",
        help="count zero groups too: rows, columns, out_channels, in_channels, kernels, blocks=4, heads=8, …",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document")
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the counts.

    Raises:
        CommandError: if the file is not one with weights.
    """
    import torchreg

    path: Path = arguments.file
    content = load(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part, weights = model_weights(content)
            named = [(printable(name), w) for name, w in weights]
            check_tensors(named, repr(str(path)))
            named = [(name, w.float() if w.itemsize == 1 else w) for name, w in named]  # no arithmetic in 8 bits
            report = torchreg.sparsity(named)
            groups = None if arguments.groups is None or not named else _group_report(path, named, arguments.groups)
    except CommandError:
        raise
    except RecursionError:
        raise CommandError(f"{str(path)!r} is nested too deeply, or holds itself") from None
    except Exception as error:  # types without arithmetic and unusual layouts can raise anything
        raise CommandError(f"the tensors in {str(path)!r} can't be counted: {reason(error)}") from None
    if not weights:
        raise CommandError(f"{str(path)!r} holds no floating point tensors")
    if arguments.json:
        about = {"file": str(path), "part": part, **disk_size(path, content)}
        found = {} if groups is None else {"groups": groups.to_dict()}
        print_result(json.dumps(about | json.loads(report.to_json()) | found, indent=2))
    elif arguments.csv:
        print_result((report if groups is None else groups).to_csv().rstrip("\n"))
    else:
        print_result(printable(str(path)) + (f", {part!r}" if part else "") + _size_text(path, content) + "\n")
        print_result(str(report) if groups is None else f"{report}\n\n{groups}")


def _group_report(path: Path, weights: Sequence[tuple[str, Tensor]], groups: Groups) -> GroupReport:
    from torchreg import group_sparsity

    try:
        return group_sparsity(weights, groups)
    except ValueError:
        raise CommandError(f"no tensor in {str(path)!r} can be cut into {groups}") from None


def load(path: Path) -> Any:
    """What the file holds, on the CPU, without running anything in it.

    Raises:
        CommandError: if it isn't a file of tensors.
    """
    check_file(path, repr(str(path)))
    return _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)


def _load_torch(path: Path) -> Any:
    import pickle

    import torch

    check_archive(path, repr(str(path)), stored=True)
    try:
        # sparse tensors whose indices are out of bounds are written through when they are used
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CommandError(f"{str(path)!r} can't be read: {reason(error)}") from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CommandError(
                f"{str(path)!r} holds more than weights, such as a pickled module or object; nothing of it was "
                "executed. Save model.state_dict() instead"
            ) from None
        raise CommandError(f"{str(path)!r} is not a checkpoint of tensors") from None
    except Exception as error:  # a damaged pickle can raise anything
        what = "a TorchScript archive" if "TorchScript" in str(error) else "damaged or not a checkpoint"
        raise CommandError(f"{str(path)!r} is {what} ({type(error).__name__})") from None


def _load_safetensors(path: Path) -> Any:
    from torchreg.export import load_sparse

    try:
        return load_sparse(path)
    except OSError as error:
        raise CommandError(f"{str(path)!r} can't be read: {reason(error)}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


def disk_size(path: Path, content: Any) -> dict[str, int]:
    """The bytes of a safetensors file and of all its tensors when dense, tied ones once; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    tensors = {id(tensor): tensor for tensor in content.values()}
    return {"bytes_on_disk": path.stat().st_size, "dense_bytes": sum(tensor.nbytes for tensor in tensors.values())}


def _size_text(path: Path, content: Any) -> str:
    size = disk_size(path, content)
    if not size or not size["dense_bytes"]:
        return ""
    on_disk, dense = size["bytes_on_disk"], size["dense_bytes"]
    return f", {on_disk:,} bytes on disk: {100 * on_disk / dense:.1f} % of its {dense:,} bytes of dense tensors"


def model_weights(content: Any, tried: set[int] | None = None) -> tuple[str, list[tuple[str, Tensor]]]:
    """The key under which the model's weights were found, and their dotted names (two may be equal) with them.

    >>> import torch
    >>> weight = torch.zeros(2)
    >>> model_weights({"epoch": 3, "state_dict": {"0.weight": weight}, "optimizer": {"state": {0: {"step": weight}}}})
    ('state_dict', [('0.weight', tensor([0., 0.]))])
    """
    tried = set() if tried is None else tried
    if isinstance(content, Mapping):
        for key in MODEL_KEYS:
            part = content.get(key)
            if isinstance(part, Mapping) and id(part) not in tried:
                inner, found = model_weights(part, tried)
                if found:
                    return f"{key}.{inner}" if inner else key, found
                tried.add(id(part))  # it may stand in many places
    return "", list(_named_tensors("", content))


def _named_tensors(
    prefix: str, content: Any, above: tuple[int, ...] = (), seen: set[int] | None = None
) -> Iterator[Any]:
    """The tensors with their names. A container that stands in several places is looked at once."""
    import torch

    seen = set() if seen is None else seen
    if isinstance(content, torch.Tensor):
        counts = (content.is_floating_point() or content.is_complex()) and content.device.type != "meta"
        if counts and not prefix.endswith(STATISTICS):
            yield prefix or "tensor", content.detach()
        return
    if isinstance(content, Mapping):
        inside: Iterable[tuple[Any, Any]] = () if {"state", "param_groups"} <= set(content) else content.items()
    elif isinstance(content, Sequence) and not isinstance(content, (str, bytes, bytearray)):
        inside = enumerate(content)
    else:
        return
    if id(content) in above:
        raise RecursionError
    if id(content) in seen:
        return
    seen.add(id(content))
    for key, value in inside:
        yield from _named_tensors(f"{prefix}.{key}" if prefix else str(key), value, (*above, id(content)), seen)
