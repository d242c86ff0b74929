"""Networks on a GPU: convselect, cuDNN in eager mode and Inductor, interleaved, timed by events, outputs compared."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from convselect.bench.runner import reference, rel_l2

Call = Callable[[torch.Tensor], Any]
OURS = "convselect"
SYSTEMS = (OURS, "eager", "inductor")
LABELS = {OURS: "convselect", "eager": "cuDNN", "inductor": "Inductor"}
MOST_ERROR = 3.0
"""Of a system's rel-L2 error over eager's own, against float64; beyond, it has no times."""
INTERVAL_MS = 5.0
"""What one reading of the clock covers at least, so that starting it is nothing beside the calls."""
MOST_RUNS = 50
PRECISIONS = {"float16": torch.float16, "tf32": torch.float32}


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
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


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
        return torch.compile(model, mode="max-autotune")
    return model


def compare(
    model: nn.Module, x: torch.Tensor, job: Job, systems: Sequence[str], clock: Clock,
    note: Callable[..., None] = lambda **what: None, rounds: int = 9,
) -> dict[str, dict[str, float | int | str]]:  # fmt: skip
    """System -> {"median_ms", "min_ms", "rounds", "runs", "rel_l2", "first_s"}, or {"absent", "rel_l2"}.

    `model` and `x` as float32 on the CPU. All in channels_last, under inference_mode; `first_s` is the host's time from
    a model in memory to the first result. The float64 reference has the same rounded weights and input.
    """
    dtype = PRECISIONS[job.precision]
    model = copy.deepcopy(model).to(clock.device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(clock.device, dtype, memory_format=torch.channels_last)
    note(**job._asdict(), system="float64")
    torch.backends.cudnn.benchmark = False
    exact = reference(model, x)
    torch.backends.cudnn.benchmark = True
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, float | int | str]] = {}
    with torch.inference_mode():
        for system in sorted(systems, key=lambda name: name != "eager"):  # whose error is the measure
            note(**job._asdict(), system=system)
            own = copy.deepcopy(model)
            clock.synchronize()
            start = time.perf_counter()
            call = prepare(system, own)
            y = call(x)
            clock.synchronize()
            found[system] = {"first_s": time.perf_counter() - start, "rel_l2": rel_l2(y, exact)}
            limit = MOST_ERROR * float(found["eager"]["rel_l2"])
            if not float(found[system]["rel_l2"]) <= limit:
                found[system]["absent"] = (
                    f"its error is {found[system]['rel_l2']:.1e}, at most {limit:.1e} was expected"
                )
                continue
            calls[system] = lambda call=call: call(x)  # type: ignore[misc]
        del exact, y
        times = interleaved(calls, clock, rounds)
    for system, (runs, ms) in times.items():
        found[system] |= {"median_ms": statistics.median(ms), "min_ms": min(ms), "rounds": rounds, "runs": runs}
    torch.compiler.reset()
    return found


def interleaved(calls: dict[str, Callable[[], Any]], clock: Clock, rounds: int) -> dict[str, tuple[int, list[float]]]:
    """Call -> how often it runs in a reading of the clock, and milliseconds of one run in each round."""
    runs = {}
    for name, call in calls.items():
        for _ in range(3):  # CUDA graphs are recorded in the second or third run
            call()
        once = min(clock.elapsed_ms(call) for _ in range(3))
        runs[name] = max(1, min(MOST_RUNS, round(INTERVAL_MS / max(once, 1e-3))))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for step in range(len(names)):
            name = names[(number + step) % len(names)]
            calls[name]()

            def several(call: Callable[[], Any] = calls[name], count: int = runs[name]) -> None:
                for _ in range(count):
                    call()

            times[name].append(clock.elapsed_ms(several) / runs[name])
    return {name: (runs[name], times[name]) for name in names}
