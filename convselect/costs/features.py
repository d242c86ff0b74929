"""What the cost network sees of a problem, and the analytic prior that it corrects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convselect.problem import DIMENSIONS, ConvProblem

PEAK_GFLOPS = 100.0
"""Peak of one thread in the analytic prior. Only its ratio to the bandwidth matters: the network learns the rest."""
BANDWIDTH_GB_S = 10.0
"""Bandwidth of one thread in the analytic prior."""
CALL_MS = 0.004
"""Fixed cost of a call, in the analytic prior."""

_TILES = (
    ("oc", 16),
    ("oc", 64),
    ("ic", 16),
    ("rows", 6),
    ("rows", 8),
    ("rows", 48),
    ("oh", 2),
    ("ow", 2),
    ("oh", 4),
    ("ow", 4),
    ("oh", 6),
    ("ow", 6),
    ("ow", 8),
    ("ow", 16),
)
"""(quantity, tile): the network sees which part of the rounded-up quantity is work."""

_LOGS = (
    "mb",
    "g",
    "ic",
    "oc",
    "ih",
    "iw",
    "oh",
    "ow",
    "kh",
    "kw",
    "sh",
    "sw",
    "dh",
    "dw",
    "flops",
    "src",
    "dst",
    "weight",
    "patches",
    "rows",
    "depth",
    "columns",
    "intensity",
    "threads",
)

FEATURES: tuple[str, ...] = (
    *(f"log_{name}" for name in _LOGS),
    "ph",
    "pw",
    "depthwise",
    "grouped",
    "pointwise",
    "kernel3",
    "kernel5",
    "strided",
    "dilated",
    *(f"fill_{name}_{tile}" for name, tile in _TILES),
)
"""Names of the columns of `features`."""

Array = npt.NDArray[np.float64]


def _quantities(problems: Sequence[ConvProblem], threads: int | npt.NDArray[np.int64]) -> dict[str, Array]:
    """Columns f64 [n]. `rows` x `depth` x `columns` is the GEMM of one group: pixels, K, output channels."""
    table = np.array([[getattr(p, name) for name in DIMENSIONS] for p in problems], dtype=np.float64)
    q = dict(zip(DIMENSIONS, table.reshape(-1, len(DIMENSIONS)).T, strict=True))
    q["oh"] = (q["ih"] + 2 * q["ph"] - q["dh"] * (q["kh"] - 1) - 1) // q["sh"] + 1
    q["ow"] = (q["iw"] + 2 * q["pw"] - q["dw"] * (q["kw"] - 1) - 1) // q["sw"] + 1
    q["rows"] = q["mb"] * q["oh"] * q["ow"]
    q["depth"] = q["ic"] / q["g"] * q["kh"] * q["kw"]
    q["columns"] = q["oc"] / q["g"]
    q["flops"] = 2 * q["rows"] * q["depth"] * q["oc"]
    q["src"] = 4 * q["mb"] * q["ic"] * q["ih"] * q["iw"]
    q["dst"] = 4 * q["rows"] * q["oc"]
    q["weight"] = 4 * q["depth"] * q["oc"]
    q["patches"] = 4 * q["rows"] * q["depth"] * q["g"]
    q["intensity"] = q["flops"] / (q["src"] + q["dst"] + q["weight"])
    q["threads"] = np.broadcast_to(np.asarray(threads, dtype=np.float64), q["mb"].shape)
    return q


def _floor_ms(q: dict[str, Array]) -> Array:
    moved = q["src"] + q["dst"] + q["weight"]
    ms: Array = (q["flops"] / PEAK_GFLOPS + moved / BANDWIDTH_GB_S) / 1e6 / q["threads"] + CALL_MS
    return ms


def floor_ms(problems: Sequence[ConvProblem], threads: int | npt.NDArray[np.int64]) -> Array:
    """The analytic prior: FLOPs / peak + bytes / bandwidth + a call. Milliseconds, f64 [n]."""
    return _floor_ms(_quantities(problems, threads))


def features(problems: Sequence[ConvProblem], threads: int | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """f32 [n, len(FEATURES)], not normalised; `threads` for all problems alike, or one for each [n]."""
    return describe(problems, threads)[0]


def describe(
    problems: Sequence[ConvProblem], threads: int | npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], Array]:
    """`features` and `floor_ms` in one pass: f32 [n, len(FEATURES)] and f64 [n]."""
    q = _quantities(problems, threads)
    columns = [np.log2(q[name]) for name in _LOGS]
    columns += [
        q["ph"],
        q["pw"],
        (q["g"] > 1) & (q["g"] == q["ic"]) & (q["g"] == q["oc"]),
        q["g"] > 1,
        (q["kh"] == 1) & (q["kw"] == 1),
        (q["kh"] == 3) & (q["kw"] == 3),
        (q["kh"] == 5) & (q["kw"] == 5),
        (q["sh"] > 1) | (q["sw"] > 1),
        (q["dh"] > 1) | (q["dw"] > 1),
    ]
    columns += [q[name] / (np.ceil(q[name] / tile) * tile) for name, tile in _TILES]
    return np.stack(columns, axis=1).astype(np.float32), _floor_ms(q)
