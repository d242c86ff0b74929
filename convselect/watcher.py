"""Sees what Dynamo compiles for a model, and in which dictionaries and under which names its guards look."""

from __future__ import annotations

import builtins
import dis
import gc
import re
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._dynamo.convert_frame import register_bytecode_hook
from torch.utils.hooks import RemovableHandle

from convselect.runtime import CompiledGraph

_T = TypeVar("_T")

PLAIN = (int, float, bool, str, type(None))
_UNCHANGING = (
    *PLAIN, complex, bytes, dict, type, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType, torch.nn.Module, torch.Tensor,
)  # fmt: skip
"""Dictionaries and modules are watched themselves; tensors are compared by the graph (`graph/weights.py`)."""

_STATE_GUARDS = frozenset({
    "GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE", "TORCH_FUNCTION_STATE", "DEFAULT_DEVICE",
    "AUTOGRAD_SAVED_TENSORS_HOOKS", "SHAPE_ENV", "FSDP_TRAINING_STATE",
})  # fmt: skip
"""Guards on what `shortcut.py` compares at each call."""

_UNREAD = frozenset({
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
})  # fmt: skip
"""Dictionaries of a module that a forward call without hooks does not read."""

_STEP = re.compile(r"\.(\w+)|\['([^']*)'\]")
_ELEMENT = re.compile(r"(\[\d+\]|\['[^']*'\])*")
"""What an argument holds, from its name."""
UNSEEN = object()


def _alive(reference: Callable[[], _T | None]) -> _T:
    """What a weak reference refers to, during a call of the compiled model, which holds all of it."""
    value = reference()
    assert value is not None
    return value


class HeldGraph:
    """What torch's caches hold of a graph: they outlive the model, and must not keep its weights alive."""

    _boxed_call = True

    def __init__(self, graph: CompiledGraph) -> None:
        self._graph = weakref.ref(graph)

    def __call__(self, args: list[Any]) -> Any:
        return _alive(self._graph)(args)


class Watcher:
    """Of one model. Owns its graphs, and is owned by what `torch.compile` returned; torch's caches know it weakly."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._latest: CompiledGraph | None = None
        self._only_calls_graph = False
        self._hook: RemovableHandle | None = None
        self._graphs: WeakKeyDictionary[HeldGraph, CompiledGraph] = WeakKeyDictionary()
        self._paths: WeakKeyDictionary[CompiledGraph, Paths] = WeakKeyDictionary()

    def for_backend(self) -> Callable[[CompiledGraph], HeldGraph]:
        """Sees each graph, and returns what torch is to hold of it."""
        see_graph = weakref.WeakMethod(self._see_graph)
        return lambda graph: _alive(see_graph)(graph)

    def _see_graph(self, graph: CompiledGraph) -> HeldGraph:
        """What the backend made of a frame; Dynamo then makes its bytecode, and last its guards, all under a lock."""
        self._latest, self._only_calls_graph = graph, False
        self._hook = self._hook or register_bytecode_hook(self._see_bytecode)
        held = HeldGraph(graph)
        self._graphs[held] = graph
        return held

    def _see_bytecode(self, code: types.CodeType, new_code: types.CodeType) -> None:
        """Whether the code that Dynamo made calls the graph, returns what it gave, and does nothing else."""
        instructions = list(dis.get_instructions(new_code))
        calls = sum(i.opname.startswith("CALL") for i in instructions)
        notes = sum(str(i.argval).startswith("record_pregraph_bytecode") for i in instructions)  # for profilers
        writes = [i for i in instructions if i.opname.startswith(("STORE_", "DELETE_"))]
        self._only_calls_graph = calls == 1 + notes and all(i.opname.endswith("_FAST") for i in writes)

    def see_guards(self, entries: Sequence[Any]) -> list[bool]:
        """Dynamo's `guard_filter_fn`: keeps all of them."""
        graph, self._latest = self._latest, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if graph is not None and self._only_calls_graph:
            paths = _paths_of(entries, _alive(self._model))
            if paths is not None:
                self._paths[graph] = paths
        return [True] * len(entries)

    def read_by(self, graph: CompiledGraph) -> Reader | None:
        """What must be unchanged for `graph` to be right; None if it does not show every change."""
        paths = self._paths.get(graph)
        if paths is None:
            return None
        model = _alive(self._model)
        reader = Reader(model)
        found = [reader.follow(model, path) for path in paths.model]
        found += [reader.follow(reader.namespace, path) for path in paths.namespace]
        return reader if all(map(_shows, found)) else None


