"""What files and tensors claim to hold, checked before memory is taken for it: a few bytes can claim any number."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torchreg.cli.output import CommandError

if TYPE_CHECKING:
    from torch import Tensor

HARMLESS = 1 << 28
"""Bytes that may be claimed without a reason."""
RATIO = 200
"""How many times smaller real arrays become when they are compressed, at most."""


def check_archive(path: Path, named: str, *, stored: bool) -> None:
    """Refuse a zip archive whose members claim far more bytes than the file can hold.

    Args:
        path: the file, which may be no archive.
        named: what it is called in an error.
        stored: whether nothing in it should be compressed, as in checkpoints.

    Raises:
        CommandError: if they do.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CommandError(f"{named} is damaged ({type(error).__name__})") from None
    claimed, size = sum(member.file_size for member in members), path.stat().st_size
    if stored and any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CommandError(f"{named} is compressed, which no checkpoint is")
    if claimed > (size if stored else max(RATIO * size, HARMLESS)):
        raise CommandError(f"{named} is damaged: it claims {claimed:,} bytes in a file of {size:,}")


def check_tensors(tensors: Iterable[tuple[str, Tensor]], named: str) -> None:
    """Refuse tensors that claim far more elements than they have memory, such as one that is repeated a billion times.

    Raises:
        CommandError: if one does.
    """
    import torch

    for name, tensor in tensors:
        held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
        claimed = tensor.numel() * tensor.itemsize
        if claimed > max(held, HARMLESS):
            raise CommandError(f"{named}: {name!r} claims {tensor.numel():,} elements, and has {held:,} bytes")
