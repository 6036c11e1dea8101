"""The writers that a monitor writes to when a trainer keeps the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torchreg.monitor.guarded import GuardedWriter


class MetricsWriter:
    """Gathers the numbers of a log and hands them over together: a line of a CSV file, a call of a tracker.

    Args:
        log: takes a dict of numbers by tag, and the step.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None]) -> None:
        self._log = log
        self._gathered: dict[str, float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Keep a number until the log is whole."""
        self._gathered[tag] = value

    def end_log(self, step: int) -> None:
        """Hand over what was gathered."""
        gathered, self._gathered = self._gathered, {}
        if gathered:
            self._log(gathered, step)


class Writers:
    """Several writers as one: each gets what it can take, and one that fails is left out with a warning.

    Args:
        writers: objects with ``add_scalar``, and perhaps the other methods of a SummaryWriter.
    """

    def __init__(self, writers: Iterable[Any]) -> None:
        self._writers = [GuardedWriter(writer) for writer in writers]

    def __getattr__(self, name: str) -> Any:
        able = [writer for writer in self.__dict__.get("_writers", ()) if writer.can(name)]
        if not able or name.startswith("_"):
            raise AttributeError(f"None of the writers has a method {name}.")

        def call(*args: Any, **kwargs: Any) -> None:
            for writer in able:
                writer.call(name, *args, **kwargs)

        return call


def writer_of(writers: Iterable[Any]) -> Any:
    """One writer for all: None if there is none."""
    writers = list(writers)
    return writers[0] if len(writers) == 1 else Writers(writers) if writers else None
