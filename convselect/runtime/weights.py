"""Packed weights that are current at each call: packed again when any weight has changed."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule

from convselect import streams
from convselect.graph.constants import Prepack, pack
from convselect.machine import tf32_allowed
from convselect.runtime.tensor_memory import identity_of, metadata_of

_CPU = torch.device("cpu")
Array = npt.NDArray[np.int64]


class Constants:
    """The packed weights and the biases of one plan on `device`, current with the static inputs at each call.

    On a GPU they keep their addresses, which a CUDA graph has captured. Packing again waits for what still reads them,
    on any stream, and a call waits for packing.
    """

    def __init__(self, fold: GraphModule, prepacks: Sequence[Prepack | None], device: torch.device = _CPU) -> None:
        self._fold, self._prepacks, self._device = fold, prepacks, device
        self._lock = threading.Lock()
        self._state: _State | None = None

    def current(self, statics: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The constants for these static inputs; packs again if one was replaced or written to."""
        state = self._state
        if state is None or not state.matches(statics):
            with self._lock:
                state = self._state
                if state is None or not state.matches(statics):
                    # AOTAutograd runs a first call under a mode that takes each operator through Python.
                    with torch.utils._python_dispatch._disable_current_modes():
                        self._state = state = self._packed(statics, state)
        if state.ready is not None:
            state.ready.wait()
        return state.packed

    def _packed(self, statics: Sequence[torch.Tensor], before: _State | None) -> _State:
        if self._device.type == "cpu":
            return _State(statics, partial(pack, self._fold, self._prepacks, statics))
        if streams.is_capturing():
            raise RuntimeError(
                "the weights are new or have changed since the last call, and packing them cannot be captured: "
                "call the model once before it is captured"
            )
        ready = streams.Ready(self._device)
        into = None
        if before is not None:
            streams.finish(self._device)
            before.overwritten, into = True, before.packed
        with torch.inference_mode(False):  # what is made under it could not be overwritten outside of it
            state = _State(statics, partial(pack, self._fold, self._prepacks, statics, into), ready)
        ready.record()
        return state


class _State:
    """What was packed from which tensors.

    A tensor is unchanged if it is the same object, of the same inner tensor, with the same address, shape, version and
    data. The address cannot be reused by another tensor, since an alias keeps the storage alive. The version counts
    every write that autograd sees. The data is looked at for writes that go around it (`.data`, NumPy): tensors of up
    to 8 KiB whole, and of larger ones 16 cache lines all over it, so that whatever changes all of a tensor, or more
    than a 15th of it in one run, changes a line. Cold, these lines would be most of a call's overhead; so a call looks
    at one in sixteen, at least one of each tensor, in turn, and at all only where that was not done for `_WHOLE_S`.
    Tensors made under inference mode have no version and are always read whole.

    A GPU's data is out of the host's reach: its tensors have no fingerprint, so a write there that goes around autograd
    (`.data`) is not seen. Those made under inference mode are compared with a copy, for which the host waits each time,
    except where the caller captures.
    """

    def __init__(
        self,
        statics: Sequence[torch.Tensor],
        pack: Callable[[], tuple[torch.Tensor, ...]],
        ready: streams.Ready | None = None,
    ) -> None:
        self.ready = ready
        self.overwritten = False
        """Whether a later packing has begun to write into `packed`."""
        self._tf32 = tf32_allowed()
        self._unversioned = list(filter(_only_data_tells, statics))
        self._copy = _flat(self._unversioned) if self._unversioned else None
        self._held, self._aliases = statics, [tensor.detach() for tensor in statics]
        self._identities = torch.tensor(list(filter(None, map(identity_of, statics))), dtype=torch.int64, device=_CPU)
        self._identities = self._identities.reshape(-1, 2)
        metadata = [metadata_of(tensor) for tensor in statics]
        self._asked = [t for t, known in zip(statics, metadata, strict=True) if known is None]
        self._answers = list(map(_ask, self._asked))
        rows = [row for known in metadata if known is not None for row in known]
        self._metadata = torch.tensor(rows, dtype=torch.int64, device=_CPU).reshape(-1, 2)
        on_host = [tensor for tensor in statics if tensor.device.type == "cpu"]
        whole = [_lines(tensor) for tensor in on_host if tensor.is_inference()]
        lines = [some for tensor in on_host if not tensor.is_inference() and len(some := _lines(tensor))]
        self._data = [_table(some[i % len(some) :: _TURNS] for some in lines) for i in range(_TURNS)]
        self._data += [_table(whole)] if whole else []  # which every call looks at
        self._turn, self._whole_at = 0, time.perf_counter()
        self._fingerprint = torch.ops.convselect.fingerprint(self._metadata)
        self._fingerprints = list(map(torch.ops.convselect.fingerprint, self._data))
        self.packed = pack()  # now: what another thread writes meanwhile must not pass for packed

    def matches(self, statics: Sequence[torch.Tensor]) -> bool:
        return (
            not self.overwritten
            and self._are_held(statics)
            and (self.ready is None or tf32_allowed() == self._tf32)  # a GPU's float32 weights are rounded for it
            and torch.ops.convselect.unchanged(self._identities)
            and list(map(_ask, self._asked)) == self._answers
            and torch.ops.convselect.fingerprint(self._metadata) == self._fingerprint
            # Only now: a storage that was moved (`share_memory_`, `resize_`) has given its old memory back.
            and self._has_data()
            and (self._copy is None or self._equals(self._copy))
        )

    def _are_held(self, statics: Sequence[torch.Tensor]) -> bool:
        if statics is not self._held:
            if not all(map(operator.is_, statics, self._held)):
                return False
            self._held = statics  # a shortcut brings the same list each time
        return True

    def _has_data(self) -> bool:
        now, turn = time.perf_counter(), self._turn
        whole = now - self._whole_at >= _WHOLE_S
        for i in (*(range(_TURNS) if whole else (turn,)), *range(_TURNS, len(self._data))):
            if torch.ops.convselect.fingerprint(self._data[i]) != self._fingerprints[i]:
                return False  # and again, if asked again
        if whole:
            self._whole_at = now
        else:
            self._turn = (turn + 1) % _TURNS
        return True

    def _equals(self, copy: torch.Tensor) -> bool:
        if self.ready is None or streams.is_capturing():
            return True
        self.ready.wait()
        return torch.equal(_flat(self._unversioned), copy)  # at once: the host waits


def _only_data_tells(tensor: torch.Tensor) -> bool:
    """Whether a write shows neither in a version nor to the host."""
    return tensor.device.type != "cpu" and tensor.is_inference()


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _ask(tensor: torch.Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.stride(), version


_LINE, _SMALL, _TURNS = 64, 8 * 1024, 16
_WHOLE_S = 0.1


def _lines(tensor: torch.Tensor) -> Array:
    """The (address, bytes) of the lines of its data that are looked at, int64 [n, 2]."""
    nbytes = _storage_bytes(tensor)
    if tensor.is_inference() or nbytes <= _SMALL:
        starts = np.arange(0, nbytes, _LINE)
    else:
        starts = np.arange(_TURNS) * (nbytes - _LINE) // (_TURNS - 1)
    return np.stack([tensor.data_ptr() + starts, np.minimum(nbytes - starts, _LINE)], axis=1)


def _table(rows: Iterable[Array]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty((0, 2), np.int64), *rows]))


def _storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to its last; 0 for an empty one."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
