"""A Gaussian process over problems and primitives at once: how one machine deviates from what a model says of another.

The deviation of log(ms) is f(x, c) with x a problem and c a primitive, and

    cov(f(x, c), f(x', c')) = sum over l of A_l(c, c') * (offset_l^2 + slope_l^2 x.x' + wave_l^2 matern(x, x'))

where A_l says what shares the deviation: all primitives (the machine), those alike, or each its own. Beside it a
problem deviates as a whole, `common`, and each timing on its own, `noise` times the model's own deviation there. All
widths and the Matern's length are those of the greatest posterior density, found by gradient steps on a part of the
rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

LEVELS = 3
"""The machine, what is alike, the primitive by itself."""
_OFFSET, _SLOPE, _WAVE = slice(0, LEVELS), slice(LEVELS, 2 * LEVELS), slice(2 * LEVELS, 3 * LEVELS)
_LENGTH, _COMMON, _NOISE = 3 * LEVELS, 3 * LEVELS + 1, 3 * LEVELS + 2

_TYPICAL = np.log([1.0, 0.15, 0.1, 0.08, 0.08, 0.08, 0.1, 0.25, 0.1, 1.4, 0.03, 1.0])
"""Log of offsets, slopes and waves of the levels, length, common and noise, where the hyperprior is centred."""
_TOLERANCE = np.array([1.0] * 3 + [0.7] * 6 + [0.5, 0.7, 0.7])
"""Standard deviations of the hyperprior."""
_ROWS, _STEPS, _RATE = 128, 6, 0.4
"""The search for hyperparameters: rows seen, gradient steps, length of a step."""
STUDENT, _ROUNDS = 4.0, 3
"""Degrees of freedom of the noise: a descheduled thread must not move the rest; rounds of weighing the rows."""
_MOST = 1024
"""Rows, a random part, that the variance is computed from where there are more: it comes out too large, if anything."""


def matern(a: Array, b: Array, length: float) -> tuple[Array, Array]:
    """Matern-3/2 of the root mean square distance of a [n, F] and b [m, F], and its derivative by log(length)."""
    square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    r = np.sqrt(3 * square.clip(min=0) / a.shape[1]) / length
    decay = np.exp(-r)
    return (1 + r) * decay, r**2 * decay


@dataclass(frozen=True)
class Rows:
    """Timings: row i is of primitive `c[i]` on problem `x[p[i]]`; `y` is to be explained, `std` the model's own."""

    x: Array
    p: Index
    c: Index
    y: Array
    std: Array

    def __len__(self) -> int:
        return len(self.y)

    def take(self, at: Index) -> Rows:
        return Rows(self.x, self.p[at], self.c[at], self.y[at], self.std[at])


@dataclass(frozen=True)
class Kin:
    """How the primitives of one list relate to those of another, f64 [n, m]: `alike` from 0 to 1, `same` 0 or 1."""

    alike: Array
    same: Array


