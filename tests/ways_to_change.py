"""A script for any Python: changes modules, classes and dictionaries in all ways, and prints those that do not count.

    python tests/ways_to_change.py FOLDER   (of changes.py and its library)

It needs no torch: `Module` keeps its attributes as `torch.nn.Module` does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

Make = Callable[[], Any]
Change = Callable[[Any, int], object]


class Module:
    kind = 1

    def __init__(self) -> None:
        store = super().__setattr__
        store("training", True)
        for name in ("_parameters", "_buffers", "_modules"):
            store(name, {})
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            store(name, OrderedDict())
        self.other = 1

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            self.__dict__["_modules"][name] = value
        else:
            super().__setattr__(name, value)


class Plain:
    def __init__(self) -> None:
        self.training, self.other = True, 1


class Large(Plain):
    """More attributes than CPython keeps in an object itself."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(40):
            setattr(self, f"a{i}", i)


class Slotted(Module):
    __slots__ = ("slot",)


class Int(Plain, int):
    """Of a class of varying size."""

    def __new__(cls) -> Int:
        return int.__new__(cls, 2**70)


def store(owner: Any, i: int) -> None:
    """A store that CPython specialises."""
    owner.training = i


def by_c(owner: Any, i: int) -> None:
    ctypes.pythonapi.PyObject_SetAttrString(ctypes.py_object(owner), b"training", ctypes.py_object(i))


def again(owner: Any, i: int) -> None:
    owner.other = i
    del owner.other


def of_objects() -> Iterator[tuple[str, Make, Change, int]]:
    """What changes an object's attributes: a name, the object, the i-th change and how many."""
    ways: dict[str, tuple[Change, int]] = {
        "store": (store, 400),
        "setattr": (lambda o, i: setattr(o, "training", i), 400),
        "object.__setattr__": (lambda o, i: object.__setattr__(o, "training", i), 50),
        "PyObject_SetAttrString": (by_c, 50),
        "new attribute": (lambda o, i: setattr(o, f"new{i}", i), 60),
        "del": (lambda o, i: delattr(o, "other"), 1),
        "add and del": (again, 50),
        "item of __dict__": (lambda o, i: vars(o).__setitem__("other", i), 50),
        "__dict__.update": (lambda o, i: vars(o).update(other=i), 50),
        "__dict__ |=": (lambda o, i: vars(o).__ior__({"other": i}), 50),
        "__dict__.pop": (lambda o, i: vars(o).pop("other"), 1),
        "__dict__.popitem": (lambda o, i: vars(o).popitem(), 1),
        "__dict__.setdefault": (lambda o, i: vars(o).setdefault("new", 1), 1),
        "__dict__.clear": (lambda o, i: vars(o).clear(), 1),
        "__setstate__": (lambda o, i: o.__dict__.update({"other": 5, "training": False}), 1),
    }
    for kind in (Module, Plain, Large, Slotted, Int):
        for name, (change, times) in ways.items():
            yield f"{kind.__name__}: {name}", kind, change, times


def of_dictionaries() -> Iterator[tuple[str, Make, Change, int]]:
    ways: dict[str, Change] = {
        "item": lambda d, i: d.__setitem__("a", i),
        "new item": lambda d, i: d.__setitem__(i, i),
        "del": lambda d, i: d.__delitem__("a"),
        "pop": lambda d, i: d.pop("a"),
        "popitem": lambda d, i: d.popitem(),
        "clear": lambda d, i: d.clear(),
        "update": lambda d, i: d.update(a=7),
        "update by a dictionary": lambda d, i: d.update({"a": 9}),
        "|=": lambda d, i: d.__ior__({"new": 1}),
        "setdefault": lambda d, i: d.setdefault("new", 1),
        "__init__": lambda d, i: d.__init__({"new": 1}),
    }
    into_empty: dict[str, Change] = {
        "update": lambda d, i: d.update({j: j for j in range(9)}),
        "update by pairs": lambda d, i: d.update([("a", 1)]),
        "|=": lambda d, i: d.__ior__({"a": 1}),
        "__init__": lambda d, i: d.__init__({"a": 1}),
    }
    for kind in (dict, OrderedDict):
        for name, change in ways.items():
            yield f"{kind.__name__}: {name}", lambda kind=kind: kind(a=1, b=2), change, 1
        for name, change in into_empty.items():
            yield f"empty {kind.__name__}: {name}", kind, change, 1


def of_classes() -> Iterator[tuple[str, Make, Change, int]]:
    def make() -> type:
        class Kind(Module):
            kind = 1

            def method(self) -> int:
                return self.kind

        Kind().method()  # looked up, so that it is in the cache of the class
        return Kind

    ways: dict[str, tuple[Change, int]] = {
        "attribute": (lambda kind, i: setattr(kind, "kind", i), 60),
        "new attribute": (lambda kind, i: setattr(kind, f"new{i}", i), 60),
        "del": (lambda kind, i: delattr(kind, "kind"), 1),
        "method": (lambda kind, i: setattr(kind, "method", lambda self: i), 60),
        "type.__setattr__": (lambda kind, i: type.__setattr__(kind, "kind", i), 60),
    }
    for name, (change, times) in ways.items():
        yield f"class: {name}", make, change, times


def of_identities() -> Iterator[tuple[str, Make, Change]]:
    """What no dictionary shows."""
    for kind in (Module, Plain, Large, Slotted, Int):
        layout: dict[str, Any] = {"__slots__": ()} if kind is Slotted else {}
        other = type("Other", (kind,), layout)
        for name, value in (("__class__", other), ("__dict__", {"training": False})):

            def change(owner: Any, i: int, name: str = name, value: Any = value) -> None:
                object.__setattr__(owner, name, value)

            yield f"{kind.__name__}: {name}", other if name == "__dict__" else type("Before", (kind,), layout), change


def unseen(changes: Any) -> list[str]:
    found = []
    for name, make, change, times in (*of_objects(), *of_dictionaries(), *of_classes()):
        owner, counter = make(), changes.Changes()
        dictionary = owner if isinstance(owner, dict) else changes._attributes(owner)
        counter.watch([dictionary])
        for i in range(times):
            before = counter.count()
            change(owner, i)
            if counter.count() == before:
                found.append(name)
                break
    for name, make, change in of_identities():
        owner = make()
        rows = changes.identity_of(owner)
        if rows is None:  # such a model has no shortcut
            continue
        held = changes._hold(rows)
        change(owner, 0)
        if not held or changes._hold(rows):
            found.append(name)
    return found


def kept(changes: Any) -> dict[str, int]:
    """What is left when what watched has gone."""
    before = changes._library().convselect_watched()
    first, second, shared = changes.Changes(), changes.Changes(), {}
    first.watch([shared, *(Module().__dict__ for _ in range(1000))])
    second.watch([shared])
    del first
    gc.collect()
    count = second.count()
    shared["a"] = 1
    seen = int(second.count() != count)
    del second
    gc.collect()
    return {"left": changes._library().convselect_watched() - before, "seen": seen}


def of_the_dead(changes: Any) -> bool:
    """Whether a change is seen of the dictionary of an object that has gone."""
    owner, counter = Module(), changes.Changes()
    dictionary = owner.__dict__
    counter.watch([dictionary])
    del owner
    gc.collect()
    before = counter.count()
    dictionary["training"] = 3
    return bool(counter.count() != before)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import changes

    said = {"version": list(sys.version_info[:3]), "missing": changes.missing()}
    if changes.missing() is None:
        said |= {"unseen": unseen(changes), "of the dead": of_the_dead(changes), **kept(changes)}
    print(json.dumps(said))
