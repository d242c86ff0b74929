"""A clock that only a test moves, in place of the module `time`: no test may depend on how fast a machine is."""

from __future__ import annotations

from types import ModuleType

import pytest


class Clock:
    """What the package asks of `time`. A look at it takes `look_s` seconds, sleeping as long as it should, all else
    no time.
    """

    def __init__(self, look_s: float = 0.0) -> None:
        self.now_s, self.look_s = 1000.0, look_s

    @classmethod
    def of(cls, patch: pytest.MonkeyPatch, *modules: ModuleType, look_s: float = 0.0) -> Clock:
        """A clock by which all of `modules` go."""
        clock = cls(look_s)
        for module in modules:
            patch.setattr(module, "time", clock)
        return clock

    def perf_counter(self) -> float:
        self.now_s += self.look_s
        return self.now_s

    time = monotonic = perf_counter

    def perf_counter_ns(self) -> int:
        return round(1e9 * self.perf_counter())

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
