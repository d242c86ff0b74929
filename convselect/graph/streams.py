"""Order between streams of a GPU: what one was given must be done before another reads it."""

from __future__ import annotations

from typing import Any

import torch


class Ready:
    """The moment at which all that the current stream of `device` was given so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.current_stream(device)
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(self._stream)

    def wait(self) -> None:
        """Whatever the current stream is given from now on comes after it.

        A stream that the caller is capturing may not wait for what is outside of the capture; torch asks of the caller
        to have warmed up and synchronised before that.
        """
        current = torch.cuda.current_stream(self._device)
        if current != self._stream and not torch.cuda.is_current_stream_capturing():
            current.wait_event(self._event)
