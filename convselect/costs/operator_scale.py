"""How the machine at hand scales the times of operators, from a few timings of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convselect.costs.operators import OperatorModel, OperatorTiming

Array = npt.NDArray[np.float64]

_MACHINE_STD, _KEY_STD, _NOISE_STD = 1.0, 0.55, 0.2
"""Log deviation from machine to machine, of a key beside the machine, and of a timing."""
_FACTORS = (0.25, 1.0, 3.0)
"""On the deviation of keys: the one of the greatest marginal likelihood is taken."""


class OperatorScale:
    """exp(offset of the machine + offset of the key), each with a Gaussian prior around zero, in closed form.

    trust: factor on the priors' widths.
    """

    def __init__(self, model: OperatorModel, timings: Sequence[OperatorTiming], trust: float) -> None:
        self._keys = {key: 1 + i for i, key in enumerate(dict.fromkeys(t.key for t in timings))}
        basis = self._basis([t.key for t in timings])
        ratio = np.log([t.ms / max(model.ms(t.key, t.nbytes, t.threads), 1e-6) for t in timings])
        fits = []
        for factor in _FACTORS:
            prior = (trust * np.array([_MACHINE_STD] + [_KEY_STD * factor] * len(self._keys))) ** 2
            covariance = (basis * prior) @ basis.T + _NOISE_STD**2 * np.eye(len(timings))
            weighed = np.linalg.solve(covariance, ratio)
            surprise = float(ratio @ weighed + np.linalg.slogdet(covariance)[1])
            fits.append((surprise, factor, prior * (basis.T @ weighed)))
        self._offsets: Array = min(fits)[2]

    def _basis(self, keys: Sequence[str]) -> Array:
        """f64 [n, 1 + keys timed] of ones and zeros."""
        basis = np.zeros((len(keys), 1 + len(self._keys)))
        basis[:, 0] = 1
        for row, key in enumerate(keys):
            if key in self._keys:
                basis[row, self._keys[key]] = 1
        return basis

    def scale(self, key: str) -> float:
        return math.exp(float((self._basis([key]) @ self._offsets).item()))
