"""TensorBoard's event files, record by record: each is (length, its checksum, bytes, their checksum)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

LARGEST = 1 << 26
"""Bytes of a record from which on it is passed over."""
LARGEST_CHECKED = 4096
"""Bytes up to which the checksum is computed, in Python some MB a second. Longer ones are images with their own."""

HEADER = struct.Struct("<QI")


class Damaged(Exception):
    """What is wrong with a file; nothing after that place can be read."""


def records(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of each record.

    Raises:
        Damaged: after the last whole one, if the file does not end there.
    """
    masked_crc = _checksum()
    while head := file.read(HEADER.size):
        if len(head) < HEADER.size:
            raise Damaged(f"it ends in the middle of a record, at byte {file.tell()}")
        length, checksum = HEADER.unpack(head)
        if masked_crc(head[:8]) != checksum:
            raise Damaged(f"it is damaged at byte {file.tell() - HEADER.size}, or no event file")
        if length > LARGEST:
            file.seek(length + 4, 1)
            continue
        data, tail = file.read(length), file.read(4)
        if len(data) < length or len(tail) < 4:
            raise Damaged(f"it ends in the middle of a record, at byte {file.tell()}")
        if length <= LARGEST_CHECKED and masked_crc(data) != int.from_bytes(tail, "little"):
            raise Damaged(f"it is damaged at byte {file.tell() - length - 4}")
        yield data


def events(file: BinaryIO) -> Iterator[Any]:
    """The events of a file, as protocol buffers.

    Raises:
        Damaged: where the file is.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for data in records(file):
        try:
            yield Event.FromString(data)
        except DecodeError:
            raise Damaged(f"it holds something that is no event, before byte {file.tell()}") from None


def _checksum() -> Any:
    """TensorBoard's masked CRC-32C."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return masked_crc32c
