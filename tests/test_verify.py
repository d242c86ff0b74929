"""Programs as words: a wrong one raises, and one that `convselect::verify` lets pass touches only what is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from made_up import choose
from torch import nn
from torch.nn import functional as F

import convselect
from convselect.graph.program.segment import Program, Segment
from convselect.graph.program.steps import STEPS
from convselect.runtime.compiled import run_graphs

OPS = torch.ops.convselect
HEADER = 5
"""Words before the shapes of inputs and outputs: threads, floats of the arena, inputs, outputs, steps."""
SIZE = (2, 3, 12, 13)


class Net(nn.Module):
    """Of each kind of step some, with each operand that they can have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), conv(16, 8)
        self.norm, self.last = nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.fc = nn.Conv2d(24, 24, 1), nn.Linear(24, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(self.stem(x))
        y = F.relu(self.a(y) + y)
        y = F.relu(self.norm(torch.cat([F.max_pool2d(y, 3, 1, 1), self.b(y)], 1)))
        y = self.last(y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))) + y
        return y, self.fc(F.interpolate(y, scale_factor=2).mean((2, 3)))


def conv(ic: int, oc: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ic, oc, 3, padding=1, bias=False), nn.SiLU())


@lru_cache(maxsize=1)
def real() -> Program:
    """By kernels of ours alone, whatever this machine would choose."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        choose(patch, "direct_nhwc", "depthwise_nhwc")
        fast = convselect.compile(Net().eval(), calibrate="never", strict=True)
        (run,) = run_graphs(fast, [torch.randn(SIZE)])
    nodes = [node.target for node in run.graph.module.graph.nodes]
    programs = [p for s in nodes if isinstance(s, Segment) for p in s._programs[1].values()]
    return max(programs, key=lambda program: len(program.layers))


def records(words: list[int]) -> Iterator[tuple[int, int]]:
    """Where each record begins, and how long it is."""
    at = HEADER
    for _ in range(words[2] + words[3]):
        at += 1 + 2 * words[at]
    while at < len(words):
        yield at, words[at + 1]
        at += words[at + 1]


def passes(words: list[int], constants: tuple[torch.Tensor, ...]) -> bool:
    try:
        OPS.verify(torch.tensor(words), constants)
    except RuntimeError:
        return False
    return True


class Fence:
    """Floats between two regions that must not change."""

    GUARD, PATTERN = 1024, 12345.0

    def __init__(self, floats: int, fill: float) -> None:
        self.whole = torch.full((floats + 2 * self.GUARD,), self.PATTERN)
        self.inner = self.whole[self.GUARD : self.GUARD + floats].fill_(fill)

    def intact(self) -> bool:
        return bool(
            (self.whole[: self.GUARD] == self.PATTERN).all() and (self.whole[-self.GUARD :] == self.PATTERN).all()
        )


def run_inside(words: list[int], program: Program) -> None:
    """Runs what was let pass: it may give wrong values, but only where it may write at all."""
    arena, inputs, at = Fence(words[1], 0.5), [], HEADER
    for _ in range(words[2]):
        dim = words[at]
        sizes, strides = words[at + 1 : at + 1 + dim], words[at + 1 + dim : at + 1 + 2 * dim]
        floats = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        inputs.append(torch.ones(max(floats, 0)).as_strided(sizes, strides))
        at += 1 + 2 * dim
    constants = [constant.clone() for constant in program.constants]
    OPS.run(torch.tensor(words), arena.inner, inputs, None)
    assert arena.intact()
    assert all(bool((x == 1).all()) for x in inputs)
    assert all(map(torch.equal, constants, program.constants))


def test_a_real_program_has_every_kind_of_step_and_passes() -> None:
    words = real().words.tolist()
    assert {STEPS[words[at]] for at, _ in records(words)} == set(STEPS)
    assert passes(words, real().constants)
    run_inside(words, real())


def wrong(word: int, base: int) -> Iterator[int]:
    """Values near and far from a right one; `base` is the number of the last base."""
    yield from (word + 1, word - 1, 2 * word, 2 * word + 1, 0, 1, -1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
    yield from (word + 4, word - 4, word + 64, word - 64, word + 2**20)
    yield from ((b << 48 | word & (2**48 - 1)) for b in (0, 1, 2, base, base + 1, 2**15 - 1))
    yield from ((b << 48) for b in (1, 2, base))


@pytest.mark.parametrize("kind", STEPS)
def test_each_wrong_word_raises_or_stays_inside(kind: str) -> None:
    """In the first and the last record of the kind, as those of the others differ in their numbers only."""
    program = real()
    words = program.words.tolist()
    found = [(at, length) for at, length in records(words) if STEPS[words[at]] == kind]
    raised = 0
    for at, length in {found[0], found[-1]}:
        for i in range(at, at + length):
            for value in set(wrong(words[i], 1 + words[2] + words[3])) - {words[i]}:
                if not -(2**63) <= value < 2**63:
                    continue
                changed = [*words[:i], value, *words[i + 1 :]]
                if passes(changed, program.constants):
                    assert i >= at + 2, "the kind or the length of a record"
                    run_inside(changed, program)
                else:
                    raised += 1
    assert raised > 100


def test_each_wrong_word_of_the_head_raises_or_stays_inside(set_threads: Callable[[int], None]) -> None:
    program = real()
    words = program.words.tolist()
    first = next(records(words))[0]
    for i in range(first):
        for value in {words[i] + 1, words[i] - 1, 2 * words[i], 0, -1, 2**40, 2**62} - {words[i]}:
            changed = [*words[:i], value, *words[i + 1 :]]
            if passes(changed, program.constants) and value < 2**20:  # else there is not the memory for it
                set_threads(changed[0])
                run_inside(changed, program)


@pytest.mark.parametrize("words", [0, 4, 6, 20, -1])
def test_a_program_that_ends_early_raises(words: int) -> None:
    with pytest.raises(RuntimeError, match="program"):
        OPS.verify(real().words[:words], real().constants)


def test_constants_that_are_not_there_raise() -> None:
    with pytest.raises(RuntimeError, match="is in no constant"):
        OPS.verify(real().words, [])
    for i, constant in enumerate(real().constants):  # each is read whole
        constants = list(real().constants)
        constants[i] = constant.reshape(-1)[:-1]
        with pytest.raises(RuntimeError, match=r"packed|bias|scale|shift"):
            OPS.verify(real().words, constants)


# --- each rule, by a program of one step


# --- what `run` looks at in each call


@torch.inference_mode()
def test_invalid_programs_are_refused() -> None:
    run, x = torch.ops.convselect.run, torch.zeros(1, 2, 3, 3)
    threads = torch.get_num_threads()
    arena = torch.zeros(16)
    header = [threads, 16, 1, 0, 0, 4, *x.shape, *x.stride()]
    assert run(torch.tensor(header), arena, [x], None) == []
    with pytest.raises(RuntimeError, match=f"{threads + 1} threads"):
        run(torch.tensor([threads + 1, *header[1:]]), arena, [x], None)
    with pytest.raises(RuntimeError, match="arena has 16 elements, the program needs 17"):
        run(torch.tensor([threads, 17, *header[2:]]), arena, [x], None)
    with pytest.raises(RuntimeError, match="there are 0 inputs"):
        run(torch.tensor(header), arena, [], None)
    with pytest.raises(RuntimeError, match="an input has size 4 in dimension 3, the program expects 3"):
        run(torch.tensor(header), arena, [torch.zeros(1, 2, 3, 4)], None)
    with pytest.raises(RuntimeError, match="arena has 16 elements"):
        run(torch.tensor(header), torch.zeros(32)[::2], [x], None)


@pytest.mark.parametrize("change", ["channels_last", "a slice", "expanded", "transposed"])
def test_an_input_of_other_strides_is_copied(change: str) -> None:
    """As those of a traced value are not always what ATen's operator gives: nothing is read outside of it either."""
    x = torch.randn(2, 3, 4, 5)
    given = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "a slice": lambda: torch.cat([x, x], 3)[..., :5],
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
    }[change]()
    copy = [STEPS.index("scale_shift"), 17, 1, 1, x.numel(), 0, 2 << 48, 0, 0, 0, 3 << 48, 0, 0, 0, 0, 0, 0]
    words = torch.tensor([torch.get_num_threads(), 0, 1, 1, 1, *(4, *x.shape, *x.stride()) * 2, *copy])
    torch.ops.convselect.verify(words, [])
    (got,) = torch.ops.convselect.run(words, torch.empty(0), [given], None)
    assert torch.equal(got, given)
    assert got.stride() == x.stride()
