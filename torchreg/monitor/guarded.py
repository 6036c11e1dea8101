"""A writer whose failures are told, and never reach the training."""

from __future__ import annotations

import inspect
import time
import warnings
from typing import Any

EVERYTHING = "everything"
"""Stands for all methods of a writer."""


class GuardedWriter:
    """Calls a writer's methods until they fail.

    After an OSError (full disk, closed writer, a queue whose reader is dead) nothing more is written; after another
    error of one of its methods, that method is called no more. Each is reported once, as a warning.

    Args:
        writer: any object, or None, which is never called.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._stopped: set[str] = set()

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method, unless it has failed before."""
        if self.writer is None or self._stopped & {method, EVERYTHING}:
            return
        try:
            _check_worker(self.writer)
            getattr(self.writer, method)(*args, **kwargs)
        except Exception as error:
            what = EVERYTHING if isinstance(error, OSError) else method
            self._stopped.add(what)
            rest = "nothing more is logged" if what is EVERYTHING else f"{method}() is not called any more"
            warn(
                f"{type(self.writer).__name__}.{method}() failed ({type(error).__name__}: {error}); {rest}, "
                "the training goes on."
            )

    def can(self, method: str) -> bool:
        """Whether the writer has such a method."""
        return callable(getattr(self.writer, method, None))


def check_writer(writer: Any, *, histograms: bool, images: bool, custom_scalars: bool, text: bool) -> None:
    """Raise TypeError if a writer lacks a method for what it is asked to log."""
    needed = {
        "add_scalar": True,
        "add_histogram_raw": histograms,
        "add_image": images,
        "add_custom_scalars": custom_scalars,
        "add_text": text,
    }
    missing = [
        method
        for method, wanted in needed.items()
        if wanted and writer is not None and not callable(getattr(writer, method, None))
    ]
    if missing and writer is not None:
        raise TypeError(
            f"Expected a writer with {', '.join(missing)}(), such as SummaryWriter, got {type(writer).__name__}."
        )


def _check_worker(writer: Any) -> None:
    """Raise OSError if the thread that writes for tensorboardX is dead: its queue would fill up and block for ever.

    A queue that is nearly full is waited for, so that no call blocks in it, closing the writer included. (TensorBoard's
    own writers empty their queue when their thread dies, and raise.)
    """
    events = getattr(getattr(writer, "file_writer", None), "event_writer", None)
    worker, queue = getattr(events, "_worker", None), getattr(events, "_event_queue", None)
    if worker is None or queue is None:
        return
    while worker.is_alive() and _nearly_full(queue):
        time.sleep(0.001)
    if not worker.is_alive():
        queue.cancel_join_thread()  # else the process waits for its reader when it ends
        raise OSError("the thread that writes its file has died")


def _nearly_full(queue: Any) -> bool:
    try:
        return queue.qsize() + 1 >= queue._maxsize
    except (AttributeError, NotImplementedError):  # macOS counts nothing
        return queue.full()


def warn(message: str) -> None:
    """A RuntimeWarning about the first caller outside the library."""
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torchreg", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
