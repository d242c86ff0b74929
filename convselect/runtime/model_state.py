"""`ModelState`: what a model's modules and their dictionaries held at one time, and whether they still do."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch

from convselect.runtime.changes import Changes, identity_of
from convselect.runtime.watcher import dictionaries_of


class ModelState:
    """What was there when it was made. All of it is kept alive as long as the state is, so that nothing new has its
    address.

    Attributes:
        dictionaries: all that the model's modules, their classes and their attributes have, by their id.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._changes = Changes()
        self.dictionaries: Mapping[int, dict[Any, Any]] = {}
        while (found := dictionaries_of(model)).keys() != self.dictionaries.keys():
            self.dictionaries = found
            self._changes.watch(found.values())
            self._count = self._changes.count()  # before the dictionaries are looked at once more
        self._contents = [(each, tuple(dict.keys(each)), tuple(dict.values(each))) for each in found.values()]
        self._modules = list(model.modules())
        rows = [identity_of(module) for module in self._modules]
        self._identities = None if None in rows else torch.tensor([row for some in rows for row in some or ()])

    def changes(self) -> int:
        """A number that is another after each change of a dictionary."""
        return self._changes.count()

    def is_current(self) -> bool:
        """Whether all is as it was. Compiling any model changes `torch.nn.Module`, and changes it back."""
        if not self._has_identities():
            return False
        count = self.changes()
        if count != self._count:
            if not all(map(_holds, *zip(*self._contents, strict=True))):
                return False
            self._count = count
        return True

    def _has_identities(self) -> bool:
        return self._identities is not None and bool(torch.ops.convselect.unchanged(self._identities))


def _holds(dictionary: dict[Any, Any], keys: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    """Whether it has the same objects, in the same order."""
    return (
        len(dictionary) == len(keys)
        and all(map(is_, tuple(dict.keys(dictionary)), keys))
        and all(map(is_, tuple(dict.values(dictionary)), values))
    )
