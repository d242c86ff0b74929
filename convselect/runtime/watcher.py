"""Sees what Dynamo compiles for a model, and in which dictionaries and under which names its guards look."""

from __future__ import annotations

import builtins
import dis
import re
import types
import weakref
from collections.abc import Callable, Mapping
from inspect import getattr_static
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils.hooks import RemovableHandle

from convselect.runtime.changes import dictionary_of
from convselect.runtime.compiled import CompiledGraph

_T = TypeVar("_T")

PLAIN = (int, float, bool, str, type(None))
_UNCHANGING = (
    *PLAIN,
    complex,
    bytes,
    dict,
    type,
    torch.dtype,
    torch.device,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.nn.Module,
    torch.Tensor,
)
"""Dictionaries and modules are watched themselves; tensors are compared by the graph (`weights.py`)."""

_STATE_GUARDS = frozenset(
    {
        "GRAD_MODE",
        "DETERMINISTIC_ALGORITHMS",
        "GLOBAL_STATE",
        "TORCH_FUNCTION_STATE",
        "DEFAULT_DEVICE",
        "AUTOGRAD_SAVED_TENSORS_HOOKS",
        "SHAPE_ENV",
        "FSDP_TRAINING_STATE",
    }
)
"""Guards on what `shortcut.py` compares at each call."""

_UNREAD = frozenset(
    {
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    }
)
"""Dictionaries of a module that a forward call without hooks does not read."""

