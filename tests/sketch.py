"""Random small models as source code: drawn statement by statement, each of which eager has run before the next."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from statements import KINDS, PARAMETERS
from torch import Tensor, nn

Choose = Callable[[Sequence[Any]], Any]
"""Draws one of several, of which the first is the simplest."""

MOST_ELEMENTS = 20_000
LARGEST = 1e3
"""What exceeds these is not drawn."""

PRELUDE = """import math
import torch
import torch.nn.functional as F
from torch import nn


def weight(*sizes):
    return nn.Parameter(torch.randn(sizes) / math.sqrt(max(1, math.prod(sizes[1:]))))


def positive(*sizes):
    return nn.Parameter(torch.rand(sizes) + 0.5)
"""

TRIAL = """

import convselect

with torch.inference_mode():
    fast = convselect.compile(model, calibrate="never")
    for n, seed in {calls}:
        for got, want in zip(fast(*inputs(n, seed)), model(*inputs(n, seed)), strict=True):
            print((got - want).abs().max() if want.numel() else 0, got.shape, got.stride(), want.shape, want.stride())
"""

LAYOUTS = (
    "",
    ".to(memory_format=torch.channels_last)",
    "[:, :, :, ::2]",
    "[:, :, 1:]",
    ".transpose(2, 3)",
    ".transpose(1, 2).contiguous().transpose(1, 2)",
    "[:, :1].expand(-1, 4, -1, -1)",
)
"""What an input becomes after it has been made."""
RELATED = ("x0", "x0[:, 1:]", "x0.transpose(2, 3)", "x0.detach()", "x0[:, :, :1]")
"""Inputs that share the first one's memory."""
RESULTS = (
    "{x}",
    "{x}.flatten(1)",
    "{x}[:1]",
    "{x}.transpose(0, -1)",
    "{x}.clone()",
    "{x}.detach()",
    "{x}[..., None]",
    "{x} + 0",
)
"""What else is returned, beside the last value."""
SIZES = (4, 4, 1, 2, 3, 8, 8, 16), (8, 8, 8, 5, 1, 4, 7, 12, 12, 0), (8, 8, 8, 5, 1, 4, 6, 13)
"""Channels, height and width of an input."""
BATCHES = ((2, 3), (2, 3), (1, 2), (3, 1), (5, 2), (2, 1), (0, 2), (2, 0))


class Sketch(NamedTuple):
    """A model and its inputs, for one batch and another; it prints as a program that compares convselect with eager."""

    batches: tuple[int, int]
    source: str

    def __repr__(self) -> str:
        batch, other = self.batches
        return self.source + TRIAL.format(calls=((batch, 0), (batch, 1), (other, 2)))

    def made(self) -> tuple[nn.Module, Callable[[int, int], list[Tensor]]]:
        """The model in eval mode; its inputs, made from the batch and a seed."""
        space: dict[str, Any] = {}
        exec(self.source, space)
        return space["model"], space["inputs"]


class Rejected(Exception):
    """An expression has no meaning here: eager raises, a size depends on the batch, or values are too large."""


def sketch(choose: Choose, most_statements: int = 12) -> Sketch:
    artist = _Artist(choose)
    artist.draw_inputs()
    statements = choose(range(1, most_statements + 1))
    for _ in range(3 * statements):
        if len(artist.lines) < statements:
            artist.draw_statement()
    artist.draw_results()
    return artist.sketch()


