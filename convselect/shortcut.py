"""Calls that need no guards: what `convselect.compile` returns runs a graph at once when nothing has changed.

Dynamo decides by thousands of guards, at each call, whether compiled code still fits a module; after a network has
filled the caches that takes 0.7 ms for MobileNet-v2, a fifth of its time. Nearly all of them look at attributes of
modules and at names of Python modules, all of which live in dictionaries, and CPython counts the changes of a
dictionary. So a call through Dynamo is remembered with the version of each dictionary that its guards read, and
a later call with the same kind of inputs that finds all versions unchanged runs the same graph. Any change whatever
sends the call through Dynamo again, which decides as it would have done.
"""

from __future__ import annotations

import builtins
import dis
import gc
import re
import sys
import threading
import types
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._C._dynamo.guards import GlobalStateGuard, dict_version
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

import convselect.kernels  # noqa: F401  (loads the operators)
from convselect.runtime import CompiledGraph, Run, recording

_VERSION_OFFSET = 24
"""Of `ma_version_tag` in a dict object of CPython up to 3.12, after the reference count, the type and the length."""

_STATE_GUARDS = frozenset({
    "GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE", "TORCH_FUNCTION_STATE", "DEFAULT_DEVICE",
    "AUTOGRAD_SAVED_TENSORS_HOOKS", "SHAPE_ENV", "FSDP_TRAINING_STATE",
})  # fmt: skip
"""Guards on what `_state` compares."""

_PLAIN = (int, float, bool, str, type(None))
_UNCHANGING = (
    *_PLAIN, complex, bytes, dict, type, torch.dtype, torch.device, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType, torch.nn.Module, torch.Tensor,
)  # fmt: skip
"""Dictionaries and modules are watched themselves; tensors are compared by the graph (`graph/weights.py`)."""

_UNREAD = frozenset({
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
})  # fmt: skip
"""Dictionaries of a module that a forward call without hooks does not read."""

Dictionaries = dict[int, dict[Any, Any]]
"""By their id."""


class Watcher:
    """Sees what Dynamo compiles for one model, and which dictionaries the guards of each graph read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._latest: CompiledGraph | None = None
        self._only_calls_graph = False
        self._watched: WeakKeyDictionary[CompiledGraph, Dictionaries] = WeakKeyDictionary()

    def see_graph(self, graph: CompiledGraph) -> None:
        """What the backend made of a frame; Dynamo then makes its bytecode, and last its guards."""
        self._latest = graph

    def see_bytecode(self, code: types.CodeType, new_code: types.CodeType) -> None:
        """Whether the code that Dynamo made calls the graph, returns what it gave, and does nothing else."""
        instructions = list(dis.get_instructions(new_code))
        calls = sum(i.opname.startswith("CALL") for i in instructions)
        notes = sum(str(i.argval).startswith("record_pregraph_bytecode") for i in instructions)  # for profilers
        writes = [i for i in instructions if i.opname.startswith(("STORE_", "DELETE_"))]
        self._only_calls_graph = calls == 1 + notes and all(i.opname.endswith("_FAST") for i in writes)

    def see_guards(self, entries: Sequence[Any]) -> list[bool]:
        """Dynamo's `guard_filter_fn`: keeps all of them."""
        if self._latest is not None and self._only_calls_graph:
            watched = self._read_by(entries)
            if watched is not None:
                self._watched[self._latest] = watched
        self._latest, self._only_calls_graph = None, False
        return [True] * len(entries)

    def watched(self, graph: CompiledGraph) -> Dictionaries | None:
        """What must be unchanged for `graph` to be right; None if dictionaries do not show all of it."""
        watched = self._watched.get(graph)
        if watched is None or not _of_modules(self.model).keys() <= watched.keys():
            return None
        return watched

    def _read_by(self, entries: Sequence[Any]) -> Dictionaries | None:
        watched = _of_modules(self.model)
        namespace = type(self.model).forward.__globals__
        watched[id(namespace)] = namespace
        inside = {id(module) for module in self.model.modules()}
        roots = {entry.name for entry in entries if entry.value is self.model}
        for entry in entries:
            root = re.match(r"\w*", entry.name)[0]  # type: ignore[index]
            path = entry.name[len(root) :]
            if root in roots:
                read = _walk(self.model, path, inside, watched)
            elif root == "G":
                read = _walk(namespace, path, inside, watched)
            elif entry.guard_type in _STATE_GUARDS or entry.name.startswith("dict(type("):
                continue  # `_state` compares it; classes are watched with their modules
            elif path:
                return None
            else:
                continue  # an argument: `_key` compares it
            if not read or not _shows(entry.value):
                return None
        return watched


