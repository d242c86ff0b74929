"""The exceptions that convselect raises on purpose.

Invalid arguments raise `ValueError` or `TypeError` with the value, the rule and the nearest valid choice.
What the library cannot do is not an exception but a *refusal*: a sentence that the plan shows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConvselectWarning(UserWarning):
    """Something runs slower or otherwise than asked; the message names the node and the reason."""


class UnconvertedError(RuntimeError):
    """Raised instead of a `ConvselectWarning` when `strict=True`.

    With `torch.compile(model, backend="convselect")` it is the `inner_exception` of Dynamo's `BackendCompilerFailed`.
    """


def brief(error: Exception) -> str:
    """Its type and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def unknown_choice(what: str, value: object, choices: Iterable[object]) -> ValueError:
    """A `ValueError` that names `value`, the valid `choices` and the nearest of them."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what} is {value!r}, must be one of {', '.join(names)}{hint}")
