"""Adaptation of a cost model to the machine at hand, from a few timings.

The deviation of log(ms) from the model is a Gaussian process over problems and primitives
(`gaussian_process.py`), whose primitives are alike by their profiles in the model. What a primitive has no timings for,
those alike and the machine still tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from convselect.costs.gaussian_process import STUDENT, Kin, Process, Rows
from convselect.costs.model import PrimitiveKey
from convselect.costs.operator_scale import OperatorScale
from convselect.costs.prior import Model
from convselect.costs.samples import Samples
from convselect.costs.tables import family_of
from convselect.problem import ConvProblem

Array = npt.NDArray[np.float64]

MEASURED_STD = 0.05
"""Log deviation of a time that was measured: a tenth of those of a calibration, timed again, are 7% off or more."""
_SPELL_STD = 0.1
"""Log deviation that the timings of one problem share."""
_ALIKE = 0.5
"""Part of the variance of a prediction that the primitives of one problem share."""
_LEAST_STD = 0.02
_TRUSTED = 0.05
"""Factor on all widths on the machine that the model was trained on."""
_LATEST = 3072
"""Timings that the model is adapted to where there are more: 0.6 s on two cores of an AMD EPYC."""


def _timed(mean: Array, variance: Array, log_ms: Array) -> tuple[Array, Array]:
    """Mean and variance of log(ms) of the primitives of one problem, f64 [C], some timed: `log_ms`, NaN where not.

    The timings of a problem lie close together, so a slow spell of the machine makes all of them slower, and what was
    not timed must not look the better for it: an error that they share says little of which is the fastest. A timing
    never errs to the fast side by much, but may to the slow side.
    """
    std, at = np.sqrt(variance), np.isfinite(log_ms)
    prior = np.outer(std, std) * (_ALIKE + (1 - _ALIKE) * np.eye(len(std)))
    y = (log_ms - mean)[at]
    shared, own = y.mean(), y - y.mean()
    spell = _SPELL_STD**2 * _tail(shared, (prior[np.ix_(at, at)] + _SPELL_STD**2).mean())
    noise = MEASURED_STD**2 * _tail(own, (1 - _ALIKE) * variance[at] + MEASURED_STD**2)
    across = prior[:, at]
    gain = across @ np.linalg.inv(across[at] + spell + np.diag(noise))
    return mean + gain @ y, variance - (gain * across).sum(axis=1)


def _tail(error: Array, variance: Array) -> Array:
    """Factor on the variance of a timing's noise: slower than predicted by so much more than is likely, it counts less.

    Student's t, one-sided.
    """
    result: Array = np.maximum(1.0, (STUDENT + np.maximum(0.0, error) ** 2 / variance) / (STUDENT + 1))
    return result


class Adapted:
    """A model corrected by `samples`.

    Args:
        trusted: the samples come from the machine that the model was trained on, so that little is to be corrected.
        families: primitive -> family for sampled primitives that the model does not know; `family_of` otherwise.
    """

    def __init__(
        self, model: Model, samples: Samples, *, trusted: bool = False, families: Mapping[str, str] | None = None
    ) -> None:
        self.model = model
        self.samples = samples = Samples().merged(samples)
        known = dict(families or {}) | dict(zip(model.primitives, model.families, strict=True))
        self._measured = {tuple(t[:3]): t.ms for t in samples.timings}
        trust = _TRUSTED if trusted else 1.0

        timings = samples.timings[-_LATEST:]
        self._sampled = list(
            dict.fromkeys((t.primitive, known.get(t.primitive) or family_of(t.primitive)) for t in timings)
        )
        where = {primitive: i for i, (primitive, _) in enumerate(self._sampled)}
        extra = self._extra(self._sampled)
        keys = {key: i for i, key in enumerate(dict.fromkeys((t.problem, t.threads) for t in timings))}
        problems = [ConvProblem.parse(text) for text, _ in keys]
        threads = np.array([count for _, count in keys], dtype=np.int64)
        mean, std = self._predicted(problems, threads)
        p = np.array([keys[t.problem, t.threads] for t in timings], dtype=np.int64)
        c = np.array([where[t.primitive] for t in timings], dtype=np.int64)
        rows = Rows(
            model.view(problems, threads),
            p,
            c,
            np.log([t.ms for t in timings]) - mean[p, c],
            np.sqrt((std[p, c] ** 2 - extra[c] ** 2).clip(min=1e-6)),
        )
        self._process = Process(rows, self._kin(self._sampled), extra, trust)
        self._operators = OperatorScale(model.operators, samples.operators, trust)

    def _extra(self, candidates: Sequence[PrimitiveKey]) -> Array:
        return np.array([self.model.prior_std(*candidate) for candidate in candidates])

    def _kin(self, candidates: Sequence[PrimitiveKey]) -> Kin:
        """`candidates` and the sampled ones; one without a profile is like itself only."""
        mine, others = self._profiles(candidates), self._profiles(self._sampled)
        apart = (mine**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * mine @ others.T
        where = {primitive: i for i, (primitive, _) in enumerate(self._sampled)}
        same = np.zeros_like(apart)
        for i, (primitive, _) in enumerate(candidates):
            if primitive in where:
                same[i, where[primitive]] = 1
        return Kin(np.where(same == 1, 1.0, np.nan_to_num(np.exp(-apart.clip(min=0)))), same)

    def _profiles(self, candidates: Sequence[PrimitiveKey]) -> Array:
        """f64 [n, K]; NaN where the model has none."""
        rows = np.full((len(candidates), self.model.profile_parts), np.nan)
        for i, candidate in enumerate(candidates):
            if (row := self.model.profile(*candidate)) is not None:
                rows[i] = row
        return rows

    def _predicted(self, problems: Sequence[ConvProblem], threads: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """The unadapted model's mean and deviation of log(ms) of the sampled primitives, f64 [n, C]."""
        mean = np.zeros((len(problems), len(self._sampled)))
        std = np.ones_like(mean)
        for count in np.unique(threads):
            at = np.nonzero(threads == count)[0].tolist()
            mean[at], std[at] = self.model.log_predict([problems[i] for i in at], self._sampled, int(count))
        return mean, std

    def log_predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[PrimitiveKey], threads: int
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log(ms), both f64 [n, len(candidates)].

        What was timed is as the prediction and the timing together make it.
        """
        mean, std = self.model.log_predict(problems, candidates, threads)
        if not mean.size:
            return mean, std
        extra = self._extra(candidates)
        std = np.sqrt((std**2 - extra**2).clip(min=0))
        deviation, variance = self._process.predict(
            self.model.view(problems, threads), std, self._kin(candidates), extra
        )
        mean = mean + deviation
        for i, text in enumerate(map(str, problems)) if self._measured else ():
            times = [self._measured.get((text, primitive, threads), math.nan) for primitive, _ in candidates]
            if np.isfinite(times).any():
                mean[i], variance[i] = _timed(mean[i], variance[i], np.log(times))
        return mean, np.sqrt(variance.clip(min=_LEAST_STD**2))

    def operator_ms(self, key: str, nbytes: float, threads: int) -> float:
        """Time of one call of the operator that reads and writes `nbytes` together."""
        return self.model.operators.ms(key, nbytes, threads) * self._operators.scale(key)
