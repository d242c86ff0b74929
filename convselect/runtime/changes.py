"""Counts the changes of dictionaries, in which modules keep their attributes: one comparison tells that none changed.

CPython tells of them itself. From 3.12 on a function of ours is called before each change of a dictionary that is
watched; it is C's (`changes.cpp`) and touches no object. Dictionaries of 3.10 and 3.11 hold a version, which is taken
from one counter of the process at each change, so that the sum of their versions grows. Neither is promised to see
every change, and 3.13.0 does not (gh-125608), so what is used has to see a number of them first.

Nothing here needs torch.
"""

from __future__ import annotations

import array
import ctypes
import gc
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_NAME = "libconvselect_changes.so"
_VERSION_OFFSET = 24
"""Where `ma_version_tag` lies in a dictionary of CPython 3.10 and 3.11: after reference count, type and length."""
_TYPE_OFFSET = 8
"""Where an object's type lies, after its reference count."""
_MANAGED_OFFSET = -24
"""Where the address of `__dict__` lies before an object whose class says no better place, from CPython 3.11 on."""
_WATCHERS = sys.version_info >= (3, 12)


def dictionary_of(kind: type) -> dict[str, Any]:
    """A class's own dictionary, which `kind.__dict__` only shows."""
    (found,) = (value for value in gc.get_referents(kind.__dict__) if isinstance(value, dict))
    return found


class Changes:
    """Counts changes of the dictionaries that it was told to watch. It keeps them alive. Needs the GIL."""

    def __init__(self) -> None:
        self._held: dict[int, dict[Any, Any]] = {}
        self._library = _library()
        self._counter = ctypes.c_uint64(0)
        self._address = ctypes.addressof(self._counter)
        self._versions = array.array("Q")

    def watch(self, dictionaries: Iterable[dict[Any, Any]]) -> None:
        """Counts their changes from now on."""
        for dictionary in dictionaries:
            if id(dictionary) in self._held:
                continue
            self._held[id(dictionary)] = dictionary
            if _WATCHERS:
                self._library.convselect_watch(id(dictionary), self._address)
                _python().PyDict_Watch(_watcher(), dictionary)
            else:
                self._versions.append(id(dictionary) + _VERSION_OFFSET)

    def count(self) -> int:
        """A number that is another after each change of what was watched before."""
        if _WATCHERS:
            return self._counter.value
        address, length = self._versions.buffer_info()
        count: int = self._library.convselect_sum(address, length)
        return count

    def __del__(self) -> None:
        if _WATCHERS:
            for address in self._held:
                self._library.convselect_forget(address, self._address)


def identity_of(owner: Any) -> list[tuple[int, int]] | None:
    """Addresses of words that live with the object `owner`, and what they hold as long as it has its class and its
    `__dict__`; None where they are not found.
    """
    offset = type(owner).__dictoffset__
    rows = [
        (id(owner) + _TYPE_OFFSET, id(type(owner))),
        (id(owner) + (offset if offset > 0 else _MANAGED_OFFSET), id(owner.__dict__)),
    ]
    return rows if _hold(rows) else None


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why changes cannot be counted in this process; None where they can."""
    if sys.implementation.name != "cpython":
        return f"{sys.implementation.name} does not tell of changes of dictionaries"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "without the GIL other threads may change a dictionary while a call looks at it"
    version = sys.version.split()[0]
    try:
        unseen = [name for name, (make, change) in _changes().items() if not _is_seen(make, change)]
        unseen += [] if _is_identified() else ["classes and dictionaries of objects"]
    except (AttributeError, OSError, RuntimeError) as error:
        return f"CPython {version} does not let dictionaries be watched ({error})"
    return f"CPython {version} does not tell of every change of a dictionary ({', '.join(unseen)})" if unseen else None


def _is_seen(make: Callable[[], Any], change: Callable[[Any, int], object]) -> bool:
    """Whether each of many changes counts; CPython specialises stores that it has seen a few times."""
    changed = make()
    changes = Changes()
    changes.watch([changed if isinstance(changed, dict) else _attributes(changed)])
    for i in range(64):
        before = changes.count()
        if changes.count() != before:
            return False
        change(changed, i)
        if changes.count() == before:
            return False
    return True


def _is_identified() -> bool:
    """Whether `identity_of` sees another class and another dictionary."""

    class Kind:
        pass

    class Other:
        pass

    owner: Any = Kind()
    for name, value in (("__class__", Other), ("__dict__", {"a": 1})):
        rows = identity_of(owner)
        if rows is None or not _hold(rows):
            return False
        setattr(owner, name, value)
        if _hold(rows):
            return False
    return True


def _hold(rows: Iterable[tuple[int, int]]) -> bool:
    return all(ctypes.c_uint64.from_address(address).value == word for address, word in rows)


def _attributes(owner: Any) -> dict[str, Any]:
    found: dict[str, Any] = dictionary_of(owner) if isinstance(owner, type) else owner.__dict__
    return found


def _changes() -> Mapping[str, tuple[Callable[[], Any], Callable[[Any, int], object]]]:
    """What is tried: something with a dictionary, and the n-th change of it."""

    class Module:
        training = False

        def __init__(self) -> None:
            self.training, self.other = True, None

    def store(module: Any, i: int) -> None:
        module.training = i

    def delete(module: Any, i: int) -> None:
        module.other = i
        del module.other

    def clear(dictionary: dict[Any, Any], i: int) -> None:
        dictionary["a"] = i
        dictionary.clear()

    return {
        "attributes": (Module, store),
        "new attributes": (Module, lambda module, i: setattr(module, f"a{i}", i)),
        "deleted attributes": (Module, delete),
        "attributes by their dictionary": (Module, lambda module, i: module.__dict__.update(training=i)),
        "attributes of classes": (lambda: type("Kind", (Module,), {"training": True}), store),
        "items": (dict, lambda dictionary, i: dictionary.update({"a": i})),
        "cleared dictionaries": (dict, clear),
    }


@lru_cache(maxsize=1)
def _library() -> ctypes.PyDLL:
    """The compiled part: beside this file, or, in an editable install, in the package's other folder."""
    package = sys.modules.get(__package__ or "")
    folders = [*getattr(package, "__path__", ()), Path(__file__).parent]
    path = next((path for folder in folders if (path := Path(folder, _NAME)).exists()), None)
    if path is None:
        raise OSError(f"{_NAME} is missing from {', '.join(map(str, folders))}")
    library = ctypes.PyDLL(str(path))  # which keeps the GIL
    for name in ("watch", "forget"):
        getattr(library, f"convselect_{name}").argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.convselect_watched.restype = ctypes.c_int64
    library.convselect_sum.argtypes, library.convselect_sum.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    return library


@lru_cache(maxsize=1)
def _python() -> ctypes.PyDLL:
    """The interpreter; `ctypes.pythonapi` is everybody's."""
    python = ctypes.PyDLL(None)
    python.PyDict_AddWatcher.argtypes = [ctypes.c_void_p]
    python.PyDict_Watch.argtypes = [ctypes.c_int, ctypes.py_object]
    return python


@lru_cache(maxsize=1)
def _watcher() -> int:
    """The one of the six or so watchers of a process that is ours."""
    on_event = ctypes.cast(_library().convselect_on_event, ctypes.c_void_p)
    return int(_python().PyDict_AddWatcher(on_event))
