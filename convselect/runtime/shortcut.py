"""What `convselect.compile` returns: calls that need no guards run a graph at once, when nothing has changed.

Dynamo decides by thousands of guards, at each call, whether compiled code still fits a module; after a network has
filled the caches that takes 0.7 ms for MobileNet-v2, a fifth of its time. Nearly all of them look at attributes of
modules and at names of Python modules, all of which live in dictionaries, whose changes CPython counts (`changes.py`).
So a call through Dynamo is remembered with the state of the model (`model_state.py`) and with the values of the names
that its guards read, and a later call with the same kind of inputs that finds all of them unchanged runs the same
graph. Any change whatever sends the call through Dynamo again, which decides as it would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import GlobalStateGuard
from torch._dynamo.eval_frame import DynamoStance, OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils import _pytree as pytree

import convselect.kernels  # noqa: F401  (loads the operators)
from convselect.errors import UnconvertedError
from convselect.runtime.changes import missing
from convselect.runtime.compiled import Run, recording
from convselect.runtime.model_state import ModelState
from convselect.runtime.watcher import PLAIN, UNSEEN, Reader, Watcher

_ORDINARY = DynamoStance()


class Shortcut:
    """One remembered call: its graph, and where the call's arguments go and its results come from.

    Attributes:
        confirmed: whether a later call through Dynamo ran that graph with nothing changed before, after or meanwhile.
            Until then another thread's change may have been overlooked: what guards read is known after the call only.
    """

    def __init__(
        self, run: Run, leaves: Sequence[torch.Tensor], result: Any, state: ModelState, reader: Reader
    ) -> None:
        """Raises `ValueError` where the graph's inputs and results are not the call's own."""
        self._run = run.graph.run
        place = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._given = [(i, place[id(value)]) for i, value in enumerate(run.rest) if id(value) in place]
        self._statics = run.statics
        self._rest = [None if id(value) in place else value for value in run.rest]
        self._state, self._names = state, list(reader.names.values())
        held = {id(value) for dictionary in state.dictionaries.values() for value in dictionary.values()}
        held |= {id(value) for _, _, value in self._names}
        if not all(arg is None or type(arg) is int or id(arg) in held for arg in (*self._statics, *self._rest)):
            raise ValueError("an input of the graph is neither an argument nor held by a module")
        made, self._structure = pytree.tree_flatten(result)
        results = {id(value): i for i, value in enumerate(run.results)}
        if [type(value) for value in made] != [torch.Tensor] * len(run.results) or {*map(id, made)} != results.keys():
            raise ValueError("the results are not the graph's")
        self._results = [results[id(value)] for value in made]
        self._global = GlobalStateGuard()
        self._autocast = torch._C._is_any_autocast_enabled()
        self.calls, self.wasted, self.confirmed = 0, 0, False

    def changes(self) -> int:
        return self._state.changes()

    def confirm(self, ran: Sequence[Run], changes: int) -> bool:
        """Whether it is, after a call through Dynamo that `ran` these graphs, before which it was current, and there
        had been so many changes.
        """
        same = len(ran) == 1 and ran[0].graph.run == self._run
        self.confirmed = same and self.changes() == changes and self.is_current()
        return self.confirmed

    def is_current(self) -> bool:
        return (
            self._state.is_current()
            and self._global.check()
            and all(namespace.get(name, UNSEEN) is value for namespace, name, value in self._names)
        )

    def __call__(self, leaves: Sequence[torch.Tensor]) -> Any:
        self.calls += 1
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


def _is_ordinary() -> bool:
    """Whether nothing of the process or the calling thread makes a call more than a call of the compiled code.

    Modes, default devices among them, transforms, hooks on all modules, a stance: each has a state of its own, which
    Dynamo's guards may read, and most run code around the compiled.
    """
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.get_dynamic_layer_stack_depth()
        or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or torch._dynamo.eval_frame._stance != _ORDINARY
    )


def _collect(value: Any, parts: list[Any], leaves: list[Any]) -> bool:
    """Adds to `parts` what Dynamo's guards on an argument can depend on, and to `leaves` the tensors in it.

    False where it is not plain tensors and numbers, or tuples, lists and dictionaries of them.
    """
    kind = type(value)
    if kind is torch.Tensor:
        keys = torch._C._dispatch_keys(value).raw_repr()
        parts += (value.shape, value.stride(), value.dtype, value.requires_grad, keys, value.get_device())
        leaves.append(value)
        return True
    if kind in PLAIN:
        parts += (kind, value)
        return True
    if kind in (tuple, list):
        parts += (kind, len(value))
    elif kind is dict and all(type(key) in PLAIN for key in value):
        parts += (kind, *value)
        value = value.values()
    else:
        return False
    for each in value:  # a generator for `all` would take as long as the rest
        if not _collect(each, parts, leaves):
            break
    else:
        return True
    return False


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[torch.Tensor]] | None:
    """What guards on the arguments can depend on, and the tensors among them, no two of which are the same."""
    parts: list[Any] = []
    leaves: list[torch.Tensor] = []
    if not _collect(args, parts, leaves) or (kwargs and not _collect(kwargs, parts, leaves)):
        return None
    return None if len(leaves) > 1 and len(set(map(id, leaves))) < len(leaves) else (parts, leaves)


class Shortcuts:
    """The remembered calls of one compiled model."""

    MOST = 64
    WORTH, PATIENCE = 32, 3
    """A shortcut that a change ends before so many calls was wasted: learning takes what about as many of them save.
    After so many wasted in a row none is made.
    """

    def __init__(self, watcher: Watcher, model: torch.nn.Module) -> None:
        self._watcher, self._model = watcher, model
        self._state: ModelState | None = None
        self._known: dict[tuple[Any, ...], Shortcut | int | None] = {}
        """How many were wasted where there is none at present; None for a call that is to have none."""

    def call(self, guarded: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`guarded(*args, **kwargs)`, the call through Dynamo, or the graph that it ran the last time."""
        found = _key(args, kwargs) if _is_ordinary() and not _has_hooks(self._model) else None
        if found is None:
            return guarded(*args, **kwargs)
        parts, leaves = found
        # What has no shortcut with gradients, or in training, may have one without.
        key = (*parts, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self._model.training)
        known = self._known.get(key, 0)
        if known is None:
            return guarded(*args, **kwargs)
        shortcut = known if isinstance(known, Shortcut) else None
        current = shortcut is not None and shortcut.is_current()
        if shortcut is not None and current and shortcut.confirmed:
            return shortcut(leaves)
        changes = shortcut.changes() if shortcut is not None else 0
        with recording() as ran:
            result = guarded(*args, **kwargs)
        if shortcut is None or not current or not shortcut.confirm(ran, changes):
            if len(self._known) >= self.MOST:
                self._known.clear()
            self._known[key] = self._learn(leaves, ran, result, self._wasted(known))
        return result

    def _wasted(self, known: Shortcut | int) -> int:
        """How many shortcuts were, a present one among them, which a change has ended."""
        if not isinstance(known, Shortcut):
            return known
        return known.wasted + 1 if known.calls < self.WORTH else 0

    def _learn(self, leaves: Sequence[torch.Tensor], ran: Sequence[Run], result: Any, wasted: int) -> Shortcut | None:
        """What is known of such a call after one that went through Dynamo."""
        reader = None
        if len(ran) == 1 and wasted < self.PATIENCE:
            state = self._present_state()
            reader = self._watcher.read_by(ran[0].graph, state.dictionaries)
        if reader is None:
            return None
        try:
            shortcut = Shortcut(ran[0], leaves, result, state, reader)
        except ValueError:
            return None
        shortcut.wasted = wasted
        return shortcut

    def _present_state(self) -> ModelState:
        if self._state is None or not self._state.is_current():
            # What was learnt in another state, and is of no more use, would keep all of that alive.
            for key, known in [*self._known.items()]:
                self._known[key] = self._wasted(known) if isinstance(known, Shortcut) else known
            self._state = ModelState(self._model)
        return self._state


