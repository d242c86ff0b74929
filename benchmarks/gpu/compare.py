"""Networks on a GPU: convselect, cuDNN in eager mode and Inductor, interleaved, timed by events, outputs compared."""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from worker import caught

from convselect.bench.runner import event_ms, reference, rel_l2
from convselect.errors import ConvselectWarning

Call = Callable[[torch.Tensor], Any]
Found = dict[str, Any]
OURS = "convselect"
SYSTEMS = (OURS, "eager", "inductor")
LABELS = {OURS: "convselect", "eager": "cuDNN", "inductor": "Inductor"}
PRECISIONS = {"float16": torch.float16, "tf32": torch.float32}
MOST_ERROR, ALLOWED = 3.0, 5e-3
"""Of a system's rel-L2 error against float64: where it is beyond so many times eager's own and beyond the second, which
is about what 10 bits (float16, TF32) leave of a network's output by any algorithm, the system has no times.
"""
INTERVAL_MS = 5.0
"""What one reading of the clock covers at least, so that starting it is nothing beside the calls."""
MOST_RUNS = 50


class Clock(Protocol):
    """What timing asks of CUDA."""

    device: torch.device

    def synchronize(self) -> None: ...

    def elapsed_ms(self, run: Callable[[], object]) -> float:
        """Of what `run` puts on the current stream."""


class Events:
    """Of a GPU that is there."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def elapsed_ms(self, run: Callable[[], object]) -> float:
        return event_ms(run)


class Job(NamedTuple):
    """One network in one setting; `precision` is a key of `PRECISIONS`."""

    network: str
    batch: int
    precision: str


def allow_tf32() -> None:
    """By torch's older switches: Inductor reads them, and torch refuses that where only the newer ones were set."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def prepare(system: str, model: nn.Module) -> Call:
    """What a user would call; each has its best settings. Compiles nothing yet."""
    if system == OURS:
        import convselect

        return convselect.compile(model)
    if system == "inductor":
        from torch._inductor import list_mode_options

        # Freezing folds batch norms, as ours does.
        return torch.compile(model, options={**list_mode_options("max-autotune"), "freezing": True})
    return model


def plan_of(call: Call, x: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """With the time of each layer; or, if it cannot be had, the error: no times are lost for that."""
    import convselect

    try:
        plan: dict[str, Any] = json.loads(convselect.explain(call, x).to_json())
        return plan
    except Exception:
        return caught(device)


def compare(
    model: nn.Module,
    x: torch.Tensor,
    job: Job,
    systems: Sequence[str],
    clock: Clock,
    note: Callable[..., None] = lambda **what: None,
    rounds: int = 9,
) -> dict[str, Found]:
    """System -> {"median_ms", "min_ms", "all_ms", "runs", "rel_l2", "first_s"}, or {"absent"} and what there is.

    `model` and `x` as float32 on the CPU. All in channels_last, under inference_mode; `first_s` is the host's time from
    a model in memory to the first result. The float64 reference has the same rounded weights and input. What raises is
    absent, with its "traceback", unless it is eager. Ours also has "plan" and "warnings", if there were any.
    """
    dtype = PRECISIONS[job.precision]
    model = copy.deepcopy(model).to(clock.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(clock.device, dtype, memory_format=torch.channels_last)
    note(**job._asdict(), system="float64")
    torch.backends.cudnn.benchmark = False
    exact = reference(model, x)
    torch.backends.cudnn.benchmark = True
    calls: dict[str, Call] = {}
    runs: dict[str, int] = {}
    found: dict[str, Found] = {}
    with torch.inference_mode():
        for system in sorted(systems, key=lambda name: name != "eager"):  # whose error is the measure
            note(**job._asdict(), system=system)
            found[system] = {}
            try:
                call = _first_call(system, model, x, exact, clock, found[system])
                limit = max(MOST_ERROR * found["eager"]["rel_l2"], ALLOWED)
                if not (error := found[system]["rel_l2"]) <= limit:
                    found[system]["absent"] = f"its error is {error:.1e}, at most {limit:.1e} was expected"
                    continue
                runs[system] = runs_of(call, x, clock)
                calls[system] = call
            except Exception:  # whatever it is: the traceback is kept, and the others are timed
                if system == "eager":
                    raise
                failure = caught(clock.device)
                found[system] |= {"absent": failure["error"], "traceback": failure["traceback"]}
        del exact
        note(**job._asdict(), system="times")
        for system, ms in interleaved(calls, x, runs, clock, rounds).items():
            found[system] |= {"median_ms": statistics.median(ms), "min_ms": min(ms), "all_ms": ms, "runs": runs[system]}
    if OURS in calls:
        note(**job._asdict(), system="plan")
        found[OURS]["plan"] = plan_of(calls[OURS], x, clock.device)
    torch.compiler.reset()
    return found


def _first_call(
    system: str, model: nn.Module, x: torch.Tensor, exact: torch.Tensor, clock: Clock, found: Found
) -> Call:
    """What `system` made of a copy of `model`; `found` gets how long it took, and how far it errs."""
    with torch.inference_mode(False):  # a copy made under it has weights without versions, which are compared each call
        own = copy.deepcopy(model)
    clock.synchronize()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call = prepare(system, own)
        y = call(x)
        clock.synchronize()
    found |= {"first_s": time.perf_counter() - start, "rel_l2": rel_l2(y, exact)}
    if ours := [str(w.message) for w in told if issubclass(w.category, ConvselectWarning)]:
        found["warnings"] = ours
    return call


def runs_of(call: Call, x: torch.Tensor, clock: Clock) -> int:
    """How often a reading of the clock is to run it."""
    for _ in range(3):  # CUDA graphs are recorded in the second or third run
        call(x)
    once = min(clock.elapsed_ms(lambda: call(x)) for _ in range(3))
    return max(1, min(MOST_RUNS, round(INTERVAL_MS / max(once, 1e-3))))


def interleaved(
    calls: Mapping[str, Call], x: torch.Tensor, runs: Mapping[str, int], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of one run in each round."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for step in range(len(names)):
            name = names[(number + step) % len(names)]
            calls[name](x)

            def several(call: Call = calls[name], count: int = runs[name]) -> None:
                for _ in range(count):
                    call(x)

            times[name].append(clock.elapsed_ms(several) / runs[name])
    return times