class Paths(NamedTuple):
    """Where guards look: paths of ".name" and "['key']"."""

    model: set[str]
    """From the model."""
    namespace: set[str]
    """From the dictionary of the global names of its `forward`."""


def _paths_of(entries: Sequence[Any], model: torch.nn.Module) -> Paths | None:
    reader = Reader(model)
    roots = {entry.name for entry in entries if entry.value is model}
    paths = Paths(set(), set())
    for entry in entries:
        root = re.match(r"\w*", entry.name)[0]  # type: ignore[index]
        path = entry.name[len(root) :]
        if root in roots:
            paths.model.add(path)
        elif root == "G" and reader.follow(reader.namespace, path) is entry.value:
            paths.namespace.add(path)
        elif entry.guard_type in _STATE_GUARDS or entry.name.startswith("dict(type("):
            continue  # classes are watched with their modules
        elif not root or not _ELEMENT.fullmatch(path):  # otherwise of an argument: `shortcut._key` compares it
            return None
    return paths


class Reader:
    """Follows paths, and collects dictionaries and names that are unchanged as long as the paths lead to the same.

    The dictionary of a Python module as a whole would show too much: at the top level of a script each statement that
    assigns changes one.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.namespace: dict[str, Any] = getattr(model.forward, "__globals__", {})
        self.dictionaries = _of_modules(model)
        """By their id."""
        self.names: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        """The dictionary of a Python module, a name and its value, by the id of the dictionary and the name."""
        self._inside = {id(module) for module in model.modules()}

    def follow(self, value: Any, path: str) -> Any:
        """What `path` leads to from `value`; `UNSEEN` where a change on the way could not be seen."""
        end = 0
        while end < len(path):
            step = _STEP.match(path, end)
            if step is None:
                return UNSEEN
            end = step.end()
            name, key = step.groups()
            if key is not None and id(value) in self.dictionaries:
                value = value.get(key, UNSEEN)
            elif key is not None:
                value = self._named(value, key) if value is self.namespace or value is builtins.__dict__ else UNSEEN
            elif isinstance(value, types.ModuleType):
                value = self._named(value.__dict__, name)
            elif id(value) in self._inside or (
                isinstance(value, types.FunctionType) and name in ("__name__", "__module__")
            ):
                value = getattr(value, name, UNSEEN)
            else:
                return UNSEEN
        return value

    def _named(self, namespace: dict[str, Any], name: str) -> Any:
        value = namespace.get(name, UNSEEN)
        self.names[id(namespace), name] = namespace, name, value
        return value


def _of_modules(model: torch.nn.Module) -> dict[int, dict[Any, Any]]:
    """The dictionaries of all modules, those among their attributes, and those of their classes, by their id."""
    found: list[dict[Any, Any]] = []
    for module in model.modules():
        found.append(module.__dict__)
        found += [value for name, value in module.__dict__.items() if name not in _UNREAD]
    for kind in {base for module in model.modules() for base in type(module).__mro__[:-1]}:
        found += gc.get_referents(kind.__dict__)  # the dictionary under the read-only proxy
    return {id(dictionary): dictionary for dictionary in found if isinstance(dictionary, dict)}


def _shows(value: Any) -> bool:
    """Whether a change of `value` is a change of the dictionary that it was found in."""
    return all(map(_shows, value)) if isinstance(value, tuple) else isinstance(value, _UNCHANGING)
