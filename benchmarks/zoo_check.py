"""One network of the zoo in a process of its own: `python zoo_check.py results|plain|times NAME OUT` writes a row.

The zoo calls it; see zoo.py. Threads: one.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_networks import build

import convselect
from convselect import ConvselectWarning
from convselect.bench.runner import Protocol, host_ms, interleave
from convselect.runtime.compiled import recording

BATCHES = (1, 2)
"""The second makes Dynamo compile for any batch."""
LEAST_BOUND, FACTOR = 2e-5, 20.0
"""A result is wrong that errs by more than the bound, and by so many times what eager errs by."""
FOLLOWS = 1e-3
"""Where eager float32 errs by more, the network magnifies rounding (or decides by it): nothing can be told."""

DEFECT = "an error in convselect"
"""In the warning where a graph runs unconverted for that reason."""
PACKAGE = Path(convselect.__file__).parent

Row = dict[str, Any]


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def to(values: Any, dtype: torch.dtype) -> Any:
    """Copies of tensors, the floating ones of that type."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t.clone(), to_copy(values))


def to_copy(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, values)


def called(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call gives, and its arguments after it; random numbers are the same each time."""
    arguments = to_copy(inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        results = function(*arguments)
    return [t for t in tree_leaves(results) if isinstance(t, Tensor)], [
        t for t in tree_leaves(arguments) if isinstance(t, Tensor)
    ]


def error(value: Tensor, exact: Tensor) -> float:
    """Relative L2; infinite where shapes or what is not finite differ. For integers 0 or infinite: equal or not."""
    if value.shape != exact.shape:
        return float("inf")
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, exact.to(value.dtype)) else float("inf")
    finite = exact.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return float("inf")
    difference = (value.double() - exact.double())[finite].norm()
    size = exact.double()[finite].norm()
    return float(difference / size) if size > 0 else float(difference)


def worst(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    if len(values) != len(exact):
        return float("inf")
    return max(map(error, values, exact), default=0.0)


def sharing(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The pairs that share memory."""
    address = [t.untyped_storage().data_ptr() for t in tensors]
    return [(i, j) for j in range(len(address)) for i in range(j) if address[i] == address[j] != 0]


def form(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[str]:
    """Strides of each result, as text, and who shares memory: what two calls may differ in beside values."""
    strides = [f"{tuple(t.shape)} strides {t.stride()}" for t in results]
    return [*strides, f"shared {sharing([*results, *arguments])}"]


def differences(mine: Sequence[str], eager: Sequence[str]) -> list[str]:
    return [f"{a} for {b}" for a, b in zip(mine, eager, strict=False) if a != b]


def first_line(raised: BaseException) -> str:
    text = [line for line in str(raised).splitlines() if line.strip()]
    return f"{type(raised).__name__}: {text[0] if text else ''}"


def where(raised: BaseException) -> str:
    """The innermost line of the package that the exception, or one that caused it, came through."""
    found, cause = "", raised
    while cause is not None:
        for frame in traceback.extract_tb(cause.__traceback__):
            if PACKAGE in Path(frame.filename).parents:
                found = f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno} {frame.name}"
        cause = cause.__cause__ or cause.__context__
    return found


class Kept:
    """A row that is written when the block ends, also by an exception, which it then tells of."""

    def __init__(self, out: Path) -> None:
        self.row: Row = {}
        self._out = out

    def __enter__(self) -> Row:
        return self.row

    def __exit__(self, kind: object, raised: BaseException | None, traceback: object) -> None:
        if raised is not None:
            self.row |= {"raised": first_line(raised), "where": where(raised)}
        self._out.write_text(json.dumps(self.row))


def results(name: str, row: Row) -> None:
    """What `convselect.compile` gives for two batches, against eager in float64 and float32."""
    row["status"] = "eager raises"
    model, make = build(name)
    inputs = {batch: make(batch) for batch in BATCHES}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["inputs"] = [list(t.shape) for t in tree_leaves(inputs[1]) if isinstance(t, Tensor)]
    eager = {batch: called(model, inputs[batch]) for batch in BATCHES}
    with Convolutions() as counted:
        called(model, inputs[1])
    row["convolutions"] = counted.count
    exact = in_float64(model, inputs, row) or eager
    row["eager_error"] = max(worst(eager[batch][0], exact[batch][0]) for batch in BATCHES)

    row["status"] = "raises"
    errors, forms = [], []
    held: list[tuple[list[Tensor], list[Tensor]]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = convselect.compile(model, calibrate="never")
        for batch in (*BATCHES, *BATCHES):
            row["batch"] = batch
            with recording() as record:
                found, arguments = called(fast, inputs[batch])
            if not held:
                describe(row, record)
            held.append((found, to_copy(found)))
            errors.append(worst([*found, *arguments], [*exact[batch][0], *exact[batch][1]]))
            forms.append((batch, form(found, arguments)))
    row["warnings"] = sorted({str(w.message).splitlines()[0] for w in caught if w.category is ConvselectWarning})
    row["error"] = max(errors)
    row["overwritten"] = any(worst(now, then) != 0 for now, then in held)
    row["form"] = sorted({d for batch, mine in forms for d in differences(mine, form(*eager[batch]))})
    if row["form"]:
        torch._dynamo.reset()
        theirs = torch.compile(model, backend="aot_eager")
        row["form_is_torchs"] = all(mine == form(*called(theirs, inputs[batch])) for batch, mine in forms[:2])
    row["status"] = status(row)


def plain(name: str, row: Row) -> None:
    """The same calls by a backend of torch's own that compiles nothing: where it raises too, the fault is not ours."""
    model, make = build(name)
    theirs = torch.compile(model, backend="aot_eager")
    for batch in BATCHES:
        called(theirs, make(batch))


def in_float64(model: nn.Module, inputs: dict[int, Any], row: Row) -> dict[int, Any] | None:
    """The results of eager in float64; None, with the reason in the row, where the model makes float32 tensors itself.

    In place and back, which is exact: of the largest networks two copies would not fit.
    """
    try:
        return {batch: called(model.double(), to(inputs[batch], torch.float64)) for batch in inputs}
    except (RuntimeError, TypeError) as raised:
        row["float64"] = first_line(raised)
        return None
    finally:
        model.float()


def describe(row: Row, record: Sequence[Any]) -> None:
    """Graphs and convolutions of the first call."""
    row["graphs"] = len({id(run.graph) for run in record})
    layers = [layer for run in record for layer in run.graph.plan.layers]
    row["captured"] = len(layers)
    left = (next(iter(layer.refusals.values()), "") for layer in layers if layer.primitive == "aten")
    row["unconverted"] = dict(Counter(left))


def status(row: Row) -> str:
    if row["overwritten"]:
        return "wrong"
    if any(DEFECT in warning for warning in row["warnings"]):
        return "defect"
    if row["eager_error"] > FOLLOWS:
        return "chaotic"
    if row["error"] > max(LEAST_BOUND, FACTOR * row["eager_error"]):
        return "wrong"
    if row["form"] and not row["form_is_torchs"]:
        return "form"
    return "right"


def times(name: str, row: Row) -> None:
    """Seconds of first calls, and a call's time beside eager's, interleaved."""
    row["status"] = "raises"
    model, make = build(name)
    inputs = make(1)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()  # imports what a first compilation imports
    compilers: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
        "aot_eager": lambda module: torch.compile(module, backend="aot_eager"),
        "convselect": lambda module: convselect.compile(module, calibrate="never"),
    }
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(*inputs)}
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        for compiler in compilers.values():
            compiler(small)(torch.randn(1, 3, 8, 8))
        for system, compiler in compilers.items():
            torch._dynamo.reset()
            start = time.perf_counter()
            fast = compiler(model)
            fast(*inputs)
            row[f"{system}_first_s"] = time.perf_counter() - start
        calls["convselect"] = lambda: fast(*inputs)
        once = [statistics.median(host_ms(call) for _ in range(3)) for call in calls.values()]
        protocol = Protocol(rounds=9, runs=5, settle_ms=20, budget_s=20).within_budget(once)
        found = interleave(calls, protocol)
    ratios = [mine / eager for mine, eager in zip(found["convselect"], found["eager"], strict=True)]
    row["eager_ms"], row["ms"] = min(found["eager"]), min(found["convselect"])
    row["ratio"], row["ratio_median"] = row["ms"] / row["eager_ms"], statistics.median(ratios)
    row["status"] = "timed"


def main(part: str, name: str, out: str) -> None:
    torch.set_num_threads(1)
    with Kept(Path(out)) as row:
        {"results": results, "plain": plain, "times": times}[part](name, row)


if __name__ == "__main__":
    main(*sys.argv[1:])
