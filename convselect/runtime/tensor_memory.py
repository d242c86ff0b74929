"""Where a tensor's address, shape and version lie in memory, so that one pass over memory sees whether any changed.

Asking torch costs 0.3 us a tensor and attribute, half a millisecond for MobileNet-v2 once a network has filled the
caches. Where the fields lie is nowhere promised, so it is found by experiment, and not used if an experiment fails.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

Range = tuple[int, int]
"""Address and bytes."""

_WORD = 8
_OBJECT_WORDS = 4
"""How many words of a tensor's Python object are read; the first two are its reference count and its type."""
_WORDS = 20
"""How many words of a `TensorImpl` are read; it is larger than this."""
_INLINE = 5
"""Sizes and strides of up to five dimensions lie in the `TensorImpl` itself."""
_SIZES_WORDS = 1 + 2 * _INLINE + 2
"""The number of dimensions, sizes, strides, storage offset, number of elements."""


@dataclass(frozen=True)
class _Offsets:
    """In bytes: in a Python object, of its `TensorImpl`; in that, of its storage, its version counter and its sizes; in
    what these point to.
    """

    inner: int
    storage: int
    version_counter: int
    sizes: int
    data_in_storage: int
    version_in_counter: int


def metadata_of(tensor: torch.Tensor) -> list[Range] | None:
    """Memory that changes whenever the tensor's address, sizes, strides or version do; None where it is not known.

    It stays mapped as long as `tensor` and `tensor.detach()` live, and `tensor` is what it was (`identity_of`).
    """
    offsets = _offsets()
    if offsets is None or tensor.dim() > _INLINE:
        return None
    inner = tensor._cdata
    ranges = [
        (inner + offsets.storage, _WORD),
        (inner + offsets.version_counter, _WORD),
        (inner + offsets.sizes, 8 * _WORD),
        (inner + offsets.sizes + 8 * _WORD, (_SIZES_WORDS - 8) * _WORD),
        (_word(inner + offsets.storage) + offsets.data_in_storage, _WORD),
    ]
    if not tensor.is_inference():
        ranges.append((_word(inner + offsets.version_counter) + offsets.version_in_counter, 4))
    return ranges


def identity_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The address of a word that lives with the Python object `tensor`, and what it holds as long as that object stands
    for the same tensor: `torch.utils.swap_tensors` gives it another. None where it is not known.
    """
    offsets = _offsets()
    return None if offsets is None else (id(tensor) + offsets.inner, tensor._cdata)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _only(found: list[int]) -> int:
    if len(found) != 1:
        raise LookupError
    return found[0] * _WORD


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def _offsets() -> _Offsets | None:
    shape, stride, offset = (3, 5, 7, 11), (4001, 503, 59, 2), 13
    tensor = torch.empty(20011, device="cpu").as_strided(shape, stride, offset)
    alias, other = tensor.detach(), torch.empty(2, 2, device="cpu")
    words, in_alias, in_other = ([_word(t._cdata + i * _WORD) for i in range(_WORDS)] for t in (tensor, alias, other))
    storage = tensor.untyped_storage()

    def where(holds: Callable[[int], bool], end: int = _WORDS) -> list[int]:
        return [i for i in range(end) if holds(i)]

    try:
        inner_at = _only([i for i in range(2, _OBJECT_WORDS) if _word(id(tensor) + i * _WORD) == tensor._cdata])
        sizes = _only(where(lambda i: words[i : i + 5] == [4, *shape]))
        at = sizes // _WORD + 1 + _INLINE
        if words[at : at + 4] != [*stride] or words[at + _INLINE : at + _INLINE + 2] != [offset, tensor.numel()]:
            raise LookupError
        storage_at = _only(where(lambda i: words[i] == storage._cdata))
        # Of the pointers before the sizes, only these two are the alias's also, and no other tensor's.
        counter_at = _only(
            where(lambda i: words[i] == in_alias[i] != in_other[i] and i * _WORD != storage_at, sizes // _WORD)
        )
        data_at = where(lambda i: _word(storage._cdata + i * _WORD) == storage.data_ptr(), 6)[0] * _WORD
        version_at = _version_in(words[counter_at // _WORD], tensor)
    except (LookupError, IndexError):
        return None
    return _Offsets(inner_at, storage_at, counter_at, sizes, data_at, version_at)


def _version_in(counter: int, tensor: torch.Tensor) -> int:
    """Where a 32-bit word in the version counter follows `tensor._version`."""
    places = {8, 12, 16, 20}
    for _ in range(5):
        tensor.zero_()
        places &= {at for at in places if ctypes.c_uint32.from_address(counter + at).value == tensor._version}
    if len(places) != 1:
        raise LookupError
    return places.pop()