def _of_modules(model: torch.nn.Module) -> Dictionaries:
    """The dictionaries of all modules, those among their attributes, and those of their classes."""
    found: list[dict[Any, Any]] = []
    for module in model.modules():
        found.append(module.__dict__)
        found += [value for name, value in module.__dict__.items() if name not in _UNREAD]
    for kind in {base for module in model.modules() for base in type(module).__mro__[:-1]}:
        found += gc.get_referents(kind.__dict__)  # the dictionary under the read-only proxy
    return {id(dictionary): dictionary for dictionary in found if isinstance(dictionary, dict)}


def _walk(value: Any, path: str, inside: set[int], watched: Dictionaries) -> bool:
    """Whether `path` (".name" and "['key']") leads from `value` through watched dictionaries only.

    Dictionaries of Python modules on the way are added to them; other modules than those `inside` are none.
    """
    while path:
        step = re.match(r"\.(\w+)|\['([^']*)'\]", path)
        if step is None:
            return False
        path = path[step.end() :]
        name, key = step.groups()
        if key is not None:
            if value is builtins.__dict__:
                watched[id(value)] = value
            if id(value) not in watched:
                return False
            value = value.get(key)
        elif isinstance(value, types.ModuleType):
            watched[id(value.__dict__)] = value.__dict__
            value = getattr(value, name, None)
        elif id(value) in inside or (isinstance(value, types.FunctionType) and name in ("__name__", "__module__")):
            value = getattr(value, name, None)
        else:
            return False
    return True


def _shows(value: Any) -> bool:
    """Whether a change of `value` is a change of the dictionary that it was found in."""
    return all(map(_shows, value)) if isinstance(value, tuple) else isinstance(value, _UNCHANGING)


class Shortcut:
    """One remembered call: its graph, and where the call's arguments go and its results come from."""

    def __init__(self, run: Run, leaves: Sequence[Any], result: Any, watched: Dictionaries) -> None:
        """Raises `ValueError` where the graph's inputs and results are not the call's own."""
        self._run = run.graph.run
        place = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        self._given = [(i, place[id(value)]) for i, value in enumerate(run.rest) if id(value) in place]
        self._statics = run.statics
        self._rest = [None if id(value) in place else value for value in run.rest]
        held = {id(value) for dictionary in watched.values() for value in dictionary.values()}
        if not all(arg is None or type(arg) is int or id(arg) in held for arg in (*self._statics, *self._rest)):
            raise ValueError("an input of the graph is neither an argument nor held by a module")
        made, self._structure = pytree.tree_flatten(result)
        results = {id(value): i for i, value in enumerate(run.results)}
        if [type(value) for value in made] != [torch.Tensor] * len(run.results) or {*map(id, made)} != results.keys():
            raise ValueError("the results are not the graph's")
        self._results = [results[id(value)] for value in made]
        self._watched, self._state, self._global = watched, _state(), GlobalStateGuard()
        self._autocast = torch._C._is_any_autocast_enabled()
        self._versions = torch.tensor([(id(d) + _VERSION_OFFSET, dict_version(d)) for d in watched.values()])

    def is_current(self) -> bool:
        unchanged: bool = torch.ops.convselect.unchanged(self._versions)
        return unchanged and self._global.check() and _state() == self._state

    def __call__(self, leaves: Sequence[Any]) -> Any:
        rest = self._rest.copy()
        for i, leaf in self._given:
            rest[i] = leaves[leaf]
        if self._autocast:  # the graph has its casts; AOTAutograd does the same
            with torch._C._DisableAutocast():
                made = self._run(self._statics, rest)
        else:
            made = self._run(self._statics, rest)
        if self._results == [0] and self._structure.is_leaf():
            return made[0]
        return pytree.tree_unflatten([made[i] for i in self._results], self._structure)


