"""Adaptation of a cost model to the machine at hand, from a few timings.

The correction of log(ms) is linear and hierarchical: an offset, and a slope on log FLOPs, for the whole machine, for
each family and for each primitive, each with a Gaussian prior around zero (Bayesian ridge regression, in closed
form). What a primitive has no timings for, its family and the machine still tell. The widths of the priors and the
noise are those of the greatest marginal likelihood, on a small grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from convselect.costs.features import FEATURES
from convselect.costs.network import Candidate, CostModel
from convselect.costs.operators import OperatorTiming
from convselect.costs.samples import Samples
from convselect.costs.tables import family_of
from convselect.problem import ConvProblem

Array = npt.NDArray[np.float64]

MEASURED_STD = 0.02
"""Log deviation of a time that was measured."""
TWO_SIDED_90 = 1.645
"""Standard deviations to either side that hold 90% of a normal distribution."""

_GLOBAL_STD, _FAMILY_STD, _PRIMITIVE_STD = 1.0, 0.4, 0.25
"""Widths of the offsets' priors, before the grid's factor."""
_FACTORS = (0.25, 1.0, 3.0)
_SLOPES = (0.05, 0.35)
"""Width of a slope, for one standard deviation of log FLOPs, relative to that of its offset."""
_NOISES = (0.01, 0.03, 0.08, 0.2, 0.4)
_TRUSTED = 0.05
"""Factor on all widths on the machine that the model was trained on."""
_STUDENT = 4.0
"""Degrees of freedom of the noise: a descheduled thread must not move the rest."""
_STUDENT_ROUNDS = 3


class _Ridge:
    """y = basis @ w + noise, w ~ N(0, diag(prior)), noise of i ~ N(0, variance[i] + extra^2).

    `extra`, of `extras`, and then `prior`, of `priors`, are those of the greatest marginal likelihood.
    """

    def __init__(
        self, basis: Array, y: Array, variance: Array, priors: Sequence[Array], extras: Sequence[float]
    ) -> None:
        def surprise(prior: Array, extra: float) -> float:
            return self._surprise(basis, y, variance + extra**2, prior)

        self.extra = min(extras, key=lambda extra: surprise(priors[len(priors) // 2], extra))
        self.prior = min(priors, key=lambda prior: surprise(prior, self.extra))
        noise = variance + self.extra**2
        self.mean = np.zeros(basis.shape[1])
        weighed = noise
        for _ in range(_STUDENT_ROUNDS):
            gram, moment = self._normal(basis, y, weighed)
            self.covariance = np.linalg.inv(gram + np.diag(1 / self.prior))
            self.mean = self.covariance @ moment
            rest = (y - basis @ self.mean) ** 2 / noise
            weighed = noise * np.maximum(1, (_STUDENT + rest) / (_STUDENT + 1))

    @classmethod
    def _surprise(cls, basis: Array, y: Array, noise: Array, prior: Array) -> float:
        """-2 log of the marginal likelihood but for a constant: y' N^-1 y - b' P^-1 b + log|N| + log|prior| + log|P|.

        b = basis' N^-1 y and P = basis' N^-1 basis + prior^-1. One Cholesky factor of [[P, b], [b', c]] gives both
        quadratic form and determinant: its last row is L^-1 b, the rest of its diagonal is P's.
        """
        gram, moment = cls._normal(basis, y, noise)
        total = float((y**2 / noise).sum())
        d = len(prior)
        bordered = np.empty((d + 1, d + 1))
        bordered[:d, :d] = gram + np.diag(1 / prior)
        bordered[d, :d] = bordered[:d, d] = moment
        bordered[d, d] = total * (1 + 1e-9) + 1
        factor = np.linalg.cholesky(bordered)
        log_det = 2 * np.log(np.diag(factor)[:d]).sum()
        return float(total - (factor[d, :d] ** 2).sum() + np.log(noise).sum() + np.log(prior).sum() + log_det)

    @staticmethod
    def _normal(basis: Array, y: Array, noise: Array) -> tuple[Array, Array]:
        weighed = basis.T / noise
        return weighed @ basis, weighed @ y


class _Hierarchy:
    """The basis [m, 2 * (1 + families + primitives)]: offsets of machine, families and primitives, then slopes."""

    def __init__(self, families: Sequence[str], primitives: Sequence[str]) -> None:
        self.family = {name: i for i, name in enumerate(dict.fromkeys(families))}
        self.primitive = {name: i for i, name in enumerate(dict.fromkeys(primitives))}

    def offsets(self, candidates: Sequence[Candidate]) -> Array:
        """f64 [m, 1 + families + primitives] of ones and zeros. Names never sampled have no column."""
        offsets = np.zeros((len(candidates), 1 + len(self.family) + len(self.primitive)))
        offsets[:, 0] = 1
        for row, (primitive, family) in enumerate(candidates):
            if family in self.family:
                offsets[row, 1 + self.family[family]] = 1
            if primitive in self.primitive:
                offsets[row, 1 + len(self.family) + self.primitive[primitive]] = 1
        return offsets

    def basis(self, size: Array, candidates: Sequence[Candidate]) -> Array:
        """`size` f64 [m], normalised log FLOPs, beside the candidate [m]."""
        offsets = self.offsets(candidates)
        return np.concatenate([offsets, offsets * size[:, None]], axis=1)

    def prior(self, factor: float, slope: float, trust: float, extra: Mapping[str, float]) -> Array:
        """Variance of each column's weight. `extra`: primitive -> `CostModel.prior_std`."""
        std = [_GLOBAL_STD] + [_FAMILY_STD * factor] * len(self.family)
        std += [math.hypot(_PRIMITIVE_STD * factor, extra[name] / trust) for name in self.primitive]
        variance = (trust * np.array(std)) ** 2
        return np.concatenate([variance, variance * slope**2])


class Adapted:
    """A `CostModel` corrected by `samples`.

    Args:
        trusted: the samples come from the machine that the model was trained on, so that little is to be corrected.
        families: primitive -> family for sampled primitives that the model does not know; `family_of` otherwise.
    """

    def __init__(
        self, model: CostModel, samples: Samples, *, trusted: bool = False, families: Mapping[str, str] | None = None
    ) -> None:
        self.model = model
        self.samples = samples = Samples().merged(samples)
        known = dict(families or {}) | dict(zip(model.primitives, model.families, strict=True))
        self._measured = {tuple(t[:3]): t.ms for t in samples.timings}
        self._trust = _TRUSTED if trusted else 1.0
        at = FEATURES.index("log_flops")
        self._centre, self._spread = model.statistics.feature_mean[at], model.statistics.feature_std[at]

        candidates = [(t.primitive, known.get(t.primitive) or family_of(t.primitive)) for t in samples.timings]
        self._hierarchy = _Hierarchy([f for _, f in candidates], [p for p, _ in candidates])
        self._extra = {primitive: model.prior_std(primitive, family) for primitive, family in candidates}
        problems = [ConvProblem.parse(t.problem) for t in samples.timings]
        mean, variance = self._predicted(samples, problems, candidates)
        self._ridge = _Ridge(
            self._hierarchy.basis(self._size(problems), candidates),
            np.log([t.ms for t in samples.timings]) - mean,
            variance,
            [self._hierarchy.prior(f, s, self._trust, self._extra) for f in _FACTORS for s in _SLOPES],
            [noise * self._trust for noise in _NOISES],
        )
        self._operators = _OperatorScale(model, samples.operators, self._trust)

    def _size(self, problems: Sequence[ConvProblem]) -> Array:
        """Normalised log FLOPs [n], kept within what slopes may extrapolate to."""
        log_flops = np.log2([float(p.flops) for p in problems])
        size: Array = np.clip((log_flops - self._centre) / self._spread, -2.5, 2.5)
        return size

    def _predicted(
        self, samples: Samples, problems: Sequence[ConvProblem], candidates: Sequence[Candidate]
    ) -> tuple[Array, Array]:
        """The unadapted model's mean and variance of log(ms) for each sample [m]."""
        mean, variance = np.zeros(len(problems)), np.zeros(len(problems))
        columns = {candidate: i for i, candidate in enumerate(dict.fromkeys(candidates))}
        for threads in {t.threads for t in samples.timings}:
            at = [i for i, t in enumerate(samples.timings) if t.threads == threads]
            rows = {problem: i for i, problem in enumerate(dict.fromkeys(problems[i] for i in at))}
            means, stds = self.model.log_predict(list(rows), list(columns), threads)
            for i in at:
                cell = rows[problems[i]], columns[candidates[i]]
                mean[i] = means[cell]
                variance[i] = stds[cell] ** 2 - self._extra[candidates[i][0]] ** 2
        return mean, variance.clip(min=1e-6)

    def log_predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[Candidate], threads: int
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log(ms), both f64 [n, len(candidates)]; what was timed is as it was timed."""
        mean, std = self.model.log_predict(problems, candidates, threads)
        if not mean.size:
            return mean, std
        offset, size = self._hierarchy.offsets(candidates), self._size(problems)[:, None]
        half = offset.shape[1]
        weight, covariance = self._ridge.mean, self._ridge.covariance
        mean = mean + offset @ weight[:half] + size * (offset @ weight[half:])
        constant, linear, square = (
            ((offset @ block) * offset).sum(axis=1)
            for block in (covariance[:half, :half], covariance[:half, half:], covariance[half:, half:])
        )
        variance = std**2 + constant + 2 * size * linear + size**2 * square
        variance += self._ridge.extra**2 if self.samples.timings else 0.0
        for j, (primitive, family) in enumerate(candidates):
            if primitive in self._extra:
                variance[:, j] -= self._extra[primitive] ** 2
            else:
                unknown = (
                    _PRIMITIVE_STD if family in self._hierarchy.family else math.hypot(_PRIMITIVE_STD, _FAMILY_STD)
                )
                variance[:, j] += (self._trust * unknown) ** 2
        std = np.sqrt(variance.clip(min=MEASURED_STD**2))
        for i, text in enumerate(map(str, problems)) if self._measured else ():
            for j, (primitive, _) in enumerate(candidates):
                ms = self._measured.get((text, primitive, threads))
                if ms is not None:
                    mean[i, j], std[i, j] = math.log(ms), MEASURED_STD
        return mean, std

    def measured_ms(self, problem: ConvProblem, primitive: str, threads: int) -> float | None:
        """As it was timed; None if it was not."""
        return self._measured.get((str(problem), primitive, threads))

    def operator_ms(self, key: str, nbytes: float, threads: int) -> float:
        """Time of one call of the operator that reads and writes `nbytes` together."""
        return self.model.operators.ms(key, nbytes, threads) * self._operators.scale(key)


class _OperatorScale:
    """exp(offset of the machine + offset of the key), shrunk as above, on the operators' lines."""

    def __init__(self, model: CostModel, timings: Sequence[OperatorTiming], trust: float) -> None:
        self._hierarchy = _Hierarchy([], [t.key for t in timings])
        ratio = [math.log(t.ms / max(model.operators.ms(t.key, t.nbytes, t.threads), 1e-6)) for t in timings]
        priors = [self._hierarchy.prior(f, 1e-3, trust, {t.key: 0.5 for t in timings}) for f in _FACTORS]
        self._ridge = _Ridge(
            self._basis([t.key for t in timings]), np.array(ratio), np.full(len(timings), 0.2**2), priors, [0.0]
        )

    def _basis(self, keys: Sequence[str]) -> Array:
        return self._hierarchy.basis(np.zeros(len(keys)), [(key, "") for key in keys])

    def scale(self, key: str) -> float:
        return math.exp((self._basis([key]) @ self._ridge.mean).item())
