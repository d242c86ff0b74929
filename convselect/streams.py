"""The streams of a GPU: what one was given must be done before another reads it, how long
that takes, and that only one thread may capture.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

CAPTURES = threading.Lock()
"""Held while a stream captures, of which torch allows one in a process, and by what waits for a whole GPU: that fails,
and breaks the capture, while another thread is at it."""


class Ready:
    """The moment at which all that a stream of `device` had been given is done, for others to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """It is now, on the current stream."""
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Whatever the current stream is given from now on comes after it; at once if nothing was recorded.

        A stream that the caller is capturing may not wait for what is outside of the capture; torch asks of the caller
        to have warmed up and synchronised before that.
        """
        if not is_capturing():
            torch.cuda.current_stream(self._device).wait_event(self._event)


class Interval:
    """What the current stream is given inside the block, timed by events."""

    def __init__(self) -> None:
        self._start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Interval:
        self._start.record()
        return self

    def __exit__(self, *raised: object) -> None:
        self._end.record()

    def ms(self) -> float:
        """Waits for its end."""
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def is_capturing() -> bool:
    """Whether the caller captures on the current stream."""
    return torch.cuda.is_current_stream_capturing()


def finish(device: torch.device) -> None:
    """Waits for all streams of `device`."""
    with CAPTURES:
        torch.cuda.synchronize(device)
