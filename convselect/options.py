"""The options of `convselect.compile`, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from convselect.errors import unknown_choice
from convselect.primitive import ACCURACIES

_CHOICES = {
    "accuracy": ACCURACIES,
    "calibrate": ("auto", "always", "never"),
    "select": ("model", "measure", "model+verify"),
    "remainder": ("eager", "inductor"),
    "cuda_graphs": ("auto", "never"),
}


@dataclass(frozen=True)
class Options:
    """See `convselect.compile` for what each one does."""

    accuracy: str = "default"
    calibrate: str = "auto"
    budget_s: float = 2.0
    select: str = "model"
    memory_mb: float | None = None
    remainder: str = "eager"
    cuda_graphs: str = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown_choice(name, getattr(self, name), choices)
        if not _is_number(self.budget_s) or not 0 <= self.budget_s < math.inf:
            raise ValueError(f"budget_s is {self.budget_s!r}, must be a number of seconds, 0 or more")
        if self.memory_mb is not None and (not _is_number(self.memory_mb) or not self.memory_mb >= 0):
            raise ValueError(f"memory_mb is {self.memory_mb!r}, must be None or a number of MiB, 0 or more")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict is {self.strict!r}, must be True or False")

    @classmethod
    def of(cls, options: Mapping[str, object] | None) -> Options:
        """From a mapping, such as `torch.compile`'s `options=`. Unknown keys raise `ValueError`."""
        options = dict(options or {})
        names = [field.name for field in fields(cls)]
        for key in options:
            if key == "dynamic":
                raise ValueError("dynamic is an argument of torch.compile itself, not one of the backend's options")
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
                raise ValueError(
                    f"unknown option {key!r}; the options are {', '.join(names)}. Did you mean {near[0]!r}?"
                )
        return cls(**options)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
