"""What the event files of a run hold, in bounded memory however long they are."""

from __future__ import annotations

import math
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from torchreg.cli.output import printable, reason
from torchreg.cli.report.records import Damaged, events

MOST_POINTS = 1000
MOST_TAGS = 2000
MOST_BINS = 1000
MOST_PIXELS = 1 << 22
LARGEST_IMAGE = 1 << 21
LARGEST_IMAGES = 1 << 25
"""Bytes of a file of an image, and of all images of a run."""
LONGEST_TAG = 1000
PNG = b"\x89PNG\r\n\x1a\n"
WIDE, WIDE_DOUBLE = 1, 2
"""TensorFlow's numbers of the types float32 and float64."""


class Curve:
    """The values of a scalar.

    Of more than 2000 points the least, the greatest and the first that is not finite of each of some hundred pieces of
    equal length are kept: no spike is lost.
    """

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")
        self.seen = 0
        self._order, self._length = array("q"), 1
        self._last: tuple[int, float] = (0, math.nan)

    def add(self, step: int, value: float) -> None:
        """The next point."""
        self.steps.append(step)
        self.values.append(value)
        self._order.append(self.seen)
        self._last = step, value
        self.seen += 1
        if len(self.steps) > 2 * MOST_POINTS:
            self._thin()

    def _thin(self) -> None:
        """Keep the extremes of each piece, of longer ones if that is not enough."""
        while len(chosen := self._chosen()) > MOST_POINTS:
            self._length *= 2
        self.steps, self._order = (array("q", [kept[i] for i in chosen]) for kept in (self.steps, self._order))
        self.values = array("d", [self.values[i] for i in chosen])

    def _chosen(self) -> list[int]:
        pieces = groupby(range(len(self.steps)), key=lambda i: self._order[i] // self._length)
        return [i for _, piece in pieces for i in _extremes(list(piece), self.values)]

    def points(self) -> list[tuple[int, float]]:
        """By step, the latest where a step was logged twice (by a resumed run); the last one is always there."""
        return sorted({**dict(zip(self.steps, self.values, strict=True)), **dict([self._last])}.items())

    @property
    def last(self) -> float:
        """The value at the largest step."""
        return self.points()[-1][1] if self.seen else math.nan

    @property
    def last_step(self) -> int:
        """The largest step."""
        return self.points()[-1][0] if self.seen else 0


def _extremes(positions: list[int], values: Sequence[float]) -> list[int]:
    """Where the least, the greatest and the first value that is not finite are."""
    finite = [i for i in positions if math.isfinite(values[i])]
    broken = [i for i in positions if not math.isfinite(values[i])]
    ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
    return sorted({*ends, *broken[:1]})


@dataclass(frozen=True)
class Picture:
    """The last image of a tag: a whole PNG file."""

    step: int
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Histogram:
    """The last histogram of a tag: the upper limits of its bins, and what is in them."""

    step: int
    least: float
    limits: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass
class Run:
    """The scalars, last images, last histograms and settings of a folder of event files, and what went wrong."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    image_bytes: int = 0

    @property
    def holds_something(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.curves or self.pictures or self.histograms)

    @property
    def steps(self) -> int:
        """The last step of any scalar that was logged along the training."""
        return max((curve.last_step for curve in self.curves.values()), default=0)


def event_files(logdir: Path) -> dict[str, list[Path]]:
    """The event files below a folder by the name of their run: its path from there, "." for the folder itself."""
    found: dict[str, list[Path]] = {}
    for folder, below, names in os.walk(logdir):
        below.sort()
        files = [Path(folder, name) for name in sorted(names) if ".tfevents." in name]
        if files := [file for file in files if file.is_file()]:
            found[printable(Path(folder).relative_to(logdir).as_posix())] = files
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by: numbers in a name count as such.

    >>> sorted(["seed10", "seed9"], key=natural)
    ['seed9', 'seed10']
    """
    pieces, digits = [], ""
    for letter in name + " ":
        if letter.isascii() and letter.isdigit():
            digits += letter
            continue
        if digits:
            pieces.append((int(digits[:18]), ""))
            digits = ""
        pieces.append((-1, letter))
    return pieces


def read_run(name: str, files: list[Path]) -> Run:
    """Read the files of a run as far as they are whole; what is wrong with them is among its problems."""
    run = Run(name)
    for path in files:
        try:
            with path.open("rb") as file:
                for event in events(file):
                    for value in event.summary.value:
                        _take(run, event.step, value)
        except Damaged as damage:
            run.problems.append(f"{printable(path.name)}: {damage}")
        except (OSError, ValueError, OverflowError) as error:
            run.problems.append(f"{printable(path.name)} can't be read: {reason(error)}")
    return run


def _take(run: Run, step: int, value: Any) -> None:
    kind, tag = value.WhichOneof("value"), value.tag[:LONGEST_TAG]
    if value.metadata.plugin_data.plugin_name == "hparams":
        run.settings.update(_settings(value.metadata.plugin_data.content))
    elif kind == "image" or (kind == "tensor" and value.metadata.plugin_data.plugin_name == "images"):
        strings = value.tensor.string_val
        png = value.image.encoded_image_string if kind == "image" else strings[2] if len(strings) > 2 else b""
        size = png_size(png)
        if size is not None and _has_room(run, run.pictures, tag):
            _keep(run, tag, Picture(step, png, *size))
    elif kind == "histo":
        h = value.histo
        if len(h.bucket_limit) == len(h.bucket) <= MOST_BINS and _has_room(run, run.histograms, tag):
            run.histograms[tag] = Histogram(step, h.min, tuple(h.bucket_limit), tuple(h.bucket))
    elif (number := _number(kind, value)) is not None and _has_room(run, run.curves, tag):
        run.curves.setdefault(tag, Curve()).add(step, number)


def _keep(run: Run, tag: str, picture: Picture) -> None:
    before = run.pictures.get(tag)
    total = run.image_bytes + len(picture.png) - (len(before.png) if before else 0)
    if total <= LARGEST_IMAGES:
        run.pictures[tag], run.image_bytes = picture, total
    else:
        _note(run, f"of more than {LARGEST_IMAGES >> 20} MiB of images the first are read")


def _note(run: Run, problem: str) -> None:
    """Say it once."""
    if problem not in run.problems:
        run.problems.append(problem)


def _has_room(run: Run, kept: dict[str, Any], tag: str) -> bool:
    if tag in kept or len(kept) < MOST_TAGS:
        return True
    _note(run, f"of more than {MOST_TAGS} tags the first are read")
    return False


def _number(kind: str | None, value: Any) -> float | None:
    """A scalar, in the old form or as a tensor of one number."""
    if kind == "simple_value":
        return float(value.simple_value)
    if kind != "tensor" or value.tensor.dtype not in (WIDE, WIDE_DOUBLE):
        return None
    wide = value.tensor.dtype == WIDE_DOUBLE
    numbers, content = value.tensor.double_val if wide else value.tensor.float_val, value.tensor.tensor_content
    if len(numbers) == 1:
        return float(numbers[0])
    form = "<d" if wide else "<f"
    return float(struct.unpack(form, content)[0]) if len(content) == struct.calcsize(form) else None


def _settings(content: bytes) -> Iterator[tuple[str, Any]]:
    """The hyperparameters of TensorBoard's HParams page."""
    from google.protobuf.message import DecodeError
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    try:
        hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    except DecodeError:
        return
    for name in sorted(hparams):
        kind = hparams[name].WhichOneof("kind")
        if kind in ("number_value", "string_value", "bool_value"):
            yield name, getattr(hparams[name], kind)


def png_size(png: bytes) -> tuple[int, int] | None:
    """Width and height of a whole PNG file of a size that a browser bears; None for anything else.

    >>> png_size(b"GIF89a") is None
    True
    """
    if not (png.startswith(PNG) and len(png) <= LARGEST_IMAGE):
        return None
    place, size = len(PNG), None
    while place + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        end = place + 8 + length
        if end + 4 > len(png) or zlib.crc32(png[place + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            return None
        if kind == b"IHDR" and length == 13:
            size = struct.unpack_from(">II", png, place + 8)
        if kind == b"IEND":
            return size if size is not None and 0 < size[0] * size[1] <= MOST_PIXELS else None
        place = end + 4
    return None