class CompiledModule(OptimizedModule):
    """What `torch.compile` makes of a module, with shortcuts, and with our errors as we raised them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of another model, or exported: as Dynamo takes torch's own class
            model: Any = self._modules["_orig_mod"]  # Dynamo does not trace the `__getattr__` of its class
            return model(*args, **kwargs)
        shortcuts = self.__dict__.get("_shortcuts")
        try:
            if shortcuts is None or _has_hooks(self):
                return super().__call__(*args, **kwargs)
            return shortcuts.call(super().__call__, args, kwargs)
        except BackendCompilerFailed as failed:  # Dynamo's, around whatever a backend raises
            if isinstance(failed.inner_exception, (UnconvertedError, ValueError)):
                raise failed.inner_exception from None
            raise

    def __reduce__(self) -> tuple[Any, Any]:
        """A copy is compiled for itself: what torch made knows this model's watcher, and graphs are no copies."""
        return self.__dict__["_again"], (self._orig_mod,)


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def as_compiled(
    compiled: Callable[..., Any], model: torch.nn.Module, watcher: Watcher, again: Callable[..., Any]
) -> Callable[..., Any]:
    """`compiled`, what `torch.compile` made of `model`, as a `CompiledModule`; `again` compiles a copy of `model`."""
    if type(compiled) is OptimizedModule:
        compiled.__class__ = CompiledModule
        compiled.__dict__["_again"] = again
        compiled.__dict__["_watcher"] = watcher  # which nothing else keeps alive
        if missing() is None:
            compiled.__dict__["_shortcuts"] = Shortcuts(watcher, model)
    return compiled