@dataclass
class Process:
    """`kin` relates the primitives of `rows` to each other.

    extra: f64 [C], width of an offset that a primitive has beside the levels.
    trust: factor on the widths of all deviations.
    """

    rows: Rows
    kin: Kin
    extra: Array
    trust: float = 1.0
    theta: Array = field(init=False)
    """Log of the hyperparameters, in the order of `_TYPICAL`."""
    _alpha: npt.NDArray[Any] = field(init=False)
    _seen: Index = field(init=False)
    _inverse: npt.NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        centre = _TYPICAL.copy()
        centre[:_LENGTH] += np.log(self.trust)
        centre[_COMMON] += np.log(self.trust)
        self.theta = self._search(centre)
        rows = self.rows
        share = self._kernel(rows, self.theta)
        noise = np.exp(2 * self.theta[_NOISE]) * rows.std**2
        weighed: Array = noise
        for _ in range(_ROUNDS):
            self._alpha = np.linalg.solve(share + np.diag(weighed), rows.y)
            rest = (weighed * self._alpha) ** 2 / noise
            weighed = noise * np.maximum(1, (STUDENT + rest) / (STUDENT + 1))
        self._seen = _part(len(rows), _MOST)
        self._inverse = np.linalg.inv(share[np.ix_(self._seen, self._seen)] + np.diag(weighed[self._seen]))

    def _coupling(self, part: slice, theta: Array, kin: Kin) -> Array:
        """Sum over the levels of width^2 * A_l, f64 like `kin`."""
        machine, alike, own = np.exp(2 * theta[part])
        total: Array = machine + alike * kin.alike + own * kin.same
        return total + kin.same * self.extra**2 if part is _OFFSET else total

    def _kernel(self, rows: Rows, theta: Array) -> Array:
        """Covariance of f and the common deviation among `rows`, f64 [n, n]."""
        wave, _ = matern(rows.x, rows.x, float(np.exp(theta[_LENGTH])))
        slope = rows.x @ rows.x.T / rows.x.shape[1]
        pp, cc = np.ix_(rows.p, rows.p), np.ix_(rows.c, rows.c)
        result: Array = (
            self._coupling(_OFFSET, theta, self.kin)[cc] + np.exp(2 * theta[_COMMON]) * np.eye(len(rows.x))[pp]
        )
        result += self._coupling(_SLOPE, theta, self.kin)[cc] * slope[pp]
        result += self._coupling(_WAVE, theta, self.kin)[cc] * wave[pp]
        return result

    def _search(self, centre: Array) -> Array:
        """Adam on -log(marginal likelihood * hyperprior)."""
        rows = self.rows
        if not len(rows):
            return centre
        rows = rows.take(_part(len(rows), _ROWS))
        theta, first, second = centre.copy(), np.zeros_like(centre), np.zeros_like(centre)
        for step in range(1, _STEPS + 1):
            slope = self._gradient(rows, theta) + (theta - centre) / _TOLERANCE**2
            first = 0.8 * first + 0.2 * slope
            second = 0.9 * second + 0.1 * slope**2
            theta = theta - _RATE * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.9**step)) + 1e-8)
        return theta

    def _gradient(self, rows: Rows, theta: Array) -> Array:
        """The gradient of -log(marginal likelihood) by `theta`: tr((K^-1 - a a') dK) / 2 with a = K^-1 y."""
        noise = np.exp(2 * theta[_NOISE]) * rows.std**2
        inverse = np.linalg.inv(self._kernel(rows, theta) + np.diag(noise))
        alpha = inverse @ rows.y
        w = inverse - np.outer(alpha, alpha)
        wave, by_length = matern(rows.x, rows.x, float(np.exp(theta[_LENGTH])))
        pp, cc = np.ix_(rows.p, rows.p), np.ix_(rows.c, rows.c)
        weights = np.exp(2 * theta)
        slope = np.empty_like(theta)
        alike, same = self.kin.alike[cc], self.kin.same[cc]
        for part, over in (
            (_OFFSET, w),
            (_SLOPE, w * (rows.x @ rows.x.T / rows.x.shape[1])[pp]),
            (_WAVE, w * wave[pp]),
        ):
            slope[part] = weights[part] * [over.sum(), (over * alike).sum(), (over * same).sum()]
        slope[_LENGTH] = 0.5 * (w * self._coupling(_WAVE, theta, self.kin)[cc] * by_length[pp]).sum()
        slope[_COMMON] = weights[_COMMON] * w[rows.p[:, None] == rows.p[None, :]].sum()
        slope[_NOISE] = (np.diag(w) * noise).sum()
        return slope

    def predict(self, x: Array, std: Array, kin: Kin, extra: Array) -> tuple[Array, Array]:
        """Mean of the deviation and variance of what would be timed, f64 [m, Q], of Q primitives on x [m, F].

        std: f64 [m, Q], the model's own deviation. kin: the Q primitives and those of the rows. extra: f64 [Q].
        """
        theta, rows = self.theta, self.rows
        widths = np.exp(2 * theta)
        variance = widths[_OFFSET].sum() + widths[_WAVE].sum() + widths[_COMMON] + extra**2
        variance = variance + (x**2).mean(axis=1)[:, None] * widths[_SLOPE].sum() + widths[_NOISE] * std**2
        if not len(rows):
            return np.zeros_like(std), variance
        offset, slope, wave = (self._coupling(part, theta, kin) for part in (_OFFSET, _SLOPE, _WAVE))
        waves, _ = matern(x, rows.x, float(np.exp(theta[_LENGTH])))
        slopes = x @ rows.x.T / x.shape[1]
        alpha = np.zeros((len(rows.x), len(self.extra)))
        np.add.at(alpha, (rows.p, rows.c), self._alpha)
        mean = (offset @ alpha.sum(axis=0)) + slopes @ alpha @ slope.T + waves @ alpha @ wave.T
        p, c = rows.p[self._seen], rows.c[self._seen]
        slopes, waves = slopes[:, p], waves[:, p]
        for j in range(len(extra)):
            across = offset[j, c] + slopes * slope[j, c] + waves * wave[j, c]
            variance[:, j] -= ((across @ self._inverse) * across).sum(axis=1)
        return mean, variance


def _part(count: int, most: int) -> Index:
    """Indices of all of `count` rows, or of `most` of them, always the same ones."""
    return np.arange(count) if count <= most else np.random.default_rng(0).permutation(count)[:most]
