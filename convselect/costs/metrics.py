"""How good a cost model is: the error of its predictions, and what its choices cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TWO_SIDED_90 = 1.645
"""Standard deviations to either side that hold 90% of a normal distribution."""


class Quality(NamedTuple):
    """`mdrae`: median of |predicted - measured| / measured.

    `slowdown_total`: time of the primitives chosen / of the fastest ones, summed over the problems;
    `slowdown_geomean`: the geometric mean of that ratio over the problems.
    """

    mdrae: float
    slowdown_total: float
    slowdown_geomean: float


def mdrae(predicted: Array, measured: Array) -> float:
    """Median relative absolute error over the finite entries of `measured`; NaN where there are none."""
    known = np.isfinite(measured)
    if not known.any():
        return float("nan")
    return float(np.median(np.abs(predicted[known] / measured[known] - 1)))


def quality(predicted: Array, measured: Array) -> Quality:
    """How well `predicted` fits `measured`, both ms [n, primitives]; NaN in `measured`: the primitive was not timed."""
    known = np.isfinite(measured)
    rows = known.any(axis=1)
    predicted, measured, known = predicted[rows], measured[rows], known[rows]
    if not len(measured):
        return Quality(float("nan"), float("nan"), float("nan"))
    chosen = np.where(known, predicted, np.inf).argmin(axis=1)
    paid = measured[np.arange(len(measured)), chosen]
    best = np.nanmin(measured, axis=1)
    return Quality(
        mdrae(predicted, measured), float(paid.sum() / best.sum()), float(np.exp(np.log(paid / best).mean()))
    )