class _Artist:
    """Draws a model. Each value is kept for two batches, which tell what of its sizes depends on the batch."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.batches = choose(BATCHES)
        torch.manual_seed(0)
        self.spaces: list[dict[str, Any]] = [{}, {}]
        exec(PRELUDE, self.spaces[0])
        self.spaces[0]["self"] = nn.Module()
        self.spaces[1] = dict(self.spaces[0])
        for space, batch in zip(self.spaces, self.batches, strict=True):
            space["n"] = batch
        self.inputs: list[str] = []
        self.attributes: dict[str, str] = {}
        self.lines: list[str] = []
        self.names: list[str] = []
        self.results = ""

    def run(self, statement: str, names: Sequence[str]) -> None:
        """Executes a statement, which assigns to `names`, for both batches; they join the values if they may."""
        try:
            for space in self.spaces:
                exec(statement, space)
        except (
            RuntimeError,
            ValueError,
            IndexError,
            TypeError,
            ArithmeticError,
            NotImplementedError,
            AttributeError,
        ) as error:
            raise Rejected from error
        for value in (space[name] for space in self.spaces for name in names):
            if value.numel() > MOST_ELEMENTS or value.dim() > 6 or value.dtype != torch.float32:
                raise Rejected
            if value.numel() and not value.abs().max() <= LARGEST:
                raise Rejected
        self.names += names

    def draw_inputs(self) -> None:
        for i in range(self.choose((1, 1, 2))):
            made = self.choose(("map", "map", "map", "map", "related" if i else "map", "tokens", "vectors"))
            c, h, w = (self.choose(sizes) for sizes in SIZES)
            if made == "map":
                statement = f"x{i} = torch.randn(n, {c}, {h}, {w}){self.choose(LAYOUTS)}"
            elif made == "related":
                statement = f"x{i} = {self.choose(RELATED)}"
            else:
                statement = f"x{i} = torch.randn(n, {f'{h}, ' if made == 'tokens' else ''}{c})"
            with contextlib.suppress(Rejected):
                self.run(statement, [f"x{i}"])
                self.inputs.append(statement)
        if not self.inputs:
            statement = "x0 = torch.randn(n, 4, 8, 8)"
            self.run(statement, ["x0"])
            self.inputs.append(statement)

    def draw_statement(self) -> None:
        kind = self.choose(_SHARES)
        x = self.pick(kind.dims)
        if x is None:
            return
        before = list(self.attributes)
        names = [f"v{len(self.lines)}{letter}" for letter in ("ab" if kind.results == 2 else ("",))]
        try:
            expression = self.choose(kind.expressions).format_map(_Fields(self, x))
            statement = f"{', '.join(names)} = {expression}"
            self.run(statement, names)
            self.lines.append(statement)
        except Rejected:
            for name in [name for name in self.attributes if name not in before]:
                del self.attributes[name]
                delattr(self.spaces[0]["self"], name)

    def draw_results(self) -> None:
        results = [self.names[-1]]
        for _ in range(self.choose((0, 0, 1, 2))):
            result = self.choose(RESULTS).format(x=self.choose(self.names[::-1]))
            with contextlib.suppress(Rejected):
                self.run(f"result = {result}", ["result"])
                self.names.pop()
                results.append(result)
        self.results = f"({', '.join(results)},)"

    def pick(self, dims: Sequence[int] = ()) -> str | None:
        """A value with one of those numbers of dimensions, of the latest; the last one more often than others."""
        fitting = [name for name in self.names[::-1] if not dims or self.spaces[0][name].dim() in dims]
        return self.choose(fitting[:1] * 3 + fitting[1:6]) if fitting else None

    def shapes(self, name: str) -> list[torch.Size]:
        return [space[name].shape for space in self.spaces]

    def size(self, name: str, dim: int) -> int:
        """Of a dimension, whatever the batch."""
        first, second = self.shapes(name)
        if not -len(first) <= dim < len(first) or first[dim] != second[dim]:
            raise Rejected
        return first[dim]

    def other(self, x: str) -> str:
        """A value to be combined with `x`: of the same sizes if there is one, else one that broadcasts."""
        same, broadcast = [], []
        for name in self.names[::-1]:
            if name != x and self.shapes(name) == self.shapes(x):
                same.append(name)
            elif _broadcasts(self.shapes(name)[0], self.shapes(x)[0]):
                broadcast.append(name)
        return self.choose(same[:3] * 2 + broadcast[:3] or [x])

    def attribute(self, expression: str) -> str:
        """The name of a new parameter, or of one that was made by the same expression."""
        same = [name for name, made in self.attributes.items() if made == expression]
        name = self.choose([f"w{len(self.attributes)}", *same])
        if name not in same:
            try:
                setattr(self.spaces[0]["self"], name, eval(expression, self.spaces[0]))
            except (RuntimeError, ValueError) as error:
                raise Rejected from error
            self.attributes[name] = expression
        return name

    def geometry(self, ic: int) -> str:
        """Of a convolution, after the number of its channels."""
        groups = self.choose([1, 1, *(g for g in (ic, 2, 4) if ic and ic % g == 0)])
        oc = groups * self.choose((4, 1, 2, 3, 8) if groups == 1 else (1, 2, 3))
        words = [str(oc), str(self.choose((1, 3, 3, 3, 2, 5, (1, 3), (3, 1), (3, 2), 7)))]
        padding = self.choose((0, 1, 1, "same", "valid", 2, (1, 0), (1,), (0, 2), 3))
        options = {
            "stride": self.choose((1, 1, 1, 2, (2, 1), (1, 2), 3)) if padding != "same" else 1,
            "padding": padding,
            "dilation": self.choose((1, 1, 1, 1, 2, (1, 2), (2,))),
            "groups": groups,
            "bias": self.choose((True, False)),
            "padding_mode": self.choose(("zeros",) * 8 + ("reflect", "replicate", "circular")),
        }
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "padding_mode": "zeros"}
        return ", ".join(words + [f"{name}={value!r}" for name, value in options.items() if value != defaults[name]])

    def sketch(self) -> Sketch:
        inputs = [f"x{i}" for i in range(len(self.inputs))]
        lines = [
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            "        torch.manual_seed(0)",
            *(f"        self.{name} = {expression}" for name, expression in self.attributes.items()),
            "",
            f"    def forward(self, {', '.join(inputs)}):",
            "        n = x0.shape[0]",
            *(f"        {line}" for line in self.lines),
            f"        return {self.results}",
            "",
            "",
            "def inputs(n, seed):",
            "    torch.manual_seed(seed)",
            *(f"    {line}" for line in self.inputs),
            f"    return [{', '.join(inputs)}]",
            "",
            "",
            "model = Model().eval()",
            "",
        ]
        return Sketch(self.batches, PRELUDE + "\n\n" + "\n".join(lines))


_SHARES = list(itertools.chain.from_iterable([kind] * kind.share for kind in KINDS.values()))


def _broadcasts(one: torch.Size, other: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(one, other)
    except RuntimeError:
        return False
    return True


class _Fields(dict[str, object]):
    """What the names in braces stand for in an expression of `x`; each is drawn once."""

    def __init__(self, artist: _Artist, x: str) -> None:
        super().__init__(x=x)
        self._artist, self._x = artist, x

    def __missing__(self, key: str) -> object:
        artist, x = self._artist, self._x
        dims = {"first": 0, "c": 1, "h": -2, "w": -1}
        if key in dims:
            value: object = artist.size(x, dims[key])
        elif key == "y":
            value = artist.other(x)
        elif key == "o":
            value = artist.choose((4, 1, 2, 3, 8, 16))
        elif key == "k":
            value = artist.choose((1, 3, 2, 5))
        elif key == "geometry":
            value = artist.geometry(artist.size(x, 1))
        else:
            value = artist.attribute(PARAMETERS[key].format_map(self))
        self[key] = value
        return value
