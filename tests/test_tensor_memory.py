"""What `metadata_of` names must change with a tensor's address, sizes, strides and version, and with nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from convselect.runtime.tensor_memory import Range, metadata_of


def ranges_of(tensor: torch.Tensor) -> list[Range]:
    ranges = metadata_of(tensor)
    assert ranges is not None, "this torch keeps its tensors otherwise: the check of weights is slower than it could be"
    return ranges


def read(ranges: list[Range]) -> list[bytes]:
    return [ctypes.string_at(address, nbytes) for address, nbytes in ranges]


def tensor() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(64.0).reshape(2, 4, 2, 4), requires_grad=False)


def give(made: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], None]:
    def change(t: torch.Tensor) -> None:
        t.data = made(t.data)

    return change


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "write": lambda t: t.add_(1),
    "write_to_alias": lambda t: t.detach().view(-1)[3:].zero_(),
    "other_memory": give(torch.clone),
    "other_strides": give(lambda t: t.transpose(1, 3)),
    "other_sizes": give(lambda t: t.flatten(2)),
    "other_offset": give(lambda t: t[1:]),
    "resized_storage": lambda t: t.untyped_storage().resize_(4096),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_shows(change: str, mode: Callable[[], torch.no_grad]) -> None:
    t = tensor()
    alias, ranges = t.detach(), ranges_of(t)  # the alias keeps what is read mapped
    before = read(ranges)
    with mode():
        CHANGES[change](t)
    assert read(ranges) != before
    del alias


@torch.no_grad()
def test_what_is_read_stays_the_same_otherwise() -> None:
    t = tensor()
    ranges = ranges_of(t)
    before = read(ranges)
    t.requires_grad_(True).requires_grad_(False)
    t.grad = torch.ones_like(t)
    t.note = "an attribute"  # type: ignore[attr-defined]
    torch.nn.Conv2d(4, 2, (2, 4))(t.data)
    weight_of = torch.nn.Module()
    weight_of.register_parameter("weight", t)
    assert read(ranges) == before


def test_dimensions_beyond_five_are_not_known() -> None:
    assert metadata_of(torch.zeros(1, 1, 1, 1, 1, 1)) is None