_ROOT = re.compile(r"L\['([^']*)'\]")
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
    """What is known of one model. Owns its graphs, and is owned by what `torch.compile` returned."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._frame: tuple[CompiledGraph, types.CodeType, weakref.ref[OutputGraph]] | None = None
        """The latest graph, the code that it is of, and what Dynamo knows of that."""
        self._hook: RemovableHandle | None = None
        self._graphs: WeakKeyDictionary[HeldGraph, CompiledGraph] = WeakKeyDictionary()
        self._paths: WeakKeyDictionary[CompiledGraph, Paths] = WeakKeyDictionary()

    def for_backend(self) -> Callable[[CompiledGraph], HeldGraph]:
        """Sees each graph, and returns what torch is to hold of it."""
        see_graph = weakref.WeakMethod(self._see_graph)
        return lambda graph: _alive(see_graph)(graph)

    def _see_graph(self, graph: CompiledGraph) -> HeldGraph:
        """What the backend made of a frame; Dynamo then makes its bytecode, and last its guards, all under a lock."""
        output = InstructionTranslator.current_tx().output
        self._frame = graph, output.root_tx.f_code, weakref.ref(output)
        self._hook = self._hook or register_bytecode_hook(self._see_bytecode)
        held = HeldGraph(graph)
        self._graphs[held] = graph
        return held

    def _see_bytecode(self, code: types.CodeType, new_code: types.CodeType) -> None:
        """Where the frame's guards look, if the code that Dynamo made calls the graph and returns what it gave.

        The guards are all known here. A `guard_filter_fn` would be told of them too, but makes Dynamo build them twice:
        1.4 s more of a first call for SSDlite, which has 6,500 (AMD EPYC Zen 3, busy).
        """
        assert self._frame is not None
        assert self._hook is not None
        (graph, compiled, reference), self._frame = self._frame, None
        self._hook.remove()
        self._hook = None
        output = reference()
        if output is None or code is not compiled or not _only_calls_graph(new_code):
            return
        paths = _paths_of(output, _alive(self._model))
        if paths is not None:
            self._paths[graph] = paths

    def read_by(self, graph: CompiledGraph, dictionaries: Mapping[int, dict[Any, Any]]) -> Reader | None:
        """What must be unchanged, beside these dictionaries of the model, for `graph` to be right; None if a change of
        what it depends on may be of neither.
        """
        paths = self._paths.get(graph)
        if paths is None:
            return None
        model = _alive(self._model)
        reader = Reader(model, dictionaries, paths.namespace)
        found = [reader.follow(model, path) for path in paths.model]
        found += [reader.follow(paths.namespace, path) for path in paths.names]
        return reader if all(map(_shows, found)) else None


class Paths(NamedTuple):
    """Where guards look: paths of ".name" and "['key']"."""

    model: set[str]
    """From the model."""
    names: set[str]
    """From `namespace`, the global names of the code that was compiled."""
    namespace: dict[str, Any]


def _only_calls_graph(code: types.CodeType) -> bool:
    """Whether code that Dynamo made calls one graph, returns what it gave, and does nothing else."""
    instructions = list(dis.get_instructions(code))
    calls = sum(i.opname.startswith("CALL") for i in instructions)
    notes = sum(str(i.argval).startswith("record_pregraph_bytecode") for i in instructions)  # for profilers
    writes = [i for i in instructions if i.opname.startswith(("STORE_", "DELETE_"))]
    return calls == 1 + notes and all(i.opname.endswith("_FAST") for i in writes)


def _paths_of(output: OutputGraph, model: torch.nn.Module) -> Paths | None:
    """None where a guard looks at what no path leads to."""
    paths = Paths(set(), set(), output.global_scope)
    for guard in output.guards:
        found = _ROOT.match(guard.name)
        path = guard.name[found.end() :] if found else ""
        if guard.name.startswith("G["):
            paths.names.add(guard.name[1:])
        elif found and output.local_scope.get(found[1], UNSEEN) is model:
            paths.model.add(path)
        elif found:
            if not _ELEMENT.fullmatch(path):  # otherwise of an argument: `shortcut._key` compares it
                return None
        elif guard.create_fn_name() not in _STATE_GUARDS and not guard.name.startswith("dict(type("):
            return None  # classes are watched with their modules
    return paths


class Reader:
    """Follows paths, and collects the names that, beside the dictionaries of the model, lead to the same.

    The dictionary of a Python module as a whole would show too much: at the top level of a script each statement that
    assigns changes one.
    """

    def __init__(
        self, model: torch.nn.Module, dictionaries: Mapping[int, dict[Any, Any]], namespace: dict[str, Any]
    ) -> None:
        self._dictionaries = dictionaries
        self.names: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        """The dictionary of a Python module, a name and its value, by the id of the dictionary and the name."""
        self._namespace = namespace
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
            if key is not None and id(value) in self._dictionaries:
                value = value.get(key, UNSEEN)
            elif key is not None:
                value = self._named(value, key) if value is self._namespace or value is builtins.__dict__ else UNSEEN
            elif isinstance(value, types.ModuleType):
                value = self._named(value.__dict__, name)
            elif id(value) in self._inside or (
                isinstance(value, types.FunctionType) and name in ("__name__", "__module__")
            ):
                slotted = isinstance(getattr_static(type(value), name, None), types.MemberDescriptorType)
                value = UNSEEN if slotted else getattr(value, name, UNSEEN)
            else:
                return UNSEEN
        return value

    def _named(self, namespace: dict[str, Any], name: str) -> Any:
        value = namespace.get(name, UNSEEN)
        self.names[id(namespace), name] = namespace, name, value
        return value


def dictionaries_of(model: torch.nn.Module) -> dict[int, dict[Any, Any]]:
    """The dictionaries of all modules, those among their attributes, and those of their classes, by their id."""
    found: list[dict[Any, Any]] = []
    for module in model.modules():
        found.append(module.__dict__)
        found += [value for name, value in module.__dict__.items() if name not in _UNREAD]
    found += map(dictionary_of, {base for module in model.modules() for base in type(module).__mro__[:-1]})
    return {id(dictionary): dictionary for dictionary in found if isinstance(dictionary, dict)}


def _shows(value: Any) -> bool:
    """Whether a change of `value` is a change of the dictionary that it was found in."""
    return all(map(_shows, value)) if isinstance(value, tuple) else isinstance(value, _UNCHANGING)
