"""Which problems to sample: one after another, each that which tells most about all that could be sampled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from convselect.costs.gaussian_process import matern
from convselect.costs.model import CostModel
from convselect.costs.tables import Profile

_POOL = 1500
"""Problems considered, a random part where there are more."""
_LENGTH, _NOISE = 0.6, 0.3
"""Length scale and noise of the covariance that samples are chosen by, 1 + matern; results change little by either."""


def choose(model: CostModel, profile: Profile, count: int, seed: int) -> npt.NDArray[np.int64]:
    """`count` rows of `profile`, in order. Only its problems and what can run them are looked at, not its times.

    Greedy A-optimal design: each takes away the most variance, summed over the timings of all problems.
    """
    pool = np.random.default_rng(seed).permutation(len(profile))[: max(_POOL, count)]
    x = np.concatenate([model.view([profile.problems[i]], int(profile.threads[i])) for i in pool])
    weight = np.isfinite(profile.ms[pool]).sum(axis=1)
    covariance = 1 + matern(x, x, _LENGTH)[0]
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        gain = weight @ covariance**2 / (np.diag(covariance) + _NOISE)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        column = covariance[:, best]
        covariance = covariance - np.outer(column, column) / (column[best] + _NOISE)
    return pool[chosen]