def _state() -> tuple[Any, ...]:
    """Of the process and the calling thread: what decides whether Dynamo runs, and what it makes of a function."""
    return (
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.nn.modules.module._has_any_global_hook(),  # type: ignore[no-untyped-call]
        torch._dynamo.eval_frame._stance,
    )


def _key(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What Dynamo's guards on arguments can depend on; None where they are not plain tensors and numbers."""
    parts: list[Any] = []
    for arg in args:
        if type(arg) is torch.Tensor:
            keys = torch._C._dispatch_keys(arg).raw_repr()
            parts += (arg.shape, arg.stride(), arg.dtype, arg.requires_grad, keys, arg.get_device())
        elif type(arg) in _PLAIN:
            parts += (type(arg), arg)
        else:
            return None
    return None if len(set(map(id, args))) < len(args) else tuple(parts)


class Shortcuts:
    """The remembered calls of one compiled model."""

    MOST = 64

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._known: dict[tuple[Any, ...], Shortcut | None] = {}
        """None: a call that has no shortcut."""
        self._lock = threading.Lock()

    def call(self, guarded: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """`guarded(*args)`, the call through Dynamo, or the graph that it ran the last time."""
        key = _key(args)
        if key is None:
            return guarded(*args)
        # What has no shortcut with gradients, or in training, may have one without.
        key += (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self._watcher.model.training)
        shortcut = self._known.get(key, self)
        if shortcut is None:
            return guarded(*args)
        if isinstance(shortcut, Shortcut) and shortcut.is_current():
            return shortcut(args)
        with self._lock:
            hook = register_bytecode_hook(self._watcher.see_bytecode)
            try:
                with recording() as ran:
                    result = guarded(*args)
            finally:
                hook.remove()
            if len(self._known) >= self.MOST:
                self._known.clear()
            self._known[key] = self._learn(args, ran, result)
        return result

    def _learn(self, args: tuple[Any, ...], ran: Sequence[Run], result: Any) -> Shortcut | None:
        watched = self._watcher.watched(ran[0].graph) if len(ran) == 1 else None
        if watched is None or _has_hooks(self._watcher.model):  # its own hooks run outside of what Dynamo compiles
            return None
        try:
            return Shortcut(ran[0], args, result, watched)
        except ValueError:
            return None


class ShortcutModule(OptimizedModule):
    """What `torch.compile` makes of a module, with shortcuts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shortcuts = self.__dict__.get("_shortcuts")
        if kwargs or shortcuts is None or _has_hooks(self) or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        return shortcuts.call(super().__call__, args)


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def add_shortcuts(compiled: Callable[..., Any], watcher: Watcher) -> None:
    """Gives shortcuts to the result of `torch.compile`, where this Python lets dictionaries be watched."""
    if type(compiled) is OptimizedModule and _versions_work():
        compiled.__class__ = ShortcutModule
        compiled.__dict__["_shortcuts"] = Shortcuts(watcher)


@lru_cache(maxsize=1)
def _versions_work() -> bool:
    """Whether each assignment to an attribute changes the word that is watched, also where CPython specialises it."""
    if sys.version_info >= (3, 13) or sys.implementation.name != "cpython":
        return False
    module = torch.nn.Module()
    for i in range(64):
        row = id(module.__dict__) + _VERSION_OFFSET, dict_version(module.__dict__)
        before = torch.tensor([row])
        same = torch.ops.convselect.unchanged(before)
        module.training = i  # type: ignore[assignment]
        if not same or torch.ops.convselect.unchanged(before):
            return False
    return True
